"""evaluate.py against plain lm-eval: the same tasks, items and weights by RungsLM and by lm-eval's own HFLM, in one process.

    python bench/evaluation.py --eval-data data/demo/eval --limit 100                     # bfloat16: what rounding changes
    python bench/evaluation.py --eval-data data/demo/eval --limit 8 --dtype float32       # every figure is equal

One JSON line per task: seconds and their ratio (theirs / ours), the headline scores by both, items whose scores differ
(by over 0.005), mean |difference| of log-likelihoods (nats) or the share of texts that differ. In bfloat16 the two
differ by rounding alone: packs against padded batches, and an LM head in fp32 (evaluate.py's first deviation). Figures
of one H100: NOTES.md.
"""
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from lm_eval.models.huggingface import HFLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import chat
import common
import evaluate
import harness


@dataclasses.dataclass(frozen=True)
class Args:
    model: str = "models/smollm2-135m-instruct"
    """Model: a local directory or a hub id."""
    eval_data: str | None = None
    """As in evaluate.py."""
    limit: int | None = 100
    """Items of each task; for MMLU spread over the subjects."""
    tasks: tuple[str, ...] = tuple(evaluate.TASKS)
    """Tasks to run, of the four."""
    max_gen_toks: int | None = None
    """As in evaluate.py."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and forward."""
    batch_size: int = 64
    """Rows per batch of HFLM."""
    device: str = "auto"
    """Torch device; "auto" takes the GPU if there is one."""


def compare(task: str, ours: tuple[dict, list[dict]], theirs: tuple[dict, list[dict]]) -> dict:
    """The figures of a task, from both systems' (result, items) as evaluate.run_task gives them."""
    (rungs, a), (lm_eval, b) = ours, theirs
    assert [(x["task"], x["doc_hash"]) for x in a] == [(x["task"], x["doc_hash"]) for x in b]
    figures = {"task": task, "items": len(a), "rungs_s": rungs["wall_time_s"], "lm_eval_s": lm_eval["wall_time_s"],
               "ratio": round(lm_eval["wall_time_s"] / rungs["wall_time_s"], 2)}
    for title, key in evaluate.HEADLINE.items():
        if key.startswith(f"{task}/"):
            scores = (100 * result["metrics"][key] for result in (rungs, lm_eval))
            figures[title] = dict(zip(("rungs", "lm_eval"), (round(x, 3) for x in scores)))
    pairs = [(np.hstack(list(x["metrics"].values())), np.hstack(list(y["metrics"].values()))) for x, y in zip(a, b)]
    figures["items_scored_otherwise"] = sum(bool((abs(x.astype(float) - y) > 0.005).any()) for x, y in pairs)
    if "response" in a[0]:
        figures["other_texts"] = round(float(np.mean([x["response"] != y["response"] for x, y in zip(a, b)])), 4)
    else:
        gaps = [abs(p - q) for x, y in zip(a, b) for p, q in zip(x["loglikelihoods"], y["loglikelihoods"])]
        figures["mean_loglikelihood_gap"] = round(float(np.mean(gaps)), 5)
    return figures


def main(args: Args) -> None:
    device, directory = common.setup_device(args.device), common.resolve_model(args.model)
    tokenizer, dtype = chat.load_tokenizer(directory), getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory(prefix="rungs-eval-") as scratch:
        options = evaluate.Args(eval_data=args.eval_data, limit=args.limit, max_gen_toks=args.max_gen_toks)
        manager, tasks, _ = evaluate.load_tasks(options, Path(scratch))
        model, plain = (common.load_model(directory, None, "none", dtype, device) for _ in range(2))
        plain.set_attn_implementation("sdpa")
        if args.dtype == "bfloat16":
            model.set_output_embeddings(harness.Float32Head(model.get_output_embeddings()))
        systems = (harness.RungsLM(model, tokenizer, micro_tokens=options.micro_tokens),
                   HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=args.batch_size))
        for task, shots, limit in tasks:
            if task in args.tasks:
                results = [evaluate.run_task(lm, manager.load([task]), task, shots, limit, options) for lm in systems]
                print(json.dumps(compare(task, *results) | {"limit": args.limit, "dtype": args.dtype,
                                                            "device": common.hardware()}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
