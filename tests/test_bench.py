"""Speed paths equal the plain ones in value and gradient, FLOPs are counted right, and the benchmark runs."""
import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

import chat
import common
import fast
from common import Example
from conftest import make_model, without_nf4

REPO = Path(__file__).parent.parent


def random_examples(n, seed=0, low=5, high=50):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (n,), generator=g).tolist()
    return [Example.masked(ids, [i % 3 > 0 for i in range(len(ids) - 1)] + [True])
            for ids in (torch.randint(3, 300, (k,), generator=g).tolist() for k in lengths)]


def nudged(policy, seed=0):
    """Both factors of every adapter away from zero, the same numbers whatever the model's own."""
    g = torch.Generator().manual_seed(seed)
    for _, p in sorted((n, p) for n, p in policy.named_parameters() if p.requires_grad):
        p.data.copy_(0.05 * torch.randn(p.shape, generator=g))
    return policy


def ours(directory, quantization="none"):
    return nudged(common.add_lora(common.load_model(directory, None, quantization, torch.float32)))


def theirs(directory, quantization="none"):
    """The same policy of transformers and PEFT, whose forward computes no packs."""
    nf4 = {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32), "device_map": {"": "cpu"}} if quantization == "nf4" else {}
    model = without_nf4(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **nf4))
    model.is_quantized = model.is_loaded_in_4bit = False  # PEFT would ask bitsandbytes for its layers
    return nudged(get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
                                                   target_modules=list(common.TARGET_MODULES))))


def gradients(policy):
    return {n.replace(".default", ""): p.grad for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind, quantization", [("llama", "none"), ("qwen2", "none"), ("qwen2", "nf4")])
def test_log_probs_and_gradients_are_those_of_transformers_and_peft(tmp_path, kind, quantization):
    """Our decoder, LoRA and head, in packs, against their modules a sequence at a time: unequal weights of the tokens."""
    make_model(tmp_path, kind=kind)
    mine, plain, examples = ours(tmp_path, quantization), theirs(tmp_path, quantization), random_examples(7)
    if kind == "qwen2":
        for model in (mine, plain):  # biases that are not zero
            for n, p in model.named_parameters():
                if n.endswith("bias"):
                    p.data.copy_(torch.linspace(-0.2, 0.2, len(p)))
    expected = {}
    for i, e in enumerate(examples):
        logits = plain(torch.tensor([e.ids]), use_cache=False).logits[0] / 0.7
        expected[i] = logits.log_softmax(1)[e.predict, e.targets]
        (expected[i] * torch.arange(1, len(e.targets) + 1)).sum().backward()
    packs = fast.pack(examples, 120)
    assert len(packs) > 1
    for pk in packs:
        for i, logprobs in zip(pk.examples, common.token_logprobs(mine, pk, 0.7).split(pk.counts.tolist())):
            torch.testing.assert_close(logprobs, expected[i], atol=1e-5, rtol=1e-5)
        places = torch.cat([torch.arange(1, n + 1) for n in pk.counts.tolist()])
        (common.token_logprobs(mine, pk, 0.7) * places).sum().backward()
    found, wanted = gradients(mine), gradients(plain)
    assert found.keys() == wanted.keys() and len(found) == 2 * 7 * 2
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5 * grad.abs().max().item(), rtol=1e-4)


def test_weights_side_by_side_are_the_modules_own(tiny_model):
    """One tensor holds q, k and v; a weight that is replaced afterwards counts."""
    model = common.load_model(tiny_model, dtype=torch.float32)
    attention = common.base_of(model).model.layers[0].self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    before = torch.cat([m.weight.clone() for m in modules])
    together = fast.decoder.weight_of(modules, torch.float32)
    assert torch.equal(together, before) and fast.decoder.weight_of(modules, torch.float32) is together
    assert all(m.weight.untyped_storage().data_ptr() == together.untyped_storage().data_ptr() for m in modules)
    attention.v_proj.weight.data += 1
    assert torch.equal(fast.decoder.weight_of(modules, torch.float32)[-len(attention.v_proj.weight):], attention.v_proj.weight)
    attention.k_proj.weight.data = torch.zeros_like(attention.k_proj.weight)
    assert torch.equal(fast.decoder.weight_of(modules, torch.float32), torch.cat([m.weight for m in modules]))


@pytest.mark.parametrize("share", [False, True])
def test_a_filled_pack_gives_what_the_pack_gives(tiny_model, share):
    """What a recorded pass computes: packs of several sizes copied into a larger static pack, one after the other, under
    leaves of its own for the same factors. What an earlier pack left in it changes nothing."""
    policy = ours(tiny_model)
    base, factors, flat = common.base_of(policy), common.trainable(policy), common.flat_parameters(policy)
    static = fast.graphs.GraphSize(512, 32, 1024, 1024 if share else 0).empty("cpu")
    recorded = fast.graphs.RecordedPass(base, static, torch.zeros(len(flat)))
    g = torch.Generator().manual_seed(1)
    for n in (9, 3, 6):
        examples = random_examples(n, seed=n)
        if share:
            examples = [Example(e.ids + [5 + i] * 4, e.predict, e.targets) for e in examples for i in range(2)]
        (pk,) = fast.pack(examples, 512, share=share)
        tokens = pk.input_ids.shape[1]
        fast.graphs.fill(static, pk)
        weight = torch.randn(tokens, base.config.hidden_size, generator=g)
        hidden = fast.decoder.decoder(common.base_of(policy), pk)
        wanted = torch.cat([d.flatten() for d in torch.autograd.grad((hidden * weight).sum(), factors)])
        recorded.slope[:tokens], recorded.slope[tokens:] = weight, 0
        recorded.run(base, flat, contextlib.nullcontext(), contextlib.nullcontext())
        torch.testing.assert_close(recorded.hidden[:tokens], hidden, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(recorded.gradient, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4)
        with common.reference(policy):  # without trained parameters
            recorded.run(base, None, contextlib.nullcontext(), contextlib.nullcontext())
            torch.testing.assert_close(recorded.hidden[:tokens], fast.decoder.decoder(base, pk), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [False, True])
def test_a_pass_that_warms_up_has_padding_alone(tiny_model, share):
    """The first pass of a kind: few tokens, whatever the size of the pack, and numbers that are finite."""
    policy = ours(tiny_model)
    (pk,) = fast.pack(random_examples(6), 512, share=share)
    static = fast.graphs.warm_up_size(fast.graphs.GraphSize.exact(pk)).empty("cpu")
    fast.graphs.fill(static, fast.graphs.empty_pack_like(pk))
    assert static.tokens == 1024 and (static.keys is None) == (pk.keys is None)
    flat = common.flat_parameters(policy)
    recorded = fast.graphs.RecordedPass(common.base_of(policy), static, torch.zeros(len(flat)))
    recorded.slope[:] = 1
    recorded.run(common.base_of(policy), flat, contextlib.nullcontext(), contextlib.nullcontext())
    assert recorded.hidden.isfinite().all() and recorded.gradient.isfinite().all() and recorded.gradient.any()


def test_what_warms_up_compiles_for_every_size(tiny_model, tmp_path, monkeypatch):
    """While a pass is recorded nothing may compile: packs of other sizes, with or without shared tokens, of the policy or its
    reference, use what the small first pass has compiled, also of a second model with wider heads."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="aot_eager"))
    fast.decoder.compiled.cache_clear()
    make_model(tmp_path, hidden_size=128)
    packs = [pk for share in (False, True) for pk in fast.pack(random_examples(6), 512, share=share)]

    def run(base, flat, size, pk):
        static = size.empty("cpu")
        fast.graphs.fill(static, fast.graphs.empty_pack_like(pk))
        recorded = fast.graphs.RecordedPass(base, static, None if flat is None else torch.zeros(len(flat)))
        recorded.run(base, flat, contextlib.nullcontext(), contextlib.nullcontext())

    def run_both(policy, flat, size, pk):
        run(common.base_of(policy), flat, size, pk)
        with common.reference(policy):
            run(common.base_of(policy), None, size, pk)
    try:
        for directory in (tiny_model, tmp_path):
            policy = ours(directory)
            flat = common.flat_parameters(policy)
            run_both(policy, flat, fast.graphs.warm_up_size(fast.graphs.GraphSize.exact(packs[0])), packs[0])
            with torch._dynamo.config.patch(error_on_recompile=True):
                for tokens in (256, 512, 2560):
                    for pk in packs:
                        run_both(policy, flat, fast.graphs.GraphSize(0, 0, 0, int(pk.keys is not None)).padded(tokens), pk)
                with pytest.raises(torch._dynamo.exc.RecompileError):  # the test can fail: rows of another rank
                    fast.decoder.compiled(fast.decoder.swiglu)(torch.zeros(4, 3, 6))
    finally:
        fast.decoder.compiled.cache_clear()
        torch._dynamo.reset()


def test_weights_are_stacked_before_the_first_pass(tiny_model):
    """compile_layers makes one tensor of the weights that are multiplied at once, and the first pass no other; the numbers
    stay. NF4 weights stay as they are."""
    policy, (pk,) = ours(tiny_model), fast.pack(random_examples(4), 512)
    with torch.no_grad():
        before = common.token_logprobs(policy, pk)
    base = common.base_of(policy)
    groups = [[module.base_layer for module in modules] for layer in base.base_model.layers for modules in
              ((layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj), (layer.mlp.gate_proj, layer.mlp.up_proj))]
    for module in (module for group in groups for module in group):  # as they are loaded
        module.weight.data = module.weight.data.clone()
    fast.compile_layers(base)
    base.__dict__.pop("recordings")  # what torch.compile makes rounds otherwise
    stacks = [group[0].together for group in groups]
    for group, stack in zip(groups, stacks):
        at = stack.data_ptr()
        for module in group:
            assert module.weight.data_ptr() == at
            at += module.weight.nbytes
        assert at == stack.data_ptr() + stack.nbytes
    with torch.no_grad():
        assert torch.equal(common.token_logprobs(policy, pk), before)
    assert all(group[0].together is stack for group, stack in zip(groups, stacks))

    quantized = ours(tiny_model)
    for m in quantized.modules():
        if hasattr(m, "base_layer"):
            m.base_layer.weight.quant_state = object()
    fast.compile_layers(common.base_of(quantized))
    assert not any(hasattr(m, "together") for m in quantized.modules())


@pytest.mark.parametrize("what", ["another model", "eos_rate"])
def test_what_follows_training_gets_the_memory_of_recorded_passes(what, tiny_model):
    """Of all models: what comes after training needs the memory. Their kinds and sizes stay, so that a pass can be recorded
    again (tests/test_gpu.py)."""
    class Pass:
        pass
    model = common.load_model(tiny_model)
    some = [fast.graphs.Recordings(torch.nn.Linear(2, 2)) for _ in range(2)]
    for recordings in some:
        recordings.passes["size"], _ = Pass(), recordings.kinds.add("kind")
        recordings.sizes.add(7)
    kept = weakref.ref(some[0].passes["size"])
    if what == "another model":
        common.load_model(tiny_model)
    else:
        common.eos_rate(model, chat.load_tokenizer(tiny_model), [[5, 6, 7]], 2)
    assert kept() is None and all((r.passes, r.kinds, r.sizes) == ({}, {"kind"}, {7}) for r in some)


def test_flat_parameters_are_the_policys_own(tiny_model):
    """One tensor of all factors: values and gradients of the modules are its parts, before and after a step."""
    policy, plain, (pk,) = ours(tiny_model), ours(tiny_model), fast.pack(random_examples(4), 512)
    flat = common.flat_parameters(policy)
    for model in (policy, plain):
        for _ in range(2):  # gradients add up
            common.token_logprobs(model, pk).sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in common.trainable(plain)])
    assert torch.equal(flat.grad, wanted) and wanted.abs().max() > 1
    torch.optim.SGD([flat], 0.01).step()
    torch.optim.SGD(common.trainable(plain), 0.01).step()
    assert torch.equal(flat, torch.cat([p.detach().flatten() for p in common.trainable(plain)]))
    with torch.no_grad():
        assert torch.equal(common.token_logprobs(policy, pk), common.token_logprobs(plain, pk))
    flat.grad.zero_()
    assert all((p.grad == 0).all() for p in common.trainable(policy))


def test_packs_are_filled_up_by_little():
    for tokens in (1, 255, 256, 257, 4096, 4097, 8191, 8192, 9000, 30000, 65537):
        filled = fast.graphs.padded_tokens(tokens)
        assert tokens <= filled < tokens + max(256, tokens / 16) and fast.graphs.padded_tokens(filled) == filled
    assert len({fast.graphs.padded_tokens(n) for n in range(4096, 32768)}) <= 50  # so many graphs at most


def check_filled(size, pk):
    """A pack in a static pack of this size is as it was; the spare sequences have all padding tokens and keys, each at least
    as many keys as tokens, and none is longer than the static pack says."""
    static, kept = size.empty("cpu"), len(pk.cu_seqlens)
    fast.graphs.fill(static, pk)
    own = static.cu_seqlens.diff()
    assert torch.equal(static.cu_seqlens[:kept], pk.cu_seqlens) and static.cu_seqlens[-1] == size.tokens
    assert torch.equal(static.input_ids[:, :pk.input_ids.shape[1]], pk.input_ids) and (static.keys is None) == (pk.keys is None)
    if pk.keys is not None:
        assert torch.equal(static.cu_seqlens_k[:kept], pk.cu_seqlens_k) and static.cu_seqlens_k[-1] == size.keys
        assert torch.equal(static.keys[:len(pk.keys)], pk.keys) and static.keys.max() < size.tokens
        own, fewer = static.cu_seqlens_k.diff(), own
        assert (fewer <= own).all()
    assert 0 <= own.min() and own.max() <= size.longest == static.max_length


def test_a_static_pack_holds_what_its_size_says():
    """Random packs, most of them sharing tokens, in static packs of their own size and of random sizes that just hold them or
    just do not."""
    g, held, refused = random.Random(0), 0, 0
    for _ in range(60):
        copies, longest = g.choice((1, 1, 2, 8, 20)), g.choice((60, 300, 1500))
        prompts = [[g.randrange(3, 300)] * g.randrange(1, longest) for _ in range(g.randrange(1, 30))]
        examples = [Example(p + [5 + i] * g.randrange(1, 60), [], []) for p in prompts for i in range(copies)]
        for pk in fast.pack(examples, g.choice((4096, 8192, 40_000)), share=True):
            own, (tokens, n) = fast.graphs.GraphSize.exact(pk).padded(), (pk.input_ids.shape[1], len(pk.examples))
            assert own.holds(fast.graphs.GraphSize.exact(pk))
            check_filled(own, pk)
            static = own.empty("cpu")
            fast.graphs.fill(static, fast.graphs.empty_pack_like(pk))  # padding alone
            for cu, total in ((static.cu_seqlens, own.tokens), (static.cu_seqlens_k, own.keys)) if own.keys else \
                    ((static.cu_seqlens, own.tokens),):
                assert cu[0] == 0 and cu[-1] == total and 0 <= cu.diff().min() and cu.diff().max() <= own.longest
            for _ in range(12):
                left = g.choice((0, 1, g.randrange(300), g.randrange(9000)))
                keys = 0 if pk.keys is None else len(pk.keys) + left + g.choice((-left, -1, 0, g.randrange(3000), g.randrange(9000)))
                size = fast.graphs.GraphSize(tokens + left, n + g.randrange(1, 24), g.choice((1024, 2048)), keys)
                if size.holds(fast.graphs.GraphSize.exact(pk)):
                    check_filled(size, pk)
                    held += 1
                    assert size.sequences - n >= fast.graphs.SPARE_SEQUENCES
                else:
                    refused += 1
            smaller = [own._replace(tokens=tokens - 1), own._replace(sequences=n + 3), own._replace(longest=pk.max_length - 1),
                       own._replace(keys=0 if own.keys else 5000)]
            assert not any(size.holds(fast.graphs.GraphSize.exact(pk)) for size in smaller)
    assert held > 300 and refused > 100


def test_a_size_is_recorded_when_filling_up_has_cost_more():
    """A larger padding bucket serves a pack until the padding so far has cost as much as a recording; then its own size is
    recorded."""
    recordings = fast.graphs.Recordings(torch.nn.Linear(10**4, 10**4, bias=False, device="meta"))  # 80,000 tokens' worth
    large, small = (fast.pack([Example(list(range(n)), [], [])], 8192)[0] for n in (3000, 1000))
    assert recordings.size_for(large) == fast.graphs.GraphSize.exact(large).padded()
    asked = 0
    while recordings.size_for(dataclasses.replace(small)) == fast.graphs.GraphSize.exact(large).padded():
        asked += 1
    assert asked == 80_000 // (3072 - 1024)
    assert recordings.size_for(small) == recordings.size_for(small) == fast.graphs.GraphSize.exact(small).padded()  # a pack keeps its bucket
    assert recordings.size_for(large) == fast.graphs.GraphSize.exact(large).padded()


@pytest.mark.parametrize("unit", [1, 2])
def test_packs_are_as_equal_as_they_can_be(unit):
    """No more of them than first-fit decreasing makes, none too large, and the largest not far above the mean."""
    for seed in range(20):
        examples = random_examples(16, seed, high=100)
        total = sum(len(e.ids) for e in examples)
        packs = fast.pack(examples, 400, unit=unit)
        sizes = [pk.input_ids.shape[1] for pk in packs]
        assert sum(sizes) == total and max(sizes) <= 400 and len(sizes) <= -(-total // (400 - unit * 99))
        assert max(sizes) <= total / len(sizes) + unit * 99


# -- FLOPs ----------------------------------------------------------------------------------------

CONFIG = Qwen2Config(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=256, attn_implementation="eager")


@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_that_torch_counts(backward):
    """Of a sequence of n tokens through transformers' eager modules; these compute all n² pairs, and ours n(n+1)/2."""
    n, model = 40, Qwen2ForCausalLM(CONFIG).requires_grad_(False)
    inputs = model.get_input_embeddings()(torch.randint(320, (1, n))).requires_grad_(backward)
    with FlopCounterMode(display=False) as counter:
        loss = model(inputs_embeds=inputs, use_cache=False).logits.sum()
        if backward:
            loss.backward()
    assert common.model_flops(CONFIG, n, n * n, n, backward) == counter.get_total_flops()


def test_a_step_counts_its_passes(tiny_model):
    policy, examples = ours(tiny_model), random_examples(5)
    (pk,) = fast.pack(examples, 1000)
    tokens, attended = sum(len(e.ids) for e in examples), sum(len(e.ids) * (len(e.ids) + 1) // 2 for e in examples)
    assert pk.attended == attended
    predicted, config, begin = sum(len(e.targets) for e in examples), common.base_of(policy).config, common.flops_done
    with torch.no_grad():
        common.token_logprobs(policy, pk)
    forward = common.flops_done - begin
    assert forward == common.model_flops(config, tokens, attended, predicted)
    common.token_logprobs(policy, pk).sum().backward()
    assert common.flops_done - begin - forward == common.model_flops(config, tokens, attended, predicted, backward=True)


@pytest.mark.parametrize("name, flops", [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
                                         ("NVIDIA A100-SXM4-80GB", 312e12), ("a CPU", None)])
def test_peaks(name, flops):
    assert common.peak_flops(name) == flops


# -- the benchmark --------------------------------------------------------------------------------

def test_the_benchmark_runs(tmp_path):
    """One workload of ours on a CPU: the file, its case, and a second call that keeps what it didn't run again."""
    out = tmp_path / "out"
    def bench(*flags):
        return subprocess.run([sys.executable, "bench/train.py", "--shape", "tiny", "--steps", "3", "--warm", "1", "--work",
                               str(tmp_path / "work"), "--out", str(out), *flags], cwd=REPO, capture_output=True, text=True)
    done = bench("--only", "reward", "--system", "rungs")
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.json")
    (case,) = json.loads(path.read_text())["cases"]
    assert (case["workload"], case["system"], case["steps"]) == ("reward", "rungs", 2) and case["tokens_per_s"] > 0
    assert "| reward | rungs |" in done.stdout
    done = bench("--only", "ppo-step", "--system", "trl-best")
    assert done.returncode == 0, done.stderr
    cases = json.loads(path.read_text())["cases"]
    assert [c["workload"] for c in cases] == ["reward", "ppo-step"] and cases[0] == case and "error" in cases[1]
    done = bench("--only", "reward", "--system", "rungs", "--gpus", "2")  # two processes, beside the case of one
    assert done.returncode == 0, done.stderr
    cases = json.loads(path.read_text())["cases"]
    assert [c["system"] for c in cases] == ["rungs", "rungs-x2", "trl-best"] and cases[1]["tokens_per_s"] > 0, cases


def test_the_parts_of_a_start(tmp_path, monkeypatch, capfd):
    """Imports in addition to those before, and sft.py to its first step: positive, and together less than the whole."""
    monkeypatch.syspath_prepend(str(REPO / "bench"))
    import start
    monkeypatch.setattr(start, "IMPORTS", {name: start.IMPORTS[name] for name in ("python", "torch")})  # the others take long
    start.main(start.Args(repeat=1, shape="tiny", work=str(tmp_path)))
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert list(found) == [*start.IMPORTS, "--help", "command_to_first_step", "first_step", "settings"]
    assert 0 < found["first_step"] < found["command_to_first_step"] and found["torch"] > 0.1 and found["python"] > 0
    assert found["--help"] > found["torch"] / 2
    with pytest.raises(SystemExit):
        start.timed(["-c", "raise OSError"], start.Args())


def test_why_a_process_failed(monkeypatch):
    """Its last line, be it before, beside or after the last state of a progress bar; of a long one the beginning."""
    monkeypatch.syspath_prepend(str(REPO / "bench"))
    import train
    assert train.run([sys.executable, "-c", f"raise MemoryError({'more ' * 99!r})"], 60)[1].startswith("exit 1: MemoryError")
    bar = "run:  80%|████    | 4/5 [00:00<?, ?step/s]"
    for text in (f"error: no memory\n{bar}\n", f"{bar}error: no memory\n", f"{bar}\r{bar}\nerror: no memory\n"):
        code = f"import sys; sys.stderr.write({text!r}); sys.exit(1)"
        assert train.run([sys.executable, "-c", code], 60) == ("", "exit 1: error: no memory")


def test_what_fits_on_a_card(tmp_path, monkeypatch):
    """On a CPU, where nothing limits it, a script fits at once. Running out of memory leads to fewer --micro-tokens; a larger
    card is tried with more than the smaller one holds; another failure ends the measurement. A run that is made again
    replaces the earlier."""
    monkeypatch.syspath_prepend(str(REPO / "bench"))
    import cards
    import train
    args = dict(shape="tiny", steps=2, work=str(tmp_path / "work"), out=str(tmp_path / "out"))
    device = common.hardware()["device"].lower().replace(" ", "-")
    common.write_json(tmp_path / "out" / f"{device}.json", {"runs": [
        {"shape": "tiny", "script": name, "limit_gib": 7, "micro_tokens": 8192, "fits": False} for name in ("sft", "dpo")]})
    cards.main(cards.Args(**args, script=("sft",), gb=(8, 12)))
    (path,) = (tmp_path / "out").glob("*.json")
    runs = json.loads(path.read_text())["runs"]
    assert [(r["script"], r["limit_gib"], r["fits"]) for r in runs] == [("dpo", 7, False), ("sft", 7, True)]
    assert "| sft.py | tiny | 8,192 |\n| dpo.py | tiny | – |\n" in (path.parent / "README.md").read_text()
    tried = {"sft.py": [], "reward.py": []}

    def small_cards(command, *more, **settings):
        """Scripts run out of memory above a quarter of 1,024 tokens per GiB."""
        name, limit = command[1], float(train.Gpus.mine.environment["RUNGS_GPU_GIB"])
        (tokens,) = [int(n) for flag, n in zip(command, command[1:]) if flag == "--micro-tokens"]
        tried[name].append((limit, tokens))
        if tokens < 1000:
            return "", f"exit 2: error: --micro-tokens {tokens} can't hold the longest pair, 1000 tokens; give at least 1000"
        return "", None if tokens <= 256 * limit else "exit 1: error: give a smaller --micro-tokens: … (OutOfMemoryError)"
    monkeypatch.setattr(train, "run", small_cards)
    monkeypatch.setattr(cards, "on_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (170 * 2**30, 170 * 2**30))
    monkeypatch.setattr(cards.workload, "make", lambda *given: None)
    with pytest.raises(SystemExit):  # two of 90 GiB don't go on it together
        cards.main(cards.Args(**args, gb=(40, 90), at_once=2))
    cards.main(cards.Args(**args, script=("sft", "reward"), gb=(3, 8, 12, 24, 40, 80), micro_tokens=(512, 4096, 2048, 1024),
                          at_once=2))
    wanted = [*((2, n) for n in (8192, 4096, 2048, 1024, 512)), *((7, n) for n in (8192, 4096, 2048, 1024)),
              *((11, n) for n in (8192, 4096, 2048)), (23, 8192), (23, 4096), (39, 8192)]
    assert tried == {"sft.py": wanted, "reward.py": wanted}
    runs = [r for r in json.loads(path.read_text())["runs"] if r["script"] == "reward"]
    assert [(r["limit_gib"], r["micro_tokens"]) for r in runs if r["fits"]] == [(7, 1024), (11, 2048), (23, 4096), (39, 8192)]
    assert all(r["steps"] == 0 and r["peak_gib"] is None and r["fits"] == (r["error"] is None) for r in runs)  # none ran
    common.write_json(path, {"device": "a card", "runs": [r | {"peak_gib": 1.26} for r in runs]})
    cards.write_tables(path.parent)
    text = (path.parent / "README.md").read_text()
    assert "| script | shape | 2 GiB | 7 GiB | 11 GiB | 23 GiB | 39 GiB |\n" in text
    assert "| reward.py | tiny | – | 1,024 (1.3) | 2,048 (1.3) | 4,096 (1.3) | 8,192 (1.3) |\n" in text
    begun = []
    monkeypatch.setattr(train, "run", lambda command, *given, **settings: begun.append(command) or ("", "exit 2: error: no such file"))
    with pytest.raises(SystemExit):
        cards.main(cards.Args(**args, script=("sft", "reward")))
    assert len(begun) == 1


def test_the_table_of_speeds(tmp_path, monkeypatch):
    """Without a workload nothing is measured, and README.md beside the records is written again; ratios by hand."""
    monkeypatch.syspath_prepend(str(REPO / "bench"))
    import train
    sft = {"workload": "sft-bf16", "mfu": 0.41}
    cases = [sft | {"system": "rungs", "tokens_per_s": 100_000.4, "peak_gib": 12, "grad_norm": 1.234,
                    "settings": {"script": "sft", "flags": ""}},
             sft | {"system": "trl-default", "tokens_per_s": 20_000, "peak_gib": 30.14, "mfu": 0.081,
                    "settings": {"batch": 8, "use_liger": False}, "note": "of another day"},
             {"workload": "dpo", "system": "trl-best", "error": "no trainer"},
             {"workload": "ppo-step", "system": "rungs", "tokens_per_s": 5000, "median_ms": 1954.0, "rollout_s": 0.8, "update_s": 1.5}]
    common.write_json(tmp_path / "h100.json", {"device": "an H100", "cases": cases})
    train.main(train.Args(only=(), out=str(tmp_path)))
    text = (tmp_path / "README.md").read_text()
    assert [line for line in text.split("## an H100")[1].splitlines() if line.startswith("| ")][2:] == [
        "| sft-bf16 | rungs | default | 100,000 |  | 12.0 | 41.0% | 1.2 |  |",
        "| sft-bf16 | trl-default | batch=8, use_liger=False | 20,000 | 5.00 × | 30.1 | 8.1% | – |  |",
        "| dpo | trl-best | default | – |  | – | – | – | no trainer |",
        "| ppo-step | rungs | default | 5,000 |  | – | – | – | rollout 0.8 s, update 1.5 s; median step 1.95 s |"]
    assert text.endswith("\n\nsft-bf16, trl-default: of another day\n")
    train.write_tables(tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    committed = REPO / "results" / "bench"
    copied = [common.write_json(tmp_path / "again" / path.name, common.read_json(path)) for path in committed.glob("*.json")]
    train.write_tables(tmp_path / "again")
    assert copied and (tmp_path / "again" / "README.md").read_text() == (committed / "README.md").read_text()


def test_the_chart_of_costs_is_drawn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "bench"))
    monkeypatch.chdir(tmp_path)
    import linear
    monkeypatch.setattr(linear, "VARIED", {"micro_tokens": (64, 128), "length": (16, 32), "rows": (1, 2)})
    linear.main(linear.Args(shape="tiny", micro_tokens=128, length=32, rows=4, out=str(tmp_path)))
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert [[p[name] for p in found[name]] for name in linear.VARIED] == [[64, 128], [16, 32], [1, 2]]
    assert [p["rows"] for p in found["length"]] == [8, 4] and all(p["tokens_per_s"] > 0 for p in found["rows"])
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
