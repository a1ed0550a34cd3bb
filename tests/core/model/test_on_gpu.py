"""A GPU's ways against the CPU's in float64, in the same process; skipped where there is no CUDA device."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from llama_acc.core.device import prepare_cuda
from llama_acc.core.generate.decode_graph import DecodeGraph
from llama_acc.core.model.attention import DocumentAttention, KVCache, flash_attention
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.rotary import rotary_table
from llama_acc.core.model.transformer import Transformer, pack_small
from llama_acc.core.model.tuning import METHODS
from tests.core.model.test_nf4 import LORA, SHAPES, for_training, quantized, rounded
from tests.core.tiny import SMALL, cached_logits, difference, document_logits, random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LENGTHS = (70, 3, 129, 1)
TOKENS = torch.randint(SMALL.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))


def trained_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """A random one in which nothing that is added is 0: a gradient would be."""
    model, generator = random_model(config, dtype=dtype), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.1, generator=generator)
    return model


def loss_and_gradients(model: Transformer, device: str) -> dict[str, Tensor]:
    prepare_cuda()
    model.to(device)
    tokens = TOKENS.to(device)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).to(device)
    loss = model(tokens, positions, LENGTHS, targets=tokens.roll(-1), loss_scale=1 / len(tokens))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("method", ["full", "lora", "bias_norm", "adapter"])
def test_a_step_in_float32_is_that_of_the_cpu(method: str, window: int | None) -> None:
    config = replace(SMALL, sliding_window=window, tuning=METHODS[method]().with_num_layers(SMALL.n_layers))
    expected = loss_and_gradients(trained_model(config, torch.float64).double(), "cpu")
    actual = loss_and_gradients(trained_model(config), "cuda")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert difference(actual[name].cpu(), value) < 1e-4, name


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_over_nf4_is_that_over_its_values(shape: str) -> None:
    config = replace(SHAPES[shape], tuning=LORA)
    expected = loss_and_gradients(rounded(trained_model(config, torch.float64)).double(), "cpu")
    actual = loss_and_gradients(for_training(trained_model(config)), "cuda")
    for name, value in actual.items():
        assert difference(value.cpu(), expected[name]) < 1e-4, name


@pytest.mark.parametrize("first", [False, True])
def test_products_of_bf16_are_summed_in_float32(first: bool) -> None:
    total, *wide = (torch.randn(shape, device="cuda") for shape in ((40, 24), (70, 40), (70, 24)))
    a, b = (one.bfloat16() for one in wide)
    expected = a.double().T @ b.double() + (0 if first else total)
    torch.ops.llama_acc.add_wide_product_(total, a.t(), b, first)
    assert difference(total, expected) < 1e-5


@pytest.mark.parametrize("in_nf4", [False, True])
def test_decoding_is_that_of_the_cpu(in_nf4: bool) -> None:
    config = SHAPES["whole blocks"]
    exact, model = random_model(config, dtype=torch.float64), random_model(config)
    (expected,) = document_logits((rounded(exact) if in_nf4 else exact).double(), [TOKENS])
    prepare_cuda()
    with torch.device("cuda"):
        actual = cached_logits((quantized(model) if in_nf4 else model).to("cuda"), TOKENS.cuda(), (200, 1, 1, 1))
    assert difference(actual.cpu(), expected) < 1e-4


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (8, 2)])
def test_documents_in_one_kernel_attend_as_one_by_one(heads: int, shared: int, window: int | None) -> None:
    prepare_cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    wide = [torch.randn(sum(LENGTHS), n, 64, device="cuda", generator=generator) for n in (heads, shared, shared)]
    bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device="cuda")

    def results(dtype: torch.dtype, lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in wide)
        if dtype == torch.bfloat16:
            output = flash_attention(q, k, v, bounds, max(lengths), window).flatten(1)
        else:
            rotations = rotary_table(SMALL, 1, q.device)
            output = DocumentAttention(lengths, rotations)(q, k, v, rotates=False, window=window)
        output.float().square().sum().backward()
        return [x for x in (output, q.grad, k.grad, v.grad) if x is not None]

    for actual, expected in zip(results(torch.bfloat16), results(torch.float32), strict=True):
        assert difference(actual.float(), expected) < 0.03


@pytest.mark.parametrize("in_nf4", [False, True])
@pytest.mark.parametrize("method", ["full", "lora_bias_norm", "adapter"])
def test_the_captured_step_is_that_of_the_cpu(method: str, in_nf4: bool) -> None:
    shape = SHAPES["whole blocks"]
    config = replace(shape, tuning=METHODS[method]().with_num_layers(shape.n_layers))
    exact, model = trained_model(config, torch.float64), trained_model(config).requires_grad_(False)
    documents = [TOKENS[:60], TOKENS[60:120], TOKENS[120:180]]
    expected = document_logits((rounded(exact) if in_nf4 else exact).double(), documents)
    prepare_cuda()
    with torch.inference_mode():
        model = (quantized(model) if in_nf4 else model).to("cuda")
        pack_small(model)
        decode, caches = DecodeGraph(model), [KVCache(config.n_layers)]
        caches += [caches[0].beside(slot) for slot in (1, 2)]
        beginnings = torch.cat([document[:50] for document in documents]).cuda()
        model(beginnings, torch.arange(50, device="cuda").repeat(3), [50] * 3, caches=caches)
        for place in range(50, 60):
            tokens = torch.stack([document[place] for document in documents])
            # Every other time they are on the GPU already.
            before, given = (tokens.cuda(), [0, 1, 2]) if place % 2 else (None, tokens.tolist())
            logits, likeliest = decode(given, caches, (), before)
            assert torch.equal(likeliest, logits.argmax(-1))
            for row, document in zip(logits, expected, strict=True):
                assert difference(row.cpu(), document[place]) < 1e-4
    assert decode.captures
