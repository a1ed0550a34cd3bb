"""What the tests of generation share: greedy decoding by the engine, and by full passes without a cache."""

from collections.abc import Sequence

import torch

from llama_acc.core.generate.engine import Engine, Prompt, Reply
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.model.transformer import Transformer
from tests.core.tiny import document_logits

GREEDY = Sampling(temperature=0, max_new_tokens=24)


def decode(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling = GREEDY, batch_size: int = 1) -> list[Reply]:
    """The replies, in the order they ended."""
    return [reply for reply, _ in engine.generate(prompts, Sampler(sampling), batch_size) if reply.ended]


def greedy(engine: Engine, tokens: Sequence[int], sampling: Sampling = GREEDY) -> list[int]:
    """The tokens that follow a prompt."""
    return decode(engine, [Prompt(tokens)], sampling)[0].tokens


def uncached_greedy(model: Transformer, prompt: Sequence[int], count: int, ends: frozenset[int]) -> list[int]:
    """The likeliest token of a full forward pass, again and again."""
    tokens: list[int] = []
    while len(tokens) < count:
        token = int(document_logits(model, [torch.tensor([*prompt, *tokens])])[0][-1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens
