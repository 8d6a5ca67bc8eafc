#!/usr/bin/env bash
# Benchmarks on one GPU: bench/gpu.sh [all|peers|learn] [RESULTS] [--only=PHASE,...] [--smoke]. PYTHON names the interpreter.
#   all    kernels, memory bandwidth, the train step, an exact resume (the default)
#   peers  the train step against plain JAX and Hugging Face under torch.compile
#   learn  300 steps of a 125 M model, bfloat16 kernels against float32 XLA
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in
  all | peers | learn) benchmark=$1 && shift ;;
  *) benchmark=all ;;
esac
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" -P -m "bench.gpu.$benchmark" "$@"
