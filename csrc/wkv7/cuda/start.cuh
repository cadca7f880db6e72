// Starts a kernel with one block a batch row and head.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace megaforge::wkv7 {

// kShared: bytes of dynamic shared memory of a block, more than a kernel gets without asking.
template <int kThreads, int kShared, class Arguments>
cudaError_t start(void (*kernel)(Arguments), const Arguments& args, const Problem& problem, void* stream) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (status != cudaSuccess) return status;
  const auto blocks = static_cast<unsigned>(problem.batch * problem.heads);
  kernel<<<blocks, kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace megaforge::wkv7
