"""Write curves.png: eight curves of a run in one picture, for a README or a notebook.

Needs matplotlib, which is no dependency: where it is not installed there is no picture. Imports page_facts, report_page
and the page's parts. Used by the driver and by report_command.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from page_facts import Facts
from page_parts import Curve
from report_page import curves
from run_record import RunRecord

PANELS = ("EFE loss", "test grids exact", "cells right, true size", "accuracy delta, 95 % interval", "reward",
          "Qwen update ratio (log)", "memory: entries", "seconds per batch")  # fmt: skip


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_curves(folder: Path, target: Path | None = None) -> Path | None:
    """Return the path of curves.png after writing it, by default to the run's folder; None without matplotlib.

    Raises: OSError.
    """
    if not can_draw():
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    facts = Facts(RunRecord.read(folder))
    found = {curve.title: curve for some in curves(facts) for curve in some}
    figure = Figure(figsize=(16, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, title in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
        draw(axes, found.get(title, Curve(title, ())))
    path = (target or folder) / "curves.png"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=90)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def draw(axes: Any, curve: Curve) -> None:
    """Draw a curve into a panel."""
    axes.set_title(curve.title, fontsize=11)
    styles = {"faint": {"alpha": 0.35, "linewidth": 1, "color": "C0"}, "second": {"color": "C1", "linestyle": "--"}}
    for line in curve.lines:
        if line.points:
            marker = "o" if len(line.points) < 3 else ""
            axes.plot(*zip(*line.points, strict=True), marker=marker, label=line.name or None,
                      **styles.get(line.style, {"color": "C0"}))  # fmt: skip
    if curve.band:
        axes.fill_between(*zip(*curve.band, strict=True), alpha=0.2)
    for value, name in curve.levels:
        axes.axhline(value, color="0.4", linestyle=":", linewidth=1)
        axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), fontsize=8, color="0.4", ha="right")
    if curve.is_log and any(y > 0 for line in curve.lines for _, y in line.points):
        axes.set_yscale("log")
    if any(line.name and line.points for line in curve.lines):
        axes.legend(fontsize=8, loc="best")
    axes.tick_params(labelsize=8)
