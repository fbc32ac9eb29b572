"""Is a token's cost the same at any size? Tokens per second of training against micro-tokens, sequence length and rows per step.

    python bench/linear.py                       # one GPU, into results/bench/linear/
    python bench/linear.py --shape tiny          # a trial without a GPU

A random model in Qwen2.5-0.5B's shape with a LoRA, and random text of which 70 % is predicted; a step is what every script
does: packs, forward, backward, clipping, Adam. One number is varied at a time: by default packs of at most 8,192 tokens and
sequences of 512 in steps of 32 rows. Steps are run until their sizes are recorded, then three are timed, and the median counts.
"""
import dataclasses
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import fast
import workload

VARIED = {"micro_tokens": (1024, 2048, 4096, 8192, 16384, 32768), "length": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
          "rows": (1, 2, 4, 8, 16, 32, 64, 128)}


@dataclasses.dataclass(frozen=True)
class Args:
    shape: Literal["qwen2.5-0.5b", "tiny"] = "qwen2.5-0.5b"
    """Shape of the random model."""
    micro_tokens: int = 8192
    """Largest pack, where it isn't varied."""
    length: int = 512
    """Tokens of a sequence; where it is varied, a step has as many tokens as --rows sequences of this length."""
    rows: int = 32
    """Sequences per step."""
    out: str = "results/bench/linear"
    """Where <device>.json and <device>.png go."""


def examples(rows: int, length: int) -> list[common.Example]:
    g = torch.Generator().manual_seed(0)
    return [common.Example.masked(ids, [i > 0.3 * length for i in range(length)])
            for ids in torch.randint(3, 500, (rows, length), generator=g).tolist()]


def speed(work: Path, rows: int, length: int, micro_tokens: int, device) -> dict:
    """Tokens per second of a training step of a fresh model, and the most memory that the process reserved for it."""
    cuda, data, taken = device.type == "cuda", examples(rows, length), []
    gc.collect()  # the model before
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    policy = common.add_lora(common.load_model(work, None, "none", torch.bfloat16 if cuda else torch.float32, device))
    if cuda:
        fast.compile_layers(common.base_of(policy))
    params = common.flat_parameters(policy)
    optimizer = torch.optim.Adam([params], lr=1e-5, fused=cuda)
    for step in range(5):
        began = time.perf_counter()
        for pack in fast.pack(data, micro_tokens, device=device):
            (-common.token_logprobs(policy, pack).sum() / (rows * length)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    gib = round(torch.cuda.max_memory_reserved() / 2**30, 2) if cuda else None
    return {"tokens_per_s": round(rows * length / statistics.median(taken[2:])), "gib": gib}


def plot(curves: dict[str, list[dict]], title: str, path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(curves), figsize=(12, 3.4), sharey=True)
    for axis, (name, points) in zip(axes, curves.items()):
        axis.plot([p[name] for p in points], [p["tokens_per_s"] / 1e3 for p in points], marker="o")
        axis.set(ylim=(0, None), xlabel={"micro_tokens": "--micro-tokens", "length": "tokens a sequence",
                                         "rows": "rows a step"}[name])
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("thousand tokens/s")
    figure.suptitle(title)
    figure.tight_layout()
    common.write_atomic(path, lambda p: figure.savefig(p, dpi=110, format="png"))


def main(args: Args) -> None:
    device = common.setup_device()
    if device.type == "cpu" and args.shape != "tiny":
        common.fail("no GPU; give --shape tiny")
    work = Path("runs/bench-linear")
    workload.make_model(work, args.shape, torch.bfloat16 if device.type == "cuda" else torch.float32)
    curves = {}
    for name, values in VARIED.items():
        curves[name] = []
        for value in values:
            size = {"micro_tokens": args.micro_tokens, "length": args.length, "rows": args.rows} | {name: value}
            if name == "length":
                size["rows"] = max(1, args.rows * args.length // value)
            size["micro_tokens"] = max(size["micro_tokens"], size["length"])
            if device.type == "cpu":
                size["rows"] = min(size["rows"], 8)
            curves[name].append(size | speed(work, size["rows"], size["length"], size["micro_tokens"], device))
            print(curves[name][-1], flush=True)
    hardware, out = common.hardware()["device"], Path(args.out)
    file = hardware.lower().replace(" ", "-")
    common.write_json(out / f"{file}.json", {"device": hardware, "shape": args.shape, **curves})
    plot(curves, f"Training, {args.shape}, {hardware}: python bench/linear.py", out / f"{file}.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
