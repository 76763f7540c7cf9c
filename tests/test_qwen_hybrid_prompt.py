"""Tests of qwen_hybrid_prompt: rule text, the tiny Qwen, loading, training modes, and the hybrid prompt itself."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import shutil
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import qwen_hybrid_prompt as module
from config import ConfigError, PromptConfig
from qwen_hybrid_prompt import (
    ModelError,
    QwenHybridPrompt,
    build_tiny_qwen,
    load_language_model,
    parse_train_llm,
    rule_text,
)

TINY = PromptConfig(model="tiny", train_llm="full", prompt_dim=16)


def grid(*rows: str) -> np.ndarray:
    return np.array([[int(c) for c in row] for row in rows], dtype=np.uint8)


def random_demonstrations(seed: int, count: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shape = rng.integers(2, 9, 2)
    return [tuple(rng.integers(0, 10, shape).astype(np.uint8) for _ in range(2)) for _ in range(count)]


def make_query(tasks, slots=None, dihedral=None) -> SimpleNamespace:
    """Return the part of a Query that the prompt reads: each task is (demonstrations, input)."""
    contexts = tuple(SimpleNamespace(seen=lambda task=task: task) for task in tasks)
    zeros = [0] * len(tasks)
    return SimpleNamespace(
        contexts=contexts, task_slot=torch.tensor(slots or zeros), dihedral=torch.tensor(dihedral or zeros)
    )


def three_tasks():
    """Return three tasks whose rule texts have different lengths."""
    return [
        ([(grid("12", "30"), grid("12", "30"))], grid("1")),
        (random_demonstrations(1), grid("123", "456")),
        ([(grid("100", "020"), grid("001", "020"))], grid("100", "020", "003")),
    ]


def build(config: PromptConfig = TINY, seed: int = 0, **sizes) -> QwenHybridPrompt:
    torch.manual_seed(seed)
    return QwenHybridPrompt(config, **{"num_tasks": 5, **sizes})


def features(count: int) -> torch.Tensor:
    return torch.linspace(-1, 1, count * 32).reshape(count, 32).sin()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return build_tiny_qwen(tmp_path_factory.mktemp("qwen"))


# Rule text


def test_rule_text_states_same_size_and_color_map_of_hand_made_demonstrations():
    demonstrations = [
        (grid("0120", "0000"), grid("0320", "0000")),
        (grid("1000", "0020"), grid("3000", "0020")),
    ]
    assert rule_text(demonstrations, grid("012", "000")) == (
        "Examples: 2. The output keeps the input size: 2x4. Unchanged colors: black red. Color blue becomes green. "
        "About 12 percent of the cells change: shapes keep their place and are recolored. New colors: green. "
        "Removed colors: blue. Test input: 2x3, colors black blue red."
    )


def test_rule_text_says_how_sure_the_color_map_is():
    before = grid("0000000000")
    text = rule_text([(before, grid("0000000004"))], before)
    assert "black mostly stays, else yellow" in text and "only background is filled" in text
    assert "black often becomes yellow, else stays" in rule_text([(before, grid("0000444444"))], before)


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ([((2, 3), (4, 9)), ((3, 3), (6, 9))], "2 times as high and 3 times as wide: 2x3 to 4x9, 3x3 to 6x9."),
        ([((9, 4), (3, 4)), ((6, 4), (2, 4))], "1/3 times as high and 1 times as wide"),
        ([((9, 4), (3, 3)), ((6, 4), (3, 3))], "Every output is 3x3: from 6x4, 9x4."),
        ([((9, 4), (3, 3)), ((6, 4), (3, 2))], "The output size changes: 6x4 to 3x2, 9x4 to 3x3."),
    ],
)
def test_rule_text_states_the_size_rule(pairs, sentence):
    rng = np.random.default_rng(0)
    demonstrations = [tuple(rng.integers(0, 10, s).astype(np.uint8) for s in pair) for pair in pairs]
    assert sentence in rule_text(demonstrations, grid("0"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda g: g[:, ::-1], "flipped left-right."),
        (lambda g: g[::-1], "flipped up-down."),
        (lambda g: np.rot90(g), "rotated left."),
        (lambda g: np.rot90(g, -1), "rotated right."),
        (lambda g: np.rot90(g, 2), "rotated by 180 degrees."),
        (lambda g: g.T, "is the input transposed."),
        (lambda g: np.rot90(g, 2).T, "transposed on the other diagonal."),
        (lambda g: np.kron(g, np.ones((2, 3), np.uint8)), "Each input cell becomes a block."),
        (lambda g: np.tile(g, (2, 1)), "repeats the input as tiles."),
        (lambda g: g[1:, :2], "is cut out of the input."),
    ],
)
def test_rule_text_names_whole_grid_transforms(change, sentence):
    inputs = [grid("123", "405"), grid("77", "12", "90"), grid("314", "159")]
    assert sentence in rule_text([(g, change(g)) for g in inputs], inputs[0])


def test_rule_text_names_the_symmetries_that_all_outputs_share():
    symmetric = [(grid("12", "34"), grid("11", "22")), (grid("56", "70"), grid("33", "41"))]
    assert "symmetric: left-right." in rule_text(symmetric[:1], grid("0"))
    assert "symmetric" not in rule_text(symmetric, grid("0"))


def test_rule_text_depends_on_demonstrations_and_test_input_only():
    texts = [rule_text(random_demonstrations(seed), grid("12")) for seed in range(20)]
    assert len(set(texts)) == 20
    demonstrations = random_demonstrations(0)
    assert rule_text(demonstrations[::-1], grid("12")) == texts[0] == rule_text(demonstrations, grid("12"))
    assert rule_text(demonstrations, grid("13")) != texts[0]
    assert rule_text([], grid("13")) == "No examples. Test input: 1x2, colors blue green."


def test_rule_text_does_not_change_its_arguments():
    demonstrations = random_demonstrations(3)
    copies = [(i.copy(), o.copy()) for i, o in demonstrations]
    rule_text(demonstrations, demonstrations[0][0])
    assert all(np.array_equal(a, b) for pair, copy in zip(demonstrations, copies, strict=True)
               for a, b in zip(pair, copy, strict=True))  # fmt: skip


# The tiny Qwen and loading


def test_tiny_qwen_is_bit_identical_when_built_twice_and_leaves_global_random_state_alone(tiny_folder, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    load_language_model(TINY)
    again = build_tiny_qwen(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (tiny_folder / name).read_bytes()
    other = build_tiny_qwen(tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != (tiny_folder / "model.safetensors").read_bytes()


def test_tiny_tokenizer_keeps_every_word_whole_and_round_trips():
    tokenizer = load_language_model(TINY).tokenizer
    for seed in range(30):
        text = rule_text(random_demonstrations(seed), grid("9876543210"))
        tokens = tokenizer.tokenize(text)
        assert not [t for t in tokens if t.isalpha() and len(t) == 1 and t not in ("x", "\u0120")]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert len(tokens) <= 130
    unknown = "Gr\u00fc\u00dfe, quite unknown"
    assert tokenizer.decode(tokenizer(unknown)["input_ids"]) == unknown


def test_tokenizer_without_pad_token_pads_with_eos_and_nothing_is_printed(capfd):
    model, tokenizer, revision = load_language_model(TINY)
    assert capfd.readouterr() == ("", "")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id < model.config.vocab_size
    assert revision == "tiny-v1"


def test_weights_are_float32_even_if_the_folder_says_bfloat16(tiny_folder, tmp_path):
    folder = tmp_path / "bf16"
    shutil.copytree(tiny_folder, folder)
    model, _, _ = load_language_model(replace(TINY, model=str(tiny_folder)))
    model.bfloat16().save_pretrained(folder)
    description = json.loads((folder / "config.json").read_text())
    assert "bfloat16" in (description.get("dtype"), description.get("torch_dtype"))
    loaded, _, revision = load_language_model(replace(TINY, model=str(folder)))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert revision.startswith("config-")


def test_local_folder_gives_the_same_model_as_tiny_and_checks_its_revision(tiny_folder):
    model, _, revision = load_language_model(replace(TINY, model=str(tiny_folder)))
    tiny = load_language_model(TINY).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny.parameters(), strict=True))
    load_language_model(replace(TINY, model=str(tiny_folder), revision=revision))
    with pytest.raises(ModelError, match="is revision " + revision):
        load_language_model(replace(TINY, model=str(tiny_folder), revision="config-0"))


@pytest.mark.parametrize("damage", ["missing", "no config", "no weights", "cut weights"])
def test_bad_local_folder_is_a_model_error_with_a_hint(damage, tiny_folder, tmp_path):
    folder = tmp_path / "model" / "folder"
    if damage != "missing":
        shutil.copytree(tiny_folder, folder)
    if damage == "no config":
        (folder / "config.json").unlink()
    if damage == "no weights":
        (folder / "model.safetensors").unlink()
    if damage == "cut weights":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError) as caught:
        load_language_model(replace(TINY, model=str(folder)))
    assert str(folder) in str(caught.value) and caught.value.hint


# The hub


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Point the hub cache to an empty folder and forget any offline switch of the environment."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch):
    """Serve one fixed answer as the hub: hub(status, error code, delay) returns the list of requested paths."""
    import huggingface_hub

    servers, free = [], threading.Event()

    def start(status: int, code: str = "", delay: float = 0.0) -> list[str]:
        paths: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                paths.append(self.path)
                free.wait(delay)
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        return paths

    yield start
    free.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def test_missing_model_offline_is_a_model_error_at_once_and_asks_nobody(empty_cache, hub):
    paths = hub(404)
    start = time.monotonic()
    with pytest.raises(ModelError, match="is not in the local cache and --offline is set") as caught:
        load_language_model(replace(TINY, model="Qwen/Qwen2.5-0.5B", offline=True))
    assert time.monotonic() - start < 5 and paths == []
    assert "hf download Qwen/Qwen2.5-0.5B" in caught.value.hint and "--model tiny" in caught.value.hint


@pytest.mark.parametrize(
    ("answer", "name", "message", "hint"),
    [
        ((404, "RepoNotFound"), "Qwen/Qwen2.5-05B", 'no model "Qwen/Qwen2.5-05B"', "did you mean Qwen/Qwen2.5-0.5B?"),
        ((404, "RepoNotFound"), "qwen2.5-0.5b", 'no model "qwen2.5-0.5b"', "did you mean Qwen/Qwen2.5-0.5B?"),
        ((404, "RevisionNotFound"), "Qwen/Qwen2.5-0.5B", "has no revision abc", "--revision"),
        ((403, "GatedRepo"), "google/gemma", "google/gemma is gated", "HF_TOKEN"),
        ((500, ""), "Qwen/Qwen2.5-0.5B", "cannot reach huggingface.co", "--model tiny"),
        ((200, ""), "not a name", 'no model "not a name"', "--model"),
    ],
)
def test_answers_of_the_hub_become_messages(empty_cache, hub, answer, name, message, hint):
    hub(*answer)
    with pytest.raises(ModelError) as caught:
        load_language_model(replace(TINY, model=name, revision="abc"))
    assert message in str(caught.value) and hint in caught.value.hint


def test_silent_hub_is_given_up_within_its_time(empty_cache, hub, monkeypatch):
    monkeypatch.setattr(module, "HUB_SECONDS", 0.4)
    hub(200, delay=30)
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"cannot reach huggingface.co \(no answer within 0.4 s\)"):
        load_language_model(replace(TINY, model="Qwen/Qwen2.5-0.5B"))
    assert time.monotonic() - start < 3


def test_cached_model_is_read_without_the_hub_and_its_commit_is_the_revision(empty_cache, hub, tiny_folder):
    paths = hub(500)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = empty_cache / "models--some--model"
    shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for revision in ("", commit):
        assert load_language_model(replace(TINY, model="some/model", revision=revision)).revision == commit
    assert paths == []
    with pytest.raises(ModelError, match="cannot reach"):
        load_language_model(replace(TINY, model="some/model", revision="f" * 40))


def test_download_is_pinned_to_the_commit_that_the_hub_named(empty_cache, tiny_folder, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    commit, asked = "a" * 40, {}

    class FakeApi:
        def model_info(self, name, revision, timeout):
            return SimpleNamespace(sha=commit, siblings=[SimpleNamespace(rfilename="model.safetensors")])

    def fake_download(name, **options):
        asked.update(options, name=name)
        return str(shutil.copytree(tiny_folder, tmp_path / commit))

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_download)
    assert load_language_model(replace(TINY, model="some/model")).revision == commit
    assert asked["name"] == "some/model" and asked["revision"] == commit
    assert capsys.readouterr().out.startswith(f"Downloading some/model (commit {commit[:12]})")


def test_old_or_absent_packages_are_model_errors(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.44.2" if name == "transformers" else real(name))
    with pytest.raises(ModelError, match=r"transformers 4.44.2 is too old \(need >= 4.56\)") as caught:
        load_language_model(TINY)
    assert caught.value.hint == 'pip install -U "transformers>=4.56,<6"'

    def absent(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ModelError, match="--train-llm lora needs the package peft") as caught:
        build(replace(TINY, train_llm="lora"))
    assert caught.value.hint == "pip install peft"


# Training modes


def test_training_mode_is_spelled_out_or_refused():
    for bad in ("some", "last:0", "last:", "last:x", "last:-1", ""):
        with pytest.raises(ConfigError):
            parse_train_llm(bad)
    assert parse_train_llm("last:12") == ("last", 12) and parse_train_llm("none") == ("none", 0)


def is_last_layer(name: str) -> bool:
    return name.startswith("layers.1.") or name == "norm.weight"


@pytest.mark.parametrize(
    ("mode", "trains"),
    [("full", lambda name: True), ("last:1", is_last_layer), ("lora", lambda name: "lora_" in name), ("none", None)],
)
def test_exactly_the_parameters_of_the_mode_get_gradients(mode, trains, tiny_folder):
    prompt = build(replace(TINY, model=str(tiny_folder), train_llm=mode))
    names = {name for name, _ in prompt.language_parameters()}
    assert names == {name for name, _ in prompt.language_model.named_parameters() if trains and trains(name)}
    if mode == "lora":  # B starts at zero, so A has no gradient before the first step
        with torch.no_grad():
            for name, parameter in prompt.language_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    query = make_query(three_tasks(), [0, 1, 2], [0, 1, 2])
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    (prompt(query, features(3)).embedding * weight).sum().backward()
    for name, parameter in prompt.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    if mode == "full":  # nothing of the tiny Qwen is idle
        assert len(names) == len(list(prompt.language_model.parameters())) == 26
    assert prompt.language_model.training is (mode != "none")
    assert not prompt.eval().language_model.training


def test_last_n_beyond_the_model_is_a_config_error():
    with pytest.raises(ConfigError, match="last:3: the model has only 2 layers"):
        build(replace(TINY, train_llm="last:3"))


def test_one_adamw_step_at_1e5_moves_every_language_tensor():
    prompt = build()
    before = {name: p.detach().clone() for name, p in prompt.language_parameters()}
    optimizer = torch.optim.AdamW([p for _, p in prompt.language_parameters()], lr=1e-5, weight_decay=0.0)
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    (prompt(make_query(three_tasks()), features(3)).embedding * weight).sum().backward()
    optimizer.step()
    for name, parameter in prompt.language_parameters():
        scale = before[name].norm().clamp(min=1e-12)
        assert (parameter - before[name]).norm() / scale > 0, name


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        prompt = build(replace(TINY, gradient_checkpointing=checkpointing))
        calls = []
        prompt.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        prompt(make_query(three_tasks()), features(3)).embedding[:, 0].sum().backward()
        grads.append([p.grad for _, p in prompt.language_parameters()])
        assert len(calls) == 1 + checkpointing  # recomputed in the backward pass
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


# The hybrid prompt


def test_padding_does_not_change_embeddings():
    prompt = build().eval()
    tasks = three_tasks()
    lengths = {len(ids) for ids in prompt._tokenize([rule_text(*task) for task in tasks])}
    assert len(lengths) == 3
    together = prompt(make_query(tasks, [1, 2, 3]), features(3))
    for i in range(3):
        alone = prompt(make_query([tasks[i]], [i + 1]), features(3)[i : i + 1])
        for a, b in zip(vars(together).values(), vars(alone).values(), strict=True):
            assert torch.allclose(a[i], b[0], atol=1e-5)


def test_text_part_is_the_projected_mean_over_the_texts_own_tokens():
    prompt = build().eval()
    task = three_tasks()[1]
    ids = prompt.tokenizer(rule_text(*task), return_tensors="pt")["input_ids"]
    hidden = prompt.language_model(input_ids=ids).last_hidden_state.mean(1)
    expected = prompt.text_projection(prompt.text_norm(hidden))
    assert torch.allclose(prompt(make_query(three_tasks()), features(3)).text[1], expected[0], atol=1e-5)


def test_non_finite_hidden_states_of_padding_stay_out_and_others_stay_visible():
    prompt = build().eval()
    lengths = [len(ids) for ids in prompt._tokenize([rule_text(*task) for task in three_tasks()])]
    shortest = lengths.index(min(lengths))

    def poison(position: int):
        def hook(layer, arguments, output):
            output.last_hidden_state = output.last_hidden_state.index_fill(1, torch.tensor([position]), torch.nan)
            return output

        handle = prompt.language_model.register_forward_hook(hook)
        rows = prompt(make_query(three_tasks()), features(3)).embedding.isfinite().all(1)
        handle.remove()
        return rows

    assert poison(max(lengths) - 1)[shortest] and not poison(max(lengths) - 1).all()
    assert not poison(0).any()


def test_each_distinct_text_runs_through_the_model_once():
    prompt = build()
    sizes = []
    prompt.language_model.register_forward_pre_hook(
        lambda layer, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    a, b, c = three_tasks()
    result = prompt(make_query([a, b, a, c, b, a]), features(6))
    assert len(sizes) == 1 and sizes[0][0] == 3
    assert torch.equal(result.text[0], result.text[2]) and not torch.allclose(result.text[0], result.text[1])


def test_shuffling_the_contexts_permutes_the_prompts():
    prompt = build().eval()
    tasks, f, order = three_tasks(), features(3), torch.tensor([2, 0, 1])
    straight = prompt(make_query(tasks, [1, 2, 3]), f)
    shuffled = prompt(make_query([tasks[i] for i in order], [3, 1, 2]), f[order])
    selected = straight.select(order)
    for name in ("embedding", "control", "text"):
        assert torch.allclose(getattr(shuffled, name), getattr(selected, name), atol=1e-6)
    assert not torch.allclose(shuffled.embedding, straight.embedding, atol=1e-2)


def test_task_slot_dihedral_and_features_enter_the_prompt():
    prompt = build().eval()
    task = three_tasks()[:1]
    base = prompt(make_query(task), features(1)).embedding
    assert not torch.allclose(prompt(make_query(task, [3]), features(1)).embedding, base)
    assert not torch.allclose(prompt(make_query(task, [0], [5]), features(1)).embedding, base)
    assert not torch.allclose(prompt(make_query(task), features(1) + 1).embedding, base)


def test_max_prompt_tokens_cuts_the_end():
    prompt = build(replace(TINY, max_prompt_tokens=16)).eval()
    text = rule_text(*three_tasks()[1])
    whole = prompt.tokenizer(text)["input_ids"]
    assert len(whole) > 16 and prompt._tokenize([text]) == [tuple(whole[:16])]


def test_token_cache_is_bounded_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(module, "TOKEN_CACHE_SIZE", 4)
    prompt = build()
    texts = [rule_text(random_demonstrations(seed), grid("1")) for seed in range(6)]
    expected = [tuple(prompt.tokenizer(text)["input_ids"]) for text in texts]
    assert prompt._tokenize(texts) == expected and len(prompt._token_cache) == 4
    assert prompt._tokenize(texts[::-1]) == expected[::-1] and len(prompt._token_cache) == 4


@pytest.mark.parametrize("part", ["use_text", "use_control", "use_task_slot"])
def test_a_part_that_is_off_has_no_parameters_and_none_of_the_rest_is_dead(part):
    prompt = build(replace(TINY, **{part: False}))
    owns = {"use_text": ("language_model", "text_"), "use_control": "control_", "use_task_slot": ("task_", "dihedral")}
    assert not [name for name, _ in prompt.named_parameters() if name.startswith(owns[part])]
    result = prompt(make_query(three_tasks(), [1, 2, 3]), features(3))
    assert result.embedding.shape == result.text.shape == (3, 16) and result.control.shape == (3, 32)
    assert bool(result.text.any()) is (part != "use_text") and bool(result.control.any()) is (part != "use_control")
    (result.embedding * torch.randn(3, 16, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prompt.parameters())


def test_prompt_with_every_part_off_is_a_config_error():
    with pytest.raises(ConfigError, match="no part left"):
        build(replace(TINY, use_text=False, use_control=False, use_task_slot=False))


def test_same_seed_gives_the_same_prompt_model():
    first, second, other = build(seed=7), build(seed=7), build(seed=8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.text_projection.weight, other.text_projection.weight)
    assert torch.equal(first.language_model.norm.weight, other.language_model.norm.weight)


# Checkpoints


@pytest.mark.parametrize("mode", ["full", "lora", "last:1", "none"])
def test_checkpoint_state_round_trip_restores_the_prompts(mode, tiny_folder, tmp_path):
    config = replace(TINY, model=str(tiny_folder), train_llm=mode)
    first, second = build(config, seed=1), build(config, seed=2)
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    state = first.checkpoint_state()
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    assert set(state) == trained
    torch.save(state, tmp_path / "state.pt")
    query, f = make_query(three_tasks(), [1, 2, 3]), features(3)
    expected = first.eval()(query, f).embedding
    assert not torch.allclose(second.eval()(query, f).embedding, expected, atol=1e-3)
    second.load_checkpoint_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(second(query, f).embedding, expected)


@pytest.mark.parametrize("mode", ["full", "lora", "last:1", "none"])
def test_frozen_weights_that_changed_in_a_folder_are_noticed(mode, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = replace(TINY, model=str(folder), train_llm=mode)
    first = build(config)
    build(config, seed=3).require_base(first.revision, first.frozen_digest)
    build_tiny_qwen(folder, seed=1)  # the same settings, so the same revision
    second = build(config)
    assert second.revision == first.revision
    if mode == "full":  # every weight is in the checkpoint
        assert first.frozen_digest == second.frozen_digest == ""
        return
    with pytest.raises(ModelError, match="the frozen weights of .* are not those"):
        second.require_base(first.revision, first.frozen_digest)


def test_checkpoint_of_another_mode_is_refused_with_the_names():
    full, none = build(), build(replace(TINY, train_llm="none"))
    with pytest.raises(ModelError, match="unexpected: language_model.embed_tokens.weight"):
        none.load_checkpoint_state(full.checkpoint_state())
    with pytest.raises(ModelError, match="missing: language_model.embed_tokens.weight") as caught:
        full.load_checkpoint_state(none.checkpoint_state())
    assert "--train-llm" in caught.value.hint
