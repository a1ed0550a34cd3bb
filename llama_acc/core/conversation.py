"""Questions and answers.

model = load_model("runs/alpaca")
print(generate(model, "Name three colours.", temperature=0))
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.templates import ChatTemplate, Template, Turn
from llama_acc.core.errors import UserError
from llama_acc.core.generation import Generator, Pixels, Sampling, checked_text, truncate_at_stop_strings, with_images
from llama_acc.core.inference import LoadedModel
from llama_acc.core.tokenizer import StreamDecoder, Tokenizer


class Conversation:
    """Questions and answers with the whole history in view.

    Attributes:
        turns: so far.
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
        prompt, dropped = self._prompt([*self.turns, Turn("human", question)])
        self.turns = [*self.turns[dropped:], Turn("human", question)]
        self.dropped_turns = dropped
        return self._answer(prompt, self.loaded.template.spaces_left(self.turns))

    def _answer(self, prompt: list[int], spaces: int) -> Iterator[str]:
        template, tokenizer = self.loaded.template, self.loaded.tokenizer
        answer = ""
        try:
            for text in displayed(self._generator.tokens(prompt, self.images), template, tokenizer, spaces):
                answer += text
                yield text
        finally:
            self.turns.append(Turn("assistant", answer.rstrip() if template.kind == "dialogue" else answer))

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
                raise UserError(
                    f"the prompt has {len(ids)} tokens, the model's context is {context}",
                    "shorten it, or say --context N",
                )
            # A question goes with its answer.
            dropped += 2 if dropped + 1 < len(turns) and turns[dropped + 1].role == "assistant" else 1


def displayed(
    tokens: Iterable[int], template: Template | ChatTemplate, tokenizer: Tokenizer, spaces: int = 0
) -> Iterator[str]:
    """The text of an answer as it is generated, up to where the prompt format ends it.

    Args:
        tokens: of the answer, without the one that ends it.
        template: the prompt format.
        tokenizer: the model's.
        spaces: so many at its beginning belong to the question (`Template.spaces_left`).
    """
    decoder, begun = StreamDecoder(tokenizer), False

    def pieces() -> Iterator[str]:
        for token in tokens:
            yield decoder.push(token)
        yield decoder.flush()

    for text in truncate_at_stop_strings(pieces(), template.text_stops(tokenizer), template.text_end(tokenizer)):
        # A template that ends a prompt with "Assistant:" leaves the space before the answer to the model.
        shown = text.lstrip() if not begun and template.kind == "dialogue" else text
        while spaces and not begun and shown.startswith(" "):
            shown, spaces = shown[1:], spaces - 1
        begun = begun or bool(shown)
        if shown:
            yield shown


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
