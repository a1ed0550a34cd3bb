"""Quantising a checkpoint block by block, with text going through what is quantised already.

Memory beside the quantised matrices is one block in float32, and for every token of the text two vectors of the width
of the feed-forward layer at most.
"""

from collections.abc import Container, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_acc.core.checkpoint.blocks import load_block
from llama_acc.core.checkpoint.computed import read_block
from llama_acc.core.checkpoint.parts import Part
from llama_acc.core.checkpoint.quantised import Packed
from llama_acc.core.checkpoint.quantiser import Quantiser
from llama_acc.core.model import nf4
from llama_acc.core.model.attention import DocumentAttention
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.gptq import calibrated
from llama_acc.core.model.nf4 import Scales
from llama_acc.core.model.norm import RMSNorm
from llama_acc.core.model.rotary import rotary_table
from llama_acc.core.model.transformer import TransformerBlock

_TOKENS = 4096  # that go through a block at a time


class CalibratedQuantiser(Quantiser):
    """Matrices of a checkpoint in NF4, rounded so that what they compute from a text comes out right.

    They are made in the model's order, up to the one that is asked for, and kept. Each is made for the inputs that it
    gets from the matrices before it as these are after quantising.
    """

    def __init__(
        self,
        config: ModelConfig,
        sources: Mapping[str, Part],
        documents: Sequence[Sequence[int]],
        names: Container[str],
        device: torch.device,
    ) -> None:
        """Args:
        config: the model's shape, without a tuning method.
        sources: its parameters.
        documents: tokens of the text, each document by itself.
        names: which matrices are quantised; the others go on as they are.
        device: where it is computed.
        """
        super().__init__()
        self._config, self._sources, self._names, self._device = config, sources, names, device
        self._made: dict[str, Packed] = {}
        self._steps = self._run(documents)

    def packed(self, name: str, part: Part) -> Packed:
        """See `Quantiser`."""
        while name not in self._made:
            next(self._steps)
        return self._made[name]

    def _run(self, documents: Sequence[Sequence[int]]) -> Iterator[None]:
        """Quantises block after block, then the output matrix."""
        batches = _batches(documents)
        attends = [self._attend(batch) for batch in batches]
        states = [self._embedded(batch) for batch in batches]
        for layer in range(self._config.n_layers):
            with torch.no_grad():
                self._layer(layer, states, attends)
            yield
        if "output.weight" in self._names:
            with torch.no_grad():
                self._output(states)
            yield

    def _attend(self, batch: Sequence[Sequence[int]]) -> DocumentAttention:
        config, lengths = self._config, [len(document) for document in batch]
        table = rotary_table(config.head_dim, max(lengths), config.rope_theta, config.rope_scaling, self._device)
        return DocumentAttention(lengths, torch.cat([table[:length] for length in lengths]))

    def _embedded(self, batch: Sequence[Sequence[int]]) -> Tensor:
        embedding = self._sources["tok_embeddings.weight"]
        rows = [read_block(embedding, token, token + 1, torch.float32) for document in batch for token in document]
        return torch.cat(rows).to(self._device)

    def _layer(self, layer: int, states: list[Tensor], attends: list[DocumentAttention]) -> None:
        """Quantises a block's matrices, and takes the states [T, dim] through it."""
        block = load_block(self._config, self._sources, layer).to(self._device)
        attention, feed_forward = block.attention, block.feed_forward
        inputs = [block.attention_norm(x) for x in states]
        self._quantise(layer, block, inputs, "attention.wq", "attention.wk", "attention.wv")
        inputs = [
            attend(attention.wq(x), attention.wk(x), attention.wv(x)) for attend, x in zip(attends, inputs, strict=True)
        ]
        self._quantise(layer, block, inputs, "attention.wo")
        for state, x in zip(states, inputs, strict=True):
            state += attention.wo(x)
        inputs = [block.ffn_norm(x) for x in states]
        self._quantise(layer, block, inputs, "feed_forward.w1", "feed_forward.w3")
        inputs = [F.silu(feed_forward.w1(x)).mul_(feed_forward.w3(x)) for x in inputs]
        self._quantise(layer, block, inputs, "feed_forward.w2")
        for state, x in zip(states, inputs, strict=True):
            state += feed_forward.w2(x)

    def _quantise(self, layer: int, block: TransformerBlock, inputs: Sequence[Tensor], *names: str) -> None:
        """Quantises matrices of a block that are given the same inputs; the block goes on with what they are then."""
        wanted = [name for name in names if f"layers.{layer}.{name}.weight" in self._names]
        if not wanted:
            return
        gram = _gram(inputs)
        for name in wanted:
            weight = block.get_parameter(f"{name}.weight")
            packed, scales = calibrated(weight, gram)
            weight.copy_(nf4.dequantise(packed, scales, torch.float32))
            self._keep(f"layers.{layer}.{name}.weight", packed, scales)

    def _output(self, states: Sequence[Tensor]) -> None:
        norm = RMSNorm(self._config.dim, self._config.norm_eps)
        self._sources["norm.weight"].copy_into(norm.weight)
        norm.to(self._device)
        weight = self._sources["output.weight"].to(torch.float32, self._device)
        self._keep("output.weight", *calibrated(weight, _gram([norm(x) for x in states])))

    def _keep(self, name: str, packed: Tensor, scales: Scales) -> None:
        self._made[name] = Packed(packed.cpu(), Scales(*(scale.cpu() for scale in scales)))


def _batches(documents: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Documents in their order, together up to a number of tokens."""
    batches: list[list[Sequence[int]]] = [[]]
    for document in documents:
        if batches[-1] and sum(map(len, batches[-1])) + len(document) > _TOKENS:
            batches.append([])
        batches[-1].append(document)
    return batches


def _gram(inputs: Sequence[Tensor]) -> Tensor:
    """The sum of x x^T over all rows of the inputs, [in, in]."""
    width = inputs[0].shape[1]
    gram = torch.zeros(width, width, device=inputs[0].device)
    for x in inputs:
        gram.addmm_(x.t(), x)
    return gram
