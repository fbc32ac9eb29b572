"""Numbers that break while a run trains: a NaN or an infinity in the logits, the loss, the gradient or a reward stops it at
that step, names the rows, and leaves the last good checkpoint; the same command then ends as if nothing had been."""
import gc
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import common
import turns

REPO = Path(common.__file__).parent
SCRIPTS = ("sft", "dpo", "kto", "reward", "ppo", "grpo")


@pytest.fixture
def setting(request, sft_args, dpo_args, kto_args, reward_args, ppo_args, grpo_args, sft_run):
    """(its module, arguments with a checkpoint after every step) of a script."""
    def of(script):
        args = {"sft": sft_args, "dpo": {**dpo_args, "sft_adapter": sft_run}, "kto": kto_args, "reward": reward_args,
                "ppo": ppo_args, "grpo": grpo_args}[script]
        return importlib.import_module(script), {**args, "checkpoint_every": 1}
    return of


def checkpoint(run):
    """(step, all its numbers) of a checkpoint."""
    with safe_open(Path(run) / "checkpoint" / "state.safetensors", "pt") as f:
        return int(f.metadata()["step"]), torch.cat([f.get_tensor(k).flatten().float() for k in f.keys()])


def steps_done(run):
    file = Path(run) / "log.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def in_gradient(patch, out, value):
    """The gradient's first number, as the second step clips it."""
    clip = torch.nn.utils.clip_grad_norm_

    def clip_broken(params, *rest):
        if steps_done(out) == 1:
            [params][0].grad.view(-1)[0] = value
        return clip(params, *rest)
    patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_broken)


def in_loss(patch, out, value):
    """What the loss is made of, log-probabilities or scores, in the second step's training passes."""
    for name in ("token_logprobs", "logprobs_and_entropy", "reward_scores"):
        def broken(*args, found=getattr(common, name), **options):
            result = found(*args, **options)
            if steps_done(out) == 1 and torch.is_grad_enabled():
                first = result[0] if isinstance(result, tuple) else result
                first = first + value
                return (first, *result[1:]) if isinstance(result, tuple) else first
            return result
        patch.setattr(common, name, broken)


def in_logits(patch, out, value):
    """A weight of the adapter, from the second step on: all logits are broken, those that answers are sampled by too."""
    checkpoint = common.Run.checkpoint

    def break_after(self, step, optimizer):
        checkpoint(self, step, optimizer)
        if step == 1:
            optimizer.param_groups[0]["params"][0].data.fill_(value)
    patch.setattr(common.Run, "checkpoint", break_after)


FAULTS = {"gradient": in_gradient, "loss": in_loss, "logits": in_logits}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_number_that_breaks_stops_the_run_at_its_step(script, fault, setting, tmp_path, monkeypatch):
    program, args = setting(script)
    out = tmp_path / "run"
    value = math.inf if fault == "gradient" else math.nan
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as stop:
        FAULTS[fault](patch, out, value)
        program.main(program.Args(**args, out=str(out)))
    message = str(stop.value)
    assert re.search(r"(nan|inf)\b.* at step 1; rows of the data set in it: \[", message), message
    rows = json.loads(re.search(r"\[.*?\]", message).group())
    assert len(rows) in {args["batch_size"], args["batch_size"] - 1} and all(isinstance(row, int) for row in rows)
    step, numbers = checkpoint(out)
    assert step == 1 and numbers.isfinite().all()
    assert steps_done(out) == 1 and not (out / "run.json").exists() and not (out / "adapter_model.safetensors").exists()


def test_the_same_command_goes_on(setting, sft_run, tmp_path, monkeypatch):
    """Without the fault, to the bits of a run that never had it."""
    program, args = setting("sft")
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError):
        in_gradient(patch, out, math.nan)
        program.main(program.Args(**args, out=str(out)))
    gc.collect()
    program.main(program.Args(**args, out=str(out)))
    assert (out / "adapter_model.safetensors").read_bytes() == (Path(sft_run) / "adapter_model.safetensors").read_bytes()


def test_a_reward_model_that_gives_nan(setting, tmp_path, monkeypatch):
    program, args = setting("ppo")
    out, score_examples = tmp_path / "run", common.score_examples

    def broken(*rest):
        scores = score_examples(*rest)
        return scores * math.nan if steps_done(out) == 1 else scores
    monkeypatch.setattr(common, "score_examples", broken)
    with pytest.raises(FloatingPointError, match=r"'scores': nan.* at step 1; rows of the data set in it: \[\d"):
        program.main(program.Args(**args, out=str(out)))
    step, numbers = checkpoint(out)
    assert step == 1 and numbers.isfinite().all()


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "{'correct': float('nan')}"])
def test_a_reward_function_that_gives_nan(value, setting, tmp_path, capsys):
    """The row and the answer are named; nothing is trained on it."""
    program, args = setting("grpo")
    task = tmp_path / "task.py"
    task.write_text(f'def rows():\n    return [{{"prompt": f"{{i}} why", "i": i}} for i in range(60)]\n\n\n'
                    f'def reward(row, completion):\n    return {value}\n')
    with pytest.raises(SystemExit) as stop:
        program.main(program.Args(**{**args, "task": str(task), "out": str(tmp_path / "run")}))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "row " in error and re.search("nan|inf", error), error


# -- collapse -------------------------------------------------------------------------------------

def watched(updates, capsys):
    """What Run.watch says of updates (tokens, ended[, varies]), the run being stopped and resumed after each."""
    state, said = {}, []
    for update in updates:
        run = common.Run.__new__(common.Run)
        run.state = json.loads(json.dumps(state))
        run.watch(*update)
        state = run.state
        said.append(capsys.readouterr().out.strip())
    return said


def test_answers_that_shrink_are_warned_of_once(capsys):
    said = watched([(50, 1.0), (6, 1.0), (5, 1.0), (4.9, 1.0), (2, 1.0)], capsys)
    assert [bool(s) for s in said] == [False, False, False, True, False]
    assert "4.9 tokens" in said[3] and "50.0" in said[3] and "--beta" in said[3]


def test_answers_that_no_longer_end_are_warned_of_once(capsys):
    said = watched([(50, 0.8), (60, 0.4), (60, 0.39), (60, 0.1)], capsys)
    assert [bool(s) for s in said] == [False, False, True, False] and "39%" in said[2] and "80%" in said[2]
    assert watched([(50, 0.0), (50, 0.0)], capsys) == ["", ""]


def test_groups_that_no_longer_differ_are_warned_of_after_ten_updates(capsys):
    flat, varied = (9, 1.0, False), (9, 1.0, True)
    said = watched([flat] * 9 + [varied] + [flat] * 12, capsys)
    assert [i for i, s in enumerate(said) if s] == [19] and "--group-size" in said[19]


def test_a_policy_that_unlearns_to_stop(tiny_model, capsys, monkeypatch):
    """Against its parent's eos_rate; without one, only the rate itself is warned of."""
    import chat
    model, tokenizer = common.load_model(tiny_model, dtype=torch.float32), chat.load_tokenizer(tiny_model)
    model.get_output_embeddings().weight.data.mul_(0)  # every greedy answer is token 0, which ends nothing
    prompts = [chat.render_prompt(tokenizer, [{"role": "user", "content": "why"}])]
    for parent, warned in ((None, False), ({"metrics": {}}, False), ({"metrics": {"eos_rate": 1.0}}, True)):
        assert common.eos_rate(model, tokenizer, prompts, 4, parent) == 0
        assert ("less than half of the parent's 100%" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("script", ["ppo", "grpo"])
def test_scripts_watch_every_update(script, setting, tmp_path, monkeypatch):
    """With the numbers that the log has."""
    program, args = setting(script)
    watch, seen = common.Run.watch, []

    def note(self, *numbers):
        seen.append(numbers)
        watch(self, *numbers)
    monkeypatch.setattr(common.Run, "watch", note)
    program.main(program.Args(**args, out=str(tmp_path / "run")))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    ends = [1 - line["missing_eos" if script == "ppo" else "overlong"] for line in lines]
    assert [s[0] for s in seen] == pytest.approx([line["completion_tokens"] for line in lines])
    assert [s[1] for s in seen] == pytest.approx(ends)
    if script == "grpo":
        assert [s[2] for s in seen] == [line["zero_variance"] < 1 for line in lines]


# -- memory ---------------------------------------------------------------------------------------

NO_MEMORY = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import torch, tyro
import common, sft
token_logprobs, times = common.token_logprobs, int(os.environ["TIMES"])

def without_memory(model, batch, *rest, **options):
    found = token_logprobs(model, batch, *rest, **options)
    steps = os.path.isfile("run/log.jsonl") and len(open("run/log.jsonl").readlines())
    if torch.is_grad_enabled() and steps >= 3 and batch.rows[0] and ("RUNGS_RETRIED" in os.environ) < times:
        found[0].sum().backward()  # a gradient that must not stay
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return found

common.token_logprobs = without_memory
sft.main(tyro.cli(sft.Args))
"""


@pytest.mark.parametrize("times, tokens, fewer", [(1, 512, 256), (2, 512, 256), (1, 200, 128), (1, 128, None)])
def test_memory_that_ends_is_tried_again_in_halves(times, tokens, fewer, sft_args, sft_run, tmp_path):
    """Once, in a new process from the last checkpoint, to the same training; then the error names the flag. Never with
    fewer tokens than --max-length, 128."""
    (tmp_path / "driver.py").write_text(NO_MEMORY)
    flags = [word for k, v in {**sft_args, "micro_tokens": tokens}.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    done = subprocess.run([sys.executable, "driver.py", str(REPO), *flags, "--out", "run"], cwd=tmp_path, text=True,
                          env=os.environ | {"TIMES": str(times)}, capture_output=True, timeout=200)
    retried = f"note: out of memory with --micro-tokens {tokens}: once more with {fewer}, from the last checkpoint"
    assert (retried in done.stderr) == bool(fewer) == bool(re.search("resuming run at step [24] of 5", done.stdout))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (Path(sft_run) / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in whole[:len(lines)]], abs=1e-5)
    if times == 1 and fewer:
        assert done.returncode == 0 and len(lines) == 5, done.stderr
        assert json.loads((tmp_path / "run" / "run.json").read_text())["args"]["micro_tokens"] == fewer
    else:
        last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]  # after the progress bar
        assert done.returncode == 1 and last.startswith("error: give a smaller --micro-tokens: CUDA out of memory."), last
        assert (tmp_path / "run" / "checkpoint" / "state.safetensors").is_file()


GETS_READY_THEN_WORKS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import common
common.import_library("peft")  # its seconds, here, not between the two
def log(what):
    with open("log", "a") as f:
        f.write(what + "\\n")
common.setup_device("cpu")
log("ready")
while open("log").read().count("ready") < int(sys.argv[2]):  # all are ready before one may work
    time.sleep(0.01)
(gpu,) = common.take_turn()
common.take_turn()  # it has it: the second call returns at once
log(f"begin {gpu}")
time.sleep(0.5)
log(f"end {gpu}")
"""


@pytest.mark.parametrize("gpus, shared, together", [(1, (0, 0), 1), (2, (0, 0), 2), (2, (0, 0, 0), 2), (1, (2, 2), 2),
                                                    (1, (2, 2, 2), 2), (1, (2, 0), 1), (2, (2, 0), 2)])
def test_a_command_works_on_the_first_gpu_that_is_free(gpus, shared, together, tmp_path):
    """turns.py: of commands that are ready as many work at a time as there are GPUs; of evaluations (`shared`: how many there may
    be on one) as many as may; never an evaluation beside a training."""
    commands = [subprocess.Popen([sys.executable, "-c", GETS_READY_THEN_WORKS, str(REPO), str(len(shared))], cwd=tmp_path,
                                 env=os.environ | {"TMPDIR": str(tmp_path), "RUNGS_GPUS": str(gpus)} |
                                 ({"RUNGS_GPU_SHARED": str(most)} if most else {})) for most in shared]
    assert [command.wait(timeout=120) for command in commands] == [0] * len(shared)
    at_work, most = [], 0
    for what, *gpu in (line.split() for line in (tmp_path / "log").read_text().splitlines()):
        if what == "begin":
            at_work += gpu
        elif what == "end":
            at_work.remove(*gpu)
        most = max(most, len(at_work))
        assert max(map(at_work.count, at_work), default=0) <= max(1, min(shared))
    assert most == together and not at_work


TAKES_GPUS = """
import sys
sys.path.insert(0, sys.argv[1])
import common
common.import_library("peft")  # bitsandbytes looks for a GPU
common.torch.cuda.is_available = lambda: True  # there are none here
common.torch.cuda.device_count = lambda: 3
common.use_gpu = lambda device: open(f"rank{common.rank()}", "a").write(device)
open(f"ready{common.rank()}", "a").close()
common.setup_device("cpu")
common.leave_ranks()
"""


def test_ranks_take_a_gpu_each_or_none(tmp_path, monkeypatch):
    """Two ranks wait while of three GPUs two are taken, and take neither; once one is given back, they have a GPU each."""
    for name, value in (("TMPDIR", str(tmp_path)), ("RUNGS_GPUS", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = turns.take(1), turns.take(1)
    assert [*first, *second] == [0, 1]
    (tmp_path / "takes.py").write_text(TAKES_GPUS)
    ranks = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "takes.py",
                              str(REPO)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while len([*tmp_path.glob("ready*")]) < 2:
        assert ranks.poll() is None, ranks.stderr.read()
        time.sleep(0.1)
    time.sleep(3)
    assert ranks.poll() is None and [*tmp_path.glob("rank*")] == []
    assert any([*turns.take(1)] == [2] or time.sleep(0.01) for _ in range(100))  # they look, and don't keep it
    del first[0][:]  # its lock is closed
    assert ranks.wait(timeout=60) == 0, ranks.stderr.read()
    assert {(tmp_path / f"rank{i}").read_text() for i in range(2)} == {"cuda:0", "cuda:2"}


def test_gpus_that_a_user_names(tmp_path, monkeypatch):
    """CUDA_VISIBLE_DEVICES says which GPUs are meant, so that commands that see different ones don't wait for one another."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("RUNGS_GPUS", "2")
    held = []
    for visible, expected in (("5,7,9", [0, 1]), ("7,3", [1]), ("", [0, 1])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = [gpu for gpu in (turns.take(1), turns.take(1)) if gpu]
        assert [i for gpu in found for i in gpu] == expected
        held += found


def test_an_evaluation_waits_for_a_training_that_gets_ready(tmp_path, monkeypatch):
    """Also while a GPU is free: others wait for what a training makes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("RUNGS_GPUS", "2")
    training = turns.announce.__wrapped__()
    monkeypatch.setenv("RUNGS_GPU_SHARED", "2")
    assert turns.announce.__wrapped__() == [] and turns.take(1) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,1")  # of which the training sees the second
    assert [*turns.take(1)] == [0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for announced in training:
        announced.close()
    first, second, third = (turns.take(1) for _ in range(3))
    assert [*first, *second, *third] == [0, 1, 0]  # side by side only where each has one already


def test_more_ranks_than_gpus(tmp_path, monkeypatch, capsys):
    """An error: they would wait forever. So is a GPU that is named where make gives one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("RUNGS_GPUS", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        common.take_turn.__wrapped__()
    assert "3 ranks, but 2 GPUs" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit):
        common.setup_device("cuda:1")
    assert "--device cuda:1, but make gives each command its GPU" in capsys.readouterr().err
    assert str(common.setup_device("auto")) == "cuda"  # the current one
    for announced in turns.announce():
        announced.close()
    turns.announce.cache_clear()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit):
        common.take_turn.__wrapped__()
    assert "GPUS=2, but torch sees 1" in capsys.readouterr().err




def test_ctrl_c_outside_the_loop_is_one_line():
    """No traceback; the process ends by the signal, as a shell expects, and with RUNGS_DEBUG the traceback is there."""
    for debug in ("", "1"):
        done = subprocess.run([sys.executable, "-c", "import common, os, signal; os.kill(os.getpid(), signal.SIGINT)"], cwd=REPO,
                              env=os.environ | {"RUNGS_DEBUG": debug}, capture_output=True, text=True)
        assert done.returncode == -signal.SIGINT and ("Traceback" in done.stderr) == bool(debug), done.stderr
        assert debug or done.stderr == "\nstopped; what is finished is kept, and the same command goes on from there\n"
