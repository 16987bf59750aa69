#!/bin/bash
# What parts of the recipe bring, each with and without over three seeds, on one GPU (docs/training.md).
#   bench/effects.sh synthetic|sft|dpo RUN OUT   RUN: folder of `longspan train nano` after dpo
#   SEEDS="0 1 2"  PYTHON=python  EAGER=--eager  WORKERS=12  STEP: tokens of a step
# Seconds on an H200: synthetic 520 (80 of them for a start of 4,096 tokens), sft 330, dpo 300. A command that was cut
# goes on when it is repeated. Then: python -m bench.effects OUT/runs; make report.
# synthetic: from a model of 4,096 tokens on to 32,768 and 131,072, text alone or half of the rows tasks.
# sft: the second stage on short and long rows or on as many tokens of short ones, from the pre-trained model.
# dpo: pairs of 8,192 tokens at the most, before and after, at lengths that no pair has.
set -eu
what=$1 run=$2 out=$3
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
L="${PYTHON:-python} -m longspan.cli"
read -ra seeds <<<"${SEEDS:-0 1 2}"
mkdir -p "$out/train" "$out/runs"

ask() {  # effect/arm/seed, model, tasks, lengths, n, positions
    $L eval run "$2" --name "$1" --task "$3" --lengths "$4" -n "$5" --positions "$6" --seed "${1##*/}" --shares-device \
        --memory-gib "${GIB:-12}" --threads 1 --out "$out/runs/$1/${4//,/_}" >>"$out/runs.log" 2>&1 || echo "$1 $4: status $?"
}

start() {  # the checkpoint after the first phase; what follows it is ended
    [ -f "$out/train/start/pretrain/phases/4k/config.json" ] && return
    mkdir -p "$out/train/start"
    ln -sfn "$(realpath "$run/data")" "$out/train/start/data"
    $L train nano --out "$out/train/start" --until pretrain --tokens 4k="${START_M:-140}" --workers "${WORKERS:-12}" ${EAGER:-} \
        >"$out/train/start.log" 2>&1 &
    local process=$!
    until [ -f "$out/train/start/pretrain/phases/4k/config.json" ]; do
        kill -0 $process 2>/dev/null || { cat "$out/train/start.log" >&2; exit 1; }
        sleep 1
    done
    kill -TERM $process
    wait $process || true
}

case $what in
synthetic)
    start
    for seed in "${seeds[@]}"; do
        for arm in without with; do
            [ $arm = with ] && share=0.5 || share=0
            read -ra phases <<<"${PHASES:-32k:1e6:6e6:1e-3 128k:5e6:4e6:6e-4}"
            $L train extend "$out/train/start/pretrain/phases/4k" --corpus "$run/data" --to "${TO:-131072}" --synthetic $share \
                --answer-weight 5 --join-short ${STEP:+--tokens-per-step $STEP} --seed "$seed" --out "$out/train/synthetic-$arm-$seed" --workers "${WORKERS:-12}" \
                ${EAGER:-} "${phases[@]/#/--phase=}" >>"$out/train.log" 2>&1
            ask "synthetic/$arm/$seed" "$out/train/synthetic-$arm-$seed/model" \
                niah_single_2,niah_multikey_1,niah_multiquery "${LENGTHS:-32k,128k}" "${N:-12}" rope &
        done
    done ;;
sft)
    ${PYTHON:-python} - "$run" "$out/train" "${SHORT:-4096}" <<'P'
import json, pathlib, sys
run, out, short = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
read = lambda name: (run / name / "chat-train.jsonl").read_text().splitlines()
first, mixed = read("chat-short"), read("chat-mixed")
tokens = lambda line: json.loads(line)["num_tokens"]
budget, kept = sum(map(tokens, mixed)), []
for line in first[len(first) // 2:] + mixed:
    if tokens(line) <= short and budget > 0:
        kept.append(line)
        budget -= tokens(line)
for name, lines in (("first", first[:len(first) // 2]), ("with", mixed), ("without", kept)):
    (out / f"sft-{name}.jsonl").write_text("".join(line + "\n" for line in lines))
print(f"second stage: {sum(map(tokens, mixed)):,} and {sum(map(tokens, kept)):,} tokens")
P
    for seed in "${seeds[@]}"; do
        for arm in without with; do
            $L train sft "$run/pretrain/model" --data "$out/train/sft-first.jsonl" --long-data "$out/train/sft-$arm.jsonl" \
                --learning-rate 1e-4 --seed "$seed" --out "$out/train/sft-$arm-$seed" ${STEP:+--tokens-per-step $STEP} ${EAGER:-} >>"$out/train.log" 2>&1
            ask "sft/$arm/$seed" "$out/train/sft-$arm-$seed/model" absent,niah_multivalue,niah_multiquery \
                "${LENGTHS:-4k,32k,128k}" "${N:-12}" rope &
        done
    done ;;
dpo)
    for seed in "${seeds[@]}"; do
        $L train dpo "$run/sft/model" --data "$run/pairs/pairs-train.jsonl" --learning-rate 2e-6 --seed "$seed" \
            --out "$out/train/dpo-$seed" ${STEP:+--tokens-per-step $STEP} ${EAGER:-} >>"$out/train.log" 2>&1
        for arm in without with; do
            [ $arm = with ] && model="$out/train/dpo-$seed/model" || model="$run/sft/model"
            (ask "dpo/$arm/$seed" "$model" absent,niah_multivalue,niah_multiquery "${LENGTHS:-32k,256k}" "${N:-12}" dca+yarn
             [ -n "${MILLION-1000000}" ] && GIB=${GIB_MILLION:-24} ask "dpo/$arm/$seed" "$model" \
                absent,niah_multivalue,niah_multiquery "${MILLION:-1000000}" 2 dca+yarn) &
        done
    done ;;
*) echo "$what is not synthetic, sft or dpo" >&2; exit 2 ;;
esac
wait
