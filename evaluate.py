"""evaluate.py: evaluate a base model and its adapters on four lm-eval tasks; each gets a row of results/metrics.json.

    task            shots  score of an item                                  its keys in the row
    mmlu            5      is the right letter the likeliest of A-D          mmlu/acc,none, and those of each subject
    truthfulqa_mc2  0 *    share of probability on the true answers          truthfulqa_mc2/acc,none
    gsm8k           8      is the number after "####" (or the last) right    gsm8k/exact_match,strict-match, ...flexible
    ifeval          0      does the response follow every instruction        ifeval/prompt_level_strict_acc,none, ...
    * besides the six worked pairs that are built into its prompt

--tasks adds secondary tasks, any of lm-eval's by name, or one of ours:

    gsm8k_zero_shot 0      as gsm8k, asked as grpo.py asks it: one turn of the chat template, whatever the protocol

Their metrics stand in the row beside the others and are listed under "secondary", each with its own settings and hash;
they don't enter the row's eval_hash.

Each score is a mean over items and has its standard error beside it, under `<metric>_stderr,<filter>`. The tasks
(prompts, filters, scores, versions) are those of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness);
--eval-data only changes the files that they read. The model class is ours: `RungsLM` (harness.py) gives the numbers of
lm-eval's HFLM (equal in fp32, see tests/test_evaluate.py) from common.Sampler and from packed forwards without padding,
in which a prefix that items share is computed once.

Deliberate deviations from `lm_eval --model hf --model_args peft=...`:
1. Logits and log-softmax are fp32 whatever the dtype (`Float32Head`). In bf16 a logit of 20 is a multiple of 1/8, and
   the best two of MMLU's four letters tie often (12 of 57 items with SmolLM2-135M-Instruct); the first of them wins.
2. Every generation setting is explicit: greedy, until EOS or a stop string of the task. generation_config is never
   read. A stop string that is a special token ends a response wherever it stands, as in HFLM at batch size 1.
3. IFEval's instruction-level accuracy is a ratio over prompts with several instructions each, for which lm-eval gives
   no standard error: ours is clustered by prompt (`clustered_stderr`). langdetect, which IFEval uses, is seeded.
4. MMLU's standard error is lm-eval's, pooled within subjects. With --limit a subject may have one item and no error;
   then it is that of all items as one sample, which counts the differences between subjects as well.
5. The adapter stays unmerged, as with `peft=`: merging would round the weights once more.

The base, the tasks' prompts and their token ids are loaded or built once per call, for all its adapters; between two
rows only the adapter changes. Every task's items and result are stored as soon as it is done, in
results/samples/<name>-<eval_hash>-<weights>/ (of a base, with its train_invariants at the end). An interrupted run
resumes at the task that it was at, and a row that exists is not evaluated again. The other files that report.py needs
contain no text of a data set and can be committed: the items' scores in results/scores/<the same>.json.gz, and the
adapter's command, configuration and curves in results/runs/<name>-<weights>.json.

What to expect: about a minute per row for SmolLM2-135M on one H100, loading included (bench/NOTES.md).

    python evaluate.py --adapter runs/sft_v2                  # on Qwen2.5-0.5B, with lm-eval's data sets from the hub
    python evaluate.py --adapter none runs/sft_v2 runs/dpo_v1 --tasks gsm8k_zero_shot arc_easy
    python evaluate.py --model models/smollm2 --quantization none --eval-data data/demo/eval --limit 8 --max-gen-toks 64
"""

import difflib
import functools
import gzip
import json
import os
import random
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import tyro
import yaml

import chat
import common
import inputs
from common import TrainInvariants, fail

if TYPE_CHECKING:  # lm-eval and what it brings take seconds to import: done in the functions that need them
    from harness import RungsLM


@dataclass(frozen=True)
class Args:
    # model
    model: str | None = None
    """Base model: a local directory or a hub id[@revision]. By default the one the adapter was trained on, or
    Qwen2.5-0.5B."""
    adapter: tuple[str, ...] = ()
    """Adapters to evaluate on the base model, a row for each: run directories (runs/dpo_v1), or plain PEFT LoRAs
    (directories or hub ids). "none" is the base model itself, which is also the default."""
    other_base: bool = False
    """Accept a plain PEFT adapter that names another base than --model."""
    name: str | None = None
    """Name of the only row; by default the adapter's directory name, or "base"."""
    quantization: Literal["qlora", "none"] | None = None
    """Quantisation policy of the training runs that a row is compared with. It only enters the row's train_invariants:
    evaluation is never quantised. By default that of the runs given, "none" for plain PEFT adapters, "qlora" for the
    base alone."""
    # evaluation: these enter eval_hash
    protocol: Literal["plain", "chat"] = "plain"
    """"plain": no chat template, as in published numbers; "chat": the chat template, few-shot examples as turns."""
    eval_data: str | None = None
    """Directory with the four tasks' files (mmlu/, gsm8k/, ...); by default lm-eval's own data sets from the hub."""
    limit: int | None = None
    """Only the first N items of each task, for trials; for MMLU spread evenly over the subjects, at least one each."""
    max_gen_toks: int | None = None
    """Maximum generated tokens per response of GSM8K and IFEval; by default the tasks' own 256 and 1,280."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the base model's weights and forward; the adapter is fp32."""
    # evaluation: these don't enter eval_hash
    tasks: tuple[str, ...] = ()
    """Secondary tasks beside the four: any of lm-eval's by name, or gsm8k_zero_shot. Their data: <task>/<split>.jsonl
    in --eval-data where it has that folder, else lm-eval's own from the hub."""
    # run: these change speed and file locations, not numbers (beyond the rounding of the dtype)
    out: str = "results"
    """Directory of metrics.json, samples/, scores/ and runs/."""
    log_samples: bool = False
    """Write every item in lm-eval's own layout too, for its table tools: samples/<row>/lm-eval/<task>/samples_*.jsonl
    and results_*.json. A task that was evaluated without this flag is evaluated again."""
    stamp: str | None = None
    """File that gets a row's train_invariants and eval_hash when the row is done (make checks it). A % in it stands for
    the row's name."""
    micro_tokens: int = 16384
    """Maximum tokens per packed forward; a longer sequence gets a pack of its own."""
    max_batch: int | None = None
    """Maximum number of rows decoded at the same time; by default whatever fits into memory."""
    engine: Literal["auto", "fast", "plain"] = "auto"
    """auto: the fast engine where it serves the model, else the plain one (any model, slower)."""
    device: str = "auto"
    """Torch device; "auto" takes the GPU if there is one."""


# task: (shots, limit), in the order they run. MMLU's limit is per subject.
TASKS = {"mmlu": (5, 1000), "truthfulqa_mc2": (0, None), "gsm8k": (8, None), "ifeval": (0, None)}
TASK_FOLDERS = ("mmlu/default", "truthfulqa", "gsm8k", "ifeval")  # of lm_eval.tasks; indexing all of it takes 7 s
LAYOUT = {  # (task, split): columns of DIR/<task>/<split>.jsonl or .jsonl.gz
    ("mmlu", "dev"): {"question": str, "subject": str, "choices": list, "answer": int},
    ("mmlu", "test"): {"question": str, "subject": str, "choices": list, "answer": int},
    ("truthfulqa_mc2", "validation"): {"question": str, "mc1_targets": dict, "mc2_targets": dict},
    ("gsm8k", "train"): {"question": str, "answer": str},
    ("gsm8k", "test"): {"question": str, "answer": str},
    ("ifeval", "train"): {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list},
}
ZERO_SHOT = "gsm8k_zero_shot"
# IFEval's checks that split text into sentences, for which NLTK needs its punkt_tab data.
NEEDS_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
PHASES = {"peft": 1} | {method: phase for method, (phase, _) in common.METHODS.items()}
HEADLINE = {  # the printed table
    "MMLU": "mmlu/acc,none",
    "TruthfulQA MC2": "truthfulqa_mc2/acc,none",
    "GSM8K strict": "gsm8k/exact_match,strict-match",
    "GSM8K flexible": "gsm8k/exact_match,flexible-extract",
    "IFEval prompt strict": "ifeval/prompt_level_strict_acc,none",
    "IFEval instruction strict": "ifeval/inst_level_strict_acc,none",
}


@dataclass(frozen=True)
class EvalProtocol:
    """Settings that must be equal to compare two evaluations. Their hash is `eval_hash`; training never sees it."""
    protocol: str                                   # "plain": no chat template; "chat": template, few-shot as turns
    tasks: tuple[tuple[str, int, int | None], ...]  # (task, num_fewshot, limit; per subject for MMLU)
    data: str                                       # fingerprint of the evaluation data
    max_gen_toks: int | None                        # None: each task's own
    dtype: str
    quantization: str = "none"
    adapter_merged: bool = False

    @property
    def hash(self) -> str:
        return common.sha256_json(asdict(self))[:8]


# ------------------------------------------------------------------ evaluation data and tasks


def read_eval_data(directory: Path) -> tuple[dict[tuple[str, str], list[dict]], dict[str, str]]:
    """({(task, split): rows}, {"task/split": content hash}) of an evaluation directory. Ends the run if a file, a
    column or a few-shot example is missing."""
    expected = "expected layout: " + ", ".join(f"{task}/{split}.jsonl[.gz]" for task, split in LAYOUT)
    if not directory.is_dir():
        fail(f"--eval-data {directory}: no such directory; {expected}")
    data, hashes = {}, {}
    for (task, split), columns in LAYOUT.items():
        paths = [directory / task / f"{split}.jsonl{suffix}" for suffix in ("", ".gz")]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            fail(f"--eval-data {directory}: {task}/{split}.jsonl (or .jsonl.gz) is missing; {expected}")
        rows = []
        try:
            hashes[f"{task}/{split}"] = common.file_sha256(path)
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    rows.append(json.loads(line))
                    for column, kind in columns.items():
                        if not isinstance(rows[-1].get(column), kind):
                            fail(f"{path}, line {number}: column {column!r} is missing or not a {kind.__name__}")
        except Exception as error:  # gzip, zlib, unicode, JSON and a line that is no object each raise their own
            fail(f"{path}: not readable as JSON Lines ({error})")
        if not rows:
            fail(f"{path}: no rows")
        data[task, split] = rows
    examples = {"gsm8k/train": data["gsm8k", "train"]}
    dev = by_subject(data["mmlu", "dev"])
    examples |= {f"mmlu/dev of subject {s!r}": dev.get(s, []) for s in by_subject(data["mmlu", "test"])}
    for where, rows in examples.items():
        if len(rows) < (shots := TASKS[where.split("/")[0]][0]):
            fail(f"--eval-data {directory}: {len(rows)} rows in {where}; {shots} few-shot examples are needed")
    return data, hashes


def by_subject(rows: list[dict]) -> dict[str, list[dict]]:
    subjects = defaultdict(list)
    for row in rows:
        subjects[row["subject"]].append(row)
    return dict(subjects)


def local_sources(data: dict[tuple[str, str], list[dict]], folder: Path) -> dict[str, dict]:
    """{lm-eval task: the data set fields of its definition}, with `data` written into files of the folder, for each
    task and each MMLU subject that has items."""
    files: dict[str, dict[str, list[dict]]] = defaultdict(dict)  # lm-eval task -> split -> rows
    for (task, split), rows in data.items():
        for subject, part in by_subject(rows).items() if task == "mmlu" else [(None, rows)]:
            files[f"mmlu_{subject}" if subject else task][split] = part
    sources = {}
    for name, splits in files.items():
        if "test" in splits or not name.startswith("mmlu"):  # a subject may have few-shot examples and no items
            paths = {split: str(folder / f"{name}.{split}.jsonl") for split in splits}
            for split, rows in splits.items():
                Path(paths[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
            options = {"data_files": paths, "cache_dir": str(folder / "cache")}
            sources[name] = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": options}
    return sources


def hub_sources(index: dict) -> tuple[dict[str, dict], list[str]]:
    """({lm-eval task: the data set fields of its definition}, each task's "data set@commit") for lm-eval's own data
    sets at their current commits, so that the fingerprint names the commits that are read."""
    locations: dict[str, tuple[str, str]] = {}  # data set: where it is, its commit
    sources, commits = {}, {}
    for name, entry in index.items():
        task = "mmlu" if name.startswith("mmlu_") else name
        if entry.kind.name == "TASK" and task in TASKS:
            dataset, config = entry.cfg["dataset_path"], entry.cfg.get("dataset_name")
            if dataset not in locations:
                try:
                    locations[dataset] = inputs.locate_dataset(dataset)
                except OSError as error:
                    fail(f"can't read lm-eval's data set for {task}: {error} (--eval-data DIR)")
            path, commit = locations[dataset]
            options = inputs.dataset_options(path, commit, config)
            sources[name] = {"dataset_path": path, "dataset_kwargs": options}
            commits[task] = f"{dataset}@{commit}"
    return sources, [commits[task] for task in TASKS]


def write_tasks(sources: dict[str, dict], index: dict, folder: Path) -> None:
    """Write lm-eval task files that `include` the original definitions and read other data: one for each task of
    `sources`, and MMLU's groups over the subjects among them."""

    for name, source in sources.items():
        if name not in index:
            fail(f"mmlu/test has subject {name.removeprefix('mmlu_')!r}, which lm-eval's mmlu doesn't have")
        write_task(folder, name, index[name], **source)
    tags = {tag for name in sources if name.startswith("mmlu_") for tag in index[name].tags}
    groups = [group for group in index["mmlu"].cfg["task"] if tags & set(index[group].cfg["task"])]
    for group in groups:
        write_task(folder, group, index[group])
    write_task(folder, "mmlu", index["mmlu"], task=groups)


def write_task(folder: Path, name: str, entry, **overrides) -> None:
    """Write a task file that includes the definition of an entry of lm-eval's index, with some fields replaced."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"include": str(entry.yaml_path), **overrides}))


def prepare_ifeval(rows: list[dict] | None, data_dir: Path | None) -> None:
    """Make sure that IFEval can score its items (rows; None: the hub's): lm-eval knows their instructions, NLTK has
    punkt_tab if one needs it, and language detection is deterministic."""
    import langdetect
    import nltk
    langdetect.DetectorFactory.seed = 0
    if data_dir and not os.environ.get("NLTK_DATA"):
        nltk.data.path += [str(p) for p in (data_dir / "nltk_data", data_dir.parent / "nltk_data") if p.is_dir()]
    needs = rows is None or any(i in NEEDS_PUNKT for row in rows for i in row["instruction_id_list"])
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        if needs and not (rows is None and nltk.download("punkt_tab", quiet=True)):
            fail("IFEval counts sentences with NLTK's punkt_tab data, which is not here: `python -m nltk.downloader "
                 "punkt_tab`, or set NLTK_DATA to a directory that has tokenizers/punkt_tab/english (a directory "
                 "nltk_data in or beside --eval-data is found by itself)")  # fmt: skip
    with patch.dict(os.environ, LOCAL_RANK="1"):  # on local rank 0 this import downloads punkt_tab, needed or not
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    for row in rows or []:
        if unknown := [i for i in row["instruction_id_list"] if i not in INSTRUCTION_DICT]:
            known = ", ".join(sorted(INSTRUCTION_DICT))
            fail(f"ifeval/train, key {row['key']}: lm-eval has no instruction {unknown[0]!r}; it has {known}")


def load_tasks(args: Args, folder: Path):
    """-> (lm-eval's task manager, ((task, shots, limit), ...), fingerprint of the evaluation data)."""
    import lm_eval.tasks
    package = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[package / name for name in TASK_FOLDERS])
    if missing := [task for task in TASKS if task not in manager.task_index]:
        fail(f"the installed lm-eval has no task {missing[0]} in {package}; install the pinned version")
    if args.eval_data:
        directory = Path(args.eval_data)
        data, content = read_eval_data(directory)
        prepare_ifeval(data["ifeval", "train"][: args.limit], directory.resolve())
        sources = local_sources(data, folder)
    else:
        prepare_ifeval(None, None)
        sources, content = hub_sources(manager.task_index)
    write_tasks(sources, manager.task_index, folder)
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder)
    # A new version of a task is another evaluation, even of the same files.
    versions = {task: manager.task_index[task].cfg["metadata"]["version"] for task in TASKS}
    fingerprint = ("sha256:" if args.eval_data else "hub:") + common.sha256_json([content, versions])
    limits = {task: args.limit or limit for task, (_, limit) in TASKS.items()}
    if args.limit:
        leaves = [name for name, entry in manager.task_index.items() if entry.kind.name == "TASK"]
        limits["mmlu"] = max(1, args.limit // sum(name.startswith("mmlu_") for name in leaves))
    return manager, tuple((task, shots, limits[task]) for task, (shots, _) in TASKS.items()), fingerprint


def load_secondary(args: Args, index: dict, fingerprint: str, folder: Path):
    """-> (lm-eval's task manager, {task: (shots, fingerprint of its definition and data)}) of --tasks.

    index, fingerprint: what load_tasks gives; gsm8k_zero_shot reads the gsm8k of that index. Ends the run on a task
    that lm-eval doesn't have, or that can't be evaluated here.
    """
    import lm_eval.tasks
    if four := [task for task in args.tasks if task in TASKS]:
        fail(f"--tasks {four[0]}: it is one of the four tasks of every row")
    folder.mkdir()
    secondary: dict[str, tuple[int, str]] = {}
    for task in args.tasks:
        if task == ZERO_SHOT:
            asked = {"doc_to_text": "{{question}}" + inputs.GSM8K_PROMPT, "num_fewshot": 0,
                     "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 400}}  # fmt: skip
            write_task(folder, task, index["gsm8k"], task=task, **asked)
            version = index["gsm8k"].cfg["metadata"]["version"]
            secondary[task] = 0, f"{fingerprint.split(':')[0]}:{common.sha256_json([fingerprint, version, asked])}"
            continue
        entry = find_secondary(task)
        cfg, local = entry.cfg, Path(args.eval_data or "") / task
        if args.eval_data and local.is_dir():
            files = {path.name.split(".")[0]: path for path in sorted(local.glob("*.jsonl*"))}
            content: Any = {split: common.file_sha256(path) for split, path in files.items()}
            options = {"data_files": {split: str(path.resolve()) for split, path in files.items()},
                       "cache_dir": str(folder / "cache")}  # fmt: skip
            source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": options}
            parts = [f"{part}_split" for part in ("training", "validation", "test", "fewshot")]
            source |= {part: None for part in parts if cfg.get(part) not in files}
            if not {cfg.get("test_split"), cfg.get("validation_split")} & files.keys():
                wanted = cfg.get("test_split") or cfg.get("validation_split")
                fail(f"--tasks {task}: {local} has no {wanted}.jsonl (or .jsonl.gz)")
        else:
            try:
                path, commit = inputs.locate_dataset(cfg["dataset_path"])
            except OSError as error:
                fail(f"--tasks {task}: can't read its data set: {error} ({task}/<split>.jsonl in --eval-data)")
            content = f"{cfg['dataset_path']}@{commit}"
            options = inputs.dataset_options(path, commit, cfg.get("dataset_name"))
            source = {"dataset_path": path, "dataset_kwargs": options}
        write_task(folder, task, entry, **source)
        kind = "sha256" if isinstance(content, dict) else "hub"
        version = (cfg.get("metadata") or {}).get("version")
        secondary[task] = cfg.get("num_fewshot") or 0, f"{kind}:{common.sha256_json([content, version])}"
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder), secondary


@functools.cache
def task_files() -> dict[str, set[Path]]:
    """{name of a task, group or tag: folders of the definitions that have it}. lm-eval's index of all takes 7 s."""
    import lm_eval.tasks
    named = re.compile(r"^(?:(?:task|group|tag):|[ \t]*-)[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*$", re.M)
    folders = defaultdict(set)
    for file in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"):
        for match in named.finditer(file.read_text(encoding="utf-8")):
            folders[match[1]].add(file.parent)
    return dict(folders)


def find_secondary(task: str):
    """The entry of a task in lm-eval's index. Ends the run if the task can't be evaluated here: only greedy responses
    and log-likelihoods are supported, and code that the model writes is not run."""
    import lm_eval.tasks
    folders = task_files().get(task, ())
    known = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[*folders]).task_index if folders else {}
    entry = known.get(task)
    if entry is None:
        near = ", ".join(difflib.get_close_matches(task, [*task_files(), ZERO_SHOT], 5))
        fail(f"--tasks {task}: lm-eval has no such task" + (f"; it has {near}" if near else ""))
    if entry.kind.name != "TASK" or not entry.cfg.get("dataset_path"):
        members = (entry.cfg or {}).get("task") or sorted(name for name, e in known.items() if task in e.tags)
        named = ", ".join(m for m in members if isinstance(m, str)) if isinstance(members, list) else ""
        fail(f"--tasks {task}: only a single task with a data set can be a column, and this is none"
             + (f"; name one of its own: {named[:400]}" if named else ""))
    options = entry.cfg.get("generation_kwargs") or {}
    for reason, holds in (("measures perplexity", entry.cfg.get("output_type") == "loglikelihood_rolling"),
                          ("runs code that the model writes", entry.cfg.get("unsafe_code")),
                          ("samples, and evaluation here is greedy", options.get("do_sample"))):  # fmt: skip
        if holds:
            fail(f"--tasks {task}: it {reason}, which is not supported")
    return entry


# ------------------------------------------------------------------ one task: run, score, keep


def clustered_stderr(clusters: list[list[bool]]) -> float | None:
    """Standard error of the ratio r = sum_i x_i / sum_i m_i, where x_i of the m_i values of cluster i are true and the
    n clusters, not the values, are independent: se^2 = n / (n - 1) sum_i (x_i - r m_i)^2 / (sum_i m_i)^2
    [Cochran, Sampling Techniques (1977), eq. 6.13, without its finite-population factor]. None for one cluster."""
    n = len(clusters)
    if n < 2:
        return None
    x, m = np.array([sum(c) for c in clusters], float), np.array([len(c) for c in clusters], float)  # [n]
    ratio = x.sum() / m.sum()
    return float(np.sqrt(n / (n - 1) * ((x - ratio * m) ** 2).sum()) / m.sum())


def sample_lines(samples: dict[str, list[dict]]) -> list[dict]:
    """lm-eval's samples (one for each item and filter) as one line per item, with what a paired test and a reader need.
    """
    lines: dict[tuple, dict] = {}
    for name, entries in samples.items():
        for e in entries:
            line = {"task": name} | {key: e[key] for key in ("doc_id", "doc_hash", "prompt_hash", "target")}
            answers = [resps[0] for resps in e["resps"]]  # a text, or a (log-likelihood, is greedy) for each choice
            if isinstance(answers[0], str):
                line["response"] = answers[0]
            else:
                line["loglikelihoods"] = [loglikelihood for loglikelihood, _ in answers]
            line = lines.setdefault((name, e["doc_id"]), line | {"metrics": {}})
            line["metrics"].update({f"{metric},{e['filter']}": e[metric] for metric in e["metrics"]})
    # numpy's numbers as Python's; null for a score of 0/0 (every answer has probability 0) and the log of 0
    return common.nulled(json.loads(json.dumps(list(lines.values()), default=lambda o: o.item())))


def protocol_of(task: str, args: Args) -> str:
    """GRPO's prompt is a turn of the chat template in either protocol."""
    return "chat" if task == ZERO_SHOT else args.protocol


def run_task(lm: "RungsLM", loaded, task: str, shots: int, limit: int | None, args: Args,
             log: Path | None = None) -> tuple[dict, list[dict]]:  # fmt: skip
    """-> (result: metrics, n, versions, wall time; the items' lines). `loaded` is reused for the next
    adapter: its prompts are built in the first call. log: directory for the items in lm-eval's own layout."""
    from lm_eval.api.metrics import mean_stderr
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import env as jinja
    start = time.time()
    # The seeds and settings of lm_eval.simple_evaluate, which also inspects the machine in every call.
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    for unit in loaded["tasks"].values():
        if unit.get_config("num_fewshot") != 0:
            unit.set_config("num_fewshot", shots)
        unit.set_fewshot_seed(1234)
        if args.max_gen_toks and unit.OUTPUT_TYPE == "generate_until":
            unit.set_config("generation_kwargs", {"max_gen_toks": args.max_gen_toks}, update=True)
        if hasattr(unit, "_instances"):  # built for the previous adapter, and holds its responses
            for instance in unit.instances:
                instance.resps, instance.filtered_resps = [], {}
            unit.build_all_requests = lambda **_: None
    in_chat, lm.prompts_cut = protocol_of(task, args) == "chat", 0
    # lm-eval compiles a task's template for every example of every prompt: minutes on MMLU
    with (
        patch.object(jinja, "from_string", functools.lru_cache(1024)(jinja.from_string)),
        patch("lm_eval.api.task.tqdm", lambda docs, **_: docs),  # instead of a progress bar for each of 57 subjects
    ):
        lm_eval_output = evaluate(lm, loaded, limit=limit, apply_chat_template=in_chat, fewshot_as_multiturn=in_chat)
    lines = sample_lines(lm_eval_output["samples"])
    metrics = {}
    for name, values in lm_eval_output["results"].items():
        for key, value in values.items():
            if "," in key:
                metrics[f"{name}/{key}"] = common.nulled(float(value)) if value != "N/A" else None
    if metrics.get("mmlu/acc_stderr,none", 0) is None and len(lines) > 1:
        metrics["mmlu/acc_stderr,none"] = mean_stderr([line["metrics"]["acc,none"] for line in lines])
    if task == "ifeval":
        for level in ("strict", "loose"):
            followed = [line["metrics"][f"inst_level_{level}_acc,none"] for line in lines]  # a list for each prompt
            metrics[f"ifeval/inst_level_{level}_acc_stderr,none"] = clustered_stderr(followed)
    if log:
        log_samples(lm_eval_output, log, lm)
    seconds = round(time.time() - start, 2)
    if lm.prompts_cut:
        common.say(f"note: {task}: {lm.prompts_cut} prompts were cut from the left to the model's {lm.max_length} "
                   f"positions")
    return {"metrics": metrics, "n": len(lines), "versions": lm_eval_output["versions"], "wall_time_s": seconds,
            "prompts_cut": lm.prompts_cut}, lines


def log_samples(lm_eval_output: dict, folder: Path, lm: "RungsLM") -> None:
    """What lm-eval returned, as its own --output_path with --log_samples writes it: results_<time>.json, and
    samples_<task>_<time>.jsonl for each task, subjects of MMLU among them."""
    from lm_eval.loggers import EvaluationTracker
    tracker = EvaluationTracker(output_path=str(folder / "results.json"))
    model = f"pretrained={lm.tokenizer.name_or_path}"
    tracker.general_config_tracker.log_experiment_args("hf", model, None, None, False)
    samples = {task: [{**item} for item in items]  # lm-eval edits them
               for task, items in lm_eval_output["samples"].items()}
    tracker.save_results_aggregated({key: value for key, value in lm_eval_output.items() if key != "samples"}, samples)
    for task, items in samples.items():
        tracker.save_results_samples(task, items)
    if not [*folder.glob("results_*.json")] or len([*folder.glob("samples_*.jsonl")]) < len(samples):
        fail(f"lm-eval could not write its samples to {folder}")  # the tracker only warns


def write_gzip(path: Path, text: str) -> None:
    """Compress without a time in the header, so that equal text gives equal bytes."""
    common.write_atomic(path, lambda p: p.write_bytes(gzip.compress(text.encode(), mtime=0)))


def write_lines(path: Path, lines: list[dict]) -> None:
    write_gzip(path, "".join(common.to_json(line) + "\n" for line in lines))


def read_finished(path: Path, identity: dict) -> dict | None:
    """The stored result of a task, if it is of this evaluation and these weights, and its items are there."""
    if not path.is_file():
        return None
    result, lines = json.loads(path.read_text()), path.with_suffix(".jsonl.gz")
    same = result["identity"] == identity and lines.is_file()
    return result if same and common.file_sha256(lines) == result["samples_sha256"] else None


# ------------------------------------------------------------------ what the report needs besides the row


def score_columns(lines: list[dict]) -> dict[str, list]:
    """The items of a task without their text: {"task", "doc_id", "doc_hash" (8 digits, to pair by), each metric,
    and of a response "characters", without whitespace around it}."""

    def plain(x):  # true and 1.0 -> 1
        if isinstance(x, list):
            return [plain(y) for y in x]
        return int(x) if x is not None and float(x).is_integer() else x

    columns = {"task": [line["task"] for line in lines], "doc_id": [line["doc_id"] for line in lines],
               "doc_hash": [line["doc_hash"][:8] for line in lines]}  # fmt: skip
    metrics = lines[0]["metrics"] if lines else {}
    if lines and "response" in lines[0]:
        columns["characters"] = [len(line["response"].strip()) for line in lines]
    return columns | {key: [plain(line["metrics"][key]) for line in lines] for key in metrics}


def thin(log: list[dict], points: int = 100) -> dict[str, list]:
    """A log's curves, {"step", key: values}, of at most `points` values each: means over neighbouring steps."""
    size = -(-len(log) // points) or 1
    parts = [log[i : i + size] for i in range(0, len(log), size)]
    keys = dict.fromkeys(key for line in log for key, value in line.items() if isinstance(value, (int, float)))
    series = {key: [[line[key] for line in part if line.get(key) is not None] for part in parts] for key in keys}
    return {key: [float(f"{sum(v) / len(v):.6g}") if v else None for v in values] for key, values in series.items()}


def keep_records(out: Path, policy: "Policy", secondary: Sequence[str]) -> dict:
    """Write scores/<name of samples>.json.gz and, of a run of ours, runs/<name>-<its hash>.json; -> the row's fields
    "scores" and "cost" (what training took). Paths on this machine are cut to their last part."""
    columns = {}
    for task in (*TASKS, *secondary):
        with gzip.open(out / policy.samples / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
            columns[task] = score_columns([json.loads(line) for line in lines])
    scores, run = Path("scores") / f"{policy.samples.name}.json.gz", policy.run
    record = {"schema_version": common.SCHEMA_VERSION, **policy.identity, "tasks": {t: columns[t] for t in TASKS}}
    if secondary:
        record["secondary"] = {task: columns[task] for task in secondary}
    write_gzip(out / scores, common.to_json(record))
    if not policy.ours:
        return {"scores": scores.as_posix(), "cost": None}
    file = policy.directory / "log.jsonl"
    log = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    hardware = run.get("hardware") or {}
    tokens, peaks = ([line[key] for line in log if line.get(key)] for key in ("tokens", "peak_gib"))
    cost = {"wall_time_s": run["wall_time_s"], "device": hardware.get("device"), "gpus": hardware.get("gpus"),
            "peak_gib": max(peaks, default=None), "tokens": sum(tokens) if tokens else None}  # fmt: skip
    run_fields = {key: run.get(key) for key in "method config_hash adapter_sha256 train_invariants family seed command "
                  "args data data_sources parent scorers versions git_commit hardware wall_time_s metrics".split()}
    record = {"schema_version": common.SCHEMA_VERSION, "name": policy.name, **common.without_places(run_fields),
              "steps": len(log), "curves": thin(log)}  # fmt: skip
    common.write_json(out / "runs" / f"{policy.name}-{run['adapter_sha256'][:8]}.json", record)
    return {"scores": scores.as_posix(), "cost": cost}


# ------------------------------------------------------------------ main


class Policy(NamedTuple):
    """The policy of a row: the base model, or the base model with an adapter."""
    name: str
    adapter: str | None      # as given; None: the base
    run: dict | None         # record of the adapter
    directory: Path | None   # where the adapter is
    identity: dict           # hashes of the policy and its evaluation
    train_invariants: str
    samples: Path            # directory of its items, in --out

    @property
    def ours(self) -> bool:
        """Whether one of the scripts here made it; a plain PEFT adapter has no invariants of its own."""
        return self.run is not None and self.run["method"] != "peft"

    def is_of(self, row: dict) -> bool:
        wanted = {"name": self.name, "train_invariants": self.train_invariants, **self.identity}
        return all(row.get(key) == value for key, value in wanted.items())


def main(args: Args) -> list[dict]:
    """Evaluate each adapter, write its row as soon as it is done, return the rows in the order given."""
    # 1. Check everything that can be wrong with the input before a model loads; write nothing.
    if common.world() > 1:
        fail("evaluate.py runs in one process; start it without torchrun")
    for flag in ("limit", "max_gen_toks", "micro_tokens", "max_batch"):
        if (value := getattr(args, flag)) is not None and value < 1:
            fail(f"--{flag.replace('_', '-')} {value}: must be at least 1")
    common.check_numbers(args)
    adapters = [None if given == "none" else given for given in dict.fromkeys(args.adapter or ("none",))]
    if args.name and len(adapters) > 1:
        fail(f"--name {args.name} names one row, but --adapter gives {len(adapters)}; leave it out")
    if args.stamp and "%" not in args.stamp and len(adapters) > 1:
        fail(f"--stamp {args.stamp} is one file, but --adapter gives {len(adapters)} rows; write % for a row's name")
    common.check_output("--out", args.out)
    if args.stamp:
        common.check_output("--stamp", Path(args.stamp).parent)
    device = common.setup_device(args.device)
    dtype = common.setup_dtype(args.dtype, device)
    out = Path(args.out)
    stored = common.read_results(out / "metrics.json")
    adapter_records = [common.read_policy(adapter) if adapter else (None, None) for adapter in adapters]
    runs = [run for run, _ in adapter_records if run]
    model_name = args.model or next((run["model"] for run in runs if run["model"]), None if runs else common.QWEN) \
        or fail(f"{adapters[-1]} names no base model; give it with --model")
    model_dir = common.resolve_model(model_name)
    names = [args.name or (Path(adapter).resolve().name if adapter else "base") for adapter in adapters]
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name):
            fail(f"--name {name!r}: only letters, digits and . _ + - (it names a directory)")
    # The base and plain PEFT adapters, which have no policy of their own, stand beside the runs.
    policies = {run["invariants"]["quantization"]: run["name"] for run in runs if run["method"] != "peft"}
    if len(policies) > 1:
        fail("--adapter: " + " and ".join(f"{name} was trained under {policy!r}" for policy, name in policies.items())
             + "; their rows stand in different tables, so evaluate them in two calls")
    if args.quantization and policies and args.quantization not in policies:
        (policy, name), = policies.items()
        fail(f"--quantization {args.quantization}, but {name} was trained under {policy!r}; leave the flag out")
    policy = next(iter(policies), args.quantization or ("none" if runs else "qlora"))
    tokenizer = chat.load_tokenizer(model_dir)
    asks_in_chat = args.protocol == "chat" or ZERO_SHOT in args.tasks
    if asks_in_chat:
        inputs.say_template(tokenizer)
    invariants = TrainInvariants.of(model_name, model_dir, tokenizer, policy)
    weights = invariants.weights_sha256
    for adapter, (run, directory) in zip(adapters, adapter_records):
        if run:
            common.check_base(directory, run, model_name, model_dir, weights, args.other_base)
        if run and run["invariants"] and asks_in_chat and run["invariants"]["chat_template"] != tokenizer.chat_template:
            fail(f"{'--protocol chat' if args.protocol == 'chat' else ZERO_SHOT}: {adapter} was trained with another "
                 f"chat template than {model_name} has now")
    scratch = common.scratch("rungs-eval")  # task files and data cache, gone at the end
    manager, tasks, fingerprint = load_tasks(args, Path(scratch.name))
    others, secondary = load_secondary(args, manager.task_index, fingerprint, Path(scratch.name) / "secondary")
    generating = [manager.task_index["ifeval"], *(others.task_index[task] for task in secondary)]
    lengths = [(entry.cfg.get("generation_kwargs") or {}).get("max_gen_toks", 256) for entry in generating]
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig

    from harness import Float32Head, RungsLM
    longest = args.max_gen_toks or max(lengths)
    room = resolve_max_length(AutoConfig.from_pretrained(model_dir), tokenizer)
    if room <= longest:
        fail(f"{model_name} has room for {room} tokens, of which responses take up to {longest}: use --max-gen-toks")

    # 2. Find the rows, or tasks of rows, that are done already.
    kind = str(dtype).removeprefix("torch.")
    protocol = EvalProtocol(args.protocol, tasks, fingerprint, args.max_gen_toks, kind)
    beside = {  # protocols of the secondary tasks
        task: EvalProtocol(protocol_of(task, args), ((task, shots, args.limit),), content, args.max_gen_toks, kind)
        for task, (shots, content) in secondary.items()
    }
    plan = [(*task, protocol) for task in tasks] + [(*p.tasks[0], p) for p in beside.values()]
    rows = []
    for name, adapter, (run, directory) in zip(names, adapters, adapter_records):
        identity = {
            "config_hash": run["config_hash"] if run else common.sha256_json(["base", invariants.hash])[:8],
            "adapter_sha256": run["adapter_sha256"] if run else None,
            "weights_sha256": weights,
            "eval_hash": protocol.hash,
        }
        of_weights = run["adapter_sha256"][:8] if run else f"{weights[:8]}-{invariants.hash}"
        samples = Path("samples") / f"{name}-{protocol.hash}-{of_weights}"
        ours = run is not None and run["method"] != "peft"
        train_invariants = run["train_invariants"] if ours else invariants.hash
        rows.append(Policy(name, adapter, run, directory, identity, train_invariants, samples))

    def read_result(policy: Policy, task: str, protocol: EvalProtocol) -> dict | None:
        identity = policy.identity | {"eval_hash": protocol.hash}
        result = read_finished(out / policy.samples / f"{task}.json", identity)
        logged = not args.log_samples or [*(out / policy.samples / "lm-eval" / task).glob("results_*.json")]
        return result if logged else None

    import datasets
    datasets.disable_progress_bars()
    loaded = {}
    for task, _, _, p in plan:
        if not all(read_result(policy, task, p) for policy in rows):
            try:
                loaded[task] = (others if task in beside else manager).load([task])
            except Exception as error:  # every reader and template raises its own kind
                where = args.eval_data or "the hub (without it, give local files with --eval-data DIR)"
                fail(f"lm-eval can't load {task} from {where}: {type(error).__name__}: {error}")

    # 3. The model; for each row its adapter, and one lm-eval call per task.
    lm, written = None, []
    for policy in rows:
        results = {task: read_result(policy, task, p) for task, _, _, p in plan}
        before = next((row for row in stored["runs"] if policy.is_of(row)), None)
        asked = {task: p.hash for task, p in beside.items()}
        if before and all(results.values()) and asked.items() <= hashes_of(before).items():
            if not before.get("scores") or not (out / before["scores"]).is_file():  # written before there were any
                before = before | keep_records(out, policy, list(before.get("secondary", {})))
                common.upsert_row(out / "metrics.json", before)
            print(f"{out / 'metrics.json'} has this row already; nothing to do")
            written.append(finish(before, args))
            continue
        if done := [task for task in results if results[task]]:
            print(f"{policy.name}: finished before, read from {out / policy.samples}: {', '.join(done)}")
        if not lm and not all(results.values()):
            engine = common.choose_engine(args.engine, model_dir, device)
            model = common.load_model(model_dir, None, "none", dtype, device, engine)
            if dtype == torch.bfloat16:
                model.set_output_embeddings(Float32Head(model.get_output_embeddings()))
            lm = RungsLM(model, tokenizer, args.micro_tokens, args.max_batch)
        if lm and policy.directory:
            lm.model = common.attach_adapter(model, policy.directory)
        for task, shots, limit, p in plan:
            if results[task]:
                continue
            at_most = f", {limit} items{' per subject' if task == 'mmlu' else ''} at most" if limit else ""
            print(f"{policy.name}: {task}, {shots}-shot{at_most}", flush=True)
            log = out / policy.samples / "lm-eval" / task if args.log_samples else None
            result, lines = run_task(lm, loaded[task], task, shots, limit, args, log)
            path = out / policy.samples / f"{task}.json"
            write_lines(path.with_suffix(".jsonl.gz"), lines)
            digest = common.file_sha256(path.with_suffix(".jsonl.gz"))
            identity = policy.identity | {"eval_hash": p.hash}
            results[task] = {**result, "identity": identity, "samples_sha256": digest}
            common.write_json(path, results[task])  # the mark of a finished task, so written last
        if lm and policy.directory:
            lm.model = common.detach_adapter(lm.model)

        # 4. The row. Secondary tasks of an earlier call stay in it.
        earlier_tasks = {task: EvalProtocol(**{key: p[key] for key in EvalProtocol.__dataclass_fields__})
                         for task, p in (before or {}).get("secondary", {}).items() if task not in beside}  # fmt: skip
        for task, p in earlier_tasks.items():
            results[task] = read_result(policy, task, p)
        columns = {task: p for task, p in (earlier_tasks | beside).items() if results[task]}
        results = {task: result for task, result in results.items() if result}
        run, ours = policy.run, policy.run if policy.ours else None
        row = {
            "name": policy.name,
            "train_invariants": policy.train_invariants,
            **policy.identity,
            "phase": PHASES[run["method"]] if run else 0,
            "method": run["method"] if run else "base",
            "model": common.split_model(model_name)[0],
            "revision": invariants.revision,
            "adapter": policy.adapter,
            "invariants": ours["invariants"] if ours else asdict(invariants),
            "template": ours.get("template") if ours else tokenizer.template_note,
            "eval": asdict(protocol),
            **{key: run[key] if run else None for key in ("family", "seed", "parent", "data")},
            "protocol": args.protocol,
            "limit": args.limit,
            "quantization": protocol.quantization,
            "dtype": protocol.dtype,
            "metrics": {key: value for result in results.values() for key, value in result["metrics"].items()},
            "secondary": {task: {**asdict(p), "eval_hash": p.hash, "n": results[task]["n"],
                                 "versions": results[task]["versions"]} for task, p in columns.items()},
            "n": {task: results[task]["n"] for task in TASKS},
            "task_versions": {key: v for task in TASKS for key, v in results[task]["versions"].items()},
            "prompts_cut": {task: result.get("prompts_cut", 0) for task, result in results.items()},
            "samples": policy.samples.as_posix(),
            **keep_records(out, policy, list(columns)),
            "training": {**ours["metrics"], "wall_time_s": ours["wall_time_s"]} if ours else None,
            "batch": {"micro_tokens": args.micro_tokens, "max_batch": args.max_batch},
            "wall_time_s": round(sum(result["wall_time_s"] for result in results.values()), 2),
            "versions": common.versions(),
            "hardware": common.hardware(),
            "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip
        common.upsert_row(out / "metrics.json", row)
        print(f"row written to {out / 'metrics.json'}, items to {out / policy.samples}, their scores to "
              f"{out / row['scores']}")
        written.append(finish(row, args))
    common.say_next("python", "report.py", *(["--results", args.out] if args.out != Args.out else []))
    return written


def hashes_of(row: dict) -> dict[str, str]:
    """{secondary task: hash of how it was evaluated} of a row."""
    return {task: record["eval_hash"] for task, record in row.get("secondary", {}).items()}


def finish(row: dict, args: Args) -> dict:
    """Print the headline metrics of a row and those of its secondary tasks, leave its stamp, return it."""
    common.say(f"{row['name']} ({row['protocol']}, eval_hash {row['eval_hash']})")
    items = row["n"] | {task: record["n"] for task, record in row.get("secondary", {}).items()}
    beside = {key.replace("/", " ").replace(",", " "): key for key in row["metrics"]
              if key.split("/")[0] in items.keys() - row["n"].keys() and "_stderr," not in key}  # fmt: skip
    for title, key in (HEADLINE | beside).items():
        metric, filter_name = key.split(",")
        score, stderr = row["metrics"][key], row["metrics"].get(f"{metric}_stderr,{filter_name}")
        value, error = (f"{'?':>6}" if x is None else f"{100 * x:6.2f}" for x in (score, stderr))
        common.say(f"  {title:<26} {value} ± {error}   n = {items[key.split('/')[0]]:,}")
    if args.stamp:
        common.write_text(args.stamp.replace("%", row["name"]), f"{row['train_invariants']} {row['eval_hash']}\n")
    return row


if __name__ == "__main__":
    main(tyro.cli(Args))
