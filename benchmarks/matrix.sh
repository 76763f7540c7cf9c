#!/usr/bin/env bash
# Build environments of several versions of Python and of the packages, run tests in each, and print one table.
#
#     bash benchmarks/matrix.sh --help
#
# An environment that cannot be built is a row that says why. A build of torch with CUDA is fetched only with --any-torch.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash benchmarks/matrix.sh [options]

Builds each environment in a folder of its own, runs tests there, and prints a table in Markdown: versions, tests
passed and failed, or why it could not be built. Exit code 1 when a test failed or no environment could be built.

  --env P:T:F:Q   an environment: Python:torch:transformers:tqdm, as 3.11:2.10.0:4.57.6:4.67.3; "newest" takes what
                  requirements.txt admits; may be given several times (default: those of --list)
  --full          run the whole suite (default: one short run of the program, and the tests that versions break first)
  --tests "A B"   test files to run instead
  --any-torch     take the build of torch that pip finds first; from PyPI that is one with CUDA, of several GB
  --dir DIR       where to build (default: a new temporary folder)
  --keep          leave the environments there (default: each is deleted after its tests); with the same --dir they
                  are used again
  --list          print the environments, and build none
  --help          show this text

The CPU builds of torch come from $TORCH_INDEX (default https://download.pytorch.org/whl/cpu) and from where pip is set
up to look. A Python that is not on the PATH is taken from pyenv, or from uv, where they are installed.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
newest_torch=$(sed -n 's/^torch.*<=\([0-9.]*\).*/\1/p' "$root/requirements.txt")
environments=(
    "3.11:2.10.0:4.57.6:4.67.3"
    "3.11:$newest_torch:4.57.6:4.67.3"
    "3.11:$newest_torch:newest:newest"
    "3.12:2.10.0:5.15.0:4.67.3"
    "3.13:$newest_torch:newest:newest"
)
quick="tests/test_qwen_hybrid_prompt.py tests/test_model_persistence.py tests/test_report.py tests/test_muon.py
       tests/test_layers.py tests/test_config.py"
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

# python_of VERSION: print the interpreter's path; fails where there is none.
python_of() {
    local found
    if found=$(command -v "python$1") && "$found" -c "" 2>/dev/null; then  # a shim may stand for one that is not there
        echo "$found"
    elif found=$(pyenv latest "$1" 2>/dev/null) && found=$(pyenv prefix "$found" 2>/dev/null); then
        echo "$found/bin/python"
    elif command -v uv >/dev/null && uv python install --quiet "$1" 2>/dev/null; then
        uv python find "$1"
    else
        return 1
    fi
}

# pinned NAME VERSION: print what pip is asked for.
pinned() {
    if [[ $2 == newest ]]; then echo "$1"; else echo "$1==$2"; fi
}

# pip_in PYTHON LOG WORD...: install quietly; an index that cannot be reached costs seconds, not minutes.
pip_in() {
    local python=$1 log=$2
    shift 2
    [[ $any_torch == no ]] && set -- --extra-index-url "$torch_index" "$@"
    "$python" -m pip install --quiet --disable-pip-version-check --retries 1 "$@" >>"$log" 2>&1
}

# build PLACE PYTHON TORCH TRANSFORMERS TQDM: make the environment; prints why not, and fails, where it cannot.
build() {
    local place=$1 python=$2 torch=$3 transformers=$4 tqdm=$5 base exact suffix=""
    local log=$place.log
    : >"$log"
    if ! base=$(python_of "$python"); then
        echo "no Python $python here"
        return 1
    fi
    "$base" -m venv "$place" >>"$log" 2>&1 || { echo "venv failed, see $log"; return 1; }
    [[ $(uname -s) == Linux && $any_torch == no ]] && suffix="+cpu"  # elsewhere the build without CUDA has no suffix
    [[ $torch == newest ]] && torch=$newest_torch
    exact="torch==$torch$suffix"
    if ! pip_in "$place/bin/python" "$log" "$exact"; then
        echo "no wheel of $exact for Python $python"
        return 1
    fi
    if ! pip_in "$place/bin/python" "$log" "$exact" "$(pinned transformers "$transformers")" "$(pinned tqdm "$tqdm")" \
        -r "$root/requirements.txt" -r "$root/requirements-dev.txt"; then
        echo "packages not installed, see $log"
        return 1
    fi
}

# versions PYTHON: print the versions as cells of the table.
versions() {
    "$1" - <<'PY'
from importlib.metadata import version
import platform

print(" | ".join([platform.python_version(), *map(version, ("torch", "transformers", "numpy", "tqdm"))]))
PY
}

# number WORD FILE: print the number before a word in pytest's last line, 0 without one.
number() {
    local found
    found=$(tail -n 1 "$2" | grep -o "[0-9]* $1" | head -n 1 || true)
    found=${found%% *}
    echo "${found:-0}"
}

# check PYTHON LOG WORK: run the program and the tests; prints "passed | failed | seconds"; fails where one failed.
check() {
    local python=$1 log=$2 work=$3 began=$SECONDS passed failed smoke=0 words=()
    mkdir -p "$work"
    if [[ $full == no ]]; then
        (cd "$work" && ARC_CACHE_DIR="$work/cache" "$python" "$root/trainloop_complete_with_fixes.py" --smoke \
            --device cpu --max-batches 2 --eval-tasks 2) >"$log.smoke" 2>&1 || smoke=1
        read -r -a words <<<"$(tr '\n' ' ' <<<"$tests")"
    fi
    (cd "$root" && "$python" -m pytest -q ${words[@]+"${words[@]}"}) >"$log.tests" 2>&1 || true
    passed=$(number passed "$log.tests") failed=$(($(number failed "$log.tests") + $(number error "$log.tests") + smoke))
    [[ $passed == 0 && $failed == 0 ]] && failed=1  # pytest did not get to its last line
    echo "$passed | $failed | $((SECONDS - began))"
    [[ $failed == 0 ]]
}

full=no tests=$quick folder="" keep=no list=no any_torch=no chosen=()
while (($#)); do
    case $1 in
        --env) chosen+=("${2:?--env needs P:T:F:Q}"); shift ;;
        --full) full=yes ;;
        --tests) tests=${2:?--tests needs file names}; shift ;;
        --dir) folder=${2:?--dir needs a folder}; shift ;;
        --any-torch) any_torch=yes ;;
        --keep) keep=yes ;;
        --list) list=yes ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: unknown option $1" >&2; echo "hint: --help lists the options" >&2; exit 2 ;;
    esac
    shift
done
((${#chosen[@]})) || chosen=("${environments[@]}")
for spec in "${chosen[@]}"; do
    if [[ ! $spec =~ ^[0-9.]+:([0-9.]+|newest):([0-9.]+|newest):([0-9.]+|newest)$ ]]; then
        echo "error: --env $spec is not Python:torch:transformers:tqdm" >&2
        exit 2
    fi
    if [[ $list == yes ]]; then echo "$spec"; fi
done
[[ $list == yes ]] && exit 0
if [[ -z $folder ]]; then folder=$(mktemp -d); fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

built=0 bad=0
echo "| environment | Python | torch | transformers | numpy | tqdm | passed | failed | seconds |"
echo "|---|---|---|---|---|---|---|---|---|"
for spec in "${chosen[@]}"; do
    IFS=: read -r python torch transformers tqdm <<<"$spec"
    place=$folder/env-${spec//:/-}
    if reason=$(build "$place" "$python" "$torch" "$transformers" "$tqdm"); then
        built=$((built + 1))
        row=$(check "$place/bin/python" "$place.log" "$place.work") || bad=1
        echo "| $spec | $(versions "$place/bin/python") | $row |"
    else
        echo "| $spec | not built: $reason | | | | | | | |"
    fi
    if [[ $keep == no ]]; then rm -rf "$place"; fi
done
echo "logs: $folder" >&2
((built > 0 && bad == 0))
