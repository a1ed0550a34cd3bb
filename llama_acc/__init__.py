"""llama-acc: from a LLaMA checkpoint and a data file to a fine-tuned model you can talk to.

The public Python interface is `Recipe`, `finetune`, `load_model` and `generate`; everything else may move.
Names are resolved on first use, so `import llama_acc` stays light: torch is imported only when a model is.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "finetune", "generate", "load_model"]

if TYPE_CHECKING:
    from llama_acc.core.finetune import finetune as finetune
    from llama_acc.core.generate.chat import generate as generate
    from llama_acc.core.generate.load import load_model as load_model
    from llama_acc.core.recipe import Recipe as Recipe

_PUBLIC = {
    "Recipe": "llama_acc.core.recipe",
    "finetune": "llama_acc.core.finetune",
    "generate": "llama_acc.core.generate.chat",
    "load_model": "llama_acc.core.generate.load",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llama_acc' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
