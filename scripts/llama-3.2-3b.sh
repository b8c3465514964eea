#!/usr/bin/env bash
# meta-llama/Llama-3.2-3B by configs/llama-3.2-3b.yaml; further arguments go to main.py.
exec bash "$(dirname "$0")/launch.sh" --config configs/llama-3.2-3b.yaml "$@"
