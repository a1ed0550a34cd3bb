"""How the tokens of a reply are chosen from logits: settings, penalties, drawing by a seed, and what a grammar allows.

What may follow in an answer that is JSON the library llguidance (the extra `serve`) finds out while it is generated: no
schema takes long to begin with, and it may be recursive. outlines-core makes an automaton of a schema first (32,000
tokens, any object: 73 s, where llguidance takes 0.1 s), and schemas only nest to a fixed depth.

Shapes: V vocabulary.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_acc.core.errors import RunError, UserError

if TYPE_CHECKING:
    from llama_acc.core.generate.load import LoadedModel

# A temperature so low leaves one token anyway, and logits divided by less would overflow.
_GREEDY_BELOW = 1e-6
# So large one may be, whatever is added or taken: divided by a temperature it is a number still.
_MOST_LOGIT = 1e30
# Tokens that are put in order for top_p, if these are enough.
_SORTED = 512
JSON_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of any object."""
# Between a document's parts: a model that may write more of it never ends.
_SPACE = {"whitespace_pattern": r"\n? {0,16}"}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many at most.

    Of the tokens in the order of their probability, softmax(logits / temperature), `top_k`, then `top_p` and `min_p`
    say how many are drawn from. Penalties, biases and `logprobs` are those of vLLM and OpenAI's API.
    """

    temperature: float = 0.7  # 0 takes the likeliest token
    top_p: float = 0.9  # only the likeliest tokens that together reach this probability are drawn from
    seed: int | None = None  # of the generator; None = a new one each time
    max_new_tokens: int = 512
    top_k: int = 0  # only so many of the likeliest are drawn from; 0 = all
    min_p: float = 0.0  # only tokens of at least this part of the likeliest one's probability are drawn from
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or reply are divided by it, or multiplied where negative."""
    presence_penalty: float = 0.0  # is subtracted from the logits of tokens in the reply
    frequency_penalty: float = 0.0  # is subtracted as often as a token is in the reply
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # is added to the logits of these tokens
    stop: Sequence[str] = ()  # strings before which a reply ends, besides the prompt format's
    stop_ids: Sequence[int] = ()  # tokens that end a reply, besides the tokenizer's
    logprobs: int | None = None
    """Of each token so many of the likeliest are kept, with the logarithms of their probabilities and its own, by the
    model's logits alone; None = nothing is kept."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"the temperature must be 0 or above, not {self.temperature}", "0 is greedy, 1 the model's")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, not {self.top_p}", "1 draws from all tokens")
        if self.top_k < 0:
            raise UserError(f"top-k must be 0 or above, not {self.top_k}", "0 draws from all tokens")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p must be from 0 to 1, not {self.min_p}", "0 draws from all tokens")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"the repetition penalty must be above 0, not {self.repetition_penalty}", "1 is none")
        numbers = (self.presence_penalty, self.frequency_penalty, *self.logit_bias.values())
        if not all(map(math.isfinite, numbers)):
            raise UserError("penalties and biases of logits must be numbers", "-100 rules a token out, 100 asks for it")
        if "" in self.stop:
            raise UserError("a stop string has no characters")
        if self.max_new_tokens < 1:
            raise UserError(f"at least 1 new token must be allowed, not {self.max_new_tokens}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise UserError(f"the seed must fit in 64 bits, but is {self.seed}")

    @property
    def changes_logits(self) -> bool:
        """Whether a token's logit depends on more than the model."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias)


class TokenLogprobs(NamedTuple):
    """The logarithm of a token's probability, and those of the likeliest tokens in its place."""

    own: float
    top: list[tuple[int, float]]


class Sampler:
    """Chooses the tokens of a reply, which follow from its seed, whatever else is generated."""

    def __init__(self, sampling: Sampling, grammar: "JsonGrammar | None" = None) -> None:
        self.sampling, self.grammar = sampling, grammar
        self.is_argmax = sampling.temperature < _GREEDY_BELOW and not sampling.changes_logits and grammar is None
        self._random = torch.Generator(device="cpu")
        self._random.manual_seed(self._random.seed() if sampling.seed is None else sampling.seed)
        self._counts = Counter[int]()

    @property
    def is_free(self) -> bool:
        """Whether its tokens depend on nothing but logits and random numbers, so that `draw` may choose them."""
        return self.grammar is None and self.sampling.logprobs is None and not self.sampling.changes_logits

    def numbers(self) -> tuple[float, ...]:
        """What `draw` is told for the next token."""
        sampling = self.sampling
        if sampling.temperature < _GREEDY_BELOW:
            return 1.0, 1.0, 1.0, 0.0, 0.0
        drawn = float(torch.rand((), generator=self._random, dtype=torch.float64))
        return sampling.temperature, sampling.top_k or math.inf, sampling.top_p, sampling.min_p, drawn

    def spawn(self) -> "Sampler":
        """A sampler for another reply: with the same settings and grammar, and a seed of its own, the next that follows
        from this one's."""
        seed = int(torch.randint(2**63 - 1, (), generator=self._random))
        return Sampler(replace(self.sampling, seed=seed), None if self.grammar is None else self.grammar.fresh())

    def __call__(self, logits: Tensor, prompt: Sequence[int] = ()) -> int:
        """The next token, out of [V] logits, after a prompt and the tokens chosen before."""
        if self.is_argmax:
            return int(logits.argmax())
        # On the CPU, so that a seed gives the same answer on every device with the same logits.
        logits = logits.cpu()
        if self.sampling.changes_logits:
            logits = self._changed(logits.clone(), prompt)
        if self.grammar is not None:
            logits = logits.masked_fill(~self.grammar.allowed(), -math.inf)
        token = int(logits.argmax()) if self.sampling.temperature < _GREEDY_BELOW else self._drawn(logits)
        self._counts[token] += 1
        if self.grammar is not None:
            self.grammar.advance(token)
        return token

    def _changed(self, logits: Tensor, prompt: Sequence[int]) -> Tensor:
        """With biases and penalties, in place."""
        sampling, counts = self.sampling, self._counts
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(sorted({*counts, *prompt} - {-1}))
            values = logits[seen]
            logits[seen] = torch.where(
                values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
            )
        if counts:
            often = torch.tensor(list(counts.values()), dtype=logits.dtype)
            logits[list(counts)] -= sampling.presence_penalty + sampling.frequency_penalty * often
        if sampling.logit_bias:
            logits[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()))
        return logits.clamp_(-_MOST_LOGIT, _MOST_LOGIT)

    def _drawn(self, logits: Tensor) -> int:
        sampling = self.sampling
        probabilities = torch.softmax(logits / sampling.temperature, -1)
        if sampling.top_p == 1 and not sampling.top_k and not sampling.min_p:
            return self._pick(probabilities)
        ordered, order = probabilities.topk(min(sampling.top_k or _SORTED, len(probabilities)))
        if not sampling.top_k and sampling.top_p > ordered.sum():
            ordered, order = probabilities.sort(descending=True, stable=True)
        share = ordered / ordered.sum() if sampling.top_k else ordered
        # Keep a token if those before it have not yet reached top_p.
        kept = (share.cumsum(-1) - share < sampling.top_p) & (ordered >= sampling.min_p * ordered[0])
        kept[0] = True  # a top_p that float32 rounds to 0 is above 0
        return int(order[self._pick(ordered[kept])])

    def _pick(self, weights: Tensor) -> int:
        """The place of a weight, drawn with a probability in proportion to it: one random number for each token."""
        reached = weights.cumsum(-1, dtype=torch.float64)
        drawn = torch.rand((), generator=self._random, dtype=torch.float64) * reached[-1]
        place = int(torch.searchsorted(reached, drawn, right=True))
        return place if place < len(weights) else int(weights.argmax())  # rounded up to the sum


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """The tokens [B] that samplers choose out of logits [B, V], where these are: the host waits for no number of them.

    `numbers` [5, B], float64: temperature, top_k, top_p, min_p, and a random number from 0 to 1.
    """
    temperature, top_k, top_p, min_p, drawn = numbers[:, :, None]
    probabilities = torch.softmax(logits / temperature.float(), -1)
    places = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape)
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(places >= top_k, 0.0)
    share = ordered / ordered.sum(-1, keepdim=True)
    kept = (share.cumsum(-1) - share < top_p) & (ordered >= min_p * ordered[:, :1]) | (places == 0)
    # What nothing is left out of is drawn from in the vocabulary's order, as on a CPU.
    is_whole = (top_k == math.inf) & (top_p == 1) & (min_p == 0)
    weights, order = torch.where(is_whole, probabilities, ordered * kept), torch.where(is_whole, places, order)
    reached = weights.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(reached, drawn * reached[:, -1:], right=True)
    place = torch.where(place < logits.shape[1], place, weights.argmax(-1, keepdim=True))  # rounded up to the sum
    return order.gather(-1, place)[:, 0]


def logprobs_of(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of a token out of [V] logits."""
    logs = torch.log_softmax(logits, -1)
    values, tokens = logs.topk(min(count, len(logs)))
    return TokenLogprobs(float(logs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True)))


# Answers that are JSON


class JsonGrammars:
    """Makes grammars for a model's tokens; reading its vocabulary takes a second or more, so it is done once."""

    def __init__(self, loaded: "LoadedModel") -> None:
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
    """What the text of a reply must be, token by token."""

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
