"""The kernels of `kernels`, in Triton. See there."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton reads a kernel's annotations, and knows no types but its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS, _COLUMNS, _HEADS, _ROWS = 32, 1024, 8, 32


@triton.jit
def _dequantize_nf4(packed, absmax, nested, offset, levels, magnitudes, values, count, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    exists = block * 32 < count
    code = tl.load(absmax + block, mask=exists, other=0).to(tl.int32)
    largest = tl.load(magnitudes + code) * tl.load(nested + block // 256, mask=exists, other=0.0) + tl.load(offset)
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    both = tl.load(packed + place, mask=place < count, other=0).to(tl.int32)
    first = tl.load(levels + (both >> 4)) * largest[:, None]
    second = tl.load(levels + (both & 15)) * largest[:, None]
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    found = tl.reshape(tl.join(first, second), (BLOCKS, 64))
    tl.store(values + place, found.to(values.dtype.element_ty), mask=place < 2 * count)


def dequantize_nf4(
    packed: Tensor, absmax: Tensor, nested: Tensor, offset: Tensor, levels: Tensor, magnitudes: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The matrix [rows, columns] in `dtype`; see `nf4.Scales`, and `nf4._codes` for levels and magnitudes."""
    values = packed.new_empty(packed.shape[0], 2 * packed.shape[1], dtype=dtype)
    grid = (triton.cdiv(packed.numel(), 32 * _BLOCKS),)
    tensors = (packed, absmax, nested, offset, levels, magnitudes, values)
    _dequantize_nf4[grid](*tensors, packed.numel(), BLOCKS=_BLOCKS, enable_fp_fusion=False)
    return values


@triton.jit
def _add_product_nf4(
    y, x, packed, absmax, nested, offset, levels, magnitudes, a, b, bias, tokens, rows, blocks, rank, second, third,
    factor, pair_factor, OFFSETS: tl.constexpr, RANK: tl.constexpr, FIRST: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Some rows of the matrix, out of NF4 on the way, times all tokens."""
    start, token, narrow = tl.program_id(0) * ROWS, tl.arange(0, TOKENS)[:, None], tl.arange(0, RANK)[:, None]
    part, row = (start >= second).to(tl.int32) + (start >= third).to(tl.int32), start + tl.arange(0, ROWS).to(tl.int64)
    is_row, is_token, columns = row < rows, token < tokens, blocks * 64
    found, low = tl.zeros((TOKENS, ROWS), tl.float32), tl.zeros((TOKENS, RANK), tl.float32)
    for first in range(0, blocks, WIDE):
        block = first + tl.arange(0, WIDE)[None, :]
        exists, block = is_row[:, None] & (block < blocks), row[:, None] * blocks + block
        largest = tl.load(magnitudes + tl.load(absmax + block, mask=exists, other=0).to(tl.int32))
        largest *= tl.load(nested + block // 256, mask=exists, other=0.0)
        largest += tl.load(offset + block // 256 * OFFSETS, mask=exists, other=0.0)
        place = first * 32 + tl.arange(0, WIDE * 32)[None, :]
        exists, place = is_row[:, None] & (place < blocks * 32), row[:, None] * blocks * 32 + place
        both = tl.load(packed + place, mask=exists, other=0).to(tl.int32)
        values = tl.join(tl.load(levels + (both >> 4)), tl.load(levels + (both & 15)))
        values = tl.reshape(tl.reshape(values, (ROWS, WIDE, 64)) * largest[:, :, None], (ROWS, WIDE * 64))
        place = first * 64 + tl.arange(0, WIDE * 64)[None, :]
        inputs = tl.load(x + token * columns + place, mask=is_token & (place < columns), other=0.0)
        found += tl.dot(inputs, tl.trans(values.to(inputs.dtype)), input_precision="ieee")
        if b is not None:
            exists, place = (narrow < rank) & (place < columns), (part * rank + narrow) * columns + place
            pair = tl.load(a + place, mask=exists, other=0.0)
            low += tl.dot(inputs, tl.trans(pair), input_precision="ieee")
    if b is not None:
        pair = tl.load(b + row[None, :] * rank + narrow, mask=is_row[None, :] & (narrow < rank), other=0.0)
        found += tl.dot(low.to(pair.dtype), pair, input_precision="ieee") * pair_factor
    if bias is not None:
        found += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[None, :]
    place, exists, found = y + token * rows + row[None, :], is_token & is_row[None, :], found * factor
    if not FIRST:
        found += tl.load(place, mask=exists, other=0.0)
    tl.store(place, found.to(y.dtype.element_ty), mask=exists)


def add_product_nf4_(
    y: Tensor, x: Tensor, weight: list[Tensor], a: Tensor | None, b: Tensor | None, pair_factor: float,
    bias: Tensor | None, sizes: list[int], factor: float, first: bool,
) -> None:  # fmt: skip
    """See `nf4.add_product_`. `weight` is packed values, scales, levels and magnitudes."""
    (tokens, columns), rows, rank = x.shape, len(weight[0]), 0 if b is None else b.shape[1]
    numbers = tokens, rows, columns // 64, rank, *(sum(sizes[:n]) or rows for n in (1, 2)), factor, pair_factor
    _add_product_nf4[(triton.cdiv(rows, _ROWS),)](
        y, x, *weight, a, b, bias, *numbers, OFFSETS=int(len(weight[3]) > 1), FIRST=first,
        RANK=max(16, triton.next_power_of_2(rank)), TOKENS=max(16, triton.next_power_of_2(tokens)), ROWS=_ROWS, WIDE=2,
    )  # fmt: skip


@triton.jit
def _norm_and_add(x, weight, bias, normed, columns, eps, factor, COLUMNS: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64) * columns, tl.arange(0, COLUMNS)
    inside = place < columns
    values = tl.load(x + row + place, mask=inside, other=0.0).to(tl.float32)
    found = values / tl.sqrt(tl.sum(values * values, 0) / columns + eps)
    found *= tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    values += factor * tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + place, found.to(x.dtype.element_ty), mask=inside)
    tl.store(x + row + place, values.to(x.dtype.element_ty), mask=inside)


def norm_and_add_(x: Tensor, weight: Tensor, eps: float, bias: Tensor, factor: float) -> Tensor:
    """RMSNorm of x [T, columns], to which factor * bias is added then."""
    assert x.is_contiguous()
    normed, sizes = torch.empty_like(x), {"COLUMNS": triton.next_power_of_2(x.shape[1]), "num_warps": 8}
    _norm_and_add[(len(x),)](x, weight, bias, normed, x.shape[1], eps, factor, **sizes)
    return normed


@triton.jit
def _swiglu(gate, up, product, columns, gate_stride, up_stride, COLUMNS: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place < columns
    a = tl.load(gate + row * gate_stride + place, mask=inside).to(tl.float32)
    b = tl.load(up + row * up_stride + place, mask=inside).to(tl.float32)
    tl.store(product + row * columns + place, (a * tl.sigmoid(a) * b).to(product.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [T, columns], rounded once; rows of either may be apart."""
    product = gate.new_empty(gate.shape)
    grid = (len(gate), triton.cdiv(gate.shape[1], _COLUMNS))
    _swiglu[grid](gate, up, product, gate.shape[1], gate.stride(0), up.stride(0), COLUMNS=_COLUMNS)
    return product


@triton.jit
def _swiglu_backward(d_product, gate, up, count, COLUMNS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place < count
    d = tl.load(d_product + place, mask=inside).to(tl.float32)
    a, b = tl.load(gate + place, mask=inside).to(tl.float32), tl.load(up + place, mask=inside).to(tl.float32)
    part = tl.sigmoid(a)
    kind = gate.dtype.element_ty
    tl.store(d_product + place, (a * part * b).to(kind), mask=inside)
    tl.store(gate + place, (d * b * part * (1 + a * (1 - part))).to(kind), mask=inside)
    tl.store(up + place, (a * part * d).to(kind), mask=inside)


def swiglu_backward_(d_product: Tensor, gate: Tensor, up: Tensor) -> None:
    """Puts the product in the place of its gradient, and the gradients of gate and up in theirs; all contiguous."""
    assert d_product.is_contiguous()
    assert gate.is_contiguous()
    assert up.is_contiguous()
    grid = (triton.cdiv(gate.numel(), _COLUMNS),)
    _swiglu_backward[grid](d_product, gate, up, gate.numel(), COLUMNS=_COLUMNS)


@triton.jit
def _softmax_minus_one_hot(logits, targets, weights, losses, columns, COLUMNS: tl.constexpr):
    """A row: its largest logit and the sum of exponentials in one pass, its gradient in another."""
    row, weight = tl.program_id(0).to(tl.int64), 1.0
    logits += row * columns
    target, largest, total = tl.load(targets + row), float("-inf"), 0.0
    if weights is not None:
        weight = tl.load(weights + row)
    wanted = tl.load(logits + target).to(tl.float32)
    for start in range(0, columns, COLUMNS):
        place = start + tl.arange(0, COLUMNS)
        x = tl.load(logits + place, mask=place < columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    tl.store(losses + row, (largest + tl.log(total) - wanted) * weight)
    for start in range(0, columns, COLUMNS):
        place = start + tl.arange(0, COLUMNS)
        x = tl.load(logits + place, mask=place < columns, other=float("-inf")).to(tl.float32)
        gradient = (tl.exp(x - largest) / total - tl.where(place == target, 1.0, 0.0)) * weight
        tl.store(logits + place, gradient.to(logits.dtype.element_ty), mask=place < columns)


def softmax_minus_one_hot_(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """The cross-entropies [R] of logits [R, V], in whose place it puts their gradient; rows count as `weights` say."""
    assert logits.is_contiguous()
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    numbers = {"columns": logits.shape[1], "COLUMNS": 4 * _COLUMNS, "num_warps": 8}
    _softmax_minus_one_hot[(len(logits),)](logits, targets, weights, losses, **numbers)
    return losses


@triton.jit
def _turn(
    x, found, head_stride, rotations, heads, half, tile, sign, TURNS: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Some heads of a token, D side by side, turned and written to where heads are `head_stride` apart."""
    head, pair = tile * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    place = x + head * 2 * half + 2 * pair
    real = tl.load(place, mask=inside).to(tl.float32)
    imaginary = tl.load(place + 1, mask=inside).to(tl.float32)
    if TURNS:
        cos = tl.load(rotations + 2 * pair, mask=pair < half)
        sin = tl.load(rotations + 2 * pair + 1, mask=pair < half) * sign
        real, imaginary = real * cos - imaginary * sin, real * sin + imaginary * cos
    place = found + head * head_stride + 2 * pair
    tl.store(place, real.to(found.dtype.element_ty), mask=inside)
    tl.store(place + 1, imaginary.to(found.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    q, k, v, new_q, keys, values, rotations, slots, positions, heads, shared, half, q_stride, k_stride, v_stride,
    slot_stride, head_stride, q_tiles, k_tiles, sign, TURNS: tl.constexpr, STORES: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kept = token * slot_stride
    if STORES:
        kept = tl.load(slots + token) * slot_stride + tl.load(positions + token) * 2 * half
    rotations += token * 2 * half
    if tile < q_tiles:
        x, found = q + token * q_stride, new_q + token * heads * 2 * half
        _turn(x, found, 2 * half, rotations, heads, half, tile, sign, TURNS, HEADS, HALF)
    elif tile < q_tiles + k_tiles:
        x, found = k + token * k_stride, keys + kept
        _turn(x, found, head_stride, rotations, shared, half, tile - q_tiles, sign, TURNS, HEADS, HALF)
    else:
        x, found = v + token * v_stride, values + kept
        _turn(x, found, head_stride, rotations, shared, half, tile - q_tiles - k_tiles, sign, False, HEADS, HALF)


def rotate_heads(q: Tensor, k: Tensor, rotations: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """`rotary.rotate` of q [T, H, D] and k [T, K, D], or its inverse."""
    new_k = k.new_empty(k.shape)
    return _rotated(q, k, None, rotations, new_k, new_k, None, None, -1.0 if back else 1.0), new_k


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, rotations: Tensor | None, keys: Tensor, values: Tensor, slots: Tensor,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    """Queries [T, H, D] rotated; keys and values [T, K, D] go into a cache [slots, K, S, D], each to its place."""
    return _rotated(q, k, v, rotations, keys, values, slots, positions, 1.0)


def _rotated(
    q: Tensor, k: Tensor, v: Tensor | None, rotations: Tensor | None, keys: Tensor, values: Tensor,
    slots: Tensor | None, positions: Tensor | None, sign: float,
) -> Tensor:  # fmt: skip
    # Tokens may be apart, but neither their heads nor their features.
    q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, k, k if v is None else v))
    new_q, (tokens, heads, size), shared = q.new_empty(q.shape), q.shape, k.shape[1]
    q_tiles, k_tiles = triton.cdiv(heads, _HEADS), triton.cdiv(shared, _HEADS)
    turns = q.new_empty(1, dtype=torch.float32) if rotations is None else torch.view_as_real(rotations.contiguous())
    places = (turns, turns) if slots is None or positions is None else (slots, positions)
    strides = q.stride(0), k.stride(0), v.stride(0), keys.stride(0), keys.stride(1)
    numbers = heads, shared, size // 2, *strides, q_tiles, k_tiles, sign
    kinds = {"TURNS": rotations is not None, "STORES": slots is not None}
    sizes = {"HEADS": _HEADS, "HALF": triton.next_power_of_2(size // 2)}
    grid = tokens, q_tiles + k_tiles * (1 if slots is None else 2)
    _rotate[grid](q, k, v, new_q, keys, values, turns, *places, *numbers, **kinds, **sizes)
    return new_q


@triton.jit
def _attend(
    q, keys, values, slots, positions, sums, logs, shared, group, size, slot_stride, head_stride, window, scale,
    PARTS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """A part of the positions that the query heads of a key-value head see: the sum of the values, not divided."""
    token, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, feature = tl.arange(0, GROUP), tl.arange(0, SIZE)
    first_head = (token * shared + head) * group
    inside = (row[:, None] < group) & (feature[None, :] < size)
    query = tl.load(q + (first_head + row[:, None]) * size + feature[None, :], mask=inside, other=0.0)
    end = tl.load(positions + token) + 1
    begin = tl.maximum(end - window, 0) if window else end * 0
    step = tl.cdiv(tl.cdiv(end - begin, PARTS), PLACES) * PLACES
    begin += part * step
    end = tl.minimum(begin + step, end)
    kept = tl.load(slots + token) * slot_stride + head * head_stride
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    weight, total = tl.zeros((GROUP,), tl.float32), tl.zeros((GROUP, SIZE), tl.float32)
    for start in range(begin, end, PLACES):
        place = start + tl.arange(0, PLACES)
        there = kept + place[:, None] * size + feature[None, :]
        exists = (place[:, None] < end) & (feature[None, :] < size)
        key = tl.load(keys + there, mask=exists, other=0.0)
        value = tl.load(values + there, mask=exists, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(place[None, :] < end, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        part_weights, faded = tl.exp2(scores - larger[:, None]), tl.exp2(largest - larger)
        weight = weight * faded + tl.sum(part_weights, 1)
        total = total * faded[:, None] + tl.dot(part_weights.to(value.dtype), value, input_precision="ieee")
        largest = larger
    out = (first_head + row) * PARTS + part
    tl.store(logs + 2 * out, largest, mask=row < group)
    tl.store(logs + 2 * out + 1, weight, mask=row < group)
    tl.store(sums + out[:, None] * size + feature[None, :], total, mask=inside)


@triton.jit
def _join(
    sums, logs, outputs, size, q, prefix_keys, prefix_values, factors, heads, group, length, scale,
    PARTS: tl.constexpr, SIZE: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """The parts of a head's output, each as if it were all, in one; and what a prefix has for it, times a factor."""
    head, part, feature = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, SIZE)
    out = head * PARTS + part
    largest = tl.load(logs + 2 * out)
    faded = tl.exp2(largest - tl.max(largest, 0))
    inside = (part[:, None] < PARTS) & (feature[None, :] < size)
    total = tl.sum(tl.load(sums + out[:, None] * size + feature[None, :], mask=inside) * faded[:, None], 0)
    found = total / tl.sum(tl.load(logs + 2 * out + 1) * faded, 0)
    if factors is not None:
        row, own = tl.arange(0, PREFIX), head % heads
        there = (own // group * length + row[:, None]) * size + feature[None, :]
        exists = (row[:, None] < length) & (feature[None, :] < size)
        query = tl.load(q + head * size + feature, mask=feature < size, other=0.0).to(tl.float32)
        key = tl.load(prefix_keys + there, mask=exists, other=0.0).to(tl.float32)
        scores = tl.where(row < length, tl.sum(key * query[None, :], 1) * scale, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, 0))
        value = tl.load(prefix_values + there, mask=exists, other=0.0).to(tl.float32)
        found += tl.sum(value * weights[:, None], 0) / tl.sum(weights, 0) * tl.load(factors + own)
    tl.store(outputs + head * size + feature, found.to(outputs.dtype.element_ty), mask=feature < size)


def attend_slots(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, window: int, prefix: list[Tensor]
) -> Tensor:
    """Each of the queries [T, H, D] attends to the cache [slots, K, S, D] of its slot up to its position, or to the
    last `window` of these, if that is not 0; and to a prefix, if there is one, see `attention.Attention`. Two kernels:
    a long past is worked on in parts at a time."""
    tokens, heads, size = q.shape
    shared = keys.shape[1]
    group = heads // shared
    parts = min(16, triton.next_power_of_2(triton.cdiv(256, tokens * shared)))
    sums = q.new_empty(tokens, heads, parts, size, dtype=torch.float32)
    logs, outputs = q.new_empty(tokens, heads, parts, 2, dtype=torch.float32), q.new_empty(q.shape)
    wide, places = triton.next_power_of_2(size), 128 // q.element_size()
    scale = size**-0.5 * 1.4426950408889634  # log2(e): powers of 2 are taken
    _attend[(tokens, shared, parts)](
        q, keys, values, slots, positions, sums, logs, shared, group, size, keys.stride(0), keys.stride(1), window,
        scale, PARTS=parts, GROUP=max(16, triton.next_power_of_2(group)), SIZE=max(16, wide), PLACES=places,
        num_stages=2,
    )  # fmt: skip
    length, sizes = prefix[0].shape[1] if prefix else 1, {"PARTS": parts, "SIZE": wide}
    tensors, numbers = prefix or (None,) * 3, (heads, group, length, scale)
    sizes["PREFIX"] = triton.next_power_of_2(length)
    _join[(tokens * heads,)](sums, logs, outputs, size, q, *tensors, *numbers, **sizes)
    return outputs
