#!/usr/bin/env bash
# Prepares all that training needs: .venv with the packages of requirements.txt, and the demo data in data/.
# When nothing has changed there is nothing to do, and it is done at once. Safe to run again at any time, also after
# an interruption, and twice at once: each part leaves a stamp as its last act, and only a part with its stamp counts.
#
#   ./init.sh          what training needs
#   ./init.sh --dev    and what the tests need (requirements-dev.txt)
#
# PYTHON names the interpreter that .venv is made with (default: python3). pip's own settings (PIP_INDEX_URL,
# PIP_FIND_LINKS, pip.conf, ...) hold, and a package that .venv has already is kept if requirements.txt admits it.
set -euo pipefail

fail() {
    echo "init.sh: error: $1" >&2
    exit 1
}

dev=
for argument in "$@"; do
    case $argument in
        --dev) dev=-dev ;;
        *) echo "usage: ./init.sh [--dev], not '$argument'" >&2 && exit 2 ;;
    esac
done

cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
venv_python=.venv/bin/python

hash_of() { cat -- "$@" | sha256sum | cut -d ' ' -f 1; }

# A stamp holds the hash of what its part was made from.
plain=$(hash_of requirements.txt)
packages=$plain
if [[ -n $dev ]]; then
    packages=$(hash_of requirements.txt requirements-dev.txt)
fi
packages_stamp=.venv/.requirements$dev.sha256
plain_stamp=.venv/.requirements.sha256
shards=$(hash_of data_processing/*.py)
demos=(data/demo data/demo_bpe data/llava_demo)

stamped() { [[ -f $1 && $(<"$1") == "$2" ]]; }
packages_ready() { [[ -x $venv_python ]] && stamped "$packages_stamp" "$packages"; }
shards_ready() {
    for folder in "${demos[@]}"; do stamped "$folder/.complete.sha256" "$shards" || return 1; done
}

if packages_ready && shards_ready; then
    exit 0
fi

exec 9>.init.lock
flock --nonblock 9 || { echo "init.sh: waiting for another init.sh in this folder" && flock 9; }

check_version() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$1 is $("$1" --version 2>&1), and Python 3.11 or newer is needed. $2"
}

make_venv() {
    local python=${PYTHON:-python3}
    command -v -- "$python" >/dev/null || fail "there is no $python: install Python 3.11 or newer, or set PYTHON"
    check_version "$python" "Name a newer one: PYTHON=/path/to/python3.11 ./init.sh"
    echo "init.sh: making .venv with $("$python" --version)"
    "$python" -m venv .venv || fail "cannot make .venv; if an unusable one is in the way, remove it: rm -r $PWD/.venv"
}

install_packages() {
    # A .venv made by hand, perhaps with a chosen build of PyTorch in it, is used as it is.
    if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        make_venv
    fi
    check_version "$venv_python" "Remove .venv, and run ./init.sh again."
    echo "init.sh: installing requirements$dev.txt (README.md says how to choose PyTorch's CPU or CUDA wheel)"
    rm -f .venv/.requirements*.sha256
    "$venv_python" -m pip install --disable-pip-version-check -r "requirements$dev.txt"
    echo "$plain" >"$plain_stamp"
    echo "$packages" >"$packages_stamp"
}

make_shards() {
    echo "init.sh: making the demo data in ${demos[*]}"
    "$venv_python" -m data_processing.demo_corpus --output_dir data/demo
    "$venv_python" -m data_processing.demo_corpus --output_dir data/demo_bpe --vocabulary 4096
    "$venv_python" -m data_processing.llava_demo --output_dir data/llava_demo
    for folder in "${demos[@]}"; do echo "$shards" >"$folder/.complete.sha256"; done
}

packages_ready || install_packages
shards_ready || make_shards
echo "init.sh: ready"
