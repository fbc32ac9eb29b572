"""Inputs of every case of the benchmark: a random model, a tokenizer and text of real-like lengths, made on the spot.

One model directory in a real model's shape, one word per token, lengths log-normal; nothing comes from a hub, and every
system reads the same files. Random weights cost as much time as trained ones.
"""
import json
import random
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import chat
import common
import inputs
import fast

SHAPES = {
    "qwen2.5-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                         num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768),
    "qwen2.5-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                         num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768),
    "tiny": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=4096, max_position_embeddings=2048),
}
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
WORDS = ("the model answers a question about how people learn to write code and read books in many countries with small "
         "steps user assistant").split()
STOP_EVERY = 512  # of 256 tokens, 39 % of the answers end earlier
MAX_LENGTH = 1024  # tokens; the text stays below, so that no system cuts or drops a row
TASK = """import json, pathlib
def rows():
    return [{{"prompt": json.loads(line)["prompt"]}} for line in pathlib.Path({prompts!r}).read_text().splitlines()]
def reward(row, completion):
    return float(len(completion) % 3)
"""


def make_tokenizer(directory: Path) -> None:
    """Byte-level BPE in which every word of WORDS is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([" ".join(WORDS + WORDS)] * 8, trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer_fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer_fast.chat_template = CHATML
    tokenizer_fast.save_pretrained(directory)


def make_model(directory: Path, shape: str, dtype: torch.dtype) -> None:
    """A model directory with random weights. One of STOP_EVERY tokens ends an answer, so that sampled answers have many
    lengths, as real ones do, and rewards differ within a group: GRPO gives 0 to an answer that doesn't end."""
    make_tokenizer(directory)
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    model = Qwen2ForCausalLM(config).to(dtype)
    model.generation_config.eos_token_id = [*range(2, config.vocab_size, STOP_EVERY)]
    model.save_pretrained(directory)


def words(n: int, seed: str) -> str:
    g = random.Random(seed)
    return " ".join(g.choice(WORDS) for _ in range(n))


def length(g: random.Random, mu: float, sigma: float, low: int, high: int) -> int:
    return int(min(high, max(low, g.lognormvariate(mu, sigma))))


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def pair(i: int, shorter: int) -> dict:
    """A preference row: prompts of 120 words, answers of 240 and 200, in the median; or of a part of that."""
    g = random.Random(f"pair {i}")
    prompt, chosen, rejected = (n // shorter for n in (length(g, 4.8, 0.7, 16, 380), length(g, 5.5, 0.6, 32, 580),
                                                       length(g, 5.3, 0.6, 32, 580)))
    return {"prompt": user(words(prompt, f"prompt {i}")), "chosen": assistant(words(chosen, f"chosen {i}")),
            "rejected": assistant(words(rejected, f"rejected {i}"))}


def chat_row(i: int, shorter: int) -> dict:
    """A conversation of one exchange: a prompt of 120 words, an answer of 400, in the median; or of a part of that."""
    g = random.Random(f"chat {i}")
    prompt, answer = (n // shorter for n in (length(g, 4.8, 0.7, 16, 380), length(g, 6.0, 0.6, 64, 580)))
    return {"messages": user(words(prompt, f"question {i}")) + assistant(words(answer, f"answer {i}"))}


def in_part(part: str, n: int, shorter: int, first: int = 0) -> list[dict]:
    """The first n pairs whose prompt is in this part of the preference data, from index `first`."""
    pairs, i = [], first
    while len(pairs) < n:
        row, i = pair(i, shorter), i + 1
        if inputs.preference_parts([row["prompt"]]) == [part] and not inputs.is_judge_prompt(row["prompt"]):
            pairs.append(row)
    return pairs


def labelled(row: dict, i: int) -> dict:
    """One answer of a pair, desirable where i is even."""
    return {"prompt": row["prompt"], "completion": row["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}


def write(path: Path, rows: list[dict]) -> None:
    common.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def sequences(tokenizer, conversations: list[list[dict]], unit: int = 1) -> dict[str, int | list[int]]:
    """{"lengths": tokens of each conversation, "shared": how many it begins with that the one before it, in its unit, begins
    with too, "predicted": tokens of all answers}."""
    rendered = chat.render_many(tokenizer, conversations, train="last")
    return {"lengths": [len(ids) for ids, _ in rendered], "predicted": sum(sum(mask) for _, mask in rendered),
            "shared": fast.packing.shared_in_units([ids for ids, _ in rendered], unit)}


def make(work: Path, shape: str, rows: int, prompts: int, dtype: torch.dtype) -> None:
    """Everything under `work`: model/, *.jsonl with `rows` rows (`prompts` for sampling), task.py, and sizes.json.

    The tiny shape gets texts of a quarter of the length.
    """
    shorter = 4 if shape == "tiny" else 1
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    make_model(work / "model", shape, dtype)
    chats, pairs = [chat_row(i, shorter) for i in range(rows)], in_part("A", rows, shorter)
    asked, held = in_part("B", prompts, shorter), in_part("A", 16, shorter, first=10**6)
    labels = [labelled(row, i) for i, row in enumerate(pairs)]
    for name, train, heldout in (("sft", chats, [chat_row(10**6 + i, shorter) for i in range(16)]), ("pairs", pairs, held),
                                 ("labels", labels, [labelled(row, i) for i, row in enumerate(held)])):
        write(work / f"{name}.jsonl", train)
        write(work / f"{name}_heldout.jsonl", heldout)
    write(work / "prompts.jsonl", asked)
    (work / "task.py").write_text(TASK.format(prompts=str((work / "prompts.jsonl").resolve())))
    tokenizer = chat.load_tokenizer(work / "model")
    both = sequences(tokenizer, [row["prompt"] + row[side] for row in pairs for side in ("chosen", "rejected")], 2)
    common.write_json(work / "sizes.json", {
        "sft": sequences(tokenizer, [row["messages"] for row in chats]), "dpo": both,
        "reward": both | {"predicted": 0}, "kto": sequences(tokenizer, [row["prompt"] + row["completion"] for row in labels]),
        "prompts": [len(chat.render_prompt(tokenizer, row["prompt"])) for row in asked]})
