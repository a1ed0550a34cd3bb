"""Answers that are JSON: what may follow, token by token, by the library llguidance (the extra `serve`).

It finds out what is allowed while an answer is generated: no schema takes long to begin with, and it may be recursive.
outlines-core makes an automaton of a schema first (32,000 tokens, any object: 73 s, where llguidance takes 0.1 s), and
schemas only nest to a fixed depth.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_acc.core.errors import RunError, UserError
from llama_acc.core.generate.load import LoadedModel

JSON_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of any object."""
# Between a document's parts: a model that may write more of it never ends.
_SPACE = {"whitespace_pattern": r"\n? {0,16}"}


class JsonGrammars:
    """Makes grammars for a model's tokens; reading its vocabulary takes a second or more, so it is done once."""

    def __init__(self, loaded: LoadedModel) -> None:
        """A UserError if llguidance is not installed."""
        try:
            import llguidance
        except ImportError:
            raise UserError("JSON answers need llguidance", "pip install 'llama-acc[serve]'") from None
        tokenizer, self._rows = loaded.tokenizer, loaded.model.config.vocab_size
        vocabulary = json.dumps(tokenizer.to_json())
        self._matcher: Any = llguidance.LLMatcher
        self._tokens: Any = llguidance.LLTokenizer(vocabulary, n_vocab=self._rows, eos_token=sorted(tokenizer.end_ids))

    def of_schema(self, schema: Mapping[str, Any] = JSON_OBJECT) -> "JsonGrammar":
        """The grammar of one answer, which is JSON of this schema and ends behind it.

        Raises:
            UserError: the schema is wrong, or has what llguidance does not know.
        """
        grammar = self._matcher.grammar_from_json_schema(json.dumps(schema), defaults=_SPACE)
        matcher = self._matcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"the JSON schema cannot be used: {matcher.get_error()}")
        return JsonGrammar(matcher, self._rows)


class JsonGrammar:
    """What the text of a reply must be; see `engine.Grammar`."""

    def __init__(self, matcher: Any, rows: int) -> None:
        """`matcher` stays at the beginning of an answer."""
        self._beginning, self._matcher, self._rows = matcher, matcher.deep_copy(), rows

    def fresh(self) -> "JsonGrammar":
        """The same for another answer."""
        return JsonGrammar(self._beginning, self._rows)

    def allowed(self) -> Tensor:
        """Which tokens may follow, booleans [V]. A RunError where the grammar takes more than llguidance allows."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise RunError(f"the JSON schema cannot be followed any further: {self._matcher.get_error()}")
        return torch.from_numpy(np.unpackbits(mask, count=self._rows, bitorder="little").astype(bool))

    def advance(self, token: int) -> None:
        """Takes the next token."""
        if not self._matcher.consume_token(token):
            raise RunError(f"the JSON schema cannot be followed any further: {self._matcher.get_error()}")
