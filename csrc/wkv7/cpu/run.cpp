// Chooses the instruction set and spreads the heads over threads.
#include <algorithm>
#include <atomic>
#include <new>
#include <stdexcept>

#include "common/isa.h"
#include "wkv7.h"

namespace megaforge::wkv7 {
namespace {

constexpr std::int64_t kVectors = 8;  // of channels, the most that the vector code takes

const Kernels& choose(const Inputs& in) {
  if (in.r.type == Type::f64) return scalar_f64;
  [[maybe_unused]] const Isa isa = cpu_isa();  // a wrong MEGAFORGE_CPU_ISA is an error everywhere
  if constexpr (kX86) {
    if (isa == Isa::avx512 && in.shape.n <= kVectors * 16) return avx512_f32;
    if (isa != Isa::scalar && in.shape.n <= kVectors * 8) return avx2_f32;
  }
  return scalar_f32;
}

template <typename Args>
void run(const Args& args, std::int64_t scratch_bytes,
         void (*kernel)(const Args&, std::int64_t, std::int64_t, void*), int threads) {
  const std::int64_t rows = args.in.shape.b * args.in.shape.h;
  threads = static_cast<int>(std::clamp<std::int64_t>(rows, 1, std::max(threads, 1)));
  std::atomic<bool> out_of_memory{false};  // an exception must not leave a parallel region
#pragma omp parallel num_threads(threads)
  {
    const auto alignment = std::align_val_t(64);
    void* scratch = ::operator new(static_cast<std::size_t>(scratch_bytes), alignment, std::nothrow);
    if (scratch == nullptr) out_of_memory = true;
#pragma omp for schedule(static)
    for (int part = 0; part < threads; ++part) {
      if (scratch != nullptr) kernel(args, rows * part / threads, rows * (part + 1) / threads, scratch);
    }
    ::operator delete(scratch, alignment);
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace

void forward(const Forward& args, int threads) {
  const Kernels& kernels = choose(args.in);
  run(args, kernels.forward_scratch(args), kernels.forward, threads);
}

void backward(const Backward& args, int threads) {
  const Kernels& kernels = choose(args.in);
  run(args, kernels.backward_scratch(args), kernels.backward, threads);
}

}  // namespace megaforge::wkv7
