"""tables.py: how report.py writes a figure in a cell, and a table as markdown and on the terminal."""

import math
import re
import statistics
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from verdicts import Change, at, finite, is_at_floor, score, signed


# ------------------------------------------------------------------ cells


def score_cell(points: float | None, stderr: float | None) -> str:
    return "–" if points is None else f"{points:.1f} ± " + ("?" if stderr is None else f"{stderr:.1f}")


def floor_cell(row: dict, column: str) -> str:
    """The score of a row, marked ° where its interval includes what chance gives."""
    return score_cell(*score(row, column)) + "°" * is_at_floor(row, column)


def number(value: object, decimals: int = 3, scale: int = 1) -> str:
    if finite(value) is None:
        return "–"
    text = f"{value:,}" if isinstance(value, int) and scale == 1 else f"{scale * value:z,.{decimals}f}"
    return text.replace("-", "−")


def bracket(ends: object, decimals: int = 1, scale: int = 1) -> str:
    """`[54.8, 68.0]`, or `[?]` where no interval was recorded."""
    known = isinstance(ends, list | tuple) and None not in map(finite, ends)
    return f"[{', '.join(number(end, decimals, scale) for end in ends) if known else '?'}]"


def with_interval(point: object, ends: object, decimals: int = 1, scale: int = 1) -> str:
    """`61.5 [54.8, 68.0]`; – where there is no figure."""
    text = number(point, decimals, scale)
    return text if text == "–" else f"{text} {bracket(ends, decimals, scale)}"


def signed_interval(point: object, ends: object, decimals: int = 1, scale: int = 1) -> str:
    """`+12.7 [8.0, 17.3]`, without the brackets where no interval is known."""
    text = "+" * ((finite(point) or 0) > 0) + number(point, decimals, scale)
    return f"{text} {bracket(ends, decimals, scale)}" if ends and text != "–" else text


def share_cell(share: object) -> str:
    """`66.2 [64.0, 68.4]`: {"accuracy", "interval"} in percent."""
    return with_interval(at(share, "accuracy"), at(share, "interval"), 1, 100)


def spread(values: list, scale: int, decimals: int) -> str:
    """Mean ± sd (n − 1) of several seeds; of one, its value."""
    if None in map(finite, values):
        return "–"
    moments = (statistics.fmean(values), statistics.stdev(values)) if len(values) > 1 else values
    return " ± ".join(number(x, decimals, scale) for x in moments)


def delta_cell(points: float | None, stderr: float | None, clear: bool | None, short: bool = False) -> str:
    """`**+5.0 ± 0.7**` beyond noise, `+0.5 ± 0.7 ~` within it, `+0.5 ± ?` if that is unknown; short: without the ±."""
    if points is None:
        return "–"
    text = signed(points)
    if not short:
        text += " ± " + ("?" if stderr is None else f"{stderr:.1f}")
    return {True: f"**{text}**", False: f"{text} ~", None: f"{text} ?" if short else text}[clear]


def p_cell(p: float, at_floor: bool = False) -> str:
    if at_floor:
        return f"p ≤ {math.ceil(1000 * p) / 1000:.3f}"
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def change_cell(change: Change, short: bool = False) -> str:
    """`**+5.0 [3.6, 6.4]**` and the adjusted p of a test in the family, without p where the difference is descriptive,
    and a delta_cell where there is no paired test; short: points only."""
    if change.paired is None:
        return delta_cell(change.points, change.stderr, change.apart, short)
    text = signed(change.points)
    if not short:
        text += f" {bracket(change.paired.interval)}"
    text = (f"**{text}**" if change.clear else text) + " ~" * (change.apart is False)
    return text if short or change.adjusted is None else f"{text}\n{p_cell(change.adjusted, change.paired.at_floor)}"


# ------------------------------------------------------------------ tables


BAD = ("**−", "**worse", "**forgetting", "**regression", "**irreproducible")  # printed in bold, but not a gain


@dataclass(frozen=True)
class Table:
    """`left` text columns, then numbers; rendered as markdown and on the terminal."""

    header: list[str]
    rows: list[list[str]]
    left: int = 1
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [self.header, [":--"] * self.left + ["--:"] * (len(self.header) - self.left), *self.rows]
        cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
        return "\n\n".join(["\n".join(f"| {' | '.join(line)} |" for line in cells), *self.notes])

    def show(self, console: Console) -> None:
        table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, title in enumerate(self.header):
            table.add_column(Text(title), justify="left" if i < self.left else "right")
        for row in self.rows:
            cells = [cell.replace(" ± ", "±").replace(" ~", "~") if console.width < 100 else cell for cell in row]
            table.add_row(*map(paint, cells), style="dim" if "not run" in row else "")
        console.print(table)
        for note in self.notes:
            console.print(Text(re.sub(r"\*\*|`", "", note), style="dim"))


def paint(cell: str) -> Text:
    """A cell in its colour: a clear gain green, a clear loss or a warning red, what is within noise dim."""
    bad = cell.startswith(BAD) or "answers collapsed" in cell
    clear, first = "bold red" if bad else "bold green", cell.split("\n")[0]
    return Text(cell.replace("**", ""), style=clear if "**" in cell else "dim" if first.endswith(("~", "–")) else "")


def markdown(blocks: list[str | Table]) -> str:
    return "\n\n".join(block if isinstance(block, str) else block.markdown() for block in blocks) + "\n"


def show(blocks: list[str | Table]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # a log: rich would fold the tables at 80 columns
        console = Console(highlight=False, width=140)
    for block in filter(None, blocks):
        if isinstance(block, Table):
            block.show(console)
        elif not block.startswith("!["):
            style = "bold" if block.startswith("#") else "bold yellow" if block.startswith("**Trial") else "dim"
            text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", block)  # a link's text
            console.print(Text("\n" + re.sub(r"\*\*|`|^#+ ", "", text), style=style))
