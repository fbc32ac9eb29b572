"""judge.py: compare the policies' answers to held-out prompts: guardrails of each row, win rates between rows.

    score of a prompt   1 if row a wins in both orders, 0 if row b does, ½ if both say tie or the orders disagree
    win rate            w = mean score over prompts; its 95 % interval by a bootstrap over prompts
    length-controlled   P(a wins) = σ(θ + γ tanh(Δ/sd Δ)), Δ = tokens of a − tokens of b;  the rate at Δ = 0 is σ(θ)
    KL to the reference Σ_t KL(π(·|x, y_<t) ‖ π_ref(·|x, y_<t)) over a row's own completion y, exact over the vocabulary
    moved weights       ‖ΔW‖ / ‖W‖ = √(Σ ‖(α/r) B A‖²_F / Σ ‖W‖²_F), sums over the modules that the adapter touches

Judging by models, its position and length bias: Zheng et al. 2023 (2306.05685). Length control: Dubois et al. 2024
(2404.04475), in its simple form, without a term for the prompt. Best-of-n and its KL: Stiennon et al. 2020
(2009.01325), appendix G.3. To compare with: tatsu-lab/alpaca_eval.

Judges, by --judge-model:
  api     a model behind any OpenAI-compatible endpoint (--judge-url), asked at temperature 0 for one letter
  local   a causal LM or a policy of ours; the verdict is the likeliest of the three letters, nothing is sampled
  reward  a reward model of ours; the higher score wins
A judge that is the base, one of the policies, or what a policy was trained against is circular, and the result says so.
A judge is evidence only if it beats "the longer answer wins", paired, on held-out pairs of the preference data: a
reward model's record has its results on them, a language model is asked about --check-pairs of them in both orders.
Nor is a win rate evidence when a row's answers have collapsed (guardrails.py has the bounds); a warning and the report
say so.
A judge that shares training prompts with a row, its parents or its reward model is not independent; the share of such
prompts is computed from the prompts.json of every run directory, and stated. Prompts that occur in any of these
training sets are left out, and their number is stated.

Deliberate choices:
  1. Each pair is judged in both orders, and a disagreement is a tie. Equal completions are a tie without a question.
  2. The question is in ask.py; it quotes the answers so that none of them can give the judge an instruction.
  3. A reply that is not one of the three letters is counted as unparsable, never interpreted.
  4. All rows have the same noise, keyed by the prompt: equal policies answer alike. KL is at the sampling temperature,
     since the completions are samples at it (exact for --top-p 1; greedy ones are measured at temperature 1).
  5. θ and γ have a weak prior, N(0, 10²), without which a row that always wins has no finite fit.
  6. --best-of N adds the reference's best of N samples by --reward-adapter: what a policy trained against that reward
     model must beat. None of the N is the reference's own answer, which the best is judged against. No weights change;
     for the KL its bound is stated, log N − (N − 1)/N.

    python judge.py --rows runs/dpo_v1 runs/ppo_v1 --against runs/sft_v2 --judge-model runs/rm_watch
    python judge.py --judge-model gpt-4o --judge-url https://api.openai.com/v1       # its key: OPENAI_API_KEY
    python judge.py --judge-model Qwen/Qwen2.5-1.5B-Instruct --check-pairs 256   # a language model, on any device;
        # 512 of its verdicts say whether it is a judge: "heldout" in the records, "Its win rates are …" in the report

Completions, scores and verdicts are stored line by line in cache/ beside the results: an interrupted run resumes where
it stopped, and nothing is sampled or asked twice.

Shapes: n prompts, R resamples of the bootstrap.
"""
import functools
import itertools
import json
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

import chat
import common
import inputs
from ask import LETTERS, Api, ask_apis, check_api, question, to_rows
from common import Example, fail
from guardrails import Answer, Prompt, collapsed, guardrails


@dataclass(frozen=True)
class Args:
    # -- rows --
    rows: tuple[str, ...] = ("base", "runs/dpo_v1", "runs/ppo_v1", "runs/grpo_v1", "runs/kto_v1")
    """Policies to judge: run directories, plain PEFT LoRA adapters; the word base is the pretrained base."""
    against: str = "runs/sft_v2"
    """The row that each of them is compared with, and the reference of the KL."""
    model: str | None = None
    """The pretrained base; by default the one that the adapters were trained on."""
    other_base: bool = False
    """Accept a plain PEFT adapter that names another base than --model."""
    best_of: int = 0
    """Adds the reference's best of N samples as a row <reference>_bo<N>; 0: no such row."""
    reward_adapter: str | None = None
    """The reward model that chooses the best sample for --best-of."""
    # -- prompts --
    pref_data: str = common.ULTRAFEEDBACK
    """Preference data. The prompts are those of its held-out rows that are set aside for the judge (10 % by sha256)."""
    heldout_data: str | None = None
    """Held-out rows of --pref-data; by default found beside it, test_prefs for train_prefs on the hub."""
    data: str | None = None
    """Prompts to use instead: rows with a prompt (text or messages), or with turns, of which the first is used."""
    prompts: int = 200
    """Number of prompts: the first usable ones of the seed's shuffle, or all when there are fewer."""
    max_dropped: float = 0.05
    """Largest share of dropped prompts (empty or too long) that doesn't end the run."""
    # -- sampling, the same for all rows --
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy [AlpacaEval samples most models at 0.7]."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches this."""
    max_new_tokens: int = 512
    """Maximum tokens per completion."""
    seed: int = 42
    """Seed of the prompts' shuffle, the sampling and the bootstrap."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the policies and of a local judge; adapters are fp32."""
    # -- judge --
    judge_model: str | None = None
    """A run directory (reward model or policy), a local model, a hub id, or with --judge-url the name of the API's
    model. None: guardrails only."""
    judge_url: str | None = None
    """An OpenAI-compatible endpoint, such as https://api.openai.com/v1."""
    judge_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the API's key; unset, no key is sent."""
    judge_parallel: int = 8
    """Concurrent requests to the API."""
    judge_retries: int = 6
    """Retries when the API is busy (429, 5xx), slow or drops the connection."""
    judge_timeout: float = 120.0
    """Seconds to wait for a reply."""
    judge_tokens: int = 16
    """Maximum tokens per reply of the API."""
    check_pairs: int = 256
    """Number of held-out pairs of --pref-data that a language model is asked about too: does it beat "the longer answer
    wins"? 0: none. A reward model's results on them are in results/rm."""
    decides: bool = True
    """Whether this judge decides if DPO beats SFT; chosen before it is asked, and recorded."""
    # -- run --
    results: str = "results"
    """Results directory. Its judge/<train_invariants>-s<seed of the policies>/ gets <a>_vs_<b>.json, the same without
    text in summaries/, guardrails.json and the page index.html."""
    micro_tokens: int = 16384
    """Maximum tokens per forward: changes memory and speed, not the figures; a longer sequence gets its own pack."""
    engine: Literal["auto", "fast", "plain"] = "auto"
    """auto: the fast engine where it serves a model, else the plain one (any model, slower)."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


RESAMPLES = 2000      # of the bootstrap
CHUNK = 64            # completions, or questions to a local judge, between two writes
PRIOR_SD = 10.0       # of θ and γ


# -- win rates --------------------------------------------------------------------------------------

def prompt_score(ab: str | None, ba: str | None) -> float | None:
    """1, ½ or 0 for row a, from the verdicts ("a", "b", "tie") of both orders; None when neither could be read."""
    if ab is None and ba is None:
        return None
    return {"a": 1.0, "b": 0.0}.get(ab, 0.5) if ab == ba else 0.5


def unfinished_lost(score: float, ended_a: bool, ended_b: bool) -> float:
    """The score where an answer that did not end loses to one that did; a tie where neither ended."""
    return score if ended_a and ended_b else 0.5 + (ended_a - ended_b) / 2


def resamples(n: int, seed: int) -> np.ndarray:
    """How often each of n prompts is drawn in each of R resamples with replacement, [R, n]."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)


def interval(rates: np.ndarray) -> list[float]:
    """The interval that contains the middle 95 % of the resamples' rates."""
    return np.quantile(rates, [0.025, 0.975]).tolist()


def win_rate(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean score; scores [n], weights [R, n] -> [R]."""
    return weights @ scores / weights.sum(1)


def length_controlled(scores: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """σ(θ), the win rate at equal lengths; scores, lengths Δ [n], weights [R, n] -> [R].

    θ, γ minimise −Σ w (y log p + (1 − y) log(1 − p)) + (θ² + γ²)/(2·10²), p = σ(θ + γ x), x = tanh(Δ/sd Δ), y the
    score, ties ½: R fits at a time by Newton's method. Where all Δ are equal, length carries no information and x = 0.
    """
    sd = lengths.std()
    x = np.tanh(lengths / sd) if sd else np.zeros(len(lengths))
    features = np.stack([np.ones_like(x), x])                                       # [2, n]
    fit, prior = np.zeros((len(weights), 2)), 1 / PRIOR_SD**2
    for _ in range(200):
        p = 1 / (1 + np.exp(-fit @ features))                                       # [R, n]
        gradient = (weights * (p - scores)) @ features.T + prior * fit              # [R, 2]
        hessian = np.einsum("rn,in,jn->rij", weights * p * (1 - p), features, features) + prior * np.eye(2)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        step /= np.maximum(1, np.abs(step).max(1, keepdims=True))                   # far from the minimum, at most 1
        fit -= step
        if np.abs(step).max() < 1e-10:
            break
    return 1 / (1 + np.exp(-fit[:, 0]))


def summarise(entries: list[dict], seed: int) -> dict[str, Any]:
    """The figures of a comparison, from its prompts' verdicts and lengths. Rates are over the prompts with a score."""
    verdicts = [(e["verdict_ab"], e["verdict_ba"]) for e in entries]
    asked = [(e["verdict_ab"], e["verdict_ba"]) for e in entries if e["completion_a"] != e["completion_b"]]
    scored = [e for e in entries if e["score"] is not None]
    counts, both = Counter(e["score"] for e in scored), [ab != ba for ab, ba in asked if ab and ba]
    out = {"n": len(entries), "wins": counts[1.0], "ties": counts[0.5], "losses": counts[0.0],
           "unparsable": len(entries) - len(scored),
           "unparsable_verdicts": sum(v is None for pair in verdicts for v in pair),
           "win_rate": None, "win_rate_ci95": [None, None], "tie_rate": None,
           "position_inconsistency": fmean(both) if both else None,
           "length_controlled_win_rate": None, "length_controlled_ci95": [None, None],
           "unfinished_lost_win_rate": None, "unfinished_lost_ci95": [None, None],
           **{f"unfinished_{side}": sum(not e[f"stopped_{side}"] for e in entries) for side in "ab"},
           **{f"mean_tokens_{side}": fmean(e[f"tokens_{side}"] for e in entries) for side in "ab"}}
    if scored:
        scores = np.array([e["score"] for e in scored])
        lengths = np.array([e["tokens_a"] - e["tokens_b"] for e in scored], float)
        weights = np.vstack([np.ones(len(scores)), resamples(len(scores), seed)])   # the data, then R resamples
        raw, controlled = win_rate(scores, weights), length_controlled(scores, lengths, weights)
        finished = np.array([unfinished_lost(e["score"], e["stopped_a"], e["stopped_b"]) for e in scored])
        strict = win_rate(finished, weights)
        out |= {"win_rate": raw[0].item(), "win_rate_ci95": interval(raw[1:]), "tie_rate": counts[0.5] / len(scored),
                "length_controlled_win_rate": controlled[0].item(), "length_controlled_ci95": interval(controlled[1:]),
                "unfinished_lost_win_rate": strict[0].item(), "unfinished_lost_ci95": interval(strict[1:])}
    return out


# -- how far a row moved ----------------------------------------------------------------------------

def kl_of_completions(policy, reference, examples: Sequence[Example], temperature: float,
                      micro_tokens: int) -> dict[str, float | None]:
    """kl_sft, the mean over completions of Σ_t KL(π ‖ π_ref) in nats, its standard error, and kl_sft_floor: the same
    figure for the policy against itself in micro-batches of half the size: the part that the measurement's precision
    adds."""
    states, of_reference = (common.answer_states(model, examples, micro_tokens) for model in (policy, reference))
    again = common.answer_states(policy, examples, min(micro_tokens, sum(len(e.ids) for e in examples)) // 2)
    nats = common.answer_kl(policy, states, reference, of_reference, temperature)
    floor = common.answer_kl(policy, states, policy, again, temperature).mean().item()
    stderr = nats.std().item() / math.sqrt(len(nats)) if len(nats) > 1 else None
    return {"kl_sft": nats.mean().item(), "kl_sft_se": stderr, "kl_sft_floor": floor}


def delta_w(adapter: str, model) -> float:
    """‖ΔW‖_F / ‖W‖_F of an adapter over all the modules that it touches, whatever `model` has attached to the base."""
    moved = weights = 0.0
    for name, (a, b) in common.read_factors(adapter).items():
        a, b = a.double(), b.double()
        moved += ((b.T @ b) * (a @ a.T)).sum().item()                               # ‖B A‖² = tr(BᵀB A Aᵀ)
        weights += common.base_of(model).get_submodule(name).weight.double().square().sum().item()
    return common.LORA_SCALE * math.sqrt(moved / weights)


def best_of_kl(n: int) -> float:
    """log n − (n − 1)/n, nats per completion: an upper bound on the KL of the best of n to the policy that sampled."""
    return math.log(n) - (n - 1) / n


# -- rows, prompts, completions ---------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """A policy and its name."""
    name: str
    adapter: Path | None        # its directory; None: the base
    run: dict[str, Any] | None  # its run.json, or the record of a plain PEFT adapter
    record: dict[str, Any]      # identifies it in the results
    best_of: int = 1            # completions of which the reward model chooses one


def locked(directory: Path) -> common.Lock:
    """A lock on the directory: one process at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    return common.Lock(directory / ".judge.lock", f"another process is judging in {directory}")


class Lines:
    """JSON lines under a key, appended and flushed one by one; a last line that a crash cut short is dropped."""

    def __init__(self, path: Path):
        self.path, self.by_key, self.lock = path, {}, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        *whole, torn = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        for number, line in enumerate(whole, 1):
            try:
                entry = json.loads(line)
                self.by_key[entry["key"]] = entry
            except (ValueError, KeyError, TypeError):
                fail(f"{path}, line {number} is not what judge.py wrote there; delete the file")
        if torn:
            os.truncate(path, sum(len(line) + 1 for line in whole))

    def add(self, entry: dict[str, Any]) -> None:
        with self.lock, open(self.path, "a") as f:
            f.write(json.dumps(entry, allow_nan=False) + "\n")  # in ASCII: a reply may hold what UTF-8 can't
            self.by_key[entry["key"]] = entry


def read_rows(args: Args):
    """(rows, reference, base); adapters of other bases or invariants are refused."""
    adapters = [adapter for adapter in (args.against, *args.rows) if adapter != "base"]
    if not adapters:
        fail("--rows and --against name no adapter: nothing to compare with the base")
    # A plain PEFT adapter has no invariants of its own: start from an adapter that has, if there is one
    read = {adapter: common.read_policy(adapter) for adapter in adapters}
    first = next((adapter for adapter in adapters if read[adapter][0]["invariants"]), adapters[0])
    start = inputs.read_start(first, args.model, other_base=args.other_base)
    invariants = start.invariants
    inputs.say_template(start.tokenizer)
    base = {"name": "base", "config_hash": common.sha256_json(["base", invariants.hash])[:8], "adapter_sha256": None,
            "train_invariants": invariants.hash}
    rows = []
    for adapter in (args.against, *args.rows):
        if adapter == "base":
            rows.append(Row("base", None, None, base))
        else:
            run, directory = read[adapter]
            check_same(adapter, run, start, args)
            name = Path(adapter).resolve().name
            record = {"name": name, **{k: run[k] for k in list(base)[1:]}, "train_invariants": invariants.hash}
            rows.append(Row(name, directory, run, record))
    for name, times in Counter(row.name for row in rows).items():
        if times > 1:
            fail(f"--rows and --against name {name} {times} times; a row is known by the name of its directory")
    return rows[1:], rows[0], start


def best_of_row(reference: Row, scorer: dict[str, Any], n: int) -> Row:
    """The reference's best of n samples by a reward model: the same policy, another choice of its samples."""
    config = common.sha256_json([reference.record["config_hash"], scorer["config_hash"], n])[:8]
    chosen = {"n": n, **{k: scorer[k] for k in ("name", "config_hash", "adapter_sha256")}}
    record = reference.record | {"name": f"{reference.name}_bo{n}", "config_hash": config, "best_of": chosen}
    return Row(record["name"], reference.adapter, reference.run, record, n)


def check_same(adapter: str, run: dict[str, Any], start: inputs.Start, args: Args) -> None:
    """Fail unless an adapter has the base and the invariants of the other rows."""
    invariants = start.invariants
    common.check_base(common.resolve_adapter(adapter), run, start.model, start.model_dir, invariants.weights_sha256,
                      args.other_base)
    if run["train_invariants"] not in (None, invariants.hash):
        fail(f"{adapter} was trained under other invariants ({run['train_invariants']}) than the rows beside it "
             f"({invariants.hash}); they can't be compared")


def read_prompts(args: Args, tokenizer, limit: int, trained_on: Set[str] = frozenset()) -> tuple[list[Prompt], dict]:
    """The prompts (distinct, at most `limit` tokens, none in `trained_on`), and the fields that identify them."""
    source, seen, left_out = args.data or args.pref_data, set(), set()
    rows, fingerprint = inputs.load_rows(source)
    if not args.data:
        held = inputs.load_heldout(args.pref_data, args.heldout_data, rows)
        source, rows, fingerprint = held.source, held.rows, held.fingerprint
        judged = [p is not None and inputs.is_judge_prompt(p) for p in held.prompts]
        if not any(judged):
            common.say(f"note: {source}: none of {len(rows)} held-out prompts is the judge's by hash: all are judged")
            judged = [True] * len(rows)

    def read(i: int, row: dict) -> list[dict] | None:
        if not (args.data or judged[i]):
            return None
        if row.get("prompt") is None and row.get("turns"):
            row = {"prompt": row["turns"][0]}
        messages = inputs.as_prompt(row, f"{source}, row {i}")
        name = inputs.prompt_id(messages)
        if name in seen:
            return None
        seen.add(name)
        if name in trained_on:
            left_out.add(name)
            return None
        return messages

    def build(prompts: list[list[dict]], names: list[str]) -> list[Prompt | str]:
        rendered = [chat.render_prompt(tokenizer, messages, name) for messages, name in zip(prompts, names)]
        return ["empty prompt" if not messages[-1]["content"].strip() else "too long" if len(ids) > limit else
                Prompt(inputs.prompt_id(messages), messages, ids) for messages, ids in zip(prompts, rendered)]
    prompts, _, _ = inputs.take_rows(rows, args.prompts, args.seed, read, build, source, args.max_dropped)
    chosen = "sha256:" + common.sha256_json([p.id for p in prompts])
    if left_out:
        common.say(f"{len(left_out)} prompts of {source} stand in a training set of the rows or of the judge: left out")
    return prompts, {"prompts_fingerprint": chosen, "data": fingerprint, "prompts_left_out": len(left_out)}


def load_policy(row: Row, model_dir: Path, args: Args, device):
    """The row's policy, its adapter beside the base's weights, as in the evaluation."""
    engine = common.choose_engine(args.engine, model_dir, device)
    model = common.load_model(model_dir, None, "none", getattr(torch, args.dtype), device, engine)
    return common.attach_adapter(model, row.adapter) if row.adapter else model


def sample(policy: Callable[[], Any], tokenizer, prompts: Sequence[Prompt], n: int, args: Args, lines: Lines,
           title: str) -> list[list[Answer]]:
    """n answers of a policy to each prompt: taken from `lines` where it has them, else sampled, CHUNK at a time. With
    n > 1, answer 0 (the policy's own) is not among those to choose from: it would be compared with itself."""
    wanted = [(p, f"{p.id}/{k}") for p in prompts for k in (range(1, n + 1) if n > 1 else [0])]
    todo = [(p, key) for p, key in wanted if key not in lines.by_key]
    if todo:
        sampler = common.Sampler(policy(), tokenizer, short=True)
        with tqdm(total=len(todo), desc=f"{title}: completions") as bar:
            for part in (todo[i:i + CHUNK] for i in range(0, len(todo), CHUNK)):
                noise = [int(common.sha256_json(key)[:15], 16) for _, key in part]
                done = sampler.sample([p.ids for p, _ in part], args.max_new_tokens, args.temperature, args.top_p,
                                      args.seed, progress=bar.update, rows=noise)
                for (_, key), c in zip(part, done):
                    lines.add({"key": key, "ids": c.ids, "ended": c.stopped == "eos", "text": c.text})
    answers = iter([Answer(*(lines.by_key[key][k] for k in Answer._fields)) for _, key in wanted])
    return [list(itertools.islice(answers, n)) for _ in prompts]


def reward_scores(adapter: str, run: dict, model_dir: Path, pairs: Sequence[tuple[Prompt, Answer]], end_id: int,
                  args: Args, device) -> list[float]:
    """A reward model's score of each answer, read at its stop token; an answer without one is given end_id."""
    lines = Lines(Path(args.results) / "cache" / f"scores-{run['adapter_sha256'][:16]}.jsonl")
    examples = [Example.completion(p.ids, a.ids if a.ended else [*a.ids, end_id]) for p, a in pairs]
    keys = [common.sha256_json(e.ids)[:16] for e in examples]
    if todo := {key: e for key, e in zip(keys, examples) if key not in lines.by_key}:
        quantization = "nf4" if run["invariants"]["quantization"] == "qlora" else "none"
        model = common.load_reward(model_dir, adapter, quantization, getattr(torch, run["args"]["dtype"]), device,
                                   common.choose_engine(args.engine, model_dir, device))
        micro_tokens = max(args.micro_tokens, *(len(e.ids) for e in todo.values()))
        scores = common.score_examples(model, list(todo.values()), micro_tokens)
        if not scores.isfinite().all():
            raise FloatingPointError(f"{adapter} gives scores that are not finite")
        for key, score in zip(todo, scores.tolist()):
            lines.add({"key": key, "score": score})
    return [lines.by_key[key]["score"] for key in keys]


def choose_best(answers: Sequence[Answer], scores: Sequence[float]) -> Answer:
    """The answer with the highest score among those that ended; among all where none did."""
    return answers[max(range(len(answers)), key=lambda k: (answers[k].ended, scores[k]))]


# -- judges -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Judge:
    """The judge. adapter and run are set for a reward model or policy of ours."""
    kind: Literal["api", "local", "reward"]
    model: str
    identity: list                  # what its verdicts depend on, besides the question
    model_dir: Path | None = None
    adapter: Path | None = None
    run: dict[str, Any] | None = None
    api: Api | None = None


def read_judge(args: Args, start: inputs.Start) -> Judge:
    """--judge-model and --judge-url, checked before any model loads."""
    name = args.judge_model
    if args.judge_url:
        api = Api(args.judge_url, name, args.judge_key_env, args.judge_parallel, args.judge_retries, args.judge_timeout,
                  args.judge_tokens)
        return Judge("api", name, ["api", args.judge_url, name, args.judge_tokens], api=api)
    path = Path(name)
    name = name.rstrip("/")  # the same judge with and without a trailing slash
    if (path / "adapter_config.json").is_file():
        record = path / "run.json"
        reward = record.is_file() and common.read_json(record).get("method") == "reward"
        run = common.read_adapter(name, reward) if reward else common.read_policy(name)[0]
        check_same(name, run, start, args)
        identity = ["local", run["adapter_sha256"], args.dtype]
        judge = Judge("reward" if reward else "local", name, identity, start.model_dir, path, run)
    elif path.is_dir() or "/" in name:
        model_dir = common.resolve_model(name)
        judge = Judge("local", name, ["local", common.weights_sha256(model_dir), args.dtype], model_dir)
    else:
        fail(f"--judge-model {name}: no such directory; for the model of an API give its --judge-url too")
    if judge.kind == "local":
        tokenizer = chat.load_tokenizer(judge.model_dir)
        letter_tokens(tokenizer, name)
        judge.identity.append(common.sha256_json(chat.render_prompt(tokenizer, [{"role": "user", "content": "?"}])))
    return judge


def circular_why(judge: Judge, a: Row, b: Row, base_sha256: str) -> str | None:
    """Why this judge is not independent of a row; None when no reason is known."""
    if judge.kind == "local":
        judge_sha256 = judge.run["adapter_sha256"] if judge.run else None
        if named := [row.name for row in (a, b) if judge_sha256 and row.record["adapter_sha256"] == judge_sha256]:
            return f"the judge is {named[0]} itself"
        if judge.run or judge.identity[1] == base_sha256:
            return "the judge is " + ("a policy on the base that the rows have" if judge.run else "the rows' own base")
    if judge.kind == "reward":
        judge_sha256 = judge.run["adapter_sha256"]
        for row in (a, b):
            if row.record.get("best_of", {}).get("adapter_sha256") == judge_sha256:
                return f"the judge chose the completions of {row.name}"
            if row.run and row.run.get("scorers", {}).get("reward", {}).get("adapter_sha256") == judge_sha256:
                return f"{row.name} was trained against the judge"
    return None


def training_prompts(run: dict[str, Any], adapter: str) -> dict[str, set[str] | None]:
    """{run name: ids of the prompts that it was trained on} of a run, of the runs that it started from, and of the
    reward model that it was trained against; None where a run directory or its prompts.json is missing."""
    listed = Path(adapter) / "prompts.json"
    prompts = {run["name"]: set(common.read_prompts(listed)["train"]) if listed.is_file() else None}
    settings = run.get("args") or {}
    reward = (run.get("scorers") or {}).get("reward")
    for link, flag in ((run.get("parent"), "sft_adapter"), (reward, "reward_adapter")):
        if link:
            paths = [Path(str(settings.get(flag))), Path(adapter).resolve().parent / link["name"]]
            runs = {path: common.read_json(path / "run.json") for path in paths if (path / "run.json").is_file()}
            same = [path for path, record in runs.items() if record.get("adapter_sha256") == link["adapter_sha256"]]
            prompts |= training_prompts(runs[same[0]], str(same[0])) if same else {link["name"]: None}
    return prompts


def independence(judge: Judge, rows: Sequence[Row]) -> dict[str, Any]:
    """{"independent": whether the judge shares no training prompt with the rows, None where that is not known;
    "shared_prompts": {row name: {"prompts": how many, "share": their share of the judge's training prompts}}}."""
    def joined(run: dict | None, adapter: str | None) -> set[str] | None:
        parts = list(training_prompts(run, adapter).values()) if run else []
        return None if None in parts else set().union(*parts)

    judge_prompts = joined(judge.run, judge.adapter) if judge.run else None  # a model from elsewhere: nothing is known
    row_prompts = {row.name: joined(row.run, row.adapter) for row in rows}
    if not judge_prompts:
        return {"independent": None, "shared_prompts": None}
    shared = {name: None if prompts is None else {"prompts": len(judge_prompts & prompts),
                                                  "share": len(judge_prompts & prompts) / len(judge_prompts)}
              for name, prompts in row_prompts.items()}
    if any(part and part["prompts"] for part in shared.values()):
        return {"independent": False, "shared_prompts": shared}
    return {"independent": None if None in shared.values() else True, "shared_prompts": shared}


def letter_tokens(tokenizer, model: str) -> list[int]:
    """The token of each verdict at the beginning of a reply."""
    tokens = []
    for letter in LETTERS:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": letter}]
        ids = [i for i, in_reply in zip(*chat.render(tokenizer, turns)) if in_reply and i not in tokenizer.stop_ids]
        if len(ids) != 1:
            fail(f"--judge-model {model}: its tokenizer has no single token for the verdict {letter}")
        tokens += ids
    return tokens


def ask_local(judge: Judge, questions: dict[str, list[dict]], lines: Lines, args: Args, device) -> None:
    """The likeliest of the letters A, B, C where the reply would begin; C, a tie, if several are equally likely.

    Their logits are fp32 whatever the dtype: in bfloat16 one of 20 is a multiple of 1/8, and letters would often tie.
    """
    tokenizer = chat.load_tokenizer(judge.model_dir)
    tokens = letter_tokens(tokenizer, judge.model)
    model = load_policy(Row("judge", judge.adapter, judge.run, {}), judge.model_dir, args, device)
    todo, limit = list(questions), common.max_positions(judge.model_dir)
    for part in tqdm([todo[i:i + CHUNK] for i in range(0, len(todo), CHUNK)], desc=f"{judge.model}: verdicts"):
        began = time.time()
        rendered = inputs.build_or_drop(
            lambda keys, _: [chat.render_prompt(tokenizer, questions[key]) for key in keys], part, part)
        rendered = [[] if isinstance(ids, str) else ids for ids in rendered]
        fits = [i for i, ids in enumerate(rendered) if 0 < len(ids) <= limit]
        examples = [Example(rendered[i], [], []) for i in fits]
        replies: dict[int, dict[str, float]] = {}
        micro_tokens = max([args.micro_tokens, *(len(e.ids) for e in examples)])
        with torch.no_grad():
            for micro in common.micro_batches(model, examples, micro_tokens):
                hidden = common.hidden_states(model, micro, "last").float()                        # [N, H]
                logprobs = common.head_logits(model, hidden)[:, tokens].log_softmax(1).tolist()    # [N, 3]
                replies |= {fits[e]: dict(zip(LETTERS, row)) for e, row in zip(micro.examples, logprobs)}
        seconds = (time.time() - began) / len(part)
        for i, key in enumerate(part):
            reply = replies.get(i)  # none where it is longer than the judge's positions, or has text without tokens
            best = [letter for letter in reply if reply[letter] == max(reply.values())] if reply else []
            lines.add({"key": key, "verdict": best[0] if len(best) == 1 else "C" if best else None, "reply": reply,
                       "requests": 1, "prompt_tokens": len(rendered[i]), "completion_tokens": 0, "seconds": seconds})


# -- comparisons ------------------------------------------------------------------------------------

def side_by_side(prompts: Sequence[Prompt], answers_a: Sequence[Answer], answers_b: Sequence[Answer]) -> list[dict]:
    """Every prompt with both completions; verdicts come later."""
    return [{"id": p.id, "prompt": p.messages, "completion_a": x.text, "completion_b": y.text, "tokens_a": len(x.ids),
             "tokens_b": len(y.ids), "stopped_a": x.ended, "stopped_b": y.ended}
            for p, x, y in zip(prompts, answers_a, answers_b)]


COST = ("requests", "prompt_tokens", "completion_tokens", "seconds")


def ask_all(judge: Judge, compared: dict[str, list[dict]], args: Args, device) -> dict[str, dict[str, float]]:
    """Put both verdicts into each entry of every comparison. Returns the cost of each comparison's verdicts."""
    name = f"verdicts-{common.sha256_json(judge.identity)[:16]}.jsonl"
    lines = Lines(Path(args.results) / "cache" / name)
    keys, questions, costs = {}, {}, {}
    for pair, entries in compared.items():
        for e in entries:
            for first, second in ("ab", "ba") if e["completion_a"] != e["completion_b"] else ():
                messages = question(e["prompt"], e[f"completion_{first}"], e[f"completion_{second}"])
                keys[pair, e["id"], first + second] = key = common.sha256_json(messages)[:24]
                if key not in lines.by_key:
                    questions[key] = messages
    if questions and judge.kind == "local":
        ask_local(judge, questions, lines, args, device)
    elif questions:
        ask_apis(questions, lines, judge.api)
    for pair, entries in compared.items():
        costs[pair] = cost = dict.fromkeys(COST, 0)
        for e in entries:
            for order in ("ab", "ba"):
                line = lines.by_key.get(keys.get((pair, e["id"], order)))
                e[f"verdict_{order}"] = to_rows(line["verdict"], *order) if line else "tie"
                for k in cost:
                    cost[k] += line[k] if line else 0
    return costs


def held_out_pairs(args: Args, tokenizer) -> tuple[list[dict], str]:
    """(held-out pairs of the preference data as entries of a comparison, a the chosen answer; their fingerprint)."""
    rows, _ = inputs.load_rows(args.pref_data)
    held = inputs.load_heldout(args.pref_data, args.heldout_data, rows)

    seen = set()

    def read(i: int, row: dict) -> tuple | None:
        pair = None if row.get("rejected") is None else inputs.as_pair(row, f"{held.source}, row {i}")
        if pair is None or inputs.prompt_id(pair[0]) in seen:  # one pair per prompt
            return None
        seen.add(inputs.prompt_id(pair[0]))
        return pair

    def build(pairs: list[tuple], names: list[str]) -> list[dict | str]:
        answers = [tokenizer(list(pair[1:]), add_special_tokens=False)["input_ids"] for pair in pairs]
        lengths = [[len(ids) for ids in both] for both in answers]
        return ["equal answers" if chosen == rejected else
                {"id": inputs.prompt_id(prompt), "prompt": prompt, "completion_a": chosen, "completion_b": rejected,
                 "tokens_a": a, "tokens_b": b} for (prompt, chosen, rejected), (a, b) in zip(pairs, lengths)]
    entries, _, _ = inputs.take_rows(held.rows, args.check_pairs, args.seed, read, build, held.source, args.max_dropped)
    return entries, held.fingerprint


def against_longer(entries: list[dict], data: str, seed: int) -> dict[str, Any]:
    """The record of a judge's verdicts on held-out pairs: accuracy of the judge and of "the longer answer wins" (a tie
    counts half) with bootstrap intervals, and the outcome of each pair (1 right, 0 wrong, - a tie or no verdict)."""
    scores = {"model": [prompt_score(e["verdict_ab"], e["verdict_ba"]) for e in entries],
              "longer_wins": [0.5 + np.sign(e["tokens_a"] - e["tokens_b"]) / 2 for e in entries]}
    outcomes = {name: "".join({1.0: "1", 0.0: "0"}.get(s, "-") for s in each) for name, each in scores.items()}
    weights, shares = resamples(len(entries), seed), {}
    for name, outcome in outcomes.items():
        values = np.array([{"1": 1.0, "0": 0.0, "-": 0.5}[o] for o in outcome])
        shares[name] = {"n": len(values), "accuracy": values.mean().item(),
                        "interval": interval(win_rate(values, weights))}
    both = [e["verdict_ab"] != e["verdict_ba"] for e in entries if e["verdict_ab"] and e["verdict_ba"]]
    return {**shares["model"], "longer_wins": shares["longer_wins"], "outcomes": outcomes, "data": data,
            "position_inconsistency": fmean(both) if both else None}


def score_all(judge: Judge, compared: dict[str, list[dict]], reference: str, prompts: Sequence[Prompt],
              answers: dict[str, list[Answer]], end_id: int, args: Args, device) -> dict[str, dict[str, float]]:
    """As ask_all, with a reward model: one verdict for both orders, from the scores, which are stored beside it."""
    began, pairs = time.time(), [pair for row_answers in answers.values() for pair in zip(prompts, row_answers)]
    flat_scores = iter(reward_scores(judge.adapter, judge.run, judge.model_dir, pairs, end_id, args, device))
    scores = {name: list(itertools.islice(flat_scores, len(prompts))) for name in answers}
    for name, entries in compared.items():
        for e, x, y in zip(entries, scores[name], scores[reference]):
            verdict = "tie" if x == y else "a" if x > y else "b"
            e |= {"reward_a": x, "reward_b": y, "verdict_ab": verdict, "verdict_ba": verdict}
    seconds = (time.time() - began) / max(1, len(compared))
    return {name: {**dict.fromkeys(COST, 0), "seconds": seconds} for name in compared}


def place_for(directory: Path, a: str, b: str, judge: dict) -> Path:
    """<a>_vs_<b>.json, or with the judge in its name where that file is another judge's."""
    who = [judge["kind"], judge["model"]]
    slug = re.sub(r"[^\w.-]+", "-", Path(judge["model"]).name)
    suffixes = ("", f".{slug}", f".{slug}-{common.sha256_json(who)[:6]}")
    places = [directory / f"{a}_vs_{b}{suffix}.json" for suffix in suffixes]

    def is_free(path: Path) -> bool:
        stored_judge = common.read_json(path)["judge"] if path.is_file() else judge
        return [stored_judge["kind"], stored_judge["model"]] == who
    return next(path for path in places if is_free(path) or path == places[-1])


def show(result: dict) -> None:
    s, judge = result["summary"], result["judge"]

    def percent(x: float | None) -> str:
        return "–" if x is None else f"{100 * x:.1f}"
    note = f" (CIRCULAR: {judge['circular_why']})" if judge["circular"] else ""
    if judge["independent"] is False:
        shared = [f"{percent(part['share'])} % with {name}" for name, part in judge["shared_prompts"].items() if part]
        note += f" (NOT INDEPENDENT: shares training prompts, {', '.join(shared)})"
    print(f"{result['a']} vs {result['b']}, judged by {judge['model']}{note}")
    rates = [f"{title} {percent(s[f'{key}win_rate'])} % [{', '.join(map(percent, s[ends]))}]" for title, key, ends in (
        ("wins", "", "win_rate_ci95"), ("length-controlled", "length_controlled_", "length_controlled_ci95"),
        ("unfinished answers lost", "unfinished_lost_", "unfinished_lost_ci95"))]
    print("  " + "; ".join(rates))
    print(f"  {s['wins']} wins, {s['ties']} ties, {s['losses']} losses of {s['n']}; {s['unparsable_verdicts']} of "
          f"{2 * s['n']} verdicts unparsable; the orders disagree on {percent(s['position_inconsistency'])} %; tokens "
          f"{s['mean_tokens_a']:.0f} to {s['mean_tokens_b']:.0f}")
    if (cost := result["cost"])["requests"]:
        print(f"  {cost['requests']:,} requests, {cost['prompt_tokens']:,} + {cost['completion_tokens']:,} tokens, "
              f"{cost['seconds']:,.0f} s")


# -- main -------------------------------------------------------------------------------------------

def measure(reference: Row, rows: Sequence[Row], choose: Callable, prompts: Sequence[Prompt], tokenizer,
            shared: dict[str, Any], directory: Path, load: Callable, args: Args, device) -> dict[str, list[Answer]]:
    """{row name: its answer to each prompt}, of the reference and the rows; their measurements go to guardrails.json. A
    row whose record, settings and answers are in that file already is not measured again.

    load(row) returns the row's policy; choose(prompts, [n answers to each]) the best answer to each.
    """
    path = directory / "guardrails.json"
    before = common.read_json(path) if path.is_file() else {}
    known = before["rows"] if all(before.get(k) == v for k, v in shared.items()) else []
    measured = {row["name"]: row for row in known}
    reference_policy = functools.cache(lambda: load(reference))  # loaded only when something is missing

    def exact(model):
        """The model in fp32, in place, if memory allows: a KL measured in bfloat16 is mostly rounding."""
        common.upcast(model)
        return model
    exact_reference = functools.cache(lambda: exact(load(reference)))  # reference_policy samples in its own dtype
    answers: dict[str, list[Answer]] = {}
    for row in (reference, *rows):
        has_own_policy = row is not reference and row.best_of == 1  # best-of-n samples from the reference
        policy = functools.cache(functools.partial(load, row)) if has_own_policy else reference_policy
        key = common.sha256_json([row.record["train_invariants"], row.record["adapter_sha256"],
                                  shared["prompts_fingerprint"], shared["sampling"]])[:16]
        drawn = sample(policy, tokenizer, prompts, row.best_of, args,
                       Lines(directory / "cache" / f"generations-{key}.jsonl"), row.name)
        answers[row.name] = row_answers = choose(prompts, drawn) if row.best_of > 1 else [each[0] for each in drawn]
        identity = row.record | {"completions_sha256": common.sha256_json([a.ids for a in row_answers])}
        if all(measured.get(row.name, {}).get(k) == v for k, v in identity.items()):
            continue
        kl = {"kl_sft": best_of_kl(row.best_of), "kl_sft_se": None, "kl_sft_bound": True} if row.best_of > 1 else \
            {"kl_sft": 0.0, "kl_sft_se": 0.0}
        if has_own_policy:
            examples = [Example.completion(p.ids, a.ids) for p, a in zip(prompts, row_answers)]
            kl = kl_of_completions(exact(policy()), exact_reference(), examples, args.temperature or 1.0,
                                   args.micro_tokens)
        measured[row.name] = {**identity, **guardrails(prompts, row_answers, tokenizer.stop_ids), **kl,
                              "delta_w": delta_w(row.adapter, policy()) if row.adapter else 0.0}
        common.write_json(path, {"schema_version": 1, **shared, "n_prompts": len(prompts),
                                 "rows": list(measured.values())})
    return answers


PAGE_DATA = '<script type="application/json" id="data">null</script>'  # in judge.html: where the records go


def page_html(comparisons: list[dict], guardrails: dict | None) -> str:
    """judge.html with the records in it. A comparison is its file's content and "file", the file's name without .json,
    which is its address in the page. The JSON is ASCII without a "<", so that no text in it ends the script element."""
    records = json.dumps({"comparisons": comparisons, "guardrails": guardrails}, allow_nan=False, separators=(",", ":"))
    html = Path(__file__).with_name("judge.html").read_text(encoding="utf-8")
    return html.replace(PAGE_DATA, PAGE_DATA.replace("null", records.replace("<", "\\u003c")))


def write_page(directory: Path) -> None:
    """<directory>/index.html: every <a>_vs_<b>.json beside it, in the order of their names, and guardrails.json."""
    comparisons = [{"file": path.stem, **common.read_json(path)} for path in sorted(directory.glob("*_vs_*.json"))]
    guardrails = directory / "guardrails.json"
    rows = common.read_json(guardrails) if guardrails.is_file() else None
    common.write_text(directory / "index.html", page_html(comparisons, rows))


def main(args: Args) -> None:
    # 1. Check everything that can be checked without a model.
    if common.world() > 1:
        fail("judge.py runs in one process; start it without torchrun")
    common.check_positive(args, "prompts", "top_p", "max_new_tokens", "micro_tokens", "judge_parallel", "judge_timeout",
                          "judge_tokens")
    if args.check_pairs < 0:
        fail(f"--check-pairs must be 0 or above, got {args.check_pairs}")
    common.check_share(args, "top_p", "max_dropped")
    common.check_numbers(args)
    common.check_output("--results", args.results)
    for name in ("temperature", "judge_retries"):
        if not 0 <= getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} must be 0 or above, got {getattr(args, name)}")
    if args.best_of and (args.best_of < 2 or not args.reward_adapter or not args.temperature):
        fail(f"--best-of {args.best_of}: want 2 or more, a --temperature above 0 and a --reward-adapter that chooses")
    if args.judge_url and not re.match(r"https?://[^/\s]", args.judge_url):
        fail(f"--judge-url {args.judge_url}: want http:// or https://, such as https://api.openai.com/v1")
    if args.judge_url and not args.judge_model:
        fail(f"--judge-url {args.judge_url}: name the model there with --judge-model")
    if not os.environ.get(args.judge_key_env, "").isascii():
        fail(f"{args.judge_key_env} holds characters that no HTTP header can")
    device = common.setup_device(args.device)
    dtype = str(common.setup_dtype(args.dtype, device)).removeprefix("torch.")
    args = replace(args, dtype=dtype)  # the results state it
    rows, reference, start = read_rows(args)
    model_dir, tokenizer, invariants = start.model_dir, start.tokenizer, start.invariants
    scorer = None
    if args.best_of:
        scorer = common.read_adapter(args.reward_adapter, reward=True)
        check_same(args.reward_adapter, scorer, start, args)
        rows.append(best_of_row(reference, scorer, args.best_of))
    judge = read_judge(args, start) if args.judge_model else None
    if invariants.quantization == "qlora" and (scorer or judge and judge.kind == "reward"):
        common.check_nf4(device)
    positions = common.max_positions(model_dir)
    if args.max_new_tokens >= positions:
        fail(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in the model's {positions} positions")
    every_run = [(row.run, row.adapter) for row in (reference, *rows) if row.run]
    every_run += [(judge.run, judge.adapter)] if judge and judge.run else []
    listed = [training_prompts(run, adapter) for run, adapter in every_run]
    unlisted = sorted({name for prompts in listed for name, ids in prompts.items() if ids is None})
    if unlisted:
        common.say(f"note: no prompts.json of {', '.join(unlisted)}: whether they were trained on prompts of the judge "
                   "is not known")
    trained_on = set().union(*(ids for prompts in listed for ids in prompts.values() if ids))
    prompts, fingerprints = read_prompts(args, tokenizer, positions - args.max_new_tokens, trained_on)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens,
                "seed": args.seed, "dtype": args.dtype}
    common.say(f"{len(prompts)} prompts, each answered by {', '.join(row.name for row in (reference, *rows))}; "
               + (f"{2 * len(prompts) * len(rows)} verdicts of {judge.model}" if judge else "no judge (--judge-model)"))
    check, check_data = [], ""
    if judge and judge.kind != "reward" and args.check_pairs:
        if args.data and args.pref_data == Args.pref_data:
            common.say(f'note: whether {judge.model} beats "the longer answer wins" is not checked: --pref-data names '
                       "no pairs beside --data")
        else:
            check, check_data = held_out_pairs(args, tokenizer)
            common.say(f"{2 * len(check)} verdicts more, on held-out pairs: "
                       'does the judge beat "the longer answer wins"?')
    api_checked = functools.cache(lambda: check_api(judge.api) if judge and judge.api else None)

    def load(row: Row):
        api_checked()
        return load_policy(row, model_dir, args, device)

    def choose(prompts: Sequence[Prompt], drawn: Sequence[Sequence[Answer]]) -> list[Answer]:
        flat = [(p, a) for p, each in zip(prompts, drawn) for a in each]
        scores = iter(reward_scores(args.reward_adapter, scorer, model_dir, flat, tokenizer.end_id, args, device))
        return [choose_best(each, list(itertools.islice(scores, len(each)))) for each in drawn]

    seed = next((row.run["seed"] for row in (reference, *rows) if row.run), None)
    directory = Path(args.results) / "judge" / f"{invariants.hash}-s{seed}"  # one per base and seed of the policies
    args = replace(args, results=str(directory))
    with locked(directory):
        # 2. Completions and guardrails of each row.
        reference_id = {k: reference.record[k] for k in ("name", "config_hash", "adapter_sha256")}
        shared = {"sampling": sampling, **fingerprints, "reference": reference_id}
        answers = measure(reference, rows, choose, prompts, tokenizer, shared, directory, load, args, device)
        measured = {row["name"]: row for row in common.read_json(directory / "guardrails.json")["rows"]}
        for row in rows:
            if why := collapsed(measured[row.name], measured[reference.name]):
                common.say(f"warning: {row.name}'s answers collapsed: {why}; a win rate of them is no evidence")

        # 3. Each row against the reference, in both orders.
        compared = {row.name: side_by_side(prompts, answers[row.name], answers[reference.name]) for row in rows}
        if judge and judge.kind == "reward":
            costs = score_all(judge, compared, reference.name, prompts, answers, tokenizer.end_id, args, device)
        elif judge:
            pairs = {"held-out pairs": check} if check else {}
            costs = ask_all(judge, pairs | compared, args, device)
        checked = against_longer(check, check_data, args.seed) if check else None
        if checked:
            ends = ", ".join(f"{100 * end:.1f}" for end in checked["interval"])
            common.say(f"{judge.model} on {checked['n']} held-out pairs: right on {100 * checked['accuracy']:.1f} % "
                       f"[{ends}], the longer answer on {100 * checked['longer_wins']['accuracy']:.1f} %; report.py "
                       "compares them")
        for row in rows if judge else []:
            entries, why = compared[row.name], circular_why(judge, row, reference, invariants.weights_sha256)
            for e in entries:
                e["score"] = prompt_score(e["verdict_ab"], e["verdict_ba"])
            summary = summarise(entries, args.seed)
            if judge.kind == "reward":  # it scores one answer at a time: no position to prefer
                summary["position_inconsistency"] = None
            result = {
                "schema_version": 1, "a": row.name, "b": reference.name,
                "rows": {"a": row.record, "b": reference.record},
                "judge": {"kind": judge.kind, "model": judge.model,
                          "circular": why is not None, "circular_why": why, **independence(judge, (row, reference)),
                          "decides": args.decides, "heldout": checked,
                          "sha256": None if judge.kind == "api" else judge.identity[1], "temperature": 0.0},
                "sampling": sampling, **fingerprints, "summary": summary,
                "cost": {k: round(v, 2) for k, v in costs[row.name].items()}, "prompts": entries}
            comparison_path = place_for(directory, row.name, reference.name, result["judge"])
            common.write_json(comparison_path, result)
            scores = [[e["id"], e["score"], e["tokens_a"] - e["tokens_b"]] for e in entries]
            summary = {k: v for k, v in result.items() if k != "prompts"} | {"scores": scores}
            common.write_json(directory / "summaries" / comparison_path.name, summary)
            show(result)
        write_page(directory)
        common.say(f"side by side: {directory / 'index.html'}")
    results = str(directory.parent.parent)
    common.say_next("python", "report.py", *(["--results", results] if results != Args.results else []))


if __name__ == "__main__":
    main(tyro.cli(Args))
