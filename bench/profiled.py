"""Run one of the scripts and print where the time of some steps goes.

    python bench/profiled.py FIRST sft.py FLAGS…        (train.py --profile calls it)

Steps FIRST+1 to FIRST+STEPS are watched by torch.profiler. Printed after "-- profile": the wall time of a step without and
with the profiler, the share of it in which the GPU works, that share by kind of kernel, the kernels by time, and between
which kernels the GPU waits.
"""
import runpy
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

STEPS = 3
KINDS = (  # the first whose words are in a kernel's name
    ("compiled", ("triton",)), ("attention", ("flash", "fmha", "attention")), ("nf4", ("dequant", "quantize", "bnb")),
    ("optimizer", ("multi_tensor", "foreach", "adam")), ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "splitk")),
    ("copies", ("memcpy", "memset", "copy")), ("other", ("",)))


def report(trace, wall: float, plain: float) -> None:
    gpu = torch.cuda.is_available()
    spent, count = Counter(), Counter()
    for e in trace.events():
        if not gpu or e.device_type == torch.autograd.DeviceType.CUDA:
            spent[e.name] += (e.device_time if gpu else e.self_cpu_time_total) / STEPS / 1e3
            count[e.name] += 1
    kinds = Counter()
    for name, ms in spent.items():
        kinds[next(kind for kind, words in KINDS if any(w in name.lower() for w in words))] += ms
    print(f"-- profile of {STEPS} steps: {plain * 1e3:.1f} ms per step unwatched, {wall * 1e3:.1f} ms watched; kernels "
          f"{spent.total():.1f} ms per step, {count.total() / STEPS:.0f} of them")
    print("   " + ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in kinds.most_common()))
    print(f"{'ms/step':>10} {'calls':>8} {'us each':>9}  kernel")
    for name, ms in spent.most_common(45):
        print(f"{ms:10.2f} {count[name] / STEPS:8.1f} {ms * 1e3 * STEPS / count[name]:9.1f}  {name[:150]}")
    if gpu:
        waits(trace)


def waits(trace) -> None:
    """Print where no kernel runs: total time by length of gap, and the kernels before and after the longest gaps."""
    ran = sorted((e.time_range.start, e.time_range.end, e.name) for e in trace.events()
                 if e.device_type == torch.autograd.DeviceType.CUDA)
    longest, spent, at = Counter(), Counter(), ran[0]
    for start, end, name in ran[1:]:
        if (gap := start - at[1]) > 0:
            spent["below 5 us" if gap < 5 else "5 to 50 us" if gap < 50 else "above 50 us"] += gap / STEPS / 1e3
            if gap >= 20:
                longest[at[2][:60], name[:60]] += gap / STEPS / 1e3
        at = max(at, (start, end, name), key=lambda k: k[1])
    print("waits, ms per step: " + ", ".join(f"{kind} {ms:.1f}" for kind, ms in spent.most_common()))
    for (before, after), ms in longest.most_common(25):
        print(f"{ms:10.2f}  {before}  ->  {after}")


def main(first: int, script: str, flags: list[str]) -> None:
    kind = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[kind.CUDA if torch.cuda.is_available() else kind.CPU])
    log, ended = common.Run.log, []  # when each step ended

    def watched(self, step: int, *line) -> None:
        log(self, step, *line)
        if step in (first - min(first, STEPS), first, first + STEPS) and torch.cuda.is_available():
            torch.cuda.synchronize()
        ended.append(time.time())
        if step == first:
            profiler.start()
            self.watched_from = time.time()
        elif step == first + STEPS:
            wall = (time.time() - self.watched_from) / STEPS
            profiler.stop()
            before = min(first, STEPS)
            report(profiler, wall, (ended[first] - ended[first - before]) / before)
    common.Run.log = watched
    sys.argv = [script, *flags]
    runpy.run_path(str(Path(common.__file__).parent / script), run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
