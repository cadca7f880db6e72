#!/usr/bin/env bash
# Compiles every .cu of csrc for sm_80, sm_90 and PTX, which a build without a GPU at hand makes, and for sm_90a. Needs nvcc
# (on PATH or in CUDA_HOME), no GPU and no CUDA torch: the .cu files include no torch headers. Says so and passes where
# there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${CUDA_HOME:-}" ]; then PATH="$CUDA_HOME/bin:$PATH"; fi
command -v nvcc >/dev/null || { echo "no nvcc on this machine: CUDA sources not checked"; exit 0; }
count=0
while IFS= read -r source; do
    nvcc -std=c++20 -O3 --expt-relaxed-constexpr --Werror all-warnings -I "$(dirname "$(dirname "$source")")" \
        -gencode arch=compute_80,code=sm_80 -gencode "arch=compute_90,code=[sm_90,compute_90]" \
        -gencode arch=compute_90a,code=sm_90a -c "$source" -o /dev/null
    count=$((count + 1))
done < <(find csrc -name '*.cu' | sort)
echo "$count CUDA sources compile"
