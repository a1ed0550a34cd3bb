"""What llama-acc is compared with: the same work done the usual ways. Each baseline is one process and one JSON line.

- `plain`: a LLaMA training loop in plain PyTorch, the way LLaMA2-Accessory does it: batches padded to their longest
  item, logits over every position, cross-entropy with an ignored label, AdamW and gradient clipping from torch.
- `trainer`: transformers' LlamaForCausalLM under transformers' Trainer, given the same batches.
- `generate`: transformers' generate, batch 1, greedy, a prompt of 32 tokens and 128 new ones.
- `prepare`: makes the random checkpoint, in Meta's layout and in Hugging Face's, and checks that both models agree.
  The others run it, as a process of its own, where the checkpoint is missing.

    python benchmarks/baselines.py plain --shape 15M --data alpaca.json --tokenizer tokenizer.model

The training task: the first 256 Alpaca items, labels on the outputs only, at most 512 tokens, micro-batches of 4 and
an optimizer step after each, float32, AdamW(lr 2e-5, betas 0.9 0.95, no weight decay), clipping at 2, one pass.

Shapes in comments: B batch, T time, D dim, H heads, K key/value heads, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from shapes import SHAPES, hidden_width, make_checkpoint
from torch import Tensor, nn

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
NO_LABEL = -100
LEARNING_RATE, BETAS, CLIP_NORM = 2e-5, (0.9, 0.95), 2.0
PROMPT_TOKENS, NEW_TOKENS = 32, 128


# ---- the data ----


@dataclass(frozen=True)
class Item:
    """One encoded example; `labels` has `NO_LABEL` on the prompt, and label i belongs to token i."""

    tokens: list[int]
    labels: list[int]


def encode_items(data: Path, tokenizer: Path, count: int, max_tokens: int) -> list[Item]:
    """The first `count` items of an Alpaca file: BOS prompt output EOS, cut at `max_tokens`."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(tokenizer))
    items = []
    for row in json.loads(data.read_text(encoding="utf-8"))[:count]:
        prompt = (PROMPT_WITH_INPUT if row["input"].strip() else PROMPT).format_map(row)
        unlabelled = len(pieces.encode(prompt, add_bos=True))
        tokens = pieces.encode(prompt + row["output"], add_bos=True, add_eos=True)
        labels = [NO_LABEL] * unlabelled + tokens[unlabelled:]
        items.append(Item(tokens[:max_tokens], labels[:max_tokens]))
    return items


def micro_batches(items: list[Item], size: int, seed: int = 0) -> list[list[Item]]:
    """Neighbours in length together, so that little is padded; the batches themselves in random order."""
    by_length = sorted(items, key=lambda item: len(item.tokens))
    batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    random.Random(seed).shuffle(batches)
    return batches


def pad(rows: list[list[int]], filler: int) -> Tensor:
    """Rows filled up on the right to the longest: [B, T]."""
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def token_counts(batches: list[list[Item]]) -> dict[str, int]:
    """How much work the batches are: tokens that are text, those with a label, and those computed with padding."""
    items = [item for batch in batches for item in batch]
    return {
        "useful_tokens": sum(len(item.tokens) for item in items),
        "label_tokens": sum(label != NO_LABEL for item in items for label in item.labels),
        "padded_tokens": sum(len(batch) * max(len(item.tokens) for item in batch) for batch in batches),
    }


# ---- plain PyTorch ----


def rotations(head_dim: int, length: int, theta: float) -> Tensor:
    """RoPE as complex numbers of modulus 1: [T, head_dim / 2]."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the interleaved pairs of x [B, T, H, head_dim] by `turns` [T, head_dim / 2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).type_as(x)


class PlainNorm(nn.Module):
    """RMSNorm."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class PlainAttention(nn.Module):
    """Causal attention with grouped keys and values."""

    def __init__(self, params: dict) -> None:
        super().__init__()
        dim, self.n_heads = params["dim"], params["n_heads"]
        self.n_kv_heads = params.get("n_kv_heads", self.n_heads)
        self.head_dim = dim // self.n_heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        q = rotate(self.wq(x).unflatten(-1, (self.n_heads, self.head_dim)), turns)  # [B, T, H, head_dim]
        k = rotate(self.wk(x).unflatten(-1, (self.n_kv_heads, self.head_dim)), turns)  # [B, T, K, head_dim]
        v = self.wv(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=2) for t in (k, v))
        # Padding is on the right, so the causal mask already keeps real tokens from seeing it.
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(-2))


class PlainFeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, params: dict) -> None:
        super().__init__()
        dim, hidden = params["dim"], hidden_width(params)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PlainBlock(nn.Module):
    """Attention, then feed-forward, each behind a norm and added to its input."""

    def __init__(self, params: dict) -> None:
        super().__init__()
        self.attention = PlainAttention(params)
        self.feed_forward = PlainFeedForward(params)
        self.attention_norm = PlainNorm(params["dim"], params["norm_eps"])
        self.ffn_norm = PlainNorm(params["dim"], params["norm_eps"])

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.feed_forward(self.ffn_norm(x))


class PlainLlama(nn.Module):
    """LLaMA under Meta's parameter names."""

    def __init__(self, params: dict, max_tokens: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(params["vocab_size"], params["dim"])
        self.layers = nn.ModuleList(PlainBlock(params) for _ in range(params["n_layers"]))
        self.norm = PlainNorm(params["dim"], params["norm_eps"])
        self.output = nn.Linear(params["dim"], params["vocab_size"], bias=False)
        self.turns = rotations(params["dim"] // params["n_heads"], max_tokens, params.get("rope_theta", 10000.0))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of the tokens [B, T]."""
        x = self.tok_embeddings(tokens)
        turns = self.turns[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, turns)
        return self.output(self.norm(x))


def load_plain(checkpoint: Path, max_tokens: int) -> PlainLlama:
    """The model of a folder in Meta's layout, in float32."""
    model = PlainLlama(json.loads((checkpoint / "params.json").read_text()), max_tokens)
    model.load_state_dict(torch.load(checkpoint / "consolidated.00.pth", weights_only=True, mmap=True))
    return model


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


# ---- transformers ----


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
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        """Times the steps alone, without the Trainer's set-up."""

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.start = time.perf_counter()

        def on_train_end(self, *_: object, **__: object) -> None:
            self.seconds = time.perf_counter() - self.start

    def collate(items: list[Item]) -> dict[str, Tensor]:
        return {
            "input_ids": pad([item.tokens for item in items], 0),
            "attention_mask": pad([[1] * len(item.tokens) for item in items], 0),
            "labels": pad([item.labels for item in items], NO_LABEL),
        }

    batches = micro_batches(load_items(args), args.batch_size)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=load_huggingface(checkpoint_folder(args), torch.float32),
            args=TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                per_device_train_batch_size=args.batch_size,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                weight_decay=0.0,
                max_grad_norm=CLIP_NORM,
                train_sampling_strategy="sequential",
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            data_collator=collate,
            train_dataset=[item for batch in batches for item in batch],
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


# ---- preparation and results ----


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


def checkpoint_folder(args: argparse.Namespace) -> Path:
    """The prepared checkpoint; made first where missing, in another process so that it leaves our peak memory alone."""
    folder = args.checkpoints / args.shape
    if not (folder / "prepared").exists():
        command = [sys.executable, __file__, "prepare", "--shape", args.shape, "--checkpoints", args.checkpoints]
        command += ["--data", args.data, "--tokenizer", args.tokenizer]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return folder


def load_items(args: argparse.Namespace) -> list[Item]:
    """The benchmark's items, encoded."""
    return encode_items(args.data, args.tokenizer, args.items, args.max_tokens)


def generation_prompt(items: list[Item]) -> Tensor:
    """The first 32 tokens of the first item: [1, 32]."""
    return torch.tensor([items[0].tokens[:PROMPT_TOKENS]])


def peak_rss_gib() -> float:
    """The most memory this process ever had resident (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def training_result(args: argparse.Namespace, batches: list[list[Item]], seconds: float, losses: list[float]) -> dict:
    """The JSON line of a training pass. Speed counts useful tokens: padding is work, not a result."""
    counts = token_counts(batches)
    return {
        "name": args.name,
        "shape": args.shape,
        **counts,
        "steps": len(losses),
        "seconds": seconds,
        "tokens_per_second": counts["useful_tokens"] / seconds,
        "peak_rss_gib": peak_rss_gib(),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "loss_mean": statistics.fmean(losses),
    }


def generation_result(args: argparse.Namespace, seconds: float) -> dict:
    """The JSON line of a generation; the seconds include the prompt's."""
    return {
        "name": args.name,
        "shape": args.shape,
        "dtype": args.dtype,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "seconds": seconds,
        "tokens_per_second": NEW_TOKENS / seconds,
        "peak_rss_gib": peak_rss_gib(),
    }


BASELINES: dict[str, Callable[[argparse.Namespace], dict]] = {
    "plain": run_plain,
    "trainer": run_trainer,
    "generate": run_generate,
    "prepare": run_prepare,
}


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which task is run: the same for every baseline and for llama-acc."""
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--data", type=Path, required=True, help="an Alpaca file: a JSON array")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model of 32,000 pieces")
    parser.add_argument("--items", type=int, default=256, help="how many items of the data (default: 256)")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="for generate only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path(tempfile.gettempdir()) / "llama-acc-benchmarks",
        help="where the random checkpoints are kept",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="One baseline, one JSON line.")
    parser.add_argument("name", choices=BASELINES)
    add_task_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(BASELINES[args.name](args)))


if __name__ == "__main__":
    main()
