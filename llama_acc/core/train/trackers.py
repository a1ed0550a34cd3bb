"""Where a run's curves go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Trackio.

What a tracker needs to be told, where and as whom to log, it takes from its own settings and environment variables.
A resumed run is continued as the same run there, and no point is logged twice: trackers.json says what was. One that
fails ends with a line; the run goes on. A tracker's package is imported where it is asked for.
"""

import contextlib
import io
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama_acc.core.atomic import remove, write_text_whole
from llama_acc.core.catalogue import without_secrets
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object
from llama_acc.core.train.runs import flat

FILE = "trackers.json"
_PROJECT = "llama-acc"
_SECONDS = 30
"""So long a run waits for the servers of Weights & Biases or MLflow, at its beginning or end."""
Metrics = Mapping[str, Any]


class _Tracker:
    """A run, opened with its folder, its id there (None: it is new), and the recipe; `id` None: it keeps no run."""

    id: str | None = None

    def __init__(self, run: Path, id: str | None, recipe: dict[str, Any]) -> None: ...

    def log(self, step: int, values: Metrics) -> None:
        """Takes the numbers of a step."""

    def log_text(self, step: int, text: str) -> None:
        """Takes the samples of a step, in Markdown, if it can show them."""

    def close(self, status: str) -> None:
        """Ends the run: it is "FINISHED", "KILLED" or "FAILED"."""


class _TensorBoard(_Tracker):
    """A file in `tensorboard/`, made anew. It is a TFRecord of Event messages, not written by `SummaryWriter`, whose
    thread prints tracebacks and keeps what it could not write."""

    def __init__(self, run: Path, id: str | None, recipe: dict[str, Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run / "tensorboard"
        if folder.is_symlink() or not folder.is_dir():
            remove(folder)
            folder.mkdir()
        for old in folder.glob("events.*"):
            remove(old)
        name = f"events.out.tfevents.{time.time():.0f}.{os.uname().nodename}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("xb"))
        self._write(file_version="brain.Event:2")

    def _write(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **event).SerializeToString())
        self._records.flush()

    def log(self, step: int, values: Metrics) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=key, simple_value=value) for key, value in values.items()])
        self._write(step=step, summary=summary)

    def log_text(self, step: int, text: str) -> None:
        from torch.utils.tensorboard.summary import text as text_summary

        self._write(step=step, summary=text_summary("samples", text))

    def close(self, status: str) -> None:
        self._records.close()


class _WandB(_Tracker):
    """Weights & Biases; who is not logged in there logs off-line, below the run's folder."""

    def __init__(self, run: Path, id: str | None, recipe: dict[str, Any]) -> None:
        import wandb

        self.id = id or secrets.token_hex(4)
        # The command line and the address of a git repository, which it would keep too, may hold a token.
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            init_timeout=_SECONDS,
            finish_timeout=_SECONDS,
            finish_timeout_raises=True,
        )
        wandb.setup(settings)
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=self.id,
            name=run.name,
            dir=str(run),
            mode=mode,
            resume="allow",
            config=recipe,
            allow_val_change=True,
            settings=settings,
        )

    def log(self, step: int, values: Metrics) -> None:
        self._run.log(values, step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=int(status != "FINISHED"))


class _MLflow(_Tracker):
    """MLflow: the recipe as parameters, and whole as an artifact."""

    def __init__(self, run: Path, id: str | None, recipe: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_SECONDS // 3))
        import mlflow
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = mlflow.MlflowClient()
        if id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            id = self._client.create_run(experiment, run_name=run.name).info.run_id
            # What a resumed run has changed, its parameters there may not.
            params = [Param(key, str(value)[:500]) for key, value in flat(recipe).items()]
            self._client.log_batch(id, params=params)
        else:
            self._client.update_run(id, "RUNNING")
        self.id = id
        self._client.log_dict(id, recipe, "recipe.yaml")

    def log(self, step: int, values: Metrics) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, [Metric(key, value, now, step) for key, value in values.items()])

    def close(self, status: str) -> None:
        self._client.set_terminated(self.id, status)


class _Trackio(_Tracker):
    """Trackio, in whose projects runs are told apart by their names."""

    def __init__(self, run: Path, id: str | None, recipe: dict[str, Any]) -> None:
        import trackio

        # The run's own method would leave it to be finished a second time at the process's end.
        self._finish = trackio.finish
        self.id = id or f"{run.name}-{secrets.token_hex(4)}"
        with contextlib.redirect_stdout(io.StringIO()):  # which carries results
            self._run = trackio.init(
                project=_PROJECT, name=self.id, resume="allow", config=recipe, private=True, embed=False
            )

    def log(self, step: int, values: Metrics) -> None:
        self._run.log(dict(values), step=step)

    def close(self, status: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._finish()


_KINDS: dict[str, tuple[str, type[_Tracker]]] = {
    "tensorboard": ("TensorBoard", _TensorBoard),
    "wandb": ("Weights & Biases", _WandB),
    "mlflow": ("MLflow", _MLflow),
    "trackio": ("Trackio", _Trackio),
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers whose packages are not installed, with a UserError."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(
            f"train.trackers has {' and '.join(missing)}, which is not installed here",
            f"pip install 'llama-acc[{','.join(missing)}]', or leave it out of train.trackers",
        )


class Trackers:
    """The trackers of a run, of which the log has some lines: those of its earlier processes."""

    def __init__(
        self,
        run: Path,
        names: Sequence[str],
        recipe: Mapping[str, Any],
        lines: Sequence[Metrics],
        note: Callable[[str], None],
    ) -> None:
        """Opens them. `lines` are all there are, also those that a resumed run will compute again."""
        self._run, self._note = run, note
        self._open: dict[str, _Tracker] = {}
        self._logged: dict[str, list[int]] = {}
        state = {}
        if (run / FILE).exists():
            try:
                state = read_object(run / FILE)
            except UserError as error:
                note(f"{error.message}: trackers begin new runs")
        for name in dict.fromkeys(names):
            self._guarded(name, lambda name=name: self._begin(name, state, _harmless(recipe), lines))  # type: ignore[misc]
        if state:
            write_text_whole(run / FILE, json.dumps(state, indent=1) + "\n")

    def _begin(self, name: str, state: dict[str, Any], recipe: dict[str, Any], lines: Sequence[Metrics]) -> None:
        known = state.get(name, {"id": None, "logged": []})
        tracker = _KINDS[name][1](self._run, known["id"], recipe)
        # To one that keeps the run, the earlier processes have given their lines.
        self._logged[name] = max(known["logged"], *map(_place, lines), []) if known["id"] else []
        if tracker.id is not None:
            state[name] = {"id": tracker.id, "logged": self._logged[name]}
        self._open[name] = tracker

    def log(self, line: Metrics) -> None:
        """Takes a line of metrics.jsonl."""
        values = {key: value for key, value in line.items() if key not in ("step", "epoch")}
        self._each(lambda tracker: tracker.log(line["step"], values), _place(line))

    def log_text(self, step: int, text: str) -> None:
        """Takes a step's samples, in Markdown."""
        self._each(lambda tracker: tracker.log_text(step, text), [step, 1])

    def close(self, status: str) -> None:
        """Ends them; see `_Tracker.close`."""
        self._each(lambda tracker: tracker.close(status))

    def _each(self, work: Callable[[_Tracker], None], place: list[int] | None = None) -> None:
        for name, tracker in list(self._open.items()):
            if place is None or place > self._logged[name]:
                self._guarded(name, lambda tracker=tracker: work(tracker))  # type: ignore[misc]

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        """Ends a tracker that fails, however it does: it is not what the run is for."""
        try:
            work()
        except Exception as error:
            self._open.pop(name, None)
            why = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
            shown = _KINDS[name][0]
            self._note(f"{shown}'s curves end here ({without_secrets(why)}); metrics.jsonl in {self._run} has all")


def _place(line: Metrics) -> list[int]:
    """Where a line stands in the log: a step's validation follows the step."""
    return [line["step"], int("validation_loss" in line)]


def _harmless(value: Any) -> Any:
    """A recipe without what is secret in its addresses."""
    if isinstance(value, Mapping):
        return {key: _harmless(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_harmless(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value
