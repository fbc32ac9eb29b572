"""Tokens per second of training: the scripts against TRL and Unsloth on the same random model, text and rows per step.

    python bench/train.py                                  # all workloads and systems, on a GPU
    python bench/train.py --only sft-bf16 dpo --system rungs --profile
    python bench/train.py --at-once 2                      # two cases at a time on two GPUs of one host
    python bench/train.py --system rungs --gpus 2 --only sft-bf16 dpo grpo-step      # beside the same with one
    python bench/train.py --shape tiny --seconds 60        # a trial without a GPU

Ours runs the scripts as a user would, `python sft.py …` on generated data, with the default flags except those that script()
sets; speed is read from log.jsonl.
TRL runs once with its defaults, and with each of some faster settings (peer.py), of which the fastest counts. Unsloth runs
with 16 rows per step and no checkpointing; it wants older versions of transformers and TRL than our lock file, so install it,
with xformers, in an environment of its own, and run `--system rungs unsloth` there. Each case has its own process; its first
--warm steps (compiling, recording of most sizes) don't count. 16 rows per step (pairs for dpo and reward), LoRA r = 16 on all
linear layers; grpo and ppo: 64 completions of at most 256 tokens per update, from 8 or 64 prompts (one token in 512 is a
stop token, so that about 39 % of the answers end early). Tokens are those of the text (both answers of a pair; for sampling
and its updates only the completions), never padding or mismatched pairs. peak_gib: the most memory that the process had
reserved. command_to_first_step_s: from the call of the script to the end of its first step, imports and compiling included.

mfu: FLOPs that the mathematics needs (common.model_flops; frozen base, nothing recomputed, the prompt of a pair or a group
once) per second, over the GPU's dense bfloat16 peak. By workload, in passes over its sequences: sft, reward (no LM
head) one with backward; dpo one more forward (reference); kto three more (reference, and two over mismatched pairs);
grpo-step sampling, reference, one with backward; ppo-step sampling, old, reference and four epochs, and for scorer and
critic (no LM head) scores, old values and four epochs.

Results go to --out, results/bench/<device>.json: a case that is run again replaces its earlier result, one that fails
is kept with its error. README.md beside it has the tables of all such files; `--only` with no workload only writes
those tables.
"""
import dataclasses
import functools
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import workload
from peer import SETTINGS, UNSLOTH

HERE = Path(__file__).parent
WORKLOADS = ("sft-bf16", "sft-nf4", "dpo", "reward", "kto", "grpo-step", "ppo-step", "sample")
SYSTEMS = ("rungs", "trl-default", "trl-best", "unsloth", "transformers-generate", "vllm")
SAMPLERS = ("transformers-generate", "vllm")
ROWS, PROMPTS, GROUP = 16, 8, 8  # rows per step; prompts per update, answers per prompt


@dataclasses.dataclass(frozen=True)
class Args:
    only: tuple[Literal[WORKLOADS], ...] = WORKLOADS
    """Workloads to run."""
    system: tuple[Literal[SYSTEMS], ...] = ("rungs", "trl-default", "trl-best", "transformers-generate")
    """Systems that run them; transformers-generate and vllm only sample. unsloth and vllm are not in our requirements:
    install them separately."""
    steps: int = 200
    """Optimizer steps of a training case; grpo and ppo run a tenth as many updates."""
    warm: int = 50
    """First steps that don't count; for grpo and ppo a tenth of this, at least one."""
    peer_steps: int = 25
    """Steps of TRL's and Unsloth's cases, which record nothing; for their GRPO a fifth, of which at least three are timed."""
    peer_warm: int = 5
    """First steps of TRL's and Unsloth's cases that don't count; for their GRPO a fifth of this, at least one."""
    seconds: int = 300
    """Time budget of a case, start-up and compiling included; what was measured by then counts."""
    at_once: int = 1
    """Cases that run at the same time, each on its own GPU of one host."""
    gpus: int = 1
    """GPUs of our scripts, by torchrun, for the same update; with more than one the system is named rungs-x2, -x3, …"""
    shape: Literal["qwen2.5-0.5b", "qwen2.5-1.5b", "tiny"] = "qwen2.5-0.5b"
    """Shape of the random model."""
    flags: str = ""
    """More flags for our scripts, as one word: --flags="--micro-tokens 16384"."""
    profile: bool = False
    """Print where the time of some steps goes, by kernel (rungs); its speeds are not written."""
    work: str = "runs/bench"
    """Where models, data and runs go; what is there is deleted."""
    out: str = "results/bench"
    """Where <device>.json goes."""


# -- ours -----------------------------------------------------------------------------------------

def script(case: str, work: Path, steps: int, completion_tokens: int, quantization: str = "none") -> tuple[str, list[str]]:
    """(script, flags) of a workload; what is not given is the script's default. Closing measurements are made small.
    quantization: of a reward model's base."""
    end = ["--heldout-rows", "8"]
    eos = [*end, "--eos-prompts", "1", "--eos-tokens", "1"]
    rows = ["--rows", str(ROWS * steps), "--batch-size", str(ROWS), "--checkpoint-every", "1000000"]
    sampling = ["--completion-tokens", str(completion_tokens), "--updates", str(steps), "--max-gap", "10",
                "--checkpoint-every", "1000000", "--results", str(work / "results")]
    model, parent = ["--model", str(work / "model")], ["--sft-adapter", str(work / "sft")]
    return {
        "sft-bf16": ("sft", [*model, "--quantization", "none", "--data", str(work / "sft.jsonl"), *rows, *eos]),
        "sft-nf4": ("sft", [*model, "--quantization", "qlora", "--data", str(work / "sft.jsonl"), *rows, *eos]),
        "dpo": ("dpo", [*parent, "--data", str(work / "pairs.jsonl"), *rows, *eos]),
        "reward": ("reward", [*model, "--quantization", quantization, "--data", str(work / "pairs.jsonl"), *rows, *end,
                              "--results", str(work / "results")]),
        "kto": ("kto", [*parent, "--data", str(work / "labels.jsonl"), *rows, *eos]),
        "grpo-step": ("grpo", [*parent, "--task", str(work / "task.py"), *sampling, "--batch-size", str(PROMPTS),
                               "--group-size", str(GROUP), "--heldout-rows", "1", "--pass-k", "1", "--eval-every", "0"]),
        "ppo-step": ("ppo", [*parent, "--reward-adapter", str(work / "rm"), "--data", str(work / "prompts.jsonl"), *sampling,
                             "--batch-size", str(PROMPTS * GROUP), "--fixed-prompts", "2", "--normalise", "0"]),
    }[case]


class Gpus:
    """The GPUs that this process sees, one for each case that is running."""
    free: queue.Queue = queue.Queue()  # values of CUDA_VISIBLE_DEVICES
    mine = threading.local()

    @classmethod
    def share(cls, at_once: int, each: int) -> None:
        """Divide the GPUs among `at_once` cases, `each` GPUs per case: a library that sees more would use them."""
        seen = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        for i in range(at_once):
            cls.free.put(",".join(seen[i * each:(i + 1) * each]))

    @classmethod
    def take(cls, function: Callable) -> Any:
        """Call function() with a free GPU as the only one that its processes see."""
        gpu = cls.free.get()
        cls.mine.environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        try:
            return function()
        finally:
            cls.free.put(gpu)


def run(command: list[str], seconds: int, seen: Callable[[float], None] = lambda elapsed: None,
        compile: bool = True) -> tuple[str, str | None]:
    """(standard output, why it failed or None) of a process; SIGTERM after `seconds`, which our scripts obey after a step.

    `seen` is called with the time since the start, in seconds, every tenth of a second.
    """
    began = time.time()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parent,
                               env=getattr(Gpus.mine, "environment", os.environ) | ({} if compile else {"RUNGS_COMPILE": "0"}))
    while (elapsed := time.time() - began) < seconds:
        seen(elapsed)
        try:
            out, err = process.communicate(timeout=0.1)
            break
        except subprocess.TimeoutExpired:
            pass
    else:
        process.terminate()
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        return out, f"no result within {seconds} s"
    err = re.sub(r".*\d%\|.*?\]", "", err.replace("\r", "\n"))  # a progress bar's last state may come after the error
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    return out, None if process.returncode == 0 else f"exit {process.returncode}: " + (lines or ["no output"])[-1][:300]


def small(device: str) -> list[str]:
    """Flags for a CPU, which multiplies float32 faster."""
    return [] if device == "cuda" else ["--device", "cpu", "--micro-tokens", "4096"]


def dtype_flag(case: str, device: str) -> list[str]:
    return [] if device == "cuda" or case in ("grpo-step", "ppo-step") else ["--dtype", "float32"]


def make_parents(cases: Collection[str], work: Path, device: str, seconds: int, quantization: str = "none") -> None:
    """The adapters that methods start from, of one step each, on a base in bfloat16 ("none") or NF4 ("qlora")."""
    sft = {"none": "sft-bf16", "qlora": "sft-nf4"}[quantization]
    for case, out, users in ((sft, "sft", {"dpo", "kto", "grpo-step", "ppo-step"}), ("reward", "rm", {"ppo-step"})):
        if users & {*cases}:
            name, flags = script(case, work, 1, 1, quantization)
            flags += small(device) + dtype_flag(case, device) + ["--out", str(work / out)]
            if failed := run([sys.executable, f"{name}.py", *flags], seconds, compile=False)[1]:
                raise RuntimeError(f"{name}.py, which others start from: {failed}")


def run_script(command: list[str], out: Path, seconds: int) -> tuple[str, str | None, list[dict], float | None]:
    """One of our scripts: what run() returns of it, the lines of its log, and the seconds from the command to the end of its
    first step."""
    log, first_step = out / "log.jsonl", []

    def watch(elapsed: float) -> None:
        if not first_step and log.is_file() and log.stat().st_size:
            first_step.append(elapsed)
    printed, failed = run([sys.executable, *command], seconds, watch)
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return printed, failed, lines, first_step[0] if first_step else None


def ours(case: str, args: Args, work: Path, device: str, steps: int, warm: int, completion_tokens: int) -> dict:
    """A workload run by our script; its first step's time includes starting and compiling."""
    name, flags = script(case, work, steps, completion_tokens)
    more = small(device) + dtype_flag(case, device) + args.flags.split()
    out = work / f"run-{case}"
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus)] if args.gpus > 1 else []
    command = [f"{name}.py", *flags, *more, "--out", str(out)]
    if args.profile:
        command = [str(HERE / "profiled.py"), str(warm), *command]
    printed, failed, lines, first_step = run_script([*ranks, *command], out, args.seconds)
    if args.profile:
        print(printed[printed.find("-- profile"):], flush=True)
    if len(lines) <= warm:
        return {"error": failed or f"{len(lines)} steps are no more than the first {warm}"}
    timed = lines[warm:]
    norms = [line["grad_norm"] for line in timed]
    if zeros := norms.count(0):
        return {"error": f"{zeros} of {len(norms)} timed steps had no gradient: nothing was trained"}
    taken, tokens = timed[-1]["seconds"] - lines[warm - 1]["seconds"], sum(line["tokens"] for line in timed)
    median = statistics.median(line["seconds"] - before["seconds"] for before, line in zip(lines[warm - 1:], timed))
    metrics = {"tokens_per_s": round(tokens / taken), "ms_per_step": round(taken / len(timed) * 1e3, 1),
               "median_ms": round(median * 1e3, 1), "steps": len(timed),
               "command_to_first_step_s": first_step and round(first_step, 1),
               "peak_gib": lines[-1].get("peak_gib"), "grad_norm": round(statistics.median(norms), 4),
               "settings": {"script": name, "flags": " ".join(more)}}
    if "rollout_tokens_per_s" in timed[0]:
        metrics["completion_tokens"] = round(statistics.mean(line["completion_tokens"] for line in timed))
        rollout = sum(line["tokens"] / line["rollout_tokens_per_s"] for line in timed)
        metrics |= {"rollout_s": round(rollout / len(timed), 3), "update_s": round((taken - rollout) / len(timed), 3)}
    return metrics | ({"note": failed} if failed else {})


# -- others ---------------------------------------------------------------------------------------

def result(command: list[str], seconds: int) -> dict:
    """The last line that begins with RESULT; an error where there is none."""
    printed, failed = run([sys.executable, *command], seconds)
    result_lines = [line for line in printed.splitlines() if line.startswith("RESULT ")]
    return json.loads(result_lines[-1].removeprefix("RESULT ")) if result_lines else {"error": failed or "no result"}


def peer(case: str, settings: dict, args: Args, work: Path, completion_tokens: int) -> dict:
    """TRL or Unsloth with these settings of the trainer."""
    steps = min(args.peer_steps, args.steps)  # there is no more data
    warm = min(args.peer_warm, steps - 1)
    if case == "grpo-step":
        warm = max(1, warm // 5)
        steps = max(warm + 3, steps // 5)
    metrics = result([str(HERE / "peer.py"), case, str(work), json.dumps(settings), str(steps), str(warm),
                      str(completion_tokens)], args.seconds)
    return {**metrics, "settings": settings}


def settings_to_try(case: str, system: str) -> list[dict | None]:
    """A system's settings for a workload; [None] where it has none: ours, a sampler, or no such trainer."""
    if system == "unsloth":
        return UNSLOTH.get(case, [None])
    tried = SETTINGS.get(case, [None, None])
    return {"trl-default": tried[:1], "trl-best": tried[1:]}.get(system, [None])


def sample(system: str, args: Args, completion_tokens: int) -> dict:
    printed, failed = run([sys.executable, str(HERE / "sample.py"), "--shape", args.shape, "--rows", str(PROMPTS * GROUP),
                           "--tokens", str(completion_tokens), "--prompts", str(PROMPTS), "--system", system], args.seconds)
    return {"error": failed} if failed else json.loads(printed.splitlines()[-1])


# -- FLOPs and the table --------------------------------------------------------------------------

def flops_a_token(case: str, config, sizes: dict, completion_tokens: int) -> float:
    """FLOPs that the mathematics of a workload needs for each token that is counted."""
    def flops(lengths: list[int], shared: list[int], predicted: int, **passes: int) -> float:
        attended = sum((n - s) * (n + s + 1) // 2 for n, s in zip(lengths, shared))
        return sum(n * common.model_flops(config, sum(lengths) - sum(shared), attended, predicted, backward=kind == "backward")
                   for kind, n in passes.items())
    if case in ("grpo-step", "ppo-step", "sample"):
        answers = 1 if case == "ppo-step" else GROUP
        lengths = [n + completion_tokens for n in sizes["prompts"] for _ in range(answers)]
        shared = [n * (i > 0) for n in sizes["prompts"] for i in range(answers)]
        counted = completion_tokens * len(lengths)
        total = flops(lengths, shared, counted, **{"grpo-step": dict(forward=2, backward=1), "sample": dict(forward=1),
                                                   "ppo-step": dict(forward=3, backward=4)}[case])
        return (total + (flops(lengths, shared, 0, forward=2, backward=4) if case == "ppo-step" else 0)) / counted
    kind = case.split("-")[0]
    passes = {"sft": {}, "reward": {}, "dpo": dict(forward=1), "kto": dict(forward=3)}[kind]
    counts = sizes[kind]
    return flops(counts["lengths"], counts["shared"], counts["predicted"], backward=1, **passes) / sum(counts["lengths"])


def settings_of(case: dict) -> str:
    """A case's settings in a few words: what isn't the default."""
    settings = case.get("settings") or {}
    if isinstance(settings, dict):
        known = ("script", "shape", "device", "torch")  # from the file and the workload
        settings = ", ".join(f"{k}={v}" for k, v in settings.items() if k not in known and v not in (None, ""))
    return settings or "default"


def table(cases: list[dict]) -> str:
    """Markdown: one line per case, with the ratio of the speed of rungs on one GPU to its own; notes below."""
    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)
    ours = {c["workload"]: c["tokens_per_s"] for c in cases if c["system"] == "rungs" and c.get("tokens_per_s")}
    lines = ["| workload | system | settings | tokens/s | rungs is | peak GiB | MFU | grad norm | |",
             "| :-- | :-- | :-- | --: | --: | --: | --: | --: | :-- |"]
    for c in cases:
        speed, rungs_speed = c.get("tokens_per_s"), ours.get(c["workload"])
        ratio = f"{rungs_speed / speed:.2f} ×" if rungs_speed and speed and c["system"] != "rungs" else ""
        apart = f"rollout {c['rollout_s']} s, update {c['update_s']} s" if "rollout_s" in c else ""
        apart += f"; median step {c['median_ms'] / 1e3:.2f} s" if apart and "median_ms" in c else ""
        lines.append(f"| {c['workload']} | {c['system']} | {settings_of(c)} | {cell(speed, ',.0f')} | {ratio} "
                     f"| {cell(c.get('peak_gib'), '.1f')} | {cell(c.get('mfu'), '.1%')} | {cell(c.get('grad_norm'), '.2g')} "
                     f"| {c.get('error', apart)[:120]} |")
    notes = [f"{c['workload']}, {c['system']}: {c['note']}" for c in cases if c.get("note")]
    return "\n\n".join(["\n".join(lines), *notes])


def write_readme(out: Path, title: str, explained: str, table_of: Callable[[dict], str]) -> None:
    """<out>/README.md: table_of(the record) of every <device>.json there."""
    records = [common.read_json(path) for path in sorted(out.glob("*.json"))]
    tables = [f"## {record['device']}\n\n{table_of(record)}" for record in records]
    common.write_text(out / "README.md", "\n\n".join([f"# {title}", explained, *tables]) + "\n")


def write_tables(out: Path) -> None:
    explained = ("Tokens per second of training and sampling, written by `python bench/train.py`. \"rungs is\": the speed of "
                 "rungs on one GPU divided by that of the line. MFU is of one GPU. Grad norm: of ours the median of the timed steps, "
                 "of others the last step's; – where it was not recorded. How a case is run: the docstring of bench/train.py.")
    write_readme(out, "Speed", explained, lambda record: table(record["cases"]))


def best_of(cases: list[dict]) -> list[dict]:
    """The fastest of a system's cases of one workload with several settings, with all that were tried."""
    groups = {}
    for c in cases:
        groups.setdefault((c["workload"], c["system"]), []).append(c)
    best = {key: max(group, key=lambda c: c.get("tokens_per_s", 0)) for key, group in groups.items()}
    return [best[key] | ({"tried": group} if len(group) > 1 else {}) for key, group in groups.items()]


def record_path(out: str, device: str) -> Path:
    """Where the results of a device go."""
    return Path(out) / f"{device.lower().replace(' ', '-')}.json"


def merge(path: Path, new: list[dict], device: str) -> list[dict]:
    """Write the cases among those that the file has; a case that was run again replaces its earlier result."""
    def order(case: dict) -> tuple:
        return WORKLOADS.index(case["workload"]), case["system"] not in SYSTEMS, SYSTEMS.index(case["system"].split("-x")[0])
    again = {(c["workload"], c["system"]) for c in new}
    old = common.read_json(path)["cases"] if path.is_file() else []
    cases = [c for c in old if (c["workload"], c["system"]) not in again] + new
    cases.sort(key=order)
    common.write_json(path, {"device": device, "cases": cases})
    write_tables(path.parent)
    return cases


def main(args: Args) -> None:
    if not args.only:
        return write_tables(Path(args.out))
    if not 0 < args.warm < args.steps:
        common.fail(f"--warm {args.warm} must be at least 1, and less than --steps {args.steps}")
    if not 0 < args.peer_warm < args.peer_steps:
        common.fail(f"--peer-warm {args.peer_warm} must be at least 1, and less than --peer-steps {args.peer_steps}")
    if args.at_once > 1 and (args.gpus > 1 or args.at_once > max(1, torch.cuda.device_count())):
        common.fail(f"--at-once {args.at_once} wants as many GPUs, one a case; there are {torch.cuda.device_count()}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and args.shape != "tiny":
        common.fail("no GPU; give --shape tiny")
    work, name = Path(args.work), common.hardware()["device"]
    completion_tokens = 256 if args.shape != "tiny" else 32
    warm_updates = max(1, args.warm // 10)
    updates = max(warm_updates + 1, args.steps // 10)
    workload.make(work, args.shape, ROWS * args.steps, 2 + PROMPTS * GROUP * updates,
                  torch.bfloat16 if device == "cuda" else torch.float32)
    config, sizes = AutoConfig.from_pretrained(work / "model"), common.read_json(work / "sizes.json")
    if "rungs" in args.system:
        make_parents(args.only, work, device, args.seconds)
    path, peak = record_path(args.out, name), common.peak_flops(name)

    def measure(case: str, system: str, settings: dict | None) -> dict:
        began = time.time()
        if case == "sample":
            metrics = sample(system, args, completion_tokens)
        elif system == "rungs":
            metrics = ours(case, args, work, device, *((updates, warm_updates) if case in ("grpo-step", "ppo-step") else
                                                       (args.steps, args.warm)), completion_tokens)
        elif settings is None:
            metrics = {"error": "not set up for Unsloth" if system == "unsloth" else "TRL 1.16 has no such trainer"}
        else:
            metrics = peer(case, settings, args, work, completion_tokens)
        gpus = args.gpus if system == "rungs" and case != "sample" else 1
        if "tokens_per_s" in metrics and peak:
            metrics["mfu"] = round(metrics["tokens_per_s"] * flops_a_token(
                case, config, sizes, metrics.get("completion_tokens", completion_tokens)) / (peak * gpus), 4)
        print(f"{case} {system} {settings or ''}: {metrics.get('tokens_per_s') or metrics.get('error')} "
              f"({time.time() - began:.0f} s)", flush=True)
        return {**metrics, "workload": case, "system": f"rungs-x{gpus}" if gpus > 1 else system,
                "torch": torch.__version__.split("+")[0]}
    jobs = [(case, system, settings) for case in args.only for system in args.system
            if system == "rungs" or (system in SAMPLERS) == (case == "sample")
            for settings in settings_to_try(case, system)]
    Gpus.share(args.at_once, args.gpus)
    cases = []
    with ThreadPoolExecutor(args.at_once) as pool:
        for done in as_completed([pool.submit(Gpus.take, functools.partial(measure, *job)) for job in jobs]):
            cases.append(done.result())
            if not args.profile:
                shown = merge(path, best_of(cases), name)
    if not args.profile:
        print(f"\n{name}, {args.shape}, {ROWS} rows per step; {path}\n\n{table(shown)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
