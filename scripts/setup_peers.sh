#!/usr/bin/env bash
# Makes .venv-peers with the engines that scripts/benchmark_influence.py compares with: scripts/setup_peers.sh
# An environment of its own, since they pin what the project does not; torch first, so that they take it as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv-peers/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv-peers || { rm -rf .venv-peers; echo "${PYTHON:-python3} has no venv module" >&2; exit 1; }
fi
stamp=.venv-peers/installed-$(cksum < "$0" | tr ' ' '-')
if [ ! -f "$stamp" ]; then
  echo "installing kronfluence and bergson into .venv-peers ..."
  pip() { .venv-peers/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
  pip torch==2.13.0
  pip kronfluence==1.0.1 bergson==2.5.1 torch==2.13.0
  # Made for another torch: transformers imports them where they are installed, and fails.
  .venv-peers/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio
  touch "$stamp"
fi
