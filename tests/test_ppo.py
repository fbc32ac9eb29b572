import json
from pathlib import Path
import pytest, torch
import common, ppo

@pytest.fixture(scope="session")
def ppo_args(data_dir, sft_run, reward_run, tmp_path_factory):
    return dict(sft_adapter=sft_run, reward_adapter=reward_run, data=str(data_dir / "preference.jsonl"), fixed_prompts=4,
                updates=3, batch_size=8, completion_tokens=12, prompt_tokens=64, epochs=2, minibatches=2, normalise=8,
                lr=1e-3, micro_tokens=512, device="cpu", checkpoint_every=1,
                results=str(tmp_path_factory.mktemp("results")))

def test_smoke(ppo_args, tmp_path):
    ppo.main(ppo.Args(**ppo_args, out=str(tmp_path / "ppo_v1")))
    print((tmp_path / "ppo_v1" / "log.jsonl").read_text())
    print((tmp_path / "ppo_v1" / "run.json").read_text()[-1500:])
