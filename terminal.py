"""Grids in a terminal: coloured half blocks, two rows of cells per line, or digits where the terminal has no colours.

Pure functions that return text; nothing is printed here. Imports the standard library only. Used by report and verbs.
Outside coloured grids all text is ASCII.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

# Colours 0 to 9 as (red, green, blue), and the nearest entries of the 256-colour table.
RGB = (
    (0x00, 0x00, 0x00),
    (0x00, 0x74, 0xD9),
    (0xFF, 0x41, 0x36),
    (0x2E, 0xCC, 0x40),
    (0xFF, 0xDC, 0x00),
    (0xAA, 0xAA, 0xAA),
    (0xF0, 0x12, 0xBE),
    (0xFF, 0x85, 0x1B),
    (0x7F, 0xDB, 0xFF),
    (0x87, 0x0C, 0x25),
)
ANSI_256 = (0, 21, 196, 46, 226, 244, 201, 208, 51, 88)
ASCII, COLORS_256, COLORS_24_BIT = "ascii", "256", "24bit"  # the styles
UPPER_HALF = "\u2580"
RESET = "\x1b[0m"
GAP = 3  # columns between two grids side by side

Cells = Sequence[Sequence[int]]  # rows of colours 0 to 9; numpy grids will do


@dataclass(frozen=True)
class Panel:
    """A grid under its title."""

    title: str
    grid: Cells


def supports_color(stream: IO[str], environ: Mapping[str, str]) -> bool:
    """Return whether coloured half blocks may be written to a stream.

    NO_COLOR (not empty) says no, then FORCE_COLOR (not empty) says yes; else it takes a terminal that is not dumb. A
    stream that is not UTF-8 cannot carry the half block in any case.
    """
    try:
        has_block = codecs.lookup(getattr(stream, "encoding", None) or "").name == "utf-8"
    except LookupError:
        has_block = False
    if not has_block or environ.get("NO_COLOR"):
        return False
    return bool(environ.get("FORCE_COLOR")) or (stream.isatty() and environ.get("TERM") != "dumb")


def choose_style(stream: IO[str], environ: Mapping[str, str]) -> str:
    """Return the style for a stream: 24-bit colours where COLORTERM or FORCE_COLOR=3 says so, 256 colours, or ASCII."""
    if not supports_color(stream, environ):
        return ASCII
    is_true_color = environ.get("COLORTERM") in ("truecolor", "24bit") or environ.get("FORCE_COLOR") == "3"
    return COLORS_24_BIT if is_true_color else COLORS_256


def plain_text(text: str) -> str:
    """Return the text with "?" for whatever is not printable ASCII: names of files may hold control characters."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)


def grid_lines(grid: Cells, style: str = ASCII) -> list[str]:
    """Return the lines of a grid, one column per cell: digits, a line per row, or half blocks, a line per two rows."""
    rows = [[int(cell) for cell in row] for row in grid]
    assert all(0 <= cell < len(RGB) for row in rows for cell in row), "colours are 0 to 9"
    if style == ASCII:
        return ["".join(map(str, row)) for row in rows]
    lower = [*rows[1::2], *([None] * (len(rows) % 2))]
    return [_half_blocks(above, below, style) for above, below in zip(rows[::2], lower, strict=True)]


def _half_blocks(above: list[int], below: list[int] | None, style: str) -> str:
    """Return one line: the upper half in the foreground, the lower half (if there is one) in the background."""
    text, last = "", None
    for column, top in enumerate(above):
        colors = (top, None if below is None else below[column])
        if colors != last:
            text += f"\x1b[{_code(38, colors[0], style)};{_code(48, colors[1], style)}m"
        text, last = text + UPPER_HALF, colors
    return text + RESET


def _code(layer: int, color: int | None, style: str) -> str:
    """Return the parameters that set the foreground (layer 38) or background (48); None: the terminal's own."""
    if color is None:
        return str(layer + 1)
    if style == COLORS_24_BIT:
        return f"{layer};2;" + ";".join(map(str, RGB[color]))
    return f"{layer};5;{ANSI_256[color]}"


def side_by_side(panels: Sequence[Panel], style: str = ASCII, width: int = 80) -> str:
    """Return the grids beside each other under their titles, as many in a row as `width` columns hold.

    The others follow below, after an empty line. A title longer than the terminal is cut; a grid wider than it is not.
    """
    rows: list[list[Panel]] = []
    used = 0
    for panel in panels:
        if rows and used + GAP + _panel_width(panel, width) <= width:
            rows[-1].append(panel)
            used += GAP + _panel_width(panel, width)
        else:
            rows.append([panel])
            used = _panel_width(panel, width)
    return "\n\n".join(_row_of_panels(row, style, width) for row in rows)


def _panel_width(panel: Panel, width: int) -> int:
    return max(len(panel.grid[0]), min(len(panel.title), width))


def _row_of_panels(panels: Sequence[Panel], style: str, width: int) -> str:
    """Return the lines of panels that lie side by side; escapes take no columns, so padding counts cells."""
    blocks = [(grid_lines(panel.grid, style), len(panel.grid[0]), _panel_width(panel, width)) for panel in panels]
    titles = [plain_text(panel.title)[:width] for panel in panels]
    gap = " " * GAP
    lines = [gap.join(title.ljust(wide) for title, (_, _, wide) in zip(titles, blocks, strict=True))]
    for i in range(max(len(drawn) for drawn, _, _ in blocks)):
        parts = [drawn[i] + " " * (wide - cells) if i < len(drawn) else " " * wide for drawn, cells, wide in blocks]
        lines.append(gap.join(parts))
    return "\n".join(line.rstrip(" ") for line in lines)


def probabilities_line(probabilities: Sequence[float | None]) -> str:
    """Return how likely each attempt is held to be, in order; None stands for "not known" and prints n/a."""
    shown = ("n/a" if value is None else f"{value:.2f}" for value in probabilities)
    return " | ".join(f"attempt {number}: p = {value}" for number, value in enumerate(shown, start=1))
