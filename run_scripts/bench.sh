#!/usr/bin/env bash
# Runs benchmarks: bash run_scripts/bench.sh NAME [ARGS]   (no name: all of them, one after the other)
# Each prints a table and, as its last line, a JSON object with the measured ratios. They never gate CI.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment data,train,corpus,bench
cd "$REPO"
# The benches import tests.bench.harness from the root of the repository.
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
names() { for file in tests/bench/bench_*.py; do basename "${file#tests/bench/bench_}" .py; done; }
if [ $# -gt 0 ]; then
    name="$1"; shift
    [ -f "tests/bench/bench_$name.py" ] || fail "no benchmark called $name; there are: $(names | tr '\n' ' ')"
    exec "$PYTHON" "tests/bench/bench_$name.py" "$@"
fi
for name in $(names); do
    say "$name"
    "$PYTHON" "tests/bench/bench_$name.py"
done
