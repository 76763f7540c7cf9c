"""Remember solved tasks, recall similar ones, and learn how desirable each colour is in each task.

Holds the admission threshold, the episodic memory (plain tensors on the CPU), the learned reader that lets a recalled
entry enter the prompt and the preference, the memory of lessons (what told right answers from wrong ones), and the
Z-learning table. Imports numpy, torch, config and arc_data (L0). Used by arc_system, evaluate and the driver;
everything that must survive a restart is in a state_dict of plain values.

Shapes: B batch (queries), K recalled entries, F features, Dp prompt width, E evidence, H rows, W columns; 10 colours.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc_data import to_device
from config import MemoryConfig

NUM_COLORS = 10
OUTSIDE = 10  # row of the Z table for cells that the input grid does not cover

MIN_SCORES = 50  # scores seen before the threshold leaves its lower bound
HYSTERESIS = 0.05  # a stored entry may fall this far below the threshold
GRACE = 200  # admissions during which an entry is not removed for its score
MAX_PER_TASK = 2
DUPLICATE_COSINE = 0.995
REFRESH_COSINE = 0.8
SOFTMAX_TEMPERATURE = 0.1
FEATURE_WEIGHT = 0.5  # share of the features in the similarity; the prompt has the rest
FEATURE_CLIP = 5.0  # standard deviations; keeps a nearly constant feature from ruling the key
GAIN_RATE = 0.1
GAIN_SCALE = 0.05
AGE_SCALE = 2000.0

LESSON_TEMPERATURE = 0.2
LESSON_CLIP = 3.0  # standard deviations
LEAST_DEVIATION = 0.01


# 1. Threshold ------------------------------------------------------------------------------------------------------


class EmaThreshold:
    """Admission threshold theta = clip(mean + kappa * std, low, high) of exponentially averaged scores.

    Decisions use the statistics from before the scores that are judged; then the statistics follow. Scores in [0, 1].
    """

    def __init__(self, config: MemoryConfig):
        self.beta, self.kappa = config.threshold_beta, config.threshold_kappa
        self.low, self.high = config.threshold_low, config.threshold_high
        self.count, self._mean, self._square = 0, 0.0, 0.0

    @property
    def theta(self) -> float:
        """Return the least score that is admitted now."""
        if self.count < MIN_SCORES:
            return self.low
        correction = 1.0 - self.beta**self.count
        mean = self._mean / correction
        variance = max(self._square / correction - mean * mean, 0.0)
        return min(max(mean + self.kappa * variance**0.5, self.low), self.high)

    def admit(self, score: float, exact: bool) -> bool:
        """Return whether one score is admitted, then let the statistics follow it; a non-finite score does neither."""
        return bool(self.admit_batch(np.array([score]), np.array([exact]))[0])

    def admit_batch(self, score: np.ndarray, exact: np.ndarray) -> np.ndarray:
        """Return bool [B], all decided with the old statistics; then update them in the order of the batch."""
        score = np.asarray(score, dtype=np.float64)
        finite = np.isfinite(score)
        accepted = finite & (np.asarray(exact, dtype=bool) | (np.where(finite, score, -np.inf) >= self.theta))
        seen = score[finite]
        if seen.size:
            decay = self.beta ** np.arange(seen.size - 1, -1, -1, dtype=np.float64)
            kept = self.beta**seen.size
            self._mean = float(kept * self._mean + (1.0 - self.beta) * (decay * seen).sum())
            self._square = float(kept * self._square + (1.0 - self.beta) * (decay * seen * seen).sum())
            self.count += int(seen.size)
        return accepted

    def keep(self, score: float) -> bool:
        """Return whether a stored entry with this re-evaluated score stays; weaker than `admit`, changes nothing."""
        return not np.isfinite(score) or score >= self.theta - HYSTERESIS

    def state_dict(self) -> dict[str, float | int]:
        """Return the statistics as plain numbers."""
        return {"count": self.count, "mean": self._mean, "square": self._square}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Restore what `state_dict` returned."""
        self.count, self._mean, self._square = int(state["count"]), float(state["mean"]), float(state["square"])


# 2. Memory ---------------------------------------------------------------------------------------------------------


@dataclass
class Candidates:
    """What a batch offers to the memory; nothing in it may stem from an answer that is judged later.

    task_ids, pair_ids, size_rules: B strings (base task id; the pair within or across tasks; name of the size rule);
    features [B, F]; prompt, delta [B, Dp] (delta: the move in prompt space that worked);
    color_map [B, 10, 10] rows p(c_out | c_in) in canonical colours; score, prior_score [B] in [0, 1]: of the answer,
    and of what the demonstrations' prior answers alone; exact [B] bool.
    """

    task_ids: Sequence[str]
    pair_ids: Sequence[str]
    size_rules: Sequence[str]
    features: Tensor
    prompt: Tensor
    delta: Tensor
    color_map: Tensor
    score: Tensor
    prior_score: Tensor
    exact: Tensor


@dataclass(frozen=True)
class Recall:
    """What the memory returns, best entry first, on the device of the query; columns that are not `valid` weigh 0.

    weights [B, K+1]: softmax over the entries and, last, the null entry, which competes with the least similarity;
    prompts, deltas [B, K, Dp]; color_maps [B, K, 10, 10] (canonical colours); similarity [B, K] in [-1, 1];
    valid [B, K] bool; index [B, K] number of the entry, stable while others come and go, -1 where not valid.
    """

    weights: Tensor
    prompts: Tensor
    deltas: Tensor
    color_maps: Tensor
    similarity: Tensor
    valid: Tensor
    index: Tensor


class EntryTable:
    """Entries as rows of plain tensors on the CPU that grow up to the capacity; a pair of a task taught each."""

    def __init__(self, capacity: int, columns: dict[str, tuple[tuple[int, ...], torch.dtype]], *kinds: str):
        self.capacity = capacity
        names = ("number", "task", "pair", *kinds)
        self._shapes = {**columns, **dict.fromkeys(names, ((), torch.int64))}
        self._size = 0
        self._rows = {name: torch.zeros(0, *shape, dtype=dtype) for name, (shape, dtype) in self._shapes.items()}
        self._names: dict[str, dict[str, int]] = {kind: {} for kind in ("task", "pair", *kinds)}

    def __len__(self) -> int:
        return self._size

    def bytes_of(self, entries: int) -> int:
        """Return what so many entries take, or as many as the table holds."""
        each = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._shapes.values())
        return min(entries, self.capacity) * each

    def owners(self) -> list[tuple[str, str]]:
        """Return the (task id, pair id) of each entry: whose answer it was learned from."""
        names = {kind: list(texts) for kind, texts in self._names.items()}
        ids = zip(self._live("task").tolist(), self._live("pair").tolist(), strict=True)
        return [(names["task"][task], names["pair"][pair]) for task, pair in ids]

    def _live(self, name: str) -> Tensor:
        return self._rows[name][:self._size]

    def _intern(self, kind: str, text: str) -> int:
        return self._names[kind].setdefault(text, len(self._names[kind]))

    def _identify(self, kind: str, texts: Sequence[str]) -> Tensor:
        table = self._names[kind]
        return torch.tensor([table.get(text, -1) for text in texts], dtype=torch.int64)

    def _write(self, row: int, entry: dict[str, Any]) -> None:
        for name in self._shapes:
            self._rows[name][row] = entry[name]

    def _remove(self, row: int) -> None:
        last = self._size - 1
        for value in self._rows.values():
            value[row] = value[last]
        self._size = last

    def _append(self) -> int:
        """Return the row of a new entry; the tensors double, up to the capacity, when they are full."""
        allocated = len(self._rows["number"])
        if self._size == allocated:
            extra = min(max(64, allocated), self.capacity - allocated)
            self._rows = {name: torch.cat([value, value.new_zeros(extra, *value.shape[1:])])
                          for name, value in self._rows.items()}
        self._size += 1
        return self._size - 1

    def _entries_state(self) -> dict[str, Any]:
        return {"rows": {name: self._live(name).clone() for name in self._shapes},
                "names": {kind: list(table) for kind, table in self._names.items()}}

    def _load_entries(self, state: dict[str, Any]) -> None:
        """Restore what `_entries_state` returned. Raises: ValueError when widths differ; then nothing has changed."""
        for name, (shape, _) in self._shapes.items():
            found = tuple(state["rows"][name].shape[1:])
            if found != shape:
                raise ValueError(f"memory: expected {name} of shape {list(shape)} per entry, got {list(found)}")
        self._rows = {name: state["rows"][name].to("cpu", dtype).clone() for name, (_, dtype) in self._shapes.items()}
        self._size = len(self._rows["number"])
        self._names = {kind: {text: i for i, text in enumerate(state["names"][kind])} for kind in self._names}

    def _keep(self, rows: Tensor) -> None:
        """Forget all entries but these rows."""
        self._rows = {name: value[rows].clone() for name, value in self._rows.items()}
        self._size = len(rows)


class MemoryBuffer(EntryTable):
    """Episodic memory: plain float32 tensors on the CPU that grow up to the capacity, searched by one product.

    `recall` changes nothing; `admit`, `count_hits`, `update_gain`, `refresh` and `reevaluate` do, so an optimizer step
    that is skipped leaves the memory as it was if the caller skips them too. Task ids are base ids, unaugmented.
    """

    def __init__(self, config: MemoryConfig, *, feature_dim: int = 32, prompt_dim: int):
        super().__init__(config.memory_capacity, {
            "features": ((feature_dim,), torch.float32), "prompt": ((prompt_dim,), torch.float32),
            "delta": ((prompt_dim,), torch.float32), "color_map": ((NUM_COLORS, NUM_COLORS), torch.float32),
            "score": ((), torch.float32), "exact": ((), torch.bool), "gain": ((), torch.float32),
            "hits": ((), torch.int64), "step": ((), torch.int64), "version": ((), torch.int64),
        }, "size_rule")  # fmt: skip
        self.config, self.feature_dim, self.prompt_dim = config, feature_dim, prompt_dim
        self.threshold = EmaThreshold(config)
        self._counters = dict.fromkeys(("offered", "admissions", "replaced", "evicted", "queries", "answered"), 0)
        self._seen = 0
        self._mean = torch.zeros(feature_dim, dtype=torch.float64)
        self._squares = torch.zeros(feature_dim, dtype=torch.float64)  # sum of squared deviations from the mean
        self._mirrors: dict[torch.device, dict[str, Tensor]] = {}

    def statistics(self) -> dict[str, float]:
        """Return size, theta and the counts so far, all plain numbers, for the log."""
        counters = self._counters
        hits = int(self._live("hits").sum())
        rate = counters["answered"] / counters["queries"] if counters["queries"] else 0.0
        return {"size": self._size, "theta": self.threshold.theta, "hits": hits, "hit_rate": rate, **counters}

    # Writing

    def admit(self, candidates: Candidates, *, step: int = 0, version: int = 0) -> int:
        """Return how many candidates became new entries; a duplicate replaces its entry if better and does not count.

        Judged by the threshold with its old statistics. Scores, features or payloads that are not finite are left out,
        and so is what scores no better than the prior alone: it would remember nothing that the demonstrations do not
        say. Copies to the host once. `step` is the global batch, `version` counts updates of the model that wrote it.
        """
        floats = {name: getattr(candidates, name).detach().to("cpu", torch.float32)
                  for name in ("features", "prompt", "delta", "color_map", "score", "prior_score")}
        exact = candidates.exact.detach().to("cpu", torch.bool)
        finite = torch.stack([value.flatten(1).isfinite().all(1) if value.ndim > 1 else value.isfinite()
                              for value in floats.values()]).all(0)
        self._observe(floats["features"][floats["features"].isfinite().all(1)])
        prior_score = floats.pop("prior_score")
        passed = self.threshold.admit_batch(floats["score"].numpy(), exact.numpy()) & finite.numpy()
        passed &= (floats["score"] > prior_score).numpy()
        self._counters["offered"] += len(passed)
        admitted = 0
        for i in np.flatnonzero(passed).tolist():
            entry: dict[str, Any] = {name: value[i] for name, value in floats.items()}
            entry |= {"exact": exact[i], "step": step, "version": version, "gain": 0.0, "hits": 0,
                      "task": self._intern("task", candidates.task_ids[i]),
                      "pair": self._intern("pair", candidates.pair_ids[i]),
                      "size_rule": self._intern("size_rule", candidates.size_rules[i])}
            admitted += self._insert(entry)
        self._mirrors.clear()
        return admitted

    def entries(self) -> list[dict[str, Any]]:
        """Return of each entry, as plain values: number (as in a Recall), task and pair (see `owners`), score, gain,
        hits, and the step that admitted it."""
        columns = {name: self._live(name).tolist() for name in ("number", "score", "gain", "hits", "step")}
        rows = zip(self.owners(), *columns.values(), strict=True)
        return [{"task": task, "pair": pair, **dict(zip(columns, values, strict=True))}
                for (task, pair), *values in rows]

    def count_hits(self, index: Tensor, valid: Tensor) -> None:
        """Add recalled entries to the hit counts and to the hit rate: index and valid [B, K] of a Recall."""
        rows, found = self._locate(index)
        self._live("hits").index_add_(0, rows[found], torch.ones_like(rows[found]))
        self._counters["queries"] += valid.shape[0]
        self._counters["answered"] += int(valid.any(1).sum())

    def update_gain(self, index: Tensor, gain: Tensor, weights: Tensor) -> None:
        """Move the entries' gain towards `gain` [B] = score with memory - score without, at a rate of .1 x attention.

        Shapes: index, weights [B, K] of a Recall (a null column in weights is ignored). Entries gone since are skipped.
        """
        rows, found = self._locate(index)
        attention = weights.detach()[:, :index.shape[1]].to("cpu", torch.float32)
        gains = gain.detach().to("cpu", torch.float32)[:, None].expand_as(attention)
        found &= gains.isfinite()
        share, moved = torch.zeros(self._size), torch.zeros(self._size)
        share.index_add_(0, rows[found], attention[found])
        moved.index_add_(0, rows[found], attention[found] * gains[found])
        target = moved / share.clamp_min(1e-12)
        live = self._live("gain")
        live += torch.where(share > 0, GAIN_RATE * share.clamp_max(1.0) * (target - live), 0.0)

    def refresh(self, task_ids: Sequence[str], pair_ids: Sequence[str], prompt: Tensor) -> int:
        """Return how many stored prompts were replaced because the task's prompt [B, Dp] has moved (cosine < .8)."""
        if not self._size or not len(task_ids):
            return 0
        same_task = self._live("task")[:, None] == self._identify("task", task_ids)
        same_pair = same_task & (self._live("pair")[:, None] == self._identify("pair", pair_ids))
        source = (same_task.long() + same_pair.long()).argmax(1)  # its own pair if the batch has it, else the first
        current = prompt.detach().to("cpu", torch.float32)[source]
        stored = self._live("prompt")
        stale = same_task.any(1) & current.isfinite().all(1) & (F.cosine_similarity(stored, current) < REFRESH_COSINE)
        stored[stale] = current[stale]
        self._mirrors.clear()
        return int(stale.sum())

    def reevaluate(self, task_ids: Sequence[str], pair_ids: Sequence[str], score: Tensor) -> int:
        """Return how many entries were removed: new score [B] below theta - .05 and older than 200 admissions."""
        if not self._size or not len(task_ids):
            return 0
        new = score.detach().to("cpu", torch.float32)
        same = (self._live("task")[:, None] == self._identify("task", task_ids)) & new.isfinite()
        same &= self._live("pair")[:, None] == self._identify("pair", pair_ids)
        chosen = same.any(1)
        live = self._live("score")
        live[chosen] = new[same.long().argmax(1)][chosen]
        old = self._counters["admissions"] - self._live("number") > GRACE
        removed = (chosen & old & (live < self.threshold.theta - HYSTERESIS)).nonzero().flatten().tolist()
        for row in reversed(removed):
            self._remove(row)
        self._counters["evicted"] += len(removed)
        self._mirrors.clear()
        return len(removed)

    # Reading

    def recall(self, features: Tensor, prompt: Tensor, task_ids: Sequence[str],
               pair_ids: Sequence[str] | None = None) -> Recall:
        """Return the K most similar entries of other tasks with at least the least similarity, older first on ties.

        Shapes: features [B, F], prompt [B, Dp]; both are detached. Entries of a query's own task never come back, nor
        those whose pair id is the query's, if `pair_ids` are given. Runs on the queries' device without a host copy.
        """
        mirror = self._mirror(features.device)
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            query = self._key(features.float(), prompt.float(), mirror["mean"], mirror["std"])
            similarity = (query @ mirror["key"].T).clamp(-1.0, 1.0)
            if self.config.memory_recall == "random":
                least = self.config.memory_similarity
                similarity = least + (1.0 - least) * random_shares(mirror["number"], task_ids)
            usable = mirror["task"] != to_device(self._identify("task", task_ids), features.device)[:, None]
            if pair_ids is not None:
                usable &= mirror["pair"] != to_device(self._identify("pair", pair_ids), features.device)[:, None]
            usable &= similarity >= self.config.memory_similarity  # also false for nan
            # One integer orders by similarity to 1e-6, then by age, so equal similarities cannot swap between runs.
            grade = torch.where(usable, similarity, -2.0).mul_(1e6).round_().long()
            top = min(self.config.memory_top_k, self._size)
            row = (grade.mul_(2**40).sub_(mirror["number"])).topk(top, dim=1).indices
            return self._gather(mirror, row, similarity.gather(1, row), usable.gather(1, row))

    def _gather(self, mirror: dict[str, Tensor], row: Tensor, similarity: Tensor, valid: Tensor) -> Recall:
        """Return the rows' payload as a Recall of exactly K columns, padded with invalid ones."""
        batch, found = row.shape
        missing = self.config.memory_top_k - found
        payload = {name: mirror[name][row] for name in ("prompt", "delta", "color_map", "number")}
        payload = {name: torch.cat([value, value.new_zeros(batch, missing, *value.shape[2:])], 1)
                   for name, value in payload.items()}
        valid = torch.cat([valid, valid.new_zeros(batch, missing)], 1)
        similarity = torch.cat([similarity, similarity.new_zeros(batch, missing)], 1)
        null = similarity.new_full((batch, 1), self.config.memory_similarity / SOFTMAX_TEMPERATURE)
        logits = torch.cat([torch.where(valid, similarity / SOFTMAX_TEMPERATURE, -torch.inf), null], 1)
        return Recall(
            weights=logits.softmax(1), similarity=torch.where(valid, similarity, 0.0), valid=valid,
            prompts=torch.where(valid[..., None], payload["prompt"], 0.0),
            deltas=torch.where(valid[..., None], payload["delta"], 0.0),
            color_maps=torch.where(valid[..., None, None], payload["color_map"], 1.0 / NUM_COLORS),
            index=torch.where(valid, payload["number"], -1))

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, strings, lists and dicts only, so that weights_only loading accepts it."""
        return {
            **self._entries_state(), "counters": dict(self._counters), "threshold": self.threshold.state_dict(),
            "seen": self._seen, "mean": self._mean.clone(), "squares": self._squares.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; into a smaller capacity only the most useful entries go.

        Raises: ValueError when the widths differ; then nothing has changed.
        """
        self._load_entries(state)
        self._counters = {name: int(state["counters"][name]) for name in self._counters}
        self.threshold.load_state_dict(state["threshold"])
        self._seen = int(state["seen"])
        self._mean, self._squares = state["mean"].double().clone(), state["squares"].double().clone()
        if self._size > self.capacity:
            self._keep(self._utility().topk(self.capacity).indices.sort().values)
        self._mirrors.clear()

    # Internals

    def _locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of numbered entries and where they still exist, both of the index's shape, on the host."""
        index = index.detach().cpu()
        if not self._size:
            return torch.zeros_like(index), torch.zeros_like(index, dtype=torch.bool)
        match = index[..., None] == self._live("number")
        return match.long().argmax(-1), match.any(-1)

    def _observe(self, features: Tensor) -> None:
        """Merge a batch into the running mean and deviation (Chan et al. 1979)."""
        count = features.shape[0]
        if not count:
            return
        batch = features.double()
        mean = batch.mean(0)
        total = self._seen + count
        shift = mean - self._mean
        self._squares += ((batch - mean) ** 2).sum(0) + shift**2 * (self._seen * count / total)
        self._mean += shift * (count / total)
        self._seen = total

    def _scale(self) -> tuple[Tensor, Tensor]:
        if self._seen < 2:
            return torch.zeros(self.feature_dim), torch.ones(self.feature_dim)
        return self._mean.float(), (self._squares / self._seen).sqrt().float().clamp_min(1e-3)

    def _key(self, features: Tensor, prompt: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return unit-norm keys whose product is .5 cos(features) + .5 cos(prompt); a zero part contributes 0."""
        standard = ((features - mean) / std).clamp(-FEATURE_CLIP, FEATURE_CLIP)
        return torch.cat([FEATURE_WEIGHT**0.5 * F.normalize(standard, dim=-1),
                          (1.0 - FEATURE_WEIGHT) ** 0.5 * F.normalize(prompt, dim=-1)], -1)

    def _mirror(self, device: torch.device) -> dict[str, Tensor]:
        """Return what recall reads, on the given device; made anew after each change of the entries."""
        if device not in self._mirrors:
            mean, std = self._scale()
            mirror = {name: self._live(name) for name in ("prompt", "delta", "color_map", "task", "pair", "number")}
            mirror |= {"mean": mean, "std": std,
                       "key": self._key(self._live("features"), self._live("prompt"), mean, std)}
            self._mirrors[device] = {name: to_device(value, device) for name, value in mirror.items()}
        return self._mirrors[device]

    def _utility(self) -> Tensor:
        age = (self._counters["admissions"] - self._live("number")).float()
        return (self._live("score") + 0.5 * torch.tanh(self._live("gain") / GAIN_SCALE)
                + 0.1 * torch.exp(-age / AGE_SCALE))

    def _insert(self, entry: dict[str, Any]) -> int:
        """Return 1 if the candidate became a new entry, 0 if it replaced its duplicate or was not good enough."""
        same = (self._live("task") == entry["task"]).nonzero().flatten()
        if same.numel():
            mean, std = self._scale()
            keys = self._key(self._live("features")[same], self._live("prompt")[same], mean, std)
            cosine = keys @ self._key(entry["features"], entry["prompt"], mean, std)
            duplicate = same[(self._live("pair")[same] == entry["pair"]) | (cosine > DUPLICATE_COSINE)].tolist()
            if duplicate:
                self._merge(sorted(duplicate, key=self._quality), entry)
                return 0
        full = self._size >= self.capacity
        if same.numel() >= MAX_PER_TASK:
            row = min(same.tolist(), key=self._quality)
            if self._quality(row) >= (float(entry["score"]), bool(entry["exact"])):
                return 0
        elif full:
            utility = self._utility()
            row = int(utility.argmin())
            if float(entry["score"]) + 0.1 < float(utility[row]):
                return 0
        else:
            row = self._append()
        self._counters["evicted"] += int(full or same.numel() >= MAX_PER_TASK)
        self._write(row, entry | {"number": self._counters["admissions"]})
        self._counters["admissions"] += 1
        return 1

    def _merge(self, duplicates: list[int], entry: dict[str, Any]) -> None:
        """Let the candidate replace its duplicates (worst first) if it beats the best, whose gain and hits it keeps."""
        best = duplicates[-1]
        if (float(entry["score"]), bool(entry["exact"])) <= self._quality(best):
            return
        carried = {name: self._rows[name][best].clone() for name in ("gain", "hits", "number")}
        self._write(best, entry | carried)
        self._counters["replaced"] += 1
        for row in sorted(duplicates[:-1], reverse=True):
            self._remove(row)

    def _quality(self, row: int) -> tuple[float, bool]:
        return float(self._rows["score"][row]), bool(self._rows["exact"][row])


def random_shares(number: Tensor, task_ids: Sequence[str]) -> Tensor:
    """Return [B, entries] in [0, 1), a function of a task and an entry's number alone: the control of recall."""
    tasks = to_device(torch.tensor([zlib.crc32(text.encode()) for text in task_ids]), number.device)[:, None]
    mixed = (tasks * 2654435761 + number * 40503) % 2**32
    return (mixed * 2246822519 % 2**32 >> 8).float() / 2**24


class MemoryReader(nn.Module):
    """The learned gates through which recalled entries act; all start shut, so at first next to nothing changes.

    The null entry takes part in every recall, so each parameter has a gradient with an empty and with a full memory.
    """

    def __init__(self, config: MemoryConfig, prompt_dim: int):
        super().__init__()
        self.top_k = config.memory_top_k
        self.null_prompt = nn.Parameter(0.02 * torch.randn(prompt_dim))
        self.null_delta = nn.Parameter(0.02 * torch.randn(prompt_dim))
        self.delta_gate = nn.Parameter(torch.zeros(()))
        self.token_gate = nn.Parameter(torch.zeros(prompt_dim))
        self.prior_gate = nn.Parameter(torch.tensor(-4.0))

    def extend_prompt(self, embedding: Tensor, recall: Recall | None) -> Tensor:
        """Return the prompt [B, Dp] plus gated means of the recalled moves and prompts; unchanged while gates are 0."""
        if recall is None:
            delta, token = self.null_delta.expand_as(embedding), self.null_prompt.expand_as(embedding)
        else:
            weight, null = recall.weights[:, :-1, None], recall.weights[:, -1:]
            delta = (weight * recall.deltas).sum(1) + null * self.null_delta
            token = (weight * recall.prompts).sum(1) + null * self.null_prompt
        return embedding + self.delta_gate * delta + self.token_gate * token

    def extend_preference(self, log_prob: Tensor, recall: Recall | None, canonical: Tensor,
                          input_on_canvas: Tensor) -> Tensor:
        """Return log((1 - w) C + w sum_j weight_j map_j(x)) with w = sigmoid(prior_gate), normalised like C.

        Shapes: log_prob [B, H, W, 10], canonical [B, 10] (canonical[colour] = rank), input_on_canvas [B, H, W] colours,
        anything else outside the input; there, and for the null entry, the map is uniform.
        """
        log_prob = log_prob.float()
        remembered = torch.full_like(log_prob, 1.0 / NUM_COLORS)
        if recall is not None:
            entries = (recall.weights[:, :-1, None, None] * recall.color_maps).sum(1)
            mixed = entries + recall.weights[:, -1, None, None] / NUM_COLORS
            batch = torch.arange(canonical.shape[0], device=canonical.device)[:, None, None]
            mapping = mixed[batch, canonical[:, :, None], canonical[:, None, :]]
            inside = (input_on_canvas >= 0) & (input_on_canvas < NUM_COLORS)
            color = torch.where(inside, input_on_canvas, 0)
            remembered = torch.where(inside[..., None], mapping[batch, color], remembered)
        return torch.logaddexp(F.logsigmoid(-self.prior_gate) + log_prob,
                               F.logsigmoid(self.prior_gate) + remembered.log())


# 3. Lessons ---------------------------------------------------------------------------------------------------------


class Lessons(NamedTuple):
    """What a batch of ranked candidates teaches: key, direction [B, E], and whether it teaches anything, told [B] bool.

    key: the mean evidence of an input's candidates, by which similar inputs are found; direction: the mean evidence of
    the right ones less that expected by the judge, which is how its loss wants its weights to move.
    """

    key: Tensor
    direction: Tensor
    told: Tensor


class LessonBuffer(EntryTable):
    """What told the right candidate of each pair from the wrong ones; recalled for tasks whose candidates are similar.

    One entry a pair, half-precision, replaced when the pair is seen again; a full buffer forgets the oldest.
    """

    def __init__(self, config: MemoryConfig, width: int):
        columns = {name: ((width,), torch.float16) for name in ("key", "direction")}
        super().__init__(config.memory_capacity, columns)
        self.config, self.width = config, width
        self._written = 0
        self._mirrors: dict[torch.device, dict[str, Tensor]] = {}

    def admit(self, lessons: Lessons, task_ids: Sequence[str], pair_ids: Sequence[str]) -> None:
        """Store the lessons that teach something and are finite, under their pairs' base ids."""
        key, direction = (x.detach().to("cpu", torch.float16) for x in (lessons.key, lessons.direction))
        chosen = lessons.told.cpu() & key.isfinite().all(1) & direction.isfinite().all(1)
        for i in np.flatnonzero(chosen.numpy()).tolist():
            task, pair = self._intern("task", task_ids[i]), self._intern("pair", pair_ids[i])
            entry = {"key": key[i], "direction": direction[i], "number": self._written, "task": task, "pair": pair}
            self._write(self._row_of(task, pair), entry)
            self._written += 1
        self._mirrors.clear()

    def recall(self, key: Tensor, task_ids: Sequence[str]) -> Tensor:
        """Return the mean direction [B, E] of all entries of other tasks, weighted by similarity to the keys.

        key [B, E] is as in Lessons. The weights are a softmax over cosines of standardised keys; the mean is 0 where
        there is no entry. Runs on the keys' device without a host copy.
        """
        mirror = self._mirror(key.device)
        with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
            similarity = self._unit(key.float(), mirror["mean"], mirror["std"]) @ mirror["key"].T
            if self.config.memory_recall == "random":
                similarity = 2 * random_shares(mirror["number"], task_ids) - 1
            usable = mirror["task"] != to_device(self._identify("task", task_ids), key.device)[:, None]
            weights = torch.where(usable, similarity / LESSON_TEMPERATURE, -torch.inf).softmax(1)
            return torch.where(usable, weights, 0.0) @ mirror["direction"]

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, strings, lists and dicts only, so that weights_only loading accepts it."""
        return {**self._entries_state(), "written": self._written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; into a smaller capacity only the newest go. Raises: ValueError when the
        widths differ; then nothing has changed."""
        self._load_entries(state)
        self._written = int(state["written"])
        if self._size > self.capacity:
            self._keep(self._live("number").topk(self.capacity).indices.sort().values)
        self._mirrors.clear()

    def _row_of(self, task: int, pair: int) -> int:
        """Return the row for a pair's lesson: its own, a new one, or the oldest."""
        number, tasks, pairs = (self._live(name).numpy() for name in ("number", "task", "pair"))
        own = np.flatnonzero((tasks == task) & (pairs == pair))
        if len(own):
            return int(own[0])
        return self._append() if self._size < self.capacity else int(number.argmin())

    @staticmethod
    def _unit(key: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return F.normalize(((key - mean) / std).clamp(-LESSON_CLIP, LESSON_CLIP), dim=-1)

    def _mirror(self, device: torch.device) -> dict[str, Tensor]:
        """Return what recall reads, on the given device; made anew after each change of the entries."""
        if device not in self._mirrors:
            key = self._live("key").float()
            count = max(self._size, 1)
            mean = key.sum(0) / count
            std = ((key - mean).square().sum(0) / count).sqrt().clamp_min(LEAST_DEVIATION)
            mirror = {name: self._live(name) for name in ("number", "task")}
            mirror |= {"mean": mean, "std": std, "key": self._unit(key, mean, std),
                       "direction": self._live("direction").float()}
            self._mirrors[device] = {name: to_device(value, device) for name, value in mirror.items()}
        return self._mirrors[device]


# 4. Z-learning -----------------------------------------------------------------------------------------------------


def z_update(z: Tensor, total: Tensor, count: Tensor, rate: float) -> Tensor:
    """Return (1 - rate) z + rate * total / count where count > 0, and z elsewhere; all of one shape.

    `total` sums exp(r / tau) * z(next) over the visits of an entry (z(next) = 1 when nothing follows).
    Source: Todorov 2009, z(s) <- (1 - a) z(s) + a exp(-q) z(s').
    """
    return torch.where(count > 0, (1.0 - rate) * z + rate * total / count.clamp_min(1), z)


class ZTable(nn.Module):
    """Desirability z [num_tasks + 1, 11, 10] of writing c_out over c_in in each training task, in original colours.

    Slot 0 is for unknown tasks and stays 1; row 10 of c_in is for cells that the input does not cover. A buffer only.
    """

    def __init__(self, num_tasks: int, rate: float = 0.1, temperature: float = 1.0):
        super().__init__()
        self.rate, self.temperature = rate, temperature
        self.register_buffer("z", torch.ones(num_tasks + 1, NUM_COLORS + 1, NUM_COLORS))

    def update(self, task_slot: Tensor, c_in: Tensor, prediction: Tensor, target: Tensor, mask: Tensor,
               color_permutation: Tensor) -> None:
        """Learn from the `visits` of a batch of tasks task_slot [B]."""
        self.learn(task_slot, self.visits(c_in, prediction, target, mask, color_permutation))

    @torch.no_grad()
    def visits(self, c_in: Tensor, prediction: Tensor, target: Tensor, mask: Tensor,
               color_permutation: Tensor) -> Tensor:
        """Return how often each sample visits each entry, float32 [B, 2, 11, 10]: true colours, then wrong predicted.

        Shapes: c_in, prediction, target [B, H, W] in augmented colours, mask [B, H, W] (cells to learn from),
        color_permutation [B, 10] (old -> new). A right prediction is the same visit as its true colour.
        """
        original = color_permutation.argsort(1)
        base = self._translate(c_in, original) * NUM_COLORS
        learned = mask & (target >= 0) & (target < NUM_COLORS)
        wrong = learned & (prediction != target) & (prediction >= 0) & (prediction < NUM_COLORS)
        counts = [self._count(base + self._translate(color, original).clamp_max(NUM_COLORS - 1), chosen)
                  for color, chosen in ((target, learned), (prediction, wrong))]
        return torch.stack(counts, 1)

    @torch.no_grad()
    def learn(self, task_slot: Tensor, visits: Tensor) -> None:
        """Move visited entries towards mean exp(r / tau): r = 1 for the true colour, -1 for a wrong predicted one.

        Shapes: task_slot [B] (0 learns nothing), visits [B, 2, 11, 10]; sums of whole numbers, so no order matters.
        """
        count = torch.zeros(len(self.z), *visits.shape[1:], device=self.z.device)
        count.index_add_(0, task_slot, torch.where((task_slot > 0)[:, None, None, None], visits, 0.0))
        right_count, wrong_count = count.unbind(1)
        unit = self.z.new_tensor(1.0 / self.temperature)
        total = right_count * unit.exp() + wrong_count * (-unit).exp()
        self.z.copy_(z_update(self.z, total, right_count + wrong_count, self.rate))

    def lookup(self, task_slot: Tensor, c_in: Tensor, color_permutation: Tensor) -> Tensor:
        """Return log z [B, H, W, 10] in augmented colours for the cells' input colours c_in [B, H, W]; 0 is neutral."""
        original = color_permutation.argsort(1)
        batch = torch.arange(task_slot.shape[0], device=task_slot.device)
        table = self.z[task_slot].gather(2, original[:, None, :].expand(-1, NUM_COLORS + 1, -1)).log()
        return table[batch[:, None, None], self._translate(c_in, original)]

    def _count(self, index: Tensor, chosen: Tensor) -> Tensor:
        """Return how often each of an entry's 11 x 10 numbers is chosen by an index [B, H, W], float32 [B, 11, 10]."""
        numbers = (NUM_COLORS + 1) * NUM_COLORS
        first = numbers * torch.arange(len(index), device=index.device)[:, None, None]
        count = torch.zeros(len(index) * numbers, device=self.z.device)
        count.index_add_(0, (first + torch.where(chosen, index, 0)).flatten(), chosen.flatten().float())
        return count.view(len(index), NUM_COLORS + 1, NUM_COLORS)

    @staticmethod
    def _translate(color: Tensor, original: Tensor) -> Tensor:
        """Return original colours [B, H, W] of augmented ones, 10 where there is no colour."""
        inside = (color >= 0) & (color < NUM_COLORS)
        batch = torch.arange(original.shape[0], device=original.device)[:, None, None]
        return torch.where(inside, original[batch, torch.where(inside, color, 0)], OUTSIDE)
