"""The fast engine against the plain one, which is the specification; and every script without the folder fast/."""
import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, sharing_examples
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import chat
import common
import dpo
import fast
import sft

REPO = Path(__file__).parent.parent
CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def models(request, tmp_path_factory):
    """{engine: policy} of one random base and one random adapter, with biases and norms that matter, and the tokenizer."""
    tokenizer = make_tokenizer(directory := tmp_path_factory.mktemp(request.param))
    shape = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
                 eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=request.param != "llama")
    torch.manual_seed(1)
    base = {"llama": lambda: LlamaForCausalLM(LlamaConfig(**shape, attention_bias=True, mlp_bias=True)),
            "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape)),
            "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16))}[request.param]().float()
    for name, p in base.named_parameters():
        if "norm" in name or name.endswith("bias"):
            p.data.normal_(1.0 if "norm" in name else 0.0, 0.3)
    base.save_pretrained(directory)
    policies = {}
    for engine in ("fast", "plain"):
        policies[engine] = common.add_lora(common.load_model(directory, dtype=torch.float32, engine=engine))
        g = torch.Generator().manual_seed(2)
        for p in common.trainable(policies[engine]):
            p.data = 0.05 * torch.randn(p.shape, generator=g)
        common.base_of(policies[engine]).score = common.new_head(policies[engine]).requires_grad_(False)
    return policies, chat.load_tokenizer(directory)


def by_example(policy, examples, function, micro_tokens=200):
    """function(policy, micro-batch), [K] or [N], as {example: values}."""
    values = {}
    for micro in common.micro_batches(policy, examples, micro_tokens):
        result = function(policy, micro)
        counts = micro.counts.tolist() if len(result) == len(micro.targets) else [1] * len(micro.examples)
        values |= dict(zip(micro.examples, result.split(counts)))
    return [values[i] for i in range(len(examples))]


def test_policy_and_reference_compile_the_same_kernels(models, monkeypatch):
    """torch.compile makes other kernels for inputs without a gradient, and those may round differently. In a recorded pass,
    which runs with gradients enabled, every elementwise step gets inputs of the same kind with the adapter on and off."""
    policy, seen = models[0]["fast"], []

    def noted(function):
        def call(*args):
            seen[-1].append((function.__name__, [x.requires_grad for x in args if isinstance(x, torch.Tensor)]))
            return function(*args)
        return call
    monkeypatch.setattr(fast.decoder, "compiled", noted)
    pack, = common.micro_batches(policy, sharing_examples()[:2], 10_000)
    for adapter in (contextlib.nullcontext(), common.reference(policy)):
        seen.append([])
        with torch.enable_grad(), adapter:
            hidden = fast.decoder.decoder(common.base_of(policy), pack, compile=True)
    assert seen[0] == seen[1] and any(any(flags) for _, flags in seen[0])
    with torch.no_grad(), common.reference(policy):
        assert torch.equal(fast.decoder.decoder(common.base_of(policy), pack), hidden)


def test_log_probabilities_values_and_scores_are_equal(models):
    policies, _ = models
    examples = sharing_examples()
    functions = (lambda m, b: common.token_logprobs(m, b, 0.7), lambda m, b: common.token_logprobs(m, b, extras=("entropy",))[1]["entropy"],
                 lambda m, b: common.token_logprobs(m, b, extras=("correct",))[1]["correct"].float(),
                 common.token_values, common.reward_scores)
    for function in functions:
        with torch.no_grad():
            fast, plain = (by_example(p, examples, function) for p in policies.values())
        for a, b in zip(fast, plain, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_gradients_are_equal(models):
    policies, _ = models
    gradients = []
    for policy in policies.values():
        for p in common.trainable(policy):
            p.grad = None
        for micro in common.micro_batches(policy, sharing_examples(), 200):
            weights = torch.tensor([1.0 + i % 3 for i in micro.rows])
            (weights * common.token_logprobs(policy, micro)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in common.trainable(policy)]))
    fast, plain = gradients
    assert (fast - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("how", [{}, {"temperature": 0.9, "seed": 3}, {"temperature": 1.2, "seed": 4, "top_p": 0.9}])
def test_sampled_tokens_are_equal(models, how):
    """Greedy and sampled, prompts of several lengths, a budget each: the same ids, ends and log-probabilities."""
    policies, tokenizer = models
    g = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 300, (n,), generator=g).tolist() for n in (4, 9, 4, 1, 30, 9)]
    fast, plain = (common.Sampler(p, tokenizer, max_batch=2).sample(prompts, [12, 5, 20, 8, 8, 8], **how)
                   for p in policies.values())
    for a, b in zip(fast, plain, strict=True):
        assert (a.ids, a.stopped, a.text) == (b.ids, b.stopped, b.text)
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), **CLOSE)


def test_a_plain_micro_batch_holds_what_it_may(models):
    """Each example once, units together, at most micro_tokens tokens with padding; a unit that is too large is refused."""
    policy = models[0]["plain"]
    examples = sharing_examples()
    for unit, limit in ((1, 60), (1, 200), (2, 120)):
        some = examples[:len(examples) // unit * unit]
        micros = common.micro_batches(policy, some, limit, unit)
        assert sorted(i for m in micros for i in m.examples) == list(range(len(some)))
        assert all(m.input_ids.numel() <= limit for m in micros) and len(micros) > 2
        assert all(b == a + 1 for m in micros for a, b in zip(m.examples[::unit], m.examples[unit - 1::unit])) or unit == 1
        assert all(m.tokens == sum(len(some[i].ids) for i in m.examples) for m in micros)
    with pytest.raises(ValueError, match="don't fit into --micro-tokens 20"):
        common.micro_batches(policy, examples, 20)


@pytest.mark.parametrize("script", [sft, dpo])
def test_a_run_is_the_same_with_either_engine(sft_args, dpo_args, sft_run, tmp_path, script):
    """In fp32 over ten steps or more: losses and gradient norms at 1e-5, config_hash equal."""
    given = {**sft_args, "epochs": 2, "lr": 1e-3} if script is sft else {**dpo_args, "sft_adapter": sft_run, "epochs": 4}
    logs, hashes = [], set()
    for engine in ("fast", "plain"):
        out = tmp_path / engine
        script.main(script.Args(**given, engine=engine, out=str(out)))
        logs.append([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
        hashes.add(json.loads((out / "run.json").read_text())["config_hash"])
    assert len(hashes) == 1 and len(logs[0]) == len(logs[1]) >= 10
    for a, b in zip(*logs):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_resume_on_the_plain_engine_is_bit_identical(sft_args, tmp_path, monkeypatch):
    """Stopped by a signal after its second step and continued: the weights of the uninterrupted run."""
    import signal
    whole, stopped = ({**sft_args, "engine": "plain", "out": str(tmp_path / name)} for name in ("whole", "stopped"))
    sft.main(sft.Args(**whole))
    log = common.Run.log
    monkeypatch.setattr(common.Run, "log", lambda self, step, *a: (
        log(self, step, *a), signal.raise_signal(signal.SIGTERM) if step == 1 else None))
    with pytest.raises(SystemExit):
        sft.main(sft.Args(**stopped))
    monkeypatch.undo()
    sft.main(sft.Args(**stopped))
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "stopped"))
    assert one["adapter_sha256"] == two["adapter_sha256"]


def test_fast_is_refused_where_it_cannot_serve(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    common.choose_engine.cache_clear()
    assert common.choose_engine("auto", tmp_path, torch.device("cpu")) == "plain"
    assert "gemma2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        common.choose_engine("fast", tmp_path, torch.device("cpu"))
    assert "--engine" in (error := capsys.readouterr().err) and "gemma2" in error
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    common.choose_engine.cache_clear()
    assert [common.choose_engine(e, tmp_path, torch.device("cpu")) for e in ("auto", "fast", "plain")] == ["fast", "fast", "plain"]


DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import common
assert common.fast is None
given = json.loads(sys.argv[2])
for script in ("sft", "dpo", "reward", "kto", "ppo", "grpo"):
    module = __import__(script)
    module.main(module.Args(**given[script]))
import evaluate, judge
evaluate.main(evaluate.Args(**given["evaluate"]))
judge.main(judge.Args(**given["judge"]))
assert "fast" not in sys.modules
"""


def test_every_script_runs_without_the_folder(tiny_model, sft_args, dpo_args, kto_args, reward_args, ppo_args, grpo_args, data_dir,
                                              tmp_path):
    """A copy of the repository without fast/: training for some steps, evaluation, judge, in one process."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in [*REPO.glob("*.py"), REPO / "judge.html"]:
        shutil.copy(path, copy)
    runs, small = tmp_path / "runs", {"eos_prompts": 2, "heldout_rows": 4}
    parent = {"sft_adapter": str(runs / "sft")}
    given = {
        "sft": {**sft_args, **small, "rows": 16}, "dpo": {**dpo_args, **small, **parent, "rows": 8},
        "reward": {**reward_args, "rows": 8, "heldout_rows": 4}, "kto": {**kto_args, **small, **parent, "rows": 8},
        "ppo": {**ppo_args, **parent, "reward_adapter": str(runs / "reward"), "updates": 1, "normalise": 4, "fixed_prompts": 2},
        "grpo": {**grpo_args, **parent, "updates": 1, "heldout_rows": 2, "eval_every": 0, "pass_k": 1}}
    for script, args in given.items():
        args["out"] = str(runs / script)
    given["evaluate"] = dict(model=tiny_model, adapter=(str(runs / "dpo"),), eval_data=str(REPO / "data" / "demo" / "eval"), limit=1,
                             max_gen_toks=4, dtype="float32", device="cpu", out=str(tmp_path / "results"))
    given["judge"] = dict(rows=[str(runs / "dpo")], against=str(runs / "sft"), judge_model=str(runs / "reward"),
                          pref_data=str(data_dir / "preference.jsonl"), prompts=2, max_new_tokens=4, dtype="float32", device="cpu",
                          results=str(tmp_path / "results"))
    (tmp_path / "driver.py").write_text(DRIVER)
    done = subprocess.run([sys.executable, str(tmp_path / "driver.py"), str(copy), json.dumps(given)], capture_output=True,
                          text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "engine: plain (fast can't serve it: there is no folder fast/; about ten times slower on a GPU)" in done.stdout
    assert json.loads((tmp_path / "results" / "metrics.json").read_text())["runs"]
