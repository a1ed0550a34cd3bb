"""Loading a trained model for generation, or a rank's share of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from llama_acc.core.atomic import check_checkpoint
from llama_acc.core.checkpoint.adapter import check_base, read_base
from llama_acc.core.checkpoint.layout import Layout, inspect, locate, read_config, without_towers
from llama_acc.core.checkpoint.load import check_tensors, fill, main_dtype, read_weights, with_rows
from llama_acc.core.checkpoint.quantized import read_quantization
from llama_acc.core.checkpoint.towers import check_tower
from llama_acc.core.data.templates import KINDS, PromptFormat, format_for, template_of_folder
from llama_acc.core.device import pick_device
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError
from llama_acc.core.generate.vision_encoder import VisionEncoder, load_vision_encoder
from llama_acc.core.model.config import ModelConfig, Vision, check_divides
from llama_acc.core.model.transformer import Transformer, build_on_meta, pack_small, quantize_on_meta, shapes_of
from llama_acc.core.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

_ALONE = Parallel()


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and the prompt format it was trained with.

    Attributes:
        model: its parameters may lie in the checkpoint's file; they must not be trained.
        tokenizer: its tokenizer.
        template: its prompt format.
        template_from: where that came from, for the user.
        device: where it computes.
        vision_encoder: encodes images; None = the model takes none.
        notes: where the checkpoint's files disagree and which of them counts, for the user.
    """

    model: Transformer
    tokenizer: Tokenizer
    template: PromptFormat
    template_from: str
    device: torch.device
    vision_encoder: VisionEncoder | None = None
    notes: tuple[str, ...] = ()

    @property
    def vision(self) -> Vision | None:
        """What it sees with."""
        return self.model.config.vision


def load_model(
    *checkpoints: str | Path,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    template: str = "auto",
    verify: bool = False,
    quantize: Literal["nf4", "none"] | None = None,
    context: int | None = None,
    parallel: Parallel = _ALONE,
) -> LoadedModel:
    """Loads a checkpoint, or a rank's share of it, for generation.

    Args:
        checkpoints: folders, or run folders (their latest checkpoint); a later one overrides an earlier one.
        device: such as "cpu"; None picks CUDA, then MPS, then CPU.
        dtype: type of weights and activations; None = the checkpoint's.
        tokenizer: its file; None = the one beside the checkpoint.
        template: a prompt format's name; "auto" = the one kept in the checkpoint, else its chat template, else none.
        verify: compare the SHA-256 of every file with the manifest.
        quantize: keep the matrices in four bits, or "none" of them; None = as the checkpoint was trained. Those of a
            quantised checkpoint are in any case.
        context: most tokens of prompt and answer; None = the checkpoint's.
        parallel: the ranks that share the model, whatever the size it was saved at.

    Raises:
        UserError: something is missing, damaged or does not fit.
    """
    layouts = [inspect(locate(str(checkpoint))) for checkpoint in checkpoints]
    last = (without_towers(layouts) or layouts)[-1].folder
    config = read_config(layouts)
    if config is None:
        raise UserError(f"{last} has no params.json or config.json: the model's shape is not known")
    for layout in layouts:
        check_checkpoint(layout.folder, verify and parallel.is_main)
    check_base(layouts, config)
    skip = _quantize_skip(layouts, quantize)
    path = find_tokenizer(last) if tokenizer is None else Path(tokenizer)
    if path is None:
        raise UserError(f"there is no tokenizer in {last}", "put tokenizer.model or tokenizer.json beside the weights")
    words = load_tokenizer(path)
    weights = read_weights(layouts, parallel.model_rank, parallel.model_size)
    config = with_rows(config, weights).with_vocabulary(words.vocab_size)
    if context is not None:
        config = replace(config, max_seq_len=context)
    config.check_tokenizer(words.vocab_size, path)
    chosen: tuple[PromptFormat, str]
    chosen = (
        template_of_folder(last, words) if template == "auto" else (format_for(template, KINDS[0], words), "asked for")
    )
    check_divides(config, parallel.model_size)
    check_tower(config.vision, weights.tensors, last)
    check_tensors(weights, shapes_of(config), last)
    notes = weights.notes
    if dtype is None:
        tower = shapes_of(config, "tower")
        dtype, rounded = main_dtype({name: part for name, part in weights.tensors.items() if name not in tower})
        if dtype == torch.bfloat16:
            notes = notes + rounded
        else:
            dtype = torch.float32
    target = pick_device(device)
    model = model_on_meta(config, dtype, parallel, skip)
    fill(model, weights, target, dtype, copy=False)
    pack_small(model)
    return LoadedModel(model, words, *chosen, target, load_vision_encoder(model, weights, target), tuple(notes))


def model_on_meta(
    config: ModelConfig, dtype: torch.dtype, parallel: Parallel, quantize_skip: Sequence[str] | None
) -> Transformer:
    """A rank's part of a model for generation, without storage.

    Args:
        config: its shape.
        dtype: type of weights and activations.
        parallel: the ranks that share it.
        quantize_skip: its matrices are kept in four bits, but for these; None = all are kept as they are.
    """
    model = build_on_meta(config, dtype, parallel).requires_grad_(False)
    if quantize_skip is not None:
        quantize_on_meta(model, quantize_skip)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _quantize_skip(layouts: Sequence[Layout], quantize: str | None) -> Sequence[str] | None:
    """The matrices that are not in four bits, as in the base or as it was trained on; None = none is in four bits."""
    if (quantization := read_quantization(layouts[0].folder)) is not None:
        return quantization.skip
    bases = [read_base(layout.folder) for layout in reversed(layouts)]
    trained = [base.quantised for base in bases if base is not None and base.quantised is not None]
    if quantize == "none" or (quantize is None and not trained):
        return None
    return trained[0].skip if trained else ()
