"""The tuning methods. A method is one file of this folder: a frozen dataclass that derives from `Tuning`.

Its fields are the keys `tuning.KEY` of a recipe. It says what it adds to a LLaMA and what trains (`attach`), what is
left when it is merged (`merged`, `merge`), and what it is called in LLaMA2-Accessory's and PEFT's files. The names and
shapes of what it adds sit on the parameters it creates, so its checkpoints are written, read, split over ranks and
counted without another file knowing of it. Here are the two methods that add nothing. Imports no torch: a recipe is
read without it.
"""

import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from llama_acc.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llama_acc.core.model.layers import Linear
    from llama_acc.core.model.transformer import Transformer

MatrixName = Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
MATRICES: tuple[MatrixName, ...] = get_args(MatrixName)
"""The matrices of a block."""
METHODS: "dict[str, type[Tuning]]" = {}
"""Every known method by its name."""


@dataclass(frozen=True)
class Tuning:
    """What all methods have; what is not overridden is that of a method which adds nothing."""

    method: ClassVar[str]  # its name in a recipe
    trains_all: ClassVar[bool] = False  # it trains every parameter of the LLaMA
    llama_type: ClassVar[str] = "llama"  # LLaMA2-Accessory's name of the kind of model, for meta.json
    can_merge: ClassVar[bool] = True  # what it adds can be merged into the LLaMA's matrices, or is a bias
    peft_names: ClassVar[Mapping[str, str]] = {}
    """What comes after a matrix's name in its parameters' names, here and in PEFT's files."""

    @property
    def peft_bias_factor(self) -> float:
        """PEFT multiplies biases by this."""
        return 1.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls):
            METHODS[cls.method] = cls

    def with_num_layers(self, n_layers: int) -> "Tuning":
        """The same for a model of so many blocks, where a setting depends on that."""
        return self

    def check(self, widths: Mapping[str, int], n_layers: int) -> None:
        """Refuses settings that do not go with a model of these widths, by what they are called, and so many blocks."""

    def attach(self, model: "Transformer") -> None:
        """Adds the method's parameters to a LLaMA on the meta device. Those of the LLaMA are frozen, if the method
        does not train all; what is to train besides is unfrozen here, what is added trains."""

    def merged(self) -> "Tuning":
        """What is left of the method when `merge` is done to every matrix.

        Raises:
            UserError: what it adds cannot be merged.
        """
        return FULL

    def merge(self, rows: "Tensor", first: int, added: "Mapping[str, Tensor]") -> "Tensor":
        """Rows of a matrix with what the method has added to it.

        Args:
            rows: [R, in], float32, of a matrix [out, in]; they may be changed in place.
            first: the number of the first of them.
            added: the matrix's parameters besides `weight`, whole and float32, such as `lora_a.weight`.
        """
        return rows

    def to_arguments(self) -> dict[str, Any]:
        """LLaMA2-Accessory's arguments of the model, for config.json."""
        return asdict(self)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "Tuning | None":
        """The method with the settings that config.json says, of a checkpoint of its `llama_type`, if it is this one.

        Raises:
            UserError: a value or a combination that is not known.
        """
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def peft_config(self) -> dict[str, Any]:
        """What it adds to PEFT's adapter_config.json."""
        raise UserError(f"method {self.method} has no LoRA pairs, which is what a PEFT adapter is", "use --to hf")

    def to_keys(self, beside: "Tuning") -> str:
        """The recipe's keys that ask for it; without those that have their default here and `beside`."""
        usual, values = type(self)(), {"method": self.method}
        for key, value in asdict(self).items():
            if not value == getattr(usual, key) == getattr(beside, key, value):
                values[key] = json.dumps(value, separators=(",", ":")).replace('"', "")
        return " ".join(f"tuning.{key}={value}" for key, value in values.items())


@dataclass(frozen=True)
class Full(Tuning):
    """Every parameter trains."""

    method = "full"
    trains_all = True


FULL: Tuning = Full()


def tuning_of(llama_type: str, arguments: Mapping[str, Any]) -> tuple[Tuning, dict[str, Any]]:
    """The tuning that a checkpoint's meta.json and config.json describe, and the arguments that are not about it."""
    kind = llama_type.replace("llama_qformerv2", "llama")
    if kind == FULL.llama_type:
        return FULL, dict(arguments)
    known = {key for method in METHODS.values() for key in (*method().to_arguments(), *vars(method()))}
    kinds = list(dict.fromkeys(method.llama_type for method in METHODS.values()))
    if kind not in kinds:
        raise UserError(
            f"it is a checkpoint of kind '{llama_type}', which cannot be read",
            f"known kinds: {', '.join(kinds)}, llama_qformerv2, llama_qformerv2_peft",
        )
    candidates = [method.from_arguments(arguments) for method in METHODS.values() if method.llama_type == kind]
    found = next((tuning for tuning in candidates if tuning is not None), None)
    if found is None:
        bias, norm, rank = switches(arguments)
        if bias or norm or rank:
            raise UserError(f"no tuning method has bias_tuning {bias}, norm_tuning {norm}, lora_rank {rank}")
    # Of LLaMA2-Accessory's tuned kind with everything switched off, the plain LLaMA is left.
    return found or FULL, {key: value for key, value in arguments.items() if key not in known}


def whole_number(arguments: Mapping[str, Any], key: str, default: int) -> int:
    """A number among LLaMA2-Accessory's arguments, in which what is absent has its default."""
    value = arguments.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value > 2**20:
        raise UserError(f"{key} must be a whole number of at most {2**20}, not {value!r:.40}")
    return value


def switches(arguments: Mapping[str, Any]) -> tuple[bool, bool, int]:
    """Whether LLaMA2-Accessory's kind `llama_peft` has biases and trains norms, and its LoRA pairs' rank (0: none)."""
    rank = max(whole_number(arguments, "lora_rank", -1), 0)
    return bool(arguments.get("bias_tuning", True)), bool(arguments.get("norm_tuning", True)), rank


def matrices_of(model: "Transformer", names: tuple[str, ...] = MATRICES) -> "list[Linear]":
    """The matrices of the blocks, those of these last names."""
    from llama_acc.core.model.layers import Linear

    named = model.layers.named_modules()
    return [layer for name, layer in named if isinstance(layer, Linear) and name.rpartition(".")[2] in names]


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


@dataclass(frozen=True)
class Frozen(Tuning):
    """Nothing of the LLaMA trains, only what vision adds."""

    method = "frozen"
