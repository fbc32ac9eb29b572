"""Every command ends with the next one to type, with the paths that it was given."""
import shlex

import pytest

import common
import dpo
import grpo
import kto
import ppo
import reward
import sft
from test_evaluate import args as eval_args
from test_evaluate import main as evaluate_main
from test_evaluate import no_nltk_data, place  # noqa: F401, fixtures
from test_repo import parses
from tools import merge


def next_of(printed):
    """The words of the command in the last line."""
    last = printed.strip().splitlines()[-1]
    assert last.startswith("next: python ")
    words = shlex.split(last.removeprefix("next: "))
    assert parses(words)
    return words


@pytest.fixture(autouse=True)
def typed_by_hand(monkeypatch):
    monkeypatch.delenv("MAKELEVEL", raising=False)


@pytest.mark.parametrize("script, flags, words", [
    (sft, {"out": "runs/my sft"}, ["dpo.py", "--sft-adapter", "runs/my sft"]),
    (dpo, {}, ["evaluate.py", "--adapter", "runs/dpo_v1"]),
    (kto, {"eval_data": "data/demo/eval"}, ["evaluate.py", "--adapter", "runs/kto_v1", "--eval-data", "data/demo/eval"]),
    (grpo, {"results": "out"}, ["evaluate.py", "--adapter", "runs/grpo_v1", "--out", "out"]),
    (ppo, {"out": "r/p"}, ["evaluate.py", "--adapter", "r/p"]),
    (reward, {"model": "m/base", "out": "nowhere/rm"},
     ["ppo.py", "--sft-adapter", "none", "--model", "m/base", "--reward-adapter", "nowhere/rm"])],
    ids=lambda x: getattr(x, "__name__", ""))
def test_what_follows_a_method(script, flags, words, capsys):
    method = script.__name__
    common.say_next(*common.next_command(method, script.Args(**flags)))
    assert next_of(capsys.readouterr().out)[1:] == words


def test_runs_merge_and_evaluation_say_it(sft_args, sft_run, dpo_run, place, tmp_path, capsys, monkeypatch):  # noqa: F811
    with pytest.raises(SystemExit):
        sft.main(sft.Args(**sft_args, out=sft_run))  # finished
    assert next_of(capsys.readouterr().out) == ["python", "dpo.py", "--sft-adapter", sft_run]
    merge.main(merge.Args(dpo_run, str(tmp_path / "merged")))
    assert next_of(capsys.readouterr().out) == ["python", "tools/chat.py", str(tmp_path / "merged")]
    out = tmp_path / "results"
    evaluate_main(eval_args(place, out))
    assert next_of(capsys.readouterr().out) == ["python", "report.py", "--results", str(out)]
    monkeypatch.setenv("MAKELEVEL", "1")
    with pytest.raises(SystemExit):
        sft.main(sft.Args(**sft_args, out=sft_run))
    assert "next:" not in capsys.readouterr().out


def test_a_reward_model_beside_an_sft_run(tmp_path):
    (tmp_path / "sft_v2").mkdir()
    assert common.next_command("reward", reward.Args(out=str(tmp_path / "rm_v1")))[2:4] == [
        "--sft-adapter", str(tmp_path / "sft_v2")]


def test_a_watch_model_follows_or_awaits_the_one_it_watches(tmp_path):
    watch = reward.Args(part="J", out=str(tmp_path / "rm_watch"), model="m/base")
    words = common.next_command("reward", watch)
    assert words[1:] == ["reward.py", "--part", "A", "--model", "m/base", "--out", str(tmp_path / "rm_v1")]
    assert parses(words)
    (tmp_path / "rm_v1").mkdir()
    words = common.next_command("reward", watch)
    assert words[-4:] == ["--reward-adapter", str(tmp_path / "rm_v1"), "--watch-adapter", str(tmp_path / "rm_watch")]
    assert words[1] == "ppo.py" and parses(words)
