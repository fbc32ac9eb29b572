"""What differs on a GPU when a run is killed and continued, beside what differs between two runs that nobody stopped.

    python bench/resume.py                                   # SFT, DPO and GRPO, both engines, on a GPU
    python bench/resume.py --device cpu --only sft --jobs 1  # a trial without a GPU: nothing differs

Each command runs three times on the benchmark's tiny model: twice to its end, once with SIGKILL after its second
checkpoint and the same command again. Then the same with RUNGS_DETERMINISTIC=1. One JSON line per command and mode:
`again` compares the second run with the first, `continued` the killed one with the first; each as
{"identical": whether all weights have the same bits, "distance": ‖θ − θ'‖ / ‖θ‖ over all factors of the adapter,
"metric": difference of the held-out loss (GRPO: of the KL to the reference)}. Results go to --out,
results/bench/resume/<device>.json.
"""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import workload
from train import record_path

REPO = Path(__file__).parent.parent
METRIC = {"sft": "heldout_loss", "dpo": "heldout_loss", "grpo": "kl_reference"}
MODES = {"default": {}, "deterministic": {"RUNGS_DETERMINISTIC": "1"}}


@dataclasses.dataclass(frozen=True)
class Args:
    only: tuple[Literal["sft", "dpo", "grpo"], ...] = ("sft", "dpo", "grpo")
    """Scripts."""
    engine: tuple[Literal["fast", "plain"], ...] = ("fast", "plain")
    """Engines."""
    device: str = "auto"
    """Torch device of the runs."""
    jobs: int = 4
    """Commands at a time."""
    work: str = "runs/bench-resume"
    """Where model, data and runs go; what is there is deleted."""
    out: str = "results/bench/resume"
    """Where <device>.json goes."""


def command(script: str, engine: str, work: Path, device: str) -> list[str]:
    rows = ["--rows", "96", "--batch-size", "8", "--heldout-rows", "16", "--eos-prompts", "2", "--eos-tokens", "8"]
    data = {"sft": ["--model", f"{work}/model", "--quantization", "none", "--data", f"{work}/sft.jsonl", *rows],
            "dpo": ["--sft-adapter", f"{work}/parent", "--data", f"{work}/pairs.jsonl", *rows],
            "grpo": ["--sft-adapter", f"{work}/parent", "--task", f"{work}/task.py", "--updates", "12", "--batch-size", "4",
                     "--group-size", "4", "--completion-tokens", "32", "--heldout-rows", "1", "--pass-k", "0",
                     "--eval-every", "0", "--max-gap", "10", "--results", f"{work}/results"]}[script]
    return [sys.executable, f"{script}.py", *data, "--engine", engine, "--device", device, "--checkpoint-every", "3"]


def finish(line: list[str], out: Path, kill: bool = False, **environment) -> Path:
    """Run the command to its end, in the directory `out`; with `kill`, stopped once after its second checkpoint."""
    for stop in (True, False) if kill else (False,):
        process = subprocess.Popen([*line, "--out", str(out)], cwd=REPO, env=os.environ | environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        log = out / "log.jsonl"
        while stop and process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 8):
            time.sleep(0.02)
        if stop:
            process.send_signal(signal.SIGKILL)
        printed = process.communicate()[0]
    if not (out / "run.json").is_file():
        raise SystemExit(f"{' '.join(line)} --out {out} failed:\n{printed}")
    return out


def compared(run: Path, baseline: Path, metric: str) -> dict:
    """How the adapter and the metric of a finished run differ from another's."""
    mine, theirs = (load_file(out / "adapter_model.safetensors") for out in (run, baseline))
    gap, size = (sum(x.double().square().sum() for x in tensors) ** 0.5 for tensors in (
        [mine[k] - theirs[k] for k in mine], theirs.values()))
    values = [json.loads((out / "run.json").read_text())["metrics"][metric] for out in (run, baseline)]
    return {"identical": all(torch.equal(mine[k], theirs[k]) for k in mine), "distance": (gap / size).item(),
            "metric": abs(values[0] - values[1])}


def main(args: Args) -> None:
    work, device = Path(args.work).resolve(), common.setup_device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    workload.make(work, "tiny", rows=96, prompts=64, dtype=dtype)
    finish([*command("sft", "auto", work, device.type), "--lr", "1e-3"], work / "parent")

    def case(script: str, engine: str, mode: str) -> dict:
        line, out_dir = command(script, engine, work, device.type), work / f"{script}-{engine}-{mode}"
        once, again, continued = (finish(line, out_dir / name, name == "continued", **MODES[mode])
                                  for name in ("once", "again", "continued"))
        return {"script": script, "engine": engine, "mode": mode, "metric": METRIC[script],
                **{out.name: compared(out, once, METRIC[script]) for out in (again, continued)}}
    with ThreadPoolExecutor(args.jobs) as pool:
        cases = [pool.submit(case, s, e, m) for m in MODES for e in args.engine for s in args.only]
        case_records = [future.result() for future in cases]
    for line in case_records:
        print(json.dumps(line), flush=True)
    name = common.hardware()["device"]
    common.write_json(record_path(args.out, name),
                      {"schema_version": 1, "device": name, "torch": torch.__version__, "cases": case_records})


if __name__ == "__main__":
    main(tyro.cli(Args))
