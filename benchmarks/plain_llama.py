"""A LLaMA in plain PyTorch, under Meta's parameter names: the model of the baseline `plain`.

Shapes in comments: B batch, T time, D dim, H heads, K key/value heads, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from shapes import hidden_width
from torch import Tensor, nn


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
