"""Tests of the vote: views and their undoing, the order of answers, two attempts that differ."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_data import Augmentation
from voting import Ballot, Belief, choose_views, runner_up, vote

A, B, C = (np.full((2, 2), color, np.uint8) for color in (1, 2, 3))


def belief(grid: np.ndarray, certainty: float = 0.9) -> Belief:
    """Return a belief in a grid: this probability on each of its cells, its size for sure."""
    cells = np.full((*grid.shape, 10), (1 - certainty) / 9)
    np.put_along_axis(cells, grid[..., None].astype(np.int64), certainty, -1)
    sides = np.full((2, 30), 1e-6)
    sides[0, grid.shape[0] - 1] = sides[1, grid.shape[1] - 1] = 1.0
    return Belief(np.log(cells), np.log(sides))


def no_agreement(grids):
    raise AssertionError("asked for an agreement where nothing is equal")


def grids_of(ballot: Ballot, agreement=no_agreement) -> list[int]:
    return [int(verdict.grid[0, 0]) for verdict in vote(ballot, agreement)]


def test_views_are_different_and_the_first_is_the_identity():
    views = choose_views(32, 7)
    assert views[0].is_identity and len(set(views)) == 32
    assert sorted(view.dihedral for view in views[:8]) == list(range(8))
    assert all(view.colors == tuple(range(10)) for view in views[:8])
    assert all(view.colors != tuple(range(10)) for view in views[8:])
    assert views == choose_views(32, 7) and views[:5] == choose_views(5, 7) and views[8:] != choose_views(32, 8)[8:]


@settings(deadline=None)
@given(st.integers(0, 7), st.permutations(range(1, 10)), st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_undoing_a_view_gives_back_grid_and_scores(dihedral, colors, height, width, seed):
    rng, view = np.random.default_rng(seed), Augmentation(dihedral, (0, *colors))
    grid, scores = rng.integers(0, 10, (height, width), dtype=np.uint8), rng.random((height, width, 10))
    assert (view.undo(view.apply(grid)) == grid).all()
    assert (view.undo_scores(view.apply_scores(scores)) == scores).all()


def test_more_votes_win_whatever_the_likelihood():
    beliefs = (belief(A, 0.3), belief(A, 0.3), belief(B, 0.999))
    assert grids_of(Ballot(beliefs, (), False)) == [1, 2]


def test_of_equal_votes_the_likelier_grid_wins():
    assert grids_of(Ballot((belief(A, 0.5), belief(B, 0.9)), (), False)) == [2, 1]
    assert grids_of(Ballot((belief(A, 0.9), belief(B, 0.5)), (), False)) == [1, 2]


def test_of_grids_equal_in_both_the_one_that_leads_back_to_the_input_wins():
    ballot = Ballot((belief(A, 0.8), belief(B, 0.8)), (), False)
    assert grids_of(ballot, lambda grids: [float(grid[0, 0]) for grid in grids]) == [2, 1]
    assert grids_of(ballot, lambda grids: [-float(grid[0, 0]) for grid in grids]) == [1, 2]


def test_the_best_candidate_is_second_and_first_where_the_prior_is_confident():
    beliefs = (belief(A), belief(A), belief(B))
    for candidates in (((C, 0.7), (A, 0.3)), ((C, 1.0),)):
        judges = len(candidates) == 1  # of a planned grid that is no candidate a judge knows nothing
        assert grids_of(Ballot(beliefs, candidates, False, judges)) == [1, 3, 2]
        assert grids_of(Ballot(beliefs, candidates, True, judges)) == [3, 1, 2]
    assert grids_of(Ballot(beliefs, ((A, 0.7), (C, 0.3)), True, False)) == [1, 2, 3]


def test_where_the_winner_is_a_candidate_the_judge_orders_them_all():
    beliefs = (belief(A), belief(A), belief(B))
    assert grids_of(Ballot(beliefs, ((C, 0.7), (A, 0.3)), False)) == [3, 1, 2]
    assert grids_of(Ballot(beliefs, ((C, 0.7), (A, 0.3)), True)) == [3, 1, 2]
    assert grids_of(Ballot(beliefs, ((C, 0.5), (B, 0.3), (A, 0.2)), False)) == [3, 2, 1]


def test_probabilities_are_shares_of_votes_or_the_priors_weight():
    found = vote(Ballot((belief(A), belief(A), belief(B)), ((C, 0.25),), False), no_agreement)
    assert {int(v.grid[0, 0]): v.probability for v in found} == pytest.approx({1: 2 / 3, 2: 1 / 3, 3: 0.25})


def test_attempts_differ_even_where_all_agree():
    first, second = vote(Ballot((belief(A), belief(A)), ((A, 1.0),), True), no_agreement)[:2]
    assert (first.grid == A).all() and (second.grid != A).sum() == 1


def test_the_runner_up_changes_the_least_certain_cell():
    unsure = belief(A)
    unsure.cells[1, 0, [1, 4]] = np.log([0.4, 0.35])
    assert runner_up(unsure).tolist() == [[1, 1], [4, 1]]


def test_a_grid_of_another_size_is_scored_by_its_size_and_uniform_cells():
    other = np.zeros((1, 3), np.uint8)
    assert belief(A).log_likelihood(other) == pytest.approx(2 * np.log(1e-6) + 3 * np.log(0.1))
    assert belief(A).log_likelihood(A) == pytest.approx(4 * np.log(0.9))
