"""report.py's statistics: against scipy, closed testing and simulation; the verdicts, rule by rule."""

import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats

import report
from report import Change, holm, mcnemar, minimum_detectable_effect, paired_bootstrap, paired_interval, verdict

# ------------------------------------------------------------------ McNemar and its interval


@pytest.mark.parametrize("gained, lost", [(0, 1), (5, 5), (3, 12), (12, 3), (1, 30), (40, 61), (700, 801), (3000, 2700)])
def test_mcnemar_is_the_exact_binomial_test(gained, lost):
    assert mcnemar(gained, lost) == pytest.approx(stats.binomtest(gained, gained + lost).pvalue, rel=1e-9)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0  # nothing to tell apart
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 2**5
    assert mcnemar(1, 4) == 2 * (1 + 5) / 2**5
    assert mcnemar(0, 1000) == 0.5**999 and mcnemar(0, 5000) == 0.0  # in whole numbers: nothing overflows


def tables(n, discordant, effect, repeats, seed):
    """[repeats, 2] (gained, lost) of n items, P(gained) - P(lost) = effect."""
    p = [(discordant + effect) / 2, (discordant - effect) / 2, 1 - discordant]
    return np.random.default_rng(seed).multinomial(n, p, size=repeats)[:, :2].tolist()


@pytest.mark.parametrize("n, discordant", [(541, 0.02), (541, 0.2), (1319, 0.1), (100, 0.5)])
def test_mcnemar_rejects_a_true_null_at_most_at_its_level(n, discordant):
    found = [mcnemar(*table) < 0.05 for table in tables(n, discordant, 0.0, 4000, 0)]
    assert 0.005 < np.mean(found) < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 4000)  # exact: conservative, but not blind


@pytest.mark.parametrize("n, discordant, effect", [
    (541, 0.02, 0.0), (541, 0.01, 0.008), (541, 0.2, 0.12), (1319, 0.1, -0.05), (100, 0.4, 0.3), (14_042, 0.2, 0.01),
    (57, 0.1, 0.0)])  # fmt: skip
def test_the_interval_of_0_1_items_covers(n, discordant, effect):
    ends = [paired_interval(*table, n) for table in tables(n, discordant, effect, 4000, 1)]
    assert 0.935 < np.mean([low <= effect <= high for low, high in ends]) < 0.995


def test_the_interval_of_0_1_items_by_hand():
    # 8 gained and 1 lost of 98, each with one more: 9 and 2 of 100; variance (0.11 - 0.07^2) / 100
    low, high = paired_interval(8, 1, 98)
    half = stats.norm.ppf(0.975) * math.sqrt(0.1051 / 100)
    assert (low, high) == pytest.approx((0.07 - half, 0.07 + half))
    assert paired_interval(1, 8, 98) == pytest.approx((-high, -low))
    low, high = paired_interval(0, 0, 541)  # equal on every item: not known to be equal
    assert -0.01 < low < 0 < high == -low
    assert -1 <= paired_interval(0, 2, 2)[0] and paired_interval(2, 0, 2)[1] <= 1


# ------------------------------------------------------------------ the paired bootstrap


def ones(d):
    return np.ones(len(d), int)


@pytest.mark.parametrize("kind", ["continuous", "clustered"])
def test_bootstrap_against_scipy(kind):
    rng = np.random.default_rng(3)
    if kind == "continuous":
        d = rng.normal(0.05, 0.3, 300)
        m = ones(d)
    else:  # few distinct (d, m): drawn by value
        m = rng.integers(1, 4, 300)
        d = np.array([rng.integers(-1, 2, size).sum() for size in m])
    low, high, _ = paired_bootstrap(d, m)
    theirs = stats.bootstrap((d, m), lambda d, m, axis: d.sum(axis) / m.sum(axis), paired=True, vectorized=True,
                             n_resamples=10_000, method="percentile", rng=np.random.default_rng(9))  # fmt: skip
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.04 * width)
    assert high - low == pytest.approx(2 * 1.96 * theirs.standard_error, rel=0.05)


def test_bootstrap_draws_items_whether_by_value_or_one_by_one():
    """0/1 differences drawn by value, and the same made distinct by a hair, which are drawn one by one."""
    d = np.array([1.0] * 40 + [-1.0] * 25 + [0.0] * 235)
    by_value = paired_bootstrap(d, ones(d))
    one_by_one = paired_bootstrap(d + np.linspace(0, 1e-9, len(d)), ones(d))
    assert one_by_one == pytest.approx(by_value, abs=0.03)
    assert one_by_one[:2] == pytest.approx(by_value[:2], abs=0.008)  # the whole interval is 0.1 wide


def coverage(samples, truth):
    """(share of intervals that hold the truth, share of p-values below 0.05) over (d, m) pairs."""
    found = [paired_bootstrap(d, m) for d, m in samples]
    return np.mean([low <= truth <= high for low, high, _ in found]), np.mean([p < 0.05 for _, _, p in found])


def test_bootstrap_coverage_and_false_positives():
    """Differences of shares of probability, as in TruthfulQA: bounded, skewed, and 0 on average."""
    rng = np.random.default_rng(4)
    samples = [(d - 1 / 3, ones(d)) for d in rng.beta(1, 2, (500, 120))]
    covered, rejected = coverage(samples, 0.0)
    # 500 simulations: two standard errors are 0.02
    assert 0.93 <= covered <= 0.97 and 0.03 <= rejected <= 0.07
    assert rejected == pytest.approx(1 - covered, abs=0.01)  # the test and the interval say the same


def test_clusters_are_what_is_resampled():
    """Prompts whose instructions stand or fall together: resampling prompts covers, resampling instructions doesn't."""
    rng = np.random.default_rng(5)
    prompts, instructions = [], []
    for _ in range(300):
        m = rng.integers(1, 4, 150)
        d = rng.choice([-1, 0, 1], 150, p=[0.2, 0.6, 0.2]) * m
        prompts.append((d, m))
        each = np.repeat(np.sign(d), m)
        instructions.append((each, ones(each)))
    covered, rejected = coverage(prompts, 0.0)
    assert covered >= 0.92 and rejected <= 0.08
    assert coverage(instructions, 0.0)[0] < covered - 0.05


def test_bootstrap_p_value_has_a_floor_and_no_difference_is_1():
    assert paired_bootstrap(np.zeros(50), np.ones(50, int)) == (0.0, 0.0, 1.0)
    d = np.linspace(0.1, 0.2, 60)
    assert paired_bootstrap(d, ones(d))[2] == pytest.approx(2 / 10_001)
    assert paired_bootstrap(d, ones(d)) == paired_bootstrap(d.copy(), ones(d))  # a fixed seed
    low, high, p = paired_bootstrap(-d, ones(d))
    assert high < 0 and (-high, -low, p) == pytest.approx(paired_bootstrap(d, ones(d)))


# ------------------------------------------------------------------ Holm


@pytest.mark.parametrize("seed", range(6))
def test_holm_is_closed_testing_by_bonferroni(seed):
    """An adjusted p-value is the largest Bonferroni p-value of the intersections that its hypothesis is part of."""
    rng = np.random.default_rng(seed)
    p = (rng.uniform(0, 0.3, 7) if seed % 2 else rng.choice([0.01, 0.02, 0.02, 0.4, 1.0], 7)).tolist()  # with ties
    subsets = [s for size in range(1, 8) for s in itertools.combinations(range(7), size)]
    expected = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(7)]
    assert holm(p) == pytest.approx(expected)


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_holm_keeps_the_family_wise_error():
    """25 true nulls and, besides, 5 that are false: a true one is rejected in at most 5 % of the tables."""
    rng = np.random.default_rng(6)
    wrong = []
    for _ in range(5000):
        adjusted = holm([*rng.uniform(0, 1, 25), *(rng.uniform(0, 1, 5) * 1e-4)])
        wrong.append(min(adjusted[:25]) < 0.05)
    assert 0.02 < np.mean(wrong) < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 5000)


# ------------------------------------------------------------------ the smallest effect that a test finds


def test_minimum_detectable_effect_by_hand():
    d = np.array([1] * 60 + [-1] * 40 + [0] * 900)  # psi = 0.1
    assert minimum_detectable_effect(d, ones(d)) == pytest.approx((1.959964 + 0.841621) * math.sqrt(0.1 / 1000), rel=1e-6)
    assert minimum_detectable_effect(np.zeros(10), np.ones(10, int)) is None
    d, m = np.array([2, -1, 0]), np.array([3, 1, 1])
    assert minimum_detectable_effect(d, m) == pytest.approx(2.801585 * math.sqrt(5) / 5, rel=1e-6)


@pytest.mark.parametrize("n, discordant", [(541, 0.2), (1319, 0.15), (14_042, 0.1)])
def test_the_test_finds_that_effect_four_times_in_five(n, discordant):
    effect = (1.959964 + 0.841621) * math.sqrt(discordant / n)
    power = np.mean([mcnemar(*table) < 0.05 for table in tables(n, discordant, effect, 2000, 7)])
    assert 0.75 < power < 0.86  # the exact test is a little conservative, the formula's effect a little large
    half = np.mean([mcnemar(*table) < 0.05 for table in tables(n, discordant, effect / 2, 2000, 7)])
    assert half < 0.4


# ------------------------------------------------------------------ verdicts


MMLU, GSM8K, TRUTHFULQA, PROMPT, INSTRUCTION = report.METRICS


def changes(**points):
    """Differences in points by column, {mmlu: ...}; a clear one unless it is given as (points, interval, adjusted p)."""
    found = dict.fromkeys(report.METRICS, (0.1, (-0.5, 0.7), 1.0))
    names = dict(zip(("mmlu", "gsm8k", "truthfulqa", "prompt", "instruction"), report.METRICS))
    for name, value in points.items():
        found[names[name]] = value if isinstance(value, tuple) else (value, (value - 0.5, value + 0.5), 0.001)
    return {column: Change(x, 0.3, True, ends, p / 10, p, 0.8) for column, (x, ends, p) in found.items()}


@pytest.mark.parametrize("points, word", [
    ({}, "flat"),
    ({"prompt": 5.0}, "win"),
    ({"instruction": 5.0}, "win"),  # one of the two levels is enough
    ({"prompt": 5.0, "mmlu": -1.5}, "win"),  # clearly down, but not catastrophically
    ({"prompt": 5.0, "gsm8k": 3.0, "truthfulqa": 1.0}, "win"),
    ({"prompt": 5.0, "mmlu": -3.0}, "forgetting"),
    ({"prompt": 5.0, "truthfulqa": -2.1}, "forgetting"),
    ({"prompt": 5.0, "gsm8k": -4.0}, "forgetting"),
    ({"prompt": 5.0, "mmlu": -2.0}, "win"),  # not below -2
    ({"prompt": 5.0, "mmlu": (-3.0, (-6.1, 0.1), 0.2)}, "win"),  # below -2, but the interval holds 0
    ({"prompt": 5.0, "mmlu": (-3.0, (-5.9, -0.1), 0.2)}, "forgetting"),  # catastrophic goes by the interval, not by Holm
    ({"mmlu": -1.0}, "regression"),
    ({"prompt": -4.0}, "regression"),
    ({"gsm8k": (-3.0, (-5.9, -0.1), 0.2)}, "regression"),
    ({"prompt": (5.0, (0.5, 9.5), 0.06)}, "flat"),  # alone below 0.05, not after Holm
    ({"gsm8k": 5.0}, "mixed"),
    ({"gsm8k": 5.0, "mmlu": -3.0}, "mixed"),
    ({"prompt": 5.0, "instruction": -3.0}, "mixed"),
])  # fmt: skip
def test_verdicts(points, word):
    assert verdict(changes(**points))[0] == word


def test_a_verdict_says_what_it_rests_on():
    assert verdict(changes(prompt=5.04, mmlu=-3.0)) == ("forgetting", "IFEval prompt +5.0, MMLU −3.0 (catastrophic)")
    assert verdict(changes())[1] == "nothing clearly up or down"
    assert verdict(changes(gsm8k=-1.0)) == ("regression", "GSM8K strict −1.0")


def test_no_verdict_without_every_test():
    found = changes(prompt=5.0)
    assert verdict(found, irreproducible=None) == ("open", "a rerun has no per-item scores to compare; IFEval prompt +5.0")
    assert verdict(found, irreproducible=True)[0] == "irreproducible"
    assert verdict(found | {GSM8K: Change(1.0, 0.5, True)}) == ("open", "not all is measured")
    assert verdict({column: Change(5.0, 0.5, True) for column in report.METRICS}) == ("open", "no per-item scores")


# ------------------------------------------------------------------ a whole table


def test_a_table_of_full_size_takes_seconds():
    """Seven rows on as many items as the four tasks have, both comparisons."""
    rng = np.random.default_rng(8)
    sizes = {"mmlu": 14_042, "gsm8k": 1_319, "truthfulqa_mc2": 817, "ifeval": 541}
    rows, m = [], rng.integers(1, 4, sizes["ifeval"])
    for i in range(7):
        items = {task: {"task": [task] * n, "doc_id": list(range(n)), "doc_hash": ["0"] * n} for task, n in sizes.items()}
        items["mmlu"]["acc,none"] = rng.integers(0, 2, sizes["mmlu"]).tolist()
        items["gsm8k"]["exact_match,strict-match"] = rng.integers(0, 2, sizes["gsm8k"]).tolist()
        items["truthfulqa_mc2"]["acc,none"] = rng.uniform(size=sizes["truthfulqa_mc2"]).tolist()
        follows = [rng.integers(0, 2, size).tolist() for size in m]
        items["ifeval"] |= {"inst_level_strict_acc,none": follows, "prompt_level_strict_acc,none": list(map(min, follows))}
        keys = [f"{task}/{metric}{{}},{f}" for task, metric, f in report.METRICS.values()]
        metrics = {key.format(end): 0.5 for key in keys for end in ("", "_stderr")}
        rows.append({"name": f"row{i}", "method": ["base", "sft", "dpo"][min(i, 2)], "phase": i, "config_hash": str(i),
                     "adapter_sha256": str(i), "metrics": metrics, "items": items})  # fmt: skip
    start = time.process_time()
    against_base, against_sft = (report.comparisons(rows, method)[0] for method in ("base", "sft"))
    assert time.process_time() - start < 8
    found = [change for c in against_base for change in c.changes.values()]
    assert len(against_base) == 6 and len(against_sft) == 5 and len(found) == 30
    assert all(change.p <= change.adjusted <= 1 and change.interval[0] < change.interval[1] for change in found)
    assert sorted(c.adjusted for c in found) == sorted(holm([c.p for c in found]))  # one family of 30
