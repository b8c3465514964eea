#!/usr/bin/env bash
# How well the influence predicts what retraining does (scripts/validate_influence.py --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python
[ -x .venv/bin/python ] && python=.venv/bin/python
exec "$python" scripts/validate_influence.py "$@"
