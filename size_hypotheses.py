"""What the demonstrations of a task alone say about the size of the test output: a Bayesian mixture of size rules.

A rule is a measure of the input (its sides, a box, a count...) and a step (doubled, as a column...); it pays for every
demonstration that it misses. Imports numpy and grid_hypotheses; used by demo_prior, prior_cache and task_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from grid_hypotheses import NUM_COLORS, Box, Grid, ObjectSet, Scene, Shape

Demonstrations = Sequence[tuple[Grid, Grid]]

MAX_SIDE = 30
ONE_MISS = 5.0  # nats for a demonstration of which one side is wrong
BOTH_MISS = 6.5  # nats for a demonstration of which both sides are wrong
MIXED = -4.0  # log prior of taking rows and columns from two unrelated measures
FREE = 3.5  # nats that sizes without a rule pay for every demonstration
FREE_SCALE = 1.5  # cells over which the probability of such a side falls by a factor e
FREE_UNIFORM = 0.1  # share of such sides that are anything
SIZE_FLOOR = 1e-3  # probability that size_prior leaves out, for sizes that are not listed
MAX_SIZES = 100
MAX_DEMONSTRATIONS = 32  # the first of them; patterns of misses are bits of an integer
ABSENT = -1000  # value of a measure that a grid does not have
MAX_SEPARATOR_BACKGROUND = 0.4  # share of the cells up to which the background colour may separate panels


# 1. Measures of a grid ------------------------------------------------------------------------------------------------


class Measure(NamedTuple):
    """A number of rows and of columns that a grid suggests; the kind (a key of PAIRS or COUNTS) sets its log prior."""

    kind: str
    rows: int
    columns: int


Measures = dict[str, Measure]
Named = Iterator[tuple[str, Measure]]


def measure(scene: Scene) -> Measures:
    """Return the measures of one grid by readable name; names of what is absent, or left open by a tie, are missing.

    Renaming colours renames the measures, mirroring keeps them, transposing swaps their sides - unless Scene breaks a
    tie by reading order: for the background, the colour of an object of several, the owner of a hole.
    """
    found: Measures = {}
    for part in (_color_measures, _foreground_measures, _line_measures, _panel_measures):
        found.update(part(scene))
    for name, objects in zip(("object", "group"), scene.objects, strict=True):
        found.update(_object_counts(name, objects))
        if objects.is_usable:
            found.update(_object_measures(name, objects))
    return found


def _count(kind: str, value: int) -> Measure:
    return Measure(kind, int(value), int(value))


def _box_size(kind: str, box: Box) -> Measure:
    rows, columns = box
    return Measure(kind, rows.stop - rows.start, columns.stop - columns.start)


def _color_measures(scene: Scene) -> Named:
    """Yield numbers of colours, and what each colour covers, by frequency rank and by name."""
    counts, foreground, boxes = scene.counts, scene.by_frequency, scene.color_boxes
    yield "colours", _count("colors", len(scene.colors))
    yield "foreground colours", _count("colors", len(foreground))
    yield "different cell counts", _count("colors", len(set(counts[foreground].tolist())))
    yield "foreground cells", _count("cells", scene.foreground.sum())
    yield "background cells", _count("cells", counts[scene.background])
    rectangles = _largest_rectangles(scene.grid)
    for kind, name, color, is_clear in _named_colors(scene):
        yield f"cells of {name}", _count(f"{kind} cells", counts[color])
        if not is_clear:
            continue
        yield f"box of {name}", _box_size(f"{kind} box", boxes[color])
        if color in rectangles:
            yield f"largest rectangle of {name}", Measure("rectangle", *rectangles[color])
        others = [boxes[other] for other in foreground if other != color]
        if color != scene.background and others:
            yield f"foreground box without {name}", _box_size("partial box", _union(others))


def _named_colors(scene: Scene) -> Iterator[tuple[str, str, int, bool]]:
    """Yield (kind, name, colour, whether the name fits no other colour): frequency ranks, then the colours' numbers."""
    everything = sorted(scene.colors, key=lambda color: -scene.counts[color])
    foreground = scene.by_frequency
    ranks = (
        ("the most common colour", everything, 0),
        ("the rarest colour", everything, -1),
        ("the most common foreground colour", foreground, 0),
        ("the second most common foreground colour", foreground, 1),
        ("the third most common foreground colour", foreground, 2),
        ("the rarest foreground colour", foreground, -1),
        ("the second rarest foreground colour", foreground, -2),
    )
    for name, colors, rank in ranks:
        if -len(colors) <= rank < len(colors):
            counts = scene.counts[colors].tolist()
            yield "ranked", name, colors[rank], counts.count(counts[rank]) == 1
    for color in scene.colors:
        yield "color", f"colour {color}", color, True


def _union(boxes: list[Box]) -> Box:
    """Return the smallest box around some boxes."""
    rows, columns = (
        slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*boxes, strict=True)
    )
    return rows, columns


def _largest_rectangles(grid: Grid) -> dict[int, Shape]:
    """Return height and width of the largest solid rectangle of each colour that has no other as large."""
    height, width = grid.shape
    rows = np.arange(height)[:, None]
    starts = np.concatenate([np.ones((1, width), bool), grid[1:] != grid[:-1]])
    tall = rows - np.maximum.accumulate(np.where(starts, rows, 0)) + 1  # equal cells from above that end in each cell
    heights = np.arange(int(tall.max()) + 1)
    cells = np.where(tall >= heights[:, None, None], grid, -1)  # for each height the cells that end so many
    is_first = np.ones(cells.shape, bool)
    is_first[..., 1:] = cells[..., 1:] != cells[..., :-1]
    first = np.flatnonzero(is_first)
    lengths, colors, wanted = np.diff(first, append=cells.size), cells.ravel()[first], first // grid.size
    widths = np.zeros((len(heights), NUM_COLORS + 1), np.int64)
    np.maximum.at(widths, (wanted, colors), lengths)  # colour -1 goes to the last column
    widths = widths[:, :NUM_COLORS]
    areas = widths * heights[:, None]
    best = areas.argmax(0)
    is_clear = (areas == areas.max(0)).sum(0) == 1
    return {color: (int(best[color]), int(widths[best[color], color])) for color in np.flatnonzero(is_clear).tolist()}


def _foreground_measures(scene: Scene) -> Named:
    """Yield the box of the foreground and in how many lines it lies."""
    if scene.foreground_box is None:
        return
    foreground = scene.foreground
    rows, columns = foreground.sum(1), foreground.sum(0)
    yield "foreground box", _box_size("foreground box", scene.foreground_box)
    yield "lines with foreground", Measure("lines", int((rows > 0).sum()), int((columns > 0).sum()))
    yield "lines full of foreground", Measure("lines", int(foreground.all(1).sum()), int(foreground.all(0).sum()))
    yield "bands of foreground", Measure("lines", len(_run_lengths(rows > 0)), len(_run_lengths(columns > 0)))
    yield "most foreground in a line", Measure("lines", int(columns.max()), int(rows.max()))


def _line_measures(scene: Scene) -> Named:
    """Yield numbers of uniform, changing and different lines, blocks and periods."""
    both = scene.grid, scene.grid.T
    uniform = [int((x == x[:, :1]).all(1).sum()) for x in both]
    changes = [np.flatnonzero((x[1:] != x[:-1]).any(1)) + 1 for x in both]
    yield "uniform lines", Measure("lines", *uniform)
    yield "lines that are not uniform", Measure("lines", *(len(x) - n for x, n in zip(both, uniform, strict=True)))
    yield "lines without repeats", Measure("distinct lines", *(len(c) + 1 for c in changes))
    yield "different lines", Measure("lines", *(len({line.tobytes() for line in x}) for x in both))
    blocks = (len(x) // int(np.gcd.reduce([len(x), *c])) for x, c in zip(both, changes, strict=True))
    yield "blocks of equal cells", Measure("lines", *blocks)
    yield "period", Measure("lines", *(_period(x) for x in both))


def _period(lines: Grid) -> int:
    """Return the least shift of rows that maps the grid on itself, the number of rows if there is none."""
    equal = (lines == lines[0]).all(1)
    for shift in np.flatnonzero(equal[1:]) + 1:
        if (lines[shift:] == lines[:-shift]).all():
            return int(shift)
    return len(lines)


def _panel_measures(scene: Scene) -> Named:
    """Yield one panel, the grid of panels and all panels together, for equal panels or else the fewest unequal ones."""
    runs = _panel_runs(scene)
    if runs is None:
        return
    rows, columns = runs
    yield "panel grid", Measure("panel grid", len(rows), len(columns))
    yield "largest panel", Measure("panel", max(rows), max(columns))
    yield "smallest panel", Measure("panel", min(rows), min(columns))
    yield "panels without separators", Measure("joined panels", sum(rows), sum(columns))
    yield "panels", _count("panels", len(rows) * len(columns))


def _panel_runs(scene: Scene) -> tuple[list[int], list[int]] | None:
    """Return the heights and widths of the panels between full lines of one colour, None if there are no such lines."""
    grid = scene.grid
    is_row, is_column = (grid == grid[:, :1]).all(1), (grid == grid[:1]).all(0)
    found = []
    for color in np.union1d(grid[is_row, 0], grid[0, is_column]).tolist():
        if color == scene.background and scene.counts[color] > MAX_SEPARATOR_BACKGROUND * grid.size:
            continue
        rows = _run_lengths(~(is_row & (grid[:, 0] == color)))
        columns = _run_lengths(~(is_column & (grid[0] == color)))
        if len(rows) * len(columns) > 1:
            is_unequal = len(set(rows)) > 1 or len(set(columns)) > 1
            found.append(((is_unequal, len(rows) * len(columns)), rows, columns))
    best = [(rows, columns) for key, rows, columns in found if key == min(found)[0]]
    return best[0] if best and all(runs == best[0] for runs in best) else None


def _run_lengths(flags: np.ndarray) -> list[int]:
    """Return the lengths of the runs of set entries."""
    padded = np.concatenate([[False], flags, [False]])
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return (edges[1::2] - edges[::2]).tolist()


def _object_counts(name: str, objects: ObjectSet) -> Named:
    """Yield numbers of objects and of their cells."""
    if not objects.count:
        return
    sizes = objects.sizes[1:]
    yield f"{name}s", _count("objects", objects.count)
    yield f"{name}s of one cell", _count("some objects", (sizes == 1).sum())
    yield f"{name}s of several cells", _count("some objects", (sizes > 1).sum())
    yield f"{name}s of the largest size", _count("some objects", (sizes == sizes.max()).sum())
    yield f"cells of the largest {name}", _count("object cells", sizes.max())
    yield f"cells of the smallest {name}", _count("object cells", sizes.min())


def _object_measures(name: str, objects: ObjectSet) -> Named:
    """Yield what the objects' boxes, places and sorts suggest."""
    ends = np.array([[(side.start, side.stop) for side in box] for box in objects.boxes])  # [n, axis, 2]
    yield from _extreme_objects(name, objects, ends)
    yield from _objects_in_line(name, ends)
    yield from _object_sorts(name, objects)


def _extreme_objects(name: str, objects: ObjectSet, ends: np.ndarray) -> Named:
    """Yield the boxes of the objects that are extreme in a trait, and of the largest and smallest frame."""
    sides = ends[..., 1] - ends[..., 0]
    traits, places = _traits(objects, ends, sides), _places(ends)
    extremes = {f"most {trait}": values for trait, values in traits.items()}
    extremes |= {f"least {trait}": -values for trait, values in traits.items()}
    extremes |= {f"the last {place}": values for place, values in places.items()}
    extremes |= {f"the first {place}": -values for place, values in places.items()}
    if name == "group":
        extremes |= {f"most cells of colour {color}": cells for color, cells in _color_cells(objects).items()}
    for trait, best in zip(extremes, _sides_of_best(np.stack(list(extremes.values())), sides), strict=True):
        if best:
            yield f"{name} with {trait}", Measure("object", *best)
    frames = sides[[_is_frame(mask) for mask in objects.masks]]
    if len(frames):
        areas = frames.prod(1)
        for word, best in zip(("largest", "smallest"), _sides_of_best(np.stack([areas, -areas]), frames), strict=True):
            if best:
                yield f"{word} frame among {name}s", Measure("frame", *best)


def _sides_of_best(values: np.ndarray, sides: np.ndarray) -> list[Shape | None]:
    """Return for each of K rows of values [K, n] the sides [n, 2] of the highest, None if it is tied to other sides."""
    is_best = (values == values.max(1, keepdims=True))[..., None]
    low, high = np.where(is_best, sides, MAX_SIDE + 1).min(1), np.where(is_best, sides, 0).max(1)
    return [tuple(a) if a == b else None for a, b in zip(low.tolist(), high.tolist(), strict=True)]


def _traits(objects: ObjectSet, ends: np.ndarray, sides: np.ndarray) -> dict[str, np.ndarray]:
    """Return numbers of every object in whose extreme a task may take interest."""
    sizes, area = objects.sizes[1:], sides.prod(1)
    return {
        "cells": sizes,
        "area": area,
        "height": sides[:, 0],
        "width": sides[:, 1],
        "density": sizes / area,
        "colours in its box": objects.num_box_colors[1:],
        "other cells in its box": objects.others_in_box[1:],
        "copies of its shape": objects.shape_repeats[1:],
        "objects of its colour": objects.color_repeats[1:],
        "mirror symmetry": objects.symmetry[1:],
        "holes": objects.holes[1:],
        "distance from the centre": np.abs(ends.sum(2) - objects.scene.shape).sum(1),
    }


def _places(ends: np.ndarray) -> dict[str, np.ndarray]:
    """Return where the boxes of all objects begin and end."""
    return {
        "top row": ends[:, 0, 0],
        "bottom row": ends[:, 0, 1],
        "left column": ends[:, 1, 0],
        "right column": ends[:, 1, 1],
    }


def _color_cells(objects: ObjectSet) -> dict[int, np.ndarray]:
    """Return how many cells of each colour present every object has."""
    code = objects.labels * NUM_COLORS + objects.scene.grid
    cells = np.bincount(code.ravel(), minlength=NUM_COLORS * (objects.count + 1)).reshape(-1, NUM_COLORS)[1:]
    return {color: cells[:, color] for color in np.flatnonzero(cells.any(0)).tolist()}


def _is_frame(mask: np.ndarray) -> bool:
    """Return whether an object covers the outline of its box, but not its whole inside."""
    return bool(mask[0].all() and mask[-1].all() and mask[:, 0].all() and mask[:, -1].all() and not mask.all())


def _objects_in_line(name: str, ends: np.ndarray) -> Named:
    """Yield extremes and sums of the objects' sides, and the objects put below each other or side by side."""
    sides = ends[..., 1] - ends[..., 0]
    most, least, total, count = sides.max(0).tolist(), sides.min(0).tolist(), sides.sum(0).tolist(), len(ends)
    yield f"largest sides of {name}s", Measure("object sides", *most)
    yield f"smallest sides of {name}s", Measure("object sides", *least)
    starts, stops = ends[..., 0].T.tolist(), ends[..., 1].T.tolist()
    levels = (min(len(set(a)), len(set(b))) for a, b in zip(starts, stops, strict=True))
    yield f"levels of {name}s", Measure("object sides", *levels)
    yield f"summed sides of {name}s", Measure("objects in line", *total)
    yield f"{name}s below each other", Measure("objects in line", total[0], most[1])
    yield f"{name}s side by side", Measure("objects in line", most[0], total[1])
    tall, wide = np.ptp(ends.sum(2), axis=0).tolist()
    if tall == wide:
        return
    # the objects' centres spread along one axis more than along the other
    axis = int(wide > tall)
    for word, along, across in (
        ("{}s in line", total[axis], most[1 - axis]),
        ("{}s in line with gaps", total[axis] + count - 1, most[1 - axis]),
        ("a cell per {}, in line", count, 1),
    ):
        yield word.format(name), Measure("objects in line", *((across, along) if axis else (along, across)))


def _object_sorts(name: str, objects: ObjectSet) -> Named:
    """Yield how many shapes and colours the objects have and how many objects have them."""
    shape_repeats, per_color = objects.shape_repeats[1:], np.bincount(objects.colors[1:])
    yield f"shapes of {name}s", _count("some objects", round((1 / shape_repeats).sum()))
    yield f"colours of {name}s", _count("some objects", (per_color > 0).sum())
    yield f"{name}s of the most frequent shape", _count("some objects", shape_repeats.max())
    yield f"{name}s of the most frequent colour", _count("some objects", per_color.max())
    for color in np.flatnonzero(per_color).tolist():
        yield f"{name}s of colour {color}", _count("colored objects", per_color[color])


# 2. Rules -------------------------------------------------------------------------------------------------------------


def _over(n: np.ndarray, k: int) -> np.ndarray:
    """Return n / k where that is whole, else ABSENT."""
    return np.where(n % k == 0, n // k, ABSENT)


def _root(n: np.ndarray) -> np.ndarray:
    root = np.sqrt(np.maximum(n, 0)).round().astype(np.int64)
    return np.where(root * root == n, root, ABSENT)


class SideStep(NamedTuple):
    """One side of the output from the same side n and the other side m of the input.

    The name is a template in n and m; log priors are those of using the step for both sides and for one of them.
    """

    name: str
    both: float
    one: float
    function: Callable[[np.ndarray, np.ndarray], np.ndarray]


def _side_steps() -> Iterator[SideStep]:
    yield SideStep("{n}", 1.5, 1.0, lambda n, m: n)
    yield SideStep("{m}", -4.0, -4.0, lambda n, m: m)
    for k in range(2, 11):
        prior = -1.0 if k < 4 else -2.0
        yield SideStep(f"{k} {{n}}", prior, -2.5, lambda n, m, k=k: k * n)
        yield SideStep(f"{{n}} / {k}", prior, -1.5, lambda n, m, k=k: _over(n, k))
    yield SideStep("3 {n} / 2", -4.0, -4.0, lambda n, m: _over(3 * n, 2))
    yield SideStep("2 {n} / 3", -4.0, -4.0, lambda n, m: _over(2 * n, 3))
    for d in range(1, 7):
        prior = -2.5 if d < 3 else -3.5
        yield SideStep(f"{{n}} + {d}", prior, -3.0, lambda n, m, d=d: n + d)
        yield SideStep(f"{{n}} - {d}", prior, -3.0, lambda n, m, d=d: n - d)
    for k in (2, 3, 4):
        for d in (-3, -2, -1, 1, 2, 3):
            prior = -3.5 if abs(d) in (1, k - 1) else -5.0
            yield SideStep(f"{k} {{n}} {_signed(d)}", prior, prior, lambda n, m, k=k, d=d: k * n + d)
        yield SideStep(f"({{n}} - 1) / {k}", -4.0, -4.0, lambda n, m, k=k: _over(n - 1, k))
        yield SideStep(f"({{n}} + 1) / {k}", -4.0, -4.0, lambda n, m, k=k: _over(n + 1, k))
    yield SideStep("{n} * {n}", -1.5, -4.0, lambda n, m: n * n)
    yield SideStep("{n} * {m}", -2.5, -4.0, lambda n, m: n * m)
    yield SideStep("{n} + {m}", -4.0, -4.0, lambda n, m: n + m)
    yield SideStep("{n} + {m} - 1", -4.0, -3.0, lambda n, m: n + m - 1)
    for d in (-3, -2, -1, 1, 2, 3):
        yield SideStep(f"{{m}} {_signed(d)}", -5.0, -5.0, lambda n, m, d=d: m + d)
    for k in (2, 3):
        yield SideStep(f"{k} {{m}}", -5.0, -5.0, lambda n, m, k=k: k * m)
        yield SideStep(f"{{m}} / {k}", -5.0, -5.0, lambda n, m, k=k: _over(m, k))
        for d in (-3, -2, -1, 1, 2, 3):
            yield SideStep(f"{k} {{m}} {_signed(d)}", -6.0, -6.0, lambda n, m, k=k, d=d: k * m + d)
    yield SideStep("max({n}, {m})", -4.0, -4.0, np.maximum)
    yield SideStep("min({n}, {m})", -4.0, -4.0, np.minimum)


def _signed(number: int) -> str:
    return f"{'+' if number > 0 else '-'} {abs(number)}"


def _if_side(values: np.ndarray) -> np.ndarray:
    """Return the values with 0 for what is no number of rows or columns."""
    return np.where((values >= 1) & (values <= MAX_SIDE), values, 0)


SIDE_STEPS = tuple(_side_steps())
# What each side step makes of all sides n and m, [T, 31, 31]
_SIDE_VALUES = _if_side(np.stack([step.function(*np.indices((MAX_SIDE + 1,) * 2)) for step in SIDE_STEPS]))
_ONE_NAMES = tuple([step.name.format(n=n, m=m) for step in SIDE_STEPS] for n, m in ("hw", "wh"))
_BOTH_NAMES = tuple(f"{rows} x {columns}" for rows, columns in zip(*_ONE_NAMES, strict=True))
_CONSTANT_NAMES = tuple(f"always {side}" for side in range(1, MAX_SIDE + 1))


class Step(NamedTuple):
    """What a rule makes of a measure, with its log prior."""

    name: str
    log_prior: float
    function: Callable[..., Any]


# Log priors of what a pair (rows a, columns b) is and of what a rule makes of it
PAIRS = {
    "foreground box": -3.0,
    "ranked box": -3.5,
    "color box": -4.5,
    "partial box": -4.5,
    "rectangle": -4.5,
    "lines": -4.5,
    "distinct lines": -2.0,
    "panel": -0.5,
    "panel grid": -0.5,
    "joined panels": -3.5,
    "object": -5.0,
    "object sides": -4.5,
    "frame": -4.5,
    "objects in line": -4.5,
}
PAIR_STEPS = (
    Step("", 0.5, lambda a, b: (a, b)),
    Step("transposed", -1.5, lambda a, b: (b, a)),
    Step("- 2", -0.5, lambda a, b: (a - 2, b - 2)),
    Step("- 1", -2.0, lambda a, b: (a - 1, b - 1)),
    Step("+ 1", -2.0, lambda a, b: (a + 1, b + 1)),
    Step("+ 2", -1.5, lambda a, b: (a + 2, b + 2)),
    Step("x 2", -2.5, lambda a, b: (2 * a, 2 * b)),
    Step("x 3", -3.0, lambda a, b: (3 * a, 3 * b)),
    Step("x 2 + 1", -2.5, lambda a, b: (2 * a + 1, 2 * b + 1)),
    Step("x 2 - 1", -2.5, lambda a, b: (2 * a - 1, 2 * b - 1)),
    Step("/ 2", -2.0, lambda a, b: (_over(a, 2), _over(b, 2))),
    Step("/ 3", -2.5, lambda a, b: (_over(a, 3), _over(b, 3))),
    Step("rows x 2", -3.0, lambda a, b: (2 * a, b)),
    Step("columns x 2", -3.0, lambda a, b: (a, 2 * b)),
    Step("as a column", -2.5, lambda a, b: (a, 1)),
    Step("as a row", -2.5, lambda a, b: (1, b)),
    Step("squared by the larger", -2.5, lambda a, b: (np.maximum(a, b),) * 2),
    Step("squared by the smaller", -2.5, lambda a, b: (np.minimum(a, b),) * 2),
    Step("squared by the product", -2.5, lambda a, b: (a * b,) * 2),
)
# The same for a count s; h and w are the sides of the input
COUNTS = {
    "colors": -3.0,
    "cells": -3.5,
    "ranked cells": -4.5,
    "color cells": -4.5,
    "panels": -4.0,
    "objects": -3.0,
    "some objects": -5.0,
    "colored objects": -5.0,
    "object cells": -3.5,
}
COUNT_STEPS = (
    Step("squared", -0.5, lambda s, h, w: (s, s)),
    Step("as a column", -2.0, lambda s, h, w: (s, 1)),
    Step("as a row", -2.0, lambda s, h, w: (1, s)),
    Step("+ 1, squared", -1.5, lambda s, h, w: (s + 1, s + 1)),
    Step("- 1, squared", -2.5, lambda s, h, w: (s - 1, s - 1)),
    Step("x 2, squared", -2.5, lambda s, h, w: (2 * s, 2 * s)),
    Step("x 2 + 1, squared", -1.5, lambda s, h, w: (2 * s + 1, 2 * s + 1)),
    Step("x 2 - 1, squared", -1.5, lambda s, h, w: (2 * s - 1, 2 * s - 1)),
    Step("root, squared", -2.0, lambda s, h, w: (_root(s),) * 2),
    Step("times the sides", -1.5, lambda s, h, w: (s * h, s * w)),
    Step("- 1, times the sides", -2.0, lambda s, h, w: ((s - 1) * h, (s - 1) * w)),
    Step("times the rows", -2.5, lambda s, h, w: (s * h, w)),
    Step("times the columns", -2.5, lambda s, h, w: (h, s * w)),
    Step("times the larger side", -2.5, lambda s, h, w: (s * np.maximum(h, w),) * 2),
)
CONSTANT = -0.5  # log prior of a size that is the same for all inputs, before that of its two sides
CONSTANT_SIDE = 1.0  # the same for one side alone
_SIDE_PRIOR = -0.8 * np.log(np.arange(1, MAX_SIDE + 1))
_SIDE_PRIOR -= np.log(np.exp(_SIDE_PRIOR).sum())

# Log priors of what one side alone is, joined with any measure of the other side
SIDES = dict.fromkeys((*PAIRS, *COUNTS), -4.0)
SIDES |= {"colors": -1.0, "cells": -2.0, "ranked cells": -2.5, "some objects": -2.5}
MEASURE_SIDE_STEPS = (
    Step("", 0.0, lambda s, n: s),
    Step("+ 1", -1.5, lambda s, n: s + 1),
    Step("- 1", -1.5, lambda s, n: s - 1),
    Step("x 2", -1.5, lambda s, n: 2 * s),
    Step("times the side", -1.0, lambda s, n: s * n),
)


class Known(NamedTuple):
    """Measures that the test input has: M names and kinds and what they are for G inputs, the test input last."""

    names: list[str]
    kinds: list[str]
    values: np.ndarray  # [M, G, 2], ABSENT where an input does not have the measure

    def log_prior(self, kinds: Mapping[str, float]) -> np.ndarray:
        """Return the log priors [M] of the measures' kinds."""
        return np.array([kinds[kind] for kind in self.kinds])


class Inputs(NamedTuple):
    """What the rules see of the demonstrations' inputs and, last, the test input: sides [G, 2], pairs and counts."""

    sides: np.ndarray
    pairs: Known
    counts: Known


def _inputs(demonstrations: Demonstrations, test_input: Grid) -> Inputs:
    grids = [*(a for a, _ in demonstrations), test_input]
    if all(a.shape == b.shape for a, b in demonstrations):
        found: list[Measures] = [{}] * len(grids)  # measures could add next to nothing
    else:
        found = [measure(Scene(grid)) for grid in grids]
    return Inputs(np.array([grid.shape for grid in grids]), _known(found, PAIRS), _known(found, COUNTS))


def _known(found: list[Measures], kinds: Container[str]) -> Known:
    """Return the test input's measures of some kinds."""
    kind_of = {name: item.kind for name, item in found[-1].items() if item.kind in kinds}
    absent = Measure("", ABSENT, ABSENT)
    values = [[measures.get(name, absent)[1:] for measures in found] for name in kind_of]
    shape = len(kind_of), len(found), 2
    return Known(list(kind_of), list(kind_of.values()), np.array(values, np.int64).reshape(shape))


class Block(NamedTuple):
    """Rules made of T steps and M measures: log priors [T, M] and what each gives for G inputs, the test input last.

    Values are [T, M, G, 2], or [T, M, G] for one side alone; what is no size is 0.
    """

    steps: Sequence[str]
    measures: Sequence[str]
    log_prior: np.ndarray
    values: np.ndarray

    def name(self, index: int) -> str:
        """Return the name of the rule at `index` of the flattened block."""
        step, item = divmod(index, len(self.measures))
        return f"{self.measures[item]} {self.steps[step]}".strip()


def joint_rules(inputs: Inputs, outputs: np.ndarray) -> list[Block]:
    """Return the rules that give rows and columns in the same way, for demonstrations with output sizes [D, 2]."""
    sides, pairs, counts = inputs
    rows, columns = sides.T
    blocks = [_constant_sizes(outputs, len(sides)), _sizes_from_sides(sides)]
    if pairs.names:
        blocks.append(_sizes_from(pairs, PAIRS, PAIR_STEPS, (pairs.values[..., 0], pairs.values[..., 1])))
    if counts.names:
        blocks.append(_sizes_from(counts, COUNTS, COUNT_STEPS, (counts.values[..., 0], rows, columns)))
    return blocks


def _constant_sizes(outputs: np.ndarray, num_inputs: int) -> Block:
    """Return the rules that give the size of one demonstration's output, whatever the input."""
    sizes = np.unique(outputs, axis=0)
    names = [f"always {height} x {width}" for height, width in sizes.tolist()]
    log_prior = CONSTANT + _SIDE_PRIOR[sizes - 1].sum(1)
    return Block([""], names, log_prior[None], np.repeat(sizes[None, :, None], num_inputs, 2))


def _sizes_from_sides(sides: np.ndarray) -> Block:
    """Return the rules that make both sides of the output from the input's sides [G, 2] by the same step."""
    log_prior = np.array([[step.both] for step in SIDE_STEPS])
    return Block(_BOTH_NAMES, [""], log_prior, _if_both(_SIDE_VALUES[:, None, sides, sides[:, ::-1]]))


def _sizes_from(known: Known, kinds: Mapping[str, float], steps: Sequence[Step], arguments: tuple) -> Block:
    """Return the rules that make (rows, columns) from measures by steps, functions of `arguments`."""
    values = np.empty((len(steps), *known.values.shape), np.int64)
    for step, value in zip(steps, values, strict=True):
        value[..., 0], value[..., 1] = step.function(*arguments)
    log_prior = np.array([[step.log_prior] for step in steps]) + known.log_prior(kinds)
    return Block([step.name for step in steps], known.names, log_prior, _if_both(_if_side(values)))


def _if_both(values: np.ndarray) -> np.ndarray:
    """Return values [..., 2] with 0 for both where one is 0."""
    return np.where((values > 0).all(-1, keepdims=True), values, 0)


def side_rules(inputs: Inputs, axis: int) -> list[Block]:
    """Return the rules that give the number of rows (axis 0) or columns (1) alone."""
    n, m = inputs.sides[:, axis], inputs.sides[:, 1 - axis]
    log_prior = np.array([[step.one] for step in SIDE_STEPS])
    constants = np.repeat(np.arange(1, MAX_SIDE + 1)[None, :, None], len(n), 2)
    return [
        Block([""], _CONSTANT_NAMES, (CONSTANT_SIDE + _SIDE_PRIOR)[None], constants),
        Block(_ONE_NAMES[axis], [""], log_prior, _SIDE_VALUES[:, None, n, m]),
        *(_sides_from(known, axis, n) for known in (inputs.pairs, inputs.counts) if known.names),
    ]


def _sides_from(known: Known, axis: int, n: np.ndarray) -> Block:
    """Return the rules that make one side, which is n in the inputs, from measures of it."""
    values = np.stack([step.function(known.values[..., axis], n) for step in MEASURE_SIDE_STEPS])
    log_prior = np.array([[step.log_prior] for step in MEASURE_SIDE_STEPS]) + known.log_prior(SIDES)
    return Block([step.name for step in MEASURE_SIDE_STEPS], known.names, log_prior, _if_side(values))


# 3. Mixture -----------------------------------------------------------------------------------------------------------


class Evidence(NamedTuple):
    """Unnormalised weight of each size [30, 30], and log weight and name of the rule of most weight."""

    weights: np.ndarray
    best: tuple[float, str]


def _flat(blocks: list[Block]) -> tuple[np.ndarray, np.ndarray]:
    """Return log priors [K] and values [K, G, ...] of all rules."""
    values = [block.values.reshape(-1, *block.values.shape[2:]) for block in blocks]
    return np.concatenate([block.log_prior.ravel() for block in blocks]), np.concatenate(values)


def _name(blocks: list[Block], index: int) -> str:
    """Return the name of the rule at `index` of the flattened blocks."""
    for block in blocks:
        if index < block.log_prior.size:
            break
        index -= block.log_prior.size
    return block.name(index)


def _joint_evidence(blocks: list[Block], outputs: np.ndarray) -> Evidence:
    """Return what the rules for both sides say, given the demonstrations' output sizes [D, 2]."""
    log_weight, values = _flat(blocks)
    num_wrong = (values[:, :-1] != outputs).sum(-1)
    log_weight = log_weight - ONE_MISS * (num_wrong == 1).sum(1) - BOTH_MISS * (num_wrong == 2).sum(1)
    predicted = values[:, -1]
    index = np.flatnonzero(predicted[:, 0])
    rows, columns = predicted[index].T
    weights = np.bincount((rows - 1) * MAX_SIDE + columns - 1, np.exp(log_weight[index]), MAX_SIDE**2)
    best = index[log_weight[index].argmax()]
    return Evidence(weights.reshape(MAX_SIDE, MAX_SIDE), (float(log_weight[best]), _name(blocks, best)))


class Pattern(NamedTuple):
    """Rules for one side in groups that miss the same demonstrations."""

    misses: np.ndarray  # [groups, D]
    weights: np.ndarray  # [groups, 30], of the side they give
    best_log_prior: np.ndarray  # [groups]
    best_rule: np.ndarray  # [groups], as an index of the flattened blocks


def _patterns(blocks: list[Block], outputs: np.ndarray) -> Pattern:
    """Return the rules for one side, given the demonstrations' outputs' sides [D]."""
    log_prior, values = _flat(blocks)
    index = np.flatnonzero(values[:, -1])
    log_prior, values = log_prior[index], values[index]
    misses = values[:, :-1] != outputs
    code = misses @ (1 << np.arange(len(outputs)))
    _, first, group = np.unique(code, return_index=True, return_inverse=True)
    cell = group * MAX_SIDE + values[:, -1] - 1
    weights = np.bincount(cell, np.exp(log_prior), len(first) * MAX_SIDE).reshape(-1, MAX_SIDE)
    order = np.lexsort((-log_prior, group))
    best = order[np.searchsorted(group[order], np.arange(len(first)))]
    return Pattern(misses[first], weights, log_prior[best], index[best])


def _mixed_evidence(rows: list[Block], columns: list[Block], outputs: np.ndarray) -> Evidence:
    """Return what pairs of rules for one side say."""
    down, across = _patterns(rows, outputs[:, 0]), _patterns(columns, outputs[:, 1])
    both = down.misses.astype(np.float64) @ across.misses.T
    one = down.misses.sum(1)[:, None] + across.misses.sum(1) - 2 * both
    log_weight = MIXED - ONE_MISS * one - BOTH_MISS * both
    weights = down.weights.T @ np.exp(log_weight) @ across.weights
    leading = log_weight + down.best_log_prior[:, None] + across.best_log_prior
    i, j = np.unravel_index(leading.argmax(), leading.shape)
    name = f"rows: {_name(rows, down.best_rule[i])}; columns: {_name(columns, across.best_rule[j])}"
    return Evidence(weights, (float(leading[i, j]), name))


def _free_sides(sides: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Return probabilities [30] of a side that follows no rule: near an output's side or ratio of sides.

    Inputs' sides [D + 1], outputs' sides [D]; without demonstrations the side is near the test input's, the last.
    """
    near = np.concatenate([outputs, outputs * sides[-1] / sides[:-1]]) if len(outputs) else sides
    bumps = np.exp(-np.abs(np.arange(1, MAX_SIDE + 1) - near[:, None]) / FREE_SCALE)
    bumps /= bumps.sum(1, keepdims=True)
    return FREE_UNIFORM / MAX_SIDE + (1 - FREE_UNIFORM) * bumps.mean(0)


def _mixture(demonstrations: Demonstrations, test_input: Grid) -> tuple[np.ndarray, str]:
    """Return probabilities [30, 30] of the sizes and the name of the rule of most weight."""
    demonstrations = demonstrations[:MAX_DEMONSTRATIONS]
    outputs = np.array([b.shape for _, b in demonstrations], np.int64).reshape(-1, 2)
    inputs = _inputs(demonstrations, test_input)
    joint = _joint_evidence(joint_rules(inputs, outputs), outputs)
    mixed = _mixed_evidence(side_rules(inputs, 0), side_rules(inputs, 1), outputs)
    free = np.outer(*(_free_sides(inputs.sides[:, axis], outputs[:, axis]) for axis in (0, 1)))
    free_log_weight = -FREE * len(outputs)
    table = joint.weights + mixed.weights + math.exp(free_log_weight) * free
    return table / table.sum(), max(joint.best, mixed.best, (free_log_weight, "no rule"))[1]


def size_table(demonstrations: Demonstrations, test_input: Grid) -> np.ndarray:
    """Return probabilities [30, 30] of the output having h rows and w columns, at [h - 1, w - 1]."""
    return _mixture(demonstrations, test_input)[0]


def size_prior(demonstrations: Demonstrations, test_input: Grid) -> list[tuple[Shape, float]]:
    """Return ((h, w), probability), best first, all sizes different, probabilities sum to 1.

    Sizes that together have less than SIZE_FLOOR, and all after the first MAX_SIZES, are left out.
    """
    table = size_table(demonstrations, test_input).ravel()
    order = np.argsort(-table.round(12), kind="stable")[:MAX_SIZES]
    total = table[order].cumsum()
    order = order[: int((total < 1 - SIZE_FLOOR).sum()) + 1]
    prob = table[order] / table[order].sum()
    return [((int(k) // MAX_SIDE + 1, int(k) % MAX_SIDE + 1), float(p)) for k, p in zip(order, prob, strict=True)]


def explain_size(demonstrations: Demonstrations, test_input: Grid) -> str:
    """Return the name of the size rule of most weight; "no rule" where sizes that follow none have more.

    Such as "foreground box - 2", "always 3 x 3", "2 h x 2 w" for h rows and w columns, "rows: h; columns: always 1".
    """
    return _mixture(demonstrations, test_input)[1]


def size_rule(demonstrations: Demonstrations, test_input: Grid) -> tuple[str, Shape | None]:
    """Return the first simple rule that all demonstrations obey and the size it gives: ("none", None) if there is none.

    Rules in order: "same" as the input, constant "ratio" per axis (integer or fraction, giving whole sides up to 30),
    "constant" output size.
    """
    if not demonstrations:
        return "none", None
    height, width = test_input.shape
    if all(a.shape == b.shape for a, b in demonstrations):
        return "same", (height, width)
    ratios = {(Fraction(b.shape[0], a.shape[0]), Fraction(b.shape[1], a.shape[1])) for a, b in demonstrations}
    if len(ratios) == 1:
        rows, columns = ratios.pop()
        rows, columns = rows * height, columns * width
        if rows.denominator == columns.denominator == 1 and max(rows, columns) <= MAX_SIDE:
            return "ratio", (int(rows), int(columns))
    if len({b.shape for _, b in demonstrations}) == 1:
        return "constant", demonstrations[0][1].shape
    return "none", None
