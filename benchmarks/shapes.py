"""The two model shapes the benchmarks run on, and random checkpoints of them in Meta's layout.

Random weights cost the same to compute with as trained ones, so the benchmarks need no download. The names say the
order of size: with its own output head over 32,000 pieces, "15M" has 24.4 and "60M" 56.0 million parameters.

    python benchmarks/shapes.py 15M --tokenizer tokenizer.model OUT_DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VOCAB_SIZE = 32000

# params.json as Meta writes it; `multiple_of` is chosen so that the SwiGLU width comes out as 768 and 1376.
SHAPES: dict[str, dict] = {
    "15M": {"dim": 288, "n_layers": 6, "n_heads": 6, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": VOCAB_SIZE},
    "60M": {
        "dim": 512,
        "n_layers": 8,
        "n_heads": 8,
        "n_kv_heads": 4,
        "multiple_of": 32,
        "norm_eps": 1e-5,
        "vocab_size": VOCAB_SIZE,
    },
}


def hidden_width(params: dict) -> int:
    """SwiGLU width by Meta's rule: two thirds of 4 * dim, rounded up to a multiple of `multiple_of`."""
    width = int(2 * 4 * params["dim"] / 3)
    multiple = params["multiple_of"]
    return multiple * -(-width // multiple)


def weight_shapes(params: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, in the order Meta's checkpoints list them."""
    dim, hidden, vocab = params["dim"], hidden_width(params), params["vocab_size"]
    kv_dim = dim // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim)}
    for layer in range(params["n_layers"]):
        shapes |= {
            f"layers.{layer}.attention.wq.weight": (dim, dim),
            f"layers.{layer}.attention.wk.weight": (kv_dim, dim),
            f"layers.{layer}.attention.wv.weight": (kv_dim, dim),
            f"layers.{layer}.attention.wo.weight": (dim, dim),
            f"layers.{layer}.feed_forward.w1.weight": (hidden, dim),
            f"layers.{layer}.feed_forward.w2.weight": (dim, hidden),
            f"layers.{layer}.feed_forward.w3.weight": (hidden, dim),
            f"layers.{layer}.attention_norm.weight": (dim,),
            f"layers.{layer}.ffn_norm.weight": (dim,),
        }
    return shapes | {"norm.weight": (dim,), "output.weight": (vocab, dim)}


def random_weights(params: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32 weights, normal with std 0.02, norms 1: a function of `params` and `seed` only."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) if name.endswith("norm.weight") else 0.02 * torch.randn(shape, generator=generator)
        for name, shape in weight_shapes(params).items()
    }


def make_checkpoint(folder: Path, shape: str, tokenizer: Path, seed: int = 0) -> None:
    """Write consolidated.00.pth, params.json and tokenizer.model, as Meta's releases have them.

    Args:
        folder: made if missing; files of the same names are overwritten.
        shape: a key of `SHAPES`.
        tokenizer: SentencePiece model of 32,000 pieces, copied into the folder.
        seed: of the random weights.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    torch.save(random_weights(SHAPES[shape], seed), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(SHAPES[shape]) + "\n")
    shutil.copyfile(tokenizer, folder / "tokenizer.model")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a random checkpoint in Meta's layout.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_checkpoint(args.folder, args.shape, args.tokenizer, args.seed)


if __name__ == "__main__":
    main()
