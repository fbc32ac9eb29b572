"""People's data: layouts and files that are read, what is held out, which prompts go where, rewards, previews."""
import csv
import datetime
import gzip
import json
import os
import re
from pathlib import Path

import datasets
import pytest
import transformers

import chat
import common
import inputs
import dpo
import grpo
import kto
import ppo
import reward
import sft
from conftest import part_of, write_jsonl

REPO = Path(__file__).parent.parent


def user(text, **keys):
    return {"role": "user", "content": text, **keys}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


# -- rows are what the file says ------------------------------------------------------------------

ODD = [{"day": "2024-01-05", "n": 3, "x": 1.0, "big": 2**70, "mixed": "1", "emoji": "\U0001f600"},
       {"day": "2024-01-06T10:00:00Z", "n": 4, "x": 0.1, "mixed": 1, "late": {"key": [None, True]}}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.json.gz", "set[1]/train.jsonl"])
def test_rows_are_what_the_file_says(tmp_path, name):
    """Dates, numbers of any size, a column whose type changes, columns and keys that come late, brackets in a path."""
    lines = "\ufeff" + "\r\n\n".join(map(json.dumps, ODD))
    text = lines if ".jsonl" in name else json.dumps(ODD, indent=1)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    rows, _ = inputs.load_rows(str(path))
    assert list(rows) == ODD
    assert [[type(v) for v in row.values()] for row in rows] == [[type(v) for v in row.values()] for row in ODD]
    if "[" in name:
        assert list(inputs.load_rows(f"{path.parent}:train")[0]) == ODD


def test_a_large_file_whose_columns_drift(tmp_path):
    long = "why read books " * 100
    rows = [{"messages": [user(f"{i} {long}"), assistant("x")], "source": None} for i in range(9000)]
    rows[8000]["messages"][1]["name"], rows[8500]["source"], rows[8999]["meta"] = "bob", "web", {"a": 1}
    loaded, _ = inputs.load_rows(write_jsonl(tmp_path / "x.jsonl", rows))
    assert os.path.getsize(tmp_path / "x.jsonl") > 10 << 20
    assert len(loaded) == 9000 and all(loaded[i] == rows[i] for i in (0, 8000, 8500, 8999))


def test_values_of_csv_are_text_and_of_parquet_what_they_are(tmp_path):
    (tmp_path / "x.csv").write_text('prompt,answer\r\n"why,\nindeed",007\r\nhow,2024-01-05\r\n')
    assert list(inputs.load_rows(str(tmp_path / "x.csv"))[0]) == [
        {"prompt": "why,\nindeed", "answer": "007"}, {"prompt": "how", "answer": "2024-01-05"}]
    table = {"day": [datetime.date(2024, 1, 5), None], "n": [1, 2], "x": [0.5, float("nan")], "m": [[user("a")], []]}
    datasets.Dataset.from_dict(table).to_parquet(str(tmp_path / "x.parquet"))
    assert list(inputs.load_rows(str(tmp_path / "x.parquet"))[0]) == [
        {"day": "2024-01-05", "n": 1, "x": 0.5, "m": [user("a")]}, {"day": None, "n": 2, "x": None, "m": []}]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_replaced_file_of_the_same_time_is_read_anew(tmp_path, suffix):
    """The fingerprint is of the rows that were read."""
    seen = []
    for word in ("first", "other"):
        path = tmp_path / f"x{suffix}"
        if suffix == ".parquet":
            datasets.Dataset.from_list([{"prompt": word}]).to_parquet(str(path))
        else:
            path.write_text(f"prompt\n{word}\n" if suffix == ".csv" else json.dumps({"prompt": word}))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        rows, fingerprint = inputs.load_rows(str(path))
        assert list(rows) == [{"prompt": word}]
        seen.append(fingerprint)
    assert len({*seen}) == 2


SPLITS = {  # files, source, those that are read
    "by name": (["train.jsonl", "test.jsonl"], "", ["train.jsonl"]),
    "shards in order": (["data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl",
                         "data/test-00000-of-00001.jsonl"],
                        ":train", ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]),
    "by folder": (["train/a.jsonl", "test/a.jsonl", "train/b.jsonl"], "", ["train/a.jsonl", "train/b.jsonl"]),
    "a word of the name": (["my-train_v2.jsonl", "my-test_v2.jsonl"], "", ["my-train_v2.jsonl"]),
    "held-out beside": (["c.jsonl", "c_heldout.jsonl"], "", ["c.jsonl"]),
    "no train by name": (["b.jsonl", "a.jsonl", "dev.jsonl", "x_held_out.jsonl", "VALID.jsonl"], "",
                         ["a.jsonl", "b.jsonl"]),
    "the whole name first": (["train_sft.jsonl", "train_gen.jsonl"], ":train_gen", ["train_gen.jsonl"]),
    "training data for testing": (["train_heldout.jsonl", "x.jsonl"], ":train", ["x.jsonl"]),
    "not cards": (["train.jsonl", "dataset_info.json", ".cache/train.jsonl"], "", ["train.jsonl"]),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_splits_of_a_directory(tmp_path, capsys, kind):
    files, split, wanted = SPLITS[kind]
    for name in files:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "set" / name, [{"prompt": name}, {"prompt": name + "!"}])
    rows, fingerprint = inputs.load_rows(f"{tmp_path}/set{split}")
    assert [row["prompt"] for row in rows] == [name + end for name in wanted for end in ("", "!")]
    assert f"{tmp_path}/set{split}: {', '.join(wanted)}\n" == capsys.readouterr().out
    for name in {*files} - {*wanted}:
        (tmp_path / "set" / name).unlink()
    assert inputs.load_rows(f"{tmp_path}/set{split}")[1] == fingerprint  # of nothing but what is read


def test_the_held_out_split_of_a_directory(tmp_path):
    for files, wanted in ((["train.jsonl", "test.jsonl"], "test"), (["c.jsonl", "c_heldout.jsonl"], "heldout"),
                          (["train.jsonl", "validation.jsonl"], "validation"), (["a.jsonl"], None)):
        directory = tmp_path / "-".join(files)
        directory.mkdir()
        for name in files:
            write_jsonl(directory / name, [{}])
        assert inputs.heldout_source(str(directory), None) == (wanted and f"{directory}:{wanted}")
    assert inputs.heldout_source("org/name:main/train_sft", None) == "org/name:main/test_sft"


# -- layouts --------------------------------------------------------------------------------------

CHAT = [user("What colour is the sky?"), assistant("Blue.")]
SHAREGPT = [{"from": "human", "value": CHAT[0]["content"]}, {"from": "gpt", "value": "Blue."}]
CONVERSATIONS = {  # name in the printed line: a row that gives CHAT
    "messages": {"messages": CHAT, "extra": 5},
    "messages (messages)": {"messages": json.dumps(CHAT)},
    "prompt and completion": {"prompt": CHAT[0]["content"], "completion": "Blue.", "id": 1},
    "prompt and completion (prompt, completion)": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "ShareGPT conversations": {"conversations": SHAREGPT},
    "ShareGPT conversations (conversations)": {"conversations": json.dumps(SHAREGPT)},
    "Alpaca instructions": {"instruction": CHAT[0]["content"], "input": "", "output": "Blue."},
    "Alpaca instructions (instruction, output)": {"instruction": CHAT[0]["content"], "input": None, "output": "Blue."},
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_layouts_of_conversations(capsys, name):
    row = CONVERSATIONS[name]
    assert inputs.recognise([row], "x", "chat") == "chat"
    assert capsys.readouterr().out.startswith(f"x: 1 rows, {name}")
    assert sft.conversation(row, "") == (CHAT, "all")
    assert inputs.as_prompts(row, "") == [CHAT[:1]] and inputs.as_prompt(row, "") == CHAT[:1]
    given = {**row, "system": "Be brief."}
    assert sft.conversation(given, "")[0] == [{"role": "system", "content": "Be brief."}, *CHAT]
    assert given == {**row, "system": "Be brief."}  # not changed


def test_alpaca_joins_its_input():
    row = {"instruction": "Name the colour.", "input": "the sky", "output": "Blue."}
    assert inputs.as_conversation(row, "")[0]["content"] == "Name the colour.\n\nthe sky"


PAIR = (CHAT[:1], "Blue.", "Green.")
GREEN = [CHAT[0], assistant("Green.")]
PAIRS = {
    "preference pairs with a prompt column": {"prompt": CHAT[0]["content"], "chosen": "Blue.", "rejected": "Green."},
    "preference pairs with a prompt column (": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": GREEN[1:]},
    "preference pairs with a prompt column (prompt": {"prompt": "not read", "chosen": CHAT, "rejected": GREEN},
    "preference pairs, the prompt inside": {"chosen": CHAT, "rejected": GREEN},
    "preference pairs, the prompt inside both answers": {
        "chosen": CHAT[0]["content"] + " Blue.", "rejected": CHAT[0]["content"] + " Green."},
    "preference pairs after a conversation": {
        "conversations": SHAREGPT[:1], "chosen": SHAREGPT[1],
        "rejected": {"from": "gpt", "value": "Green."}},
    "preference pairs of instructions": {
        "instruction": CHAT[0]["content"], "input": "", "chosen": "Blue.", "rejected": "Green."},
}


@pytest.mark.parametrize("name", PAIRS)
def test_layouts_of_pairs(capsys, name):
    row = PAIRS[name]
    assert inputs.recognise([row], "x", "pair") == "pair"
    assert capsys.readouterr().out.startswith(f"x: 1 rows, {name}")
    prompt, chosen, rejected = inputs.as_pair(row, "")
    if isinstance(row["chosen"], str) and "prompt" not in row and "instruction" not in row:  # the space is the answer's
        chosen, rejected = chosen.removeprefix(" "), rejected.removeprefix(" ")
    assert (prompt, chosen, rejected) == PAIR
    assert kto.answers_of(row, "")[0] == inputs.as_prompt(row, "") == CHAT[:1]
    assert sft.conversation(row, "")[1] == "last"
    if "both answers" not in name:  # whose texts have no place for it
        prompt, *answers = inputs.as_pair({**row, "system": "Be brief."}, "")
        assert prompt == [{"role": "system", "content": "Be brief."}, *CHAT[:1]] and answers == ["Blue.", "Green."]


def test_documented_rows_are_read():
    """Every JSON row of docs/data-formats.md, by the scripts of its section."""
    text = (REPO / "docs" / "data-formats.md").read_text()
    counts = {}
    for section in text.split("\n## ")[1:]:
        for block in re.findall(r"```json\n(.*?)```", section, re.S):
            for row in map(json.loads, block.splitlines()):
                kind = inputs.recognise([row], "x", "chat", "pair", "label", "prompt")
                counts[kind] = counts.get(kind, 0) + 1
                inputs.as_prompt(row, "")
                {"chat": sft.conversation, "pair": inputs.as_pair, "label": kto.answers_of,
                 "prompt": inputs.as_prompts}[kind](row, "")
    assert counts == {"chat": 4, "pair": 6, "label": 1, "prompt": 2}


def test_rows_with_labels_are_not_taken_for_good_answers(sft_args, tmp_path, capsys):
    rows = [{"prompt": f"why {i}", "completion": "bad", "label": False} for i in range(20)]
    data = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(SystemExit) as stop:
        sft.main(sft.Args(**{**sft_args, "data": data, "out": str(tmp_path / "run")}))
    assert stop.value.code == 2 and "x.jsonl: answers with a label, with the columns" in capsys.readouterr().err


# -- training on each layout, splits, notices -----------------------------------------------------

def preview(script, args, capsys, monkeypatch, **changes):
    """What --preview 2 prints; it ends with exit code 0, and loads no model."""
    def loads(*args, **kwargs):
        raise AssertionError("a model was loaded")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loads)
        script.main(script.Args(**{**args, "preview": 2, **changes}))
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return printed.out


def test_a_preview_shows_rows_and_what_would_be_dropped(sft_args, tmp_path, capsys, monkeypatch):
    rows = [{"messages": [user(f"why {i}"), assistant(f"because {i}")]} for i in range(30)]
    for i in range(10):
        rows[i] = [{"messages": None}, {"messages": [user(f"why {i}"), assistant(" ")]}][i % 2]
    data = write_jsonl(tmp_path / "x.jsonl", rows)
    out = preview(sft, sft_args, capsys, monkeypatch, data=data, out=str(tmp_path / "run"))
    assert len(re.findall(r"-- example \d, \d+ tokens, \d+ of them trained", out)) == 2
    assert len(re.findall(r"⟦because \d+<\|im_end\|>⟧", out)) == 2
    first_two = re.search(r"would be dropped: row (\d+) \((.*?)\), row (\d+) \((.*?)\) and \d+ more", out)
    assert {first_two[2], first_two[4]} <= {"null messages", "empty answer"}
    assert {int(first_two[1]), int(first_two[3])} < {*range(10)}
    assert "nothing is trained" in out and [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("script", [dpo, reward, kto, ppo, grpo])
def test_every_script_has_a_preview(script, request, tmp_path, capsys, monkeypatch):
    args = request.getfixturevalue(f"{script.__name__}_args")
    if script is dpo:
        args = {**args, "sft_adapter": request.getfixturevalue("sft_run")}
    out = preview(script, args, capsys, monkeypatch, out=str(tmp_path / "run"))
    assert len(re.findall(r"-- (example|prompt) [12], \d+ tokens", out)) == 2 and not list(tmp_path.iterdir())


def test_fifty_pairs_are_enough(sft_run, tiny_model, tmp_path, capsys):
    """Preference pairs in CSV without a held-out file, defaults that ask for more: all four methods train, on prompts
    that no other part and no held-out set has."""
    data = tmp_path / "x.csv"
    rows = [{"prompt": f"why {i}", "chosen": f"because {i}", "rejected": f"no {i}"} for i in range(50)]
    with open(data, "w", newline="") as f:
        writer = csv.DictWriter(f, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    small = dict(data=str(data), device="cpu", micro_tokens=1024)
    offline = dict(dtype="float32", max_length=128, **small)
    scorer = dict(model=tiny_model, quantization="none", results=str(tmp_path), **offline)
    runs = {"rm_v1": (reward, scorer),
            "rm_watch": (reward, dict(part="J", **scorer)),
            "dpo": (dpo, dict(sft_adapter=sft_run, eos_tokens=4, **offline)),
            "kto": (kto, dict(sft_adapter=sft_run, eos_tokens=4, **offline)),
            "ppo": (ppo, dict(sft_adapter=sft_run, reward_adapter=str(tmp_path / "rm_v1"),
                              watch_adapter=str(tmp_path / "rm_watch"),
                              updates=1, completion_tokens=4, prompt_tokens=64, epochs=1, dtype="float32",
                              results=str(tmp_path), **small))}
    prompts = {}
    for name, (script, args) in runs.items():
        script.main(script.Args(**args, out=str(tmp_path / name)))
        prompts[name] = json.loads((tmp_path / name / "prompts.json").read_text())
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert record["data"]["heldout"] == "4 prompts of train by sha256"
    out = capsys.readouterr().out
    assert "note: no held-out rows beside" in out and "4 of its 50 rows are held out" in out
    assert re.search(r"note: \d+ usable prompts: \d fixed prompts, not 64, and \d+ completions per update, not 64", out)
    ids = {i: inputs.prompt_id([user(f"why {i}")]) for i in range(50)}
    held = inputs.load_heldout(str(data), None, inputs.load_rows(str(data))[0]).prompts
    heldout = {inputs.prompt_id(p) for p in held}
    for name in ("dpo", "kto", "rm_v1", "rm_watch"):
        assert {*prompts[name]["heldout"]} == {inputs.prompt_id(p) for p in held if not inputs.is_judge_prompt(p)}
    parts = {part: {ids[i] for i in range(50) if part_of([user(f"why {i}")]) == part} - heldout for part in "AJB"}
    assert {*prompts["dpo"]["train"]} == {*prompts["rm_v1"]["train"]} == {*prompts["kto"]["train"]} == parts["A"]
    assert {*prompts["rm_watch"]["train"]} == parts["J"]
    assert {*prompts["ppo"]["train"]} | {*prompts["ppo"]["heldout"]} == parts["B"]
    assert all(len(ids) > 3 for ids in parts.values())


def chats(n, text="because"):
    return [{"messages": [user(f"why {i}"), assistant(f"{text} {i}")]} for i in range(n)]


def loaded(sft_args, tiny_model, data, **changes):
    args = sft.Args(**{**sft_args, "data": data, "rows": 1000, "heldout_rows": 1000, **changes})
    build = sft.build_examples(chat.load_tokenizer(tiny_model), args)
    return inputs.load_split(args, ["chat", "pair"], sft.conversation, build)


def test_the_sources_of_the_used_rows_are_counted(sft_args, tiny_model, tmp_path):
    """Of the rows that are trained on, by their column `source`: none for a row without it, none of what was left out."""
    train = [row | source for row, source in zip(chats(6), [{"source": "a"}] * 2 + [{"source": "b"}] * 3 + [{}])]
    train += [{"messages": [user("why 100"), assistant("so")], "source": "left out"}]
    write_jsonl(tmp_path / "x_heldout.jsonl", [{"messages": [user("why 100"), assistant("no")], "source": "c"}])
    split = loaded(sft_args, tiny_model, write_jsonl(tmp_path / "x.jsonl", train))
    assert split.sources == {"train": {"a": 2, "b": 3}, "heldout": {"c": 1}}


def test_training_rows_with_a_held_out_prompt_are_left_out(sft_args, tiny_model, tmp_path, capsys):
    """By the prompt before any of its answers, under any system message; also where the file itself is given again."""
    train = chats(30) + [{"messages": [{"role": "system", "content": "Be brief."}, user("why 100"), assistant("so")]},
                         {"messages": [user("hello"), assistant("hi"), user("how 101"), assistant("so")]}]
    heldout = [*chats(3, "for"), {"messages": [user("why 100"), assistant("no")]},
               {"messages": [user("hello"), assistant("hi"), user("how 101"), assistant("no")]}]
    data, held = write_jsonl(tmp_path / "x.jsonl", train), write_jsonl(tmp_path / "x_heldout.jsonl", heldout)
    split = loaded(sft_args, tiny_model, data)
    assert sorted(split.row_indices) == [*range(3, 30)] and len(split.heldout) == 5
    assert f"note: 5 rows of {data} are left out of training" in capsys.readouterr().out
    for given, rows in ((data, train), (held, heldout)):  # all of the training prompts
        split = loaded(sft_args, tiny_model, write_jsonl(tmp_path / "y.jsonl", rows), heldout_data=given)
        printed = capsys.readouterr().out
        assert "WARNING: all prompts of" in printed and "are held out, by hash" in printed
        assert len(split.train) + len(split.heldout) == len(rows)
        assert not {*split.prompts["train"]} & {*split.prompts["heldout"]}


def test_prompts_that_all_share_a_turn_leave_parts_empty(sft_args, tiny_model, tmp_path, capsys):
    """They are in one part; the others say why they have none."""
    first = [user("What is the capital of France, please?"), assistant("Paris")]
    rows = [{"prompt": [*first, user(f"and {i}?")], "chosen": "a", "rejected": "b"} for i in range(30)]
    data = write_jsonl(tmp_path / "x.jsonl", rows)
    args = reward.Args(data=data, max_length=128)
    failed = 0
    for part in "AJB":
        try:
            inputs.load_split(args, ["pair"], inputs.as_pair, lambda pairs, names: pairs, part)
        except SystemExit:
            failed += f"no row is in part {part}: prompts that share a user turn" in capsys.readouterr().err
    assert failed == 2


def test_a_share_is_held_out_by_hash(sft_args, tiny_model, tmp_path):
    """5 % of the prompts, whatever the order and --heldout-rows; rows of one prompt stay together."""
    rows = chats(400) + chats(400, "since")
    first, second = (loaded(sft_args, tiny_model, write_jsonl(tmp_path / f"{i}.jsonl", r), heldout_rows=n)
                     for i, (r, n) in enumerate(((rows, 1000), (rows[::-1], 7))))
    assert len(first.heldout) == 40 and len(first.train) == 760 and len(second.heldout) == 7
    assert {*first.prompts["train"]} == {*second.prompts["train"]} and len(first.prompts["heldout"]) == 20
    assert {*second.prompts["heldout"]} <= {*first.prompts["heldout"]}
    assert first.fingerprints["heldout"] == "20 prompts of train by sha256"


def test_what_is_ignored_is_said(sft_args, tiny_model, tmp_path, capsys):
    """A system column and train / weight are honoured; tools, reasoning and other weights are named with a count."""
    rows = [{"system": "You read books.", "tools": [{"name": "f"}], "weight": 1, "messages": [
        user(f"why {i}"), assistant("WRONG", weight=0), user("and"),
        assistant(f"right {i}", reasoning_content="so", weight=1)]} for i in range(10)]
    rows += [{"tools": None, "messages": [user(f"how {i}"), assistant("WRONG", train=False)]} for i in range(2)]
    rows[3]["messages"][3]["weight"] = 0.5
    rows[4]["weight"] = 0
    rows[5]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    data = write_jsonl(tmp_path / "x.jsonl", rows)
    write_jsonl(tmp_path / "x_heldout.jsonl", [{"messages": [user("other"), assistant("x")]}])
    split = loaded(sft_args, tiny_model, data, max_dropped=0.2)
    tokenizer = chat.load_tokenizer(tiny_model)
    trained = sorted(tokenizer.decode(c.example.targets) for c in split.train)
    assert trained == [f"right {i}<|im_end|>" for i in range(10)]
    systems = ["Be brief." if split.row_indices[k] == 5 else "You read books." for k in range(10)]
    assert [c.prompt[0]["content"] for c in split.train] == systems and split.dropped == {"no answer to train": 2}
    line = next(line for line in capsys.readouterr().out.splitlines() if "not used" in line)
    assert line == (f"note: {data}: not used: a weight of messages besides 0 and 1 (1 rows), column system (1 rows), "
                    f"column tools (10 rows), column weight (1 rows), reasoning_content of messages (10 rows)")


# -- GRPO's reward functions ----------------------------------------------------------------------

def scores(path, source, rows, texts, **stopped):
    """Scores of a task file's rewards for one answer to each row."""
    path.write_text(source)
    task = grpo.load_task(grpo.Args(task=str(path)))
    answered = []
    for i, (row, text) in enumerate(zip(rows, texts)):
        prompt, seen = task.read(row, f"row {i}")
        completion = common.Completion([5, 6], [0.0] * 2, stopped.get(f"row{i}", "eos"), text)
        answered.append((grpo.Problem(i, inputs.prompt_id(prompt), [1], "", seen), completion))
    return grpo.score(task, answered)


TEXT_ROWS = [{"prompt": "1 + 1", "answer": "2"}, {"prompt": "2 + 2", "answer": "4"}]
CHAT_ROWS = [{**row, "prompt": [user(row["prompt"])]} for row in TEXT_ROWS]
VERL_ROWS = [{"data_source": "sums", "prompt": [user("1 + 1")], "reward_model": {"style": "rule", "ground_truth": "2"},
              "extra_info": {"index": 7}}, {"data_source": "sums", "prompt": "2 + 2", "ground_truth": "4"}]
REWARDS = {  # source, rows, answers "2" and "5": expected rewards, expected parts of the first
    "ours": ("def reward(row, completion):\n    return float(completion == row['answer'])", TEXT_ROWS, [1.0, 0.0], {}),
    "ours in parts": ("def reward(row, text):\n    return {'correct': float(text == row['answer']), 'short': 0.1}",
                      CHAT_ROWS, [1.1, 0.1], {"correct": 1.0, "short": 0.1}),
    "TRL on texts": ("def reward(completions, answer, **kwargs):\n"
                     "    return [float(c == a) for c, a in zip(completions, answer)]",
                     TEXT_ROWS, [1.0, 0.0], {}),
    "TRL on messages": ("def accuracy(completions, answer, **kwargs):\n"
                        "    assert all(c[0]['role'] == 'assistant' and len(c) == 1 for c in completions)\n"
                        "    return [float(c[0]['content'] == a) for c, a in zip(completions, answer)]\n"
                        "reward_funcs = accuracy",
                        CHAT_ROWS, [1.0, 0.0], {}),
    "TRL without a column of prompts": (
        "def reward_funcs(prompts, completions, answer, **kwargs):\n"
        "    assert prompts[1] == [{'role': 'user', 'content': '2 + 2'}]\n"
        "    return [float(c[0]['content'] == a) for c, a in zip(completions, answer)]",
        [{"messages": CHAT_ROWS[0]["prompt"], "answer": "2"},  # the first without an answer, the second with one
         {"messages": [*CHAT_ROWS[1]["prompt"], {"role": "assistant", "content": "?"}], "answer": "4"}], [1.0, 0.0], {}),
    "TRL with prompts and None": (
        "def reward_funcs(prompts, completions, completion_ids, **columns):\n"
        "    assert sorted(columns) == ['answer'] and completion_ids == [[5, 6]] * 2\n"
        "    return [None if p == '2 + 2' else 0.5 for p in prompts]", TEXT_ROWS, [0.5, 0.0], {}),
    "a list of TRL's": (
        "def accuracy(completions, answer):\n    return [float(c == a) for c, a in zip(completions, answer)]\n"
        "def length(completions, **kwargs):\n    return [None if c == '2' else len(c) / 2 for c in completions]\n"
        "reward_funcs = [accuracy, length]", TEXT_ROWS, [1.0, 0.5], {"accuracy": 1.0}),
    "verl": ("def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
             "    assert data_source == 'sums' and extra_info in (None, {'index': 7})\n"
             "    return float(solution_str == ground_truth)", VERL_ROWS, [1.0, 0.0], {}),
    "verl's dict": ("def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
                    "    return {'score': 2.0 * (solution_str == ground_truth), 'acc': 1, 'pred': 'x'}", VERL_ROWS,
                    [2.0, 0.0], {}),
}


@pytest.mark.parametrize("kind", REWARDS)
def test_reward_functions(tmp_path, kind):
    source, rows, expected, parts = REWARDS[kind]
    found = scores(tmp_path / "task.py", source, rows, ["2", "5"])
    assert [s.reward for s in found] == pytest.approx(expected) and found[0].parts == pytest.approx(parts)
    overlong = scores(tmp_path / "task.py", source, [*rows, *rows], ["2", "5", "2", "2"], row2="length", row3="length")
    assert overlong == [*found, grpo.Score(0.0, {}), grpo.Score(0.0, {})]  # not asked


@pytest.mark.parametrize("source, rows, parts", [
    ("def reward(completions, gold, **kwargs):\n    return [1.0] * len(completions)", TEXT_ROWS, ["row 0: no gold"]),
    ("def compute_score(data_source, solution_str, ground_truth):\n    return 1.0", TEXT_ROWS,
     ["row 0: no ground_truth"]),
    ("def one(row, completion):\n    return 1.0\nreward_funcs = [one, one]", TEXT_ROWS,
     ["a list of functions is TRL's", "row, completion"]),
    ("reward_funcs = []", TEXT_ROWS, ["no function reward(row, completion)"])])
def test_reward_files_that_cannot_serve(tmp_path, capsys, source, rows, parts):
    with pytest.raises(SystemExit) as stop:
        scores(tmp_path / "task.py", source, rows, ["2", "5"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not [part for part in parts if part not in error], error


@pytest.mark.parametrize("source, parts", [
    ("def reward(completions, **kwargs):\n    return [1.0]",
     ["reward() of --task task", "1 rewards for 2 completions"]),
    ("def reward(completions, **kwargs):\n    return [float('nan')] * 2", ["must be finite"]),
    ("def reward_funcs(completions, **kwargs):\n    return 1 / 0",
     ["reward_funcs()", "ZeroDivisionError", "line 2", "rows 0, 1"]),
    ("def reward(completions, **kwargs):\n    raise SystemExit(3)", ["SystemExit: 3"]),
    ("def reward(row, completion):\n    raise SystemExit(3)", ["reward() of --task task", "SystemExit: 3"]),
    ("def reward(row, completion):\n    return 'good'", ["must be a number or a dict of numbers, got 'good'"]),
    ("def reward(row, completion):\n    return {'correct': None}", ["must be a number or a dict of numbers, got {'correct'"])])
def test_a_function_that_fails_ends_the_run(tmp_path, source, parts):
    errors = scores(tmp_path / "task.py", source, TEXT_ROWS, ["2", "5"])
    assert all(isinstance(e, str) and all(part in e for part in parts) for e in errors), errors


def test_the_documented_reward_functions_run(tmp_path):
    text = (REPO / "docs" / "data-formats.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    rewards = [scores(tmp_path / f"task{i}.py", block, rows, ["2", "5"])
               for i, (block, rows) in enumerate(zip(blocks, (TEXT_ROWS, CHAT_ROWS, VERL_ROWS), strict=True))]
    assert [[s.solved for s in found] for found in rewards] == [[True, False]] * 3


def test_dates_reach_the_reward_and_the_results_as_text(grpo_args, tmp_path):
    """A column of ISO dates: reward() sees the file's texts, and the run writes its results."""
    rows = [{"prompt": f"which day is {i}", "answer": f"2024-01-{i + 1:02d}"} for i in range(20)]
    (tmp_path / "task.py").write_text("def reward(row, completion):\n    assert row['answer'].startswith('2024-01-')\n"
                                      "    return float(len(completion) % 2)\n")
    out = tmp_path / "run"
    grpo.main(grpo.Args(**{**grpo_args, "task": str(tmp_path / "task.py"),
                           "data": write_jsonl(tmp_path / "g.jsonl", rows),
                           "updates": 1, "eval_every": 0, "results": str(tmp_path / "results"), "out": str(out)}))
    written = [json.loads(line)["row"] for line in (out / "completions.jsonl").read_text().splitlines()]
    assert written and all(row in rows for row in written)
    listed = json.loads((out / "prompts.json").read_text())
    assert not {*listed["train"]} & {*listed["heldout"]} and len(listed["train"]) >= 4


def test_null_rows_of_a_task_are_counted(grpo_args, tmp_path, capsys, monkeypatch):
    rows = [{"prompt": None if i == 3 else f"why {i}"} for i in range(40)]
    (tmp_path / "task.py").write_text("def reward(row, completion):\n    return 1.0\n")
    data = write_jsonl(tmp_path / "g.jsonl", rows)
    args = {**grpo_args, "task": str(tmp_path / "task.py"), "data": data, "updates": 20}
    assert "dropped 1 (null prompt)" in preview(grpo, args, capsys, monkeypatch, out=str(tmp_path / "run"))
