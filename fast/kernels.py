"""Triton kernels of the sampler's decoder: the operations between the matrix products, one kernel for each gap.

A decoding step of B rows (one token each) reads every weight once: its products are short, and the small kernels between
them take as long as they do. Before the first layer there is one, `embed`. Per layer there are three, in four launches:

  attend   bias, q and k norms, rotary positions, cache write, attention   after the q/k/v product
           (with few rows `combine` follows)
  add      the residual sum                                                after the output and the down product
  swiglu   silu(gate) · up                                                 after the gate/up product

After the LM head `choose` picks each row's token, in two launches. torch.compile could fuse these parts as well, but it
takes seconds in each process, where a kernel of Triton's is read from a cache.

An adapter's low-rank term costs no kernel: the product before computes [x Wᵀ | x Aᵀ] (sampler.Projection), and the
kernel that reads its result adds (x Aᵀ) Bᵀ. Nor does an RMSNorm between two products. It needs whole rows, and one
program per row would leave half of a GPU idle at 64 rows. So `add` stores x times the norm's weight, and Σ x² over each
part of a row; attend or swiglu, after the next product, multiplies what it reads by the norm's factor,
1 / sqrt(mean x² + eps), one number per row. A prompt's tokens, which attend to each other, run through add and swiglu as
well; what the others do is torch's for them (begin, sampler.after_norm).

Sums are fp32; results are rounded to the model's type where the torch path rounds them, with four differences: a norm's
two factors are applied in the other order (of the last norm, which is torch's own, both before one rounding), a bias
after the norm's factor, (x Aᵀ) Bᵀ isn't rounded before it is added, and `choose` sums each block of probabilities in
fp32 before it adds the blocks in fp64.

Of the package, only fast/sampler.py calls this module: with Triton on a GPU from Ampere on, in bfloat16 (by default not
in float16, where products before the norm's factor may overflow), unless RUNGS_KERNELS=0. The torch path there is the
specification, and common.choose that of `choose`. With RUNGS_KERNELS=1 and TRITON_INTERPRET=1 the kernels run on a CPU,
which the tests use. B rows, H hidden size, d head size, I size of the MLP, r rank (a multiple of 16), V vocabulary.
"""
import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

RANK_STEP = 16            # ranks are multiples of it (sampler.Decoder.RANK_STEP); attend's loop is unrolled by it
# Chosen by bench/decode_kernels.py --tune
ATTEND_BLOCK = 64         # keys per iteration
ATTEND_WARPS = 4
ATTEND_STAGES = 3         # iterations whose keys and values are being loaded
KEYS_PER_SPLIT = 256      # with few rows the keys of a row are split among programs, at least this many each
ADD_TILE = (16, 64)       # rows and columns of one program
SWIGLU_TILE = (16, 64)
CHOICE_BLOCK = 128        # tokens of the vocabulary whose probabilities are summed first, as in common.choose
CHOICE_TILE = 32          # blocks of one program


class Stream(NamedTuple):
    """The residual stream, with what the next norm needs."""
    x: Tensor            # [B, H]
    weighted: Tensor     # [B, H]: x times the norm's weight
    squares: Tensor      # [B, n], fp32: Σ x² over each of n parts of a row


def unsupported(config) -> str | None:
    """Why these kernels can't serve a model, from its config; None if they can."""
    if config.model_type == "gemma3_text" or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "norms after attention and MLP, or windows"
    if getattr(config, "mlp_bias", False):
        return "biases of gate and up"
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if d in (32, 64, 128, 256) else f"heads of size {d}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 132, an H100's, without one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def rank_step(rank: int) -> int:
    """Rows of Bᵀ that a program takes at one time: a power of two, 16 to 64."""
    return max(16, min(64, triton.next_power_of_2(rank)))


@triton.jit
def norm_factor(squares_ptr, row, parts, eps, H, PARTS: tl.constexpr):
    """1 / sqrt(mean x² + eps) for row indices [ROWS, 1]; returns [ROWS, 1] in fp32."""
    part = tl.arange(0, PARTS)[None, :]
    squares = tl.load(squares_ptr + row * parts + part, mask=part < parts, other=0.0)
    return tl.rsqrt(tl.sum(squares, 1) / H + eps)[:, None]


@triton.jit
def add_low_rank(y, low, b, row_exists, column_exists, width, RANK: tl.constexpr, STEP: tl.constexpr):
    """y + (x Aᵀ) Bᵀ, [ROWS, COLUMNS]. low: where x Aᵀ begins in each row; b: pointers to the columns of Bᵀ's first row;
    rows are `width` apart."""
    for first in tl.static_range(0, RANK, STEP):
        j = first + tl.arange(0, STEP)
        low_tile = tl.load(low + j[None, :], mask=row_exists & (j < RANK)[None, :], other=0.0)
        b_tile = tl.load(b + j[:, None] * width, mask=(j < RANK)[:, None] & column_exists, other=0.0)
        y = tl.dot(low_tile, b_tile, y, input_precision="ieee")
    return y


# -- residual sum


@triton.jit(do_not_specialize=["rows"])
def add_kernel(x_ptr, y_ptr, b_ptr, norm_ptr, weighted_ptr, squares_ptr, rows, y_width, H: tl.constexpr,
               RANK: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < H)
    dtype = x_ptr.dtype.element_ty
    norm = tl.load(norm_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    y_row = y_ptr + row * y_width
    x = tl.load(x_ptr + row * H + column, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(y_row + column, mask=inside, other=0.0).to(tl.float32)
    if RANK:
        update = add_low_rank(update, y_row + H, b_ptr + column, row < rows, column < H, H, RANK, STEP)
    x = (x + update.to(dtype).to(tl.float32)).to(dtype)
    tl.store(x_ptr + row * H + column, x, mask=inside)
    x = x.to(tl.float32)
    tl.store(weighted_ptr + row * H + column, (x * norm).to(dtype), mask=inside)
    squares = tl.sum(x * x, 1)[:, None]  # zeros beyond the last column
    tl.store(squares_ptr + row * tl.num_programs(1) + tl.program_id(1), squares, mask=row < rows)


def add(stream: Stream, y: Tensor, b: Tensor | None, norm: Tensor) -> Stream:
    """The stream plus y's projection; stream.x is changed in place.

    y: [B, H + r], a projection and its x Aᵀ. b: Bᵀ [r, H], or None (r = 0). norm: weight of the RMSNorm that follows [H].
    """
    (rows, size), rank = stream.x.shape, 0 if b is None else len(b)
    tile_rows, tile_columns = ADD_TILE
    grid = triton.cdiv(rows, tile_rows), triton.cdiv(size, tile_columns)
    weighted, squares = torch.empty_like(stream.x), torch.empty(rows, grid[1], device=y.device)
    add_kernel[grid](stream.x, y, b, norm, weighted, squares, rows, y.stride(0), H=size, RANK=rank,
                     STEP=rank_step(rank), ROWS=tile_rows, COLUMNS=tile_columns, num_warps=4)
    return Stream(stream.x, weighted, squares)


# -- the stream before the first layer


def begin(x: Tensor, norm: Tensor) -> Stream:
    """The stream of any embeddings x [B, H], in torch; norm: the weight of its norm [H]."""
    return Stream(x, x * norm, x.float().square().sum(-1, keepdim=True))


@triton.jit
def embed_kernel(token_ptr, embedding_ptr, norm_ptr, start_ptr, position_ptr, x_ptr, weighted_ptr, squares_ptr,
                 at_ptr, last, H: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(embedding_ptr + tl.load(token_ptr + row) * H + column, mask=column < H, other=0.0)
    tl.store(x_ptr + row * H + column, x, mask=column < H)
    x, norm = x.to(tl.float32), tl.load(norm_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(weighted_ptr + row * H + column, (x * norm).to(x_ptr.dtype.element_ty), mask=column < H)
    tl.store(squares_ptr + row, tl.sum(x * x, 0))
    tl.store(at_ptr + row, tl.minimum(tl.load(start_ptr + row) + tl.load(position_ptr), last))


def embed(token: Tensor, embedding: Tensor, norm: Tensor, start: Tensor, position: Tensor,
          length: int) -> tuple[Stream, Tensor]:
    """`begin` for the embeddings of the tokens to feed [B], and the place of each in its row, start + position, at most
    length - 1: [B] (sampler.decode_begin). embedding: [V, H]; norm: [H]; start: [B]; position: []."""
    rows, size = len(token), embedding.shape[1]
    x, weighted = (torch.empty(rows, size, dtype=embedding.dtype, device=token.device) for _ in range(2))
    squares, at = torch.empty(rows, 1, device=token.device), torch.empty_like(token)
    embed_kernel[(rows,)](token, embedding, norm, start, position, x, weighted, squares, at, length - 1, H=size,
                          BLOCK=triton.next_power_of_2(size))
    return Stream(x, weighted, squares), at


# -- attention


@triton.jit
def attend_kernel(qkv_ptr, bias_ptr, b_ptr, squares_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, at_ptr, cache_ptr,
                  out_ptr, sums_ptr, stats_ptr, width, parts, stride, splits, scale, eps, H: tl.constexpr,
                  KV: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, D: tl.constexpr,
                  RANK: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr, BIASED: tl.constexpr,
                  NORMED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the query heads of a row that share a kv head, over one split of the row's keys."""
    row, kv, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    HEADS: tl.constexpr = KV * GROUP
    OUT: tl.constexpr = (HEADS + 2 * KV) * D
    at = tl.load(at_ptr + row)
    # Two tiles [G, d/2] hold the halves of the group's query heads, then of their key head and value head: a rotation
    # takes pairs of elements that are half a head apart.
    group, half, i = tl.arange(0, GROUP_BLOCK), tl.arange(0, D // 2), tl.arange(0, D)
    kind = tl.where(group < GROUP, 0, tl.where(group == GROUP, 1, 2))                            # q, k, v
    head = tl.where(kind == 0, kv * GROUP + group, HEADS + (kind - 1) * KV + kv)
    column, exists = head[:, None] * D + half[None, :], (group < GROUP + 2)[:, None] & (half < D)[None, :]
    is_k, is_v = (kind == 1)[:, None], (kind == 2)[:, None]
    y_row = qkv_ptr + row * width
    x1 = tl.load(y_row + column, mask=exists, other=0.0).to(tl.float32)
    x2 = tl.load(y_row + column + D // 2, mask=exists, other=0.0).to(tl.float32)
    factor = norm_factor(squares_ptr, row + tl.zeros([1, 1], tl.int64), parts, eps, H, PARTS)    # [1, 1]
    if RANK:
        for first in range(0, RANK, STEP):
            for n in tl.static_range(STEP):
                j = kind * RANK + first + n
                low = tl.load(y_row + OUT + j).to(tl.float32)[:, None]
                b = b_ptr + j[:, None] * OUT + column
                x1 += low * tl.load(b, mask=exists, other=0.0).to(tl.float32)
                x2 += low * tl.load(b + D // 2, mask=exists, other=0.0).to(tl.float32)
    x1, x2 = x1 * factor, x2 * factor
    if BIASED:
        x1 += tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)
        x2 += tl.load(bias_ptr + column + D // 2, mask=exists, other=0.0).to(tl.float32)
    x1, x2 = x1.to(dtype).to(tl.float32), x2.to(dtype).to(tl.float32)
    if NORMED:
        weight1 = tl.where(is_k, tl.load(k_norm_ptr + half)[None, :], tl.load(q_norm_ptr + half)[None, :])
        weight2 = tl.where(is_k, tl.load(k_norm_ptr + D // 2 + half)[None, :],
                           tl.load(q_norm_ptr + D // 2 + half)[None, :])
        head_factor = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
        normed1, normed2 = (x1 * head_factor).to(dtype).to(tl.float32), (x2 * head_factor).to(dtype).to(tl.float32)
        x1 = tl.where(is_v, x1, (normed1 * weight1.to(tl.float32)).to(dtype).to(tl.float32))
        x2 = tl.where(is_v, x2, (normed2 * weight2.to(tl.float32)).to(dtype).to(tl.float32))
    angle = at * D + half
    cos1 = tl.where(is_v, 1.0, tl.load(cos_ptr + angle).to(tl.float32)[None, :])
    cos2 = tl.where(is_v, 1.0, tl.load(cos_ptr + D // 2 + angle).to(tl.float32)[None, :])
    sin1 = tl.where(is_v, 0.0, tl.load(sin_ptr + angle).to(tl.float32)[None, :])
    sin2 = tl.where(is_v, 0.0, tl.load(sin_ptr + D // 2 + angle).to(tl.float32)[None, :])
    both = tl.join(x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2)                                 # [G, d/2, 2]
    q = tl.reshape(tl.permute(both, (0, 2, 1)), [GROUP_BLOCK, D]).to(dtype)                      # and k, v
    exists_whole = (group < GROUP + 2)[:, None] & (i < D)[None, :]

    row_keys = cache_ptr + (row * stride * 2 * KV + kv) * D                                      # [slots, 2, kv, d]
    highest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    attended = tl.zeros([GROUP_BLOCK, D], tl.float32)
    if split == 0:  # the new token: into the cache, and the first term of the sums
        tl.store(row_keys + at * (2 * KV * D) + tl.where(is_v, KV * D, 0) + i[None, :], q,
                 mask=exists_whole & (is_k | is_v))
        wide = q.to(tl.float32)
        new_k, new_v = tl.sum(tl.where(is_k, wide, 0.0), 0), tl.sum(tl.where(is_v & exists_whole, wide, 0.0), 0)
        highest = tl.sum(wide * new_k[None, :], 1) * scale
        total += 1.0
        attended += new_v[None, :]

    earlier = at.to(tl.int32)
    share = tl.cdiv(tl.cdiv(earlier, splits), BLOCK) * BLOCK
    end = tl.minimum(earlier, (split + 1) * share)
    for first in range(split * share, end, BLOCK):
        key = first + tl.arange(0, BLOCK)
        inside = key < end
        slot = row_keys + key * (2 * KV * D)
        k = tl.load(slot[None, :] + i[:, None], mask=inside[None, :], other=0.0)                 # [d, keys]
        v = tl.load(slot[:, None] + KV * D + i[None, :], mask=inside[:, None], other=0.0)        # [keys, d]
        score = tl.dot(q, k, input_precision="ieee") * scale                                     # [G, keys]
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        p, before = tl.exp2(score - higher[:, None]), tl.exp2(highest - higher)
        highest, total = higher, total * before + tl.sum(p, 1)
        attended = tl.dot(p.to(dtype), v, attended * before[:, None], input_precision="ieee")

    query = row * HEADS + kv * GROUP + group
    wanted = (group < GROUP)[:, None] & (i < D)[None, :]
    if SPLIT:
        split_query = split * tl.num_programs(0) * HEADS + query
        tl.store(sums_ptr + split_query[:, None] * D + i[None, :], attended, mask=wanted)
        tl.store(stats_ptr + split_query * 2, highest, mask=group < GROUP)
        tl.store(stats_ptr + split_query * 2 + 1, total, mask=group < GROUP)
    else:
        tl.store(out_ptr + query[:, None] * D + i[None, :], (attended / total[:, None]).to(dtype), mask=wanted)


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


def attend(qkv: Tensor, bias: Tensor | None, b: Tensor | None, stream: Stream, q_norm: Tensor | None,
           k_norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor, at: Tensor, cache: Tensor, stride: int,
           length: int) -> Tensor:
    """Attention of one new token per row over its row of the cache, which gets the token's key and value: [B, heads d].

    qkv: [B, (heads + 2 kv) d + 3 r], the products of stream.weighted with W of q, k and v and with A of each. bias:
    [(heads + 2 kv) d or more], or None. b: their Bᵀ as blocks on a diagonal, [3 r, (heads + 2 kv) d], or None (r = 0).
    q_norm, k_norm: weights of their RMSNorm [d] (Qwen3), or None. cos, sin: [positions, d]. at: each row's new position
    [B]. cache: [slots, 2, kv, d]; row i has the slots i·stride, …. length: more than any `at`.
    """
    (rows, width), (kv_heads, d), device = qkv.shape, cache.shape[2:], qkv.device
    rank = 0 if b is None else len(b) // 3
    heads = (width - 3 * rank) // d - 2 * kv_heads
    splits = max(1, min(multiprocessors(device) // (rows * kv_heads), length // KEYS_PER_SPLIT))
    out = torch.empty(rows, heads * d, dtype=cache.dtype, device=device)
    sums = stats = out  # not read
    if splits > 1:
        sums, stats = (torch.empty(splits, rows * heads, n, device=device) for n in (d, 2))
    group, parts = heads // kv_heads, stream.squares.shape[1]
    attend_kernel[(rows, kv_heads, splits)](
        qkv, bias, b, stream.squares, q_norm, k_norm, cos, sin, at, cache, out, sums, stats, width, parts, stride, splits,
        math.log2(math.e) / math.sqrt(d), eps, H=stream.x.shape[1], KV=kv_heads, GROUP=group,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group + 2)), D=d, RANK=rank, STEP=RANK_STEP,
        PARTS=triton.next_power_of_2(parts), BIASED=bias is not None, NORMED=q_norm is not None, SPLIT=splits > 1,
        BLOCK=ATTEND_BLOCK, num_warps=ATTEND_WARPS, num_stages=ATTEND_STAGES)
    if splits > 1:
        combine_kernel[(rows * heads,)](sums, stats, out, splits, D=d, num_warps=1)
    return out


# -- the MLP's activation


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(y_ptr, b_ptr, squares_ptr, out_ptr, rows, width, parts, eps, H: tl.constexpr, I: tl.constexpr,
                  RANK: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < I)
    y_row = y_ptr + row * width
    factor = norm_factor(squares_ptr, tl.minimum(row, rows - 1), parts, eps, H, PARTS)
    gate = tl.load(y_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(y_row + I + column, mask=inside, other=0.0).to(tl.float32)
    if RANK:
        low, b, width_b = y_row + 2 * I, b_ptr + column, 2 * I
        gate = add_low_rank(gate, low, b, row < rows, column < I, width_b, RANK, STEP)
        up = add_low_rank(up, low + RANK, b + RANK * width_b + I, row < rows, column < I, width_b, RANK, STEP)
    dtype = out_ptr.dtype.element_ty
    gate, up = (gate * factor).to(dtype).to(tl.float32), (up * factor).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * I + column, (gate / (1.0 + tl.exp(-gate)) * up).to(dtype), mask=inside)


def swiglu(y: Tensor, b: Tensor | None, stream: Stream, eps: float) -> Tensor:
    """silu(gate) · up: [B, I]. y: [B, 2 I + 2 r], the products of stream.weighted with W of gate and up and with A of
    each. b: their Bᵀ as blocks on a diagonal, [2 r, 2 I], or None (r = 0)."""
    rows, rank = len(y), 0 if b is None else len(b) // 2
    size, parts = (y.shape[1] - 2 * rank) // 2, stream.squares.shape[1]
    out = torch.empty(rows, size, dtype=y.dtype, device=y.device)
    tile_rows, tile_columns = SWIGLU_TILE
    swiglu_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(size, tile_columns))](
        y, b, stream.squares, out, rows, y.stride(0), parts, eps, H=stream.x.shape[1], I=size, RANK=rank,
        STEP=rank_step(rank), PARTS=triton.next_power_of_2(parts), ROWS=tile_rows, COLUMNS=tile_columns,
        num_warps=4)
    return out


# -- the choice of a token


@triton.jit
def mix(x):
    """The finaliser of splitmix64; shifts are logical."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@triton.jit
def keyed_uniform(seed, key, position):
    """common.keyed_uniform of three int64 numbers, in fp64."""
    x = mix(seed * 1000003 + 12345 + key * -7046029254386353131 + 7046029254386353131)
    x = mix(x + position * -7046029254386353131 + 7046029254386353131)
    return ((x >> 11) & ((1 << 53) - 1)).to(tl.float64) * (1.0 / (1 << 53)) + 0.5 / (1 << 53)


@triton.jit
def sums_kernel(logits_ptr, temperature_ptr, highest_ptr, sums_ptr, V, GREEDY: tl.constexpr, BLOCK: tl.constexpr,
                TILE: tl.constexpr):
    """One program: the largest z = logit / temperature of TILE blocks of a row (finite, for the differences, also where
    all are −inf), and Σ exp(z − it) of each block."""
    row, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    block = tile * TILE + tl.arange(0, TILE)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    z = tl.load(logits_ptr + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
    if not GREEDY:
        z = z / tl.load(temperature_ptr)
    highest = tl.maximum(tl.max(tl.max(z, 1), 0), -3e38)
    tl.store(highest_ptr + row * tiles + tile, highest)
    tl.store(sums_ptr + row * tiles * TILE + block, tl.sum(tl.exp(z - highest), 1))


@triton.jit
def pick_kernel(logits_ptr, temperature_ptr, seed_ptr, key_ptr, position_ptr, highest_ptr, sums_ptr, token_ptr,
                logprob_ptr, V, tiles, GREEDY: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
                TILES: tl.constexpr):
    """One program: the token of a row."""
    row = tl.program_id(0).to(tl.int64)
    tile, block = tl.arange(0, TILES), tl.arange(0, TILES * TILE)
    highest = tl.load(highest_ptr + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    top = tl.max(highest, 0)
    exists = block < tiles * TILE
    below = tl.load(highest_ptr + row * tiles + block // TILE, mask=exists, other=float("-inf")) - top
    mass = tl.load(sums_ptr + row * tiles * TILE + block, mask=exists, other=0.0)
    mass = (mass * tl.exp(below)).to(tl.float64)                                        # Σ exp(z − top) of each block
    total = tl.sum(mass, 0)
    if GREEDY:
        column = tl.min(tl.where(highest == top, tile, TILES), 0) * TILE * BLOCK + tl.arange(0, TILE * BLOCK)
        z = tl.load(logits_ptr + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        token, chosen = tl.min(tl.where(z == top, column, V - 1), 0), top
    else:
        target = total * keyed_uniform(tl.load(seed_ptr), tl.load(key_ptr + row), tl.load(position_ptr))
        here = tl.minimum(tl.sum((tl.cumsum(mass, 0) < target).to(tl.int32), 0), tiles * TILE - 1)  # its block
        column = here * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        z = z / tl.load(temperature_ptr)
        within = tl.cumsum(tl.exp(z - top).to(tl.float64), 0)
        left = tl.minimum(target - tl.sum(tl.where(block < here, mass, 0.0), 0), tl.max(within, 0))
        token = here * BLOCK + tl.sum((within < left).to(tl.int32), 0)
        chosen = tl.sum(tl.where(column == token, z, 0.0), 0)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, ((chosen - top).to(tl.float64) - tl.log(total)).to(tl.float32))


def choose(logits: Tensor, temperature: Tensor | None = None, seed: Tensor | None = None, rows: Tensor | None = None,
           position: Tensor | None = None, top_p: None = None) -> tuple[Tensor, Tensor]:
    """common.choose, without top_p: token [B] of logits [B, V] and its log-probability [B]; greedy without a seed.
    rows: [B]; temperature, seed, position: []."""
    (count, vocabulary), device, greedy = logits.shape, logits.device, seed is None
    tiles = triton.cdiv(vocabulary, CHOICE_BLOCK * CHOICE_TILE)
    highest, sums = (torch.empty(count, n, device=device) for n in (tiles, tiles * CHOICE_TILE))
    token, logprob = torch.empty(count, dtype=torch.long, device=device), torch.empty(count, device=device)
    sizes = dict(GREEDY=greedy, BLOCK=CHOICE_BLOCK, TILE=CHOICE_TILE)
    sums_kernel[(count, tiles)](logits, temperature, highest, sums, vocabulary, **sizes)
    pick_kernel[(count,)](logits, temperature, seed, rows, position, highest, sums, token, logprob, vocabulary, tiles,
                          TILES=triton.next_power_of_2(tiles), **sizes)
    return token, logprob
