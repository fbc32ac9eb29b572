"""The repository holds together: arguments, imports, the commands in README.md and Makefile, what is committed."""
import ast
import dataclasses
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

import common

REPO = Path(__file__).parent.parent


def is_script(path):
    return any(isinstance(node, ast.ClassDef) and node.name == "Args" for node in ast.parse(path.read_text()).body)


SCRIPTS = sorted(p.stem for p in REPO.glob("*.py") if is_script(p))
TOOLS = sorted(f"tools/{p.stem}" for p in (REPO / "tools").glob("*.py"))


def committed():
    """What is in the repository, or would be by the next `git add`: paths relative to its root."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPO,
                            capture_output=True, check=True, text=True).stdout.split("\0")
    return [name for name in listed if name and (REPO / name).is_file()]


def test_the_scripts_are_there():
    assert {"tools/convert_gguf", "tools/merge"} <= set(TOOLS)
    assert {"sft", "dpo", "reward", "ppo", "grpo", "kto", "evaluate", "report"} <= set(SCRIPTS)
    assert "common" not in SCRIPTS


# -- arguments ------------------------------------------------------------------------------------

def args_class(script):
    (node,) = [n for n in ast.parse((REPO / f"{script}.py").read_text()).body
               if isinstance(n, ast.ClassDef) and n.name == "Args"]
    return node


def docstrings(script):
    """{field: the text below it in the source, or None}."""
    body, found = args_class(script).body, {}
    for node, below in zip(body, [*body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            found[node.target.id] = text
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_field(script, monkeypatch, capsys):
    """`python X.py --help`, run as the main program: exit code 0, and each field's flag with its docstring."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPO / f"{script}.py"), run_name="__main__")
    assert stop.value.code == 0
    help_text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    described = docstrings(script)
    assert described.keys() == {f.name for f in dataclasses.fields(importlib.import_module(script).Args)}
    for name, text in described.items():
        assert f"--{name.replace('_', '-')}" in help_text
        assert text and len(text) > 10, f"{script}.Args.{name} has no docstring"
        assert " ".join(text.split()) in help_text, f"--help does not show the docstring of {name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_args_are_a_frozen_dataclass_of_at_most_32_fields(script):
    """42 for the on-policy methods: each detail of 2403.17031 that people change is a flag."""
    args = importlib.import_module(script).Args
    assert 0 < len(dataclasses.fields(args)) <= (42 if script in ("ppo", "grpo") else 32)
    name = dataclasses.fields(args)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(args(), name, None)


def reads(path):
    """Names x in `args.x` and `self.args.x`, where they are read."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if (isinstance(owner, ast.Name) and owner.id == "args") or \
                    (isinstance(owner, ast.Attribute) and owner.attr == "args"):
                found.add(node.attr)
    return found


def uses_run(path):
    return any(isinstance(n, ast.Attribute) and n.attr == "Run" or isinstance(n, ast.Name) and n.id == "Run"
               for n in ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_is_read(script):
    """In the script, or in common.py and inputs.py where the script hands its Args to common.Run."""
    path = REPO / f"{script}.py"
    read = reads(path) | (reads(REPO / "common.py") | reads(REPO / "inputs.py") if uses_run(path) else set())
    fields = {f.name for f in dataclasses.fields(importlib.import_module(script).Args)}
    assert fields - read == set(), "fields that nothing reads"
    assert reads(path) - fields == set(), "reads of fields that Args doesn't have"


# -- imports --------------------------------------------------------------------------------------

def imports(path):
    """First parts of the names of all modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0] if node.level == 0 else ".")
    return found


NO_NAMES = {"found", "place", "own", "said", "kept", "other", "what"}


def names_given(tree):
    """(line, name) of each variable, parameter, attribute, function and class that a module names."""
    for node in ast.walk(tree):
        given = {ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.FunctionDef: "name", ast.ClassDef: "name"}
        if (attribute := given.get(type(node))) and isinstance(getattr(node, "ctx", ast.Store()), ast.Store):
            yield node.lineno, getattr(node, attribute)


def test_names_say_what_they_name():
    """Words that mean nothing by themselves are no names of variables."""
    tree = ast.parse("def f(place):\n    for own in place:\n        self.kept = other = own\n")
    assert sorted(names_given(tree)) == [(1, "f"), (1, "place"), (2, "own"), (3, "kept"), (3, "other")]
    paths = [path for folder in ("", "fast", "tools", "bench") for path in sorted((REPO / folder).glob("*.py"))]
    assert len(paths) > 40 and [f"{path.relative_to(REPO)}:{line}: {name}" for path in paths
                                for line, name in names_given(ast.parse(path.read_text())) if name in NO_NAMES] == []


def test_scripts_import_common_and_libraries_only():
    """And the layers below them: files <- common <- chat <- inputs; fast/ imports neither and nobody but common imports it."""
    ours = {p.stem for p in REPO.glob("*.py")}
    parts = {"files": (), "turns": (), "common": ("files", "tracking", "publish", "turns"), "chat": ("common",),  # parts of one script
             "inputs": ("common", "chat"), "report": ("verdicts", "learned", "judged", "tables", "plots"),
             "plots": ("verdicts",), "tables": ("verdicts",), "learned": ("tables", "verdicts"),
             "judged": ("guardrails", "learned", "tables", "verdicts"), "judge": ("ask", "guardrails"),
             "evaluate": ("harness",)}
    for name in ours:
        allowed = {*parts.get(name, ())} if name in ("files", "turns", "common", "chat", "inputs") else {
            "common", "chat", "inputs", *parts.get(name, ())}
        assert imports(REPO / f"{name}.py") & (ours | {".", "tests", "conftest"}) <= allowed - {name}, name
        assert name == "common" or "fast" not in imports(REPO / f"{name}.py"), name
    assert not any("common" in imports(path) for path in (REPO / "fast").glob("*.py"))
    assert all("common" in imports(REPO / f"{s}.py") for s in SCRIPTS)


# -- commands -------------------------------------------------------------------------------------

def parses(words):
    """Check a command's words: a script's with its Args, exactly as typed; True when it was one of ours."""
    words = list(words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # environment
        words.pop(0)
    if not words:
        return False
    program = Path(words[0]).name
    if program == "torchrun" or words[1:3] == ["-m", "torch.distributed.run"]:
        words = ["python", *words[next(i for i, w in enumerate(words) if w.endswith(".py")):]]
    elif not re.fullmatch(r"python3?(\.\d+)?", program) or len(words) < 2 or not words[1].endswith(".py"):
        return False
    script = words[1].removesuffix(".py")
    if words[2:] == ["--help"] and (REPO / words[1]).is_file():
        return True
    assert script in SCRIPTS + TOOLS, f"no such script: {words[1]}"
    try:
        tyro.cli(importlib.import_module(script.replace("/", ".")).Args, args=words[2:])
    except SystemExit as e:
        pytest.fail(f"`{shlex.join(words)}` does not parse (exit {e.code})")
    return True


def commands(text):
    """Simple commands of a shell text as lists of words: continued lines joined, split at && ; and |, no comments."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars="&;|")
        lexer.whitespace_split = True
        words = []
        for token in [*lexer, ";"]:
            if set(token) <= set("&;|"):
                found += [words] if words else []
                words = []
            else:
                words.append(token)
    return found


OURS = re.compile(r"^\s*(?:\$ )?(?:[A-Z_]+=\S* )*(?:python3?|torchrun|make)\s.*", re.M)
OTHERS = {".", "git", "cd", "pip", "lm_eval", "vllm", "transformers", "llama-server", "llama.cpp/convert_hf_to_gguf.py",
          "llama.cpp/convert_lora_to_gguf.py"}  # programs of others that a document may name


DOCUMENTS = ["README.md", *sorted(f"docs/{p.name}" for p in (REPO / "docs").glob("*.md"))]


def commands_of(document):
    """Commands of a document: of its shell blocks, and of any other code that begins like one of ours."""
    text = (REPO / document).read_text()
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
    blocks = fence.findall(text)
    shell = [block for language, block in blocks if language in ("bash", "sh", "shell", "console")]
    rest = [block for language, block in blocks if language in ("", "text")]
    rest += re.findall(r"`([^`]+)`", fence.sub("", text))
    shell += [line for code in rest for line in OURS.findall(code.replace("\\\n", " "))]
    return [c for code in shell for c in commands(code)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what is committed, for make: a fresh clone, and nothing that make does touches this checkout."""
    directory = tmp_path_factory.mktemp("clone")
    for name in committed():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO / name, directory / name)
    return directory


def make(clone, *words, **exported):
    """make, with no variable of the caller's: the Makefile takes them from the environment and from an outer make."""
    env = {k: os.environ[k] for k in ("PATH", "HOME") if k in os.environ} | exported
    return subprocess.run(["make", *words], cwd=clone, env=env, capture_output=True, text=True, timeout=60)


def test_commands_of_the_documents_parse(clone):
    """Every `python X.py …`, `torchrun … X.py …` and `make …` in README.md and docs/ is one that the code accepts, every
    script has one, and README.md begins with those that a newcomer needs."""
    python, made = [], []
    for words in [words for document in DOCUMENTS for words in commands_of(document)]:
        if parses(words):
            python.append(words)
        elif words[0] == "make":  # a dry run of more than one seed lacks the first one's reward models
            result = make(clone, "-n", *words[1:], *(["SEEDS=42"] if "seeds" in words else []))
            assert result.returncode == 0, f"`{shlex.join(words)}`: {result.stderr}"
            made.append(words)
        else:
            assert words[0] in OTHERS, f"what is `{shlex.join(words)}`?"
    assert {f"{script}.py" for script in SCRIPTS} <= {w for words in python for w in words}
    assert {"controls", "seeds", "sweep", "speedrun", "test", "help"} <= {w for words in made for w in words}
    assert [shlex.join(words) for words in commands_of("README.md")[:5]] == [
        "make demo", "make all", ". .venv/bin/activate", "python sft.py",
        "python dpo.py --beta 0.1 --lr 5e-6 --sft-adapter runs/sft_v2"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_in_a_scripts_docstring_parse(script):
    text = ast.get_docstring(ast.parse((REPO / f"{script}.py").read_text()))
    lines = [re.split(r"\s{3,}", line.strip())[0] for line in OURS.findall(text)]  # an explanation may stand beside
    found = [words for line in lines for words in commands(line)]
    assert [words for words in found if not parses(words)] == []
    assert any(f"{script}.py" in words for words in found)


@pytest.mark.parametrize("words", [["all"], ["demo"], ["all", "MODEL=models/mine", "QUANT=none", "SFT_DATA=a.jsonl",
                                                      "PREF_DATA=b.jsonl", "GRPO_DATA=c.jsonl", "EVAL_DATA=data/demo/eval", "OUT=runs/mine"],
                                   ["all", "NPROC=2"], ["all", "PY=python3"]],
                         ids=["all", "demo", "replaced", "torchrun", "own python"])
def test_commands_of_the_makefile_parse(clone, words):
    """What make would run, from nothing to the table: each script's command line parses, in the order of the climb."""
    result = make(clone, "-n", *words)
    assert result.returncode == 0, result.stderr
    ours = [c for c in commands(result.stdout) if parses(c)]
    scripts = [next(Path(w).stem for w in c if w.endswith(".py")) for c in ours]
    assert scripts.count("evaluate") == 1 and scripts[-2:] == ["judge", "report"]
    climb = [scripts.index(script) for script in ("sft", "dpo", "reward", "ppo", "grpo", "kto")]
    assert climb == sorted(climb) and climb[-1] < len(scripts) - 1
    assert [c[c.index("--part") + 1] for c, s in zip(ours, scripts) if s == "reward"] == ["A", "J"]  # J: the one that watches
    assert len(re.findall(r"\w+\.py\b", result.stdout)) == len(ours), "commands that were not checked"
    if "OUT=runs/mine" in words:
        for script, flags in (("sft", ["--model models/mine", "--data a.jsonl", "--quantization none"]),
                              ("dpo", ["--data b.jsonl", "--sft-adapter runs/mine/sft_v2"]),
                              ("reward", ["--model models/mine", "--data b.jsonl", "--quantization none"]),
                              ("ppo", ["--data b.jsonl", "--reward-adapter runs/mine/rm_v1"]),
                              ("grpo", ["--data c.jsonl", "--sft-adapter runs/mine/sft_v2"]),
                              ("kto", ["--data b.jsonl", "--sft-adapter runs/mine/sft_v2"]),
                              ("evaluate", ["--model models/mine", "--eval-data data/demo/eval"]),
                              ("judge", ["--model models/mine", "--pref-data b.jsonl", "--rows base runs/mine/dpo_v1",
                                         "--against runs/mine/sft_v2", "--reward-adapter runs/mine/rm_v1"])):
            for c in (c for c, s in zip(ours, scripts) if s == script):
                assert all(flag in shlex.join(c) for flag in flags), f"{shlex.join(c)} lacks one of {flags}"
        assert "ultra" not in result.stdout.lower() and "runs/mine" in result.stdout


@pytest.mark.parametrize("word", ["GPUS=4", "PER_GPU=2"])
def test_side_by_side_the_longest_runs_come_first(clone, word):
    """Whatever make can start next, it starts in this order; on one GPU, one after the other, the order of the climb stays."""
    printed = make(clone, "-n", "all", word, "POLICIES=sft_v2 dpo_v1 ppo_v1 grpo_v1 kto_v1 grpo_base").stdout
    runs = re.findall(r"--out runs/(\w+)", printed)
    assert runs == ["rm_v1", "rm_watch", "sft_v2", "ppo_v1", "grpo_v1", "grpo_base", "dpo_v1", "kto_v1"]


@pytest.mark.parametrize("words, processes", [((), 1), (("PER_GPU=2",), 1), (("GPUS=2", "PER_GPU=2"), 6), (("GPUS=4",), 6),
                                              (("PER_GPU=3",), 2), (("PER_GPU=9",), 6),
                                              (("PER_GPU=4", "PROTOCOL=plain chat"), 6)])
def test_processes_that_evaluate(clone, words, processes):
    """On one GPU all rows in one process per protocol, or divided among PER_GPU - 1, which take their turn where another
    may be on it; on several GPUs one process for each row."""
    lines = [line for line in make(clone, "-n", "all", *words).stdout.splitlines() if " evaluate.py " in line]
    assert len(lines) == processes
    assert all(re.match(r"RUNGS_GPU_SHARED=\d RUNGS_GPUS=\d ", line) for line in lines) == bool(words)
    protocols = 2 if "PROTOCOL=plain chat" in words else 1
    assert sum("--adapter none " in line or "--adapter" not in line for line in lines) == protocols
    for row in ("dpo_v1", "ppo_v1", "grpo_v1", "kto_v1"):
        assert sum(f" runs/{row} " in line for line in lines) == protocols, row


@pytest.mark.parametrize("words, ranks", [((), ""), (("GPUS=2",), ""), (("NPROC=2",), "2"), (("GPUS=8", "NPROC=4"), "4")])
def test_gpus_of_a_training(clone, words, ranks):
    """GPUS is how many are shared out, NPROC how many each has."""
    lines = [line for line in make(clone, "-n", "all", *words).stdout.splitlines()
             if re.search(r" (sft|reward|dpo|ppo|grpo|kto)\.py ", line)]
    for line in lines:
        assert re.findall(r"-m torch.distributed.run --standalone --nproc-per-node (\d)", line) == list(ranks), line
        assert line.startswith("RUNGS_GPUS=") == any("GPUS" in word for word in words)
    assert len(lines) == 7


@pytest.mark.parametrize("word", ["PER_GPU=", "PER_GPU=2.5", "GPUS=0", "NPROC=two"])
def test_numbers_of_gpus_are_whole(clone, word):
    """Without an error, make would skip the evaluation or divide by nothing."""
    result = make(clone, "-n", "all", word)
    assert result.returncode and f"{word}: want a whole number above 0" in result.stderr


def test_make_trains_each_method_of_the_climb(clone):
    """common.METHODS, by which evaluate.py and report.py order the rows, and the Makefile name the same runs."""
    trained = {(Path(c[1]).stem, Path(c[c.index("--out") + 1]).name) for c in commands(make(clone, "-n", "all").stdout)
               if parses(c) and "--overwrite" in c}
    assert trained == {(method, row) for method, (_, row) in common.METHODS.items()} | {("reward", "rm_watch")}


@pytest.mark.parametrize("words, exported", [((), {}), (("RESULTS=results", "README=README.md"), {}),
                                             ((), {"RESULTS": "results", "OUT": "runs", "README": "README.md"})])
def test_make_demo_stays_out_of_the_committed_results(clone, words, exported):
    """Everything the demo writes is under runs/demo, whatever variables are given or exported: no command of it names
    another --out, --results or README."""
    ours = [c for c in commands(make(clone, "-n", "demo", *words, **exported).stdout)
            if parses(c) and not c[1].startswith("tools/")]  # the model's directory is nobody's result
    for c in ours:
        places = [value for flag, value in zip(c, c[1:]) if flag in ("--out", "--results")]
        assert places and all(p == "runs/demo" or p.startswith("runs/demo/") for p in places), shlex.join(c)
        assert "report.py" not in c or c[c.index("--readme") + 1] == "none"


def test_variables_of_the_environment_are_named(clone):
    """Another program's OUT or MODEL moves the whole climb: make says what it took from there, and nothing else."""
    def notes(*words, **exported):
        return [line for line in make(clone, "-n", *words, **exported).stdout.splitlines() if line.startswith("note: ")]
    taken = {"OUT": "runs/other", "SEED": "7", "TERM": "dumb"}
    assert sorted(notes("all", **taken)) == ["note: OUT=runs/other, from the environment", "note: SEED=7, from the environment"]
    assert notes("all", "OUT=runs/mine", OUT="runs/other") == notes("all") == notes("demo", **taken) == []


def test_make_help_lists_each_target(clone):
    """Every phony target that is meant for people, one a line with a text; no other names."""
    rules = (clone / "Makefile").read_text()
    phony = {t for line in re.findall(r"^\.PHONY:(.*)$", re.sub(r"\\\n", " ", rules), re.M) for t in line.split()}
    phony = {t for t in phony if t.lower() != "force" and not t.startswith((".", "_"))}
    assert {"all", "demo", "test", "help"} <= phony
    result = make(clone, "help")
    assert result.returncode == 0, result.stderr
    listed = re.findall(r"^\s*(?:make )?([a-z][\w-]*)\s+\S.{5,}$", result.stdout, re.M)
    assert sorted(listed) == sorted(phony)
    assert make(clone).stdout == result.stdout  # and it is what `make` alone shows


def test_reading_the_makefile_writes_nothing(clone):
    before = {p: p.stat().st_mtime_ns for p in clone.rglob("*")}
    for words in (["help"], ["-n", "demo"], ["-n", "all"]):
        make(clone, *words)
    assert {p: p.stat().st_mtime_ns for p in clone.rglob("*")} == before


# -- documents ------------------------------------------------------------------------------------

def test_log_keys_are_explained(sft_run, dpo_run, reward_run, ppo_run, grpo_run, kto_run):
    """Each key of log.jsonl stands in docs/log-keys.md, in code type."""
    named = set(re.findall(r"`(\w+)`", (REPO / "docs" / "log-keys.md").read_text()))
    for run in (sft_run, dpo_run, reward_run, ppo_run, grpo_run, kto_run):
        keys = {k for line in (Path(run) / "log.jsonl").read_text().splitlines() for k in json.loads(line)} - {"step"}
        assert keys - named == set(), "keys that docs/log-keys.md doesn't explain"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_a_document_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)\)", (REPO / document).read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not ((REPO / document).parent / link).exists()] == []
    assert local or document != "README.md"


def test_the_reading_order_names_each_file_with_its_length():
    """A line per file, in README.md: every module at the top is there, and its number of lines is about right."""
    stated = {name: int(lines.replace(",", "")) for name, lines in
              re.findall(r"^\| \[[^]]+\]\(([^)]+\.py)\) \| ([\d,]+) \|", (REPO / "README.md").read_text(), re.M)}
    assert {p.name for p in REPO.glob("*.py")} | {"fast/__init__.py", "tests/torture.py"} == stated.keys()
    for name, lines in stated.items():
        files = (REPO / "fast").glob("*.py") if name.startswith("fast/") else [REPO / name]
        counted = sum(len(path.read_text().splitlines()) for path in files)
        assert abs(lines - counted) <= max(20, counted / 10), f"{name} has {counted} lines, README.md says {lines}"


# A path or host of the machine where this was written. Split, so that this file is not its own finding.
MACHINE = re.compile("|".join((
    "(?<![\\w.~-])/(?:wo" + "rk|ro" + "ot)/", "https?://[^\\s\"'<>]*/sim" + "ple\\b", "py" + "pi\\.org",
    "python" + "hosted\\.org", "fi" + "le://")))


@pytest.mark.parametrize("text, found", [("see /wo" + "rk/x", True), ("at '/ro" + "ot/.cache'", True),
                                         ("https://mirror.example/sim" + "ple", True), ("py" + "pi.org", True),
                                         ("home/work/school", False), ("a simple https://example.org/page", False)])
def test_what_counts_as_a_machine_path(text, found):
    assert bool(MACHINE.search(text)) is found


def test_no_machine_paths_in_committed_text():
    texts = {}
    for name in committed():
        content = (REPO / name).read_bytes()
        if b"\0" not in content:
            texts[name] = content.decode("utf-8")
    assert {"README.md", "Makefile", "common.py", "tests/test_repo.py"} <= texts.keys()
    found = [f"{name}: {line.strip()[:120]}" for name, text in texts.items() for line in text.splitlines()
             if MACHINE.search(line)]
    assert found == []


def test_the_demos_pairs_are_those_of_their_script():
    """data/demo/make_polite.py gives the committed rows; no question is in both files, and length decides nothing."""
    script = runpy.run_path(str(REPO / "data" / "demo" / "make_polite.py"))
    rows, train, heldout = script["pairs"](), script["TRAINING"], script["HELDOUT"]
    parts = [[json.loads(line) for line in (REPO / "data" / "demo" / "train" / f"{name}.jsonl").read_text().splitlines()]
             for name in ("polite", "polite_heldout")]
    assert parts == [rows[:train], rows[train:train + heldout]]
    assert len({row["prompt"] for row in rows}) == len(rows) >= train + heldout
    for part in parts:
        longer = [len(row["chosen"]) > len(row["rejected"]) for row in part if len(row["chosen"]) != len(row["rejected"])]
        assert 0.4 < sum(longer) / len(longer) < 0.6


STUB = """import pathlib, sys
args, script = sys.argv[2:], pathlib.Path(sys.argv[1]).stem
value = lambda flag: pathlib.Path(args[args.index(flag) + 1])
print("RAN", script, *args)
if script in ("sft", "dpo", "reward", "ppo", "grpo", "kto"):
    value("--out").mkdir(parents=True, exist_ok=True)
    (value("--out") / "run.json").write_text("{}")
if script == "evaluate":
    for row in args[args.index("--adapter") + 1:args.index("--stamp")]:
        stamp = pathlib.Path(str(value("--stamp")).replace("%", "base" if row == "none" else pathlib.Path(row).name))
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text("aaaa1111 bbbb2222\\n")
"""


def test_make_repeats_what_changed_and_only_that(clone, tmp_path):
    """The graph, with a stand-in for python that only writes the target files: what runs after which change."""
    for name in ("Makefile",):
        shutil.copyfile(clone / name, tmp_path / name)
    (tmp_path / "stub.py").write_text(STUB)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    py = f"PY={sys.executable} stub.py"

    def ran(*words):
        done = make(tmp_path, "all", py, "SFT_DATA=a.jsonl", "PREF_DATA=b.jsonl", *words)
        assert done.returncode == 0, done.stderr
        time.sleep(0.02)  # files of the next call are newer
        lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RAN")]
        assert lines.pop()[0] == "report"
        for line in lines:
            if line[0] == "evaluate":  # all rows in one call, which passes over those that are there
                assert [Path(row).name for row in line[line.index("--adapter") + 1:line.index("--stamp")]] == rows
        return [line[0] for line in lines]
    rows = ["none", "sft_v2", "dpo_v1", "ppo_v1", "grpo_v1", "kto_v1"]
    everything = ["sft", "dpo", "reward", "reward", "ppo", "grpo", "kto", "evaluate", "judge"]
    assert ran() == everything
    assert ran() == []
    assert ran("DPO_FLAGS=--beta 0.3") == ["dpo", "evaluate", "judge"]
    assert ran("DPO_FLAGS=--beta 0.3") == []
    assert ran("DPO_FLAGS=--beta 0.3", "SFT_FLAGS=--lr 1e-4") == ["sft", "dpo", "ppo", "grpo", "kto", "evaluate",
                                                                  "judge"]
    assert ran("DPO_FLAGS=--beta 0.3", "SFT_FLAGS=--lr 1e-4", "LIMIT=4") == ["evaluate"]
    (tmp_path / "b.jsonl").write_text("{} ")
    assert ran("DPO_FLAGS=--beta 0.3", "SFT_FLAGS=--lr 1e-4", "LIMIT=4") == [
        "dpo", "reward", "reward", "ppo", "kto", "evaluate", "judge"]
    assert ran("DPO_FLAGS=--beta 0.3", "SFT_FLAGS=--lr 1e-4", "LIMIT=4", "RESULTS=other") == ["evaluate", "judge"]


def test_a_row_that_is_no_longer_made_has_no_say_in_what_is_reported(clone, tmp_path):
    """The stamps of a control, of invariants since changed, are left from `make controls`: the report isn't of them."""
    shutil.copyfile(clone / "Makefile", tmp_path / "Makefile")
    (tmp_path / "stub.py").write_text(STUB)
    for name, stamp in (("sft_2ep-plain", "cccc3333 bbbb2222"), ("dpo_v1-chat", "aaaa1111 dddd4444")):
        path = tmp_path / "runs" / ".done" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(stamp + "\n")
    done = make(tmp_path, "all", f"PY={sys.executable} stub.py", "SFT_DATA=a.jsonl", "PREF_DATA=b.jsonl")
    assert done.returncode == 0, done.stderr
    (last,) = [line for line in done.stdout.splitlines() if line.startswith("RAN report")]
    assert last.split("--group ")[1].split() == ["aaaa1111", "bbbb2222", "dddd4444"]


def test_common_reaches_what_chat_and_inputs_define():
    import chat
    import common
    import inputs
    assert (common.load_rows, common.load_tokenizer, common.render) == (inputs.load_rows, chat.load_tokenizer, chat.render)
    with pytest.raises(AttributeError, match="load_row_s"):
        common.load_row_s


def test_help_and_errors_need_not_wait_for_large_libraries():
    """What a script imports at its top leaves out the libraries that take seconds; `--help` of each is within these."""
    code = ("import sys, sft, dpo, kto, ppo, grpo, evaluate, chat, common, inputs; "
            "print(*{name.split('.')[0] for name in sys.modules} | "
            "({'torch._dynamo'} & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert {"torch", "tyro", "common"} <= found
    assert found & {"transformers", "peft", "datasets", "lm_eval", "bitsandbytes", "pandas", "scipy", "matplotlib", "nltk",
                    "torch._dynamo"} == set()
