#!/usr/bin/env bash
# Everything a machine with a CUDA GPU can show, without network; `--plan` says what, `--help` how.
set -euo pipefail
export BLD_CALLED_FROM=$PWD
cd "$(dirname "$0")/.."
exec python3 -m benchmarks.gpu "$@"
