"""Memory of LLaMA2-13B with BLIP-2's Q-Former, and what images cost on a CPU.

The shapes are the real ones, the weights are zeros: memory does not depend on them, so there is nothing to download.

    python benchmarks/vision.py memory              # the prediction, on any machine
    python benchmarks/vision.py memory --measure    # on a GPU: peak reserved, beside the prediction
    python benchmarks/vision.py mixed               # tiny shapes on a CPU: with, without and mixed
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from llama_acc.core.data.batches import MicroBatch
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.generate.load import load_vision_encoder
from llama_acc.core.memory.predict import predict, predict_generation
from llama_acc.core.memory.simulate import Setup, add_fake_images, empty_batch
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.config import ModelConfig, named_size
from llama_acc.core.model.transformer import Transformer, build_on_meta, initialize
from llama_acc.core.model.tuning.lora import LoRABiasNorm
from llama_acc.core.model.vision import Images
from llama_acc.core.model.vision_config import QFormerVision
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.optimizer import ClippedAdamW
from llama_acc.core.train.plan import StepSettings
from llama_acc.core.train.step import train_step
from llama_acc.core.train.trainer import assemble

GIB, TOKENS = 2**30, 512
TINY = QFormerVision(28, 14, 32, 64, 2, 4, 32, 48, 64, 2, 4)


@dataclass(frozen=True)
class Case:
    """One of the figures published for LLaMA2-Accessory, on an A100 of 80 GB, batch 1 of 512 tokens.

    Attributes:
        quantize: none | nf4.
        training: the most GiB it should take in training; published: its GB.
        inference: in generation.
    """

    quantize: str
    training: float
    published_training: int
    inference: float
    published_inference: int


CASES = [Case("nf4", 11.0, 15, 9.8, 13), Case("none", 29.5, 38, 27.5, 31)]


def setup_of(case: Case) -> Setup:
    """LoRA and bias-norm tuning of the 13B with an image in a document of 512 tokens, in one process."""
    words = ["parallel.model_parallel_size=1", f"tuning.quantize={case.quantize}", "train.batch_size=1"]
    recipe = Recipe.load("llava-qformer-13b-lora-nf4", words)
    config = replace(named_size("llama2-13b"), tuning=LoRABiasNorm(16), vision=QFormerVision())
    return Setup(config, StepSettings.of(recipe), (TOKENS,), device_type="cuda")


def memory(measure: bool) -> None:
    """Prints each figure beside what it should be at most and what was published."""
    for case in CASES:
        setup = setup_of(case)
        rows = {
            "training": (predict(setup).reserved, case.training, case.published_training),
            "inference": (predict_generation(setup, TOKENS).reserved, case.inference, case.published_inference),
        }
        for name, (predicted, most, published) in rows.items():
            line = f"13B + Q-Former, {'NF4' if case.quantize == 'nf4' else 'bf16'}, {name}: "
            line += f"{predicted / GIB:.2f} GiB predicted, at most {most}, published {published} GB"
            if measure:
                line += f", {measured(setup, name) / GIB:.2f} GiB measured"
            print(line, flush=True)


def measured(setup: Setup, what: str) -> int:
    """Peak reserved on a GPU of two optimizer steps, or of a conversation, each with an image through the tower."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)

    def zeros(model: Transformer) -> None:
        model.to_empty(device=device)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()

    parts = assemble(setup.config, setup.settings, Parallel(), "cuda", zeros)
    encoder = load_vision_encoder(parts.model, None, device)
    assert encoder is not None
    pixels = torch.zeros((1, 3, *[encoder.vision.image_size] * 2), dtype=torch.uint8)
    if what == "training":
        batch = add_fake_images(empty_batch(setup.lengths), parts.model)
        for _ in range(2):
            seen = replace(batch, inputs=encoder.encode(pixels))
            train_step(parts.model, parts.optimizer, parts.data_parallel, [seen], TOKENS, 0.0, device).loss.item()
    else:
        generate(parts.model.requires_grad_(False), encoder.encode(pixels), device)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved(device)


@torch.inference_mode()
def generate(model: Transformer, inputs: torch.Tensor, device: torch.device) -> None:
    """A prompt of half the tokens with an image, then one token at a time."""
    assert model.config.vision is not None
    cache, half = KVCache(model.config.n_layers), TOKENS // 2
    places = torch.arange(1, 1 + model.config.vision.positions, device=device)
    tokens = torch.zeros(half, dtype=torch.int64, device=device)
    hidden = model(
        tokens, torch.arange(half, device=device), [half], caches=[cache], images=Images(inputs, places, [0])
    )
    for position in range(half, TOKENS):
        model.logits(hidden[-1:])
        hidden = model(tokens[:1], torch.tensor([position], device=device), [1], caches=[cache])


def tiny_batch(kinds: list[bool], words: int, vision: QFormerVision) -> MicroBatch:
    """Documents with (True) and without images, all of one length in the stream, so of as many real tokens."""
    lengths = [words] * len(kinds)
    total = sum(lengths)
    owners = [number for number, seen in enumerate(kinds) if seen]
    begins = np.array(owners, dtype=np.int64) * words + 1
    return MicroBatch(
        tokens=np.full(total, 5),
        targets=np.full(total, 6),
        positions=np.concatenate([np.arange(words)] * len(kinds)),
        lengths=lengths,
        image_documents=tuple(owners),
        image_places=(begins[:, None] + np.arange(vision.positions)).reshape(-1),
        inputs=torch.randn(len(owners), *vision.input_shape),
    )


def mixed(rounds: int, words: int) -> None:
    """Seconds for a real token of batches with images only, without, and mixed, in turns; and their ratios."""
    torch.manual_seed(0)
    config = ModelConfig(256, 4, 8, 8, vocab_size=2000, multiple_of=32, max_seq_len=512, vision=TINY)
    model = build_on_meta(config, torch.float32)
    model.to_empty(device="cpu")
    initialize(model, 0)
    optimizer = ClippedAdamW(model, model.specs, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, clip_grad_norm=2.0)
    alone, cpu = DataParallel(model, Parallel(), "ddp", False, "cpu"), torch.device("cpu")
    batches = {
        "without images": tiny_batch([False] * 8, words, TINY),
        "with images": tiny_batch([True] * 8, words, TINY),
        "mixed": tiny_batch([True, False] * 4, words, TINY),
    }
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(rounds + 1):
        for name, batch in batches.items():
            start = time.perf_counter()
            train_step(model, optimizer, alone, [batch], len(batch.tokens), 0.0, cpu).loss.item()
            if turn:
                seconds[name].append((time.perf_counter() - start) / len(batch.tokens))
    for name, found in seconds.items():
        print(f"{name}: {statistics.median(found) * 1e6:.1f} us for a token")
    slower = max(statistics.median(seconds[name]) for name in ("without images", "with images"))
    print(f"mixed / the slower of the two: {statistics.median(seconds['mixed']) / slower:.3f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "mixed"])
    parser.add_argument("--measure", action="store_true", help="on a GPU")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--words", type=int, default=128, help="positions of a document")
    arguments = parser.parse_args()
    if arguments.what == "memory":
        memory(arguments.measure)
    else:
        mixed(arguments.rounds, arguments.words)


if __name__ == "__main__":
    main()
