"""Sample prompts are answered while a run trains, and the run stays, to the bit, what it is without them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llama_acc.core.errors import UserError
from llama_acc.core.generate.chat import generate
from llama_acc.core.generate.load import load_model
from llama_acc.core.memory.guard import setup_of_run
from llama_acc.core.memory.predict import predict
from tests.core.ranks import run_ranks
from tests.core.train.runs import assert_same_run, metrics, names, plan_of, quickstart, run

PROMPTS = ["What is LLaMA?", "Who are you?"]
SAMPLED = (f"train.sample_prompts={PROMPTS}", "train.sample_every_steps=3", "train.sample_max_new_tokens=9")
PART = ("checkpoint.trainable_only=true", "optimizer.lr=2e-2", "tuning.method=lora_bias_norm", "tuning.lora_rank=4")
NF4 = (*PART, "tuning.quantize=nf4", "train.precision=bf16")


def samples(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.validation.fraction=0.2",),
        (*PART, "tuning.lora_dropout=0.3", "train.activation_checkpointing=true"),
        NF4,
        ("tuning.method=adapter", "tuning.prefix_layers=1", "checkpoint.trainable_only=true"),
    ],
    ids=["full", "lora with dropout", "nf4", "adapter"],
)
def test_a_run_is_bitwise_the_same_with_samples_and_without(overrides: tuple[str, ...], tmp_path: Path) -> None:
    run(tmp_path / "without", *overrides)
    run(tmp_path / "with", *overrides, *SAMPLED)
    assert_same_run(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    found = samples(tmp_path / "with")
    assert [(line["step"], line["prompt"]) for line in found] == [
        (n, prompt) for n in (0, 3, 6, 8) for prompt in PROMPTS
    ]


def test_a_killed_run_answers_again_what_is_not_in_its_checkpoint_and_loses_nothing(tmp_path: Path) -> None:
    run(tmp_path / "whole", *SAMPLED)
    killed = tmp_path / "killed"
    run(killed, *SAMPLED, "train.max_steps=6", "checkpoint.every_steps=3")
    log = killed / "samples.jsonl"
    torn = '{"step": 7, "prompt": "What is LLaMA?", "answer": "of a later step"}\n{"step": 7, "prom'
    log.write_text(log.read_text(encoding="utf-8") + torn, encoding="utf-8")
    run(killed, *SAMPLED, resume=True)
    assert samples(killed) == samples(tmp_path / "whole")
    assert_same_run(killed, tmp_path / "whole")
    assert not any("damaged" in name for name in names(killed))
    # A line in the middle that cannot be read is kept aside, as those of the metrics are.
    log.write_text("{}\n" + log.read_text(encoding="utf-8"), encoding="utf-8")
    run(killed, "train.sample_prompts=null", "train.epochs=3", resume=True)
    assert samples(killed) == samples(tmp_path / "whole")
    assert "samples.damaged.jsonl" in names(killed)


def test_answers_are_those_of_chat_and_stand_in_the_report_and_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is LLaMA?\n\n  \nWho are you?\nWhat is LLaMA?\n", encoding="utf-8")
    overrides = (f"train.sample_prompts={prompts}", "train.sample_max_new_tokens=9", "train.epochs=6")
    output = run(tmp_path / "run", *overrides, "optimizer.lr=1e-2").output
    prompts.unlink()  # the run has kept them
    run(output, *overrides[1:], "optimizer.lr=1e-2", f"train.sample_prompts={PROMPTS}", resume=True)
    found = samples(output)
    assert [line["step"] for line in found] == [step for step in range(0, 25, 4) for _ in PROMPTS]
    model, last = load_model(output), {line["prompt"]: line["answer"] for line in found[-2:]}
    assert last == {prompt: generate(model, prompt, temperature=0, max_new_tokens=9) for prompt in PROMPTS}
    report = (output / "report.md").read_text(encoding="utf-8")
    assert "Prompt:\n\n    Who are you?\n\nAnswer after step 0:" in report
    assert f"Answer after step 24:\n\n    {last['Who are you?']}\n" in report
    events = EventAccumulator(str(output / "tensorboard"), {"tensors": 0})
    events.Reload()
    shown = events.Tensors("samples/text_summary")
    assert [event.step for event in shown] == list(range(0, 25, 4))
    assert last["Who are you?"] in shown[-1].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nowhere.txt", "cannot read nowhere.txt: No such file"),
        ("prompts.jsonl", "'prompts.jsonl' is no .txt file"),
        ("empty.txt", "empty.txt holds no prompt"),
        (f"[{'long ' * 300}]", "tokens, the model's context is 256"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_before_the_run(
    value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError) as refused:
        run(tmp_path / "run", f"train.sample_prompts={value}")
    assert said in refused.value.message
    assert not (tmp_path / "run").exists()


def test_the_prediction_of_memory_counts_what_answers_keep() -> None:
    setup = setup_of_run(plan_of(*SAMPLED), 1, "cpu")
    assert setup.samples[0] == 2
    many = replace(setup, samples=(8, 2000))
    without, predicted = predict(replace(setup, samples=(0, 0))), predict(many)
    # Keys and values of 2 layers, 2 heads of 8 float32 numbers: a prompt of half the length has room for 1,024 of them.
    assert predicted.moment.startswith("prompt")
    assert predicted.parts["KV cache"] == 8 * 2 * 2 * 1024 * 2 * 8 * 4
    assert predicted.allocated > without.allocated
    assert predicted.flops == without.flops  # it says how long a step takes


def test_several_processes_answer_together_however_the_model_is_shared(tmp_path: Path) -> None:
    split = ("train.max_steps=3", "train.sample_every_steps=2")
    runs = {
        "fsdp": (*NF4, "parallel.data_parallel=fsdp", *split),
        "split": ("parallel.model_parallel_size=2", *split),
    }
    todo = [
        {"output": str(tmp_path / (name + suffix)), "overrides": [*overrides, *besides]}
        for name, overrides in runs.items()
        for suffix, besides in (("", ()), ("-sampled", (SAMPLED[0], SAMPLED[2])))
    ]
    run_ranks(2, "tests.core.train.parallel_work:runs", todo=todo)
    for name in runs:
        one, other = tmp_path / name, tmp_path / f"{name}-sampled"
        assert metrics(one) == metrics(other)
        for path in (one / "epoch0-iter3").rglob("*"):
            if path.suffix in (".pth", ".safetensors"):
                assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path
    run(tmp_path / "alone", *split, SAMPLED[0], SAMPLED[2])
    assert samples(tmp_path / "split-sampled") == samples(tmp_path / "alone")
    assert [line["step"] for line in samples(tmp_path / "fsdp-sampled")] == [0, 0, 2, 2, 3, 3]


def test_a_recipe_keeps_its_prompts_beside_it(tmp_path: Path) -> None:
    """Where a relative path is looked for first."""
    (tmp_path / "prompts.txt").write_text("Who are you?\n")
    (tmp_path / "my.yaml").write_text(quickstart("train.sample_prompts=prompts.txt").to_yaml())
    from llama_acc.core.recipe import Recipe
    from llama_acc.core.train.plan import make_plan
    from llama_acc.core.train.runs import Callback

    plan = make_plan(Recipe.load(tmp_path / "my.yaml"), Callback())
    assert plan.samples.prompts == plan.recipe.train.sample_prompts == ["Who are you?"]
