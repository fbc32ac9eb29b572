"""verdicts.py: rows of results/metrics.json -> paired differences, one family of tests, a verdict per method.

A score carries its standard error se (lm-eval's own, over the items). The difference of two rows a and b, in points, is
    delta = 100 (a - b)    with    se(delta) = 100 sqrt(se_a^2 + se_b^2);    marked ~ when |delta| < 2 se(delta).
Both rows answered the same items, so the test is a paired one, on the differences d_i = a_i - b_i of the items' scores:
    0/1 items    exact McNemar;      interval of Bonett and Price    (MMLU, GSM8K, IFEval by prompt)
    otherwise    sign-flip test;     bootstrap of items, 10,000 resamples: for TruthfulQA MC2 an item is a question, for
                 IFEval by instruction a prompt with all its instructions (delta is sum d_i / sum m_i, m_i instructions)
    S seeds      of one family, each against its own parent:  SE^2 = s^2(seed means)/S + s^2(items)/n,  the last of the
                 differences averaged over the seeds; t with Satterthwaite's degrees of freedom. The items are the same
                 for every seed (crossed), so neither part alone would do.
    detectable   (z_0.975 + z_0.8) sqrt(sum d_i^2) / sum m_i: what a test at 5 % detects with power 0.8
Intervals condition on what was resampled: with one seed on the items alone, so they say nothing about another seed.

One family of tests for one base, named before any run: four endpoints (ENDPOINTS; for an instruct base IFEval and GSM8K
in the chat protocol, for a pretrained one in the plain; MMLU and TruthfulQA plain) x {sft, dpo, ppo, grpo, kto} x
{base, own parent}, 36 tests, adjusted by Holm; a test that can't be made yet counts with p = 1. Controls, reruns, the
other protocol and the other columns are descriptive: they have an interval and no p-value. "Up" and "down" are adjusted
p < 0.05. A drop is catastrophic when it is clearly down and more than 2 points. The verdict is the first that holds:
    open            a test is missing: the row or the base has no per-item scores
    irreproducible  a rerun of the same config_hash differs from it (Holm over the five columns)
    forgetting      IFEval up, and a catastrophic drop on MMLU or TruthfulQA
    win             IFEval up, and no such drop
    mixed           something else up, and something down or not
    regression      something down, nothing up
    flat            nothing up or down, and every endpoint equivalent: its 90 % interval lies within 2 points of 0
                    (two one-sided tests at 5 %)
    inconclusive    nothing up or down, and a change of more than 2 points remains possible
"inherited" after the word: every drop that it rests on was already clear in the parent, and the method itself added
nothing clear to it. DPO has a criterion of its own besides: the lower bound of its judged win rate
against SFT is above 50 %, by the judge that was named to decide (judge.py --decides), that beats "the longer answer
wins" on held-out pairs and shares no training prompt with it; seeds pooled by the formula above, with prompts as items.

Shapes: n items, S seeds, d differences of items, m sizes of items. report.py prints what comes out of here.
"""

import gzip
import json
import math
import re
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common import METHODS as CLIMB, fail, read_results, sha256_json

METRICS = {  # column title: (task, metric, filter) of lm-eval
    "MMLU": ("mmlu", "acc", "none"),
    "GSM8K\nstrict": ("gsm8k", "exact_match", "strict-match"),
    "TruthfulQA\nMC2": ("truthfulqa_mc2", "acc", "none"),
    "IFEval\nprompt": ("ifeval", "prompt_level_strict_acc", "none"),
    "IFEval\ninstruction": ("ifeval", "inst_level_strict_acc", "none"),
}
# The family of tests: column -> its protocol for an instruct base; for a pretrained base all four are plain.
ENDPOINTS = {"MMLU": "plain", "TruthfulQA\nMC2": "plain", "GSM8K\nstrict": "chat", "IFEval\nprompt": "chat"}
METHODS = ("sft", "dpo", "ppo", "grpo", "kto")  # named before any run: one that is added later stays descriptive
FORGOTTEN = ("MMLU", "TruthfulQA\nMC2")  # where a drop is what the word forgetting means
FLOORS = {"MMLU": 25.0, "GSM8K\nstrict": 0.0, "IFEval\nprompt": 0.0, "IFEval\ninstruction": 0.0}  # %, by chance
# The climb. A rung without a result is shown as not run; rows of other names follow those of their phase.
LADDER = {"base": 0} | {row: phase for method, (phase, row) in CLIMB.items() if method != "reward"}  # row: phase
ROW_ID = ("name", "config_hash", "adapter_sha256", "weights_sha256")  # of an evaluated policy, in any protocol
ROW_KEYS = (
    "name phase method model revision config_hash adapter_sha256 weights_sha256 train_invariants eval_hash eval seed "
    "protocol metrics n"
).split()
ALPHA, MARGIN = 0.05, 2.0  # of adjusted p-values; points, of a catastrophic drop and of equivalence
RESAMPLES, FLIPS = 10_000, (9_999, 99_999)  # of the bootstrap; of the sign-flip test, the second where p is small


# ------------------------------------------------------------------ statistics

NORMAL = statistics.NormalDist()  # scipy and statsmodels are imported where they are used: --help starts at once


@dataclass(frozen=True)
class Paired:
    """The result of a paired test of a difference, as a share: 95 % and 90 % intervals, p, whether p is as small as the
    resamples can show, and the smallest difference that it detects (None where no item differs)."""

    interval: tuple[float, float]
    interval90: tuple[float, float]
    p: float
    at_floor: bool = False
    detectable: float | None = None


def paired_interval(gained: int, lost: int, n: int, alpha: float = ALPHA) -> tuple[float, float]:
    """1 - alpha interval of (gained - lost) / n over n 0/1 items: Wald's, with one item added to each side, so that few
    discordant items don't give a width of 0 [Bonett & Price 2012, J. Educ. Behav. Stat. 37(4)]."""
    a, b = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = NORMAL.inv_cdf(1 - alpha / 2) * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    return max(-1.0, a - b - half), min(1.0, a - b + half)


def sign_flip(d: np.ndarray) -> tuple[float, bool]:
    """(two-sided p that d [n] is as likely as -d, whether p is the smallest that the resamples can show): the share of
    random signs s with |sum s d| >= |sum d|. scipy.stats.permutation_test's test, at a fifth of its time."""
    d, p, extreme, rng = d[d != 0].astype(np.float32), 1.0, 0, np.random.default_rng(0)
    observed = abs(d.sum()) * (1 - 1e-6)  # sums in fp32 that are equal may differ in their last digit
    for flips in FLIPS if len(d) else ():
        extreme = 0
        for rows in (10_000,) * (flips // 10_000) + (flips % 10_000,):
            sums = 2 * (rng.integers(0, 2, (rows, len(d)), dtype=np.int8).astype(np.float32) @ d) - d.sum()
            extreme += int((np.abs(sums) >= observed).sum())
        p = (1 + extreme) / (1 + flips)
        if p > 0.005:
            break
    return p, bool(len(d)) and extreme == 0


def bootstrap(d: np.ndarray, m: np.ndarray) -> list[tuple[float, float]]:
    """Percentile 95 % and 90 % intervals of sum d / sum m, d [n] the differences and m [n] the sizes of the independent
    units (an item: 1; a prompt: its instructions)."""
    from scipy import stats
    drawn = stats.bootstrap((d, m), lambda d, m, axis: d.sum(axis) / m.sum(axis), paired=True, vectorized=True,
                            batch=1000, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0))
    ends = [np.quantile(drawn.bootstrap_distribution, [share, 1 - share]) for share in (ALPHA / 2, ALPHA)]
    return [(float(low), float(high)) for low, high in ends]


def paired_over_items(d: np.ndarray, m: np.ndarray, right_or_wrong: bool) -> Paired | None:
    """The paired test of one seed: d [n] differences, m [n] sizes. None for a single item that isn't right or wrong."""
    z = NORMAL.inv_cdf(1 - ALPHA / 2) + NORMAL.inv_cdf(0.8)
    # For 0/1 items 2.80 sqrt(psi / n), psi the share of discordant items [Connor 1987, Biometrics 43(1), without the
    # term delta^2 << psi: a little too large]. Holm's test needs more.
    detectable = float(z * math.sqrt((d.astype(float) ** 2).sum()) / m.sum()) if d.any() else None
    if right_or_wrong:
        from statsmodels.stats.contingency_tables import mcnemar
        gained, lost = int((d > 0).sum()), int((d < 0).sum())
        ends = [paired_interval(gained, lost, len(d), alpha) for alpha in (ALPHA, 2 * ALPHA)]
        return Paired(*ends, p=float(mcnemar([[0, gained], [lost, 0]], exact=True).pvalue), detectable=detectable)
    if len(d) < 2:
        return None
    return Paired(*bootstrap(d, m), *sign_flip(d), detectable)


def paired_over_seeds(d: np.ndarray, m: np.ndarray) -> Paired:
    """The paired test of S seeds on the same n items: d [S, n] differences, m [n] sizes; the estimate is the mean over
    the seeds of sum d / sum m.

    SE^2 = s^2(seed means)/S + s^2(items)/n, s^2(items) of the seed-averaged differences (for a ratio, of its
    residuals); t with Satterthwaite's degrees of freedom, SE^4 / sum of part^2/(its degrees of freedom)."""
    seeds, n = d.shape
    means = d.sum(1) / m.sum()  # [S]
    residuals = (d.mean(0) - means.mean() * m) / m.mean()  # [n], of mean 0
    parts = means.var(ddof=1) / seeds, residuals.var(ddof=1) / n
    variance, estimate = sum(parts), float(means.mean())
    if not variance:  # all items alike: of others there may be a share of 1 - alpha^(1/n) [Clopper & Pearson 1934]
        ends = [1 - alpha ** (1 / n) for alpha in (ALPHA, 2 * ALPHA)]
        return Paired(*((estimate - end, estimate + end) for end in ends), p=float(estimate == 0))
    df = variance**2 / (parts[0] ** 2 / (seeds - 1) + parts[1] ** 2 / (n - 1))
    from scipy import stats
    stderr = math.sqrt(variance)
    halves = [float(stats.t.ppf(1 - alpha / 2, df)) * stderr for alpha in (ALPHA, 2 * ALPHA)]
    p = float(2 * stats.t.sf(abs(estimate) / stderr, df))
    detectable = float(stats.t.ppf(1 - ALPHA / 2, df) + stats.t.ppf(0.8, df)) * stderr
    return Paired(*((estimate - half, estimate + half) for half in halves), p=p, detectable=detectable)


def holm(p: list[float]) -> list[float]:
    """Adjusted p-values, in the order given: below alpha where Holm's step-down test rejects at family-wise alpha."""
    from statsmodels.stats.multitest import multipletests
    return multipletests(p, method="holm")[1].tolist() if p else []


# ------------------------------------------------------------------ rows, and which of them may stand together


def rung(phase: int, name: str) -> tuple[int, int]:
    """Sort key of a row: its phase, then its place in the climb, other names last."""
    return phase, [*LADDER, name].index(name)


def climb_key(row: dict) -> tuple:
    """Sort key of a row: its place in the climb, its name, its seed."""
    return *rung(row["phase"], row["name"]), row["name"], row.get("seed") or 0


def read_rows(path: Path) -> list[dict]:
    """The rows in the order of the climb and of their seeds; of two runs of one seed the one with more protocols first,
    then the earlier: that one stands for the seed, and the other is its rerun."""
    rows = read_results(path)["runs"]
    for row in rows:
        if missing := [key for key in ROW_KEYS if key not in row]:
            fail(f"{path}: row {row.get('name', '(unnamed)')} lacks {', '.join(missing)}; evaluate it again")
    protocols = Counter(policy_of(row) for row in rows)
    return sorted(rows, key=lambda row: (*climb_key(row), -protocols[policy_of(row)], row.get("timestamp") or ""))


def read_items(results: Path, row: dict) -> dict[str, dict] | None:
    """{task: {"task", "doc_id", "doc_hash", and each metric: a list over its items}}, or None where a row has none.
    Ends the run if they are not the row's: of other weights, or with another mean than its score."""
    path = results / (row.get("scores") or "")
    if not path.is_file():
        return None
    try:
        record = json.loads(gzip.decompress(path.read_bytes()))
        tasks = record["tasks"] | record.get("secondary", {})
    except (OSError, EOFError, ValueError, KeyError, TypeError) as e:
        fail(f"{path} holds no per-item scores ({type(e).__name__}: {e}); evaluate {row['name']} again")
    if unlike := [key for key in (*ROW_ID[1:], "eval_hash") if record.get(key, "absent") != row[key]]:
        fail(f"{path} is of another {unlike[0]} than row {row['name']}: {record.get(unlike[0])} / {row[unlike[0]]}")
    for column, (task, metric, filter_name) in METRICS.items():
        values = at(tasks, task, f"{metric},{filter_name}")
        if values and (points := score(row, column)[0]) is not None:
            parts = [x for value in values for x in value] if isinstance(values[0], list) else values
            if abs(mean := 100 * statistics.fmean(parts) - points) > 1e-6:
                fail(f"{path}: the mean of {task}/{metric} is {mean:+.3f} points off the score of row {row['name']}")
    return tasks


def identity(row: dict) -> dict[str, object]:
    """The fields behind a row's two hashes, and what lm-eval then ran; flat, so that a difference can be named."""
    fields = {key: row[key] for key in ("train_invariants", "eval_hash", "model", "revision", "weights_sha256")}
    fields |= {f"invariants.{key}": value for key, value in row.get("invariants", {}).items() if key not in fields}
    fields |= {f"eval.{key}": value for key, value in row["eval"].items() if key != "tasks"}
    for task, num_fewshot, limit in row["eval"]["tasks"]:
        fields |= {f"eval.{task}.num_fewshot": num_fewshot, f"eval.{task}.limit": limit}
    for key in ("n", "task_versions"):
        fields |= {f"{key}.{task}": value for task, value in row.get(key, {}).items()}
    return fields


def differences(a: dict, b: dict) -> str:
    """Why rows a and b can't share a table, as "field value of a / value of b, ..."; empty when they can."""
    a, b = identity(a), identity(b)
    differ = [key for key in a | b if a.get(key, "absent") != b.get(key, "absent")]
    # A task that one of them lacks is shown as not measured; counts or versions that disagree are not comparable.
    unlike = [key for key in differ if key in a and key in b and key.startswith(("n.", "task_versions."))]
    if not unlike and not {"train_invariants", "eval_hash"} & set(differ):
        return ""

    def brief(value: object) -> str:  # a chat template is too long to print
        return str(value) if len(str(value)) <= 64 else f"(sha256 {sha256_json(value)[:8]})"

    return ", ".join(f"{key} {brief(a.get(key, 'absent'))} / {brief(b.get(key, 'absent'))}" for key in differ)


def listing(rows: list[dict]) -> str:
    groups = {}
    for row in rows:
        key = f"  train_invariants {row['train_invariants']}, {row['protocol']}, eval_hash {row['eval_hash']}: "
        groups.setdefault(key, []).append(row["name"])
    return "\n".join(key + ", ".join(names) for key, names in groups.items()) or "  no rows"


def climbs_of(rows: list[dict], group: tuple[str, ...], path: Path, first: str = "") -> list[dict[str, list[dict]]]:
    """[{protocol: its rows}] of what may be compared: one train_invariants and, per protocol, one eval_hash each. The
    climb that holds the hash `first`, else the one of most rows (of several the newest) comes first. Ends the run when
    rows of one eval_hash were not scored on the same items."""
    selected_rows, unknown = rows, {*group, *filter(None, [first])}
    for key in ("train_invariants", "eval_hash"):
        if chosen := set(group) & {row[key] for row in rows}:
            selected_rows = [row for row in selected_rows if row[key] in chosen]
        unknown -= {row[key] for row in rows}
    if unknown or (group and not selected_rows):
        fail(f"no row of {path} has the hash {' or '.join(sorted(unknown) or group)}. It holds\n{listing(rows)}")
    evaluations = {}  # train_invariants -> protocol -> eval_hash -> rows
    for row in selected_rows:
        by_protocol = evaluations.setdefault(row["train_invariants"], {})
        by_protocol.setdefault(row["protocol"], {}).setdefault(row["eval_hash"], []).append(row)

    def rank(table: list[dict]) -> tuple[bool, int, str]:
        hashes = {row[key] for row in table for key in ("train_invariants", "eval_hash")}
        return first in hashes, len(table), max(row.get("timestamp") or "" for row in table)

    climbs = []
    for by_protocol in evaluations.values():
        ranked = {name: sorted(tables.values(), key=rank, reverse=True) for name, tables in by_protocol.items()}
        names = sorted(ranked, reverse=True)  # plain first
        climbs += [{name: ranked[name][i] for name in names if i < len(ranked[name])}
                   for i in range(max(map(len, ranked.values())))]
    clashes = [(t[0], row) for climb in climbs for t in climb.values() for row in t if differences(t[0], row)]
    if clashes:
        lines = [f"  {a['name']} / {b['name']}: {differences(a, b)}" for a, b in clashes]
        fail(f"{path} holds rows that can't be compared:\n{listing(selected_rows)}\nThey differ in\n" + "\n".join(lines)
             + "\nEvaluate them again alike.")
    return sorted(climbs, key=lambda climb: rank([row for table in climb.values() for row in table]), reverse=True)


def label_rows(rows: list[dict]) -> list[tuple[str, dict]]:
    """[(label, row)]: the name; with the seed where the name isn't unique, with the adapter's hash where that isn't
    unique either; and † on a rerun."""
    first, labelled = {}, []
    count, of_seed = Counter(row["name"] for row in rows), Counter((row["name"], row.get("seed")) for row in rows)
    for row in rows:
        suffix = ""
        if count[row["name"]] > 1:
            alone = row.get("seed") is not None and of_seed[row["name"], row["seed"]] == 1
            suffix = f"-s{row['seed']}" if alone else f"@{(row['adapter_sha256'] or 'none')[:8]}"
        rerun = first.setdefault((row["name"], row["config_hash"]), row["adapter_sha256"]) != row["adapter_sha256"]
        labelled.append((row["name"] + suffix + "†" * rerun, row))
    return labelled


def same_policy(a: dict, b: dict) -> bool:
    return all(a.get(key) == b.get(key) for key in ("name", "adapter_sha256"))


def seed_groups(rows: list[dict]) -> list[list[dict]]:
    """The rows, grouped by family: the first row of each seed stands in its family's group, a rerun of a seed by
    itself."""
    groups, families = [], {}
    for row in rows:
        key = (row["method"], row["family"]) if row.get("family") else id(row)
        seeds = families.get(key)
        if seeds is None or row["seed"] in [r["seed"] for r in seeds]:
            groups.append([row])
            families.setdefault(key, groups[-1])
        else:
            seeds.append(row)
    return groups


def policy_of(row: dict) -> tuple:
    """What identifies a row's policy, in any protocol."""
    return tuple(row[key] for key in ROW_ID)


def once(rows: list[dict]) -> list[dict]:
    """One row per policy, whatever the protocols that it was evaluated in, in read_rows' order."""
    by_policy = {}
    for row in rows:
        by_policy.setdefault(policy_of(row), row)
    return sorted(by_policy.values(), key=climb_key)


def compared_in_family(groups: list[list[dict]]) -> list[list[dict]]:
    """The groups that stand in the family of tests, at most one per method: that of the climb's name, else the first.
    The rest are controls and reruns."""
    chosen = {}
    for method in METHODS:
        of_method = [group for group in groups if group[0]["method"] == method]
        named = [group for group in of_method if any(row["name"] in LADDER for row in group)]
        chosen |= {method: group for group in (named or of_method)[:1]}
    return list(chosen.values())


def of_climb(groups: list[list[dict]]) -> list[list[dict]]:
    """The groups that README.md shows: those of the climb's names, of another name where a method has none of these, and
    of methods that aren't ours (a plain PEFT adapter); no reruns."""
    tested, seen, shown = compared_in_family(groups), set(), []
    for group in groups:
        runs = {(row["name"], row["config_hash"]) for row in group}
        named = any(row["name"] in LADDER or row["method"] not in METHODS for row in group) and not runs & seen
        if named or any(group is tested_group for tested_group in tested):
            shown.append(group)
        seen |= runs
    return shown


def reference_of(row: dict, rows: list[dict], against: str) -> dict | None:
    """The row that `row` is compared with: the base, or its own parent by the hash of its adapter. None where that has
    no row, or is the base (which is one comparison, not two)."""
    if row["method"] == "base":
        return None
    if against == "base":
        return next((r for r in rows if r["method"] == "base"), None)
    parent = row.get("parent")
    return next((r for r in rows if r["adapter_sha256"] == parent["adapter_sha256"]), None) if parent else None


# ------------------------------------------------------------------ scores and differences


def finite(value: object) -> int | float | None:
    """`value` where it is a finite number (lm-eval writes "N/A", Python's JSON NaN), else None."""
    return value if type(value) in (int, float) and math.isfinite(value) else None


def at(record: object, *keys: str) -> object:
    """record[keys[0]][keys[1]]…, or None where anything on the way is missing."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def score(row: dict, column: str | tuple[str, str, str]) -> tuple[float | None, float | None]:
    """(score, its standard error) in percent, of a column's title or a secondary (task, metric, filter); None for what
    the row doesn't have."""
    task, metric, filter_name = METRICS.get(column, column)
    shares = [finite(row["metrics"].get(f"{task}/{key},{filter_name}")) for key in (metric, f"{metric}_stderr")]
    return tuple(None if x is None else 100 * x for x in shares)


def delta(a: tuple, b: tuple) -> tuple[float | None, float | None, bool | None]:
    """(a - b in points, its standard error, beyond noise or not) of two (score, stderr); None for what can't be
    known."""
    points = None if a[0] is None or b[0] is None else a[0] - b[0]
    if points is None or a[1] is None or b[1] is None:
        return points, None, None
    stderr = math.hypot(a[1], b[1])  # sqrt(se_a^2 + se_b^2)
    return points, stderr, points != 0 and abs(points) >= 2 * stderr  # 0 ± 0 is no difference


@dataclass(frozen=True)
class Change:
    """Row a minus row b in one column, in points; `apart`: |points| >= 2 stderr. Then what the paired test adds;
    `adjusted` is Holm's p, of a test that is part of the family: without it the difference is descriptive."""

    points: float | None
    stderr: float | None
    apart: bool | None
    paired: Paired | None = None  # in points
    adjusted: float | None = None

    @property
    def clear(self) -> bool | None:
        return self.apart if self.paired is None else self.adjusted is not None and self.adjusted < ALPHA

    @property
    def down(self) -> bool:
        return self.adjusted is not None and bool(self.clear) and self.points < 0

    @property
    def up(self) -> bool:
        return self.adjusted is not None and bool(self.clear) and self.points > 0

    @property
    def catastrophic(self) -> bool:
        return self.down and self.points < -MARGIN

    @property
    def equivalent(self) -> bool:
        """Two one-sided tests at 5 %: the 90 % interval lies within the margin."""
        return self.paired is not None and -MARGIN < self.paired.interval90[0] and self.paired.interval90[1] < MARGIN


def paired_items(a: dict, b: dict, column: str) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """([n] the score of row a minus that of row b, [n] the size) of each item, and whether all scores are 0 or 1. Of a
    prompt of several instructions: the difference of how many were followed, and how many there are. None where a row
    has no per-item scores; ends the run where the two rows' items are not the same."""
    task, metric, filter_name = METRICS.get(column, column)
    items = [at(row, "items", task) for row in (a, b)]
    key = f"{metric},{filter_name}"
    if not all(side and side.get(key) for side in items):
        return None
    of_a, of_b = (dict(zip(zip(i["task"], i["doc_id"], i["doc_hash"]), i[key], strict=True)) for i in items)
    if unlike := sorted(of_a.keys() ^ of_b.keys()):
        fail(
            f"{a['name']} and {b['name']} were not scored on the same items of {task}: {unlike[0][0]}, doc_id "
            f"{unlike[0][1]} is not in both with the same doc_hash ({len(unlike):,} such); evaluate them again alike"
        )
    pairs = [(x, of_b[item]) for item, x in of_a.items()]
    if isinstance(pairs[0][0], list):
        return np.array([sum(x) - sum(y) for x, y in pairs]), np.array([len(x) for x, _ in pairs]), False
    scores = np.array(pairs, float)  # [n, 2]; NaN where an item has no score
    return scores[:, 0] - scores[:, 1], np.ones(len(pairs), int), bool(np.isin(scores, (0, 1)).all())


def mean_score(rows: list[dict], column: str) -> tuple[float | None, float | None]:
    """(mean score, mean standard error) over seeds, whose items are the same; None where a row lacks one."""
    means = []
    for values in zip(*(score(row, column) for row in rows)):
        means.append(None if None in values else statistics.fmean(values))
    return tuple(means)


def compare(pairs: list[tuple[dict, dict]], column: str) -> Change:
    """The rows of a family, one per seed, minus the row that each is compared with."""
    change = Change(*delta(*(mean_score(list(side), column) for side in zip(*pairs))))
    items = [paired_items(a, b, column) for a, b in pairs]
    if change.points is None or not all(items):
        return change
    differences, sizes, right_or_wrong = zip(*items)
    if len(pairs) == 1:
        paired = paired_over_items(differences[0], sizes[0], right_or_wrong[0])
    else:
        paired = paired_over_seeds(np.array(differences), sizes[0])
    if not paired:
        return change
    low, high = (tuple(100 * end for end in ends) for ends in (paired.interval, paired.interval90))
    detectable = paired.detectable and 100 * paired.detectable
    return replace(change, paired=replace(paired, interval=low, interval90=high, detectable=detectable))


@dataclass(frozen=True)
class Comparison:
    """A family's rows, one per seed, against base or against the row that each was trained from."""

    label: str
    rows: tuple[dict, ...]
    reference: str
    changes: dict[str, Change]  # by column
    in_family: bool  # of tests; else descriptive

    @property
    def row(self) -> dict:
        return self.rows[0]


def comparisons(rows: list[dict], against: str) -> tuple[list[Comparison], list[str]]:
    """(the rows, seeds of a family together, compared with base or with their own parent; notes on those left out)."""
    labels = {id(row): label for label, row in label_rows(rows)}
    compared_rows, notes, groups = [], [], seed_groups(rows)
    tested = compared_in_family(groups)
    for group in groups:
        pairs = [(row, reference_row) for row in group if (reference_row := reference_of(row, rows, against))]
        for row in group:
            if against == "parent" and row.get("parent") and not reference_of(row, rows, against):
                parent = row["parent"]["name"]
                notes.append(f"{labels[id(row)]} is left out: {parent}, from which it was trained, has no row here.")
        if pairs:
            references = list(dict.fromkeys(labels[id(reference_row)] for _, reference_row in pairs))
            label = label_group([row for row, _ in pairs], labels)
            reference = references[0] if len(references) == 1 else "parent"
            changes = {column: compare(pairs, column) for column in METRICS}
            compared_rows.append(Comparison(label, tuple(row for row, _ in pairs), reference, changes,
                                            any(group is tested_group for tested_group in tested)))
    return compared_rows, notes


def label_group(group: list[dict], labels: dict[int, str]) -> str:
    """The label of a family's rows, one per seed: of one its own; of several a name, and how many seeds."""
    if len(group) == 1:
        return labels[id(group[0])]
    names = [row["name"] for row in group]
    return next((name for name in names if name in LADDER), names[0]) + f" ({len(group)} seeds)"


def families(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """[(label, the rows of a family, one per seed)] of policies, each once."""
    rows = once(rows)
    labels = {id(row): label for label, row in label_rows(rows)}
    return [(label_group(group, labels), group) for group in seed_groups(rows)]


def is_instruct(model: str) -> bool:
    return bool(re.search(r"instruct|(^|[-_])(it|chat)($|[-_])", Path(model).name.lower()))


def endpoint_protocols(tables: dict[str, list[dict]]) -> dict[str, str]:
    """{endpoint: the protocol it is tested in}: where an instruct base was not evaluated in chat, plain stands in."""
    model = next((row["model"] for rows in tables.values() for row in rows), "")
    chat = is_instruct(model) and "chat" in tables
    return {column: protocol if chat else "plain" for column, protocol in ENDPOINTS.items()}


def missing_tests(compared: dict, protocols: dict[str, str]) -> int:
    """How many tests of the family can't be made yet: an endpoint of a method was not evaluated in its protocol, or has
    no per-item scores."""
    wanted = {(c.row["method"], against, column) for (_, against), (compared_rows, _) in compared.items()
              for c in compared_rows if c.in_family for column in protocols}
    made = {(c.row["method"], against, column) for (name, against), (compared_rows, _) in compared.items()
            for c in compared_rows if c.in_family
            for column, protocol in protocols.items() if protocol == name and c.changes[column].paired}
    return len(wanted - made)


def with_holm(compared: dict, protocols: dict[str, str]) -> dict:
    """{(protocol, "base" or "parent"): (comparisons, notes)} with Holm's adjusted p-values over the one family of
    tests: the endpoints, each in its protocol, of the comparisons that are in it. A test that can't be made yet counts
    with p = 1, so that no other becomes significant by its absence."""
    places = [(key, i, column) for key, (compared_rows, _) in compared.items()
              for i, c in enumerate(compared_rows) if c.in_family
              for column, protocol in protocols.items() if protocol == key[0] and c.changes[column].paired]
    p = [compared[key][0][i].changes[column].paired.p for key, i, column in places]
    adjusted = dict(zip(places, holm(p + [1.0] * missing_tests(compared, protocols))))

    def changed(key: tuple, i: int, c: Comparison) -> Comparison:
        return replace(c, changes={column: replace(change, adjusted=adjusted.get((key, i, column)))
                                   for column, change in c.changes.items()})

    return {key: ([changed(key, i, c) for i, c in enumerate(compared_rows)], notes)
            for key, (compared_rows, notes) in compared.items()}


def reran(row: dict, rows: list[dict]) -> bool | None:
    """Whether a rerun of the row's config_hash (another adapter) differs beyond noise, by Holm over the five columns of
    each rerun; None where per-item scores are missing."""
    reruns = [r for r in rows if row["adapter_sha256"] and r["config_hash"] == row["config_hash"]]
    reruns = [r for r in reruns if r["adapter_sha256"] != row["adapter_sha256"]]
    tests = [[compare([(row, rerun)], column).paired for column in METRICS] for rerun in reruns]
    known = [holm([paired.p for paired in paired_tests if paired]) for paired_tests in tests]
    if any(p < ALPHA for adjusted in known for p in adjusted):
        return True
    return None if any(paired is None for paired_tests in tests for paired in paired_tests) else False


def signed(points: float) -> str:
    size = f"{abs(points):.1f}"
    return size if size == "0.0" else ("+" if points > 0 else "−") + size


@dataclass(frozen=True)
class Verdict:
    word: str
    why: str
    label: str = ""
    rows: tuple[dict, ...] = ()


def verdict(against_base: dict[str, Change], irreproducible: bool | None = False, inherited: frozenset = frozenset(),
            at_floor: tuple[str, ...] = (), protocols: dict[str, str] | None = None) -> Verdict:
    """The verdict from the endpoints' differences to base, by the rules at the top. `inherited`: endpoints whose drop
    the parent had already; `at_floor`: endpoints on which the base itself is at chance; `protocols`: of the endpoints,
    to name one that is missing."""
    up = [column for column, change in against_base.items() if change.up]
    down = [column for column, change in against_base.items() if change.down]
    forgotten = [column for column in FORGOTTEN if against_base[column].catastrophic]
    moved = []
    for column in up + down:
        marks = ["catastrophic"] * against_base[column].catastrophic + ["inherited"] * (column in inherited)
        marked = f" ({', '.join(marks)})" * bool(marks)
        moved.append(f"{title_of(column)} {signed(against_base[column].points)}{marked}")
    why = ", ".join(moved) or "nothing clearly up or down"
    why += "".join(f"; {title_of(column)} is at chance in the base: it can show no forgetting" for column in at_floor)
    missing = [title_of(column) + (f" ({protocols[column]})" if protocols else "")
               for column, change in against_base.items() if change.adjusted is None]
    if missing:
        everywhere = len(missing) == len(against_base)
        return Verdict("open", "no per-item scores" if everywhere else f"no paired test on {', '.join(missing)}; {why}")
    if irreproducible is None:
        return Verdict("open", f"a rerun has no per-item scores to compare; {why}")
    if irreproducible:
        return Verdict("irreproducible", f"a rerun of the same configuration differs; {why}")
    if "IFEval\nprompt" in up:
        word = "forgetting" + ", inherited" * inherited.issuperset(forgotten) if forgotten else "win"
        return Verdict(word, why)
    if up:
        return Verdict("mixed", why)
    if down:
        return Verdict("regression" + ", inherited" * inherited.issuperset(down), why)
    wide = [title_of(column) for column, change in against_base.items() if not change.equivalent]
    if wide:
        return Verdict("inconclusive", f"{why}; more than {MARGIN:g} points remain possible on {', '.join(wide)}")
    return Verdict("flat", why)


def endpoint_changes(compared: dict, against: str, adapters: set[str | None],
                     protocols: dict[str, str]) -> dict[str, Change]:
    """{endpoint: the change, in its protocol, of the family of rows that holds one of these adapters}; an empty Change
    where none."""
    changes = {}
    for column, protocol in protocols.items():
        holding = [c for c in compared.get((protocol, against), ([], []))[0] if c.in_family
                   and adapters & {row["adapter_sha256"] for row in c.rows}]
        changes[column] = holding[0].changes[column] if holding else Change(None, None, None)
    return changes


def lineages(compared: dict, tables: dict[str, list[dict]]) -> list[dict[str, Comparison]]:
    """[{protocol: a method's comparison with base}] of the methods in the family of tests. A method has the same family
    in each protocol, not necessarily the same seeds: they are evaluated one after another."""
    by_family = {}
    for protocol in tables:
        for c in [c for c in compared[protocol, "base"][0] if c.in_family]:
            by_family.setdefault((c.row["method"], c.row.get("family") or c.row["adapter_sha256"]), {})[protocol] = c
    return list(by_family.values())


def verdicts_of(compared: dict, tables: dict[str, list[dict]], protocols: dict[str, str]) -> list[Verdict]:
    """The verdict of each method in the family of tests."""
    verdicts = []
    for by_protocol in lineages(compared, tables):
        c, rows = next(iter(by_protocol.values())), [row for c in by_protocol.values() for row in c.rows]
        adapters = {row["adapter_sha256"] for row in rows}
        against_base = endpoint_changes(compared, "base", adapters, protocols)
        inherited = frozenset()
        if parents := {row["parent"]["adapter_sha256"] for row in rows if row.get("parent")}:
            of_parent = endpoint_changes(compared, "base", parents, protocols)
            against_parent = endpoint_changes(compared, "parent", adapters, protocols)
            inherited = frozenset(column for column, change in against_parent.items()
                                  if of_parent[column].down and change.adjusted is not None and not change.down)
        reruns = [reran(row, table) for table in tables.values() for row in table if row["adapter_sha256"] in adapters]
        irreproducible = True if True in reruns else None if None in reruns else False
        floors = tuple(column for column in FORGOTTEN for row in tables.get(protocols[column], [])
                       if row["method"] == "base" and is_at_floor(row, column))
        one = verdict(against_base, irreproducible, inherited, floors, protocols)
        seeds = {protocol: ", ".join(sorted(str(row["seed"]) for row in comparison.rows))
                 for protocol, comparison in by_protocol.items() if protocol in protocols.values()}
        if len(set(seeds.values())) > 1:
            one = replace(one, why=f"{one.why}; "
                          + ", ".join(f"{name} seeds {numbers}" for name, numbers in seeds.items()))
        verdicts.append(replace(one, label=c.label, rows=c.rows))
    return verdicts


def is_at_floor(row: dict, column: str) -> bool:
    """Does the 95 % interval of a score reach down to what chance gives?"""
    points, stderr = score(row, column)
    return column in FLOORS and stderr is not None and points - 1.96 * stderr <= FLOORS[column]


def title_of(column: str) -> str:
    return column.replace("\n", " ")
