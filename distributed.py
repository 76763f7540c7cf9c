"""Several processes that train one model together: who they are, what they add up, which pairs of a batch each has.

Imports torch and config only; used by the loss, the policy, the system, evaluation and the driver.
All processes hold the same state and change it alike. Of a batch each computes a share; what a term needs of the others
is gathered inside it, and the gradients are added up by hand, flattened, after the backward pass. That is simpler than
DistributedDataParallel, which wraps the forward of one module (a step calls many parts), takes means over processes
(shares differ in size), and must not meet a process without a pair; it would hide the sum behind the backward pass,
which only a large language model would notice.
The one collective on tensors is a sum. Rows are gathered by adding what is 0 elsewhere, which rounds nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from config import ConfigError

T = TypeVar("T")
PATIENCE = timedelta(hours=1)  # how long a process waits for the others: all priors lie between two meetings
BUCKET = 2**25  # elements that are flattened together, so that the copy stays small beside the gradients
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")  # of torchrun


class PeerError(RuntimeError):
    """The processes cannot go on together: one is gone, or their states differ. The driver exits with code 1."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


class Ended(Exception):
    """Another process failed and has said why; this one ends with the same exit code."""

    def __init__(self, code: int):
        super().__init__(f"another process ended with exit code {code}")
        self.code = code


# 1. The processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The processes of a run, all on one machine, numbered by `rank`; the first one (0) alone writes. One process is a
    world as well.

    launch: which call of torchrun started them, '' without; restarts: how often torchrun has started them anew.
    What speaks of all processes has to be called by all of them, in the same order.
    """

    rank: int = 0
    size: int = 1
    launch: str = ""
    restarts: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> World:
        """Return the world that torchrun describes. Raises: ConfigError when that is not whole, or several machines."""
        try:
            rank, size, here, restarts = (int(environment.get(name) or 0) for name in VARIABLES)
        except ValueError as error:
            raise ConfigError(f"{' or '.join(VARIABLES)} is no number", "unset it, or start with torchrun") from error
        if size > 1 and not all(environment.get(name) for name in ("RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")):
            raise ConfigError("WORLD_SIZE is set, but not RANK, LOCAL_WORLD_SIZE and MASTER_ADDR",
                              "unset it, or start with torchrun")  # fmt: skip
        if size > 1 and here != size:
            raise ConfigError("processes on several machines", "torchrun --standalone --nproc-per-node N")
        launch = environment.get("TORCHELASTIC_RUN_ID", "")
        if launch == "none":  # torchrun's default without --standalone, the same for each call, unlike its process
            launch = f"torchrun {os.getppid()}"
        return cls(rank, max(size, 1), launch, restarts)

    @property
    def is_first(self) -> bool:
        """Return whether this process writes."""
        return self.rank == 0

    def join(self) -> None:
        """Meet the other processes: gloo for what lies on the host, nccl for what lies on a GPU.

        Raises: PeerError when they do not come.
        """
        if self.size == 1:
            return
        from torch import distributed

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            place, _, _ = next(distributed.rendezvous("env://", timeout=PATIENCE))
            # torchrun keeps this place for the processes that it starts anew: those of before must not be met there.
            place = distributed.PrefixStore(f"restart {self.restarts}", place)
            distributed.init_process_group(
                backend, store=place, rank=self.rank, world_size=self.size, timeout=PATIENCE
            )
        except (RuntimeError, ValueError) as error:
            raise PeerError(f"the {self.size} processes did not meet ({_first_line(error)})",
                            "MASTER_ADDR and MASTER_PORT say where; torchrun --standalone sets them"
                            ) from error  # fmt: skip

    def leave(self) -> None:
        """Part from the others, at a clean end."""
        if self.size > 1:
            from torch import distributed

            distributed.destroy_process_group()

    # Tensors

    def add_(self, tensor: Tensor) -> Tensor:
        """Return the tensor after adding those of all other processes to it, in place. Raises: PeerError."""
        if self.size > 1:
            from torch import distributed

            self._meet(lambda: distributed.all_reduce(tensor))
        return tensor

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor's sum over all processes, without a graph; counts are exact up to 2**24.

        All lie on one device. A single process gets its own tensors.
        """
        if self.size == 1:
            return list(tensors)
        found: list[Tensor] = []
        for bucket in _buckets(tensors):
            flat = self.add_(torch.cat([tensor.detach().reshape(-1).float() for tensor in bucket]))
            parts = flat.split([tensor.numel() for tensor in bucket])
            found += [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, bucket, strict=True)]
        return found

    # Plain values

    def tell(self, value: T) -> T:
        """Return the first process's value, on every process; it has to be plain data."""
        if self.size == 1:
            return value
        from torch import distributed

        told = [value]
        self._meet(lambda: distributed.broadcast_object_list(told, src=0, device=torch.device("cpu")))
        return told[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        self._meet(lambda: distributed.all_gather_object(values, value))
        return values

    def first(self, action: Callable[[], T], code_of: Callable[[Exception], int] = lambda error: 1) -> T:
        """Return, on every process, what the action returned on the first one, which alone does it.

        Raises: what the action raised there; Ended with its exit code, which `code_of` tells, on the others.
        """
        if self.size == 1:
            return action()
        value, code = None, 0
        if self.is_first:
            try:
                value = action()
            except Exception as error:
                self.tell((None, code_of(error) or 1))
                raise
        value, code = self.tell((value, code))
        if code:
            raise Ended(code)
        return value

    def together(self, action: Callable[[], T], code_of: Callable[[Exception], int] = lambda error: 1) -> T:
        """Return what the action, which meets nobody, returned here, once it has succeeded everywhere.

        Raises: what it raised, on the first process where it did; Ended with that one's exit code on the others.
        """
        if self.size == 1:
            return action()
        value, failure = None, None
        try:
            value = action()
        except Exception as error:
            failure = error
        codes = self.gather(0 if failure is None else code_of(failure) or 1)
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed == self.rank and failure is not None:
            raise failure
        if failed is not None:
            raise Ended(codes[failed])
        return value

    def require_equal(self, digest: int, what: str) -> None:
        """Refuse processes whose digests differ. Raises: PeerError, on all of them."""
        digests = self.gather(digest)
        differing = [str(rank) for rank, found in enumerate(digests) if found != digests[0]]
        if differing:
            raise PeerError(
                f"{what}: process {', '.join(differing)} no longer agrees with process 0",
                "--resume goes on from the newest checkpoint; all processes need the same hardware and versions",
            )

    def _meet(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PeerError(
                f"another process is gone ({_first_line(error)})",
                "see that one's error; --resume goes on, as torchrun --max-restarts 3 does by itself",
            ) from error


ALONE = World()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:150]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in runs of at most BUCKET elements, or of one tensor."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and filled + tensor.numel() > BUCKET:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.numel()
    if bucket:
        yield bucket


def fingerprint(value: Any) -> int:
    """Return a number that a changed bit of nested plain data and tensors changes; waits once for each device."""
    sums: dict[torch.device, list[Tensor]] = {}
    found = hashlib.blake2b(digest_size=7)

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            found.update(f"{item.dtype}{tuple(item.shape)}".encode())
            flat = item.detach().contiguous().reshape(-1)
            width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
            sums.setdefault(flat.device, []).append(flat.view(width).sum(dtype=torch.int64))
        elif isinstance(item, dict):
            for key, part in item.items():
                found.update(str(key).encode())
                add(part)
        elif isinstance(item, (list, tuple)):
            for part in item:
                add(part)
        else:
            found.update(repr(item).encode())

    add(value)
    for one_device in sums.values():
        found.update(repr(torch.stack(one_device).tolist()).encode())
    return int.from_bytes(found.digest(), "little")


# 2. A process's share of a batch -------------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """The sum over all processes; the gradient of each summand is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.add_(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.world.add_(gradient.clone(memory_format=torch.contiguous_format)), None


@dataclass(frozen=True)
class Share:
    """The pairs of a batch that this process computes: `count` of `total`, from number `start` on.

    Where a batch has fewer pairs than there are processes, the others compute its first pair again, so that they come
    to all meetings, and it counts for nothing: count 0. contexts: of the whole batch. A single process's share is
    everything, whatever the numbers say.
    """

    world: World = ALONE
    start: int = 0
    count: int = 0
    total: int = 0
    contexts: tuple[Any, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Return whether there is no other process."""
        return self.world.size == 1

    @property
    def counts(self) -> bool:
        """Return whether any of the pairs computed here counts."""
        return self.is_whole or self.count > 0

    @property
    def weight(self) -> float:
        """Return the share of the batch's pairs, within 0..1."""
        return 1.0 if self.is_whole else self.count / self.total

    def rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return tensors [b, ...] of this share as those of the whole batch [B, ...], in its order; gradients flow.

        They travel as float64, so that nothing is rounded.
        """
        if self.is_whole:
            return tensors
        flat = torch.cat([tensor.reshape(len(tensor), -1).double() for tensor in tensors], 1)[: self.count]
        placed = F.pad(flat, (0, 0, self.start, self.total - self.start - self.count))
        parts = _Sum.apply(placed, self.world).split([tensor[0].numel() for tensor in tensors], 1)
        return tuple(
            part.reshape(self.total, *tensor.shape[1:]).to(tensor.dtype)
            for part, tensor in zip(parts, tensors, strict=True)
        )

    def own(self, rows: Tensor) -> Tensor:
        """Return this share's rows of those of the whole batch; none where nothing counts."""
        return rows if self.is_whole else rows[self.start : self.start + self.count]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all shares, without a graph."""
        return self.world.sum([values if self.counts else torch.zeros_like(values)])[0]

    def divisor(self, count: Tensor) -> Tensor:
        """Return what to divide a sum over `count` values of this share by; at least 1 for a single process.

        So divided, and then weighted with `weight`, the shares' sums add up to the mean over the whole batch.
        """
        return count.clamp_min(1) if self.is_whole else self.sum(count).clamp_min(1) * (self.weight or 1.0)


WHOLE = Share()


def share_of(world: World, sizes: Sequence[int], contexts: Sequence[Any]) -> tuple[int, Share]:
    """Return which part of a batch this process computes, and its share; `sizes` are the parts' numbers of pairs."""
    here = world.rank < len(sizes)
    part = world.rank if here else 0
    return part, Share(world, sum(sizes[:part]), sizes[part] if here else 0, sum(sizes), tuple(contexts))
