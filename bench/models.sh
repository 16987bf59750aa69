#!/bin/bash
# What models and cards take, on one GPU: weights and KV in eight and four bits, mixtures of experts, few rows
# behind a long cache. Rows of bench/results; pieces can be given in any order, each ends on its own.
#   bench/models.sh PIECE... [-- options of every command, --commit NAME say]
# Seconds on an H200, about: 7b 110, fp8 90, 14b 110, 30b 150, 30b-dense 60, experts 40, linear 30, decode 110
# (1 to 16 rows of one sequence too), decode-int8 60, int4 70. With QWEN=DIR (Qwen2.5-Coder-0.5B): quality 240; quality-nano 200.
#   LENGTH=1000000  SHAPE=qwen2.5-7b  MIXTURE=qwen3-30b-a3b  LARGE=qwen2.5-14b  CONTEXTS=131072,1000000
set -u
pieces=()
while (($#)); do
    [ "$1" = -- ] && { shift; break; }
    pieces+=("$1")
    shift
done
options=("$@")
shape=${SHAPE:-qwen2.5-7b} large=${LARGE:-qwen2.5-14b} mixture=${MIXTURE:-qwen3-30b-a3b}
length=${LENGTH:-1000000} contexts=${CONTEXTS:-131072,1000000}
status=0

bench() {
    local begin=$SECONDS
    "${PYTHON:-python}" -m longspan.cli bench "$@" "${options[@]}" || status=1
    echo "$((SECONDS - begin)) s: bench $*"
}

ttft() { bench ttft --lengths "$length" "$@"; }

((${#pieces[@]})) || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
for piece in "${pieces[@]}"; do
    case $piece in
    7b) ttft --shape "$shape" --attention sparse ;;
    fp8)
        ttft --shape "$shape" --attention sparse --quantization fp8
        ttft --shape "$shape" --attention sparse --quantization fp8 --kv-dtype int8 ;;
    14b) ttft --shape "$large" --attention sparse --quantization fp8 --kv-dtype int8 ;;
    30b) ttft --shape "$mixture" --attention sparse --quantization fp8 ;;
    30b-dense) ttft --shape "$mixture" --attention dense --quantization fp8 --layers "${LAYERS:-4}" ;;
    experts) bench ops --shape "$mixture" --only experts ;;
    linear) bench ops --shape "$shape" --only linear ;;
    decode)
        bench decode --shape "$shape" --contexts "$contexts" --batch 1
        bench decode --shape "$shape" --contexts "${CONTEXT:-131072}" --batch 8 --rows 1 ;;
    decode-int8)
        bench decode --shape "$shape" --contexts "$contexts" --batch 1 --rows 1 --kv-dtype int8
        bench decode --shape "$shape" --contexts "${CONTEXT:-131072}" --batch 1 --rows 1 --quantization fp8
        bench decode --shape "$shape" --contexts "${CONTEXT:-131072}" --batch 1 --rows 1 --quantization int4 ;;
    int4)
        bench ttft --shape "$shape" --lengths "${SMALL:-240000}" --attention sparse --quantization int4 --memory-gib "${GIB:-22}"
        bench ttft --shape "$shape" --lengths "${SMALL:-240000}" --attention sparse --chunk-len "${CHUNK:-16384}" ;;
    quality)
        bench quality --model "${QWEN:?a directory of Qwen2.5-Coder-0.5B}" --lengths "${LENGTHS:-23552,131072}" \
            --attention dense --quantization fp8,int4 --kv-dtype int8 --no-heads --places end ;;
    quality-nano)
        bench quality --lengths "${LENGTHS:-131072,1000000}" --attention dense --quantization fp8,int4 \
            --kv-dtype int8 --no-heads --places end ;;
    *) echo "no piece named $piece; see the head of $0" >&2; exit 2 ;;
    esac
done
exit $status
