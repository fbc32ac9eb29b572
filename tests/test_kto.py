"""KTO: its loss and z0 by independent derivation, steps against a loop over single rows, what it logs and saves, what it
learns, what it refuses. Tolerance 1e-5 in fp32 unless a test says why not."""
import gzip
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat
import common
import inputs
import conftest
import fast
import dpo
import kto
from common import Example
from conftest import make_model, part_of, sentence, write_jsonl
from test_math import TRL_TEMPLATE, assert_same_gradients, text, trl_config, two_policies

REPO = Path(common.__file__).parent
TIMES = ("seconds", "tokens_per_s")


def record(run):
    return json.loads((Path(run) / "run.json").read_text())


def log(run):
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def train(out, **args):
    kto.main(kto.Args(**args, out=str(out)))
    return str(out)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def user(content):
    return [{"role": "user", "content": content}]


def row(prompt, answer, desirable=True):
    """A Row of made-up ids: a prompt of two to four tokens, an answer of one id a letter and EOS."""
    ids, targets = [3, *(10 + ord(c) % 50 for c in prompt[-3:])], [*(60 + ord(c) % 90 for c in answer), 2]
    return kto.Row(Example.completion(ids, targets), desirable, user(prompt), prompt, answer)


def plain(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval() \
        .requires_grad_(False)


def answer_logprob(model, prompt, answer):
    """log π(answer | prompt), summed, by the library's own forward on one sequence; ids."""
    logits = model(tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1:-1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum()


def split(r):
    """(prompt ids, answer ids) of a Row."""
    n = len(r.example.ids) - len(r.example.targets)
    assert r.example.ids[n:] == r.example.targets
    return r.example.ids[:n], r.example.targets


# -- the loss -------------------------------------------------------------------------------------

@pytest.mark.parametrize("rho, desirable, z0, weights, loss, slope", [
    # β = 1/2. Desirable: λ_D (1 − σ(½(ρ − z0))), slope −λ_D ½ σ'(·); undesirable: λ_U (1 − σ(½(z0 − ρ))), slope +λ_U ½ σ'
    (1.0, True, 0.0, (1, 1), 0.37754067, -0.11750186),    # σ(½) = 0.62245933
    (1.0, True, 3.0, (1, 1), 0.73105858, -0.09830597),    # σ(−1) = 0.26894142, σ' = 0.19661193
    (1.0, False, 3.0, (1, 2), 0.53788284, 0.19661193),    # 2 (1 − σ(1))
    (1.0, False, 0.0, (5, 1), 0.62245933, 0.11750186),    # 1 − σ(−½)
    (-2.0, False, 1.0, (1, 1), 0.18242552, 0.07457323),   # 1 − σ(1.5), σ(1.5) = 0.81757448
    (-2.0, True, 1.0, (3, 1), 2.45272344, -0.22371969)])  # 3 (1 − σ(−1.5))
def test_loss_by_hand(rho, desirable, z0, weights, loss, slope):
    policy, ref = tensor([rho - 7.0], requires_grad=True), tensor([-7.0], requires_grad=True)
    losses, rewards = kto.kto_loss(policy, ref, tensor([desirable]), z0, 0.5, *weights)
    assert losses.tolist() == pytest.approx([loss], abs=1e-6)
    assert rewards.tolist() == [0.5 * rho] and not rewards.requires_grad
    losses.sum().backward()
    assert policy.grad.item() == pytest.approx(slope, abs=1e-6)  # descending raises a desirable answer, lowers another
    assert ref.grad.item() == pytest.approx(-slope, abs=1e-6)


def test_loss_of_a_mixed_batch_and_extremes():
    """Rows are apart: each class has its own side of z0. Saturation at |βρ| = 1000: losses 0 and λ, no gradient, no NaN."""
    policy = tensor([2000.0, 2000.0, -2000.0, -2000.0, 4.0, 4.0], requires_grad=True)
    desirable = tensor([True, False, True, False, True, False])
    losses, _ = kto.kto_loss(policy, torch.zeros(6), desirable, 4.0, 0.5, 2.0, 3.0)
    assert losses.tolist() == [0, 3, 2, 0, 1.0, 1.5]
    losses.sum().backward()
    assert policy.grad.tolist() == [0, 0, 0, 0, -2 * 0.5 / 4, 3 * 0.5 / 4]


@pytest.mark.parametrize("n_d, n_u, weights, low, high", [
    (50, 50, (1, 1), None, None), (40, 30, (1, 1), None, None),   # 1 and 4/3 are inside
    (41, 30, (1, 1), "0.732 to 0.976", "1.02 to 1.37"),            # 1.37: λ_D in [30/41, 40/41] or λ_U in [¾ · 41/30, 41/30]
    (10, 100, (1, 1), "10 to 13.3", "0.075 to 0.1"),               # the paper's example, 1:10
    (10, 100, (12, 1), None, None), (100, 10, (1, 8), None, None),
    (10, 100, (1, 2), "20 to 26.7", "0.075 to 0.1")])
def test_advice_on_weights(n_d, n_u, weights, low, high):
    args = kto.Args(desirable_weight=weights[0], undesirable_weight=weights[1])
    advice = kto.weights_advice(n_d, n_u, args)
    if low is None:
        assert advice is None
    else:
        assert f"--desirable-weight {low}" in advice and f"--undesirable-weight {high}" in advice
    assert "all rows are desirable" in kto.weights_advice(5, 0, args)
    assert "all rows are undesirable" in kto.weights_advice(0, 5, args)


def test_learning_rate():
    args = kto.Args(lr=1.0)
    rates = [kto.learning_rate(t, 100, args) for t in range(100)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 97 / 97]) and rates[-1] == pytest.approx(1 / 97)
    assert kto.learning_rate(0, 1, args) == 1.0


# -- TRL ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("labels, seed, weights", [
    ([True, False, False, True, True, False, True], 5, (1.0, 1.0)), ([True, False, False, True, False, False, True], 7, (1.5, 0.7)),
    ([True] * 5, 2, (1.0, 1.0)), ([False] * 4, 4, (1.0, 2.0))], ids=["mixed", "weights", "desirable", "undesirable"])
def test_loss_is_trls(tmp_path, labels, seed, weights):
    """TRL 1.16's KTOTrainer and ours on the same rows, policy ≠ reference: loss, z0, rewards, log-probs, gradient.

    TRL makes its own mismatched pairs: it rotates the other way, x_i with y_{i−1}, so it gets the rows in reverse; and
    within batches of per_device_train_batch_size of the data set's order, here the whole step. (With a smaller one it has
    a z0 for each, and the mean of their losses; a last batch of one row is paired with itself.)
    """
    from trl import KTOConfig, KTOTrainer
    directory, n = make_model(tmp_path / "model", template=TRL_TEMPLATE), len(labels)
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i, label in enumerate(labels):  # some prompts hold an earlier answer, which is not scored
        before = (user(text(g, 2, 8)) + [{"role": "assistant", "content": text(g, 2, 8)}]) * (i % 2)
        rows.append({"prompt": before + user(f"{i} " + text(g, 2, 8)),
                     "completion": [{"role": "assistant", "content": text(g, 1, 15)}], "label": label})
    ours, _ = two_policies(directory, seed)
    args = kto.Args(beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1], max_length=512, micro_tokens=150)

    config = trl_config(KTOConfig, tmp_path, beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1],
                        max_length=None, train_sampling_strategy="sequential")
    trainer = KTOTrainer(plain(directory), args=config, train_dataset=Dataset.from_list(rows[::-1]),
                         processing_class=AutoTokenizer.from_pretrained(directory),
                         peft_config=LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM",
                                                target_modules=list(common.TARGET_MODULES)))
    theirs = dict(trainer.model.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            theirs[name].data.copy_(p.data)
    loss_trl = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(n)]))
    loss_trl.backward()
    metrics_trl = {k: v[0] for k, v in trainer._metrics["train"].items()}

    batch = [r for (r,) in conftest.built(kto.build_rows(chat.load_tokenizer(directory), args), kto.answers_of, rows)]
    z0 = kto.mismatched_kl(ours, batch, args, "cpu").clamp(min=0)
    totals, packs, distances = torch.zeros(8), fast.pack([r.example for r in batch], 100), []
    assert len(packs) > 1
    for pack in packs:
        losses, above, values = kto.row_metrics(ours, pack, batch, z0, args)
        (losses.sum() / n).backward()
        totals += values.sum(1)
        distances += above.abs().tolist()
    metrics, z0 = kto.means(totals.tolist(), batch), z0.item()
    assert z0 == pytest.approx(metrics_trl["kl"], abs=1e-4) and metrics["loss"] == pytest.approx(loss_trl.item(), abs=1e-5)
    assert min(distances) > 1e-3 and max(distances) > 0.2  # the policy is not the reference
    for name, name_trl in (("rewards_desirable", "rewards/chosen"), ("rewards_undesirable", "rewards/rejected"),
                           ("margin", "rewards/margins"), ("logprobs_desirable", "logps/chosen"),
                           ("logprobs_undesirable", "logps/rejected")):
        expected = metrics_trl.get(name_trl)  # an absent class has no mean, there and here
        assert metrics[name] == (expected if expected is None else pytest.approx(expected, rel=1e-5, abs=1e-5)), name
    assert_same_gradients(ours, trainer.model)
    assert z0 > 0.5 or len({*labels}) == 1  # so that it counts


# -- which rows share a step, and which answers meet which prompts --------------------------------

@pytest.mark.parametrize("n, size, most", [(23, 8, 1), (40, 8, 5), (17, 16, 2), (9, 2, 1), (9, 2, 4), (2, 16, 1), (3, 2, 1),
                                           (32, 16, 2), (100, 7, 10)])
def test_no_prompt_twice_in_a_step(n, size, most):
    """Each epoch has every row once, steps of one size or one row less, at least two rows, no prompt twice in one."""
    g = random.Random(n)
    prompts = [f"p{i}" for i in range(n - most + 1)] + ["p0"] * (most - 1)  # one prompt `most` times,
    for i in range(1, n - 2 * most, 4):  # and others twice
        prompts[i] = prompts[i + 1] if most > 1 else prompts[i]
    assert max(Counter(prompts).values()) == most
    epochs = 3
    steps = kto.arrange(prompts, size, epochs, 42)
    count = len(steps) // epochs
    assert count == min(math.ceil(n / size), n // 2)
    for epoch in range(epochs):
        mine = steps[epoch * count:(epoch + 1) * count]
        assert sorted(i for step in mine for i in step) == list(range(n))
        sizes = {len(step) for step in mine}
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 2 and (max(sizes) <= size or n % 2 and size == 2)
        assert all(len({prompts[i] for i in step}) == len(step) for step in mine)
    assert kto.arrange(prompts, size, epochs, 42) == steps
    assert kto.arrange(prompts, size, epochs, 43) != steps or n <= 3
    if n > 4:
        assert steps[:count] != steps[count:2 * count]


def test_steps_are_drawn_evenly():
    """Which rows meet is the seed's: over many seeds every two of eight rows share a step of two about equally often."""
    met = Counter(tuple(sorted(step)) for seed in range(700) for step in kto.arrange([*"abcdefgh"], 2, 1, seed))
    assert len(met) == 28 and all(60 < n < 145 for n in met.values())  # 100 expected, sd 9


def pairs_of(examples, rows):
    """(prompt, answer) of each mismatched example, by its ids."""
    by_prompt, by_answer = {tuple(split(r)[0]): r.prompt_id for r in rows}, {tuple(split(r)[1]): r.answer for r in rows}
    out = []
    for e in examples:
        n = len(e.ids) - len(e.targets)
        assert e.predict == list(range(n - 1, len(e.ids) - 1)) and e.ids[n:] == e.targets
        out.append((by_prompt[tuple(e.ids[:n])], by_answer[tuple(e.targets)]))
    return out


def test_the_next_rows_answer_meets_the_prompt():
    rows = [row("aa", "one"), row("bb", "two"), row("cc", "three", False), row("dd", "four", False)]
    assert pairs_of(kto.mismatched(rows, 100), rows) == [("aa", "two"), ("bb", "three"), ("cc", "four"), ("dd", "one")]
    assert pairs_of(kto.mismatched(rows[:2], 100), rows) == [("aa", "two"), ("bb", "one")]


def test_mismatched_pairs_are_never_true_even_when_prompts_and_answers_repeat():
    """Random rows of few prompts and few answers, against a search over all rotations: never a true pair of these rows,
    as few left out as any rotation allows, and of those the first rotation."""
    g, left_out = random.Random(0), Counter()
    for trial in range(600):
        n = g.randrange(2, 9)
        rows = [row(g.choice("abcdef") * 3, g.choice(["yes", "no", "maybe", "who", "knows"]), g.random() < 0.5) for _ in range(n)]
        true = {(r.prompt_id, r.answer) for r in rows}
        rotations = []
        for shift in range(1, n):
            found = [(rows[i].prompt_id, rows[(i + shift) % n].answer) for i in range(n)]
            rotations.append([p for p in found if p not in true])
        most = max(map(len, rotations))
        if most == 0:
            with pytest.raises(SystemExit):
                kto.mismatched(rows, 100)
            left_out["refused"] += 1
            continue
        found = pairs_of(kto.mismatched(rows, 100), rows)
        assert not set(found) & true
        assert found == next(r for r in rotations if len(r) == most)
        left_out["first" if len(rotations[0]) == n else "later" if most == n else "some"] += 1
    assert min(left_out[k] for k in ("refused", "first", "later", "some")) > 10, left_out


def test_equal_answers_are_left_out_of_z0():
    """Three of five answers are "yes": no rotation is without a true pair; two rows meet "yes" again and are left out."""
    rows = [row(p * 3, a) for p, a in zip("abcde", ["yes", "yes", "yes", "no", "who"])]
    found = pairs_of(kto.mismatched(rows, 100), rows)
    assert len(found) == 4 and ("aaa", "yes") not in found  # rotation by two: yes·yes, yes·no, yes·who, no·yes, who·yes
    assert found == [("bbb", "no"), ("ccc", "who"), ("ddd", "yes"), ("eee", "yes")]


def test_an_overlong_mismatch_is_cut_from_the_answer():
    rows = [row("aaa", "a" * 20), row("bbb", "b" * 5), row("ccc", "c" * 30)]
    examples = kto.mismatched(rows, 16)
    assert [len(e.ids) for e in examples] == [10, 16, 16]
    for e, x, y in zip(examples, rows, rows[1:] + rows[:1]):
        prompt, answer = split(x)[0], split(y)[1]
        assert e.ids == (prompt + answer)[:16] and e.targets == answer[:16 - len(prompt)]


# -- z0 -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("micro_tokens, max_length", [(40, 40), (100, 18), (10_000, 40)])
def test_z0_by_unpacked_forwards(tiny_model, micro_tokens, max_length):
    """Against plain PEFT, one unpadded sequence at a time; it is not clamped here and leaves no gradient anywhere."""
    g, args = random.Random(1), kto.Args(micro_tokens=micro_tokens, max_length=max_length)
    for seed in range(2):
        ours, library = two_policies(tiny_model, seed)
        rows = [row("".join(g.choices("abcdefgh", k=3)), "".join(g.choices("uvwxyz", k=g.randrange(1, 25)))) for _ in range(7)]
        expected = []
        for x, y in zip(rows, rows[1:] + rows[:1]):
            prompt, answer = split(x)[0], split(y)[1][:max_length - len(split(x)[0])]
            with torch.no_grad():
                ratio = answer_logprob(library, prompt, answer)
                with library.disable_adapter():
                    expected.append((ratio - answer_logprob(library, prompt, answer)).item())
        found = kto.mismatched_kl(ours, rows, args, "cpu").item()
        assert isinstance(found, float) and found == pytest.approx(sum(expected) / 7, abs=1e-4)
        assert found < -0.1 and all(p.grad is None for p in ours.parameters())


@pytest.fixture
def steps(monkeypatch):
    """[(parameters, gradients)] of each step, each flat, just before clipping."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def keep(parameters, *args, **kw):
        seen.append((parameters.detach().clone(), parameters.grad.clone()))
        return clip(parameters, *args, **kw)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    return seen


@pytest.mark.parametrize("micro_tokens, weights, clamped", [(128, (1.0, 1.0), True), (400, (1.3, 0.8), False)])
def test_steps_are_the_loop_over_single_rows(tiny_model, sft_run, kto_args, tmp_path, monkeypatch, steps, micro_tokens,
                                             weights, clamped):
    """Three steps of all rows: z0, loss, rewards and gradient from unpacked forwards of the library's modules.

    Only the rows' order is taken from the run. The reference is SFT merged by PEFT in a model of its own, and z0 a number
    computed before: its gradient is not in the step's. With equal weights z0 is clamped here, with the others it counts.
    """
    seen, measure, beta = [], kto.mismatched_kl, 0.3
    monkeypatch.setattr(kto, "mismatched_kl", lambda policy, rows, *a: seen.append(rows) or measure(policy, rows, *a))
    out = train(tmp_path / "run", **{**kto_args, "rows": 60, "batch_size": 60, "epochs": 3, "heldout_rows": 30, "lr": 3e-3,
                                     "micro_tokens": micro_tokens, "beta": beta, "desirable_weight": weights[0],
                                     "undesirable_weight": weights[1]})
    *batches, heldout = seen
    lines, n = log(out), len(batches[0])
    assert len(lines) == len(batches) == len(steps) == 3 and 20 < n < 50
    reference = PeftModel.from_pretrained(plain(tiny_model), sft_run).merge_and_unload()
    policy = common.add_lora(PeftModel.from_pretrained(plain(tiny_model), sft_run).merge_and_unload())

    def measured(model, rows):
        """z0 before the clamp, and (loss, ρ, desirable) of each row; losses with gradient."""
        with torch.no_grad():
            pairs = [(split(x)[0], split(y)[1]) for x, y in zip(rows, rows[1:] + rows[:1])]
            kl = sum((answer_logprob(model, *p) - answer_logprob(reference, *p)).item() for p in pairs) / len(rows)
            before = [answer_logprob(reference, *split(r)) for r in rows]
        out, z0 = [], max(kl, 0.0)
        for r, ref in zip(rows, before):
            rho = answer_logprob(model, *split(r)) - ref
            value = weights[0] * torch.sigmoid(beta * (rho - z0)) if r.desirable else \
                weights[1] * torch.sigmoid(beta * (z0 - rho))
            out.append((weights[0 if r.desirable else 1] - value, rho.item(), r.desirable))
        return kl, out

    def assert_is(line, kl, found, prefix=""):
        losses = [x[0].item() for x in found]
        rewards = {side: [beta * rho for _, rho, desirable in found if desirable == side] for side in (True, False)}
        right = [0.5 + 0.5 * (1 if desirable else -1) * ((rho > max(kl, 0)) - (rho < max(kl, 0))) for _, rho, desirable in found]
        means = {side: sum(r) / len(r) for side, r in rewards.items()}
        for key, value in (("loss", sum(losses) / len(found)), ("z0", max(kl, 0.0)), ("rewards_desirable", means[True]),
                           ("rewards_undesirable", means[False]), ("margin", means[True] - means[False]),
                           ("share_desirable", len(rewards[True]) / len(found))):
            assert line[prefix + key] == pytest.approx(value, abs=3e-5), key
        assert line[prefix + "accuracy"] == pytest.approx(sum(right) / len(found), abs=1.01 / len(found) if kl == 0 else 1e-6)

    for line, rows, (parameters, grads) in zip(lines, batches, steps):
        assert sorted(id(r) for r in rows) == sorted(id(r) for r in batches[0])
        mine = common.trainable(policy)
        for p, value in zip(mine, parameters.split([p.numel() for p in mine]), strict=True):
            p.data.copy_(value.view_as(p))
            p.grad = None
        kl, found = measured(policy, rows)
        for loss, _, _ in found:
            (loss / n).backward(retain_graph=True)
        assert line["kl"] == pytest.approx(kl, abs=1e-4)
        if line["step"]:
            assert_is(line, kl, found)
            assert abs(kl) > 5e-3 and (kl < 0) is clamped
        wanted = torch.cat([p.grad.flatten() for p in mine])
        scale = wanted.abs().max()
        assert scale > 1e-4 and (wanted - grads).abs().max() <= 3e-5 * scale
        assert line["grad_norm"] == pytest.approx(wanted.norm().item(), rel=1e-4)
        assert line["tokens"] == sum(len(r.example.ids) for r in rows)
        for side, name in ((True, "desirable"), (False, "undesirable")):
            sizes = [len(r.example.targets) for r in rows if r.desirable == side]
            assert line[f"tokens_{name}"] == pytest.approx(sum(sizes) / len(sizes))
    assert (lines[0]["z0"], lines[0]["kl"], lines[0]["margin"], lines[0]["accuracy"]) == (0, 0, 0, 0.5)

    # What is measured at the end, from the saved adapter under plain PEFT: one z0 of all held-out rows.
    trained = PeftModel.from_pretrained(plain(tiny_model), out).eval()
    assert all(not inputs.is_judge_prompt(r.prompt) for r in heldout) and len(heldout) == record(out)["metrics"]["heldout_rows"]
    with torch.no_grad():
        kl, found = measured(trained, heldout)
    assert_is(record(out)["metrics"], kl, found, "heldout_")
    wins = [(a > b) + 0.5 * (a == b) for _, a, yes in found if yes for _, b, other in found if not other]
    assert record(out)["metrics"]["heldout_auc"] == pytest.approx(sum(wins) / len(wins), abs=1e-6)


def test_z0_is_of_the_step_and_not_of_the_rows_themselves(kto_args, tmp_path):
    """As the policy learns to tell the classes apart, z0 is neither the mean of the rows' own ratios nor always 0."""
    lines = log(train(tmp_path / "run", **{**kto_args, "epochs": 4, "lr": 3e-3}))
    own = [10 * (line["rewards_desirable"] * line["share_desirable"]
                 + line["rewards_undesirable"] * (1 - line["share_desirable"])) for line in lines]
    assert all(line["z0"] == max(0, line["kl"]) for line in lines)
    assert max(abs(a - line["kl"]) for a, line in zip(own, lines)) > 0.1


# -- step 0, one class, odd sizes ------------------------------------------------------------------

def test_at_step_0_every_loss_is_half_its_weight(kto_args, tmp_path, monkeypatch):
    seen, measure = [], kto.row_metrics
    monkeypatch.setattr(kto, "row_metrics", lambda *a: seen.append((*measure(*a), a)) or seen[-1][:3])
    out = train(tmp_path / "run", **{**kto_args, "desirable_weight": 1.25, "undesirable_weight": 1.0, "micro_tokens": 128,
                                     "beta": 0.7})
    rows = 0
    for losses, above, _, (_, pack, batch, z0, _) in seen:
        rows += len(losses)
        assert z0 == 0 and above.abs().max() == 0
        assert losses.tolist() == [1.25 / 2 if batch[i].desirable else 0.5 for i in pack.examples]
        if rows == 8:
            break
    assert rows == 8
    assert (log(out)[0]["z0"], log(out)[0]["accuracy"], log(out)[0]["margin"]) == (0, 0.5, 0)


def test_a_reference_that_is_not_the_policy_is_noticed(kto_args, tmp_path, monkeypatch):
    """A LoRA that is not fresh. The classes' mean losses alone could still be ½: every row is looked at."""
    fresh = common.add_lora

    def stale(model):
        policy = fresh(model)
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.data.fill_(0.01)
        return policy
    monkeypatch.setattr(common, "add_lora", stale)
    with pytest.raises(AssertionError, match="the reference is not the policy"):
        train(tmp_path / "run", **kto_args)


def labelled(directory, rows, heldout=None, name="x"):
    write_jsonl(directory / f"{name}_heldout.jsonl", heldout or [
        {"prompt": f"held out {i}", "completion": f"{'yes' if i % 2 else 'no'} {i}", "label": bool(i % 2)} for i in range(20)])
    return write_jsonl(directory / f"{name}.jsonl", rows)


def some(n, label=lambda i: i % 2 == 0, prompts=None):
    return [{"prompt": f"why {i % (prompts or n)}", "completion": f"because {i}", "label": label(i)} for i in range(n)]


@pytest.mark.parametrize("label", [True, False])
def test_one_class_only(kto_args, tmp_path, capsys, label):
    """Rows of one class: the other has no figures, a warning says so, and the class moves to its side."""
    data = labelled(tmp_path, some(17, lambda i: label))
    out = train(tmp_path / "run", **{**kto_args, "data": data, "epochs": 3, "lr": 3e-3})
    here, there = ("desirable", "undesirable") if label else ("undesirable", "desirable")
    assert f"WARNING: all rows are {here}" in capsys.readouterr().out
    lines = log(out)
    for line in lines:
        assert line[f"rewards_{there}"] is line[f"logprobs_{there}"] is line[f"tokens_{there}"] is line["margin"] is None
        assert line["share_desirable"] == float(label) and line[f"rewards_{here}"] is not None
    assert lines[0]["loss"] == 0.5 > lines[-1]["loss"] and (lines[-1][f"rewards_{here}"] > 0) is label
    assert record(out)["metrics"]["heldout_margin"] is not None  # the held-out rows have both


@pytest.mark.parametrize("rows, size, sizes", [(9, 2, [2, 2, 2, 3]), (17, 16, [8, 9]), (3, 2, [3]), (2, 16, [2]), (13, 5, [4, 4, 5])])
def test_odd_sizes(kto_args, tmp_path, rows, size, sizes):
    """No step has one row; steps of two rows of one class work among others."""
    data = labelled(tmp_path, some(rows))
    out = train(tmp_path / "run", **{**kto_args, "data": data, "rows": 100, "batch_size": size})
    lines = log(out)
    assert len(lines) == len(sizes)
    shares = [round(line["share_desirable"] * n) / n for line, n in zip(lines, sizes)]
    assert all(0 <= s <= 1 for s in shares) and all(math.isfinite(line["loss"]) for line in lines)
    total = sum(line["tokens"] for line in lines)
    assert total == record(out)["metrics"]["tokens"]  # every row once
    if size == 2 and rows == 9:
        assert any(line["margin"] is None for line in lines)


# -- rows -----------------------------------------------------------------------------------------

def built(tiny_model, source_rows, **args):
    """[answers] that the rows offer."""
    build = kto.build_rows(chat.load_tokenizer(tiny_model), kto.Args(**args))
    return conftest.built(build, kto.answers_of, source_rows)


def test_layouts_of_a_labelled_row(tiny_model):
    """Texts or messages, a system message, earlier turns: the same ids as the conversation's, the answer's marked."""
    tokenizer = chat.load_tokenizer(tiny_model)
    answer = [{"role": "assistant", "content": "because"}]
    (a,), (b,) = built(tiny_model, [{"prompt": "why", "completion": "because", "label": True},
                                    {"prompt": user("why"), "completion": answer, "label": False}])
    assert a.example == b.example and (a.prompt_id, a.answer) == (b.prompt_id, b.answer)
    assert a.desirable is True and b.desirable is False
    long = [{"role": "system", "content": "be brief"}, *user("hi"), {"role": "assistant", "content": "hello"}, *user("why")]
    ((c,),) = built(tiny_model, [{"prompt": long, "completion": "because", "label": True}])
    for r, messages in ((a, user("why") + answer), (c, long + answer)):
        prompt, targets = split(r)
        assert tokenizer.decode(targets) == "because<|im_end|>" and tokenizer.decode(prompt).endswith("assistant\n")
        assert prompt == chat.render_prompt(tokenizer, messages[:-1])


def test_rows_that_are_dropped(tiny_model):
    assert built(tiny_model, [{"prompt": "a", "completion": " ", "label": True}, {"prompt": "a", "completion": "b " * 99, "label": True},
                              {"prompt": "a", "chosen": "b", "rejected": " "}, {"prompt": "a", "chosen": "b", "rejected": "b"},
                              {"prompt": "a", "chosen": "b", "rejected": "c " * 99}], max_length=60) == [
        "empty answer", "too long", "empty answer", "chosen equals rejected", "too long"]


@pytest.fixture
def batches(monkeypatch):
    """The rows of every z0 that a run measures: its steps, then the held-out set."""
    seen, measure = [], kto.mismatched_kl
    monkeypatch.setattr(kto, "mismatched_kl", lambda policy, rows, *a: seen.append(rows) or measure(policy, rows, *a))
    return seen


def test_pairs_give_one_answer_each_of_dpos_pairs(kto_args, dpo_args, data_dir, tmp_path, batches):
    """The pairs that dpo.py trains on with this seed; half of them give their chosen answer, no pair gives both; other
    seeds, other sides."""
    pairs = {r["prompt"][0]["content"]: r for r in read(data_dir / "preference.jsonl")}
    args = dpo.Args(**{**dpo_args, "rows": 23})
    tokenizer = chat.load_tokenizer(record(kto_args["sft_adapter"])["model"])
    items = inputs.load_split(args, ["pair"], inputs.as_pair, dpo.build_pairs(tokenizer, args)).train
    train(tmp_path / "a", **kto_args)
    rows = [r for batch in batches[:-1] for r in batch]
    assert Counter(r.prompt[0]["content"] for r in rows) == Counter(p.prompt[0]["content"] for p in items)
    for r in rows:
        pair = pairs[r.prompt[0]["content"]]
        assert r.answer == pair["chosen" if r.desirable else "rejected"][0]["content"]
        assert part_of(r.prompt) == "A"
    assert sum(r.desirable for r in rows) == 12  # of 23: as many, or one more
    sides = {r.prompt_id: r.desirable for r in rows}
    assert [p.prompt for p in items] != sorted([p.prompt for p in items], key=str)
    items = [[row(p.prompt[0]["content"], "a"), row(p.prompt[0]["content"], "b", False)] for p in items]
    assert [r.desirable for r in kto.one_answer_each(items, 42)] == [
        sides[inputs.prompt_id(user(x.prompt_id))] for x, _ in items]
    assert [r.desirable for r in kto.one_answer_each(items, 43)] != [r.desirable for r in kto.one_answer_each(items, 42)]


def test_labelled_rows_are_all_used_and_pairs_may_be_held_out(kto_args, data_dir, tmp_path, batches):
    """Both parts of the prompts, both answers of a prompt (in different steps); held-out pairs beside labelled rows."""
    rows = some(24, lambda i: i < 12, prompts=12)
    data = labelled(tmp_path, rows)
    train(tmp_path / "run", **{**kto_args, "data": data, "rows": 100, "heldout_data": str(data_dir / "preference_heldout.jsonl")})
    *steps, heldout = batches
    assert Counter(r.answer for s in steps for r in s) == Counter(r["completion"] for r in rows)
    assert {part_of(r.prompt) for s in steps for r in s} == {"A", "J", "B"}
    assert all(len({r.prompt_id for r in s}) == len(s) == 8 for s in steps)
    assert len(heldout) == 16 and sum(r.desirable for r in heldout) == 8
    held = {r["prompt"][0]["content"]: r for r in read(data_dir / "preference_heldout.jsonl")}
    assert all(held[r.prompt[0]["content"]]["chosen" if r.desirable else "rejected"][0]["content"] == r.answer for r in heldout)


def test_formats_give_the_same_run(kto_args, tmp_path):
    rows = some(12)
    directory = tmp_path / "gz"
    directory.mkdir()
    data = labelled(tmp_path, rows)
    for name in ("x", "x_heldout"):
        with gzip.open(directory / f"{name}.jsonl.gz", "wt") as f:
            f.write((tmp_path / f"{name}.jsonl").read_text())
        Dataset.from_list(read(tmp_path / f"{name}.jsonl")).to_parquet(str(directory / f"{name}.parquet"))
    runs = [train(tmp_path / f"run{i}", **{**kto_args, "data": d}) for i, d in enumerate(
        (data, str(directory / "x.jsonl.gz"), str(directory / "x.parquet")))]
    assert log(runs[0]) == log(runs[1]) == log(runs[2])
    assert record(runs[0])["config_hash"] == record(runs[1])["config_hash"]  # the same content


@pytest.mark.parametrize("name", ["preference.jsonl", "kto.jsonl"])
def test_the_demo_data_is_accepted(tiny_model, name):
    rows = read(REPO / "data" / "demo" / "train" / name)
    items = [x for x in built(tiny_model, rows, max_length=512) if isinstance(x, list)]
    assert len(items) == len(rows)
    batch = kto.one_answer_each(items, 42)
    assert sum(r.desirable for r in batch) == len(batch) / 2
    assert all(len(kto.mismatched([batch[i] for i in s], 512)) == len(s)
               for s in kto.arrange([r.prompt_id for r in batch], 8, 1, 42))


# -- what a run writes ----------------------------------------------------------------------------

def test_run_directory(kto_run, kto_args, sft_run):
    assert {p.name for p in Path(kto_run).iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "run.json", "log.jsonl", "curves.png", "README.md", "prompts.json"}
    run, lines = record(kto_run), log(kto_run)
    assert run["method"] == "kto" and run["parent"]["config_hash"] == record(sft_run)["config_hash"]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {*lines[0]} == {"step", "loss", "accuracy", "margin", "z0", "kl", "share_desirable", "grad_norm", "lr", "tokens", *(
        f"{key}_{side}" for key in ("rewards", "logprobs", "tokens") for side in ("desirable", "undesirable"))}
    metrics = run["metrics"]
    assert metrics["desirable"] == 12 and metrics["heldout_rows"] == 16 and metrics["left_out_of_z0"] == 0
    assert abs(metrics["kl_merge"]) < 1e-5 and 0 <= metrics["eos_rate"] <= 1
    assert metrics["heldout_accuracy"] > 0.9 and metrics["heldout_margin"] > 0  # " yes" and " no" end the answers
    config = json.loads((Path(kto_run) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (32, 64)


def test_saved_adapter_is_the_trained_policy_on_the_pretrained_base(kto_args, tiny_model, tmp_path, monkeypatch):
    """The policy at the end = plain PEFT on the pretrained base, with no knowledge of the chain."""
    seen, save = {}, common.Run.save
    sequences = [Example.completion([5, 6, 7], [8, 9, 10, 11]), Example.completion([20, 21], [22, 2])]
    (pack,) = fast.pack(sequences, 64)

    def keep(self, policy, tokenizer, prompts):
        with torch.no_grad():
            seen["trained"] = pack.sum_by_sequence(common.token_logprobs(policy, pack))
            with common.reference(policy):
                seen["reference"] = pack.sum_by_sequence(common.token_logprobs(policy, pack))
        save(self, policy, tokenizer, prompts)
    monkeypatch.setattr(common.Run, "save", keep)
    out = train(tmp_path / "run", **kto_args)
    loaded = PeftModel.from_pretrained(plain(tiny_model), out).eval()
    with torch.no_grad():
        found = [answer_logprob(loaded, e.ids[:-len(e.targets)], e.targets).item() for e in (sequences[i] for i in pack.examples)]
    assert found == pytest.approx(seen["trained"].tolist(), abs=2e-5)
    assert (seen["trained"] - seen["reference"]).abs().max() > 1e-2


def test_weights_are_warned_about(kto_args, tmp_path, capsys):
    data = labelled(tmp_path, some(20, lambda i: i % 5 == 0))
    train(tmp_path / "a", **{**kto_args, "data": data})
    assert "WARNING: 4 desirable and 16 undesirable rows" in capsys.readouterr().out
    train(tmp_path / "b", **{**kto_args, "data": data, "desirable_weight": 4.5})
    assert "desirable and" not in capsys.readouterr().out
    assert log(tmp_path / "b")[0]["loss"] == pytest.approx(
        0.5 * (4.5 * (s := log(tmp_path / "b")[0]["share_desirable"]) + 1 - s), abs=1e-6)


def test_equal_answers_are_counted(kto_args, tmp_path):
    rows = [{**r, "completion": "yes" if r["label"] else "no"} for r in some(16, lambda i: i < 13)]
    out = train(tmp_path / "run", **{**kto_args, "data": labelled(tmp_path, rows), "batch_size": 16})
    assert record(out)["metrics"]["left_out_of_z0"] == 10  # three "no" meet "yes", three "yes" meet "no"


SCIENCE = {"dtype", "rows", "heldout_rows", "max_length", "beta", "desirable_weight", "undesirable_weight", "lr", "batch_size",
           "epochs", "warmup", "max_grad_norm", "eos_prompts", "eos_tokens", "seed"}


def test_config_hash_changes_with_science_and_nothing_else():
    import dataclasses

    from test_invariants import DATA, INVARIANTS, variants
    parent = {"config_hash": "11111111", "family": "22222222"}

    def hashed(args):
        return common.config_hash("kto", args, INVARIANTS, DATA, parent)
    before = hashed(kto.Args(dtype="float32"))
    hashes = {name: hashed(args) for name, args in variants(kto.Args(dtype="float32"))}
    assert {name for name, h in hashes.items() if h != before} == SCIENCE
    assert {f.name for f in dataclasses.fields(kto.Args)} - SCIENCE <= common.RUN_KNOBS
    assert len({*hashes.values()}) == len(SCIENCE) + 1
    assert common.config_hash("dpo", kto.Args(dtype="float32"), INVARIANTS, DATA, parent) != before


# -- resume, ranks, micro-batches -----------------------------------------------------------------

def test_stopped_after_every_step(kto_args, kto_run, tmp_path, monkeypatch):
    """One step a process life: the adapter and the log are those of a run that was never stopped."""
    write_log, stop_at = common.Run.log, []

    def log_and_stop(self, step, *line):
        write_log(self, step, *line)
        if step in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(common.Run, "log", log_and_stop)
    args = {**kto_args, "checkpoint_every": 100}
    for step in range(3):
        stop_at[:] = [step]
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "kto_v1", **args)
        assert stop.value.code == 128 + signal.SIGTERM
    stop_at.clear()
    out = train(tmp_path / "kto_v1", **args)
    a, b = (load_file(Path(d) / "adapter_model.safetensors") for d in (out, kto_run))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)
    assert log(out) == log(kto_run) and record(out)["metrics"] == record(kto_run)["metrics"]


def test_micro_tokens_and_ranks_do_not_change_the_update(kto_args, tmp_path):
    """Packs of one or two rows, and two ranks (gloo), with repeated prompts, steps of 7 and 8 rows and a last
    measurement of an odd number of rows: z0, log and weights to float tolerance."""
    rows = some(23, lambda i: i % 3 > 0, prompts=15)
    args = {**kto_args, "data": labelled(tmp_path, rows), "heldout_rows": 13, "lr": 3e-3, "epochs": 2}
    whole = train(tmp_path / "kto_v1", **args)
    flags = [w for k, v in {**args, "out": str(tmp_path / "ranks")}.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                                str(REPO / "kto.py"), *flags], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    runs = [train(tmp_path / "small", **{**args, "micro_tokens": 128}), str(tmp_path / "ranks")]
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "= 2 ranks" in output, output
    weights = load_file(Path(whole) / "adapter_model.safetensors")
    assert len({line["z0"] for line in log(whole)}) > 2
    for run in runs:
        for mine, theirs in zip(log(run), log(whole), strict=True):
            for key, value in theirs.items():
                assert mine[key] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-3)), (key, mine["step"])
        for key in ("loss", "z0", "grad_norm", "logprobs_desirable"):
            assert log(run)[0][key] == pytest.approx(log(whole)[0][key], rel=1e-5, abs=1e-6)
        for key, value in record(whole)["metrics"].items():
            exact = value is None or isinstance(value, str)
            assert record(run)["metrics"][key] == (value if exact else pytest.approx(value, rel=1e-3, abs=1e-3)), key
        found = load_file(Path(run) / "adapter_model.safetensors")
        ours, theirs = (torch.cat([w[k].flatten() for k in sorted(w) if "lora_B" in k]) for w in (found, weights))
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


# -- learning -------------------------------------------------------------------------------------

def test_it_learns_a_planted_label(kto_args, tmp_path):
    """Desirable answers have the word "sky", others "rain", at a random place among random words. After two epochs
    over 95 % of held-out rows are on their side of z0, and the classes' rewards are more than 2 apart, on its two sides."""
    g = torch.Generator().manual_seed(1)

    def answer(word):
        words = [w for w in sentence(g, int(torch.randint(2, 10, (1,), generator=g))).split() if w not in ("sky", "rain", "rains")]
        words.insert(int(torch.randint(len(words) + 1, (1,), generator=g)), word)
        return " ".join(words)
    for name, n in (("x", 400), ("x_heldout", 120)):
        write_jsonl(tmp_path / f"{name}.jsonl", [
            {"prompt": f"{name} {i} why", "completion": answer("sky" if i % 2 else "rain"), "label": bool(i % 2)} for i in range(n)])
    out = train(tmp_path / "run", **{**kto_args, "data": str(tmp_path / "x.jsonl"), "rows": 400, "heldout_rows": 100,
                                     "batch_size": 16, "lr": 3e-3, "beta": 0.5, "epochs": 2, "micro_tokens": 4096,
                                     "checkpoint_every": 100})
    metrics, lines = record(out)["metrics"], log(out)
    assert metrics["heldout_rows"] == 100 and metrics["heldout_accuracy"] > 0.95
    assert metrics["heldout_margin"] > 2 and metrics["heldout_auc"] > 0.98
    assert metrics["heldout_rewards_desirable"] > 0.5 * metrics["heldout_z0"] > metrics["heldout_rewards_undesirable"]
    assert lines[0]["loss"] == 0.5 > 0.3 > lines[-1]["loss"] and metrics["heldout_loss"] < 0.25


# -- bad input ------------------------------------------------------------------------------------

@pytest.fixture
def refused(kto_args, tmp_path, capsys, monkeypatch):
    """refused(*parts, **changes): exit code 2 before a model loads, one error that has the parts, nothing written."""
    def loads(*args, **kwargs):
        raise AssertionError("a model was loaded")

    def check(*parts, **changes):
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loads)
            kto.main(kto.Args(**{**kto_args, "out": str(tmp_path / "new" / "run"), **changes}))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
        assert [part for part in parts if str(part) not in error] == [], error
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    return check


@pytest.mark.parametrize("label", [1, 0, "yes", 0.5])
def test_a_label_that_is_not_true_or_false(refused, tmp_path, label):
    rows = [{**r, "label": label} for r in some(20)]
    refused("x.jsonl, row ", f"label must be true or false, got {label!r}", data=labelled(tmp_path, rows))


def test_labels_that_are_missing(refused, tmp_path):
    rows = some(20)
    rows[7]["label"] = rows[8]["label"] = None
    refused("x.jsonl: 2 of 20 rows are degenerate (null label 2)", data=labelled(tmp_path, rows))


@pytest.mark.parametrize("missing", ["prompt", "completion", "label"])
def test_a_missing_column(refused, tmp_path, missing):
    rows = [{k: v for k, v in r.items() if k != missing} for r in some(20)]
    refused("x.jsonl", "answers with a label (prompt, completion, label)",
            "with the columns " + ", ".join(k for k in ("prompt", "completion", "label") if k != missing),
            data=labelled(tmp_path, rows))


def test_a_pair_without_a_side(refused, tmp_path):
    refused("x.jsonl", "the prompt inside both answers (chosen, rejected)",
            data=labelled(tmp_path, [{"prompt": "a", "chosen": "b"}] * 20))


def test_heldout_rows_of_neither_layout(refused, tmp_path):
    refused("x_heldout.jsonl: prompt and completion", "answers with a label",
            data=labelled(tmp_path, some(20), [{"prompt": "a", "completion": "b"}] * 5))


@pytest.mark.parametrize("change, part", [
    ({"completion": 5}, "completion is neither a text nor messages"), ({"prompt": 5}, "prompt is neither"),
    ({"completion": [{"role": "user", "content": "x"}]}, "roles out of order"), ({"prompt": []}, "prompt is neither")])
def test_a_row_that_is_no_conversation(refused, tmp_path, change, part):
    rows = [{"prompt": user(r["prompt"]), "completion": [{"role": "assistant", "content": r["completion"]}], "label": r["label"]}
            for r in some(20)]
    rows[3] |= change
    refused("x.jsonl, row 3", part, data=labelled(tmp_path, rows))


def test_no_heldout_rows(refused, tmp_path):
    data = write_jsonl(tmp_path / "alone.jsonl", some(20, prompts=1))
    refused("no held-out rows found beside", "alone.jsonl", "--heldout-data", data=data)


def test_one_row(refused, tmp_path):
    refused("1 rows in steps of --batch-size 8", "at least 2", data=labelled(tmp_path, some(1)))
    refused("1 rows in steps of --batch-size 8", data=labelled(tmp_path, some(20)), rows=1)


def test_steps_of_one_row(refused):
    refused("--batch-size 1", "at least 2, since z0 needs another row's answer", batch_size=1)


def test_one_heldout_row(refused, tmp_path):
    refused("1 rows that share a z0", "two prompts with different answers", data=labelled(tmp_path, some(20)), heldout_rows=1)


def test_a_prompt_with_more_rows_than_steps(refused, tmp_path):
    refused("2 rows have the same prompt", "an epoch has 1 steps", "--batch-size", batch_size=20,
            data=labelled(tmp_path, some(20, prompts=19)))


def test_answers_that_are_all_equal(refused, tmp_path):
    rows = [{**r, "completion": "yes"} for r in some(20)]
    refused("rows that share a z0", "no mismatched pair", data=labelled(tmp_path, rows))


def test_many_degenerate_rows(refused, tmp_path):
    rows = [{**r, "completion": " "} if i % 10 == 0 else r for i, r in enumerate(some(40))]
    refused("degenerate", "empty answer", "--max-dropped", data=labelled(tmp_path, rows), rows=40)
    rows = [{**r, "completion": "sky " * 200} if i % 5 == 0 else r for i, r in enumerate(some(40))]
    refused("--max-length", "--max-overlong", data=labelled(tmp_path, rows), rows=40)


@pytest.mark.parametrize("name, value", [("beta", 0.0), ("beta", -0.1), ("beta", math.nan), ("desirable_weight", 0.0),
                                         ("undesirable_weight", -1.0), ("lr", 0.0), ("heldout_rows", 0), ("epochs", 0),
                                         ("warmup", 1.5), ("max_dropped", -0.1)])
def test_numbers_out_of_range(refused, name, value):
    refused(f"--{name.replace('_', '-')} must be", **{name: value})


def test_sizes_that_do_not_fit(refused):
    refused("--max-length 600", "512 positions", max_length=600)
    refused("--micro-tokens 64", micro_tokens=64)


def test_a_reward_model_is_no_parent(refused, reward_run):
    refused("is a reward model, not a policy", sft_adapter=reward_run)


def test_a_loss_that_is_not_finite_names_step_and_rows(kto_args, tmp_path):
    """z0's estimate too; read a step later."""
    with pytest.raises(FloatingPointError, match=r"kl.*at step 1; rows of the data set"):
        train(tmp_path / "run", **{**kto_args, "lr": 1e30, "checkpoint_every": 100})
    assert not (tmp_path / "run" / "run.json").exists()
