// Products of a matrix with a few vectors, bound by the speed at which the matrix is read.
#pragma once

#include <cstdint>

#include "common/bf16.h"

namespace megaforge::gemv {

constexpr int kMostTokens = 8;  // of one pass over the matrix

// y [tokens, n] = x [tokens, k] W^T + bias: W is n rows of k, `stride` elements apart, or, turned, k rows of n.
template <class T, class Y = T>
struct Problem {
  std::int64_t tokens, n, k;
  const T* x;
  const T* weight;
  std::int64_t stride;
  bool turned;
  const T* bias;  // [n] or null
  Y* y;
};

// Sums are fp32. On at most `threads` threads; no result depends on their number.
void run(const Problem<float>& problem, int threads);
void run(const Problem<Bf16>& problem, int threads);

// Outputs [begin, end) of at most kMostTokens tokens, by one thread; what an instruction set implements.
struct Kernels {
  void (*f32)(const Problem<float>& problem, std::int64_t begin, std::int64_t end);
  void (*bf16)(const Problem<Bf16>& problem, std::int64_t begin, std::int64_t end);
};

extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;

}  // namespace megaforge::gemv
