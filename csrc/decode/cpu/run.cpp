// Chooses the instruction set, and starts the threads of a step.
#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#include <omp.h>

#include "common/isa.h"
#include "decode.h"
#include "memory.h"

namespace megaforge::decode {
namespace {

const Kernels& kernels() {
  if constexpr (kX86) {
    return best_kernels(scalar_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels);
  } else {
    return best_kernels(scalar_kernels);
  }
}

const KernelsOf<float>& kernels_of(float) { return kernels().f32; }
const KernelsOf<Bf16>& kernels_of(Bf16) { return kernels().bf16; }

// Memory that a calling thread keeps from step to step: fresh pages would cost more than the arithmetic on them.
class Kept {
 public:
  char* of(std::int64_t bytes) {
    if (bytes > bytes_) {
      data_.reset();
      data_.reset(static_cast<char*>(::operator new(static_cast<std::size_t>(bytes), std::align_val_t(64))));
      bytes_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(char* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> data_;
  std::int64_t bytes_ = 0;
};

template <class Problem>
void start(const Problem& problem, void (*work)(const Problem&, Team), int threads) {
  thread_local Kept kept;
  const Sizes need = sizes(problem);
  threads = std::max(threads, 1);
  char* shared = kept.of(need.shared + threads * need.own);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num();
    work(problem, {thread, omp_get_num_threads(), shared + need.shared + thread * need.own, shared});
  }
}

}  // namespace

void run(const Block<float>& block, int threads) { start(block, kernels_of(float{}).block, threads); }
void run(const Block<Bf16>& block, int threads) { start(block, kernels_of(Bf16{}).block, threads); }
void run(const Experts<float>& experts, int threads) { start(experts, kernels_of(float{}).experts, threads); }
void run(const Experts<Bf16>& experts, int threads) { start(experts, kernels_of(Bf16{}).experts, threads); }
void run(const Head<float>& head, int threads) { start(head, kernels_of(float{}).head, threads); }
void run(const Head<Bf16>& head, int threads) { start(head, kernels_of(Bf16{}).head, threads); }

}  // namespace megaforge::decode
