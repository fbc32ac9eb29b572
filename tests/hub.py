"""A small stand-in for the Hugging Face hub: what the defaults name, of data/demo and random weights, and a server.

    python tests/hub.py runs/hub python sft.py --preview 1        # runs a command with this hub and a cache in runs/hub

Ids, revisions, files, splits, columns and the tokenizer's layout are those of the real repositories; rows are few and
short, the model has two layers. `make hub-check` runs the whole climb on it.
"""
import base64
import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import lm_eval.tasks
import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import grpo
import harness

DEMO = Path(__file__).parent.parent / "data" / "demo"
COMMIT = "c0ffee" + "0" * 34  # of the repositories that nothing pins: lm-eval's

# Qwen2.5's template, but for its tools: a default system message, and turns that end with <|im_end|>, which the base
# model never learned and which is not its EOS.
CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
           "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> "
           "<|video_pad|>").split()
MARKS = ("<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
         "<|file_sep|>").split()  # added tokens that Qwen2.5 doesn't call special


def demo(name: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / name).read_text().splitlines()]


# -- the repositories --------------------------------------------------------------------------------

def write_model(directory: Path, texts: list[str]) -> None:
    """Qwen2.5-0.5B in small: byte-level BPE over Qwen2's words, an embedding padded beyond the tokenizer, bfloat16."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(harness.QWEN2_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=SPECIAL[1:], model_max_length=131072,
                                   clean_up_tokenization_spaces=False)
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    eos = fast.eos_token_id
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=1152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6,
        tie_word_embeddings=True, use_sliding_window=False, sliding_window=32768, max_window_layers=24,
        initializer_range=0.1, bos_token_id=eos, eos_token_id=eos))
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(
        {"bos_token_id": eos, "do_sample": False, "eos_token_id": eos, "max_new_tokens": 2048}))


def write_dataset(directory: Path, configs: dict[str, dict[str, tuple[str, list[dict]]]]) -> None:
    """{config: {split: (file, rows)}}, with the card that tells which file is which."""
    card = []
    for config, splits in configs.items():
        card.append({"config_name": config,
                     "data_files": [{"split": split, "path": file} for split, (file, _) in splits.items()]})
        for file, rows in splits.values():
            path = directory / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                datasets.Dataset.from_list(rows).to_parquet(path)
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "README.md").write_text(
        f"---\n{yaml.safe_dump({'license': 'mit', 'configs': card})}---\n# Rows of data/demo\n")


def chat_rows(rows: list[dict]) -> list[dict]:
    """UltraChat's columns."""
    return [{"prompt": row["messages"][0]["content"], "prompt_id": f"{i:064x}", "messages": row["messages"]}
            for i, row in enumerate(rows)]


def pair_rows(rows: list[dict]) -> list[dict]:
    """UltraFeedback's columns: the prompt as text, and again as the first message of both answers."""
    found = []
    for i, row in enumerate(rows):
        if len(row["prompt"]) == 1:
            chosen, rejected = (row["prompt"] + row[side] for side in ("chosen", "rejected"))
            found.append({"prompt": row["prompt"][0]["content"], "prompt_id": f"{i:064x}", "chosen": chosen,
                          "rejected": rejected, "messages": chosen, "score_chosen": 8.5, "score_rejected": 4.0})
    return found


def many(rows: list[dict], times: int, column: str) -> list[dict]:
    """The rows, `times` over, each with a number of its own before its text, so that prompts are different ones."""
    def numbered(value, n: int):
        text = value if isinstance(value, str) else value[0]["content"]
        text = f"Question {n}. {text}"
        return text if isinstance(value, str) else [{**value[0], "content": text}, *value[1:]]
    return [row | {column: numbered(row[column], 1000 * k + i)} for k in range(times) for i, row in enumerate(rows)]


def repositories() -> dict[tuple[str, str, str], object]:
    """{("models" or "datasets", id, commit): a function that writes its files into a directory}."""
    sft, pairs = demo("train/sft.jsonl"), demo("train/preference.jsonl")
    problems = [{"question": row["prompt"][0]["content"], "answer": f"{row['solution']}\n#### {row['answer']}"}
                for row in demo("train/gsm8k_rl.jsonl")]
    texts = [m["content"] for row in sft for m in row["messages"]] + [row["question"] for row in problems]
    chat = {split: (f"data/{split}-00000-of-00001-a3ecf92756993583.parquet", chat_rows(rows)) for split, rows in (
        ("train_sft", many(sft, 3, "messages")), ("test_sft", demo("train/sft_heldout.jsonl")),
        ("train_gen", sft[:2]), ("test_gen", sft[2:4]))}
    held = many(demo("train/preference_heldout.jsonl"), 6, "prompt")
    preference = {split: (f"data/{split}-00000-of-00001.parquet", rows) for split, rows in (
        ("train_prefs", pair_rows(many(pairs, 5, "prompt"))), ("test_prefs", pair_rows(held)),
        ("train_sft", pair_rows(pairs[:2])), ("test_sft", pair_rows(pairs[2:4])))}
    mmlu_tasks = (Path(lm_eval.tasks.__file__).parent / "mmlu/default").glob("mmlu_*.yaml")
    subjects = sorted(yaml.safe_load(path.read_text())["dataset_name"] for path in mmlu_tasks)
    dev, test = demo("eval/mmlu/dev.jsonl")[:5], demo("eval/mmlu/test.jsonl")
    mmlu = {subject: {split: (f"{subject}/{split}-00000-of-00001.parquet", [row | {"subject": subject} for row in rows])
                      for split, rows in (("dev", dev), ("test", random.Random(subject).sample(test, 3)))}
            for subject in subjects}
    mmlu["all"] = {"test": ("all/test-00000-of-00001.parquet", test)}
    keys = {key: None for row in demo("eval/ifeval/train.jsonl") for kwargs in row["kwargs"] for key in kwargs}
    ifeval = [row | {"kwargs": [keys | kwargs for kwargs in row["kwargs"]]} for row in demo("eval/ifeval/train.jsonl")]
    sets = {
        common.ULTRACHAT: {"default": chat},
        common.ULTRAFEEDBACK: {"default": preference},
        grpo.GSM8K: {"main": {"train": ("main/train-00000-of-00001.parquet", many(problems, 3, "question")),
                              "test": ("main/test-00000-of-00001.parquet", demo("eval/gsm8k/test.jsonl"))},
                     "socratic": {"train": ("socratic/train-00000-of-00001.parquet", problems)}},
        f"cais/mmlu@{COMMIT}": mmlu,
        f"truthfulqa/truthful_qa@{COMMIT}": {
            config: {"validation": (f"{config}/validation-00000-of-00001.parquet",
                                    demo("eval/truthfulqa_mc2/validation.jsonl"))}
            for config in ("generation", "multiple_choice")},
        f"google/IFEval@{COMMIT}": {"default": {"train": ("ifeval_input_data.jsonl", ifeval)}},
    }
    name, _, commit = common.QWEN.partition("@")
    found = {("models", name, commit): lambda directory: write_model(directory, texts)}
    for source, configs in sets.items():
        name, _, commit = source.partition(":")[0].partition("@")
        found["datasets", name, commit] = lambda directory, configs=configs: write_dataset(directory, configs)
    return found


def snapshot_of(root: Path, kind: str, name: str, commit: str) -> Path:
    """Where the files of a repository's commit are, as in the hub client's cache."""
    return root / f"{kind}--{name.replace('/', '--')}" / "snapshots" / commit


def write_hub(root: Path) -> None:
    """Every repository at its commit, which is its main, and NLTK's punkt_tab for English, empty."""
    datasets.disable_progress_bars()
    for (kind, name, commit), write in repositories().items():
        snapshot = snapshot_of(root, kind, name, commit)
        snapshot.mkdir(parents=True)
        write(snapshot)
    english = root / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (english / name).write_text("")


# -- the server: as much of the hub's interface as its clients use to list, fetch and commit files --------------------

WRITE_TOKEN = "hf_standInForATokenThatMayWrite"  # to the namespace "me"; any other token may read

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.take(body) or self.answer(body)

    def do_PUT(self) -> None:
        self.take(self.rfile.read(int(self.headers["Content-Length"]))) or self.reply(404, b"{}", {})

    def take(self, body: bytes) -> bool:
        """A new repository, and the calls of a commit to it: which files are large, where those go, the commit."""
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):  # the address is the permission
            if hashlib.sha256(body).hexdigest() == match[1]:
                (self.root / f"lfs-{match[1]}").write_bytes(body)
                return self.send(200, {})
            return self.send(400, {})
        if path == "/api/validate-yaml":  # of a card
            yaml.safe_load(json.loads(body)["content"].partition("---")[2].partition("\n---\n")[0])
            return self.send(200, {"errors": [], "warnings": []})
        calls = r"/api/(?:repos/(create)|models/(\S+/\S+)/(preupload|commit)/main)|/(\S+/\S+)\.git/info/lfs/objects/(batch)"
        if not (match := re.fullmatch(calls, path)):
            return False
        call = match[1] or match[3] or match[5]
        lines = [json.loads(line) for line in body.splitlines() if line.strip()] if call == "commit" else json.loads(body)
        name = match[2] or match[4] or f"{lines['organization']}/{lines['name']}"
        if not self.may_write(name):
            return self.send(403, {"error": "no write access"})
        if call == "create":
            if self.snapshot("models", name, None):
                return self.send(409, {"error": "it exists", "url": f"http://{self.headers['Host']}/{name}"})
            snapshot_of(self.root, "models", name, hashlib.sha1(name.encode()).hexdigest()).mkdir(parents=True)
            return self.send(200, {"url": f"http://{self.headers['Host']}/{name}"})
        if call == "preupload":
            return self.send(200, {"files": [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"} for f in lines["files"]]})
        if call == "batch":
            return self.send(200, {"transfer": "basic", "objects": [
                {**o, "actions": {"upload": {"href": f"http://{self.headers['Host']}/lfs/{o['oid']}"}}}
                for o in lines["objects"]]})
        before = self.snapshot("models", name, None)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (before / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (before / value["path"]).write_bytes((self.root / f"lfs-{value['oid']}").read_bytes())
        commit = hashlib.sha1(body).hexdigest()
        before.rename(before.with_name(commit))
        return self.send(200, {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{commit}", "commitOid": commit})

    def may_write(self, name: str) -> bool:
        return self.headers["Authorization"] == f"Bearer {WRITE_TOKEN}" and name.startswith("me/")

    def send(self, status: int, found: dict) -> bool:
        self.reply(status, json.dumps(found).encode(), {"Content-Type": "application/json"})
        return True

    def answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/auth-check/write", path):
            self.send(200 if self.may_write(match[1]) else 403, {})
            return
        about = r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?"
        if match := re.fullmatch(about, path):
            kind, name, what, revision, folder = match.groups()
            if snapshot := self.snapshot(kind, name, revision):
                return self.about(snapshot, name, what, folder or "", body)
        elif match := re.fullmatch(r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            kind, name, revision, file = match.groups()
            if snapshot := self.snapshot(kind or "models", name, revision):
                commit = {"X-Repo-Commit": snapshot.name}
                if not (snapshot / file).is_file():
                    return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", **commit})
                content = (snapshot / file).read_bytes()
                return self.reply(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **commit})
        self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def snapshot(self, kind: str, name: str, revision: str | None) -> Path | None:
        """The directory of a commit; main is the first that there is."""
        commits = sorted(snapshot_of(self.root, kind, name, "x").parent.glob("*"))
        return next((path for path in commits if revision in (None, "main", path.name)), None)

    def about(self, snapshot: Path, name: str, what: str | None, folder: str, body: bytes) -> None:
        """A commit's record (what: "revision", None), the entries of a folder ("tree") or some paths ("paths-info")."""
        def entry(path: Path) -> dict:
            found = {"path": path.relative_to(snapshot).as_posix(), "oid": "0" * 40, "size": 0, "type": "directory"}
            if path.is_file():
                content = path.read_bytes()
                found |= {"type": "file", "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            return found
        if what == "tree":
            deep = "recursive=true" in self.path.lower()
            files = sorted((snapshot / folder).rglob("*") if deep else (snapshot / folder).glob("*"))
            found = [entry(path) for path in files]
        elif what == "paths-info":
            is_json = "json" in self.headers.get("Content-Type", "")
            paths = (json.loads(body) if is_json else parse_qs(body.decode()))["paths"]
            found = [entry(snapshot / path) for path in paths if (snapshot / path).exists()]
        else:
            names = [path.relative_to(snapshot).as_posix() for path in sorted(snapshot.rglob("*")) if path.is_file()]
            card = snapshot / "README.md"
            front = re.match(r"---\n(.*?)\n---", card.read_text(), re.S) if card.is_file() else None
            found = {"id": name, "sha": snapshot.name, "private": False, "tags": [], "downloads": 0,
                     "cardData": yaml.safe_load(front[1]) if front else None,
                     "siblings": [{"rfilename": file} for file in names]}
        self.reply(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextlib.contextmanager
def serve(root: Path):
    """The address of a server of the repositories under `root`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Server", (Handler,), {"root": root})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


if __name__ == "__main__":
    directory = Path(sys.argv[1]).resolve()
    if not (directory / "origin").is_dir():
        write_hub(directory / "origin")
    with serve(directory / "origin") as address:
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(directory / "cache"), "OMP_NUM_THREADS": "1",
                       "NLTK_DATA": str(directory / "origin" / "nltk_data"), "CUDA_VISIBLE_DEVICES": "",
                       "NO_PROXY": "127.0.0.1"}
        status = subprocess.run(sys.argv[2:], env=os.environ | environment).returncode
    sys.exit(status)
