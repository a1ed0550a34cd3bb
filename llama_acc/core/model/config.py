"""The shape of a LLaMA: params.json, and the sizes known by name. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from llama_acc.core.errors import UserError, did_you_mean, listed
from llama_acc.core.input_files import read_object
from llama_acc.core.model.schema import CHECKED, WIDEST, Depth, Epsilon, Factor, Heads, Width, checked, refuse, whole
from llama_acc.core.model.tuning import FULL, Tuning
from llama_acc.core.model.vision_config import SECOND_STAGE, Vision, VisionTraining

_SIZES = Path(__file__).parents[2] / "recipes" / "downloads" / "sizes.yaml"
# Written into params.json or config.json by others, without meaning for the computation.
_IGNORED = {"max_batch_size", "trainable_mode", "load_pretrained_visual_encoder"}
_Layer = Annotated[int, Field(strict=True, ge=0, lt=2**10)]
_Layers = tuple[_Layer, ...]
_Vocabulary = Annotated[int, BeforeValidator(whole), Field(strict=True, ge=-1, le=2**24)]
_Context = Annotated[int, BeforeValidator(whole), Field(strict=True, ge=1, le=2**27)]
RopeType = Literal["linear", "dynamic", "llama3", "yarn"]
Family = Literal["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"]


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies differ from those of the context that a model was first trained on.

    Names and meaning are those of `rope_scaling` in Hugging Face's config.json; see `rotary.frequencies`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = CHECKED

    rope_type: RopeType
    factor: Factor
    original_max_position_embeddings: _Context | None = None
    """The context of that first training; None: the model's max_seq_len."""
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    attention_factor: Factor | None = None
    beta_fast: Factor | None = None
    beta_slow: Factor | None = None
    mscale: Factor | None = None
    mscale_all_dim: Factor | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.rope_type == "llama3":
            refuse({"rope_type llama3 needs low_freq_factor and high_freq_factor": low is None or high is None})
            refuse({f"high_freq_factor ({high}) must be above low_freq_factor ({low})": (high or 0) <= (low or 0)})

    def to_json(self) -> dict[str, Any]:
        """The mapping in a file: what is set."""
        return {
            key: value
            for key, value in asdict(self).items()
            if value is not None and (key, value) != ("truncate", True)
        }


_Scaling = Annotated[
    Annotated[Factor, Tag("factor")] | Annotated[RopeScaling, Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, (dict, RopeScaling)) else "factor"),
]


@dataclass(frozen=True)
class Params:
    """What params.json says, under its names; those that Meta's and LLaMA2-Accessory's files do not have are as in
    Hugging Face's config.json, and in Mistral's params.json where that has them."""

    __pydantic_config__: ClassVar[ConfigDict] = CHECKED

    dim: Annotated[Width, Field(le=2**18)]  # width of the residual stream
    n_layers: Depth  # number of transformer blocks
    n_heads: Heads  # query heads
    n_kv_heads: Heads | None = None  # key and value heads (grouped-query attention); None means n_heads
    vocab_size: _Vocabulary = -1  # rows of the embedding; -1 (Meta's files) means the tokenizer's
    multiple_of: Width = 256  # the SwiGLU width is rounded up to a multiple of this
    ffn_dim_multiplier: Factor | None = None  # factor on the SwiGLU width, or None
    norm_eps: Epsilon = 1e-5  # epsilon of RMSNorm
    rope_theta: Factor = 10000.0  # base of the rotary frequencies
    max_seq_len: _Context = 2048  # longest sequence meant to be used
    rope_scaling: _Scaling | None = None
    """Factor the positions are multiplied by, or how the frequencies are changed; or None."""
    head_dim: Width | None = None  # width of one attention head; None means dim / n_heads
    qkv_bias: bool = False  # the projections to queries, keys and values have a bias
    qk_norm: bool = False  # queries and keys are normalized (RMSNorm), head by head, before they are rotated
    tie_word_embeddings: bool = False  # the output matrix is the embedding
    sliding_window: _Context | None = None
    """A position sees only so many last ones, itself among them; None means all before it."""
    window_layers: _Layers | None = None  # the layers of which this is so, from 0; None means all
    nope_layers: _Layers = ()  # the layers that do not rotate queries and keys, from 0
    embedding_multiplier: Factor = 1.0  # factor on the embeddings
    residual_multiplier: Factor = 1.0  # factor on what a block's halves add to the residual stream
    attention_multiplier: Factor | None = None  # factor on attention's scores; None means 1 / sqrt(head_dim)
    logits_scaling: Factor = 1.0  # what the logits are divided by
    family: Family = "llama"
    """Whose variations these are, by the model_type of Hugging Face, as which the model is exported."""

    def __post_init__(self) -> None:
        dim, heads, kv_heads, hidden = self.dim, self.n_heads, self.kv_heads, self.hidden_dim
        last = max((*self.nope_layers, *(self.window_layers or ())), default=0)
        refuse(
            {
                f"dim ({dim}) must be divisible by n_heads ({heads})": self.head_dim is None and dim % heads > 0,
                f"the head dimension ({self.head_size}) must be even for rotary embedding": self.head_size % 2 > 0,
                f"nope_layers and window_layers must be below n_layers ({self.n_layers})": last >= self.n_layers,
                f"n_heads ({heads}) must be divisible by n_kv_heads ({kv_heads})": heads % kv_heads > 0,
                f"the SwiGLU width that follows, {hidden:,}, is that of no model": not 0 < hidden <= WIDEST,
                "vocab_size must be positive, or -1 for the tokenizer's, not 0": self.vocab_size == 0,
            }
        )

    @property
    def head_size(self) -> int:
        """Width of one attention head, dim / n_heads where the file does not say."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key and value heads, n_heads where the file does not say."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def kv_dim(self) -> int:
        """Width of all keys together, and of all values."""
        return self.kv_heads * self.head_size

    @property
    def hidden_dim(self) -> int:
        """SwiGLU width: 2/3 of 4*dim, times the multiplier, rounded up (as Meta's FeedForward computes it)."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)


_NOT_ACCESSORYS = (
    *("head_dim", "qkv_bias", "qk_norm", "tie_word_embeddings"),
    *("sliding_window", "window_layers", "nope_layers", "family"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
)


@dataclass(frozen=True)
class ModelConfig(Params):
    """The shape of a LLaMA with what a tuning method and vision add to it."""

    tuning: Tuning = FULL  # the method
    vision: Vision | None = None  # what lets it see, or None
    vision_training: VisionTraining = SECOND_STAGE  # what trains of that

    @property
    def llama_type(self) -> str:
        """LLaMA2-Accessory's name of the kind of model, for meta.json."""
        return self.tuning.llama_type if self.vision is None else self.vision.llama_type(self.tuning)

    def base(self) -> "ModelConfig":
        """The shape without what a tuning method or vision adds."""
        return replace(self, tuning=FULL, vision=None, vision_training=SECOND_STAGE)

    def of_blocks(self, layers: Sequence[int]) -> "ModelConfig":
        """The shape with some of its blocks alone, in this order."""

        def among(chosen: Sequence[int]) -> tuple[int, ...]:
            return tuple(place for place, layer in enumerate(layers) if layer in chosen)

        windowed = None if self.window_layers is None else among(self.window_layers)
        return replace(self, n_layers=len(layers), window_layers=windowed, nope_layers=among(self.nope_layers))

    def to_params(self) -> dict[str, Any]:
        """The mapping params.json holds: what is set, under LLaMA2-Accessory's names."""
        values = {field.name: getattr(self, field.name) for field in fields(Params)}
        if isinstance(self.rope_scaling, RopeScaling):
            values["rope_scaling"] = self.rope_scaling.to_json()
        # What LLaMA2-Accessory does not know is there only where it says something.
        usual = {key: value for key, value in vars(Params).items() if key in _NOT_ACCESSORYS}
        said = {key: value for key, value in values.items() if key not in usual or value != usual[key]}
        return {key: value for key, value in said.items() if value is not None} | self.tuning.to_arguments()

    def with_vocabulary(self, pieces: int) -> "ModelConfig":
        """This shape with a vocabulary of -1 replaced by the tokenizer's number of pieces."""
        return self if self.vocab_size > 0 else replace(self, vocab_size=pieces)

    def check_tokenizer(self, pieces: int, where: object) -> None:
        """Refuses a tokenizer that cannot be this model's.

        A vocabulary padded to a round size is usual: rows without a piece are accepted up to the next multiple of 64,
        or one for 64 pieces, at most 511 (Qwen2.5-7B has 152,064 rows, 297 times 512, for 151,665 pieces).
        """
        spare = self.vocab_size - pieces
        if 0 <= spare <= min(pieces // 64, 511) or spare == -pieces % 64:
            return
        too_many = f": {spare} rows without a piece are more than padding" if spare > 0 else ""
        raise UserError(
            f"tokenizer and model do not fit: {where} has {pieces} pieces, the model's vocabulary is "
            f"{self.vocab_size}{too_many}",
            "give the tokenizer the model was trained with: --tokenizer FILE",
        )


def config_from_params(params: Mapping[str, Any], source: object = "model.params") -> ModelConfig:
    """Checks a params.json mapping and makes a ModelConfig of it.

    Where the context (max_seq_len) is not said, as in Meta's files, it is the one of the known model of that shape.
    Mistral's files are those that give the SwiGLU width, as `hidden_dim`.
    """
    known = {key: value for key, value in params.items() if value is not None and key not in _IGNORED}
    is_scaled, width = known.pop("use_scaled_rope", False), known.pop("hidden_dim", None)
    if width is not None:
        known = {"family": "mistral", **known}
    config = ModelConfig(**vars(checked(Params, known, f"the model's shape in {source}")))
    if width is not None:
        config = with_hidden_dim(config, width, source)
    if is_scaled:
        # The file does not tell that LLaMA 3.2's models of 1B and 3B have the factor 32 (meta-llama/llama-models, issue
        # 241), where LLaMA 3.1's have 8, and that their output matrix is the embedding.
        is_small = config.dim < 4096
        scaling = RopeScaling("llama3", 32.0 if is_small else 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
        config = replace(config, rope_scaling=scaling, tie_word_embeddings=is_small)
    return config if "max_seq_len" in known else replace(config, max_seq_len=_known_context(config))


def with_hidden_dim(config: ModelConfig, width: Any, source: object) -> ModelConfig:
    """The shape with a SwiGLU width of exactly `width`, in params.json's terms; as Meta writes it where that fits."""
    if not isinstance(width, int) or isinstance(width, bool) or not 0 < width <= WIDEST:
        problem = f"the SwiGLU width must be a whole number from 1 to {WIDEST:,}, not {json.dumps(width):.60}"
        raise UserError(f"the model's shape in {source} is not usable:\n  {problem}")
    for multiplier in (None, 1.3, 1.5, 1.4, 1.05):
        for multiple_of in (256, 1024, 4096, 128, 64, 32, 16):
            usual = replace(config, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
            if usual.hidden_dim == width:
                return usual
    # Rounded up to a multiple of itself, what is above 0 and not above the width becomes the width.
    exact = replace(config, multiple_of=width, ffn_dim_multiplier=None)
    return exact if exact.hidden_dim == width else replace(exact, ffn_dim_multiplier=width / int(8 * config.dim / 3))


def _known_context(config: ModelConfig) -> int:
    """The context of the published models, whose params.json do not say it: LLaMA 2, Code Llama and LLaMA 3 differ by
    rope_theta. LLaMA 1's, 2,048, has norm_eps 1e-6, or 64 heads for keys; so has what is smaller than any of them."""
    if isinstance(config.rope_scaling, RopeScaling):
        return 131072  # LLaMA 3.1 and later
    if config.family == "mistral":
        return 32768
    is_later = config.dim >= 4096 and config.norm_eps == 1e-5 and config.kv_heads < 64
    return {1e4: 4096, 1e6: 16384, 5e5: 8192}.get(config.rope_theta, 2048) if is_later else 2048


def read_params(paths: Sequence[Path]) -> dict[str, Any]:
    """The union of several params.json files; the last one wins."""
    union: dict[str, Any] = {}
    for path in paths:
        union |= read_object(path)
    return union


@cache
def named_sizes() -> dict[str, ModelConfig]:
    """The shapes of published models, by name."""
    values = yaml.safe_load(_SIZES.read_text(encoding="utf-8"))
    return {name: config_from_params(params, name) for name, params in values.items()}


def named_size(name: str) -> ModelConfig:
    """The shape of a size known by name."""
    sizes = named_sizes()
    if name not in sizes:
        raise UserError(f"unknown model size '{name}'", did_you_mean(name, sizes) or f"known sizes: {', '.join(sizes)}")
    return sizes[name]


def size_name(config: ModelConfig) -> str | None:
    """The name of the published model whose shape this is, whatever context is chosen for it; None: of none."""

    def plain(shape: ModelConfig) -> ModelConfig:
        return replace(with_hidden_dim(shape.base(), shape.hidden_dim, "a size"), max_seq_len=1)

    return next((name for name, known in named_sizes().items() if plain(known) == plain(config)), None)


SIZES = (1, 2, 4, 8)
"""Model-parallel sizes there are checkpoints for."""


def check_divides(config: ModelConfig, size: int) -> None:
    """Refuses a model-parallel size that does not divide the model."""
    if size not in SIZES:
        raise UserError(f"model-parallel size {size} is not one of {', '.join(map(str, SIZES))}")
    numbers = {
        "n_heads": config.n_heads,
        "n_kv_heads": config.kv_heads,
        "dim": config.dim,
        "the SwiGLU width": config.hidden_dim,
        "vocab_size": max(config.vocab_size, 0),
    }
    why = f"is not divisible by the model-parallel size ({size})"
    problems = [f"{name} ({number}) {why}" for name, number in numbers.items() if number % size]
    if problems:
        fitting = [str(other) for other in SIZES if not any(number % other for number in numbers.values())]
        raise UserError(
            f"the model cannot be split over {size} ranks:\n{listed(problems)}",
            f"model-parallel sizes that fit: {', '.join(fitting)}",
        )
