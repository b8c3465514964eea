#!/usr/bin/env bash
# How near to the best mixture each method comes, for how many training runs (scripts/search_benchmark.py --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python
[ -x .venv/bin/python ] && python=.venv/bin/python
exec "$python" scripts/search_benchmark.py "$@"
