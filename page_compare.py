"""Compare two runs on the outputs that both have answered, in one page.

A difference stands beside its 95 % interval: a bootstrap over whole tasks of the differences on the same outputs, as
scoring draws them. Imports run_record, page_facts, report_page and the page's parts. Used by report_command.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from config import ConfigError, all_settings, flag_of
from intervals import bootstrap_interval
from page_facts import Facts
from page_outputs import name_of
from page_parts import (
    DASH,
    Curve,
    Line,
    counted,
    curve_svg,
    error_map,
    esc,
    fixed,
    grid_image,
    image,
    marks_png,
    signed,
    table,
    whole_page,
)
from report import write_text_atomic
from report_page import section_problems, series
from run_record import Output, RunRecord, shape_of

SHOWN = 40  # outputs that only one of the two has right

Pair = tuple[Output, Output]


@dataclass(frozen=True)
class Difference:
    """What two runs score on the same outputs, the second minus the first, and its 95 % interval; of a mean."""

    label: str
    first: float
    second: float
    low: float
    high: float
    outputs: int

    @property
    def value(self) -> float:
        """Return the second's mean minus the first's."""
        return self.second - self.first


def paired(label: str, pairs: Sequence[Pair], value: Callable[[Output], float | None]) -> Difference:
    """Return the difference of a mean over the outputs for which both runs have a value; nan of none."""
    tasks: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for a, b in pairs:
        both = value(a), value(b)
        if None not in both:
            tasks[a.key[0]].append(both)
    counts = [len(some) for some in tasks.values()]
    total = sum(counts)
    if not total:
        return Difference(label, math.nan, math.nan, math.nan, math.nan, 0)
    means = [math.fsum(both[n] for some in tasks.values() for both in some) / total for n in (0, 1)]
    low, high = bootstrap_interval([math.fsum(b - a for a, b in some) for some in tasks.values()], counts)
    return Difference(label, *means, low, high, total)


def differences(pairs: Sequence[Pair]) -> list[Difference]:
    """Return the differences of all scores."""

    def flag(name: str) -> Callable[[Output], float]:
        return lambda output: float(output.flag(name))

    return [
        paired("outputs exact, one attempt", pairs, flag("exact")),
        paired("outputs exact, two attempts", pairs, flag("two")),
        paired("the planner's own grid exact", pairs, flag("planned")),
        paired("right size", pairs, flag("size")),
        paired("cells over the union of both areas", pairs, lambda o: o.number("cells")),
        paired("cells, true size given", pairs, lambda o: o.number("cells_true")),
        paired("nats per cell, true size given (less is better)", pairs, lambda o: o.number("nats")),
    ]


def same_outputs(first: Facts, second: Facts) -> list[Pair]:
    """Return the outputs that both runs have answered and that have the same target in both.

    Raises: ConfigError when there is none.
    """
    there = {output.key: output for output in second.outputs}
    pairs = [(output, there[output.key]) for output in first.outputs if output.key in there]
    pairs = [(a, b) for a, b in pairs if a.grid("target") == b.grid("target")]
    if not pairs:
        raise ConfigError(
            f"{first.run.name} and {second.run.name} have no outputs in common",
            "both need a validation whose outputs lie in predictions/, on the same tasks",
        )
    return pairs


def write_comparison(first: Path, second: Path, target: Path | None = None) -> tuple[Path, list[Difference]]:
    """Return the path of the page and the differences after writing the page, by default to the first run's folder.

    Raises: ConfigError when the runs have no outputs in common; OSError.
    """
    a, b = Facts(RunRecord.read(first)), Facts(RunRecord.read(second))
    pairs = same_outputs(a, b)
    found = differences(pairs)
    path = (target or first) / f"comparison_with_{b.run.name}.html"
    write_text_atomic(path, comparison_html(a, b, pairs, found))
    return path, found


def comparison_html(a: Facts, b: Facts, pairs: Sequence[Pair], found: Sequence[Difference]) -> str:
    """Return the page that compares two runs."""
    heads = [f"<dt>{letter}</dt><dd><code>{esc(facts.run.name)}</code>, epoch {facts.validation.epoch}</dd>"
             for letter, facts in (("A", a), ("B", b))]  # fmt: skip
    rows = [[esc(d.label), fixed(d.first, 4), fixed(d.second, 4), signed(d.value, 4),
             f"{signed(d.low, 4)} to {signed(d.high, 4)}", str(d.outputs), verdict_of(d)]
            for d in found if d.outputs]  # fmt: skip
    names = ("", "A", "B", "B \u2212 A", "95 % interval", "outputs", "")
    left = [facts.run.name for facts in (a, b) if len(facts.outputs) > len(pairs)]
    more = f" {' and '.join(left)} answered more; only what both answered counts." if left else ""
    said = (
        f"{counted(len(pairs), 'output')} that both have answered.{more} The intervals are of the paired differences,"
        " whole tasks drawn with replacement."
    )
    sections = [
        f'<header><p class="dim">Comparison of two runs</p><h1>{esc(verdict(a, b, found[0]))}</h1>'
        f'<dl class="facts">{"".join(heads)}</dl></header>',
        section_problems(a.run), section_problems(b.run),
        f"<section><h2>Scores</h2><p>{esc(said)}</p>{table(names, rows, 'words')}</section>",
        section_curves(a, b), section_settings(a, b), section_won(a, b, pairs),
    ]  # fmt: skip
    return whole_page(f"{a.run.name} and {b.run.name}", sections, {"epochs": [], "frames": [], "images": []})


def verdict_of(difference: Difference) -> str:
    """Return in a word whether a difference is sure."""
    return "B is higher" if difference.low > 0 else "B is lower" if difference.high < 0 else "not sure"


def verdict(a: Facts, b: Facts, exact: Difference) -> str:
    """Return one sentence on the exact outputs."""
    first, second = (round(share * exact.outputs) for share in (exact.first, exact.second))
    how = {"B is higher": "surely more", "B is lower": "surely fewer", "not sure": "no sure difference"}
    low, high = (signed(100 * value, 1) for value in (exact.low, exact.high))
    return (
        f"{b.run.name} (B) has {second} and {a.run.name} (A) has {first} of {counted(exact.outputs, 'output')} exact:"
        f" {how[verdict_of(exact)]} ({signed(100 * exact.value, 1)} points, 95 % interval {low} to {high})."
    )


def section_curves(a: Facts, b: Facts) -> str:
    """Return the curves of both runs over each other."""
    titles = (("test grids exact", "val_exact", "scored"), ("cells right, true size", "val_cells_true", "scored"),
              ("mean EFE loss", "loss", "epochs"), ("accuracy delta", "val_accuracy_delta", "scored"))  # fmt: skip
    last = max(a.last_step, b.last_step)
    drawn = [
        curve_svg(Curve(title, [Line(series(getattr(a, kind), name), "A"),
                                Line(series(getattr(b, kind), name), "B", "second", "4 2")]), last)
        for title, name, kind in titles
    ]  # fmt: skip
    return f'<section><h2>Curves</h2><div class="curves">{"".join(drawn)}</div></section>'


def section_settings(a: Facts, b: Facts) -> str:
    """Return the settings in which the runs differ."""
    if a.config is None or b.config is None:
        return "<section><h2>Settings</h2><p>The settings of one of the two are not known.</p></section>"
    old, new = ({path: value for path, _, value in all_settings(facts.config)} for facts in (a, b))
    rows = [[f"<code>{esc(flag_of(path))}</code>", esc(old[path]) or DASH, esc(new[path]) or DASH]
            for path in old if old[path] != new[path]]  # fmt: skip
    body = table(("setting", "A", "B"), rows) if rows else "<p>All settings are the same.</p>"
    return f"<section><h2>Settings that differ</h2>{body}</section>"


def section_won(a: Facts, b: Facts, pairs: Sequence[Pair]) -> str:
    """Return the outputs that only one of the runs has exact at the first attempt, as grids."""
    parts = []
    for winner, place in (("B", 1), ("A", 0)):
        won = [pair for pair in pairs if pair[place].flag("exact") and not pair[1 - place].flag("exact")]
        shown = "".join(map(side_by_side, won[:SHOWN]))
        more = f"<p>{len(won) - SHOWN} more are not shown.</p>" if len(won) > SHOWN else ""
        parts.append(f"<h3>Exact in {winner} alone: {len(won)}</h3>{shown}{more}")
    button = '<button type="button" class="js digit" aria-pressed="false">digits</button>'
    return f'<section><h2>Where they differ</h2><div class="tools">{button}</div>{"".join(parts)}</section>'


def side_by_side(pair: Pair) -> str:
    """Return an output as both runs have answered it, folded."""
    a, b = pair
    target = a.grid("target")
    named = ((a.grid("input"), "input"), (target, "target"), (a.grid("first"), "A"), (b.grid("first"), "B"))
    drawn = [grid_image(grid, title, side=96) for grid, title in named if grid]
    for output, title in ((a, "errors of A"), (b, "errors of B")):
        first = output.grid("first")
        if first and target and first != target:
            marks = error_map(first, first, target)
            drawn.append(image(marks_png(marks), *shape_of(marks), title, title, 96, ' data-marks="1"'))
    grids = "".join(drawn)
    return f'<details data-stop=""><summary>{esc(name_of(a))}</summary><div class="grids">{grids}</div></details>'
