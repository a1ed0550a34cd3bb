"""What the program does on a GPU, with a CPU's tensors: only torch's kernels that a CPU does not have are left out.

The kernels of our own run in Triton's interpreter where it is installed, else what is done without them.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llama_acc.core.data.templates import get_template
from llama_acc.core.device import simulating
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.generate.decode_graph import DecodeGraph
from llama_acc.core.generate.engine import Engine, Prompt
from llama_acc.core.generate.load import LoadedModel, model_for_generation
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.memory.simulate import standing_for
from llama_acc.core.model import kernels, layers, nf4
from llama_acc.core.model.attention import KVCache, attend_heads
from llama_acc.core.model.config import RopeScaling
from llama_acc.core.model.loss import _softmax_minus_one_hot_
from llama_acc.core.model.transformer import Transformer, pack_small
from llama_acc.core.model.tuning import METHODS
from llama_acc.core.tokenizer import load_tokenizer
from tests.core.model.test_nf4 import quantized
from tests.core.model.test_tuning import tuned_model
from tests.core.seeing import SEEING
from tests.core.tiny import CPU, SMALL, difference, random_model

LENGTHS = (20, 1, 9)


@pytest.fixture(params=[False, True], ids=["torch", "triton"])
def has_triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Without kernels of our own, and with them."""
    if request.param:
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("kernels are compiled here")
    monkeypatch.setattr(kernels, "has_triton", lambda: request.param)
    return request.param


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Lets the program take a GPU's ways."""

    def as_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            with simulating("cpu"):
                return function(*args)

        return called

    norms: dict[str, Any] = {name: as_on_cpu(getattr(layers, name)) for name in ("_rms_norm", "_rms_norm_backward")}
    with simulating("cuda"), patch.multiple(layers, **norms):
        yield


def loss_and_gradients(model: Transformer) -> dict[str, Tensor]:
    tokens = torch.arange(sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    draws = [3] * len(LENGTHS)
    bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    loss = model(tokens, positions, LENGTHS, targets=tokens.roll(-1), draws=draws, bounds=bounds)
    loss.backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("method", ["full", "lora", "dropping", "adapter"])
def test_loss_and_gradients_are_those_of_the_cpu_s_ways(method: str, has_triton: bool) -> None:
    dropout = {"lora_dropout": 0.3} if method == "dropping" else {}
    tuning = METHODS["lora" if dropout else method](**dropout).with_num_layers(SMALL.n_layers)
    expected = loss_and_gradients(tuned_model(tuning))
    with as_on_gpu():
        actual = loss_and_gradients(tuned_model(tuning))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert difference(actual[name], value) < 1e-4, name


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_weight_gradients_of_bf16_are_summed_in_float32_over_micro_batches(is_recomputed: bool) -> None:
    block: Any = random_model().layers[0]
    generator = torch.Generator().manual_seed(5)
    inputs, d_outputs = torch.randn(2, 2, 20, SMALL.dim, generator=generator).bfloat16()

    def gradients(compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
        block.zero_grad()
        for x, d_y in zip(inputs, d_outputs, strict=True):
            x = x.clone().requires_grad_()
            (checkpoint(compute, x, use_reentrant=False) if is_recomputed else compute(x)).backward(d_y)
        return [one.grad for one in block.parameters() if one.grad is not None]

    feed_forward = partial(block.feed_forward, norm=block.ffn_norm)
    expected = gradients(feed_forward)
    with as_on_gpu():
        actual, [of_wo] = gradients(feed_forward), gradients(block.attention.wo)
    assert len(actual) == len(expected) == 4
    assert max(map(difference, actual, expected)) < 2e-2
    assert difference(of_wo, (d_outputs.double().mT @ inputs.double()).sum(0)) < 1e-6


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_cross_entropy_and_its_gradient_are_those_of_the_definition(
    dtype: torch.dtype, unit: float, is_weighted: bool, has_triton: bool
) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = (30 * torch.randn(5, 4099, generator=generator)).to(dtype)
    targets, weights = torch.tensor([0, 4098, 4095, 7, 4096]), torch.rand(5, 1, generator=generator)
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    expected = (losses * weights[:, 0] if is_weighted else losses).sum()
    expected.backward()
    with as_on_gpu():
        actual = _softmax_minus_one_hot_(logits, targets, Parallel(), weights if is_weighted else None)
    assert difference(actual, expected.detach()) < 1e-6
    assert difference(logits, exact.grad) < unit


@pytest.mark.parametrize("shape", [(8, 64), (3, 128), (70, 4), (1, 2), (300, 352)])
def test_a_matrix_out_of_nf4_is_bitsandbytes_s(shape: tuple[int, int], has_triton: bool) -> None:
    """Bit by bit; but the interpreter cuts to bf16 what a GPU rounds."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, scales = nf4.quantize(lambda start, rows: rows.copy_(matrix[start:][: len(rows)]), shape, CPU)
    for dtype, unit in ((torch.float32, 0.0), (torch.float16, 0.0), (torch.bfloat16, 2**-7)):
        expected = nf4.dequantize(packed, scales, dtype)
        with as_on_gpu():
            actual = nf4.dequantize(packed, scales, dtype)
        torch.testing.assert_close(actual, expected, rtol=unit, atol=0.0)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("tokens", "columns", "sizes"), [(1, 64, (40,)), (5, 192, (64, 32, 64)), (50, 64, (32, 64))])
def test_a_product_out_of_nf4_is_that_of_the_matrices_and_their_pairs(
    tokens: int, columns: int, sizes: tuple[int, ...], add: bool, has_triton: bool
) -> None:
    if not has_triton:
        pytest.skip("it is a kernel of our own")
    generator, rows = torch.Generator().manual_seed(3), sum(sizes)
    shapes = (tokens, columns), (tokens, rows), (rows, columns), (3 * len(sizes), columns), (rows, 3), (rows,)
    x, y, matrix, a, b, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    packed, scales = nf4.quantize(lambda start, rows: rows.copy_(matrix[start:][: len(rows)]), (rows, columns), CPU)
    for pairs in (None, (a, b, 0.5)):
        product = x @ nf4.dequantize(packed, scales, torch.float32).T
        if pairs:
            low = zip(a.split(3), b.split(sizes), strict=True)
            product += torch.cat([0.5 * x @ one.T @ two.T for one, two in low], 1)
        expected = y + 0.1 * product if add else product
        with as_on_gpu(), torch.no_grad():
            actual = nf4.add_product_(y.clone(), x, packed, scales, pairs, 0.1 if add else 1.0, not add, sizes)
            biased = nf4.add_product_(y.clone(), x, packed, scales, pairs, 2.0, True, sizes, bias)
        assert difference(actual, expected) < 1e-6
        assert difference(biased, 2 * (product + bias)) < 1e-6


@pytest.mark.parametrize(
    ("variant", "in_nf4"),
    [
        *[({}, False), ({"sliding_window": 7}, False), ({"nope_layers": (0,)}, False), ({"qkv_bias": True}, False)],
        ({}, True),
        *[({"tuning": METHODS["lora"](4)}, in_nf4) for in_nf4 in (False, True)],
        *[({"tuning": METHODS["lora_bias_norm"](4)}, in_nf4) for in_nf4 in (False, True)],
        ({"tuning": METHODS["lora"](4, lora_targets=("wq", "w2"))}, True),
        *[({"tuning": METHODS["adapter"](4, 1, 5, True)}, in_nf4) for in_nf4 in (False, True)],
    ],
)
def test_tokens_of_several_sequences_are_those_of_the_cpu_s_ways(
    variant: dict[str, Any], in_nf4: bool, has_triton: bool
) -> None:
    wide = {"dim": 128, "multiple_of": 64, "n_layers": 1, "vocab_size": 70} if in_nf4 else {}
    config = replace(SMALL, **variant, **wide)
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(config.vocab_size, (length,), generator=generator) for length in (12, 9, 30)]

    def logits() -> list[Tensor]:
        model = tuned_model(config.tuning, config).requires_grad_(False)
        model = quantized(model) if in_nf4 else model
        pack_small(model)
        caches = [KVCache(config.n_layers)]
        caches += [caches[0].beside(slot) for slot in (3, 1)]  # slots need not be in order, or all be used
        found = []
        for begin, end in ((0, 5), (5, 6), (6, 8), (8, 9)):
            tokens = torch.cat([document[begin:end] for document in documents])
            positions = torch.arange(begin, end).repeat(3)
            if begin == 8 and DecodeGraph.takes(model):
                found.append(DecodeGraph(model)(tokens.tolist(), caches)[0])
            else:
                found.append(model.logits(model(tokens, positions, [end - begin] * 3, caches=caches)))
            taken.add(DecodeGraph.takes(model))
        return found

    taken = set[bool]()
    with torch.no_grad():
        expected = logits()
        with as_on_gpu():
            actual = logits()
    assert taken == {False, has_triton}
    for ours, theirs in zip(actual, expected, strict=True):
        assert difference(ours, theirs) < 1e-5


# Not bf16, whose bits the interpreter multiplies as integers.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_of_long_pasts_in_parts_is_torch_s(dtype: torch.dtype, has_triton: bool) -> None:
    if not has_triton:
        pytest.skip("it is a kernel of our own")
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 6, 20), *[(4, 2, 300, 20)] * 2)
    )
    slots, positions = torch.tensor([[2, 0, 3], [299, 0, 130]])
    for window in (0, 50):
        found = torch.ops.llama_acc.attend_slots(q, keys, values, slots, positions, window, [])
        for queries, slot, position, output in zip(q, slots, positions + 1, found, strict=True):
            seen = slice(max(0, position - window) if window else 0, position)
            expected = attend_heads(queries[None].float(), keys[slot, :, seen].float(), values[slot, :, seen].float())
            assert difference(output[None].float(), expected) < (1e-5 if dtype == torch.float32 else 3e-3)


def test_replies_drawn_on_a_gpu_are_those_drawn_on_the_cpu(has_triton: bool, tokenizer_path: Path) -> None:
    if not has_triton:
        pytest.skip("it is for kernels of our own")
    tokenizer = load_tokenizer(tokenizer_path)
    config = replace(SMALL, vocab_size=tokenizer.vocab_size, n_layers=1, sliding_window=7)
    samplings = [Sampling(temperature=0), Sampling(1.3, 0.8, 5), Sampling(1.0, 1.0, 6), Sampling(1.0, 0.9, 7, top_k=9)]
    # What depends on the tokens before is still drawn on the host.
    samplings = [*samplings, Sampling(1.0, 0.9, 8, repetition_penalty=1.3)]
    answers = []
    for on_gpu in (False, True):
        with as_on_gpu() if on_gpu else nullcontext():
            loaded = LoadedModel(
                random_model(config).requires_grad_(False), tokenizer, get_template("none"), "none", CPU
            )
            for several in (samplings[:4], samplings[3:]):
                engine = Engine(loaded, 4)
                # The first ones have done, and their slots are left out.
                limits = [replace(one, max_new_tokens=6 + place) for place, one in enumerate(several)]
                replies = [engine.add(Prompt([1, 5, 9]), Sampler(one)) for one in limits]
                while not all(reply.ended for reply in replies):
                    engine.step()
                answers.append([reply.tokens for reply in replies])
    assert answers[:2] == answers[2:]
    assert len({*map(tuple, answers[0])}) == 4


def test_a_step_that_cannot_be_captured_says_so_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(DecodeGraph, "_capture", fails)
    monkeypatch.setattr(DecodeGraph, "step", lambda self, inputs, cache: (inputs[0, :, None], inputs[0]))
    model = random_model().requires_grad_(False)
    decode, caches = DecodeGraph(model), [KVCache(SMALL.n_layers)]
    model(torch.arange(3), torch.arange(3), [3], caches=caches)
    decode.captures = True
    assert [decode([token], caches)[1].item() for token in (5, 7)] == [5, 7]
    assert [record.getMessage() for record in caplog.records] == [
        "tokens come slower than they might: no CUDA graph (operation not permitted when stream is capturing)"
    ]


@pytest.mark.parametrize(
    ("variant", "is_packed", "is_taken"),
    [
        ({}, False, True),
        ({"tuning": METHODS["adapter"]().with_num_layers(2)}, False, False),
        ({"tuning": METHODS["adapter"]().with_num_layers(2)}, True, True),
        ({"tuning": METHODS["adapter"](prefix_len=300).with_num_layers(2)}, True, False),
        ({"tuning": METHODS["lora"](4, lora_dropout=0.1)}, True, True),
        (vars(SEEING["qformer"]), True, True),
        (vars(SEEING["clip"]), True, False),  # an image adds to the prefixes of its document
        ({"rope_scaling": RopeScaling("dynamic", 2.0)}, True, False),
    ],
)
def test_a_step_is_captured_only_if_it_depends_on_tokens_and_places_alone(
    variant: dict[str, Any], is_packed: bool, is_taken: bool
) -> None:
    with standing_for("cuda"):
        model = model_for_generation(replace(SMALL, **variant), torch.bfloat16, Parallel(), None)
        if is_packed:
            pack_small(model)
        assert DecodeGraph.takes(model) == is_taken


def test_every_kernel_compiles_for_a_gpu() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.core.model.compile_kernels"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9
