"""Reward model: a scalar score of an answer, learned from chosen/rejected pairs by Bradley–Terry, with LoRA.

    L(θ) = mean over pairs of [− log σ(r_c − r_r) + λ (r_c + r_r)²]          r = w · h_EOS, one number per answer

Papers: Ouyang et al. 2022 (2203.02155), eq. 1; Stiennon et al. 2020 (2009.01325), sec. 3.4; the centring term λ:
Eisenstein et al. 2023 (2312.09244). In symbols: r_c, r_r the scores of chosen and rejected, w the head, h_EOS
the last hidden state at the answer's EOS. A well-known implementation to compare with: TRL's RewardTrainer.

Deviations from the usual script, on purpose:
  1. It starts from the pretrained base, not from SFT (2203.02155 starts from a 6B SFT model): it depends on no other
     phase, and one reward model serves any policy of the comparison.
  2. The score is read at the last token of each sequence, by its index: where pad = EOS, a library's pooling
     ("the last token that is not pad") skips the EOS and reads one token too early.
  3. The head is fp32 and never quantised, w ~ N(0, 1/(H+1)) [2403.17031: its reward head], seeded.
  4. One comparison per row, all pairs of a step in one mean; 2203.02155 batches all K(K−1)/2 pairs of a prompt.
  5. The centring term makes the level of the scores comparable between prompts; there is no other normalisation.
  6. A pair's two answers are scored in the same micro-batch; attention never crosses from one to the other.
  7. Pairs with an over-long side are dropped and counted, never cut: a cut answer has no EOS to read.

    python reward.py
    python reward.py --score answers.jsonl --adapter runs/rm_v1

Expect, for Qwen2.5-Coder-0.5B-Instruct on 4,669 pairs of part A (seed 41): held-out accuracy 64.2 % [59.6, 68.5], where
"the longer answer wins" reaches 60.2 %: no clear difference on 441 pairs. 29 s on one H200.

A row: {"prompt": "…" or messages, "chosen": …, "rejected": …}, or chosen and rejected as whole conversations. Pairs
come from part A of the prompts (50 % by sha256), with --part J from J (20 %), for a model that watches PPO and judges;
part B is PPO's. Rows whose prompt is held out are left out. The second command adds "score" to rows {"prompt": …,
"completion": …}. Other layouts: docs/data-formats.md.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import chat
import common
import inputs
from common import Example


@dataclass(frozen=True)
class Args:
    # -- model --
    model: str = common.QWEN
    """The pretrained base: a local directory or a hub id[@revision]."""
    quantization: Literal["qlora", "none"] = "qlora"
    """The same for all methods: "qlora" trains on an NF4 base [QLoRA, sec. 2], "none" in --dtype."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the base weights unless they are NF4. Adapter, head and Adam state are always fp32."""
    # -- data --
    data: str = common.ULTRAFEEDBACK
    """Preference pairs: .jsonl, .json, .csv, .parquet, a directory or hub id[@revision][:split]."""
    heldout_data: str | None = None
    """Held-out pairs; by default found beside --data (x.jsonl -> x_heldout.jsonl, train_prefs -> test_prefs)."""
    eval_data: str | None = None
    """Directory of evaluation data; training rows that share 13 words in a row with one of its prompts are counted."""
    rows: int = 5000
    """Training pairs: the first usable ones of --part in the seed's shuffle."""
    heldout_rows: int = 1800
    """Held-out pairs for results/rm [UltraFeedback has 1,800 besides the judge's 200, which are excluded]."""
    max_length: int = 1024
    """Longest prompt + answer in tokens."""
    max_dropped: float = 0.05
    """The run ends if a larger share of the pairs is degenerate (empty or equal answers)."""
    max_overlong: float = 0.15
    """The run ends if a larger share of the pairs is longer than --max-length [at least 6 % of UltraFeedback is]."""
    part: Literal["A", "J", "B"] = "A"
    """Part of the prompts to learn from: A for the model that PPO trains against, J for one that watches and judges,
    B for one that selects settings of DPO and KTO (`make sweep`)."""
    # -- method --
    centring: float = 0.01
    """λ, the weight of (r_c + r_r)² [the term: 2312.09244; 0.01: TRL's advice]; 0 is plain Bradley–Terry."""
    # -- optimisation --
    lr: float = 5e-5
    """Peak learning rate [ours, not swept; full fine-tunes use about 1e-5 (2203.02155: 9e-6), LoRA more]."""
    batch_size: int = 16
    """Pairs per step, over all ranks."""
    epochs: int = 1
    """Passes over the pairs [2203.02155: one; more overfits]."""
    warmup: float = 0.03
    """Share of the steps over which the rate rises linearly; then it falls linearly toward 0."""
    max_grad_norm: float = 1.0
    """Gradient clip, over all trained parameters."""
    # -- scoring rows instead of training --
    score: str | None = None
    """Score this file's prompt/completion rows with --adapter at its run's dtype and quantisation; train nothing."""
    adapter: str = "runs/rm_v1"
    """The reward model for --score."""
    # -- run --
    preview: int = 0
    """Show this many examples as they would be trained, and what would be dropped; load no weights, train nothing."""
    seed: int = 42
    """Seed of the row shuffle, the order and the initialisation of LoRA and head."""
    out: str = "runs/rm_v1"
    """Run directory; with --score the file to write (by default FILE.scored.jsonl)."""
    results: str = "results"
    """Where rm/<name>-<train_invariants>-s<seed>.json and .png are written."""
    overwrite: bool = False
    """If --out holds a run of another configuration, move that run aside."""
    micro_tokens: int = 8192
    """Tokens per forward: affects memory and speed, not the update."""
    engine: Literal["auto", "fast", "plain"] = "auto"
    """auto: the fast engine if it supports the model, else the plain one (any model, slower); the same update."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    track: Literal["none", "wandb", "trackio"] = "none"
    """Log to Weights & Biases or trackio too (an optional package each; both work offline and without an account)."""
    push_to_hub: str | None = None
    """NAMESPACE/NAME on the Hugging Face hub: upload the finished run; write access is checked before training."""


# -- the method's maths ---------------------------------------------------------------------------

def reward_loss(chosen: Tensor, rejected: Tensor, centring: float) -> Tensor:
    """Loss of each pair, from the scores of its two answers (all [pairs])."""
    # 2203.02155, eq. 1 with K = 2: −log σ(r_c − r_r); 2312.09244: + λ (r_c + r_r)²
    return -F.logsigmoid(chosen - rejected) + centring * (chosen + rejected) ** 2


def learning_rate(step: int, total: int, args: Args) -> float:
    """lr · min((t+1)/w, (T−t)/max(1, T−w)) at step t = 0 … T−1, w = max(1, ⌈warmup·T⌉); it would be 0 at T."""
    w = max(1, math.ceil(args.warmup * total))
    return args.lr * min((step + 1) / w, (total - step) / max(1, total - w))


def above_zero(difference: Tensor) -> Tensor:
    """1 where positive, 1/2 where zero (a tie is half right), 0 where negative."""
    return (difference > 0).float() + 0.5 * (difference == 0).float()


METRICS = ("loss", "accuracy", "margin", "scores_chosen", "scores_rejected", "centring")


def pair_metrics(chosen: Tensor, rejected: Tensor, centring: float) -> tuple[Tensor, Tensor]:
    """(losses [pairs], the METRICS summed over the pairs [6])."""
    losses, margin = reward_loss(chosen, rejected, centring), (chosen - rejected).detach()
    return losses, torch.stack([losses.detach(), above_zero(margin), margin, chosen.detach(), rejected.detach(),
                                (chosen + rejected).detach() ** 2]).sum(1)


# -- a pair (made by build_pairs, below main) -----------------------------------------------------

@dataclass(frozen=True)
class Pair:
    chosen: Example
    rejected: Example
    lengths: tuple[int, int]  # answer tokens of chosen and rejected, EOS included
    text: str                 # of prompt and both answers

    @property
    def tokens(self) -> int:
        return len(self.chosen.ids) + len(self.rejected.ids)


def at_eos(ids: list[int]) -> Example:
    """A sequence whose score is read at its last token (`batch.last` in common.reward_scores). Its predicted token, the
    EOS, is there for the preflight alone, which marks it and checks that it is a stop token."""
    return Example(ids, [len(ids) - 2], ids[-1:])


def sides(pairs: list[Pair]) -> list[Example]:
    return [e for p in pairs for e in (p.chosen, p.rejected)]


def main(args: Args) -> None:
    if args.score:
        return score_file(args)

    # 1. Check everything that can be checked without a model.
    common.check_positive(args, "rows", "heldout_rows", "max_length", "lr", "batch_size", "epochs", "max_grad_norm",
                          "checkpoint_every")
    common.check_share(args, "warmup", "max_dropped", "max_overlong")
    common.check_numbers(args)
    common.check_output("--results", args.results)
    if not 0 <= args.centring < math.inf:
        common.fail(f"--centring must be 0 or above, got {args.centring}")
    device = common.setup_device(args.device)
    dtype = common.setup_dtype(args.dtype, device)
    model_dir = common.resolve_model(args.model)
    engine = common.choose_engine(args.engine, model_dir, device)
    common.check_max_length(model_dir, args.max_length, args.micro_tokens)
    if args.quantization == "qlora":
        common.check_nf4(device)
    tokenizer = chat.load_tokenizer(model_dir)
    split = inputs.load_split(args, ["pair"], inputs.as_pair, build_pairs(tokenizer, args), args.part)
    pairs, heldout = split.train, split.heldout
    common.check_pairs([(p.chosen, p.rejected) for p in (*pairs, *heldout)], args.micro_tokens, engine)
    invariants = common.TrainInvariants.of(args.model, model_dir, tokenizer, args.quantization)
    counts = inputs.preflight(tokenizer, sides(pairs), [p.text for p in pairs], split.dropped, 0, args.eval_data,
                              args.preview)
    run = common.Run("reward", args, invariants, split.fingerprints)
    run.record["data_sources"] = split.sources

    # 2. The reward model: the pretrained base, frozen (NF4 under "qlora"), a fresh LoRA and a fresh head.
    common.set_seed(args.seed)
    quantization = "nf4" if args.quantization == "qlora" else "none"
    model = common.load_model(model_dir, None, quantization, dtype, device, engine)
    model = common.add_head(common.add_lora(model), args.seed)
    params = common.flat_parameters(model)
    optimizer = torch.optim.Adam([params], lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=device.type == "cuda")
    steps = common.batches(len(pairs), args.batch_size, args.epochs, args.seed)
    common.say(f"{len(steps)} steps of {args.batch_size} pairs = {common.world()} ranks x "
               f"{args.batch_size / common.world():g}; {params.numel():,} trained parameters")
    common.note_memory([model], args.micro_tokens, max(sum(pairs[i].tokens for i in step) for step in steps))

    # 3. Train.
    for step in range(run.resume(optimizer, len(steps)), len(steps)):
        batch = [pairs[i] for i in steps[step]]
        mine = sides([batch[i] for i in common.my_share([p.tokens for p in batch])])

        # 3a. Forward and backward per micro-batch; the denominator is the step's pairs, over all ranks.
        totals = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        for micro in common.micro_batches(model, mine, args.micro_tokens, unit=2):
            chosen, rejected = common.reward_scores(model, micro).view(-1, 2).T           # each [pairs]
            losses, sums = pair_metrics(chosen, rejected, args.centring)
            (losses.sum() / len(batch)).backward()
            totals += sums
        metrics = dict(zip(METRICS, common.all_reduce_(totals) / len(batch)))

        # 3b. Sum over ranks, clip, step.
        common.all_reduce_(params.grad)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, len(steps), args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

        # 3c. Log and checkpoint. Nothing above waits for the GPU: a line is written once its numbers are ready.
        run.log(step, {**metrics, "grad_norm": grad_norm, "lr": lr, "tokens": sum(p.tokens for p in batch),
                       "chosen_tokens": sum(p.lengths[0] for p in batch) / len(batch),
                       "rejected_tokens": sum(p.lengths[1] for p in batch) / len(batch)},
                [split.row_indices[i] for i in steps[step]])
        run.checkpoint(step + 1, optimizer)

    # 4. Save (adapter and head, relative to the pretrained base), and measure on held-out pairs.
    run.save(model, tokenizer, split.prompts)
    scores = common.score_examples(model, sides(heldout), args.micro_tokens, 2).view(-1, 2)  # [pairs, 2]
    lengths = torch.tensor([p.lengths for p in heldout])                                     # [pairs, 2]
    run.check_finite(len(steps), [], heldout_scores=scores.sum().item())
    figures = evaluation(scores, lengths, args.centring)
    if common.rank() == 0:
        write_results(Path(args.results) / "rm", run.record, scores, lengths, figures)
    metrics = {**counts, "heldout_pairs": len(heldout), "heldout_loss": figures["loss"],
               "heldout_accuracy": figures["accuracy"], "longer_wins": figures["longer_wins"]["accuracy"],
               "length_matched_accuracy": figures["length_matched"]["accuracy"],
               "score_length": figures["score_length"]["pearson"], "calibration_error": figures["calibration_error"]}
    run.finish(metrics, ["loss", "accuracy", "margin", "scores_chosen", "scores_rejected", "centring", "grad_norm",
                         "tokens_per_s"],
               f"Reward model (Bradley–Terry, centring λ = {args.centring}) of {args.model} with LoRA and a scalar "
               f"head on {len(pairs):,} pairs of {args.data}.")


# -- rows to tensors ------------------------------------------------------------------------------

def build_pairs(tokenizer, args: Args):
    """Returns build(pairs of (prompt messages, chosen, rejected), names): a Pair per row, or why it can't be used."""
    def build(pairs: list[tuple[list[dict], str, str]], names: list[str]) -> list[Pair | str]:
        chats = [prompt + [{"role": "assistant", "content": text}] for prompt, *texts in pairs for text in texts]
        names = [name for name in names for _ in range(2)]
        rendered = chat.render_many(tokenizer, chats, "last", names)
        out = []
        for (prompt, chosen, rejected), (w, w_mask), (l, l_mask) in zip(pairs, rendered[::2], rendered[1::2]):
            if not chosen.strip() or not rejected.strip():
                out.append("empty answer")
            elif chosen == rejected:
                out.append("chosen equals rejected")
            elif max(len(w), len(l)) > args.max_length:
                out.append("too long")
            else:
                out.append(Pair(at_eos(w), at_eos(l), (sum(w_mask), sum(l_mask)),
                                "\n".join([*(m["content"] for m in prompt), chosen, rejected])))
        return out
    return build


# -- the report on held-out scores ----------------------------------------------------------------

def share(difference: Tensor) -> dict:
    """How often a difference is above zero, ties half: {"n", "accuracy", "interval"}."""
    right, n = above_zero(difference).sum().item(), len(difference)
    return {"n": n, "accuracy": right / n if n else None, "interval": common.wilson(right, n)}


def outcomes(difference: Tensor) -> str:
    """One character per pair, for a paired test: "1" where the difference is above zero, "0" below, "-" for a tie."""
    return "".join("1" if x > 0 else "0" if x < 0 else "-" for x in difference.tolist())


def correlation(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """Pearson's and Spearman's; None where one side is constant or there are fewer than two points."""
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return {"pearson": None, "spearman": None}
    from scipy import stats  # here, since --help and the training need none of it
    x, y = x.double().numpy(), y.double().numpy()
    return {"pearson": float(stats.pearsonr(x, y)[0]), "spearman": float(stats.spearmanr(x, y)[0])}


def calibration(margin: Tensor, bins: int = 10) -> list[dict]:
    """Tenths of the pairs by |margin|, smallest first: are pairs with confidence p = σ(|margin|) right at a rate of p?

    Grouped by |margin|, the model's confidence: the signed margin alone would tell whether the pair is right.
    """
    order = margin.abs().argsort(stable=True)
    return [{"n": len(part), "confidence": torch.sigmoid(margin[part].abs().double()).mean().item(),
             "accuracy": above_zero(margin[part]).mean().item(), "largest_margin": margin[part].abs().max().item()}
            for part in order.tensor_split(bins) if len(part)]


def length_matched(lengths: Tensor, tolerance: float = 0.1) -> Tensor:
    """[pairs, 2] tokens -> [pairs] bool: the two differ by at most a tenth of the longer."""
    return (lengths[:, 0] - lengths[:, 1]).abs() <= tolerance * lengths.max(1).values


def evaluation(scores: Tensor, lengths: Tensor, centring: float) -> dict:
    """Figures of results/rm/<name>-….json, from scores and token counts of (chosen, rejected) answers, [pairs, 2]."""
    margin, longer = scores[:, 0] - scores[:, 1], (lengths[:, 0] - lengths[:, 1]).double()
    bins = calibration(margin)
    return {
        **share(margin), "loss": reward_loss(*scores.T, centring).mean().item(), "longer_wins": share(longer),
        "outcomes": {"model": outcomes(margin), "longer_wins": outcomes(longer)},
        "length_matched": share(margin[length_matched(lengths)]),
        "score_length": correlation(scores.flatten(), lengths.flatten()), "margin_length": correlation(margin, longer),
        "scores": {side: {"mean": s.mean().item(), "sd": s.std(correction=0).item()}
                   for side, s in (("chosen", scores[:, 0]), ("rejected", scores[:, 1]), ("margin", margin))},
        "calibration": bins,
        "calibration_error": sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(margin)}


def write_results(directory: Path, record: dict, scores: Tensor, lengths: Tensor, figures: dict) -> None:
    """Write directory/<name>-<train_invariants>-s<seed>.json, the run's identity and `figures`, and its plot, .png."""
    identity = {k: record[k] for k in ("name", "model", "config_hash", "family", "seed", "train_invariants",
                                       "adapter_sha256", "data", "data_sources", "command", "args")}
    path = directory / common.results_stem(record)
    common.write_json(f"{path}.json", {"schema_version": 1, **common.without_places(identity), **figures})
    common.write_atomic(f"{path}.png", lambda p: plot(scores, lengths, figures, record["name"], p))


def plot(scores: Tensor, lengths: Tensor, figures: dict, title: str, path: Path) -> None:
    """Scores by class, calibration, margin against the difference of lengths."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4))
    edges = torch.linspace(scores.min().item() - 1e-3, scores.max().item() + 1e-3, 31).tolist()
    for side, values in zip(("chosen", "rejected"), scores.T.tolist()):
        left.hist(values, edges, alpha=0.5, label=side)
    left.set(xlabel="score", ylabel="answers")
    left.legend()
    middle.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
    bins = figures["calibration"]
    middle.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-")
    middle.set(xlabel="σ(|margin|), mean of a tenth of the pairs", ylabel="accuracy", ylim=(-0.03, 1.03))
    right.axhline(0, color="grey", linewidth=0.8)
    right.plot((lengths[:, 0] - lengths[:, 1]).tolist(), (scores[:, 0] - scores[:, 1]).tolist(), ".", markersize=3)
    right.set(xlabel="tokens chosen − tokens rejected", ylabel="margin")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)


# -- scoring a file -------------------------------------------------------------------------------

def score_file(args: Args) -> None:
    """Write the rows of --score with a "score" column: each completion's reward, computed in the dtype and quantisation
    that the model was trained in."""
    out = Path(args.out if args.out != Args.out else f"{args.score}.scored.jsonl")
    if out.is_dir() or out.resolve() == Path(args.score).resolve():
        common.fail(f"--out {out} is {'a directory' if out.is_dir() else 'the file to score'}; name another file")
    device = common.setup_device(args.device)
    run, _, _, model_dir, tokenizer, _ = inputs.read_start(
        args.adapter, args.model if args.model != Args.model else None, reward=True)
    rows = list(inputs.load_rows(args.score, ["prompt", "completion"])[0])
    conversations = []
    for i, row in enumerate(rows):
        try:
            conversations.append(inputs.as_conversation(row, f"{args.score}, row {i}"))
        except inputs.Degenerate as e:
            common.fail(f"{args.score}, row {i}: {e}, so it can't be scored")

    def build(chats: list, names: list[str]) -> list[Example]:
        return [at_eos(ids) for ids, _ in chat.render_many(tokenizer, chats, "last", names)]
    examples = inputs.build_or_drop(build, conversations, names := [f"{args.score}, row {i}" for i in range(len(rows))])
    for name, example in zip(names, examples):
        if isinstance(example, str):
            common.fail(f"{name}: {example}, so it can't be scored")
    limit = min(args.micro_tokens, common.max_positions(model_dir))
    if long := [i for i, e in enumerate(examples) if len(e.ids) > limit]:
        common.fail(f"{args.score}, row {long[0]}: {len(examples[long[0]].ids)} tokens; {len(long)} rows in all "
                    f"are longer than the {limit} tokens that the model or --micro-tokens allows")
    nf4 = run["invariants"]["quantization"] == "qlora"
    if nf4:
        common.check_nf4(device)
    model = common.load_reward(model_dir, args.adapter, "nf4" if nf4 else "none", getattr(torch, run["args"]["dtype"]),
                               device, common.choose_engine(args.engine, model_dir, device))
    scores = common.score_examples(model, examples, args.micro_tokens)
    if not scores.isfinite().all():
        raise FloatingPointError(f"{args.adapter} gives scores that are not finite")
    if common.rank() == 0:
        scored = [{**common.nulled(row), "score": score} for row, score in zip(rows, scores.tolist())]
        common.write_text(out, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in scored))
    common.leave_ranks()
    common.say(f"{out}: {len(rows):,} scores of {run['name']} ({run['config_hash']}), mean {scores.mean():.4g}, "
               f"sd {scores.std(correction=0):.4g}")


if __name__ == "__main__":
    main(tyro.cli(Args))
