"""Questions and answers.

model = load_model("runs/alpaca")
print(generate(model, "Name three colors.", temperature=0))
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.templates import Turn
from llama_acc.core.errors import UserError
from llama_acc.core.generate.engine import Engine, Pixels, Prompt
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.sampling import Sampler, Sampling


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


def encode_prompt(loaded: LoadedModel, turns: Sequence[Turn], images: int = 0, system: str | None = None) -> Prompt:
    """A conversation up to where the model is to answer, in its prompt format.

    All images stand at its beginning, as in training. `system` None is the template's own.

    Raises:
        UserError: images a model does not take.
    """
    # Without BOS and text there is nothing to go on from.
    tokens = loaded.template.prompt_ids(loaded.tokenizer, turns, system) or [loaded.tokenizer.bos_id]
    return Prompt(
        insert_images(loaded, tokens, images),
        spaces=loaded.template.spaces_left(turns),
        strip=loaded.template.kind == "dialogue",
    )


def encode_question(loaded: LoadedModel, question: str, images: int = 0) -> Prompt:
    """A single question in the model's prompt format, about so many images that are still to come.

    Raises:
        UserError: it leaves no room for an answer, or is not text; images a model does not take.
    """
    prompt = encode_prompt(loaded, [Turn("human", checked_text(question))], images)
    check_length(loaded, prompt.tokens)
    return prompt


class Conversation:
    """Questions and answers with the whole history in view.

    Attributes:
        turns: so far.
        images: those in view.
        system: the system text; None = the template's own.
        dropped_turns: how many of the oldest turns the last question had no room for.
    """

    def __init__(self, loaded: LoadedModel, sampling: Sampling) -> None:
        self.loaded = loaded
        self.turns: list[Turn] = []
        self.images: list[NDArray[np.uint8]] = []
        self.system: str | None = None
        self.dropped_turns = 0
        self._engine, self._sampler = Engine(loaded), Sampler(sampling)

    def reset(self) -> None:
        """Forgets all turns and images."""
        self.turns, self.images = [], []

    def ask(self, question: str, images: Pixels = ()) -> Iterator[str]:
        """The answer, piece by piece. The turns are kept, also of an answer that is not listened to till its end.

        Raises:
            UserError: the question alone is longer than the model's context, or is not text; images a model does not
                take.
        """
        turns = [*self.turns, Turn("human", checked_text(question))]
        images = [*self.images, *images]
        context = self.loaded.model.config.max_seq_len
        room = context - min(self._sampler.sampling.max_new_tokens, context // 4)
        dropped = 0  # of the oldest turns, until an answer has room
        while len((prompt := self._prompt(turns[dropped:], images)).tokens) > room and dropped < len(turns) - 1:
            # A question goes with its answer.
            dropped += 2 if turns[dropped + 1].role == "assistant" else 1
        check_length(self.loaded, prompt.tokens)
        self.turns, self.images, self.dropped_turns = turns[dropped:], images, dropped
        return self._answer(prompt)

    def _prompt(self, turns: Sequence[Turn], images: Pixels) -> Prompt:
        return encode_prompt(self.loaded, turns, len(images), self.system)._replace(images=images)

    def _answer(self, prompt: Prompt) -> Iterator[str]:
        answer = ""
        try:
            for _, text in self._engine.generate([prompt], self._sampler):
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
