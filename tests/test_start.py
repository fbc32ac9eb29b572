"""What a method may start from: the model itself, a run of ours, a plain PEFT adapter."""
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig, Qwen2Config

import chat
import common
import inputs
import dpo
import grpo
import kto
import ppo
import sft
from tools import merge

IDS = torch.tensor([[5, 9, 200, 17, 33, 64, 101, 8, 250, 3, 77]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def plain_base(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def randomise(policy, seed=1):
    """Random A and B in place of B = 0."""
    g = torch.Generator().manual_seed(seed)
    for name, p in policy.named_parameters():
        if "lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=g)
    return policy


def write_adapter(base, directory, seed=1, **config):
    """A LoRA adapter as PEFT writes one, its base named by directory."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    randomise(get_peft_model(plain_base(base), LoraConfig(**config)), seed).save_pretrained(directory)
    return str(directory)


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def adapter(tiny_model, tmp_path):
    return Path(write_adapter(tiny_model, tmp_path / "adapter"))


def finished(out):
    run, config = (json.loads((Path(out) / name).read_text()) for name in ("run.json", "adapter_config.json"))
    return run, config


# -- the model itself

@pytest.fixture(scope="session")
def dpo_from_base(tiny_model, dpo_args, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("base") / "dpo_base")
    dpo.main(dpo.Args(**{**dpo_args, "rows": 16}, model=tiny_model, sft_adapter="none", out=out))
    return out


def test_every_method_starts_from_the_model_itself(tiny_model, dpo_from_base, dpo_run, kto_args, ppo_args, grpo_args,
                                                   tmp_path):
    start = {"sft_adapter": "none", "model": tiny_model}
    kto.main(kto.Args(**{**kto_args, **start, "rows": 8}, out=str(tmp_path / "kto")))
    ppo.main(ppo.Args(**{**ppo_args, **start, "updates": 1}, out=str(tmp_path / "ppo")))
    grpo.main(grpo.Args(**{**grpo_args, **start, "updates": 1}, quantization="qlora", out=str(tmp_path / "grpo")))
    base = logits(plain_base(tiny_model))
    for out in (dpo_from_base, *(tmp_path / name for name in ("kto", "ppo", "grpo"))):
        run, config = finished(out)
        assert run["parent"] is None and run["model"] == tiny_model and run["metrics"]["kl_merge"] is None
        assert (config["r"], config["lora_alpha"]) == (16, 32)
        assert run["invariants"]["quantization"] == ("qlora" if run["method"] == "grpo" else "none")  # the policy alone
        reloaded = logits(PeftModel.from_pretrained(plain_base(tiny_model), out))
        moved = (reloaded - base).abs().max()
        assert moved < 1 and (moved > 1e-4 or run["method"] == "grpo")  # whose answers never end here, and earn 0
    assert finished(dpo_from_base)[0]["config_hash"] != finished(dpo_run)[0]["config_hash"]


def test_the_start_is_in_the_hash(tiny_model, sft_run, adapter, dpo_args):
    """Of equal flags and invariants; `none` and no adapter are one start."""
    args, hashes = dpo.Args(**dpo_args), []
    for name in ("none", None, sft_run, str(adapter)):
        start = inputs.read_start(name, tiny_model)
        hashes.append(common.config_hash("dpo", args, start.invariants, {}, start.parent))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_ppo_from_the_model_itself_takes_its_reward_models_policy(tiny_model, ppo_args, reward_run, tmp_path, capsys):
    changed = shutil.copytree(reward_run, tmp_path / "rm")
    run = json.loads((changed / "run.json").read_text())
    invariants = common.TrainInvariants(**{**run["invariants"], "quantization": "qlora",
                                           "target_modules": tuple(run["invariants"]["target_modules"])})
    edit_json(changed / "run.json", invariants=dataclasses.asdict(invariants), train_invariants=invariants.hash)
    settings = {**ppo_args, "model": tiny_model, "updates": 1, "reward_adapter": str(changed),
                "out": str(tmp_path / "ppo")}
    with pytest.raises(SystemExit):
        ppo.main(ppo.Args(**settings))
    assert "quantisation qlora / none" in capsys.readouterr().err
    ppo.main(ppo.Args(**{**settings, "sft_adapter": "none"}))
    assert finished(tmp_path / "ppo")[0]["train_invariants"] == invariants.hash


# -- a plain PEFT adapter

KINDS = {
    "another scale": {"lora_alpha": 32},
    "rslora": {"use_rslora": True},
    "ranks of their own": {"rank_pattern": {"q_proj": 7, r"layers\.1\.self_attn\.v_proj": 2},
                           "alpha_pattern": {"v_proj": 3}},
    "rslora with ranks of their own": {"use_rslora": True, "rank_pattern": {"v_proj": 9}},
    "all seven": {"target_modules": list(common.TARGET_MODULES)},
    "one layer's": {"target_modules": r"model\.layers\.1\.mlp\.(up|down)_proj"},
    "dropout": {"lora_dropout": 0.1, "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_adapter_is_merged_and_composed(tiny_model, tmp_path, kind):
    """Merged it gives PEFT's logits; with a fresh LoRA on top, the saved sum loads in plain PEFT as the policy."""
    directory = write_adapter(tiny_model, tmp_path / "adapter", **KINDS[kind])
    start = inputs.read_start(directory, tiny_model)
    assert start.parent["method"] == "peft" and start.adapter == Path(directory)
    expected = logits(PeftModel.from_pretrained(plain_base(tiny_model), directory))
    assert (expected - logits(plain_base(tiny_model))).abs().max() > 1e-2
    merged = common.load_model(tiny_model, directory, dtype=torch.float32)
    assert torch.allclose(logits(merged), expected, atol=1e-5)

    policy = randomise(common.add_lora(merged), seed=2)
    digest = common.save_policy(policy, directory, tmp_path / "sum", start.tokenizer, tiny_model)
    assert digest == common.tensors_sha256([tmp_path / "sum" / "adapter_model.safetensors"])
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    rank = max(len(t) for name, t in load_file(f"{directory}/adapter_model.safetensors").items() if "lora_A" in name)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank + 16, 2 * (rank + 16), False)
    reloaded = PeftModel.from_pretrained(plain_base(tiny_model), tmp_path / "sum")
    assert torch.allclose(logits(reloaded), logits(policy), atol=1e-5)


REFUSED = {
    "use_dora": True, "init_lora_weights": "pissa", "bias": "all", "lora_bias": True, "modules_to_save": ["lm_head"],
    "layers_to_transform": [0], "trainable_token_indices": [1], "fan_in_fan_out": True, "target_parameters": ["w"],
    "layer_replication": [[0, 1]], "alora_invocation_tokens": [1], "use_qalora": True, "peft_type": "VERA",
    "a_field_of_next_year": {"x": 1}, "exclude_modules": ["q_proj"], "task_type": "SEQ_CLS",
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_its_field(tiny_model, adapter, capsys, field):
    edit_json(adapter / "adapter_config.json", **{field: REFUSED[field]})
    with pytest.raises(SystemExit) as stop:
        inputs.read_start(str(adapter), tiny_model)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and field in error and str(adapter) in error and len(error.strip().splitlines()) == 1


def break_tensors(adapter, change):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
BROKEN = {  # what is wrong -> (how it comes about, what the error says)
    "a pickle": (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), ".bin is not read"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "half a pair": (lambda d: break_tensors(d, lambda t: t.pop(FIRST + "B.weight")), FIRST),
    "a magnitude": (lambda d: break_tensors(d, lambda t: t.update({FIRST + "magnitude": torch.ones(3)})), "magnitude"),
    "a saved head": (lambda d: break_tensors(d, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3)})),
                     "lm_head"),
    "another module": (lambda d: break_tensors(d, lambda t: t.update(
        {n.replace("q_proj", "router"): t.pop(n) for n in [FIRST + "A.weight", FIRST + "B.weight"]})),
        "model.layers.0.self_attn.router"),
    "another shape": (lambda d: break_tensors(d, lambda t: t.update({FIRST + "A.weight": torch.ones(4, 48)})),
                      "(64, 48)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plain_adapter_is_refused(tiny_model, adapter, capsys, fault):
    change, part = BROKEN[fault]
    change(adapter)
    with pytest.raises(SystemExit) as stop:
        inputs.read_start(str(adapter), tiny_model)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and part in error and len(error.strip().splitlines()) == 1


def test_a_plain_adapter_names_its_base(tiny_model, adapter, tmp_path, capsys):
    """Its base's name is compared with --model; another name needs the flag; with no name, --model is needed."""
    config = adapter / "adapter_config.json"
    assert inputs.read_start(str(adapter)).model == tiny_model
    copy = str(shutil.copytree(tiny_model, tmp_path / Path(tiny_model).name))
    assert inputs.read_start(str(adapter), copy).model == copy  # a directory of that name
    other = str(shutil.copytree(tiny_model, tmp_path / "other"))
    for named, parts in ((tiny_model, ("other", "--other-base")), ("org/other2", ("org/other2", "--other-base"))):
        edit_json(config, base_model_name_or_path=named)
        with pytest.raises(SystemExit):
            inputs.read_start(str(adapter), other)
        error = capsys.readouterr().err
        assert all(part in error for part in parts)
        assert inputs.read_start(str(adapter), other, other_base=True).model == other
    edit_json(config, base_model_name_or_path=None)
    assert inputs.read_start(str(adapter), other).model == other
    with pytest.raises(SystemExit):
        inputs.read_start(str(adapter))
    assert "names no base model; give it with --model" in capsys.readouterr().err


def test_an_adapter_is_known_by_its_content(tiny_model, adapter, tmp_path):
    """The scale is part of it; the place, the name of the base and the order of the file are not."""
    record, _ = common.read_policy(str(adapter))
    moved = shutil.copytree(adapter, tmp_path / "moved")
    edit_json(moved / "adapter_config.json", base_model_name_or_path="elsewhere", peft_version="0.1")
    again, _ = common.read_policy(str(moved))
    edit_json(moved / "adapter_config.json", lora_alpha=16)
    scaled, _ = common.read_policy(str(moved))
    assert record["config_hash"] == again["config_hash"] != scaled["config_hash"]
    weights = common.tensors_sha256([adapter / "adapter_model.safetensors"])
    assert record["adapter_sha256"] == scaled["adapter_sha256"] == weights


def test_dpo_from_a_plain_adapter_and_again(tiny_model, adapter, dpo_args, tmp_path, capsys):
    settings = {**dpo_args, "rows": 16, "sft_adapter": str(adapter), "out": str(tmp_path / "dpo")}
    dpo.main(dpo.Args(**settings))
    run, config = finished(tmp_path / "dpo")
    assert run["parent"]["method"] == "peft" and run["parent"]["name"] == "adapter" and run["model"] == tiny_model
    assert run["parent"]["adapter_sha256"] == common.tensors_sha256([adapter / "adapter_model.safetensors"])
    assert (config["r"], config["lora_alpha"]) == (4 + 16, 40)
    merged = logits(PeftModel.from_pretrained(plain_base(tiny_model), adapter))
    moved = (logits(PeftModel.from_pretrained(plain_base(tiny_model), tmp_path / "dpo")) - merged).abs().max()
    assert 0 < moved < 0.5
    with pytest.raises(SystemExit) as stop:  # finished
        dpo.main(dpo.Args(**settings))
    assert stop.value.code == 0
    break_tensors(adapter, lambda t: t.update({FIRST + "A.weight": t[FIRST + "A.weight"] + 1}))
    with pytest.raises(SystemExit) as stop:
        dpo.main(dpo.Args(**settings))
    assert stop.value.code == 2 and "they differ in parent" in capsys.readouterr().err
    # a method on top of it, and a run that goes on from a run whose parent is a plain adapter
    start = inputs.read_start(settings["out"])
    assert start.parent["config_hash"] == run["config_hash"]


def test_sft_goes_on_from_a_plain_adapter(tiny_model, adapter, sft_args, tmp_path):
    sft.main(sft.Args(**{**sft_args, "rows": 8, "sft_adapter": str(adapter), "out": str(tmp_path / "sft")}))
    run, config = finished(tmp_path / "sft")
    assert run["parent"]["name"] == "adapter" and config["r"] == 20
    assert abs(run["metrics"]["kl_merge"]) < 1e-5


def test_a_plain_adapter_with_another_template_is_said(tiny_model, adapter, capsys):
    """Trained with its template, it would be continued with ours without a word."""
    (adapter / "chat_template.jinja").write_text(chat.load_tokenizer(tiny_model).chat_template)
    inputs.read_start(str(adapter), tiny_model)
    assert "chat template" not in capsys.readouterr().out
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    inputs.read_start(str(adapter), tiny_model)
    assert f"{adapter} brings a chat template that differs" in capsys.readouterr().out


def test_an_unfinished_run_is_no_plain_adapter(adapter, capsys):
    (adapter / "checkpoint").mkdir()
    with pytest.raises(SystemExit):
        common.read_policy(str(adapter))
    assert "its run has not finished" in capsys.readouterr().err


def test_an_adapter_of_the_hub(tiny_model, adapter, tmp_path, monkeypatch, capsys):
    """org/name is a hub id unless it reads as a directory here; runs/… never is one."""
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "cache" / "models--org--name" / "snapshots" / ("a" * 40)
    shutil.copytree(adapter, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    start = inputs.read_start("org/name", tiny_model)
    assert start.adapter == snapshot and start.parent["name"] == "name"
    assert start.parent["config_hash"] == common.read_policy(str(adapter))[0]["config_hash"]
    for name, part in (("org/other", "can't get the adapter org/other from the hub"),
                       ("runs/sft_v2", "is not a trained adapter"), ("cache/other", "is not a trained adapter")):
        with pytest.raises(SystemExit):
            inputs.read_start(name, tiny_model)
        assert part in capsys.readouterr().err


# -- the dtype

def test_auto_is_bfloat16_where_the_device_computes_it(monkeypatch, capsys):
    """What "auto" means enters config_hash and run.json, never the word itself."""
    invariants = common.TrainInvariants("org/base", "abc", "0" * 64, "", "none")
    hashes = {dtype: common.config_hash("dpo", dpo.Args(dtype=dtype), invariants, {}, None)
              for dtype in ("bfloat16", "float32")}
    for native, resolved in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(common, "computes_bfloat16", lambda kind, native=native: native)
        args = dpo.Args(device="cpu")
        assert common.config_hash("dpo", args, invariants, {}, None) == hashes[resolved]
        assert common.resolved_args(args) == {**dataclasses.asdict(args), "dtype": resolved}
        assert common.setup_dtype("auto", torch.device("cpu")) == getattr(torch, resolved)
        assert ("does not compute bfloat16 natively" in capsys.readouterr().out) == (not native)
        assert common.setup_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16 and not capsys.readouterr().out


@pytest.mark.parametrize("names, native", [({"avx512_bf16": True, "avx2": True}, True), ({"amx_bf16": True}, True),
                                           ({"avx512_f": True, "avx512_bf16": False}, False), ({}, False)])
def test_bfloat16_is_a_capability_of_the_cpu(monkeypatch, names, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: names)
    assert common.computes_bfloat16("cpu") == native and not common.computes_bfloat16("mps")


@pytest.mark.parametrize("capability, native", [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_is_native_from_ampere_on(monkeypatch, capability, native):
    """V100 and T4 emulate it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert common.computes_bfloat16("cuda") == native


def test_nf4_is_checked_before_the_gpu_is_known():
    """Where commands share GPUs (turns.py), the device is "cuda" until one is free: no GPU is used before."""
    common.check_nf4(torch.device("cuda"))
    assert not torch.cuda.is_initialized()


def test_adapters_are_loaded_where_their_model_is(sft_args, sft_run, reward_run, monkeypatch):
    """PEFT would take the first GPU, whichever a command has."""
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda")  # there is none here
    policy = common.attach_adapter(common.load_model(sft_args["model"]), sft_run)
    scorers = common.load_scorers(sft_args["model"], {"reward": reward_run, "watch": reward_run})
    assert all(p.device.type == "cpu" for model in (policy, scorers) for p in model.parameters())


def test_mps_has_no_nf4(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        common.check_nf4(common.setup_device("mps"))
    assert "--device mps has no NF4; use --quantization none" in capsys.readouterr().err
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        common.setup_device("mps")
    assert "no Apple GPU" in capsys.readouterr().err


# -- written for other tools

def test_a_merged_model_loads_alone(tiny_model, dpo_run, tmp_path, capsys):
    """tools/merge.py writes the weights that PEFT merges, rounded once, and prints the size of the rounding."""
    expected = PeftModel.from_pretrained(plain_base(tiny_model), dpo_run).merge_and_unload()
    base = {name: p for name, p in plain_base(tiny_model).named_parameters()}
    for dtype in ("float32", "bfloat16"):
        merge.main(merge.Args(dpo_run, str(tmp_path / dtype), dtype=dtype))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
        assert model.dtype == getattr(torch, dtype) and model.config.use_cache
        assert (tmp_path / dtype / "model.safetensors").stat().st_mode & 0o044
        rounding = update = 0.0
        for name, p in model.named_parameters():
            exact = dict(expected.named_parameters())[name].detach()
            bound = 1e-6 + (dtype == "bfloat16") * 2**-7 * exact.abs()
            assert ((p.float() - exact.to(p.dtype).float()).abs() <= bound).all()
            assert (p == exact.to(p.dtype)).float().mean() > 0.99 or dtype == "float32"
            if any(target in name for target in common.TARGET_MODULES):
                rounding += (exact.to(p.dtype).double() - exact.double()).square().sum().item()
                update += (exact - base[name]).double().square().sum().item()
        printed = capsys.readouterr().out
        assert f"{(rounding / update) ** 0.5:.1%}" in printed and ("0.0%" in printed) == (dtype == "float32")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "float32")
    assert torch.allclose(logits(alone), logits(expected), atol=1e-5)
    with pytest.raises(SystemExit):
        merge.main(merge.Args(dpo_run, str(tmp_path / "float32")))
    assert "exists and is not an empty directory" in capsys.readouterr().err


def test_a_merged_model_is_a_model_like_any_other(tiny_model, dpo_run, sft_args, tmp_path):
    merge.main(merge.Args(dpo_run, str(tmp_path / "merged"), dtype="float32"))
    start, before = inputs.read_start("none", str(tmp_path / "merged")), inputs.read_start(dpo_run)
    assert start.tokenizer.chat_template == before.tokenizer.chat_template
    assert start.invariants.weights_sha256 != before.invariants.weights_sha256
    assert torch.allclose(logits(common.load_model(start.model_dir, dtype=torch.float32)),
                          logits(common.load_model(tiny_model, dpo_run, dtype=torch.float32)), atol=1e-5)


def test_a_saved_tokenizer_is_read_by_older_versions(sft_run, tiny_model):
    """No class and no field that transformers 4.57 doesn't know; read back, it is the same tokenizer."""
    config = json.loads((Path(sft_run) / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(config.get("extra_special_tokens"), list)
    assert not {"is_local", "local_files_only"} & config.keys()
    ours, base = (AutoTokenizer.from_pretrained(d) for d in (sft_run, tiny_model))
    text = "why is <|im_start|>the sky<|im_end|> blue<|endoftext|>"
    assert ours(text)["input_ids"] == base(text)["input_ids"] and ours.all_special_ids == base.all_special_ids
    assert (ours.eos_token, ours.bos_token, ours.pad_token) == (base.eos_token, base.bos_token, base.pad_token)
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    assert ours.apply_chat_template(turns, tokenize=False) == base.apply_chat_template(turns, tokenize=False)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("config, fields", [
    (LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 100000.0}), {"rope_theta": 100000.0}),
    (LlamaConfig(rope_parameters={"rope_theta": 5000.0, **LLAMA3}), {"rope_theta": 5000.0, "rope_scaling": LLAMA3}),
    (Qwen2Config(rope_parameters={"rope_theta": 5000.0, **YARN}), {"rope_theta": 5000.0, "rope_scaling": YARN}),
    (Gemma3TextConfig(), {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}),
], ids=["default", "llama3", "yarn", "gemma3"])
def test_rotary_positions_are_written_in_both_layouts(config, fields, tmp_path):
    """As transformers 4.57 reads them, at top level, and as 5 does; 5 reads both together as it read its own."""
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert common.old_rope_fields(written) == fields
    common.write_json(tmp_path / "config.json", written | fields)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
