"""Several real processes from one command: what users see of them, and of their ends."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_acc.core.atomic import check_manifest
from llama_acc.core.checkpoint.layout import latest_checkpoint
from llama_acc.core.distributed import Launch
from llama_acc.core.distributed.environment import first_host, join_slurm, world_size
from llama_acc.core.errors import RunError, UserError
from tests.cli.commands import (
    PATIENCE,
    TINY,
    gone,
    invoke,
    lines_of,
    metrics,
    refused,
    start,
    start_slurm_job,
    wait_until,
    workers_of,
)
from tests.core.ranks import free_port
from tests.core.seeing import QFORMER
from tests.core.train.image_runs import words_for, write_data

# 32 items, four optimizer steps an epoch.
SHORT = ("--recipe", "quickstart", TINY, "train.epochs=6", "checkpoint.every_steps=2", "checkpoint.keep=2")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Job:
    """A finetune command in processes of its own."""

    def __init__(self, output: Path, *words: object) -> None:
        self.output, self.process = output, start("finetune", "--device", "cpu", "--output", output, *words)

    def wait(self) -> int:
        """Waits for its end."""
        self.out, self.err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Waits for something it does."""
        wait_until(happened, self.process)

    def kill_a_rank(self, choice: random.Random, *others: "Job") -> None:
        """Kills one of the ranks of all these, and waits until none is left."""
        workers = [pid for job in (self, *others) for pid in workers_of(job.process).values()]
        os.kill(choice.choice(workers), signal.SIGKILL)
        assert gone(workers)


def steps(output: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(output) if "loss" in line]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of two ranks that Ctrl-C stopped; `logs` beside it has what each rank wrote."""
    folder = tmp_path_factory.mktemp("stopped")
    job = Job(folder / "run", *SHORT, "--nproc", 2, "--log-ranks", folder / "logs", "name=$RANK $$ {x}")
    job.wait_until((job.output / "latest").exists)
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 130, job.err
    return job


def test_ctrl_c_saves_on_all_ranks_and_what_each_wrote_is_kept_where_it_is_asked_for(stopped: Job) -> None:
    newest = latest_checkpoint(stopped.output)
    assert newest is not None
    check_manifest(newest, verify=True)
    assert stopped.out == ""
    again = f"llama-acc finetune --output {stopped.output} --resume --nproc 2 --device cpu"
    assert stopped.err.splitlines()[-1] == f"stopped; resume with: {again}"
    assert stopped.err.count("SIGINT: saving after this step") == 1
    assert "name: $RANK $$ {x}" in (stopped.output / "recipe.yaml").read_text()
    logs = stopped.output.parent / "logs"
    kept = {tuple(path.parts[-2:]): path.read_text() for path in logs.rglob("*.log") if path.parent.name in "01"}
    assert sorted(kept) == [(rank, f"{name}.log") for rank in "01" for name in ("stderr", "stdout")]
    assert "step 1/24" in kept["0", "stderr.log"]
    assert kept["1", "stdout.log"] == ""


def test_two_machines_go_on_with_it_and_meet_again_after_a_rank_of_one_was_killed(stopped: Job, tmp_path: Path) -> None:
    """It ends as the run of one process that nobody stopped."""
    output = tmp_path / "run"
    shutil.copytree(stopped.output, output)
    meeting = ("--nproc", 1, "--nnodes", 2, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--max-restarts", 1)
    jobs = [Job(output, "--resume", *meeting) for _ in range(2)]
    known = lines_of(output)
    jobs[0].wait_until(lambda: lines_of(output) > known)
    jobs[0].kill_a_rank(random.Random(1), jobs[1])
    for job in jobs:
        assert job.wait() == 0, job.err
        assert job.err.count("restarting from the last whole checkpoint") == 1, job.err
    assert "".join(job.out for job in jobs) == f"llama-acc chat --ckpt {output}\n"
    assert invoke("finetune", *SHORT, "--output", tmp_path / "alone", "--device", "cpu").exit_code == 0
    (numbers, losses), (expected, alone) = (zip(*steps(tmp_path / name), strict=True) for name in ("run", "alone"))
    assert numbers == expected == tuple(range(1, 25))
    assert losses == pytest.approx(alone, rel=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_a_job_goes_on_after_many_kills_to_the_bit(seed: int, tmp_path: Path) -> None:
    processes, choice = 2 + 2 * (seed % 2), random.Random(seed)
    longer = (*SHORT, "train.epochs=12", "--nproc", processes)
    left = Job(tmp_path / "left", *longer)
    assert left.wait() == 0, left.err
    job = Job(tmp_path / "killed", *longer, "--max-restarts", 3)
    for _ in range(3):
        number = min(lines_of(job.output) + choice.randrange(1, 9), 36)
        job.wait_until(lambda number=number: lines_of(job.output) >= number)  # type: ignore[misc]
        job.kill_a_rank(choice)
    assert job.wait() == 0, job.err
    assert job.err.count("restarting from the last whole checkpoint") == 3, job.err
    assert steps(job.output) == steps(left.output)
    weights = "epoch11/consolidated.00-of-01.model.pth"
    assert (job.output / weights).read_bytes() == (left.output / weights).read_bytes()


def test_a_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", *SHORT, "--nproc", 2)
    job.wait_until(lambda: len(workers_of(job.process)) == 2)
    workers = list(workers_of(job.process).values())
    job.process.kill()
    assert gone(workers)
    job.wait()


def test_a_killed_rank_is_told_with_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(how: Launch, processes: int, *rest: object) -> int:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "recipe.yaml").touch()
        raise RunError(f"rank 1 of {processes} was killed")

    monkeypatch.setattr("llama_acc.core.distributed.launch.launch", launch)
    result = invoke("finetune", *SHORT, "--output", tmp_path / "run", "--nproc", 2)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-2:] == [
        "error: rank 1 of 2 was killed",
        f"hint: resume with: llama-acc finetune --output {tmp_path / 'run'} --resume --nproc 2",
    ]


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (UserError("no data", "so"), "error", 2),
        (RunError("the disk is full"), "error", 1),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1"), "lost", 1),
        (ValueError("the dog ate it"), "crash", 1),
    ],
)
def test_a_rank_leaves_its_error_to_the_launcher(
    error: Exception, kind: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: object) -> None:
        raise error

    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    own = {"LLAMA_ACC_LAUNCHER": "1", "LLAMA_ACC_STOP_FILE": "/x", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error")}
    for name, value in {**place, **own}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("llama_acc.core.checkpoint.layout.locate", fail)
    result = invoke("finetune", "--recipe", "quickstart", "--pretrained", "x", "--output", tmp_path / "run")
    assert (result.exit_code, result.output) == (code, "")
    left = json.loads((tmp_path / "error").read_text())
    assert (left["kind"], left["exit_code"], left["rank"]) == (kind, code, 1)
    assert str(error).splitlines()[0] in left["message"]["message"]


def test_what_only_one_of_slurm_s_ranks_finds_is_told_once_and_ends_all(tmp_path: Path) -> None:
    """Of two model-parallel ranks one has the vision tower, and transformers fails there."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('huggingface-hub<1.0 is required')")
    words = words_for(QFORMER, write_data(tmp_path / "data"), "tuning.method=lora", "checkpoint.trainable_only=true")
    words += ["--recipe", "quickstart", "train.warmup_epochs=0", "parallel.model_parallel_size=2", TINY]
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    command = ("finetune", "--device", "cpu", "--output", tmp_path / "run", *words)
    jobs = start_slurm_job(*command, ranks=2, PYTHONPATH=path)
    ends = [(job.communicate(timeout=PATIENCE)[1], job.returncode) for job in jobs]
    assert [code for _, code in ends] == [2, 2], ends
    said = "images need the package transformers, which cannot be imported: huggingface-hub<1.0 is required"
    lines = [line for err, _ in ends for line in err.splitlines() if "cannot be imported" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: rank ")
    assert lines[0].endswith(said)


@pytest.fixture
def no_place(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of other processes, and is restored."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("LLAMA_ACC_SLURM", "")
    return monkeypatch


def test_slurm_s_variables_are_understood(no_place: pytest.MonkeyPatch) -> None:
    no_place.setenv("SLURM_PROCID", "0")
    no_place.setenv("SLURM_NTASKS", "9")
    join_slurm()
    assert "RANK" not in os.environ, "a batch script is not a step of several tasks"
    step = {
        "SLURM_PROCID": "7",
        "SLURM_STEP_NUM_TASKS": "9",
        "SLURM_LOCALID": "3",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
        "SLURM_STEP_NODELIST": "gpu[07-09]",
        "SLURM_JOB_ID": "123456",
    }
    for name, value in step.items():
        no_place.setenv(name, value)
    join_slurm()
    assert [os.environ[name] for name in VARIABLES] == ["7", "9", "3", "4", "gpu07", "18456"]


# What `srun --pty` leaves in the shell it opens; there SLURM_TASK_PID is the shell's.
_PTY_SHELL = {
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PTY_PORT": "40000",
    "SLURM_TASK_PID": "1",
    "SLURM_STEP_NODELIST": "localhost",
}


@pytest.mark.parametrize(
    ("changed", "joins"),
    [({}, False), ({"SLURM_TASK_PID": str(os.getpid())}, True), ({"SLURM_PROCID": "1"}, True)],
    ids=["typed in its shell", "the task itself", "another task"],
)
def test_only_what_is_typed_in_the_shell_of_a_slurm_step_runs_alone(
    changed: dict[str, str], joins: bool, no_place: pytest.MonkeyPatch
) -> None:
    for name, value in {**_PTY_SHELL, **changed}.items():
        no_place.setenv(name, value)
    note = join_slurm()
    assert (note is None, world_size()) == ((True, 4) if joins else (False, 1))


_IMPATIENT = (
    "from llama_acc.core.distributed import environment; environment._SAY_AFTER = 0.2; "
    "from llama_acc.cli.app import main; main()"
)
_SRUN = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "localhost"}


def test_a_process_whose_others_never_come_says_who_and_how_to_run_alone_and_hears_signals(tmp_path: Path) -> None:
    """As with a RANK that an earlier command left in the shell."""
    port = str(free_port())
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    cases = [
        ({**meeting, "RANK": "1", "LOCAL_RANK": "1"}, f"rank 0 of 2 processes to answer at 127.0.0.1:{port}",
         "-u RANK -u WORLD_SIZE", signal.SIGINT, 130),
        ({**_SRUN, "MASTER_PORT": str(free_port())}, "ranks 1, 2 of 3 processes to come to localhost:",
         "-u SLURM_PROCID", signal.SIGTERM, 143),
    ]  # fmt: skip
    words = ("finetune", "--recipe", "quickstart", "--device", "cpu", "--output", tmp_path / "run")
    command = [sys.executable, "-c", _IMPATIENT, *map(str, words)]
    jobs = [
        subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
        for environment, *_ in cases
    ]
    for job, (_, whom, alone, number, code) in zip(jobs, cases, strict=True):
        assert job.stderr is not None
        lines = iter(job.stderr.readline, "")  # the first may say that rank 0's own store is slow to open
        line = next(line for line in lines if line.startswith(f"waiting for {whom}"))
        assert f"put this before the command: env {alone})" in line
        job.send_signal(number)
        assert job.wait(PATIENCE) == code
        assert "Traceback" not in job.stderr.read()
    assert not (tmp_path / "run").exists()


PLACE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
ALONE = "to run alone, put this before the command: env -u RANK -u WORLD_SIZE"


@pytest.mark.parametrize(
    ("environment", "words", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "chat --ckpt x", ["MASTER_ADDR and MASTER_PORT not set", ALONE]),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "chat --ckpt x", ["RANK is 'first'", ALONE]),
        (PLACE | {"RANK": "2"}, "chat --ckpt x", ["RANK=2 is none of the 2 processes", ALONE]),
        (PLACE | {"MASTER_PORT": "70000"}, "chat --ckpt x", ["MASTER_PORT=70000 is no port", ALONE]),
        (PLACE, "finetune --recipe quickstart --nproc 2", ["started by torchrun or Slurm"]),
        # A command of one process tells its errors whatever rank the shell has.
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "recipes show x", ["error: unknown recipe 'x'"]),
    ],
)
def test_what_the_environment_says_wrongly_is_refused(
    environment: dict[str, str], words: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(invoke(*words.split()), *said)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[07-09,12],b", "gpu07"), ("gpu[3,5]", "gpu3"), ("n[1-2]-ib,x", "n1-ib")],
)
def test_the_first_of_slurm_s_hosts(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
