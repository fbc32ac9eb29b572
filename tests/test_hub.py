"""What the defaults read from the hub: from a stand-in (hub.py), then offline from the cache that this left."""
import datasets
import huggingface_hub.constants
import pytest

import chat
import common
import dpo
import evaluate
import grpo
import harness
import inputs
import kto
import reward
import sft
from hub import serve, snapshot_of, write_dataset, write_hub

ROWS = {common.ULTRACHAT: ("chat", 210), common.ULTRAFEEDBACK: ("pair", 335), grpo.GSM8K: ("prompt", 120)}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """The repositories, and one with two commits."""
    root = tmp_path_factory.mktemp("origin")
    write_hub(root)
    for commit in ("a" * 40, "b" * 40):
        write_dataset(snapshot_of(root, "datasets", "org/rows", commit),
                      {"default": {"train": ("x.jsonl", [{"prompt": commit[0], "completion": "yes"}])}})
    return root


@pytest.fixture
def hub(origin, tmp_path, monkeypatch):
    """A function that brings the hub into reach (True) or takes it away, for the client and for datasets."""
    with serve(origin) as address:
        constants, config = huggingface_hub.constants, datasets.config
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(config, "HF_ENDPOINT", address)
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))

        def reach(online: bool) -> None:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not online)
            monkeypatch.setattr(config, "HF_HUB_OFFLINE", not online)
        yield reach


def test_the_default_data_with_and_without_the_hub(hub, capsys):
    """The same rows and fingerprints; the fingerprint names the pinned commit."""
    seen = []
    for online in (True, False):
        hub(online)
        for source, (kind, n) in ROWS.items():
            rows, fingerprint = inputs.load_rows(source)
            name, _, split = source.partition(":")
            assert len(rows) == n and fingerprint.startswith(name) and fingerprint.endswith("/" + split.split("/")[-1])
            if kind != "prompt":
                assert inputs.recognise(rows, source, kind) == kind
                assert len(inputs.load_heldout(source, None, rows).rows) > 10
            seen.append((list(rows), fingerprint))
        assert ("is read from the hub's cache" in capsys.readouterr().out) == (not online)
    assert seen[:3] == seen[3:]


def test_the_default_model_with_and_without_the_hub(hub):
    for online in (True, False):
        hub(online)
        directory = common.resolve_model(common.QWEN)
        assert directory.name == common.QWEN.partition("@")[2]
        tokenizer = chat.load_tokenizer(directory)
        assert tokenizer.chat_template == chat.PLAIN_TEMPLATE and tokenizer.eos_token == "<|endoftext|>"
        assert harness.lines_stand_alone(tokenizer)


@pytest.mark.parametrize("script", [sft, reward, dpo, kto, grpo], ids=lambda script: script.__name__)
def test_every_script_reads_its_defaults(hub, script, tmp_path, capsys):
    start = {} if script in (sft, reward) else {"sft_adapter": "none"}
    hub(True)
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(preview=1, device="cpu", out=str(tmp_path / "run"), **start))
    assert stop.value.code == 0 and "--preview: nothing is trained" in capsys.readouterr().out


def test_the_default_evaluation_with_and_without_the_hub(hub, origin, tmp_path, monkeypatch):
    """lm-eval reads the commits that eval_hash names; MMLU's tasks are those of its 57 subjects."""
    monkeypatch.setattr("nltk.data.path", [str(origin / "nltk_data")])
    fingerprints = []
    for online in (True, False):
        hub(online)
        (tmp_path / str(online)).mkdir()
        manager, tasks, fingerprint = evaluate.load_tasks(evaluate.Args(limit=4), tmp_path / str(online))
        fingerprints.append(fingerprint)
        assert sum(name.startswith("mmlu_") and entry.kind.name == "TASK"
                   for name, entry in manager.task_index.items()) == 57
        for task in ("mmlu_anatomy", "truthfulqa_mc2", "gsm8k", "ifeval"):
            loaded, = manager.load([task])["tasks"].values()
            assert len(loaded.eval_docs) >= 3
    assert fingerprints[0] == fingerprints[1]


def test_offline_the_commit_that_was_asked_for_is_read(hub, capsys):
    """Not the one that was loaded last; and one that the cache hasn't got is an error that says how to get it."""
    hub(True)
    for commit in ("a" * 40, "b" * 40):
        assert inputs.load_rows(f"org/rows@{commit}")[0][0]["prompt"] == commit[0]
    hub(False)
    for commit in ("a" * 40, "b" * 40):
        rows, fingerprint = inputs.load_rows(f"org/rows@{commit}")
        assert rows[0]["prompt"] == commit[0] and fingerprint == f"org/rows@{commit}:default/train"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        inputs.load_rows(f"org/rows@{'c' * 40}")
    assert stop.value.code == 2
    assert f"hf download --repo-type dataset org/rows --revision {'c' * 40}" in capsys.readouterr().err
