"""--track: a run's log at Weights & Biases or trackio, beside log.jsonl, which has every step in any case.

Both have the same interface as far as it is used here (init, log, Image, Table, finish). Without an account, a key or a
network W&B logs offline into wandb/, to be sent later by `wandb sync`; trackio logs into a local data base unless
TRACKIO_SPACE_ID names a Space. If a tracker is missing or fails, the run prints one warning and goes on without it.
"""
from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

from common import leaves, say, sha256_json, without_places

PROJECT = "rungs"
SAMPLES = 64  # rows of completions.jsonl that are attached


def new_id(config_hash: str, directory: Path) -> str:
    """A run's name at a tracker. It is saved with the run's state, so that a resumed run goes on under it; a new run in
    the same directory gets another."""
    return f"{config_hash}-{sha256_json([config_hash, str(directory.resolve()), time.time()])[:8]}"


class Tracker:
    """A run at the tracker of this kind, "wandb" or "trackio"; `record` is the run's, as run.json has it."""

    def __init__(self, kind: str, record: dict[str, Any]):
        self.kind, self.run = kind, None
        try:
            self.module = importlib.import_module(kind)
            self.run = (begin_wandb if kind == "wandb" else begin_trackio)(self.module, record)
        except ImportError:
            say(f"WARNING: --track {kind}: it is not installed (pip install {kind}); the run goes on without it")
        except Exception as e:  # a tracker and what it talks to raise any kind; none may end a run
            self.drop(e)

    def drop(self, error: Exception) -> None:
        self.run = None
        say(f"\nWARNING: --track {self.kind} failed ({type(error).__name__}); the run goes on without it")

    def log(self, line: dict[str, Any], step: int) -> None:
        """Quantities of a step; those without a value in this step are left out."""
        if self.run:
            try:
                self.run.log({k: v for k, v in line.items() if v is not None}, step=step)
            except Exception as e:
                self.drop(e)

    def attach(self, record: dict[str, Any], directory: Path, step: int) -> None:
        """What the finished run is: final figures and hashes, curves.png, and sample completions where it has some."""
        if not self.run:
            return
        final = {k: record[k] for k in ("config_hash", "train_invariants", "adapter_sha256", "wall_time_s")}
        try:
            attached = {f"final/{k}": v for k, v in (final | record["metrics"]).items() if v is not None}
            attached["curves"] = self.module.Image(str(directory / "curves.png"))
            if (directory / "completions.jsonl").is_file():
                columns, rows = sample_table(directory / "completions.jsonl")
                attached["completions"] = self.module.Table(columns=columns, data=rows)
        except Exception as e:
            self.drop(e)
        else:
            self.log(attached, step)

    def finish(self) -> None:
        if self.run:
            try:
                self.run.finish()
            except Exception as e:
                self.drop(e)


def begin_wandb(wandb: Any, record: dict[str, Any]) -> Any:
    """The run at W&B; offline where WANDB_MODE says so, where there is no key, or where the server doesn't answer."""
    mode = os.environ.get("WANDB_MODE")
    if not mode:
        try:
            mode = "online" if wandb.login(prompt=False) else "offline"
        except Exception as e:
            mode = "offline"
            say(f"WARNING: --track wandb: no access ({type(e).__name__}); logging offline, for `wandb sync` later")
    return wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=record["name"], id=record["track_id"],
                      resume="allow", config=without_places(record), mode=mode,
                      settings=wandb.Settings(console="off", init_timeout=60))


def begin_trackio(trackio: Any, record: dict[str, Any]) -> Any:
    """The run at trackio, which knows runs by their names."""
    return trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), resume="allow", embed=False,
                        auto_log_cpu=False, auto_log_gpu=False,  # log.jsonl has what matters here
                        name=f"{record['name']}-{record['track_id']}", config=without_places(record))


def sample_table(path: Path) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows) of the first answers in completions.jsonl: the prompt, then each figure before and after."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:SAMPLES]]
    rows = [dict(leaves({k: line[k] for k in ("prompt", "before", "after")})) for line in lines]
    columns = list(dict.fromkeys(k for row in rows for k in row))
    return columns, [[row.get(k) for k in columns] for row in rows]
