#!/bin/bash
# RULER-11 of a checkpoint with a DCA configuration, by position mode, dense and sparse, with nats of
# the right answers: does DCA read several windows without training, and what does sparse prefill cost?
# Several processes share one GPU, so that a small model fills it; a few prompts come first, alone, for
# times. Run it again with the same arguments to go on. Settings, with what a 0.5B model wants on an H200:
#   bench/eval_positions.sh MODEL NAME OUT
#   SECONDS_ALL=460  when everything ends       GIB=12     memory of each of the ten processes
#   UNIT=4096        the shortest length        WINDOW=8   units in the window that was trained on
#   N="50 24 8 4"    prompts a task: up to half the window, at the window, at two, at four windows
set -eu
model=$1 name=$2 out=$3
read -r few window two four <<<"${N:-50 24 8 4}"
unit=${UNIT:-4096} trained=${WINDOW:-8} gib=${GIB:-12} end=$((SECONDS + ${SECONDS_ALL:-460}))
last=$((4 * trained * unit))
mkdir -p "$out"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

ask() {  # positions, attention, units with commas, n, documents at a time, options
    local lengths="" count folder="$out/${2}-${1}-${3//,/-}"
    ((end - SECONDS > 5)) || { echo "$folder: time is over"; return 0; }
    for count in ${3//,/ }; do lengths+=",$((count * unit))"; done
    "${PYTHON:-python}" -m longspan.cli eval run "$model" --name "$name" --task "${TASKS:-ruler-11}" \
        --lengths "${lengths#,}" -n "$4" --positions "$1" --attention "$2" --concurrency "$5" \
        --max-model-len "$last" --memory-gib "$gib" --threads 1 --answer-nll --out "$folder" \
        --time-limit-s "$((end - SECONDS))" ${6:-} >>"$folder.log" 2>&1 ||
        echo "$folder: status $? (3: time is over)"
}

short="1"; for ((i = 2; 2 * i <= trained; i *= 2)); do short+=",$i"; done
w1=$trained w2=$((2 * trained)) w4=$((4 * trained))
# alone: times, and kernels compiled once for all
for attention in dense sparse; do
    for units in "$short" "$w1" "$w2" "$w4"; do
        TASKS=niah_single_2,niah_multivalue,vt ask dca+yarn $attention "$units" 1 1
    done
done
# the longest first: they get the least of a shared device
for positions in rope dca dca+yarn; do
    ask $positions dense $w4 "$four" 2 --shares-device &
    ask $positions dense $w2 "$two" 4 --shares-device &
done
ask dca+yarn sparse $w4 "$four" 2 --shares-device &
ask dca+yarn sparse $w2 "$two" 4 --shares-device &
(ask dca+yarn dense "$short" "$few" 8 --shares-device; ask dca+yarn dense $w1 "$window" 8 --shares-device) &
(ask rope dense $w1 "$window" 8 --shares-device; ask dca+yarn sparse $w1 "$window" 8 --shares-device
 ask dca+yarn sparse "$short" "$few" 8 --shares-device) &
wait
