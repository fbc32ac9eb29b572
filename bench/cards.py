"""The largest --micro-tokens with which each script trains on graphics cards of several sizes: it runs on a larger card, with
a limit of memory.

    python bench/cards.py --at-once 5                                # NF4 base of 0.5B: 8, 12, 16 and 24 GB
    python bench/cards.py --shape qwen2.5-1.5b --script sft dpo
    python bench/cards.py --gib 4 --script sft dpo --micro-tokens 1536 1024      # another limit
    python bench/cards.py --shape tiny --gib 1                       # a trial without a GPU, where nothing limits it

A card of n GB is taken as n - 1 GiB for torch (RUNGS_GPU_GIB), since CUDA and a display need some. The base is random: in
NF4 for sft, reward and ppo's reward models, in bfloat16 with SFT merged into it for the policies of dpo, kto, ppo and grpo.
The text is train.py's: 16 rows per step, up to 1,024 tokens each; ppo 64 answers of 256 tokens per update, grpo 8 × 8 of
256. Other flags are the defaults, but the measurements before and after training use few rows (train.script). On each card,
the smallest first, a script runs with its default --micro-tokens, then with fewer (the same update in smaller parts), until
it fits: it does all its steps without running out of memory. A larger card is tried only with larger values, and not at all
once the default fits. Running out of memory, or micro-batches too small for a pair, counts as not fitting; any other failure
ends the measurement. Scripts may run side by side on one GPU (--at-once), since no speed is measured. Prints one JSON line
per run, with the steps that it did and their peak; writes <out>/<device>.json, and the tables to <out>/README.md. A run that
is made again replaces its earlier result.
"""
import dataclasses
import importlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import train
import workload

CASES = {"sft": "sft-nf4", "reward": "reward", "dpo": "dpo", "kto": "kto", "ppo": "ppo-step", "grpo": "grpo-step"}


@dataclasses.dataclass(frozen=True)
class Args:
    script: tuple[Literal["sft", "reward", "dpo", "kto", "ppo", "grpo"], ...] = tuple(CASES)
    """Scripts to run."""
    gb: tuple[float, ...] = (8, 12, 16, 24)
    """Cards, the smallest first."""
    gib: float | None = None
    """One limit in GiB instead of the cards."""
    micro_tokens: tuple[int, ...] = (4096, 2048, 1536, 1024)
    """What is tried below the default; the longest pair has 1,498 tokens."""
    at_once: int = 1
    """Scripts that run at the same time."""
    steps: int = 12
    """Optimizer steps (kto: twice as many, in 2 epochs); ppo and grpo make 2 updates."""
    shape: Literal["qwen2.5-0.5b", "qwen2.5-1.5b", "tiny"] = "qwen2.5-0.5b"
    """Shape of the random model."""
    seconds: int = 300
    """Time limit of a run."""
    work: str = "runs/bench-cards"
    """Where models, data and runs go; what is there is deleted."""
    out: str = "results/bench/cards"
    """Where the results go."""


def on_gpu() -> bool:
    return torch.cuda.is_available()


def attempt(name: str, args: Args, limit: float, micro_tokens: int) -> dict:
    """One run of a script under a limit in GiB."""
    work, case, device = Path(args.work), CASES[name], "cuda" if on_gpu() else "cpu"
    tokens = 256 if args.shape != "tiny" else 16
    steps = args.steps if name not in ("ppo", "grpo") else 2
    _, flags = train.script(case, work, steps, tokens, "qlora")
    flags += train.dtype_flag(case, device) + ["--device", device, "--micro-tokens", str(micro_tokens)]
    out = work / f"run-{name}"
    shutil.rmtree(out, ignore_errors=True)
    # RUNGS_RETRIED: no second try with half the --micro-tokens
    train.Gpus.mine.environment = os.environ | ({"RUNGS_GPU_GIB": str(limit), "RUNGS_RETRIED": "1"} if on_gpu() else {})
    failed = train.run([sys.executable, f"{name}.py", *flags, "--out", str(out)], args.seconds)[1]
    log = out / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    if failed and not any(words in failed for words in ("OutOfMemory", "can't hold the longest pair")):
        common.fail(f"{name}.py within {limit} GiB: {failed}")
    return {"shape": args.shape, "script": name, "limit_gib": limit, "micro_tokens": micro_tokens,
            "fits": not failed, "peak_gib": lines[-1].get("peak_gib") if lines else None, "steps": len(lines),
            "error": failed}


def limits(args: Args) -> list[float]:
    return [args.gib] if args.gib else sorted(gb - 1 for gb in args.gb)


def measure(name: str, args: Args, done: Callable[[dict], None], stopped: threading.Event) -> None:
    """The runs of a script: on each card those that may fit with more --micro-tokens than on a smaller one."""
    default, fitting = importlib.import_module(name).Args.micro_tokens, 0
    for limit in limits(args):
        for tokens in sorted({default, *(n for n in args.micro_tokens if n < default)}, reverse=True):
            if tokens <= fitting or stopped.is_set():
                break
            try:
                run = attempt(name, args, limit, tokens)
            except BaseException:
                stopped.set()  # nothing is begun any more
                raise
            done(run)
            if run["fits"]:
                fitting = tokens


def table(record: dict) -> str:
    """Markdown: for each script and limit the most --micro-tokens that fit, with their peak; – where none of those tried did,
    nothing where a smaller card holds as much."""
    tried = {}
    for run in record["runs"]:
        tried.setdefault((run["shape"], run["script"]), {}).setdefault(run["limit_gib"], []).append(run)
    columns = sorted({limit for runs in tried.values() for limit in runs})

    def cell(runs: list[dict]) -> str:
        fitting = max((run for run in runs if run["fits"]), key=lambda run: run["micro_tokens"], default=None)
        peak = f" ({fitting['peak_gib']:.1f})" if fitting and fitting["peak_gib"] is not None else ""
        return f"{fitting['micro_tokens']:,}{peak}" if fitting else "–" if runs else ""
    rows = [f"| {script}.py | {shape} | " + " | ".join(cell(runs.get(limit, [])) for limit in columns) + " |"
            for (shape, script), runs in sorted(tried.items(), key=lambda item: (item[0][0], [*CASES].index(item[0][1])))]
    return "\n".join(["| script | shape | " + " | ".join(f"{limit:g} GiB" for limit in columns) + " |",
                      "| :-- | :-- |" + " --: |" * len(columns), *rows])


def write_tables(out: Path) -> None:
    explained = ("The most `--micro-tokens` with which a script trains under a limit of GPU memory, and its peak in GiB, "
                 "written by `python bench/cards.py` (its docstring says how): the base in NF4 for sft.py, reward.py and PPO's "
                 "reward models, in bfloat16 for the other scripts' policies; few rows for the measurements before and after "
                 "training, other flags at their defaults. –: none of those tried fits; empty: not tried, because a smaller limit "
                 "holds as much, or for another reason.")
    train.write_readme(out, "What fits", explained, table)


def main(args: Args) -> None:
    common.check_positive(args, "at_once", "steps", "seconds")
    wanted = min(args.at_once, len(args.script)) * (max(limits(args)) + 1)
    if on_gpu() and (free := torch.cuda.mem_get_info()[0] / 2**30) < wanted:
        common.fail(f"--at-once {args.at_once} may take {wanted:g} GiB of this GPU, of which {free:.0f} are free")
    work, lock, stopped = Path(args.work), threading.Lock(), threading.Event()
    workload.make(work, args.shape, train.ROWS * args.steps, 2 + 2 * train.PROMPTS * train.GROUP,
                  torch.bfloat16 if on_gpu() else torch.float32)
    train.make_parents([CASES[name] for name in args.script], work, "cuda" if on_gpu() else "cpu", args.seconds, "qlora")
    device = common.hardware()["device"]
    path = train.record_path(args.out, device)

    def done(run: dict) -> None:
        with lock:
            print(json.dumps(run), flush=True)
            same = {key: run[key] for key in ("shape", "script", "limit_gib", "micro_tokens")}
            earlier = common.read_json(path)["runs"] if path.is_file() else []
            earlier = [r for r in earlier if {key: r[key] for key in same} != same]
            common.write_json(path, {"device": device, "quantization": "qlora", "runs": [*earlier, run]})
            write_tables(path.parent)
    with ThreadPoolExecutor(args.at_once) as pool:
        try:
            for measured in as_completed([pool.submit(measure, name, args, done, stopped) for name in args.script]):
                measured.result()
        finally:
            stopped.set()


if __name__ == "__main__":
    main(tyro.cli(Args))
