// One pass from logits to choices, weights and sums; a warp or a part of one for each token, logits in registers.
#include <cuda_runtime.h>

#include "launch.h"

namespace megaforge::moe::cuda {
namespace {

constexpr double kTiny = 1e-20;  // DeepSeek-V3's guard of the normalisation

template <typename T>
__device__ T minus_infinity() {
  return -static_cast<T>(INFINITY);
}

__device__ float exponential(float x) { return expf(x); }
__device__ double exponential(double x) { return exp(x); }
__device__ float logarithm(float x) { return logf(x); }
__device__ double logarithm(double x) { return log(x); }

template <typename T>
__device__ T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}

// Lanes of one token add up in one order, whatever the token.
template <int kLanes, typename T>
__device__ T sum_over(T x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step, kLanes);
  return x;
}

template <int kLanes, typename T>
__device__ T largest_over(T x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, x, step, kLanes);
    x = other > x ? other : x;
  }
  return x;
}

template <typename T>
struct Best {
  T value;
  int index;  // -1: none
};

// A NaN is the largest; ties go to the lowest index; none loses against all.
template <typename T>
__device__ bool before(const Best<T>& a, const Best<T>& b) {
  if (a.index < 0 || b.index < 0) return a.index >= 0;
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.value != b.value) return a.value > b.value;
  return a.index < b.index;
}

template <int kLanes, typename T>
__device__ Best<T> best_over(Best<T> mine) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const Best<T> other = {__shfl_xor_sync(0xffffffffu, mine.value, step, kLanes),
                           __shfl_xor_sync(0xffffffffu, mine.index, step, kLanes)};
    if (before(other, mine)) mine = other;
  }
  return mine;
}

// The best of the token's experts that `open` (a bit for each that this lane holds) names.
template <int kLanes, int kHeld, typename T>
__device__ Best<T> best_of(const T (&choice)[kHeld], unsigned open, int lane) {
  Best<T> mine = {minus_infinity<T>(), -1};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const Best<T> one = {choice[i], (open >> i & 1u) != 0 ? lane + i * kLanes : -1};
    if (before(one, mine)) mine = one;
  }
  return best_over<kLanes>(mine);
}

template <int kLanes, int kHeld>
__device__ unsigned without(unsigned open, int expert, int lane) {
  return expert % kLanes == lane ? open & ~(1u << expert / kLanes) : open;
}

// The bits of `open` that lie in the best groups.
template <int kHeld, typename T>
__device__ unsigned in_best_groups(const T (&choice)[kHeld], unsigned open, int lane, const Rule& rule, int experts) {
  const int size = experts / static_cast<int>(rule.num_groups), each = static_cast<int>(rule.topk / rule.group_topk);
  const auto bits_of = [&](int group) {
    unsigned bits = 0;
    for (int i = 0; i < kHeld; ++i) bits |= static_cast<unsigned>((lane + i * 32) / size == group) << i;
    return bits;
  };
  Best<T> worth = {minus_infinity<T>(), -1};  // lane g holds group g's
  for (int group = 0; group < rule.num_groups; ++group) {
    unsigned left = open & bits_of(group);
    T sum = 0;
    for (int j = 0; j < each; ++j) {
      const Best<T> best = best_of<32>(choice, left, lane);
      sum += best.value;
      left = without<32, kHeld>(left, best.index, lane);
    }
    if (lane == group) worth = {sum, group};
  }
  unsigned kept = 0;
  for (int j = 0; j < rule.group_topk; ++j) {
    const Best<T> best = best_over<32>(worth);
    if (lane == best.index) worth.index = -1;
    kept |= bits_of(best.index);
  }
  return open & kept;
}

template <typename T, int kLanes, int kHeld>
__global__ void __launch_bounds__(kThreads) route_kernel(const Route<T> a, const Partial partial) {
  constexpr int kTokens = kThreads / kLanes;  // at once
  extern __shared__ unsigned char memory[];
  auto* const sums = reinterpret_cast<double*>(memory);                    // [kTokens, experts]
  auto* const counts = reinterpret_cast<int*>(sums + kTokens * a.experts);  // [experts]
  __shared__ double z_sums[kTokens];
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, experts = static_cast<int>(a.experts);
  const int topk = static_cast<int>(a.rule.topk);
  const T scale = static_cast<T>(a.rule.scaling_factor);
  const Share share = share_of(blockIdx.x, a.tokens / a.sequences, a.sequences);
  for (int e = threadIdx.x; e < experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  double total[kHeld] = {}, z_sum = 0;
  // Every lane of a warp takes part in every shuffle: what is past the end works on the last row and keeps nothing.
  for (std::int64_t base = share.first; base < share.last; base += kTokens) {
    const bool valid = base + group < share.last;
    const std::int64_t row = valid ? base + group : share.last - 1;
    const std::int64_t token = row * a.sequences + share.sequence;
    const T* const logits = a.logits + token * experts;
    T logit[kHeld], score[kHeld], choice[kHeld], peak = minus_infinity<T>();
    unsigned open = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int e = lane + i * kLanes;
      const bool real = e < experts;
      logit[i] = real ? logits[e] : minus_infinity<T>();
      score[i] = a.rule.sigmoid ? (real ? sigmoid(logit[i]) : T(0)) : logit[i];
      choice[i] = real && a.expert_bias != nullptr ? score[i] + a.expert_bias[e] : score[i];
      open |= static_cast<unsigned>(real) << i;
      peak = logit[i] > peak ? logit[i] : peak;
    }
    peak = largest_over<kLanes>(peak);
    T whole = 0, scores = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const T x = lane + i * kLanes < experts ? exponential(logit[i] - peak) : T(0);
      whole += x;
      if (a.rule.sigmoid) {
        scores += score[i];
      } else {
        score[i] = x;
      }
    }
    if constexpr (kLanes == 32) {
      if (a.rule.num_groups > 0) {
        T ranked[kHeld];  // probabilities but for a factor, or what is chosen by
        const bool by_probability = a.rule.pre_softmax && !a.rule.sigmoid;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) ranked[i] = by_probability ? score[i] : choice[i];
        open = in_best_groups(ranked, open, lane, a.rule, experts);
      }
    }
    whole = sum_over<kLanes>(whole);
    const T divisor = a.rule.sigmoid ? sum_over<kLanes>(scores) + T(kTiny) : whole;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) total[i] += valid ? static_cast<double>(score[i] / divisor) : 0.0;
    const T lse = peak + logarithm(whole);
    if (valid && lane == 0) {
      a.lse[token] = lse;
      z_sum += static_cast<double>(lse) * static_cast<double>(lse);
    }
    // Lane j % kLanes keeps the j-th choice.
    T* const weights = a.weights + token * topk;
    T highest = minus_infinity<T>(), chosen_sum = 0;
    for (int j = 0; j < topk; ++j) {
      const int expert = best_of<kLanes>(choice, open, lane).index;
      open = without<kLanes, kHeld>(open, expert, lane);
      T mine = 0;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (expert == lane + i * kLanes) mine = a.rule.sigmoid || a.rule.pre_softmax ? score[i] : logit[i];
      }
      const T raw = __shfl_sync(0xffffffffu, mine, expert % kLanes, kLanes);
      highest = raw > highest ? raw : highest;
      chosen_sum += raw;
      if (valid && lane == j % kLanes) {
        weights[j] = raw;
        a.chosen[token * topk + j] = expert;
        atomicAdd(counts + expert, 1);
      }
    }
    if (!a.rule.sigmoid && !a.rule.pre_softmax) {
      chosen_sum = 0;
      for (int j = lane; j < topk && valid; j += kLanes) {
        weights[j] = exponential(weights[j] - highest);
        chosen_sum += weights[j];
      }
      chosen_sum = sum_over<kLanes>(chosen_sum);
    } else if (a.rule.sigmoid) {
      chosen_sum = topk > 1 ? chosen_sum + T(kTiny) : T(1);
    } else {
      chosen_sum = whole;
    }
    for (int j = lane; j < topk && valid; j += kLanes) weights[j] = weights[j] / chosen_sum * scale;
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int e = lane + i * kLanes;
    if (e < experts) sums[group * experts + e] = total[i];
  }
  if (lane == 0) z_sums[group] = z_sum;
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    double sum = 0;
    for (int g = 0; g < kTokens; ++g) sum += sums[g * experts + e];
    partial.probability_sum[static_cast<std::int64_t>(blockIdx.x) * experts + e] = sum;
    partial.counts[static_cast<std::int64_t>(blockIdx.x) * experts + e] = counts[e];
  }
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int g = 0; g < kTokens; ++g) sum += z_sums[g];
    partial.z_sum[blockIdx.x] = sum;
  }
}

// One warp a token; scores are made again, not kept.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const RouteBackward<T> a) {
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (token >= a.tokens) return;  // a whole warp
  const int lane = threadIdx.x % 32, experts = static_cast<int>(a.experts), topk = static_cast<int>(a.rule.topk);
  const T* const logits = a.logits + token * experts;
  const T* const upstream = a.dprobability_sum == nullptr ? nullptr : a.dprobability_sum + token % a.sequences * experts;
  const T* const dweights = a.dweights == nullptr ? nullptr : a.dweights + token * topk;
  const std::int32_t* const chosen = a.chosen + token * topk;
  T* const out = a.dlogits + token * experts;
  const T lse = a.lse[token], scale = static_cast<T>(a.rule.scaling_factor);
  const auto score = [&](int e) { return a.rule.sigmoid ? sigmoid(logits[e]) : exponential(logits[e] - lse); };
  T along = (a.dz_sum == nullptr ? T(0) : T(2) * lse * static_cast<T>(*a.dz_sum)) + (a.dlse == nullptr ? T(0) : a.dlse[token]);
  T dot = 0, total = 0;
  for (int e = lane; e < experts; e += 32) {
    const T s = score(e);
    total += s;
    if (upstream != nullptr) dot += s * upstream[e];
  }
  total = a.rule.sigmoid ? sum_over<32>(total) + T(kTiny) : T(1);
  dot = sum_over<32>(dot) / total;
  // What the weights of the chosen were divided by, and how much of the gradient goes to that.
  T highest = minus_infinity<T>(), divisor = 0, whole = 0;
  const bool renormalised = !a.rule.sigmoid && !a.rule.pre_softmax;
  const auto chosen_score = [&](int j) { return renormalised ? exponential(logits[chosen[j]] - highest) : score(chosen[j]); };
  if (dweights != nullptr) {
    for (int j = lane; j < topk; j += 32) highest = logits[chosen[j]] > highest ? logits[chosen[j]] : highest;
    highest = largest_over<32>(highest);
    for (int j = lane; j < topk; j += 32) {
      divisor += chosen_score(j);
      whole += chosen_score(j) * dweights[j];
    }
    divisor = sum_over<32>(divisor) + (a.rule.sigmoid ? T(kTiny) : T(0));
    whole = sum_over<32>(whole);
    if (!a.rule.sigmoid && a.rule.pre_softmax) along -= whole * scale;
  }
  for (int e = lane; e < experts; e += 32) {
    const T s = score(e), g = upstream == nullptr ? T(0) : upstream[e] - dot;
    out[e] = a.rule.sigmoid ? s * (T(1) - s) * g / total + exponential(logits[e] - lse) * along : s * (g + along);
  }
  if (dweights == nullptr) return;
  __syncwarp();
  for (int j = lane; j < topk; j += 32) {  // experts of a token differ, so that no two lanes meet
    const T s = chosen_score(j);
    T d;
    if (a.rule.sigmoid) {
      d = (topk > 1 ? (dweights[j] - whole / divisor) / divisor : dweights[j]) * s * (T(1) - s);
    } else if (a.rule.pre_softmax) {
      d = dweights[j] * s;
    } else {
      d = s / divisor * (dweights[j] - whole / divisor);
    }
    out[chosen[j]] += scale * d;
  }
}

template <typename T, int kLanes, int kHeld>
int run(const Route<T>& args, const Partial& partial, cudaStream_t stream) {
  const std::int64_t blocks = routing_blocks(args.tokens / args.sequences, args.sequences);
  const std::size_t shared = static_cast<std::size_t>(args.experts) * (kThreads / kLanes * sizeof(double) + sizeof(int));
  route_kernel<T, kLanes, kHeld><<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(args, partial);
  return cudaGetLastError();
}

}  // namespace

template <typename T>
int launch_route(const Route<T>& args, const Partial& partial, void* stream_pointer) {
  auto* const stream = static_cast<cudaStream_t>(stream_pointer);
  const int lanes = lanes_for(args.experts, args.rule.num_groups);
  if (lanes == 8) return run<T, 8, 1>(args, partial, stream);
  if (lanes == 16) return run<T, 16, 1>(args, partial, stream);
  switch (held_by_lane(args.experts, 32)) {
    case 1: return run<T, 32, 1>(args, partial, stream);
    case 2: return run<T, 32, 2>(args, partial, stream);
    case 4: return run<T, 32, 4>(args, partial, stream);
    case 8: return run<T, 32, 8>(args, partial, stream);
    case 16: return run<T, 32, 16>(args, partial, stream);
    default: return run<T, 32, 32>(args, partial, stream);
  }
}

template <typename T>
int launch_route_backward(const RouteBackward<T>& args, void* stream) {
  const auto blocks = static_cast<unsigned>(pieces(args.tokens, kThreads / 32));
  backward_kernel<T><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

template int launch_route(const Route<float>&, const Partial&, void*);
template int launch_route(const Route<double>&, const Partial&, void*);
template int launch_route_backward(const RouteBackward<float>&, void*);
template int launch_route_backward(const RouteBackward<double>&, void*);

}  // namespace megaforge::moe::cuda
