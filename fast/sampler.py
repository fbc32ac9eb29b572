"""Decoding of many rows: plain weights with the adapter's factors beside them, a cache that stays allocated, recorded
graphs of a step and of the pass over prompts."""
from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel

from fast.attention import packed_attention
from fast.decoder import (add_norm, compiled, dequantized, gate_of, low_rank, norm_of, norms_of, rms_norm, rotations,
                          split_heads)
from fast.graphs import GraphSize, Recordings, fill, padded_tokens
from fast.packing import Pack, pack, round_up


# A layer is two pure functions with attention between them. Prompts are packed and attend to themselves; decoding
# attends to the cache.

class Projection(NamedTuple):
    """Linear layers of one input as one product; the rows of an adapter's A stand below those of W."""
    weight: Tensor             # [out + r, in]
    bias: Tensor | None        # [out + r]
    b: Tensor | None = None    # Bᵀ [r, out], times alpha/r; None: no adapter, r = 0


class Layer(NamedTuple):
    """Weights of a decoder layer."""
    input_norm: Tensor         # [H]
    qkv: Projection            # [(heads + 2 kv) d, H]
    q_norm: Tensor | None      # [d], Qwen3 and Gemma
    k_norm: Tensor | None      # [d]
    o: Projection              # [H, heads d]
    attention_norm: Tensor | None  # [H], of what attention adds: Gemma
    post_norm: Tensor          # [H], of the MLP's input
    gate_up: Projection        # [2 I, H]
    down: Projection           # [H, I]
    mlp_norm: Tensor | None    # [H], of what the MLP adds: Gemma
    heads: int
    kv_heads: int
    eps: float
    scale: float               # of a query's product with a key
    kind: int                  # in Decoder.kinds


class Kind(NamedTuple):
    """What layers of one kind share: rotary positions, and how many tokens a query sees (None: all)."""
    cos: Tensor                # [positions, d]
    sin: Tensor
    window: int | None


def project(x: Tensor, p: Projection) -> Tensor:
    """x Wᵀ + bias + alpha/r (x Aᵀ) Bᵀ: [T, in] -> [T, out]."""
    return with_low_rank(F.linear(x, p.weight, p.bias), p)


def with_low_rank(y: Tensor, p: Projection) -> Tensor:
    """Add the adapter's low-rank term to a product: y = [x Wᵀ + bias | x Aᵀ] [T, out + r] -> [T, out]."""
    if p.b is None:
        return y
    out = p.b.shape[1]
    # Not addmm, which copies its first operand; where this is compiled, the sum is fused into what follows.
    return y[:, :out] + y[:, out:] @ p.b


def after_norm(y: Tensor, stream, p: Projection, eps: float) -> Tensor:
    """The projection of a stream's RMSNorm (kernels.Stream), [T, out], from the product y = [x Wᵀ | x Aᵀ] of the stream x
    times the norm's weight."""
    y = with_low_rank(y, p)
    y = (y * torch.rsqrt(stream.squares.sum(-1, keepdim=True) / stream.x.shape[1] + eps)).to(y.dtype)
    return y if p.bias is None else y + p.bias[:y.shape[1]]


def queries_keys_values(qkv: Tensor, w: Layer, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Split a projection [T, (heads + 2 kv) d] into heads, apply the norms of q and k (if there are any) and the rotary
    positions cos, sin [T, 1, d]: queries [T, heads, d], keys and values [T, 2, kv, d]."""
    norms = () if w.q_norm is None else ((w.q_norm, w.eps), (w.k_norm, w.eps))
    q, k, v = split_heads(qkv, w.heads, w.kv_heads, norms, cos, sin)
    return q, torch.stack([k, v], 1)


def attention_in(x: Tensor, update: Tensor, w: Layer, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The residual stream x + update [T, H], queries, and keys and values."""
    x, h = add_norm(x, update, (w.input_norm, w.eps))
    return x, *queries_keys_values(project(h, w.qkv), w, cos, sin)


def attention_out(x: Tensor, attended: Tensor, w: Layer, gate: Callable) -> tuple[Tensor, Tensor]:
    """The stream after attention [T, H], and what the MLP adds to it; attended [T, heads d]."""
    update_norm = None if w.attention_norm is None else (w.attention_norm, w.eps)
    x, h = add_norm(x, project(attended, w.o), (w.post_norm, w.eps), update_norm)
    update = project(gate(project(h, w.gate_up)), w.down)
    return x, update if w.mlp_norm is None else rms_norm(update, w.mlp_norm, w.eps)


# One decoding step of B rows. Row b has the slots b·stride, b·stride + 1, … of the cache [slots, 2, kv, d], one per
# token.


def decode_begin(token: Tensor, start: Tensor, position: Tensor, columns: Tensor, embedding: Tensor, scale: float,
                 first_slot: Tensor, kinds: Sequence[Kind]) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """For the tokens to feed [B]: embeddings [B, H], slots [B], and of each kind of layer cos and sin [B, 1, d] and the
    attention mask [B, 1, 1, L].

    Token `position` of a completion is chosen by feeding the one before it, which stands at start + position of its
    row. columns: arange(L), the tokens of a row that attention looks at. A row that has ended stays within them. scale:
    of the embeddings.
    """
    x, at, places = F.embedding(token, embedding) * scale, torch.minimum(start + position, columns[-1]), []
    for kind in kinds:
        visible = columns <= at[:, None]                                                        # [B, L]
        if kind.window:
            visible &= columns > at[:, None] - kind.window
        mask = torch.where(visible, 0.0, -math.inf).to(x.dtype)
        places.append((kind.cos[at][:, None], kind.sin[at][:, None], mask[:, None, None]))
    return x, first_slot + at, places


def decode_in(x: Tensor, update: Tensor, w: Layer, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor):
    """attention_in, with the new keys and values written into the cache."""
    x, q, kv = attention_in(x, update, w, cos, sin)
    cache[slots] = kv
    return x, q


def attend(q: Tensor, cache: Tensor, stride: int, mask: Tensor, scale: float) -> Tensor:
    """Attention of one query per row over its slots, [B, heads d]; query heads that share keys are one short
    sequence."""
    (rows, heads, d), length, kv_heads = q.shape, mask.shape[-1], cache.shape[2]
    k, v = cache[:rows * stride].view(rows, stride, 2, kv_heads, d)[:, :length].permute(2, 0, 3, 1, 4)  # [B, kv, L, d]
    # cuDNN would plan anew for every length
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(q.view(rows, kv_heads, -1, d), k, v, attn_mask=mask, scale=scale)
    return out.reshape(rows, heads * d)


def decode_end(x: Tensor, update: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    return rms_norm(x + update, *norm)


@functools.cache  # asked at every refresh
def has_triton() -> bool:
    """Are Triton and the C compiler that it needs installed?"""
    compilers = map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang"))
    return any(compilers) and importlib.util.find_spec("triton") is not None


class Beginning(NamedTuple):
    """A prompt without its last token, as `pack` takes it: nothing in it is predicted."""
    ids: Sequence[int]
    predict: tuple = ()
    targets: tuple = ()


class Prompts(NamedTuple):
    """A pack of prompts, and where their keys and values go: those of token source[i] into slot slots[i]."""
    pack: Pack
    source: Tensor
    slots: Tensor


class Decoder:
    """Token by token decoding for common.Sampler: the same interface as common.PlainDecoder.

    It samples from the policy that is trained: `refresh` fuses each layer's q/k/v and gate/up weights and puts the
    factors of the active adapter beside them, cast as the trainer's forward casts them. They are never merged: a merge
    into bfloat16 rounds most of a small update away. choose: the rule that picks a token, common.choose; note: prints
    a line. compile: fuse the elementwise parts of a step where the kernels don't run (CUDA), which takes seconds that
    a short job doesn't recover.

    A step, and a pass over prompts, are some hundred kernels, which a GPU finishes sooner than a program can launch
    them; so on CUDA both are recorded as graphs, for a few sizes.
    """
    READBACK = 16            # steps between two readbacks of the sampled tokens
    LENGTH_BUCKET = 128      # lengths of the cache and of attention are multiples of it
    PREFILL_TOKENS = 8192    # prompt tokens per forward
    RANK_STEP = 16           # ranks are padded to multiples of it

    def __init__(self, base: nn.Module, choose: Callable, note: Callable[[str], Any], compile: bool = True):
        self.choose, self.note, self.noted = choose, note, False
        self.weights: dict[str, Tensor] = {}  # the fused weights
        self.made_of: dict[str, tuple] = {}   # and what they were computed from
        self.addresses: list = []             # of all tensors that graphs read
        self.layers: list[Layer] = []
        self.release()
        self.refresh(base)
        self.compile = compile and self.device.type == "cuda"

    def release(self) -> None:
        """Give the cache and the graphs back; the next `begin` makes new ones."""
        self.cache: list[Tensor] = []       # per layer: [slots, 2, kv, d]
        self.graphs: dict[tuple, Any] = {}  # by (rows, length, stride, kind) of a step, or by size of a pack of prompts
        self.static_prompts: dict[tuple, Prompts] = {}  # by size: what recorded passes over prompts read
        self.rows = 0                       # rows that the buffers of a step hold

    # -- weights

    @torch.no_grad()
    def refresh(self, base: nn.Module) -> None:
        """Take over the policy's weights as they are now, in place: captured graphs stay valid.

        Tensors that no adapter touches (embeddings, norms, LM head) are shared with the model. A base weight that was
        changed in place through `.data` isn't noticed: assign it, or change it under no_grad.
        """
        self.config, body, self.computed = base.config, base.base_model, 0
        self.embedding, self.head = body.embed_tokens.weight, base.get_output_embeddings()
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.gate, self.norm = gate_of(self.config), (self._norm("norm", body.norm), self.config.rms_norm_eps)
        # in fp32, attention over a pack reads its lengths on the host, which a graph can't
        self.records_prompts = self.device.type == "cuda" and self.dtype != torch.float32
        scale = getattr(body.embed_tokens, "embed_scale", None)
        self.embedding_scale = 1.0 if scale is None else scale.to(self.dtype).item()
        if not self.layers:
            self.columns = torch.arange(round_up(self.config.max_position_embeddings, self.LENGTH_BUCKET),
                                        device=self.device)
            kinds = [Kind(*table, getattr(layer.self_attn, "sliding_window", None)) for layer, table
                     in zip(body.layers, rotations(body, self.embedding, self.columns[None]))]
            keys = [(id(kind.cos), kind.window) for kind in kinds]
            distinct = dict(zip(keys, kinds))
            self.kinds, self.kind_of = list(distinct.values()), [[*distinct].index(key) for key in keys]
        self.layers, copies = [], []  # copies: (target, factor, scale) of an adapter's factors
        fuse = functools.partial(self._fuse, copies)
        for i, layer in enumerate(body.layers):
            attention, mlp = layer.self_attn, layer.mlp
            names = "input_norm", "attention_norm", "post_norm", "mlp_norm", "q_norm", "k_norm"
            modules = *norms_of(layer), getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
            self.layers.append(Layer(
                **{name: module and self._norm(f"{i}.{name}", module) for name, module in zip(names, modules)},
                qkv=fuse(f"{i}.qkv", attention.q_proj, attention.k_proj, attention.v_proj),
                o=fuse(f"{i}.o", attention.o_proj), down=fuse(f"{i}.down", mlp.down_proj),
                gate_up=fuse(f"{i}.gate_up", mlp.gate_proj, mlp.up_proj),
                heads=self.config.num_attention_heads, kv_heads=self.config.num_key_value_heads,
                eps=self.config.rms_norm_eps, scale=attention.scaling, kind=self.kind_of[i]))
        if copies:
            targets, factors, scales = zip(*copies)
            torch._foreach_copy_(targets, torch._foreach_mul([f.float() for f in factors], scales))
        tensors = torch.utils._pytree.tree_leaves([self.layers, self.norm, self.embedding])
        addresses = [self.head, *(t.data_ptr() for t in tensors if isinstance(t, Tensor))]
        if addresses != self.addresses:  # graphs hold addresses; these are another model's
            self.addresses, self.graphs = addresses, {}
        self.kernels = self._choose_kernels()

    def _choose_kernels(self):
        """fast.kernels, or None: the torch path. RUNGS_KERNELS=1 and 0 decide; without it they run in bfloat16 on a GPU
        from Ampere on, where Triton is installed and they serve the model."""
        on_gpu = self.device.type == "cuda"
        default = on_gpu and self.dtype == torch.bfloat16 and torch.cuda.get_device_capability(self.device) >= (8, 0)
        runs = on_gpu or os.environ.get("TRITON_INTERPRET") == "1"
        wanted = os.environ.get("RUNGS_KERNELS", str(int(default))) == "1"
        if not (wanted and runs and has_triton()):
            return None
        from fast import kernels
        return None if kernels.unsupported(self.config) else kernels

    def _norm(self, name: str, module: nn.Module) -> Tensor:
        """An RMSNorm's factor: the module's own weight, or what is computed of it (Gemma)."""
        weight = norm_of(module)[0]
        return weight if weight is module.weight else self._store(name, [module.weight], None, lambda: [weight])

    def _fuse(self, copies: list[tuple[Tensor, Tensor, float]], name: str, *modules: nn.Module) -> Projection:
        """Linear layers (plain, NF4, with or without LoRA) as one projection in the compute dtype. An adapter's factors
        have their places in it, and are added to `copies`, for refresh to copy all at once."""
        bases, adapters = [getattr(m, "base_layer", m) for m in modules], [low_rank(m) for m in modules]
        # of each module; zeros fill up a smaller rank, so that rows are aligned and the kernels know where each begins
        rank = round_up(max(sum(len(a) for _, a, _ in factors) for factors in adapters), self.RANK_STEP)
        layout, ranks = [[len(a) for _, a, _ in factors] for factors in adapters], rank * len(modules)
        weights, biases, bias, b = [m.weight for m in bases], [m.bias for m in bases], None, None
        if len(modules) == 1 and not rank and weights[0].dtype == self.dtype:
            weight = weights[0]
        else:  # [W1; W2; …; A1; A2; …], and B1ᵀ, B2ᵀ, … as blocks on a diagonal
            out, inner = sum(m.out_features for m in modules), modules[0].in_features
            zeros = functools.partial(torch.zeros, dtype=self.dtype, device=self.device)
            weight = self._store(f"{name} {rank}", weights, layout, lambda: [
                *(dequantized(w).to(self.dtype) for w in weights), zeros(ranks, inner)])
            b = self._store(f"{name}.b {rank}", [], layout, lambda: [zeros(ranks, out)]) if rank else None
            column = 0
            for i, (m, factors) in enumerate(zip(modules, adapters)):
                row = i * rank
                for scale, factor_a, factor_b in factors:
                    size = len(factor_a)
                    copies.append((weight[out + row:][:size], factor_a, 1.0))
                    copies.append((b[row:row + size, column:column + m.out_features].T, factor_b, scale))
                    row += size
                column += m.out_features
        if biases[0] is not None:
            bias = self._store(f"{name}.bias {rank}", biases, None, lambda: [*biases, biases[0].new_zeros(ranks)])
        return Projection(weight, bias, b)

    def _store(self, name: str, sources: Sequence[Tensor], layout: Any, parts: Callable[[], Sequence[Tensor]]) -> Tensor:
        """parts() concatenated, in the memory that the first call for this name allocated. Computed again only if one of
        `sources`, which they are made of, was replaced or changed in place, or the layout (the adapters' ranks) differs."""
        state = layout, [(id(t), StorageWeakRef(t.untyped_storage()), t._version) for t in sources]
        if name not in self.weights or self.made_of[name][0] != state:
            self.weights[name] = torch.cat(tuple(parts()), out=self.weights.get(name))
            self.made_of[name] = state, sources  # kept alive, so that their ids are not reused
        return self.weights[name]

    # -- memory

    def _bucket(self, rows: int) -> int:
        """Rows that a step runs for: on CUDA a graph for 8, 16, … 256, 384, …; on a CPU as many as there are."""
        if self.device.type != "cuda":
            return rows
        return max(8, 1 << (rows - 1).bit_length()) if rows <= 256 else round_up(rows, 128)

    def _free_memory(self) -> float:
        """Bytes that a batch may take: 40 % of free GPU memory (training needs its share), less where more than two
        evaluations share the GPU (RUNGS_GPU_SHARED, how many), 2 GiB on a CPU. In torch's deterministic mode 20 % of
        all of it, whatever else runs there."""
        if self.device.type != "cuda":
            return 2 << 30
        free, most = torch.cuda.mem_get_info(self.device)
        most *= torch.cuda.get_per_process_memory_fraction(self.device)
        if torch.are_deterministic_algorithms_enabled():
            return 0.2 * most
        # torch's own reserve, without that of recorded passes
        reserved, allocated = torch.cuda.memory_reserved(self.device), torch.cuda.memory_allocated(self.device)
        reserve = max(0, reserved - allocated - Recordings.held)
        share = min(0.4, 0.8 / int(os.environ.get("RUNGS_GPU_SHARED", 1)))
        return share * (min(free, most - reserved) + reserve + sum(c.nbytes for c in self.cache))

    def _batch_size(self, rows: int, length: int, most: int) -> int:
        """How many of the rows, of at most this length, go into one batch: what fits, at most `most`."""
        head = self.kinds[0].cos.shape[1]
        row = 2 * self.config.num_key_value_heads * head * self.dtype.itemsize * len(self.layers) * length
        row += 24 * self.config.vocab_size  # logits, and the temporaries of choosing a token
        fit = self._free_memory() // row
        return next(n for n in range(min(rows, most), 0, -1) if self._bucket(n) <= fit or n == 1)

    def _reserve(self, rows: int, stride: int) -> None:
        """Buffers for this many rows of `stride` slots; those of an earlier call when they are large enough."""
        slots = len(self.cache[0]) if self.cache else 0
        if rows <= self.rows and rows * stride <= slots:
            return
        rows, slots = max(rows, self.rows), max(rows * stride, slots)
        self.release()  # before the new ones are made
        self.rows, shape = rows, (slots, 2, self.config.num_key_value_heads, self.kinds[0].cos.shape[1])
        new = functools.partial(torch.zeros, device=self.device)  # not empty: 0 times a NaN is NaN
        self.cache = [new(shape, dtype=self.dtype) for _ in self.layers]
        self.token, self.start, self.first_slot, self.key = (new(rows, dtype=torch.long) for _ in range(4))
        self.position, self.seed = (new((), dtype=torch.long) for _ in range(2))
        self.temperature, self.top_p = new(()), new((), dtype=torch.float64)
        self.ids, self.logprobs = new(self.READBACK, rows, dtype=torch.long), new(self.READBACK, rows)

    # -- decoding

    def batches(self, prompts: Sequence[Sequence[int]], budgets: Sequence[int], most: int) -> Iterator[list[int]]:
        """Indices of the prompts of each batch: the longest first, as many as memory holds, at most `most`."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]) - budgets[i], i))
        while order:
            longest = round_up(len(prompts[order[0]]) + budgets[order[0]], self.LENGTH_BUCKET)
            size = self._batch_size(len(order), longest, most)
            if size < min(len(order), most) and not self.noted:
                self.noted = True
                self.note(f"note: memory for {size} of {len(order)} rows of {longest} tokens at a time; sampling in "
                          f"several batches")
            yield order[:size]
            order = order[size:]

    @torch.no_grad()
    def begin(self, prompts: dict[int, Sequence[int]], keys: dict[int, int], longest: int, temperature: float,
              top_p: float, seed: int) -> None:
        """Start a batch: fill the cache with its prompts. keys: the key of each prompt's noise; longest: maximum
        tokens of a row, prompt and completion."""
        rows, self.stride = len(prompts), round_up(longest, self.LENGTH_BUCKET)
        self._reserve(self._bucket(rows), self.stride)
        self.temperature.fill_(temperature or 1.0)
        self.top_p.fill_(top_p)
        self.seed.fill_(seed)
        self.kind = "greedy" if temperature == 0 else "sample" if top_p == 1 else "nucleus"
        self._prefill(list(prompts.values()))
        for buffer, values in ((self.token, [p[-1] for p in prompts.values()]), (self.key, [keys[i] for i in prompts]),
                               (self.start, [len(p) - 1 for p in prompts.values()])):
            buffer[:rows] = torch.tensor(values, device=self.device)
        self.first_slot.copy_(self.stride * torch.arange(self.rows))
        self.position.zero_()
        self.row_of, self.size = {i: row for row, i in enumerate(prompts)}, self._bucket(rows)
        self.lengths, self.length = {i: len(p) for i, p in prompts.items()}, self.stride

    @torch.no_grad()
    def advance(self, live: Sequence[int], most: int) -> dict[int, tuple[list[int], list[float]]]:
        """The next tokens of the prompts that go on, at most `most` of each: {prompt: (token ids,
        log-probabilities)}."""
        self.row_of = {i: self.row_of[i] for i in live}
        if self._bucket(len(live)) < self.size:
            self._compact(self._bucket(len(live)))
        steps = min(self.READBACK, most)
        self.length = min(self.stride, round_up(max(self.lengths[i] for i in live) + steps, self.LENGTH_BUCKET))
        step = self._program(self.size, self.length, self.stride, self.kind)
        for _ in range(steps):
            step()
        tokens, logprobs = (buffer[:steps, :self.size].T.tolist() for buffer in (self.ids, self.logprobs))
        self.computed += steps * self.size
        for i in live:
            self.lengths[i] += steps
        return {i: (tokens[row], logprobs[row]) for i, row in self.row_of.items()}

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Fill the cache with each prompt except its last token, which the first step feeds. Equal prompts are computed
        once, and so is a prefix that prompts of one pack share (`pack` decides which)."""
        groups: dict[tuple, list[int]] = {}
        for row, p in enumerate(prompts):
            if len(p) > 1:
                groups.setdefault(tuple(p[:-1]), []).append(row)
        members, longest = list(groups.values()), max(map(len, groups), default=0)
        for part in pack([Beginning(p) for p in groups], max(self.PREFILL_TOKENS, longest)):
            source, slots = [], []
            for e, places in zip(part.examples, part.places):  # a token's slots: one in each row of the group
                first = torch.tensor(members[e])[:, None] * self.stride
                source.append(places.repeat(len(first)))
                slots.append((first + torch.arange(len(places))).flatten())
            packed = Prompts(part, torch.cat(source), torch.cat(slots))
            if self.records_prompts and part.tokens <= self.PREFILL_TOKENS:
                self._compute_padded(packed)
            else:
                self._compute_prompts(Prompts(*(x.to(self.device) for x in packed)))

    def _compute_padded(self, prompts: Prompts) -> None:
        """_compute_prompts, padded to one of a few sizes. It is recorded when its size comes for the second time;
        recorded or not, the same kernels run."""
        exact, count = GraphSize.exact(prompts.pack), len(prompts.slots)
        size, slots = exact.padded(padded_tokens(exact.tokens, part=4)), padded_tokens(count, part=4)
        key = "prompts", size, slots
        seen = key in self.static_prompts
        if not seen:
            zeros = torch.zeros(2, slots, dtype=torch.long, device=self.device)
            self.static_prompts[key] = Prompts(size.empty(self.device), *zeros)
        static, entries = self.static_prompts[key], torch.arange(slots) % count  # the padding repeats earlier entries
        fill(static.pack, prompts.pack.to(self.device))
        static.source.copy_(prompts.source[entries])
        static.slots.copy_(prompts.slots[entries])
        compute = functools.partial(self._compute_prompts, static)
        (self._recorded(key, compute) if seen else compute)()

    def _compute_prompts(self, prompts: Prompts) -> None:
        """Compute prompts, and write their keys and values into the cache."""
        part, source, slots = prompts
        rotation = [[table[part.position_ids[0]][:, None] for table in (kind.cos, kind.sin)] for kind in self.kinds]
        x = F.embedding(part.input_ids[0], self.embedding) * self.embedding_scale                # [T, H]

        def attend_prompts(q: Tensor, kv: Tensor, w: Layer, cache: Tensor) -> Tensor:
            cache[slots] = kv[source]
            return packed_attention(q, *kv.unbind(1), part.cu_seqlens, part.max_length, w.scale, part.keys,
                                    part.cu_seqlens_k, self.kinds[w.kind].window).flatten(1)
        if self.kernels:
            stream = self.kernels.begin(x, self.layers[0].input_norm)
            self._layers_by_kernels(stream, lambda qkv, stream, w, cache: attend_prompts(*queries_keys_values(
                after_norm(qkv, stream, w.qkv, w.eps), w, *rotation[w.kind]), w, cache))
        else:
            update = torch.zeros_like(x)
            for w, cache in zip(self.layers, self.cache):
                x, q, kv = attention_in(x, update, w, *rotation[w.kind])
                x, update = attention_out(x, attend_prompts(q, kv, w, cache), w, self.gate)

    def _compact(self, size: int) -> None:
        """Move the live rows beyond `size` into rows below it that have ended."""
        used = set(self.row_of.values())
        moving = [i for i, row in self.row_of.items() if row >= size]
        holes = [row for row in range(size) if row not in used][:len(moving)]
        old, new = (torch.tensor(rows, dtype=torch.long, device=self.device)
                    for rows in ([self.row_of[i] for i in moving], holes))
        for buffer in (self.token, self.start, self.key):
            buffer[new] = buffer[old]
        for cache in self.cache:
            by_row = cache[:len(cache) // self.stride * self.stride].unflatten(0, (-1, self.stride))
            by_row[new, :self.length] = by_row[old, :self.length]
        self.row_of.update(zip(moving, holes))
        self.size = size

    def _program(self, size: int, length: int, stride: int, kind: str) -> Callable[[], Any]:
        """A step for this many rows over this much of the cache."""
        key = (size, length, stride, kind)
        return self._recorded(key, functools.partial(self._step, *key), (self.token, self.position))

    def _recorded(self, key: tuple, function: Callable[[], Any], changed: Sequence[Tensor] = ()) -> Callable[[], Any]:
        """On CUDA the replay of the function's graph, captured at the first call for this key; on a CPU the function.
        changed: tensors that it reads and changes, which capturing must leave as they are."""
        if self.device.type != "cuda":
            return function
        if key not in self.graphs:
            before = [(t, t.clone()) for t in changed]
            function()  # compiles and loads kernels; capturing itself runs nothing
            graph, pool = torch.cuda.CUDAGraph(), next((g.pool() for g in self.graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool):
                function()
            for t, value in before:
                t.copy_(value)
            self.graphs[key] = graph
        return self.graphs[key].replay

    def _step(self, size: int, length: int, stride: int, kind: str) -> None:
        """Feed each row its token and choose the next: into the buffers, for the next step and for the readback."""
        fed, start = self.token[:size], self.start[:size]
        if self.kernels:
            stream, at = self.kernels.embed(fed, self.embedding, self.layers[0].input_norm, start, self.position,
                                            length)
            h = self._layers_by_kernels(stream, lambda qkv, stream, w, cache: self.kernels.attend(
                qkv, w.qkv.bias, w.qkv.b, stream, w.q_norm, w.k_norm, w.eps, *self.kinds[0][:2], at, cache, stride,
                length))
        else:
            h = self._layers(*self._fused(decode_begin)(
                fed, start, self.position, self.columns[:length], self.embedding, self.embedding_scale,
                self.first_slot[:size], self.kinds), stride)
        logits = self.head(h)
        noise = (None, None, None) if kind == "greedy" else (self.seed, self.key[:size], self.position)
        if kind == "nucleus":  # it needs a sort
            pick, top_p = self.choose, self.top_p
        else:
            pick, top_p = self.kernels.choose if self.kernels else self._fused(self.choose), None
        token, logprob = pick(logits, self.temperature, *noise, top_p)
        at = (self.position % self.READBACK)[None]
        self.ids[:, :size].index_copy_(0, at, token[None])
        self.logprobs[:, :size].index_copy_(0, at, logprob[None])
        self.token[:size] = token
        self.position += 1

    def _fused(self, function: Callable) -> Callable:
        """The function with its elementwise parts fused, if this decoder compiles."""
        return compiled(function) if self.compile else function

    def _layers(self, x: Tensor, slots: Tensor, places: Sequence[tuple], stride: int) -> Tensor:
        """The decoder's layers over one token per row, in torch: embeddings -> last hidden states, [B, H]."""
        enter, leave, end = map(self._fused, (decode_in, attention_out, decode_end))
        update = torch.zeros_like(x)
        for w, cache in zip(self.layers, self.cache):
            cos, sin, mask = places[w.kind]
            x, q = enter(x, update, w, cos, sin, cache, slots)
            x, update = leave(x, attend(q, cache, stride, mask, w.scale), w, self.gate)
        return end(x, update, self.norm)

    def _layers_by_kernels(self, stream, attend: Callable[..., Tensor]) -> Tensor:
        """The decoder's layers with the kernels of fast/kernels.py: the stream of T embeddings (kernels.Stream), which
        is overwritten -> last hidden states after the final norm, [T, H]. T: one token per row, or the packed tokens of
        prompts.

        attend(qkv, stream, layer, its cache) returns attention's result [T, heads d]. qkv: [x Wᵀ | x Aᵀ] of the stream x
        times the norm's weight, without the norm's factor and the bias.
        """
        kernels, norms = self.kernels, [*(w.input_norm for w in self.layers[1:]), self.norm[0]]
        for w, cache, next_norm in zip(self.layers, self.cache, norms):
            attended = attend(F.linear(stream.weighted, w.qkv.weight), stream, w, cache)
            stream = kernels.add(stream, F.linear(attended, w.o.weight, w.o.bias), w.o.b, w.post_norm)
            gated = kernels.swiglu(F.linear(stream.weighted, w.gate_up.weight), w.gate_up.b, stream, w.eps)
            stream = kernels.add(stream, F.linear(gated, w.down.weight, w.down.bias), w.down.b, next_norm)
        # the last norm has no product after it whose kernel could apply its factor
        weight, eps = self.norm
        return F.rms_norm(stream.x, weight.shape, weight, eps)
