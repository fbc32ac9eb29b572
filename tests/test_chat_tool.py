"""tools/chat.py: once as a process whose standard input is a pipe, else in this one."""
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

import chat
import common
import inputs
from conftest import make_model

REPO = Path(__file__).parent.parent


spec = importlib.util.spec_from_file_location("chat_tool", REPO / "tools/chat.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture
def talk(monkeypatch, capsys):
    """A function that says lines to a policy and gives back all that was printed."""
    def talk(said, policy, **args):
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        tool.main(tool.Args(policy, device="cpu", dtype="float32", **args))
        return capsys.readouterr().out
    return talk


def answers(adapter, model, turns, **how):
    """What the plain engine's sampler answers to turns of the user, one conversation."""
    start = inputs.read_start(adapter, model)
    policy = common.load_model(start.model_dir, None, "none", common.torch.float32, "cpu", "plain")
    if adapter:
        policy = common.attach_adapter(policy, adapter)
    sampler, messages, said = common.Sampler(policy, start.tokenizer), [], []
    for turn, text in enumerate(turns):
        messages.append({"role": "user", "content": text})
        done, = sampler.sample([chat.render_prompt(start.tokenizer, messages)], rows=[turn], **how)
        said.append(done.text)
        messages.append({"role": "assistant", "content": done.text})
    return said


def shown(text):
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def test_two_policies_answer_each_turn_with_their_own_history(sft_run, dpo_run):
    """As typed: both give the sampler's answers under the conversation so far."""
    turns = ["why is the sky blue", "and what makes bread rise"]
    done = subprocess.run(
        [sys.executable, str(REPO / "tools/chat.py"), dpo_run, "--versus", sft_run, "--max-new-tokens", "12", "--seed",
         "5", "--temperature", "0.9", "--top-p", "0.95", "--device", "cpu", "--dtype", "float32"],
        input="\n".join(turns) + "\n/new\n" + turns[0] + "\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    how = dict(max_new_tokens=12, temperature=0.9, top_p=0.95, seed=5)
    assert "sampling: temperature 0.9, top_p 0.95, seed 5, at most 12 tokens" in done.stdout
    assert done.stdout.count("stops at '<|im_end|>'") == 2
    for adapter, name in ((sft_run, "sft_v2"), (dpo_run, "dpo_v1")):
        for said in answers(adapter, None, turns, **how):
            assert f"{name}: {shown(said)}" in done.stdout
        assert done.stdout.count(f"{name}: ") == 1 + 3


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_a_base_model(tiny_model, talk, engine):
    printed = talk("how people learn\n/quit\nnever asked\n", tiny_model, temperature=0, max_new_tokens=9, engine=engine)
    said, = answers(None, tiny_model, ["how people learn"], max_new_tokens=9)
    assert f"{Path(tiny_model).name}: {shown(said)}" in printed and "greedy, at most 9 tokens" in printed
    assert f"{engine} engine, float32 on cpu" in printed and "never asked" not in printed


def test_after_new_nothing_is_remembered(tiny_model, talk):
    """The same turn twice, greedy: the same answer after /new, another one without."""
    def said(lines):
        printed = talk(lines, tiny_model, temperature=0, max_new_tokens=9)
        return [part.split("\n> ")[0] for part in printed.split(f"{Path(tiny_model).name}: ")[2:]]
    first, again = said("why\n/new\nwhy\n")
    assert first == again
    first, more = said("why\nwhy\n")
    assert first == again and first != more


def test_columns_hold_both_answers(sft_run, dpo_run):
    """In a terminal the two stand in one table, whatever an answer's characters would do to the screen."""
    args = tool.Args(dpo_run, sft_run, device="cpu", dtype="float32", temperature=0, max_new_tokens=6)
    speakers = [tool.Speaker(run, args, common.torch.float32, common.torch.device("cpu")) for run in (dpo_run, sft_run)]
    console = Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)
    tool.show_columns(console, speakers, "why is the sky blue", 0, args)
    last = console.file.getvalue().split("┏")[-1]
    assert re.search("dpo_v1 .* sft_v2", last)
    for adapter in (sft_run, dpo_run):
        first = shown(answers(adapter, None, ["why is the sky blue"], max_new_tokens=6)[0]).split("\n")[0]
        assert first.strip() in last
    assert tool.printable("a\x1b]0;title\x07b\nc") == "a]0;titleb\nc"


def test_answers_taller_than_the_terminal_end_in_view():
    """While they grow, one screen of their last lines is redrawn: what scrolled away could not be, and would repeat."""
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=8, color_system=None)
    grid = Table("tall")
    grid.add_row("\n".join(f"line {i}" for i in range(30)))
    lines, whole = (["".join(segment.text for segment in line).rstrip() for line in console.render_lines(renderable)]
                    for renderable in (tool.End(grid), grid))
    assert lines == whole[-7:] and "line 29" in lines[-2]
    low = [["".join(segment.text for segment in line).rstrip() for line in console.render_lines(renderable)]
           for renderable in (tool.End(Table("low")), Table("low"))]
    assert low[0] == low[1]


def test_slips_are_answered(tiny_model, talk, capsys, tmp_path):
    """An unknown command is no turn; a second policy that is not there is said before the first one loads."""
    printed = talk("/help\nwhy\n", tiny_model, max_new_tokens=2)
    assert "no such command: /new" in printed and printed.count(f"{Path(tiny_model).name}: ") == 1 + 1
    with pytest.raises(SystemExit) as stop:
        talk("why\n", tiny_model, versus=str(tmp_path / "gone"))
    said = capsys.readouterr()
    assert stop.value.code == 2 and f"{tmp_path / 'gone'}: no such run, adapter or model directory" in said.err
    assert "engine" not in said.out


def test_a_conversation_without_room_is_said(tmp_path, talk):
    model = make_model(tmp_path / "tiny")
    printed = talk(f"{'a book ' * 600}\nwhy\n", model, max_new_tokens=4)
    assert printed.count("the conversation fills the model's positions") == 1
    assert re.search(r"> why\ntiny: ", printed)


def test_a_reward_model_does_not_talk(reward_run, talk, capsys):
    with pytest.raises(SystemExit) as stop:
        talk("why\n", reward_run)
    assert stop.value.code == 2 and "is a reward model, not a policy" in capsys.readouterr().err
