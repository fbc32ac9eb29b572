"""Stopping and going on: by signal, by kill, by a crash while writing; and what a run directory accepts."""
import errno
import fcntl
import gc
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import common
import dpo
import sft

REPO = Path(common.__file__).parent
VOLATILE = ("seconds", "tokens_per_s")


def adapter(run):
    return (Path(run) / "adapter_model.safetensors").read_bytes()


def record(run):
    return json.loads((Path(run) / "run.json").read_text())


def log(run):
    """The log without times."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines]


def checkpoint_step(run):
    """Step of a checkpoint, all of whose tensors are read and finite."""
    with safe_open(Path(run) / "checkpoint" / "state.safetensors", "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
        step = int(f.metadata()["step"])
    trained = [k for k in tensors if k.startswith("parameter/")]
    assert len(trained) == 1 and tensors["parameter/0"].dim() == 1 and all(t.float().isfinite().all() for t in tensors.values())
    assert all(tensors[k.replace("parameter/", "step/")] == step for k in trained)
    return step


def tree(directory):
    """Every file with its content; locks are no content."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in Path(directory).rglob("*")
            if p.is_file() and not p.name.endswith(".lock")}


def outcome(script, crash=SystemExit, **args):
    """Run in this process: None when it ran to its end, an exit code, or the message of the exception `crash`.

    As when a process ends, nothing of the run is left: no signal handlers, and with the exception its lock goes.
    """
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        script.main(script.Args(**args))
    except SystemExit as e:
        result = e.code
    except crash as e:
        result = str(e)
    else:
        return None
    for s, handler in handlers.items() if crash is not SystemExit else ():
        signal.signal(s, handler)
    gc.collect()
    return result


def command(script, args):
    flags = [word for k, v in args.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    return [str(REPO / f"{script}.py"), *flags]


def start(words, cwd):
    return subprocess.Popen([sys.executable, *words], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def wait_for(process, condition, seconds=120):
    """Until the condition holds while the process is still running."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "timed out"
        assert process.poll() is None, f"it ended before it could be stopped:\n{process.stdout.read()}"
        time.sleep(0.01)


def lines_of(run):
    file = Path(run) / "log.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


# -- real processes and real signals --------------------------------------------------------------

@pytest.fixture(scope="module")
def long_args(sft_args):
    """A run of 150 steps, long enough to be met in the middle; no periodic checkpoint before the last step."""
    return {**sft_args, "epochs": 30, "checkpoint_every": 1000}


@pytest.fixture(scope="module")
def uninterrupted(long_args, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert outcome(sft, **long_args, out=str(out)) is None
    return out


def test_sigterm_and_the_same_command_again(long_args, uninterrupted, tmp_path, capsys):
    """`python sft.py …`, stopped by SIGTERM, exits non-zero with a checkpoint; run again it ends with the same bits.

    While it runs, a second process in the same directory gets one clear error and disturbs nothing.
    """
    out = tmp_path / "run"
    words = command("sft", {**long_args, "out": out})
    process = start(words, tmp_path)
    wait_for(process, lambda: lines_of(out) >= 3)
    process.send_signal(signal.SIGSTOP)
    assert outcome(sft, **long_args, out=str(out)) == 2
    assert re.fullmatch(rf"error: another process is training in {re.escape(str(out))}: process {process.pid} on "
                        rf"{common.host()}, since [-\d]+ [:\d]+\n", capsys.readouterr().err)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, printed
    step = checkpoint_step(out)
    assert 3 <= step < 150 and len(log(out)) == step, printed
    assert f"stopped by a signal after step {step}; run the same command again to continue" in printed
    assert not (out / "adapter_model.safetensors").exists() and not (out / "run.json").exists()

    again = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"resuming {out} at step {step} of 150" in again.stdout
    assert adapter(out) == adapter(uninterrupted)
    assert log(out) == log(uninterrupted) and [line["step"] for line in log(out)] == list(range(150))
    assert record(out)["metrics"] == record(uninterrupted)["metrics"]
    assert not (out / "checkpoint").exists()


def test_sigkill_goes_on_from_the_last_checkpoint(dpo_args, sft_run, tmp_path, capsys):
    """No time to say goodbye: steps after the last periodic checkpoint are done again, and logged once."""
    args = {**dpo_args, "sft_adapter": sft_run, "epochs": 40, "checkpoint_every": 7}
    assert outcome(dpo, **args, out=str(tmp_path / "whole")) is None
    out = tmp_path / "run"
    process = start(command("dpo", {**args, "out": out}), tmp_path)
    wait_for(process, lambda: lines_of(out) >= 17)
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    step = checkpoint_step(out)
    assert step % 7 == 0 and 14 <= step <= len(log(out)) < 120
    capsys.readouterr()
    assert outcome(dpo, **args, out=str(out)) is None
    assert f"resuming {out} at step {step} of 120" in capsys.readouterr().out
    assert adapter(out) == adapter(tmp_path / "whole")
    assert log(out) == log(tmp_path / "whole") and [line["step"] for line in log(out)] == list(range(120))


def test_torchrun_and_sigterm_to_the_launcher(long_args, uninterrupted, tmp_path, capsys):
    """Both ranks stop at the same step. One process goes on from there: the same training to float tolerance."""
    out = tmp_path / "run"
    words = command("sft", {**long_args, "out": out})
    process = start(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words], tmp_path)
    wait_for(process, lambda: lines_of(out) >= 3)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    step = checkpoint_step(out)
    assert 3 <= step < 150 and len(log(out)) == step, printed
    assert printed.count("stopped by a signal") == 1  # rank 0 speaks
    assert "2 ranks x 4" in printed
    capsys.readouterr()
    assert outcome(sft, **long_args, out=str(out)) is None
    assert f"resuming {out} at step {step} of 150" in capsys.readouterr().out
    assert [line["step"] for line in log(out)] == list(range(150))
    assert [line["loss"] for line in log(out)][:step + 1] == pytest.approx(
        [line["loss"] for line in log(uninterrupted)][:step + 1], abs=1e-4)


# -- the same in this process: every step, every write ---------------------------------------------

@pytest.fixture
def signal_after(monkeypatch):
    """signal_after(step, number): this process gets a real signal when that step has been logged."""
    write_log = common.Run.log

    def arm(step, number=signal.SIGTERM):
        def log_and_signal(self, at, *line):
            write_log(self, at, *line)
            if at == step:
                os.kill(os.getpid(), number)
        monkeypatch.setattr(common.Run, "log", log_and_signal)
    yield arm


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_stopped_after_every_step(name, sft_run, dpo_run, sft_args, dpo_args, signal_after, tmp_path):
    """One step a process life: the adapter and the log are those of a run that was never stopped."""
    script, args, whole = {"sft": (sft, sft_args, sft_run),
                           "dpo": (dpo, {**dpo_args, "sft_adapter": sft_run}, dpo_run)}[name]
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    steps = len(log(whole))
    for step in range(steps):
        number = (signal.SIGTERM, signal.SIGINT)[step % 2]
        signal_after(step, number)
        assert outcome(script, **{**args, "checkpoint_every": 100}, out=str(out)) == 128 + number
        assert checkpoint_step(out) == step + 1 == len(log(out))
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    signal_after(None)
    assert outcome(script, **{**args, "checkpoint_every": 100}, out=str(out)) is None
    assert adapter(out) == adapter(whole) and log(out) == log(whole)
    assert record(out)["metrics"] == record(whole)["metrics"]
    seconds = [json.loads(line)["seconds"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)  # time spent adds up over the lives


def test_random_numbers_go_on(sft_args, tmp_path, monkeypatch):
    """A method that draws noise while it trains draws, after a stop, what it would have drawn without one."""
    write_log, drawn = common.Run.log, {"whole": [], "stopped": []}

    def log_and_draw(self, step, *line):
        write_log(self, step, *line)
        drawn[self.directory.name].append(torch.rand(()).item())
        if self.directory.name == "stopped" and len(drawn["stopped"]) in (2, 3):
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(common.Run, "log", log_and_draw)
    assert outcome(sft, **sft_args, out=str(tmp_path / "whole")) is None
    codes = [outcome(sft, **sft_args, out=str(tmp_path / "stopped")) for _ in range(3)]
    assert codes == [128 + signal.SIGTERM] * 2 + [None]
    assert drawn["stopped"] == drawn["whole"] and len(set(drawn["whole"])) == 5


@pytest.mark.parametrize("crash", [1, 2, 3, 4])
def test_a_crash_while_writing(crash, sft_args, sft_run, tmp_path, monkeypatch):
    """The disk is full half-way through a file: the first, second or last checkpoint, or the adapter.

    The checkpoint before it stays whole, no half-written file stays, and the same command goes on to the same bits.
    """
    out, writes = tmp_path / "run", []

    def full_disk(tensors, path, metadata=None):
        writes.append(path)
        save_file(tensors, path, metadata)
        if len(writes) == crash:
            os.truncate(path, os.path.getsize(path) // 2)
            raise OSError("No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_file", full_disk)
        assert outcome(sft, OSError, **sft_args, out=str(out)) == "No space left on device"
    assert len(writes) == crash
    expected = {1: None, 2: 2, 3: 4, 4: 5}[crash]  # checkpoints after steps 2, 4 and 5, then the adapter
    if expected:
        assert checkpoint_step(out) == expected
    assert not (out / "adapter_model.safetensors").exists() and not (out / "run.json").exists()
    assert not [p for p in out.rglob("*") if "tmp" in p.name]
    if crash == 1:
        assert not (out / "checkpoint" / "state.safetensors").exists()
    assert outcome(sft, **sft_args, out=str(out)) is None
    assert adapter(out) == adapter(sft_run) and log(out) == log(sft_run)


def test_a_crash_between_the_adapter_and_the_end(sft_args, sft_run, tmp_path, monkeypatch):
    """What comes after training (measuring, the curves) fails: nothing is trained again, and the run is finished."""
    out = tmp_path / "run"

    def fails(*args, **kwargs):
        raise RuntimeError("no display")
    with monkeypatch.context() as patch:
        patch.setattr(common, "plot_curves", fails)
        assert outcome(sft, RuntimeError, **sft_args, out=str(out)) == "no display"
    assert not (out / "run.json").exists()
    assert outcome(sft, **sft_args, out=str(out)) is None
    assert adapter(out) == adapter(sft_run) and log(out) == log(sft_run)
    assert record(out)["metrics"] == record(sft_run)["metrics"]


def test_a_log_line_cut_short(sft_args, sft_run, signal_after, tmp_path):
    """A machine that died while it wrote a line of the log: the steps after the checkpoint are done again anyway."""
    out = tmp_path / "run"
    signal_after(2)
    assert outcome(sft, **sft_args, out=str(out)) == 128 + signal.SIGTERM
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 3, "loss": 5.8')
    signal_after(None)
    assert outcome(sft, **sft_args, out=str(out)) is None
    assert adapter(out) == adapter(sft_run) and log(out) == log(sft_run)


SIGNALLED = """
import atexit, json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import common, sft
atexit.register(lambda: print("still a group:", common.dist.is_initialized(), flush=True))  # the last that is called
write_log = common.Run.log

def log_and_signal(self, step, *line):
    write_log(self, step, *line)
    if step == int(sys.argv[3]) and common.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)

common.Run.log = log_and_signal
sft.main(sft.Args(**json.loads(sys.argv[2])))
"""


@pytest.mark.parametrize("signalled, steps", [(1, 3), (4, 5)])
def test_ranks_stop_together(signalled, steps, sft_args, sft_run, tmp_path):
    """Two ranks, of which one gets a signal: both stop a step later, or after the last, and one process goes on from there."""
    out, driver = tmp_path / "run", tmp_path / "driver.py"
    driver.write_text(SIGNALLED)
    args = {**sft_args, "checkpoint_every": 100}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(driver),
                           str(REPO), json.dumps({**args, "out": str(out)}), str(signalled)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and f"stopped by a signal after step {steps}" in done.stdout + done.stderr
    assert "still a group: False" in done.stdout  # of the first that ends, at least: torchrun then stops the other
    assert "still a group: True" not in done.stdout
    assert checkpoint_step(out) == steps and [line["step"] for line in log(out)] == [*range(steps)]
    assert outcome(sft, **args, out=str(out)) is None
    for line, whole in zip(log(out), log(sft_run), strict=True):
        assert line["loss"] == pytest.approx(whole["loss"], abs=1e-5)


# -- a line waits for its numbers ------------------------------------------------------------------

def test_a_line_is_written_a_step_later(sft_args, sft_run, tmp_path, monkeypatch):
    """So that nothing waits for a GPU: but the first at once, and none waits when a checkpoint is written or the run ends."""
    write_log, write_checkpoint, lines = common.Run.log, common.Run.checkpoint, []

    def watched(write):
        def call(self, *args):
            write(self, *args)
            lines.append(len(log(self.directory)))
        return call
    monkeypatch.setattr(common.Run, "log", watched(write_log))
    monkeypatch.setattr(common.Run, "checkpoint", watched(write_checkpoint))
    assert outcome(sft, **{**sft_args, "checkpoint_every": 3}, out=str(tmp_path / "run")) is None
    assert lines == [1, 1, 1, 1, 2, 3, 3, 3, 4, 5]  # after log and checkpoint of each step
    assert log(tmp_path / "run") == log(sft_run)


def test_numbers_of_the_host_are_not_waited_for(tmp_path):
    """A line without tensors (PPO's, GRPO's) is written at once, in order, after one that waits."""
    run = common.Run.__new__(common.Run)
    run.__dict__.update(unread=None, last_read=common.Fetched({"loss": torch.tensor(1.0)}), log_file=tmp_path / "log.jsonl",
                        seconds=0.0, started=0.0, last_tick=0.0, last_flops=0, bar=tqdm(disable=True), tracker=None)
    run.log(0, {"loss": torch.tensor(0.5), "lr": 1.0})
    assert not run.log_file.exists()
    run.log(1, {"loss": 0.25})
    assert [(line["step"], line["loss"]) for line in log(tmp_path)] == [(0, 0.5), (1, 0.25)]


# -- a loss that is not finite --------------------------------------------------------------------

@pytest.mark.parametrize("checkpoint_every", [2, 100])
def test_a_loss_that_is_not_finite_names_step_and_rows(checkpoint_every, sft_args, tmp_path):
    """A rate of 1e30 breaks the weights in step 0; step 1's loss shows it, which is read before a checkpoint is written, or a
    step later, and stops the run before it writes anything."""
    out = tmp_path / "run"
    expected = [common.permutation(40, 42, "rows")[i] for i in common.batches(40, 8, 1, 42)[1]]
    for _ in range(2):  # and again: the lock is free, and nothing that is broken was kept
        message = outcome(sft, FloatingPointError, **{**sft_args, "lr": 1e30, "checkpoint_every": checkpoint_every}, out=str(out))
        assert re.search(r"\bloss\b.*\b(nan|inf)\b.* step 1\b", message) and str(sorted(expected)) in message
    assert [line["step"] for line in log(out)] == [0]
    assert not (out / "run.json").exists() and not (out / "adapter_model.safetensors").exists()


def test_a_last_step_that_breaks_the_weights_does_not_finish(sft_args, tmp_path):
    """No step comes after it to see the loss: the held-out loss is not finite, and the run must not count as done."""
    out = tmp_path / "run"
    message = outcome(sft, FloatingPointError, **{**sft_args, "lr": 1e30, "batch_size": 40}, out=str(out))
    assert message is not None and "heldout_loss" in message
    assert not (out / "run.json").exists()


# -- the run directory ----------------------------------------------------------------------------

@pytest.fixture
def finished(sft_run, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(sft_run, tmp_path / "runs" / "sft_v2"))


@pytest.fixture
def unfinished(sft_args, signal_after, tmp_path):
    """A run that was stopped after two of its five steps."""
    out = tmp_path / "runs" / "sft_v2"
    signal_after(1)
    assert outcome(sft, **sft_args, out=str(out)) == 128 + signal.SIGTERM
    signal_after(None)
    return out


CHANGES = [{"lr": 1e-3}, {"seed": 1}, {"rows": 32}, {"batch_size": 4}, {"epochs": 2}, {"max_length": 120},
           {"warmup": 0.5}, {"eos_tokens": 4}]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: next(iter(c)))
def test_another_configuration_is_refused(finished, sft_args, change, capsys):
    before = tree(finished.parent)
    assert outcome(sft, **{**sft_args, **change}, out=str(finished)) == 2
    (name, value), error = *change.items(), capsys.readouterr().err
    assert f"{name} {sft.Args(**sft_args).__dict__[name]} -> {value}" in error
    assert record(finished)["config_hash"] in error and "--overwrite" in error and "--out" in error
    assert tree(finished.parent) == before


def test_another_data_set_is_refused(finished, sft_args, data_dir, tmp_path, capsys):
    """The same rows in another order are another data set; the same rows elsewhere are the same."""
    rows = (data_dir / "sft.jsonl").read_text().splitlines(True)
    heldout = str(data_dir / "sft_heldout.jsonl")
    for name, content, code in (("moved", rows, 0), ("turned", rows[::-1], 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(content))
        args = {**sft_args, "data": str(tmp_path / f"{name}.jsonl"), "heldout_data": heldout}
        assert outcome(sft, **args, out=str(finished)) == code
    assert "they differ in data" in capsys.readouterr().err


def test_another_method_is_refused(finished, sft_run, dpo_args, capsys):
    before = tree(finished)
    assert outcome(dpo, **dpo_args, sft_adapter=sft_run, out=str(finished)) == 2
    assert "method" in capsys.readouterr().err
    assert tree(finished) == before


def test_an_unfinished_run_of_another_configuration_is_refused(unfinished, sft_args, capsys):
    before = tree(unfinished)
    assert outcome(sft, **{**sft_args, "lr": 1e-3}, out=str(unfinished)) == 2
    assert "lr 0.005 -> 0.001" in capsys.readouterr().err
    assert tree(unfinished) == before and checkpoint_step(unfinished) == 2


def moved_aside(directory):
    return [p for p in directory.parent.iterdir() if p.is_dir() and p != directory]


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_overwrite_moves_another_run_aside(state, request, sft_args, capsys):
    old = request.getfixturevalue(state)
    before = tree(old)
    assert outcome(sft, **{**sft_args, "lr": 1e-3, "overwrite": True}, out=str(old)) is None
    (aside,) = moved_aside(old)
    assert tree(aside) == before
    assert str(aside) in capsys.readouterr().out
    assert json.loads(before.get("run.json", before.get("checkpoint/run.json")))["config_hash"] in aside.name
    assert record(old)["args"]["lr"] == 1e-3 and [line["step"] for line in log(old)] == list(range(5))
    assert log(old)[0]["lr"] == pytest.approx(1e-3)


def test_overwrite_of_the_same_configuration_goes_on(unfinished, sft_args, sft_run, capsys):
    capsys.readouterr()
    assert outcome(sft, **sft_args, overwrite=True, out=str(unfinished)) is None
    assert f"resuming {unfinished} at step 2 of 5" in capsys.readouterr().out
    assert moved_aside(unfinished) == []
    assert adapter(unfinished) == adapter(sft_run) and log(unfinished) == log(sft_run)


def test_knobs_of_speed_and_place_do_not_matter(unfinished, finished_elsewhere, sft_args, sft_run):
    """A run goes on under other checkpoint intervals; a finished one stays finished under other micro-batches."""
    assert outcome(sft, **{**sft_args, "checkpoint_every": 1}, out=str(unfinished)) is None
    assert adapter(unfinished) == adapter(sft_run)
    before = tree(finished_elsewhere)
    assert outcome(sft, **{**sft_args, "micro_tokens": 128, "engine": "fast"}, out=str(finished_elsewhere)) == 0
    assert tree(finished_elsewhere) == before


@pytest.fixture
def finished_elsewhere(sft_run, tmp_path):
    return Path(shutil.copytree(sft_run, tmp_path / "elsewhere" / "other_name"))


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_rebuilt_parent_is_another_run(state, finished, dpo_args, signal_after, tmp_path, capsys):
    """The parent was trained again and came out with other weights (same config_hash): its child is not up to date."""
    out, args = tmp_path / "runs" / "dpo_v1", {**dpo_args, "sft_adapter": str(finished)}
    if state == "unfinished":
        signal_after(1)
    assert outcome(dpo, **args, out=str(out)) == (None if state == "finished" else 128 + signal.SIGTERM)
    signal_after(None)
    file = finished / "adapter_model.safetensors"
    save_file({k: v * 1.5 for k, v in load_file(file).items()}, file, {"format": "pt"})
    parent = {**record(finished), "adapter_sha256": common.tensors_sha256([file])}
    (finished / "run.json").write_text(json.dumps(parent))

    before = tree(out)
    assert outcome(dpo, **args, out=str(out)) == 2
    assert "they differ in parent" in capsys.readouterr().err
    assert tree(out) == before
    assert outcome(dpo, **args, overwrite=True, out=str(out)) is None
    (aside,) = [p for p in moved_aside(out) if p != finished]
    assert tree(aside) == before
    assert record(out)["parent"]["adapter_sha256"] == parent["adapter_sha256"]
    first = load_file(out / "adapter_model.safetensors")
    for name, tensor in load_file(file).items():
        assert torch.equal(first[name].narrow(0 if "lora_A" in name else 1, 0, 16), tensor)


def test_ctrl_c_after_the_last_step_ends_the_process_and_loses_nothing(sft_args, sft_run, tmp_path, monkeypatch):
    """Once the last checkpoint is written, SIGINT is Python's own again: it interrupts the closing measurements."""
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("SIGINT was swallowed")
    with monkeypatch.context() as patch:
        patch.setattr(common, "eos_rate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sft.main(sft.Args(**sft_args, out=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "run.json").exists()
    gc.collect()
    sft.main(sft.Args(**sft_args, out=str(tmp_path / "run")))
    assert adapter(tmp_path / "run") == adapter(sft_run)


def test_a_checkpoint_of_an_older_version_is_named(sft_args, tmp_path, monkeypatch, capsys):
    """Its parameters were stored one by one. The file is left as it is."""
    out, log = tmp_path / "run", common.Run.log

    def log_and_stop(self, step, *line):
        log(self, step, *line)
        self.stop_signal = signal.SIGTERM
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", log_and_stop)
        assert outcome(sft, **sft_args, out=str(out)) == 128 + signal.SIGTERM
    file = out / "checkpoint" / "state.safetensors"
    with safe_open(file, "pt") as f:
        meta, tensors = f.metadata(), {k.replace("/0", "/some.lora_A.weight"): f.get_tensor(k) for k in f.keys()}
    save_file(tensors, file, meta)
    before = file.read_bytes()
    assert outcome(sft, **sft_args, out=str(out)) == 2
    assert f"{file} is of an older version; remove {file.parent} to begin anew" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_second_ctrl_c_does_not_wait_for_the_step(sft_args, sft_run, tmp_path, monkeypatch, capfd):
    """The step in hand is lost, the checkpoint before it is not. The first one says so."""
    steps, clip = [], torch.nn.utils.clip_grad_norm_

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 4:  # checkpoints are written every 2 steps
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second SIGINT was swallowed")
        return clip(*args)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sft.main(sft.Args(**sft_args, out=str(tmp_path / "run")))
    assert checkpoint_step(tmp_path / "run") == 2
    assert capfd.readouterr().err.count("stopping after this step; a second Ctrl-C stops at once") == 1
    gc.collect()
    sft.main(sft.Args(**sft_args, out=str(tmp_path / "run")))
    assert adapter(tmp_path / "run") == adapter(sft_run)


def test_temporary_files_of_a_killed_process_are_removed(sft_args, tmp_path):
    """By the next start, which also takes a directory in which nothing else was written, and by its finish."""
    out = tmp_path / "run"
    (out / "checkpoint").mkdir(parents=True)
    leftovers = [out / ".curves.png.99999.tmp", out / "checkpoint" / ".run.json.99999.tmp"]
    for path in leftovers:
        path.write_text("half")
    (out / "checkpoint" / ".state.safetensors.12.tmp").write_text("half")
    sft.main(sft.Args(**sft_args, out=str(out)))
    assert (out / "run.json").is_file() and not [p for p in out.rglob("*") if p.name.endswith(".tmp")]


def test_temporaries_of_one_file_go_when_it_is_written_again(tmp_path):
    """Those of ended processes of this machine; not those of another file, of a running process or of another machine."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = [f".x.json.elsewhere-{ended.pid}.tmp", f".y.json.{common.host()}-{ended.pid}.tmp",
            f".x.json.{common.host()}-{os.getppid()}.tmp", ".x.json.tmp"]
    for name in (*kept, f".x.json.{common.host()}-{ended.pid}.tmp"):
        (tmp_path / name).write_text("half")
    common.write_json(tmp_path / "x.json", {})
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", *kept}


class Unpickled:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickled_or_torn_checkpoint_is_refused_unread(unfinished, sft_args, tmp_path, capsys):
    """Nothing of it is executed, and it is left as it is; the error says how to begin anew."""
    file = unfinished / "checkpoint" / "state.safetensors"
    whole = file.read_bytes()
    for content in (pickle.dumps(Unpickled(tmp_path / "unpickled")), whole[:len(whole) // 2], b""):
        file.write_bytes(content)
        assert outcome(sft, **sft_args, out=str(unfinished)) == 2
        assert f"{file} can't be read" in (error := capsys.readouterr().err) and f"remove {file.parent}" in error
        assert file.read_bytes() == content
    assert not (tmp_path / "unpickled").exists()


def test_a_kill_between_the_finish_and_the_end_of_the_checkpoint(finished, sft_args):
    """run.json is written, the checkpoint is still there: the same command removes it, and nothing else changes."""
    before = tree(finished)
    (finished / "checkpoint").mkdir()
    for name in ("run.json", "state.safetensors", ".state.safetensors.12.tmp"):
        (finished / "checkpoint" / name).write_text("{}")
    assert outcome(sft, **sft_args, out=str(finished)) == 0
    assert tree(finished) == before and not (finished / "checkpoint").exists()


def test_scratch_directories_of_ended_processes_go(tmp_path, monkeypatch):
    """At the next start on this machine; those of a running process stay, and the new one goes with its object."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = {f"rungs-eval-{common.host()}-{os.getpid()}-x", f"rungs-eval-elsewhere-{ended.pid}-x", "rungs-eval-x"}
    for name in (*kept, f"rungs-eval-{common.host()}-{ended.pid}-x"):
        (tmp_path / name / "data").mkdir(parents=True)
    with common.scratch("rungs-eval") as new:
        assert {p.name for p in tmp_path.iterdir()} == kept | {Path(new).name}
    assert {p.name for p in tmp_path.iterdir()} == kept


# -- locks ----------------------------------------------------------------------------------------

HOLDS = """
import sys, time
sys.path.insert(0, sys.argv[1])
import common
from pathlib import Path
with common.Lock(Path(sys.argv[2]), "busy"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_dead_holder_keeps_nobody_out(tmp_path, capsys):
    """While a process holds the lock, its number and machine are named; killed, it holds nothing."""
    path = tmp_path / ".run.lock"
    process = start(["-c", HOLDS, str(REPO), str(path)], tmp_path)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(SystemExit):
        common.Lock(path, "busy")
    assert f"error: busy: process {process.pid} on {common.host()}, since " in capsys.readouterr().err
    process.kill()
    process.wait()
    with common.Lock(path, "busy"):
        assert f"process {os.getpid()} on" in path.with_suffix(".holder").read_text()
    assert not path.with_suffix(".holder").exists()


@pytest.mark.parametrize("number, code", [(errno.ENOLCK, None), (errno.EROFS, 2)])
def test_a_file_system_without_locks(number, code, tmp_path, monkeypatch, capsys):
    """Some network folders have none: said, and the run goes on. Any other refusal of the lock file ends it."""
    def flock(fd, operation):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", flock)
    if code is None:
        with common.Lock(tmp_path / ".run.lock", "busy"):
            pass
        assert "has no locks" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit):
            common.Lock(tmp_path / ".run.lock", "busy")
        assert f"{tmp_path / '.run.lock'} can't be locked" in capsys.readouterr().err
