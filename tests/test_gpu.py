"""The GPU paths against the CPU's, on one GPU: `make gpu-check`. Without a GPU every test here is skipped."""
import json
import math

import pytest
import torch

import common
from conftest import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def sequence_of(pack):
    """[K] which of the pack's sequences each predicted token belongs to."""
    return torch.arange(len(pack.examples), device=pack.counts.device).repeat_interleave(pack.counts)


def packs(tokenizer, device, n=12):
    g = torch.Generator().manual_seed(1)
    examples = []
    for _ in range(n):
        ids = torch.randint(3, len(tokenizer), (int(torch.randint(5, 60, (1,), generator=g)),), generator=g).tolist()
        examples.append(common.Example.masked(ids, [True] * len(ids)))
    return common.pack(examples, 512, unit=2, device=device)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model of head size 64 (varlen's kernels want it), in bf16 on the GPU and fp32 on the CPU."""
    directory = tmp_path_factory.mktemp("gpu")
    make_model(directory, hidden_size=256)
    tokenizer = common.load_tokenizer(directory)
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
            alone = common.token_logprobs(gpu, common.pack([common.Example.masked(ids, [True] * len(ids))], 512,
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
            common.compile_layers(policy)
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


def test_greedy_sampler_fp32_equals_generate(pair):
    directory, tokenizer, _, _ = pair
    model = common.load_model(directory, None, "none", torch.float32, "cuda")
    prompts = [torch.randint(3, len(tokenizer), (n,)).tolist() for n in (4, 17, 9)]
    got = common.Sampler(model, tokenizer).sample(prompts, 24)
    from transformers import AutoModelForCausalLM
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).cuda()
    for p, c in zip(prompts, got):
        want = plain.generate(torch.tensor([p], device="cuda"), max_new_tokens=24, do_sample=False)[0, len(p):].tolist()
        assert c.ids == want


@pytest.mark.parametrize("quantization, compiled", [("qlora", True), ("none", False)])
def test_sft_and_dpo_on_gpu(quantization, compiled, tmp_path, data_dir):
    """Both scripts as a user runs them in bf16: finite, falling, step 0 of DPO at ln 2 (exactly, uncompiled)."""
    import dpo
    import sft
    model = make_model(tmp_path / "model", hidden_size=256)
    kwargs = dict(max_length=128, batch_size=8, eos_prompts=4, eos_tokens=8, micro_tokens=512, device="cuda",
                  compile=compiled)
    sft.main(sft.Args(model=model, quantization=quantization, data=str(data_dir / "sft.jsonl"), rows=40, heldout_rows=8,
                      lr=5e-3, out=str(tmp_path / "sft_v2"), **kwargs))
    record = json.loads((tmp_path / "sft_v2" / "run.json").read_text())["metrics"]
    assert record["heldout_loss"] < record["heldout_loss_base"]
    assert ("heldout_loss_nf4" in record) == (quantization == "qlora")
    dpo.main(dpo.Args(sft_adapter=str(tmp_path / "sft_v2"), data=str(data_dir / "preference.jsonl"), rows=24,
                      heldout_rows=8, lr=1e-3, out=str(tmp_path / "dpo_v1"), **kwargs))
    first = json.loads((tmp_path / "dpo_v1" / "log.jsonl").read_text().splitlines()[0])
    assert math.isclose(first["loss"], math.log(2), abs_tol=0.02 if compiled else 1e-6)
    assert compiled or first["margin"] == 0
    print(quantization, record, first)
