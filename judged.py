"""judged.py: what judge.py measured, as report.py shows it: win rates, how far a judge is to be trusted, held-out
answers, and DPO's own criterion.
"""

import json
import math
import statistics
from collections.abc import Sequence

import numpy as np

from guardrails import ENDS, LENGTH, LOOPS, REFUSES, collapsed
from learned import against_length, paired_with_length
from tables import Table, number, with_interval
from verdicts import ALPHA, at, families, finite, label_rows, once, paired_over_seeds, same_policy

GUARDRAILS = {  # figures of the held-out answers: column title -> (key in guardrails.json, scale, decimals)
    "n": ("n", 1, 0), "EOS, %": ("eos_rate", 100, 1), "refusals, %": ("refusal_rate", 100, 1),
    "distinct-1": ("distinct_1", 1, 3), "distinct-2": ("distinct_2", 1, 3), "distinct-3": ("distinct_3", 1, 3),
    "longest\nrepeat": ("longest_repeat_mean", 1, 1), "loops, %": ("repetition_rate", 100, 1),
    "other\nlanguage, %": ("language_drift_rate", 100, 1),
}  # fmt: skip
FEWEST = 20  # judged prompts; the bootstrap's interval of two wins in two has no width


# ------------------------------------------------------------------ the judge


def independence(record: dict) -> str:
    """A judge's independence by a comparison's record: "circular", "not independent …", "independent" or "" (not
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


def judge_evidence(record: dict, reward_models: list[dict]) -> str:
    """Does the judge beat "the longer answer wins", paired, on held-out pairs? Only then is it evidence."""
    heldout = checked_pairs(record, reward_models)
    if not heldout or not paired_with_length(heldout):
        model = at(record, "judge", "model")
        return f"Whether {model} beats \"the longer answer wins\" on held-out pairs is not known."
    word = "evidence" if is_evidence(record, reward_models) else "no evidence by themselves"
    return f"{against_length(heldout)} Its win rates are {word}."


def checked_pairs(record: dict, reward_models: list[dict]) -> dict | None:
    """A judge's outcomes on held-out pairs: from a reward model's own record, or from judge.py's language model check.
    """
    judge = record.get("judge") or {}
    if judge.get("heldout"):
        return {"label": judge.get("model"), **judge["heldout"]}
    judges = [r for r in reward_models
              if judge.get("kind") == "reward" and r.get("adapter_sha256") == judge.get("sha256")]
    return judges[0] if judges else None


def is_evidence(record: dict, reward_models: list[dict]) -> bool | None:
    """Does the judge beat the better rule of length, p < 0.05, on the same pairs? None where that is not known."""
    heldout = checked_pairs(record, reward_models)
    paired_and_name = paired_with_length(heldout) if heldout else None
    return paired_and_name and paired_and_name[0].p < ALPHA and sum(paired_and_name[0].interval) > 0


# ------------------------------------------------------------------ win rates


def pool(records: list[dict]) -> dict:
    """The figures of a comparison over seeds. One seed: judge.py's own. Several: over the prompts that all were asked,
    which are crossed with the seeds, the interval of verdicts.paired_over_seeds. Length-controlled: the mean of the
    seeds' rates, SE^2 = s^2(seed rates)/S + the mean of the seeds' own SE^2, a little too wide."""
    summaries = [record.get("summary") or {} for record in records]
    scored = [{key: score for key, score, _ in record.get("scores") or [] if score is not None} for record in records]
    n = min((s.get("n") or 0) - (s.get("unparsable") or 0) for s in summaries)
    if len(records) == 1:
        return {"n": n, "seeds": 1, **{key: summaries[0].get(key) for key in (
            "win_rate", "win_rate_ci95", "length_controlled_win_rate", "length_controlled_ci95")}}
    shared = sorted(set.intersection(*map(set, scored)))
    pooled = {"n": len(shared), "seeds": len(records)}
    if len(shared) > 1:
        d = np.array([[scores[key] for key in shared] for scores in scored])  # [S, n]
        paired = paired_over_seeds(d, np.ones(len(shared), int))
        low, high = paired.interval
        pooled |= {"win_rate": float(d.mean()), "win_rate_ci95": [max(0.0, low), min(1.0, high)]}
    rates = [s.get("length_controlled_win_rate") for s in summaries]
    ends = [s.get("length_controlled_ci95") or [None] for s in summaries]
    if None not in map(finite, [*rates, *(end for pair in ends for end in pair)]):
        variances = [((high - low) / 3.92) ** 2 for low, high in ends]
        half = 1.96 * math.sqrt(statistics.variance(rates) / len(rates) + statistics.fmean(variances))
        rate = statistics.fmean(rates)
        pooled |= {"length_controlled_win_rate": rate,
                   "length_controlled_ci95": [max(0.0, rate - half), min(1.0, rate + half)]}
    return pooled


def judged_families(judge: list[dict], rows: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """[(label of a, label of b, its records, one per seed)]: the comparisons of a judge, the seeds of a family and of
    what it is compared with together, which counts the seeds that were judged; judges in the order of their records."""
    judged = {(row.get("name"), row.get("adapter_sha256")) for record in judge for side in "ab"
              if (row := at(record, "rows", side))}
    rows = [row for row in rows if (row["name"], row["adapter_sha256"]) in judged]
    family = {id(row): (label, [(r["name"], r["adapter_sha256"]) for r in group]) for label, group in families(rows)
              for row in group}

    def label_of(row: dict) -> str:
        policy = row.get("name"), row.get("adapter_sha256")
        return next((label for label, group in family.values() if policy in group), judged_label(row, rows))

    by_comparison = {}
    for record in judge:
        a, b = (label_of(at(record, "rows", side) or {"name": record.get(side)}) for side in "ab")
        who = [at(record, "judge", key) for key in ("kind", "model", "sha256")]
        by_comparison.setdefault(json.dumps([who, a, b, record["note"]]), (a, b, []))[2].append(record)
    return list(by_comparison.values())


def own_criterion(row: dict, rows: list[dict], judge: list[dict], reward_models: list[dict]) -> str:
    """DPO's own criterion: the judged win rate against its SFT row, with its whole interval, is above 50 %, by the
    judge that was named to decide, that beats "the longer answer wins" and shares no training prompt with it, over
    FEWEST prompts or more; a line per judge, the seeds of the row's family pooled, whichever protocol has them."""
    family = next((group for _, group in families(rows) if any(same_policy(row, r) for r in group)), [row])
    adapters, lines = {r["adapter_sha256"]: r["parent"]["adapter_sha256"] for r in family if r.get("parent")}, []
    against_parent = [record for record in judge if independence(record) != "circular" and at(
        record, "rows", "b", "adapter_sha256") == adapters.get(at(record, "rows", "a", "adapter_sha256"), "none")]
    for _, _, records in judged_families(against_parent, rows):
        pooled, record = pool(records), records[0]
        low = finite((pooled.get("win_rate_ci95") or [None])[0])
        if low is None:
            continue
        met = "met" if low > 0.5 else "not met"
        if at(record, "judge", "decides") is False:
            met = "beside it (not the judge that decides)"
        elif any(record.get("collapsed") for record in records):
            met = "open (its answers collapsed)"
        elif pooled["n"] < FEWEST:
            met = "open (too few prompts)"
        elif any(independence(record).startswith("not") for record in records):
            met = "open (the judge is not independent)"
        elif not is_evidence(record, reward_models):
            met = "open (the judge is not shown to beat longer-wins, so it is no evidence by itself)"
        seeds = f" in {pooled['seeds']} seeds" * (pooled["seeds"] > 1)
        lines.append(f"{met}: wins {win_rate_cell(pooled)} % of {number(pooled['n'])} prompts{seeds} against SFT, "
                     f"length-controlled {controlled_cell(pooled)}, by {at(record, 'judge', 'model')}, "
                     + (independence(record) or "whose training prompts are not known"))
    return "\n".join(lines) or "open: not judged against SFT"


def win_rates(records: dict[str, list[dict]], rows: list[dict]) -> list[str]:
    """A sentence per judge: each row's win rate, seeds pooled, and beside it the length-controlled one."""
    by_judge = {}
    told = [record for record in records["judge"] if not record["note"] and not at(record, "judge", "circular")]
    for a, b, of_judge in judged_families(told, rows):
        judge = of_judge[0].get("judge") or {}
        name = f"{judge.get('model')}" + " in both orders" * (judge.get("kind") != "reward")
        by_judge.setdefault((name, b), []).append((a, of_judge))
    lines = []
    for (name, b), compared in by_judge.items():
        pooled = [(a, pool(of_judge)) for a, of_judge in compared]
        fallen = {a for a, of_judge in compared if any(record.get("collapsed") for record in of_judge)}
        rates = [f"{a} none, its answers collapsed" if a in fallen else
                 f"{a} {win_rate_cell(p)} (length-controlled {controlled_cell(p)})" for a, p in pooled]
        text = f"**Win rate** against {b}, judged by {name}, %: {', '.join(rates)}."
        every = [record for _, of_judge in compared for record in of_judge]
        dependent = {a: independence(r) for a, of_judge in compared for r in of_judge
                     if independence(r).startswith("not")}
        text += "".join(f" For {label} the judge is {why}." for label, why in dependent.items())
        text += " Its training prompts are not known." * all(not independence(record) for record in every)
        lines.append(text)
    return lines


def win_rate_cell(record: dict) -> str:
    summary = record.get("summary") or record  # or pooled figures
    return with_interval(summary.get("win_rate"), summary.get("win_rate_ci95"), 1, 100)


def controlled_cell(record: dict) -> str:
    summary = record.get("summary") or record
    return with_interval(summary.get("length_controlled_win_rate"), summary.get("length_controlled_ci95"), 1, 100)


def judged_label(row: dict, rows: list[dict]) -> str:
    """The row's label in the tables; its name where they hold no such name (with its seed, if they hold the adapter);
    with its seed, or else the adapter's hash, where no row of that name has it: it was judged, but not evaluated."""
    known = {r["adapter_sha256"]: label for label, r in label_rows(once(rows)) if r["name"] == row.get("name")}
    if row.get("adapter_sha256") in known:
        return known[row.get("adapter_sha256")]
    seeds = [label.removeprefix(r["name"]) for label, r in label_rows(once(rows)) if r["adapter_sha256"]
             and r["adapter_sha256"] == row.get("adapter_sha256")]
    if seeds and not known:
        return str(row.get("name")) + seeds[0]  # best of N: its policy's adapter under another name
    if not known:
        return str(row.get("name"))
    return f"{row.get('name')}-s{row['seed']}" if row.get("seed") is not None else \
        f"{row.get('name')}@{(row.get('adapter_sha256') or 'none')[:8]}"


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
        if record.get("collapsed"):
            label, rates = f"{label}\n**answers collapsed**", [f"({rate})" for rate in rates]
            notes.append(f"In parentheses, since it is no evidence: {a}'s answers collapsed, {record['collapsed']}.")
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


# ------------------------------------------------------------------ held-out answers


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
    for row in record.get("rows") or []:
        if why := collapsed(row, reference_row(record)):
            notes.append(f"**{judged_label(row, rows)}'s answers collapsed**: {why}.")
    notes.append(f"Collapsed: more than {100 * REFUSES:.0f} % refusals or {100 * LOOPS:.0f} % loops, answers that end "
                 f"less than {ENDS:g} times as often as {reference}'s, or of less than {LENGTH:g} times its tokens.")
    notes += ["≤: best of N, for which log N − (N − 1) / N bounds the KL."] * bound
    notes += [record["note"]] * bool(record["note"])
    return Table(["row", "tokens", *GUARDRAILS, f"KL to {reference}", "‖ΔW‖ / ‖W‖,\n%"], lines, 1, notes)


def reference_row(record: dict) -> dict:
    """The figures of the row that the others are compared with, of a guardrails.json."""
    return next((row for row in record.get("rows") or [] if same_policy(row, record.get("reference") or {})), {})


def mark_collapsed(rows: list[dict], records: dict[str, list[dict]]) -> None:
    """Sets "collapsed" of each row, and of each comparison for its row a: how its answers to the judge's prompts have
    collapsed (guardrails.collapsed), "" where they have not or were not measured."""
    collapses = {(row.get("name"), row.get("adapter_sha256")): collapsed(row, reference_row(record))
                 for record in records["guardrails"] for row in record.get("rows") or []}
    for row in rows:
        row["collapsed"] = collapses.get((row["name"], row["adapter_sha256"]), "")
    for record in records["judge"]:
        a = at(record, "rows", "a") or {}
        record["collapsed"] = collapses.get((a.get("name"), a.get("adapter_sha256")), "")


def mark_seeds(records: dict[str, list[dict]]) -> None:
    """Sets "seed" of each judged row, from the record of its run; None without one. judged_label names rows by it."""
    seeds = {run.get("adapter_sha256"): run.get("seed") for run in records["runs"]}
    judged = [row for record in records["guardrails"] for row in record.get("rows") or []]
    judged += [at(record, "rows", side) or {} for record in records["judge"] for side in "ab"]
    for row in judged:
        row["seed"] = seeds.get(row.get("adapter_sha256"))


def collapse_of(group: Sequence[dict]) -> str:
    """The warning for a family's rows, one per seed: "**answers collapsed**: 98 % refusals", or nothing."""
    fallen = [row["collapsed"] for row in group if row.get("collapsed")]
    seeds = f" in {len(fallen)} of {len(group)} seeds" * (len(group) > 1)
    return f"**answers collapsed**{seeds}: {fallen[0]}" if fallen else ""


def eos_rates(guardrails: list[dict]) -> dict[str | None, float]:
    """{adapter: share of its answers to the judge's prompts that end with EOS}: the same prompts for every row."""
    return {row.get("adapter_sha256"): row.get("eos_rate") for record in guardrails if not record["note"]
            for row in record.get("rows") or [] if not row.get("best_of")}
