#!/usr/bin/env bash
# Sets up, checks style and types, and runs the tests; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/mypy
# A worker for each core, and each file in one worker: its fixtures are made once.
exec .venv/bin/python -m pytest -n auto --dist loadfile "$@"
