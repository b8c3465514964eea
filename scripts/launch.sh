#!/usr/bin/env bash
# Starts main.py on all GPUs of this node, or of several: the same line on each, with NNODES, NODE_RANK and
# MASTER_ADDR set (MASTER_PORT if 29500 is taken), and output_dir on a file system that all of them share.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
nproc=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
exec torchrun --nproc_per_node="$nproc" --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}" main.py "$@"
