"""A run directory is what other programs expect: vLLM's LoRA loader, lm-eval's hf model with peft=, transformers and TRL."""
import json
import re
from pathlib import Path

import lm_eval
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import common
import evaluate
import reward
from test_evaluate import args, main, make_adapter, make_tokenizer, no_nltk_data, place  # noqa: F401, fixtures too
from test_evaluate import make_model as make_eval_model

# What vLLM's loader asks of a LoRA directory (vllm/lora/peft_helper.py, lora_model.py and utils.py of vllm-project/vllm):
#   1. adapter_config.json has r, lora_alpha and target_modules; modules_to_save is None, use_dora false, bias "none", and
#      r is at most --max-lora-rank, which is one of 8, 16, 32, 64, 128, 256, 320, 512;
#   2. each name in adapter_model.safetensors is [base_model.model.]<module>.lora_A.weight or .lora_B.weight
#      (parse_fine_tuned_lora_name; others raise "unsupported LoRA weight");
#   3. the module's last part is a linear layer of vLLM's model, packed ones by their parts: for llama and qwen2 qkv_proj
#      is q_proj, k_proj, v_proj, gate_up_proj is gate_proj, up_proj, beside o_proj and down_proj;
#   4. A is [r, in], B is [out, r], and B is multiplied by lora_alpha / r (sqrt(r) with use_rslora).
VLLM_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def load_as_vllm(directory):
    """{module: what is added to its weight} by these rules."""
    config = json.loads((directory / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert not config["modules_to_save"] and not config.get("use_dora") and config["bias"] == "none"
    assert config["r"] in (8, 16, 32, 64) and not config.get("rank_pattern") and not config.get("alpha_pattern")
    sides = {"A": {}, "B": {}}
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        module, side = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name).groups()
        assert module.rsplit(".", 1)[-1] in VLLM_LINEAR and tensor.shape[side == "B"] == config["r"]
        sides[side][module] = tensor
    assert sides["A"].keys() == sides["B"].keys()
    return {name: config["lora_alpha"] / config["r"] * (b @ sides["A"][name]) for name, b in sides["B"].items()}


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "ppo", "grpo"])
def test_every_policy_is_in_vllms_layout(name, request, tiny_model):
    """Applied by vLLM's rules, the directory gives plain PEFT's logits."""
    directory = Path(request.getfixturevalue(f"{name}_run"))
    base, ids = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval(), torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        before = base(ids).logits
        deltas = load_as_vllm(directory)
        for module, delta in deltas.items():
            base.get_submodule(module).weight += delta
        served = base(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        expected = PeftModel.from_pretrained(plain, directory).eval()(ids).logits
    assert torch.allclose(served, expected, atol=1e-5) and not torch.allclose(served, before, atol=1e-3)
    assert len(deltas) == 2 * len(VLLM_LINEAR)


def test_lm_evals_hf_model_gives_evaluates_metrics(place, tmp_path):  # noqa: F811
    """What `lm_eval --model hf --model_args pretrained=…,peft=runs/…` calls, on the same items: the same scores.

    With peft= lm-eval cuts the embedding to the tokenizer's length, so that rows which pad it, as Qwen2.5's last 271, are
    no longer in the softmax; this model has none.
    """
    model, tokenizer, adapter = make_eval_model(), make_tokenizer(False), tmp_path / "tiny"
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    make_adapter(adapter, tmp_path / "model")
    ours = args(place, tmp_path / "results", model=str(tmp_path / "model"), adapter=str(adapter))
    row = main(ours)
    folder = tmp_path / "tasks"
    folder.mkdir()
    manager, tasks, _ = evaluate.load_tasks(ours, folder)
    for task, shots, limit in tasks:
        generates = task in ("gsm8k", "ifeval")
        theirs = lm_eval.simple_evaluate(
            model="hf", model_args=f"pretrained={tmp_path / 'model'},peft={adapter},dtype=float32", tasks=[task],
            num_fewshot=shots, limit=limit, batch_size=1, device="cpu", task_manager=manager, bootstrap_iters=0,
            gen_kwargs={"max_gen_toks": 8} if generates else None)
        compared = 0
        for name, values in theirs["results"].items():
            for key, value in values.items():
                if "," in key and "stderr" not in key:
                    assert row["metrics"][f"{name}/{key}"] == pytest.approx(value, abs=1e-4), f"{name}/{key}"
                    compared += 1
        assert compared >= 1, task


@torch.no_grad()
def scores_by(model, sequences):
    return [model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]


def test_a_reward_model_loads_as_a_sequence_classifier(tiny_model, reward_run, sft_run, data_dir, tmp_path):
    """By transformers from the run directory alone, and by TRL's GRPOTrainer, which is given the path: our scores.

    Here pad == eos, and transformers pools before the last pad tokens, the EOS among them: so without a pad id, one text at
    a time, or with another token as pad.
    """
    tokenizer = AutoTokenizer.from_pretrained(reward_run)
    sequences = []
    for line in (data_dir / "preference_heldout.jsonl").read_text().splitlines()[:6]:
        row = json.loads(line)
        ids = tokenizer.apply_chat_template(row["prompt"] + row["chosen"])["input_ids"]
        sequences.append(ids[:len(ids) - ids[::-1].index(tokenizer.eos_token_id)])  # through the EOS
    ours = common.score_examples(common.load_reward(tiny_model, reward_run, dtype=torch.float32),
                                 [reward.at_eos(ids) for ids in sequences], 4096).tolist()
    plain = AutoModelForSequenceClassification.from_pretrained(reward_run, num_labels=1, dtype=torch.float32).eval()
    trainer = GRPOTrainer(
        model=tiny_model, reward_funcs=reward_run, train_dataset=Dataset.from_list([{"prompt": "why"}] * 8),
        args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2,
                        num_generations=2, bf16=False))
    for model in (plain, trainer.reward_funcs[0].float().eval()):
        model.config.pad_token_id = None
        assert scores_by(model, sequences) == pytest.approx(ours, abs=1e-4)
        model.config.pad_token_id = other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        longest = max(map(len, sequences))
        padded = torch.tensor([ids + [other] * (longest - len(ids)) for ids in sequences])
        with torch.no_grad():
            together = model(input_ids=padded, attention_mask=(padded != other).long()).logits[:, 0]
            assert together.tolist() == pytest.approx(ours, abs=1e-4)
            model.config.pad_token_id = tokenizer.eos_token_id
            assert scores_by(model, sequences) != pytest.approx(ours, abs=1e-3)
    assert max(ours) - min(ours) > 1e-3
