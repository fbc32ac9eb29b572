"""Bad input: one clear error before a model loads, exit code 2, nothing written. And which row layouts are good."""
import dataclasses
import gzip
import importlib
import json
import math
import pickle
import shutil
import sys
import typing
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import chat
import common
import inputs
import dpo
import sft
from conftest import CHATML, make_model, part_of, write_jsonl

SCRIPT = {"sft": sft, "dpo": dpo}


class ModelLoads(Exception):
    """Raised where a model would load."""


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Loading a model is an error of its own: what must be refused before it, and where good input may stop."""
    def loads(*args, **kwargs):
        raise ModelLoads
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loads)


@pytest.fixture
def base_args(sft_args, dpo_args, sft_run, tmp_path):
    """Arguments of a run that is fine as it is, by script; --out is tmp_path/new/run."""
    return {"sft": {**sft_args, "out": str(tmp_path / "new" / "run")},
            "dpo": {**dpo_args, "sft_adapter": sft_run, "out": str(tmp_path / "new" / "run")}}


def files(directory):
    """Everything in a directory and below, with its content."""
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in Path(directory).rglob("*")}


@pytest.fixture
def refused(base_args, tmp_path, capsys):
    """refused(script, {argument: value}, *parts): exit code 2, one error that has the parts, nothing written."""
    def check(script, changes, *parts):
        before = files(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            SCRIPT[script].main(SCRIPT[script].Args(**{**base_args[script], **changes}))
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
        for part in parts:
            assert str(part) in error, f"{part!r} is not in: {error}"
        assert files(tmp_path) == before
        return error
    return check


@pytest.fixture
def accepted(base_args, monkeypatch, capsys):
    """accepted(script, {argument: value}): the examples and counts of preflight, when the checks let a model load."""
    def check(script, changes):
        seen, preflight = {}, inputs.preflight

        def keep(tokenizer, examples, *args):
            seen.update(examples=list(examples), counts=preflight(tokenizer, examples, *args))
            return seen["counts"]
        with monkeypatch.context() as patch, pytest.raises(ModelLoads):
            patch.setattr(inputs, "preflight", keep)
            SCRIPT[script].main(SCRIPT[script].Args(**{**base_args[script], **changes}))
        seen["printed"] = capsys.readouterr().out
        return seen
    return check


def turns(*roles, content="read books"):
    return [{"role": r, "content": content} for r in roles]


def chats(n=40):
    """n conversations, no two alike."""
    return [{"messages": turns("user", content=f"why {i}") + turns("assistant", content=f"when {i}")} for i in range(n)]


def prefs(n=90):
    """n pairs with messages as the prompt and one message an answer."""
    return [{"prompt": turns("user", content=f"why {i}"), "chosen": turns("assistant", content=f"because {i}"),
             "rejected": turns("assistant", content=f"no {i}")} for i in range(n)]


def with_row(rows, at, row):
    return rows[:at] + [row] + rows[at + 1:]


def held_out(rows):
    """The same rows with other prompts: every text that begins with "why" asks how."""
    return json.loads(json.dumps(rows).replace('"why', '"how'))


def two_files(directory, rows, suffix=".jsonl", heldout=None):
    """x<suffix> and x_heldout<suffix>, which share no prompt."""
    for name, rows in (("x", rows), ("x_heldout", held_out(heldout or rows))):
        path = directory / (name + suffix)
        if suffix.endswith(".gz"):
            path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
        elif suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            write_jsonl(path, rows)
    return str(directory / ("x" + suffix))


# -- the data set as a file -----------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPT)
@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "./gone", "nowhere/at/all"])
def test_missing_data(refused, tmp_path, monkeypatch, script, name):
    monkeypatch.chdir(tmp_path)
    refused(script, {"data": name, "heldout_data": None}, "no such data file", name)


def test_missing_data_with_heldout_given(refused, data_dir):
    refused("sft", {"data": "gone.jsonl", "heldout_data": str(data_dir / "sft_heldout.jsonl")}, "no such data file",
            "gone.jsonl")


def test_too_few_prompts_to_hold_some_out(refused, tmp_path):
    data = write_jsonl(tmp_path / "alone.jsonl", chats(1) * 40)
    refused("sft", {"data": data}, "no held-out rows found beside", data, "1 different prompts", "--heldout-data")


@pytest.mark.parametrize("script", SCRIPT)
def test_missing_heldout_that_was_named(refused, tmp_path, script):
    refused(script, {"heldout_data": str(tmp_path / "gone.jsonl")}, "no such data file", "gone.jsonl")


def test_data_of_the_hub_offline(refused):
    refused("sft", {"data": "nobody/nothing@0123456789:train_sft"}, "can't read the data set", "nobody/nothing")


UNREADABLE = {
    "wrong suffix": ("x.txt", b"messages\nhello\n", "want one of .jsonl"),
    "broken csv": ("x.csv", b'messages\n"hello\n', "can't read the data set"),
    "csv with too many values": ("x.csv", b"prompt,completion\na,b\na,b,c\n", "line 3 has more values than the header"),
    "no object": ("x.jsonl", b'["hello"]\n', "item 0 of the array is no object"),
    "not a number": ("x.jsonl", b'{"messages": NaN}\n', "line 1: NaN is not JSON"),
    "half a character": ("x.jsonl", b'{"messages": "\\ud83d"}\n', "line 1: 'utf-8' codec can't encode"),
    "broken json": ("x.jsonl", b'{"messages": [{"role": "user", "content": "a"}\n' * 3, "can't read the data set"),
    "not json": ("x.jsonl", b"hello\nthere\n", "can't read the data set"),
    "not utf-8": ("x.jsonl", b'{"messages": "\xff\xfe\xfa"}\n', "can't read the data set"),
    "not gzip": ("x.jsonl.gz", b'{"messages": []}\n', "can't read the data set"),
    "gzip cut short": ("x.jsonl.gz", gzip.compress(json.dumps(chats(200)).encode())[:-40], "can't read the data set"),
    "not parquet": ("x.parquet", b"PAR1 no PAR1", "can't read the data set"),
    "empty file": ("x.jsonl", b"", "has no rows"),
    "empty lines": ("x.jsonl", b"\n\n", "has no rows"),
    "empty gzip": ("x.jsonl.gz", gzip.compress(b""), "has no rows"),
}


@pytest.mark.parametrize("which", ["data", "heldout_data"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_data(refused, tmp_path, data_dir, kind, which):
    name, content, message = UNREADABLE[kind]
    (tmp_path / name).write_bytes(content)
    good = {"data": str(data_dir / "sft.jsonl"), "heldout_data": str(data_dir / "sft_heldout.jsonl")}
    refused("sft", {**good, which: str(tmp_path / name)}, message, tmp_path / name)


def test_parquet_without_rows(refused, tmp_path, data_dir):
    datasets.Dataset.from_list(chats(2)).select([]).to_parquet(tmp_path / "x.parquet")
    refused("sft", {"data": str(tmp_path / "x.parquet"), "heldout_data": str(data_dir / "sft_heldout.jsonl")},
            "has no rows", "x.parquet")


def test_directory_without_the_split(refused, tmp_path, data_dir):
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", chats())
    refused("sft", {"data": f"{tmp_path}/set:validation", "heldout_data": str(data_dir / "sft_heldout.jsonl")},
            "can't read the data set", "validation")


# -- rows -----------------------------------------------------------------------------------------

def test_row_without_the_column(refused, tmp_path):
    data = two_files(tmp_path, [{"text": "hello"}] * 40)
    refused("sft", {"data": data}, "rows of no known layout, with the columns text", "messages (messages)",
            "docs/data-formats.md")


def test_conversation_without_an_answer(refused, tmp_path):
    data = two_files(tmp_path, [{"messages": turns("user", content=f"why {i}")} for i in range(40)])
    refused("sft", {"data": data}, "roles out of order: user", "the last message has no answer")


def test_conversations_and_pairs_in_one_file(refused, tmp_path):
    """Of a pair only the chosen answer would be trained, of a conversation every answer."""
    pairs = [{"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in prefs(90)]
    refused("sft", {"data": two_files(tmp_path, [*chats(40), *pairs])}, "conversations and preference pairs in one source")


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_pair_without_the_column(refused, tmp_path, column):
    data = two_files(tmp_path, [{k: v for k, v in row.items() if k != column} for row in prefs()])
    other = "rejected" if column == "chosen" else "chosen"
    refused("dpo", {"data": data}, f"with the columns prompt, {other}", "preference pairs with a prompt column")


BAD_CHATS = {
    "no messages": ([], "want a list of messages"),
    "content that is no text": ([*turns("user"), {"role": "assistant", "content": 5}], "text content"),
    "tool": (turns("user", "tool", "assistant"), "a message of the role tool"),
    "function": (turns("user", "function"), "a message of the role function"),
    "null role": ([*turns("user"), {"role": None, "content": "a"}], "text role"),
    "two users": (turns("user", "user", "assistant"), "roles out of order: user, user, assistant"),
    "assistant first": (turns("assistant", "user", "assistant"), "roles out of order"),
    "user last": (turns("user", "assistant", "user"), "roles out of order"),
    "system in the middle": (turns("user", "system", "assistant"), "roles out of order"),
    "only a system message": (turns("system"), "roles out of order: system"),
    "unknown role": (turns("human", "gpt"), "roles out of order: human, gpt"),
}


@pytest.mark.parametrize("kind", BAD_CHATS)
def test_bad_conversation_is_named(refused, tmp_path, kind):
    messages, message = BAD_CHATS[kind]
    data = two_files(tmp_path, with_row(chats(), 7, {"messages": messages}), heldout=chats())
    refused("sft", {"data": data}, message, f"{data}, row 7:")


def test_bad_heldout_conversation_is_named(refused, tmp_path, data_dir):
    heldout = write_jsonl(tmp_path / "h.jsonl", with_row(chats(8), 3, {"messages": turns("assistant", "user")}))
    refused("sft", {"heldout_data": heldout}, f"{heldout}, row 3:", "roles out of order")


def test_messages_that_are_text(refused, tmp_path):
    data = two_files(tmp_path, [{"messages": "hello"}] * 40)
    refused("sft", {"data": data}, "want a list of messages", "'hello'")


A, U = turns("assistant"), turns("user")
BAD_PAIRS = {
    "no prompt": ({"chosen": A, "rejected": A}, "no prompt before chosen"),
    "chosen is a number": ({"prompt": U, "chosen": 5, "rejected": A}, "chosen is neither a text nor messages"),
    "empty rejected": ({"prompt": U, "chosen": A, "rejected": []}, "rejected is neither a text nor messages"),
    "prompt ends with the assistant": ({"prompt": U + A, "chosen": A, "rejected": A}, "roles out of order"),
    "answer by the user": ({"prompt": U, "chosen": A, "rejected": U}, "roles out of order"),
    "other prompts": ({"prompt": None, "chosen": U + A, "rejected": turns("user", content="why") + A},
                      "answer different prompts"),
}


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_bad_pair_is_named(refused, tmp_path, kind):
    row, message = BAD_PAIRS[kind]
    data = two_files(tmp_path, with_row(prefs(), 7, row), heldout=prefs())
    refused("dpo", {"data": data}, message, f"{data}, row 7")


# -- degenerate rows ------------------------------------------------------------------------------

LONG = " ".join(["why"] * 300)  # at least as many tokens, more than --max-length 128
DEGENERATE = {  # kind: (script, how a good row becomes bad, the reason that is counted)
    "empty answer": ("sft", lambda r: {"messages": [r["messages"][0], {"role": "assistant", "content": " "}]},
                     "empty answer"),
    "long exchange": ("sft", lambda r: {"messages": [{"role": "user", "content": LONG}, r["messages"][1]]},
                      "first exchange too long"),
    "empty chosen": ("dpo", lambda r: {**r, "chosen": turns("assistant", content="")}, "empty answer"),
    "empty rejected": ("dpo", lambda r: {**r, "rejected": turns("assistant", content=" \n")}, "empty answer"),
    "equal": ("dpo", lambda r: {**r, "rejected": r["chosen"]}, "chosen equals rejected"),
    "long answer": ("dpo", lambda r: {**r, "rejected": turns("assistant", content=LONG)}, "too long"),
    "null messages": ("sft", lambda r: {"messages": None}, "null messages"),
    "null content": ("sft", lambda r: {"messages": [r["messages"][0], {"role": "assistant", "content": None}]},
                     "null content"),
    "null chosen": ("dpo", lambda r: {**r, "chosen": None}, "null chosen"),
    "null prompt": ("dpo", lambda r: {**r, "prompt": None}, "null prompt"),
}


def in_play(script, rows):
    """Indices of the rows that a script looks at: all of them for SFT, those of part A of the prompts for DPO."""
    return [i for i, r in enumerate(rows) if script == "sft" or part_of(r["prompt"]) == "A"]


def spoiled(script, bad, directory, count):
    """A data file of which `count` rows in play are bad, and how many rows are in play."""
    rows = chats() if script == "sft" else prefs()
    at = in_play(script, rows)
    for i in at[:count]:
        rows[i] = bad(rows[i])
    write_jsonl(directory / "x_heldout.jsonl", held_out(chats(8) if script == "sft" else prefs(40)))
    return write_jsonl(directory / "x.jsonl", rows), len(at)


@pytest.mark.parametrize("kind", DEGENERATE)
def test_many_degenerate_rows(refused, tmp_path, kind):
    """More than 5 % of the rows end a run, more than 15 % where pairs are too long; each limit has its flag."""
    script, bad, reason = DEGENERATE[kind]
    n = len(in_play(script, chats() if script == "sft" else prefs()))
    limit, said, flag = (0.15, "beyond --max-length", "--max-overlong") if reason == "too long" \
        else (0.05, f"degenerate ({reason} {{count}})", "--max-dropped")
    remedy = {"too long": "raise it, or", "first exchange too long": "clean the data, raise the limit on tokens per row, or"}
    count = int(limit * n) + 1
    data, _ = spoiled(script, bad, tmp_path, count)
    refused(script, {"data": data, "rows": n}, f"{data}: {count} of {n} rows are {said.format(count=count)}",
            f"more than {limit:.0%}; {remedy.get(reason, 'clean the data, or')}", flag)
    refused(script, {"data": data, "rows": n, flag[2:].replace("-", "_"): (count - 1) / n}, f"{count} of {n}")


@pytest.mark.parametrize("kind", DEGENERATE)
def test_few_degenerate_rows_are_dropped_and_counted(accepted, tmp_path, kind):
    script, bad, reason = DEGENERATE[kind]
    data, n = spoiled(script, bad, tmp_path, 1)
    assert 1 <= 0.05 * n
    seen = accepted(script, {"data": data, "rows": n})
    assert seen["counts"]["dropped"] == 1
    assert len(seen["examples"]) == (n - 1) * (2 if script == "dpo" else 1)
    assert f"dropped 1 ({reason})" in seen["printed"]


@pytest.mark.parametrize("kind, flag", [("empty answer", "max_dropped"), ("equal", "max_dropped"),
                                        ("long answer", "max_overlong")])
def test_a_flag_allows_more(accepted, tmp_path, kind, flag):
    script, bad, _ = DEGENERATE[kind]
    data, n = spoiled(script, bad, tmp_path, 10)
    seen = accepted(script, {"data": data, "rows": n, flag: 10 / n + 1e-9})
    assert seen["counts"]["dropped"] == 10
    assert len(seen["examples"]) == (n - 10) * (2 if script == "dpo" else 1)


def test_no_usable_row(refused, tmp_path):
    data, n = spoiled("sft", DEGENERATE["empty answer"][1], tmp_path, 40)
    refused("sft", {"data": data, "max_dropped": 1.0}, "no usable row among 40", "empty answer 40")


def test_degenerate_heldout_rows(refused, tmp_path, data_dir):
    heldout = write_jsonl(tmp_path / "h.jsonl", [DEGENERATE["empty answer"][1](r) for r in chats(4)] + chats(4))
    refused("sft", {"heldout_data": heldout}, f"{heldout}: 4 of 8 rows are degenerate")


def test_long_conversation_is_cut_at_a_turn(accepted, tmp_path):
    """One more exchange than fits: what trains is exactly the conversation without it."""
    rows = chats()
    longer = with_row(rows, 5, {"messages": [*rows[5]["messages"], {"role": "user", "content": "more"},
                                             {"role": "assistant", "content": LONG}]})
    (tmp_path / "short").mkdir(), (tmp_path / "long").mkdir()
    short = accepted("sft", {"data": two_files(tmp_path / "short", rows), "out": str(tmp_path / "a")})
    long = accepted("sft", {"data": two_files(tmp_path / "long", longer), "out": str(tmp_path / "b")})
    assert long["examples"] == short["examples"]
    assert (short["counts"]["truncated"], long["counts"]["truncated"]) == (0, 1)
    assert "1 cut at a turn's end" in long["printed"]


# -- numbers --------------------------------------------------------------------------------------

POSITIVE = ["rows", "heldout_rows", "max_length", "lr", "batch_size", "epochs", "max_grad_norm", "eos_prompts",
            "eos_tokens", "checkpoint_every"]


@pytest.mark.parametrize("script, name", [*(("sft", n) for n in POSITIVE), *(("dpo", n) for n in [*POSITIVE, "beta"])])
def test_numbers_above_zero(refused, script, name):
    for value in (0, -1):
        refused(script, {name: value}, f"--{name.replace('_', '-')} must be above 0, got {value}")


@pytest.mark.parametrize("script, name", [("sft", "warmup"), ("sft", "max_dropped"), ("dpo", "warmup"),
                                          ("dpo", "max_dropped"), ("dpo", "max_overlong")])
def test_shares(refused, script, name):
    """Shares of steps or rows."""
    for value in (-0.1, 1.5):
        refused(script, {name: value}, f"--{name.replace('_', '-')} ", "between 0 and 1", value)


def test_a_rate_that_is_no_number(refused):
    refused("sft", {"lr": float("nan")}, "--lr must be above 0, got nan")


@pytest.mark.parametrize("value", [-0.1, 0.5, 1.0])
def test_label_smoothing(refused, value):
    refused("dpo", {"label_smoothing": value}, "--label-smoothing must be in [0, 0.5)", value)


@pytest.mark.parametrize("script", SCRIPT)
def test_lengths(refused, script):
    refused(script, {"max_length": 513, "micro_tokens": 4096}, "--max-length 513", "512 positions")
    refused(script, {"micro_tokens": 127}, "--micro-tokens 127", "give at least 128")
    refused(script, {"micro_tokens": 0}, "--micro-tokens 0")


@pytest.mark.parametrize("script", SCRIPT)
def test_the_longest_lengths_are_fine(accepted, script):
    seen = accepted(script, {"max_length": 512, "micro_tokens": 1024 if script == "dpo" else 512})
    assert seen["counts"]["tokens"] > 0


# -- the machine ----------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPT)
def test_cuda_without_a_gpu(refused, monkeypatch, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        refused(script, {"device": device}, f"--device {device}", "no GPU")


def test_unknown_device(refused):
    refused("sft", {"device": "gpu"}, "--device gpu")


def test_nf4_where_bitsandbytes_cannot_be_imported(refused, monkeypatch):
    for module in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, module, None)
    refused("sft", {"quantization": "qlora", "dtype": "bfloat16"}, "NF4 needs bitsandbytes", "--quantization none")


def test_missing_evaluation_data(refused, tmp_path):
    """The preflight's count of overlaps would be 0 whatever the training rows are."""
    refused("sft", {"eval_data": str(tmp_path / "gone")}, "--eval-data", tmp_path / "gone")


# -- the model ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["gone", "./models/gone", "a/b/c"])
def test_missing_model(refused, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused("sft", {"model": name}, "no such model directory", name)


def test_model_of_the_hub_offline(refused):
    refused("sft", {"model": "nobody/nothing@main"}, "can't get the model nobody/nothing@main from the hub")


@pytest.fixture
def own_model(tmp_path, tiny_model):
    """A copy of the tiny model, to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_model_without_weights(refused, own_model):
    (own_model / "model.safetensors").unlink()
    refused("sft", {"model": str(own_model)}, "no model.safetensors", own_model)


def test_model_without_config(refused, own_model):
    (own_model / "config.json").unlink()
    refused("sft", {"model": str(own_model)}, "needs config.json and *.safetensors", own_model)


def test_model_with_a_config_cut_short(refused, own_model):
    (own_model / "config.json").write_text('{"max_position_embeddings": ')
    refused("sft", {"model": str(own_model)}, own_model / "config.json")


def test_adapter_as_model(refused, sft_run):
    refused("sft", {"model": sft_run}, "needs config.json and *.safetensors (this is an adapter)")


class Dangerous:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').close()",)


def test_pickled_weights_are_never_read(refused, own_model, tmp_path):
    (own_model / "model.safetensors").unlink()
    with open(own_model / "pytorch_model.bin", "wb") as f:
        pickle.dump(Dangerous(tmp_path / "unpickled"), f)
    refused("sft", {"model": str(own_model)}, "pytorch_model.bin is not read")
    assert not (tmp_path / "unpickled").exists()
    pickle.loads((own_model / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "unpickled").exists()  # the file would have done it


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"\0" * 4],
                         ids=["LFS pointer", "too short"])
def test_weights_that_are_no_safetensors(refused, own_model, content):
    (own_model / "model.safetensors").write_bytes(content)
    refused("sft", {"model": str(own_model)}, own_model / "model.safetensors")


def test_weights_that_are_cut_short(refused, own_model):
    whole = (own_model / "model.safetensors").read_bytes()
    (own_model / "model.safetensors").write_bytes(whole[:-100])
    refused("sft", {"model": str(own_model)}, own_model / "model.safetensors", "truncated")


def test_model_without_a_tokenizer(refused, own_model):
    for path in own_model.glob("*token*"):
        path.unlink()
    refused("sft", {"model": str(own_model)}, f"{own_model}: no tokenizer there (tokenizer.json)")


def test_tokenizer_without_eos(refused, tmp_path):
    refused("sft", {"model": make_model(tmp_path / "model", eos=None)}, "no EOS token")


def test_template_that_doubles_bos(refused, tmp_path):
    model = make_model(tmp_path / "model", template="{{ bos_token }}" + CHATML)  # CHATML begins with it
    refused("sft", {"model": model}, "begins with two BOS tokens")


def test_template_without_eos_is_replaced_by_ours(accepted, tmp_path):
    """A base model's template may end turns with a token that is not its EOS; what is trained ends with its EOS."""
    model = make_model(tmp_path / "model", template="{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
    seen = accepted("sft", {"model": model, "data": two_files(tmp_path, chats())})
    tokenizer = chat.load_tokenizer(model)
    texts = [tokenizer.decode(e.ids) for e in seen["examples"]]
    assert sorted(texts) == sorted(f"User: why {i}\n\nAssistant: when {i}<|im_end|>" for i in range(40))
    assert all(e.targets[-1] == tokenizer.eos_token_id for e in seen["examples"])


def test_model_without_tokenizer(refused, own_model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own_model / name).unlink()
    refused("sft", {"model": str(own_model)}, own_model, "tokenizer")


# -- the adapter to start from --------------------------------------------------------------------

@pytest.fixture
def own_adapter(tmp_path, sft_run):
    """A copy of the finished SFT run in tmp_path/runs, to break."""
    return Path(shutil.copytree(sft_run, tmp_path / "runs" / "sft_v2"))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unknown_adapter_lists_those_there(refused, own_adapter):
    error = refused("dpo", {"sft_adapter": str(own_adapter.parent / "sft_v3")}, "is not a trained adapter", "sft_v3")
    assert f"adapters there: {own_adapter}" in error


def test_adapter_in_a_directory_that_is_not_there(refused, tmp_path):
    error = refused("dpo", {"sft_adapter": str(tmp_path / "gone" / "sft_v2")}, "is not a trained adapter")
    assert "adapters there" not in error


def test_unfinished_adapter(refused, own_adapter):
    """A run that was stopped has its checkpoint and no run.json yet."""
    (own_adapter / "checkpoint").mkdir()
    (own_adapter / "run.json").rename(own_adapter / "checkpoint" / "run.json")
    refused("dpo", {"sft_adapter": str(own_adapter)}, "is not a trained adapter", "not finished")


def test_adapter_of_another_base_names_both_hashes(refused, tmp_path, sft_run):
    other = make_model(tmp_path / "other", seed=1)
    base = json.loads((Path(sft_run) / "run.json").read_text())["model"]
    theirs, ours = (common.weights_sha256(m)[:8] for m in (base, other))
    assert theirs != ours
    refused("dpo", {"model": other}, sft_run, theirs, ours)


def test_adapter_whose_base_was_replaced(refused, own_adapter, own_model):
    edit(own_adapter / "run.json", model=str(own_model))
    old = common.weights_sha256(own_model)[:8]
    tensors = load_file(own_model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, own_model / "model.safetensors", {"format": "pt"})
    refused("dpo", {"sft_adapter": str(own_adapter)}, old, common.weights_sha256(own_model)[:8])


def test_adapter_with_another_chat_template(refused, own_adapter, own_model):
    edit(own_adapter / "run.json", model=str(own_model))
    template = own_model / "chat_template.jinja"
    template.write_text(template.read_text().replace("'\n'", "'\n\n'"))
    refused("dpo", {"sft_adapter": str(own_adapter)}, "other invariants", "chat_template")


def test_adapter_with_other_target_modules(refused, own_adapter):
    edit(own_adapter / "adapter_config.json", target_modules=["q_proj", "v_proj"])
    refused("dpo", {"sft_adapter": str(own_adapter)}, "target modules ['q_proj', 'v_proj']", "down_proj")


@pytest.mark.parametrize("change", [{"lora_alpha": 16}, {"r": 8}, {"r": 64, "lora_alpha": 16}])
def test_adapter_with_another_scale(refused, own_adapter, change):
    edit(own_adapter / "adapter_config.json", **change)
    config = json.loads((own_adapter / "adapter_config.json").read_text())
    refused("dpo", {"sft_adapter": str(own_adapter)}, f"alpha/r is {config['lora_alpha']}/{config['r']}", "want 2")


def test_altered_adapter(refused, own_adapter):
    tensors = load_file(own_adapter / "adapter_model.safetensors")
    name = next(k for k in tensors if k.endswith("lora_B.weight"))
    tensors[name][0, 0] += 1e-3
    save_file(tensors, own_adapter / "adapter_model.safetensors", {"format": "pt"})
    said = json.loads((own_adapter / "run.json").read_text())["adapter_sha256"][:8]
    refused("dpo", {"sft_adapter": str(own_adapter)}, said, "are not those its run.json names")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "run.json", "adapter_config.json"])
def test_adapter_cut_short(refused, own_adapter, file):
    whole = (own_adapter / file).read_bytes()
    (own_adapter / file).write_bytes(whole[:len(whole) // 2])
    refused("dpo", {"sft_adapter": str(own_adapter)}, own_adapter)


# -- the run directory ----------------------------------------------------------------------------

def test_run_directory_of_another_configuration(sft_args, own_adapter, capsys):
    before = files(own_adapter)
    with pytest.raises(SystemExit) as stop:
        sft.main(sft.Args(**{**sft_args, "lr": 1e-3, "out": str(own_adapter)}))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "lr 0.005 -> 0.001" in error and "--overwrite" in error
    assert json.loads(before["run.json"])["config_hash"] in error
    assert files(own_adapter) == before


def test_run_directory_that_holds_something_else(sft_args, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(SystemExit) as stop:
            sft.main(sft.Args(**{**sft_args, "out": str(tmp_path / "mine"), "overwrite": overwrite}))
        assert stop.value.code == 2 and "is not empty and holds no run" in capsys.readouterr().err
        del stop
    assert files(tmp_path / "mine") == {"thesis.txt": b"dear"}


def test_run_directory_that_is_a_file(refused, tmp_path):
    (tmp_path / "mine").write_text("dear")
    for out in ("mine", "mine/run"):
        refused("sft", {"out": str(tmp_path / out)}, "--out", tmp_path / out)


# -- layouts that are good input ------------------------------------------------------------------

def ultrachat(rows):
    return [{"prompt": r["messages"][0]["content"], "prompt_id": f"{i:064x}", "messages": r["messages"]}
            for i, r in enumerate(rows)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".json"])
@pytest.mark.parametrize("layout", [list, ultrachat], ids=["plain", "UltraChat"])
def test_sft_files_and_layouts(accepted, tmp_path, layout, suffix):
    """Whatever the file, the same rows give the same examples; they train the answers with their EOS."""
    canonical = accepted("sft", {"data": two_files(tmp_path, chats()), "out": str(tmp_path / "a")})
    assert len(canonical["examples"]) == 40
    assert "⟦when " in canonical["printed"] and "<|im_end|>⟧" in canonical["printed"]
    (tmp_path / "other").mkdir()
    data = two_files(tmp_path / "other", layout(chats()), suffix)
    assert accepted("sft", {"data": data, "out": str(tmp_path / "b")})["examples"] == canonical["examples"]


def test_a_file_name_is_no_pattern(accepted, tmp_path):
    (tmp_path / "x 1.jsonl").write_text("")  # what the pattern x[ ]1 would find
    write_jsonl(tmp_path / "x[ ]1.jsonl", chats())
    write_jsonl(tmp_path / "x[ ]1_heldout.jsonl", held_out(chats()))
    assert len(accepted("sft", {"data": str(tmp_path / "x[ ]1.jsonl")})["examples"]) == 40


def test_sft_directory_with_splits(accepted, tmp_path):
    canonical = accepted("sft", {"data": two_files(tmp_path, chats()), "out": str(tmp_path / "a")})
    (tmp_path / "set").mkdir()
    for split, rows in (("train", chats()), ("test", held_out(chats()))):
        write_jsonl(tmp_path / "set" / f"{split}.jsonl", rows)
    heldout = str(tmp_path / "x_heldout.jsonl")
    for i, (data, given) in enumerate([(f"{tmp_path}/set:train", None), (f"{tmp_path}/set", heldout)]):
        seen = accepted("sft", {"data": data, "heldout_data": given, "out": str(tmp_path / f"b{i}")})
        assert seen["examples"] == canonical["examples"]


def strings(row):
    return {"prompt": row["prompt"][0]["content"], **{k: row[k][0]["content"] for k in ("chosen", "rejected")}}


def ultrafeedback(row):
    prompt = row["prompt"]
    return {"prompt": prompt[0]["content"], "prompt_id": "0" * 64, "chosen": prompt + row["chosen"],
            "rejected": prompt + row["rejected"], "messages": prompt + row["chosen"], "score_chosen": 8.0,
            "score_rejected": 2.0}


def whole(row):
    return {k: row["prompt"] + row[k] for k in ("chosen", "rejected")}


def mixed(row):
    return {"prompt": row["prompt"][0]["content"], "chosen": row["chosen"], "rejected": row["rejected"]}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("layout", [strings, ultrafeedback, whole, mixed])
def test_dpo_files_and_layouts(accepted, tiny_model, tmp_path, layout, suffix):
    """Every layout of the same pairs gives the same examples: chosen, rejected, chosen, …, from part A of them."""
    rows = prefs()
    canonical = accepted("dpo", {"data": two_files(tmp_path, rows), "rows": 60, "out": str(tmp_path / "a")})
    part_a = in_play("dpo", rows)
    assert 20 < len(part_a) < 50 and len(canonical["examples"]) == 2 * len(part_a)
    tokenizer = chat.load_tokenizer(tiny_model)
    answers = [tokenizer.decode(e.targets) for e in canonical["examples"]]
    assert sorted(answers[::2]) == sorted(f"because {i}<|im_end|>" for i in part_a)
    assert [a.replace("because", "no") for a in answers[::2]] == answers[1::2]
    (tmp_path / "other").mkdir()
    data = two_files(tmp_path / "other", [layout(r) for r in rows], suffix)
    seen = accepted("dpo", {"data": data, "rows": 60, "out": str(tmp_path / "b")})
    assert seen["examples"] == canonical["examples"]


def test_out_is_the_adapter_to_start_from(base_args, sft_run, capsys):
    before = files(sft_run)
    with pytest.raises(SystemExit) as stop:
        dpo.main(dpo.Args(**{**base_args["dpo"], "out": sft_run, "overwrite": True}))
    assert stop.value.code == 2 and "is the adapter to start from" in capsys.readouterr().err
    assert files(sft_run) == before


def test_model_of_another_architecture(refused, tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=300)
    make_model(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    refused("sft", {"model": str(tmp_path / "gpt2")}, "gpt2 are transposed (Conv1D)")


@pytest.mark.parametrize("change, reason", [({"model_type": "gemma"}, "gemma"), ({"hidden_act": "gelu"}, "gelu"),
                                            ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic")])
def test_model_that_the_fast_engine_does_not_serve(refused, accepted, own_model, change, reason):
    """Asked for, it is refused before a model loads; by default the plain engine takes it."""
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps({**config, **change}))
    refused("sft", {"model": str(own_model), "engine": "fast"}, "--engine fast", reason, "--engine auto or plain")
    accepted("sft", {"model": str(own_model)})


def test_evaluation_data_without_prompts(refused, tmp_path):
    (tmp_path / "evaluation").mkdir()
    refused("sft", {"eval_data": str(tmp_path / "evaluation")}, "no evaluation prompts", "gsm8k")


def test_fingerprint_of_a_directory_is_of_its_content(tmp_path):
    prints = []
    for n, text in enumerate(("a,b\n1,2\n", "a,b\n1,3\n")):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "train.csv").write_text(text)
        prints.append(inputs.load_rows(str(tmp_path / str(n)), ["a"])[1])
    assert prints[0] != prints[1]


# -- numbers

PROGRAMS = ("sft", "dpo", "kto", "reward", "ppo", "grpo", "evaluate", "judge")


@pytest.mark.parametrize("script", PROGRAMS)
def test_a_number_that_no_flag_can_mean_is_refused_first(script, capsys, tmp_path, monkeypatch):
    """Every numeric flag of every script: infinite, not a number, a negative count, a seed beyond what torch takes."""
    monkeypatch.chdir(tmp_path)  # nothing is there, neither adapters nor data: the number comes first
    program = importlib.import_module(script)
    hints, tried = typing.get_type_hints(program.Args), 0
    for field in dataclasses.fields(program.Args):
        kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
        values = [math.inf, math.nan] * (float in kinds) + [-1] * (int in kinds) + [10**20] * (field.name == "seed")
        for value in values:
            with pytest.raises(SystemExit) as stop:
                program.main(program.Args(**{field.name: value}))
            error = capsys.readouterr().err
            assert stop.value.code == 2 and str(value) in error and f"--{field.name.replace('_', '-')} " in error, error
            assert len(error.strip().splitlines()) == 1
            tried += 1
    assert tried >= 4 and not any(tmp_path.iterdir())


def test_json_has_no_infinity(tmp_path):
    """What we write is JSON for everybody; the place of a number that isn't is named, and the old file stays."""
    common.write_json(tmp_path / "x.json", {"a": 1})
    for value in (math.inf, -math.inf, math.nan):
        with pytest.raises(FloatingPointError, match=f"metrics/1/loss is {value}"):
            common.write_json(tmp_path / "x.json", {"metrics": [1.0, {"loss": value}]})
    assert common.read_json(tmp_path / "x.json") == {"a": 1} and len([*tmp_path.iterdir()]) == 1
    assert common.nulled({"a": [1.0, math.nan, "x", (math.inf,)], "b": True}) == {"a": [1.0, None, "x", [None]], "b": True}
