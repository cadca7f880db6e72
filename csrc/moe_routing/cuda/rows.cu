// Rows of tokens to their experts' order and back: a block for each token, which reads and writes 16 bytes a thread.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "launch.h"

namespace megaforge::moe::cuda {
namespace {

template <typename T>
struct Wide {  // in which T is added up
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

// Sixteen bytes, or one element where rows do not divide.
template <typename T, bool kWhole>
struct alignas(kWhole ? 16 : sizeof(T)) Pack {
  static constexpr int kCount = kWhole ? 16 / sizeof(T) : 1;
  T at[kCount];
};

template <typename P>
__global__ void __launch_bounds__(kThreads) permute_kernel(const P* x, P* rows, const std::int32_t* position,
                                                           std::int64_t packs, int topk) {
  const std::int64_t t = blockIdx.x;
  for (std::int64_t i = threadIdx.x; i < packs; i += kThreads) {
    const P value = x[t * packs + i];
    for (int j = 0; j < topk; ++j) {
      const std::int64_t row = position[t * topk + j];
      if (row >= 0) rows[row * packs + i] = value;
    }
  }
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads) unpermute_kernel(const T* y, const typename Wide<T>::type* weights, T* out,
                                                             const std::int32_t* position, std::int64_t width, int topk) {
  using P = Pack<T, kWhole>;
  using W = typename Wide<T>::type;
  const std::int64_t t = blockIdx.x, packs = width / P::kCount;
  for (std::int64_t i = threadIdx.x; i < packs; i += kThreads) {
    W sums[P::kCount] = {};
    for (int j = 0; j < topk; ++j) {
      const std::int64_t row = position[t * topk + j];
      if (row < 0) continue;
      const P part = reinterpret_cast<const P*>(y)[row * packs + i];
      const W weight = weights == nullptr ? W(1) : weights[t * topk + j];
      for (int c = 0; c < P::kCount; ++c) sums[c] += weight * static_cast<W>(part.at[c]);
    }
    P result;
    for (int c = 0; c < P::kCount; ++c) result.at[c] = static_cast<T>(sums[c]);
    reinterpret_cast<P*>(out)[t * packs + i] = result;
  }
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads) unpermute_backward_kernel(
    const T* grad, const T* y, const typename Wide<T>::type* weights, T* dy, typename Wide<T>::type* dweights,
    const std::int32_t* position, std::int64_t width, int topk) {
  using P = Pack<T, kWhole>;
  using W = typename Wide<T>::type;
  __shared__ W parts[kThreads / 32];
  const std::int64_t t = blockIdx.x, packs = width / P::kCount;
  for (int j = 0; j < topk; ++j) {
    const std::int64_t row = position[t * topk + j];
    const W weight = weights[t * topk + j];
    W dot = 0;
    for (std::int64_t i = threadIdx.x; i < packs && row >= 0; i += kThreads) {
      const P g = reinterpret_cast<const P*>(grad)[t * packs + i];
      const P value = reinterpret_cast<const P*>(y)[row * packs + i];
      P result;
      for (int c = 0; c < P::kCount; ++c) {
        dot += static_cast<W>(g.at[c]) * static_cast<W>(value.at[c]);
        result.at[c] = static_cast<T>(weight * static_cast<W>(g.at[c]));
      }
      reinterpret_cast<P*>(dy)[row * packs + i] = result;
    }
    for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = dot;
    __syncthreads();
    if (threadIdx.x == 0) {
      W sum = 0;
      for (int warp = 0; warp < kThreads / 32; ++warp) sum += parts[warp];
      dweights[t * topk + j] = sum;
    }
    __syncthreads();
  }
}

template <typename V>
__global__ void values_kernel(const V* values, V* out, const std::int32_t* position, std::int64_t assignments) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < assignments && position[i] >= 0) out[position[i]] = values[i];
}

template <typename T>
bool whole(std::int64_t width, std::initializer_list<const void*> pointers) {
  std::uintptr_t bits = static_cast<std::uintptr_t>(width * static_cast<std::int64_t>(sizeof(T)));
  for (const void* pointer : pointers) bits |= reinterpret_cast<std::uintptr_t>(pointer);
  return bits % 16 == 0;
}

template <typename T>
int unpermute_of(const Rows& r, const void* y, const void* weights, void* out, cudaStream_t stream) {
  using W = typename Wide<T>::type;
  auto* const kernel = whole<T>(r.width, {y, out}) ? unpermute_kernel<T, true> : unpermute_kernel<T, false>;
  kernel<<<static_cast<unsigned>(r.tokens), kThreads, 0, stream>>>(static_cast<const T*>(y), static_cast<const W*>(weights),
                                                                   static_cast<T*>(out), r.position, r.width,
                                                                   static_cast<int>(r.topk));
  return cudaGetLastError();
}

template <typename T>
int unpermute_backward_of(const Rows& r, const void* grad, const void* y, const void* weights, void* dy, void* dweights,
                          cudaStream_t stream) {
  using W = typename Wide<T>::type;
  auto* const kernel =
      whole<T>(r.width, {grad, y, dy}) ? unpermute_backward_kernel<T, true> : unpermute_backward_kernel<T, false>;
  kernel<<<static_cast<unsigned>(r.tokens), kThreads, 0, stream>>>(
      static_cast<const T*>(grad), static_cast<const T*>(y), static_cast<const W*>(weights), static_cast<T*>(dy),
      static_cast<W*>(dweights), r.position, r.width, static_cast<int>(r.topk));
  return cudaGetLastError();
}

}  // namespace

int launch_permute(const Rows& r, const void* x, void* out, void* stream_pointer) {
  auto* const stream = static_cast<cudaStream_t>(stream_pointer);
  const auto grid = static_cast<unsigned>(r.tokens);
  const std::int64_t bytes = r.width * (r.type == Type::bf16 ? 2 : r.type == Type::f32 ? 4 : 8);
  const int topk = static_cast<int>(r.topk);
  if (whole<char>(bytes, {x, out})) {
    permute_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const uint4*>(x), static_cast<uint4*>(out), r.position,
                                                  bytes / 16, topk);
  } else {
    permute_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const std::uint16_t*>(x), static_cast<std::uint16_t*>(out),
                                                  r.position, bytes / 2, topk);
  }
  return cudaGetLastError();
}

int launch_permute_values(const Rows& r, const void* values, void* out, int bytes, void* stream_pointer) {
  auto* const stream = static_cast<cudaStream_t>(stream_pointer);
  const std::int64_t assignments = r.tokens * r.topk;
  const auto grid = static_cast<unsigned>(pieces(assignments, kThreads));
  if (bytes == 4) {
    values_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const std::uint32_t*>(values),
                                                 static_cast<std::uint32_t*>(out), r.position, assignments);
  } else if (bytes == 8) {
    values_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const std::uint64_t*>(values),
                                                 static_cast<std::uint64_t*>(out), r.position, assignments);
  } else {
    values_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const std::uint16_t*>(values),
                                                 static_cast<std::uint16_t*>(out), r.position, assignments);
  }
  return cudaGetLastError();
}

int launch_unpermute(const Rows& r, const void* y, const void* weights, void* out, void* stream_pointer) {
  auto* const stream = static_cast<cudaStream_t>(stream_pointer);
  if (r.type == Type::f64) return unpermute_of<double>(r, y, weights, out, stream);
  if (r.type == Type::f32) return unpermute_of<float>(r, y, weights, out, stream);
  return unpermute_of<__nv_bfloat16>(r, y, weights, out, stream);
}

int launch_unpermute_backward(const Rows& r, const void* grad, const void* y, const void* weights, void* dy,
                              void* dweights, void* stream_pointer) {
  auto* const stream = static_cast<cudaStream_t>(stream_pointer);
  if (r.type == Type::f64) return unpermute_backward_of<double>(r, grad, y, weights, dy, dweights, stream);
  if (r.type == Type::f32) return unpermute_backward_of<float>(r, grad, y, weights, dy, dweights, stream);
  return unpermute_backward_of<__nv_bfloat16>(r, grad, y, weights, dy, dweights, stream);
}

}  // namespace megaforge::moe::cuda
