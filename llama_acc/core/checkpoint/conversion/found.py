"""What a conversion starts from: checkpoints that were found and checked against one another."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama_acc.core.atomic import check_checkpoint
from llama_acc.core.checkpoint.adapter import check_base, check_same_base, is_part, needs_base
from llama_acc.core.checkpoint.conversion.request import Request
from llama_acc.core.checkpoint.layout import Layout, inspect, locate, read_config
from llama_acc.core.checkpoint.load import Weights, check_tensors, read_weights, with_rows
from llama_acc.core.checkpoint.peft import check_peft
from llama_acc.core.errors import UserError
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.tuning import FULL, Tuning, merged_tuning


@dataclass(frozen=True)
class Found:
    """Checked input of a conversion.

    Attributes:
        layouts: what is converted, laid over each other from left to right.
        weights: theirs.
        config: their shape, with what a tuning method added.
        is_part: there is only what was trained, and it is converted as that.
        subtracted: the weights to subtract, for a diff; else None.
    """

    layouts: list[Layout]
    weights: Weights
    config: ModelConfig
    is_part: bool
    subtracted: Weights | None

    @property
    def source(self) -> Layout:
        """The checkpoint that was asked for."""
        return self.layouts[-1]


def find(request: Request) -> Found:
    """Finds what is to be converted and checks it; nothing but headers and samples is read.

    Raises:
        UserError: a checkpoint that is missing or damaged, does not fit the other one, or cannot become what is wanted.
    """
    source = inspect(locate(str(request.source)))
    base = None if request.base is None else inspect(locate(str(request.base)))
    if source.is_diff and base is None:
        raise UserError(f"{source.folder} is a diff checkpoint: it is added to its base", "give that with --base DIR")
    layouts = [source] if request.diff or base is None else [base, source]
    weights = read_weights(layouts)
    config = _config(layouts, weights)
    has_all = not is_part(source)
    # What was trained alone is converted as that, unless its base is given.
    is_alone = not has_all and base is None
    _check_tuned(request, config, is_alone, source)
    if not is_alone:
        check_base(layouts, config)
    if base is not None and has_all and config.tuning != FULL and not request.diff and not source.is_diff:
        check_same_base(source, weights, base, config)
    for layout in [source, *([base] if base else [])]:
        check_checkpoint(layout.folder, verify=False)
    shapes = config.parameter_shapes()
    if is_alone:
        shapes = {name: shape for name, shape in shapes.items() if _is_of_part(name, config, weights)}
    check_tensors(weights, shapes, source.folder)
    if base is None or not request.diff:
        return Found(layouts, weights, config, is_alone, None)
    subtracted = read_weights([base])
    check_tensors(subtracted, config.parameter_shapes(), base.folder)
    return Found(layouts, weights, config, is_alone, subtracted)


def _is_of_part(name: str, config: ModelConfig, weights: Weights) -> bool:
    """Whether a parameter belongs to what was trained alone; of vision that depends on the stage, so what is there."""
    if config.vision is None:
        return config.trains(name)
    return name in weights.tensors or (config.trains(name) and name not in config.vision_parts)


def _config(layouts: Sequence[Layout], weights: Weights) -> ModelConfig:
    config = read_config(layouts)
    if config is None:
        raise UserError(f"{layouts[-1].folder} has no params.json or config.json: the model's shape is not known")
    return with_rows(config, weights)


def _check_tuned(request: Request, config: ModelConfig, is_part: bool, source: Layout) -> None:
    """Refuses what a method cannot become.

    Raises:
        UserError: saying what it can.
    """
    tuning = config.tuning
    if config.vision is not None and request.to != "consolidated":
        raise UserError(
            f"{source.folder} sees (encoder {config.vision.encoder}), which layout '{request.to}' has no place for",
            "keep it with --to consolidated",
        )
    if request.to == "peft":
        check_peft(tuning)
    elif request.merge:
        _check_merge(request, tuning, is_part, source)
    elif tuning != FULL and (request.to == "meta" or (request.to == "hf" and tuning != Tuning("bias_norm"))):
        hint = "keep it with --to consolidated" + ("" if tuning.what.prefix else ", or merge it with --merge")
        raise UserError(
            f"{source.folder} was tuned with method {tuning.method}, which layout '{request.to}' has no place for", hint
        )
    elif is_part and request.to != "consolidated":
        raise needs_base(source, "--base")


def _check_merge(request: Request, tuning: Tuning, is_part: bool, source: Layout) -> None:
    left = merged_tuning(tuning)
    if tuning == FULL:
        raise UserError(f"{source.folder} has nothing to merge: no method added anything", "leave --merge out")
    if is_part:
        raise needs_base(source, "--base")
    if left != FULL and request.to == "meta":
        raise UserError(
            f"{source.folder} has biases (method {tuning.method}), and Meta's layout has no place for them",
            "use --to hf or --to consolidated",
        )
