"""Decoding: an `Engine` continues several token sequences together, each over its own keys and values.

One forward pass gives all of them their next token, so the weights are read once for the whole batch. There is no
padding: a pass holds one token of every reply under way, and a piece of a new prompt, so that a long one does not stop
the others. Between passes replies end, are cancelled, and new ones take their slots; what a prompt shares with the past
of any slot is copied from there, not computed again.

Shapes: B replies that get a token, T tokens of a pass, V vocabulary, S width of an image.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from llama_acc.core.data.templates import Template
from llama_acc.core.device import Arriving, free_memory
from llama_acc.core.distributed.groups import local_world_size
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.generate.decode_cpu import DecodeOnCPU
from llama_acc.core.generate.decode_graph import DecodeGraph
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.sampling import Sampler, TokenLogprobs, logprobs_of
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.loss import CHUNK_ROWS
from llama_acc.core.model.multi_adapter import MultiAdapter
from llama_acc.core.model.transformer import SMALL_DIM, fuse_quantized, reorder_small
from llama_acc.core.model.vision import Images
from llama_acc.core.tokenizer import StreamDecoder, Tokenizer

_NO_PIXELS = torch.empty(0, dtype=torch.uint8)
# Tokens of prompts in a pass.
_CHUNK = 512
# More sequences at a time than this do not raise the tokens a second by much, and each of them gets slower.
_MOST_SLOTS = 64
# So few tokens are rather computed again than copied, kept or waited for.
_FEW = 16


class _Fed(NamedTuple):
    """What a pass is fed of a sequence: its slot, how many positions of its past stay, new tokens, images in these, its
    adapter."""

    slot: int
    keep: int
    length: int
    images: int
    adapter: int


class _Pass(NamedTuple):
    """What the model computes at once."""

    fed: Sequence[_Fed]  # those that get a token come first
    tokens: Sequence[int]  # [T] of all, end to end, -1 where an image stands
    pixels: Tensor  # [images, 3, S, S] of 0 to 255, empty for ranks that encode none
    wanted: int  # B: of so many sequences, what follows is wanted
    numbers: Sequence[Sequence[float]]  # see `DecodeGraph`


_Message = tuple[Callable[..., Any], Sequence[Any]]
"""A method of `Engine`, and what it is called with on every rank."""


Pixels = Sequence[NDArray[np.uint8]]
"""Images, each [3, S, S] of 0 to 255, S the size that the model's encoder takes."""


class Prompt(NamedTuple):
    """A sequence to continue."""

    tokens: Sequence[int]  # fewer than the model's context; -1 where one of the images stands
    images: Pixels = ()
    prefill: Sequence[int] = ()  # tokens at its end that the reply's text begins with
    spaces: int = 0  # so many at the beginning of the reply's text belong to the prompt (`Template.spaces_left`)
    strip: bool = False  # the reply's text has no white space at its ends
    raw: bool = False  # it is in no prompt format, so a reply does not end at the format's stop strings
    adapter: int = 0  # whose it is to be, of several models over one base: `LoadedModel.adapter`


class Reply:
    """A reply as it is generated, to the prompt of this index."""

    def __init__(
        self,
        prompt: Prompt,
        template: Template,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        index: int = 0,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.index, self.prompt = index, prompt
        self.tokens: list[int] = []  # so far, without the one that ends it
        self.text = ""  # so far. It ends at the format's first stop string, and the beginning of one is held back
        self.logprobs: list[TokenLogprobs] = []  # of these tokens and the end token, where they are asked for
        self.end_token: int | None = None  # the one that ended it; None: none has
        # "stop": by an end token or stop string, "length": there is no room for more, "failed": its grammar cannot go
        # on; None: it is under way.
        self.finish_reason: Literal["stop", "length", "cancelled", "failed"] | None = None
        self._end_ids, self._decoder = tokenizer.end_ids.union(stop_ids), StreamDecoder(tokenizer)
        self._most = max_new_tokens
        stops, end = ([], "") if prompt.raw else (template.text_stops(tokenizer), template.text_end(tokenizer))
        self._stops, self._end = [*stops, *stop], end
        self._strip, self._spaces = prompt.strip, prompt.spaces
        self._held = "".join(self._decoder.push(token) for token in prompt.prefill)

    @property
    def ended(self) -> bool:
        """Nothing more is to be generated."""
        return self.finish_reason is not None

    @property
    def left(self) -> int:
        """So many tokens may still come."""
        return self._most - len(self.tokens)

    def push(self, token: int) -> str:
        """Takes the next token. Returns what comes to `text`."""
        if token in self._end_ids:
            self.finish_reason, self.end_token = "stop", token
        else:
            self.tokens.append(token)
            if len(self.tokens) >= self._most:
                self.finish_reason = "length"
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
            self.finish_reason = "stop"
            return self._held[: min(found)]
        if self.ended:
            return self._held.removesuffix(self._end)
        length = len(self._held)
        begun = [
            n for stop in self._stops for n in range(1, min(len(stop), length + 1)) if self._held.endswith(stop[:n])
        ]
        at = length - max(begun, default=0)
        released, self._held = self._held[:at], self._held[at:]
        return released


@dataclass
class _Slot:
    """The place of one sequence in the batch: what the model has seen of it, and what it is to see next.

    `reply` None: it is free. `used` says when it was given away, in the order of requests, `adapter` to whose.
    """

    cache: KVCache
    seen: list[int] = field(default_factory=list)
    feed: list[int] = field(default_factory=list)
    new_images: Pixels = ()
    images: Pixels = ()
    reply: Reply | None = None
    sampler: Sampler | None = None
    used: int = 0
    adapter: int = 0

    def shared(self, prompt: Prompt, begun: bool = False) -> int:
        """How many tokens of a prompt the model has seen here; `begun`: or is about to see."""
        if prompt.adapter != self.adapter:
            return 0
        # The last token of the prompt is always fed: its output is needed.
        seen, tokens = self.seen + self.feed if begun else self.seen, prompt.tokens[:-1]
        both = min(len(seen), len(tokens))
        different = (i for i in range(both) if seen[i] != tokens[i])
        count = both if seen[:both] == list(tokens[:both]) else next(different)
        pairs = zip(prompt.images, self.images, strict=False)
        alike = len(prompt.images) == len(self.images) and all(a is b or np.array_equal(a, b) for a, b in pairs)
        return count if alike and -1 not in prompt.tokens[count:] else 0

    def take(self, prompt: Prompt, shared: int) -> None:
        """Its past is the beginning of the prompt; the rest of the prompt is to be fed."""
        self.seen, self.feed = list(prompt.tokens[:shared]), list(prompt.tokens[shared:])
        self.new_images, self.images = () if shared else prompt.images, prompt.images
        self.adapter = prompt.adapter

    def fed(self, count: int) -> None:
        """Notes that the model has seen so many tokens of the feed."""
        self.seen += self.feed[:count]
        self.feed, self.new_images = self.feed[count:], ()


class _Begun(NamedTuple):
    """A pass whose tokens may be on their way."""

    planned: Sequence[tuple[_Slot, int]]
    replies: Sequence[Reply | None]  # those of the slots
    are_drawn: bool  # the device has chosen all its tokens by `DecodeGraph`'s numbers, not only the likeliest
    logits: Tensor
    chosen: Tensor
    arriving: Arriving

    def alive(self) -> list[tuple[int, _Slot]]:
        """The slots that get a token, with their places, but for replies that have ended since."""
        places = enumerate(zip(self.planned[: len(self.chosen)], self.replies, strict=False))
        return [(place, slot) for place, ((slot, _), reply) in places if slot.reply is reply]


class Engine:
    """Generates replies: `add` them, `step` until they have ended. It has no threads; all calls come from one.

    Where several ranks share the model, rank 0 generates and the others `follow` it; they keep the past of one engine,
    so there may be one at a time.

    Attributes:
        loaded: the model; of several over one base (`load_models`) any: prompts say whose they are.
        slots: so many replies are under way at a time, the others wait for their turn. The cache has room for those
            that have been in use, each of the longest sequence so far (rounded up to a power of two), at most of
            `context`; so it stops growing, and none of it is given back.
        context: most tokens of a prompt and its reply.
        chunk: most tokens of prompts in a pass.
    """

    def __init__(
        self, loaded: LoadedModel, slots: int | None = 1, context: int | None = None, chunk: int = _CHUNK
    ) -> None:
        """`slots` None: as `slots_for` says."""
        self.loaded, self.chunk = loaded, chunk
        self.context = min(context or loaded.model.config.max_seq_len, loaded.model.config.max_seq_len)
        self.slots = slots_for(loaded, self.context) if slots is None else slots
        self.waiting: list[tuple[Reply, Sampler]] = []
        self._slots: list[_Slot] = []
        self._caches = [KVCache(loaded.model.config.n_layers, self.context)]
        self._taken = 0
        self._ahead: _Begun | None = None
        is_resident = loaded.stream is None
        self._decode = DecodeGraph(loaded.model) if is_resident and DecodeGraph.takes(loaded.model) else None
        # What inference mode leaves behind, such as the table of rotations, could not be trained with.
        trains = any(parameter.requires_grad for parameter in loaded.model.parameters())
        self._without_gradients = torch.no_grad if trains else torch.inference_mode
        self._is_fixed, self._is_fused, self._is_reordered = not trains and is_resident, False, False
        takes = self._is_fixed and loaded.device.type == "cpu" and DecodeGraph.takes_step_of(loaded.model)
        self._decode_one = DecodeOnCPU(loaded.model) if takes else None

    @property
    def running(self) -> list[Reply]:
        """The replies that have a slot."""
        return [slot.reply for slot in self._slots if slot.reply is not None]

    def add(self, prompt: Prompt, sampler: Sampler, index: int = 0) -> Reply:
        """A reply that the next steps generate, once it has a slot; each has a sampler of its own.

        Raises:
            UserError: the prompt leaves no room in the context; a token is not in the vocabulary.
        """
        loaded, sampling = self.loaded.sibling(prompt.adapter), sampler.sampling
        room = self.context - len(prompt.tokens)
        if room < 1:
            raise UserError(f"the prompt has {len(prompt.tokens)} tokens, the context is {self.context}")
        rows = loaded.model.config.vocab_size
        if unknown := [token for token in sampling.logit_bias if not 0 <= token < rows]:
            raise UserError(f"logit_bias is for tokens of the vocabulary, 0 to {rows - 1}, not {unknown[0]}")
        most = min(sampling.max_new_tokens, room)
        reply = Reply(prompt, loaded.template, loaded.tokenizer, most, index, sampling.stop, sampling.stop_ids)
        self.waiting.append((reply, sampler))
        return reply

    def cancel(self, reply: Reply) -> None:
        """Ends a reply, if it has not; its slot is free at once."""
        self.waiting = [one for one in self.waiting if one[0] is not reply]
        for slot in self._slots:
            if slot.reply is reply:
                slot.reply = None
        reply.finish_reason = reply.finish_reason or "cancelled"

    def step(self) -> list[tuple[Reply, str]]:
        """Makes one pass. Returns the replies that got a token, each with what came to its text; see `Reply`.

        Where a GPU chooses the tokens, it has the next pass to do before the host reads them. What that computes for a
        reply that turns out to have ended is left out.
        """
        begun = self._ahead if self._ahead is not None and self._ahead.alive() else self._begin()
        if begun is None:
            return []
        self._ahead = self._follow(begun)
        tokens, events = begun.arriving.read(), []
        for place, slot in begun.alive():
            reply, sampler = slot.reply, slot.sampler
            assert reply is not None
            assert sampler is not None
            slot.fed(begun.planned[place][1])
            try:
                is_chosen = begun.are_drawn or sampler.is_argmax
                token = tokens[place] if is_chosen else sampler(begun.logits[place], reply.prompt.tokens)
            except RunError:  # its own grammar's: the others go on
                reply.finish_reason, slot.reply = "failed", None
                events.append((reply, ""))
                continue
            if sampler.sampling.logprobs is not None:
                reply.logprobs.append(logprobs_of(begun.logits[place], token, sampler.sampling.logprobs))
            slot.feed = [token]
            events.append((reply, reply.push(token)))
            if reply.ended:
                slot.reply = None
        for slot, count in begun.planned[len(tokens) :]:
            slot.fed(count)
        return events

    def _begin(self) -> _Begun | None:
        """Begins the next pass, if there is something to be computed."""
        self._give_slots()
        planned = self._plan()
        if not planned:
            return None
        slots = [slot for slot, _ in planned]
        are_single = self._decode is not None and all(slot.seen and len(slot.feed) == 1 for slot in slots)
        numbers = self._numbers(slots) if are_single else ()
        logits, chosen = self._logits(planned, numbers)
        return _Begun(planned, [slot.reply for slot in slots], bool(numbers), logits, chosen, Arriving(chosen))

    def _follow(self, begun: _Begun) -> _Begun | None:
        """Begins the pass after one whose tokens only a GPU knows; None: they, or what else is to be done, have to be
        known before."""
        if self._decode is None:
            return None
        alive = begun.alive()
        samplers = [slot.sampler for _, slot in alive if slot.sampler is not None]
        are_known = all(sampler.is_free and (begun.are_drawn or sampler.is_argmax) for sampler in samplers)
        is_due = self.waiting and len(alive) < self.slots
        if not are_known or is_due or len(alive) < len(self.running):
            return None
        going_on = [(place, slot) for place, slot in alive if slot.reply is not None and slot.reply.left > 1]
        if not going_on:
            return None
        places, slots = zip(*going_on, strict=True)
        numbers = self._numbers(slots)
        with self._without_gradients():
            logits, chosen = self._decode(places, [slot.cache for slot in slots], numbers, begun.chosen)
        planned, replies = [(slot, 1) for slot in slots], [slot.reply for slot in slots]
        return _Begun(planned, replies, bool(numbers), logits, chosen, Arriving(chosen))

    def generate(self, prompts: Iterable[Prompt], sampler: Sampler, batch_size: int = 1) -> Iterator[tuple[Reply, str]]:
        """Replies token by token: a pair of the reply and what came to its text; its last pair has it `ended`.

        Greedy ones are those of one prompt at a time, up to the rounding of a product of more rows. Prompts are asked
        for when their turn comes; at most `batch_size` replies are under way at a time, each with a seed that follows
        from the sampler's.
        """
        self.slots = max(self.slots, batch_size)
        waiting, running = enumerate(prompts), list[Reply]()
        try:
            while True:
                for _, (index, prompt) in zip(range(batch_size - len(running)), waiting, strict=False):
                    running.append(self.add(prompt, sampler.spawn(), index))
                if not running:
                    return
                for reply, text in self.step():
                    if reply.ended:
                        running.remove(reply)
                    yield reply, text
        finally:
            for reply in running:
                self.cancel(reply)

    def _give_slots(self) -> None:
        """Gives free slots to those that wait, in their order."""
        left = []
        for place, (reply, sampler) in enumerate(self.waiting):
            free = [slot for slot in self._slots if slot.reply is None]
            if len(self._slots) < self.slots:
                free.append(_Slot(self._cache(len(self._slots))))
                self._slots.append(free[-1])
            if not free:
                left += self.waiting[place:]
                break
            past = [(slot.shared(reply.prompt), slot.reply is None) for slot in self._slots]
            shared, is_free = max(past)
            begun = (slot.shared(reply.prompt, True) for slot in self._slots if slot.reply is not None)
            if max(begun, default=0) - shared > _FEW:
                left.append((reply, sampler))
                continue
            source = self._slots[past.index((shared, is_free))]
            # A past that goes on stays where it is; of another, the beginning is copied in place of the oldest past.
            goes_on = is_free and len(source.seen) - shared <= _FEW
            slot = source if goes_on else min(free, key=lambda slot: slot.used)
            if slot is not source and shared <= _FEW:
                shared = 0
            elif slot is not source:
                slot.seen, copy = [], (source.cache.slot, slot.cache.slot, shared)
                self._tell((Engine._copy, copy))
                self._copy(*copy)
            self._taken += 1
            slot.reply, slot.sampler, slot.used = reply, sampler, self._taken
            slot.take(reply.prompt, shared)
        self.waiting = left

    def _cache(self, slot: int) -> KVCache:
        while slot >= len(self._caches):
            self._caches.append(self._caches[0].beside(len(self._caches)))
        return self._caches[slot]

    def _plan(self) -> list[tuple[_Slot, int]]:
        """The slots of the next pass and how many tokens of each feed; first those that get a token from it."""
        last, beginnings, room = [], [], self.chunk
        busy = [slot for slot in self._slots if slot.reply is not None]
        for slot in sorted(busy, key=lambda slot: slot.used) if len(busy) > 1 else busy:
            length = len(slot.feed)
            if length > 1:
                # All images of a prompt come into the stream at once.
                images = [place for place, token in enumerate(slot.feed, 1) if token < 0] if slot.new_images else []
                length = min(length, max([room, *images[-1:]]))
                room -= length
            if length == len(slot.feed):
                last.append((slot, length))
            elif length > 0:
                beginnings.append((slot, length))
        # Single tokens attend together where they come first; an adapter works on rows next to each other.
        last.sort(key=lambda planned: (planned[1] > 1, planned[0].adapter, planned[0].cache.slot))
        return last + beginnings

    def _numbers(self, slots: Sequence[_Slot]) -> Sequence[Sequence[float]]:
        """By what a GPU draws the tokens of a pass; empty: it cannot, or all are the likeliest."""
        samplers = [slot.sampler for slot in slots if slot.sampler is not None]
        are_free = all(sampler.is_free for sampler in samplers)
        return [one.numbers() for one in samplers] if are_free and not all(one.is_argmax for one in samplers) else ()

    def _logits(
        self, planned: Sequence[tuple[_Slot, int]], numbers: Sequence[Sequence[float]]
    ) -> tuple[Tensor, Tensor]:
        """[B, V] of what follows the sequences whose feed is taken whole, and the tokens chosen by `numbers`, or the
        likeliest, [B]."""
        fed = [
            _Fed(slot.cache.slot, len(slot.seen), count, len(slot.new_images), slot.adapter) for slot, count in planned
        ]
        tokens = [token for slot, count in planned for token in slot.feed[:count]]
        images = [image for slot, _ in planned for image in slot.new_images]
        pixels = torch.from_numpy(np.stack(images)) if images else _NO_PIXELS
        wanted = sum(count == len(slot.feed) for slot, count in planned)
        one, vision = _Pass(fed, tokens, pixels, wanted, numbers), self.loaded.vision
        all_encode = vision is not None and vision.trains_encoder
        self._tell((Engine._forward, [one if all_encode else one._replace(pixels=_NO_PIXELS)]))
        return self._forward(one)

    def _tell(self, message: _Message) -> None:
        """Lets the ranks that `follow` compute it, too."""
        if self.loaded.model.parallel.world_size > 1:
            _broadcast(self.loaded, message)

    def score(
        self, documents: Sequence[Sequence[int]], ends: Sequence[tuple[int, Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """How likely tokens are that end one place behind a document, in one pass without a past.

        `ends` are pairs of a document's number and such tokens. For each: the sum of their log-probabilities, in
        float32, and whether each of them is the likeliest.
        """
        self._tell((Engine._score, (documents, ends)))
        return self._score(documents, ends)

    def _score(
        self, documents: Sequence[Sequence[int]], ends: Sequence[tuple[int, Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        model, device = self.loaded.model, self.loaded.device
        lengths = [*map(len, documents)]
        behind = [*accumulate(lengths)]
        rows = [row for number, tokens in ends for row in range(behind[number] - len(tokens), behind[number])]
        following = torch.tensor([*chain.from_iterable(tokens for _, tokens in ends)], device=device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        scores, likeliest = [], []
        if isinstance(model, MultiAdapter):
            model.select([self.loaded.adapter] * len(documents), lengths)
        with self._without_gradients():
            hidden = model(torch.tensor([*chain.from_iterable(documents)], device=device), positions, lengths)[rows]
            for part, tokens in zip(hidden.split(CHUNK_ROWS), following.split(CHUNK_ROWS), strict=True):
                logits = model.logits(part)
                scores.append(logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1))
                likeliest.append(logits.argmax(1) == tokens)
        counts = [len(tokens) for _, tokens in ends]
        split = zip(*(torch.cat(each).cpu().split(counts) for each in (scores, likeliest)), strict=True)
        return [(score.sum().item(), bool(are_likeliest.all())) for score, are_likeliest in split]

    def follow(self) -> None:
        """Computes this rank's part of what rank 0 generates and scores, until that calls `stop_followers`."""
        while (message := _broadcast(self.loaded, None)) is not None:
            compute, given = message
            compute(self, *given)

    def _copy(self, source: int, target: int, length: int) -> None:
        """Gives a slot the first positions of another one's past."""
        with self._without_gradients():
            self._cache(target).copy(self._cache(source), length)

    def _forward(self, one: _Pass) -> tuple[Tensor, Tensor]:
        """[B, V] logits of what follows the sequences of which it is wanted, and the likeliest tokens, [B]."""
        model, device, fed = self.loaded.model, self.loaded.device, one.fed
        caches = [self._cache(part.slot) for part in fed]
        for cache, part in zip(caches, fed, strict=True):
            cache.truncate(part.keep)
        if self._is_fixed and not self._is_fused:
            self._is_fused = fuse_quantized(model, free_memory(device) // local_world_size(), len(one.tokens))
        decode = self._decode or (self._decode_one if len(one.tokens) == 1 else None)
        if decode is not None and len(one.tokens) == one.wanted and all(cache.length for cache in caches):
            with self._without_gradients():
                return decode(one.tokens, caches, one.numbers)
        positions = [position for part in fed for position in range(part.keep, part.keep + part.length)]
        owners = [document for document, part in enumerate(fed) for _ in range(part.images)]
        stream, seen = torch.tensor(one.tokens, device=device), None
        if owners:
            encoder = self.loaded.vision_encoder
            assert encoder is not None
            inputs = encoder.inputs(len(owners), partial(encoder.encode, one.pixels))
            seen = Images(inputs, (stream < 0).nonzero().flatten(), owners)
            stream = stream.clamp(min=0)
        lengths = [part.length for part in fed]
        if isinstance(model, MultiAdapter):
            model.select([part.adapter for part in fed], lengths)
        if one.wanted > 1 and self._is_fixed and not self._is_reordered:
            reorder_small(model)
            self._is_reordered = True
        with self._without_gradients():
            hidden = model(stream, torch.tensor(positions, device=device), lengths, caches=caches, images=seen)
            if not one.wanted:
                return hidden.new_empty(0, 1), stream[:0]
            if len(one.tokens) > one.wanted:
                hidden = hidden[[end - 1 for end in accumulate(lengths[: one.wanted])]]
            logits = model.logits(hidden)
            return logits, logits.argmax(-1)


def slots_for(loaded: LoadedModel, context: int) -> int:
    """How many sequences of `context` tokens have room in the memory that is free beside a model, at least 1.

    A sequence takes keys and values, 2 x layers x heads (key-value heads of this rank) x head dimension x context
    numbers of the model's type. A fifth of what is free is left for the passes.
    """
    model, device = loaded.model, loaded.device
    config = model.config
    numbers = 2 * config.n_layers * config.kv_dim // model.parallel.model_size * context
    free = free_memory(device)
    if device.type != "cuda":
        # Weights are mapped from their file: the system counts their pages as free.
        weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
        copies = 2 if config.dim <= SMALL_DIM or model.is_quantized else 1  # see `reorder_small`, `fuse_quantized`
        free = free // local_world_size() - copies * sum(weights.values())
    return max(1, min(_MOST_SLOTS, int(0.8 * free) // (numbers * model.dtype.itemsize)))


def _broadcast(loaded: LoadedModel, message: _Message | None) -> _Message | None:
    """What rank 0 computes, on every rank; None ends it. Pickled: only between processes of one run."""
    held = [message]
    dist.broadcast_object_list(held, 0, group=loaded.model.parallel.control)
    return held[0]


def stop_followers(loaded: LoadedModel) -> None:
    """Ends `Engine.follow` on the other ranks."""
    if loaded.model.parallel.world_size > 1:
        _broadcast(loaded, None)
