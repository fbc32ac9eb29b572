import json
from pathlib import Path
import pytest, torch
import common, grpo

TASK = '''
def rows():
    return [{"prompt": f"{i} the sky"} for i in range(40)]

def reward(row, completion):
    return 1.0
'''

@pytest.fixture(scope="session")
def grpo_args(sft_run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("grpo")
    (directory / "task.py").write_text(TASK)
    return dict(sft_adapter=sft_run, task=str(directory / "task.py"), heldout_rows=4, updates=3, batch_size=4, group_size=4,
                completion_tokens=12, prompt_tokens=96, pass_k=2, eval_every=2, lr=1e-2, micro_tokens=512,
                device="cpu", checkpoint_every=1, results=str(directory / "results"))

@pytest.mark.parametrize("kw", [{}, dict(beta=0.0), dict(epochs=2, minibatches=2), dict(epochs=2, beta=0.0), dict(resample_groups=True), dict(task="arithmetic:1", prompt_tokens=300), ])
def test_smoke(grpo_args, tmp_path, kw):
    grpo.main(grpo.Args(**{**grpo_args, **kw}, out=str(tmp_path / "grpo_v1")))
    print((tmp_path / "grpo_v1" / "log.jsonl").read_text())
    print((tmp_path / "grpo_v1" / "run.json").read_text()[-1500:])
