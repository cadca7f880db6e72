#!/usr/bin/env bash
# The first half hour on a GPU, unattended: builds, tests, looks for races, times the kernels and the ways of attention,
# trains a few steps in several modes, profiles, and writes docs/gpu_first_day.md: measured beside expected. A step that
# fails or takes too long is recorded, and the next one begins.
#   bash run_scripts/gpu_first_day.sh [--output FILE] [--minutes 30]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m tests.gpu.first_day "$@"
