"""The part of a report that shows outputs: how tasks are planned, what was right and wrong, and what is remembered.

Imports run_record, page_facts and the page's parts. Used by page_compare and report_page.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from page_facts import Facts, mean_over_tasks, order_of, share
from page_parts import (
    DASH,
    MARKS,
    PALETTE,
    SIGNS,
    as_dict,
    belief_png,
    counted,
    error_map,
    esc,
    fixed,
    grid_image,
    grid_png,
    image,
    marks_png,
    numeric,
    percent,
    signed,
    table,
)
from run_record import Output, cells_of, is_grid, shape_of, union_cells

ROWS_BYTES = 2_800_000  # of the gallery of all outputs
FRAMES_BYTES = 900_000  # of the epochs behind the slider
MAX_FRAMES = 30
SIZES = ((3, "up to 3"), (10, "4 to 10"), (20, "11 to 20"), (30, "21 to 30"))  # the longer side of an output
SCATTER_TEXTS = (
    (38, 274, "middle", "1"), (270, 274, "middle", "30"), (150, 274, "middle", "true"), (24, 255, "end", "1"),
    (24, 23, "end", "30"), (34, 12, "start", "predicted"),
)  # fmt: skip
MEANING = {"w": "wrong", "f": "made right by the refinement", "b": "made wrong by the refinement", "s": "sizes differ",
           "r": "right"}  # fmt: skip
KINDS = {"solved": "solved", "nearly": "nearly solved (95 % of the cells)", "size": "wrong size",
         "copy": "copies the input", "worse": "refinement hurt", "better": "refinement helped"}  # fmt: skip


# 5. The fixed sample, epoch by epoch ---------------------------------------------------------------------------------


def section_sample(facts: Facts) -> str:
    """Return the tasks that are shown in every epoch, step by step, with a slider over the epochs."""
    cards = [o for o in facts.outputs if o.record.get("planning") and o.grid("target") and o.grid("first")]
    if not cards:
        return ""
    cards.sort(key=lambda o: (order_of(o), -(o.number("cells") or 0.0), o.key))
    facts.data |= frames(facts, cards)
    count = len(facts.data["epochs"])
    shown = facts.data["epochs"][-1] if count else facts.validation.epoch
    slider = (
        f'<input type="range" class="js" id="epoch" aria-label="epoch" min="0" max="{count - 1}" value="{count - 1}"'
        f' step="1"><output id="which">epoch {shown}</output>' if count > 1 else f"<span>epoch {shown}</span>"
    )  # fmt: skip
    left = f" {count} of {len(facts.run.epochs)} epochs are here." if count < len(facts.run.epochs) else ""
    drawn = "".join(sample_card(output, number) for number, output in enumerate(cards))
    said = (
        f"The same {counted(len(cards), 'task')} in every epoch, chosen by the hash of their names. A step's cells are"
        f" the fainter the less probable.{left} Keys: j and k go from task to task, d shows digits."
    )
    return (
        f'<section id="sample"><h2>How it plans</h2><p>{esc(said)}</p>{legend()}<div class="tools">{slider}'
        '<button type="button" class="js digit" aria-pressed="false">digits</button></div>'
        f"{drawn}</section>\n"
    )


def legend() -> str:
    """Return what the colours and signs of an error map mean."""
    keys = "; ".join(
        f'<span class="key" style="background:rgb({",".join(map(str, MARKS[mark][:3]))})"></span>'
        f" {SIGNS[mark]} {word}"
        for mark, word in MEANING.items() if mark != "r"
    )  # fmt: skip
    return f'<p class="dim">Error maps: {keys}; grey is right. With digits on, the signs are drawn as well.</p>'


def slot(data: str, rows: int, columns: int, title: str, caption: str, is_marks: bool = False) -> str:
    """Return a figure whose picture the slider changes."""
    return image(data, rows, columns, title, caption, extra=' data-slot=""' + ' data-marks="1"' * is_marks)


def sample_card(output: Output, number: int) -> str:
    """Return one task of the sample: what was shown, what was planned, and what was wrong."""
    pictures = [
        slot(data, *shape, title, caption, title == "errors") for data, shape, title, caption in pictures_of(output)
    ]
    context = f"{grid_image(output.grid('input'), 'input')}{grid_image(output.grid('target'), 'target')}"
    return (
        f'<div class="card" data-stop="" tabindex="-1" data-card="{number}"><h3>{esc(name_of(output))}</h3>'
        f'<p class="said">{esc(caption_of(output))}</p><div class="grids">{context}{"".join(pictures)}</div>'
        f"{backward(output)}{demonstrations(output)}{neighbours(output)}</div>\n"
    )


def name_of(output: Output) -> str:
    """Return how an output is called."""
    return f"{output.key[0]}, test input {output.key[1]}"


def pictures_of(output: Output) -> list[tuple[str, tuple[int, int], str, str]]:
    """Return (PNG in base64, its shape, title, caption) of what was planned: each step, the attempts, the errors."""
    found = []
    target = output.grid("target")
    for number, (grid, confidence) in enumerate(output.record.get("planning", []), start=1):
        cells = cells_of(confidence)
        likely = sum(cells.count(str(tenths)) * (tenths + 0.5) for tenths in range(10)) / len(cells) / 10
        caption = f"step {number}: p about {likely:.2f}, {percent(union_cells(grid, target), 0)} right"
        found.append((belief_png(grid, confidence), shape_of(grid), f"step {number}", caption))
    attempts = [(f"attempt {number}", output.grid(name)) for number, name in ((1, "first"), (2, "second"))]
    named = [("plain prompt", output.unrefined), *attempts]
    found += [(grid_png(grid), shape_of(grid), title, f"{title}, {percent(union_cells(grid, target), 0)} right")
              for title, grid in named if grid]  # fmt: skip
    marks = error_map(output.grid("first"), output.unrefined, target)
    found.append((marks_png(marks), shape_of(marks), "errors", marks_words(marks)))
    return found


def marks_words(marks: str) -> str:
    """Return what an error map counts, in words."""
    counts = Counter(cells_of(marks))
    words = [f"{counts[mark]} {word}" for mark, word in MEANING.items() if mark != "r" and counts[mark]]
    return "errors: " + ("; ".join(words) if words else "none")


def caption_of(output: Output) -> str:
    """Return what became of an output, in one line."""
    mark = "\u2717 not exact"
    if output.flag("two"):
        mark = "\u2713 exact" if output.flag("exact") else "\u2713 second attempt exact"
    first = output.grid("first")
    size = "{}x{}".format(*shape_of(first)) if first else DASH
    true = "{}x{}".format(*shape_of(output.grid("target"))) if output.grid("target") else DASH
    parts = [mark, f"size {size}, true {true}", f"{percent(output.number('cells'))} of the cells"]
    if output.delta:
        parts.append(f"refinement {signed(100 * output.delta, 1)} points")
    steps = f"{counted(int(output.number('steps') or 0), 'planning step')} counted"
    parts.append("answered at once by the prior" if output.flag("at_once") else steps)
    if output.efe is not None:
        risk, doubt = (fixed(output.number(name)) for name in ("risk", "ambiguity"))
        parts.append(f"EFE {fixed(output.efe)} nats per cell (risk {risk}, ambiguity {doubt})")
    parts += [KINDS[kind] for kind in output.kinds if kind in ("nearly", "copy")]
    return "; ".join(parts)


def frames(facts: Facts, cards: Sequence[Output]) -> dict[str, Any]:
    """Return the sample in each epoch for the slider: captions, and numbers of images that stand there once.

    Of many epochs some are left out, so that all fits FRAMES_BYTES: evenly, the first and the last stay.
    """
    chosen = evenly(facts.run.epochs, MAX_FRAMES)
    while True:
        numbers: dict[str, int] = {}
        found = [_frame(facts, epoch, cards, numbers) for epoch in chosen]
        size = sum(map(len, numbers)) + len(json.dumps(found))
        if size <= FRAMES_BYTES or len(chosen) <= 1:
            return {"epochs": chosen, "frames": found, "images": list(numbers)}
        chosen = evenly(chosen, max(1, min(len(chosen) - 1, len(chosen) * FRAMES_BYTES // size)))


def evenly(values: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the values, evenly spread; the last one always, the first where there are two."""
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[-1]]
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _frame(facts: Facts, epoch: int, cards: Sequence[Output], numbers: dict[str, int]) -> list[Any]:
    """Return for each card [what became of it, numbers of its images, their captions]; None where it is not there."""
    is_last = facts.validation is not None and epoch == facts.validation.epoch
    validation = facts.validation if is_last else facts.run.validation(epoch, sample_only=True)
    there = {output.key: output for output in validation.outputs}
    rows: list[Any] = []
    for card in cards:
        output = there.get(card.key)
        if output is None or not output.grid("first"):
            rows.append(None)
            continue
        pictures = pictures_of(output)
        rows.append([caption_of(output), [numbers.setdefault(p[0], len(numbers)) for p in pictures],
                     [caption for *_, caption in pictures]])  # fmt: skip
    return rows


def backward(output: Output) -> str:
    """Return how the backward planner goes from the planned grid to the input in the last epoch, folded."""
    steps, source = output.record.get("backward", []), output.grid("input")
    if not steps or not source:
        return ""
    found = [percent(union_cells(grid, source), 0) for grid, _ in steps]
    drawn = "".join(image(belief_png(*step), *shape_of(step[0]), f"back {number}",
                          f"back {number}: {share} of the input")
                    for number, (step, share) in enumerate(zip(steps, found, strict=True), start=1))  # fmt: skip
    words = f"planned back from its last step in the last epoch, {found[-1]} of the input found"
    return f'<details><summary>{words}</summary><div class="grids">{drawn}{grid_image(source, "input")}</div></details>'


def demonstrations(output: Output) -> str:
    """Return the demonstrations of a task, folded."""
    pairs = output.task.get("demonstrations", [])
    drawn = "".join(in_and_out(a, b) for a, b in pairs)
    words = counted(len(pairs), "demonstration")
    return f'<details><summary>{words}</summary><div class="grids">{drawn}</div></details>'


def in_and_out(source: str, result: str) -> str:
    """Return a pair of grids with an arrow between them."""
    arrow = '<span aria-hidden="true">\u2192</span>'
    both = grid_image(source, "input", side=84), grid_image(result, "output", side=84)
    return f'<div class="pair">{arrow.join(both)}</div>'


def neighbours(output: Output) -> str:
    """Return what the memory recalled for a task, folded; red where it is the same task, which must not happen."""
    found = output.record.get("neighbours", [])
    if not found:
        return ""
    drawn = "".join(entry_pair(entry, f"similarity {fixed(numeric(entry.get('similarity')), 2)}, weight"
                               f" {fixed(numeric(entry.get('weight')), 2)}", entry.get("task") == output.key[0])
                    for entry in found)  # fmt: skip
    words = f"{len(found)} recalled from the memory"
    return f'<details><summary>{words}</summary><div class="grids">{drawn}</div></details>'


def entry_pair(entry: Mapping[str, Any], words: str, is_leak: bool = False) -> str:
    """Return an entry of the memory as the pair that it was learned from."""
    name = f"{entry.get('task', '?')} {entry.get('pair', '')}"
    said = f"{esc(name)}<br>{esc(words)}" + ("<br>\u26a0 the same task" if is_leak else "")
    grids = in_and_out(entry["input"], entry["output"]) if entry.get("input") and entry.get("output") else ""
    leak = ' class="leak"' if is_leak else ""
    return f"<div{leak}>{grids}<small>{said}</small></div>"


# 6. All outputs ------------------------------------------------------------------------------------------------------


def section_gallery(facts: Facts) -> str:
    """Return every output with its grids, nearly solved ones first, folded; as many as ROWS_BYTES hold."""
    if not facts.shown:
        return ""
    rows, used, count = [], 0, 0
    for output in facts.shown:
        row = gallery_row(output)
        if used + len(row) > ROWS_BYTES:
            break
        rows.append(row)
        used, count = used + len(row), count + 1
    for place, output in enumerate(facts.shown[:count]):
        more = demonstrations(output)
        if used + len(more) > ROWS_BYTES:
            break
        rows[place] = rows[place].replace("</details>", more + "</details>", 1)
        used += len(more)
    counts = Counter(kind for output in facts.shown[:count] for kind in output.kinds)
    options = "".join(f'<option value="{kind}">{esc(word)} ({counts[kind]})</option>' for kind, word in KINDS.items())
    missing = f" The page has room for {count} of {len(facts.shown)}." if count < len(facts.shown) else ""
    said = f"Epoch {facts.validation.epoch}, nearly solved ones first: there is most to learn.{missing}"
    return (
        f'<section id="gallery"><h2>All outputs</h2><p>{esc(said)}</p><div class="tools js"><label>show <select'
        f' class="filter" data-of="#gallery details[data-kinds]"><option value="">all ({count})</option>{options}'
        f'</select></label><span id="left"></span><button type="button" class="js digit" aria-pressed="false">digits'
        f"</button></div>{''.join(rows)}</section>\n"
    )


def gallery_row(output: Output) -> str:
    """Return one output, folded: input, target, attempt, errors."""
    grids = [(output.grid("input"), "input"), (output.grid("target"), "target"), (output.grid("first"), "attempt 1")]
    drawn = "".join(grid_image(grid, title, side=96) for grid, title in grids if grid)
    marks = error_map(output.grid("first"), output.unrefined, output.grid("target"))
    errors = image(marks_png(marks), *shape_of(marks), "errors", marks_words(marks), 96, ' data-marks="1"')
    sign = '<span class="yes">\u2713</span>' if output.flag("exact") else '<span class="no">\u2717</span>'
    return (
        f'<details data-stop="" data-kinds="{" ".join(output.kinds)}"><summary>{sign} {esc(name_of(output))}'
        f' <small>{percent(output.number("cells"))}</small></summary><p>{esc(caption_of(output))}</p>'
        f'<div class="grids">{drawn}{errors}</div></details>\n'
    )


def section_table(facts: Facts) -> str:
    """Return a row of numbers per output, to be sorted."""
    if not facts.outputs:
        return ""
    head = ("task", "test", "demos", "input", "output", "predicted", "exact", "two", "prior", "cells",
            "cells, plain prompt", "refinement", "reward", "cells, true size", "nats", "nats, prior", "EFE", "steps",
            "recalled")  # fmt: skip
    rows = "".join(f"<tr>{''.join(table_cells(output))}</tr>" for output in facts.outputs)
    top = "".join(f'<th scope="col">{esc(name)}</th>' for name in head)
    return (
        '<section><h2>Output by output</h2><p>A click on a column sorts by it. <button type="button" class="js csv"'
        ' data-of="outputs">save as CSV</button></p><div class="scroll tall" tabindex="0" role="region"'
        f' aria-label="all outputs"><table class="sort" id="outputs"><thead><tr>{top}</tr></thead><tbody>{rows}</tbody>'
        "</table></div></section>\n"
    )


def table_cells(output: Output) -> list[str]:
    """Return the cells of one row of the table."""

    def size(grid: str) -> str:
        if not grid:
            return f"<td>{DASH}</td>"
        rows, columns = shape_of(grid)
        return f'<td data-v="{rows * columns}">{rows}x{columns}</td>'

    def mark(name: str) -> str:
        is_right = output.flag(name)
        return f'<td data-v="{int(is_right)}">{_sign(is_right)}</td>'

    def value(number: float | None, digits: int = 3, sign: bool = False) -> str:
        return f'<td data-v="{"" if number is None else number}">{(signed if sign else fixed)(number, digits)}</td>'

    demos, recalled = output.task.get("demonstrations"), output.record.get("neighbours")
    return [
        f'<td class="t"><code>{esc(output.key[0])}</code></td>', f"<td>{output.key[1]}</td>",
        f"<td>{len(demos) if demos else DASH}</td>", size(output.grid("input")), size(output.grid("target")),
        size(output.grid("first")), mark("exact"), mark("two"), mark("prior"), value(output.number("cells")),
        value(output.number("unrefined_cells")), value(output.delta, 3, True),
        value(output.number("reward"), 3, True), value(output.number("cells_true")), value(output.number("nats")),
        value(output.number("prior_nats")), value(output.efe), value(output.number("steps"), 0),
        f"<td>{DASH if recalled is None else len(recalled)}</td>",
    ]  # fmt: skip


def _sign(is_right: bool) -> str:
    return '<span class="yes">\u2713</span>' if is_right else '<span class="no">\u2717</span>'


# 7. Breakdowns -------------------------------------------------------------------------------------------------------


def section_breakdowns(facts: Facts) -> str:
    """Return the scores by kind of output, which colours are taken for which, and which sizes."""
    known = [output for output in facts.shown if output.grid("input")]
    if not known:
        return ""
    def keeps_size(output: Output) -> bool:
        return shape_of(output.grid("target")) == shape_of(output.grid("input"))

    groups: dict[str, Callable[[Output], tuple[int, str]]] = {
        "longer side of the output": lambda o: _bin(max(shape_of(o.grid("target")))),
        "size": lambda o: (0, "as the input") if keeps_size(o) else (1, "changed"),
        "colours in the output": lambda o: _colors(len(set(cells_of(o.grid("target"))))),
        "demonstrations": lambda o: (n := len(o.task.get("demonstrations", [])), str(n)),
        "answered": lambda o: (0, "at once by the prior") if o.flag("at_once") else (1, "planned"),
    }
    rows = []
    for name, label in groups.items():
        found: dict[tuple[int, str], list[Output]] = defaultdict(list)
        for output in known:
            found[label(output)].append(output)
        for (_, word), some in sorted(found.items()):
            cells = [share(o.flag(flag) for o in some).cell() for flag in ("exact", "two", "prior")]
            rows.append([f"{esc(name)}: {esc(word)}", str(len(some)), *cells,
                         percent(math.fsum(o.number("cells") or 0.0 for o in some) / len(some))])  # fmt: skip
    head = ("kind of output", "outputs", "exact", "in two attempts", "prior exact", "cells")
    return f"<section><h2>Where it is right</h2>{table(head, rows)}{confusion(known)}{wrong_sizes(known)}</section>\n"


def _bin(side: int) -> tuple[int, str]:
    return next((most, word) for most, word in SIZES if side <= most)


def _colors(count: int) -> tuple[int, str]:
    return min(count, 5), "5 or more" if count >= 5 else str(count)


def swatch(color: str) -> str:
    """Return a colour with its digit."""
    return f'<span class="key" style="background:rgb({",".join(map(str, PALETTE[color][:3]))})"></span> {color}'


def confusion(outputs: Sequence[Output]) -> str:
    """Return which colour is predicted where another is right, in outputs of the right size, in percent of each row."""
    counts: Counter[tuple[str, str]] = Counter()
    for output in outputs:
        first, target = output.grid("first"), output.grid("target")
        if shape_of(first) == shape_of(target):
            counts.update(zip(cells_of(target), cells_of(first), strict=True))
    totals = Counter()
    for (true, _), count in counts.items():
        totals[true] += count
    rows = [[swatch(true), *(f"{100 * counts[true, found] / totals[true]:.1f}" if counts[true, found] else "\u00b7"
                             for found in PALETTE), str(totals[true])]
            for true in PALETTE if totals[true]]  # fmt: skip
    head = ("true \\ predicted", *PALETTE, "cells")
    words = "Which colours are taken for which, where the size is right: percent of the true colour's cells"
    return f"<h3>Colours</h3>{table(head, rows, caption=words)}" if rows else ""


def wrong_sizes(outputs: Sequence[Output]) -> str:
    """Return the wrong sizes that were predicted most often."""
    counts = Counter((shape_of(o.grid("target")), shape_of(o.grid("first"))) for o in outputs)
    wrong = [(pair, count) for pair, count in counts.most_common() if pair[0] != pair[1]]
    if not wrong:
        return f"<h3>Sizes</h3><p>All sizes are right.</p>{size_scatter(counts)}"
    rows = [["{}x{}".format(*true), "{}x{}".format(*found), str(count)] for (true, found), count in wrong[:12]]
    said = f"{sum(count for _, count in wrong)} wrong sizes of {len(outputs)}; the most frequent ones:"
    return f"<h3>Sizes</h3><p>{said}</p>{table(('true size', 'predicted', 'outputs'), rows)}{size_scatter(counts)}"


def size_scatter(counts: Mapping[tuple[tuple[int, int], tuple[int, int]], int]) -> str:
    """Return a picture of the predicted rows and columns over the true ones; a dot's area is its number of outputs.

    counts: of each pair (true size, predicted size).
    """
    panels = []
    for place, word in enumerate(("rows", "columns")):
        sides: Counter[tuple[int, int]] = Counter()
        for (true, found), count in counts.items():
            sides[true[place], found[place]] += count
        most = max(sides.values())
        dots = "".join(
            f'<circle cx="{30 + 8 * true}" cy="{260 - 8 * found}" r="{1.5 + 4.5 * math.sqrt(count / most):.1f}"'
            f' opacity=".7"><title>true {true}, predicted {found}: {counted(count, "output")}</title></circle>'
            for (true, found), count in sorted(sides.items())
        )
        texts = "".join(
            f'<text class="dim" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
            for x, y, anchor, text in SCATTER_TEXTS
        )
        title = f"{word}: predicted over true"
        panels.append(
            f'<div class="curve"><h4>{title}, up to {most} outputs a dot</h4><svg viewBox="0 0 300 280" role="img"'
            f' aria-label="{title}"><line class="axis" x1="30" x2="280" y1="260" y2="260"/>'
            f'<line class="axis" x1="30" x2="30" y1="15" y2="260"/>'
            f'<line class="level" x1="38" x2="270" y1="252" y2="20"/>{dots}{texts}</svg></div>'
        )
    return f'<div class="curves">{"".join(panels)}</div>'


# 8. Refinement and memory --------------------------------------------------------------------------------------------


def section_refinement(facts: Facts) -> str:
    """Return what refining the prompt helped and hurt, the largest differences as grids."""
    if not facts.shown:
        return ""
    changed = sorted((o for o in facts.shown if o.delta), key=lambda o: o.delta)
    hurt, helped = [o for o in changed if o.delta < 0], [o for o in changed if o.delta > 0]
    made = sum(o.flag("exact") and o.unrefined != o.grid("target") for o in helped)
    lost = sum(not o.flag("exact") and o.unrefined == o.grid("target") for o in hurt)
    mean = mean_over_tasks(facts.outputs, lambda o: o.delta)
    gained, low, high = (signed(100 * value, 2) for value in (mean.value, mean.low, mean.high))
    said = (
        f"Compared with the prompt as written, refinement helped {counted(len(helped), 'output')} ({made} became"
        f" exact), hurt {len(hurt)} ({lost} were exact before), and left the cells of {len(facts.shown) - len(changed)}"
        f" as they were. Mean {gained} points of cells, 95 % interval {low} to {high}."
    )
    rewards = [value for o in facts.outputs if (value := o.number("reward")) is not None]
    parts = [distribution("reward of the refinement, output by output", rewards)]
    parts += [f"<h3>{title}</h3>{''.join(map(before_and_after, some))}"
             for title, some in (("Helped most", helped[::-1][:6]), ("Hurt most", hurt[:6])) if some]  # fmt: skip
    return f"<section><h2>What the refined prompt is worth</h2><p>{esc(said)}</p>{''.join(parts)}</section>\n"


def distribution(title: str, values: Sequence[float]) -> str:
    """Return bars of how often each value occurs, around 0, which a line marks; nothing where there are no values.

    The outer bars also hold what lies beyond: the range is that of all values but the 1 % largest in size.
    """
    if not values:
        return ""
    end = float(f"{sorted(map(abs, values))[int(0.99 * (len(values) - 1))] or max(map(abs, values)) or 1.0:.3g}")
    bars = 21  # an odd number, so that one bar holds 0
    counts = [0] * bars
    for value in values:
        counts[min(max(int((value / end + 1) / 2 * bars), 0), bars - 1)] += 1
    below, above = sum(value < 0 for value in values), sum(value > 0 for value in values)
    said = f"below 0: {below}; 0: {len(values) - below - above}; above 0: {above}"
    drawn = histogram(title, counts, end, 0.0, "", -end)
    return f'<div class="curves">{drawn}</div><p class="dim">{esc(said)}</p>'


def before_and_after(output: Output) -> str:
    """Return an output under the prompt as written and under the refined one."""
    marks = error_map(output.grid("first"), output.unrefined, output.grid("target"))
    first = output.grid("first")
    named = ((output.grid("target"), "target"), (output.unrefined, "plain prompt"), (first, "refined prompt"))
    drawn = [grid_image(grid, title, side=110) for grid, title in named]
    drawn.append(image(marks_png(marks), *shape_of(marks), "errors", marks_words(marks), 110, ' data-marks="1"'))
    return (f'<p><code>{esc(name_of(output))}</code> {signed(100 * output.delta, 1)} points</p>'
            f'<div class="grids">{"".join(drawn)}</div>')  # fmt: skip


def section_memory(facts: Facts) -> str:
    """Return what the memory holds, as the last validation found it."""
    memory = as_dict(facts.validation.head.get("memory")) if facts.validation else {}
    if not memory:
        return ""
    numbers = {name: numeric(value) for name, value in memory.items()}

    def n(name: str) -> str:
        value = numbers.get(name)
        return DASH if value is None else f"{value:.0f}"

    said = (
        f"{n('size')} of {n('capacity')} entries; {n('offered')} pairs offered, {n('admissions')} admitted,"
        f" {n('replaced')} replaced, {n('evicted')} removed. Threshold {fixed(numbers.get('theta'))}."
        f" {percent(numbers.get('hit_rate'))} of the queries in training recalled something; {n('never_used')} of the"
        " entries never came back."
    )
    bars = histogram("scores of the entries", memory.get("scores"), 1.0, numbers.get("theta"), "threshold")
    bars += histogram("age of the entries, in batches", memory.get("ages"), numbers.get("oldest") or 1.0)
    parts = []
    for title, name in (("Most used", "most_used"), ("Never used, newest first", "unused")):
        there = memory.get(name)
        entries = [entry for entry in (there if isinstance(there, list) else ()) if usable_entry(entry)]
        drawn = "".join(entry_pair(entry, entry_words(entry)) for entry in entries)
        parts.append(f'<h3>{title}</h3><div class="grids">{drawn}</div>' if drawn else "")
    return f'<section><h2>Memory</h2><p>{esc(said)}</p><div class="curves">{bars}</div>{"".join(parts)}</section>\n'


def usable_entry(entry: Any) -> bool:
    """Return whether an entry can be shown: its grids, where it has any, are grids."""
    return isinstance(entry, dict) and all(is_grid(entry[name]) for name in ("input", "output") if name in entry)


def entry_words(entry: Mapping[str, Any]) -> str:
    """Return what is known of an entry of the memory."""
    hits, score, gain = (numeric(entry.get(name)) for name in ("hits", "score", "gain"))
    used = "" if not hits else f"used {hits:.0f} times, "
    return f"{used}score {fixed(score, 2)}, gain {signed(gain, 3)}"


def histogram(
    title: str, counts: Any, end: float, line: float | None = None, name: str = "", start: float = 0.0
) -> str:
    """Return bars of counts over equal parts of `start` to `end`, with a vertical line; nothing without counts."""
    values = [numeric(count) for count in counts] if isinstance(counts, list) else []
    if not values or None in values or len(values) > 100 or not max(values):
        return ""
    wide, high, base = 300 / len(values), 90, 110
    bars = "".join(
        f'<rect x="{10 + i * wide:.1f}" y="{base - high * value / max(values):.1f}" width="{wide - 2:.1f}"'
        f' height="{high * value / max(values):.1f}" fill="var(--accent)"><title>{value:.0f}</title></rect>'
        for i, value in enumerate(values)
    )
    if line is not None:
        x = 10 + 300 * min(max((line - start) / (end - start), 0.0), 1.0)
        bars += f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="12" y2="{base}"/>' \
            f'<text class="dim" x="{x:.1f}" y="9" text-anchor="end">{esc(name)} {line:.3g}</text>'  # fmt: skip
    ends = "".join(f'<text class="dim" x="{x}" y="122" text-anchor="{side}">{value:g}</text>'
                   for x, side, value in ((10, "start", start), (310, "end", end)))  # fmt: skip
    return f'<div class="curve"><h4>{esc(title)}, at most {max(values):.0f}</h4><svg viewBox="0 0 320 128" role="img"' \
        f' aria-label="{esc(title)}">{bars}{ends}</svg></div>'  # fmt: skip
