#!/usr/bin/env bash
# Benchmarks on one GPU: bench/gpu.sh [RESULTS] [--only=PHASE,...] [--smoke]. PYTHON names the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" -P -m bench.gpu "$@"
