"""How much of a GPU's memory training will take: an estimate from the model and the lengths, before the first step."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from common import HEAD, MAX_BATCH, base_of, device_of, free_memory, head_chunk, is_fast, say, trainable, world


def training_memory(config, weights: int, trained: int, tokens: int, fast: bool = True, head: bool = True,
                    rows: int = 0, length: int = 0, itemsize: int = 2) -> dict[str, float]:
    """Bytes that a training step takes of a GPU's memory, by part; {} for a config of other fields than llama's. Their
    sum is within 20 % of the peaks measured in bfloat16 (tests/test_memory.py).

    weights: bytes of all models as they are loaded. trained: parameters, which take 24 bytes each: value, gradient,
    Adam's two moments, the gradient of a recorded pass, casts. tokens: of the largest micro-batch; the backward keeps
    per token and layer: gate, up and their product (3 I), the inputs of the products and the residual stream (6 H),
    queries, keys and values twice; the plain engine 2.1 times as much. All models and passes share the memory for
    this. head: of a chunk of predicted tokens, logits and slopes (plain: what the backward computes again). rows,
    length: what the sampler decodes at one time: keys and values, beside weights of the layers of its own. itemsize:
    bytes of a base's weight.
    """
    try:
        hidden, layers, between = config.hidden_size, config.num_hidden_layers, config.intermediate_size
        width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    except AttributeError:
        return {}
    layer = hidden * (2 * queries + 2 * keys + 3 * between)
    bytes_per_token = itemsize * layers * (3 * between + 6 * hidden + 2 * (queries + 2 * keys)) * (1 if fast else 2.1)
    return {"weights": weights, "adapter": 24 * trained, "activations": bytes_per_token * tokens,
            "head": head * head_chunk(tokens) * config.vocab_size * (4 if fast else 10) * itemsize,
            "sampler": itemsize * layers * (layer + rows * length * 2 * keys) if rows else 0}


def expected_memory(models: Sequence[nn.Module], micro_tokens: int, largest: int, rows: int = 0,
                    length: int = 0) -> dict[str, float]:
    """training_memory of models as they are loaded, each trained on a base of its own, for this rank.

    largest: tokens of the largest step. rows, length: what is sampled at one time, and tokens of the longest row.
    """
    bases = [base_of(m) for m in models]
    weights = sum(p.nbytes for base in bases for p in base.parameters() if not p.requires_grad)
    return training_memory(
        bases[0].config.get_text_config(), weights, trained=sum(p.numel() for m in models for p in trainable(m)),
        tokens=min(micro_tokens, math.ceil(largest / world())), fast=is_fast(bases[0]),
        head=not hasattr(bases[0], HEAD), rows=min(MAX_BATCH, math.ceil(rows / world())), length=length,
        itemsize=bases[0].dtype.itemsize)


def note_memory(models: Sequence[nn.Module], micro_tokens: int, largest: int, rows: int = 0, length: int = 0) -> None:
    """On a GPU, before the first step: print expected_memory and what is free; warn where that is less."""
    device = device_of(models[0])
    if device.type == "cuda":
        free = free_memory(device) + torch.cuda.memory_reserved(device)
        say(memory_note(lambda tokens: expected_memory(models, tokens, largest, rows, length), free,
                        min(micro_tokens, largest)))


def memory_note(estimate: Callable[[int], dict[str, float]], free: float, tokens: int) -> str:
    """Does what micro-batches of `tokens` need fit into `free` bytes? If not, the --micro-tokens that would. estimate:
    tokens -> training_memory."""
    if not estimate(tokens):
        return "memory: no estimate for this architecture"

    def needed(tokens: int) -> float:
        parts = estimate(tokens)
        return sum(parts.values()) - max(0, parts["sampler"] - 0.4 * free)  # it takes its rows in batches
    total = needed(tokens)
    summary = f"memory: about {total / 2**30:.1f} GiB of the GPU's {free / 2**30:.1f} that are free"
    if total <= 0.95 * free:
        return summary
    fitting = max((fewer for fewer in range(256, tokens, 256) if needed(fewer) <= 0.95 * free), default=0)
    remedy = f"give --micro-tokens {fitting}, and no longer sequences" if fitting else \
        "even a small --micro-tokens will not fit: choose a smaller model, or free the GPU"
    return f"WARNING: {summary}; {remedy}"
