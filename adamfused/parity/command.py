"""``python -m adamfused parity``: runs the cases, and shows what they said as tables, pictures, JSON, a page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import report as show
from ..report import Column, Picture, Table
from ..spec import FAMILIES, Spec, parse_list
from . import Report, parity
from .lab import CASES
from .run import REFUSED, Result, choose, dtype_of
from .walk import ULP_EDGES

HELP = "compare an optimizer's numbers with float64, and try what breaks optimizers"
OK, FAILED, UNUSABLE = 0, 1, 2  # exit codes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "--candidate",
        default="",
        metavar="SPEC,...",
        help="what to test: module:Class or dir/file.py:Class, with options in brackets, such as "
        "torch.optim:AdamW[fused=True]; several with commas between",
    )
    parser.add_argument(
        "--against",
        default="float64",
        help="float64 (default), reference (adamfused's pure-Python path) or another optimizer",
    )
    parser.add_argument(
        "--cases",
        default="quick",
        help="quick (default), full, hostile, or names of cases with commas between",
    )
    parser.add_argument("--dtype", default="float32", help="of the parameters (float32)")
    parser.add_argument("--device", default="cpu", help="of the parameters (cpu)")
    parser.add_argument("--steps", type=int, default=10_000, help="of the longest free run (10000)")
    parser.add_argument("--family", choices=FAMILIES, help="where the class's name does not tell")
    parser.add_argument(
        "--same-bits",
        action="store_true",
        help="with --against an optimizer: all bits of the parameters",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds that a case may take (120)",
    )
    parser.add_argument("--list", action="store_true", help="say what all cases are, run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with all results")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the same for a repository")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw errors in ulps and drift (png, svg or pdf)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code: 1 if a case failed, 2 if nothing could be run."""
    if args.list:
        columns = [Column(name, left=True) for name in ("case", "sets", "what is tested")]
        rows = [[case.name, ", ".join(case.sets), case.about] for case in CASES.values()]
        show.show(Table("Cases", columns, rows))
        return OK
    try:
        show.check_outputs(args, ("json", "html", "markdown", "plot"))
        specs = [_of_a_family(spec, args.family) for spec in parse_list(args.candidate)]
        families = [spec.family or "" for spec in specs]
        cases = [choose(args.cases, family, dtype_of(args.dtype)) for family in families]
        reports = _run_all(args, specs, sum(map(len, cases)))
        for one in reports:
            show.show(table(one))
            for line in complaints(one):
                print(line)
            print()
        if len(reports) > 1:
            show.show(side_by_side(reports))
        _write(args, reports)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    return OK if all(one.passed for one in reports) else FAILED


def _of_a_family(spec: Spec, family: str | None) -> Spec:
    spec = Spec.of(spec, family=spec.family or family)
    if spec.family is None:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"the rule of {spec} is not known from its name; say --family, one of {known}"
        )
    return spec


def _run_all(args: argparse.Namespace, specs: Sequence[Spec], total: int) -> list[Report]:
    with show.Progress(total, "parity") as progress:
        return [
            parity(
                spec.name,
                against=args.against,
                family=spec.family,
                cases=args.cases,
                dtype=args.dtype,
                device=args.device,
                steps=args.steps,
                same_bits=args.same_bits,
                seconds=args.timeout,
                progress=lambda result: progress.advance(result.case),
            )
            for spec in specs
        ]


def _write(args: argparse.Namespace, reports: Sequence[Report]) -> None:
    if args.json:
        text = json.dumps([one.to_json() for one in reports], indent=1, allow_nan=False)
        args.json.write_text(text + "\n")
    pictures = drawings(reports) if args.html or args.plot else []
    if args.html:
        args.html.write_text(page(reports, pictures), encoding="utf-8")
    names = [_picture_name(args.plot, k) for k in range(len(pictures))] if args.plot else []
    if args.markdown:
        shown = [(name.name, p.alt) for name, p in zip(names, pictures, strict=False)]
        args.markdown.write_text(markdown(reports, shown), encoding="utf-8")
    if args.plot and not pictures:
        print(f"No picture: nothing to draw, or matplotlib is not here ({show.TOOLS_HINT}).")
    for name, picture in zip(names, pictures, strict=False):
        show.save(picture.figure, name)
        print(f"{picture.caption}: {name}")


def _picture_name(plot: Path, k: int) -> Path:
    return plot.with_stem(plot.stem + "-drift") if k else plot


# ---- tables --------------------------------------------------------------------------------------


def number(x: float | None, form: str = ".3g") -> str:
    """A number for a table; a dash where there is none."""
    return "-" if x is None else "> 1e299" if x >= 1e299 else format(x, form)


def table(one: Report) -> Table:
    """What each case said of one optimizer."""
    twin = one.against != "float64"
    columns = [
        Column("case", left=True),
        Column("verdict", left=True),
        Column("worst error", "of the bound"),
        Column("equal bits" if twin else "right bits", "%"),
        Column("time", "s"),
    ]
    rows = [
        [
            r.case,
            r.verdict,
            number(r.ratio),
            "-" if r.nearest is None else f"{100 * r.nearest:.2f}",
            f"{r.seconds:.2f}",
        ]
        for r in one.results
    ]
    title = f"{one.candidate} against {one.against}, {one.family}, {one.dtype} on {one.device}"
    note = f"{one.summary()}. Worst error: the largest of any element, part and step, over what rounding allows. "
    note += (
        "Equal bits: parameters that have the other's bits."
        if twin
        else "Right bits: parameters that are the correctly rounded ones."
    )
    return Table(title, columns, rows, note)


def complaints(one: Report) -> list[str]:
    """A line for every case that did not simply pass."""
    told = [r for r in one.results if r.detail]
    return [f"\n{r.verdict} {r.case} ({r.about}): {r.detail}" for r in told]


def side_by_side(reports: Sequence[Report]) -> Table:
    """The verdicts of several optimizers."""
    names = list(dict.fromkeys(r.case for one in reports for r in one.results))
    by_case = [{r.case: r for r in one.results} for one in reports]
    rows = [[name, *(_short(results.get(name)) for results in by_case)] for name in names]
    rows.append(["sum", *(one.summary() for one in reports)])
    columns = [Column("case", left=True), *(Column(one.candidate, left=True) for one in reports)]
    return Table("Side by side", columns, rows)


def _short(result: Result | None) -> str:
    if result is None:
        return "-"
    much = f" {number(result.ratio, '.2g')}" if result.ratio and result.verdict != REFUSED else ""
    return result.verdict + much


# ---- pictures ------------------------------------------------------------------------------------


def drawings(reports: Sequence[Report]) -> list[Picture]:
    """A histogram of the parameters' errors, and the drift of all candidates; none without matplotlib."""
    makers = (_histogram, _drift)
    return [picture for make in makers if (picture := make(reports)) is not None]


def _histogram(reports: Sequence[Report]) -> Picture | None:
    labels = [f"≤ {edge:g}" for edge in ULP_EDGES] + [f"> {ULP_EDGES[-1]:g}"]
    sums = {}
    for one in reports:
        counts = [r.ulps for r in one.results if r.ulps]
        if counts:
            totals = [sum(column) for column in zip(*counts, strict=True)]
            sums[one.candidate] = [100 * n / max(1, sum(totals)) for n in totals]
    figure = _figure(len(sums))
    if figure is None:
        return None
    axes = figure.subplots()
    width = 0.8 / len(sums)
    for k, (name, shares) in enumerate(sums.items()):
        places = [i + (k - (len(sums) - 1) / 2) * width for i in range(len(shares))]
        style = {"color": show.COLOURS[k % 8], "hatch": "////" if k >= 8 else "", "ec": "white"}
        axes.bar(places, shares, width, label=name, lw=0, **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(labels)), labels, rotation=45)
    axes.set(xlabel="error of a parameter after one step, ulps", ylabel="share of results, %")
    figure.legend(loc="outside upper left")
    caption = "Errors of single steps in units in the last place; up to 0.5 is correctly rounded"
    first = {name: shares[0] for name, shares in sums.items()}
    return Picture(figure, caption, f"Correctly rounded results: {_extremes(first, '.1f', ' %')}")


def _drift(reports: Sequence[Report]) -> Picture | None:
    found = {(one.candidate, r.case): r.curve for one in reports for r in one.results if r.curve}
    curves = {key: curve for key, curve in found.items() if key[1].startswith("long")} or found
    names = list(dict.fromkeys(name for name, _ in curves))
    figure = _figure(len(names))
    if figure is None:
        return None
    axes = figure.subplots()
    for (name, case), curve in curves.items():
        k, one_way = names.index(name), case.endswith("one_way")
        axes.plot(
            list(curve),
            [error for error, _ in curve.values()],
            color=show.COLOURS[k % 8],
            marker=show.MARKERS[k % 8],
            markerfacecolor="white" if k >= 8 else show.COLOURS[k % 8],
            linestyle="--" if one_way else "-",
            label=None if one_way else name,
        )
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="error / way gone, rms")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left")
    caption = "Drift of the parameters, free running; gradients of mean 0, and of mean 1 (dashed)"
    last = {name: curve[max(curve)][0] for (name, _), curve in curves.items()}
    return Picture(figure, caption, f"Drift at the end: {_extremes(last, '.2g', ' of the way')}")


def _figure(names: int) -> Any:
    """A figure with room for a legend of so many names; ``None`` for none of them, or without matplotlib."""
    return show.figure(height=3.2 + 0.22 * names) if names else None


def _extremes(values: dict[str, float], form: str, unit: str) -> str:
    ordered = sorted(values, key=values.__getitem__)
    ends = dict.fromkeys((ordered[0], ordered[-1]))
    return "; ".join(f"{name} {values[name]:{form}}{unit}" for name in ends)


# ---- pages ---------------------------------------------------------------------------------------


def lead(reports: Sequence[Report]) -> str:
    """What was compared, and how, in one paragraph."""
    one = reports[0]
    return (
        f"Every step of {len(reports)} optimizer{'s' if len(reports) > 1 else ''} compared with {one.against}, element "
        f"by element, {one.dtype} parameters on {one.device}, cases: {one.cases}. FAIL says what is wrong with a "
        "number; NOT SUPPORTED is a clean refusal. The number behind a verdict is the largest error of any element "
        "over what rounding allows."
    )


def command(reports: Sequence[Report]) -> str:
    """What makes the reports again."""
    one = reports[0]
    names = ",".join(r.candidate for r in reports)
    text = f"python -m adamfused parity --candidate '{names}' --cases {one.cases}"
    options = {"against": "float64", "dtype": "float32", "device": "cpu", "steps": 10_000}
    for name, default in options.items():
        if getattr(one, name) != default:
            text += f" --{name} '{getattr(one, name)}'"
    told = {r.family for r in reports if r.family.lower() not in r.candidate.lower()}
    for family in told:  # one, for all whose name does not tell
        text += f" --family {family}"
    return text + " --same-bits" * one.same_bits


def page(reports: Sequence[Report], pictures: Sequence[Picture]) -> str:
    """The HTML page."""
    blocks: list[Any] = [*pictures]
    if show.optional("matplotlib") is None:
        blocks = [f"No pictures: matplotlib is not here (`{show.TOOLS_HINT}`)."]
    blocks += [side_by_side(reports)] if len(reports) > 1 else []
    for one in reports:
        blocks += [table(one), *(line.strip() for line in complaints(one))]
    title = "Numerical parity of " + ", ".join(one.candidate for one in reports)
    return show.page(title, lead(reports), reports[0].facts, blocks, command(reports))


def markdown(reports: Sequence[Report], pictures: Sequence[tuple[str, str]] = ()) -> str:
    """The same as a page of a repository; ``pictures`` are file names with what they show."""
    wide, facts = side_by_side(reports), reports[0].facts
    packages = dict.fromkeys(one.facts["package"] for one in reports)
    about = {r.case: r.about for one in reports for r in one.results}

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    families = ", ".join(dict.fromkeys(one.family for one in reports))
    title = f"# Numerical parity: {families}"
    lines = [title, "", lead(reports), "", "    " + command(reports), ""]
    lines += [f"{facts['cpu']}, {facts['machine']}, {facts['date']}; {', '.join(packages)}.", ""]
    lines += [f"![{alt}]({name})" for name, alt in pictures] + [""] * bool(pictures)
    lines += [row(["case", *(f"`{c.title}`" for c in wide.columns[1:])])]
    lines += ["|" + "---|" * len(wide.columns), *map(row, wide.rows)]
    lines += [
        "",
        "## The cases",
        "",
        "| case | what is tested |",
        "|---|---|",
        *map(row, about.items()),
    ]
    lines += ["", "## What is wrong where", ""]
    for one in reports:
        lines += [f"### `{one.candidate}`", "", f"{one.summary()}.", ""]
        lines += [f"* **{r.case}**: {r.detail}" for r in one.failures] + [""] * bool(one.failures)
    return "\n".join(lines).rstrip() + "\n"
