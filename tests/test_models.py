"""Which models load: the files of their weights, what the fast engine serves, each architecture against the libraries.

table() is the table of docs/models.md.
"""
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import chat
import common
import inputs
import dpo
import fast
import sft
from common import Example

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
    config = {k: v for k, v in {**config, **changes}.items() if k not in drop}
    (directory / "config.json").write_text(json.dumps(config))


def edit_weights(directory, change):
    """change: (name, tensor) -> the same changed, or None to leave it out."""
    tensors = (change(name, tensor) for name, tensor in load_file(directory / "model.safetensors").items())
    save_file(dict(filter(None, tensors)), directory / "model.safetensors", {"format": "pt"})


def shard(directory):
    """The same weights in several files and an index."""
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    whole.save_pretrained(directory, max_shard_size="60KB")
    (directory / "model.safetensors").unlink()
    return sorted(directory.glob("model-*.safetensors"))


# -- forms of a checkpoint that load

FORMS = {
    "shards": shard,
    "float16": lambda d: edit_weights(d, lambda name, t: (name, t.half())),
    "bfloat16": lambda d: edit_weights(d, lambda name, t: (name, t.bfloat16())),
    "no dtype in the config": lambda d: edit_config(d, drop=("dtype", "torch_dtype")),
    "the names of a bare decoder": lambda d: edit_weights(d, lambda name, t: (name.removeprefix("model."), t)),
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
    return lambda d: edit_weights(d, lambda k, t: (k, t) if k != name else None)


NORM = "model.layers.1.input_layernorm.weight"
FAULTS = {  # what is wrong -> (how it comes about, parts of the error)
    "a shard is missing": (remove_a_shard, ["model-00002-of-", "is not there"]),
    "a shard is an LFS pointer": (point_at_lfs, ["model-00002-of-", "LFS pointer"]),
    "a shard is cut short": (cut_a_shard, ["model-00002-of-", "is truncated"]),
    "a tensor is missing": (drop(NORM), [NORM, "1 of 20 tensors"]),
    "another shape": (lambda d: edit_config(d, intermediate_size=96), ["gate_proj.weight", "[128, 64]", "[96, 64]"]),
    "8-bit floats": (lambda d: edit_weights(d, lambda name, t: (name, t.to(torch.float8_e4m3fn))), ["F8_E4M3"]),
    "quantised": (lambda d: edit_config(d, quantization_config={"quant_method": "awq"}), ["quantised", "awq"]),
    "an unknown type": (lambda d: edit_config(d, model_type="llama9"), ["llama9", transformers.__version__]),
    "code of its own": (lambda d: edit_config(d, model_type="mine", auto_map={"AutoModel": "m.M"}), ["mine"]),
    "an encoder": (lambda d: edit_config(d, model_type="vit"), ["vit"]),
    "GGUF only": (lambda d: (d / "model.safetensors").rename(d / "m.gguf"), ["m.gguf is not read", "convert_gguf"]),
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
                                          max_window_layers=1), None),
    "gemma 3": (transformers.Gemma3TextConfig(), None),
    "gemma 3, capped": (transformers.Gemma3TextConfig(final_logit_softcapping=30.0), "capped"),
    "gemma 3, both directions": (transformers.Gemma3TextConfig(use_bidirectional_attention=True), "both directions"),
    "gemma 3, another gate": (transformers.Gemma3TextConfig(hidden_activation="silu"), "activation silu"),
    "gemma 3, dynamic": (transformers.Gemma3TextConfig(rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}}), "dynamic"),
    "dynamic": (transformers.LlamaConfig(rope_parameters={
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}), "dynamic"),
    "longrope": (transformers.LlamaConfig(rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64}), "longrope"),
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
    gemma = {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}
    assert fast.unsupported(gemma) is None
    for kind, why in (("linear", None), ("dynamic", "rotary positions of type dynamic")):
        assert fast.unsupported({**gemma, "rope_scaling": {"rope_type": kind, "factor": 8.0}}) == why


# -- architectures: each is trained, sampled and saved as plain transformers and PEFT do it

SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, max_position_embeddings=256, initializer_range=0.1, eos_token_id=2, bos_token_id=1,
             pad_token_id=0)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
ARCHITECTURES = {  # name in docs/models.md -> tiny configuration; every special trait of it is on
    "Llama 3, SmolLM 2": transformers.LlamaConfig(vocab_size=400, **SHAPE),
    "Llama 3.1 (scaled positions)": transformers.LlamaConfig(vocab_size=400, rope_parameters=LLAMA3, **SHAPE),
    "Qwen 2 and 2.5": transformers.Qwen2Config(vocab_size=400, **SHAPE),
    "Qwen 2.5 (positions by yarn)": transformers.Qwen2Config(vocab_size=400, rope_parameters=YARN, **SHAPE),
    "Qwen 2 with sliding windows": transformers.Qwen2Config(vocab_size=400, use_sliding_window=True, sliding_window=8,
                                                            max_window_layers=2, **SHAPE),
    "Qwen 3": transformers.Qwen3Config(vocab_size=400, **SHAPE),
    "Gemma 2": transformers.Gemma2Config(vocab_size=400, sliding_window=8, query_pre_attn_scalar=16,
                                         final_logit_softcapping=5.0, attn_logit_softcapping=2.0, **SHAPE),
    "Gemma 3 (text)": transformers.Gemma3TextConfig(vocab_size=400, sliding_window=8, query_pre_attn_scalar=16,
                                                    layer_types=["sliding_attention", "full_attention"] * 2, **SHAPE),
    "Mistral": transformers.MistralConfig(vocab_size=400, sliding_window=8, **SHAPE),
    "Phi 3": transformers.Phi3Config(vocab_size=400, **SHAPE),
    "SmolLM 3": transformers.SmolLM3Config(vocab_size=400, no_rope_layer_interval=2, **SHAPE),
    "OLMo 2": transformers.Olmo2Config(vocab_size=400, **SHAPE),
    "Granite": transformers.GraniteConfig(vocab_size=400, logits_scaling=2.0, embedding_multiplier=3.0,
                                          residual_multiplier=0.5, attention_multiplier=0.1, **SHAPE),
    "LFM 2": transformers.Lfm2Config(vocab_size=400, layer_types=["conv", "full_attention"] * 2, **SHAPE),
}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """{name: directory} of tiny random models, their vocabularies padded beyond the tokenizer's 364 tokens."""
    directories = {}
    for name, config in ARCHITECTURES.items():
        directories[name] = directory = tmp_path_factory.mktemp("model")
        make_tokenizer(directory)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directories


def examples(seed=0):
    """Sequences of 3 to 40 tokens, longer than the windows, with some tokens predicted."""
    g = random.Random(seed)
    return [Example.masked(ids, [False] + [g.random() < 0.6 for _ in ids[2:]] + [True]) for ids in
            ([g.randrange(3, 360) for _ in range(g.randrange(3, 40))] for _ in range(7))]


def randomised(policy, seed=1):
    g = torch.Generator().manual_seed(seed)
    for p in common.trainable(policy):
        p.data = 0.05 * torch.randn(p.shape, generator=g)
    return policy


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_trained_sampled_and_saved_like_the_libraries_do(built, tmp_path, name):
    """Loss, gradient, greedy tokens and the reloaded adapter equal those of transformers and plain PEFT, one sequence
    at a time without padding, at 1e-5 in fp32."""
    directory = common.resolve_model(str(built[name]))
    tokenizer, rows = chat.load_tokenizer(directory), examples()
    ours = randomised(common.add_lora(common.load_model(directory, dtype=torch.float32)))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    theirs = randomised(get_peft_model(theirs, LoraConfig(
        r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=list(common.lora_targets(theirs)))))

    n = sum(len(e.targets) for e in rows)
    loss = expected = 0.0
    for batch in common.micro_batches(ours, rows, 128):
        part = -common.token_logprobs(ours, batch).sum() / n
        part.backward()
        loss += part.item()
    for e in rows:
        logprobs = theirs(torch.tensor([e.ids])).logits[0].log_softmax(-1)
        part = -logprobs[list(e.predict), list(e.targets)].sum() / n
        part.backward()
        expected += part.item()
    assert loss == pytest.approx(expected, abs=1e-5)
    for (where, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if mine.requires_grad:
            assert torch.allclose(mine.grad, other.grad, atol=1e-5, rtol=1e-4), where

    for policy in (ours, theirs):  # a step of training
        torch.optim.Adam(common.trainable(policy), lr=1e-3).step()
    prompts = [e.ids for e in rows]
    done = common.Sampler(ours, tokenizer).sample(prompts, 12)
    for prompt, completion in zip(prompts, done):
        out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12,
                              do_sample=False, eos_token_id=list(tokenizer.stop_ids), pad_token_id=0)
        assert completion.ids == out[0, len(prompt):].tolist()

    common.save_policy(ours, None, tmp_path / "run", tokenizer, str(directory))
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "run")
    merged = common.load_model(directory, tmp_path / "run", dtype=torch.float32)
    ids = torch.tensor([rows[0].ids])
    with torch.no_grad():
        before = ours(ids).logits
        for model in (reloaded.eval(), merged):
            assert torch.allclose(model(ids).logits, before, atol=1e-5)
        assert (before - common.load_model(directory, dtype=torch.float32)(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["Gemma 3 (text)", "Qwen 2 with sliding windows"])
def test_a_window_counts_from_the_query_where_sequences_share_a_prompt(built, name):
    """Answers to one prompt longer than the window: packed with the prompt once, log-probs and gradients as without
    sharing, in fp32."""
    g, found = random.Random(3), []
    prompt = [g.randrange(3, 360) for _ in range(30)]
    rows = [Example.completion(prompt, [g.randrange(3, 360) for _ in range(n)]) for n in (1, 5, 20, 9)]
    for share in (False, True):
        policy = randomised(common.add_lora(common.load_model(built[name], dtype=torch.float32)))
        (pack,) = fast.pack(rows, 512, 4, share=share)
        assert (pack.keys is not None) == share and common.is_fast(policy)
        logprobs = common.token_logprobs(policy, pack)
        logprobs.sum().backward()
        found.append((logprobs.detach(), torch.cat([p.grad.flatten() for p in common.trainable(policy)])))
    for plain, shared in zip(*found):
        assert torch.allclose(plain, shared, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["Gemma 3 (text)", "Phi 3", "LFM 2"])
def test_a_run_records_the_layers_that_it_adapts(built, sft_args, dpo_args, tmp_path, name):
    """Fused projections and convolutions: all linear layers of the decoder, in the invariants and in the adapter; and
    DPO on top of SFT is one adapter of both."""
    directory = built[name]
    sft.main(sft.Args(**{**sft_args, "model": str(directory), "rows": 8, "out": str(tmp_path / "sft_v2")}))
    dpo.main(dpo.Args(**{**dpo_args, "rows": 8, "out": str(tmp_path / "dpo_v1")}, sft_adapter=str(tmp_path / "sft_v2")))
    targets = common.lora_targets(common.skeleton(directory))
    for run, r in (("sft_v2", 16), ("dpo_v1", 32)):
        config = json.loads((tmp_path / run / "adapter_config.json").read_text())
        invariants = json.loads((tmp_path / run / "run.json").read_text())["invariants"]
        assert (sorted(config["target_modules"]), config["r"]) == (sorted(targets), r)
        assert invariants["target_modules"] == list(targets)
    start = inputs.read_start(str(tmp_path / "dpo_v1"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), start.adapter).eval()
    merged = common.load_model(directory, start.adapter, dtype=torch.float32)
    assert torch.allclose(logits(theirs), logits(merged), atol=1e-5)


def table() -> str:
    """The table of docs/models.md: the architectures above, the engine of each, the layers that LoRA adapts."""
    lines = ["| architecture | `model_type` | engine | LoRA on |", "|---|---|---|---|"]
    for name, config in ARCHITECTURES.items():
        with torch.device("meta"):
            targets = common.lora_targets(AutoModelForCausalLM.from_config(config))
        layers = "the seven projections" if targets == common.TARGET_MODULES else ", ".join(targets)
        engine = "plain" if fast.unsupported(config.to_dict()) else "fast"
        lines.append(f"| {name} | {config.model_type} | {engine} | {layers} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_the_docs_is_that_of_the_test():
    assert table() in (Path(__file__).parent.parent / "docs" / "models.md").read_text()


def test_positions_end_where_the_rotary_factors_change(tmp_path):
    """With longrope a sequence's log-probabilities would depend on the lengths of its neighbours beyond that."""
    longrope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    whole = {"max_position_embeddings": 512}
    for config, positions in ((whole, 512), ({}, 1 << 30), ({"text_config": {"max_position_embeddings": 64}}, 64),
                              ({**whole, "original_max_position_embeddings": 64, "rope_scaling": longrope}, 64),
                              ({**whole, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4,
                                                             "original_max_position_embeddings": 32}}, 32)):
        common.write_json(tmp_path / "config.json", config)
        assert common.max_positions(tmp_path) == positions
