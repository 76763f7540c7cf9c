"""Rewritten tasks: names of colours by frequency, pairs turned alike, other inputs, and the way back to the answer."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid_hypotheses import LAYERS, VIEWS, Layer, Scene, for_same_shape, if_it_fits
from task_rewrites import IDENTITY, REPLACED_PRIOR, REPLACING, Rewrite, ranked_colors, replaced_inputs, turned_alike

ONE_HOT = np.eye(10)


def parse(rows: str) -> np.ndarray:
    """Return a grid written row by row."""
    return np.array([[int(color) for color in row] for row in rows.split()], np.uint8)


def noise(seed: int, shape=(4, 5), colors: int = 4) -> np.ndarray:
    """Return a grid of up to `colors` colours, other ones for every seed."""
    rng = np.random.default_rng(seed)
    return rng.permutation(10).astype(np.uint8)[rng.integers(0, colors, shape)]


def random_task(seed: int, count: int = 3):
    """Return demonstrations, test input and answer without a rule, of several shapes."""
    rng = np.random.default_rng(seed)
    grids = [noise(100 * seed + k, rng.integers(1, 7, 2), rng.integers(1, 6)) for k in range(2 * count + 2)]
    return list(zip(grids[:count], grids[count : 2 * count], strict=True)), grids[-2], grids[-1]


def restored(rewrite: Rewrite, answer: np.ndarray) -> np.ndarray:
    """Return the answer that stands behind a rewritten one."""
    return rewrite.restore(ONE_HOT[answer.ravel()]).argmax(1)


# Colours by role ------------------------------------------------------------------------------------------------------


def names_by_hand(inputs: list[np.ndarray]) -> list[dict[int, int]]:
    """Return the new name of each colour in each pair, from the definition."""
    held = [set(grid.ravel().tolist()) for grid in inputs]
    slots = sorted(set.union(*held) - set.intersection(*held))
    names = []
    for grid in inputs:
        cells = grid.ravel().tolist()
        order = sorted(slots, key=lambda c: (-cells.count(c), cells.index(c) if c in cells else 99 + c))
        names.append({color: color for color in range(10)} | dict(zip(order, slots, strict=True)))
    return names


@pytest.mark.parametrize("seed", range(12))
def test_colours_are_named_by_the_definition_in_every_pair(seed):
    demonstrations, x, _ = random_task(seed, count=1 + seed % 4)
    found = list(ranked_colors(demonstrations, x, (2, 2)))
    names = names_by_hand([*(a for a, _ in demonstrations), x])
    if all(table == names[0] for table in names):
        assert not found
        return
    (rewrite,) = found
    assert rewrite.shape == (2, 2) and rewrite.cells == slice(None) and rewrite.log_prior == 0
    assert [sorted(table.values()) for table in names] == [list(range(10))] * len(names)
    pairs = zip(demonstrations, rewrite.demonstrations, names[:-1], strict=True)
    for (a, b), (new_a, new_b), table in pairs:
        for old, new in ((a, new_a), (b, new_b)):
            assert new.dtype == np.uint8 and new.tolist() == [[table[c] for c in row] for row in old.tolist()]
    assert rewrite.test_input.tolist() == [[names[-1][c] for c in row] for row in x.tolist()]
    assert dict(enumerate(rewrite.colors.tolist())) == names[-1]


@pytest.mark.parametrize("seed", range(8))
def test_colours_of_the_answer_come_back_exactly(seed):
    demonstrations, x, answer = random_task(seed)
    for rewrite in ranked_colors(demonstrations, x, answer.shape):
        assert sorted(rewrite.colors.tolist()) == list(range(10))
        assert np.array_equal(restored(rewrite, rewrite.colors[answer]), answer.ravel())
        prob = np.random.default_rng(seed).dirichlet(np.ones(10), answer.size)
        back = rewrite.restore(prob)
        for cell, color in np.ndindex(back.shape):
            assert back[cell, color] == prob[cell, rewrite.colors[color]]


def test_colours_that_all_inputs_hold_or_none_keep_their_names():
    demonstrations = [(parse("0012 5222"), parse("89")), (parse("0035 3300"), parse("98"))]
    (rewrite,) = ranked_colors(demonstrations, parse("0544 0140"), (1, 1))
    assert rewrite.colors[[0, 5, 6, 7, 8, 9]].tolist() == [0, 5, 6, 7, 8, 9]
    assert [grid.tolist() for _, grid in rewrite.demonstrations] == [[[8, 9]], [[9, 8]]]
    # 1, 2, 3, 4 vary: the most frequent becomes 1, the next 2, absent ones follow in ascending order
    assert np.array_equal(rewrite.demonstrations[0][0], parse("0021 5111"))
    assert np.array_equal(rewrite.demonstrations[1][0], parse("0015 1100"))
    assert np.array_equal(rewrite.test_input, parse("0511 0210"))
    assert rewrite.colors[[4, 1, 2, 3]].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("rows, expected", [
    ("7080 9097", "7090 8087"),  # two of 7, two of 9, one of 8
    ("9080 7079", "7090 8087"),
    ("9870 0000", "7890 0000"),
    ("0007 8900", "0007 8900"),
    ("0090 0000", "0070 0000"),
])  # fmt: skip
def test_ties_are_broken_in_reading_order(rows, expected):
    demonstrations = [(parse("0770"), parse("1")), (parse("0880"), parse("1"))]
    (rewrite,) = ranked_colors(demonstrations, parse(rows), (1, 1))
    assert np.array_equal(rewrite.test_input, parse(expected))
    present = set(parse(rows).ravel().tolist())
    absent = [color for color in (7, 8, 9) if color not in present]
    assert rewrite.colors[absent].tolist() == [7, 8, 9][3 - len(absent) :]


@pytest.mark.parametrize("inputs", [
    ["0012", "0120", "2210"],  # all hold the same colours
    ["0011", "0101", "0122"],  # one colour varies
    ["0112", "0000"],  # the order is that of the names
    ["0"],
])  # fmt: skip
def test_nothing_is_yielded_where_nothing_changes(inputs):
    *grids, x = map(parse, inputs)
    assert not list(ranked_colors([(grid, parse("5")) for grid in grids], x, (1, 1)))


def test_a_colour_more_frequent_than_a_lower_one_is_enough_for_a_change():
    (rewrite,) = ranked_colors([(parse("0000"), parse("1"))], parse("0221"), (1, 1))
    assert np.array_equal(rewrite.test_input, parse("0112"))
    assert rewrite.demonstrations[0][1].tolist() == [[1]]


def test_a_rule_about_the_most_frequent_colour_becomes_a_constant():
    demonstrations, answers = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        many, few = 1 + (seed + np.array([0, 4])) % 9
        x = np.zeros(40, np.uint8)
        places = rng.permutation(40)
        x[places[:14]], x[places[14:20]] = many, few
        demonstrations.append((x.reshape(5, 8), np.full((2, 2), many, np.uint8)))
        answers.append(int(many))
    *demonstrations, (x, answer) = demonstrations
    assert len(set(answers)) == 5
    (rewrite,) = ranked_colors(demonstrations, x, (2, 2))
    told = {int(color) for _, b in rewrite.demonstrations for color in b.ravel()}
    assert len(told) == 1
    assert np.array_equal(restored(rewrite, np.full(4, *told)), answer.ravel())


# One direction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toward", ["foreground", "rarest colour"])
@pytest.mark.parametrize("seed", range(8))
def test_turned_pairs_are_views_and_the_answer_turns_back(seed, toward):
    demonstrations, x, answer = random_task(seed)
    for rewrite in turned_alike(demonstrations, x, answer.shape, toward):
        for (a, b), (new_a, new_b) in zip(demonstrations, rewrite.demonstrations, strict=True):
            assert any(np.array_equal(turn(a), new_a) and np.array_equal(turn(b), new_b) for turn in VIEWS)
        places = np.arange(answer.size).reshape(answer.shape)
        turned = [turn(answer) for turn in VIEWS
                  if np.array_equal(turn(x), rewrite.test_input) and turn(places).shape == rewrite.shape]  # fmt: skip
        assert any(np.array_equal(restored(rewrite, grid), answer.ravel()) for grid in turned)
        prob = np.random.default_rng(seed).random((answer.size, 10))
        assert sorted(rewrite.restore(prob)[:, 0]) == sorted(prob[:, 0])


@pytest.mark.parametrize("turn", VIEWS)
def test_a_single_cell_is_turned_to_the_upper_left(turn):
    x, still = parse("0000 0000 0005"), parse("0500 0000 0000")
    demonstrations = [(still, still), (np.ascontiguousarray(turn(x)), x)]
    (rewrite,) = turned_alike(demonstrations, parse("0000 0000 0050"), (3, 4), "foreground")
    for grid in (*(a for a, _ in rewrite.demonstrations), rewrite.test_input):
        (row,), (column,) = np.nonzero(grid)
        assert 2 * row < grid.shape[0] and 2 * column < grid.shape[1]


def test_nothing_is_turned_where_all_pairs_lie_alike():
    pairs = [(parse("100 000 000"), parse("1")), (parse("220 200 000"), parse("2"))]
    assert not list(turned_alike(pairs, parse("310 000 000"), (1, 1), "foreground"))


@pytest.mark.parametrize("seed", range(8))
def test_rewriting_twice_comes_back_the_same_way(seed):
    demonstrations, x, answer = random_task(seed)
    for turned in turned_alike(demonstrations, x, answer.shape, "foreground"):
        for ranked in ranked_colors(turned.demonstrations, turned.test_input, turned.shape):
            both = turned.then(ranked._replace(log_prior=-3.0))
            assert both.name == f"{turned.name}, {ranked.name}" and both.log_prior == turned.log_prior - 3.0
            assert both.demonstrations is ranked.demonstrations and both.shape == turned.shape
            prob = np.random.default_rng(seed).random((answer.size, 10))
            assert np.array_equal(both.restore(prob), turned.restore(ranked.restore(prob)))


def test_any_two_rewritings_restore_one_after_the_other():
    rng = np.random.default_rng(0)
    orders = [slice(None), rng.permutation(6), rng.permutation(6)]
    steps = [Rewrite("", (), None, (2, 3), rng.permutation(10), order) for order in orders]
    prob = rng.random((6, 10))
    for first in steps:
        for second in steps:
            expected = first.restore(second.restore(prob))
            assert np.array_equal(first.then(second).restore(prob), expected)


# Another input --------------------------------------------------------------------------------------------------------


def replaced(demonstrations, x, layers=LAYERS) -> dict[str, Rewrite]:
    return {rewrite.name: rewrite for rewrite in replaced_inputs(demonstrations, x, (2, 2), layers)}


def text(grids) -> str:
    return repr([grid.tolist() for grid in grids])


@pytest.mark.parametrize("seed", range(10))
def test_replaced_inputs_are_valid_different_and_leave_the_answers(seed):
    rng = np.random.default_rng(seed)
    shape = 2 * rng.integers(1, 5, 2)
    inputs = [np.where(rng.random(shape) < 0.4, noise(seed + k, shape, 3), 0).astype(np.uint8) for k in range(4)]
    demonstrations = [(a, noise(k)) for k, a in enumerate(inputs[:-1])]
    found = list(replaced_inputs(demonstrations, inputs[-1], (3, 2), LAYERS))
    seen = {text(inputs)}
    for rewrite in found:
        grids = [*(a for a, _ in rewrite.demonstrations), rewrite.test_input]
        assert len(grids) == 4 and text(grids) not in seen
        seen.add(text(grids))
        for grid in grids:
            assert grid.dtype == np.uint8 and grid.ndim == 2 and grid.size and grid.max() < 10
            assert grid.flags.c_contiguous
        for (_, b), (_, old) in zip(rewrite.demonstrations, demonstrations, strict=True):
            assert b is old
        assert rewrite.shape == (3, 2) and rewrite.log_prior == REPLACED_PRIOR
        prob = rng.random((6, 10))
        assert np.array_equal(rewrite.restore(prob), prob)
    assert len(found) > 8 and len({rewrite.name for rewrite in found}) == len(found)


def test_each_replacing_family_gives_its_layers_results():
    inputs = [parse("0120 0000 3044 0040"), parse("0000 0660 0600 2003"), parse("7100 0000 0880 0080")]
    demonstrations = [(a, parse("5")) for a in inputs[:-1]]
    found = replaced(demonstrations, inputs[-1])
    layers = [layer for layer in LAYERS if layer.family in REPLACING]
    assert {layer.family for layer in layers} == REPLACING
    expected, seen = {}, {text(inputs)}
    for layer in layers:
        grids = [layer.on_scene(Scene(grid)) for grid in inputs]
        if any(grid is None or not grid.size or grid.max() > 9 for grid in grids) or text(grids) in seen:
            continue
        seen.add(text(grids))
        expected[layer.name] = text(grids)
    shown = {name: text([*(a for a, _ in rewrite.demonstrations), rewrite.test_input])
             for name, rewrite in found.items() if name in expected}  # fmt: skip
    assert shown == expected and len(expected) > 8
    assert not {"identity", "half turn", "size of each object"} & set(found)


def test_halves_by_hand():
    first, x = parse("123456 789012"), parse("1234 5678 9012 3456")
    found = replaced([(first, parse("5"))], x, ())
    assert list(found) == ["upper half", "lower half", "left half", "right half"]
    assert [found["upper half"].demonstrations[0][0].tolist(), found["upper half"].test_input.tolist()] == [
        parse("123456").tolist(), parse("1234 5678").tolist()]  # fmt: skip
    assert np.array_equal(found["lower half"].test_input, parse("9012 3456"))
    assert np.array_equal(found["left half"].demonstrations[0][0], parse("123 789"))
    assert np.array_equal(found["left half"].test_input, parse("12 56 90 34"))
    assert np.array_equal(found["right half"].test_input, parse("34 78 12 56"))
    odd = replaced([(first, parse("5"))], parse("123 456"), ())
    assert list(odd) == ["upper half", "lower half"]  # three columns have no half
    assert not replaced([(first, parse("5"))], parse("123"), ())


def test_panels_by_hand():
    first, x = parse("10501 02533 55555 60577 00588"), parse("91229 34267 22222 11243 56278")
    found = replaced([(first, parse("5"))], x, ())
    assert list(found) == ["panel 1", "panel 2", "panel 3", "panel 4"]  # five rows and columns have no halves
    for name, rows, test_rows in (("panel 1", "10 02", "91 34"), ("panel 2", "01 33", "29 67"),
                                  ("panel 3", "60 00", "11 56"), ("panel 4", "77 88", "43 78")):  # fmt: skip
        assert np.array_equal(found[name].demonstrations[0][0], parse(rows))
        assert np.array_equal(found[name].test_input, parse(test_rows))
    fewer = replaced([(first, parse("5"))], parse("10502 33514 20566"), ())
    assert list(fewer) == ["panel 1", "panel 2"]
    assert np.array_equal(fewer["panel 2"].test_input, parse("02 14 66"))
    assert not replaced([(first, parse("5"))], parse("123 456 789"), ())


def test_a_change_that_fails_on_one_input_or_gives_marks_is_left_out():
    add = for_same_shape(lambda scene, by: np.minimum(scene.grid + by, 9))
    layers = (
        Layer("not of a 0", "mirror", for_same_shape(lambda scene: scene.grid if scene.grid[0, 0] else None)),
        Layer("marks", "mirror", for_same_shape(lambda scene: scene.grid + 1)),
        Layer("empty", "mirror", if_it_fits(lambda scene: scene.grid[:0])),
        Layer("of another family", "tile", for_same_shape(lambda scene: scene.grid[::-1])),
        Layer("of a shape", "mirror", lambda scene, shape: scene.grid[::-1]),
        Layer("the same", "mirror", partial(add, by=0)),
        Layer("seven more", "mirror", partial(add, by=7)),
        Layer("seven more again", "mirror", partial(add, by=7)),
    )
    pairs = [(parse("129 345 678"), parse("5")), (parse("034 129 587"), parse("5"))]
    found = replaced(pairs, parse("781 296 345"), layers)
    assert list(found) == ["seven more"]
    assert np.array_equal(found["seven more"].demonstrations[1][0], parse("799 899 999"))


def test_inputs_stay_as_they_were():
    demonstrations, x, answer = random_task(3)
    copies = [(a.copy(), b.copy()) for a, b in demonstrations], x.copy()
    rewrites = [*ranked_colors(demonstrations, x, answer.shape), *replaced_inputs(demonstrations, x, (2, 2), LAYERS),
                *turned_alike(demonstrations, x, answer.shape, "foreground")]  # fmt: skip
    assert rewrites
    assert text([*sum(demonstrations, ()), x]) == text([*sum(copies[0], ()), copies[1]])
    assert IDENTITY.tolist() == list(range(10))


# Layers without a wanted shape ----------------------------------------------------------------------------------------


def build(seed: int, height: int, width: int, colors: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grid = rng.permutation(10)[rng.integers(0, colors, (height, width))]
    if kind == "framed":
        return np.pad(grid, 1)
    return np.where(rng.random(grid.shape) < 0.3, grid, 0) if kind == "sparse" else grid


sides = st.integers(1, 8)
grids = st.builds(build, st.integers(0, 2**32 - 1), sides, sides, st.integers(1, 6),
                  st.sampled_from(["noise", "sparse", "framed"]))  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(grids)
def test_a_layer_on_its_scene_is_the_layer_at_its_results_shape(grid):
    scene = Scene(grid)
    for layer in LAYERS:
        if layer.on_scene is None:
            continue
        alone = layer.on_scene(scene)
        same = layer.function(scene, scene.shape)
        if alone is None:
            assert same is None, layer.name
        elif alone.shape == scene.shape:  # parts that are the whole grid are no hypothesis
            assert same is None or np.array_equal(same, alone), layer.name
            assert same is not None or layer.family in PARTS, layer.name
        else:
            assert layer.family in PARTS and same is None, layer.name
            np.testing.assert_array_equal(layer.function(scene, alone.shape), alone, layer.name)


PARTS = {"foreground", "box", "frequency", "distinct", "object"}


def test_layers_have_a_scene_form_unless_the_shape_decides():
    shaped = {layer.family for layer in LAYERS if layer.on_scene is None}
    free = {layer.family for layer in LAYERS if layer.on_scene is not None}
    assert shaped & free <= {"period", "symmetry"} and {"tile", "kronecker", "corner", "panel", "solid"} <= shaped
    assert {"gravity", "enclosed", "size", *PARTS} <= free
    assert Layer("own", "own", lambda scene, shape: scene.grid).on_scene is None
