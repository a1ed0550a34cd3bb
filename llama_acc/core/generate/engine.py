"""Decoding: an `Engine` continues several token sequences together, each over its own keys and values.

One forward pass gives all of them their next token, so the weights are read once for the whole batch. There is no
padding: a pass holds one token of every reply under way, and the whole prompt of a new one. Where a reply ends, the
next prompt takes its slot; what it shares with the slot's past is not computed again.

Shapes: B replies under way, T tokens of a pass, V vocabulary, S width of an image.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, takewhile
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from llama_acc.core.data.templates import Template
from llama_acc.core.errors import UserError
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.vision import Images
from llama_acc.core.tokenizer import StreamDecoder, Tokenizer

# A temperature so low leaves one token anyway, and logits divided by less would overflow.
_GREEDY_BELOW = 1e-6
_NO_PIXELS = torch.empty(0, dtype=torch.uint8)


class _Fed(NamedTuple):
    """What a pass is fed of a sequence: its slot, how many positions of its past stay, new tokens, images in these."""

    slot: int
    keep: int
    length: int
    images: int


_Message = tuple[Sequence[_Fed], list[int], Tensor]

Pixels = Sequence[NDArray[np.uint8]]
"""Images, each [3, S, S] of 0 to 255, S the size that the model's encoder takes."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many at most.

    Attributes:
        temperature: 0 takes the likeliest token; above, probabilities are softmax(logits / temperature).
        top_p: only the likeliest tokens that together reach this probability are drawn from.
        seed: of the generator; None = a new one each time.
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


class Sampler:
    """Chooses tokens; what one sampler draws, over all its replies, follows from its seed."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = torch.Generator(device="cpu")
        self._random.manual_seed(self._random.seed() if sampling.seed is None else sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """A token out of [V] logits."""
        if self.sampling.temperature < _GREEDY_BELOW:
            return int(logits.argmax())
        # Drawn on the CPU, so that a seed gives the same answer on every device with the same logits.
        probabilities = torch.softmax(logits.cpu() / self.sampling.temperature, -1)
        ordered, order = probabilities.sort(descending=True, stable=True)
        # Keep a token if those before it have not yet reached top_p; the first is always kept.
        ordered[ordered.cumsum(-1) - ordered >= self.sampling.top_p] = 0.0
        return int(order[torch.multinomial(ordered, 1, generator=self._random)])


class Prompt(NamedTuple):
    """A sequence to continue.

    Attributes:
        tokens: fewer than the model's context; -1 where one of the images stands.
        prefill: tokens at its end that the reply's text begins with.
        spaces: so many at the beginning of the reply's text belong to the prompt (`Template.spaces_left`).
        strip: the reply's text has no white space at its ends.
    """

    tokens: Sequence[int]
    images: Pixels = ()
    prefill: Sequence[int] = ()
    spaces: int = 0
    strip: bool = False


class Reply:
    """A reply as it is generated, to the prompt of this index.

    Attributes:
        tokens: so far, without the one that ends it.
        text: so far. It ends at the prompt format's first stop string, and the beginning of one is held back.
        ended: nothing more is to be generated.
    """

    def __init__(
        self, prompt: Prompt, template: Template, tokenizer: Tokenizer, max_new_tokens: int, index: int = 0
    ) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.text = ""
        self.ended = False
        self._end_ids, self._decoder, self._most = tokenizer.end_ids, StreamDecoder(tokenizer), max_new_tokens
        self._stops, self._end = template.text_stops(tokenizer), template.text_end(tokenizer)
        self._strip, self._spaces = prompt.strip, prompt.spaces
        self._held = "".join(self._decoder.push(token) for token in prompt.prefill)

    def push(self, token: int) -> str:
        """Takes the next token. Returns what comes to `text`."""
        if token in self._end_ids:
            self.ended = True
        else:
            self.tokens.append(token)
            self.ended = len(self.tokens) >= self._most
            self._held += self._decoder.push(token)
        if self.ended:
            self._held += self._decoder.flush()
        text = self._released()
        if not self.text:
            # A template that ends a prompt with "Assistant:" leaves the space before the answer to the model.
            spaces = len(text) - len(text.lstrip(" "))
            text = text.lstrip() if self._strip else text[min(spaces, self._spaces) :]
            self._spaces -= min(spaces, self._spaces)
        self.text += text
        if self.ended and self._strip:
            self.text = self.text.rstrip()
        return text

    def _released(self) -> str:
        """The part of the text held back that cannot be the beginning of a stop string, or is what stands before one.

        Where a reply ends, the format's end mark is left out too, if more would have to follow for a stop string.
        """
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.ended = True
            return self._held[: min(found)]
        if self.ended:
            return self._held.removesuffix(self._end)
        begun = [n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        at = len(self._held) - max(begun, default=0)
        released, self._held = self._held[:at], self._held[at:]
        return released


@dataclass
class _Slot:
    """The place of one sequence in the batch: what the model has seen of it, and what it is to see next."""

    cache: KVCache
    seen: list[int] = field(default_factory=list)
    feed: list[int] = field(default_factory=list)
    new_images: Pixels = ()
    images: Pixels = ()

    def take(self, prompt: Prompt) -> None:
        """Keeps of the past what the prompt begins with; the rest of the prompt is to be fed."""
        tokens = list(prompt.tokens)
        # The last token of the prompt is always fed: its output is needed.
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(self.seen, tokens[:-1], strict=False))
        shared = sum(1 for _ in alike)
        if [*map(id, prompt.images)] != [*map(id, self.images)] or -1 in tokens[shared:]:
            shared = 0
        self.seen, self.feed = tokens[:shared], tokens[shared:]
        self.new_images, self.images = () if shared else prompt.images, prompt.images

    def fed(self, token: int) -> None:
        """Notes that the model has seen the feed, and what it is to see next."""
        self.seen += self.feed
        self.feed, self.new_images = [token], ()


class Engine:
    """Generates replies.

    Where several ranks share the model, rank 0 generates and the others `follow` it; they keep the past of one engine,
    so there may be one at a time, and one `generate` of it.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        # What inference mode leaves behind, such as the table of rotations, could not be trained with.
        trains = any(parameter.requires_grad for parameter in loaded.model.parameters())
        self._without_gradients = torch.no_grad if trains else torch.inference_mode
        self._slots = defaultdict[int, _Slot](lambda: _Slot(KVCache(loaded.model.config.n_layers)))

    def generate(self, prompts: Iterable[Prompt], sampler: Sampler, batch_size: int = 1) -> Iterator[tuple[Reply, str]]:
        """Replies token by token: a pair of the reply and what came to its text; its last pair has it `ended`.

        Greedy ones are those of one prompt at a time, up to the rounding of a product of more rows. Prompts are asked
        for when their turn comes; at most `batch_size` replies are under way at a time.
        """
        template, tokenizer = self.loaded.template, self.loaded.tokenizer
        waiting = enumerate(prompts)
        running: dict[int, Reply] = {}
        while True:
            free = [number for number in range(batch_size) if number not in running]
            for number, (index, prompt) in zip(free, waiting, strict=False):
                self._slots[number].take(prompt)
                room = self.loaded.model.config.max_seq_len - len(prompt.tokens)
                running[number] = Reply(prompt, template, tokenizer, min(sampler.sampling.max_new_tokens, room), index)
            if not running:
                return
            for (number, reply), logits in zip(list(running.items()), self._logits(list(running)), strict=True):
                token = sampler(logits)
                self._slots[number].fed(token)
                text = reply.push(token)
                if reply.ended:
                    del running[number]
                yield reply, text

    def _logits(self, numbers: list[int]) -> Tensor:
        """[B, V] of what follows the sequences in these slots."""
        slots, vision = [self._slots[number] for number in numbers], self.loaded.vision
        fed = [
            _Fed(number, len(slot.seen), len(slot.feed), len(slot.new_images))
            for number, slot in zip(numbers, slots, strict=True)
        ]
        tokens = [token for slot in slots for token in slot.feed]
        images = [image for slot in slots for image in slot.new_images]
        pixels = torch.from_numpy(np.stack(images)) if images else _NO_PIXELS
        if self.loaded.model.parallel.world_size > 1:
            all_encode = vision is not None and vision.trains_encoder
            _broadcast(self.loaded, (fed, tokens, pixels if all_encode else _NO_PIXELS))
        return self._forward(fed, tokens, pixels)

    def follow(self) -> None:
        """Computes this rank's part of what rank 0 generates, until that calls `stop_followers`."""
        while (message := _broadcast(self.loaded, None)) is not None:
            self._forward(*message)

    def _forward(self, fed: Sequence[_Fed], tokens: list[int], pixels: Tensor) -> Tensor:
        """[B, V] logits of what follows each sequence. `tokens` [T] are those of all, end to end, -1 where an image
        stands; `pixels` [images, 3, S, S] of 0 to 255, empty on ranks that encode none."""
        model, device = self.loaded.model, self.loaded.device
        caches = [self._slots[one.slot].cache for one in fed]
        for cache, one in zip(caches, fed, strict=True):
            cache.truncate(one.keep)
        positions = [position for one in fed for position in range(one.keep, one.keep + one.length)]
        owners = [document for document, one in enumerate(fed) for _ in range(one.images)]
        stream, seen = torch.tensor(tokens, device=device), None
        if owners:
            encoder = self.loaded.vision_encoder
            assert encoder is not None
            inputs = encoder.inputs(len(owners), partial(encoder.encode, pixels))
            seen = Images(inputs, (stream < 0).nonzero().flatten(), owners)
            stream = stream.clamp(min=0)
        lengths = [one.length for one in fed]
        with self._without_gradients():
            hidden = model(stream, torch.tensor(positions, device=device), lengths, caches=caches, images=seen)
            if len(tokens) > len(fed):
                hidden = hidden[[end - 1 for end in accumulate(lengths)]]
            return model.logits(hidden)


def _broadcast(loaded: LoadedModel, message: _Message | None) -> _Message | None:
    """What rank 0 gives to `_forward`, on every rank; None ends it. Pickled: only between processes of one run."""
    held = [message]
    dist.broadcast_object_list(held, 0, group=loaded.model.parallel.control)
    return held[0]


def stop_followers(loaded: LoadedModel) -> None:
    """Ends `Engine.follow` on the other ranks."""
    if loaded.model.parallel.world_size > 1:
        _broadcast(loaded, None)
