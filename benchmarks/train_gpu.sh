#!/usr/bin/env bash
# Training on one GPU, in about ten minutes: kernels against eager attention, loss curves of bf16, 8-bit moments
# and compiled layers, and speed, MFU and peak memory at rows of 8k, 32k and 64k tokens beside TRL. Models are made
# here, with random weights: nothing is downloaded.
#
#     benchmarks/train_gpu.sh [OUT]        results go to OUT (default: train-gpu) and to the terminal
#
# Variables: PYTHON (default: python3), an interpreter with the extras `train` and `8bit` and, for the comparison,
# trl (and flash-attn, without which TRL at 64k may take longer than its share); MODEL (0.5B or 1.5B); DRY=1 runs
# everything with tiny models on the CPU, to try the script.
set -euo pipefail

out=$(realpath -m "${1:-train-gpu}")
python=$(command -v "${PYTHON:-python3}") || { echo "there is no program PYTHON=$PYTHON" >&2; exit 2; }
python=$(realpath -s "$python")
model=${MODEL:-0.5B}
dry=()
if [[ ${DRY:-0} == 1 ]]; then
    dry=(--dry)
fi
case $model in
0.5B | 1.5B) ;;
*) echo "MODEL is $model: set it to 0.5B or 1.5B" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
"$python" -c 'import accelerate, torch, transformers' || {
    echo "PYTHON is $python: set it to an interpreter with pip install '.[train,8bit]' trl" >&2
    exit 2
}
mkdir -p "$out"
if [[ ${DRY:-0} != 1 ]]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "torch finds no GPU; DRY=1 tries the script with tiny models on the CPU" >&2
        exit 2
    }
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$out/gpu.txt"
fi
failed=0

part() { # NAME COMMAND...: run a part, keep what it prints, and go on if it fails
    local name=$1 code=0
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$out/$name.txt" || code=$?
    case $code in
    0) return ;;
    124) echo "$name did not end in $2 s, its share of the ten minutes; what it measured stands above" >&2 ;;
    *) echo "$name failed with exit code $code" >&2 ;;
    esac
    failed=1
}

part kernels timeout 120 "$python" -m benchmarks.train_kernels "${dry[@]}"
part curves timeout 180 "$python" -m benchmarks.train --gpu "${dry[@]}" --rounds 1 \
    --only "$model curve" --json "$out/curves.json"
part options timeout 180 "$python" -m benchmarks.train --gpu "${dry[@]}" --rounds 1 \
    --only "$model options" --json "$out/options.json"
for length in 8k 32k 64k; do
    part "speed-$length" timeout 180 "$python" -m benchmarks.train --gpu "${dry[@]}" --rounds 1 \
        --only "$model $length" --json "$out/speed-$length.json"
done
exit "$failed"
