"""Log-probabilities of a pack's predicted tokens, with the gradient taken while the logits exist."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fast.decoder import compiled
from fast.graphs import hidden_states, is_compiled
from fast.packing import Pack


class KnownSlope(torch.autograd.Function):
    """values [K] as a function of x [K, H] with a known gradient: slopes [K, H], that of values[k] with respect to
    x[k]."""

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(slopes)
        return values.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        slopes, = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None


def of_targets(logits: Tensor, targets: Tensor, temperature: float, extras: Sequence[str], slopes: bool):
    """(log softmax(logits / temperature)[target] [C] in fp32, its gradient with respect to the logits or None, {extra:
    [C]})."""
    z = logits.float() if temperature == 1 else logits.float() / temperature           # [C, V]
    normaliser = z.logsumexp(1, keepdim=True)
    logprobs = (z.gather(1, targets[:, None]) - normaliser)[:, 0]                      # [C]
    values, slope, p = {}, None, (z - normaliser).exp_() if slopes or "entropy" in extras else None
    if "correct" in extras:
        values["correct"] = z.argmax(1) == targets
    if "entropy" in extras:  # log Σ exp z − Σ p z
        values["entropy"] = normaliser[:, 0] - (p * z).sum(1)
    if slopes:  # d log p_t / d logit_v = (1[v = t] − p_v) / temperature
        slope, at_target = p.mul_(-1 / temperature).to(logits.dtype), (1 - logprobs.exp()) / temperature
        slope.scatter_(1, targets[:, None], at_target[:, None].to(slope.dtype))
    return logprobs, slope, values


def token_logprobs(base: nn.Module, pack: Pack, temperature: float, extras: Sequence[str], chunk: int):
    """log softmax(logits / temperature)[target] of a pack's predicted tokens, [K] in fp32; see
    common.token_logprobs. chunk: predicted tokens whose logits exist at one time, at most.

    The LM head is frozen, so a token's gradient with respect to its hidden state, (w_t − Σ_v p_v w_v) / temperature,
    is taken while its logits exist, and the backward only has to scale it: no [C, V] tensor is kept, and nothing is
    computed again.
    """
    hidden = hidden_states(base, pack)[pack.predict]
    head, slopes, parts = base.get_output_embeddings(), hidden.requires_grad, []
    choose_targets = compiled(of_targets) if is_compiled(base) else of_targets
    chunks = max(1, -(-len(hidden) // chunk))  # of equal size; no token: one empty chunk
    with torch.no_grad():
        for h, t in zip(hidden.tensor_split(chunks), pack.targets.tensor_split(chunks)):
            logprobs, slope, values = choose_targets(head(h), t, temperature, tuple(extras), slopes)
            parts.append((logprobs, slope.to(head.weight.dtype) @ head.weight if slopes else None, values))
    logprobs = torch.cat([lp for lp, _, _ in parts])
    if slopes:
        logprobs = KnownSlope.apply(hidden, logprobs, torch.cat([slope for _, slope, _ in parts]))
    return (logprobs, {k: torch.cat([values[k] for _, _, values in parts]) for k in extras}) if extras else logprobs
