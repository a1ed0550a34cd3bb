"""Results of lm-evaluation-harness are those of its own class for the exported folder, request by request."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_acc.core.data.templates import get_template
from llama_acc.core.errors import UserError
from llama_acc.core.evaluate.perplexity import measure, read_data
from llama_acc.core.generate.load import LoadedModel, load_model
from llama_acc.core.model.tuning.adapter import Adapter
from llama_acc.core.model.tuning.lora import LoRABiasNorm
from llama_acc.core.tokenizer import load_tokenizer
from tests.cli.commands import complete, invoke, refused
from tests.core.ranks import run_ranks
from tests.core.tiny import CPU, SMALL, random_model

pytest.importorskip("lm_eval", reason="make test installs the extra eval")
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from llama_acc.core.evaluate.lm_eval import EngineLM, load_tasks, run_tasks
from tests.core.evaluate.harness import TASKS, answers, write_model, write_tasks


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets are not kept with the user's, here and in processes that are started."""
    folder = tmp_path_factory.mktemp("huggingface")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module", params=["sentencepiece", "json"])
def folders(
    request: pytest.FixtureRequest, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A checkpoint, and the same one for transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    own = write_model(folder / "own", tokenizer_path if request.param == "sentencepiece" else None)
    complete("convert-checkpoint", own, folder / "hf", "--to", "hf")
    return own, folder / "hf"


def of_harness(folder: Path, tasks: Path, **options: Any) -> Any:
    return simple_evaluate(
        "hf",
        {"pretrained": str(folder), "dtype": "float32"},
        TASKS,
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        **options,
    )


CHAT = {"apply_chat_template": True, "num_fewshot": 2}


@pytest.mark.parametrize(
    "options",
    [{}, {**CHAT, "system_instruction": "Be brief."}, {**CHAT, "fewshot_as_multiturn": False, "limit": 3}],
    ids=["plain", "chat", "one turn"],
)
def test_results_are_those_of_the_exported_folder_in_the_harness(
    options: Mapping[str, Any], folders: tuple[Path, Path], tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, exported = folders
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", quiet)  # asks pip for all packages
    model = EngineLM(load_model(own, device="cpu"), 500, quiet)
    found = run_tasks(model, load_tasks(TASKS, tasks), bootstrap_iters=0, **options)
    expected = of_harness(exported, tasks, **options)
    for name in TASKS:
        actual, wanted = answers(found["samples"][name]), answers(expected["samples"][name])
        assert [request for request, _ in actual] == [request for request, _ in wanted]
        for (_, given), (_, right) in zip(actual, wanted, strict=True):
            assert given == approximately(right)
        figures = {key: value for key, value in expected["results"][name].items() if not isinstance(value, str)}
        assert {key: found["results"][name][key] for key in figures} == pytest.approx(figures, rel=1e-4)
    said = [text for _, [[text]] in answers(found["samples"]["answers"])]
    assert len({text[:3] for text in said}) > 1 or "limit" in options
    assert model.truncated > 0
    assert (model.without_system > 0) == (model.loaded.template.name == "chat_template" and bool(options))


def approximately(responses: Any) -> Any:
    """Texts and whether they are greedy as they are, log-probabilities within 1e-4."""
    if isinstance(responses, list):
        return [approximately(response) for response in responses]
    return pytest.approx(responses, abs=1e-4, rel=1e-6) if isinstance(responses, float) else responses


@pytest.mark.parametrize("method", [LoRABiasNorm(4), Adapter(0, 2, 5), "nf4"], ids=["lora_bias_norm", "adapter", "nf4"])
def test_scores_of_what_cannot_be_exported_are_its_perplexity(
    method: LoRABiasNorm | Adapter | str, tokenizer_path: Path, tmp_path: Path
) -> None:
    if isinstance(method, str):
        loaded = load_model(
            write_model(tmp_path / "model", tokenizer_path), device="cpu", template="none", quantize="nf4"
        )
        assert loaded.model.is_quantized
    else:
        tuned = random_model(replace(SMALL, tuning=method), seed=5).requires_grad_(False)
        if isinstance(method, Adapter):
            torch.nn.init.ones_(tuned.prefix_gate)
        loaded = LoadedModel(tuned, load_tokenizer(tokenizer_path), get_template("none"), "asked for", CPU)
    data = tmp_path / "data.json"
    items = [{"instruction": f"name {i} towns: ", "output": "the town " * (3 * i + 1)} for i in range(8)]
    data.write_text(json.dumps(items))
    encoded = read_data(loaded, [str(data)], None, quiet)
    expected = measure(loaded, encoded, 3, quiet)
    model = EngineLM(loaded, 300, quiet)
    requests = []
    for tokens, labeled in map(encoded.document, range(len(encoded))):
        begin = int(labeled.argmax())
        requests.append((None, tokens[:begin].tolist(), tokens[begin:].tolist()))
    scores = [score for score, _ in model._loglikelihood_tokens(requests)]
    assert -sum(scores) / expected.label_tokens == pytest.approx(expected.loss, abs=1e-5)


def test_processes_that_share_a_model_give_the_results_of_one(
    tokenizer_path: Path, tasks: Path, tmp_path: Path
) -> None:
    folder, names = write_model(tmp_path / "model", tokenizer_path), ["choices", "answers"]
    samples = run_tasks(EngineLM(load_model(folder, device="cpu"), 500, quiet), load_tasks(names, tasks))["samples"]
    given = {"folder": str(folder), "tasks": str(tasks), "names": names}
    shared, others = run_ranks(2, "tests.core.evaluate.harness:shared_answers", **given)
    assert shared == {name: approximately(answers(samples[name])) for name in names}
    assert others == {}


def test_unknown_tasks_and_settings_are_refused(
    tokenizer_path: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The harness's own tasks would take half a minute.
    def only_own(include_path: Path, include_defaults: bool = True) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("llama_acc.core.evaluate.lm_eval.TaskManager", only_own)
    with pytest.raises(UserError, match="unknown task: choises") as unknown:
        load_tasks(["choises", "texts"], tasks)
    assert unknown.value.hint == "did you mean 'choices'?"
    model = EngineLM(load_model(write_model(tmp_path / "model", tokenizer_path), device="cpu"), 500, quiet)
    for settings, problem in (
        ("num_beams=5", "with num_beams"),
        ("max_gen_toks=256", r"max_gen_toks \(256\) must be less"),
    ):
        with pytest.raises(UserError, match=problem):
            run_tasks(model, load_tasks(["answers"], tasks), gen_kwargs=settings)


def test_the_command_prints_a_table_and_writes_all_of_it(tokenizer_path: Path, tasks: Path, tmp_path: Path) -> None:
    folder, output = write_model(tmp_path / "model", tokenizer_path), tmp_path / "results.json"
    flags = ("--ckpt", folder, "--include-path", tasks, "--device", "cpu", "--num-fewshot", 1, "--limit", 2)
    result = complete("evaluate", "lm-eval", "choices", "endings", *flags, "--output", output, "--log-samples")
    written = json.loads(output.read_text())
    figures = written["results"]
    cells = [line.split() for line in result.stdout.splitlines()]
    assert cells[0] == ["task", "metric", "value", "stderr", "n-shot"]
    assert cells[1][:3] == ["choices", "acc", f"{figures['choices']['acc,none']:.4f}"]
    assert [row[0] for row in cells[1:]] == ["choices", "choices", "endings"]
    assert len(written["samples"]["choices"]) == 2
    assert written["config"]["num_fewshot"] == 1
    assert len(written["config"]["fingerprint"]) == 64
    assert written["lm_eval_version"] >= "0.4.13"
    printed = json.loads(invoke("evaluate", "lm-eval", "choices", "endings", *flags, "--json").stdout)
    del written["samples"]
    assert printed == written
    refused(invoke("evaluate", "lm-eval", "choices", *flags, "--log-samples"), "give --output FILE")
