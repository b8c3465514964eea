#!/usr/bin/env bash
# Where the demo's best mixture lies (scripts/demo_sweep.py --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python
[ -x .venv/bin/python ] && python=.venv/bin/python
exec "$python" scripts/demo_sweep.py "$@"
