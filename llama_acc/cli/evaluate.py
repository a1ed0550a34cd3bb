"""`llama-acc evaluate`: how good a checkpoint is, in numbers."""

import dataclasses
import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_acc.cli import console, options
from llama_acc.core.errors import UserError
from llama_acc.core.units import count_text

if TYPE_CHECKING:
    from llama_acc.core.evaluate.gorilla import Score
    from llama_acc.core.generate.load import LoadedModel

HELP = """Measure a checkpoint: Gorilla's benchmark of API calls, or perplexity on data of yours.

Examples:

  llama-acc evaluate gorilla --hub torchhub --api torchhub_api.jsonl --questions torchhub_eval.json --ckpt runs/gorilla

  llama-acc evaluate perplexity --ckpt runs/alpaca --data held-out.json
"""

GORILLA_HELP = """Score answers on APIBench: how many call the right API, how many one that is not there.

With --ckpt a checkpoint answers first, greedily, into the --output; run again, it goes on where it was stopped.

Examples:

  llama-acc evaluate gorilla --hub torchhub --api torchhub_api.jsonl --questions torchhub_eval.json --ckpt runs/gorilla

  llama-acc evaluate gorilla --hub torchhub --api torchhub_api.jsonl --questions torchhub_eval.json --responses a.jsonl
"""

PERPLEXITY_HELP = """Measure the loss per predicted token on data, in the checkpoint's own prompt format.

Examples:

  llama-acc evaluate perplexity --ckpt runs/alpaca --data held-out.json

  llama-acc evaluate perplexity --ckpt Llama-2-7b --template alpaca --data held-out.json --max-tokens 512 --json
"""


class Hub(str, Enum):
    """Whose APIs a benchmark is of."""

    tensorflowhub = "tensorflowhub"
    torchhub = "torchhub"
    huggingface = "huggingface"


app = typer.Typer(no_args_is_help=True)

# What only matters where a checkpoint answers, and what the user calls it.
_OF_CHECKPOINTS = {
    "output": "--output",
    "prompts": "--prompts",
    "template": "--template",
    "max_new_tokens": "--max-new-tokens",
    "batch_size": "--batch-size",
    "tokenizer": "--tokenizer",
    "quant": "--quantize",
    "device": "--device",
    "verify": "--verify",
}


def gorilla(
    context: typer.Context,
    hub: Annotated[Hub, typer.Option("--hub", help="Whose APIs they are.", show_default=False)],
    api: Annotated[
        Path,
        typer.Option("--api", metavar="FILE", help="The API database, such as torchhub_api.jsonl.", show_default=False),
    ],
    questions: Annotated[
        Path,
        typer.Option(
            "--questions",
            metavar="FILE",
            help="The evaluation file, such as torchhub_eval.json: questions and right answers.",
            show_default=False,
        ),
    ],
    ckpt: Annotated[
        list[str] | None,
        typer.Option(
            "--ckpt",
            metavar="DIR",
            help="Checkpoint or run folder that answers; may repeat: a later one overrides.",
            callback=options.given,
        ),
    ] = None,
    responses: Annotated[
        Path | None, typer.Option("--responses", metavar="FILE", help="Score these responses instead.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Where the checkpoint's answers are kept. Without it: responses_HUB.jsonl, in the current folder.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Ask these, such as questions_torchhub_0_shot.jsonl."),
    ] = None,
    template: options.Template = "auto",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")] = 512,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Questions that are answered at a time; memory grows with it.")
    ] = 16,
    tokenizer: options.TokenizerFile = None,
    quant: options.Quantize = None,
    device: options.Device = None,
    verify: options.Verify = False,
    as_json: options.Json = False,
) -> None:
    """Score answers on APIBench."""
    from llama_acc.core.evaluate.gorilla import read_database, read_domains, read_responses, score
    from llama_acc.core.evaluate.json_lines import read_objects

    _check_who_answers(context, ckpt, responses)
    database = read_database(api, hub.value)
    evaluation = read_objects(questions)
    domains = read_domains(questions, evaluation)
    if ckpt:
        from llama_acc.core.evaluate.questions import questions_of, read_prompts

        asked = questions_of(questions, evaluation) if prompts is None else read_prompts(prompts, evaluation)
        if prompts is None and len(asked) < len(evaluation):
            left_out = count_text(len(evaluation) - len(asked), "line")
            console.note(f"left out of {questions}: {left_out} without a question, of {len(evaluation):,}")
        responses = Path(f"responses_{hub.value}.jsonl") if output is None else output
        _check_folder(responses)
        loaded = _load(ckpt, device, tokenizer, template, quant, verify)
        _answer(loaded, ckpt, asked, responses, max_new_tokens, batch_size)
    assert responses is not None
    _show(hub, score(hub.value, database, domains, read_responses(responses, domains)), as_json)


def _check_who_answers(context: typer.Context, ckpt: list[str] | None, responses: Path | None) -> None:
    if bool(ckpt) == (responses is not None):
        raise UserError(
            "give both --ckpt and --responses: which is to be scored?" if ckpt else "there is nothing to score",
            "give --ckpt DIR to have a checkpoint answer, or --responses FILE to score answers there are",
        )
    if ckpt:
        return
    typed = [
        flag
        for parameter, flag in _OF_CHECKPOINTS.items()
        if (source := context.get_parameter_source(parameter)) is not None and source.name == "COMMANDLINE"
    ]
    if typed:
        raise UserError(f"{', '.join(typed)} only matter where a checkpoint answers (--ckpt)", "leave them out")


def _check_folder(output: Path) -> None:
    if not output.parent.is_dir():
        raise UserError(f"cannot write {output}: there is no folder {output.parent}", f"mkdir -p {output.parent}")


def _load(
    ckpt: list[str],
    device: str | None,
    tokenizer: str | None,
    template: str,
    quant: options.Quant | None,
    verify: bool,
) -> "LoadedModel":
    from llama_acc.core.generate.load import load_model

    loaded = load_model(
        *ckpt,
        device=device,
        tokenizer=tokenizer,
        template=template,
        verify=verify,
        quantize=None if quant is None else quant.value,
    )
    for note in loaded.notes:
        console.note(note)
    if loaded.template.name == "none" and template == "auto":
        console.note("the checkpoint keeps no prompt format: template none, the text is continued as it stands")
    return loaded


def _answer(
    loaded: "LoadedModel",
    ckpt: list[str],
    asked: dict[int, str],
    output: Path,
    max_new_tokens: int,
    batch_size: int,
) -> None:
    from llama_acc.core.evaluate.answers import Answering, answer_questions

    with console.CountProgress("answered", "question") as progress:
        answer_questions(loaded, Answering(ckpt, max_new_tokens, batch_size), asked, output, progress.tell)
    console.note(f"the answers are in {output}")


def _show(hub: Hub, score: "Score", as_json: bool) -> None:
    shares = {"overall": score.overall, "hallucination": score.hallucination}
    if as_json:
        typer.echo(json.dumps({"hub": hub.value, **shares, **dataclasses.asdict(score)}, indent=1))
        return
    header = ["hub", *shares, "responses"]
    console.table([header, [hub.value, *(f"{share:.2f}" for share in shares.values()), f"{score.responses:,}"]])


def perplexity(
    ckpt: options.Checkpoints,
    data: options.DataFiles,
    template: options.Template = "auto",
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=2, help="Longer items are cut, and counted. Without it: the model's context."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Most items in a forward pass; memory grows with it.")
    ] = 8,
    tokenizer: options.TokenizerFile = None,
    quant: options.Quantize = None,
    device: options.Device = None,
    verify: options.Verify = False,
    as_json: options.Json = False,
) -> None:
    """Measure the loss per predicted token on data."""
    from llama_acc.cli.download import fetch_shown
    from llama_acc.core.evaluate.perplexity import measure, read_data

    loaded = _load(ckpt, device, tokenizer, template, quant, verify)
    with console.EncodingProgress() as encoding:
        items = read_data(loaded, data, max_tokens, encoding.tell, fetch_shown)
    with console.CountProgress("measured", "item") as measuring:
        measured = measure(loaded, items, batch_size, measuring.tell)
    facts = {"perplexity": measured.perplexity, **dataclasses.asdict(measured)}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    shown = [(name, f"{fact:.4f}" if isinstance(fact, float) else f"{fact:,}") for name, fact in facts.items()]
    console.pairs([*shown, ("template", loaded.template.name)], console.out)
