"""A tree whose leaves choose between experts, fitted without each group of cells in turn and asked about that group.

An expert names a colour for every cell; a leaf mixes the experts by how often they were right there, so what it learns
is whom to believe, not which colour to give, and holds for other colours too. Imports numpy only; used by demo_prior.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

NUM_COLORS = 10
MIN_GAIN = 3.0  # nats
MIN_WEIGHT = 2.0  # cells on either side of a split
MAX_DEPTH = 6
GOOD_ENOUGH = -1.0  # log-likelihood of a node that is not split further
BAGS = 4
FEATURE_SHARE = 0.5
LAYER_SHARE = 0.7
MIN_SHARE = 0.01  # experts of less posterior weight in a leaf are left out


@dataclass(frozen=True)
class Cells:
    """Cells in groups that follow each other; the last group has no labels and is only asked about.

    features float32 [N, F] of 0 and 1; experts [N, E] colours; hits float32 [N, E]: weight where the expert is right;
    weight float32 [N]; starts [G + 1]: where groups begin; log_prior [E] of the experts, the first `num_layers` equal.
    """

    features: np.ndarray
    experts: np.ndarray
    hits: np.ndarray
    weight: np.ndarray
    starts: np.ndarray
    log_prior: np.ndarray
    num_layers: int


def predict_left_out(cells: Cells, base: np.ndarray) -> np.ndarray:
    """Return probabilities [N, 10]: each group by a tree fitted on the others; what no expert claims is `base`."""
    out = np.empty((len(cells.weight), NUM_COLORS))
    num_groups = len(cells.starts) - 1
    _grow(cells, np.arange(len(cells.weight)), list(range(num_groups)), MAX_DEPTH, base, out)
    return out


def bagged_left_out(cells: Cells, base: np.ndarray) -> np.ndarray:
    """Return the mean of predict_left_out over BAGS trees, each on half of the features and most of the layers.

    The first layer and the local experts are in every tree. The draws are the same at every call.
    """
    rng = np.random.default_rng(0)
    num_features, num_experts = cells.features.shape[1], cells.experts.shape[1]
    total = np.zeros((len(cells.weight), NUM_COLORS))
    for _ in range(BAGS):
        shown = np.flatnonzero(rng.random(num_features) < FEATURE_SHARE)
        asked = rng.random(num_experts) < LAYER_SHARE
        asked[0] = asked[cells.num_layers :] = True
        heard = np.flatnonzero(asked)
        part = replace(
            cells,
            features=np.ascontiguousarray(cells.features[:, shown]),
            experts=cells.experts[:, heard],
            hits=cells.hits[:, heard],
            log_prior=cells.log_prior[heard],
            num_layers=int(asked[: cells.num_layers].sum()),
        )
        total += predict_left_out(part, base)
    return total / BAGS


def log_likelihood(right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return the log-likelihood of an expert that is right `right` of `total` times, wrong colours being equal."""
    rate = (right + 0.3) / (total + 0.6)
    return right * np.log(rate) + (total - right) * np.log((1 - rate) / 9)


def _grow(cells: Cells, index: np.ndarray, trees: list[int], depth: int, base: np.ndarray, out: np.ndarray) -> None:
    """Fit the trees, known by the group that they leave out, on the cells at a node; predict those groups' cells.

    Trees that choose the same split share one call, so the counts of all of them cost little more than those of one.
    """
    ends = np.searchsorted(index, cells.starts)
    parts = [index[ends[g] : ends[g + 1]] for g in range(len(ends) - 1)]
    trees = [tree for tree in trees if len(parts[tree])]  # nobody asks the others
    if not trees:
        return
    right, total = _left_out(cells, index, ends, trees)
    splits = np.full(len(trees), -1)
    best = (log_likelihood(right, total[:, None]) + cells.log_prior).max(1)
    open_trees = np.flatnonzero(best <= GOOD_ENOUGH) if depth and cells.features.shape[1] else []
    if len(open_trees):
        splits[open_trees] = _best_splits(cells, parts, [trees[k] for k in open_trees], right[open_trees],
                                          total[open_trees], best[open_trees])  # fmt: skip
    for split in set(splits.tolist()):
        members = np.flatnonzero(splits == split)
        if split < 0:
            for k in members:
                cell = parts[trees[k]]
                out[cell] = _leaf(cells, cell, right[k], total[k], base[cell])
            continue
        goes_right = cells.features[index, split] > 0
        for side in (index[~goes_right], index[goes_right]):
            _grow(cells, side, [trees[k] for k in members], depth - 1, base, out)


def _left_out(
    cells: Cells, index: np.ndarray, ends: np.ndarray, trees: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return hits [T, E] and weights [T] of the cells at a node without the group that each tree leaves out."""
    place = np.arange(len(index))
    is_member = (place >= ends[:-1, None]) & (place < ends[1:, None])
    sums = is_member.astype(np.float32) @ np.column_stack([cells.hits[index], cells.weight[index]])
    rest = sums.sum(0) - sums[trees]
    return rest[:, :-1], rest[:, -1]


def _best_splits(
    cells: Cells, parts: list[np.ndarray], trees: list[int], right: np.ndarray, total: np.ndarray, before: np.ndarray
) -> np.ndarray:
    """Return the feature with the largest gain for each tree, -1 where none gains MIN_GAIN."""
    parts = [part[cells.weight[part] > 0] for part in parts]
    alone = [g for g in trees if g < len(parts) - 1]
    rest = np.concatenate([part for g, part in enumerate(parts[:-1]) if g not in alone] or [parts[0][:0]])
    groups = [parts[g] for g in alone] + [rest]
    place = {g: k for k, g in enumerate(alone)}
    picked = [cells.features[part] for part in groups]
    hits = np.stack([f.T @ cells.hits[part] for f, part in zip(picked, groups, strict=True)])  # [groups, F, E]
    weight = np.stack([cells.weight[part] @ f for f, part in zip(picked, groups, strict=True)])
    zero = np.zeros_like(hits[0]), np.zeros_like(weight[0])
    all_hits, all_weight = hits.sum(0), weight.sum(0)
    best = np.full(len(trees), -1)
    for k, tree in enumerate(trees):
        own, own_weight = (hits[place[tree]], weight[place[tree]]) if tree in place else zero
        inside, n = all_hits - own, all_weight - own_weight
        gain = _cost(cells, inside, n) + _cost(cells, right[k] - inside, total[k] - n) - before[k]
        gain[(n < MIN_WEIGHT) | (total[k] - n < MIN_WEIGHT)] = -np.inf
        feature = int(gain.argmax())
        if gain[feature] >= MIN_GAIN:
            best[k] = feature
    return best


def _cost(cells: Cells, right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return the log-likelihood [F] of the best expert, of hits [F, E]; among equal priors it has most hits."""
    layers, others = right[:, : cells.num_layers].max(1), right[:, cells.num_layers :].max(1)
    total = np.maximum(total, 0)
    return np.maximum(
        log_likelihood(np.clip(layers, 0, total), total) + cells.log_prior[0],
        log_likelihood(np.clip(others, 0, total), total) + cells.log_prior[-1],
    )


def _leaf(cells: Cells, cell: np.ndarray, right: np.ndarray, total: float, base: np.ndarray) -> np.ndarray:
    """Return probabilities of the cells at a leaf: the experts' colours by their posterior and their rate."""
    evidence = log_likelihood(right, total) + cells.log_prior
    posterior = np.exp(evidence - evidence.max())
    posterior[posterior < MIN_SHARE] = 0
    share = posterior / posterior.sum() * (right + 0.3) / (total + 0.6)
    prob = np.zeros((len(cell), NUM_COLORS))
    rows = np.arange(len(cell))
    for k in np.flatnonzero(share):
        prob[rows, cells.experts[cell, k]] += share[k]
    return prob + (1 - prob.sum(1, keepdims=True)) * base
