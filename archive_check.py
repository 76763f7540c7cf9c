"""Whether a checkpoint file is safe to open: its zip directory and its pickle, judged before torch reads either.

torch runs no code of a file that it loads with weights_only, but believes its numbers: a tensor that claims more cells
than its record holds is allocated in full. What is accepted here is what `model_persistence.snapshot` saves: dicts,
lists, tuples, tensors and scalars, each container used once. Imports the standard library only.
"""

from __future__ import annotations

import errno
import math
import pickletools
import re
import struct
import zipfile
from typing import Any, BinaryIO

MAX_DIRECTORY = 16_000_000  # bytes of the list of records
MAX_RECORDS = 100_000
MAX_PICKLE = 64_000_000  # bytes
MAX_OPERATIONS = 1_000_000
MAX_CALLS = 100_000  # a tensor takes two
MAX_TUPLE_KEYS = 10_000  # tuples can be made to collide in a dict, which then takes a quadratic time
MAX_NESTING = 64
MAX_DIMENSIONS = 64

END, LOCATOR, END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
STORED_FLAGS = 0x0808  # sizes repeated behind the data, names in UTF-8
ITEM_SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
              "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "Untyped": 1}  # fmt: skip
STORAGE = re.compile(rf"torch(?:\.storage)? ({'|'.join(ITEM_SIZES)})Storage")
DTYPE = re.compile(r"torch (?:(?:float|bfloat|complex|u?int)(8|16|32|64|128)\w*|bool)")
HOOKS, ENCODE = "collections OrderedDict", "_codecs encode"
REBUILD, REBUILD_ANY = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"
FOREIGN = "holds something other than plain data"


class ArchiveError(ValueError):
    """Why a file is not opened as a checkpoint."""


# The zip directory ---------------------------------------------------------------------------------------------------


def check_archive(file: BinaryIO, checksums: bool = True) -> None:
    """Return nothing if the zip file can be given to torch: every record lies in it as it is, once, within its bounds.

    Without `checksums` only the directory and the pickle are read, so that it takes no longer for a large file.
    Raises: ArchiveError with the reason; OSError when it cannot be read.
    """
    size = file.seek(0, 2)
    start = _find_directory(file, size)
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            root = _check_records(records, start)
            broken = archive.testzip() if checksums else None
            if broken is not None:
                raise ArchiveError(f"checksum mismatch in {broken}")
            content = archive.read(f"{root}/data.pkl")
    except ArchiveError:
        raise
    except (zipfile.BadZipFile, EOFError, struct.error, ValueError, OverflowError, RuntimeError) as error:
        raise ArchiveError(f"its list of records is damaged: {error}"[:200]) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # that is a record at a negative place
            raise
        raise ArchiveError("its list of records is damaged") from error
    place = f"{root}/data/"
    check_pickle(content, {r.filename[len(place) :]: r.file_size for r in records if r.filename.startswith(place)})


def _find_directory(file: BinaryIO, size: int) -> int:
    """Return where the list of records begins; it has to fill the file's end, so that no two readers differ on it."""
    early = "file ends early"
    if size < END.size:
        raise ArchiveError(early)
    at = size - END.size
    mark, disk, first, here, count, length, start, comment = _unpack(END, file, at)
    if mark != b"PK\5\6" or comment or disk or first or here != count:
        raise ArchiveError(early)
    if at >= LOCATOR.size + END64.size:
        mark, disk, place, _ = _unpack(LOCATOR, file, at - LOCATOR.size)
        if mark == b"PK\6\7":
            at -= LOCATOR.size + END64.size
            mark, own, _, _, _, _, here, count, length, start = _unpack(END64, file, at)
            if mark != b"PK\6\6" or place != at or own != END64.size - 12 or disk:
                raise ArchiveError(early)
    if start + length != at:
        raise ArchiveError(early)
    if length > MAX_DIRECTORY or not 0 < count <= MAX_RECORDS:
        raise ArchiveError(f"names {count} records")
    return start


def _unpack(layout: struct.Struct, file: BinaryIO, place: int) -> tuple:
    file.seek(place)
    return layout.unpack(file.read(layout.size))


def _check_records(records: list[zipfile.ZipInfo], start: int) -> str:
    """Return the folder that all records lie in. Raises: ArchiveError naming a record that is not plainly stored."""
    root = records[0].filename.partition("/")[0] if records else ""
    names = {record.filename for record in records}
    for record in records:
        parts = record.filename.split("/")
        shown = repr(record.filename[:60])
        if parts[0] != root or {"", ".", ".."} & set(parts) or not record.filename.isprintable() or (
                "\\" in record.filename or ":" in parts[0]):
            raise ArchiveError(f"names a record {shown}")
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise ArchiveError(f"record {shown} is compressed")
        if record.flag_bits & ~STORED_FLAGS:
            raise ArchiveError(f"record {shown} is encrypted or of an unknown kind")
    if len(names) != len(records) or len(records) > MAX_RECORDS or f"{root}/data.pkl" not in names:
        raise ArchiveError("names a record twice, too many, or no data.pkl")
    place = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.header_offset < place:
            raise ArchiveError(f"record {record.filename[:60]!r} overlaps another")
        place = record.header_offset + 30 + len(record.filename.encode()) + record.file_size
        if place > start:
            raise ArchiveError(f"record {record.filename[:60]!r} is larger than the file")
    return root


# The pickle ----------------------------------------------------------------------------------------------------------


class _Item:
    """What an operation of the pickle leaves on the stack: its kind, its value where that matters, and its depth."""

    __slots__ = ("kind", "value", "depth")

    def __init__(self, kind: str, value: Any = None, depth: int = 0):
        self.kind, self.value, self.depth = kind, value, depth


CONTAINERS = ("dict", "list", "tuple", "hooks")
SCALARS = {"NONE": "none", "NEWTRUE": "bool", "NEWFALSE": "bool", "BININT": "int", "BININT1": "int", "BININT2": "int",
           "LONG1": "int", "BINFLOAT": "float", "BINUNICODE": "str", "SHORT_BINSTRING": "str",
           "GLOBAL": "global"}  # fmt: skip
EMPTY = {"EMPTY_DICT": "dict", "EMPTY_LIST": "list", "EMPTY_TUPLE": "tuple"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def check_pickle(content: bytes, sizes: dict[str, int]) -> None:
    """Return nothing if the pickle makes one dict of plain data, whose tensors fit into the records of `sizes`.

    Raises: ArchiveError.
    """
    if len(content) > MAX_PICKLE:
        raise ArchiveError(f"its data.pkl is larger than {MAX_PICKLE // 10**6} MB")
    machine, last = _Machine(sizes), 0
    try:
        for count, (operation, argument, place) in enumerate(pickletools.genops(content)):
            if count >= MAX_OPERATIONS:
                raise ArchiveError("its data.pkl has too many parts")
            machine.step(operation.name, argument)
            last = place
    except ArchiveError:
        raise
    except (ValueError, IndexError, KeyError, struct.error) as error:  # cut short, or operations without operands
        raise ArchiveError("its data.pkl is damaged") from error
    if last != len(content) - 1 or len(machine.stack) != 1 or machine.marks or machine.stack[0].kind != "dict":
        raise ArchiveError("its data.pkl is damaged")


class _Machine:
    """Follow the operations of a pickle without making anything."""

    def __init__(self, sizes: dict[str, int]):
        self.sizes = sizes
        self.stack: list[_Item] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Item] = {}
        self.calls = self.tuple_keys = 0

    def step(self, name: str, argument: Any) -> None:
        """Follow one operation. Raises: ArchiveError for one that plain data does not need; IndexError, KeyError."""
        stack = self.stack
        if name in SCALARS:
            kept = argument if not isinstance(argument, str) or len(argument) <= 200 else ""
            if name == "LONG1" and abs(argument) >= 2**64:
                raise ArchiveError("holds a number beyond 64 bits")
            stack.append(_Item(SCALARS[name], kept))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if self.memo[argument].kind in CONTAINERS:
                raise ArchiveError("holds a container twice")
            stack.append(self.memo[argument])
        elif name in EMPTY:
            stack.append(_Item(EMPTY[name], ()))
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE" or name in TUPLES:
            self.push_tuple(self.pop(TUPLES[name]) if name in TUPLES else self.pop_mark())
        elif name in ("APPEND", "APPENDS"):
            self.fill("list", self.pop(1) if name == "APPEND" else self.pop_mark())
        elif name in ("SETITEM", "SETITEMS"):
            self.fill("dict", self.pop(2) if name == "SETITEM" else self.pop_mark())
        elif name == "BINPERSID":
            stack.append(self.storage(*self.pop(1)))
        elif name == "REDUCE":
            stack.append(self.call(*self.pop(2)))
        elif not (name == "STOP" or (name == "PROTO" and argument == 2 and not stack)):
            raise ArchiveError(FOREIGN)

    def pop(self, count: int) -> list[_Item]:
        """Return the topmost items, removed; those below a mark are out of reach."""
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise IndexError
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_mark(self) -> list[_Item]:
        """Return the items above the last mark, removed with it."""
        place = self.marks.pop()
        items = self.stack[place:]
        del self.stack[place:]
        return items

    def push_tuple(self, items: list[_Item]) -> None:
        """Push a tuple; the depth of what is in it counts."""
        self.stack.append(_Item("tuple", items, _depth(items)))

    def fill(self, kind: str, items: list[_Item]) -> None:
        """Put items into the list or, as names and values, into the dict on top."""
        target = self.stack[-1]
        if target.kind != kind or (self.marks and len(self.stack) <= self.marks[-1]):
            raise ArchiveError(FOREIGN)
        if kind == "dict":
            if len(items) % 2:
                raise IndexError
            self.tuple_keys += sum(key.kind == "tuple" for key in items[::2])
            if self.tuple_keys > MAX_TUPLE_KEYS or not all(_is_key(key) for key in items[::2]):
                raise ArchiveError(FOREIGN)
        target.depth = max(target.depth, _depth(items))
        if target.depth > MAX_NESTING or any(item.kind in ("global", "storage", "hooks") for item in items):
            raise ArchiveError(FOREIGN)

    def storage(self, reference: _Item) -> _Item:
        """Return the storage that a reference names: (kind, key, place, number of cells) of a record."""
        kinds = ["str", "global", "str", "str", "int"]
        if reference.kind != "tuple" or [item.kind for item in reference.value] != kinds:
            raise ArchiveError(FOREIGN)
        word, kind, key, _, cells = (item.value for item in reference.value)
        match = STORAGE.fullmatch(kind)
        if word != "storage" or match is None:
            raise ArchiveError(FOREIGN)
        bytes_ = cells * ITEM_SIZES[match[1]]
        if key not in self.sizes or not 0 <= bytes_ == self.sizes[key]:
            raise ArchiveError(f"record data/{key!r} has not the size that its tensors need"[:100])
        return _Item("storage", (cells, ITEM_SIZES[match[1]]))

    def call(self, function: _Item, arguments: _Item) -> _Item:
        """Return what one of the four known calls gives. Raises: ArchiveError for any other."""
        self.calls += 1
        if function.kind != "global" or arguments.kind != "tuple" or self.calls > MAX_CALLS:
            raise ArchiveError(FOREIGN)
        items = list(arguments.value)
        if function.value == HOOKS and not items:
            return _Item("hooks")
        if function.value == ENCODE and [i.kind for i in items] == ["str", "str"] and items[1].value == "latin1":
            return _Item("bytes")
        if function.value in (REBUILD, REBUILD_ANY) and _is_tensor(items, function.value == REBUILD_ANY):
            return _Item("tensor")
        raise ArchiveError(FOREIGN)


def _depth(items: list[_Item]) -> int:
    return 1 + max((item.depth for item in items), default=0)


def _is_key(item: _Item) -> bool:
    if item.kind == "tuple":
        return item.depth <= MAX_NESTING and all(_is_key(inner) for inner in item.value)
    return item.kind in ("str", "int", "float", "bool", "none", "bytes")


def _is_tensor(items: list[_Item], has_dtype: bool) -> bool:
    """Return whether these are arguments of a tensor that lies within its storage; torch would enlarge the storage."""
    kinds = ["storage", "int", "tuple", "tuple", "bool", "hooks"] + ["global"] * has_dtype
    dtype = DTYPE.fullmatch(items[6].value) if has_dtype and len(items) > 6 else None
    if [item.kind for item in items] != kinds or has_dtype is (dtype is None):
        return False
    (cells, width), offset, size, stride = (item.value for item in items[:4])
    if dtype is not None:
        cells = cells * width * 8 // int(dtype[1] or 8)
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS or {item.kind for item in [*size, *stride]} - {"int"}:
        return False
    sides, steps = [item.value for item in size], [item.value for item in stride]
    if offset < 0 or min([*sides, *steps], default=0) < 0 or max([*sides, *steps], default=0) >= 2**40:
        return False
    reach = offset + 1 + sum((side - 1) * step for side, step in zip(sides, steps, strict=True)) if all(sides) else 0
    return max(reach, math.prod(sides)) <= cells
