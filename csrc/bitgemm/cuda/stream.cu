#include "start.cuh"
#include "stream.cuh"

namespace megaforge::bitgemm {
namespace {

template <int kBits, int kTiles>
__global__ void __launch_bounds__(kStreamThreads, 2) stream_kernel(const Product product) {
  __shared__ StreamShared<kTiles> shared;
  stream_block<kBits, kTiles>(Block<kStreamThreads>{}, shared, product, static_cast<int>(blockIdx.x),
                              static_cast<int>(blockIdx.y) * 8 * kTiles);
}

template <int kBits, int kTiles>
cudaError_t start_tiles(const Product& p, void* stream) {
  const dim3 grid(static_cast<unsigned>((p.rows + kStreamRows - 1) / kStreamRows),
                  static_cast<unsigned>((p.tokens + 8 * kTiles - 1) / (8 * kTiles)));
  stream_kernel<kBits, kTiles><<<grid, kStreamThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t start_stream(const Product& p, void* stream) {
  return with_bits(p.bits, [&]<int kBits>() {
    if (p.tokens <= 8) return start_tiles<kBits, 1>(p, stream);
    return p.tokens <= 16 ? start_tiles<kBits, 2>(p, stream) : start_tiles<kBits, 4>(p, stream);
  });
}

}  // namespace megaforge::bitgemm
