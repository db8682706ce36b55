"""How Sphinx builds the site: `make docs`. The pages are the Markdown files of the repository, where they lie.

Nothing here needs the network, neither to build nor to read: formulas are MathML, and nothing links to other projects'
inventories.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml import converter
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import adamfused  # noqa: E402  # of this tree

CONTENTS: dict[str, list[str]] = {
    "Use": ["docs/one_pass", "docs/storage", "docs/testing_an_optimizer", "docs/api"],
    "Optimizers": [
        "docs/optimizers/README",
        *sorted(
            f"docs/optimizers/{page.stem}"
            for page in (ROOT / "docs" / "optimizers").glob("[a-z]*.md")
        ),
    ],
    "Develop": ["CONTRIBUTING", "docs/adding_an_optimizer", "CHANGELOG"],
    "Studies": [
        "docs/int8",
        "docs/cuda",
        "docs/parity_report",
        "docs/parity_others",
        "benchmarks/README",
    ],
}

# ---- What Sphinx reads -------------------------------------------------------------------------

project = "adamfused"
release = version = adamfused.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"  # the repository is the source folder, so that links hold here and on GitHub
include_patterns = ["README.md", *(f"{page}.md" for pages in CONTENTS.values() for page in pages)]
exclude_patterns = [".*", "build", "dist", "gpu-check"]
nitpicky = True
nitpick_ignore_regex = [  # other projects', aliases and what is inside
    ("py:.*", r"(collections|dataclasses|inspect|json|pathlib|torch|types|typing)\..*"),
    ("py:.*", r"(Optimizer|Tensor|json|StateDtype|EmaDecay|FEATURES|CONFIDENCE|FEWEST)"),
    ("py:.*", r"adamfused\.(base\.BaseOptimizer|bench\.turns\.Turn|machine\.others_running)"),
]
highlight_language = "none"

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

autodoc_default_options = {
    "members": True,
    "inherited-members": "Optimizer",
}  # torch's own: not here
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"adamfused {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_show_search_summary = False  # a script would fetch them, which a browser forbids in files


# ---- Formulas ----------------------------------------------------------------------------------


def mathml(latex: str, display: str) -> str:
    """A formula as MathML. Raises ValueError if part of it is not known."""
    latex = re.sub(r"(begin|end)\{aligned\}", r"\1{split}", latex)
    if r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{split}}{latex}\end{{split}}"
    result = converter.convert(latex, display=display)
    if unknown := re.search(r"\\\w*|&(?!\w)", html.unescape(result)):
        raise ValueError(f"{unknown[0]} in the formula {latex}")
    return result


def visit_formula(writer: Any, node: nodes.math | nodes.math_block) -> None:
    block = isinstance(node, nodes.math_block)
    try:
        formula = mathml(node.astext(), "block" if block else "inline")
    except Exception as error:
        logging.getLogger(__name__).warning("no MathML: %s", error, location=node)
        formula = writer.encode(node.astext())
    writer.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


# ---- Contents ----------------------------------------------------------------------------------


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Gives the start page what stands at the side of all pages."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")  # the line that ends a doctest
    if docname == root_doc:
        for caption, pages in CONTENTS.items():
            source[0] += "\n".join(
                ["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"]
            )


INDEX = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url={page}">
<title>adamfused</title>
<a href="{page}">adamfused</a>
</html>
"""


def add_index(app: Sphinx, exception: Exception | None) -> None:
    """A start page by the name that servers and readers look for."""
    (Path(app.outdir) / "index.html").write_text(INDEX.format(page=f"{root_doc}.html"))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_formula, None), (visit_formula, None))
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
