// Chooses the instruction set, and spreads the matrices of a batch, or the blocks of a matrix, over threads.
#include <algorithm>

#include <omp.h>

#include "common/isa.h"
#include "common/scratch.h"
#include "newton_schulz.h"

namespace megaforge::newton_schulz {
namespace {

constexpr std::int64_t kWorthATeam = 64 * 64;  // elements of a matrix

const Kernels& kernels() {
  if constexpr (kX86) {
    return best_kernels(scalar_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels);
  } else {
    return best_kernels(scalar_kernels);
  }
}

// body(matrix, scratch, team): each matrix by one thread where there are enough of them, else by all threads.
template <class Body>
void over_batch(std::int64_t batch, std::int64_t elements, int threads, auto bytes, Body body) {
  if (batch >= threads || elements < kWorthATeam) {
    const int used = static_cast<int>(std::clamp<std::int64_t>(threads, 1, batch));
    const Scratch scratch(used, bytes(1));
#pragma omp parallel for schedule(dynamic) num_threads(used) if (used > 1)
    for (std::int64_t i = 0; i < batch; ++i) body(i, scratch.of(used > 1 ? omp_get_thread_num() : 0), 1);
    return;
  }
  const Scratch scratch(1, bytes(threads));
  for (std::int64_t i = 0; i < batch; ++i) body(i, scratch.of(0), threads);
}

}  // namespace

void newton_schulz(const Problem& problem, const float* x, float* out, int threads) {
  const Kernels& code = kernels();
  const std::int64_t elements = problem.m * problem.n;
  over_batch(
      problem.batch, elements, threads,
      [&](int team) { return code.scratch_bytes(problem.m, problem.n, problem.way, team); },
      [&](std::int64_t i, void* scratch, int team) {
        code.orthogonalize(problem, x + i * elements, out + i * elements, scratch, team);
      });
}

void gram_polynomial(std::int64_t batch, std::int64_t m, std::span<const Step> steps, const float* gram, float* out,
                     int threads) {
  const Kernels& code = kernels();
  over_batch(
      batch, m * m, threads, [&](int team) { return code.scratch_bytes(m, m, Way::gram_f32, team); },
      [&](std::int64_t i, void* scratch, int team) {
        code.polynomial(m, steps, gram + i * m * m, out + i * m * m, scratch, team);
      });
}

}  // namespace megaforge::newton_schulz
