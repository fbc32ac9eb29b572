"""Tokenizers and chat templates: conversations to token ids with a mask of what is trained, checked while they are
rendered."""
from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Degenerate, fail, read_json

# A base model already reads plain role markers. Its EOS ends the assistant's turn (Qwen2.5-base: <|endoftext|>).
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}"
    "{%- else -%}{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}")

OWN_TEMPLATE = "the model's own"

# A template is tested with two exchanges, with and without a system message; no text is contained in another.
SAMPLE = [{"role": r, "content": c} for r, c in (
    ("system", "Write in verse."), ("user", "How are you?"), ("assistant", "Fine, thanks."), ("user", "And they?"),
    ("assistant", "Well enough."))]
TEMPLATE_DATE = time.strptime("2024-07-26", "%Y-%m-%d")  # what Llama 3's template writes where there is no clock


class Unrenderable(ValueError):
    """Why a conversation can't be rendered so that its mask is certain."""


class Unwritable(Unrenderable, Degenerate):
    """Not the template's fault, but that of a text for which the tokenizer has no tokens: such a row is dropped."""


@dataclass(frozen=True)
class ChatFormat:
    """What rendering needs to know of a tokenizer and its template; load_tokenizer works it out once."""
    control: dict[str, int]  # texts that are control tokens where the template writes them, and plain text in content
    stops: tuple[str, ...]   # the texts of tokenizer.stop_ids
    bos: int | None          # the BOS with which the tokenizer begins a text, or None
    names: dict[str, Any]    # what the template can use besides the messages
    any_text: bool = True    # has the vocabulary every byte? If not, what is encoded is decoded again and compared
    marks: tuple[str, ...] = ()  # those of `control` that the tokenizer doesn't call special
    system: bool = True      # does the template take a system message?
    eats_space: set[str] = frozenset()  # those that swallow the whitespace after them
    anchor: str = ""         # put before text inside a sequence, where the tokenizer would add a space at its beginning

    @functools.cached_property
    def split(self) -> re.Pattern:
        """Splits a text at its control tokens, and keeps them."""
        return re.compile(f"({'|'.join(map(re.escape, sorted(self.control, key=lambda t: (-len(t), t))))})")

    @functools.cached_property
    def stop(self) -> re.Pattern:
        """Matches a stop token's text."""
        return re.compile("|".join(map(re.escape, sorted(self.stops, key=lambda t: (-len(t), t)))))


def load_tokenizer(model_dir: str | Path):
    """The tokenizer with the one chat template: the model's own where masks are certain with it, else PLAIN_TEMPLATE.

    The model's own is used if its generation prompt is a prefix of what it renders for every answered turn, and the
    token after each answer is a stop token (see template_problem). Either also writes the BOS (see write_bos). Sets on
    the tokenizer:
    stop_ids: sorted ids that end an answer: its EOS and eos_token_id of generation_config.json;
    end_id: the one of them that the template writes;
    template_note: what was done to the template, or what it adds, in one line; None where there is nothing to say;
    chat_format: see ChatFormat.
    Fails on a tokenizer without EOS, one that no template serves, and ids beyond the model's embedding.
    """
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except Exception as e:  # a broken file raises what the code that reads it happens to stumble over
        if Path(model_dir).is_dir() and not [*Path(model_dir).glob("*token*"), *Path(model_dir).glob("vocab*")]:
            fail(f"{model_dir}: no tokenizer there (tokenizer.json)")
        fail(f"{model_dir}: can't load its tokenizer ({(str(e).splitlines() or [repr(e)])[0]})")
    if tokenizer.eos_token is None:
        fail(f"{model_dir}: the tokenizer has no EOS token")
    config = Path(model_dir) / "generation_config.json"
    ends = read_json(config).get("eos_token_id") if config.is_file() else None
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    tokenizer.stop_ids = tuple(sorted({tokenizer.eos_token_id, *ends}))
    notes, problem = [], "the tokenizer has no chat template"
    if tokenizer.chat_template:
        try:
            tokenizer.chat_template, notes = pin_template(tokenizer.get_chat_template())
            problem = template_problem(tokenizer)
        except ValueError as e:  # several templates, none of them the default; or a date that can't be fixed
            problem = str(e).splitlines()[0]
    if problem:
        tokenizer.chat_template = PLAIN_TEMPLATE
        notes = [f"plain role markers (User:, Assistant:), since {problem}"]
        if problem := template_problem(tokenizer):
            fail(f"{model_dir}: no chat template serves this tokenizer: {problem}")
        write_bos(tokenizer)
    else:
        if write_bos(tokenizer):
            notes.append("the BOS written")
        notes = notes and [f"{OWN_TEMPLATE}, with {' and '.join(notes)}"]
        lead = " ".join(tokenizer.chat_format.split.sub(" ", render_text(tokenizer, SAMPLE[1:])[0][0])
                        .partition(SAMPLE[1]["content"])[0].split())
        if len(lead.split()) > 2:  # more than the names of roles
            notes.append(f"before the first user turn it writes {lead[:200] + '…' * (len(lead) > 200)!r}")
        if not tokenizer.chat_format.system:
            notes.append("it takes no system message")
    tokenizer.template_note = "; ".join(notes) or None
    check_embedding(tokenizer, model_dir)
    return tokenizer


def pin_template(template: str) -> tuple[str, list[str]]:
    """(the template with its thinking off and its date fixed, in its text, so that whoever loads it renders the same;
    what was changed). ValueError on a date that can't be fixed."""
    notes = []
    if "enable_thinking" in template:
        template = "{% set enable_thinking = false %}" + template
        notes.append("thinking off")
    if "strftime_now" in template:
        template = re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
                          lambda call: json.dumps(time.strftime(call[2], TEMPLATE_DATE)), template)
        if re.search(r"strftime_now\s*\(", template):
            raise ValueError("the chat template writes today's date")
        notes.append(f"its date fixed at {time.strftime('%Y-%m-%d', TEMPLATE_DATE)}")
    return template, notes


def write_bos(tokenizer) -> bool:
    """Make the template write the BOS that the tokenizer puts before a text; returns whether it had to be added.

    apply_chat_template adds none by itself: without this, the saved template would give a model sequences that
    it was not trained on. The ids that render_many gives are the same either way.
    """
    begins = render_text(tokenizer, SAMPLE[1:])[0][0]
    if tokenizer.chat_format.bos is None or begins.startswith(tokenizer.bos_token):
        return False
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return True


def has_plain_markers(tokenizer) -> bool:
    """Is PLAIN_TEMPLATE in use, after the BOS or without one?"""
    return tokenizer.chat_template.endswith(PLAIN_TEMPLATE)


def template_problem(tokenizer) -> str | None:
    """Why the tokenizer's chat template can't be used, or None; sets tokenizer.chat_format and end_id.

    In SAMPLE every text must appear once, in order, and every answer directly after its generation prompt and before a
    stop token; the token ids must be those of the text as a whole. A template that fails only with a system message is
    used, and conversations with one are refused.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template
    named = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | {*tokenizer.all_special_tokens}
    try:
        template = _compile_jinja_template(tokenizer.chat_template)
    except Exception as e:  # a template that is none
        return f"the chat template doesn't compile ({e})"
    control = {t: i for t in named if (i := tokenizer.convert_tokens_to_ids(t)) is not None}
    added = {i: t.content for i, t in tokenizer.added_tokens_decoder.items()}
    stops = {added[i]: i for i in tokenizer.stop_ids if i in added} | {tokenizer.eos_token: tokenizer.eos_token_id}
    bos = tokenizer.bos_token_id if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None
    chat = ChatFormat(control | stops, tuple(stops), bos, dict(template.globals) | tokenizer.special_tokens_map,
                      any_text=knows_every_byte(tokenizer),
                      eats_space={t.content for t in tokenizer.added_tokens_decoder.values() if t.rstrip})
    tokenizer.chat_format = chat
    try:
        parts = render_text(tokenizer, SAMPLE[1:])
        text = "".join(part for part, _ in parts)
        if any(text.count(m["content"]) != 1 for m in SAMPLE[1:]):
            raise Unrenderable("the chat template leaves out a message, or writes it twice")
        tokenizer.end_id = chat.control[chat.split.split(parts[-1][0])[-2]]
    except Unrenderable as e:
        return str(e)
    try:
        with_system = "".join(part for part, _ in render_text(tokenizer, SAMPLE))
        system = all(with_system.count(m["content"]) == 1 for m in SAMPLE)
    except Unrenderable:
        system = False
    # Tokens that the tokenizer doesn't call special, but by which the template marks turns, are control tokens too.
    marks = {t: i for i, t in added.items()
             if t not in chat.control and len(t.strip()) > 1 and not t.isalnum() and t in text}
    chat = dataclasses.replace(chat, control=chat.control | marks, marks=tuple(marks), system=system)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    for anchor in ("", "\n"):
        tokenizer.chat_format = dataclasses.replace(chat, anchor=anchor)
        try:
            (ids, _), = tokenise(tokenizer, [SAMPLE[1:]])
        except Unwritable:
            return "the tokenizer can't write a short English conversation"
        except Unrenderable as e:
            return str(e)
        if ids in (whole, [chat.bos, *whole]):
            return None
    return "the tokenizer encodes a text in pieces and as a whole differently"


def same_text(a: str, b: str) -> bool:
    """But for whitespace."""
    return "".join(a.split()) == "".join(b.split())


def knows_every_byte(tokenizer) -> bool:
    """Does the vocabulary hold every byte, as a byte-level tokenizer's characters or as <0x00> to <0xFF>?"""
    from tokenizers.pre_tokenizers import ByteLevel
    for bytes_ in (ByteLevel.alphabet(), [f"<0x{i:02X}>" for i in range(256)]):
        if all(i not in (None, tokenizer.unk_token_id) for i in tokenizer.convert_tokens_to_ids([*bytes_])):
            return True
    return False


def check_embedding(tokenizer, model_dir: str | Path) -> None:
    """Fail when a token that rendering can produce has no row in the model's embedding."""
    config = read_json(Path(model_dir) / "config.json") if (Path(model_dir) / "config.json").is_file() else {}
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 1 << 60
    if max([len(tokenizer) - 1, *tokenizer.added_tokens_decoder]) < rows:
        return
    sample = SAMPLE if tokenizer.chat_format.system else SAMPLE[1:]
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    produced = {*tokenizer.get_vocab().values()} - special | {*tokenise(tokenizer, [sample])[0][0]}
    if beyond := sorted(i for i in produced if i >= rows):
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        fail(f"{model_dir}: the token {token!r} has the id {beyond[0]}, but the model's "
             f"embedding has {rows} rows ({len(beyond)} such tokens); resize it, or use the model's own tokenizer")


def render(tokenizer, messages: list[dict], train: str = "all") -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and its completion_mask (True = counts in the loss). See render_many."""
    return render_many(tokenizer, [messages], train)[0]


def render_prompt(tokenizer, messages: list[dict], name: str = "a prompt") -> list[int]:
    """Token ids of a prompt, ending where the answer begins: a prefix of what `render` gives with train="last"."""
    return render_many(tokenizer, [messages + [{"role": "assistant", "content": ""}]], "none", [name])[0][0]


def render_many(tokenizer, conversations: list[list[dict]], train: str = "all",
                names: Sequence[str] | None = None) -> list[tuple[list[int], list[bool]]]:
    """Render conversations with the chat template and tokenise each once: [(token ids, completion_mask)].

    train: "all" assistant turns count in the loss, only the "last", or "none": then the ids end where the last answer
    begins. A message with train false never counts. A turn's trained part runs from the end of the generation
    prompt through its stop token; what follows the last trained part is cut. Special tokens inside content stay plain
    text. An empty conversation gives no ids. Fails on a conversation that can't be rendered so, by its name; raises
    Unwritable where a text is at fault.
    """
    try:
        return tokenise(tokenizer, conversations, train)
    except Unwritable:
        raise
    except Unrenderable:  # one by one, to name it
        rendered = []
        for i, messages in enumerate(conversations):
            try:
                rendered += tokenise(tokenizer, [messages], train)
            except Unwritable:
                raise
            except Unrenderable as e:
                fail(f"{names[i] if names else f'conversation {i}'}: {e} (the chat template is "
                     f"{'plain role markers' if has_plain_markers(tokenizer) else OWN_TEMPLATE})")
        return rendered


def tokenise(tokenizer, conversations: list[list[dict]], train: str = "all") -> list[tuple[list[int], list[bool]]]:
    """What render_many does; raises Unrenderable. Prompt and completion are encoded apart, so that the prompt's ids are
    those a sampler starts from."""
    chat = tokenizer.chat_format
    used = {c for messages in conversations for m in messages
            for c in re.findall("[\U000f0000-\U0010ffff]", m["content"])}
    free = (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used)
    spare = [*itertools.islice(free, 2 + len(chat.control))]
    if len(spare) < 2 + len(chat.control):
        raise Unrenderable("it uses up the private-use characters of Unicode")
    mark, cut, *characters = spare
    # Control tokens in content are hidden behind characters that it doesn't contain. A tokenizer can be asked to leave
    # special tokens alone; other control tokens are cut in two and encoded apart.
    hidden = {**dict(zip(chat.control, characters)), **{t: t[0] + cut + t[1:] for t in chat.marks}}
    plans = [render_text(tokenizer, [m | {"content": chat.split.sub(lambda x: hidden[x[0]], m["content"])}
                                     for m in messages], train, mark) if messages else [] for messages in conversations]
    reveal = str.maketrans(dict(zip(characters, chat.control)))
    control = {*chat.control.values()}
    sequences = []  # of each conversation [(text, is it a control token?, does it follow other text?, trained)]
    for plan in plans:
        pieces, before, after_text = [], "", False
        for text, trained in plan:
            for k, part in enumerate(chat.split.split(text)):  # text, control token, text, …
                for piece in filter(None, (part.lstrip() if before in chat.eats_space else part).split(cut)):
                    pieces.append((piece, k % 2 == 1, after_text and bool(chat.anchor), trained))
                    before, after_text = piece, k % 2 == 0
        sequences.append(pieces)
    texts = {(piece, joined): [] for pieces in sequences
             for piece, is_control, joined, _ in pieces if not is_control}
    anchor = encode(tokenizer, [chat.anchor])[0] if chat.anchor else []
    plain = [(chat.anchor if joined else "") + piece.translate(reveal) for piece, joined in texts]
    try:
        encoded = encode(tokenizer, plain)
    except Exception as e:  # tokenizers has no kind of its own
        raise Unwritable(f"the tokenizer can't encode it ({e})") from None
    for (piece, joined), ids in zip(texts, encoded):
        texts[piece, joined] = ids[len(anchor):] if joined else ids
        written = chat.any_text or same_text(tokenizer.decode(ids), piece.translate(reveal))
        if not written or not control.isdisjoint(ids):
            raise Unwritable("the tokenizer can't write it")
    rendered = []
    for pieces in sequences:
        ids, mask = [], []
        for piece, is_control, joined, trained in pieces:
            ids += [chat.control[piece]] if is_control else texts[piece, joined]
            mask += [trained] * (len(ids) - len(mask))
        if ids and chat.bos is not None and ids[0] != chat.bos:
            ids, mask = [chat.bos, *ids], [False, *mask]
        rendered.append((ids, mask))
    return rendered


def render_text(tokenizer, messages: list[dict], train: str = "all",
                mark: str = "\U0010fffd") -> list[tuple[str, bool]]:
    """[(text, trained)] of a conversation whose content holds no control token and no `mark`; see render_many.

    Every answer stands directly after the template's own generation prompt. Some templates write an answer
    differently once the conversation goes on (Qwen3 drops its empty think block): for "all" such an answer stays as it
    was trained, otherwise it is written as in the last prompt.
    Raises Unrenderable where the template refuses the conversation, or writes other text than the answer's (but for
    whitespace around it), or no stop token after it.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template
    chat = tokenizer.chat_format
    template = _compile_jinja_template(tokenizer.chat_template)

    def write(messages: list[dict], add_generation_prompt: bool = False) -> str:
        values = {"messages": [{"role": m["role"], "content": m["content"]} for m in messages],
                  "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        try:  # template.render would copy the environment's functions for every conversation, which takes as long again
            return "".join(template.root_render_func(template.new_context(chat.names | values, shared=True)))
        except Exception as e:  # a template may raise any kind
            raise Unrenderable(f"the chat template refuses it ({(str(e).splitlines() or [repr(e)])[0]})") from None

    for m in messages:
        if re.search("[\ud800-\udfff]", m["content"]):
            raise Unrenderable(f"its content holds half a character (a lone surrogate): {ascii(m['content'][:80])}")
    if messages[0]["role"] == "system" and not chat.system:
        raise Unrenderable("the chat template takes no system message; put its text into the first user turn")
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    whole = write(messages) if train != "none" else write(messages[:answers[-1]], True)
    parts: list[tuple[str, bool]] = []
    written = ""  # the template's own text up to here
    for i in answers:
        asked, last = write(messages[:i], True), i == answers[-1]
        answered = whole if whole.startswith(asked) or train != "all" else write(messages[:i + 1])
        stop = chat.stop.search(answered, len(asked)) if answered.startswith(asked) else None
        fits = stop and answered[len(asked):stop.start()].strip() == messages[i]["content"].strip()
        counts = messages[i].get("train", True) and (train == "all" or train == "last" and last)
        if not fits and not (last and train == "none"):
            if counts:
                raise Unrenderable("the chat template writes a prompt in another way once it is answered"
                                   if not answered.startswith(asked) else
                                   "after its generation prompt the chat template writes "
                                   f"{answered[len(asked):][:60]!r}, not the answer and a stop token "
                                   f"({' or '.join(chat.stops)})")
            continue
        if asked.startswith(written):
            parts.append((asked[len(written):], False))
        elif train == "all":  # what comes between the answers, as the template writes it after a marked answer
            before = [*messages[:previous], messages[previous] | {"content": messages[previous]["content"] + mark}]
            rest = write(before + messages[previous + 1:i], True).partition(mark)[2]
            ended = chat.stop.search(rest)
            if not ended or rest[:ended.start()].strip():
                raise Unrenderable("the chat template changes an earlier answer as the conversation goes on")
            parts.append((rest[ended.end():], False))
        else:
            parts = [(asked, False)]
        if last and train == "none":
            break
        parts.append((answered[len(asked):stop.end()], counts))
        written, previous = answered[:stop.end()], i
    while train != "none" and parts and not parts[-1][1]:
        parts.pop()
    return parts


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, nothing added, special tokens in them plain text."""
    if not tokenizer.is_fast:
        return [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    backend = tokenizer.backend_tokenizer  # asked directly: no offsets, and no copies of all that isn't ids
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before
