"""Which dimension of which tensor is split over the ranks of a model-parallel group. Imports no torch.

The rule is that of Meta's and LLaMA2-Accessory's checkpoints, so a rank's part is a shard of such a checkpoint:
matrices that read the residual stream (wq wk wv w1 w3 output) are split by rows (column-parallel, dimension 0), those
that write to it (wo w2) by columns (row-parallel, dimension 1), the embedding by features (dimension 1); norms are
whole everywhere. A bias is split with the rows of its matrix, the gate of zero-init attention with the heads.
"""

from llama_acc.core.errors import UserError, listed
from llama_acc.core.model.config import ModelConfig

COLUMN_PARALLEL = frozenset({"wq", "wk", "wv", "w1", "w3", "output"})
ROW_PARALLEL = frozenset({"wo", "w2", "tok_embeddings"})
SIZES = (1, 2, 4, 8)
"""Model-parallel sizes there are checkpoints for."""


def split_dimension(name: str) -> int | None:
    """The dimension in which a parameter (Meta's name) is split; None = every rank has all of it."""
    module, _, kind = name.rpartition(".")
    outer, _, leaf = module.rpartition(".")
    if leaf in ("lora_a", "lora_b"):
        # Of a column-parallel matrix's pair the second is split by rows, of a row-parallel one's the first by columns.
        matrix = outer.rpartition(".")[2]
        if leaf == "lora_b":
            return 0 if matrix in COLUMN_PARALLEL else None
        return 1 if matrix in ROW_PARALLEL else None
    if kind == "bias":
        return 0 if leaf in COLUMN_PARALLEL else None
    if kind == "prefix_gate":
        return 1
    if kind != "weight":
        return None
    if leaf in COLUMN_PARALLEL:
        return 0
    return 1 if leaf in ROW_PARALLEL else None


def local_shape(name: str, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The shape of one rank's part of a parameter of full `shape`, in a group of `size`."""
    dimension = split_dimension(name)
    if dimension is None:
        return shape
    return (*shape[:dimension], shape[dimension] // size, *shape[dimension + 1 :])


def check_divides(config: ModelConfig, size: int) -> None:
    """Refuses a model-parallel size that does not divide the model.

    Raises:
        UserError: every number it does not divide, with the size.
    """
    if size not in SIZES:
        raise UserError(f"model-parallel size {size} is not one of {', '.join(map(str, SIZES))}")
    numbers = {
        "n_heads": config.n_heads,
        "n_kv_heads": config.kv_heads,
        "dim": config.dim,
        "the SwiGLU width": config.hidden_dim,
        "vocab_size": config.vocab_size,
    }
    problems = [
        f"{name} ({number}) is not divisible by the model-parallel size ({size})"
        for name, number in numbers.items()
        if number > 0 and number % size
    ]
    if problems:
        fitting = [str(s) for s in SIZES if not any(number > 0 and number % s for number in numbers.values())]
        raise UserError(
            f"the model cannot be split over {size} ranks:\n{listed(problems)}",
            f"model-parallel sizes that fit: {', '.join(fitting)}",
        )
