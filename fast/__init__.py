"""The fast engine: the same log-probabilities, gradients and samples as the plain engine in common.py, in less time.

Nothing here changes what is computed. common.py's plain engine is the specification; the tests hold this one to it
(log-probs, gradients and sampled tokens at 1e-5 in fp32), and every script runs without this folder, more slowly. The
scripts never import it, and it never imports common.py: what both engines need comes in as an argument.

Why it is fast, in reading order:

  packing.py    Sequences are laid end to end, not each padded to the longest: one forward for a whole micro-batch.
                (Recorded passes pad a pack's end a little: graphs.py.) A prefix that sequences share (a pair's
                prompt, a group's prompt, few-shot examples) is computed once.
  attention.py  Causal attention inside each packed sequence, never across: one variable-length kernel on CUDA.
  decoder.py    The decoder layers of llama, qwen2, qwen3 and gemma3 written out for packs, with LoRA and NF4: three
                projections of one input are one matrix product, elementwise steps are compiled together; in
                training an NF4 weight is dequantised in the forward and again in the backward, and not kept.
  logprobs.py   The gradient of a log-probability with respect to the hidden state is taken while its logits exist, so
                that the backward computes no logits again and no [tokens × vocabulary] tensor is kept.
  graphs.py     A pass of some thousand small kernels is recorded once for each pack size as a CUDA graph and replayed:
                the GPU no longer waits for Python. Packs are padded to one of a few sizes, so that a recorded graph
                can be reused.
  sampler.py    Decoding with a cache that stays allocated, recorded graphs of a step and of the pass over prompts;
                rows that have ended leave the batch.
  kernels.py    The operations between the matrix products of a decoding step and the choice of its tokens, in Triton
                (of prompts, the residual sums and SwiGLU): on a GPU in bfloat16, unless RUNGS_KERNELS=0.

On a CPU the same code runs without compilation and recording. On CUDA, RUNGS_COMPILE=0 in the environment turns both
off for passes over packs, which suits short runs; the sampler always records and, where kernels.py doesn't run,
compiles its step unless common.Sampler was given short=True.
"""
from fast.graphs import agree_on_sizes, compile_layers, give_up_passes, grow_segments, hidden_states, is_compiled
from fast.logprobs import token_logprobs
from fast.packing import Pack, pack, unit_tokens
from fast.sampler import Decoder

__all__ = ["Decoder", "Pack", "agree_on_sizes", "compile_layers", "give_up_passes", "grow_segments", "hidden_states",
           "is_compiled", "pack", "token_logprobs", "unit_tokens", "unsupported"]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")  # transformers' model types that decoder.py writes out
ROPE_TYPES = (None, "default", "linear", "llama3", "yarn")  # whose scale does not depend on a sequence's length


def unsupported(config: dict) -> str | None:
    """Why this engine can't serve a model, from its config.json; None if it can."""
    text = config.get("text_config") or config
    kind, rope = text.get("model_type"), text.get("rope_scaling") or text.get("rope_parameters") or {}
    if kind not in ARCHITECTURES:
        return f"architecture {kind} (it knows {', '.join(ARCHITECTURES)})"
    if kind == "gemma3_text" and (reason := unsupported_in_gemma(text, inside=text is not config)):
        return reason
    if text.get("hidden_act", "silu") != "silu":
        return f"activation {text['hidden_act']}"
    for rope in [part for part in rope.values() if isinstance(part, dict)] or [rope]:  # Gemma: one per kind of layer
        if (rope_type := rope.get("rope_type", rope.get("type"))) not in ROPE_TYPES:
            return f"rotary positions of type {rope_type}"
    return None


def unsupported_in_gemma(config: dict, inside: bool) -> str | None:
    if inside:
        return "gemma3_text inside a model of text and images"
    if config.get("hidden_activation") != "gelu_pytorch_tanh":
        return f"activation {config.get('hidden_activation')}"
    if config.get("attn_logit_softcapping") or config.get("final_logit_softcapping"):
        return "logits that are capped"
    return "attention in both directions" if config.get("use_bidirectional_attention") else None
