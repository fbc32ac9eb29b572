"""Bad input to every script, as one table: exit code 2, one line that names the file, row or flag, nothing written.

Beside tests/test_inputs.py, which goes through SFT's and DPO's rows, here every script meets broken files, adapters,
models, results and places. No model loads.
"""
import gzip
import importlib
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
import tyro

import common
import inputs
from conftest import write_jsonl

REPO = Path(common.__file__).parent
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


class ModelLoads(Exception):
    """Raised where a model would load: good input gets as far as that."""


@pytest.fixture(scope="session")
def eval_data(tmp_path_factory):
    """A copy of the demo's evaluation data, one item a task."""
    return Path(shutil.copytree(REPO / "data" / "demo" / "eval", tmp_path_factory.mktemp("eval") / "eval"))


@pytest.fixture(scope="session")
def good_args(sft_args, dpo_args, kto_args, reward_args, ppo_args, grpo_args, sft_run, dpo_run, data_dir, eval_data,
              tmp_path_factory):
    """Arguments of each script that are fine as they are; its outputs come from `place`."""
    prompts = write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl",
                          [{"prompt": f"why {i}"} for i in range(6)])
    return {"sft": sft_args, "dpo": {**dpo_args, "sft_adapter": sft_run}, "kto": kto_args, "reward": reward_args,
            "ppo": ppo_args, "grpo": grpo_args,
            "evaluate": dict(adapter=(sft_run,), eval_data=str(eval_data), limit=1, max_gen_toks=8, dtype="float32",
                             device="cpu"),
            "judge": dict(rows=(dpo_run,), against=sft_run, data=prompts, max_new_tokens=12, dtype="float32",
                          device="cpu")}


class Place:
    """A test's directory and what cases make in it. Each method returns changed arguments."""

    def __init__(self, directory, good, runs, model):
        self.directory, self.good, self.runs, self.model = directory, good, runs, model

    def file(self, name, content):
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
        return str(path)

    def adapter(self, kind="sft"):
        """A copy of a finished run, to break."""
        return Path(shutil.copytree(self.runs[kind], self.directory / "runs" / Path(self.runs[kind]).name))

    def data(self, texts):
        """Conversations, and held-out ones, whose answers are the texts."""
        for name in ("x", "x_heldout"):
            write_jsonl(self.directory / f"{name}.jsonl", [
                {"messages": [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": text}]}
                for i, text in enumerate(texts)])
        return str(self.directory / "x.jsonl")

    def base(self):
        """A copy of the tiny model, to break."""
        return Path(shutil.copytree(self.model, self.directory / "model"))


@pytest.fixture
def place(tmp_path, good_args, sft_run, dpo_run, reward_run, tiny_model):
    return Place(tmp_path, good_args, {"sft": sft_run, "dpo": dpo_run, "reward": reward_run}, tiny_model)


def outputs(script, directory):
    """Where a script writes, in the test's directory."""
    new = str(directory / "new")
    return {"evaluate": {"out": new}, "judge": {"results": new}}.get(script) or {
        "out": f"{new}/run", **({"results": f"{new}/results"} if script in ("reward", "ppo", "grpo") else {})}


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CASES = {}


def case(name, scripts, *parts):
    """Adds a case for each of the scripts: a function of (place, script) that makes the bad input and returns arguments.
    parts: what the error must name."""
    def add(make):
        for script in scripts.split():
            CASES[f"{script}: {name}"] = (script, make, parts)
        return make
    return add


# -- data files -----------------------------------------------------------------------------------

DATA = "sft dpo kto reward ppo judge"
CONTENT = {
    "LFS pointer": ("x.jsonl", LFS), "LFS pointer as parquet": ("x.parquet", LFS),
    "UTF-16": ("x.jsonl", '{"prompt": "a"}\n'.encode("utf-16")),
    "only a byte order mark": ("x.jsonl", b"\xef\xbb\xbf"),
    "NUL bytes": ("x.jsonl", b"\0" * 64),
    "nested arrays": ("x.jsonl", b"[" * 100_000 + b"\n"),
    "nested objects": ("x.jsonl", b'{"a":' * 100_000 + b"\n"),
    "infinite number": ("x.jsonl", b'{"prompt": 1e999, "completion": "a"}\n' * 9),
    "integer of 10,000 digits": ("x.jsonl", b'{"prompt": ' + b"9" * 10_000 + b"}\n"),
    "half a character": ("x.jsonl", b'{"prompt": "\\udc00"}\n'),
    "gzip of gzip": ("x.jsonl.gz", gzip.compress(gzip.compress(b'{"prompt": "a"}\n'))),
    "gzip cut short": ("x.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 999)[:-9]),
    "empty array": ("x.json", b"[]"), "null": ("x.json", b"null"), "null rows": ("x.jsonl", b"null\nnull\n"),
    "no columns": ("x.jsonl", b"{}\n" * 40), "no rows": ("x.csv", b"prompt,chosen,rejected\n"),
    "parquet cut short": ("x.parquet", b"PAR1" + b"\0" * 100 + b"PAR1"),
    "a row cut short": ("x.jsonl", b'{"prompt": "a", "comple'),
}
for name, (file, content) in CONTENT.items():
    @case(f"data, {name}", DATA, file)
    def _(place, script, file=file, content=content):
        return {"data": place.file(file, content), **({"heldout_data": None} if script != "judge" else {})}

# -- flags that name files ------------------------------------------------------------------------

PLACES = {"empty": "", "colon": ":", "root": "/", "NUL": "a\0b", "too long": "x" * 5000, "parent": "..", "at": "@",
          "device": "/dev/null", "newline": "a\nb.jsonl", "here": "."}
for name, value in PLACES.items():
    if value != "/":  # all data files of this machine would be looked for
        @case(f"--data {name}", DATA)
        def _(place, script, value=value):
            return {"data": value}

    @case(f"--model {name}", "sft reward evaluate")
    def _(place, script, value=value):
        return {"model": value, **({"adapter": ("none",)} if script == "evaluate" else {})}

    @case(f"adapter {name}", "dpo evaluate judge")
    def _(place, script, value=value):
        return with_adapter(script, value)

OUTPUTS = {"NUL": "a\0b", "too long": "x" * 5000, "under a device": "/dev/null/run", "a file": "FILE",
           "under a file": "FILE/x/y",
           "a circle of links": "LOOP/x"} | ({"not to be written": "/proc/rungs/x"} if Path("/proc").is_dir() else {})
for name, value in OUTPUTS.items():
    def output(place, script, flag, value):
        if "LOOP" in value:
            (place.directory / "loop").symlink_to(place.directory / "loop")
        return {flag: value.replace("FILE", place.file("file", "x")).replace("LOOP", str(place.directory / "loop"))}

    @case(f"--out {name}", "sft dpo grpo evaluate", "--out")
    def _(place, script, value=value):
        return output(place, script, "out", value)

    @case(f"--results {name}", "reward ppo grpo judge", "--results")
    def _(place, script, value=value):
        return output(place, script, "results", value)


@case("--stamp under a file", "evaluate", "--stamp")
def _(place, script):
    return {"stamp": place.file("file", "x") + "/stamp"}


# -- adapters -------------------------------------------------------------------------------------

def with_adapter(script, adapter):
    return {"evaluate": {"adapter": (str(adapter),)}, "judge": {"rows": (str(adapter),)}}.get(script,
                                                                                          {"sft_adapter": str(adapter)})


def broken_adapter(place, script):
    return place.adapter("dpo" if script == "judge" else "sft")


GARBAGE = {"empty": b"", "an LFS pointer": LFS, "null": b"null", "a list": b"[]", "an empty object": b"{}",
           "NUL bytes": b"\0" * 100,
           "binary": bytes(range(256))}
for file in ("run.json", "adapter_config.json", "adapter_model.safetensors"):
    for name, content in GARBAGE.items():
        @case(f"adapter's {file} is {name}", "dpo evaluate judge", file)
        def _(place, script, file=file, content=content):
            adapter = broken_adapter(place, script)
            (adapter / file).write_bytes(content)
            return with_adapter(script, adapter)
for file in ("adapter_config.json", "adapter_model.safetensors"):
    @case(f"adapter without {file}", "dpo kto ppo grpo evaluate judge", file)
    def _(place, script, file=file):
        adapter = broken_adapter(place, script)
        (adapter / file).unlink()
        return with_adapter(script, adapter)
for name, content in GARBAGE.items():
    @case(f"prompts.json is {name}", "judge", "prompts.json")
    def _(place, script, content=content):
        adapter = broken_adapter(place, script)
        (adapter / "prompts.json").write_bytes(content)
        return with_adapter(script, adapter)

    @case(f"the reward model's prompts.json is {name}", "ppo", "prompts.json")
    def _(place, script, content=content):
        adapter = place.adapter("reward")
        (adapter / "prompts.json").write_bytes(content)
        return {"reward_adapter": str(adapter)}

CONFIGS = {"r 0": {"r": 0}, "r text": {"r": "16"}, "r null": {"r": None}, "r true": {"r": True},
           "alpha null": {"lora_alpha": None},
           "a bias": {"bias": "all"}, "DoRA": {"use_dora": True}, "IA3": {"peft_type": "IA3"},
           "fan": {"fan_in_fan_out": True}}
for name, changes in CONFIGS.items():
    @case(f"adapter_config.json, {name}", "dpo evaluate", "sft_v2")
    def _(place, script, changes=changes):
        adapter = broken_adapter(place, script)
        edit(adapter / "adapter_config.json", **changes)
        return with_adapter(script, adapter)

    @case(f"a plain adapter's adapter_config.json, {name}", "dpo evaluate", "adapter_config.json")
    def _(place, script, changes=changes):
        adapter = broken_adapter(place, script)
        (adapter / "run.json").unlink()
        edit(adapter / "adapter_config.json", **changes)
        return with_adapter(script, adapter)


@case("a pattern that is no regular expression", "dpo judge", "adapter_config.json")
def _(place, script):
    adapter = broken_adapter(place, script)
    (adapter / "run.json").unlink()
    edit(adapter / "adapter_config.json", rank_pattern={"(": 4})
    return with_adapter(script, adapter)


for key in common.RUN_FIELDS:
    for name, value in {"missing": ..., "null": None, "a list": [5]}.items():
        if (key, name) not in {("parent", "missing"), ("parent", "null")}:
            @case(f"run.json, {key} {name}", "dpo evaluate judge", "run.json", key)
            def _(place, script, key=key, value=value):
                adapter = broken_adapter(place, script)
                run = json.loads((adapter / "run.json").read_text())
                run.pop(key) if value is ... else run.update({key: value})
                (adapter / "run.json").write_text(json.dumps(run))
                return with_adapter(script, adapter)


@case("an adapter as pickled weights", "dpo evaluate judge", "adapter_model.bin", "unpickling runs code")
def _(place, script):
    adapter = broken_adapter(place, script)
    (adapter / "run.json").unlink()
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Unpickled(place.directory / "unpickled")))
    return with_adapter(script, adapter)


class Unpickled:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# -- models ---------------------------------------------------------------------------------------

for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"):
    for name, content in GARBAGE.items():
        if (file, name) not in {("generation_config.json", "an empty object"), ("tokenizer_config.json",
                                                                                "an empty object")}:
            @case(f"model's {file} is {name}", "sft", "model")
            def _(place, script, file=file, content=content):
                model = place.base()
                (model / file).write_bytes(content)
                return {"model": str(model)}

SHAPES = {"no layers": {"num_hidden_layers": 0}, "layers null": {"num_hidden_layers": None},
          "-1 layers": {"num_hidden_layers": -1},
          "hidden text": {"hidden_size": "64"}, "vocabulary 10": {"vocab_size": 10},
          "vocabulary 10^12": {"vocab_size": 10**12},
          "3 heads": {"num_attention_heads": 3}, "no type": {"model_type": None},
          "positions text": {"max_position_embeddings": "512"},
          "code of its own": {"model_type": "mine", "auto_map": {"AutoConfig": "x.Y"}},
          "rope text": {"rope_scaling": "x"},
          "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
          "unknown activation": {"hidden_act": "none"}}
for name, changes in SHAPES.items():
    @case(f"config.json, {name}", "sft evaluate", "model")
    def _(place, script, changes=changes):
        model = place.base()
        edit(model / "config.json", **changes)
        return {"model": str(model), **({"adapter": ("none",)} if script == "evaluate" else {})}

# -- results and evaluation data ------------------------------------------------------------------

RESULTS = {"a newer version": '{"schema_version": 99, "runs": []}', "a version as text": '{"schema_version": "1", "runs": []}',
           "no version": '{"runs": []}', "no runs": '{"schema_version": 1}',
           "runs as an object": '{"schema_version": 1, "runs": {}}',
           "a row of null": '{"schema_version": 1, "runs": [null]}', "an empty row": '{"schema_version": 1, "runs": [{}]}',
           "an LFS pointer": LFS.decode(), "nothing": "", "a merge conflict": "<<<<<<< HEAD\n{}\n"}
for name, content in RESULTS.items():
    @case(f"metrics.json holds {name}", "evaluate", "metrics.json")
    def _(place, script, content=content):
        place.file("new/metrics.json", content)
        return {}
for file in ("mmlu/test", "mmlu/dev", "gsm8k/test", "ifeval/train", "truthfulqa_mc2/validation"):
    for name, content in {"empty": b"", "LFS": LFS, "null": b"null\n", "a list": b"[]\n", "an object": b"{}\n",
                          "binary": bytes(range(256)), "cut short": -20}.items():
        @case(f"{file} {name}", "evaluate", file)
        def _(place, script, file=file, content=content):
            data = Path(shutil.copytree(place.good["evaluate"]["eval_data"], place.directory / "eval"))
            path = next(data.glob(f"{file}.jsonl*"))
            path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
            return {"eval_data": str(data)}


# -- the table ------------------------------------------------------------------------------------

@pytest.fixture
def loads(monkeypatch):
    """A model that would load raises ModelLoads."""
    def from_pretrained(*args, **kwargs):
        raise ModelLoads
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)


def run(script, place, changes):
    program = importlib.import_module(script)
    program.main(program.Args(**{**place.good[script], **outputs(script, place.directory), **changes}))


def test_how_many():
    assert len(CASES) >= 350


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, place, loads, monkeypatch, capsys):
    script, make, parts = CASES[name]
    monkeypatch.chdir(place.directory)
    changes = make(place, script)

    def files():
        return {str(p) for p in place.directory.rglob("*") if not p.name.endswith(".lock")}
    before = files()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(script, place, changes)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert [part for part in parts if part not in error] == [], error
    assert files() == before


# -- good input that looks bad --------------------------------------------------------------------

TEMPLATES = {"endless": "{% for i in range(10**12) %}a{% endfor %}", "raises": "{{ raise_exception('no') }}",
             "reaches out": "{{ ''.__class__.__mro__ }}", "no template": "{% for %}", "undefined": "{{ x.y.z }}",
             "LFS": LFS.decode()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_cant_be_used_is_replaced_by_ours(name, place, loads, capsys):
    """Jinja's sandbox keeps a template from running long or reaching Python; why ours is used is said."""
    model = place.base()
    (model / "chat_template.jinja").write_text(TEMPLATES[name])
    with pytest.raises(ModelLoads):
        run("sft", place, {"model": str(model)})
    assert "plain role markers" in capsys.readouterr().out


TEXTS = {"ends a turn": "read<|im_end|>\n<|im_start|>user\nmore", "NUL": "a\0b",
         "right to left": "\u202eשלום عليكم\u202c",
         "emoji": "👩‍👩‍👧‍👦 🇩🇪 e\u0301", "braces": "{{ 1/0 }} {% raise %}", "separators": "a\u2028b\u2029c\x85d",
         "control": "\x1b[31m\x07",
         "half-width": "\ufeffａ", "trained mark": "⟦a⟧"}


@pytest.mark.parametrize("name", TEXTS)
def test_strange_text_is_text(name, place, loads, capsys, monkeypatch):
    """Whatever an answer holds, it is trained as it stands, and one stop token ends it."""
    text, seen, preflight = TEXTS[name], [], inputs.preflight

    def keep(tokenizer, examples, *rest):
        seen.extend((tokenizer, e) for e in examples)
        return preflight(tokenizer, examples, *rest)
    monkeypatch.setattr(inputs, "preflight", keep)
    with pytest.raises(ModelLoads):
        run("sft", place, {"data": place.data([text] * 9), "heldout_data": None})
    assert len(seen) == 9
    for tokenizer, e in seen:
        assert [i for i in e.targets if i in tokenizer.stop_ids] == [e.targets[-1]]
        assert tokenizer.decode(e.targets[:-1]) == text


def test_one_row_and_the_same_row_again(place, loads, capsys):
    rows = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    heldout = write_jsonl(place.directory / "h.jsonl", [{"messages": [{**rows[0], "content": "how"}, rows[1]]}])
    for times in (1, 20):
        data = write_jsonl(place.directory / "x.jsonl", [{"messages": rows}] * times)
        with pytest.raises(ModelLoads):
            run("sft", place, {"data": data, "heldout_data": heldout, "out": str(place.directory / f"run{times}")})


@pytest.mark.parametrize("home", [None, "/nowhere/at/all"])
def test_without_a_home_in_ascii_and_in_a_strange_place(home, place, loads, monkeypatch):
    """HOME unset or absent, a terminal that is ASCII, and a directory with spaces, brackets and other letters."""
    monkeypatch.delenv("HOME", raising=False) if home is None else monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    strange = place.directory / "a b [c] {d} é 日本"
    shutil.copytree(place.model, strange / "model")
    shutil.copytree(Path(place.good["sft"]["data"]).parent, strange / "data")
    with pytest.raises(ModelLoads):
        run("sft", place, {"model": str(strange / "model"), "data": str(strange / "data" / "sft.jsonl"),
                           "out": str(strange / "run")})


@pytest.mark.parametrize("script", ["sft", "dpo", "kto", "reward", "ppo", "grpo", "evaluate", "judge", "report"])
def test_unknown_flags(script, capsys):
    program = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        tyro.cli(program.Args, args=["--no-such-flag", "1"])
    assert stop.value.code == 2 and "no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "runs/x"),
                                   FloatingPointError("loss is nan\nat step 3"),
                                   torch.OutOfMemoryError("CUDA out of memory")])
def test_a_run_that_fails_says_so_in_one_line(error, capsys, monkeypatch):
    """And in full with RUNGS_DEBUG; a fault in the code always shows its traceback."""
    assert sys.excepthook is common.report_failure
    common.report_failure(type(error), error, None)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and " ".join(str(error).split()) in printed
    monkeypatch.setenv("RUNGS_DEBUG", "1")
    common.report_failure(type(error), error, None)
    assert not capsys.readouterr().err.startswith("error: ")
    monkeypatch.delenv("RUNGS_DEBUG")
    common.report_failure(TypeError, TypeError("a fault"), None)
    assert capsys.readouterr().err.startswith("TypeError: a fault")


SECRETS = {"HF_TOKEN": "hf_secret4711aaaa", "WANDB_API_KEY": "wandbsecret4711", "OPENAI_API_KEY": "sk-secret4711bbbb"}


def test_no_secret_is_written_or_said(sft_args, place, monkeypatch, capsys):
    """A run's files, what it prints, and the error of one that fails: none holds a key of the environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    sft = importlib.import_module("sft")
    sft.main(sft.Args(**sft_args, out=str(place.directory / "run")))
    with pytest.raises(SystemExit):
        sft.main(sft.Args(**{**sft_args, "model": "gone"}, out=str(place.directory / "other")))
    printed = "".join(capsys.readouterr())
    written = [p.read_bytes() for p in place.directory.rglob("*") if p.is_file()]
    assert len(written) > 8 and "error: " in printed
    for value in SECRETS.values():
        assert value not in printed and not any(value.encode() in content for content in written)
