"""A whole run, from a recipe to a checkpoint: what `llama-acc finetune` and `llama_acc.finetune` do.

Here training and the prediction of its memory meet; neither knows of the other.
"""

import errno
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_acc.core.atomic import check_manifest
from llama_acc.core.checkpoint.adapter import BASE_FILE
from llama_acc.core.checkpoint.layout import latest_checkpoint
from llama_acc.core.checkpoint.load import Weights, check_tensors
from llama_acc.core.checkpoint.resume import SavedState, saved_masters
from llama_acc.core.device import multiplies_bf16, pick_device
from llama_acc.core.distributed.groups import Parallel, init_distributed
from llama_acc.core.errors import RunError
from llama_acc.core.interrupt import Interrupted, StopRequest, stop_on_signal
from llama_acc.core.memory.guard import check_fits, fill_memory, out_of_memory_error, stream_if_needed
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.base import read_base_weights
from llama_acc.core.train.log import MetricsLog, write_report
from llama_acc.core.train.loop import Loop
from llama_acc.core.train.plan import Plan, make_plan, make_plan_together
from llama_acc.core.train.run_folder import RunFolder, check_disk, check_same_run, refuse_non_empty
from llama_acc.core.train.runs import Callback, read_metrics
from llama_acc.core.train.trackers import check_trackers
from llama_acc.core.train.trainer import Trainer


@dataclass(frozen=True)
class Finished:
    """What a run leaves."""

    output: Path
    checkpoint: Path
    loss: float | None  # per label token, of its last step; None where metrics.jsonl was taken away
    bases: tuple[str, ...] = ()  # the checkpoints that go below the last one, an adapter checkpoint; else empty
    captions: bool = False  # whether it was trained to caption images without being asked
    streamed: bool = False  # whether its base stayed in its files, as it may have to for an answer, too


def finetune(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    callback: Callback | None = None,
    handle_signals: bool = False,
    verify: bool = False,
    force: bool = False,
) -> Finished:
    """Fine-tunes as the recipe says.

    Args:
        recipe: what to do.
        output: the run's folder; it must be empty unless `resume`.
        resume: continue from the newest whole checkpoint in `output`.
        device: such as "cpu" or "cuda:0"; None picks CUDA, then MPS, then CPU.
        callback: receives what happens; None shows nothing.
        handle_signals: save on SIGINT and SIGTERM, then raise `Interrupted`.
        verify: also compare the SHA-256 of the checkpoint that is loaded with its manifest.
        force: also try what does not fit into memory.

    Raises:
        UserError: something in the input is wrong; found before the first step.
        RunError: it failed while running.
        Interrupted: it was asked to stop, and has saved.
    """
    started = time.perf_counter()
    callback = callback or Callback()
    target = pick_device(device)
    if recipe.train.deterministic:
        torch.use_deterministic_algorithms(True)
    with init_distributed(target, recipe.parallel.model_parallel_size, callback.note) as parallel:
        if not parallel.is_main:
            callback = Callback()
        folder = RunFolder(Path(output))
        try:
            parallel.run_on_rank_zero(lambda: check_trackers(recipe.train.trackers))
            parallel.run_rank_zero_first(lambda: folder.open(resume=resume, claim=parallel.is_main, note=callback.note))
            plan = make_plan_together(recipe, callback, parallel, saved=folder.checkpoint)
            plan = _settled(plan, parallel.world_size, target, callback, parallel, folder.checkpoint)
            callback.progress("checking the weights, the disk and the memory")

            def check() -> int:
                """Before anything is written. Returns how many steps are done."""
                done = 0 if folder.checkpoint is None else check_same_run(plan, folder.checkpoint)
                for layout in plan.layouts if folder.checkpoint is None else ():
                    check_manifest(layout.folder, verify)
                check_disk(plan, folder.path, done)
                if not force:
                    check_fits(plan, parallel, target)
                return done

            done = parallel.run_on_rank_zero(check)
            if resume and folder.checkpoint is None:
                callback.note(f"no whole checkpoint in {folder.path} to resume from: starting at step 0")
            weights = parallel.raise_together(lambda: _weights(plan, folder, parallel))
            for note in weights.notes if weights else ():
                callback.note(note)
            described = callback.plan(plan)
            with stop_on_signal(callback.note) if handle_signals else nullcontext(StopRequest()) as stop:
                _train(plan, folder, weights, done, target, parallel, callback, stop, started, described)
            parallel.barrier()
        finally:
            folder.close()
    losses = [line["loss"] for line in read_metrics(folder.path / "metrics.jsonl")[0] if "loss" in line]
    checkpoint = latest_checkpoint(folder.path)
    assert checkpoint is not None
    bases = tuple(plan.recipe.model.pretrained_list()) if (checkpoint / BASE_FILE).exists() else ()
    captions = plan.config.vision is not None and plan.train.template.name == "caption"
    streamed = plan.settings.stream_base
    return Finished(folder.path, checkpoint, losses[-1] if losses else None, bases, captions, streamed)


def dry_run(
    recipe: Recipe,
    output: Path | None,
    *,
    callback: Callback,
    device: torch.device,
    verify: bool = False,
    processes: int = 1,
) -> Plan:
    """Checks what would stop the real run; writes recipe.yaml and data.json into `output`, if there is one, alone.

    What the recipe leaves to be chosen is what so many processes would choose on this device.

    Raises:
        UserError: whatever would stop the real run before its first step.
    """
    check_trackers(recipe.train.trackers)
    if output is not None:
        refuse_non_empty(output)
    plan = make_plan(recipe, callback, dry_run=True)
    plan = _settled(plan, processes, device, callback, Parallel())
    if plan.layouts:
        callback.progress("checking the weights")
    for layout in plan.layouts:
        check_manifest(layout.folder, verify)
    weights = read_base_weights(plan.layouts, plan.config, Parallel())
    for note in weights.notes if weights else ():
        callback.note(note)
    if output is not None:
        check_disk(plan, output)
        folder = RunFolder(output)
        folder.open(resume=False)
        folder.write_plan(plan)
        folder.close()
    return plan


def _settled(
    plan: Plan,
    processes: int,
    device: torch.device,
    callback: Callback,
    parallel: Parallel,
    resumed: Path | None = None,
) -> Plan:
    """The plan with what depends on the machine: the type to compute in, whether to stream, what is "auto"."""
    if device.type == "cpu" and not parallel.run_on_rank_zero(multiplies_bf16):
        plan = plan.without_bf16()
    plan = stream_if_needed(plan, processes, device)
    if not (plan.recipe.train.has_auto or plan.settings.stream_base):
        return plan
    callback.progress("predicting what fills the memory")
    return plan.with_chosen(*parallel.run_on_rank_zero(lambda: fill_memory(plan, processes, device, resumed)))


def _weights(plan: Plan, folder: RunFolder, parallel: Parallel) -> Weights | None:
    """What a rank starts from: the base, or what was trained of it so far over what does not train."""
    if folder.checkpoint is None:
        return read_base_weights(plan.layouts, plan.config, parallel)
    trained = saved_masters(folder.checkpoint, parallel)
    trained.filter_names(plan.trained_shapes())
    check_tensors(trained, plan.trained_shapes(), folder.checkpoint)
    base = read_base_weights(plan.layouts, plan.config, parallel) if plan.recipe.has_frozen else None
    return trained if base is None else base.overlay(trained)


def _train(
    plan: Plan,
    folder: RunFolder,
    weights: Weights | None,
    done: int,
    device: torch.device,
    parallel: Parallel,
    callback: Callback,
    stop: StopRequest,
    started: float,
    described: list[tuple[str, str]],
) -> None:
    """Loads the model and runs the loop. What the machine runs out of becomes an error that says what to try."""

    def report(state: str) -> None:
        write_report(folder.path, plan, device, time.perf_counter() - started, state, described)

    callback.progress("loading the model")
    loaded: Trainer | None = None
    try:
        with closing(Trainer(plan, device, weights, parallel)) as trainer:
            if folder.checkpoint is not None:
                trainer.load(SavedState(folder.checkpoint, parallel), done)
                callback.note(f"resuming from {folder.checkpoint}, {trainer.step} of {plan.total_steps} steps done")
            loaded = trainer
            if trainer.step < plan.total_steps:
                callback.progress("trying the largest micro-batch")
                trainer.probe_peak_memory()
                callback.progress("computing the first step")
            if not parallel.is_main:
                Loop(trainer, folder, None, callback, stop).run()
                return
            # Not before memory was found to suffice, and not where nothing is left to do: what was changed did nothing.
            if trainer.step < plan.total_steps and not trainer.stops_early:
                folder.write_plan(plan)
            recipe = plan.recipe.model_dump(mode="json")
            trackers, samples = plan.recipe.train.trackers, bool(plan.samples.prompts)
            with MetricsLog(folder.path, trainer.step, callback.note, trackers, recipe, samples) as log:
                try:
                    Loop(trainer, folder, log, callback, stop).run()
                except BaseException as failure:
                    state = "The run did not finish."
                    if isinstance(failure, Interrupted):
                        state = f"The run was stopped by {failure.received.name}; continue it with --resume."
                    try:
                        report(state)
                    except (OSError, MemoryError, RuntimeError) as unwritten:  # what ended the run is to be reported
                        callback.note(f"report.md could not be written: {unwritten or type(unwritten).__name__}")
                    raise
                ending = trainer.ending()
                report(ending)
                if trainer.stops_early:
                    callback.note(ending)
    except (MemoryError, RuntimeError) as error:
        cause = _out_of_memory(error)
        if cause is None:
            raise
        if loaded is not None:
            raise out_of_memory_error(loaded, cause) from error
        raise RunError(
            f"out of memory while the model was loaded: {cause}",
            "use a smaller model, tuning.quantize=nf4, or more processes with parallel.data_parallel=fsdp",
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError("the disk is full: free some space; the last checkpoint before this is whole") from error


def _out_of_memory(error: MemoryError | RuntimeError) -> str | None:
    """What a device says of memory that ran out; None if it is another failure."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return str(error).splitlines()[0]
    if isinstance(error, MemoryError):
        return "no more could be had"
    return str(error).splitlines()[-1] if "DefaultCPUAllocator" in str(error) else None
