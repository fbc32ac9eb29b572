"""SFT: supervised fine-tuning of a base model on conversations, with LoRA.

    L(θ) = − Σ_t m_t log π_θ(x_t | x_<t) / Σ_t m_t          m_t = 1 on assistant tokens, EOS included

Paper: Ouyang et al. 2022 (2203.02155), section 3.5; LoRA: Hu et al. 2021 (2106.09685); NF4: Dettmers et al. 2023
(2305.14314). A well-known implementation to compare with: TRL's SFTTrainer.

Deviations from the usual script, on purpose:
  1. One mean over all trained tokens of a step (all micro-batches, all ranks), never a mean of means.
  2. Every assistant turn of a conversation is trained (unless its message says `train: false`), of a pair only the
     chosen answer; no user or system token is. A turn's EOS is trained, so the policy learns to stop.
  3. Over-long conversations are cut at the end of a turn, never inside an answer.
  4. The held-out loss is measured with the adapter as later phases use it: merged into the unquantised base (--dtype).

    python sft.py                                     # Qwen2.5-0.5B on 5,000 rows of UltraChat
    python sft.py --model DIR --data my.jsonl --quantization none --out runs/mine
    torchrun --nproc-per-node 2 sft.py                # the same update on two GPUs
    python sft.py --epochs 2 --out runs/sft_2ep       # a control: does a method gain more than longer training?
    python sft.py --sft-adapter runs/sft_v2 --data PAIRS --out runs/sft_chosen      # a control: DPO's chosen answers

Expect, for Qwen2.5-Coder-0.5B-Instruct (4-bit GGUF, dequantised) on 5,000 rows of Alpaca, GPTeacher and Dolly: held-out
loss 2.206 -> 2.059, change -0.158 to -0.135 (seed 41); 26 s and 6.7 GiB on one H200.

A row: {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}, or a preference pair.
Other layouts: docs/data-formats.md.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor

import chat
import common
import inputs
from common import Example


@dataclass(frozen=True)
class Args:
    # -- model --
    model: str | None = None
    """The pretrained base: a directory or a hub id[@revision]; by default Qwen2.5-0.5B, or that of --sft-adapter."""
    sft_adapter: str | None = None
    """Start from this policy, merged into the base, with a fresh LoRA: a run or a PEFT LoRA (directory or hub id)."""
    other_base: bool = False
    """Accept a plain PEFT adapter whose config names a base other than --model."""
    quantization: Literal["qlora", "none"] = "qlora"
    """The same for all methods: "qlora" trains SFT on an NF4 base [QLoRA, sec. 2], "none" in --dtype."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the base weights unless they are NF4. Adapter and Adam state are always fp32."""
    # -- data --
    data: str = common.ULTRACHAT
    """Training conversations: .jsonl, .json, .csv, .parquet, a directory or hub id[@revision][:split]. Of
    preference pairs, the chosen answers to part A's prompts (DPO's and KTO's) are the demonstrations."""
    heldout_data: str | None = None
    """Held-out conversations; by default found beside --data (x.jsonl -> x_heldout.jsonl, train_sft -> test_sft)."""
    eval_data: str | None = None
    """Directory of evaluation data; training rows that share 13 words in a row with one of its prompts are counted."""
    rows: int = 5000
    """Training rows: the first usable ones of the seed's shuffle."""
    heldout_rows: int = 256
    """Held-out rows for the loss."""
    max_length: int = 1024
    """Longest conversation in tokens."""
    max_dropped: float = 0.05
    """The run ends if a larger share of the rows is degenerate (empty answer, first exchange too long)."""
    max_overlong: float = 0.15
    """The run ends if a larger share of preference rows is longer than --max-length, as in dpo.py."""
    # -- optimisation --
    lr: float = 2e-4
    """Peak learning rate [QLoRA: table 9, up to 13B; ours: results/sweeps/qwen2.5-coder-0.5b-instruct-sft+lr_2e-4.json,
    where 5e-4 ends 0.002 nats lower, in one run]. It suits Gemma 3 270M too; Qwen2.5-0.5B itself has not been tried."""
    batch_size: int = 16
    """Conversations per step, over all ranks [QLoRA: table 9]."""
    epochs: int = 1
    """Passes over the rows."""
    warmup: float = 0.03
    """Share of the steps over which the rate rises [QLoRA: its code]; then linear to 0 [ours; QLoRA: constant]."""
    max_grad_norm: float = 1.0
    """Gradient clip, over all trained parameters."""
    # -- what is measured at the end --
    eos_prompts: int = 64
    """Number of held-out prompts answered greedily to measure eos_rate."""
    eos_tokens: int = 512
    """Token limit of these answers [enough for all but the longest answers of chat data]."""
    # -- run --
    preview: int = 0
    """Show this many examples as they would be trained, and what would be dropped; load no weights, train nothing."""
    seed: int = 42
    """Seed of the row shuffle, the order and the LoRA initialisation."""
    out: str = "runs/sft_v2"
    """Run directory."""
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

def sft_loss(logprobs: Tensor, step_tokens: int) -> Tensor:
    """A micro-batch's share of L: −Σ log π / N, with N the trained tokens of the *whole step*. logprobs [K] -> []."""
    return -logprobs.sum() / step_tokens


def learning_rate(step: int, total: int, args: Args) -> float:
    """lr · min((t+1)/w, (T−t)/max(1, T−w)) at step t = 0 … T−1, w = max(1, ⌈warmup·T⌉); it would be 0 at T."""
    w = max(1, math.ceil(args.warmup * total))
    return args.lr * min((step + 1) / w, (total - step) / max(1, total - w))


# -- a row, and which of its answers are trained (build_examples, below main) ---------------------

@dataclass(frozen=True)
class Conversation:
    example: Example
    cut: bool           # were turns beyond --max-length left out?
    prompt: list[dict]  # up to the first answer
    text: str


def conversation(row: dict, where: str) -> tuple[list[dict], str]:
    """(messages, which answers are trained) of a row: all of a conversation's; of a preference pair, the chosen one."""
    if "chosen" not in row:
        return inputs.as_conversation(row, where), "all"
    prompt, chosen, _ = inputs.as_pair(row, where)
    return [*prompt, {"role": "assistant", "content": chosen}], "last"


def main(args: Args) -> None:
    # 1. Check everything that can be checked without a model.
    common.check_positive(args, "rows", "heldout_rows", "max_length", "lr", "batch_size", "epochs", "max_grad_norm",
                          "eos_prompts", "eos_tokens", "checkpoint_every")
    common.check_share(args, "warmup", "max_dropped", "max_overlong")
    common.check_numbers(args)
    device = common.setup_device(args.device)
    dtype = common.setup_dtype(args.dtype, device)
    parent, adapter, model, model_dir, tokenizer, invariants = inputs.read_start(
        args.sft_adapter, args.model, args.other_base, args.quantization)
    if invariants.quantization != args.quantization:
        common.fail(f"--quantization {args.quantization}, but {args.sft_adapter} was trained under "
                    f"{invariants.quantization!r}: use the same")
    nf4 = args.quantization == "qlora" and not adapter
    engine = common.choose_engine(args.engine, model_dir, device)
    common.check_max_length(model_dir, args.max_length, args.micro_tokens)
    if nf4:
        common.check_nf4(device)
    split = inputs.load_split(args, ["chat", "pair"], conversation, build_examples(tokenizer, args))
    examples, heldout = ([c.example for c in rows] for rows in (split.train, split.heldout))
    prompts = [ids for c in split.heldout[:args.eos_prompts] if len(ids := chat.render_prompt(tokenizer, c.prompt))
               + args.eos_tokens <= common.max_positions(model_dir)]
    counts = inputs.preflight(tokenizer, examples, [c.text for c in split.train], split.dropped,
                              sum(c.cut for c in split.train), args.eval_data, args.preview)
    run = common.Run("sft", args, invariants, split.fingerprints, parent, adapter)
    run.record["data_sources"] = split.sources

    # 2. The policy: the pretrained base (NF4 under "qlora") or base + SFT merged, frozen, and a fresh LoRA.
    common.set_seed(args.seed)
    start = common.load_model(model_dir, adapter, "nf4" if nf4 else "none", dtype, device, engine)
    policy = common.add_lora(start)
    before = heldout_nll(policy, heldout, args.micro_tokens, device)  # B = 0: the loss of the starting point
    params = common.flat_parameters(policy)
    optimizer = torch.optim.Adam([params], lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=device.type == "cuda")
    steps = common.batches(len(examples), args.batch_size, args.epochs, args.seed)
    common.say(f"{len(steps)} steps of {args.batch_size} conversations = {common.world()} ranks x "
               f"{args.batch_size / common.world():g}; {params.numel():,} trained parameters")
    common.note_memory([policy], args.micro_tokens, max(sum(len(examples[i].ids) for i in step) for step in steps))

    # 3. Train.
    for step in range(run.resume(optimizer, len(steps)), len(steps)):
        batch = [examples[i] for i in steps[step]]
        step_tokens = sum(len(e.targets) for e in batch)  # the denominator: all ranks, all micro-batches
        mine = [batch[i] for i in common.my_share([len(e.ids) for e in batch])]

        # 3a. Forward and backward, one micro-batch after the other; the gradients add up to the gradient of L.
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        for micro in common.micro_batches(policy, mine, args.micro_tokens):
            logprobs, extra = common.token_logprobs(policy, micro, extras=("correct",))
            loss = sft_loss(logprobs, step_tokens)
            loss.backward()
            totals += torch.stack([loss.detach(), extra["correct"].sum() / step_tokens])
        loss, accuracy = common.all_reduce_(totals)

        # 3b. Sum over ranks, clip, step.
        common.all_reduce_(params.grad)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, len(steps), args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

        # 3c. Log and checkpoint. Nothing above waits for the GPU: a line is written once its numbers are ready.
        run.log(step, {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm, "lr": lr,
                       "tokens": sum(len(e.ids) for e in batch), "trained_tokens": step_tokens},
                [split.row_indices[i] for i in steps[step]])
        run.checkpoint(step + 1, optimizer)

    # 4. Save, then measure the policy as later phases will use it: merged into the unquantised base.
    run.save(policy, tokenizer, split.prompts)
    metrics = dict(counts)
    if nf4:
        metrics["heldout_loss_nf4_base"] = mean_loss(before, heldout)[0]
        metrics["heldout_loss_nf4"] = mean_loss(heldout_nll(policy, heldout, args.micro_tokens, device), heldout)[0]
        base = common.load_model(model_dir, None, "none", dtype, device, engine)
        before = heldout_nll(base, heldout, args.micro_tokens, device)
        del base
    if parent:
        metrics |= common.movement(policy, args.out, adapter, model_dir, heldout[:args.eos_prompts], args.micro_tokens)
    del start, policy, optimizer, params
    merged = common.load_model(model_dir, args.out, "none", dtype, device, engine)
    after = heldout_nll(merged, heldout, args.micro_tokens, device)
    metrics["heldout_loss_base"], _ = mean_loss(before, heldout)
    metrics["heldout_loss"], metrics["heldout_loss_interval"] = mean_loss(after, heldout)
    _, metrics["heldout_loss_change_interval"] = mean_loss(after - before, heldout)
    if metrics["heldout_loss"] > metrics["heldout_loss_base"]:
        common.say(f"WARNING: the held-out loss of base + adapter ({metrics['heldout_loss']:.4f}) is worse than the "
                   f"{'parent' if parent else 'base'}'s ({metrics['heldout_loss_base']:.4f})")
    metrics["eos_prompts"] = len(prompts)
    metrics["eos_rate"] = common.eos_rate(merged, tokenizer, prompts, args.eos_tokens, parent) if prompts else None
    run.finish(metrics, ["loss", "accuracy", "grad_norm", "lr", "tokens_per_s", "peak_gib"],
               f"Supervised fine-tuning of {model} with LoRA on {len(examples):,} conversations of {args.data}.")


# -- rows to tensors ------------------------------------------------------------------------------

def build_examples(tokenizer, args: Args):
    """Returns build(results of `conversation`, names): a Conversation per row, or why it can't be used."""
    def build(conversations: list[tuple[list[dict], str]], names: list[str]) -> list[Conversation | str]:
        train = conversations[0][1] if conversations else "all"
        for name, (_, mode) in zip(names, conversations):
            if mode != train:
                common.fail(f"{name}: conversations and preference pairs in one source; split it")
        out = []
        rendered = chat.render_many(tokenizer, [messages for messages, _ in conversations], train, names)
        for (messages, _), (ids, mask) in zip(conversations, rendered):
            # A trained part ends where the mask does: after the turn's stop token.
            ends = [i + 1 for i in range(len(ids)) if mask[i] and not (i + 1 < len(ids) and mask[i + 1])]
            fitting = [end for end in ends if end <= args.max_length]
            if not all(m["content"].strip() for m in messages if m["role"] == "assistant"):
                out.append("empty answer")
            elif not ends:
                out.append("no answer to train")
            elif not fitting:
                out.append("too long" if train == "last" else "first exchange too long")
            else:
                end, first = fitting[-1], next(i for i, m in enumerate(messages) if m["role"] == "assistant")
                out.append(Conversation(Example.masked(ids[:end], mask[:end]), end < ends[-1], messages[:first],
                                        "\n".join(m["content"] for m in messages)))
        return out
    return build


# -- the held-out loss ----------------------------------------------------------------------------

@torch.no_grad()
def heldout_nll(model, examples: list[Example], micro_tokens: int, device) -> Tensor:
    """NLL of each held-out conversation's trained tokens, in nats, over all ranks [conversations]."""
    mine = common.my_share([len(e.ids) for e in examples])
    nll = torch.zeros(len(examples), dtype=torch.float64, device=device)
    for micro in common.micro_batches(model, [examples[i] for i in mine], micro_tokens):
        nll[[mine[i] for i in micro.examples]] = -micro.sum_by_sequence(common.token_logprobs(model, micro)).double()
    return common.all_reduce_(nll).cpu()


def mean_loss(nll: Tensor, examples: list[Example]) -> tuple[float, list[float] | None]:
    """(nats per token, its 95 % interval over conversations), the interval by linearising Σ nll / Σ tokens."""
    tokens = torch.tensor([len(e.targets) for e in examples], dtype=torch.float64)
    loss = nll.sum() / tokens.sum()
    return loss.item(), common.interval(loss + (nll - loss * tokens) / tokens.mean(), range(len(examples)))


if __name__ == "__main__":
    main(tyro.cli(Args))
