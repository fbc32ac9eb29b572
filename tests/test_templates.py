"""Chat templates of each kind: which are used, what is trained, and that content never turns into control tokens."""
import io
import json
import random
import sys
from dataclasses import dataclass

import pytest
import torch
from conftest import CHATML, WORDS, write_jsonl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import chat
import common
import inputs
import reward
import sft

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


SYSTEM = {"role": "system", "content": "You read books."}
TURNS = [user("why is the sky blue"), assistant("rain"), user("rain"), assistant(" it reads\n  books "), user("so"),
         assistant("rain")]


def save_tokenizer(directory, tokens, eos, bos=None, template=None, adds_bos=False, plain=(), stops=None,
                   eats_space=False):
    """A byte-level tokenizer with these special tokens and, not called special, `plain`; generation_config.json names
    `stops`. With eats_space its special tokens take the whitespace after them with them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainers.BpeTrainer(
        vocab_size=400, special_tokens=[AddedToken(t, rstrip=eats_space) for t in tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos,
                                   extra_special_tokens=list(tokens))
    fast.chat_template = template
    fast.save_pretrained(directory)
    if stops:
        ids = [tokenizer.token_to_id(t) for t in stops]
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids if len(ids) > 1 else ids[0]}))
    return directory


def chatml(default="", think="", last_think="", asked_think="", end="<|im_end|>", content="m.content"):
    """ChatML with changes."""
    return (
        ("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n" + default + "<|im_end|>\n' }}{% endif %}"
         if default else "") +
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{{ '" + think + "' + ('" + last_think + "' if loop.last else '') }}{% endif %}"
        "{{ " + content + " + '" + end + "\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + asked_think + "' }}{% endif %}")


INST = ("<s>", "</s>", "[INST]", "[/INST]")
RAISES_ON_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}")
SYSTEM_BEFORE_LAST_USER = (  # only while the user's turn is the last message, as in Mistral Nemo's
    "{% if messages[0].role == 'system' %}{% set system, turns = messages[0].content, messages[1:] %}{% else %}"
    "{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST]' + system + '\n\n' + m.content + '[/INST]' }}{% else %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% endif %}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}")
SYSTEM_BEFORE_EVERY_LAST_USER = (  # before the last user turn, answered or not
    "{% set turns = messages | rejectattr('role', 'equalto', 'system') | list %}{{ bos_token }}"
    "{% set users = turns | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in turns %}{% if m.role == 'user' %}{{ '[INST]' }}"
    "{% if messages[0].role == 'system' and m == users[-1] %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}")
MERGED = (  # Gemma's kind: the system message goes into the first user turn, content is trimmed, no EOS but another end
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set first, turns = messages[0].content + '\n\n', messages[1:] %}{% else %}"
    "{% set first, turns = '', messages %}{% endif %}{% for m in turns %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '')"
    " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
LLAMA = (  # Llama 3's kind: a date, BOS inside the template
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set system, turns = messages[0].content, messages[1:] %}{% else %}"
    "{% set system, turns = '', messages %}{% endif %}"
    "{{ '<|head|>system<|/head|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot|>' }}{% for m in turns %}"
    "{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}")
QWEN3 = chatml(  # thinking is a switch; an empty think block stands in the last answer only
    last_think="<think>\n\n</think>\n\n",
    asked_think="' + ('<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '') + '")
LLAMA_TOKENS = dict(tokens=("<|begin|>", "<|end|>", "<|head|>", "<|/head|>", "<|eot|>"), eos="<|eot|>", bos="<|begin|>")
GEMMA = dict(tokens=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), eos="<eos>", bos="<bos>", adds_bos=True,
             template=MERGED)
QWEN = dict(tokens=CHATML_TOKENS, eos="<|im_end|>")
MISTRAL = dict(tokens=INST, eos="</s>", bos="<s>")

# kind: tokenizer, the end of an answer with the model's own template (None: replaced), does it take a system message,
# words of the note
KINDS = {
    "chatml": (QWEN | {"template": CHATML}, "<|im_end|>", True, None),
    "system merged into the first user turn": (
        GEMMA | {"stops": ["<eos>", "<end_of_turn>"]}, "<end_of_turn>", True, None),
    "terminator not a stop id": (GEMMA | {"stops": ["<eos>"]}, None, True, "Fine, thanks.<end_of_turn>"),
    "EOS text differs from the EOS token": (
        QWEN | {"template": chatml(end="</s>")}, None, True, "not the answer and a stop token (<|im_end|>)"),
    "base model with ChatML": (
        QWEN | {"eos": "<|endoftext|>", "template": CHATML, "stops": ["<|endoftext|>"]}, None, True, "<|im_end|>"),
    "no template": (QWEN, None, True, "has no chat template"),
    "trims whitespace": (QWEN | {"template": chatml(content="m.content | trim")}, "<|im_end|>", True, None),
    "default system prompt": (
        QWEN | {"template": chatml(default="You are a kind model.")}, "<|im_end|>", True, "You are a kind model."),
    "think block in the last answer only": (
        QWEN | {"template": QWEN3, "plain": ["<think>", "</think>"]}, "<|im_end|>", True, "thinking off"),
    "think block in the last answer, not in the prompt": (
        QWEN | {"template": chatml(last_think="<think>\n\n</think>\n\n")}, None, True, "<think>"),
    "think block in the prompt, not in the answer": (
        QWEN | {"template": chatml(asked_think="<think>\n")}, None, True,
        "a prompt in another way once it is answered"),
    "tokens that take the whitespace after them with them": (
        QWEN | {"template": chatml(content="m.content | trim"), "eats_space": True}, "<|im_end|>", True, None),
    "answer prefix": (QWEN | {"template": chatml(think="Answer: ")}, None, True, "Answer: Fine"),
    "no system message": (MISTRAL | {"template": RAISES_ON_SYSTEM}, "</s>", False, "takes no system message"),
    "system before the last user turn": (
        MISTRAL | {"template": SYSTEM_BEFORE_LAST_USER}, "</s>", False, "takes no system message"),
    "system before the last user turn, answered too": (
        MISTRAL | {"template": SYSTEM_BEFORE_EVERY_LAST_USER}, "</s>", False, "takes no system message"),
    "date and BOS inside": (
        LLAMA_TOKENS | {"template": LLAMA, "adds_bos": True}, "<|eot|>", True, "Today Date: 26 Jul 2024"),
    "a date that can't be fixed": (
        LLAMA_TOKENS | {"template": "{% set f = '%d' %}{{ strftime_now(f) }}" + LLAMA}, None, True, "today's date"),
    "BOS by the tokenizer only": (
        LLAMA_TOKENS | {"template": LLAMA.replace("{{ bos_token }}", ""), "adds_bos": True}, "<|eot|>", True,
        "the BOS written"),
    "BOS by the tokenizer, no template": (LLAMA_TOKENS | {"adds_bos": True}, None, True, "has no chat template"),
    "not a template": (QWEN | {"template": "{% for m in messages %}"}, None, True, "doesn't compile"),
    "leaves out earlier turns": (
        QWEN | {"template": "{% set messages = messages[-2:] %}" + CHATML}, None, True,
        "a prompt in another way once it is answered"),
}


def trained_texts(tokenizer, ids, mask):
    """The trained parts, decoded."""
    parts, before = [], False
    for token, trained in zip(ids, mask):
        if trained:
            parts = parts if before else [*parts, []]
            parts[-1].append(token)
        before = trained
    return [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_template(tmp_path, kind, capsys):
    options, end, takes_system, note = KINDS[kind]
    tokenizer = chat.load_tokenizer(save_tokenizer(tmp_path, **options))
    assert chat.has_plain_markers(tokenizer) == (end is None)
    assert tokenizer.chat_format.system == takes_system
    assert note in tokenizer.template_note if note else tokenizer.template_note is None
    end = end or options["eos"]
    bos, end_id = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(end)
    assert end_id == tokenizer.end_id and end_id in tokenizer.stop_ids
    inputs.say_template(tokenizer)
    line = capsys.readouterr().out
    assert ("WARNING" in line) == chat.has_plain_markers(tokenizer) and (note or end) in line
    for before in ([], [SYSTEM]):
        if before and not takes_system:
            with pytest.raises(SystemExit):
                chat.render_many(tokenizer, [TURNS, before + TURNS], names=["data.jsonl, row 0", "data.jsonl, row 1"])
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "data.jsonl, row 1: the chat template takes no system message" in error
            continue
        for n in (2, 4, 6):
            messages = before + TURNS[:n]
            answers = [m["content"] for m in messages if m["role"] == "assistant"]
            ids, mask = chat.render(tokenizer, messages)
            spans = trained_texts(tokenizer, ids, mask)
            assert [s.removesuffix(end).strip() for s in spans] == [a.strip() for a in answers]
            assert all(s.endswith(end) for s in spans) and mask[-1] and ids[-1] == end_id
            assert all(m["content"].strip() in tokenizer.decode(ids) for m in messages)

            prompt = chat.render_prompt(tokenizer, messages[:-1])
            last_ids, last_mask = chat.render(tokenizer, messages, train="last")
            assert last_ids[:len(prompt)] == prompt
            assert last_mask == [False] * len(prompt) + [True] * (len(last_ids) - len(prompt))
            assert trained_texts(tokenizer, last_ids, last_mask) == spans[-1:]
            if "last answer only" not in kind:  # whose earlier answers are written in another way than they were asked
                assert last_ids == ids
            text = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
            if not tokenizer.chat_format.eats_space:
                assert tokenizer.decode(prompt) == text  # BOS included: apply_chat_template adds none to the template's
            for sequence in (ids, prompt):
                begins = options.get("adds_bos") or "{{ bos_token }}" in tokenizer.chat_template
                assert [t for t in sequence if t == bos] == sequence[:1] if begins else bos not in sequence


def test_an_answer_stays_as_it_was_trained(tmp_path):
    """Qwen3's template drops the empty think block of earlier answers; in training every answer stands after the prompt
    that asked for it, and in a prompt the earlier ones are as the template has them."""
    options = KINDS["think block in the last answer only"][0]
    tokenizer = chat.load_tokenizer(save_tokenizer(tmp_path, **options))
    head, think = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    first = f"<|im_start|>user\nwhy is the sky blue<|im_end|>\n{head}"
    after = f"rain<|im_end|>\n<|im_start|>user\nrain<|im_end|>\n{head}{think}"
    assert tokenizer.decode(chat.render(tokenizer, TURNS[:4])[0]) == \
        first + think + after + " it reads\n  books <|im_end|>"
    assert tokenizer.decode(chat.render_prompt(tokenizer, TURNS[:3])) == first + after
    assert tokenizer.convert_tokens_to_ids("<think>") in chat.render_prompt(tokenizer, TURNS[:3])


@dataclass
class Settings:
    lr: float = 1e-4
    seed: int = 42


def test_the_default_model_has_plain_role_markers(tmp_path):
    """Qwen2.5-0.5B's layout: a ChatML template whose <|im_end|> is no stop token, a default system prompt."""
    directory = save_tokenizer(tmp_path, CHATML_TOKENS, "<|endoftext|>", stops=["<|endoftext|>"],
                               template=chatml(default="You are a helpful assistant."))
    tokenizer = chat.load_tokenizer(directory)
    assert tokenizer.stop_ids == (0,) and tokenizer.end_id == 0 and tokenizer.chat_format.bos is None
    assert chat.render(tokenizer, [SYSTEM, *TURNS[:2]])[0] == [
        *tokenizer("System: You read books.\n\nUser: why is the sky blue\n\nAssistant:")["input_ids"],
        *tokenizer(" rain<|endoftext|>")["input_ids"]]
    assert common.sha256_json(tokenizer.chat_template)[:16] == "fac49a0fa444b672"
    name, _, revision = common.QWEN.partition("@")
    invariants = common.TrainInvariants(name, revision, "0" * 64, tokenizer.chat_template, "qlora",
                                        stop_ids=tokenizer.stop_ids, bos=tokenizer.chat_format.bos)
    assert common.config_hash("sft", Settings(), invariants, {"train": "sha256:0"}, None) == "aa2f420a"


@pytest.mark.parametrize("change", ["stops", "bos", "template"])
def test_invariants_hold_template_stop_tokens_and_bos(tiny_model, tmp_path, change):
    """Two bases of the same weights are two bases where these differ."""
    hashes = []
    for name, options in (("a", GEMMA), ("b", GEMMA | {
            "stops": {"stops": ["<eos>", "<start_of_turn>"]}, "bos": {"adds_bos": False},
            "template": {"stops": ["<end_of_turn>"]}}[change])):
        tokenizer = chat.load_tokenizer(save_tokenizer(tmp_path / name, **options))
        hashes.append(common.TrainInvariants.of(tiny_model, tiny_model, tokenizer, "none").hash)
    assert hashes[0] != hashes[1]


def test_a_date_is_fixed_in_the_template_that_is_saved(tmp_path):
    tokenizer = chat.load_tokenizer(save_tokenizer(tmp_path / "a", template=LLAMA, **LLAMA_TOKENS))
    assert "its date fixed at 2024-07-26" in tokenizer.template_note and "strftime_now(" not in tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "b")
    saved = AutoTokenizer.from_pretrained(tmp_path / "b")
    text = saved.apply_chat_template(TURNS[:1], add_generation_prompt=True, tokenize=False)
    assert "Today Date: 26 Jul 2024" in text and text == tokenizer.decode(chat.render_prompt(tokenizer, TURNS[:1]))


def test_a_template_whose_prompt_depends_on_content(tmp_path, capsys):
    """Only after /no_think its generation prompt has a think block that an answered turn hasn't: those are named."""
    template = chatml(asked_think="' + ('<think>\n\n</think>\n\n' if '/no_think' in messages[0].content else '') + '")
    tokenizer = chat.load_tokenizer(save_tokenizer(tmp_path, template=template, **QWEN))
    assert tokenizer.template_note is None
    rows = [TURNS, [{"role": "system", "content": "/no_think"}, *TURNS]]
    with pytest.raises(SystemExit):
        chat.render_many(tokenizer, rows, names=["x.jsonl, row 7", "x.jsonl, row 8"])
    assert "error: x.jsonl, row 8: the chat template writes a prompt in another way" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["sft", "preference"])
def test_a_refused_row_is_named_by_the_script(tmp_path, capsys, script):
    tokenizer = chat.load_tokenizer(save_tokenizer(tmp_path, template=RAISES_ON_SYSTEM, **MISTRAL))
    if script == "sft":
        build = sft.build_examples(tokenizer, sft.Args())
        rows = [(TURNS, "all"), ([SYSTEM, *TURNS], "all")]
    else:
        build = reward.build_pairs(tokenizer, reward.Args())
        rows = [([*before, *TURNS[:1]], "rain", "books") for before in ([], [SYSTEM])]
    with pytest.raises(SystemExit) as stop:
        build(rows, ["x.jsonl, row 0", "x.jsonl, row 1"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "error: x.jsonl, row 1: the chat template takes no system message" in error


@pytest.mark.parametrize("kind", ["chatml", "system merged into the first user turn", "date and BOS inside",
                                  "think block in the last answer only", "base model with ChatML"])
def test_content_never_turns_into_control_tokens(tmp_path, kind):
    """Special tokens written in text, the characters they hide in meanwhile, NUL: text comes back as text."""
    tokenizer = chat.load_tokenizer(save_tokenizer(tmp_path, **KINDS[kind][0]))
    control = {*tokenizer.chat_format.control.values()}
    g = random.Random(1)
    pieces = [*tokenizer.chat_format.control, "\U000f0000", "\U000f0001", "\U00100000", "\U0010fffd", "\0", "\n", " ",
              "why", "<|im_", "end|>", "é", "🙂", "{{ 1 }}", "\u2028"]
    conversations = [[m | {"content": f"a{''.join(g.choices(pieces, k=6))}b"} for m in TURNS] for _ in range(40)]
    neutral, _ = chat.render(tokenizer, [m | {"content": "ab"} for m in TURNS])
    for messages, (ids, mask) in zip(conversations, chat.render_many(tokenizer, conversations)):
        assert [t for t in ids if t in control] == [t for t in neutral if t in control]
        end = tokenizer.convert_ids_to_tokens(tokenizer.end_id)
        assert [s.removesuffix(end).strip() for s in trained_texts(tokenizer, ids, mask)] == [
            m["content"] for m in messages if m["role"] == "assistant"]
    assert chat.render_many(tokenizer, conversations) == [chat.render(tokenizer, m) for m in conversations]


def test_half_a_character_is_named(tmp_path, capsys):
    tokenizer = chat.load_tokenizer(save_tokenizer(tmp_path, template=CHATML, **QWEN))
    with pytest.raises(SystemExit):
        chat.render_many(tokenizer, [TURNS, [user("\ud83d"), assistant("x")]], names=["row 0", "row 1"])
    assert "row 1: its content holds half a character (a lone surrogate): '\\ud83d'" in capsys.readouterr().err


def test_a_message_that_is_not_to_be_trained(tmp_path):
    tokenizer = chat.load_tokenizer(save_tokenizer(tmp_path, template=CHATML, **QWEN))
    first = [TURNS[0], assistant("wrong", train=False), *TURNS[2:4]]
    ids, mask = chat.render(tokenizer, first)
    assert ids == chat.render(tokenizer, [TURNS[0], assistant("wrong"), *TURNS[2:4]])[0]
    assert trained_texts(tokenizer, ids, mask) == [" it reads\n  books <|im_end|>"]
    ids, mask = chat.render(tokenizer, [*TURNS[:2], user("so"), assistant("wrong", train=False)])
    assert (ids, mask) == chat.render(tokenizer, TURNS[:2])  # what follows the last trained answer is cut
    assert chat.render(tokenizer, [TURNS[0], assistant("wrong", train=False)]) == ([], [])


def test_a_text_that_the_tokenizer_cannot_write(tmp_path, capsys):
    """A vocabulary without the letter q: the tokenizer leaves it out, encodes it as an unknown token, or fails. Such a row
    is dropped and counted; more than --max-dropped of them are an error."""
    texts = [*WORDS, *(m["content"] for m in chat.SAMPLE), "user", "assistant", "User:", "Assistant:"]
    for name, model, trainer in (("leaves out", models.BPE(), trainers.BpeTrainer),
                                 ("unknown", models.BPE(unk_token="<|endoftext|>"), trainers.BpeTrainer),
                                 ("fails", models.WordLevel(), trainers.WordLevelTrainer)):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.train_from_iterator([t.replace("q", "") for t in texts], trainer(
            vocab_size=200, special_tokens=[*CHATML_TOKENS], show_progress=False))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML,
                                extra_special_tokens=[*CHATML_TOKENS]).save_pretrained(tmp_path / name)
        loaded = chat.load_tokenizer(tmp_path / name)
        assert not loaded.chat_format.any_text
        chat.render(loaded, [user("why is the sky blue"), assistant("books")])
        with pytest.raises(chat.Unwritable, match="the tokenizer can't "):
            chat.render_many(loaded, [[user("why"), assistant(a)] for a in ("books", "a question")])

        def take(odd):
            rows = [[user("why"), assistant("a question" if i in odd else "books " * (i + 1))] for i in range(20)]
            return inputs.take_rows(rows, 20, 1, lambda i, row: row, lambda chats, names: [
                ids for ids, _ in chat.render_many(loaded, chats, names=names)], "x.jsonl", 0.05)
        items, dropped, kept = take({5})
        (why, count), = dropped.items()
        assert why.startswith("the tokenizer can't ") and count == 1 and {*kept} == {*range(20)} - {5}
        assert items == [chat.render(loaded, [user("why"), assistant("books " * (i + 1))])[0] for i in kept]
        with pytest.raises(SystemExit):
            take({5, 6})
        assert "x.jsonl: 2 of 20 rows are degenerate (the tokenizer can't " in capsys.readouterr().err


def save_spaced_tokenizer(directory, template):
    """A tokenizer that puts a space before every text (Llama 2's kind), with bytes for what it doesn't know."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(WORDS * 4, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)),
             *sorted(model["vocab"], key=model["vocab"].get)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, [tuple(m) for m in model["merges"]],
                                     unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    return directory


def test_a_tokenizer_that_puts_a_space_before_every_text(tmp_path):
    """An answer that follows text directly gets no second space: the ids are those of the whole text."""
    tokenizer = chat.load_tokenizer(save_spaced_tokenizer(tmp_path, RAISES_ON_SYSTEM))
    assert tokenizer.chat_template == RAISES_ON_SYSTEM and tokenizer.chat_format.anchor
    ids, mask = chat.render(tokenizer, TURNS)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    spans = trained_texts(tokenizer, ids, mask)
    assert [s.strip() for s in spans] == ["rain</s>", "it reads\n  books </s>", "rain</s>"]
    prompt = chat.render_prompt(tokenizer, TURNS[:1])
    assert ids[:len(prompt)] == prompt and tokenizer.decode(prompt).endswith("[/INST]")


@pytest.mark.parametrize("beyond, refused", [("eos", True), ("text", True), ("unused special", False)])
def test_token_beyond_the_embedding(tmp_path, capsys, beyond, refused):
    save_tokenizer(tmp_path, CHATML_TOKENS[:2] if beyond == "eos" else CHATML_TOKENS, CHATML_TOKENS[0], template=CHATML)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(saved)}))
    if beyond == "eos":
        saved.add_special_tokens({"eos_token": "<|im_end|>"})
    else:
        saved.add_tokens([AddedToken("sky", special=beyond != "text")])
    saved.save_pretrained(tmp_path)
    if not refused:
        chat.load_tokenizer(tmp_path)
        return
    with pytest.raises(SystemExit):
        chat.load_tokenizer(tmp_path)
    error, last = capsys.readouterr().err, len(saved) - 1
    assert f"has the id {last}, but the model's embedding has {last} rows" in error


def test_printing_where_the_terminal_is_not_utf8(monkeypatch):
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", latin)
    common.say("trained ⟦é⟧ \ud83d")
    assert latin.buffer.getvalue().decode("latin-1") == "trained ?é? ?\n"


def test_sampling_ends_at_any_stop_token(tiny_model):
    tokenizer, model = chat.load_tokenizer(tiny_model), common.load_model(tiny_model, dtype=torch.float32)
    prompt = chat.render_prompt(tokenizer, TURNS[:1])
    tokenizer.stop_ids = (len(tokenizer),)  # none
    whole = common.Sampler(model, tokenizer).sample([prompt], 12)[0]
    assert whole.stopped == "length"
    tokenizer.stop_ids = (len(tokenizer), whole.ids[4])
    stopped = common.Sampler(model, tokenizer).sample([prompt], 12)[0]
    end = whole.ids.index(whole.ids[4]) + 1
    assert stopped.ids == whole.ids[:end] and stopped.stopped == "eos"


def test_a_run_records_its_template_and_stop_tokens(tmp_path, sft_args, capsys):
    """SFT on a base of Gemma's kind: what is trained, the line at the start, run.json, the card, the saved template."""
    model = tmp_path / "model"
    options = KINDS["system merged into the first user turn"][0]
    save_tokenizer(model, **options | {"template": "{# strftime_now #}" + options["template"]})
    from transformers import LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
                     ).float().save_pretrained(model, generation_config=None)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    rows = [{"messages": [user(f"why {i}"), assistant("it is blue")]} for i in range(8)]
    data = write_jsonl(tmp_path / "x.jsonl", rows)
    write_jsonl(tmp_path / "x_heldout.jsonl", [{"messages": [user("when"), assistant("it rains")]}] * 4)
    out = tmp_path / "run"
    sft.main(sft.Args(**sft_args | {"model": str(model), "data": data, "rows": 8, "heldout_rows": 4}, out=str(out)))
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("chat template: "))
    run = json.loads((out / "run.json").read_text())
    assert run["template"] == "the model's own, with its date fixed at 2024-07-26" and run["template"] in line
    assert "answers end with <end_of_turn>; every sequence begins with <bos>" in line
    assert run["invariants"]["stop_ids"] == [1, 3] and run["invariants"]["bos"] == 0
    assert f"| chat template | {run['template']} |" in (out / "README.md").read_text()
    assert (out / "chat_template.jinja").read_text() == run["invariants"]["chat_template"]
