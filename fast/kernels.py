"""Triton kernels of one decoding step: the operations between a layer's matrix products, one kernel for each gap.

A step of B rows (one token each) reads every weight once: its matrix products are short, and the small kernels between
them take as long as they do. Per layer there are three here:

  add_norm   residual sum and RMSNorm                          before the q/k/v and the gate/up product
  attend     rotary positions, cache write and attention       between the q/k/v and the output product
  swiglu     silu(gate) · up                                   between the gate/up and the down product

A prompt's tokens, which attend to each other, run through add_norm and swiglu as well.

An adapter's low-rank term costs no kernel: the product before computes [x Wᵀ | x Aᵀ] (sampler.Projection), and the
kernel that reads its result adds (x Aᵀ) Bᵀ. Sums are fp32; results are rounded to the model's type where the torch path
rounds them, except that (x Aᵀ) Bᵀ itself isn't rounded before it is added.

Only fast/sampler.py calls this module: on a GPU in half precision, unless RUNGS_KERNELS=0. The torch path there is the
specification. With RUNGS_KERNELS=1 and TRITON_INTERPRET=1 the kernels run on a CPU, which the tests use. B rows, H
hidden size, d head size, I size of the MLP, r rank (a multiple of 16).
"""
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

RANK_STEP = 16            # ranks are multiples of it; this many rows of a factor are read at one time
ATTEND_BLOCK = 64         # keys per iteration
ATTEND_WARPS = 4
ATTEND_STAGES = 3         # iterations whose keys and values are being loaded
KEYS_PER_SPLIT = 256      # with few rows the keys of a row are split among programs, at least this many each
SWIGLU_TILE = (16, 64)    # rows and columns of one program


def unsupported(config) -> str | None:
    """Why these kernels can't serve a model, from its config; None if they can."""
    if config.model_type == "gemma3_text" or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "norms after attention and MLP, or windows"
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if d in (32, 64, 128, 256) else f"heads of size {d}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; that of an H100 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


# -- residual sum and norm


@triton.jit
def add_norm_kernel(x_ptr, y_ptr, b_ptr, weight_ptr, h_ptr, y_width, eps, H: tl.constexpr, RANK: tl.constexpr,
                    STEP: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < H
    dtype = x_ptr.dtype.element_ty
    y_row = y_ptr + row * y_width
    update = tl.load(y_row + column, mask=inside, other=0.0).to(tl.float32)
    for first in tl.static_range(0, RANK, STEP):  # Bᵀ comes from the GPU's main memory: a tile of it at one time
        j = first + tl.arange(0, STEP)
        b = tl.load(b_ptr + j[:, None] * H + column[None, :], mask=inside[None, :] & (j < RANK)[:, None], other=0.0)
        low = tl.load(y_row + H + j, mask=j < RANK, other=0.0).to(tl.float32)
        update += tl.sum(low[:, None] * b.to(tl.float32), 0)
    x = tl.load(x_ptr + row * H + column, mask=inside, other=0.0).to(tl.float32) + update.to(dtype).to(tl.float32)
    x = x.to(dtype)
    tl.store(x_ptr + row * H + column, x, mask=inside)
    x = x.to(tl.float32)
    h = (x * tl.rsqrt(tl.sum(x * x, 0) / H + eps)).to(dtype).to(tl.float32)
    h *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_ptr + row * H + column, h.to(dtype), mask=inside)


def add_norm(x: Tensor, y: Tensor, b: Tensor | None, norm: tuple[Tensor, float]) -> Tensor:
    """x += y's projection, in place; returns the RMSNorm of the sum, [B, H].

    x: residual stream [B, H]. y: [B, H + r], a projection and its x Aᵀ; b: Bᵀ [r, H], or None (r = 0).
    norm: (weight, eps).
    """
    rows, size = x.shape
    rank = 0 if b is None else len(b)
    weight, eps = norm
    h = torch.empty_like(x)
    add_norm_kernel[(rows,)](
        x, y, weight if b is None else b, weight, h, y.stride(0), eps, H=size, RANK=rank, STEP=RANK_STEP,
        BLOCK=triton.next_power_of_2(size), num_warps=4 if size <= 2048 else 8)
    return h


# -- attention


@triton.jit
def attend_kernel(qkv_ptr, b_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, at_ptr, cache_ptr, out_ptr, sums_ptr,
                  stats_ptr, width, stride, splits, scale, eps, KV: tl.constexpr,
                  GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr,
                  STEP: tl.constexpr, NORMED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the query heads of a row that share a kv head, over one share of the row's keys."""
    row, kv, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    HEADS: tl.constexpr = KV * GROUP
    OUT: tl.constexpr = (HEADS + 2 * KV) * D
    at = tl.load(at_ptr + row)
    # One tile [G, d] holds the group's query heads, then their key head and value head; its two halves are apart.
    group, half = tl.arange(0, GROUP_BLOCK), tl.arange(0, D // 2)
    kind = tl.where(group < GROUP, 0, tl.where(group == GROUP, 1, 2))                            # q, k, v
    head = tl.where(kind == 0, kv * GROUP + group, HEADS + (kind - 1) * KV + kv)
    column, exists = head[:, None] * D + half[None, :], (group < GROUP + 2)[:, None] & (half < D)[None, :]
    is_k, is_v = (kind == 1)[:, None], (kind == 2)[:, None]
    y_row = qkv_ptr + row * width
    x1 = tl.load(y_row + column, mask=exists, other=0.0).to(tl.float32)
    x2 = tl.load(y_row + column + D // 2, mask=exists, other=0.0).to(tl.float32)
    for first in range(0, RANK, STEP):
        for i in tl.static_range(STEP):
            j = kind * RANK + first + i
            low = tl.load(y_row + OUT + j).to(tl.float32)[:, None]
            b = b_ptr + j[:, None] * OUT + column
            x1 += low * tl.load(b, mask=exists, other=0.0).to(tl.float32)
            x2 += low * tl.load(b + D // 2, mask=exists, other=0.0).to(tl.float32)
    x1, x2 = x1.to(dtype).to(tl.float32), x2.to(dtype).to(tl.float32)
    if NORMED:
        weight1 = tl.where(is_k, tl.load(k_norm_ptr + half)[None, :], tl.load(q_norm_ptr + half)[None, :])
        weight2 = tl.where(is_k, tl.load(k_norm_ptr + D // 2 + half)[None, :],
                           tl.load(q_norm_ptr + D // 2 + half)[None, :])
        factor = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
        normed1, normed2 = (x1 * factor).to(dtype).to(tl.float32), (x2 * factor).to(dtype).to(tl.float32)
        x1 = tl.where(is_v, x1, (normed1 * weight1.to(tl.float32)).to(dtype).to(tl.float32))
        x2 = tl.where(is_v, x2, (normed2 * weight2.to(tl.float32)).to(dtype).to(tl.float32))
    angle = at * D + half
    cos1 = tl.where(is_v, 1.0, tl.load(cos_ptr + angle).to(tl.float32)[None, :])
    cos2 = tl.where(is_v, 1.0, tl.load(cos_ptr + D // 2 + angle).to(tl.float32)[None, :])
    sin1 = tl.where(is_v, 0.0, tl.load(sin_ptr + angle).to(tl.float32)[None, :])
    sin2 = tl.where(is_v, 0.0, tl.load(sin_ptr + D // 2 + angle).to(tl.float32)[None, :])
    q1, q2 = (x1 * cos1 - x2 * sin1).to(dtype), (x2 * cos2 + x1 * sin2).to(dtype)

    row_keys = cache_ptr + (row * stride * 2 * KV + kv) * D                                      # [slots, 2, kv, d]
    highest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    sum1, sum2 = tl.zeros([GROUP_BLOCK, D // 2], tl.float32), tl.zeros([GROUP_BLOCK, D // 2], tl.float32)
    if split == 0:  # the new token: into the cache, and the first term of the sums
        new = row_keys + at * (2 * KV * D) + tl.where(is_v, KV * D, 0) + half[None, :]
        tl.store(new, q1, mask=exists & (is_k | is_v))
        tl.store(new + D // 2, q2, mask=exists & (is_k | is_v))
        wide1, wide2 = q1.to(tl.float32), q2.to(tl.float32)
        new_k1, new_k2 = tl.sum(tl.where(is_k, wide1, 0.0), 0), tl.sum(tl.where(is_k, wide2, 0.0), 0)
        new_v1, new_v2 = tl.sum(tl.where(is_v, wide1, 0.0), 0), tl.sum(tl.where(is_v, wide2, 0.0), 0)
        highest = (tl.sum(wide1 * new_k1[None, :], 1) + tl.sum(wide2 * new_k2[None, :], 1)) * scale
        total += 1.0
        sum1 += new_v1[None, :]
        sum2 += new_v2[None, :]

    earlier = at.to(tl.int32)
    share = tl.cdiv(tl.cdiv(earlier, splits), BLOCK) * BLOCK
    end = tl.minimum(earlier, (split + 1) * share)
    for first in range(split * share, end, BLOCK):
        key = first + tl.arange(0, BLOCK)
        inside = key < end
        slot = row_keys + key * (2 * KV * D)
        k1 = tl.load(slot[None, :] + half[:, None], mask=inside[None, :], other=0.0)             # [d/2, keys]
        k2 = tl.load(slot[None, :] + D // 2 + half[:, None], mask=inside[None, :], other=0.0)
        v1 = tl.load(slot[:, None] + KV * D + half[None, :], mask=inside[:, None], other=0.0)    # [keys, d/2]
        v2 = tl.load(slot[:, None] + KV * D + D // 2 + half[None, :], mask=inside[:, None], other=0.0)
        score = tl.dot(q1, k1, input_precision="ieee")
        score = tl.dot(q2, k2, score, input_precision="ieee") * scale                            # [G, keys]
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        p, before = tl.exp2(score - higher[:, None]), tl.exp2(highest - higher)
        highest, total = higher, total * before + tl.sum(p, 1)
        sum1 = tl.dot(p.to(dtype), v1, sum1 * before[:, None], input_precision="ieee")
        sum2 = tl.dot(p.to(dtype), v2, sum2 * before[:, None], input_precision="ieee")

    query = row * HEADS + kv * GROUP + group
    wanted = (group < GROUP)[:, None] & (half < D)[None, :]
    if SPLIT:
        place = split * tl.num_programs(0) * HEADS + query
        sums = sums_ptr + place[:, None] * D + half[None, :]
        tl.store(sums, sum1, mask=wanted)
        tl.store(sums + D // 2, sum2, mask=wanted)
        tl.store(stats_ptr + place * 2, highest, mask=group < GROUP)
        tl.store(stats_ptr + place * 2 + 1, total, mask=group < GROUP)
    else:
        out = out_ptr + query[:, None] * D + half[None, :]
        tl.store(out, (sum1 / total[:, None]).to(dtype), mask=wanted)
        tl.store(out + D // 2, (sum2 / total[:, None]).to(dtype), mask=wanted)


@triton.jit
def combine_kernel(sums_ptr, stats_ptr, out_ptr, splits, D: tl.constexpr):
    """Attention of one head of one row from its splits: sums [splits, B heads, d], stats [splits, B heads, 2]."""
    head, whole = tl.program_id(0), tl.arange(0, D)
    heads = tl.num_programs(0)
    highest = tl.load(stats_ptr + head * 2)  # of split 0, which has the new token: finite
    total = tl.load(stats_ptr + head * 2 + 1)
    attended = tl.load(sums_ptr + head * D + whole)
    for split in range(1, splits):
        part = split * heads + head
        here = tl.load(stats_ptr + part * 2)
        higher = tl.maximum(highest, here)
        before, now = tl.exp2(highest - higher), tl.exp2(here - higher)
        total = total * before + tl.load(stats_ptr + part * 2 + 1) * now
        attended = attended * before + tl.load(sums_ptr + part * D + whole) * now
        highest = higher
    tl.store(out_ptr + head * D + whole, (attended / total).to(out_ptr.dtype.element_ty))


def attend(qkv: Tensor, b: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor,
           sin: Tensor, at: Tensor, cache: Tensor, stride: int, length: int) -> Tensor:
    """Attention of one new token per row over its row of the cache, which gets the token's key and value: [B, heads d].

    qkv: [B, (heads + 2 kv) d + 3 r], the projections of q, k, v and x Aᵀ of each. b: their Bᵀ as blocks on a diagonal,
    [3 r, (heads + 2 kv) d], or None (r = 0). q_norm, k_norm: weights of their RMSNorm [d] (Qwen3), or
    None. cos, sin: [positions, d]. at: each row's new position [B]. cache: [slots, 2, kv, d]; row i has the slots
    i·stride, …. length: more than any `at`.
    """
    (rows, width), (kv_heads, d) = qkv.shape, cache.shape[2:]
    rank = 0 if b is None else len(b) // 3
    heads = (width - 3 * rank) // d - 2 * kv_heads
    splits = max(1, min(multiprocessors(qkv.device) // (rows * kv_heads), length // KEYS_PER_SPLIT))
    out = torch.empty(rows, heads * d, dtype=cache.dtype, device=qkv.device)
    sums = stats = out  # not read
    if splits > 1:
        sums, stats = (torch.empty(splits, rows * heads, n, device=qkv.device) for n in (d, 2))
    group = heads // kv_heads
    attend_kernel[(rows, kv_heads, splits)](
        qkv, out if b is None else b, cos if q_norm is None else q_norm, cos if k_norm is None else k_norm, cos, sin,
        at, cache, out, sums, stats, width, stride, splits, math.log2(math.e) / math.sqrt(d), eps,
        KV=kv_heads, GROUP=group, GROUP_BLOCK=max(16, triton.next_power_of_2(group + 2)), D=d, RANK=rank,
        STEP=RANK_STEP, NORMED=q_norm is not None, SPLIT=splits > 1, BLOCK=ATTEND_BLOCK, num_warps=ATTEND_WARPS,
        num_stages=ATTEND_STAGES)
    if splits > 1:
        combine_kernel[(rows * heads,)](sums, stats, out, splits, D=d, num_warps=1)
    return out


# -- the MLP's activation


@triton.jit
def swiglu_kernel(y_ptr, b_ptr, out_ptr, rows, width, I: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < I)
    y = y_ptr + row * width
    gate = tl.load(y + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(y + I + column, mask=inside, other=0.0).to(tl.float32)
    if RANK:
        j = tl.arange(0, RANK_BLOCK)
        low_mask, b_mask = (row < rows) & (j < RANK)[None, :], (j < RANK)[:, None] & (column < I)
        low, b = y + 2 * I + j[None, :], b_ptr + j[:, None] * (2 * I) + column
        gate = tl.dot(tl.load(low, mask=low_mask, other=0.0), tl.load(b, mask=b_mask, other=0.0), gate,
                      input_precision="ieee")
        up = tl.dot(tl.load(low + RANK, mask=low_mask, other=0.0),
                    tl.load(b + RANK * 2 * I + I, mask=b_mask, other=0.0), up, input_precision="ieee")
    dtype = out_ptr.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    tl.store(out_ptr + row * I + column, (gate / (1.0 + tl.exp(-gate)) * up).to(dtype), mask=inside)


def swiglu(y: Tensor, b: Tensor | None) -> Tensor:
    """silu(gate) · up: [B, I]. y: [B, 2 I + 2 r], the projections gate and up and x Aᵀ of each; b: their Bᵀ as blocks
    on a diagonal, [2 r, 2 I], or None (r = 0)."""
    rows, rank = len(y), 0 if b is None else len(b) // 2
    size = (y.shape[1] - 2 * rank) // 2
    out = torch.empty(rows, size, dtype=y.dtype, device=y.device)
    tile_rows, tile_columns = SWIGLU_TILE
    swiglu_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(size, tile_columns))](
        y, out if b is None else b, out, rows, y.stride(0), I=size, RANK=rank,
        RANK_BLOCK=max(16, triton.next_power_of_2(rank)), ROWS=tile_rows, COLUMNS=tile_columns, num_warps=4)
    return out
