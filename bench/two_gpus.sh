#!/bin/bash
# What two GPUs of one host bring for long prompts, one GPU's figures beside them in the same call (docs/parallelism.md).
#   bench/two_gpus.sh PIECE OUT   PIECE: tests, sparse, sweep, dense, dense-million, dense-million-pp, dense-sweep, large,
#                                 users. Rows come to OUT/PIECE/pipeline.<device>.json.
#   PYTHON=python  SHAPE=qwen2.5-7b  LARGE=qwen2.5-14b  DEVICE: cpu for a rehearsal with processes; then also
#   SHAPE=nano LARGE=nano SHORT=2048,4096 LONG=8192 CHUNKS=512,1024 CHUNK=1024 DENSE=512 LAYERS=3 STEPS=3 GIB=1
# Seconds that two H200s should need, from rows of one (7B shape): tests 60, sparse 250, sweep 400, dense 500,
# dense-million 430, dense-million-pp 420, dense-sweep 380, large 300, users 420. No piece takes ten minutes.
# tests: ranks by NCCL. sparse: cp, pp (ladder), tp, and decode behind every length. sweep: pp's ladder against fixed
# chunks. dense: the same up to half a million tokens. dense-million: a million, half of the layers, for time (speed-ups
# of cp and tp do not depend on how many there are; the last layer's share of pp's does). dense-sweep: pp's plan
# against fixed chunks, half of the layers. large: a model whose million tokens fit two GPUs alone. users: two
# prompts of a million tokens together.
set -eu
piece=$1 out=$2/$1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} TOKENIZERS_PARALLELISM=false
device=${DEVICE:-cuda} shape=${SHAPE:-qwen2.5-7b}
short=${SHORT:-131072,262144,524288} long=${LONG:-1000000}
chunk=${CHUNK:-131072} chunks=${CHUNKS:-32768,65536,131072} dense=${DENSE:-32768} layers=${LAYERS:-14}

measure() {  # attention, ranks, lengths, chunks, then further options
    mkdir -p "$out"
    ${PYTHON:-python} -m longspan.cli bench pipeline --shapes "${model:-$shape}" --attention "$1" --ranks "$2" \
        --lengths "$3" --chunk-lens "$4" --device "$device" --out "$out" ${GIB:+--memory-gib $GIB} "${@:5}" 2>&1 |
        tee "$out/log"
    return "${PIPESTATUS[0]}"
}

case $piece in
tests) [ "$device" = cpu ] && which="not gpu tests/engine/device/test_tensor_ranks.py" || which="gpu tests/gpu/test_ranks_cuda.py"
    mkdir -p "$out"
    ${PYTHON:-python} -m pytest -q -m "${which% *}" "${which##* }" 2>&1 | tee "$out/log"
    exit "${PIPESTATUS[0]}" ;;
sparse) measure sparse 1,cp2,pp2,tp2 "$short,$long" "$chunk" --decode "${STEPS:-50}" ;;
sweep) measure sparse 1,pp2 "$short,$long" "$chunks" ;;
dense) measure dense 1,cp2,pp2,tp2 "$short" "$dense" ;;
dense-million) measure dense 1,cp2,tp2 "$long" "$dense" --layers "$layers" ;;
dense-million-pp) measure dense 1,pp2 "$long" "$dense" --layers "$layers" ;;
dense-sweep) measure dense 1,pp2 "$short" "${DENSE_CHUNKS:-8192,16384,$dense}" --layers "$layers" ;;
large) model=${LARGE:-qwen2.5-14b} measure sparse cp2,pp2,tp2 "$long" "$chunk" --decode "${STEPS:-50}" ;;
users) measure sparse 1,cp2,pp2,tp2 "$long" "$chunk" --users 2 ;;
*) echo "$piece is no piece; see the head of this file" >&2; exit 2 ;;
esac
