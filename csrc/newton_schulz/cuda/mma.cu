#include "mma.cuh"
#include "start.cuh"

namespace megaforge::newton_schulz {
namespace {

__global__ void __launch_bounds__(kThreads, 2) mma_kernel(const Product product) {
  extern __shared__ __align__(16) unsigned char memory[];
  product_block<MmaSums>(Block<kThreads>{}, aligned_memory(memory), product, static_cast<std::int64_t>(blockIdx.x));
}

}  // namespace

cudaError_t start_mma(const Product& p, void* stream) { return start(mma_kernel, p, stream); }

const char* multiply(const Product& product, bool wgmma, void* stream) {
  const cudaError_t error = wgmma ? start_wgmma(product, stream) : start_mma(product, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace megaforge::newton_schulz
