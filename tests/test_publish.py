"""--push-to-hub and tools/push.py, against the stand-in for the hub (hub.py); and what a card says."""
import json
import re
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import dpo
import hub as stand_in
import publish
from tools import push


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, empty but for one data set; a function that gives this process a token, or none."""
    origin = tmp_path / "origin"
    stand_in.write_dataset(stand_in.snapshot_of(origin, "datasets", "org/rows", "a" * 40),
                           {"default": {"train": ("x.jsonl", [{"prompt": "a", "completion": "yes"}])}})
    with stand_in.serve(origin) as address:
        constants = huggingface_hub.constants
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", stand_in.WRITE_TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in takes large files by LFS
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
        yield origin


def committed(origin, name):
    """The directory of a repository's newest commit."""
    return next(stand_in.snapshot_of(origin, "models", name, "x").parent.glob("*"))


def test_a_run_is_pushed_when_it_is_finished(dpo_args, sft_run, dpo_run, tiny_model, hub, tmp_path, capsys):
    """Same hash as without the flag; what is on the hub loads by its id, in PEFT and as a start here."""
    args = dpo.Args(**dpo_args, sft_adapter=sft_run, out=str(tmp_path / "dpo_v1"), push_to_hub="me/dpo")
    dpo.main(args)
    printed = "".join(capsys.readouterr())
    assert "pushed to http://127.0.0.1" in printed and stand_in.WRITE_TOKEN not in printed
    there = committed(hub, "me/dpo")
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "run.json", "prompts.json", "log.jsonl", "curves.png",
            "README.md"} == {p.name for p in there.iterdir()}
    ours = common.read_json(Path(args.out) / "run.json")
    assert ours["config_hash"] == common.read_json(Path(dpo_run) / "run.json")["config_hash"]
    for name in there.iterdir():
        content = name.read_bytes()
        assert stand_in.WRITE_TOKEN.encode() not in content
        if name.suffix in (".json", ".md", ".jsonl"):
            assert str(tmp_path).encode() not in content and str(Path(tiny_model).parent).encode() not in content, name
    assert common.read_json(there / "run.json")["adapter_sha256"] == ours["adapter_sha256"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[5, 6, 7]])
    loaded = PeftModel.from_pretrained(base, "me/dpo")(ids).logits
    assert torch.equal(loaded, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), args.out)(ids).logits)
    assert AutoTokenizer.from_pretrained("me/dpo").chat_template == AutoTokenizer.from_pretrained(args.out).chat_template
    run, directory = common.read_policy("me/dpo")
    assert run["config_hash"] == ours["config_hash"] and directory != Path(args.out)

    with pytest.raises(SystemExit) as stop:  # finished: the same command only uploads, and there is nothing new
        dpo.main(args)
    assert stop.value.code == 0 and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("fault, said", [
    ("read-only token", "the token may not write there (HTTP 403)"), ("no token", "there is no token of the hub"),
    ("offline", "HF_HUB_OFFLINE is set"), ("name", "want NAMESPACE/NAME"), ("gone", "the hub can't be reached"),
    ("another's", "may not write there (HTTP 403)")])
def test_access_is_checked_before_training(dpo_args, sft_run, hub, tmp_path, monkeypatch, capsys, fault, said):
    """One error, no directory, and the token in no text."""
    if fault == "read-only token":
        monkeypatch.setenv("HF_TOKEN", "hf_aTokenThatMayOnlyRead")
    if fault == "no token":
        monkeypatch.delenv("HF_TOKEN")
    if fault == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if fault == "gone":
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    repo = {"name": "dpo", "another's": "you/dpo"}.get(fault, "me/dpo")
    with pytest.raises(SystemExit) as stop:
        dpo.main(dpo.Args(**dpo_args, sft_adapter=sft_run, out=str(tmp_path / "out"), push_to_hub=repo))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"--push-to-hub {repo}: " in error and said in error
    assert "hf_" not in error.replace("hf auth", "") and not (tmp_path / "out").exists()


def test_a_card_with_results_and_licences(dpo_run, hub, tmp_path):
    """After an evaluation: model-index with intervals, by the client's own reader; data sets with what their cards say."""
    record = common.read_json(Path(dpo_run) / "run.json")
    row = {"name": "dpo_v1", "phase": 2, "config_hash": record["config_hash"], "adapter_sha256": record["adapter_sha256"],
           "protocol": "plain", "eval_hash": "01234567", "timestamp": "2026-01-01T00:00:00+00:00",
           "train_invariants": record["train_invariants"],
           "n": {"gsm8k": 50, "mmlu": 100}, "eval": {"tasks": [["gsm8k", 8, None], ["mmlu", 5, 1000]]},
           "secondary": {"gsm8k_zero_shot": {"protocol": "chat", "tasks": [["gsm8k_zero_shot", 0, None]], "n": 40,
                                             "eval_hash": "89abcdef"}},
           "metrics": {"gsm8k/exact_match,strict-match": 0.5, "gsm8k/exact_match_stderr,strict-match": 0.05,
                       "mmlu/acc,none": 0.25, "mmlu/acc_stderr,none": 0.01, "mmlu_anatomy/acc,none": 0.3,
                       "mmlu_anatomy/acc_stderr,none": 0.1, "gsm8k_zero_shot/exact_match,flexible-extract": 0.75,
                       "gsm8k_zero_shot/exact_match_stderr,flexible-extract": 0.05}}
    other = row | {"adapter_sha256": "0" * 64}
    base = row | {"adapter_sha256": None, "metrics": row["metrics"] | {"mmlu/acc,none": 0.125}}
    elsewhere = base | {"eval_hash": "76543210", "metrics": row["metrics"] | {"mmlu/acc,none": 0.9}}
    (tmp_path / "metrics.json").write_text(json.dumps({"schema_version": 1, "runs": [base, row, other, elsewhere]}))
    run = tmp_path / "dpo_v1"
    run.mkdir()
    for file in Path(dpo_run).iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    record["data"]["train"] = f"org/rows@{'a' * 40}:default/train"
    (run / "run.json").write_text(json.dumps(record))
    push.main(push.Args(str(run), "me/dpo", str(tmp_path)))
    card = huggingface_hub.ModelCard.load(committed(hub, "me/dpo") / "README.md")
    assert card.data.datasets == ["org/rows"] and card.data.library_name == "peft" and "dpo" in card.data.tags
    results = {r.metric_name: r for r in card.data.eval_results}
    gsm8k = results.pop("gsm8k exact_match (strict-match), 8-shot, plain protocol")
    assert (gsm8k.dataset_type, gsm8k.metric_value) == ("openai/gsm8k", 0.5)
    assert gsm8k.metric_args["interval_95"] == pytest.approx([0.402, 0.598]) and gsm8k.metric_args["n"] == 50
    chat = results.pop("gsm8k_zero_shot exact_match (flexible-extract), 0-shot, chat protocol")  # not as the row's others
    assert chat.dataset_type == "openai/gsm8k"
    assert (chat.metric_args["n"], chat.metric_args["num_fewshot"], chat.metric_args["eval_hash"]) == (40, 0, "89abcdef")
    mmlu, = results.values()
    assert mmlu.metric_value == 0.25 and mmlu.metric_args["num_fewshot"] == 5
    assert re.search(rf"\| train \| org/rows@{'a' * 40}:default/train \| .* \| mit \|", card.text)
    assert "| task and metric | base | this | 95 % interval | items |" in card.text
    assert "| gsm8k exact_match (strict-match), 8-shot, plain protocol | 50.0 | 50.0 | 40.2 to 59.8 | 50 |" in card.text
    assert "| mmlu acc, 5-shot, plain protocol | 12.5 | 25.0 | 23.0 to 27.0 | 100 |" in card.text
    alone = publish.model_card(record, "me/dpo", [row], [elsewhere])
    assert "| task and metric | this | 95 % interval | items |" in alone and "| 25.0 | 23.0 to 27.0 |" in alone
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    assert "'me/dpo'" in snippet and len(snippet.splitlines()) == 4


def test_an_upload_that_fails_says_how_to_go_on(dpo_run, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.hf_api.HfApi, "create_commit", lambda *a, **k: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        publish.push(Path(dpo_run), "me/dpo", "results")
    assert stop.value.code == 2
    assert f"python tools/push.py {dpo_run} me/dpo" in capsys.readouterr().err


def test_what_is_no_finished_run_is_not_pushed(tmp_path, hub, capsys):
    with pytest.raises(SystemExit):
        push.main(push.Args(str(tmp_path), "me/x"))
    assert "is not a finished run" in capsys.readouterr().err and not (hub / "models--me--x").exists()
