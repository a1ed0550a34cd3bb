"""How long items are in tokens, and what `data.max_tokens` makes of them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_acc.core.data.checks import fields_of, merged_finding
from llama_acc.core.data.encode import documents
from llama_acc.core.data.findings import Finding, beginning
from llama_acc.core.data.items import Item
from llama_acc.core.data.survey import Findings
from llama_acc.core.data.templates import PromptFormat
from llama_acc.core.tokenizer import Tokenizer


class Truncation:
    """Counts the tokens of items as the model would see them, and what is lost of them."""

    def __init__(
        self,
        template: PromptFormat,
        tokenizer: Tokenizer,
        max_tokens: int | None,
        findings: Findings,
        image_positions: int = 0,
    ) -> None:
        """Args:
        template: the prompt format.
        tokenizer: the model's.
        max_tokens: where documents are cut; None: nowhere.
        findings: where the items that are cut or dropped are told.
        image_positions: how many places an image takes; they stand in front of the text.
        """
        self._template, self._tokenizer, self._findings = template, tokenizer, findings
        self._image_positions = image_positions
        self.max_tokens = max_tokens
        self.lengths: Counter[int] = Counter()
        """How many items have so many tokens, uncut."""
        self.tokens = self.label_tokens = 0
        """Of what is left of the items: all, and those that are trained."""
        self.cut = self.cut_tokens = self.cut_labels = 0
        """Items that are cut, and what they lose: tokens, trained tokens."""
        self.no_reply = self.no_room = 0
        """Items dropped: they have nothing to be trained; their prompt leaves no room for it."""

    @property
    def items(self) -> int:
        """All that were measured."""
        return self.lengths.total()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "max_tokens": self.max_tokens,
            "tokens": self.tokens,
            "label_tokens": self.label_tokens,
            "truncated": self.cut,
            "truncated_tokens": self.cut_tokens,
            "truncated_label_tokens": self.cut_labels,
            "dropped": self.no_reply + self.no_room,
            "dropped_without_reply": self.no_reply,
            "dropped_without_room": self.no_room,
        }

    def add(self, items: Sequence[tuple[str, Item]]) -> None:
        """Measure some items, given with their places."""
        encoded = documents([item for _, item in items], self._template, self._tokenizer)
        for (where, item), (tokens, labelled, merged) in zip(items, encoded, strict=True):
            labelled[:1] = False  # nothing predicts it
            if merged:
                self._findings.add(merged_finding(item, where, self._template))
            places = self._image_positions * len(item.images)
            self.lengths[places + len(tokens)] += 1
            self._count(where, item, places + len(tokens), places + np.flatnonzero(labelled))

    def _count(self, where: str, item: Item, length: int, trained: Any) -> None:
        """`trained`: positions of the trained tokens."""
        most = length if self.max_tokens is None else self.max_tokens
        kept = int(np.searchsorted(trained, most))
        if not len(trained):
            self.no_reply += 1
            self._tell("no_label", where, item, "nothing in it is trained: it has no reply that is to be")
        elif not kept:
            self.no_room += 1
            message = f"the first trained token is number {trained[0] + 1:,}, and only {most:,} are kept"
            self._tell("no_label", where, item, message)
        else:
            self.tokens += min(length, most)
            self.label_tokens += kept
        if kept and length > most:
            lost = len(trained) - kept
            self.cut += 1
            self.cut_tokens += length - most
            self.cut_labels += lost
            message = f"{length:,} tokens: the last {length - most:,} are cut, {lost:,} of them trained"
            self._tell("cut", where, item, message)

    def _tell(self, kind: str, where: str, item: Item, message: str) -> None:
        name, text = next(fields_of(item))
        self._findings.add(Finding(kind, where, name, message, beginning(text)))
