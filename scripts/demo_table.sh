#!/usr/bin/env bash
# README's table on the demo (scripts/demo_table.py --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python
[ -x .venv/bin/python ] && python=.venv/bin/python
exec "$python" scripts/demo_table.py "$@"
