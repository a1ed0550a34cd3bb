"""What the processes of test_images.py do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llama_acc.core.distributed.groups import init_distributed
from llama_acc.core.generate.chat import insert_images
from llama_acc.core.generate.engine import Engine, Prompt, stop_followers
from llama_acc.core.generate.load import LoadedModel, load_model
from llama_acc.core.generate.sampling import Sampling
from llama_acc.core.model.vision import Images, Tower
from tests.core.generate.decoding import decode
from tests.core.ranks import next_port
from tests.core.tiny import CPU

GREEDY = Sampling(temperature=0, max_new_tokens=6)


def pictures(count: int, size: int, seed: int = 0) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Images of random pixels, [3, size, size]."""
    draw = np.random.default_rng(seed)
    return list(draw.integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def seen_logits(loaded: LoadedModel, words: Sequence[int], count: int) -> dict[str, Any]:
    """Features and logits of words about some images, and how many images a tower was run on in this process."""
    encoder = loaded.vision_encoder
    assert encoder is not None
    encoded: list[int] = []
    if isinstance(encoder.tower, Tower):
        encoder.tower.register_forward_hook(lambda module, given, output: encoded.append(len(given[0])))
    pixels = torch.from_numpy(np.stack(pictures(count, encoder.vision.image_size)))
    inputs = encoder.inputs(count, lambda: encoder.encode(pixels))
    ids = torch.tensor(insert_images(loaded, list(words), count))
    with torch.no_grad():
        images = Images(inputs, (ids < 0).nonzero().flatten(), [0] * count)
        hidden = loaded.model(ids.clamp(min=0), torch.arange(len(ids)), [len(ids)], images=images)
        logits = loaded.model.logits(hidden)
    return {"features": inputs.tolist(), "logits": logits.tolist(), "encoded": sum(encoded)}


def split_logits(todo: Sequence[tuple[str, int]], words: list[int]) -> list[dict[str, Any]]:
    """`seen_logits` of models that all processes share, each with so many images; and what is said about the images, of
    the words alone, and about the images again, two of these at a time."""
    results = []
    for folder, images in todo:
        with init_distributed(CPU, 2) as parallel:
            loaded = load_model(folder, device="cpu", parallel=parallel)
            found = seen_logits(loaded, words, images)
            results.append(found)
            if parallel.is_main:
                assert loaded.vision is not None
                given = pictures(images, loaded.vision.image_size)
                prompts = [Prompt(insert_images(loaded, words, images), given), Prompt(words)]
                replies = decode(Engine(loaded), [*prompts, prompts[0]], GREEDY, batch_size=2)
                found["said"] = [reply.tokens for reply in sorted(replies, key=lambda reply: reply.index)]
                stop_followers(loaded)
            else:
                Engine(loaded).follow()
        next_port()
    return results
