"""The reward model: its loss and figures by independent derivation, what is saved and reloaded, what it learns, what
it refuses. Tolerance 1e-5 in fp32 unless a test says why not."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import transformers
import trl
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats
from statsmodels.stats.proportion import proportion_confint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import chat
import common
import inputs
import fast
import dpo
import evaluate
import reward
from common import Example
from conftest import make_model, part_of, sentence, write_jsonl

REPO = Path(common.__file__).parent


def record(run):
    return json.loads((Path(run) / "run.json").read_text())


def log(run):
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]


def train(out, **args):
    reward.main(reward.Args(**args, out=str(out)))
    return str(out)


def examples(n=9, seed=3, low=3, high=40, eos=2):
    """Random sequences that end with EOS; pad == eos, and some have EOS inside too."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        ids = torch.randint(low, 300, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()
        out.append(reward.at_eos(ids + [eos] * (1 + i % 3)))
    return out


def random_reward(tiny_model, seed=0):
    """A reward model whose adapter isn't zero."""
    torch.manual_seed(seed)
    model = common.add_head(common.add_lora(common.load_model(tiny_model, dtype=torch.float32)), seed)
    for p in common.trainable(model)[:-1]:
        p.data = torch.randn_like(p) * 0.05
    return model


# -- the loss -------------------------------------------------------------------------------------

@pytest.mark.parametrize("chosen, rejected, centring, expected", [
    (0.0, 0.0, 0.01, math.log(2)),
    (2.0, 1.0, 0.0, 0.31326169),           # ln(1 + 1/e)
    (2.0, 1.0, 0.01, 0.31326169 + 0.09),   # (2 + 1)² · 0.01
    (1.0, 2.0, 0.5, 1.31326169 + 4.5),     # ln(1 + e) + 9/2
    (-3.0, 3.0, 9.0, 6.00247568),          # ln(1 + e⁶); opposite scores cost no centring
])
def test_loss_by_hand(chosen, rejected, centring, expected):
    loss = reward.reward_loss(torch.tensor([chosen]), torch.tensor([rejected]), centring)
    assert loss.tolist() == pytest.approx([expected], abs=1e-5)


def test_slopes_of_the_loss_by_hand():
    """Scores (1, 0), λ = 0.1: ∂/∂r_c = −σ(−1) + 2·0.1·1 = −0.06894142, ∂/∂r_r = +σ(−1) + 0.2 = 0.46894142."""
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (1.0, 0.0))
    reward.reward_loss(chosen, rejected, 0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.06894142, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(0.46894142, abs=1e-6)


def test_extreme_margins_stay_finite():
    assert reward.reward_loss(torch.tensor([-500.0]), torch.tensor([500.0]), 0.0).item() == pytest.approx(1000)


@pytest.mark.parametrize("centring", [0.0, 0.01, 1.0])
def test_loss_is_trls(tiny_model, centring, tmp_path):
    """TRL's RewardTrainer on the same batch, loss and gradient: a library's classifier with the saved adapter, padded
    with a token that no sequence has; ours packed, the mean over the pairs."""
    model, side = random_reward(tiny_model), examples(8)
    pack, = fast.pack(side, 4096, unit=2)
    chosen, rejected = common.reward_scores(model, pack).view(-1, 2).T
    ours = reward.reward_loss(chosen, rejected, centring).mean()
    ours.backward()

    common.save_policy(model, None, tmp_path, chat.load_tokenizer(tiny_model), tiny_model)
    library = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    library.config.pad_token_id = pad = 363
    assert not any(pad in e.ids for e in side)
    library = PeftModel.from_pretrained(library, tmp_path, is_trainable=True)
    side, width = side[::2] + side[1::2], max(len(e.ids) for e in side)  # TRL's layout: all chosen, then all rejected
    inputs = {"input_ids": torch.tensor([e.ids + [pad] * (width - len(e.ids)) for e in side]),
              "attention_mask": torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in side])}
    trainer = object.__new__(trl.RewardTrainer)
    trainer.__dict__.update(
        model=library, args=SimpleNamespace(center_rewards_coefficient=centring or None), _total_train_tokens=0,
        _tp_size=1, _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x))
    expected = trainer.compute_loss(library, inputs)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5) and expected.item() > 0.1
    expected.backward()
    theirs = [p.grad for p in library.parameters() if p.requires_grad]
    mine = [p.grad for p in common.trainable(model)]
    assert len(mine) == len(theirs) == 29 and mine[-1].abs().max() > 1e-3
    assert all((x - y).abs().max() <= 1e-5 * max(1, y.abs().max()) for x, y in zip(mine, theirs))


# -- the score ------------------------------------------------------------------------------------

def test_a_score_is_read_at_the_eos_and_does_not_depend_on_the_pack(tiny_model):
    """Packed scores are those of each sequence alone, read by hand at its last token, pad == eos or not."""
    model, sequences = random_reward(tiny_model), examples()
    head = common.base_of(model).score.weight
    alone = []
    with torch.no_grad():
        for e in sequences:
            pack, = fast.pack([e], 4096)
            hidden = fast.hidden_states(common.base_of(model), pack)
            alone.append((hidden[len(e.ids) - 1] @ head[0]).item())
        packed = common.score_examples(model, sequences, 4096)
        split = common.score_examples(model, sequences, 64)
    assert packed.tolist() == pytest.approx(alone, abs=1e-5) and split.tolist() == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 0.1


def test_only_its_own_tokens_change_a_score(tiny_model):
    model, sequences = random_reward(tiny_model), examples(4)
    changed = [*sequences]
    changed[1] = reward.at_eos([7] + changed[1].ids[1:])
    with torch.no_grad():
        a, b = (common.score_examples(model, s, 4096) for s in (sequences, changed))
    assert (a != b).tolist() == [False, True, False, False]


def test_the_fresh_model_is_base_and_head(tiny_model):
    """B = 0: the adapter adds nothing; the head is fp32, without bias, of sd 1/√(H+1), the seed's and nobody else's."""
    def fresh(seed):
        torch.manual_seed(seed + 100)  # the head has its own noise
        return common.add_head(common.add_lora(common.load_model(tiny_model, dtype=torch.bfloat16)), seed)
    model = fresh(3)
    pack, = fast.pack(examples(3), 4096)
    with torch.no_grad():
        on = common.reward_scores(model, pack)
        with common.reference(model):
            assert torch.equal(on, common.reward_scores(model, pack))
    head = common.base_of(model).score
    assert head.bias is None and head.weight.dtype == on.dtype == torch.float32 and head.weight.shape == (1, 64)
    assert 0.7 < head.weight.std().item() * math.sqrt(65) < 1.3
    assert torch.equal(head.weight, common.base_of(fresh(3)).score.weight)
    assert not torch.equal(head.weight, common.base_of(fresh(4)).score.weight)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 29 and names[-1].endswith("score.weight")


# -- what is saved, and loading it ----------------------------------------------------------------

def test_saved_scores_are_reloaded_scores(tiny_model, reward_args, tmp_path, monkeypatch):
    """The run directory gives the scores of the model that was trained, to the last bit."""
    saved, save = {}, common.Run.save

    def keep(self, policy, tokenizer, prompts):
        save(self, policy, tokenizer, prompts)
        saved["scores"] = common.score_examples(policy, examples(), 256)
    monkeypatch.setattr(common.Run, "save", keep)
    out = train(tmp_path / "rm", **reward_args)
    run, _, model, model_dir, _, _ = inputs.read_start(out, reward=True)
    assert run["method"] == "reward" and model == tiny_model
    model = common.load_reward(model_dir, out, dtype=torch.float32)
    assert not common.trainable(model) and not model.training
    assert torch.equal(common.score_examples(model, examples(), 256), saved["scores"])
    assert saved["scores"].std() > 1e-3


def test_two_reward_models_on_one_base(tiny_model, reward_run, reward_args, tmp_path):
    """PPO's layout: one copy of the base, two adapters, each with its own head."""
    other = train(tmp_path / "other", **{**reward_args, "seed": 7})
    alone = [common.score_examples(common.load_reward(tiny_model, d, dtype=torch.float32), examples(), 4096)
             for d in (reward_run, other)]
    both = common.load_reward(tiny_model, reward_run, dtype=torch.float32)
    both.load_adapter(other, "second")
    assert torch.equal(common.score_examples(both, examples(), 4096), alone[0])

    def active():
        return {name: list(m.active_adapters) for name, m in both.named_modules() if "_active_adapter" in vars(m)}
    both.set_adapter("second")
    by_peft = active()
    for name, scores in (("reward", alone[0]), ("second", alone[1])):
        assert torch.equal(common.score_examples(common.use_scorer(both, name), examples(), 4096), scores)
    assert active() == by_peft and len(by_peft) == 2 * 7 + 1
    with pytest.raises(KeyError):
        common.use_scorer(both, "third")
    common.train_scorer(both, "reward")
    common.use_scorer(both, "second")  # changes nothing about what learns
    assert {".reward." in n for n, p in both.named_parameters() if p.requires_grad} == {True}
    assert len(common.trainable(both)) == 2 * 14 + 1
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


def test_plain_peft_gives_the_same_scores(tiny_model, reward_run, data_dir):
    """A sequence classifier of transformers with the run directory as its adapter; one text at a time, no pad id."""
    config = json.loads((Path(reward_run) / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, reward_run).eval()
    base.config.pad_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(reward_run)
    sequences, theirs = [], []
    for line in (data_dir / "preference_heldout.jsonl").read_text().splitlines()[:8]:
        row = json.loads(line)
        ids = tokenizer.apply_chat_template(row["prompt"] + row["chosen"])["input_ids"]
        ids = ids[:len(ids) - ids[::-1].index(tokenizer.eos_token_id)]  # through the EOS
        sequences.append(reward.at_eos(ids))
        with torch.no_grad():
            theirs.append(plain(input_ids=torch.tensor([ids])).logits.item())
    ours = common.score_examples(common.load_reward(tiny_model, reward_run, dtype=torch.float32), sequences, 4096)
    assert ours.tolist() == pytest.approx(theirs, abs=1e-4) and max(theirs) - min(theirs) > 1e-3


def test_the_card_loads_the_reward_model(reward_run):
    code = (Path(reward_run) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    assert names["reward"].base_model.model.score.modules_to_save["default"].weight.shape == (1, 64)
    found = load_file(Path(reward_run) / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(names["reward"].base_model.model.score.modules_to_save["default"].weight, found)


# -- a run ----------------------------------------------------------------------------------------

def test_what_a_run_writes(reward_run, reward_args):
    found = record(reward_run)
    assert found["method"] == "reward" and found["parent"] is None
    assert len(load_file(Path(reward_run) / "adapter_model.safetensors")) == 29
    lines = log(reward_run)
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[0]["lr"] == pytest.approx(1e-3)
    for line in lines:
        assert line["margin"] == pytest.approx(line["scores_chosen"] - line["scores_rejected"], abs=1e-5)
        assert 0 <= line["accuracy"] <= 1 and line["chosen_tokens"] > 1
    results = json.loads(next(Path(reward_args["results"]).glob("rm/rm_v1-*.json")).read_text())
    assert results["adapter_sha256"] == found["adapter_sha256"] and results["config_hash"] == found["config_hash"]
    assert results["args"] == {k: Path(v).name if str(v).startswith("/") else v for k, v in found["args"].items()}
    assert results["command"].split("/")[-1] == found["command"].split("/")[-1]  # of the page of the run; no places
    assert results["n"] == 16 == found["metrics"]["heldout_pairs"]
    assert results["accuracy"] == found["metrics"]["heldout_accuracy"]
    assert results["interval"] == pytest.approx(common.wilson(results["accuracy"] * 16, 16))
    assert set(results) >= {"longer_wins", "length_matched", "score_length", "margin_length", "scores", "calibration",
                            "loss"}
    assert sum(b["n"] for b in results["calibration"]) == 16
    with Image.open(next(Path(reward_args["results"]).glob("rm/rm_v1-*.png"))) as picture:
        assert picture.format == "PNG" and picture.width > 600


def test_heldout_figures_are_those_of_the_reloaded_model(tiny_model, reward_run, reward_args):
    """Accuracy and loss of results/rm, recomputed pair by pair from the run directory and the file."""
    tokenizer = chat.load_tokenizer(tiny_model)
    rows = [json.loads(line) for line in Path(reward_args["data"]).with_name(
        "preference_heldout.jsonl").read_text().splitlines()]
    rows = [rows[i] for i in common.permutation(len(rows), 42, "rows")]
    rows = [r for r in rows if common.bucket("judge " + inputs.prompt_key(r["prompt"])) >= 0.1][:16]  # not the judge's
    model = common.load_reward(tiny_model, reward_run, dtype=torch.float32)
    r = [[common.score_examples(model, [reward.at_eos(chat.render(tokenizer, row["prompt"] + row[side])[0])], 512)
          .item() for side in ("chosen", "rejected")] for row in rows]
    results = json.loads(next(Path(reward_args["results"]).glob("rm/rm_v1-*.json")).read_text())
    assert len(r) == results["n"]
    assert results["accuracy"] == sum(a > b for a, b in r) / len(r)
    expected = numpy.mean([math.log1p(math.exp(b - a)) + 0.01 * (a + b) ** 2 for a, b in r])
    assert results["loss"] == pytest.approx(expected, abs=1e-5)
    assert results["scores"]["chosen"]["mean"] == pytest.approx(numpy.mean([a for a, _ in r]), abs=1e-5)
    assert results["scores"]["rejected"]["sd"] == pytest.approx(numpy.std([b for _, b in r]), abs=1e-5)


def test_it_learns_a_planted_preference(tiny_model, reward_args, tmp_path):
    """Chosen answers have the word "sky", rejected ones "rain", at a random place among random words: over 95 % of
    held-out pairs are right after one epoch, whichever answer is longer."""
    g = torch.Generator().manual_seed(1)

    def answer(word):
        words = sentence(g, int(torch.randint(2, 10, (1,), generator=g))).split()
        words = [w for w in words if w not in ("sky", "rain", "rains")]
        words.insert(int(torch.randint(len(words) + 1, (1,), generator=g)), word)
        return " ".join(words)
    for name, n in (("x", 700), ("x_heldout", 120)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i} why", "chosen": answer("sky"),
                                                  "rejected": answer("rain")} for i in range(n)])
    out = train(tmp_path / "rm", **{**reward_args, "data": str(tmp_path / "x.jsonl"), "rows": 400, "heldout_rows": 100,
                                    "lr": 5e-3, "micro_tokens": 4096, "checkpoint_every": 100,
                                    "results": str(tmp_path / "results")})
    results = json.loads(next(tmp_path.glob("results/rm/rm-*.json")).read_text())
    assert results["n"] == 100 and results["accuracy"] > 0.95 and results["interval"][0] > 0.9
    assert 0.3 < results["longer_wins"]["accuracy"] < 0.7 and abs(results["score_length"]["pearson"]) < 0.5
    assert log(out)[-1]["loss"] < 0.3 < log(out)[0]["loss"]
    assert abs(results["scores"]["chosen"]["mean"] + results["scores"]["rejected"]["mean"]) < 3  # centred


def test_stopped_after_every_step(reward_args, reward_run, tmp_path, monkeypatch):
    """One step a process life: the adapter with its head and the log are those of a run that was never stopped."""
    write_log, stop_at = common.Run.log, []

    def log_and_stop(self, step, *line):
        write_log(self, step, *line)
        if stop_at and step == stop_at[0]:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(common.Run, "log", log_and_stop)
    out = tmp_path / "rm_v1"
    args = {**reward_args, "checkpoint_every": 100, "results": str(tmp_path / "results")}
    for step in range(3):
        stop_at[:] = [step]
        with pytest.raises(SystemExit) as stop:
            train(out, **args)
        assert stop.value.code == 128 + signal.SIGTERM
        state = load_file(out / "checkpoint" / "state.safetensors")
        adapter = load_file(Path(reward_run) / "adapter_model.safetensors")
        assert len(state["parameter/0"]) == sum(t.numel() for t in adapter.values())  # the head among them
    stop_at.clear()
    train(out, **args)
    a, b = (load_file(Path(d) / "adapter_model.safetensors") for d in (out, reward_run))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log(out) == log(reward_run) and record(out)["metrics"] == record(reward_run)["metrics"]
    one, other = (json.loads(next(Path(d).glob("rm/rm_v1-*.json")).read_text())
                  for d in (args["results"], reward_args["results"]))
    assert one.keys() == other.keys() and {k for k in one if one[k] != other[k]} <= {"args", "command"}  # places, interval


def test_micro_tokens_and_ranks_do_not_change_the_update(reward_args, reward_run, tmp_path):
    """Micro-batches of one or two pairs, and two ranks (gloo): weights, log and held-out figures to float tolerance."""
    small = train(tmp_path / "rm_v1", **{**reward_args, "micro_tokens": 256, "results": str(tmp_path / "small")})
    args = {**reward_args, "out": str(tmp_path / "ranks" / "rm_v1"), "results": str(tmp_path / "two")}
    flags = [w for k, v in args.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           str(REPO / "reward.py"), *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    whole = load_file(Path(reward_run) / "adapter_model.safetensors")
    figures = json.loads(next(Path(reward_args["results"]).glob("rm/rm_v1-*.json")).read_text())
    for run, results in ((small, "small"), (args["out"], "two")):
        for step, (mine, theirs) in enumerate(zip(log(run), log(reward_run))):
            for key in ("loss", "margin", "grad_norm"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3 if step else 1e-5, abs=1e-3 if step else 1e-5)
        found = load_file(Path(run) / "adapter_model.safetensors")
        # Adam's first steps move by lr whatever the gradient's size: entries near 0 may differ by a share of lr
        assert all((found[k] - whole[k]).abs().mean() < 1e-5 for k in whole)
        assert json.loads(next((tmp_path / results).glob("rm/rm_v1-*.json")).read_text())["loss"] == pytest.approx(
            figures["loss"], abs=1e-3)


def test_gradient_does_not_depend_on_micro_tokens(tiny_model):
    """The sum over packs of Σ losses / pairs of the step: one gradient, with the head's, whatever the packs."""
    def gradient(micro_tokens):
        model, pairs = random_reward(tiny_model), examples(12)
        packs = fast.pack(pairs, micro_tokens, unit=2)
        for pack in packs:
            chosen, rejected = common.reward_scores(model, pack).view(-1, 2).T
            (reward.pair_metrics(chosen, rejected, 0.01)[0].sum() / 6).backward()
        return len(packs), [p.grad for p in common.trainable(model)]
    (n, a), (m, b) = gradient(4096), gradient(96)
    assert n == 1 and m > 2 and all(g.abs().max() > 0 for g in a)
    assert all((x - y).abs().max() <= 1e-5 * max(1, x.abs().max()) for x, y in zip(a, b))


# -- the figures ----------------------------------------------------------------------------------

@pytest.mark.parametrize("right, n", [(0, 5), (5, 5), (1, 2), (37, 60), (1234, 1800)])
def test_wilson_is_scipys(right, n):
    expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert common.wilson(right, n) == pytest.approx([expected.low, expected.high], abs=1e-7)


def test_wilson_with_ties_and_without_trials():
    low, high = common.wilson(2.5, 5)
    assert low + high == pytest.approx(1) and common.wilson(0, 0) is None


def test_the_interval_of_a_share_stays_inside_0_and_1():
    values = torch.tensor([1.0] * 19 + [0.0])
    low, high = common.interval(values, range(20))
    assert low < 0.95 and high > 1  # of a mean: beyond what a share can be
    expected = proportion_confint(0.95 * 19, 19, method="wilson")  # n − 1: the variance has n − 1 in the denominator
    assert common.share_interval(values, range(20)) == pytest.approx(expected, abs=1e-6)
    twice = common.share_interval(values.repeat_interleave(2), [i // 2 for i in range(40)])
    assert twice == pytest.approx(common.share_interval(values, range(20)))  # the same prompt twice tells nothing new
    assert common.share_interval(values.repeat_interleave(2), range(40))[0] > twice[0]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_the_interval_of_equal_shares_is_wilsons_over_the_groups(value):
    groups = [0, 0, 1, 2]
    assert common.share_interval(torch.full((4,), value), groups) == pytest.approx(common.wilson(3 * value, 3))
    assert common.share_interval(torch.full((4,), value), [0] * 4) is None


def test_figures_by_hand():
    """Four pairs: margins 3, −1, 0, 2; lengths (10, 5), (4, 8), (20, 19), (7, 7)."""
    scores = torch.tensor([[2.0, -1.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    lengths = torch.tensor([[10, 5], [4, 8], [20, 19], [7, 7]])
    found = reward.evaluation(scores, lengths, 0.0)
    assert (found["n"], found["accuracy"]) == (4, 2.5 / 4)  # right, wrong, tie, right
    assert found["longer_wins"]["accuracy"] == 2.5 / 4      # longer, shorter, longer, equal
    assert found["length_matched"]["n"] == 2 and found["length_matched"]["accuracy"] == 1.5 / 2
    assert found["scores"]["chosen"] == {"mean": 1.0, "sd": pytest.approx(math.sqrt(0.5))}
    assert found["scores"]["rejected"] == {"mean": 0.0, "sd": pytest.approx(1.0)}
    assert found["scores"]["margin"]["mean"] == 1.0
    # Pearson of margins (3, −1, 0, 2) and differences (5, −4, 1, 0): centred (2, −2, −1, 1), (4.5, −4.5, 0.5, −0.5):
    # 17 / √(10 · 41); ranks (4, 1, 2, 3) and (4, 1, 3, 2): 1 − 6·2/(4·15) = 0.8
    assert found["margin_length"]["pearson"] == pytest.approx(17 / math.sqrt(410))
    assert found["margin_length"]["spearman"] == pytest.approx(0.8)


def test_length_matched_at_the_limit():
    assert reward.length_matched(torch.tensor([[10, 9], [9, 10], [9, 8], [100, 91], [100, 89]])).tolist() == [
        True, True, False, True, False]


def test_correlation_of_a_constant():
    nothing = {"pearson": None, "spearman": None}
    assert reward.correlation(torch.ones(5), torch.arange(5)) == nothing
    assert reward.correlation(torch.arange(1), torch.arange(1)) == nothing
    assert reward.correlation(torch.arange(4.0), torch.tensor([1.0, 10, 100, 1000]))["spearman"] == pytest.approx(1)


def test_calibration_by_hand():
    """Twenty margins 0.1 … 2.0, every fifth of them negative: tenths of two, by size."""
    margin = torch.tensor([(0.1 * i) * (-1 if i % 5 == 0 else 1) for i in range(1, 21)])
    bins = reward.calibration(margin[torch.randperm(20, generator=torch.Generator().manual_seed(0))])
    assert [b["n"] for b in bins] == [2] * 10
    assert [b["accuracy"] for b in bins] == [1, 1, 0.5, 1, 0.5, 1, 1, 0.5, 1, 0.5]  # 5, 10, 15, 20 in bins 3, 5, 8, 10
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.1, 0.2, 1.9, 2.0)]
    assert bins[0]["confidence"] == pytest.approx(sum(sigmoid[:2]) / 2, abs=1e-6)
    assert bins[9]["confidence"] == pytest.approx(sum(sigmoid[2:]) / 2, abs=1e-6)
    assert bins[0]["largest_margin"] == pytest.approx(0.2)
    assert [b["n"] for b in reward.calibration(torch.ones(3))] == [1, 1, 1]


# -- scoring a file -------------------------------------------------------------------------------

@pytest.fixture
def answers(tmp_path):
    rows = [{"prompt": "why rain", "completion": "sky", "id": 7},
            {"prompt": "why rain", "completion": "books and bread", "id": 8}]
    return write_jsonl(tmp_path / "answers.jsonl", rows)


def scored(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_score_a_file(reward_run, tiny_model, answers, tmp_path):
    reward.main(reward.Args(score=answers, adapter=reward_run, device="cpu"))
    rows = scored(answers + ".scored.jsonl")
    assert [{k: v for k, v in r.items() if k != "score"} for r in rows] == scored(answers)
    tokenizer = chat.load_tokenizer(tiny_model)
    model = common.load_reward(tiny_model, reward_run, dtype=torch.float32)
    for row in rows:
        ids, _ = chat.render(tokenizer, [{"role": "user", "content": row["prompt"]},
                                           {"role": "assistant", "content": row["completion"]}])
        assert row["score"] == pytest.approx(common.score_examples(model, [reward.at_eos(ids)], 512).item(), abs=1e-5)
    assert rows[0]["score"] != rows[1]["score"]

    messages = [{"prompt": [{"role": "user", "content": r["prompt"]}],
                 "completion": [{"role": "assistant", "content": r["completion"]}]} for r in rows]
    write_jsonl(tmp_path / "m.jsonl", messages)
    reward.main(reward.Args(score=str(tmp_path / "m.jsonl"), adapter=reward_run, device="cpu",
                            out=str(tmp_path / "there.jsonl")))
    assert [r["score"] for r in scored(tmp_path / "there.jsonl")] == [r["score"] for r in rows]
    assert not (tmp_path / "m.jsonl.scored.jsonl").exists()


# -- bad input ------------------------------------------------------------------------------------

@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """refused(call, *parts): exit code 2 before a model loads, one error that has the parts, nothing written."""
    def loads(*args, **kwargs):
        raise AssertionError("a model was loaded")

    def check(call, *parts):
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loads)
            call()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
        assert [part for part in parts if str(part) not in error] == [], error
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    return check


def score(adapter, answers, **args):
    return lambda: reward.main(reward.Args(score=answers, adapter=str(adapter), device="cpu", **args))


def test_a_policy_is_not_a_reward_model(refused, sft_run, answers):
    refused(score(sft_run, answers), sft_run, "no score head")


def test_a_reward_model_is_not_a_policy(refused, reward_run, dpo_args, tmp_path):
    refused(lambda: dpo.main(dpo.Args(**dpo_args, sft_adapter=reward_run, out=str(tmp_path / "x"))),
            reward_run, "is a reward model, not a policy")
    refused(lambda: evaluate.main(evaluate.Args(adapter=(reward_run,), out=str(tmp_path / "r"))),
            reward_run, "is a reward model, not a policy")


def test_a_reward_model_that_lost_its_head(refused, reward_run, answers, dpo_args, tmp_path):
    copy = shutil.copytree(reward_run, tmp_path / "headless")
    tensors = load_file(copy / "adapter_model.safetensors")
    del tensors["base_model.model.score.weight"]
    save_file(tensors, copy / "adapter_model.safetensors", {"format": "pt"})
    refused(score(copy, answers), copy, "no score head")
    refused(lambda: dpo.main(dpo.Args(**dpo_args, sft_adapter=str(copy), out=str(tmp_path / "x"))), "not a policy")


def test_a_reward_model_with_an_altered_head(refused, reward_run, answers, tmp_path):
    copy = shutil.copytree(reward_run, tmp_path / "altered")
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] += 1
    save_file(tensors, copy / "adapter_model.safetensors", {"format": "pt"})
    refused(score(copy, answers), copy, "are not those its run.json names")


def test_a_reward_model_of_another_base(refused, reward_run, answers, tmp_path):
    other = make_model(tmp_path / "other", seed=5)
    refused(score(reward_run, answers, model=other), reward_run, record(reward_run)["weights_sha256"][:8],
            common.weights_sha256(other)[:8])


@pytest.mark.parametrize("rows, parts", [
    ([{"prompt": "why"}], ["no column 'completion'"]), ([{"completion": "why"}], ["no column 'prompt'"]),
    ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], ["row 1"]),
    ([{"prompt": "a", "completion": "sky " * 900}], ["row 0", "512"])])
def test_rows_that_cannot_be_scored(refused, reward_run, tmp_path, rows, parts):
    refused(score(reward_run, write_jsonl(tmp_path / "bad.jsonl", rows)), "bad.jsonl", *parts)


def test_a_text_without_tokens_cannot_be_scored(refused, reward_run, tmp_path, monkeypatch):
    """Of a tokenizer that can't write every text, here one word."""
    tokenise = chat.tokenise

    def without_quay(tokenizer, conversations, *train):
        if "quay" in str(conversations):
            raise chat.Unwritable("the tokenizer can't write it")
        return tokenise(tokenizer, conversations, *train)
    monkeypatch.setattr(chat, "tokenise", without_quay)
    rows = [{"prompt": "why", "completion": "quay" if i == 2 else "sky"} for i in range(4)]
    refused(score(reward_run, write_jsonl(tmp_path / "bad.jsonl", rows)), "bad.jsonl, row 2: the tokenizer can't write it")


def test_scoring_files_that_are_wrong(refused, reward_run, answers, tmp_path):
    refused(score(reward_run, str(tmp_path / "gone.jsonl")), "gone.jsonl")
    refused(score(reward_run, answers, out=answers), "the file to score")
    refused(score(reward_run, answers, out=str(tmp_path)), "a directory")


def pairs_file(directory, rows, heldout=None):
    write_jsonl(directory / "x_heldout.jsonl", heldout or [
        {"prompt": f"held out {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(30)])
    return write_jsonl(directory / "x.jsonl", rows)


def pairs(n=60):
    return [{"prompt": f"why {i}", "chosen": f"because {i}", "rejected": "no"} for i in range(n)]


def in_part_a(rows):
    return [r for r in rows if part_of([{"role": "user", "content": r["prompt"]}]) == "A"]


def training(reward_args, tmp_path, **changes):
    return lambda: reward.main(reward.Args(**{**reward_args, "out": str(tmp_path / "new" / "run"),
                                              "results": str(tmp_path / "results"), **changes}))


def test_pairs_without_a_column(refused, reward_args, tmp_path):
    rows = [{"prompt": "a", "chosen": "b"}]
    refused(training(reward_args, tmp_path, data=pairs_file(tmp_path, rows)),
            "x.jsonl: prompts, with the columns prompt, chosen", "(prompt, chosen, rejected)")


@pytest.mark.parametrize("change", [{"chosen": " "}, {"chosen": "no"}])
def test_many_degenerate_pairs(refused, reward_args, tmp_path, change):
    rows = in_part_a(pairs(90))
    rows = [{**r, **change} if i % 10 == 0 else r for i, r in enumerate(rows)]
    refused(training(reward_args, tmp_path, data=pairs_file(tmp_path, rows), rows=90), "degenerate", "5%",
            "--max-dropped")


@pytest.mark.parametrize("part", ["A", "J"])
def test_each_part_trains_on_its_own_prompts(reward_args, tmp_path, capsys, part):
    """--part J learns from other prompts than --part A; a training row with a held-out prompt, whatever its answers and
    its system message, is left out of either."""
    rows = pairs(120)
    shared = [next(r for r in rows if part_of([{"role": "user", "content": r["prompt"]}]) == p) for p in "AJ"]
    heldout = [{"prompt": f"held out {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(19)]
    heldout += [{**r, "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": r["prompt"]}],
                 "chosen": "another answer"} for r in shared]
    training(reward_args, tmp_path, data=pairs_file(tmp_path, rows, heldout), part=part, rows=100)()
    listed = json.loads((tmp_path / "new" / "run" / "prompts.json").read_text())
    prompts = [[{"role": "user", "content": r["prompt"]}] for r in rows if r not in shared]
    assert listed["train"] == sorted(inputs.prompt_id(p) for p in prompts if part_of(p) == part)
    assert "note: 1 rows of" in capsys.readouterr().out


@pytest.mark.parametrize("name, value", [("centring", -0.1), ("centring", math.inf), ("lr", 0.0), ("batch_size", 0),
                                         ("heldout_rows", 0), ("warmup", -1.0)])
def test_numbers_out_of_range(refused, reward_args, tmp_path, name, value):
    refused(training(reward_args, tmp_path, **{name: value}), f"--{name.replace('_', '-')} must be")


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("script", ["reward", "dpo"])
def test_micro_batches_hold_the_longest_pair(script, engine, reward_args, dpo_args, sft_run, tmp_path, capsys):
    """The error names the tokens that the longest pair needs, with which the run works; what its two sequences share,
    the fast engine counts once."""
    rows = in_part_a([{"prompt": "how to write code " * 15 + str(i), "chosen": "with small steps " * 5,
                       "rejected": "slowly " * 15} for i in range(90)])
    main, args = (reward.main, reward.Args) if script == "reward" else (dpo.main, dpo.Args)
    given = {"data": pairs_file(tmp_path, rows), "engine": engine, "out": str(tmp_path / "run"), "max_length": 110}
    given |= {**reward_args, "results": str(tmp_path / "results"), **given} if script == "reward" else \
        {**dpo_args, "sft_adapter": sft_run, **given}

    def refused(micro_tokens):
        with pytest.raises(SystemExit):
            main(args(**given | {"micro_tokens": micro_tokens}))
        assert not (tmp_path / "run").exists()
        return int(re.search(r"can't hold the longest pair, (\d+) tokens; give at least", capsys.readouterr().err)[1])
    needed = refused(110)
    assert refused(needed - 1) == needed and (needed < 150) == (engine == "fast")
    main(args(**given | {"micro_tokens": needed}))
    assert common.Run.least_tokens == needed  # fewer are not tried when memory ends


def test_a_prompt_is_shared_where_a_pair_would_not_fit_otherwise():
    """Shared beginnings that save less than 1/16 of all tokens are computed twice, unless a pair wouldn't fit."""
    alone = [Example.completion([5 + i], [*range(20, 50)]) for i in range(38)]
    pair = [Example.completion([*range(9, 29)], [n] * 20) for n in (3, 4)]  # 80 tokens, 60 with their prompt once
    all_of_them = alone + pair
    assert fast.unit_tokens([e.ids for e in all_of_them], 2) == [62] * 19 + [60]
    assert sum(p.tokens for p in fast.pack(all_of_them, 80, unit=2)) == 38 * 31 + 80
    assert sum(p.tokens for p in fast.pack(all_of_them, 79, unit=2)) == 38 * 31 + 60
    with pytest.raises(ValueError, match="60 tokens"):
        fast.pack(pair, 59, unit=2)


def test_a_loss_that_is_not_finite_names_step_and_rows(reward_args, tmp_path):
    with pytest.raises(FloatingPointError, match=r"at step 1; rows of the data set"):
        training(reward_args, tmp_path, lr=1e30, checkpoint_every=100)()
    assert not (tmp_path / "new" / "run" / "run.json").exists() and not (tmp_path / "results").exists()


def test_under_nf4_the_head_stays_fp32_and_reloads_exactly(tiny_model, reward_args, tmp_path, monkeypatch):
    """QLoRA: decoder projections in 4 bits, the head not; the reloaded scores are the trained ones to the last bit."""
    saved, save = {}, common.Run.save

    def keep(self, policy, tokenizer, prompts):
        save(self, policy, tokenizer, prompts)
        saved["head"] = common.base_of(policy).score
        saved["scores"] = common.score_examples(policy, examples(), 256)
    monkeypatch.setattr(common.Run, "save", keep)
    out = train(tmp_path / "rm", **{**reward_args, "quantization": "qlora", "dtype": "bfloat16",
                                    "results": str(tmp_path / "results")})
    assert type(saved["head"]) is torch.nn.Linear and saved["head"].weight.dtype == torch.float32
    model = common.load_reward(tiny_model, out, "nf4")
    assert torch.equal(common.score_examples(model, examples(), 256), saved["scores"])
    reward.main(reward.Args(score=write_jsonl(tmp_path / "a.jsonl", [{"prompt": "why", "completion": "sky"}]),
                            adapter=out, device="cpu"))
    assert math.isfinite(scored(tmp_path / "a.jsonl.scored.jsonl")[0]["score"])
