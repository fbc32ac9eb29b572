"""guardrails.py: figures of a row's answers that need no judge: length, endings, refusals, repetition.

Each figure is computed per answer; a row has the means. Unlike a win rate, they show whether a policy still answers.
Its answers have collapsed when one of these bounds is crossed, and then no judge's win rate is evidence:
    refusal_rate     above REFUSES: it refuses most prompts
    repetition_rate  above LOOPS: most answers are stuck in a loop
    eos_rate         below ENDS times the reference's: far fewer answers end
    tokens_mean      below LENGTH times the reference's: the answers are almost empty
The reference is the row that the others are compared with, their SFT policy. A row with fewer than FEWEST answers is
never called collapsed.
"""

import functools
import re
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any, NamedTuple


REFUSES, LOOPS, ENDS, LENGTH, FEWEST = 0.5, 0.5, 0.5, 0.1, 20


class Prompt(NamedTuple):
    id: str
    messages: list[dict]
    ids: list[int]     # ends where the assistant's answer begins


class Answer(NamedTuple):
    ids: list[int]     # EOS included when it was sampled
    ended: bool        # with EOS
    text: str


def distinct(ids: Sequence[int], n: int) -> float | None:
    """Share of a completion's n-grams that are different; None where it has none."""
    grams = [tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def longest_repeat(ids: Sequence[int]) -> int:
    """Tokens of the longest span that occurs twice in a completion; the two may overlap."""
    def repeats(n: int) -> bool:  # if a span occurs twice, so do its shorter prefixes
        return len({tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)}) < len(ids) - n + 1
    low, high = 0, len(ids)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if repeats(middle) else (low, middle)
    return low


LOOP_UNIT, LOOP_TIMES, LOOP_TOKENS = 64, 3, 24


def has_loop(ids: Sequence[int]) -> bool:
    """Does a span of at most 64 tokens occur three times or more in a row, over 24 tokens or more in all?"""
    for unit in range(1, min(LOOP_UNIT, len(ids) // LOOP_TIMES) + 1):
        run, wanted = 0, max(LOOP_TIMES * unit, LOOP_TOKENS) - unit
        for i in range(unit, len(ids)):
            run = run + 1 if ids[i] == ids[i - unit] else 0
            if run >= wanted:
                return True
    return False


REFUSAL = re.compile(
    r"\bas an? (ai|artificial intelligence|(large )?language model)\b|\bsorry,? but i\b|"
    r"\bi(('m| am) (not able|unable|not allowed)| can ?not| can't| won't| will not) (to )?(assist|help|comply|fulfil|"
    r"provide|answer|do that|create|write|generate|engage|discuss|give|offer|support|share|participate)", re.I)


def is_refusal(text: str) -> bool:
    """Does a completion refuse in its first 200 characters? Matches English phrases: compare rates, not answers."""
    return bool(REFUSAL.search(text[:200].replace("’", "'")))


SURE, ENOUGH = 0.9, 40


@functools.cache  # every row answers the same prompts
def language(text: str) -> str | None:
    """Language of a text outside of code blocks; None for fewer than 40 letters, or where it is less than 90 % sure."""
    import langdetect
    langdetect.DetectorFactory.seed = 0
    prose = re.sub(r"```.*?(```|\Z)", " ", text, flags=re.S)
    if sum(map(str.isalpha, prose)) < ENOUGH:
        return None
    try:
        best = langdetect.detect_langs(prose)[0]
    except langdetect.LangDetectException:  # a script that it doesn't know
        return None
    return best.lang.split("-")[0] if best.prob >= SURE else None


def guardrails(prompts: Sequence[Prompt], answers: Sequence[Answer], stop_ids: Sequence[int]) -> dict[str, Any]:
    """Means over a row's completions. A token is one of the tokenizer's; a stop token counts in the length only."""
    bare = [a.ids[:-1] if a.ids[-1] in stop_ids else a.ids for a in answers]
    lengths = [len(a.ids) for a in answers]
    spoken = [(language(p.messages[-1]["content"]), language(a.text)) for p, a in zip(prompts, answers)]
    drifted = [prompt_language != answer_language for prompt_language, answer_language in spoken
               if prompt_language and answer_language]

    def mean(values) -> float | None:
        numbers = [v for v in values if v is not None]
        return fmean(numbers) if numbers else None
    return {"n": len(answers), "tokens_mean": fmean(lengths), "tokens_sd": pstdev(lengths),
            "eos_rate": mean(a.ended for a in answers), "refusal_rate": mean(is_refusal(a.text) for a in answers),
            **{f"distinct_{n}": mean(distinct(ids, n) for ids in bare) for n in (1, 2, 3)},
            "longest_repeat_mean": mean(map(longest_repeat, bare)), "repetition_rate": mean(map(has_loop, bare)),
            "language_drift_rate": mean(drifted), "language_n": len(drifted)}


def collapsed(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """How a row's answers have collapsed, from its figures and the reference's as guardrails() gives them (each with
    its "name"), such as "98 % refusals, 15 tokens where sft_v2 has 174"; "" when no bound is crossed."""
    def crossed(key: str, bound: float, above: bool) -> bool:
        value = row.get(key)
        return value is not None and bound is not None and (value > bound if above else value < bound)

    def of_reference(key: str, share: float) -> float | None:
        return None if reference.get(key) is None else share * reference[key]
    if row.get("n", FEWEST) < FEWEST:
        return ""
    reasons, name = [], reference.get("name")
    if crossed("refusal_rate", REFUSES, True):
        reasons.append(f"{100 * row['refusal_rate']:.0f} % refusals")
    if crossed("repetition_rate", LOOPS, True):
        reasons.append(f"{100 * row['repetition_rate']:.0f} % stuck in a loop")
    if crossed("eos_rate", of_reference("eos_rate", ENDS), False):
        ends = [f"{100 * one['eos_rate']:.0f} %" for one in (row, reference)]
        reasons.append(f"{ends[0]} of them end where {ends[1]} of {name}'s do")
    if crossed("tokens_mean", of_reference("tokens_mean", LENGTH), False):
        reasons.append(f"{row['tokens_mean']:.0f} tokens where {name} has {reference['tokens_mean']:.0f}")
    return ", ".join(reasons)
