"""harness.py: lm-evaluation-harness's model interface. evaluate.py imports it after it has checked its arguments.

`RungsLM` gives the numbers of lm-eval's HFLM (equal in fp32) from common.Sampler and from packed forwards without
padding, in which a prefix that items share is computed once. evaluate.py lists the deliberate deviations.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from tqdm import tqdm

import common
from common import Example, Sampler, fail


class Float32Head(torch.nn.Module):
    """The LM head of a bfloat16 model with fp32 logits, which are not rounded to bfloat16's 8 significant bits.

    Without CUDA, hidden states and weights are cast to fp32 and multiplied. On CUDA, tensor cores multiply the bfloat16
    numbers, which is exact in fp32, and add in fp32: the results differ only in the order and rounding of the sums, and
    no fp32 copy of the weights is needed.
    """

    def __init__(self, head: torch.nn.Module):
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.full = None if self.weight.is_cuda else head.weight.detach().float()  # [V, H]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            if self.full is not None:
                return torch.nn.functional.linear(hidden.float(), self.full, self.bias)
            logits = torch.mm(hidden.flatten(0, -2).to(self.weight.dtype), self.weight.T, out_dtype=torch.float32)
            return (logits if self.bias is None else logits + self.bias).unflatten(0, hidden.shape[:-1])


LINE_END = re.compile(r"\n(?<=[!-~]\n)(?=[A-Za-z])")  # a newline between a visible ASCII character and an ASCII letter
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip


def lines_of(text: str) -> list[str]:
    """The text, cut after every LINE_END."""
    cuts = [0, *(match.end() for match in LINE_END.finditer(text)), len(text)]
    return [text[a:b] for a, b in zip(cuts, cuts[1:])]


def opening(tokenizer) -> list[int] | None:
    """The special tokens that a tokenizer puts before a text (BOS; [] if none); None if it adds any elsewhere."""
    added, text = tokenizer("")["input_ids"], "a"
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    return added if tokenizer(text)["input_ids"] == added + alone else None


def lines_stand_alone(tokenizer) -> bool:
    """Whether a text's token ids are those of its `lines_of`, concatenated (and `opening` before them).

    BPE in general does not guarantee this; two kinds of tokenizer do. One is byte-level BPE over the words that GPT-2's
    or Qwen2's regular expression finds (SmolLM2, Qwen2.5): either expression ends a word at every LINE_END. None of its
    alternatives matches a newline together with the letter after it, and the only one with a lookahead, \\s+(?!\\S),
    cannot match there, since the character before the newline is not whitespace. The other is BPE whose tokenizer first
    splits a text at runs of newlines, because these are added tokens (Gemma 3). The result is False for every other
    tokenizer, and where dropout, a normalizer or an added token could make a line depend on its neighbour.
    """
    if not tokenizer.is_fast or opening(tokenizer) is None:
        return False
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    if definition["model"]["type"] != "BPE" or definition["model"].get("dropout"):
        return False
    words, normalizer = definition["pre_tokenizer"] or {}, definition["normalizer"]
    *before, last = words.get("pretokenizers") or [words]
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}
    digits = all(step["type"] == "Digits" for step in before)  # SmolLM2 on the hub splits digits off first
    byte_level = (
        last.get("type") == "ByteLevel"
        and not last["add_prefix_space"]
        and (digits if last["use_regex"] else before == [split])
        and normalizer in (None, {"type": "NFC"})  # composes nothing with a newline or before a letter
    )
    if any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in definition["added_tokens"]):
        return False
    newlines = [t for t in definition["added_tokens"] if "\n" in t["content"]]
    if byte_level:
        return not newlines
    spaces = {"type": "Replace", "pattern": {"String": " "}}
    return (
        any(t["content"] == "\n" for t in newlines)
        and not any(t["normalized"] or t["content"].strip("\n") for t in newlines)
        and (normalizer is None or normalizer | spaces == normalizer)
        and (not words or words["type"] == "Split" and words["pattern"] == spaces["pattern"])
    )


class RungsLM(TemplateLM):
    """lm-eval's interface (log-likelihoods of continuations, greedy text) over common's packed forward and sampler."""

    def __init__(self, model, tokenizer, micro_tokens: int, max_batch: int | None = None):
        super().__init__()
        self.model, self.tokenizer, self.micro_tokens, self.max_batch = model, tokenizer, micro_tokens, max_batch
        self.max_length = resolve_max_length(model.config, tokenizer)
        self.bos = tokenizer.decode([self.prefix_token_id])
        self.by_line = lines_stand_alone(tokenizer)
        self.opening = opening(tokenizer) if self.by_line else []
        self.encoded: dict[str, list[int]] = {}  # strings tokenised ahead, many at a time
        self.tokenised: dict[tuple, list] = {}  # arguments of requests -> their token ids, for the adapters that follow
        self.prompts_cut = 0  # requests whose context was cut from the left to the model's positions

    # -- conventions of HFLM: which token stands for an empty context, when BOS is added, how a chat becomes text

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        options["continue_final_message"] = not add_generation_prompt
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except Exception:  # a template without a system role; MMLU's description is one
            chat_history = [m for m in chat_history if m["role"] != "system"]
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except Exception as e:  # a template may raise any kind
            fail(f"the chat template refuses an evaluation prompt ({(str(e).splitlines() or [repr(e)])[0]}); "
                 f"use --protocol plain")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if add_special_tokens is not None:
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return self.encoded.get(string) or self.encode_many([string], self.bos)[0]

    def encode_many(self, strings: Sequence[str], bos: str | None) -> list[list[int]]:
        """Token ids of each string, with the special tokens that the tokenizer adds, unless it begins with `bos`.
        If lines can be tokenised separately, each distinct line is tokenised once: most of MMLU's are few-shot lines.
        """
        ids: list[list[int]] = [[]] * len(strings)
        for own_bos in (True, False):
            pieces = {i: lines_of(s) if self.by_line else [s]
                      for i, s in enumerate(strings) if has_bos_prefix(s, bos) == own_bos}  # fmt: skip
            if pieces:
                options = {"add_special_tokens": False} if own_bos or self.by_line else {}
                first = [] if own_bos else self.opening
                distinct = list(dict.fromkeys(chain.from_iterable(pieces.values())))
                tokenised = self.tokenizer(distinct, verbose=False, **options)["input_ids"]
                encoded = dict(zip(distinct, tokenised, strict=True))
                for i, parts in pieces.items():
                    ids[i] = [*first, *chain.from_iterable(encoded[part] for part in parts)]
        return ids

    # -- log-likelihoods

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(sum of log p(continuation tokens | context), whether greedy decoding gives them) of each request."""
        results = []
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as self.bar:
            for i in range(0, len(requests), 4096):  # bounds the ids held in memory; neighbours share contexts
                chunk = requests[i : i + 4096]
                arguments = tuple(r.args for r in chunk)
                if arguments not in self.tokenised:
                    # TemplateLM._encode_pair encodes the context without trailing spaces, and context + continuation
                    pairs = [(context.rstrip(), context + continuation) for context, continuation in arguments]
                    strings = list(dict.fromkeys(s for pair in pairs for s in pair if s))
                    self.encoded = dict(zip(strings, self.encode_many(strings, self.bos), strict=True))
                    self.tokenised[arguments] = super().loglikelihood(chunk, disable_tqdm=True)
                results += self.score(self.tokenised[arguments])
        self.encoded = {}
        return results

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[tuple[str, str], list[int], list[int]]]:
        """Returns the tokenised requests of TemplateLM.loglikelihood unchanged; `score` takes them."""
        return requests

    def score(self, requests: list[tuple[tuple[str, str], list[int], list[int]]]) -> list[tuple[float, bool]]:
        """requests: ((context, continuation), context ids, continuation ids). Requests with the same inputs (the
        four letters of an MMLU item) are one sequence, whose last positions are read once per request."""
        groups: dict[tuple, list[int]] = defaultdict(list)  # input ids -> requests
        for i, (texts, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(f"{len(context)} + {len(continuation)} tokens, room for {self.max_length}: {texts!r}")
            # The last token is only predicted. An over-long context is cut from the left.
            self.prompts_cut += len(context) + len(continuation) > self.max_length + 1
            groups[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(i)
        examples = []
        for ids, members in groups.items():
            continuations = [requests[i][2] for i in members]
            # token j of a continuation of n tokens is predicted at position len(ids) - n + j
            predict = [len(ids) - len(c) + j for c in continuations for j in range(len(c))]
            examples.append(Example(list(ids), predict, [token for c in continuations for token in c]))
        members = list(groups.values())
        micro_tokens, scores = max(self.micro_tokens, *map(len, groups)), []
        # The fast engine computes a prefix that sequences share (MMLU's examples, a TruthfulQA question) once.
        packs = common.micro_batches(self.model, examples, micro_tokens)
        with torch.no_grad():
            for pack in packs:
                logprobs, extras = common.token_logprobs(self.model, pack, extras=("correct",))  # [K] predicted tokens
                scores.append((logprobs, extras["correct"]))
                self.bar.update(sum(len(members[example]) for example in pack.examples))
        logprobs, correct = (torch.cat(x).tolist() for x in zip(*scores))  # read once: the GPU never waits for the host
        scored: list[list[tuple[float, bool]]] = [[] for _ in examples]  # of an example's targets, in order
        for example, *score in zip((row for pack in packs for row in pack.rows), logprobs, correct, strict=True):
            scored[example].append(score)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for tokens, requests_of in zip(scored, members, strict=True):
            for i in requests_of:
                n = len(requests[i][2])
                targets, tokens = tokens[:n], tokens[n:]
                results[i] = (sum(logprob for logprob, _ in targets), all(correct for _, correct in targets))
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        raise NotImplementedError("no task here measures perplexity")

    # -- greedy text

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The greedy response of each request, cut before EOS and before the task's stop strings."""
        texts = tuple(r.args[0] for r in requests)
        if texts not in self.tokenised:
            self.tokenised[texts] = self.encode_many(texts, self.tokenizer.bos_token)
        prompts = list(self.tokenised[texts])
        lengths, stops = [], []
        for i, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1])  # max_gen_toks: 256 where the task says nothing, as in HFLM
            stops.append([s for s in options.pop("until") if s])
            lengths.append(options.pop("max_gen_toks"))
            if options.pop("do_sample") or options.pop("temperature", 0.0) or options:
                raise NotImplementedError(f"evaluation is greedy; the task asks for {request.args[1]}")
            self.prompts_cut += len(prompts[i]) > self.max_length - lengths[i]
            prompts[i] = prompts[i][-(self.max_length - lengths[i]) :]  # over-long prompts are cut from the left
        with tqdm(total=len(requests), desc="responses", disable=disable_tqdm) as bar:
            sampler = Sampler(self.model, self.tokenizer, self.max_batch, short=True)
            completions = sampler.sample(
                prompts, lengths, temperature=0.0, top_p=1.0, seed=0, stop_strings=stops, progress=bar.update
            )
        return [self.cut(completion.ids, stop) for completion, stop in zip(completions, stops, strict=True)]

    def cut(self, ids: list[int], stops: list[str]) -> str:
        """The text before the first stop token, special token that contains a stop string, or stop string."""
        stops = handle_stop_sequences(list(stops), self.tokenizer.decode([self.eot_token_id]))  # and EOS
        ends = {i for i in self.tokenizer.all_special_ids if any(s in self.tokenizer.decode([i]) for s in stops)}
        ends |= {*getattr(self.tokenizer, "stop_ids", [])}
        end = next((k for k, i in enumerate(ids) if i in ends), len(ids))
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return postprocess_generated_text(text, stops, None)
