"""Images are decoded by other processes: same pixels, in order, gone with their parent."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_acc.core.data.image_files import ImageWorkers, default_workers, image_problems
from llama_acc.core.data.images import ImageJob, Transform, pixels, pixels_or_problem
from tests.core.data.pictures import encoded, plain, write_pictures

CROP = Transform("random_resized_crop", 16)


def workers_of(process: int) -> set[int]:
    """The worker processes that a process has started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()
    return {int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()}


def test_batches_are_the_same_whatever_the_number_of_workers_and_asked_for_as_far_ahead_as_said(
    tmp_path: Path,
) -> None:
    references = write_pictures(tmp_path, 6)
    Path(references[5]).write_bytes(encoded(plain(0), "JPEG")[:-300])
    batches = [[ImageJob(references[(i * 2 + n) % 6], CROP, (0, i, n)) for n in range(i % 4)] for i in range(9)]
    asked = []

    def asked_for():
        for batch in batches:
            asked.append(batch)
            yield batch

    for count in (1, 3):
        asked.clear()
        with ImageWorkers(count) as workers:
            made = workers.map_ahead(pixels_or_problem, asked_for(), ahead=3)
            first = next(made)
            assert len(asked) == 4
            results = [first, *made]
        assert [len(batch) for batch in results] == [len(batch) for batch in batches]
        for batch, jobs in zip(results, batches, strict=True):
            for image, job in zip(batch, jobs, strict=True):
                if job.reference == references[5]:
                    assert str(image).startswith("is broken")
                else:
                    assert (image == pixels(job)).all()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_import_neither_torch_nor_the_script_and_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time, wave\nfrom llama_acc.core.data.image_files import ImageWorkers\n"
        """made = ImageWorkers(1).map_ahead(eval, [["{'torch', 'wave'} & set(__import__('sys').modules)"]], 0)\n"""
        "print(next(made), flush=True)\ntime.sleep(100)\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"[set()]\n"
    workers = workers_of(parent.pid)
    assert len(workers) == 1
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_bad_images_are_found(tmp_path: Path) -> None:
    good = write_pictures(tmp_path, 70)
    text, large, missing = (str(tmp_path / name) for name in ("text.png", "large.png", "no.jpg"))
    Path(text).write_text("no picture", encoding="utf-8")
    Path(large).write_bytes(encoded(plain(0, size=(300, 200))))
    reported: list[tuple[int, int]] = []
    with ImageWorkers(2) as workers:
        assert image_problems([], 1, workers) == {}
        problems = image_problems([*good, missing, text, large], 59_999, workers, lambda *done: reported.append(done))
    assert problems == {
        missing: "was not found",
        text: "is not a picture of a known kind (JPEG, PNG, WEBP, GIF, BMP, TIFF)",
        large: "has 300 x 200 pixels, more than 59,999",
    }
    assert reported == [(64, 73), (73, 73)]


def test_some_cores_are_left_to_training() -> None:
    assert default_workers() == min(max(len(os.sched_getaffinity(0)) - 1, 1), 8)
    assert default_workers(1000) == 1
