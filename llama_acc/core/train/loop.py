"""The training loop: every example of every epoch, logged, saved, resumable to the bit."""

import signal
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llama_acc.core.checkpoint.save import Saver, Snapshot, write_checkpoint
from llama_acc.core.device import Arriving, free_memory, peak_memory_gib
from llama_acc.core.distributed.groups import local_world_size
from llama_acc.core.errors import RunError, listed
from llama_acc.core.interrupt import Interrupted, StopRequest
from llama_acc.core.train.log import MetricsLog
from llama_acc.core.train.run_folder import RunFolder
from llama_acc.core.train.runs import Callback
from llama_acc.core.train.trainer import Trainer


class Loop:
    """Runs a trainer to the plan's end; on rank 0, which has a log, it also logs and reports."""

    def __init__(
        self, trainer: Trainer, folder: RunFolder, log: MetricsLog | None, callback: Callback, stop: StopRequest
    ) -> None:
        self.trainer, self.folder, self.log, self.callback, self.stop = trainer, folder, log, callback, stop
        self._saver = Saver()
        self._pending: tuple[Arriving, dict[str, Any]] | None = None
        self._stop_of_any_rank: signal.Signals | None = None
        self._since = 0.0  # when the step before the pending one was done

    def run(self) -> None:
        """Trains until the plan is done.

        Raises:
            RunError: a loss that is not finite; the checkpoint under way was saved. So it was where memory runs out.
            Interrupted: a signal came in; a checkpoint was saved.
        """
        try:
            self._run()
        except (RunError, MemoryError, RuntimeError):
            self._report_saved(wait=True)
            raise

    def _run(self) -> None:
        trainer, plan = self.trainer, self.trainer.plan
        if trainer.step == 0:  # what training is to better
            if plan.validation is not None:
                self._validate()
            self._sample()
        self._since = time.perf_counter()
        while trainer.step < plan.total_steps and not trainer.stops_early:
            result, known = trainer.advance(self._saver.wait_for_copy, self._rank_stats())
            numbers = torch.cat((result.loss.view(1), result.grad_norm.view(1), result.extra_sums))
            current = Arriving(numbers), known
            # A device works on this step while the host looks at the one before; a CPU has finished it by now.
            self._log_pending_step()
            self._pending = current
            if trainer.device.type == "cpu":
                self._log_pending_step()
            self._report_saved(wait=False)
            # Ranks stop after the same step: the one whose result told all of them.
            stop = self.stop.received if trainer.parallel.world_size == 1 else self._stop_of_any_rank
            due_save = plan.saves_at(trainer.step) or stop is not None
            due_validation, due_samples = plan.validates_at(trainer.step), plan.samples_at(trainer.step)
            if not (due_save or due_validation or due_samples):
                continue
            self._log_pending_step()
            if due_validation:
                self._validate()
                due_save |= plan.patience is not None and (trainer.best_step == trainer.step or trainer.stops_early)
            if due_samples or trainer.stops_early:  # before a checkpoint that a resume would begin behind
                self._sample()
            if due_save:
                self._save(at_once=stop is not None or trainer.step == plan.total_steps or trainer.stops_early)
            if stop is not None and trainer.step < plan.total_steps:
                raise Interrupted(stop)
            self._since = time.perf_counter()

    def _rank_stats(self) -> list[float]:
        """What is summed over the ranks with a step's result: the signals that came in, and each rank's memory."""
        parallel, stop = self.trainer.parallel, self.stop.received
        peaks = [0.0] * parallel.world_size
        peaks[parallel.rank] = peak_memory_gib(self.trainer.device)
        return [float(stop == signal.SIGINT), float(stop == signal.SIGTERM), *peaks]

    def _log_pending_step(self) -> None:
        """Reads the pending step's results, logs them, and refuses to continue from a step that is not finite."""
        if self._pending is None:
            return
        (arriving, known), self._pending = self._pending, None
        loss, grad_norm, interrupted, terminated, *peaks = arriving.read()
        now = time.perf_counter()
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            plan, step = self.trainer.plan, known["step"]
            items = [plan.train.origin(int(item)) for item in plan.items(step - 1)]
            raise RunError(
                f"the loss of step {step} is {loss}, its gradient norm {grad_norm}: "
                f"the weights did not take this step, the newest checkpoint in {self.folder.path} is unharmed. "
                f"The step's items:\n{listed(items, most=16)}",
                "look at these items; try a lower optimizer.lr, a longer train.warmup_epochs, or train.precision=fp32",
            )
        if interrupted or terminated:
            self._stop_of_any_rank = signal.SIGTERM if terminated else signal.SIGINT
        metrics = {
            "step": known.pop("step"),
            "epoch": known.pop("epoch"),
            "loss": loss,
            "grad_norm": grad_norm,
            **known,
            "tokens_per_second": known["tokens"] / max(now - self._since, 1e-9),
            "peak_memory_gib": max(peaks),
        }
        self._since = now
        if self.log is not None:
            self.log.write(metrics)
        self.callback.step(metrics, self.trainer.plan)

    def _validate(self) -> None:
        metrics = {"step": self.trainer.step, "validation_loss": self.trainer.validate()}
        if self.trainer.plan.patience is not None:
            metrics["validations_since_best"] = self.trainer.since_best
        if self.log is not None:
            self.log.write(metrics)
        self.callback.validation(metrics)

    def _sample(self) -> None:
        if not self.trainer.plan.samples.prompts:
            return
        step, answers = self.trainer.step, self.trainer.answer_samples()
        if self.log is not None:
            self.log.write_samples(step, answers)
        self.callback.samples(step, answers)

    def _save(self, at_once: bool) -> None:
        """Saves while training goes on; `at_once`, or where memory for a copy is short, before it does."""
        self._report_saved(wait=True)
        plan, snapshot = self.trainer.plan, self.trainer.snapshot()
        folder = self.folder.path / plan.checkpoint_name(self.trainer.step)
        if at_once or not (plan.saving.asynchronous and _copy_fits(snapshot)):
            write_checkpoint(snapshot, folder, plan.saving.keep)
            self.callback.saved(folder)
        else:
            background = replace(snapshot.parallel, control=snapshot.parallel.background)
            self._saver.start(replace(snapshot, parallel=background), folder, plan.saving.keep)

    def _report_saved(self, wait: bool) -> None:
        folder = self._saver.finished(wait)
        if folder is not None:
            self.callback.saved(folder)


def _copy_fits(snapshot: Snapshot) -> bool:
    """Whether the copies of a machine's ranks take less than half of its free memory, on every machine."""
    wanted = snapshot.nbytes() * local_world_size()
    return all(snapshot.parallel.gather(wanted < free_memory(torch.device("cpu")) / 2))
