"""What a step and a generated token ask of a GPU, counted without one.

The program's own step and decoding run on meta tensors and are told that these are CUDA's. How long it takes is left to
benchmarks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llama_acc.core.data.templates import get_template
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.generate.decode_graph import DecodeGraph, _Captured
from llama_acc.core.generate.engine import Engine, Prompt
from llama_acc.core.generate.load import LoadedModel, model_for_generation
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.memory.simulate import add_fake_images, empty_batch, feed, standing_for
from llama_acc.core.model import layers
from llama_acc.core.model.attention import KVCache, has_flash
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.nf4 import prepare
from llama_acc.core.model.transformer import describe, pack_small
from llama_acc.core.model.tuning import Full
from llama_acc.core.model.tuning.adapter import Adapter
from llama_acc.core.model.tuning.bias_norm import BiasNorm
from llama_acc.core.model.tuning.lora import LoRA, LoRABiasNorm
from llama_acc.core.tokenizer import load_tokenizer
from llama_acc.core.train.plan import StepSettings
from llama_acc.core.train.step import train_step
from llama_acc.core.train.trainer import assemble
from tests.core.seeing import SEEING
from tests.core.tiny import SMALL

META, _tensor = torch.device("meta"), torch.tensor
LLAMA_7B = ModelConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32000, multiple_of=256)
# What makes another view of a tensor, or room without values.
_NO_KERNEL = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "split", "split_with_sizes", "unbind"),
    *("alias", "detach", "as_strided", "unsqueeze", "squeeze", "permute", "view_as_real", "view_as_complex", "_conj"),
    *("empty", "empty_like", "new_empty", "empty_strided", "lift_fresh"),
}


class Work(TorchDispatchMode):
    """Counts what is asked of the device while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes = 0
        self.copies_from_host = 0
        self.waits: Counter[str] = Counter()
        self.of_two_devices: Counter[str] = Counter()

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Stands for a kernel of torch, which would be taken apart where there is no GPU."""
        self.kernels["_fused_rms_norm"] += 1
        self.bytes += 2 * x.nbytes
        return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)

    def tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for `torch.tensor`, of whose copy to a device no operation tells."""
        self.waits.update(["tensor"] if kwargs.get("device") == META else [])
        return _tensor(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if name in ("nonzero", "_local_scalar_dense") and args[0].is_meta:
            self.waits[name] += 1
            return 1.0 if name == "_local_scalar_dense" else args[0].new_empty((len(args[0]), 1), dtype=torch.int64)
        read = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        result = None if name == "_fused_adamw_" else func(*args, **kwargs)
        written = [value for value in tree_iter(result) if isinstance(value, Tensor)]
        if func.namespace == "llama_acc":  # what is changed and not given; `first`: it is not read
            named = list(zip(func._schema.arguments, args, strict=False))
            if not any(one.name == "first" and value for one, value in named):
                written += [value for one, value in named if one.alias_info is not None and one.alias_info.is_write]
        devices = {tensor.device.type for tensor in read}
        is_copy = name in ("_to_copy", "copy_")
        if is_copy and "cpu" in devices and any(tensor.is_meta for tensor in written):
            self.copies_from_host += 1
            if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                self.waits["copy"] += 1
        elif len(devices) > 1:
            self.of_two_devices[name] += 1
        if name not in _NO_KERNEL and any(tensor.is_meta for tensor in read + written):
            self.kernels[name] += 2 if name == "attend_slots" else 1
            self.bytes += sum(tensor.nbytes for tensor in read + written)
        return result


def _norm(gradients: Sequence[Tensor], **_: Any) -> Tensor:
    """What `get_total_norm` does on a GPU."""
    return torch.stack(torch._foreach_norm(list(gradients))).norm()


def step_work(
    config: ModelConfig, lengths: Sequence[int], *, nf4: bool = False, checkpointing: bool = False, batches: int = 1
) -> Work:
    """The work of an optimizer step of so many micro-batches of documents of these lengths."""
    adamw = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_grad_norm": 1.0}
    settings = StepSettings(torch.bfloat16, () if nf4 else None, False, checkpointing, 1, "ddp", False, adamw)
    with standing_for("cuda"), patch.object(nn.utils, "get_total_norm", _norm):
        model, data_parallel, optimizer = assemble(config, settings, Parallel(), "cuda", lambda model: None)
        optimizer.make_state()
        if nf4:
            prepare(META)
        with META:
            batch = add_fake_images(empty_batch(lengths), model)
        work = Work()
        with work, patch.object(layers, "fused_rms_norm", work.norm), patch.object(torch, "tensor", work.tensor):
            train_step(model, optimizer, data_parallel, [batch] * batches, 10, 1e-3, META, (0.0, 1.0))
    return work


def decoding_work(config: ModelConfig, past: int, sequences: int, nf4: bool) -> Work:
    """The work of one token more of each of some sequences after so many."""
    with standing_for("cuda"), torch.no_grad():
        model, first = (
            model_for_generation(config, torch.bfloat16, Parallel(), () if nf4 else None),
            KVCache(config.n_layers),
        )
        prepare(META)
        pack_small(model)
        caches = [first.beside(slot) for slot in range(sequences)]
        feed(model, caches, range(past), META)
        decode = DecodeGraph(model) if DecodeGraph.takes(model) else None
        with Work() as work, patch.object(layers, "fused_rms_norm", work.norm):
            if decode is None:
                feed(model, caches, range(past, past + 1), META)
            else:
                decode([5] * sequences, caches)
    return work


METHODS = {
    "full": Full(),
    "bias_norm": BiasNorm(),
    "lora": LoRA(16),
    "lora_bias_norm": LoRABiasNorm(16),
    "adapter": Adapter(4, prefix_layers=1, prefix_len=5, prefix_new_gate=True),
}
STEPS = {
    **{name: (replace(SMALL, tuning=tuning), False) for name, tuning in METHODS.items()},
    "nf4_lora": (replace(SMALL, tuning=LoRA(16)), True),
    "nf4_adapter": (replace(SMALL, tuning=METHODS["adapter"]), True),
    **{f"vision_{name}": (config, False) for name, config in SEEING.items()},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_nothing_and_is_all_on_one_device(name: str, checkpointing: bool) -> None:
    config, nf4 = STEPS[name]
    work = step_work(config, (30, 12, 21), nf4=nf4, checkpointing=checkpointing, batches=2)
    assert (work.waits, work.of_two_devices) == ({}, {})
    # One for each micro-batch, and what is summed over the ranks.
    assert work.copies_from_host == 3


# Micro-batches of 4,096 tokens without recomputation: kernels, and bytes for a token, of a block and of a 7B's step.
MOST = {
    ("full", 1): ((39, 2.8e6), (1330, 91.5e6)),
    ("full", 2): ((80, 2.25e6), (2670, 73.5e6)),
    ("lora", 1): ((77, 1.7e6), (2530, 54.5e6)),
    ("nf4_lora", 1): ((91, 1.95e6), (2980, 62.5e6)),
}


@pytest.mark.parametrize(("name", "batches"), MOST)
def test_so_many_kernels_and_bytes_are_taken_however_many_documents_there_are(name: str, batches: int) -> None:
    tuning, nf4 = (Full() if name == "full" else LoRA(16)), name == "nf4_lora"
    # Two models that differ in a block, neither the first nor the last one, say what one takes.
    configs = [replace(LLAMA_7B, n_layers=depth, tuning=tuning) for depth in (2, 3)]
    found = []
    for lengths in ((4096,), (204,) * 20 + (16,)):
        one, two = (step_work(config, lengths, nf4=nf4, batches=batches) for config in configs)
        block, moved, more = two.kernels - one.kernels, two.bytes - one.bytes, LLAMA_7B.n_layers - 2
        step = one.kernels.total() + more * block.total(), (one.bytes + more * moved) / 4096 / batches
        found.append((block, moved / 4096 / batches, *step))
    (block, *alone), (of_many, *with_many) = found
    assert block == of_many
    assert with_many == pytest.approx(alone, rel=0.01)
    (most_block, *most), most_in_step = MOST[name, batches]
    assert block.total() <= most_block, block
    assert all(value <= bound for value, bound in zip(with_many, (*most, *most_in_step), strict=True)), with_many


def test_an_embedding_of_which_rows_are_picked_has_no_copy() -> None:
    adamw = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_grad_norm": 1.0}
    settings = StepSettings(torch.bfloat16, None, False, False, 1, "ddp", False, adamw)
    left_out = []
    for config in (SMALL, replace(SMALL, tie_word_embeddings=True)):
        with standing_for("cuda"):
            copies = assemble(config, settings, Parallel(), "cuda", lambda model: None).optimizer.copies
        assert copies is not None
        left_out.append(describe(config).keys() - copies.tensors.keys())
    assert left_out == [{"tok_embeddings.weight"}, set()]


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_flash_attention_is_for_ampere_and_later(
    capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has_flash.cache_clear()
    assert has_flash(torch.device("cuda")) is has
    has_flash.cache_clear()


@pytest.mark.parametrize("sequences", [1, 32, 64])
@pytest.mark.parametrize("nf4", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("name", METHODS)
def test_a_generated_token_takes_ten_kernels_a_block(name: str, nf4: bool, sequences: int) -> None:
    tuning = METHODS[name]
    with_prefix = {"prefix_layers": 0} if isinstance(tuning, Adapter) else {}
    one, two = (
        decoding_work(
            replace(LLAMA_7B, n_layers=depth, tuning=replace(tuning, **with_prefix).with_num_layers(depth)),
            600, sequences, nf4,
        )
        for depth in (1, 2)
    )  # fmt: skip
    kernels = two.kernels - one.kernels
    assert (one.waits, one.of_two_devices, one.copies_from_host) == ({}, {}, 1)
    assert kernels.total() <= 10, kernels


@pytest.mark.parametrize("nf4", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("name", METHODS)
def test_a_token_is_one_copy_and_one_launch_of_what_was_captured(name: str, nf4: bool) -> None:
    launches: list[int] = []
    logits, chosen = torch.empty(2, 8, device=META), torch.empty(2, dtype=torch.int64, device=META)
    captured = _Captured(SimpleNamespace(replay=lambda: launches.append(1)), logits, chosen)
    with standing_for("cuda"), torch.no_grad(), patch.object(DecodeGraph, "_capture", lambda *_: captured):
        config = replace(LLAMA_7B, n_layers=1, tuning=METHODS[name].with_num_layers(1))
        model = model_for_generation(config, torch.bfloat16, Parallel(), () if nf4 else None)
        prepare(META)
        pack_small(model)
        caches = [KVCache(1)]
        caches.append(caches[0].beside(1))
        feed(model, caches, range(9), META)
        assert DecodeGraph.takes(model)
        decode = DecodeGraph(model)
        decode.captures = True
        with Work() as work:
            for _ in range(3):
                decode([5, 7], caches)
    assert (len(launches), work.kernels, work.waits, work.copies_from_host) == (3, {"copy_": 3}, {}, 3)


@pytest.mark.parametrize("kind", SEEING)
def test_a_token_after_images_waits_for_nothing_and_is_all_on_one_device(kind: str) -> None:
    work = decoding_work(SEEING[kind], 20, 3, False)
    assert (work.waits, work.of_two_devices) == ({}, {})


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_next_tokens_are_begun_before_the_last_ones_are_read(temperature: float, tokenizer_path: Path) -> None:
    """Between two steps, the host waits for nothing but the tokens of the step before, which come through an event."""
    order: list[str] = []

    def arriving(tokens: Tensor) -> Any:
        order.append("begun")
        return SimpleNamespace(read=lambda: order.append("read") or [5] * len(tokens))

    with standing_for("cuda"), patch("llama_acc.core.generate.engine.Arriving", arriving):
        model = model_for_generation(SMALL, torch.bfloat16, Parallel(), None).requires_grad_(False)
        loaded = LoadedModel(model, load_tokenizer(tokenizer_path), get_template("none"), "no values", META)
        engine, sampling = Engine(loaded, 2), Sampling(temperature, max_new_tokens=6)
        with patch.object(Sampler, "__call__", lambda *_: 5):  # the first ones are drawn on the host
            replies = [engine.add(Prompt([1, 40 + number]), Sampler(sampling)) for number in range(2)]
            engine.step()
        order.clear()
        with Work() as work:
            while not all(reply.ended for reply in replies):
                engine.step()
    # The first is begun by the step of the prompts, if that needs no random numbers.
    assert order == [*["begun"] * bool(temperature), *["begun", "read"] * 4, "read"]
    assert (work.waits, work.of_two_devices, work.copies_from_host) == ({}, {}, order.count("begun"))
    assert [reply.tokens for reply in replies] == [[5] * 6] * 2
