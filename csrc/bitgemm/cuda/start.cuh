// Starts a kernel with one block a tile.
#pragma once

#include <cuda_runtime.h>

#include "product.cuh"

namespace megaforge::bitgemm {

template <int kTokens>
MF_DEVICE Shared<kTokens>& aligned_memory(unsigned char* memory) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(memory));
  return *reinterpret_cast<Shared<kTokens>*>(memory + (kSwizzleAlignment - address % kSwizzleAlignment) % kSwizzleAlignment);
}

template <int kTokens>
cudaError_t start(void (*kernel)(Product), const Product& p, void* stream) {
  constexpr int kBytes = kSharedBytes<kTokens>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const std::int64_t high = (p.rows + kTileRows - 1) / kTileRows, wide = (p.tokens + kTokens - 1) / kTokens;
  const dim3 grid(static_cast<unsigned>(high * wide), static_cast<unsigned>(p.parts));
  kernel<<<grid, kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

cudaError_t start_finish(const Product& p, void* stream);
cudaError_t start_gemv(const Product& p, void* stream);
cudaError_t start_plain(const Product& p, void* stream);
cudaError_t start_stream(const Product& p, void* stream);
cudaError_t start_mma(const Product& p, void* stream);
cudaError_t start_wgmma(const Product& p, void* stream);

// Calls run with the number of bits as a constant.
template <class Run>
cudaError_t with_bits(int bits, Run run) {
  if (bits == 1) return run.template operator()<1>();
  if (bits == 2) return run.template operator()<2>();
  return run.template operator()<4>();
}

}  // namespace megaforge::bitgemm
