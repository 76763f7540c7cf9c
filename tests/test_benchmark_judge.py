"""The measurement of the judge: folds of tasks stay apart, and counts and intervals are those of the attempts."""

from __future__ import annotations

import judge
import torch


def test_attempts_are_counted_in_the_order_given():
    right = torch.tensor([[False, True, False], [True, False, False], [False, False, False]])
    own = torch.arange(3).expand(3, 3)
    assert [x.tolist() for x in judge.best_two(own, right)] == [[False, True, False], [True, True, False]]
    other = torch.tensor([[1, 0, 2], [2, 1, 0], [0, 1, 2]])
    assert [x.tolist() for x in judge.best_two(other, right)] == [[True, False, False], [True, False, False]]
    text = judge.line("one", torch.tensor([True, True, False]), torch.tensor([False, True, True]))
    assert text.startswith("one: judge 2, prior 2, difference +0 [-")


def test_a_judge_never_learns_from_the_tasks_it_ranks(monkeypatch, capsys):
    fitted, fit = [], judge.fit

    def watched(ranked, chosen, steps, seed):
        fitted.append((ranked.fold[chosen].unique().tolist(), len(ranked.fold.unique())))
        return fit(ranked, chosen, steps, seed)

    monkeypatch.setattr(judge, "fit", watched)
    assert judge.main(["--tasks", "6", "--folds", "3", "--steps", "3"]) == 0
    assert fitted == [([1, 2], 3), ([0, 2], 3), ([0, 1], 3)]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("one attempt: judge ") and printed[-1].startswith("two attempts: judge ")
    assert " of 6 tasks, none of a task that its judge has seen" in printed[-3]
