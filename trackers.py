"""Where `--report-to` sends what metrics.jsonl gets: TensorBoard, Weights & Biases, or trackio.

A tracker is fed on a thread of its own, so that one that fails or hangs costs a warning, never a batch. Its package is
imported there, and only when the flag names it. Imports config and report. Used by the driver.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import queue
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from config import UnsafeFileError, parse_json, read_regular
from report import RunFolderError, read_metrics, write_json_atomic

PROJECT = "arc-efe"
PATIENCE = 30.0  # seconds that the end of a session waits for a tracker
STATE = "trackers.json"  # what wandb and trackio have got of a run, in its folder
MAX_STATE = 100_000  # bytes
PLACE = ("t", "epoch", "batch", "step")  # where a record stands; not measured
WANDB_HOST = "https://api.wandb.ai"

Record = dict[str, Any]


class TrackerError(RuntimeError):
    """A tracker that cannot be used. `hint` says what to type; the driver exits with code 4."""

    exit_code = 4

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


def require_tracker(name: str) -> None:
    """Refuse a tracker whose package is not installed; "none" needs none. Raises: TrackerError."""
    spec = importlib.util.find_spec(name) if name != "none" else None
    if name != "none" and (spec is None or spec.origin is None):  # without an origin it is a mere folder of that name
        raise TrackerError(f"--report-to {name} needs the package {name}", f"pip install {name}, or --report-to none")


def scalars(record: Record) -> dict[str, float]:
    """Return the numbers of a record of metrics.jsonl under "event/field"; a health flag is 1 raised, 0 over."""
    event = record.get("event", "")
    if event == "flag":
        return {f"flag/{record['flag']}": float(record["raised"])}
    numbers = {name: value for name, value in record.items() if name not in PLACE and isinstance(value, (int, float))}
    return {f"{event}/{name}": float(value) for name, value in numbers.items()}


# 1. The trackers -----------------------------------------------------------------------------------------------------


class Adaptor(Protocol):
    """One tracker. Whatever any of these raises ends the reporting of this session."""

    def go_back(self, step: int) -> None:
        """The run goes on from a step; those of its records that still hold are sent again, the old ones first."""

    def log(self, record: Record) -> None:
        """Take a record, unless the tracker has it already."""

    def settle(self) -> None:
        """Note what was taken; called when no record waits."""

    def close(self) -> None:
        """Write out what was taken."""


class TensorBoard:
    """Event files in RUN/tb. A step that the run goes back behind is purged there, and written anew."""

    def __init__(self, run_dir: Path):
        self._folder = run_dir / "tb"
        self._writer: Any = None
        self._first = 0  # records of earlier steps are in the files already
        self._purge: int | None = None

    def go_back(self, step: int) -> None:
        """Purge what the files hold from this step on; without files all records are new."""
        self.close()
        has_files = any(self._folder.glob("events.*"))
        self._first, self._purge = (step, step) if has_files else (0, None)

    def log(self, record: Record) -> None:
        """Write the record's numbers at its step and time."""
        if record["step"] < self._first:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge, flush_secs=30)
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"], walltime=record.get("t"))

    def settle(self) -> None:
        """Do nothing: the writer flushes by time."""

    def close(self) -> None:
        """Close the current file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class Hosted:
    """wandb, or trackio, whose interface is the same: a run that later sessions go on with under its id.

    Neither can take back a step. So trackers.json holds how far the tracker has got, and what comes before that is not
    sent again: where a run goes back, the first numbers of a step stay. It also holds the id, a new one for each run
    folder, so that two runs of one name stay apart.
    """

    def __init__(self, name: str, run_dir: Path, config: dict[str, Any]):
        self._name, self._run_dir, self._config = name, run_dir, config
        self._run: Any = None
        self._id = ""
        self._step, self._events = -1, []  # the last step that was sent, and what of it

    def go_back(self, step: int) -> None:
        """Do nothing: what was sent stays."""

    def log(self, record: Record) -> None:
        """Send the record's numbers, unless they come before those that were sent last or are among them."""
        if self._run is None:
            self._read_state()
            self._run = self._open()
        step, numbers = record["step"], scalars(record)
        event = record["flag"] if record.get("event") == "flag" else record.get("event")
        if step < self._step or (step == self._step and event in self._events) or not numbers:
            return
        if self._name == "wandb":  # its own steps never go back, and two records of one step are two calls
            self._run.log({**numbers, "step": step})
        else:
            self._run.log(numbers, step=step)
        if step > self._step:
            self._step, self._events = step, []
        self._events.append(event)

    def settle(self) -> None:
        """Write trackers.json."""
        if self._run is not None:
            mine = {"id": self._id, "step": self._step, "events": self._events}
            write_json_atomic(self._run_dir / STATE, {**self._all_states(), self._name: mine})

    def close(self) -> None:
        """Finish the tracker's run, which waits until all is written or uploaded."""
        if self._run is not None:
            self._run.finish()
        self._run = None

    def _all_states(self) -> dict[str, Any]:
        try:
            states = parse_json(read_regular(self._run_dir / STATE, MAX_STATE))
        except (FileNotFoundError, UnsafeFileError, ValueError):
            return {}
        return states if isinstance(states, dict) else {}

    def _read_state(self) -> None:
        """Take up the id and what was sent from trackers.json; begin anew where they cannot be read."""
        state = self._all_states().get(self._name)
        known = state if isinstance(state, dict) else {}
        step, events, name = known.get("step"), known.get("events"), known.get("id")
        if isinstance(step, int) and isinstance(events, list) and isinstance(name, str) and name:
            self._step, self._events, self._id = step, events, name
        else:
            plain = re.sub(r"[^A-Za-z0-9_-]", "-", self._run_dir.name)[:80]
            self._id = f"{plain}-{os.urandom(4).hex()}"

    def _open(self) -> Any:
        """Return the tracker's run, begun or gone on with; nothing of this asks at the terminal."""
        common = {"project": PROJECT, "config": self._config, "resume": "allow"}
        if self._name == "trackio":
            import trackio

            return trackio.init(**common, name=self._id, embed=False)
        import wandb

        run = wandb.init(**common, id=self._id, name=self._run_dir.name, dir=str(self._run_dir), mode=wandb_mode(),
                         settings=wandb.Settings(console="off"))  # fmt: skip
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def wandb_mode() -> str:
    """Return $WANDB_MODE, else online where wandb finds a key without asking for one, else offline."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode:
        return mode
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_HOST)).hostname
    for place in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            hosts = netrc.netrc(os.path.expanduser(place)).hosts
        except (OSError, netrc.NetrcParseError):
            continue
        if host in hosts:
            return "online"
    return "offline"


# 2. The thread that feeds it -----------------------------------------------------------------------------------------


class Tracker:
    """Sends records to a tracker, in order, without waiting; without an adaptor it does nothing.

    `warn` is told once why the tracker failed; from then on the tracker is off.
    """

    def __init__(self, adaptor: Adaptor | None = None, name: str = "none", warn: Callable[[str], object] = print):
        self._adaptor, self._name, self._warn = adaptor, name, warn
        self._waiting: queue.SimpleQueue[Callable[[Adaptor], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, record: Record) -> None:
        """Hand a record over, as it stands in metrics.jsonl."""
        self._put(lambda adaptor: adaptor.log(record))

    def go_back(self, step: int, metrics: Path) -> None:
        """Tell that the run goes on from a step; `metrics` is its metrics.jsonl, with what still holds."""
        if self._adaptor is None:
            return
        self._put(lambda adaptor: adaptor.go_back(step))
        try:
            records = read_metrics(metrics)
        except RunFolderError as error:
            self._warn(f"{error}; --report-to {self._name} goes on without the records before step {step}")
            return
        for record in records:
            if isinstance(record.get("step"), int):
                self.send(record)

    def close(self, patience: float = PATIENCE) -> None:
        """Wait until the tracker has everything, at most `patience` seconds."""
        if self._thread is None:
            return
        self._waiting.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            self._warn(f"--report-to {self._name} has not finished in {patience:g} s; it may lack the last records")
        self._thread = None

    def _put(self, job: Callable[[Adaptor], object]) -> None:
        if self._adaptor is None:
            return
        if self._thread is None:  # a daemon, because a hanging tracker must not keep the process alive
            self._thread = threading.Thread(target=self._serve, args=(self._adaptor,), name="tracker", daemon=True)
            self._thread.start()
        self._waiting.put(job)

    def _serve(self, adaptor: Adaptor) -> None:
        try:
            while (job := self._waiting.get()) is not None:
                job(adaptor)
                if self._waiting.empty():
                    adaptor.settle()
            adaptor.settle()
            adaptor.close()
        except Exception as error:
            self._adaptor = None
            self._warn(f"--report-to {self._name} failed ({type(error).__name__}: {error}); it is off until the next"
                       " session, training goes on")  # fmt: skip


def make_tracker(name: str, run_dir: Path, config: dict[str, Any], warn: Callable[[str], object]) -> Tracker:
    """Return the tracker that `--report-to` names for a run folder; one that does nothing for "none"."""
    if name == "none":
        return Tracker()
    adaptor = TensorBoard(run_dir) if name == "tensorboard" else Hosted(name, run_dir, config)
    return Tracker(adaptor, name, warn)
