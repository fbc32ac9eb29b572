"""Recorded passes: a decoder pass over packs of one size as one CUDA graph forward and one backward.

A decoder pass is some thousand kernels, which a GPU finishes sooner than a program can launch them. So a pass over
packs of one size is recorded, and from then on replayed.
"""
from __future__ import annotations

import contextlib
import os
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fast.decoder import decoder, stack_layers
from fast.packing import Pack, round_up

TOKENS_STEP = 256     # packs are padded to a multiple of it; of twice, four times it from 8,192, 16,384 tokens on
SEQUENCES_STEP = 16   # attention starts a block of threads for every 128 tokens that a sequence could have
LENGTH_STEP = 1024
WARM_UP_TOKENS = 1024  # the kernels that inductor chooses for fewer rows are others
SPARE_SEQUENCES = 4   # sequences, at least, that hold the padding tokens
RECORDING_COST = 8e12  # weights times tokens of a pass that takes as long as recording a size: 16,000 tokens at 0.5B


def compile_layers(base: nn.Module) -> None:
    """From now on, elementwise steps are compiled (a few small graphs, for packs of any size and for all layers) and
    passes over packs are recorded (CUDA). With RUNGS_COMPILE=0 in the environment, neither happens."""
    if os.environ.get("RUNGS_COMPILE", "1") != "0":
        grow_segments()
        stack_layers(base)
        base.__dict__["recordings"] = Recordings(base)


def is_compiled(base: nn.Module) -> bool:
    """Whether compile_layers has taken effect on this model."""
    return "recordings" in base.__dict__


def hidden_states(base: nn.Module, pack: Pack) -> Tensor:
    """Last hidden states of a pack, [T, H]; after compile_layers, by the recorded pass of its size where there can be
    one."""
    hidden = base.recordings.run(base, pack) if is_compiled(base) else None
    return decoder(base, pack, is_compiled(base)) if hidden is None else hidden


def agree_on_sizes(base: nn.Module, packs: Sequence[Pack], rank: int, ranks: int,
                   gather: Callable[[list], list]) -> None:
    """Recordings.agree, where passes are recorded."""
    if is_compiled(base):
        base.recordings.agree(packs, rank, ranks, gather)


def padded_tokens(tokens: int, part: int = 16) -> int:
    """To how many tokens a pack is padded: at most one part more, by default a sixteenth, where it has more than
    `part` times TOKENS_STEP."""
    return round_up(tokens, max(TOKENS_STEP, (1 << tokens.bit_length() - 1) // part))


class GraphSize(NamedTuple):
    """Size of a static pack, which other packs are copied into and which one recorded pass computes; or of a pack."""
    tokens: int
    sequences: int
    longest: int
    keys: int  # 0: for packs whose sequences share no tokens

    @classmethod
    def exact(cls, pack: Pack) -> GraphSize:
        """A pack's size, without padding."""
        return cls(pack.tokens, len(pack.examples), pack.max_length, 0 if pack.keys is None else len(pack.keys))

    def padded(self, tokens: int | None = None) -> GraphSize:
        """The smallest static size that holds a pack of this size. tokens: those it has; None: padded_tokens()."""
        tokens = tokens or padded_tokens(self.tokens)
        keys = self.keys and round_up(self.keys + tokens - self.tokens, tokens // 2)
        sequences = round_up(self.sequences + SPARE_SEQUENCES, SEQUENCES_STEP)
        longest_spare = max(tokens - self.tokens, keys - self.keys) // (sequences - self.sequences) + 2
        return GraphSize(tokens, sequences, round_up(max(self.longest, longest_spare), LENGTH_STEP), keys)

    def holds(self, exact: GraphSize) -> bool:
        """Can a pack of this exact size be copied into one of this size?"""
        if (exact.keys == 0) != (self.keys == 0):
            return False
        spare, padding = self.sequences - exact.sequences, self.tokens - exact.tokens
        key_padding = self.keys - exact.keys if self.keys else padding
        return 0 <= padding <= key_padding and spare >= SPARE_SEQUENCES \
            and max(exact.longest, key_padding // spare + 2) <= self.longest

    def empty(self, device) -> Pack:
        """A static pack of this size, for `fill`."""
        ids = torch.zeros(2, 1, self.tokens, dtype=torch.long, device=device)
        cu, cu_k = torch.zeros(2, self.sequences + 1, dtype=torch.int32, device=device)
        shared = (torch.arange(self.keys, device=device) % self.tokens, cu_k) if self.keys else ()
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        return Pack(*ids, cu, self.longest, *3 * [nothing], [], 0, *shared)


def fill(static: Pack, pack: Pack) -> None:
    """Copy a pack into a static one that holds it.

    Padding tokens and keys are dealt to the spare sequences, which nothing reads; each of these has at least as many
    keys as tokens, so that attention is defined, and all their gradients are 0.
    """
    tokens, begun = pack.tokens, len(pack.cu_seqlens)
    static.input_ids[:, :tokens].copy_(pack.input_ids)
    static.position_ids[:, :tokens].copy_(pack.position_ids)
    padding = static.tokens - tokens
    spare = torch.arange(1, 1 + len(static.cu_seqlens) - begun, device=static.cu_seqlens.device)
    ends = padding * spare // len(spare)
    static.cu_seqlens[:begun].copy_(pack.cu_seqlens)
    static.cu_seqlens[begun:].copy_(tokens + ends)
    if static.keys is not None:
        keys, key_padding = len(pack.keys), len(static.keys) - len(pack.keys) - padding
        static.keys[:keys].copy_(pack.keys)
        static.cu_seqlens_k[:begun].copy_(pack.cu_seqlens_k)
        static.cu_seqlens_k[begun:].copy_(keys + ends + key_padding * spare // len(spare))


def empty_pack_like(pack: Pack) -> Pack:
    """A pack without a sequence, on a pack's device: a static pack that it is copied into is padding alone."""
    empty, begin = pack.input_ids[:, :0], pack.cu_seqlens[:1]
    return Pack(empty, empty, begin, 0, *3 * [empty[0]], [], 0, keys=empty[0], cu_seqlens_k=begin)


def warm_up_size(size: GraphSize) -> GraphSize:
    """Size of the static pack that the first pass of a kind computes, without recording. It is small, because the very
    first one can't use the memory that the recorded ones will share."""
    return GraphSize(0, 0, 0, min(1, size.keys)).padded(WARM_UP_TOKENS)


class DecoderModule(nn.Module):
    """decoder() as a module, for torch.func."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def forward(self, pack: Pack) -> Tensor:
        return decoder(self.base, pack, compile=True)


class RecordedPass:
    """decoder() over packs of one size: a recorded forward and, if trained parameters take part, a recorded backward.

    The factors are cast all at once, into leaves of the pass's own: autograd ties a leaf to the stream it was first
    used on.
    """

    def __init__(self, base: nn.Module, static: Pack, gradient: Tensor | None):
        """gradient: where that of the trained parameters is written, if they take part."""
        self.static, self.gradient = static, gradient
        # not in the memory of the graphs: what stayed there would part the memory that later sizes could use
        self.hidden = torch.zeros(static.tokens, base.config.hidden_size, dtype=base.dtype, device=base.device)
        self.slope = None if gradient is None else torch.zeros_like(self.hidden)

    @torch.enable_grad()
    def run(self, base: nn.Module, flat: Tensor | None, forward: AbstractContextManager,
            backward: AbstractContextManager) -> None:
        """Hidden states and, of the trained parameters, flat, the gradient; each computed in a context of its own."""
        named = [] if flat is None else base.named_parameters()
        parts = {f"base.{name}": p for name, p in named if p.requires_grad}
        with forward:
            halves = flat.detach().to(base.dtype).split([p.numel() for p in parts.values()]) if parts else ()
            leaves = {name: h.view_as(p).requires_grad_() for (name, p), h in zip(parts.items(), halves)}
            hidden = torch.func.functional_call(DecoderModule(base), leaves, (self.static,), tie_weights=False)
            self.hidden.copy_(hidden.detach())
        if parts:
            with backward:
                grads = torch.autograd.grad(hidden, [*leaves.values()], self.slope, allow_unused=True,
                                            materialize_grads=True)
                self.gradient.copy_(torch.cat([g.flatten() for g in grads]))

    def warm_up(self, base: nn.Module, flat: Tensor | None) -> None:
        """Compute it once without recording: this compiles."""
        stream = Recordings.stream
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.empty_cache()  # what other streams keep would not be freed while memory comes from the graphs'
        with graph_memory():
            self.run(base, flat, torch.cuda.stream(stream), torch.cuda.stream(stream))
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, base: nn.Module, flat: Tensor | None) -> None:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.run(base, flat, *(torch.cuda.graph(graph, pool=Recordings.pool, stream=Recordings.stream)
                               for graph in (self.forward, self.backward)))
        Recordings.held += max(0, torch.cuda.memory_reserved() - before)


class Sentinel:
    """Alive while a backward pass is pending."""


class Replay(torch.autograd.Function):
    """Hidden states [T, H] of a pack by a recorded pass, as a function of the flat parameters. Its backward runs
    once."""

    @staticmethod
    def forward(ctx, recorded: RecordedPass, pack: Pack, flat: Tensor | None) -> Tensor:
        fill(recorded.static, pack)
        recorded.forward.replay()
        if ctx.needs_input_grad[2]:
            ctx.recorded, ctx.tokens, ctx.sentinel = recorded, pack.tokens, Sentinel()
            Recordings.pending = weakref.ref(ctx.sentinel)
        return recorded.hidden[:pack.tokens].clone()

    @staticmethod
    def backward(ctx, slope: Tensor):
        if ctx.sentinel is None:
            raise RuntimeError("a recorded pass has one backward: what a second one needs is overwritten")
        recorded = ctx.recorded
        recorded.slope[:ctx.tokens].copy_(slope)
        recorded.slope[ctx.tokens:].zero_()
        recorded.backward.replay()
        ctx.recorded = ctx.sentinel = None
        Recordings.pending = lambda: None
        return None, None, recorded.gradient  # autograd accumulates it before the next pass overwrites it


def grow_segments() -> None:
    """Let CUDA memory grow in place, unless the user has configured the allocator: else each size fragments the
    memory. What is allocated before, a model's weights, stays where it is."""
    if torch.cuda.is_available() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & {*os.environ}:
        change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        change = change or torch.cuda.memory._set_allocator_settings
        change("expandable_segments:True")


def graph_memory() -> AbstractContextManager:
    """What this thread allocates comes from the memory of the graphs, where there are any: between their replays it is
    free."""
    if not Recordings.alive:
        return contextlib.nullcontext()
    return torch.cuda.use_mem_pool(SimpleNamespace(id=Recordings.pool))  # a MemPool would have to outlive the graphs


def give_up_passes() -> None:
    """Free the memory of all recorded passes, for what comes after training. Those that are needed again are recorded
    again."""
    for recordings in Recordings.models:
        recordings.passes.clear()
    if not Recordings.alive:
        Recordings.held = 0
    torch.cuda.empty_cache()


class Recordings:
    """The recorded passes of a model, by size and by the adapters that take part in them."""
    pool = stream = None       # memory of all graphs: one pass at a time, forward and backward, needs it
    held = 0                   # its bytes
    models = weakref.WeakSet()
    alive = weakref.WeakSet()  # the passes; a pool is freed with its last graph
    pending = lambda: None     # the sentinel of the pass whose backward is still to come

    def __init__(self, base: nn.Module):
        Recordings.models.add(self)
        self.passes, self.kinds, self.gradient = {}, set(), None
        self.sizes, self.padded = set(), Counter()
        self.lora = None  # one of the layers with adapters; all have the same ones on
        self.worth = RECORDING_COST / max(1, sum(p.numel() for p in base.parameters()))  # tokens

    def choose(self, exact: GraphSize, ranks: int = 1) -> GraphSize:
        """The smallest recorded size that holds a pack of this exact size; the pack's padded size when padding so far
        has cost more than recording it would (ranks pad at the same time). In torch's deterministic mode it is always
        the padded size, since a resumed run hasn't recorded the same sizes as an uninterrupted one."""
        padded = exact.padded()
        recorded = () if torch.are_deterministic_algorithms_enabled() else self.sizes
        size = min((size for size in recorded if size.holds(exact)), default=padded)
        self.padded[padded] += (size.tokens - padded.tokens) / ranks
        if self.padded[padded] > self.worth:
            size = padded
        self.sizes.add(size)
        return size

    def size_for(self, pack: Pack) -> GraphSize:
        """The size that a pack is padded to. All passes over a pack use the same, so that they are rounded alike."""
        pack.graph_size = pack.graph_size or self.choose(GraphSize.exact(pack))
        self.sizes.update((pack.graph_size, *pack.recorded_with))
        return pack.graph_size

    def agree(self, packs: Sequence[Pack], rank: int, ranks: int, gather: Callable[[list], list]) -> None:
        """Choose the sizes of a step's packs, those of all ranks on every rank. Each rank then records all that are not
        recorded yet, also the other ranks': if ranks recorded at different steps, each would wait for the others every
        time. A rank without a pack in this step records later. gather: all ranks' lists end to end."""
        sizes = gather([(rank, GraphSize.exact(pack)) for pack in packs])
        sizes = [(source, self.choose(exact, ranks)) for source, exact in sizes]
        for pack, size in zip(packs, [size for source, size in sizes if source == rank]):
            pack.graph_size, pack.recorded_with = size, tuple(dict.fromkeys(size for _, size in sizes))

    def run(self, base: nn.Module, pack: Pack) -> Tensor | None:
        """Hidden states of a pack by the pass recorded for its size; None where only decoder() itself can."""
        lora = self.lora = self.lora or next((m for m in base.modules() if hasattr(m, "lora_A")), None)
        on = () if lora is None or lora.disable_adapters else tuple(lora.active_adapters)
        trained = bool(on) and lora.lora_A[on[0]].weight.requires_grad
        flat = base.__dict__.get("flat") if trained else None
        if not pack.input_ids.is_cuda or base.dtype == torch.float32 or trained and flat is None or \
                Recordings.pending() is not None:
            return None
        size = self.size_for(pack)
        for needed in (size, *pack.recorded_with):
            if (needed, on, trained) not in self.passes:
                self.record(base, pack if needed == size else empty_pack_like(pack), needed, on, trained, flat)
        return Replay.apply(self.passes[size, on, trained], pack, flat if torch.is_grad_enabled() else None)

    def record(self, base: nn.Module, pack: Pack, size: GraphSize, on: tuple[str, ...], trained: bool,
               flat: Tensor | None) -> None:
        """Record the pass over packs of this size with these adapters on."""
        if not Recordings.alive:
            Recordings.pool, Recordings.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            Recordings.held = 0
        if trained and self.gradient is None:
            self.gradient = torch.zeros_like(flat, requires_grad=False)

        def pass_over(pack: Pack, size: GraphSize) -> RecordedPass:
            static = size.empty(pack.input_ids.device)
            fill(static, pack)
            return RecordedPass(base, static, self.gradient if trained else None)
        if (on, trained) not in self.kinds:
            pass_over(empty_pack_like(pack), warm_up_size(size)).warm_up(base, flat)
            self.kinds.add((on, trained))
        recorded = pass_over(pack, size)
        recorded.record(base, flat)
        self.passes[size, on, trained] = recorded
        Recordings.alive.add(recorded)
