"""Compiles every kernel for a GPU, which need not be here: `python -m tests.core.model.compile_kernels`."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llama_acc.core.model import triton_kernels

_BYTES = {"packed", "absmax"}
_INTEGERS = {"slots", "positions", "targets"}
_FLOATS = {"nested", "offset", "levels", "magnitudes", "sums", "logs", "rotations", "weights", "losses", "factors"}
_VALUES = {"gate", "up", "product", "d_product", "values", "keys", "q", "k", "v", "new_q", "outputs"}
_VALUES |= {"x", "y", "a", "b", "logits", "bias", "weight", "normed", "prefix_keys", "prefix_values"}
_SIZES = {"BLOCKS": 32, "COLUMNS": 1024, "HEADS": 8, "HALF": 64, "PARTS": 8, "GROUP": 16, "SIZE": 128, "PLACES": 64}
_SIZES |= {"TOKENS": 32, "ROWS": 32, "RANK": 16, "WIDE": 2, "OFFSETS": 1, "PREFIX": 16}
_CONSTANTS = {**_SIZES, "TURNS": True, "STORES": True, "FIRST": False}


def kind(name: str) -> str:
    """The type of a kernel's argument of this name, as Triton writes it."""
    if name in _CONSTANTS:
        return "constexpr"
    pointers = ((_BYTES, "*u8"), (_INTEGERS, "*i64"), (_FLOATS, "*fp32"), (_VALUES, "*bf16"))
    found = [written for names, written in pointers if name in names]
    return found[0] if found else "fp32" if name in ("sign", "scale", "eps", "factor", "pair_factor") else "i32"


if __name__ == "__main__":
    for name, kernel in vars(triton_kernels).items():
        if isinstance(kernel, triton.JITFunction) and name != "_turn":  # that is called by others
            constants = {argument: _CONSTANTS[argument] for argument in kernel.arg_names if argument in _CONSTANTS}
            signature = {argument: kind(argument) for argument in kernel.arg_names}
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            print(name, len(made.asm["cubin"]))
