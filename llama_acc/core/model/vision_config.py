"""The shapes of what lets a LLaMA see, and how it is trained (vision.json). Imports no torch.

Each kind of vision has a tower, which makes features of pixels, and parts, which bring features into
the LLaMA:

    qformer   LLaMA2-Accessory's `llama_qformerv2`. Tower `qformer.*`: BLIP-2's vision transformer and Q-Former
              (arXiv:2301.12597), frozen. Parts: `qformer_proj.0` (linear), `qformer_proj.1` (layer norm), `start_img`
              and `end_img` [1, 1, dim]. An image stands in the stream: start vector, 32 projected features, end vector.
    clip      the multimodal form of its `llama_adapter` (zero-init attention). Tower `clip.*`: CLIP's vision
              transformer (arXiv:2103.00020), frozen. Parts: `clip_proj`, `clip_proj_norm`, `visual_query`,
              `visual_blocks.N`, `visual_proj`, `visual_proj_norm`. An image takes no place in the stream: what is made
              of it is added to the prefix of every prefix layer.
    tiny      ours, for models made from nothing: a few convolutions and a small vision transformer `vision_encoder.*`
              that are themselves a part and train with the rest. Its features go the way of the Q-Former's.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict

from llama_acc.core.errors import UserError, did_you_mean
from llama_acc.core.input_files import read_object
from llama_acc.core.model.schema import CHECKED, Depth, Epsilon, Heads, Width, checked, refuse
from llama_acc.core.model.tuning import Tuning

VISION_FILE = "vision.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Vision:
    """What all kinds of vision have."""

    __pydantic_config__: ClassVar[ConfigDict] = CHECKED
    encoder: ClassVar[str]  # the kind's name
    tower_prefix: ClassVar[str]
    """Of the names of the tower's parameters; empty: its encoder is a part, and trains with the rest."""

    image_size: Width = 224  # width and height of the images it takes
    patch_size: Width = 14  # of the squares they are cut into
    width: Width = 1024  # of the vision transformer
    hidden_dim: Width = 4096  # of its feed-forward layers
    n_layers: Depth = 24  # its blocks
    n_heads: Heads = 16  # its attention heads

    def __post_init__(self) -> None:
        image, patch, width, heads = self.image_size, self.patch_size, self.width, self.n_heads
        refuse({f"image_size ({image}) must be divisible by patch_size ({patch})": image % patch > 0})
        refuse({f"width ({width}) must be divisible by n_heads ({heads})": width % heads > 0})

    @property
    def patches(self) -> int:
        """How many squares an image is cut into."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def trains_encoder(self) -> bool:
        """Whether there is no tower, but an encoder that trains with the rest."""
        return not self.tower_prefix

    @property
    def positions(self) -> int:
        """How many places an image takes in the stream."""
        return 0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of what the LLaMA's side takes of an image: the tower's features, [vectors, width], or pixels."""
        raise NotImplementedError

    def llama_type(self, tuning: Tuning) -> str:
        """LLaMA2-Accessory's name of the kind of model, for meta.json."""
        return tuning.llama_type

    def to_json(self) -> bytes:
        """The file vision.json."""
        values = {"format_version": FORMAT_VERSION, "encoder": self.encoder} | asdict(self)
        return (json.dumps(values, indent=1) + "\n").encode()


@dataclass(frozen=True)
class QFormerVision(Vision):
    """BLIP-2's frozen vision transformer and Q-Former; as they stand, those of blip2-opt-2.7b."""

    encoder = "qformer"
    tower_prefix = "qformer."

    width: Width = 1408
    hidden_dim: Width = 6144
    n_layers: Depth = 39
    queries: Width = 32  # vectors the Q-Former makes of an image
    query_width: Width = 768  # their width
    query_hidden: Width = 3072  # of its feed-forward layers
    query_layers: Depth = 12  # its blocks, of which every second looks at the image
    query_heads: Heads = 12  # its attention heads
    layer_norm_eps: Epsilon = 1e-6
    """What the vision transformer adds to variances: as BLIP-2 was trained. transformers before 4.32 has 1e-5, and so
    have folders that it saved."""

    @property
    def positions(self) -> int:
        return self.queries + 2

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.queries, self.query_width

    def llama_type(self, tuning: Tuning) -> str:
        return tuning.llama_type.replace("llama", "llama_qformerv2", 1)


@dataclass(frozen=True)
class ClipVision(Vision):
    """CLIP's frozen vision transformer, and blocks that read its features; as they stand, CLIP ViT-L/14."""

    encoder = "clip"
    tower_prefix = "clip."

    projection: Width = 768  # width of its features
    block_width: Width = 768  # of the blocks
    block_heads: Heads = 16  # their attention heads
    blocks: Depth = 8  # how many there are

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.patches + 1, self.projection


@dataclass(frozen=True)
class TinyVision(Vision):
    """A small encoder that trains with the LLaMA: a feature for each square of the image.

    Convolutions halve the image until a square is a vector: on 3,000 images squares cut out at once are learned badly.
    """

    encoder = "tiny"
    tower_prefix = ""

    image_size: Width = 64
    patch_size: Width = 16
    width: Width = 64
    hidden_dim: Width = 256
    n_layers: Depth = 2
    n_heads: Heads = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.patch_size
        is_power = size > 1 and not size & (size - 1)
        refuse({f"patch_size ({size}) must be a power of 2: each convolution halves the image": not is_power})

    @property
    def channels(self) -> list[int]:
        """Of the stem: those of the image, then those after each convolution."""
        halvings = self.patch_size.bit_length() - 1
        return [3, *(min(16 << i, self.width) for i in range(halvings - 1)), self.width]

    @property
    def positions(self) -> int:
        return self.patches + 2

    @property
    def input_shape(self) -> tuple[int, ...]:
        return 3, self.image_size, self.image_size


ENCODERS: dict[str, type[Vision]] = {kind.encoder: kind for kind in (QFormerVision, ClipVision, TinyVision)}


def vision_of(encoder: str, sizes: Mapping[str, Any] | None = None, where: object = "vision.params") -> Vision:
    """A kind of vision, with some sizes other than the usual ones."""
    if encoder not in ENCODERS:
        hint = did_you_mean(encoder, ENCODERS) or f"known are {', '.join(ENCODERS)}"
        raise UserError(f"unknown vision encoder '{encoder}'", hint)
    return checked(ENCODERS[encoder], sizes or {}, f"the vision encoder in {where}")


def read_vision(path: Path) -> Vision:
    """What a checkpoint's vision.json says."""
    try:
        values = read_object(path)
        version, encoder = values.pop("format_version"), values.pop("encoder")
    except KeyError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(f"{path} was written by a newer version", "update llama-acc")
    return vision_of(str(encoder), values, path)


class VisionTraining(NamedTuple):
    """How vision is trained."""

    stage: Literal[1, 2] = 2  # 1 brings vision and language together, 2 teaches to follow instructions
    as_reference: bool = False  # train only those parts that LLaMA2-Accessory trains


SECOND_STAGE = VisionTraining()
