"""`llama-acc evaluate`: how good a checkpoint is, in numbers."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from llama_acc.cli import console, options
from llama_acc.cli.loading import ModelOptions, load_distributed
from llama_acc.core.errors import UserError
from llama_acc.core.text import count_text

app = typer.Typer(
    no_args_is_help=True,
    help="""Measure a checkpoint: Gorilla's benchmark of API calls, or perplexity on data of yours.

Examples:

  llama-acc evaluate gorilla --hub torchhub --api torchhub_api.jsonl --questions torchhub_eval.json --ckpt runs/gorilla

  llama-acc evaluate perplexity --ckpt runs/alpaca --data held-out.json
""",
)

# What matters without a checkpoint that answers, too.
_OF_BOTH = {"hub", "api", "questions", "responses", "as_json"}


def gorilla(
    context: typer.Context,
    hub: Annotated[Literal["tensorflowhub", "torchhub", "huggingface"], Option(help="Whose APIs they are.")],
    api: Annotated[Path, Option(metavar="FILE", help="The API database, such as torchhub_api.jsonl.")],
    questions: Annotated[
        Path,
        Option(metavar="FILE", help="The evaluation file, such as torchhub_eval.json: questions and right answers."),
    ],
    ckpt: Annotated[
        list[str] | None,
        Option(metavar="DIR", help="Checkpoint or run folder that answers; may repeat: a later one overrides."),
    ] = None,
    responses: Annotated[Path | None, Option(metavar="FILE", help="Score these responses instead.")] = None,
    output: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Where the checkpoint's answers are kept. Without it: responses_HUB.jsonl, in the current folder.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, Option(metavar="FILE", help="Ask these, such as questions_torchhub_0_shot.jsonl.")
    ] = None,
    template: options.Template = "auto",
    max_new_tokens: Annotated[int, Option(min=1, help="Most tokens of an answer.")] = 512,
    batch_size: Annotated[int, Option(min=1, help="Questions that are answered at a time; memory grows with it.")] = 16,
    tokenizer: options.TokenizerFile = None,
    quantize: options.Quantize = None,
    device: options.Device = None,
    verify: options.Verify = False,
    as_json: options.Json = False,
) -> None:
    """Score answers on APIBench: how many call the right API, how many one that does not exist.

    With --ckpt a checkpoint answers first, greedily, into the --output; run again, it resumes where it was stopped.

    Examples:

      llama-acc evaluate gorilla --hub torchhub --api torchhub_api.jsonl --questions eval.json --ckpt runs/gorilla

      llama-acc evaluate gorilla --hub torchhub --api torchhub_api.jsonl --questions eval.json --responses a.jsonl
    """
    console.working("loading the benchmark")
    from llama_acc.core.evaluate.gorilla import (
        answer_questions,
        read_database,
        read_domains,
        read_objects,
        read_questions,
        read_responses,
        score,
    )

    _check_who_answers(context, ckpt, responses)
    database = read_database(api, hub)
    evaluation = read_objects(questions)
    domains = read_domains(questions, evaluation)
    if ckpt:
        asked = read_questions(questions, evaluation, prompts)
        if prompts is None and len(asked) < len(evaluation):
            left_out = count_text(len(evaluation) - len(asked), "line")
            console.note(f"left out of {questions}: {left_out} without a question, of {len(evaluation):,}")
        responses = Path(f"responses_{hub}.jsonl") if output is None else output
        if not responses.parent.is_dir():
            folder = responses.parent
            raise UserError(f"cannot write {responses}: there is no folder {folder}", f"mkdir -p {folder}")
        model = ModelOptions(ckpt, device, tokenizer, template, verify, quantize)
        with load_distributed(model) as loaded, console.Progress("question") as progress:
            answer_questions(
                loaded,
                ckpt,
                asked,
                responses,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                progress=partial(progress, "answered"),
            )
        console.note(f"the answers are in {responses}")
    assert responses is not None
    found = score(hub, database, domains, read_responses(responses, domains))
    shares = {"overall": found.overall, "hallucination": found.hallucination}
    if as_json:
        typer.echo(json.dumps({"hub": hub, **shares, **dataclasses.asdict(found)}, indent=1))
    else:
        figures = [*(f"{share:.2f}" for share in shares.values()), f"{found.responses:,}"]
        console.table([["hub", *shares, "responses"], [hub, *figures]])


def _check_who_answers(context: typer.Context, ckpt: list[str] | None, responses: Path | None) -> None:
    if bool(ckpt) == (responses is not None):
        raise UserError(
            "give both --ckpt and --responses: which is to be scored?" if ckpt else "there is nothing to score",
            "give --ckpt DIR to have a checkpoint answer, or --responses FILE to score answers there are",
        )
    sources = {name: context.get_parameter_source(name) for name in context.params if name not in _OF_BOTH}
    typed = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if typed and not ckpt:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise UserError(f"{flags} only matter where a checkpoint answers (--ckpt)", "leave them out")


def perplexity(
    ckpt: options.Checkpoints,
    data: Annotated[
        list[str],
        Option(metavar="FILE", help="Data file, folder, glob, downloaded name or hf:... address; may repeat."),
    ],
    template: options.Template = "auto",
    max_tokens: Annotated[
        int | None, Option(min=2, help="Longer items are cut, and counted. Without it: the model's context.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Most items in a forward pass; memory grows with it.")] = 8,
    tokenizer: options.TokenizerFile = None,
    quantize: options.Quantize = None,
    device: options.Device = None,
    verify: options.Verify = False,
    as_json: options.Json = False,
) -> None:
    """Measure the loss per predicted token on data, in the checkpoint's own prompt format.

    Examples:

      llama-acc evaluate perplexity --ckpt runs/alpaca --data held-out.json

      llama-acc evaluate perplexity --ckpt Llama-2-7b --template alpaca --data held-out.json --max-tokens 512 --json
    """
    console.working("loading PyTorch")
    from llama_acc.cli.download import fetch_shown
    from llama_acc.core.evaluate.perplexity import measure, read_data

    def encoding(file: str, items: int, fraction: float) -> None:
        console.working(f"encoding {file}: {count_text(items, 'item')}, {fraction:.0%}", key=file)

    with load_distributed(ModelOptions(ckpt, device, tokenizer, template, verify, quantize)) as loaded:
        items = read_data(loaded, data, max_tokens, encoding, fetch_shown)
        with console.Progress("item") as progress:
            measured = measure(loaded, items, batch_size, partial(progress, "measured"))
    facts = {"perplexity": measured.perplexity, **dataclasses.asdict(measured)}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    shown = [(name, f"{fact:.4f}" if isinstance(fact, float) else f"{fact:,}") for name, fact in facts.items()]
    console.pairs([*shown, ("template", loaded.template.name)], console.out)
