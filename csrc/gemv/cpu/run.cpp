// Chooses the instruction set, and spreads a matrix's outputs over threads.
#include <algorithm>

#include <omp.h>

#include "common/isa.h"
#include "gemv.h"

namespace megaforge::gemv {
namespace {

constexpr std::int64_t kWorthAThread = 1 << 15;  // elements of the matrix
constexpr std::int64_t kGranule = 64;            // outputs: no two threads write to one cache line

const Kernels& kernels() {
  if constexpr (kX86) {
    return best_kernels(scalar_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels);
  } else {
    return best_kernels(scalar_kernels);
  }
}

template <class T>
void spread(const Problem<T>& problem, int threads, void (*part)(const Problem<T>&, std::int64_t, std::int64_t)) {
  const std::int64_t granules = (problem.n + kGranule - 1) / kGranule;
  const std::int64_t worth = std::max<std::int64_t>(1, problem.n * problem.k / kWorthAThread);
  const int used = static_cast<int>(std::clamp<std::int64_t>(std::min(worth, granules), 1, std::max(threads, 1)));
  for (std::int64_t first = 0; first < problem.tokens; first += kMostTokens) {
    Problem<T> some = problem;
    some.tokens = std::min<std::int64_t>(kMostTokens, problem.tokens - first);
    some.x += first * problem.k;
    some.y += first * problem.n;
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (int i = 0; i < used; ++i) {
      part(some, granules * i / used * kGranule, std::min(problem.n, granules * (i + 1) / used * kGranule));
    }
  }
}

}  // namespace

void run(const Problem<float>& problem, int threads) { spread(problem, threads, kernels().f32); }

void run(const Problem<Bf16>& problem, int threads) { spread(problem, threads, kernels().bf16); }

}  // namespace megaforge::gemv
