"""Write what `make speedrun` measured: held-out pass@1 against seconds, of a finished run of grpo.py.

    python tools/speedrun.py runs/speedrun --seconds 195 --out results/speedrun.jsonl

The first line is the run: its command, config_hash, card, the seconds of the whole command (start-up included) and of
the run alone. A line per measurement follows: updates made, seconds since the run began, pass@1 by the answer after
"####" and flexible pass@1, by the last number. report.py draws it.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common


@dataclass(frozen=True)
class Args:
    run: tyro.conf.Positional[str]
    """The finished run's directory."""
    seconds: float
    """Seconds that the whole command took, from its start to its end."""
    out: str = "results/speedrun.jsonl"
    """File to write."""


def main(args: Args) -> None:
    directory = Path(args.run)
    run = common.read_json(directory / "run.json")
    metrics, wall = run["metrics"], run["wall_time_s"]
    if "flexible_1_before" not in metrics:
        common.fail(f"{directory} has no flexible pass@1: not a run of grpo.py on gsm8k")
    if args.seconds < wall:
        common.fail(f"the command took {args.seconds:.0f} s and the run alone {wall:.0f} s: {directory} was begun or "
                    "finished before; move it away and run again, to measure")
    lines = [{"command": run["command"], "model": run["model"], "config_hash": run["config_hash"], "seed": run["seed"],
              "hardware": run["hardware"], "command_seconds": args.seconds, "run_seconds": wall,
              **{key: metrics[key] for key in ("heldout_problems", "pass_1_change_interval",
                                               "flexible_1_change_interval")}}]
    for line in map(json.loads, (directory / "log.jsonl").read_text().splitlines()):
        if "heldout_pass_1" in line:  # measured before that update; `seconds` is its end, so no time is hidden
            lines.append({"updates": line["step"], "seconds": line["seconds"], "pass_1": line["heldout_pass_1"],
                          "flexible_1": line["heldout_flexible_1"]})
    lines.append({"updates": run["args"]["updates"], "seconds": wall, "pass_1": metrics["pass_1_after"],
                  "flexible_1": metrics["flexible_1_after"]})
    common.write_text(args.out, "".join(common.to_json(line) + "\n" for line in lines))
    print(f"{args.out}: flexible pass@1 {metrics['flexible_1_before']:.1%} -> {metrics['flexible_1_after']:.1%} in "
          f"{args.seconds:.0f} s, {args.seconds - wall:.0f} s of it start-up")
    common.say_next("python", "report.py", "--results", Path(args.out).parent, last=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
