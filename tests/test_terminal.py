"""Tests of grids in a terminal: exact text of small grids, layout by width, and when colours are used."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terminal import (
    ANSI_256,
    ASCII,
    COLORS_24_BIT,
    COLORS_256,
    RGB,
    Panel,
    choose_style,
    grid_lines,
    plain_text,
    probabilities_line,
    side_by_side,
    supports_color,
)

BLOCK = "\u2580"


class Stream(io.StringIO):
    """A stream with a chosen encoding that is or is not a terminal."""

    def __init__(self, encoding: str | None = "utf-8", terminal: bool = True):
        super().__init__()
        self._encoding, self._terminal = encoding, terminal

    @property
    def encoding(self):
        return self._encoding

    def isatty(self):
        return self._terminal


def visible(text: str) -> str:
    """Return the text without escape sequences."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_ascii_grid_is_digits_row_by_row():
    assert grid_lines([[0, 1, 2], [9, 8, 7]]) == ["012", "987"]
    assert grid_lines(np.array([[5]], np.uint8)) == ["5"]


def test_half_blocks_hold_two_rows_and_repeat_no_escape():
    assert grid_lines([[1, 1, 2], [3, 3, 2]], COLORS_256) == [
        f"\x1b[38;5;21;48;5;46m{BLOCK}{BLOCK}\x1b[38;5;196;48;5;196m{BLOCK}\x1b[0m"
    ]


def test_an_odd_last_row_leaves_the_lower_half_to_the_terminal():
    assert grid_lines([[4]], COLORS_256) == [f"\x1b[38;5;226;49m{BLOCK}\x1b[0m"]
    assert grid_lines([[0], [0], [4]], COLORS_256)[1] == f"\x1b[38;5;226;49m{BLOCK}\x1b[0m"


def test_true_colors_are_red_green_blue():
    assert grid_lines([[1], [5]], COLORS_24_BIT) == [f"\x1b[38;2;0;116;217;48;2;170;170;170m{BLOCK}\x1b[0m"]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from((COLORS_256, COLORS_24_BIT)))
@settings(max_examples=60, deadline=None)
def test_half_blocks_read_back_are_the_grid(height, width, seed, style):
    grid = np.random.default_rng(seed).integers(0, 10, (height, width))
    names = {f"5;{ANSI_256[c]}" if style == COLORS_256 else "2;" + ";".join(map(str, RGB[c])): c for c in range(10)}
    rows = []
    for line in grid_lines(grid, style):
        upper, lower, colors = [], [], (None, None)
        for escape, block in re.findall(rf"\x1b\[([0-9;]+)m|({BLOCK})", line.removesuffix("\x1b[0m")):
            if escape:
                front, _, back = escape.removeprefix("38;").rpartition(";48;" if ";48;" in escape else ";49")
                colors = (names[front], names.get(back))
            elif block:
                upper.append(colors[0])
                lower.append(colors[1])
        rows += [upper] + ([lower] if lower[0] is not None else [])
    assert rows == grid.tolist()


def test_grids_stand_side_by_side_under_their_titles():
    panels = [Panel("input", [[1, 2], [3, 4], [5, 6]]), Panel("a", [[7, 7, 7]])]
    assert side_by_side(panels) == "input   a\n12      777\n34\n56"
    assert side_by_side([]) == ""
    assert visible(side_by_side(panels, COLORS_256)) == f"input   a\n{BLOCK * 2}      {BLOCK * 3}\n{BLOCK * 2}"


def test_grids_fall_below_each_other_when_the_terminal_is_too_narrow():
    panels = [Panel("a", [[1] * 5]), Panel("b", [[2] * 5]), Panel("c", [[3] * 5])]
    assert side_by_side(panels, width=21) == "a       b       c\n11111   22222   33333"
    assert side_by_side(panels, width=20) == "a       b\n11111   22222\n\nc\n33333"
    assert side_by_side(panels, width=12) == "a\n11111\n\nb\n22222\n\nc\n33333"
    assert side_by_side([Panel("a long title", [[1] * 5])], width=6) == "a long\n11111"


@given(st.lists(st.tuples(st.text(max_size=12), st.integers(1, 30), st.integers(1, 30)), max_size=5),
       st.integers(30, 130))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_no_line_is_wider_than_the_terminal_and_ascii_holds_only_printable_ascii(shapes, width):
    panels = [Panel(title, np.full((height, side), 7)) for title, height, side in shapes]
    text = side_by_side(panels, ASCII, width)
    assert all(" " <= char <= "~" or char == "\n" for char in text)
    assert text.count("7") == sum(height * side + title.count("7") for title, height, side in shapes)
    for style in (ASCII, COLORS_256, COLORS_24_BIT):
        assert max(map(len, visible(side_by_side(panels, style, width)).split("\n"))) <= width


def test_titles_cannot_carry_escapes_in_any_style():
    for style in (ASCII, COLORS_256):
        assert visible(side_by_side([Panel("\x1b[31m\u00e9\n", [[0] * 9])], style)).split("\n")[0] == "?[31m??"
    assert plain_text("a~ \x7f\x00") == "a~ ??"


@pytest.mark.parametrize(
    "stream, environ, supported",
    [
        (Stream(), {}, True),
        (Stream("UTF8"), {"TERM": "xterm"}, True),
        (Stream(terminal=False), {}, False),
        (Stream("cp1252"), {}, False),
        (Stream(None), {}, False),
        (Stream("no such encoding"), {}, False),
        (Stream(), {"NO_COLOR": "1"}, False),
        (Stream(), {"NO_COLOR": ""}, True),
        (Stream(), {"TERM": "dumb"}, False),
        (Stream(terminal=False), {"FORCE_COLOR": "1"}, True),
        (Stream(), {"FORCE_COLOR": "1", "TERM": "dumb"}, True),
        (Stream(), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        (Stream("cp1252"), {"FORCE_COLOR": "1"}, False),
    ],
)
def test_colors_are_used_where_the_stream_and_the_environment_allow_them(stream, environ, supported):
    assert supports_color(stream, environ) is supported
    assert (choose_style(stream, environ) == ASCII) is not supported


def test_true_colors_are_used_where_the_environment_names_them():
    assert choose_style(Stream(), {"COLORTERM": "truecolor"}) == COLORS_24_BIT
    assert choose_style(Stream(), {"FORCE_COLOR": "3"}) == COLORS_24_BIT
    assert choose_style(Stream(), {"COLORTERM": "yes"}) == COLORS_256


def test_probabilities_line():
    assert probabilities_line([0.614, None]) == "attempt 1: p = 0.61 | attempt 2: p = n/a"
