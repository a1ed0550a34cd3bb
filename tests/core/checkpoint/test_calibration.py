"""Bases whose rounding was calibrated: nearer to the exact model, and the same numbers wherever they are used."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_acc.core.checkpoint.base import Base, TrainedQuantised, read_base
from llama_acc.core.checkpoint.convert import Calibration, Request, convert
from llama_acc.core.checkpoint.fingerprint import base_fingerprint
from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.quantised import QuantisedPart, Quantization, quantised, read_quantization
from llama_acc.core.checkpoint.shards import Weights, fill, read_weights
from llama_acc.core.errors import UserError
from llama_acc.core.model import gptq, nf4
from llama_acc.core.model.transformer import Transformer, build_on_meta, quantise_on_meta
from llama_acc.core.model.tuning import Tuning
from tests.core.checkpoint.folders import GROUPED, state, write_consolidated
from tests.core.checkpoint.test_tuned import made, only_trained, tensors_of, write_tuned
from tests.core.tiny import CPU, difference, document_logits

CONFIG = replace(GROUPED, dim=128, multiple_of=64)


def text(documents: int, seed: int) -> list[list[int]]:
    """Documents of tokens, some tokens much more frequent than others."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, CONFIG.vocab_size + 1)
    return [torch.multinomial(weights, 20 + 3 * i, True, generator=generator).tolist() for i in range(documents)]


def quantised_model(folder: Path) -> Transformer:
    quantization = read_quantization(folder)
    assert quantization is not None
    model = build_on_meta(CONFIG, torch.float32).requires_grad_(False)
    quantise_on_meta(model, quantization.skip)
    fill(model, read_weights([inspect(folder)]), CPU, torch.float32, copy=False)
    return model


def exact_model(folder: Path) -> Transformer:
    model = build_on_meta(CONFIG, torch.float32).requires_grad_(False)
    fill(model, Weights.of(tensors_of(folder)), CPU, torch.float32, copy=True)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_consolidated(tmp_path_factory.mktemp("base") / "source", state(CONFIG), 1, CONFIG)


def calibrate(source: Path, target: Path, skip: tuple[str, ...] = ()) -> Path:
    calibration = Calibration(text(40, 1), "cpu")
    request = Request(source, target, "consolidated", quantize="nf4", quantize_skip=skip, calibration=calibration)
    return convert(request).folder


@pytest.fixture(scope="module")
def small(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(source, tmp_path_factory.mktemp("small") / "calibrated")


def logits(model: Transformer, documents: list[list[int]]) -> Tensor:
    return torch.cat(document_logits(model, [torch.tensor(document) for document in documents]))


def test_the_model_is_nearer_on_text_it_was_not_calibrated_with(source: Path, small: Path, tmp_path: Path) -> None:
    nearest = made(source, tmp_path / "nearest", "consolidated", quantize="nf4").folder
    sizes = {(folder / "consolidated.00-of-01.model.pth").stat().st_size for folder in (small, nearest)}
    assert len(sizes) == 1
    unseen = text(10, 2)
    wanted = logits(exact_model(source), unseen)
    errors = [(logits(quantised_model(folder), unseen) - wanted).norm().item() for folder in (small, nearest)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("skip", [(), ("output",), ("wv", "layers.0.feed_forward")])
def test_the_last_matrices_were_made_for_the_inputs_that_the_quantised_model_gives_them(
    skip: tuple[str, ...], source: Path, small: Path, tmp_path: Path
) -> None:
    folder = calibrate(source, tmp_path / "small", skip) if skip else small
    names = ["layers.1.feed_forward.w2"] + ([] if "output" in skip else ["output"])
    given: dict[str, list[Tensor]] = {name: [] for name in names}
    model = quantised_model(folder)
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(partial(keep, given[name]))
    logits(model, text(40, 1))
    for name, (x,) in given.items():
        packed, scales = gptq.calibrated(tensors_of(source)[f"{name}.weight"], x.t() @ x)
        found = read_weights([inspect(folder)]).tensors[f"{name}.weight"]
        assert isinstance(found, QuantisedPart)
        is_same = found.to(torch.float32) == nf4.dequantise(packed, scales, torch.float32)
        # The sums are of another order, so a value between two numbers may go to the other.
        assert is_same.float().mean() > 0.98, name


def keep(into: list[Tensor], module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
    into.append(arguments[0].flatten(0, -2))


def test_a_calibrated_base_says_so_and_is_the_same_base(source: Path, small: Path) -> None:
    told = json.loads((small / "quantization.json").read_text())
    assert len(told["values"]) == 64
    assert base_fingerprint([inspect(small)], CONFIG) == base_fingerprint([inspect(source)], CONFIG)


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_has_its_part_of_the_same_values(size: int, small: Path) -> None:
    whole = read_weights([inspect(small)]).tensors
    for rank in range(size):
        for name, part in read_weights([inspect(small)], rank, size).tensors.items():
            if not isinstance(part, QuantisedPart) or part.shape[1] % 64:
                continue
            packed, scales = quantised(part, CPU)
            share = part.to(torch.float32)
            # The numbers are the same ones, and so but for one part in a hundred are the scales.
            assert difference(nf4.dequantise(packed, scales, torch.float32), share) < 0.01, name
            assert whole[name].shape != part.shape


def test_a_part_whose_edges_lie_within_blocks_is_refused(small: Path) -> None:
    part = read_weights([inspect(small)], 0, 4).tensors["layers.0.attention.wo.weight"]
    with pytest.raises(UserError, match=r"of 128 columns cannot be split into parts of 32: it has blocks of 64"):
        quantised(part, CPU)


def test_what_was_trained_on_calibrated_values_is_merged_into_these(source: Path, small: Path, tmp_path: Path) -> None:
    tuning = Tuning("lora", 4)
    part = only_trained(write_tuned(tmp_path / "part", tuning, config=CONFIG), tuning)
    quantization = read_quantization(small)
    assert quantization is not None
    trained = TrainedQuantised("nf4", (), quantization.values)
    (part / "base.json").write_bytes(Base(quantization.fingerprint, ("small",), trained).to_json())
    with pytest.raises(UserError, match=f"was trained on small, whose rounding was calibrated, and {source} would be"):
        made(part, tmp_path / "merged", "meta", merge=True, base=source)
    merged = tensors_of(made(part, tmp_path / "merged", "meta", merge=True, base=small, dtype="fp32").folder)
    pair = tensors_of(part)
    for name in ("layers.0.attention.wq", "layers.1.feed_forward.w2"):
        product = pair[f"{name}.lora_b.weight"] @ pair[f"{name}.lora_a.weight"]
        expected = read_weights([inspect(small)]).tensors[f"{name}.weight"].to(torch.float32) + product
        assert difference(merged[f"{name}.weight"], expected) < 1e-6
    made(part, tmp_path / "original", "meta", merge=True, base=source, merge_into="original")


def test_only_a_plain_base_is_calibrated(source: Path, small: Path, tmp_path: Path) -> None:
    calibration = Calibration(text(2, 1), "cpu")
    tuned = write_tuned(tmp_path / "tuned", Tuning("lora", 4))
    for folder, said in ((tuned, f"{tuned} was tuned with method lora"), (small, f"{small} is quantised already")):
        with pytest.raises(UserError, match=said):
            made(folder, tmp_path / "target", "consolidated", quantize="nf4", calibration=calibration)
    with pytest.raises(UserError, match="calibrating is a way to quantise\nadd --quantize nf4"):
        made(source, tmp_path / "target", "consolidated", calibration=calibration)


@pytest.mark.parametrize(("output", "skip"), [(True, ()), (False, ("output",))])
def test_what_an_older_version_wrote_is_understood(output: bool, skip: tuple[str, ...], tmp_path: Path) -> None:
    values = {"format_version": 1, "type": "nf4", "double": True, "output": output, "fingerprint": "ab"}
    (tmp_path / "quantization.json").write_text(json.dumps(values))
    assert read_quantization(tmp_path) == Quantization(skip, "ab")
    values = {"fingerprint": "ab", "pretrained": ["x"], "quantised": {"type": "nf4", "output": output}}
    (tmp_path / "base.json").write_text(json.dumps(values))
    assert read_base(tmp_path) == Base("ab", ("x",), TrainedQuantised("nf4", skip))
