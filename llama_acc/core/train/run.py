"""A whole run, from a recipe to a checkpoint: what `llama-acc finetune` and `llama_acc.finetune` do."""

import errno
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from llama_acc.core.atomic import check_checkpoint
from llama_acc.core.checkpoint.adapter import BASE_FILE
from llama_acc.core.checkpoint.layout import latest_checkpoint
from llama_acc.core.checkpoint.load import Weights, check_tensors
from llama_acc.core.checkpoint.resume import SavedState, saved_masters
from llama_acc.core.data.cache import EntryStore, load_published, publish_to_local_ranks
from llama_acc.core.device import pick_device
from llama_acc.core.distributed.groups import Parallel, init_distributed
from llama_acc.core.errors import RunError
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.events import Events, Quiet
from llama_acc.core.train.folder import RunFolder
from llama_acc.core.train.interrupt import Interrupted, StopRequest, stop_on_signal
from llama_acc.core.train.loop import Loop
from llama_acc.core.train.metrics import MetricsLog, read_metrics
from llama_acc.core.train.plan import Plan
from llama_acc.core.train.plan_data import PlannedData
from llama_acc.core.train.plan_model import has_frozen
from llama_acc.core.train.planning import check_disk, make_plan, read_base
from llama_acc.core.train.report import write_report
from llama_acc.core.train.same_run import check_same_run
from llama_acc.core.train.trainer import Trainer
from llama_acc.core.vram.guard import Shortage, check_fits

_Result = TypeVar("_Result")
_SMALLER = "use a smaller model, tuning.quantize=nf4, or more processes with parallel.data_parallel=fsdp"


@dataclass(frozen=True)
class Finished:
    """What a run leaves.

    Attributes:
        output: its folder.
        checkpoint: its last checkpoint.
        loss: per label token, of its last step; None where metrics.jsonl was taken away.
        bases: the checkpoints that go below the last one, which holds only what was trained; else empty.
        captions: whether it was trained to say what is on images, without being asked.
    """

    output: Path
    checkpoint: Path
    loss: float | None
    bases: tuple[str, ...] = ()
    captions: bool = False


def finetune(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    recipe_folder: Path | None = None,
    events: Events | None = None,
    handle_signals: bool = False,
    verify: bool = False,
    force: bool = False,
) -> Finished:
    """Fine-tunes as the recipe says.

    Args:
        recipe: what to do.
        output: the run's folder; it must be empty unless `resume`.
        resume: go on from the newest whole checkpoint in `output`.
        device: such as "cpu" or "cuda:0"; None picks CUDA, then MPS, then CPU.
        recipe_folder: where relative paths of the recipe are looked for first.
        events: told what happens; None keeps quiet.
        handle_signals: save on SIGINT and SIGTERM, then raise `Interrupted`.
        verify: also compare the SHA-256 of the checkpoint that is loaded with its manifest.
        force: also try what does not fit into memory.

    Raises:
        UserError: something in the input is wrong; found before the first step.
        RunError: it failed while running.
        Interrupted: it was asked to stop, and has saved.
    """
    started = time.perf_counter()
    events = events or Quiet()
    target = pick_device(device)
    with init_distributed(target, recipe.parallel.model_parallel_size, events.note) as parallel:
        if not parallel.is_main:
            events = Quiet()
        folder = RunFolder(Path(output))
        try:
            parallel.run_rank_zero_first(lambda: folder.open(resume=resume, claim=parallel.is_main, tell=events.note))
            plan = plan_together(recipe, events, parallel, recipe_folder=recipe_folder, saved=folder.checkpoint)
            events.working("checking the weights, the disk and the memory")
            device_to_fit = None if force else target
            done = parallel.run_on_rank_zero(lambda: _check(plan, folder, verify, parallel, device_to_fit))
            if resume and folder.checkpoint is None:
                events.note(f"no whole checkpoint in {folder.path} to resume from: starting at step 0")
            weights = parallel.raise_together(lambda: _weights(plan, folder, parallel))
            for note in weights.notes if weights else ():
                events.note(note)
            events.plan(plan)
            signals = stop_on_signal(events.note) if handle_signals else nullcontext(StopRequest())
            with signals as stop:
                return _explain_failures(
                    lambda: _train(plan, folder, weights, done, target, parallel, events, stop, started)
                )
        finally:
            folder.close()


def plan_together(
    recipe: Recipe, events: Events, parallel: Parallel, *, recipe_folder: Path | None, saved: Path | None = None
) -> Plan:
    """`make_plan` on every rank. One rank of each machine goes through the data; the others map what it encoded."""
    make = partial(make_plan, recipe, events, recipe_folder=recipe_folder, dry_run=False, saved=saved)

    def lead() -> tuple[Plan, Path] | None:
        if not parallel.is_local_rank_zero:
            return None
        plan = make(store=store)
        data = PlannedData(plan.train.prepared(), plan.validation and plan.validation.prepared(), plan.report)
        publish_to_local_ranks(data, store.own_folder())
        return plan, store.own_folder()

    with EntryStore() as store:
        if parallel.control is None:
            return make(store=store)
        led = parallel.raise_together(lead)
        found = parallel.broadcast_in_node(led and led[1])
        # Nobody leaves before all have mapped what is deleted then.
        return parallel.raise_together(lambda: led[0] if led else make(data=load_published(found)))


def _check(plan: Plan, folder: RunFolder, verify: bool, parallel: Parallel, device: torch.device | None) -> int:
    """What only one process need look at, before anything is written. Returns how many steps are done."""
    done = 0
    if folder.checkpoint is not None:
        done = check_same_run(plan, folder.checkpoint)
    else:
        for layout in plan.layouts:
            check_checkpoint(layout.folder, verify)
    check_disk(plan, folder.path, done)
    if device is not None:
        check_fits(plan, parallel, device)
    return done


def _weights(plan: Plan, folder: RunFolder, parallel: Parallel) -> Weights | None:
    if folder.checkpoint is None:
        return read_base(plan.layouts, plan.config, parallel)
    trained = saved_masters(folder.checkpoint, parallel)
    trained.filter_names(plan.trained_shapes())
    check_tensors(trained, plan.trained_shapes(), folder.checkpoint)
    base = read_base(plan.layouts, plan.config, parallel) if has_frozen(plan.recipe) else None
    return trained if base is None else base.overlay(trained)


def _train(
    plan: Plan,
    folder: RunFolder,
    weights: Weights | None,
    done: int,
    device: torch.device,
    parallel: Parallel,
    events: Events,
    stop: StopRequest,
    started: float,
) -> Finished:
    events.working("loading the model")
    trainer = Trainer(plan, device, weights, parallel)
    with closing(trainer):
        return _trained(trainer, folder, done, events, stop, started)


def _trained(
    trainer: Trainer, folder: RunFolder, done: int, events: Events, stop: StopRequest, started: float
) -> Finished:
    plan, parallel = trainer.plan, trainer.parallel
    if folder.checkpoint is not None:
        trainer.load(SavedState(folder.checkpoint, parallel), done)
        events.note(f"resuming from {folder.checkpoint}, {trainer.step} of {plan.total_steps} steps done")
    if trainer.step < plan.total_steps:
        events.working("trying the largest micro-batch")
        _compute(trainer, trainer.rehearse)
        events.working("computing the first step")
    if not parallel.is_main:
        _compute(trainer, Loop(trainer, folder, None, events, stop).run)
    else:
        _compute(trainer, lambda: _train_and_report(trainer, folder, events, stop, started))
    parallel.barrier()
    losses = [line["loss"] for line in read_metrics(folder.path / "metrics.jsonl").lines if "loss" in line]
    checkpoint = latest_checkpoint(folder.path)
    assert checkpoint is not None
    is_part = (checkpoint / BASE_FILE).exists()
    bases = tuple(plan.recipe.model.pretrained_list()) if is_part else ()
    captions = plan.config.vision is not None and plan.train.template.name == "caption"
    return Finished(folder.path, checkpoint, losses[-1] if losses else None, bases, captions)


def _train_and_report(trainer: Trainer, folder: RunFolder, events: Events, stop: StopRequest, started: float) -> None:
    def report(how: str) -> None:
        write_report(folder.path, trainer.plan, trainer.device, time.perf_counter() - started, how)

    # Not before the rehearsal: a run that is refused leaves nothing.
    folder.write_recipe(trainer.plan.recipe)
    folder.write_data_report(trainer.plan.report)
    with MetricsLog(folder.path, trainer.step, events.note) as log:
        try:
            Loop(trainer, folder, log, events, stop).run()
        except BaseException as failure:
            how = "The run did not finish."
            if isinstance(failure, Interrupted):
                how = f"The run was stopped by {failure.received.name}; continue it with --resume."
            try:
                report(how)
            except (OSError, MemoryError, RuntimeError) as unwritten:  # what ended the run is what has to be told
                events.note(f"report.md could not be written: {unwritten or type(unwritten).__name__}")
            raise
        report("The run is complete.")


def _compute(trainer: Trainer, work: Callable[[], _Result]) -> _Result:
    """Computes; where memory runs out, tells for which documents, and what to change."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        cause = _shortage(error)
        if cause is None:
            raise
        raise Shortage(trainer, cause).error() from error


def _shortage(error: MemoryError | RuntimeError) -> str | None:
    """What a device says of memory that ran out; None if it is another failure."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return str(error).splitlines()[0]
    if isinstance(error, MemoryError):
        return "no more could be had"
    return str(error).splitlines()[-1] if "DefaultCPUAllocator" in str(error) else None


def _explain_failures(run: Callable[[], _Result]) -> _Result:
    """Turns what a machine runs out of into an error that says what to try."""
    try:
        return run()
    except (MemoryError, RuntimeError) as error:
        cause = _shortage(error)
        if cause is None:
            raise
        raise RunError(f"out of memory while the model was loaded: {cause}", _SMALLER) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            "the disk is full: the last checkpoint before this is whole", "free some space, then continue with --resume"
        ) from error
