"""plots.py: the figures of report.py, as SVG and PNG: differences to base, trade-offs, curves of the runs.

A figure is None where its data is missing. An SVG has the same bytes for the same figure, so that report.py --check can
compare it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import sha256_json
from verdicts import FORGOTTEN, MARGIN, METRICS, Comparison, at, finite

if TYPE_CHECKING:  # imported where a figure is made, so that report.py --help starts at once
    from matplotlib.figure import Figure

PLOTS = {  # file name under plots/ -> what it shows
    "overview": "What each method learned, and what that changed on the benchmarks; small points are seeds",
    "speedrun": "GRPO on GSM8K from the base: held-out pass@1 against minutes, start-up included",
    "sweeps": "Held-out objective against learning rate, a panel per method; filled: chosen, crosses: not admissible",
    "deltas-plain": "Differences to base with paired 95 % intervals, plain protocol",
    "deltas-chat": "Differences to base with paired 95 % intervals, chat protocol",
    "tradeoff": "What IFEval gained beside what MMLU or TruthfulQA lost",
    "winrate-kl": "Judged win rate against SFT beside the KL to SFT",
    "ppo": "PPO: reward, KL and length over training",
    "grpo": "GRPO: reward, KL and length over training",
}
UNDRAWN = {"step", "seconds", "tokens", "trained_tokens", "lr"}  # of a run's log: known without a plot
# One file for light and dark: transparent, in tones of contrast 4:1 or more against white and against #0d1117.
INK = "#76808a"
COLOURS = {"sft": "#8a7a3c", "dpo": "#3b82c4", "ppo": "#c4652a", "grpo": "#2a8a5e", "kto": "#9a60cc"}
STYLE = {
    "svg.hashsalt": "rungs", "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "grid.alpha": 0.3, "lines.linewidth": 1.6,
    **dict.fromkeys("text.color axes.edgecolor axes.labelcolor xtick.color ytick.color grid.color".split(), INK),
}  # fmt: skip


@functools.cache  # once per process: finding fonts takes seconds
def use_own_font() -> None:
    """The font that matplotlib brings: another version of it, where the system has one, gives other bytes."""
    from matplotlib import font_manager, get_data_path
    fonts = font_manager.fontManager
    fonts.ttflist = [font for font in fonts.ttflist if font.name != "DejaVu Sans"]
    for path in sorted(Path(get_data_path(), "fonts", "ttf").glob("DejaVuSans*.ttf")):
        fonts.addfont(path)


def style():
    """Context in which the figures are made and written."""
    from matplotlib import rc_context
    use_own_font()
    return rc_context(STYLE)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def colour(row: dict) -> str:
    return COLOURS.get(row.get("method") or "", INK)


def forest(compared: list[Comparison]) -> Figure | None:
    """A panel per benchmark, a line per row: the difference to base and its interval; filled: clear by Holm."""
    shown = [c for c in compared if any(change.paired for change in c.changes.values())]
    if not shown:
        return None
    figure = new_figure(11, 1.1 + 0.36 * len(shown))
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for axis, column in zip(axes, METRICS):
        axis.axvline(0, color=INK, linewidth=1)
        if column in FORGOTTEN:
            axis.axvline(-MARGIN, color=INK, linewidth=1, linestyle=":")
        for y, c in enumerate(shown):
            if c.changes[column].paired:
                change, tone = c.changes[column], colour(c.row)
                axis.plot(np.round(change.paired.interval, 3), [y, y], color=tone, solid_capstyle="butt")
                axis.plot(round(change.points, 3), y, "o", color=tone, markerfacecolor=tone if change.clear else "none")
        axis.set_title(column.replace("\n", " "))
        axis.grid(axis="x")
        axis.tick_params(left=False)
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(range(len(shown)), [c.label for c in shown])
    axes[0].set_ylim(len(shown) - 0.5, -0.5)
    figure.supxlabel("points against base; filled: p < 0.05 after Holm; dotted: 2 points down", fontsize=10)
    return figure


def scatter(points: list[tuple], x_title: str, y_title: str) -> Figure:
    """Points with both intervals: (label, colour, x, its interval or None, y, its interval, filled). Points of one
    label, such as seeds, have one marker."""
    markers = dict(zip(dict.fromkeys(point[0] for point in points), itertools.cycle("osD^vPX")))
    figure = new_figure(7.6, max(4.4, 0.8 + 0.22 * len(markers)))  # room for the legend
    axis = figure.subplots()
    axis.margins(x=0.12)
    axis.grid()
    for label, tone, x, of_x, y, of_y, filled in points:
        marker, x, y = markers[label], round(x, 3), round(y, 3)
        axis.plot(np.round(of_x or (x, x), 3), [y, y], color=tone, alpha=0.6)
        axis.plot([x, x], np.round(of_y, 3), color=tone, alpha=0.6)
        axis.plot(x, y, marker, color=tone, markerfacecolor=tone if filled else "none", label=label)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(*zip(*{text: (handle, text) for handle, text in zip(handles, labels)}.values()), fontsize=9,
                loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_xlabel(x_title)
    axis.set_ylabel(y_title)
    return figure


def tradeoff(compared: dict, protocols: dict[str, str]) -> Figure | None:
    """A point per row: the gain on IFEval beside the worse of MMLU and TruthfulQA, each with its interval, and each
    benchmark in the protocol that it is tested in (of rows that were evaluated in both)."""
    def against_base(column: str) -> list[Comparison]:
        compared_rows = compared.get((protocols[column], "base"), ([], []))[0]
        return [c for c in compared_rows if c.changes[column].paired]

    points = []
    for c in against_base("IFEval\nprompt"):
        adapters = {row["adapter_sha256"] for row in c.rows}
        losses = [(comparison.changes[k].points, comparison.changes[k].paired.interval) for k in FORGOTTEN
                  for comparison in against_base(k)
                  if adapters & {row["adapter_sha256"] for row in comparison.rows}][:2]
        if len(losses) == 2:
            gain = c.changes["IFEval\nprompt"]
            points.append((c.label, colour(c.row), gain.points, gain.paired.interval, *min(losses), True))
    if not points:
        return None
    ifeval, *others = (protocols[column] for column in ("IFEval\nprompt", *FORGOTTEN))
    figure = scatter(points, f"IFEval by prompt ({ifeval}), points against base",
                     f"worse of MMLU and TruthfulQA ({others[0]}),\npoints against base")
    figure.axes[0].axvline(0, color=INK, linewidth=1)
    figure.axes[0].axhline(0, color=INK, linewidth=1)
    figure.axes[0].axhline(-MARGIN, color=INK, linewidth=1, linestyle=":")
    return figure


def winrate_kl(judge: list[dict], guardrails: list[dict]) -> Figure | None:
    """A point per judged row: how often it beats SFT, and how far it moved from SFT for that, measured on the answers
    that were judged; hollow: circular judge. None for records of another climb."""

    def key(record: dict, row: dict, reference: object) -> str:
        return sha256_json([row.get("name"), row.get("adapter_sha256"), reference, record.get("prompts_fingerprint"),
                            record.get("sampling")])

    moved = {key(record, row, at(record, "reference", "adapter_sha256")): row for record in guardrails
             for row in record.get("rows") or [] if not record["note"]}
    judges, points, marks = {at(record, "judge", "model") for record in judge}, [], set()
    for record in judge:
        row = moved.get(key(record, at(record, "rows", "a") or {}, at(record, "rows", "b", "adapter_sha256"))) or {}
        rate, ends = at(record, "summary", "win_rate"), at(record, "summary", "win_rate_ci95") or [None]
        if None in map(finite, (row.get("kl_sft"), rate, *ends)):
            continue
        circular = bool(at(record, "judge", "circular"))
        marks |= {text for text, holds in (
            ("best of N: its bound", row.get("kl_sft_bound")), ("hollow: circular judge", circular),
            ("hollow: answers collapsed", record.get("collapsed"))) if holds}
        label = row["name"] + f", by {Path(record['judge']['model']).name}" * (len(judges) > 1)
        tone = colour({"method": next((method for method in COLOURS if method in row["name"]), "")})
        label += ", collapsed" * bool(record.get("collapsed"))
        filled = not circular and not record.get("collapsed")
        points.append((label, tone, row["kl_sft"], None, 100 * rate, [100 * end for end in ends], filled))
    if not points:
        return None
    note = f" ({'; '.join(sorted(marks))})" * bool(marks)
    figure = scatter(points, "KL to SFT, nats per answer" + note, "win rate against SFT, %")
    figure.axes[0].axhline(50, color=INK, linewidth=1)
    return figure


def smooth(values: list[float | None]) -> np.ndarray:
    """Running mean: of each step, over the surrounding twentieth of all steps, where they have a value."""
    series, half = np.array([np.nan if finite(v) is None else v for v in values], float), max(1, len(values) // 40)
    windows = [series[max(0, i - half) : i + half + 1] for i in range(len(series))]
    return np.array([np.nan if np.isnan(w).all() else np.nanmean(w) for w in windows])


def draw_curve(axis, steps: list[float], values: list, tone: str, label: str = "", style: str = "-") -> None:
    """Draw the values, faint, under their running mean. A few points, measured at intervals, are joined as they are."""
    points = [(x, y) for x, y in zip(steps, values) if finite(y) is not None]
    if 2 * len(points) < len(values):
        axis.plot(*zip(*points), style, color=tone, marker=".", label=label)
    elif points:
        axis.plot(steps, [np.nan if finite(v) is None else v for v in values], color=tone, alpha=0.3, linewidth=1)
        axis.plot(steps, smooth(values), style, color=tone, label=label)


def on_policy(records: list[dict]) -> Figure | None:
    """Reward, KL and length of the on-policy runs of a method over their updates."""
    records = [record for record in records if at(record, "curves", "kl")]
    if not records:
        return None
    figure = new_figure(11, 3)
    axes, tones = figure.subplots(1, 3), list(COLOURS.values())[1:] + [INK]
    for i, record in enumerate(records):
        tone, curves = tones[i % len(tones)], record["curves"]
        reward = "scores" if "scores" in curves else "rewards"
        for axis, key in zip(axes, (reward, "kl", "completion_tokens")):
            values = curves.get(key) or []
            draw_curve(axis, list(range(len(values))), values, tone, record["label"])
        if watched := curves.get("watch_scores"):
            draw_curve(axes[0], list(range(len(watched))), watched, tone, f"{record['label']}, watched", "--")
    for axis, title in zip(axes, ("reward, mean of a batch", "KL to the reference, nats", "tokens of an answer")):
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid()
    axes[0].legend(fontsize=9)
    return figure


def overview(lines: list[tuple]) -> dict[str, Figure]:
    """{"overview": figure}, a row per method: the change of its own objective on held-out data, in its own unit, then
    of each endpoint, in points. Small points are seeds, the large one their mean with its 95 % interval, filled where
    it is clear. lines: [(label, row, [(title, changes of the seeds, mean or None, interval or None, clear)])]."""
    if not lines:
        return {}
    columns = len(lines[0][2])
    figure = new_figure(2.5 * columns, 0.7 + 0.95 * len(lines))
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for k in range(1, columns):  # one scale per benchmark
        for i in range(1, len(lines)):
            axes[i][k].sharex(axes[0][k])
    for i, (label, row, cells) in enumerate(lines):
        for k, (title, changes, mean, interval, clear) in enumerate(cells):
            axis, tone = axes[i][k], colour(row)
            axis.axvline(0, color=INK, linewidth=1)
            if mean is None:
                axis.text(0.5, 0.5, "–", transform=axis.transAxes, ha="center", va="center")
            else:
                axis.plot(np.round(interval or (mean, mean), 4), [0, 0], color=tone, solid_capstyle="butt")
                axis.plot(round(mean, 4), 0, "o", color=tone, markersize=8, markerfacecolor=tone if clear else "none")
                if len(changes) > 1:
                    axis.plot(np.round(changes, 4), [-0.55] * len(changes), ".", color=tone, alpha=0.8)
            axis.set_ylim(-1, 0.8)
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
            axis.grid(axis="x")
            axis.tick_params(labelsize=8)
            if k == 0:
                axis.set_title(title, fontsize=8, loc="left")
                axis.set_ylabel(label, rotation=0, ha="right", va="center")
            elif i == 0:
                axis.set_title(title)
            if k and i < len(lines) - 1:
                axis.tick_params(labelbottom=False)
    figure.supxlabel("left: change of the own objective, held out, own units (loss: lower is better); filled: its "
                     "interval excludes 0\nright: points against the own parent, of SFT against base; filled: p < 0.05 "
                     "after Holm", fontsize=9)
    return {"overview": figure}


def sweep_curves(records: list[dict], base_of) -> Figure:
    """A panel per method: the objective against the learning rate, a line per base and other settings."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    figure = new_figure(2.9 * len(methods), 3.1)
    axes, bases = figure.subplots(1, len(methods), squeeze=False)[0], list(dict.fromkeys(map(base_of, records)))
    for axis, method in zip(axes, methods):
        of_method = [r for r in records if r["method"] == method and finite(r["value"]) is not None and r["lr"] > 0]
        curves = {}
        for record in of_method:
            setting = record["setting"] | ({"beta": record["beta"]} if record.get("beta") else {})
            others = ", ".join(f"{k} {v}" for k, v in setting.items() if k != "lr")
            curves.setdefault((base_of(record), others), []).append(record)
        for style, ((base, others), points) in zip(itertools.cycle(("-", "--", ":", "-.")), curves.items()):
            tone = COLOURS.get(method, INK)
            label = ", ".join(filter(None, [base if len(bases) > 1 else "", others])) or base
            rates, values = [p["lr"] for p in points], [round(p["value"], 5) for p in points]
            axis.plot(rates, values, style, color=tone, label=label)
            for point in points:
                if interval := point.get("interval"):
                    axis.plot([point["lr"]] * 2, np.round(interval, 5), color=tone, alpha=0.5, linewidth=1)
                mark = "o" if point.get("admissible", True) else "x"
                axis.plot(point["lr"], round(point["value"], 5), mark, color=tone,
                          markerfacecolor=tone if point.get("chosen") else "none")
        axis.set_xscale("log")
        rates = sorted({r["lr"] for r in of_method})
        axis.set_xticks(rates, [f"{rate:.0e}".replace("e-0", "e-") for rate in rates], fontsize=8)
        axis.set_xticks([], minor=True)
        axis.set_title(f"{method}: {next((r.get('objective') for r in of_method), '')}", fontsize=9)
        axis.set_xlabel("learning rate")
        axis.grid()
        if len(curves) > 1:
            axis.legend(fontsize=7)
    return figure


def speedrun(run: dict, points: list[dict]) -> Figure:
    """pass@1 against minutes, by both extractions; start-up, which the run's own seconds leave out, is shaded."""
    figure = new_figure(7.6, 3.6)
    axis = figure.subplots()
    start = run["command_seconds"] - run["run_seconds"]
    minutes = [(start + point["seconds"]) / 60 for point in points]
    base = 100 * points[0]["flexible_1"]
    axis.axvspan(0, start / 60, color=INK, alpha=0.15, linewidth=0)
    axis.axhline(base, color=INK, linewidth=1)
    axis.axhline(base + 10, color=INK, linewidth=1, linestyle=":")
    for key, style, label in (("flexible_1", "-", "by the last number"), ("pass_1", "--", "by the number after ####")):
        values = [round(100 * point[key], 3) for point in points]
        axis.plot(np.round(minutes, 4), values, style, marker=".", color=COLOURS["grpo"], label=label)
    axis.set_xlim(0)
    axis.set_xlabel("minutes; shaded: start-up")
    axis.set_ylabel("held-out pass@1, %\nsolid: base; dotted: base + 10", fontsize=9)
    axis.legend(fontsize=9, loc="lower right")
    axis.grid()
    return figure


def run_curves(record: dict) -> Figure | None:
    """Small multiples of what a run logged."""
    curves = dict(record.get("curves") or {})
    steps = curves.pop("step", None)
    keys = [key for key, values in curves.items() if key not in UNDRAWN and len({*values} - {None}) > 1]
    if not steps or not keys:
        return None
    columns = min(4, len(keys))
    height = -(-len(keys) // columns)
    figure = new_figure(2.9 * columns, 2 * height)
    axes = figure.subplots(height, columns, squeeze=False).flat
    for axis, key in zip(axes, keys):
        draw_curve(axis, steps, curves[key], colour(record))
        axis.set_title(key)
        axis.grid()
    for axis in axes[len(keys) :]:
        axis.set_axis_off()
    return figure


def curves_svg(record: dict, path: Path) -> bytes | None:
    """run_curves as an SVG; None if there is nothing to draw. Most runs do not change between two reports, and one layout
    takes about 1 s: the file at `path` is returned unchanged if its last line, a comment with two hashes, shows that it
    was drawn from the same curves by this version of plots.py and matplotlib, and not edited since.
    """
    import matplotlib
    key = sha256_json([record.get("curves"), record.get("method"), Path(__file__).read_text(), matplotlib.__version__])

    def stamped(svg: bytes) -> bytes:
        return svg + f"<!-- drawn from {key[:16]}; {hashlib.sha256(svg).hexdigest()[:16]} -->\n".encode()
    before = path.read_bytes() if path.is_file() else b""
    svg = before[:before.rfind(b"<!-- drawn from ")]
    if before and before == stamped(svg):
        return before
    figure = run_curves(record)
    return figure and stamped(encode(figure, "svg"))


def draw(compared: dict, protocols: dict[str, str], records: dict[str, list[dict]]) -> dict[str, Figure]:
    """{name under plots/: figure}, of those that have data."""
    figures = {f"deltas-{protocol}": forest(rows) for (protocol, to), (rows, _) in compared.items() if to == "base"}
    figures["tradeoff"] = tradeoff(compared, protocols)
    figures["winrate-kl"] = winrate_kl(records["judge"], records["guardrails"])
    figures |= {method: on_policy(records[method]) for method in ("ppo", "grpo")}
    return {name: figure for name, figure in figures.items() if figure}


def encode(figure: Figure, kind: str) -> bytes:
    """The bytes of an SVG (the same for the same figure, so that --check can compare) or a PNG."""
    out = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(out, format=kind, dpi=150, transparent=True, metadata=metadata)
    figure.set_layout_engine("none")  # the next kind keeps this one's layout
    return out.getvalue()
