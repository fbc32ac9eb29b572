"""PPO: its maths by independent derivation, an update against a loop over single completions, what it logs and saves,
what it learns, what it refuses. Tolerance 1e-5 in fp32 unless a test says why not."""
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import tensor
from transformers import AutoModelForCausalLM

import chat
import common
import inputs
import fast
import ppo
import reward
from conftest import make_model, part_of, write_jsonl

REPO = Path(common.__file__).parent
TIMES = ("seconds", "tokens_per_s", "rollout_tokens_per_s", "learn_tokens_per_s")


def record(run):
    return json.loads((Path(run) / "run.json").read_text())


def log(run):
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def train(out, **args):
    ppo.main(ppo.Args(**args, out=str(out)))
    return str(out)


def masked(lengths, width):
    return torch.arange(width) < tensor(lengths)[:, None]


# -- rewards, advantages, returns -----------------------------------------------------------------

def test_three_tokens_by_hand():
    """One completion of three tokens: k1 = 0.2, -0.4, 1.0; β = 0.1; score 2; V = 0.5, 0.25, -0.5; γ = 0.9, λ = 0.5.

    r = -0.02, 0.04, -0.1 + 2 = 1.9
    δ_3 = 1.9 + 0.5 = 2.4;  δ_2 = 0.04 + 0.9·(-0.5) - 0.25 = -0.66;  δ_1 = -0.02 + 0.9·0.25 - 0.5 = -0.295
    A_3 = 2.4;  A_2 = -0.66 + 0.45·2.4 = 0.42;  A_1 = -0.295 + 0.45·0.42 = -0.106
    R = A + V = 0.394, 0.67, 1.9
    """
    mask = masked([3], 5)
    kl = tensor([[0.2, -0.4, 1.0, 7.0, 7.0]])  # what stands behind the end must not count
    rewards = ppo.token_rewards(tensor([2.0]), kl, mask, 0.1)
    torch.testing.assert_close(rewards, tensor([[-0.02, 0.04, 1.9, 0, 0]]))
    advantages, returns = ppo.gae(rewards, tensor([[0.5, 0.25, -0.5, 9.0, 9.0]]), mask, 0.9, 0.5)
    torch.testing.assert_close(advantages, tensor([[-0.106, 0.42, 2.4, 0, 0]]))
    torch.testing.assert_close(returns, tensor([[0.394, 0.67, 1.9, 0, 0]]))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0), (0.0, 0.5)])
def test_gae_is_its_sum_over_all_later_tokens(gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t with V = 0 after the end: O(T²), one completion at a time."""
    g = torch.Generator().manual_seed(0)
    lengths, width = [7, 1, 4, 7, 2], 7
    rewards, values = torch.randn(5, width, generator=g).double(), torch.randn(5, width, generator=g).double()
    mask = masked(lengths, width)
    advantages, returns = ppo.gae(rewards * mask, values, mask, gamma, lam)
    for b, n in enumerate(lengths):
        r, v = rewards[b, :n].tolist(), [*values[b, :n].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-12)
        if lam == 1:  # Monte Carlo: the return is the discounted sum of what follows
            assert returns[b, 0].item() == pytest.approx(sum(gamma ** s * r[s] for s in range(n)), abs=1e-12)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_whitening_counts_response_tokens_only():
    mask = masked([2, 4, 1], 4)
    x = torch.full((3, 4), 1e6).masked_scatter(mask, tensor([3.0, -1.0, 2.0, 0.5, 7.0, -4.0, 1.0]))
    white = ppo.whiten(x, mask)
    found = white[mask].double()
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert (found ** 2).mean().sqrt().item() == pytest.approx(1, abs=1e-6)  # the whole batch is the population
    assert (white[~mask] == 0).all()
    given = x[mask].double()
    torch.testing.assert_close(found, (given - given.mean()) / ((given - given.mean()) ** 2).mean().sqrt())
    assert torch.isfinite(ppo.whiten(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))).all()  # one token: no spread


def test_kl_estimators_against_the_exact_kl_and_its_direction():
    """Of a categorical with three outcomes: E_π[k1] = E_π[k3] = KL(π‖ref) exactly, which differs from KL(ref‖π)."""
    pi, ref = tensor([0.7, 0.2, 0.1]).double(), tensor([0.1, 0.1, 0.8]).double()
    forward = sum(p * math.log(p / q) for p, q in zip(pi.tolist(), ref.tolist()))
    backward = sum(q * math.log(q / p) for p, q in zip(pi.tolist(), ref.tolist()))
    assert abs(forward - backward) > 0.05
    k1, k3 = pi.log() - ref.log(), ppo.k3(pi.log(), ref.log())
    assert (pi * k1).sum().item() == pytest.approx(forward) and (pi * k3).sum().item() == pytest.approx(forward)
    assert (k3 > 0).all() and ppo.k3(pi.log(), pi.log()).abs().max() == 0
    # as PPO uses k1: a reward of −β k1 per token costs β KL(π‖ref) on average
    rewards = ppo.token_rewards(torch.zeros(3).double(), k1[:, None], masked([1, 1, 1], 1), 0.3)
    assert (pi * rewards[:, 0]).sum().item() == pytest.approx(-0.3 * forward)


# -- losses ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio, advantage, loss, slope", [
    # −A min(ρ, 1.2) for A > 0, −A max(ρ, 0.8) for A < 0; slope d/dlogπ = −Aρ, or 0 where the clip holds
    (1.0, 2.0, -2.0, -2.0), (1.1, 2.0, -2.2, -2.2), (1.5, 2.0, -2.4, 0.0), (0.5, 2.0, -1.0, -1.0),
    (1.0, -2.0, 2.0, 2.0), (0.9, -2.0, 1.8, 1.8), (0.5, -2.0, 1.6, 0.0), (1.5, -2.0, 3.0, 3.0)])
def test_policy_loss_by_hand(ratio, advantage, loss, slope):
    old = tensor([-1.5])
    logprobs = (old + math.log(ratio)).requires_grad_()
    found = ppo.policy_loss(logprobs, old, tensor([advantage]), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=1e-5) and logprobs.grad.item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("value, old, target, loss, slope", [
    (1.0, 1.0, 3.0, 2.0, -2.0),   # ½ (1 − 3)²
    (1.1, 1.0, 3.0, 1.805, -1.9),
    (1.5, 1.0, 3.0, 1.62, 0.0),   # moved past old + 0.2 towards R: clipped to 1.2, ½ 1.8², no more pull
    (0.5, 1.0, 3.0, 3.125, -2.5),  # moved away from R: the unclipped one is larger
    (1.5, 1.0, 0.0, 1.125, 1.5), (0.5, 1.0, 0.0, 0.32, 0.0)])
def test_value_loss_by_hand(value, old, target, loss, slope):
    v = tensor([value], requires_grad=True)
    found = ppo.value_loss(v, tensor([old]), tensor([target]), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=1e-5) and v.grad.item() == pytest.approx(slope, abs=1e-5)


def test_adapted_beta():
    """1909.08593, sec. 2.2: e = clip((KL − target)/target, −0.2, 0.2), β ← β (1 + 0.1 e)."""
    assert ppo.adapted_beta(0.5, 6.0, 6.0) == 0.5
    assert ppo.adapted_beta(0.5, 6.6, 6.0) == pytest.approx(0.5 * 1.01)
    assert ppo.adapted_beta(0.5, 60.0, 6.0) == pytest.approx(0.5 * 1.02)
    assert ppo.adapted_beta(0.5, 0.0, 6.0) == pytest.approx(0.5 * 0.98)
    assert ppo.adapted_beta(0.5, 60.0, 0.0) == 0.5  # no target: fixed


def test_explained_variance():
    returns = tensor([1.0, 2.0, 3.0, 4.0])
    assert ppo.explained_variance(returns, returns) == 1 and ppo.explained_variance(returns + 5, returns) == 1
    assert ppo.explained_variance(torch.zeros(4), returns) == 0
    assert ppo.explained_variance(-returns, returns) == pytest.approx(-3)  # Var(2R) / Var(R) = 4
    assert ppo.explained_variance(returns, torch.ones(4)) == 0


def test_learning_rate():
    args = ppo.Args(lr=1.0)
    rates = [ppo.learning_rate(t, 100, args) for t in range(100)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 97 / 97]) and rates[-1] == pytest.approx(1 / 97)
    assert [ppo.learning_rate(t, 1, args) for t in range(1)] == [1.0]


# -- scores ---------------------------------------------------------------------------------------

def some_rollout(scores, ended):
    return ppo.Rollout([], [[1]] * len(scores), [[0.0]] * len(scores), tensor(ended), {"reward": tensor(scores)})


def test_missing_eos_gets_the_penalty_in_normalised_units():
    scores = ppo.completion_scores(tensor([3.0, 5.0, 100.0]), tensor([True, True, False]), 1.0, 2.0, -1.0)
    assert scores.tolist() == [1.0, 2.0, -1.0]


def test_normalisation_is_of_the_references_finished_samples(capsys):
    rollout = some_rollout([1.0, 3.0, 500.0], [True, True, False])
    assert ppo.reference_scores(rollout, "reward") == (2.0, 1.0)
    assert rollout.mean_score("reward") == 2.0
    for scores, ended in (([1.0, 2.0], [True, False]), ([1.0, 2.0], [False, False]), ([4.0, 4.0], [True, True])):
        assert ppo.reference_scores(some_rollout(scores, ended), "reward") == (0.0, 1.0)
        printed = capsys.readouterr().out
        assert "WARNING: scores are not normalised" in printed and ("the same score" in printed) == all(ended)
    assert some_rollout([1.0], [False]).mean_score("reward") is None


# -- prompts --------------------------------------------------------------------------------------

def loaded(tiny_model, ppo_args, path, rows):
    """load_prompts of a file with these rows, and with held-out prompts that are others."""
    write_jsonl(path.with_name(f"{path.stem}_heldout.jsonl"), [{"prompt": f"held out {i}"} for i in range(4)])
    args = ppo.Args(**{**ppo_args, "data": write_jsonl(path, rows), "max_dropped": 1.0})
    return ppo.load_prompts(chat.load_tokenizer(tiny_model), args, {})


def test_prompts_are_those_of_part_b_once_each(tiny_model, data_dir, ppo_args, tmp_path):
    rows = [json.loads(line) for line in (data_dir / "preference.jsonl").read_text().splitlines()]
    rows = [row | {"source": "even" if i % 2 == 0 else None} for i, row in enumerate(rows)]
    rows += rows[:30]  # some twice
    tokenizer = chat.load_tokenizer(tiny_model)
    prompts, _, kept, _, sources = loaded(tiny_model, ppo_args, tmp_path / "x.jsonl", rows)
    part_b = {row["prompt"][0]["content"] for row in rows if part_of(row["prompt"]) == "B"}
    assert sorted(p.text for p in prompts) == sorted(part_b) and len(prompts) == len(part_b) > 10
    assert sources == {"even": sum(i % 2 == 0 for i in kept)}
    for i, p in zip(kept, prompts):
        whole, _ = chat.render(tokenizer, rows[i]["prompt"] + rows[i]["chosen"])
        assert whole[:len(p.ids)] == p.ids and tokenizer.decode(p.ids).endswith("assistant\n")
        assert p.id == inputs.prompt_id(rows[i]["prompt"])


def test_layouts_of_a_prompt(tiny_model, ppo_args, tmp_path):
    """A text, messages, a preference pair, whole conversations: the same prompt; empty and long ones are dropped."""
    def in_b(texts):
        return next(t for t in texts if part_of([{"role": "user", "content": t}]) == "B")
    text = in_b(f"why {i}" for i in range(99))
    messages = [{"role": "user", "content": text}]
    layouts = [{"prompt": text}, {"prompt": messages}, {"prompt": text, "chosen": "a", "rejected": "b"},
               {"chosen": messages + [{"role": "assistant", "content": "a"}],
                "rejected": messages + [{"role": "assistant", "content": "b"}]}, {"instruction": text, "output": "a"},
               {"messages": [*messages, {"role": "assistant", "content": "a"}]}]
    ids = [loaded(tiny_model, ppo_args, tmp_path / f"{i}.jsonl", [row])[0][0].ids for i, row in enumerate(layouts)]
    assert ids == [chat.render_prompt(chat.load_tokenizer(tiny_model), messages)] * len(layouts)
    long, blank = in_b(f"{i} " + "why " * 80 for i in range(99)), in_b(" " * i for i in range(99))
    rows = [{"prompt": t} for t in (text, long, blank)]
    assert loaded(tiny_model, ppo_args, tmp_path / "x.jsonl", rows)[1] == {"too long": 1, "empty prompt": 1}


# -- one whole run against a loop over single completions ----------------------------------------

def plain(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)


def answer_logits(model, prompt, answer):
    """Logits before each token of the answer, [T, V], by the library's own forward on one sequence."""
    hidden = model(torch.tensor([prompt + answer]), use_cache=False, output_hidden_states=True)
    span = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return hidden.logits[0, span], hidden.hidden_states[-1][0]


def test_updates_are_the_loop_over_single_completions(tiny_model, sft_run, reward_run, ppo_args, tmp_path, monkeypatch):
    """Two updates, 2 epochs x 2 mini-batches: log and final weights from unpacked forwards of the library's modules.

    Only the sampled completions and the order of mini-batches are taken from the run.
    """
    sampled, real = [], common.rollout
    monkeypatch.setattr(common, "rollout", lambda *a: sampled.append(real(*a)) or sampled[-1])
    pools, load = [], ppo.load_prompts
    monkeypatch.setattr(ppo, "load_prompts", lambda *a: pools.append(load(*a)) or pools[-1])
    args = ppo.Args(**{**ppo_args, "updates": 2, "beta": 0.2, "normalise": 16, "completion_tokens": 20,
                              "results": str(tmp_path)}, out=str(tmp_path / "run"))
    ppo.main(args)
    lines = log(args.out)
    prompts = pools[0][0]
    fixed, prompts = prompts[:args.fixed_prompts], prompts[args.fixed_prompts:]
    batches = [b for b in common.batches(len(prompts), 8, 9, args.seed) if len(b) == 8]
    rollouts = [sampled[2], sampled[3]]  # after those for the normalisation and for the fixed prompts

    # the policy (plain modules under PEFT, the run's LoRA initialisation), the reward model and the critic
    merged = PeftModel.from_pretrained(plain(tiny_model), sft_run).merge_and_unload()
    torch.manual_seed(args.seed)
    policy = common.add_lora(merged)
    scorer = PeftModel.from_pretrained(plain(tiny_model), reward_run).eval()
    critic = PeftModel.from_pretrained(plain(tiny_model), reward_run, is_trainable=True).eval()
    head = load_file(Path(reward_run) / "adapter_model.safetensors")["base_model.model.score.weight"][0]
    value_head = torch.zeros(64, requires_grad=True)
    eos = chat.load_tokenizer(tiny_model).eos_token_id

    def score(prompt, answer):
        return (answer_logits(scorer, prompt, answer)[1][-1] @ head).item()

    def logprobs_of(prompt, answer):
        logits = answer_logits(policy, prompt, answer)[0] / args.temperature
        return logits.log_softmax(-1)[torch.arange(len(answer)), answer], logits

    def values_of(prompt, answer):
        return (answer_logits(critic, prompt, answer)[1] @ value_head)[len(prompt) - 1:len(prompt) + len(answer) - 1]

    ended = [score(p.ids, c.ids) for p, c in zip(prompts, sampled[0]) if c.ids[-1] == eos]
    mean, sd = tensor(ended).mean().item(), tensor(ended).std(correction=0).item()
    policy_params = [p for p in policy.parameters() if p.requires_grad]
    critic_params = [p for n, p in critic.named_parameters() if "lora" in n] + [value_head]
    optimizers = [torch.optim.Adam(params, lr=args.lr, eps=1e-5) for params in (policy_params, critic_params)]
    step = 0
    for update, done in enumerate(rollouts):
        rows = [(prompts[i].ids, c.ids) for i, c in zip(batches[update], done)]
        with torch.no_grad():
            old = [logprobs_of(*row) for row in rows]
            entropy = torch.cat([torch.distributions.Categorical(logits=z).entropy() for _, z in old]).mean().item()
            old = [lp for lp, _ in old]
            with policy.disable_adapter():
                ref = [logprobs_of(*row)[0] for row in rows]
            old_values = [values_of(*row) for row in rows]
        scores = [(score(*row) - mean) / sd if row[1][-1] == eos else -1.0 for row in rows]
        rewards = [-args.beta * (a - b) for a, b in zip(old, ref)]
        advantages = []
        for r, s, v in zip(rewards, scores, old_values):
            r[-1] += s
            following = [*v[1:].tolist(), 0.0]
            delta = [r[t].item() + following[t] - v[t].item() for t in range(len(r))]
            advantages.append(tensor([sum(args.lam ** (u - t) * delta[u] for u in range(t, len(r))) for t in range(len(r))]))
        returns = [a + v for a, v in zip(advantages, old_values)]
        flat = torch.cat(advantages)
        advantages = [(a - flat.mean()) / flat.std(correction=0) for a in advantages]
        seen = []
        for epoch in range(2):
            order = common.permutation(8, args.seed, "minibatches", update, epoch)
            for part in (order[:4], order[4:]):
                n = sum(len(rows[i][1]) for i in part)
                policy_sum = value_sum = clipped = ratios = 0
                for i in part:
                    ratio = (logprobs_of(*rows[i])[0] - old[i]).exp()
                    a, v = advantages[i], values_of(*rows[i])
                    policy_sum = policy_sum - torch.minimum(a * ratio, a * ratio.clamp(0.8, 1.2)).sum()
                    near = torch.minimum(torch.maximum(v, old_values[i] - 0.2), old_values[i] + 0.2)
                    value_sum = value_sum + 0.5 * torch.maximum((v - returns[i]) ** 2, (near - returns[i]) ** 2).sum()
                    clipped += ((ratio < 0.8) | (ratio > 1.2)).sum().item()
                    ratios += ratio.sum().item()
                (policy_sum / n + 0.1 * value_sum / n).backward()
                seen.append([policy_sum.item() / n, value_sum.item() / n, ratios / n, clipped / n])
                for optimizer, params in zip(optimizers, (policy_params, critic_params)):
                    torch.nn.utils.clip_grad_norm_(params, 1.0)
                    optimizer.param_groups[0]["lr"] = ppo.learning_rate(step, 8, args)
                    optimizer.step()
                    optimizer.zero_grad()
                step += 1
        line, close = lines[update], dict(rel=1e-3, abs=1e-4)  # Adam's first steps magnify rounding
        assert line["kl"] == pytest.approx(sum((a - b).sum().item() for a, b in zip(old, ref)) / 8, **close)
        assert line["entropy"] == pytest.approx(entropy, **close)
        assert line["normalised_scores"] == pytest.approx(sum(scores) / 8, **close)
        assert line["rewards"] == pytest.approx(sum(r.sum().item() for r in rewards) / 8, **close)
        assert line["values"] == pytest.approx(torch.cat(old_values).mean().item(), **close)
        assert line["returns"] == pytest.approx(torch.cat(returns).mean().item(), **close)
        assert line["missing_eos"] == sum(row[1][-1] != eos for row in rows) / 8
        assert line["tokens"] == sum(len(row[1]) for row in rows)
        for key, value in zip(("policy_loss", "value_loss", "ratio_mean", "clipfrac"), torch.tensor(seen).mean(0).tolist()):
            assert line[key] == pytest.approx(value, **close), key
    assert lines[0]["k3"] == 0 < lines[1]["k3"] and lines[0]["values"] == 0 != lines[1]["values"]
    saved = load_file(Path(args.out) / "adapter_model.safetensors")
    for name, p in policy.named_parameters():
        if p.requires_grad and "lora_B" in name:  # the new adapter is the second half of the saved one
            ours = saved[name.replace(".default", "")][:, 16:]
            assert (ours - p).norm() <= 2e-3 * p.norm(), name


# -- ratio, sampler, scorers -----------------------------------------------------------------------

def test_one_epoch_of_one_minibatch_is_exactly_on_policy(ppo_args, tmp_path):
    """ρ ≡ 1, approx_kl = 0, clipfrac = 0, with several packs: to the last bit, since old log-probs come from the same packs."""
    out = train(tmp_path / "run", **{**ppo_args, "epochs": 1, "minibatches": 1, "micro_tokens": 96})
    for line in log(out):
        assert (line["ratio_mean"], line["ratio_max"], line["approx_kl"], line["clipfrac"]) == (1, 1, 0, 0)
        assert abs(line["policy_loss"]) < 1e-6  # the mean of whitened advantages
        assert line["sampler_gap"] < 1e-5 and 0 <= line["sampler_k3"] < 1e-9 and line["sampler_gap_max"] < 1e-4
    assert log(out)[-1]["kl"] != 0


def test_importance_weights_by_hand_and_in_the_loss(ppo_args, tmp_path):
    """min(π_old/q, cap); π_old = q in a run, so that below a cap of ½ every token weighs ½: half the policy's gradient."""
    old, log_ratios = torch.tensor([-2.0, -0.1, -1.0]), torch.tensor([-1.0, 0.5, 3.0])
    assert ppo.importance_weights(old, old - log_ratios, 2.0).tolist() == pytest.approx([math.exp(-1), math.exp(0.5), 2])
    assert ppo.importance_weights(old, old - log_ratios, 0.0).tolist() == [1, 1, 1]
    one = {**ppo_args, "updates": 1, "epochs": 1, "minibatches": 1}
    plain, capped = (log(train(tmp_path / str(cap), **one, importance_cap=cap))[0] for cap in (0.0, 0.5))
    assert "importance_capped" not in plain and capped["importance_capped"] == 1
    assert capped["grad_norm"] == pytest.approx(plain["grad_norm"] / 2, rel=1e-4) and plain["grad_norm"] > 0
    assert capped["critic_grad_norm"] == pytest.approx(plain["critic_grad_norm"], rel=1e-6)


def test_a_policy_that_did_not_sample_is_noticed(ppo_args, tmp_path, monkeypatch):
    """Old log-probs at another temperature than the loss's: the first mini-batch's ratio is not 1."""
    right = common.logprobs_and_entropy
    monkeypatch.setattr(common, "logprobs_and_entropy", lambda policy, pack, t: right(policy, pack, 1.3 * t))
    with pytest.raises(AssertionError, match="not the one that sampled"):
        train(tmp_path / "run", **{**ppo_args, "max_gap": 10.0})


def test_a_sampler_of_stale_weights_is_stopped(ppo_args, tmp_path, monkeypatch, capsys):
    """A sampler that keeps the first weights: recomputed old log-probs would hide it, the gap doesn't."""
    monkeypatch.setattr(common.Sampler, "refresh", lambda self, policy: None)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", **{**ppo_args, "lr": 3e-2})
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "sampler and trainer disagree at update 1" in error and "--max-gap" in error
    assert not (tmp_path / "run" / "run.json").exists() and len(log(tmp_path / "run")) == 1


def test_critic_starts_at_zero_beside_an_untouched_reward_model(ppo_args, reward_run, tiny_model, tmp_path, monkeypatch):
    """The critic is the reward adapter with a head of zeros; training it leaves the reward model's scores bit-identical."""
    kept = {}
    load = common.load_scorers
    monkeypatch.setattr(common, "load_scorers", lambda *a: kept.setdefault("scorers", load(*a)))
    train(tmp_path / "run", **{**ppo_args, "lr": 1e-2})
    scorers = kept["scorers"]
    g = torch.Generator().manual_seed(0)
    examples = [common.Example.completion(torch.randint(3, 300, (5,), generator=g).tolist(), [7, 9, 2]) for _ in range(6)]
    alone = common.load_reward(tiny_model, reward_run, dtype=torch.float32)
    scores = common.score_examples(common.use_scorer(scorers, "reward"), examples, 512)
    assert torch.equal(scores, common.score_examples(alone, examples, 512))
    assert common.head_of(scorers, "critic").weight.abs().max() > 0
    trained = dict(scorers.named_parameters())
    moved = [n for n, p in trained.items() if ".critic." in n and not torch.equal(p, trained[n.replace(".critic.", ".reward.")])]
    assert len(moved) == 2 * 14 + 1  # A and B of seven projections in two layers, and the head
    assert log(tmp_path / "run")[0]["values"] == 0 and log(tmp_path / "run")[-1]["values"] != 0


def test_a_value_is_read_at_the_token_before_the_action(tiny_model, reward_run):
    model = common.load_reward(tiny_model, reward_run, dtype=torch.float32)
    prompt, answers = [5, 6, 7, 8], [[9, 10, 11], [12, 2]]
    (pack,) = fast.pack([common.Example.completion(prompt, a) for a in answers], 64)
    values = common.token_values(model, pack)
    by_example = dict(zip(pack.examples, values.split(pack.counts.tolist())))
    scorer = PeftModel.from_pretrained(plain(tiny_model), reward_run).eval()
    head = load_file(Path(reward_run) / "adapter_model.safetensors")["base_model.model.score.weight"][0]
    for i, a in enumerate(answers):
        with torch.no_grad():
            hidden = scorer(torch.tensor([prompt + a]), use_cache=False, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(by_example[i], hidden[3:3 + len(a)] @ head, atol=1e-5, rtol=0)


# -- what a run writes ----------------------------------------------------------------------------

def test_run_directory_and_results(ppo_run, ppo_args, reward_run, sft_run):
    assert {p.name for p in Path(ppo_run).iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "run.json", "log.jsonl", "curves.png", "README.md", "prompts.json", "completions.jsonl"}
    run, scorer = record(ppo_run), record(reward_run)
    assert run["parent"]["config_hash"] == record(sft_run)["config_hash"]
    assert run["scorers"] == {"reward": {k: scorer[k] for k in ("name", "method", "config_hash", "adapter_sha256", "family")}}
    assert run["data_sources"] == {"prompts": {}}  # the rows name no source
    lines = log(ppo_run)
    assert [line["step"] for line in lines] == [0, 1, 2]
    results = json.loads(next(Path(ppo_args["results"]).glob("ppo/ppo_v1-*.json")).read_text())
    assert results["curves"]["kl"] == [line["kl"] for line in lines] and results["updates"] == 3
    assert next(Path(ppo_args["results"]).glob("ppo/ppo_v1-*.png")).stat().st_size > 10_000
    answers = [json.loads(line) for line in (Path(ppo_run) / "completions.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    for when in ("before", "after"):
        found = [a[when]["scores"] for a in answers if a[when]["scores"] is not None]
        assert results[when]["scores"] == (pytest.approx(sum(found) / len(found)) if found else None)
        assert results[when]["missing_eos"] == 1 - len(found) / 4 == run["metrics"][f"missing_eos_{when}"]
        assert results[when]["completion_tokens"] == sum(a[when]["completion_tokens"] for a in answers) / 4
    assert any(a["before"]["text"] != a["after"]["text"] for a in answers)
    changes = [a["after"]["scores"] - a["before"]["scores"] for a in answers if None not in (a["after"]["scores"], a["before"]["scores"])]
    expected = statistics.fmean(changes) if len(changes) > 1 else None
    ends = run["metrics"]["scores_change_interval"]
    assert ends == expected if expected is None else sum(ends) / 2 == pytest.approx(expected, abs=1e-5)


def test_the_change_of_a_score_is_paired():
    """Changes 1, 2 and 3 of the answers that ended both times: 2 ± 1.96 · 1 / √3; the rest tells nothing."""
    def answers(scores):
        return [{"text": "", "scores": s, "missing_eos": s is None} for s in scores]
    found = ppo.score_changes(answers([0.0, 5.0, 1.0, None, 9.0]), answers([1.0, 7.0, 4.0, 3.0, None]))
    assert found == {"scores_change_interval": pytest.approx([2 - 1.96 / 3**0.5, 2 + 1.96 / 3**0.5])}
    assert ppo.score_changes(answers([None]), answers([1.0])) == {"scores_change_interval": None}


def test_saved_adapter_is_the_trained_policy_on_the_pretrained_base(ppo_args, tiny_model, tmp_path, monkeypatch):
    """The policy at the end = plain PEFT on the pretrained base, with no knowledge of the chain."""
    seen, save = {}, common.Run.save
    sequences = [common.Example.completion([5, 6, 7], [8, 9, 10, 11]), common.Example.completion([20, 21], [22, 2])]
    (pack,) = fast.pack(sequences, 64)

    def keep(self, policy, tokenizer, prompts):
        with torch.no_grad():
            seen["trained"] = common.token_logprobs(policy, pack)
            with common.reference(policy):
                seen["reference"] = common.token_logprobs(policy, pack)
        save(self, policy, tokenizer, prompts)
    monkeypatch.setattr(common.Run, "save", keep)
    out = train(tmp_path / "run", **ppo_args)
    loaded = PeftModel.from_pretrained(plain(tiny_model), out).eval()
    found = []
    with torch.no_grad():
        for i in pack.examples:
            prompt, answer = sequences[i].ids[:-len(sequences[i].targets)], sequences[i].targets
            logits = answer_logits(loaded, prompt, answer)[0]
            found.append(logits.log_softmax(-1)[torch.arange(len(answer)), answer])
    torch.testing.assert_close(torch.cat(found), seen["trained"], atol=1e-5, rtol=0)
    assert (seen["trained"] - seen["reference"]).abs().max() > 1e-3
    assert json.loads((Path(out) / "adapter_config.json").read_text())["r"] == 32


def test_a_second_scorer_is_logged_and_changes_nothing(ppo_args, ppo_run, reward_args, tmp_path):
    reward.main(reward.Args(**{**reward_args, "seed": 7, "results": str(tmp_path)}, out=str(tmp_path / "rm_b")))
    out = train(tmp_path / "run", **{**ppo_args, "watch_adapter": str(tmp_path / "rm_b"), "results": str(tmp_path)})
    one, two = (load_file(Path(d) / "adapter_model.safetensors") for d in (ppo_run, out))
    assert all(torch.equal(one[k], two[k]) for k in one)
    for a, b in zip(log(ppo_run), log(out)):
        assert a["watch_scores"] is None and (b["watch_scores"] is None) == (b["scores"] is None)
        assert b["watch_scores"] != b["scores"] or b["scores"] is None
    assert record(out)["metrics"]["watch_scores_before"] != record(out)["metrics"]["watch_scores_after"]
    assert record(out)["config_hash"] != record(ppo_run)["config_hash"]


def test_adaptive_kl_moves_beta_from_update_to_update(ppo_args, tmp_path):
    lines = log(train(tmp_path / "run", **{**ppo_args, "kl_target": 0.05, "beta": 0.1}))
    for before, after in zip(lines, lines[1:]):
        assert after["beta"] == pytest.approx(ppo.adapted_beta(before["beta"], before["kl"], 0.05)) != before["beta"]


# -- resume, ranks, micro-batches -----------------------------------------------------------------

def test_stopped_after_every_update(ppo_args, ppo_run, tmp_path, monkeypatch):
    """One update a process life: the adapter, the log and the answers are those of a run that was never stopped."""
    write_log, stop_at = common.Run.log, []

    def log_and_stop(self, step, *line):
        write_log(self, step, *line)
        if step in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(common.Run, "log", log_and_stop)
    args = {**ppo_args, "checkpoint_every": 100, "results": str(tmp_path)}
    for step in range(3):
        stop_at[:] = [step]
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "ppo_v1", **args)
        assert stop.value.code == 128 + signal.SIGTERM
        tensors = load_file(tmp_path / "ppo_v1" / "checkpoint" / "state.safetensors")
        policy, critic = (len(tensors[f"parameter/{i}"]) for i in (0, 1))
        assert critic == policy + 64  # the critic's head
    stop_at.clear()
    out = train(tmp_path / "ppo_v1", **args)
    a, b = (load_file(Path(d) / "adapter_model.safetensors") for d in (out, ppo_run))
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert log(out) == log(ppo_run) and record(out)["metrics"] == record(ppo_run)["metrics"]
    assert (Path(out) / "completions.jsonl").read_text() == (Path(ppo_run) / "completions.jsonl").read_text()


def test_micro_tokens_and_ranks_do_not_change_the_update(ppo_args, ppo_run, tmp_path):
    """Packs of one or two completions, and two ranks (gloo): the same rollouts, log and weights to float tolerance."""
    small = train(tmp_path / "ppo_v1", **{**ppo_args, "micro_tokens": 96, "results": str(tmp_path / "small")})
    args = {**ppo_args, "out": str(tmp_path / "ranks" / "ppo_v1"), "results": str(tmp_path / "two")}
    flags = [w for k, v in args.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           str(REPO / "ppo.py"), *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    whole = load_file(Path(ppo_run) / "adapter_model.safetensors")
    for run in (small, args["out"]):
        for mine, theirs in zip(log(run), log(ppo_run), strict=True):
            assert mine["tokens"] == theirs["tokens"]  # the same completions
            for key in ("scores", "kl", "policy_loss", "value_loss", "entropy", "grad_norm"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-3), (key, mine["step"])
        assert log(run)[0]["grad_norm"] == pytest.approx(log(ppo_run)[0]["grad_norm"], rel=1e-2)
        found = load_file(Path(run) / "adapter_model.safetensors")
        ours, theirs = (torch.cat([w[k].flatten() for k in sorted(w) if "lora_B" in k]) for w in (found, whole))
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()
    answers = [[json.loads(line)["before"]["text"] for line in (Path(d) / "completions.jsonl").read_text().splitlines()]
               for d in (ppo_run, small, args["out"])]
    assert answers[0] == answers[1] == answers[2]


# -- learning -------------------------------------------------------------------------------------

def share_of_odd_tokens(model, examples, micro_tokens, unit=1, device="cpu"):
    """A programmatic score in the reward model's place: how many of the answer's tokens have an odd id (EOS has not)."""
    return tensor([sum(t % 2 for t in e.targets) / len(e.targets) for e in examples])


@pytest.mark.parametrize("beta, climbs", [(0.01, True), (20.0, False)])
def test_it_climbs_a_programmatic_score_and_a_large_beta_holds_it(ppo_args, tmp_path, monkeypatch, beta, climbs):
    """36 updates raise the score, 0 for an answer that doesn't end, from under 0.12 by over 0.15 while the KL stays below
    10 nats a completion; with β = 20 and all else equal it moves by less than 0.08 and the KL stays below 1."""
    monkeypatch.setattr(common, "score_examples", share_of_odd_tokens)
    out = train(tmp_path / "run", **{
        **ppo_args, "beta": beta, "updates": 36, "batch_size": 16, "lr": 3e-3, "normalise": 0, "missing_eos": 0.0,
        "temperature": 1.0, "minibatches": 1, "epochs": 4, "completion_tokens": 8, "results": str(tmp_path),
        "checkpoint_every": 100, "max_gap": 1e-3})
    lines = log(out)
    early, late = (sum(line["normalised_scores"] for line in part) / len(part) for part in (lines[:2], lines[-10:]))
    print(beta, early, late, [round(line["kl"], 2) for line in lines[::5]])
    assert early < 0.12
    if climbs:
        assert late > early + 0.15 and max(line["kl"] for line in lines) < 10
    else:
        assert abs(late - early) < 0.08 and max(line["kl"] for line in lines) < 1


# -- bad input ------------------------------------------------------------------------------------

@pytest.fixture
def refused(tmp_path, capsys, monkeypatch, ppo_args):
    """refused(parts, **changes): exit code 2 before a model loads, one error that has the parts, nothing written."""
    def loads(*args, **kwargs):
        raise AssertionError("a model was loaded")

    def check(*parts, **changes):
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loads)
            train(tmp_path / "new" / "run", **{**ppo_args, "results": str(tmp_path / "results"), **changes})
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
        assert [part for part in parts if str(part) not in error] == [], error
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    return check


def test_a_policy_is_no_reward_model(refused, sft_run):
    refused(sft_run, "no score head", reward_adapter=sft_run)
    refused(sft_run, "no score head", watch_adapter=sft_run)


def test_a_reward_model_is_no_policy(refused, reward_run):
    refused(reward_run, "is a reward model, not a policy", sft_adapter=reward_run)


def test_a_reward_model_of_another_base(refused, reward_args, tmp_path):
    other = make_model(tmp_path / "other", seed=5)
    reward.main(reward.Args(**{**reward_args, "model": other, "results": str(tmp_path)}, out=str(tmp_path / "rm")))
    refused(tmp_path / "rm", "was trained on base weights", common.weights_sha256(other)[:8],
            reward_adapter=str(tmp_path / "rm"))


def test_a_reward_model_of_another_quantisation(refused, reward_run, tmp_path):
    copy = shutil.copytree(reward_run, tmp_path / "rm")
    run = record(copy)
    run["invariants"]["quantization"] = "qlora"
    run["train_invariants"] = common.sha256_json(run["invariants"])[:8]
    (copy / "run.json").write_text(json.dumps(run))
    refused("other invariants", "qlora", reward_adapter=str(copy))


def test_the_reward_model_does_not_watch_itself(refused, reward_run, tmp_path):
    copy = shutil.copytree(reward_run, tmp_path / "rm")
    refused(copy, "the reward model itself", watch_adapter=str(copy))


@pytest.mark.parametrize("role", ["train", "heldout"])
def test_prompts_of_the_reward_model(refused, reward_run, ppo_args, tmp_path, role):
    """Training prompts can't come up (they are of part A) unless the split is tampered with; held-out ones can."""
    rows = [json.loads(line) for line in Path(ppo_args["data"]).read_text().splitlines()]
    at, row = next((i, r) for i, r in enumerate(rows) if part_of(r["prompt"]) == "B")
    copy = shutil.copytree(reward_run, tmp_path / "rm")
    listed = json.loads((copy / "prompts.json").read_text())
    listed[role].append(inputs.prompt_id(row["prompt"]))
    (copy / "prompts.json").write_text(json.dumps(listed))
    refused(f"row {at}", f"the {role} prompts of {copy}", reward_adapter=str(copy))


def test_a_reward_model_lists_its_prompts(reward_run, reward_args, refused, tmp_path):
    rows = [json.loads(line) for line in Path(reward_args["data"]).read_text().splitlines()]
    heldout = [json.loads(line) for line in Path(reward_args["data"].replace(".jsonl", "_heldout.jsonl")).read_text().splitlines()]
    listed = json.loads((Path(reward_run) / "prompts.json").read_text())
    assert len(listed["train"]) == reward_args["rows"] and len(listed["heldout"]) == record(reward_run)["metrics"]["heldout_pairs"]
    assert set(listed["train"]) < {inputs.prompt_id(r["prompt"]) for r in rows if part_of(r["prompt"]) == "A"}
    assert set(listed["heldout"]) <= {inputs.prompt_id(r["prompt"]) for r in heldout}
    copy = shutil.copytree(reward_run, tmp_path / "rm")
    (copy / "prompts.json").unlink()
    refused("no prompts.json", "train it again", reward_adapter=str(copy))


def test_sizes_that_do_not_fit(refused):
    refused("--batch-size 8 is not a multiple of --minibatches 3", minibatches=3)
    refused("--prompt-tokens 510 + --completion-tokens 12", "512 positions", prompt_tokens=510)
    refused("--micro-tokens 64", micro_tokens=64)
    refused("usable prompts in part B, too few for one fixed prompt and --minibatches 64", batch_size=64,
            minibatches=64)


@pytest.mark.parametrize("name, value", [("beta", -0.1), ("kl_target", -1.0), ("normalise", -1), ("clip", 0.0),
                                         ("temperature", 0.0), ("gamma", 1.5), ("lam", -0.1), ("epochs", 0),
                                         ("updates", 0), ("max_gap", 0.0), ("beta", math.nan)])
def test_numbers_out_of_range(refused, name, value):
    refused(f"--{name.replace('_', '-')} must be", **{name: value})


@pytest.mark.parametrize("rows, part", [([{"text": "why"}], "columns text; want"), ([{"prompt": [{"role": "user"}]}], "row 0"),
                                        ([{"prompt": f"{' ' * i}"} for i in range(30)], "no usable row")])
def test_rows_without_a_prompt(refused, tmp_path, rows, part):
    refused(part, data=write_jsonl(tmp_path / "bad.jsonl", rows))


def test_prompts_that_are_too_long_are_counted(refused):
    refused("too long", "more than 15%", prompt_tokens=20)


def test_a_reward_that_is_not_a_number(ppo_args, reward_run, tmp_path):
    """A head of NaN, with a hash that fits: the run stops before its first update and names the rows."""
    copy = shutil.copytree(reward_run, tmp_path / "rm")
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"][:] = math.nan
    save_file(tensors, copy / "adapter_model.safetensors", {"format": "pt"})
    run = record(copy)
    run["adapter_sha256"] = common.tensors_sha256([copy / "adapter_model.safetensors"])
    (copy / "run.json").write_text(json.dumps(run))
    with pytest.raises(FloatingPointError, match=r"scores.*at step 0; rows of the data set in it: \[\d+"):
        train(tmp_path / "run", **{**ppo_args, "reward_adapter": str(copy), "results": str(tmp_path)})
    assert not (tmp_path / "run" / "run.json").exists()
