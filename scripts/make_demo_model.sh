#!/usr/bin/env bash
# Makes the demo's base model anew (ideal/demo/base_model/): seeded, about four minutes on one core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python
[ -x .venv/bin/python ] && python=.venv/bin/python
exec "$python" -m ideal.demo.base_model "$@"
