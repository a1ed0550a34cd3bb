"""Checkpoints of tuned models: kept, merged, and as adapters for PEFT, computed by transformers and peft to compare."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_acc.core.checkpoint.adapter import Base, base_fingerprint, read_base
from llama_acc.core.checkpoint.convert import Converted, Request, convert
from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.load import read_weights
from llama_acc.core.checkpoint.quantized import NF4Matrix, read_quantization, to_nf4
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.generate.load import load_model
from llama_acc.core.model import nf4
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import describe, quantizable, shapes_of, split_dimension
from llama_acc.core.model.tuning import FULL, Tuning
from llama_acc.core.model.tuning.adapter import Adapter
from llama_acc.core.model.tuning.bias_norm import BiasNorm
from llama_acc.core.model.tuning.lora import LoRA, LoRABiasNorm
from tests.core.checkpoint.folders import GROUPED, huggingface_logits, same_bits, state, tensors_of, write_consolidated
from tests.core.model.test_tuning import tuned_model
from tests.core.tiny import CPU, difference, document_logits, loaded_model

TOKENS = torch.arange(1, 60)
LORA = LoRA(4, lora_alpha=1.5, use_rslora=True, lora_targets=("wq", "wv", "w2"))
BOTH, BIASES = LoRABiasNorm(4, lora_alpha=3), BiasNorm()
ADAPTER = Adapter(4, 2, 5)


def write_tuned(folder: Path, tuning: Tuning, size: int = 1, config: ModelConfig = GROUPED) -> Path:
    """A checkpoint of LLaMA2-Accessory's kind, in which everything the method adds says something."""
    folder.mkdir(parents=True)
    model = tuned_model(tuning, config)
    for rank in range(size):
        tensors = {}
        for name, tensor in model.state_dict().items():
            dimension = split_dimension(name)
            part = tensor if dimension is None else tensor.chunk(size, dimension)[rank].clone()
            tensors[f"llma.{name}"] = part
        torch.save({"model": tensors}, folder / f"consolidated.{rank:02d}-of-{size:02d}.model.pth")
    (folder / "config.json").write_text(json.dumps(model.config.to_params()))
    (folder / "meta.json").write_text(json.dumps({"llama_type": tuning.llama_type}))
    return folder


def logits(*folders: Path) -> Tensor:
    """What is computed here of checkpoints over each other."""
    return document_logits(loaded_model(*folders), [TOKENS])[0]


def made(source: Path, target: Path, to: Any, **options: Any) -> Converted:
    return convert(Request(source, target, to, **options))


@pytest.mark.parametrize("tuning", [LORA, BOTH, BIASES, ADAPTER], ids=lambda tuning: tuning.method)
def test_a_tuned_checkpoint_is_split_and_joined_with_its_method(tuning: Tuning, tmp_path: Path) -> None:
    source = write_tuned(tmp_path / "source", tuning, 2)
    four = made(source, tmp_path / "four", "consolidated", model_parallel_size=4).folder
    back = made(four, tmp_path / "back", "consolidated", model_parallel_size=2).folder
    expected = tensors_of(source)
    for folder in (four, back):
        config = read_config([inspect(folder)])
        assert config is not None
        assert config.tuning == tuning
        assert same_bits(tensors_of(folder), expected)
    for name in ("meta.json", "config.json", "consolidated.01-of-02.model.pth"):
        assert (back / name).exists()
    ours = torch.load(back / "consolidated.01-of-02.model.pth", weights_only=True)["model"]
    theirs = torch.load(source / "consolidated.01-of-02.model.pth", weights_only=True)["model"]
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("tuning", "left"), [(LORA, FULL), (BOTH, BIASES)], ids=["lora", "lora_bias_norm"])
def test_a_merged_checkpoint_computes_the_same(tuning: Tuning, left: Tuning, size: int, tmp_path: Path) -> None:
    source = write_tuned(tmp_path / "source", tuning, size)
    expected = logits(source)
    result = made(source, tmp_path / "merged", "consolidated", merge=True)
    config = read_config([inspect(result.folder)])
    assert config == replace(GROUPED, tuning=left)
    assert difference(logits(result.folder), expected) < 1e-5
    assert result.merge_error is not None
    assert result.merge_error.exact < 1e-5
    assert result.merge_error.saved == result.merge_error.exact
    hf = made(source, tmp_path / "hf", "hf", merge=True).folder
    assert difference(huggingface_logits(hf, TOKENS), expected) < 1e-5
    assert difference(logits(hf), expected) < 1e-5


def test_the_difference_that_rounding_makes_is_told(tmp_path: Path) -> None:
    source = write_tuned(tmp_path / "source", LORA)
    result = made(source, tmp_path / "merged", "meta", merge=True, dtype="bf16")
    assert result.merge_error is not None
    assert result.merge_error.exact < 1e-5
    found = difference(logits(result.folder), logits(source))
    assert 1e-4 < found < 0.3
    assert 0.1 < result.merge_error.saved / found < 10


def test_a_merge_that_computes_something_else_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tuned(tmp_path / "source", LORA)

    def wrong(name: str, sources: Any, tuning: Any) -> Any:
        return sources[name]

    monkeypatch.setattr("llama_acc.core.checkpoint.convert.merged", wrong)
    with pytest.raises(RunError, match="the merged model computes something else: logits are off by"):
        made(source, tmp_path / "merged", "meta", merge=True)
    assert not (tmp_path / "merged").exists()


def test_biases_go_to_transformers_and_back(tmp_path: Path) -> None:
    source = write_tuned(tmp_path / "source", BIASES)
    hf = made(source, tmp_path / "hf", "hf").folder
    assert difference(huggingface_logits(hf, TOKENS), logits(source)) < 1e-5
    back = made(hf, tmp_path / "back", "consolidated").folder
    config = read_config([inspect(back)])
    assert config is not None
    assert config.tuning == BIASES
    assert same_bits(tensors_of(back), tensors_of(source))


def peft_logits(base: Path, adapter: Path) -> Tensor:
    """What transformers and peft compute."""
    import transformers
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        before = model(TOKENS[None]).logits[0].clone()
        found: Tensor = PeftModel.from_pretrained(model, adapter)(TOKENS[None]).logits[0]
    assert difference(found, before) > 1e-3
    return found


def test_biases_that_the_base_has_are_not_written_for_peft(tmp_path: Path) -> None:
    source = write_tuned(tmp_path / "source", BOTH, config=replace(GROUPED, qkv_bias=True, family="qwen2"))
    with pytest.raises(UserError, match="has trained biases that its base has, too, and PEFT would add both"):
        made(source, tmp_path / "target", "peft")


def test_an_adapter_is_written_for_the_base_it_was_trained_on_only(tmp_path: Path) -> None:
    source = write_tuned(tmp_path / "source", LORA)
    base = base_under(source, tmp_path / "base")
    # The base in another layout, size and type is the same base.
    made(base, tmp_path / "hf", "hf", dtype="bf16")
    made(base, tmp_path / "two", "meta", model_parallel_size=2)
    for place, known in enumerate(("base", "hf", "two")):
        made(source, tmp_path / f"adapter{place}", "peft", base=tmp_path / known)
    other = write_consolidated(tmp_path / "other", state(GROUPED, seed=7))
    small = made(base, tmp_path / "small", "consolidated", quantize="nf4").folder
    for wrong, said in ((other, f"{source} was not trained on {other}"), (small, f"{small} is quantized")):
        for options in ({"to": "peft"}, {"to": "meta", "merge": True}):
            with pytest.raises(UserError) as error:
                made(source, tmp_path / "target", base=wrong, **options)
            assert str(error.value).startswith(said)
    assert not (tmp_path / "target").exists()


def base_under(tuned: Path, folder: Path) -> Path:
    """The base that a whole tuned checkpoint holds."""
    plain = shapes_of(GROUPED)
    return write_consolidated(folder, {name: tensor for name, tensor in tensors_of(tuned).items() if name in plain})


def only_trained(whole: Path, tuning: Tuning) -> Path:
    """Makes of a checkpoint what LLaMA2-Accessory saves of what trained alone: it does not name its base."""
    path = whole / "consolidated.00-of-01.model.pth"
    tensors = torch.load(path, weights_only=True)["model"]
    described = describe(replace(GROUPED, tuning=tuning))
    kept = {name: tensor for name, tensor in tensors.items() if described[name.removeprefix("llma.")].trains}
    torch.save({"model": kept}, path)
    return whole


@pytest.mark.parametrize("tuning", [LORA, BOTH, BIASES, ADAPTER], ids=lambda tuning: tuning.method)
def test_what_was_trained_alone_is_known_without_being_told(tuning: Tuning, tmp_path: Path) -> None:
    part = only_trained(write_tuned(tmp_path / "part", tuning), tuning)
    said = f"{part} holds only what was trained (method {tuning.method}), and not on top of which base\n"
    with pytest.raises(UserError) as error:
        load_model(part, device="cpu")
    assert str(error.value) == f"{said}give its base first: --ckpt DIR --ckpt {part} (finetune: --pretrained)"
    if not isinstance(tuning, Adapter):
        with pytest.raises(UserError) as error:
            made(part, tmp_path / "target", "hf", merge=True)
        assert str(error.value) == said + "give its base: --base DIR"
    # As it is it can be split, and laid on its base.
    two = made(part, tmp_path / "two", "consolidated", model_parallel_size=2).folder
    assert same_bits(tensors_of(two), tensors_of(part))


def test_a_base_of_fewer_layers_is_another_base(tmp_path: Path) -> None:
    part = only_trained(write_tuned(tmp_path / "part", LORA), LORA)
    shallow = replace(GROUPED, n_layers=1)
    base = write_consolidated(tmp_path / "base", state(shallow), 1, shallow)
    meant = Base("0" * 64, ("there",))
    (part / "base.json").write_bytes(meant.to_json())
    with pytest.raises(UserError, match=f"{part} was trained on there, and {base} holds other weights"):
        made(part, tmp_path / "target", "hf", merge=True, base=base)


@pytest.mark.parametrize(
    ("tuning", "to", "options", "said"),
    [
        (LORA, "hf", {}, "was tuned with method lora, which layout 'hf' has no place for"),
        (BOTH, "meta", {}, "was tuned with method lora_bias_norm, which layout 'meta' has no place for"),
        (BOTH, "meta", {"merge": True}, "has biases (method lora_bias_norm), and Meta's layout has no place"),
        (ADAPTER, "hf", {}, "was tuned with method adapter, which layout 'hf' has no place for"),
        (ADAPTER, "consolidated", {"merge": True}, "zero-init attention cannot be merged"),
        (ADAPTER, "peft", {}, "PEFT has no place for zero-init attention (prefix, prefix_gate)"),
        (BIASES, "peft", {}, "method bias_norm has no LoRA pairs"),
    ],
)
def test_what_cannot_be_made_is_refused(
    tuning: Tuning, to: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = write_tuned(tmp_path / "source", tuning)
    with pytest.raises(UserError) as error:
        made(source, tmp_path / "target", to, **options)
    assert said in str(error.value)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("skip", [(), ("output", "wv", "layers.1", "layers.0.feed_forward.w2")])
def test_a_quantized_base_is_saved_and_read(skip: tuple[str, ...], tmp_path: Path) -> None:
    config = replace(GROUPED, dim=128)
    source = write_consolidated(tmp_path / "source", state(config), 1, config)
    made(source, tmp_path / "small", "consolidated", quantize="nf4", quantize_skip=skip)
    sizes = [(folder / "consolidated.00-of-01.model.pth").stat().st_size for folder in (source, tmp_path / "small")]
    shapes = shapes_of(config)
    fewer = sum(4 * shapes[name][0] * shapes[name][1] - nf4.nbytes(*shapes[name]) for name in quantizable(config, skip))
    assert sizes[0] - sizes[1] == pytest.approx(fewer, rel=0.05)
    known = {base_fingerprint([inspect(folder)], config) for folder in (source, tmp_path / "small")}
    assert len(known) == 1
    # To a plain checkpoint it goes as what its numbers are.
    dense = made(tmp_path / "small", tmp_path / "dense", "meta", dtype="fp32").folder
    expected = tensors_of(source)
    for name, tensor in tensors_of(dense).items():
        if name in quantizable(config, skip):
            assert 0.01 < difference(tensor, expected[name]) < 0.2
        else:
            assert torch.equal(tensor, expected[name])


# Bases in four bits


WIDE = replace(GROUPED, dim=128, multiple_of=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_consolidated(tmp_path_factory.mktemp("base") / "source", state(WIDE), 1, WIDE)


@pytest.fixture(scope="module")
def small(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(source, tmp_path_factory.mktemp("small") / "small", "consolidated", quantize="nf4").folder


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_has_its_part_of_the_same_values(size: int, small: Path) -> None:
    whole = read_weights([inspect(small)]).tensors
    for rank in range(size):
        for name, part in read_weights([inspect(small)], rank, size).tensors.items():
            if not isinstance(part.source, NF4Matrix) or part.shape[1] % 64:
                continue
            packed, scales = to_nf4(part, CPU)
            share = part.to(torch.float32)
            # The numbers are the same ones, and so but for one part in a hundred are the scales.
            assert difference(nf4.dequantize(packed, scales, torch.float32), share) < 0.01, name
            assert whole[name].shape != part.shape


def test_a_part_whose_edges_lie_within_blocks_is_refused(small: Path) -> None:
    part = read_weights([inspect(small)], 0, 4).tensors["layers.0.attention.wo.weight"]
    with pytest.raises(UserError, match=r"of 128 columns cannot be split into parts of 32: it has blocks of 64"):
        to_nf4(part, CPU)


@pytest.mark.parametrize("told", [{"output": True}, {"skip": [], "values": "cd"}], ids=["format 1", "calibrated"])
def test_what_an_early_version_quantized_is_refused_with_what_to_do(told: dict[str, object], tmp_path: Path) -> None:
    values: dict[str, object] = {"format_version": 1, "type": "nf4", "double": True, "fingerprint": "ab"}
    (tmp_path / "quantization.json").write_text(json.dumps(values | told))
    with pytest.raises(UserError, match=r"quantization.json is not usable") as refusal:
        read_quantization(tmp_path)
    assert "--quantize nf4" in str(refusal.value.hint)
    (tmp_path / "base.json").write_text(
        json.dumps({"fingerprint": "ab", "pretrained": ["x"], "quantized": {"type": "nf4"} | told})
    )
    with pytest.raises(UserError, match=r"base.json is not usable"):
        read_base(tmp_path)
