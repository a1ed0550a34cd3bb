"""`llama-acc finetune`."""

import glob
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from llama_acc.cli import console, options
from llama_acc.cli.options import launch_ranks
from llama_acc.cli.push import check_destination, push_run
from llama_acc.core.distributed import Launch, environment
from llama_acc.core.errors import LlamaAccError, RunError, UserError
from llama_acc.core.text import count_text, size_text

if TYPE_CHECKING:
    from llama_acc.core.data.preview import Shown
    from llama_acc.core.recipe import Recipe
    from llama_acc.core.train.plan import Plan

_EXAMPLES = 2


def finetune(
    overrides: Annotated[
        list[str] | None,
        Argument(
            metavar="KEY=VALUE",
            help="Change any key of the recipe: train.epochs=1 optimizer.lr=1e-5",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None, Option("--recipe", "-r", metavar="NAME|FILE", help="A shipped recipe, or a YAML file.")
    ] = None,
    pretrained: Annotated[
        list[str] | None,
        Option(
            metavar="DIR", help="Checkpoint to start from, or a downloaded name; may repeat: a later one overrides."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        Option(
            metavar="FILE",
            help="Data in place of the recipe's: file, folder, glob, downloaded name or hf:... address; may repeat.",
        ),
    ] = None,
    tokenizer: options.TokenizerFile = None,
    output: Annotated[
        str | None, Option("--output", "-o", metavar="DIR", help="The run's folder; without it, runs/RECIPE.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Resume from the newest checkpoint in --output.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check everything, show what would be trained, do not train.")
    ] = False,
    timing: Annotated[
        bool, Option("--timing/--no-timing", help="With --dry-run: time a micro-batch to estimate the run's time.")
    ] = True,
    force: Annotated[bool, Option("--force", help="Start even if it does not fit into memory.")] = False,
    device: options.Device = None,
    verify: options.Verify = False,
    nproc: options.Nproc = None,
    nnodes: Annotated[
        int, options.of_processes(metavar="N", min=1, help="Machines; the command is typed on each.")
    ] = 1,
    rdzv_endpoint: Annotated[
        str | None,
        options.of_processes(
            metavar="HOST:PORT",
            help="Rendezvous endpoint: the first node's name and a free port of it.",
            callback=options.endpoint,
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        options.of_processes(
            metavar="N", min=0, help="Resume from the last whole checkpoint, up to N times, when a process dies."
        ),
    ] = 0,
    push: Annotated[
        str | None,
        Option(metavar="hf:OWNER/NAME", help="Push the result there (see `llama-acc push`); checked before training."),
    ] = None,
    log_ranks: Annotated[
        str | None, options.of_processes(metavar="DIR", help="Keep every process's output here.")
    ] = None,
) -> None:
    """Fine-tune a model as a recipe says.

    Examples:

      llama-acc finetune --recipe quickstart --output runs/quickstart

      llama-acc finetune --recipe alpaca --pretrained Llama-2-7b --data alpaca.json --output runs/alpaca

      llama-acc finetune --recipe lima --pretrained Llama-2-7b --data lima.json --dry-run train.epochs=1

      llama-acc finetune --output runs/alpaca --resume

      llama-acc finetune --recipe alpaca --pretrained Llama-2-7b --data alpaca.json --nproc 8
    """
    console.working("loading PyTorch")
    from llama_acc.core.checkpoint.layout import locate
    from llama_acc.core.data.sources import Source, expand

    if dry_run and resume:
        raise UserError("--dry-run and --resume cannot be combined", "leave one of them out")
    if push is not None and environment.is_main() and not environment.is_launched():
        check_destination(push)
    wanted = Launch(nproc, nnodes, rdzv_endpoint, max_restarts, log_ranks)
    resume = resume or environment.start_number() > 1
    run = None if output is None else Path(output).expanduser()
    loaded = _load_recipe(recipe, run if resume else None, overrides or [], pretrained, data, tokenizer)
    for base in loaded.model.pretrained_list() if not (dry_run or resume) else []:
        locate(base)
    expand([Source(**source.model_dump(), folder=loaded.folder) for source in loaded.data.sources], fetch=None)
    if dry_run:
        _dry_run(loaded, run, device, verify, wanted.world_size(), timing)
        return
    if run is None:
        if Path(loaded.name).name != loaded.name or loaded.name in ("", ".."):
            raise UserError(f"the recipe's name {loaded.name!r} is no name for a folder", "give --output DIR")
        run = Path("runs") / loaded.name
    resume_hint = partial(_resume_hint, run, wanted, device, force, push)
    saved = run if resume and output is not None else None
    try:
        launch_ranks(wanted, device, lambda count: _check(loaded, saved, count))
        _train(loaded, run, resume_hint, resume=resume, device=device, verify=verify, force=force)
        if push is not None and environment.is_main():
            push_run(run, push)
    except LlamaAccError as error:
        if error.exit_code == RunError.exit_code and error.hint is None:
            error.hint = resume_hint()
        raise


def _resume_hint(output: Path, wanted: Launch, device: str | None, force: bool, push: str | None) -> str:
    """The command that resumes a run, on as many processes; of one that left nothing, to begin it again."""
    if not (output / "recipe.yaml").exists():
        return "nothing was written: type the same command again"
    words = ["llama-acc", "finetune", "--output", str(output), "--resume"]
    words += [] if wanted.nproc is None else ["--nproc", wanted.nproc]
    words += ["--nnodes", str(wanted.nnodes)] if wanted.nnodes > 1 else []
    words += [] if wanted.rdzv_endpoint is None else ["--rdzv-endpoint", wanted.rdzv_endpoint]
    words += [] if device is None else ["--device", device]
    words += ["--force"] * force + ([] if push is None else ["--push", push])
    return f"resume with: {shlex.join(words)}"


def _load_recipe(
    name: str | None,
    resumed: Path | None,
    overrides: list[str],
    pretrained: list[str] | None,
    data: list[str] | None,
    tokenizer: str | None,
) -> "Recipe":
    """The recipe with what the command line changes."""
    from llama_acc.core.recipe import Recipe

    if name is None and resumed is not None:
        name = str(resumed / "recipe.yaml")
        if not Path(name).is_file():
            raise UserError(
                f"no run to resume in {resumed}: there is no recipe.yaml", "give --recipe, or another --output"
            )
    if name is None:
        raise UserError(
            "which recipe? --recipe is missing", "`llama-acc recipes` lists them; begin with --recipe quickstart"
        )
    loaded = Recipe.load(name, overrides)
    if pretrained:
        loaded.model.pretrained = pretrained[0] if len(pretrained) == 1 else pretrained
        if not any(override.startswith("model.tokenizer=") for override in overrides):
            loaded.model.tokenizer = None  # the recipe's belongs to the recipe's model
    elif any(override.startswith("model.params") for override in overrides):
        loaded.model.pretrained = None
    if data:
        sources = loaded.data.sources
        if resumed is None or len(data) != len(sources):  # else it says where the run's own are now
            sources = [sources[0].model_copy(update={"ratio": 1.0, "weight": 1.0})] * len(data)
        loaded.data.sources = [
            source.model_copy(update={"path": _typed(file)}) for source, file in zip(sources, data, strict=True)
        ]
    if tokenizer is not None:
        loaded.model.tokenizer = _typed(tokenizer)
    return loaded


def _typed(path: str) -> str:
    """A path on the command line means the current folder, not the recipe's; what is not found may be a name."""
    here = Path(path).expanduser()
    there = here.exists() or glob.glob(str(here), recursive=True)
    return str(here.absolute()) if there else path


def _check(recipe: "Recipe", resumed: Path | None, processes: int) -> None:
    """Finds what would end every process before any is started."""
    from llama_acc.core.checkpoint.layout import latest_checkpoint
    from llama_acc.core.distributed.groups import check_world
    from llama_acc.core.train.base import find_model

    console.working(None)
    check_world(recipe.parallel.model_parallel_size, processes)
    find_model(recipe, saved=None if resumed is None else latest_checkpoint(resumed))


def _train(recipe: "Recipe", output: Path, resume_hint: Callable[[], str], **flags: Any) -> None:
    from llama_acc.cli.run_console import RunConsole
    from llama_acc.core.finetune import finetune as run
    from llama_acc.core.interrupt import Interrupted

    with RunConsole() as watcher:
        try:
            finished = run(recipe, output, callback=watcher, handle_signals=True, **flags)
        except Interrupted as interrupted:
            if environment.is_main():
                console.note(f"stopped; {resume_hint()}")
            raise typer.Exit(interrupted.exit_code) from None
    if not environment.is_main():
        return
    command, end = ("caption", ["IMAGE"]) if finished.captions else ("chat", [])
    what = "let it caption an image with" if finished.captions else "talk to it with"
    loss = "" if finished.loss is None else f"loss {finished.loss:.4f}; "
    console.note(f"{loss}the report is {output / 'report.md'}; {what}:")
    # What was trained alone needs what it was trained on.
    folders = [*finished.bases, str(output)]
    words = ["llama-acc", command, *(word for folder in folders for word in ("--ckpt", folder))]
    words += [*["--stream"] * finished.streamed, *end]
    console.command(shlex.join(words))


def _dry_run(
    recipe: "Recipe", output: Path | None, device: str | None, verify: bool, processes: int | None, timing: bool
) -> None:
    """Shows results as they come, the quickest first."""
    from llama_acc.cli.run_console import RunConsole
    from llama_acc.core.device import pick_device
    from llama_acc.core.distributed.groups import check_world
    from llama_acc.core.finetune import dry_run
    from llama_acc.core.memory.guard import setup_of_run
    from llama_acc.core.memory.measure import estimate_time
    from llama_acc.core.memory.predict import predict, rank_parameters

    count = processes or recipe.parallel.model_parallel_size
    check_world(recipe.parallel.model_parallel_size, count)
    target = pick_device(device)
    with RunConsole() as watcher:
        plan = dry_run(recipe, output, callback=watcher, verify=verify, device=target, processes=count)
        setup = setup_of_run(plan, count, target.type)
        lines = _dry_run_lines(plan, rank_parameters(setup), count)
        width = max(len(subject) for subject, _ in lines)
        console.pairs(lines, console.out)
        console.out.print()
        console.show_items(_examples(plan))
        watcher.progress("predicting the memory")
        memory = predict(setup)
        console.out.print()
        text = f"{size_text(memory.allocated)} on {target.type} at its fullest, predicted: {memory.moment}, with the "
        parts = ", ".join(f"{part} {size_text(size)}" for part, size in memory.parts.items() if size)
        shown = [("memory", f"{text}largest micro-batch of the data"), ("of which", parts)]
        console.pairs(shown, console.out, width)
        if timing:
            watcher.progress("timing a micro-batch of this model (--no-timing leaves it out)")
            seconds, how = estimate_time(plan, count, target, memory)
            text = f"about {console.duration(seconds)} for the steps ({how})"
            console.pairs([("time", text)], console.out, width)


def _dry_run_lines(plan: "Plan", parameters: int, processes: int) -> list[tuple[str, str]]:
    from llama_acc.cli.run_console import describe_plan

    report, parallel, saves = plan.report, plan.recipe.parallel, plan.save_count()
    truncated, size = count_text(report["truncated"], "item"), parallel.model_parallel_size
    layout = f"{processes // size} data parallel ({parallel.data_parallel}) x {size} model parallel"
    disk = min(saves, plan.saving.keep or saves) * plan.checkpoint_bytes()
    return [
        *describe_plan(plan),
        ("lengths", ", ".join(f"{name} {value}" for name, value in report["lengths"].items()) + " tokens"),
        ("truncated", f"{truncated} longer than {plan.recipe.data.max_tokens} tokens"),
        ("label tokens", f"{report['label_tokens']:,} of {report['tokens']:,}"),
        ("processes", f"{processes}: {layout}, {parameters:,} parameters on each"),
        ("disk", f"{size_text(disk)} for the checkpoints that stay"),
    ]


def _examples(plan: "Plan") -> "Iterator[Shown]":
    """The first two documents."""
    from llama_acc.core.data.preview import shown_document

    positions = 0 if plan.config.vision is None else plan.config.vision.positions
    for number in range(min(_EXAMPLES, len(plan.train))):
        images, begin = [Path(image).name for image in plan.train.images(number)], plan.train.image_start(number)
        origin, document = plan.train.origin(number), plan.train.document(number)
        yield shown_document(origin, *document, plan.tokenizer, images, begin, positions)
