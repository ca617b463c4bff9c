#!/usr/bin/env bash
# Everything a machine with a CUDA GPU can show, without network:
#
#     OUT=folder bash benchmarks/gpu.sh [part]...
#
# Parts: build tests memcheck racecheck head_softmax distillation warm_up joint balance update
# augment norm step profile precision table; the names of ops, and step, are benchmarks. Runs those
# named, or all; each ends within nine minutes, and one that fails does not keep the others from
# running. Logs, pytest-benchmark's JSON, a trace and a readable table go to $OUT (default:
# runs/gpu).
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-runs/gpu}
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # the tests turn deterministic algorithms on
mkdir -p "$OUT"
all=(build tests memcheck racecheck step head_softmax distillation warm_up joint balance update
  augment norm profile precision table)
limit=(timeout --kill-after=10 530)
# Ops alone, of everything a case or two, without graphs and large inputs. Without torch's caching
# every tensor is an allocation of its own, with bounds that can be overstepped.
watched=(tests/test_triton.py tests/test_triton_augment.py tests/test_triton_batch_norm.py
  tests/test_gpu_layers.py
  -k "inside or outside or no_class or rows or any_size or any_length or agree or views or everything \
  or (parity and float32)")
sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${limit[@]}" compute-sanitizer --target-processes all
  --error-exitcode 9 --print-limit 20)

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  python3 -c "import sys, torch, triton; print('Python', sys.version.split()[0], 'torch',
    torch.__version__, 'CUDA', torch.version.cuda, 'Triton', triton.__version__)"
  git rev-parse HEAD
}
measure() { # file, op
  "${limit[@]}" python3 -m pytest -q "$1" -k "[$2-" --benchmark-enable --benchmark-disable-gc \
    --benchmark-json "$OUT/$2.json"
}
run() {
  case $1 in
    build) "${limit[@]}" python3 -m pip install --no-build-isolation --no-deps -e . ;;
    tests) "${limit[@]}" python3 -m pytest -q tests/test_gpu.py tests/test_gpu_layers.py \
      tests/test_gpu_step.py tests/test_triton.py tests/test_triton_augment.py \
      tests/test_triton_batch_norm.py ;;
    memcheck | racecheck) "${sanitizer[@]}" --tool "$1" python3 -m pytest -q "${watched[@]}" ;;
    table) python3 -m benchmarks.table "$OUT"/*.json | tee "$OUT/table.md" ;;
    step) measure benchmarks/test_step.py "$1" ;;
    profile) "${limit[@]}" python3 -m benchmarks.profile_step --trace "$OUT/step-trace.json" ;;
    precision) "${limit[@]}" python3 -m benchmarks.precision --device cuda ;;
    norm) measure benchmarks/test_batch_norm.py "$1" ;;
    augment) measure benchmarks/test_augment.py "$1" ;;
    balance | update) measure benchmarks/test_layers.py "$1" ;;
    *) measure benchmarks/test_distillation.py "$1" ;;
  esac
}

parts=("$@")
[ $# -gt 0 ] || parts=("${all[@]}")
for part in "${parts[@]}"; do
  if [[ " ${all[*]} " != *" $part "* ]]; then
    echo "gpu.sh: no part is named '$part'; there are ${all[*]}" >&2
    exit 2
  fi
done
machine 2>&1 | tee "$OUT/machine.txt"
failed=()
for part in "${parts[@]}"; do
  echo "== $part"
  start=$SECONDS
  run "$part" >"$OUT/$part.log" 2>&1
  status=$?
  tail -n 12 "$OUT/$part.log"
  echo "== $part: exit $status after $((SECONDS - start)) s" | tee -a "$OUT/machine.txt"
  [ $status = 0 ] || failed+=("$part")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
