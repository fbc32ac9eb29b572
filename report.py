"""report.py: writes the tables, verdicts and plots that compare the rows in results/.

It answers three questions, in this order, for every method:
    1. Did it learn what it optimises?  Its own objective on held-out data, before -> after.
    2. What did it change?              Paired differences on the benchmarks: to the policy that it started from,
                                        its own parent, and to the base.
    3. Is it a win?                     The verdict, against the base.
Tests, intervals and the rules of the verdict are in verdicts.py, the tables of the first question in learned.py, what
judge.py measured in judged.py, the figures in plots.py, cells and tables in tables.py. This file has the tables of the
benchmarks and the pages, and reads and writes the files.

1. A table is about one train_invariants, one protocol (plain, chat) and one eval_hash. Where a results file holds
   several of them, each train_invariants has a part of its own, which begins with its differences from the first;
   README.md is about the first (--first HASH). Rows of one eval_hash whose items (doc_id, doc_hash) differ are refused.
2. A row's own parent is the one that the row names, by the hash of its adapter; without one it is the base. Where the
   parent has no row the difference is left out, and a note says so.
3. The same config_hash with another adapter hash is another run of it, with other bits: both rows stay. The one with
   more protocols stands for its seed, else the earlier; the other is marked †. The verdict tests whether they differ.
4. What is missing is shown as missing, never as zero: a row as "not run", a score as "–", a standard error as "?".
5. A reward model scores answers and has no benchmark row: its own table comes from rm/*.json, beside the baseline "the
   longer answer wins". PPO's and GRPO's own figures come from ppo/*.json and grpo/*.json, a judge's verdicts on
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
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from common import SCHEMA_VERSION, fail, read_json, say_next, write_atomic
from judged import (collapse_of, eos_rates, guardrails_table, judge_table, mark_collapsed, mark_seeds, own_criterion,
                    win_rates)
from learned import (OBJECTIVES, against_length, change_of, headline, learned_table, moved_table, objective_line,
                     on_policy_table, read_sweeps, reward_table, sweep_base, sweep_table)
from plots import PLOTS, curves_svg, draw, encode, overview, speedrun, style, sweep_curves
from tables import Table, change_cell, floor_cell, markdown, number, score_cell, show, spread
from verdicts import (LADDER, METRICS, Comparison, Verdict, at, climbs_of, compare, comparisons, differences,
                      endpoint_protocols, families, finite, is_at_floor, is_instruct, label_group, label_rows,
                      missing_tests, of_climb, once, policy_of, read_items, read_rows, reference_of, rung,
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
    """The train_invariants or eval_hash of the rows that come first and make README.md's table; by default the
    group with the most rows, or of several such groups the newest."""
    full: bool = False
    """Print every table, not only what was learned and the verdicts."""
    check: bool = False
    """Write nothing; exit 1 and print a diff when a generated file disagrees with the results."""


COST = {  # of a training run: key -> column title
    "judge_eos_rate": "EOS rate,\njudge's\nprompts, %", "tokens": "tokens", "minutes": "minutes",
    "gpu_minutes": "GPU\nminutes", "peak_gib": "peak\nGiB", "device": "device",
}  # fmt: skip
PUBLISHED = {  # measured by others with lm-eval, no chat template, %: the default base model and its instruct model
    "Qwen2.5-0.5B": {"MMLU": 48.1, "GSM8K\nstrict": 33.9, "TruthfulQA\nMC2": 39.9, "IFEval\nprompt": 12.4},
    "Qwen2.5-0.5B-Instruct": {"MMLU": 47.3, "GSM8K\nstrict": 34.0, "TruthfulQA\nMC2": 41.9, "IFEval\nprompt": 18.9},
}  # fmt: skip
PROTOCOLS = {"plain": "no chat template", "chat": "chat template applied, few-shot examples as turns"}
SMALL = 200  # items; with fewer, the standard error of a score near 50 % is above 3.5 points
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
    "Each score is in %, ± its standard error; of several seeds it is the mean ± the sd between seeds. In parentheses: "
    "points against base, **bold** where p < 0.05 after Holm, `~` where the two scores, taken as unpaired, would not "
    "distinguish them. `°`: at chance; `–`: not measured. *plain*: the bare prompt; *chat*: the prompt inside the chat "
    "template. GPU minutes: the row's own training, without its parent's and the reward models'. Seeds: a row counts "
    "those of both protocols, a test those that were evaluated in its own. Intervals, changes against the own parent, "
    "controls, judges, and what each verdict means: [results]({}/README.md)."
)
UNPAIRED = "±: no per-item scores (evaluate.py keeps them in scores/), so no paired test and no verdict."
DETECTABLE = "smallest detectable"
ZERO_SHOT = ("gsm8k_zero_shot", "exact_match", "flexible-extract")  # what GRPO is trained for, on GSM8K's test set
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
    """{"rm", "ppo", "grpo", "judge", "guardrails", "runs": the files' records}, with a `label`, the `plot` beside the
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
        invariants, climb_invariants = (r.get("train_invariants") or "unknown" for r in (first, climb))
        if invariants in elsewhere or rows and invariants != climb_invariants and climb_invariants in group:
            continue
        note = (f"‡ {record['name']}: of other train_invariants ({invariants}) than {climb['name']} "
                f"({climb_invariants}), so not comparable with the other rows.")
        record |= {"label": record["name"], "note": note if invariants != climb_invariants else ""}
        record["plot"] = f"{folder}/{plot.name}" if plot.is_file() else ""
        records[folder].append(record)
    for kind_records in records.values():
        names = Counter(record["name"] for record in kind_records)
        of_seed = Counter((record["name"], record.get("seed")) for record in kind_records)
        for record in kind_records:
            if of_seed[record["name"], record.get("seed")] > 1 and record.get("adapter_sha256"):  # a rerun's
                record["label"] += f"@{record['adapter_sha256'][:8]}"
            elif names[record["name"]] > 1:
                record["label"] += f"-s{record.get('seed')}"
            record["label"] += "‡" * bool(record["note"])
    return {kind: sorted(kind_records, key=lambda record: bool(record["note"]))
            for kind, kind_records in records.items()}


# ------------------------------------------------------------------ tables


def detectable_row(compared: list[Comparison], left: int) -> list[list[str]]:
    """The last line of a table with a paired test: per column, the largest of the smallest effects that the rows' tests
    detect."""
    known = {k: [c.changes[k].paired.detectable for c in compared if c.changes[k].paired] for k in METRICS}
    cells = [number(max(filter(None, values), default=None), 1) for values in known.values()]
    return [[""] * (left - 1) + [DETECTABLE, *cells]] if any(cell != "–" for cell in cells) else []


def titles(rows: list[dict], endpoints: tuple[str, ...] = ()) -> list[str]:
    """The columns' titles with shots and items, which are the same in every row of a table; a column that is no
    endpoint is marked as descriptive."""
    header = []
    for column, (task, _, _) in METRICS.items():
        shots = {f"{k}-shot" for row in rows for name, k, _ in row["eval"]["tasks"] if name == task}
        items = {f"n = {row['n'][task]:,}" for row in rows if task in row["n"]}
        header.append("\n".join([column, *shots, *items, *(["descriptive"] if column not in endpoints else [])]))
    return header


def scores_table(rows: list[dict]) -> Table:
    """The current state: every rung, scored or not run."""
    rungs = [(*rung(row["phase"], row["name"]), label, row) for label, row in label_rows(rows)]
    names = {row["name"] for row in rows}
    rungs += [(*rung(phase, name), name, None) for name, phase in LADDER.items() if name not in names]
    lines = []
    for phase, _, label, row in sorted(rungs, key=lambda r: r[:2]):
        cells = [floor_cell(row, column) for column in METRICS] if row else ["not run"] + ["–"] * (len(METRICS) - 1)
        lines.append([str(phase), label, *cells])
    for group in seed_groups(rows):
        if len(group) > 1:
            cells = [spread([score(row, column)[0] for row in group], 1, 1) for column in METRICS]
            lines.append(["", f"{label_group(group, {})}, mean ± sd", *cells])
    return Table(["phase", "row", *titles(rows, tuple(METRICS))], lines, 2, score_notes(rows, lines))


def score_notes(rows: list[dict], lines: list[list[str]]) -> list[str]:
    notes = []
    if any("†" in line[1] for line in lines):
        notes.append("† another run of a row above: the same config_hash, another adapter. The verdict tests whether "
                     "the two differ; only then it says irreproducible.")
    if any(score(row, column)[1] == 0 for row in rows for column in METRICS):
        notes.append("± 0.0: every item scored alike; a difference to this score looks more certain than it is.")
    return notes


def compact_table(results: "Results") -> Table:
    """README.md's table: a line per family that verdicts.of_climb names. Each endpoint in the protocol that it is
    tested in (for several seeds mean ± sd) with the difference to base; GSM8K in GRPO's prompt, descriptive; the own
    objective; the cost; the verdict."""
    rows, tables = once(results.rows), results.tables
    labels = {id(row): label for label, row in label_rows(rows)}
    columns = {column: results.protocols[column] for column in METRICS if column in results.protocols}
    asked = asked_zero_shot(results.rows)
    beside = {column: eval_hash for column, eval_hash in secondary_columns(asked).items() if column == ZERO_SHOT}
    rungs, missing = [], {name: phase for name, phase in LADDER.items() if name not in {row["name"] for row in rows}}
    for group in of_climb(seed_groups(rows)):
        row, cells = group[0], []
        ids = [policy_of(r) for r in group]
        for column, protocol in columns.items():
            protocol_rows = [r for r in tables.get(protocol, []) if policy_of(r) in ids]
            compared = [c for c in results.compared.get((protocol, "base"), ([], []))[0] if c.row in protocol_rows]
            short = change_cell(compared[0].changes[column], short=True) if compared else "–"
            cell = floor_cell(protocol_rows[0], column) if protocol_rows else "–"
            if len(protocol_rows) > 1:
                cell = spread([score(r, column)[0] for r in protocol_rows], 1, 1) + " sd"
                cell += "°" * all(is_at_floor(r, column) for r in protocol_rows)
            cells.append(cell if short == "–" else f"{cell} ({short})")
        cells += [secondary_cell(group, asked, column, eval_hash, short=True) for column, eval_hash in beside.items()]
        word = next((v.word for v in results.verdicts if any(same_policy(row, r) for r in v.rows)), "")
        if row["method"] != "base" and not word:
            word = "(descriptive)"
        word = "; ".join(filter(None, [word, collapse_of(group)]))
        key = f"family {row['family']}" if len(group) > 1 else row["config_hash"] or ""
        took = [minutes for r in group if (minutes := gpu_minutes(r)) is not None]
        cells += [(headline(group) or [""])[0], number(statistics.fmean(took), 1) if took else ""]
        rungs.append((*rung(row["phase"], row["name"]), [label_group(group, labels), *cells, word, key and f"`{key}`"]))
    empty = ["–"] * (len(columns) + len(beside) + 2)
    rungs += [(*rung(phase, name), [name, *empty, "not run", ""]) for name, phase in missing.items()]
    lines = [[str(phase), *cells] for phase, _, cells in sorted(rungs, key=lambda r: r[:2])]
    tested = [c for (_, to), (compared_rows, _) in results.compared.items() if to == "base"
              for c in compared_rows if c.in_family]
    known = [[c.changes[k].paired.detectable for c in tested if c.changes[k].adjusted is not None] for k in columns]
    cells = [number(max(filter(None, values), default=None), 1) for values in known]
    if any(cell != "–" for cell in cells):
        lines.append(["", DETECTABLE, *cells, *[""] * (len(beside) + 4)])
    published = "qwen2.5" in next((row["model"] for row in rows), "").lower()
    for name, figures in PUBLISHED.items() if published else ():
        cells = [number(figures.get(column), 1) for column in columns]
        lines.append(["", f"*{name}, published*", *cells, *[""] * (len(beside) + 4)])
    header = ["phase", "row"]
    for column, protocol in columns.items():
        title = titles(tables.get(protocol) or rows, (column,))[list(METRICS).index(column)]
        header.append(f"{title}\n{protocol}")
    header += ["GSM8K\nflexible\n0-shot, GRPO's prompt\ndescriptive" for _ in beside]
    header += ["own objective, held out; learned?", "GPU\nminutes", "verdict", "config_hash"]
    notes = score_notes(rows, lines)
    if published:
        notes.append("*published*: figures of others for the general models, by lm-eval without a chat template; they "
                     "are not for this base, and not comparable with the rows above.")
    return Table(header, lines, 2, notes)


def families_shown(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """[(label, the rows of a family, one per seed)] that README.md shows."""
    labelled = families(rows)
    shown = of_climb([group for _, group in labelled])
    return [(label, group) for label, group in labelled if any(group is one for one in shown)]


def gpu_minutes(row: dict) -> float | None:
    cost = row.get("cost") or {}
    seconds, gpus = finite(cost.get("wall_time_s")), cost.get("gpus")
    return seconds * gpus / 60 if seconds and gpus else None


def three_sentences(results: "Results") -> str:
    """The table in words: what was learned, what that changed against the policies it started from, and whether it
    is a win."""
    words, fallen = {}, {}
    for label, group in families_shown(results.rows):
        if line_and_word := headline(group):
            words.setdefault(line_and_word[1], []).append(label)
            fallen |= {label: why for why in [collapse_of(group)] if why}
    phrases = {"yes": "{} improved", "worse": "{} got worse", "not shown": "of {} no change is shown",
               "–": "of {} no interval was recorded"}
    learned = "; ".join(text.format(", ".join(words[word])) for word, text in phrases.items() if word in words)
    learned += "".join(f"; but {label}'s {why.replace('*', '')}" for label, why in fallen.items())
    moved, tested = [], 0
    for (protocol, to), (compared_rows, _) in results.compared.items():
        for c in compared_rows if to == "parent" else ():
            for column in results.endpoints(protocol):
                change = c.changes[column]
                tested += change.adjusted is not None
                if change.up or change.down:
                    moved.append(f"{c.label} {title_of(column)} {signed(change.points)}")
    by_word = {}
    for v in results.verdicts:
        by_word.setdefault(v.word, []).append(v.label)
    sentences = [f"By each method's own objective on held-out data, {learned}."] if learned else []
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


def asked_zero_shot(rows: list[dict]) -> list[dict]:
    """The policies that were asked GSM8K in GRPO's prompt, each once."""
    return sorted(once([row for row in rows if at(row, "secondary", ZERO_SHOT[0])]),
                  key=lambda row: rung(row["phase"], row["name"]))


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


def secondary_cell(group: list[dict], rows: list[dict], column: tuple[str, str, str], eval_hash: str,
                   short: bool = False) -> str:
    """A family's score on a secondary task, evaluated by eval_hash, and its changes against parent and base; short:
    against base alone. rows: of one table; the family's may be another's, and are found there."""
    def has(row: dict | None) -> bool:
        return row is not None and at(row, "secondary", column[0], "eval_hash") == eval_hash and (
            score(row, column)[0] is not None)
    scored_rows = [row for row in rows if has(row) and any(same_policy(row, r) for r in group)]
    if not scored_rows:
        return "–"
    text = score_cell(*score(scored_rows[0], column))
    if len(scored_rows) > 1:
        text = spread([score(row, column)[0] for row in scored_rows], 1, 1) + " sd"
    for to in ("base",) if short else ("parent", "base"):
        pairs = [(row, reference_row) for row in scored_rows if has(reference_row := reference_of(row, rows, to))]
        if pairs:
            change = change_cell(compare(pairs, column), short)
            text += f" ({change})" if short else f"\n− {to} {change}"
    return text


def secondary_table(rows: list[dict], zero_shot: bool) -> Table | None:
    """Scores on the secondary tasks and their changes, unadjusted: a line per family. zero_shot: GSM8K in GRPO's own
    question alone, or all but that: it is asked in the chat template whatever the table's protocol, so that the rows of
    all tables stand together."""
    columns = {asked: eval_hash for asked, eval_hash in secondary_columns(rows).items()
               if (asked[0] == ZERO_SHOT[0]) == zero_shot}
    labels = {id(row): label for label, row in label_rows(rows)}
    if not columns:
        return None
    lines = [[label_group(group, labels), *(secondary_cell(group, rows, *asked) for asked in columns.items())]
             for group in seed_groups(rows)]
    how = {task: evaluation for row in rows for task, evaluation in (row.get("secondary") or {}).items()}
    header = [f"{task}\n{metric},\n{name}" + f"\nn = {number(at(how, task, 'n'))}" for task, metric, name in columns]
    notes = ["Secondary: descriptive, with unadjusted intervals; in no test, and in no verdict."]
    if zero_shot:
        notes.append("gsm8k_zero_shot: GSM8K's test set in the prompt that GRPO trains with; strict wants the answer "
                     "after `#### `, with the space (GRPO's reward takes it without one too), flexible takes the last "
                     "number.")
    return Table(["row", *header], lines, 1, notes)


def verdict_table(verdicts: list[Verdict], rows: list[dict], records: dict[str, list[dict]]) -> Table | None:
    """A line per method: the verdict against base and what it rests on, and DPO's own criterion."""
    lines = []
    for v in verdicts:
        row = v.rows[0]
        criterion = own_criterion(row, rows, records["judge"], records["rm"]) if row["method"] == "dpo" else "–"
        lines.append([v.label, "\n".join(filter(None, [f"**{v.word}**", collapse_of(v.rows)])), v.why, criterion])
    header = ["row", "verdict", "clearly moved endpoints, points", "own criterion"]
    return Table(header, lines, 4) if lines else None


def tests_note(protocols: dict[str, str], tables: dict[str, list[dict]], compared: dict) -> str:
    """One sentence that names the family of tests, and says where the protocol is not the one that was named for it."""
    every = [change for compared_rows, _ in compared.values() for c in compared_rows for change in c.changes.values()]
    missing = missing_tests(compared, protocols)
    n = sum(change.adjusted is not None for change in every) + missing
    names = ", ".join(f"{title_of(column)} ({protocol})" for column, protocol in protocols.items())
    text = f"One family of tests, {n} in all, adjusted by Holm: {names}, of each method against base and its own "
    text += "parent." + f" {missing} of them can't be made yet, and count with p = 1." * bool(missing)
    model = next((row["model"] for rows in tables.values() for row in rows), "")
    if is_instruct(model) and "chat" not in tables:
        text += (" The base is an instruct model, for which IFEval and GSM8K are to be tested in the chat protocol; "
                 "that was not evaluated, so the plain one stands in.")
    return text + " Everything else is descriptive."


def empty_share(row: dict, task: str) -> float | None:
    """Share of a benchmark's generated answers that are nothing but whitespace, in percent; None without per-item
    scores."""
    characters = at(row, "items", task, "characters")
    return 100 * statistics.fmean(n == 0 for n in characters) if characters else None


def empty_note(rows: list[dict]) -> str:
    """IFEval's empty answers, where rows differ in them by ten points or more; else nothing."""
    share = {}
    for label, group in families(rows):
        if None not in (seed_shares := [empty_share(row, "ifeval") for row in group]):
            share[label] = statistics.fmean(seed_shares)
    if not share or max(share.values()) - min(share.values()) < 10:
        return ""
    shares = ", ".join(f"{k} {v:.0f} %" for k, v in share.items())
    return (f"**Read IFEval with care**: the share of answers that are empty differs, {shares}. A row that merely "
            "answers more often follows more instructions.")


def cost_table(rows: list[dict], guardrails: list[dict]) -> Table | None:
    """The cost of each training run."""
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
    """One line: what the rows of a table were trained on; of several seeds the first one's sources, since seeds differ
    in which rows the shuffle takes."""
    by_data = {}
    for label, (row, *_) in families(rows):
        run = run_of(row, records)
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
    model = f"Base model `{row['model']}`" + f" at `{row['revision']}`" * bool(row["revision"])
    if is_instruct(row["model"]):
        model += " (an instruct model: the row base is instruction-tuned already)"
    limits = [f"{task} {limit:,} items" + " per subject" * (task == "mmlu") for task, _, limit in ev["tasks"] if limit]
    tokens = f", at most {ev['max_gen_toks']} generated tokens" if ev["max_gen_toks"] else ""
    lines.append(
        f"{model}. {seeds_of(rows)}Limits: {', '.join(limits) or 'none'}{tokens}. Evaluated in {ev['dtype']}, "
        f"quantisation {ev['quantization']}, adapter {'merged' if ev['adapter_merged'] else 'unmerged'}. "
        f"Evaluation data `{ev['data'][:16]}`, train_invariants `{row['train_invariants']}`, eval_hash "
        f"`{row['eval_hash']}`."
    )
    return [*lines, *filter(None, [training_data(rows, records)])]


def seeds_of(rows: list[dict]) -> str:
    """`One seed, 41: intervals are over items, and another seed may differ by more. `, or the seeds' numbers."""
    seeds = sorted({row["seed"] for row in rows if row["method"] != "base" and row.get("seed") is not None})
    if len(seeds) == 1:
        return f"One seed, {seeds[0]}: intervals are over items, and another seed may differ by more. "
    return f"Seeds {', '.join(map(str, seeds))}. " if seeds else ""


@dataclass(frozen=True)
class Results:
    """The data that the pages are written from."""

    tables: dict[str, list[dict]]  # protocol -> its rows
    records: dict[str, list[dict]]  # kind -> rm, ppo, grpo, judge, guardrails, runs
    compared: dict[tuple[str, str], tuple[list[Comparison], list[str]]]  # (protocol, "base" or "parent")
    protocols: dict[str, str]  # endpoint -> the protocol it is tested in
    verdicts: list[Verdict]
    plots: list[str]
    suffix: str = ""  # appended to the names of plots and pages
    apart: str = ""  # how it differs from the first part of the report

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
        blocks += ["#### Current state, %", scores_table(table), *filter(None, [empty_note(table)])]
        for against, title in (("parent", "its own parent"), ("base", "base")):
            if changes := delta_table(*results.compared[protocol, against], results.endpoints(protocol)):
                blocks += [f"#### Change against {title}, points", changes]
        blocks += [results.image(f"plots/deltas-{protocol}")]
        if secondary := secondary_table(table, zero_shot=False):
            blocks += ["#### Secondary tasks, %", secondary]
    if secondary := secondary_table(asked_zero_shot(results.rows), zero_shot=True):
        blocks += ["### GSM8K in GRPO's prompt, %", secondary]
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


def records_report(records: dict[str, list[dict]], results: "Results") -> list[str | Table]:
    rows = results.rows
    blocks = ["## Reward models", reward_table(records["rm"]), *map(against_length, records["rm"])]
    for method in ("ppo", "grpo"):
        if records[method]:
            blocks += [f"## On-policy runs: {method.upper()}", on_policy_table(records[method])]
    if records["judge"]:
        blocks += ["## Judged win rates", judge_table(records["judge"], rows, records["rm"]), *win_rates(records, rows)]
    for record in records["guardrails"]:
        blocks += ["## Held-out answers", guardrails_table(record, rows)]
    plots = [record["plot"] for kind_records in records.values() for record in kind_records if record["plot"]]
    return blocks + ["Plots: " + ", ".join(f"[{plot}]({plot})" for plot in plots)] * bool(plots)


def overview_lines(results: Results) -> list[tuple]:
    """Of plots.overview: a line per method of the climb, its own objective and then each endpoint, [(title, changes of
    the seeds, their mean, its 95 % interval or None, whether Holm calls it clear)]; benchmarks against the own parent,
    those of SFT against base."""
    lines = []
    for label, group in families_shown(results.rows):
        objectives = OBJECTIVES.get(group[0]["method"], ())
        recorded = [objective for objective in objectives if objective_line(group, objective)]
        if not recorded:
            continue
        chosen = next((objective for objective in recorded if "flexible" in objective[0]), recorded[0])
        title, scale = chosen[0], chosen[4]
        changes, ends = change_of(chosen, [row.get("training") or {} for row in group])
        if None in changes:
            continue
        changes = [scale * change for change in changes]
        ends = sorted(scale * float(end) for end in ends) if ends and all(map(math.isfinite, ends)) else None
        cells = [(title, changes, statistics.fmean(changes), ends, bool(ends) and not ends[0] <= 0 <= ends[1])]
        for column, protocol in results.protocols.items():
            to = "parent" if any(row.get("parent") for row in group) else "base"
            table = results.tables.get(protocol, [])
            held = {row["adapter_sha256"] for row in group}
            compared = [c for c in results.compared.get((protocol, to), ([], []))[0] if c.row["adapter_sha256"] in held]
            if not compared or compared[0].changes[column].points is None:
                cells.append((f"{title_of(column)}, {protocol}", [], None, None, False))
                continue
            change = compared[0].changes[column]
            points = [score(row, column)[0] - score(reference_of(row, table, to), column)[0]
                      for row in compared[0].rows]
            cells.append((f"{title_of(column)}, {protocol}", points, change.points,
                          change.paired and change.paired.interval, bool(change.adjusted is not None and change.clear)))
        lines.append((label + "\nanswers collapsed" * bool(collapse_of(group)), group[0], cells))
    return lines


def speed_line(results: Path, directory: str) -> str:
    """One sentence on the speed and memory of SFT beside TRL's best, its speed beside Unsloth's, and that of sampling
    beside vLLM's, each from the first bench/*.json that has both."""
    clauses = []
    for workload, peer, text in (
            ("sft-bf16", "trl-best", "SFT {speed} tokens/s on one {device}, {ratio:.0f} × TRL's best, in {gib:.0f} GiB"),
            ("sft-bf16", "unsloth", "SFT {speed} tokens/s on one {device}, {ratio:.0f} × Unsloth's"),
            ("sample", "vllm", "sampling {speed} tokens/s on one {device} (64 rows, no adapter beside the weights), "
                               "{ratio:.1f} × vLLM's")):
        for record in map(read_json, sorted((results / "bench").glob("*.json"))):
            cases = {case["system"]: case for case in record["cases"] if case["workload"] == workload}
            speed, peer_speed = (finite(at(cases, system, "tokens_per_s")) for system in ("rungs", peer))
            if speed and peer_speed:
                model = re.search(r"\b[A-Z]+\d{2,}\b", record["device"])  # of NVIDIA H100 80GB HBM3: H100
                clauses.append(text.format(speed=f"{float(f'{speed:.3g}'):,.0f}", ratio=speed / peer_speed,
                                           device=model[0] if model else record["device"],
                                           gib=cases["rungs"]["peak_gib"]))
                break
    return f"**Speed**: {'; '.join([*clauses, f'[all methods]({directory}/bench/README.md)'])}." if clauses else ""


def speedrun_line(run: dict, points: list[dict]) -> str:
    first, last = points[0], points[-1]
    low, high = (number(end, 1, 100) for end in run["flexible_1_change_interval"])
    flexible, strict = (f"{number(first[key], 1, 100)} → {number(last[key], 1, 100)}"
                        for key in ("flexible_1", "pass_1"))
    return (f"`make speedrun`: GRPO from the model itself, {last['updates']} updates, seed {run['seed']}. Of "
            f"{run['heldout_problems']} held-out problems it solves, by the last number, {flexible} % (change {low} to "
            f"{high} points), by the number after #### {strict} %, in {run['command_seconds']:.0f} s, "
            f"{run['command_seconds'] - run['run_seconds']:.0f} s of it start-up, on one {run['hardware']['device']}.")


def compact_report(results: Results, directory: str, others: list[str]) -> list[str | Table]:
    """README.md's section: one table, one plot, the sentences that read it, and what it is about."""
    legend = COMPACT_LEGEND.format(directory)
    blocks = [compact_table(results), legend, results.image(f"{directory}/plots/overview"), three_sentences(results)]
    for i, (protocol, rows) in enumerate(results.tables.items()):
        climb = [row for group in of_climb(seed_groups(rows)) for row in group] or rows
        about = describe(climb, results.records | {"rm": []})  # the rest is in results/README.md
        blocks += about if i == 0 else [text for text in about if text.startswith("**Trial") and text not in blocks]
        columns = ", ".join(title_of(column) for column, name in results.protocols.items() if name == protocol)
        if i and columns:
            about = f"{columns}: {protocol} protocol, eval_hash `{rows[0]['eval_hash']}`."
            blocks.append(f"{about} {seeds_of(rows)}".strip())
        if protocol == results.protocols["IFEval\nprompt"]:
            blocks.append(empty_note(rows))
    if others:
        names = ", ".join(others)
        blocks.append(f"Other bases and evaluations: {names}, in [results/README.md]({directory}/README.md).")
    return [block for block in blocks if block]


def policies(tables: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """{label: its rows, one per protocol} of each trained policy: the runs that get a page."""
    by_policy = {}
    for rows in tables.values():
        for row in rows:
            if row["adapter_sha256"]:
                by_policy.setdefault(policy_of(row), []).append(row)
    labels = [label.rstrip("†") for label, _ in label_rows([rows[0] for rows in by_policy.values()])]
    return dict(zip(labels, by_policy.values()))


def run_of(row: dict, records: dict[str, list[dict]]) -> dict:
    """The record of the run that a row is the result of; empty where there is none."""
    return next((run for run in records["runs"] if same_policy(run, row)), {})


def page(label: str, rows: list[dict], results: Results) -> list:
    """A run's page, blocks of text and tables: verdict, command, result, training, data, configuration."""
    row, records = rows[0], results.records
    run = run_of(row, records)
    blocks = [f"# {label}", f"`{row['method']}`, phase {row['phase']}, seed {row['seed']}. [All results](../README.md)"]
    for v in results.verdicts:
        if any(same_policy(row, r) for r in v.rows):
            blocks.append(f"**Verdict: {v.word}** ({v.why}).")
            if fallen := collapse_of(v.rows):
                of_row = [r for record in records["guardrails"] for r in record["rows"] if same_policy(r, row)]
                asked = f", on {of_row[0]['n']} held-out prompts" if of_row else ""
                blocks.append(f"The {fallen}{asked}. No judge's win rate is evidence for such answers.")
            if row["method"] == "dpo":
                criterion = own_criterion(row, results.rows, records["judge"], records["rm"]).replace("\n", "; ")
                blocks.append(f"Own criterion: {criterion}.")
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
        if policy_rows := [r for r in record.get("rows") or [] if same_policy(r, row)]:
            blocks += ["## Held-out answers", guardrails_table(record | {"rows": policy_rows}, results.rows)]
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
    """The pages and plots that a report has written, now or before; any other files beside them are the user's."""
    pages = [path for path in results.glob("runs/*.md") if path.read_bytes().startswith(STAMP.encode())]
    plots = [path for kind in ("svg", "png") for path in results.glob(f"plots/*.{kind}")]
    return pages + [path for path in plots if path.stem.startswith((*PLOTS, "run-"))]


def results_of(results: Path, climbs: list[dict[str, list[dict]]], i: int, group: tuple[str, ...]) -> Results:
    """Everything that is known of the i-th climb, {protocol: its rows}; its plots come later."""
    tables = climbs[i]
    rows = [row for table in tables.values() for row in table]
    invariants = [next((row["train_invariants"] for t in climb.values() for row in t), "") for climb in climbs]
    records = read_records(results, rows, group, {*invariants} - {invariants[i]})
    if i:  # records that belong to no rows are listed once, in the first part
        records = {kind: [record for record in kind_records if not record["note"]]
                   for kind, kind_records in records.items()}
    swept = {record.get("config_hash") for record in read_sweeps(results)}
    for row in rows:
        row["items"], row["swept"] = read_items(results, row), row["config_hash"] in swept
    mark_collapsed(rows, records)
    mark_seeds(records)
    protocols = endpoint_protocols(tables)
    compared = {(name, to): comparisons(table, to) for name, table in tables.items() for to in ("base", "parent")}
    bases = {row["weights_sha256"] for j, climb in enumerate(climbs[:i]) if invariants[j] != invariants[i]
             for table in climb.values() for row in table if row["method"] != "base"}
    if another := bool(bases & {row["weights_sha256"] for row in rows}):  # one family of tests per base
        compared = {key: ([replace(c, in_family=False) for c in compared_rows], notes)
                    for key, (compared_rows, notes) in compared.items()}
    compared = with_holm(compared, protocols)
    verdicts, apart, suffix = verdicts_of(compared, tables, protocols), "", ""
    if i:
        protocol = next(iter(tables))
        first = climbs[0].get(protocol) or next(iter(climbs[0].values()))
        apart = f"Not comparable with the rows above; they differ in (above / here) {differences(first[0], rows[0])}."
        apart += " The base is the same, and its tests stand above: everything here is descriptive." * another
        same = invariants[:i].count(invariants[i])  # the same training, evaluated with other settings
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
        with style():
            figures = draw(report.compared, report.protocols, report.records) | overview(overview_lines(report))
            drawn = {name: encode(figure, "svg") for name, figure in figures.items()}
            for label, of_run in runs.items():
                record, svg_path = run_of(of_run[0], report.records), plots / f"run-{label}{report.suffix}.svg"
                if record and (svg := curves_svg(record, svg_path)):
                    drawn[f"run-{label}"] = svg
            report.plots.extend(drawn)
            files |= {plots / f"{name}{report.suffix}.svg": svg for name, svg in drawn.items()}
            shown = {plots / f"{name}{report.suffix}.png": figure for name, figure in figures.items() if name in PLOTS}
            if not args.check:  # a PNG's bytes depend on the machine: that it is there is all that is checked
                files |= {path: encode(figure, "png") for path, figure in shown.items()}
        pictures += shown
        rewards = [record for record in report.records["rm"] if not record["note"] and record["label"] not in runs]
        own_pages = {label: page(label, of_run, report) for label, of_run in runs.items()}
        own_pages |= {record["label"]: reward_page(record) for record in rewards}
        full += full_report(report, list(own_pages))
        texts |= {results / "runs" / f"{label}{report.suffix}.md": stamp + markdown(blocks)
                  for label, blocks in own_pages.items()}
    pages, sweeps = len(texts), read_sweeps(results)
    if sweeps:
        with style():
            figure = sweep_curves(sweeps, sweep_base)
            files |= {results / "plots" / "sweeps.svg": encode(figure, "svg")}
            files |= {} if args.check else {results / "plots" / "sweeps.png": encode(figure, "png")}
        pictures.append(results / "plots" / "sweeps.png")
        texts[results / "sweeps" / "README.md"] = stamp + markdown(
            ["# Sweeps", f"![{PLOTS['sweeps']}](../plots/sweeps.svg)", sweep_table(sweeps)])
        full.append("Sweeps, from which the defaults come: [sweeps](sweeps/README.md).")
    if (record := results / "speedrun.jsonl").is_file():
        run, *points = map(json.loads, record.read_text().splitlines())
        with style():
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
        others = [f"{Path(r.rows[0]['model']).name} ({r.rows[0]['train_invariants']}, quantisation "
                  f"{at(r.rows[0], 'invariants', 'quantization')})" for r in reports[1:]]
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
        more = "" if args.full else "; --full prints every table and what each mark means"
        print(f"\nwrote {' and '.join(names)}{more}")
        if trained := [*dict.fromkeys(r["adapter"] for r in rows if r.get("adapter") and Path(r["adapter"]).is_dir())]:
            say_next("python", "tools/chat.py", trained[-1], *(["--versus", trained[0]] if len(trained) > 1 else []),
                     last=True)
        return
    stale = [str(path) for path in sorted(pictures) if not path.is_file()] + list(map(str, leftover))
    for path, content in files.items():
        old_content = path.read_bytes() if path.is_file() else b""
        if old_content != content:
            stale.append(str(path))
        if old_content != content and path.suffix == ".md":
            before, after = (text.decode(errors="replace").splitlines() for text in (old_content, content))
            diff = difflib.unified_diff(before, after, str(path), "the results say", lineterm="")
            print("\n".join(diff), file=sys.stderr)
    if stale:
        print(f"{' and '.join(stale)}: not what the results say; run {command}", file=sys.stderr)
        raise SystemExit(1)
    print(f"{' and '.join(names)}: as the results say")


if __name__ == "__main__":
    main(tyro.cli(Args))
