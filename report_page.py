"""Write report.html: what a run has learned, in one file that needs no network, and how two runs differ.

Made from the files of the run folder alone, so that a dead run can be reported on; what is missing is said on the page.
Imports config, report, intervals and the page's parts, no torch. Used by the driver and by verbs.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from config import PROGRAM, VERSION, ConfigError, TrainConfig, changed_flags, from_dict
from intervals import bootstrap_interval, wilson_interval
from page_parts import (
    MARKS,
    PALETTE,
    SIDE,
    Curve,
    Line,
    belief_png,
    curve_svg,
    error_map,
    esc,
    grid_image,
    grid_png,
    image,
    marks_png,
    smooth,
    table,
)
from page_style import CSS, SCRIPT
from report import duration, write_text_atomic
from run_record import Output, RunRecord, Validation, cells_of, one_color, shape_of, union_cells

ROWS_BYTES = 2_800_000  # of the gallery of all outputs
FRAMES_BYTES = 900_000  # of the epochs behind the slider
MAX_FRAMES = 30
PAUSE = 600.0  # seconds between two log lines that count as a pause
TERM = "efe_"
SIZES = ((3, "up to 3"), (10, "4 to 10"), (20, "11 to 20"), (30, "21 to 30"))  # the longer side of an output
SIGNS = {"r": "", "w": "\u00d7", "f": "+", "b": "\u2212", "s": "\u25cb"}
MEANING = {"w": "wrong", "f": "made right by the refinement", "b": "made wrong by it", "s": "sizes differ",
           "r": "right"}  # fmt: skip
KINDS = {"solved": "solved", "nearly": "nearly solved (95 % of the cells)", "size": "wrong size",
         "copy": "copies the input", "worse": "refinement hurt", "better": "refinement helped"}  # fmt: skip
MINUS, DASH = "\u2212", "\u2013"


def write_report(folder: Path, target: Path | None = None) -> Path:
    """Return the path of report.html after writing it to `target`, by default the run's own folder. Raises: OSError."""
    path = (target or folder) / "report.html"
    write_text_atomic(path, report_html(RunRecord.read(folder)))
    return path


def report_html(run: RunRecord) -> str:
    """Return the report of a run."""
    facts = Facts(run)
    sections = [
        section_scores(facts), section_curves(facts), section_sample(facts), section_gallery(facts),
        section_table(facts), section_breakdowns(facts), section_refinement(facts), section_memory(facts),
    ]  # fmt: skip
    body = [section_head(facts), section_health(facts), *sections, section_foot(facts)]  # problems are known by now
    return whole_page(f"Report of {run.name}", [body[0], section_problems(run), *body[1:]], facts.data)


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


# What the page is about ----------------------------------------------------------------------------------------------


def numeric(value: Any) -> float | None:
    """Return a value as a number; None where it is none, or not finite."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


@dataclass
class Facts:
    """A run, its last validation, and what the script is to know."""

    run: RunRecord
    data: dict[str, Any] = field(default_factory=lambda: {"epochs": [], "frames": [], "images": []})

    @cached_property
    def validation(self) -> Validation | None:
        """Return the last validation that left its outputs."""
        return self.run.validation(self.run.epochs[-1]) if self.run.epochs else None

    @property
    def outputs(self) -> Sequence[Output]:
        """Return the outputs of the last validation."""
        return self.validation.outputs if self.validation else ()

    @cached_property
    def shown(self) -> list[Output]:
        """Return the outputs whose grids are known, the most instructive first: nearly solved, then by their cells."""
        known = [output for output in self.outputs if output.grid("first") and output.grid("target")]
        return sorted(known, key=lambda o: (order_of(o), -(o.number("cells") or 0.0), o.key))

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """Return the epoch records, validated or not."""
        return self.run.of("epoch")

    @cached_property
    def scored(self) -> list[dict[str, Any]]:
        """Return the records of epochs that were validated."""
        return [record for record in self.epochs if numeric(record.get("val_exact")) is not None]

    @cached_property
    def last_step(self) -> float:
        """Return the number of batches done so far, as far as the log tells."""
        return max([numeric(record.get("step")) or 0.0 for record in self.run.metrics], default=0.0)

    @cached_property
    def config(self) -> TrainConfig | None:
        """Return the run's settings; None where they are missing or another version's."""
        if not self.run.settings:
            return None
        try:
            return from_dict(TrainConfig, self.run.settings)
        except ConfigError as error:
            self.run.problem(f"config.json holds settings of another version ({error})")
            return None


def order_of(output: Output) -> int:
    """Return where an output belongs in the gallery: nearly solved, then unsolved, then solved."""
    return 0 if "nearly" in output.kinds else 2 if "solved" in output.kinds else 1


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in percent."""
    return DASH if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def signed(value: float | None, digits: int = 3) -> str:
    """Return a number with its sign."""
    if value is None:
        return DASH
    return f"{value:+z.{digits}f}".replace("-", MINUS)


def fixed(value: float | None, digits: int = 3) -> str:
    """Return a number with so many decimals."""
    return DASH if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def counted(number: int, noun: str) -> str:
    """Return "1 task", "2 tasks"."""
    return f"{number} {noun}{'s' * (number != 1)}"


# 1. Head -------------------------------------------------------------------------------------------------------------


def section_head(facts: Facts) -> str:
    """Return what a reader wants to know first: the verdict, and what was run."""
    pairs = "".join(f"<dt>{esc(name)}</dt><dd>{value}</dd>" for name, value in head_facts(facts) if value)
    return f'<header><p class="dim">Report of a run</p><h1>{esc(verdict(facts))}</h1><dl class="facts">{pairs}</dl>' \
        "</header>\n"  # fmt: skip


def verdict(facts: Facts) -> str:
    """Return one or two sentences: how much is right, and whether that is more than the demonstrations alone say."""
    if not facts.scored:
        done = counted(int(facts.last_step), "batch").replace("batchs", "batches")
        state = facts.run.status.get("status", "unknown")
        return f"No epoch is validated yet: {done} done, status {state}."
    last = facts.scored[-1]
    right, of = (int(numeric(last.get(name)) or 0) for name in ("val_exact", "val_outputs"))
    low, high = wilson_interval(min(right, of), of)
    epoch = int(numeric(last.get("epoch")) or 0) + 1
    text = f"{right} of {counted(of, 'test grid')} exact after {counted(epoch, 'epoch')}" \
        f" ({percent(right / of if of else None)}, 95 % interval {percent(low)} to {percent(high)})"  # fmt: skip
    text += beside_prior(last, right)
    solved = solved_tasks(facts.outputs)
    return text + (f" {solved[0]} of {counted(solved[1], 'task')} solved entirely." if solved[1] else "")


def beside_prior(record: Mapping[str, Any], right: int) -> str:
    """Return the rest of the verdict's sentence: more, fewer, or not surely other than the demonstrations' prior."""
    prior, low, high = (numeric(record.get(f"val_exact{end}")) for end in ("_prior", "_low", "_high"))
    if prior is None or low is None or high is None:
        return "."
    how = "more than" if low > 0 else "fewer than" if high < 0 else "not surely other than"
    return f"; {how} the {prior:.0f} of the demonstrations alone (difference {signed(right - prior, 0)}," \
        f" 95 % interval {signed(low, 0)} to {signed(high, 0)})."  # fmt: skip


def solved_tasks(outputs: Sequence[Output]) -> tuple[int, int]:
    """Return (tasks with all outputs exact, tasks)."""
    tasks: dict[str, list[bool]] = defaultdict(list)
    for output in outputs:
        tasks[output.key[0]].append(output.flag("exact"))
    return sum(map(all, tasks.values())), len(tasks)


def head_facts(facts: Facts) -> list[tuple[str, str]]:
    """Return names and values (HTML) of what was run, where, and how long."""
    run, session = facts.run, facts.run.sessions[-1] if facts.run.sessions else {}
    packages = session.get("packages") if isinstance(session.get("packages"), dict) else {}
    status = f"{run.status.get('status', 'unknown')}, as of {run.status.get('updated', 'an unknown time')}"
    device = ", ".join(str(session[name]) for name in ("device", "precision") if session.get(name))
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if packages.get(name))
    settings = " ".join(changed_flags(facts.config)) if facts.config else ""
    seconds = trained_seconds(run.metrics)
    resumes = max(len(run.sessions) - 1, 0)
    took = f"{duration(seconds)} between log lines, {counted(len(run.sessions), 'session')}, {counted(resumes, 'resume')}"
    return [
        ("run", f"<code>{esc(run.name)}</code>"),
        ("status", esc(status)),
        ("data", esc(data_words(facts))),
        ("settings", f"<code>{esc(settings)}</code>" if settings else ""),
        ("computed on", esc(", ".join(filter(None, (device, str(session.get("platform", ""))))))),
        ("versions", esc(", ".join(filter(None, (f"ARC-EFE {run.facts.get('version', VERSION)}", versions))))),
        ("commit", f"<code>{esc(session['git_commit'])}</code>" if session.get("git_commit") else ""),
        ("time", esc(took)),
    ]


def data_words(facts: Facts) -> str:
    """Return which data, and in plain words what the scores are about."""
    if facts.config is None:
        return "unknown"
    data, hashed = facts.config.data, str(facts.run.facts.get("data_hash", ""))[:7]
    if data.protocol in ("", "arc2"):
        return f"{data.data} {hashed}: scored on unseen test pairs of the same tasks that are trained on"
    return f"protocol {data.protocol} {hashed}: scored on test pairs of {data.holdout} tasks held back from training"


def trained_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the time between the records of the log, pauses left out."""
    times = [time for record in records if (time := numeric(record.get("t"))) is not None]
    gaps = (later - earlier for earlier, later in zip(times, times[1:], strict=False))
    return sum(gap for gap in gaps if 0 < gap < PAUSE)


def section_problems(run: RunRecord) -> str:
    """Return what is missing or damaged; nothing when all is there."""
    if not run.problems:
        return ""
    lines = "".join(f"<li>{esc(problem)}</li>" for problem in run.problems)
    return f'<section class="problems"><h2>What this page could not use</h2><ul>{lines}</ul></section>\n'


# 2. Health -----------------------------------------------------------------------------------------------------------


def section_health(facts: Facts) -> str:
    """Return the flags, raised ones first, and the four indicators with where they have gone."""
    flags = {name: flag for name, flag in _dict(facts.run.status.get("flags")).items() if isinstance(flag, dict)}
    order = sorted(flags.items(), key=lambda both: not both[1].get("raised"))
    chips = "".join(_chip(name, flag) for name, flag in order)
    if not chips:
        nothing = "No flag was raised" if facts.run.status else "run.json is missing, so flags are not known"
        chips = f'<li class="chip {"green" if facts.run.status else "amber"}"><b>{nothing}</b></li>'
    return f'<section><h2>Health</h2><ul class="strip">{chips}</ul>{indicators(facts)}</section>\n'


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _chip(name: str, flag: Mapping[str, Any]) -> str:
    raised = bool(flag.get("raised"))
    state = "\u25cf raised" if raised else "\u25cb over"
    when = f"batches {flag.get('first', '?')} to {flag.get('last', '?')}, {flag.get('times', '?')} times"
    return (
        f'<li class="chip {"red" if raised else "amber"}"><b>{esc(name)} {state}</b> {esc(flag.get("problem", ""))}'
        f' <small>({esc(when)})</small><br><span class="dim">{esc(flag.get("advice", ""))}</span></li>'
    )


def indicators(facts: Facts) -> str:
    """Return the four numbers that the first design watched: first epoch, last epoch, and which way they went."""
    names = (
        ("Accuracy_Delta", "val_accuracy_delta", "what refining the prompt gained, in cells"),
        ("EFE_Loss", "loss", "mean of the epoch; should fall"),
        ("RL_Reward", "reward", "mean change of the potential by the policy's move"),
        ("Val_Accuracy", "val_accuracy", "exact outputs"),
    )
    rows = []
    for name, key, meaning in names:
        values = [value for record in facts.epochs if (value := numeric(record.get(key))) is not None]
        if values:
            step = values[-1] - values[0]
            arrow = "\u2191" if step > 1e-12 else "\u2193" if step < -1e-12 else "\u2192"
            rows.append([esc(name), fixed(values[0], 4), f"{arrow} {fixed(values[-1], 4)}", esc(meaning)])
    return table(("indicator", "first epoch", "last epoch", "meaning"), rows) if rows else ""


# 3. Scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A share of outputs or tasks, or a mean, with its 95 % interval."""

    value: float
    low: float
    high: float
    count: str = ""

    def cell(self) -> str:
        """Return it as a table's cell."""
        count = f" <small>{self.count}</small>" if self.count else ""
        return f"{percent(self.value)}{count}<br><small>{percent(self.low)} to {percent(self.high)}</small>"


def share(claims: Iterable[bool]) -> Score:
    """Return a proportion with Wilson's interval."""
    claims = [bool(claim) for claim in claims]
    right, of = sum(claims), len(claims)
    return Score(right / of if of else math.nan, *wilson_interval(right, of), f"{right}/{of}")


def mean_over_tasks(outputs: Sequence[Output], value: Callable[[Output], float], by_task: bool = False) -> Score:
    """Return a mean over outputs, or with `by_task` over the tasks' own means; bootstrap interval over tasks."""
    tasks: dict[str, list[float]] = defaultdict(list)
    for output in outputs:
        tasks[output.key[0]].append(value(output))
    values = [[math.fsum(some) / len(some)] if by_task else some for some in tasks.values()]
    sums, counts = [math.fsum(some) for some in values], [len(some) for some in values]
    total = sum(counts)
    return Score(math.fsum(sums) / total if total else math.nan, *bootstrap_interval(sums, counts))


Attempt = Callable[[Output], bool]


def section_scores(facts: Facts) -> str:
    """Return the scores under three rules beside the baselines."""
    outputs = facts.outputs
    if not outputs:
        return logged_scores(facts)
    known = [output for output in outputs if output.grid("target") and output.grid("input")]
    flags: dict[str, tuple[Attempt, Attempt]] = {
        "model": (lambda o: o.flag("exact"), lambda o: o.flag("two")),
        "demonstrations' prior": (lambda o: o.flag("prior"), lambda o: o.flag("prior_two")),
    }
    if len(known) == len(outputs):
        flags["copy the input"] = (lambda o: o.grid("input") == o.grid("target"),) * 2
        flags["one colour"] = (lambda o: len(set(cells_of(o.grid("target")))) == 1,) * 2
    rows = [row for n in (0, 1) for row in rule_rows(outputs, flags, n)]
    if len(known) == len(outputs):
        rows += cell_rows(outputs, list(flags))
    epoch = facts.validation.epoch
    said = (
        f"{counted(len(outputs), 'output')} in {counted(solved_tasks(outputs)[1], 'task')}, epoch {epoch}; each with its"
        " 95 % interval: Wilson's for counts, bootstrap over tasks for means. Differences smaller than the intervals say"
        " nothing."
    )
    names = table(("", *flags), rows)
    return f"<section><h2>Scores beside baselines</h2><p>{esc(said)}</p>{names}{true_size(facts)}</section>\n"


def rule_rows(outputs: Sequence[Output], flags: Mapping[str, tuple[Attempt, Attempt]], n: int) -> list[list[str]]:
    """Return the three scoring rules at one attempt (n 0) or two (n 1)."""
    tasks: dict[str, list[Output]] = defaultdict(list)
    for output in outputs:
        tasks[output.key[0]].append(output)
    attempts = "one attempt" if n == 0 else "two attempts"
    rules: dict[str, Callable[[Attempt], Score]] = {
        "outputs exact (Kaggle)": lambda right: share(map(right, outputs)),
        "mean of task fractions (leaderboard)": lambda right: mean_over_tasks(outputs, lambda o: float(right(o)), True),
        "tasks with all outputs exact (strict)": lambda right: share(all(map(right, some)) for some in tasks.values()),
    }
    return [[f"{rule}, {attempts}", *(compute(both[n]).cell() for both in flags.values())]
            for rule, compute in rules.items()]  # fmt: skip


def cell_rows(outputs: Sequence[Output], columns: Sequence[str]) -> list[list[str]]:
    """Return the rows about the first attempt's cells, size and colours."""

    def colors(grid: str) -> set[str]:
        return set(cells_of(grid))

    by_column: dict[str, Callable[[Output], str]] = {
        "model": lambda o: o.grid("first") or "0",
        "copy the input": lambda o: o.grid("input"),
        "one colour": lambda o: one_color(o.grid("target")),
    }
    rules: dict[str, Callable[[Callable[[Output], str]], Score]] = {
        "cells over the union of both areas": lambda grid: mean_over_tasks(
            outputs, lambda o: union_cells(grid(o), o.grid("target"))
        ),
        "right size": lambda grid: share(shape_of(grid(o)) == shape_of(o.grid("target")) for o in outputs),
        "right set of colours": lambda grid: share(colors(grid(o)) == colors(o.grid("target")) for o in outputs),
    }
    return [[f"{rule}, one attempt", *(compute(by_column[name]).cell() if name in by_column else DASH
                                       for name in columns)]
            for rule, compute in rules.items()]  # fmt: skip


def true_size(facts: Facts) -> str:
    """Return the share of right cells when the true size is given, which is no answer, and the size rule's."""
    if not facts.scored:
        return ""
    last = facts.scored[-1]
    values = [numeric(last.get(name)) for name in ("val_cells_true", "base_prior_cells", "base_copy_cells",
                                                   "base_color_cells", "val_size_accuracy", "base_rule_size")]  # fmt: skip
    text = "Cells with the true size given: model {}, prior {}, copying {}, one colour {}. Right sizes: model {}, rule {}."
    return f'<p class="dim">{esc(text.format(*map(percent, values)))}</p>'


def logged_scores(facts: Facts) -> str:
    """Return what the log alone knows of the scores."""
    if not facts.scored:
        return "<section><h2>Scores</h2><p>There was no validation yet.</p></section>\n"
    last = facts.scored[-1]
    of = int(numeric(last.get("val_outputs")) or 0)
    rows = []
    for label, names in (("one attempt", ("val_exact", "val_exact_prior", "base_copy_exact", "base_color_exact")),
                         ("two attempts", ("val_two_exact", "val_two_exact_prior"))):  # fmt: skip
        counts = [numeric(last.get(name)) for name in names]
        cells = [DASH if n is None else share([True] * int(n) + [False] * (of - int(n))).cell() for n in counts]
        rows.append([f"outputs exact, {label}", *cells, *[DASH] * (4 - len(cells))])
    head = ("", "model", "demonstrations' prior", "copy the input", "one colour")
    return (
        "<section><h2>Scores beside baselines</h2><p>From the log alone: no file holds the single outputs, so there"
        f" are no grids below.</p>{table(head, rows)}{true_size(facts)}</section>\n"
    )


# 4. Curves -----------------------------------------------------------------------------------------------------------


def section_curves(facts: Facts) -> str:
    """Return the curves, over batches, with marks where the run was resumed or went back."""
    marks = resume_marks(facts)
    drawn = "".join(curve_svg(curve, facts.last_step, marks) for curve in curves(facts))
    kinds = {letter for _, letter in marks}
    words = [word for letter, word in (("R", "R: resumed"), ("B", "B: back to a checkpoint")) if letter in kinds]
    said = "; ".join(["faint: every log line, bold: moving average, dots: epochs", *words])
    return f'<section><h2>Curves</h2><p class="dim">{esc(said)}.</p><div class="curves">{drawn}</div></section>\n'


def series(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return the points (batch, value) of a quantity in the records that have it."""
    pairs = ((numeric(record.get("step")), numeric(record.get(name))) for record in records)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def batch_curve(facts: Facts, title: str, name: str, is_log: bool = False) -> Curve:
    """Return the curve of a quantity that each log line holds."""
    points = series(facts.run.of("batch"), name)
    return Curve(title, [Line(points, style="faint"), Line(smooth(points))], is_log=is_log)


def curves(facts: Facts) -> list[Curve]:
    """Return all curves; those of quantities that were never measured are left out, save the first four."""
    last = facts.scored[-1] if facts.scored else {}

    def levels(*names: tuple[str, str]) -> list[tuple[float, str]]:
        return [(value, word) for name, word in names if (value := numeric(last.get(name))) is not None]

    scored = facts.scored
    first = [
        batch_curve(facts, "EFE loss", "efe_loss"),
        Curve("test grids exact", [Line(series(scored, "val_exact"), "model"),
                                   Line(series(scored, "val_two_exact"), "two", "second", "4 2")],
              levels(("base_prior_exact", "prior"), ("base_color_exact", "one colour"))),
        Curve("cells right, predicted size", [Line(series(scored, "val_cells_predicted"), "model"),
                                              Line(series(scored, "val_cells_unrefined"), "plain", "second", "4 2")]),
        Curve("cells right, true size", [Line(series(scored, "val_cells_true"), "model")],
              levels(("base_prior_cells", "prior"), ("base_copy_cells", "copying"), ("base_color_cells", "one colour"))),
    ]  # fmt: skip
    delta = [(record["step"], *ends) for record in scored if numeric(record.get("step")) is not None
             and None not in (ends := [numeric(record.get(f"val_accuracy_delta{e}")) for e in ("_low", "_high")])]  # fmt: skip
    more = [
        Curve("accuracy delta, 95 % interval", [Line(series(scored, "val_accuracy_delta"))], [(0.0, "0")], delta),
        batch_curve(facts, "reward", "reward"),
        batch_curve(facts, "Qwen gradient norm (log)", "qwen_grad", True),
        batch_curve(facts, "Qwen update ratio (log)", "qwen_upd", True),
        batch_curve(facts, "gradient norm of all (log)", "grad_norm", True),
        batch_curve(facts, "mask: share of wrong cells", "mask"),
        Curve("nats gained over the prior", [Line(series(scored, "val_nats_gained"))], [(0.0, "0")]),
        Curve("prompt gap, nats", [Line(series(scored, "val_prompt_gap"))], [(0.0, "0")]),
        batch_curve(facts, "memory: entries", "memory"),
        batch_curve(facts, "memory: threshold", "threshold"),
        Curve("seconds per batch", [Line(batch_seconds(facts), style="faint"), Line(smooth(batch_seconds(facts)))]),
        batch_curve(facts, "learning rate", "lr"),
        batch_curve(facts, "loss scale (log)", "scale", True),
        batch_curve(facts, "skipped steps", "skipped"),
    ]
    names = dict.fromkeys(name for record in facts.run.of("batch") for name in record
                          if name.startswith(TERM) and name != "efe_loss")  # fmt: skip
    terms = [batch_curve(facts, f"term: {name.removeprefix(TERM)}, weighted", name) for name in names]
    return first + [curve for curve in (*more, *terms) if any(line.points for line in curve.lines)]


def batch_seconds(facts: Facts) -> list[tuple[float, float]]:
    """Return the time per batch between two log lines of the same epoch."""
    points, before = [], None
    for record in facts.run.of("batch"):
        now = tuple(numeric(record.get(name)) for name in ("epoch", "step", "t"))
        if None not in now:
            if before and before[0] == now[0] and now[1] > before[1] and 0 < now[2] - before[2] < PAUSE:
                points.append((now[1], (now[2] - before[2]) / (now[1] - before[1])))
            before = now
    return points


def resume_marks(facts: Facts) -> list[tuple[float, str]]:
    """Return where sessions resumed (R) and where the run went back to a checkpoint (B), in batches."""
    found = [(step, "B") for record in facts.run.of("rollback") if (step := numeric(record.get("step"))) is not None]
    for session in facts.run.status.get("sessions") or []:
        words = re.match(r"epoch (\d{1,9}), batch (\d{1,9})/", str(_dict(session).get("resumed_at", "")))
        if words:
            found.append((step_at(facts, int(words[1]), int(words[2])), "R"))
    return sorted(found)


def step_at(facts: Facts, epoch: int, batch: int) -> float:
    """Return the number of all batches done at a batch of an epoch, as the log's own numbers tell."""
    for record in facts.run.of("batch"):
        place = [numeric(record.get(name)) for name in ("epoch", "batch", "step")]
        if None not in place and place[0] == epoch:
            return place[2] - place[1] + batch
    before = [numeric(r.get("step")) or 0.0 for r in facts.run.metrics if (numeric(r.get("epoch")) or 0.0) < epoch]
    return max(before, default=0.0) + batch


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
        f'<label class="js">epoch <input type="range" id="epoch" min="0" max="{count - 1}" value="{count - 1}" step="1">'
        f'</label><output id="which">epoch {shown}</output>' if count > 1 else f"<span>epoch {shown}</span>"
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
        f"{demonstrations(output)}{neighbours(output)}</div>\n"
    )


def name_of(output: Output) -> str:
    """Return how an output is called."""
    return f"{output.key[0]}, test input {output.key[1]}"


def pictures_of(output: Output) -> list[tuple[str, tuple[int, int], str, str]]:
    """Return (PNG in base64, its shape, title, caption) of what was planned: each step, the attempts, the errors."""
    found = []
    target = output.grid("target")
    for number, (grid, confidence) in enumerate(output.record.get("planning", []), start=1):
        tenths = [int(digit) + 0.5 for digit in cells_of(confidence)]
        right = f", {percent(union_cells(grid, target), 0)} right"
        caption = f"step {number}: p about {sum(tenths) / len(tenths) / 10:.2f}{right}"
        found.append((belief_png(grid, confidence), shape_of(grid), f"step {number}", caption))
    named = [("plain prompt", output.unrefined), ("attempt 1", output.grid("first")), ("attempt 2", output.grid("second"))]
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
    mark = "\u2713 exact" if output.flag("exact") else "\u2713 second attempt exact" if output.flag("two") else "\u2717 not exact"
    first = output.grid("first")
    size = "{}x{}".format(*shape_of(first)) if first else DASH
    true = "{}x{}".format(*shape_of(output.grid("target"))) if output.grid("target") else DASH
    parts = [mark, f"size {size}, true {true}", f"{percent(output.number('cells'))} of the cells"]
    if output.delta:
        parts.append(f"refinement {signed(100 * output.delta, 1)} points")
    steps = output.number("steps")
    parts.append("answered at once by the prior" if output.flag("at_once") else f"{steps or 0:.0f} planning steps counted")
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


def demonstrations(output: Output) -> str:
    """Return the demonstrations of a task, folded."""
    pairs = output.task.get("demonstrations", [])
    drawn = "".join(f'<div class="pair">{grid_image(a, "input", side=84)}{arrow()}{grid_image(b, "output", side=84)}</div>'
                    for a, b in pairs)  # fmt: skip
    return f'<details><summary>{counted(len(pairs), "demonstration")}</summary><div class="grids">{drawn}</div></details>'


def arrow() -> str:
    """Return an arrow between two grids."""
    return '<span aria-hidden="true">\u2192</span>'


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
    grids = ""
    if entry.get("input") and entry.get("output"):
        grids = f"{grid_image(entry['input'], 'input', side=84)}{arrow()}{grid_image(entry['output'], 'output', side=84)}"
    leak = " leak" if is_leak else ""
    return f'<div class="{leak.strip()}"><div class="pair">{grids}</div><small>{said}</small></div>'


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
    head = ("task", "test", "demos", "input", "output", "predicted", "exact", "two", "prior", "cells", "cells, plain prompt",
            "refinement", "cells, true size", "nats", "nats, prior", "steps", "recalled")  # fmt: skip
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
        value(output.number("unrefined_cells")), value(output.delta, 3, True), value(output.number("cells_true")),
        value(output.number("nats")), value(output.number("prior_nats")), value(output.number("steps"), 0),
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
    groups: dict[str, Callable[[Output], tuple[int, str]]] = {
        "longer side of the output": lambda o: _bin(max(shape_of(o.grid("target")))),
        "size": lambda o: (0, "as the input") if shape_of(o.grid("target")) == shape_of(o.grid("input")) else (1, "changed"),
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
        return "<h3>Sizes</h3><p>All sizes are right.</p>"
    rows = [["{}x{}".format(*true), "{}x{}".format(*found), str(count)] for (true, found), count in wrong[:12]]
    said = f"{sum(count for _, count in wrong)} wrong sizes of {len(outputs)}; the most frequent ones:"
    return f"<h3>Sizes</h3><p>{said}</p>{table(('true size', 'predicted', 'outputs'), rows)}"


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
    said = (
        f"Compared with the prompt as written, refinement helped {counted(len(helped), 'output')} ({made} became exact),"
        f" hurt {len(hurt)} ({lost} were exact before), and left the cells of {len(facts.shown) - len(changed)} as they"
        f" were. Mean {signed(100 * mean.value, 2)} points of cells, 95 % interval {signed(100 * mean.low, 2)} to"
        f" {signed(100 * mean.high, 2)}."
    )
    parts = [f"<h3>{title}</h3>{''.join(map(before_and_after, some))}"
             for title, some in (("Helped most", helped[::-1][:6]), ("Hurt most", hurt[:6])) if some]  # fmt: skip
    return f"<section><h2>What the refined prompt is worth</h2><p>{esc(said)}</p>{''.join(parts)}</section>\n"


def before_and_after(output: Output) -> str:
    """Return an output under the prompt as written and under the refined one."""
    marks = error_map(output.grid("first"), output.unrefined, output.grid("target"))
    drawn = [grid_image(grid, title, side=110) for grid, title in (
        (output.grid("target"), "target"), (output.unrefined, "plain prompt"), (output.grid("first"), "refined prompt"))]  # fmt: skip
    drawn.append(image(marks_png(marks), *shape_of(marks), "errors", marks_words(marks), 110, ' data-marks="1"'))
    return (f'<p><code>{esc(name_of(output))}</code> {signed(100 * output.delta, 1)} points</p>'
            f'<div class="grids">{"".join(drawn)}</div>')  # fmt: skip


def section_memory(facts: Facts) -> str:
    """Return what the memory holds, as the last validation found it."""
    memory = _dict(facts.validation.head.get("memory")) if facts.validation else {}
    if not memory:
        return ""
    numbers = {name: numeric(value) for name, value in memory.items()}

    def n(name: str) -> str:
        value = numbers.get(name)
        return DASH if value is None else f"{value:.0f}"

    said = (
        f"{n('size')} of {n('capacity')} entries; {n('offered')} pairs offered, {n('admissions')} admitted, {n('replaced')}"
        f" replaced, {n('evicted')} removed. Threshold {fixed(numbers.get('theta'))}. {percent(numbers.get('hit_rate'))}"
        f" of the queries recalled something; {n('never_used')} entries were never used."
    )
    bars = histogram("scores of the entries", memory.get("scores"), 1.0, numbers.get("theta"), "threshold")
    bars += histogram("age of the entries, in batches", memory.get("ages"), numbers.get("oldest") or 1.0)
    parts = []
    for title, name in (("Most used", "most_used"), ("Never used, newest first", "unused")):
        entries = [entry for entry in memory.get(name) or [] if usable_entry(entry)]
        drawn = "".join(entry_pair(entry, entry_words(entry)) for entry in entries)
        parts.append(f'<h3>{title}</h3><div class="grids">{drawn}</div>' if drawn else "")
    return f'<section><h2>Memory</h2><p>{esc(said)}</p><div class="curves">{bars}</div>{"".join(parts)}</section>\n'


def usable_entry(entry: Any) -> bool:
    """Return whether an entry can be shown: its grids, where it has any, are grids."""
    from run_record import is_grid

    return isinstance(entry, dict) and all(is_grid(entry[name]) for name in ("input", "output") if name in entry)


def entry_words(entry: Mapping[str, Any]) -> str:
    """Return what is known of an entry of the memory."""
    hits, score, gain = (numeric(entry.get(name)) for name in ("hits", "score", "gain"))
    used = "" if not hits else f"used {hits:.0f} times, "
    return f"{used}score {fixed(score, 2)}, gain {signed(gain, 3)}"


def histogram(title: str, counts: Any, end: float, line: float | None = None, name: str = "") -> str:
    """Return bars of counts over equal parts of 0 to `end`, with a vertical line; nothing where there are no counts."""
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
        x = 10 + 300 * min(max(line / end, 0.0), 1.0)
        bars += f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="12" y2="{base}"/>' \
            f'<text class="dim" x="{x:.1f}" y="9" text-anchor="end">{esc(name)} {line:.3g}</text>'  # fmt: skip
    ends = f'<text class="dim" x="10" y="122">0</text><text class="dim" x="310" y="122" text-anchor="end">{end:g}</text>'
    return f'<div class="curve"><h4>{esc(title)}, at most {max(values):.0f}</h4><svg viewBox="0 0 320 128" role="img"' \
        f' aria-label="{esc(title)}">{bars}{ends}</svg></div>'  # fmt: skip


# 9. Foot -------------------------------------------------------------------------------------------------------------


def section_foot(facts: Facts) -> str:
    """Return how the run was started, how it goes on, and where its files lie."""
    run = facts.run
    commands = [shlex.join(["python", *map(str, s["argv"])]) for s in run.sessions if isinstance(s.get("argv"), list)]
    seed = facts.config.run.seed if facts.config else "unknown"
    out = facts.config.run.out if facts.config else "runs"
    resume = shlex.join(["python", PROGRAM, "--resume", f"{out}/{run.name}"])
    state = run.status.get("status")
    goes_on = "To extend it, with a larger --epochs" if state == "finished" else "To go on where it stopped"
    session = run.sessions[-1] if run.sessions else {}
    packages = ", ".join(f"{name} {version}" for name, version in _dict(session.get("packages")).items() if version)
    made = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    return (
        f"<footer><h2>To do it again</h2>{''.join(f'<pre>{esc(command)}</pre>' for command in commands[:1])}"
        f"<p>{goes_on}:</p><pre>{esc(resume)}</pre><p class=\"dim\">Seed {esc(seed)}, data hash"
        f" <code>{esc(run.facts.get('data_hash', 'unknown'))}</code>. Python {esc(session.get('python', '?'))},"
        f" {esc(packages)}.<br>Made from the files in <code>{esc(run.name)}/</code> on {made} by ARC-EFE {VERSION};"
        f" <code>python {PROGRAM} report</code> makes it again.</p></footer>\n"
    )
