"""Where defaults come from, the sweep's rule, the speedrun's record, and a run that is run again from its run.json."""
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

import common
from test_next import next_of
from tools import reproduce, speedrun, sweep

REPO = Path(common.__file__).parent


@pytest.mark.parametrize("script", ["sft", "dpo", "ppo", "grpo", "kto"])
def test_a_default_names_the_record_of_a_run_with_it(script):
    """The record that a docstring names is committed, and its rate and β are the script's defaults."""
    (named,) = re.findall(r"results/sweeps/\S+?\.json", (REPO / f"{script}.py").read_text())
    record, defaults = common.read_json(REPO / named), importlib.import_module(script).Args()
    assert record["method"] == script and record["lr"] == defaults.lr
    assert script in ("sft", "grpo") or record["beta"] == defaults.beta


def test_every_record_names_its_setting_in_full():
    """A record's name is its method and its setting, and the setting is what was run: no default that may change later."""
    records = [common.read_json(path) for path in (REPO / "results" / "sweeps").glob("*.json")]
    assert len(records) >= 18
    for record in records:
        assert record["name"] == "+".join([record["method"], *(f"{k}_{v}" for k, v in record["setting"].items())])
        assert float(record["setting"]["lr"]) == record["lr"]
        assert record["method"] not in ("dpo", "ppo") or float(record["setting"]["beta"]) == record["beta"]


def fake_run(runs, name, args=None, **metrics):
    method = name.partition("+")[0]
    common.write_json(runs / name / "run.json", {
        "name": name, "args": {"lr": 1e-4, **(args or {})}, "metrics": metrics, "model": "models/Base", "seed": 41,
        "config_hash": "c", "train_invariants": "t", "data": {}, "wall_time_s": 1.0, "method": method})


def test_the_sweep_chooses_by_its_rule(tmp_path, monkeypatch, capsys):
    """SFT by the lowest loss; PPO by the largest score change among those that move at most 10 nats, still end and don't refuse; GRPO
    by pass@1; DPO by the length-controlled win rate, unless answers end less often."""
    monkeypatch.chdir(tmp_path)
    runs, judge = tmp_path / "sweep", tmp_path / "sweep" / "results" / "judge" / "aaaa-s41"
    for rate, loss in (("1e-4", 2.0), ("2e-4", 1.9)):
        fake_run(runs, f"sft+lr_{rate}", heldout_loss=loss, heldout_loss_interval=[loss - 0.1, loss + 0.1])
    for beta, change, kl, missing in (("0.1", 0.5, 5.0, 0.1), ("0.2", 0.9, 10.5, 0.1), ("0.3", 0.8, 5.0, 0.17), ("0.4", 0.6, 9.9, 0.14), ("0.5", 1.0, 1.0, 0.1)):
        fake_run(runs, f"ppo+lr_1e-4+beta_{beta}", {"beta": float(beta)}, kl_reference=kl, missing_eos_before=0.1,
                 missing_eos_after=missing, completion_tokens_before=100.0, completion_tokens_after=90.0, scores_change_interval=[change - 0.1, change + 0.1])
        refused = 1 if beta == "0.5" else 0  # of two prompts
        (runs / f"ppo+lr_1e-4+beta_{beta}" / "completions.jsonl").write_text("".join(json.dumps({
            "before": {"text": "It is blue."}, "after": {"text": "I'm sorry, but I can't assist." if i < refused else "Blue."}})
            + "\n" for i in range(2)))
    for rate, solved in (("1e-4", 0.3), ("2e-4", 0.4)):
        fake_run(runs, f"grpo+lr_{rate}", pass_1_before=0.1, pass_1_after=solved, heldout_problems=50, kl_reference=40.0,
                 pass_1_change_interval=[0.1, 0.3], completion_tokens_after=100.0)
    ends = {"sft_v2": 0.95, "dpo+lr_1e-4": 0.91, "dpo+lr_2e-4": 0.89}
    common.write_json(judge / "guardrails.json", {"rows": [{"name": n, "eos_rate": rate} for n, rate in ends.items()]})
    for name, rate in (("dpo+lr_1e-4", 0.6), ("dpo+lr_2e-4", 0.7)):
        fake_run(runs, name, kl_reference=1.0, heldout_accuracy=0.6)
        common.write_json(judge / "summaries" / f"{name}_vs_sft_v2.json", {"summary": {
            "length_controlled_win_rate": rate, "length_controlled_ci95": [rate - 0.1, rate + 0.1], "win_rate": rate, "n": 9}})
    monkeypatch.setenv("MAKELEVEL", "1")  # the last command of make sweep
    sweep.main(sweep.Args(str(runs), "records"))
    words = next_of(capsys.readouterr().out)
    assert words[:4] == ["python", "evaluate.py", "--adapter", "none"]
    assert {Path(word) for word in words[4:]} == {
        runs / name for name in ("sft+lr_2e-4", "ppo+lr_1e-4+beta_0.4", "grpo+lr_2e-4", "dpo+lr_1e-4")}
    records = {r["name"]: r for r in map(common.read_json, Path("records").glob("base-*.json"))}
    assert {name for name, r in records.items() if r["chosen"]} == {
        "sft+lr_2e-4", "ppo+lr_1e-4+beta_0.4", "grpo+lr_2e-4", "dpo+lr_1e-4"}
    assert {name for name, r in records.items() if not r["admissible"]} == {
        "ppo+lr_1e-4+beta_0.2", "ppo+lr_1e-4+beta_0.3", "ppo+lr_1e-4+beta_0.5", "dpo+lr_2e-4"}
    assert records["ppo+lr_1e-4+beta_0.5"]["refusal_rate"] == 0.5
    low, high = records["grpo+lr_2e-4"]["interval"]  # Wilson's of 20 of 50
    assert (low, high) == (pytest.approx(0.2761, abs=1e-4), pytest.approx(0.5382, abs=1e-4))
    assert "PPO_FLAGS = --lr 1e-4 --beta 0.4\n" in (runs / "chosen.mk").read_text()


def test_the_speedrun_is_recorded_from_a_runs_own_log(tmp_path, capsys):
    """Every held-out measurement with its time, the last one from run.json; a run that was not run now is refused."""
    run, out = tmp_path / "speedrun", tmp_path / "speedrun.jsonl"
    common.write_json(run / "run.json", {
        "command": "grpo.py", "model": "m", "config_hash": "c", "seed": 42, "hardware": {}, "wall_time_s": 90.0,
        "args": {"updates": 20}, "metrics": {
            "heldout_problems": 40, "pass_1_change_interval": [0.1, 0.2], "flexible_1_change_interval": [0.05, 0.15],
            "flexible_1_before": 0.25, "flexible_1_after": 0.375, "pass_1_after": 0.35}})
    lines = [{"step": 0, "seconds": 5.0, "heldout_pass_1": 0.0, "heldout_flexible_1": 0.25}, {"step": 1, "seconds": 9.0},
             {"step": 10, "seconds": 50.0, "heldout_pass_1": 0.2, "heldout_flexible_1": 0.3}]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    speedrun.main(speedrun.Args(str(run), 100.0, str(out)))
    assert next_of(capsys.readouterr().out) == ["python", "report.py", "--results", str(tmp_path)]
    head, *points = map(json.loads, out.read_text().splitlines())
    assert (head["command_seconds"], head["run_seconds"]) == (100.0, 90.0)
    assert [tuple(point.values()) for point in points] == [(0, 5.0, 0.0, 0.25), (10, 50.0, 0.2, 0.3), (20, 90.0, 0.35, 0.375)]
    with pytest.raises(SystemExit):
        speedrun.main(speedrun.Args(str(run), 30.0, str(out)))
    assert "30 s and the run alone 90 s" in capsys.readouterr().err


# -- run again ------------------------------------------------------------------------------------

@pytest.fixture
def again(dpo_run, tmp_path):
    """(directory of a copied DPO run, function that reproduces it and gives its exit code, or None)."""
    shutil.copytree(dpo_run, tmp_path / "dpo_v1")

    def run():
        try:
            reproduce.main(reproduce.Args(str(tmp_path / "dpo_v1"), str(tmp_path / "again"), str(tmp_path / "records")))
        except SystemExit as stop:
            return stop.code
    return tmp_path / "dpo_v1", run


def edit(directory, **fields):
    common.write_json(directory / "run.json", common.read_json(directory / "run.json") | fields)


def test_a_run_is_reproduced_from_its_record_bit_by_bit(again, capsys):
    """In a process of its own: the same config_hash, the same adapter, all metrics equal. Of another adapter, or another
    config_hash, the exit code is 1; on another machine other bits are stated, and no error."""
    directory, run = again
    old = common.read_json(directory / "run.json")
    assert run() is None
    (path,) = (directory.parent / "records").iterdir()
    record = common.read_json(path)
    assert path.name == f"dpo_v1-{old['adapter_sha256'][:8]}.json" and record["same_adapter"]
    assert record["metrics"]["heldout_loss"]["then"] == old["metrics"]["heldout_loss"]
    assert len(record["metrics"]) > 10 and all(line["difference"] == 0 for line in record["metrics"].values())
    adapters = [(d / "adapter_model.safetensors").read_bytes() for d in (directory, directory.parent / "again" / "dpo_v1")]
    assert adapters[0] == adapters[1]

    edit(directory, adapter_sha256="f" * 64)
    assert run() == 1 and "other bits on the same processor" in capsys.readouterr().err
    edit(directory, hardware={"device": "NVIDIA H200", "gpus": 1, "cpu_threads": 64},
         metrics=old["metrics"] | {"heldout_loss": 0.3, "heldout_loss_interval": [0.2, 0.4]})
    assert run() is None
    assert "adapter: other bits" in (said := capsys.readouterr().out)
    assert re.search(r"heldout_loss +0\.3 -> \S+ +\(\+\S+, OUTSIDE its interval\)", said)
    edit(directory, config_hash="00000000", args=old["args"] | {"beta": 0.7})
    assert run() == 1 and f"--beta 0.7 -> {old['args']['beta']}" in capsys.readouterr().err


def test_a_rerun_with_other_data_ends_before_it_trains(again, capfd):
    directory, run = again
    old = common.read_json(directory / "run.json")
    other = directory.parent / "preference.jsonl"
    other.write_text("".join(Path(old["args"]["data"]).read_text().splitlines(keepends=True)[::-1]))
    edit(directory, args=old["args"] | {"data": str(other), "heldout_data": old["args"]["data"].replace(".jsonl", "_heldout.jsonl"),
                                        "epochs": 500})
    assert run() == 1
    assert "config_hash" in capfd.readouterr().err
    assert not (directory.parent / "again" / "dpo_v1" / "run.json").exists()


def test_another_watch_model_is_a_note_and_another_reward_model_an_error(dpo_run, capsys):
    """The watch model takes no part in PPO's training."""
    config = common.read_json(Path(dpo_run) / "run.json")["config_hash"]
    other = {"name": "rm", "method": "reward", "config_hash": config, "adapter_sha256": "0" * 64}
    reproduce.check_inputs({"args": {"watch_adapter": str(dpo_run)}, "scorers": {"watch": other}}, Path("ppo_v1"))
    assert "takes no part in the training" in capsys.readouterr().out
    for flag, name, link in (("reward_adapter", "reward", other), ("watch_adapter", "watch", other | {"config_hash": "c"})):
        with pytest.raises(SystemExit):
            reproduce.check_inputs({"args": {flag: str(dpo_run)}, "scorers": {name: link}}, Path("ppo_v1"))


def test_inputs_that_are_gone_or_changed_are_named(again, capsys):
    """The parent, another policy in its place, an argument that the script no longer has, and no run at all."""
    directory, run = again
    old = common.read_json(directory / "run.json")
    edit(directory, args=old["args"] | {"sft_adapter": "gone/sft_v2"})
    assert run() == 2 and "needs gone/sft_v2 (sft_v2, config" in capsys.readouterr().err
    edit(directory, args=old["args"], parent=old["parent"] | {"adapter_sha256": "0" * 64})
    assert run() == 2 and "is not the adapter that" in capsys.readouterr().err
    edit(directory, parent=old["parent"], args=old["args"] | {"old_flag": 1})
    assert run() == 2 and "dpo.py has no --old-flag any more" in capsys.readouterr().err
    (directory / "run.json").unlink()
    assert run() == 2 and "no such run" in capsys.readouterr().err
    assert not (directory.parent / "again").exists()
