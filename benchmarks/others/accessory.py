"""Counts what LLaMA2-Accessory took in August 2023, when its figures were published.

    git clone https://github.com/Alpha-VLLM/LLaMA2-Accessory
    git -C LLaMA2-Accessory checkout 2c3fd22      # 83f3176 for `--only 13B`
    python benchmarks/others/accessory.py LLaMA2-Accessory --only 70B

Its models and quantisation are imported and run unchanged on tensors without values, in the order of its training and
its demos: made on the CPU, moved, then two steps of an example padded to 512 tokens, or a prompt and a token more. Put
in their place from outside are bitsandbytes' layers and FlashAttention (`counting`), apex's norm and optimizer, how
BLIP-2 is made, and FSDP of one process, which keeps what trains in float32 and computes with a copy in bf16.

What its figures count is not said. Its 70B needs eight GPUs in bf16; its recipe of 13B in bf16 is for two.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from counting import Linear4bit, LineTracker, Row, counted, main_of
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from llama_acc.core.distributed.groups import simulated
from llama_acc.core.memory.simulate import gpu_attention
from llama_acc.core.memory.tracker import MemoryTracker, Phase

SHAPES: dict[str, dict[str, Any]] = {
    "13b": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40},
    "70b": {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
    },
}
WORDS = 32000
LENGTH = 512
"""Tokens of an example: its data are padded."""
CACHE = 2048
"""Positions that keys and values are kept for: its demos leave ModelArgs' max_seq_len as it is."""


def _row(what: str, published: float, ranks: int = 1) -> Row:
    run = {
        "size": "70b" if what.startswith("70B") else "13b",
        "quantise": "NF4" in what,
        "training": what.endswith("training"),
        "ranks": ranks,
    }
    return Row(f"{what} (of {ranks} ranks)" if ranks > 1 else what, published / ranks, run, "device")


ROWS = (
    _row("70B bias-norm BF16, inference", 145, 8),
    _row("70B bias-norm BF16, training", 165, 8),
    _row("70B bias-norm NF4, inference", 36),
    _row("70B bias-norm NF4, training", 46),
    _row("13B + Q-Former LoRA BF16, inference", 31),
    _row("13B + Q-Former LoRA BF16, training", 38, 2),
    _row("13B + Q-Former LoRA NF4, inference", 13),
    _row("13B + Q-Former LoRA NF4, training", 15),
)


class _Norm(torch.autograd.Function):
    """apex's FusedRMSNorm: keeps its input, the weight and one number of a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class FusedRMSNorm(nn.Module):
    """See `_Norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] to the same."""
        y: Tensor = _Norm.apply(x, self.weight.to(x.dtype))
        return y


def _flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, causal: bool) -> Tensor:
    """q [B, T, H, D], k and v [B, T, K, D] to [B, T, H, D]."""
    y = gpu_attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=dropout_p, is_causal=causal)
    return y.transpose(1, 2)


def _module(name: str, **attributes: Any) -> None:
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(attributes)


class Params4bit(nn.Parameter):
    """bitsandbytes' parameter before it is moved to the GPU: the matrix as it was."""

    def __new__(cls, data: Tensor, requires_grad: bool, quant_type: str) -> "Params4bit":
        return super().__new__(cls, data, requires_grad)


class Unmoved4bit(nn.Module):
    """bitsandbytes' layer before it is moved to the GPU; `moved` is it afterwards."""

    weight: Params4bit

    def __init__(self, columns: int, rows: int, **_: Any) -> None:
        super().__init__()
        self.shape = rows, columns

    def moved(self) -> Linear4bit:
        """The matrix goes to the GPU in half precision, and is quantized there."""
        half = torch.empty(self.weight.shape, dtype=torch.float16)
        # 0.41.1 computes in its input's type, as nothing else was set.
        layer = Linear4bit(*self.weight.shape, stored_as=half.dtype, compute_dtype=torch.bfloat16, twice=True)
        del half
        return layer


def import_from(checkout: Path) -> None:
    """Makes its modules known, and stand-ins of what they import."""
    from transformers import Blip2Model  # noqa: F401  # it looks for packages that are stood in for

    sys.path.insert(0, str(checkout / "accessory"))
    nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor  # it draws again until every value is within bounds
    _module("apex")
    _module("apex.normalization", FusedRMSNorm=FusedRMSNorm)
    _module("flash_attn", flash_attn_func=_flash)
    _module("open_clip")
    _module("timm")
    _module("timm.models")
    _module("timm.models.layers", trunc_normal_=nn.init.trunc_normal_, lecun_normal_=None, to_2tuple=None)
    layers: Any = importlib.import_module("bitsandbytes").nn
    layers.Linear4bit, layers.Params4bit = Unmoved4bit, Params4bit


def blip2(*_: Any, torch_dtype: torch.dtype, **__: Any) -> nn.Module:
    """BLIP-2 with OPT 2.7B, as it is released: all of it goes to the GPU."""
    text = {"model_type": "opt", "hidden_size": 2560, "num_hidden_layers": 32, "ffn_dim": 10240,
            "num_attention_heads": 32, "vocab_size": 50304, "word_embed_proj_dim": 2560}  # fmt: skip
    from transformers import Blip2Config, Blip2Model
    from transformers.initialization import no_init_weights

    around = torch.get_default_dtype()
    torch.set_default_dtype(torch_dtype)
    with no_init_weights():
        model = Blip2Model(Blip2Config(text_config=text))
    torch.set_default_dtype(around)
    features = model.get_qformer_features  # it returned more than a tensor in 2023

    def of_2023(pixel_values: Tensor) -> SimpleNamespace:
        with torch.autocast("cpu", enabled=False):  # a CPU's autocast refuses half precision
            return SimpleNamespace(last_hidden_state=features(pixel_values))

    model.get_qformer_features = of_2023
    return model


def build(kind: str, size: str, length: int, quantise: bool) -> nn.Module:
    """Its model on the CPU, trainable parameters in float32, quantized if asked for."""
    code = importlib.import_module(f"model.LLM.{kind}")
    code.Blip2Model = SimpleNamespace(from_pretrained=blip2)
    rank = 16 if kind == "llama_qformerv2_peft" else -1
    arguments = code.ModelArgs(max_seq_len=length, vocab_size=WORDS, lora_rank=rank, bias_tuning=True, **SHAPES[size])
    torch.set_default_dtype(torch.bfloat16)
    model = code.Transformer(arguments, with_visual=kind != "llama_peft")
    torch.set_default_dtype(torch.float32)
    trainable = model.get_trainable_params()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
        if name in trainable:
            parameter.data = parameter.data.float()
    if quantise:
        quantize = importlib.import_module("util.quant").quantize
        quantize(
            model, SimpleNamespace(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")
        )
    return model


def move(model: nn.Module, tracker: MemoryTracker, label: str = "weights") -> None:
    """To the GPU, module by module, as Module.cuda does."""
    for name, child in list(model.named_children()):
        if isinstance(child, Unmoved4bit):
            setattr(model, name, moved := child.moved())
            for key, buffer in moved.named_buffers():
                tracker.label([buffer], "weights" if key == "packed" else "quantization state")
        else:
            move(child, tracker, "vision tower" if name == "qformer" else label)
    for name, parameter in list(model.named_parameters(recurse=False)):
        moved_one = nn.Parameter(torch.empty_like(parameter), parameter.requires_grad)
        setattr(model, name, moved_one)
        tracker.label([moved_one], "trainable masters" if parameter.requires_grad else label)
    for name, buffer in list(model.named_buffers(recurse=False)):
        setattr(model, name, torch.empty_like(buffer))


def compute_in_bf16(model: nn.Module) -> None:
    """FSDP's mixed precision: what trains takes part as a copy in bf16, made anew for each step."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.requires_grad:
                module.masters = getattr(module, "masters", {}) | {name: parameter}
                del module._parameters[name]
        for name, master in getattr(module, "masters", {}).items():
            setattr(module, name, master.to(torch.bfloat16))


def train(model: nn.Module, tracker: MemoryTracker, images: bool) -> None:
    """Two optimizer steps of one example, with the loop's variables: what they hold stays until they are set anew."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    block = type(model.layers[0])
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, CheckpointImpl.NO_REENTRANT),
        check_fn=lambda module: isinstance(module, block),
    )
    optimizer = torch.optim.AdamW(trainable)
    criterion = nn.CrossEntropyLoss(ignore_index=0)
    tracker.reset_peak()
    for _ in range(2):
        tracker.at(Phase("forward"))
        compute_in_bf16(model)
        words = torch.zeros((1, LENGTH), dtype=torch.int64)
        image = torch.zeros((1, 3, 224, 224), dtype=torch.float16) if images else None
        with torch.autocast("cpu", torch.bfloat16):
            output = model(words, image)
        tracker.at(Phase("loss"))
        logits = output[:, :-1].reshape(-1, WORDS).float()  # autocast does so for a loss
        loss = criterion(logits, words[:, 1:].flatten())
        del output, logits
        tracker.ended("forward")
        tracker.at(Phase("backward"))
        loss.backward()
        tracker.ended("backward")
        tracker.at(Phase("update"))
        optimizer.step()
        tracker.ended("update")
        optimizer.zero_grad(set_to_none=True)


def generate(model: nn.Module, tracker: MemoryTracker, images: bool) -> None:
    """A prompt of half the tokens, and one more."""
    tracker.reset_peak()
    allocate = model._allocate_kv_cache

    def allocated(batch: int) -> None:  # on the CPU, in float32, and moved when it is first written to
        torch.set_default_dtype(torch.bfloat16)
        allocate(batch)
        torch.set_default_dtype(torch.float32)

    model._allocate_kv_cache = allocated
    image = torch.zeros((1, 3, 224, 224), dtype=torch.float16) if images else None
    tracker.at(Phase("prompt"))
    model.forward_inference(torch.zeros((1, LENGTH // 2), dtype=torch.int64), 0, image)
    tracker.at(Phase("generation"))
    model.forward_inference(torch.zeros((1, 1), dtype=torch.int64), LENGTH // 2)
    caches = [cache for layer in model.layers for cache in (layer.attention.k_cache, layer.attention.v_cache)]
    tracker.label(caches, "KV cache")


def count(source: Path, size: str, quantise: bool, training: bool, ranks: int) -> LineTracker:
    """Tracks rank 0 of a run; what was there before the model was moved is on the CPU."""
    sees = size == "13b"
    with simulated(0, ranks, ranks), counted(source) as tracker:
        model = build("llama_qformerv2_peft" if sees else "llama_peft", size, LENGTH if training else CACHE, quantise)
        if not training:
            for parameter in model.requires_grad_(False).parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
            del parameter
        tracker.begin()
        move(model, tracker)
        if training:
            train(model, tracker, sees)
        else:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                generate(model, tracker, sees)
    return tracker


if __name__ == "__main__":
    main_of(__doc__, import_from, ROWS, count)
