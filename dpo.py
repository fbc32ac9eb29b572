"""DPO: direct preference optimisation of an SFT policy on chosen/rejected pairs, with LoRA.

    h    = (log π_θ(y_w|x) − log π_ref(y_w|x)) − (log π_θ(y_l|x) − log π_ref(y_l|x))
    L(θ) = − mean over pairs of [(1−ε) log σ(βh) + ε log σ(−βh)]

Paper: Rafailov et al. 2023 (2305.18290), eq. 7; label smoothing ε: Mitchell 2023, "A note on DPO with noisy
preferences". In symbols: y_w chosen, y_l rejected, π_θ the policy, π_ref the reference (base + SFT). log π(y|x) is the
sum over the answer's tokens, EOS included. Reference implementation: eric-mitchell/direct-preference-optimization.

Deviations from the usual script, on purpose:
  1. The reference is the policy with its new adapter switched off, over the same micro-batch: no second model, and at
     step 0 the margin is 0 and the loss ln 2, which is asserted.
  2. The SFT adapter is merged into the base (fp32 arithmetic, rounded once; kl_merge in run.json is its cost) and a
     fresh LoRA is trained. What is saved is the sum of both, relative to the pretrained base.
  3. Pairs with an answer beyond --max-length are dropped and counted, never cut.

    python dpo.py --sft-adapter runs/sft_v2

Expect, for Qwen2.5-Coder-0.5B-Instruct after SFT, on 4,669 pairs of part A (seed 41), at the default β of 0.3: held-out
accuracy 0.695 [0.633, 0.758], loss 0.585, 1.8 nats of KL to SFT, and longer answers (docs/recipes.md). 10.9 GiB, about
a minute on one H200.

A row: {"prompt": "…" or messages, "chosen": …, "rejected": …}, or chosen and rejected as whole conversations. Pairs
come from part A of the prompts (50 % by sha256); J is for the judge, B for PPO. Other layouts: docs/data-formats.md.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
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
    """Preference pairs: .jsonl, .json, .csv, .parquet, a directory or hub id[@revision][:split]."""
    heldout_data: str | None = None
    """Held-out pairs; by default found beside --data (x.jsonl -> x_heldout.jsonl, train_prefs -> test_prefs)."""
    eval_data: str | None = None
    """Directory of evaluation data; training rows that share 13 words in a row with one of its prompts are counted."""
    rows: int = 5000
    """Training pairs: the first usable ones of part A in the seed's shuffle."""
    heldout_rows: int = 256
    """Held-out pairs for loss and accuracy; the judge's prompts are not among them."""
    max_length: int = 1024
    """Longest prompt + answer in tokens."""
    max_dropped: float = 0.05
    """The run ends if a larger share of the pairs is degenerate (empty or equal answers)."""
    max_overlong: float = 0.15
    """The run ends if a larger share of the pairs is longer than --max-length [at least 6 % of UltraFeedback is]."""
    # -- method --
    beta: float = 0.3
    """Strength of the pull toward the reference [ours, as for lr; paper: 0.1, sec. 6, "Training details" in app. B]."""
    label_smoothing: float = 0.0
    """ε, the assumed share of swapped labels [0 is the paper's loss]."""
    # -- optimisation --
    lr: float = 5e-5
    """Peak learning rate [ours: results/sweeps/qwen2.5-coder-0.5b-instruct-dpo+lr_5e-5+beta_0.3.json]. With β = 0.1
    a quarter of answers lose their EOS at this rate. Gemma 3 270M learns as much with it, but few answers end;
    Qwen2.5-0.5B itself has not been tried."""
    batch_size: int = 16
    """Pairs per step, over all ranks."""
    epochs: int = 1
    """Passes over the pairs."""
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
    """Seed of the row shuffle, the order and the LoRA initialisation."""
    out: str = "runs/dpo_v1"
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

def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each pair and its implicit rewards, from summed log-probabilities (all [pairs], nats).

    Returns (losses, rewards chosen, rewards rejected), rewards = β (log π − log π_ref), without gradient.
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    # eq. 7 with conservative labels: −(1−ε) log σ(βh) − ε log σ(−βh)
    losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    return losses, beta * (policy_chosen - ref_chosen).detach(), beta * (policy_rejected - ref_rejected).detach()


def learning_rate(step: int, total: int, args: Args) -> float:
    """lr · min((t+1)/w, (T−t)/max(1, T−w)) at step t = 0 … T−1, w = max(1, ⌈warmup·T⌉); it would be 0 at T."""
    w = max(1, math.ceil(args.warmup * total))
    return args.lr * min((step + 1) / w, (total - step) / max(1, total - w))


METRICS = ("loss", "accuracy", "margin", "rewards_chosen", "rewards_rejected", "logprobs_chosen", "logprobs_rejected")


def pair_metrics(policy, micro, args: Args) -> tuple[Tensor, Tensor]:
    """(losses [pairs], the METRICS of each pair [7, pairs]) of a micro-batch of (chosen, rejected) pairs."""
    with torch.no_grad(), common.reference(policy):
        reference = micro.sum_by_sequence(common.token_logprobs(policy, micro))           # [2 * pairs]
    logprobs = micro.sum_by_sequence(common.token_logprobs(policy, micro))
    (pi_w, pi_l), (ref_w, ref_l) = logprobs.view(-1, 2).T, reference.view(-1, 2).T        # each [pairs]
    losses, rewards_w, rewards_l = dpo_loss(pi_w, pi_l, ref_w, ref_l, args.beta, args.label_smoothing)
    margin = rewards_w - rewards_l
    right = (margin > 0).float() + 0.5 * (margin == 0).float()  # a tie is half right
    return losses, torch.stack([losses.detach(), right, margin, rewards_w, rewards_l, pi_w.detach(), pi_l.detach()])


# -- a pair (made by build_pairs, below main) -----------------------------------------------------

@dataclass(frozen=True)
class Pair:
    chosen: Example
    rejected: Example
    prompt: list[dict]
    text: str  # of prompt and both answers

    @property
    def tokens(self) -> int:
        return len(self.chosen.ids) + len(self.rejected.ids)


def main(args: Args) -> None:
    # 1. Check everything that can be checked without a model.
    common.check_positive(args, "beta", "rows", "heldout_rows", "max_length", "lr", "batch_size", "epochs",
                          "max_grad_norm", "eos_prompts", "eos_tokens", "checkpoint_every")
    common.check_share(args, "warmup", "max_dropped", "max_overlong")
    common.check_numbers(args)
    if not 0 <= args.label_smoothing < 0.5:
        common.fail(f"--label-smoothing must be in [0, 0.5), got {args.label_smoothing}")
    device = common.setup_device(args.device)
    dtype = common.setup_dtype(args.dtype, device)
    parent, adapter, model, model_dir, tokenizer, invariants = inputs.read_start(
        args.sft_adapter, args.model, args.other_base)
    engine = common.choose_engine(args.engine, model_dir, device)
    common.check_max_length(model_dir, args.max_length, args.micro_tokens)
    split = inputs.load_split(args, ["pair"], inputs.as_pair, build_pairs(tokenizer, args))
    pairs, heldout = split.train, split.heldout
    common.check_pairs([(p.chosen, p.rejected) for p in (*pairs, *heldout)], args.micro_tokens, engine)
    prompts = [ids for p in heldout[:args.eos_prompts] if len(ids := chat.render_prompt(tokenizer, p.prompt))
               + args.eos_tokens <= common.max_positions(model_dir)]
    counts = inputs.preflight(tokenizer, [e for p in pairs for e in (p.chosen, p.rejected)], [p.text for p in pairs],
                              split.dropped, 0, args.eval_data, args.preview)
    run = common.Run("dpo", args, invariants, split.fingerprints, parent, adapter)
    run.record["data_sources"] = split.sources

    # 2. The policy: base + SFT merged (or the base), frozen, and a fresh LoRA; without the LoRA it is the reference.
    common.set_seed(args.seed)
    policy = common.add_lora(common.load_model(model_dir, adapter, "none", dtype, device, engine))
    params = common.flat_parameters(policy)
    optimizer = torch.optim.Adam([params], lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=device.type == "cuda")
    steps = common.batches(len(pairs), args.batch_size, args.epochs, args.seed)
    common.say(f"{len(steps)} steps of {args.batch_size} pairs = {common.world()} ranks x "
               f"{args.batch_size / common.world():g}; {params.numel():,} trained parameters")
    common.note_memory([policy], args.micro_tokens, max(sum(pairs[i].tokens for i in step) for step in steps))

    # 3. Train.
    for step in range(run.resume(optimizer, len(steps)), len(steps)):
        batch = [pairs[i] for i in steps[step]]
        mine = [e for i in common.my_share([p.tokens for p in batch]) for e in (batch[i].chosen, batch[i].rejected)]

        # 3a. Forward (reference, policy) and backward per micro-batch; the denominator is all pairs of the step.
        totals = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        for micro in common.micro_batches(policy, mine, args.micro_tokens, unit=2):
            losses, values = pair_metrics(policy, micro, args)
            (losses.sum() / len(batch)).backward()
            totals += values.sum(1)
        metrics = dict(zip(METRICS, common.all_reduce_(totals) / len(batch)))

        # 3b. Sum over ranks, clip, step.
        common.all_reduce_(params.grad)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        if step == 0:  # policy = reference: h = 0, σ(0) = ½
            loss, margin, bound = metrics["loss"].item(), metrics["margin"].item(), common.step0_tolerance(policy)
            assert abs(loss - math.log(2)) <= bound and abs(margin) <= bound, \
                f"step 0: loss {loss}, margin {margin}: the reference is not the policy"
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, len(steps), args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

        # 3c. Log and checkpoint. Nothing above waits for the GPU: a line is written once its numbers are ready.
        run.log(step, {**metrics, "grad_norm": grad_norm, "lr": lr, "tokens": sum(p.tokens for p in batch),
                       "chosen_tokens": sum(len(p.chosen.targets) for p in batch) / len(batch),
                       "rejected_tokens": sum(len(p.rejected.targets) for p in batch) / len(batch)},
                [split.row_indices[i] for i in steps[step]])
        run.checkpoint(step + 1, optimizer)

    # 4. Save (relative to the pretrained base) and measure on held-out prompts and, in fp32, on held-out pairs.
    run.save(policy, tokenizer, split.prompts)
    metrics = {**counts, "heldout_pairs": len(heldout), "eos_prompts": len(prompts)}
    metrics["eos_rate"] = common.eos_rate(policy, tokenizer, prompts, args.eos_tokens, parent) if prompts else None
    # movement converts the base to fp32 if that fits: measure eos_rate before it, the held-out figures after it
    metrics |= common.movement(policy, args.out, adapter, model_dir, [p.chosen for p in heldout[:args.eos_prompts]],
                               args.micro_tokens)
    metrics |= {f"heldout_{k}": v for k, v in evaluate_pairs(policy, heldout, args, device).items()}
    run.finish(metrics, ["loss", "accuracy", "margin", "rewards_chosen", "rewards_rejected", "logprobs_chosen",
                         "logprobs_rejected", "grad_norm", "tokens_per_s"],
               f"DPO (β = {args.beta}) from {adapter or model} with LoRA on {len(pairs):,} pairs of {args.data}.")


# -- rows to tensors ------------------------------------------------------------------------------

def build_pairs(tokenizer, args: Args):
    """Returns build(pairs of (prompt messages, chosen, rejected), names): a Pair per row, or why it can't be used."""
    def build(pairs: list[tuple[list[dict], str, str]], names: list[str]) -> list[Pair | str]:
        sides = [prompt + [{"role": "assistant", "content": text}] for prompt, *texts in pairs for text in texts]
        names = [name for name in names for _ in range(2)]
        rendered = [Example.masked(*r) for r in chat.render_many(tokenizer, sides, "last", names)]
        out = []
        for (prompt, chosen, rejected), w, l in zip(pairs, rendered[::2], rendered[1::2]):
            if not chosen.strip() or not rejected.strip():
                out.append("empty answer")
            elif chosen == rejected:
                out.append("chosen equals rejected")
            elif max(len(w.ids), len(l.ids)) > args.max_length:
                out.append("too long")
            else:
                out.append(Pair(w, l, prompt, "\n".join([*(m["content"] for m in prompt), chosen, rejected])))
        return out
    return build


# -- the held-out figures -------------------------------------------------------------------------

@torch.no_grad()
def evaluate_pairs(policy, pairs: list[Pair], args: Args, device) -> dict[str, float]:
    """Means of METRICS over held-out pairs and all ranks; the first three with 95 % intervals over the prompts."""
    mine = common.my_share([p.tokens for p in pairs])
    values = torch.zeros(len(METRICS), len(pairs), dtype=torch.float64, device=device)
    sides = [e for i in mine for e in (pairs[i].chosen, pairs[i].rejected)]
    for micro in common.micro_batches(policy, sides, args.micro_tokens, unit=2):
        values[:, [mine[i // 2] for i in micro.examples[::2]]] = pair_metrics(policy, micro, args)[1].double()
    values, prompts = common.all_reduce_(values).cpu(), [inputs.prompt_id(p.prompt) for p in pairs]
    loss, accuracy, margin = values[:3]
    return {**dict(zip(METRICS, values.mean(1).tolist())), "loss_interval": common.interval(loss, prompts),
            "accuracy_interval": common.share_interval(accuracy, prompts),
            "margin_interval": common.interval(margin, prompts)}


if __name__ == "__main__":
    main(tyro.cli(Args))
