"""results/metrics.json (schema, keys, concurrent and killed writers); report.py (numbers, refusals, generated
files)."""

import copy
import gzip
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep

import judged as judged_module
import plots
import report
import reward
import tables
import verdicts
from common import SCHEMA_VERSION, read_results, upsert_row, write_text
from guardrails import collapsed

SCORES = {  # (score, stderr) by lm-eval's key
    "mmlu/acc,none": (0.50, 0.003),
    "gsm8k/exact_match,strict-match": (0.20, 0.012),
    "truthfulqa_mc2/acc,none": (0.40, 0.015),
    "ifeval/prompt_level_strict_acc,none": (0.10, 0.012),
    "ifeval/inst_level_strict_acc,none": (0.25, 0.016),
}
N = {"mmlu": 13_848, "gsm8k": 1_319, "truthfulqa_mc2": 817, "ifeval": 541}


def write_json(path, record):
    """As any program writes JSON: NaN included, which our own writer refuses."""
    write_text(path, json.dumps(record, indent=1))


OF_REWARD = "held-out pairs ranked correctly, %<br>before: the better rule of length"
APART_FROM = "so not comparable with the other rows."
README = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nThe rest.\n"


def make_row(name, phase=0, method="base", adapter=None, config=None, protocol="plain", limit=None, **scores):
    """A row as evaluate.py writes it; scores by task (or ifeval_prompt) replace those of SCORES."""
    values = dict(SCORES)
    for key, value in scores.items():
        (full,) = [k for k in values if k.replace("ifeval/prompt", "ifeval_prompt/").startswith(key + "/")]
        values[full] = value
    metrics = {}
    for key, (value, stderr) in values.items():
        metrics |= {key: value, key.replace(",", "_stderr,"): stderr}
    tasks = [["mmlu", 5, limit or 1000], ["truthfulqa_mc2", 0, limit], ["gsm8k", 8, limit], ["ifeval", 0, limit]]
    return {
        "name": name, "phase": phase, "method": method, "model": "org/base", "revision": "0123abcd", "adapter": None,
        "config_hash": config or f"c{phase:07d}", "adapter_sha256": adapter and adapter * 64,
        "weights_sha256": "e" * 64, "train_invariants": "aaaa1111", "invariants": {"lora_r": 16, "quantization": "none"},
        "eval_hash": {"plain": "bbbb2222", "chat": "cccc3333"}[protocol], "parent": None, "family": f"f-{method}-{config}", "seed": 42,
        "eval": {"protocol": protocol, "tasks": tasks, "data": "d" * 64, "max_gen_toks": None, "dtype": "bfloat16",
                 "quantization": "none", "adapter_merged": False},
        "data": None, "protocol": protocol, "limit": limit, "quantization": "none", "dtype": "bfloat16",
        "metrics": metrics, "n": {task: limit or n for task, n in N.items()}, "task_versions": {"mmlu": 2, "gsm8k": 3},
        "samples": "samples/x", "training": None, "wall_time_s": 1.0, "versions": {}, "hardware": {},
        "timestamp": f"2026-01-0{1 + phase}T00:00:00+00:00",
    }  # fmt: skip


def three_rows(**kwargs):
    rungs = [("base",), ("sft_v2", 1, "sft", "5"), ("dpo_v1", 2, "dpo", "d")]
    rows = [make_row(*rung, **kwargs) for rung in rungs]
    rows[2]["parent"] = {"name": "sft_v2", "method": "sft", "config_hash": "c0000001", "adapter_sha256": "5" * 64}
    return rows


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty project: results/ and a README with the markers, as the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def run(rows, *flags):
    """report.py on these rows; rows None leaves metrics.json as it is."""
    if rows is not None:
        write_json("results/metrics.json", {"schema_version": 1, "runs": rows})
    report.main(tyro.cli(report.Args, args=list(flags)))


def exits(code, rows, *flags):
    with pytest.raises(SystemExit) as e:
        run(rows, *flags)
    assert e.value.code == code


def table(after, path="results/README.md"):
    """{first text cell that names the row: the other cells} of the first markdown table below the line `after`."""
    lines = Path(path).read_text().split(after, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    cells = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        texts = [cell.strip() for cell in line.strip("|").split("|")]
        key = texts.pop(1) if re.fullmatch(r"\d|phase|:--", texts[0]) and texts[1] != "--:" else texts.pop(0)
        cells[key] = texts
    return cells


# ------------------------------------------------------------------ metrics.json


def test_no_file_is_an_empty_result(tmp_path):
    assert read_results(tmp_path / "metrics.json") == {"schema_version": SCHEMA_VERSION, "runs": []}


def test_written_file_has_schema_and_whole_row(tmp_path):
    path, row = tmp_path / "results" / "metrics.json", make_row("base")
    upsert_row(path, row)
    assert json.loads(path.read_text()) == {"schema_version": 1, "runs": [row]}
    assert read_results(path) == json.loads(path.read_text())


@pytest.mark.parametrize("key", ["name", "config_hash", "adapter_sha256", "eval_hash"])
def test_upsert_replaces_only_the_same_key(tmp_path, key):
    path = tmp_path / "metrics.json"
    first = make_row("sft_v2", 1, "sft", "5")
    upsert_row(path, first)
    upsert_row(path, first | {"seed": 7, "timestamp": "2026-02-01"})  # same key: replaced, whatever else changed
    (stored,) = read_results(path)["runs"]
    assert stored["seed"] == 7
    upsert_row(path, first | {key: "different"})  # another key: beside it
    runs = read_results(path)["runs"]
    assert sorted(r[key] for r in runs) == sorted([first[key], "different"])
    assert [r["seed"] for r in runs if r[key] == first[key]] == [7]


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99])
def test_newer_schema_is_refused_and_kept(here, capsys, version):
    text = json.dumps({"schema_version": version, "runs": [], "new": True})
    Path("results/metrics.json").write_text(text)
    path = "results/metrics.json"
    for call in (lambda: read_results(path), lambda: upsert_row(path, make_row("base")), lambda: run(None)):
        with pytest.raises(SystemExit) as e:
            call()
        assert e.value.code == 2
        assert f"schema_version {version}" in capsys.readouterr().err
    assert Path("results/metrics.json").read_text() == text
    assert not Path("results/README.md").exists() and Path("README.md").read_text() == README


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": 1}', '{"runs": []}'])
def test_a_damaged_file_is_refused_and_kept(tmp_path, capsys, text):
    path = tmp_path / "metrics.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as e:
        upsert_row(path, make_row("base"))
    assert e.value.code == 2 and str(path) in capsys.readouterr().err
    assert path.read_text() == text


def write_many(path, writer, count):
    for i in range(count):
        upsert_row(path, make_row(f"w{writer}_{i}", 1, "sft", "5"))


def test_concurrent_writers_lose_nothing_and_readers_see_whole_files(tmp_path):
    path, fork = tmp_path / "metrics.json", multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_many, args=(path, w, 6)) for w in range(8)]
    for process in writers:
        process.start()
    sizes = []
    while any(process.is_alive() for process in writers):
        if path.exists():
            sizes.append(len(json.loads(path.read_text())["runs"]))  # raises on half a file
        time.sleep(0.002)
    for process in writers:
        process.join()
    assert [process.exitcode for process in writers] == [0] * 8
    assert sizes == sorted(sizes) and len(set(sizes)) > 1  # watched while they wrote; no row ever vanished
    assert {r["name"] for r in read_results(path)["runs"]} == {f"w{w}_{i}" for w in range(8) for i in range(6)}


def test_killed_writers_leave_a_valid_file_and_no_lock(tmp_path):
    path, fork = tmp_path / "metrics.json", multiprocessing.get_context("fork")
    upsert_row(path, make_row("base"))
    seen = 1
    for attempt in range(8):
        process = fork.Process(target=write_many, args=(path, attempt, 10_000))
        process.start()
        time.sleep(0.05 + 0.007 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        runs = json.loads(path.read_text())["runs"]
        assert len(runs) >= seen and "base" in {r["name"] for r in runs}
        seen = len(runs)
    assert seen > 1
    upsert_row(path, make_row("after"))  # would wait for ever on a lock that outlived its holder
    assert len(read_results(path)["runs"]) == seen + 1


# ------------------------------------------------------------------ the numbers


def test_scores_and_differences_against_hand_computed_values(here):
    def scores(mmlu, gsm8k, truthfulqa, prompt):
        return {"mmlu": mmlu, "gsm8k": gsm8k, "truthfulqa_mc2": truthfulqa, "ifeval_prompt": prompt}

    base = make_row("base", **scores((0.5000, 0.003), (0.30, 0.012), (0.40, 0.015), (0.100, 0.006)))
    sft = make_row("sft_v2", 1, "sft", "5", **scores((0.4900, 0.004), (0.28, 0.005), (0.40, 0.020), (0.226, 0.008)))
    dpo = make_row("dpo_v1", 2, "dpo", "d", **scores((0.4704, 0.003), (0.34, 0.012), (0.43, 0.020), (0.216, 0.006)))
    run([dpo | {"parent": three_rows()[2]["parent"]}, base, sft])  # in any order
    state = table("#### Current state")
    # columns: MMLU, GSM8K, TruthfulQA, IFEval prompt, IFEval instruction
    assert state["base"] == ["0", "50.0 ± 0.3", "30.0 ± 1.2", "40.0 ± 1.5", "10.0 ± 0.6", "25.0 ± 1.6"]
    assert state["sft_v2"][:5] == ["1", "49.0 ± 0.4", "28.0 ± 0.5", "40.0 ± 2.0", "22.6 ± 0.8"]
    # se by Pythagorean triples: (3, 4, 5), (12, 5, 13), (15, 20, 25), (6, 8, 10); instruction: 1.6 sqrt 2 = 2.26
    against_base = table("#### Change against base")
    changes = ["**−1.0 ± 0.5**", "−2.0 ± 1.3 ~", "0.0 ± 2.5 ~", "**+12.6 ± 1.0**", "0.0 ± 2.3 ~"]
    assert against_base["sft_v2 − base"] == changes
    # mmlu: 0.3 sqrt 2 = 0.42; gsm8k: 1.2 sqrt 2 = 1.70, 4.0 > 3.4; prompt: 0.6 sqrt 2 = 0.85
    changes = ["**−3.0 ± 0.4**", "**+4.0 ± 1.7**", "+3.0 ± 2.5 ~", "**+11.6 ± 0.8**", "0.0 ± 2.3 ~"]
    assert against_base["dpo_v1 − base"] == changes
    # truthfulqa: 2 sqrt 2 = 2.83
    against_sft = table("#### Change against its own parent")
    changes = ["**−2.0 ± 0.5**", "**+6.0 ± 1.3**", "+3.0 ± 2.8 ~", "−1.0 ± 1.0 ~", "0.0 ± 2.3 ~"]
    assert against_sft["dpo_v1 − sft_v2"] == changes
    assert set(against_base) == {"difference", ":--", "sft_v2 − base", "dpo_v1 − base"}
    assert set(against_sft) == {"difference", ":--", "dpo_v1 − sft_v2"}
    # the README's compact table carries the same numbers
    compact = table(report.BEGIN, "README.md")
    assert compact["base"][1] == "50.0 ± 0.3"
    assert compact["sft_v2"][1:3] == ["49.0 ± 0.4 (**−1.0**)", "28.0 ± 0.5 (−2.0 ~)"]


def test_header_says_shots_and_items(here):
    run(three_rows())
    header = table("#### Current state")["row"]
    assert header == ["phase", "MMLU<br>5-shot<br>n = 13,848", "GSM8K<br>strict<br>8-shot<br>n = 1,319",
                      "TruthfulQA<br>MC2<br>0-shot<br>n = 817", "IFEval<br>prompt<br>0-shot<br>n = 541",
                      "IFEval<br>instruction<br>0-shot<br>n = 541"]  # fmt: skip


@pytest.mark.parametrize("points, clear", [(10, True), (-10, True), (10.1, True), (9.9, False), (-9.9, False), (0, False)])
def test_noise_flag_on_both_sides_of_two_standard_errors(points, clear):
    # se = sqrt(3^2 + 4^2) = 5, so the threshold is 10 points, itself beyond noise
    found, stderr, flag = verdicts.delta((40.0 + points, 3.0), (40.0, 4.0))
    assert found == pytest.approx(points) and stderr == 5.0 and flag is clear
    cell = tables.delta_cell(found, stderr, flag)
    assert cell.startswith("**") is clear and cell.endswith("~") is not clear


def test_no_difference_is_noise_even_where_no_item_varies(here):
    rows = three_rows(gsm8k=(0.0, 0.0))
    run(rows)
    assert table("#### Change against base")["sft_v2 − base"][1] == "0.0 ± 0.0 ~"
    assert "± 0.0: every item scored alike" in Path("results/README.md").read_text()


@pytest.mark.parametrize("missing", [None, "N/A", float("nan")])
def test_a_missing_standard_error_is_shown_and_never_flagged(here, missing):
    rows = three_rows()
    rows[2] = make_row("dpo_v1", 2, "dpo", "d", gsm8k=(0.9, missing))
    run(rows)
    assert table("#### Current state")["dpo_v1"][2] == "90.0 ± ?"
    assert table("#### Change against base")["dpo_v1 − base"][1] == "+70.0 ± ?"  # neither ~ nor bold
    assert table(report.BEGIN, "README.md")["dpo_v1"][2] == "90.0 ± ? (+70.0 ?)"
    del rows[2]["metrics"]["gsm8k/exact_match_stderr,strict-match"]  # the same when the key isn't there
    before = Path("results/README.md").read_text()
    run(rows)
    assert Path("results/README.md").read_text() == before
    rows[0]["metrics"]["mmlu/acc_stderr,none"] = missing  # on the other side of the difference
    run(rows)
    assert table("#### Change against base")["dpo_v1 − base"][0] == "0.0 ± ?"


def test_a_task_that_was_not_measured_is_not_zero(here):
    rows = three_rows()
    for key in [key for key in rows[2]["metrics"] if key.startswith("gsm8k/")]:
        del rows[2]["metrics"][key]
    del rows[2]["n"]["gsm8k"]
    run(rows)
    assert table("#### Current state")["dpo_v1"][1:3] == ["50.0 ± 0.3", "–"]
    assert table("#### Change against base")["dpo_v1 − base"][1] == "–"


def test_rows_without_a_result_are_not_run_never_zero(here):
    run(three_rows())
    for path, mark in (("results/README.md", "### Current state"), ("README.md", report.BEGIN)):
        state = table(mark, path)
        assert list(state) == ["row", ":--", "base", "sft_v2", "dpo_v1", "ppo_v1", "grpo_v1", "kto_v1"]
        for name, phase in (("ppo_v1", "3"), ("grpo_v1", "4"), ("kto_v1", "5")):
            assert state[name] == [phase, *(["–"] * 6 + ["not run", ""] if path == "README.md" else ["not run", *["–"] * 4])]
    assert "ppo_v1 −" not in Path("results/README.md").read_text()


def test_no_results_at_all(here):
    run(None)
    state = table("# Results")
    assert [cells[1] for name, cells in state.items() if name not in ("row", ":--")] == ["not run"] * 6
    assert not re.search(r"\b0\.0\b", Path("README.md").read_text())
    run(None, "--check")


def test_other_names_follow_their_phase(here):
    run([*three_rows(), make_row("sft_2ep", 1, "sft", "6", config="c2e"), make_row("kto_big", 5, "kto", "7")])
    names = list(table("#### Current state"))[2:]
    assert names == ["base", "sft_v2", "sft_2ep", "dpo_v1", "ppo_v1", "grpo_v1", "kto_v1", "kto_big"]
    a, b = make_row("kto_a", 5, "kto", "1"), make_row("kto_b", 5, "kto", "2") | {"timestamp": "2026-01-07"}
    again = make_row("kto_a", 5, "kto", "3") | {"timestamp": "2026-01-08"}
    run([*three_rows(), again, b, a])  # a rerun stands below its first
    assert list(table("#### Current state"))[-3:] == ["kto_a@11111111", "kto_a@33333333†", "kto_b"]
    # without a parent in the row, a method is compared with the row of the climb, not with a control
    assert "dpo_v1 − sft_v2" in table("#### Change against its own parent")


def test_a_rerun_with_another_adapter_stands_beside_the_first_and_is_marked(here):
    rows = three_rows()
    for row in rows:
        upsert_row("results/metrics.json", row)
    again = make_row("dpo_v1", 2, "dpo", "9", mmlu=(0.40, 0.003)) | {"timestamp": "2026-01-09"}
    upsert_row("results/metrics.json", again)
    run(None)
    state = table("#### Current state")
    assert state["dpo_v1@dddddddd"][1] == "50.0 ± 0.3" and state["dpo_v1@99999999†"][1] == "40.0 ± 0.3"
    assert "† another run of a row above: the same config_hash" in Path("results/README.md").read_text()
    against_base = table("#### Change against base")
    assert against_base["dpo_v1@99999999† − base<br>(descriptive)"][0] == "**−10.0 ± 0.4**"
    assert against_base["dpo_v1@dddddddd − base"][0] == "0.0 ± 0.4 ~"


def test_another_config_of_the_same_name_is_no_rerun(here):
    run([*three_rows(), make_row("dpo_v1", 2, "dpo", "9", config="other")])
    assert {"dpo_v1@dddddddd", "dpo_v1@99999999"} <= set(table("#### Current state"))
    assert "†" not in Path("results/README.md").read_text()


def test_a_method_is_compared_with_its_own_parent(here):
    """The row whose adapter it names; a method that started from the base has only that, and one whose parent has no
    row is left out, with a note."""
    base, sft, dpo = three_rows()
    other = make_row("sft_v2", 1, "sft", "9", config="other", mmlu=(0.40, 0.004))
    run([base, sft, other, dpo])
    own = '#### Change against its own parent'
    assert table(own)["dpo_v1 − sft_v2@55555555"][0] == "0.0 ± 0.4 ~"
    dpo["parent"] = {"name": "sft_v2", "method": "sft", "adapter_sha256": "9" * 64}
    run([base, sft, other, dpo])
    assert table(own)["dpo_v1 − sft_v2@99999999"][0] == "**+10.0 ± 0.5**"
    run([base, sft, dpo])  # its parent has no row: not compared with another SFT row instead
    assert "dpo_v1 − sft_v2" not in (text := Path("results/README.md").read_text())
    assert "dpo_v1 is left out: sft_v2, from which it was trained, has no row here" in text
    dpo["parent"] = None
    run([base, sft, dpo])
    assert own not in Path("results/README.md").read_text() and "dpo_v1 − base" in table("#### Change against base")


def test_a_trial_says_so_with_its_error(here):
    run(three_rows(limit=8))
    text = Path("results/README.md").read_text()
    # sqrt(0.5 * 0.5 / 8) = 0.1768
    assert "**Trial, not a result: mmlu 8, gsm8k 8, truthfulqa_mc2 8, ifeval 8 items.**" in text
    assert "on 8 items has a standard error of 17.7 points" in text
    assert "Limits: mmlu 8 items per subject, truthfulqa_mc2 8 items" in text
    rows = three_rows()
    for row in rows:
        row["n"] = row["n"] | {"gsm8k": 25}  # small data and no limit; sqrt(0.25 / 25) = 0.1
    run(rows)
    assert "on 25 items has a standard error of 10.0 points" in Path("README.md").read_text()
    run(three_rows())
    assert "Trial" not in Path("results/README.md").read_text() + Path("README.md").read_text()


# ------------------------------------------------------------------ reward models and on-policy runs


def share(right, n):
    """As reward.py writes a share of pairs; the interval is scipy's."""
    interval = stats.binomtest(right, n).proportion_ci(method="wilson") if n else None
    return {"n": n, "accuracy": right / n if n else None, "interval": interval and [interval.low, interval.high]}


def write_reward(stem="rm_v1", right=80, longer=60, plot=False, **changes):
    """results/rm/<stem>.json with 100 held-out pairs; a change to None takes the key out."""
    record = {
        "schema_version": 1, "name": stem, "model": "org/base", "config_hash": "c0000031", "family": "fam00001",
        "seed": 42, "train_invariants": "aaaa1111", "adapter_sha256": "a" * 64, "data": {"heldout": "sha256:1"},
        **share(right, 100), "loss": 0.6, "longer_wins": share(longer, 100), "length_matched": share(13, 20),
        "score_length": {"pearson": -0.254, "spearman": 0.9}, "margin_length": {"pearson": 0.8, "spearman": 0.8},
        "scores": {"chosen": {"mean": 9.0, "sd": 9.0}, "rejected": {"mean": 8.0, "sd": 9.0},
                   "margin": {"mean": 0.5678, "sd": 1.25}}, "calibration": [], "calibration_error": 0.0421,
    } | changes  # fmt: skip
    write_json(f"results/rm/{stem}.json", {key: value for key, value in record.items() if value is not None})
    if plot:
        Path(f"results/rm/{stem}.png").write_bytes(b"png")


def said(start, path="results/README.md"):
    """The one line of a generated file that begins so."""
    (line,) = [line for line in Path(path).read_text().splitlines() if line.startswith(start)]
    return line


def test_a_reward_model_is_a_table_of_its_own_and_no_rung(here):
    write_reward(plot=True)
    run(three_rows())
    assert "rm_v1" not in table("#### Current state") and "rm_v1" not in table(report.BEGIN, "README.md")
    found = table("## Reward models")
    assert list(found) == ["row", ":--", "rm_v1"]
    assert found["row"] == ["seed", "config_hash", "pairs", "accuracy, %", "longer-wins, %", "length-<br>matched, %",
                            "score–length<br>correlation", "calibration<br>error", "margin<br>mean / sd"]  # fmt: skip
    # Wilson, by hand for 80 of 100: (80 + 1.92) / 103.84 ± 1.96 / 103.84 * sqrt(16 + 0.96) = 0.7889 ± 0.0777
    assert found["rm_v1"] == ["42", "c0000031", "100", "80.0 [71.1, 86.7]", "60.0 [50.2, 69.1]",
                              "65.0 [43.3, 81.9]<br>n = 20", "−0.25", "0.042", "0.57 / 1.25"]  # fmt: skip
    text = "Whether rm_v1 beats longer-wins is not known, since its record has no outcomes pair by pair; on the same 100 "
    text += "held-out pairs: accuracy 80.0 [71.1, 86.7] %, longer-wins 60.0 [50.2, 69.1] %."
    assert said("Whether rm_v1") == text
    assert said("Plots:") == "Plots: [rm/rm_v1.png](rm/rm_v1.png)"
    assert "‡" not in Path("results/README.md").read_text()


def test_no_reward_model_is_not_run(here):
    run(three_rows())
    assert table("## Reward models")["rm_v1"] == ["not run"] + ["–"] * 8
    text = Path("results/README.md").read_text()
    assert "Plots:" not in text and "On-policy" not in text
    write_reward()  # from now on it has a result, and without its plot no link to one
    exits(1, None, "--check")
    run(None)
    assert table("## Reward models")["rm_v1"][1] == "c0000031" and "Plots:" not in Path("results/README.md").read_text()


def test_without_outcomes_pair_by_pair_longer_wins_is_not_compared(here):
    """Intervals of two shares of the same pairs, side by side, are no test."""
    write_reward(right=99)
    run(three_rows())
    assert said("Whether rm_v1 beats longer-wins is not known")
    assert learned(None)["rm_v1", OF_REWARD][1:] == ["60.0", "99.0 [94.6, 99.8]", "–", "–"]


def test_figures_as_reward_py_computes_them(here):
    """reward.evaluation's own dictionary, from scores and lengths whose figures are plain to see."""
    margin = torch.tensor([1.0] * 75 + [-1.0] * 25)
    lengths = torch.tensor([[30, 10]] * 40 + [[10, 30]] * 40 + [[100, 95]] * 20)  # longer wins: 40 + 20 of 100
    found = reward.evaluation(torch.stack([margin / 2, -margin / 2], 1), lengths, 0.01)
    write_reward(**found)
    run(three_rows())
    row = table("## Reward models")["rm_v1"]
    # matched are the last 20, all wrong; 0 of 20: Wilson's upper end is 3.84 / 23.84
    assert row[2:6] == ["100", "75.0 [65.7, 82.5]", "60.0 [50.2, 69.1]", "0.0 [0.0, 16.1]<br>n = 20"]
    scores = [side for m in margin.tolist() for side in (m / 2, -m / 2)]
    assert row[6] == f"{statistics.correlation(scores, lengths.flatten().tolist()):.2f}".replace("-", "−")
    # σ(1) = 0.7311; of the tenths seven are all right, one is half right, two are all wrong
    assert row[7] == f"{(7 * (1 - 0.7311) + (0.7311 - 0.5) + 2 * 0.7311) / 10:.3f}"
    assert row[8] == "0.50 / 0.87"  # mean (75 - 25) / 100; sd sqrt(1 - 0.25)


MISSING = {  # key that a reward model's file lacks: {column: what its line shows there}
    "seed": {0: "–"}, "config_hash": {1: "–"}, "n": {2: "–"}, "accuracy": {3: "–"}, "interval": {3: "80.0 [?]"},
    "longer_wins": {4: "–"}, "length_matched": {5: "–<br>n = –"}, "score_length": {6: "–"},
    "calibration_error": {7: "–"}, "scores": {8: "– / –"}, "name": {}, "family": {}, "data": {},
}  # fmt: skip


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_figure_of_a_reward_model_is_a_dash(here, key):
    write_reward()
    run(three_rows())
    whole = table("## Reward models")["rm_v1"]
    write_reward(**{key: None})
    run(None)
    found = table("## Reward models")["rm_v1"]
    assert {i: cell for i, cell in enumerate(found) if cell != whole[i]} == MISSING[key]


def test_no_length_matched_pair_is_a_dash(here):
    write_reward(length_matched=share(0, 0), score_length={"pearson": float("nan")})
    run(three_rows())
    assert table("## Reward models")["rm_v1"][5:7] == ["–<br>n = 0", "–"]


def test_seeds_of_a_family_get_their_mean_and_sd(here):
    write_reward()
    write_reward("rm_s7", 70, seed=7, config_hash="c0000007", calibration_error=0.0821)
    run(three_rows())
    # 80 and 70: mean 75, sd with n - 1 = 10 / sqrt 2 = 7.07; 0.0421 and 0.0821: mean 0.0621, sd 0.04 / sqrt 2 = 0.0283
    assert table("## Reward models")["mean ± sd"] == [
        "7, 42", "family<br>fam00001", "", "75.0 ± 7.1", "60.0 ± 0.0", "65.0 ± 0.0", "−0.25 ± 0.00", "0.062 ± 0.028",
        "0.57 ± 0.00"]  # fmt: skip
    write_reward("rm_s7", 70, seed=7, length_matched=None)
    write_reward("rm_twice", 10, seed=7)  # a seed counts once
    write_reward("rm_z", 10, seed=8, family="fam00002")  # another family
    run(None)
    assert table("## Reward models")["mean ± sd"][3:6] == ["75.0 ± 7.1", "60.0 ± 0.0", "–"]
    for name in ("rm_s7", "rm_z"):
        Path(f"results/rm/{name}.json").unlink()
    Path("results/rm/rm_v1.json").unlink()  # one seed is left
    run(None)
    assert "mean ± sd" not in table("## Reward models") and "rm_twice" in table("## Reward models")
    write_reward("rm_twice", seed=7, family=None)  # no family is no family in common
    write_reward(family=None)
    run(None)
    assert set(table("## Reward models")) == {"row", ":--", "rm_twice", "rm_v1"}


def test_other_held_out_pairs_are_said(here):
    note = "Longer-wins differs, so not all saw the same pairs"
    write_reward()
    write_reward("rm_b", 70)
    run(three_rows())
    assert note not in Path("results/README.md").read_text()
    write_reward("rm_b", 70, longer=59)
    run(None)
    assert note in Path("results/README.md").read_text()


def test_a_reward_model_of_another_setup_is_marked_and_no_part_of_the_climb(here):
    write_reward("rm_big", train_invariants="ffff0000")
    run(three_rows())
    found = table("## Reward models")
    assert list(found) == ["row", ":--", "rm_big‡", "rm_v1"] and found["rm_v1"][0] == "not run"
    assert said("‡") == f"‡ rm_big: of other train_invariants (ffff0000) than base (aaaa1111), {APART_FROM}"
    assert "accuracy 80.0" in said("Whether rm_big‡")
    assert "rm_big" not in Path("README.md").read_text()
    write_reward(right=70)
    write_reward("rm_big_s7", train_invariants="ffff0000", family="fam00002", seed=7)
    write_reward("rm_big", train_invariants="ffff0000", family="fam00002")
    run(None)  # its own first, and a marked family keeps its mark
    found = table("## Reward models")
    assert list(found)[2:] == ["rm_v1", "rm_big‡", "rm_big_s7‡", "mean ± sd‡"]
    write_reward("rm_none", train_invariants=None)
    run(None)
    assert said("‡ rm_none") == f"‡ rm_none: of other train_invariants (unknown) than base (aaaa1111), {APART_FROM}"


def test_group_leaves_out_reward_models_of_another_setup(here):
    write_reward()
    write_reward("rm_big", train_invariants="ffff0000")
    rows = three_rows()
    run(rows, "--group", "bbbb2222")  # an eval_hash: training is not restricted
    assert {"rm_v1", "rm_big‡"} <= set(table("## Reward models"))
    run(rows, "--group", "aaaa1111", "bbbb2222")
    assert list(table("## Reward models")) == ["row", ":--", "rm_v1"]
    assert "rm_big" not in Path("results/README.md").read_text()
    rows += [row | {"train_invariants": "ffff0000"} for row in three_rows()]  # rows of both: each group has its own
    run(rows, "--group", "ffff0000")
    assert list(table("## Reward models")) == ["row", ":--", "rm_big"]
    assert "‡" not in Path("results/README.md").read_text()


def test_without_rows_the_first_reward_model_says_what_the_others_must_be(here):
    write_reward("rm_a")
    write_reward("rm_b", train_invariants="ffff0000")
    run(None)
    assert list(table("## Reward models"))[2:] == ["rm_a", "rm_b‡"]
    assert said("‡") == f"‡ rm_b: of other train_invariants (ffff0000) than rm_a (aaaa1111), {APART_FROM}"


def write_on_policy(stem="ppo/ppo_v1", **changes):
    """results/<stem>.json; a change to None takes the key out."""
    record = {
        "schema_version": 1, "name": Path(stem).name, "model": "org/base", "config_hash": "c0000041", "family": "f",
        "seed": 42, "train_invariants": "aaaa1111", "adapter_sha256": "a" * 64, "data": {},
        "reward_model": {"name": "rm_v1", "config_hash": "c0000031"},
        "watch_model": {"name": "rm_w", "config_hash": "c0000032"},
        "before": {"score": -0.25, "tokens": 120, "eos_rate": 1.0, "note": "text", "cut": True, "per": [1, 2]},
        "after": {"score": 1.5, "tokens": 1345, "eos_rate": 0.75, "note": "text", "cut": False, "per": [1, 2]},
        "updates": 1200, "curves": {"kl": [0.0] * 18 + [4.0, 5.0], "scores": [0.0] * 20},
    } | changes  # fmt: skip
    write_json(f"results/{stem}.json", {key: value for key, value in record.items() if value is not None})


def test_on_policy_runs_before_and_after(here):
    write_on_policy()
    grpo = {"reward_model": None, "watch_model": None, "updates": 7, "curves": {"kl": [1.0] * 4 + [0.5]}}
    write_on_policy("grpo/grpo_v1", before={"pass@1": 0.125}, after={"pass@1": 0.25, "pass@8": 0.5}, **grpo)
    Path("results/grpo/grpo_v1.png").write_bytes(b"png")
    run(three_rows())
    ppo = table("## On-policy runs: PPO")
    assert ppo["row"] == ["updates", "KL at<br>the end", "score", "tokens", "eos_rate"]  # numbers only
    # the last tenth of 20 values: (4 + 5) / 2
    assert ppo["ppo_v1"] == ["1,200", "4.500", "−0.250 → 1.500", "120 → 1,345", "1.000 → 0.750"]
    assert said("ppo_v1: ") == "ppo_v1: rewarded by rm_v1 (c0000031), watched by rm_w (c0000032)."
    grpo = table("## On-policy runs: GRPO")
    assert grpo["row"][2:] == ["pass@1", "pass@8"]
    assert grpo["grpo_v1"] == ["7", "0.500", "0.125 → 0.250", "– → 0.500"]  # a tenth of 5: one
    assert said("Plots:") == "Plots: [grpo/grpo_v1.png](grpo/grpo_v1.png)"
    assert "grpo_v1: rewarded" not in (text := Path("results/README.md").read_text()) and "ppo_v1.png" not in text
    assert table("#### Current state")["ppo_v1"][1] == "not run"  # not evaluated: still no score


UNSAID = {  # key that an on-policy run's file lacks: what its line shows
    "before": ["1,200", "4.500", "– → 1.500", "– → 1,345", "– → 0.750"],
    "after": ["1,200", "4.500", "−0.250 → –", "120 → –", "1.000 → –"],
    "updates": ["–", "4.500", "−0.250 → 1.500", "120 → 1,345", "1.000 → 0.750"],
    "curves": ["1,200", "–", "−0.250 → 1.500", "120 → 1,345", "1.000 → 0.750"],
} | dict.fromkeys(["name", "seed", "reward_model"], ["1,200", "4.500", "−0.250 → 1.500", "120 → 1,345", "1.000 → 0.750"])


@pytest.mark.parametrize("key", UNSAID)
def test_a_missing_key_of_an_on_policy_run_is_a_dash(here, key):
    write_on_policy(**{key: None})
    run(three_rows())
    assert table("## On-policy runs: PPO")["ppo_v1"] == UNSAID[key]
    by = "rewarded by rm_v1 (c0000031), " * (key != "reward_model")
    assert said("ppo_v1: ") == f"ppo_v1: {by}watched by rm_w (c0000032)."
    write_json("results/ppo/ppo_v1.json", {"schema_version": 1, "train_invariants": "aaaa1111"})
    run(None)
    assert table("## On-policy runs: PPO")["ppo_v1"] == ["–", "–"]


@pytest.mark.parametrize("kl, shown", [([], "–"), ([None], "–"), ([0.5, float("nan")], "–"), ([0.5], "0.500"),
                                       ([9.0] * 10 + [2.0, 1.0], "1.500"), ([float("nan")] * 9 + [2], "2.000")])
def test_kl_at_the_end_is_the_mean_of_the_last_tenth(here, kl, shown):
    write_on_policy(curves={"kl": kl})  # 12 values: a tenth is two, rounded up
    run(three_rows())
    assert table("## On-policy runs: PPO")["ppo_v1"][1] == shown


def test_runs_of_one_method_share_its_columns_and_another_setup_is_marked(here):
    write_on_policy()
    write_on_policy("ppo/ppo_big", train_invariants="ffff0000", before={"win": 0.5}, after={"win": 0.75})
    run(three_rows())
    found = table("## On-policy runs: PPO")
    assert list(found)[2:] == ["ppo_v1", "ppo_big‡"]
    assert found["row"][2:] == ["score", "tokens", "eos_rate", "win"]
    assert found["ppo_v1"][-1] == "–" and found["ppo_big‡"][2:] == ["–", "–", "–", "0.500 → 0.750"]
    assert said("‡") == f"‡ ppo_big: of other train_invariants (ffff0000) than base (aaaa1111), {APART_FROM}"
    run(None, "--group", "aaaa1111")
    assert list(table("## On-policy runs: PPO"))[2:] == ["ppo_v1"]


@pytest.mark.parametrize("folder", ["rm", "ppo", "grpo"])
@pytest.mark.parametrize("version, named", [(SCHEMA_VERSION + 1, f"schema_version {SCHEMA_VERSION + 1}, newer"),
                                            (None, "not a results file"), ("1", "not a results file")])
def test_a_record_of_a_newer_or_unknown_schema_is_refused(here, capsys, folder, version, named):
    write_json(f"results/{folder}/x.json", {"name": "x", "train_invariants": "aaaa1111"} | (
        {"schema_version": version} if version else {}))
    exits(2, three_rows())
    error = capsys.readouterr().err
    assert f"results/{folder}/x.json" in error and named in error
    assert not Path("results/README.md").exists() and Path("README.md").read_text() == README


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_record_is_refused(here, capsys, text):
    Path("results/rm").mkdir()
    Path("results/rm/x.json").write_text(text)
    exits(2, three_rows())
    assert "results/rm/x.json" in capsys.readouterr().err and not Path("results/README.md").exists()


# ------------------------------------------------------------------ paired: with per-item scores


def scored(row, n=60, place="results", **right):
    """The row with per-item scores of n items a task, in results/scores/, and the metrics that they give. `right`: of a
    task (or ifeval_instruction) the item's score, by its number; by default item i is right when i % 3 == 0."""
    def value(key):
        return [right.get(key, lambda i: int(i % 3 == 0))(i) for i in range(n)]

    follows = [[x, 1] for x in value("ifeval")]  # two instructions a prompt, the second always followed
    columns = {
        "mmlu": {"acc,none": value("mmlu")},
        "gsm8k": {"exact_match,strict-match": value("gsm8k")},
        "truthfulqa_mc2": {"acc,none": [0.3 + 0.4 * x + i / 1000 for i, x in enumerate(value("truthfulqa_mc2"))]},
        "ifeval": {"prompt_level_strict_acc,none": value("ifeval"), "inst_level_strict_acc,none": follows},
    }
    metrics = {}
    for task, found in columns.items():
        for key, values in found.items():
            each = [x for v in values for x in v] if isinstance(values[0], list) else values
            metrics[f"{task}/{key}"] = statistics.fmean(each)
            metrics[f"{task}/{key.replace(',', '_stderr,')}"] = statistics.stdev(each) / len(each) ** 0.5
        found |= {"task": [task] * n, "doc_id": list(range(n)), "doc_hash": [f"{i:08x}" for i in range(n)]}
    path = f"scores/{row['name']}-{row['eval_hash']}-{(row['adapter_sha256'] or row['train_invariants'])[:8]}.json.gz"
    row = row | {"metrics": metrics, "n": dict.fromkeys(N, n), "scores": path}
    record = {key: row[key] for key in ("config_hash", "adapter_sha256", "weights_sha256", "eval_hash")}
    write_scores(path, {"schema_version": 1, **record, "tasks": columns})
    return row


def write_scores(path, record):
    Path("results/scores").mkdir(exist_ok=True)
    Path("results", path).write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))


def edit_scores(row, edit):
    path = Path("results", row["scores"])
    record = json.loads(gzip.decompress(path.read_bytes()))
    edit(record)
    write_scores(row["scores"], record)


def scored_rows(**of_dpo):
    base, sft, dpo = three_rows()
    return [scored(base), scored(sft), scored(dpo, **of_dpo)]


def better(i):  # than i % 3 == 0 on 26 items: 21 of the 40 others gained; 5 of 20 lost
    return int(i % 3 == 0 and i >= 15 or i % 3 == 1 or i == 2)


def test_paired_differences_against_scipy_and_by_hand(here):
    run(scored_rows(gsm8k=better, ifeval=better))
    against_base = table("#### Change against base")
    gained, lost = 21, 5
    p = stats.binomtest(lost, gained + lost).pvalue  # 0.0025
    # A family of 12 tests: four endpoints of SFT and DPO against base, of DPO against SFT. In all four of DPO's on GSM8K and
    # IFEval by prompt the same p: Holm multiplies the first of them by 12, and a later one is never smaller.
    a, b = (gained + 1) / 62, (lost + 1) / 62
    half = 1.96 * ((a + b - (a - b) ** 2) / 62) ** 0.5
    ends = f"[{100 * (a - b - half):.1f}, {100 * (a - b + half):.1f}]"
    assert against_base["dpo_v1 − base"][1] == f"**+26.7 {ends}**<br>p {12 * p:.3f}"
    assert against_base["dpo_v1 − base"][3] == f"**+26.7 {ends}**<br>p {12 * p:.3f}"
    assert re.fullmatch(r"\+13\.3 \[\d\.\d, 2\d\.\d\]", against_base["dpo_v1 − base"][4])  # descriptive: no p, not bold
    assert against_base["difference"][4] == "IFEval<br>instruction<br>descriptive"
    wide, none = "0.0 [−4.5, 4.5] ~<br>p 1.000", "0.0 [0.0, 0.0] ~<br>p 1.000"  # 1.96 sqrt(2 / 62^2) = 4.5 %
    assert against_base["sft_v2 − base"] == [wide, wide, none, wide, none.split("<br>")[0]]
    assert "One family of tests, 12 in all" in Path("results/README.md").read_text()
    # 2.80 sqrt(26 / 60 / 60); nothing differs on MMLU and TruthfulQA
    detectable = f"{280.1585 * (26 / 60 / 60) ** 0.5:.1f}"
    assert table("## 3. Is it a win?")["dpo_v1"][:2] == [
        "**win**", "GSM8K strict +26.7, IFEval prompt +26.7; MMLU is at chance in the base: it can show no forgetting"]
    assert table("#### Current state")["base"][1:3] == ["33.3 ± 6.1°", "33.3 ± 6.1"]  # 33.3 − 1.96 · 6.1 is below 25
    # 60 items: no difference seen, and none of 2 points excluded
    assert table("## 3. Is it a win?")["sft_v2"][0] == "**inconclusive**"
    compact = table(report.BEGIN, "README.md")
    assert compact["dpo_v1"][2].endswith("(**+26.7**)") and compact["dpo_v1"][-2:] == ["win", "`c0000002`"]
    assert compact["base"][-2:] == ["", "`c0000000`"] and compact["ppo_v1"][-2:] == ["not run", ""]
    line = against_base["smallest detectable"]
    assert line[:4] == ["–", detectable, "–", detectable] and compact[""] == ["smallest detectable", *line[:4], "", "", "", ""]
    assert report.UNPAIRED not in Path("results/README.md").read_text()


def test_the_order_of_the_items_does_not_matter(here):
    rows = scored_rows(gsm8k=better)
    run(rows)
    before = Path("results/README.md").read_bytes()

    def turn(record):
        for columns in record["tasks"].values():
            for values in columns.values():
                values.reverse()

    edit_scores(rows[2], turn)
    run(None)
    assert Path("results/README.md").read_bytes() == before


def test_bold_is_the_paired_test_and_the_tilde_the_two_scores_alone(here):
    """12 items gained and none lost of 600: p = 12 · 2 / 2^12, while 2 sqrt(se_a^2 + se_b^2) is 5.5 points."""
    base, sft, dpo = three_rows()
    run([scored(base, 600), scored(sft, 600), scored(dpo, 600, gsm8k=lambda i: int(i % 3 == 0 or i < 18))])
    cell = table("#### Change against base")["dpo_v1 − base"][1]
    assert re.fullmatch(r"\*\*\+2\.0 \[0\.\d, 3\.\d\]\*\* ~<br>p 0\.006", cell)
    assert table(report.BEGIN, "README.md")["dpo_v1"][2].endswith("(**+2.0** ~)")


def test_without_per_item_scores_there_is_no_paired_test_and_no_verdict(here):
    base, sft, dpo = three_rows()
    run([scored(base), sft | {"n": dict.fromkeys(N, 60)}, scored(dpo)])
    against_base = table("#### Change against base")
    assert "±" in against_base["sft_v2 − base"][0] and "p 1.000" in against_base["dpo_v1 − base"][0]
    assert report.UNPAIRED in Path("results/README.md").read_text()
    assert table("## 3. Is it a win?")["sft_v2"][:2] == ["**open**", "no per-item scores"]
    assert table("## 3. Is it a win?")["dpo_v1"][0] == "**inconclusive**"
    os.remove("results/scores/dpo_v1-bbbb2222-dddddddd.json.gz")  # named in the row, but not here
    run(None)
    assert "±" in table("#### Change against base")["dpo_v1 − base"][0]


def test_rows_scored_on_other_items_are_refused(here, capsys):
    rows = scored_rows()
    for edit, named in ((lambda r: r["tasks"]["gsm8k"]["doc_hash"].__setitem__(7, "ffffffff"), "gsm8k, doc_id 7"),
                        (lambda r: r["tasks"]["mmlu"]["task"].__setitem__(3, "mmlu_law"), "mmlu, doc_id 3")):
        edit_scores(rows[2], edit)
        exits(2, rows)
        error = capsys.readouterr().err
        assert "dpo_v1 and base were not scored on the same items" in error and named in error
        scored(rows[2])
    assert not Path("results/README.md").exists()


BROKEN = {  # what is wrong with a file of scores: (edit, what the error says)
    "weights": (lambda r: r.update(weights_sha256="f" * 64), "is of another weights_sha256 than row dpo_v1"),
    "adapter": (lambda r: r.pop("adapter_sha256"), "is of another adapter_sha256 than row dpo_v1"),
    "eval": (lambda r: r.update(eval_hash="cccc3333"), "is of another eval_hash than row dpo_v1: cccc3333 / bbbb2222"),
    "mean": (lambda r: r["tasks"]["gsm8k"]["exact_match,strict-match"].__setitem__(0, 0), "the mean of gsm8k/exact"),
    "instructions": (lambda r: r["tasks"]["ifeval"]["inst_level_strict_acc,none"].pop(), "the mean of ifeval/inst"),
    "tasks": (lambda r: r.pop("tasks"), "holds no per-item scores"),
}  # fmt: skip


@pytest.mark.parametrize("edit, named", BROKEN.values(), ids=BROKEN)
def test_scores_that_are_not_the_rows_are_refused(here, capsys, edit, named):
    rows = scored_rows()
    edit_scores(rows[2], edit)
    exits(2, rows)
    assert named in (error := capsys.readouterr().err) and "dpo_v1-bbbb2222-dddddddd.json.gz" in error


def test_damaged_scores_are_refused(here, capsys):
    rows = scored_rows()
    path = Path("results", rows[1]["scores"])
    path.write_bytes(path.read_bytes()[:100])
    exits(2, rows)
    assert f"{path} holds no per-item scores" in capsys.readouterr().err


def test_a_rerun_that_differs_is_irreproducible_and_one_that_does_not_is_no_matter(here):
    """The verdict is the method's, of its first row; a rerun stands beside it, descriptive."""
    base, sft, dpo = scored_rows(ifeval=better)
    rerun = make_row("dpo_v1", 2, "dpo", "9") | {"timestamp": "2026-01-09", "parent": dpo["parent"]}
    verdicts = "## 3. Is it a win?"
    run([base, sft, dpo, scored(rerun)])
    assert table(verdicts)["dpo_v1@dddddddd"][0] == "**irreproducible**" and "dpo_v1@99999999†" not in table(verdicts)
    assert "†" not in Path("README.md").read_text() and "dpo_v1@99999999†" in table("#### Current state")
    assert table(verdicts)["sft_v2"][0] == "**inconclusive**"
    run([base, sft, dpo, scored(rerun, ifeval=better)])
    assert table(verdicts)["dpo_v1@dddddddd"][0] == "**win**"
    run([base, sft, dpo, scored(rerun | {"name": "dpo_again"})])  # its name is no part of a configuration
    assert table(verdicts)["dpo_v1"][0] == "**irreproducible**"
    run([base, sft, dpo, rerun | {"n": dict.fromkeys(N, 60)}])  # can't be told
    assert table(verdicts)["dpo_v1@dddddddd"][0] == "**open**"


def seeds_of(name, phase, method, parents=None, seeds=(42, 43, 44), protocol="plain", **right):
    """Rows of the seeds of a family, each with per-item scores that differ a little by seed; in the chat protocol of
    other adapters than in the plain one."""
    rows, kind = [], {"plain": "", "chat": "c"}[protocol]
    for i, seed in enumerate(seeds):
        row = make_row(f"{name}{'' if seed == 42 else f'_s{seed}'}", phase, method, "0", protocol=protocol,
                       config=f"{method}{seed}") | {"seed": seed, "family": f"family-{method}"}
        row["adapter_sha256"] = (f"{phase}{seed - 42}{kind}" * 32)[:64]
        if parents:
            row["parent"] = {"name": parents[i]["name"], "method": "sft", "adapter_sha256": parents[i]["adapter_sha256"]}
        by_seed = {task: lambda i, f=f, seed=seed: max(0, f(i) - (i == seed)) for task, f in right.items()}
        rows.append(scored(row, 300, **by_seed))
    return rows


def test_seeds_of_a_family_are_one_comparison_each_with_its_own_parent(here):
    """Three seeds of DPO, each from its own SFT row: of 300 IFEval prompts 100 more are right, less the one by which a
    seed differs. By hand: point, s^2 of the seeds' means and of the seed-averaged items, t."""
    base = scored(make_row("base"), 300)
    sft = seeds_of("sft_v2", 1, "sft")
    dpo = seeds_of("dpo_v1", 2, "dpo", sft, ifeval=lambda i: int(i % 3 < 2))
    run([base, *sft, *dpo])
    d = [[int(i % 3 < 2) * (i != seed) - int(i % 3 == 0) for i in range(300)] for seed in (42, 43, 44)]
    means = [sum(row) / 300 for row in d]
    parts = statistics.variance(means) / 3, statistics.variance(sum(column) / 3 for column in zip(*d)) / 300
    df = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 299)
    half = 100 * stats.t.ppf(0.975, df) * sum(parts) ** 0.5
    point = 100 * statistics.fmean(means)
    for mark, line in (("#### Change against its own parent", "dpo_v1 (3 seeds) − parent"),
                       ("#### Change against base", "dpo_v1 (3 seeds) − base")):
        assert table(mark)[line][3] == f"**+{point:.1f} [{point - half:.1f}, {point + half:.1f}]**<br>p < 0.001"
    compact = table(report.BEGIN, "README.md")
    assert compact["dpo_v1 (3 seeds)"][4].startswith(f"{100 / 3 + point:.1f} ± ") and " sd (**+" in compact["dpo_v1 (3 seeds)"][4]
    assert compact["dpo_v1 (3 seeds)"][-1] == "`family family-dpo`" and compact["dpo_v1 (3 seeds)"][-2] == "win"
    assert "dpo_v1_s43" not in compact and "dpo_v1_s43" in table("#### Current state")
    verdicts = table("## 3. Is it a win?")
    assert verdicts["dpo_v1 (3 seeds)"][0] == "**win**" and verdicts["sft_v2 (3 seeds)"][0] == "**flat**"
    assert "One family of tests, 12 in all" in Path("results/README.md").read_text()  # not three times as many


def test_a_verdict_takes_each_endpoint_from_the_seeds_that_its_protocol_has(here):
    """Plain: seeds 42 to 44. Chat, where IFEval and GSM8K of an instruct base are tested: 44, trained again, and 45.
    The family is the same, so it is one verdict, which says how many seeds stand behind each protocol."""
    rows = [scored(make_row("base", protocol=protocol), 300) for protocol in ("plain", "chat")]
    for protocol, seeds in (("plain", (42, 43, 44)), ("chat", (44, 45))):
        sft = seeds_of("sft_v2", 1, "sft", None, seeds, protocol, truthfulqa_mc2=lambda i: int(i % 3 == 0) - 0.75)
        dpo = seeds_of("dpo_v1", 2, "dpo", sft, seeds, protocol, ifeval=lambda i: int(i % 3 < 2),
                       truthfulqa_mc2=lambda i: int(i % 3 == 0) - 0.75)
        rows += [*sft, *dpo]
        if protocol == "plain":  # not evaluated in chat: its four tests there count with p = 1
            rows += seeds_of("kto_v1", 5, "kto", sft, seeds, protocol)
    run([row | {"model": "org/base-instruct"} for row in rows])
    verdicts = table("## 3. Is it a win?")
    word, why = verdicts["dpo_v1 (3 seeds)"][:2]
    assert word == "**forgetting, inherited**" and "IFEval prompt +33." in why and why.endswith("; plain seeds 42, 43, 44, chat seeds 44, 45")
    assert verdicts["sft_v2 (3 seeds)"][0] == "**regression**" and verdicts["kto_v1 (3 seeds)"][0] == "**open**"
    assert table(report.BEGIN, "README.md")["dpo_v1 (4 seeds)"][-2] == "forgetting, inherited"
    text = Path("results/README.md").read_text()
    assert "One family of tests, 20 in all" in text and "4 of them can't be made yet, and count with p = 1" in text


def test_controls_are_descriptive(here):
    base, sft, dpo = scored_rows()
    control = scored(make_row("sft_2ep", 1, "sft", "7", config="2ep"), gsm8k=better)
    run([base, sft, dpo, control])
    cells = table("#### Change against base")["sft_2ep − base<br>(descriptive)"]
    assert cells[1].startswith("+26.7 [") and "p " not in cells[1]
    assert "sft_2ep" not in table("## 3. Is it a win?") and "12 in all" in Path("results/README.md").read_text()


def test_a_drop_that_the_parent_had_is_inherited(here):
    """SFT loses 30 points of TruthfulQA, DPO on it nothing more; a second one loses 30 points by itself."""
    def worse(i):
        return int(i % 3 == 0) - 0.75
    base, sft, dpo = three_rows()
    kto = make_row("kto_v1", 5, "kto", "a") | {"parent": dpo["parent"] | {"adapter_sha256": "6" * 64, "name": "sft_b"}}
    better_sft = make_row("sft_b", 1, "sft", "6", config="b")
    n = 300
    run([scored(base, n), scored(sft, n, truthfulqa_mc2=worse), scored(dpo, n, truthfulqa_mc2=worse),
         scored(better_sft, n), scored(kto, n, truthfulqa_mc2=worse)])
    verdicts = table("## 3. Is it a win?")
    assert verdicts["sft_v2"][:2] == ["**regression**", "TruthfulQA MC2 −30.0 (catastrophic)"]
    assert verdicts["dpo_v1"][:2] == ["**regression, inherited**", "TruthfulQA MC2 −30.0 (catastrophic, inherited)"]
    assert verdicts["kto_v1"][:2] == ["**regression**", "TruthfulQA MC2 −30.0 (catastrophic)"]
    assert "p ≤ 0.001" in table("#### Change against base")["dpo_v1 − base"][2]  # the resamples show no smaller one


def test_an_instruct_base_is_tested_in_chat_where_it_was_evaluated(here):
    plain, chat = three_rows(), three_rows(protocol="chat")
    for row in (*plain, *chat):
        row["model"] = "org/base-instruct"
    scored_plain = [scored(row) for row in plain]
    run(scored_plain)
    assert "the plain one stands in" in Path("results/README.md").read_text()
    scored_chat = [scored(row, **({"ifeval": better} if row["name"] == "dpo_v1" else {})) for row in chat]
    run([*scored_plain, *scored_chat])
    text = Path("results/README.md").read_text()
    assert "MMLU (plain), TruthfulQA MC2 (plain), GSM8K strict (chat), IFEval prompt (chat)" in text and "stands in" not in text
    chat_table = table("#### Change against base", "results/README.md") | {}
    assert chat_table["difference"][3] == "IFEval<br>prompt<br>descriptive"  # the first such table is plain's
    assert table("## 3. Is it a win?")["dpo_v1"][0] == "**win**"  # by the chat protocol; in plain it moved nothing


# ------------------------------------------------------------------ did it learn, and from what?


def learned(rows):
    """The lines of the first table, by row and objective."""
    run(rows)
    lines = Path("results/README.md").read_text().split("## 1. Did it learn", 1)[1].split("Each run's own")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {(row, objective): rest for row, objective, *rest in cells[2:]}


def test_the_first_table_is_what_each_method_optimises(here):
    base, sft, dpo = three_rows()
    sft["training"] = {"heldout_loss_base": 2.2, "heldout_loss": 2.07, "heldout_loss_interval": [2.0, 2.14],
                       "heldout_loss_change_interval": [-0.15, -0.11]}
    dpo["training"] = {"heldout_accuracy": 0.65, "heldout_pairs": 100, "heldout_margin": 0.125, "heldout_loss": 0.75,
                       "heldout_margin_interval": [-0.05, 0.3], "heldout_loss_interval": [0.7, 0.8]}
    kto = make_row("kto_v1", 5, "kto", "a") | {"training": {"heldout_auc": 0.52, "heldout_auc_interval": [0.47, 0.57],
                                                            "heldout_rows": 256}}
    ppo = make_row("ppo_v1", 3, "ppo", "b") | {"training": {"scores_before": 0.5, "scores_after": 0.27, "fixed_prompts": 64,
                                                            "scores_change_interval": [-0.4, -0.1]}}
    grpo = make_row("grpo_v1", 4, "grpo", "c") | {"training": {"pass_1_before": 0.1, "pass_1_after": 0.3,
                                                               "pass_k_before": 0.3, "pass_k_after": 0.5,
                                                               "heldout_problems": 200}}
    lines = learned([base, sft, dpo, kto, ppo, grpo])
    assert lines["sft_v2", "held-out loss, nats per token"] == [
        "–", "2.200", "2.070 [2.000, 2.140]", "−0.130 [−0.150, −0.110]", "**yes**"]  # lower is better
    low, high = stats.binomtest(65, 100).proportion_ci(method="wilson")
    assert lines["dpo_v1", "held-out pairs ranked correctly, %"] == [
        "100", "50.0", f"65.0 [{100 * low:.1f}, {100 * high:.1f}]", f"+15.0 [{100 * low - 50:.1f}, {100 * high - 50:.1f}]",
        "**yes**"]
    assert lines["dpo_v1", "held-out margin"][2:] == ["0.125 [−0.050, 0.300]", "+0.125 [−0.050, 0.300]", "not shown"]
    assert lines["dpo_v1", "held-out loss"] == ["100", "0.693", "0.750 [0.700, 0.800]", "+0.057 [0.007, 0.107]", "**worse**"]
    assert lines["kto_v1", "held-out AUC, %"] == ["256", "50.0", "52.0 [47.0, 57.0]", "+2.0 [−3.0, 7.0]", "not shown"]
    # paired: the mean over the prompts whose answers ended both times, the middle of the interval, not 0.25 − 0.5
    assert lines["ppo_v1", "score on fixed prompts"] == ["64", "0.500", "0.270", "−0.250 [−0.400, −0.100]", "**worse**"]
    low, high = confint_proportions_2indep(60, 200, 20, 200, method="newcomb")
    assert lines["grpo_v1", "held-out pass@1, strict, %"][3:] == [f"+20.0 [{100 * low:.1f}, {100 * high:.1f}]", "**yes**"]
    assert lines["grpo_v1", "held-out pass@k, %"] == ["200", "30.0", "50.0", "+20.0", "–"]  # no independent trials: no interval
    assert ("ppo_v1", "watch model's score on them") not in lines  # not recorded
    dpo["training"]["heldout_accuracy_interval"] = [0.45, 0.85]  # the run's own, over prompts, goes before Wilson's
    grpo["training"] |= {"pass_1_change_interval": [-0.01, 0.41], "pass_k_change_interval": [0.1, 0.3]}
    lines = learned([base, sft, dpo, kto, ppo, grpo])
    assert lines["dpo_v1", "held-out pairs ranked correctly, %"][2:] == ["65.0 [45.0, 85.0]", "+15.0 [−5.0, 35.0]", "not shown"]
    assert lines["grpo_v1", "held-out pass@1, strict, %"][4] == "not shown" and lines["grpo_v1", "held-out pass@k, %"][4] == "**yes**"
    assert Path("results/README.md").read_text().index("## 1.") < Path("results/README.md").read_text().index("## 2.")


def test_how_far_each_policy_moved(here):
    base, sft, dpo = three_rows()
    run([base, sft, dpo])
    assert "How far did it move?" not in Path("results/README.md").read_text()
    kto = make_row("kto_v1", 5, "kto", "a") | {"training": {
        "kl_reference": 1.2345, "kl_reference_interval": [1.0, 1.5], "kl_floor": 0.0004, "kl_evaluated": 0.0123,
        "kl_merge": None, "logprob_floor": 0.002, "kl_answers": 64, "measured_in": "float32"}}
    seeds = [make_row(f"ppo_{i}", 3, "ppo", str(i), config=f"c{i}") | {"seed": i, "family": "fp", "training": {
        "kl_reference": float(i), "kl_reference_interval": [0, 9], "measured_in": "float32"}} for i in (1, 2, 3)]
    run([base, sft, dpo, kto, *seeds])
    found = table("### How far did it move?")
    assert found["kto_v1"] == ["1.234 [1.000, 1.500]", "0.000", "0.012", "–", "0.002", "64", "float32"]
    assert found["ppo_1 (3 seeds)"] == ["2.000 ± 1.000", *["–"] * 5, "float32"]
    assert found["dpo_v1"] == ["–"] * 7  # an older record
    assert "sft_v2" not in found and "base" not in found  # trained from the base itself
    run_record(kto)
    run(None)
    assert "| kto_v1 | 1.234 [1.000, 1.500] |" in Path("results/runs/kto_v1.md").read_text()


@pytest.mark.parametrize("right, word", [(59, "not shown"), (60, "**yes**"), (41, "not shown"), (40, "**worse**")])
def test_learned_turns_where_the_interval_meets_one_half(here, right, word):
    """Wilson: 60 of 100 begins at 50.2 %, 59 of 100 at 49.2 %."""
    base, sft, dpo = three_rows()
    dpo["training"] = {"heldout_accuracy": right / 100, "heldout_pairs": 100}
    assert learned([base, sft, dpo])["dpo_v1", "held-out pairs ranked correctly, %"][4] == word


@pytest.mark.parametrize("changes, shown", [
    # own SE of a change near 5.5 points (Newcombe). Seeds 10, 20, 30: sqrt(10^2 / 3 + 5.5^2) = 8.0, df 7, half 18.7 < 20
    ((0.1, 0.2, 0.3), ["100", "10.0", "30.0 ± 10.0 sd", "+20.0 [1.3, 38.7]", "**yes**"]),
    # seeds 0, 20, 40: sqrt(20^2 / 3 + 5.5^2) = 12.8, df 3, half 40 > 20
    ((0.0, 0.2, 0.4), ["100", "10.0", "30.0 ± 20.0 sd", "+20.0 [−21.0, 61.0]", "not shown"]),
    # equal seeds: the items alone, half 9.4 > 5; a t interval over the seeds would have no width
    ((0.05, 0.05, 0.05), ["100", "10.0", "15.0 ± 0.0 sd", "+5.0 [−4.4, 14.4]", "not shown"]),
])  # fmt: skip
def test_what_seeds_learned_is_an_interval_over_seeds_and_items(here, changes, shown):
    rows = [make_row(f"grpo_{seed}", 4, "grpo", str(seed), config=f"c{seed}") | {"seed": seed, "family": "fg",
            "training": {"pass_1_before": 0.1, "pass_1_after": 0.1 + x, "heldout_problems": 100}}
            for seed, x in enumerate(changes)]
    lines = learned([make_row("base"), *rows])
    assert lines["grpo_0 (3 seeds)", "held-out pass@1, strict, %"] == shown


def test_a_reward_model_is_compared_with_length_pair_by_pair(here):
    """30 pairs on which only the model is right, 10 on which only the rule is, 2 ties: McNemar's exact p, by scipy."""
    model, longer = "1" * 30 + "0" * 10 + "1" * 50 + "0" * 8 + "-1", "0" * 30 + "1" * 10 + "1" * 50 + "0" * 8 + "1-"
    write_reward(outcomes={"model": model, "longer_wins": longer})
    run(three_rows())
    p = stats.binomtest(10, 40).pvalue
    a, b = 31 / 102, 11 / 102
    half = 1.959964 * ((a + b - (a - b) ** 2) / 102) ** 0.5
    ends = f"[{100 * (a - b - half):.1f}, {100 * (a - b + half):.1f}]"
    assert said("rm_v1 ") == ("rm_v1 beats longer-wins on the same 100 held-out pairs: accuracy 80.0 [71.1, 86.7] %, longer-wins "
                              f"60.0 [50.2, 69.1] %, paired difference {ends} points, p {p:.3f}.")
    assert learned(None)["rm_v1", OF_REWARD] == ["100", "60.0", "80.0 [71.1, 86.7]", f"+20.0 {ends}", "**yes**"]
    turned = longer.translate(str.maketrans("10", "01"))  # now the shorter answer wins: the same rule to beat
    write_reward(outcomes={"model": model, "longer_wins": turned})
    run(None)
    assert said("rm_v1 beats shorter-wins").split("%, ")[2].startswith(f"paired difference {ends} points")
    write_reward(outcomes={"model": "10" * 50, "longer_wins": "01" * 50})
    run(None)
    assert said("rm_v1 is not distinguishable from")


def test_outcomes_are_written_pair_by_pair():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    found = reward.evaluation(scores, torch.tensor([[9, 3], [9, 3], [3, 9]]), 0.01)
    assert found["outcomes"] == {"model": "10-", "longer_wins": "110"}


def test_a_table_names_its_training_data_in_words_and_hashes(here):
    base, sft, dpo = three_rows()
    sft["data"] = {"train": "sha256:" + "1" * 64, "heldout": "sha256:" + "2" * 64}
    dpo["data"] = {"train": "org/pairs@" + "3" * 40 + ":default/train_prefs"}
    kto = make_row("kto_v1", 5, "kto", "a") | {"data": {"train": "sha256:" + "1" * 64}}
    run_record(sft, args={"data": "local/sft.jsonl.gz", "heldout_data": None})
    run_record(kto, args={"data": "kto.jsonl"}, data_sources={"train": {"hh": 200, "rmb": 1300}})
    run([base, sft, dpo, kto])
    sentence = ("Trained on: sft_v2 on sft.jsonl.gz (`sha256:11111111`); dpo_v1 on `org/pairs@" + "3" * 40
                + ":default/train_prefs`; kto_v1 on rmb 1,300, hh 200 (`sha256:11111111`).")
    assert said("Trained on", "README.md") == said("Trained on") == sentence
    assert "| heldout | `sha256:" + "2" * 64 + "` | beside the training file (`sha256:22222222`) |" in \
        Path("results/runs/sft_v2.md").read_text()


def test_seeds_of_a_family_are_aggregated_each_once(here):
    rows = scored_rows(gsm8k=better)
    seeds = [make_row(f"dpo_s{seed}", 2, "dpo", str(seed), config=f"c{seed}", gsm8k=(seed / 10, 0.01))
             | {"seed": seed, "family": "fd"} for seed in (1, 2, 3)]
    seeds.append(seeds[0] | {"name": "dpo_again", "adapter_sha256": "e" * 64, "timestamp": "2026-01-09"})
    run([row | {"n": dict.fromkeys(N, 60)} for row in (*rows, *seeds)])
    # sd of 10, 20, 30 with n - 1: 10; of seed 1 the first by name counts
    lines = Path("results/README.md").read_text()
    assert "|  | dpo_again (3 seeds), mean ± sd | 50.0 ± 0.0 | 20.0 ± 10.0 |" in lines
    run(three_rows())
    assert "mean ± sd |" not in Path("results/README.md").read_text()


def test_what_a_run_took(here):
    rows = three_rows()
    rows[1] |= {"training": {"tokens": 7, "wall_time_s": 90.0, "heldout_loss": 1.2},
                "cost": {"wall_time_s": 90.0, "device": "H100", "gpus": 2, "peak_gib": 14.25, "tokens": 1_234_567}}
    rows[2] |= {"training": {"wall_time_s": 600.0, "tokens": 12},  # tokens: of an older run, which kept no cost of them
                "cost": {"wall_time_s": 600.0, "device": "x86_64", "gpus": 0, "peak_gib": None, "tokens": None}}
    chat = three_rows(protocol="chat")
    chat[1]["training"], chat[2]["training"] = rows[1]["training"], rows[2]["training"]
    write_json("results/judge/aaaa1111-s42/guardrails.json", {"schema_version": 1, "rows": [
        {"name": "sft_v2", "adapter_sha256": "5" * 64, "train_invariants": "aaaa1111", "eos_rate": 0.875},
        {"name": "sft_v2_bo8", "adapter_sha256": "5" * 64, "best_of": {"n": 8}, "eos_rate": 1.0}]})
    run([*rows, *chat])
    found = table("## What training took")
    assert found["row"][3:] == ["EOS rate,<br>judge's<br>prompts, %", "tokens", "minutes", "GPU<br>minutes", "peak<br>GiB", "device"]
    assert found["sft_v2"] == ["sft", "42", "c0000001", "87.5", "1,234,567", "1.5", "3.0", "14.2", "H100"]
    assert found["dpo_v1"][3:] == ["–", "12", "10.0", "–", "–", "x86_64"]
    assert "base" not in found
    rows[1]["cost"] = rows[2]["cost"] = None
    run(rows)
    assert table("## What training took")["row"][3:] == ["EOS rate,<br>judge's<br>prompts, %", "tokens", "minutes"]


# ------------------------------------------------------------------ judge, guardrails, speed


def judged(a, b, stem=None, **changes):
    """<a>_vs_<b>.json without the answers, as judge.py writes it; changes replace parts of the summary."""
    def identity(row):
        return {key: row[key] for key in ("name", "config_hash", "adapter_sha256", "train_invariants")}

    judge = {"kind": "api", "decides": True, "model": "judge-70b", "circular": False, "circular_why": None, "temperature": 0.0}
    judge |= changes.pop("judge", {})
    prompts, scores = changes.pop("prompts_fingerprint", "sha256:200"), changes.pop("scores", [])
    summary = {"n": 200, "wins": 120, "ties": 20, "losses": 59, "unparsable": 1, "unparsable_verdicts": 5, "win_rate": 0.654,
               "win_rate_ci95": [0.59, 0.72], "tie_rate": 0.1, "position_inconsistency": 0.085,
               "length_controlled_win_rate": 0.601, "length_controlled_ci95": [0.53, 0.67], "mean_tokens_a": 210.4,
               "mean_tokens_b": 160.0} | changes  # fmt: skip
    write_json(f"results/judge/aaaa1111-s42/summaries/{stem or a['name'] + '_vs_' + b['name']}.json", {
        "schema_version": 1, "a": a["name"], "b": b["name"], "rows": {"a": identity(a), "b": identity(b)}, "judge": judge,
        "prompts_fingerprint": prompts, "summary": summary, "scores": scores})  # fmt: skip


def test_judged_win_rates(here):
    base, sft, dpo = rows = three_rows()
    judged(dpo, sft)
    run(rows)
    (line,) = [cells for name, cells in table("## Judged win rates").items() if name == "dpo_v1 against sft_v2"]
    assert line == ["judge-70b (api)", "200", "120 / 20 / 59", "65.4 [59.0, 72.0]", "60.1 [53.0, 67.0]", "–", "8.5", "5",
                    "210 / 160"]  # fmt: skip
    assert "circular," not in Path("results/README.md").read_text()
    sentence = ("**Win rate** against sft_v2, judged by judge-70b in both orders, %: dpo_v1 65.4 [59.0, 72.0] "
                "(length-controlled 60.1 [53.0, 67.0]). Its training prompts are not known.")
    assert said("**Win rate**") == sentence
    assert said("Whether judge-70b beats") == 'Whether judge-70b beats "the longer answer wins" on held-out pairs is not known.'
    circular = {"kind": "reward", "model": "rm_v1", "circular": True, "circular_why": "why"}
    judged(dpo, sft, "dpo_v1_vs_sft_v2.rm_v1", judge=circular)
    run(None)
    assert said("dpo_v1 against sft_v2: ") == "dpo_v1 against sft_v2: circular, why."
    assert said("**Win rate**") == sentence  # which a circular judge is no part of
    assert "asked alike" not in Path("results/README.md").read_text()
    reward = {"kind": "reward", "model": "rm_watch"}  # of which "in both orders" would say nothing
    judged(base, sft, judge=reward, position_inconsistency=None, prompts_fingerprint="sha256:other")
    run(None)
    assert said("**Win rate** against sft_v2, judged by rm_watch, %: base 65.4")
    assert table("## Judged win rates")["base against sft_v2"][6] == "–" and said("Not all were asked alike")
    judged(dpo | {"adapter_sha256": "7" * 64}, sft)  # of other weights than the row's
    run(None)
    assert "dpo_v1@77777777 against sft_v2" in table("## Judged win rates")
    judged(dpo | {"train_invariants": "ffff0000"}, sft)
    run(None)
    assert said("‡ dpo_v1_vs_sft_v2: of other train_invariants (ffff0000) than base (aaaa1111)")
    run(None, "--group", "aaaa1111")
    assert "ffff0000" not in Path("results/README.md").read_text()


CONTROLLED = "length-controlled 60.1 [53.0, 67.0], by judge-70b, whose training prompts are not known"
CHECKED = {"n": 100, "accuracy": 0.8, "interval": [0.7, 0.9], "longer_wins": {"n": 100, "accuracy": 0.6},
           "position_inconsistency": 0.1, "outcomes": {"model": "1" * 80 + "0" * 20, "longer_wins": "1" * 50 + "0" * 50}}


@pytest.mark.parametrize("changes, said", [
    ({}, f"met: wins 65.4 [59.0, 72.0] % of 199 prompts against SFT, {CONTROLLED}"),
    ({"judge": {"independent": True}}, "met: wins 65.4 [59.0, 72.0] % of 199 prompts against SFT, "
     "length-controlled 60.1 [53.0, 67.0], by judge-70b, independent"),
    ({"judge": {"independent": False, "shared_prompts": {"dpo_v1": {"prompts": 85, "share": 0.85}}}},
     "open (the judge is not independent): wins 65.4 [59.0, 72.0] % of 199 prompts against SFT, length-controlled 60.1 "
     "[53.0, 67.0], by judge-70b, not independent: it shares training prompts, 85 % with dpo_v1"),
    ({"judge": {"heldout": None}}, "open (the judge is not shown to beat longer-wins, so it is no evidence by itself): wins "
     f"65.4 [59.0, 72.0] % of 199 prompts against SFT, {CONTROLLED}"),
    ({"judge": {"decides": False}}, "beside it (not the judge that decides): wins 65.4 [59.0, 72.0] % of 199 prompts against "
     f"SFT, {CONTROLLED}"),
    ({"win_rate_ci95": [0.5, 0.72]}, f"not met: wins 65.4 [50.0, 72.0] % of 199 prompts against SFT, {CONTROLLED}"),  # above, not at
    ({"n": 2, "unparsable": 0, "win_rate": 1.0, "win_rate_ci95": [1.0, 1.0]},
     f"open (too few prompts): wins 100.0 [100.0, 100.0] % of 2 prompts against SFT, {CONTROLLED}"),
    ({"judge": {"circular": True}}, "open: not judged against SFT"),
    ({"win_rate_ci95": None}, "open: not judged against SFT"),
    (None, "open: not judged against SFT"),
])  # fmt: skip
def test_the_criterion_of_dpo_is_a_lower_bound_above_one_half(here, changes, said):
    base, sft, dpo = rows = three_rows()
    if changes is not None:
        changes = changes | {"judge": {"heldout": CHECKED} | changes.get("judge", {})}
        judged(dpo, sft, **changes)
    run(rows)
    found = table("## 3. Is it a win?")
    assert found["dpo_v1"][2] == said and found["sft_v2"][2] == "–"
    dpo |= {"adapter_sha256": "7" * 64}  # the judge saw other weights
    run(rows)
    assert table("## 3. Is it a win?")["dpo_v1"][2] == "open: not judged against SFT"


@pytest.mark.parametrize("model, word", [
    ("1" * 80 + "0" * 20, "evidence."), ("-" * 100, "no evidence by themselves."), ("1" * 50 + "-" * 50, "evidence.")])
def test_a_language_model_judge_is_compared_with_length_on_held_out_pairs(here, model, word):
    """Right on 80, the longer on the first 50: 30 : 0, McNemar. Ties of a judge's two orders are half right: all of them
    are the chance of the rule; on the other 50 they are half a point each, where the rule has none."""
    base, sft, dpo = rows = three_rows()
    judged(dpo, sft, judge={"heldout": CHECKED | {"outcomes": CHECKED["outcomes"] | {"model": model}}})
    run(rows)
    assert said("judge-70b ").split("Its win rates are ")[1] == word
    if model[0] == "1" and "-" not in model:
        half = 1.959964 * (((31 + 1) / 102 - (30 / 102) ** 2) / 102) ** 0.5  # Bonett and Price
        ends = f"[{100 * (30 / 102 - half):.1f}, {100 * (30 / 102 + half):.1f}]"
        assert said("judge-70b beats longer-wins on the same 100 held-out pairs: accuracy 80.0 [70.0, 90.0] %").split("%, ")[2] == (
            f"paired difference {ends} points, p < 0.001. Its win rates are evidence.")


def test_win_rates_of_seeds_are_pooled_over_the_prompts_that_all_were_asked(here):
    """Two seeds of DPO, each against its own SFT: prompts crossed with seeds, by the formula of the benchmarks."""
    base, sft, dpo = three_rows()
    rows = [base, *([row | {"seed": seed, "family": row["method"], "adapter_sha256": f"{row['phase']}{seed}" + "0" * 61,
                            "config_hash": f"{row['method']}{seed}"} for seed in (42, 43) for row in (sft, dpo)])]
    for i, seed in enumerate((42, 43)):
        rows[2 + 2 * i]["parent"] = {key: rows[1 + 2 * i][key] for key in ("name", "method", "adapter_sha256", "config_hash")}
    scores = [[1.0, 0.0, 1.0, 1.0, 0.5] * 20, [1.0, 0.5, 1.0, 0.0, 1.0] * 20]
    for i, seed in enumerate((42, 43)):
        listed = [[f"p{k}", score, 3] for k, score in enumerate(scores[i])] + [[f"only in {seed}", 0.0, 0], ["p7x", None, 0]]
        judged(rows[2 + 2 * i], rows[1 + 2 * i], f"dpo_v1_vs_sft_v2.{seed}", scores=listed, judge={"heldout": CHECKED})
    run(rows)
    paired = verdicts.paired_over_seeds(scores_of := np.array(scores), np.ones(100, int))
    ends = ", ".join(f"{100 * end:.1f}" for end in paired.interval)
    half = 196 * (0.14 / 3.92)  # both seeds have one length-controlled rate, and its own interval
    rate = f"{100 * scores_of.mean():.1f} [{ends}]"
    assert table("## 3. Is it a win?")["dpo_v1 (2 seeds)"][2].startswith(
        f"met: wins {rate} % of 100 prompts in 2 seeds against SFT, length-controlled 60.1 [{60.1 - half:.1f}, {60.1 + half:.1f}]")
    assert f"against sft_v2 (2 seeds), judged by judge-70b in both orders, %: dpo_v1 (2 seeds) {rate}" in said(
        "**Win rate**")
    assert {"dpo_v1-s42 against sft_v2-s42", "dpo_v1-s43 against sft_v2-s43"} < table("## Judged win rates").keys()


def answers_of(row, **figures):
    """A row of guardrails.json."""
    healthy = {"n": 200, "tokens_mean": 180.0, "tokens_sd": 60.0, "eos_rate": 0.98, "refusal_rate": 0.02,
               "repetition_rate": 0.01, "kl_sft": 2.0, "kl_sft_se": 0.1}
    return {key: row[key] for key in ("name", "config_hash", "adapter_sha256", "train_invariants")} | healthy | figures


def test_answers_that_collapsed_are_marked_beside_every_verdict_and_win_rate(here):
    base, sft, dpo = rows = three_rows()
    dpo["training"] = {"heldout_accuracy": 0.65, "heldout_pairs": 100}
    judged(dpo, sft, judge={"heldout": CHECKED})
    reference = {"name": "sft_v2", "adapter_sha256": sft["adapter_sha256"]}
    record = {"schema_version": 1, "prompts_fingerprint": "sha256:200", "reference": reference,
              "rows": [answers_of(sft), answers_of(dpo)]}
    write_json("results/judge/aaaa1111-s42/guardrails.json", record)
    run(rows)
    assert "answers collapsed" not in Path("results/README.md").read_text() + Path("README.md").read_text()
    assert table("## 3. Is it a win?")["dpo_v1"][2].startswith("met: ")
    record["rows"][1] = answers_of(dpo, refusal_rate=0.983, tokens_mean=15.5)
    write_json("results/judge/aaaa1111-s42/guardrails.json", record)
    run(rows)
    why = "**answers collapsed**: 98 % refusals, 16 tokens where sft_v2 has 180"
    assert table(report.BEGIN, "README.md")["dpo_v1"][-2].endswith(why)
    assert "dpo_v1 improved; but dpo_v1's answers collapsed: 98 % refusals" in Path("README.md").read_text()
    assert table("## 3. Is it a win?")["dpo_v1"][0].endswith(f"<br>{why}")
    assert table("## 3. Is it a win?")["dpo_v1"][2].startswith("open (its answers collapsed): ")
    assert learned(None)["dpo_v1", "held-out pairs ranked correctly, %"][-1] == "**yes**<br>answers collapsed"
    (cells,) = [cells for name, cells in table("## Judged win rates").items() if name.startswith("dpo_v1 against")]
    assert cells[3] == "(65.4 [59.0, 72.0])" and said("In parentheses, since it is no evidence: dpo_v1's answers")
    assert said("**Win rate**").endswith("dpo_v1 none, its answers collapsed. Its training prompts are not known.")
    assert f"The {why}, on 200 held-out prompts." in Path("results/runs/dpo_v1.md").read_text()
    records = report.read_records(Path("results"), rows, ())
    judged_module.mark_collapsed(rows, records)
    figure = plots.winrate_kl(records["judge"], records["guardrails"])
    assert [text.get_text() for text in figure.axes[0].get_legend().texts] == ["dpo_v1, collapsed"]


@pytest.mark.parametrize("figures, why", [
    ({"refusal_rate": 0.5, "repetition_rate": 0.5, "eos_rate": 0.49, "tokens_mean": 18.0}, ""),  # at the bounds
    ({"refusal_rate": 0.51}, "51 % refusals"), ({"repetition_rate": 0.6}, "60 % stuck in a loop"),
    ({"eos_rate": 0.48}, "48 % of them end where 98 % of sft_v2's do"), ({"tokens_mean": 17.9}, "18 tokens where sft_v2 has 180"),
    ({"refusal_rate": 0.9, "tokens_mean": 3.0}, "90 % refusals, 3 tokens where sft_v2 has 180"),
    (dict.fromkeys(["refusal_rate", "repetition_rate", "eos_rate", "tokens_mean"]), ""),  # not measured
])
def test_what_it_takes_for_answers_to_have_collapsed(figures, why):
    _, sft, dpo = three_rows()
    assert collapsed(answers_of(dpo, **figures), answers_of(sft)) == why


def test_guardrails_and_distance(here):
    base, sft, dpo = rows = three_rows()
    figures = {"n": 200, "tokens_mean": 181.4, "tokens_sd": 66.6, "eos_rate": 0.985, "refusal_rate": 0.02,
               "distinct_1": 0.4321, "distinct_2": 0.7, "distinct_3": 0.85, "longest_repeat_mean": 4.25, "repetition_rate": 0.015,
               "language_drift_rate": 0.005, "kl_sft": 12.345, "kl_sft_se": 0.678, "kl_sft_floor": 0.015, "delta_w": 0.0123}  # fmt: skip
    who = {key: dpo[key] for key in ("name", "config_hash", "adapter_sha256", "train_invariants")}
    best = {"name": "sft_v2_bo16", "adapter_sha256": sft["adapter_sha256"], "kl_sft": 1.83, "kl_sft_bound": True}
    reference = {"name": "sft_v2", "adapter_sha256": sft["adapter_sha256"]}
    write_json("results/judge/aaaa1111-s42/guardrails.json", {"schema_version": 1, "prompts_fingerprint": "sha256:200",
                                                 "reference": reference, "rows": [{**who, **figures}, best]})
    judged(dpo, sft, prompts_fingerprint="sha256:others")
    judged(dpo, base, prompts_fingerprint="sha256:200")
    run(rows)
    assert not Path("results/plots/winrate-kl.svg").exists()  # judged on other prompts, or against another row
    judged(dpo, sft)
    judged(dpo, sft, "dpo_v1_vs_sft_v2.rm_watch", judge={"kind": "reward", "model": "runs/rm_watch"})
    run(rows)
    found = table("## Held-out answers")
    assert found["dpo_v1"] == ["181 ± 67", "200", "98.5", "2.0", "0.432", "0.700", "0.850", "4.2", "1.5", "0.5",
                               "12.35 ± 0.68<br>floor 0.01", "1.23"]  # fmt: skip
    assert found["sft_v2_bo16"] == ["– ± –"] + ["–"] * 9 + ["≤ 1.83", "–"]
    assert said("≤: best of N")
    assert Path("results/plots/winrate-kl.svg").is_file()
    records = report.read_records(Path("results"), rows, ())
    figure = plots.winrate_kl(records["judge"], records["guardrails"])
    assert {text.get_text() for text in figure.axes[0].get_legend().texts} == {"dpo_v1, by judge-70b", "dpo_v1, by rm_watch"}
    assert "KL to sft_v2" in Path("results/README.md").read_text()
    assert "(plots/winrate-kl.svg)" in Path("results/README.md").read_text()
    assert "12.35 ± 0.68" in Path("results/runs/dpo_v1.md").read_text()


def test_another_run_of_a_seed_with_more_protocols_stands_for_it(here):
    """The first run was evaluated in one protocol and its repetition in both: the table's row is the repetition."""
    base, sft, dpo = three_rows()
    again = make_row("dpo_v1", 2, "dpo", "9") | {"parent": dpo["parent"], "timestamp": "2026-01-09"}
    chat = three_rows(protocol="chat")
    again_chat = make_row("dpo_v1", 2, "dpo", "9", protocol="chat") | {"parent": dpo["parent"], "timestamp": "2026-01-09"}
    run([base, sft, again, *chat, again_chat])
    state = list(table("#### Current state"))
    assert [name for name in state if name.startswith("dpo_v1")] == ["dpo_v1"]
    text = Path("results/README.md").read_text()
    assert "dpo_v1@99999999 |" in text and "dpo_v1@dddddddd† |" in text and "dpo_v1@99999999† |" not in text


def test_of_two_runs_of_a_seed_the_one_with_more_protocols_is_the_one_everywhere(here):
    """Whatever came first: § 1, the table, the sentences and the plot name the same run."""
    base, sft, _ = three_rows()
    again = make_row("sft_v2", 1, "sft", "9") | {"timestamp": "2026-01-09"}
    chat = [make_row("base", protocol="chat"), make_row("sft_v2", 1, "sft", "9", protocol="chat")]
    for row in (sft, again, chat[1]):
        row["training"] = {"heldout_loss": 2.0, "heldout_loss_base": 2.2, "heldout_loss_interval": [1.9, 2.1],
                           "heldout_loss_change_interval": [-0.3, -0.1]}
    run([base, sft, again, *chat])
    assert "sft_v2@99999999" in table(report.BEGIN, "README.md") and "55555555" not in Path("README.md").read_text()
    assert {name for name in table("## 1. Did it learn") if name.startswith("sft_v2")} == {"sft_v2@99999999", "sft_v2@55555555†"}


def test_a_policy_of_another_name_stands_in_the_readme_where_the_climb_has_none(here):
    base, sft, dpo = three_rows()
    mine = make_row("mine", 1, "sft", "7")
    run([base, mine])
    shown = table(report.BEGIN, "README.md")
    assert shown["mine"][1].startswith("50.0") and shown["sft_v2"][-2] == "not run"
    run([make_row("theirs", 6, "peft", "8")])  # a plain PEFT adapter, and no base
    assert table(report.BEGIN, "README.md")["theirs"][1].startswith("50.0")
    run([base, sft, mine])  # a control beside the climb's own
    assert "mine" not in table(report.BEGIN, "README.md") and "mine" in table("#### Current state")
    assert "mine" not in Path("README.md").read_text()


def test_a_base_has_one_family_of_tests(here):
    """The same base trained under another quantization has a part of its own, without a verdict; another base has one."""
    rows = scored_rows(ifeval=better)
    for weights, verdicts in (("e", 1), ("7", 2)):
        others = [row | {"train_invariants": "ffff0000", "weights_sha256": weights * 64, "adapter_sha256": adapter,
                         "invariants": row["invariants"] | {"quantization": "qlora"}}
                  for row, adapter in zip(three_rows()[:2], (None, "6" * 64))]
        run([*rows, *(scored(row, ifeval=better) for row in others)])
        text = Path("results/README.md").read_text()
        assert text.count("## 3. Is it a win?") == verdicts and text.count("its tests stand above") == 2 - verdicts


def test_reward_models_of_one_seed_have_labels_of_their_own(here):
    write_reward("rm_v1")
    write_reward("rm_v1-again", name="rm_v1", adapter_sha256="8" * 64)
    run(three_rows())
    names = {path.stem for path in Path("results/runs").glob("rm_*.md")}
    assert len(names) == 2 and "rm_v1@88888888" in names and names <= set(table("## Reward models"))


def test_a_gain_and_a_loss_are_drawn_in_the_protocols_they_are_tested_in(here):
    rows = [scored(row | {"model": "org/base-instruct"}, ifeval=better) for protocol in ("plain", "chat")
            for row in three_rows(protocol=protocol)]
    Path("results/metrics.json").unlink(missing_ok=True)
    run(rows)
    (report_,) = [report.results_of(Path("results"), [climb], 0, ()) for climb in [
        {protocol: [row for row in report.read_rows(Path("results/metrics.json")) if row["protocol"] == protocol]
         for protocol in ("plain", "chat")}]]
    axis = plots.tradeoff(report_.compared, report_.protocols).axes[0]
    assert axis.get_xlabel().startswith("IFEval by prompt (chat)") and "(plain)" in axis.get_ylabel()
    assert plots.tradeoff({key: value for key, value in report_.compared.items() if key[0] == "plain"},
                          report_.protocols) is None


def test_the_readme_has_one_line_on_speed(here):
    run(three_rows())
    assert "**Speed**" not in Path("README.md").read_text()
    cases = [{"workload": workload, "system": system, "tokens_per_s": speed, "peak_gib": 10.6}
             for workload, system, speed in (("dpo", "rungs", 9.0), ("sft-bf16", "trl-default", 10_000.0),
                                             ("sft-bf16", "rungs", 126_823.4), ("sft-bf16", "trl-best", 23_967.0))]
    write_json("results/bench/a-cpu.json", {"device": "x86", "cases": cases[:1]})  # no SFT: says nothing
    write_json("results/bench/h100.json", {"device": "NVIDIA H100 80GB HBM3", "cases": cases})
    exits(1, None, "--check")
    run(None)
    assert said("**Speed**", "README.md") == ("**Speed**: SFT 127,000 tokens/s on one H100, 5 × TRL's best, in 11 GiB; "
                                              "[all methods](results/bench/README.md).")
    others = [{"workload": workload, "system": system, "tokens_per_s": speed, "peak_gib": 1.9} for workload, system, speed in (
        ("sft-bf16", "rungs", 141_574.0), ("sft-bf16", "unsloth", 35_236.0), ("sample", "rungs", 54_191.0), ("sample", "vllm", 20_023.0))]
    write_json("results/bench/h200.json", {"device": "NVIDIA H200", "cases": others})
    run(None)
    assert said("**Speed**", "README.md").endswith(
        "in 11 GiB; SFT 142,000 tokens/s on one H200, 4 × Unsloth's; sampling 54,200 tokens/s on one H200 "
        "(64 rows, no adapter beside the weights), 2.7 × vLLM's; [all methods](results/bench/README.md).")
    assert "**Speed**" not in Path("results/README.md").read_text()


# ------------------------------------------------------------------ plots and pages


def run_record(row, **changes):
    """results/runs/<name>-<adapter>.json, as evaluate.py writes it."""
    record = {"schema_version": 1, "name": row["name"], "method": row["method"], "command": f"{row['method']}.py --seed 7",
              "args": {"lr": 1e-4, "data": None}, "versions": {"torch": "2.0"}, "git_commit": "abc",
              "hardware": {"gpus": 1}, "steps": 3,
              "scorers": {"reward": {"name": "rm_v1", "method": "reward", "config_hash": "c31"}},
              "curves": {"step": [0.0, 1.0, 2.0], "loss": [0.7, 0.6, 0.5], "flat": [1.0] * 3}}  # fmt: skip
    record |= {key: row[key] for key in ("config_hash", "adapter_sha256", "train_invariants")} | changes
    write_json(f"results/runs/{row['name']}-{row['adapter_sha256'][:8]}.json", record)


def test_a_page_a_run(here):
    base, sft, dpo = rows = scored_rows(ifeval=better)
    dpo |= {"parent": {"name": "sft_v2", "method": "sft", "adapter_sha256": "5" * 64, "config_hash": "c1"},
            "data": {"train": "sha256:12"}, "training": {"heldout_loss": 0.25}}  # fmt: skip
    run_record(dpo)
    write_reward(plot=True, command="reward.py --lr 1", args={"lr": 1})
    run(rows)
    text = Path("results/runs/dpo_v1.md").read_text()
    for part in ("# dpo_v1\n", "**Verdict: win** (IFEval prompt +26.7", "Own criterion: open", "python dpo.py --seed 7",
                 "| IFEval prompt | 60.0 ± 6.4 | **+26.7", "| train | `sha256:12` | a local file (`sha256:12`) |", "| sft sft_v2 | `c1` |  |",
                 "| reward rm_v1 | `c31` |  |", "| lr | `0.0001` |", "| data | `null` |", "git commit abc; gpus 1; torch 2.0.",
                 "![Curves of the run](../plots/run-dpo_v1.svg)", "| dpo_v1 | held-out loss | – | 0.693 | 0.250 | −0.443 | – |"):  # fmt: skip
        assert part in text, part
    text = Path("results/runs/sft_v2.md").read_text()  # nothing but the row is known of it
    assert "Not recorded with this run." in text and "## Configuration" not in text and "svg" not in text
    text = Path("results/runs/rm_v1.md").read_text()
    assert "python reward.py --lr 1" in text and "80.0 [71.1, 86.7]" in text and "../rm/rm_v1.png" in text
    links = "Runs: [sft_v2](runs/sft_v2.md), [dpo_v1](runs/dpo_v1.md), [rm_v1](runs/rm_v1.md)"
    assert said("Runs:") == links and not Path("results/runs/base.md").exists()
    for path in ("results/README.md", *map(str, Path("results/runs").glob("*.md")), "README.md"):  # links lead somewhere
        for link in re.findall(r"\]\(([^)]+)\)", Path(path).read_text()):
            assert (Path(path).parent / link).exists(), f"{path}: {link}"


def test_plots_are_written_checked_and_the_same_each_time(here, capsys):
    rows = scored_rows(gsm8k=better)
    write_on_policy(curves={"kl": [0.0, 1.0, 2.0], "scores": [0.0, 1.0, None], "watch_scores": [0.0, 0.5, 0.5]})
    run(rows)
    names = {"deltas-plain", "tradeoff", "ppo"}
    found = {p.name: p.read_bytes() for p in Path("results/plots").iterdir()}
    assert set(found) == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert re.search(r"!\[Differences to base[^]]+\]\(plots/deltas-plain\.svg\)", Path("results/README.md").read_text())
    run(None, "--check")  # draws them again
    Path("results/plots/ppo.svg").write_bytes(found["ppo.svg"].replace(b"</svg>", b" </svg>"))
    Path("results/plots/tradeoff.png").unlink()
    Path("results/plots/deltas-plain.png").write_bytes(b"of another machine")  # a PNG's bytes are not compared
    Path("results/plots/run-old.svg").write_text("of a run that is gone")
    Path("results/runs/old.md").write_text(f"{report.STAMP}python report.py`; edits are lost -->\n\nof a run that is gone")
    others = [Path("results/plots/mine.png"), Path("results/runs/notes.md")]
    for path in others:
        path.write_text("not the report's")
    capsys.readouterr()
    exits(1, None, "--check")
    error = capsys.readouterr().err
    for name in ("plots/ppo.svg", "plots/tradeoff.png", "plots/run-old.svg", "runs/old.md"):
        assert f"results/{name}" in error, name
    assert "deltas-plain.png" not in error and Path("results/plots/run-old.svg").exists()
    assert not any(path.name in error for path in others)
    run(None)
    assert all(path.read_text() == "not the report's" for path in others)
    others[0].unlink()
    assert {p.name: p.read_bytes() for p in Path("results/plots").iterdir()} == found
    assert not Path("results/runs/old.md").exists()


def test_a_runs_curves_are_drawn_again_only_when_they_changed(here, monkeypatch):
    """--check takes an SVG that says what it was drawn from; an edited one, and one of other curves, it does not."""
    rows = scored_rows()
    rows[2] |= {"training": {"heldout_loss": 0.25}}
    run_record(rows[2])
    run(rows)
    svg, record = Path("results/plots/run-dpo_v1.svg"), next(Path("results/runs").glob("dpo_v1-*.json"))
    drawn, draw, calls = svg.read_bytes(), plots.run_curves, []
    monkeypatch.setattr(plots, "run_curves", lambda record: calls.append(record) or draw(record))
    run(None, "--check")
    run(None)
    assert svg.read_bytes() == drawn and not calls
    for edited in (drawn.replace(b"</svg>", b" </svg>"), drawn[:-20], drawn + b"\n", b"", drawn.replace(b"from ", b"from 0")):
        svg.write_bytes(edited)
        exits(1, None, "--check")
        run(None)
        assert svg.read_bytes() == drawn
    assert len(calls) == 10
    changed = json.loads(record.read_text())
    changed["curves"] = {key: [1.5 * x for x in values] for key, values in changed["curves"].items()}
    record.write_text(json.dumps(changed))
    exits(1, None, "--check")
    run(None)
    assert svg.read_bytes() != drawn and len(calls) == 12
    record.write_text(json.dumps(changed | {"curves": {"step": [1, 2], "loss": [1.0, 1.0]}}))  # nothing to draw
    run(None)
    assert not svg.exists()


def test_plots_need_their_data(here):
    write_on_policy(curves={"scores": [1.0]})
    run(three_rows())  # no per-item scores, no KL curve
    assert not Path("results/plots").exists() and ".svg" not in Path("results/README.md").read_text()


def contrast(a, b):
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05) of relative luminances."""
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_the_plots_tones_are_legible_on_light_and_dark(page):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    found = {tone: contrast(tone, page) for tone in (plots.INK, *plots.COLOURS.values())}
    assert {tone: ratio for tone, ratio in found.items() if ratio < 4} == {}


def test_a_sweep_is_a_table_and_a_plot_of_all_its_runs(here, capsys):
    """Winner, losers and what was not admissible, by learning rate; a record that is none is named."""
    for name, value, more in (("dpo+lr_5e-5", 0.61, {"chosen": True}), ("dpo+lr_5e-6", 0.52, {}),
                              ("dpo+lr_2e-4+beta_0.3", 0.7, {"admissible": False, "eos_rate": 0.4})):
        setting = {key: x for key, _, x in (part.partition("_") for part in name.split("+")[1:])}
        write_json(f"results/sweeps/base-{name}.json", {
            "schema_version": 1, "name": name, "method": "dpo", "setting": setting, "objective": "win rate", "value": value,
            "interval": [value - 0.1, value + 0.1], "eos_rate": 0.9, "kl": 1.25, "admissible": True, "chosen": False,
            "model": "org/base", "config_hash": "c" + setting["lr"], "wall_time_s": 90.0, "hardware": {"gpus": 1}} | more)
    run(three_rows())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in
            Path("results/sweeps/README.md").read_text().splitlines() if line.startswith("| base |")][1:]
    assert [row[2] for row in rows] == ["lr 5e-6", "lr 5e-5", "lr 2e-4, beta 0.3"]
    assert rows[1][4:] == ["0.610 [0.510, 0.710]", "90.0", "–", "1.25", "1.5", "**chosen**", "`c5e-5`"]
    assert rows[2][5] == "40.0" and rows[2][9] == "not admissible" and rows[0][9] == ""
    assert Path("results/plots/sweeps.svg").is_file() and "(sweeps/README.md)" in Path("results/README.md").read_text()
    run(None, "--check")
    write_json("results/sweeps/x.json", {"method": "dpo"})
    exits(2, None)
    assert "results/sweeps/x.json lacks setting, value" in capsys.readouterr().err


def test_secondary_tasks_stand_apart_with_their_changes(here):
    """GSM8K in GRPO's prompt, per item: 20 of 60 become 40; a row that was asked otherwise is not compared."""
    rows = [scored(row) for row in three_rows()]
    for row, right in zip(rows, (20, 20, 40)):
        path = Path("results") / row["scores"]
        items = json.loads(gzip.decompress(path.read_bytes()))
        values = [1.0] * right + [0.0] * (60 - right)
        items["secondary"] = {"gsm8k_zero_shot": {"task": ["g"] * 60, "doc_id": list(range(60)), "doc_hash": ["x"] * 60,
                                                  "exact_match,flexible-extract": values}}
        path.write_bytes(gzip.compress(json.dumps(items).encode()))
        row["metrics"] |= {"gsm8k_zero_shot/exact_match,flexible-extract": right / 60,
                           "gsm8k_zero_shot/exact_match_stderr,flexible-extract": 0.06}
        row["secondary"] = {"gsm8k_zero_shot": {"eval_hash": "h1", "n": 60}}
    run(rows)
    found = table("### GSM8K in GRPO's prompt, %")
    assert found["base"] == ["33.3 ± 6.0"] and found["row"] == ["gsm8k_zero_shot<br>exact_match,<br>flexible-extract<br>n = 60"]
    low, high = (100 * end for end in verdicts.paired_interval(20, 0, 60))
    change = f"+33.3 [{low:.1f}, {high:.1f}]"
    assert found["dpo_v1"] == [f"66.7 ± 6.0<br>− parent {change}<br>− base {change}"]
    rows[1]["secondary"]["gsm8k_zero_shot"]["eval_hash"] = "another"
    rows[2]["metrics"] |= {"arc_easy/acc,none": 0.5, "arc_easy/acc_stderr,none": 0.06}
    rows[2]["secondary"]["arc_easy"] = {"eval_hash": "h2", "n": 60}
    run(rows)
    found = table("### GSM8K in GRPO's prompt, %")
    assert found["sft_v2"] == ["–"] and found["dpo_v1"] == [f"66.7 ± 6.0<br>− base {change}"]
    found = table("#### Secondary tasks, %")  # of one protocol's rows
    assert found["row"] == ["arc_easy<br>acc,<br>none<br>n = 60"] and found["dpo_v1"] == ["50.0 ± 6.0"]


def test_grpos_own_question_is_asked_in_the_template_so_the_rows_of_both_protocols_stand_together(here):
    """The base in both, SFT in plain, DPO in chat: one table, each policy once."""
    plain, chat = three_rows(), three_rows(protocol="chat")
    rows = [plain[0], plain[1], chat[0], chat[2]]
    for row, score in zip(rows, (0.2, 0.3, 0.2, 0.4)):
        row["metrics"] |= {"gsm8k_zero_shot/exact_match,flexible-extract": score,
                           "gsm8k_zero_shot/exact_match_stderr,flexible-extract": 0.01}
        row["secondary"] = {"gsm8k_zero_shot": {"eval_hash": "h1", "n": 60}}
    run(rows)
    found = {name: cells[0].split("<br>")[0] for name, cells in table("### GSM8K in GRPO's prompt, %").items()}
    assert {"base": "20.0 ± 1.0", "sft_v2": "30.0 ± 1.0", "dpo_v1": "40.0 ± 1.0"}.items() <= found.items()
    assert Path("results/README.md").read_text().count("GSM8K in GRPO's prompt, %") == 1


# ------------------------------------------------------------------ rows that can't stand together


def changed(path, value, **hashes):
    rows = three_rows()
    target = rows[2]
    for key in path[:-1]:
        target[key] = copy.deepcopy(target[key])
        target = target[key]
    target[path[-1]] = value
    rows[2] |= hashes
    return rows


APART = {
    "lora": (changed(["invariants", "lora_r"], 64, train_invariants="ffff0000"), "invariants.lora_r 16 / 64"),
    "model": (changed(["model"], "org/other", train_invariants="ffff0000"), "model org/base / org/other"),
    "data": (changed(["eval", "data"], "another", eval_hash="ffff0000"), f"eval.data {'d' * 64} / another"),
    "dtype": (changed(["eval", "dtype"], "float32", eval_hash="ffff0000"), "eval.dtype bfloat16 / float32"),
    "limit": (changed(["eval", "tasks"], [["gsm8k", 8, 4]], eval_hash="ffff0000"), "eval.gsm8k.limit None / 4"),
    "shots": (changed(["eval", "tasks"], [["mmlu", 0, 1000]], eval_hash="ffff0000"), "eval.mmlu.num_fewshot 5 / 0"),
    "unexplained": (changed(["family"], "x", train_invariants="ffff0000"), "train_invariants aaaa1111 / ffff0000"),
}


@pytest.mark.parametrize("rows, named", APART.values(), ids=APART)
def test_rows_that_differ_have_a_part_of_their_own_with_the_field_named(here, rows, named):
    run(rows)
    text = Path("results/README.md").read_text()
    assert "Not comparable with the rows above; they differ in (above / here) " in text and named in text
    first, other = text.split("# Results: ")
    assert "| base | 50.0" in first and "| dpo_v1 | not run |" in first and "| dpo_v1 | not run |" not in other
    assert "dpo_v1 − base" not in text  # nothing is compared across the two
    assert table(report.BEGIN, "README.md")["dpo_v1"][-2:] == ["not run", ""]


@pytest.mark.parametrize("place, value, named", [
    (["n", "gsm8k"], 500, "n.gsm8k 1319 / 500"), (["task_versions", "mmlu"], 1, "task_versions.mmlu 2 / 1")])
def test_rows_of_one_evaluation_on_other_items_are_refused(here, capsys, place, value, named):
    exits(2, changed(place, value))
    error = capsys.readouterr().err
    assert "base / dpo_v1: " in error and named in error
    assert "base / sft_v2" not in error  # only those that differ
    assert not Path("results/README.md").exists() and Path("README.md").read_text() == README


def test_long_values_are_named_by_their_hash(here):
    run(changed(["invariants", "chat_template"], "{% for m in messages %}" * 50, train_invariants="ffff0000"))
    assert re.search(r"invariants.chat_template absent / \(sha256 [0-9a-f]{8}\)", Path("results/README.md").read_text())


def test_group_picks_one_side(here, capsys):
    rows = changed(["eval", "data"], "another", eval_hash="ffff0000")
    run(rows, "--group", "bbbb2222")
    state = table("#### Current state")
    assert state["sft_v2"][1] == "50.0 ± 0.3" and state["dpo_v1"][1] == "not run"
    run(rows, "--group", "aaaa1111", "ffff0000")
    state = table("#### Current state")
    assert state["sft_v2"][1] == "not run" and state["dpo_v1"][1] == "50.0 ± 0.3"
    assert "`python report.py --group aaaa1111 ffff0000`" in Path("README.md").read_text()
    capsys.readouterr()
    exits(2, rows, "--group", "deadbeef")
    error = capsys.readouterr().err
    assert "deadbeef" in error and "eval_hash ffff0000: dpo_v1" in error


def test_protocols_are_separate_tables_of_one_training_setup(here):
    plain, chat = three_rows(), three_rows(protocol="chat", mmlu=(0.61, 0.004))
    run([*plain, *chat])
    assert table("### Plain protocol")["base"][1] == "50.0 ± 0.3"
    assert table("### Chat protocol")["base"][1] == "61.0 ± 0.4"
    assert "# Results: " not in Path("results/README.md").read_text()


def test_two_bases_stand_one_after_the_other_and_first_names_the_readmes(here):
    """Two bases, the second with two seeds of SFT and records of both in one directory: each part has its own rows,
    figures and pages, and nothing of the other's."""
    one, two = three_rows(), three_rows(mmlu=(0.31, 0.004))
    two.append(two[1] | {"seed": 43, "adapter_sha256": "6" * 64, "config_hash": "c43"})
    for row in two:
        row |= {"model": "org/other-it", "train_invariants": "ffff0000", "family": f"other-{row['method']}"}
        if row["adapter_sha256"]:
            row["adapter_sha256"] = row["adapter_sha256"][::-1].replace("d", "e")
    write_reward("rm_one", 60)
    write_reward("rm_two", 70, train_invariants="ffff0000")
    run([*one, *two])
    text = Path("results/README.md").read_text()
    first, other = text.split("\n# Results: base\n")  # the second base has more rows
    assert "sft_v2-s42" in first and "sft_v2 (2 seeds), mean ± sd" in first and "31.0 ± 0.4" in first
    assert "rm_two" in first and "rm_one" not in first and "rm_one" in other and "rm_two" not in other and "‡" not in text
    assert "31.0" not in other and "model org/other-it / org/base" in other
    assert "sft_v2 (2 seeds)" in Path("README.md").read_text()
    pages = {p.name for p in Path("results/runs").glob("*.md")}
    assert pages == {"sft_v2-s42.md", "sft_v2-s43.md", "dpo_v1.md", "rm_two.md", "sft_v2-aaaa1111.md", "dpo_v1-aaaa1111.md",
                     "rm_one-aaaa1111.md"}
    assert all(f"(runs/{name})" in text for name in pages)
    run(None, "--check")
    run(None, "--first", "aaaa1111")
    assert "2 seeds" not in Path("README.md").read_text() and "# Results: other-it" in Path("results/README.md").read_text()
    assert {"dpo_v1.md", "sft_v2-s43-ffff0000.md"} < {p.name for p in Path("results/runs").glob("*.md")}
    exits(2, None, "--first", "deadbeef")


def test_a_row_without_its_fields_is_refused(here, capsys):
    rows = three_rows()
    del rows[1]["eval_hash"], rows[1]["n"]
    exits(2, rows)
    assert "row 1: eval_hash is missing" in capsys.readouterr().err


# ------------------------------------------------------------------ the generated files


def test_only_the_section_changes_and_writing_is_deterministic(here):
    run(three_rows())
    text = Path("README.md").read_text()
    assert text.startswith(f"# Title\n\n{report.BEGIN}\n<!-- written by `python report.py`")
    assert text.endswith(f"{report.END}\n\nThe rest.\n")
    assert "\nold\n" not in text
    again = [Path(p).read_text() for p in ("README.md", "results/README.md")]
    run(list(reversed(three_rows())))  # order in the file doesn't matter
    assert [Path(p).read_text() for p in ("README.md", "results/README.md")] == again
    found = sorted(p.relative_to("results").as_posix() for p in Path("results").rglob("*") if p.is_file())
    assert found == ["README.md", "metrics.json", "runs/dpo_v1.md", "runs/sft_v2.md"]  # no temporary file left


@pytest.mark.parametrize("path", ["README.md", "results/README.md"])
def test_check_finds_one_edited_digit(here, capsys, path):
    run(three_rows())
    run(None, "--check")
    text = Path(path).read_text()
    Path(path).write_text(edited := text.replace("50.0 ± 0.3", "50.1 ± 0.3", 1))
    assert edited != text
    capsys.readouterr()
    exits(1, None, "--check")
    error = capsys.readouterr().err
    assert "-| 0 | base | 50.1" in error and "+| 0 | base | 50.0" in error
    assert f"{path}: not what the results say" in error
    assert Path(path).read_text() == edited  # --check writes nothing
    run(None)
    run(None, "--check")


def test_check_finds_a_changed_metric_and_a_missing_file(here):
    rows = three_rows()
    run(rows)
    rows[1]["metrics"]["mmlu/acc,none"] = 0.512
    exits(1, rows, "--check")
    run(None)
    Path("results/README.md").unlink()
    exits(1, None, "--check")
    assert not Path("results/README.md").exists()


def test_text_outside_the_markers_is_not_checked(here):
    run(three_rows())
    Path("README.md").write_text(Path("README.md").read_text().replace("The rest.", "Another rest."))
    run(None, "--check")


@pytest.mark.parametrize("text", ["# none\n", f"{report.BEGIN}\n", f"{report.END}\n{report.BEGIN}\n", README + README])
@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_missing_or_double_markers_are_an_error_and_nothing_is_written(here, capsys, text, flags):
    Path("README.md").write_text(text)
    exits(2, three_rows(), *flags)
    assert report.BEGIN in capsys.readouterr().err
    assert Path("README.md").read_text() == text and not Path("results/README.md").exists()


def test_missing_readme_or_results_directory_is_an_error(here, capsys):
    exits(2, three_rows(), "--readme", "NOT.md")
    assert "NOT.md" in capsys.readouterr().err
    exits(2, None, "--results", "nowhere")
    assert "nowhere" in capsys.readouterr().err
    run(None, "--readme", "none")  # as the demo does
    assert Path("README.md").read_text() == README and "--readme none" in Path("results/README.md").read_text()


def test_terminal_tables_are_whole_when_piped(here, capsys):
    run(three_rows(), "--full")
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if " dpo_v1 − base" in line)
    assert line.split("dpo_v1 − base")[1].count("0.0 ±") == 5  # on one line
    assert "not run" in out and "TruthfulQA" in out and "**" not in out
    write_reward(plot=True)
    write_reward("rm_s7", 70, seed=7)
    run(None, "--full")
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith(" rm_v1 ") and "c0000031" in line)
    assert "80.0 [71.1, 86.7]" in line and "0.57 / 1.25" in line and "…" not in out
    assert "Plots: rm/rm_v1.png\n" in out


def test_as_a_command(here):
    """The script itself, from a shell."""
    run(three_rows())
    Path("README.md").write_text(Path("README.md").read_text().replace("50.0", "60.0", 1))
    command = [sys.executable, Path(report.__file__).resolve(), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 1 and "+| 0 | base | 50.0" in checked.stderr and "Traceback" not in checked.stderr


def test_the_committed_tables_are_what_the_committed_results_say():
    """README.md and results/README.md against what results/ holds, by the command that README's stamp names."""
    root = Path(report.__file__).parent
    stamp = re.search(r"written by `python report\.py ?([^`]*)`", (root / "README.md").read_text(encoding="utf-8"))
    done = subprocess.run([sys.executable, "report.py", *stamp[1].split(), "--check"], cwd=root, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_terminal_shows_what_was_learned_the_verdicts_and_the_paths(here, capsys):
    rows = three_rows()
    rows[2]["training"] = {"heldout_accuracy": 0.65, "heldout_pairs": 100}
    run(rows)
    out = capsys.readouterr().out
    assert "1. Did it learn what it optimises?" in out and "3. Is it a win?" in out and "2. What did it change?" not in out
    assert out.splitlines()[-1].startswith("wrote results/README.md and README.md") and "--full prints every table" in out
    before = Path("results/README.md").read_text()
    run(rows, "--full")
    assert "2. What did it change?" in capsys.readouterr().out and Path("results/README.md").read_text() == before


def test_empty_answers_are_said_where_they_differ():
    """By hand: 40 % and 0 % of IFEval's answers are empty; rows that are alike, or have no items, say nothing."""
    def row(name, characters):
        return {"name": name, "phase": 1, "config_hash": name, "adapter_sha256": name, "weights_sha256": None, "family": name, "method": "sft",
                "seed": 42, "items": characters and {"ifeval": {"characters": characters}, "gsm8k": {"characters": [9, 11]}}}
    base, talker = row("base", [0, 0, 7, 100, 5]), row("talker", [1, 2, 3, 4, 5])
    said = report.empty_note([base, talker, row("old", None)])
    assert "base 40 %, talker 0 %." in said and "old" not in said
    assert report.empty_note([talker, row("other", [3, 3, 3, 3, 3])]) == report.empty_note([row("old", None)]) == ""


def test_a_row_that_was_judged_but_not_evaluated_is_named_by_its_seed():
    """From the record of its run; by its adapter's hash where there is none."""
    _, sft, dpo = three_rows()
    other = {"name": "dpo_v1", "adapter_sha256": "e" * 64}
    records = {"guardrails": [], "runs": [other | {"seed": 44}], "judge": [{"rows": {"a": dict(other), "b": dict(sft)}}]}
    judged_module.mark_seeds(records)
    assert judged_module.judged_label(records["judge"][0]["rows"]["a"], [sft, dpo]) == "dpo_v1-s44"
    assert judged_module.judged_label(other, [sft, dpo]) == "dpo_v1@eeeeeeee"
    assert judged_module.judged_label(dpo, [sft, dpo]) == "dpo_v1"
