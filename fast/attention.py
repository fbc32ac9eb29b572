"""Causal attention over packed sequences."""
import functools
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def varlen():
    """CUDA's variable-length kernel and its parameters. Its import brings in torch's compiler, which takes seconds."""
    from torch.nn.attention.varlen import varlen_attn
    return varlen_attn, inspect.signature(varlen_attn).parameters


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float | None = None,
                     keys: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
                     window: int | None = None) -> Tensor:
    """Causal attention inside each sequence of a pack, never across: q [T, heads, d], k, v [T, kv, d] -> [T, heads, d].

    On CUDA in half precision one varlen kernel, elsewhere sdpa sequence by sequence: the same semantics. `keys` (a pack
    whose sequences share tokens) says where the keys of each sequence are; its queries are the last of them. window:
    how many tokens a query sees, itself included; None: all before it.
    """
    if keys is None:
        cu_seqlens_k = cu_seqlens
    else:
        k, v = k.index_select(0, keys), v.index_select(0, keys)  # [L, kv, d]
    grouped = q.shape[1] != k.shape[1]
    if q.is_cuda and q.dtype != torch.float32:
        varlen_attn, options = varlen()
        if window and "window_size" not in options:
            raise RuntimeError(f"varlen_attn of torch {torch.__version__} knows no window; give --engine plain")
        mask = {"window_size": (window - 1 if window else -1, 0)} if "window_size" in options else {"is_causal": True}
        if "enable_gqa" in options:  # torch 2.11 accepts fewer key heads than query heads without the argument
            mask["enable_gqa"] = grouped
        # FlashAttention's causal mask puts the last query at the last key.
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens_k, max_length, max_length, scale=scale, **mask)
    parts, (at, at_k) = [], (cu.tolist() for cu in (cu_seqlens, cu_seqlens_k))
    for a, b, c, d in zip(at, at[1:], at_k, at_k[1:]):
        # sdpa's own causal mask puts the first query at the first key
        mask = {"is_causal": True}
        if b - a < d - c or window and window < d - c:
            visible = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).tril(d - c - b + a)
            mask = {"attn_mask": visible.triu(d - c - b + a - window + 1) if window else visible}
        one = (x.transpose(0, 1).unsqueeze(0) for x in (q[a:b], k[c:d], v[c:d]))  # [1, heads, tokens, d]
        parts.append(F.scaled_dot_product_attention(*one, scale=scale, enable_gqa=grouped, **mask))
    return torch.cat(parts, 2).squeeze(0).transpose(0, 1)


@functools.cache
def check_shared_attention(device: torch.device) -> None:
    """Once per process: the GPU's kernel must put the last query at the last key, as the CPU path does, for a window as
    well; RuntimeError if not."""
    q, k, v = torch.randn(3, 8, 2, 64, generator=torch.Generator().manual_seed(0)).to(device)  # [T, heads, d]
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32, device=device) for cu in ([0, 6, 8], [0, 6, 12]))
    keys = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7], device=device)  # the second sequence shares four tokens
    windows = (None, 3) if "window_size" in varlen()[1] else (None,)
    half, exact = (torch.cat([packed_attention(*(x.to(dtype) for x in (q, k, v)), cu_q, 8, None, keys, cu_k, window)
                              for window in windows]) for dtype in (torch.bfloat16, torch.float32))
    if (gap := (half - exact).abs().max().item()) > 0.05:
        raise RuntimeError(f"varlen_attn of torch {torch.__version__} places fewer queries than keys differently "
                           f"(largest difference from fp32 {gap:.2f}), so packs can't share tokens with it; give "
                           f"--engine plain")
