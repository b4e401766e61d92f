#!/usr/bin/env bash
# On a bare machine, from anywhere: installs the wheels that were carried along beside what is there, and runs the sections.
# Arguments go to `python -m benchmarks.gpu`. WHEELS is the folder of wheels (.wheels in the repository), PYTHON the Python.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.wheels}
if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -c "import torch, diffusers" # from a cold disk that takes longer than the first section has
"$python" -m benchmarks.gpu "$@"
