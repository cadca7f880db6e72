// Chooses the instruction set, and spreads rows over threads.
#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "pointwise.h"

namespace megaforge::pointwise {
namespace {

constexpr std::int64_t kWorthAThread = 1 << 14;  // numbers
constexpr std::int64_t kPiece = 1 << 12;         // numbers that a thread takes at once, where they have no rows
constexpr std::int64_t kBlocks = 32;             // of rows, at most, whose sums are added up

int used(std::int64_t numbers, std::int64_t pieces, int threads) {
  return static_cast<int>(std::clamp<std::int64_t>(std::min(numbers / kWorthAThread, pieces), 1, std::max(threads, 1)));
}

// body(begin, end) over `rows` rows of `width` numbers.
template <class Body>
void spread(std::int64_t rows, std::int64_t width, int threads, Body body) {
  const int count = used(rows * width, rows, threads);
#pragma omp parallel for schedule(static) num_threads(count) if (count > 1)
  for (int i = 0; i < count; ++i) body(rows * i / count, rows * (i + 1) / count);
}

// body(first, numbers) over `count` numbers.
template <class Body>
void spread_numbers(std::int64_t count, int threads, Body body) {
  const std::int64_t pieces = (count + kPiece - 1) / kPiece;
  spread(pieces, kPiece, threads, [&](std::int64_t begin, std::int64_t end) {
    if (begin < end) body(begin * kPiece, std::min(count, end * kPiece) - begin * kPiece);
  });
}

}  // namespace

const AllKernels& choose() {
  if constexpr (kX86) {
    return best_kernels(scalar_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels);
  } else {
    return best_kernels(scalar_kernels);
  }
}

template <class T>
void norm(const Kernels<T>& kernels, const Norm<T>& args, int threads) {
  spread(args.rows, args.width, threads, [&](std::int64_t begin, std::int64_t end) { kernels.norm(args, begin, end); });
}

template <class T>
void norm_backward(const Kernels<T>& kernels, const NormBackward<T>& args, float* dweight, float* dbias, int threads) {
  // Each block adds up its own gradient of the weights, and blocks are added in their order.
  const std::int64_t size = std::max<std::int64_t>((args.rows + kBlocks - 1) / kBlocks, 16);
  const std::int64_t blocks = (args.rows + size - 1) / size, vectors = args.centered ? 2 : 1;
  std::vector<float> sums(static_cast<std::size_t>(blocks * vectors * args.width));
  const int count = used(args.rows * args.width, blocks, threads);
#pragma omp parallel for schedule(static) num_threads(count) if (count > 1)
  for (std::int64_t block = 0; block < blocks; ++block) {
    float* mine = sums.data() + block * vectors * args.width;
    kernels.norm_backward(args, block * size, std::min(args.rows, (block + 1) * size), mine, mine + (vectors - 1) * args.width);
  }
  for (std::int64_t v = 0; v < vectors; ++v) {
    float* out = v == 0 ? dweight : dbias;
    std::fill(out, out + args.width, 0.0f);
    for (std::int64_t block = 0; block < blocks; ++block) {
      const float* from = sums.data() + (block * vectors + v) * args.width;
      for (std::int64_t i = 0; i < args.width; ++i) out[i] += from[i];
    }
  }
}

template <class T>
void squared_relu(const Kernels<T>& kernels, std::int64_t count, const T* x, T* out, int threads) {
  spread_numbers(count, threads, [&](std::int64_t first, std::int64_t numbers) {
    kernels.squared_relu(numbers, x + first, out + first);
  });
}

template <class T>
void squared_relu_backward(const Kernels<T>& kernels, std::int64_t count, const T* grad, const T* x, T* out, int threads) {
  spread_numbers(count, threads, [&](std::int64_t first, std::int64_t numbers) {
    kernels.squared_relu_backward(numbers, grad + first, x + first, out + first);
  });
}

template <class T>
void activation(const Kernels<T>& kernels, const Activation<T>& args, int threads) {
  spread(args.rows, 2 * args.width, threads, [&](std::int64_t begin, std::int64_t end) {
    (args.grad == nullptr ? kernels.activation : kernels.activation_backward)(args, begin, end);
  });
}

template <class T>
void label_scores(const Kernels<T>& kernels, const Labels& args, const T* logits, float* peak, float* total, float* picked,
                  int threads) {
  spread(args.rows, args.width, threads, [&](std::int64_t begin, std::int64_t end) {
    kernels.label_scores(args, logits, begin, end, peak, total, picked);
  });
}

template <class T>
void label_gradients(const Kernels<T>& kernels, const Labels& args, T* logits, const float* base, const float* share,
                     const float* weight, int threads) {
  spread(args.rows, args.width, threads, [&](std::int64_t begin, std::int64_t end) {
    kernels.label_gradients(args, logits, begin, end, base, share, weight);
  });
}

#define MEGAFORGE_FOR(T)                                                                                             \
  template void norm(const Kernels<T>&, const Norm<T>&, int);                                                        \
  template void norm_backward(const Kernels<T>&, const NormBackward<T>&, float*, float*, int);                       \
  template void squared_relu(const Kernels<T>&, std::int64_t, const T*, T*, int);                                    \
  template void squared_relu_backward(const Kernels<T>&, std::int64_t, const T*, const T*, T*, int);                 \
  template void activation(const Kernels<T>&, const Activation<T>&, int);                                            \
  template void label_scores(const Kernels<T>&, const Labels&, const T*, float*, float*, float*, int);                \
  template void label_gradients(const Kernels<T>&, const Labels&, T*, const float*, const float*, const float*, int);
MEGAFORGE_FOR(float)
MEGAFORGE_FOR(Bf16)

}  // namespace megaforge::pointwise
