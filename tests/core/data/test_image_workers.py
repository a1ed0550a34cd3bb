"""Images are decoded by other processes: same pixels, in order, gone with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llama_acc.core.data.image_checks import image_problems
from llama_acc.core.data.image_workers import ImageWorkers, default_workers
from llama_acc.core.data.images import ImageError, ImageJob, Transform, pixels
from llama_acc.core.errors import RunError
from tests.core.data.pictures import encoded, plain, write_pictures

CROP = Transform("random_resized_crop", 16)


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()]


@pytest.mark.parametrize("count", [1, 3])
def test_batches_are_the_same_whatever_the_number_of_workers(tmp_path: Path, count: int) -> None:
    references = write_pictures(tmp_path, 6)
    batches = [[ImageJob(references[(i * 2 + n) % 6], CROP, (0, i, n)) for n in range(i % 4)] for i in range(9)]
    with ImageWorkers(count) as workers:
        made = list(workers.prefetched(batches, ahead=2))
    assert [len(batch) for batch in made] == [len(batch) for batch in batches]
    for batch, jobs in zip(made, batches, strict=True):
        assert all((image == pixels(job)).all() for image, job in zip(batch, jobs, strict=True))


def test_batches_are_asked_for_only_as_far_ahead_as_said(tmp_path: Path) -> None:
    references = write_pictures(tmp_path, 1)
    asked = []

    def batches():
        for number in range(10):
            asked.append(number)
            yield [ImageJob(references[0], CROP)]

    with ImageWorkers(1) as workers:
        made = workers.prefetched(batches(), ahead=3)
        next(made)
        assert asked == [0, 1, 2, 3]


def test_an_image_lost_after_the_check_ends_the_run_by_name(tmp_path: Path) -> None:
    jobs = [[ImageJob(reference, CROP)] for reference in write_pictures(tmp_path, 2)]
    Path(jobs[1][0].reference).unlink()
    with ImageWorkers(1) as workers:
        made = workers.prefetched(jobs, ahead=1)
        next(made)
        with pytest.raises(RunError, match=r"0001\.png is not there, though it could be opened before"):
            next(made)


def test_one_bad_picture_is_an_error_of_its_own(tmp_path: Path) -> None:
    good = write_pictures(tmp_path, 1)[0]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(encoded(plain(0), "JPEG")[:-300])
    with ImageWorkers(2) as workers:
        failed, made = workers.load(ImageJob(str(bad), CROP)), workers.load(ImageJob(good, CROP))
        assert made.result().shape == (3, 16, 16)
        with pytest.raises(ImageError, match="is broken"):
            failed.result()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_worker_is_an_error_that_says_so(tmp_path: Path) -> None:
    job = ImageJob(write_pictures(tmp_path, 1)[0], CROP)
    before = set(children(os.getpid()))
    with ImageWorkers(1) as workers:
        workers.load(job).result()
        (worker,) = set(children(os.getpid())) - before
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
        assert workers.load(job).result().dtype == np.uint8, "Ctrl-C and SIGTERM are the parent's"
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(
            RunError, match=r"process that decodes images (ended: killed by signal 9|cannot be reached)"
        ):
            workers.load(job).result()
    assert not set(children(os.getpid())) - before


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_a_parent_that_was_killed() -> None:
    program = (
        "import time; from llama_acc.core.data.image_workers import ImageWorkers; workers = ImageWorkers(2); "
        "workers.check([], 1).result(); workers.check([], 1).result(); print('ready', flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    workers = children(parent.pid)
    assert len(workers) == 2
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_workers_import_no_torch() -> None:
    program = "import sys, llama_acc.core.data.image_workers; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_all_bad_images_are_found(tmp_path: Path) -> None:
    good = write_pictures(tmp_path, 70)
    text, large, missing = (str(tmp_path / name) for name in ("text.png", "large.png", "no.jpg"))
    Path(text).write_text("no picture", encoding="utf-8")
    Path(large).write_bytes(encoded(plain(0, size=(300, 200))))
    told: list[tuple[int, int]] = []
    problems = image_problems([*good, missing, text, large], 59_999, 2, lambda *done: told.append(done))
    assert problems == {
        missing: "is not there",
        text: "is not a picture of a known kind (JPEG, PNG, WEBP, GIF, BMP, TIFF)",
        large: "has 300 x 200 pixels, more than 59,999",
    }
    assert told == [(64, 73), (73, 73)]
    assert image_problems([], 1, 2) == {}


def test_some_cores_are_left_to_training() -> None:
    cores = len(os.sched_getaffinity(0))
    assert default_workers() == min(max(cores - 1, 1), 8)
    assert default_workers(1000) == 1
