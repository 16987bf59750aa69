#!/bin/bash
# The report's Figures 3 and 6 at nano's scale, and RULER-11 at a million tokens, on one GPU.
#   bench/eval_figures.sh needles|positions|ruler|times OUT
#   SECONDS_ALL=460  when everything ends       GIB=24  memory of each process, four at a time
#   LENGTHS, N       instead of those named below
# needles: length x depth, dense, the report's sparse policy with our budgets and with calibrated ones,
# ours. positions: plain RoPE, DCA, DCA with YaRN's temperature beyond the training length. ruler:
# RULER-11 at 1,000,000 tokens, dense. times: one process alone, for density and time to the first
# token beside the scores of RULER-11.
set -eu
what=$1 out=$2
end=$((SECONDS + ${SECONDS_ALL:-460}))
mkdir -p "$out"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

ask() {  # folder, tasks, lengths, n, then options
    local folder="$out/$1" tasks=$2 lengths=${LENGTHS:-$3} n=${N:-$4}
    shift 4
    ((end - SECONDS > 5)) || { echo "$folder: time is over"; return 0; }
    "${PYTHON:-python}" -m longspan.cli eval run "${MODEL:-nano}" --task "$tasks" --lengths "$lengths" -n "$n" \
        --memory-gib "${GIB:-24}" --threads 1 --out "$folder" --answer-nll \
        --time-limit-s "$((end - SECONDS))" "$@" >>"$folder.log" 2>&1 ||
        echo "$folder: status $? (3: time is over)"
}

case $what in
needles)
    refined=$out/refined.json
    [ -f "$refined" ] || "${PYTHON:-python}" -m longspan.cli calibrate "${MODEL:-nano}" --out "$refined" \
        --length "${CALIBRATION:-128k}" --memory-gib "${GIB:-24}" --threads 1 >"$out/refined.log" 2>&1
    for arm in dense sparse paper "paper --sparsity-plan $refined"; do
        (ask needles needle 4k,16k,64k,128k 44 --attention $arm --shares-device
         ask needles needle 256k 33 --attention $arm --shares-device
         ask needles needle 512k 22 --attention $arm --shares-device
         ask needles needle 1000000 22 --attention $arm --shares-device) &
    done ;;
positions)
    for positions in rope dca dca+yarn; do
        (ask positions niah_multiquery,niah_multivalue,passkey 256k 20 --positions $positions --shares-device
         ask positions niah_multiquery,niah_multivalue,passkey 512k 10 --positions $positions --shares-device
         ask positions niah_multiquery,niah_multivalue,passkey 1000000 4 --positions $positions \
            --shares-device) &
    done ;;
ruler) ask ruler ruler-11 1000000 3 --attention dense ;;
times) ask ruler niah_single_2,niah_multivalue,vt 4k,8k,16k,32k,64k,128k,256k,512k,1000000 1 \
            --attention sparse,dense ;;
*) echo "$what is not needles, positions, ruler or times" >&2; exit 2 ;;
esac
wait
