"""Which GPU of a host a command works on, when `make all GPUS=4` or PER_GPU=2 runs several commands at a time.

A command prepares without a GPU (imports, rows, checks), waits until one of the host's first RUNGS_GPUS is free, and
keeps it until it ends (common.take_turn). A lock file per GPU records this; the operating system releases it when the
process ends, also after a crash.

A training run has a GPU to itself, since its minutes are a result. An evaluation alone leaves the GPU waiting for the
host, so up to RUNGS_GPU_SHARED evaluations work on one: the Makefile sets it for evaluate.py and judge.py. They start
only while no training run is preparing for that GPU or waiting for it, because other commands depend on training.
"""
import fcntl
import functools
import itertools
import os
import tempfile
from pathlib import Path
from typing import IO

ALONE, BESIDE_OTHERS = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB


def visible_gpus() -> list[str]:
    """The names of the first RUNGS_GPUS GPUs that this process sees, in torch's order; [] where nothing is shared."""
    count = int(os.environ.get("RUNGS_GPUS", 0))
    named = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return named[:count] or [str(i) for i in range(count)]


def lock(name: str, how: int) -> IO | None:
    """A lock file of this user, locked until it is closed; None where it can't be now. how: ALONE, BESIDE_OTHERS, or
    fcntl.LOCK_SH, which waits."""
    folder = Path(tempfile.gettempdir()) / f"rungs-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    file = open(folder / name.replace("/", "_"), "a")  # MIG-GPU-…/1/0
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        file.close()
        return None
    return file


@functools.cache
def announce() -> list[IO | None]:
    """In a training run: no evaluation starts on its GPUs from the first call until the returned locks are closed. In
    an evaluation: nothing."""
    evaluates = os.environ.get("RUNGS_GPU_SHARED")
    return [] if evaluates else [lock(f"{gpu}.training", fcntl.LOCK_SH) for gpu in visible_gpus()]


def announced(gpu: str) -> bool:
    """Whether a training run is preparing for this GPU or waiting for it."""
    if free := lock(f"{gpu}.training", ALONE):
        free.close()
    return free is None


def take(needed: int) -> dict[int, list[IO]]:
    """{torch's number of a GPU: its locks}: as many free GPUs as a training run needs, or one that an evaluation may
    share; {} if not enough are free. Closing the locks gives a GPU back."""
    gpus, locks_by_gpu = list(enumerate(visible_gpus())), {}
    if shared := int(os.environ.get("RUNGS_GPU_SHARED", 0)):
        for slot, (i, gpu) in itertools.product(range(shared), gpus):  # the first slot on any GPU, then the second
            if announced(gpu):
                continue
            if (turn := lock(gpu, BESIDE_OTHERS)) and (mine := lock(f"{gpu}.{slot}", ALONE)):
                return {i: [turn, mine]}
        return {}
    for i, gpu in gpus:
        if len(locks_by_gpu) < needed and (turn := lock(gpu, ALONE)):
            locks_by_gpu[i] = [turn]
    return locks_by_gpu if len(locks_by_gpu) == needed else {}
