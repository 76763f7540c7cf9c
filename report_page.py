"""Write report.html: what a run has learned, in one file that needs no network, and how two runs differ.

Made from the files of the run folder alone, so that a dead run can be reported on; what is missing is said on the page.
Imports config, report and the other modules of the page, no torch. Used by the driver and by verbs.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from config import PROGRAM, VERSION, changed_flags
from page_facts import Facts, Score, mean_over_tasks, proportion, share, solved_tasks
from page_outputs import (
    section_breakdowns,
    section_gallery,
    section_memory,
    section_refinement,
    section_sample,
    section_table,
)
from page_parts import (
    DASH,
    Curve,
    Line,
    as_dict,
    counted,
    curve_svg,
    esc,
    fixed,
    numeric,
    percent,
    signed,
    smooth,
    table,
    whole_page,
)
from report import duration, write_text_atomic
from run_record import Output, RunRecord, cells_of, one_color, shape_of, union_cells

PAUSE = 600.0  # seconds between two log lines that count as a pause
TERM = "efe_"


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


# 1. Head -------------------------------------------------------------------------------------------------------------


def section_head(facts: Facts) -> str:
    """Return what a reader wants to know first: the verdict, and what was run."""
    pairs = "".join(f"<dt>{esc(name)}</dt><dd>{value}</dd>" for name, value in head_facts(facts) if value)
    return f'<header><p class="dim">Report of a run</p><h1>{esc(verdict(facts))}</h1><dl class="facts">{pairs}</dl>' \
        "</header>\n"  # fmt: skip


def verdict(facts: Facts) -> str:
    """Return one or two sentences: how much is right, and whether that is more than the demonstrations alone say."""
    if not facts.scored:
        done = counted(int(facts.last_step), "batch")
        state = facts.run.status.get("status", "unknown")
        return f"No epoch is validated yet: {done} done, status {state}."
    last = facts.scored[-1]
    right, of = (int(numeric(last.get(name)) or 0) for name in ("val_exact", "val_outputs"))
    score = proportion(right, of)
    epoch = int(numeric(last.get("epoch")) or 0) + 1
    text = f"{right} of {counted(of, 'test grid')} exact after {counted(epoch, 'epoch')}" \
        f" ({percent(score.value)}, 95 % interval {percent(score.low)} to {percent(score.high)})"  # fmt: skip
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
    times = f"{counted(len(run.sessions), 'session')}, {counted(resumes, 'resume')}"
    took = f"{duration(seconds)} between log lines, {times}"
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
    flags = {name: flag for name, flag in as_dict(facts.run.status.get("flags")).items() if isinstance(flag, dict)}
    order = sorted(flags.items(), key=lambda both: not both[1].get("raised"))
    chips = "".join(_chip(name, flag) for name, flag in order)
    if not chips:
        nothing = "No flag was raised" if facts.run.status else "run.json is missing, so flags are not known"
        chips = f'<li class="chip {"green" if facts.run.status else "amber"}"><b>{nothing}</b></li>'
    return f'<section><h2>Health</h2><ul class="strip">{chips}</ul>{indicators(facts)}</section>\n'


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
    return table(("indicator", "first epoch", "last epoch", "meaning"), rows, "words") if rows else ""


# 3. Scores -----------------------------------------------------------------------------------------------------------


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
    of = f"{counted(len(outputs), 'output')} in {counted(solved_tasks(outputs)[1], 'task')}"
    said = (
        f"{of}, epoch {epoch}; each with its 95 % interval: Wilson's for counts, bootstrap over tasks for means."
        " Differences smaller than the intervals say nothing."
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
    names = ("val_cells_true", "base_prior_cells", "base_copy_cells", "base_color_cells", "val_size_accuracy",
             "base_rule_size")  # fmt: skip
    text = (
        "With the true size given, cells right: model {}, prior {}, copying {}, one colour {}. Right sizes: model {},"
        " the size rule {}."
    )
    return f'<p class="dim">{esc(text.format(*(percent(numeric(last.get(name))) for name in names)))}</p>'


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
        cells = [DASH if n is None else proportion(int(n), of).cell() for n in counts]
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

    def drawn(some: Iterable[Curve]) -> str:
        return f'<div class="curves">{"".join(curve_svg(curve, facts.last_step, marks) for curve in some)}</div>'

    kinds = {letter for _, letter in marks}
    words = [word for letter, word in (("R", "R: resumed"), ("B", "B: back to a checkpoint")) if letter in kinds]
    said = "; ".join(["over batches; faint: every log line, bold: moving average", *words])
    first, more, terms = curves(facts)
    folded = [f"<details><summary>{title}</summary>{drawn(some)}</details>"
              for title, some in (("how it trains", more), ("the terms of the loss, weighted", terms)) if some]
    return f'<section><h2>Curves</h2><p class="dim">{esc(said)}.</p>{drawn(first)}{"".join(folded)}</section>\n'


def series(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return the points (batch, value) of a quantity in the records that have it."""
    pairs = ((numeric(record.get("step")), numeric(record.get(name))) for record in records)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def batch_curve(facts: Facts, title: str, name: str, is_log: bool = False) -> Curve:
    """Return the curve of a quantity that each log line holds."""
    points = series(facts.run.of("batch"), name)
    return Curve(title, [Line(points, style="faint"), Line(smooth(points))], is_log=is_log)


def curves(facts: Facts) -> tuple[list[Curve], list[Curve], list[Curve]]:
    """Return the curves to look at first, those about the training, and those of the loss's terms.

    Of the last two, quantities that were never measured are left out.
    """
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
              levels(("base_prior_cells", "prior"), ("base_copy_cells", "copying"),
                     ("base_color_cells", "one colour"))),
    ]  # fmt: skip
    ends = [series(scored, f"val_accuracy_delta{end}") for end in ("_low", "_high")]
    band = [(step, low, high) for (step, low), (_, high) in zip(*ends, strict=False)]
    first += [
        Curve("accuracy delta, 95 % interval", [Line(series(scored, "val_accuracy_delta"))], [(0.0, "0")], band),
        batch_curve(facts, "Qwen update ratio (log)", "qwen_upd", True),
    ]
    more = [
        batch_curve(facts, "reward", "reward"),
        batch_curve(facts, "Qwen gradient norm (log)", "qwen_grad", True),
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
    terms = [batch_curve(facts, name.removeprefix(TERM), name) for name in names]
    measured = [[curve for curve in some if any(line.points for line in curve.lines)] for some in (more, terms)]
    return first, *measured


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
    sessions = facts.run.status.get("sessions")
    for session in sessions if isinstance(sessions, list) else ():
        words = re.match(r"epoch (\d{1,9}), batch (\d{1,9})/", str(as_dict(session).get("resumed_at", "")))
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
    packages = ", ".join(f"{name} {version}" for name, version in as_dict(session.get("packages")).items() if version)
    made = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    return (
        f"<footer><h2>To do it again</h2>{''.join(f'<pre>{esc(command)}</pre>' for command in commands[:1])}"
        f"<p>{goes_on}:</p><pre>{esc(resume)}</pre><p class=\"dim\">Seed {esc(seed)}, data hash"
        f" <code>{esc(run.facts.get('data_hash', 'unknown'))}</code>. Python {esc(session.get('python', '?'))},"
        f" {esc(packages)}.<br>Made from the files in <code>{esc(run.name)}/</code> on {made} by ARC-EFE {VERSION};"
        f" <code>python {PROGRAM} report</code> makes it again.</p></footer>\n"
    )
