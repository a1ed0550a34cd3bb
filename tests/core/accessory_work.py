"""Models that see, read from folders as LLaMA2-Accessory saves them, by one process or by several that share them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.load import check_tensors, fill, read_weights
from llama_acc.core.distributed.groups import Parallel, init_distributed
from llama_acc.core.generate.load import VisionEncoder, load_vision_encoder
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.transformer import Transformer, build_on_meta, shapes_of
from llama_acc.core.model.vision import Images
from llama_acc.core.model.vision_config import VISION_FILE
from tests.core.accessory import ACCESSORY, pixels, sampled, tokens, weights_by_rule
from tests.core.ranks import next_port
from tests.core.seeing import logits_of
from tests.core.tiny import CPU, GOLDEN

# What was computed there, and the image of each of the two prompts.
WHOLE: dict[str, list[int | None]] = {
    "logits": [0, 1],
    "logits_of_one_image": [0, 0],
    "logits_of_text": [None, None],
}
CACHED: dict[str, list[int | None]] = {"cached_logits": [0, 1], "cached_logits_of_text": [None, None]}


class Loaded(NamedTuple):
    """A model, or this process's share of it, and what sees for it."""

    model: Transformer
    vision_encoder: VisionEncoder

    def features(self) -> Tensor:
        """Of both images; under model parallelism as the process with the tower tells the other."""

        def encode() -> Tensor:
            assert self.vision_encoder.tower is not None
            with torch.no_grad():
                return self.vision_encoder.tower(pixels())

        return self.vision_encoder.inputs(len(pixels()), encode)

    def projected(self) -> Tensor:
        """What is made of the features: between an image's start and end vector, or for the prefix."""
        sight, positions = self.model.vision, self.vision_encoder.vision.positions
        assert sight is not None
        stream = torch.zeros(2 * positions, self.model.config.dim)
        with torch.no_grad():
            x, prefixes = sight(stream, Images(self.features(), torch.arange(2 * positions), [0, 1]), 2)
        return prefixes if prefixes is not None else x.unflatten(0, (2, positions))[:, 1:-1]

    def documents(self, images: list[int | None], features: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """The prompts, each with one of the images or none; `features` of both, if they are kept somewhere."""
        features = self.features() if features is None else features
        none = features[:0]
        seen = [none if image is None else features[image : image + 1] for image in images]
        return list(zip(tokens(), seen, strict=True))

    def logits(self, images: list[int | None], alone: bool = False, features: Tensor | None = None) -> Tensor:
        """Of the words, [2, T, V]: those of an image's positions, of which the first is that of BOS, are left out."""
        documents, model = self.documents(images, features), self.model
        found = [logits_of(model, [one])[0] for one in documents] if alone else logits_of(model, documents)
        rows = [logits[-len(words) :] for logits, (words, _) in zip(found, documents, strict=True)]
        return torch.stack(rows)

    def cached_logits(self, images: list[int | None]) -> Tensor:
        """Of the last three words, [2, 3, V], with the keys and values of what is before them kept."""
        rows = []
        for words, features in self.documents(images):
            room = len(features) * self.vision_encoder.vision.positions
            whole = torch.cat((words[:1], torch.zeros(room, dtype=torch.int64), words[1:]))
            cache, found = KVCache(self.model.config.n_layers), []
            start = len(whole) - 3
            with torch.no_grad():
                for at in (torch.arange(start + 1), torch.tensor([start + 1]), torch.tensor([start + 2])):
                    seen = Images(features, torch.arange(1, room + 1), [0] * len(features)) if len(at) > 1 else None
                    hidden = self.model(whole[at], at, [len(at)], caches=[cache], images=seen)
                    found.append(self.model.logits(hidden)[-1])
            rows.append(torch.stack(found))
        return torch.stack(rows)


def golden_of(name: str) -> dict[str, Any]:
    """What LLaMA2-Accessory's own code made of the weights of the rule."""
    return json.loads((GOLDEN / "vision" / f"accessory-{name}.json").read_text(encoding="utf-8"))


def save_as_accessory(name: str, folder: Path) -> None:
    """Writes a checkpoint with its names and the weights of the rule."""
    config = ACCESSORY[name]
    assert config.vision is not None
    named = {f"llma.{key}": value for key, value in weights_by_rule(golden_of(name)["names"]).items()}
    torch.save({"model": named}, folder / "consolidated.00-of-01.model.pth")
    (folder / "config.json").write_text(json.dumps(config.to_params()))
    (folder / "meta.json").write_text(json.dumps({"llama_type": name}))
    # Its own are of one shape only and say nothing.
    (folder / VISION_FILE).write_bytes(config.vision.to_json())


def load(folder: Path, parallel: Parallel | None = None) -> Loaded:
    """Reads a process's share of a checkpoint."""
    parallel = parallel or Parallel()
    layout = inspect(folder)
    config = read_config([layout])
    assert config is not None
    weights = read_weights([layout], parallel.model_rank, parallel.model_size)
    check_tensors(weights, shapes_of(config), folder)
    model = build_on_meta(config, torch.float32, parallel)
    fill(model, weights, CPU, torch.float32, copy=True)
    encoder = load_vision_encoder(model, weights, CPU)
    assert encoder is not None
    assert (encoder.tower is None) == bool(parallel.model_rank)
    if encoder.tower is not None:
        assert not weights.tensors
    return Loaded(model, encoder)


def shared(folders: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Everything that tests/golden/vision has, of models that two processes share; by their names."""
    made = {}
    for name, folder in folders.items():
        with init_distributed(CPU, 2) as parallel:
            loaded = load(Path(folder), parallel)
            values = {"features": sampled(loaded.features()), "projected": sampled(loaded.projected())}
            for key, images in WHOLE.items():
                values |= {key: loaded.logits(images), f"{key}, alone": loaded.logits(images, alone=True)}
            values |= {key: loaded.cached_logits(images) for key, images in CACHED.items()}
            made[name] = {key: value.tolist() for key, value in values.items()}
        next_port()
    return made
