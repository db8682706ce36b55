"""Tables, progress, pictures and the page: in plain text, on a terminal, and as a browser shows it."""

from __future__ import annotations

import fcntl
import html.parser
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from adamfused import machine, report
from adamfused.report import COLOURS, LINESTYLES, MARKERS, Column, Picture, Progress, Table

BENCH = Table(
    "One step, 10,000,000 float32 numbers",
    [
        Column("optimizer", left=True),
        Column("median", "ms"),
        Column("95 % of it", "ms"),
        Column("of copy", "%"),
        Column("agrees", left=True),
    ],
    [
        ["adamfused:AdamW", "12.84", "12.79-12.93", "102", "PASS"],
        ["torch.optim:AdamW[fused=True]", "13.11", "13.02-13.30", "100", "PASS"],
        ["mine:Lion", "9.02", "8.99-9.10", "104", "INVALID: exp_avg is off by 3e-3"],
    ],
    note="Bytes are counted from the dtypes of `state`.",
)


# ---- Tables ------------------------------------------------------------------------------------


def test_text_of_a_table():
    assert BENCH.text() == (
        "One step, 10,000,000 float32 numbers\n"
        "\n"
        "optimizer                      median   95 % of it  of copy  agrees\n"
        "                                   ms           ms        %\n"
        "-----------------------------  ------  -----------  -------  -------------------------------\n"
        "adamfused:AdamW                 12.84  12.79-12.93      102  PASS\n"
        "torch.optim:AdamW[fused=True]   13.11  13.02-13.30      100  PASS\n"
        "mine:Lion                        9.02    8.99-9.10      104  INVALID: exp_avg is off by 3e-3\n"
        "\n"
        "Bytes are counted from the dtypes of `state`."
    )


def test_table_without_units_rows_or_note_has_no_lines_for_them():
    assert Table("Empty", [Column("a"), Column("b")], []).text() == "Empty\n\na  b\n-  -"


def test_row_that_does_not_fit_the_columns_is_refused():
    with pytest.raises(ValueError, match=r"rows: got 1 cells in \['1'\], expected 2"):
        Table("Short", [Column("a"), Column("b")], [["1", "2"], ["1"]])


@pytest.mark.parametrize(
    ("cell", "verdict"),
    [
        ("PASS", "PASS"),
        ("FAIL: 3 ulp", "FAIL"),
        ("INVALID", "INVALID"),
        ("NOT SUPPORTED: no compiler", "NOT SUPPORTED"),
        ("PASSED", ""),
        ("it must not FAIL", ""),
        ("1.02", ""),
    ],
)
def test_verdict_is_the_word_that_a_cell_starts_with(cell, verdict):
    assert report.verdict(cell) == verdict


class Terminal:
    """A terminal `columns` wide: `stream` writes to it, `text` is all that came."""

    def __init__(self, columns):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self.master, False)
        self.stream = os.fdopen(slave, "w", encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stream.close()
        os.close(self.master)

    @property
    def text(self):
        """What was written since it was last asked."""
        self.stream.flush()
        data = b""
        while True:
            try:
                data += os.read(self.master, 1 << 16)
            except BlockingIOError:
                return data.decode().replace("\r\n", "\n")


@pytest.fixture
def colourful(monkeypatch):
    """A terminal that has colours, whatever the tests run in; it returns a function that sets rich's width."""
    pytest.importorskip("rich", reason=report.TOOLS_HINT)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return lambda columns: monkeypatch.setenv("COLUMNS", str(columns))


@pytest.mark.parametrize(("columns", "groups"), [(22, 4), (60, 2), (80, 1), (200, 1)])
def test_on_a_terminal_of_any_width_every_number_stays_whole(colourful, columns, groups):
    colourful(columns)
    with Terminal(columns) as terminal:
        report.show(BENCH, terminal.stream)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.text)
    assert max(map(len, plain.splitlines())) <= max(columns, 24 + len("  12.79-12.93"))
    assert plain.count("optimizer") == groups
    for row in BENCH.rows:
        assert all(number in plain for number in row[1:4])
    if columns == 200:
        assert all(cell in plain for row in BENCH.rows for cell in row)


def test_on_a_terminal_a_verdict_is_coloured_and_in_a_file_it_is_not(colourful, tmp_path):
    colourful(120)
    with Terminal(120) as terminal:
        report.show(BENCH, terminal.stream)
        text = terminal.text
    assert "\x1b[1;32mPASS\x1b[0m" in text
    assert "\x1b[1;31mINVALID\x1b[0m: exp_avg" in text
    with open(tmp_path / "table.txt", "w+", encoding="utf-8") as file:
        report.show(BENCH, file)
        file.seek(0)
        assert file.read() == BENCH.text() + "\n"


def test_without_the_tools_tables_are_plain_and_there_are_no_figures(monkeypatch):
    for name in ("rich", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    with Terminal(120) as terminal:
        report.show(BENCH, terminal.stream)
        assert terminal.text == BENCH.text() + "\n"
    assert report.figure() is None
    assert report.optional("matplotlib") is None


def test_neither_the_tools_nor_jinja2_are_imported_before_they_are_needed():
    script = (
        "import sys, torch; before = set(sys.modules); import adamfused.report;"
        "print({'rich', 'matplotlib', 'jinja2'} & (set(sys.modules) - before))"
    )
    root = Path(report.__file__).parents[1]
    got = subprocess.check_output([sys.executable, "-c", script], cwd=root, text=True)
    assert got == "set()\n"


# ---- Progress ----------------------------------------------------------------------------------


def last_line(text):
    """What a terminal shows in its last line after `text`, in which \\r goes back to the start."""
    shown = ""
    for part in text.rpartition("\n")[2].split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


def test_progress_on_a_terminal_is_one_live_line(monkeypatch):
    with Terminal(100) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with Progress(1200, "bench") as progress:
            first = terminal.text
            time.sleep(0.01)
            progress.advance("torch.optim:AdamW", n=300)
            second = first + terminal.text
            progress.advance("adamfused:AdamW", n=900)
            third = second + terminal.text
        after = third + terminal.text
    assert last_line(first) == f"bench [{'-' * 24}] 0 of 1,200"
    assert re.fullmatch(
        rf"bench \[{'#' * 6}{'-' * 18}\] 300 of 1,200, 0:00:\d\d left  torch.optim:AdamW",
        last_line(second),
    )
    assert last_line(third) == f"bench [{'#' * 24}] 1,200 of 1,200  adamfused:AdamW"
    assert last_line(after) == ""
    assert "\n" not in after


def test_progress_leaves_nothing_behind_when_an_exception_passes(monkeypatch):
    with Terminal(80) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with pytest.raises(KeyboardInterrupt), Progress(3, "parity") as progress:
            progress.advance("AdamW")
            raise KeyboardInterrupt
        assert last_line(terminal.text) == ""


@pytest.mark.parametrize(("columns", "widest"), [(30, 29), (0, 79)])
def test_progress_never_fills_a_line_so_that_it_can_be_taken_back(monkeypatch, columns, widest):
    with Terminal(columns) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with Progress(3, "parity") as progress:
            progress.advance("x" * 200)
        assert max(map(len, terminal.text.split("\r"))) == widest


def test_progress_redraws_at_most_ten_times_a_second_unless_the_name_changes(monkeypatch):
    with Terminal(80) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with Progress(1000, "bench") as progress:
            assert terminal.text.count("\r") == 1
            start = time.monotonic()
            for _ in range(500):
                progress.advance()
            limit = (time.monotonic() - start) / Progress.LIVE_SECONDS + 1
            assert terminal.text.count("\r") <= limit < 500
            progress.advance("next", n=0)
            assert terminal.text.count("\r") == 1


def test_progress_elsewhere_is_a_plain_line_now_and_then(monkeypatch, capsys):
    with Progress(40, "bench") as progress:
        progress.advance("AdamW")
    assert capsys.readouterr().err == ""  # it was done within five seconds
    monkeypatch.setattr(Progress, "PLAIN_SECONDS", 0.05)
    with Progress(40, "bench") as progress:
        for _ in range(12):
            progress.advance("AdamW")
            time.sleep(0.01)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= (time.monotonic() - progress.start) / 0.05
    assert re.fullmatch(r"bench: \d+ of 40, 0:00:0\d left  AdamW", lines[0])


# ---- Colours -----------------------------------------------------------------------------------


def linear(colours):
    """The linear sRGB of colours written as #rrggbb (n, 3)."""
    srgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """The contrast of two colours as WCAG 2 defines it, 1 to 21."""
    low, high = sorted((linear([one, other]) @ [0.2126, 0.7152, 0.0722]).tolist())
    return (high + 0.05) / (low + 0.05)


# What sees no red, no green, no blue: Machado, Oliveira and Fernandes 2009, on linear sRGB, severity 1.
EYES = {
    "all": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def nearest(colours, eyes):
    """The least distance of two of the colours, in OKLab (0 to about 1; 0.02 is just seen side by side)."""
    lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    seen = np.clip(linear(colours) @ np.transpose(EYES[eyes]), 0, 1)
    points = np.cbrt(seen @ np.transpose(lms)) @ np.transpose(lab)
    return min(float(np.linalg.norm(a - b)) for a, b in combinations(points, 2))


@pytest.mark.parametrize("paper", ["#ffffff", "#15181c"])
@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_seen_on_light_and_on_dark(colour, paper):
    assert contrast(colour, paper) >= 3  # what WCAG 2.1 asks of graphics
    assert contrast("#ffdd00", "#ffffff") < 3 < contrast("#000000", "#ffffff") == 21


@pytest.mark.parametrize("eyes", EYES)
def test_colours_are_told_apart_by_all_eyes(eyes):
    # Three times what is just seen; twice that for the first four, which most pictures keep to.
    assert nearest(COLOURS, eyes) >= 0.06
    assert nearest(COLOURS[:4], eyes) >= 0.12
    matplotlibs_own = nearest(["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728"], eyes)
    assert (matplotlibs_own < 0.12) == (eyes != "all")


def test_series_do_not_differ_by_colour_alone():
    for each in (COLOURS, MARKERS, LINESTYLES):
        assert len(set(each)) == len(each) >= 8


# ---- Pictures ----------------------------------------------------------------------------------


@pytest.fixture
def drawing():
    """A figure as `bench` draws them; its label holds what HTML must not take for a tag."""
    pytest.importorskip("matplotlib", reason=report.TOOLS_HINT)
    return draw("mine:<b>Lion</b>")


def draw(label):
    figure = report.figure()
    axes = figure.subplots()
    for i in range(4):
        line = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": LINESTYLES[i]}
        axes.plot([1, 2, 3], [1, 2 + i, 3 * i], label=f"{label} {i}", **line)
    axes.axhline(4, color="black", linewidth=1)
    axes.set(title="Time against size", xlabel="numbers in the tensor", ylabel="time, us")
    axes.grid()
    axes.legend()
    return figure


def test_figures_are_no_part_of_pyplot(drawing):
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or drawing.number not in pyplot.get_fignums()
    assert drawing.get_size_inches().tolist() == [5.4, 3.6]


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".PNG", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)  # fmt: skip
def test_save_writes_the_format_of_the_suffix(drawing, tmp_path, suffix, start):
    path = tmp_path / f"picture{suffix}"
    report.save(drawing, path)
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["picture.jpg", "picture", ".png"])
def test_save_refuses_another_suffix(drawing, tmp_path, name):
    path = tmp_path / name
    with pytest.raises(ValueError, match=r"path: got '.*', expected .* \.png, \.svg, \.pdf"):
        report.save(drawing, path)
    assert not path.exists()


def ids(svg):
    return set(re.findall(r'\bid="([^"]+)"', svg))


def test_svg_takes_the_colours_and_the_width_of_its_page(drawing):
    svg = report.svg(drawing)
    assert svg.startswith("<svg ") and svg.endswith("</svg>")
    assert re.match(r'<svg viewBox="0 0 388.8 259.2" style="[^"]*width: 100%; height: auto', svg)
    assert "currentColor" in svg and "var(--paper" in svg
    assert not re.search(r"#([0-9a-f]{2})\1\1\b", svg)  # no grey, black or white is left
    assert set(re.findall(r"#[0-9a-f]{6}\b(?!-)", svg)) == set(COLOURS[:4])


def test_svg_refers_to_nothing_outside_itself(drawing):
    svg = report.svg(drawing)
    assert "http" not in svg and "<style" not in svg
    referred = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    assert referred and referred <= ids(svg)


def test_svg_keeps_text_as_text(drawing):
    svg = report.svg(drawing)
    assert ">mine:&lt;b&gt;Lion&lt;/b&gt; 0</text>" in svg
    assert "font-family" not in svg


def test_svg_is_the_same_each_time_and_shares_no_id_with_another(drawing):
    assert report.svg(drawing) == report.svg(draw("mine:<b>Lion</b>"))
    other = report.svg(draw("another"))
    assert ids(other) and not ids(other) & ids(report.svg(drawing))


def test_all_of_that_matplotlib_does_not_do_by_itself(drawing, tmp_path):
    """The negative control of the tests above."""
    texts = []
    for figure in (drawing, draw("another")):
        report.save(figure, tmp_path / "picture.svg")
        texts.append((tmp_path / "picture.svg").read_text(encoding="utf-8"))
    assert "http" in texts[0] and "<style" in texts[0] and "#000000" in texts[0]
    assert "</text>" not in texts[0]
    assert ids(texts[0]) & ids(texts[1])


# ---- The page ----------------------------------------------------------------------------------

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"'"


class Reader(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.attributes = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def nasty_page():
    table = Table(NASTY, [Column(NASTY, NASTY, left=True)], [[NASTY]], note=NASTY)
    return report.page(NASTY, NASTY, {NASTY: [NASTY]}, [table, NASTY], NASTY)


def test_page_escapes_all_that_it_is_given():
    reader = Reader(nasty_page())
    assert not {"script", "img"} & set(reader.tags)
    # title twice; lead; name and value of a fact; title, column, unit, cell and note of the table; text; command
    assert reader.text.count(NASTY) == 12
    assert {"script", "img"} <= set(Reader(f"<p>{NASTY}</p>").tags)


def test_page_escapes_captions_and_alternative_texts(drawing):
    reader = Reader(report.page("t", "l", {}, [Picture(drawing, NASTY, NASTY)], "c"))
    assert not {"script", "img"} & set(reader.tags)
    assert reader.text.count(NASTY) == 1
    assert ("div", {"role": "img", "aria-label": NASTY}) in reader.attributes


def test_page_says_what_readers_and_machines_ask_of_it():
    facts = {**machine.facts(), "gpus": [], "cuda": None, "isa": ["avx2", "fma"]}
    text = "Set `ADAMFUSED_ISA` to `scalar`."
    reader = Reader(
        report.page("Title", "Lead.", facts, [BENCH, text], "python -m adamfused bench")
    )
    assert ("html", {"lang": "en"}) in reader.attributes
    assert ("meta", {"charset": "utf-8"}) in reader.attributes
    assert any(attributes.get("name") == "viewport" for _, attributes in reader.attributes)
    heads = [attributes["scope"] for tag, attributes in reader.attributes if tag == "th"]
    assert heads == ["col"] * 5 + ["row"] * 3
    assert reader.tags.count("code") == 4  # one in the note, two in the text, the command
    assert "Set ADAMFUSED_ISA to scalar." in reader.text
    assert "gpusnone" in reader.text and "isaavx2, fma" in reader.text
    assert facts["command"] not in reader.text and "python -m adamfused bench" in reader.text
    assert ("b", {"class": "good"}) in reader.attributes
    ids = [attributes["id"] for _, attributes in reader.attributes if "id" in attributes]
    assert len(set(ids)) == len(ids)


# ---- The page in a browser ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A page with all that there is, with long names and a table that is wider than a phone."""
    pytest.importorskip("matplotlib", reason=report.TOOLS_HINT)
    parity = Table(
        "Parity: torch.optim:AdamW[fused=True] against its oracle",
        [Column("check", left=True), Column("worst", "ulp"), Column("result", left=True)],
        [
            ["first step", "1", "PASS"],
            ["bfloat16 parameters", "128", "FAIL: rounded twice"],
            ["sparse gradients", "", "NOT SUPPORTED: refused"],
        ],
    )
    pictures = [Picture(draw(f"series {i} of"), f"Picture {i}.", "Four lines.") for i in range(3)]
    command = f"python -m adamfused bench --optimizers {'torch.optim:AdamW[fused=True],' * 5}"
    lead = "Each takes steps on the same parameters, in turns; `ratio` is to the first."
    blocks = [BENCH, *pictures, "The machine was quiet.", parity]
    facts = {**machine.facts(), "isa": f"none: /{'folder' * 20}/_C.so"}
    page = report.page("Steps of AdamW, measured", lead, facts, blocks, command)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_in_a_browser(browser, sample, width, dark):
    view = browser.view(sample, width, dark)
    assert (view.width, view.dark) == (width, dark)
    assert not view.sideways
    assert view.errors == []
    assert view.requests == []
    assert {"PASS", "FAIL", "NOT SUPPORTED", "How to repeat"} <= {
        text["text"] for text in view.texts
    }
    assert [text for text in view.texts if text["contrast"] < 4.5] == []
    assert [text for text in view.texts if text["pixels"] < 9] == []


def test_wide_tables_scroll_in_their_own_box(browser, sample):
    wide = "[...document.querySelectorAll('.scroll')].map(box => box.scrollWidth > box.clientWidth)"
    browser.view(sample, 400, dark=False)
    assert browser.evaluate(wide) == [True, False]
    browser.view(sample, 1280, dark=False)
    assert browser.evaluate(wide) == [False, False]


def test_screenshot_is_of_the_whole_page(browser, sample, tmp_path):
    browser.view(sample, 400, dark=False, screenshot=tmp_path / "page.png")
    width, height = struct.unpack(">II", (tmp_path / "page.png").read_bytes()[16:24])
    assert width == 400
    assert height == browser.evaluate("document.scrollingElement.scrollHeight") > 800


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<script>nothing.there()</script>", "errors"),
        ("<script>console.error('no')</script>", "errors"),
        ("<img src='http://127.0.0.1:9/x.png' alt='x'>", "requests"),
        ("<div style='width: 900px'>wide</div>", "sideways"),
        ("<p style='color: #999'>pale</p>", "contrast"),
        ("<p style='opacity: 0.5'>pale</p>", "contrast"),
        ("<svg viewBox='0 0 9 9'><text style='fill: #ccc; font-size: 3px'>pale</text></svg>", "contrast"),
        ("<p style='font-size: 8px'>small</p>", "pixels"),
        ("<svg viewBox='0 0 999 9'><text y='9' style='font-size: 10px'>small</text></svg>", "pixels"),
        ("<p>nothing is wrong</p>", None),
    ],
)  # fmt: skip
def test_browser_finds_what_is_wrong_with_a_page(browser, tmp_path, body, fault):
    path = tmp_path / "wrong.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{body}", encoding="utf-8")
    view = browser.view(path, 400, dark=False)
    found = {
        "errors": bool(view.errors),
        "requests": bool(view.requests),
        "sideways": view.sideways,
        "contrast": any(text["contrast"] < 4.5 for text in view.texts),
        "pixels": any(text["pixels"] < 9 for text in view.texts),
    }
    if fault == "requests":
        assert view.requests == ["http://127.0.0.1:9/x.png"]
        del found["errors"]  # that nobody answers is an error as well
    assert {name for name, is_so in found.items() if is_so} == ({fault} if fault else set())
