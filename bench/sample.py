"""Tokens per second of sampling: common.Sampler against transformers' generate and vLLM, on random weights.

    python bench/sample.py --rows 64 256 --system rungs transformers-generate static-cache
    python bench/sample.py --rows 64 --system rungs rungs-torch --lora-rank 16       # with and without Triton kernels
    python bench/sample.py --rows 64 256 --lora-rank 0 16 --system rungs vllm        # vLLM is none of our requirements
    python bench/sample.py --rows 64 --profile        # the kernels of one decoding step, by time
    python bench/sample.py --shape tiny --tokens 16   # a trial without a GPU

The shape is Qwen2.5-0.5B's in bfloat16; every row samples --tokens tokens at temperature 1 after one of --prompts random
prompts of --prompt-tokens to twice as many tokens, and no EOS ends it early. A case is run five times: the first includes
compiling and capturing of steps (its surplus is setup_s), the second, on a GPU, recording of the pass over prompts, and
the median of the last three is its speed, prompts included. One JSON line per case.

On one H200 (torch 2.11), adapter of rank 16, the second call of an earlier version: 64 rows 43,080 tokens/s, 1.5 times the
torch path in the same call (which is 2.8 times transformers' static cache and 10 times its default); 256 rows 128,838, 1.3
times. Later versions are faster: bench/NOTES.md.
"""
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import fast
from workload import SHAPES


@dataclasses.dataclass(frozen=True)
class Args:
    system: tuple[Literal["rungs", "rungs-torch", "rungs-plain", "transformers-generate", "static-cache", "vllm"],
                  ...] = ("rungs",)
    """What samples: common.Sampler with the fast engine, with this but without its Triton kernels, or with the plain
    engine; generate with its dynamic or its static (compiled) cache; or vLLM with its defaults."""
    lora_rank: tuple[int, ...] = (0,)
    """Rank of an adapter beside the weights (rungs, vllm); 0: none, which is what an adapter merged into them costs.
    One case each."""
    rows: tuple[int, ...] = (64,)
    """Rows sampled at the same time; one case each."""
    tokens: int = 256
    """Tokens sampled in each row."""
    prompts: int = 8
    """Different prompts; rows share them evenly."""
    prompt_tokens: int = 64
    """Shortest prompt; the longest has twice as many."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Below 1 the sampler sorts the vocabulary."""
    compile: bool = True
    """Fuse the elementwise parts with torch.compile, where no Triton kernels run (rungs-torch)."""
    shape: Literal["qwen2.5-0.5b", "qwen2.5-1.5b", "tiny"] = "qwen2.5-0.5b"
    """Shape of the random model."""
    device: str = "auto"
    """Torch device; "auto" takes the GPU if there is one."""
    profile: bool = False
    """Print the kernels of one decoding step over the longest rows, by time (rungs)."""


class NoText:
    """A tokenizer for token ids alone: its EOS is never sampled, and nothing is decoded."""
    eos_token_id = -1

    def decode(self, ids, **kwargs) -> str:
        return ""


def make_model(shape: str, device: torch.device) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=True)
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = None
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def make_prompts(args: Args, rows: int, vocabulary: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    lengths = torch.linspace(args.prompt_tokens, 2 * args.prompt_tokens, args.prompts).int().tolist()
    distinct = [torch.randint(vocabulary, (n,), generator=g).tolist() for n in lengths]
    return [distinct[i * args.prompts // rows] for i in range(rows)]


def policy_of(model, rank: int, engine: str):
    """The model with a random adapter of this rank beside its weights (0: the model itself), for an engine."""
    policy = common.add_lora(model, rank, 2 * rank) if rank else model
    for p in common.trainable(policy) if rank else []:
        torch.nn.init.normal_(p, std=0.01)
    common.base_of(policy).__dict__["engine"] = engine
    return policy


def rungs(model, prompts: list[list[int]], args: Args):
    sampler = common.Sampler(model, NoText(), short=not args.compile)
    return sampler, lambda: sampler.sample(prompts, args.tokens, args.temperature, args.top_p, seed=0)


def generate(model, prompts: list[list[int]], args: Args, cache: str | None):
    """transformers' generate on left-padded prompts."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    how = dict(do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=0) if args.temperature else \
        dict(do_sample=False)
    return lambda: model.generate(ids, attention_mask=mask, max_new_tokens=args.tokens, pad_token_id=0, use_cache=True,
                                  cache_implementation=cache, **how)


def vllm(policy, rank: int, prompts: list[list[int]], args: Args):
    """vLLM's offline engine on a model of this shape (its own random weights), the adapter as a LoRA request."""
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        common.fail(f"--system vllm: {error}; it is none of our requirements, and wants an environment of its own")
    folder = tempfile.TemporaryDirectory()  # it lives as long as the function that is returned
    work = Path(folder.name)
    config = common.base_of(policy).config
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(work / "model")
    if rank:
        policy.save_pretrained(work / "adapter")
    engine = LLM(str(work / "model"), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
                 max_model_len=max(map(len, prompts)) + args.tokens, max_num_seqs=len(prompts), enable_lora=bool(rank),
                 max_lora_rank=max(8, rank), gpu_memory_utilization=0.5)
    settings = SamplingParams(temperature=args.temperature, top_p=args.top_p, max_tokens=args.tokens, ignore_eos=True,
                              detokenize=False)
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    adapter = LoRARequest("adapter", 1, str(work / "adapter")) if rank else None

    def call(folder=folder):
        done = engine.generate(asked, settings, lora_request=adapter, use_tqdm=False)
        assert all(len(one.outputs[0].token_ids) == args.tokens for one in done)
    return call


def seconds(call, device: torch.device) -> float:
    """Wall time of a call, its GPU work included."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    began = time.time()
    call()
    synchronize()
    return time.time() - began


@torch.no_grad()
def profile(sampler: common.Sampler, rows: int, longest: int, device: torch.device, steps: int = 20) -> dict:
    """Print the kernels of one step by time; {time of a step back to back in ms, kernels in it}."""
    decoder = sampler.decoder
    stride = fast.packing.round_up(longest, decoder.LENGTH_BUCKET)
    step = decoder._program(decoder._bucket(rows), stride, stride, "sample")
    decoder.position.fill_(decoder.READBACK)
    step()
    ms = seconds(lambda: [step() for _ in range(steps)], device) / steps * 1e3
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as trace:
        seconds(lambda: [step() for _ in range(steps)], device)
    spent, count = Counter(), Counter()
    for e in trace.events():
        if device.type == "cpu" or e.device_type == torch.autograd.DeviceType.CUDA:
            spent[e.name] += (e.device_time if device.type == "cuda" else e.self_cpu_time_total) / steps
            count[e.name] += 1
    print(f"{'us a step':>10} {'calls':>6} {'us each':>8}  kernel", file=sys.stderr)
    for name, us in spent.most_common(30):
        print(f"{us:10.1f} {count[name] / steps:6.1f} {us * steps / count[name]:8.2f}  {name[:100]}", file=sys.stderr)
    return {"step_ms": round(ms, 3), "kernels": round(count.total() / steps), "kernel_ms": round(spent.total() / 1e3, 3)}


def main(args: Args) -> None:
    device = common.setup_device(args.device)
    model = make_model(args.shape, device)
    cases = [(system, rank, rows) for rank in args.lora_rank for rows in args.rows for system in args.system
             if system.startswith(("rungs", "vllm")) or rank == args.lora_rank[0]]  # the others without an adapter, once
    for system, rank, rows in cases:
        prompts = make_prompts(args, rows, model.config.vocab_size)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        os.environ.pop("RUNGS_KERNELS", None)
        if system == "rungs-torch":
            os.environ["RUNGS_KERNELS"] = "0"
        rank = rank if system.startswith(("rungs", "vllm")) else 0
        policy = policy_of(model, rank, "plain" if system == "rungs-plain" else "fast")
        if system.startswith("rungs"):
            sampler, call = rungs(policy, prompts, args)
        elif system == "vllm":
            call = vllm(policy, rank, prompts, args)
        else:
            call = generate(model, prompts, args, "static" if system == "static-cache" else None)
        first, _, *later = [seconds(call, device) for _ in range(5)]
        taken = statistics.median(later)
        metrics = {"workload": "sample", "system": system, "tokens_per_s": round(rows * args.tokens / taken),
                   "ms_per_step": round(taken / args.tokens * 1e3, 3), "setup_s": round(first - taken, 1)}
        if device.type == "cuda" and system != "vllm":  # a process of its own, which takes what it is given
            metrics["peak_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        if args.profile and system in ("rungs", "rungs-torch"):
            metrics.update(profile(sampler, rows, max(map(len, prompts)) + args.tokens, device))
        settings = dataclasses.asdict(args) | {"rows": rows, "lora_rank": rank, "device": common.hardware()["device"],
                                               "torch": torch.__version__}
        for k in ("system", "profile"):
            del settings[k]
        print(json.dumps({**metrics, "settings": settings}), flush=True)
        sampler = call = None  # before the next case's are made
        if rank:
            policy.unload()


if __name__ == "__main__":
    main(tyro.cli(Args))
