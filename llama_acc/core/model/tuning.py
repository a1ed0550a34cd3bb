"""The tuning methods: which parameters each adds to a LLaMA, and which of all it trains. Imports no torch.

The names and shapes are LLaMA2-Accessory's (its kinds `llama`, `llama_peft` and `llama_adapter`), so its checkpoints
are read and ours are read there. To the matrices of a block, a method may add

    a bias        `<linear>.bias` [out], zero at the start
    a LoRA pair   `<linear>.lora_a.weight` [rank, in] and `<linear>.lora_b.weight` [out, rank] (arXiv:2106.09685):
                  lora_b(lora_a(x)) is added to the output, with no factor; lora_b is zero at the start

and to the model, for zero-init attention (LLaMA-Adapter, arXiv:2303.16199) in its last `prefix_layers` blocks,

    prefix           [prefix_layers, 1, prefix_len, dim], normal at the start: what queries attend to besides
    prefix_gate      [prefix_layers, n_heads], zero at the start: its tanh is the factor on that in each head
    prefix_new_gate  [prefix_layers], one at the start: a second factor, if there is one
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from llama_acc.core.errors import UserError, did_you_mean

Shapes = dict[str, tuple[int, ...]]
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
"""The matrices of a block."""


@dataclass(frozen=True)
class Method:
    """What a method adds and trains besides.

    Attributes:
        everything: it trains all parameters and adds none.
        bias: the matrices that get a bias, which is trained.
        norm: the norms' weights are trained.
        lora: rank of the LoRA pairs where none is asked for, which are trained; 0 = none; None = it cannot have any.
        prefix: it has zero-init attention, whose parameters are trained.
    """

    everything: bool = False
    bias: tuple[str, ...] = ()
    norm: bool = False
    lora: int | None = None
    prefix: bool = False


METHODS = {
    "full": Method(everything=True),
    "bias_norm": Method(bias=MATRICES, norm=True),
    "lora": Method(lora=16),
    "lora_bias_norm": Method(bias=MATRICES, norm=True, lora=16),
    # Keys and values are also made of the prefix, where LLaMA2-Accessory has no biases.
    "adapter": Method(bias=("wq", "wo", "w1", "w2", "w3"), norm=True, lora=0, prefix=True),
    # Only what vision adds is trained.
    "frozen": Method(),
}
PREFIX_LENGTH = 10
_KEYS = ("lora_rank", "bias_tuning", "norm_tuning", "prefix_layers", "prefix_len", "use_prefix_new_gate")


class Added(NamedTuple):
    """What is added to one matrix.

    Attributes:
        bias: whether it has a bias.
        rank: of its LoRA pair; 0 = it has none.
    """

    bias: bool = False
    rank: int = 0


NOTHING = Added()


@dataclass(frozen=True)
class Tuning:
    """A method, and its size.

    Attributes:
        method: its name.
        lora_rank: rank of the LoRA pairs; 0 = there are none.
        prefix_layers: how many blocks, the last ones, have zero-init attention; 0 = none.
        prefix_len: how many vectors their queries attend to besides; 0 = none.
        prefix_new_gate: whether there is the second gate.
    """

    method: str = "full"
    lora_rank: int = 0
    prefix_layers: int = 0
    prefix_len: int = 0
    prefix_new_gate: bool = False

    @property
    def what(self) -> Method:
        """What the method does."""
        return METHODS[self.method]

    def on(self, matrix: str) -> Added:
        """What is added to a matrix of a block, by its last name: wq."""
        return Added(matrix in self.what.bias, self.lora_rank)

    def added_to(self, name: str, rows: int, columns: int) -> Shapes:
        """Names and shapes of what is added to a matrix [rows, columns] of a block."""
        added: Shapes = {}
        bias, rank = self.on(name.rpartition(".")[2])
        if bias:
            added[f"{name}.bias"] = (rows,)
        if rank:
            added[f"{name}.lora_a.weight"] = (rank, columns)
            added[f"{name}.lora_b.weight"] = (rows, rank)
        return added

    def added_to_model(self, dim: int, n_heads: int) -> Shapes:
        """Names and shapes of what is added to the model as a whole."""
        if not self.what.prefix:
            return {}
        added: Shapes = {
            "prefix": (self.prefix_layers, 1, self.prefix_len, dim),
            "prefix_gate": (self.prefix_layers, n_heads),
        }
        return added | ({"prefix_new_gate": (self.prefix_layers,)} if self.prefix_new_gate else {})

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained."""
        what = self.what
        if what.everything:
            return True
        if name.endswith(".bias"):
            return bool(what.bias)
        if name.endswith("norm.weight"):
            return what.norm
        return ".lora_" in name or name.startswith("prefix")

    def at_depth(self, n_layers: int) -> "Tuning":
        """The same with a prefix in every block, if it is not said in how many."""
        return replace(self, prefix_layers=self.prefix_layers or n_layers) if self.what.prefix else self

    @property
    def adds(self) -> bool:
        """Whether the method adds parameters."""
        return not self.what.everything and self.what != Method()

    @property
    def llama_type(self) -> str:
        """LLaMA2-Accessory's name of the kind of model, for meta.json."""
        return "llama_adapter" if self.what.prefix else "llama_peft" if self.adds else "llama"

    def to_arguments(self) -> dict[str, Any]:
        """LLaMA2-Accessory's arguments of the model, for config.json."""
        if not self.adds:
            return {}
        arguments: dict[str, Any] = {"lora_rank": self.lora_rank or -1, "bias_tuning": bool(self.what.bias)}
        if not self.what.prefix:
            return arguments | {"norm_tuning": self.what.norm}
        return arguments | {
            "prefix_layers": self.prefix_layers,
            "prefix_len": self.prefix_len,
            "use_prefix_new_gate": self.prefix_new_gate,
        }

    def to_keys(self) -> str:
        """The recipe's keys that ask for it."""
        keys = {"method": self.method, "lora_rank": self.lora_rank, "prefix_layers": self.prefix_layers}
        keys |= {"prefix_len": self.prefix_len, "prefix_new_gate": str(self.prefix_new_gate).lower()}
        has = self.what
        wanted = ["method"] + (["lora_rank"] if has.lora is not None else [])
        wanted += ["prefix_layers", "prefix_len", "prefix_new_gate"] if has.prefix else []
        return " ".join(f"tuning.{key}={keys[key]}" for key in wanted)


FULL = Tuning()


def tuning_of(llama_type: str, arguments: Mapping[str, Any]) -> tuple[Tuning, dict[str, Any]]:
    """The tuning that a checkpoint's meta.json and config.json describe, and the arguments that are not about it.

    Raises:
        UserError: a kind, a value or a combination that is not known.
    """
    rest = {key: value for key, value in arguments.items() if key not in _KEYS}
    if llama_type in ("llama", "llama_qformerv2"):
        return FULL, dict(arguments)
    # What is absent has LLaMA2-Accessory's defaults.
    rank = max(_whole_number(arguments, "lora_rank", -1), 0)
    has_bias = bool(arguments.get("bias_tuning", True))
    if llama_type == "llama_adapter":
        if not has_bias:
            raise UserError("zero-init attention without biases (bias_tuning) is not known")
        layers = _whole_number(arguments, "prefix_layers", 0)
        length = _whole_number(arguments, "prefix_len", 30)
        new_gate = bool(arguments.get("use_prefix_new_gate", False))
        return Tuning("adapter", rank, layers, length, new_gate), rest
    if llama_type not in ("llama_peft", "llama_qformerv2_peft"):
        raise UserError(
            f"it is a checkpoint of kind '{llama_type}', which cannot be read",
            "known kinds: llama, llama_peft, llama_adapter, llama_qformerv2, llama_qformerv2_peft",
        )
    has_norm = bool(arguments.get("norm_tuning", True))
    for name, method in METHODS.items():
        if (bool(method.bias), method.norm, bool(method.lora), method.prefix) == (has_bias, has_norm, rank > 0, False):
            return Tuning(name, rank), rest
    raise UserError(f"no tuning method has bias_tuning {has_bias}, norm_tuning {has_norm}, lora_rank {rank}")


def _whole_number(arguments: Mapping[str, Any], key: str, default: int) -> int:
    value = arguments.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{key} must be a whole number, not {value!r:.40}")
    if value > 2**20:
        raise UserError(f"{key}: {value!r:.40} is that of no model")
    return value


def merged_tuning(tuning: Tuning) -> Tuning:
    """What is left of a method when its LoRA pairs are merged into the matrices.

    Raises:
        UserError: zero-init attention, which is no matrix.
    """
    if tuning.what.prefix:
        raise UserError(
            "zero-init attention cannot be merged: what it adds to attention depends on the queries",
            "use the checkpoint as it is",
        )
    return Tuning("bias_norm") if tuning.what.bias else FULL


def check_tuning(tuning: Tuning, widths: Mapping[str, int], n_layers: int) -> None:
    """Refuses what a method cannot be.

    Args:
        tuning: the method and its size.
        widths: the model's widths by what they are called.
        n_layers: the model's number of blocks.

    Raises:
        UserError: an unknown method, a rank above a dimension, more prefix layers than layers.
    """
    if tuning.method not in METHODS:
        hint = did_you_mean(tuning.method, METHODS) or f"known: {', '.join(METHODS)}"
        raise UserError(f"unknown tuning method '{tuning.method}'", hint)
    name, least = min(widths.items(), key=lambda item: item[1])
    if tuning.lora_rank > least:
        raise UserError(f"tuning.lora_rank ({tuning.lora_rank}) is larger than {name} ({least})", "lower it")
    if tuning.prefix_layers > n_layers:
        raise UserError(
            f"tuning.prefix_layers ({tuning.prefix_layers}) is more than the model's layers ({n_layers})", "lower it"
        )
