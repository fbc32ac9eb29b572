"""Shared fixtures: a tiny random model with a real byte-level tokenizer, in fp32, and small data files."""
import json
import os
import random
import signal

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads only wait for one another; subprocesses inherit it
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests' tolerances are the CPU's

# pytest's workers, and processes in the background, ignore Ctrl-C; the tests that send it start from Python's own handler
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import common
import inputs

torch.set_num_threads(1)

# Begun first, so that the workers of `make test` end at about the same time
SLOWEST = "grpo", "bench", "faults", "resume", "kernels", "results", "kto", "ppo", "invariants", "engines", "reward"


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
WORDS = ("the a model answers question how people learn to write code read books in many countries with small steps "
         "why is sky blue and what makes bread rise slowly when it rains").split()


def make_tokenizer(directory, eos="<|im_end|>", template=CHATML):
    """A byte-level BPE tokenizer of 384 tokens trained on a few words; pad == eos, as with SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token=eos, pad_token=eos,
                                   extra_special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast.chat_template = template
    fast.save_pretrained(directory)
    return fast


def make_model(directory, seed=0, kind="llama", hidden_size=64, **tokenizer_options):
    """A random model of two layers, four heads, grouped-query attention, 512 positions, saved in fp32."""
    tokenizer = make_tokenizer(directory, **tokenizer_options)
    torch.manual_seed(seed)
    shape = dict(vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
                 eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, initializer_range=0.1)
    model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    model.float().save_pretrained(directory)
    return str(directory)


def without_nf4(model):
    """The model with each NF4 layer replaced by a plain one of its dequantised weights, in fp32.

    What to compare NF4 with: bitsandbytes' own CPU layer rounds to bfloat16 on processors that multiply it (AVX512-BF16).
    """
    import bitsandbytes.functional
    for name, layer in [*model.named_modules()]:
        if type(layer).__name__ == "Linear4bit":
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            if layer.bias is not None:
                plain.bias.data = layer.bias.data.float()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain.requires_grad_(False))
    return model


def sharing_examples(seed=0):
    """Three groups with long beginnings of their own, inside them smaller groups, a sequence that another begins with,
    one that is there twice, and two that are alone; in random order, with predicted tokens everywhere."""
    g = random.Random(seed)

    def tokens(n):
        return [g.randrange(3, 300) for _ in range(n)]
    sequences = [tokens(12), tokens(2)]
    for length in (5, 17, 30):
        stem = tokens(length)
        branch = stem + tokens(6)
        sequences += [stem + tokens(g.randrange(1, 9)) for _ in range(5)] + [branch + tokens(1 + n) for n in range(3)]
        sequences += [branch, branch + [7], branch + [7]]
    g.shuffle(sequences)
    return [common.Example.masked(ids, [False] + [g.random() < 0.6 for _ in ids[2:]] + [True]) for ids in sequences]


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run that ends by an exception leaves its handlers behind, since its process ends too; here the next test starts."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


def sentence(generator, n):
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (n,), generator=generator))


def part_of(prompt):
    """The part of the preference data that a prompt without company is in."""
    return inputs.preference_parts([prompt])[0]


def built(build, read, rows):
    """What a script's builder makes of data rows."""
    return build([read(row, f"row {i}") for i, row in enumerate(rows)], [f"row {i}" for i in range(len(rows))])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def write_data(directory):
    """sft.jsonl, preference.jsonl and their held-out files: random sentences, some conversations of two exchanges."""
    g = torch.Generator().manual_seed(0)

    def length(low, high):
        return int(torch.randint(low, high, (1,), generator=g))
    for name, n in (("sft", 40), ("sft_heldout", 12)):
        rows = []
        for i in range(n):
            turns = []
            for _ in range(1 + i % 2):
                turns += [{"role": "user", "content": sentence(g, length(3, 10))},
                          {"role": "assistant", "content": sentence(g, length(3, 14))}]
            rows.append({"messages": turns})
        write_jsonl(directory / f"{name}.jsonl", rows)
    for name, n in (("preference", 60), ("preference_heldout", 50)):
        write_jsonl(directory / f"{name}.jsonl", [
            {"prompt": [{"role": "user", "content": f"{i} {sentence(g, length(3, 8))}"}],
             "chosen": [{"role": "assistant", "content": sentence(g, length(3, 12)) + " yes"}],
             "rejected": [{"role": "assistant", "content": sentence(g, length(3, 12)) + " no"}]} for i in range(n)])


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """What write_data writes."""
    directory = tmp_path_factory.mktemp("data")
    write_data(directory)
    return directory


@pytest.fixture(scope="session")
def sft_args(tiny_model, data_dir):
    """Keyword arguments of a five-step SFT run in fp32."""
    return dict(model=tiny_model, quantization="none", dtype="float32", data=str(data_dir / "sft.jsonl"), rows=40,
                heldout_rows=8, max_length=128, batch_size=8, lr=5e-3, eos_prompts=4, eos_tokens=8, micro_tokens=512,
                device="cpu", checkpoint_every=2)


@pytest.fixture(scope="session")
def dpo_args(data_dir):
    """Keyword arguments of a DPO run of some steps in fp32; add sft_adapter and out."""
    return dict(dtype="float32", data=str(data_dir / "preference.jsonl"), rows=24, heldout_rows=8, max_length=128,
                batch_size=8, beta=0.1, lr=1e-3, eos_prompts=4, eos_tokens=8, micro_tokens=512, device="cpu",
                checkpoint_every=2)


@pytest.fixture(scope="session")
def sft_run(sft_args, tmp_path_factory):
    """A finished SFT run directory."""
    import sft
    out = str(tmp_path_factory.mktemp("runs") / "sft_v2")
    sft.main(sft.Args(**sft_args, out=out))
    return out


@pytest.fixture(scope="session")
def dpo_run(dpo_args, sft_run, tmp_path_factory):
    """A finished DPO run directory on top of sft_run."""
    import dpo
    out = str(tmp_path_factory.mktemp("runs") / "dpo_v1")
    dpo.main(dpo.Args(**dpo_args, sft_adapter=sft_run, out=out))
    return out


@pytest.fixture(scope="session")
def kto_args(sft_run, data_dir):
    """Keyword arguments of a KTO run of three steps on preference pairs, in fp32; add out."""
    return dict(sft_adapter=sft_run, dtype="float32", data=str(data_dir / "preference.jsonl"), rows=23, heldout_rows=16,
                max_length=128, batch_size=8, lr=1e-3, eos_prompts=4, eos_tokens=8, micro_tokens=512, device="cpu",
                checkpoint_every=2, epochs=1)


@pytest.fixture(scope="session")
def kto_run(kto_args, tmp_path_factory):
    """A finished KTO run directory on top of sft_run."""
    import kto
    out = str(tmp_path_factory.mktemp("runs") / "kto_v1")
    kto.main(kto.Args(**kto_args, out=out))
    return out


@pytest.fixture(scope="session")
def reward_args(tiny_model, data_dir, tmp_path_factory):
    """Keyword arguments of a three-step reward-model run in fp32; add out."""
    return dict(model=tiny_model, quantization="none", dtype="float32", data=str(data_dir / "preference.jsonl"), rows=24,
                heldout_rows=16, max_length=128, batch_size=8, lr=1e-3, micro_tokens=512, device="cpu",
                checkpoint_every=2, results=str(tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="session")
def reward_run(reward_args, tmp_path_factory):
    """A finished reward-model run directory."""
    import reward
    out = str(tmp_path_factory.mktemp("runs") / "rm_v1")
    reward.main(reward.Args(**reward_args, out=out))
    return out


@pytest.fixture(scope="session")
def ppo_args(sft_run, reward_run, data_dir, tmp_path_factory):
    """Keyword arguments of a PPO run of three updates, two epochs of two mini-batches each, in fp32; add out."""
    return dict(sft_adapter=sft_run, reward_adapter=reward_run, dtype="float32", data=str(data_dir / "preference.jsonl"), fixed_prompts=4,
                updates=3, batch_size=8, completion_tokens=12, prompt_tokens=64, epochs=2, minibatches=2, normalise=8,
                lr=1e-3, micro_tokens=512, device="cpu", checkpoint_every=1,
                results=str(tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="session")
def ppo_run(ppo_args, tmp_path_factory):
    """A finished PPO run directory on top of sft_run, against reward_run."""
    import ppo
    out = str(tmp_path_factory.mktemp("runs") / "ppo_v1")
    ppo.main(ppo.Args(**ppo_args, out=out))
    return out


OWN_TASK = """
def rows():
    return [{"prompt": f"{i} why is the sky blue", "i": i} for i in range(60)]


def reward(row, completion):
    return {"correct": float(len(completion) > row["i"] % 7), "format": 0.1 * (len(completion) < 15)}
"""


@pytest.fixture(scope="session")
def grpo_args(sft_run, tmp_path_factory):
    """Keyword arguments of a GRPO run of three updates of 4 x 4 answers on a task of its own, in fp32; add out."""
    directory = tmp_path_factory.mktemp("grpo")
    (directory / "task.py").write_text(OWN_TASK)
    return dict(sft_adapter=sft_run, dtype="float32", task=str(directory / "task.py"), heldout_rows=3, updates=3, batch_size=4, group_size=4,
                completion_tokens=12, prompt_tokens=64, eval_every=2, pass_k=2, aggregate="sequence", beta=0.04, lr=3e-3,
                micro_tokens=512, device="cpu", checkpoint_every=1, results=str(directory / "results"))


@pytest.fixture(scope="session")
def grpo_run(grpo_args, tmp_path_factory):
    """A finished GRPO run directory on top of sft_run."""
    import grpo
    out = str(tmp_path_factory.mktemp("runs") / "grpo_v1")
    grpo.main(grpo.Args(**grpo_args, out=out))
    return out
