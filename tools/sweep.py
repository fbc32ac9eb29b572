"""Reads the runs of a sweep, applies the selection rule, writes one small record per run: `make sweep`'s last step.

The rule, per method, fixed before the runs. Every run has the same budget of data and steps and the seed 41; nothing here
is measured on a benchmark.

    sft        the lowest held-out loss of base + adapter in bfloat16
    dpo, kto   the highest length-controlled win rate against SFT, on held-out preference prompts, judged by a reward model
               of part B (whose pairs train nothing else; part J's model is kept for the comparison's own judge)
    ppo        the largest mean change of the reward model's score over the fixed prompts, paired
    grpo       the highest held-out pass@1, strict
    admissible among dpo, kto and ppo: a rate of answers that end at most 5 points below SFT's on the same prompts, at
               most 10 nats of KL to SFT, measured in fp32, and at most 10 points more refusals than SFT

    python tools/sweep.py runs/sweep --results results/sweeps

A run's directory is named by its method and its setting: dpo+lr_5e-5+beta_0.3. Beside the records it writes
<runs>/chosen.mk: the flags of the winners, for make.

The bound on refusals was added after the first sweep, and before any run that it judges: a reward model may pay for a
collapse. On Qwen2.5-Coder-0.5B-Instruct all of PPO's first four settings end in one refusal for nearly every prompt,
which scores above SFT's answers (docs/recipes.md). `chosen` in a record means the rule's winner; whether it becomes a
default is decided there, with the reason.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from guardrails import is_refusal

EOS_MARGIN, LARGEST_KL, REFUSAL_MARGIN = 0.05, 10.0, 0.1
OBJECTIVES = {"sft": "held-out loss", "dpo": "length-controlled win rate", "kto": "length-controlled win rate",
              "ppo": "score change", "grpo": "held-out pass@1"}


@dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[str]
    """Directory of the sweep's runs; its judge/summaries has what judge.py wrote about them."""
    results: str = "results/sweeps"
    """Where <base>-<run>.json goes."""


def refusal_rates(completions: Path) -> dict[str, float]:
    """Shares of PPO's fixed prompts that are refused before and after, from its completions.jsonl."""
    answers = [json.loads(line) for line in completions.read_text(encoding="utf-8").splitlines()]
    return {key: sum(is_refusal(a[when]["text"]) for a in answers) / len(answers)
            for key, when in (("refusal_rate_before", "before"), ("refusal_rate", "after"))}


def measured(method: str, run: Path, metrics: dict, judge: Path, guardrails: dict[str, dict]) -> dict:
    """Value and 95 % interval of a run's objective, and what decides whether it is admissible."""
    name = run.name
    sft, row = guardrails.get("sft_v2", {}), guardrails.get(name, {})
    kl = metrics.get("kl_reference")
    if method == "sft":
        return {"value": metrics["heldout_loss"], "interval": metrics["heldout_loss_interval"]}
    if method == "grpo":
        value, n = metrics["pass_1_after"], metrics["heldout_problems"]
        return {"value": value, "interval": common.wilson(round(value * n), n), "before": metrics["pass_1_before"],
                "kl": kl, "change_interval": metrics["pass_1_change_interval"],
                "flexible_before": metrics.get("flexible_1_before"), "flexible_after": metrics.get("flexible_1_after"),
                "flexible_change_interval": metrics.get("flexible_1_change_interval"),
                "completion_tokens": metrics["completion_tokens_after"]}
    if method == "ppo":
        interval = metrics["scores_change_interval"]
        return {"value": interval and sum(interval) / 2, "interval": interval, "kl": kl,
                "eos_rate_before": 1 - metrics["missing_eos_before"], "eos_rate": 1 - metrics["missing_eos_after"],
                "completion_tokens_before": metrics["completion_tokens_before"],
                "completion_tokens": metrics["completion_tokens_after"],
                "watch_interval": metrics.get("watch_scores_change_interval"),
                **refusal_rates(run / "completions.jsonl")}
    heldout = "heldout_auc" if method == "kto" else "heldout_accuracy"
    summary = common.read_json(judge / f"{name}_vs_sft_v2.json")["summary"]
    return {"value": summary["length_controlled_win_rate"], "interval": summary["length_controlled_ci95"], "kl": kl,
            "win_rate": summary["win_rate"], "unfinished_lost_win_rate": summary.get("unfinished_lost_win_rate"),
            "judged_prompts": summary["n"], "eos_rate_before": sft.get("eos_rate"), "eos_rate": row.get("eos_rate"),
            "completion_tokens_before": sft.get("tokens_mean"), "completion_tokens": row.get("tokens_mean"),
            "refusal_rate_before": sft.get("refusal_rate"), "refusal_rate": row.get("refusal_rate"),
            "heldout_accuracy": metrics.get(heldout), "heldout_accuracy_interval": metrics.get(f"{heldout}_interval")}


def admissible(figures: dict) -> bool:
    ends = figures.get("eos_rate") is None or figures["eos_rate"] >= figures["eos_rate_before"] - EOS_MARGIN
    answers = figures.get("refusal_rate") is None or \
        figures["refusal_rate"] <= figures["refusal_rate_before"] + REFUSAL_MARGIN
    near = figures.get("kl") is None or figures["kl"] <= LARGEST_KL
    return figures["value"] is not None and ends and answers and near


def main(args: Args) -> None:
    runs = Path(args.runs)
    judge = next(runs.glob("results/judge/*-s*"), runs / "results" / "judge")  # of this base and seed
    guardrails = {}
    if (judge / "guardrails.json").is_file():
        guardrails = {row["name"]: row for row in common.read_json(judge / "guardrails.json")["rows"]}
    records = []
    for file in sorted(runs.glob("*+*/run.json")):
        run = common.read_json(file)
        method, *settings = run["name"].split("+")
        figures = measured(method, file.parent, run["metrics"], judge / "summaries", guardrails)
        records.append({
            "schema_version": 1, "name": run["name"], "method": method,
            "setting": {key: value for key, _, value in (s.partition("_") for s in settings)},
            "objective": OBJECTIVES[method], **figures,
            "admissible": method in ("sft", "grpo") or admissible(figures), "chosen": False,
            "lr": run["args"]["lr"], "beta": run["args"].get("beta"), "model": run["model"],
            "seed": run["seed"], "config_hash": run["config_hash"], "train_invariants": run["train_invariants"],
            "data": run["data"], "wall_time_s": run["wall_time_s"], "hardware": run.get("hardware")})
    if not records:
        common.fail(f"{runs} has no finished run named as method+flag_value")
    chosen = {}
    for record in records:
        best, sign = chosen.get(record["method"]), -1 if record["method"] == "sft" else 1
        if record["admissible"] and (best is None or sign * record["value"] > sign * best["value"]):
            chosen[record["method"]] = record
    for record in records:
        record["chosen"] = chosen.get(record["method"]) is record
        value = "–" if record["value"] is None else f"{record['value']:.4f}"
        ends, kl = (f"{record[k]:.3f}" if record.get(k) is not None else "–" for k in ("eos_rate", "kl"))
        common.say(f"{record['name']:34} {record['objective']:27} {value:>8}  ends {ends}  KL {kl}"
                   f"{'' if record['admissible'] else '  not admissible'}{'  chosen' if record['chosen'] else ''}")
        base = Path(str(record["model"])).name.lower()
        common.write_json(Path(args.results) / f"{base}-{record['name']}.json", record)
    common.write_text(runs / "chosen.mk", "".join(
        f"{method.upper()}_FLAGS = {' '.join(f'--{k} {v}' for k, v in record['setting'].items())}\n"
        for method, record in sorted(chosen.items())))
    common.say_next("python", "evaluate.py", "--adapter", "none", *(runs / r["name"] for r in chosen.values()), last=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
