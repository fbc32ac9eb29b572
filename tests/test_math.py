"""The maths of SFT, DPO, log-probabilities, the schedule and merging, each derived another way.

The other ways: numbers worked by hand, plain transformers one sequence at a time (eager attention, full logits), TRL's
own loss from the same rows, and statistics. Tolerance 1e-5 in fp32 unless a test says why not.
"""
import copy
import math
import shutil
from collections import Counter

import pytest
import scipy.stats
import torch
from conftest import WORDS, built, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat
import common
import inputs
import fast
import dpo
import sft
from common import Example

LN2 = 0.6931471805599453
CLOSE = dict(rtol=1e-5, atol=1e-5)


def plain_model(directory, dtype=torch.float32):
    """The model as anyone would load it: eager attention, nothing of ours."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def plain_logprobs(model, ids, temperature=1.0):
    """[len(ids)] log-probability of every token given those before it (the first has none), from full logits."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0].double() / temperature
    out = [torch.zeros((), dtype=torch.double)]
    for t in range(1, len(ids)):
        out.append(torch.log_softmax(logits[t - 1], -1)[ids[t]])
    return torch.stack(out)


def random_sequences(n, seed=0, low=2, high=30, vocab=300):
    """n sequences of unequal length with a random mask of at least one token (never the first)."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        ids = torch.randint(3, vocab, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()
        mask = (torch.rand(len(ids), generator=g) < 0.6).tolist()
        mask[0], mask[-1] = False, True
        out.append((ids, mask))
    return out


def two_policies(directory, seed=0):
    """The same random (not fresh) LoRA on our model and on a plain PEFT model."""
    ours = common.add_lora(common.load_model(directory, dtype=torch.float32))
    plain = get_peft_model(plain_model(directory), LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules="q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()))
    g = torch.Generator().manual_seed(seed)
    copies = dict(plain.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=g) * 0.05
            copies[name].data.copy_(p.data)
    return ours, plain


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(ours, plain, tolerance=1e-5):
    """Every adapter tensor's gradient, to `tolerance` of the largest entry."""
    a, b = gradients(ours), gradients(plain)
    assert a.keys() == b.keys() and len(a) == 2 * 2 * 7  # two layers, seven projections, A and B
    scale = max(g.abs().max() for g in b.values())
    assert scale > 1e-4
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


# -- the losses, by hand ----------------------------------------------------------------------------

def test_sft_loss_by_hand():
    """Probabilities 1/2, 1/4, 1/8: the mean NLL is (1 + 2 + 3) ln 2 / 3 = 2 ln 2, however the tokens are split."""
    logprobs = torch.tensor([0.5, 0.25, 0.125]).log().requires_grad_()
    loss = sft.sft_loss(logprobs, 3)
    assert loss.item() == pytest.approx(2 * LN2, abs=1e-6)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-1 / 3] * 3)  # descending raises every trained token

    parts = sft.sft_loss(logprobs[:1].detach(), 3) + sft.sft_loss(logprobs[1:].detach(), 3)
    assert parts.item() == pytest.approx(2 * LN2, abs=1e-6)
    assert abs((1 + 2.5) / 2 * LN2 - parts.item()) > 0.1  # the mean of means is something else
    assert sft.sft_loss(torch.zeros(0), 3).item() == 0  # a rank without tokens


def pair(pi_w=-1.0, pi_l=-5.0, ref_w=-2.0, ref_l=-4.0):
    """log-ratios +1 (chosen) and -1 (rejected): h = 2."""
    return [torch.tensor([x], requires_grad=True) for x in (pi_w, pi_l, ref_w, ref_l)]


@pytest.mark.parametrize("epsilon, expected, slope", [
    (0.0, 0.31326169, -0.13447071),  # β = 1/2, βh = 1: ln(1 + 1/e);      slope −½ · 0.26894142
    (0.1, 0.41326169, -0.08447071),  # 0.9 · 0.31326169 + 0.1 · 1.31326169; −½ (0.9 · 0.26894142 − 0.1 · 0.73105858)
])
def test_dpo_loss_by_hand(epsilon, expected, slope):
    tensors = pair()
    losses, rewards_w, rewards_l = dpo.dpo_loss(*tensors, beta=0.5, label_smoothing=epsilon)
    assert losses.tolist() == pytest.approx([expected], abs=1e-6)
    assert rewards_w.tolist() == [0.5] and rewards_l.tolist() == [-0.5]
    assert not rewards_w.requires_grad and not rewards_l.requires_grad
    losses.sum().backward()
    pi_w, pi_l, ref_w, ref_l = (t.grad.item() for t in tensors)
    assert pi_w == pytest.approx(slope, abs=1e-6)  # descending raises the chosen answer,
    assert pi_l == pytest.approx(-slope, abs=1e-6)  # lowers the rejected one
    assert (ref_w, ref_l) == pytest.approx((-slope, slope), abs=1e-6)


def test_dpo_loss_wrong_order_and_extremes():
    """βh = −1: 1 + ln(1 + 1/e); a batch keeps pairs apart; nothing overflows at |βh| = 1000."""
    wrong = [torch.tensor([-1.0, -3.0]), torch.tensor([-5.0, -3.0]), torch.tensor([-2.0, -2.0]),
             torch.tensor([-4.0, -4.0])]  # the second pair: ratios −1 and +1
    losses, _, _ = dpo.dpo_loss(*wrong, beta=0.5)
    assert losses.tolist() == pytest.approx([0.31326169, 1.31326169], abs=1e-6)
    zero = torch.zeros(2)
    losses, _, _ = dpo.dpo_loss(torch.tensor([2000.0, -2000.0]), zero, zero, zero, beta=0.5)
    assert losses.tolist() == [0.0, 1000.0]


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_dpo_loss_is_ln2_where_policy_is_reference(beta, epsilon):
    logprobs_w, logprobs_l = torch.tensor([-3.5, -80.0, -0.1]), torch.tensor([-7.25, -2.0, -300.0])
    losses, rewards_w, rewards_l = dpo.dpo_loss(logprobs_w, logprobs_l, logprobs_w, logprobs_l, beta, epsilon)
    assert losses.tolist() == pytest.approx([LN2] * 3, abs=1e-7)
    assert (rewards_w - rewards_l).tolist() == [0.0, 0.0, 0.0]


def test_label_smoothing_moves_the_minimum_to_its_log_odds():
    """With a share ε = 0.1 of swapped labels the best h has σ(βh) = 0.9, so βh = ln 9; without, it is at infinity."""
    for beta_h, sign in ((math.log(9) - 0.1, -1), (math.log(9), 0), (math.log(9) + 0.1, 1)):
        pi_w = torch.tensor([beta_h / 0.1], requires_grad=True)
        zero = torch.zeros(1)
        dpo.dpo_loss(pi_w, zero, zero, zero, 0.1, 0.1)[0].sum().backward()
        assert abs(pi_w.grad.item()) < 1e-7 if sign == 0 else pi_w.grad.item() * sign > 1e-5
        pi_w.grad = None
        dpo.dpo_loss(pi_w, zero, zero, zero, 0.1, 0.0)[0].sum().backward()
        assert pi_w.grad.item() < 0


# -- the schedule -----------------------------------------------------------------------------------

@pytest.mark.parametrize("script", [sft, dpo])
def test_learning_rate(script):
    def rates(total, **kw):
        args = script.Args(lr=1.0, **kw)
        assert args.warmup == kw.get("warmup", 0.03)
        return [script.learning_rate(t, total, args) for t in range(total)]

    assert rates(1) == [1.0]  # w = 1
    assert rates(2) == [1.0, 1.0]  # w = 1: min(1, 2/1), min(2, 1/1)
    assert rates(10) == pytest.approx([1, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9])
    long = rates(313)  # w = ⌈9.39⌉ = 10
    assert long[:12] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 302 / 303])
    assert long[-2:] == pytest.approx([2 / 303, 1 / 303])
    falls = [a - b for a, b in zip(long[10:], long[11:])]
    assert falls == pytest.approx([1 / 303] * 302)  # a straight line
    assert rates(4, warmup=1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])  # T − w = 0
    assert rates(3, warmup=0.0) == pytest.approx([1, 1, 0.5])
    for total in range(1, 60):
        assert min(rates(total)) > 0 and max(rates(total)) == 1.0


# -- log-probabilities ------------------------------------------------------------------------------

ENGINES = pytest.mark.parametrize("engine", ["fast", "plain"])


@ENGINES
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_token_logprobs_are_shifted_log_softmax(tmp_path, kind, temperature, engine):
    directory = make_model(tmp_path, seed=3, kind=kind)
    model, plain = common.load_model(directory, dtype=torch.float32, engine=engine), plain_model(directory)
    sequences = random_sequences(9)
    packs = common.micro_batches(model, [Example.masked(*s) for s in sequences], 90)
    assert len(packs) > 1
    seen = Counter()
    for pack in packs:
        found, extra = common.token_logprobs(model, pack, temperature, extras=("correct",))
        assert found.dtype == torch.float32
        expected, right = [], []
        for i in pack.examples:
            ids, mask = sequences[i]
            with torch.no_grad():
                logprobs = plain_logprobs(plain, ids, temperature)
                best = plain(torch.tensor([ids])).logits[0].argmax(-1)
            expected += [logprobs[t] for t in range(len(ids)) if mask[t]]
            right += [best[t - 1] == ids[t] for t in range(len(ids)) if mask[t]]
            seen[i] += 1
        torch.testing.assert_close(found, torch.stack(expected).float(), **CLOSE)
        assert extra["correct"].tolist() == [bool(r) for r in right]
    assert seen == Counter(range(9))


@ENGINES
def test_correct_marks_the_models_own_choices(tiny_model, engine):
    """A sequence of the model's greedy choices is all correct; changing one token makes that one wrong."""
    plain, model = plain_model(tiny_model), common.load_model(tiny_model, dtype=torch.float32, engine=engine)
    ids = [5, 9]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
    ids[-1] = ids[-1] - 1
    (pack,) = common.micro_batches(model, [Example.masked(ids, [False] * 2 + [True] * 6)], 64)
    _, extra = common.token_logprobs(model, pack, extras=("correct",))
    assert extra["correct"].tolist() == [True] * 5 + [False]


@ENGINES
def test_chunked_loss_is_the_full_loss_in_value_and_gradient(tiny_model, monkeypatch, engine):
    """Seven trained tokens at a time against one full [T, V] computation; the head never sees more than seven."""
    monkeypatch.setattr(common, "HEAD_CHUNK", 7)
    ours, plain = two_policies(tiny_model)
    common.base_of(ours).__dict__["engine"] = engine
    sequences = random_sequences(6, seed=1)
    n = sum(sum(mask) for _, mask in sequences)
    widths = []
    hook = common.base_of(ours).get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: widths.append(inputs[0].shape[0]))
    (pack,) = common.micro_batches(ours, [Example.masked(*s) for s in sequences], 10_000)
    logprobs = common.token_logprobs(ours, pack)
    loss = sft.sft_loss(logprobs, n)
    loss.backward()
    hook.remove()
    assert len(pack.targets) == n > 3 * 7
    # fast: once, since the backward needs no logits; plain computes them again in the backward
    assert max(widths) == 7 and sum(widths) == (n if engine == "fast" else 2 * n)

    full = -sum(plain_logprobs(plain, ids)[torch.tensor(mask)].sum() for ids, mask in sequences) / n
    full.backward()
    assert loss.item() == pytest.approx(full.item(), abs=1e-5)
    assert_same_gradients(ours, plain)


@ENGINES
def test_no_predicted_token_gives_an_empty_tensor(tiny_model, engine):
    model = common.load_model(tiny_model, dtype=torch.float32, engine=engine)
    (pack,) = common.micro_batches(model, [Example([5, 6, 7], [], [])], 10)
    logprobs, extra = common.token_logprobs(model, pack, extras=("correct",))
    assert logprobs.shape == (0,) and extra["correct"].shape == (0,)
    assert pack.sum_by_sequence(logprobs).tolist() == [0.0]


# -- parity with TRL, from the rows on ---------------------------------------------------------------

# ChatML without a newline after the last turn, so that TRL's completion ends with EOS too; `generation` marks, for TRL's
# assistant_only_loss, what render() must find by itself.
TRL_TEMPLATE = (
    "{% for m in messages %}{{ '' if loop.first else '\n' }}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}")


def text(g, low, high):
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (int(torch.randint(low, high, (1,), generator=g)),),
                                                         generator=g))


def trl_config(kind, tmp_path, **kw):
    return kind(output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, report_to="none", use_cpu=True,
                bf16=False, fp16=False, gradient_checkpointing=False, disable_tqdm=True, **kw)


def test_sft_loss_is_trls(tmp_path):
    """TRL's SFTTrainer (own tokenising, own assistant mask, padding) and ours on the same messages: loss and gradient."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    directory = make_model(tmp_path / "model", template=TRL_TEMPLATE)
    g = torch.Generator().manual_seed(4)
    rows = []
    for i in range(6):
        turns = [{"role": "system", "content": text(g, 2, 5)}] if i % 3 == 0 else []
        for _ in range(1 + i % 3):
            turns += [{"role": "user", "content": text(g, 2, 8)}, {"role": "assistant", "content": text(g, 1, 20)}]
        rows.append({"messages": turns})
    ours, plain = two_policies(directory)

    trainer = SFTTrainer(plain, trl_config(SFTConfig, tmp_path, assistant_only_loss=True, max_length=None),
                         train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(directory))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    loss_trl = trainer.compute_loss(trainer.model, batch)
    loss_trl.backward()

    build = sft.build_examples(chat.load_tokenizer(directory), sft.Args(max_length=512))
    examples = [c.example for c in built(build, sft.conversation, rows)]
    n = sum(len(e.targets) for e in examples)
    assert n == int((batch["labels"] != -100).sum())
    loss, correct = 0.0, 0
    packs = fast.pack(examples, 200)
    assert len(packs) > 1
    for pack in packs:
        logprobs, extra = common.token_logprobs(ours, pack, extras=("correct",))
        share = sft.sft_loss(logprobs, n)
        share.backward()
        loss, correct = loss + share.item(), correct + int(extra["correct"].sum())
    assert loss == pytest.approx(loss_trl.item(), abs=1e-5)
    assert correct / n == pytest.approx(trainer._metrics["train"]["mean_token_accuracy"][0], abs=1e-6)
    assert_same_gradients(ours, plain)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_dpo_loss_is_trls(tmp_path, epsilon):
    """TRL's DPOTrainer and dpo.pair_metrics on the same rows, policy ≠ reference: loss, rewards, log-probs, gradient.

    TRL 1.16's "sigmoid" loss ignores label_smoothing. Its "aot" loss doesn't, and on a batch of one pair, where there is
    nothing to sort, that is the smoothed DPO loss.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    directory = make_model(tmp_path / "model", template=TRL_TEMPLATE)
    g = torch.Generator().manual_seed(5)
    rows = []
    for i in range(5):  # some prompts hold an earlier answer, which neither side is scored on
        before = [{"role": "user", "content": text(g, 2, 8)}, {"role": "assistant", "content": text(g, 2, 8)}] * (i % 2)
        rows.append({"prompt": before + [{"role": "user", "content": text(g, 2, 8)}],
                     "chosen": [{"role": "assistant", "content": text(g, 1, 15)}],
                     "rejected": [{"role": "assistant", "content": text(g, 1, 15)}]})
    ours, _ = two_policies(directory)

    args = dpo.Args(beta=0.3, label_smoothing=epsilon, max_length=512)
    trainer = DPOTrainer(
        plain_model(directory), args=trl_config(DPOConfig, tmp_path, beta=0.3, label_smoothing=epsilon, max_length=None,
                                                loss_type=["aot" if epsilon else "sigmoid"]),
        train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(directory),
        peft_config=LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=list(common.TARGET_MODULES)))
    theirs = dict(trainer.model.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            theirs[name].data.copy_(p.data)
    loss_trl = 0.0
    for batch in [[i] for i in range(5)] if epsilon else [range(5)]:
        share = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in batch]))
        (share * len(batch) / 5).backward()
        loss_trl += share.item() * len(batch) / 5
    metrics_trl = {k: sum(v) / len(v) for k, v in trainer._metrics["train"].items()}

    pairs = built(dpo.build_pairs(chat.load_tokenizer(directory), args), inputs.as_pair, rows)
    totals = torch.zeros(len(dpo.METRICS))
    packs = fast.pack([e for p in pairs for e in (p.chosen, p.rejected)], 150, unit=2)
    assert len(packs) > 1
    for pack in packs:
        losses, values = dpo.pair_metrics(ours, pack, args)
        (losses.sum() / 5).backward()
        totals += values.sum(1) / 5
    metrics = dict(zip(dpo.METRICS, totals.tolist()))
    assert abs(loss_trl - LN2) > 0.01  # the policy is not the reference
    assert metrics["loss"] == pytest.approx(loss_trl, abs=1e-5)
    for name, name_trl in (("rewards_chosen", "rewards/chosen"), ("rewards_rejected", "rewards/rejected"),
                           ("margin", "rewards/margins"), ("accuracy", "rewards/accuracies"),
                           ("logprobs_chosen", "logps/chosen"), ("logprobs_rejected", "logps/rejected")):
        assert metrics[name] == pytest.approx(metrics_trl[name_trl], rel=1e-5, abs=1e-5), name
    assert_same_gradients(ours, trainer.model)


# -- KL ----------------------------------------------------------------------------------------------

def test_answer_kl_to_and_from_the_uniform(tiny_model, monkeypatch):
    """KL(p‖uniform) = ln V − H(p) and KL(uniform‖p) = −ln V − mean of ln p, over all predicted positions of all packs."""
    monkeypatch.setattr(common, "HEAD_CHUNK", 5)
    model, plain = common.load_model(tiny_model, dtype=torch.float32), plain_model(tiny_model)
    for m in (model, plain):
        m.get_output_embeddings().weight.data *= 3  # a sharper p, so that the two directions differ
    uniform = common.load_model(tiny_model, dtype=torch.float32)
    uniform.get_output_embeddings().weight.data.zero_()
    sequences = random_sequences(5, seed=2)
    examples = [Example.masked(*s) for s in sequences]
    entropy, mean_log = [], []
    for ids, mask in sequences:
        with torch.no_grad():
            logits = plain(torch.tensor([ids])).logits[0].double()
        for t in range(len(ids)):
            if mask[t]:
                logp = torch.log_softmax(logits[t - 1], -1)
                entropy.append(-(logp.exp() * logp).sum().item())
                mean_log.append(logp.mean().item())
    ln_v = math.log(model.config.vocab_size)
    forward, backward = ln_v - sum(entropy) / len(entropy), -ln_v - sum(mean_log) / len(mean_log)
    assert abs(forward - backward) > 0.1
    p, q = ((m, common.answer_states(m, examples, 40)) for m in (model, uniform))
    n = sum(len(e.targets) for e in examples)
    assert common.answer_kl(*p, *q).sum().item() / n == pytest.approx(forward, abs=1e-5)
    assert common.answer_kl(*q, *p).sum().item() / n == pytest.approx(backward, abs=1e-5)
    assert len(common.answer_kl(*p, *p)) == 5 and common.answer_kl(*p, *p).abs().max() == 0


# -- order of rows -----------------------------------------------------------------------------------

def test_permutation_depends_on_its_arguments_alone():
    first = common.permutation(50, 1, "rows")
    assert sorted(first) == list(range(50)) and first != list(range(50))
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert common.permutation(50, 1, "rows") == first  # torch's global state is not read…
    torch.manual_seed(99)
    expected = torch.rand(1)
    torch.manual_seed(99)
    common.permutation(50, 1, "rows")
    assert torch.equal(torch.rand(1), expected)  # …nor moved
    torch.set_rng_state(state)
    others = [common.permutation(50, 2, "rows"), common.permutation(50, 1, "epoch"),
              common.permutation(50, 1, "epoch", 0), common.permutation(50, 1, "epoch", 1)]
    assert len({tuple(p) for p in [first, *others]}) == 5


def test_permutation_is_fair():
    """Over 3,000 seeds each of six places holds each of six items equally often (χ², 36 cells)."""
    counts = torch.zeros(6, 6)
    for seed in range(3000):
        for place, item in enumerate(common.permutation(6, seed, "rows")):
            counts[place, item] += 1
    assert scipy.stats.chi2.sf(((counts - 500) ** 2 / 500).sum().item(), 25) > 1e-3


@pytest.mark.parametrize("n, size, epochs", [(10, 4, 1), (12, 4, 3), (5, 8, 2), (1, 1, 1), (7, 1, 2)])
def test_batches_cover_each_epoch_once(n, size, epochs):
    steps = common.batches(n, size, epochs, seed=3)
    a_epoch = -(-n // size)
    assert len(steps) == a_epoch * epochs
    for e in range(epochs):
        mine = steps[e * a_epoch:(e + 1) * a_epoch]
        assert sorted(i for step in mine for i in step) == list(range(n))
        assert all(len(step) == size for step in mine[:-1]) and 0 < len(mine[-1]) <= size
    assert steps == common.batches(n, size, epochs, seed=3)
    if n > 5 and epochs > 1:
        assert steps[:a_epoch] != steps[a_epoch:2 * a_epoch]
    if n > 5:
        assert steps != common.batches(n, size, epochs, seed=4)


# -- merging -----------------------------------------------------------------------------------------

def test_merge_is_pefts_merge(sft_run, sft_args):
    merged = common.load_model(sft_args["model"], sft_run, dtype=torch.float32).state_dict()
    theirs = PeftModel.from_pretrained(plain_model(sft_args["model"]), sft_run).merge_and_unload().state_dict()
    base = plain_model(sft_args["model"]).state_dict()
    assert merged.keys() == theirs.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6)
        changed = not torch.equal(weight, base[name])
        assert changed == any(f".{target}." in name for target in common.TARGET_MODULES), name


def test_bfloat16_merge_is_computed_in_fp32_and_rounded_once(sft_run, sft_args, tmp_path):
    """On a bfloat16 base: PEFT's merge in fp32, then rounded, bit for bit (PEFT's own bfloat16 merge is not that)."""
    shutil.copytree(sft_args["model"], tmp_path / "model")
    plain_model(sft_args["model"], torch.bfloat16).save_pretrained(tmp_path / "model")
    merged = common.load_model(tmp_path / "model", sft_run, dtype=torch.bfloat16).state_dict()
    theirs = PeftModel.from_pretrained(plain_model(tmp_path / "model"), sft_run).merge_and_unload().state_dict()
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, theirs[name].bfloat16()), name
