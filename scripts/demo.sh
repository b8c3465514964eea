#!/usr/bin/env bash
# Sets up and runs the main job on the embedded demo, on two processes; further arguments go to main.py.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/torchrun --standalone --nproc_per_node=2 main.py "$@"
