"""The model a run starts from: its checkpoints, its shape with what is tuned, its tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llama_acc.core.catalogue import is_address
from llama_acc.core.checkpoint.adapter import check_base
from llama_acc.core.checkpoint.huggingface import check_tower
from llama_acc.core.checkpoint.layout import Layout, inspect, locate, read_config, without_towers
from llama_acc.core.checkpoint.load import Weights, check_tensors, read_weights, with_rows
from llama_acc.core.checkpoint.quantized import read_quantization
from llama_acc.core.data.sources import resolve_data_path, resolve_image_root
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import home
from llama_acc.core.model.config import ModelConfig, check_divides, config_from_params, named_size, read_params
from llama_acc.core.model.nf4 import packed_shape
from llama_acc.core.model.transformer import quantizable, shapes_of
from llama_acc.core.model.tuning import FULL
from llama_acc.core.model.vision import check_towers_can_be_made
from llama_acc.core.recipe import RECIPES_FOLDER, Recipe
from llama_acc.core.tokenizer import Tokenizer, find_tokenizer, load_tokenizer


def find_model(
    recipe: Recipe, *, weights_may_be_absent: bool = False, saved: Path | None = None
) -> tuple[list[Layout], ModelConfig, Tokenizer]:
    """The checkpoints a run starts from, the model's shape, and its tokenizer.

    `saved` is the run's own checkpoint, to resume from: it has
    a shape and a tokenizer, and weights of all that trains.
    """
    layouts, config = find_shape(recipe, weights_may_be_absent=weights_may_be_absent, saved=saved)
    tokenizer = load_tokenizer(_tokenizer_path(recipe, layouts, saved))
    if layouts and (config.vocab_size < 0 or config.tie_word_embeddings):
        config = with_rows(config, read_weights(layouts))
    config = config.with_vocabulary(tokenizer.vocab_size)
    config.check_tokenizer(tokenizer.vocab_size, tokenizer.path)
    check_divides(config, recipe.parallel.model_parallel_size)
    return layouts, config, tokenizer


def find_shape(
    recipe: Recipe, *, weights_may_be_absent: bool, saved: Path | None = None
) -> tuple[list[Layout], ModelConfig]:
    """The checkpoints and the model's shape with what is tuned; its vocabulary may be open (-1). See `find_model`."""
    # A resumed run has weights of its own; of what does not train it may have none.
    may_be_absent = weights_may_be_absent or (saved is not None and not recipe.has_frozen)
    layouts = []
    for name in recipe.model.pretrained_list():
        try:
            layouts.append(inspect(locate(name)))
        except UserError as error:
            if Path(name).expanduser().exists():
                raise
            if not may_be_absent:
                moved = "say where it is now: --resume --pretrained DIR"
                raise UserError(error.message, moved if saved is not None else error.hint) from None
    config = _with_tuning(recipe, _with_vision(recipe, _read_config(recipe, layouts, saved)))
    check_towers_can_be_made(config.vision)
    check_base(layouts, config)
    for layout in layouts:
        _check_quantized(recipe, config, layout)
    return layouts, config


def _check_quantized(recipe: Recipe, config: ModelConfig, layout: Layout) -> None:
    """Refuses a quantized checkpoint where the recipe is for another one."""
    quantization = read_quantization(layout.folder)
    if quantization is None:
        return
    if recipe.tuning.quantize == "none":
        raise UserError(
            f"{layout.folder} is quantized: it can be a base, and not train itself",
            "set tuning.quantize=nf4, a method other than full, and checkpoint.trainable_only=true",
        )
    if quantizable(config, recipe.tuning.quantize_skip) != quantizable(config, quantization.skip):
        but = f" but {', '.join(quantization.skip)}" if quantization.skip else ""
        raise UserError(
            f"in {layout.folder} all matrices{but} are quantized, and the recipe says otherwise",
            f"set tuning.quantize_skip=[{','.join(quantization.skip)}]",
        )


def _read_config(recipe: Recipe, layouts: list[Layout], saved: Path | None) -> ModelConfig:
    """The shape: that of the checkpoints, else the recipe's."""
    model = recipe.model
    moved = saved is not None and not layouts and model.pretrained_list()
    config = read_config([inspect(saved)] if saved is not None and moved else layouts)
    if config is None and isinstance(model.params, dict):
        config = config_from_params(model.params)
    elif config is None and model.params is not None:
        names = [model.params] if isinstance(model.params, str) else model.params
        config = config_from_params(read_params([beside(name, recipe.folder) for name in names]), " and ".join(names))
    elif config is None and model.size is not None:
        config = named_size(model.size)
    if config is None:
        raise UserError("the model's shape is not known", "give model.params or model.size, or a checkpoint with both")
    return config if model.max_seq_len is None else replace(config, max_seq_len=model.max_seq_len)


def _with_tuning(recipe: Recipe, config: ModelConfig) -> ModelConfig:
    """The shape with what the recipe's method adds. What was tuned by a method can be resumed with that one only."""
    tuning = recipe.tuning.resolved().with_num_layers(config.n_layers)
    if config.tuning not in (FULL, tuning):
        was, wanted = config.tuning.to_keys(tuning), tuning.to_keys(config.tuning)
        raise UserError(f"the checkpoint was tuned as ({was}), the recipe says ({wanted})", f"set {was}")
    widths = {"dim": config.dim, "the SwiGLU width": config.hidden_dim, "the keys' width": config.kv_dim}
    tuning.check(widths, config.n_layers)
    if recipe.tuning.quantize == "nf4":
        quantizable(config, recipe.tuning.quantize_skip)  # raises where one to be left out is none of them
        for width in {config.dim, config.hidden_dim}:
            packed_shape(1, width // recipe.parallel.model_parallel_size)
    return replace(config, tuning=tuning)


def _with_vision(recipe: Recipe, config: ModelConfig) -> ModelConfig:
    """The shape with what the recipe says of vision; a checkpoint's own sizes win."""
    wanted = recipe.vision.resolved()
    if wanted is None:
        return config
    if config.vision is not None and config.vision.encoder != wanted.encoder:
        raise UserError(
            f"the checkpoint has vision encoder '{config.vision.encoder}', the recipe says '{wanted.encoder}'",
            f"set vision.encoder={config.vision.encoder}",
        )
    return replace(config, vision=config.vision or wanted, vision_training=recipe.vision.training())


def beside(name: str, folder: Path | None) -> Path:
    """Where a file named by a recipe is: of the package, beside the recipe, or as it stands."""
    if name.startswith("shipped:"):
        return RECIPES_FOLDER / name.removeprefix("shipped:")
    path = Path(name).expanduser()
    return folder / path if folder is not None and (folder / path).exists() else path


def _tokenizer_path(recipe: Recipe, layouts: list[Layout], saved: Path | None) -> Path:
    named = recipe.model.tokenizer
    folders = [layout.folder for layout in without_towers(layouts)]
    if named is not None:
        path = beside(named, recipe.folder)
        if saved is None or path.exists() or Recipe.load(saved / "recipe.yaml").model.tokenizer != named:
            return path
        folders = []  # what the run began with was moved: its checkpoint has a copy
    for folder in [*reversed(folders), *([] if saved is None else [saved])]:
        if (found := find_tokenizer(folder)) is not None:
            return found
    where = f" in {' or '.join(str(layout.folder) for layout in layouts)}" if layouts else ""
    raise UserError(
        f"there is no tokenizer{where}", "give it with --tokenizer FILE (tokenizer.model or tokenizer.json)"
    )


def read_base_weights(layouts: Sequence[Layout], config: ModelConfig, parallel: Parallel) -> Weights | None:
    """Maps a rank's share of the weights a run starts from, all of them checked; None = random weights."""
    if not layouts:
        return None
    weights = read_weights(layouts, parallel.model_rank, parallel.model_size)
    where = " and ".join(str(layout.folder) for layout in layouts)
    check_tensors(weights, _needed(config, weights, where), where)
    return weights


def _needed(config: ModelConfig, weights: Weights, where: str) -> Mapping[str, tuple[int, ...]]:
    """What a run's base must hold: nothing or all of what the method adds, and so with vision."""
    check_tower(config.vision, weights.tensors, where)
    needed, added, parts = shapes_of(config, "llama", "tower"), shapes_of(config, "tuning"), shapes_of(config, "vision")
    if any(name in weights.tensors for name in added):
        needed |= added
    if any(name in weights.tensors for name in parts):
        needed |= parts
    elif parts and config.vision_training.stage == 2:
        raise UserError(
            f"nothing of what stage one of vision trains is in {where}: {', '.join(list(parts)[:3])}, ...",
            "give a checkpoint of stage one besides (--pretrained RUN), or train that: vision.stage=1",
        )
    return needed


def with_absolute_paths(
    recipe: Recipe, layouts: list[Layout], tokenizer: Tokenizer, saved: Path | None = None
) -> Recipe:
    """The recipe with absolute paths, so that it means the same from any folder. It does not name the run's own
    checkpoint `saved`, which will be removed."""
    recipe = recipe.model_copy(deep=True)
    model, data = recipe.model, recipe.data
    if isinstance(model.params, (str, list)):
        names = [model.params] if isinstance(model.params, str) else model.params
        model.params = [_absolute(name, beside(name, recipe.folder)) for name in names]
    for source in data.sources:
        source.path = _absolute_data(source.path, recipe.folder)
        if source.root is not None:
            source.root = str(resolve_image_root(source.root, recipe.folder).absolute())
    if data.validation.path is not None:
        data.validation.path = _absolute_data(data.validation.path, recipe.folder)
    if layouts:
        model.pretrained = [str(layout.folder.resolve()) for layout in layouts]
    if saved is None or tokenizer.path.parent.resolve() != saved.resolve():
        model.tokenizer = _absolute(model.tokenizer or "", tokenizer.path)
    return recipe


def _absolute_data(path: str, folder: Path | None) -> str:
    return path if is_address(path) else _absolute(path, resolve_data_path(path, folder))


def _absolute(name: str, found: Path) -> str:
    """Where `name` was found; what is shipped or downloaded keeps its name, which is found from everywhere."""
    if name.startswith("shipped:") or found == home() / "data" / name:
        return name
    return str(found.absolute())
