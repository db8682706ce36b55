"""The documentation as a site: it builds without a warning, needs no network, and can be read."""

from __future__ import annotations

import contextlib
import html.parser
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NEEDED = ("sphinx", "myst_parser", "furo", "latex2mathml")

pytestmark = pytest.mark.skipif(
    not (DOCS / "conf.py").exists(), reason="the documentation is not beside these tests"
)


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"no {', '.join(lacking)}: pip install 'adamfused[docs]'")
    options = ("-q", "-b", "html", "--fail-on-warning", "--keep-going", "--nitpicky")
    command = [sys.executable, "-m", "sphinx", *options, "-c", str(source / "docs")]
    return subprocess.run(
        [*command, "-d", str(out / "doctrees"), str(source), str(out / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site."""
    out = tmp_path_factory.mktemp("site")
    built = build(ROOT, out)
    assert (built.returncode, built.stderr) == (0, "")
    return out / "html"


# ---- Links of the Markdown files, as GitHub follows them ------------------------------------------


def anchors(text: str) -> set[str]:
    """What the headings of a Markdown text are called in links."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", t)) for t in titles)
    return {title.strip().lower().replace(" ", "-") for title in plain}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (
            anchor and anchor not in anchors(target.read_text(encoding="utf-8"))
        ):
            wrong.append(link)
    return wrong


def test_links_between_pages_hold_where_the_pages_lie() -> None:
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "benchmarks" / "README.md"]
    assert {page.name: broken for page in pages if (broken := broken_links(page))} == {}


def test_a_broken_link_is_found(tmp_path) -> None:
    (tmp_path / "other.md").write_text("# A title: `code`, [link](x)\n")
    links = "[a](other.md) [b](other.md#a-title-code-link) [c](#here) [d](none.md) [e](other.md#a)"
    (tmp_path / "page.md").write_text(f"# Here\n{links} `[f](none.md)` [g](https://none/)\n")
    assert broken_links(tmp_path / "page.md") == ["none.md", "other.md#a"]


# ---- The build ------------------------------------------------------------------------------------


class Links(html.parser.HTMLParser):
    """The ids and the links of a page, and the names of the tags that load something."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id"))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if url := values.get("src") or (tag == "link" and values.get("href")):
            self.loaded.append(url)


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site) -> None:
    pages = {page: Links(page) for page in site.rglob("*.html")}
    assert len(pages) >= 15
    wrong = []
    for page, parsed in pages.items():
        assert [url for url in parsed.loaded if re.match(r"(\w+:)?//", url)] == []
        for link in parsed.links:
            path, _, anchor = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            target = (page.parent / unquote(path)).resolve() if path else page
            if not target.exists() or (anchor and anchor not in pages[target].ids):
                wrong.append((page.name, link))
    assert wrong == []


@pytest.mark.slow
def test_every_page_is_in_the_contents_and_those_of_absent_classes_are_not_there(site) -> None:
    import adamfused

    contents = {unquote(link) for link in Links(site / "README.html").links}
    for page in (DOCS / "optimizers").glob("[a-z]*.md"):
        name = page.read_text(encoding="utf-8").partition("\n")[0][2:]
        built = f"docs/optimizers/{page.stem}.html"
        here = name in adamfused.__all__
        assert ((site / built).exists(), built in contents) == (here, here)
        if here:
            text = (site / built).read_text(encoding="utf-8")
            for member in ("", ".step", ".state_dict", ".swap_ema", ".grad_norm"):
                assert f'id="adamfused.{name}{member}"' in text
            assert (
                "register_step_pre_hook" not in text
            )  # torch's own members are torch's to explain
    for page in [*ROOT.glob("*.md"), *DOCS.glob("*.md")]:
        assert (page.stem == "README") or str(
            page.relative_to(ROOT).with_suffix(".html")
        ) in contents


@pytest.mark.slow
def test_what_is_wrong_with_a_page_is_a_warning(tmp_path) -> None:
    """The negative control of the build: as many warnings as there are faults, and each is told."""
    source = tmp_path / "source"
    pages = {p.relative_to(ROOT) for p in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]}
    for page in {*pages, Path("benchmarks/README.md")}:
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        (source / page).write_text("# Title\n")
    (source / "docs" / "conf.py").write_text((DOCS / "conf.py").read_text(encoding="utf-8"))
    (source / "docs" / "static").mkdir()
    for file in (DOCS / "static").iterdir():
        (source / "docs" / "static" / file.name).write_bytes(file.read_bytes())
    (source / "CONTRIBUTING.md").write_text(
        "# Title\n\n[gone](gone.md)\n\n$\\nonsense{x}$\n\n"
        "```{eval-rst}\n:func:`adamfused.nothing`\n\n.. autoclass:: adamfused.Nothing\n```\n"
    )
    built = build(source, tmp_path)
    assert built.returncode == 1
    assert built.stderr.count("WARNING:") == 4, built.stderr
    for fault in ("gone.md", "\\nonsense", "adamfused.nothing", "'Nothing'"):
        assert len(re.findall(rf"WARNING: .*{re.escape(fault)}", built.stderr)) == 1, built.stderr


# ---- The site in a browser ------------------------------------------------------------------------

# Texts that are still LaTeX, and fractions that do not stand one over the other.
FORMULAS = r"""
(() => {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), raw = [];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (/\\[a-zA-Z]+/.test(texts.currentNode.textContent) && !element.closest("code, pre, script"))
      raw.push(texts.currentNode.textContent);
  }
  const box = e => e.getBoundingClientRect();
  const flat = [...document.querySelectorAll("mfrac")].filter(
    f => box(f.children[0]).bottom > box(f.children[1]).top + 1);
  const empty = [...document.querySelectorAll("math")].filter(f => !box(f).width || !box(f).height);
  return [raw, flat.length, empty.length, document.querySelectorAll("math").length];
})()
"""


# Every page at both widths and in both schemes, and those of each kind in all four.
SAMPLE = ("README.html", "docs/api.html", "docs/optimizers/adam.html", "docs/parity_report.html")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_site_in_a_browser(browser, site, width, dark) -> None:
    pages = sorted(site.rglob("*.html")) if dark == (width == 400) else map(site.joinpath, SAMPLE)
    formulas = 0
    for page in pages:
        if page == site / "index.html":
            continue
        view = browser.view(page, width, dark)
        assert (view.width, view.dark, view.sideways) == (width, dark, False), page
        assert (view.errors, view.requests) == ([], []), page
        assert [text for text in view.texts if text["contrast"] < 4.5] == [], page
        assert [text for text in view.texts if text["pixels"] < 9] == [], page
        raw, flat, empty, count = browser.evaluate(FORMULAS)
        assert (raw, flat, empty) == ([], 0, 0), page
        formulas += count
    assert formulas >= 20


@pytest.mark.slow
def test_start_page_is_the_index_and_search_works_offline(browser, site) -> None:
    browser.call("Page.navigate", url=(site / "index.html").as_uri())
    wait_for(browser, "location.pathname.endsWith('/README.html')")
    browser.events.clear()
    browser.call("Page.navigate", url=f"{(site / 'search.html').as_uri()}?q=centered")
    # Results are drawn one after another, in the order of their score.
    wait_for(browser, "!!document.querySelector('#search-results li a[href*=\"rmsprop.html\"]')")
    assert [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"] == []


def wait_for(browser, condition: str) -> None:
    end = time.monotonic() + 30
    while True:
        with contextlib.suppress(RuntimeError):  # the page has just gone
            if browser.evaluate(condition):
                return
        assert time.monotonic() < end, condition
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (r"<p>$\frac{1}{2}$</p>", [[r"$\frac{1}{2}$"], 0, 0, 0]),
        (r"<code>\frac</code>", [[], 0, 0, 0]),
        ("<p><mfrac><mn>1</mn><mn>2</mn></mfrac></p>", [[], 1, 0, 0]),  # no MathML without <math>
        ("<math></math>", [[], 0, 1, 1]),
        ("<math><mfrac><mn>1</mn><mn>2</mn></mfrac></math>", [[], 0, 0, 1]),
    ],
)
def test_formula_that_is_not_drawn_is_found(browser, tmp_path, body, expected) -> None:
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8><body>{body}")
    browser.view(tmp_path / "page.html", 400, dark=False)
    assert browser.evaluate(FORMULAS) == expected
