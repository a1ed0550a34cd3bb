"""The tuning methods: which parameters each adds to a LLaMA, and which of all it trains. Imports no torch.

The names and shapes are LLaMA2-Accessory's (its kinds `llama` and `llama_peft`), so its checkpoints are read and ours
are read there. On the seven matrices of a block, a method may put

    a bias        `<linear>.bias` [out], zero at the start
    a LoRA pair   `<linear>.lora_a.weight` [rank, in] and `<linear>.lora_b.weight` [out, rank] (arXiv:2106.09685):
                  lora_b(lora_a(x)) is added to the output, with no factor; lora_b is zero at the start
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_acc.core.errors import UserError, did_you_mean

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Method:
    """What a method adds and trains besides.

    Attributes:
        everything: it trains all parameters and adds none.
        bias: biases are added, and trained.
        norm: the norms' weights are trained.
        lora: LoRA pairs are added, and trained.
    """

    everything: bool = False
    bias: bool = False
    norm: bool = False
    lora: bool = False


METHODS = {
    "full": Method(everything=True),
    "bias_norm": Method(bias=True, norm=True),
    "lora": Method(lora=True),
    "lora_bias_norm": Method(bias=True, norm=True, lora=True),
}
_KEYS = ("lora_rank", "bias_tuning", "norm_tuning")


@dataclass(frozen=True)
class Tuning:
    """A method, and its size.

    Attributes:
        method: its name.
        lora_rank: rank of the LoRA pairs; 0 = there are none.
    """

    method: str = "full"
    lora_rank: int = 0

    @property
    def what(self) -> Method:
        """What the method does."""
        return METHODS[self.method]

    @property
    def has_bias(self) -> bool:
        """Whether the matrices of a block have a bias."""
        return self.what.bias

    def added_to(self, name: str, rows: int, columns: int) -> Shapes:
        """What is added to a matrix [rows, columns] of a block: names and shapes."""
        added: Shapes = {}
        if self.has_bias:
            added[f"{name}.bias"] = (rows,)
        if self.lora_rank:
            added[f"{name}.lora_a.weight"] = (self.lora_rank, columns)
            added[f"{name}.lora_b.weight"] = (rows, self.lora_rank)
        return added

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained."""
        what = self.what
        if what.everything:
            return True
        if name.endswith(".bias"):
            return what.bias
        if name.endswith("norm.weight"):
            return what.norm
        return what.lora and ".lora_" in name

    @property
    def llama_type(self) -> str:
        """LLaMA2-Accessory's name of the kind of model, for meta.json."""
        return "llama" if self.what.everything else "llama_peft"

    def to_arguments(self) -> dict[str, Any]:
        """LLaMA2-Accessory's arguments of the model, for config.json."""
        if self.what.everything:
            return {}
        return {
            "lora_rank": self.lora_rank or -1,
            "bias_tuning": self.what.bias,
            "norm_tuning": self.what.norm,
        }


FULL = Tuning()


def tuning_of(llama_type: str, arguments: Mapping[str, Any]) -> tuple[Tuning, dict[str, Any]]:
    """The tuning that a checkpoint's meta.json and config.json describe, and the arguments that are not about it.

    Raises:
        UserError: a kind, or a combination, that is not known.
    """
    rest = {key: value for key, value in arguments.items() if key not in _KEYS}
    if llama_type == "llama":
        return FULL, dict(arguments)
    if llama_type != "llama_peft":
        raise UserError(
            f"it is a checkpoint of kind '{llama_type}', which cannot be read", "known kinds: llama, llama_peft"
        )
    rank = arguments.get("lora_rank", -1)
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise UserError(f"lora_rank must be a whole number, not {rank!r}")
    # LLaMA2-Accessory's defaults.
    wanted = Method(
        bias=bool(arguments.get("bias_tuning", True)),
        norm=bool(arguments.get("norm_tuning", True)),
        lora=rank > 0,
    )
    for name, method in METHODS.items():
        if method == wanted:
            return Tuning(name, max(rank, 0)), rest
    what = {"bias_tuning": wanted.bias, "norm_tuning": wanted.norm, "lora_rank": rank}
    raise UserError(f"no tuning method has {what}")


def check_tuning(tuning: Tuning, widths: Mapping[str, int]) -> None:
    """Refuses what a method cannot be.

    Args:
        tuning: the method and its size.
        widths: the model's widths by what they are called.

    Raises:
        UserError: an unknown method, or a rank above a dimension.
    """
    if tuning.method not in METHODS:
        hint = did_you_mean(tuning.method, METHODS) or f"known: {', '.join(METHODS)}"
        raise UserError(f"unknown tuning method '{tuning.method}'", hint)
    name, least = min(widths.items(), key=lambda item: item[1])
    if tuning.lora_rank > least:
        raise UserError(f"tuning.lora_rank ({tuning.lora_rank}) is larger than {name} ({least})", "lower it")
