"""GRPO: reinforcement learning of an SFT policy on rewards that a program can check, with LoRA and without a critic.

    A_i  = (r_i − mean(r_1 … r_G)) / (sd(r_1 … r_G) + 1e-4)                      the advantage of answer i to its prompt
    l_it = −min(ρ_it A_i, clip(ρ_it, 1−ε_low, 1+ε_high) A_i) + β k3_it,   ρ_it = π_θ(o_it|·) / π_old(o_it|·)
    k3   = π_ref/π_θ − log(π_ref/π_θ) − 1                                       estimates KL(π_θ ‖ π_ref), never below 0
    L(θ) = Σ_i Σ_t w_i l_it        w_i = 1/(M |o_i|),  1/Σ_j |o_j|  or  1/(M L_max)  --aggregate sequence, token, fixed

Papers: DeepSeekMath, Shao et al. 2024 (2402.03300), eq. 3 (objective), eq. 4 (k3), sec. 4.1.2 (advantage); "Dr. GRPO",
Liu et al. 2025 (2503.20783), sec. 3.1-3.2: without the division by the sd (`--scale-advantages none`) and by the length
(`--aggregate fixed`) the gradient has no bias towards easy or hard prompts or towards long wrong answers; DAPO, Yu et
al. 2025 (2503.14476), eq. 8 (token mean, ε_high 0.28) and eq. 11 (dynamic sampling: `--resample-groups`). These options
are the ones on which the papers differ; they share everything else here. In symbols: o_i the i-th of G answers to a
prompt, |o_i| its tokens, r_i its reward, M answers of a mini-batch, L_max = --completion-tokens, π_θ the policy, π_old
the policy that sampled, π_ref the reference (base + SFT). Reference implementations: sail-sg/understand-r1-zero,
volcengine/verl.

Deviations, on purpose:
  1. Sums run over the whole mini-batch and all ranks. `token` is one mean over all its tokens, where 2503.14476, eq. 8,
     first takes a mean per group. (For `sequence` both are the same, since every group has G answers.)
  2. An answer that does not end within --completion-tokens has reward 0, whatever it says; it stays in the loss.
  3. A group whose rewards are all equal has A = 0. With β = 0 its answers are left out of the forward with
     gradient and the backward; they still count in M and Σ|o|, so that the gradient is the same as with them.
  4. With one optimizer step per update (the default, and the paper's μ = 1), π_old is π_θ: ρ ≡ 1, and its log-probs are
     those of the forward that is trained. With more, they are computed before the first step, on the same micro-batches
     (ρ ≡ 1 is asserted). Either way they must agree with the sampler's (`sampler_gap`).
  5. Logits are divided by the sampling temperature in old, new and reference log-probs alike.

    python grpo.py --updates 80 --sft-adapter runs/sft_v2
    python grpo.py --task arithmetic --sft-adapter runs/sft_v2 --out runs/grpo_arithmetic
    python grpo.py --task my_task.py --sft-adapter runs/sft_v2 --out runs/grpo_mine

Expect from the first, for Qwen2.5-Coder-0.5B-Instruct after SFT (seed 41): held-out pass@1 0.4 -> 40.0 % by the answer
after "####", and 27.7 -> 40.0 % by the last number, change 8.0 to 16.6 points; 22.5 GiB, under 3 minutes on one H200.

A task defines the prompts and the reward of an answer. GSM8K: rows of question and answer (`#### 18`), or of prompt and
answer; a correct answer earns 1, any other answer 0. Arithmetic: the same for generated problems of five grades,
for models too small for GSM8K. Your own: a Python file with `reward(row, completion)`, or TRL's or verl's reward
function, and `rows()` unless --data gives them; see `load_task`. Shapes: P prompts per update, G answers to each,
B = P·G, T tokens of the longest answer, K answer tokens of a micro-batch.
"""
import functools
import importlib.util
import inspect
import json
import math
import operator
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import chat
import common
import inputs
from common import Completion, Example

GSM8K = "openai/gsm8k@e53f048856ff4f594e959d75785d2c2d37b678ee:main/train"


@dataclass(frozen=True)
class Args:
    # -- model --
    sft_adapter: str = "runs/sft_v2"
    """Initial policy and reference: a run, any plain PEFT LoRA (directory or hub id), or "none" for --model itself."""
    model: str | None = None
    """The base model; by default the one that --sft-adapter was trained on, or Qwen2.5-0.5B if there is no adapter."""
    other_base: bool = False
    """Accept a plain PEFT adapter whose config names a base other than --model."""
    quantization: Literal["qlora", "none"] = "none"
    """Only with --sft-adapter none: the quantisation of the runs to compare with, recorded in train_invariants. The
    weights are loaded in --dtype in either case; with an adapter, the setting is the adapter's."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the base + SFT weights. Adapter and Adam state are always fp32."""
    # -- task and data --
    task: str = "gsm8k"
    """gsm8k, gsm8k:format (a control that rewards only the form), arithmetic (grades 1 to 5; arithmetic:2 or
    arithmetic:1-3 for some of them), or a .py file with reward()."""
    data: str | None = None
    """Rows of the task, from any kind of source [gsm8k: its train split]; none if the task makes its own rows."""
    heldout_data: str | None = None
    """Held-out rows; by default x_heldout.jsonl beside x.jsonl, else a part of the rows, at most a tenth, by sha256."""
    heldout_rows: int = 473
    """Problems never trained on, answered before, during and after training [leaves 7,000 of GSM8K's 7,473]."""
    eval_data: str | None = None
    """Directory of evaluation data; training rows that share 13 words in a row with one of its prompts are counted."""
    prompt_tokens: int = 512
    """Longest prompt in tokens; longer ones are dropped and counted."""
    max_dropped: float = 0.05
    """The run ends if a larger share of the prompts is dropped (empty or too long)."""
    # -- rollouts --
    updates: int = 100
    """Number of rollouts, each followed by its epochs; when the prompts run out, another pass over them begins."""
    batch_size: int = 32
    """P, prompts per update, over all ranks [2402.03300: 16, 1,024 answers]."""
    group_size: int = 8
    """G, answers to each prompt [2402.03300: 64]."""
    completion_tokens: int = 400
    """L_max, most tokens of an answer; one that does not end within L_max has reward 0 [2402.03300: 1024]."""
    temperature: float = 1.0
    """Sampling temperature; every log-prob is taken at it [2503.14476 and 2503.20783: 1]."""
    resample_groups: bool = False
    """Replace groups of equal rewards by further prompts, in at most 10 rounds [2503.14476, eq. 11]."""
    # -- method --
    scale_advantages: Literal["std", "none"] = "std"
    """Divide r − mean by the group's sd [2402.03300] or not [2503.20783]."""
    aggregate: Literal["sequence", "token", "fixed"] = "token"
    """Weight of a token: by its answer's length [2402.03300], the batch's [2503.14476] or L_max [2503.20783]."""
    beta: float = 0.0
    """β, weight of the KL to the reference in the loss; 0 leaves it out [2402.03300: 0.04; the other two: 0]."""
    clip_low: float = 0.2
    """ε_low: the ratio is clipped at 1 − ε_low [2503.14476: 0.2]."""
    clip_high: float = 0.2
    """ε_high: the ratio is clipped at 1 + ε_high [2503.14476: 0.28]."""
    epochs: int = 1
    """μ, epochs per update: passes over its answers [2402.03300: 1]."""
    minibatches: int = 1
    """Optimizer steps per epoch, each on whole groups; --batch-size must be a multiple of it [2402.03300: 1]."""
    # -- held-out measurement --
    eval_every: int = 20
    """Updates between measurements of the held-out pass@1; 0: only before and after."""
    pass_k: int = 8
    """k of the held-out pass@k, estimated before and after from 2k samples per problem; 0 leaves it out."""
    # -- optimisation --
    lr: float = 1e-4
    """Peak learning rate [ours: results/sweeps/qwen2.5-coder-0.5b-instruct-grpo+lr_1e-4.json, 80 updates]. The
    sweep's rule chose 2e-4: pass@1 is 0.4 points higher, standard error 2.3, but KL is 43 nats instead of 24. Of tied
    rates, the one of smaller KL is used. Gemma 3 270M solves no problem and learns nothing; Qwen2.5-0.5B itself has not
    been tried."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient."""
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
    out: str = "runs/grpo_v1"
    """Run directory."""
    results: str = "results"
    """Where grpo/<name>-<train_invariants>-s<seed>.json and .png are written."""
    overwrite: bool = False
    """If --out holds a run of another configuration, move that run aside."""
    micro_tokens: int = 8192
    """Tokens per forward: affects memory and speed, not the update."""
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


KL_ANSWERS = 64  # greedy held-out answers along which the trained policy's KL to its reference is measured
ROUNDS = 10  # most rollouts per update with --resample-groups [the limit in the DAPO recipe of volcengine/verl]


# -- the method's maths ---------------------------------------------------------------------------

def group_advantages(rewards: Tensor, scale: str) -> Tensor:
    """A_i of each answer, rewards [P, G] -> [P, G]: 2402.03300, sec. 4.1.2 ("std") or 2503.20783, sec. 3.2 ("none").

    The sd divides by n−1. A group of equal rewards has A = 0 exactly, without rounding residue.
    """
    centred = rewards - rewards.mean(1, keepdim=True)                              # r_i − μ
    varies = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)
    return torch.where(varies, centred / (rewards.std(1, keepdim=True) + 1e-4) if scale == "std" else centred, 0.0)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """−min(ρA, clip(ρ, 1−ε_low, 1+ε_high) A) of each token, [K]. 2402.03300, eq. 3; 2503.14476, eq. 8."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """π_ref/π_θ − log(π_ref/π_θ) − 1 of each token, [K]. 2402.03300, eq. 4: its mean under π_θ is KL(π_θ ‖ π_ref)."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(π_old / q, cap) of each token, q the sampler's distribution; all 1 if cap is 0. Same shape as the inputs.

    Truncated importance sampling: Ionides 2008 (J. Comput. Graph. Stat. 17:295), eq. 3; for a sampler and a trainer
    that are two programs: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    return (old_logprobs - sampler_logprobs).exp().clamp(max=cap) if cap else torch.ones_like(old_logprobs)


def token_weights(lengths: Tensor, aggregate: str, limit: int) -> Tensor:
    """w_i, the weight in the loss of each token of each answer of a mini-batch; lengths [M] -> [M].

    sequence: mean over answers of their token means [2402.03300]; token: mean over tokens [2503.14476]; fixed: sum over
    tokens, divided by a constant that no answer's length moves [2503.20783].
    """
    weights = {"sequence": 1 / (len(lengths) * lengths.float()),
               "token": 1 / lengths.sum().float().expand(len(lengths)),
               "fixed": torch.full(lengths.shape, 1 / (len(lengths) * limit), device=lengths.device)}
    return weights[aggregate]


def learning_rate(step: int, total: int, args: Args) -> float:
    """lr · min((t+1)/w, (T−t)/max(1, T−w)) at step t = 0 … T−1, w = max(1, ⌈0.03 T⌉); it would be 0 at T."""
    w = max(1, math.ceil(0.03 * total))
    return args.lr * min((step + 1) / w, (total - step) / max(1, total - w))


# -- a task, and rows to problems -----------------------------------------------------------------

@dataclass(frozen=True)
class Problem:
    index: int       # of its row
    id: str          # inputs.prompt_id of the prompt
    ids: list[int]   # the prompt, which ends where the assistant's answer begins
    text: str        # the prompt's last turn
    row: dict        # what reward() sees


@dataclass(frozen=True)
class Score:
    reward: float
    parts: dict[str, float]  # empty when reward() gives a plain number or is not called

    @property
    def solved(self) -> bool:
        return self.parts.get("correct", self.reward) >= 1


@dataclass(frozen=True)
class Task:
    name: str
    identity: str                                     # enters config_hash
    read: Callable[[dict, str], tuple[list[dict], dict]]  # (row, where) -> (prompt messages, the row as reward sees it)
    rewards: Callable[[list[tuple[Problem, Completion]]], list[Score | str]]  # of answers that ended; a str is an error
    rows: Callable[[], Sequence[dict]] | None = None  # the task's own; None: --data


# -- answers and their rewards --------------------------------------------------------------------

@dataclass(frozen=True)
class Group:
    """A problem's answers, sampled and scored; the same on every rank."""
    problem: Problem
    completions: list[Completion]
    scores: list[Score]

    @property
    def varies(self) -> bool:
        return len({s.reward for s in self.scores}) > 1

    @property
    def solved(self) -> int:
        return sum(s.solved for s in self.scores)


def score(task: Task, answered: list[tuple[Problem, Completion]]) -> list[Score | str]:
    """The score of each answer, or the error that ends the run. An answer that did not end scores 0."""
    scores = iter(task.rewards([(p, c) for p, c in answered if c.stopped != "length"]))
    return [Score(0.0, {}) if c.stopped == "length" else next(scores) for _, c in answered]


def roll_out(sampler, task: Task, problems: Sequence[Problem], n: int, temperature: float, args: Args, run,
             *salt: Any) -> list[Group]:
    """Sample and score n answers per problem, cut at EOS (ranks share the work). `salt` and the seed key the noise."""
    repeated = [p for p in problems for _ in range(n)]
    seed = int(common.sha256_json([args.seed, *salt])[:8], 16)
    sampled = common.rollout(sampler, [p.ids for p in repeated], args.completion_tokens, temperature, seed)
    rank, world, total_answers = common.rank(), common.world(), len(repeated)
    shard = slice(rank * total_answers // world, (rank + 1) * total_answers // world)
    scores = common.gather_lists(score(task, list(zip(repeated[shard], sampled[shard]))))
    if errors := [s for s in scores if isinstance(s, str)]:
        run.stop(errors[0])
    return [Group(p, sampled[i * n:(i + 1) * n], scores[i * n:(i + 1) * n]) for i, p in enumerate(problems)]


METRICS = ("policy_loss", "ratio_mean", "approx_kl", "clipfrac")


def main(args: Args) -> None:
    # 1. Check everything that can be checked without a model.
    check(args)
    device = common.setup_device(args.device)
    dtype = common.setup_dtype(args.dtype, device)
    parent, adapter, model, model_dir, tokenizer, invariants = inputs.read_start(
        args.sft_adapter, args.model, args.other_base, args.quantization)
    common.check_positions(args, model_dir)
    engine = common.choose_engine(args.engine, model_dir, device)
    common.check_max_length(model_dir, args.prompt_tokens + args.completion_tokens, args.micro_tokens)
    task = load_task(args)
    source, items, held_items, data = read_data(task, args)
    wanted = min(args.heldout_rows, len(held_items) - held_items.count(None))
    heldout, _, _ = inputs.take_rows(held_items, wanted, args.seed, with_index, build(tokenizer, args),
                                     f"{source} (held out)", args.max_dropped)
    wanted = min(args.updates * args.batch_size * (ROUNDS if args.resample_groups else 1),
                 len(items) - items.count(None))
    problems, dropped, _ = inputs.take_rows(items, wanted, args.seed, with_index, build(tokenizer, args), source,
                                            args.max_dropped, preview=args.preview)
    inputs.say_ignored((p.row for p in problems), source)
    counts = inputs.preflight_prompts(tokenizer, [p.ids for p in problems], [p.text for p in problems], dropped,
                                      args.eval_data, args.preview)
    run = common.Run("grpo", args, invariants, data, parent, adapter)
    run.record["data_sources"] = {name: inputs.count_sources(p.row for p in part)
                                  for name, part in (("train", problems), ("heldout", heldout))}

    # 2. The policy: base + SFT merged (or the base), frozen, and a fresh LoRA; without the LoRA it is the reference.
    common.set_seed(args.seed)
    policy = common.add_lora(common.load_model(model_dir, adapter, "none", dtype, device, engine))
    params, sampler = common.flat_parameters(policy), common.Sampler(policy, tokenizer)
    optimizer = torch.optim.Adam([params], lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=device.type == "cuda")
    P, G, size = args.batch_size, args.group_size, args.batch_size // args.minibatches
    total_steps, single = args.updates * args.epochs * args.minibatches, args.epochs * args.minibatches == 1
    common.say(f"{args.updates} updates x {args.epochs} epochs x {args.minibatches} mini-batches = {total_steps:,} "
               f"optimizer steps, each on {size * G} of an update's {P} prompts x {G} answers = {P * G}; "
               f"{params.numel():,} trained parameters; {len(problems):,} problems, {len(heldout)} held out")
    longest = max(len(p.ids) for p in [*problems, *heldout]) + args.completion_tokens
    common.note_memory([policy], args.micro_tokens, P * G * longest,
                       max(P * G, len(heldout) * max(1, 2 * args.pass_k)), longest)

    # Before the first update the policy is the reference: measured now, to compare with.
    first = run.resume(optimizer, args.updates)
    if not run.state:
        before, greedy, rates = evaluate(sampler, task, heldout, args.pass_k, args, run)
        run.state = {"drawn": 0, "before": before, "answers": answers(greedy), "rates": rates}

    # 3. Train.
    for update in range(first, args.updates):
        # 3a. Measure when it is due; roll out and score. Resampling goes on, for all ranks alike, until P groups vary.
        sampler.refresh(policy)
        measured = run.state["before"] if update == 0 else {}
        if update and args.eval_every and update % args.eval_every == 0:
            measured, _, _ = evaluate(sampler, task, heldout, 0, args, run)
        began, drawn, groups = time.time(), [], []
        for round_number in range(ROUNDS if args.resample_groups else 1):
            positions = range(run.state["drawn"], run.state["drawn"] + P - len(groups))
            next_problems = [problems[endless(len(problems), position, args.seed)] for position in positions]
            new = roll_out(sampler, task, next_problems, G, args.temperature, args, run, "update", update,
                           round_number)
            run.state["drawn"] += len(new)
            drawn += new
            groups += [g for g in new if g.varies or not args.resample_groups]
            if len(groups) == P:
                break
        else:
            common.say(f"\nupdate {update}: {len(groups)} of {P} groups differ in their rewards after {ROUNDS} rounds")
            groups += [g for g in drawn if not g.varies][:P - len(groups)]
        row_ids, rolled = [g.problem.index for g in groups], time.time()

        # 3b. Advantages of the B = P·G answers, and which of them the loss can use. A group's answers are adjacent.
        completions = [c for g in groups for c in g.completions]
        rewards = torch.tensor([[s.reward for s in g.scores] for g in groups], dtype=torch.float64)    # [P, G]
        advantages = group_advantages(rewards, args.scale_advantages).flatten().float().to(device)     # [B]
        learns = [a != 0 or args.beta > 0 for a in advantages.tolist()]                                # [B]
        examples = [Example.completion(g.problem.ids, c.ids) for g in groups for c in g.completions]
        lengths = torch.tensor([len(c.ids) for c in completions], device=device)                       # [B]
        is_token = torch.arange(int(lengths.max()), device=device) < lengths[:, None]                  # [B, T]
        mask = is_token & torch.tensor(learns, device=device)[:, None]                                 # [B, T]
        sampler_logprobs = torch.zeros(mask.shape, device=device)                                      # log q, [B, T]
        sampler_logprobs[is_token] = torch.tensor([lp for c in completions for lp in c.logprobs], device=device)

        def minibatches(epoch: int) -> list[tuple]:
            """[(micro-batches, their tokens over all ranks, weight of a token of each answer [B])], newly shuffled. A
            micro-batch comes with (answer i, token t) of each of its K tokens."""
            order, parts = common.permutation(P, args.seed, "minibatches", update, epoch), []
            for start in range(0, P, size):
                indices = [g * G + i for g in order[start:start + size] for i in range(G)]
                weights = torch.zeros(P * G, device=device)
                weights[indices] = token_weights(lengths[indices], args.aggregate, args.completion_tokens)
                trained = [i for i in indices if learns[i]]
                micros = common.placed_batches(policy, examples, trained, args.micro_tokens, G)
                parts.append((micros, int(mask[indices].sum()), weights))
            return parts

        # 3c. Log-probs of old policy and reference, on the same micro-batches as the first epoch. With β = 0 the
        # loss needs no reference; it is computed on all answers, for the logged `kl`.
        first_epoch = minibatches(0)
        micros = [micro for minibatch, _, _ in first_epoch for micro in minibatch]
        old = torch.zeros(2, *mask.shape, device=device)                       # log π_old and its entropy, each [B, T]
        if not single:
            old = common.per_token(
                lambda micro: common.logprobs_and_entropy(policy, micro, args.temperature), micros, old.shape, device)
        old_logprobs, entropy = old                                            # views; filled in 3d if `single`
        with common.reference(policy):
            ref_logprobs = common.per_token(
                lambda micro: common.token_logprobs(policy, micro, args.temperature), micros if args.beta else
                common.placed_batches(policy, examples, range(P * G), args.micro_tokens, G), mask.shape, device)

        # 3d. Epochs of mini-batches, an optimizer step each.
        totals = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        ratio_max = torch.zeros((), device=device)
        trained_tokens, grad_norms = 0, []
        for epoch in range(args.epochs):
            for number, (micros, tokens, weights) in enumerate(first_epoch if epoch == 0 else minibatches(epoch)):
                sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
                for micro, (i, t) in micros:
                    if single:  # the policy is still the one that sampled
                        now = common.logprobs_and_entropy(policy, micro, args.temperature)             # [2, K]
                        old[:, i, t], logprobs = now.detach(), now[0]
                    else:
                        logprobs = common.token_logprobs(policy, micro, args.temperature)              # [K]
                    losses = policy_loss(logprobs, old_logprobs[i, t], advantages[i], args.clip_low, args.clip_high)
                    losses = losses * importance_weights(old_logprobs[i, t], sampler_logprobs[i, t],
                                                         args.importance_cap)
                    kl_losses = args.beta * k3(logprobs, ref_logprobs[i, t]) if args.beta else 0.0
                    (weights[i] * (losses + kl_losses)).sum().backward()
                    log_ratio = (logprobs - old_logprobs[i, t]).detach()
                    ratio = log_ratio.exp()
                    clipped = (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)
                    sums += torch.stack([(weights[i] * losses.detach()).sum(), ratio.sum(),
                                         0.5 * (log_ratio ** 2).sum(), clipped.sum()])
                    ratio_max = torch.maximum(ratio_max, ratio.max())
                totals += common.all_reduce_(sums)
                if epoch == number == 0 and mask.any():  # before the first step, π_θ is π_old: is it the sampler's too?
                    if single:
                        common.all_reduce_(old)
                    drift = (old_logprobs - sampler_logprobs)[mask]  # d = log π − log q: only rounding
                    gap = drift.abs().mean().item()
                    run.check_finite(update, row_ids, sampler_gap=gap)
                    if not gap <= args.max_gap:
                        run.stop(f"sampler and trainer disagree at update {update}: mean |Δ log-prob| {gap:.4f}, "
                                 f"above --max-gap {args.max_gap}. Rounding to bfloat16 gives about 0.03; more means "
                                 f"different weights, temperature or attention, which the recomputed ratio would hide")
                    assert (sums[2:] <= common.step0_tolerance(policy) * max(tokens, 1)).all(), \
                        f"first mini-batch: sums of {METRICS}: {sums.tolist()}: the policy is not the one that sampled"
                common.all_reduce_(params.grad)
                grad_norms.append(torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm).item())
                run.check_finite(update, row_ids, grad_norm=grad_norms[-1], policy_loss=sums[0].item())
                step = (update * args.epochs + epoch) * args.minibatches + number
                lr = optimizer.param_groups[0]["lr"] = learning_rate(step, total_steps, args)
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
                trained_tokens += tokens
        totals /= torch.tensor([args.epochs * args.minibatches] + [max(trained_tokens, 1)] * 3, device=device)

        # 3e. Log and checkpoint: rewards and lengths of all answers drawn, the rest of those trained on, if any.
        learned_at, solved, drawn_means = time.time(), [g.solved for g in drawn], means(drawn)
        tokens = sum(len(c.ids) for g in drawn for c in g.completions)
        learning = {} if not mask.any() else {
            **dict(zip(METRICS, totals.tolist())), "ratio_max": max(common.gather_lists([ratio_max.item()])),
            "entropy": entropy[mask].mean().item(), "sampler_gap": gap, "sampler_gap_max": drift.abs().max().item(),
            "sampler_k3": (drift.expm1() - drift).mean().item(),                       # KL(q ‖ π) from samples of q
            **({"importance_capped": (drift.exp() > args.importance_cap).float().mean().item()}
               if args.importance_cap else {}),
            "learn_tokens_per_s":
                args.epochs * sum(len(e.ids) for e, learn in zip(examples, learns) if learn) / (learned_at - rolled)}
        # the same policy; at β = 0 only the sampler's are complete
        rolled_out = old_logprobs if args.beta else sampler_logprobs
        learning |= {"kl": (rolled_out - ref_logprobs).sum(1).mean().item(),  # sum per completion
                     "k3": k3(rolled_out, ref_logprobs).sum(1).mean().item()}
        run.log(update, {
            **drawn_means, "zero_variance": sum(not g.varies for g in drawn) / len(drawn),
            "all_right": solved.count(G) / len(drawn), "all_wrong": solved.count(0) / len(drawn),
            "drawn_groups": len(drawn), **learning, "grad_norm": sum(grad_norms) / len(grad_norms), "lr": lr,
            "tokens": tokens,
            "rollout_tokens_per_s": tokens / (rolled - began), "rollout_wasted": sampler.wasted(),
            **{f"heldout_{k}": v for k, v in measured.items()}})
        run.watch(tokens / (len(drawn) * G), 1 - drawn_means["overlong"], any(g.varies for g in drawn))
        run.checkpoint(update + 1, optimizer)

    # 4. Save (relative to the pretrained base), and answer the held-out problems again.
    run.save(policy, tokenizer, {"train": sorted({p.id for p in problems}), "heldout": sorted({p.id for p in heldout})})
    sampler.refresh(policy)
    after, greedy, rates = evaluate(sampler, task, heldout, args.pass_k, args, run)
    sampler.release()
    moved = common.movement(policy, args.out, adapter, model_dir, [
        Example.completion(g.problem.ids, g.completions[0].ids) for g in greedy[:KL_ANSWERS]], args.micro_tokens,
        args.temperature)
    if common.rank() == 0:
        write_results(run, args, heldout, answers(greedy), after)
    changes = {f"{k}_change_interval": common.interval(
        torch.tensor(v) - torch.tensor(run.state["rates"][k]), range(len(v))) for k, v in rates.items()}
    figures = {"before": run.state["before"], "after": after}
    run.finish({**counts, **moved, **changes, "heldout_problems": len(heldout),
                **{f"{k}_{when}": v for when in figures for k, v in figures[when].items()}}, CURVES,
               f"GRPO (β = {args.beta}) from {adapter or model} with LoRA on the task {task.name}: {args.updates} "
               f"updates of {P} prompts x {G} answers.")


# -- checks ---------------------------------------------------------------------------------------

def check(args: Args) -> None:
    """Ends the run when a flag is out of its range."""
    common.check_positive(args, "heldout_rows", "prompt_tokens", "updates", "batch_size", "completion_tokens",
                          "temperature", "clip_low", "clip_high", "epochs", "minibatches", "lr",
                          "max_grad_norm", "max_gap", "checkpoint_every")
    common.check_share(args, "clip_low", "max_dropped")
    common.check_numbers(args)
    common.check_output("--results", args.results)
    common.check_not_negative(args, "beta", "eval_every", "pass_k", "importance_cap")
    if args.group_size < 2:
        common.fail(f"--group-size {args.group_size}: a group needs 2 answers at least, to compare them")
    if args.batch_size % args.minibatches:
        common.fail(f"--batch-size {args.batch_size} is not a multiple of --minibatches {args.minibatches}; "
                    f"give mini-batches of equal size")


# -- held-out evaluation --------------------------------------------------------------------------

def evaluate(sampler, task: Task, heldout: list[Problem], k: int, args: Args,
             run) -> tuple[dict[str, float], list[Group], dict[str, list[float]]]:
    """Held-out figures; the greedy answers; and the rates problem by problem.

    Rates: pass_1, solved by the greedy answer; flexible_1, the same where only the last number has to be right, if the
    task says so ("flexible"); pass_k, from 2k samples, unless k is 0. The other figures are means over greedy answers.
    """
    greedy = roll_out(sampler, task, heldout, 1, 0.0, args, run, "heldout")
    rates = {"pass_1": [float(g.solved) for g in greedy]}
    if any("flexible" in g.scores[0].parts for g in greedy):
        rates["flexible_1"] = [g.scores[0].parts.get("flexible", 0.0) for g in greedy]
    if k:
        sampled = roll_out(sampler, task, heldout, 2 * k, args.temperature, args, run, "heldout")
        rates["pass_k"] = [pass_at_k(2 * k, g.solved, k) for g in sampled]
    return {**{name: sum(v) / len(v) for name, v in rates.items()}, **means(greedy)}, greedy, rates


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 − C(n−c, k)/C(n, k), from n samples of which c are right: an unbiased estimate of the chance that at least
    one of k samples is right. 2107.03374, eq. 1."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def means(groups: list[Group]) -> dict[str, float]:
    """Mean reward, each of its parts, length, and share of answers that did not end."""
    scores, completions = ([x for g in groups for x in getattr(g, name)] for name in ("scores", "completions"))
    parts = sorted({k for s in scores for k in s.parts})
    return {"rewards": sum(s.reward for s in scores) / len(scores),
            **{f"reward_{k}": sum(s.parts.get(k, 0.0) for s in scores) / len(scores) for k in parts},
            "completion_tokens": sum(len(c.ids) for c in completions) / len(completions),
            "overlong": sum(c.stopped == "length" for c in completions) / len(completions)}


# -- what is reported -----------------------------------------------------------------------------

CURVES = ["rewards", "reward_correct", "reward_format", "reward_flexible", "heldout_pass_1", "heldout_flexible_1",
          "completion_tokens", "overlong", "zero_variance", "kl", "entropy", "clipfrac", "sampler_gap"]


def endless(n: int, position: int, seed: int) -> int:
    """Index of the row at a position of an endless order of n rows: one pass after another, each newly shuffled."""
    return shuffle(n, seed, position // n)[position % n]


@functools.lru_cache(2)
def shuffle(n: int, seed: int, passes: int) -> list[int]:
    return common.permutation(n, seed, "epoch", passes)


def answers(greedy: list[Group]) -> list[dict]:
    """Greedy answers as text, each with its length, its reward and whether it did not end."""
    return [{"text": c.text, "reward": s.reward, **s.parts, "completion_tokens": len(c.ids),
             "overlong": c.stopped == "length"}
            for g in greedy for c, s in zip(g.completions, g.scores)]


def write_results(run, args: Args, heldout: list[Problem], after_answers: list[dict], after: dict) -> None:
    """completions.jsonl (greedy answers to held-out problems, before and after), results/grpo/<name>-….json, .png."""
    common.write_text(run.directory / "completions.jsonl", "".join(
        common.to_json({"prompt": p.text, "row": common.nulled(p.row), "before": b, "after": a}) + "\n"
        for p, b, a in zip(heldout, run.state["answers"], after_answers)))
    log, record = [json.loads(line) for line in run.log_file.read_text().splitlines()], run.record
    measured = [*log, {"step": args.updates, **{f"heldout_{k}": v for k, v in after.items()}}]
    results_path = Path(args.results) / "grpo" / common.results_stem(record)
    labels = {"pass_1": "pass@1", "flexible_1": "flexible pass@1", "pass_k": f"pass@{args.pass_k}"}
    before, after = ({labels.get(k, k): v for k, v in figures.items()} for figures in (run.state["before"], after))
    evaluations = [{k.removeprefix("heldout_"): v for k, v in line.items() if k == "step" or k.startswith("heldout_")}
                   for line in measured if "heldout_pass_1" in line]
    common.write_json(f"{results_path}.json", {"schema_version": 1, **{k: record[k] for k in (
        "name", "model", "config_hash", "family", "seed", "train_invariants", "adapter_sha256", "data")},
        "task": args.task, "updates": args.updates, "heldout_problems": len(heldout), "samples": 2 * args.pass_k,
        "before": before, "after": after, "heldout": evaluations,
        "curves": {k: [line.get(k) for line in log] for k in (*CURVES, "k3", "all_right", "all_wrong")
                   if not k.startswith("heldout_")}})
    common.write_atomic(f"{results_path}.png", lambda p: common.plot_curves(measured, CURVES, record["name"], p))


# -- the verifier ---------------------------------------------------------------------------------

# A number: sign and $ in either order, digits with or without thousands commas, decimals. It must not continue in the
# text after it (1,0000 · 1.2.3 · 1/2 · 3rd). ASCII digits only, as lm-eval's GSM8K reads them; nothing is evaluated.
NUMBER = re.compile(r"(?P<sign>-?\$?-?)(?P<digits>[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})"
                    r"(?P<decimals>\.[0-9]{1,30})?(?!\w|/|[.,][0-9])")


def final_number(text: str) -> Fraction | None:
    """The number right after the first ####, as an exact fraction; None if there is none.

    The first, as in lm-eval's strict GSM8K: an answer that gives two numbers is scored by the first.
    """
    _, marked, rest = text.partition("####")
    match = NUMBER.match(rest.lstrip()) if marked else None
    if not match or match["sign"].count("-") > 1:
        return None
    value = Fraction(match["digits"].replace(",", "") + (match["decimals"] or ""))
    return -value if "-" in match["sign"] else value


def last_number(text: str) -> Fraction | None:
    """The last number in a text, as an exact fraction; None if there is none. As in lm-eval's flexible GSM8K."""
    last = None
    for last in re.finditer(r"(?<![\w.,/])" + NUMBER.pattern, text):
        pass
    return final_number(f"#### {last[0]}") if last else None


def number_reward(row: dict, completion: str) -> dict[str, float]:
    """correct: 1 when the number after #### is the row's; flexible: 1 when the last number of the answer is, whatever
    its form; format: 1 when the answer works something out and then ends with its only #### and a number."""
    number, expected = final_number(completion), final_number(row["answer"])
    working, _, end = completion.partition("####")
    return {"correct": float(number is not None and number == expected),
            "flexible": float(expected is not None and last_number(completion) == expected),
            "format": float(bool(re.search(r"\w", working) and NUMBER.fullmatch(end.strip())))}


# -- tasks ----------------------------------------------------------------------------------------

# Arithmetic is for models too small for GSM8K: worked examples, without which SmolLM2-135M doesn't adopt the form.
ARITHMETIC_PROMPT = '\n\nEnd with the answer on a line of its own: "#### number".'
WORKED = [("What is 2 + 5?", "2 + 5 = 7\n#### 7"), ("What is 14 - 6?", "14 - 6 = 8\n#### 8")]
GRADES = {1: ("+", 0, 9, 0, 9), 2: ("-", 0, 9, 0, 9), 3: ("*", 2, 9, 2, 9),  # signs, range of a, range of b
          4: ("+-", 10, 99, 1, 9), 5: ("+-", 10, 99, 10, 99)}


def arithmetic_rows(first: int, last: int, n: int = 4096) -> list[dict]:
    """n problems a ∘ b, the grades in turn; row i depends on nothing but i, and no difference is below 0."""
    rows = []
    for i in range(n):
        grade, g = first + i % (last - first + 1), random.Random(f"arithmetic {i}")
        signs, *bounds = GRADES[grade]
        sign, a, b = g.choice(signs), g.randint(*bounds[:2]), g.randint(*bounds[2:])
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
        answer = {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](a, b)
        rows.append({"question": f"What is {a} {sign} {b}?", "answer": str(answer), "grade": grade})
    return rows


def read_question(row: dict, where: str, ask: str, worked: Sequence[tuple[str, str]] = ()) -> tuple[list[dict], dict]:
    """(messages, row) of a row with question or prompt, and answer (a number, alone or after ####).

    The messages are worked examples (question, solution), then the question; `ask`, the request for the form, is
    appended to each question.
    """
    answer = str(row.get("answer"))
    answer = answer if "####" in answer else f"#### {answer}"
    if final_number(answer) is None:
        common.fail(f"{where}: no answer: want a number, alone or after ####, got {str(row.get('answer'))[-80:]!r}")
    *before, last = inputs.as_prompt(row if row.get("question") is None else {"prompt": row["question"]}, where)
    turns = [{"role": role, "content": text} for question, solved in worked
             for role, text in (("user", question + ask), ("assistant", solved))]
    system = int(bool(before) and before[0]["role"] == "system")
    last = {**last, "content": last["content"] + ask}
    return [*before[:system], *turns, *before[system:], last], {**row, "answer": answer}


def load_task(args: Args) -> Task:
    """The task that --task names.

    A file is your own code: it is imported as it stands and never fetched; its content enters config_hash.
    It defines one of these, which are recognised by their parameters (docs/data-formats.md has an example of each):
      reward(row, completion) -> a finite number, or parts, {"correct": 1.0, "style": 0.1}, whose sum is the reward.
        It gets only answers that ended, and the row as rows() or --data gave it. An error ends the run, with the row.
      reward_funcs: TRL's function of lists, f(completions, **columns) -> a list of numbers or None; or a list of such.
      compute_score(data_source, solution_str, ground_truth, extra_info): verl's -> a number, or a dict with "score".
    And, unless --data gives them, rows() -> a list of dicts with a prompt (text or messages), the same at every call.
    An answer counts as solved (pass@k) when the part "correct", or else the reward, is 1 or more.
    """
    if args.task in ("gsm8k", "gsm8k:format"):
        paid = args.task.partition(":")[2] or "correct"
        return Task("gsm8k", f"gsm8k, {paid} paid, asked{inputs.GSM8K_PROMPT}",
                    functools.partial(read_question, ask=inputs.GSM8K_PROMPT), each(number_reward, "gsm8k", paid))
    if match := re.fullmatch(r"arithmetic(?::([1-5])(?:-([1-5]))?)?", args.task):
        first, last = int(match[1] or 1), int(match[2] or match[1] or 5)
        if first > last:
            common.fail(f"--task {args.task}: the first grade is above the last")
        return Task("arithmetic", f"arithmetic:{first}-{last}, correct paid",
                    functools.partial(read_question, ask=ARITHMETIC_PROMPT, worked=WORKED),
                    each(number_reward, "arithmetic", "correct"), lambda: arithmetic_rows(first, last))
    path = Path(args.task)
    if path.suffix != ".py" or not path.is_file():
        common.fail(f"--task {args.task}: want gsm8k, gsm8k:format, arithmetic (or arithmetic:1-3: grades 1 to 5) or "
                    f"an existing .py file")
    spec = importlib.util.spec_from_file_location(f"task_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # whatever the file raises, the reader wants its name and the line
        common.fail(f"--task {args.task} can't be imported: {raised(e)}")
    names = ("reward", "reward_funcs", "compute_score")
    given = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    functions = list(given) if isinstance(given, (list, tuple)) else [given]
    if not functions or not all(map(callable, functions)):
        common.fail(f"--task {args.task} has no function reward(row, completion), no reward_funcs (TRL's) and no "
                    f"compute_score (verl's)")
    parameters = inspect.signature(functions[0]).parameters
    needed: set[str] = set()  # columns
    if "completions" in parameters:
        rewards, needed = of_lists(functions, path.stem), {name for f in functions for name in required(f)} - {*GIVEN}
    elif len(functions) > 1:
        common.fail(f"--task {args.task}: a list of functions is TRL's, of completions; {functions[0].__name__}() "
                    f"takes {', '.join(parameters)}")
    elif "solution_str" in parameters:
        rewards = each(lambda row, text: of_verl(functions[0], row, text), path.stem)
    else:
        rewards = each(functions[0], path.stem)

    def read(row: dict, where: str) -> tuple[list[dict], dict]:
        if missing := sorted(name for name in needed if row.get(name) is None):
            common.fail(f"{where}: no {missing[0]}, which --task {args.task} needs")
        if "solution_str" in parameters and ground_truth(row) is None:
            common.fail(f"{where}: no ground_truth, nor a ground_truth in reward_model, which --task {args.task} needs")
        prompt = inputs.as_prompt(row, where)
        if "completions" in parameters and "prompt" not in row:  # TRL's functions are given prompts
            row = row | {"prompt": prompt}
        return prompt, row
    return Task(path.stem, "sha256:" + common.file_sha256(path), read, rewards, getattr(module, "rows", None))


def total(value: Any, paid: str | None = None) -> Score:
    """The score of a reward function's value, a number or a dict of parts: the part named `paid`, or their sum."""
    try:
        parts = {k: float(v) for k, v in value.items()} if isinstance(value, dict) else {}
        reward = parts[paid] if paid else sum(parts.values()) if parts else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"a reward must be a number or a dict of numbers, got {value!r}") from None
    if not math.isfinite(reward):
        raise ValueError(f"a reward must be finite, got {value}")
    return Score(reward, parts)


def each(reward: Callable[[dict, str], Any], name: str, paid: str | None = None):
    """Task.rewards of a function of one answer. What it raises becomes the error that ends the run, on every rank."""
    def one(problem: Problem, completion: Completion) -> Score | str:
        try:
            return total(reward(problem.row, completion.text), paid)
        except (Exception, SystemExit) as e:  # the user's code may raise anything
            return (f"reward() of --task {name}: {raised(e)}; row {problem.index}: {str(problem.row)[:300]!r}, "
                    f"completion: {completion.text[:300]!r}")
    return lambda answered: [one(*item) for item in answered]


GIVEN = ("prompts", "completions", "completion_ids")  # passed to a TRL reward function besides the columns


def required(function: Callable) -> list[str]:
    """Names of the parameters that must be given."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty
            and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def of_lists(functions: Sequence[Callable], name: str):
    """Task.rewards of TRL's reward functions: their sum, where a function that returns None for an answer is skipped.

    Each is called with lists over a rollout's answers (on this rank, those that ended): completions (message lists if
    the prompts are), prompts, completion_ids, and each column by its name, but only those that it has parameters for.
    """
    names = [getattr(f, "__name__", "reward") for f in functions]
    names = [f"{n}_{i}" if names.count(n) > 1 else n for i, n in enumerate(names)]

    def rewards(answered: list[tuple[Problem, Completion]]) -> list[Score | str]:
        if not answered:
            return []
        rows = [p.row for p, _ in answered]
        texts = [c.text if isinstance(p.row["prompt"], str) else [{"role": "assistant", "content": c.text}]
                 for p, c in answered]
        given = {k: [row.get(k) for row in rows] for k in sorted({k for row in rows for k in row} - {"prompt"})}
        given |= {"prompts": [row["prompt"] for row in rows], "completions": texts,
                  "completion_ids": [list(c.ids) for _, c in answered]}
        values = {}
        try:
            for called, function in zip(names, functions):
                parameters = inspect.signature(function).parameters.values()
                everything = any(p.kind == p.VAR_KEYWORD for p in parameters)
                took = {k: v for k, v in given.items() if everything or k in {p.name for p in parameters}}
                values[called] = list(function(**took))
                if len(values[called]) != len(rows):
                    raise ValueError(f"{len(values[called])} rewards for {len(rows)} completions")
            parts = [{k: v[i] for k, v in values.items() if v[i] is not None} for i in range(len(rows))]
            return [total(p if len(functions) > 1 and p else sum(p.values())) for p in parts]
        except (Exception, SystemExit) as e:  # the user's code may raise anything
            rows_asked = f"rows {', '.join(str(p.index) for p, _ in answered[:5])}, …"
            return [f"{called}() of --task {name}: {raised(e)}; {rows_asked}"] * len(rows)
    return rewards


def ground_truth(row: dict) -> Any:
    """verl's ground truth: in the column reward_model, or a column of its own."""
    inner = row.get("reward_model")
    return inner.get("ground_truth") if isinstance(inner, dict) else row.get("ground_truth")


def of_verl(compute_score: Callable, row: dict, text: str) -> float:
    """verl's compute_score of an answer: a number, or the "score" of a dict."""
    value = compute_score(data_source=row.get("data_source"), solution_str=text, ground_truth=ground_truth(row),
                          extra_info=row.get("extra_info"))
    return value["score"] if isinstance(value, dict) else value


def raised(e: BaseException) -> str:
    """An exception and the line it came from, if that isn't one of this file."""
    at = traceback.extract_tb(e.__traceback__)[-1]
    line = "" if at.filename == __file__ else f" ({Path(at.filename).name}, line {at.lineno})"
    return f"{type(e).__name__}: {e}{line}".replace("\n", " ")


# -- rows of a task -------------------------------------------------------------------------------

def read_data(task: Task, args: Args) -> tuple[str, list, list, dict[str, str]]:
    """(source, training items, held-out items, fingerprints).

    An item is (messages, row), None (not in this part) or a str: why the row is degenerate.
    """
    if task.rows and args.data:
        common.fail(f"--task {args.task} makes its own rows; leave out --data {args.data}")
    if not (task.rows or args.data or task.name == "gsm8k"):
        common.fail(f"--task {args.task} has no rows(); give its rows with --data")
    source = args.task if task.rows else args.data or GSM8K
    held_source = args.heldout_data or (None if task.rows else inputs.heldout_beside(source))
    if tests := [s for s in (source, held_source) if s and re.search(r":(.*/)?test", s)]:
        common.fail(f"{tests[0]} is a test split, which only evaluate.py may use; train on, and hold out, other rows")

    def read(rows, fingerprint: str, source: str) -> tuple[list, str]:
        items = []
        for i, row in enumerate(rows):
            try:
                items.append(task.read(row, f"{source}, row {i}"))
            except inputs.Degenerate as e:
                items.append(str(e))
        return items, fingerprint

    data = {"task": task.identity}
    rows, data["train"] = read(*(own_rows(task) if task.rows else inputs.load_rows(source)), source)
    common.say(f"{source}: {len(rows):,} rows for the task {task.name}")
    keys = [None if isinstance(item, str) else inputs.prompt_key(item[0]) for item in rows]
    if held_source:
        held, data["heldout"] = read(*inputs.load_rows(held_source), held_source)
    else:  # the prompts with the smallest sha256, each once: a split that no seed and no order moves
        row_of = {key: i for i, key in enumerate(keys) if key}
        n = min(args.heldout_rows, max(1, len(row_of) // 10))
        held: list = [None] * len(rows)
        for key in sorted(row_of, key=lambda key: (common.bucket(key), key))[:n]:
            held[row_of[key]] = rows[row_of[key]]
    heldout_keys = {inputs.prompt_key(item[0]) for item in held if isinstance(item, tuple)}
    return source, [None if key in heldout_keys else item for key, item in zip(keys, rows)], held, data


def own_rows(task: Task) -> tuple[list[dict], str]:
    """A task's own rows, rank 0's on every rank, and their fingerprint."""
    try:
        rows = common.from_rank0([dict(row) for row in task.rows()])
        fingerprint = "sha256:" + common.sha256_json(rows)
    except Exception as e:  # the user's code, or rows that are not plain data
        common.fail(f"--task {task.name}: rows() gives no list of plain dicts: {raised(e)}")
    return (rows, fingerprint) if rows else common.fail(f"--task {task.name}: rows() gives none")


def with_index(index: int, item: tuple | str | None) -> tuple | None:
    """An item of `read_data` with its row's index; None: not in this part. Raises Degenerate where it is a reason."""
    if isinstance(item, str):
        raise inputs.Degenerate(item)
    return item and (index, *item)


def build(tokenizer, args: Args):
    """A function from (index, messages, row) to Problems, or the reason why a row can't be used."""
    def problem(name: str, index: int, prompt: list[dict], row: dict) -> Problem | str:
        ids = chat.render_prompt(tokenizer, prompt, name)
        return "empty prompt" if not prompt[-1]["content"].strip() else \
            "too long" if len(ids) > args.prompt_tokens else \
            Problem(index, inputs.prompt_id(prompt), ids, prompt[-1]["content"], row)
    return lambda items, names: [problem(name, *item) for name, item in zip(names, items)]


if __name__ == "__main__":
    main(tyro.cli(Args))
