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

for kind, kv_heads, rank, temperature in (("qwen2", 1, 20, 1.0), ("qwen3", 2, 0, 0.0)):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, hidden_size=64, intermediate_size=72, num_hidden_layers=2, head_dim=32,
                                  num_attention_heads=2, num_key_value_heads=kv_heads, vocab_size=50, pad_token_id=0,
                                  max_position_embeddings=256, initializer_range=0.1)
    policy = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    if rank:
        policy = common.add_lora(policy, rank, 2 * rank)
        for p in common.trainable(policy):
            torch.nn.init.normal_(p, std=0.1)
    torch_path = sample(policy, "0", temperature)
    assert len({tuple(c.ids) for c in torch_path}) > 2
    by_kernels = sample(policy, "1", temperature)
    assert [c.ids for c in by_kernels] == [c.ids for c in torch_path], kind
    for a, b in zip(by_kernels, torch_path):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-5, atol=1e-5)
"""


def run(*command):
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


def test_each_kernel_equals_torch():
    done = run("bench/decode_kernels.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_sampler_by_kernels_is_the_sampler():
    """fp32: the same tokens, sampled with an adapter and greedy without; log-probs within 1e-5."""
    done = run("-c", SAMPLER)
    assert done.returncode == 0, done.stderr
