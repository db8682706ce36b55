"""What a measurement is shown with: tables, progress, pictures, and one HTML page that holds them all.

Tables and progress need nothing but Python. Colours on a terminal need rich, pictures need matplotlib (`TOOLS_HINT`);
the page needs jinja2, which torch brings.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import io
import itertools
import os
import re
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from xml.etree import ElementTree

TOOLS_HINT = "pip install 'adamfused[tools]'"
SUFFIXES = (".png", ".svg", ".pdf")

# Each has a contrast of 3 or more on white and on the dark paper of a page. The order puts those first that are
# farthest apart for every kind of colour-blindness; tests/test_report.py measures both.
COLOURS: Sequence[str] = (
    *("#688cf8", "#b1440a", "#bf8193", "#80559e", "#d86c01", "#2a7559", "#0c75c8", "#6b9855"),
)
MARKERS: Sequence[str] = ("o", "s", "^", "D", "v", "P", "X", "*")
LINESTYLES: Sequence[Any] = (
    *("-", "--", "-.", ":", (0, (6, 1)), (0, (1, 3)), (0, (6, 1, 1, 1, 1, 1)), (0, (10, 3))),
)

VERDICTS = {"PASS": "good", "FAIL": "bad", "INVALID": "bad", "NOT SUPPORTED": "unsure"}
STYLES = {"good": "bold green", "bad": "bold red", "unsure": "bold yellow"}


def optional(module: str) -> Any:
    """Return the module of that name, or None where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def check_outputs(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Refuse what could not be written, before any time is spent.

    Raises:
        ValueError: naming the flag, its path, and why not.
    """
    for flag in flags:
        path = getattr(args, flag)
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ValueError(f"--{flag} {path}: there is no folder {path.parent}")
        there = path.exists()
        try:
            path.open("a").close()
        except OSError as error:
            raise ValueError(f"--{flag} {path}: it cannot be written: {error.strerror}") from error
        if not there:
            path.unlink()
    if args.plot is not None and args.plot.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--plot {args.plot}: expected a name that ends in {', '.join(SUFFIXES)}")


def verdict(cell: str) -> str:
    """Return the verdict that a cell starts with, one of `VERDICTS`, or "" where there is none."""
    word = re.match(rf"({'|'.join(VERDICTS)})\b", cell)
    return word[0] if word else ""


# ---- Tables ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """What stands above a column: `title`, and `unit` on a line of its own.

    Numbers stand to the right and are never folded. With `left`, the cells are words: they stand to the left and may
    be folded.
    """

    title: str
    unit: str = ""
    left: bool = False


@dataclass
class Table:
    """Cells that are text already, `rows[i][j]` under `columns[j]`; `note` is shown below them.

    Where there are colours, a PASS, FAIL, INVALID or NOT SUPPORTED that a cell starts with has one.

        >>> columns = [Column("optimizer", left=True), Column("step", "us")]
        >>> print(Table("Time", columns, [["AdamW", "12.5"], ["RMSprop", "9.0"]]).text())
        Time
        <BLANKLINE>
        optimizer  step
                     us
        ---------  ----
        AdamW      12.5
        RMSprop     9.0

    Raises:
        ValueError: a row has not one cell a column.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse a row that does not fit the columns."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"rows: got {len(row)} cells in {list(row)!r}, expected {len(self.columns)}. "
                    f"Give one cell for each column of {self.title!r}."
                )

    def text(self) -> str:
        """Return the table as aligned plain text, without blanks or a newline at its end."""
        heads = [[column.title for column in self.columns]]
        if any(column.unit for column in self.columns):
            heads.append([column.unit for column in self.columns])
        widths = [max(map(len, cells)) for cells in zip(*heads, *self.rows, strict=True)]

        def aligned(cells: Sequence[str]) -> str:
            padded = (
                cell.ljust(width) if column.left else cell.rjust(width)
                for cell, column, width in zip(cells, self.columns, widths, strict=True)
            )
            return "  ".join(padded).rstrip()

        rule = "  ".join("-" * width for width in widths)
        lines = [self.title, "", *map(aligned, heads), rule, *map(aligned, self.rows)]
        if self.note:
            width = max(80, len(rule))
            note = textwrap.wrap(self.note, width, break_long_words=False, break_on_hyphens=False)
            lines += ["", *note]
        return "\n".join(lines)


def show(table: Table, file: TextIO | None = None) -> None:
    """Print `table` to `file` (default: standard output), in colour where that is a terminal and rich is here.

    Where the terminal is too narrow, long words are folded; where that is not enough, columns go below one another,
    with the first one again beside them. A number stays whole.
    """
    stream = sys.stdout if file is None else file
    if not stream.isatty() or optional("rich") is None:
        print(table.text(), file=stream)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    console.print(Text(table.title, style="bold"))
    for columns in _beside(table, console.width):
        console.print()
        console.print(_grid(table, columns))
    if table.note:
        console.print()
        console.print(Text(table.note, style="dim"))


def _beside(table: Table, width: int) -> list[list[int]]:
    """Return which columns fit beside one another, the first in each group."""
    folded = 24  # characters that words are left with
    needs = []
    for i, column in enumerate(table.columns):
        longest = max(
            len(text) for text in (column.title, column.unit, *(row[i] for row in table.rows))
        )
        needs.append(min(longest, folded) if column.left else longest)
    groups = [[0]]
    for i in range(1, len(needs)):
        if len(groups[-1]) > 1 and sum(needs[j] + 2 for j in groups[-1]) + needs[i] > width:
            groups.append([0])
        groups[-1].append(i)
    return groups


def _grid(table: Table, columns: Sequence[int]) -> Any:
    """Return some columns of a table as a table of rich's."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown = [table.columns[i] for i in columns]
    units = any(column.unit for column in shown)
    for column in shown:
        # Text, not str: in a str, rich takes the brackets of "AdamW[fused=True]" for markup.
        head = Text(column.title + f"\n{column.unit}" * units)
        justify: Any = "left" if column.left else "right"
        grid.add_column(head, justify=justify, no_wrap=not column.left, overflow="fold")
    for row in table.rows:
        cells = [Text(row[i]) for i in columns]
        for cell in cells:
            if word := verdict(cell.plain):
                cell.stylize(STYLES[VERDICTS[word]], 0, len(word))
        grid.add_row(*cells)
    return grid


# ---- Progress ----------------------------------------------------------------------------------


class Progress:
    """A line on standard error that says how many of `total` steps are done and how long the rest will take.

    On a terminal it is one live line, gone at the end. Elsewhere it is a plain line, at most one every five seconds.
    It draws only when told of a step, from the thread that tells: nothing runs beside what is being measured.

        with Progress(len(cases), "parity") as progress:
            for case in cases:
                check(case)
                progress.advance(case.name)
    """

    LIVE_SECONDS = 0.1
    PLAIN_SECONDS = 5.0

    def __init__(self, total: int, what: str) -> None:
        """Start the clock; `what` names the whole work."""
        self.total, self.what, self.done, self.current = total, what, 0, ""
        self.stream = sys.stderr
        self.live = self.stream.isatty()
        self.width = 0  # of the live line, in characters
        self.start = self.drawn = time.monotonic()

    def __enter__(self) -> Progress:
        """Draw the line where it is live; return itself."""
        if self.live:
            self._draw()
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the live line away."""
        if self.live:
            self.stream.write(f"\r{' ' * self.width}\r")
            self.stream.flush()

    def advance(self, what: str = "", n: int = 1) -> None:
        """Count `n` more steps; `what` names the one in hand, and stays until the next name."""
        renamed = what not in ("", self.current)
        self.current = what or self.current
        self.done += n
        age = time.monotonic() - self.drawn
        if age >= self.LIVE_SECONDS or renamed if self.live else age >= self.PLAIN_SECONDS:
            self._draw()

    def _draw(self) -> None:
        self.drawn = time.monotonic()
        line = f"{self.done:,} of {self.total:,}"
        if 0 < self.done < self.total:
            left = (self.drawn - self.start) / self.done * (self.total - self.done)
            line += f", {datetime.timedelta(seconds=round(left))} left"
        line += f"  {self.current}" if self.current else ""
        if self.live:
            full = 24 * min(self.done, self.total) // max(self.total, 1)
            line = f"{self.what} [{'#' * full}{'-' * (24 - full)}] {line}"
            # A line that wraps cannot be taken back. A terminal that does not tell its width says 0.
            columns = os.get_terminal_size(self.stream.fileno()).columns or 80
            line = line[: columns - 1]
            self.stream.write(f"\r{line.ljust(self.width)}")
            self.width = len(line)
        else:
            self.stream.write(f"{self.what}: {line}\n")
        self.stream.flush()


# ---- Pictures ----------------------------------------------------------------------------------


def figure(width: float = 5.4, height: float = 3.6) -> Any:
    """Return an empty matplotlib Figure of `width` x `height` inches, or None where matplotlib is missing.

    It is no part of pyplot, so nothing has to be closed and no window opens. Draw with what is black, white or grey
    for what is to follow a page's light or dark, and with `COLOURS` for the rest. At the default width, matplotlib's
    own text sizes can be read on a page that is 400 pixels wide; a wider figure has smaller text there.
    """
    if optional("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write `figure` on white to `path`, in the format that its suffix says: one of `SUFFIXES`.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"path: got {os.fspath(path)!r}, expected a name that ends in {', '.join(SUFFIXES)}. "
            "Name a picture of one of these formats."
        )
    figure.savefig(path, dpi=200, facecolor="white")


def svg(figure: Any) -> str:
    """Return `figure` as an <svg> element for an HTML page: as wide as what holds it, its text as text.

    Black becomes the CSS `currentColor`, white becomes `var(--paper)` where the page has that, and grey a mix of the
    two, so that the picture reads in light and dark. It refers to nothing outside itself.
    """
    import matplotlib

    buffer = io.BytesIO()
    # The salt makes the same figure the same text. Without these entries there is no <metadata>.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "adamfused"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = re.sub(b"<style.*?</style>", b"", buffer.getvalue())  # it would hold for the whole page
    # Ids must differ from those of the other pictures of a page.
    prefix = f"f{hashlib.sha256(text).hexdigest()[:8]}-"
    root = ElementTree.fromstring(text)
    for element in root.iter():
        # In HTML, svg needs no namespaces.
        element.tag = element.tag.rpartition("}")[2]
        old = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        if element.tag == "g":  # these ids are names, nothing refers to them
            old.pop("id", None)
        element.attrib = {name: _inline(name, value, prefix) for name, value in old.items()}
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "style": "display: block; width: 100%; height: auto; fill: currentColor; "
        "stroke-linejoin: round; stroke-linecap: butt",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _inline(name: str, value: str, prefix: str) -> str:
    """Return the value that an attribute of matplotlib's SVG has on a page."""
    if name == "id":
        return prefix + value
    if name == "style":
        value = re.sub(r"font-family:[^;]*;?\s*", "", value)
        value = re.sub(r"#([0-9a-f]{2})\1\1(?![0-9a-f])", _grey, value)
    return re.sub(r"^#|(?<=url\(#)", lambda sign: sign[0] + prefix, value)


def _grey(colour: re.Match[str]) -> str:
    """Return the CSS for a grey of matplotlib's: black is the ink, white is the paper."""
    ink = round(100 * (1 - int(colour[1], 16) / 255))
    if ink == 100:
        return "currentColor"
    return f"color-mix(in srgb, currentColor {ink}%, var(--paper, Canvas))"


# ---- The page ----------------------------------------------------------------------------------


@dataclass
class Picture:
    """A matplotlib figure, the sentence below it, and in `alt` what it shows for those who cannot see it."""

    figure: Any
    caption: str
    alt: str


Block = str | Table | Picture


def page(
    title: str, lead: str, facts: Mapping[str, Any], blocks: Sequence[Block], command: str
) -> str:
    """Return a whole HTML page, to be written as UTF-8: it needs no other file, no network and no script.

    Args:
        title: what was measured.
        lead: the paragraph below the title.
        facts: what the figures hold for, as `machine.facts()` gives it; its own "command" is left out.
        blocks: a str is a paragraph, in which text between backticks is code; pictures that follow one another stand
            side by side where there is room.
        command: what makes the page again.

    Everything is escaped, so names may hold any character.
    """
    import jinja2
    from markupsafe import Markup, escape

    def prose(text: str) -> Markup:
        parts = re.split("`([^`]+)`", text)
        code = Markup("<code>{}</code>").format
        return Markup("").join(
            code(part) if i % 2 else escape(part) for i, part in enumerate(parts)
        )

    def cell(text: str, left: bool) -> Markup:
        word = verdict(text)
        rest = str(escape(text[len(word) :]))
        if left:  # A long name is folded between its parts, not in the middle of one. Numbers are not folded.
            rest = re.sub(r"([:,/](?=\S)|\w(?=\[))", r"\1<wbr>", rest)
        return Markup(f'<b class="{VERDICTS[word]}">{word}</b>{rest}' if word else rest)

    def fact(value: Any) -> str:
        words = value if isinstance(value, (list, tuple)) else [value]
        return ", ".join(str(word) for word in words if word is not None) or "none"

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "prose": prose,
        "fact": fact,
        "cell": cell,
        "svg": lambda figure: Markup(svg(figure)),
    }
    template = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=title,
        lead=lead,
        facts={name: value for name, value in facts.items() if name != "command"},
        groups=[(kind.__name__, list(group)) for kind, group in itertools.groupby(blocks, type)],
        command=command,
    )
