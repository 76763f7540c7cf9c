"""A second device for machines that have only one: it computes on the CPU, and is as strict as a GPU.

`install` makes it known to torch as "standin", once in a process. Under `Standin()` a tensor on it holds a CPU tensor
and every operation runs on that one, so results are those of the CPU bit for bit. As on a GPU, operands have to be on
one device, but for numbers (tensors without dimensions) and for copies, and a tensor's values reach the host only
through a copy or a read of one number, which are counted (`waits`).
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
DEVICE = "standin"
COPIES = {aten._to_copy.default, aten.copy_.default}
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
SIZED = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
         aten.repeat_interleave.Tensor}  # how many values there are depends on the values
SELECTS = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


@functools.cache
def install() -> torch.device:
    """Make the device known to torch and return it."""
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Module(_DummyBackendModule):
        """What torch asks of a device."""

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    _setup_privateuseone_for_python_backend(DEVICE, Module())
    for name, kernel in (("aten::empty_strided", empty_strided), ("aten::copy_", copy_)):  # what torch.tensor calls
        torch.library.impl(name, "PrivateUse1")(kernel)
    return torch.device(DEVICE, 0)


def empty_strided(size: list[int], stride: list[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """Return an empty tensor on the device."""
    return StandinTensor(torch.empty_strided(size, stride, dtype=dtype))


def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy the values of a CPU tensor."""
    target.held.copy_(source)
    return target


class MixedDevices(RuntimeError):
    """An operation was given tensors of both devices."""


class StandinTensor(Tensor):
    """A tensor on the device; `held` is the one on the CPU that has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> StandinTensor:
        """Return the tensor that holds a CPU tensor."""
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=install(),
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Compute outside `Standin()`, for tensors that outlive it."""
        return compute(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Return the values, after a copy to the host."""
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        """Return the address of the values, so that tensors can be told apart."""
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict) -> StandinTensor:
        """Return a copy; torch's own would copy a storage, which there is none of."""
        return self.detach().clone()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"standin({self.held!r})"


def require_one_device(func: Any, tensors: list[Tensor], given: list[Any]) -> None:
    """Raises: MixedDevices where a GPU would refuse the operands."""
    there = [isinstance(x, StandinTensor) for x in tensors]
    if func in COPIES or not any(there) or all(there):
        return
    if func in SELECTS and isinstance(given[0], StandinTensor):  # indices may be on the CPU
        tensors = [x for x in tensors if x.dtype not in (torch.int64, torch.bool)]
    if any(x.ndim and not isinstance(x, StandinTensor) for x in tensors):
        raise MixedDevices(f"{func}: {[(str(x.device), tuple(x.shape)) for x in tensors]}")


def is_wait(func: Any, tensors: list[Tensor], goes_there: bool) -> bool:
    """Return whether the host has to wait for the values of an operand."""
    masked = func in SELECTS and any(x.dtype == torch.bool for x in tensors[1:])
    return masked or func in READS or func in SIZED or (func in COPIES and not goes_there)


def compute(func: Any, args: tuple, kwargs: dict, waits: list[str] | None = None) -> Any:
    """Return what an operation gives, computed on the CPU."""
    given, spec = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in given if isinstance(x, Tensor)]
    require_one_device(func, tensors, given)
    asked = kwargs.get("device")
    args, kwargs = pytree.tree_unflatten([x.held if isinstance(x, StandinTensor) else x for x in given], spec)
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    found = func(*args, **kwargs)
    was_there = any(isinstance(x, StandinTensor) for x in tensors)
    goes_there = was_there if asked is None else torch.device(asked).type == DEVICE
    if func is aten.copy_.default:
        goes_there = isinstance(given[0], StandinTensor)
    if waits is not None and was_there and is_wait(func, tensors, goes_there):
        waits.append(str(func))
    if func in READS or not goes_there:
        return found.clone() if func in COPIES and was_there and asked is not None else found
    same = {id(x.held): x for x in tensors if isinstance(x, StandinTensor)}
    return pytree.tree_map_only(
        Tensor, lambda x: same[id(x)] if id(x) in same else StandinTensor(x.clone() if asked is not None else x), found
    )


class Standin(TorchDispatchMode):
    """Operations on the device are possible inside; `waits` names those that read its values."""

    def __init__(self) -> None:
        super().__init__()
        install()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Compute, and note what waits."""
        return compute(func, args, kwargs or {}, self.waits)


def main(words: list[str]) -> int:
    """Run a command line of the driver on the device; the last line printed says what each step waited for."""
    import answering
    import arc_system
    import trainloop_complete_with_fixes as driver
    from config import parse_command_line

    device, keyed, take = install(), arc_system.keyed_generator, driver.take_step
    steps: list[list[str]] = []
    for module in (driver, arc_system, answering):
        module.choose_device = lambda name: device  # type: ignore[attr-defined]
    driver.keyed_generator = lambda where, *key: keyed(torch.device("cpu"), *key)  # the numbers of the CPU
    with Standin() as standin:

        def take_step(*args: Any, **options: Any) -> driver.Step:
            before = len(standin.waits)
            step = take(*args, **options)
            steps.append(standin.waits[before:])
            return step

        driver.take_step = take_step
        code = driver.main(parse_command_line(words))
    print("\n" + json.dumps(steps))
    return code


def leave(code: int) -> NoReturn:
    """End the process at once: autograd's thread of the device runs Python, and can fall over an interpreter's end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    leave(main(sys.argv[1:]))
