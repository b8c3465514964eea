#!/usr/bin/env bash
# meta-llama/Llama-3.1-8B by configs/llama-3.1-8b.yaml; further arguments go to main.py.
exec bash "$(dirname "$0")/launch.sh" --config configs/llama-3.1-8b.yaml "$@"
