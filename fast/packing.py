"""Packs: sequences laid end to end in one forward, in which a prefix that they share is computed once."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fast.attention import check_shared_attention

if TYPE_CHECKING:
    from fast.graphs import GraphSize

# An example is anything with `ids` (token ids), `predict` (positions) and `targets` (the ids predicted there).
Example = Any


@dataclass
class Pack:
    """Sequences laid end to end: one forward, no padding between them.

    With `keys`, a prefix that sequences share is stored once: a sequence's stored tokens are those after the prefix
    that it shares with the sequence before it, and the prefix is where the earlier sequences stored it.
    """
    input_ids: Tensor      # [1, T]
    position_ids: Tensor   # [1, T], from 0 in each sequence
    cu_seqlens: Tensor     # [N + 1] int32, where the stored tokens of each sequence begin and end
    max_length: int        # at least the longest sequence, shared tokens included
    predict: Tensor        # [K] positions in T
    targets: Tensor        # [K] token ids
    counts: Tensor         # [N] predicted tokens of each sequence
    examples: list[int]    # [N] index of each sequence in the list that was packed
    attended: int          # pairs of a query and a key that it attends to
    keys: Tensor | None = None          # [L] positions in T of all tokens of each sequence, end to end
    cu_seqlens_k: Tensor | None = None  # [N + 1] int32, where sequences begin and end in `keys`
    graph_size: GraphSize | None = None  # the size that recorded passes pad it to
    recorded_with: tuple[GraphSize, ...] = ()  # sizes of all ranks' packs of this step (graphs.Recordings.agree)

    @property
    def rows(self) -> list[int]:
        """[K] index, in the list that was packed, of the example each predicted token belongs to."""
        return [i for i, n in zip(self.examples, self.counts.tolist()) for _ in range(n)]

    @property
    def last(self) -> Tensor:
        """[N] position in T of each sequence's last token."""
        if self.keys is None:
            return self.cu_seqlens[1:].long() - 1
        return self.keys[self.cu_seqlens_k[1:].long() - 1]

    @property
    def places(self) -> tuple[Tensor, ...]:
        """[N] positions in T of each sequence's tokens."""
        if self.keys is None:
            at = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
            return at.split(self.cu_seqlens.diff().tolist())
        return self.keys.split(self.cu_seqlens_k.diff().tolist())

    @property
    def tokens(self) -> int:
        """Tokens that a forward computes."""
        return self.input_ids.shape[1]

    def to(self, device) -> Pack:
        move = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.keys is not None and torch.device(device).type == "cuda":
            check_shared_attention(torch.device(device))
        return Pack(**{k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in move.items()})

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """[K] -> [N]: sums over each sequence's predicted tokens, in a fixed order (index_add on CUDA has none)."""
        # unsafe: without a check that waits for the GPU
        return torch.segment_reduce(values, "sum", lengths=self.counts, unsafe=True)


def pack(examples: Sequence[Example], micro_tokens: int, unit: int = 1, device="cpu", share: bool = True) -> list[Pack]:
    """Packs of at most `micro_tokens` tokens; each example is in exactly one of them.

    `unit` consecutive examples (a chosen/rejected pair: 2) stay together and in order. share: a prefix that examples
    (of one unit, if it has several) have in common is computed once per pack, where that saves enough or a unit
    would not fit otherwise; log-probabilities, scores and gradients stay the same.
    """
    bins = []
    if share:
        bins = even_fit(examples, micro_tokens, unit, share) if unit > 1 else sorted_fit(examples, micro_tokens)
    saved, whole = sum(shared for members in bins for _, shared in members), [e.ids for e in examples]
    if not bins or saved <= WORTH_SHARING * sum(map(len, whole)) and \
            max(unit_tokens(whole, unit, [0] * len(whole))) <= micro_tokens:
        bins = even_fit(examples, micro_tokens, unit)
    return [lay_out(examples, members).to(device) for members in bins]


def even_fit(examples: Sequence[Example], micro_tokens: int, unit: int = 1,
             share: bool = False) -> list[list[tuple[int, int]]]:
    """Bins of units of examples: uses the number of bins that first-fit decreasing finds, then balances them.

    Returns for each bin [(example, tokens it shares with the example before it in its unit)]. Balanced: a small pack
    takes as long as a larger one when kernel launches are the limit, and the largest pack decides peak memory.
    """
    sequences = [e.ids for e in examples]
    shared = shared_in_units(sequences, unit) if share else [0] * len(examples)
    units = [range(i, i + unit) for i in range(0, len(examples), unit)]
    size = dict(zip(units, unit_tokens(sequences, unit, shared)))
    order = sorted(units, key=lambda u: (-size[u], u[0]))
    bins: list[list] = []  # [tokens, units]
    for u in order:
        if size[u] > micro_tokens:
            raise ValueError(f"{size[u]} tokens that belong together don't fit into --micro-tokens {micro_tokens}")
        b = next((b for b in bins if b[0] + size[u] <= micro_tokens), None)
        if b is None:
            bins.append(b := [0, []])
        b[0] += size[u]
        b[1].append(u)
    balanced: list[list] = [[0, []] for _ in bins]
    for u in order:
        b = min(balanced, key=lambda b: b[0])
        b[0] += size[u]
        b[1].append(u)
    chosen = balanced if max((b[0] for b in balanced), default=0) <= micro_tokens else bins
    return [[(i, shared[i]) for u in members for i in u] for _, members in chosen]


WORTH_SHARING = 1 / 16  # of all tokens; below, copying keys costs more than the shared tokens do
KEYS_PER_TOKEN = 16     # average limit in a pack whose sequences share tokens: attention copies keys and values


def sorted_fit(examples: Sequence[Example], micro_tokens: int) -> list[list[tuple[int, int]]]:
    """Bins filled one after the other with the examples in the order of their ids, about equally full.

    Returns for each bin [(example, tokens it shares with the example before it)]. In that order an example shares more
    with its neighbours than with any other, so that a pack holds every common prefix once: a few-shot prompt of many
    questions, and inside it a question of many answers.
    """
    ids = [np.array(e.ids, dtype=">u4") for e in examples]  # big-endian: bytes sort as the numbers do
    order = sorted(range(len(ids)), key=lambda i: ids[i].tobytes())
    shared = {b: shared_length(ids[a], ids[b]) for a, b in zip(order, order[1:])}  # with the one before

    def filled(limit: int) -> list[list[tuple[int, int]]]:
        bins, tokens, keys = [], 0, 0
        for i in order:
            n, same = len(ids[i]), shared.get(i, 0)
            if not bins or tokens + n - same > limit or keys + n > KEYS_PER_TOKEN * micro_tokens:
                bins.append([])
                same = tokens = keys = 0
            bins[-1].append((i, same))
            tokens, keys = tokens + n - same, keys + n
        return bins
    if (longest := max(map(len, ids), default=0)) > micro_tokens:
        raise ValueError(f"{longest} tokens that belong together don't fit into --micro-tokens {micro_tokens}")
    bins = filled(micro_tokens)
    equal = sum(len(ids[i]) - same for members in bins for i, same in members) // max(len(bins), 1)
    limits = range(max(equal, longest), micro_tokens, micro_tokens // 32 + 1)
    return next((even for even in map(filled, limits) if len(even) == len(bins)), bins)


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of a and b."""
    n = min(len(a), len(b))
    unequal = a[:n] != b[:n]
    return int(unequal.argmax()) if unequal.any() else n


def shared_in_units(sequences: Sequence[Sequence[int]], unit: int) -> list[int]:
    """For each sequence, the length of its common prefix with the one before it; 0 for the first of each unit."""
    arrays = [as_array(s) for s in sequences]
    return [shared_length(arrays[i - 1], arrays[i]) if i % unit else 0 for i in range(len(arrays))]


def unit_tokens(sequences: Sequence[Sequence[int]], unit: int, shared: Sequence[int] | None = None) -> list[int]:
    """Tokens of each unit of consecutive sequences, what they share (by default shared_in_units) counted once."""
    shared = shared_in_units(sequences, unit) if shared is None else shared
    new = [len(s) - n for s, n in zip(sequences, shared)]
    return [sum(new[i:i + unit]) for i in range(0, len(new), unit)]


def as_array(values: Sequence[int]) -> np.ndarray:
    """A list of ints as an array; several times as fast as np.array or torch.tensor."""
    return np.fromiter(values, np.int64, len(values))


def lay_out(examples: Sequence[Example], members: Sequence[tuple[int, int]]) -> Pack:
    """A pack of [(example, how many of its first tokens are those of the example before it)]."""
    ids, position, cu, predict, targets, places, attended = [], [], [0], [], [], [np.arange(0)], 0
    for i, shared in members:
        e, n, start = examples[i], len(examples[i].ids), cu[-1]
        ids.append(as_array(e.ids[shared:]))
        position.append(np.arange(shared, n))
        cu.append(start + n - shared)
        places.append(np.concatenate([places[-1][:shared], np.arange(start, cu[-1])]))
        predict.append(places[-1][as_array(e.predict)])
        targets.append(as_array(e.targets))
        attended += (n - shared) * (n + shared + 1) // 2
    lengths = [len(p) for p in places]
    keys = {"keys": torch.from_numpy(np.concatenate(places)),
            "cu_seqlens_k": torch.tensor(np.cumsum(lengths), dtype=torch.int32)} if any(n for _, n in members) else {}
    ids, position, predict, targets = (torch.from_numpy(np.concatenate(parts))
                                       for parts in (ids, position, predict, targets))
    return Pack(ids[None], position[None], torch.tensor(cu, dtype=torch.int32), 1 << (max(lengths) - 1).bit_length(),
                predict, targets, torch.tensor([len(examples[i].targets) for i, _ in members]), [i for i, _ in members],
                attended, **keys)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
