#!/usr/bin/env bash
# Learning in bfloat16 against float32 on one GPU: bench/gpu_learn.sh [RESULTS] [--only=PHASE,...] [--smoke]. PYTHON names the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" -P -m bench.gpu_learn "$@"
