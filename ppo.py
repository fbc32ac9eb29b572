"""PPO: reinforcement learning of an SFT policy against a reward model (RLHF), with LoRA.

    r_t = −β (log π_old(a_t|s_t) − log π_ref(a_t|s_t))  + score(x, y) at the last token            the reward of a token
    δ_t = r_t + γ V(s_{t+1}) − V(s_t),   A_t = δ_t + γλ A_{t+1},   R_t = A_t + V(s_t)              GAE
    L_π = E_t[max(−A_t ρ_t, −A_t clip(ρ_t, 1±ε))],   ρ_t = π_θ(a_t|s_t) / π_old(a_t|s_t)           the policy's loss
    L_V = ½ E_t[max((V_t − R_t)², (clip(V_t, V_old,t ± ε_V) − R_t)²)]                              the critic's loss

Papers: Schulman et al. 2017 (1707.06347), eq. 7 and 11-12; GAE: Schulman et al. 2016 (1506.02438), eq. 16; RLHF:
Ziegler et al. 2019 (1909.08593), Stiennon et al. 2020 (2009.01325); the details: Huang et al. 2024 (2403.17031), "The
N+ Implementation Details of RLHF with PPO". In symbols: s_t the prompt and the tokens before a_t, π_θ the policy, π_old
the policy that sampled, π_ref the reference (base + SFT), V the critic. Reference implementation:
vwxyzjn/summarize_from_feedback_details.

The details of 2403.17031, and where this file has them:
  1. Dropout is off (common.add_lora).
  2. Completions end at the first EOS (common.Sampler).
  3. The score is read at the EOS; a completion without one gets a fixed penalty (`completion_scores`).
  4. Logits are divided by the sampling temperature, in old, new and reference log-probs alike.
  5. The critic starts from the reward model; policy and critic share nothing that is trained.
  6. KL reward by k1, per token (`token_rewards`); γ = 1, λ = 0.95 (`gae`).
  7. Advantages are whitened over the batch (`whiten`).
  8. Clipped value loss, times 0.1 (`value_loss`).
  9. Several epochs of shuffled mini-batches (3d); ρ ≡ 1 in the first mini-batch (asserted there).
 10. Adam with ε 1e-5 and a falling learning rate (`learning_rate`).

Deviations from them, on purpose:
  1. The critic is a copy of the reward model's adapter with a new head of zeros: V starts at 0, not at the reward.
  2. Reward model, critic and second scorer are adapters on one copy of the base; the policy's reference is the policy
     with its adapter off. Two copies of the base are in memory; with the fast engine the sampler's is a third.
  3. The gradients of policy and critic are clipped separately (2403.17031's runs clip the joint gradient, which is
     DeepSpeed's default), and the learning rate rises over the first 3 % of the steps.
  4. Scores are normalised by their mean and sd over the reference's completions [1909.08593] (`reference_scores`).
  5. The score is added to the reward of the EOS itself; 2403.17031's code adds it one position later, and trains V
     there too.
  6. The old log-probs are the trainer's, computed on the first epoch's micro-batches, so that ρ is exactly 1 there;
     they must agree with the sampler's (`sampler_gap`, 3b).
  7. No prompt is among the reward model's (`load_prompts`).
  8. A second reward model, which the policy is not trained against, is logged beside the score: when only the score
     rises, the policy over-optimises it.

    python ppo.py --sft-adapter runs/sft_v2 --reward-adapter runs/rm_v1
    python ppo.py --updates 40 --fixed-prompts 256 --sft-adapter runs/sft_v2 --reward-adapter runs/rm_v1 \
      --watch-adapter runs/rm_watch

Expect from the second, for Qwen2.5-Coder-0.5B-Instruct after SFT (seed 41): 13 GiB, 2 minutes on one H200, a score that
rises by 0.16 [0.09, 0.23] on 256 fixed prompts, and more refusals (19 % of them, SFT 10 %). At β 0.05 the score rises
by 0.89, and nearly every answer becomes "I'm sorry, but I can't assist with that", which both reward models score above
SFT's answers (docs/recipes.md): read completions.jsonl before you believe a score.

A row: {"prompt": "…" or messages}, or a preference pair, whose answers are not read. Prompts come from part B (30 % by
sha256); parts A and J train the reward models. Shapes: B completions per update, T tokens of the longest completion, K
completion tokens of a micro-batch.
"""
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
    reward_adapter: str = "runs/rm_v1"
    """The reward model that gives the scores; the critic starts from it."""
    watch_adapter: str | None = None
    """A second reward model (reward.py --part J), whose score is logged but never trained against."""
    model: str | None = None
    """The base model; by default the one that --sft-adapter was trained on, or Qwen2.5-0.5B if there is no adapter."""
    other_base: bool = False
    """Accept a plain PEFT adapter whose config names a base other than --model."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the base + SFT weights. Adapter and Adam state are always fp32."""
    # -- data --
    data: str = common.ULTRAFEEDBACK
    """Prompts, or preference pairs of which only the prompts are read; a file, a directory or a hub id."""
    heldout_data: str | None = None
    """Rows whose prompts are left out, as in the other methods: by default those held out beside --data."""
    eval_data: str | None = None
    """Directory of evaluation data; training rows that share 13 words in a row with one of its prompts are counted."""
    prompt_tokens: int = 512
    """Longest prompt in tokens; longer ones are dropped and counted."""
    max_dropped: float = 0.15
    """The run ends if a larger share of the prompts is dropped (empty or too long)."""
    fixed_prompts: int = 64
    """Prompts never trained on, answered and scored before and after training; the answers are saved."""
    # -- rollouts --
    updates: int = 100
    """Number of rollouts, each followed by its epochs; when the prompts run out, another pass over them begins."""
    batch_size: int = 64
    """Completions per update, over all ranks [2403.17031: 512, with a million episodes]."""
    completion_tokens: int = 256
    """Most tokens of a completion [2403.17031: 53, for TL;DR summaries]."""
    temperature: float = 0.7
    """Sampling temperature; every log-prob is taken at it [2403.17031: 0.7]."""
    # -- method --
    beta: float = 0.5
    """β, weight of the KL to the reference in the reward [ours:
    results/sweeps/qwen2.5-coder-0.5b-instruct-ppo+lr_3e-5+beta_0.5.json; 2403.17031: 0.05, with which answers there
    become refusals, which the reward model prefers]. On Gemma 3 270M no gain is shown with it; Qwen2.5-0.5B itself has
    not been tried."""
    kl_target: float = 0.0
    """Nats of KL per completion that an adaptive β aims at [1909.08593, sec. 2.2]; 0 keeps β fixed."""
    gamma: float = 1.0
    """γ, discount [2403.17031: 1]."""
    lam: float = 0.95
    """λ of GAE [2403.17031: 0.95]."""
    clip: float = 0.2
    """ε, clip range of the ratio [1707.06347: 0.2]."""
    value_clip: float = 0.2
    """ε_V, clip range of the values around the old ones [2403.17031: 0.2]."""
    epochs: int = 4
    """Epochs per update: passes over its completions [2403.17031: 4]."""
    minibatches: int = 1
    """Optimizer steps per epoch; --batch-size must be a multiple of it [2403.17031: 1]."""
    missing_eos: float = -1.0
    """Score of a completion that doesn't end by itself, in normalised units [2403.17031: -1]."""
    normalise: int = 256
    """Samples of the reference by whose mean and sd scores are normalised [1909.08593, sec. 2]; 0: raw scores."""
    # -- optimisation --
    lr: float = 3e-5
    """Peak learning rate of policy and critic [ours, the same record; 2403.17031: 3e-6 for full fine-tuning, LoRA ten
    times that]."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient, of the policy and of the critic separately."""
    importance_cap: float = 0.0
    """Weight a token's policy loss by min(π_old / π_sampler, this), if the sampler is another program
    [Ionides 2008: truncated importance sampling; 2 is usual]; 0: no weight, since here the sampler is the policy."""
    max_gap: float = 0.1
    """The run ends if the mean |Δ log-prob| between sampler and trainer is larger [bf16 noise: 0.03 on SmolLM2]."""
    # -- run --
    preview: int = 0
    """Show this many prompts as they would be answered, and what would be dropped; load no weights, train nothing."""
    seed: int = 42
    """Seed of the prompts' shuffle, the order, the sampling and the LoRA initialisation."""
    out: str = "runs/ppo_v1"
    """Run directory."""
    results: str = "results"
    """Where ppo/<name>-<train_invariants>-s<seed>.json and .png are written."""
    overwrite: bool = False
    """If --out holds a run of another configuration, move that run aside."""
    micro_tokens: int = 4096
    """Tokens per forward: affects memory and speed, not the update; small, as memory holds three copies of the base."""
    engine: Literal["auto", "fast", "plain"] = "auto"
    """auto: the fast engine if it supports the model, else the plain one (any model, slower); the same update."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    checkpoint_every: int = 10
    """Updates between checkpoints."""
    track: Literal["none", "wandb", "trackio"] = "none"
    """Log to Weights & Biases or trackio too (an optional package each; both work offline and without an account)."""
    push_to_hub: str | None = None
    """NAMESPACE/NAME on the Hugging Face hub: upload the finished run; write access is checked before training."""


VALUE_COEF = 0.1  # [2403.17031: 0.1]; Adam all but cancels it, so that it matters to the critic's gradient clip only


# -- the method's maths ---------------------------------------------------------------------------

def completion_scores(scores: Tensor, ended: Tensor, mean: float, sd: float, missing_eos: float) -> Tensor:
    """Normalised scores, [B]; where a completion did not end by itself, the penalty, whatever its text."""
    return torch.where(ended, (scores - mean) / sd, torch.full_like(scores, missing_eos))


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t = −β k1_t, plus the completion's score at its last token. scores [B]; kl, mask [B, T] -> [B, T]."""
    last = mask.sum(1, keepdim=True) - 1
    return (-beta * kl * mask).scatter_add(1, last, scores[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of response tokens (0 elsewhere), all [B, T]. 1506.02438, eq. 16; V after the end is 0."""
    values, advantages = values * mask, torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                  # δ_t = r_t + γ V_{t+1} − V_t
        advantage = (delta + gamma * lam * advantage) * mask[:, t]                 # A_t = δ_t + γλ A_{t+1}
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, advantages + values                                         # R_t = A_t + V_t


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x with mean 0 and sd 1 over the marked entries, 0 elsewhere."""
    mean = x[mask].mean()
    return (x - mean) * torch.rsqrt(x[mask].var(correction=0) + 1e-8) * mask


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """max(−Aρ, −A clip(ρ, 1±ε)) of each token, [K]. 1707.06347, eq. 7, with the sign flipped."""
    ratio = (logprobs - old_logprobs).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float) -> Tensor:
    """½ max((V − R)², (clip(V, V_old ± ε_V) − R)²) of each token, [K]: the value clipping of 2403.17031's code."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(π_old / q, cap) of each token, q the sampler's distribution; all 1 if cap is 0. Same shape as the inputs.

    Truncated importance sampling: Ionides 2008 (J. Comput. Graph. Stat. 17:295), eq. 3; for a sampler and a trainer
    that are two programs: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    return (old_logprobs - sampler_logprobs).exp().clamp(max=cap) if cap else torch.ones_like(old_logprobs)


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """β (1 + 0.1 e), e = clip(KL/target − 1, ±0.2). 1909.08593, sec. 2.2; without a target β stays the same."""
    return beta * (1 + 0.1 * min(0.2, max(-0.2, kl / target - 1))) if target else beta


def learning_rate(step: int, total: int, args: Args) -> float:
    """lr · min((t+1)/w, (T−t)/max(1, T−w)) at step t = 0 … T−1, w = max(1, ⌈0.03 T⌉); it would be 0 at T."""
    w = max(1, math.ceil(0.03 * total))
    return args.lr * min((step + 1) / w, (total - step) / max(1, total - w))


# -- roll-out -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Prompt:
    ids: list[int]   # ends where the assistant's answer begins
    text: str
    id: str          # inputs.prompt_id


@dataclass(frozen=True)
class Rollout:
    """Completions of some prompts, sampled and scored; the same on every rank."""
    prompts: Sequence[Prompt]
    ids: list[list[int]]        # [B] completions, EOS included
    logprobs: list[list[float]]  # the sampler's own, of each token
    ended: Tensor               # [B] bool: did it end with EOS?
    scores: dict[str, Tensor]   # scorer -> [B] raw scores, read at the last token; they count where it is the EOS

    def mean_score(self, name: str) -> float | None:
        """Mean raw score of the completions that ended; None when none did."""
        return self.scores[name][self.ended].mean().item() if self.ended.any() else None


def roll_out(sampler, scorers, names: Sequence[str], prompts: Sequence[Prompt], args: Args, *salt) -> Rollout:
    """Sample a completion of each prompt, cut at EOS, and score it by `names`. `salt` and the seed key the noise."""
    seed = int(common.sha256_json([args.seed, *salt])[:8], 16)
    sampled = common.rollout(sampler, [p.ids for p in prompts], args.completion_tokens, args.temperature, seed)
    examples = [Example.completion(p.ids, c.ids) for p, c in zip(prompts, sampled)]
    scores = {name: common.score_examples(common.use_scorer(scorers, name), examples, args.micro_tokens)
              for name in names}
    return Rollout(prompts, [c.ids for c in sampled], [c.logprobs for c in sampled],
                   torch.tensor([c.stopped == "eos" for c in sampled]), scores)


LOSSES = ("policy_loss", "value_loss", "ratio_mean", "approx_kl", "clipfrac", "value_clipfrac")  # of a mini-batch
METRICS = (*LOSSES, "grad_norm", "critic_grad_norm")


def main(args: Args) -> None:
    # 1. Check everything that can be checked without a model.
    check(args)
    device = common.setup_device(args.device)
    dtype = common.setup_dtype(args.dtype, device)
    parent, adapter, model, model_dir, tokenizer, invariants = inputs.read_start(
        args.sft_adapter, args.model, args.other_base,
        quantization=common.read_adapter(args.reward_adapter, reward=True)["invariants"]["quantization"])
    adapters = {"reward": args.reward_adapter} | ({"watch": args.watch_adapter} if args.watch_adapter else {})
    scorer_runs, scorer_prompts = read_scorers(adapters, invariants, model)
    common.check_positions(args, model_dir)
    engine = common.choose_engine(args.engine, model_dir, device)
    common.check_max_length(model_dir, args.prompt_tokens + args.completion_tokens, args.micro_tokens)
    nf4 = invariants.quantization == "qlora"
    if nf4:
        common.check_nf4(device)
    prompts, dropped, row_indices, data, sources = load_prompts(tokenizer, args, scorer_prompts)
    args = fit(args, len(prompts)) if len(prompts) < args.fixed_prompts + args.batch_size else args
    fixed, prompts = prompts[:args.fixed_prompts], prompts[args.fixed_prompts:]
    passes = math.ceil(args.updates / (len(prompts) // args.batch_size))
    batches = [b for b in common.batches(len(prompts), args.batch_size, passes, args.seed) if len(b) == args.batch_size]
    counts = inputs.preflight_prompts(tokenizer, [p.ids for p in prompts], [p.text for p in prompts], dropped,
                                      args.eval_data, args.preview)
    run = common.Run("ppo", args, invariants, data, parent, adapter, scorer_runs)
    run.record["data_sources"] = {"prompts": sources}

    # 2. The policy: base + SFT merged (or the base), frozen, and a fresh LoRA; without the LoRA it is the reference. On
    # another copy of the base: the reward model, the critic (its adapter again, a head of zeros), the second scorer.
    common.set_seed(args.seed)
    policy = common.add_lora(common.load_model(model_dir, adapter, "none", dtype, device, engine))
    scorers = common.load_scorers(model_dir, {"critic": args.reward_adapter} | adapters, "nf4" if nf4 else "none",
                                  getattr(torch, scorer_runs["reward"]["args"]["dtype"]), device, engine)
    common.train_scorer(scorers, "critic")
    common.head_of(scorers, "critic").weight.data.zero_()
    critic_params, policy_params = common.flat_parameters(scorers), common.flat_parameters(policy)
    sampler = common.Sampler(policy, tokenizer)
    optimizer = torch.optim.Adam([policy_params, critic_params], lr=args.lr, eps=1e-5, fused=device.type == "cuda")
    size, total_steps = args.batch_size // args.minibatches, args.updates * args.epochs * args.minibatches
    common.say(f"{args.updates} updates x {args.epochs} epochs x {args.minibatches} mini-batches = {total_steps:,} "
               f"optimizer steps, each on {size} of an update's {args.batch_size} completions; "
               f"{policy_params.numel():,} trained parameters in the policy, {critic_params.numel():,} in the critic; "
               f"{passes} passes over {len(prompts):,} prompts")
    longest = max(len(p.ids) for p in [*fixed, *prompts]) + args.completion_tokens
    common.note_memory([policy, scorers], args.micro_tokens, args.batch_size * longest,
                       max(args.batch_size, args.fixed_prompts, args.normalise), longest)

    # Before the first update the policy is the reference: its scores, to normalise by and to compare with.
    first = run.resume(optimizer, args.updates)
    if not run.state:
        run.state = {"beta": args.beta,
                     "norm": normalisation(sampler, scorers, adapters, prompts[:args.normalise], args),
                     "before": completions(roll_out(sampler, scorers, adapters, fixed, args, "fixed"), tokenizer)}
    mean, sd = run.state["norm"]["reward"]

    # 3. Train.
    for update in range(first, args.updates):
        beta, began = run.state["beta"], time.time()
        row_ids = [row_indices[args.fixed_prompts + i] for i in batches[update]]

        # 3a. Roll out and score. A completion is cut at its EOS; one without EOS gets the penalty.
        sampler.refresh(policy)
        batch = roll_out(sampler, scorers, adapters, [prompts[i] for i in batches[update]], args, "update", update)
        scores = completion_scores(batch.scores["reward"], batch.ended, mean, sd, args.missing_eos).to(device)     # [B]
        examples = [Example.completion(p.ids, ids) for p, ids in zip(batch.prompts, batch.ids)]
        lengths = torch.tensor([len(ids) for ids in batch.ids], device=device)                     # [B]
        mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]                  # [B, T]
        rolled = time.time()

        # 3b. Old and reference log-probs and old values, each [B, T], on the same micro-batches as the first epoch.
        def minibatches(epoch: int) -> list[tuple]:
            """[(micro-batches, response tokens over all ranks)] of an epoch, in a new order each. A micro-batch comes
            with (completion i, token t) of each of its K tokens."""
            order = common.permutation(args.batch_size, args.seed, "minibatches", update, epoch)
            parts = [order[i:i + size] for i in range(0, args.batch_size, size)]
            return [(common.placed_batches(policy, examples, indices, args.micro_tokens),
                     sum(len(batch.ids[i]) for i in indices)) for indices in parts]

        first_epoch = minibatches(0)
        micros = [micro for minibatch, _ in first_epoch for micro in minibatch]
        old_logprobs, entropy = common.per_token(
            lambda micro: common.logprobs_and_entropy(policy, micro, args.temperature), micros, (2, *mask.shape),
            device)
        with common.reference(policy):
            ref_logprobs = common.per_token(
                lambda micro: common.token_logprobs(policy, micro, args.temperature), micros, mask.shape, device)
        common.use_scorer(scorers, "critic")
        old_values = common.per_token(lambda micro: common.token_values(scorers, micro), micros, mask.shape, device)
        sampler_logprobs = torch.zeros(mask.shape, device=device)                                  # log q, [B, T]
        sampler_logprobs[mask] = torch.tensor([lp for row in batch.logprobs for lp in row], device=device)
        drift = (old_logprobs - sampler_logprobs)[mask]  # d = log π − log q: same policy, so only rounding
        gap = drift.abs().mean().item()
        run.check_finite(update, row_ids, sampler_gap=gap)
        if not gap <= args.max_gap:
            run.stop(f"sampler and trainer disagree at update {update}: mean |Δ log-prob| {gap:.4f}, above --max-gap "
                     f"{args.max_gap}. Rounding to bfloat16 gives about 0.03; more means different weights, "
                     f"temperature or attention, which the recomputed ratio would hide")

        # 3c. Rewards, advantages (whitened once, over all tokens of all ranks) and returns.
        kl = (old_logprobs - ref_logprobs) * mask                                                  # k1, [B, T]
        rewards = token_rewards(scores, kl, mask, beta)
        advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)
        advantages = whiten(advantages, mask)
        weights = importance_weights(old_logprobs, sampler_logprobs, args.importance_cap)       # [B, T], 1 by default
        run.check_finite(update, row_ids, scores=scores.sum().item(), kl=kl.sum().item(),
                         values=old_values.sum().item(), advantages=advantages.sum().item())

        # 3d. Epochs of mini-batches, an optimizer step each; its denominator is the mini-batch's response tokens.
        # Nothing in here waits for the GPU.
        measured, ratio_max = [], torch.zeros((), device=device)
        for epoch in range(args.epochs):
            for number, (micros, tokens) in enumerate(first_epoch if epoch == 0 else minibatches(epoch)):
                sums = torch.zeros(len(LOSSES), dtype=torch.float64, device=device)
                for micro, (i, t) in micros:  # one after the other, so that only one graph is in memory
                    logprobs = common.token_logprobs(policy, micro, args.temperature)              # [K]
                    losses = weights[i, t] * policy_loss(logprobs, old_logprobs[i, t], advantages[i, t], args.clip)
                    (losses.sum() / tokens).backward()
                    values = common.token_values(scorers, micro)                                   # [K]
                    value_losses = value_loss(values, old_values[i, t], returns[i, t], args.value_clip)
                    (VALUE_COEF * value_losses.sum() / tokens).backward()
                    log_ratio = (logprobs - old_logprobs[i, t]).detach()
                    ratio, moved = log_ratio.exp(), (values - old_values[i, t]).abs()
                    sums += torch.stack([losses.detach().sum(), value_losses.detach().sum(), ratio.sum(),
                                         0.5 * (log_ratio ** 2).sum(), ((ratio - 1).abs() > args.clip).sum(),
                                         (moved > args.value_clip).sum()])
                    ratio_max = torch.maximum(ratio_max, ratio.max())
                for params in (policy_params, critic_params):
                    common.all_reduce_(params.grad)
                norms = torch.stack([torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
                                     for params in (policy_params, critic_params)])
                measured.append(torch.cat([common.all_reduce_(sums) / tokens, norms]))
                step = (update * args.epochs + epoch) * args.minibatches + number
                lr = optimizer.param_groups[0]["lr"] = learning_rate(step, total_steps, args)
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        measured = [dict(zip(METRICS, row)) for row in torch.stack(measured).tolist()]  # of each optimizer step
        for means in measured:
            run.check_finite(update, row_ids, **means)
        assert measured[0]["approx_kl"] <= common.step0_tolerance(policy) and measured[0]["clipfrac"] == 0, \
            f"first mini-batch: {measured[0]}: the policy is not the one that sampled"  # π_θ = π_old: ρ = 1

        # 3e. Log, adapt β, checkpoint.
        kl_mean, tokens, learned = kl.sum(1).mean().item(), int(lengths.sum()), time.time()
        run.log(update, {
            "scores": batch.mean_score("reward"),
            "watch_scores": batch.mean_score("watch") if "watch" in adapters else None,
            "normalised_scores": scores.mean().item(), "rewards": rewards.sum(1).mean().item(), "kl": kl_mean,
            "k3": (k3(old_logprobs, ref_logprobs) * mask).sum(1).mean().item(), "beta": beta,
            "entropy": entropy[mask].mean().item(), **{k: sum(m[k] for m in measured) / len(measured) for k in METRICS},
            "ratio_max": max(common.gather_lists([ratio_max.item()])),
            "explained_variance": explained_variance(old_values[mask], returns[mask]),
            "values": old_values[mask].mean().item(), "returns": returns[mask].mean().item(),
            "completion_tokens": tokens / args.batch_size, "missing_eos": 1 - batch.ended.float().mean().item(),
            "sampler_gap": gap, "sampler_gap_max": drift.abs().max().item(),
            "sampler_k3": (drift.expm1() - drift).mean().item(),                       # KL(q ‖ π) from samples of q
            **({"importance_capped": (weights[mask] == args.importance_cap).float().mean().item()}
               if args.importance_cap else {}), "lr": lr, "tokens": tokens,
            "rollout_tokens_per_s": tokens / (rolled - began), "rollout_wasted": sampler.wasted(),
            "learn_tokens_per_s": args.epochs * sum(len(e.ids) for e in examples) / (learned - rolled)})
        run.watch(tokens / args.batch_size, batch.ended.float().mean().item())
        run.state["beta"] = adapted_beta(beta, kl_mean, args.kl_target)
        run.checkpoint(update + 1, optimizer)

    # 4. Save (relative to the pretrained base), answer the fixed prompts again, measure the policy along its answers.
    run.save(policy, tokenizer, {"train": sorted(p.id for p in prompts), "heldout": sorted(p.id for p in fixed)})
    sampler.refresh(policy)
    answered = roll_out(sampler, scorers, adapters, fixed, args, "fixed")
    after = completions(answered, tokenizer)
    means = {"before": summary(run.state["before"]), "after": summary(after)}
    if common.rank() == 0:
        write_results(run, args, fixed, after, means, scorer_runs)
    if "watch" in adapters and means["after"]["scores"] and means["before"]["scores"]:
        gain, watch_gain = (means["after"][k] - means["before"][k] for k in ("scores", "watch_scores"))
        if gain > 0 >= watch_gain:
            common.say(f"WARNING: over-optimisation: on the fixed prompts the score rose by {gain:.3f}, but by "
                       f"{watch_gain:.3f} for {args.watch_adapter}, which the policy was not trained against")
    sampler.release()
    moved = common.movement(policy, args.out, adapter, model_dir,
                            [Example.completion(p.ids, ids) for p, ids in zip(fixed, answered.ids)], args.micro_tokens,
                            args.temperature)
    run.finish({**counts, **moved, "fixed_prompts": len(fixed), **score_changes(run.state["before"], after),
                **{f"{k}_{when}": v for when in means for k, v in means[when].items()}}, CURVES,
               f"PPO (β = {args.beta}) from {adapter or model} with LoRA against {args.reward_adapter}: {args.updates} "
               f"updates of {args.batch_size} completions.")


# -- checks ---------------------------------------------------------------------------------------

def check(args: Args) -> None:
    """Ends the run when a flag is out of its range."""
    common.check_positive(args, "prompt_tokens", "fixed_prompts", "updates", "batch_size", "completion_tokens",
                          "temperature", "clip", "value_clip", "epochs", "minibatches", "lr", "max_grad_norm",
                          "max_gap", "checkpoint_every")
    common.check_share(args, "gamma", "lam", "max_dropped")
    common.check_numbers(args)
    common.check_output("--results", args.results)
    common.check_not_negative(args, "beta", "kl_target", "normalise", "importance_cap")
    if args.batch_size % args.minibatches:
        common.fail(f"--batch-size {args.batch_size} is not a multiple of --minibatches {args.minibatches}; "
                    f"give mini-batches of equal size")


# -- rows to prompts ------------------------------------------------------------------------------

def load_prompts(
    tokenizer, args: Args, scorer_prompts: dict[str, str],
) -> tuple[list[Prompt], Counter, list[int], dict[str, str], dict[str, int]]:
    """(prompts, dropped reasons, their rows, fingerprints, sources): part B's prompts, each once, no held-out one.

    scorer_prompts: {prompt id: whose} of the reward models' prompts; one of them in part B is an error.
    """
    rows, data = inputs.load_rows(args.data)
    inputs.recognise(rows, args.data, "pair", "label", "chat", "prompt")
    held = inputs.load_heldout(args.data, args.heldout_data, rows)
    prompts = [inputs.prompts_if_any(row, f"{args.data}, row {i}") for i, row in enumerate(rows)]
    parts = inputs.preference_parts([several[-1] if several else None for several in prompts])
    seen, left_out = set(), []

    def read(i: int, row: dict) -> list[dict] | None:
        several = inputs.as_prompts(row, f"{args.data}, row {i}")
        prompt = several[-1]
        name = inputs.prompt_id(prompt)
        if parts[i] != "B" or name in seen:
            return None
        seen.add(name)
        if held.holds(several):
            left_out.append(i)
            return None
        if name in scorer_prompts:
            common.fail(f"{args.data}, row {i}: its prompt is one of {scorer_prompts[name]}; a policy must not be "
                        f"trained on prompts that its reward model has seen; give other prompts")
        return prompt

    def build(prompts: list[list[dict]], names: list[str]) -> list[Prompt | str]:
        rendered = [chat.render_prompt(tokenizer, prompt, name) for prompt, name in zip(prompts, names)]
        return ["empty prompt" if not prompt[-1]["content"].strip() else
                "too long" if len(ids) > args.prompt_tokens else
                Prompt(ids, "\n".join(m["content"] for m in prompt), inputs.prompt_id(prompt))
                for prompt, ids in zip(prompts, rendered)]
    wanted = args.updates * args.batch_size + args.fixed_prompts
    usable = inputs.take_rows(rows, wanted, args.seed, read, build, args.data, args.max_dropped, preview=args.preview)
    if left_out:
        common.say(f"note: {len(left_out)} prompts of part B are held out ({held.source}) and left out of training")
    inputs.say_ignored((rows[i] for i in usable[2]), args.data)
    return *usable, {"prompts": data, "heldout": held.fingerprint}, inputs.count_sources(rows[i] for i in usable[2])


def fit(args: Args, n: int) -> Args:
    """The arguments with fewer fixed prompts and completions per update where n prompts require it, with a note."""
    fixed = min(args.fixed_prompts, max(1, n // 4))
    size = min(args.batch_size, n - fixed) // args.minibatches * args.minibatches
    if not size:
        common.fail(f"{args.data}: {n} usable prompts in part B, too few for one fixed prompt and --minibatches "
                    f"{args.minibatches}")
    if (fixed, size) != (args.fixed_prompts, args.batch_size):
        common.say(f"note: {n} usable prompts: {fixed} fixed prompts, not {args.fixed_prompts}, and {size} completions "
                   f"per update, not {args.batch_size}")
    return dataclasses.replace(args, fixed_prompts=fixed, batch_size=size)


# -- reward models --------------------------------------------------------------------------------

def read_scorers(adapters: dict[str, str], invariants, model: str) -> tuple[dict[str, dict], dict[str, str]]:
    """({scorer: its run.json}, {prompt id: whose} of their prompts). Fails when watch is the reward model."""
    scorer_runs, scorer_prompts = {}, {}
    for name, adapter in adapters.items():
        scorer_runs[name], its_prompts = read_scorer(adapter, invariants, model)
        scorer_prompts |= its_prompts
    if "watch" in adapters and scorer_runs["watch"]["adapter_sha256"] == scorer_runs["reward"]["adapter_sha256"]:
        common.fail(f"--watch-adapter {adapters['watch']} is the reward model itself; give one of another seed or data")
    return scorer_runs, scorer_prompts


def read_scorer(adapter: str, invariants, model: str) -> tuple[dict, dict[str, str]]:
    """run.json of a reward model of the same invariants as the policy, and its prompts: {prompt id: whose}."""
    run = inputs.read_start(adapter, model, reward=True).parent
    if run["train_invariants"] != invariants.hash:
        common.fail(f"{adapter} was trained under other invariants ({run['train_invariants']}) than the policy "
                    f"({invariants.hash}): quantisation {run['invariants']['quantization']} / "
                    f"{invariants.quantization}")
    if not (listed := Path(adapter) / "prompts.json").is_file():
        common.fail(f"{adapter} has no prompts.json, so its prompts can't be kept out of PPO's; train it again")
    return run, {name: f"the {role} prompts of {adapter}"
                 for role, names in common.read_prompts(listed).items() for name in names}


def normalisation(sampler, scorers, names: Sequence[str], prompts: Sequence[Prompt],
                  args: Args) -> dict[str, tuple[float, float]]:
    """{scorer: mean and sd of its scores of the reference's completions}; (0, 1), raw scores, without prompts."""
    if not prompts:
        return {name: (0.0, 1.0) for name in names}
    sample = roll_out(sampler, scorers, names, prompts, args, "normalise")
    return {name: reference_scores(sample, name) for name in names}


def reference_scores(rollout: Rollout, name: str) -> tuple[float, float]:
    """Mean and sd of the reference policy's scores; (0, 1) when there is nothing to normalise by."""
    scores = rollout.scores[name][rollout.ended]
    if len(scores) < 2 or scores.std(correction=0) == 0:
        common.say(f"WARNING: scores are not normalised: {len(scores)} of {len(rollout.ids)} samples of the reference "
                   "end with EOS" + ", and all have the same score" * (len(scores) > 1))
        return 0.0, 1.0
    return scores.mean().item(), scores.std(correction=0).item()


# -- what is reported -----------------------------------------------------------------------------

def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's unbiased, never negative estimator of KL(π ‖ ref) from samples of π: (ρ − 1) − log ρ, ρ = ref/π."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 − Var(R − V) / Var(R): 1 for a perfect critic, 0 for a constant one; 0, not NaN, where returns don't vary."""
    spread = returns.var(correction=0)
    return (1 - (returns - values).var(correction=0) / spread).item() if spread > 0 else 0.0


CURVES = ["scores", "watch_scores", "kl", "entropy", "completion_tokens", "missing_eos", "explained_variance",
          "clipfrac", "sampler_gap"]


def completions(rollout: Rollout, tokenizer) -> list[dict]:
    """The answers as text, each with its length and scores; no score where it did not end."""
    key = {"reward": "scores", "watch": "watch_scores"}
    return [{"text": tokenizer.decode(ids, skip_special_tokens=True), "completion_tokens": len(ids),
             "missing_eos": not end, **{key[name]: s[i].item() if end else None for name, s in rollout.scores.items()}}
            for i, (ids, end) in enumerate(zip(rollout.ids, rollout.ended.tolist()))]


def summary(answers: list[dict]) -> dict[str, float | None]:
    """Means over the answers; means of scores over the answers that have one."""
    means = {}
    for k in answers[0].keys() - {"text"}:
        values = [a[k] for a in answers if a[k] is not None]
        means[k] = sum(values) / len(values) if values else None
    return dict(sorted(means.items()))


def score_changes(before: list[dict], after: list[dict]) -> dict[str, list[float] | None]:
    """95 % interval of each score's mean change over the fixed prompts whose answers ended both times; None if there
    are fewer than two."""
    intervals = {}
    for k in [k for k in after[0] if k.endswith("scores")]:
        changes = [a[k] - b[k] for a, b in zip(after, before) if None not in (a[k], b[k])]
        intervals[f"{k}_change_interval"] = (common.interval(torch.tensor(changes), range(len(changes)))
                                             if len(changes) > 1 else None)
    return intervals


def write_results(run, args: Args, fixed: list[Prompt], after: list[dict], means: dict, scorer_runs: dict) -> None:
    """completions.jsonl (the fixed prompts' answers, before and after), results/ppo/<name>-….json, .png."""
    common.write_text(run.directory / "completions.jsonl", "".join(
        common.to_json({"prompt": p.text, "before": b, "after": a}) + "\n"
        for p, b, a in zip(fixed, run.state["before"], after)))
    log, record = [json.loads(line) for line in run.log_file.read_text().splitlines()], run.record
    results_path = Path(args.results) / "ppo" / common.results_stem(record)
    models = {f"{k}_model": {"name": v["name"], "config_hash": v["config_hash"]} for k, v in scorer_runs.items()}
    common.write_json(f"{results_path}.json", {"schema_version": 1, **{k: record[k] for k in (
        "name", "model", "config_hash", "family", "seed", "train_invariants", "adapter_sha256", "data")}, **models,
        "updates": args.updates, "fixed_prompts": len(fixed), **means,
        "curves": {k: [line[k] for line in log] for k in (*CURVES, "k3", "beta", "rewards")}})
    common.write_atomic(f"{results_path}.png", lambda p: common.plot_curves(log, CURVES, record["name"], p))


if __name__ == "__main__":
    main(tyro.cli(Args))
