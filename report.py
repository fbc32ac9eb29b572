"""report.py: what results/ holds -> the tables, verdicts and plots that compare the rows.

A score carries its standard error se (lm-eval's own, over the items). The difference of two rows a and b, in points, is
    delta = 100 (a - b)    with    se(delta) = 100 sqrt(se_a^2 + se_b^2);    marked ~ when |delta| < 2 se(delta).
Both rows answered the same items, so the test is a paired one, on the differences d_i = a_i - b_i of the items' scores:
    0/1 items    exact McNemar;      interval of Bonett and Price    (MMLU, GSM8K, IFEval by prompt)
    otherwise    paired bootstrap, 10,000 resamples: of items (TruthfulQA MC2), of prompts with all their instructions
                 (IFEval by instruction, whose delta is sum d_i / sum m_i, m_i instructions in prompt i)
    p-values     adjusted by Holm over a table: five columns x the rows compared with base, in one protocol
    detectable   (z_0.975 + z_0.8) sqrt(sum d_i^2) / sum m_i: what a test at 5 % finds with power 0.8
"Up" and "down" are adjusted p < 0.05. Catastrophic: the interval wholly below 0 and the point below -2. The verdict is
that of the plain protocol against base, the first that holds:
    open            a test is missing: the row or base has no per-item scores
    irreproducible  a rerun of the same config_hash differs from it (Holm over the five columns)
    forgetting      IFEval up, and a catastrophic drop elsewhere
    win             IFEval up, by prompt or by instruction, and neither of them down
    regression      something down or catastrophic, nothing up
    flat            nothing up, nothing down
    mixed           the rest: up elsewhere than on IFEval, or up and down on it
DPO has a criterion of its own besides: the lower bound of its judged win rate against SFT is above 50 %.

1. A report is about one train_invariants, and a table about one protocol (plain, chat) and one eval_hash. A results
   file that holds more is refused, naming the rows and the fields that differ; --group HASH picks. So are rows whose
   items (doc_id, doc_hash) are not the same.
2. A method is compared with base and with the SFT row it was trained from: the parent that the row names, else the only
   candidate. Where two could be meant, the difference is left out and a note says so.
3. The same config_hash with another adapter hash is a run that did not reproduce: both rows stay, the later marked †.
4. What is missing is shown as missing, never as zero: a row as "planned", a score as "–", a standard error as "?".
5. A reward model scores answers and has no benchmark row: its own table comes from rm/*.json, beside the baseline "the
   longer answer wins". What PPO and GRPO say of themselves comes from ppo/*.json and grpo/*.json, what a judge says of
   held-out answers from judge/*.json, speed from bench/*.json. A record of other train_invariants than the rows' is
   listed with ‡ and both hashes, and left out where --group names theirs.

    python report.py            print the tables; write results/README.md, a page a run in results/runs/, the plots in
                                results/plots/, and README.md between its two markers
    python report.py --check    write nothing; exit 1 with a diff when a file disagrees with the results
"""

import difflib
import functools
import gzip
import io
import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from common import SCHEMA_VERSION, fail, read_json, read_results, sha256_json, write_atomic


@dataclass(frozen=True)
class Args:
    results: str = "results"
    """Directory that holds metrics.json and the records beside it; the full tables go to README.md inside it."""
    readme: str | None = None
    """File whose section between the two results markers gets the compact table; "none": no such file. By default
    README.md for the directory results, and none for another."""
    group: tuple[str, ...] = ()
    """Report only rows of these train_invariants and eval_hashes; a kind of hash that isn't named is not restricted."""
    check: bool = False
    """Write nothing; exit 1 and print a diff when a generated file disagrees with the results."""


METRICS = {  # column title: (task, metric, filter) of lm-eval
    "MMLU": ("mmlu", "acc", "none"),
    "GSM8K\nstrict": ("gsm8k", "exact_match", "strict-match"),
    "TruthfulQA\nMC2": ("truthfulqa_mc2", "acc", "none"),
    "IFEval\nprompt": ("ifeval", "prompt_level_strict_acc", "none"),
    "IFEval\ninstruction": ("ifeval", "inst_level_strict_acc", "none"),
}
# The climb. A rung without a result is shown as planned; rows of other names follow those of their phase.
LADDER = {"base": 0, "sft_v2": 1, "dpo_v1": 2, "ppo_v1": 3, "grpo_v1": 4, "kto_v1": 5}  # row: phase
TRAINING = {  # facts of a training run: key in the row's "training" or "cost" -> column title
    "heldout_loss_base": "held-out loss\nbefore", "heldout_loss": "held-out\nloss",
    "heldout_accuracy": "held-out\naccuracy", "eos_rate": "EOS rate", "tokens": "tokens", "wall_time_s": "minutes",
    "gpu_minutes": "GPU\nminutes", "peak_gib": "peak\nGiB", "device": "device",
}
REWARD = {  # figures of a reward model: column title -> (place in its file, scale, decimals)
    "accuracy, %": (("accuracy",), 100, 1),
    "longer-wins, %": (("longer_wins", "accuracy"), 100, 1),
    "length-\nmatched, %": (("length_matched", "accuracy"), 100, 1),
    "score–length\ncorrelation": (("score_length", "pearson"), 1, 2),
    "calibration\nerror": (("calibration_error",), 1, 3),
    "margin\nmean / sd": (("scores", "margin", "mean"), 1, 2),
}
REWARD_LEGEND = (
    "On held-out pairs, in % with Wilson's 95 % interval: accuracy, the chosen answer scores higher; longer-wins, it is "
    "the longer one; length-matched, accuracy where lengths differ by at most 10 %. Correlation is Pearson's, margin is "
    "chosen − rejected. Per-pair outcomes are not kept, so there is no paired test: intervals that don't overlap tell "
    "accuracy and baseline apart, however the two depend on each other; intervals that overlap leave it open. "
    "mean ± sd is over the seeds of one family, a seed once, sd with n − 1."
)
GUARDRAILS = {  # figures of the held-out answers: column title -> (key in guardrails.json, scale, decimals)
    "n": ("n", 1, 0), "EOS, %": ("eos_rate", 100, 1), "refusals, %": ("refusal_rate", 100, 1),
    "distinct-1": ("distinct_1", 1, 3), "distinct-2": ("distinct_2", 1, 3), "distinct-3": ("distinct_3", 1, 3),
    "longest\nrepeat": ("longest_repeat_mean", 1, 1), "loops, %": ("repetition_rate", 100, 1),
    "other\nlanguage, %": ("language_drift_rate", 100, 1),
}  # fmt: skip
PROTOCOLS = {"plain": "no chat template", "chat": "chat template applied, few-shot examples as turns"}
UNDRAWN = {"step", "seconds", "tokens", "trained_tokens", "lr"}  # of a run's log: known without a plot
ROW_ID = ("name", "config_hash", "adapter_sha256", "weights_sha256")  # of an evaluated policy, in any protocol
SMALL = 200  # items; with fewer, the standard error of a score near 50 % is above 3.5 points
FEWEST = 20  # judged prompts; the bootstrap's interval of two wins in two has no width
BEGIN, END, STAMP = "<!-- results:begin -->", "<!-- results:end -->", "<!-- written by `"
ROW_KEYS = (
    "name phase method model revision config_hash adapter_sha256 weights_sha256 train_invariants eval_hash eval seed "
    "protocol metrics n"
).split()
LEGEND = (
    "Scores in % ± standard error; n counts items, for IFEval prompts. Differences in points. With per-item scores: "
    "the paired 95 % interval of that one difference in brackets, p adjusted by Holm over the table, **bold** where "
    "p < 0.05. Without: "
    "± √(se² + se²), **bold** at twice that or more. `~`: less than 2 √(se² + se²), which the two scores alone would "
    "not tell apart. `?`: a standard error is missing. `–`: not measured."
)
UNPAIRED = "±: no per-item scores (evaluate.py keeps them in scores/), so no paired test and no verdict."
DETECTABLE = "smallest detectable"
VERDICTS = (
    "Up and down: p < 0.05 after Holm. Catastrophic: interval wholly below 0, before Holm, and point below −2. **win**: "
    "IFEval up and not down, no catastrophic drop. **forgetting**: IFEval up, a catastrophic drop elsewhere. "
    "**regression**: down or catastrophic, nothing up. **flat**: neither. **mixed**: up elsewhere than on IFEval. "
    "**irreproducible**: a rerun differs. **open**: a test is missing. Smallest detectable: the true difference that one "
    "paired test at 5 %, before Holm, finds 4 times in 5, from the share of items on which the two rows differ."
)
PLOTS = {  # file name under plots/ -> what it shows
    "deltas-plain": "Differences to base with paired 95 % intervals, plain protocol",
    "deltas-chat": "Differences to base with paired 95 % intervals, chat protocol",
    "tradeoff": "What IFEval gained beside what MMLU or TruthfulQA lost",
    "winrate-kl": "Judged win rate against SFT beside the KL to SFT",
    "ppo": "PPO: reward, KL and length over training",
    "grpo": "GRPO: reward, KL and length over training",
}
ALPHA, CATASTROPHIC = 0.05, -2.0  # of adjusted p-values; points
RESAMPLES = 10_000
Z_ALPHA, Z_POWER = (statistics.NormalDist().inv_cdf(p) for p in (1 - ALPHA / 2, 0.8))


# ------------------------------------------------------------------ statistics


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p that the items which only one of two rows has right are fair coins, of which `gained` and
    `lost` fell on each side: min(1, 2 P(X <= min)), X ~ Binomial(gained + lost, 1/2). 1 where there is no such item."""
    n, term, total = gained + lost, 1, 0  # term: n choose k, in whole numbers
    for k in range(min(gained, lost) + 1):
        total, term = total + term, term * (n - k) // (k + 1)
    return min(1.0, 2 * total / 2**n)


def paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """95 % interval of (gained - lost) / n over n 0/1 items: Wald's, with one item added to each side, so that few
    discordant items don't give a width of 0 [Bonett & Price 2012, J. Educ. Behav. Stat. 37(4)]."""
    a, b = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z_ALPHA * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    return max(-1.0, a - b - half), min(1.0, a - b + half)


@functools.lru_cache(maxsize=4)
def resamples(counts: tuple[int, ...]) -> np.ndarray:
    """[RESAMPLES, K]: how often each of K distinct items, of which there are counts[k], is among sum(counts) drawn with
    replacement. The same draws for every comparison of the same items."""
    n = sum(counts)
    return np.random.default_rng(0).multinomial(n, np.array(counts) / n, size=RESAMPLES).astype(float)


def paired_bootstrap(d: np.ndarray, m: np.ndarray) -> tuple[float, float, float]:
    """(lower, upper, p) of sum d / sum m, d [n] the differences and m [n] the sizes of the independent units (an item:
    1; a prompt: its instructions): the percentile 95 % interval, and p = 2 min(P(. <= 0), P(. >= 0)), never 0."""
    pairs = np.stack([d, m], axis=1).astype(float)  # [n, 2]
    values, counts = np.unique(pairs, axis=0, return_counts=True)  # drawing items is drawing how often each value comes
    if 4 * len(values) > len(pairs):  # mostly distinct: then equal weights, which all comparisons share
        values, counts = pairs, np.ones(len(pairs), int)
    top, bottom = (resamples(tuple(counts.tolist())) @ values).T  # [RESAMPLES] each
    found = top / bottom
    low, high = np.quantile(found, [ALPHA / 2, 1 - ALPHA / 2])
    tails = [(1 + int(tail.sum())) / (1 + RESAMPLES) for tail in (found <= 0, found >= 0)]
    return float(low), float(high), min(1.0, 2 * min(tails))


def holm(p: list[float]) -> list[float]:
    """Adjusted p-values, in the order given: below alpha where Holm's step-down test rejects at family-wise alpha."""
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def minimum_detectable_effect(d: np.ndarray, m: np.ndarray) -> float | None:
    """The true difference that one paired test at alpha = 0.05, two-sided, finds with power 0.8:
        (z_0.975 + z_0.8) sqrt(sum d^2) / sum m
    which for 0/1 items is 2.80 sqrt(psi / n), psi the observed share of discordant items [Connor 1987, Biometrics
    43(1), without the term delta^2 << psi: a little too large]. Holm's test needs more. None where no item differs."""
    return float((Z_ALPHA + Z_POWER) * math.sqrt((d.astype(float) ** 2).sum()) / m.sum()) if d.any() else None


# ------------------------------------------------------------------ rows, and which of them may stand together


def rung(phase: int, name: str) -> tuple[int, int]:
    """Sort key of a row: its phase, then its place in the climb, other names last."""
    return phase, [*LADDER, name].index(name)


def read_rows(path: Path) -> list[dict]:
    rows = read_results(path)["runs"]
    for row in rows:
        if missing := [key for key in ROW_KEYS if key not in row]:
            fail(f"{path}: row {row.get('name', '(unnamed)')} lacks {', '.join(missing)}; evaluate it again")
    return sorted(rows, key=lambda row: (*rung(row["phase"], row["name"]), row["name"], row.get("timestamp") or ""))


def read_items(results: Path, row: dict) -> dict[str, dict] | None:
    """{task: {"task", "doc_id", "doc_hash", and each metric: a list over its items}}, or None where a row has none.
    Ends the run if they are not the row's: of other weights, or with another mean than its score."""
    path = results / (row.get("scores") or "")
    if not path.is_file():
        return None
    try:
        record = json.loads(gzip.decompress(path.read_bytes()))
        tasks = record["tasks"]
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
    """What stands behind a row's two hashes, and what lm-eval then ran; flat, so that a difference can be named."""
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


def tables_of(rows: list[dict], group: tuple[str, ...], path: Path) -> dict[str, list[dict]]:
    """{protocol: its rows}; ends the run when a table would hold rows that can't be compared."""
    kept, unknown = rows, set(group)
    for key in ("train_invariants", "eval_hash"):
        if chosen := unknown & {row[key] for row in rows}:
            kept, unknown = [row for row in kept if row[key] in chosen], unknown - chosen
    if unknown or (group and not kept):
        fail(f"--group {' '.join(group)}: {path} has no such row. It holds\n{listing(rows)}")
    protocols = sorted({row["protocol"] for row in kept}, reverse=True)  # plain first
    tables = {protocol: [row for row in kept if row["protocol"] == protocol] for protocol in protocols}
    clashes = [(table[0], row) for table in tables.values() for row in table if differences(table[0], row)]
    clashes += [(kept[0], t[0]) for t in tables.values() if t[0]["train_invariants"] != kept[0]["train_invariants"]]
    if clashes:
        lines = [f"  {a['name']} / {b['name']}: {differences(a, b)}" for a, b in clashes]
        fail(
            f"{path} holds rows that can't be compared:\n{listing(kept)}\nThey differ in\n" + "\n".join(lines)
            + "\nPick with --group HASH [HASH], or evaluate the rows again alike."
        )
    return tables


def read_records(results: Path, rows: list[dict], group: tuple[str, ...]) -> dict[str, list[dict]]:
    """{"rm", "ppo", "grpo", "judge", "guardrails", "runs": what the files hold}, with a `label`, the `plot` beside the
    file ("": none), and a `note` on one whose train_invariants are not those of `rows`. Fails on a newer schema."""
    records = {kind: [] for kind in ("rm", "ppo", "grpo", "judge", "guardrails", "runs")}
    climb = rows[0] if rows else None
    folders = [kind for kind in records if kind != "guardrails"]
    places = [(folder, path) for folder in folders for path in sorted((results / folder).glob("*.json"))]
    places += [("judge", path) for path in sorted((results / "judge" / "summaries").glob("*.json"))
               if not (results / "judge" / path.name).is_file()]  # without the text of prompts and answers
    for folder, path in places:
        record, plot = {"name": path.stem, **read_json(path)}, path.with_suffix(".png")
        version = record.get("schema_version")
        if not isinstance(version, int):
            fail(f"{path} is not a results file (schema_version {version})")
        if version > SCHEMA_VERSION:
            fail(f"{path} has schema_version {version}, newer than this code's {SCHEMA_VERSION}; update the code")
        # A comparison has two rows, guardrails.json any number, of one train_invariants: judge.py compares no others.
        sides = record.get("rows") or [record]
        first = next(iter(sides.values() if isinstance(sides, dict) else sides))
        climb = climb or {"name": record["name"]} | first  # without rows, the first record says what others must be
        own, theirs = (r.get("train_invariants") or "unknown" for r in (first, climb))
        if rows and own != theirs and theirs in group:
            continue
        note = f"‡ {record['name']}: train_invariants {own}, where {climb['name']} has {theirs}; no part of this climb."
        record |= {"label": record["name"] + "‡" * (own != theirs), "note": note if own != theirs else ""}
        record["plot"] = f"{folder}/{plot.name}" if plot.is_file() else ""
        records["guardrails" if path.stem == "guardrails" else folder].append(record)
    return {kind: sorted(found, key=lambda record: bool(record["note"])) for kind, found in records.items()}


def label_rows(rows: list[dict]) -> list[tuple[str, dict]]:
    """[(label, row)]: the name; with the adapter's hash where it isn't unique, and † on a rerun."""
    count, first, labelled = Counter(row["name"] for row in rows), {}, []
    for row in rows:
        suffix = f"@{(row['adapter_sha256'] or 'none')[:8]}" if count[row["name"]] > 1 else ""
        rerun = first.setdefault((row["name"], row["config_hash"]), row["adapter_sha256"]) != row["adapter_sha256"]
        labelled.append((row["name"] + suffix + "†" * rerun, row))
    return labelled


def references(row: dict, rows: list[dict], method: str) -> list[dict]:
    """The rows of `method` ("base" or "sft") that `row` may be compared with: one, unless there is doubt."""
    if row["method"] == "base" or row["name"] in LADDER and row["method"] == method:
        return []
    found = [r for r in rows if r["method"] == method]
    if method == "sft" and row.get("parent"):
        return [r for r in found if r["adapter_sha256"] == row["parent"]["adapter_sha256"]]
    return [r for r in found if r["name"] in LADDER] or [r for r in found if r["method"] != row["method"]]


# ------------------------------------------------------------------ scores and differences


def finite(value: object) -> int | float | None:
    """`value` where it is a finite number (lm-eval writes "N/A", Python's JSON NaN), else None."""
    return value if type(value) in (int, float) and math.isfinite(value) else None


def at(record: object, *place: str) -> object:
    """record[place[0]][place[1]]…, or None where anything on the way is missing."""
    for key in place:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def score(row: dict, column: str) -> tuple[float | None, float | None]:
    """(score, its standard error) in percent; None for what the row doesn't have."""
    task, metric, filter_name = METRICS[column]
    found = [finite(row["metrics"].get(f"{task}/{key},{filter_name}")) for key in (metric, f"{metric}_stderr")]
    return tuple(None if x is None else 100 * x for x in found)


def delta(a: tuple, b: tuple) -> tuple[float | None, float | None, bool | None]:
    """(a - b in points, its standard error, beyond noise or not) of two (score, stderr); None for what can't be known."""
    points = None if a[0] is None or b[0] is None else a[0] - b[0]
    if points is None or a[1] is None or b[1] is None:
        return points, None, None
    stderr = math.hypot(a[1], b[1])  # sqrt(se_a^2 + se_b^2)
    return points, stderr, points != 0 and abs(points) >= 2 * stderr  # 0 ± 0 is no difference


@dataclass(frozen=True)
class Change:
    """Row a minus row b in one column, in points; `apart`: |points| >= 2 stderr. Then what the paired test adds."""

    points: float | None
    stderr: float | None
    apart: bool | None
    interval: tuple[float, float] | None = None
    p: float | None = None  # of the one test
    adjusted: float | None = None  # by Holm, over the table
    detectable: float | None = None

    @property
    def clear(self) -> bool | None:
        return self.apart if self.adjusted is None else self.adjusted < ALPHA

    @property
    def catastrophic(self) -> bool:
        return self.interval is not None and self.interval[1] < 0 and self.points < CATASTROPHIC


def paired_items(a: dict, b: dict, column: str) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """([n] the score of row a minus that of row b, [n] the size) of each item, and whether all scores are 0 or 1. Of a
    prompt of several instructions: the difference of how many were followed, and how many there are. None where a row
    has no per-item scores; ends the run where the two rows' items are not the same."""
    task, metric, filter_name = METRICS[column]
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
    scores = np.array(pairs)  # [n, 2]
    return scores[:, 0] - scores[:, 1], np.ones(len(pairs), int), bool(np.isin(scores, (0, 1)).all())


def compare(a: dict, b: dict, column: str) -> Change:
    change = Change(*delta(score(a, column), score(b, column)))
    if change.points is None or not (found := paired_items(a, b, column)):
        return change
    d, m, right_or_wrong = found
    if right_or_wrong:
        gained, lost = int((d > 0).sum()), int((d < 0).sum())
        low, high, p = *paired_interval(gained, lost, len(d)), mcnemar(gained, lost)
    else:
        low, high, p = paired_bootstrap(d, m)
    detectable = minimum_detectable_effect(d, m)
    return replace(change, interval=(100 * low, 100 * high), p=p, detectable=detectable and 100 * detectable)


def adjust(family: list[dict[str, Change]]) -> list[dict[str, Change]]:
    """The same with Holm's adjusted p-values, over all tests in the family."""
    tests = [(i, column) for i, changes in enumerate(family) for column, c in changes.items() if c.p is not None]
    adjusted = dict(zip(tests, holm([family[i][column].p for i, column in tests])))
    return [{k: replace(c, adjusted=adjusted.get((i, k))) for k, c in row.items()} for i, row in enumerate(family)]


@dataclass(frozen=True)
class Comparison:
    label: str
    row: dict
    reference: str
    changes: dict[str, Change]  # by column


def comparisons(rows: list[dict], method: str) -> tuple[list[Comparison], list[str]]:
    """(every row against its reference of `method`, "base" or "sft": one Holm family; notes on those left out)."""
    labelled, found, notes = label_rows(rows), [], []
    for label, row in labelled:
        candidates = references(row, rows, method)
        names = [name for name, r in labelled if any(r is c for c in candidates)]
        if len(candidates) == 1:
            found.append(Comparison(label, row, names[0], {k: compare(row, candidates[0], k) for k in METRICS}))
        elif candidates:
            notes.append(f"{label} is left out: it could be compared with {' or '.join(names)}.")
        elif method == "sft" and (row.get("parent") or {}).get("method") == "sft":
            notes.append(f"{label} is left out: {row['parent']['name']}, from which it was trained, has no row here.")
    adjusted = adjust([c.changes for c in found])
    return [replace(c, changes=changes) for c, changes in zip(found, adjusted)], notes


def reran(row: dict, rows: list[dict]) -> bool | None:
    """Whether a rerun of the row's config_hash (another adapter) differs beyond noise, by Holm over the five columns of
    each rerun; None where that can't be told."""
    others = [r for r in rows if row["adapter_sha256"] and r["config_hash"] == row["config_hash"]]
    others = [r for r in others if r["adapter_sha256"] != row["adapter_sha256"]]
    pairs = [adjust([{k: compare(row, other, k) for k in METRICS}])[0] for other in others]
    found = [change for changes in pairs for change in changes.values()]
    if any(change.p is not None and change.clear for change in found):
        return True
    return None if any(change.p is None for change in found) else False


def verdict(changes: dict[str, Change], irreproducible: bool | None = False) -> tuple[str, str]:
    """(word, why) of a row's differences to base, by the rules at the top; without a rerun, irreproducible is False."""
    tested = {column.replace("\n", " "): change for column, change in changes.items() if change.adjusted is not None}
    up = [k for k, c in tested.items() if c.clear and c.points > 0]
    worst = [k for k, c in tested.items() if c.catastrophic]
    down = [k for k, c in tested.items() if k in worst or c.clear and c.points < 0]
    followed = [k for k in up if k.startswith("IFEval")]
    moved = [f"{k} {signed(tested[k].points)}" + " (catastrophic)" * (k in worst) for k in up + down]
    why = ", ".join(moved) or "nothing clearly up or down"
    if len(tested) < len(METRICS):
        return "open", "not all is measured" if tested else "no per-item scores"
    if irreproducible is None:
        return "open", f"a rerun has no per-item scores to compare; {why}"
    if irreproducible:
        return "irreproducible", f"a rerun of the same configuration differs; {why}"
    if followed and any(not k.startswith("IFEval") for k in worst):
        return "forgetting", why
    if followed and not any(k.startswith("IFEval") for k in down):
        return "win", why
    if not up:
        return ("regression" if down else "flat"), why
    return "mixed", why


def score_cell(points: float | None, stderr: float | None) -> str:
    return "–" if points is None else f"{points:.1f} ± " + ("?" if stderr is None else f"{stderr:.1f}")


def number(value: object, decimals: int = 3, scale: int = 1) -> str:
    if finite(value) is None:
        return "–"
    text = f"{value:,}" if isinstance(value, int) and scale == 1 else f"{scale * value:z,.{decimals}f}"
    return text.replace("-", "−")


def signed(points: float) -> str:
    size = f"{abs(points):.1f}"
    return size if size == "0.0" else ("+" if points > 0 else "−") + size


def delta_cell(points: float | None, stderr: float | None, clear: bool | None, short: bool = False) -> str:
    """`**+5.0 ± 0.7**` beyond noise, `+0.5 ± 0.7 ~` within it, `+0.5 ± ?` not to be told; short: without the ±."""
    if points is None:
        return "–"
    text = signed(points)
    if not short:
        text += " ± " + ("?" if stderr is None else f"{stderr:.1f}")
    return {True: f"**{text}**", False: f"{text} ~", None: f"{text} ?" if short else text}[clear]


def change_cell(change: Change, short: bool = False) -> str:
    """`**+5.0 [3.6, 6.4]**` and the adjusted p where there is a paired test, else a delta_cell; short: points only."""
    if change.adjusted is None:
        return delta_cell(change.points, change.stderr, change.apart, short)
    text = signed(change.points)
    if not short:
        text += f" [{number(change.interval[0], 1)}, {number(change.interval[1], 1)}]"
    text = (f"**{text}**" if change.clear else text) + " ~" * (change.apart is False)
    p = "p < 0.001" if change.adjusted < 0.001 else f"p {change.adjusted:.3f}"
    return text if short else f"{text}\n{p}"


# ------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Table:
    """`left` text columns, then numbers; rendered as markdown and on the terminal."""

    header: list[str]
    rows: list[list[str]]
    left: int = 1
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [self.header, [":--"] * self.left + ["--:"] * (len(self.header) - self.left), *self.rows]
        cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
        return "\n\n".join(["\n".join(f"| {' | '.join(line)} |" for line in cells), *self.notes])

    def show(self, console: Console) -> None:
        table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, title in enumerate(self.header):
            table.add_column(Text(title), justify="left" if i < self.left else "right")
        for row in self.rows:
            cells = [cell.replace(" ± ", "±").replace(" ~", "~") if console.width < 100 else cell for cell in row]
            table.add_row(*map(paint, cells), style="dim" if "planned" in row else "")
        console.print(table)
        for note in self.notes:
            console.print(Text(note, style="dim"))


def paint(cell: str) -> Text:
    """A cell in its colour: a clear gain green, a clear loss red, what is within noise dim."""
    clear, first = "bold red" if cell.startswith("**−") else "bold green", cell.split("\n")[0]
    return Text(cell.replace("**", ""), style=clear if "**" in cell else "dim" if first.endswith(("~", "–")) else "")


def detectable_row(compared: list[Comparison], left: int) -> list[list[str]]:
    """The last line of a table with a paired test: by column the largest effect that a row's test needs to find it."""
    found = {k: [c.changes[k].detectable for c in compared if c.changes[k].detectable] for k in METRICS}
    cells = [number(max(values, default=None), 1) for values in found.values()]
    return [[""] * (left - 1) + [DETECTABLE, *cells]] if any(found.values()) else []


def scores_table(rows: list[dict], compared: list[Comparison] | None = None, verdicts: bool = False) -> Table:
    """The current state: every rung, scored or planned. With `compared`, each difference to base in brackets and the
    smallest detectable ones below; with `verdicts`, a column of them."""
    changes = {id(c.row): c.changes for c in compared or []}
    rungs = [(*rung(row["phase"], row["name"]), label, row) for label, row in label_rows(rows)]
    names = {row["name"] for row in rows}
    rungs += [(*rung(phase, name), name, None) for name, phase in LADDER.items() if name not in names]
    lines = []
    for phase, _, label, row in sorted(rungs, key=lambda r: r[:2]):
        cells = ["planned"] + [""] * (len(METRICS) - 1)
        if row:
            cells = [score_cell(*score(row, column)) for column in METRICS]
        if row and id(row) in changes:
            short = [change_cell(change, short=True) for change in changes[id(row)].values()]
            cells = [cell if change == "–" else f"{cell} ({change})" for cell, change in zip(cells, short)]
        if verdicts:
            cells.append(verdict(changes[id(row)], reran(row, rows))[0] if row and id(row) in changes else "")
        lines.append([str(phase), label, *cells])
    lines += [line + [""] * verdicts for line in detectable_row(compared or [], 2)]
    header = ["phase", "row"]
    for column, (task, _, _) in METRICS.items():  # one table, one protocol: shots and n are the same in every row
        shots = {f"{k}-shot" for row in rows for name, k, _ in row["eval"]["tasks"] if name == task}
        items = {f"n = {row['n'][task]:,}" for row in rows if task in row["n"]}
        header.append("\n".join([column, *shots, *items]))
    notes = []
    if any("†" in line[1] for line in lines):
        notes.append("† the config_hash of the row above, another adapter: it, or its parent, did not reproduce.")
    if any(score(row, column)[1] == 0 for row in rows for column in METRICS):
        notes.append("± 0.0: every item scored alike; a difference to this score looks more certain than it is.")
    return Table(header + ["verdict"] * verdicts, lines, 2, notes)


def delta_table(compared: list[Comparison], notes: list[str]) -> Table | None:
    """Every row minus its reference, in points."""
    lines = [[f"{c.label} − {c.reference}", *map(change_cell, c.changes.values())] for c in compared]
    if any(change.p is None and change.points is not None for c in compared for change in c.changes.values()):
        notes = [*notes, UNPAIRED]
    if not lines and not notes:
        return None
    return Table(["difference", *METRICS], lines + detectable_row(compared, 1), 1, notes)


def verdict_table(compared: list[Comparison], rows: list[dict], judge: list[dict]) -> Table | None:
    """A line a method: the verdict against base and what it rests on, and DPO's own criterion."""
    lines = []
    for c in compared:
        word, why = verdict(c.changes, reran(c.row, rows))
        own = own_criterion(c.row, rows, judge) if c.row["method"] == "dpo" else "–"
        lines.append([c.label, f"**{word}**", why, own])
    return Table(["row", "verdict", "clearly or catastrophically moved, points", "own criterion"], lines, 4) if lines else None


def own_criterion(row: dict, rows: list[dict], judge: list[dict]) -> str:
    """DPO's: the judged win rate against its SFT row, with its whole interval, is above 50 %; by no circular judge, over
    FEWEST prompts or more."""
    parents = {r["adapter_sha256"] for r in references(row, rows, "sft")}
    said = []
    for record in judge:
        a, b = (at(record, "rows", side, "adapter_sha256") for side in "ab")
        low = finite((at(record, "summary", "win_rate_ci95") or [None])[0])
        if a == row["adapter_sha256"] and b in parents and low is not None and not at(record, "judge", "circular"):
            scored = (at(record, "summary", "n") or 0) - (at(record, "summary", "unparsable") or 0)
            word = "open, too few" if scored < FEWEST else "met" if low > 0.5 else "not met"
            said.append(f"{word}: beats SFT in {win_rate_cell(record)} % of {number(scored)} prompts, says "
                        f"{at(record, 'judge', 'model')}")  # fmt: skip
    return "\n".join(said) or "open: not judged against SFT"


def seeds_table(rows: list[dict]) -> Table | None:
    """Mean ± sd over the seeds of a family, where there are several; a seed once."""
    families, lines = {}, []
    for row in rows:
        if row.get("family"):
            families.setdefault(row["family"], {}).setdefault(row["seed"], row)
    for family, seeds in families.items():
        if len(seeds) > 1:
            cells = [spread([score(row, column)[0] for row in seeds.values()], 1, 1) for column in METRICS]
            names = ", ".join(dict.fromkeys(row["name"] for row in seeds.values()))
            lines.append([names, ", ".join(map(str, seeds)), family, *cells])
    notes = ["mean ± sd (n − 1) of the scores, in %: what another seed of the same configuration changes."]
    return Table(["rows", "seeds", "family", *METRICS], lines, 3, notes) if lines else None


def empty_share(row: dict, task: str) -> float | None:
    """Share of a benchmark's generated answers that are nothing but whitespace, in percent; None without per-item scores."""
    characters = at(row, "items", task, "characters")
    return 100 * statistics.fmean(n == 0 for n in characters) if characters else None


def answers_table(rows: list[dict]) -> Table | None:
    """What the generated answers of the benchmarks look like from outside: a score may move because answers get longer."""
    lines = []
    for label, row in label_rows(rows):
        cells = []
        for task in ("gsm8k", "ifeval"):
            characters = at(row, "items", task, "characters")
            cells += [number(empty_share(row, task), 1), number(statistics.median(characters) if characters else None, 0)]
        lines.append([label, *cells])
    note = "Empty: nothing but whitespace before the end. A row that says something more often follows more instructions."
    titles = ["row", "GSM8K\nempty, %", "GSM8K\nmedian characters", "IFEval\nempty, %", "IFEval\nmedian characters"]
    return Table(titles, lines, 1, [note]) if any(line[1:] != ["–"] * 4 for line in lines) else None


def empty_note(rows: list[dict]) -> str:
    """IFEval's empty answers, where rows differ in them by ten points or more; else nothing."""
    share = {label: found for label, row in label_rows(rows) if (found := empty_share(row, "ifeval")) is not None}
    if not share or max(share.values()) - min(share.values()) < 10:
        return ""
    return ("**Read IFEval with care**: answers that are empty, " + ", ".join(f"{k} {v:.0f} %" for k, v in share.items())
            + ". A row that says something more often follows more instructions.")


def protocols_table(tables: dict[str, list[dict]]) -> Table | None:
    """Each row's score in the one protocol and the other, where it has both."""
    if len(tables) < 2:
        return None
    lines = []
    (first, rows), (second, others) = list(tables.items())[:2]
    for label, row in label_rows(rows):
        same = [r for r in others if [r[k] for k in ROW_ID] == [row[k] for k in ROW_ID]]
        cells = [[score_cell(*score(r, column)) for r in (row, *same[:1])] for column in METRICS]
        lines += [[label, *("\n".join(pair) for pair in cells)]] if same else []
    title = f"row\n{first}, below it {second}"
    return Table([title, *METRICS], lines) if lines else None


def training_table(rows: list[dict]) -> Table | None:
    """What the training runs say of themselves, and what they took: a line an adapter, a column a fact that any has."""
    once = {(row["name"], row["config_hash"], row["adapter_sha256"]): row for row in rows if row.get("training")}
    facts = {}
    for key, row in once.items():
        cost = {k: v for k, v in (row.get("cost") or {}).items() if v is not None}
        if finite(cost.get("wall_time_s")) and cost.get("gpus"):
            cost["gpu_minutes"] = cost["wall_time_s"] * cost["gpus"] / 60
        facts[key] = row["training"] | cost
    titles = {key: title for key, title in TRAINING.items() if any(key in found for found in facts.values())}

    def cell(key: str, value: object) -> str:
        if isinstance(value, str):
            return value
        if finite(value) is not None and key == "wall_time_s":
            return f"{value / 60:.1f}"
        if finite(value) is not None and key.endswith(("accuracy", "rate")):
            return f"{100 * value:.1f} %"
        return number(value, 1 if key in ("gpu_minutes", "peak_gib") else 3)

    lines = [
        [label, row["method"], str(row["seed"]), row["config_hash"], *(cell(k, found.get(k)) for k in titles)]
        for (label, row), found in zip(label_rows(list(once.values())), facts.values())
    ]
    notes = ["A row's own training, without that of its parent and of the reward models it used."]
    if any(row.get("cost") for row in once.values()):
        notes.append("Tokens: all that it trained on or sampled, every epoch counted.")
    return Table(["row", "method", "seed", "config_hash", *titles.values()], lines, 4, notes) if lines else None


# ------------------------------------------------------------------ reward models and on-policy runs


def interval(share: object) -> list[float] | None:
    """[share, its lower, its upper end] in percent of {"n", "accuracy", "interval"}; None where one is missing."""
    found = [at(share, "accuracy"), *(at(share, "interval") or [None])]
    return None if None in map(finite, found) else [100 * x for x in found]


def share_cell(share: object) -> str:
    """`66.2 [64.0, 68.4]`: a share in percent and its interval."""
    text = number(at(share, "accuracy"), 1, 100)
    return "{:.1f} [{:.1f}, {:.1f}]".format(*ends) if (ends := interval(share)) else text + " [?]" * (text != "–")


def against_length(record: dict) -> str:
    """One sentence: is the reward model told from the rule that the longer answer wins, on the same pairs?"""
    longer, name = record.get("longer_wins"), "longer-wins"
    text = f"{record['label']}: accuracy {share_cell(record)} %, longer-wins {share_cell(longer)} %, on the same "
    text += f"{number(record.get('n'))} held-out pairs: "
    if not (own := interval(record)) or not (rule := interval(longer)):
        return text + "not compared, for want of a figure."
    (_, low, high), (point, rule_low, rule_high) = own, rule
    if point < 50:  # then "the shorter answer wins" is the rule to beat
        point, rule_low, rule_high = 100 - point, 100 - rule_high, 100 - rule_low
        name = f"shorter-wins ({point:.1f} %, the better rule of length here)"
    if low > rule_high or high < rule_low:
        return text + f"{'beats' if low > rule_high else 'worse than'} {name}, the intervals do not overlap."
    above = "above" if low > point else "not above"
    return text + f"not told from {name}, the intervals overlap (accuracy's lower bound is {above} the baseline)."


def spread(values: list, scale: int, decimals: int) -> str:
    if None in map(finite, values):
        return "–"
    return " ± ".join(number(x, decimals, scale) for x in (statistics.fmean(values), statistics.stdev(values)))  # n − 1


def reward_table(records: list[dict]) -> Table:
    """A line a reward model, and the mean ± sd of a family's seeds; rm_v1 as planned where none belongs to the rows."""
    lines, families = [], {}
    for record in records:
        cells = []
        for place, scale, decimals in REWARD.values():
            beside, text = at(record, *place[:-1]), number(at(record, *place), decimals, scale)
            if place[-1] == "accuracy":
                text = share_cell(beside) + f"\nn = {number(at(beside, 'n'))}" * (place[0] == "length_matched")
            cells.append(text + f" / {number(at(beside, 'sd'), decimals)}" * (place[-1] == "mean"))
        about = ["–" if record.get(key) is None else str(record[key]) for key in ("seed", "config_hash")]
        lines.append([record["label"], *about, number(record.get("n")), *cells])
        families.setdefault(record.get("family"), {}).setdefault(record.get("seed"), record)
    for family, seeds in families.items():
        if family and len(seeds) > 1:
            found = list(seeds.values())  # of one train_invariants, which are part of a family's hash
            cells = [spread([at(r, *place) for r in found], *shown) for place, *shown in REWARD.values()]
            label = "mean ± sd" + "‡" * bool(found[0]["note"])
            lines.append([label, ", ".join(map(str, seeds)), f"family\n{family}", "", *cells])
    if all(record["note"] for record in records):
        lines.append(["rm_v1", "planned"] + [""] * (len(REWARD) + 2))
    notes = [REWARD_LEGEND] * bool(records) + [record["note"] for record in records if record["note"]]
    if len({str(record.get("longer_wins")) for record in records}) > 1:
        notes.append("Longer-wins differs, so not all saw the same pairs: compare each accuracy with its own only.")
    return Table(["row", "seed", "config_hash", "pairs", *REWARD], lines, 3, notes)


def on_policy_table(records: list[dict]) -> Table:
    """A line a run of one method: the KL at its end, and each number that it has from before and after training."""
    sides = [record.get(side) or {} for record in records for side in ("before", "after")]
    keys = list(dict.fromkeys(key for side in sides for key, value in side.items() if finite(value) is not None))
    lines, notes = [], ["before → after: the run's own figures, without a standard error. KL: mean of its last tenth."]
    for record in records:
        curve = at(record, "curves", "kl") or [None]
        last = curve[-math.ceil(len(curve) / 10) :]
        kl = None if None in map(finite, last) else statistics.fmean(last)
        both = [[number(at(record, side, key)) for side in ("before", "after")] for key in keys]
        changes = ["–" if a == b == "–" else f"{a} → {b}" for a, b in both]
        lines.append([record["label"], number(record.get("updates")), number(kl), *changes])
        models = {"rewarded": record.get("reward_model"), "watched": record.get("watch_model")}
        said = [f"{verb} by {at(m, 'name')} ({at(m, 'config_hash')})" for verb, m in models.items() if m]
        notes += [f"{record['label']}: {', '.join(said)}."] * bool(said) + [record["note"]] * bool(record["note"])
    return Table(["row", "updates", "KL at\nthe end", *keys], lines, 1, notes)


def records_report(records: dict[str, list[dict]], rows: list[dict]) -> list[str | Table]:
    blocks = ["## Reward models", reward_table(records["rm"]), *map(against_length, records["rm"])]
    for method in ("ppo", "grpo"):
        if records[method]:
            blocks += [f"## On-policy runs: {method.upper()}", on_policy_table(records[method])]
    if records["judge"]:
        blocks += ["## Judged win rates", judge_table(records["judge"], rows)]
    for record in records["guardrails"]:
        blocks += ["## Held-out answers", guardrails_table(record, rows)]
    plots = [record["plot"] for found in records.values() for record in found if record["plot"]]
    return blocks + ["Plots: " + ", ".join(f"[{plot}]({plot})" for plot in plots)] * bool(plots)


# ------------------------------------------------------------------ judge, guardrails, speed


def share_interval(point: object, ends: object) -> str:
    """`61.5 [54.8, 68.0]` of shares."""
    ends = [number(end, 1, 100) for end in (ends if isinstance(ends, list) else [])]
    return number(point, 1, 100) + f" [{', '.join(ends)}]" * bool(ends)


def win_rate_cell(record: dict) -> str:
    return share_interval(at(record, "summary", "win_rate"), at(record, "summary", "win_rate_ci95"))


def judged_label(row: dict, rows: list[dict]) -> str:
    """The row's name, with the adapter's hash where no row of that name and adapter is in the tables."""
    known = [r["adapter_sha256"] for r in rows if r["name"] == row.get("name")]
    other = known and row.get("adapter_sha256") not in known
    return str(row.get("name")) + f"@{(row.get('adapter_sha256') or 'none')[:8]}" * bool(other)


def judge_table(records: list[dict], rows: list[dict]) -> Table:
    lines, notes = [], [
        "Held-out prompts, each judged in both orders: a disagreement is a tie, a tie is half a win. Win rate in % "
        "with the bootstrap's 95 % interval over prompts; length-controlled: by a logistic fit, at equal lengths. "
        "Inconsistent: the share of prompts with two different answers on which the two orders disagree; a reward "
        "model, which scores each answer by itself, knows none. Unparsable: verdicts, two a prompt; a prompt with one "
        "of them is a tie, one with two is left out. Circular: the judge has trained one of the two, or is one; its "
        "figure shows over-optimisation, not quality."
    ]  # fmt: skip
    asked = [[record.get("prompts_fingerprint"), record.get("sampling")] for record in records]
    if any(one != asked[0] for one in asked):
        notes.append("Not all were asked alike: other prompts, or another sampling. Not every line compares with every other.")
    for record in records:
        a, b = (judged_label(at(record, "rows", side) or {"name": record.get(side)}, rows) for side in "ab")
        s, judge = record.get("summary") or {}, record.get("judge") or {}
        name = f"{judge.get('model') or '–'} ({judge.get('kind') or '–'})" + "\ncircular" * bool(judge.get("circular"))
        counts = " / ".join(number(s.get(key)) for key in ("wins", "ties", "losses"))
        controlled = share_interval(s.get("length_controlled_win_rate"), s.get("length_controlled_ci95"))
        tokens = " / ".join(number(s.get(key), 0) for key in ("mean_tokens_a", "mean_tokens_b"))
        shares = [number(s.get("position_inconsistency"), 1, 100), number(s.get("unparsable_verdicts"))]
        who, rate = f"{a} against {b}" + "‡" * bool(record["note"]), win_rate_cell(record)
        lines.append([who, name, number(s.get("n")), counts, rate, controlled, *shares, tokens])
        if judge.get("circular"):
            notes.append(f"{a} against {b}: circular, {judge.get('circular_why') or 'no reason given'}.")
        notes += [record["note"]] * bool(record["note"])
    header = ["rows", "judge", "prompts", "won / tied\n/ lost", "win rate, %", "length-\ncontrolled, %",
              "inconsistent,\n%", "unparsable\nverdicts", "mean tokens"]  # fmt: skip
    return Table(header, lines, 2, notes)


def guardrails_table(record: dict, rows: list[dict]) -> Table:
    """How each row answers the held-out prompts, and how far it moved from SFT."""
    lines, bound, reference = [], False, at(record, "reference", "name") or "SFT"
    for row in record.get("rows") or []:
        tokens = number(row.get("tokens_mean"), 0) + f" ± {number(row.get('tokens_sd'), 0)}"
        cells = [number(row.get(key), decimals, scale) for key, scale, decimals in GUARDRAILS.values()]
        kl = number(row.get("kl_sft"), 2)
        if row.get("kl_sft_bound"):
            kl, bound = f"≤ {kl}", True
        elif finite(row.get("kl_sft_se")) is not None:
            kl += f" ± {number(row['kl_sft_se'], 2)}"
        lines.append([judged_label(row, rows), tokens, *cells, kl, number(row.get("delta_w"), 2, 100)])
    notes = [
        "Tokens: mean ± sd of an answer. Distinct-n: share of an answer's runs of n tokens that are different, mean "
        "over answers. Longest repeat: tokens of the longest span that an answer says twice. KL: nats an answer, of "
        f"the row to {reference} along its own answers, "
        "± standard error. ‖ΔW‖ / ‖W‖: size of the adapter beside the weights it changes, against the base."
    ]
    notes += ["≤: best of N, for which log N − (N − 1) / N bounds the KL."] * bound
    notes += [record["note"]] * bool(record["note"])
    return Table(["row", "tokens", *GUARDRAILS, f"KL to {reference}", "‖ΔW‖ / ‖W‖,\n%"], lines, 1, notes)


def settings_of(case: dict) -> str:
    """A benchmark case's settings in a few words: what isn't the default."""
    found = case.get("settings")
    if isinstance(found, dict):
        known = ("script", "shape", "device", "torch")  # from the file and the workload
        found = ", ".join(f"{k}={v}" for k, v in found.items() if k not in known and v not in (None, ""))
    return str(found or "default")


def bench_tables(results: Path) -> list[str | Table]:
    """bench/*.json: a table a file, its workloads one after the other, ours first."""
    blocks = []
    for path in sorted((results / "bench").glob("*.json")):
        record, lines = read_json(path), []
        cases = [case for case in record.get("cases") or [] if isinstance(case, dict)]
        for workload in dict.fromkeys(case.get("workload") for case in cases):
            of = [case for case in cases if case.get("workload") == workload]
            speeds = [finite(case.get("tokens_per_s")) or 0 for case in of if case.get("system") == "rungs"]
            ours = max(speeds, default=0)
            for case in sorted(of, key=lambda case: case.get("system") != "rungs"):
                speed = finite(case.get("tokens_per_s"))
                ratio = f"{ours / speed:.2f}×" if ours and speed and case["system"] != "rungs" else ""
                about = [str(case.get("workload") or "–"), str(case.get("system") or "–"), settings_of(case)]
                figures = [number(speed, 0), ratio, number(case.get("peak_gib"), 1), number(case.get("mfu"), 1, 100)]
                lines.append(about + figures)
        header = ["workload", "system", "settings", "tokens/s", "rungs is", "peak GiB", "MFU, %"]
        notes = ["rungs is: the tokens/s of rungs on one GPU over those of the line. MFU is of one GPU."]
        notes += [f"{case['workload']}, {case['system']}: {case['note']}" for case in cases if case.get("note")]
        blocks += [f"## Speed: {record.get('device') or path.stem}", Table(header, lines, 3, notes)]
    return blocks


# ------------------------------------------------------------------ plots

# One file for light and dark: transparent, in tones of contrast 4:1 or more against white and against #0d1117.
INK = "#76808a"
COLOURS = {"sft": "#8a7a3c", "dpo": "#3b82c4", "ppo": "#c4652a", "grpo": "#2a8a5e", "kto": "#9a60cc"}
STYLE = {
    "svg.hashsalt": "rungs", "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "grid.alpha": 0.3, "lines.linewidth": 1.6,
    **dict.fromkeys("text.color axes.edgecolor axes.labelcolor xtick.color ytick.color grid.color".split(), INK),
}  # fmt: skip


def colour(row: dict) -> str:
    return COLOURS.get(row.get("method") or "", INK)


def forest(compared: list[Comparison]) -> Figure | None:
    """A panel a benchmark, a line a row: the difference to base and its interval; filled where Holm calls it clear."""
    shown = [c for c in compared if any(change.interval for change in c.changes.values())]
    if not shown:
        return None
    figure = Figure(figsize=(11, 1.1 + 0.36 * len(shown)), layout="constrained")
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for axis, column in zip(axes, METRICS):
        axis.axvline(0, color=INK, linewidth=1)
        if column.startswith(("MMLU", "TruthfulQA")):
            axis.axvline(CATASTROPHIC, color=INK, linewidth=1, linestyle=":")
        for y, c in enumerate(shown):
            if interval := c.changes[column].interval:
                change, tone = c.changes[column], colour(c.row)
                axis.plot(np.round(interval, 3), [y, y], color=tone, solid_capstyle="butt")
                axis.plot(round(change.points, 3), y, "o", color=tone, markerfacecolor=tone if change.clear else "none")
        axis.set_title(column.replace("\n", " "))
        axis.grid(axis="x")
        axis.tick_params(left=False)
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(range(len(shown)), [c.label for c in shown])
    axes[0].set_ylim(len(shown) - 0.5, -0.5)
    figure.supxlabel("points against base; filled: p < 0.05 after Holm; dotted: catastrophic below", fontsize=10)
    return figure


def tradeoff(compared: list[Comparison]) -> Figure | None:
    """A point a row: the gain on IFEval beside the worse of MMLU and TruthfulQA, each with its interval."""
    points = []
    for c in compared:
        gain = c.changes["IFEval\nprompt"]
        losses = [c.changes[k] for k in ("MMLU", "TruthfulQA\nMC2") if c.changes[k].interval]
        if gain.interval and len(losses) == 2:
            points.append((c, gain, min(losses, key=lambda change: change.points)))
    if not points:
        return None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color=INK, linewidth=1)
    axis.axhline(0, color=INK, linewidth=1)
    axis.axhline(CATASTROPHIC, color=INK, linewidth=1, linestyle=":")
    axis.margins(x=0.12)
    for c, gain, loss in points:
        tone, (x, y) = colour(c.row), (round(gain.points, 3), round(loss.points, 3))
        axis.plot(np.round(gain.interval, 3), [y, y], color=tone, alpha=0.6)
        axis.plot([x, x], np.round(loss.interval, 3), color=tone, alpha=0.6)
        axis.plot(x, y, "o", color=tone)
        others = [(math.dist((x, y), (g.points, b.points)), b.points) for o, g, b in points if o is not c]
        above = loss.points >= min(others, default=(0, -math.inf))[1]  # its name, away from the nearest point
        axis.annotate(c.label, (x, y), (5, 5 if above else -13), textcoords="offset points", color=tone)
    axis.set_xlabel("IFEval by prompt, points against base")
    axis.set_ylabel("worse of MMLU and TruthfulQA,\npoints against base")
    axis.grid()
    return figure


def winrate_kl(judge: list[dict], guardrails: list[dict]) -> Figure | None:
    """A point a judged row: how often it beats SFT, and how far from SFT it went for that, along the very answers that
    were judged; hollow: circular judge. None for records of another climb."""

    def key(record: dict, row: dict, reference: object) -> str:
        return sha256_json([row.get("name"), row.get("adapter_sha256"), reference, record.get("prompts_fingerprint"),
                            record.get("sampling")])

    moved = {key(record, row, at(record, "reference", "adapter_sha256")): row for record in guardrails
             for row in record.get("rows") or [] if not record["note"]}
    points = []
    for record in judge:
        place = moved.get(key(record, at(record, "rows", "a") or {}, at(record, "rows", "b", "adapter_sha256"))) or {}
        ends = at(record, "summary", "win_rate_ci95") or [None]
        if None not in map(finite, (place.get("kl_sft"), at(record, "summary", "win_rate"), *ends)):
            points.append((record, place, [100 * end for end in ends]))
    if not points:
        return None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.axhline(50, color=INK, linewidth=1)
    axis.margins(x=0.12)
    judges = {at(record, "judge", "model") for record, _, _ in points}
    for record, place, ends in points:
        method = next((k for k in COLOURS if k in str(place.get("name"))), "")
        tone, x, y = colour({"method": method}), place["kl_sft"], 100 * record["summary"]["win_rate"]
        axis.plot([x, x], ends, color=tone)
        axis.plot(x, y, "o", color=tone, markerfacecolor="none" if at(record, "judge", "circular") else tone)
        label = str(place["name"]) + f", by {Path(record['judge']['model']).name}" * (len(judges) > 1)
        axis.annotate(label, (x, y), (6, 4), textcoords="offset points", color=tone)
    marks = ["best of N: its bound"] * any(place.get("kl_sft_bound") for _, place, _ in points)
    marks += ["hollow: circular judge"] * any(at(record, "judge", "circular") for record, _, _ in points)
    axis.set_xlabel("KL to SFT, nats an answer" + f" ({'; '.join(marks)})" * bool(marks))
    axis.set_ylabel("win rate against SFT, %")
    axis.grid()
    return figure


def smooth(values: list[float | None]) -> np.ndarray:
    """Mean over a twentieth of the steps around each, of those that have a value."""
    found, half = np.array([np.nan if finite(v) is None else v for v in values], float), max(1, len(values) // 40)
    windows = [found[max(0, i - half) : i + half + 1] for i in range(len(found))]
    return np.array([np.nan if np.isnan(w).all() else np.nanmean(w) for w in windows])


def draw_curve(axis, steps: list[float], values: list, tone: str, label: str = "", style: str = "-") -> None:
    """The values, faint, under their running mean. Few points, measured only now and then, are joined as they are."""
    points = [(x, y) for x, y in zip(steps, values) if finite(y) is not None]
    if 2 * len(points) < len(values):
        axis.plot(*zip(*points), style, color=tone, marker=".", label=label)
    elif points:
        axis.plot(steps, [np.nan if finite(v) is None else v for v in values], color=tone, alpha=0.3, linewidth=1)
        axis.plot(steps, smooth(values), style, color=tone, label=label)


def on_policy(records: list[dict]) -> Figure | None:
    """Reward, KL and length of the on-policy runs of a method over their updates."""
    records = [record for record in records if at(record, "curves", "kl")]
    if not records:
        return None
    figure = Figure(figsize=(11, 3), layout="constrained")
    axes, tones = figure.subplots(1, 3), list(COLOURS.values())[1:] + [INK]
    for i, record in enumerate(records):
        tone, curves = tones[i % len(tones)], record["curves"]
        reward = "scores" if "scores" in curves else "rewards"
        for axis, key in zip(axes, (reward, "kl", "completion_tokens")):
            values = curves.get(key) or []
            draw_curve(axis, list(range(len(values))), values, tone, record["label"])
        if watched := curves.get("watch_scores"):
            draw_curve(axes[0], list(range(len(watched))), watched, tone, f"{record['label']}, watched", "--")
    for axis, title in zip(axes, ("reward, mean of a batch", "KL to the reference, nats", "tokens of an answer")):
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid()
    axes[0].legend(fontsize=9)
    return figure


def run_curves(record: dict) -> Figure | None:
    """Small multiples of what a run logged."""
    curves = dict(record.get("curves") or {})
    steps = curves.pop("step", None)
    keys = [key for key, values in curves.items() if key not in UNDRAWN and len({*values} - {None}) > 1]
    if not steps or not keys:
        return None
    columns = min(4, len(keys))
    height = -(-len(keys) // columns)
    figure = Figure(figsize=(2.9 * columns, 2 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).flat
    for axis, key in zip(axes, keys):
        draw_curve(axis, steps, curves[key], colour(record))
        axis.set_title(key)
        axis.grid()
    for axis in axes[len(keys) :]:
        axis.set_axis_off()
    return figure


def draw(compared: dict, records: dict[str, list[dict]], runs: dict[str, list[dict]]) -> dict[str, Figure]:
    """{name under plots/: figure}, of those that have data."""
    figures = {f"deltas-{protocol}": forest(rows) for (protocol, to), (rows, _) in compared.items() if to == "base"}
    figures["tradeoff"] = tradeoff(compared.get(("plain", "base"), ([], []))[0])
    figures["winrate-kl"] = winrate_kl(records["judge"], records["guardrails"])
    figures |= {method: on_policy(records[method]) for method in ("ppo", "grpo")}
    for label, rows in runs.items():
        found = [record for record in records["runs"] if same_policy(record, rows[0])]
        figures[f"run-{label}"] = run_curves(found[0]) if found else None
    return {name: figure for name, figure in figures.items() if figure}


def encode(figure: Figure, kind: str) -> bytes:
    """The bytes of an SVG (the same for the same figure, so that --check can compare) or a PNG."""
    out = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(out, format=kind, dpi=150, transparent=True, metadata=metadata)
    figure.set_layout_engine("none")  # the next kind keeps this one's layout
    return out.getvalue()


# ------------------------------------------------------------------ the report


def describe(rows: list[dict]) -> list[str]:
    """What all rows of a table have in common; before it a warning when they saw too few items."""
    row, ev = rows[0], rows[0]["eval"]
    items = {task: row["n"][task] for row in rows for task, _, _ in METRICS.values() if task in row["n"]}
    fewest = min(items.values(), default=0)
    lines = []
    if fewest and (row.get("limit") or fewest < SMALL):
        # se of a mean of n 0/1 items near one half: sqrt(p (1 - p) / n) with p = 1/2
        stderr = 100 * math.sqrt(0.25 / fewest)
        lines.append(
            f"**Trial, not a result: {', '.join(f'{task} {n:,}' for task, n in items.items())} items.** A score near "
            f"50 % on {fewest:,} items has a standard error of {stderr:.1f} points; differences of that size mean "
            "nothing."
        )
    model = f"Model `{row['model']}`" + f" at `{row['revision']}`" * bool(row["revision"])
    if "instruct" in row["model"].lower():
        model += " (an Instruct model: its base row has been tuned before)"
    limits = [f"{task} {limit:,}" + " a subject" * (task == "mmlu") for task, _, limit in ev["tasks"] if limit]
    tokens = f", at most {ev['max_gen_toks']} generated tokens" if ev["max_gen_toks"] else ""
    lines.append(
        f"{model}. Limits: {', '.join(limits) or 'none'}{tokens}. Base in {ev['dtype']}, quantisation "
        f"{ev['quantization']}, adapter {'merged' if ev['adapter_merged'] else 'unmerged'}. "
        f"Evaluation data `{ev['data'][:16]}`, train_invariants `{row['train_invariants']}`, eval_hash `{row['eval_hash']}`."
    )
    return lines


def full_report(tables: dict[str, list[dict]], compared: dict, records: dict[str, list[dict]], plots: list[str],
                pages: list[str]) -> list[str | Table]:
    """Blocks of text and tables, for results/README.md and the terminal, without the speed and the legend."""
    blocks, rows = ["# Results"], [row for table in tables.values() for row in table]
    for protocol, table in tables.items():
        blocks += [f"## {protocol.capitalize()} protocol: {PROTOCOLS.get(protocol, '')}", *describe(table)]
        blocks += ["### Current state, %", scores_table(table)]
        for method, title in (("base", "base"), ("sft", "SFT")):
            if found := delta_table(*compared[protocol, method]):
                blocks += [f"### Change against {title}, points", found]
        blocks += [image(f"plots/deltas-{protocol}", plots)]
        if protocol == "plain" and (found := verdict_table(compared[protocol, "base"][0], table, records["judge"])):
            blocks += ["### Verdicts", found, VERDICTS, image("plots/tradeoff", plots)]
        if found := answers_table(table):
            blocks += ["### Answers in the benchmarks", found]
        if found := seeds_table(table):
            blocks += ["### Seeds", found]
    if not tables:
        blocks.append(scores_table([]))
    if found := protocols_table(tables):
        blocks += ["## Both protocols, %", found]
    blocks += records_report(records, rows)
    blocks += [image(f"plots/{name}", plots) for name in ("winrate-kl", "ppo", "grpo")]
    if found := training_table(rows):
        blocks += ["## Training and what it took", found]
    if pages:
        blocks.append("Runs: " + ", ".join(f"[{label}](runs/{label}.md)" for label in pages))
    return [block for block in blocks if block]


def compact_report(tables: dict[str, list[dict]], compared: dict, records: dict[str, list[dict]], plots: list[str],
                   place: str) -> list[str | Table]:
    """README.md's section: the current state with each difference to base and the verdict, win rates, reward models."""
    blocks, everything = [], [row for table in tables.values() for row in table]
    for protocol, rows in tables.items():
        blocks.append(f"**{protocol.capitalize()} protocol**, % (difference to base, points)")
        blocks += [scores_table(rows, compared[protocol, "base"][0], verdicts=protocol == "plain")]
        texts = (image(f"{place}/plots/deltas-{protocol}", plots), empty_note(rows), *describe(rows))
        blocks += [text for text in texts if text]
    blocks = blocks or [scores_table([])]
    by_judge = {}
    for record in records["judge"]:
        if not record["note"] and not at(record, "judge", "circular"):
            who = f"{at(record, 'judge', 'model')}" + " in both orders" * (at(record, "judge", "kind") != "reward")
            by_judge.setdefault((who, record.get("b")), []).append(record)
    for (who, b), found in by_judge.items():
        rates = [f"{judged_label(record['rows']['a'], everything)} {win_rate_cell(record)}" for record in found]
        blocks.append(f"**Win rate** against {b}, judged by {who}, %: {', '.join(rates)}.")
    rewards = [against_length(record) for record in records["rm"] if not record["note"]] or ["rm_v1: planned."]
    return blocks + [f"**Reward model** {text}" for text in rewards]


def image(stem: str, plots: list[str]) -> str:
    """The plot by its path, if it is there: the SVG, which opens sharp at any size."""
    return f"![{PLOTS.get(Path(stem).name, 'Curves of the run')}]({stem}.svg)" if Path(stem).name in plots else ""


def policies(tables: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """{label: its rows, one a protocol} of each trained policy: the runs that get a page."""
    found = {}
    for rows in tables.values():
        for row in rows:
            if row["adapter_sha256"]:
                found.setdefault(tuple(row[key] for key in ROW_ID), []).append(row)
    labels = [label.rstrip("†") for label, _ in label_rows([rows[0] for rows in found.values()])]
    return dict(zip(labels, found.values()))


def page(label: str, rows: list[dict], tables: dict, compared: dict, records: dict, plots: list[str]) -> list:
    """A run's page, blocks of text and tables: verdict, command, result, training, data, configuration."""
    row, everything = rows[0], [r for table in tables.values() for r in table]
    run = next((r for r in records["runs"] if same_policy(r, row)), {})
    blocks = [f"# {label}", f"`{row['method']}`, phase {row['phase']}, seed {row['seed']}. [All results](../README.md)"]
    for c in compared.get(("plain", "base"), ([], []))[0]:
        if any(c.row is r for r in rows):
            word, why = verdict(c.changes, reran(c.row, tables["plain"]))
            blocks.append(f"**Verdict: {word}** ({why}).")
            if row["method"] == "dpo":
                own = own_criterion(row, tables["plain"], records["judge"]).replace("\n", "; ")
                blocks.append(f"Own criterion: {own}.")
    blocks += ["## Command", command_of(run), "## Result"]
    for r in rows:
        lines = [[column.replace("\n", " "), score_cell(*score(r, column))] for column in METRICS]
        header = ["benchmark", f"{r['protocol']}, %"]
        for method in ("base", "sft"):
            for c in compared[r["protocol"], method][0]:
                if c.row is r:
                    header.append(f"− {c.reference}")
                    lines = [[*line, change_cell(c.changes[k])] for line, k in zip(lines, METRICS)]
        blocks.append(Table(header, lines))
    if judged := [record for record in records["judge"] if same_policy(at(record, "rows", "a") or {}, row)]:
        blocks += ["## Judged", judge_table(judged, everything)]
    for record in records["guardrails"]:
        if own := [r for r in record.get("rows") or [] if same_policy(r, row)]:
            blocks += ["## Held-out answers", guardrails_table(record | {"rows": own}, everything)]
    curves = image(f"../plots/run-{label}", plots)
    blocks += ["## Training", training_table([row]) or "Not recorded with this run.", curves]
    parents = [row.get("parent"), *(run.get("scorers") or {}).values()]
    data = [[role, f"`{value}`"] for role, value in (row.get("data") or {}).items()]
    data += [[f"{p.get('method') or 'parent'} {p.get('name')}", f"`{p.get('config_hash')}`"] for p in parents if p]
    blocks += ["## Data and lineage", Table(["", "fingerprint"], data + hashes_of(row), 2), *configuration(run)]
    if run:
        about = {"git commit": run.get("git_commit"), **(run.get("hardware") or {}), **(run.get("versions") or {})}
        blocks.append("; ".join(f"{key} {value}" for key, value in about.items()) + ".")
    return [block for block in [*blocks, LEGEND] if block]


def reward_page(record: dict) -> list[str | Table]:
    """The page of a reward model."""
    data = [[role, f"`{value}`"] for role, value in (record.get("data") or {}).items()]
    plot = f"![Held-out figures](../{record['plot']})" if record["plot"] else ""
    blocks = [f"# {record['label']}", f"`reward`, seed {record.get('seed')}. [All results](../README.md)"]
    blocks += ["## Command", command_of(record), "## Result", reward_table([record]), against_length(record), plot]
    blocks += ["## Data and lineage", Table(["", "fingerprint"], data + hashes_of(record), 2), *configuration(record)]
    return [block for block in blocks if block]


def command_of(run: dict) -> str:
    return f"```bash\npython {run['command']}\n```" if run.get("command") else "Not recorded with this run."


def hashes_of(run: dict) -> list[list[str]]:
    return [[key, f"`{run.get(key)}`"] for key in ("train_invariants", "config_hash", "family", "adapter_sha256")]


def configuration(run: dict) -> list[str | Table]:
    settings = [[key, f"`{json.dumps(value, ensure_ascii=False)}`"] for key, value in (run.get("args") or {}).items()]
    return ["## Configuration", Table(["argument", "value"], settings, 2)] if settings else []


def same_policy(a: dict, b: dict) -> bool:
    return all(a.get(key) == b.get(key) for key in ("name", "adapter_sha256"))


def markdown(blocks: list[str | Table]) -> str:
    return "\n\n".join(block if isinstance(block, str) else block.markdown() for block in blocks) + "\n"


def show(blocks: list[str | Table]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # a log: rich would fold the tables at 80 columns
        console = Console(highlight=False, width=140)
    for block in blocks:
        if isinstance(block, Table):
            block.show(console)
        elif not block.startswith("!["):
            style = "bold" if block.startswith("#") else "bold yellow" if block.startswith("**Trial") else "dim"
            text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", block)  # a link's text
            console.print(Text("\n" + re.sub(r"\*\*|`|^#+ ", "", text), style=style))


def with_section(readme: Path, section: str) -> str:
    """The text of `readme` with the lines between its two markers replaced."""
    if not readme.is_file():
        fail(f"no such file: {readme}; --readme names the file with the results section, --readme none does without")
    lines = readme.read_text(encoding="utf-8").splitlines(keepends=True)
    marks = [i for i, line in enumerate(lines) if line.strip() in (BEGIN, END)]
    if [lines[i].strip() for i in marks] != [BEGIN, END]:
        fail(f"{readme} needs one line {BEGIN} and, below it, one line {END}; the results go between them")
    return "".join([*lines[: marks[0] + 1], section, *lines[marks[1] :]])


def generated(results: Path) -> list[Path]:
    """The pages and plots that a report has written, now or before; what else lies beside them is not ours."""
    pages = [path for path in results.glob("runs/*.md") if path.read_bytes().startswith(STAMP.encode())]
    plots = [path for kind in ("svg", "png") for path in results.glob(f"plots/*.{kind}")]
    return pages + [path for path in plots if path.stem in PLOTS or path.stem.startswith("run-")]


def main(args: Args) -> None:
    # 1. The rows, and whether they may stand together.
    results = Path(args.results)
    if not results.is_dir():
        fail(f"no such directory: {results}; --results names the one that holds metrics.json")
    tables = tables_of(read_rows(results / "metrics.json"), args.group, results / "metrics.json")
    rows = [row for table in tables.values() for row in table]
    records = read_records(results, rows, args.group)
    for row in rows:
        row["items"] = read_items(results, row)
    compared = {(name, to): comparisons(table, to) for name, table in tables.items() for to in ("base", "sft")}

    # 2. The plots, and the files as they should read.
    runs = policies(tables)
    with rc_context(STYLE):
        figures = draw(compared, records, runs)
        files = {results / "plots" / f"{name}.svg": encode(figure, "svg") for name, figure in figures.items()}
        pictures = {results / "plots" / f"{name}.png": figure for name, figure in figures.items() if name in PLOTS}
        if not args.check:  # a PNG's bytes depend on the machine: that it is there is all that is checked
            files |= {path: encode(figure, "png") for path, figure in pictures.items()}
    flags = {"--results": args.results, "--readme": args.readme, "--group": " ".join(args.group)}
    defaults = {"--results": Args.results, "--readme": Args.readme, "--group": ""}
    given = [f"{flag} {value}" for flag, value in flags.items() if value and value != defaults[flag]]
    command = " ".join(["python report.py", *given])
    stamp, speed, plots = f"{STAMP}{command}`; edits are lost -->\n\n", bench_tables(results), list(figures)
    own_rewards = [record for record in records["rm"] if not record["note"] and record["name"] not in runs]
    pages = [*runs, *(record["name"] for record in own_rewards)]
    full = [*full_report(tables, compared, records, plots, pages), LEGEND, *speed]
    texts = {results / "README.md": stamp + markdown(full)}
    for label, own in runs.items():
        texts[results / "runs" / f"{label}.md"] = stamp + markdown(page(label, own, tables, compared, records, plots))
    for record in own_rewards:
        texts[results / "runs" / f"{record['name']}.md"] = stamp + markdown(reward_page(record))
    chosen = args.readme or ("README.md" if results == Path(Args.results) else "none")
    if chosen != "none":
        readme = Path(chosen)
        place = Path(os.path.relpath(results, readme.parent)).as_posix()
        compact = [*compact_report(tables, compared, records, plots, place), LEGEND, *speed]
        texts[readme] = with_section(readme, stamp + markdown(compact) + "\n")
    names = [str(path) for path in texts if path.parent != results / "runs"]
    names += [f"pages of {len(pages)} runs"] * bool(pages) + [f"plots: {len(figures)}"] * bool(figures)
    files |= {path: text.encode() for path, text in texts.items()}
    leftover = sorted(set(generated(results)) - set(files) - set(pictures))  # of rows that are no longer there

    # 3. Compare, or show and write.
    if not args.check:
        show(full)
        for path, content in files.items():
            write_atomic(path, lambda p: p.write_bytes(content))
        for path in leftover:
            path.unlink()
        print(f"\nwrote {' and '.join(names)}")
        return
    stale = [str(path) for path in sorted(pictures) if not path.is_file()] + list(map(str, leftover))
    for path, content in files.items():
        found = path.read_bytes() if path.is_file() else b""
        if found != content:
            stale.append(str(path))
        if found != content and path.suffix == ".md":
            before, after = (text.decode(errors="replace").splitlines() for text in (found, content))
            diff = difflib.unified_diff(before, after, str(path), "the results say", lineterm="")
            print("\n".join(diff), file=sys.stderr)
    if stale:
        print(f"{' and '.join(stale)}: not what the results say; run {command}", file=sys.stderr)
        raise SystemExit(1)
    print(f"{' and '.join(names)}: as the results say")


if __name__ == "__main__":
    main(tyro.cli(Args))
