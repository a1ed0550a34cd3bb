"""What llama-acc is compared with: the same work done the usual ways. Each baseline is one process and one JSON line.

- `plain`: a LLaMA training loop in plain PyTorch, the way LLaMA2-Accessory does it: batches padded to their longest
  item, logits over every position, cross-entropy with an ignored label, AdamW and gradient clipping from torch.
- `trainer`: transformers' LlamaForCausalLM under transformers' Trainer, given the same batches.
- `trl`: LoRA pairs under TRL's SFTTrainer with PEFT, given the same batches (`pip install trl peft`).
- `generate`: transformers' generate, batch 1, greedy, a prompt of 32 tokens and 128 new ones.
- `prepare`: makes the random checkpoint, in Meta's layout and in Hugging Face's, and checks that both models agree.
  The others run it, as a process of its own, where the checkpoint is missing.

    python benchmarks/baselines.py plain --shape 15M --data alpaca.json --tokenizer tokenizer.model

The tasks are those of tasks.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plain_llama import load_plain
from shapes import hidden_width, make_checkpoint
from tasks import (
    BETAS,
    CLIP_NORM,
    LEARNING_RATE,
    LORA_RANK,
    NEW_TOKENS,
    NO_LABEL,
    Item,
    add_task_arguments,
    checkpoint_folder,
    generation_prompt,
    generation_result,
    load_items,
    micro_batches,
    pad,
    training_result,
)
from torch import Tensor, nn


def run_plain(args: argparse.Namespace) -> dict:
    """Train one pass with `PlainLlama`."""
    batches = micro_batches(load_items(args), args.batch_size)
    model = load_plain(checkpoint_folder(args), args.max_tokens).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)
    losses = []
    start = time.perf_counter()
    for batch in batches:
        tokens = pad([item.tokens for item in batch], 0)
        labels = pad([item.labels for item in batch], NO_LABEL)
        logits = model(tokens)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO_LABEL)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return training_result(args, batches, time.perf_counter() - start, losses)


def huggingface_weights(weights: dict[str, Tensor], params: dict) -> dict[str, Tensor]:
    """Meta's names and rotary layout to Hugging Face's.

    Meta rotates neighbouring pairs (0,1), (2,3), ...; Hugging Face the halves (0, d/2), (1, d/2 + 1), ... So the rows
    of wq and wk are sorted, within each head, even ones first.
    """
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    head_dim = params["dim"] // params["n_heads"]
    result = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    for layer in range(params["n_layers"]):
        for meta_name, name in names.items():
            weight = weights[f"layers.{layer}.{meta_name}.weight"]
            if meta_name in ("attention.wq", "attention.wk"):
                weight = weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            result[f"model.layers.{layer}.{name}.weight"] = weight
    return result


def save_huggingface(checkpoint: Path, folder: Path) -> None:
    """Write the checkpoint of Meta's layout `checkpoint` in Hugging Face's to `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    params = json.loads((checkpoint / "params.json").read_text())
    config = LlamaConfig(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=hidden_width(params),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads", params["n_heads"]),
        rms_norm_eps=params["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": params.get("rope_theta", 10000.0)},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    weights = torch.load(checkpoint / "consolidated.00.pth", weights_only=True)
    model.load_state_dict(huggingface_weights(weights, params))
    model.save_pretrained(folder)


def load_huggingface(checkpoint: Path, dtype: torch.dtype) -> nn.Module:
    """The model of `checkpoint`'s Hugging Face folder, as its users load it."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(checkpoint / "huggingface", dtype=dtype)


def run_trainer(args: argparse.Namespace) -> dict:
    """Train one pass with transformers.Trainer, on the batches of `run_plain` in their order."""
    from transformers import Trainer, TrainingArguments

    def make(items: list[Item], options: dict, **others: object) -> Trainer:
        return Trainer(args=TrainingArguments(**options, remove_unused_columns=False), train_dataset=items, **others)

    return train_with(make, args)


def run_trl(args: argparse.Namespace) -> dict:
    """The same with LoRA pairs, by TRL's SFTTrainer and PEFT."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    def make(items: list[Item], options: dict, **others: object) -> SFTTrainer:
        return SFTTrainer(
            args=SFTConfig(
                **options, remove_unused_columns=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
            ),
            train_dataset=Dataset.from_list([{"input_ids": item.tokens, "labels": item.labels} for item in items]),
            peft_config=LoraConfig(
                r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            **others,
        )

    return train_with(make, args)


def train_with(make: Callable[..., Any], args: argparse.Namespace) -> dict:
    """Trains with a Trainer made of items, options and more, and times its steps alone, without its set-up."""
    from transformers import LlamaTokenizer, PrinterCallback, TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            self.start = time.perf_counter()

        def on_train_end(self, *_: object, **__: object) -> None:
            self.seconds = time.perf_counter() - self.start

    def collate(items: list) -> dict[str, Tensor]:
        rows = [item if isinstance(item, Item) else Item(item["input_ids"], item["labels"]) for item in items]
        return {
            "input_ids": pad([item.tokens for item in rows], 0),
            "attention_mask": pad([[1] * len(item.tokens) for item in rows], 0),
            "labels": pad([item.labels for item in rows], NO_LABEL),
        }

    batches = micro_batches(load_items(args), args.batch_size)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "use_cpu": True,
            "per_device_train_batch_size": args.batch_size,
            "num_train_epochs": 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "weight_decay": 0.0,
            "max_grad_norm": CLIP_NORM,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": False,
            "gradient_checkpointing": False,
        }
        trainer = make(
            [item for batch in batches for item in batch],
            options,
            model=load_huggingface(checkpoint_folder(args), torch.float32),
            processing_class=LlamaTokenizer(vocab_file=str(args.tokenizer)),
            data_collator=collate,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return training_result(args, batches, clock.seconds, losses)


def run_generate(args: argparse.Namespace) -> dict:
    """Generate greedily with transformers; the median of three runs after a short one to warm up."""
    dtype = getattr(torch, args.dtype)
    model = load_huggingface(checkpoint_folder(args), dtype).eval()
    model.generation_config.eos_token_id = None  # every run makes exactly as many tokens as asked
    prompt = generation_prompt(load_items(args))
    mask = torch.ones_like(prompt)

    def answer(new_tokens: int) -> Tensor:
        return model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)

    answer(8)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        made = answer(NEW_TOKENS).shape[1] - prompt.shape[1]
        seconds.append(time.perf_counter() - start)
        if made != NEW_TOKENS:
            raise RuntimeError(f"generated {made} tokens instead of {NEW_TOKENS}")
    return generation_result(args, statistics.median(seconds))


@torch.inference_mode()
def run_prepare(args: argparse.Namespace) -> dict:
    """Make the checkpoint in both layouts; check that the two models' logits agree to 1e-5 of their largest."""
    folder = args.checkpoints / args.shape
    make_checkpoint(folder, args.shape, args.tokenizer)
    save_huggingface(folder, folder / "huggingface")
    batch = micro_batches(load_items(args), args.batch_size)[0]
    tokens = pad([item.tokens for item in batch], 0)
    mask = pad([[1] * len(item.tokens) for item in batch], 0)
    plain = load_plain(folder, args.max_tokens)(tokens)[mask.bool()]
    theirs = load_huggingface(folder, torch.float32)(tokens, attention_mask=mask).logits[mask.bool()]
    difference = ((plain - theirs).abs().max() / plain.abs().max()).item()
    if not difference < 1e-5:
        raise RuntimeError(f"the plain model and transformers' differ by {difference:.1e} of the largest logit")
    (folder / "prepared").touch()
    return {"name": "prepare", "shape": args.shape, "checkpoint": str(folder), "logits_relative_difference": difference}


BASELINES: dict[str, Callable[[argparse.Namespace], dict]] = {
    "plain": run_plain,
    "trainer": run_trainer,
    "trl": run_trl,
    "generate": run_generate,
    "prepare": run_prepare,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="One baseline, one JSON line.")
    parser.add_argument("name", choices=BASELINES)
    add_task_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(BASELINES[args.name](args)))


if __name__ == "__main__":
    main()
