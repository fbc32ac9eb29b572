"""The card of a run, and --push-to-hub: the run on the Hugging Face hub.

What is uploaded is what others load and what proves where it comes from: adapter, tokenizer, run.json, prompts.json
(hashes of the prompts, by which a judge is kept apart), log, curves and the card; no text of the data. Absolute paths
of this machine are cut to their last part. The token is huggingface_hub's own business (`hf auth login`, HF_TOKEN) and
stands in none of it.
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
TASK_DATA = {"mmlu": "cais/mmlu", "gsm8k": "openai/gsm8k", "truthfulqa_mc2": "truthfulqa/truthful_qa",
             "ifeval": "google/IFEval"}  # where a task's items come from


# -- the card -------------------------------------------------------------------------------------

def model_card(record: dict[str, Any], repo: str | None = None, rows: list[dict[str, Any]] = (),
               licences: dict[str, str] = {}) -> str:
    """README.md of a run directory, or with `repo` of that repository.

    record: the run's run.json. rows: its rows of results/metrics.json, which become the card's model-index. licences:
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
    facts = {"config_hash": record["config_hash"], "train_invariants": record["train_invariants"],
             "chat template": (record["template"] or "the model's own").replace("|", "\\|"),
             "parent": (record["parent"] or {}).get("name", "none"), "seed": record["seed"],
             "adapter_sha256": f"{record['adapter_sha256'][:16]}…", "minutes": f"{record['wall_time_s'] / 60:.1f}",
             **record["metrics"]}
    sources = [f"| {role} | {source} | {licences.get(source.partition('@')[0], 'not known')} |"
               for role, source in (record["data"] or {}).items()]
    text = "\n\n".join([
        f"---\n{data.to_yaml()}\n---", f"# {record['name']}", record["description"],
        "The adapter is relative to the pretrained base, whatever it was trained on top of:",
        f"```python\n{loads}\n```",
        *(["| evaluation | value | 95 % interval | n |\n|---|---|---|---|\n" + "\n".join(
            result_line(r) for row in rows for r in eval_results(row))] if rows else []),
        "| data | source | licence |\n|---|---|---|\n" + "\n".join(sources),
        "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in facts.items()),
        f"Command: `python {record['command']}`. Curves: curves.png; every step: log.jsonl.\n"])
    return str(ModelCard(text))


def hub_data(record: dict[str, Any]) -> list[str]:
    """The hub's data sets among a run's: their fingerprints are id@commit:config/split."""
    found = [re.match(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}:", source) for source in (record["data"] or {}).values()]
    return list(dict.fromkeys(match[1] for match in found if match))


def eval_results(row: dict[str, Any]) -> list:
    """A row of results/metrics.json as EvalResults of the model-index, each with its 95 % interval (± 1.96 standard
    errors). Of a group such as MMLU only the whole."""
    from huggingface_hub import EvalResult
    results, shots = [], {task: n for task, n, _ in row["eval"]["tasks"]}
    items = row["n"] | {task: found["n"] for task, found in row.get("secondary", {}).items()}
    for key, value in row["metrics"].items():
        task, _, metric = key.partition("/")
        name, _, filter_name = metric.partition(",")
        stderr = row["metrics"].get(f"{task}/{name}_stderr,{filter_name}")
        if task in items and isinstance(value, float) and stderr is not None:
            results.append(EvalResult(
                task_type="text-generation", dataset_type=TASK_DATA.get(task, task), dataset_name=task,
                metric_type=name, metric_value=value, metric_name=f"{task} {metric}, {row['protocol']} protocol",
                metric_args={"interval_95": [value - 1.96 * stderr, value + 1.96 * stderr], "stderr": stderr,
                             "n": items[task], "num_fewshot": shots.get(task), "eval_hash": row["eval_hash"]}))
    return results


def result_line(result) -> str:
    low, high = result.metric_args["interval_95"]
    return f"| {result.metric_name} | {result.metric_value:.4f} | {low:.4f} to {high:.4f} | {result.metric_args['n']:,} |"


# -- the hub --------------------------------------------------------------------------------------

def check_access(repo: str) -> None:
    """Fail unless NAMESPACE/NAME can be written to, before anything is trained.

    A repository that isn't there yet is created, private and empty: nothing less shows that it will be possible.
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
    """Upload a finished run in one commit. results: where metrics.json is, whose rows of this adapter the card shows.
    Fails when the upload does; the run directory is complete in any case."""
    import huggingface_hub
    record = read_json(directory / "run.json")
    rows = [row for row in read_results(Path(results) / "metrics.json")["runs"]
            if row["adapter_sha256"] == record["adapter_sha256"]]
    published = without_places({"description": record["method"], **record})
    contents: dict[str, Any] = {p.name: p for p in sorted(directory.iterdir())
                                if any(fnmatch.fnmatch(p.name, pattern) for pattern in FILES)}
    contents["run.json"] = (to_json(published, indent=1) + "\n").encode()
    config = without_places(read_json(directory / "adapter_config.json"))
    contents["adapter_config.json"] = (json.dumps(config, indent=1) + "\n").encode()
    contents["README.md"] = model_card(published, repo, rows, {d: licence(d) for d in hub_data(record)}).encode()
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
    found = card and card.get("license")
    return ", ".join(found) if isinstance(found, list) else found or "not stated"
