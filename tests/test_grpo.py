"""GRPO: its maths by independent derivation, an update against a loop over single answers, the verifier, tasks, what it
logs and saves, what it learns, what it refuses. Tolerance 1e-5 in fp32 unless a test says why not."""
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import OWN_TASK, make_model, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from torch import tensor
from transformers import AutoModelForCausalLM

import common
import fast
import grpo
import inputs
import sft

REPO = Path(common.__file__).parent
TIMES = ("seconds", "tokens_per_s", "rollout_tokens_per_s", "learn_tokens_per_s")


def record(run):
    return json.loads((Path(run) / "run.json").read_text())


def log(run):
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def train(out, **args):
    grpo.main(grpo.Args(**args, out=str(out)))
    return str(out)


def task_file(directory, reward, rows='[{"prompt": f"{i} why is the sky blue", "i": i} for i in range(60)]'):
    """A task of one's own; `reward` is the body of the function, `rows` an expression."""
    path = directory / "own.py"
    path.write_text((f"def rows():\n    return {rows}\n\n" if rows else "") + f"def reward(row, completion):\n    {reward}\n")
    return str(path)


# -- advantages, loss, weights --------------------------------------------------------------------

def test_advantages_by_hand():
    """One right of eight: (1 − ⅛)/(√⅛ + 1e-4) = 2.4743, since with n − 1 below the variance is (7/8)/7 = ⅛; and −0.3535.

    Without the sd: 7/8 and −1/8. Equal rewards give 0 exactly, also where their mean is rounded.
    """
    rewards = torch.zeros(1, 8, dtype=torch.float64)
    rewards[0, 2] = 1
    scaled, plain = grpo.group_advantages(rewards, "std"), grpo.group_advantages(rewards, "none")
    assert scaled[0, 2].item() == pytest.approx(0.875 / (math.sqrt(1 / 8) + 1e-4)) == pytest.approx(2.4742, abs=1e-4)
    assert scaled[0, 0].item() == pytest.approx(-0.125 / (math.sqrt(1 / 8) + 1e-4))
    assert plain[0].tolist() == [-0.125] * 2 + [0.875] + [-0.125] * 5
    equal = torch.full((1, 6), 0.1, dtype=torch.float64)
    assert equal.mean() != equal[0, 0]
    assert all((grpo.group_advantages(equal, name) == 0).all() for name in ("std", "none"))


def test_advantages_group_by_group():
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(5, 6, generator=g, dtype=torch.float64)
    for name in ("std", "none"):
        found = grpo.group_advantages(rewards, name)
        for group, a in zip(rewards.tolist(), found.tolist()):
            below = statistics.stdev(group) + 1e-4 if name == "std" else 1
            assert a == pytest.approx([(r - statistics.mean(group)) / below for r in group])


@pytest.mark.parametrize("ratio, advantage, loss, slope", [
    # −A min(ρ, 1.28) for A > 0, −A max(ρ, 0.8) for A < 0; slope d/dlogπ = −Aρ, or 0 where the clip holds
    (1.0, 2.0, -2.0, -2.0), (1.25, 2.0, -2.5, -2.5), (1.5, 2.0, -2.56, 0.0), (0.5, 2.0, -1.0, -1.0),
    (1.0, -2.0, 2.0, 2.0), (0.9, -2.0, 1.8, 1.8), (0.5, -2.0, 1.6, 0.0), (1.5, -2.0, 3.0, 3.0), (1.5, 0.0, 0.0, 0.0)])
def test_policy_loss_with_clip_higher_by_hand(ratio, advantage, loss, slope):
    old = tensor([-1.5])
    logprobs = (old + math.log(ratio)).requires_grad_()
    found = grpo.policy_loss(logprobs, old, tensor([advantage]), 0.2, 0.28)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=1e-5) and logprobs.grad.item() == pytest.approx(slope, abs=1e-5)


def test_k3_against_the_exact_kl_and_its_direction():
    """Of a categorical: E_π[k3] = KL(π‖ref), which is not KL(ref‖π); k3 ≥ 0, 0 only where they agree."""
    pi, ref = tensor([0.7, 0.2, 0.1]).double(), tensor([0.1, 0.1, 0.8]).double()
    forward = sum(p * math.log(p / q) for p, q in zip(pi.tolist(), ref.tolist()))
    backward = sum(q * math.log(q / p) for p, q in zip(pi.tolist(), ref.tolist()))
    k3 = grpo.k3(pi.log(), ref.log())
    assert (pi * k3).sum().item() == pytest.approx(forward) and abs(forward - backward) > 0.05
    assert (k3 > 0).all() and grpo.k3(pi.log(), pi.log()).abs().max() == 0


@pytest.mark.parametrize("aggregate, expected", [
    # three answers of 1, 3 and 6 tokens whose token losses are 6, 2 and −1, L = 12
    ("sequence", (6 + 2 - 1) / 3),          # mean over answers of their token means
    ("token", (6 + 3 * 2 - 6 * 1) / 10),    # mean over the ten tokens
    ("fixed", (6 + 3 * 2 - 6 * 1) / (3 * 12))])
def test_aggregation_of_unequal_lengths_by_hand(aggregate, expected):
    lengths, losses = tensor([1, 3, 6]), [6.0, 2.0, -1.0]
    weights = grpo.token_weights(lengths, aggregate, 12)
    assert sum(w * n * x for w, n, x in zip(weights.tolist(), lengths.tolist(), losses)) == pytest.approx(expected)
    doubled = grpo.token_weights(tensor([2, 6, 12]), aggregate, 12)  # length counts in one of the three only
    torch.testing.assert_close(doubled * (1 if aggregate == "fixed" else 2), weights)


@pytest.mark.parametrize("n, c", [(4, 0), (4, 1), (6, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c):
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        assert grpo.pass_at_k(n, c, k) == pytest.approx(sum(min(s) < c for s in subsets) / len(subsets))
    assert grpo.pass_at_k(n, c, 1) == pytest.approx(c / n)


def test_learning_rate():
    args = grpo.Args(lr=1.0)
    rates = [grpo.learning_rate(t, 100, args) for t in range(100)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 97 / 97]) and rates[-1] == pytest.approx(1 / 97)


# -- the verifier ---------------------------------------------------------------------------------

@pytest.mark.parametrize("text, number", [
    ("so\n#### 1,000", 1000), ("#### 18.0", 18), ("#### -3", -3), ("#### $5", 5), ("#### -$5", -5), ("#### $-5", -5),
    ("####7", 7), ("#### 18.", 18), ("#### 0.125", 0.125), ("####\n 12 \n", 12), ("#### 1,234,567.50", 1234567.5),
    ("#### 5\nNo, wait.\n#### 6", 5), ("#### 5 apples", 5), ("#### 20%", 20), ("##### 7", None), ("#### 007", 7),
    ("#### -0", 0), ("the answer is 18", None), ("", None), ("####", None), ("#### none, or 5", None), ("#### 1,00", None),
    ("#### 1,0000", None), ("#### 1.2.3", None), ("#### 1/2", None), ("#### 3rd", None), ("#### 5e3", None),
    ("#### --5", None), ("#### -$-5", None), ("#### \u0663", None), ("#### \uff11\uff18", None), ("#### 1\uff18", None),
    ("#### \u22125", None), ("#### \u00b2", None), ("#### " + "9" * 5000, None), ("#### inf", None), ("#### nan", None)])
def test_the_number_after_the_first_marker(text, number):
    assert grpo.final_number(text) == number


def test_no_rounding_and_no_evaluation(tmp_path):
    """0.1 + 0.2 is not 0.3 in floats, here it is; code in an answer is text."""
    assert grpo.final_number("#### 0.30000000000000000000000001") != grpo.final_number("#### 0.3")
    assert grpo.number_reward({"answer": "#### 0.30"}, "#### 0.3")["correct"] == 1
    marker = tmp_path / "ran"
    assert grpo.final_number(f"#### __import__('pathlib').Path({str(marker)!r}).touch()") is None and not marker.exists()
    assert grpo.final_number("#### 2**3") == 2 and grpo.final_number("#### (4)") is None


@pytest.mark.parametrize("text, correct, flexible, tidy", [
    ("5 + 13 = 18\n#### 18", 1, 1, 1), ("So\n#### 18.0\n", 1, 1, 1), ("I think #### $18", 1, 1, 1), ("So\n#### 17", 0, 0, 1),
    ("#### 18", 1, 1, 0), ("\n **\n#### 18", 1, 1, 0),  # nothing is worked out before the marker
    ("So\n#### 18 apples", 1, 1, 0), ("So\n#### 18\n#### 18", 1, 1, 0), ("So\n#### 17\n#### 18", 0, 1, 0),
    ("So\n#### 18\nbecause", 1, 1, 0), ("18", 0, 1, 0), ("", 0, 0, 0), ("\\boxed{18}", 0, 1, 0),
    ("5 + 13 = 18, so Ann has $18.00.", 0, 1, 0), ("18 in all, 3 each", 0, 0, 0), ("10-18", 0, 1, 0), ("a18", 0, 0, 0)])
def test_correctness_form_and_flexible_extraction_apart(text, correct, flexible, tidy):
    """Only correctness is paid by gsm8k, and only the form by gsm8k:format."""
    parts = {"correct": correct, "flexible": flexible, "format": tidy}
    assert grpo.number_reward({"answer": "#### 18"}, text) == parts
    problem = grpo.Problem(0, "", [], "", {"answer": "#### 18"})
    for task, paid in (("gsm8k", correct), ("gsm8k:format", tidy)):
        (found,) = grpo.load_task(grpo.Args(task=task)).rewards([(problem, common.Completion([], [], "eos", text))])
        assert found == grpo.Score(paid, parts) and found.solved == bool(correct)


@pytest.mark.parametrize("answer", ["#### many", "so 18", ""])
def test_a_row_without_a_number_is_never_right(answer):
    """By no answer, one without a number included. (read_question refuses such rows of a data set.)"""
    for text in ("", "no number", "so\n#### many", "so\n#### 18"):
        parts = grpo.number_reward({"answer": answer}, text)
        assert parts["correct"] == parts["flexible"] == 0


# -- tasks and rows -------------------------------------------------------------------------------

def data_of(**args):
    args = grpo.Args(**args)
    task = grpo.load_task(args)
    return task, *grpo.read_data(task, args)


def heldout(found):
    return [item for item in found[3] if item]


def test_gsm8k_splits_7473_rows_into_7000_and_473(tmp_path):
    """By sha256 of the prompt: the same 473 in any order of the rows, and none of them is trained on."""
    rows = [{"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(7473)]
    held = heldout(data_of(data=write_jsonl(tmp_path / "a.jsonl", rows)))
    kept = data_of(data=str(tmp_path / "a.jsonl"))[2]
    assert len(held) == 473 and sum(r is not None for r in kept) == 7000 and len(kept) == 7473
    again = heldout(data_of(data=write_jsonl(tmp_path / "b.jsonl", rows[::-1])))
    assert {row["question"] for _, row in held} == {row["question"] for _, row in again}
    assert not {row["question"] for _, row in held} & {r[1]["question"] for r in kept if r}
    assert len(heldout(data_of(data=write_jsonl(tmp_path / "c.jsonl", rows[:50])))) == 5  # at most a tenth
    twice = data_of(data=write_jsonl(tmp_path / "d.jsonl", rows[:50] * 2))
    assert len(heldout(twice)) == 5 and sum(r is not None for r in twice[2]) == 90


def test_heldout_rows_of_a_file_are_never_trained_on(tmp_path):
    rows = [{"prompt": f"{i}?", "answer": i} for i in range(20)]
    data = write_jsonl(tmp_path / "x.jsonl", rows)
    write_jsonl(tmp_path / "x_heldout.jsonl", rows[:3] + [{"prompt": "new?", "answer": "7"}])
    _, _, kept, held, fingerprints = data_of(data=data)
    assert [r is None for r in kept] == [True] * 3 + [False] * 17 and len(held) == 4
    assert fingerprints.keys() == {"task", "train", "heldout"}
    other = write_jsonl(tmp_path / "other.jsonl", rows[10:12])
    assert len(data_of(data=data, heldout_data=other)[3]) == 2


def test_layouts_of_a_question_and_what_is_asked():
    """question or prompt, text or messages, a system turn, a plain or marked answer: the same prompt and reward."""
    ask = [("user", "How many?" + inputs.GSM8K_PROMPT)]
    for row in ({"question": "How many?", "answer": "so\n#### 1,200"}, {"prompt": "How many?", "answer": "1200"},
                {"prompt": [{"role": "user", "content": "How many?"}], "answer": 1200}):
        messages, row = grpo.load_task(grpo.Args()).read(row, "here")
        assert [(m["role"], m["content"]) for m in messages] == ask
        assert grpo.number_reward(row, "#### 1200.0")["correct"] == 1
    system = {"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "How many?"}], "answer": 1}
    roles = [m["role"] for m in grpo.load_task(grpo.Args()).read(system, "here")[0]]
    assert roles == ["system", "user"]
    roles = [m["role"] for m in grpo.load_task(grpo.Args(task="arithmetic")).read(system, "here")[0]]
    assert roles == ["system", *["user", "assistant"] * len(grpo.WORKED), "user"]


def test_the_demo_rows_fit(tmp_path):
    _, _, kept, held, _ = data_of(data=str(REPO / "data" / "demo" / "train" / "gsm8k_rl.jsonl"))
    assert len(kept) == 40 and None not in kept and len(held) == 8


def test_arithmetic_is_graded_right_and_the_same_every_time():
    rows = grpo.arithmetic_rows(1, 5)
    assert rows == grpo.arithmetic_rows(1, 5) and rows[:100] == grpo.arithmetic_rows(1, 5, 100) and len(rows) == 4096
    seen = {}
    for i, row in enumerate(rows):
        a, sign, b = re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", row["question"]).groups()
        a, b = int(a), int(b)
        assert int(row["answer"]) == {"+": a + b, "-": a - b, "*": a * b}[sign] >= 0
        assert row["grade"] == 1 + i % 5
        seen.setdefault(row["grade"], set()).add((sign, len(str(a)), len(str(b))))
    assert seen[1] == {("+", 1, 1)} and seen[2] == {("-", 1, 1)} and seen[3] == {("*", 1, 1)}
    assert {("+", 2, 1), ("-", 2, 1)} <= seen[4] and {("+", 2, 2), ("-", 2, 2)} == seen[5]
    assert {r["grade"] for r in grpo.arithmetic_rows(2, 3)} == {2, 3}


def test_arithmetic_holds_problems_of_every_grade_out():
    found = data_of(task="arithmetic")
    kept, held, data = found[2], heldout(found), found[4]
    assert data.keys() == {"task", "train"} and data["task"] == "arithmetic:1-5, correct paid"
    assert {row["grade"] for _, row in held} == {1, 2, 3, 4, 5} and 100 < len(held) <= 473
    assert not {row["question"] for _, row in held} & {r[1]["question"] for r in kept if r}
    for messages, row in held[:5]:
        assert messages[-1]["content"].startswith(row["question"]) and "####" in messages[-1]["content"]
        for question, worked in zip(messages[:-1:2], messages[1::2]):
            assert {*grpo.number_reward({"answer": worked["content"]}, worked["content"]).values()} == {1.0}
    assert len(heldout(data_of(task="arithmetic:1"))) == 10  # of a hundred sums
    assert data_of(task="arithmetic:2-3")[0].identity == "arithmetic:2-3, correct paid"


def test_the_readmes_own_task_runs(grpo_args, tmp_path):
    """The five-line example of README.md, as it stands there."""
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.S)
                  if "def reward(" in code]
    path = tmp_path / "my_task.py"
    path.write_text(example)
    assert len([line for line in example.splitlines() if line.strip() and not line.startswith("#")]) <= 5
    out = train(tmp_path / "run", **{**grpo_args, "task": str(path), "updates": 1, "prompt_tokens": 100,
                                     "results": str(tmp_path)})
    assert "rewards" in log(out)[0]


def test_importance_weights_by_hand():
    log_ratios = torch.tensor([-1.0, 0.0, 0.5, 3.0])
    old = torch.tensor([-2.0, -0.1, -7.0, -1.0])
    assert grpo.importance_weights(old, old - log_ratios, 2.0).tolist() == pytest.approx([math.exp(-1), 1, math.exp(0.5), 2])
    assert grpo.importance_weights(old, old - log_ratios, 0.0).tolist() == [1, 1, 1, 1]


def test_the_cap_weights_the_policys_gradient(grpo_args, tmp_path):
    """Here π_old = q, so that below a cap of ½ every token weighs ½: half the gradient, and the log says that all are capped."""
    plain, capped = (log(train(tmp_path / str(cap), **{**grpo_args, "updates": 1, "eval_every": 0, "beta": 0.0,
                                                       "importance_cap": cap}))[0] for cap in (0.0, 0.5))
    assert "importance_capped" not in plain and capped["importance_capped"] == 1
    assert capped["grad_norm"] == pytest.approx(plain["grad_norm"] / 2, rel=1e-4) and plain["grad_norm"] > 0


SCIENCE = {"dtype", "heldout_rows", "prompt_tokens", "updates", "batch_size", "group_size", "completion_tokens", "temperature",
           "resample_groups", "scale_advantages", "aggregate", "beta", "clip_low", "clip_high", "epochs", "minibatches",
           "eval_every", "pass_k", "lr", "max_grad_norm", "importance_cap", "seed"}


def test_config_hash_knows_a_task_by_its_content(grpo_args, tmp_path):
    invariants = common.TrainInvariants("org/base", "abc", "0" * 64, "", "none")

    def hashed(args, data):
        return common.config_hash("grpo", args, invariants, data, None)
    assert {f.name for f in dataclasses.fields(grpo.Args)} - common.RUN_KNOBS == SCIENCE
    one = data_of(**grpo_args)[-1]
    moved = str(shutil.copy(grpo_args["task"], tmp_path / "elsewhere.py"))
    args = grpo.Args(**{**grpo_args, "task": moved})
    two = grpo.read_data(grpo.load_task(args), args)[-1]
    assert hashed(grpo.Args(**grpo_args), one) == hashed(args, two)
    Path(moved).write_text(OWN_TASK.replace("0.1", "0.2"))
    three = grpo.read_data(grpo.load_task(args), args)[-1]
    assert hashed(args, three) != hashed(args, two) and three["train"] == two["train"]
    assert hashed(dataclasses.replace(args, beta=0.0), two) != hashed(args, two)


# -- whole runs against a loop over single answers -----------------------------------------------

def plain(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)


def answer_logprobs(model, prompt, answer, temperature):
    """[T] of the answer's tokens, by the library's own forward on one sequence, and the entropies."""
    logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1:-1] / temperature
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return logits.log_softmax(-1)[torch.arange(len(answer)), answer], entropy


@pytest.fixture
def rollouts(monkeypatch):
    """[(salt, groups)] of every rollout of a run, held-out ones too."""
    seen, real = [], grpo.roll_out

    def keep(*args):
        seen.append((args[7:], real(*args)))
        return seen[-1][1]
    monkeypatch.setattr(grpo, "roll_out", keep)
    return seen


@pytest.mark.parametrize("options", [
    dict(micro_tokens=96), dict(micro_tokens=10_000, beta=0.0, aggregate="token", scale_advantages="none"),
    dict(micro_tokens=160, epochs=2, minibatches=2, beta=0.1, aggregate="fixed", clip_low=0.02, clip_high=0.03),
    dict(epochs=2, minibatches=2, beta=0.0, aggregate="sequence", clip_high=0.01)], ids=str)
def test_updates_are_the_loop_over_single_answers(tiny_model, sft_run, grpo_args, tmp_path, rollouts, options):
    """Two updates, from unpacked forwards of the library's modules: gradients' norms, what is logged, final weights.

    The loop runs every answer, those of groups with equal rewards too: with β = 0 the run left them out, and the
    gradient is the same. Only the sampled answers and the order of mini-batches are taken from the run.
    """
    args = grpo.Args(**{**grpo_args, "updates": 2, "temperature": 0.8, "eval_every": 0, "lr": 1e-3, "results": str(tmp_path),
                        "batch_size": 6, **options}, out=str(tmp_path / "run"))
    grpo.main(args)
    lines, L, P, G = log(args.out), args.completion_tokens, 6, 4
    batches = [groups for salt, groups in rollouts if salt[0] == "update"]
    reference = PeftModel.from_pretrained(plain(tiny_model), sft_run).merge_and_unload()
    merged = PeftModel.from_pretrained(plain(tiny_model), sft_run).merge_and_unload()
    torch.manual_seed(args.seed)
    policy = common.add_lora(merged)
    params = [p for p in policy.parameters() if p.requires_grad]
    optimizer, step, steps = torch.optim.Adam(params, lr=args.lr), 0, 2 * args.epochs * args.minibatches
    equal = 0
    for update, groups in enumerate(batches):
        answers = []  # (prompt, ids, A, old, ref)
        for g in groups:
            rewards = [s.reward for s in g.scores]
            equal += len(set(rewards)) == 1
            for reward, c in zip(rewards, g.completions):
                a = reward - statistics.mean(rewards)
                a /= statistics.stdev(rewards) + 1e-4 if args.scale_advantages == "std" else 1
                with torch.no_grad():
                    old, entropy = answer_logprobs(policy, g.problem.ids, c.ids, 0.8)
                    ref, _ = answer_logprobs(reference, g.problem.ids, c.ids, 0.8)
                answers.append((g.problem.ids, c.ids, a if len(set(rewards)) > 1 else 0.0, old, ref, entropy, c.logprobs))
        used = [x for x in answers if args.beta or x[2]]
        mean = {"entropy": torch.cat([x[5] for x in used]).mean(),
                "sampler_gap": (torch.cat([x[3] for x in used]) - tensor([lp for x in used for lp in x[6]])).abs().mean()}
        mean["kl"] = torch.stack([(x[3] - x[4]).sum() for x in answers]).mean()  # of all, also of those not trained on
        mean["k3"] = torch.stack([((x[4] - x[3]).exp() - 1 - (x[4] - x[3])).sum() for x in answers]).mean()
        losses, ratios, norms = [], [], []
        for epoch in range(args.epochs):
            order = common.permutation(P, args.seed, "minibatches", update, epoch)
            for at in range(0, P, P // args.minibatches):
                part = [answers[p * G + i] for p in order[at:at + P // args.minibatches] for i in range(G)]
                loss = whole = 0.0
                for prompt, ids, a, old, ref, _, _ in part:
                    logprobs, _ = answer_logprobs(policy, prompt, ids, 0.8)
                    ratio = (logprobs - old).exp()
                    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
                    token = torch.stack([-torch.min(r * a, c * a) for r, c in zip(ratio, clipped)])
                    kl = (ref - logprobs).exp() - (ref - logprobs) - 1
                    below = {"sequence": len(part) * len(ids), "token": sum(len(x[1]) for x in part),
                             "fixed": len(part) * L}[args.aggregate]
                    loss = loss + (token.sum() + args.beta * kl.sum()) / below
                    whole += token.sum().item() / below
                    if args.beta or a:
                        ratios += ratio.tolist()
                loss.backward()
                losses.append(whole)
                norms.append(torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm).item())
                optimizer.param_groups[0]["lr"] = grpo.learning_rate(step, steps, args)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
        line, outside = lines[update], [r < 1 - args.clip_low or r > 1 + args.clip_high for r in ratios]
        for key, value in mean.items():
            assert line[key] == pytest.approx(value.item(), abs=2e-5), key
        assert line["policy_loss"] == pytest.approx(statistics.mean(losses), abs=1e-5)
        assert line["grad_norm"] == pytest.approx(statistics.mean(norms), rel=1e-3) and min(norms) > 1e-3
        assert line["ratio_mean"] == pytest.approx(statistics.mean(ratios), abs=1e-4)
        assert line["ratio_max"] == pytest.approx(max(ratios), rel=1e-3)
        assert line["clipfrac"] == pytest.approx(statistics.mean(outside), abs=0.02)
        assert (line["clipfrac"] > 0.05) == (args.epochs > 1)
    assert equal > 0  # there was something to leave out
    saved = load_file(Path(args.out) / "adapter_model.safetensors")
    ours, theirs = [], []
    for name, p in policy.named_parameters():
        if p.requires_grad and "lora_B" in name:  # the new adapter is the second half of the saved one
            ours.append(saved[name.replace(".default", "")][:, 16:].flatten())
            theirs.append(p.detach().flatten())
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    assert (ours - theirs).norm() <= 2e-3 * theirs.norm()  # Adam's first steps magnify the rounding of small gradients


def test_without_kl_only_answers_with_an_advantage_are_trained_on(grpo_args, tmp_path, rollouts, monkeypatch):
    """Nothing else gets a gradient, and one optimizer step takes one such forward; the reference is asked about all."""
    packed, real = [], common.placed_batches
    monkeypatch.setattr(common, "placed_batches", lambda policy, examples, rows, *a: packed.append(
        [examples[i].ids for i in rows]) or real(policy, examples, rows, *a))
    forwards, logprobs = [], common.token_logprobs
    monkeypatch.setattr(common, "token_logprobs", lambda model, pack, *a, **k: forwards.append(
        (pack.cu_seqlens.numel() - 1) * torch.is_grad_enabled()) or logprobs(model, pack, *a, **k))
    train(tmp_path / "run", **{**grpo_args, "beta": 0.0, "batch_size": 8, "results": str(tmp_path)})
    batches = [groups for salt, groups in rollouts if salt[0] == "update"]
    left_out = 0
    for ids, asked, groups in zip(packed[::2], packed[1::2], batches, strict=True):
        wanted = [g.problem.ids + c.ids for g in groups for s, c in zip(g.scores, g.completions)
                  if s.reward != statistics.mean(x.reward for x in g.scores)]
        assert sorted(ids) == sorted(wanted)
        assert sorted(asked) == sorted(g.problem.ids + c.ids for g in groups for c in g.completions)
        left_out += 32 - len(ids)
    assert left_out >= 4 and sum(forwards) == sum(map(len, packed[::2]))


def test_nothing_to_learn_moves_nothing(grpo_args, tmp_path, capsys):
    """Every answer that ends is worth 0, as one that doesn't: no gradient, the adapter stays at zero, and so does the KL."""
    own = task_file(tmp_path, "return 0.0")
    out = train(tmp_path / "run", **{**grpo_args, "task": own, "beta": 0.0, "results": str(tmp_path)})
    for line in log(out):
        assert line["zero_variance"] == line["all_wrong"] == 1 and line["grad_norm"] == 0
        assert not {"policy_loss", "entropy", "sampler_gap"} & line.keys()
        assert abs(line["kl"]) < 1e-4 and 0 <= line["k3"] < 1e-6
    saved = load_file(Path(out) / "adapter_model.safetensors")
    assert all((t[:, 16:] == 0).all() for k, t in saved.items() if "lora_B" in k)
    results = json.loads(next(tmp_path.glob("grpo/run-*.json")).read_text())
    assert results["curves"]["kl"] == [line["kl"] for line in log(out)]


def test_on_policy_the_loss_is_zero_and_its_gradient_is_not(grpo_args, grpo_run):
    """One step an update, `sequence`, policy = reference at first: Σ A = 0 and k3 = 0; ρ ≡ 1 to the last bit."""
    for line in log(grpo_run):
        assert (line["ratio_mean"], line["ratio_max"], line["approx_kl"], line["clipfrac"]) == (1, 1, 0, 0)
        assert abs(line["policy_loss"]) < 1e-6 and line["sampler_gap"] < 1e-5 and line["grad_norm"] > 0.01
    first, last = log(grpo_run)[0], log(grpo_run)[-1]
    assert first["kl"] == first["k3"] == 0 and last["k3"] > 0


def test_a_policy_that_did_not_sample_is_noticed(grpo_args, tmp_path, monkeypatch):
    """Old log-probs at another temperature than the loss's: the first mini-batch's ratio is not 1."""
    right = common.logprobs_and_entropy
    monkeypatch.setattr(common, "logprobs_and_entropy", lambda policy, pack, t: right(policy, pack, 1.3 * t))
    with pytest.raises(AssertionError, match="not the one that sampled"):
        train(tmp_path / "run", **{**grpo_args, "max_gap": 10.0, "epochs": 2, "results": str(tmp_path)})


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_sampler_of_stale_weights_is_stopped(grpo_args, tmp_path, monkeypatch, capsys, epochs):
    """A sampler that keeps the first weights: recomputed or reused old log-probs would hide it, the gap doesn't."""
    monkeypatch.setattr(common.Sampler, "refresh", lambda self, policy: None)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", **{**grpo_args, "lr": 3e-2, "epochs": epochs, "results": str(tmp_path)})
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "sampler and trainer disagree at update 1" in error and "--max-gap" in error
    assert not (tmp_path / "run" / "run.json").exists() and len(log(tmp_path / "run")) == 1


# -- rewards, groups, resampling ------------------------------------------------------------------

def counted(groups):
    """What a run should log of its groups, counted one answer at a time."""
    answers = [(s, c) for g in groups for s, c in zip(g.scores, g.completions)]
    right = [sum(s.parts.get("correct", s.reward) >= 1 for s in g.scores) for g in groups]
    n = len(answers)
    return {"rewards": sum(s.reward for s, _ in answers) / n, "completion_tokens": sum(len(c.ids) for _, c in answers) / n,
            "reward_correct": sum(s.parts.get("correct", 0) for s, _ in answers) / n,
            "reward_format": sum(s.parts.get("format", 0) for s, _ in answers) / n,
            "overlong": sum(c.stopped == "length" for _, c in answers) / n, "drawn_groups": len(groups),
            "zero_variance": sum(len({s.reward for s in g.scores}) == 1 for g in groups) / len(groups),
            "all_right": right.count(4) / len(groups), "all_wrong": right.count(0) / len(groups)}


def test_what_is_logged_of_the_groups(grpo_args, tmp_path, rollouts):
    """Rewards and their parts, by the task's own rule; an answer that did not end has 0 of everything."""
    out = train(tmp_path / "run", **{**grpo_args, "batch_size": 8, "results": str(tmp_path)})
    overlong = 0
    for line, groups in zip(log(out), [g for salt, g in rollouts if salt[0] == "update"], strict=True):
        for key, value in counted(groups).items():
            assert line[key] == pytest.approx(value), key
        for g in groups:
            for s, c in zip(g.scores, g.completions):
                n, i = len(c.text), g.problem.row["i"]
                assert s.reward == (0 if c.stopped == "length" else pytest.approx((n > i % 7) + 0.1 * (n < 15)))
                overlong += c.stopped == "length"
                assert (c.stopped == "length") == (len(c.ids) == 12 and c.ids[-1] != 2)
    assert overlong > 10 and any(0 < line["zero_variance"] < 1 for line in log(out))


def test_resampling_fills_the_batch_with_groups_that_differ(grpo_args, tmp_path, rollouts):
    """Each round draws what is missing, the next places of the order; the update is of the P groups that differ."""
    trained, real = [], grpo.group_advantages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "group_advantages", lambda rewards, scale: trained.append(rewards) or real(rewards, scale))
        out = train(tmp_path / "run", **{**grpo_args, "batch_size": 6, "resample_groups": True, "results": str(tmp_path)})
    for update, line in enumerate(log(out)):
        rounds = [groups for salt, groups in rollouts if salt[:2] == ("update", update)]
        wanted, chosen = 6, []
        for groups in rounds:
            assert len(groups) == wanted > 0
            differ = [g for g in groups if len({s.reward for s in g.scores}) > 1]
            wanted, chosen = wanted - len(differ), chosen + differ
        assert wanted == 0 and trained[update].tolist() == [[s.reward for s in g.scores] for g in chosen]
        for key, value in counted([g for groups in rounds for g in groups]).items():  # of all that were drawn
            assert line[key] == pytest.approx(value), key
    assert max(line["drawn_groups"] for line in log(out)) > 6
    places = [g.problem.index for salt, groups in rollouts if salt[0] == "update" for g in groups]
    n = record(out)["metrics"]["prompts"]
    assert len(set(places[:n])) == min(n, len(places))  # a pass has every prompt once


def test_resampling_ends_after_ten_rounds_and_says_so(grpo_args, tmp_path, rollouts, capsys):
    own = task_file(tmp_path, "return 0.0")
    out = train(tmp_path / "run", **{**grpo_args, "task": own, "updates": 1, "resample_groups": True, "results": str(tmp_path)})
    assert "update 0: 0 of 4 groups differ in their rewards after 10 rounds" in capsys.readouterr().out
    assert log(out)[0]["drawn_groups"] == 40 and log(out)[0]["grad_norm"] == 0  # policy = reference: the KL pulls nowhere


@pytest.mark.parametrize("body, said", [
    ("raise KeyError('colour')", "KeyError: 'colour' (own.py, line 5)"), ("return row['nothing']", "KeyError: 'nothing'"),
    ("return None", "a reward must be a number or a dict of numbers, got None; row"),
    ("return float('nan')", "a reward must be finite, got nan; row"), ("return {}", "dict of numbers, got {}; row"),
    ("return {'correct': 'yes'}", "dict of numbers, got {'correct': 'yes'}"), ("return 1e400", "must be finite, got inf")])
def test_a_reward_that_fails_ends_the_run_with_the_row(grpo_args, tmp_path, capsys, body, said):
    own = task_file(tmp_path, body)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", **{**grpo_args, "task": own, "completion_tokens": 40, "results": str(tmp_path)})
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if line.startswith("error: "))
    assert stop.value.code == 2 and said in line and "completion: " in line
    index = int(re.search(r"row (\d+): ", line)[1])
    assert f"'i': {index}" in line and not (tmp_path / "run" / "run.json").exists()


def test_a_run_that_was_stopped_by_its_reward_goes_on(grpo_args, tmp_path, capsys):
    """The failing reward comes up in the second update; its cause is outside the file, and the run is finished later."""
    flag = tmp_path / "broken"
    own = task_file(tmp_path, f"import pathlib\n    assert not pathlib.Path({str(flag)!r}).exists()\n    return 1.0")
    args = {**grpo_args, "task": own, "eval_every": 0, "results": str(tmp_path)}
    whole = train(tmp_path / "whole", **args)
    real = common.Run.checkpoint

    def checkpoint_and_break(self, step, *rest):
        real(self, step, *rest)
        flag.touch()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common.Run, "checkpoint", checkpoint_and_break)
        train(tmp_path / "run", **args)
    assert len(log(tmp_path / "run")) == 1 and "AssertionError" in capsys.readouterr().err
    flag.unlink()
    out = train(tmp_path / "run", **args)
    a, b = (load_file(Path(d) / "adapter_model.safetensors") for d in (out, whole))
    assert all(torch.equal(a[k], b[k]) for k in b)


# -- what a run writes ----------------------------------------------------------------------------

def test_run_directory_and_results(grpo_run, grpo_args, sft_run):
    assert {p.name for p in Path(grpo_run).iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "run.json", "log.jsonl", "curves.png", "README.md", "prompts.json", "completions.jsonl"}
    run, lines = record(grpo_run), log(grpo_run)
    assert run["parent"]["config_hash"] == record(sft_run)["config_hash"]
    assert run["data"].keys() == {"task", "train"} and run["data"]["task"].startswith("sha256:")
    assert run["data_sources"] == {"train": {}, "heldout": {}}  # the task's rows name no source
    assert [line["step"] for line in lines] == [0, 1, 2]
    results = json.loads(next(Path(grpo_args["results"]).glob("grpo/grpo_v1-*.json")).read_text())
    assert results["curves"]["kl"] == [line["kl"] for line in lines] and results["updates"] == 3
    assert results["curves"]["rewards"] == [line["rewards"] for line in lines]
    assert results.items() >= {"schema_version": 1, "name": "grpo_v1", "task": grpo_args["task"], "heldout_problems": 3,
                               "samples": 4, **{k: run[k] for k in ("config_hash", "adapter_sha256", "family", "data")}}.items()
    assert [point["step"] for point in results["heldout"]] == [0, 2, 3]  # before, every second update, after
    assert results["before"].keys() >= {"pass@1", "pass@2", "rewards", "completion_tokens", "overlong"}
    for when, point in (("before", results["heldout"][0]), ("after", results["heldout"][-1])):
        assert results[when]["pass@1"] == point["pass_1"] == run["metrics"][f"pass_1_{when}"]
        assert results[when]["pass@2"] == point["pass_k"] == run["metrics"][f"pass_k_{when}"]
    assert lines[0]["heldout_pass_k"] == results["before"]["pass@2"] and "heldout_pass_k" not in lines[1]
    assert next(Path(grpo_args["results"]).glob("grpo/grpo_v1-*.png")).stat().st_size > 10_000
    for name in ("pass_1", "pass_k"):  # the middle of the paired interval is the change of the mean
        change = run["metrics"][f"{name}_after"] - run["metrics"][f"{name}_before"]
        assert sum(run["metrics"][f"{name}_change_interval"]) / 2 == pytest.approx(change)
    answers = [json.loads(line) for line in (Path(grpo_run) / "completions.jsonl").read_text().splitlines()]
    assert len(answers) == 3 and all(f"{a['row']['i']} why" in a["prompt"] for a in answers)
    for when in ("before", "after"):
        solved = [a[when].get("correct", 0) >= 1 for a in answers]
        assert results[when]["pass@1"] == sum(solved) / 3
        assert [a[when]["overlong"] for a in answers] == [a[when]["completion_tokens"] == 12 and a[when]["reward"] == 0
                                                         for a in answers]


def test_heldout_figures_are_those_of_the_answers(grpo_args, tmp_path, rollouts):
    """pass@1 from one greedy answer, pass@k by brute force over the 2k samples, the same noise before and after; in
    between, and without pass@k, only the greedy answers."""
    out = train(tmp_path / "run", **{**grpo_args, "heldout_rows": 5, "eval_every": 0, "results": str(tmp_path)})
    held = [groups for salt, groups in rollouts if salt[0] == "heldout"]
    assert [len(groups[0].completions) for groups in held] == [1, 4, 1, 4]
    trained = {g.problem.index for salt, groups in rollouts if salt[0] == "update" for g in groups}
    for when, greedy, sampled in (("before", *held[:2]), ("after", *held[2:])):
        metrics = {k: record(out)["metrics"][f"{k}_{when}"] for k in ("pass_1", "pass_k", "rewards", "overlong")}
        right = [[s.parts.get("correct", 0) == 1 for s in g.scores] for g in sampled]
        pairs = [any(r[i] for i in pair) for r in right for pair in itertools.combinations(range(4), 2)]
        assert metrics["pass_k"] == pytest.approx(sum(pairs) / len(pairs))
        assert metrics["pass_1"] == sum(g.scores[0].parts.get("correct", 0) == 1 for g in greedy) / 5
        assert metrics["rewards"] == pytest.approx(statistics.mean(g.scores[0].reward for g in greedy))
        assert not trained & {g.problem.index for g in greedy}
    assert [g.problem.index for g in held[0]] == [g.problem.index for g in held[3]]
    rollouts.clear()
    out = train(tmp_path / "other", **{**grpo_args, "pass_k": 0, "eval_every": 1, "updates": 2, "results": str(tmp_path)})
    assert [len(g[0].completions) for salt, g in rollouts if salt[0] == "heldout"] == [1, 1, 1]
    assert not [k for k in record(out)["metrics"] if "pass_k" in k]


def test_saved_adapter_is_the_trained_policy_on_the_pretrained_base(grpo_args, tiny_model, tmp_path, monkeypatch):
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
    out = train(tmp_path / "run", **{**grpo_args, "lr": 1e-2, "results": str(tmp_path)})
    loaded = PeftModel.from_pretrained(plain(tiny_model), out).eval()
    found = []
    with torch.no_grad():
        for i in pack.examples:
            answer = sequences[i].targets
            found.append(answer_logprobs(loaded, sequences[i].ids[:-len(answer)], answer, 1.0)[0])
    torch.testing.assert_close(torch.cat(found), seen["trained"], atol=1e-5, rtol=0)
    assert (seen["trained"] - seen["reference"]).abs().max() > 1e-3
    assert json.loads((Path(out) / "adapter_config.json").read_text())["r"] == 32


# -- resume, ranks, micro-batches -----------------------------------------------------------------

def test_stopped_after_every_update(grpo_args, tmp_path, monkeypatch):
    """One update a process life, with resampling, whose place in the order is state: the adapter, the log and the answers
    are those of a run that was never stopped."""
    args = {**grpo_args, "resample_groups": True, "epochs": 2, "checkpoint_every": 100}
    whole = train(tmp_path / "a" / "grpo_v1", **{**args, "results": str(tmp_path / "a")})
    write_log, stop_at = common.Run.log, []

    def log_and_stop(self, step, *line):
        write_log(self, step, *line)
        if step in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(common.Run, "log", log_and_stop)
    for step in range(3):
        stop_at[:] = [step]
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "b" / "grpo_v1", **{**args, "results": str(tmp_path / "b")})
        assert stop.value.code == 128 + signal.SIGTERM
    stop_at.clear()
    out = train(tmp_path / "b" / "grpo_v1", **{**args, "results": str(tmp_path / "b")})
    a, b = (load_file(Path(d) / "adapter_model.safetensors") for d in (out, whole))
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert log(out) == log(whole) and record(out)["metrics"] == record(whole)["metrics"]
    for path in (tmp_path / "b" / "grpo_v1" / "completions.jsonl", next(tmp_path.glob("b/grpo/grpo_v1-*.json"))):
        name = path.relative_to(tmp_path).as_posix()
        assert (tmp_path / name).read_text() == (tmp_path / name.replace("b/", "a/", 1)).read_text()


def test_micro_tokens_and_ranks_do_not_change_the_update(grpo_args, tmp_path):
    """Packs of one or two answers, and two ranks (gloo): the same rollouts, log and weights to float tolerance."""
    args = {**grpo_args, "resample_groups": True, "epochs": 2, "minibatches": 2, "lr": 1e-3}
    whole = train(tmp_path / "whole" / "grpo_v1", **{**args, "results": str(tmp_path / "whole")})
    small = train(tmp_path / "small" / "grpo_v1", **{**args, "micro_tokens": 80, "results": str(tmp_path / "small")})
    ranks = {**args, "out": str(tmp_path / "ranks" / "grpo_v1"), "results": str(tmp_path / "ranks")}
    flags = [w for k, v in ranks.items() if v is not True for w in (f"--{k.replace('_', '-')}", str(v))]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           str(REPO / "grpo.py"), *flags, "--resample-groups"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = load_file(Path(whole) / "adapter_model.safetensors")
    for run in (small, ranks["out"]):
        for mine, theirs in zip(log(run), log(whole), strict=True):
            assert mine.keys() == theirs.keys() and mine["tokens"] == theirs["tokens"]  # the same answers
            for key in ("rewards", "kl", "policy_loss", "entropy", "grad_norm", "ratio_max", "drawn_groups", "zero_variance"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-3), (key, mine["step"])
        metrics, expected_metrics = ({k: v for k, v in record(d)["metrics"].items() if v is not None} for d in (run, whole))
        for key, value in expected_metrics.items():
            exact = value is None or isinstance(value, str)
            assert metrics[key] == (value if exact else pytest.approx(value, rel=1e-3, abs=1e-6)), key
        found = load_file(Path(run) / "adapter_model.safetensors")
        ours, theirs = (torch.cat([w[k].flatten() for k in sorted(w) if "lora_B" in k]) for w in (found, expected))
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_a_reward_that_fails_on_one_rank_ends_all(grpo_args, tmp_path):
    """Only the second rank's share fails; both ranks stop, with one error, and nobody waits for ever."""
    own = task_file(tmp_path, "import os\n    assert os.environ['RANK'] == '0', 'not here'\n    return 1.0")
    args = {**grpo_args, "task": own, "completion_tokens": 40, "out": str(tmp_path / "run"), "results": str(tmp_path)}
    flags = [w for k, v in args.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           str(REPO / "grpo.py"), *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("error: reward() of --task own: AssertionError: not here") == 1


# -- learning -------------------------------------------------------------------------------------

def test_it_climbs_a_reward_it_can_see(grpo_args, tmp_path):
    """A tiny random model, the share of an answer's letters that are vowels, 0 for one that doesn't end: in 30 updates the
    mean reward rises from under 0.06 by more than 0.12; with a large β and all else equal it moves by less than 0.05."""
    own, found = task_file(tmp_path, "return sum(c in 'aeiou' for c in completion) / max(1, len(completion))"), {}
    for beta in (0.0, 30.0):
        out = train(tmp_path / f"beta{beta:g}", **{
            **grpo_args, "task": own, "beta": beta, "updates": 30, "batch_size": 8, "group_size": 8, "lr": 5e-3,
            "eval_every": 0, "completion_tokens": 8, "checkpoint_every": 100, "max_gap": 1e-3, "results": str(tmp_path)})
        rewards = [line["rewards"] for line in log(out)]
        found[beta] = statistics.mean(rewards[:2]), statistics.mean(rewards[-5:])
        print(beta, found[beta], [round(r, 2) for r in rewards[::3]])
    assert found[0.0][0] < 0.06 and found[0.0][1] > found[0.0][0] + 0.12
    assert abs(found[30.0][1] - found[30.0][0]) < 0.05


def test_a_tiny_model_climbs_the_easiest_arithmetic(tmp_path, monkeypatch):
    """A random model of two layers that has seen answers (SFT), half of them right and half "no idea": on one-digit sums
    the mean reward of updates 31 to 40 is above that of the first ten by more than 0.1 (seen: 0.40 to 0.60). Prompts are
    bare, for speed."""
    monkeypatch.setattr(grpo, "WORKED", [])
    monkeypatch.setattr(grpo, "ARITHMETIC_PROMPT", "")
    task, rows = grpo.load_task(grpo.Args(task="arithmetic:1")), grpo.arithmetic_rows(1, 1, 400)
    chats = [{"messages": [*task.read(row, "")[0], {"role": "assistant", "content":
              f"{row['question'][8:-1]} = {row['answer']}\n#### {row['answer']}" if i % 2 else "no idea\n#### 0"}]}
             for i, row in enumerate(rows)]
    data = write_jsonl(tmp_path / "sums.jsonl", chats)
    write_jsonl(tmp_path / "sums_heldout.jsonl", chats[:4])
    sft.main(sft.Args(model=make_model(tmp_path / "model", hidden_size=128), quantization="none", dtype="float32",
                      data=data, rows=400, heldout_rows=4, max_length=100, batch_size=16, epochs=20, lr=5e-3, eos_prompts=4,
                      eos_tokens=24, device="cpu", out=str(tmp_path / "sft")))
    out = train(tmp_path / "run", sft_adapter=str(tmp_path / "sft"), task="arithmetic:1", updates=40, batch_size=8,
                group_size=8, completion_tokens=24, prompt_tokens=60, eval_every=0, pass_k=0, heldout_rows=4, beta=0.0,
                lr=2e-3, max_gap=1e-3, dtype="float32", device="cpu", results=str(tmp_path))
    rewards = [line["rewards"] for line in log(out)]
    print([round(r, 3) for r in rewards])
    assert statistics.mean(rewards[-10:]) > statistics.mean(rewards[:10]) + 0.1


# -- bad input ------------------------------------------------------------------------------------

@pytest.fixture
def refused(tmp_path, capsys, monkeypatch, grpo_args):
    """refused(parts, **changes): exit code 2 before a model loads, one error that has the parts, nothing written."""
    def loads(*args, **kwargs):
        raise AssertionError("a model was loaded")

    def check(*parts, **changes):
        before = {p for p in tmp_path.rglob("*") if p.suffix != ".pyc" and p.name != "__pycache__"}
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loads)
            train(tmp_path / "new" / "run", **{**grpo_args, "results": str(tmp_path / "results"), **changes})
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
        assert [part for part in parts if str(part) not in error] == [], error
        assert {p for p in tmp_path.rglob("*") if p.suffix != ".pyc" and p.name != "__pycache__"} == before
    return check


def test_sizes_that_do_not_fit(refused):
    refused("--batch-size 4 is not a multiple of --minibatches 3", minibatches=3)
    refused("--prompt-tokens 510 + --completion-tokens 12", "512 positions", prompt_tokens=510)
    refused("--micro-tokens 64", micro_tokens=64)
    refused("--group-size 1", "2 answers", group_size=1)


@pytest.mark.parametrize("name, value", [("beta", -0.1), ("beta", math.nan), ("eval_every", -1), ("clip_low", 0.0),
                                         ("clip_low", 1.5), ("clip_high", 0.0), ("temperature", 0.0), ("epochs", 0),
                                         ("updates", 0), ("pass_k", -1), ("heldout_rows", 0), ("max_gap", 0.0)])
def test_numbers_out_of_range(refused, name, value):
    refused(f"--{name.replace('_', '-')} must be", **{name: value})


@pytest.mark.parametrize("task", ["gsm9k", "arithmetic:6", "arithmetic:0-3", "arithmetic:1-", "nowhere.py", "README.md"])
def test_unknown_tasks(refused, task):
    refused(f"--task {task}", "gsm8k, gsm8k:format, arithmetic", task=task)


def test_grades_the_wrong_way_round(refused):
    refused("--task arithmetic:3-2", "above the last", task="arithmetic:3-2")


@pytest.mark.parametrize("source, parts", [
    ("def rows():\n    return []\n", ["no function reward(row, completion)"]),
    ("reward = 3\n", ["no function reward(row, completion)"]),
    ("import nothing_of_that_name\n", ["can't be imported", "ModuleNotFoundError", "line 1"]),
    ("def reward(row, completion) return 1\n", ["can't be imported", "SyntaxError"]),
    ("def reward(row, completion):\n    return 1.0\n", ["has no rows()", "--data"]),
    ("def reward(row, completion):\n    return 1.0\n\ndef rows():\n    return []\n", ["rows() gives none"]),
    ("def reward(row, completion):\n    return 1.0\n\ndef rows():\n    return 1 / 0\n", ["ZeroDivisionError", "line 5"]),
    ("def reward(row, completion):\n    return 1.0\n\ndef rows():\n    return ['a']\n", ["no list of plain dicts"]),
    ("def reward(row, completion):\n    return 1.0\n\ndef rows():\n    return [{'prompt': 'a', 'x': {1}}]\n",
     ["no list of plain dicts", "not JSON serializable"]),
    ("def reward(row, completion):\n    return 1.0\n\ndef rows():\n    return [{'text': 'a'}]\n", ["row 0: no prompt"])])
def test_task_files_that_cannot_serve(refused, tmp_path, source, parts):
    path = tmp_path / "own.py"
    path.write_text(source)
    refused("own", *parts, task=str(path))


def test_data_beside_rows(refused, grpo_args, data_dir):
    refused("makes its own rows", "--data", data=str(data_dir / "sft.jsonl"))
    refused("makes its own rows", task="arithmetic", data=str(data_dir / "sft.jsonl"))


@pytest.mark.parametrize("row, part", [
    ({"question": "How many?", "answer": "eighteen"}, "no answer"), ({"question": "How many?"}, "no answer"),
    ({"question": "How many?", "answer": "so 18\n#### about 18"}, "no answer"), ({"answer": "#### 18"}, "no prompt"),
    ({"prompt": [{"role": "assistant", "content": "18"}], "answer": "18"}, "roles out of order")])
def test_rows_without_question_or_answer(refused, tmp_path, row, part):
    good = [{"question": f"{i}?", "answer": "#### 1"} for i in range(4)]
    data = write_jsonl(tmp_path / "x.jsonl", [*good, row])
    refused("x.jsonl, row 4", part, task="gsm8k", data=data)


@pytest.mark.parametrize("flags", [{"data": "openai/gsm8k:main/test"},
                                   {"data": "{x}", "heldout_data": "openai/gsm8k@abc:main/test"}])
def test_the_test_split_is_never_used(refused, tmp_path, flags):
    x = write_jsonl(tmp_path / "x.jsonl", [{"question": "1?", "answer": "1"}])
    refused("is a test split", task="gsm8k", **{k: v.replace("{x}", x) for k, v in flags.items()})


def test_rows_for_an_own_task_from_data(grpo_args, tmp_path):
    own = task_file(tmp_path, "return float(row['want'] in completion)", rows=None)
    data = write_jsonl(tmp_path / "x.jsonl", [{"prompt": f"{i} why", "want": "a"} for i in range(30)])
    out = train(tmp_path / "run", **{**grpo_args, "task": own, "data": data, "updates": 1, "results": str(tmp_path)})
    assert record(out)["data"]["train"] == "sha256:" + common.file_sha256(Path(data))
    assert record(out)["metrics"]["prompts"] == 4 and record(out)["metrics"]["heldout_problems"] == 3


def test_prompts_that_are_too_long_are_counted(refused):
    refused("too long 3", prompt_tokens=20)


def test_a_reward_model_is_no_policy(refused, reward_run):
    refused(reward_run, "is a reward model, not a policy", sft_adapter=reward_run)
