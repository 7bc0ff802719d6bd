#!/usr/bin/env bash
# Trains: ./Scripts/train.sh --batch_size 2 --max_steps 20. Its flags are those of main.py; --help lists them.
# With --nproc_per_node K, or any of torchrun's flags for several machines, torchrun starts the processes:
#   ./Scripts/train.sh --nproc_per_node 4 --batch_size 8
# Prepares the environment first where it is not there (init.sh). May be called from any folder.
set -euo pipefail
root=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")

launcher=() flags=() machines=
while (($#)); do
    case $1 in
        --nproc[-_]per[-_]node | --nnodes | --node[-_]rank | --master[-_]addr | --master[-_]port | \
            --rdzv[-_]backend | --rdzv[-_]endpoint | --rdzv[-_]id | --rdzv[-_]conf | --max[-_]restarts | \
            --signals[-_]to[-_]handle | --shutdown[-_]timeout | --shutdown[-_]timeout=* | --nproc[-_]per[-_]node=* | --nnodes=* | --node[-_]rank=* | \
            --master[-_]addr=* | --master[-_]port=* | --rdzv[-_]*=* | --max[-_]restarts=* | \
            --signals[-_]to[-_]handle=*)
            [[ $1 == --nproc* || $1 == --max* || $1 == --s* ]] || machines=several
            launcher+=("$1")
            if [[ $1 != *=* ]]; then
                (($# > 1)) || { echo "train.sh: error: $1 needs a value" >&2 && exit 2; }
                shift
                launcher+=("$1")
            fi
            ;;
        *) flags+=("$1") ;;
    esac
    shift
done

"$root/init.sh"
python=$root/.venv/bin/python
if ((${#launcher[@]} == 0)); then
    exec "$python" "$root/main.py" "${flags[@]}"
fi
[[ -n $machines ]] || launcher+=(--standalone) # a free port of this machine: runs may start beside each other
if [[ " ${launcher[*]}" != *" --signals"* ]]; then
    signals=
    for signal in SIGTERM SIGINT SIGHUP SIGQUIT SIGUSR1 SIGUSR2; do # torchrun's own, and the warnings of batch systems
        # what is ignored stays so, as SIGHUP under nohup: torchrun would handle it, and end the run
        [[ $(trap -p "$signal") == "trap -- '' "* ]] || signals+=,$signal
    done
    launcher+=(--signals_to_handle "${signals#,}")
fi
exec "$python" -m torch.distributed.run "${launcher[@]}" "$root/main.py" "${flags[@]}"
