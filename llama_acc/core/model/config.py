"""The shape of a LLaMA: params.json as Meta writes it, and the sizes people know by name. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_acc.core.errors import UserError, did_you_mean, listed
from llama_acc.core.input_files import read_object
from llama_acc.core.model.tuning import FULL, Shapes, Tuning
from llama_acc.core.model.vision_config import SECOND_STAGE, Vision, VisionTraining

# Written into params.json or config.json by others, without meaning for the computation.
_BLOCK = [("attention", name) for name in ("wq", "wk", "wv", "wo")] + [
    ("feed_forward", name) for name in ("w1", "w2", "w3")
]
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

    def parameter_shapes(self) -> Shapes:
        """Every parameter's name, as in Meta's and LLaMA2-Accessory's checkpoints, and full shape."""
        rows = {"wk": self.kv_dim, "wv": self.kv_dim, "w1": self.hidden_dim, "w3": self.hidden_dim}
        block: Shapes = {"attention_norm.weight": (self.dim,), "ffn_norm.weight": (self.dim,)}
        for group, matrix in _BLOCK:
            shape = (rows.get(matrix, self.dim), self.hidden_dim if matrix == "w2" else self.dim)
            name = f"{group}.{matrix}"
            block |= {f"{name}.weight": shape, **self.tuning.added_to(name, *shape)}
        shapes: Shapes = {"tok_embeddings.weight": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
        shapes |= {"norm.weight": (self.dim,), "output.weight": (self.vocab_size, self.dim)}
        shapes |= self.tuning.added_to_model(self.dim, self.n_heads)
        return shapes if self.vision is None else shapes | self.vision_parts | self.vision.tower_shapes()

    @cached_property
    def vision_parts(self) -> Shapes:
        """Names and full shapes of what vision adds to the LLaMA; the tower, which is apart, is not among them."""
        return {} if self.vision is None else self.vision.part_shapes(self.dim, self.tuning.prefix_len)

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained."""
        if self.vision is not None:
            if name in self.vision_parts:
                return self.vision.part_trains(name, self.vision_training, self.tuning)
            if self.vision.tower_prefix and name.startswith(self.vision.tower_prefix):
                return False
            if not self.vision.lets_train(name, self.vision_training):
                return False
        return self.tuning.trains(name)

    @property
    def llama_type(self) -> str:
        """LLaMA2-Accessory's name of the kind of model, for meta.json."""
        return self.tuning.llama_type if self.vision is None else self.vision.llama_type(self.tuning)

    def quantisable(self, skip: Sequence[str] = ()) -> list[str]:
        """Names of the matrices that NF4 is for: those of the blocks and the output matrix, less those to skip.

        Args:
            skip: names, or parts of names between dots: `output`, `wv`, `layers.31`, `layers.31.feed_forward.w2`.

        Raises:
            UserError: one that is no matrix's.
        """
        names = [f"layers.{layer}.{group}.{matrix}" for layer in range(self.n_layers) for group, matrix in _BLOCK]
        names += ["output"]
        for wanted in skip:
            if not any(is_within(wanted, name) for name in names):
                parts = ["output", *(matrix for _, matrix in _BLOCK), *dict(_BLOCK)]
                parts += [f"layers.{layer}" for layer in range(self.n_layers)]
                hint = did_you_mean(wanted, parts) or "skip output, a matrix as wv or w2, or a block as layers.0"
                raise UserError(f"there is no matrix '{wanted}' to be left out of NF4", hint)
        return [f"{name}.weight" for name in names if not any(is_within(wanted, name) for wanted in skip)]

    def base(self) -> "ModelConfig":
        """The shape without what a tuning method or vision adds."""
        return replace(self, tuning=FULL, vision=None, vision_training=SECOND_STAGE)

    def base_shapes(self) -> Shapes:
        """Names and full shapes of the LLaMA and the tower, of what there is before anything is tuned."""
        return self.base().parameter_shapes() | ({} if self.vision is None else self.vision.tower_shapes())

    def parameter_count(self) -> int:
        """Number of parameters, from the shape alone."""
        count = 0
        for shape in self.parameter_shapes().values():
            size = 1
            for length in shape:
                size *= length
            count += size
        return count

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


def is_matrix(name: str) -> bool:
    """Whether a parameter is a matrix of a block or the output matrix, which NF4 is for."""
    return name == "output.weight" or name.endswith(tuple(f".{matrix}.weight" for _, matrix in _BLOCK))


def is_within(part: str, name: str) -> bool:
    """Whether it is what stands between some dots of a name: `layers.3` is in `layers.3.attention.wv`."""
    return f".{part}." in f".{name}."
