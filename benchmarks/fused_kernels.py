"""Triton kernels of a decode step: matrix times a few rows, and attention to a KV cache.

Shape suffixes: B batch, at most `ROWS`; K columns of a matrix; N what one token projects to.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:  # builds of torch without a GPU come without it
    triton = None

ROWS = 16  # of a tile of tensor cores; a batch of at most this many is one tile
# Rows and columns of a matrix that one program reads at a time, warps, loads in flight; then
# cached tokens at a time, programs that share those of one row and KV head, warps, loads in
# flight. The fastest of a few on an H200 over the shapes of LLaMA-2-70B, dense and pruned together.
TILE = (32, 128, 2, 5)
GATED_TILE = (32, 256, 4, 3)
ATTENTION = (64, 4, 4, 2)


def linear(
    x_BK: Tensor,
    matrix: Tensor,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    add_to: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the product of each row of `x_BK` with `matrix` (N, K), shape (B, N), by one kernel.

    `norm` has the sum of squares of each row and epsilon: rows are divided by their root mean
    square. `gated` takes the first half of N as gate and the second as up, and returns
    SiLU(gate) x up, shape (B, N / 2). `add_to` receives the sum in place, and its sum of squares.
    """
    batch, inner = x_BK.shape
    rows = matrix.shape[0] // 2 if gated else matrix.shape[0]
    out, written = (x_BK.new_empty(batch, rows), x_BK) if add_to is None else add_to
    squares, epsilon = (x_BK, 0.0) if norm is None else norm
    block_n, block_k, warps, stages = GATED_TILE if gated else TILE
    _linear_kernel[(triton.cdiv(rows, block_n),)](
        x_BK, matrix, squares, out, written, batch, rows, inner, epsilon,
        NORM=norm is not None, GATED=gated, ADD=add_to is not None,
        BLOCK_M=ROWS, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def attend(
    qkv_BN: Tensor,
    angles: tuple[Tensor, Tensor],
    cache: Tensor,
    start: int,
    heads: int,
    arrived: Tensor,
) -> Tensor:
    """Rotate, store the new key and value at `start` and attend to all before; shape (B, H E).

    `cache` holds keys and values, shape (2, B, KV heads, start + 1, head_dim); `arrived` a zero
    for each row and KV head, which is zero again afterwards.
    """
    _, batch, kv_heads, length, head_dim = cache.shape
    out = qkv_BN.new_empty(batch, heads * head_dim)
    cos, sin = (x.reshape(-1) for x in angles)
    block_t, splits, warps, stages = ATTENTION
    share = triton.cdiv(triton.cdiv(start, splits), block_t) * block_t
    partial = qkv_BN.new_empty(batch, kv_heads, splits, ROWS, head_dim + 2, dtype=torch.float32)
    _attend_kernel[(batch, kv_heads, splits)](
        qkv_BN, cache[0], cache[1], cos, sin, partial, arrived, out, start, length,
        head_dim**-0.5, share,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, HALF=head_dim // 2, SPLITS=splits,
        BLOCK_M=ROWS, BLOCK_T=block_t, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _linear_kernel(
        x_at, matrix_at, squares_at, out_at, written_at, batch, rows, inner, epsilon,
        NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        m = tl.arange(0, BLOCK_M)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        matrix_rows = matrix_at + n[:, None].to(tl.int64) * inner
        up_rows = matrix_rows + rows.to(tl.int64) * inner
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, inner, BLOCK_K):
            columns = first + k[None, :]
            tile = (n[:, None] < rows) & (columns < inner)
            x_tile = (m[:, None] < batch) & (columns < inner)
            x = tl.load(x_at + m[:, None] * inner + columns, x_tile, 0.0)
            total = tl.dot(x, tl.trans(tl.load(matrix_rows + columns, tile, 0.0)), total)
            if GATED:
                total_up = tl.dot(x, tl.trans(tl.load(up_rows + columns, tile, 0.0)), total_up)
        if NORM:
            squares = tl.load(squares_at + m)
            scale = 1.0 / tl.sqrt(squares / inner + epsilon)
            total *= scale[:, None]
            total_up *= scale[:, None]
        if GATED:
            total = total / (1.0 + tl.exp(-total)) * total_up
        out = out_at + m[:, None] * rows + n[None, :]
        inside = (m[:, None] < batch) & (n[None, :] < rows)
        kind = out_at.dtype.element_ty
        if ADD:
            total += tl.load(out, inside, 0.0).to(tl.float32)
            stored = tl.where(inside, total.to(kind).to(tl.float32), 0.0)
            tl.atomic_add(written_at + m, tl.sum(stored * stored, 1))
        tl.store(out, total.to(kind), inside)

    @triton.jit
    def _attend_kernel(  # noqa: PLR0915 (one kernel is one function)
        qkv_at, keys_at, values_at, cos_at, sin_at, partial_at, arrived_at, out_at, start, length,
        scale, share,
        KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    ):  # fmt: skip
        row, head = tl.program_id(0), tl.program_id(1)
        size: tl.constexpr = 2 * HALF
        half, whole = tl.arange(0, HALF), tl.arange(0, size)
        kind = out_at.dtype.element_ty
        cos = tl.load(cos_at + half).to(tl.float32)
        sin = tl.load(sin_at + half).to(tl.float32)

        token = qkv_at + row * KV_HEADS * (GROUP + 2) * size
        key_at = token + (KV_HEADS * GROUP + head) * size
        low, high = tl.load(key_at + half).to(tl.float32), tl.load(key_at + HALF + half)
        high = high.to(tl.float32)
        new_low = (low * cos - high * sin).to(kind)
        new_high = (high * cos + low * sin).to(kind)
        new_value = tl.load(key_at + KV_HEADS * size + whole)
        cached = (row * KV_HEADS + head).to(tl.int64) * length * size
        m = tl.arange(0, BLOCK_M)[:, None]
        query_at = token + (head * GROUP + m) * size + half[None, :]
        low = tl.load(query_at, m < GROUP, 0.0).to(tl.float32)
        high = tl.load(query_at + HALF, m < GROUP, 0.0).to(tl.float32)
        query_low = (low * cos[None, :] - high * sin[None, :]).to(kind)
        query_high = (high * cos[None, :] + low * sin[None, :]).to(kind)

        # The first program begins with the new token, from registers, and stores it.
        split = tl.program_id(2)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        most = tl.full((BLOCK_M,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_M, size), tl.float32)
        if split == 0:
            tl.store(keys_at + cached + start * size + half, new_low)
            tl.store(keys_at + cached + start * size + HALF + half, new_high)
            tl.store(values_at + cached + start * size + whole, new_value)
            scores = query_low.to(tl.float32) * new_low.to(tl.float32)[None, :]
            scores += query_high.to(tl.float32) * new_high.to(tl.float32)[None, :]
            most = tl.sum(scores, 1) * scale
            weight += 1.0
            total += new_value.to(tl.float32)[None, :]
        for first in range(split * share, tl.minimum(start, (split + 1) * share), BLOCK_T):
            at = (first + tl.arange(0, BLOCK_T))[:, None]
            old_at = keys_at + cached + at * size + half[None, :]
            key_low = tl.load(old_at, at < start, 0.0)
            key_high = tl.load(old_at + HALF, at < start, 0.0)
            value = tl.load(values_at + cached + at * size + whole[None, :], at < start, 0.0)
            logits = tl.dot(query_low, tl.trans(key_low))
            logits = tl.dot(query_high, tl.trans(key_high), logits) * scale
            logits = tl.where(tl.trans(at) < start, logits, float("-inf"))
            highest = tl.maximum(most, tl.max(logits, 1))
            shares = tl.exp(logits - highest[:, None])
            fade = tl.exp(most - highest)
            weight = weight * fade + tl.sum(shares, 1)
            total = tl.dot(shares.to(kind), value, total * fade[:, None])
            most = highest
        # Whoever arrives last at a row and KV head puts the parts together.
        together = (row * KV_HEADS + head) * SPLITS * BLOCK_M
        parts = partial_at + together * (size + 2)
        mine = parts + (split * BLOCK_M + m) * (size + 2)
        tl.store(mine + whole[None, :], total)
        tl.store(mine + size, most[:, None])
        tl.store(mine + size + 1, weight[:, None])
        tl.debug_barrier()
        arrived = arrived_at + row * KV_HEADS + head
        if tl.atomic_add(arrived, 1) == SPLITS - 1:
            s = tl.arange(0, SPLITS)[:, None]
            every = parts + (s * BLOCK_M + tl.trans(m)) * (size + 2)
            peaks = tl.load(every + size, cache_modifier=".cg")
            weights = tl.load(every + size + 1, cache_modifier=".cg")
            fades = tl.exp(peaks - tl.max(peaks, 0)[None, :])
            weight = tl.sum(weights * fades, 0)
            total = tl.zeros((BLOCK_M, size), tl.float32)
            for index in range(SPLITS):
                its = parts + (index * BLOCK_M + m) * (size + 2)
                fade = tl.sum(tl.where(s == index, fades, 0.0), 0)
                total += tl.load(its + whole[None, :], cache_modifier=".cg") * fade[:, None]
            out = out_at + (row * KV_HEADS * GROUP + head * GROUP + m) * size + whole[None, :]
            tl.store(out, (total / weight[:, None]).to(kind), m < GROUP)
            tl.store(arrived, 0)
