// Starts a kernel with one block a tile.
#pragma once

#include <cuda_runtime.h>

#include "product.cuh"

namespace megaforge::newton_schulz {

MF_DEVICE Shared& aligned_memory(unsigned char* memory) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(memory));
  return *reinterpret_cast<Shared*>(memory + (kSwizzleAlignment - address % kSwizzleAlignment) % kSwizzleAlignment);
}

inline cudaError_t start(void (*kernel)(Product), const Product& p, void* stream) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  const int high = tiles_along(p.rows);
  const std::int64_t tiles = p.symmetric ? lower_tiles(high) : static_cast<std::int64_t>(high) * tiles_along(p.columns);
  kernel<<<static_cast<unsigned>(tiles * p.batch), kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

cudaError_t start_mma(const Product& p, void* stream);
cudaError_t start_wgmma(const Product& p, void* stream);

}  // namespace megaforge::newton_schulz
