#!/usr/bin/env bash
# Training on one GPU, in about ten minutes: kernels against eager attention, loss curves of bf16, and speed,
# MFU and peak memory at rows of 8k, 32k and 64k tokens beside TRL.
#
#     benchmarks/train_gpu.sh [OUT]        results go to OUT (default: train-gpu) and to the terminal
#
# Variables: PYTHON (default: python3), an interpreter with the extra `train` and, for the comparison, trl;
# MODEL (0.5B or 1.5B); DRY=1 runs everything with tiny models on the CPU, to try the script.
set -euo pipefail

out=$(realpath -m "${1:-train-gpu}")
python=${PYTHON:-python3}
model=${MODEL:-0.5B}
dry=()
if [[ ${DRY:-0} == 1 ]]; then
    dry=(--dry)
fi
cd "$(dirname "$0")/.."
mkdir -p "$out"
failed=0

part() { # NAME COMMAND...: run a part, keep what it prints, and go on if it fails
    local name=$1 code=0
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$out/$name.txt" || code=$?
    case $code in
    0) return ;;
    124) echo "$name did not end in $2 s, the share of its ten minutes" >&2 ;;
    *) echo "$name failed with exit code $code" >&2 ;;
    esac
    failed=1
}

if [[ ${DRY:-0} != 1 ]]; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$out/gpu.txt"
fi
part kernels timeout 150 "$python" -m benchmarks.train_kernels "${dry[@]}"
part curves timeout 150 "$python" -m benchmarks.train --gpu "${dry[@]}" --rounds 1 \
    --only "$model curve" --json "$out/curves.json"
for length in 8k 32k 64k; do
    part "speed-$length" timeout 180 "$python" -m benchmarks.train --gpu "${dry[@]}" --rounds 1 \
        --only "$model $length" --json "$out/speed-$length.json"
done
exit "$failed"
