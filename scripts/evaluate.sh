#!/usr/bin/env bash
# Benchmarks of a model, a run's result or every result of a comparison: scripts/evaluate.sh MODEL [...]; --help says
# more. With several GPUs each holds the model and takes a part of the rows (NPROC: how many).
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh requirements-benchmarks.txt
nproc=${NPROC:-$(.venv/bin/python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
[ "$nproc" -gt 1 ] || exec .venv/bin/python scripts/evaluate.py "$@"
exec .venv/bin/torchrun --standalone --nproc_per_node="$nproc" scripts/evaluate.py "$@"
