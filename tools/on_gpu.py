"""Run a command on the first free GPU of several: what `make all GPUS=4` puts before each phase.

    python tools/on_gpu.py 4 2 python dpo.py --sft-adapter runs/sft_v2

Arguments: the number of GPUs, the commands that may be on one at a time, the command. Of several on one GPU, one works;
the others get as far as they can without it (imports, rows, checks) and wait for their turn (common.take_turn). Only
evaluations work beside each other, since one alone leaves the GPU waiting for the host. The command sees one GPU
(CUDA_VISIBLE_DEVICES) and takes this process's place; the lock file that reserves its place is released when it ends,
however it ends. If CUDA_VISIBLE_DEVICES is set already, only the GPUs that it names are counted.
"""
import fcntl
import os
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    gpus, jobs, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    given = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    cards = given[:gpus] or [str(i) for i in range(gpus)]
    locks = Path(tempfile.gettempdir()) / f"rungs-gpus-{os.getuid()}"
    locks.mkdir(exist_ok=True)
    while True:
        for slot in range(jobs):
            for card in cards:
                lock = os.open(locks / f"{card}.{slot}", os.O_RDWR | os.O_CREAT)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(lock)
                    continue
                os.set_inheritable(lock, True)  # the command holds it
                os.environ["CUDA_VISIBLE_DEVICES"] = card
                os.environ["RUNGS_GPU_TURN"] = str(locks / f"{card}.turn")
                if {Path(word).name for word in command} & {"evaluate.py", "judge.py"}:
                    os.environ["RUNGS_GPU_SHARED"] = str(jobs)
                os.execvp(command[0], command)
        time.sleep(0.5)


if __name__ == "__main__":
    main()
