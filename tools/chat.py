"""Talk to a policy in the terminal; with --versus to two, side by side, each with its own conversation.

    python tools/chat.py runs/dpo_v1                              # a run, or any plain PEFT LoRA adapter
    python tools/chat.py runs/dpo_v1 --versus runs/sft_v2
    python tools/chat.py Qwen/Qwen2.5-0.5B --temperature 0        # a base model; 0 is greedy
    printf 'Why is the sky blue?\n' | python tools/chat.py runs/dpo_v1

Prompts are rendered by the chat template that the policy was trained with, and answers are drawn by the sampler that
PPO, GRPO, judge.py and evaluate.py use, the adapter beside the weights. The noise of a turn is keyed by (seed, number
of the turn, position), the same for both policies. Commands: /new begins a new conversation, /quit or Ctrl-D ends,
Ctrl-C cuts an answer short.
"""
import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parent.parent))
import chat
import common
import inputs
from common import fail


@dataclass(frozen=True)
class Args:
    policy: tyro.conf.Positional[str]
    """A run directory, any plain PEFT LoRA adapter, or a base model (directories or hub ids)."""
    versus: str | None = None
    """A second policy, answering the same turns beside the first."""
    model: str | None = None
    """The base of the adapters; by default the one that they were trained on."""
    other_base: bool = False
    """Accept a plain PEFT adapter that names another base than --model."""
    system: str | None = None
    """A system message to begin with."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy [judge.py: 0.7]."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches this."""
    max_new_tokens: int = 512
    """Tokens that an answer may take."""
    seed: int = 42
    """Seed of the sampling."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the base's weights; adapters are fp32."""
    engine: Literal["auto", "fast", "plain"] = "auto"
    """auto: the fast engine where it serves the model, else the plain one (any model, slower)."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


COMMANDS = "/new begins a new conversation, /quit ends, Ctrl-C cuts an answer short"


def read_source(source: str, args: Args) -> inputs.Start:
    """What a policy is made of, checked, before any weights are loaded."""
    directory, local = common.resolve_adapter(source), Path(source)
    if not directory.exists() and local.parent.is_dir() and local.parent != Path("."):
        fail(f"{source}: no such run, adapter or model directory")
    if (directory / "adapter_config.json").is_file():
        return inputs.read_start(source, args.model, args.other_base)
    return inputs.read_start("none", source)


class Speaker:
    """A policy and its own side of the conversation."""

    def __init__(self, source: str, args: Args, dtype, device):
        start = read_source(source, args)
        engine = common.choose_engine(args.engine, start.model_dir, device)
        model = common.load_model(start.model_dir, None, "none", dtype, device, engine)
        if start.adapter:
            model = common.attach_adapter(model, start.adapter)
        self.name, self.tokenizer, self.engine = Path(source.rstrip("/")).name, start.tokenizer, engine
        self.positions = common.max_positions(start.model_dir)
        self.sampler = common.Sampler(model, self.tokenizer, max_batch=1, short=True)
        if engine == "fast":
            self.sampler.decoder.READBACK = 1  # tokens are shown as they are sampled
        self.messages: list[dict] = []

    def begin(self, system: str | None) -> None:
        """A new conversation."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str, turn: int, args: Args, show: Callable[[str], Any]) -> str:
        """Answer a turn of the user; show(answer so far) is called as it grows. Returns how it ended: "eos", "length"
        (--max-new-tokens), "full" (no positions are left to go on or to begin), or "cut" by Ctrl-C."""
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            prompt, ids = chat.render_prompt(self.tokenizer, asked, "the conversation"), []
        except chat.Unwritable:
            common.fail(f"{self.name}: the tokenizer can't write {text[:80]!r}, or an earlier text of the conversation")
        room = min(args.max_new_tokens, self.positions - len(prompt))
        if room < 1:
            return "full"

        def stream(_: int, so_far: list[int]) -> None:
            ids[:] = so_far
            answer = printable(self.tokenizer.decode(ids, skip_special_tokens=True))
            show(answer.rstrip("\N{REPLACEMENT CHARACTER}"))  # the bytes of a character that is not whole yet
        try:
            done, = self.sampler.sample([prompt], room, args.temperature, args.top_p, args.seed, rows=[turn],
                                        stream=stream)
            ended = "full" if done.stopped == "length" and room < args.max_new_tokens else done.stopped
        except KeyboardInterrupt:
            ended = "cut"
        answer = self.tokenizer.decode(ids, skip_special_tokens=True)
        show(printable(answer))
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return ended


NOTES = {"length": " [cut: --max-new-tokens]", "cut": " [cut]",
         "full": " [the conversation fills the model's positions; /new begins another]"}


def printable(text: str) -> str:
    """Without control characters: an answer can't move the cursor or set the terminal's title."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def show_lines(console: Console, speakers: list[Speaker], text: str, turn: int, args: Args) -> None:
    """The answers one below the other, each growing at its end."""
    for speaker in speakers:
        console.print(f"{speaker.name}: ", style="bold", end="", markup=False, highlight=False)
        written = ""

        def show(so_far: str) -> None:
            nonlocal written
            console.out(so_far[len(written):], end="", highlight=False)
            written = so_far
        ended = speaker.answer(text, turn, args, show)
        console.out(NOTES.get(ended, ""), highlight=False)


def narrower(console: Console) -> int:
    """A width that leaves room for the ^C that a terminal writes behind the last character."""
    return max(console.width - 3, 1)


class End:
    """The last lines of a renderable, up to the terminal's height: growing text stays in view, and nothing scrolls."""

    def __init__(self, whole: Table | Text):
        self.whole = whole

    def __rich_console__(self, console: Console, options):
        options = options.update(width=narrower(console), height=None)
        for line in console.render_lines(self.whole, options)[-max(1, console.height - 1):]:
            yield from line
            yield Segment.line()


def show_columns(console: Console, speakers: list[Speaker], text: str, turn: int, args: Args) -> None:
    """The answers side by side, one growing after the other; answers too tall for the terminal are printed whole
    at the end. With one policy there is no frame."""
    shown = {speaker.name: "" for speaker in speakers}

    def columns() -> Table | Text:
        if len(shown) == 1:
            return Text.assemble((f"{speakers[0].name}: ", "bold"), shown[speakers[0].name])
        grid = Table(expand=True)
        for name in shown:
            grid.add_column(Text(name), ratio=1)
        grid.add_row(*map(Text, shown.values()))
        return grid
    with Live(console=console, transient=True, auto_refresh=False) as live:
        for speaker in speakers:
            def show(so_far: str) -> None:
                shown[speaker.name] = so_far
                live.update(End(columns()), refresh=True)
            ended = speaker.answer(text, turn, args, show)
            show(shown[speaker.name] + NOTES.get(ended, ""))
    console.print(columns(), width=narrower(console))


def main(args: Args) -> None:
    common.check_positive(args, "max_new_tokens", "top_p")
    common.check_share(args, "top_p")
    common.check_numbers(args)
    if args.temperature < 0:
        fail(f"--temperature must be 0 or above, got {args.temperature}")
    device = common.setup_device(args.device)
    dtype = common.setup_dtype(args.dtype, device)
    sources = [source for source in (args.policy, args.versus) if source]
    for source in sources[1:]:
        read_source(source, args)
    speakers = [Speaker(source, args, dtype, device) for source in sources]
    if args.system and not all(s.tokenizer.chat_format.system for s in speakers):
        fail("--system: the chat template takes no system message")
    if len({s.name for s in speakers}) < len(speakers):
        for speaker, source in zip(speakers, sources):
            speaker.name = source
    how = "greedy" if args.temperature == 0 else \
        f"temperature {args.temperature:g}, top_p {args.top_p:g}, seed {args.seed}"
    console = Console(highlight=False)
    for s in speakers:
        stops = " ".join(map(repr, s.tokenizer.chat_format.stops))
        console.print(f"{s.name}: {s.engine} engine, {str(dtype).removeprefix('torch.')} on {device}; stops at {stops}; "
                      f"chat template: {s.tokenizer.template_note or 'its own'}", markup=False)
    console.print(f"sampling: {how}, at most {args.max_new_tokens} tokens\n{COMMANDS}\n", markup=False)
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, for the line's editing and history
    answer = show_columns if console.is_terminal else show_lines
    turn = 0
    for speaker in speakers:
        speaker.begin(args.system)
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            break
        if not typed:
            console.out(text, highlight=False)
        if text.strip() == "/quit":
            break
        if text.strip() == "/new":
            for speaker in speakers:
                speaker.begin(args.system)
        elif re.fullmatch(r"/\w*", text.strip()):
            console.print(f"no such command: {COMMANDS}", markup=False)
        elif text.strip():
            answer(console, speakers, text, turn, args)
            turn += 1
    console.out()


if __name__ == "__main__":
    main(tyro.cli(Args))
