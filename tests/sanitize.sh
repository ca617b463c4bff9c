#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: builds the extension with
# both from a copy of the project in a temporary folder, plants bugs in that copy and shows that
# each is reported, then runs the tests of the ops. The checkout is left as it is. Needs GCC with
# libasan, and what the tests need.
#
#   tests/sanitize.sh [pytest arguments]        the tests of the ops, with the widest registers
#   tests/sanitize.sh --registers [arguments]   with SSE2, AVX2 and AVX-512, one after the other, as
#                                               far as the processor has them
#   tests/sanitize.sh --self-test               only the planted bugs
#
# Environment: PYTHON (default: python3).
#
# What is not looked at, and why:
#   leaks: Python and torch keep much until the process ends, by design;
#   torch and NumPy themselves: they are built without sanitizers;
#   memory beside a tensor in the same storage: it is allocated. A tensor that is a storage of its
#     own ends to the byte where it should, as torch asks posix_memalign for no more than it needs;
#   what was read before it was written: the fixture `poison` looks for that;
#   torch.compile, opcheck and whole steps of the optimizer: minutes in compilers and in Python,
#     through the same kernels.
set -euo pipefail

mode=once
case "${1:-}" in
--registers | --self-test) mode=${1#--} && shift ;;
esac
python=$(command -v "${PYTHON:-python3}")
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

mkdir "$copy/bld_ext" "$copy/bin"
cp -r "$root"/{csrc,python_api,tests,setup.py,pyproject.toml,README.md,LICENSE} "$copy"
(cd "$root/bld_ext" && cp -r ./*.py triton "$copy/bld_ext")
ln -s ../python_api "$copy/bld_ext/api"
cd "$copy"

# A compiler that has the last word on flags, for setup.py and for tests that compile. Python asks
# for -fwrapv, with which a signed overflow is none. The compiler itself runs without sanitizer.
real=$(command -v "${CXX:-g++}")
flags="-O1 -g -fno-omit-frame-pointer -fno-wrapv -D_GLIBCXX_ASSERTIONS"
flags+=" -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
cat >bin/c++ <<END
#!/bin/sh
unset LD_PRELOAD
exec $real "\$@" $flags
END
chmod +x bin/c++ && cp bin/c++ bin/g++
export PATH="$copy/bin:$PATH" CXX="$copy/bin/c++" BLD_EXT_CUDA=0 PYTHONPATH="$copy"

cat >csrc/cpu/planted.cpp <<'END'
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <vector>

namespace {

using torch::stable::Tensor;

Tensor planted(const Tensor &input, int64_t bug) {
  const int64_t n = input.numel();
  const float *in = static_cast<const float *>(input.const_data_ptr());
  Tensor result = torch::stable::new_empty(input, std::vector<int64_t>{n});
  float *out = static_cast<float *>(result.mutable_data_ptr());
  std::vector<float> *gone = new std::vector<float>(n), vector(n);
  const float *freed = gone->data();
  delete gone;
  volatile int largest = INT_MAX;
  volatile double large = 1e300;
  const int few = static_cast<int>(n);
  switch (bug) {
  case 1: // by one element, in what would be padding if torch asked for whole cache lines
    out[n] = 1;
    break;
  case 2:
    out[-1] = 1;
    break;
  case 3:
    out[0] = in[n];
    break;
  case 4:
    out[0] = freed[n - 1];
    break;
  case 5:
    out[0] = vector[n];
    break;
  case 6:
    out[0] = static_cast<float>(largest + few);
    break;
  case 7:
    out[0] = static_cast<float>(1 << (largest - few));
    break;
  case 8:
    out[0] = static_cast<float>(static_cast<int>(large));
    break;
  }
  return result;
}

STABLE_TORCH_LIBRARY_FRAGMENT(bld_ext_planted, m) { m.def("planted(Tensor x, int bug) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(bld_ext_planted, CPU, m) { m.impl("planted", TORCH_BOX(&planted)); }

} // namespace
END
cat >planted.py <<'END'
import os
import sys

import torch

import bld_ext  # noqa: F401

REPORTS = [
    "fine",
    "heap-buffer-overflow",
    "heap-buffer-overflow",
    "heap-buffer-overflow",
    "heap-use-after-free",
    "Assertion '__n < this->size()' failed",
    "signed integer overflow",
    "shift exponent",
    "outside the range of representable values",
]
missed = 0
for bug, report in enumerate(REPORTS):
    read, write = os.pipe()
    if os.fork() == 0:  # a report ends the process
        os.dup2(write, 1), os.dup2(write, 2)
        torch.ops.bld_ext_planted.planted(torch.ones(13), bug)
        print("fine", flush=True)
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        found = pipe.read()
    if report not in found:
        missed += 1
        print(f"planted bug {bug}: expected {report!r}, got\n{found}")
print(f"planted bugs: {len(REPORTS) - 1 - missed} reported, {missed} missed")
sys.exit(missed > 0)
END

"$python" setup.py --quiet build_ext --inplace >build.log 2>&1 || { cat build.log && exit 1; }

export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:quarantine_size_mb=64
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
preload=$(for name in asan ubsan stdc++; do "$real" -print-file-name="lib$name.so"; done | paste -sd:)
sanitized() { LD_PRELOAD=$preload "$python" "$@"; }

sanitized planted.py
[ $mode = self-test ] && exit

tests=(tests/test_{losses,head_softmax,layers,layers_emulated,augment,view_batch_norm,philox}.py)
tests+=(tests/test_{bad_input,hypothesis}.py)
# Told "avx512", torch runs it on any processor, and dies where there is none.
widest=$(sanitized -c "import torch; print(torch.backends.cpu.get_cpu_capability().lower())")
widths=("$widest")
if [ $mode = registers ]; then
  case $widest in
  avx512) widths=(default avx2 avx512) ;;
  avx2) widths=(default avx2) ;;
  esac
fi
for width in "${widths[@]}"; do
  echo "registers: $width"
  ATEN_CPU_CAPABILITY=$width sanitized -m pytest -q -p no:cacheprovider \
    -k "not compiles and not compiled_with and not compiled_code and not opcheck and not is_undone \
     and not check_finite" "${tests[@]}" "$@"
done
