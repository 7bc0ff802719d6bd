#!/usr/bin/env bash
# A quick look: trains a small model on the demo corpus, computes the values of its samples and writes the report.
# Arguments go to main.py: ./Scripts/demo.sh --max_steps 400. The run is results/demo (--run_name names another);
# a run of that name is replaced.
set -euo pipefail
root=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")
results=${RESULTS_DIR:-$root/results} name=demo
arguments=("$@")
while (($#)); do
    case $1 in
        --results_dir | --run_name) (($# > 1)) || { echo "demo.sh: error: $1 needs a value" >&2 && exit 2; } ;;&
        --results_dir) results=$2 ;;
        --results_dir=*) results=${1#*=} ;;
        --run_name) name=$2 ;;
        --run_name=*) name=${1#*=} ;;
    esac
    shift
done

"$root/Scripts/train.sh" --architecture GPT2-Tiny --block_size 128 --batch_size 8 --val_batch_size 8 \
    --max_steps 300 --eval_interval 50 --log_interval 5 --learning_rate 1e-3 --warmup_step 20 \
    --overwrite --run_name "$name" "${arguments[@]}"
python=$root/.venv/bin/python
cd -- "$root"
"$python" -m attribution.values "$results/$name"
"$python" -m attribution.report "$results/$name"
