"""The card of a run, and --push-to-hub: the run on the Hugging Face hub.

The upload holds what others need to load it and to trace its origin: adapter, tokenizer, run.json, prompts.json
(hashes of the prompts, by which a judge is kept apart), log, curves and the card; no text of the data. Absolute paths
of this machine are cut to their last part. huggingface_hub reads the token by itself (`hf auth login`, HF_TOKEN);
it is in none of the files.
"""
from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

from common import fail, read_json, read_results, say, split_model, to_json, without_places

FILES = ("adapter_model.safetensors", "adapter_config.json", "run.json", "prompts.json", "log.jsonl", "curves.png",
         "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja")
TASK_DATA = {"mmlu": "cais/mmlu", "gsm8k": "openai/gsm8k", "gsm8k_zero_shot": "openai/gsm8k",
             "truthfulqa_mc2": "truthfulqa/truthful_qa", "ifeval": "google/IFEval"}  # where a task's items come from


# -- the card -------------------------------------------------------------------------------------

def model_card(record: dict[str, Any], repo: str | None = None, rows: list[dict[str, Any]] = (),
               bases: list[dict[str, Any]] = (), licences: dict[str, str] = {}) -> str:
    """README.md of a run directory, or with `repo` of that repository.

    record: the run's run.json. rows: its rows of results/metrics.json, which become the card's model-index. bases: rows
    of models without an adapter, whose scores stand beside those of a row that was evaluated in the same way. licences:
    {data set: its licence}, for those that are known.
    """
    from huggingface_hub import ModelCard, ModelCardData
    base, revision = split_model(record["model"])
    reward, local = record["method"] == "reward", record["invariants"]["model"] == "(local)"
    kind, name, labels = ("SequenceClassification", "reward", ", num_labels=1") if reward else \
        ("CausalLM", "policy", "")
    loads = "\n".join([
        "from peft import PeftModel", f"from transformers import AutoModelFor{kind}",
        f"base = AutoModelFor{kind}.from_pretrained({base!r}{labels}"
        + (f", revision={revision!r})" if revision else ")"),
        f"{name} = PeftModel.from_pretrained(base, {(repo or record['args']['out'])!r})"])
    data = ModelCardData(
        base_model=None if local else base, library_name="peft", model_name=record["name"], tags=[
            "lora", record["method"], "rungs"], pipeline_tag="text-classification" if reward else "text-generation",
        datasets=hub_data(record) or None, eval_results=[r for row in rows for r in eval_results(row)] or None)
    weights = f" {base} is a local directory; the content hash of its weights is {record['weights_sha256'][:16]}…" \
        if local else ""
    parent = (record["parent"] or {}).get("name")
    facts = {"seed": record["seed"], "parent": parent or "none",
             **{role: source for role, source in (record["data"] or {}).items() if role == "task"},
             "chat template": (record["template"] or "the model's own").replace("|", "\\|"),
             "minutes": f"{record['wall_time_s'] / 60:.1f}", "config_hash": record["config_hash"],
             "train_invariants": record["train_invariants"], "adapter_sha256": record["adapter_sha256"]}
    text = "\n\n".join([
        f"---\n{data.to_yaml()}\n---", f"# {record['name']}", record["description"],
        f"The adapter is applied to {base} itself" + (
            f"; the update of {parent}, from which it was trained, is part of it." if parent else ".")
        + weights,
        f"```python\n{loads}\n```",
        *(["## Evaluation", "lm-evaluation-harness; scores in %, with 95 % intervals (± 1.96 standard errors) over "
           "the items.", results_table(rows, bases)] if rows else []),
        "## Training", data_table(record, licences), facts_table(facts),
        "Figures of the run, held-out ones with 95 % intervals in brackets:", facts_table(figures(record["metrics"])),
        f"Command: `python {record['command']}`. Curves: curves.png; every step: log.jsonl; the whole record: "
        "run.json.\n"])
    return str(ModelCard(text))


def facts_table(facts: dict[str, Any]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in facts.items())


def data_table(record: dict[str, Any], licences: dict[str, str]) -> str:
    """The data of a run: the fingerprint, how many rows are of which origin where the rows name one, and the licence."""
    origins = record.get("data_sources") or {}
    lines = ["| data | source | rows by origin | licence |", "|---|---|---|---|"]
    for role, source in (record["data"] or {}).items():
        if role != "task":  # GRPO's: what is rewarded, not data
            counts = sorted((origins.get(role) or {}).items(), key=lambda item: -item[1])
            lines.append(f"| {role} | {source} | {', '.join(f'{k} {n:,}' for k, n in counts) or '–'} | "
                         f"{licences.get(source.partition('@')[0], 'not known')} |")
    return "\n".join(lines)


def figures(metrics: dict[str, Any]) -> dict[str, str]:
    """Metrics to read: four digits, each with its interval behind it."""
    def short(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(short, value))}]"
        return f"{value:,}" if type(value) is int else f"{value:.4g}" if isinstance(value, float) else str(value)
    shown = {}
    for key, value in metrics.items():
        of = key.removesuffix("_interval")
        if of == key or of not in metrics:
            interval = metrics.get(f"{key}_interval")
            shown[key] = short(value) + (f" {short(interval)}" if interval else "")
    return shown


def hub_data(record: dict[str, Any]) -> list[str]:
    """The hub's data sets among a run's: their fingerprints are id@commit:config/split."""
    matches = [re.match(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}:", source) for source in (record["data"] or {}).values()]
    return list(dict.fromkeys(match[1] for match in matches if match))


def eval_results(row: dict[str, Any]) -> list:
    """A row of results/metrics.json as EvalResults of the model-index, each with its 95 % interval (± 1.96 standard
    errors). Of a group such as MMLU only the whole; a secondary task has a protocol and an eval_hash of its own."""
    from huggingface_hub import EvalResult
    how = {task: {**row["eval"], "protocol": row["protocol"], "eval_hash": row["eval_hash"], "n": n}
           for task, n in row["n"].items()} | row.get("secondary", {})
    results = []
    for key, value in row["metrics"].items():
        task, _, metric = key.partition("/")
        name, _, filter_name = metric.partition(",")
        stderr = row["metrics"].get(f"{task}/{name}_stderr,{filter_name}")
        if task in how and isinstance(value, float) and stderr is not None:
            shots = {t: n for t, n, _ in how[task]["tasks"]}.get(task)
            words = [f"{task} {name}" + (f" ({filter_name})" if filter_name != "none" else ""),
                     *([f"{shots}-shot"] if shots is not None else []), f"{how[task]['protocol']} protocol"]
            results.append(EvalResult(
                task_type="text-generation", dataset_type=TASK_DATA.get(task, task), dataset_name=task,
                metric_type=name, metric_value=value, metric_name=", ".join(words),
                metric_args={"interval_95": [value - 1.96 * stderr, value + 1.96 * stderr], "stderr": stderr,
                             "n": how[task]["n"], "num_fewshot": shots, "eval_hash": how[task]["eval_hash"]}))
    return results


def results_table(rows: list[dict[str, Any]], bases: list[dict[str, Any]]) -> str:
    """The rows' scores; with a column of the base's when all of them have a base that was evaluated in the same way."""
    def same(row, base):
        return all(row[k] == base[k] for k in ("train_invariants", "eval_hash"))
    lines = []
    for row in rows:
        base = {r.metric_name: r for base_row in bases if same(row, base_row) for r in eval_results(base_row)}
        for r in eval_results(row):
            low, high = (100 * bound for bound in r.metric_args["interval_95"])
            before = base.get(r.metric_name)
            lines.append([r.metric_name, f"{100 * before.metric_value:.1f}" if before else None,
                          f"{100 * r.metric_value:.1f}", f"{low:.1f} to {high:.1f}", f"{r.metric_args['n']:,}"])
    head = ["task and metric", "base", "this", "95 % interval", "items"]
    if any(line[1] is None for line in lines):
        for line in (head, *lines):
            del line[1]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] + ["--:"] * (len(head) - 1), *lines])


# -- the hub --------------------------------------------------------------------------------------

def check_access(repo: str) -> None:
    """Fail unless NAMESPACE/NAME can be written to, before anything is trained.

    A repository that isn't there yet is created, private and empty: only this shows that the upload will be possible.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        fail(f"--push-to-hub {repo}: want NAMESPACE/NAME")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        fail(f"--push-to-hub {repo}: HF_HUB_OFFLINE is set")
    if not huggingface_hub.get_token():
        fail(f"--push-to-hub {repo}: there is no token of the hub; `hf auth login`, or set HF_TOKEN")
    try:
        huggingface_hub.create_repo(repo, private=True, exist_ok=True)
        huggingface_hub.auth_check(repo, write=True)
    except HfHubHTTPError as e:
        fail(f"--push-to-hub {repo}: the token may not write there (HTTP {e.response.status_code})")
    except Exception as e:  # no connection: every layer below has its own kinds
        fail(f"--push-to-hub {repo}: the hub can't be reached ({type(e).__name__})")


def push(directory: Path, repo: str, results: str | Path) -> None:
    """Upload a finished run in one commit. results: where metrics.json is; the card shows its rows of this adapter.
    Fails when the upload does; the run directory is complete in any case."""
    import huggingface_hub
    record = read_json(directory / "run.json")
    measured = read_results(Path(results) / "metrics.json")["runs"]
    rows = [row for row in measured if row["adapter_sha256"] == record["adapter_sha256"]]
    bases = [row for row in measured if row["adapter_sha256"] is None]
    published = without_places({"description": record["method"], **record})
    contents: dict[str, Any] = {p.name: p for p in sorted(directory.iterdir())
                                if any(fnmatch.fnmatch(p.name, pattern) for pattern in FILES)}
    contents["run.json"] = (to_json(published, indent=1) + "\n").encode()
    config = without_places(read_json(directory / "adapter_config.json"))
    contents["adapter_config.json"] = (json.dumps(config, indent=1) + "\n").encode()
    licences = {dataset: licence(dataset) for dataset in hub_data(record)}
    contents["README.md"] = model_card(published, repo, rows, bases, licences).encode()
    try:
        commit = huggingface_hub.HfApi().create_commit(
            repo, [huggingface_hub.CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=f"{record['name']}: {record['method']}, config {record['config_hash']}")
    except Exception as e:  # the client and all layers below it have their own kinds
        fail(f"{directory} is finished, but its upload to {repo} failed ({type(e).__name__}); try again: "
             f"python tools/push.py {directory} {repo}")
    say(f"pushed to {commit.commit_url.partition('/commit/')[0]} ({len(contents)} files)")


def licence(dataset: str) -> str:
    """What the card of a data set on the hub says of its licence."""
    import huggingface_hub
    try:
        card = huggingface_hub.dataset_info(dataset).card_data
    except Exception:  # gated, gone or out of reach: then it isn't known
        card = None
    card_licence = card and card.get("license")
    return ", ".join(card_licence) if isinstance(card_licence, list) else card_licence or "not stated"
