"""Questions and answers.

model = load_model("runs/alpaca")
print(generate(model, "Name three colors.", temperature=0))
"""

import time
from collections.abc import Generator, Sequence
from functools import partial
from itertools import pairwise, zip_longest
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.templates import Tools, Turn
from llama_acc.core.errors import UserError
from llama_acc.core.generate.engine import Engine, Pixels, Prompt, Reply
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.sampling import Sampler, Sampling, TokenLogprobs
from llama_acc.core.generate.service import Service
from llama_acc.core.tokenizer import StreamDecoder


def checked_text(text: str) -> str:
    """The text, if it can be encoded; a UserError where it holds half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode at character {error.start + 1}") from None
    return text


def check_length(loaded: LoadedModel, tokens: Sequence[int]) -> None:
    """Refuses a prompt that leaves no room for an answer in the model's context, with a UserError."""
    context = loaded.model.config.max_seq_len
    if len(tokens) >= context:
        raise UserError(
            f"the prompt has {len(tokens)} tokens, the model's context is {context}",
            "shorten it; chat takes a longer context with --context N",
        )


def insert_images(loaded: LoadedModel, tokens: list[int], count: int) -> list[int]:
    """A prompt with images right behind its BOS; each of their positions is a -1.

    Raises:
        UserError: the model takes none, or not so many.
    """
    if not count:
        return tokens
    if loaded.vision is None:
        raise UserError("this model takes no images: it was trained on text", "use one that was trained with vision")
    if loaded.vision.encoder == "clip" and count > 1:
        raise UserError("this model takes one image at a time", "leave the others out")
    begin = int(tokens[:1] == [loaded.tokenizer.bos_id])
    return tokens[:begin] + [-1] * (loaded.vision.positions * count) + tokens[begin:]


def encode_prompt(
    loaded: LoadedModel, turns: Sequence[Turn], images: int = 0, system: str | None = None, tools: Tools = ()
) -> Prompt:
    """A conversation up to where the model is to answer, in its prompt format.

    All images stand at its beginning, as in training. `system` None is the template's own.

    Raises:
        UserError: images a model does not take, or tools.
    """
    # Without BOS and text there is nothing to go on from.
    tokens = loaded.template.prompt_ids(loaded.tokenizer, turns, system, tools) or [loaded.tokenizer.bos_id]
    return Prompt(
        insert_images(loaded, tokens, images),
        spaces=loaded.template.spaces_left(turns),
        strip=loaded.template.kind == "dialogue",
        adapter=loaded.adapter,
    )


def encode_question(loaded: LoadedModel, question: str, images: int = 0) -> Prompt:
    """A single question in the model's prompt format, about so many images that are still to come.

    Raises:
        UserError: it leaves no room for an answer, or is not text; images a model does not take.
    """
    prompt = encode_prompt(loaded, [Turn("human", checked_text(question))], images)
    check_length(loaded, prompt.tokens)
    return prompt


class ShownToken(NamedTuple):
    """A token that the model was fed or wrote, for display."""

    token: int  # its id; -1: the positions of all images
    piece: str  # as the vocabulary writes it
    text: str  # what it adds to the text; empty for a part of a character, BOS or EOS
    special: bool  # BOS, or one that ends an answer
    is_reply: bool  # the model wrote it
    logprobs: TokenLogprobs | None  # of a reply's token, where `Sampling.logprobs` asks for them


class Conversation:
    """Questions and answers with the whole history in view."""

    def __init__(self, loaded: LoadedModel, sampling: Sampling, engine: Engine | Service | None = None) -> None:
        """`engine` is one that conversations with the same model share, a service where they are in several threads;
        None: it has its own."""
        self.loaded, self.engine = loaded, engine or Engine(loaded)
        self.turns: list[Turn] = []  # so far
        self.images: list[NDArray[np.uint8]] = []  # those in view
        self.system: str | None = None  # the system text; None = the template's own
        self.dropped_turns = 0  # how many of the oldest turns the last question had no room for
        # The last answer with the prompt it was given to, as far as it came; None: there is none.
        self.reply: Reply | None = None
        self.tokens_per_second: float | None = None  # of that answer, behind its first token; None: it has no more
        self.sampler = Sampler(sampling)  # of its answers

    def reset(self) -> None:
        """Forgets all turns and images."""
        self.turns, self.images, self.reply = [], [], None

    @property
    def last_question(self) -> str:
        """The text of the last question."""
        return self._to_last_question()[-1].text

    def ask(self, question: str, images: Pixels = (), replace_last: bool = False) -> Generator[str, None, None]:
        """The answer, piece by piece. The turns are kept, also of an answer that is not listened to till its end.

        `replace_last`: it takes the place of the last question and its answer; images in view stay.

        Raises:
            UserError: the question alone is longer than the model's context, or is not text; images a model does not
                take; there is nothing to replace. The conversation is unchanged.
        """
        turns = self._to_last_question()[:-1] if replace_last else self.turns
        return self._answer([*turns, Turn("human", checked_text(question))], [*self.images, *images])

    def retry(self) -> Generator[str, None, None]:
        """Another answer to the last question, in place of the one before; drawn with a seed of its own. See `ask`."""
        return self._answer(self._to_last_question(), self.images)

    def answer_last_of(self, other: "Conversation") -> Generator[str, None, None]:
        """This model's answer to the last question of a conversation with another one, with that history in view.
        See `ask`."""
        self.system = other.system
        return self._answer(other._to_last_question(), other.images)

    def token_view(self) -> list[ShownToken]:
        """What the model was fed for the last answer, and that answer, token by token."""
        if (reply := self.reply) is None:
            return []
        fed, written = reply.prompt.tokens, [*reply.tokens, *([] if reply.end_token is None else [reply.end_token])]
        once = [token for before, token in pairwise([0, *fed]) if token >= 0 or before >= 0]
        tokenizer, decoder = self.loaded.tokenizer, StreamDecoder(self.loaded.tokenizer)
        special, shown = {-1, tokenizer.bos_id, *tokenizer.end_ids}, []
        rows = [*((token, None) for token in once), *zip_longest(written, reply.logprobs)]
        for place, (token, logprobs) in enumerate(rows):
            piece = tokenizer.piece(token) if token >= 0 else f"<{fed.count(-1)} image positions>"
            shown.append(ShownToken(token, piece, decoder.push(token), token in special, place >= len(once), logprobs))
        return shown

    def to_item(self, images: Sequence[str]) -> dict[str, object]:
        """It as an item of a data file, with the paths of the images in view."""
        item: dict[str, object] = {"image": list(images)} if images else {}
        item |= {} if self.system is None else {"system": self.system}
        roles = {"human": "human", "assistant": "gpt"}
        item["conversations"] = [{"from": roles[turn.role], "value": turn.text} for turn in self.turns]
        return item

    def _to_last_question(self) -> list[Turn]:
        """The turns up to the last question."""
        asked = [place for place, turn in enumerate(self.turns) if turn.role == "human"]
        if not asked:
            raise UserError("there is no question yet")
        return self.turns[: asked[-1] + 1]

    def _answer(self, turns: list[Turn], images: list[NDArray[np.uint8]]) -> Generator[str, None, None]:
        """What the model says to these turns, the last of which is a question; from now on they are the history."""
        context = self.loaded.model.config.max_seq_len
        room = context - min(self.sampler.sampling.max_new_tokens, context // 4)
        dropped = 0  # of the oldest turns, until an answer has room
        encode = partial(encode_prompt, self.loaded, images=len(images), system=self.system)
        while len((prompt := encode(turns[dropped:])).tokens) > room and dropped < len(turns) - 1:
            # A question goes with its answer.
            dropped += 2 if turns[dropped + 1].role == "assistant" else 1
        check_length(self.loaded, prompt.tokens)
        self.turns, self.images, self.dropped_turns = turns[dropped:], images, dropped
        return self._stream(prompt._replace(images=images))

    def _stream(self, prompt: Prompt) -> Generator[str, None, None]:
        answer, first, later = "", 0.0, 0
        self.reply = self.tokens_per_second = None
        try:
            for reply, text in self.engine.generate([prompt], self.sampler):
                if self.reply is None:
                    self.reply, first = reply, time.monotonic()
                else:
                    later += 1
                    self.tokens_per_second = later / (time.monotonic() - first)
                answer += text
                if text:
                    yield text
        finally:
            self.turns.append(Turn("assistant", answer.rstrip() if prompt.strip else answer))


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
    conversation = Conversation(loaded, Sampling(temperature, top_p, seed, max_new_tokens))
    conversation.system = system
    return "".join(conversation.ask(prompt, images))
