"""Tests of the judge: untrained it keeps the prior's order; it learns which candidate is right; no view changes it."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from conftest import Lab

from arc_data import Augmentation, collate, test_contexts
from arc_system import NO_CANDIDATE, CandidateJudge, candidate_key, lessons_of, ranking_loss
from demo_prior import MAX_CANDIDATES, REPAIRED
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
    colors, repaired = (0, 3, 1, 2, 9, 8, 7, 6, 5, 4), []
    for context, answer in questions(tasks)[:4]:
        turned = dataclasses.replace(context, augmentation=Augmentation(5, colors))
        shape = Augmentation(5).apply_shape(answer.shape)
        here, there = (prior.evidence(collate([c])[0], [s]) for c, s in ((context, answer.shape), (turned, shape)))
        assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1]) and here[1].any()
        preference = prior.preference(context, answer.shape)
        found = candidate_evidence(preference)
        assert np.array_equal(here[0][0, : len(found)], found) and not here[0][0, len(found) :].any()
        assert found[:, -1].tolist() == [name.startswith(REPAIRED) for *_, name in preference.candidates]
        repaired += found[:, -1].tolist()
    assert any(repaired) and not all(repaired)


def test_the_judge_learns_which_candidate_is_right_and_nothing_else_learns_from_it(make_lab):
    """The candidates' order is turned round, so that the prior's own best is never right."""
    lab: Lab = make_lab("--batch-size", "8", "--augment", "none")
    system, pairs = lab.system, [lab.batch(k) for k in range(3)]

    def losses():
        return [system.judge_loss(query, answer)[0] for query, answer in pairs]

    plain = system.prior.evidence
    system.prior.evidence = lambda query, sizes: tuple(x.roll(1, 1) for x in plain(query, sizes))
    grids = system.prior.candidates
    system.prior.candidates = lambda *args, **kwargs: tuple(x.roll(1, 1) for x in grids(*args, **kwargs))
    pairs = [pair for pair in pairs if system.judge_loss(*pair)[0] > 0]  # none of the others' answers is a candidate
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
    loss, lessons = off.system.judge_loss(*off.batch())
    assert loss.item() == 0 and lessons is None


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


def ranked(seed=0, count=6):
    """Return evidence, exists, right and a judge with random weights; the last two rows teach nothing."""
    generator = torch.Generator().manual_seed(seed)
    evidence = torch.randn(count, MAX_CANDIDATES, NUM_EVIDENCE, generator=generator)
    exists = torch.arange(MAX_CANDIDATES) < torch.arange(2, count + 2)[:, None]
    right = exists & (torch.arange(MAX_CANDIDATES) == 1)
    right[-2] = exists[-2]
    right[-1] = False
    judge = CandidateJudge()
    torch.nn.init.normal_(judge.weight, std=0.02, generator=generator)
    return evidence * exists[..., None], exists, right, judge


def test_a_lesson_is_the_way_down_of_the_ranking_loss():
    evidence, exists, right, judge = ranked()
    change = torch.zeros(len(evidence), NUM_EVIDENCE, requires_grad=True)
    ranking_loss(judge(evidence, exists, change), right).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):  # in which a step computes where there is a GPU; nothing is rounded
        lessons = lessons_of(evidence, exists, right, judge(evidence, exists))
    assert torch.allclose(lessons.direction, -change.grad, atol=1e-5) and not lessons.direction.requires_grad
    assert lessons.told.tolist() == [True] * 4 + [False] * 2 and not lessons.direction[4:].any()
    for b in range(len(evidence)):
        assert torch.allclose(lessons.key[b], evidence[b][exists[b]].mean(0), atol=1e-6)
    assert not candidate_key(evidence, torch.zeros_like(exists)).any()


def test_what_is_recalled_is_a_change_of_each_inputs_weights():
    evidence, exists, _, judge = ranked()
    change = 0.1 * torch.randn(len(evidence), NUM_EVIDENCE, generator=torch.Generator().manual_seed(1))
    logits = judge(evidence, exists, change)
    for b in range(len(evidence)):
        other = CandidateJudge()
        with torch.no_grad():
            other.weight.copy_(judge.weight + change[b])
        assert torch.allclose(logits[b], other(evidence[b : b + 1], exists[b : b + 1])[0], atol=1e-4)
    assert torch.equal(judge(evidence, exists, torch.zeros_like(change)), judge(evidence, exists))


def test_a_step_stores_what_its_candidates_teach_and_other_tasks_recall_it(tasks, make_lab):
    """Every pair whose answer is a candidate beside a wrong one, and no other, whatever the planner made of it."""
    lab: Lab = make_lab("--batch-size", "8", "--augment", "none")
    told, others = [], []
    for k in range(lab.sampler.num_batches(0)):
        query, answer = lab.batch(k)
        _, lessons = lab.system.judge_loss(query, answer)
        for context, teaches in zip(query.contexts, lessons.told.tolist(), strict=True):
            (told if teaches else others).append((context.task_id, context.pair_id))
        lab.step(k)
    assert told and others and sorted(lab.system.lessons.owners()) == sorted(told)
    lab.system.eval()
    asked, _ = collate([context for context, _ in questions(tasks)])
    shapes = lab.system.prior.likeliest_sizes(asked)
    evidence, exists = lab.system.prior.evidence(asked, shapes)
    added = lab.system.recalled_lessons(asked, evidence, exists)
    names = [c.task_id for c in asked.contexts]
    recalled = lab.system.lessons.recall(candidate_key(evidence, exists), names)
    assert added.any() and torch.equal(added, lab.system.config.memory.memory_lessons * recalled)
    _, with_lessons = lab.system.judged(asked, shapes, (30, 30))
    lab.system.lessons.load_state_dict(type(lab.system.lessons)(lab.system.config.memory, NUM_EVIDENCE).state_dict())
    _, without = lab.system.judged(asked, shapes, (30, 30))
    assert not torch.equal(with_lessons, without)


def test_without_memory_or_weight_no_lesson_is_recalled(make_lab):
    for flags in (("--no-use-memory",), ("--memory-lessons", "0")):
        lab = make_lab(*flags)
        query, answer = lab.batch()
        lab.step(0)
        evidence, exists = lab.system.prior.evidence(query, answer.shapes)
        assert lab.system.recalled_lessons(query, evidence, exists) is None
    assert len(lab.system.lessons)  # with weight 0 they are still stored, for a later resume
