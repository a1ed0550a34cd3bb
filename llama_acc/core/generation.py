"""Generation token by token: how the next one is chosen, what was seen is kept, and several ranks work together."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from llama_acc.core.errors import UserError
from llama_acc.core.inference import LoadedModel
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.vision import Images

# A temperature so low leaves one token anyway, and logits divided by less would overflow.
_GREEDY_BELOW = 1e-6

Pixels = Sequence[NDArray[np.uint8]]
"""Images, each [3, S, S] of 0 to 255, S the size that the model's encoder takes."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above, probabilities are softmax(logits / temperature).
        top_p: only the likeliest tokens that together reach this probability are drawn from.
        seed: of the generator; None = a new one each time.
        max_new_tokens: most tokens of an answer.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    seed: int | None = None
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"the temperature must be 0 or above, not {self.temperature}", "0 is greedy, 1 the model's")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, not {self.top_p}", "1 draws from all tokens")
        if self.max_new_tokens < 1:
            raise UserError(f"at least 1 new token must be allowed, not {self.max_new_tokens}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise UserError(f"the seed must fit in 64 bits, but is {self.seed}")


def with_images(loaded: LoadedModel, ids: list[int], count: int) -> list[int]:
    """A prompt with images right behind its BOS; each of their places is a -1.

    Raises:
        UserError: the model takes none, or not so many.
    """
    if not count:
        return ids
    if loaded.vision is None:
        raise UserError("this model takes no images: it was trained on text", "use one that was trained with vision")
    if loaded.vision.encoder == "clip" and count > 1:
        raise UserError("this model takes one image at a time", "leave the others out")
    begin = int(ids[:1] == [loaded.tokenizer.bos_id])
    return ids[:begin] + [-1] * (loaded.vision.positions * count) + ids[begin:]


class _Past:
    """What a model has seen of one conversation: its keys and values."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.model, self.device, self.vision_encoder = loaded.model, loaded.device, loaded.vision_encoder
        self.cache = KVCache(loaded.model.config.n_layers)

    @torch.inference_mode()
    def logits(self, keep: int, feed: Tensor, count: int = 0, pixels: Tensor | None = None) -> Tensor:
        """[vocabulary] logits of what follows `feed`, which follows the first `keep` tokens seen so far.

        Args:
            keep: how many of these stay.
            feed: tokens; -1 where an image stands.
            count: how many images there are in `feed`.
            pixels: [count, 3, S, S], of 0 to 255; needed on the ranks that make something of them.
        """
        self.cache.truncate(keep)
        images = None
        if count:
            assert self.vision_encoder is not None
            inputs = self.vision_encoder.inputs(count, partial(self._encoded, pixels))
            images = Images(inputs, (feed < 0).nonzero().flatten().to(self.device), [0] * count)
        positions = torch.arange(keep, keep + len(feed), device=self.device)
        tokens = feed.clamp(min=0).to(self.device)
        hidden = self.model(tokens, positions, [len(feed)], caches=[self.cache], images=images)
        return self.model.logits(hidden[-1:])[0]

    def _encoded(self, pixels: Tensor | None) -> Tensor:
        assert self.vision_encoder is not None
        assert pixels is not None
        return self.vision_encoder.encode(pixels)


def follow(loaded: LoadedModel) -> None:
    """Computes this rank's part of what rank 0 generates, until that calls `dismiss`."""
    past, group = _Past(loaded), loaded.model.parallel.control
    head = torch.empty(3, dtype=torch.int64)
    while True:
        dist.broadcast(head, 0, group)
        keep, length, count = head.tolist()
        if not length:
            return
        feed = torch.empty(length, dtype=torch.int64)
        dist.broadcast(feed, 0, group)
        pixels = None
        if count and loaded.vision_encoder is not None and loaded.vision_encoder.vision.trains_encoder:
            pixels = torch.empty((count, 3, *[loaded.vision_encoder.vision.image_size] * 2), dtype=torch.uint8)
            dist.broadcast(pixels, 0, group)
        past.logits(keep, feed, count, pixels)


def dismiss(loaded: LoadedModel) -> None:
    """Ends `follow` on the other ranks."""
    if loaded.model.parallel.world_size > 1:
        dist.broadcast(torch.zeros(3, dtype=torch.int64), 0, loaded.model.parallel.control)


class Generator:
    """Continues token sequences, keeping the keys and values of what it has already seen.

    Where several ranks share the model, rank 0 generates and the others `follow`; they keep one conversation's past, so
    there may be one generator at a time.
    """

    def __init__(self, loaded: LoadedModel, sampling: Sampling) -> None:
        self.model, self.sampling = loaded.model, sampling
        self.end_ids = loaded.tokenizer.end_ids
        self._past = _Past(loaded)
        self._seen: list[int] = []
        self._images: list[NDArray[np.uint8]] = []
        self._random = torch.Generator(device="cpu")
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    @torch.inference_mode()
    def tokens(self, prompt: Sequence[int], images: Pixels = ()) -> Iterator[int]:
        """The tokens that follow `prompt`, up to one that ends an answer (which is not given) or the sampling's limit.

        Whatever the prompt shares with the tokens seen before is not computed again.

        Args:
            prompt: tokens; see `with_images`.
            images: those that stand in it.
        """
        shared = 0
        # The last token of the prompt is always fed: its output is needed.
        for old, new in zip(self._seen, prompt[:-1], strict=False):
            if old != new:
                break
            shared += 1
        same = len(images) == len(self._images) and all(a is b for a, b in zip(images, self._images, strict=True))
        if not same or -1 in prompt[shared:]:
            shared = 0
        new_images: Pixels = () if shared else images
        self._seen, self._images = list(prompt[:shared]), list(images)
        feed = list(prompt[shared:])
        room = self.model.config.max_seq_len - len(prompt)
        for _ in range(min(self.sampling.max_new_tokens, room)):
            token = self._choose(self._logits(feed, new_images))
            if token in self.end_ids:
                return
            yield token
            feed, new_images = [token], ()

    def _logits(self, feed: list[int], images: Pixels) -> Tensor:
        keep, parallel, tokens = len(self._seen), self.model.parallel, torch.tensor(feed)
        pixels = torch.from_numpy(np.stack(images)) if images else None
        if parallel.world_size > 1:
            dist.broadcast(torch.tensor([keep, len(feed), len(images)]), 0, parallel.control)
            dist.broadcast(tokens, 0, parallel.control)
            if (
                pixels is not None
                and self._past.vision_encoder is not None
                and self._past.vision_encoder.vision.trains_encoder
            ):
                dist.broadcast(pixels, 0, parallel.control)
        logits = self._past.logits(keep, tokens, len(images), pixels)
        self._seen += feed
        return logits

    def _choose(self, logits: Tensor) -> int:
        if self.sampling.temperature < _GREEDY_BELOW:
            return int(logits.argmax())
        # Drawn on the CPU, so that a seed gives the same answer on every device with the same logits.
        probabilities = torch.softmax(logits.cpu() / self.sampling.temperature, -1)
        ordered, order = probabilities.sort(descending=True, stable=True)
        # Keep a token if those before it have not yet reached top_p; the first is always kept.
        ordered[ordered.cumsum(-1) - ordered >= self.sampling.top_p] = 0.0
        return int(order[torch.multinomial(ordered, 1, generator=self._random)])


def truncate_at_stop_strings(pieces: Iterator[str], stops: Sequence[str], end: str = "") -> Iterator[str]:
    """Pass text on as it comes, up to the first stop string; what could be the start of one is held back.

    Args:
        pieces: the text.
        stops: the stop strings.
        end: with what a reply ends, if more must follow for a stop string: left out at the text's end.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [position for stop in stops if (position := held.find(stop)) >= 0]
        if found:
            if held[: min(found)]:
                yield held[: min(found)]
            return
        keep = max((_overlap(held, stop) for stop in stops), default=0)
        if keep < len(held):
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held := held.removesuffix(end):
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def checked_text(text: str) -> str:
    """The text, if it can be encoded.

    Raises:
        UserError: it holds half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode at character {error.start + 1}") from None
    return text
