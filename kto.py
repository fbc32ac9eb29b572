"""KTO: Kahneman-Tversky optimisation of an SFT policy on single answers that are desirable or not, with LoRA.

    ρ    = log π_θ(y|x) − log π_ref(y|x)
    z0   = max(0, mean over the step of log π_θ(y'|x) − log π_ref(y'|x)),   y' the answer to another prompt, no gradient
    L(θ) = mean over the step's rows of  λ_D (1 − σ(β(ρ − z0))) where y is desirable,
                                         λ_U (1 − σ(β(z0 − ρ))) where it is not

Paper: Ethayarajh et al. 2024 (2402.01306), eq. 8, and the estimate of z0 below it; the weights λ: eq. 9. In symbols:
x the prompt, y its answer, π_θ the policy, π_ref the reference (base + SFT). log π(y|x) is the sum over the answer's
tokens, EOS included. z0, an estimate of the KL from the reference, is the point from which gains and losses are
measured: a desirable answer gains only by how far its ρ exceeds z0. Reference implementation: ContextualAI/HALOs.

Public implementations differ in z0. Here:
  - z0 is not computed from the pairs (x, y) of the loss. The step's answers are rotated by one, and no resulting pair
    may be a true one. A prompt occurs at most once per step (`arrange`), so only equal answers can make a true pair;
    then the first rotation with the fewest true pairs is used, and these are left out of the mean (`mismatched`).
  - HALOs and TRL 1.16 compute it per micro-batch, so that there a memory setting changes the objective, and in TRL a
    last micro-batch of one row is paired with its true answer. Here the answers of the whole step are rotated before
    the ranks share them; the sum over all ranks is divided by n, then clamped, all before any backward.
  - It is never computed from one row: all steps of an epoch have one size (or one row less), and at least two rows.

Deviations from the usual script, on purpose:
  1. The reference is the policy with its new adapter switched off, over the same micro-batch: no second model, and at
     step 0 z0 is 0 and every row's loss λ/2, which is asserted.
  2. The SFT adapter is merged into the base (fp32 arithmetic, rounded once; kl_merge in run.json is its cost) and a
     fresh LoRA is trained. What is saved is the sum of both, relative to the pretrained base.
  3. Mismatched pairs are computed in separate micro-batches.
  4. Rows beyond --max-length are dropped and counted, never cut. Only y' is cut, where x and y' together exceed it.

    python kto.py --sft-adapter runs/sft_v2

Cost per row: as an answer in DPO (two forwards, one backward), and two forwards without gradient for z0.
Expect, for Qwen2.5-Coder-0.5B-Instruct after SFT (seed 41): held-out AUC 0.612 [0.543, 0.676], 1.1 nats of KL to SFT,
and 89 % of the answers end, where SFT has 94 %; at lr 2e-5 only 65 % do (docs/recipes.md). Under 2 minutes on one H200.

A row: {"prompt": "…" or messages, "completion": …, "label": true or false}, all of them used. Or a preference pair, as
for dpo.py and also from part A of the prompts: half of the pairs, by the seed, give their chosen answer as desirable,
the others their rejected answer as undesirable, so that only one answer of each pair is used.
"""
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor

import chat
import common
import inputs
from common import Example


@dataclass(frozen=True)
class Args:
    # -- model --
    sft_adapter: str = "runs/sft_v2"
    """Initial policy and reference: a run, any plain PEFT LoRA (directory or hub id), or "none" for --model itself."""
    model: str | None = None
    """The base model; by default the one that --sft-adapter was trained on, or Qwen2.5-0.5B if there is no adapter."""
    other_base: bool = False
    """Accept a plain PEFT adapter whose config names a base other than --model."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the base + SFT weights. Adapter and Adam state are always fp32."""
    # -- data --
    data: str = common.ULTRAFEEDBACK
    """Rows with a label, or pairs: .jsonl, .json, .csv, .parquet, a directory or hub id[@revision][:split]."""
    heldout_data: str | None = None
    """Held-out rows or pairs; by default beside --data (x.jsonl -> x_heldout.jsonl, train_prefs -> test_prefs)."""
    eval_data: str | None = None
    """Directory of evaluation data; training rows that share 13 words in a row with one of its prompts are counted."""
    rows: int = 5000
    """Training rows, one answer each: the first usable ones in the seed's shuffle; of pairs, those of part A."""
    heldout_rows: int = 256
    """Held-out rows for loss and accuracy; the judge's prompts are not among them."""
    max_length: int = 1024
    """Longest prompt + answer in tokens."""
    max_dropped: float = 0.05
    """The run ends if a larger share of the rows is degenerate (an empty answer, or a pair of equal answers)."""
    max_overlong: float = 0.15
    """The run ends if a larger share of rows exceeds --max-length [at least 6 % of UltraFeedback's pairs do]."""
    # -- method --
    beta: float = 0.1
    """Strength of the pull toward the reference [paper: its default]."""
    desirable_weight: float = 1.0
    """λ_D, the weight of a desirable row's loss [paper: 1]."""
    undesirable_weight: float = 1.0
    """λ_U, the weight of an undesirable row's loss [paper: 1; it advises λ_D n_D / (λ_U n_U) in [1, 3/2] (eq. 9; its
    first versions: 4/3, above which there is a warning)]."""
    # -- optimisation --
    lr: float = 5e-6
    """Peak learning rate [paper: its advice for KTO; ours: results/sweeps/qwen2.5-coder-0.5b-instruct-kto+lr_5e-6.json,
    where fewer answers end at every higher rate]. Gemma 3 270M learns as much with it, but few answers end;
    Qwen2.5-0.5B itself has not been tried."""
    batch_size: int = 16
    """Rows per step, over all ranks, at least 2; some steps may have one row less [paper: 32]."""
    epochs: int = 2
    """Passes over the rows [ours: only one answer per pair is used, so that two passes see as many as one of DPO]."""
    warmup: float = 0.03
    """Share of the steps over which the rate rises linearly; then it falls linearly toward 0."""
    max_grad_norm: float = 1.0
    """Gradient clip, over all trained parameters."""
    # -- what is measured at the end --
    eos_prompts: int = 64
    """Number of held-out prompts answered greedily to measure eos_rate."""
    eos_tokens: int = 512
    """Token limit of these answers [enough for all but the longest answers of chat data]."""
    # -- run --
    preview: int = 0
    """Show this many examples as they would be trained, and what would be dropped; load no weights, train nothing."""
    seed: int = 42
    """Seed of the row shuffle, the sides that pairs give, the order and the LoRA initialisation."""
    out: str = "runs/kto_v1"
    """Run directory."""
    overwrite: bool = False
    """If --out holds a run of another configuration, move that run aside."""
    micro_tokens: int = 8192
    """Tokens per forward: affects memory and speed, not the update."""
    engine: Literal["auto", "fast", "plain"] = "auto"
    """auto: the fast engine if it supports the model, else the plain one (any model, slower); the same update."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    track: Literal["none", "wandb", "trackio"] = "none"
    """Log to Weights & Biases or trackio too (an optional package each; both work offline and without an account)."""
    push_to_hub: str | None = None
    """NAMESPACE/NAME on the Hugging Face hub: upload the finished run; write access is checked before training."""


# -- the method's maths ---------------------------------------------------------------------------

def kto_loss(policy: Tensor, ref: Tensor, desirable: Tensor, z0: Tensor | float, beta: float,
             desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss of each row and its implicit reward, from summed log-probabilities (all [rows], nats; desirable is bool).

    Returns (losses, rewards), rewards = βρ = β (log π − log π_ref), without gradient. z0 [] has no gradient either.
    """
    rho = policy - ref
    # eq. 8, with 1 − σ(a) = σ(−a): λ_D σ(β(z0 − ρ)) where y is desirable, λ_U σ(β(ρ − z0)) where it is not
    losses = torch.where(desirable, desirable_weight * torch.sigmoid(beta * (z0 - rho)),
                         undesirable_weight * torch.sigmoid(beta * (rho - z0)))
    return losses, beta * rho.detach()


def learning_rate(step: int, total: int, args: Args) -> float:
    """lr · min((t+1)/w, (T−t)/max(1, T−w)) at step t = 0 … T−1, w = max(1, ⌈warmup·T⌉); it would be 0 at T."""
    w = max(1, math.ceil(args.warmup * total))
    return args.lr * min((step + 1) / w, (total - step) / max(1, total - w))


# -- a row (made by build_rows, below main) -------------------------------------------------------

@dataclass(frozen=True)
class Row:
    example: Example
    desirable: bool
    prompt: list[dict]
    prompt_id: str
    answer: str


# -- z0 and the losses of a micro-batch -----------------------------------------------------------

# The figures of a row; those of the class that it is not in are 0.
VALUES = ("loss", "right", "rewards_desirable", "logprobs_desirable", "tokens_desirable",
          "rewards_undesirable", "logprobs_undesirable", "tokens_undesirable")


@torch.no_grad()
def mismatched_kl(policy, rows: list[Row], args: Args, device) -> Tensor:
    """Mean log π(y'|x) − log π_ref(y'|x) of the rows' mismatched pairs, over all ranks, in nats: z0 unclamped."""
    examples = mismatched(rows, args.max_length)
    mine = [examples[i] for i in common.my_share([len(e.ids) for e in examples])]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for micro in common.micro_batches(policy, mine, args.micro_tokens):
        with common.reference(policy):
            ref_logprobs = micro.sum_by_sequence(common.token_logprobs(policy, micro))    # [N]
        total += (micro.sum_by_sequence(common.token_logprobs(policy, micro)) - ref_logprobs).sum()
    return common.all_reduce_(total) / len(examples)


def row_metrics(policy, micro, rows: list[Row], z0: Tensor, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N], β(ρ − z0) [N], VALUES of each row [8, N]) of a micro-batch of `rows`."""
    with torch.no_grad(), common.reference(policy):
        ref_logprobs = micro.sum_by_sequence(common.token_logprobs(policy, micro))        # [N]
    logprobs = micro.sum_by_sequence(common.token_logprobs(policy, micro))                # [N]
    desirable = torch.tensor([rows[i].desirable for i in micro.examples]).to(logprobs.device, non_blocking=True)
    losses, rewards = kto_loss(logprobs, ref_logprobs, desirable, z0, args.beta, args.desirable_weight,
                               args.undesirable_weight)
    above = rewards - args.beta * z0
    right = 0.5 + 0.5 * torch.where(desirable, above.sign(), -above.sign())  # a tie is half right
    by_class = torch.stack([rewards, logprobs.detach(), micro.counts.float()])            # [3, N]
    values = torch.cat([torch.stack([losses.detach(), right]), by_class * desirable, by_class * ~desirable])
    return losses, above, values


def main(args: Args) -> None:
    # 1. Check everything that can be checked without a model.
    common.check_positive(args, "beta", "desirable_weight", "undesirable_weight", "rows", "heldout_rows", "max_length",
                          "lr", "batch_size", "epochs", "max_grad_norm", "eos_prompts", "eos_tokens",
                          "checkpoint_every")
    common.check_share(args, "warmup", "max_dropped", "max_overlong")
    common.check_numbers(args)
    device = common.setup_device(args.device)
    dtype = common.setup_dtype(args.dtype, device)
    parent, adapter, model, model_dir, tokenizer, invariants = inputs.read_start(
        args.sft_adapter, args.model, args.other_base)
    engine = common.choose_engine(args.engine, model_dir, device)
    common.check_max_length(model_dir, args.max_length, args.micro_tokens)
    split = inputs.load_split(args, ["label", "pair"], answers_of, build_rows(tokenizer, args))
    rows, heldout = (one_answer_each(items, args.seed) for items in (split.train, split.heldout))
    steps = arrange([r.prompt_id for r in rows], args.batch_size, args.epochs, args.seed)
    paired = [len(mismatched([rows[i] for i in step], args.max_length)) for step in steps]
    mismatched(heldout, args.max_length)  # fails now, not after training, where no held-out row has a mismatched pair
    prompts = [ids for prompt in {r.prompt_id: r.prompt for r in heldout}.values()
               if len(ids := chat.render_prompt(tokenizer, prompt))
               + args.eos_tokens <= common.max_positions(model_dir)][:args.eos_prompts]
    texts = ["\n".join([*(m["content"] for m in r.prompt), r.answer]) for r in rows]
    counts = inputs.preflight(tokenizer, [r.example for r in rows], texts, split.dropped, 0, args.eval_data,
                              args.preview)
    counts |= {"desirable": sum(r.desirable for r in rows), "left_out_of_z0": sum(map(len, steps)) - sum(paired)}
    if advice := weights_advice(counts["desirable"], len(rows) - counts["desirable"], args):
        common.say(f"WARNING: {advice}")
    run = common.Run("kto", args, invariants, split.fingerprints, parent, adapter)
    run.record["data_sources"] = split.sources

    # 2. The policy: base + SFT merged (or the base), frozen, and a fresh LoRA; without the LoRA it is the reference.
    common.set_seed(args.seed)
    policy = common.add_lora(common.load_model(model_dir, adapter, "none", dtype, device, engine))
    params = common.flat_parameters(policy)
    optimizer = torch.optim.Adam([params], lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=device.type == "cuda")
    common.say(f"{len(steps)} steps of up to {max(map(len, steps))} rows = {common.world()} ranks x "
               f"{max(map(len, steps)) / common.world():g}; {params.numel():,} trained parameters")
    common.note_memory([policy], args.micro_tokens, max(sum(len(rows[i].example.ids) for i in s) for s in steps))

    # 3. Train.
    for step in range(run.resume(optimizer, len(steps)), len(steps)):
        batch = [rows[i] for i in steps[step]]
        mine = [batch[i] for i in common.my_share([len(r.example.ids) for r in batch])]

        # 3a. The reference point, from the whole step's mismatched pairs, before any backward.
        kl = mismatched_kl(policy, batch, args, device)
        z0 = kl.clamp(min=0)

        # 3b. Forward (reference, policy) and backward per micro-batch; the denominator is all rows of the step.
        totals = torch.zeros(len(VALUES), dtype=torch.float64, device=device)
        for micro in common.micro_batches(policy, [r.example for r in mine], args.micro_tokens):
            losses, above, values = row_metrics(policy, micro, mine, z0, args)
            if step == 0:  # policy = reference: ρ = z0 = 0, each loss λ σ(0) = λ/2
                bound = args.beta * common.step0_tolerance(policy)
                assert above.abs().max() <= bound and args.beta * z0 <= bound, \
                    f"step 0: β(ρ − z0) {above.tolist()}, z0 {z0.item()}: the reference is not the policy"
            (losses.sum() / len(batch)).backward()
            totals += values.sum(1)
        metrics = {**means(common.all_reduce_(totals), batch), "z0": z0, "kl": kl}

        # 3c. Sum over ranks, clip, step.
        common.all_reduce_(params.grad)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, len(steps), args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

        # 3d. Log and checkpoint. Nothing above waits for the GPU: a line is written once its numbers are ready.
        run.log(step, {**metrics, "grad_norm": grad_norm, "lr": lr, "tokens": sum(len(r.example.ids) for r in batch)},
                [split.row_indices[i] for i in steps[step]])
        run.checkpoint(step + 1, optimizer)

    # 4. Save (relative to the pretrained base) and measure on held-out prompts and, in fp32, on held-out rows.
    run.save(policy, tokenizer, split.prompts)
    metrics = {**counts, "heldout_rows": len(heldout), "eos_prompts": len(prompts)}
    metrics["eos_rate"] = common.eos_rate(policy, tokenizer, prompts, args.eos_tokens, parent) if prompts else None
    # movement converts the base to fp32 if that fits: measure eos_rate before it, the held-out figures after it
    metrics |= common.movement(policy, args.out, adapter, model_dir, [r.example for r in heldout[:args.eos_prompts]],
                               args.micro_tokens)
    metrics |= {f"heldout_{k}": v for k, v in evaluate_rows(policy, heldout, args, device).items()}
    run.finish(metrics, ["loss", "accuracy", "margin", "rewards_desirable", "rewards_undesirable", "z0",
                         "logprobs_desirable", "logprobs_undesirable", "grad_norm"],
               f"KTO (β = {args.beta}, λ_D = {args.desirable_weight}, λ_U = {args.undesirable_weight}) from "
               f"{adapter or model} with LoRA on {len(rows):,} rows of {args.data}.")


# -- which rows share a step, and which answers z0 is measured on ---------------------------------

def arrange(prompts: list[str], batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The rows of every step: no prompt twice per step; an epoch's steps have one size, or one row less, at least 2.

    An epoch shuffles the prompts, lists the rows prompt by prompt and deals them to its steps like cards: rows of one
    prompt go to different steps. (With an odd number of rows in steps of 2, one step takes 3.)
    """
    n, steps = len(prompts), []
    count = min(math.ceil(n / batch_size), n // 2)
    if n < 2 or batch_size < 2:
        common.fail(f"{n} rows in steps of --batch-size {batch_size}: both must be at least 2, "
                    f"since z0 needs another row's answer")
    prompt, most = Counter(prompts).most_common(1)[0]
    if most > count:
        common.fail(f"{most} rows have the same prompt ({prompt}), but an epoch has {count} steps, and none may hold a "
                    f"prompt twice; give more rows, or a smaller --batch-size")
    for epoch in range(epochs):
        by_prompt: dict[str, list[int]] = {}
        for i in common.permutation(n, seed, "epoch", epoch):
            by_prompt.setdefault(prompts[i], []).append(i)
        laid_out = [i for rows in by_prompt.values() for i in rows]
        steps += [laid_out[first::count] for first in common.permutation(count, seed, "steps", epoch)]
    return steps


def mismatched(rows: list[Row], max_length: int) -> list[Example]:
    """Prompts with the answers of other rows, for z0: the answers rotated by one, x_i with y_{i+1}.

    No pair may be a true one, the (prompt, answer) of one of these rows: the first rotation without true pairs is used,
    or, if each has some, the first with the fewest, whose true pairs are left out. Fails where no pair is left. Prompt
    and answer are joined as token ids; the answer is cut at max_length.
    """
    true, best = {(r.prompt_id, r.answer) for r in rows}, []
    for shift in range(1, len(rows)):
        pairs = [(x, y) for x, y in zip(rows, rows[shift:] + rows[:shift]) if (x.prompt_id, y.answer) not in true]
        best = max(best, pairs, key=len)  # the first of equals
        if len(best) == len(rows):
            break
    if not best:
        common.fail(f"{len(rows)} rows that share a z0, the first with the prompt {rows[0].prompt_id}, have no "
                    f"mismatched pair: it takes two prompts with different answers; give more rows, or a larger "
                    f"--batch-size")
    prompts = [x.example.ids[:-len(x.example.targets)] for x, _ in best]
    return [Example.completion(ids, y.example.targets[:max_length - len(ids)]) for ids, (_, y) in zip(prompts, best)]


# -- rows to tensors ------------------------------------------------------------------------------

def answers_of(row: dict, where: str) -> tuple[list[dict], list[tuple[str, bool]]]:
    """(prompt messages, [(answer, is it desirable)]): one answer of a labelled row, chosen and rejected of a pair."""
    if "label" not in row:
        prompt, chosen, rejected = inputs.as_pair(row, where)
        return prompt, [(chosen, True), (rejected, False)]
    *prompt, answer = inputs.as_conversation(row, where)
    if row["label"] is None:
        raise inputs.Degenerate("null label")
    label = {"true": True, "false": False}.get(str(row["label"]).lower())  # a csv file gives text
    if label is None:
        common.fail(f"{where}: label must be true or false, got {row['label']!r}")
    return prompt, [(answer["content"], label)]


def build_rows(tokenizer, args: Args):
    """Returns build(results of `answers_of`, names): one Row, or a pair's two, or why they can't be used."""
    def build(answered: list[tuple[list[dict], list[tuple[str, bool]]]], names: list[str]) -> list[list[Row] | str]:
        sides = [prompt + [{"role": "assistant", "content": text}]
                 for prompt, answers in answered for text, _ in answers]
        names = [name for name, (_, answers) in zip(names, answered) for _ in answers]
        rendered = iter(chat.render_many(tokenizer, sides, "last", names))
        out = []
        for prompt, answers in answered:
            examples, texts = [Example.masked(*next(rendered)) for _ in answers], [text for text, _ in answers]
            if not all(text.strip() for text in texts):
                out.append("empty answer")
            elif len({*texts}) < len(texts):
                out.append("chosen equals rejected")
            elif max(len(e.ids) for e in examples) > args.max_length:
                out.append("too long")
            else:
                out.append([Row(e, desirable, prompt, inputs.prompt_id(prompt), text)
                            for e, (text, desirable) in zip(examples, answers)])
        return out
    return build


def one_answer_each(items: list[list[Row]], seed: int) -> list[Row]:
    """One Row per item: of a pair the chosen where the seed's permutation is even, else the rejected (half of each)."""
    positions = common.permutation(len(items), seed, "sides")
    return [answers[position % len(answers)] for answers, position in zip(items, positions)]


# -- the figures of a step and of the held-out rows -----------------------------------------------

def means(totals, rows: list[Row]) -> dict:
    """The logged figures of rows, from the sums of VALUES over them [8]; None for an absent class."""
    sums, n, desirable = dict(zip(VALUES, totals)), len(rows), sum(r.desirable for r in rows)
    figures = {"loss": sums["loss"] / n, "accuracy": sums["right"] / n, "margin": None,
               "share_desirable": desirable / n}
    for key in VALUES[2:]:
        m = n - desirable if key.endswith("_undesirable") else desirable
        figures[key] = sums[key] / m if m else None
    if 0 < desirable < n:
        figures["margin"] = figures["rewards_desirable"] - figures["rewards_undesirable"]
    return figures


@torch.no_grad()
def evaluate_rows(policy, rows: list[Row], args: Args, device) -> dict[str, float | None]:
    """The figures of `means` for held-out rows, which share one z0, with 95 % intervals over their prompts; and auc.

    auc is the share of (desirable, undesirable) pairs of rows in which the desirable one has the higher reward, ties
    counting half: an accuracy without a threshold.
    """
    z0 = mismatched_kl(policy, rows, args, device).clamp(min=0)
    my_indices = common.my_share([len(r.example.ids) for r in rows])
    mine = [rows[i] for i in my_indices]
    values = torch.zeros(len(VALUES), len(rows), dtype=torch.float64, device=device)
    above = torch.zeros(len(rows), device=device)
    for micro in common.micro_batches(policy, [r.example for r in mine], args.micro_tokens):
        columns = [my_indices[i] for i in micro.examples]
        _, above[columns], by_row = row_metrics(policy, micro, mine, z0, args)
        values[:, columns] = by_row.double()
    values, above = common.all_reduce_(values).cpu(), common.all_reduce_(above).cpu()
    desirable, prompts = torch.tensor([r.desirable for r in rows]), [r.prompt_id for r in rows]
    figures = {**means(values.sum(1).tolist(), rows), "z0": z0.item(), "auc": None, "auc_interval": None,
               "loss_interval": common.interval(values[0], prompts),
               "accuracy_interval": common.share_interval(values[1], prompts)}
    wins = 0.5 + 0.5 * (above[desirable][:, None] - above[~desirable]).sign().double()    # [desirable, undesirable]
    if wins.numel():  # DeLong et al. 1988: a row contributes the mean of its wins to the AUC
        auc_by_row = torch.full((len(rows),), (auc := wins.mean()).item(), dtype=torch.float64)
        auc_by_row[desirable] += (wins.mean(1) - auc) * len(rows) / len(wins)
        auc_by_row[~desirable] += (wins.mean(0) - auc) * len(rows) / wins.shape[1]
        figures |= {"auc": auc.item(), "auc_interval": common.share_interval(auc_by_row, prompts)}
    return figures


# -- advice on the weights ------------------------------------------------------------------------

def weights_advice(desirable: int, undesirable: int, args: Args) -> str | None:
    """A warning where λ_D n_D / (λ_U n_U) is outside [1, 4/3] (the paper's first versions; eq. 9 of its last: 3/2)."""
    if not desirable or not undesirable:
        return f"all rows are {'desirable' if desirable else 'undesirable'}: no row of the other class balances them"
    ratio = args.desirable_weight * desirable / (args.undesirable_weight * undesirable)
    if 1 <= ratio <= 4 / 3:
        return None
    least_desirable = args.undesirable_weight * undesirable / desirable
    most_undesirable = args.desirable_weight * desirable / undesirable
    return (f"{desirable} desirable and {undesirable} undesirable rows: λ_D n_D / (λ_U n_U) = {ratio:.3g} is outside "
            f"[1, 4/3]; give --desirable-weight {least_desirable:.3g} to {4 / 3 * least_desirable:.3g}, "
            f"or --undesirable-weight {3 / 4 * most_undesirable:.3g} to {most_undesirable:.3g}")


if __name__ == "__main__":
    main(tyro.cli(Args))
