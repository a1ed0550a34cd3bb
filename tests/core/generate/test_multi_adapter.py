"""Several adapters over one base in memory: each answers as it does alone, whoever else is in the batch."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_acc.core.checkpoint.adapter import Base, TrainedQuantized, base_fingerprint
from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.errors import UserError
from llama_acc.core.generate.engine import Engine, Prompt
from llama_acc.core.generate.load import LoadedModel, load_model, load_models
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import describe
from llama_acc.core.model.tuning import METHODS, Tuning
from llama_acc.core.model.tuning.adapter import Adapter
from llama_acc.core.model.tuning.bias_norm import BiasNorm
from llama_acc.core.model.tuning.lora import LoRA, LoRABiasNorm
from tests.core.generate.decoding import decode, uncached_greedy
from tests.core.model.scaling import Scaling
from tests.core.ranks import run_ranks
from tests.core.tiny import SMALL, random_model, save_model

METHODS.pop(Scaling.method, None)  # known in these tests only
CONFIG = replace(SMALL, qk_norm=True, head_dim=16, n_kv_heads=2)
GREEDY = Sampling(temperature=0, max_new_tokens=12)
TUNINGS: dict[str, Tuning] = {
    "lora": LoRA(4, lora_alpha=8.0),
    "another": LoRA(2, lora_targets=("wq", "w2")),
    "norms": BiasNorm(),
    "all": LoRABiasNorm(4),
    "prefixed": Adapter(4, 1, 5),
    "prefixes": Adapter(0, 2, 3, prefix_new_gate=True),
    "scaling": Scaling(),
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, Scaling.method, Scaling)


def write_adapter(folder: Path, tuning: Tuning, tokenizer_path: Path, config: ModelConfig = CONFIG) -> Path:
    """What a run leaves that trained on `random_model(config)`; all that the method adds says something."""
    folder.mkdir()
    model = random_model(replace(config, tuning=tuning))
    generator = torch.Generator().manual_seed(len(folder.name))
    described, kept = describe(model.config), {}
    for name, parameter in model.named_parameters():
        if described[name].trains:
            kept[f"llma.{name}"] = parameter.detach() + 0.3 * torch.randn(parameter.shape, generator=generator)
    torch.save({"model": kept}, folder / "consolidated.00-of-01.model.pth")
    (folder / "config.json").write_text(json.dumps(model.config.to_params()))
    (folder / "meta.json").write_text(json.dumps({"llama_type": tuning.llama_type}))
    shutil.copy(tokenizer_path, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def folders(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The base, and adapters of it, in each of which only the adapter is."""
    folder = tmp_path_factory.mktemp("adapters")
    base = folder / "base"
    base.mkdir()
    save_model(random_model(CONFIG), base, torch.float32)
    shutil.copy(tokenizer_path, base / "tokenizer.model")
    adapters = {name: [base, write_adapter(folder / name, own, tokenizer_path)] for name, own in TUNINGS.items()}
    return {"base": [base], **adapters}


def prompts_for(models: dict[str, LoadedModel], count: int, seed: int = 0) -> list[Prompt]:
    """For all of them; many begin alike."""
    draw = random.Random(seed)
    words, system = range(3, SMALL.vocab_size), [1, *range(20, 60)]
    found = []
    for number in range(count):
        tokens = (system if number % 3 else [1]) + draw.choices(words, k=draw.choice([1, 4, 30]))
        found.append(Prompt(tokens, adapter=number % len(models)))
    return found


def alone(folders: dict[str, list[Path]], prompts: list[Prompt], **options: object) -> list[list[int]]:
    """What each adapter's model says where it is loaded by itself."""
    models = [load_model(*own, device="cpu", **options) for own in folders.values()]  # type: ignore[arg-type]
    said = []
    for prompt in prompts:
        loaded = models[prompt.adapter]
        said.append(uncached_greedy(loaded.model, [*prompt.tokens], 12, loaded.tokenizer.end_ids))
    return said


def test_each_adapter_answers_in_a_mixed_batch_as_alone(folders: dict[str, list[Path]]) -> None:
    models = load_models(folders, device="cpu")
    assert [loaded.adapter for loaded in models.values()] == list(range(8))
    prompts = prompts_for(models, 16)
    expected = alone(folders, prompts)
    assert len({tuple(tokens) for tokens in expected}) > 12
    for seed in range(4):
        draw = random.Random(seed)
        engine = Engine(draw.choice([*models.values()]), draw.choice([1, 3, 8, 16]), chunk=draw.choice([7, 64, 512]))
        joins = [(draw.randrange(16), number) for number in range(16)]
        step, replies = 0, {}
        while len(replies) < 16 or engine.waiting or engine.running:
            for when, number in joins:
                if when == step:
                    replies[number] = engine.add(prompts[number], Sampler(GREEDY))
            engine.step()
            step += 1
        assert [replies[number].tokens for number in range(16)] == expected, seed


def test_the_base_is_in_memory_once(folders: dict[str, list[Path]]) -> None:
    models = load_models(folders, device="cpu")
    model = models["base"].model
    assert all(loaded.model is model for loaded in models.values())
    places = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    added = sum(
        one.numel()
        for folder in (own[-1] for own in [*folders.values()][1:])
        for one in torch.load(folder / "consolidated.00-of-01.model.pth")["model"].values()
    )
    assert sum(places.values()) == sum(parameter.numel() for parameter in random_model(CONFIG).parameters()) + added


@pytest.mark.parametrize("names", [["lora"], ["norms", "lora"], ["prefixed", "norms"]])
def test_any_of_them_may_come_first(names: list[str], folders: dict[str, list[Path]]) -> None:
    some = {name: folders[name] for name in names}
    models = load_models(some, device="cpu")
    prompts = prompts_for(models, 6)
    replies = decode(Engine(models[names[-1]]), prompts, GREEDY, 6)
    assert {reply.index: reply.tokens for reply in replies} == dict(enumerate(alone(some, prompts)))


def test_adapters_over_a_base_in_four_bits(tokenizer_path: Path, tmp_path: Path) -> None:
    config = replace(SMALL, dim=64)
    (base := tmp_path / "base").mkdir()
    save_model(random_model(config), base, torch.float32)
    shutil.copy(tokenizer_path, base / "tokenizer.model")
    folders = {name: [base, write_adapter(tmp_path / name, TUNINGS[name], tokenizer_path, config)] for name in TUNINGS}
    models = load_models({"base": [base], **folders}, device="cpu", quantize="nf4")
    assert models["base"].model.is_quantized
    prompts = prompts_for(models, 16)
    replies = decode(Engine(models["base"]), prompts, GREEDY, 16)
    expected = alone({"base": [base], **folders}, prompts, quantize="nf4")
    assert {reply.index: reply.tokens for reply in replies} == dict(enumerate(expected))


def test_ranks_that_share_the_base_answer_for_all_adapters(folders: dict[str, list[Path]]) -> None:
    some = {name: own for name, own in folders.items() if name != "scaling"}  # not known in other processes
    prompts = prompts_for(dict.fromkeys(some), 14)  # type: ignore[arg-type]
    given = {name: [str(folder) for folder in own] for name, own in some.items()}
    work = "tests.core.generate.schedules_work:mixed_replies"
    asked = [[list(prompt.tokens), prompt.adapter] for prompt in prompts]
    assert run_ranks(2, work, folders=given, prompts=asked, most=12) == [alone(some, prompts), []]


def test_models_of_different_bases_and_types_are_refused(
    folders: dict[str, list[Path]], tokenizer_path: Path, tmp_path: Path
) -> None:
    (other := tmp_path / "other").mkdir()
    save_model(random_model(CONFIG, seed=7), other, torch.float32)
    shutil.copy(tokenizer_path, other / "tokenizer.model")
    with pytest.raises(UserError, match="tuned has another base than base\nmodels in one process are adapters of the"):
        load_models({"base": folders["base"], "tuned": [other]}, device="cpu")
    base, lora = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders["lora"])
    models = load_models({"base": folders["base"], "copied": [base, lora]}, device="cpu")
    assert len(models) == 2, "by what is in it, not by where it is"
    fingerprint = base_fingerprint([inspect(base)], CONFIG)
    (lora / "base.json").write_bytes(Base(fingerprint, ("base",), TrainedQuantized("nf4")).to_json())
    with pytest.raises(UserError, match=r"norms and lora were .* different types.*\n.*--quantize"):
        load_models({"norms": folders["norms"], "lora": [base, lora]}, device="cpu")
