"""What benchmarks/gpu.py measures, each in a process of its own: training and decoding, of this program and of
transformers with PEFT, with random weights and tokens that are made on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llama_acc.core.data.templates import TEMPLATES
from llama_acc.core.device import free_memory
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.generate.engine import Engine, Prompt
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.memory.predict import predict, predict_generation
from llama_acc.core.memory.simulate import Setup, empty_batch, generating_model
from llama_acc.core.model import nf4
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import Transformer, pack_small
from llama_acc.core.model.tuning import METHODS
from llama_acc.core.recipe import RECIPES_FOLDER
from llama_acc.core.tokenizer import load_tokenizer
from llama_acc.core.train.plan import StepSettings
from llama_acc.core.train.step import train_step
from llama_acc.core.train.trainer import assemble

GIB = 2**30
SPEED = "tokens_per_second"
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "clip_grad_norm": 2.0}
WARM_UP, STEPS, ROUNDS = 2, 3, 3
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Work:
    """What a process measures, in at most `limit` seconds: optimizer steps of so many equal micro-batches, LoRA of rank
    16 unless `full`; or, with `new`, greedy answers, the speed from so many new tokens to so many."""

    part: str
    lengths: tuple[int, ...] = ()  # tokens of the documents of a micro-batch, or of the prompts answered together
    model: str = "llama2-7b"
    full: bool = False
    nf4: bool = False
    recomputed: bool = False
    micro_batches: int = 2
    new: tuple[int, int] | None = None
    by: str = "llama-acc"  # or "transformers"
    limit: int = 120


def setup_for(work: Work, config: ModelConfig, device: torch.device) -> Setup:
    """What the prediction is asked."""
    tuning = METHODS["full" if work.full or work.new else "lora"]().with_num_layers(config.n_layers)
    settings = StepSettings(torch.bfloat16, () if work.nf4 else None, False, work.recomputed, 1, "ddp", False, ADAMW)
    count = work.micro_batches
    return Setup(replace(config, tuning=tuning), settings, work.lengths, None, count, device_type=device.type)


@torch.no_grad()
def fill(model: Transformer, device: torch.device) -> None:
    """Random weights of a usual size, made on the device; zeros would be multiplied faster."""
    model.to_empty(device=device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # The magnitudes of NF4's blocks are levels between -1 and 1 times `nested`, plus `offset`.
        value = {"nested": 0.01, "offset": 0.05}.get(name.rpartition(".")[2], 1.0 if tensor.ndim == 1 else None)
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        elif value is not None:
            tensor.fill_(value)
        else:
            tensor.normal_(0.0, 0.02)


def train_ours(work: Work, config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """The program's own step."""
    setup = setup_for(work, config, device)
    usage, free = predict(setup), free_memory(device)
    if usage.allocated > free:
        raise RuntimeError(f"{usage.allocated / GIB:.1f} GiB are predicted, {free / GIB:.1f} are free")
    if work.nf4:
        nf4.prepare(device)
    model, data_parallel, optimizer = assemble(
        setup.config, setup.settings, Parallel(), device.type, lambda model: fill(model, device)
    )
    batch = empty_batch(work.lengths)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, len(batch.tokens))
    batches = [replace(batch, tokens=tokens, targets=np.roll(tokens, -1))] * work.micro_batches
    count = len(tokens) * work.micro_batches

    def step() -> Tensor:
        return train_step(model, optimizer, data_parallel, batches, count, 1e-5, device).loss

    predicted = {"predicted_allocated": usage.allocated, "predicted_reserved": usage.reserved}
    return timed_steps(step, count, device) | predicted


def timed_steps(step: Callable[[], Tensor], tokens: int, device: torch.device) -> dict[str, Any]:
    """Tokens per second of steps that follow each other as in a run."""
    speeds = []
    for count in (WARM_UP, *[STEPS] * ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            loss = step()
        if not loss.isfinite():  # asking waits for the device
            raise RuntimeError("the loss is not finite")
        speeds.append(count * tokens / (time.perf_counter() - start))
    return result(speeds[1:], device)


def result(speeds: list[float], device: torch.device) -> dict[str, Any]:
    """The median of some speeds, their range, and the most memory so far."""
    found: dict[str, Any] = {SPEED: statistics.median(speeds), "range": [min(speeds), max(speeds)]}
    if device.type == "cuda":
        found["allocated"] = torch.cuda.max_memory_allocated(device)
        found["reserved"] = torch.cuda.max_memory_reserved(device)
    return found


def decode_ours(work: Work, config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """The decoding engine, with prompts that share nothing."""
    assert work.new is not None
    setup, answers = setup_for(work, config, device), len(work.lengths)
    usage = predict_generation(setup, work.lengths[0] + work.new[1])  # of one answer
    if work.nf4:
        nf4.prepare(device)
    model = generating_model(setup, Parallel())
    fill(model, device)
    pack_small(model)
    words: Any = load_tokenizer(RECIPES_FOLDER / "quickstart" / "tokenizer.model")
    # An answer never ends by itself, and every token has a text.
    words.end_ids, words.decode = frozenset(), lambda ids: "".join(f" {token}" for token in ids)
    engine = Engine(LoadedModel(model, words, TEMPLATES["none"], "random weights", device), slots=answers)
    generator = np.random.default_rng(0)

    def answer(new: int) -> None:
        prompts = [Prompt(generator.integers(3, config.vocab_size, n).tolist()) for n in work.lengths]
        made = engine.generate(prompts, Sampler(Sampling(temperature=0, max_new_tokens=new)), answers)
        assert sum(1 for _ in made) == new * answers

    predicted = {"predicted_allocated": usage.allocated, "predicted_reserved": usage.reserved}
    return timed_answers(answer, work, device) | (predicted if answers == 1 else {})


def timed_answers(answer: Callable[[int], None], work: Work, device: torch.device) -> dict[str, Any]:
    """Tokens per second behind the first ones."""
    assert work.new is not None
    speeds = []
    for _ in range(ROUNDS + 1):
        times = [time.perf_counter()]
        for new in work.new:
            answer(new)
            times.append(time.perf_counter())
        seconds = (times[2] - times[1]) - (times[1] - times[0])
        if seconds > 0:  # else the first one was disturbed
            speeds.append((work.new[1] - work.new[0]) * len(work.lengths) / seconds)
    return result(speeds[-ROUNDS:], device)


def random_llama(config: ModelConfig, device: torch.device, in_nf4: bool) -> nn.Module:
    """transformers' LLaMA in bf16, its blocks' matrices in NF4 as BitsAndBytesConfig makes them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": config.dim, "intermediate_size": config.hidden_dim, "vocab_size": config.vocab_size}
    heads = {"num_attention_heads": config.n_heads, "num_key_value_heads": config.kv_heads}
    shape = LlamaConfig(**sizes, **heads, num_hidden_layers=config.n_layers, attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(shape)
    torch.set_default_dtype(torch.float32)
    if in_nf4:
        for block in model.model.layers:
            quantize(block, device)
        model.is_loaded_in_4bit = True  # PEFT asks
    return model


def quantize(block: nn.Module, device: torch.device) -> None:
    """Puts each matrix of a block into NF4."""
    import bitsandbytes as bnb

    for name, linear in [one for one in block.named_modules() if isinstance(one[1], nn.Linear)]:
        kind = {"compute_dtype": torch.bfloat16, "quant_type": "nf4", "compress_statistics": True}
        quantized = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, device="meta", **kind)
        values = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True}
        quantized.weight = bnb.nn.Params4bit(linear.weight.data, **values).to(device)
        block.set_submodule(name, quantized)


def train_theirs(work: Work, config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """A plain loop on the same documents, padded; padding does not count."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(random_llama(config, device, work.nf4), LoraConfig(r=16, target_modules=MATRICES))
    if work.recomputed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=ADAMW["betas"], weight_decay=0.0, fused=True)
    lengths = torch.tensor(work.lengths, device=device)
    mask = (torch.arange(max(work.lengths), device=device) < lengths[:, None]).long()
    tokens = torch.randint(3, config.vocab_size, mask.shape, device=device)
    labels = tokens.masked_fill(mask == 0, -100)

    def step() -> Tensor:
        for _ in range(work.micro_batches):
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss / work.micro_batches
            loss.backward()
        nn.utils.clip_grad_norm_(trained, ADAMW["clip_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    if device.type == "cuda":  # making the model took more than it takes
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return timed_steps(step, sum(work.lengths) * work.micro_batches, device)


def decode_theirs(work: Work, config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """`generate`, greedy."""
    model = random_llama(config, device, work.nf4).eval()
    prompts = torch.randint(3, config.vocab_size, (len(work.lengths), work.lengths[0]), device=device)

    @torch.inference_mode()
    def answer(new: int) -> None:
        options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        made = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        made[:, -1].tolist()  # waits for the device

    return timed_answers(answer, work, device)
