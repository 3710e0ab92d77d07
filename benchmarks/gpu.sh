#!/usr/bin/env bash
# The one command for a machine with a GPU: builds for the card there, runs the CUDA tests and the
# sanitizer, probes the card and measures, in 530 s. Options are those of benchmarks/gpu/__main__.py; the
# results go to ${OUT:-benchmarks/results/gpu}. PYTHON names another Python than .venv's, or than
# python3 where there is no .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
