#!/usr/bin/env bash
# Everything that is worth measuring on one GPU of 80 GB, in one call of at most 9 minutes, what matters most first:
# the GPU's tests; whole frames of every model's shape by every method, ratio and option, with floors and traces;
# robots in batches. Random weights, bfloat16, nothing is downloaded; a step that fails does not stop the others.
#   bash scripts/gpu_session.sh                                     results in outputs/gpu, or in $OUT
#   bash scripts/gpu_session.sh --device cpu --random-weights tiny  the same, small, to see that it runs
# Needs python3 with torch and transformers; what else is missing is taken from .wheels (scripts/carry_wheels.sh).
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda models="" out=${OUT:-outputs/gpu} minutes=9 python=${PYTHON:-python3}
usage="usage: $0 [--device cuda|cpu] [--random-weights MODEL]... [--out FOLDER] [--minutes IN_ALL]"
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
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
end=$((SECONDS + 60 * minutes))

site=$work/site PYTHONPATH=$PWD/src
for wheel in .wheels/*.whl; do
    if [ -e "$wheel" ]; then "$python" -m zipfile -e "$wheel" "$site"; fi
done
export PYTHONPATH=$PYTHONPATH:$site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 COLUMNS=200 TOKENIZERS_PARALLELISM=false
lac() { "$python" -c 'from lac_vla.cli import main; main()' "$@"; }
export -f lac
export python

# step NAME SECONDS COMMAND...: its output is results/NAME/log.txt; whatever it leaves is packed at once, traces apart
step() {
    local name=$1 limit=$2 folder=$work/results/$1 began=$SECONDS left=$((end - SECONDS)) state
    shift 2
    [ "$device" != cpu ] || limit=$left # there it is not the time that matters
    mkdir -p "$folder"
    if [ "$left" -lt 15 ]; then
        state="left out: the time is up"
    else
        timeout -s INT -k 8 "$((limit < left ? limit : left))" bash -c '"$@"' step "$@" >"$folder/log.txt" 2>&1
        case $? in
            0) state=done ;;
            124 | 137) state="stopped at its limit" ;;
            *) state=failed ;;
        esac
    fi
    printf '%-24s %4d s  %s\n' "$name" "$((SECONDS - began))" "$state" | tee -a "$work/results/steps.txt"
    [ "$state" = done ] || tail -n 4 "$folder/log.txt" 2>/dev/null
    if compgen -G "$folder/trace-*.json.gz" >"$work/traces"; then
        (cd "$folder" && tar -cf "$out/traces-$name.tar" trace-*.json.gz)
    fi
    tar -C "$work" --exclude 'trace-*.json.gz' -czf "$work/packed" results && mv "$work/packed" "$out/results.tar.gz"
    cp "$work/results/steps.txt" "$out"
}

bench() { # bench NAME SECONDS MODEL OPTION...
    local name=$1 limit=$2 model=$3
    shift 3
    # shellcheck disable=SC2086
    step "$name" "$limit" lac bench --random-weights "$model" --device "$device" $size --roofline "$gpu" \
        --flow none --out "$work/results/$name" "$@"
}

gpu=h100 size="--dtype bfloat16 --warmup 4 --frames 150"
versions=$("$python" -c 'import sys, torch, transformers
card = torch.cuda.get_device_name() if sys.argv[1] != "cpu" and torch.cuda.is_available() else "no GPU"
print(f"{card}, Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}")' \
    "$device") || exit
case $versions in
    *H200*) gpu=h200 ;;
    *A100*) gpu=a100 ;;
    *4090*) gpu=rtx4090 ;;
esac
graphs=default+bucket=16+cuda_graphs
if [ "$device" = cpu ]; then
    size="--dtype float32 --warmup 4 --frames 8 --threads 1" rounds="--rounds 4 --batch 1 4" tests=""
else
    rounds="--rounds 150 --batch 1 4 8 16" tests="-m gpu"
fi
# told to stop, it lists what has failed so far
test_run='import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))'

frame() { # frame SECONDS MINUTES MODEL OPTION...
    local limit=$1 share=$2 model=$3 towers="default+vision_kv_reuse $graphs+vision_kv_reuse"
    shift 3
    case $model in tiny | mini | *cogact-tiny | oft-tiny) towers="" ;; esac # these see by convolutions
    # shellcheck disable=SC2086
    bench "frame-$model" "$limit" "$model" --sections frame trace --policies random:ratio=.5,.8 \
        --options default $graphs $towers --minutes "$share" "$@"
}

batch() { # batch SECONDS MINUTES MODEL
    # shellcheck disable=SC2086
    bench "batch-$3" "$1" "$3" --sections batch --policies random:ratio=.8 --options default $graphs $rounds \
        --minutes "$2"
}

mkdir -p "$work/results"
echo "$versions, floors of one $gpu" | tee "$work/results/steps.txt"
# shellcheck disable=SC2086
step tests 120 "$python" -c "$test_run" -q -p no:cacheprovider --tb=short --durations=5 ${GPU_TESTS:-$tests tests/gpu}
if [ -n "$models" ]; then
    for model in $models; do frame 120 1 "$model"; done
    for model in $models; do batch 60 0.3 "$model"; done
else
    frame 100 0.7 openvla-7b --acceptance 0.5 1
    frame 75 0.5 openvla-7b-oft
    frame 75 0.5 pi05-3
    batch 55 0.4 openvla-7b
    batch 50 0.4 pi05-3
    frame 50 0.3 smolvla-base
    frame 60 0.35 cogact-7b
fi
step kernels 60 "$python" scripts/gpu_kernels.py --device "$device"
"$python" scripts/gpu_summary.py "$work/results" --out "$out/summary.md" && cat "$out/summary.md"
