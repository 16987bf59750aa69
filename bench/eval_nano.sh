#!/bin/bash
# What nano is trained for, each goal at each length, of one checkpoint on one GPU; before and after
# make the table of docs/training.md (`longspan eval export OUT/*/* --out bench/results`, `make report`).
#   bench/eval_nano.sh MODEL STAGE OUT   MODEL: nano or a checkpoint; STAGE: shipped, base, sft, dpo, ...
#   SECONDS_ALL=240  when everything ends, of which MILLION=100 are kept for a million tokens
#   GIB=10           memory of each process, six at a time; two of 40 at a million
#   LENGTHS="4k 32k 64k 128k 256k"  N="50 24 12 10 5": questions a task; WORDS=240 of absent keys and wordings
# Run it again with the same folders to go on.
set -eu
model=$1 stage=$2 out=$3
begin=$SECONDS all=${SECONDS_ALL:-240} million=${MILLION:-100}
read -ra lengths <<<"${LENGTHS:-4k 32k 64k 128k 256k}"
read -ra counts <<<"${N:-50 24 12 10 5}"
mkdir -p "$out"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

ask() {  # folder, seconds from the beginning, GiB, tasks, length, n, then options
    local folder="$out/$1" left=$(($2 - SECONDS + begin)) gib=$3 tasks=$4 length=$5 n=$6
    shift 6
    ((left > 5)) || { echo "$folder: time is over"; return 0; }
    "${PYTHON:-python}" -m longspan.cli eval run "$model" --name "nano-at-$stage" --task "$tasks" --lengths "$length" \
        -n "$n" --memory-gib "$gib" --threads 1 --shares-device --out "$folder" --time-limit-s "$left" "$@" \
        >>"$folder.log" 2>&1 || echo "$folder: status $? (3: time is over)"
}

until=$((all - million))
for i in "${!lengths[@]}"; do
    ask "ruler-${lengths[i]}" "$until" "${GIB:-10}" "${TASKS:-ruler-11}" "${lengths[i]}" "${counts[i]}" \
        --positions rope --concurrency 4 &
done
ask words "$until" "${GIB:-10}" unseen_wordings,fresh_wordings,absent "${WORDS_LENGTH:-4k}" "${WORDS:-240}" --positions rope --concurrency 4 &
wait
if ((million > 0)); then
    for attention in dense sparse; do
        ask "passkey-$attention" "$all" "${GIB_MILLION:-40}" passkey "${MILLION_LENGTH:-1000000}" "${PASSKEYS:-5}" \
            --positions dca+yarn --attention "$attention" &
    done
    wait
fi
