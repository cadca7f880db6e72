#!/usr/bin/env bash
# Compiles every .cu of csrc for sm_80, sm_90 and PTX, which a build without a GPU at hand makes, and for sm_90a. Needs nvcc
# (on PATH or in CUDA_HOME), no GPU and no CUDA torch: the .cu files include no torch headers. Says so and passes where
# there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${CUDA_HOME:-}" ]; then PATH="$CUDA_HOME/bin:$PATH"; fi
command -v nvcc >/dev/null || { echo "no nvcc on this machine: CUDA sources not checked"; exit 0; }
mapfile -t sources < <(find csrc -name '*.cu' | sort)
compile() {
    nvcc -std=c++20 -O3 --expt-relaxed-constexpr --Werror all-warnings -I "$(dirname "$(dirname "$1")")" \
        -gencode arch=compute_80,code=sm_80 -gencode "arch=compute_90,code=[sm_90,compute_90]" \
        -gencode arch=compute_90a,code=sm_90a -c "$1" -o /dev/null
}
export -f compile
# xargs runs as many side by side as there are cores, and fails where one did.
printf '%s\0' "${sources[@]}" | xargs -0 -n 1 -P "$(nproc)" bash -c 'compile "$1" || exit 255' _
echo "${#sources[@]} CUDA sources compile"
