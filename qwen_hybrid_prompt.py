"""Write the demonstrations as text, run Qwen on it with real gradients, return the hybrid prompt.

Rule text (from demonstrations only) -> language model -> masked mean -> projection; plus features, task slot, dihedral.
May import config, arc_data, demo_prior (L1), torch; transformers, tokenizers, peft, huggingface_hub in functions only.
Used by policy_refined (Prompt), arc_system (QwenHybridPrompt, resolve_model, resolve_train_llm).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from arc_data import to_device
from config import DEFAULT_QWEN, ConfigError, PromptConfig

if TYPE_CHECKING:
    from arc_data import Query

Demonstrations = Sequence[tuple[np.ndarray, np.ndarray]]

NUM_COLORS = 10
NUM_DIHEDRAL = 8
TINY_REVISION = "tiny-v1"
END_OF_TEXT = "<|endoftext|>"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LORA_RANK = 16
HUB_SECONDS = 5.0
TOKEN_CACHE_SIZE = 16384
MIN_TRANSFORMERS = (4, 56)
KNOWN_MODELS = tuple(
    f"Qwen/Qwen{name}"
    for name in ("2.5-0.5B", "2.5-0.5B-Instruct", "2.5-1.5B", "2.5-1.5B-Instruct", "2.5-3B", "2-0.5B", "2-1.5B",
                 "3-0.6B", "3-0.6B-Base", "3-1.7B", "3-1.7B-Base")
)  # fmt: skip


class ModelError(RuntimeError):
    """A language model that cannot be had. `hint` says what to do; the driver exits with code 4."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


# 1. Rule text --------------------------------------------------------------------------------------------------------

COLOR_NAMES = ("black", "blue", "red", "green", "yellow", "gray", "magenta", "orange", "cyan", "maroon")
DIHEDRAL_NAMES = (
    "the same", "flipped left-right", "flipped up-down", "rotated by 180 degrees", "transposed",
    "rotated left", "rotated right", "transposed on the other diagonal",
)  # fmt: skip
# Every word that a rule text may contain stands in these templates, the names above, or is a number: the tiny tokenizer
# takes its vocabulary from them.
TEMPLATES = {
    "none": "No examples.",
    "size_same": "Examples: {n}. The output keeps the input size: {sizes}.",
    "size_ratio": "Examples: {n}. The output is {rows} times as high and {cols} times as wide: {sizes}.",
    "size_constant": "Examples: {n}. Every output is {out}: from {sizes}.",
    "size_other": "Examples: {n}. The output size changes: {sizes}.",
    "to": "{a} to {b}",
    "more": "more",
    "moved": "The output is the input {how}.",
    "enlarged": "Each input cell becomes a block.",
    "tiled": "The output repeats the input as tiles.",
    "cropped": "The output is cut out of the input.",
    "stay": "Unchanged colors: {colors}.",
    "becomes": "{a} becomes {b}",
    "mostly_becomes": "{a} mostly becomes {b}, else {c}",
    "often_becomes": "{a} often becomes {b}, else {c}",
    "mostly_stays": "{a} mostly stays, else {c}",
    "often_stays": "{a} often stays, else {c}",
    "map": "Color {changes}.",
    "out_colors": "Output colors: {colors}.",
    "nothing": "No cell changes.",
    "changed": "About {percent} percent of the cells change: {what}.",
    "filled": "only background is filled",
    "erased": "cells are erased",
    "recolored": "shapes keep their place and are recolored",
    "shifted": "cells move and color counts stay",
    "mixed": "several kinds",
    "new": "New colors: {colors}.",
    "new_sometimes": "Sometimes new: {colors}.",
    "gone": "Removed colors: {colors}.",
    "symmetry": "Outputs are symmetric: {axes}.",
    "axis_lr": "left-right",
    "axis_ud": "up-down",
    "axis_diagonal": "diagonal",
    "axis_half": "rotation",
    "else_stays": "stays",
    "test": "Test input: {size}, colors {colors}.",
}


def rule_text(demonstrations: Demonstrations, test_input: np.ndarray) -> str:
    """Return a few plain sentences about what the demonstrations do, and the test input's size and colors.

    Shapes: pairs of integer grids [h, w] -> str, at most about 120 tokens. A pure function of what may be seen:
    no answer, no task name, and the order of the demonstrations does not matter.
    """
    test = TEMPLATES["test"].format(size=_size(test_input), colors=_names(_colors_by_count(test_input)))
    if not demonstrations:
        return f"{TEMPLATES['none']} {test}"
    sentences = [_size_sentence(demonstrations), _whole_grid_sentence(demonstrations)]
    same_size = [(i, o) for i, o in demonstrations if i.shape == o.shape]
    if same_size:
        sentences += [*_color_map_sentences(same_size), _change_sentence(same_size)]
    if len(same_size) < len(demonstrations):
        counts = sum(np.bincount(o.ravel(), minlength=NUM_COLORS) for _, o in demonstrations)
        sentences.append(TEMPLATES["out_colors"].format(colors=_names(_ranked(counts))))
    sentences += [*_new_color_sentences(demonstrations), _symmetry_sentence([o for _, o in demonstrations]), test]
    return " ".join(sentence for sentence in sentences if sentence)


def _size(grid: np.ndarray) -> str:
    return f"{grid.shape[0]}x{grid.shape[1]}"


def _names(colors: Sequence[int]) -> str:
    return " ".join(COLOR_NAMES[c] for c in colors)


def _ranked(counts: np.ndarray) -> list[int]:
    """Return the colors that occur, most frequent first, ties by lower color."""
    return [int(c) for c in np.argsort(-counts, kind="stable") if counts[c] > 0]


def _colors_by_count(grid: np.ndarray) -> list[int]:
    return _ranked(np.bincount(grid.ravel(), minlength=NUM_COLORS))


def _size_sentence(demonstrations: Demonstrations, most: int = 3) -> str:
    n = len(demonstrations)
    shapes = sorted({(i.shape, o.shape) for i, o in demonstrations})
    inputs = [f"{h}x{w}" for h, w in sorted({i for i, _ in shapes})]
    arrows = [TEMPLATES["to"].format(a=f"{i[0]}x{i[1]}", b=f"{o[0]}x{o[1]}") for i, o in shapes]

    def listed(items: list[str]) -> str:
        return ", ".join(items[:most] + [TEMPLATES["more"]] * (len(items) > most))

    if all(i == o for i, o in shapes):
        return TEMPLATES["size_same"].format(n=n, sizes=listed(inputs))
    ratios = {(Fraction(o[0], i[0]), Fraction(o[1], i[1])) for i, o in shapes}
    if len(ratios) == 1:
        rows, cols = ratios.pop()
        return TEMPLATES["size_ratio"].format(n=n, rows=rows, cols=cols, sizes=listed(arrows))
    outputs = {o for _, o in shapes}
    if len(outputs) == 1:
        h, w = outputs.pop()
        return TEMPLATES["size_constant"].format(n=n, out=f"{h}x{w}", sizes=listed(inputs))
    return TEMPLATES["size_other"].format(n=n, sizes=listed(arrows))


def _dihedral(grid: np.ndarray, kind: int) -> np.ndarray:
    """Return `grid` moved as DIHEDRAL_NAMES[kind] says."""
    moves: tuple[Callable[[], np.ndarray], ...] = (
        lambda: grid, lambda: grid[:, ::-1], lambda: grid[::-1], lambda: grid[::-1, ::-1], lambda: grid.T,
        lambda: grid.T[::-1], lambda: grid.T[:, ::-1], lambda: grid.T[::-1, ::-1],
    )  # fmt: skip
    return moves[kind]()


def _whole_ratio(small: np.ndarray, large: np.ndarray) -> tuple[int, int]:
    """Return how often `small` fits into `large` by rows and columns, (0, 0) where it leaves a rest."""
    (rows, row_rest), (cols, col_rest) = (divmod(b, s) for b, s in zip(large.shape, small.shape, strict=True))
    return (0, 0) if row_rest or col_rest else (rows, cols)


def _is_enlarged(small: np.ndarray, large: np.ndarray) -> bool:
    rows, cols = _whole_ratio(small, large)
    return rows * cols > 1 and np.array_equal(small.repeat(rows, 0).repeat(cols, 1), large)


def _is_tiled(small: np.ndarray, large: np.ndarray) -> bool:
    rows, cols = _whole_ratio(small, large)
    return rows * cols > 1 and np.array_equal(np.tile(small, (rows, cols)), large)


def _is_cropped(whole: np.ndarray, part: np.ndarray) -> bool:
    (H, W), (h, w) = whole.shape, part.shape
    if h > H or w > W or (h, w) == (H, W):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(whole, (h, w))
    starts = windows[:, :, 0, 0] == part[0, 0]
    return bool((windows[starts] == part).all(axis=(1, 2)).any())


def _whole_grid_sentence(demonstrations: Demonstrations) -> str:
    if all(np.array_equal(i, o) for i, o in demonstrations):
        return ""
    for kind in range(1, NUM_DIHEDRAL):
        if all(np.array_equal(_dihedral(i, kind), o) for i, o in demonstrations):
            return TEMPLATES["moved"].format(how=DIHEDRAL_NAMES[kind])
    for name, holds in (("enlarged", _is_enlarged), ("tiled", _is_tiled), ("cropped", _is_cropped)):
        if all(holds(i, o) for i, o in demonstrations):
            return TEMPLATES[name]
    return ""


def _color_map_sentences(same_size: Demonstrations, most: int = 6) -> list[str]:
    """Return what happens to each input color: majority output color, how sure, and the runner-up."""
    pairs = np.concatenate([i.ravel().astype(np.int64) * NUM_COLORS + o.ravel() for i, o in same_size])
    counts = np.bincount(pairs, minlength=NUM_COLORS**2).reshape(NUM_COLORS, NUM_COLORS)
    unchanged, changes = [], []
    for c in _ranked(counts.sum(1)):
        order = _ranked(counts[c])
        share = counts[c, order[0]] / counts[c].sum()
        if order == [c]:
            unchanged.append(c)
            continue
        degree = "" if share == 1 else "mostly_" if share >= 0.8 else "often_"
        verb = "stays" if order[0] == c else "becomes"
        rest = order[min(1, len(order) - 1)]
        other = TEMPLATES["else_stays"] if rest == c else COLOR_NAMES[rest]
        changes.append(TEMPLATES[degree + verb].format(a=COLOR_NAMES[c], b=COLOR_NAMES[order[0]], c=other))
    if len(changes) > most:
        changes[most:] = [TEMPLATES["more"]]
    sentences = [TEMPLATES["stay"].format(colors=_names(unchanged))] if unchanged else []
    return sentences + ([TEMPLATES["map"].format(changes="; ".join(changes))] if changes else [])


def _change_sentence(same_size: Demonstrations) -> str:
    changed = sum(int((i != o).sum()) for i, o in same_size)
    if changed == 0:
        return TEMPLATES["nothing"]
    fills = erases = recolors = shifts = True
    for i, o in same_size:
        background, moved = _colors_by_count(i)[0], i != o
        fills &= bool((i[moved] == background).all())
        erases &= bool((o[moved] == background).all())
        recolors &= np.array_equal(i == background, o == background)
        shifts &= np.array_equal(np.bincount(i.ravel(), minlength=10), np.bincount(o.ravel(), minlength=10))
    kinds = (("filled", fills), ("erased", erases), ("recolored", recolors), ("shifted", shifts), ("mixed", True))
    what = next(TEMPLATES[name] for name, holds in kinds if holds)
    percent = max(1, round(100 * changed / sum(i.size for i, _ in same_size)))
    return TEMPLATES["changed"].format(percent=percent, what=what)


def _new_color_sentences(demonstrations: Demonstrations) -> list[str]:
    seen = [(set(np.unique(i).tolist()), set(np.unique(o).tolist())) for i, o in demonstrations]
    new = [o - i for i, o in seen]
    always = set.intersection(*new)
    sometimes = set.union(*new) - always
    found = (
        ("new", always),
        ("new_sometimes", sometimes if len(sometimes) <= 3 else set()),
        ("gone", set.intersection(*(i - o for i, o in seen))),
    )
    return [TEMPLATES[name].format(colors=_names(sorted(colors))) for name, colors in found if colors]


def _symmetry_sentence(outputs: Sequence[np.ndarray]) -> str:
    if all((grid == grid.flat[0]).all() for grid in outputs):
        return ""
    kinds = (("axis_lr", 1), ("axis_ud", 2), ("axis_diagonal", 4), ("axis_half", 3))
    axes = [TEMPLATES[name] for name, kind in kinds if all(np.array_equal(_dihedral(g, kind), g) for g in outputs)]
    return TEMPLATES["symmetry"].format(axes=", ".join(axes)) if axes else ""


# 2. Language models --------------------------------------------------------------------------------------------------


class LanguageModel(NamedTuple):
    """A transformer without language-model head, its tokenizer, and the revision that identifies its weights."""

    model: nn.Module
    tokenizer: Any
    revision: str


def parse_train_llm(value: str) -> tuple[str, int]:
    """Return (mode, number of layers): `last:2` -> ("last", 2), the other modes with 0. Raises: ConfigError."""
    if value in ("full", "lora", "none"):
        return value, 0
    if match := re.fullmatch(r"last:([1-9]\d*)", value):
        return "last", int(match[1])
    raise ConfigError(f'--train-llm must be full, lora, last:N (N at least 1) or none, got "{value}"',
                      "for example --train-llm last:2")  # fmt: skip


def build_tiny_qwen(folder: Path | str, seed: int = 0) -> Path:
    """Write a small random Qwen2 and its tokenizer to `folder` as from_pretrained reads them; return the folder.

    2 layers, width 64, 2 heads; weights are a function of `seed` alone and no global random state is used up. The
    tokenizer is Qwen's byte-level BPE with merges for the words of the rule texts, an eos token and no pad token.
    """
    _require("transformers", MIN_TRANSFORMERS)
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2Model

    folder = Path(folder)
    vocabulary = _write_tiny_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024, use_cache=False,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=vocabulary[END_OF_TEXT], pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), _quiet():
        model = Qwen2Model(config).float()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    deviation = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
                    parameter.normal_(0.0, deviation, generator=generator)
        # Not model.save_pretrained, which writes in the first of several processes only.
        model.config.dtype, model.config.architectures = "float32", ["Qwen2Model"]
        model.config.save_pretrained(folder)
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_tiny_tokenizer(folder: Path) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json to `folder`; return the vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = _tiny_merges()
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys(a + b for a, b in merges), END_OF_TEXT]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    # Qwen2Tokenizer would make eos the pad token by itself; null says that there is none.
    description = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 1024, "add_prefix_space": False,
                   "eos_token": END_OF_TEXT, "unk_token": None, "pad_token": None, "bos_token": None}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
    return vocabulary


@functools.cache
def _tiny_merges() -> tuple[tuple[str, str], ...]:
    """Return byte-pair merges that make each word of the rule texts one token.

    Most frequent pair first, ties by spelling; not a library trainer, whose tie-breaking could change the tokens.
    """
    words: set[str] = set()
    for text in (*TEMPLATES.values(), *COLOR_NAMES, *DIHEDRAL_NAMES):
        for word in re.findall(r"[^A-Za-z0-9\s]?[A-Za-z]+", re.sub(r"\{\w+\}", " ", text)):
            words.update((word, "\u0120" + word) if word[0].isalpha() else (word,))  # U+0120 is the byte of a space
    spelled = [list(word) for word in sorted(words)]
    merges = []
    while counts := Counter(pair for word in spelled for pair in itertools.pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word in spelled:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return tuple(merges)


def load_language_model(config: PromptConfig) -> LanguageModel:
    """Return the model (fp32, no head, on the CPU), its tokenizer and its revision.

    `tiny`, a folder, or a hub id: the local cache first, then the hub unless `config.offline` or HF_HUB_OFFLINE is set.
    Revision: the hub's commit hash, a hash of a folder's config.json, or "tiny-v1"; `config.revision` pins it.
    Raises: ModelError when the model cannot be had, with what to do about it.
    """
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    _require("transformers", MIN_TRANSFORMERS)
    if config.model == "tiny":
        _check_revision(config, TINY_REVISION)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            model, tokenizer = _from_folder(build_tiny_qwen(folder), "tiny")
        revision = TINY_REVISION
    elif (folder := Path(config.model).expanduser()).is_dir():
        model, tokenizer, revision = _load_folder(folder, config)
    elif config.model.startswith((".", "~", os.sep)) or config.model.count("/") > 1:
        hint = f"give a folder, a hub id such as {DEFAULT_QWEN}, or tiny"
        raise ModelError(f"--model: no such folder: {config.model}", hint)
    else:
        model, tokenizer, revision = _load_hub(config)
    model.config.use_cache = False
    _set_pad_token(tokenizer, config.model)
    return LanguageModel(model, tokenizer, revision)


def _set_pad_token(tokenizer: Any, name: str) -> None:
    """Make eos the pad token where there is none. The attention mask says which tokens are padding, ids never do."""
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token_id is None:
        hint = f"use --model {DEFAULT_QWEN} or tiny"
        raise ModelError(f"the tokenizer of {name} has neither a pad nor an eos token", hint)
    tokenizer.pad_token = tokenizer.eos_token


def _load_folder(folder: Path, config: PromptConfig) -> LanguageModel:
    description = folder / "config.json"
    if not description.is_file():
        raise ModelError(f"--model: {folder} has no config.json, so it is not a saved model",
                         "give the folder that save_pretrained wrote, or a hub id")  # fmt: skip
    revision = "config-" + hashlib.blake2b(description.read_bytes(), digest_size=8).hexdigest()
    _check_revision(config, revision)
    return LanguageModel(*_from_folder(folder, str(folder)), revision)


def _check_revision(config: PromptConfig, found: str) -> None:
    if config.revision not in ("", found):
        raise ModelError(f"--model {config.model} is revision {found}, but {config.revision} was asked for",
                         "give the model that the run began with, or leave --revision out")  # fmt: skip


def _load_hub(config: PromptConfig) -> LanguageModel:
    name, problem = config.model, None
    snapshot = _cached(config)
    if snapshot is not None:
        try:
            return LanguageModel(*_from_folder(snapshot, name), snapshot.name)
        except ModelError as error:  # an interrupted download leaves config.json without weights: the hub mends that
            problem = error
    _require_online(config, problem)
    snapshot = _download(name, *_ask_hub(name, config.revision or None))
    return LanguageModel(*_from_folder(snapshot, name), snapshot.name)


def _cached(config: PromptConfig) -> Path | None:
    """Return the folder of a hub model in the local cache. Raises: ModelError for what can be no hub id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(config.model, "config.json", revision=config.revision or None)
    except HFValidationError as error:
        raise _unknown_model(config.model) from error
    return Path(found).parent if isinstance(found, str) else None


def _require_online(config: PromptConfig, problem: Exception | None = None) -> None:
    if config.offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        switch = "--offline" if config.offline else "HF_HUB_OFFLINE"
        name = config.model
        raise ModelError(f"{name} is not in the local cache and {switch} is set", _cache_hint(name)) from problem


def find_language_model(config: PromptConfig) -> str:
    """Return where the language model would be loaded from, in words, without loading it.

    Raises: ModelError when it cannot be had, within seconds if the hub is silent.
    """
    _require("transformers", MIN_TRANSFORMERS)
    if config.model == "tiny":
        return "built here"
    if (folder := Path(config.model).expanduser()).is_dir():
        return f"in the folder {folder}"
    snapshot = _cached(config)
    if snapshot is not None:
        return f"in the local cache, commit {snapshot.name[:12]}"
    _require_online(config)
    return f"on huggingface.co, commit {_ask_hub(config.model, config.revision or None)[0][:12]}"


def _from_folder(folder: Path, name: str) -> tuple[nn.Module, Any]:
    """Return (model, tokenizer) from a folder: the one way in which every model, tiny or real, is read."""
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"cannot load the language model {name}: {reason}", _cache_hint(name)) from error
    return model, tokenizer


def _ask_hub(name: str, revision: str | None) -> tuple[str, bool]:
    """Return (commit hash, has safetensors) of a hub model. Raises: ModelError, within seconds if the hub is silent."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    answer: dict[str, Any] = {}

    def ask() -> None:
        try:
            answer["info"] = HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
        except Exception as error:  # carried to the caller's thread, where it is named
            answer["error"] = error

    # A thread, because a name look-up obeys no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(1.5 * HUB_SECONDS)
    error = answer.get("error")
    if "info" in answer:
        info = answer["info"]
        return info.sha, any(file.rfilename.endswith(".safetensors") for file in info.siblings or ())
    if isinstance(error, GatedRepoError):
        raise ModelError(f"{name} is gated on huggingface.co", _token_hint(name)) from error
    if isinstance(error, RepositoryNotFoundError):
        raise _unknown_model(name) from error
    if isinstance(error, RevisionNotFoundError):
        raise ModelError(f"{name} has no revision {revision}", "leave --revision out for the newest one") from error
    if isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", 0) in (401, 403):
        raise ModelError(f"huggingface.co refuses access to {name}", _token_hint(name)) from error
    raise ModelError(f"cannot reach huggingface.co ({_network_reason(error)})", _cache_hint(name)) from error


def _network_reason(error: Exception | None) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if error is None or "timeout" in text.lower() or "timed out" in text.lower():
        return f"no answer within {HUB_SECONDS:g} s"
    if re.search(r"resol|getaddrinfo|name or service|nodename", text, re.IGNORECASE):
        return "name not resolved"
    return text[:160]


def _download(name: str, commit: str, has_safetensors: bool) -> Path:
    from huggingface_hub import snapshot_download

    print(f"Downloading {name} (commit {commit[:12]}) from huggingface.co")
    weights = "*.safetensors" if has_safetensors else "*.bin"
    patterns = ["*.json", "*.txt", "*.model", weights]
    try:
        with _quiet():
            return Path(snapshot_download(name, revision=commit, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # many libraries may fail here; the cause stays attached
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        hint = "run the same command again; it continues"
        raise ModelError(f"the download of {name} stopped: {reason}", hint) from error


def _unknown_model(name: str) -> ModelError:
    short = {known.split("/")[1]: known for known in KNOWN_MODELS}
    close = difflib.get_close_matches(name, KNOWN_MODELS, n=1, cutoff=0.7)
    close = close or [short[m] for m in difflib.get_close_matches(name.split("/")[-1], short, n=1, cutoff=0.7)]
    guess = f"did you mean {close[0]}?" if close else f"for example --model {DEFAULT_QWEN}, or --model tiny"
    hint = f"{guess} (a private model needs HF_TOKEN in the environment)"
    return ModelError(f'no model "{name}" on huggingface.co', hint)


def _cache_hint(name: str) -> str:
    if name == "tiny" or Path(name).expanduser().is_dir():
        return f"give another folder, a hub id such as {DEFAULT_QWEN}, or --model tiny"
    return f"once with network: hf download {name} ; or --model /path ; or --model tiny"


def _token_hint(name: str) -> str:
    return (f'accept the terms at huggingface.co/{name} and set HF_TOKEN (Colab: import os; os.environ["HF_TOKEN"] = '
            f'"hf_..." in a cell), or use --model {DEFAULT_QWEN}')  # fmt: skip


def _require(package: str, least: tuple[int, int] | None = None, purpose: str = "") -> None:
    """Raise ModelError unless `package` is installed, and at least at version `least`."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        if purpose:
            raise ModelError(f"{purpose} needs the package {package}", f"pip install {package}") from error
        raise ModelError(f"package {package} is not installed", "pip install -r requirements.txt") from error
    if least and tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < least:
        wanted = ".".join(map(str, least))
        hint = f'pip install -U "{package}>={wanted},<6"'
        raise ModelError(f"{package} {version} is too old (need >= {wanted})", hint)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' log lines and progress bars inside the block, and put both back as they were."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_had_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
        if hub_had_bars:
            enable_progress_bars()


def set_trainable(model: nn.Module, train_llm: str) -> nn.Module:
    """Return `model` with exactly the parameters of the mode requiring gradients (lora adds its adapters).

    full: all; lora: rank-16 adapters on every linear layer; last:N: the last N layers and the final norm; none.
    Raises: ConfigError for a bad mode or too many layers; ModelError when lora's package is missing.
    """
    mode, count = parse_train_llm(train_llm)
    if mode == "lora":
        _require("peft", purpose="--train-llm lora")
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, bias="none",
                            target_modules="all-linear", task_type="FEATURE_EXTRACTION")  # fmt: skip
        return get_peft_model(model, config)
    model.requires_grad_(mode == "full")
    if mode == "last":
        name, layers = max(
            ((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)), key=lambda item: len(item[1])
        )
        if count > len(layers):
            raise ConfigError(f"--train-llm last:{count}: the model has only {len(layers)} layers",
                              f"at most --train-llm last:{len(layers)}")  # fmt: skip
        layers[-count:].requires_grad_(True)
        parent = model.get_submodule(name.rpartition(".")[0])
        for final in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
            if hasattr(parent, final):
                getattr(parent, final).requires_grad_(True)
    return model


def _recompute_activations(model: nn.Module) -> None:
    """Trade time for memory; transformers renamed the method in version 5, and the old name warns."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


# 3. The hybrid prompt ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What the planner is told about its task.

    embedding [B, Dp] the hybrid prompt; control [B, Dc] from the features; text [B, Dp] the projected text part.
    A part that is switched off is zero.
    """

    embedding: Tensor
    control: Tensor
    text: Tensor

    def select(self, index: Tensor) -> Prompt:
        """Return the prompts at `index` [B'] (int64), for example a permutation that shuffles them across tasks."""
        return Prompt(self.embedding[index], self.control[index], self.text[index])


class QwenHybridPrompt(nn.Module):
    """Hybrid prompt: text through the language model, features, task slot and dihedral id, summed and normalised.

    `language_model` (None without text), `tokenizer`, `revision`, `is_tiny`. A part that is off has no parameters.
    Raises: ModelError when the language model cannot be had; ConfigError when every part is switched off.
    """

    def __init__(self, config: PromptConfig, *, num_tasks: int, num_features: int = 32, control_dim: int = 32):
        super().__init__()
        if not (config.use_text or config.use_control or config.use_task_slot):
            raise ConfigError("the prompt has no part left: --use-text, --use-control and --use-task-slot are all off",
                              "leave at least one of them on")  # fmt: skip
        assert "auto" not in (config.model, config.train_llm), "config.resolve comes first"
        self.config = config
        self.control_dim = control_dim
        self.is_tiny = config.model == "tiny"
        self.language_model: nn.Module | None = None
        self.tokenizer, self.revision = None, ""
        self.recomputes, self.max_tokens = False, config.max_prompt_tokens
        width = config.prompt_dim
        if config.use_text:
            model, self.tokenizer, self.revision = load_language_model(config)
            hidden = model.config.hidden_size
            self.language_model = set_trainable(model, config.train_llm)
            if config.gradient_checkpointing:
                self.recompute_activations()
            self.text_norm = nn.LayerNorm(hidden)
            self.text_projection = nn.Linear(hidden, width)
        if config.use_control:
            self.control_mlp = nn.Sequential(nn.Linear(num_features, 64), nn.SiLU(), nn.Linear(64, control_dim))
            self.control_projection = nn.Linear(control_dim, width)
        if config.use_task_slot:
            self.task_slot = nn.Embedding(num_tasks + 1, width)
            self.dihedral = nn.Embedding(NUM_DIHEDRAL, width)
            nn.init.normal_(self.task_slot.weight, std=0.1)
            nn.init.normal_(self.dihedral.weight, std=0.1)
        self.fusion_norm = nn.LayerNorm(width)
        self._token_cache: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self.train()

    def recompute_activations(self) -> None:
        """Let the language model recompute its activations in the backward pass, from now on."""
        _recompute_activations(self.language_model)
        self.recomputes = True

    @property
    def can_recompute(self) -> bool:
        """Return True when recomputing would save memory: the language model trains and does not do it yet."""
        return bool(self.language_parameters()) and not self.recomputes

    def limit_tokens(self, count: int) -> None:
        """Cut rule texts at `count` tokens from now on, instead of at max_prompt_tokens."""
        self.max_tokens = count
        self._token_cache.clear()

    def train(self, mode: bool = True) -> QwenHybridPrompt:
        """Return self in training or evaluation mode; a wholly frozen language model stays in evaluation mode."""
        super().train(mode)
        if self.language_model is not None and not self.language_parameters():
            self.language_model.eval()
        return self

    def forward(self, query: Query, features: Tensor) -> Prompt:
        """Return the prompts of the batch: features [B, F] float -> Prompt.

        Reads query.contexts (what may be seen, as numpy), query.task_slot [B] and query.dihedral [B].
        Each distinct rule text runs through the language model once.
        """
        zeros = features.new_zeros(len(query.contexts), self.config.prompt_dim)
        total, text, control = zeros, zeros, features.new_zeros(len(query.contexts), self.control_dim)
        if self.config.use_text:
            text = self.text_projection(self.text_norm(self._read([rule_text(*c.seen()) for c in query.contexts])))
            total = total + text
        if self.config.use_control:
            control = self.control_mlp(features)
            total = total + self.control_projection(control)
        if self.config.use_task_slot:
            total = total + self.task_slot(query.task_slot) + self.dihedral(query.dihedral)
        return Prompt(self.fusion_norm(total), control, text)

    def _read(self, texts: list[str]) -> Tensor:
        """Return [B, hidden] fp32: the mean of the last hidden states over each text's own tokens."""
        device = self.text_projection.weight.device
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        token_ids = self._tokenize(list(row_of))
        longest = max(map(len, token_ids))
        pad = self.tokenizer.pad_token_id
        ids_KL = to_device(torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in token_ids]), device)
        length_K = to_device(torch.tensor([len(ids) for ids in token_ids]), device)
        mask_KL = torch.arange(longest, device=device) < length_K[:, None]
        frozen = not self.language_parameters()
        with torch.no_grad() if frozen else contextlib.nullcontext():
            seen = self._attention_mask(mask_KL)
            hidden_KLD = self.language_model(input_ids=ids_KL, attention_mask=seen).last_hidden_state.float()
        sum_KD = torch.where(mask_KL[:, :, None], hidden_KLD, 0.0).sum(1)
        mean_KD = sum_KD / length_K[:, None]
        return mean_KD[to_device(torch.tensor([row_of[text] for text in texts]), device)]

    def _attention_mask(self, mask_KL: Tensor) -> Tensor:
        """Return what tells the language model where its tokens may look, from where they are.

        Padding is on the right, where no token of a causal model looks, so its mask is the same for all texts. Other
        masks make transformers read them on the host, for which the device would have to wait.
        """
        if not self._is_causal:
            return mask_KL.long()
        length = mask_KL.shape[1]
        return torch.ones(length, length, dtype=torch.bool, device=mask_KL.device).tril()[None, None]

    @functools.cached_property
    def _is_causal(self) -> bool:
        """Return True when every attention of the language model looks back only, and takes a boolean mask."""
        flags = [m.is_causal for m in self.language_model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
        return self.language_model.config._attn_implementation == "sdpa" and bool(flags) and all(flags)

    def _tokenize(self, texts: list[str]) -> list[tuple[int, ...]]:
        """Return the token ids of each text, cut at max_tokens; texts seen lately are only looked up."""
        cache = self._token_cache
        missing = [text for text in texts if text not in cache]
        found = {text: cache[text] for text in texts if text in cache}
        if missing:
            ids = self.tokenizer(missing, truncation=True, max_length=self.max_tokens, padding=False)["input_ids"]
            found.update(zip(missing, map(tuple, ids), strict=True))
        for text in texts:
            cache[text] = found[text]
            cache.move_to_end(text)
        while len(cache) > TOKEN_CACHE_SIZE:
            cache.popitem(last=False)
        return [found[text] for text in texts]

    def language_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return (name, parameter) of everything in the language model that trains."""
        if self.language_model is None:
            return []
        return [(name, p) for name, p in self.language_model.named_parameters() if p.requires_grad]

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint needs: all but the frozen base, which the revision identifies."""
        frozen = self._frozen_names()
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    def load_checkpoint_state(self, state: dict[str, Tensor]) -> None:
        """Load what checkpoint_state returned. Raises: ModelError that lists missing and unexpected names."""
        expected = self.checkpoint_state().keys()
        missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
        if missing or unexpected:
            lists = "; ".join(f"{what}: {', '.join(names)}" for what, names in
                              (("missing", missing), ("unexpected", unexpected)) if names)  # fmt: skip
            raise ModelError(f"the checkpoint does not fit the prompt model ({lists})",
                             "resume with the run's own --model, --train-llm and prompt settings")  # fmt: skip
        self.load_state_dict(state, strict=False)

    @functools.cached_property
    def frozen_digest(self) -> str:
        """Return a hash of the frozen weights, which no checkpoint holds; empty when everything trains.

        Buffers are left out: they are computed, and another machine may round them otherwise.
        """
        frozen = [(name, p) for name, p in sorted(self.named_parameters()) if not p.requires_grad]
        digest = hashlib.blake2b(digest_size=8)
        for name, parameter in frozen:
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest() if frozen else ""

    def require_base(self, revision: str, frozen_digest: str) -> None:
        """Refuse weights that were trained on another base. Raises: ModelError naming both."""
        name = self.config.model
        if revision != self.revision:
            raise ModelError(f"these weights belong to {name} at revision {revision}, found {self.revision}",
                             f"--revision {revision}")  # fmt: skip
        if frozen_digest != self.frozen_digest:
            raise ModelError(f"the frozen weights of {name} are not those that these weights were trained with",
                             "put back the model that the run began with")  # fmt: skip

    def _frozen_names(self) -> set[str]:
        if self.language_model is None:
            return set()
        named = list(self.language_model.named_parameters(remove_duplicate=False))
        frozen = {name for name, p in named if not p.requires_grad}
        if frozen:
            frozen.update(name for name, _ in self.language_model.named_buffers())
        return {f"language_model.{name}" for name in frozen}
