"""learned.py: report.py's first question. Did each method learn what it optimises, by its own held-out figures?

Tables of the policies' objectives before and after, of how far each moved from its reference, of reward models beside
the rule "the longer answer wins", of PPO's and GRPO's own figures, and of the sweeps that chose the defaults.
"""

import math
import statistics
from collections import Counter
from pathlib import Path

import numpy as np

from common import fail, read_json, wilson
from tables import Table, bracket, number, p_cell, share_cell, signed_interval, spread, with_interval
from verdicts import ALPHA, Paired, at, families, finite, paired_over_items

# What each method optimises, held out: (objective, before: a key or what holds by construction, after, key of n, scale,
# 1: higher is better, -1: lower). With policy = reference every margin is 0, and a tie counts half. The run records
# <after>_interval and, where before was measured too, <objective>_change_interval.
OBJECTIVES = {
    "sft": [("held-out loss, nats per token", "heldout_loss_base", "heldout_loss", None, 1, -1)],
    "dpo": [("held-out pairs ranked correctly, %", 0.5, "heldout_accuracy", "heldout_pairs", 100, 1),
            ("held-out margin", 0.0, "heldout_margin", "heldout_pairs", 1, 1),
            ("held-out loss", math.log(2), "heldout_loss", "heldout_pairs", 1, -1)],
    "ppo": [("score on fixed prompts", "scores_before", "scores_after", "fixed_prompts", 1, 1),
            ("watch model's score on them", "watch_scores_before", "watch_scores_after", "fixed_prompts", 1, 1)],
    "grpo": [("held-out pass@1, strict, %", "pass_1_before", "pass_1_after", "heldout_problems", 100, 1),
             ("held-out pass@1, flexible, %", "flexible_1_before", "flexible_1_after", "heldout_problems", 100, 1),
             ("held-out pass@k, %", "pass_k_before", "pass_k_after", "heldout_problems", 100, 1)],
    "kto": [("held-out AUC, %", 0.5, "heldout_auc", "heldout_rows", 100, 1),
            ("held-out rows classified correctly, %", 0.5, "heldout_accuracy", "heldout_rows", 100, 1)],
}  # fmt: skip
COUNTED = ("heldout_accuracy", "pass_1_after", "flexible_1_after")  # shares of n independent trials: Wilson's interval
LEARNED = (
    "Each run's own figures on held-out data, with 95 % intervals over conversations, prompts or problems. The change "
    "is paired on them, for PPO on the prompts whose answers ended both times. **Learned** rests on it: **yes**, its "
    "interval lies wholly on the better side; **worse**, on the other; not shown, it includes 0; `–`, no interval was "
    "recorded. Before DPO and KTO a figure holds by construction: the policy is its reference, a tie counts half. A "
    "reward model is compared with the better rule of length (the longer answer wins, or the shorter) on the same "
    "pairs, by McNemar's exact test. Of several seeds: mean ± sd, and the change's interval over seeds and items. "
    "Shares of older runs, without intervals of their own, have Wilson's and Newcombe's."
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


# ------------------------------------------------------------------ policies


def change_of_run(objective: tuple, fact: dict) -> tuple[float | None, list[float] | None]:
    """(after − before, its 95 % interval) of one run's figures; None for what was not recorded.

    The run's own interval of the change is symmetric about the mean of the paired changes, which for PPO covers
    only the prompts whose answers ended both times: its centre is not the difference of the two means."""
    _, before_key, after_key, n_key, _, _ = objective
    before = before_key if isinstance(before_key, float) else finite(fact.get(before_key))
    after, n = finite(fact.get(after_key)), finite(fact.get(n_key))
    if before is None or after is None:
        return None, None
    if isinstance(before_key, float):  # it holds by construction
        ends = interval_of(after_key, fact, n)
        return after - before, ends and [end - before for end in ends]
    if ends := fact.get(f"{after_key.removesuffix('_after')}_change_interval"):
        return sum(ends) / 2, ends
    if after_key in COUNTED and n:
        from statsmodels.stats.proportion import confint_proportions_2indep
        shares = [x for share in (after, before) for x in (round(share * n), n)]
        return after - before, list(map(float, confint_proportions_2indep(*shares, method="newcomb")))
    return after - before, None


def change_of(objective: tuple, facts: list[dict]) -> tuple[list[float | None], list[float] | None]:
    """(the change of each seed, the 95 % interval of their mean over seeds and items; None where not known)."""
    points, intervals = zip(*(change_of_run(objective, fact) for fact in facts))
    if len(facts) == 1 or None in points:
        return list(points), intervals[0] if len(facts) == 1 else None
    from scipy import stats
    # As verdicts.paired_over_seeds, with the mean of the seeds' own SE^2 for the items' part: a little too wide.
    items = statistics.fmean(((high - low) / 3.92) ** 2 for low, high in intervals) if all(intervals) else 0.0
    seeds = statistics.variance(points) / len(points)
    df = (seeds + items) ** 2 / (seeds**2 / (len(points) - 1)) if seeds else math.inf
    half = float(stats.t.ppf(1 - ALPHA / 2, df)) * math.sqrt(seeds + items)
    return list(points), [statistics.fmean(points) - half, statistics.fmean(points) + half]


def interval_of(key: str, fact: dict, n: float | None) -> list[float] | None:
    """The interval that a run recorded of a figure, else Wilson's of a share of n trials."""
    if n and key in COUNTED and finite(fact.get(key)) is not None and not fact.get(f"{key}_interval"):
        return wilson(fact[key] * n, n)
    return fact.get(f"{key}_interval")


def objective_line(rows: list[dict], objective: tuple) -> list[str] | None:
    """[title, n, before, after, change, learned] for a family of rows, one per seed; None where the runs didn't record
    this objective."""
    title, before_key, after_key, n_key, scale, better = objective
    facts = [row.get("training") or {} for row in rows]
    after = [finite(fact.get(after_key)) for fact in facts]
    before = [before_key if isinstance(before_key, float) else finite(fact.get(before_key)) for fact in facts]
    if None in after:
        return None
    changes, ends = change_of(objective, facts)
    decimals, n = 1 if scale == 100 else 3, facts[0].get(n_key)
    shown = number(after[0], decimals, scale)
    if interval := interval_of(after_key, facts[0], finite(n)):
        shown += f" {bracket(interval, decimals, scale)}"
    if len(rows) > 1:
        shown = spread(after, scale, decimals) + " sd"
    first = None if None in before else statistics.fmean(before)
    change = "–" if None in changes else signed_interval(statistics.fmean(changes), ends, decimals, scale)
    low, high = sorted(better * end for end in ends) if ends else (None, None)
    learned = "–" if low is None else "**yes**" if low > 0 else "**worse**" if high < 0 else "not shown"
    return [title, number(n), number(first, decimals, scale), shown, change, learned]


def objective_lines(rows: list[dict]) -> list[list[str]]:
    """objective_line for each objective of a family's method."""
    lines = [objective_line(rows, objective) for objective in OBJECTIVES.get(rows[0]["method"], ())]
    return [line for line in lines if line]


def headline(group: list[dict]) -> tuple[str, str] | None:
    """The line of a method's main objective (of GRPO the flexible pass@1, where it is recorded) in few words, and
    whether it was learned."""
    lines = objective_lines(group)
    line = next((line for line in lines if "flexible" in line[0]), lines[0] if lines else None)
    if not line:
        return None
    title, _, before, after, change, learned = line
    after = after if len(group) > 1 else after.split(" [")[0]  # the change has the interval that counts
    return f"{title}: {before} → {after}, change {change}; {learned}", learned.strip("*")


def learned_table(rows: list[dict], reward_models: list[dict]) -> Table | None:
    """Each method's own objective on held-out data, before and after: before any benchmark is read."""
    lines, notes = [], [LEARNED]
    for label, group in families(rows):
        mark = "\nanswers collapsed" * any(row.get("collapsed") for row in group)
        lines += [[label, *line[:-1], line[-1] + mark] for line in objective_lines(group)]
    if any("collapsed" in line[-1] for line in lines):
        notes.append("Answers collapsed: what the policy says has degenerated, whatever its objective says; the "
                     "verdicts say how.")
    if swept := list(dict.fromkeys(label for label, group in families(rows) if any(row.get("swept") for row in group))):
        notes.append(f"{', '.join(swept)}: runs of the sweep by which settings were chosen, on this seed. Where a "
                     "figure above was what they were chosen by, it is a little better than a new seed's.")
    for record in reward_models:
        if not record["note"] and finite(record.get("accuracy")) is not None:
            rule = finite(at(record, "longer_wins", "accuracy"))
            change = learned = "–"
            if paired_and_name := paired_with_length(record):
                paired, before = paired_and_name[0], rule and max(rule, 1 - rule)
                learned = "not shown" if paired.p >= ALPHA else "**yes**" if sum(paired.interval) > 0 else "**worse**"
                change = signed_interval(before and record["accuracy"] - before, paired.interval, 1, 100)
            cells = [number(record.get("n")), number(rule and max(rule, 1 - rule), 1, 100), share_cell(record), change]
            lines.append([record["label"], "held-out pairs ranked correctly, %\nbefore: the better rule of length",
                          *cells, learned])
    header = ["row", "own objective", "n", "before", "after", "change", "learned"]
    return Table(header, lines, 2, notes) if lines else None


def moved_table(rows: list[dict]) -> Table | None:
    """How far each policy moved from its reference, beside the part that measurement and rounding add; None if no run
    recorded it."""
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

REWARD = {  # figures of a reward model: column title -> (keys in its file, scale, decimals)
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


def paired_with_length(record: dict) -> tuple[Paired, str] | None:
    """(accuracy minus that of the better rule of length, paired on the same pairs; the rule's name), from a judge's
    per-pair outcomes: strings of "1" right, "0" wrong, "-" a tie. None where they are not recorded. A tie of a reward
    model carries no information; a tie of a language model, whose two orders disagree, is half right."""
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
    gained, lost = pairs["1", "0"], pairs["0", "1"]  # a tie of either carries no information
    d = np.array([1] * gained + [-1] * lost + [0] * (len(model) - gained - lost))
    return paired_over_items(d, np.ones(len(d), int), True), name


def against_length(record: dict) -> str:
    """One sentence: does the reward model beat the rule that the longer answer wins, on the same pairs?"""
    longer = share_cell(record.get("longer_wins"))
    shares = (f"on the same {number(record.get('n'))} held-out pairs: accuracy {share_cell(record)} %, "
              f"longer-wins {longer} %")
    if not (paired_and_name := paired_with_length(record)):
        return (f"Whether {record['label']} beats longer-wins is not known, since its record has no outcomes pair by "
                f"pair; {shares}.")
    paired, name = paired_and_name
    word = ("is not distinguishable from" if paired.p >= ALPHA else "beats" if sum(paired.interval) > 0 else
            "is worse than")
    return (f"{record['label']} {word} {name} {shares}, paired difference {bracket(paired.interval, 1, 100)} points, "
            f"{p_cell(paired.p)}.")


def reward_table(records: list[dict]) -> Table:
    """A line per reward model, and the mean ± sd of a family's seeds; rm_v1 as not run if no record belongs to it."""
    lines, families = [], {}
    for record in records:
        cells = []
        for keys, scale, decimals in REWARD.values():
            beside, text = at(record, *keys[:-1]), number(at(record, *keys), decimals, scale)
            if keys[-1] == "accuracy":
                text = share_cell(beside) + f"\nn = {number(at(beside, 'n'))}" * (keys[0] == "length_matched")
            cells.append(text + f" / {number(at(beside, 'sd'), decimals)}" * (keys[-1] == "mean"))
        about = ["–" if record.get(key) is None else str(record[key]) for key in ("seed", "config_hash")]
        lines.append([record["label"], *about, number(record.get("n")), *cells])
        families.setdefault(record.get("family"), {}).setdefault(record.get("seed"), record)
    for family, seeds in families.items():
        if family and len(seeds) > 1:
            seed_records = list(seeds.values())  # of one train_invariants, which are part of a family's hash
            cells = [spread([at(r, *keys) for r in seed_records], *shown) for keys, *shown in REWARD.values()]
            label = "mean ± sd" + "‡" * bool(seed_records[0]["note"])
            lines.append([label, ", ".join(map(str, seeds)), f"family\n{family}", "", *cells])
    if all(record["note"] for record in records):
        lines.append(["rm_v1", "not run"] + ["–"] * (len(REWARD) + 2))
    notes = [REWARD_LEGEND] * bool(records) + [record["note"] for record in records if record["note"]]
    if len({str(record.get("longer_wins")) for record in records}) > 1:
        notes.append("Longer-wins differs, so not all saw the same pairs: compare each accuracy with its own only.")
    return Table(["row", "seed", "config_hash", "pairs", *REWARD], lines, 3, notes)


def on_policy_table(records: list[dict]) -> Table:
    """A line per run of one method: the KL at its end, and each number that it has from before and after training."""
    sides = [record.get(side) or {} for record in records for side in ("before", "after")]
    keys = list(dict.fromkeys(key for side in sides for key, value in side.items() if finite(value) is not None))
    lines, notes = [], ["before → after: the run's own figures, without a standard error. KL: mean over the updates of "
                        "its last tenth, from samples; GRPO's (at β = 0) takes the sampler's log-probs, whose rounding in "
                        "bfloat16 adds to it, so that it is above 0 on a policy that has not moved."]
    for record in records:
        curve = at(record, "curves", "kl") or [None]
        last = curve[-math.ceil(len(curve) / 10) :]
        kl = None if None in map(finite, last) else statistics.fmean(last)
        both = [[number(at(record, side, key)) for side in ("before", "after")] for key in keys]
        changes = ["–" if a == b == "–" else f"{a} → {b}" for a, b in both]
        lines.append([record["label"], number(record.get("updates")), number(kl), *changes])
        models = {"rewarded": record.get("reward_model"), "watched": record.get("watch_model")}
        phrases = [f"{verb} by {at(m, 'name')} ({at(m, 'config_hash')})" for verb, m in models.items() if m]
        notes += [f"{record['label']}: {', '.join(phrases)}."] * bool(phrases) + [record["note"]] * bool(record["note"])
    return Table(["row", "updates", "KL at\nthe end", *keys], lines, 1, notes)


# ------------------------------------------------------------------ sweeps

SWEEPS = (
    "One run per setting, written by tools/sweep.py, which states the rule by which one is chosen; seed 41, held-out "
    "parts of the training data, no benchmark. Value with its 95 % interval; tokens: mean of an answer. Chosen: the "
    "rule's winner. Not admissible: its answers end less often than SFT's by more than 5 points, refusals are more "
    "than 10 points above SFT's, or its KL to SFT is above 10 nats."
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
        status = "**chosen**" if record.get("chosen") else "" if record.get("admissible", True) else "not admissible"
        objective = record.get("objective") or ""
        if finite(record.get("before")) is not None:
            objective += f", before {number(record['before'], 3)}"
        cells = [sweep_value(record), number(record.get("eos_rate"), 1, 100),
                 number(record.get("completion_tokens"), 0), number(record.get("kl", record.get("kl_fp32")), 2),
                 number(minutes, 1), status]
        config = f"`{record.get('config_hash')}`"
        lines.append([sweep_base(record), record["method"], setting, objective, *cells, config])
    header = ["base", "method", "setting", "objective", "value", "answers\nthat end, %", "tokens", "KL, nats",
              "GPU\nminutes", "", "config_hash"]
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

    def sweep_key(record: dict) -> tuple:
        method = record["method"]
        return (sweep_base(record), methods.index(method) if method in methods else len(methods), method,
                not record["lr"] > 0, record["lr"] if record["lr"] > 0 else 0.0, str(record["setting"]))
    return sorted(records, key=sweep_key)
