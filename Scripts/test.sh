#!/usr/bin/env bash
# Lint, types and tests. Arguments go to pytest: ./Scripts/test.sh tests/test_config.py -k flags
set -euo pipefail
cd -- "$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")"
./init.sh --dev
python=.venv/bin/python
"$python" -m ruff check
"$python" -m ruff format --check
"$python" -m mypy
# The tests' products are tiny: a second thread only waits for the first, for long where the machine is busy.
export OMP_NUM_THREADS=1
exec "$python" -m pytest "$@"
