"""report.py: what results/ holds -> the tables that compare the rows, on the terminal and in two generated files.

A score carries its standard error se (lm-eval's own, over the items). The difference of two rows a and b, in points, is
    delta = 100 (a - b)    with    se(delta) = 100 sqrt(se_a^2 + se_b^2);    within noise, ~, when |delta| < 2 se(delta).

1. A report is about one train_invariants, and a table about one protocol (plain, chat) and one eval_hash. A results file
   that holds more is refused, naming the rows and the fields that differ; --group HASH picks.
2. A method is compared with base and with the SFT row it was trained from: the parent that the row names, else the only
   candidate. Where two could be meant, the difference is left out and a note says so.
3. The same config_hash with another adapter hash is a run that did not reproduce: both rows stay, the later marked †.
4. What is missing is shown as missing, never as zero: a row as "planned", a score as "–", a standard error as "?".
5. A reward model scores answers and has no benchmark row: its own table comes from rm/*.json, beside the baseline "the
   longer answer wins". What PPO and GRPO say of themselves comes from ppo/*.json and grpo/*.json. A record of other
   train_invariants than the rows' is listed with ‡ and both hashes, and left out where --group names theirs.

    python report.py            print the tables; write results/README.md, and README.md between its two markers
    python report.py --check    write nothing; exit 1 with a diff when either file disagrees with the results
"""

import difflib
import math
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from common import SCHEMA_VERSION, fail, read_json, read_results, sha256_json, write_text


@dataclass(frozen=True)
class Args:
    results: str = "results"
    """Directory that holds metrics.json, rm/, ppo/ and grpo/; the full tables go to README.md inside it."""
    readme: str = "README.md"
    """File whose section between the two results markers gets the compact table; "none": no such file."""
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
TRAINING = {  # facts of a training run: key in run.json's metrics -> column title
    "heldout_loss_base": "held-out loss\nof the base", "heldout_loss": "held-out\nloss",
    "heldout_accuracy": "held-out\naccuracy", "eos_rate": "EOS rate", "tokens": "tokens", "wall_time_s": "minutes",
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
PROTOCOLS = {"plain": "no chat template", "chat": "chat template applied, few-shot examples as turns"}
SMALL = 200  # items; with fewer, the standard error of a score near 50 % is above 3.5 points
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ROW_KEYS = (
    "name phase method model revision config_hash adapter_sha256 weights_sha256 train_invariants eval_hash eval seed "
    "protocol metrics n"
).split()
LEGEND = (
    "Scores in % ± standard error; n counts items, for IFEval prompts. Differences in points ± √(se² + se²): **bold** "
    "at twice that or more, `~` within noise, `?` where a standard error is missing. `–` is not measured."
)


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
    """{"rm", "ppo", "grpo": what that folder's files hold}, with a `label`, the `plot` beside the file ("": none), and a
    `note` on one whose train_invariants are not those of `rows`. Fails on a newer schema."""
    records, climb = {folder: [] for folder in ("rm", "ppo", "grpo")}, rows[0] if rows else None
    for folder, path in [(folder, path) for folder in records for path in sorted((results / folder).glob("*.json"))]:
        record, plot = {"name": path.stem, **read_json(path)}, path.with_suffix(".png")
        version = record.get("schema_version")
        if not isinstance(version, int):
            fail(f"{path} is not a results file (schema_version {version})")
        if version > SCHEMA_VERSION:
            fail(f"{path} has schema_version {version}, newer than this code's {SCHEMA_VERSION}; update the code")
        climb = climb or record  # without rows, the first record says what the others must agree with
        own, theirs = (r.get("train_invariants") or "unknown" for r in (record, climb))
        if rows and own != theirs and theirs in group:
            continue
        note = f"‡ {record['name']}: train_invariants {own}, where {climb['name']} has {theirs}; no part of this climb."
        record |= {"label": record["name"] + "‡" * (own != theirs), "note": note if own != theirs else ""}
        records[folder].append(record | {"plot": f"{folder}/{plot.name}" if plot.is_file() else ""})
    return {folder: sorted(found, key=lambda record: bool(record["note"])) for folder, found in records.items()}


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
    if row["method"] in ("base", method):
        return []
    found = [r for r in rows if r["method"] == method]
    if method == "sft" and row.get("parent"):
        return [r for r in found if r["adapter_sha256"] == row["parent"]["adapter_sha256"]]
    return [r for r in found if r["name"] in LADDER] or found


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


def score_cell(points: float | None, stderr: float | None) -> str:
    return "–" if points is None else f"{points:.1f} ± " + ("?" if stderr is None else f"{stderr:.1f}")


def number(value: object, decimals: int = 3, scale: int = 1) -> str:
    if finite(value) is None:
        return "–"
    text = f"{value:,}" if isinstance(value, int) and scale == 1 else f"{scale * value:z.{decimals}f}"
    return text.replace("-", "−")


def delta_cell(points: float | None, stderr: float | None, clear: bool | None, short: bool = False) -> str:
    """`**+5.0 ± 0.7**` beyond noise, `+0.5 ± 0.7 ~` within it, `+0.5 ± ?` not to be told; short: without the ±."""
    if points is None:
        return "–"
    size = f"{abs(points):.1f}"
    text = size if size == "0.0" else ("+" if points > 0 else "−") + size
    if not short:
        text += " ± " + ("?" if stderr is None else f"{stderr:.1f}")
    return {True: f"**{text}**", False: f"{text} ~", None: f"{text} ?" if short else text}[clear]


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
    clear = "bold red" if "−" in cell else "bold green"
    return Text(cell.strip("*"), style=clear if cell.startswith("**") else "dim" if cell.endswith(("~", "–")) else "")


def scores_table(rows: list[dict], against_base: bool = False) -> Table:
    """The current state: every rung, scored or planned; against_base adds each difference to base in brackets."""
    rungs = [(*rung(row["phase"], row["name"]), label, row) for label, row in label_rows(rows)]
    names = {row["name"] for row in rows}
    rungs += [(*rung(phase, name), name, None) for name, phase in LADDER.items() if name not in names]
    lines = []
    for phase, _, label, row in sorted(rungs, key=lambda r: r[:2]):
        cells = ["planned"] + [""] * (len(METRICS) - 1)
        if row:
            cells = [score_cell(*score(row, column)) for column in METRICS]
        if row and against_base and len(bases := references(row, rows, "base")) == 1:
            deltas = [delta(score(row, column), score(bases[0], column)) for column in METRICS]
            changes = [delta_cell(*d, short=True) for d in deltas]
            cells = [cell if change == "–" else f"{cell} ({change})" for cell, change in zip(cells, changes)]
        lines.append([str(phase), label, *cells])
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
    return Table(header, lines, 2, notes)


def delta_table(rows: list[dict], method: str) -> Table | None:
    """Every row minus its reference of `method` ("base" or "sft"), in points."""
    labelled, lines, notes = label_rows(rows), [], []
    for label, row in labelled:
        found = references(row, rows, method)
        names = [name for name, r in labelled if any(r is f for f in found)]
        if len(found) == 1:
            cells = [delta_cell(*delta(score(row, column), score(found[0], column))) for column in METRICS]
            lines.append([f"{label} − {names[0]}", *cells])
        elif found:
            notes.append(f"{label} is left out: it could be compared with {' or '.join(names)}.")
        elif method == "sft" and (row.get("parent") or {}).get("method") == "sft":
            notes.append(f"{label} is left out: {row['parent']['name']}, from which it was trained, has no row here.")
    return Table(["difference", *METRICS], lines, 1, notes) if lines or notes else None


def training_table(rows: list[dict]) -> Table | None:
    """What the training runs say of themselves: a line an adapter, a column for each fact that any of them has."""
    once = {(row["name"], row["config_hash"], row["adapter_sha256"]): row for row in rows if row.get("training")}
    facts = {key for row in once.values() for key in row["training"]}
    titles = {key: title for key, title in TRAINING.items() if key in facts}

    def cell(key: str, value: object) -> str:
        if finite(value) is not None and key == "wall_time_s":
            return f"{value / 60:.1f}"
        if finite(value) is not None and key.endswith(("accuracy", "rate")):
            return f"{100 * value:.1f} %"
        return number(value)

    lines = [
        [label, row["method"], str(row["seed"]), row["config_hash"], *(cell(k, row["training"].get(k)) for k in titles)]
        for label, row in label_rows(list(once.values()))
    ]
    return Table(["row", "method", "seed", "config_hash", *titles.values()], lines, 4) if lines else None


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


def records_report(records: dict[str, list[dict]]) -> list[str | Table]:
    blocks = ["## Reward models", reward_table(records["rm"]), *map(against_length, records["rm"])]
    for method in ("ppo", "grpo"):
        if records[method]:
            blocks += [f"## On-policy runs: {method.upper()}", on_policy_table(records[method])]
    plots = [record["plot"] for found in records.values() for record in found if record["plot"]]
    return blocks + ["Plots: " + ", ".join(f"[{plot}]({plot})" for plot in plots)] * bool(plots)


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


def full_report(tables: dict[str, list[dict]], records: dict[str, list[dict]]) -> list[str | Table]:
    """Blocks of text and tables, for results/README.md and the terminal."""
    blocks = ["# Results"]
    for protocol, rows in tables.items():
        blocks += [f"## {protocol.capitalize()} protocol: {PROTOCOLS.get(protocol, '')}", *describe(rows)]
        blocks += ["### Current state, %", scores_table(rows)]
        for method, title in (("base", "base"), ("sft", "SFT")):
            if table := delta_table(rows, method):
                blocks += [f"### Change against {title}, points", table]
    if not tables:
        blocks.append(scores_table([]))
    blocks += records_report(records)
    if table := training_table([row for rows in tables.values() for row in rows]):
        blocks += ["## Training", table]
    return [*blocks, LEGEND]


def compact_report(tables: dict[str, list[dict]], records: dict[str, list[dict]]) -> list[str | Table]:
    """README.md's section: the current state with each difference to base, and the reward models of these rows."""
    blocks = []
    for protocol, rows in tables.items():
        blocks.append(f"**{protocol.capitalize()} protocol**, % (difference to base, points)")
        blocks += [scores_table(rows, against_base=True), *describe(rows)]
    rewards = [against_length(record) for record in records["rm"] if not record["note"]] or ["rm_v1: planned."]
    return [*(blocks or [scores_table([])]), *(f"**Reward model** {text}" for text in rewards), LEGEND]


def markdown(blocks: list[str | Table]) -> str:
    return "\n\n".join(block if isinstance(block, str) else block.markdown() for block in blocks) + "\n"


def show(blocks: list[str | Table]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # a log: rich would fold the tables at 80 columns
        console = Console(highlight=False, width=140)
    for block in blocks:
        if isinstance(block, Table):
            block.show(console)
        else:
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


def main(args: Args) -> None:
    # 1. The rows, and whether they may stand together.
    results = Path(args.results)
    if not results.is_dir():
        fail(f"no such directory: {results}; --results names the one that holds metrics.json")
    tables = tables_of(read_rows(results / "metrics.json"), args.group, results / "metrics.json")
    records = read_records(results, [row for rows in tables.values() for row in rows], args.group)

    # 2. Both files as they should read.
    flags = {"--results": args.results, "--readme": args.readme, "--group": " ".join(args.group)}
    defaults = {"--results": Args.results, "--readme": Args.readme, "--group": ""}
    given = [f"{flag} {value}" for flag, value in flags.items() if value != defaults[flag]]
    command = " ".join(["python report.py", *given])
    stamp = f"<!-- written by `{command}`; edits are lost -->\n\n"
    texts = {results / "README.md": stamp + markdown(full_report(tables, records))}
    if args.readme != "none":
        readme = Path(args.readme)
        texts[readme] = with_section(readme, stamp + markdown(compact_report(tables, records)) + "\n")

    # 3. Compare, or show and write.
    if not args.check:
        show(full_report(tables, records))
        for path, text in texts.items():
            write_text(path, text)
        print("\nwrote " + " and ".join(map(str, texts)))
        return
    stale = []
    for path, text in texts.items():
        found = path.read_text(encoding="utf-8") if path.is_file() else ""
        if found != text:
            stale.append(str(path))
            before, after = found.splitlines(), text.splitlines()
            diff = difflib.unified_diff(before, after, str(path), "the results say", lineterm="")
            print("\n".join(diff), file=sys.stderr)
    if stale:
        print(f"{' and '.join(stale)}: not what the results say; run {command}", file=sys.stderr)
        raise SystemExit(1)
    print(f"{' and '.join(map(str, texts))}: as the results say")


if __name__ == "__main__":
    main(tyro.cli(Args))
