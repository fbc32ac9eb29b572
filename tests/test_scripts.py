"""sft.main and dpo.main run real steps on a tiny random model: what they write, what they learn, what they repeat."""
import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat
import common
import inputs
import dpo
import sft
from conftest import WORDS, part_of, write_jsonl


def record(run):
    return json.loads((Path(run) / "run.json").read_text())


def log(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def adapter(run):
    return (Path(run) / "adapter_model.safetensors").read_bytes()


def train(script, out, **args):
    script.main(script.Args(**args, out=str(out)))
    return str(out)


@pytest.fixture(params=["sft", "dpo"])
def run(request):
    """(script, a finished run, its arguments)."""
    if request.param == "sft":
        return sft, request.getfixturevalue("sft_run"), request.getfixturevalue("sft_args")
    args = {**request.getfixturevalue("dpo_args"), "sft_adapter": request.getfixturevalue("sft_run")}
    return dpo, request.getfixturevalue("dpo_run"), args


# -- what is written ------------------------------------------------------------------------------

def test_run_directory(run):
    """A plain PEFT directory, the record, the log, the curves and the card; no checkpoint, no temporary file."""
    _, directory, _ = run
    assert {p.name for p in Path(directory).iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "run.json", "log.jsonl", "curves.png", "README.md", "prompts.json"}


def test_tokenizer_and_template_are_the_models(run, tiny_model):
    _, directory, _ = run
    ours, theirs = (AutoTokenizer.from_pretrained(d) for d in (directory, tiny_model))
    messages = [{"role": "user", "content": "why rain"}, {"role": "assistant", "content": "sky"}]
    assert ours.apply_chat_template(messages)["input_ids"] == theirs.apply_chat_template(messages)["input_ids"]
    assert ours.eos_token_id == theirs.eos_token_id is not None


def tensors_hash(file):
    """sha256 over (name|dtype|shape|bytes) of the tensors in order of name, from the tensors and not from the file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        assert tensor.dtype == torch.float32
        digest.update(f"{name}|F32|{list(tensor.shape)}|".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_record(run, tiny_model, sft_run, dpo_args, data_dir):
    script, directory, args = run
    found = record(directory)
    assert found.keys() == {
        "method", "name", "model", "config_hash", "train_invariants", "invariants", "family", "seed", "parent", "data",
        "data_sources", "description",
        "weights_sha256", "args", "command", "template", "adapter_sha256", "metrics", "wall_time_s", "versions", "git_commit",
        "hardware"}
    assert (found["method"], found["name"]) == (script.__name__, Path(directory).name)
    assert found["model"] == tiny_model and found["seed"] == 42
    assert all(re.fullmatch("[0-9a-f]{8}", found[k]) for k in ("config_hash", "train_invariants", "family"))
    assert len({found[k] for k in ("config_hash", "train_invariants", "family")}) == 3
    assert found["args"].items() >= args.items() and found["args"]["out"] == directory
    assert found["args"].keys() == script.Args.__dataclass_fields__.keys()
    assert found["weights_sha256"] == tensors_hash(Path(tiny_model) / "model.safetensors")
    assert found["adapter_sha256"] == tensors_hash(Path(directory) / "adapter_model.safetensors")
    name = Path(args["data"]).stem
    assert found["data"] == {key: "sha256:" + hashlib.sha256((data_dir / f"{file}.jsonl").read_bytes()).hexdigest()
                             for key, file in (("train", name), ("heldout", name + "_heldout"))}
    assert found["wall_time_s"] > 0
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # PyPI's is +cu130 inside
    assert found["hardware"]["gpus"] == 0
    parent = record(sft_run)
    assert found["parent"] == (None if script is sft else {k: parent[k] for k in (
        "name", "method", "config_hash", "adapter_sha256", "family")})
    assert found["train_invariants"] == parent["train_invariants"]  # rows of one table


def test_log_has_one_line_a_step(run):
    script, directory, _ = run
    lines = log(directory)
    assert [line["step"] for line in lines] == list(range(5 if script is sft else 3))
    keys = {"step", "loss", "accuracy", "grad_norm", "lr", "tokens", "tokens_per_s", "seconds"}
    keys |= {"trained_tokens"} if script is sft else {"margin", "rewards_chosen", "rewards_rejected", "logprobs_chosen",
                                                     "logprobs_rejected", "chosen_tokens", "rejected_tokens"}
    for line in lines:
        assert line.keys() == keys
        assert all(math.isfinite(v) for v in line.values())
        assert line["lr"] > 0 and line["grad_norm"] > 0 and 0 <= line["accuracy"] <= 1
        if script is dpo:
            assert line["logprobs_chosen"] < 0 and line["logprobs_rejected"] < 0
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    if script is sft:  # every row once: the log's counts are those of the preflight
        metrics = record(directory)["metrics"]
        for key in ("tokens", "trained_tokens"):
            assert sum(line[key] for line in lines) == metrics[key]


def test_curves_are_a_picture(run):
    _, directory, _ = run
    with Image.open(Path(directory) / "curves.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 200
        assert len(picture.convert("L").getcolors()) > 10  # something is drawn


def test_adapter_shape(run):
    """SFT has r = 16; DPO is the sum of SFT's and its own, r = 32, with the SFT's factors as its first half."""
    script, directory, args = run
    config = json.loads((Path(directory) / "adapter_config.json").read_text())
    r = 16 if script is sft else 32
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (r, 2 * r, 0.0, "none")
    assert sorted(config["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    tensors = load_file(Path(directory) / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2  # A and B, seven projections, two layers
    first = directory if script is sft else args["sft_adapter"]
    parent = load_file(Path(first) / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        side = 0 if name.endswith("lora_A.weight") else 1
        assert tensor.shape[side] == r
        assert torch.equal(tensor.narrow(side, 0, 16), parent[name])
        assert tensor.narrow(side, r - 16, 16).abs().max() > 0  # the last half was trained


# -- what is learned ------------------------------------------------------------------------------

def test_dpo_begins_at_the_reference(dpo_run):
    first = log(dpo_run)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["margin"], first["rewards_chosen"], first["rewards_rejected"], first["accuracy"]) == (0, 0, 0, 0.5)


def test_dpo_learns_the_preference(dpo_run):
    """Chosen answers end in "yes", rejected ones in "no": three steps are enough to tell them apart."""
    lines, metrics = log(dpo_run), record(dpo_run)["metrics"]
    assert lines[0]["loss"] > lines[1]["loss"] > lines[2]["loss"] and lines[2]["margin"] > 0.1
    assert metrics["heldout_pairs"] == 8 and metrics["heldout_accuracy"] >= 0.875
    assert metrics["heldout_loss"] < 0.65 and metrics["heldout_margin"] > 0.1
    assert 0 <= metrics["eos_rate"] <= 1 and abs(metrics["kl_merge"]) < 1e-5


@pytest.fixture(scope="module")
def toy(tiny_model, tmp_path_factory):
    """A task that can be learned: two words are answered by the first of them. (arguments, run)"""
    directory = tmp_path_factory.mktemp("toy")
    for name, n, shift in (("x", 96, 0), ("x_heldout", 16, 3)):
        write_jsonl(directory / f"{name}.jsonl", [{"messages": [
            {"role": "user", "content": f"{('sky', 'rain')[i % 2]} {WORDS[i % 30]} {WORDS[(7 * i + shift) % 30]}"},
            {"role": "assistant", "content": ("blue blue", "it rains")[i % 2]}]} for i in range(n)])
    args = dict(model=tiny_model, quantization="none", dtype="float32", data=str(directory / "x.jsonl"), rows=96,
                heldout_rows=16, max_length=64, batch_size=8, epochs=5, lr=1e-2, eos_prompts=16, eos_tokens=16,
                micro_tokens=1024, device="cpu")
    return directory, train(sft, directory / "run", **args)


def test_sft_learns_to_answer_and_to_stop(toy):
    _, directory = toy
    lines, metrics = log(directory), record(directory)["metrics"]
    assert len(lines) == 60
    assert lines[0]["loss"] > 5 and lines[-1]["loss"] < 1.5 and lines[-1]["accuracy"] > 0.95
    assert metrics["heldout_loss_base"] > 5 and metrics["heldout_loss"] < 1.5
    assert metrics["eos_rate"] > 0.9


@torch.no_grad()
def greedy(policy, tokenizer, text, n):
    """The likeliest continuation of a text, token by token, up to n tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + n and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        ids = ids + [policy(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return tokenizer.decode(ids[start:])


def test_the_card_loads_the_policy(toy):
    """The run's README has a python snippet that gives the policy; by plain PEFT it answers as it was taught."""
    directory, out = toy
    (snippet,) = re.findall(r"```python\n(.*?)```", (Path(out) / "README.md").read_text(), re.S)
    names = {}
    exec(snippet, names)
    policy, tokenizer = names["policy"], AutoTokenizer.from_pretrained(out)
    assert isinstance(policy, PeftModel)
    rows = [json.loads(line)["messages"] for line in (directory / "x_heldout.jsonl").read_text().splitlines()]
    right = 0
    for user, answer in rows[:8]:
        prompt = f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
        right += greedy(policy.float().eval(), tokenizer, prompt, 8) == answer["content"] + "<|im_end|>"
    assert right >= 7


def test_a_model_directory_with_an_at_sign(sft_args, tiny_model, tmp_path):
    """`@` names a revision of a hub id; in the name of a directory it is a character."""
    model = shutil.copytree(tiny_model, tmp_path / "tiny@v1")
    out = train(sft, tmp_path / "run", **{**sft_args, "model": str(model)})
    (snippet,) = re.findall(r"```python\n(.*?)```", (Path(out) / "README.md").read_text(), re.S)
    names = {}
    exec(snippet, names)
    assert isinstance(names["policy"], PeftModel)
    config = json.loads((Path(out) / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(model), None)


def test_sft_loss_falls(sft_run):
    lines, metrics = log(sft_run), record(sft_run)["metrics"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert metrics["heldout_loss"] < metrics["heldout_loss_base"] - 0.3
    assert metrics["heldout_loss_base"] == pytest.approx(lines[0]["loss"], abs=0.5)  # a random model is as bad on both
    assert 0 <= metrics["eos_rate"] <= 1


# -- what the saved adapter is --------------------------------------------------------------------

@torch.no_grad()
def answer_logprobs(model, tokenizer, prompt, answer):
    """log π of an answer's tokens and of its end, by a plain forward of the whole conversation alone."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in prompt) + "<|im_start|>assistant\n"
    before, after = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, answer + "<|im_end|>"))
    logits = model(torch.tensor([before + after])).logits[0].double()
    return logits.log_softmax(-1)[len(before) - 1:-1].gather(1, torch.tensor(after)[:, None])[:, 0]


def plain_peft(model, adapter_dir):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter_dir).eval()


def test_plain_peft_gives_the_sft_policy(tiny_model, sft_args, data_dir, tmp_path):
    """Held-out losses recomputed conversation by conversation with transformers and PEFT alone."""
    out = train(sft, tmp_path / "run", **{**sft_args, "heldout_rows": 12})
    policy, tokenizer = plain_peft(tiny_model, out), AutoTokenizer.from_pretrained(tiny_model)
    totals, count = {"heldout_loss": 0.0, "heldout_loss_base": 0.0}, 0
    for line in (data_dir / "sft_heldout.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        for i in range(1, len(messages), 2):  # each assistant turn after all that came before it
            logprobs = answer_logprobs(policy, tokenizer, messages[:i], messages[i]["content"])
            totals["heldout_loss"] -= logprobs.sum().item()
            with policy.disable_adapter():
                totals["heldout_loss_base"] -= answer_logprobs(policy, tokenizer, messages[:i],
                                                               messages[i]["content"]).sum().item()
            count += len(logprobs)
    found = record(out)["metrics"]
    for key, total in totals.items():
        assert found[key] == pytest.approx(total / count, abs=2e-5)
    assert found["heldout_loss_base"] - found["heldout_loss"] > 0.3


def test_plain_peft_gives_the_dpo_policy(tiny_model, sft_run, dpo_args, data_dir, tmp_path):
    """DPO's held-out figures, with the saved adapter and with the SFT adapter, each put on the pretrained base."""
    out = train(dpo, tmp_path / "run", **{**dpo_args, "heldout_rows": 50, "sft_adapter": sft_run})
    policy, reference = plain_peft(tiny_model, out), plain_peft(tiny_model, sft_run)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [json.loads(line) for line in (data_dir / "preference_heldout.jsonl").read_text().splitlines()]
    rows = [r for r in rows if not inputs.is_judge_prompt(r["prompt"])]
    expected = dict.fromkeys(("loss", "accuracy", "margin", "rewards_chosen", "rewards_rejected", "logprobs_chosen",
                              "logprobs_rejected"), 0.0)
    for row in rows:
        for side in ("chosen", "rejected"):
            now, ref = (answer_logprobs(m, tokenizer, row["prompt"], row[side][0]["content"]).sum().item()
                        for m in (policy, reference))
            expected[f"logprobs_{side}"] += now / len(rows)
            expected[f"rewards_{side}"] += 0.1 * (now - ref) / len(rows)
            row[side] = 0.1 * (now - ref)
        margin = row["chosen"] - row["rejected"]
        expected["margin"] += margin / len(rows)
        expected["accuracy"] += (margin > 0) / len(rows)
        expected["loss"] += math.log(1 + math.exp(-margin)) / len(rows)
    found = record(out)["metrics"]
    assert found["heldout_pairs"] == len(rows) == 49
    assert {k: found[f"heldout_{k}"] for k in expected} == pytest.approx(expected, abs=1e-4)
    assert expected["margin"] > 0.1


# -- repeating ------------------------------------------------------------------------------------

def test_a_finished_run_is_not_run_again(run, capsys):
    script, directory, args = run
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(directory).iterdir()}
    for changes in ({}, {"overwrite": True}, {"micro_tokens": 1024, "checkpoint_every": 1}):
        with pytest.raises(SystemExit) as stop:
            train(script, directory, **{**args, **changes})
        assert stop.value.code == 0 and "is finished" in capsys.readouterr().out
        del stop
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(directory).iterdir()} == before


def test_the_same_command_gives_the_same_bits(run, tmp_path):
    script, directory, args = run
    again = train(script, tmp_path / "again", **args)
    assert adapter(again) == adapter(directory)
    assert record(again)["config_hash"] == record(directory)["config_hash"]
    volatile = {"seconds", "tokens_per_s"}
    assert [{k: v for k, v in line.items() if k not in volatile} for line in log(again)] \
        == [{k: v for k, v in line.items() if k not in volatile} for line in log(directory)]


def test_another_seed_gives_another_run_of_the_family(run, tmp_path):
    script, directory, args = run
    other = train(script, tmp_path / "other", **args, seed=7)
    assert adapter(other) != adapter(directory)
    assert record(other)["config_hash"] != record(directory)["config_hash"]
    assert record(other)["family"] == record(directory)["family"]


# -- the commands ---------------------------------------------------------------------------------

def test_dpo_as_typed(sft_run, dpo_args, tmp_path, monkeypatch):
    """`python dpo.py --beta 0.1 --sft-adapter runs/sft_v2` means what it says; the base is the parent's."""
    typed = ["--beta", "0.1", "--sft-adapter", "runs/sft_v2"]
    assert tyro.cli(dpo.Args, args=typed) == dpo.Args(beta=0.1, sft_adapter="runs/sft_v2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sft_v2").symlink_to(sft_run)
    small = [word for k, v in dpo_args.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    dpo.main(tyro.cli(dpo.Args, args=typed + small))
    found = record("runs/dpo_v1")
    assert found["model"] == record(sft_run)["model"] and found["args"]["model"] is None
    assert found["parent"]["adapter_sha256"] == record(sft_run)["adapter_sha256"]


def test_sft_goes_on_with_the_chosen_answers(sft_run, sft_args, data_dir, tmp_path):
    """The control of DPO and KTO: from the SFT policy, on the chosen answers of part A's prompts and nothing else."""
    args = {**sft_args, "data": str(data_dir / "preference.jsonl"), "rows": 1000, "lr": 1e-3}
    out = train(sft, tmp_path / "sft_chosen", **args, sft_adapter=sft_run)
    found, parent = record(out), record(sft_run)
    assert found["parent"]["config_hash"] == parent["config_hash"] and found["train_invariants"] == parent["train_invariants"]
    assert json.loads((Path(out) / "adapter_config.json").read_text())["r"] == 32

    # What is trained: each part A answer with its EOS, once.
    rows = [json.loads(line) for line in (data_dir / "preference.jsonl").read_text().splitlines()]
    tokenizer = chat.load_tokenizer(sft_args["model"])
    answers = [len(tokenizer(r["chosen"][0]["content"])["input_ids"]) + 1 for r in rows
               if part_of(r["prompt"]) == "A"]
    assert 20 < len(answers) < 50 and sum(line["trained_tokens"] for line in log(out)) == sum(answers)

    # Where it starts and ends, by plain PEFT on the base.
    def heldout_nll(directory):
        model, by_row = plain_peft(sft_args["model"], directory), []
        held = [json.loads(line) for line in (data_dir / "preference_heldout.jsonl").read_text().splitlines()]
        kept = [held[i] for i in common.permutation(len(held), 42, "rows") if not inputs.is_judge_prompt(held[i]["prompt"])]
        for r in kept[:args["heldout_rows"]]:
            found = answer_logprobs(model, tokenizer, r["prompt"], r["chosen"][0]["content"])
            by_row.append((-found.sum().item(), len(found)))
        return np.array(by_row).T
    (before, tokens), (after, _), metrics = heldout_nll(sft_run), heldout_nll(out), found["metrics"]
    assert metrics["heldout_loss_base"] == pytest.approx(before.sum() / tokens.sum(), abs=1e-4)
    assert metrics["heldout_loss"] == pytest.approx(after.sum() / tokens.sum(), abs=1e-4)
    assert metrics["heldout_loss"] < metrics["heldout_loss_base"]
    # The intervals are those of a ratio, by the jackknife over rows: they differ by terms of 1/n.
    for key, nll in (("heldout_loss_interval", after), ("heldout_loss_change_interval", after - before)):
        left_out = (nll.sum() - nll) / (tokens.sum() - tokens)
        error = ((len(nll) - 1) ** 2 / len(nll) * left_out.var(ddof=1)) ** 0.5
        low, high = metrics[key]
        assert (low + high) / 2 == pytest.approx(nll.sum() / tokens.sum(), abs=1e-4)
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.3)
    with pytest.raises(SystemExit):
        train(sft, tmp_path / "other", **{**args, "quantization": "qlora"}, sft_adapter=sft_run)


def test_sft_under_nf4_measures_both_bases(sft_args, tmp_path):
    """QLoRA: held-out losses on the NF4 base that it trains on, and on the full-precision one that later phases use."""
    out = train(sft, tmp_path / "run", **{**sft_args, "quantization": "qlora", "dtype": "bfloat16", "lr": 1e-2})
    metrics, lines = record(out)["metrics"], log(out)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    for key in ("heldout_loss", "heldout_loss_nf4"):
        assert metrics[key] < metrics[key + "_base"] - 0.3
    assert metrics["heldout_loss"] != metrics["heldout_loss_nf4"]
    assert metrics["heldout_loss_base"] != metrics["heldout_loss_nf4_base"]
    assert record(out)["invariants"]["quantization"] == "qlora"


def test_overlap_with_the_evaluation_prompts(sft_args, tmp_path):
    """A training row that has 13 words in a row of an evaluation prompt is counted, one with 12 is not."""
    words = [f"word{i}" for i in range(30)]
    rows = [{"messages": [{"role": "user", "content": f"why {i}"}, {"role": "assistant", "content": f"because {i}"}]}
            for i in range(40)]
    rows[3]["messages"][0]["content"] = "so " + " ".join(words[5:18]) + " then"
    rows[4]["messages"][1]["content"] = "so " + " ".join(words[5:17]) + " then"
    rows[5]["messages"][1]["content"] = "So, " + ", ".join(words[10:23]).upper() + "?"
    for name in ("x", "x_heldout"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "eval" / "gsm8k").mkdir(parents=True)
    write_jsonl(tmp_path / "eval" / "gsm8k" / "test.jsonl", [{"question": " ".join(words), "answer": "#### 1"}])
    out = train(sft, tmp_path / "run", **{**sft_args, "data": str(tmp_path / "x.jsonl"), "max_length": 256,
                                          "eval_data": str(tmp_path / "eval")})
    assert record(out)["metrics"]["eval_overlap"] == 2
