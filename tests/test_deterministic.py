"""RUNGS_DETERMINISTIC=1: on a CPU it changes no bit, since there every sum has its order; what it fixes for a GPU."""
import random
from pathlib import Path

import pytest
import torch

import common
import fast.graphs
import grpo
import ppo
import sft
from common import Example


@pytest.fixture
def deterministic(sft_run, ppo_run, grpo_run, monkeypatch):
    """From here on; what it is compared with was made before."""
    monkeypatch.setenv("RUNGS_DETERMINISTIC", "1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which a run sets otherwise, for all that follows here
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.parametrize("name, engine", [("sft", "auto"), ("sft", "plain"), ("ppo", "auto"), ("grpo", "auto")])
def test_the_same_bits_and_a_record_of_it(name, engine, request, deterministic, tmp_path):
    script = {"sft": sft, "ppo": ppo, "grpo": grpo}[name]
    args = request.getfixturevalue(f"{name}_args") | {"engine": engine}
    whole = common.read_json(Path(request.getfixturevalue(f"{name}_run")) / "run.json")  # without it, on either engine
    script.main(script.Args(**args, out=str(tmp_path / "run")))
    record = common.read_json(tmp_path / "run" / "run.json")
    assert record["hardware"]["deterministic"] and "deterministic" not in whole["hardware"]
    assert record["config_hash"] == whole["config_hash"]
    if engine == "auto":
        assert record["adapter_sha256"] == whole["adapter_sha256"]
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_a_size_depends_on_nothing_recorded_before(tiny_model, deterministic):
    """Otherwise a run that continues pads its packs in another way than one that was not stopped."""
    base, g = common.load_model(tiny_model, dtype=torch.float32), random.Random(0)

    def pack(tokens):
        ids = [g.randrange(3, 300) for _ in range(tokens)]
        return fast.pack([Example.masked(ids, [True] * tokens)], 8192, 1, "cpu")[0]

    def sizes():
        recordings = fast.graphs.Recordings(base)
        return [recordings.size_for(pack(tokens)).tokens for tokens in (2000, 100)]
    assert sizes() == [2048, 2048]
    common.setup_device("cpu")
    assert sizes() == [2048, 256]


def test_sampling_lets_pass_what_torch_refuses(deterministic):
    """torch has an error for operations without a fixed order; in a forward pass cumsum's, on a GPU, is fixed."""
    common.setup_device("cpu")

    def refused():
        torch.zeros(4).put_(torch.tensor([1]), torch.tensor([2.0]))
    with pytest.raises(RuntimeError, match="deterministic"):
        refused()
    with common.without_gradients(), pytest.warns(UserWarning, match="deterministic"):
        refused()
    with pytest.raises(RuntimeError, match="deterministic"):
        refused()
