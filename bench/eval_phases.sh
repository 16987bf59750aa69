#!/bin/bash
# RULER-11 after each phase of pre-training, plain RoPE: the report's Table 2, on one GPU.
#   bench/eval_phases.sh RUN OUT    RUN: the folder `pretrain` of a run of `longspan train nano`
#   SECONDS_ALL=460  when everything ends       GIB=12  memory of each process, one a phase
#   PHASES           instead of all that are there
#   LENGTHS="4k 32k 64k 128k 256k"  N="50 24 12 8 4": prompts a task
# Run it again with the same folders to go on, and for the phases that have been trained since.
set -eu
run=$1 out=$2
end=$((SECONDS + ${SECONDS_ALL:-460}))
read -ra lengths <<<"${LENGTHS:-4k 32k 64k 128k 256k}"
read -ra counts <<<"${N:-50 24 12 8 4}"
mkdir -p "$out"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

ask() {  # phase, lengths, prompts a task
    ((end - SECONDS > 5)) || { echo "$out/$1: time is over"; return 0; }
    "${PYTHON:-python}" -m longspan.cli eval run "$run/phases/$1" --name "nano-after-$1" --task ruler-11 \
        --lengths "$2" -n "$3" --positions rope --max-model-len 262144 --memory-gib "${GIB:-12}" --threads 1 \
        --shares-device --concurrency 4 --answer-nll --out "$out/$1" \
        --time-limit-s "$((end - SECONDS))" >>"$out/$1.log" 2>&1 || echo "$out/$1: status $? (3: time is over)"
}

for phase in ${PHASES:-$(cd "$run/phases" && ls)}; do
    for i in "${!lengths[@]}"; do ask "$phase" "${lengths[i]}" "${counts[i]}"; done &
done
wait
