"""`llama-acc evaluate`: how good a checkpoint is, in numbers."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from llama_acc.cli import console, options
from llama_acc.cli.options import ModelOptions, launch_model, load_distributed
from llama_acc.core.atomic import write_text_whole
from llama_acc.core.distributed import environment
from llama_acc.core.errors import UserError
from llama_acc.core.text import count_text

app = typer.Typer(
    no_args_is_help=True,
    help="""Measure a checkpoint: lm-evaluation-harness's tasks, Gorilla's API calls, or perplexity on data of yours.

Examples:

  llama-acc evaluate gorilla --hub torchhub --api torchhub_api.jsonl --questions torchhub_eval.json --ckpt runs/gorilla

  llama-acc evaluate perplexity --ckpt runs/alpaca --data held-out.json

  llama-acc evaluate lm-eval hellaswag --ckpt runs/alpaca
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
    stream: options.Stream = False,
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
        options.check_writable(responses)
        model = ModelOptions(ckpt, device, tokenizer, template, verify, quantize, stream=stream)
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
    stream: options.Stream = False,
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

    with load_distributed(ModelOptions(ckpt, device, tokenizer, template, verify, quantize, stream=stream)) as loaded:
        items = read_data(loaded, data, max_tokens, encoding, fetch_shown)
        with console.Progress("item") as progress:
            measured = measure(loaded, items, batch_size, partial(progress, "measured"))
    facts = {"perplexity": measured.perplexity, **dataclasses.asdict(measured)}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    shown = [(name, f"{fact:.4f}" if isinstance(fact, float) else f"{fact:,}") for name, fact in facts.items()]
    console.pairs([*shown, ("template", loaded.template.name)], console.out)


def lm_eval(
    tasks: Annotated[
        list[str],
        Argument(metavar="TASK...", help="The harness's tasks, groups, tags or globs; YAML files.", show_default=False),
    ],
    ckpt: options.Checkpoints,
    include_path: Annotated[Path | None, Option(metavar="DIR", help="A folder with tasks of yours, in YAML.")] = None,
    num_fewshot: Annotated[
        int | None, Option(min=0, help="Examples in front of a question. Without it: as a task says.")
    ] = None,
    limit: Annotated[float | None, Option(min=0, help="Questions of each task; below 1, the share of them.")] = None,
    apply_chat_template: Annotated[
        bool, Option("--apply-chat-template", help="Ask in the checkpoint's prompt format.")
    ] = False,
    system_instruction: Annotated[str | None, Option(metavar="TEXT", help="In front of every question.")] = None,
    fewshot_as_multiturn: Annotated[
        bool, Option(help="With a chat template, examples are turns; else they stand in the question.")
    ] = True,
    gen_kwargs: Annotated[
        str | None, Option(metavar="KEY=VALUE,...", help="How answers are generated, such as max_gen_toks=64.")
    ] = None,
    batch_tokens: Annotated[int, Option(min=1, help="Tokens computed at a time; memory grows with it.")] = 8192,
    output: Annotated[Path | None, Option(metavar="FILE", help="Write the results as JSON.")] = None,
    log_samples: Annotated[
        bool, Option("--log-samples", help="Write every question and answer into the output, too.")
    ] = False,
    template: options.Template = "auto",
    tokenizer: options.TokenizerFile = None,
    quantize: options.Quantize = None,
    stream: options.Stream = False,
    device: options.Device = None,
    verify: options.Verify = False,
    nproc: options.Nproc = None,
    as_json: options.Json = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a checkpoint as it is: an adapter, in NF4, shared by several processes.

    Examples:

      llama-acc evaluate lm-eval hellaswag 'mmlu_*' --ckpt runs/alpaca --output results.json

      llama-acc evaluate lm-eval gsm8k --ckpt runs/alpaca --apply-chat-template --num-fewshot 5 --limit 100

      llama-acc evaluate lm-eval my-task --include-path tasks --ckpt runs/sharegpt-70b --nproc 4 --json
    """
    if log_samples and output is None:
        raise UserError("--log-samples writes into the --output", "give --output FILE")
    if output is not None:
        options.check_writable(output)
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"there is no folder {include_path}", "--include-path takes one with YAML files of tasks")
    launch_model(nproc, device, ckpt)
    if environment.is_main():
        console.working("loading lm-evaluation-harness")
        from llama_acc.core.evaluate.lm_eval import EngineLM, load_tasks, run_tasks
        from llama_acc.core.generate.load import checkpoint_fingerprint

        console.working("loading the tasks")
        found = load_tasks(tasks, include_path)
    asked: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        "system_instruction": system_instruction,
        "fewshot_as_multiturn": fewshot_as_multiturn,
        "gen_kwargs": gen_kwargs,
    }
    with load_distributed(ModelOptions(ckpt, device, tokenizer, template, verify, quantize, stream=stream)) as loaded:
        if not environment.is_main():
            return
        with console.Progress("request") as progress:
            model = EngineLM(loaded, batch_tokens, progress)
            results = run_tasks(model, found, **asked)
    if model.truncated:
        console.note(f"cut on the left, to the model's context: {count_text(model.truncated, 'request')}")
    if model.without_system:
        console.note(f"without a system text, which the template refuses: {count_text(model.without_system, 'prompt')}")
    about = {"ckpt": ckpt, "fingerprint": checkpoint_fingerprint(ckpt), "template": loaded.template.name}
    results["config"] = {**about, "nf4": loaded.model.is_quantized, **asked}
    if not log_samples:
        del results["samples"]
    if output is not None:
        write_text_whole(output, json.dumps(results, indent=1) + "\n")
        console.note(f"wrote {output}")
    if as_json:
        typer.echo(json.dumps(results, indent=1))
    else:
        console.table(_rows(results), "<<>")


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """A row for each metric of each task and group."""
    rows = [["task", "metric", "value", "stderr", "n-shot"]]
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, _, answers = key.partition(",")
            if answers and not metric.endswith("_stderr"):
                error = figures.get(f"{metric}_stderr,{answers}", "")
                name = metric if answers == "none" else f"{metric} ({answers})"
                numbers = [f"{number:.4f}" if isinstance(number, float) else str(number) for number in (value, error)]
                rows.append([task, name, *numbers, str(results["n-shot"].get(task, ""))])
    return rows


SUBCOMMANDS = {"gorilla": gorilla, "perplexity": perplexity, "lm-eval": lm_eval}
