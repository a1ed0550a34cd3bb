"""The shape of a LLaMA: params.json as Meta writes it, and the sizes people know by name. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llama_acc.core.errors import UserError, did_you_mean, listed
from llama_acc.core.input_files import read_object
from llama_acc.core.model.tuning import FULL, Tuning
from llama_acc.core.model.vision_config import SECOND_STAGE, Vision, VisionTraining

# Written into params.json or config.json by others, without meaning for the computation.
_IGNORED = {"max_batch_size", "trainable_mode", "load_pretrained_visual_encoder"}
# No model is larger: what is above is a slip, and would be waited for. [least, most]
_BOUNDS = {
    "dim": (1, 2**18),
    "n_layers": (1, 2**10),
    "n_heads": (1, 2**12),
    "n_kv_heads": (1, 2**12),
    "vocab_size": (-1, 2**24),
    "multiple_of": (1, 2**20),
    "ffn_dim_multiplier": (1e-6, 1e6),
    "norm_eps": (1e-30, 1.0),
    "rope_theta": (1e-3, 1e15),
    "max_seq_len": (1, 2**27),
    "rope_scaling": (1e-9, 1e9),
}
WIDEST = 2**20
# By dim, n_layers, key and value heads, rope_theta: LLaMA 2, Code Llama and LLaMA 3, whose params.json do not say it.
_CONTEXTS = {
    (4096, 32, 32, 1e4): 4096,
    (5120, 40, 40, 1e4): 4096,
    (8192, 80, 8, 1e4): 4096,
    (4096, 32, 32, 1e6): 16384,
    (5120, 40, 40, 1e6): 16384,
    (8192, 48, 8, 1e6): 16384,
    (8192, 80, 8, 1e6): 16384,
    (4096, 32, 8, 5e5): 8192,
    (8192, 80, 8, 5e5): 8192,
}
_NOT_SHAPE = {"tuning", "vision", "vision_training"}


@dataclass(frozen=True)
class ModelConfig:
    """A LLaMA's shape, with params.json's names.

    Attributes:
        dim: width of the residual stream.
        n_layers: number of transformer blocks.
        n_heads: query heads; the head dimension is dim / n_heads.
        n_kv_heads: key and value heads (grouped-query attention); None means n_heads.
        vocab_size: rows of the embedding; -1 (Meta's files) means the tokenizer's.
        multiple_of: the SwiGLU width is rounded up to a multiple of this.
        ffn_dim_multiplier: factor on the SwiGLU width, or None.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary frequencies.
        max_seq_len: longest sequence meant to be used.
        rope_scaling: factor the positions are multiplied by, or None.
        tuning: what a tuning method adds to it.
        vision: what lets it see, or None.
        vision_training: what trains of that.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 2048
    rope_scaling: float | None = None
    tuning: Tuning = FULL
    vision: Vision | None = None
    vision_training: VisionTraining = SECOND_STAGE

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads, n_heads where the file does not say."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def kv_dim(self) -> int:
        """Width of all keys together, and of all values."""
        return self.kv_heads * self.head_dim

    @property
    def hidden_dim(self) -> int:
        """SwiGLU width: 2/3 of 4*dim, times the multiplier, rounded up (as Meta's FeedForward computes it)."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)

    @property
    def residual_std(self) -> float:
        """Standard deviation at the start of the matrices that write into the residual stream (GPT-2's rule)."""
        return 0.02 * (2 * self.n_layers) ** -0.5

    @property
    def llama_type(self) -> str:
        """LLaMA2-Accessory's name of the kind of model, for meta.json."""
        return self.tuning.llama_type if self.vision is None else self.vision.llama_type(self.tuning)

    def base(self) -> "ModelConfig":
        """The shape without what a tuning method or vision adds."""
        return replace(self, tuning=FULL, vision=None, vision_training=SECOND_STAGE)

    def to_params(self) -> dict[str, Any]:
        """The mapping params.json holds: what is set, under LLaMA2-Accessory's names."""
        shape = {key: value for key, value in asdict(self).items() if value is not None and key not in _NOT_SHAPE}
        return shape | self.tuning.to_arguments()

    def with_vocabulary(self, pieces: int) -> "ModelConfig":
        """This shape with a vocabulary of -1 replaced by the tokenizer's number of pieces."""
        return self if self.vocab_size > 0 else replace(self, vocab_size=pieces)

    def check_tokenizer(self, pieces: int, where: object) -> None:
        """Refuses a tokenizer that cannot be this model's.

        A vocabulary padded to a round size is usual, so up to 255 rows without a piece are accepted.

        Raises:
            UserError: naming both sizes.
        """
        if not pieces <= self.vocab_size < pieces + 256:
            raise UserError(
                f"tokenizer and model do not fit: {where} has {pieces} pieces, the model's vocabulary is "
                f"{self.vocab_size}",
                "give the tokenizer the model was trained with: --tokenizer FILE",
            )


def config_from_params(params: Mapping[str, Any], source: object = "model.params") -> ModelConfig:
    """Checks a params.json mapping and makes a ModelConfig of it.

    Where the context (max_seq_len) is not said, as in Meta's files, it is the one of the known model of that shape.

    Raises:
        UserError: unknown, missing or impossible values, all of them listed.
    """
    problems = []
    values: dict[str, Any] = {}
    for key, value in params.items():
        if key in _IGNORED or (value is None and key in _BOUNDS) or (key == "use_scaled_rope" and value is False):
            continue
        if key == "use_scaled_rope":
            problems.append(f"use_scaled_rope: {value!r:.40}, the rotary embedding of LLaMA 3.1, is not computed here")
        elif key not in _BOUNDS:
            hint = did_you_mean(key, _BOUNDS)
            problems.append(f"unknown key '{key}'" + (f": {hint}" if hint else ""))
        elif problem := _problem_of(key, value):
            problems.append(problem)
        else:
            values[key] = type(_BOUNDS[key][1])(value)
    problems += [f"missing key '{key}'" for key in ("dim", "n_layers", "n_heads") if params.get(key) is None]
    if not problems:
        config = ModelConfig(**values)
        problems = _impossible(config)
        if not problems:
            return config if "max_seq_len" in values else replace(config, max_seq_len=_known_context(config))
    raise UserError(f"the model's shape in {source} is not usable:\n{listed(problems)}")


def _problem_of(key: str, value: Any) -> str | None:
    """What is wrong with a value by itself."""
    least, most = _BOUNDS[key]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if not is_number or (isinstance(most, int) and isinstance(value, float) and not value.is_integer()):
        return f"{key}: {'a whole number' if isinstance(most, int) else 'a number'} is expected, not {value!r:.40}"
    if value <= 0 and (key, value) != ("vocab_size", -1):
        also = ", or -1 for the tokenizer's" if key == "vocab_size" else ""
        return f"{key} must be positive{also}, not {value!r:.40}"
    if not least <= value <= most:
        return f"{key}: {value!r:.40} is that of no model (from {max(least, 0):,} to {most:,})"
    return None


def _impossible(config: ModelConfig) -> list[str]:
    problems = []
    if config.dim % config.n_heads:
        problems.append(f"dim ({config.dim}) must be divisible by n_heads ({config.n_heads})")
    elif config.head_dim % 2:
        problems.append(f"the head dimension ({config.head_dim} = dim / n_heads) must be even for rotary embedding")
    if config.n_heads % config.kv_heads:
        problems.append(f"n_heads ({config.n_heads}) must be divisible by n_kv_heads ({config.kv_heads})")
    if not 0 < config.hidden_dim <= WIDEST:
        problems.append(f"the SwiGLU width that follows, {config.hidden_dim:,}, is that of no model")
    return problems


def _known_context(config: ModelConfig) -> int:
    """The context of the published model of that shape; LLaMA 1's, 2,048, where there is none."""
    shape = (config.dim, config.n_layers, config.kv_heads, config.rope_theta)
    # By norm_eps alone LLaMA 1 (1e-6) of 7B and 13B differs from LLaMA 2.
    return _CONTEXTS.get(shape, 2048) if config.norm_eps == 1e-5 else 2048


def read_params(paths: Sequence[Path]) -> dict[str, Any]:
    """The union of several params.json files; the last one wins.

    Raises:
        UserError: a file that is missing, unreadable or not a JSON object.
    """
    union: dict[str, Any] = {}
    for path in paths:
        union |= read_object(path)
    return union


def _llama2(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, multiple_of: int = 256) -> ModelConfig:
    shape = ModelConfig(dim, n_layers, n_heads, n_kv_heads, vocab_size=32000, multiple_of=multiple_of)
    return replace(shape, max_seq_len=4096)


NAMED_SIZES: dict[str, ModelConfig] = {
    "llama2-7b": _llama2(4096, 32, 32, 32),
    "llama2-13b": _llama2(5120, 40, 40, 40),
    "llama2-70b": replace(_llama2(8192, 80, 64, 8, multiple_of=4096), ffn_dim_multiplier=1.3),
    "codellama-34b": replace(_llama2(8192, 48, 64, 8), ffn_dim_multiplier=1.0, rope_theta=1e6, max_seq_len=16384),
}


def named_size(name: str) -> ModelConfig:
    """The shape of a size known by name.

    Raises:
        UserError: an unknown name, with the near ones.
    """
    if name not in NAMED_SIZES:
        hint = did_you_mean(name, NAMED_SIZES) or f"known sizes: {', '.join(NAMED_SIZES)}"
        raise UserError(f"unknown model size '{name}'", hint)
    return NAMED_SIZES[name]


SIZES = (1, 2, 4, 8)
"""Model-parallel sizes there are checkpoints for."""


def check_divides(config: ModelConfig, size: int) -> None:
    """Refuses a model-parallel size that does not divide the model.

    Raises:
        UserError: every number it does not divide, with the size.
    """
    if size not in SIZES:
        raise UserError(f"model-parallel size {size} is not one of {', '.join(map(str, SIZES))}")
    numbers = {
        "n_heads": config.n_heads,
        "n_kv_heads": config.kv_heads,
        "dim": config.dim,
        "the SwiGLU width": config.hidden_dim,
        "vocab_size": config.vocab_size,
    }
    problems = [
        f"{name} ({number}) is not divisible by the model-parallel size ({size})"
        for name, number in numbers.items()
        if number > 0 and number % size
    ]
    if problems:
        fitting = [str(s) for s in SIZES if not any(number > 0 and number % s for number in numbers.values())]
        raise UserError(
            f"the model cannot be split over {size} ranks:\n{listed(problems)}",
            f"model-parallel sizes that fit: {', '.join(fitting)}",
        )
