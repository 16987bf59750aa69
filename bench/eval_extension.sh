#!/bin/bash
# RULER-11 of a checkpoint before and after `longspan train extend`, plain RoPE, and of the first by DCA with YaRN's
# temperature, which needs no training; on one GPU. docs/training.md, docs/evaluation.md.
#   bench/eval_extension.sh BEFORE AFTER OUT    BEFORE: a checkpoint with a dual_chunk_attention_config of its own window,
#                                               or none: then --positions dca's own sizes
#   SECONDS_ALL=300  when everything ends       GIB=16  memory of each process, six at a time
#   NAME=qwen2.5-coder-0.5b   in the rows       FROM=none TO=128k   names of the phases       MOST=131072  of any length
#   TASKS=ruler-11   LENGTHS="4k 16k 32k 64k 128k"  N="50 40 30 20 12": prompts a task
# Run it again with the same folders to go on.
set -eu
before=$1 after=$2 out=$3
end=$((SECONDS + ${SECONDS_ALL:-300}))
read -ra lengths <<<"${LENGTHS:-4k 16k 32k 64k 128k}"
read -ra counts <<<"${N:-50 40 30 20 12}"
mkdir -p "$out"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

((${#lengths[@]} == ${#counts[@]})) || { echo "LENGTHS has ${#lengths[@]} entries, N ${#counts[@]}" >&2; exit 2; }

ask() {  # model, phase, positions, first and last of the lengths; 3: time is over
    local i status=0
    for ((i = $4; i <= $5; i++)); do
        local folder="$out/$2-$3-${lengths[i]}" left=$((end - SECONDS))
        ((left > 5)) || { echo "$folder: time is over" >&2; return 3; }
        "${PYTHON:-python}" -m longspan.cli eval run "$1" --name "${NAME:-qwen2.5-coder-0.5b}-after-$2" --task "${TASKS:-ruler-11}" \
            --lengths "${lengths[i]}" -n "${counts[i]}" --positions "$3" --max-model-len "${MOST:-131072}" \
            --memory-gib "${GIB:-16}" --threads 1 --shares-device --concurrency 4 --answer-nll --out "$folder" \
            --time-limit-s "$left" >>"$folder.log" 2>&1 || { status=$?; echo "$folder: status $status (3: time is over)" >&2; }
    done
    return "$status"
}

# the longest length takes as long as all others
last=$((${#lengths[@]} - 1)) jobs=()
for some in "0 $((last - 1))" "$last $last"; do
    for arm in "$before ${FROM:-none} rope" "$before ${FROM:-none} dca+yarn" "$after ${TO:-128k} rope"; do
        # shellcheck disable=SC2086
        ask $arm $some & jobs+=($!)
    done
done
status=0
for job in "${jobs[@]}"; do wait "$job" || status=$?; done
exit "$status"
