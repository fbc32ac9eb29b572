"""The sampler against transformers' generate, itself in other company, and the distributions that it draws from.

fp32 on a CPU, where its step is the one that CUDA graphs capture; tests/test_gpu.py has the graphs.
"""
import copy
import importlib
import json
import shutil
from collections import Counter

import pytest
import scipy.stats
import torch
from conftest import make_tokenizer, sentence
from peft import PeftModel
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

import chat
import common
import fast
from common import Example, Sampler

CLOSE = dict(rtol=1e-5, atol=1e-5)


def plain_model(directory, dtype=torch.float32):
    """The model as anyone would load it: eager attention, nothing of ours."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


# -- noise -------------------------------------------------------------------------------------------

def noise(seeds, rows, positions):
    """[seeds, rows, positions] of keyed_uniform."""
    r = torch.arange(rows)
    return torch.stack([torch.stack([common.keyed_uniform(s, r, p) for p in range(positions)], 1) for s in range(seeds)])


def test_keyed_uniform_is_uniform_and_distinct():
    u = noise(20, 100, 50)
    assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    assert scipy.stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    for axis in ((0, 0, slice(None)), (0, slice(None), 0), (slice(None), 0, 0)):  # along each key alone
        assert scipy.stats.kstest(u[axis].numpy(), "uniform").pvalue > 1e-3
    assert u.flatten().unique().numel() == u.numel()  # no (seed, row, position) shares its noise with another
    assert scipy.stats.kstest((u.flatten() * 2**30 % 1).numpy(), "uniform").pvalue > 1e-3  # its low bits too


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_keyed_uniform_neighbours_are_independent(axis):
    """Pairs of neighbours along seed, row or position fill a 10 x 10 grid evenly (χ²), and so at distance 1 to 3."""
    u = noise(40, 60, 40)
    for distance in (1, 2, 3):
        a, b = u.narrow(axis, 0, u.shape[axis] - distance), u.narrow(axis, distance, u.shape[axis] - distance)
        cells = ((a * 10).long() * 10 + (b * 10).long()).flatten()
        assert scipy.stats.chisquare(torch.bincount(cells, minlength=100).numpy()).pvalue > 1e-3, distance


def test_keyed_uniform_ignores_the_company():
    rows = torch.tensor([7, 3, 1000, 0])
    together = common.keyed_uniform(5, rows, 9)
    for i, r in enumerate(rows):
        assert common.keyed_uniform(5, r[None], 9).item() == together[i].item()


# -- sampling ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def talker(sft_run, sft_args):
    """(our model, a plain one, tokenizer) of base + SFT, merged by us and by PEFT: it ends some answers with EOS."""
    plain = PeftModel.from_pretrained(plain_model(sft_args["model"]), sft_run).merge_and_unload().eval()
    return common.load_model(sft_args["model"], sft_run, dtype=torch.float32), plain, chat.load_tokenizer(
        sft_args["model"])


@pytest.fixture(scope="module")
def prompts(talker):
    g = torch.Generator().manual_seed(8)
    return [chat.render_prompt(talker[2], [{"role": "user", "content": sentence(g, 1 + i)}]) for i in range(12)]


def greedy(plain, prompt, budget, eos):
    """transformers' generate on one prompt, everything explicit."""
    out = plain.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                         do_sample=False, num_beams=1, max_new_tokens=budget, eos_token_id=eos, pad_token_id=eos,
                         repetition_penalty=1.0, use_cache=True)
    return out[0, len(prompt):].tolist()


def test_greedy_equals_transformers_generate(talker, prompts):
    """Ragged prompts, a budget each; rows leave at EOS at different times, so the batch shrinks under the others."""
    model, plain, tokenizer = talker
    budgets = [40 - 3 * (i % 5) for i in range(len(prompts))]
    expected = [greedy(plain, p, b, tokenizer.eos_token_id) for p, b in zip(prompts, budgets)]
    lengths = sorted(map(len, expected))
    assert lengths[len(lengths) // 2] <= lengths[-1] // 2 and len(set(map(len, prompts))) > 6
    kinds = {e[-1] == tokenizer.eos_token_id for e in expected}
    assert kinds == {True, False}  # some stop at EOS, some at their budget
    for max_batch in (None, 5, 1):
        done = Sampler(model, tokenizer, max_batch).sample(prompts, budgets)
        assert [c.ids for c in done] == expected
        for c, b in zip(done, budgets):
            assert c.stopped == ("eos" if c.ids[-1] == tokenizer.eos_token_id else "length")
            assert c.stopped == "eos" or len(c.ids) == b
            assert c.text == tokenizer.decode([t for t in c.ids if t != tokenizer.eos_token_id])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_every_known_decoder_equals_transformers(kind, tmp_path):
    """With biases and norms that matter; log-probabilities are those of transformers' full logits."""
    tokenizer = make_tokenizer(tmp_path)
    shape = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=6 if kind == "qwen3" else 4, num_key_value_heads=2, max_position_embeddings=512,
                 initializer_range=0.1, tie_word_embeddings=kind != "llama")
    torch.manual_seed(1)
    model = {"llama": lambda: LlamaForCausalLM(LlamaConfig(**shape, attention_bias=True, mlp_bias=True)),
             "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape)),
             "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16))}[kind]().float().eval()
    changed = [p.data.normal_(1.0 if "norm" in n else 0.0, 0.3) for n, p in model.named_parameters()
               if "norm" in n or n.endswith("bias")]
    assert len(changed) == {"llama": 5 + 14, "qwen2": 5 + 6, "qwen3": 5 + 4}[kind]
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, len(tokenizer), (n,), generator=g).tolist() for n in (3, 1, 40, 11, 2)]
    for p, c in zip(prompts, Sampler(model, tokenizer).sample(prompts, 24)):
        assert c.ids == greedy(model, p, 24, tokenizer.eos_token_id)
        logits = model(torch.tensor([p + c.ids])).logits[0, len(p) - 1:-1].double()
        found = logits.log_softmax(1).gather(1, torch.tensor(c.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(c.logprobs, dtype=torch.double), found, **CLOSE)


def test_greedy_with_an_adapter(sft_run, sft_args, talker, prompts):
    _, plain, tokenizer = talker
    policy = common.attach_adapter(common.load_model(sft_args["model"], dtype=torch.float32), sft_run)
    done = Sampler(policy, tokenizer).sample(prompts[:4], 12)
    assert [c.ids for c in done] == [greedy(plain, p, 12, tokenizer.eos_token_id) for p in prompts[:4]]


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.5])
def test_sampled_logprobs_are_the_recomputed_ones(talker, prompts, temperature):
    """At temperature 0 they are those at temperature 1."""
    model, _, tokenizer = talker
    done = Sampler(model, tokenizer).sample(prompts, 20, temperature=temperature, seed=1)
    examples = [Example.masked(p + c.ids, [False] * len(p) + [True] * len(c.ids)) for p, c in zip(prompts, done)]
    for pack in fast.pack(examples, 10_000):
        found = common.token_logprobs(model, pack, temperature or 1.0)
        given = torch.tensor([x for i in pack.examples for x in done[i].logprobs])
        torch.testing.assert_close(given, found, **CLOSE)


def next_probabilities(plain, prompt, temperature):
    with torch.no_grad():
        return torch.softmax(plain(torch.tensor([prompt])).logits[0, -1].double() / temperature, -1)


def fits(counts, probabilities, n):
    """p-value of a χ² test of counts {token: count} against probabilities, cells of under five expected pooled."""
    seen, wanted, rest_seen, rest_wanted = [], [], 0, 0.0
    for token, p in enumerate(probabilities.tolist()):
        if n * p >= 5:
            seen.append(counts[token])
            wanted.append(n * p)
        else:
            rest_seen += counts[token]
            rest_wanted += n * p
    if rest_wanted > 1:
        seen.append(rest_seen)
        wanted.append(rest_wanted)
    scale = sum(seen) / sum(wanted)  # a rest of under one expected count is left out
    assert len(seen) > 5
    return scipy.stats.chisquare(seen, [w * scale for w in wanted]).pvalue


def draw(model, tokenizer, prompt, temperature, top_p=1.0, seeds=30, rows=256):
    counts = Counter()
    for seed in range(seeds):
        done = Sampler(model, tokenizer).sample([prompt] * rows, 1, temperature, top_p=top_p, seed=seed)
        counts.update(c.ids[0] for c in done)
    return counts, seeds * rows


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampling_distribution(talker, prompts, temperature):
    model, plain, tokenizer = talker
    counts, n = draw(model, tokenizer, prompts[0], temperature)
    assert fits(counts, next_probabilities(plain, prompts[0], temperature), n) > 1e-3
    assert fits(counts, next_probabilities(plain, prompts[0], temperature * 1.4), n) < 1e-6  # the test has power


def test_second_token_has_noise_of_its_own(talker, prompts):
    """Among rows whose first token is the same, the second follows the model's distribution after it."""
    model, plain, tokenizer = talker
    seconds = {}
    for seed in range(10):
        for c in Sampler(model, tokenizer).sample([prompts[0]] * 1000, 2, 0.4, seed=seed):
            if len(c.ids) == 2:
                seconds.setdefault(c.ids[0], Counter())[c.ids[1]] += 1
    first = max(seconds, key=lambda t: seconds[t].total())
    n = seconds[first].total()
    assert n > 500
    assert fits(seconds[first], next_probabilities(plain, prompts[0] + [first], 0.4), n) > 1e-3


def test_top_p_keeps_the_smallest_set_and_its_proportions(talker, prompts):
    model, plain, tokenizer = talker
    probabilities = next_probabilities(plain, prompts[0], 0.5)
    nucleus, mass = set(), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if mass >= 0.4:
            break
        nucleus.add(token)
        mass += probabilities[token].item()
    assert 5 < len(nucleus) < 100
    counts, n = draw(model, tokenizer, prompts[0], 0.5, top_p=0.4)
    assert set(counts) == nucleus
    kept = torch.tensor([p if t in nucleus else 0.0 for t, p in enumerate(probabilities.tolist())])
    assert fits(counts, kept / kept.sum(), n) > 1e-3
    only_best, _ = draw(model, tokenizer, prompts[0], 1.0, top_p=1e-6, seeds=1)
    assert set(only_best) == {int(probabilities.argmax())}


def test_top_p_boundary_is_exact():
    """Masses 1/2, 1/4, 1/8, 1/8: top_p 0.5 keeps one token, 0.51 two, 0.75 two, 0.76 three."""
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25]).log().expand(4096, 4)
    for top_p, kept in ((0.5, {1}), (0.51, {1, 3}), (0.75, {1, 3}), (0.76, {0, 1, 3}), (1.0, {0, 1, 2, 3})):
        token, logprobs = common.choose(logits, 1.0, 0, torch.arange(4096), 0, top_p)
        assert set(token.tolist()) == kept
        torch.testing.assert_close(logprobs, logits[torch.arange(4096), token])  # of the whole softmax, not renormalised


def test_a_rows_sample_does_not_depend_on_its_neighbours(talker, prompts):
    model, _, tokenizer = talker
    sampler = Sampler(model, tokenizer)
    alone = sampler.sample(prompts, 20, 0.9, seed=4)
    other = sampler.sample([*reversed(prompts[:3]), prompts[3], *[prompts[0]] * 6], 20, 0.9, seed=4)
    assert other[3].ids == alone[3].ids
    assert sampler.sample(prompts[:4], 20, 0.9, seed=4)[3].ids == alone[3].ids
    assert other[0].ids != alone[0].ids
    for max_batch in (1, 5):
        same = Sampler(model, tokenizer, max_batch).sample(prompts, 20, 0.9, seed=4)
        assert [c.ids for c in same] == [c.ids for c in alone]
    shorter = sampler.sample(prompts, [20 if i == 3 else 2 for i in range(12)], 0.9, seed=4)
    assert shorter[3].ids == alone[3].ids  # its neighbours leave at once
    assert [c.ids for c in shorter[:3]] == [c.ids[:2] for c in alone[:3]]
    assert [c.ids for c in sampler.sample(prompts, 20, 0.9, seed=5)] != [c.ids for c in alone]
    twins = sampler.sample([prompts[0]] * 8, 20, 0.9, seed=6)
    assert len({tuple(c.ids) for c in twins}) == 8  # equal prompts, different rows


def test_stop_strings(talker, prompts):
    """Each row stops at the first token that completes a stop string (a special token too), and its text ends before it."""
    model, _, tokenizer = talker
    free = Sampler(model, tokenizer).sample(prompts, 30, 1.0, seed=2)
    stops = []
    for i, c in enumerate(free):  # a piece from the middle of what the row says, one that never comes, or none
        middle = len(c.text) // 2
        stops.append([[c.text[middle:middle + 1 + i % 4], "no such text"], ["no such text"], []][i % 3]
                     if c.text[middle:] else [])
    done = Sampler(model, tokenizer).sample(prompts, 30, 1.0, seed=2, stop_strings=stops)
    stopped = 0
    for c, f, stop in zip(done, free, stops):
        expected, cut = f.ids, f.text
        for k in range(1, len(f.ids) + 1):
            so_far = tokenizer.decode(f.ids[:k], skip_special_tokens=True)
            if f.ids[k - 1] != tokenizer.eos_token_id and any(s in tokenizer.decode(f.ids[:k]) for s in stop):
                expected, cut = f.ids[:k], min((so_far.split(s)[0] for s in stop), key=len)
                break
        assert c.ids == expected and c.text == cut and len(c.logprobs) == len(c.ids)
        assert (c.stopped == "string") == (expected != f.ids or cut != f.text)
        stopped += c.stopped == "string"
    assert stopped >= 3
    assert [c.stopped == "string" for c in done].count(False) >= 6


@pytest.mark.parametrize("stop, said", [
    ("<|endoftext|>", "one two"),  # a special token, which the text then lacks
    ("日本語日本語日本", "one two"),
])
def test_stop_string_of_many_bytes_or_a_special_token(talker, stop, said):
    """A row that says `said` and then the stop string, one token a byte, ends there and not before."""
    model, _, tokenizer = talker
    sampler, ids = Sampler(model, tokenizer), []
    for part in (said, stop):
        ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    n = len(ids)
    for k in range(n):  # token by token, and all at once after the first k, with more to come
        assert sampler._ended(ids[:k], ids[k:k + 1], 1000, [stop]) == (1, None if k < n - 1 else "string")
        assert sampler._ended(ids[:k], ids[k:] + ids, 1000, [stop]) == (n - k, "string")
    assert sampler._text(ids, [stop]) == said


def test_budgets_and_bad_prompts(talker, prompts):
    model, _, tokenizer = talker
    sampler, given = Sampler(model, tokenizer), copy.deepcopy(prompts)
    budgets = [1 + i for i in range(12)]
    finished = []
    done = sampler.sample(prompts, budgets, 2.0, seed=3, progress=finished.append)
    assert all(len(c.ids) == b or c.stopped == "eos" for c, b in zip(done, budgets))
    assert all(len(c.ids) <= b for c, b in zip(done, budgets)) and done[0].stopped in ("eos", "length")
    assert sum(finished) == 12
    assert prompts == given and budgets == [1 + i for i in range(12)]  # nothing of the caller's is changed
    assert sampler.sample([], 5) == []
    with pytest.raises(ValueError, match="prompt 1"):
        sampler.sample([[5], []], 5)
    with pytest.raises(ValueError, match="512 positions"):
        sampler.sample([[5] * 500], 13)
    assert len(sampler.sample([[5] * 500], 12, 1.0)[0].ids) <= 12


def test_generation_config_is_ignored(tiny_model, tmp_path):
    """A generation_config.json that turns transformers' own generate upside down changes nothing here."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    tokenizer = chat.load_tokenizer(tiny_model)
    prompts = [[5, 6, 7], [9, 10], [300, 20, 41, 8]]
    plain = plain_model(tiny_model)
    usual = [greedy(plain, p, 12, tokenizer.eos_token_id) for p in prompts]
    (directory / "generation_config.json").write_text(json.dumps(
        {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.01, "repetition_penalty": 50.0, "max_length": 6,
         "eos_token_id": [t for u in usual for t in u[:2]], "no_repeat_ngram_size": 1, "min_new_tokens": 4}))
    changed = plain_model(directory)
    assert changed.generation_config.top_k == 1
    theirs = [changed.generate(torch.tensor([p]), max_new_tokens=12)[0, len(p):].tolist() for p in prompts]
    assert theirs != usual  # it would matter
    for temperature in (0.0, 1.0):
        with_config, without = (
            Sampler(common.load_model(d, dtype=torch.float32), tokenizer).sample(prompts, 12, temperature, seed=6)
            for d in (directory, tiny_model))
        assert with_config == without
        assert temperature or [c.ids for c in without] == usual


# -- the sampler's weights ---------------------------------------------------------------------------

def weights(sampler):
    return [t for t in torch.utils._pytree.tree_leaves(sampler.decoder.layers) if isinstance(t, torch.Tensor)]


def perturb(policy, generator):
    """Move the trained parameters by a little."""
    for p in common.trainable(policy):
        p.data += 0.02 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_refreshes_leave_no_trace(tiny_model, tmp_path, dtype):
    """After 100 changed policies the weights are a fresh sampler's to the bit, in the places they had at first."""
    tokenizer, g = chat.load_tokenizer(tiny_model), torch.Generator().manual_seed(0)
    policy = common.add_lora(common.load_model(tiny_model, dtype=dtype))
    sampler = Sampler(policy, tokenizer)
    first, places = copy.deepcopy(weights(sampler)), [t.data_ptr() for t in weights(sampler)]
    original = copy.deepcopy(policy.get_base_model().state_dict())
    for _ in range(100):
        perturb(policy, g)
        sampler.refresh(policy)
    fresh = weights(Sampler(policy, tokenizer))
    assert len(fresh) == len(first) == 2 * 10  # two norms, and of four projections [W; A] and B
    assert all(torch.equal(a, b) for a, b in zip(weights(sampler), fresh))
    assert sum(not torch.equal(a, b) for a, b in zip(first, fresh)) == 2 * 8
    assert [t.data_ptr() for t in weights(sampler)] == places
    state = policy.get_base_model().state_dict()
    assert all(torch.equal(w, original[n]) for n, w in state.items() if "lora" not in n)  # the policy's are its own
    with common.reference(policy):  # the adapter is off, and the next refresh has it again
        sampler.refresh(policy)
    base = weights(Sampler(common.load_model(tiny_model, dtype=dtype), tokenizer))
    assert all(torch.equal(a, b) for a, b in zip(weights(sampler), base)) and len(weights(sampler)) == len(base)
    sampler.refresh(policy)
    assert all(torch.equal(a, b) for a, b in zip(weights(sampler), fresh))


def test_a_refresh_computes_what_has_changed(tiny_model, monkeypatch):
    """The base's fused weights are computed once, while the adapter changes. A base weight that is changed in place, or
    replaced, is taken over; and an adapter of a smaller rank, padded to the same, leaves nothing of the one before."""
    tokenizer, g, fused = chat.load_tokenizer(tiny_model), torch.Generator().manual_seed(0), []
    dequantized = fast.sampler.dequantized
    monkeypatch.setattr(fast.sampler, "dequantized", lambda w: fused.append(w) or dequantized(w))
    policy = common.add_lora(common.load_model(tiny_model), 16, 32)
    perturb(policy, g)
    sampler = Sampler(policy, tokenizer)

    def refreshed(policy):
        """How many weights a refresh computes; what they are is a fresh sampler's."""
        fused.clear()
        sampler.refresh(policy)
        count = len(fused)
        assert all(torch.equal(a, b) for a, b in zip(weights(sampler), weights(Sampler(policy, tokenizer)), strict=True))
        return count
    perturb(policy, g)
    assert refreshed(policy) == 0
    attention = common.base_of(policy).base_model.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.base_layer.weight.mul_(1.5)
    assert refreshed(policy) == 3  # of the projection q, k, v
    for _ in range(3):
        for _ in range(2):  # the second may come to lie where the first was before
            attention.o_proj.base_layer.weight.data = attention.o_proj.base_layer.weight * 1.01
        assert refreshed(policy) == 1
    small = common.add_lora(policy.unload(), 4, 8)
    perturb(small, g)
    assert refreshed(small) == 2 * 7
    assert refreshed(small) == 0
    nf4 = common.add_lora(common.load_model(tiny_model, quantization="nf4"))
    sampler = Sampler(nf4, tokenizer)
    perturb(nf4, g)
    assert refreshed(nf4) == 0


def test_what_no_adapter_touches_is_shared(tiny_model):
    policy = common.add_lora(common.load_model(tiny_model))
    sampler = Sampler(policy, chat.load_tokenizer(tiny_model))
    assert sampler.decoder.embedding is common.base_of(policy).get_input_embeddings().weight  # as are norms and head
    assert sampler.decoder.head is common.base_of(policy).get_output_embeddings()


def test_nf4_base_is_dequantized(tiny_model):
    """On an NF4 base, a random adapter: the weights are those of the dequantised base in bfloat16."""
    tokenizer, g = chat.load_tokenizer(tiny_model), torch.Generator().manual_seed(3)
    nf4 = common.load_model(tiny_model, quantization="nf4")
    plain = common.load_model(tiny_model)
    for name, module in nf4.named_modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            import bitsandbytes.functional
            plain.get_submodule(name).weight.data = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            assert state.dtype == torch.bfloat16
    policies = [common.add_lora(m) for m in (nf4, plain)]
    for p, q in zip(*map(common.trainable, policies)):
        p.data = q.data = 0.05 * torch.randn(p.shape, generator=g)
    a, b = (Sampler(m, tokenizer) for m in policies)
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))
    prompts = [[5, 6, 7], [9] * 20]
    assert a.sample(prompts, 8) == b.sample(prompts, 8)


def sampled_distribution(sampler, contexts):
    """log q of every token of the vocabulary after each context, [contexts, V], caught where the sampler applies the LM head."""
    logits = []
    with sampler.decoder.head.register_forward_hook(lambda module, given, result: logits.append(result.detach().clone())):
        for context in contexts:
            sampler.sample([context], 1, temperature=1.0)
    return torch.cat(logits).double().log_softmax(1)


def kl(p, q):
    """KL(p ‖ q) of log-probabilities [contexts, V], mean over the contexts."""
    return (p.exp() * (p - q)).sum(1).mean().item()


@pytest.mark.parametrize("script", ["dpo", "kto", "ppo", "grpo"])
def test_what_samples_is_the_policy_that_is_trained(tiny_model, script):
    """After Adam steps at the script's own rate, from a base on the bfloat16 grid: KL(q ‖ π_θ) ≤ 0.02 KL(π_θ ‖ π_ref), over the
    whole vocabulary after the same contexts. A sampler of weights merged into bfloat16 must fail the same bound."""
    tokenizer, g = chat.load_tokenizer(tiny_model), torch.Generator().manual_seed(5)
    torch.manual_seed(1)
    model = common.load_model(tiny_model, dtype=torch.bfloat16).float()  # fp32 arithmetic on weights of the grid
    policy = common.add_lora(model)
    optimizer = torch.optim.Adam(common.trainable(policy), lr=importlib.import_module(script).Args.lr)
    contexts = [torch.randint(3, 300, (n,), generator=g).tolist() for n in (3, 9, 20, 31)]
    examples = [Example.completion(c, torch.randint(3, 300, (8,), generator=g).tolist()) for c in contexts]
    (pack,) = fast.pack(examples, 1000)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])  # answers 1 and 3 become likelier, 2 and 4 less likely
    for _ in range(2):
        logprobs = pack.sum_by_sequence(common.token_logprobs(policy, pack))
        (-(sign * logprobs).sum() / 8).backward()
        optimizer.step()
        optimizer.zero_grad()

    def distribution(model):
        with torch.no_grad():
            return torch.cat([model(torch.tensor([c])).logits[:, -1] for c in contexts]).double().log_softmax(1)
    trained = distribution(policy)
    with common.reference(policy):
        moved = kl(trained, distribution(policy))
    merged = copy.deepcopy(policy).merge_and_unload()
    for name, p in merged.named_parameters():
        p.data = p.data.bfloat16().float()
    gap, merged_gap = (kl(sampled_distribution(Sampler(m, tokenizer), contexts), trained) for m in (policy, merged))
    print(f"{script}: KL(π_θ‖π_ref) {moved:.2e}, KL(q‖π_θ) {gap:.2e}, with the adapter merged into bfloat16 {merged_gap:.2e}")
    assert moved > 1e-9 and gap <= 0.02 * moved < merged_gap


def test_bfloat16_sampler_is_nearer_to_the_trainer_than_a_merge(tiny_model):
    """In bfloat16 arithmetic, log-probabilities are nearer to the trainer's than those of weights that the adapter is merged into."""
    tokenizer, g = chat.load_tokenizer(tiny_model), torch.Generator().manual_seed(4)
    policy = common.add_lora(common.load_model(tiny_model))
    for p in common.trainable(policy):
        p.data = 0.05 * torch.randn(p.shape, generator=g)
    merged = copy.deepcopy(policy).merge_and_unload()
    prompts = [torch.randint(3, 300, (20,), generator=g).tolist() for _ in range(40)]
    gaps = []
    for model in (policy, merged):
        done = Sampler(model, tokenizer).sample(prompts, 12, 1.0, seed=2)
        (pack,) = fast.pack([Example.completion(p, c.ids) for p, c in zip(prompts, done)], 10_000)
        with torch.no_grad():
            trained = common.token_logprobs(policy, pack)
        sampled = torch.tensor([x for i in pack.examples for x in done[i].logprobs])
        gaps.append((sampled - trained).abs().mean().item())
    print("mean |log-prob gap| to the trainer, adapter beside the weights and merged:", gaps)
    assert gaps[0] < 0.8 * gaps[1] and gaps[1] < 0.1


# -- batches, buckets, buffers -----------------------------------------------------------------------

def cuda_buckets(rows):
    """As Sampler._bucket on CUDA, so that a CPU step has idle rows and live ones move."""
    return max(8, 1 << (rows - 1).bit_length())


def test_a_shared_prompt_is_computed_once(talker, prompts, monkeypatch):
    model, _, tokenizer = talker
    grouped, seen, attention = [p for p in prompts[:3] for _ in range(6)], [], fast.attention.packed_attention

    def record(q, *args):
        seen.append(len(q))
        return attention(q, *args)
    monkeypatch.setattr(fast.sampler, "packed_attention", record)
    done = Sampler(model, tokenizer).sample(grouped, 20, 0.9, seed=4)
    beginnings = {tuple(p[:n]) for p in prompts[:3] for n in range(1, len(p))}  # the three begin alike, too
    assert seen == [len(beginnings)] * len(model.model.layers)
    assert len(beginnings) < sum(len(p) - 1 for p in prompts[:3])
    seen.clear()
    few = Sampler(model, tokenizer)
    few.decoder.PREFILL_TOKENS = 1  # forwards of one prompt's length
    assert [c.ids for c in few.sample(grouped, 20, 0.9, seed=4)] == [c.ids for c in done]
    assert len(seen) > len(model.model.layers) and max(seen) <= max(len(p) - 1 for p in prompts[:3])
    for row in (0, 7, 17):
        (alone,) = Sampler(model, tokenizer).sample([grouped[row]], 20, 0.9, seed=4, rows=[row])
        assert alone.ids == done[row].ids
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(done[row].logprobs), **CLOSE)


@pytest.mark.parametrize("groups", [1, 6])
def test_padded_prompts_fill_the_cache_alike(talker, prompts, groups):
    """As CUDA's recorded passes take prompts: copied into a static pack of a larger size, which keeps an earlier batch's
    tokens where it is padded."""
    model, _, tokenizer = talker
    own, padded, sizes = Sampler(model, tokenizer), Sampler(model, tokenizer), set()
    padded.decoder.records_prompts = True
    for batch in (prompts[:9], prompts[3:5], prompts[5:], [prompts[2]]):
        grouped, longest = [p for p in batch for _ in range(groups)], max(map(len, batch)) + 20
        for sampler in (own, padded):
            sampler.decoder._reserve(12 * 6, 128)  # both keep one cache, which later batches overwrite
            for cache in sampler.decoder.cache:
                cache.zero_()
            sampler.decoder.begin(dict(enumerate(grouped)), dict(enumerate(range(99))), longest, 0.9, 1.0, seed=4)
        for a, b in zip(own.decoder.cache, padded.decoder.cache):
            assert (a != 0).any(-1).sum() == 2 * a.shape[2] * sum(len(p) - 1 for p in grouped)
            torch.testing.assert_close(a, b, **CLOSE)
        sizes |= {*padded.decoder.static_prompts}
    assert 1 <= len(sizes) < 4 and not own.decoder.static_prompts  # some batches share a size


@pytest.mark.parametrize("buckets", [None, cuda_buckets])
@pytest.mark.parametrize("readback", [1, 3, 16])
def test_rows_that_move_are_what_they_are_alone(talker, prompts, buckets, readback, monkeypatch):
    """40 rows of very different lengths: the batch shrinks 40 (64) -> 8 while some go on."""
    model, _, tokenizer = talker
    many, budgets = [prompts[i % 12] for i in range(40)], [1 + (i * 37) % 60 if i % 3 else 5 for i in range(40)]
    sampler, sizes = Sampler(model, tokenizer), []
    sampler.decoder.READBACK = readback
    if buckets:
        monkeypatch.setattr(sampler.decoder, "_bucket", buckets)
    compact = sampler.decoder._compact

    def record(size):
        sizes.append(size)
        return compact(size)
    monkeypatch.setattr(sampler.decoder, "_compact", record)
    done = sampler.sample(many, budgets, 0.9, seed=9)
    assert sizes == sorted(sizes, reverse=True) and len(sizes) >= 2 and sizes[-1] <= 8
    assert buckets is None or set(sizes) <= {8, 16, 32}
    for i in range(0, 40, 3 if readback == 16 else 13):
        (alone,) = Sampler(model, tokenizer).sample([many[i]], budgets[i], 0.9, seed=9, rows=[i])
        assert (alone.ids, alone.stopped, alone.text) == (done[i].ids, done[i].stopped, done[i].text)
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(done[i].logprobs), **CLOSE)


def test_shares_of_a_batch_are_the_batch(talker, prompts):
    """As ranks sample them: each a share of the prompts, with the rows' own keys."""
    model, _, tokenizer = talker
    whole = Sampler(model, tokenizer).sample(prompts, 20, 0.9, seed=4, top_p=0.95)
    for share in (range(0, 12, 2), range(1, 12, 2)):
        part = Sampler(model, tokenizer).sample([prompts[i] for i in share], 20, 0.9, seed=4, top_p=0.95, rows=share)
        assert [c.ids for c in part] == [whole[i].ids for i in share]


@pytest.mark.parametrize("readback", [1, 2, 5, 64])
def test_stop_strings_across_readbacks(talker, prompts, readback):
    model, _, tokenizer = talker
    free = Sampler(model, tokenizer).sample(prompts, 30, 1.0, seed=2)
    stops = [[c.text[len(c.text) // 2:][:4]] if len(c.text) > 8 else [] for c in free]
    expected = Sampler(model, tokenizer).sample(prompts, 30, 1.0, seed=2, stop_strings=stops)
    assert sum(c.stopped == "string" for c in expected) > 3
    sampler = Sampler(model, tokenizer)
    sampler.decoder.READBACK = readback
    done = sampler.sample(prompts, 30, 1.0, seed=2, stop_strings=stops)
    assert [(c.ids, c.stopped, c.text) for c in done] == [(c.ids, c.stopped, c.text) for c in expected]


def test_buffers_stay_between_calls(talker, prompts):
    """Calls of other sizes, one after another, give what fresh samplers give; only a larger one needs new buffers."""
    model, _, tokenizer = talker
    sampler, caches = Sampler(model, tokenizer), []
    for n, budget, kind in ((6, 20, {}), (12, 150, {"temperature": 0.9}), (2, 5, {}), (12, 30, {"temperature": 1.1}),
                            (1, 400, {}), (3, 9, {"temperature": 1.0, "top_p": 0.9})):
        got = sampler.sample(prompts[:n], budget, seed=n, **kind)
        fresh = Sampler(model, tokenizer).sample(prompts[:n], budget, seed=n, **kind)
        assert [c.ids for c in got] == [c.ids for c in fresh]
        caches.append(sampler.decoder.cache[0])  # kept: a new one could get the address of one that is freed
    assert [cache is caches[1] for cache in caches] == [False, True, True, True, True, True]
    size = sampler.decoder.cache[0].nbytes
    sampler.release()
    assert not sampler.decoder.cache and size > 0
    assert [c.ids for c in sampler.sample(prompts[:3], 9, 1.0, seed=3, top_p=0.9)] == [c.ids for c in got]


def test_a_batch_beyond_memory_is_split_and_said_once(talker, prompts, monkeypatch, capsys):
    model, _, tokenizer = talker
    whole, sampler = Sampler(model, tokenizer).sample(prompts, 20, 0.9, seed=4), Sampler(model, tokenizer)
    assert "note" not in capsys.readouterr().out
    row = 2 * 2 * 16 * 4 * 2 * 128 + 24 * model.config.vocab_size  # K and V, heads, d, bytes, layers, slots; choosing
    monkeypatch.setattr(sampler.decoder, "_free_memory", lambda: 5.5 * row)
    assert [c.ids for c in sampler.sample(prompts, 20, 0.9, seed=4)] == [c.ids for c in whole]
    assert capsys.readouterr().out.count("note: memory for 5 of 12 rows of 128 tokens") == 1
    sampler.sample(prompts, 20, 0.9, seed=4)
    monkeypatch.setattr(sampler.decoder, "_free_memory", lambda: 0.0)  # one row is always tried
    assert [c.ids for c in sampler.sample(prompts[:2], 20, 0.9, seed=4)] == [c.ids for c in whole[:2]]
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("shared, share", [(None, 0.4), ("1", 0.4), ("2", 0.4), ("4", 0.2)])
def test_evaluations_that_share_a_gpu_leave_memory_to_each_other(talker, monkeypatch, shared, share):
    """Of 100 GiB free 40 at most; of four at one time, each a fifth."""
    model, _, tokenizer = talker
    decoder = Sampler(model, tokenizer).decoder
    decoder.device = torch.device("cuda")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (100 << 30, 140 << 30))
    for name, value in (("get_per_process_memory_fraction", 1.0), ("memory_reserved", 0), ("memory_allocated", 0)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
    monkeypatch.delenv("RUNGS_GPU_SHARED", raising=False)
    if shared:
        monkeypatch.setenv("RUNGS_GPU_SHARED", shared)
    assert decoder._free_memory() == pytest.approx(share * (100 << 30))


# -- the choice of a token ---------------------------------------------------------------------------

@pytest.mark.parametrize("vocabulary", [3, 128, 300, 1000])
def test_choice_is_the_inverse_of_the_whole_distribution(vocabulary):
    """Block by block as by one cumulative sum over the vocabulary; impossible tokens never; the log-probability too."""
    g = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(2000, vocabulary, generator=g)
    logits[:, 1::3] -= 1000  # exp gives 0
    rows = torch.arange(2000)
    token, logprob = common.choose(logits, 0.7, 3, rows, 5)
    probs = (logits / 0.7 - (logits / 0.7).amax(1, keepdim=True)).exp().double()
    upto = probs.cumsum(1)
    expected = (upto < common.keyed_uniform(3, rows, 5)[:, None] * upto[:, -1:]).sum(1)
    assert (token != expected).sum() <= 1  # fp64 sums in another order
    assert (probs.gather(1, token[:, None]) > 0).all() and len(token.unique()) > 1
    torch.testing.assert_close(logprob, (logits / 0.7).log_softmax(1).gather(1, token[:, None])[:, 0], **CLOSE)


def test_greedy_choice_is_the_first_of_equals():
    logits = torch.zeros(3, 400)
    logits[0, [390, 200]], logits[1, [7, 300]] = 2.0, 5.0
    token, logprob = common.choose(logits, 1.0)
    assert token.tolist() == [200, 7, 0] == logits.argmax(1).tolist()
    torch.testing.assert_close(logprob, logits.log_softmax(1).amax(1), **CLOSE)


def test_the_share_of_wasted_tokens(tiny_model):
    """By hand, budgets of 1, 3 and 20 tokens that no EOS ends. Fast: three rows for 16 steps, one row for 4, of 52 computed
    tokens 24 are kept. Plain, prompts of one length: three rows for 20 steps. refresh() starts anew."""
    model, tokenizer = common.load_model(tiny_model, dtype=torch.float32), chat.load_tokenizer(tiny_model)
    for engine, computed in (("fast", 52), ("plain", 60)):
        model.__dict__["engine"] = engine
        sampler = Sampler(model, tokenizer)
        sampler.stop_ids = frozenset()
        sampler.sample([[5, 6]] * 3, [1, 3, 20])
        assert sampler.wasted() == pytest.approx(1 - 24 / computed), engine
        sampler.refresh(model)
        assert sampler.wasted() == 0
        sampler.sample([[5, 6]], [16])
        assert sampler.wasted() == 0
