#!/usr/bin/env bash
# Builds the C++ tests of every op (csrc/OP/tests/*.cpp with csrc/OP/cpu/*.cpp and that of the ops in csrc/OP/uses,
# without torch) under the address and the undefined-behaviour sanitizer and runs them:
#     bash run_scripts/sanitize.sh [OP ...]
# SANITIZE=none builds them plainly.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
sanitize="${SANITIZE:-address,undefined}"
build="$(mktemp -d)"
trap 'rm -rf "$build"' EXIT
flags=(-std=c++20 -O1 -g1 -fopenmp -ffp-contract=fast -Wall -Wextra -Wno-psabi)
[ "$sanitize" = none ] || flags+=("-fsanitize=$sanitize" -fno-sanitize-recover=all -fno-omit-frame-pointer)
# OpenMP's threads live as long as the process; what they hold is not lost.
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=1:detect_stack_use_after_return=1}"
others=(! -name 'binding*.cpp')
[ "$(uname -m)" = x86_64 ] || others+=(! -name 'avx*.cpp')
ran=0
for test in csrc/*/tests/*.cpp; do
    op="$(basename "$(dirname "$(dirname "$test")")")"
    [ $# -eq 0 ] || [[ " $* " == *" $op "* ]] || continue
    objects=()
    folders=("csrc/$op/cpu")
    for other in $(cat "csrc/$op/uses" 2>/dev/null); do folders+=("csrc/$other/cpu"); done
    for source in "$test" $(find "${folders[@]}" -name '*.cpp' "${others[@]}" | sort); do
        object="$build/$op-${source//\//-}.o"
        "${CXX:-g++}" "${flags[@]}" -Icsrc "-Icsrc/$op" -c "$source" -o "$object" &
        objects+=("$object")
    done
    for _ in "${objects[@]}"; do wait -n; done
    "${CXX:-g++}" "${flags[@]}" "${objects[@]}" -o "$build/$op"
    echo "== $op ($(basename "$test"), sanitizers: $sanitize)"
    "$build/$op"
    ran=$((ran + 1))
done
[ "$ran" -gt 0 ] || { echo "error: no tests of $*" >&2; exit 1; }
