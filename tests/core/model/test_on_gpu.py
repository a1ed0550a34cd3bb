"""A GPU's ways against the CPU's, in the same process; skipped where there is no CUDA device."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from llama_acc.core.device import prepare_cuda
from llama_acc.core.model.attention import DocumentAttention, flash_attention
from llama_acc.core.model.rotary import rotary_table
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.model.tuning import METHODS
from tests.core.tiny import SMALL, difference, random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LENGTHS = (70, 3, 129, 1)


def loss_and_gradients(model: Transformer, device: str) -> dict[str, Tensor]:
    prepare_cuda()
    model.to(device)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(SMALL.vocab_size, (sum(LENGTHS),), generator=generator).to(device)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).to(device)
    loss = model(tokens, positions, LENGTHS, targets=tokens.roll(-1), loss_scale=1 / len(tokens))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("method", ["full", "lora", "bias_norm", "adapter"])
def test_float32_is_that_of_the_cpu(method: str, window: int | None) -> None:
    config = replace(SMALL, sliding_window=window, tuning=METHODS[method]().with_num_layers(SMALL.n_layers))
    expected, actual = (loss_and_gradients(random_model(config), device) for device in ("cpu", "cuda"))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert difference(actual[name].cpu(), value) < 1e-4, name


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
