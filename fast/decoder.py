"""The decoder of llama, qwen2, qwen3 and gemma3 over a pack, with LoRA and NF4 written out.

RMSNorm, rotary positions, grouped-query attention and a gated MLP in the order and the precisions of transformers'
modules, whose weights it reads. Gemma 3 differs in this: its embeddings are scaled, its norms multiply by 1 + weight,
what attention and MLP add to the residual stream has a norm of its own, and layers with a window have other positions.
T tokens, H hidden size, d head size, kv key/value heads. What a layer adds to the residual stream is carried separately
(`update`), so that the sum and the norm after it are one kernel. Functions take the base model: PEFT puts a LoRA's
layers into its modules.
"""
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.attention import packed_attention
from fast.packing import Pack


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * y.to(weight.dtype)).to(x.dtype)


def norm_of(module: nn.Module) -> tuple[Tensor, float]:
    """(weight, eps) of an RMSNorm; Gemma's multiplies by 1 + weight, in fp32."""
    if hasattr(module, "variance_epsilon"):
        return module.weight, module.variance_epsilon
    return 1 + module.weight.float(), module.eps


def norms_of(layer: nn.Module) -> tuple[nn.Module | None, ...]:
    """The norms of a layer: of attention's input and of what attention adds, of the MLP's input and of what it adds.
    Only Gemma has the second and the fourth."""
    if hasattr(layer, "pre_feedforward_layernorm"):
        return (layer.input_layernorm, layer.post_attention_layernorm, layer.pre_feedforward_layernorm,
                layer.post_feedforward_layernorm)
    return layer.input_layernorm, None, layer.post_attention_layernorm, None


def rotations(body: nn.Module, x: Tensor, position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each layer the cos and sin [T, d] of position_ids [1, T], in x's type; layers of one kind share them."""
    kinds = [layer.self_attn.layer_type if hasattr(body.rotary_emb, "layer_types") else None for layer in body.layers]
    rotation_by_kind = {kind: body.rotary_emb(x, position_ids, *filter(None, [kind])) for kind in dict.fromkeys(kinds)}
    rotation_by_kind = {kind: (cos[0], sin[0]) for kind, (cos, sin) in rotation_by_kind.items()}
    return [rotation_by_kind[kind] for kind in kinds]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [T, heads, d], cos and sin [T, 1, d]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def add_norm(x: Tensor, update: Tensor, norm: tuple[Tensor, float], update_norm: tuple[Tensor, float] | None = None):
    """The residual stream x + update [T, H], and its norm. update_norm: the norm of the update itself."""
    x = x + (rms_norm(update, *update_norm) if update_norm else update)
    return x, rms_norm(x, *norm)


def split_heads(qkv: Tensor, heads: int, kv_heads: int, norms: tuple, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """[T, (heads + 2 kv) d] -> queries [T, heads, d], keys and values [T, kv, d]; norms: (weight, eps) of q and k, or
    none."""
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    if norms:
        q, k = (rms_norm(y, *norm) for y, norm in zip((q, k), norms))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def swiglu(gate_up: Tensor) -> Tensor:
    """[T, 2 I] -> [T, I]"""
    gate, up = gate_up.chunk(2, 1)
    return F.silu(gate) * up


def geglu(gate_up: Tensor) -> Tensor:
    """[T, 2 I] -> [T, I], Gemma's"""
    gate, up = gate_up.chunk(2, 1)
    return F.gelu(gate, approximate="tanh") * up


def gate_of(config) -> Callable[[Tensor], Tensor]:
    return geglu if hasattr(config, "hidden_activation") else swiglu


@functools.cache
def compiled(function: Callable) -> Callable:
    """torch.compile of a function, once per process, for any number of rows: a tensor's first dimension may vary."""
    fast = torch.compile(function)

    def call(*args):
        # not views: they would be compiled for the size of the tensor that they are views of
        args = [t.data if isinstance(t, Tensor) and t._is_view() and not t.requires_grad else t for t in args]
        for t in args:
            if isinstance(t, Tensor) and t.dim():
                torch._dynamo.maybe_mark_dynamic(t, 0)
        return fast(*args)
    return call


def is_quantized(weight: Tensor) -> bool:
    """Whether it is an NF4 weight of bitsandbytes."""
    return getattr(weight, "quant_state", None) is not None


def dequantized(weight: Tensor) -> Tensor:
    """A linear layer's weight; an NF4 weight is dequantised to its compute dtype."""
    if not is_quantized(weight):
        return weight
    import bitsandbytes.functional
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


def low_rank(module: nn.Module) -> list[tuple[float, Tensor, Tensor]]:
    """(alpha/r, A [r, in], B [out, r]) of a linear layer's active adapters; none while adapters are off."""
    if not hasattr(module, "lora_A") or module.disable_adapters:
        return []
    if module.merged:
        raise ValueError("the adapter is merged into the model's own weights; unmerge it first")
    return [(module.scaling[name], module.lora_A[name].weight, module.lora_B[name].weight)
            for name in module.active_adapters if name in module.lora_A]


def stacked(modules: Sequence[nn.Module]) -> Tensor:
    """Unquantised weights of linear layers with one input as one tensor [Σ out, in], whose views they become."""
    parts, together = [m.weight for m in modules], getattr(modules[0], "together", None)
    at = None if together is None else together.data_ptr()
    for w in parts:  # are they still views of it?
        if at is None or w.data_ptr() != at or w.dtype != together.dtype:
            together = modules[0].together = torch.cat([w.data for w in parts])
            for m, view in zip(modules, together.split([len(w) for w in parts])):
                m.weight.data = view
            break
        at += w.nbytes
    return together


def stack_layers(base: nn.Module) -> None:
    """Stack all that the layers multiply at once, one after the other: each takes the place that the one before it
    left. Made during a first pass, among its other tensors, they would leave holes."""
    for layer in base.base_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for modules in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            modules = [getattr(m, "base_layer", m) for m in modules]
            if not any(is_quantized(m.weight) for m in modules):
                stacked(modules)


def weight_of(modules: Sequence[nn.Module], dtype: torch.dtype) -> Tensor:
    """The weights of frozen linear layers with one input, stacked [Σ out, in]."""
    if len(modules) == 1:
        return dequantized(modules[0].weight).to(dtype)
    if is_quantized(modules[0].weight):
        return torch.cat([dequantized(m.weight) for m in modules]).to(dtype)
    return stacked(modules).to(dtype)


class AdaptedLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s (x Aᵀ) Bᵀ of frozen linear layers with one input, x [T, in] -> y [T, out]; A, B trained.

    Written out, because autograd would keep W for the backward (here an NF4 weight is dequantised again), cast x to the
    factors' fp32 and back, and hold each low-rank term before it is added.
    """

    @staticmethod
    def forward(ctx, x: Tensor, modules: Sequence[nn.Module], terms: Sequence[tuple], *factors: Tensor) -> Tensor:
        """terms: (first output, last + 1, s) of each pair A [r, in], B [out, r] in `factors`."""
        bias = None if modules[0].bias is None else torch.cat([m.bias for m in modules])
        y = F.linear(x, weight_of(modules, x.dtype), bias)
        if terms:
            ctx.ranks, ctx.precision = [len(a) for a in factors[::2]], factors[0].dtype
            a, *more = (f.to(x.dtype) for f in factors[::2])
            a, bs = torch.cat([a, *more]) if more else a, [b.to(x.dtype) for b in factors[1::2]]
            low = F.linear(x, a)                                                       # [T, Σ r]
            for (begin, end, scale), b, part in zip(terms, bs, low.split(ctx.ranks, 1)):
                y[:, begin:end].addmm_(part, b.T, alpha=scale)
            ctx.save_for_backward(x, low, a, *bs)
        ctx.modules, ctx.terms, ctx.dtype = modules, terms, x.dtype
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        dx = dy @ weight_of(ctx.modules, ctx.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.terms:
            return dx, None, None
        x, low, a, *bs = ctx.saved_tensors
        dlow, db = torch.empty_like(low), []                                           # d loss / d (x Aᵀ), times s
        parts = zip(ctx.terms, bs, low.split(ctx.ranks, 1), dlow.split(ctx.ranks, 1))
        for (begin, end, scale), b, part, dpart in parts:
            dpart.addmm_(dy[:, begin:end], b, beta=0, alpha=scale)
            db.append(torch.addmm(b, dy[:, begin:end].T, part, beta=0, alpha=scale).to(ctx.precision))
        if dx is not None:
            dx.addmm_(dlow, a)
        da = (dlow.T @ x).to(ctx.precision).split(ctx.ranks)
        return dx, None, None, *(grad for pair in zip(da, db) for grad in pair)


def adapted(x: Tensor, *modules: nn.Module) -> Tensor:
    """Linear layers with one input (plain, NF4, with or without LoRA) as one product: [T, in] -> [T, Σ out]."""
    terms, factors, at = [], [], 0
    for m in modules:
        end = at + m.out_features
        for scale, a, b in low_rank(m):
            terms.append((at, end, scale))
            factors += [a, b]
        at = end
    y = AdaptedLinear.apply(x, [getattr(m, "base_layer", m) for m in modules], terms, *factors)
    # A pass with adapters off (the reference) must run the same kernels as the policy's: torch.compile makes separate
    # ones for inputs that require no gradient, and these may round differently. Its backward is never called.
    return y.requires_grad_() if torch.is_grad_enabled() and getattr(modules[0], "disable_adapters", False) else y


def decoder(base: nn.Module, pack: Pack, compile: bool = False) -> Tensor:
    """The model's layers over a pack: its last hidden states, [T, H]. compile: fuse the elementwise steps (CUDA)."""
    body, config = base.base_model, base.config
    fused = compiled if compile else lambda function: function
    add, split, activate = map(fused, (add_norm, split_heads, gate_of(config)))
    x = body.embed_tokens(pack.input_ids[0])                                                    # [T, H]
    update, last_norm = torch.zeros_like(x), None
    for layer, (cos, sin) in zip(body.layers, rotations(body, x, pack.position_ids)):
        attention, mlp = layer.self_attn, layer.mlp
        input_norm, attention_norm, post_norm, mlp_norm = (module and norm_of(module) for module in norms_of(layer))
        norms = (norm_of(attention.q_norm), norm_of(attention.k_norm)) if hasattr(attention, "q_norm") else ()
        x, h = add(x, update, input_norm, last_norm)
        qkv = split(adapted(h, attention.q_proj, attention.k_proj, attention.v_proj), config.num_attention_heads,
                    config.num_key_value_heads, norms, cos[:, None], sin[:, None])
        attended = packed_attention(*qkv, pack.cu_seqlens, pack.max_length, attention.scaling, pack.keys,
                                    pack.cu_seqlens_k, getattr(attention, "sliding_window", None))
        x, h = add(x, adapted(attended.flatten(1), attention.o_proj), post_norm, attention_norm)
        update, last_norm = adapted(activate(adapted(h, mlp.gate_proj, mlp.up_proj)), mlp.down_proj), mlp_norm
    return add(x, update, norm_of(body.norm), last_norm)[1]
