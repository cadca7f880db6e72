#include "mma.cuh"
#include "start.cuh"

namespace megaforge::bitgemm {
namespace {

constexpr int kFewTokens = 32, kManyTokens = 128;  // of a tile

template <int kBits, int kTokens, bool kGrouped>
__global__ void __launch_bounds__(kThreads, kGrouped ? 1 : 2) mma_kernel(const Product product) {
  extern __shared__ __align__(16) unsigned char memory[];
  product_block<MmaSums<kBits, kTokens, kGrouped>>(Block<kThreads>{}, aligned_memory<kTokens>(memory), product,
                                                    static_cast<std::int64_t>(blockIdx.x));
}

template <int kBits, int kTokens>
cudaError_t start_tokens(const Product& p, void* stream) {
  return p.groups > 0 ? start<kTokens>(mma_kernel<kBits, kTokens, true>, p, stream)
                      : start<kTokens>(mma_kernel<kBits, kTokens, false>, p, stream);
}

}  // namespace

cudaError_t start_mma(const Product& p, void* stream) {
  return with_bits(p.bits, [&]<int kBits>() {
    return p.tokens <= 2 * kFewTokens ? start_tokens<kBits, kFewTokens>(p, stream)
                                      : start_tokens<kBits, kManyTokens>(p, stream);
  });
}

}  // namespace megaforge::bitgemm
