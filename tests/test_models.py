"""Which models load: the files of their weights, their configuration, and what the fast code serves."""
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import common
import fast

IDS = torch.tensor([[5, 9, 200, 17, 33, 64, 101, 8, 250, 3, 77]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def model(tmp_path, tiny_model):
    """A copy of the tiny model, to change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit_config(directory, drop=(), **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if k not in drop}))


def edit_weights(directory, change):
    tensors = change(load_file(directory / "model.safetensors"))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def shard(directory):
    """The same weights in several files and an index."""
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).save_pretrained(directory, max_shard_size="60KB")
    (directory / "model.safetensors").unlink()
    return sorted(directory.glob("model-*.safetensors"))


# -- forms of a checkpoint that load

FORMS = {
    "shards": shard,
    "float16": lambda d: edit_weights(d, lambda ts: {k: t.half() for k, t in ts.items()}),
    "bfloat16": lambda d: edit_weights(d, lambda ts: {k: t.bfloat16() for k, t in ts.items()}),
    "no dtype in the config": lambda d: edit_config(d, drop=("dtype", "torch_dtype")),
    "the names of a bare decoder": lambda d: edit_weights(d, lambda ts: {k.removeprefix("model."): t for k, t in ts.items()}),
    "a second copy in another layout": lambda d: save_file({"x": torch.ones(1)}, d / "consolidated.safetensors"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_any_form_loads(tiny_model, model, form):
    FORMS[form](model)
    loaded = common.load_model(common.resolve_model(str(model)), dtype=torch.float32)
    tolerance = {"float16": 2e-2, "bfloat16": 1e-1}.get(form, 1e-5)
    assert (logits(loaded) - logits(common.load_model(tiny_model, dtype=torch.float32))).abs().max() < tolerance
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    same = common.weights_sha256(model) == common.weights_sha256(tiny_model)
    assert same == (form in ("shards", "no dtype in the config", "a second copy in another layout"))


# -- and that don't

def remove_a_shard(directory):
    shard(directory)[1].unlink()


def point_at_lfs(directory):
    shard(directory)[1].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def cut_a_shard(directory):
    file = shard(directory)[1]
    file.write_bytes(file.read_bytes()[:-10])


def drop(name):
    return lambda d: edit_weights(d, lambda ts: {k: t for k, t in ts.items() if k != name})


NORM = "model.layers.1.input_layernorm.weight"
FAULTS = {  # what is wrong -> (how it comes about, parts of the error)
    "a shard is missing": (remove_a_shard, ["model-00002-of-", "is not there"]),
    "a shard is an LFS pointer": (point_at_lfs, ["model-00002-of-", "LFS pointer"]),
    "a shard is cut short": (cut_a_shard, ["model-00002-of-", "is truncated"]),
    "a tensor is missing": (drop(NORM), [NORM, "1 of 20 tensors"]),
    "another shape": (lambda d: edit_config(d, intermediate_size=96), ["mlp.gate_proj.weight", "[128, 64]", "[96, 64]"]),
    "8-bit floats": (lambda d: edit_weights(d, lambda ts: {k: t.to(torch.float8_e4m3fn) for k, t in ts.items()}), ["F8_E4M3"]),
    "quantised": (lambda d: edit_config(d, quantization_config={"quant_method": "awq", "bits": 4}), ["quantised", "awq"]),
    "an unknown type": (lambda d: edit_config(d, model_type="llama9"), ["llama9", transformers.__version__]),
    "code of its own": (lambda d: edit_config(d, model_type="mine", auto_map={"AutoModelForCausalLM": "m.M"}), ["mine"]),
    "an encoder": (lambda d: edit_config(d, model_type="vit"), ["vit"]),
    "GGUF only": (lambda d: (d / "model.safetensors").rename(d / "model.gguf"), ["model.gguf is not read", "convert_gguf"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_work_is_refused_by_name(model, capsys, fault):
    change, parts = FAULTS[fault]
    change(model)
    with pytest.raises(SystemExit) as stop:
        common.resolve_model(str(model))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1
    assert all(part in error for part in parts), error


def test_a_model_of_the_hub_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch, capsys):
    """Only config.json is asked for until it is known to describe a model that can be trained."""
    asked = []

    def snapshot(name, revision=None, allow_patterns=None):
        asked.append(allow_patterns)
        return str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        common.resolve_model("org/gpt2")
    assert asked == [["config.json"]] and "Conv1D" in capsys.readouterr().err


# -- what the fast code serves


SERVED = {
    "llama": (transformers.LlamaConfig(), None),
    "llama3 positions": (transformers.LlamaConfig(rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}), None),
    "yarn": (transformers.Qwen2Config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), None),
    "a window that is off": (transformers.Qwen2Config(use_sliding_window=False, sliding_window=64), None),
    "a window for no layer": (transformers.Qwen2Config(use_sliding_window=True, sliding_window=64, num_hidden_layers=4,
                                                       max_window_layers=4), None),
    "a window": (transformers.Qwen3Config(use_sliding_window=True, sliding_window=64, num_hidden_layers=4,
                                          max_window_layers=1), "window of 64 tokens"),
    "dynamic": (transformers.LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}), "dynamic"),
    "longrope": (transformers.LlamaConfig(rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}),
        "longrope"),
    "gelu": (transformers.LlamaConfig(hidden_act="gelu"), "gelu"),
    "gemma2": (transformers.Gemma2Config(), "gemma2"),
    "mistral": (transformers.MistralConfig(), "mistral"),
    "granite": (transformers.GraniteConfig(logits_scaling=8.0), "granite"),
}


@pytest.mark.parametrize("name", SERVED)
def test_what_the_fast_code_serves(name):
    config, why = SERVED[name]
    found = fast.unsupported(config.to_dict())
    assert found is None if why is None else why in found


def test_older_layouts_of_the_positions_are_understood(tiny_model):
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    config.pop("rope_parameters")
    for scaling in ({"type": "dynamic", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}):
        assert "dynamic" in fast.unsupported({**config, "rope_scaling": scaling})
    assert fast.unsupported({**config, "rope_scaling": {"type": "linear", "factor": 2.0}}) is None
    assert "gemma3_text" in fast.unsupported({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
