"""The preference C: what the demonstrations of a task alone say about the colours of an output of a given shape.

A Bayesian mixture of voices: hypotheses of the bank, each followed by a colour map; tables of what surrounds a cell; a
tree that chooses between hypotheses cell by cell; all of them again for rewritten tasks. What a voice weighs is its
evidence: how well it predicts each demonstration from the others. Imports numpy and the modules of hypotheses; used by
prior_store, prior_cache and benchmarks/prior.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from answer_traits import NUM_MISFITS, misfits
from cell_features import experts, features, keys
from expert_tree import Cells, bagged_left_out, predict_left_out
from grid_hypotheses import LAYERS, NUM_COLORS, NUM_SYMBOLS, Grid, Layer, Scene, Shape, label
from motion_hypotheses import MOTION_LAYERS
from part_hypotheses import PART_LAYERS
from size_hypotheses import size_prior, size_rule
from task_rewrites import Rewrite, ranked_colors, replaced_inputs, turned_alike

__all__ = ["EFFORTS", "Demonstrations", "Grid", "Preference", "Shape", "demo_prior", "size_prior", "size_rule"]

Demonstrations = Sequence[tuple[Grid, Grid]]
Candidate = tuple[Grid, float, str]  # grid, weight, name of the voice

EFFORTS = ("standard", "full")
MAX_DEMONSTRATIONS = 16  # those after them are left out
OWN_CANDIDATES = 16  # of the mixture and of its voices, that are kept of a preference
REPAIRS = 8  # candidates that differ from the first in one region
MAX_CANDIDATES = OWN_CANDIDATES + REPAIRS
SURE, SURE_CANDIDATES = 0.95, 8  # where the first is right so surely, only so many are kept and none is repaired
NO_MISFITS = np.zeros((0, NUM_MISFITS), np.float16)
EVIDENCE_FLOOR = 1e-3  # uniform share of every voice when it is judged
HISTOGRAM_SMOOTHING = 0.1  # added to each colour of the summed histograms
INPUT_SHARE = 0.4  # weight of the input's own colours in the histogram
TREE_PRIOR, TABLE_PRIOR = 4.0, -1.0  # log weights of trees and tables beside single layers
BACKOFF = 0.5  # weight of what counts back off to, in cells
MAX_READINGS = 40
LAYER_VOICES = 8  # best layers that speak for themselves
PAIRED_LAYERS = 6  # best layers whose pairs speak
TREE_LAYERS = 16
LAYERS_PER_FAMILY = 2
TREE_CELLS = 150  # a demonstration with more cells weighs no more than this many
TREE_SAMPLE = 200  # cells of a demonstration that keep their colour, and that change it, which a tree looks at
LOCAL_PRIOR = -0.5  # log prior of experts that are not layers
EXPLAINED = 0.005  # nats per cell below which no rewriting is tried
LARGE = 3000  # known cells beyond which the effort is always standard, so that the time is bounded
COMPOSED = 2  # rewritten inputs that are followed up, of all that apply
COMPOSED_PRIOR = -2.0
BANK: tuple[Layer, ...] = (*LAYERS, *PART_LAYERS, *MOTION_LAYERS)
EYE = np.eye(NUM_COLORS)


@dataclass(frozen=True, eq=False)
class Preference:
    """C for one input at one output shape.

    log_prob float32 [h, w, 10], normalised, no probability below 0.0005; confidence in [0, 1]: the probability that the
    first candidate is right, as calibrated on tasks with known answers; candidates (grid uint8, weight, name), at most
    MAX_CANDIDATES, all different, weights sum to 1: those of the voices, best first, then repaired ones, whose names
    begin with REPAIRED; misfits float16 [candidates, NUM_MISFITS]: the rules of the task that they break.
    """

    log_prob: np.ndarray
    confidence: float
    candidates: list[Candidate]
    misfits: np.ndarray


def demo_prior(
    demonstrations: Demonstrations, test_input: Grid, shape: Shape, *, effort: str = "standard"
) -> Preference:
    """Return the preference for the output of `test_input` at `shape`; effort "full" thinks several times longer.

    Shapes: [h, w] grids -> log_prob [h, w, 10].  Raises: ValueError for another effort.
    """
    if effort not in EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    shape = int(shape[0]), int(shape[1])
    known = tuple(demonstrations[:MAX_DEMONSTRATIONS])
    found = _mix(all_voices(known, test_input, shape, effort), len(demonstrations), shape)
    if found.confidence >= SURE:
        kept = found.candidates[:SURE_CANDIDATES]
    else:
        kept = found.candidates[:OWN_CANDIDATES]
        kept = kept + repaired(found.log_prob, kept)
    total = sum(weight for _, weight, _ in kept)
    candidates = [(grid, weight / total, name) for grid, weight, name in kept]
    return replace(found, candidates=candidates, misfits=misfits(known, test_input, [grid for grid, _, _ in kept]))


# 1. The cells of a task -----------------------------------------------------------------------------------------------


class Sheet:
    """One grid at one output shape: its scene, the layers that apply and what they lead to, computed when asked."""

    def __init__(self, grid: Grid, shape: Shape):
        self.scene, self.shape = Scene(grid), shape
        self._layers: dict[str, np.ndarray | None] = {}

    def read(self, layer: Layer) -> np.ndarray | None:
        """Return the layer's symbols, flat, None where it does not apply."""
        if layer.name not in self._layers:
            found = layer.function(self.scene, self.shape)
            self._layers[layer.name] = None if found is None else found.astype(np.uint8).ravel()
        return self._layers[layer.name]

    @cached_property
    def keys(self) -> dict[str, np.ndarray]:
        """The function keys of the scene."""
        return keys(self.scene)


@lru_cache(maxsize=256)
def _cached_sheet(data: bytes, rows: int, columns: int, shape: Shape) -> Sheet:
    return Sheet(np.frombuffer(data, np.uint8).reshape(rows, columns), shape)


def _sheet(grid: Grid, shape: Shape) -> Sheet:
    """Return the sheet of a grid; the tasks of one pair after another share most of their grids."""
    return _cached_sheet(np.ascontiguousarray(grid, np.uint8).tobytes(), *grid.shape, shape)


class Problem:
    """The output cells of a task in a row: those of the demonstrations, whose colours are known, then the wanted ones.

    Groups 0..D-1 are the demonstrations, group D is the test. What is said about a group comes from the others.
    """

    def __init__(self, demonstrations: Demonstrations, test_input: Grid, shape: Shape):
        self.count = len(demonstrations)
        self.answers = [b for _, b in demonstrations]
        self.shapes = [*(b.shape for b in self.answers), shape]
        inputs = [*(a for a, _ in demonstrations), test_input]
        self.sheets = [_sheet(grid, s) for grid, s in zip(inputs, self.shapes, strict=True)]
        sizes = [math.prod(s) for s in self.shapes]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.num_known = int(self.starts[-2])
        self.group = np.repeat(np.arange(self.count + 1), sizes)
        self.known = self.group[: self.num_known]
        self.colors = np.concatenate([np.zeros(0, np.int64), *(b.ravel() for b in self.answers)]).astype(np.int64)

    @cached_property
    def histogram(self) -> np.ndarray:
        """Colours to expect in each group [D + 1, 10]: those of the other outputs and of the group's own input."""
        shares = np.array([_counts(b) / b.size for b in self.answers]).reshape(-1, NUM_COLORS)
        inputs = np.array([sheet.scene.counts / sheet.scene.grid.size for sheet in self.sheets])
        total = shares.sum(0, keepdims=True)
        rest = np.concatenate([total - shares, total]) + HISTOGRAM_SMOOTHING
        return (1 - INPUT_SHARE) * rest / rest.sum(1, keepdims=True) + INPUT_SHARE * inputs

    @cached_property
    def palette(self) -> np.ndarray:
        """The colours of all grids, in order of their first appearance."""
        grids = [*(sheet.scene.grid.ravel() for sheet in self.sheets), self.colors]
        return np.array(list(dict.fromkeys(np.concatenate(grids).tolist())))

    def split(self, flat: np.ndarray) -> list[np.ndarray]:
        """Return the grids, one for each group, whose cells are `flat`."""
        ends = zip(self.starts[:-1], self.starts[1:], self.shapes, strict=True)
        return [flat[a:b].reshape(shape) for a, b, shape in ends]

    def voice(self, name: str, prob: np.ndarray) -> Voice:
        """Return the voice that gives all cells the probabilities [N + n, 10]."""
        return self.judged(name, prob[np.arange(self.num_known), self.colors], prob[self.num_known :])

    def judged(self, name: str, right: np.ndarray, prob: np.ndarray) -> Voice:
        """Return a voice: probabilities `right` [N] of the known colours, and `prob` [n, 10] of the test's cells."""
        evidence = float(np.log((1 - EVIDENCE_FLOOR) * right + EVIDENCE_FLOOR / NUM_COLORS).sum())
        return Voice(name, evidence, prob, self.num_known)


class Voice(NamedTuple):
    """What one hypothesis says: log-likelihood of the `cells` known ones, each predicted from the other groups, and
    probabilities [n, 10] of the test's cells. `log_prior` is its weight where evidence is equal."""

    name: str
    evidence: float
    prob: np.ndarray
    cells: int
    log_prior: float = 0.0


def _counts(grid: Grid) -> np.ndarray:
    return np.bincount(grid.ravel(), minlength=NUM_COLORS)


# 2. Layers and their colour maps --------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """A layer read on all grids: symbols [N + n], its colour maps [D + 1, 32, 10], and its evidence."""

    layer: Layer
    symbols: np.ndarray
    table: np.ndarray
    evidence: float

    def prob(self, problem: Problem) -> np.ndarray:
        """Return the probabilities [N + n, 10] of all cells."""
        return self.table[problem.group, self.symbols]


def read_layers(problem: Problem) -> list[Reading]:
    """Return the layers that apply to all grids, best first; of layers that read the same, the first."""
    found: dict[bytes, tuple[Layer, np.ndarray]] = {}
    for layer in BANK:
        rows = []
        for sheet in reversed(problem.sheets):
            symbols = sheet.read(layer)
            if symbols is None:
                break
            rows.append(symbols)
        else:
            symbols = np.concatenate(rows[::-1])
            found.setdefault(symbols.tobytes(), (layer, symbols))
    if not found:
        return []
    layers, rows = zip(*found.values(), strict=True)
    symbols = np.stack(rows).astype(np.int64)
    tables = color_maps(problem, symbols)
    known = symbols[:, : problem.num_known]
    right = tables[np.arange(len(layers))[:, None], problem.known, known, problem.colors]
    evidence = np.log((1 - EVIDENCE_FLOOR) * right + EVIDENCE_FLOOR / NUM_COLORS).sum(1)
    best = np.argsort(-evidence.round(6), kind="stable")[:MAX_READINGS].tolist()
    if layers[0].name == "identity" and 0 not in best:
        best.append(0)  # what surrounds a cell is read off the input, however bad a guess it is
    return [Reading(layers[k], symbols[k], tables[k], float(evidence[k])) for k in best]


def color_maps(problem: Problem, symbols: np.ndarray) -> np.ndarray:
    """Return p(colour | symbol) [L, D + 1, 32, 10] of layers [L, N + n], for each group from the other demonstrations.

    Counts back off to copying the symbol, at the rate at which colours were copied, else to the histogram.
    """
    num_layers, known = len(symbols), symbols[:, : problem.num_known]
    row = np.arange(num_layers)[:, None] * problem.count + problem.known
    code = (row * NUM_SYMBOLS + known) * NUM_COLORS + problem.colors
    shape = num_layers, problem.count, NUM_SYMBOLS, NUM_COLORS
    own = np.bincount(code.ravel(), minlength=math.prod(shape)).reshape(shape)
    total = own.sum(1, keepdims=True)
    counts = np.concatenate([total - own, total], 1).astype(np.float64)
    cells = counts.sum(-1)
    rate = _copy_rate(np.diagonal(counts[..., :NUM_COLORS, :], axis1=-2, axis2=-1), cells[..., :NUM_COLORS])
    base = np.broadcast_to(problem.histogram[:, None], counts.shape).copy()
    base[..., :NUM_COLORS, :] = (1 - rate) * base[..., :NUM_COLORS, :] + rate * EYE
    return (counts + BACKOFF * base) / (cells + BACKOFF)[..., None]


def _copy_rate(kept: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return the mean of the copy rates by colour and by cell, of kept and all cells [..., 10], as [..., 1, 1]."""
    is_seen = cells > 0
    by_color = (np.where(is_seen, kept / np.maximum(cells, 1), 0).sum(-1) + 1) / (is_seen.sum(-1) + 2)
    by_cell = (kept.sum(-1) + 1) / (cells.sum(-1) + 2)
    return ((by_color + by_cell) / 2)[..., None, None]


# 3. Tables ------------------------------------------------------------------------------------------------------------


def count_keys(problem: Problem, name: str, key: np.ndarray, base: Reading) -> Voice:
    """Return the voice of counts on integer keys [N + n], which back off to a layer's colour map."""
    _, index = np.unique(key, return_inverse=True)
    size = int(index.max()) + 1
    known, asked = index[: problem.num_known], index[problem.num_known :]
    cell = known * NUM_COLORS + problem.colors
    total = np.bincount(cell, minlength=size * NUM_COLORS)
    own = np.bincount(problem.known * (size * NUM_COLORS) + cell, minlength=problem.count * size * NUM_COLORS)
    own = own.reshape(problem.count, size * NUM_COLORS)
    per_key = total.reshape(size, NUM_COLORS)
    cells = per_key.sum(1)[known] - own.reshape(problem.count, size, NUM_COLORS).sum(2)[problem.known, known]
    back = base.table[problem.known, base.symbols[: problem.num_known], problem.colors]
    right = (total[cell] - own[problem.known, cell] + BACKOFF * back) / (cells + BACKOFF)
    counts = per_key[asked] + BACKOFF * base.table[-1, base.symbols[problem.num_known :]]
    return problem.judged(name, right, counts / counts.sum(1, keepdims=True))._replace(log_prior=TABLE_PRIOR)


def position_voice(problem: Problem, base: np.ndarray) -> Voice:
    """Return the voice of the colours at the same place in outputs of the same shape, which back off to `base`."""
    prob = base.copy()
    for group, shape in enumerate(problem.shapes):
        same = [EYE[b.ravel()] for k, b in enumerate(problem.answers) if k != group and b.shape == shape]
        if same:
            part = slice(problem.starts[group], problem.starts[group + 1])
            prob[part] = (sum(same) + base[part]) / (len(same) + 1)
    return problem.voice("same place in the other outputs", prob)


def _table_voices(problem: Problem, readings: list[Reading]) -> Iterator[Voice]:
    """Yield the voices of what surrounds a cell of the input and of the best layer, and of pairs of layers."""
    identity = _identity(readings)
    surrounded = [identity, readings[0]] if identity not in (None, readings[0]) else readings[:1]
    for reading in surrounded:
        found = [sheet.keys for sheet in problem.sheets]
        if reading is not identity:
            found = [keys(scene) for scene in _scenes(problem, reading)]
        for name in found[0]:
            key = np.concatenate([table[name].ravel() for table in found])
            yield count_keys(problem, f"{reading.layer.name}, then by {name}", key, reading)
    for k, first in enumerate(readings[:PAIRED_LAYERS]):
        for second in readings[:k]:
            name = f"{second.layer.name} with {first.layer.name}"
            yield count_keys(problem, name, first.symbols * NUM_SYMBOLS + second.symbols, second)


def _identity(readings: list[Reading]) -> Reading | None:
    return next((reading for reading in readings if reading.layer.name == "identity"), None)


def _scenes(problem: Problem, reading: Reading) -> list[Scene]:
    """Return the scenes in which the cells of the outputs lie: a layer's grids, marks taken for a colour."""
    if reading.layer.name == "identity":
        return [sheet.scene for sheet in problem.sheets]
    return [Scene(np.minimum(grid, NUM_COLORS - 1)) for grid in problem.split(reading.symbols)]


# 4. The tree ----------------------------------------------------------------------------------------------------------


def _tree_layers(readings: list[Reading]) -> list[Reading]:
    """Return the readings between which the tree chooses: the input, then the best, few of each family."""
    identity = _identity(readings)
    chosen, used = ([identity] if identity else []), defaultdict(int)
    for reading in readings:
        used[reading.layer.family] += reading is not identity
        if reading is not identity and used[reading.layer.family] <= LAYERS_PER_FAMILY:
            chosen.append(reading)
    return chosen[:TREE_LAYERS]


def _tree_cells(problem: Problem, chosen: list[Reading]) -> Cells:
    """Return the features and experts of all cells."""
    scenes = _scenes(problem, chosen[0])
    grids = list(zip(*(problem.split(reading.symbols) for reading in chosen), strict=True))
    found = np.concatenate([features(scene, g, problem.palette) for scene, g in zip(scenes, grids, strict=True)])
    named = np.concatenate([experts(scene, g, problem.palette) for scene, g in zip(scenes, grids, strict=True)])
    known = problem.num_known
    varies = found[:known].any(0) & ~found[:known].all(0)
    weight = np.zeros(len(named), np.float32)
    weight[:known] = _tree_weights(problem, named[:known, 0] == problem.colors)
    hits = np.zeros(named.shape, np.float32)
    hits[:known] = (named[:known] == problem.colors[:, None]) * weight[:known, None]
    prior = np.where(np.arange(named.shape[1]) < len(chosen), 0, LOCAL_PRIOR)
    return Cells(np.ascontiguousarray(found[:, varies], np.float32), named, hits, weight, problem.starts, prior,
                 len(chosen))  # fmt: skip


def _tree_weights(problem: Problem, is_kept: np.ndarray) -> np.ndarray:
    """Return what every known cell weighs: a demonstration no more than TREE_CELLS, most of it in TREE_SAMPLE cells.

    Of more cells those that keep the first layer's colour are thinned at random, always alike, and weigh the more.
    """
    rng = np.random.default_rng(0)
    weight = np.empty(problem.num_known)
    for start, stop in zip(problem.starts[:-2], problem.starts[1:-1], strict=True):
        size = stop - start
        share = np.full(size, min(1.0, TREE_CELLS / size))
        for cells in (np.flatnonzero(is_kept[start:stop]), np.flatnonzero(~is_kept[start:stop])):
            if len(cells) > TREE_SAMPLE:
                left_out = rng.permutation(cells)[TREE_SAMPLE:]
                share[cells] *= len(cells) / TREE_SAMPLE
                share[left_out] = 0
        weight[start:stop] = share
    return weight


def _tree_voices(problem: Problem, readings: list[Reading], effort: str) -> Iterator[Voice]:
    chosen = _tree_layers(readings)
    cells, base = _tree_cells(problem, chosen), readings[0].prob(problem)
    name = f"choice by cell between {chosen[0].layer.name}"
    if len(chosen) > 1:
        name += f", {readings[0].layer.name if chosen[0] is not readings[0] else chosen[1].layer.name} and others"
    yield problem.voice(name, predict_left_out(cells, base))._replace(log_prior=TREE_PRIOR)
    if effort == "full":
        yield problem.voice(f"{name} (bagged)", bagged_left_out(cells, base))._replace(log_prior=TREE_PRIOR)


# 5. All voices --------------------------------------------------------------------------------------------------------


def voices_of(problem: Problem, effort: str) -> Iterator[Voice]:
    """Yield what all hypotheses say of a problem as it is."""
    expected = problem.histogram[problem.group]
    readings = read_layers(problem)
    yield problem.voice("most common colour", expected)
    base = _identity(readings) or (readings[0] if readings else None)
    yield position_voice(problem, expected if base is None else base.prob(problem))
    for reading in readings[:LAYER_VOICES]:
        prob = reading.table[-1, reading.symbols[problem.num_known :]]
        yield Voice(f"{reading.layer.name}, then colour map", reading.evidence, prob, problem.num_known)
    if readings:
        yield from _table_voices(problem, readings)
        yield from _tree_voices(problem, readings, effort)


def all_voices(demonstrations: Demonstrations, test_input: Grid, shape: Shape, effort: str) -> list[Voice]:
    """Return what all hypotheses say of a task as it is and, until one explains it, of the task rewritten."""
    problem = Problem(demonstrations, test_input, shape)
    effort = "standard" if problem.num_known > LARGE else effort
    voices = list(voices_of(problem, effort))
    if _is_explained(voices, demonstrations):
        return voices
    for rewrite in _rewrites(demonstrations, test_input, shape, effort):
        voices += _rewritten(rewrite)
        if _is_explained(voices, demonstrations):
            break
    return voices


def _is_explained(voices: list[Voice], demonstrations: Demonstrations) -> bool:
    return len(demonstrations) > 1 and _nats_per_cell(voices) < EXPLAINED


def _rewrites(demonstrations: Demonstrations, test_input: Grid, shape: Shape, effort: str) -> Iterator[Rewrite]:
    """Yield the task with its colours ranked; with full effort also turned, both, and with other inputs."""
    yield from ranked_colors(demonstrations, test_input, shape)
    if effort == "full" and demonstrations:
        for toward in ("foreground", "rarest colour"):
            for turned in turned_alike(demonstrations, test_input, shape, toward):
                yield turned
                for ranked in ranked_colors(turned.demonstrations, turned.test_input, turned.shape):
                    yield turned.then(ranked)
        yield from _best_replaced(demonstrations, test_input, shape)


def _rewritten(rewrite: Rewrite) -> Iterator[Voice]:
    """Yield the voices of a rewritten task, in the colours and places of the task."""
    for voice in voices_of(Problem(rewrite.demonstrations, rewrite.test_input, rewrite.shape), "standard"):
        name, log_prior = f"{rewrite.name}: {voice.name}", voice.log_prior + rewrite.log_prior
        yield voice._replace(name=name, prob=rewrite.restore(voice.prob), log_prior=log_prior)


def _best_replaced(demonstrations: Demonstrations, test_input: Grid, shape: Shape) -> list[Rewrite]:
    """Return the rewritten inputs of which one layer explains most of the first demonstration."""
    rewrites = replaced_inputs(demonstrations, test_input, shape, LAYERS)
    scored = [(_first_look(rewrite.demonstrations[0]), rewrite) for rewrite in rewrites]
    return [rewrite for _, rewrite in sorted(scored, key=lambda item: -item[0])[:COMPOSED]]


def _first_look(demonstration: tuple[Grid, Grid]) -> float:
    """Return the log-likelihood of an output under the colour map of its best layer, less a nat per symbol mapped."""
    grid, answer = demonstration
    sheet = _sheet(grid, answer.shape)
    symbols = [found for layer in LAYERS if (found := sheet.read(layer)) is not None]
    if not symbols:
        return -math.inf
    row = np.arange(len(symbols))[:, None] * NUM_SYMBOLS + np.stack(symbols)
    shape = len(symbols), NUM_SYMBOLS, NUM_COLORS
    counts = np.bincount((row * NUM_COLORS + answer.ravel()).ravel(), minlength=math.prod(shape)).reshape(shape)
    total = counts.sum(2)
    fit = _times_log(counts).sum((1, 2)) - _times_log(total).sum(1) - (total > 0).sum(1)
    return float(fit.max())


def _times_log(counts: np.ndarray) -> np.ndarray:
    return counts * np.log(np.maximum(counts, 1))


def _nats_per_cell(voices: list[Voice]) -> float:
    """Return the nats per known cell that the best voice lacks."""
    best = max(voices, key=lambda voice: voice.evidence)
    return -best.evidence / max(best.cells, 1)


# 6. Mixture -----------------------------------------------------------------------------------------------------------

# The log priors, the temperatures and the table were fitted on the development half of ARC-2 training
TEMPERATURE = 0.15  # of the evidence: cells of a grid are not independent
SECOND_TEMPERATURE = 0.05  # the same when the candidates after the first are ranked
CALIBRATION = (
    # below these nats per cell: sharpness, floor, probability that the first candidate is right
    (0.002, 1.0, 0.005, 0.97),
    (0.005, 1.0, 0.005, 0.95),
    (0.02, 1.0, 0.005, 0.72),
    (0.05, 1.0, 0.01, 0.40),
    (0.1, 1.0, 0.01, 0.25),
    (0.2, 0.9, 0.01, 0.10),
    (0.35, 0.9, 0.01, 0.04),
    (0.6, 0.9, 0.02, 0.04),
    (math.inf, 0.8, 0.05, 0.02),
)
UNTESTED = 0.2  # the probability with fewer than two demonstrations, where there is no evidence


def _mix(voices: list[Voice], num_demonstrations: int, shape: Shape) -> Preference:
    """Return the mixture of the voices, flattened the more, the worse the best of them does."""
    weight = _shares(voices, TEMPERATURE)
    prob = sum(share * voice.prob for share, voice in zip(weight, voices, strict=True))
    nats = _nats_per_cell(voices)
    _, sharpness, floor, confidence = next(row for row in CALIBRATION if nats < row[0])
    prob = np.maximum(prob, 1e-9) ** sharpness
    prob = (1 - floor) * prob / prob.sum(1, keepdims=True) + floor / NUM_COLORS
    candidates = _candidates(voices, prob, shape)
    log_prob = np.log(prob).astype(np.float32).reshape(*shape, NUM_COLORS)
    return Preference(log_prob, confidence if num_demonstrations > 1 else UNTESTED, candidates, NO_MISFITS)


def _shares(voices: list[Voice], temperature: float) -> np.ndarray:
    """Return the posterior weights of the voices, which sum to 1."""
    values = np.array([temperature * voice.evidence + voice.log_prior for voice in voices])
    shares = np.exp(values - values.max())
    return shares / shares.sum()


def _candidates(voices: list[Voice], prob: np.ndarray, shape: Shape) -> list[Candidate]:
    """Return the answers: the mixture's, then those of the voices; each has the name of its best voice."""
    answers = [voice.prob.argmax(1).astype(np.uint8) for voice in voices]
    shares = _shares(voices, SECOND_TEMPERATURE)
    weights: dict[bytes, float] = defaultdict(float)
    best: dict[bytes, Voice] = {}
    for answer, share, voice in zip(answers, shares, voices, strict=True):
        weights[answer.tobytes()] += float(share)
        if answer.tobytes() not in best or voice.evidence > best[answer.tobytes()].evidence:
            best[answer.tobytes()] = voice
    first = prob.argmax(1).astype(np.uint8).tobytes()
    ranked = sorted((key for key in weights if key != first), key=lambda key: -weights[key])
    if not ranked:
        ranked = [_runner_up(prob).tobytes()]
    weights[first] = max(weights.get(first, 0.0), *(weights[key] for key in ranked), 1e-9)
    total = sum(weights[key] for key in (first, *ranked)) or 1.0
    leader = max(voices, key=lambda voice: voice.evidence)
    names = {key: voice.name for key, voice in best.items()}
    names.setdefault(first, f"{leader.name} (mixed)")
    return [
        (np.frombuffer(key, np.uint8).reshape(shape), weights[key] / total, names.get(key, "runner-up"))
        for key in (first, *ranked)
    ]


def _runner_up(prob: np.ndarray) -> np.ndarray:
    """Return the likeliest colours but for the cells that are least sure, which take their second colour."""
    order = np.argsort(-prob, axis=1, kind="stable")
    rows = np.arange(len(prob))
    margin = np.log(prob[rows, order[:, 0]]) - np.log(prob[rows, order[:, 1]])
    return np.where(margin <= margin.min() + 1e-9, order[:, 1], order[:, 0]).astype(np.uint8)


# 7. Repairs -----------------------------------------------------------------------------------------------------------

REPAIRED = "one region changed: "
SECOND_COLORS = (0.02, 0.1, 0.25)  # a region takes its cells' second colours where they are at least so likely
REPAIR_SOURCES = 8  # candidates, the first among them, whose differences are regions


def repaired(log_prob: np.ndarray, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return at most REPAIRS grids that differ from the first candidate in one region, likeliest first.

    Shapes: log_prob [h, w, 10], grids [h, w]
    None is a candidate. A region takes the colours of another candidate, or its cells' second colours: connected cells
    of one new colour, all that get one colour, or all that change. A repair weighs what the first candidate does, times
    the likelihood ratio of the region.
    """
    first, weight, name = candidates[0]
    known, found = {grid.tobytes() for grid, _, _ in candidates}, []
    for gain, other, labels, number in sorted(_regions(log_prob, candidates), key=lambda item: -item[0]):
        grid = np.where(labels == number, other, first)
        if grid.tobytes() not in known:
            known.add(grid.tobytes())
            found.append((grid, weight * math.exp(min(gain, 0.0)), REPAIRED + name))
            if len(found) == REPAIRS:
                break
    return found


def _regions(
    log_prob: np.ndarray, candidates: Sequence[Candidate]
) -> Iterator[tuple[float, Grid, np.ndarray, int]]:
    """Yield (gain in log-likelihood, grid that the region is taken from, labels [h, w] and its number among them)."""
    first = candidates[0][0]
    second = np.argsort(-log_prob, axis=-1, kind="stable")[..., 1].astype(np.uint8)
    likely = np.exp(_chosen(log_prob, second))
    others = [grid for grid, _, _ in candidates[1:REPAIR_SOURCES]]
    others += [np.where(likely >= least, second, first) for least in SECOND_COLORS]
    for other in others:
        changed, gain = other != first, _chosen(log_prob, other) - _chosen(log_prob, first)
        for labels, count in (
            label(other, changed, True, True), (np.where(changed, other + 1, 0), NUM_COLORS), (changed.astype(int), 1),
        ):  # fmt: skip
            gains = np.bincount(labels.ravel(), gain.ravel(), minlength=count + 1)
            for number in np.unique(labels[changed]).tolist():
                yield float(gains[number]), other, labels, number


def _chosen(log_prob: np.ndarray, grid: Grid) -> np.ndarray:
    """Return the log-probabilities [h, w] of a grid's colours."""
    return np.take_along_axis(log_prob, grid[..., None].astype(np.int64), -1)[..., 0]
