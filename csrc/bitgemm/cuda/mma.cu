#include "mma.cuh"
#include "start.cuh"

namespace megaforge::bitgemm {
namespace {

template <int kBits, int kTokens, bool kGrouped>
__global__ void __launch_bounds__(kThreads, kGrouped ? 1 : 2) mma_kernel(const Product product) {
  extern __shared__ __align__(16) unsigned char memory[];
  product_block<MmaSums<kBits, kTokens, kGrouped>>(Block<kThreads>{}, aligned_memory<kTokens>(memory), product,
                                                    static_cast<std::int64_t>(blockIdx.x), static_cast<int>(blockIdx.y));
}

template <int kBits, int kTokens>
cudaError_t start_tokens(const Product& p, void* stream) {
  return p.groups > 0 ? start<kTokens>(mma_kernel<kBits, kTokens, true>, p, stream)
                      : start<kTokens>(mma_kernel<kBits, kTokens, false>, p, stream);
}

}  // namespace

cudaError_t start_mma(const Product& p, void* stream) {
  return with_bits(p.bits, [&]<int kBits>() {
    return tile_tokens(Form::kMma, p.tokens) == 32 ? start_tokens<kBits, 32>(p, stream)
                                                   : start_tokens<kBits, 128>(p, stream);
  });
}

}  // namespace megaforge::bitgemm
