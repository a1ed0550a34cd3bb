"""Dialogues that are too long, in parts."""

from collections import Counter

from llama_acc.core.data import templates
from llama_acc.core.data.convert.turns import Exchanges, Turn
from llama_acc.core.data.templates import TEMPLATES
from llama_acc.core.tokenizer import Tokenizer

_ROLES = {"human": "human", "gpt": "assistant"}


class Splitter:
    """Cuts between a reply and the next question, so that a part fits; each part takes as many exchanges as do."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, notes: Counter[str]) -> None:
        """Args:
        tokenizer: the model's.
        max_tokens: of a part in the prompt format `dialogue`, with BOS and EOS.
        notes: counts what was done.
        """
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._notes = notes
        self._template = TEMPLATES["dialogue"]

    def parts(self, dialogue: Exchanges) -> list[Exchanges]:
        """The parts in order, each with the system text; an exchange that is too long is a part of its own."""
        system, turns = dialogue
        exchanges = [turns[place : place + 2] for place in range(0, len(turns), 2)]
        parts = []
        while exchanges:
            count = self._fitting(exchanges, system)
            parts.append(Exchanges(system, [turn for exchange in exchanges[:count] for turn in exchange]))
            exchanges = exchanges[count:]
        if len(parts) > 1:
            self._notes[f"dialogues of more than {self._max_tokens:,} tokens were split"] += 1
        return parts

    def _fitting(self, exchanges: list[list[Turn]], system: str) -> int:
        """How many of the first exchanges fit, at least one: by halving, as each choice is counted as a whole."""
        if self._fits(exchanges, system):
            return len(exchanges)
        fits, too_many = 0, len(exchanges)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self._fits(exchanges[:middle], system):
                fits = middle
            else:
                too_many = middle
        if fits == 0:
            self._notes[f"single exchanges have more than {self._max_tokens:,} tokens, and would be cut"] += 1
        return max(fits, 1)

    def _fits(self, exchanges: list[list[Turn]], system: str) -> bool:
        return self._tokens(exchanges, system) <= self._max_tokens

    def _tokens(self, exchanges: list[list[Turn]], system: str) -> int:
        turns = [templates.Turn(_ROLES[role], text) for exchange in exchanges for role, text, _ in exchange]
        text, own, *_ = self._template.dialogue_text(turns, system or None)
        return len(self._tokenizer.encode_batch([text], [own])[0]) + self._template.bos + self._template.eos
