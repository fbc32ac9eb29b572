"""Everything about *running* a model and a run; nothing about any method's maths.

The sections, in the order a run meets them:
  1. errors, hashing, files, locks: all in files.py
  2. ranks, seeds, the order of the data    6. micro-batches, log-probabilities, what a policy moved by
  3. fairness: invariants and hashes        7. sampling
  4. models, checks of flags                8. the run directory: lock, log, checkpoint, resume, failures
  5. fresh LoRA, composed adapters, saving  9. results/metrics.json

Shapes: T tokens of a micro-batch (fast: in all; plain: of its longest row), N its sequences, K its predicted (trained
or scored) tokens, H hidden size, V vocabulary, B rows. What exists for speed alone is in fast/, tokenizers and
chat templates are in chat.py, rows and the preflight in inputs.py, the estimate of a GPU's memory is in memory.py.
"""
from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import errno
import functools
import gc
import importlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its note on optional CPU kernels at every import
gc.disable()  # objects made at import stay alive: no collection scans them, now or later (see import_library)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from files import (  # passed on: common.fail, common.write_json, …
    Degenerate, Lock, bucket, check_fields, fail, file_sha256, host, is_running, leaves, nulled, rank, read_json,
    remove_temporaries, say, say_next, scratch, sha256_json, tensor_entries, tensors_sha256, to_json,
    without_places, world, write_atomic, write_json, write_text)

if TYPE_CHECKING:  # transformers and PEFT take seconds to import: done in the functions that need them
    from peft import PeftModel

try:
    import fast
except ModuleNotFoundError as e:  # without the folder everything runs on the plain engine
    if e.name != "fast":
        raise
    fast = None

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft asks transformers the old way
warnings.filterwarnings("ignore", message="cumsum_cuda_kernel does not have a deterministic")  # see without_gradients
gc.freeze()
gc.enable()

QWEN = "Qwen/Qwen2.5-0.5B@060db6499f32faf8b98477b0a26969ef7d8b9987"
ULTRACHAT = "HuggingFaceH4/ultrachat_200k@8049631c405ae6576f93f445c6b8166f76f5505a:train_sft"
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized@3949bf5f8c17c394422ccfab0c31ea9c20bdeb85:train_prefs"
# The climb: method -> (phase, the row that make trains). evaluate.py and report.py go by it; docs/add-a-method.md.
METHODS = {"sft": (1, "sft_v2"), "dpo": (2, "dpo_v1"), "reward": (3, "rm_v1"), "ppo": (3, "ppo_v1"),
           "grpo": (4, "grpo_v1"), "kto": (5, "kto_v1")}


# ------------------------------------------------------------------------------------------------
# 2. Ranks: torchrun or alone, same code
# ------------------------------------------------------------------------------------------------

def setup_device(device: str = "auto") -> torch.device:
    """The device of this process; joins the process group under torchrun: NCCL for tensors on a GPU, gloo for all
    else. Where commands share GPUs it is "cuda", the current one: take_turn chooses it later, of several ranks now."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        fail(f"--device {device}: want auto, cpu, cuda or mps")
    if device.startswith("cuda") and not torch.cuda.is_available():
        fail(f"--device {device}, but torch sees no GPU; use --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        fail("--device mps, but torch sees no Apple GPU; use --device cpu")
    if os.environ.get("RUNGS_DETERMINISTIC") == "1":
        set_deterministic()
    if world() > 1 and not dist.is_initialized():
        # Python objects are gathered through gloo, which doesn't wait for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
                                timeout=datetime.timedelta(minutes=10))
    if "RUNGS_GPUS" in os.environ:
        if device.startswith("cuda:"):
            fail(f"--device {device}, but make gives each command its GPU (GPUS, PER_GPU); leave it out")
        import turns
        turns.announce()
        if world() > 1:  # ranks that waited until they are ready would find that single commands came before them
            take_turn()
    elif device.startswith("cuda"):
        device = device if ":" in device else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        use_gpu(device)
    return torch.device(device)


@functools.cache  # once per process
def leave_ranks() -> None:
    """End the process group when the process ends. Otherwise gloo's threads may still run then, which can abort a rank
    whose work is done. Call it when all ranks are about to end: after an error NCCL would wait for the others."""
    if dist.is_initialized():
        atexit.register(dist.destroy_process_group)


def use_gpu(device: str) -> None:
    """Make "cuda:i" the current device, whose streams, graphs and memory figures are meant from here on; torch may take
    RUNGS_GPU_GIB of its memory: to share it, or to try a smaller card."""
    torch.cuda.set_device(device)
    if limit := os.environ.get("RUNGS_GPU_GIB"):
        memory = torch.cuda.mem_get_info(device)[1]
        if not re.fullmatch(r"\d+(\.\d+)?", limit) or not 0 < float(limit) <= memory / 2**30:
            fail(f"RUNGS_GPU_GIB={limit}: want GiB, above 0 and at most the card's {memory / 2**30:.1f}")
        torch.cuda.set_per_process_memory_fraction(float(limit) * 2**30 / memory, device)


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU's memory that this process may still reserve: what is free, within the limit of RUNGS_GPU_GIB."""
    free, memory = torch.cuda.mem_get_info(device)
    return min(free, torch.cuda.get_per_process_memory_fraction(device) * memory - torch.cuda.memory_reserved(device))


@functools.cache  # once per process, which holds the locks until it ends
def take_turn() -> dict[int, list[IO]]:
    """Wait for a free GPU, of several ranks for one each, and work on it from here on (turns.py). Returns rank 0's
    locks.

    Nothing waits where commands don't share GPUs. What needs no GPU (imports, rows, checks) is done before, so that one
    command gets ready while another one works.
    """
    if "RUNGS_GPUS" not in os.environ:
        return {}
    import turns
    if (gpus := len(turns.visible_gpus())) < world():
        fail(f"{world()} ranks, but {gpus} GPUs: give make as many GPUS as NPROC, or no GPUS and PER_GPU")
    if torch.cuda.is_available() and torch.cuda.device_count() < gpus:
        fail(f"GPUS={gpus}, but torch sees {torch.cuda.device_count()}")
    import_library("peft")  # with transformers' modelling: most of a start-up's seconds
    mine: list[int] = []
    while not mine:
        held = turns.take(world()) if rank() == 0 else {}
        mine = from_rank0([*held])  # every time, since a single call would end after 10 minutes
        if not mine:
            time.sleep(0.1)
    for lock in turns.announce():
        lock.close()
    if torch.cuda.is_available():
        use_gpu(f"cuda:{mine[rank()]}")
    return held


def set_deterministic() -> None:
    """RUNGS_DETERMINISTIC=1: use kernels that sum in a fixed order, so that the same command on the same card gives the
    same bits (docs/reproducibility.md). torch then runs the backward of attention and of indexing without atomics, and
    its compiler chooses no kernel by timing; in fast/ no size depends on what ran before or on free memory."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it finds errors, at the cost of a kernel per tensor


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """torch.no_grad() that, in deterministic mode, also permits an operation that torch refuses although its order is
    fixed in a forward pass: cumsum along the rows of a matrix, on a GPU."""
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if strict:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.no_grad():
            yield
    finally:
        if strict:
            torch.use_deterministic_algorithms(True)


def computes_bfloat16(kind: str) -> bool:
    """Whether a device ("cuda", "cpu", "mps") multiplies bfloat16 matrices natively; emulation is slower than
    float32."""
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if kind == "cpu":  # avx512_bf16 and amx_bf16 on x86, their like on Arm
        return any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)
    return False  # the first Apple GPUs don't


def resolve_dtype(dtype: str, device: str | torch.device) -> torch.dtype:
    """--dtype as torch's; "auto": bfloat16 where the device computes it natively, else float32."""
    kind = str(device).split(":")[0]
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if kind == "auto" else kind
    return getattr(torch, ("bfloat16" if computes_bfloat16(kind) else "float32") if dtype == "auto" else dtype)


def setup_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """resolve_dtype, with a notice where "auto" means float32: compare such results with float32 runs only."""
    if dtype == "auto" and resolve_dtype(dtype, device) == torch.float32:
        say(f"note: this {device.type} device does not compute bfloat16 natively: --dtype auto is float32 here")
    return resolve_dtype(dtype, device)


def all_reduce_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; with one rank, the tensor unchanged."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_rank0(value: Any = None) -> Any:
    """Rank 0's value on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_lists(mine: list) -> list:
    """All ranks' lists end to end, in order of rank, on every rank."""
    if world() == 1:
        return mine
    boxes: list[Any] = [None] * world()
    dist.all_gather_object(boxes, mine)
    return [item for box in boxes for item in box]


def my_share(lengths: Sequence[int]) -> list[int]:
    """Indices of this rank's units of a step: dealt longest first to the rank with the fewest tokens so far.

    Every unit goes to exactly one rank, and the deal is the same on all ranks.
    """
    loads, shares = [0] * world(), [[] for _ in range(world())]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        r = min(range(world()), key=lambda r: (loads[r], r))
        loads[r] += lengths[i]
        shares[r].append(i)
    return sorted(shares[rank()])


def batches(n: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The rows of every step: each epoch a permutation of its own, cut into batches; an epoch's last may be smaller."""
    steps = []
    for epoch in range(epochs):
        order = permutation(n, seed, "epoch", epoch)
        steps += [order[i:i + batch_size] for i in range(0, n, batch_size)]
    return steps


def set_seed(seed: int) -> None:
    """Seed torch on every device. Data order never uses this state: it comes from `permutation`."""
    torch.manual_seed(seed)


def permutation(n: int, seed: int, *salt: Any) -> list[int]:
    """A permutation of range(n) that depends on nothing but (n, seed, salt)."""
    key = int(sha256_json([seed, *salt])[:15], 16)
    return torch.randperm(n, generator=torch.Generator().manual_seed(key)).tolist()


# ------------------------------------------------------------------------------------------------
# 3. Fairness: what every run shares, and what a result depends on
# ------------------------------------------------------------------------------------------------

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_SCALE = 2  # alpha / r, of every adapter in a chain


@dataclass(frozen=True)
class TrainInvariants:
    """What must be equal for two methods to be compared. Its hash is `train_invariants`."""
    model: str
    revision: str | None
    weights_sha256: str
    chat_template: str  # as used: its date fixed, its thinking off, its BOS written
    quantization: str   # the policy: "qlora" or "none"
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_bias: str = "none"
    target_modules: tuple[str, ...] = TARGET_MODULES
    stop_ids: tuple[int, ...] = ()  # tokens that end an answer
    bos: int | None = None          # the token that begins every sequence, where the tokenizer puts one

    @classmethod
    def of(cls, model: str, model_dir: Path, tokenizer, quantization: str) -> TrainInvariants:
        """The invariants of a base model; a local directory is known by its weights, not by its path."""
        (name, revision), local = split_model(model), Path(model).is_dir()
        return cls(model="(local)" if local else name, revision=None if local else revision or Path(model_dir).name,
                   weights_sha256=weights_sha256(model_dir), chat_template=tokenizer.chat_template,
                   quantization=quantization, target_modules=lora_targets(skeleton(model_dir)),
                   stop_ids=tokenizer.stop_ids, bos=tokenizer.chat_format.bos)

    @property
    def hash(self) -> str:
        return sha256_json(dataclasses.asdict(self))[:8]


# Fields of a script's Args that name a place or change speed, never the mathematics. `model`, `data`, `task`,
# `quantization` and adapter flags enter config_hash by content instead: invariants, data fingerprints, parent's hash.
RUN_KNOBS = frozenset({"model", "data", "heldout_data", "sft_adapter", "other_base", "quantization", "eval_data", "out",
                       "results", "overwrite", "reward_adapter", "watch_adapter", "task",
                       "max_dropped", "max_overlong", "preview", "max_gap", "micro_tokens", "engine", "device",
                       "checkpoint_every", "track", "push_to_hub", "score", "adapter"})


def resolved_args(args: Any) -> dict[str, Any]:
    """A script's dataclass as a dict, with the dtype that --dtype auto means on its device."""
    fields = dataclasses.asdict(args)
    if fields.get("dtype") == "auto":
        fields["dtype"] = str(resolve_dtype("auto", fields["device"])).removeprefix("torch.")
    return fields


def config_hash(method: str, args: Any, invariants: TrainInvariants, data: dict, parent: dict | None,
                scorers: dict[str, dict] | None = None, seed: bool = True) -> str:
    """First 8 hex digits of sha256 over everything that a result depends on.

    `args` is a script's dataclass, `data` its fingerprints by role, `parent` the run.json it starts from, `scorers`
    those of the reward models that it is trained against or watched by.
    With seed=False, the seed is left out along the whole lineage: the hash of the `family`.
    """
    science = {k: v for k, v in resolved_args(args).items() if k not in RUN_KNOBS}
    if not seed:
        science.pop("seed", None)
    key = "config_hash" if seed else "family"
    everything = {"method": method, "args": science, "train_invariants": invariants.hash, "data": data,
                  "parent": parent and parent[key]}
    if scorers:
        everything["scorers"] = {name: run[key] for name, run in scorers.items()}
    return sha256_json(everything)[:8]


def versions() -> dict[str, str]:
    version_by_name = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "lm-eval", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version_by_name[package] = importlib.metadata.version(package)
    return version_by_name


def hardware() -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {"device": torch.cuda.get_device_name() if gpu else platform.machine(), "gpus": world() if gpu else 0,
            "cpu_threads": torch.get_num_threads(),
            **({"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {})}


def git_commit() -> str | None:
    """Commit of this code, with '+' when the tree is changed; None outside a checkout."""
    def git(*command):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *command], capture_output=True, text=True)
    try:
        head = git("rev-parse", "HEAD")
        dirty = git("status", "--porcelain", "--untracked-files=no").stdout
    except FileNotFoundError:
        return None
    return head.stdout.strip() + ("+" if dirty else "") if head.returncode == 0 else None


# ------------------------------------------------------------------------------------------------
# 4. Models, checks of flags
# ------------------------------------------------------------------------------------------------

def split_model(model: str) -> tuple[str, str | None]:
    """(directory, None) or (hub id, revision or None) of a model as it is given."""
    name, _, revision = model.partition("@")
    return (model, None) if Path(model).is_dir() else (name, revision or None)


def from_hub(name: str, revision: str | None, patterns: list[str], repo_kind: str) -> Path:
    """Local snapshot of a hub repository's files that match `patterns`."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as e:  # hub errors come in many kinds; all mean that the files can't be had
        fail(f"can't get the {repo_kind} {name}{'@' + revision if revision else ''} from the hub ({type(e).__name__}); "
             f"give a local directory, or check the name, the network and HF_HUB_OFFLINE")


def resolve_model(model: str) -> Path:
    """Local directory of a model given as a directory or `org/name[@revision]`. Only safetensors and JSON are read.

    Fails on a model that can't be trained here: by its configuration, before its weights are downloaded; then by the
    files of its weights, before they are loaded.
    """
    path, (name, revision) = Path(model), split_model(model)
    hub = not path.is_dir()
    if hub:
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            fail(f"no such model directory: {model}")
        path = from_hub(name, revision, ["config.json"], "model")
    if not (path / "config.json").is_file():
        fail(f"{model}: a model directory needs config.json and *.safetensors"
             + (" (this is an adapter)" if (path / "adapter_config.json").is_file() else ""))
    model_on_paper = skeleton(path)
    if hub:
        path = from_hub(name, revision, ["model*.safetensors", "*.json", "*.txt", "*.jinja"], "model")
    check_weights(path, model_on_paper)
    return path


@functools.cache
def import_library(name: str) -> None:
    """Import a large library with the garbage collector off, and exempt its objects from later collections."""
    gc.disable()
    try:
        importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def skeleton(model_dir: str | Path) -> nn.Module:
    """The model that a directory's config.json describes, without weights (a few hundredths of a second).

    Fails where transformers knows no such causal LM, where its weights are quantised already, or where its projections
    are transposed (GPT-2's Conv1D), which LoRA's factors would be too.
    """
    config = read_json(Path(model_dir) / "config.json")
    if method := config.get("quantization_config"):
        fail(f"{model_dir}: its weights are quantised already ({method.get('quant_method')}); adapters are merged into "
             f"full-precision weights, so give the original model")
    import_library("transformers.modeling_utils")
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    except Exception as e:  # each configuration class has errors of its own; the first line says what is wrong
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        fail(f"{model_dir}: transformers {transformers.__version__} makes no causal language model of its config.json "
             f"(model_type {config.get('model_type')}): {reason}")
    if any(isinstance(module, transformers.pytorch_utils.Conv1D) for module in model.modules()):
        fail(f"{model_dir}: the projections of {config['model_type']} are transposed (Conv1D), which LoRA here doesn't "
             f"serve; choose a model with ordinary linear layers")
    if not model.base_model_prefix or not lora_targets(model):
        fail(f"{model_dir}: config.json describes a model without layers to adapt")
    return model


def weight_files(model_dir: str | Path) -> list[Path]:
    """The safetensors files that transformers loads from a model directory: one, or those that an index names."""
    model_dir = Path(model_dir)
    single, index = model_dir / "model.safetensors", model_dir / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return sorted(model_dir / name for name in {*read_json(index).get("weight_map", {}).values()})
    others = sorted(p.name for p in model_dir.glob("*.bin")) + sorted(p.name for p in model_dir.glob("*.gguf"))
    fail(f"{model_dir}: no model.safetensors and no model.safetensors.index.json"
         + (f"; {others[0]} is not read: convert it (tools/convert_gguf.py, or save_pretrained)" if others else ""))


def check_weights(model_dir: Path, model: nn.Module) -> None:
    """Fail unless the weights' files are whole and hold what `model` (a skeleton) needs, in a plain floating type."""
    entries: dict[str, dict] = {}
    for file in weight_files(model_dir):
        if not file.is_file():
            fail(f"{model_dir}: {file.name}, which model.safetensors.index.json names, is not there")
        held = tensor_entries(file)
        end, size = max((e["data_offsets"][1] for e in held.values()), default=0), file.stat().st_size
        if size < end:
            fail(f"{file} is truncated: {size:,} of {end:,} bytes")
        entries |= held
    prefix = f"{model.base_model_prefix}."  # absent in the files of a bare decoder
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}  # tied weights once
    entry_by_parameter = {name: entries.get(name) or entries.get(name.removeprefix(prefix)) for name in shapes}
    if not any(entry_by_parameter.values()):
        return  # an older layout, whose names transformers converts
    if missing := [name for name, entry in entry_by_parameter.items() if not entry]:
        fail(f"{model_dir}: the weights lack {missing[0]} ({len(missing)} of {len(shapes)} tensors are missing)")
    for name, entry in entry_by_parameter.items():
        if entry["shape"] != shapes[name]:
            fail(f"{model_dir}: {name} has the shape {entry['shape']}, but config.json describes {shapes[name]}")
        if entry["dtype"] not in ("BF16", "F16", "F32"):
            fail(f"{model_dir}: {name} is of the type {entry['dtype']}; want BF16, F16 or F32")


def weights_sha256(model_dir: str | Path) -> str:
    """Content hash of a model directory's tensors."""
    return tensors_sha256(weight_files(model_dir))


def max_positions(model_dir: Path) -> int:
    """The most positions that a sequence may have; a large number when the config doesn't say.

    With longrope, only those before the rotary factors change: beyond them, the longest sequence of a micro-batch
    would decide the factors for all others in it.
    """
    config = read_json(model_dir / "config.json")
    config = config.get("text_config") or config
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    limit = config.get("max_position_embeddings") or 1 << 30
    if rope.get("rope_type", rope.get("type")) == "longrope":
        limit = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or limit
    return limit


def check_max_length(model_dir: Path, max_length: int, micro_tokens: int) -> None:
    """Fail on lengths that the model or a micro-batch can't hold."""
    if max_length > max_positions(model_dir):
        fail(f"--max-length {max_length} is beyond the model's {max_positions(model_dir)} positions")
    if micro_tokens < max_length:
        fail(f"--micro-tokens {micro_tokens} can't hold --max-length {max_length} tokens; give at least {max_length}")
    Run.least_tokens = max_length


def check_pairs(pairs: Sequence[tuple[Example, Example]], micro_tokens: int, engine: str) -> None:
    """Fail on a pair that a micro-batch can't hold; the fast engine counts what its two sequences share once."""
    sizes = fast.unit_tokens([e.ids for pair in pairs for e in pair], 2) if engine == "fast" else \
        [2 * max(len(e.ids) for e in pair) for pair in pairs]
    if (longest := max(sizes, default=0)) > micro_tokens:
        fail(f"--micro-tokens {micro_tokens} can't hold the longest pair, {longest} tokens; give at least {longest}, "
             "or a smaller --max-length")
    Run.least_tokens = max(Run.least_tokens, longest)


def check_positions(args: Any, model_dir: Path) -> None:
    """Fail when --prompt-tokens and --completion-tokens together exceed the model's positions."""
    if args.prompt_tokens + args.completion_tokens > max_positions(model_dir):
        fail(f"--prompt-tokens {args.prompt_tokens} + --completion-tokens {args.completion_tokens} are beyond "
             f"the model's {max_positions(model_dir)} positions")


def check_positive(args: Any, *names: str) -> None:
    """Fail unless the named fields are above zero."""
    for name in names:
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")


def check_not_negative(args: Any, *names: str) -> None:
    """Fail unless the named fields are 0 or above, and finite."""
    for name in names:
        if not 0 <= getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} must be 0 or above, got {getattr(args, name)}")


def check_share(args: Any, *names: str) -> None:
    """Fail unless the named fields are in [0, 1]."""
    for name in names:
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must be between 0 and 1, got {getattr(args, name)}")


def check_numbers(args: Any) -> None:
    """Fail on a value that is valid for no flag: a number that is not finite, a negative count, a seed that torch can't
    take, a text that can't be a path (too long, control characters, a loop of links)."""
    for name, value in dataclasses.asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        for text in [value] if isinstance(value, str) else value if isinstance(value, tuple) else ():
            if any(ord(c) < 32 for c in str(text)):
                fail(f"{flag} {text!r}: a control character")
            try:
                os.stat(text)
            except (OSError, UnicodeError) as e:  # a missing file: no path at all, or reported by its reader
                if getattr(e, "errno", None) not in (errno.ENOENT, errno.ENOTDIR):
                    fail(f"{flag} {text[:200]!r}: {getattr(e, 'strerror', None) or e}")
        if name == "seed" and not 0 <= value < 2**63:
            fail(f"{flag} must be between 0 and {2**63 - 1}, got {value}")
        if isinstance(value, int) and value < 0:
            fail(f"{flag} must be 0 or above, got {value}")
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"{flag} must be a finite number, got {value}")


def check_output(flag: str, directory: str | Path) -> None:
    """Fail unless files can be written in a directory, which may not be there yet; leaves nothing behind."""
    if rank() > 0:
        return
    path, made = Path(directory), []
    try:
        for parent in reversed((path, *path.parents)):
            if not parent.is_dir():
                parent.mkdir()
                made.append(parent)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as e:
        fail(f"{flag} {directory}: can't write there ({e.strerror})")
    finally:
        for parent in reversed(made):
            with contextlib.suppress(OSError):  # somebody else writes there already
                parent.rmdir()


def check_nf4(device: torch.device) -> None:
    """Fail unless bitsandbytes can serve NF4 on this device."""
    if device.type == "mps":
        fail("--device mps has no NF4; use --quantization none")
    try:
        import bitsandbytes.functional as bnb
        where = "cpu" if str(device) == "cuda" else device  # "cuda": which GPU is not known yet (take_turn)
        bnb.quantize_4bit(torch.zeros(64, device=where), quant_type="nf4")
    except Exception as e:
        fail(f"NF4 needs bitsandbytes, which can't serve here ({type(e).__name__}: {e}); use --quantization none")


def load_model(model_dir: str | Path, adapter: str | Path | None = None, quantization: str = "none",
               dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu",
               engine: str | None = None) -> nn.Module:
    """A causal LM in eval mode: the base, or with `adapter` merged into its weights.

    quantization: "none" (dtype) or "nf4" (4-bit NF4, double quantisation, bfloat16 compute; no adapter then).
    The merge W + (alpha/r)·B·A is computed in fp32 from the original weights and rounded once.
    engine: "fast" or "plain", as choose_engine gives it; by default fast where it serves the model.
    """
    import_library("peft")  # with it transformers' modelling
    take_turn()
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if fast:  # a model that is loaded after training is there for measurements
        fast.give_up_passes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()  # of a load that takes a second
    capped = read_json(Path(model_dir) / "config.json").get("attn_logit_softcapping")  # which sdpa leaves out
    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager" if capped else "sdpa",
                              "use_safetensors": True}
    if quantization == "nf4":
        if adapter is not None:
            raise ValueError("an adapter can't be merged into NF4 weights")
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16)
        kwargs["device_map"] = {"": device}
    model = AutoModelForCausalLM.from_pretrained(model_dir, **kwargs)
    if quantization != "nf4":
        model = model.to(device)
    if adapter is not None:
        for name, (a, b) in read_factors(adapter).items():
            weight = model.get_submodule(name).weight
            delta = LORA_SCALE * (b.to(device) @ a.to(device))
            weight.data = (weight.data.float() + delta).to(weight.dtype)
    model.config.use_cache = False
    model.eval().requires_grad_(False)
    if engine:
        model.__dict__["engine"] = engine
    if not is_fast(model):
        check_head(model)
    return model


# ------------------------------------------------------------------------------------------------
# 5. Fresh LoRA, composed adapters, saving
# ------------------------------------------------------------------------------------------------

def lora_targets(model: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers that LoRA adapts: the seven projections, or in a decoder that lacks some (fused
    projections, convolutions) every linear layer but the LM head."""
    head = model.get_output_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return TARGET_MODULES if names >= {*TARGET_MODULES} else tuple(sorted(names))


def add_lora(model: nn.Module, r: int = 16, alpha: int = 32) -> PeftModel:
    """The model with a fresh trainable LoRA on its lora_targets: fp32, cast in the forward, B = 0."""
    from peft import LoraConfig, get_peft_model
    policy = get_peft_model(model, LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=list(lora_targets(model)),
        task_type="CAUSAL_LM"))
    base_of(policy).__dict__.pop("adapted", None)  # layers of an adapter that was here before
    for p in policy.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return policy


HEAD = "score"  # the reward head's name, PEFT's and transformers' own for sequence classification


def new_head(model: nn.Module, seed: int = 0) -> nn.Linear:
    """A scalar head for the last hidden state [H]: no bias, fp32, N(0, 1/(H+1)), the same on any device for a seed."""
    embedding = base_of(model).get_input_embeddings().weight
    width = embedding.shape[1]
    head = nn.Linear(width, 1, bias=False, device=embedding.device, dtype=torch.float32)
    key = int(sha256_json([seed, HEAD])[:15], 16)  # its own noise, not the LoRA's
    noise = torch.randn(1, width, generator=torch.Generator().manual_seed(key))
    head.weight.data.copy_(noise / math.sqrt(width + 1))
    return head


def add_head(policy: PeftModel, seed: int) -> PeftModel:
    """The policy with a fresh trainable scalar head beside its LM head: a reward model."""
    setattr(base_of(policy), HEAD, new_head(policy, seed))
    return policy


def load_scorers(model_dir: str | Path, adapters: dict[str, str | Path], quantization: str = "none",
                 dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu",
                 engine: str | None = None) -> PeftModel:
    """Trained reward models by name, frozen, on one copy of the base: adapters beside its weights, each with its head.

    The first is active; `use_scorer` switches. Check them first: read_start(reward=True). At the quantisation and dtype
    a reward model was trained with, its scores are the trained model's exactly.
    """
    model = load_model(model_dir, None, quantization, dtype, device, engine)
    setattr(model, HEAD, new_head(model))
    (first, path), *others = adapters.items()
    from peft import PeftModel
    where = {"torch_device": str(device_of(model))}  # by default the first GPU
    scorers = PeftModel.from_pretrained(model, path, adapter_name=first, **where)
    for name, path in others:
        scorers.load_adapter(path, name, **where)
    use_scorer(scorers, first)
    return scorers.eval().requires_grad_(False)


def load_reward(model_dir: str | Path, adapter: str | Path, quantization: str = "none",
                dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu",
                engine: str | None = None) -> PeftModel:
    """One trained reward model, frozen: load_scorers with a single adapter."""
    return load_scorers(model_dir, {"reward": adapter}, quantization, dtype, device, engine)


def head_of(scorers: PeftModel, name: str) -> nn.Linear:
    """The scalar head of the scorer of this name."""
    return getattr(base_of(scorers), HEAD).modules_to_save[name]


def adapter_modules(model: PeftModel) -> list[nn.Module]:
    """PEFT's layers and heads in a model, looked for once: PEFT itself walks through the whole model whenever it
    switches adapters, which takes 20 to 40 ms."""
    base = base_of(model)
    if "adapted" not in base.__dict__:
        base.__dict__["adapted"] = [m for m in base.modules() if hasattr(m, "lora_A") or hasattr(m, "modules_to_save")]
    return base.__dict__["adapted"]


def use_scorer(scorers: PeftModel, name: str) -> PeftModel:
    """Switch to the adapter and head of this name, as PEFT's set_adapter does; what takes gradients stays as it is
    (train_scorer). KeyError on an unknown name."""
    if name not in scorers.peft_config:
        raise KeyError(name)
    scorers.active_adapter = scorers.base_model.active_adapter = name
    for module in adapter_modules(scorers):
        vars(module)["_active_adapter"] = [name] if hasattr(module, "lora_A") else name
    return scorers


def train_scorer(scorers: PeftModel, name: str) -> PeftModel:
    """Switch to the adapter and head of this name, and let them take gradients; no other adapter does."""
    scorers.set_adapter(name)
    return scorers


def trainable(policy: nn.Module) -> list[nn.Parameter]:
    return [p for p in policy.parameters() if p.requires_grad]


def flat_parameters(policy: nn.Module) -> nn.Parameter:
    """One flat parameter for all trained ones: they become views of its memory, their gradients views of its gradient.

    Summing over ranks, clipping and updating then take a few kernels; some hundred small tensors would take a thousand.
    The gradient is set to zero, never to None (set_to_none=False). From here on the fast engine compiles and records
    what it repeats (CUDA).
    """
    if is_fast(policy) and device_of(policy).type == "cuda":
        fast.compile_layers(base_of(policy))
    params = trainable(policy)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in params]))
    flat.grad, sizes = torch.zeros_like(flat), [p.numel() for p in params]
    for p, value, grad in zip(params, flat.detach().split(sizes), flat.grad.split(sizes)):
        p.data, p.grad = value.view_as(p), grad.view_as(p)
    base_of(policy).__dict__["flat"] = flat
    return flat


@contextlib.contextmanager
def reference(policy: PeftModel):
    """Context in which the new adapter is off, as by PEFT's disable_adapter: the reference policy (base, or base + SFT
    merged)."""
    modules = adapter_modules(policy)
    before = [module.disable_adapters for module in modules]
    for module in modules:
        vars(module)["_disable_adapters"] = True  # past Module.__setattr__, which is slow
    try:
        yield
    finally:
        for module, off in zip(modules, before):
            vars(module)["_disable_adapters"] = off


def attach_adapter(model: nn.Module, adapter: str | Path) -> PeftModel:
    """The model with a saved adapter beside its weights (unmerged, fp32, cast in the forward), for evaluation."""
    from peft import PeftModel
    loaded = PeftModel.from_pretrained(model, adapter, torch_device=str(device_of(model)))  # by default the first GPU
    return loaded.eval().requires_grad_(False)


def detach_adapter(policy: PeftModel) -> nn.Module:
    """The model that attach_adapter was given, without the adapter and ready for another."""
    model = policy.unload()
    for made in ("peft_config", "adapted", "recordings"):
        model.__dict__.pop(made, None)
    return model


def read_factors(adapter: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{module name: (A [r, in], B [out, r])} of a PEFT adapter directory, such that it adds LORA_SCALE · B A to each.

    Another alpha/r, or alpha/√r (rslora), is folded into B; where ranks differ, smaller ones are padded with zeros.
    """
    config = read_json(Path(adapter) / "adapter_config.json")
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    factors = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scale, b = lora_scale(config, name), tensors[key.replace(".lora_A.", ".lora_B.")].float()
            factors[name] = a.float(), b if scale == LORA_SCALE else b * (scale / LORA_SCALE)
    rank = max(len(a) for a, _ in factors.values())
    return {name: (F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b, (0, rank - len(a))))
            for name, (a, b) in factors.items()}


def lora_scale(config: dict[str, Any], module: str) -> float:
    """The factor of B A at a module, from an adapter_config.json."""
    def value(field: str, pattern: str) -> float:
        if not (by_module := config.get(pattern)):
            return config[field]
        from peft.utils.other import get_pattern_key
        return by_module.get(get_pattern_key(by_module.keys(), module), config[field])
    r, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


# Fields of an adapter_config.json that may have any value: shapes and scales that read_factors understands, and what
# only training or bookkeeping uses. Any other field must be at PEFT's default.
ADAPTER_FIELDS = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "lora_dropout",
                  "base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version",
                  "layers_pattern", "megatron_core", "qalora_group_size"}


# The fields that are read from a trained adapter's run.json.
RUN_FIELDS = {**dict.fromkeys(("method", "name", "model", "config_hash", "family", "train_invariants", "adapter_sha256",
                               "weights_sha256"), str),
              **dict.fromkeys(("invariants", "args", "metrics", "data"), dict), "seed": int,
              "parent": (dict, type(None))}


def check_plain_config(adapter: Path, config: dict[str, Any], free: Set[str] = frozenset()) -> None:
    """Fail on a field of an adapter_config.json that makes it more than a plain LoRA; those of `free` may be set."""
    from peft import LoraConfig
    default = LoraConfig().to_dict()
    for field, value in config.items():
        # other ways to initialise change the base's weights
        harmless = field == "init_lora_weights" and value in (True, False, "gaussian")
        if field not in ADAPTER_FIELDS | free and value and value != default.get(field) and not harmless:
            fail(f"{adapter}: adapter_config.json sets {field} to {json.dumps(value)[:60]}; only plain LoRA is read "
                 f"(factors A and B added to linear layers)")


def check_plain_adapter(adapter: Path) -> None:
    """Fail on a PEFT adapter that is not a plain LoRA (B A added to linear layers), naming the field or the tensor."""
    if not (adapter / "adapter_model.safetensors").is_file():
        pickled = "; adapter_model.bin is not read, since unpickling runs code: load it with PEFT, then save_pretrained"
        fail(f"{adapter}: no adapter_model.safetensors" + pickled * (adapter / "adapter_model.bin").is_file())
    config = read_json(adapter / "adapter_config.json")
    check_fields(adapter / "adapter_config.json", config, {"r": int, "lora_alpha": (int, float)})
    check_plain_config(adapter, config)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        fail(f"{adapter}: its task_type is {config['task_type']}; want an adapter of a causal language model")
    names = tensor_entries(adapter / "adapter_model.safetensors")
    pairs = {name.rsplit(".lora_", 1)[0] for name in names}
    if strange := names.keys() ^ {f"{module}.lora_{side}.weight" for module in pairs for side in "AB"}:
        fail(f"{adapter}: {min(strange)} in adapter_model.safetensors belongs to no pair lora_A, lora_B")
    for module in pairs:
        try:
            scale = lora_scale(config, module.removeprefix("base_model.model."))
        except (TypeError, ValueError, ZeroDivisionError, re.error) as e:
            fail(f"{adapter}: adapter_config.json gives no scale alpha/r for {module} ({e})")
        if not math.isfinite(scale):
            fail(f"{adapter}: adapter_config.json gives {module} the scale {scale}")


def resolve_adapter(adapter: str | Path) -> Path:
    """Local directory of an adapter given as a directory or as `org/name[@revision]` of the hub.

    The default, runs/<name>, reads like a hub id; a name whose first part is a directory here never is one.
    """
    name, revision = split_model(str(adapter))
    organisation = Path(name).parts[0] if name.count("/") == 1 and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None
    if organisation in (None, ".", "..", "runs") or Path(organisation).exists():
        return Path(adapter)
    return from_hub(name, revision, ["adapter_*", "run.json", "prompts.json", "chat_template.jinja"], "adapter")


def read_policy(adapter: str | Path) -> tuple[dict[str, Any], Path]:
    """(record, directory) of a policy's adapter: the run.json of a run of ours, or for a plain PEFT
    LoRA adapter, identified by its content, a record with the same keys. check_base checks its base."""
    directory = resolve_adapter(adapter)
    if not (directory / "adapter_config.json").is_file() or \
            any((directory / name).exists() for name in ("run.json", "checkpoint")):
        return read_adapter(directory), directory
    check_plain_adapter(directory)
    config = read_json(directory / "adapter_config.json")
    digest = tensors_sha256([directory / "adapter_model.safetensors"])
    scales = {k: config.get(k) for k in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")}
    content = sha256_json([digest, scales])[:8]
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    return {"method": "peft", "name": Path(split_model(str(adapter))[0]).resolve().name, "config_hash": content,
            "family": content, "adapter_sha256": digest, "model": f"{base}@{revision}" if base and revision else base,
            "weights_sha256": None, "invariants": None, "train_invariants": None, "seed": None, "parent": None,
            "data": None, "args": {}, "metrics": {}, "wall_time_s": None}, directory


def read_adapter(adapter: str | Path, reward: bool = False) -> dict[str, Any]:
    """The run.json of a trained adapter, after checking that it is what it says: a policy, or a reward model.

    Fails on a missing, unfinished or altered directory, other target modules or another alpha/r, on a policy where a
    reward model is wanted and the other way round. Its base: check_base.
    """
    adapter = Path(adapter)
    for file in ("adapter_config.json", "adapter_model.safetensors", "run.json"):
        if not (adapter / file).is_file():
            known = []
            with contextlib.suppress(OSError):  # a directory that may not be read
                known = sorted(str(p.parent) for p in adapter.parent.glob("*/run.json"))
            unfinished = " (its run has not finished: the same command again continues it)" \
                if (adapter / "checkpoint").is_dir() else ""
            fail(f"{adapter} is not a trained adapter: no {file}{unfinished}"
                 + (f"; adapters there: {', '.join(known)}" if known else ""))
    run, config = read_json(adapter / "run.json"), read_json(adapter / "adapter_config.json")
    check_fields(adapter / "run.json", run, RUN_FIELDS)
    check_fields(adapter / "run.json, invariants", run["invariants"], {"target_modules": list, "quantization": str,
                                                                     "chat_template": str})
    check_fields(adapter / "adapter_config.json", config, {"r": int, "lora_alpha": (int, float),
                                                           "target_modules": list})
    check_plain_config(adapter, config, {"modules_to_save"})
    if config["lora_alpha"] != LORA_SCALE * config["r"]:
        fail(f"{adapter}: alpha/r is {config['lora_alpha']}/{config['r']}, want {LORA_SCALE}, as in every row")
    if sorted(config["target_modules"]) != sorted(run["invariants"]["target_modules"]):
        fail(f"{adapter}: target modules {sorted(config['target_modules'])}, but its run.json names "
             f"{sorted(run['invariants']['target_modules'])}")
    has_head = f"base_model.model.{HEAD}.weight" in tensor_entries(adapter / "adapter_model.safetensors")
    if reward and not has_head:
        fail(f"{adapter} has no {HEAD} head: it is not a reward model ({run['method']}); want one that reward.py wrote")
    if not reward and (has_head or config.get("modules_to_save")):
        fail(f"{adapter} is a reward model, not a policy; want an adapter of sft.py or of a method that starts from it")
    sha256 = tensors_sha256([adapter / "adapter_model.safetensors"])
    if sha256 != run["adapter_sha256"]:
        fail(f"{adapter}: its weights ({sha256[:8]}) are not those its run.json names ({run['adapter_sha256'][:8]})")
    return run


def read_prompts(path: Path) -> dict[str, list[str]]:
    """A run's prompts.json: {"train": prompt ids, "heldout": prompt ids}."""
    prompts = read_json(path)
    check_fields(path, prompts, {"train": list, "heldout": list})
    return prompts


def check_base(adapter: str | Path, run: dict[str, Any], model: str, model_dir: Path, weights: str,
               other_base: bool = False) -> None:
    """Fail unless an adapter (its record given) belongs to a base: a directory, its name and content hash.

    A run of ours names its base by the hash. A plain adapter only names it: another name is accepted with `other_base`,
    and the shapes must fit in any case.
    """
    if run["method"] != "peft":
        if weights != run["weights_sha256"]:
            fail(f"{adapter} was trained on base weights {run['weights_sha256'][:8]} ({run['model']}), "
                 f"but the base given has {weights[:8]}")
        return
    given, named = split_model(model)[0], split_model(run["model"] or "")[0]
    same = given == named or Path(model).is_dir() and Path(given).resolve().name == Path(named).name
    if named and not same and not other_base:
        fail(f"{adapter} names {named} as its base, not {given}; if they are the same model, give --other-base")
    paper = skeleton(model_dir)
    layers, targets = dict(paper.named_modules()), lora_targets(paper)
    for name, (a, b) in read_factors(adapter).items():
        layer = layers.get(name)
        if layer is None or name.rsplit(".", 1)[-1] not in targets:
            fail(f"{adapter} adapts {name}, which is not among the layers that are trained here ({', '.join(targets)})")
        if (shape := (b.shape[0], a.shape[1])) != (layer.out_features, layer.in_features):
            fail(f"{adapter}: its factors at {name} make a matrix of {shape}, but the base's is "
                 f"{(layer.out_features, layer.in_features)}")


def save_policy(policy: PeftModel, parent: str | Path | None, directory: Path, tokenizer, base: str) -> str:
    """Write a PEFT directory that is relative to the *pretrained* base, and return its content hash.

    With a parent (the adapter merged under the policy), the two are concatenated into one adapter of their summed rank:
    [B1 B2][A1; A2], alpha/r = LORA_SCALE, so that any PEFT reader gets the whole policy from the base alone.
    A reward model's head is saved as PEFT saves one of sequence classification.
    """
    tensors, r = {}, 0
    before = read_factors(parent) if parent else {}
    parent_rank = max((len(a) for a, _ in before.values()), default=0)
    for name, module in policy.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a, b = (x["default"].weight.detach().float().cpu() for x in (module.lora_A, module.lora_B))
            nothing = torch.zeros(parent_rank, a.shape[1]), torch.zeros(b.shape[0], parent_rank)
            a0, b0 = before.get(name, nothing)
            a, b = torch.cat([a0, a]), torch.cat([b0, b], 1)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
            r = a.shape[0]
    head = getattr(policy.get_base_model(), HEAD, None)
    if head is not None:
        tensors[f"base_model.model.{HEAD}.weight"] = head.weight.detach().float().cpu().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, directory)
    from peft import LoraConfig
    config = LoraConfig(r=r, lora_alpha=LORA_SCALE * r, lora_dropout=0.0, bias="none",
                        task_type="CAUSAL_LM" if head is None else "SEQ_CLS", inference_mode=True,
                        modules_to_save=None if head is None else [HEAD],
                        target_modules=sorted(policy.peft_config["default"].target_modules)).to_dict()
    name, revision = split_model(base)
    config.update(base_model_name_or_path=name, revision=revision)
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    write_json(directory / "adapter_config.json", config)
    write_atomic(directory / "adapter_model.safetensors", lambda p: save_file(tensors, p, {"format": "pt"}))
    return tensors_sha256([directory / "adapter_model.safetensors"])


def save_tokenizer(tokenizer, directory: Path) -> None:
    """tokenizer.save_pretrained, in the layout that transformers 4.57 and 5 both read."""
    tokenizer.save_pretrained(directory)
    config = read_json(directory / "tokenizer_config.json")
    if config.get("tokenizer_class") == "TokenizersBackend":  # of 5; read back by either under its older name
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # 4.57 wants a dict there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only"):  # of this loading, not of the tokenizer
        config.pop(name, None)
    write_json(directory / "tokenizer_config.json", config)


def save_model(model: nn.Module, tokenizer, directory: Path) -> None:
    """A full model directory, whole or not at all, that transformers 4.57 and 5 load alone."""
    temporary = Path(f"{directory}.{os.getpid()}.tmp")
    model.config.use_cache = True  # load_model's choice is for training
    model.save_pretrained(temporary)
    config = read_json(temporary / "config.json")
    write_json(temporary / "config.json", config | old_rope_fields(config))
    save_tokenizer(tokenizer, temporary)
    for file in temporary.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner reads
    os.rename(temporary, directory)


def old_rope_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary positions of a config.json of transformers 5 (rope_parameters) as 4.57 reads them; 5 reads both."""
    rope = config.get("rope_parameters") or {}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention")  # Gemma 3 has one of each
    scaling = {k: v for k, v in full.items() if k != "rope_theta"}
    return {**({"rope_theta": full["rope_theta"]} if full.get("rope_theta") else {}),
            **({"rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else {}),
            **({"rope_local_base_freq": local["rope_theta"]} if local else {})}


# ------------------------------------------------------------------------------------------------
# 6. Micro-batches and log-probabilities: the plain engine, and where the fast one takes over
# ------------------------------------------------------------------------------------------------

# What follows is the specification: the model's own transformers forward over right-padded micro-batches, log-softmax
# in fp32 at the predicted positions. It serves any causal LM. fast/ computes the same faster for the architectures
# that it knows, and tests compare the two; where `is_fast` is true, calls go to fast/.

@functools.cache  # said once
def choose_engine(engine: str, model_dir: str | Path, device: torch.device) -> str:
    """"fast" or "plain" for --engine auto, fast or plain; says which, and why. Fails where fast is asked for and can't
    serve.

    The engine changes speed and rounding, never the mathematics: it is not in config_hash.
    """
    why_not = "there is no folder fast/" if fast is None else "an Apple GPU" if device.type == "mps" else \
        fast.unsupported(read_json(Path(model_dir) / "config.json"))
    if engine == "fast" and why_not:
        fail(f"--engine fast can't serve {model_dir}: {why_not}; give --engine auto or plain")
    chosen = "plain" if engine == "plain" or why_not else "fast"
    slow = f"fast can't serve it: {why_not}; about ten times slower on a GPU"
    reason = "as asked" if engine != "auto" else slow if why_not else "fast serves it"
    say(f"engine: {chosen} ({reason})")
    return chosen


def is_fast(model: nn.Module) -> bool:
    """Does the fast engine run this model? load_model decides; a model from elsewhere runs on it if it can."""
    base = base_of(model)
    if "engine" not in base.__dict__:
        base.__dict__["engine"] = "plain" if fast is None or fast.unsupported(base.config.to_dict()) else "fast"
    return base.__dict__["engine"] == "fast"


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT one; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # only PEFT's models have this method


def device_of(model: nn.Module) -> torch.device:
    return base_of(model).get_input_embeddings().weight.device


def precision(model: nn.Module):
    """Autocast to bfloat16 for a bfloat16 base (fp32 adapters are cast in the forward); nothing for an fp32 one."""
    head = base_of(model).get_output_embeddings().weight
    return torch.autocast(head.device.type, torch.bfloat16, enabled=head.dtype == torch.bfloat16)


@dataclass
class Example:
    """A tokenised sequence and what is predicted in it: the hidden state at predict[k] predicts targets[k]."""
    ids: list[int]
    predict: list[int]
    targets: list[int]

    @classmethod
    def masked(cls, ids: list[int], mask: Sequence[bool]) -> Example:
        """Predict every token that the mask marks, each from the position before it."""
        at = [i for i in range(1, len(ids)) if mask[i]]
        return cls(ids, [i - 1 for i in at], [ids[i] for i in at])

    @classmethod
    def completion(cls, prompt: Sequence[int], completion: Sequence[int]) -> Example:
        """Predict every token of a completion, each from the position before it; the prompt's ids stay as they are."""
        n = len(prompt)
        return cls([*prompt, *completion], [*range(n - 1, n - 1 + len(completion))], [*completion])


@dataclass
class Batch:
    """A micro-batch of the plain engine: N sequences, padded on the right to T tokens.

    fast.Pack serves the same callers: targets, counts, examples, rows and sum_by_sequence mean the same; its predict
    and last are positions in one row, and its tokens and attended count a shared beginning once.
    """
    input_ids: Tensor       # [N, T], 0 where there is no token
    attention_mask: Tensor  # [N, T], 1 where there is a token
    predict: Tensor         # [2, K] row and column of each position that predicts
    targets: Tensor         # [K] the token ids predicted there
    counts: Tensor          # [N] predicted tokens of each sequence
    last: Tensor            # [2, N] row and column of each sequence's last token
    examples: list[int]     # [N] index of each sequence in the list that the batches were made of
    tokens: int             # of its sequences, without padding
    attended: int           # pairs of a query and a key that it attends to

    @classmethod
    def of(cls, examples: Sequence[Example], members: Sequence[int], device) -> Batch:
        rows = [examples[i] for i in members]
        sizes = [len(e.ids) for e in rows]
        ids = torch.tensor([e.ids + [0] * (max(sizes) - len(e.ids)) for e in rows])
        lengths, longs = torch.tensor(sizes), functools.partial(torch.tensor, dtype=torch.long)
        tensors = (ids, (torch.arange(max(sizes)) < lengths[:, None]).long(),
                   longs([[n for n, e in enumerate(rows) for _ in e.predict], [t for e in rows for t in e.predict]]),
                   longs([t for e in rows for t in e.targets]), longs([len(e.targets) for e in rows]),
                   torch.stack([torch.arange(len(rows)), lengths - 1]))
        return cls(*(t.to(device) for t in tensors), [*members], sum(sizes), sum(n * (n + 1) // 2 for n in sizes))

    @property
    def rows(self) -> list[int]:
        """[K] index, in the list that the batches were made of, of the example each predicted token belongs to."""
        return [i for i, n in zip(self.examples, self.counts.tolist()) for _ in range(n)]

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """[K] -> [N]: sums over each sequence's predicted tokens."""
        return torch.segment_reduce(values, "sum", lengths=self.counts, unsafe=True)


def micro_batches(model: nn.Module, examples: Sequence[Example], micro_tokens: int, unit: int = 1) -> list:
    """Micro-batches of at most `micro_tokens` tokens each, on the model's device; plain: padding included; fast: a
    shared beginning counted once, without the padding that a recorded pass puts at a pack's end.

    Each example is in exactly one. `unit` consecutive examples (a chosen/rejected pair: 2) stay together and in order.
    A collective: every rank must call it, also with an empty list. ValueError when a unit alone is too large.
    """
    if is_fast(model):
        packs = fast.pack(examples, micro_tokens, unit, device_of(model))
        if world() > 1:
            fast.agree_on_sizes(base_of(model), packs, rank(), world(), gather_lists)
        return packs
    units = [range(i, i + unit) for i in range(0, len(examples), unit)]
    width = {u: max(len(examples[i].ids) for i in u) for u in units}
    batches: list[list[int]] = []
    longest = 0
    for u in sorted(units, key=lambda u: (-width[u], u[0])):  # the longest first: neighbours are of similar length
        if unit * width[u] > micro_tokens:
            raise ValueError(f"{unit} x {width[u]} tokens that belong together don't fit into --micro-tokens "
                             f"{micro_tokens}")
        if not batches or (len(batches[-1]) + unit) * longest > micro_tokens:
            batches.append([])
            longest = width[u]
        batches[-1] += u
    return [Batch.of(examples, members, device_of(model)) for members in batches]


def hidden_states(model: nn.Module, batch, at: str) -> Tensor:
    """The model's last hidden states of a micro-batch, [K, H] at the "predict" positions or [N, H] at the "last"
    tokens."""
    base = base_of(model)
    if not isinstance(batch, Batch):
        hidden = fast.hidden_states(base, batch)[getattr(batch, at)]
    else:
        with precision(model):
            out = base.base_model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        hidden = out.last_hidden_state[tuple(getattr(batch, at))]
    count_flops(base, batch.tokens, batch.attended, backward=hidden.requires_grad)
    return hidden


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The LM head: hidden states [..., H] -> logits [..., V], with the soft cap or the scale that an architecture puts
    on them."""
    base = base_of(model)
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    same = hidden.dtype == head.weight.dtype
    logits = head(hidden) if same else F.linear(hidden, head.weight.to(hidden.dtype), head.bias)
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    scale, divisor = (getattr(config, name, None) or 1 for name in ("logit_scale", "logits_scaling"))  # Cohere, Granite
    return logits * scale / divisor


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Fail unless head_logits of the body's hidden states are the model's own logits, on a short text."""
    base = base_of(model)
    ids = torch.arange(1, 9, device=device_of(model))[None] % base.config.get_text_config().vocab_size
    logits = base(ids, use_cache=False).logits
    ours = head_logits(base, base.base_model(ids, use_cache=False).last_hidden_state)
    tolerance = 1e-2 * logits.abs().max().item()
    if logits.shape != ours.shape or not torch.allclose(logits.float(), ours.float(), rtol=1e-2, atol=tolerance):
        fail(f"{base.config.model_type}: its logits are not its LM head applied to its last hidden states, so "
             f"log-probabilities here would be wrong; this architecture is not supported")


HEAD_CHUNK = 1024  # predicted tokens whose logits exist at one time, at most


def head_chunk(tokens: int) -> int:
    """Predicted tokens whose logits exist at one time, of a micro-batch of this many tokens. Fewer in a small one, where
    1,024 rows of logits would take as much memory as all else."""
    return min(HEAD_CHUNK, max(256, tokens // 4))


def token_logprobs(model: nn.Module, batch, temperature: float = 1.0, extras: Sequence[str] = ()):
    """log softmax(logits / temperature)[target] of a micro-batch's predicted tokens, [K] in fp32.

    The LM head runs on predicted positions only, in chunks that the backward computes again: a [tokens × vocabulary]
    tensor never exists. With extras, each [K] and without gradient, returns (logprobs, {extra: values}): "correct", the
    target is the argmax; "entropy" of softmax(logits / temperature), in nats.
    """
    base = base_of(model)
    if not isinstance(batch, Batch):
        values = fast.token_logprobs(base, batch, temperature, extras, head_chunk(batch.tokens))
        backward = (values[0] if extras else values).requires_grad
        count_flops(base, batch.tokens, batch.attended, len(batch.targets), backward)
        return values
    hidden, chunk = hidden_states(model, batch, "predict"), head_chunk(batch.tokens)       # [K, H]
    count_flops(base, predicted=len(hidden), backward=hidden.requires_grad)

    def logprobs_of(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        with precision(model):
            z = head_logits(model, hidden).float() / temperature                           # [C, V]
        logprobs = z.log_softmax(1)
        values = {"correct": lambda: z.argmax(1) == targets, "entropy": lambda: -(logprobs.exp() * logprobs).sum(1)}
        return logprobs.gather(1, targets[:, None])[:, 0], *(values[k]().detach() for k in extras)
    parts = [checkpoint(logprobs_of, h, t, use_reentrant=False, preserve_rng_state=False)
             for h, t in zip(hidden.split(chunk), batch.targets.split(chunk))]
    logprobs, *values = (torch.cat(column) for column in zip(*parts))
    return (logprobs, dict(zip(extras, values))) if extras else logprobs


def token_values(model: nn.Module, batch) -> Tensor:
    """The scalar head at the position before each predicted token, [K] in fp32: a critic's V_t, read before action
    t."""
    return getattr(base_of(model), HEAD)(hidden_states(model, batch, "predict").float())[:, 0]


def reward_scores(model: nn.Module, batch) -> Tensor:
    """The scalar head at the last token of each sequence, [N] in fp32; `batch.examples` says whose."""
    return getattr(base_of(model), HEAD)(hidden_states(model, batch, "last").float())[:, 0]


def step0_tolerance(policy: nn.Module) -> float:
    """By how much a log-probability of the policy may differ from the reference's before the first step, in nats.

    Both are computed over the same micro-batches and a fresh adapter adds exactly 0 to every projection: in either
    engine and at either precision only the order of a sum over tokens remains.
    """
    return 1e-5


@torch.no_grad()
def score_examples(model: nn.Module, examples: Sequence[Example], micro_tokens: int, unit: int = 1) -> Tensor:
    """reward_scores of every example in order, [B] in fp32 on the CPU: ranks share the work, all get all scores."""
    size = [sum(len(e.ids) for e in examples[i:i + unit]) for i in range(0, len(examples), unit)]
    mine = [unit * i + k for i in my_share(size) for k in range(unit)]
    scores = torch.zeros(len(examples), device=device_of(model))
    for batch in micro_batches(model, [examples[i] for i in mine], micro_tokens, unit):
        scores[torch.tensor([mine[i] for i in batch.examples], device=scores.device)] = reward_scores(model, batch)
    return all_reduce_(scores).cpu()


def placed_batches(model: nn.Module, examples: Sequence[Example], rows: Sequence[int], micro_tokens: int,
                   group: int = 1) -> list[tuple]:
    """Micro-batches of this rank's share of some of the examples, each with the positions of its predicted tokens in
    a matrix [B examples, T tokens]: [(batch, (rows, columns) as one tensor [2, K])].

    `group` consecutive examples are completions of one prompt: a group goes to one rank, unless there are fewer groups
    than ranks.
    """
    units: dict[int, list[int]] = {}
    for i in rows:
        units.setdefault(i // group, []).append(i)
    dealt = [*units.values()] if len(units) >= world() else [[i] for i in rows]
    size = [len(examples[unit[0]].ids) + sum(len(examples[i].targets) for i in unit[1:]) for unit in dealt]
    mine, out = [i for k in my_share(size) for i in dealt[k]], []
    for batch in micro_batches(model, [examples[i] for i in mine], micro_tokens):
        which = [mine[i] for i in batch.examples]
        counts = [len(examples[i].targets) for i in which]
        columns = np.concatenate([np.arange(n) for n in counts])
        places = torch.from_numpy(np.stack([np.repeat(which, counts), columns]))
        out.append((batch, places.to(device_of(model), non_blocking=True)))
    return out


@torch.no_grad()
def per_token(function: Callable[[Any], Tensor], batches: Sequence[tuple], shape: Sequence[int], device) -> Tensor:
    """Values of function(batch), [..., K], put at their tokens' positions: [..., B, T], over all ranks; 0 elsewhere."""
    out = torch.zeros(*shape, device=device)
    for batch, (rows, columns) in batches:
        out[..., rows, columns] = function(batch)
    return all_reduce_(out)


def logprobs_and_entropy(policy: nn.Module, batch, temperature: float) -> Tensor:
    """log π of each predicted token of a micro-batch, and the entropy of π before it, [2, K]."""
    logprobs, extra = token_logprobs(policy, batch, temperature, extras=("entropy",))
    return torch.stack([logprobs, extra["entropy"]])


# What a policy has moved by, and how well that is known. Figures are computed in fp32 where the model fits: in
# bfloat16 the same policy in other micro-batches differs from itself by about 0.1 nats per answer.

def upcast(model: nn.Module) -> str:
    """Convert the base's weights to fp32, in place, for measurements; returns their new dtype, "float32" if they fit.

    Frozen bfloat16 weights are exact in fp32. NF4 weights, and what doesn't fit into the GPU's memory twice (movement
    loads another copy), stay as they are. Recorded passes are given up: their memory is needed, and other models that
    this one is compared with run without them. All ranks do the same.
    """
    base, device = base_of(model), device_of(model)
    half = [p for p in base.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    quantized = any(getattr(p, "quant_state", None) is not None for p in base.parameters())
    needed = sum(2 * p.nbytes for p in half)
    base.__dict__.pop("recordings", None)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    fits = device.type != "cuda" or 2 * needed < free_memory(device)
    if quantized or not all(gather_lists([fits])):
        return str(base.dtype).removeprefix("torch.")
    for p in half:
        p.data = p.data.float()
    return "float32"


@torch.no_grad()
def answer_states(model: nn.Module, examples: Sequence[Example], micro_tokens: int) -> list[Tensor]:
    """Hidden states at the predicted positions of each example, in fp32: [K_i, H] each, in the examples' order."""
    states: list = [None] * len(examples)
    for batch in micro_batches(model, examples, max([micro_tokens, *(len(e.ids) for e in examples)])):
        for i, hidden in zip(batch.examples, hidden_states(model, batch, "predict").split(batch.counts.tolist())):
            states[i] = hidden.float()
    return states


@torch.no_grad()
def answer_kl(p_model: nn.Module, p_states: Sequence[Tensor], q_model: nn.Module, q_states: Sequence[Tensor],
              temperature: float = 1.0) -> Tensor:
    """KL(p ‖ q) of each answer, summed over its tokens and exact over the vocabulary, [answers] in nats, fp64.

    States as answer_states gives them; the LM heads are applied in fp32 whatever the model's dtype.
    """
    sums = []
    for p_hidden, q_hidden in zip(p_states, q_states):
        parts, chunk = [], head_chunk(len(p_hidden))
        for p_chunk, q_chunk in zip(p_hidden.split(chunk), q_hidden.split(chunk)):
            logp, logq = ((head_logits(m, h) / temperature).log_softmax(1)
                          for m, h in ((p_model, p_chunk), (q_model, q_chunk)))
            parts.append((logp.exp() * (logp - logq)).sum(1).double().sum())                              # [C, V] -> []
        sums.append(sum(parts, torch.zeros((), dtype=torch.float64)).cpu())
    return torch.stack(sums)


def interval(values: Tensor, groups: Sequence[Any]) -> list[float] | None:
    """95 % interval of the mean of values [n]: mean ± 1.96 standard errors, clustered by `groups` (the prompt of each
    value).

    Liang & Zeger 1986 with the factor m / (m − 1) for m groups. None for fewer than two groups.
    """
    mean, sums = values.double().mean().item(), {}
    for value, group in zip(values.double().tolist(), groups):
        sums[group] = sums.get(group, 0.0) + value - mean
    m = len(sums)
    if m < 2:
        return None
    error = math.sqrt(m / (m - 1) * sum(s * s for s in sums.values())) / len(values)
    return [mean - 1.96 * error, mean + 1.96 * error]


def share_interval(values: Tensor, groups: Sequence[Any]) -> list[float] | None:
    """95 % interval of the mean p of values [n] whose mean is a share (0, ½ or 1 each, or an AUC's), inside [0, 1].

    Wilson's interval for p (1 − p) / SE² trials, the number that gives the clustered standard error SE of `interval`;
    where SE is 0, for one trial per group. None for fewer than two groups.
    """
    ends = interval(values, groups)
    if ends is None:
        return None
    p, error = values.double().mean().item(), (ends[1] - ends[0]) / 3.92
    n = p * (1 - p) / error**2 if error > 1e-9 else len(set(groups))
    return wilson(p * n, n)


def wilson(right: float, n: float, z: float = 1.959964) -> list[float] | None:
    """Wilson's 95 % interval of a share, [low, high]; a tie may count as half a success. None without any trial."""
    if not n:
        return None
    p, centre = right / n, (right + z * z / 2) / (n + z * z)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def movement(policy: PeftModel, adapter: str | Path, parent: str | Path | None, model_dir: Path,
             examples: Sequence[Example], micro_tokens: int, temperature: float = 1.0) -> dict[str, Any]:
    """How far a trained policy is from its reference and from the policy that is evaluated, in nats per answer of
    `examples`.

      kl_reference  KL(policy ‖ reference), with its 95 % interval over the answers
      kl_evaluated  KL(policy ‖ the saved adapter beside the pretrained base), which is what evaluate.py and PEFT load:
                    the policy was trained on base + parent merged and rounded to its dtype
      kl_merge      KL(reference ‖ the parent's adapter beside the base): what that rounding costs by itself; None
                    without parent
      kl_floor      KL(policy ‖ policy, each answer alone in its micro-batch) of every eighth answer: what the precision
                    of the measurement adds to each of them
      logprob_floor mean |log π − log π alone| of these answers, at temperature 1: the floor of a held-out margin is
                    about β·√2 times it
    KLs are at `temperature`, exact over the vocabulary (answer_kl).
    Upcasts the policy: measure what belongs to its own dtype before. adapter: where the policy is saved.
    """
    measured_in = upcast(policy)
    dtype, device = base_of(policy).dtype, device_of(policy)
    policy_states = answer_states(policy, examples, micro_tokens)
    with reference(policy):
        start = answer_states(policy, examples, micro_tokens)
    kl = answer_kl(policy, policy_states, policy, start, temperature)
    some = range(0, len(examples), 8)
    alone, together = ([answer_states(policy, [examples[i]], micro_tokens)[0] for i in some],
                       [policy_states[i] for i in some])
    targets = [torch.tensor(examples[i].targets, device=device)[:, None] for i in some]
    sums = [[(head_logits(policy, h).log_softmax(1).gather(1, t)).sum().item() for h, t in zip(states, targets)]
            for states in (together, alone)]
    figures = {"kl_reference": kl.mean().item(), "kl_reference_interval": interval(kl, range(len(kl))),
               "kl_floor": answer_kl(policy, together, policy, alone, temperature).mean().item(),
               "logprob_floor": sum(abs(a - b) for a, b in zip(*sums)) / len(some), "kl_answers": len(examples),
               "measured_in": measured_in}
    base = load_model(model_dir, None, "none", dtype, device, "fast" if is_fast(policy) else "plain")
    for name, beside, states in (("kl_evaluated", adapter, policy_states), ("kl_merge", parent, start)):
        if beside is None:
            figures[name] = None
            continue
        model = attach_adapter(base, beside)
        evaluated = answer_states(model, examples, micro_tokens)
        figures[name] = answer_kl(policy, states, model, evaluated, temperature).mean().item()
        base = detach_adapter(model)
    return figures


# ------------------------------------------------------------------------------------------------
# 7. Sampling
# ------------------------------------------------------------------------------------------------

@dataclass
class Completion:
    """What Sampler.sample gives for a prompt."""
    ids: list[int]          # sampled ids, the stop token included when it was sampled
    logprobs: list[float]   # of each id under softmax(logits / temperature); temperature 1 for greedy
    stopped: str            # "eos" (a stop token), "string" or "length"
    text: str               # decoded, without special tokens, cut before the stop string


def keyed_uniform(seed: int | Tensor, rows: Tensor, position: int | Tensor) -> Tensor:
    """Uniform numbers in (0, 1) that depend on (seed, row, position) alone: splitmix64 of the three, [B] float64."""
    def mix(x):
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return x ^ ((x >> 31) & ((1 << 33) - 1))
    zeros = torch.zeros_like(rows)
    x = zeros + seed * 1_000_003 + 12345
    for part in (rows, zeros + position):
        x = mix(x + part * -7046029254386353131 + 7046029254386353131)
    return ((x >> 11) & ((1 << 53) - 1)).double() / 2**53 + 2**-54


CHOICE_BLOCK = 128  # tokens per block: probabilities are summed in each block, then over the blocks


def choose(logits: Tensor, temperature: float | Tensor, seed: int | Tensor | None = None, rows: Tensor | None = None,
           position: int | Tensor | None = None, top_p: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Token [B] of logits [B, V], and its log-probability [B] under softmax(logits / temperature) over the whole
    vocabulary, not renormalised to top_p.

    Without a seed: the likeliest token (the first of a tie); temperature and top_p are ignored, and the log-probability
    is that of softmax(logits). With a seed: the token at which the cumulative distribution reaches
    keyed_uniform(seed, rows [B], position). It is summed in fp64 over blocks of the vocabulary, then inside one block;
    with top_p over the sorted vocabulary, as far as the smallest set of likeliest tokens whose mass reaches top_p.
    """
    if seed is None:
        logits = logits.float()
        token = logits.argmax(1, keepdim=True)                                                  # [B, 1]
        return token[:, 0], logits.log_softmax(1).gather(1, token)[:, 0]
    z = logits.float() / temperature                                                            # [B, V]
    if top_p is not None:
        logprobs = z.log_softmax(1)
        probs, order = logprobs.exp().sort(dim=1, descending=True, stable=True)
        below = probs.double().cumsum(1)
        below = torch.where(below - probs < top_p, below, below.new_zeros(())).cummax(1).values
        target = keyed_uniform(seed, rows, position)[:, None] * below[:, -1:]
        token = order.gather(1, torch.searchsorted(below, target).clamp(max=z.shape[1] - 1))    # [B, 1]
        return token[:, 0], logprobs.gather(1, token)[:, 0]
    blocks = F.pad(z, (0, -z.shape[1] % CHOICE_BLOCK), value=-math.inf).unflatten(1, (-1, CHOICE_BLOCK))
    top = blocks.amax(2).amax(1, keepdim=True)                                                  # [B, 1]
    upto = (blocks - top[..., None]).exp().sum(2, dtype=torch.float64).cumsum(1)                # [B, blocks]
    target = keyed_uniform(seed, rows, position)[:, None] * upto[:, -1:]
    block = (upto < target).sum(1, keepdim=True)                                                # [B, 1]
    inside = blocks.gather(1, block[..., None].expand(-1, -1, CHOICE_BLOCK))[:, 0]              # [B, 128]
    # What is left to reach lies in this block: above 0 and, whatever the rounding, at most its sum.
    within = (inside - top).exp().double().cumsum(1)
    left = torch.minimum(target - F.pad(upto, (1, 0)).gather(1, block), within[:, -1:])
    offset = (within < left).sum(1, keepdim=True)
    logprob = inside.gather(1, offset) - top - upto[:, -1:].log()
    return (block * CHOICE_BLOCK + offset)[:, 0], logprob[:, 0].float()


class PlainDecoder:
    """Token by token decoding with transformers' cache, for Sampler; fast.Decoder has the same interface.

    All prompts of a batch have one length: padding is safe in a forward, not in a cached decode with convolutions or
    windows. Rows that have ended are still computed until the batch ends.
    """

    def __init__(self, model: nn.Module):
        self.refresh(model)

    def refresh(self, model: nn.Module) -> None:
        """Sample from this model from now on; its weights are read when they are used."""
        self.model, self.computed = model, 0

    def release(self) -> None:
        """Give the cache back."""
        self.cache = None

    def batches(self, prompts: Sequence[Sequence[int]], budgets: Sequence[int], most: int) -> Iterator[list[int]]:
        """Indices of the prompts of each batch: of one length, at most `most`."""
        by_length: dict[int, list[int]] = {}
        for i, p in enumerate(prompts):
            by_length.setdefault(len(p), []).append(i)
        for indices in by_length.values():
            yield from (indices[at:at + most] for at in range(0, len(indices), most))

    @torch.no_grad()
    def begin(self, prompts: dict[int, Sequence[int]], keys: dict[int, int], longest: int, temperature: float,
              top_p: float, seed: int) -> None:
        """Start a batch. prompts: {index: token ids}; keys: what keys the noise of each; longest: tokens of a whole
        row."""
        device = device_of(self.model)
        self.fed = torch.tensor([list(p) for p in prompts.values()], device=device)       # [B, T]: what to feed next
        self.keys = torch.tensor([keys[i] for i in prompts], device=device)                # [B]
        self.row_of = {i: n for n, i in enumerate(prompts)}
        self.cache, self.position = None, 0
        self.choice = dict(temperature=temperature or 1.0, seed=None if temperature == 0 else seed,
                           top_p=top_p if top_p < 1 else None)

    @torch.no_grad()
    def advance(self, live: Sequence[int], most: int) -> dict[int, tuple[list[int], list[float]]]:
        """The next token of the prompts that go on: {index: ([token id], [log-probability])}."""
        base = base_of(self.model)
        with precision(self.model):
            out = base(self.fed, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        tokens, logprobs = choose(out.logits[:, -1], rows=self.keys, position=self.position, **self.choice)    # [B]
        self.cache, self.fed, self.position = out.past_key_values, tokens[:, None], self.position + 1
        self.computed += len(tokens)
        tokens, logprobs = tokens.tolist(), logprobs.tolist()
        return {i: ([tokens[self.row_of[i]]], [logprobs[self.row_of[i]]]) for i in live}


MAX_BATCH = 1408  # rows decoded at one time, at most; GSM8K's 1,319 test prompts are one batch


class Sampler:
    """Completions of many prompts by the policy as it is now, the adapter beside the weights and never merged into
    them.

    Noise is keyed by (seed, row, position), so that a row's noise doesn't depend on its neighbours. Nothing comes from
    generation_config. refresh(policy) takes over weights that have changed. short: a job of few tokens, for which
    compiling the fast engine's step (where its Triton kernels don't run) isn't worth its seconds. max_batch: rows
    decoded at one time, at most.
    """

    def __init__(self, model: nn.Module, tokenizer, max_batch: int | None = None, short: bool = False):
        self.tokenizer, self.max_batch = tokenizer, max_batch or MAX_BATCH
        self.stop_ids = frozenset(getattr(tokenizer, "stop_ids", (tokenizer.eos_token_id,)))
        self.model, self.used = model, 0
        self.decoder = PlainDecoder(model) if not is_fast(model) else \
            fast.Decoder(base_of(model), choose, say, compile=not short)

    def refresh(self, policy: nn.Module) -> None:
        """Take over the policy's weights as they are now."""
        self.used = 0
        self.model = policy
        self.decoder.refresh(base_of(policy) if is_fast(policy) else policy)

    def release(self) -> None:
        """Give the cache back; the next `sample` makes a new one."""
        self.decoder.release()

    def wasted(self) -> float:
        """Share of the tokens computed since refresh(), over all ranks, that no completion has: a row goes on after its
        end until the next readback, and a batch has as many rows as the next recorded size."""
        used, computed = (sum(counts) for counts in zip(*gather_lists([(self.used, self.decoder.computed)])))
        return 1 - used / computed if computed else 0.0

    @without_gradients()
    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], temperature: float = 0.0,
               top_p: float = 1.0, seed: int = 0, stop_strings: Sequence[Sequence[str]] | None = None,
               progress: Callable[[int], Any] | None = None, rows: Sequence[int] | None = None,
               stream: Callable[[int, list[int]], Any] | None = None) -> list[Completion]:
        """One completion per prompt, in order.

        prompts: token ids. max_new_tokens and stop_strings: for all, or one entry per prompt. A completion ends at a
        stop token, at a stop string or at its length. The noise of a prompt is keyed by (seed, its entry in `rows`,
        position); rows: range(n) by default, or a share of it when ranks divide the prompts. progress(n) is called as
        rows finish, stream(i, ids so far of prompt i) as tokens come. ValueError on an empty prompt or one beyond the
        model's positions.
        """
        n, config = len(prompts), base_of(self.model).config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or 1 << 30
        budgets = [max_new_tokens] * n if isinstance(max_new_tokens, int) else list(max_new_tokens)
        stops = [list(s) for s in stop_strings] if stop_strings else [[]] * n
        keys = range(n) if rows is None else list(rows)
        for i, p in enumerate(prompts):
            if not len(p) or budgets[i] < 1:
                raise ValueError(f"prompt {i}: want at least one prompt token and one new token")
            if len(p) + budgets[i] > limit:
                raise ValueError(f"prompt {i}: {len(p)} + {budgets[i]} tokens are beyond the model's {limit} positions")
        done: list[Completion | None] = [None] * n
        for batch in self.decoder.batches(prompts, budgets, self.max_batch):
            self.decoder.begin({i: prompts[i] for i in batch}, {i: keys[i] for i in batch},
                               max(len(prompts[i]) + budgets[i] for i in batch), temperature, top_p, seed)
            live, ids, logprobs = [*batch], {i: [] for i in batch}, {i: [] for i in batch}
            while live:
                new = self.decoder.advance(live, max(budgets[i] - len(ids[i]) for i in live))
                for i in live:
                    tokens, scores = new[i]
                    count, why = self._ended(ids[i], tokens, budgets[i], stops[i])
                    ids[i] += tokens[:count]
                    logprobs[i] += scores[:count]
                    if stream:
                        stream(i, ids[i])
                    if why:
                        text = self._text(ids[i], stops[i] if why == "string" else [])
                        done[i] = Completion(ids[i], logprobs[i], why, text)
                        self.used += len(ids[i])
                finished = [i for i in live if done[i]]
                live = [i for i in live if not done[i]]
                if progress and finished:
                    progress(len(finished))
        lengths = [len(p) + len(c.ids) for p, c in zip(prompts, done)]
        count_flops(base_of(self.model), sum(lengths), attended=sum(n * (n + 1) // 2 for n in lengths),
                    predicted=sum(len(c.ids) for c in done))
        return done

    def _ended(self, ids: list[int], new: list[int], budget: int, stops: list[str]) -> tuple[int, str | None]:
        """How many of the `new` tokens after `ids` are the completion's, and how it ended (None: not yet)."""
        remaining = budget - len(ids)
        count, how = (remaining, "length") if remaining <= len(new) else (len(new), None)
        if not self.stop_ids.isdisjoint(new[:count]):
            count, how = next(n + 1 for n, token in enumerate(new) if token in self.stop_ids), "eos"
        if stops:  # a stop string may be a special token, which the text then lacks
            reach, texts = max(len(s.encode()) for s in stops) + 8, count - (how == "eos")

            def has_stop(n: int, window: int) -> bool:
                tail = self.tokenizer.decode((ids + new[:n])[-window:])
                return any(s in tail for s in stops)
            if texts and has_stop(texts, reach + texts):  # one token completed a stop string; which?
                for n in range(1, texts + 1):
                    if has_stop(n, reach):
                        return n, "string"
        return count, how

    def _text(self, ids: list[int], stops: list[str]) -> str:
        """The completion's text, without special tokens, up to the first of the stop strings."""
        whole = self.tokenizer.decode(ids, skip_special_tokens=True)
        return whole[:min((whole.find(s) for s in stops if s in whole), default=None)]


def rollout(sampler: Sampler, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float,
            seed: int) -> list[Completion]:
    """A sampled completion of each prompt, in order, on every rank: each rank samples a share of the rows.

    A row's noise is keyed by its index in `prompts`, so the number of ranks doesn't change what is sampled.
    """
    n = len(prompts)
    mine = range(rank() * n // world(), (rank() + 1) * n // world())
    done = sampler.sample([prompts[i] for i in mine], max_new_tokens, temperature=temperature, top_p=1.0, seed=seed,
                          rows=mine) if mine else []
    return gather_lists(done)


def eos_rate(model: nn.Module, tokenizer, prompts: Sequence[list[int]], max_new_tokens: int,
             parent: dict | None = None) -> float:
    """Share of greedy completions that end with a stop token within `max_new_tokens`, over all ranks' prompts.

    Warns when the rate is low, or less than half of the parent's (from its run.json).
    """
    mine = prompts[rank()::world()]
    if fast:  # it follows training; the sampler needs the memory
        fast.give_up_passes()
    done = Sampler(model, tokenizer, short=True).sample(mine, max_new_tokens) if mine else []
    ended = all_reduce_(torch.tensor(float(sum(c.stopped == "eos" for c in done)), device=device_of(model)))
    rate = ended.item() / len(prompts)
    if rate < 0.9:
        say(f"WARNING: only {rate:.0%} of {len(prompts)} held-out answers end with EOS within {max_new_tokens} tokens")
    before = ((parent or {}).get("metrics") or {}).get("eos_rate")
    if before and rate < before / 2:
        say(f"WARNING: that is less than half of the parent's {before:.0%}: the policy forgets to stop. Lower --lr or "
            f"--epochs, or look for answers without an end in the data")
    return rate


# ------------------------------------------------------------------------------------------------
# 8. The run directory
# ------------------------------------------------------------------------------------------------

# Dense bfloat16 FLOPs per second from the makers' data sheets; a device's name contains the key. The first that
# matches.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12,
              "A10": 125e12}


def peak_flops(device: str) -> float | None:
    """bfloat16 peak of a GPU of this name; None where it isn't known."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)


def model_flops(config, tokens: int, attended: int, predicted: int, backward: bool = False) -> int:
    """FLOPs that the mathematics of a pass needs, whatever a program recomputes; 0 for a config of other fields.

    Forward: 2 per weight of the layers and token, 2 H V per predicted token (LM head), 4 heads·d per layer and pair of
    a query and a key that it attends to (QK^T and PV). backward: another 2 per weight, with respect to the inputs
    alone, since the base is frozen; twice the forward's of attention. LoRA's factors (3 % more) and elementwise work
    are left out. config: transformers' (llama, qwen2, qwen3, gemma3 and alike). attended: Σ n(n+1)/2 over sequences of n
    tokens.
    """
    try:
        hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
        width = heads * (getattr(config, "head_dim", None) or hidden // heads)
        kv_width = width * config.num_key_value_heads // heads
        weights = layers * hidden * (2 * width + 2 * kv_width + 3 * config.intermediate_size)
    except AttributeError:
        return 0
    products = 2 * (weights * tokens + hidden * config.vocab_size * predicted)
    attention = 4 * layers * width * attended
    return (2 * products + 3 * attention) if backward else products + attention


flops_done = 0  # by this process, since it began


def count_flops(base: nn.Module, tokens: int = 0, attended: int = 0, predicted: int = 0,
                backward: bool = False) -> None:
    global flops_done
    flops_done += model_flops(base.config.get_text_config(), tokens, attended, predicted, backward)


class Fetched:
    """Named scalars [] on their way from a device: the copy starts now, and reading them waits for it."""

    def __init__(self, numbers: dict[str, Tensor]):
        self.names, self.event, self.time = [*numbers], None, time.time()
        self.values = torch.stack([n.detach().double() for n in numbers.values()])
        if self.values.is_cuda:  # only a copy to pinned memory is asynchronous
            pinned = torch.empty(len(numbers), dtype=torch.float64, pin_memory=True)
            self.values = pinned.copy_(self.values, non_blocking=True)
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def read(self, before: Fetched | None = None) -> dict[str, float]:
        """The numbers; sets `time` to when they were ready, by the device's clock since those of `before`."""
        if self.event:
            self.event.synchronize()
            self.time = before.time + before.event.elapsed_time(self.event) / 1e3 if before else time.time()
        return dict(zip(self.names, self.values.tolist()))


class Run:
    """runs/<name>/: one training run, from the first check to the finished adapter.

    Construct after the rows are checked and before any model loads. A finished run of the same configuration ends the
    process with exit code 0; another configuration in the directory is an error, or is moved aside with --overwrite;
    an unfinished run of the same configuration is continued.
    """
    training: weakref.ref[Run] | None = None  # the one that trains in this process
    least_tokens = 1  # that a micro-batch must hold: those of the longest sequence or pair

    def __init__(self, method: str, args: Any, invariants: TrainInvariants, data: dict, parent: dict | None = None,
                 parent_dir: str | None = None, scorers: dict[str, dict] | None = None):
        take_turn()
        if fast:  # before the model's weights are there: they would stay where they are
            fast.grow_segments()
        self.args, self.parent_dir = args, parent_dir
        self.directory = Path(args.out)
        self.stop_signal, self.seconds, self.started = 0, 0.0, time.time()
        self.bar, self.tracker, self.old_handlers = None, None, {}
        self.unread = self.last_read = self.flags = None
        self.state: dict[str, Any] = {}  # what a script must find again after a resume, besides weights and optimizer
        self.checkpoint_file = self.directory / "checkpoint" / "state.safetensors"
        self.running = self.directory / "checkpoint" / "run.json"  # becomes the directory's run.json at the end
        link, *scorer_links = ({k: run[k] for k in ("name", "method", "config_hash", "adapter_sha256", "family")}
                               if run else None for run in (parent, *(scorers or {}).values()))
        self.record = {
            "method": method, "name": self.directory.name, "model": args_model(args, parent),
            "config_hash": config_hash(method, args, invariants, data, parent, scorers),
            "train_invariants": invariants.hash, "invariants": dataclasses.asdict(invariants),
            "family": config_hash(method, args, invariants, data, parent, scorers, seed=False), "seed": args.seed,
            "parent": link, **({"scorers": dict(zip(scorers, scorer_links))} if scorers else {}), "data": data,
            "weights_sha256": invariants.weights_sha256,
            "args": resolved_args(args), "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
        decision = None
        if rank() == 0:
            try:
                decision = self._open()
            except SystemExit as e:
                decision = e.code
        decision = from_rank0(decision)
        if decision is not None:
            if rank() == 0 and hasattr(self, "lock"):
                self.lock.release()
            leave_ranks()
            raise SystemExit(decision)

    def _open(self) -> int | None:
        """Lock the directory and settle what to do with what it holds; an exit code, or None to go on."""
        if self.args.push_to_hub:
            import publish
            publish.check_access(self.args.push_to_hub)
        if self.parent_dir and self.directory.resolve() == Path(self.parent_dir).resolve():
            fail(f"--out {self.directory} is the adapter to start from; choose another --out")
        if self.directory.exists() and not self.directory.is_dir():
            fail(f"--out {self.directory} is a file")
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            fail(f"--out {self.directory} can't be made ({e.strerror})")
        self.lock = Lock(self.directory.parent / f".{self.directory.name}.lock",
                         f"another process is training in {self.directory}")
        self._tidy()
        finished = self.directory / "run.json"
        record_file = next((f for f in (finished, self.running) if f.is_file()), None)
        if record_file:
            old = read_json(record_file)
            changed = [k for k in ("method", "train_invariants", "data", "args", "parent", "scorers")
                       if self._identity(old, k) != self._identity(self.record, k)]
            if not changed and record_file == finished:
                shutil.rmtree(self.running.parent, ignore_errors=True)  # of a process killed just before it did so
                say(f"{self.directory} is finished (config {old['config_hash']}): nothing to do")
                self._push()
                say_next(*next_command(self.record["method"], self.args))
                return 0
            if changed and not self.args.overwrite:
                fail(f"{self.directory} holds another run (config {old['config_hash']}, this one is "
                     f"{self.record['config_hash']}; they differ in {self._difference(old, changed)}); "
                     f"choose another --out, or --overwrite to move it aside")
            if changed:
                aside = self.directory.with_name(f"{self.directory.name}.{old['config_hash']}.{int(time.time())}")
                os.rename(self.directory, aside)
                say(f"moved the old run to {aside}")
        elif self.directory.exists() and any(self.directory.iterdir()):
            fail(f"{self.directory} is not empty and holds no run; choose another --out")
        if self.args.track != "none":
            from tracking import new_id
            self.record["track_id"] = (record_file and not changed and old.get("track_id")) or new_id(
                self.record["config_hash"], self.directory)
        write_json(self.running, self.record)
        return None

    def _tidy(self) -> None:
        """Remove temporary files of killed processes, and a checkpoint folder in which nothing was written yet."""
        for directory in (self.directory, self.running.parent):
            remove_temporaries(directory)
        with contextlib.suppress(OSError):
            self.running.parent.rmdir()

    @staticmethod
    def _identity(record: dict, key: str) -> Any:
        """What must agree for two records to be the same run. Other runs count with their weights, not only their
        config."""
        value = record.get(key) or {}
        if key == "args":
            value = {k: v for k, v in value.items() if k not in RUN_KNOBS}
        if key in ("parent", "scorers") and value:
            links = value.values() if key == "scorers" else [value]
            value = [[link["config_hash"], link["adapter_sha256"]] for link in links]
        return json.loads(json.dumps(value))

    def _difference(self, old: dict, changed: list[str]) -> str:
        names = [k for k in changed if k != "args"]
        if "args" in changed:
            a, b = self._identity(old, "args"), self._identity(self.record, "args")
            names += [f"{k} {a.get(k)} -> {b.get(k)}" for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
        return ", ".join(names)

    def resume(self, optimizer: torch.optim.Optimizer, total_steps: int) -> int:
        """Restore the last checkpoint, if there is one; returns the step to go on with. Starts log, progress bar and
        signals."""
        step, self.log_file = 0, self.directory / "log.jsonl"
        if self.checkpoint_file.is_file():
            from safetensors import safe_open
            try:
                with safe_open(self.checkpoint_file, "pt") as f:
                    meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
            except SafetensorError as e:
                fail(f"{self.checkpoint_file} can't be read ({e}); remove {self.checkpoint_file.parent} to begin anew")
            if "parameter/0" not in tensors:
                fail(f"{self.checkpoint_file} is of an older version; remove {self.checkpoint_file.parent} to begin "
                     f"anew")
            step, self.seconds, self.state = int(meta["step"]), float(meta["seconds"]), json.loads(meta["state"])
            for i, p in enumerate(learned(optimizer)):
                p.data.copy_(tensors[f"parameter/{i}"])
                state = {k: tensors[f"{k}/{i}"].to(p.device) for k in ("exp_avg", "exp_avg_sq")}
                where = p.device if optimizer.defaults["fused"] else "cpu"  # where Adam keeps its count of steps
                optimizer.state[p] = {"step": tensors[f"step/{i}"].to(where), **state}
            torch.set_rng_state(tensors["rng/cpu"])
            if "rng/cuda" in tensors and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors["rng/cuda"])
            say(f"resuming {self.directory} at step {step} of {total_steps}")
        if rank() == 0:
            lines = self.log_file.read_text().splitlines(True) if step and self.log_file.is_file() else []
            lines = [line for line in lines if line.endswith("\n")]  # a crash may have cut the last one short
            write_text(self.log_file, "".join(line for line in lines if json.loads(line)["step"] < step))
            from tqdm import tqdm
            self.bar = tqdm(total=total_steps, initial=step, desc=self.record["name"], unit="step",
                            dynamic_ncols=True, mininterval=0.5, file=sys.stderr)
            if self.args.track != "none":
                from tracking import Tracker
                self.tracker = Tracker(self.args.track, self.record)
        self.total_steps, self.last_flops = total_steps, flops_done
        self.started = self.last_tick = time.time()
        Run.training = weakref.ref(self)
        if step < total_steps:
            self.old_handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        return step

    def _on_signal(self, number, frame) -> None:
        """The first signal stops after the step; a second Ctrl-C at once, at the last checkpoint."""
        if self.stop_signal and number == signal.SIGINT and world() == 1:
            self._restore_signals()
            raise KeyboardInterrupt
        if not self.stop_signal and rank() == 0:
            at_once = "; a second Ctrl-C stops at once" if world() == 1 else ""
            with contextlib.suppress(OSError):
                os.write(2, f"\nstopping after this step{at_once}\n".encode())  # print() may be at work already
        self.stop_signal = number

    def log(self, step: int, metrics: dict[str, Any], rows: Sequence[int] = ()) -> None:
        """One line of log.jsonl: `metrics` (means or sums over the whole step and all ranks), rate, memory, time.

        Where some are tensors, the line is written when the next step has been queued on the GPU, which then never
        waits for a line; the first is written at once, to show that the run works. `rows` are the step's rows of the
        data set, for check_finite. A "tokens" entry gives tokens_per_s; on a GPU that PEAK_FLOPS lists, mfu is the
        share of its peak that this rank's passes needed.
        """
        tensors = {k: v for k, v in metrics.items() if isinstance(v, Tensor)}
        fetched = Fetched(tensors) if tensors else None
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_reserved()  # graphs hold theirs unallocated
            metrics = metrics | {"peak_gib": round(peak / 2**30, 2)}
        self.flush()
        self.unread = step, metrics, fetched, flops_done, rows
        if not (fetched and self.last_read):
            self.flush()

    def watch(self, tokens: float, ended: float, varies: bool = True) -> None:
        """Warn, once per kind, when a policy that learns from its own answers collapses or learns nothing.

        Of one update: tokens, mean per answer; ended, share of answers that end with EOS; varies, whether the rewards
        of any group differ. `tokens` and `ended` are compared with the first update's, whose answers the parent gave;
        `varies` warns after ten updates in a row without a difference."""
        seen = self.state.setdefault("watch", {"tokens": tokens, "ended": ended, "flat": 0, "said": []})
        seen["flat"] = 0 if varies else seen["flat"] + 1
        signs = {
            "short": (tokens < seen["tokens"] / 10,
                      f"the policy collapses: answers have {tokens:.1f} tokens, less than a tenth of the first update's "
                      f"{seen['tokens']:.1f}. Does the reward pay for short answers? Raise --beta or lower --lr"),
            "endless": (ended < seen["ended"] / 2,
                        f"the policy collapses: {ended:.0%} of the answers end with EOS, less than half of the first "
                        f"update's {seen['ended']:.0%}. Raise --completion-tokens or --beta, or lower --lr"),
            "flat": (seen["flat"] >= 10,
                     "for ten updates no group's rewards differed: nothing is learnt. Choose problems that are solved "
                     "now and then, or raise --temperature or --group-size")}
        for name, (shows, message) in signs.items():
            if shows and name not in seen["said"]:
                seen["said"].append(name)
                say(f"\nWARNING: {message}")

    def flush(self) -> None:
        """Write the line that waits for its numbers, if there is one. A number that is not finite ends the run."""
        if self.unread is None:
            return
        (step, metrics, fetched, flops, rows), self.unread = self.unread, None
        metrics = metrics | (fetched.read(self.last_read) if fetched else {})
        self.last_read = fetched
        self.check_finite(step, rows, **{k: v for k, v in metrics.items() if isinstance(v, float)})
        now = fetched.time if fetched else time.time()
        if "tokens" in metrics:
            metrics["tokens_per_s"] = round(metrics["tokens"] / (now - self.last_tick), 1)
        if torch.cuda.is_available() and (peak := peak_flops(torch.cuda.get_device_name())):
            metrics["mfu"] = round((flops - self.last_flops) / (now - self.last_tick) / peak, 4)
        self.last_tick, self.last_flops = now, flops
        line = {"step": step, **metrics, "seconds": round(self.seconds + now - self.started, 3)}
        if rank() == 0:
            with open(self.log_file, "a") as f:
                f.write(to_json(line) + "\n")
            self.bar.set_postfix({k: f"{metrics[k]:.4g}" for k in ("loss", "accuracy", "scores", "kl", "tokens_per_s",
                                                                   "mfu", "peak_gib") if metrics.get(k) is not None},
                                 refresh=False)
            self.bar.update(1)
            if self.tracker:
                self.tracker.log(line, step=step)

    def stop(self, message: str) -> NoReturn:
        """End a run that must not go on; its last checkpoint is kept."""
        self._release()
        fail(message)

    def check_finite(self, step: int, rows: Sequence[int], **values: float) -> None:
        """Stop the run at a value that is not finite, naming the step and the rows of the data. Nothing of such a step
        is kept: a line is read before a checkpoint is written."""
        if bad := {k: v for k, v in values.items() if not math.isfinite(v)}:
            self._release()
            raise FloatingPointError(f"{bad} at step {step}; rows of the data set in it: {sorted(rows)}; "
                                     f"the last checkpoint is kept")

    def checkpoint(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """After `step` steps: save atomically when it is time or a signal asked; then leave if one did."""
        due = step == self.total_steps or step % self.args.checkpoint_every == 0
        if due:
            self.flush()  # so that the answer below is of this step
        stop = self._signalled(learned(optimizer)[0].device)
        if stop or due:
            self.flush()
            if rank() == 0:
                tensors = {"rng/cpu": torch.get_rng_state()}
                if torch.cuda.is_available():
                    tensors["rng/cuda"] = torch.cuda.get_rng_state()
                for i, p in enumerate(learned(optimizer)):
                    state = optimizer.state[p]
                    tensors[f"parameter/{i}"] = p.detach().cpu()
                    tensors |= {f"{k}/{i}": state[k].cpu() for k in ("step", "exp_avg", "exp_avg_sq")}
                meta = {"step": str(step), "seconds": str(self.seconds + time.time() - self.started),
                        "state": to_json(self.state)}
                write_atomic(self.checkpoint_file, lambda p: save_file(tensors, p, meta))
            if step == self.total_steps:  # from here on there is nothing that a signal could lose
                self._restore_signals()
            if stop:
                self._release()
                leave_ranks()
                say(f"\nstopped by a signal after step {step}; run the same command again to continue")
                raise SystemExit(128 + (self.stop_signal or signal.SIGTERM))

    def _signalled(self, device) -> bool:
        """Whether any rank has had a signal; all ranks agree. While a line waits for its numbers, the answer is the
        previous step's, so that this doesn't wait either."""
        if world() == 1:
            return self.stop_signal > 0
        signalled = all_reduce_(torch.full((), float(self.stop_signal), device=device))
        before, self.flags = self.flags, Fetched({"signal": signalled})
        return any(f.read()["signal"] > 0 for f in (before, None if self.unread else self.flags) if f)

    def save(self, policy: PeftModel, tokenizer, prompts: dict[str, list[str]]) -> None:
        """Write the adapter, relative to the pretrained base, and prompts.json: {"train": prompt ids, "heldout": prompt
        ids}, by which a judge or a reward model is kept apart from what was trained."""
        if rank() == 0:
            self.bar.close()
            self.record["template"] = tokenizer.template_note
            write_json(self.directory / "prompts.json", prompts)
            self.record["adapter_sha256"] = save_policy(policy, self.parent_dir, self.directory, tokenizer,
                                                        self.record["model"])
        from_rank0()

    def finish(self, metrics: dict[str, Any], curves: Sequence[str], description: str) -> None:
        """Write curves.png, the model card and the finished run.json; then the checkpoint goes.

        A metric that is not finite (the last step broke the weights) ends the run unfinished.
        """
        if broken := [k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]:
            self._release()
            raise FloatingPointError(f"{', '.join(f'{k} is {metrics[k]}' for k in broken)} after the last step; "
                                     f"the run is not finished")
        if rank() == 0:
            import publish
            self.record.update(
                description=description, metrics=metrics,
                wall_time_s=round(self.seconds + time.time() - self.started, 1),
                versions=versions(), git_commit=git_commit(), hardware=hardware())
            lines = [json.loads(line) for line in self.log_file.read_text().splitlines()]
            write_atomic(self.directory / "curves.png", lambda p: plot_curves(lines, curves, self.record["name"], p))
            write_text(self.directory / "README.md", publish.model_card(self.record))
            write_json(self.directory / "run.json", self.record)
            shutil.rmtree(self.directory / "checkpoint", ignore_errors=True)
            self._tidy()
            if self.tracker:
                self.tracker.attach(self.record, self.directory, self.total_steps)
        self._release()
        say(f"{self.directory}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                              for k, v in metrics.items()))
        self._push()
        leave_ranks()
        say_next(*next_command(self.record["method"], self.args))

    def _push(self) -> None:
        """--push-to-hub, of a finished run."""
        if self.args.push_to_hub and rank() == 0:
            import publish
            publish.push(self.directory, self.args.push_to_hub, getattr(self.args, "results", "results"))

    def _restore_signals(self) -> None:
        for s, handler in self.old_handlers.items():
            signal.signal(s, handler)
        self.old_handlers = {}

    def _release(self) -> None:
        Run.training = None
        self._restore_signals()
        if rank() == 0:
            self.bar.close()
            if self.tracker:
                self.tracker.finish()
            self.lock.release()


def next_command(method: str, args: Any) -> list[str]:
    """What follows a training run: DPO after SFT, PPO after a reward model, the evaluation after the others."""
    if method == "sft":
        return ["python", "dpo.py", "--sft-adapter", args.out]
    if method == "reward":  # it doesn't know its policy: the SFT run beside it, else the base itself
        model, beside = ["--model", args.model] if args.model else [], Path(args.out).with_name("sft_v2")
        start = ["--sft-adapter", str(beside)] if beside.is_dir() else ["--sft-adapter", "none", *model]
        if args.part != "J":
            return ["python", "ppo.py", *start, "--reward-adapter", args.out]
        reward = Path(args.out).with_name("rm_v1")  # part J only watches the one that PPO optimises
        if not reward.is_dir():
            return ["python", "reward.py", "--part", "A", *model, "--out", str(reward)]
        return ["python", "ppo.py", *start, "--reward-adapter", str(reward), "--watch-adapter", args.out]
    results = getattr(args, "results", "results")
    return ["python", "evaluate.py", "--adapter", args.out, *(["--eval-data", args.eval_data] if args.eval_data else []),
            *(["--out", results] if results != "results" else [])]


def learned(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def args_model(args: Any, parent: dict | None) -> str:
    """The base model as named: by --model, else the parent's, else the default."""
    return getattr(args, "model", None) or (parent["model"] if parent else QWEN)


def plot_curves(lines: list[dict], keys: Sequence[str], title: str, path: Path) -> None:
    """Small multiples of logged quantities over steps; a step without a quantity has no point."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    keys = [k for k in keys if any(line.get(k) is not None for line in lines)]
    columns = min(3, max(1, len(keys)))
    figure, axes = plt.subplots(max(1, math.ceil(len(keys) / columns)), columns, squeeze=False,
                                figsize=(4 * columns, 2.6 * max(1, math.ceil(len(keys) / columns))))
    for axis in axes.flat[len(keys):]:
        axis.set_axis_off()
    for axis, key in zip(axes.flat, keys):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        axis.plot(*zip(*points), linewidth=1.2)
        axis.set_title(key, fontsize=9)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)


def report_failure(kind: type[BaseException], error: BaseException, trace) -> None:
    """sys.excepthook: an error that is no fault of the code (a full disk, a number that is not finite, no memory left, a
    text without tokens) gives one line on stderr and exit code 1, Ctrl-C one line. With RUNGS_DEBUG set, and for any
    other error, the traceback."""
    expected = issubclass(kind, (OSError, FloatingPointError, SafetensorError, torch.OutOfMemoryError, Degenerate,
                                 KeyboardInterrupt))
    no_memory = issubclass(kind, torch.OutOfMemoryError)
    run = Run.training and Run.training()
    if no_memory and run and world() == 1 and "RUNGS_RETRIED" not in os.environ:
        retry_in_halves(run)
    if run and run.bar:
        with contextlib.suppress(OSError):
            run.bar.close()  # which prints its last state: the error comes after it
    if not expected or os.environ.get("RUNGS_DEBUG"):
        return sys.__excepthook__(kind, error, trace)
    if issubclass(kind, KeyboardInterrupt):
        return print("\nstopped; what is finished is kept, and the same command goes on from there", file=sys.stderr)
    remedy = "give a smaller --micro-tokens: " if no_memory else ""
    print(f"error: {remedy}{' '.join(str(error).split())} ({kind.__name__}; RUNGS_DEBUG=1 shows where)", file=sys.stderr,
          flush=True)


sys.excepthook = report_failure


def retry_in_halves(run: Run) -> None:
    """After a GPU runs out of memory: replace this process by the same command with half the --micro-tokens, or as many
    as the longest sequence needs; return if there are no fewer.

    The run goes on from its last checkpoint, and --micro-tokens changes no update; a new process has no gradient of
    half a step, and no fragmented memory.
    """
    fewer = max(run.args.micro_tokens // 2, Run.least_tokens)
    if fewer >= run.args.micro_tokens:
        return
    print(f"note: out of memory with --micro-tokens {run.args.micro_tokens}: once more with {fewer}, from the last "
          f"checkpoint", file=sys.stderr, flush=True)
    os.environ["RUNGS_RETRIED"] = "1"
    for fd in range(3, 1024):  # the lock's, and what a GPU's driver holds its memory by
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, False)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "--micro-tokens", str(fewer)])


# ------------------------------------------------------------------------------------------------
# 9. results/metrics.json
# ------------------------------------------------------------------------------------------------

SCHEMA_VERSION = 1
ROW_KEY = ("name", "config_hash", "adapter_sha256", "eval_hash")
ROW_FIELDS = {**dict.fromkeys(("name", "config_hash", "eval_hash", "protocol", "timestamp"), str),
              "adapter_sha256": (str, type(None)), "phase": int}


def results_stem(record: dict[str, Any]) -> str:
    """`<name>-<train_invariants>-s<seed>`: the name of a run's file of figures, so that one results directory holds
    several seeds and bases, while a run that is repeated with other settings replaces its own file."""
    return f"{record['name']}-{record['train_invariants']}-s{record['seed']}"


def read_results(path: str | Path) -> dict[str, Any]:
    """{"schema_version": 1, "runs": [row, …]}; empty when there is no file. Fails on a newer schema."""
    path = Path(path)
    if not path.exists():
        return {"schema_version": SCHEMA_VERSION, "runs": []}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        version = results["schema_version"]
        results["runs"]
    except (ValueError, KeyError, TypeError) as e:
        fail(f"{path} is not a results file ({type(e).__name__}: {e})")
    check_fields(path, results, {"schema_version": int, "runs": list})
    if version > SCHEMA_VERSION:
        fail(f"{path} has schema_version {version}, newer than this code's {SCHEMA_VERSION}; update the code")
    for i, row in enumerate(results["runs"]):
        check_fields(f"{path}, row {i}", row, ROW_FIELDS)
    return results


def upsert_row(path: str | Path, row: dict[str, Any]) -> None:
    """Add a row under a file lock; it replaces only the row of the same name, config, adapter and evaluation."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Lock(path.with_name(f".{path.name}.lock"), f"another process is writing {path}", wait=120):
        results = read_results(path)
        key = [row[k] for k in ROW_KEY]
        runs = [r for r in results["runs"] if [r[k] for k in ROW_KEY] != key] + [row]
        runs.sort(key=lambda r: (r["phase"], r["name"], r["protocol"], r["timestamp"]))
        write_json(path, {"schema_version": SCHEMA_VERSION, "runs": runs})


def __getattr__(name: str) -> Any:
    """common.load_rows, common.load_tokenizer, common.render, …: what chat.py, inputs.py and memory.py define is
    reached from here too.

    They build on this module, so that it can't import them at its beginning.
    """
    if not name.startswith("_"):
        for module in map(importlib.import_module, ("chat", "inputs", "memory")):
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module 'common' has no attribute {name!r}")
