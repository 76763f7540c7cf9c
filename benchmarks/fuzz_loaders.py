"""Show that no file makes a loader crash, hang, take much memory, run code, or raise an error that is not ours.

    python benchmarks/fuzz_loaders.py [--inputs 100000] [--seed 0] [--targets checkpoint metadata ...] [--first 0]

Each input is a valid file changed at random: as bytes (flips, cuts, splices, numbers that matter), and as what it is
(JSON values, operations of a pickle, records of a zip file, the header of safetensors), written out again with right
checksums. It is loaded in a process of its own kind per target, which may take 1 GB more than it starts with, and has
5 seconds for each input. Input k of a target depends on --seed and k alone, so `--targets T --first K --inputs 1`
repeats one. Prints a line per target; exits with 1 at the first violation and says where its input is kept.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import trainloop_complete_with_fixes as driver
from answer_traits import NUM_MISFITS
from answering import Seen, settings_of, task_count
from arc_data import ArcTask, DataError, Pair, load_tasks
from config import AnswerConfig, ConfigError, TrainConfig, from_dict, resume_config, to_dict
from demo_prior import Preference
from model_persistence import (
    FORMAT,
    CheckpointError,
    CheckpointStore,
    RunLock,
    find_run,
    load_best_weights,
    read_checkpoint,
    save_best_weights,
)
from prior_store import FILE_NAME, UNREADABLE, PriorStore, decode_preference, decode_sizes, encode_preference
from protocols import TRAINED, VALIDATED
from report import Console, MetricLog, RunFolder, RunFolderError, read_epochs, read_metrics
from scoring import check_submission, read_submission, score_submission

OURS = (CheckpointError, RunFolderError, DataError, ConfigError)
GIGABYTE = 10**9
SECONDS = 5.0  # for one input
LINES, LENGTH = 3, 700  # of a message: one line, but JSON errors show the place below it
Load = Callable[[], object]
Target = Callable[[Path, random.Random], list[Load]]


# 1. Changing values and bytes ----------------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 9, 10, 30, 31, 255, 256, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 10**30)
TEXTS = ("", "x", "..", "../../x", "/etc/passwd", "a/b", "a\\b", "\0", "\x1b[31m", "\ud800", "\u202e", "nan", "inf",
         "NaN", "x" * 5000, "\U0001f600", "true", "train", "latin1", "step_000000001.pt")  # fmt: skip
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "-", "0x10", "01", "1.0.0", '"\\ud800"', '"\\u0000"', '"\\x"', "'a'",
       '{"a": 1, "a": 2}', '{"train": [], "train": []}', "[" * 2000, '{"a":' * 2000, "9" * 5000, "[]]",
       "/**/")  # fmt: skip
HUGE_RAW = ("[" * 10**6, "9" * 10**6, "[" + "0," * 10**5 + "0]", "[" + "[],"
            * 10**5 + "[]]", '"' + "x" * 10**6 + '"', "[" + "[0],"
            * 10**5 + "[0]]")  # fmt: skip
PLACE = "@RAW@"


def strange(rng: random.Random) -> Any:
    """Return a JSON value that a field rarely expects."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice((None, True, False, 0.5, -0.0, 1e308, [], {}, [[]], [[], {}], {"": {}}))
    if kind == 3:
        return [strange(rng) for _ in range(rng.randrange(4))]
    if kind == 4:
        return {str(strange(rng))[:50]: strange(rng) for _ in range(rng.randrange(4))}
    if kind == 5:
        value: Any = 0
        for _ in range(rng.choice((3, 70, 400))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return PLACE if kind == 6 else rng.randrange(-3, 40)


def change_value(value: Any, rng: random.Random, odd: Callable[[random.Random], Any] = strange) -> Any:
    """Return a copy of nested dicts and lists with one place replaced, removed, doubled or added."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        return odd(rng)
    if isinstance(value, dict):
        value, key = dict(value), rng.choice(list(value))
        action = rng.random()
        if action < 0.7:
            value[key] = change_value(value[key], rng, odd)
        elif action < 0.85:
            del value[key]
        else:
            value[rng.choice(TEXTS)] = odd(rng)
        return value
    value, place = list(value), rng.randrange(len(value))
    action = rng.random()
    if action < 0.7:
        value[place] = change_value(value[place], rng, odd)
    elif action < 0.8:
        del value[place]
    else:
        value[place:place] = [value[place]] * rng.choice((1, 2, 40))
    return value


def change_json(content: bytes, rng: random.Random) -> bytes:
    """Return a JSON text with values changed; some of them by what json.dumps does not write."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = change_value(value, rng)
    raw = rng.choice(HUGE_RAW if rng.random() < 0.01 else RAW)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).replace(f'"{PLACE}"', raw)
    data = text.encode("utf-8", "surrogatepass")
    return b"\xef\xbb\xbf" + data if rng.random() < 0.03 else data


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with a few places changed."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 40, 400))
        action = rng.randrange(7)
        if action == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif action == 1:
            del data[place:]
        elif action == 2:
            del data[place : place + length]
        elif action == 3:
            data[place:place] = data[place : place + length]
        elif action == 4:
            data[place : place + length] = rng.randbytes(length)
        elif action == 5:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice((0, 1, 2**15, 2**31, 2**(8 * width) - 1, len(data), rng.getrandbits(16)))
            data[place : place + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
        else:
            source = rng.randrange(len(data) + 1)
            data[place : place + length] = data[source : source + length]
    return bytes(data)


def change(content: bytes, rng: random.Random) -> bytes:
    """Return a JSON file, or JSON lines, changed as values or as bytes."""
    if rng.random() < 0.4:
        return change_bytes(content, rng)
    with contextlib.suppress(ValueError):
        return change_json(content, rng)
    lines = content.split(b"\n")
    place = rng.randrange(len(lines))
    with contextlib.suppress(ValueError):
        lines[place] = change_json(lines[place], rng)
    return b"\n".join(lines)


def put_special(path: Path, rng: random.Random) -> None:
    """Put something in a file's place that is no file of the program's own."""
    path.unlink(missing_ok=True)
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        with open(path, "wb") as file:
            file.truncate(2 * 10**9)
    else:
        path.symlink_to(("/dev/zero", "/etc/passwd", str(path))[kind - 3])


# 2. Changing pickles, zip files and headers --------------------------------------------------------------------------


class _Gadget:
    """What a hostile pickle calls; unpickled as usual it would write a file."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def canary() -> Path:
    """Return the file that exists if any input ran code."""
    return Path(os.environ["FUZZ_CANARY"])


def gadgets() -> list[object]:
    """Return objects whose pickles call a function of the interpreter, torch or numpy."""
    target = str(canary())
    return [_Gadget(os.system, f"echo > {target}"), _Gadget(eval, f"open({target!r}, 'w')"), _Gadget(open, target, "w"),
            _Gadget(torch.load, target), _Gadget(bytearray, 10**10), _Gadget(np.zeros, 10**10),
            _Gadget(torch.empty, 10**10), np.arange(3),
            _Gadget(getattr, _Gadget(__import__, "os"), "system")]  # fmt: skip


SNIPPETS = (
    b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nbytearray\n", b"ctorch\nload\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nTensor\n",
    b"ctorch.storage\nUntypedStorage\n", b"ctorch\nSize\n", b"ctorch\nfloat32\n", b"ccollections\nOrderedDict\n",
    b"ccollections\nCounter\n", b"c_codecs\nencode\n", b"X\x04\0\0\0zlib", b"X\xff\xff\xff\x7fab", b"r\xff\xff\xff\xff",
    b"j\0\0\0\0", b"h\0", b"h\x02", b"q\0", b"(", b")", b"]", b"}", b"\x8f", b"\x85", b"\x86", b"t", b"R", b"\x81",
    b"b", b"Q", b"a", b"e", b"s", b"u", b".", b"0", b"2", b"1", b"N", b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 8
    + b"\x7f", b"\x8a\xff" + b"\x01" * 255, b"G\x7f\xf8\0\0\0\0\0\0", b"K\x01", b"M\xff\xff", b"]" * 3000,
    b"}" * 3000, b"K\x00" + b"\x85" * 3000, b"(" * 3000, b")2\x86" * 60, b"K\0q\x63" + b"h\x63h\x63\x86q\x63" * 60,
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x80\x05",
)  # fmt: skip


def change_pickle(content: bytes, rng: random.Random) -> bytes:
    """Return a pickle with operations removed, doubled, exchanged or put in."""
    if rng.random() < 0.05:
        return pickle.dumps({"format": FORMAT, "payload": rng.choice(gadgets())}, protocol=rng.choice((0, 2, 4)))
    places = [place for _, _, place in pickletools.genops(content)] + [len(content)]
    parts = [content[a:b] for a, b in zip(places, places[1:], strict=False)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, action = rng.randrange(len(parts)), rng.random()
        if action < 0.2:
            parts[place] = b""
        elif action < 0.35:
            parts[place] += parts[place]
        elif action < 0.5:
            other = rng.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        elif action < 0.8:
            parts[place] += rng.choice(SNIPPETS)
        elif parts[place][:1] in b"KMJ":
            number = rng.choice((0, 1, -1, 7, 64, 10**6, 2**31 - 1, -(2**31)))
            parts[place] = b"J" + number.to_bytes(4, "little", signed=True)
        else:
            parts[place] = change_bytes(parts[place], rng)
    return b"".join(parts)


def write_zip(records: list[tuple[str, bytes]], rng: random.Random) -> bytes:
    """Return a zip file of records, sometimes compressed, encrypted by flag, twice, or with odd names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in records:
            info = zipfile.ZipInfo(name)
            if rng.random() < 0.02:
                info.compress_type = zipfile.ZIP_DEFLATED
                data += bytes(rng.choice((0, 10**6)))
            archive.writestr(info, data)
            if rng.random() < 0.01:
                info.flag_bits |= rng.choice((1, 8, 64, 0x2000))
    return buffer.getvalue()


def change_checkpoint(content: bytes, rng: random.Random) -> bytes:
    """Return a checkpoint changed as bytes, or in its pickle, its records, or the numbers of its directory."""
    if rng.random() < 0.15:
        return change_bytes(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    action = rng.random()
    place = rng.randrange(len(records))
    name, data = records[place]
    if action < 0.6:
        records[0] = (records[0][0], change_pickle(records[0][1], rng))
    elif action < 0.7:
        records[place] = (name, change_bytes(data, rng))
    elif action < 0.8:
        odd = ("archive/../x", "/etc/passwd", "../x", "archive/data/..", "archive/data/00", "c:/x", "archive\\x", "x",
               "archive/", "archive/constants.pkl", "archive/\x1b[31m", records[0][0],
               "archive/" + "x" * 60000)  # fmt: skip
        records[place] = (rng.choice(odd), data)
    elif action < 0.85:
        del records[place]
    made = write_zip(records, rng)
    if action >= 0.85:
        start = made.rindex(b"PK\1\2") if rng.random() < 0.5 else made.index(b"PK\1\2")
        made = made[:start] + change_bytes(made[start:], rng)
    return made


def odd_plain(rng: random.Random) -> Any:
    """Return a value that an envelope may hold by mistake or malice, tensors among them."""
    tensors = (torch.zeros(0), torch.ones(3, dtype=torch.bfloat16), torch.ones(1).expand(10**6), torch.ones(2, 2).t(),
               torch.full((2,), math.nan), torch.zeros(2, 0, 10**6), b"\xff", (1, (2, (3,))), {1, 2}, 10**40,
               math.nan, math.inf, collections.OrderedDict(a=1), torch.float32)  # fmt: skip
    return rng.choice(tensors) if rng.random() < 0.5 else strange(rng)


def change_weights(content: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with the header's values or length changed."""
    length = int.from_bytes(content[:8], "little")
    header = change_json(content[8 : 8 + length], rng)
    claimed = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(header) + 9))
    return claimed.to_bytes(8, "little") + header + content[8 + length :]


# 3. The targets ------------------------------------------------------------------------------------------------------


@functools.cache
def seeds(name: str) -> tuple[bytes, ...]:
    """Return valid files of a kind, made once."""
    with tempfile.TemporaryDirectory() as folder:
        return tuple(_make_seeds(name, Path(folder)))


def envelope() -> dict[str, Any]:
    """Return what a small checkpoint holds."""
    weight = torch.arange(12.0).reshape(3, 4)
    return {"format": FORMAT, "program": "1.0.0", "run_id": "run", "step": 1, "saved_at": 1e9, "payload": {
        "system": {"a": {"w": weight, "tied": weight, "mask": torch.tensor([True, False])}},
        "optimizers": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "loop": {"epoch": 0, "best": {}, "none": None, "raw": b"\x00\xff", "pairs": {("a", 1): [1, 2.5]}},
        "half": torch.ones(2, dtype=torch.bfloat16), "rng": torch.arange(16, dtype=torch.uint8)}}  # fmt: skip


def _make_seeds(name: str, folder: Path) -> list[bytes]:
    grid = [[1, 2, 0], [3, 0, 9]]
    task = {"train": [{"input": grid, "output": grid}] * 2, "test": [{"input": grid, "output": [[7]]}]}
    if name == "checkpoint":
        made = []
        for content in (envelope(), {**envelope(), "payload": {"w": torch.ones(2)}}):
            with open(folder / "made", "wb") as file:
                torch.save(content, file)
            made.append((folder / "made").read_bytes())
        return made
    if name == "task":
        return [json.dumps(task).encode(), json.dumps({**task, "name": "x"}, indent=1).encode()]
    if name == "challenges":
        return [json.dumps({f"{i:08x}": task for i in range(3)}).encode()]
    if name == "submission":
        attempts = {"attempt_1": grid, "attempt_2": [[7]]}
        return [json.dumps({f"{i:08x}": [attempts] for i in range(3)}).encode()]
    if name == "solutions":
        return [json.dumps({f"{i:08x}": [grid] for i in range(3)}).encode()]
    if name == "weights":
        pairs = {"train:0": ["ab" * 16, "cd" * 16], "train:1": ["ef" * 16, "01" * 16]}
        settings = {name: part for name, part in to_dict(TrainConfig()).items() if name not in ("run", "data")}
        facts = {"num_tasks": 2, "base": {"revision": "x", "frozen_digest": ""}, "memory": {"size": 1},
                 "config": {"seed": 42, **settings}, "protocol": "arc2", "tasks": ["first", "second"],
                 "seen": {TRAINED: {"first": pairs, "second": pairs}, VALIDATED: {"first": pairs}}}  # fmt: skip
        save_best_weights(folder, {"a.w": torch.ones(2, 3), "b": torch.zeros(1, dtype=torch.bfloat16)}, facts)
        return [(folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes()]
    assert name == "priors"
    store = PriorStore(str(folder), lambda line: None)
    grids = [(np.full((2, 3), 1, np.uint8), 0.5, "tile"), (np.full((2, 3), 2, np.uint8), 0.5, "fill")]
    broken = np.zeros((len(grids), NUM_MISFITS), np.float16)
    preference = encode_preference(Preference(np.full((2, 3, 10), -2.3, np.float32), 0.5, grids, broken))
    for i in range(3):
        store.put(bytes([i]) * 16, preference)
    store.close()
    return [(folder / FILE_NAME).read_bytes(), preference]


def checkpoint(folder: Path, rng: random.Random) -> list[Load]:
    """Put a checkpoint into a run and read it, by itself and as the run to resume."""
    path = folder / "run" / "checkpoints" / "step_000000001.pt"
    path.parent.mkdir(parents=True)
    kind = rng.random()
    if kind < 0.15:
        with contextlib.suppress(pickle.PicklingError, UnicodeError, RecursionError, OverflowError):
            torch.save(change_value(envelope(), rng, odd_plain), path)
    elif kind < 0.18:
        path.write_bytes(pickle.dumps(rng.choice([g for g in gadgets()])))
    elif kind < 0.2:
        put_special(path, rng)
    else:
        path.write_bytes(change_checkpoint(rng.choice(seeds("checkpoint")), rng))
    return [lambda: _whole(read_checkpoint(path)) if path.is_file() and not path.is_symlink() else None,
            lambda: find_run(folder, "latest"), lambda: find_run(folder, str(path)),
            lambda: CheckpointStore(folder / "run", run_id="run", say=len).latest()]  # fmt: skip


def _whole(found: Any) -> None:
    """Touch every value of a checkpoint that was accepted: none may be other than plain, or larger than the file."""
    total, waiting = 0, [found.payload]
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            total += item.untyped_storage().nbytes()
            item.clone()
        elif isinstance(item, (dict, list, tuple)):
            waiting += [*item.keys(), *item.values()] if isinstance(item, dict) else item
        else:
            assert item is None or type(item) in (bool, int, float, str, bytes), type(item)
    assert total <= 2 * found.path.stat().st_size + 10**6, f"{total} bytes of tensors"


@functools.cache
def run_files() -> dict[str, bytes]:
    """Return the files of a run folder by name, LATEST among them as ../LATEST."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        run = RunFolder.create(folder, "run")
        run.write_config(to_dict(TrainConfig()), data_hash="abc", version="1")
        run.start_session({"python": "3", "argv": ["a"], "packages": {"torch": None}})
        run.set_status("running", epoch=1, best={"exact": 3}, run_id="run")
        log = MetricLog(run.metrics_path, clock=lambda: 1e9)
        for epoch in range(2):
            log.append({"event": "epoch", "epoch": epoch, "loss": math.nan, "flags": ["x"]})
            run.write_epoch({"epoch": epoch, "loss": 0.5, "note": "a,b"})
        log.close()
        with RunLock(run.path) as lock:
            held = lock.path.read_bytes()
        names = ("config.json", "env.json", "run.json", "metrics.jsonl", "epochs.csv", "run.log")
        files = {name: (run.path / name).read_bytes() for name in names}
        files |= {".lock": held, "../LATEST": (Path(folder) / "LATEST").read_bytes()}
        return {name: _timeless(content) for name, content in files.items()}


def _timeless(content: bytes) -> bytes:
    """Return a file of a run without what differs from run to run, so that inputs can be made again."""
    content = re.sub(rb"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", b"2026-01-01 00:00:00", content)
    content = re.sub(rb'"pid": \d+', b'"pid": 4242', content)
    content = re.sub(rb'"host": "[^"]*"', b'"host": "here"', content)
    return re.sub(rb'"heartbeat": [\d.]+', b'"heartbeat": 1.5', content)


def metadata(folder: Path, rng: random.Random) -> list[Load]:
    """Put the files of a run into a folder, one or two of them changed, and read all that a resume reads."""
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step_000000001.pt").write_bytes(seeds("checkpoint")[0])
    files = run_files()
    for name, content in files.items():
        (run / name).write_bytes(content)
    for name in rng.sample(list(files), rng.choice((1, 1, 2))):
        if rng.random() < 0.03:
            put_special(run / name, rng)
        elif name == "../LATEST" and rng.random() < 0.5:
            (run / name).write_bytes(rng.choice(TEXTS).encode("utf-8", "surrogatepass") + b"\n")
        else:
            (run / name).write_bytes(change(files[name], rng))
    reader, said = functools.partial(RunFolder, run), Console(quiet=True)
    typed = TrainConfig()

    def resume() -> None:
        saved = driver.read_settings(run)
        resume_config(saved, typed, set())
        from_dict(TrainConfig, saved)

    def append() -> None:
        log = MetricLog(run / "metrics.jsonl")
        log.truncate(100)
        log.append({"epoch": 3})
        log.close()

    return [resume, append, lambda: find_run(folder, "latest"), lambda: find_run(folder, "run"),
            lambda: driver.suggest_resume(folder, said), lambda: read_metrics(run / "metrics.jsonl"),
            lambda: read_epochs(run / "epochs.csv"), lambda: reader().write_epoch({"epoch": 2, "loss": 1.0}),
            lambda: reader().start_session({}), lambda: reader().set_status("paused", epoch=2),
            lambda: RunLock(run).acquire().release()]  # fmt: skip


def task(folder: Path, rng: random.Random) -> list[Load]:
    """Put a task file into a folder and load the file and the folder."""
    names = ("a.json", "a.json", "a.json", "..json", "\x1b[31m.json", "a b.json", "\udcff.json", "x" * 240 + ".json")
    path = folder / rng.choice(names)
    path.write_bytes(change(rng.choice(seeds("task")), rng))
    if rng.random() < 0.02:
        put_special(path, rng)
    return [lambda: load_tasks(str(path)), lambda: load_tasks(str(folder))]


def challenges(folder: Path, rng: random.Random) -> list[Load]:
    """Put a challenges and a solutions file into a folder, one or both changed, and load them."""
    path, answers = folder / "challenges.json", folder / "solutions.json"
    which = rng.randrange(3)
    path.write_bytes(change(seeds("challenges")[0], rng) if which != 1 else seeds("challenges")[0])
    answers.write_bytes(change(seeds("solutions")[0], rng) if which != 0 else seeds("solutions")[0])
    if rng.random() < 0.02:
        put_special(rng.choice((path, answers)), rng)
    return [lambda: load_tasks(str(path)), lambda: load_tasks(str(path), str(answers))]


def submission(folder: Path, rng: random.Random) -> list[Load]:
    """Put a changed submission into a folder, check it against its challenges, and read and score it."""
    path, tasks = folder / "submission.json", folder / "challenges.json"
    tasks.write_bytes(seeds("challenges")[0])
    path.write_bytes(change(seeds("submission")[0], rng))
    if rng.random() < 0.02:
        put_special(path, rng)

    def check() -> None:
        for problem in check_submission(path, load_tasks(str(tasks))):
            assert problem.isprintable() and len(problem) <= LENGTH, f"a problem of {len(problem)} characters"

    return [check, lambda: read_submission(path), lambda: score_submission(path, load_tasks(str(tasks)))]


def weights(folder: Path, rng: random.Random) -> list[Load]:
    """Put best weights into a folder, tensors or facts changed, and load them."""
    tensors, facts = seeds("weights")
    action = rng.random()
    if action < 0.45:
        tensors = change_weights(tensors, rng)
    elif action < 0.7:
        tensors = change_bytes(tensors, rng)
    else:
        facts = change(facts, rng)
    (folder / "model.safetensors").write_bytes(tensors)
    (folder / "config.json").write_bytes(facts)
    if rng.random() < 0.02:
        put_special(folder / rng.choice(("model.safetensors", "config.json")), rng)

    def understand() -> None:
        """Read all that `Solver.load` takes from the facts before it builds a system."""
        _, known = load_best_weights(folder)
        settings_of(known, AnswerConfig())
        task_count(known)
        demonstrations = (Pair(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8)),)
        Seen.of(known, [("first", "train:0")]).slots([ArcTask("first", demonstrations, demonstrations)])

    return [lambda: load_best_weights(folder), understand]


def priors(folder: Path, rng: random.Random) -> list[Load]:
    """Put a file of priors into a folder and ask it; decode a changed prior. Neither ever raises what is not named."""
    database, value = seeds("priors")
    (folder / FILE_NAME).write_bytes(change_bytes(database, rng))
    if rng.random() < 0.02:
        put_special(folder / FILE_NAME, rng)
    packed = change_bytes(value, rng)
    unpacked = zlib.compress(change_bytes(zlib.decompress(value), rng))

    def ask() -> None:
        store = PriorStore(str(folder), len)
        store.get(b"\1" * 16)
        store.put(b"\2" * 16, b"x")
        store.close()

    def decode(function: Callable[[bytes], object], data: bytes) -> None:
        with contextlib.suppress(*UNREADABLE):
            function(data)

    return [ask, lambda: decode(decode_preference, packed), lambda: decode(decode_preference, unpacked),
            lambda: decode(decode_sizes, packed)]  # fmt: skip


TARGETS: dict[str, tuple[Target, float]] = {  # with the share of the inputs
    "checkpoint": (checkpoint, 0.25), "metadata": (metadata, 0.2), "task": (task, 0.15),
    "challenges": (challenges, 0.15), "submission": (submission, 0.1), "weights": (weights, 0.1),
    "priors": (priors, 0.05),
}  # fmt: skip


# 4. Running ----------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """An input took longer than SECONDS."""


class Result(NamedTuple):
    """What became of a target's inputs; `violation` is empty when all of them were handled."""

    target: str
    inputs: int
    accepted: int
    refused: dict[str, int]
    slowest: float
    memory: float  # GB above the start
    seconds: float
    violation: str = ""
    kept: str = ""


def _ring(number: int, frame: Any) -> None:
    raise Hang


def judge(error: BaseException) -> str:
    """Return what is wrong about an error that a loader raised; nothing when it is one of ours with a fit message."""
    if isinstance(error, Hang):
        return f"no end within {SECONDS:g} s"
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, MemoryError) or "allocate memory" in str(current):
            return "more than 1 GB of memory wanted"
        current = current.__cause__
    if not isinstance(error, OURS):
        return "".join(traceback.format_exception(error)[-4:]).strip()
    lines = str(error).split("\n")
    allowed = LINES if "is not valid JSON" in lines[0] else 1
    if len(lines) > allowed or len(str(error)) > LENGTH or not all(line.isprintable() for line in lines):
        return f"a message of {len(lines)} lines, {len(str(error))} characters: {str(error)[:300]!r}"
    return ""


def load_all(loads: Sequence[Load]) -> tuple[str, str]:
    """Return (class of the first error of ours, what is wrong): both empty when everything was accepted."""
    refused = ""
    for load in loads:
        try:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            load()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except BaseException as error:  # also what pretends to end the process
            signal.setitimer(signal.ITIMER_REAL, 0)
            wrong = judge(error)
            if wrong:
                return refused, wrong
            refused = refused or type(error).__name__
    return refused, "code of the input ran" if canary().exists() else ""


def work(target: Target, name: str, seed: int, numbers: range, folder: Path, progress: Any, pipe: Connection) -> None:
    """Try a target's inputs in this process, until one is not handled; send counts and what was wrong."""
    signal.signal(signal.SIGALRM, _ring)
    start = _memory()
    limit = _address_space() + GIGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    refused: collections.Counter[str] = collections.Counter()
    accepted, slowest, wrong = 0, 0.0, ""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    for number in numbers:
        progress.value = number
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            loads = target(folder, random.Random(f"{seed}/{name}/{number}"))
        except Exception:
            wrong = f"the input could not be made: {traceback.format_exc()}"
            break
        began = time.monotonic()
        kind, wrong = load_all(loads)
        slowest = max(slowest, time.monotonic() - began)
        grown = _memory() - start
        wrong = wrong or (f"{grown / GIGABYTE:.2f} GB of memory taken" if grown > GIGABYTE else "")
        if wrong:
            break
        accepted += not kind
        refused.update([kind] if kind else [])
    pipe.send((accepted, dict(refused), slowest, (_memory() - start) / GIGABYTE, wrong))
    pipe.close()


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run_target(name: str, target: Target, seed: int, numbers: range, patience: float = 60.0) -> Result:
    """Return what became of the inputs; a worker that dies or stands still for `patience` seconds is a violation."""
    began = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="fuzz_", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    context = multiprocessing.get_context("fork")
    progress, (receiver, sender) = context.RawValue("q", -1), context.Pipe(duplex=False)
    arguments = (target, name, seed, numbers, place / "input", progress, sender)
    worker = context.Process(target=work, args=arguments, daemon=True)
    worker.start()
    sender.close()
    last, moved, wrong = -1, time.monotonic(), ""
    counts: tuple = (0, {}, 0.0, 0.0)
    while True:
        if receiver.poll(0.2):
            with contextlib.suppress(EOFError):
                *counts, wrong = receiver.recv()
                break
            worker.join()
            wrong = f"the process died (exit code {worker.exitcode})"
            break
        if progress.value != last:
            last, moved = progress.value, time.monotonic()
        elif time.monotonic() - moved > patience:
            worker.kill()
            wrong = f"no end within {patience:.0f} s, and no signal is heard"
            break
    worker.join()
    tried = progress.value - numbers.start + 1 if numbers else 0
    kept = keep(name, seed, progress.value, place / "input") if wrong else ""
    shutil.rmtree(place, ignore_errors=True)
    return Result(name, tried, *counts, time.monotonic() - began, wrong, kept)


def keep(name: str, seed: int, number: int, folder: Path) -> str:
    """Return the tar file that now holds the files of an input."""
    target = Path(tempfile.mkdtemp(prefix="fuzz_kept_")) / f"{name}_{seed}_{number}"
    return shutil.make_archive(str(target), "tar", folder) if folder.is_dir() else ""


def describe(result: Result) -> str:
    """Return the line, or the lines, of a target."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(result.refused.items())) or "none"
    line = (f"{result.target:<11} {result.inputs:>6} inputs | accepted {result.accepted} | refused: {kinds} | slowest "
            f"{result.slowest:.2f} s | memory +{result.memory:.2f} GB | {result.seconds:.0f} s")  # fmt: skip
    return f"{line}\nVIOLATION: {result.violation}\nits input: {result.kept}" if result.violation else line


def main(argv: Sequence[str] | None = None, targets: dict[str, tuple[Target, float]] | None = None) -> int:
    """Fuzz the targets that the command line names; return 1 at the first violation, else 0."""
    table = TARGETS if targets is None else targets
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="number of inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=list(table), default=list(table))
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each target")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    shares = sum(table[name][1] for name in options.targets)
    began, total = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FUZZ_CANARY"] = str(Path(folder) / "canary")
        for name in options.targets:
            target, share = table[name]
            count = max(1, round(options.inputs * share / shares))
            result = run_target(name, target, options.seed, range(options.first, options.first + count))
            print(describe(result), flush=True)
            total += result.inputs
            if result.violation:
                return 1
    print(f"{total} inputs in {time.monotonic() - began:.0f} s: no crash, no hang, only our errors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
