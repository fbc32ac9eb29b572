"""Write a policy as a full model directory: base + adapter, merged, which transformers loads without PEFT.

    W' = round(W + (alpha/r) B A)          in fp32 arithmetic from the base's original weights, rounded once

    python tools/merge.py runs/dpo_v1 merged/dpo_v1                     # a run, or any plain PEFT LoRA adapter
    python tools/merge.py runs/dpo_v1 merged/dpo_v1 --dtype float32     # nothing is rounded beyond fp32

bfloat16 is coarse for small updates: the rounding error is printed as a share of the adapter's own update.
Serve the adapter itself (PEFT, vLLM with LoRA) where that share matters. Other tools read the directory as any model:

    vllm serve merged/dpo_v1
    python llama.cpp/convert_hf_to_gguf.py merged/dpo_v1 --outfile dpo_v1.gguf
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import inputs
from common import fail


@dataclass(frozen=True)
class Args:
    adapter: tyro.conf.Positional[str]
    """A run directory, or any plain PEFT LoRA adapter (directory or hub id)."""
    out: tyro.conf.Positional[str]
    """Directory to write; it must not exist yet, or be empty."""
    model: str | None = None
    """The base model; by default the one that the adapter was trained on."""
    other_base: bool = False
    """Accept a plain PEFT adapter that names another base than --model."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights that are written."""


@torch.no_grad()
def main(args: Args) -> None:
    out = Path(args.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        fail(f"{out} exists and is not an empty directory; choose another place")
    start = inputs.read_start(args.adapter, args.model, args.other_base)
    model = common.load_model(start.model_dir, start.adapter, "none", torch.float32)
    dtype, rounding, update = getattr(torch, args.dtype), 0.0, 0.0
    for name, (a, b) in common.read_factors(start.adapter).items():
        exact = model.get_submodule(name).weight
        rounding += (exact.to(dtype).double() - exact.double()).square().sum().item()
        update += (common.LORA_SCALE * (b.double() @ a.double())).square().sum().item()
    model = model.to(dtype)
    common.save_model(model, start.tokenizer, out)
    share = (rounding / update) ** 0.5 if update else 0.0
    print(f"{out}: {start.model} with {args.adapter} merged, {args.dtype}; rounding moved the adapted weights by "
          f"{rounding ** 0.5:.4g}, the adapter by {update ** 0.5:.4g} (Frobenius norms; {share:.1%})")
    common.say_next("python", "tools/chat.py", out)


if __name__ == "__main__":
    main(tyro.cli(Args))
