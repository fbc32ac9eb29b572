"""One case of TRL or Unsloth, in a process of its own: prints a line "RESULT {…}" after each step, each from more steps.

    python bench/peer.py WORKLOAD WORK SETTINGS STEPS WARM COMPLETION_TOKENS        (train.py calls it)

WORK is what workload.make wrote; SETTINGS is a JSON object of fields of the trainer's config that override TRL's
defaults; with "unsloth": true among them Unsloth loads the model and patches the trainer. Every case has 16 rows per
step, bfloat16, LoRA r = 16 on all linear layers without dropout, no saving and no reports.
"""
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

warnings.filterwarnings("ignore")

ROWS, PAIRS = 16, ("dpo", "reward")
FAST = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
# The first entry is TRL's default (8 rows a device, checkpointing); the others are tried for its best.
SETTINGS = {
    "sft-bf16": [{}, FAST, {**FAST, "use_liger_kernel": True}, {**FAST, "use_liger_kernel": True, "padding_free": True}],
    "sft-nf4": [{}, FAST, {**FAST, "use_liger_kernel": True}],
    "dpo": [{}, FAST, {**FAST, "use_liger_kernel": True}, {**FAST, "use_liger_kernel": True, "padding_free": True}],
    "reward": [{}, FAST, {**FAST, "use_liger_kernel": True}],
    "kto": [{}, FAST, {**FAST, "use_liger_kernel": True}],
    "grpo-step": [{}, {"per_device_train_batch_size": 16, "gradient_checkpointing": False},
                  {"per_device_train_batch_size": 32, "gradient_checkpointing": False, "use_liger_kernel": True,
                   "cache_implementation": "static"}],
}
UNSLOTH = {case: [{"unsloth": True, **FAST}] for case in ("sft-bf16", "sft-nf4", "dpo", "grpo-step")}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(case: str, work: Path, settings: dict, steps: int, warm: int, completion_tokens: int) -> None:
    unsloth = settings.pop("unsloth", False)
    if unsloth:  # it patches the others: before they are imported
        os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp()}
        from unsloth import FastLanguageModel
    import transformers
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig
    transformers.logging.set_verbosity_error()
    cuda = torch.cuda.is_available()
    sizes = json.loads((work / "sizes.json").read_text())
    kind = case.split("-")[0]
    on_policy = kind == "grpo"
    batch = 64 if on_policy else ROWS
    lengths = [] if on_policy else sizes[kind]["lengths"][:steps * ROWS * (2 if kind in PAIRS else 1)]  # both of a pair's

    class Timer(transformers.TrainerCallback):
        """Prints what was measured, after each step that counts, and with the gradient's norm after the last."""
        rollout, sampled, metrics = 0.0, 0, {}  # seconds, and tokens of completions, since the last step that doesn't count

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == warm:
                torch.cuda.synchronize() if cuda else None
                self.began, self.rollout, self.sampled = time.time(), 0.0, 0

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize() if cuda else None
            n = state.global_step - warm
            if n > 0:
                taken = (time.time() - self.began) / n
                a_step = self.sampled / n if on_policy else sum(lengths) / steps
                self.metrics = {"tokens_per_s": round(a_step / taken), "ms_per_step": round(taken * 1e3, 1), "steps": n,
                                "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if cuda else None}
                if on_policy:
                    self.metrics |= {"completion_tokens": round(a_step / batch), "rollout_s": round(self.rollout / n, 3),
                                     "update_s": round(taken - self.rollout / n, 3)}
                print("RESULT " + json.dumps(self.metrics), flush=True)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.metrics and "grad_norm" in (logs or {}):
                print("RESULT " + json.dumps(self.metrics | {"grad_norm": round(float(logs["grad_norm"]), 4)}), flush=True)

    defaults = {"per_device_train_batch_size": 8, "max_steps": steps, "bf16": cuda, "use_cpu": not cuda, "seed": 42,
                "save_strategy": "no", "report_to": [], "logging_steps": steps, "disable_tqdm": True,
                "output_dir": tempfile.mkdtemp(), "gradient_accumulation_steps": None}
    config = {**defaults, **settings}
    config["gradient_accumulation_steps"] = batch // config["per_device_train_batch_size"]
    load = {"dtype": torch.bfloat16 if cuda else torch.float32, "attn_implementation": "sdpa"}
    if case.endswith("nf4"):
        load |= {"device_map": {"": "cuda" if cuda else "cpu"}, "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16)}
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=MODULES,
                      task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
    if unsloth:  # checkpointing as its own function is told, not the trainer
        model, _ = FastLanguageModel.from_pretrained(str(work / "model"), max_seq_length=1024, dtype=load["dtype"],
                                                     load_in_4bit=case.endswith("nf4"))
        model = FastLanguageModel.get_peft_model(
            model, r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout, target_modules=MODULES,
            use_gradient_checkpointing=config["gradient_checkpointing"])
        lora = None
    elif kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(work / "model", num_labels=1, **load)
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model = AutoModelForCausalLM.from_pretrained(work / "model", **load)
    if kind == "sft":
        rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows_of(work / "sft.jsonl")]
    else:
        rows = rows_of(work / {"kto": "labels.jsonl", "grpo": "prompts.jsonl"}.get(kind, "pairs.jsonl"))
    rows, more, timer = rows[:steps * ROWS], {}, Timer()  # as many as it trains on: it tokenises all that it is given
    if on_policy:
        rows = [{"prompt": row["prompt"]} for row in rows]
        config |= {"num_generations": 8, "max_completion_length": completion_tokens, "temperature": 1.0, "beta": 0.04}
        more["reward_funcs"] = [lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))]]
    else:
        config["max_length"] = None if kind == "sft" and settings.get("padding_free") else 1024  # no text is longer
    trainer_of, config_of = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig),
                             "reward": (trl.RewardTrainer, trl.RewardConfig), "kto": (trl.KTOTrainer, trl.KTOConfig),
                             "grpo": (trl.GRPOTrainer, trl.GRPOConfig)}[kind]
    trainer = trainer_of(model=model, args=config_of(**config), train_dataset=Dataset.from_list(rows), peft_config=lora,
                         processing_class=tokenizer, callbacks=[timer], **more)
    if on_policy:  # sampling is a part of the step: time it apart
        generate = trainer._generate

        def timed(*args, **kwargs):
            torch.cuda.synchronize() if cuda else None
            began = time.time()
            generated = generate(*args, **kwargs)
            torch.cuda.synchronize() if cuda else None
            timer.rollout += time.time() - began
            timer.sampled += sum(map(len, generated[1]))
            return generated
        trainer._generate = timed
    trainer.train()


if __name__ == "__main__":
    _, case, work, settings, *numbers = sys.argv
    main(case, Path(work), json.loads(settings), *map(int, numbers))
