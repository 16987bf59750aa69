#!/bin/bash
# What selection answers, keeps and costs (docs/sparsity.md), on one GPU, in pieces of less than ten minutes.
#   bench/selection.sh PIECE OUT [seconds]   from the repository's root; a piece that was cut goes on when it is repeated
# Pieces, and their seconds on an H200 without the start of a fresh machine:
#   ttft 200        a million tokens of the 7B shape, bf16, the default policy, two runs; no kernel is compiled in them
#   attention 150   a whole prefill's attention of the 7B shape beside dense, selection's share
#   nano-128k 130, nano-256k 170, nano-512k 270, nano-1m 520   spread, at the end, hard negatives, far facts; 3 seeds
#   pareto 330      nano, 128K: all policies, a plan calibrated there, the oracle
#   qwen-24k 400, qwen-32k 420, qwen-128k 480   96 questions each, spread and at the end; QWEN, QWEN_DCA: checkpoints
#   qwen-plan 150, qwen-pareto 420   a plan calibrated at 24K, then all policies at 24K
#   rehearse        each of them that differs in more than its length, at lengths that a CPU computes: no results
# COMMIT names the source where it is a copy without git. Then: python -m bench.report.
set -eu
piece=$1 out=$2 limit=${3:-540}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
mkdir -p "$out"
commit=${COMMIT:+--commit $COMMIT}
device="--device ${DEVICE:-cuda}"
every=spread,end,negatives,far
nano_policies=(--policy num_scouts=0 --policy vertical=128,slash=384 --policy vertical=512,slash=2048
    --policy mode=paper,vertical=64,slash=128 --policy mode=paper,vertical=256,slash=768
    --policy recall_target=0.6 --policy recall_target=0.7)
qwen_policies=(--policy vertical=1000,slash=4096,num_scouts=0 --policy vertical=128,slash=512
    --policy vertical=128,slash=384,scout_threshold=-4 --policy vertical=256,slash=768,most_scouts=1024
    --policy mode=paper,vertical=128,slash=384 --policy mode=paper,vertical=500,slash=1500
    --policy recall_target=0.8 --policy recall_target=0.9)

longspan() { "${PYTHON:-python}" -m longspan.cli "$@"; }

quality() {  # model, tokens, places, options
    local model=$1 tokens=$2 places=$3
    shift 3
    longspan bench quality --model "$model" --lengths "$tokens" --many "${MANY:-32}" --places "$places" \
        --seeds "${SEEDS:-0,1,2}" --attention dense,tile --no-heads --resume --budget-s "$limit" --out "$out" \
        $device $commit ${DTYPE:+--dtype $DTYPE} ${THREADS:+--threads $THREADS} ${CHUNK:+--chunk-len $CHUNK} "$@"
}

calibrated() {  # model, tokens, name: the plan's file, made where it is not there
    local plan=$out/$3.json
    [ -f "$plan" ] || longspan calibrate "$1" --out "$plan" --length "$2" $device ${DTYPE:+--dtype $DTYPE} \
        ${THREADS:+--threads $THREADS} ${CHUNK:+--prefill-chunk-len $CHUNK} >&2
    echo "$plan"
}

case $piece in
ttft) longspan bench ttft --shape "${SHAPE:-qwen2.5-7b}" --lengths "${TOKENS:-1000000}" --attention sparse --runs 2 \
        ${LAYERS:+--layers $LAYERS} ${CHUNK:+--chunk-len $CHUNK} $device $commit --budget-s "$limit" --out "$out" ;;
attention) longspan bench ops --shape "${SHAPE:-qwen2.5-7b}" --only chunk,whole --chunk-baselines "${BASE:-cudnn}" \
        --lengths "${LENGTHS:-131072,524288,1048576}" --chunk-len "${CHUNK:-131072}" --layers "${LAYERS:-6}" --max-s 0.6 \
        $device $commit --budget-s "$limit" --out "$out" ;;
nano-128k) quality nano "${TOKENS:-131072}" $every ;;
nano-256k) quality nano "${TOKENS:-262144}" $every ;;
nano-512k) quality nano "${TOKENS:-524288}" $every ;;
nano-1m) quality nano "${TOKENS:-1000000}" $every ;;
pareto)
    plan=$(calibrated nano "${TOKENS:-131072}" nano-calibrated)
    quality nano "${TOKENS:-131072}" spread,end "${nano_policies[@]}" --plan "$plan" --oracle 0.01,0.03,0.1 ;;
qwen-24k) quality "${QWEN:?a checkpoint}" "${TOKENS:-24576}" spread,end ;;
qwen-32k) quality "${QWEN:?a checkpoint}" "${TOKENS:-32640}" spread,end ;;
qwen-128k) quality "${QWEN_DCA:?a checkpoint with a DCA config}" "${TOKENS:-131072}" spread,end ;;
qwen-plan) calibrated "${QWEN:?a checkpoint}" "${TOKENS:-24576}" qwen-calibrated ;;
qwen-pareto)
    plan=$(calibrated "${QWEN:?a checkpoint}" "${TOKENS:-24576}" qwen-calibrated)
    quality "$QWEN" "${TOKENS:-24576}" spread,end "${qwen_policies[@]}" --plan "$plan" --oracle 0.02,0.05,0.1 ;;
rehearse)
    export DEVICE=cpu SEEDS=0 MANY=2 THREADS=1
    for each in ttft attention; do
        SHAPE=nano TOKENS=4096 LENGTHS=1024,2048 LAYERS=3 CHUNK=1024 BASE=fa2 "$0" $each "$out"
    done
    for each in nano-128k pareto qwen-24k qwen-128k qwen-plan qwen-pareto; do
        TOKENS=2048 CHUNK=1024 QWEN=nano QWEN_DCA=nano "$0" $each "$out/$each"
    done ;;
*) echo "$piece is none of the pieces named in $0" >&2; exit 2 ;;
esac
