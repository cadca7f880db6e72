#include "start.cuh"
#include "wgmma.cuh"

namespace megaforge::bitgemm {
namespace {

// In code for other architectures the kernel does nothing and takes one warp, by which has_wgmma() knows it.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int kBits>
__global__ void __launch_bounds__(32) wgmma_kernel(const Product) {}
#else
template <int kBits>
__global__ void __launch_bounds__(kThreads, 2) wgmma_kernel(const Product product) {
  using Sums = WgmmaSums<kBits>;
  extern __shared__ __align__(16) unsigned char memory[];
  product_block<Sums>(Block<kThreads>{}, aligned_memory<Sums::kTokens>(memory), product,
                      static_cast<std::int64_t>(blockIdx.x), static_cast<int>(blockIdx.y));
}
#endif

}  // namespace

cudaError_t start_wgmma(const Product& p, void* stream) {
  return with_bits(p.bits, [&]<int kBits>() { return start<128>(wgmma_kernel<kBits>, p, stream); });
}

bool has_wgmma() {
  cudaFuncAttributes attributes{};
  const bool known = cudaFuncGetAttributes(&attributes, wgmma_kernel<2>) == cudaSuccess;
  if (!known) static_cast<void>(cudaGetLastError());  // a device that none of the code is for
  return known && attributes.maxThreadsPerBlock >= kThreads;
}

}  // namespace megaforge::bitgemm
