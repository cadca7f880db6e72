// Routing to experts on CPUs: what the implementations take and do. No torch here.
//
// Token t belongs to sequence t % sequences. All tensors are contiguous. T is float or double.
#pragma once

#include <cstdint>

namespace megaforge::moe {

enum class Type : std::uint8_t { f32, bf16, f64 };

struct Rule {
  std::int64_t topk;
  bool sigmoid;
  bool pre_softmax;
  std::int64_t num_groups, group_topk;  // 0: every expert
  double scaling_factor;
};

template <typename T>
struct Route {
  const T* logits;       // [tokens, experts]
  const T* expert_bias;  // [experts] or null
  std::int64_t tokens, sequences, experts;
  Rule rule;
  T* weights;               // [tokens, topk]
  std::int32_t* chosen;     // [tokens, topk]
  T* lse;                   // [tokens]
  std::int32_t* position;   // [tokens, topk]
  std::int64_t* counts;     // [sequences, experts]
  double* probability_sum;  // [sequences, experts]
  double* z_sum;            // [1]
};

template <typename T>
struct RouteBackward {
  const T* logits;
  const std::int32_t* chosen;
  const T* lse;
  const T* dweights;               // or null, like the next three
  const T* dlse;                   // [tokens]
  const T* dprobability_sum;       // [sequences, experts]
  const double* dz_sum;            // [1]
  std::int64_t tokens, sequences, experts;
  Rule rule;
  T* dlogits;
};

// Rows [first, last) of one sequence. The sums are added to.
template <typename T>
struct Part {
  std::int64_t sequence, first, last;
  T* probability_sum;    // [experts]
  std::int32_t* counts;  // [experts]
  double* z_sum;
};

struct Rows {
  Type type;             // of x, y, out
  Type weight_type;      // f32, or f64 for f64 rows
  std::int64_t tokens, width, topk, rows;
  const std::int32_t* position;  // [tokens, topk], -1: dropped
  bool stream;                   // write past the caches
};

// One instruction set's code. Scratch is 64-byte aligned.
template <typename T>
struct RouteKernels {
  std::int64_t (*scratch)(std::int64_t experts, const Rule&);  // bytes
  void (*route)(const Route<T>&, const Part<T>&, void* scratch);
  void (*backward)(const RouteBackward<T>&, std::int64_t first, std::int64_t last, void* scratch);
};

// Tokens [first, last): their rows are theirs alone.
struct RowKernels {
  // rows[position[t, j]] = x[t]
  void (*permute)(const Rows&, const void* x, void* rows, std::int64_t first, std::int64_t last);
  // out[t] = sum over j of weights[t, j] * y[position[t, j]]; weights may be null
  void (*unpermute)(const Rows&, const void* y, const void* weights, void* out, std::int64_t first, std::int64_t last);
  // dy[position[t, j]] = weights[t, j] * grad[t]; dweights[t, j] = grad[t] . y[position[t, j]]
  void (*unpermute_backward)(const Rows&, const void* grad, const void* y, const void* weights, void* dy,
                             void* dweights, std::int64_t first, std::int64_t last);
};

extern const RouteKernels<float> scalar_route_f32;
extern const RouteKernels<double> scalar_route_f64;
extern const RowKernels scalar_rows;
extern const RouteKernels<float> avx2_route_f32, avx512_route_f32;
extern const RowKernels avx2_rows, avx512_rows;

// On at most `threads` threads; no result depends on their number.
template <typename T>
void route(const Route<T>& args, int threads);
template <typename T>
void route_backward(const RouteBackward<T>& args, int threads);
// position [tokens, topk] (-1 where `kept` is false) and counts [experts] of a stable sort by expert.
void permutation(const std::int32_t* chosen, const bool* kept, std::int64_t tokens, std::int64_t topk,
                 std::int64_t experts, std::int32_t* position, std::int64_t* counts, int threads);
// weights [tokens, topk] to their rows; elements of 4 or 8 bytes.
void permute_values(const Rows& rows, const void* values, void* out, int bytes, int threads);
void permute(Rows rows, const void* x, void* out, int threads);
void unpermute(Rows rows, const void* y, const void* weights, void* out, int threads);
void unpermute_backward(Rows rows, const void* grad, const void* y, const void* weights, void* dy, void* dweights,
                        int threads);

}  // namespace megaforge::moe
