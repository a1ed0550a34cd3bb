"""Images into a LLaMA: the parts that `config` names, and the frozen towers in front of them.

To the LLaMA an image is vectors at some places of the stream, or something added to the prefixes of a document. Under
model parallelism every rank has all parts, so their gradients, which come from the whole residual stream, are the same.

Shapes: I images of the stream, S their width and height, T tokens of the stream, P length of the prefix.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from llama_acc.core.errors import UserError
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.copies import cast
from llama_acc.core.model.layers import normal, ones, parameter, zeros
from llama_acc.core.model.vision_config import ClipVision, QFormerVision, TinyVision, Vision


class Images(NamedTuple):
    """The images of a stream."""

    inputs: Tensor  # [I, *input_shape] of the kind of vision: a tower's features, or pixels
    places: Tensor  # [I * positions], where they stand in the stream, in order
    documents: Sequence[int] | Tensor  # [I], which document of the stream each belongs to


def _uniform(values: Tensor, generator: Generator) -> None:
    """torch's own rule for linear layers and convolutions."""
    bound = math.prod(values.shape[1:]) ** -0.5
    values.uniform_(-bound, bound, generator=generator)


class _Linear(nn.Module):
    """A linear layer that computes in the type of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features, init=_uniform)
        self.bias = parameter(out_features, init=zeros, decays=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, cast(self.weight, x.dtype), cast(self.bias, x.dtype))


class _LayerNorm(nn.Module):
    """Layer normalization that computes in the type of its input."""

    def __init__(self, width: int, decays: bool = False) -> None:
        super().__init__()
        self.weight = parameter(width, init=ones, decays=decays)
        self.bias = parameter(width, init=zeros, decays=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, cast(self.weight, x.dtype), cast(self.bias, x.dtype))


class _UnnamedNorm(_LayerNorm):
    """One that LLaMA2-Accessory, which goes by names, does not take for a norm: it is `qformer_proj.1` there."""


class VisionBlock(nn.Module):
    """A block of a vision transformer, with timm's names and arithmetic: a norm before each half, exact GELU."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = _LayerNorm(width, decays=True)  # no name of a norm, by that rule
        self.attn = nn.ModuleDict({"qkv": _Linear(width, 3 * width), "proj": _Linear(width, width)})
        self.norm2 = _LayerNorm(width, decays=True)
        self.mlp = nn.ModuleDict({"fc1": _Linear(width, hidden), "fc2": _Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        """[I, N, width] to the same."""
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _Convolution(nn.Module):
    """A convolution of 3 x 3 pixels that halves an image, and computes in its type."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = parameter(after, before, 3, 3, init=_uniform)
        self.bias = parameter(after, init=zeros, decays=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, cast(self.weight, x.dtype), cast(self.bias, x.dtype), stride=2, padding=1)


class TinyEncoder(nn.Module):
    """A few convolutions and a small vision transformer: a vector for each square of an image."""

    def __init__(self, vision: TinyVision) -> None:
        super().__init__()
        self.stem = nn.ModuleList(_Convolution(*channels) for channels in pairwise(vision.channels))
        self.place = parameter(vision.patches, vision.width, init=normal())
        self.blocks = nn.ModuleList(
            VisionBlock(vision.width, vision.hidden_dim, vision.n_heads) for _ in range(vision.n_layers)
        )
        self.norm = _LayerNorm(vision.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """[I, 3, S, S] to [I, patches, width]."""
        x = self.stem[0](pixels)
        for convolution in self.stem[1:]:
            x = convolution(F.gelu(x))
        x = x.flatten(2).transpose(1, 2) + self.place.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class VisionProjector:
    """What a kind of vision adds to a LLaMA. Its modules are the model's, under their own names."""

    def __init__(self, vision: Vision, model: nn.Module) -> None:
        self.vision, self.model = vision, model

    def __call__(self, x: Tensor, images: Images | None, documents: int) -> tuple[Tensor, Tensor | None]:
        """Puts its images into a stream x [T, dim] of so many documents. Returns that, and what is to be added to the
        prefix of each document, [documents, P, dim]; None: nothing."""
        if images is None:
            if not torch.is_grad_enabled():
                return x, None
            # Ranks wait for the gradients of each other: those of no images are zero, not absent.
            none = x.new_empty((0, *self.vision.input_shape))
            images = Images(none, torch.empty(0, dtype=torch.int64, device=x.device), ())
        return self.forward(x, images, documents)

    def forward(self, x: Tensor, images: Images, documents: int) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


class _InStream(VisionProjector):
    """An image is a start vector, its projected features, an end vector, at places of the stream."""

    def __init__(self, vision: QFormerVision | TinyVision, model: nn.Module, dim: int) -> None:
        super().__init__(vision, model)
        width = vision.query_width if isinstance(vision, QFormerVision) else vision.width
        self._encoder = TinyEncoder(vision) if isinstance(vision, TinyVision) else None
        if self._encoder is not None:
            model.add_module("vision_encoder", self._encoder)
        self._projection = nn.Sequential(_Linear(width, dim), _UnnamedNorm(dim, decays=True))
        model.add_module("qformer_proj", self._projection)
        for name in ("start_img", "end_img"):
            model.register_parameter(
                name, parameter(1, 1, dim, init=lambda values, own: values.uniform_(generator=own))
            )

    def forward(self, x: Tensor, images: Images, documents: int) -> tuple[Tensor, Tensor | None]:
        features = images.inputs.to(x.dtype)
        if self._encoder is not None:
            features = self._encoder(features)
        projected = self._projection(features)
        start, end = (self.model.get_parameter(name).to(x.dtype) for name in ("start_img", "end_img"))
        count, dim = len(projected), x.shape[-1]
        vectors = torch.cat((start.expand(count, 1, dim), projected, end.expand(count, 1, dim)), 1)
        return x.index_copy(0, images.places, vectors.flatten(0, 1)), None


class _InPrefix(VisionProjector):
    """Of an image, some vectors are made that are added to the prefix in every block that has one."""

    def __init__(self, vision: ClipVision, model: nn.Module, dim: int) -> None:
        super().__init__(vision, model)
        width = vision.block_width
        self._blocks = nn.ModuleList(VisionBlock(width, 4 * width, vision.block_heads) for _ in range(vision.blocks))
        self._read = nn.Sequential(_Linear(vision.projection, width), _LayerNorm(width))
        self._write = nn.Sequential(_Linear(width, dim), _LayerNorm(dim))
        named = {"clip_proj": self._read[0], "clip_proj_norm": self._read[1], "visual_blocks": self._blocks}
        for name, module in (named | {"visual_proj": self._write[0], "visual_proj_norm": self._write[1]}).items():
            model.add_module(name, module)
        prefix_len = model.get_parameter("prefix").shape[2]
        model.register_parameter("visual_query", parameter(prefix_len, width, init=normal(1.0)))

    def forward(self, x: Tensor, images: Images, documents: int) -> tuple[Tensor, Tensor | None]:
        read = self._read(images.inputs.to(x.dtype))
        query = self.model.get_parameter("visual_query").to(x.dtype)
        hidden = torch.cat((query.expand(len(read), *query.shape), read), 1)
        for block in self._blocks:
            hidden = block(hidden)
        added = self._write(hidden[:, : len(query)])
        owners = torch.as_tensor(images.documents, dtype=torch.int64, device=x.device)
        return x, added.new_zeros((documents, *added.shape[1:])).index_copy(0, owners, added)


def attach_vision(model: nn.Module, config: ModelConfig) -> VisionProjector | None:
    """Adds what a shape has for vision to a LLaMA on the meta device, tuned already, and freezes what does not train.

    By LLaMA2-Accessory's rules: in stage 2 a model that reads images by its prefixes trains no more than biases, norms
    and LoRA pairs; with `as_reference` the others do not either, unless all of the LLaMA trains.
    """
    vision, training = config.vision, config.vision_training
    if vision is None:
        return None
    before, is_clip = set(model.modules()), isinstance(vision, ClipVision)
    projector: VisionProjector = (_InPrefix if is_clip else _InStream)(vision, model, config.dim)  # type: ignore[arg-type]
    if training.stage == 2 if is_clip else training.as_reference and not config.tuning.trains_all:
        # What is on the model itself are vectors and prefixes, of vision and of the method that goes with it.
        for module in (model, *(module for module in model.modules() if module not in before)):
            for name, made in module.named_parameters(recurse=False):
                if name != "bias" and type(module) is not _LayerNorm:
                    made.requires_grad_(False)
    return projector


class Tower(nn.Module):
    """A frozen encoder of images, as transformers has it; `Vision.tower_prefix` goes before its parameters' names."""

    def __init__(self, vision: Vision) -> None:
        super().__init__()
        self.vision = vision
        self.sizes: dict[str, Any] = {
            "hidden_size": vision.width,
            "intermediate_size": vision.hidden_dim,
            "num_hidden_layers": vision.n_layers,
            "num_attention_heads": vision.n_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "initializer_range": 0.02,
        }

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [I, 3, S, S] to features [I, *input_shape]."""
        raise NotImplementedError


class QFormerTower(Tower):
    """BLIP-2's vision transformer and Q-Former."""

    def __init__(self, vision: QFormerVision) -> None:
        super().__init__(vision)
        from transformers import Blip2QFormerConfig, Blip2VisionConfig, Blip2VisionModel
        from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, vision.queries, vision.query_width))
        self.vision_model = Blip2VisionModel(Blip2VisionConfig(**self.sizes, layer_norm_eps=vision.layer_norm_eps))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=vision.query_width,
                intermediate_size=vision.query_hidden,
                num_hidden_layers=vision.query_layers,
                num_attention_heads=vision.query_heads,
                encoder_hidden_size=vision.width,
                cross_attention_frequency=2,
            )
        )

    def forward(self, pixels: Tensor) -> Tensor:
        seen = self.vision_model(pixel_values=pixels, return_dict=True).last_hidden_state
        queried = self.qformer(
            query_embeds=self.query_tokens.expand(len(pixels), -1, -1),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            return_dict=True,
        )
        return queried.last_hidden_state


class ClipTower(Tower):
    """CLIP's vision transformer; all its vectors are normed and projected, not one only."""

    def __init__(self, vision: ClipVision) -> None:
        super().__init__(vision)
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        whole = CLIPVisionModelWithProjection(CLIPVisionConfig(**self.sizes, projection_dim=vision.projection))
        self.vision_model, self.visual_projection = whole.vision_model, whole.visual_projection

    def forward(self, pixels: Tensor) -> Tensor:
        seen = self.vision_model(pixel_values=pixels).last_hidden_state  # 4.57 takes no return_dict
        return self.visual_projection(self.vision_model.post_layernorm(seen))


def check_towers_can_be_made(vision: Vision | None) -> None:
    """Refuses to go on without what a frozen encoder needs."""
    is_needed = vision is not None and not vision.trains_encoder
    if is_needed and importlib.util.find_spec("transformers") is None:
        raise UserError(
            "images need the package transformers, which is not installed", "pip install 'llama-acc[vision]'"
        )


def make_tower(vision: Vision, dtype: torch.dtype, seed: int | None = None) -> Tower:
    """A kind's frozen tower in a type: with random values, as transformers makes them, or, without a seed, on meta.

    Raises:
        UserError: transformers is not there, or does not go with what else is.
    """
    check_towers_can_be_made(vision)
    assert isinstance(vision, QFormerVision | ClipVision)
    try:
        with torch.device("meta" if seed is None else "cpu"), torch.random.fork_rng(()):
            torch.manual_seed(seed or 0)
            tower = QFormerTower(vision) if isinstance(vision, QFormerVision) else ClipTower(vision)
    except ImportError as error:
        # transformers refuses to be imported beside packages of another age.
        raise UserError(
            f"images need the package transformers, which cannot be imported: {str(error).splitlines()[0]}",
            "pip install --upgrade transformers brings one that goes with the other packages",
        ) from error
    tower.to(dtype).requires_grad_(False).eval()
    for name, buffer in list(tower.named_buffers()):
        # Numbers of places, which no checkpoint holds.
        owner, _, leaf = name.rpartition(".")
        assert leaf == "position_ids", name
        tower.get_submodule(owner).register_buffer(leaf, torch.arange(buffer.numel()).view(buffer.shape), False)
    return tower


@lru_cache(8)
def tower_shapes(vision: Vision | None) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the frozen tower's parameters; none where there is no tower."""
    if vision is None or vision.trains_encoder:
        return {}
    tower = make_tower(vision, torch.float32)
    return {vision.tower_prefix + name: tuple(weight.shape) for name, weight in tower.named_parameters()}
