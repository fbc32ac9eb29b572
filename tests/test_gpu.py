"""The GPU paths against the CPU's, on one GPU: `make gpu-check`. Without a GPU every test here is skipped."""
import json
import math
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

import chat
import common
import fast
from conftest import make_model, sharing_examples

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
REPO = Path(__file__).parent.parent


def sequence_of(pack):
    """[K] which of the pack's sequences each predicted token belongs to."""
    return torch.arange(len(pack.examples), device=pack.counts.device).repeat_interleave(pack.counts)


def packs(tokenizer, device, n=12):
    g = torch.Generator().manual_seed(1)
    examples = []
    for _ in range(n):
        ids = torch.randint(3, len(tokenizer), (int(torch.randint(5, 60, (1,), generator=g)),), generator=g).tolist()
        examples.append(common.Example.masked(ids, [True] * len(ids)))
    return fast.pack(examples, 512, unit=2, device=device)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model of head size 64 (varlen's kernels want it), in bf16 on the GPU and fp32 on the CPU."""
    directory = tmp_path_factory.mktemp("gpu")
    make_model(directory, hidden_size=256)
    tokenizer = chat.load_tokenizer(directory)
    gpu, cpu = (common.load_model(directory, None, "none", t, d) for t, d in
                ((torch.bfloat16, "cuda"), (torch.float32, "cpu")))
    return directory, tokenizer, gpu, cpu


def test_fp32_on_gpu_equals_cpu(pair):
    directory, tokenizer, _, cpu = pair
    gpu = common.load_model(directory, None, "none", torch.float32, "cuda")
    for a, b in zip(packs(tokenizer, "cuda"), packs(tokenizer, "cpu")):
        torch.testing.assert_close(common.token_logprobs(gpu, a).cpu(), common.token_logprobs(cpu, b), atol=1e-4, rtol=0)


def test_varlen_bf16_close_to_fp32(pair):
    _, tokenizer, gpu, cpu = pair
    gaps = torch.cat([common.token_logprobs(gpu, a).cpu() - common.token_logprobs(cpu, b)
                      for a, b in zip(packs(tokenizer, "cuda"), packs(tokenizer, "cpu"))]).abs()
    print("mean, max |log-prob gap|, bf16 varlen vs fp32:", gaps.mean().item(), gaps.max().item())
    assert gaps.mean() < 0.05 and gaps.max() < 0.5


def test_varlen_packed_equals_alone(pair):
    _, tokenizer, gpu, _ = pair
    for pk in packs(tokenizer, "cuda"):
        together, bounds = common.token_logprobs(gpu, pk), pk.cu_seqlens.tolist()
        for s, (a, b) in enumerate(zip(bounds, bounds[1:])):
            ids = pk.input_ids[0, a:b].tolist()
            alone = common.token_logprobs(gpu, fast.pack([common.Example.masked(ids, [True] * len(ids))], 512,
                                                           device="cuda")[0])
            torch.testing.assert_close(together[sequence_of(pk) == s], alone, atol=0.05, rtol=0)


def test_varlen_does_not_look_across(pair):
    _, tokenizer, gpu, _ = pair
    pk = packs(tokenizer, "cuda")[0]
    before = common.token_logprobs(gpu, pk)
    end = int(pk.cu_seqlens[1])
    pk.input_ids[0, :end] = pk.input_ids[0, :end].flip(0)
    after = common.token_logprobs(gpu, pk)
    assert torch.equal(before[sequence_of(pk) > 0], after[sequence_of(pk) > 0])
    assert not torch.equal(before[sequence_of(pk) == 0], after[sequence_of(pk) == 0])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_queries_stand_at_the_last_keys(dtype, tolerance):
    """Attention of a pack whose sequences share tokens, output and gradients, against fp32 on the CPU: lengths around the
    kernels' blocks of 64 and 128, and a sequence without a token of its own."""
    g, lengths = torch.Generator().manual_seed(0), [(300, 300), (1, 301), (0, 300), (130, 257), (63, 64), (64, 320), (5, 5)]
    own, all_of = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in zip(*lengths))
    first = [torch.arange(int(own[i]), int(own[i + 1])) for i in range(len(lengths))]  # places of own tokens
    keys = torch.cat([torch.cat([torch.arange(n - k), mine]) for (k, n), mine in zip(lengths, first)])
    given = [torch.randn(int(own[-1]), heads, 64, generator=g) for heads in (4, 2, 2, 4)]  # q, k, v and d loss / d out
    results = []
    for device, t in (("cpu", torch.float32), (DEVICE, dtype)):
        q, k, v, out_grad = (x.to(device, t, copy=True).requires_grad_() for x in given)
        out = fast.attention.packed_attention(q, k, v, own.to(device), 512, None, keys.to(device), all_of.to(device))
        out.backward(out_grad.detach())
        results.append([x.float().cpu() for x in (out.detach(), q.grad, k.grad, v.grad)])
    for name, a, b in zip(("out", "q", "k", "v"), *results):
        error = ((a - b).norm() / a.norm()).item()
        print(dtype, name, "relative error", error)
        assert error < tolerance


def test_shared_packs_equal_unshared(pair):
    """Log-probabilities of sequences that share what they begin with: fp32 to rounding, bf16 no further from it than
    ordinary packs are."""
    directory, _, gpu, cpu = pair
    exact, examples = common.load_model(directory, None, "none", torch.float32, DEVICE), sharing_examples(seed=3)

    def logprobs(model, device, share):
        found = {}
        for pk in fast.pack(examples, 200, device=device, share=share):
            with torch.no_grad():
                found |= dict(zip(pk.examples, common.token_logprobs(model, pk).cpu().split(pk.counts.tolist())))
        return torch.cat([found[i] for i in range(len(examples))])
    expected = logprobs(cpu, "cpu", False)
    torch.testing.assert_close(logprobs(exact, DEVICE, True), expected, atol=1e-4, rtol=0)
    plain, shared = ((logprobs(gpu, DEVICE, share) - expected).abs() for share in (False, True))
    print("mean, max |log-prob gap| to fp32, bf16: plain", plain.mean(), plain.max(), "shared", shared.mean(), shared.max())
    assert shared.mean() < 1.2 * plain.mean() + 1e-3 and shared.max() < 0.5


def test_compiled_close_to_plain(pair):
    directory, tokenizer, _, _ = pair
    results = []
    for dtype, compiled in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        torch.manual_seed(0)
        policy = common.add_lora(common.load_model(directory, None, "none", dtype, "cuda"))
        for n, p in policy.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.02)
        if compiled:
            fast.compile_layers(common.base_of(policy))
        out = []
        for pk in packs(tokenizer, "cuda"):
            logprobs = common.token_logprobs(policy, pk)
            logprobs.sum().backward()
            out.append(logprobs.detach())
        results.append((torch.cat(out), torch.cat([p.grad.flatten() for p in common.trainable(policy)])))
    (exact, g), (plain, gp), (compiled, gc) = results
    gaps = [(x - exact).abs().mean().item() for x in (plain, compiled)]
    angles = [torch.nn.functional.cosine_similarity(x, g, 0).item() for x in (gp, gc)]
    print("bf16 plain, compiled against fp32: mean |log-prob gap|", gaps, "gradient cosine", angles)
    assert gaps[1] < 1.2 * gaps[0] + 1e-3          # compilation adds no error to that of bf16
    assert angles[1] > angles[0] - 0.005


def test_the_first_pass_of_a_kind_takes_little_memory(pair, monkeypatch):
    """Beside what the recorded pass over a large pack holds: a model's first one has few tokens; that of another kind takes the
    memory of those that are recorded. Passes that are given up free it, and are recorded again."""
    policy = common.add_lora(common.load_model(pair[0], None, "none", torch.bfloat16, "cuda"))
    base, _ = common.base_of(policy), common.flat_parameters(policy)
    examples = [common.Example.masked([5, 6] * 256, [True] * 512) for _ in range(64)]
    (pk,) = fast.pack(examples, 32768, device="cuda", share=False)
    for name, value in (("alive", weakref.WeakSet()), ("pool", None), ("stream", None), ("held", 0)):  # as in a new process
        monkeypatch.setattr(fast.graphs.Recordings, name, value)
    warm_up, taken = fast.graphs.RecordedPass.warm_up, []

    def watched(*given):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        warm_up(*given)
        taken.append(torch.cuda.max_memory_allocated() - before)
    monkeypatch.setattr(fast.graphs.RecordedPass, "warm_up", watched)
    fast.hidden_states(base, pk).sum().backward()
    held = fast.graphs.Recordings.held
    print("the recorded pass holds", held, "bytes, the first took", taken)
    assert pk.tokens == 32768 and len(taken) == 1 and taken[0] < held / 2

    monkeypatch.setattr(fast.graphs, "WARM_UP_TOKENS", 16384)  # the second kind's first pass takes the graphs' memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    with common.reference(policy):
        fast.hidden_states(base, pk)
    grown = torch.cuda.max_memory_reserved() - before
    print("a second kind takes", grown, "bytes more")
    assert len(taken) == 2 and grown < held / 4

    with torch.no_grad():
        first, before = fast.hidden_states(base, pk), torch.cuda.memory_reserved()
        fast.give_up_passes()
        print("giving up the passes frees", before - torch.cuda.memory_reserved(), "bytes")
        assert not fast.graphs.Recordings.alive and before - torch.cuda.memory_reserved() > held / 2
        assert torch.equal(fast.hidden_states(base, pk), first) and fast.graphs.Recordings.alive


def test_recorded_passes_equal_plain_ones(pair):
    """Packs of many sizes, first recorded, then replayed after the factors moved: hidden states, log-probs and gradients as
    of the decoder itself; a pass whose backward is still to come is not overwritten by others."""
    directory, tokenizer, _, _ = pair
    policy = common.add_head(common.add_lora(common.load_model(directory, None, "none", torch.bfloat16, "cuda")), 0)
    base, g, flat = common.base_of(policy), torch.Generator().manual_seed(1), common.flat_parameters(policy)
    fast.compile_layers(common.base_of(policy))
    sizes = [[100, 30, 7], [500], [200] * 6, [90, 40, 3], [40] * 20]
    examples = [[common.Example.completion([5, 6], torch.randint(3, 300, (n,), generator=g).tolist()) for n in ns] for ns in sizes]
    all_packs = [fast.pack(e, 4096, device="cuda")[0] for e in examples]
    for n, each in ((20, 2), (3, 8), (9, 8)):  # answers to one prompt, which is there once
        prompts = torch.randint(3, 300, (n, 70), generator=g).tolist()
        answers = [common.Example.completion(p, [5 + i] * (20 + 7 * i)) for p in prompts for i in range(each)]
        all_packs += fast.pack(answers, 4096, each, device="cuda", share=True)
    assert sum(pk.keys is not None for pk in all_packs) == 3

    def plain(pk):
        hidden = fast.decoder.decoder(common.base_of(policy), pk, compile=True)
        (hidden.float() * weight[:len(hidden)]).sum().backward()
        return hidden.detach(), gradient()

    def gradient():
        found = flat.grad.clone()
        flat.grad.zero_()
        return found

    weight = torch.randn(4096, base.config.hidden_size, device="cuda")
    for _ in range(3):
        flat.data += 0.02 * torch.randn(flat.shape, generator=g).to("cuda")
        for pk in all_packs:
            with torch.no_grad(), common.reference(policy):
                torch.testing.assert_close(fast.hidden_states(common.base_of(policy), pk), fast.decoder.decoder(common.base_of(policy), pk, compile=True), atol=0.1, rtol=0.05)
            hidden = fast.hidden_states(common.base_of(policy), pk)
            with torch.no_grad():
                other = fast.hidden_states(common.base_of(policy), all_packs[0])  # while the first waits for its backward
            (hidden.float() * weight[:len(hidden)]).sum().backward()
            found = hidden.detach(), gradient()
            wanted = plain(pk)
            torch.testing.assert_close(found[0], wanted[0], atol=0.1, rtol=0.05)
            assert torch.nn.functional.cosine_similarity(found[1], wanted[1], 0) > 0.999
            assert (found[1].norm() / wanted[1].norm() - 1).abs() < 0.01
            with torch.no_grad():
                torch.testing.assert_close(other, fast.hidden_states(common.base_of(policy), all_packs[0]), atol=0.1, rtol=0.05)
    passes = base.recordings.passes
    assert {(on, trained) for _, on, trained in passes} == {((), False), (("default",), True)}
    assert len({size for size, _, trained in passes if trained}) >= 4

    def critic():  # its head's gradient, and that of all
        (common.token_values(policy, all_packs[2]) * weight[:len(all_packs[2].targets), 0]).sum().backward()
        return base.score.weight.grad.flatten().clone(), gradient()
    recorded, recordings = critic(), base.__dict__.pop("recordings")
    for found, wanted in zip(recorded, critic()):
        assert torch.nn.functional.cosine_similarity(found, wanted, 0) > 0.999
    base.__dict__["recordings"] = recordings
    another = common.load_model(directory, None, "none", torch.bfloat16, "cuda")  # its weights are not laid together yet
    fast.compile_layers(common.base_of(another))
    with torch.no_grad():
        found = fast.hidden_states(common.base_of(another), all_packs[2])
        torch.testing.assert_close(found, fast.decoder.decoder(common.base_of(another), all_packs[2], compile=True), atol=0.1, rtol=0.05)
    first, second = (fast.hidden_states(common.base_of(policy), all_packs[i]) for i in (1, 2))  # two, then both backwards
    (first.float() * weight[:len(first)]).sum().backward()
    both = gradient()
    (second.float() * weight[:len(second)]).sum().backward()
    for found, pk in ((both, all_packs[1]), (gradient(), all_packs[2])):
        assert torch.nn.functional.cosine_similarity(found, plain(pk)[1], 0) > 0.999


def random_prompts(tokenizer, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, len(tokenizer), (1 + (i * 7) % 50,), generator=g).tolist() for i in range(n)]


def generate(model, prompt, n, eos):
    """transformers' greedy generate on one prompt, on the model's device."""
    out = model.generate(torch.tensor([prompt], device=model.device), max_new_tokens=n, do_sample=False,
                         attention_mask=torch.ones(1, len(prompt), device=model.device, dtype=torch.long),
                         eos_token_id=eos, pad_token_id=eos)
    return out[0, len(prompt):].tolist()


def plain(directory, dtype):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(DEVICE)


def mean_gap(model, prompts, done, temperature=1.0):
    """(mean, max) |log-prob gap| between the sampler and a packed forward of the model."""
    gaps = []
    for pk in fast.pack([common.Example.completion(p, c.ids) for p, c in zip(prompts, done)], 4096, device=DEVICE):
        with torch.no_grad():
            found = common.token_logprobs(model, pk, temperature)
        gaps.append(found - torch.tensor([x for i in pk.examples for x in done[i].logprobs], device=DEVICE))
    return torch.cat(gaps).abs().mean().item(), torch.cat(gaps).abs().max().item()


@pytest.mark.parametrize("compiled", [False, True])
def test_sampler_graphs_fp32_equal_generate_and_cpu(pair, compiled):
    """40 ragged rows of unequal budgets, greedy: graphs of 64 rows, then fewer; token for token."""
    directory, tokenizer, _, cpu = pair
    model, prompts = common.load_model(directory, None, "none", torch.float32, DEVICE), random_prompts(tokenizer, 40)
    budgets = [1 + (i * 37) % 60 for i in range(40)]
    sampler = common.Sampler(model, tokenizer, short=not compiled)
    done = sampler.sample(prompts, budgets)
    sizes = {key[0] for key in sampler.decoder.graphs}
    assert max(sizes) == 64 and len(sizes) >= 3
    assert [c.ids for c in done] == [c.ids for c in common.Sampler(cpu, tokenizer).sample(prompts, budgets)]
    theirs = plain(directory, torch.float32)
    for i in range(0, 40, 5):
        assert done[i].ids == generate(theirs, prompts[i], budgets[i], tokenizer.eos_token_id)
    assert mean_gap(model, prompts, done)[1] < 1e-3
    graphs = len(sampler.decoder.graphs)
    assert [c.ids for c in sampler.sample(prompts, budgets)] == [c.ids for c in done] and len(sampler.decoder.graphs) == graphs
    held = torch.cuda.memory_allocated()
    sampler.release()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < held


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampler_noise_is_the_rows_alone(pair, compiled, top_p):
    """fp32: a row's sample is the same in every batch, bucket and share of the ranks, and on the CPU. (A nucleus' edge may
    fall on the other side of a token where logits are rounded otherwise, on the CPU or in another batch: few rows.)"""
    directory, tokenizer, _, cpu = pair
    model, prompts = common.load_model(directory, None, "none", torch.float32, DEVICE), random_prompts(tokenizer, 40)
    sampler = common.Sampler(model, tokenizer, short=not compiled)
    how = dict(temperature=0.8, top_p=top_p, seed=5)
    whole = sampler.sample(prompts, 24, **how)
    on_cpu = common.Sampler(cpu, tokenizer).sample(prompts, 24, **how)
    few = common.Sampler(model, tokenizer, max_batch=9, short=not compiled).sample(prompts, 24, **how)
    edges = 0 if top_p == 1 else 4
    assert sum(a.ids != b.ids for a, b in zip(on_cpu, whole)) <= edges
    assert sum(a.ids != b.ids for a, b in zip(few, whole)) <= edges
    for share in (range(0, 40, 3), range(7, 8)):
        part = sampler.sample([prompts[i] for i in share], 24, rows=share, **how)
        assert sum(a.ids != whole[i].ids for a, i in zip(part, share)) <= edges
    assert [c.ids for c in sampler.sample(prompts, 24, **how | {"seed": 6})] != [c.ids for c in whole]


@pytest.mark.parametrize("kind, rank", [("qwen2", 16), ("qwen3", 32)])
def test_sampler_by_kernels(pair, kind, rank, monkeypatch):
    """Triton kernels (fast/kernels.py): in fp32 the torch path's tokens, greedy and sampled, but for a sampled token at the
    border of its neighbour; in bf16 as near to fp32 as the torch path is."""
    from transformers import AutoConfig, AutoModelForCausalLM
    _, tokenizer, _, _ = pair
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, hidden_size=896, intermediate_size=1200, num_hidden_layers=3, head_dim=64,
                                  num_attention_heads=14, num_key_value_heads=2, vocab_size=len(tokenizer),
                                  max_position_embeddings=1024, initializer_range=0.05)
    policy = AutoModelForCausalLM.from_config(config).to(DEVICE, torch.float32).eval().requires_grad_(False)
    if rank:
        policy = common.add_lora(policy, rank, 2 * rank)
        for p in common.trainable(policy):
            torch.nn.init.normal_(p, std=0.02)
    prompts = random_prompts(tokenizer, 40) + [[5] * 600] * 2  # at 8 rows, the long ones' keys are split
    budgets = [1 + (i * 37) % 60 for i in range(40)] + [70, 80]
    for how in ({}, {"temperature": 1.0, "seed": 3}):
        done = []
        for kernels in "01":
            monkeypatch.setenv("RUNGS_KERNELS", kernels)
            sampler = common.Sampler(policy, tokenizer, short=True)
            assert bool(sampler.decoder.kernels) == (kernels != "0")
            done.append(sampler.sample(prompts, budgets, **how))
        others = 0
        for a, b in zip(done[1], done[0]):
            same = next((n for n, (x, y) in enumerate(zip(a.ids, b.ids)) if x != y), len(a.ids))
            torch.testing.assert_close(torch.tensor(a.logprobs[:same]), torch.tensor(b.logprobs[:same]), rtol=1e-4, atol=1e-4)
            if a.ids != b.ids:  # sampling: the noise lies where rounding moves the border between two tokens
                assert how and abs(a.ids[same] - b.ids[same]) == 1
                others += 1
        assert others <= 2  # 0.1 are expected in 1,500 tokens
    exact = common.Sampler(policy, tokenizer, short=True).sample(prompts, 1)
    common.base_of(policy).to(torch.bfloat16)
    gaps = []
    for kernels in "01":
        monkeypatch.setenv("RUNGS_KERNELS", kernels)
        done = common.Sampler(policy, tokenizer, short=True).sample(prompts, 1)
        same = [(a, b) for a, b in zip(done, exact) if a.ids == b.ids]
        assert len(same) > len(prompts) / 2
        gaps.append(sum(abs(a.logprobs[0] - b.logprobs[0]) for a, b in same) / len(same))
    print("mean gap to fp32: torch, kernels", gaps)
    assert gaps[1] < 2 * gaps[0]


def gemma(tokenizer, **shape):
    """A random Gemma 3 in fp32, on the GPU."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    shape = dict(hidden_size=256, intermediate_size=512, head_dim=64, query_pre_attn_scalar=64) | shape
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1,
                                  vocab_size=len(tokenizer), sliding_window=24, initializer_range=0.05,
                                  layer_types=["sliding_attention", "full_attention"] * 2, max_position_embeddings=1024, **shape)
    return AutoModelForCausalLM.from_config(config).to(DEVICE, torch.float32).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma 270M's shape"])
def test_a_fresh_policy_is_its_reference(pair, kind):
    """Recorded passes with the adapter on and off run the same kernels: a fresh adapter changes no log-probability, with
    gradients or without. DPO and KTO assert it at step 0."""
    directory, tokenizer, _, _ = pair
    shape = {} if kind == "gemma" else dict(hidden_size=640, intermediate_size=2048, head_dim=256, query_pre_attn_scalar=256)
    start = common.load_model(directory, None, "none", torch.bfloat16, DEVICE) if kind == "llama" else gemma(tokenizer, **shape)
    policy = common.add_lora(start)
    for p in common.base_of(policy).parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else torch.bfloat16)
    common.flat_parameters(policy)
    fast.compile_layers(common.base_of(policy))
    for pk in packs(tokenizer, DEVICE, 40):
        with torch.no_grad(), common.reference(policy):
            reference = common.token_logprobs(policy, pk)
        with torch.no_grad():
            sampled = common.token_logprobs(policy, pk)
        learned = common.token_logprobs(policy, pk)
        learned.sum().backward()
        assert torch.equal(reference, sampled) and torch.equal(reference, learned.detach())
    assert common.base_of(policy).recordings.passes


def test_gemma_with_windows(pair):
    """Gemma 3's norms, scaled embeddings and windows: log-probs and gradients of shared packs, compiled and recorded, in
    bf16 as near to fp32 as without compilation; greedy texts of graphs as on the CPU; sampled ones as the trainer's."""
    _, tokenizer, _, _ = pair
    start = gemma(tokenizer)
    policy = common.add_lora(start)
    for p in common.trainable(policy):
        torch.nn.init.normal_(p, std=0.02)
    base, prompts, g = common.base_of(policy), random_prompts(tokenizer, 40), torch.Generator().manual_seed(1)
    shared = torch.randint(3, len(tokenizer), (3, 50), generator=g).tolist()
    examples = [common.Example.completion(p, [5 + i] * (20 + 7 * i)) for p in shared for i in range(4)]

    def learned(flat=None):
        found = []
        for _ in range(3):  # the third is a replay, where passes are recorded
            for p in common.trainable(policy) if flat is None else [flat]:
                p.grad = None if flat is None else p.grad.zero_()
            logprobs = torch.cat([common.token_logprobs(policy, pk) for pk in
                                  fast.pack(examples, 4096, 4, device=DEVICE, share=True)])
            logprobs.sum().backward()
            found.append(logprobs.detach().float())
        assert torch.equal(found[1], found[2])
        return found[-1], torch.cat([p.grad.flatten() for p in (common.trainable(policy) if flat is None else [flat])])

    exact, gradient = learned()
    done = common.Sampler(policy, tokenizer, short=True).sample(prompts, 60)
    on_cpu = common.Sampler(policy.cpu(), tokenizer).sample(prompts, 60)
    assert [c.ids for c in done] == [c.ids for c in on_cpu]
    policy.to(DEVICE)
    for p in base.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else torch.bfloat16)
    plain, of_plain = learned()
    recorded, of_recorded = learned(common.flat_parameters(policy))
    assert base.recordings.passes
    gaps = [(x - exact).abs().mean().item() for x in (plain, recorded)]
    angles = [torch.nn.functional.cosine_similarity(x, gradient, 0).item() for x in (of_plain, of_recorded)]
    print("Gemma, bf16 plain and recorded against fp32: mean |log-prob gap|", gaps, "gradient cosine", angles)
    assert gaps[1] < 1.2 * gaps[0] + 1e-3 and angles[1] > angles[0] - 0.005 and angles[0] > 0.95
    sampler = common.Sampler(policy, tokenizer)
    sampler.sample(prompts, 40, 1.0, seed=3)
    graphs = set(map(id, sampler.decoder.graphs.values()))
    sampler.refresh(policy)
    mean, worst = mean_gap(policy, prompts, sampler.sample(prompts, 40, 1.0, seed=3))
    assert graphs <= set(map(id, sampler.decoder.graphs.values())) and sampler.decoder.kernels is None
    print(f"Gemma, bf16: |log-prob gap| of sampler and trainer: mean {mean:.4f}, max {worst:.4f}")
    assert mean < 0.03 and worst < 0.5


def test_sampler_graphs_follow_the_policy(pair):
    """A graph captured with one policy decodes the next one after refresh, as a fresh sampler does."""
    directory, tokenizer, _, _ = pair
    policy = common.add_lora(common.load_model(directory, None, "none", torch.float32, DEVICE))
    sampler = common.Sampler(policy, tokenizer, short=True)
    prompts, before = random_prompts(tokenizer, 12), []
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in common.trainable(policy):
            p.data += 0.05 * torch.randn(p.shape, generator=g).to(DEVICE)
        sampler.refresh(policy)
        done, graphs = sampler.sample(prompts, 20, 1.0, seed=1), set(map(id, sampler.decoder.graphs.values()))
        fresh = common.Sampler(policy, tokenizer, short=True).sample(prompts, 20, 1.0, seed=1)
        assert [c.ids for c in done] == [c.ids for c in fresh] and mean_gap(policy, prompts, done)[1] < 1e-3
        assert done not in before
        before.append(done)
        first = graphs if len(before) == 1 else first
        assert first <= graphs  # none was captured again


def test_sampler_bf16_near_generate_and_trainer(pair):
    """What rounding does: how soon greedy texts part from transformers', and log-probs from the trainer's."""
    directory, tokenizer, gpu, _ = pair
    prompts, theirs = random_prompts(tokenizer, 40), plain(directory, torch.bfloat16)
    wanted = [generate(theirs, p, 24, tokenizer.eos_token_id) for p in prompts]
    for compiled in (False, True):
        sampler = common.Sampler(gpu, tokenizer, short=not compiled)
        done = sampler.sample(prompts, 24)
        first = sum(c.ids[0] != w[0] for c, w in zip(done, wanted)) / 40
        apart = sum(c.ids != w for c, w in zip(done, wanted)) / 40
        sampled = sampler.sample(prompts, 24, 1.0, seed=3)
        mean, worst = mean_gap(gpu, prompts, sampled)
        print(f"bf16, compile={compiled}: other first tokens than generate's {first:.1%}, texts of 24 tokens {apart:.1%}; "
              f"|log-prob gap| to the trainer: mean {mean:.4f}, max {worst:.4f}")
        assert first <= 0.1 and mean < 0.03 and worst < 0.5


@pytest.mark.parametrize("kernels", ["1", "0"])
def test_recorded_prompts_are_the_prompts(pair, kernels, monkeypatch):
    """A pass over prompts that is recorded when its size comes again writes what it writes unrecorded, bit by bit, and what
    one without padding writes, to bfloat16's rounding."""
    monkeypatch.setenv("RUNGS_KERNELS", kernels)
    _, tokenizer, gpu, _ = pair
    recorded, unpadded = (common.Sampler(gpu, tokenizer, short=True).decoder for _ in range(2))
    unpadded.records_prompts = False
    grouped = [[p for p in random_prompts(tokenizer, 12, seed) for _ in range(5)] for seed in range(4)]

    def cache_of(decoder, prompts):
        for cache in decoder.cache:
            cache.zero_()
        decoder.begin(dict(enumerate(prompts)), dict(enumerate(range(60))), 80, 1.0, 1.0, seed=4)
        return torch.stack(decoder.cache)
    for i, prompts in enumerate(grouped):
        found, exact = cache_of(recorded, prompts), cache_of(unpadded, prompts)
        assert torch.equal(found, cache_of(common.Sampler(gpu, tokenizer, short=True).decoder, prompts))
        assert ((found != 0) == (exact != 0)).float().mean() > 0.999  # a product may round to 0
        torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-2)
        assert len([key for key in recorded.graphs if key[0] == "prompts"]) == min(i, 1)  # all have one size
    assert bool(recorded.kernels) == (kernels == "1")


def test_fp32_logits_of_bf16_weights():
    """harness.Float32Head on CUDA: the logits of an fp32 product, to fp32's rounding and not bfloat16's."""
    import harness
    torch.manual_seed(0)
    for bias in (False, True):
        head = torch.nn.Linear(896, 4000, bias).to(DEVICE, torch.bfloat16)
        hidden = torch.randn(3, 50, 896, device=DEVICE).bfloat16()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            logits = harness.Float32Head(head)(hidden)
        exact = torch.nn.functional.linear(hidden.double(), head.weight.double(), head.bias.double() if bias else None)
        assert logits.dtype == torch.float32 and logits.shape == exact.shape
        assert (logits - exact).abs().max() < 1e-5 < (exact - exact.bfloat16()).abs().max()


def test_sampler_on_nf4(pair):
    """NF4 is dequantised once; the gap to the trainer, which multiplies by the same weights, is rounding."""
    directory, tokenizer, _, _ = pair
    policy = common.add_lora(common.load_model(directory, None, "nf4", torch.bfloat16, DEVICE))
    for p in common.trainable(policy):
        p.data += 0.02 * torch.randn_like(p)
    prompts = random_prompts(tokenizer, 12)
    done = common.Sampler(policy, tokenizer, short=True).sample(prompts, 24, 1.0, seed=3)
    gap = mean_gap(policy, prompts, done)
    print("NF4: |log-prob gap| mean, max", gap)
    assert gap[0] < 0.05


@pytest.mark.parametrize("quantization, compiled", [("qlora", True), ("none", False)])
def test_sft_and_dpo_on_gpu(quantization, compiled, tmp_path, data_dir, monkeypatch):
    """Both scripts as a user runs them in bf16: finite, falling, step 0 of DPO at ln 2 with a margin of exactly 0."""
    monkeypatch.setenv("RUNGS_COMPILE", str(int(compiled)))
    import dpo
    import sft
    model = make_model(tmp_path / "model", hidden_size=256)
    kwargs = dict(max_length=128, batch_size=8, eos_prompts=4, eos_tokens=8, micro_tokens=512, device="cuda")
    sft.main(sft.Args(model=model, quantization=quantization, data=str(data_dir / "sft.jsonl"), rows=40, heldout_rows=8,
                      lr=5e-3, out=str(tmp_path / "sft_v2"), **kwargs))
    record = json.loads((tmp_path / "sft_v2" / "run.json").read_text())["metrics"]
    assert record["heldout_loss"] < record["heldout_loss_base"]
    assert ("heldout_loss_nf4" in record) == (quantization == "qlora")
    dpo.main(dpo.Args(sft_adapter=str(tmp_path / "sft_v2"), data=str(data_dir / "preference.jsonl"), rows=24,
                      heldout_rows=8, lr=1e-3, out=str(tmp_path / "dpo_v1"), **kwargs))
    first = json.loads((tmp_path / "dpo_v1" / "log.jsonl").read_text().splitlines()[0])
    assert math.isclose(first["loss"], math.log(2), abs_tol=1e-6) and first["margin"] == 0
    print(quantization, record, first)


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_deterministic_runs_end_alike(engine, tmp_path, data_dir, device=DEVICE):
    """RUNGS_DETERMINISTIC=1: SFT, DPO and GRPO, run twice, the second time stopped once: the same adapters, bit by bit. What it
    costs is printed: the seconds of training, with it and without."""
    model, seconds = make_model(tmp_path / "model", hidden_size=256), {}
    shared = ["--device", device, "--engine", engine, "--micro-tokens", "512", "--checkpoint-every", "1"]
    rows = ["--rows", "24", "--heldout-rows", "8", "--max-length", "128", "--batch-size", "8", "--eos-prompts", "2",
            "--eos-tokens", "8", *shared]
    commands = {
        "sft": ["--model", model, "--quantization", "none", "--data", f"{data_dir}/sft.jsonl", *rows],
        "dpo": ["--data", f"{data_dir}/preference.jsonl", *rows],
        "grpo": ["--task", "arithmetic:1", "--updates", "3", "--batch-size", "2", "--group-size", "4", "--completion-tokens",
                 "16", "--prompt-tokens", "256", "--heldout-rows", "2", "--pass-k", "0", "--max-gap", "10", *shared]}

    def run(script, out, stopped=False, **environment):
        parent = [] if script == "sft" else ["--sft-adapter", str(tmp_path / "once" / "sft")]
        results = ["--results", str(out)] if script == "grpo" else []
        command = [sys.executable, f"{script}.py", *commands[script], *parent, *results, "--out", str(out / script)]
        for _ in range(1 + stopped):
            process = subprocess.Popen(command, env=os.environ | environment, cwd=REPO, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, text=True)
            log = out / script / "log.jsonl"
            while stopped and process.poll() is None and not (log.is_file() and log.read_text()):
                time.sleep(0.05)
            if stopped:
                process.terminate()
            printed, stopped = process.communicate()[0], False
        record = out / script / "run.json"
        assert record.is_file(), printed
        seconds[script, out.name] = json.loads(log.read_text().splitlines()[-1])["seconds"]
        return json.loads(record.read_text())
    for script in commands:
        once = run(script, tmp_path / "once", RUNGS_DETERMINISTIC="1")
        again = run(script, tmp_path / "again", stopped=True, RUNGS_DETERMINISTIC="1")
        run(script, tmp_path / "without")
        assert once["hardware"]["deterministic"] and once["adapter_sha256"] == again["adapter_sha256"], (script, seconds)
    print(engine, seconds)


def test_memory_that_ends_on_a_gpu(tmp_path):
    """A card (RUNGS_GPU_GIB) too small for --micro-tokens and large enough for half of it: one notice, the same training."""
    model, words = make_model(tmp_path / "model", hidden_size=256), "how many books does the model read slowly and when"
    rows = [{"prompt": f"{i}", "completion": f"{words} {words} {words} {i} {words} {words}"} for i in range(650)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-10]))
    (tmp_path / "rows_heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[-10:]))

    def run(name, micro_tokens, **environment):
        done = subprocess.run(
            [sys.executable, "sft.py", "--model", model, "--quantization", "none", "--data", f"{tmp_path}/rows.jsonl", "--rows",
             "640", "--batch-size", "320", "--heldout-rows", "8", "--max-length", "256", "--eos-prompts", "1", "--eos-tokens",
             "1", "--max-dropped", "1", "--micro-tokens", str(micro_tokens), "--out", str(tmp_path / name)], cwd=REPO,
            env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done, [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    (_, whole), (_, halves) = run("whole", 32768), run("halves", 16384)
    peaks = [lines[-1]["peak_gib"] for lines in (whole, halves)]
    assert peaks[1] < 0.8 * peaks[0], peaks
    done, lines = run("small", 32768, RUNGS_GPU_GIB=f"{sum(peaks) / 2:.3f}")
    print("peaks", peaks, "of the retried run", lines[-1]["peak_gib"])
    assert "note: out of memory with --micro-tokens 32768: once more with 16384" in done.stderr
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in whole], abs=0.01)


def test_no_step_waits_for_the_gpu(tmp_path, monkeypatch):
    """SFT, DPO, reward model and KTO, after three steps: torch raises where the host would wait for the GPU (but for a line's
    own event, in flush). One length of row, so that no size is new."""
    import dpo
    import kto
    import reward
    import sft
    model = make_model(tmp_path / "model", hidden_size=256)
    text = "how many books does the model read slowly and when"
    rows = [{"prompt": f"{text} {i}", "chosen": f"{text} yes", "rejected": f"{text} no"} for i in range(100, 300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-40]))
    (tmp_path / "rows_heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[-40:]))
    write_log, flush, watched, losses = common.Run.log, common.Run.flush, [], {}

    def log_and_watch(self, step, metrics, rows):
        losses[self.record["method"], step] = metrics["loss"].clone()
        write_log(self, step, metrics, rows)
        watch = 2 <= step < self.total_steps - 2
        torch.cuda.set_sync_debug_mode("error" if watch else "default")
        watched.extend([self.record["method"]] * watch)

    def flush_unwatched(self):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        flush(self)
        torch.cuda.set_sync_debug_mode(mode)
    monkeypatch.setattr(common.Run, "log", log_and_watch)
    monkeypatch.setattr(common.Run, "flush", flush_unwatched)
    kwargs = dict(data=str(tmp_path / "rows.jsonl"), rows=64, heldout_rows=8, max_length=128, batch_size=8, micro_tokens=512,
                  max_dropped=1.0, device="cuda")
    answers = dict(eos_prompts=2, eos_tokens=4)
    try:
        sft.main(sft.Args(model=model, quantization="none", out=str(tmp_path / "sft"), **kwargs, **answers))
        for script in (dpo, kto):
            script.main(script.Args(sft_adapter=str(tmp_path / "sft"), epochs=1, out=str(tmp_path / script.__name__), **kwargs,
                                    **answers))
        reward.main(reward.Args(model=model, quantization="none", out=str(tmp_path / "reward"), results=str(tmp_path), **kwargs))
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError):  # torch does see a wait
            torch.zeros((), device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {method: watched.count(method) for method in watched} == {"sft": 4, "dpo": 4, "kto": 4, "reward": 4}
    for (method, step), loss in losses.items():  # what was read later is what was there
        lines = (tmp_path / method / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[step])["loss"] == loss.item(), (method, step)


@pytest.mark.parametrize("compiled", [True, False])
def test_ppo_on_gpu(compiled, tmp_path, data_dir, monkeypatch):
    """Reward model and PPO as a user runs them in bf16: finite, first ratio 1, sampler and trainer within the noise."""
    monkeypatch.setenv("RUNGS_COMPILE", str(int(compiled)))
    import ppo
    import reward
    import sft
    model = make_model(tmp_path / "model", hidden_size=256)
    kwargs = dict(batch_size=8, micro_tokens=512, device="cuda")
    sft.main(sft.Args(model=model, quantization="none", data=str(data_dir / "sft.jsonl"), rows=40, heldout_rows=8, lr=5e-3,
                      max_length=128, eos_prompts=4, eos_tokens=8, out=str(tmp_path / "sft_v2"), **kwargs))
    reward.main(reward.Args(model=model, quantization="none", data=str(data_dir / "preference.jsonl"), rows=24,
                            heldout_rows=16, max_length=128, lr=1e-3, out=str(tmp_path / "rm_v1"),
                            results=str(tmp_path), **kwargs))
    ppo.main(ppo.Args(sft_adapter=str(tmp_path / "sft_v2"), reward_adapter=str(tmp_path / "rm_v1"),
                      data=str(data_dir / "preference.jsonl"), fixed_prompts=4, updates=3, completion_tokens=12,
                      prompt_tokens=64, minibatches=2, normalise=8, lr=1e-3, out=str(tmp_path / "ppo_v1"),
                      results=str(tmp_path), **kwargs))
    lines = [json.loads(line) for line in (tmp_path / "ppo_v1" / "log.jsonl").read_text().splitlines()]
    print("sampler gap by update:", [line["sampler_gap"] for line in lines], "kl", [line["kl"] for line in lines])
    assert len(lines) == 3 and all(line["sampler_gap"] < 0.1 and math.isfinite(line["kl"]) for line in lines)
    assert lines[0]["kl"] == 0 != lines[-1]["kl"]


def test_no_step_of_an_update_waits_for_the_gpu(tmp_path, data_dir, monkeypatch):
    """PPO from an update's first optimizer step to its last one: torch raises where the host would wait for the GPU (but
    for the recording of a pass of a new size)."""
    import ppo
    import reward
    import sft
    model = make_model(tmp_path / "model", hidden_size=256)
    kwargs = dict(batch_size=8, micro_tokens=512, device="cuda")
    plain = dict(model=model, quantization="none", rows=16, max_length=128, **kwargs)
    sft.main(sft.Args(data=str(data_dir / "sft.jsonl"), heldout_rows=8, eos_prompts=2, eos_tokens=4, out=str(tmp_path / "sft"),
                      **plain))
    reward.main(reward.Args(data=str(data_dir / "preference.jsonl"), heldout_rows=16, out=str(tmp_path / "rm"),
                            results=str(tmp_path), **plain))
    learning_rate, record, watched = ppo.learning_rate, fast.graphs.Recordings.record, []

    def rate_and_watch(step, total, args):
        last = step % args.epochs == args.epochs - 1
        torch.cuda.set_sync_debug_mode("error" if step >= args.epochs and not last else "default")
        watched.append(torch.cuda.get_sync_debug_mode() == 2)
        return learning_rate(step, total, args)

    def record_unwatched(*arguments):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return record(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    monkeypatch.setattr(ppo, "learning_rate", rate_and_watch)
    monkeypatch.setattr(fast.graphs.Recordings, "record", record_unwatched)
    try:
        ppo.main(ppo.Args(sft_adapter=str(tmp_path / "sft"), reward_adapter=str(tmp_path / "rm"),
                          data=str(data_dir / "preference.jsonl"), fixed_prompts=4, updates=3, completion_tokens=12,
                          prompt_tokens=64, normalise=8, out=str(tmp_path / "ppo"), results=str(tmp_path), **kwargs))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched == [False] * 4 + [True, True, True, False] * 2
