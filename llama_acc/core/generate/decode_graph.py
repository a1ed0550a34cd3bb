"""One token more of some sequences as a step whose shapes and addresses stay, which a GPU repeats as a CUDA graph.

A block's ten kernels take the host longer to launch than a GPU to run; a graph is one launch. What changes from token
to token is in one tensor, which is copied to the GPU before; tokens are chosen there, and may be fed to the next step
before the host knows them. **It has not run on a GPU yet**; a CPU takes the same step uncaptured in tests.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_acc.core.generate.sampling import draw
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.config import RopeScaling
from llama_acc.core.model.kernels import use_kernels
from llama_acc.core.model.transformer import Transformer


class _Captured(NamedTuple):
    graph: Any
    logits: Tensor
    chosen: Tensor


class DecodeGraph:
    """The step of a model, captured for each number of sequences, which is rounded up to a power of two.

    Attributes:
        captures: whether it does: on a GPU, unless capturing has failed.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._inputs: dict[torch.Size, Tensor] = {}
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self.captures = model.norm.weight.is_cuda

    @staticmethod
    def takes(model: Transformer) -> bool:
        """Whether it takes the model's step: kernels do it."""
        return DecodeGraph.takes_step_of(model) and use_kernels(model.norm.weight)

    @staticmethod
    def takes_step_of(model: Transformer) -> bool:
        """Whether nothing in the model's step depends on more than tokens, positions and slots."""
        scaling = model.config.rope_scaling
        is_dynamic = isinstance(scaling, RopeScaling) and scaling.rope_type == "dynamic"
        is_alone = type(model) is Transformer and model.parallel.world_size == 1
        if not is_alone or is_dynamic or model.before_blocks is not None:
            return False
        extra, blocks = model.attention_extra, enumerate[Any](model.layers)
        return extra is None or all(block.attention.prefix or extra(i, None) is None for i, block in blocks)

    def __call__(
        self,
        tokens: Sequence[int],
        caches: Sequence[KVCache],
        numbers: Sequence[Sequence[float]] = (),
        chosen_before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, V] of what follows a token of each sequence, and the tokens that are chosen [B]: by `draw` with
        `numbers`, or the likeliest. Valid until the next call. With `chosen_before`, `tokens` are places in it."""
        count, device = len(tokens), self.model.norm.weight.device
        rows = 1 << (count - 1).bit_length()
        # What is too much does the last row's work again: it writes the same to the same place.
        places = [*range(count), *[count - 1] * (rows - count)]
        padded = torch.tensor([(tokens[i], caches[i].length, caches[i].slot) for i in places]).T.contiguous()
        if numbers:
            drawn = torch.tensor([numbers[i] for i in places], dtype=torch.float64).T.contiguous()
            padded = torch.cat([padded, drawn.view(torch.int64)])  # all in one copy
        padded = padded.pin_memory() if device.type == "cuda" else padded
        if padded.shape not in self._inputs:
            self._inputs[padded.shape] = torch.empty(padded.shape, dtype=padded.dtype, device=device)
        inputs = self._inputs[padded.shape].copy_(padded, non_blocking=True)
        if chosen_before is not None:
            inputs[0] = chosen_before[inputs[0]]
        logits, chosen = self._run(inputs, caches[0], self.model.make_room(caches))
        for cache in caches:
            cache.length += 1
        return logits[:count], chosen[:count]

    def step(self, inputs: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Logits [rows, V] and the tokens chosen [rows], for tokens, positions and slots of `cache`, [3, rows]; what
        `draw` is told may be below them."""
        tokens, positions, slots = inputs[:3]
        logits = self.model.decode(tokens, positions, slots, cache)
        return logits, draw(logits, inputs[3:].view(torch.float64)) if len(inputs) > 3 else logits.argmax(-1)

    def _run(self, inputs: Tensor, cache: KVCache, addresses: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if not self.captures:
            return self.step(inputs, cache)
        key = (inputs.shape, addresses)
        if key not in self._captured:
            # A cache that has grown is somewhere else.
            self._captured = {known: one for known, one in self._captured.items() if known[1] == addresses}
            try:
                self._captured[key] = self._capture(inputs, cache)
            except RuntimeError as error:  # something that the model does cannot be captured here
                self.captures = False
                logging.getLogger("llama_acc").warning("tokens come slower than they might: no CUDA graph (%s)", error)
                return self.step(inputs, cache)
        captured = self._captured[key]
        captured.graph.replay()
        return captured.logits, captured.chosen

    def _capture(self, inputs: Tensor, cache: KVCache) -> _Captured:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # kernels are compiled, and libraries make what they keep, before the capture
            self.step(inputs, cache)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of CUDA, such as pinned memory for the next micro-batch, does not disturb it.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits, chosen = self.step(inputs, cache)
        return _Captured(graph, logits, chosen)
