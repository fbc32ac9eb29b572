"""Upload a finished run to the Hugging Face hub: adapter, tokenizer, run.json and a card with its results.

    python tools/push.py runs/dpo_v1 NAMESPACE/NAME

A training script's --push-to-hub does the same at its end. Run this again after evaluate.py, and the card has the
row's scores, with their intervals. A repository that isn't there yet is created private.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import publish
from common import fail


@dataclass(frozen=True)
class Args:
    run: tyro.conf.Positional[str]
    """A finished run directory: a policy's or a reward model's."""
    repo: tyro.conf.Positional[str]
    """NAMESPACE/NAME on the hub."""
    results: str = "results"
    """Directory of metrics.json, for the card's results."""


def main(args: Args) -> None:
    if not (Path(args.run) / "run.json").is_file():
        fail(f"{args.run} is not a finished run: no run.json")
    publish.check_access(args.repo)
    publish.push(Path(args.run), args.repo, args.results)
    if common.read_json(Path(args.run) / "run.json")["method"] != "reward":
        common.say_next("python", "tools/chat.py", args.repo)


if __name__ == "__main__":
    main(tyro.cli(Args))
