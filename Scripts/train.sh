#!/usr/bin/env bash
# Trains: ./Scripts/train.sh --batch_size 2 --max_steps 20. Its flags are those of main.py; --help lists them.
# Prepares the environment first where it is not there (init.sh). May be called from any folder.
set -euo pipefail
root=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")
"$root/init.sh"
exec "$root/.venv/bin/python" "$root/main.py" "$@"
