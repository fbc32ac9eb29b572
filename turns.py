"""Which of a host's GPUs a command may work on, when `make all GPUS=4` or PER_GPU=2 runs several commands at a time.

The Makefile says how many GPUs they share (RUNGS_GPUS). A command gets ready without one (imports, rows, checks), waits until
one is free and has it until it ends (common.take_turn): a lock file for each GPU says so, which the system releases however
the command ends. A training has a GPU to itself, since its minutes are a result. An evaluation alone leaves the GPU waiting for
the host, so up to RUNGS_GPU_SHARED of them, which the Makefile sets for evaluate.py and judge.py, work on one; and they begin
only when no training is getting ready or waits, since others wait for what it makes.
"""
import fcntl
import functools
import itertools
import os
import tempfile
from pathlib import Path
from typing import IO


def visible_gpus() -> list[str]:
    """The names of the first RUNGS_GPUS GPUs that this process sees, in torch's order; [] where nothing is shared."""
    count = int(os.environ.get("RUNGS_GPUS", 0))
    named = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return named[:count] or [str(i) for i in range(count)]


def lock(name: str, how: int) -> IO | None:
    """A lock file of this user, locked: exclusively (fcntl.LOCK_EX), or with others that share it (LOCK_SH). None where it
    would have to wait, if `how` includes fcntl.LOCK_NB."""
    folder = Path(tempfile.gettempdir()) / f"rungs-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    file = open(folder / name, "a")
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        file.close()
        return None
    return file


@functools.cache
def announce() -> IO | None:
    """If this command is a training: from the first call on evaluations wait for it, until what is returned is closed."""
    return None if os.environ.get("RUNGS_GPU_SHARED") else lock("training", fcntl.LOCK_SH)


def take(needed: int) -> dict[int, list[IO]]:
    """{torch's number of a GPU: its locks}, for as many free GPUs as a training needs, or for one that an evaluation may share;
    {} where there are not enough now. A GPU is free again when its locks are closed."""
    gpus, found = list(enumerate(visible_gpus())), {}
    alone, beside_others = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB
    if shared := int(os.environ.get("RUNGS_GPU_SHARED", 0)):
        if not (none_comes := lock("training", alone)):
            return {}
        none_comes.close()
        for place, (i, gpu) in itertools.product(range(shared), gpus):  # the first place on any GPU, then the second
            if (turn := lock(gpu, beside_others)) and (mine := lock(f"{gpu}.{place}", alone)):
                return {i: [turn, mine]}
        return {}
    for i, gpu in gpus:
        if len(found) < needed and (turn := lock(gpu, alone)):
            found[i] = [turn]
    return found if len(found) == needed else {}
