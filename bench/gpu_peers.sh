#!/usr/bin/env bash
# The train step against its peers on one GPU: bench/gpu_peers.sh [RESULTS] [--only=PHASE,...] [--smoke]. PYTHON names the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" -P -m bench.gpu_peers "$@"
