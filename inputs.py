"""What a run reads: rows of any usual file or hub data set, their layouts, the held-out split, the preflight.

In the order a run meets them:
  1. files and hub data sets -> rows, each a dict as the file says, and the fingerprint of the bytes that were read
  2. the layouts of rows (docs/data-formats.md) -> messages, pairs, prompts
  3. splits: parts A, J and B of the prompts, held-out rows, the rows of a run (`load_split`)
  4. what a method starts from: a model, a run of ours or any plain PEFT LoRA adapter
  5. the preflight: what will be trained on, printed and checked before a model loads
"""
from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from chat import OWN_TEMPLATE, has_plain_markers, load_tokenizer
from common import (Degenerate, Example, QWEN, TrainInvariants, bucket, check_base, fail, leave_ranks, permutation,
                    read_adapter, read_policy, resolve_model, say, sha256_json)

# What is appended to a GSM8K question by grpo.py and by evaluate.py's zero-shot GSM8K [volcengine/verl's baseline].
GSM8K_PROMPT = ' Let\'s think step by step and output the final answer after "####".'


# Reading files. A row is what the file says: dates stay text, numbers stay numbers, and a column may begin or change
# its type in any row. The fingerprint is of the very bytes that the rows were parsed from.

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
HELDOUT_WORDS = {"heldout", "held", "test", "validation", "valid", "val", "dev", "eval", "evaluation"}
CARDS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # about data sets, not rows


class Rows(Sequence):
    """Rows of a data set, dicts that are parsed when they are asked for: 5,000 of 200,000 rows cost what 5,000 do."""

    def __init__(self, n: int, read: Callable[[int], dict]):
        self.n, self.read = n, read

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.n:
            raise IndexError(i)
        return self.read(i)

    def subset(self, indices: Sequence[int]) -> Rows:
        return Rows(len(indices), lambda i: self[indices[i]])


def load_rows(source: str, columns: Sequence[str] = (), guessed: bool = False) -> tuple[Rows, str]:
    """Rows of a local file, a local directory or a hub data set (docs/data-formats.md), and their fingerprint.

    source: a file of DATA_SUFFIXES, `directory[:split]` or `org/name[@revision][:[config/]split]`; without a split,
    train. The fingerprint is a content hash for local files (decompressed; row order is part of it), id + commit +
    split for the hub. Fails on a source that is missing, unreadable or empty, or whose first row lacks a column; a line
    that is no JSON object fails when it is read, by file and line. guessed: raises UnknownSplit where the hub has no
    such split.
    """
    path, split = Path(source), None
    if not path.exists() and ":" in source:
        name, split = source.rsplit(":", 1)
        path = Path(name)
    if path.is_file():
        rows, digest = read_file(path)
        fingerprint = f"sha256:{digest}"
    elif path.is_dir():
        try:
            files = split_files(path, split or "train")
        except OSError as e:
            fail(f"can't read the data set {source}: {e}")
        if not files:
            fail(f"can't read the data set {source}: no {'/'.join(DATA_SUFFIXES)} file of the split {split or 'train'}")
        say(f"{source}: {', '.join(str(f.relative_to(path)) for f in files)}")
        parts, digests = zip(*map(read_file, files))
        starts = np.cumsum([0, *map(len, parts)])

        def read(i: int) -> dict:
            part = int(starts.searchsorted(i, "right")) - 1
            return parts[part][i - int(starts[part])]
        rows = Rows(int(starts[-1]), read)
        fingerprint = "sha256:" + sha256_json([[f.relative_to(path).as_posix(), d] for f, d in zip(files, digests)])
        fingerprint += f":{split or 'train'}"
    elif source.endswith(DATA_SUFFIXES) or source[0] in "./~" or source.partition(":")[0].count("/") != 1:
        fail(f"no such data file: {source} (give a {'/'.join(DATA_SUFFIXES)} file, a directory or org/name)")
    else:
        try:
            rows, fingerprint = hub_rows(source)
        except UnknownSplit as e:
            if guessed:
                raise
            fail(f"can't read the data set {source}: {e}")
    if not len(rows):
        fail(f"the data set {source} has no rows")
    if missing := [c for c in columns if c not in rows[0]]:
        fail(f"{source}: rows have no column {', '.join(map(repr, missing))}; they have {', '.join(rows[0])}")
    return rows, fingerprint


def read_file(path: Path) -> tuple[Rows, str]:
    """(rows, hex sha256 of the bytes that they are parsed from, decompressed) of one file of DATA_SUFFIXES."""
    name, digest = str(path), hashlib.sha256()
    if not name.endswith(DATA_SUFFIXES):
        fail(f"{path}: want one of {', '.join(DATA_SUFFIXES)}")
    try:
        with (gzip.open if name.endswith(".gz") else open)(path, "rb") as f:
            lines = [f.read()] if name.endswith(".parquet") else list(f)
        for line in lines:
            digest.update(line)
        if name.endswith(".parquet"):
            import pyarrow.parquet
            rows = table_rows(pyarrow.parquet.read_table(pyarrow.BufferReader(lines[0])))
        elif name.removesuffix(".gz").endswith(".csv"):
            rows = csv_rows(b"".join(lines))
        else:
            rows = json_rows(lines, name)
    except Exception as e:  # every reader raises its own kind: one message that says which file and why
        fail(f"can't read the data set {path}: {(str(e).strip().splitlines() or [repr(e)])[0]}")
    return rows, digest.hexdigest()


def json_rows(lines: list[bytes], name: str) -> Rows:
    """Rows of JSON Lines, each parsed when it is read, or of one JSON array of objects."""
    if b"".join(lines[:8]).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        array = parse_json(b"".join(lines), name)
        if wrong := [i for i, row in enumerate(array) if not isinstance(row, dict)]:
            raise ValueError(f"item {wrong[0]} of the array is no object: {str(array[wrong[0]])[:80]!r}")
        return Rows(len(array), array.__getitem__)
    numbers = [n for n, line in enumerate(lines) if line.strip()]

    def read(i: int) -> dict:
        where = f"{name}, line {numbers[i] + 1}"
        row = parse_json(lines[numbers[i]], where)
        return row if isinstance(row, dict) else fail(f"can't read the data set {where}: no object: {str(row)[:80]!r}")
    return Rows(len(numbers), read)


def parse_json(text: bytes, where: str) -> Any:
    """A JSON value, strictly: no NaN or Infinity, and no half of a surrogate pair, which can't be hashed or written."""
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON; write null")
    try:
        value = json.loads(text, parse_constant=refuse)
        if re.search(rb"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as e:
        fail(f"can't read the data set {where}: {e}")


def csv_rows(content: bytes) -> Rows:
    """Rows of comma-separated values under a header; every value is text."""
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num} has more values than the header has columns")
        rows.append(row)
    return Rows(len(rows), rows.__getitem__)


def table_rows(table) -> Rows:
    """Rows of a pyarrow table as plain JSON values: dates, decimals and bytes become text, NaN becomes null."""
    def read(i: int) -> dict:
        row = table.slice(i, 1).to_pylist()[0]
        return json.loads(json.dumps(row, default=str), parse_constant=lambda constant: None)
    return Rows(table.num_rows, read)


def split_files(directory: Path, split: str) -> list[Path]:
    """The data files of one split of a directory, in order of name.

    A file belongs to the split that its name, without its shard number (train-00000-of-00002.parquet), or its folder
    names; if no file's does, to the splits named by a word of its name (my_train.jsonl). Where no file names "train",
    train is all files without a held-out word. So x_heldout.jsonl is in no training split.
    """
    files = sorted(p for p in directory.rglob("*")
                   if p.is_file() and p.name.endswith(DATA_SUFFIXES) and p.name not in CARDS
                   and not any(part.startswith(".") for part in p.relative_to(directory).parts))

    def names(file: Path) -> set[str]:
        *folders, name = file.relative_to(directory).parts
        return {*folders, re.sub(r"-\d{5}-of-\d{5}.*", "", name.partition(".")[0])}

    def words(file: Path) -> set[str]:
        return {word for name in names(file) for word in re.split(r"[^a-z0-9]+", name.lower())}
    if exact := [f for f in files if split in names(f)]:
        return exact
    if split not in HELDOUT_WORDS:
        files = [f for f in files if not words(f) & HELDOUT_WORDS]
    return [f for f in files if split in words(f)] or (files if split == "train" else [])


class UnknownSplit(Exception):
    """The hub's data set has no split of this name."""


def hub_rows(source: str) -> tuple[Rows, str]:
    """Rows and fingerprint of `org/name[@revision][:[config/]split]`."""
    import datasets
    datasets.disable_progress_bars()
    name, _, split = source.partition(":")
    name, _, revision = name.partition("@")
    config, _, split = (split or "train").rpartition("/")
    try:
        path, commit = locate_dataset(name, revision or None)
        data = datasets.load_dataset(path, config or None, split=split, **dataset_options(path, commit, config or None))
    except Exception as e:  # the hub, the cache and every builder raise their own kinds
        if "Unknown split" in str(e):
            raise UnknownSplit(str(e)) from None
        reason = str(e.__cause__ or e).strip().splitlines() or [repr(e)]
        fail(f"can't read the data set {source}: {reason[0]}")
    return table_rows(data.data.table), f"{name}@{commit}:{config or 'default'}/{split}"


def locate_dataset(name: str, revision: str | None = None) -> tuple[str, str]:
    """(path for `datasets.load_dataset`, commit) of a hub data set at a revision (None: main).

    With the hub in reach the path is the id. Without, it is the directory of this commit in the hub's cache: by an id,
    datasets offline loads whatever commit it prepared last. Raises OSError where the cache has no such directory.
    """
    import datasets
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError
    try:
        if datasets.config.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set")
        commit = HfApi().dataset_info(name, revision=revision).sha
        with contextlib.suppress(EntryNotFoundError):  # a data set without a card
            hf_hub_download(name, "README.md", repo_type="dataset", revision=revision)  # notes which commit main is
        return name, commit
    except Exception as e:  # no network, no such data set, no access: each client library has its own kinds
        reason = (str(e).strip().splitlines() or [repr(e)])[0]
    try:
        path = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns="README.md",
                                      local_files_only=True))
    except Exception:
        at = f" --revision {revision}" if revision else ""
        raise OSError(f"the hub doesn't give {name} ({reason}), and its cache doesn't hold it: where the hub is in "
                      f"reach, run `hf download --repo-type dataset {name}{at}`, or give local files") from None
    say(f"note: {name} is read from the hub's cache, commit {path.name} ({reason})")
    return str(path), path.name


def dataset_options(path: str, commit: str, config: str | None) -> dict[str, Any]:
    """Keywords of `datasets.load_dataset` for a path of locate_dataset: the commit, or for a directory the files that
    its card names for one configuration (None: the only or the default one). The cache may lack the files of
    all others, and datasets would look for those of the first."""
    if not Path(path).is_dir():
        return {"revision": commit}
    from huggingface_hub import DatasetCard
    card = Path(path) / "README.md"
    listed = (DatasetCard.load(card).data.get("configs") or []) if card.is_file() else []
    chosen = [entry for entry in listed if config in (entry["config_name"], None)]
    if not config and len(chosen) > 1:
        chosen = [entry for entry in chosen if entry.get("default") or entry["config_name"] == "default"]
    return {"data_files": chosen[0]["data_files"]} if chosen and "data_files" in chosen[0] else {}


# Layouts. Whatever a row's columns, `normalise` gives it the project's own; as_pair, as_conversation and as_prompt read
# those. A row that can't be used raises Degenerate and is counted; one that breaks its layout ends the run, by number.

LAYOUTS = {  # (kind, description): columns that identify it, in the order they are tried
    ("pair", "preference pairs with a prompt column"): ("prompt", "chosen", "rejected"),
    ("pair", "preference pairs of instructions"): ("instruction", "chosen", "rejected"),
    ("pair", "preference pairs after a conversation"): ("conversations", "chosen", "rejected"),
    ("pair", "preference pairs, the prompt inside both answers"): ("chosen", "rejected"),
    ("label", "answers with a label"): ("prompt", "completion", "label"),
    ("chat", "prompt and completion"): ("prompt", "completion"),
    ("chat", "messages"): ("messages",),
    ("chat", "ShareGPT conversations"): ("conversations",),
    ("chat", "Alpaca instructions"): ("instruction", "output"),
    ("prompt", "prompts"): ("prompt",),
}
MESSAGE_COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}
TOOL_ROLES = {"tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython"}


def recognise(rows: Rows, source: str, *kinds: str) -> str:
    """The kind of a data set by the columns of its first row, said in one line. Fails unless it is one of `kinds`."""
    columns = rows[0].keys()
    matching = ((*name, needed) for name, needed in LAYOUTS.items() if {*needed} <= columns)
    kind, words, needed = next(matching, (None, "", ()))
    if kind in kinds:
        say(f"{source}: {len(rows):,} rows, {words} ({', '.join(needed)})")
        return kind
    wanted = "; ".join(f"{words} ({', '.join(needed)})" for (kind, words), needed in LAYOUTS.items() if kind in kinds)
    fail(f"{source}: {words or 'rows of no known layout'}, with the columns {', '.join(columns)}; want {wanted}: "
         f"docs/data-formats.md")


def normalise(row: dict) -> dict:
    """A row with the project's own columns: messages; prompt and completion; or prompt (if any), chosen and rejected.

    Messages become lists of {role, content, …}, also of ShareGPT's from/value, of one message alone and of JSON text;
    Alpaca's instruction, input and output become prompt and completion; a system column becomes the first message.
    """
    row = {k: to_messages(v) if k in MESSAGE_COLUMNS else v for k, v in row.items()}
    if "conversations" in row and "messages" not in row:
        row["prompt" if "chosen" in row else "messages"] = row.pop("conversations")
    if "instruction" in row and "prompt" not in row:
        parts = [row.pop("instruction"), row.pop("input", None)]
        row["prompt"] = None if parts[0] is None else "\n\n".join(part for part in parts if part)
        if "output" in row:
            row["completion"] = row.pop("output")
    if isinstance(row.get("system"), str) and row["system"].strip():
        begun = {c: [{"role": "user", "content": row[c]}] if c == "prompt" and isinstance(row[c], str) else row[c]
                 for c in ("messages", "prompt", "chosen", "rejected") if row.get(c)}
        first = {c: turns[0].get("role") for c, turns in begun.items()
                 if isinstance(turns, list) and isinstance(turns[0], dict)}
        if "user" in first.values() and "system" not in first.values():  # else it stays, and is said to be unused
            system = {"role": "system", "content": row.pop("system")}
            row.update({c: [system, *begun[c]] for c, role in first.items() if role == "user"})
    return row


def to_messages(value: Any) -> Any:
    """Messages as a list of {role, content, …}; what holds no messages (a text, null) as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")) and re.search('"(content|value)"', value):
        with contextlib.suppress(ValueError):
            parsed = json.loads(value)
            parsed = [parsed] if isinstance(parsed, dict) else parsed
            if all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in parsed):
                value = parsed
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    return [{"role": SHAREGPT_ROLES.get(m["from"], m["from"]), "content": m["value"],
             **{k: v for k, v in m.items() if k not in ("from", "value")}}
            if isinstance(m, dict) and "role" not in m and {"from", "value"} <= m.keys() else m for m in value]


def check_messages(messages: Any, where: str) -> list[dict]:
    """A conversation: an optional system message, then user and assistant in turn, the assistant last.

    `where` names the row in the error. Returns [{role, content}] with other keys dropped, but "train": False in answers
    that must not be trained (a message's own `train: false` or `weight: 0`).
    """
    if messages is None:
        raise Degenerate("null messages")
    if not isinstance(messages, list) or not messages:
        fail(f"{where}: want a list of messages with role and content, got {str(messages)[:80]!r}")
    clean = []
    for m in messages:
        if isinstance(m, dict) and m.get("role") in TOOL_ROLES:
            fail(f"{where}: a message of the role {m['role']}; tool calls can't be trained: leave such rows out")
        if isinstance(m, dict) and isinstance(m.get("role"), str) and m.get("content", "") is None:
            raise Degenerate("null content")
        if not isinstance(m, dict) or not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
            fail(f"{where}: want messages with a text role and a text content, got {str(m)[:80]!r}")
        untrained = m.get("train") in (False, "false") or m.get("weight") == 0
        clean.append({"role": m["role"], "content": m["content"], **({"train": False} if untrained else {})})
    roles = [m["role"] for m in clean]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        unanswered = "; the last message has no answer" if roles[-1] == "user" else ""
        fail(f"{where}: roles out of order: {', '.join(roles)}; want [system,] user, assistant, user, assistant, …"
             f"{unanswered}")
    return clean


def in_messages(value: Any, role: str, name: str, where: str) -> list[dict]:
    """A column as messages: a text is one message of this role."""
    if value is None:
        raise Degenerate(f"null {name}")
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) and value else fail(
        f"{where}: {name} is neither a text nor messages: {str(value)[:80]!r}")


def as_pair(row: dict, where: str) -> tuple[list[dict], str, str]:
    """(prompt messages, chosen text, rejected text) of a preference row, in any of its usual layouts.

    prompt: messages, a text, or absent; chosen and rejected: a text, one assistant message, or the whole conversation.
    Texts without a prompt column contain it: it is their common prefix, up to a space before the first difference
    (TRL's rule for an implicit prompt).
    """
    row = normalise(row)
    sides = [row.get("chosen"), row.get("rejected")]
    if "prompt" not in row and all(isinstance(s, str) for s in sides):
        prompt = os.path.commonprefix(sides).removesuffix(" ")
        row["prompt"], sides = prompt, [s[len(prompt):] for s in sides]
    answers = []
    for name, side in zip(("chosen", "rejected"), sides):
        answer = in_messages(side, "assistant", name, where)
        if len(answer) == 1:
            if "prompt" not in row:
                fail(f"{where}: no prompt before {name}: give a prompt column or whole conversations")
            answer = in_messages(row["prompt"], "user", "prompt", where) + answer
        answers.append(check_messages(answer, f"{where}, {name}"))
    if prompt_key(answers[0][:-1]) != prompt_key(answers[1][:-1]):
        fail(f"{where}: chosen and rejected answer different prompts")
    return answers[0][:-1], answers[0][-1]["content"], answers[1][-1]["content"]


def as_conversation(row: dict, where: str) -> list[dict]:
    """The messages of a row: its messages, or its prompt and completion, each a text or messages."""
    row = normalise(row)
    if "prompt" in row and "completion" in row:
        return check_messages(in_messages(row["prompt"], "user", "prompt", where)
                              + in_messages(row["completion"], "assistant", "completion", where), where)
    return check_messages(row.get("messages"), where)


def as_prompt(row: dict, where: str) -> list[dict]:
    """The prompt of a row: its prompt column (text or messages), messages that end with the user's, or what stands
    before the last answer."""
    row = normalise(row)
    if "chosen" in row and "rejected" in row:
        return as_pair(row, where)[0]
    if "prompt" not in row and without_answer(row):
        row["prompt"] = row["messages"]
    if "prompt" not in row and "messages" in row:
        return check_messages(row["messages"], where)[:-1]
    if "prompt" not in row:
        fail(f"{where}: no prompt (docs/data-formats.md); the row has {', '.join(row)}")
    prompt = in_messages(row["prompt"], "user", "prompt", where)
    return check_messages([*prompt, {"role": "assistant", "content": ""}], where)[:-1]


def without_answer(row: dict) -> bool:
    """Whether a row's messages end with the user's, so that they are a prompt."""
    messages = row.get("messages")
    return isinstance(messages, list) and any(isinstance(m, dict) and m.get("role") == "user" for m in messages[-1:])


def as_prompts(row: dict, where: str) -> list[list[dict]]:
    """Every prompt that a row has an answer to, the shortest first; of a row without answers, its prompt."""
    row = normalise(row)
    if {"chosen", "label"} & row.keys() or without_answer(row) or not ("messages" in row or "completion" in row):
        return [as_prompt(row, where)]
    messages = as_conversation(row, where)
    return [messages[:i] for i, m in enumerate(messages) if m["role"] == "assistant"]


def count_sources(rows: Iterable[dict]) -> dict[str, int]:
    """{source: its rows}, by their column `source`; empty where no row has one. For run.json's data_sources."""
    return dict(Counter(str(row["source"]) for row in rows if row.get("source")))


def say_ignored(rows: Iterable[dict], source: str) -> None:
    """One line on fields that change a row's meaning but aren't used, with the number of rows that have each."""
    counts = Counter()
    for row in map(normalise, rows):
        counts.update({f"column {c}" for c in ("system", "tools", "functions", "weight")
                       if row.get(c) not in (None, "", [], 1)})
        messages = [m for c in MESSAGE_COLUMNS if isinstance(row.get(c), list) for m in row[c] if isinstance(m, dict)]
        counts.update({f"{key} of messages" for m in messages for key in ("reasoning_content", "thinking", "tool_calls")
                       if m.get(key)} | {"a weight of messages besides 0 and 1" for m in messages
                                         if m.get("weight") not in (None, 0, 1)})
    if counts:
        say(f"note: {source}: not used: " + ", ".join(f"{field} ({n} rows)" for field, n in sorted(counts.items())))


# Splits. Every one is a function of the file and of hashes of prompts: no seed and no order of rows moves it.

def prompt_key(prompt: list[dict]) -> str:
    """Canonical text of a prompt, for splits by hash."""
    return json.dumps([[m["role"], m["content"]] for m in prompt], ensure_ascii=False)


def prompt_id(prompt: list[dict]) -> str:
    """16 hex digits that name a prompt."""
    return hashlib.sha256(prompt_key(prompt).encode()).hexdigest()[:16]


def preference_parts(prompts: Sequence[list[dict] | None]) -> list[str | None]:
    """"A" (50 %: reward model, DPO, KTO), "J" (20 %: the judge's reward model) or "B" (30 %: PPO) for each prompt.

    By sha256 of the prompt. Prompts that share a user turn of 25 characters or more, through others too, fall into one
    part: that of the smallest key among them. None stays None.
    """
    leader: dict[str, str] = {}  # of each prompt and long turn, one nearer to the root of its group

    def root(key: str) -> str:
        while leader.setdefault(key, key) != key:
            leader[key] = key = leader[leader[key]]
        return key
    keys = [prompt and prompt_key(prompt) for prompt in prompts]
    for key, prompt in zip(keys, prompts):
        for m in prompt or ():
            if m["role"] == "user" and len(turn := m["content"].strip()) >= 25:
                leader[root("turn " + turn)] = root(key)
    smallest: dict[str, str] = {}
    for key in sorted({*keys} - {None}):
        smallest.setdefault(root(key), key)
    fractions = {group: bucket(key) for group, key in smallest.items()}
    return [None if key is None else "A" if (fraction := fractions[root(key)]) < 0.5
            else "J" if fraction < 0.7 else "B" for key in keys]


def is_judge_prompt(prompt: list[dict]) -> bool:
    """Held-out prompts set aside for the judge: 10 % by sha256, with a salt (200 of UltraFeedback's 2,000)."""
    return bucket("judge " + prompt_key(prompt)) < 0.1


def text_key(prompt: list[dict]) -> str:
    """A prompt's key without its system message: the same question under another one counts as the same."""
    return prompt_key([m for m in prompt if m["role"] != "system"])


def heldout_beside(data: str) -> str | None:
    """The held-out file beside a training file, `sft.jsonl.gz` -> `sft_heldout.jsonl.gz`, if it is there."""
    stem, dot, suffix = Path(data).name.partition(".")
    beside = Path(data).with_name(f"{stem}_heldout{dot}{suffix}")
    return str(beside) if Path(data).is_file() and beside.is_file() else None


def heldout_source(data: str, heldout_data: str | None) -> str | None:
    """The held-out source: as given, else beside the training source by the usual names, else None.

    `sft.jsonl.gz` -> `sft_heldout.jsonl.gz`; of a directory or a hub data set another split: `train_sft` -> `test_sft`.
    """
    if heldout_data or Path(data).is_file():
        return heldout_data or heldout_beside(data)
    name, split = data.rsplit(":", 1) if ":" in data and not Path(data).exists() else (data, "")
    config, slash, split = split.rpartition("/")
    split = split or "train"
    if Path(name).is_dir():
        guesses = [split.replace("train", "test", 1), "heldout", "test", "validation"]
        return next((f"{name}:{guess}" for guess in guesses if guess != split and split_files(Path(name), guess)), None)
    return f"{name}:{config}{slash}{split.replace('train', 'test', 1)}" if "train" in split else None


@dataclass(frozen=True)
class Heldout:
    """Rows that no method trains on."""
    source: str                            # as messages name it
    rows: Rows
    fingerprint: str
    prompts: list[list[dict] | None]       # the first of each row; None: degenerate
    holds: Callable[[list[list[dict]]], bool]  # is a row with these prompts (`as_prompts`) held out?


def load_heldout(data: str, heldout_data: str | None, rows: Rows) -> Heldout:
    """The held-out rows that belong to a training source, whose `rows` are given.

    Where there is no held-out source, or one with all of the training prompts (the same file again), 5 % of the
    training rows' prompts are held out by hash, at most 2,000 of them and at least 4 of 16: the same ones for every
    script that reads this source.
    """
    source = heldout_source(data, heldout_data)
    with contextlib.suppress(UnknownSplit):
        if source:
            held, fingerprint = load_rows(source, guessed=not heldout_data)
            prompts = [prompts_if_any(row, f"{source}, row {i}") for i, row in enumerate(held)]
            keys = {text_key(p) for several in prompts for p in several}

            def among_them(several: list[list[dict]]) -> bool:
                return any(text_key(prompt) in keys for prompt in several)
            if not all(among_them(prompts_if_any(row, f"{data}, row {i}")) for i, row in enumerate(rows)):
                first = [several[0] if several else None for several in prompts]
                return Heldout(source, held, fingerprint, first, among_them)
            say(f"WARNING: all prompts of {data} are held out in {source}, so it can't be used")
    prompts = [prompts_if_any(row, f"{data}, row {i}") for i, row in enumerate(rows)]
    fractions = sorted({bucket("heldout " + text_key(several[0])) for several in prompts if several})
    count = min(max(math.ceil(0.05 * len(fractions)), min(4, len(fractions) // 4)), 2000)
    if len(fractions) < 2:
        fail(f"no held-out rows found beside {data}, and {len(fractions)} different prompts are too few to split some "
             f"off; name some with --heldout-data")
    limit = fractions[count - 1]

    def split_off(several: list[list[dict]]) -> bool:  # rows of one first prompt stay together
        return bool(several) and bucket("heldout " + text_key(several[0])) <= limit
    apart = [i for i, several in enumerate(prompts) if split_off(several)]
    say(f"note: no held-out rows beside {data}: {len(apart)} of its {len(rows):,} rows are held out, by hash of their "
        f"prompts")
    return Heldout(f"{data} (held out)", rows.subset(apart), f"{count} prompts of train by sha256",
                   [prompts[i][0] for i in apart], split_off)


def prompts_if_any(row: dict, where: str) -> list[list[dict]]:
    """as_prompts, with none for a degenerate row."""
    try:
        return as_prompts(row, where)
    except Degenerate:
        return []


def take_rows(rows: Sequence, n: int, seed: int, read: Callable[[int, Any], Any],
              build: Callable[[list, list[str]], list], source: str, max_dropped: float,
              max_overlong: float | None = None, preview: int = 0) -> tuple[list, Counter, list[int]]:
    """The first `n` usable rows of the seed's shuffle.

    read: (index, row) -> what `build` needs of a row, or None (not a candidate: another part of a split); may raise
    Degenerate. build: (these values, their rows' names), many at a time -> for each an item to keep, or a str: why it
    is dropped; it may raise Degenerate as well. Returns (items, dropped reasons, row indices of the items).
    Fails when more than `max_dropped` of the rows looked at are degenerate (of 20 if there are fewer), or none is
    usable; rows that are "too long" have a limit of their own when `max_overlong` is given. A preview names what would
    be dropped instead.
    """
    items, row_indices, dropped, examples = [], [], Counter(), []
    order = permutation(len(rows), seed, "rows")
    for at in range(0, len(order), 1024):
        candidates: list[tuple[int, Any]] = []
        for i in order[at:at + 1024]:
            try:
                value = read(i, rows[i])
            except Degenerate as e:
                value = str(e)
            if value is not None:
                candidates.append((i, value))
        good = [(i, value) for i, value in candidates if not isinstance(value, str)]
        names = [f"{source}, row {i}" for i, _ in good]
        built = iter(build_or_drop(build, [value for _, value in good], names))
        for i, value in candidates:
            item = value if isinstance(value, str) else next(built)
            if isinstance(item, str):
                dropped[item] += 1
                examples.append(f"row {i} ({item})")
            else:
                items.append(item)
                row_indices.append(i)
            if len(items) == n:
                break
        overlong = dropped["too long"] if max_overlong is not None else 0
        bad = sum(dropped.values()) - overlong
        if len(items) == n or bad > max_dropped * len(order) and not preview:  # more than all rows together may have
            break
    seen = sum(dropped.values()) + len(items)
    why = ", ".join(f"{k} {v}" for k, v in dropped.most_common())
    if preview and examples:
        more = f" and {len(examples) - preview} more" if len(examples) > preview else ""
        say(f"{source}: would be dropped: {', '.join(examples[:preview])}{more}")
    if not items:
        fail(f"{source}: no usable row among {len(rows)}" + (f" (dropped: {why})" if why else ""))
    if bad > max_dropped * max(seen, 20) and not preview:
        remedy = "clean the data, "
        if any("too long" in reason for reason in dropped):  # a limit of the flags, not a fault of the data
            remedy += "raise the limit on tokens per row, "
        fail(f"{source}: {bad} of {seen} rows are degenerate ({why}), more than {max_dropped:.0%}; "
             f"{remedy}or allow more with --max-dropped")
    if overlong and overlong > max_overlong * max(seen, 20) and not preview:
        fail(f"{source}: {overlong} of {seen} rows are beyond --max-length, more than {max_overlong:.0%}; "
             f"raise it, or allow more with --max-overlong")
    if len(items) < n:
        say(f"note: {source} has {len(items)} usable rows, fewer than the {n} asked for")
    return items, dropped, row_indices


def build_or_drop(build: Callable[[list, list[str]], list], values: list, names: list[str]) -> list:
    """build(values, names); where that raises Degenerate, by halves, down to the row at fault: its reason."""
    try:
        return build(values, names)
    except Degenerate as e:
        if len(values) == 1:
            return [str(e)]
        half = len(values) // 2
        return build_or_drop(build, values[:half], names[:half]) + build_or_drop(build, values[half:], names[half:])


@dataclass(frozen=True)
class Split:
    """What an offline method trains and measures on."""
    train: list                    # items in the order of the seed's shuffle
    heldout: list
    row_indices: list[int]         # row of --data of each training item
    dropped: Counter               # {reason: training rows}
    fingerprints: dict[str, str]   # for Run: what both were made of
    prompts: dict[str, list[str]]  # for prompts.json: ids of the prompts that are answered in either
    sources: dict[str, dict[str, int]]  # for run.json's data_sources: rows of each by their column `source`, if any


def load_split(args: Any, kinds: Sequence[str], read: Callable[[dict, str], Any], build: Callable[[list, list], list],
               part: str = "A") -> Split:
    """The rows of --data and --heldout-data, read, split, checked and built: all that comes before the preflight.

    kinds: of LAYOUTS, which the script takes. read: (row, where) -> what `build` needs of it; build as in take_rows.
    Preference pairs are those of one `part` of the prompts; their held-out rows, and those with labels, are not the
    judge's. Training rows whose prompt is held out are left out.
    """
    rows, fingerprint = load_rows(args.data)
    kind = recognise(rows, args.data, *kinds)
    held = load_heldout(args.data, args.heldout_data, rows)
    held_kind = kind if "(held out)" in held.source else recognise(held.rows, held.source, *kinds)
    parts = [part] * len(rows)
    if kind == "pair":
        first = [prompts_if_any(row, f"{args.data}, row {i}") for i, row in enumerate(rows)]
        parts = preference_parts([several[0] if several else None for several in first])
        say("parts of the prompts, in rows: " + ", ".join(f"{p} {parts.count(p):,}" for p in "AJB") + f"; here {part}")
        if part not in parts:
            fail(f"{args.data}: no row is in part {part}: prompts that share a user turn of 25 characters or more stay "
                 f"in one part; give more rows, of other prompts")
    left_out = 0

    def train_row(i: int, row: dict) -> Any:
        nonlocal left_out
        if parts[i] not in (part, None):
            return None
        where = f"{args.data}, row {i}"
        if held.holds(as_prompts(row, where)):
            left_out += 1
            return None
        return read(row, where)

    judged = [held_kind != "chat" and prompt is not None and is_judge_prompt(prompt) for prompt in held.prompts]
    if judged.count(False) < 2:  # so small a set serves both
        judged = [False] * len(judged)
    train, dropped, row_indices = take_rows(rows, args.rows, args.seed, train_row, build, args.data, args.max_dropped,
                                            args.max_overlong, args.preview)
    if left_out:
        say(f"note: {left_out} rows of {args.data} are left out of training, since their prompts are held out "
            f"({held.source})")
    say_ignored((rows[i] for i in row_indices), args.data)

    def heldout_row(i: int, row: dict) -> Any:
        return None if judged[i] else read(row, f"{held.source}, row {i}")
    heldout, _, held_indices = take_rows(held.rows, args.heldout_rows, args.seed, heldout_row, build, held.source,
                                         args.max_dropped, max_overlong=1.0)
    prompts = {name: sorted({prompt_id(p) for i in used for p in as_prompts(source[i], "")})
               for name, source, used in (("train", rows, row_indices), ("heldout", held.rows, held_indices))}
    sources = {"train": count_sources(rows[i] for i in row_indices),
               "heldout": count_sources(held.rows[i] for i in held_indices)}
    return Split(train, heldout, row_indices, dropped, {"train": fingerprint, "heldout": held.fingerprint}, prompts,
                 sources)


# ------------------------------------------------------------------------------------------------
# 4. What a method starts from
# ------------------------------------------------------------------------------------------------

class Start(NamedTuple):
    """What a method starts from; settled before any model loads."""
    parent: dict[str, Any] | None  # record of the adapter; None: the model itself
    adapter: Path | None           # its directory
    model: str
    model_dir: Path
    tokenizer: Any
    invariants: TrainInvariants


def read_start(adapter: str | None, model: str | None = None, other_base: bool = False, quantization: str = "none",
               reward: bool = False) -> Start:
    """The start that --sft-adapter and --model name.

    adapter: a run directory (with `reward`, of a reward model), a plain PEFT LoRA adapter, or None or "none": `model`
    itself. model: by default the adapter's base, or Qwen2.5-0.5B. quantization: the policy where no run hands one down.
    Fails when a run was trained under other invariants.
    """
    run, directory = None, None
    if adapter not in (None, "none"):
        run, directory = (read_adapter(adapter, reward), Path(adapter)) if reward else read_policy(adapter)
        if not (model or run["model"]):
            fail(f"{adapter} names no base model; give it with --model")
    model = model or (run["model"] if run else QWEN)
    model_dir = resolve_model(model)
    tokenizer = load_tokenizer(model_dir)
    trained_under = run and run["invariants"]
    policy = trained_under["quantization"] if trained_under else quantization
    invariants = TrainInvariants.of(model, model_dir, tokenizer, policy)
    if run:
        check_base(directory, run, model, model_dir, invariants.weights_sha256, other_base)
        if trained_under and invariants.hash != run["train_invariants"]:
            now = json.loads(json.dumps(dataclasses.asdict(invariants)))
            fail(f"{adapter} was trained under other invariants; they differ in "
                 + ", ".join(k for k in now if now[k] != trained_under.get(k)))
        run = {**run, "model": model}
        template = directory / "chat_template.jinja"
        if not trained_under and template.is_file() and template.read_text(encoding="utf-8") != tokenizer.chat_template:
            say(f"note: {adapter} brings a chat template that differs from the one used here; the base's tokenizer "
                f"decides: {tokenizer.template_note or 'its own template'}")
    return Start(run, directory, model, model_dir, tokenizer, invariants)


# ------------------------------------------------------------------------------------------------
# 5. The preflight
# ------------------------------------------------------------------------------------------------

def evaluation_ngrams(eval_data: str | None, n: int = 13) -> set[tuple[str, ...]]:
    """All runs of `n` words in the evaluation prompts under a directory (questions and instructions of the tasks)."""
    grams, prompts = set(), 0
    if eval_data and not Path(eval_data).is_dir():
        fail(f"--eval-data {eval_data}: no such directory")
    for file in sorted(Path(eval_data).rglob("*.json*")) if eval_data else []:
        if file.name.split(".")[0] in ("test", "validation") or "ifeval" in file.parts:
            try:
                with (gzip.open if file.name.endswith(".gz") else open)(file, "rt", encoding="utf-8") as f:
                    for row in map(json.loads, f):
                        prompt = row.get("question") or row.get("prompt") or ""
                        grams.update(ngrams(prompt, n))
                        prompts += bool(prompt)
            except (ValueError, OSError, EOFError) as e:
                fail(f"can't read the evaluation data {file}: {e}")
    if eval_data and not prompts:
        fail(f"--eval-data {eval_data}: no evaluation prompts found; want gsm8k/test, mmlu/test, "
             f"truthfulqa_mc2/validation and ifeval/train as .jsonl or .jsonl.gz")
    return grams


def ngrams(text: str, n: int = 13) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


def say_template(tokenizer) -> None:
    """One line on the chat template in use, the tokens that end an answer, and the BOS."""
    warning = "WARNING: " if has_plain_markers(tokenizer) else ""
    end, bos = tokenizer.convert_ids_to_tokens([tokenizer.end_id, tokenizer.chat_format.bos or 0])
    say(f"{warning}chat template: {tokenizer.template_note or OWN_TEMPLATE}; answers end with {end}; "
        + ("no BOS is added" if tokenizer.chat_format.bos is None else f"every sequence begins with {bos}"))


def preflight(tokenizer, examples: Sequence[Example], texts: Sequence[str], dropped: Counter, truncated: int,
              eval_data: str | None, preview: int = 0) -> dict[str, int]:
    """Print what will be trained on, and stop at a mask that can't be intended.

    Shows one example (a preview: that many, and then ends the process) with its trained tokens between ⟦ ⟧ (green on
    a terminal), counts, token totals and the 13-word overlap of the training texts with the evaluation prompts. Fails
    on an empty mask, a trained part without a stop token, or a doubled BOS.
    """
    say_template(tokenizer)
    bos = tokenizer.bos_token_id
    for i, e in enumerate(examples):
        if not e.targets:
            fail(f"example {i} has no trained token: {tokenizer.decode(e.ids)[:200]!r}")
        if e.targets[-1] not in tokenizer.stop_ids or e.predict[-1] != len(e.ids) - 2:
            fail(f"example {i} does not end with a trained stop token: …{tokenizer.decode(e.ids)[-200:]!r}")
        if bos is not None and bos not in tokenizer.stop_ids and e.ids[:2] == [bos, bos]:
            fail(f"example {i} begins with two BOS tokens; the chat template and the tokenizer both add one")
    green, plain = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for k, shown in enumerate(examples[:max(1, preview)]):
        trained, spans = {p + 1 for p in shown.predict}, []
        for counts_in_loss, at in itertools.groupby(range(len(shown.ids)), lambda i: i in trained):
            text = tokenizer.decode([shown.ids[i] for i in at])
            spans.append(f"{green}⟦{text}⟧{plain}" if counts_in_loss else text)
        counts = f"example {k + 1}, {len(shown.ids)} tokens, {len(trained)} of them trained,"
        title = counts if preview else "one example,"
        say(f"-- {title} trained tokens between ⟦ ⟧ {'-' * 40}\n{''.join(spans)}\n{'-' * 83}")
    total, counted = sum(len(e.ids) for e in examples), sum(len(e.targets) for e in examples)
    say(f"{len(examples):,} sequences, {total:,} tokens, {counted:,} of them trained ({counted / total:.0%}); "
        f"longest {max(len(e.ids) for e in examples):,}; {truncated:,} cut at a turn's end; dropped "
        + (", ".join(f"{v} ({k})" for k, v in dropped.items()) or "none"))
    overlap = count_overlap(texts, eval_data)
    end_preview(preview)
    return {"tokens": total, "trained_tokens": counted, "dropped": sum(dropped.values()), "truncated": truncated,
            "eval_overlap": overlap}


def end_preview(preview: int) -> None:
    """With --preview, the process ends here: nothing is written, and no weights are loaded."""
    if preview:
        say("--preview: nothing is trained; the same command without it trains")
        leave_ranks()
        raise SystemExit(0)


def preflight_prompts(tokenizer, prompts: Sequence[list[int]], texts: Sequence[str], dropped: Counter,
                      eval_data: str | None, preview: int = 0) -> dict[str, int]:
    """Print what will be answered, and stop at a prompt that begins with two BOS: the preflight of on-policy methods.

    A preview shows that many prompts and ends the process.
    """
    say_template(tokenizer)
    bos = tokenizer.bos_token_id
    for ids in prompts:
        if bos is not None and bos not in tokenizer.stop_ids and ids[:2] == [bos, bos]:
            fail("a prompt begins with two BOS tokens; the chat template and the tokenizer both add one")
    for k, ids in enumerate(prompts[:max(1, preview)]):
        title = f"prompt {k + 1}, {len(ids)} tokens," if preview else "one prompt,"
        say(f"-- {title} answered from where it ends {'-' * 40}\n{tokenizer.decode(ids)}\n{'-' * 83}")
    say(f"{len(prompts):,} prompts, {sum(map(len, prompts)):,} tokens; longest {max(map(len, prompts)):,}; dropped "
        + (", ".join(f"{v} ({k})" for k, v in dropped.items()) or "none"))
    overlap = count_overlap(texts, eval_data)
    end_preview(preview)
    return {"prompts": len(prompts), "dropped": sum(dropped.values()), "eval_overlap": overlap}


def count_overlap(texts: Sequence[str], eval_data: str | None) -> int | None:
    """How many training texts share 13 words in a row with an evaluation prompt; says so. None without --eval-data."""
    grams = evaluation_ngrams(eval_data)
    overlap = sum(not grams.isdisjoint(ngrams(t)) for t in texts)
    say(f"13-word overlap with the evaluation prompts: {overlap:,} of {len(texts):,} training rows" if eval_data else
        "13-word overlap with the evaluation prompts: not counted (no --eval-data)")
    return overlap if eval_data else None
