"""Tests of the judge: untrained it keeps the prior's order; it learns which candidate is right; no view changes it."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from conftest import Lab

from arc_data import Augmentation, collate, test_contexts
from arc_system import NO_CANDIDATE, CandidateJudge, ranking_loss
from demo_prior import MAX_CANDIDATES
from prior_cache import NUM_EVIDENCE, candidate_evidence


def questions(tasks):
    """Return the tests of the tasks, as (context, answer)."""
    return test_contexts(tasks, {task.id: k for k, task in enumerate(tasks)})


def test_ranking_loss_by_hand_and_no_gradient_without_a_right_one():
    logits = torch.tensor([[1.0, 2.0, NO_CANDIDATE], [0.0, 0.0, 0.0], [3.0, 1.0, 0.0]], requires_grad=True)
    right = torch.tensor([[True, False, False], [True, True, False], [False, False, False]])
    loss = ranking_loss(logits, right)
    expected = [np.log(np.e + np.e**2) - 1, np.log(3 / 2), 0.0]
    assert np.allclose(loss.detach(), expected, atol=1e-6)
    loss.sum().backward()
    share = np.e / (np.e + np.e**2)
    assert np.allclose(logits.grad[0], [share - 1, 1 - share, 0], atol=1e-6) and not logits.grad[2].any()


def test_an_untrained_judge_keeps_the_priors_order_and_candidates_that_do_not_exist_come_last(tasks, make_lab):
    system = make_lab().system.eval()
    contexts = [context for context, _ in questions(tasks)]
    query, _ = collate(contexts)
    shapes = system.prior.likeliest_sizes(query)
    grids, probability = system.judged(query, shapes, (30, 30))
    plain, weights = system.prior.candidates(query, shapes, (30, 30))
    assert torch.equal(grids, plain) and torch.equal(probability > 0, weights > 0)
    assert (probability.diff(dim=1) <= 1e-6).all() and torch.allclose(probability.sum(1), torch.ones(len(contexts)))
    evidence, exists = torch.randn(2, MAX_CANDIDATES, NUM_EVIDENCE), torch.zeros(2, MAX_CANDIDATES, dtype=torch.bool)
    assert (CandidateJudge()(evidence, exists) == NO_CANDIDATE).all()


def test_evidence_is_the_same_under_every_augmentation(tasks, make_lab):
    prior = make_lab().system.prior
    colors = (0, 3, 1, 2, 9, 8, 7, 6, 5, 4)
    for context, answer in questions(tasks)[:4]:
        turned = dataclasses.replace(context, augmentation=Augmentation(5, colors))
        shape = Augmentation(5).apply_shape(answer.shape)
        here, there = (prior.evidence(collate([c])[0], [s]) for c, s in ((context, answer.shape), (turned, shape)))
        assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1]) and here[1].any()
        found = candidate_evidence(prior.preference(context, answer.shape))
        assert np.array_equal(here[0][0, : len(found)], found) and not here[0][0, len(found) :].any()


def test_the_judge_learns_which_candidate_is_right_and_nothing_else_learns_from_it(make_lab):
    """The candidates' order is turned round, so that the prior's own best is never right."""
    lab: Lab = make_lab("--batch-size", "8", "--augment", "none")
    system, pairs = lab.system, [lab.batch(k) for k in range(3)]

    def losses():
        return [system.judge_loss(query, answer) for query, answer in pairs]

    plain = system.prior.evidence
    system.prior.evidence = lambda query, sizes: tuple(x.roll(1, 1) for x in plain(query, sizes))
    grids = system.prior.candidates
    system.prior.candidates = lambda *args, **kwargs: tuple(x.roll(1, 1) for x in grids(*args, **kwargs))
    pairs = [pair for pair in pairs if system.judge_loss(*pair) > 0]  # none of the others' answers is a candidate
    before = torch.stack(losses())
    system.zero_grad()
    before.sum().backward()
    touched = {name for name, p in system.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"judge.weight", "judge.place"}
    optimizer = torch.optim.AdamW(system.judge.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        torch.stack(losses()).sum().backward()
        optimizer.step()
    assert (torch.stack(losses()) < 0.2 * before).all()
    off = make_lab("--lambda-judge", "0")
    assert off.system.judge_loss(*off.batch()).item() == 0


def test_a_confident_prior_keeps_its_best_in_front(tasks, make_lab):
    system = make_lab("--answer-confidence", "0.5").system.eval()
    with torch.no_grad():
        system.judge.place.copy_(torch.arange(MAX_CANDIDATES))  # the last candidate is the best
    contexts = [context for context, _ in questions(tasks)]
    query, _ = collate(contexts)
    shapes = system.prior.likeliest_sizes(query)
    grids, probability = system.judged(query, shapes, (30, 30))
    plain, weights = system.prior.candidates(query, shapes, (30, 30))
    sure = system.prior.confidences(query, shapes) >= 0.5
    assert sure.any() and not sure.all()
    kept = (grids[:, 0] == plain[:, 0]).flatten(1).all(1)
    assert torch.equal(kept, sure | ((weights > 0).sum(1) == 1))
