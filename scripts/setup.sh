#!/usr/bin/env bash
# Makes .venv with what a requirements file names, once: scripts/setup.sh [requirements.txt]
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=${1:-requirements.txt}
if [ ! -x .venv/bin/python ]; then
  for python in python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
    python=
  done
  [ -n "$python" ] || { echo "Python 3.11 or later is needed" >&2; exit 1; }
  "$python" -m venv .venv || { rm -rf .venv; echo "$python has no venv module (Debian: apt install python3-venv)" >&2; exit 1; }
fi
stamp=".venv/installed-$(cat requirements*.txt | cksum | tr ' ' '-')-$(basename "$wanted")"
if [ ! -f "$stamp" ]; then
  echo "installing $wanted into .venv ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$wanted"
  touch "$stamp"
fi
