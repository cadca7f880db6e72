// Newton-Schulz iterations on CPUs: X <- a X + (b A + c A A) X with A = X X^T.
#pragma once

#include <cstdint>
#include <span>

namespace megaforge::newton_schulz {

struct Step {
  float a, b, c;
};

// How matrices are multiplied; sums are fp32 in all of them.
enum class Way {
  standard_bf16,  // X, A and the polynomial are rounded to bf16
  standard_f32,
  gram_f32,    // Q is iterated from X X^T, and X multiplied by it once
  gram_split,  // the same with X in bf16 and Q as the sum of two bf16 matrices
};

struct Problem {
  std::int64_t batch, m, n;  // m <= n
  std::span<const Step> steps;
  Way way;
  double eps;  // the least norm that a matrix is divided by
};

// x and out: [batch, m, n]. On at most `threads` threads; no result depends on their number.
void newton_schulz(const Problem& problem, const float* x, float* out, int threads);

// Q with which Q X is the result of the iterations: gram and out are [batch, m, m], gram = X X^T of normalised X.
void gram_polynomial(std::int64_t batch, std::int64_t m, std::span<const Step> steps, const float* gram, float* out,
                     int threads);

// One matrix by a team of threads; what an instruction set implements.
struct Kernels {
  std::int64_t (*scratch_bytes)(std::int64_t m, std::int64_t n, Way way, int team);
  void (*orthogonalize)(const Problem& problem, const float* x, float* out, void* scratch, int team);
  void (*polynomial)(std::int64_t m, std::span<const Step> steps, const float* gram, float* out, void* scratch,
                     int team);
};

extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;

}  // namespace megaforge::newton_schulz
