#!/usr/bin/env bash
# Every mixing method on equal terms, on the embedded demo (or on whatever further arguments to main.py say), with 5
# seeds; the same command goes on where it was stopped. NPROC: processes, one by default. Then docs/results.md:
# python scripts/results.py --demo runs/compare
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/torchrun --standalone --nproc_per_node="${NPROC:-1}" main.py --stage compare --output_dir runs/compare \
  --compare.seeds 5 --compare.overrides.regmix.rounds 40 "$@"
