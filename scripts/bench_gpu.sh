#!/bin/sh
# Both 7B shapes with random weights: floors, the decoder alone, whole frames by every method, ratio and option.
# On a GPU of 80 GB or more, in bfloat16, in less than 9 minutes:  sh scripts/bench_gpu.sh
# The same, small, to see that it runs:  sh scripts/bench_gpu.sh --device cpu --random-weights tiny
set -eu
device=cuda models="" out=outputs/bench-gpu minutes=3
LAC=${LAC:-.venv/bin/lac}
usage="usage: $0 [--device cuda|cpu] [--random-weights MODEL]... [--out FOLDER] [--minutes PER_MODEL]"
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || { echo "$usage" >&2; exit 2; }
    case $1 in
        --device) device=$2 ;;
        --random-weights) models="$models $2" ;;
        --out) out=$2 ;;
        --minutes) minutes=$2 ;;
        *) echo "$usage" >&2; exit 2 ;;
    esac
    shift 2
done

gpu=h200
if [ "$device" = cpu ]; then
    size="--dtype float32 --shape llama-8x512 --rounds 2 --frames 3 --warmup 1"
else
    size="--dtype bfloat16 --shape llama-32x4096 --rounds 30 --frames 100 --warmup 6"
    case $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || true) in
        *H100*) gpu=h100 ;;
        *A100*) gpu=a100 ;;
        *4090*) gpu=rtx4090 ;;
    esac
fi

for model in ${models:-openvla-7b cogact-7b}; do
    static=default+async_policy+bucket=16+cuda_graphs
    options="none default $static"
    case $model in *7b) options="$options $static+vision_kv_reuse" ;; esac # the small models see by convolutions
    case $model in
        cogact*) more="--sections roofline frame" ;; # the same decoder, and no drafts
        *) more="--sections roofline engine frame --acceptance 0.5 1" ;;
    esac
    mkdir -p "$out/$model"
    # shellcheck disable=SC2086
    COLUMNS=220 $LAC bench --random-weights "$model" --device "$device" --roofline "$gpu" $size $more \
        --policies vla-cache:variant=released random:ratio=.25,.5,.7,.8,.9 --options $options \
        --minutes "$minutes" --out "$out/$model" >"$out/$model/bench.txt"
    cat "$out/$model/bench.txt"
done
