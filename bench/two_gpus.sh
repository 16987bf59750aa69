#!/bin/bash
# What two GPUs of one host bring for long prompts, one GPU's figures beside them in the same call (docs/parallelism.md).
#   bench/two_gpus.sh PIECE OUT   PIECE: tests, sparse, ladder, dense, sweep, dense-sweep, large, users. Rows come to
#                                 OUT/PIECE/pipeline.<device>.json, what is printed to OUT/PIECE/log.
#   PYTHON=python  SHAPE=qwen2.5-7b  LARGE=qwen2.5-14b  DEVICE: cpu for a rehearsal with processes; then also
#   SHAPE=nano LARGE=nano LENGTHS=2048,4096,8192 CHUNKS=512,2048 CHUNK=1024 DENSE=512 LAYERS=3 STEPS=3 GIB=1
# Seconds on two H200s (7B shape), measured in part: tests 400, sparse 220, ladder 260, dense 500, sweep 200,
# dense-sweep 330, large 110, users 170. No piece takes ten minutes.
# tests: ranks by NCCL. sparse: cp and tp, with the engine's own chunk, and decode behind every length. ladder: a pipeline,
# beside one GPU and fixed chunks of 32,768 and of the engine's own length, which bounds the ladder's. dense: cp, tp and pp by
# plan; 9 layers, since the last one is nearly free: so a pipeline's halves are equal, as they nearly are with 28. sweep,
# dense-sweep: a pipeline with fixed chunks. large: a model whose million tokens fit two GPUs alone (by cp only in chunks of
# 32,768). users: two prompts of a million tokens together.
set -eu
piece=$1 out=$2/$1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} TOKENIZERS_PARALLELISM=false
device=${DEVICE:-cuda} shape=${SHAPE:-qwen2.5-7b} steps=${STEPS:-50}
lengths=${LENGTHS:-131072,262144,524288,1000000} long=${LENGTHS:-1000000} long=${long##*,}
chunk=${CHUNK:-126976} chunks=${CHUNKS:-16384,65536} dense=${DENSE:-32768} layers=${LAYERS:-9}

measure() {  # attention, ranks, lengths, chunks, then further options
    mkdir -p "$out"
    ${PYTHON:-python} -m longspan.cli bench pipeline --shapes "${model:-$shape}" --attention "$1" --ranks "$2" \
        --lengths "$3" --chunk-lens "$4" --device "$device" --out "$out" ${COMMIT:+--commit $COMMIT} \
        ${GIB:+--memory-gib $GIB} "${@:5}" 2>&1 | tee "$out/log"
    return "${PIPESTATUS[0]}"
}

case $piece in
tests) which=(-m gpu tests/gpu/test_two_gpus.py tests/gpu/test_ranks_cuda.py)
    [ "$device" = cpu ] && which=(-m "not gpu" tests/engine/device/test_tensor_ranks.py)
    mkdir -p "$out"
    ${PYTHON:-python} -m pytest -q "${which[@]}" 2>&1 | tee "$out/log"
    exit "${PIPESTATUS[0]}" ;;
sparse) measure sparse 1,cp2,tp2 "$lengths" "$chunk" --decode "$steps" ;;
ladder) measure sparse 1,pp2 "$lengths" "$dense,$chunk" --decode "$steps" ;;
dense) measure dense 1,cp2,tp2,pp2 "$lengths" "$dense" --layers "$layers" ;;
sweep) measure sparse pp2 "$lengths" "$chunks" ;;
dense-sweep) measure dense pp2 "$lengths" "${DENSE_CHUNKS:-4096,16384}" --layers "$layers" ;;
large) model=${LARGE:-qwen2.5-14b} measure sparse tp2,pp2 "$long" "$chunk" --decode "$steps" ;;
users) measure sparse cp2,pp2 "$long" "$chunk" --users 2 ;;
*) echo "$piece is no piece; see the head of this file" >&2; exit 2 ;;
esac
