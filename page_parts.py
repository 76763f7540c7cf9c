"""Parts of an HTML page that needs nothing else: escaped text, grids as tiny PNG images, curves as inline SVG.

Pure functions that return text. Imports the standard library, terminal (the palette) and page_style. Used by all that
makes pages.
"""

from __future__ import annotations

import base64
import functools
import html
import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from page_style import CSS, SCRIPT
from terminal import RGB

Color = tuple[int, int, int, int]  # red, green, blue, opacity
PALETTE: dict[str, Color] = {str(digit): (*color, 255) for digit, color in enumerate(RGB)}
LEVELS = ((9, 255), (8, 205), (5, 150), (0, 95))  # least tenths of confidence, and the opacity of such cells
# An error map: right, wrong, made right by the refinement, made wrong by it, and where the sizes differ.
MARKS: dict[str, Color] = {
    "r": (128, 128, 128, 60), "w": (255, 65, 54, 255), "f": (0, 116, 217, 255), "b": (255, 133, 27, 255),
    "s": (177, 13, 201, 255),
}  # fmt: skip
SIGNS = {"r": "", "w": "\u00d7", "f": "+", "b": "\u2212", "s": "\u25cb"}  # drawn on it, so that colour is not all
MINUS, DASH = "\u2212", "\u2013"
SIDE = 132  # pixels that the longer side of a grid is given, about


def esc(value: Any) -> str:
    """Return text that means nothing to HTML, quotes included."""
    return html.escape(str(value), quote=True)


# Numbers in words --------------------------------------------------------------------------------------------------


def numeric(value: Any) -> float | None:
    """Return a value as a number; None where it is none, or not finite."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def as_dict(value: Any) -> dict[str, Any]:
    """Return a value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in percent."""
    return DASH if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}\u00a0%"


def signed(value: float | None, digits: int = 3) -> str:
    """Return a number with its sign."""
    if value is None:
        return DASH
    return f"{value:+z.{digits}f}".replace("-", MINUS)


def fixed(value: float | None, digits: int = 3) -> str:
    """Return a number with so many decimals."""
    return DASH if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def counted(number: int, noun: str) -> str:
    """Return "1 task", "2 tasks", "2 batches"."""
    plural = {"batch": "batches"}.get(noun, f"{noun}s")
    return f"{number} {noun if number == 1 else plural}"


# Grids ---------------------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: Sequence[str], colors: Mapping[str, Color]) -> bytes:
    """Return a PNG of one pixel per character, with a palette of the colours that occur."""
    used = sorted(set("".join(rows)))
    width, small = len(rows[0]), len(used) <= 16
    if small:
        table = str.maketrans(dict(zip(used, "0123456789abcdef", strict=False)))
        lines = [bytes.fromhex(row.translate(table) + "0" * (width % 2)) for row in rows]
    else:
        index = {symbol: number for number, symbol in enumerate(used)}
        lines = [bytes(index[symbol] for symbol in row) for row in rows]
    head = struct.pack(">IIBBBBB", width, len(rows), 4 if small else 8, 3, 0, 0, 0)
    chosen = [colors[symbol] for symbol in used]
    opacity = bytes(color[3] for color in chosen).rstrip(b"\xff")
    parts = [_chunk(b"IHDR", head), _chunk(b"PLTE", bytes(value for color in chosen for value in color[:3]))]
    parts += [_chunk(b"tRNS", opacity)] if opacity else []
    parts += [_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines), 6)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _base64(rows: Sequence[str], colors: Mapping[str, Color]) -> str:
    return base64.b64encode(png(rows, colors)).decode("ascii")


@functools.lru_cache(maxsize=20_000)
def grid_png(grid: str) -> str:
    """Return a grid (rows of digits, "/" between them) as PNG in base64."""
    return _base64(grid.split("/"), PALETTE)


@functools.lru_cache(maxsize=20_000)
def belief_png(grid: str, confidence: str) -> str:
    """Return a grid as PNG in base64 whose cells are the fainter the less confident (tenths, same shape)."""
    opacity = {str(tenths): next(value for least, value in LEVELS if tenths >= least) for tenths in range(10)}
    rows = [[(a, opacity[b]) for a, b in zip(*both, strict=True)]
            for both in zip(grid.split("/"), confidence.split("/"), strict=True)]  # fmt: skip
    pairs = sorted({pair for row in rows for pair in row})
    symbols = {pair: chr(0x100 + number) for number, pair in enumerate(pairs)}
    colors = {symbols[a, alpha]: (*PALETTE[a][:3], alpha) for a, alpha in pairs}
    return _base64(["".join(symbols[pair] for pair in row) for row in rows], colors)


@functools.lru_cache(maxsize=5000)
def error_map(grid: str, unrefined: str, target: str) -> str:
    """Return a grid of MARKS over the union of both areas: how `grid` differs from the target."""
    texts = [text.split("/") for text in (grid, unrefined, target)]
    height, width = (max(sizes) for sizes in zip(*((len(rows), len(rows[0])) for rows in texts[::2]), strict=True))
    padded = [[row.ljust(width)[:width] for row in rows] + [" " * width] * (height - len(rows)) for rows in texts]
    return "/".join("".join(map(_mark, *rows)) for rows in zip(*padded, strict=False))


def _mark(is_: str, was: str, should: str) -> str:
    """Return the mark of a cell; " " stands for no cell."""
    if is_ == should != " ":
        return "r" if was == should else "f"
    if " " in (is_, should):
        return "s"
    return "b" if was == should else "w"


@functools.lru_cache(maxsize=20_000)
def marks_png(marks: str) -> str:
    """Return an error map as PNG in base64."""
    return _base64(marks.split("/"), MARKS)


def image(data: str, rows: int, columns: int, title: str, caption: str = "", side: int = SIDE, extra: str = "") -> str:
    """Return a figure: a PNG in base64 scaled up to whole cells, lines between them, and its caption below.

    `title` and `caption` are escaped here; `extra` are attributes of the image.
    """
    cell = max(3, min(18, side // max(rows, columns)))
    text = f"{title} {rows}x{columns}"
    below = f"<figcaption>{esc(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><span class="l" style="--s:{cell}px"><img src="data:image/png;base64,{data}" width="{columns * cell}"'
        f' height="{rows * cell}" alt="{esc(text)}"{extra}></span>{below}</figure>'
    )


def grid_image(grid: str, title: str, caption: str = "", side: int = SIDE) -> str:
    """Return the figure of a grid."""
    rows = grid.split("/")
    return image(grid_png(grid), len(rows), len(rows[0]), title, caption or title, side)


# Curves --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of a curve: points (x, y), how it is named at its end, and how it is drawn: "line", "dots" or "faint"."""

    points: Sequence[tuple[float, float]]
    name: str = ""
    style: str = "line"
    dash: str = ""


@dataclass(frozen=True)
class Curve:
    """A small picture of one quantity over the batches.

    levels: horizontal lines with their names; band: (x, low, high); is_log: a logarithmic scale, for what is above 0.
    """

    title: str
    lines: Sequence[Line]
    levels: Sequence[tuple[float, str]] = ()
    band: Sequence[tuple[float, float, float]] = ()
    is_log: bool = False


WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 330, 150, 46, 62, 12, 22


def smooth(points: Sequence[tuple[float, float]], share: float = 0.15) -> list[tuple[float, float]]:
    """Return an exponential moving average over about this share of the points, corrected for its start."""
    rate = 1 / max(1.0, share * len(points))
    total = weight = 0.0
    found = []
    for x, y in points:
        total, weight = (1 - rate) * total + rate * y, (1 - rate) * weight + rate
        found.append((x, total / weight))
    return found


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> Sequence[tuple[float, float]]:
    """Return at most so many of the points, the last among them."""
    every = -(-len(points) // most) if points else 1
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def short(value: float) -> str:
    """Return a number in a few characters."""
    if value == 0:
        return "0"
    size = abs(value)
    return f"{value:.1e}" if size < 1e-3 or size >= 1e5 else f"{value:.3g}"


def curve_svg(curve: Curve, last: float, marks: Iterable[tuple[float, str]] = ()) -> str:
    """Return the picture of a curve over 0 to `last`, with lettered vertical marks; a sentence where it is empty."""
    lines = [Line([p for p in line.points if _is_shown(p[1], curve.is_log)], line.name, line.style, line.dash)
             for line in curve.lines]  # fmt: skip
    values = [y for line in lines for _, y in line.points]
    if not values:
        return f'<div class="curve"><h4>{esc(curve.title)}</h4><p class="dim">nothing measured</p></div>'
    values += [y for y, _ in curve.levels if _is_shown(y, curve.is_log)]
    values += [y for _, low, high in curve.band for y in (low, high) if _is_shown(y, curve.is_log)]
    scale = _Scale(min(values), max(values), max(last, 1.0), curve.is_log)
    parts = [scale.axes()]
    if curve.band:
        edge = [(x, high) for x, _, high in curve.band] + [(x, low) for x, low, _ in reversed(curve.band)]
        parts.append(f'<polygon class="band" points="{scale.path(edge)}"/>')
    taken: list[float] = []
    for y, name in curve.levels:
        if _is_shown(y, curve.is_log):
            parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{scale.y(y)}" y2="{scale.y(y)}"/>')
            parts.append(_label(name, scale.y(y), taken, "dim"))
    for line in lines:
        parts += _drawn(line, scale, taken)
    for x, letter in marks:
        parts.append(f'<line class="mark" x1="{scale.x(x)}" x2="{scale.x(x)}" y1="{TOP}" y2="{HIGH - BOTTOM}"/>'
                     f'<text class="dim" x="{scale.x(x)}" y="{TOP - 2}" text-anchor="middle">{esc(letter)}</text>')
    body = "".join(parts)
    return (f'<div class="curve"><h4>{esc(curve.title)}</h4><svg viewBox="0 0 {WIDE} {HIGH}" role="img"'
            f' aria-label="{esc(curve.title)} over batches">{body}</svg></div>')  # fmt: skip


def _is_shown(value: float, is_log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not is_log)


def _drawn(line: Line, scale: _Scale, taken: list[float]) -> list[str]:
    """Return a line, or its dots, and its name beside its last point."""
    if not line.points:
        return []
    points = thinned(line.points)
    if line.style == "dots" or len(points) == 1:
        drawn = "".join(f'<circle cx="{scale.x(x)}" cy="{scale.y(y)}" r="2.4"><title>{esc(f"{x:g}: {y:.5g}")}</title>'
                        "</circle>" for x, y in points)  # fmt: skip
    else:
        drawn = ""
    if line.style != "dots" and len(points) > 1:
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        drawn += f'<polyline class="{line.style}" points="{scale.path(points)}"{dash}/>'
    if line.style == "faint":
        return [drawn]
    name = f"{line.name} {short(points[-1][1])}".strip()
    return [drawn, _label(name, scale.y(points[-1][1]), taken, "end")]


def _label(text: str, y: float, taken: list[float], kind: str) -> str:
    """Return a text at the right, moved up or down until it covers no other."""
    free = [place for step in range(12) for place in (y + 9 * step, y - 9 * step)
            if TOP <= place <= HIGH - BOTTOM + 4 and all(abs(place - other) >= 9 for other in taken)]  # fmt: skip
    place = free[0] if free else y
    taken.append(place)
    return f'<text class="{kind}" x="{WIDE - RIGHT + 4}" y="{place + 3:.1f}">{esc(text)}</text>'


@dataclass(frozen=True)
class _Scale:
    """Where values lie in a picture."""

    low: float
    high: float
    last: float
    is_log: bool

    def x(self, value: float) -> float:
        return round(LEFT + (WIDE - LEFT - RIGHT) * min(max(value / self.last, 0.0), 1.0), 1)

    def y(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(HIGH - BOTTOM - (HIGH - TOP - BOTTOM) * share, 1)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x)},{self.y(min(max(y, self.low), self.high))}" for x, y in points)

    def axes(self) -> str:
        base = HIGH - BOTTOM
        ends = [(self.low, base), (self.high, TOP)] if self.high > self.low else [(self.low, (base + TOP) / 2)]
        names = "".join(f'<text class="dim" x="{LEFT - 4}" y="{y + 3}" text-anchor="end">{short(value)}</text>'
                        for value, y in ends)  # fmt: skip
        return (
            f'<line class="axis" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{base}" y2="{base}"/>'
            f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{base}"/>{names}'
            f'<text class="dim" x="{LEFT}" y="{HIGH - 8}">0</text><text class="dim" x="{WIDE - RIGHT}" y="{HIGH - 8}"'
            f' text-anchor="end">{self.last:g} batches</text>'
        )


# Tables --------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "", caption: str = "") -> str:
    """Return a table in a box that scrolls sideways. Head and caption are escaped here, cells are HTML already."""
    top = "".join(f'<th scope="col">{esc(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    said = f"<caption>{esc(caption)}</caption>" if caption else ""
    named = f' class="{kind}"' if kind else ""
    scroll = '<div class="scroll" tabindex="0" role="region" aria-label="table">'
    return f"{scroll}<table{named}>{said}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


# The page ------------------------------------------------------------------------------------------------------------


def whole_page(title: str, sections: Iterable[str], data: Mapping[str, Any]) -> str:
    """Return a whole page; `data` is what the script needs beside what it always needs."""
    colors = {"palette": [PALETTE[str(digit)][:3] for digit in range(10)], "marks": [MARKS[name][:3] for name in SIGNS]}
    text = json.dumps({"side": SIDE, "signs": list(SIGNS.values()), **colors, **data}, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(title)}</title>\n<style>{CSS}</style></head>\n"
        f'<body class="no-js">\n{"".join(part for part in sections if part)}'
        f'<script type="application/json" id="data">{text}</script>\n<script>{SCRIPT}</script>\n</body></html>\n'
    )
