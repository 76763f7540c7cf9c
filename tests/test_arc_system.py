"""Tests of arc_system: device and precision, keyed draws, one state of all parts, optimizers, averaged weights."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_docs import tables
from torch import nn

import arc_system
from arc_data import PAD, Augmentation, Context, TaskSampler, collate, rows_of_own_input
from arc_system import (
    ARCSystem,
    DeviceError,
    Runtime,
    WeightAverage,
    build_optimizers,
    canvas_for,
    choose_device,
    choose_runtime,
    keyed_generator,
    learning_rate_scale,
    on_canvas,
    set_learning_rate,
    update_ratio,
)
from config import ConfigError, DataConfig, TrainConfig, resolve, with_values
from grid_accuracy_loss import Block, Pieces, cell_nats, compiled_pieces, size_mask
from qwen_hybrid_prompt import ModelError
from solver2 import Candidates

SMALL = {
    "agent.preset": "tiny", "agent.width": 16, "agent.read_blocks": 1, "agent.num_steps": 2,
    "prompt.model": "tiny", "prompt.prompt_dim": 16, "prompt.max_prompt_tokens": 64, "memory.memory_capacity": 32,
}  # fmt: skip
NUM_TASKS = 4


def make_system(seed=0, noise=0.0, **values) -> ARCSystem:
    """Return a small system in evaluation mode, its trainable parameters moved by `noise`."""
    torch.manual_seed(seed)
    changes = {**SMALL, **{key.replace("__", "."): value for key, value in values.items()}}
    system = ARCSystem(resolve(with_values(TrainConfig(), changes), "cpu"), NUM_TASKS).eval()
    if noise:
        move(system, noise)
    return system


@torch.no_grad()
def move(system, noise):
    for parameter in system.parameters():
        if parameter.requires_grad:
            parameter.add_(noise * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def shared():
    """One system for tests that only look; it must not be changed."""
    return make_system(noise=0.05)


def make_batch(seed=0, growth=1):
    """Return a batch of three queries of three tasks, with answers `growth` times as wide."""
    rng = np.random.default_rng(seed)
    contexts, answers = [], []
    for t, (h, w) in enumerate([(3, 4), (5, 2), (6, 6)]):
        grids = [rng.integers(0, 4, (h, w)).astype(np.uint8) for _ in range(4)]
        pairs = tuple((g, np.tile(g, (1, growth))) for g in grids[:3])
        view = Augmentation(t, (0, 3, 2, 1, 4, 5, 6, 7, 8, 9))
        contexts.append(Context(f"task{t}", "train:3", pairs, grids[3], view, t))
        answers.append(np.tile(grids[3], (1, growth)))
    return collate(contexts, answers)


def fill_memory(system, names, seed=0):
    """Admit one solved entry per task name, with features near those that the queries have."""
    generator = torch.Generator().manual_seed(seed)
    query, _ = make_batch()
    features = system.prior.features(query)
    count, width = len(names), system.config.prompt.prompt_dim
    with torch.no_grad():
        prompt = system.prompt_model(query, features).embedding
    rows = torch.arange(count) % len(query)
    system.memory.admit(
        Candidates(
            task_ids=names,
            pair_ids=[f"{name}/train:0" for name in names],
            size_rules=["same"] * count,
            features=features[rows] + 1e-3 * torch.randn(count, features.shape[1], generator=generator),
            prompt=prompt[rows] + 1e-3 * torch.randn(count, width, generator=generator),
            delta=torch.randn(count, width, generator=generator),
            color_map=torch.rand(count, 10, 10, generator=generator).softmax(-1),
            score=torch.ones(count),
            prior_score=torch.zeros(count),
            exact=torch.ones(count, dtype=torch.bool),
        ),
        step=3,
        version=1,
    )
    return system


def tensors_of(value, prefix=""):
    """Return {path: tensor or plain value} of nested dictionaries and lists."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {name: x for key, inner in items for name, x in tensors_of(inner, f"{prefix}.{key}").items()}


def assert_same(a, b):
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        same = torch.equal(x, b[name]) if isinstance(x, torch.Tensor) else x == b[name]
        assert same, name


# Device and precision ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that pretends that there are so many CUDA GPUs of one compute capability."""

    def pretend(count, capability=(8, 0), mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"])
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


def test_device_is_the_one_asked_for(gpus):
    gpus(0)
    assert choose_device("auto") == torch.device("cpu") == choose_device("cpu")
    gpus(2)
    assert choose_device("auto") == torch.device("cuda", 0) == choose_device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    gpus(0, mps=True)
    assert choose_device("mps").type == "mps"


def test_missing_gpu_is_refused_with_a_hint(gpus, monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    gpus(0)
    for name in ("cuda", "cuda:0", "cuda:3", "mps"):
        with pytest.raises(DeviceError) as error:
            choose_device(name)
        assert name in str(error.value)
        assert "--device cpu" in error.value.hint
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError) as error:
        choose_device("cuda")
    assert "CPU build" in error.value.hint
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(DeviceError) as error:
        choose_device("cuda")
    assert "CPU build" not in error.value.hint


def test_missing_gpu_in_colab_says_where_to_click(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    for version in (None, "12.8"):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(DeviceError) as error:
            choose_device("cuda")
        assert "Change runtime type" in error.value.hint


def test_gpu_older_than_the_torch_build_is_refused_and_a_newer_one_is_not(gpus, monkeypatch):
    for capability in ((7, 5), (8, 6), (13, 0)):
        gpus(2, capability)
        assert choose_device("cuda:1").index == 1 and choose_device("auto").index == 0
    gpus(2, (7, 0))
    for name in ("auto", "cuda", "cuda:1"):
        with pytest.raises(DeviceError, match=r"^Pretended GPU \(sm_70\) is not supported .*needs sm_75\+"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx90a"])  # another maker's card: no such numbers
    assert choose_device("auto").type == "cuda"


def test_gpu_number_out_of_range_is_refused(gpus):
    gpus(2)
    with pytest.raises(DeviceError, match="cuda:2"):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    "capability, precision, chosen",
    [
        ((6, 1), "auto", "fp16"),
        ((7, 5), "auto", "fp16"),
        ((8, 0), "auto", "bf16"),
        ((9, 0), "auto", "bf16"),
        ((12, 0), "auto", "bf16"),
        ((7, 5), "fp32", "fp32"),
        ((9, 0), "fp16", "fp16"),
        ((9, 0), "bf16", "bf16"),
    ],
)
def test_precision_on_cuda_follows_the_capability(gpus, capability, precision, chosen):
    gpus(1, capability)
    torch.backends.cuda.enable_cudnn_sdp(True)
    runtime = choose_runtime(torch.device("cuda", 0), precision)
    assert runtime.precision == chosen and not torch.backends.cuda.cudnn_sdp_enabled()
    assert runtime.scaler.is_enabled() == (chosen == "fp16")
    assert runtime.reason


def test_precision_table_of_the_document_is_what_is_chosen(gpus):
    text = (ROOT / "docs" / "COLAB_RUNTIME_FIXES.md").read_text()
    (found,) = (rows for header, rows in tables(text) if header[:2] == ["GPU", "compute capability"])
    assert len(found) == 5
    for _, capability, gib, *stated in found:
        on_gpu = capability != "-"
        gpus(int(on_gpu), tuple(map(int, capability.split("."))) if on_gpu else (0, 0))
        device = choose_device("auto")
        runtime = choose_runtime(device, "auto")
        config = resolve(TrainConfig(), device.type, float(gib) if on_gpu else 0.0)
        scaler = "yes" if runtime.scaler.is_enabled() else "no"
        language = f"{config.prompt.model}, {config.prompt.train_llm}"
        assert stated == [runtime.precision, scaler, language, config.agent.preset]


def test_precision_off_cuda_is_fp32(gpus):
    gpus(0)
    for precision in ("auto", "fp32"):
        runtime = choose_runtime(torch.device("cpu"), precision)
        assert runtime.precision == "fp32"
        assert not runtime.scaler.is_enabled()
        loss = torch.tensor(2.0)
        assert runtime.scaler.scale(loss) is loss
    for precision in ("bf16", "fp16"):
        with pytest.raises(ConfigError) as error:
            choose_runtime(torch.device("cpu"), precision)
        assert "--precision" in error.value.hint


def test_autocast_has_the_chosen_dtype():
    device, x = torch.device("cpu"), torch.ones(2, 2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with Runtime(device, precision, "", scaler).autocast():
            assert (x @ x).dtype == dtype
        assert (x @ x).dtype == torch.float32


# Keyed random numbers ------------------------------------------------------------------------------------------------


class Salted(str):
    """A string whose hash differs from that of the same plain string, as hashes do between processes."""

    __slots__ = ()

    def __hash__(self):
        return 12345


def draw(*key):
    return torch.randn(8, generator=keyed_generator(torch.device("cpu"), *key))


def test_keyed_generator_is_a_function_of_its_key_alone():
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), draw(42, "refine", 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(draw(42, "refine", 7), first)
    assert torch.equal(draw(42, Salted("refine"), 7), first)
    keys = [(42, "refine", 8), (43, "refine", 7), (42, "other", 7), (42, "refine", "7"), (42, "refine7"), (42, 7)]
    draws = [first, *(draw(*key) for key in keys)]
    assert len({tuple(x.tolist()) for x in draws}) == len(draws)


def test_keyed_generators_of_many_steps_differ():
    seeds = {keyed_generator(torch.device("cpu"), 42, "refine", step).initial_seed() for step in range(5000)}
    assert len(seeds) > 4990


# The schedule and the averaged weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("total, warmup, decay", [(1000, 0.1, 0.3), (200, 0.03, 0.3), (100, 0.5, 0.5), (50, 0.0, 1.0)])
def test_learning_rate_rises_stays_and_falls_to_five_percent(total, warmup, decay):
    scale = [learning_rate_scale(step, total, warmup, decay) for step in range(total)]
    rise, fall = max(int(total * warmup), 1), int(total * decay)
    for step, value in enumerate(scale):
        up = (step + 1) / rise if step < rise else 1.0
        left = total - step
        down = 0.05 + 0.95 * left / fall if left < fall else 1.0
        assert value == pytest.approx(up * down), step
    assert min(scale) > 0 and max(scale) == pytest.approx(1.0)
    assert scale[-1] < 0.05 + 1.5 / fall
    assert learning_rate_scale(total, total, warmup, decay) == pytest.approx(0.05)


def test_learning_rate_of_short_runs_is_positive_and_bounded():
    for total in (1, 2, 3):
        for step in range(total + 2):
            assert 0 < learning_rate_scale(step, total, 0.03, 0.3) <= 1
    assert learning_rate_scale(5, 10, 0.0, 0.0) == 1


def small_module(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[2].weight.requires_grad_(False)
    return module


def wander(module, steps, seed=1):
    """Yield after each of `steps` random changes of the trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for p in module.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=generator))
        yield


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_average_equals_a_reference(decay):
    module = small_module()
    average = WeightAverage(module, decay)
    trainable = [p for p in module.parameters() if p.requires_grad]
    reference = [p.detach().double().clone() for p in trainable]
    for k, _ in enumerate(wander(module, 60), start=1):
        average.update()
        keep = min(decay, (1 + k) / (10 + k))  # warmed up: early on the average follows quickly
        reference = [keep * r + (1 - keep) * p.detach().double() for r, p in zip(reference, trainable, strict=True)]
    with average.swapped():
        for p, r in zip(trainable, reference, strict=True):
            torch.testing.assert_close(p.double(), r, rtol=1e-4, atol=1e-5)
    assert average.state_dict()["shadow"].keys() == {n for n, p in module.named_parameters() if p.requires_grad}


def test_swap_returns_the_live_weights_bit_for_bit():
    module = small_module()
    average = WeightAverage(module, 0.9)
    for _ in wander(module, 5):
        average.update()
    live = {n: p.detach().clone() for n, p in module.named_parameters()}
    pointers = [p.data_ptr() for p in module.parameters()]
    averaged = {n: x.clone() for n, x in average.state_dict()["shadow"].items()}
    with contextlib.suppress(RuntimeError), average.swapped():
        inside = {n: p.detach().clone() for n, p in module.named_parameters()}
        raise RuntimeError("evaluation failed")
    for name, p in module.named_parameters():
        assert torch.equal(p, live[name])
        assert torch.equal(inside[name], averaged.get(name, live[name]))
        if name in averaged:
            assert not torch.equal(inside[name], live[name])
            assert torch.equal(average.state_dict()["shadow"][name], averaged[name])
    assert [p.data_ptr() for p in module.parameters()] == pointers


def test_average_goes_on_after_a_restart():
    module = small_module()
    average = WeightAverage(module, 0.9)
    for _ in wander(module, 4):
        average.update()
    buffer = io.BytesIO()
    torch.save({"model": module.state_dict(), "average": average.state_dict()}, buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    other = small_module(seed=9)
    other.load_state_dict(state["model"])
    resumed = WeightAverage(other, 0.9)
    resumed.load_state_dict(state["average"])
    for one, two in ((module, average), (other, resumed)):
        for _ in wander(one, 3, seed=7):
            two.update()
    assert_same(average.state_dict(), resumed.state_dict())


def test_update_ratio_is_relative_movement():
    before = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    after = [torch.tensor([3.0, 0.3]), torch.tensor([[4.4]])]
    assert update_ratio(before, after).item() == pytest.approx(0.1)
    assert update_ratio([torch.zeros(2)], [torch.zeros(2)]).item() == 0


# Optimizers ----------------------------------------------------------------------------------------------------------


def owners(optimizers):
    """Return {parameter id: [names of the optimizers that own it]}."""
    found = {}
    for name, optimizer in {**optimizers.main, "policy": optimizers.policy}.items():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found.setdefault(id(parameter), []).append(name)
    return found


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"prompt__train_llm": "none"},
        {"prompt__train_llm": "last:1"},
        {"memory__use_memory": False, "agent__attention": "on", "agent__tie_stages": False},
        {"prompt__use_text": False, "agent__kappa": 0.0},
    ],
)
def test_optimizers_own_each_trainable_parameter_once(values):
    system = make_system(**values)
    optimizers = build_optimizers(system)
    found, names = owners(optimizers), {id(p): n for n, p in system.named_parameters()}
    trainable = {id(p) for p in system.parameters() if p.requires_grad}
    assert not [names[key] for key in trainable - found.keys()], "forgotten"
    assert not [names.get(key) for key in found.keys() - trainable], "not trainable"
    assert not [(names[key], who) for key, who in found.items() if len(who) > 1], "owned twice"
    by_policy = {names[key] for key, who in found.items() if who == ["policy"]}
    assert by_policy == system.policy_names() == {names[id(p)] for p in system.policy.policy_parameters()}
    assert by_policy


def test_muon_gets_hidden_matrices_only():
    system = make_system(agent__attention="on")
    optimizers = build_optimizers(system)
    muon = {id(p) for group in optimizers.main["muon"].param_groups for p in group["params"]}
    assert len(muon) > 5
    tables = {id(m.weight) for m in system.modules() if isinstance(m, nn.Embedding)}
    language = {id(p) for _, p in system.language_parameters()}
    assert language and not muon & language
    for name, parameter in system.named_parameters():
        if id(parameter) in muon:
            assert parameter.ndim == 2, name
            assert parameter.abs().sum() > 0, f"{name} starts at zero"
            assert id(parameter) not in tables, name
    blocks = [p for n, p in system.agent.named_parameters() if "mlp_in" in n or "conv" in n or "qkv" in n]
    assert blocks and all(id(p) in muon for p in blocks)


def test_weight_decay_spares_vectors():
    system = make_system()
    for optimizer in build_optimizers(system).main.values():
        for group in optimizer.param_groups:
            if group["weight_decay"] > 0:
                language = {id(p) for _, p in system.language_parameters()}
                assert all(p.ndim > 1 or id(p) in language for p in group["params"])


def test_learning_rates_scale_from_their_peaks_and_survive_a_restart():
    system = make_system()
    optimizers = build_optimizers(system)
    peaks = {name: [g["lr"] for g in o.param_groups] for name, o in optimizers.main.items()}
    assert peaks["muon"] == [system.config.optim.muon_lr]
    own = [g["lr"] for g in optimizers.policy.param_groups]
    set_learning_rate(optimizers, 0.5)
    set_learning_rate(optimizers, 0.25)
    resumed = build_optimizers(system)
    resumed.load_state_dict(optimizers.state_dict())
    for which in (optimizers, resumed):
        for name, optimizer in which.main.items():
            assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.25 * lr for lr in peaks[name]])
        assert [g["lr"] for g in which.policy.param_groups] == own
        set_learning_rate(which, 1.0)
        for name, optimizer in which.main.items():
            assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(peaks[name])


def step_with_random_gradients(system, optimizers, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in system.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in (*optimizers.main.values(), optimizers.policy):
        optimizer.step()


def test_optimizer_states_survive_a_restart():
    one, two = make_system(seed=0), make_system(seed=1)
    first, second = build_optimizers(one), build_optimizers(two)
    step_with_random_gradients(one, first, seed=0)
    buffer = io.BytesIO()
    torch.save([one.checkpoint_state(), first.state_dict()], buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    two.load_checkpoint_state(state[0])
    second.load_state_dict(state[1])
    for system, optimizers in ((one, first), (two, second)):
        step_with_random_gradients(system, optimizers, seed=1)
    assert_same(one.checkpoint_state(), two.checkpoint_state())
    assert_same(first.state_dict(), second.state_dict())
    incomplete = {name: value for name, value in state[1].items() if name != "policy"}
    with pytest.raises(KeyError):
        second.load_state_dict(incomplete)


def test_the_device_decides_how_an_optimizer_computes():
    one, two = make_system(), make_system()
    first, second = build_optimizers(one), build_optimizers(two)
    step_with_random_gradients(one, first, seed=0)
    state = first.state_dict()
    for group in state["adamw"]["param_groups"]:
        group |= {"fused": True, "foreach": False}  # as on a GPU
    second.load_state_dict(state)
    assert [group["fused"] for group in second.main["adamw"].param_groups] == [False] * 3
    for system, optimizers in ((one, first), (two, second)):
        step_with_random_gradients(system, optimizers, seed=1)
    assert_same(first.main["adamw"].state_dict()["state"], second.main["adamw"].state_dict()["state"])


# Compiling -----------------------------------------------------------------------------------------------------------


def test_compiled_blocks_plan_the_same(monkeypatch):
    monkeypatch.setattr(arc_system, "compiled_pieces", lambda: compiled_pieces(backend="eager"))
    system = make_system(noise=0.1)
    before, random_state = planned(system), torch.get_rng_state()
    settings = torch._dynamo.config
    with settings.patch(suppress_errors=settings.suppress_errors, recompile_limit=settings.recompile_limit):
        assert arc_system.use_compiled(system.agent, choose_runtime(torch.device("cpu"), "auto")) == ""
    assert torch.equal(torch.get_rng_state(), random_state)
    blocks = [block for block in system.agent.modules() if isinstance(block, Block)]
    assert all(block.pieces != Pieces() for block in blocks) and all(p.grad is None for p in system.parameters())
    assert torch.equal(planned(system), before)


def test_what_cannot_be_compiled_later_is_computed_as_it_is(monkeypatch, caplog):
    """A block's pieces compile when they are rehearsed; a batch of one is a shape of its own, and fails then."""
    limit, made = [100], []

    def backend(graph, inputs):
        made.append(graph)
        if len(made) > limit[0]:
            raise RuntimeError("no graph more")
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(arc_system, "compiled_pieces", lambda: compiled_pieces(backend=backend))
    system = make_system(noise=0.1)
    plain = planned(system, batch=1)
    settings = torch._dynamo.config
    with settings.patch(suppress_errors=settings.suppress_errors, recompile_limit=settings.recompile_limit):
        assert arc_system.use_compiled(system.agent, choose_runtime(torch.device("cpu"), "auto")) == ""
        limit[0] = len(made)
        assert torch.equal(planned(system, batch=1), plain)
    assert len(made) > limit[0] and "no graph more" in caplog.text


def test_where_nothing_can_be_compiled_it_is_said_and_nothing_changes(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("torch.compile is not supported on this Python\nand more")

    system = make_system(noise=0.1)
    before = planned(system)
    monkeypatch.setattr(torch, "compile", refuse)
    said = arc_system.use_compiled(system.agent, choose_runtime(torch.device("cpu"), "auto"))
    assert said == "RuntimeError: torch.compile is not supported on this Python"
    assert all(block.pieces == Pieces() for block in system.agent.modules() if isinstance(block, Block))
    assert torch.equal(planned(system), before)


def planned(system, batch=2):
    """Return the beliefs of a system about one made-up batch."""
    rng = np.random.default_rng(0)
    grids = [rng.integers(0, 4, shape).astype(np.uint8) for shape in ((3, 4), (5, 2), (3, 4), (4, 4))]
    contexts = [Context("a", "test:0", ((grids[0], grids[2]), (grids[1], grids[3])), grids[0])] * batch
    query, answer = collate(contexts, [grids[3]] * batch)
    with torch.no_grad():
        scene = system.observe(query)
        reading, _ = system.read(query, scene, answer.target_size, answer.canvas)
        return system.plan(scene, reading, scene.embedding).forward


# The state of the whole ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_llm", ["full", "none"])
def test_checkpoint_state_round_trip(train_llm):
    one = make_system(seed=0, noise=0.1, prompt__train_llm=train_llm)
    one.z_table.z.uniform_(0.5, 2.0)
    buffer = io.BytesIO()
    torch.save(one.checkpoint_state(), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    two = make_system(seed=5, prompt__train_llm=train_llm)
    two.load_checkpoint_state(state)
    assert_same(dict(one.state_dict()), dict(two.state_dict()))
    has_language = any(name.startswith("language_model") for name in state["prompt_model"])
    assert has_language == (train_llm == "full")
    stored = sum(len(part) for part in state.values())
    assert stored == len(one.state_dict()) - (0 if has_language else len(one.prompt_model.language_model.state_dict()))


def test_incomplete_checkpoint_is_refused():
    system = make_system()
    state = system.checkpoint_state()
    with pytest.raises(KeyError):
        system.load_checkpoint_state({name: part for name, part in state.items() if name != "z_table"})
    broken = {**state, "agent": {**state["agent"], "surplus": torch.zeros(1)}}
    with pytest.raises(RuntimeError):
        system.load_checkpoint_state(broken)
    other_shape = {**state, "z_table": {"z": torch.ones(2, 11, 10)}}
    with pytest.raises(RuntimeError):
        system.load_checkpoint_state(other_shape)


def test_export_and_import_round_trip():
    one = fill_memory(make_system(seed=0, noise=0.1), ["task0", "other1", "other2"])
    assert len(one.memory) == 3
    tensors, facts = one.export_state()
    assert all(isinstance(x, torch.Tensor) for x in tensors.values())
    facts = json.loads(json.dumps(facts))
    two = make_system(seed=5)
    two.import_state({name: x.clone() for name, x in tensors.items()}, facts)
    assert_same(dict(one.state_dict()), dict(two.state_dict()))
    assert_same(one.memory.state_dict(), two.memory.state_dict())
    assert facts["num_tasks"] == NUM_TASKS
    query, _ = make_batch()
    with torch.no_grad():
        assert torch.equal(one.observe(query).embedding, two.observe(query).embedding)


def test_import_refuses_another_revision_and_changes_nothing():
    one, two = make_system(seed=0, noise=0.1), make_system(seed=5)
    tensors, facts = one.export_state()
    before = {name: x.clone() for name, x in two.state_dict().items()}
    with pytest.raises(ModelError) as error:
        two.import_state(tensors, {**facts, "base": {**facts["base"], "revision": "abc123"}})
    assert "abc123" in str(error.value) and "abc123" in error.value.hint
    assert_same(dict(two.state_dict()), before)


def test_changes_after_an_export_do_not_reach_an_import():
    """The imported system owns its tensors: training it further leaves the exporting one alone."""
    one, two = fill_memory(make_system(noise=0.1), ["task0", "other1"]), make_system(seed=5)
    two.import_state(*one.export_state())
    before = {name: x.clone() for name, x in one.state_dict().items()}
    move(two, 1.0)
    assert_same(dict(one.state_dict()), before)


# Looking and planning ------------------------------------------------------------------------------------------------


def scene_values(scene):
    values = {"recall" if f.name == "recall" else f.name: getattr(scene, f.name) for f in dataclasses.fields(scene)}
    values["prompt"] = vars(scene.prompt)
    values["recall"] = vars(scene.recall) if scene.recall is not None else {}
    return values


def test_observe_is_deterministic_and_leaves_no_trace(shared):
    query, _ = make_batch()
    rng, memory = torch.get_rng_state(), shared.memory.state_dict()
    parameters = {name: x.clone() for name, x in shared.state_dict().items()}
    with torch.no_grad():
        one, two = shared.observe(query), shared.observe(query)
    assert_same(scene_values(one), scene_values(two))
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(memory, shared.memory.state_dict())
    assert_same(parameters, dict(shared.state_dict()))
    assert one.features.shape[0] == one.embedding.shape[0] == 3
    assert one.canonical.sort(1).values.tolist() == [list(range(10))] * 3


def test_scene_depends_on_the_query_only(shared):
    """Nothing of the answer is in reach: the same contexts collated without answers give the same scene."""
    query, _ = make_batch()
    alone, nothing = collate(query.contexts)
    assert nothing is None
    with torch.no_grad():
        assert_same(scene_values(shared.observe(query)), scene_values(shared.observe(alone)))


def test_scene_sizes_are_the_most_probable_ones(shared):
    query, answer = make_batch(growth=2)
    with torch.no_grad():
        scene = shared.observe(query)
    rows, cols = scene.size_logits
    expected = [[int(np.argmax(r)) + 1, int(np.argmax(c)) + 1] for r, c in zip(rows.numpy(), cols.numpy(), strict=True)]
    assert scene.sizes().tolist() == expected
    rigged = dataclasses.replace(scene, size_logits=(torch.eye(30)[[0, 29, 4]], torch.eye(30)[[7, 0, 29]]))
    assert rigged.sizes().tolist() == [[1, 8], [30, 1], [5, 30]]
    with torch.no_grad():
        untrained = make_system().observe(query)
    assert torch.equal(untrained.sizes(), answer.target_size)  # three alike demonstrations: the rule is right


def test_memory_speaks_of_other_tasks_only():
    query, _ = make_batch()
    results = []
    for names in ([], ["task0"], ["stranger"]):
        system = make_system(noise=0.0)
        with torch.no_grad():
            system.memory_reader.delta_gate.fill_(1.0)
            system.memory_reader.token_gate.fill_(1.0)
            if names:
                fill_memory(system, names)
            results.append(system.observe(query))
    empty, own, other = results
    assert torch.equal(own.embedding[0], empty.embedding[0])  # its own task is all that the memory holds
    assert not torch.allclose(other.embedding[0], empty.embedding[0])
    assert (own.recall.index[0] == -1).all() and (other.recall.index[0] >= 0).any()


def test_preference_is_normalised_and_without_memory_the_prior(shared):
    query, answer = make_batch(growth=2)
    canvas = answer.canvas
    for system in (shared, fill_memory(make_system(), ["a", "b", "c"]), make_system(memory__use_memory=False)):
        with torch.no_grad():
            preference = system.preference(query, system.observe(query), answer.target_size, canvas)
        assert preference.shape == (3, *canvas, 10)
        torch.testing.assert_close(preference.exp().sum(-1), torch.ones(3, *canvas))
    prior = system.prior.preferences(query, answer.target_size, canvas)
    assert torch.equal(preference, prior)


def test_target_reaches_the_backward_beliefs_and_nothing_else(shared):
    query, answer = make_batch(growth=2)
    results = []
    with torch.no_grad():
        scene = shared.observe(query)
        reading, preference = shared.read(query, scene, answer.target_size, answer.canvas)
        for shift in (0, 4):
            target = torch.where(answer.mask, (answer.target + shift) % 10, PAD)
            results.append(
                shared.plan_both_ways(query, scene, reading, scene.embedding, target, answer.target_size)
            )
        plain = shared.plan(scene, reading, scene.embedding)
    for field in dataclasses.fields(plain):
        one, two, alone = (getattr(x, field.name) for x in (*results, plain))
        if field.name == "backward":
            assert alone is None and not torch.allclose(one, two)
        else:
            assert torch.equal(one, two) and torch.equal(one, alone), field.name
    assert torch.equal(plain.row_logits, scene.size_logits[0])
    assert torch.equal(plain.mask, answer.mask)


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({}, True),
        ({"loss__lambda_bidirectional": 0.0}, True),
        ({"loss__lambda_reverse": 0.0, "loss__lambda_bidirectional": 0.5}, True),
        ({"loss__lambda_reverse": 0.0, "loss__lambda_bidirectional": 0.0}, False),
        ({"loss__lambda_reverse": 0.0, "loss__lambda_bidirectional": 0.0, "reward__reward_reverse": 0.5}, True),
        ({"loss__mode": "seed"}, False),
    ],
)
def test_backward_planner_runs_only_where_something_weighs_it(values, needed):
    system = make_system(**values)
    query, answer = make_batch()
    with torch.no_grad():
        scene = system.observe(query)
        reading, _ = system.read(query, scene, answer.target_size, answer.canvas)
        both = system.plan_both_ways(query, scene, reading, scene.embedding, answer.target, answer.target_size)
    assert (both.backward is not None) == needed


def test_prompt_changes_the_plan(shared):
    query, answer = make_batch()
    with torch.no_grad():
        scene = shared.observe(query)
        reading, _ = shared.read(query, scene, answer.target_size, answer.canvas)
        own, other = (shared.plan(scene, reading, x).forward for x in (scene.embedding, scene.embedding.roll(1, 0)))
    assert not torch.allclose(own, other, atol=1e-4)


def test_language_parameters_are_named_within_the_system(shared):
    named = dict(shared.named_parameters())
    language = shared.language_parameters()
    assert language
    for name, parameter in language:
        assert named[name] is parameter
    assert not make_system(prompt__train_llm="none").language_parameters()


@pytest.mark.parametrize(
    "shape, canvas", [((2, 3, 3), 3), ((1, 3, 3), (6, 2)), ((2, 6, 6), (3, 7)), ((1, 4, 2), 3), ((1, 1, 1), (30, 1))]
)
def test_on_canvas_cuts_and_pads(shape, canvas):
    grid = torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(0))
    found = on_canvas(grid, canvas)
    height, width = (canvas, canvas) if isinstance(canvas, int) else canvas
    assert found.shape == (shape[0], height, width)
    for b in range(shape[0]):
        for r in range(height):
            for c in range(width):
                inside = r < shape[1] and c < shape[2]
                assert found[b, r, c] == (grid[b, r, c] if inside else PAD)


def test_canvas_for_holds_every_size():
    assert [canvas_for(torch.tensor([[1, 2], [n, 1]])) for n in (1, 4, 30)] == [(1, 2), (4, 2), (30, 2)]


def test_system_names_its_parts_once():
    """Every parameter sits in a part that the checkpoint knows."""
    system = make_system()
    state = system.checkpoint_state()
    assert set(state) == {name for name, _ in system.named_children()}
    covered = {f"{part}.{name}" for part, values in state.items() for name in values}
    assert {name for name, _ in system.named_parameters()} <= covered
    assert system.device == torch.device("cpu")
    assert system.observe(make_batch()[0]).prompt.control.shape == (3, arc_system.CONTROL_DIM)


# Judging refinements -------------------------------------------------------------------------------------------------


def score(system, samples=4, seed=0, trained=None, reach=1.0):
    """Return the judgement of refinements of one batch, and what they were judged on; reach 0: all no-ops.

    The refinement that is trained on is member 0, or the move `trained` [B, Dp].
    """
    query, answer = make_batch()
    with torch.no_grad():
        scene = system.observe(query)
        reading, _ = system.read(query, scene, answer.target_size, answer.canvas, answer.shapes)
        proposal = system.policy.propose(scene.prompt, scene.features, samples, torch.Generator().manual_seed(seed))
        proposal = dataclasses.replace(proposal, action=reach * proposal.action)
        refined = system.policy.refine(scene.embedding, proposal, 0) if trained is None else scene.embedding + trained
        target = torch.where(answer.mask, answer.target, PAD)
        trajectory = system.plan_both_ways(query, scene, reading, refined, target, answer.target_size)
    judged = arc_system.score_refinements(system, query, answer, scene, reading, proposal, refined, trajectory, 5.0)
    return judged, (query, answer, scene, refined, trajectory)


def test_reward_of_the_trained_refinement_is_the_change_of_its_potential():
    system = make_system(noise=0.3, policy__action_scale=30.0, reward__reward_dense=0.0, agent__kappa=0.1)
    with torch.no_grad():
        system.memory_reader.delta_gate.fill_(50.0)  # so that what the memory adds changes the plan too
    (terms, reward, gain, _), (query, answer, scene, _, trajectory) = score(system)
    with torch.no_grad():
        reading, _ = system.read(query, scene, answer.target_size, answer.canvas)
        before = system.plan(scene, reading, scene.embedding)
        without = system.plan(scene, reading, scene.prompt.embedding)
    rated = [arc_system.rate(system, query, answer, t.decode(), scene.embedding, None).total
             for t in (trajectory, before, without)]  # fmt: skip
    torch.testing.assert_close(reward, rated[0] - rated[1])
    torch.testing.assert_close(gain, rated[1] - rated[2])
    assert reward.abs().max() > 0 and gain.abs().max() > 0 and terms.advantage.shape == (4, 3)


def test_refinement_that_does_nothing_earns_exactly_nothing():
    system = make_system(noise=0.3, policy__action_scale=30.0, reward__reward_dense=0.0, agent__kappa=0.1).train()
    system.prompt_model.language_model.config.attention_dropout = 0.5
    for layer in system.prompt_model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    (terms, reward, *_), (_, _, scene, refined, _) = score(system, reach=0.0)
    assert torch.equal(refined, scene.embedding)
    assert torch.equal(reward, torch.zeros(3)) and torch.equal(terms.advantage, torch.zeros(4, 3))
    assert score(system)[0][1].abs().max() > 0


def test_agreement_is_that_of_the_backward_plans_last_belief_inside_the_input():
    query, _ = make_batch(growth=2)
    side = query.input.shape[-1] + 3
    found = on_canvas(query.input, side).clamp(min=0)
    found[1, 0, 0] = (found[1, 0, 0] + 1) % 10  # one of ten cells is wrong
    other = (found + 5) % 10
    for t, expected in ((0, [1.0, 0.9, 1.0]), (1, [0.0] * 3), (2, [0.0] * 3)):
        plan = torch.stack([found if k == t else other for k in range(3)], 1)  # b_0, which meets the input, comes first
        agreement = arc_system.agreement_with_input(query, nn.functional.one_hot(plan, 10).float())
        assert agreement.tolist() == pytest.approx(expected)


def test_move_that_is_remembered_is_the_best_of_the_refinements_or_none():
    system = make_system(noise=0.1, policy__action_scale=3.0)
    judged, (query, answer, scene, _, _) = score(system, samples=16)
    reading, _ = system.read(query, scene, answer.target_size, answer.canvas)
    proposal = system.policy.propose(scene.prompt, scene.features, 16, torch.Generator().manual_seed(0))
    best, moves = torch.zeros(3), torch.zeros_like(scene.embedding)
    with torch.no_grad():
        before = system.plan(scene, reading, scene.embedding)
        for member in range(16):
            refined = system.policy.refine(scene.embedding, proposal, member)
            after = system.plan(scene, reading, refined)
            total = [arc_system.rate(system, query, answer, t.decode(), refined, None).total for t in (before, after)]
            nats = [cell_nats(t.final(), answer.target) for t in (before, after)]
            reward = total[1] - total[0] + 0.5 * (nats[0] - nats[1]).clamp(-1, 1)
            better = reward > best
            best = torch.where(better, reward, best)
            moves = torch.where(better[:, None], refined - scene.embedding, moves)
    torch.testing.assert_close(judged.move, moves, atol=1e-4, rtol=0)
    assert (moves != 0).any()
    with torch.no_grad():
        for parameter in system.agent.parameters():
            parameter.zero_()  # no prompt changes anything now
    assert (score(system)[0].move == 0).all()


def test_refinement_that_is_trained_on_counts_for_the_move_but_not_for_the_policy():
    system = make_system(noise=0.3, policy__action_scale=3.0, agent__kappa=0.1)
    plain, (_, _, scene, _, _) = score(system, trained=torch.zeros(3, 16))
    assert (plain.reward == 0).all()  # no move, no reward
    far = 40.0 * torch.ones(3, 16)
    judged, _ = score(system, trained=far)
    assert (judged.reward != 0).any()
    torch.testing.assert_close(judged.terms.advantage, plain.terms.advantage)
    torch.testing.assert_close(judged.terms.total, plain.terms.total)


def test_reverse_component_counts_the_backward_planners_way_to_the_input():
    with_reverse = make_system(noise=0.3, policy__action_scale=30.0, reward__reward_reverse=0.5)
    without = make_system(noise=0.3, policy__action_scale=30.0)
    planned = []
    for system in (with_reverse, without):
        original = system.agent.plan_backward
        system.agent.plan_backward = lambda *args, original=original: planned.append(1) or original(*args)
    score(without)
    assert len(planned) == 1  # the trajectory's own
    score(with_reverse)
    assert len(planned) == 1 + 1 + 7  # and one for each of: the trained one, four members, before, without memory
    _, (query, answer, scene, refined, trajectory) = score(with_reverse)
    reliability = arc_system.agreement_with_input(query, trajectory.backward)
    expected = [
        (trajectory.backward[b, 0, :h, :w].argmax(-1) == query.input[b, :h, :w]).float().mean()
        for b, (h, w) in enumerate(query.input_size.tolist())
    ]
    torch.testing.assert_close(reliability, torch.stack(expected))
    rated = arc_system.rate(with_reverse, query, answer, trajectory.decode(), refined, reliability)
    with torch.no_grad():
        back = with_reverse.agent.plan_backward(query, trajectory.decode(), answer.target_size, refined)
    torch.testing.assert_close(rated.reverse, arc_system.agreement_with_input(query, back) * rated.accuracy)


def test_a_pair_that_others_are_shown_is_embedded_once_and_read_the_same(tasks):
    """Values and gradients equal those of embedding each query by itself."""
    system = make_system(agent__attention="off")
    sampler, kinds = TaskSampler(tasks, DataConfig(batch_size=5), 3, 0), []
    for k in range(sampler.num_batches(0)):
        query, answer = sampler.batch(0, k)
        rows = rows_of_own_input(query.contexts, answer.shapes)
        kinds.append({row >= 0 for row in rows})
        for b, row in enumerate(rows):
            if row >= 0:
                assert row not in query.demo_index[b]
                assert torch.equal(query.demo_output_size[row], answer.target_size[b])
                assert torch.equal(query.demo_input_size[row], query.input_size[b])
        found = []
        for own in ((), rows):
            system.zero_grad()
            reading = system.agent.read(query, answer.target_size, answer.canvas, own_rows=own)
            torch.where(reading.mask[..., None], reading.hidden, 0).sin().sum().backward()
            gradients = [p.grad for p in system.agent.parameters() if p.grad is not None]
            inside = reading.mask[..., None]
            cells = [torch.where(inside, x, 0) for x in (reading.hidden, reading.read_logits)]
            found.append([*cells, *gradients])
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    assert {True, False} in kinds and {True} in kinds


def test_a_target_that_others_are_shown_is_embedded_once_on_the_way_back(tasks):
    system = make_system(noise=0.1, agent__attention="off")
    sampler, kinds = TaskSampler(tasks, DataConfig(batch_size=6), 3, 0), []
    for k in range(sampler.num_batches(0)):
        query, answer = sampler.batch(0, k)
        rows = rows_of_own_input(query.contexts, answer.shapes, within_input=True)
        kinds += [row >= 0 for row in rows]
        inside = (answer.target_size <= query.input_size).all(1).tolist()
        assert all(fits or row < 0 for row, fits in zip(rows, inside, strict=True))
        with torch.no_grad():
            prompt = torch.randn(len(query), 16, generator=torch.Generator().manual_seed(0))
            target = torch.where(answer.mask, answer.target, PAD)
            one = system.agent.plan_backward(query, target, answer.target_size, prompt)
            two = system.agent.plan_backward(query, target, answer.target_size, prompt, rows)
        height, width = one.shape[2:4]
        covered = size_mask(query.input_size, (height, width)) | size_mask(answer.target_size, (height, width))
        covered = covered[:, None, :, :, None]
        torch.testing.assert_close(torch.where(covered, two, 0), torch.where(covered, one, 0), rtol=1e-4, atol=1e-4)
    assert {True, False} == set(kinds)
