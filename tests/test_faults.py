"""Numbers that break while a run trains: a NaN or an infinity in the logits, the loss, the gradient or a reward stops it at
that step, names the rows, and leaves the last good checkpoint; the same command then ends as if nothing had been."""
import gc
import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import common

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
