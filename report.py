"""report.py: what results/ holds -> the tables, verdicts and plots that compare the rows.

It answers three questions, in this order, for every method:
    1. Did it learn what it optimises?  Its own objective on held-out data, before -> after.
    2. What did it change?              Paired differences on the benchmarks: to the policy that it started from,
                                        its own parent, and to the base.
    3. Is it a win?                     The verdict, against base.
Tests, intervals and the rules of the verdict are in verdicts.py, the figures in plots.py.

1. A table is about one train_invariants, one protocol (plain, chat) and one eval_hash. Where a results file holds
   several of them, each train_invariants has a part of its own, whose beginning says in what it differs from the first;
   README.md is about the first (--first HASH). Rows of one eval_hash whose items (doc_id, doc_hash) differ are refused.
2. A row's own parent is the one that the row names, by the hash of its adapter; without one it is the base. Where the
   parent has no row the difference is left out, and a note says so.
3. The same config_hash with another adapter hash is a run that did not reproduce: both rows stay, the later marked †.
4. What is missing is shown as missing, never as zero: a row as "planned", a score as "–", a standard error as "?".
5. A reward model scores answers and has no benchmark row: its own table comes from rm/*.json, beside the baseline "the
   longer answer wins". What PPO and GRPO say of themselves comes from ppo/*.json and grpo/*.json, what a judge says of
   held-out answers from judge/*/summaries, README.md's line on speed from bench/*.json. A record whose
   train_invariants no row has is listed with ‡ and both hashes, and left out where --group names theirs.

    python report.py            print what was learned and the verdicts; write results/README.md, a page per run in
                                results/runs/, the plots in results/plots/, and README.md between its two markers
    python report.py --full     print every table
    python report.py --check    write nothing; exit 1 with a diff when a file disagrees with the results
"""

import difflib
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
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from common import SCHEMA_VERSION, fail, read_json, say_next, write_atomic
from plots import PLOTS, STYLE, draw, encode, overview, speedrun, sweep_curves
from verdicts import (ALPHA, LADDER, METRICS, ROW_ID, Change, Comparison, Paired, Verdict, at, climbs_of, compare,
                      comparisons, differences, endpoint_protocols, finite, is_at_floor, is_instruct, label_group,
                      label_rows, paired_over_items, paired_over_seeds, read_items, read_rows, reference_of, rung,
                      same_policy, score, seed_groups, signed, title_of, verdicts_of, with_holm)


@dataclass(frozen=True)
class Args:
    results: str = "results"
    """Directory that holds metrics.json and the records beside it; the full tables go to README.md inside it."""
    readme: str | None = None
    """File whose section between the two results markers gets the compact table; "none": no such file. By default
    README.md for the directory results, and none for another."""
    group: tuple[str, ...] = ()
    """Report only rows of these train_invariants and eval_hashes; a kind of hash that isn't named is not restricted."""
    first: str = ""
    """The train_invariants or eval_hash of the rows that come first and make README.md's table; by default those with
    most rows, of several the newest."""
    full: bool = False
    """Print every table, not only what was learned and the verdicts."""
    check: bool = False
    """Write nothing; exit 1 and print a diff when a generated file disagrees with the results."""


COST = {  # of a training run: key -> column title
    "judge_eos_rate": "EOS rate,\njudge's\nprompts, %", "tokens": "tokens", "minutes": "minutes",
    "gpu_minutes": "GPU\nminutes", "peak_gib": "peak\nGiB", "device": "device",
}  # fmt: skip
# What each method optimises, held out: (objective, before: a key or what holds by construction, after, key of n, scale,
# 1: higher is better, -1: lower). With policy = reference every margin is 0, and a tie counts half. The run records
# <after>_interval and, where before was measured too, <objective>_change_interval.
OBJECTIVES = {
    "sft": [("held-out loss, nats per token", "heldout_loss_base", "heldout_loss", None, 1, -1)],
    "dpo": [("held-out pairs on the right side, %", 0.5, "heldout_accuracy", "heldout_pairs", 100, 1),
            ("held-out margin", 0.0, "heldout_margin", "heldout_pairs", 1, 1),
            ("held-out loss", math.log(2), "heldout_loss", "heldout_pairs", 1, -1)],
    "ppo": [("score on fixed prompts", "scores_before", "scores_after", "fixed_prompts", 1, 1),
            ("watch model's score on them", "watch_scores_before", "watch_scores_after", "fixed_prompts", 1, 1)],
    "grpo": [("held-out pass@1, strict, %", "pass_1_before", "pass_1_after", "heldout_problems", 100, 1),
             ("held-out pass@1, flexible, %", "flexible_1_before", "flexible_1_after", "heldout_problems", 100, 1),
             ("held-out pass@k, %", "pass_k_before", "pass_k_after", "heldout_problems", 100, 1)],
    "kto": [("held-out AUC, %", 0.5, "heldout_auc", "heldout_rows", 100, 1),
            ("held-out rows on the right side, %", 0.5, "heldout_accuracy", "heldout_rows", 100, 1)],
}  # fmt: skip
COUNTED = ("heldout_accuracy", "pass_1_after", "flexible_1_after")  # shares of n independent trials: Wilson's interval
LEARNED = (
    "Before → after, with a 95 % interval: the run's own, over conversations, prompts or problems; of an older run "
    "Wilson's, for a share of independent trials. **yes**: the interval of the change lies wholly on the better side; "
    "**worse**: on the other; not shown: it includes no change. `–`: no interval was recorded, so nothing is claimed. "
    "What stands before DPO and KTO holds by construction (the policy is its reference, a tie counts half). A reward "
    "model is compared with the better rule of length, on the same pairs, by McNemar's exact test. Of several seeds: "
    "mean ± sd, and the change's interval over seeds and items."
)
MOVED = {  # of the trained policy: key in run.json's metrics -> column title
    "kl_reference": "KL to its\nreference", "kl_floor": "floor of\nthe KL", "kl_evaluated": "trained vs\nevaluated",
    "kl_merge": "of merging\nits parent", "logprob_floor": "floor of\nlog-probs", "kl_answers": "answers",
}  # fmt: skip
MOVED_LEGEND = (
    "KL in nats per answer, exact over the vocabulary, with the 95 % interval over answers. Floor: the policy against "
    "itself in other micro-batches, which is what the precision of the measurement adds. Trained vs evaluated: to the "
    "saved adapter beside the pretrained base, which is what the benchmarks load; merging: what rounding the merged "
    "parent costs by itself. Floor of log-probs: mean |difference| per answer. Of several seeds: mean ± sd."
)
PUBLISHED = {  # by others, lm-eval without a chat template, %: the real default, and its instruct model
    "Qwen2.5-0.5B": {"MMLU": 48.1, "GSM8K\nstrict": 33.9, "TruthfulQA\nMC2": 39.9, "IFEval\nprompt": 12.4},
    "Qwen2.5-0.5B-Instruct": {"MMLU": 47.3, "GSM8K\nstrict": 34.0, "TruthfulQA\nMC2": 41.9, "IFEval\nprompt": 18.9},
}  # fmt: skip
REWARD = {  # figures of a reward model: column title -> (place in its file, scale, decimals)
    "accuracy, %": (("accuracy",), 100, 1),
    "longer-wins, %": (("longer_wins", "accuracy"), 100, 1),
    "length-\nmatched, %": (("length_matched", "accuracy"), 100, 1),
    "score–length\ncorrelation": (("score_length", "pearson"), 1, 2),
    "calibration\nerror": (("calibration_error",), 1, 3),
    "margin\nmean / sd": (("scores", "margin", "mean"), 1, 2),
}
REWARD_LEGEND = (
    "On held-out pairs, in % with Wilson's 95 % interval: accuracy, the chosen answer scores higher; longer-wins, it "
    "is the longer one; length-matched, accuracy where lengths differ by at most 10 %. Correlation is Pearson's, "
    "margin is chosen − rejected. Accuracy and baseline are compared on the same pairs by McNemar's exact test. "
    "mean ± sd is over the seeds of one family, a seed once, sd with n − 1."
)
GUARDRAILS = {  # figures of the held-out answers: column title -> (key in guardrails.json, scale, decimals)
    "n": ("n", 1, 0), "EOS, %": ("eos_rate", 100, 1), "refusals, %": ("refusal_rate", 100, 1),
    "distinct-1": ("distinct_1", 1, 3), "distinct-2": ("distinct_2", 1, 3), "distinct-3": ("distinct_3", 1, 3),
    "longest\nrepeat": ("longest_repeat_mean", 1, 1), "loops, %": ("repetition_rate", 100, 1),
    "other\nlanguage, %": ("language_drift_rate", 100, 1),
}  # fmt: skip
PROTOCOLS = {"plain": "no chat template", "chat": "chat template applied, few-shot examples as turns"}
SMALL = 200  # items; with fewer, the standard error of a score near 50 % is above 3.5 points
FEWEST = 20  # judged prompts; the bootstrap's interval of two wins in two has no width
BEGIN, END, STAMP = "<!-- results:begin -->", "<!-- results:end -->", "<!-- written by `"
LEGEND = (
    "Scores in % ± standard error; n counts items, for IFEval prompts. Differences in points, with the paired 95 % "
    "interval of that one difference in brackets; p adjusted by Holm over the family of tests, **bold** where p < "
    "0.05; `≤`: as small as the resamples can show. Descriptive columns and rows have no p. Without per-item scores: "
    "± √(se² + se²), **bold** at twice that or more. `~`: less than 2 √(se² + se²), which the two scores alone would "
    "not distinguish. `°`: at the floor, the interval includes chance; no benchmark shows forgetting there. `?`: a "
    "standard error is missing. `–`: not measured."
)
COMPACT_LEGEND = (
    "Scores in % ± standard error, of several seeds mean ± sd; in parentheses points against base, **bold** where p < "
    "0.05 after Holm, `~` where the two scores alone would not distinguish them; `°`: at chance; `–`: not measured. "
    "Intervals, changes against the own parent, judges and what each word means: [results]({}/README.md)."
)
UNPAIRED = "±: no per-item scores (evaluate.py keeps them in scores/), so no paired test and no verdict."
DETECTABLE = "smallest detectable"
VERDICTS = (
    "Up and down: p < 0.05 after Holm. Catastrophic: clearly down, and by more than 2 points. **win**: IFEval up, no "
    "catastrophic drop on MMLU or TruthfulQA. **forgetting**: IFEval up, and such a drop. **regression**: something "
    "down, nothing up. **mixed**: something else than IFEval up. **flat**: nothing up or down, and each endpoint's 90 "
    "% interval within ±2 points. **inconclusive**: nothing up or down, and a larger change remains possible. "
    "**irreproducible**: a rerun differs. **open**: a test is missing. *inherited*: the parent had every one of these "
    "drops, and the method added nothing clear to them. Smallest detectable: the true difference that one paired test "
    "at 5 %, before Holm, detects 4 times in 5. Intervals of one seed are over items; another seed may differ by more."
)

# ------------------------------------------------------------------ records


def read_records(results: Path, rows: list[dict], group: tuple[str, ...],
                 elsewhere: set[str] = frozenset()) -> dict[str, list[dict]]:
    """{"rm", "ppo", "grpo", "judge", "guardrails", "runs": what the files hold}, with a `label`, the `plot` beside the
    file ("": none), and a `note` on one whose train_invariants are not those of `rows`; without those of the
    train_invariants `elsewhere`, which have a part of their own. Fails on a newer schema."""
    records = {kind: [] for kind in ("rm", "ppo", "grpo", "judge", "guardrails", "runs")}
    climb = rows[0] if rows else None
    places = [(folder, path) for folder in ("rm", "ppo", "grpo", "runs")
              for path in sorted((results / folder).glob("*.json"))]
    places += [("guardrails", path) for path in sorted(results.glob("judge/*/guardrails.json"))]
    places += [("judge", path) for path in sorted(results.glob("judge/*/summaries/*.json"))]  # without the answers
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
        if own in elsewhere or rows and own != theirs and theirs in group:
            continue
        note = f"‡ {record['name']}: train_invariants {own}, where {climb['name']} has {theirs}; no part of this climb."
        record |= {"label": record["name"], "note": note if own != theirs else ""}
        record["plot"] = f"{folder}/{plot.name}" if plot.is_file() else ""
        records[folder].append(record)
    for found in records.values():
        names = Counter(record["name"] for record in found)
        for record in found:
            record["label"] += f"-s{record.get('seed')}" * (names[record["name"]] > 1) + "‡" * bool(record["note"])
    return {kind: sorted(found, key=lambda record: bool(record["note"])) for kind, found in records.items()}


# ------------------------------------------------------------------ cells


def score_cell(points: float | None, stderr: float | None) -> str:
    return "–" if points is None else f"{points:.1f} ± " + ("?" if stderr is None else f"{stderr:.1f}")


def floor_cell(row: dict, column: str) -> str:
    """The score of a row, marked ° where its interval includes what chance gives."""
    return score_cell(*score(row, column)) + "°" * is_at_floor(row, column)


def number(value: object, decimals: int = 3, scale: int = 1) -> str:
    if finite(value) is None:
        return "–"
    text = f"{value:,}" if isinstance(value, int) and scale == 1 else f"{scale * value:z,.{decimals}f}"
    return text.replace("-", "−")


def bracket(ends: object, decimals: int = 1, scale: int = 1) -> str:
    """`[54.8, 68.0]`, or `[?]` where no interval was recorded."""
    known = isinstance(ends, list | tuple) and None not in map(finite, ends)
    return f"[{', '.join(number(end, decimals, scale) for end in ends) if known else '?'}]"


def with_interval(point: object, ends: object, decimals: int = 1, scale: int = 1) -> str:
    """`61.5 [54.8, 68.0]`; – where there is no figure."""
    text = number(point, decimals, scale)
    return text if text == "–" else f"{text} {bracket(ends, decimals, scale)}"


def share_cell(share: object) -> str:
    """`66.2 [64.0, 68.4]`: {"accuracy", "interval"} in percent."""
    return with_interval(at(share, "accuracy"), at(share, "interval"), 1, 100)


def spread(values: list, scale: int, decimals: int) -> str:
    """Mean ± sd (n − 1) of several seeds; of one, its value."""
    if None in map(finite, values):
        return "–"
    moments = (statistics.fmean(values), statistics.stdev(values)) if len(values) > 1 else values
    return " ± ".join(number(x, decimals, scale) for x in moments)


def delta_cell(points: float | None, stderr: float | None, clear: bool | None, short: bool = False) -> str:
    """`**+5.0 ± 0.7**` beyond noise, `+0.5 ± 0.7 ~` within it, `+0.5 ± ?` not to be told; short: without the ±."""
    if points is None:
        return "–"
    text = signed(points)
    if not short:
        text += " ± " + ("?" if stderr is None else f"{stderr:.1f}")
    return {True: f"**{text}**", False: f"{text} ~", None: f"{text} ?" if short else text}[clear]


def p_cell(p: float, at_floor: bool = False) -> str:
    if at_floor:
        return f"p ≤ {math.ceil(1000 * p) / 1000:.3f}"
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def change_cell(change: Change, short: bool = False) -> str:
    """`**+5.0 [3.6, 6.4]**` and the adjusted p of a test in the family, without p where the difference is descriptive,
    and a delta_cell where there is no paired test; short: points only."""
    if change.paired is None:
        return delta_cell(change.points, change.stderr, change.apart, short)
    text = signed(change.points)
    if not short:
        text += f" {bracket(change.paired.interval)}"
    text = (f"**{text}**" if change.clear else text) + " ~" * (change.apart is False)
    return text if short or change.adjusted is None else f"{text}\n{p_cell(change.adjusted, change.paired.at_floor)}"


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
    """The last line of a table with a paired test: by column the largest effect that a row's test needs to detect
    it."""
    known = {k: [c.changes[k].paired.detectable for c in compared if c.changes[k].paired] for k in METRICS}
    cells = [number(max(filter(None, values), default=None), 1) for values in known.values()]
    return [[""] * (left - 1) + [DETECTABLE, *cells]] if any(cell != "–" for cell in cells) else []


def titles(rows: list[dict], endpoints: tuple[str, ...] = ()) -> list[str]:
    """The columns' titles with shots and items, which are the same in every row of a table; what is no endpoint is
    marked as descriptive."""
    header = []
    for column, (task, _, _) in METRICS.items():
        shots = {f"{k}-shot" for row in rows for name, k, _ in row["eval"]["tasks"] if name == task}
        items = {f"n = {row['n'][task]:,}" for row in rows if task in row["n"]}
        header.append("\n".join([column, *shots, *items, *(["descriptive"] if column not in endpoints else [])]))
    return header


def scores_table(rows: list[dict]) -> Table:
    """The current state: every rung, scored or planned."""
    rungs = [(*rung(row["phase"], row["name"]), label, row) for label, row in label_rows(rows)]
    names = {row["name"] for row in rows}
    rungs += [(*rung(phase, name), name, None) for name, phase in LADDER.items() if name not in names]
    lines = []
    for phase, _, label, row in sorted(rungs, key=lambda r: r[:2]):
        cells = [floor_cell(row, column) for column in METRICS] if row else ["planned"] + [""] * (len(METRICS) - 1)
        lines.append([str(phase), label, *cells])
    for group in seed_groups(rows):
        if len(group) > 1:
            cells = [spread([score(row, column)[0] for row in group], 1, 1) for column in METRICS]
            lines.append(["", f"{label_group(group, {})}, mean ± sd", *cells])
    return Table(["phase", "row", *titles(rows, tuple(METRICS))], lines, 2, score_notes(rows, lines))


def score_notes(rows: list[dict], lines: list[list[str]]) -> list[str]:
    notes = []
    if any("†" in line[1] for line in lines):
        notes.append("† the config_hash of the row above, another adapter: it, or its parent, did not reproduce.")
    if any(score(row, column)[1] == 0 for row in rows for column in METRICS):
        notes.append("± 0.0: every item scored alike; a difference to this score looks more certain than it is.")
    return notes


def compact_table(results: "Results") -> Table:
    """README.md's table: a line per family of the climb, without the controls. Each endpoint in the protocol that it is
    tested in, of several seeds mean ± sd, with the difference to base; the own objective; what it took; the verdict."""
    rows, tables = once(results.rows), results.tables
    labels = {id(row): label for label, row in label_rows(rows)}
    columns = {column: results.protocols[column] for column in METRICS if column in results.protocols}
    rungs, planned = [], {name: phase for name, phase in LADDER.items() if name not in {row["name"] for row in rows}}
    for group in seed_groups(rows):
        row, cells = group[0], []
        if not any(r["name"] in LADDER for r in group):
            continue
        ids = [[r[key] for key in ROW_ID] for r in group]
        for column, protocol in columns.items():
            own = [r for r in tables.get(protocol, []) if [r[key] for key in ROW_ID] in ids]
            compared = [c for c in results.compared.get((protocol, "base"), ([], []))[0] if c.row in own]
            short = change_cell(compared[0].changes[column], short=True) if compared else "–"
            cell = floor_cell(own[0], column) if own else "–"
            if len(own) > 1:
                cell = spread([score(r, column)[0] for r in own], 1, 1) + " sd"
                cell += "°" * all(is_at_floor(r, column) for r in own)
            cells.append(cell if short == "–" else f"{cell} ({short})")
        word = next((v.word for v in results.verdicts if any(same_policy(row, r) for r in v.rows)), "")
        if row["method"] != "base" and not word:
            word = "(descriptive)"
        key = f"family {row['family']}" if len(group) > 1 else row["config_hash"] or ""
        took = [minutes for r in group if (minutes := gpu_minutes(r)) is not None]
        cells += [headline(group), number(statistics.fmean(took), 1) if took else ""]
        rungs.append((*rung(row["phase"], row["name"]), [label_group(group, labels), *cells, word, key and f"`{key}`"]))
    rungs += [(*rung(phase, name), [name, "planned"] + [""] * (len(columns) + 3)) for name, phase in planned.items()]
    lines = [[str(phase), *cells] for phase, _, cells in sorted(rungs, key=lambda r: r[:2])]
    tested = [c for (_, to), (found, _) in results.compared.items() if to == "base" for c in found if c.in_family]
    known = [[c.changes[k].paired.detectable for c in tested if c.changes[k].adjusted is not None] for k in columns]
    cells = [number(max(filter(None, values), default=None), 1) for values in known]
    if any(cell != "–" for cell in cells):
        lines.append(["", DETECTABLE, *cells, "", "", "", ""])
    published = "qwen2.5" in next((row["model"] for row in rows), "").lower()
    for name, figures in PUBLISHED.items() if published else ():
        cells = [number(figures.get(column), 1) for column in columns]
        lines.append(["", f"*{name}, published*", *cells, "", "", "", ""])
    header = ["phase", "row"]
    for column, protocol in columns.items():
        title = titles(tables.get(protocol) or rows, (column,))[list(METRICS).index(column)]
        header.append(f"{title}\n{protocol}")
    header += ["own objective, held out", "GPU\nminutes", "verdict", "config_hash"]
    notes = score_notes(rows, lines)
    notes += ["*published*: lm-eval, no chat template, measured elsewhere; a reference."] * published
    return Table(header, lines, 2, notes)


def gpu_minutes(row: dict) -> float | None:
    cost = row.get("cost") or {}
    seconds, gpus = finite(cost.get("wall_time_s")), cost.get("gpus")
    return seconds * gpus / 60 if seconds and gpus else None


def headline(group: list[dict]) -> str:
    """The main figure of a method's own objective, before → after; of GRPO the flexible one, where it is recorded."""
    lines = [line for objective in OBJECTIVES.get(group[0]["method"], ()) if (line := objective_line(group, objective))]
    line = next((line for line in lines if "flexible" in line[0]), lines[0] if lines else None)
    return f"{line[0]}: {line[2]} → {line[3]}; {line[4]}" if line else ""


def three_sentences(results: "Results") -> str:
    """What the table says: what was learned, what that changed against the policies it started from, and whether it
    is a win."""
    words = {}
    for label, group in families(results.rows):
        if any(row["name"] in LADDER for row in group) and (text := headline(group)):
            words.setdefault(text.rsplit("; ", 1)[1].strip("*"), []).append(label)
    said = {"yes": "improved", "worse": "got worse", "not shown": "no change shown", "–": "no interval recorded"}
    learned = "; ".join(f"{said[word]}: {', '.join(words[word])}" for word in said if word in words)
    moved, tested = [], 0
    for (protocol, to), (found, _) in results.compared.items():
        for c in found if to == "parent" else ():
            for column in results.endpoints(protocol):
                change = c.changes[column]
                tested += change.adjusted is not None
                if change.up or change.down:
                    moved.append(f"{c.label} {title_of(column)} {signed(change.points)}")
    by_word = {}
    for v in results.verdicts:
        by_word.setdefault(v.word, []).append(v.label)
    sentences = [f"Each method's own objective on held-out data: {learned}."] if learned else []
    if tested:
        sentences.append(f"Against the SFT policy that each started from, {len(moved)} of {tested} changes are clear"
                         + f": {', '.join(moved)}" * bool(moved) + ".")
    if by_word:
        words = "; ".join(f"{', '.join(labels)} **{word}**" for word, labels in by_word.items())
        sentences.append(f"Against base: {words}.")
    return " ".join(sentences)


def delta_table(compared: list[Comparison], notes: list[str], endpoints: tuple[str, ...]) -> Table | None:
    """Every family of rows minus its reference, in points."""
    lines = []
    for c in compared:
        label = f"{c.label} − {c.reference}" + "\n(descriptive)" * (not c.in_family)
        lines.append([label, *map(change_cell, c.changes.values())])
    if any(change.paired is None and change.points is not None for c in compared for change in c.changes.values()):
        notes = [*notes, UNPAIRED]
    if not lines and not notes:
        return None
    header = [column + "\ndescriptive" * (column not in endpoints) for column in METRICS]
    return Table(["difference", *header], lines + detectable_row(compared, 1), 1, notes)


def secondary_columns(rows: list[dict]) -> dict[tuple[str, str, str], str]:
    """{(task, metric, filter): eval_hash} of the secondary tasks of a table's rows, each as most rows evaluated it."""
    hashes = {}
    for row in rows:
        for task, how in (row.get("secondary") or {}).items():
            hashes.setdefault(task, Counter())[how["eval_hash"]] += 1
    columns = {}
    for task, count in sorted(hashes.items()):
        for row in rows:
            for key in row["metrics"]:
                metric, _, name = key.removeprefix(f"{task}/").partition(",")
                if key.startswith(f"{task}/") and not metric.endswith("_stderr"):
                    columns[task, metric, name] = count.most_common(1)[0][0]
    return columns


def secondary_table(rows: list[dict]) -> Table | None:
    """Scores on the secondary tasks and their changes, unadjusted: a line per family."""
    columns, labels = secondary_columns(rows), {id(row): label for label, row in label_rows(rows)}
    if not columns:
        return None

    def has(row: dict | None, column: tuple) -> bool:
        return row is not None and at(row, "secondary", column[0], "eval_hash") == columns[column] and (
            score(row, column)[0] is not None)

    lines = []
    for group in seed_groups(rows):
        cells = []
        for column in columns:
            own = [row for row in group if has(row, column)]
            if not own:
                cells.append("–")
                continue
            text = score_cell(*score(own[0], column))
            if len(own) > 1:
                text = spread([score(row, column)[0] for row in own], 1, 1) + " sd"
            for to in ("parent", "base"):
                pairs = [(row, other) for row in own if has(other := reference_of(row, rows, to), column)]
                if pairs:
                    text += f"\n− {to} {change_cell(compare(pairs, column))}"
            cells.append(text)
        lines.append([label_group(group, labels), *cells])
    how = next(row["secondary"] for row in rows if row.get("secondary"))
    header = [f"{task}\n{metric},\n{name}" + f"\nn = {number(at(how, task, 'n'))}" for task, metric, name in columns]
    notes = ["Secondary: descriptive, with unadjusted intervals; in no test, and in no verdict."]
    if "gsm8k_zero_shot" in {task for task, _, _ in columns}:
        notes.append("gsm8k_zero_shot: GSM8K's test set in the prompt that GRPO trains with; strict wants the answer "
                     "after ####, flexible takes the last number.")
    return Table(["row", *header], lines, 1, notes)


def verdict_table(verdicts: list[Verdict], rows: list[dict], records: dict[str, list[dict]]) -> Table | None:
    """A line per method: the verdict against base and what it rests on, and DPO's own criterion."""
    lines = []
    for v in verdicts:
        own = own_criterion(v.rows, rows, records["judge"], records["rm"]) if v.rows[0]["method"] == "dpo" else "–"
        lines.append([v.label, f"**{v.word}**", v.why, own])
    header = ["row", "verdict", "clearly moved endpoints, points", "own criterion"]
    return Table(header, lines, 4) if lines else None


def tests_note(protocols: dict[str, str], tables: dict[str, list[dict]], compared: dict) -> str:
    """One sentence that names the family of tests, and says where the protocol is not the one that was named for it."""
    every = [change for found, _ in compared.values() for c in found for change in c.changes.values()]
    n = sum(change.adjusted is not None for change in every)
    names = ", ".join(f"{title_of(column)} ({protocol})" for column, protocol in protocols.items())
    text = f"One family of tests, {n} in all, adjusted by Holm: {names}, of each method against base and its own "
    text += "parent."
    model = next((row["model"] for rows in tables.values() for row in rows), "")
    if is_instruct(model) and "chat" not in tables:
        text += (" The base is an instruct model, for which IFEval and GSM8K are to be tested in the chat protocol; "
                 "that was not evaluated, so the plain one stands in.")
    return text + " Everything else is descriptive."


def independence(record: dict) -> str:
    """What a comparison's record says of its judge: "circular", "not independent …", "independent" or "" (not
    known)."""
    judge = record.get("judge") or {}
    if judge.get("circular"):
        return "circular"
    if judge.get("independent") is None:
        return ""
    shared = [f"{number(part.get('share'), 0, 100)} % with {name}" for name, part in
              (judge.get("shared_prompts") or {}).items() if part and part.get("prompts")]
    if judge["independent"]:
        return "independent"
    return f"not independent: it shares training prompts, {', '.join(shared)}"


def pool(records: list[dict]) -> dict:
    """The figures of a comparison over seeds: judge.py's own of one; of several, over the prompts that all were asked,
    which are crossed with the seeds, the interval of verdicts.paired_over_seeds. Length-controlled: the mean of the
    seeds' rates, SE^2 = s^2(seed rates)/S + the mean of the seeds' own SE^2, a little too wide."""
    summaries = [record.get("summary") or {} for record in records]
    scored = [{key: score for key, score, _ in record.get("scores") or [] if score is not None} for record in records]
    n = min((s.get("n") or 0) - (s.get("unparsable") or 0) for s in summaries)
    if len(records) == 1:
        return {"n": n, "seeds": 1, **{key: summaries[0].get(key) for key in (
            "win_rate", "win_rate_ci95", "length_controlled_win_rate", "length_controlled_ci95")}}
    shared = sorted(set.intersection(*map(set, scored)))
    found = {"n": len(shared), "seeds": len(records)}
    if len(shared) > 1:
        d = np.array([[scores[key] for key in shared] for scores in scored])  # [S, n]
        paired = paired_over_seeds(d, np.ones(len(shared), int))
        low, high = paired.interval
        found |= {"win_rate": float(d.mean()), "win_rate_ci95": [max(0.0, low), min(1.0, high)]}
    rates = [s.get("length_controlled_win_rate") for s in summaries]
    ends = [s.get("length_controlled_ci95") or [None] for s in summaries]
    if None not in map(finite, [*rates, *(end for pair in ends for end in pair)]):
        own = [((high - low) / 3.92) ** 2 for low, high in ends]
        half = 1.96 * math.sqrt(statistics.variance(rates) / len(rates) + statistics.fmean(own))
        rate = statistics.fmean(rates)
        found |= {"length_controlled_win_rate": rate,
                  "length_controlled_ci95": [max(0.0, rate - half), min(1.0, rate + half)]}
    return found


def judged_families(judge: list[dict], rows: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """[(label of a, label of b, its records, one per seed)]: the comparisons of a judge, the seeds of a family and of
    what it is compared with together; judges in the order of their records."""
    family = {id(row): (label, [(r["name"], r["adapter_sha256"]) for r in group]) for label, group in families(rows)
              for row in group}

    def label_of(row: dict) -> str:
        policy = row.get("name"), row.get("adapter_sha256")
        return next((label for label, group in family.values() if policy in group), judged_label(row, rows))

    found = {}
    for record in judge:
        a, b = (label_of(at(record, "rows", side) or {"name": record.get(side)}) for side in "ab")
        who = [at(record, "judge", key) for key in ("kind", "model", "sha256")]
        found.setdefault(json.dumps([who, a, b, record["note"]]), (a, b, []))[2].append(record)
    return list(found.values())


def own_criterion(family: tuple[dict, ...], rows: list[dict], judge: list[dict], reward_models: list[dict]) -> str:
    """DPO's: the judged win rate against its SFT row, with its whole interval, is above 50 %, by the judge that was
    named to decide, that beats "the longer answer wins" and shares no training prompt with it, over FEWEST prompts or
    more; a line per judge, seeds pooled."""
    adapters, said = {r["adapter_sha256"]: r["parent"]["adapter_sha256"] for r in family if r.get("parent")}, []
    against_parent = [record for record in judge if independence(record) != "circular" and at(
        record, "rows", "b", "adapter_sha256") == adapters.get(at(record, "rows", "a", "adapter_sha256"), "none")]
    for _, _, records in judged_families(against_parent, rows):
        pooled, record = pool(records), records[0]
        low = finite((pooled.get("win_rate_ci95") or [None])[0])
        if low is None:
            continue
        met = "met" if low > 0.5 else "not met"
        if at(record, "judge", "decides") is False:
            met = "beside it"
        elif pooled["n"] < FEWEST:
            met = "open, too few"
        elif any(independence(record).startswith("not") for record in records):
            met = "open, no independent judge"
        elif not is_evidence(record, reward_models):
            met = "open, the judge is not known to beat longer-wins"
        seeds = f" in {pooled['seeds']} seeds" * (pooled["seeds"] > 1)
        said.append(f"{met}: beats SFT in {win_rate_cell(pooled)} % of {number(pooled['n'])} prompts{seeds} "
                    f"(length-controlled {controlled_cell(pooled)}), says {at(record, 'judge', 'model')}"
                    + f", {independence(record) or 'whose training prompts are not known'}")
    return "\n".join(said) or "open: not judged against SFT"


def empty_share(row: dict, task: str) -> float | None:
    """Share of a benchmark's generated answers that are nothing but whitespace, in percent; None without per-item
    scores."""
    characters = at(row, "items", task, "characters")
    return 100 * statistics.fmean(n == 0 for n in characters) if characters else None


def empty_note(rows: list[dict]) -> str:
    """IFEval's empty answers, where rows differ in them by ten points or more; else nothing."""
    share = {label: found for label, row in label_rows(rows) if (found := empty_share(row, "ifeval")) is not None}
    if not share or max(share.values()) - min(share.values()) < 10:
        return ""
    shares = ", ".join(f"{k} {v:.0f} %" for k, v in share.items())
    return (f"**Read IFEval with care**: answers that are empty, {shares}. A row that says something more "
            "often follows more instructions.")


def eos_rates(guardrails: list[dict]) -> dict[str | None, float]:
    """{adapter: share of its answers to the judge's prompts that end with EOS}: the same prompts for every row."""
    return {row.get("adapter_sha256"): row.get("eos_rate") for record in guardrails if not record["note"]
            for row in record.get("rows") or [] if not row.get("best_of")}


def once(rows: list[dict]) -> list[dict]:
    """One row per policy, whatever the protocols that it was evaluated in."""
    return list({tuple(row[key] for key in ROW_ID): row for row in reversed(rows)}.values())[::-1]


def cost_table(rows: list[dict], guardrails: list[dict]) -> Table | None:
    """What each training run took."""
    rows, facts, ended = [row for row in once(rows) if row.get("training")], [], eos_rates(guardrails)
    for row in rows:
        fact = {k: (row.get("cost") or {}).get(k) or row["training"].get(k) for k in ("tokens", "wall_time_s")}
        fact |= {k: v for k, v in (row.get("cost") or {}).items() if v is not None}
        fact["judge_eos_rate"] = number(ended.get(row["adapter_sha256"]), 1, 100)
        if seconds := finite(fact["wall_time_s"]):
            fact["minutes"] = number(seconds / 60, 1)
            fact["gpu_minutes"] = number(seconds * fact["gpus"] / 60 if fact.get("gpus") else None, 1)
        fact["tokens"], fact["peak_gib"] = number(fact["tokens"]), number(fact.get("peak_gib"), 1)
        facts.append(fact)
    shown = {key: title for key, title in COST.items() if any(fact.get(key, "–") != "–" for fact in facts)}
    lines = [[label, row["method"], str(row["seed"]), row["config_hash"], *(fact.get(key, "–") for key in shown)]
             for (label, row), fact in zip(label_rows(rows), facts)]
    notes = ["A row's own training, without that of its parent and of the reward models it used. Tokens: all that it "
             "trained on or sampled, every epoch counted. EOS rate: the same prompts and sampling for every row."]
    return Table(["row", "method", "seed", "config_hash", *shown.values()], lines, 4, notes) if lines else None


# ------------------------------------------------------------------ did it learn what it optimises?


def change_of(objective: tuple, facts: list[dict], before: list, after: list) -> list[float] | None:
    """95 % interval of after − before: the run's own, of several seeds over seeds and items; None where not known."""
    _, before_key, after_key, n_key, _, _ = objective
    if len(facts) > 1:
        changes = [a - b for a, b in zip(after, before)]
        # As verdicts.paired_over_seeds, with the mean of the seeds' own SE^2 for the items' part: a little too wide.
        own = [change_of(objective, [fact], [b], [a]) for fact, b, a in zip(facts, before, after)]
        items = statistics.fmean(((high - low) / 3.92) ** 2 for low, high in own) if all(own) else 0.0
        seeds = statistics.variance(changes) / len(changes)
        df = (seeds + items) ** 2 / (seeds**2 / (len(changes) - 1)) if seeds else math.inf
        half = float(stats.t.ppf(1 - ALPHA / 2, df)) * math.sqrt(seeds + items)
        return [statistics.fmean(changes) - half, statistics.fmean(changes) + half]
    n, stem = finite(facts[0].get(n_key)), after_key.removesuffix("_after")
    if isinstance(before_key, float):
        ends = interval_of(after_key, facts[0], n)
        return ends and [end - before_key for end in ends]
    if after_key in COUNTED and n and not facts[0].get(f"{stem}_change_interval"):
        shares = [x for share in (after[0], before[0]) for x in (round(share * n), n)]
        return list(confint_proportions_2indep(*shares, method="newcomb"))
    return facts[0].get(f"{stem}_change_interval")


def interval_of(key: str, fact: dict, n: float | None) -> list[float] | None:
    """The interval that a run recorded of a figure, else Wilson's of a share of n trials."""
    if n and key in COUNTED and finite(fact.get(key)) is not None and not fact.get(f"{key}_interval"):
        return list(map(float, proportion_confint(fact[key] * n, n, method="wilson")))
    return fact.get(f"{key}_interval")


def objective_line(rows: list[dict], objective: tuple) -> list[str] | None:
    """A line of the first table for a family of rows, one per seed; None where the runs recorded nothing of it."""
    title, before_key, after_key, n_key, scale, better = objective
    facts = [row.get("training") or {} for row in rows]
    after = [finite(fact.get(after_key)) for fact in facts]
    before = [before_key if isinstance(before_key, float) else finite(fact.get(before_key)) for fact in facts]
    if None in after:
        return None
    change = None if None in before else change_of(objective, facts, before, after)
    learned = "–"
    if change:
        low, high = sorted(better * end for end in change)
        learned = "**yes**" if low > 0 else "**worse**" if high < 0 else "not shown"
    decimals, n = 1 if scale == 100 else 3, facts[0].get(n_key)
    shown = with_interval(after[0], interval_of(after_key, facts[0], finite(n)), decimals, scale)
    if len(rows) > 1:
        shown = spread(after, scale, decimals) + " sd"
    first = None if None in before else statistics.fmean(before)
    return [title, number(n), number(first, decimals, scale), shown, learned]


def families(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """[(label, the rows of a family, one per seed)] of policies, each once."""
    rows = once(rows)
    labels = {id(row): label for label, row in label_rows(rows)}
    return [(label_group(group, labels), group) for group in seed_groups(rows)]


def learned_table(rows: list[dict], reward_models: list[dict]) -> Table | None:
    """Each method's own objective on held-out data, before and after: before any benchmark is read."""
    lines = []
    for label, group in families(rows):
        of_method = [objective_line(group, objective) for objective in OBJECTIVES.get(group[0]["method"], ())]
        lines += [[label, *line] for line in of_method if line]
    for record in reward_models:
        if not record["note"] and finite(record.get("accuracy")) is not None:
            rule = finite(at(record, "longer_wins", "accuracy"))
            learned = "–"
            if paired_and_name := paired_with_length(record):
                paired = paired_and_name[0]
                learned = "not shown" if paired.p >= ALPHA else "**yes**" if sum(paired.interval) > 0 else "**worse**"
            cells = [number(record.get("n")), number(rule and max(rule, 1 - rule), 1, 100), share_cell(record), learned]
            lines.append([record["label"], "held-out pairs, %; before: the better rule of length", *cells])
    header = ["row", "own objective", "n", "before", "after", "learned"]
    return Table(header, lines, 2, [LEARNED]) if lines else None


def moved_table(rows: list[dict]) -> Table | None:
    """How far each policy went from its reference, beside what measurement and rounding add; where any recorded it."""
    lines = []
    for label, group in families(rows):
        facts = [row.get("training") or {} for row in group]
        if group[0]["method"] == "sft" and not any(row.get("parent") for row in group) or group[0]["method"] == "base":
            continue
        cells = [spread([fact.get(key) for fact in facts], 1, 3) for key in MOVED]
        if len(group) == 1:
            cells[0] = with_interval(facts[0].get("kl_reference"), facts[0].get("kl_reference_interval"), 3)
        lines.append([label, *cells, ", ".join(dict.fromkeys(str(fact.get("measured_in") or "–") for fact in facts))])
    if all(set(line[1:]) == {"–"} for line in lines):
        return None
    return Table(["row", *MOVED.values(), "measured\nin"], lines, 1, [MOVED_LEGEND])


# ------------------------------------------------------------------ reward models and on-policy runs


def paired_with_length(record: dict) -> tuple[Paired, str] | None:
    """(accuracy minus that of the better rule of length, paired on the same pairs; the rule's name), from a judge's
    per-pair outcomes: strings of "1" right, "0" wrong, "-" a tie. None where they are not recorded. A tie of a reward
    model tells nothing; one of a language model, whose two orders disagree, is half right."""
    model, longer = at(record, "outcomes", "model"), at(record, "outcomes", "longer_wins")
    if not model or not longer:
        return None
    name = "longer-wins"
    if longer.count("1") < longer.count("0"):
        longer, name = longer.translate(str.maketrans("10", "01")), "shorter-wins"
    pairs = Counter(zip(model, longer, strict=True))
    if "position_inconsistency" in record:
        value = {"1": 1.0, "0": 0.0, "-": 0.5}
        d = np.array([value[a] - value[b] for (a, b), n in sorted(pairs.items()) for _ in range(n)])
        paired = paired_over_items(d, np.ones(len(d), int), bool(np.isin(d, (-1, 0, 1)).all()))
        return (paired, name) if paired else None
    gained, lost = pairs["1", "0"], pairs["0", "1"]  # a tie of either tells nothing
    d = np.array([1] * gained + [-1] * lost + [0] * (len(model) - gained - lost))
    return paired_over_items(d, np.ones(len(d), int), True), name


def against_length(record: dict) -> str:
    """One sentence: does the reward model beat the rule that the longer answer wins, on the same pairs?"""
    longer = share_cell(record.get("longer_wins"))
    text = f"{record['label']}: accuracy {share_cell(record)} %, longer-wins {longer} %, on the same "
    text += f"{number(record.get('n'))} held-out pairs: "
    if not (paired_and_name := paired_with_length(record)):
        return text + "whether it beats longer-wins is not known, since its record has no outcomes pair by pair."
    paired, name = paired_and_name
    word = "not distinguishable from" if paired.p >= ALPHA else "beats" if sum(paired.interval) > 0 else "worse than"
    return f"{text}{word} {name} (paired difference {bracket(paired.interval, 1, 100)} points, {p_cell(paired.p)})."


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
    """A line per run of one method: the KL at its end, and each number that it has from before and after training."""
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


def records_report(records: dict[str, list[dict]], results: "Results") -> list[str | Table]:
    rows = results.rows
    blocks = ["## Reward models", reward_table(records["rm"]), *map(against_length, records["rm"])]
    for method in ("ppo", "grpo"):
        if records[method]:
            blocks += [f"## On-policy runs: {method.upper()}", on_policy_table(records[method])]
    if records["judge"]:
        blocks += ["## Judged win rates", judge_table(records["judge"], rows, records["rm"]), *win_rates(results)]
    for record in records["guardrails"]:
        blocks += ["## Held-out answers", guardrails_table(record, rows)]
    plots = [record["plot"] for found in records.values() for record in found if record["plot"]]
    return blocks + ["Plots: " + ", ".join(f"[{plot}]({plot})" for plot in plots)] * bool(plots)


# ------------------------------------------------------------------ judge, guardrails, speed


def win_rate_cell(record: dict) -> str:
    summary = record.get("summary") or record  # or pooled figures
    return with_interval(summary.get("win_rate"), summary.get("win_rate_ci95"), 1, 100)


def controlled_cell(record: dict) -> str:
    summary = record.get("summary") or record
    return with_interval(summary.get("length_controlled_win_rate"), summary.get("length_controlled_ci95"), 1, 100)


def judged_label(row: dict, rows: list[dict]) -> str:
    """The row's label in the tables; its name where they hold no such name (with its seed, if they hold the adapter);
    with the adapter's hash where no row of that name has it."""
    known = {r["adapter_sha256"]: label for label, r in label_rows(once(rows)) if r["name"] == row.get("name")}
    if row.get("adapter_sha256") in known:
        return known[row.get("adapter_sha256")]
    seeds = [label.removeprefix(r["name"]) for label, r in label_rows(once(rows)) if r["adapter_sha256"]
             and r["adapter_sha256"] == row.get("adapter_sha256")]
    if seeds and not known:
        return str(row.get("name")) + seeds[0]  # best of N: its policy's adapter under another name
    other = known and row.get("adapter_sha256") not in known
    return str(row.get("name")) + f"@{(row.get('adapter_sha256') or 'none')[:8]}" * bool(other)


def judge_table(records: list[dict], rows: list[dict], reward_models: list[dict]) -> Table:
    lines, notes = [], [
        "Held-out prompts, each judged in both orders: a disagreement is a tie, a tie is half a win. Win rate in % "
        "with the bootstrap's 95 % interval over prompts; length-controlled: by a logistic fit, at equal lengths; "
        "unfinished lost: an answer that did not end loses to one that did. "
        "Inconsistent: the share of prompts with two different answers on which the two orders disagree; a reward "
        "model, which scores each answer by itself, has no order. Unparsable: verdicts, two per prompt; a prompt with "
        "one of them is a tie, one with two is left out. Circular: the judge is one of the two, their base, or a "
        "reward model that one was trained against; its figure shows over-optimisation, not quality. Not independent: "
        "the judge was trained on prompts that a row was trained on as well."
    ]  # fmt: skip
    asked = [[record.get("prompts_fingerprint"), record.get("sampling")] for record in records]
    if any(one != asked[0] for one in asked):
        notes.append("Not all were asked alike: other prompts, or another sampling. Not every line compares with "
                     "every other.")
    for record in records:
        a, b = (judged_label(at(record, "rows", side) or {"name": record.get(side)}, rows) for side in "ab")
        s, judge = record.get("summary") or {}, record.get("judge") or {}
        name = f"{judge.get('model') or '–'} ({judge.get('kind') or '–'})" + f"\n{independence(record).split(':')[0]}"
        counts = " / ".join(number(s.get(key)) for key in ("wins", "ties", "losses"))
        unfinished = with_interval(s.get("unfinished_lost_win_rate"), s.get("unfinished_lost_ci95"), 1, 100)
        tokens = " / ".join(number(s.get(key), 0) for key in ("mean_tokens_a", "mean_tokens_b"))
        shares = [number(s.get("position_inconsistency"), 1, 100), number(s.get("unparsable_verdicts"))]
        label = f"{a} against {b}" + "‡" * bool(record["note"])
        rates = [win_rate_cell(record), controlled_cell(record), unfinished]
        lines.append([label, name.strip(), number(s.get("n")), counts, *rates, *shares, tokens])
        if judge.get("circular"):
            notes.append(f"{a} against {b}: circular, {judge.get('circular_why') or 'no reason given'}.")
        elif independence(record).startswith("not"):
            notes.append(f"{a} against {b}: the judge is {independence(record)}.")
        notes += [record["note"]] * bool(record["note"])
    if left_out := max(record.get("prompts_left_out") or 0 for record in records):
        notes.append(f"{left_out} prompts of the judge's data stand in a training set and were not asked.")
    notes += dict.fromkeys(judge_evidence(record, reward_models) for record in records)
    header = ["rows", "judge", "prompts", "won / tied\n/ lost", "win rate, %", "length-\ncontrolled, %",
              "unfinished\nlost, %", "inconsistent,\n%", "unparsable\nverdicts", "mean tokens"]  # fmt: skip
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
        if finite(row.get("kl_sft_floor")) is not None:
            kl += f"\nfloor {number(row['kl_sft_floor'], 2)}"
        lines.append([judged_label(row, rows), tokens, *cells, kl, number(row.get("delta_w"), 2, 100)])
    notes = [
        "Tokens: mean ± sd of an answer. Distinct-n: share of an answer's runs of n tokens that are different, mean "
        "over answers. Longest repeat: tokens of the longest span that an answer says twice. KL: nats per answer, of "
        f"the row to {reference} along its own answers, ± standard error; floor: of the row to itself in other "
        "micro-batches. ‖ΔW‖ / ‖W‖: size of the adapter beside the weights it changes, against the base."
    ]
    notes += ["≤: best of N, for which log N − (N − 1) / N bounds the KL."] * bound
    notes += [record["note"]] * bool(record["note"])
    return Table(["row", "tokens", *GUARDRAILS, f"KL to {reference}", "‖ΔW‖ / ‖W‖,\n%"], lines, 1, notes)


def speed_line(results: Path, directory: str) -> str:
    """One sentence on SFT's speed and memory beside the fastest peer's, from the first bench/*.json that has both."""
    for path in sorted((results / "bench").glob("*.json")):
        record = read_json(path)
        sft = {case["system"]: case for case in record["cases"] if case["workload"] == "sft-bf16"}
        speed, peer = (finite(at(sft, system, "tokens_per_s")) for system in ("rungs", "trl-best"))
        if speed and peer:
            model = re.search(r"\b[A-Z]+\d{2,}\b", record["device"])  # of NVIDIA H100 80GB HBM3: H100
            device = model[0] if model else record["device"]
            return (f"**Speed**: SFT {float(f'{speed:.3g}'):,.0f} tokens/s on one {device}, {speed / peer:.0f} × TRL's "
                    f"best, in {sft['rungs']['peak_gib']:.0f} GiB; [all methods]({directory}/bench/README.md).")
    return ""


# ------------------------------------------------------------------ sweeps

SWEEPS = (
    "One run per setting, written by tools/sweep.py, which states the rule by which one is chosen; seed 41, held-out "
    "parts of the training data, no benchmark. Value with its 95 % interval; tokens: mean of an answer. Chosen: the "
    "rule's winner. Not admissible: its answers end less often than SFT's by more than 5 points, or its KL to SFT is "
    "above 10 nats."
)


def sweep_value(record: dict) -> str:
    decimals = 3
    if record.get("interval"):
        return with_interval(record.get("value"), record["interval"], decimals)
    return number(record.get("value"), decimals) + f" ± {number(record.get('stderr'), decimals)}" * ("stderr" in record)


def sweep_table(records: list[dict]) -> Table:
    """A line per run of the grid, winners and losers."""
    lines = []
    for record in records:
        setting = ", ".join(f"{key} {value}" for key, value in (record.get("setting") or {}).items())
        seconds, gpus = finite(record.get("wall_time_s")), at(record, "hardware", "gpus") or 1
        minutes = finite(record.get("minutes")) or (seconds and seconds * gpus / 60)
        what = "**chosen**" if record.get("chosen") else "" if record.get("admissible", True) else "not admissible"
        objective = record.get("objective") or ""
        if finite(record.get("before")) is not None:
            objective += f", before {number(record['before'], 3)}"
        cells = [sweep_value(record), number(record.get("eos_rate"), 1, 100), number(record.get("completion_tokens"), 0),
                 number(record.get("kl", record.get("kl_fp32")), 2), number(minutes, 1), what]
        config = f"`{record.get('config_hash')}`"
        lines.append([sweep_base(record), record["method"], setting, objective, *cells, config])
    header = ["base", "method", "setting", "objective", "value", "answers\nthat end, %", "tokens", "KL, nats", "GPU\nminutes", "",
              "config_hash"]
    return Table(header, lines, 4, [SWEEPS])


def sweep_base(record: dict) -> str:
    return Path(str(record.get("base_name") or record.get("model"))).name


def read_sweeps(results: Path) -> list[dict]:
    """sweeps/*.json by base, method and setting, rates as numbers."""
    records = [{"file": path.name, **read_json(path)} for path in sorted((results / "sweeps").glob("*.json"))]
    for record in records:
        if missing := {"method", "setting", "value"} - record.keys():
            path = results / "sweeps" / record["file"]
            fail(f"{path} lacks {', '.join(sorted(missing))}: not a record of tools/sweep.py")
        record["lr"] = finite(record.get("lr")) or float(record["setting"].get("lr") or "nan")
    methods = list(OBJECTIVES)

    def place(record: dict) -> tuple:
        method = record["method"]
        return (sweep_base(record), methods.index(method) if method in methods else len(methods), method,
                not record["lr"] > 0, record["lr"] if record["lr"] > 0 else 0.0, str(record["setting"]))
    return sorted(records, key=place)


def speedrun_line(run: dict, points: list[dict]) -> str:
    first, last = points[0], points[-1]
    low, high = (number(end, 1, 100) for end in run["flexible_1_change_interval"])
    flexible, strict = (f"{number(first[key], 1, 100)} → {number(last[key], 1, 100)}" for key in ("flexible_1", "pass_1"))
    return (f"`make speedrun`: GRPO from the model itself, {last['updates']} updates, seed {run['seed']}. Of "
            f"{run['heldout_problems']} held-out problems it solves, by the last number, {flexible} % (change {low} to "
            f"{high} points), by the number after #### {strict} %, in {run['command_seconds']:.0f} s, "
            f"{run['command_seconds'] - run['run_seconds']:.0f} s of it start-up, on one {run['hardware']['device']}.")


# ------------------------------------------------------------------ the report


def data_of(record: dict, settings: dict | None = None) -> dict[str, str]:
    """{role: the data in words, and its hash} of a row or a reward model's record: the sources of the rows that were
    counted while training (data_sources), else the name of the file that the run's arguments give; a hub data set names
    itself."""
    settings, words = settings or record.get("args") or {}, {}
    for role, fingerprint in (record.get("data") or {}).items():
        counts = at(record, "data_sources", role)
        argument = settings.get("heldout_data" if role == "heldout" else "data")
        if not str(fingerprint).startswith("sha256:"):
            words[role] = f"`{fingerprint}`"
            continue
        names = "beside the training file" if role == "heldout" else "a local file"
        if argument:
            names = Path(str(argument)).name
        if counts:
            names = ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items(), key=lambda item: -item[1]))
        words[role] = f"{names} (`{fingerprint[:15]}`)"
    return words


def training_data(rows: list[dict], records: dict[str, list[dict]]) -> str:
    """One line: what the rows of a table were trained on."""
    by_data = {}
    for label, row in label_rows(rows):
        run = next((run for run in records["runs"] if same_policy(run, row)), {})
        words = data_of(row | {"data_sources": run.get("data_sources")}, run.get("args"))
        if text := ", ".join(text for role, text in words.items() if role in ("train", "prompts", "task")):
            by_data.setdefault(text, []).append(label)
    for record in records["rm"]:
        if not record["note"] and (text := data_of(record).get("train")):
            by_data.setdefault(text, []).append(record["label"])
    lines = "; ".join(f"{', '.join(dict.fromkeys(names))} on {text}" for text, names in by_data.items())
    return f"Trained on: {lines}." if lines else ""


def describe(rows: list[dict], records: dict[str, list[dict]]) -> list[str]:
    """What all rows of a table have in common, and what they were trained on; before it a warning when they saw too few
    items."""
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
    if is_instruct(row["model"]):
        model += " (an Instruct model: its base row has been tuned before)"
    limits = [f"{task} {limit:,}" + " a subject" * (task == "mmlu") for task, _, limit in ev["tasks"] if limit]
    tokens = f", at most {ev['max_gen_toks']} generated tokens" if ev["max_gen_toks"] else ""
    lines.append(
        f"{model}. Limits: {', '.join(limits) or 'none'}{tokens}. Base in {ev['dtype']}, quantisation "
        f"{ev['quantization']}, adapter {'merged' if ev['adapter_merged'] else 'unmerged'}. "
        f"Evaluation data `{ev['data'][:16]}`, train_invariants `{row['train_invariants']}`, eval_hash "
        f"`{row['eval_hash']}`."
    )
    return [*lines, *filter(None, [training_data(rows, records)])]


@dataclass(frozen=True)
class Results:
    """What the pages are written from."""

    tables: dict[str, list[dict]]  # protocol -> its rows
    records: dict[str, list[dict]]  # kind -> rm, ppo, grpo, judge, guardrails, runs
    compared: dict[tuple[str, str], tuple[list[Comparison], list[str]]]  # (protocol, "base" or "parent")
    protocols: dict[str, str]  # endpoint -> the protocol it is tested in
    verdicts: list[Verdict]
    plots: list[str]
    suffix: str = ""  # of the names of plots and pages
    apart: str = ""  # in what it differs from the first part of the report

    def image(self, stem: str) -> str:
        """The plot by its path, if it is there: the SVG, which opens sharp at any size."""
        name = Path(stem).name
        title = PLOTS.get(name, "Curves of the run")
        return f"![{title}]({stem}{self.suffix}.svg)" if name in self.plots else ""

    @property
    def rows(self) -> list[dict]:
        return [row for table in self.tables.values() for row in table]

    def endpoints(self, protocol: str) -> tuple[str, ...]:
        return tuple(column for column, tested in self.protocols.items() if tested == protocol)


def first_answers(results: Results) -> list[str | Table]:
    """The first and the third question: did it learn, and is it a win?"""
    blocks = []
    if learned := learned_table(results.rows, results.records["rm"]):
        blocks += ["## 1. Did it learn what it optimises?", learned]
    if moved := moved_table(results.rows):
        blocks += ["### How far did it move?", moved]
    if table := verdict_table(results.verdicts, results.rows, results.records):
        note = tests_note(results.protocols, results.tables, results.compared)
        blocks += ["## 3. Is it a win? Verdicts against base", table, note, VERDICTS]
        blocks += [results.image("plots/tradeoff")]
    return blocks


def screen(results: Results) -> list[str | Table]:
    """What the terminal shows: what was learned, and the verdicts, without their legends."""
    learned = learned_table(results.rows, results.records["rm"])
    verdicts = verdict_table(results.verdicts, results.rows, results.records)
    blocks = ["## 1. Did it learn what it optimises?", replace(learned, notes=[])] if learned else []
    return blocks + (["## 3. Is it a win? Verdicts against base", replace(verdicts, notes=[])] if verdicts else [])


def full_report(results: Results, pages: list[str]) -> list[str | Table]:
    """Blocks of text and tables, for results/README.md and the terminal, without the legend."""
    tables, records = results.tables, results.records
    answers = first_answers(results)
    third = next((i for i, block in enumerate(answers) if str(block).startswith("## 3")), len(answers))
    model = Path(next((row["model"] for row in results.rows), "")).name
    blocks = [f"# Results: {model}" if results.suffix else "# Results", results.apart, *answers[:third]]
    if tables:
        blocks += ["## 2. What did it change?"]
    for protocol, table in tables.items():
        blocks += [f"### {protocol.capitalize()} protocol: {PROTOCOLS.get(protocol, '')}", *describe(table, records)]
        blocks += ["#### Current state, %", scores_table(table)]
        for against, title in (("parent", "its own parent"), ("base", "base")):
            if changes := delta_table(*results.compared[protocol, against], results.endpoints(protocol)):
                blocks += [f"#### Change against {title}, points", changes]
        blocks += [results.image(f"plots/deltas-{protocol}")]
        if secondary := secondary_table(table):
            blocks += ["#### Secondary tasks, %", secondary]
    if not tables:
        blocks.append(scores_table([]))
    blocks += answers[third:]
    blocks += records_report(records, results)
    blocks += [results.image(f"plots/{name}") for name in ("winrate-kl", "ppo", "grpo")]
    if lines := cost_table(results.rows, records["guardrails"]):
        blocks += ["## What training took", lines]
    if pages:
        blocks.append("Runs: " + ", ".join(f"[{label}](runs/{label}{results.suffix}.md)" for label in pages))
    return [block for block in blocks if block]


def overview_lines(results: Results) -> list[tuple]:
    """Of plots.overview: a line per method of the climb, its own objective and then each endpoint, [(title, changes of
    the seeds, their mean, its 95 % interval or None, whether Holm calls it clear)]; benchmarks against the own parent,
    of SFT against base."""
    lines = []
    for label, group in families(results.rows):
        objectives = OBJECTIVES.get(group[0]["method"], ())
        recorded = [objective for objective in objectives if objective_line(group, objective)]
        if not recorded or not any(row["name"] in LADDER for row in group):
            continue
        chosen = next((objective for objective in recorded if "flexible" in objective[0]), recorded[0])
        title, before_key, after_key, _, scale, _ = chosen
        facts = [row.get("training") or {} for row in group]
        after = [scale * fact[after_key] for fact in facts]
        before = [before_key if isinstance(before_key, float) else finite(fact.get(before_key)) for fact in facts]
        if None in before:
            continue
        changes = [a - scale * b for a, b in zip(after, before)]
        ends = change_of(chosen, facts, before, [a / scale for a in after])
        ends = sorted(scale * float(end) for end in ends) if ends and all(map(math.isfinite, ends)) else None
        cells = [(title, changes, statistics.fmean(changes), ends, bool(ends) and not ends[0] <= 0 <= ends[1])]
        for column, protocol in results.protocols.items():
            to = "parent" if any(row.get("parent") for row in group) else "base"
            table = results.tables.get(protocol, [])
            held = {row["adapter_sha256"] for row in group}
            found = [c for c in results.compared.get((protocol, to), ([], []))[0] if c.row["adapter_sha256"] in held]
            if not found or found[0].changes[column].points is None:
                cells.append((f"{title_of(column)}, {protocol}", [], None, None, False))
                continue
            change = found[0].changes[column]
            points = [score(row, column)[0] - score(reference_of(row, table, to), column)[0] for row in found[0].rows]
            cells.append((f"{title_of(column)}, {protocol}", points, change.points,
                          change.paired and change.paired.interval, bool(change.adjusted is not None and change.clear)))
        lines.append((label, group[0], cells))
    return lines


def compact_report(results: Results, directory: str, others: list[str]) -> list[str | Table]:
    """README.md's section: one table, one plot, the sentences that read it, and what it is about."""
    blocks = [compact_table(results), results.image(f"{directory}/plots/overview"), three_sentences(results)]
    for i, rows in enumerate(results.tables.values()):
        about = describe(rows, results.records)
        blocks += about if i == 0 else [text for text in about if text.startswith("**Trial")]
        blocks.append(empty_note(rows))
    if others:
        names = ", ".join(others)
        blocks.append(f"Other bases and evaluations: {names}, in [results/README.md]({directory}/README.md).")
    blocks.append(COMPACT_LEGEND.format(directory))
    return [block for block in blocks if block]


def win_rates(results: Results) -> list[str]:
    """A sentence per judge: each row's win rate, beside it the length-controlled one, and how far the judge is to be
    trusted."""
    by_judge, records = {}, results.records
    told = [record for record in records["judge"] if not record["note"] and not at(record, "judge", "circular")]
    for a, b, of_judge in judged_families(told, results.rows):
        judge = of_judge[0].get("judge") or {}
        name = f"{judge.get('model')}" + " in both orders" * (judge.get("kind") != "reward")
        by_judge.setdefault((name, b), []).append((a, of_judge))
    lines = []
    for (name, b), compared in by_judge.items():
        pooled = [(a, pool(of_judge)) for a, of_judge in compared]
        rates = [f"{a} {win_rate_cell(p)} (length-controlled {controlled_cell(p)})" for a, p in pooled]
        text = f"**Win rate** against {b}, judged by {name}, %: {', '.join(rates)}."
        every = [record for _, of_judge in compared for record in of_judge]
        dependent = {a: independence(r) for a, of_judge in compared for r in of_judge
                     if independence(r).startswith("not")}
        text += "".join(f" For {label} the judge is {why}." for label, why in dependent.items())
        text += " Its training prompts are not known." * all(not independence(record) for record in every)
        lines.append(f"{text} {judge_evidence(every[0], records['rm'])}")
    return lines


def judge_evidence(record: dict, reward_models: list[dict]) -> str:
    """One sentence: does the judge beat "the longer answer wins", paired, on held-out pairs?"""
    own = checked_pairs(record, reward_models)
    if not own or not paired_with_length(own):
        model = at(record, "judge", "model")
        return f"Whether {model} beats \"the longer answer wins\" on held-out pairs is not known."
    return ("As evidence: " if is_evidence(record, reward_models) else "No evidence by itself: ") + against_length(own)


def checked_pairs(record: dict, reward_models: list[dict]) -> dict | None:
    """A judge's outcomes on held-out pairs: a reward model's own record, or what judge.py asked a language model."""
    judge = record.get("judge") or {}
    if judge.get("heldout"):
        return {"label": judge.get("model"), **judge["heldout"]}
    own = [r for r in reward_models if judge.get("kind") == "reward" and r.get("adapter_sha256") == judge.get("sha256")]
    return own[0] if own else None


def is_evidence(record: dict, reward_models: list[dict]) -> bool | None:
    """Does the judge beat the better rule of length, p < 0.05, on the same pairs? None where that is not known."""
    own = checked_pairs(record, reward_models)
    found = paired_with_length(own) if own else None
    return found and found[0].p < ALPHA and sum(found[0].interval) > 0


def policies(tables: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """{label: its rows, one a protocol} of each trained policy: the runs that get a page."""
    found = {}
    for rows in tables.values():
        for row in rows:
            if row["adapter_sha256"]:
                found.setdefault(tuple(row[key] for key in ROW_ID), []).append(row)
    labels = [label.rstrip("†") for label, _ in label_rows([rows[0] for rows in found.values()])]
    return dict(zip(labels, found.values()))


def page(label: str, rows: list[dict], results: Results) -> list:
    """A run's page, blocks of text and tables: verdict, command, result, training, data, configuration."""
    row, records = rows[0], results.records
    run = next((r for r in records["runs"] if same_policy(r, row)), {})
    blocks = [f"# {label}", f"`{row['method']}`, phase {row['phase']}, seed {row['seed']}. [All results](../README.md)"]
    for v in results.verdicts:
        if any(same_policy(row, r) for r in v.rows):
            blocks.append(f"**Verdict: {v.word}** ({v.why}).")
            if row["method"] == "dpo":
                own = own_criterion(v.rows, results.rows, records["judge"], records["rm"]).replace("\n", "; ")
                blocks.append(f"Own criterion: {own}.")
    if learned := learned_table([row], []):
        blocks += ["## Did it learn what it optimises?", learned]
    if moved := moved_table([row]):
        blocks += ["## How far did it move?", moved]
    blocks += ["## Command", command_of(run), "## Result"]
    for r in rows:
        lines = [[title_of(column), floor_cell(r, column)] for column in METRICS]
        header = ["benchmark", f"{r['protocol']}, %"]
        for against in ("parent", "base"):
            for c in results.compared[r["protocol"], against][0]:
                if any(one is r for one in c.rows):
                    header.append(f"{c.label} − {c.reference}" if len(c.rows) > 1 else f"− {c.reference}")
                    lines = [[*line, change_cell(c.changes[column])] for line, column in zip(lines, METRICS)]
        blocks.append(Table(header, lines))
    if judged := [record for record in records["judge"] if same_policy(at(record, "rows", "a") or {}, row)]:
        blocks += ["## Judged", judge_table(judged, results.rows, records["rm"])]
    for record in records["guardrails"]:
        if own := [r for r in record.get("rows") or [] if same_policy(r, row)]:
            blocks += ["## Held-out answers", guardrails_table(record | {"rows": own}, results.rows)]
    curves = results.image(f"../plots/run-{label}")
    blocks += ["## Training", cost_table([row], records["guardrails"]) or "Not recorded with this run.", curves]
    parents = [row.get("parent"), *(run.get("scorers") or {}).values()]
    data = data_lines(row | {"data_sources": run.get("data_sources")}, run.get("args"))
    data += [[f"{p.get('method') or 'parent'} {p.get('name')}", f"`{p.get('config_hash')}`", ""] for p in parents if p]
    blocks += ["## Data and lineage", Table(["", "fingerprint", "in words"], data + hashes_of(row), 3)]
    blocks += configuration(run)
    if run:
        about = {"git commit": run.get("git_commit"), **(run.get("hardware") or {}), **(run.get("versions") or {})}
        blocks.append("; ".join(f"{key} {value}" for key, value in about.items()) + ".")
    return [block for block in [*blocks, LEGEND] if block]


def data_lines(record: dict, settings: dict | None = None) -> list[list[str]]:
    words = data_of(record, settings)
    return [[role, f"`{value}`", words[role]] for role, value in (record.get("data") or {}).items()]


def reward_page(record: dict) -> list[str | Table]:
    """The page of a reward model."""
    data = data_lines(record)
    plot = f"![Held-out figures](../{record['plot']})" if record["plot"] else ""
    blocks = [f"# {record['label']}", f"`reward`, seed {record.get('seed')}. [All results](../README.md)"]
    blocks += ["## Command", command_of(record), "## Result", reward_table([record]), against_length(record), plot]
    blocks += ["## Data and lineage", Table(["", "fingerprint", "in words"], data + hashes_of(record), 3)]
    blocks += configuration(record)
    return [block for block in blocks if block]


def command_of(run: dict) -> str:
    return f"```bash\npython {run['command']}\n```" if run.get("command") else "Not recorded with this run."


def hashes_of(run: dict) -> list[list[str]]:
    return [[key, f"`{run.get(key)}`", ""] for key in ("train_invariants", "config_hash", "family", "adapter_sha256")]


def configuration(run: dict) -> list[str | Table]:
    settings = [[key, f"`{json.dumps(value, ensure_ascii=False)}`"] for key, value in (run.get("args") or {}).items()]
    return ["## Configuration", Table(["argument", "value"], settings, 2)] if settings else []


def markdown(blocks: list[str | Table]) -> str:
    return "\n\n".join(block if isinstance(block, str) else block.markdown() for block in blocks) + "\n"


def show(blocks: list[str | Table]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # a log: rich would fold the tables at 80 columns
        console = Console(highlight=False, width=140)
    for block in filter(None, blocks):
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
    return pages + [path for path in plots if path.stem.startswith((*PLOTS, "run-"))]


def results_of(results: Path, climbs: list[dict[str, list[dict]]], i: int, group: tuple[str, ...]) -> Results:
    """Everything that is known of the i-th climb, {protocol: its rows}; its plots come later."""
    tables = climbs[i]
    rows = [row for table in tables.values() for row in table]
    invariants = [next((row["train_invariants"] for t in climb.values() for row in t), "") for climb in climbs]
    records = read_records(results, rows, group, {*invariants} - {invariants[i]})
    if i:  # what belongs to no rows is listed once, with the first
        records = {kind: [record for record in found if not record["note"]] for kind, found in records.items()}
    for row in rows:
        row["items"] = read_items(results, row)
    protocols = endpoint_protocols(tables)
    compared = {(name, to): comparisons(table, to) for name, table in tables.items() for to in ("base", "parent")}
    compared = with_holm(compared, protocols)
    verdicts, apart, suffix = verdicts_of(compared, tables, protocols), "", ""
    if i:
        protocol = next(iter(tables))
        first = climbs[0].get(protocol) or next(iter(climbs[0].values()))
        apart = f"Not comparable with the rows above; they differ in (above / here) {differences(first[0], rows[0])}."
        same = invariants[:i].count(invariants[i])  # the same training, evaluated otherwise
        suffix = f"-{tables[protocol][0]['eval_hash'] if same else invariants[i]}"
    return Results(tables, records, compared, protocols, verdicts, [], suffix, apart)


def main(args: Args) -> None:
    # 1. The rows, and which of them may stand together.
    results = Path(args.results)
    if not results.is_dir():
        fail(f"no such directory: {results}; --results names the one that holds metrics.json")
    rows = read_rows(results / "metrics.json")
    climbs = climbs_of(rows, args.group, results / "metrics.json", args.first) or [{}]
    reports = [results_of(results, climbs, i, args.group) for i in range(len(climbs))]

    # 2. The plots, and the files as they should read.
    flags = {"--results": args.results, "--readme": args.readme, "--group": " ".join(args.group), "--first": args.first}
    defaults = {"--results": Args.results, "--readme": Args.readme, "--group": "", "--first": ""}
    given = [f"{flag} {value}" for flag, value in flags.items() if value and value != defaults[flag]]
    command = " ".join(["python report.py", *given])
    stamp = f"{STAMP}{command}`; edits are lost -->\n\n"
    files, pictures, texts, full = {}, [], {}, []
    for report in reports:
        runs, plots = policies(report.tables), results / "plots"
        with rc_context(STYLE):
            figures = draw(report.compared, report.records, runs) | overview(overview_lines(report))
            report.plots.extend(figures)
            files |= {plots / f"{name}{report.suffix}.svg": encode(figure, "svg") for name, figure in figures.items()}
            shown = {plots / f"{name}{report.suffix}.png": figure for name, figure in figures.items() if name in PLOTS}
            if not args.check:  # a PNG's bytes depend on the machine: that it is there is all that is checked
                files |= {path: encode(figure, "png") for path, figure in shown.items()}
        pictures += shown
        rewards = [record for record in report.records["rm"] if not record["note"] and record["label"] not in runs]
        own_pages = {label: page(label, own, report) for label, own in runs.items()}
        own_pages |= {record["label"]: reward_page(record) for record in rewards}
        full += full_report(report, list(own_pages))
        texts |= {results / "runs" / f"{label}{report.suffix}.md": stamp + markdown(blocks)
                  for label, blocks in own_pages.items()}
    pages, sweeps = len(texts), read_sweeps(results)
    if sweeps:
        with rc_context(STYLE):
            figure = sweep_curves(sweeps, sweep_base)
            files |= {results / "plots" / "sweeps.svg": encode(figure, "svg")}
            files |= {} if args.check else {results / "plots" / "sweeps.png": encode(figure, "png")}
        pictures.append(results / "plots" / "sweeps.png")
        texts[results / "sweeps" / "README.md"] = stamp + markdown(
            ["# Sweeps", f"![{PLOTS['sweeps']}](../plots/sweeps.svg)", sweep_table(sweeps)])
        full.append("Sweeps, from which the defaults come: [sweeps](sweeps/README.md).")
    if (record := results / "speedrun.jsonl").is_file():
        run, *points = map(json.loads, record.read_text().splitlines())
        with rc_context(STYLE):
            figure = speedrun(run, points)
            files |= {results / "plots" / "speedrun.svg": encode(figure, "svg")}
            files |= {} if args.check else {results / "plots" / "speedrun.png": encode(figure, "png")}
        pictures.append(results / "plots" / "speedrun.png")
        full += ["## Speedrun", f"![{PLOTS['speedrun']}](plots/speedrun.svg)", speedrun_line(run, points)]
    full = [*full, LEGEND]
    texts[results / "README.md"] = stamp + markdown(full)
    chosen = args.readme or ("README.md" if results == Path(Args.results) else "none")
    if chosen != "none":
        readme = Path(chosen)
        directory = Path(os.path.relpath(results, readme.parent)).as_posix()
        others = [f"{Path(r.rows[0]['model']).name} ({r.rows[0]['train_invariants']})" for r in reports[1:]]
        compact = [*compact_report(reports[0], directory, others), *filter(None, [speed_line(results, directory)])]
        texts[readme] = with_section(readme, stamp + markdown(compact) + "\n")
    names = [str(path) for path in texts if path.parent not in (results / "runs", results / "sweeps")]
    names += [f"pages of {pages} runs"] * bool(pages) + [f"plots: {len(pictures)}"] * bool(pictures)
    files |= {path: text.encode() for path, text in texts.items()}
    leftover = sorted(set(generated(results)) - set(files) - set(pictures))  # of rows that are no longer there

    # 3. Compare, or show and write.
    if not args.check:
        brief = [block for report in reports for block in [report.apart, *screen(report)] if block]
        show(full if args.full else brief or full)
        for path, content in files.items():
            write_atomic(path, lambda p: p.write_bytes(content))
        for path in leftover:
            path.unlink()
        print(f"\nwrote {' and '.join(names)}" + "; --full prints every table and what each mark means" * (not args.full))
        if trained := [row["adapter"] for row in rows if row.get("adapter") and Path(row["adapter"]).is_dir()]:
            say_next("python", "tools/chat.py", trained[-1], *(["--versus", trained[0]] if len(trained) > 1 else []),
                     last=True)
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
