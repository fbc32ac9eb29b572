"""The decoding step's Triton kernels against torch, by Triton's interpreter: no GPU needed. (tests/test_gpu.py runs them
for real.)

Each test is a process of its own: Triton reads TRITON_INTERPRET once, when it is imported.
"""
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRITON = importlib.util.find_spec("triton") and tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
pytestmark = pytest.mark.skipif(not TRITON or TRITON < (3, 8), reason="needs triton 3.8 (pip install triton), whose "
                                "interpreter works with NumPy 2.4")

SAMPLER = """
import os
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM
import common

class NoText:
    eos_token_id = 5  # some rows end early
    def decode(self, ids, **kwargs):
        return ""

def sample(policy, kernels, temperature):
    os.environ["RUNGS_KERNELS"] = kernels
    sampler = common.Sampler(policy, NoText())
    assert bool(sampler.decoder.kernels) == (kernels != "0")
    return sampler.sample([[7, 8, 9], [3], [7, 8, 9], list(range(10, 40))], [2, 5, 1, 3], temperature, seed=1)

for kind, kv_heads, ranks, temperature in (("qwen2", 1, (20,), 1.0), ("qwen3", 2, (), 0.0), ("llama", 1, (4, 30), 1.0)):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, hidden_size=192, attention_bias=kind != "qwen3", intermediate_size=72,
                                  num_hidden_layers=2, head_dim=32, num_attention_heads=2, num_key_value_heads=kv_heads, vocab_size=50, pad_token_id=0,
                                  max_position_embeddings=256, initializer_range=0.1)
    policy = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for name, p in policy.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    for i, rank in enumerate(ranks):
        if i:
            policy.add_adapter("second", LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "o_proj", "up_proj"]))
            policy.base_model.set_adapter(["default", "second"])
        else:
            policy = common.add_lora(policy, rank, 2 * rank)
    for name, p in policy.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.1)
    torch_path = sample(policy, "0", temperature)
    assert len({tuple(c.ids) for c in torch_path}) > 2
    by_kernels = sample(policy, "1", temperature)
    assert [c.ids for c in by_kernels] == [c.ids for c in torch_path], kind
    for a, b in zip(by_kernels, torch_path):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-5, atol=1e-5)
"""


COMPILED = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from fast import kernels

class Driver:  # of a GPU that isn't there
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_active_torch_device(self):
        return torch.device("cpu")

triton.runtime.driver.set_active(Driver())
launch, memory = JITFunction.run, {}

def compile_only(self, *args, grid, warmup, **kwargs):
    shared = launch(self, *args, grid=grid, warmup=True, **kwargs).metadata.shared
    memory[self.__name__] = max(shared, memory.get(self.__name__, 0))

JITFunction.run = compile_only
new = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype)
for rank, heads, kv, d, H, I in ((0, 14, 2, 64, 896, 4864), (256, 14, 2, 64, 896, 4864), (16, 16, 8, 128, 1024, 3072)):
    rows, out, b = 3, (heads + 2 * kv) * d, lambda n, out: new(n * rank, out) if rank else None
    tokens, number, temperature = new(rows, dtype=torch.long), new(1, dtype=torch.long)[0], new(1, dtype=torch.float32)[0]
    stream, _ = kernels.embed(tokens, new(9, H), new(H), tokens, number, 512)
    for noise in ((), (number, tokens, number)):
        kernels.choose(new(rows, 151936, dtype=torch.float32), temperature, *noise)
    bias, norm = (new(out), None) if d == 64 else (None, new(d))  # Qwen2, Qwen3
    kernels.attend(new(rows, out + 3 * rank), bias, b(3, out), stream, norm, norm, 1e-6, new(9, d), new(9, d),
                   new(rows, dtype=torch.long), new(rows * 512, 2, kv, d), 512, 512)
    stream = kernels.add(stream, new(rows, H + rank), b(1, H), new(H))
    kernels.swiglu(new(rows, 2 * I + 2 * rank), b(2, 2 * I), stream, 1e-6)
assert set(memory) == {name for name in vars(kernels) if name.endswith("_kernel")}, memory
assert max(memory.values()) < 99 << 10, memory
"""


def run(*command, interpret="1"):
    env = os.environ | {"TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


def test_each_kernel_equals_torch():
    done = run("bench/decode_kernels.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_sampler_by_kernels_is_the_sampler():
    """fp32: the same tokens, sampled with an adapter and greedy without; log-probs within 1e-5."""
    done = run("-c", SAMPLER)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", ["80", "89", "90"])
def test_each_kernel_compiles(capability, tmp_path, monkeypatch):
    """Triton's interpreter takes programs that its compiler refuses. So every kernel is compiled, without a GPU, for an
    A100, an RTX 4090 and an H100, as it would be launched; the shared memory fits the smallest of them, 99 KiB."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = run("-c", COMPILED, capability, interpret="0")
    assert done.returncode == 0, done.stderr
