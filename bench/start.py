"""Where the seconds between a command and the end of its first optimizer step go.

    python bench/start.py                      # sft.py with a base of Qwen2.5-0.5B's shape
    python bench/start.py --shape tiny         # a trial without a GPU

Each part is a process of its own; the median of --repeat runs counts, after one that fills the caches (Python's compiled
modules, torch.compile's kernels). One JSON line: seconds of Python alone; of the imports, each in addition to those before
it (torch; its compiler, which every program that uses torch.compile imports; transformers' modelling code; PEFT); of
`sft.py --help`; of sft.py from the command to the end of its first step; and of this step by itself.
"""
import dataclasses
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import train
import workload

IMPORTS = {"python": "sys", "torch": "torch", "torch.compile": "torch._dynamo, torch._inductor.compile_fx",
           "transformers": "transformers.modeling_utils", "peft": "peft"}


@dataclasses.dataclass(frozen=True)
class Args:
    repeat: int = 3
    """Runs of each part, after one that doesn't count."""
    shape: Literal["qwen2.5-0.5b", "tiny"] = "qwen2.5-0.5b"
    """Shape of the random model."""
    seconds: int = 300
    """Time limit of a run."""
    work: str = "runs/bench-start"
    """Where the model, data and runs go; what is there is deleted."""


def timed(command: list[str], args: Args) -> float:
    """Seconds that a command takes."""
    began = time.time()
    if failed := train.run([sys.executable, *command], args.seconds)[1]:
        common.fail(f"{' '.join(command)}: {failed}")
    return time.time() - began


def first_step(args: Args, device: str) -> tuple[float, float]:
    """Seconds of sft.py from the command to the end of its first step, and of this step by itself."""
    work = Path(args.work)
    name, flags = train.script("sft-bf16", work, 2, 0)
    flags += train.small(device) + train.dtype_flag("sft-bf16", device)
    shutil.rmtree(work / "run", ignore_errors=True)
    _, failed, lines, taken = train.run_script([f"{name}.py", *flags, "--out", str(work / "run")], work / "run", args.seconds)
    if failed or not lines:
        common.fail(f"{name}.py: {failed}")
    return taken, lines[0]["seconds"]


def main(args: Args) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workload.make(Path(args.work), args.shape, train.ROWS * 2, 2, torch.bfloat16 if device == "cuda" else torch.float32)
    seconds, before, imported = {}, 0.0, []
    for name, modules in IMPORTS.items():
        imported.append(f"import {modules}")
        runs = [timed(["-c", "; ".join(imported)], args) for _ in range(args.repeat + 1)]
        total = statistics.median(runs[1:])
        seconds[name], before = round(total - before, 2), total
    runs = [timed(["sft.py", "--help"], args) for _ in range(args.repeat + 1)]
    seconds["--help"] = round(statistics.median(runs[1:]), 2)
    steps = [first_step(args, device) for _ in range(args.repeat + 1)]
    seconds["command_to_first_step"], seconds["first_step"] = (round(statistics.median(column), 2) for column in zip(*steps[1:]))
    print(json.dumps({**seconds, "settings": {"shape": args.shape, "repeat": args.repeat, "torch": torch.__version__,
                                              "device": common.hardware()["device"]}}))


if __name__ == "__main__":
    main(tyro.cli(Args))
