"""Answers to many questions: several sequences decoded greedily together, each over its own keys and values.

One forward pass gives all of them their next token, so the weights are read once for the whole batch. There is no
padding: a pass holds one token of every answer under way, and the whole prompt of one that is new. Where an answer
ends, the next question takes its place.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_acc.core.data.templates import Turn
from llama_acc.core.errors import UserError
from llama_acc.core.generation import Pixels, checked_text, truncate_at_stop_strings, with_images
from llama_acc.core.inference import LoadedModel
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.vision import Images
from llama_acc.core.tokenizer import StreamDecoder


class Answer(NamedTuple):
    """The answer to `prompts[place]`.

    Attributes:
        place: which prompt it is to.
        text: what a conversation would show of it.
        tokens: what was generated, without the token that ends an answer.
    """

    place: int
    text: str
    tokens: list[int]


def encode_question(loaded: LoadedModel, question: str, images: int = 0) -> list[int]:
    """A single question in the model's prompt format, in tokens, about so many images.

    Raises:
        UserError: it leaves no room for an answer in the model's context, or is not text; images a model does not
            take.
    """
    ids = loaded.template.prompt_ids(loaded.tokenizer, [Turn("human", checked_text(question))])
    # Without BOS and text there is nothing to go on from.
    ids = with_images(loaded, ids or [loaded.tokenizer.bos_id], images)
    context = loaded.model.config.max_seq_len
    if len(ids) >= context:
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context is {context}", "shorten it")
    return ids


def generate_batch(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    images: Iterable[Pixels] | None = None,
) -> Iterator[Answer]:
    """Greedy answers, each as soon as it has ended.

    They are those of one prompt at a time, up to the rounding of a product of more rows. An answer ends where
    `generation.Generator` and the template's stop strings end it.

    Args:
        loaded: the model, on one process.
        prompts: in tokens, each shorter than the model's context.
        max_new_tokens: most tokens of an answer.
        batch_size: most answers under way at a time.
        images: of each prompt; they are asked for when its turn comes. None = there are none.
    """
    seen = itertools.repeat((), len(prompts)) if images is None else images
    waiting = (
        _Sequence(loaded, place, prompt, max_new_tokens, pixels)
        for place, (prompt, pixels) in enumerate(zip(prompts, seen, strict=True))
    )
    running: list[_Sequence] = []
    while running := running + list(itertools.islice(waiting, batch_size - len(running))):
        for sequence, token in zip(running, _next_tokens(loaded, running), strict=True):
            sequence.push(token)
        yield from (sequence.answer() for sequence in running if sequence.ended)
        running = [sequence for sequence in running if not sequence.ended]


@torch.inference_mode()
def _next_tokens(loaded: LoadedModel, running: Sequence["_Sequence"]) -> list[int]:
    """The likeliest next token of each sequence, which is advanced by what it has to feed."""
    lengths = [len(sequence.feed) for sequence in running]
    caches = [sequence.cache for sequence in running]
    positions = [torch.arange(c.length, c.length + n) for c, n in zip(caches, lengths, strict=True)]
    tokens = torch.tensor([token for sequence in running for token in sequence.feed])
    hidden = loaded.model(
        tokens.clamp(min=0).to(loaded.device),
        torch.cat(positions).to(loaded.device),
        lengths,
        caches=caches,
        images=_images(loaded, running, tokens),
    )
    last = torch.tensor(lengths).cumsum(0) - 1
    chosen: list[int] = loaded.model.logits(hidden[last.to(loaded.device)]).argmax(-1).tolist()
    return chosen


def _images(loaded: LoadedModel, running: Sequence["_Sequence"], tokens: Tensor) -> Images | None:
    """The images among what is fed, all of them through the tower at once."""
    owners = [number for number, sequence in enumerate(running) for _ in sequence.images]
    if not owners:
        return None
    assert loaded.vision_encoder is not None
    pixels = np.stack([pixels for sequence in running for pixels in sequence.images])
    inputs = loaded.vision_encoder.encode(torch.from_numpy(pixels))
    return Images(inputs, (tokens < 0).nonzero().flatten().to(loaded.device), owners)


class _Sequence:
    """A prompt and its answer so far.

    Attributes:
        feed: the tokens the model has not seen yet.
        images: those the model has not seen yet.
        cache: the keys and values of those it has.
        ended: nothing more is to be generated.
    """

    def __init__(
        self, loaded: LoadedModel, place: int, prompt: Sequence[int], max_new_tokens: int, images: Pixels
    ) -> None:
        self.feed, self.images = list(prompt), images
        self.cache = KVCache(loaded.model.config.n_layers)
        self.ended = False
        self._place = place
        self._template, self._end_ids = loaded.template, loaded.tokenizer.end_ids
        self._stops, self._end = (
            loaded.template.text_stops(loaded.tokenizer),
            loaded.template.text_end(loaded.tokenizer),
        )
        self._decoder = StreamDecoder(loaded.tokenizer)
        self._room = min(max_new_tokens, loaded.model.config.max_seq_len - len(prompt))
        self._tokens: list[int] = []
        self._text = ""

    def push(self, token: int) -> None:
        """Takes the next token of the answer."""
        self.images = ()
        if token in self._end_ids:
            self.ended = True
            return
        self.feed = [token]
        self._tokens.append(token)
        self._text += self._decoder.push(token)
        self.ended = len(self._tokens) == self._room or any(stop in self._text for stop in self._stops)

    def answer(self) -> Answer:
        """The text before the first stop string; in a dialogue format, without white space at its ends."""
        text = self._text + self._decoder.flush()
        text = "".join(truncate_at_stop_strings(iter([text]), self._stops, self._end))
        return Answer(self._place, text.strip() if self._template.kind == "dialogue" else text, self._tokens)
