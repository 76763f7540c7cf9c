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
        learned, buffer = fit(ranked, chosen, steps, seed)
        tasks = {task for (task, _), taught in zip(ranked.owners, chosen.tolist(), strict=True) if taught}
        assert buffer.owners() and {task for task, _ in buffer.owners()} <= tasks
        return learned, buffer

    monkeypatch.setattr(judge, "fit", watched)
    assert judge.main(["--tasks", "6", "--folds", "3", "--steps", "3", "--seeds", "4"]) == 0
    assert fitted == [([1, 2], 3), ([0, 2], 3), ([0, 1], 3)]
    printed = capsys.readouterr().out.splitlines()
    assert " of 6 tasks, none of a task that its judge has seen" in printed[-6]
    assert printed[-5].startswith("seed 4, one attempt: judge ") and printed[-4].startswith("seed 4, two attempts: ")
    assert printed[-2].startswith("demonstrations: ") and printed[-1].startswith("test inputs: ")


def test_gains_are_differences_of_the_ranking_loss_averaged_over_seeds():
    right = torch.tensor([[True, False], [False, True], [False, False]])
    ranked = judge.Ranked(torch.zeros(3, 2, 1), torch.ones(3, 2).bool(), right, torch.tensor([0, 1, 1]),
                          torch.tensor([0, 1, 1]), [("a", "1"), ("b", "2"), ("b", "3")])  # fmt: skip
    flat, sure = torch.zeros(3, 2), torch.tensor([[50.0, 0.0], [0.0, 50.0], [0.0, 0.0]])
    each = [{"none": flat, "similar": sure, "random": flat}, {"none": flat, "similar": flat, "random": sure}]
    text = judge.gain_line("x", ranked, each)
    gain = 2 / 3 * 0.6931 / 2
    assert text.startswith(f"x: {gain:+.4f} [") and ", +0.0000 [+0.0000, +0.0000] against random;" in text
    assert text.endswith(f"right at once [2, 1] of 3, without {2 / 3 * 0.6931:.4f} nats")
