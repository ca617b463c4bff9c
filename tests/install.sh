#!/usr/bin/env bash
# What a user installs: builds the source distribution and from that a wheel,
# then installs each of the two into a virtual environment of its own, outside of the checkout, and
# runs ops there. torch and the other dependencies are this Python's; .ci/run downloads them too.
#
#   tests/install.sh
#
# Environment: PYTHON (default: python3), and what setup.py reads (BLD_EXT_CUDA, ...).
set -euo pipefail

python=$(command -v "${PYTHON:-python3}")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

mkdir "$work/source" "$work/dist"
git -C "$root" archive HEAD | tar x -C "$work/source"
cd "$work/source"
"$python" -c "import setuptools.build_meta as build; build.build_sdist('$work/dist')" >"$work/log" 2>&1 ||
  { cat "$work/log" && exit 1; }
cd "$work"
options=(--quiet --no-build-isolation --no-deps --no-index)
"$python" -m pip wheel "${options[@]}" --wheel-dir dist dist/*.tar.gz

cat >probe.py <<'END'
import importlib.metadata
import sys
from pathlib import Path

import torch

import bld_ext
from bld_ext import BLDOptimizer, MultiHead, SeededAugment, ops

assert Path(bld_ext.__file__).is_relative_to(sys.prefix), bld_ext.__file__
info = bld_ext.build_info()
assert info["torch_built_with"] == torch.__version__ and info["torch_target"] == "2.11", info
for op in bld_ext.SCHEMAS:
    assert bld_ext.backend(op) == "compiled", (op, bld_ext.backend(op))

logits, bank = torch.randn(4, 5, requires_grad=True), torch.full((4, 2), 0.5)
assert torch.allclose(ops.head_softmax(logits, [2, 3]).sum(1), torch.full((4,), 2.0))
assert ops.distillation_loss(logits, bank, [2]).isfinite()
model = MultiHead(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 6)), in_features=6)
optimizer = BLDOptimizer(model, lr=1e-2, views=2, augment=SeededAugment(crop_padding=1, flip=0.5))
for classes in (2, 3):
    model.add_head(classes)
    loss = optimizer.step(torch.rand(4, 3, 4, 4), torch.arange(4) % classes)
    assert loss.isfinite()

files = {str(file) for file in importlib.metadata.files("bld_ext")}
rooms = {file.split("/")[0] for file in files if not file.startswith("..")}
assert rooms == {"bld_ext", f"bld_ext-{importlib.metadata.version('bld_ext')}.dist-info"}, rooms
print(f"{len(files)} files,", ", ".join(f"{name} {value!r}" for name, value in info.items()))
END

for package in dist/*.tar.gz dist/*.whl; do
  venv=$work/venv-${package##*.}
  "$python" -m venv --without-pip "$venv"
  # a folder on the path, whose own .pth files, such as an editable install's, are not read
  "$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
    >"$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth"
  PATH="$venv/bin:$(dirname "$python"):$PATH" "$python" -m pip --python "$venv/bin/python" install \
    "${options[@]}" --ignore-installed "$package"
  printed=$("$venv/bin/python" probe.py)
  echo "$(basename "$package"): $printed"
done
