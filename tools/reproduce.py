"""Run a finished run again, from its run.json alone, and compare: `make reproduce ROW=dpo_v1`.

    python tools/reproduce.py runs/dpo_v1                          # or results/runs/dpo_v1-f3e76eba.json
    python tools/reproduce.py runs/dpo_v1 --out /tmp/again         # writes /tmp/again/dpo_v1

1. Its inputs (model, data, the adapters that it started from or was scored by) must be there, the adapters unchanged.
   Only PPO's watch model may have other bits (not another config_hash): it takes no part in the training.
2. The rerun must have the same config_hash. It is read as soon as the rerun has checked its rows, so that a changed
   input ends it before the training.
3. The adapter's hash and every metric are compared, and the differences stated. With the same versions, thread count
   and processor type a CPU gives the same bits, and another hash is an error. On GPUs, kernels and the order of sums
   differ between machines, so other bits are no error: judge the differences, beside the run's own intervals.

Exit code 1: another config_hash, or other bits where they must be the same. A rerun that was stopped goes on when the
command is given again; a finished one is only compared.
"""
import importlib
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from common import fail

REPO = Path(__file__).parent.parent
PARENTS = {"sft_adapter": "parent", "reward_adapter": "reward", "watch_adapter": "watch"}  # flag: its link


@dataclass(frozen=True)
class Args:
    run: tyro.conf.Positional[str]
    """A finished run's directory, its run.json, or its record in results/runs."""
    out: str = "runs/reproduced"
    """The rerun goes to <out>/<name>."""
    results: str = "results/reproduced"
    """Directory for <name>-<first run's adapter>.json, the result of the comparison."""


def flags(old: dict, out: Path) -> list[str]:
    """The command line that gives `old`'s arguments: those that differ from the script's defaults of today."""
    script = importlib.import_module(old["method"])
    known = {field.name: field.default for field in fields(script.Args)}
    if unknown := sorted(old["args"].keys() - known.keys()):
        fail(f"{old['method']}.py has no --{', --'.join(unknown).replace('_', '-')} any more: check out the run's "
             f"commit, {old.get('git_commit')}")
    moved = {"out": str(out), "overwrite": False, "track": "none", "push_to_hub": None}
    moved |= {"results": str(out.parent / "results")} if "results" in known else {}
    command = []
    for name, value in (old["args"] | moved).items():
        flag = name.replace("_", "-")
        if value != known[name]:
            command += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return command


def check_inputs(old: dict, where: Path) -> None:
    """Fail unless the lineage's adapters are those of the first run. The script itself reports other missing inputs."""
    links = {"parent": old.get("parent"), **(old.get("scorers") or {})}
    for flag, name in PARENTS.items():
        given, link = old["args"].get(flag), links.get(name)
        if not link or link["method"] == "peft":  # a plain adapter enters config_hash by its content
            continue
        record = Path(given) / "run.json"
        if not record.is_file():
            fail(f"{where} needs {given} ({link['name']}, config {link['config_hash']}), which is not there")
        now = common.read_json(record)
        if now["adapter_sha256"] != link["adapter_sha256"]:
            mismatch = (f"{given} is not the adapter that {where} names (sha256 {now['adapter_sha256'][:8]}, want "
                        f"{link['adapter_sha256'][:8]})")
            if name != "watch" or now["config_hash"] != link["config_hash"]:
                fail(mismatch)
            common.say(f"note: {mismatch}; it takes no part in the training, and only the metrics about it will differ")


def rerun(old: dict, out: Path) -> None:
    """Run the script as a process of its own, and end it as soon as its configuration turns out to differ."""
    command = [sys.executable, str(REPO / f"{old['method']}.py"), *flags(old, out)]
    common.say(" ".join(["python", Path(command[1]).name, *command[2:]]))
    begun = out / "checkpoint" / "run.json"  # written when the rows are checked, before a model loads
    with subprocess.Popen(command) as process:
        while process.poll() is None and not begun.is_file():
            time.sleep(0.2)
        if begun.is_file() and common.read_json(begun)["config_hash"] != old["config_hash"]:
            process.terminate()
    if process.returncode and not begun.is_file():
        raise SystemExit(process.returncode)  # the script has said what is wrong


def differs(message: str) -> NoReturn:
    print(f"not reproduced: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def config_differences(old: dict, new: dict) -> str:
    """Which parts of config_hash differ."""
    parts = [key for key in ("train_invariants", "data") if old.get(key) != new.get(key)]
    parts += [f"--{k.replace('_', '-')} {old['args'].get(k)} -> {v}" for k, v in new["args"].items()
              if k not in common.RUN_KNOBS and old["args"].get(k) != v]
    links = [(run.get("parent") or {}).get("config_hash") for run in (old, new)]
    return ", ".join(parts + ["parent"] * (links[0] != links[1])) or "what only the hash covers"


def compared(old: dict, new: dict) -> dict[str, dict]:
    """{metric: then, now, their difference, and the first run's interval, if it recorded one}."""
    metrics = {}
    for key, then in old["metrics"].items():
        now = new["metrics"].get(key)
        if isinstance(then, (int, float)) and isinstance(now, (int, float)):
            interval = old["metrics"].get(f"{key}_interval")
            metrics[key] = {"then": then, "now": now, "difference": now - then, "interval": interval}
    return metrics


def main(args: Args) -> None:
    where = Path(args.run) / "run.json" if Path(args.run).is_dir() else Path(args.run)
    if not where.is_file():
        fail(f"no such run: {where}; give a finished run's directory, or its record in results/runs")
    old = common.read_json(where)
    common.check_fields(where, old, {**dict.fromkeys(("method", "name", "config_hash", "adapter_sha256"), str),
                                     "args": dict, "metrics": dict})
    out = Path(args.out) / old["name"]
    if out.resolve() == where.parent.resolve():
        fail(f"--out {args.out} would overwrite {where.parent}")
    check_inputs(old, where)
    if not (out / "run.json").is_file():
        rerun(old, out)
    finished = out / "run.json"
    new = common.read_json(finished if finished.is_file() else out / "checkpoint" / "run.json")
    if new["config_hash"] != old["config_hash"]:
        differs(f"config_hash {new['config_hash']}, where {where} has {old['config_hash']}; they differ in "
                f"{config_differences(old, new)}")
    if not finished.is_file():
        fail(f"{out} is not finished: give the command again")

    metrics, same = compared(old, new), new["adapter_sha256"] == old["adapter_sha256"]
    machine = ("hardware", "versions")
    on_cpu = old.get("hardware", {}).get("gpus") == 0 and all(old.get(key) == new.get(key) for key in machine)
    record = {"schema_version": 1, "name": old["name"], "method": old["method"], "config_hash": old["config_hash"],
              "adapter_sha256": {"then": old["adapter_sha256"], "now": new["adapter_sha256"]}, "same_adapter": same,
              **{key: {"then": old.get(key), "now": new.get(key)}
                 for key in (*machine, "scorers", "git_commit", "wall_time_s")},
              "metrics": metrics}
    target = Path(args.results) / f"{old['name']}-{old['adapter_sha256'][:8]}.json"
    common.write_json(target, record)
    print(f"config_hash {old['config_hash']}: equal\nadapter: {'the same bits' if same else 'other bits'}")
    for key, line in metrics.items():
        if line["difference"]:
            ends = line.get("interval")
            inside = "" if not ends else ", inside" if ends[0] <= line["now"] <= ends[1] else ", OUTSIDE"
            print(f"{key:28} {line['then']:.6g} -> {line['now']:.6g}  ({line['difference']:+.3g}"
                  f"{inside and f'{inside} its interval'})")
    print(f"{sum(not line['difference'] for line in metrics.values())} of {len(metrics)} metrics are equal; {target}")
    if not same and on_cpu:
        differs("other bits on the same processor type, versions and thread count: this run is not reproducible")


if __name__ == "__main__":
    main(tyro.cli(Args))
