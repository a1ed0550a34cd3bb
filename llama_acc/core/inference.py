"""A trained model to talk to: loading, generation token by token, conversations.

model = load_model("runs/alpaca")
print(generate(model, "Name three colours.", temperature=0))
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from llama_acc.core.checkpoint.base import check_base, check_quantised_base, read_base
from llama_acc.core.checkpoint.files import check_checkpoint
from llama_acc.core.checkpoint.layout import Layout, inspect, locate, read_config, without_towers
from llama_acc.core.checkpoint.quantised import read_quantization
from llama_acc.core.checkpoint.shards import check_tensors, fill, read_weights
from llama_acc.core.checkpoint.towers import check_tower
from llama_acc.core.data.templates import ChatTemplate, Template, get_template, template_of_folder
from llama_acc.core.device import pick_device
from llama_acc.core.errors import UserError
from llama_acc.core.eyes import Eyes, open_eyes
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.sharding import check_divides
from llama_acc.core.model.transformer import Transformer, build_on_meta, pack_small, quantise_on_meta
from llama_acc.core.model.vision import Images
from llama_acc.core.model.vision_config import Vision
from llama_acc.core.parallel import Parallel
from llama_acc.core.tokenizer import StreamDecoder, Tokenizer, find_tokenizer, load_tokenizer

Turn = tuple[str, str]
# A temperature so low leaves one token anyway, and logits divided by less would overflow.
_GREEDY_BELOW = 1e-6
_ALONE = Parallel()


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


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and the prompt format it was trained with.

    Attributes:
        model: its parameters may lie in the checkpoint's file; they must not be trained.
        tokenizer: its tokenizer.
        template: its prompt format.
        template_from: where that came from, for the user.
        device: where it computes.
        eyes: what makes of images what it takes; None = it takes none.
    """

    model: Transformer
    tokenizer: Tokenizer
    template: Template | ChatTemplate
    template_from: str
    device: torch.device
    eyes: Eyes | None = None

    @property
    def vision(self) -> Vision | None:
        """What it sees with."""
        return self.model.config.vision


def load_model(
    *checkpoints: str | Path,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    template: str = "auto",
    verify: bool = False,
    quantize: Literal["nf4"] | None = None,
    parallel: Parallel = _ALONE,
) -> LoadedModel:
    """Loads a checkpoint, or a rank's share of it, for generation.

    Args:
        checkpoints: folders, or run folders (their latest checkpoint); a later one overrides an earlier one.
        device: such as "cpu"; None picks CUDA, then MPS, then CPU.
        dtype: type of weights and activations; None = the checkpoint's.
        tokenizer: its file; None = the one beside the checkpoint.
        template: a prompt format's name; "auto" = the one kept in the checkpoint, else its chat template, else none.
        verify: compare the SHA-256 of every file with the manifest.
        quantize: keep the matrices in four bits; those of a quantised checkpoint are in any case.
        parallel: the ranks that share the model, whatever the size it was saved at.

    Raises:
        UserError: something is missing, damaged or does not fit.
    """
    layouts = [inspect(locate(str(checkpoint))) for checkpoint in checkpoints]
    last = (without_towers(layouts) or layouts)[-1].folder
    config = read_config(layouts)
    if config is None:
        raise UserError(f"{last} has no params.json or config.json: the model's shape is not known")
    for layout in layouts:
        check_checkpoint(layout.folder, verify and parallel.is_main)
    check_base(layouts, config)
    if quantize == "nf4":
        check_quantised_base(layouts)
    path = find_tokenizer(last) if tokenizer is None else Path(tokenizer)
    if path is None:
        raise UserError(f"there is no tokenizer in {last}", "put tokenizer.model or tokenizer.json beside the weights")
    words = load_tokenizer(path)
    config = config.with_vocabulary(words.vocab_size)
    config.check_tokenizer(words.vocab_size, path)
    chosen: tuple[Template | ChatTemplate, str]
    chosen = template_of_folder(last, words) if template == "auto" else (get_template(template), "asked for")
    check_divides(config, parallel.model_size)
    weights = read_weights(layouts, parallel.model_rank, parallel.model_size)
    check_tower(config.vision, weights.tensors, last)
    check_tensors(weights, config.parameter_shapes(), last)
    own_dtype = weights.tensors["output.weight"].dtype
    if dtype is None:
        dtype = own_dtype if own_dtype in (torch.float32, torch.bfloat16) else torch.float32
    target = pick_device(device)
    is_quantised = quantize == "nf4" or read_quantization(layouts[0].folder) is not None
    model = model_on_meta(config, dtype, parallel, _skipped(layouts) if is_quantised else None)
    fill(model, weights, target, dtype, copy=False)
    if parallel.model_size == 1:
        pack_small(model)
    return LoadedModel(model, words, *chosen, target, open_eyes(model, weights, target))


Pixels = Sequence[NDArray[np.uint8]]
"""Images, each [3, S, S] of 0 to 255, S the size that the model's encoder takes."""


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


def model_on_meta(
    config: ModelConfig, dtype: torch.dtype, parallel: Parallel, quantise_skip: Sequence[str] | None
) -> Transformer:
    """A rank's part of a model for generation, without storage.

    Args:
        config: its shape.
        dtype: type of weights and activations.
        parallel: the ranks that share it.
        quantise_skip: its matrices are kept in four bits, but for these; None = all are kept as they are.
    """
    model = build_on_meta(config, dtype, parallel).requires_grad_(False)
    if quantise_skip is not None:
        quantise_on_meta(model, quantise_skip)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _skipped(layouts: Sequence[Layout]) -> Sequence[str]:
    """The matrices that are not in four bits: as the base is, or as it was trained on; else none."""
    quantization, trained = read_quantization(layouts[0].folder), read_base(layouts[-1].folder)
    if quantization is not None:
        return quantization.skip
    return () if trained is None or trained.quantised is None else trained.quantised.skip


class _Past:
    """What a model has seen of one conversation: its keys and values."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.model, self.device, self.eyes = loaded.model, loaded.device, loaded.eyes
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
            assert self.eyes is not None
            inputs = self.eyes.inputs(count, partial(self._encoded, pixels))
            images = Images(inputs, (feed < 0).nonzero().flatten().to(self.device), [0] * count)
        positions = torch.arange(keep, keep + len(feed), device=self.device)
        tokens = feed.clamp(min=0).to(self.device)
        hidden = self.model(tokens, positions, [len(feed)], caches=[self.cache], images=images)
        return self.model.logits(hidden[-1:])[0]

    def _encoded(self, pixels: Tensor | None) -> Tensor:
        assert self.eyes is not None
        assert pixels is not None
        return self.eyes.encode(pixels)


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
        if count and loaded.eyes is not None and loaded.eyes.vision.trains_encoder:
            pixels = torch.empty((count, 3, *[loaded.eyes.vision.image_size] * 2), dtype=torch.uint8)
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
            if pixels is not None and self._past.eyes is not None and self._past.eyes.vision.trains_encoder:
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


def visible_text(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Passes text on as it comes, up to the first stop string; what could be the start of one is held back."""
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
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Conversation:
    """Questions and answers with the whole history in view.

    Attributes:
        turns: ("human" | "assistant", text) so far.
        images: those in view.
        system: the system text; None = the template's own.
    """

    def __init__(self, loaded: LoadedModel, sampling: Sampling) -> None:
        self.loaded = loaded
        self.turns: list[Turn] = []
        self.images: list[NDArray[np.uint8]] = []
        self.system: str | None = None
        self._generator = Generator(loaded, sampling)

    def reset(self) -> None:
        """Forgets all turns and images."""
        self.turns, self.images = [], []

    def ask(self, question: str, images: Pixels = ()) -> Iterator[str]:
        """The answer, piece by piece. The turns are kept, also of an answer that is not listened to till its end.

        Args:
            question: what is asked.
            images: more of them; all of a conversation stand at its beginning, as in training.

        Raises:
            UserError: the question alone is longer than the model's context, or is not text; images a model does not
                take.
        """
        question = checked_text(question)
        before, self.images = self.images, [*self.images, *images]
        try:
            return self._ask(question)
        except UserError:
            self.images = before
            raise

    def _ask(self, question: str) -> Iterator[str]:
        prompt, dropped = self._prompt([*self.turns, ("human", question)])
        self.turns = [*self.turns[dropped:], ("human", question)]
        self.dropped_turns = dropped
        return self._answer(prompt)

    def _answer(self, prompt: list[int]) -> Iterator[str]:
        decoder = StreamDecoder(self.loaded.tokenizer)

        def pieces() -> Iterator[str]:
            for token in self._generator.tokens(prompt, self.images):
                yield decoder.push(token)
            yield decoder.flush()

        answer = ""
        try:
            for text in visible_text(pieces(), self.loaded.template.stop):
                # A template that ends a prompt with "Assistant:" leaves the space before the answer to the model.
                shown = text.lstrip() if not answer and self.loaded.template.kind == "dialogue" else text
                answer += shown
                if shown:
                    yield shown
        finally:
            self.turns.append(("assistant", answer.rstrip() if self.loaded.template.kind == "dialogue" else answer))

    def _prompt(self, turns: list[Turn]) -> tuple[list[int], int]:
        """The prompt in tokens, and how many of the oldest turns had to go for it to leave room for an answer."""
        template, tokenizer = self.loaded.template, self.loaded.tokenizer
        context = self.loaded.model.config.max_seq_len
        room = context - min(self._generator.sampling.max_new_tokens, context // 4)
        dropped = 0
        while True:
            ids = template.prompt_ids(tokenizer, turns[dropped:], self.system)
            # Without BOS and text there is nothing to go on from.
            ids = with_images(self.loaded, ids or [tokenizer.bos_id], len(self.images))
            if len(ids) <= room or (dropped >= len(turns) - 1 and len(ids) < context):
                return ids, dropped
            if dropped >= len(turns) - 1:
                raise UserError(f"the prompt has {len(ids)} tokens, the model's context is {context}", "shorten it")
            # A question goes with its answer.
            dropped += 2 if dropped + 1 < len(turns) and turns[dropped + 1][0] == "assistant" else 1


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


def generate(
    loaded: LoadedModel,
    prompt: str,
    *,
    system: str | None = None,
    images: Pixels = (),
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int | None = None,
    max_new_tokens: int = 512,
) -> str:
    """The model's answer to one prompt, in the format it was trained with; see `Sampling` for the arguments."""
    sampling = Sampling(temperature, top_p, seed, max_new_tokens)
    conversation = Conversation(loaded, sampling)
    conversation.system = system
    return "".join(conversation.ask(prompt, images))
