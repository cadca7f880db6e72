// Chooses the instruction set, spreads tokens over threads, and orders assignments by expert.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/isa.h"
#include "common/scratch.h"
#include "moe_routing.h"

namespace megaforge::moe {
namespace {

constexpr std::int64_t kRowsAtOnce = 128;           // of one sequence: sums are made in this order, whoever makes them
constexpr std::int64_t kTokensAtOnce = 64;          // handed to a thread together
constexpr std::int64_t kWorthAThread = 1 << 14;     // elements
constexpr std::int64_t kPastCaches = 8ll << 20;     // bytes of output that are not expected to stay in a cache

template <typename T>
const RouteKernels<T>& route_kernels() {
  if constexpr (std::is_same_v<T, double>) {
    return best_kernels(scalar_route_f64);
  } else if constexpr (kX86) {
    return best_kernels(scalar_route_f32, avx2_route_f32, avx512_route_f32, avx512_route_f32);
  } else {
    return best_kernels(scalar_route_f32);
  }
}

const RowKernels& row_kernels([[maybe_unused]] Type type) {
  if constexpr (kX86) {
    if (type != Type::f64) return best_kernels(scalar_rows, avx2_rows, avx512_rows, avx512_rows);
  }
  return best_kernels(scalar_rows);
}

int useful_threads(int threads, std::int64_t elements, std::int64_t pieces) {
  const std::int64_t most = std::min(pieces, elements / kWorthAThread + 1);
  return static_cast<int>(std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(most, 1)));
}

// In: assignments of every block to every expert, counts [blocks, experts]. Out: where each block's first one goes.
// Returns the totals in `totals` [experts].
void starts(std::vector<std::int32_t>& counts, std::int64_t blocks, std::int64_t experts, std::int64_t* totals) {
  std::fill_n(totals, experts, 0);
  for (std::int64_t block = 0; block < blocks; ++block) {
    for (std::int64_t e = 0; e < experts; ++e) totals[e] += counts[block * experts + e];
  }
  std::vector<std::int32_t> next(experts);
  std::int64_t sum = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    next[e] = static_cast<std::int32_t>(sum);
    sum += totals[e];
  }
  for (std::int64_t block = 0; block < blocks; ++block) {
    for (std::int64_t e = 0; e < experts; ++e) {
      const std::int32_t count = counts[block * experts + e];
      counts[block * experts + e] = next[e];
      next[e] += count;
    }
  }
}

void place(const std::int32_t* chosen, const bool* kept, std::int64_t first, std::int64_t last, std::int32_t* next,
           std::int32_t* position) {
  for (std::int64_t a = first; a < last; ++a) {
    position[a] = kept == nullptr || kept[a] ? next[chosen[a]]++ : -1;
  }
}

template <typename Body>
void over_tokens(std::int64_t tokens, std::int64_t elements, int threads, const Body& body) {
  const std::int64_t pieces = (tokens + kTokensAtOnce - 1) / kTokensAtOnce;
  threads = useful_threads(threads, elements, pieces);
  const std::int64_t share = (pieces + threads - 1) / std::max(threads, 1) * kTokensAtOnce;
  if (threads == 1) return body(0, 0, tokens);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) {
    const std::int64_t first = std::min(tokens, thread * share);
    body(thread, first, std::min(tokens, first + share));
  }
}

}  // namespace

template <typename T>
void route(const Route<T>& args, int threads) {
  const RouteKernels<T>& kernels = route_kernels<T>();
  const std::int64_t sequences = args.sequences, experts = args.experts, rows = args.tokens / std::max<std::int64_t>(sequences, 1);
  const std::int64_t blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce, parts = blocks * sequences;
  threads = useful_threads(threads, args.tokens * experts, parts);
  const Scratch scratch(threads, kernels.scratch(experts, args.rule));
  std::vector<T> probability_sum(parts * experts);
  std::vector<std::int32_t> counts(parts * experts);
  std::vector<double> z_sum(parts);
  const auto part = [&](int thread, std::int64_t index) {
    const std::int64_t first = index / sequences * kRowsAtOnce;
    const Part<T> what = {index % sequences, first, std::min(rows, first + kRowsAtOnce),
                          probability_sum.data() + index * experts, counts.data() + index * experts, &z_sum[index]};
    kernels.route(args, what, scratch.of(thread));
  };
  const std::int64_t share = (parts + threads - 1) / threads;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int thread = 0; thread < threads; ++thread) {
    for (std::int64_t index = thread * share; index < std::min(parts, (thread + 1) * share); ++index) part(thread, index);
  }
  std::fill_n(args.counts, sequences * experts, 0);
  std::fill_n(args.probability_sum, sequences * experts, 0.0);
  std::vector<std::int32_t> block_counts(blocks * experts);
  std::vector<std::int64_t> totals(experts);
  *args.z_sum = 0;
  for (std::int64_t index = 0; index < parts; ++index) {
    std::int64_t* const count = args.counts + index % sequences * experts;
    double* const probability = args.probability_sum + index % sequences * experts;
    std::int32_t* const block = block_counts.data() + index / sequences * experts;
    for (std::int64_t e = 0; e < experts; ++e) {
      count[e] += counts[index * experts + e];
      block[e] += counts[index * experts + e];
      probability[e] += probability_sum[index * experts + e];
    }
    *args.z_sum += z_sum[index];
  }
  starts(block_counts, blocks, experts, totals.data());
  const std::int64_t assignments = kRowsAtOnce * sequences * args.rule.topk;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t block = 0; block < blocks; ++block) {
    place(args.chosen, nullptr, block * assignments,
          std::min((block + 1) * assignments, args.tokens * args.rule.topk), block_counts.data() + block * experts,
          args.position);
  }
}

template <typename T>
void route_backward(const RouteBackward<T>& args, int threads) {
  const RouteKernels<T>& kernels = route_kernels<T>();
  const Scratch scratch(std::max(threads, 1), kernels.scratch(args.experts, args.rule));
  over_tokens(args.tokens, args.tokens * args.experts, threads, [&](int thread, std::int64_t first, std::int64_t last) {
    kernels.backward(args, first, last, scratch.of(thread));
  });
}

template void route(const Route<float>&, int);
template void route(const Route<double>&, int);
template void route_backward(const RouteBackward<float>&, int);
template void route_backward(const RouteBackward<double>&, int);

void permutation(const std::int32_t* chosen, const bool* kept, std::int64_t tokens, std::int64_t topk,
                 std::int64_t experts, std::int32_t* position, std::int64_t* counts, int threads) {
  const std::int64_t total = tokens * topk, each = std::max<std::int64_t>(4096, 16 * experts);
  const std::int64_t blocks = (total + each - 1) / each;
  std::vector<std::int32_t> next(blocks * experts);
  threads = useful_threads(threads, total, blocks);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t block = 0; block < blocks; ++block) {
    for (std::int64_t a = block * each; a < std::min(total, (block + 1) * each); ++a) {
      if (kept == nullptr || kept[a]) ++next[block * experts + chosen[a]];
    }
  }
  starts(next, blocks, experts, counts);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t block = 0; block < blocks; ++block) {
    place(chosen, kept, block * each, std::min(total, (block + 1) * each), next.data() + block * experts, position);
  }
}

void permute_values(const Rows& rows, const void* values, void* out, int bytes, int threads) {
  over_tokens(rows.tokens, rows.tokens * rows.topk, threads, [&](int, std::int64_t first, std::int64_t last) {
    for (std::int64_t a = first * rows.topk; a < last * rows.topk; ++a) {
      if (rows.position[a] < 0) continue;
      std::memcpy(static_cast<char*>(out) + std::int64_t{rows.position[a]} * bytes,
                  static_cast<const char*>(values) + a * bytes, bytes);
    }
  });
}

void permute(Rows rows, const void* x, void* out, int threads) {
  const RowKernels& kernels = row_kernels(rows.type == Type::f64 ? Type::f32 : rows.type);  // it only copies
  rows.stream = rows.rows * rows.width * (rows.type == Type::bf16 ? 2 : 4) > kPastCaches;
  over_tokens(rows.tokens, rows.rows * rows.width, threads,
              [&](int, std::int64_t first, std::int64_t last) { kernels.permute(rows, x, out, first, last); });
}

void unpermute(Rows rows, const void* y, const void* weights, void* out, int threads) {
  const RowKernels& kernels = row_kernels(rows.type);
  rows.stream = rows.tokens * rows.width * (rows.type == Type::bf16 ? 2 : 4) > kPastCaches;
  over_tokens(rows.tokens, rows.rows * rows.width, threads, [&](int, std::int64_t first, std::int64_t last) {
    kernels.unpermute(rows, y, weights, out, first, last);
  });
}

void unpermute_backward(Rows rows, const void* grad, const void* y, const void* weights, void* dy, void* dweights,
                        int threads) {
  const RowKernels& kernels = row_kernels(rows.type);
  rows.stream = rows.rows * rows.width * (rows.type == Type::bf16 ? 2 : 4) > kPastCaches;
  over_tokens(rows.tokens, rows.rows * rows.width, threads, [&](int, std::int64_t first, std::int64_t last) {
    kernels.unpermute_backward(rows, grad, y, weights, dy, dweights, first, last);
  });
}

}  // namespace megaforge::moe
