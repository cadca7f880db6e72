#include "gemv.cuh"
#include "start.cuh"

namespace megaforge::bitgemm {
namespace {

template <int kBits, int kTokens>
__global__ void __launch_bounds__(kGemvThreads, 2) gemv_kernel(const Product product) {
  __shared__ GemvShared<kTokens> shared;
  gemv_block<kBits, kTokens>(Block<kGemvThreads>{}, shared, product, static_cast<int>(blockIdx.x),
                             static_cast<int>(blockIdx.y) * kTokens);
}

template <int kBits, int kTokens>
cudaError_t start_tokens(const Product& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(panels_of(p.rows)), static_cast<unsigned>((p.tokens + kTokens - 1) / kTokens));
  gemv_kernel<kBits, kTokens><<<grid, kGemvThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t start_gemv(const Product& p, void* stream) {
  return with_bits(p.bits, [&]<int kBits>() {
    if (p.tokens == 1) return start_tokens<kBits, 1>(p, stream);
    if (p.tokens == 2) return start_tokens<kBits, 2>(p, stream);
    return start_tokens<kBits, kMostTokens>(p, stream);
  });
}

}  // namespace megaforge::bitgemm
