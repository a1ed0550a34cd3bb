"""Quantized models: the numbers are those of the dequantized matrices, as bitsandbytes itself makes them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llama_acc.core.checkpoint.load import Weights, fill, load_parameters
from llama_acc.core.errors import UserError
from llama_acc.core.model import nf4
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.layers import linear
from llama_acc.core.model.transformer import (
    Transformer,
    build_on_meta,
    describe,
    freeze_untrained,
    fuse_quantized,
    initialize,
    matrices_of,
    quantizable,
    quantize_on_meta,
    shapes_of,
)
from llama_acc.core.model.tuning.lora import LoRA, LoRABiasNorm
from tests.core.tiny import CPU, SMALL, cached_logits, difference, document_logits, random_model

# A width of whole blocks, and one whose blocks go across rows.
SHAPES = {"whole blocks": replace(SMALL, dim=128, multiple_of=64), "blocks across rows": replace(SMALL, dim=48)}
LORA = LoRABiasNorm(4)


def theirs(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix as bitsandbytes quantizes and dequantizes it, its rows one after the other."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    row = matrix.reshape(1, -1)
    return dequantize_4bit(*quantize_4bit(row, quant_type="nf4", compress_statistics=True)).view(matrix.shape)


def rounded(model: Transformer, skip: tuple[str, ...] = ()) -> Transformer:
    """The model with its matrices as they are in NF4, in float32."""
    with torch.no_grad():
        for name in quantizable(model.config, skip):
            parameter = model.get_parameter(name)
            parameter.copy_(theirs(parameter))
    return model


def quantized(model: Transformer, dtype: torch.dtype = torch.float32, skip: tuple[str, ...] = ()) -> Transformer:
    """As chat loads it."""
    empty = build_on_meta(model.config, dtype).requires_grad_(False)
    quantize_on_meta(empty, skip)
    fill(empty, Weights.of(dict(model.named_parameters())), CPU, dtype, copy=False)
    return empty


def for_training(model: Transformer, dtype: torch.dtype = torch.float32) -> Transformer:
    """As finetune loads it."""
    empty = build_on_meta(model.config, dtype)
    freeze_untrained(empty)
    quantize_on_meta(empty)
    empty.to_empty(device="cpu")
    load_parameters(empty, Weights.of(dict(model.named_parameters())))
    return empty


@pytest.mark.parametrize("shape", [(8, 64), (3, 128), (70, 4), (1, 2), (128, 352), (36_000, 128)])
def test_quantizing_in_pieces_is_bitsandbytes_quantizing(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, scales = nf4.quantize(lambda start, rows: rows.copy_(matrix[start:][: len(rows)]), shape, CPU)
    assert torch.equal(nf4.dequantize(packed, scales, torch.float32), theirs(matrix))
    # The largest gap between two of the 16 numbers is 0.304; magnitudes are rounded to less than 1%.
    errors, largest = (
        F.pad(values.flatten(), (0, -values.numel() % 64)).view(-1, 64).abs().amax(1)
        for values in (theirs(matrix) - matrix, matrix)
    )
    assert (errors < 0.17 * largest).all()
    assert packed.nbytes + sum(part.nbytes for part in scales) == nf4.nbytes(*shape)
    for found, room in zip(scales, nf4.empty_scales(*shape), strict=True):
        assert (found.shape, found.dtype) == (room.shape, room.dtype)


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("shape", [(64, 128), (40, 64), (32, 48)], ids=str)
def test_few_rows_in_bfloat16_are_multiplied_by_the_dequantized_matrix(shape: tuple[int, int], rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(shape, generator=generator)
    x = torch.randn(rows, shape[1], generator=generator).bfloat16()
    packed, scales = nf4.quantize(lambda start, rows: rows.copy_(matrix[start:][: len(rows)]), shape, CPU)
    for prepare in (lambda *matrix: None, nf4.fuse):
        prepare(packed, scales)
        with torch.no_grad():
            assert difference(linear(x, packed, scales), x.float() @ theirs(matrix).t()) < 1e-2


@pytest.mark.skipif(not nf4._is_fused_on_cpu(), reason="the CPU or the library has no such kernel")
def test_the_second_copy_is_what_the_library_makes() -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    matrix = torch.randn(96, 192, generator=torch.Generator().manual_seed(2))
    packed, scales = nf4.quantize(lambda start, rows: rows.copy_(matrix[start:][: len(rows)]), (96, 192), CPU)
    nf4.fuse(packed, scales)
    values, state = packed.fused  # type: ignore[attr-defined]
    theirs = nf4._state(packed, scales.absmax, torch.bfloat16, scales)
    wanted, theirs = _convert_weight_packed_for_cpu(packed.clone(), theirs)
    assert torch.equal(values, wanted)
    assert torch.equal(state.absmax, theirs.absmax)


def test_the_second_copy_is_kept_where_it_has_room() -> None:
    model = quantized(random_model(replace(SHAPES["whole blocks"], vocab_size=320)), torch.bfloat16)
    matrices = [*matrices_of(model), model.output]
    size = 2 * sum(one.weight.nbytes for one in matrices)
    for room, kept in ((size, 0), (size + 1, len(matrices) * nf4._is_fused_on_cpu())):
        fuse_quantized(model, room)
        assert sum(hasattr(one.weight, "fused") for one in matrices) == kept


def test_a_long_prompt_waits_for_no_second_copy_but_that_of_the_output() -> None:
    model = quantized(random_model(replace(SHAPES["whole blocks"], vocab_size=320)), torch.bfloat16)
    matrices = [*matrices_of(model), model.output]
    for rows, kept in ((nf4.FUSED_ROWS + 1, 1), (nf4.FUSED_ROWS, len(matrices))):
        assert fuse_quantized(model, 1 << 40, rows) == (rows <= nf4.FUSED_ROWS)
        assert sum(hasattr(one.weight, "fused") for one in matrices) == kept * nf4._is_fused_on_cpu()


def test_torchs_compiler_is_not_imported_to_compute_in_nf4() -> None:
    code = """
import sys, torch
from llama_acc.core.model import nf4
packed, scales = nf4.quantize(lambda start, rows: rows.fill_(1), (64, 64), torch.device("cpu"))
nf4.dequantize(packed, scales, torch.float32)
assert "bitsandbytes" in sys.modules and "torch._dynamo" not in sys.modules
torch.compile(lambda x: x, backend="eager")(torch.ones(1))
assert "torch._dynamo" in sys.modules
assert nf4.dequantize(packed, scales, torch.float32).eq(1).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_operators_of_the_library_take_what_is_named_too(tmp_path: Path) -> None:
    """As those that are given where to write their result, which only GPUs have, are called."""
    (tmp_path / "bitsandbytes.py").write_text("""
import torch
torch.library.define("stand_in::double", "(Tensor x, *, Tensor(a!) out) -> ()")
@torch.library.register_kernel("stand_in::double", "cpu")
def double(x, *, out):
    out.copy_(2 * x)
""")
    code = """
import torch
from llama_acc.core.model import nf4
nf4._library()
x, y = torch.ones(2), torch.zeros(2)
torch.ops.stand_in.double(x, out=y)
assert y.tolist() == [2, 2]
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


def test_an_odd_number_of_columns_is_refused() -> None:
    with pytest.raises(UserError, match="a matrix of 5 columns cannot be quantized"):
        nf4.packed_shape(4, 5)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("skip", [(), ("output",), ("wv", "layers.0")])
def test_logits_are_those_of_the_dequantized_matrices(config: ModelConfig, skip: tuple[str, ...]) -> None:
    model, tokens = random_model(config), torch.arange(24)
    small = quantized(model, skip=skip)
    assert small.output.is_quantized == ("output" not in skip)
    expected = document_logits(rounded(model, skip), [tokens])[0]
    assert difference(document_logits(small, [tokens])[0], expected) < 1e-5
    assert difference(cached_logits(small, tokens, [10, *[1] * 14]), expected) < 1e-5


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients_are_those_of_the_dequantized_matrices(config: ModelConfig) -> None:
    model, tokens = random_model(replace(config, tuning=LORA)), torch.arange(24)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", ".lora_b.weight")):
                parameter.normal_(0, 0.1)
    small = for_training(model)
    large = rounded(model)
    losses = []
    for one in (small, large):
        losses.append(one(tokens, tokens, [24], tokens.roll(-1)))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    trained = [name for name, parameter in small.named_parameters() if parameter.requires_grad]
    assert set(trained) == {name for name, one in describe(model.config).items() if one.trains}
    for name in trained:
        ours, wanted = small.get_parameter(name).grad, large.get_parameter(name).grad
        assert ours is not None
        assert wanted is not None
        assert difference(ours, wanted) < 1e-4, name


def test_norms_embedding_and_what_trains_are_never_quantized() -> None:
    model = for_training(random_model(replace(SMALL, tuning=LORA)), torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    small = {name for name, kind in kinds.items() if kind == torch.uint8}
    assert small == set(quantizable(SMALL))
    assert len(small) == 7 * SMALL.n_layers + 1
    assert {name for name, kind in kinds.items() if kind == torch.bfloat16} == {"tok_embeddings.weight"}
    assert all(kinds[name] == torch.float32 for name, one in describe(model.config).items() if one.trains)


def test_random_weights_are_quantized_too() -> None:
    model = build_on_meta(SMALL, torch.float32).requires_grad_(False)
    quantize_on_meta(model)
    model.to_empty(device="cpu")
    initialize(model, 3)
    plain = random_model(SMALL)
    initialize(plain, 3)
    tokens = torch.arange(20)
    expected = document_logits(rounded(plain), [tokens])[0]
    assert difference(document_logits(model, [tokens])[0], expected) < 1e-5


def test_nothing_of_the_size_of_a_dense_matrix_is_kept_for_the_backward_pass() -> None:
    config = replace(SMALL, dim=128, multiple_of=64, tuning=LoRA(4))
    model, tokens = for_training(random_model(config)), torch.arange(8)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens, [8], tokens.roll(-1))
    least = min(torch.Size(shapes_of(config)[name]).numel() for name in quantizable(config, ("output",)))
    large = [tensor for tensor in kept if tensor.is_floating_point() and tensor.numel() >= least]
    assert kept
    assert not large, [tuple(tensor.shape) for tensor in large]
