// Routing of float logits, sixteen at a time: few experts with a token in each lane, many with a token in each row.
#pragma once

#include "select.h"

namespace megaforge::moe::MF_ISA {

constexpr float kTiny = 1e-20f;  // DeepSeek-V3's guard of the normalisation
constexpr std::int64_t kNarrow = 32, kNarrowTopk = 4;

MEGAFORGE_INLINE int vectors_of(std::int64_t n) { return static_cast<int>((n + kLanes - 1) / kLanes); }

// Sixteen tokens at once, whose best K are kept by insertion.
template <int K>
MEGAFORGE_INLINE void route_narrow(const Route<float>& a, const Part<float>& part, float* scratch) {
  const std::int64_t experts = a.experts, stride = a.sequences * experts;
  float* const logit = scratch;                       // [experts][16]
  float* const score = logit + experts * kLanes;      // [experts][16]
  float* const total = score + experts * kLanes;      // [experts][16]
  const F scale = set(static_cast<float>(a.rule.scaling_factor));
  for (std::int64_t e = 0; e < experts; ++e) store(total + e * kLanes, set(0.0f));
  double z_sum = 0;
  for (std::int64_t row = part.first; row < part.last; row += kLanes) {
    const int n = static_cast<int>(part.last - row < kLanes ? part.last - row : kLanes);
    const std::int64_t token = row * a.sequences + part.sequence;
    const float* const base = a.logits + token * experts;
    F best[K], raw[K], peak = set(-__builtin_inff());
    I index[K];
    for (int j = 0; j < K; ++j) best[j] = raw[j] = set(__builtin_nanf("")), index[j] = set(0);
    for (std::int64_t e = 0; e < experts; ++e) {
      const F x = gather(base + e, stride, n);
      store(logit + e * kLanes, x);
      peak = max(peak, x);
      F chosen_raw = x;
      if (a.rule.sigmoid) {
        chosen_raw = sigmoid(x);
        store(score + e * kLanes, chosen_raw);
      }
      F moved = a.expert_bias == nullptr ? chosen_raw : add(chosen_raw, set(a.expert_bias[e]));
      I moved_index = set(static_cast<std::int32_t>(e));
      M enters = less(set(1.0f), set(0.0f));  // whatever has entered pushes all that follow
      for (int j = 0; j < K; ++j) {
        enters = either(enters, negated(not_above(moved, best[j])));  // an empty place is a NaN
        const F out = best[j], out_raw = raw[j];
        const I out_index = index[j];
        best[j] = pick(enters, moved, out), moved = pick(enters, out, moved);
        raw[j] = pick(enters, chosen_raw, out_raw), chosen_raw = pick(enters, out_raw, chosen_raw);
        index[j] = pick(enters, moved_index, out_index), moved_index = pick(enters, out_index, moved_index);
      }
    }
    F whole = set(0.0f), scores = set(kTiny);
    for (std::int64_t e = 0; e < experts; ++e) {
      const F x = exp_of_negative(sub(load(logit + e * kLanes), peak));
      if (a.rule.sigmoid) {
        scores = add(scores, load(score + e * kLanes));
      } else {
        store(score + e * kLanes, x);
      }
      whole = add(whole, x);
    }
    const M valid = less(iota(), set(n));
    const F share = pick(valid, div(set(1.0f), a.rule.sigmoid ? scores : whole), set(0.0f));
    for (std::int64_t e = 0; e < experts; ++e) {
      store(total + e * kLanes, fma(load(score + e * kLanes), share, load(total + e * kLanes)));
    }
    F weight[K];
    if (a.rule.sigmoid) {
      F chosen = set(kTiny);
      for (int j = 0; j < K; ++j) chosen = add(chosen, raw[j]);
      const F factor = K > 1 ? div(scale, chosen) : scale;
      for (int j = 0; j < K; ++j) weight[j] = mul(raw[j], factor);
    } else {
      F top = peak, chosen = whole;
      if (!a.rule.pre_softmax) {
        top = raw[0], chosen = set(0.0f);
        for (int j = 1; j < K; ++j) top = max(top, raw[j]);
      }
      for (int j = 0; j < K; ++j) weight[j] = exp_of_negative(sub(raw[j], top));
      for (int j = 0; j < K && !a.rule.pre_softmax; ++j) chosen = add(chosen, weight[j]);
      const F factor = div(scale, chosen);
      for (int j = 0; j < K; ++j) weight[j] = mul(weight[j], factor);
    }
    const F lse = add(peak, log_of_positive(whole));
    z_sum += sum(pick(valid, mul(lse, lse), set(0.0f)));
    alignas(64) float lse_lane[kLanes], weight_lane[K][kLanes];
    alignas(64) std::int32_t index_lane[K][kLanes];
    store(lse_lane, lse);
    for (int j = 0; j < K; ++j) store(weight_lane[j], weight[j]), store(index_lane[j], index[j]);
    for (int lane = 0; lane < n; ++lane) {
      const std::int64_t t = token + lane * a.sequences;
      a.lse[t] = lse_lane[lane];
      for (int j = 0; j < K; ++j) {
        a.weights[t * K + j] = weight_lane[j][lane];
        a.chosen[t * K + j] = index_lane[j][lane];
        ++part.counts[index_lane[j][lane]];
      }
    }
  }
  for (std::int64_t e = 0; e < experts; ++e) part.probability_sum[e] += sum(load(total + e * kLanes));
  *part.z_sum += z_sum;
}

// Softmax of `topk` logits into `out`, times `scale`; both padded to whole vectors.
MEGAFORGE_INLINE void softmax_of_chosen(const float* logits, std::int64_t topk, float scale, float* out) {
  const int vectors = vectors_of(topk);
  F peak = load(logits);
  for (int c = 1; c < vectors; ++c) peak = max(peak, load(logits + c * kLanes));
  peak = set(largest(peak));
  F whole = set(0.0f);
  for (int c = 0; c < vectors; ++c) {
    const F x = exp_of_negative(sub(load(logits + c * kLanes), peak));
    store(out + c * kLanes, x);
    whole = add(whole, x);
  }
  const F factor = set(scale / sum(whole));
  for (int c = 0; c < vectors; ++c) store(out + c * kLanes, mul(load(out + c * kLanes), factor));
}

MEGAFORGE_INLINE void route_wide(const Route<float>& a, const Part<float>& part, float* scratch) {
  const std::int64_t experts = a.experts, topk = a.rule.topk, groups = a.rule.num_groups;
  const int vectors = vectors_of(experts), top_vectors = vectors_of(topk);
  const std::int64_t wide = static_cast<std::int64_t>(vectors) * kLanes, top_wide = top_vectors * kLanes;
  float* const choice = scratch;              // [wide]; then exponentials
  float* const score = choice + wide;         // [wide]
  float* const total = score + wide;          // [wide]
  float* const picked = total + wide;         // [top_wide]
  float* const weight = picked + top_wide;    // [top_wide]
  float* const values = weight + top_wide;    // [top_wide + 2 * groups]
  auto* const best = reinterpret_cast<std::int32_t*>(values + top_wide + 2 * groups);  // [top_wide]
  auto* const order = best + top_wide;                                                 // [topk + groups]
  const F minus_infinity = set(-__builtin_inff());
  const auto scale = static_cast<float>(a.rule.scaling_factor);
  for (int c = 0; c < vectors; ++c) store(total + c * kLanes, set(0.0f));
  for (int c = 0; c < top_vectors; ++c) store(picked + c * kLanes, minus_infinity);
  alignas(64) float peaks[kLanes], wholes[kLanes], logs[kLanes];
  double z_sum = 0;
  for (std::int64_t row = part.first; row < part.last; ++row) {
    const std::int64_t token = row * a.sequences + part.sequence;
    const float* const logits = a.logits + token * experts;
    std::int32_t* const chosen = a.chosen + token * topk;
    F peak = minus_infinity, scores = set(0.0f);
    for (int c = 0; c < vectors; ++c) {
      const std::int64_t from = static_cast<std::int64_t>(c) * kLanes;
      const int n = static_cast<int>(experts - from < kLanes ? experts - from : kLanes);
      const F x = n == kLanes ? load(logits + from) : load(logits + from, n, -__builtin_inff());
      F choose = x;
      peak = max(peak, x);
      if (a.rule.sigmoid) {
        const F s = sigmoid(x);  // 0 of the padding's -infinity
        store(score + from, s);
        scores = add(scores, s);
        choose = pick(less(iota(), set(n)), s, minus_infinity);
      }
      if (a.expert_bias != nullptr) choose = add(choose, load(a.expert_bias + from, n, 0.0f));
      store(choice + from, choose);
    }
    if (groups > 0) {
      const bool by_probability = a.rule.pre_softmax && !a.rule.sigmoid;
      if (by_probability) {  // but for a factor
        const F top = set(largest(peak));
        for (int c = 0; c < vectors; ++c) {
          store(score + c * kLanes, exp_of_negative(sub(load(choice + c * kLanes), top)));
        }
      }
      keep_best_groups(choice, by_probability ? score : choice, experts, a.rule, values, order);
    }
    select(choice, experts, vectors, topk, best, values);
    for (std::int64_t j = 0; j < topk; ++j) chosen[j] = best[j];
    const float highest = largest(peak);
    peak = set(highest);
    F whole_lanes = set(0.0f);
    for (int c = 0; c < vectors; ++c) {
      const std::int64_t from = static_cast<std::int64_t>(c) * kLanes;
      const int n = static_cast<int>(experts - from < kLanes ? experts - from : kLanes);
      const F x = n == kLanes ? load(logits + from) : load(logits + from, n, -__builtin_inff());
      const F e = exp_of_negative(sub(x, peak));
      store(choice + from, e);
      whole_lanes = add(whole_lanes, e);
    }
    const float whole = sum(whole_lanes);
    const float share = 1.0f / (a.rule.sigmoid ? sum(scores) + kTiny : whole);
    const float* const probability = a.rule.sigmoid ? score : choice;
    for (int c = 0; c < vectors; ++c) {
      store(total + c * kLanes, fma(load(probability + c * kLanes), set(share), load(total + c * kLanes)));
    }
    float* const weights = a.weights + token * topk;
    if (a.rule.sigmoid) {
      float sum_chosen = kTiny;
      for (std::int64_t j = 0; j < topk; ++j) sum_chosen += score[chosen[j]];
      const float factor = topk > 1 ? scale / sum_chosen : scale;
      for (std::int64_t j = 0; j < topk; ++j) weights[j] = score[chosen[j]] * factor;
    } else if (a.rule.pre_softmax) {
      for (std::int64_t j = 0; j < topk; ++j) weights[j] = choice[chosen[j]] * (share * scale);
    } else {
      for (std::int64_t j = 0; j < topk; ++j) picked[j] = logits[chosen[j]];
      softmax_of_chosen(picked, topk, scale, weight);
      for (std::int64_t j = 0; j < topk; ++j) weights[j] = weight[j];
    }
    for (std::int64_t j = 0; j < topk; ++j) ++part.counts[chosen[j]];
    // Logarithms sixteen rows at a time.
    const int place = static_cast<int>((row - part.first) % kLanes);
    if (place == 0) store(wholes, set(1.0f)), store(peaks, set(0.0f));
    wholes[place] = whole;
    peaks[place] = highest;
    if (place + 1 < kLanes && row + 1 < part.last) continue;
    const F lse = add(load(peaks), log_of_positive(load(wholes)));
    store(logs, lse);
    z_sum += sum(mul(lse, lse));
    for (int i = 0; i <= place; ++i) a.lse[token - (place - i) * a.sequences] = logs[i];
  }
  for (std::int64_t e = 0; e < experts; ++e) part.probability_sum[e] += total[e];
  *part.z_sum += z_sum;
}

inline std::int64_t scratch_bytes(std::int64_t experts, const Rule& rule) {
  const std::int64_t wide = vectors_of(experts) * kLanes, top_wide = vectors_of(rule.topk) * kLanes;
  const std::int64_t narrow = 3 * experts * kLanes;
  const std::int64_t rows = 3 * wide + 4 * top_wide + rule.topk + 3 * rule.num_groups;
  return 4 * (experts <= kNarrow && narrow > rows ? narrow : rows);
}

inline void route_part(const Route<float>& a, const Part<float>& part, void* scratch) {
  auto* const floats = static_cast<float*>(scratch);
  if (a.experts <= kNarrow && a.rule.topk <= kNarrowTopk && a.rule.num_groups == 0) {
    switch (a.rule.topk) {
      case 1: return route_narrow<1>(a, part, floats);
      case 2: return route_narrow<2>(a, part, floats);
      case 3: return route_narrow<3>(a, part, floats);
      default: return route_narrow<4>(a, part, floats);
    }
  }
  route_wide(a, part, floats);
}

inline void backward_part(const RouteBackward<float>& a, std::int64_t first, std::int64_t last, void* scratch) {
  const std::int64_t experts = a.experts, topk = a.rule.topk;
  const int vectors = vectors_of(experts), top_vectors = vectors_of(topk);
  const std::int64_t top_wide = static_cast<std::int64_t>(top_vectors) * kLanes;
  float* const score = static_cast<float*>(scratch);                       // [wide]
  float* const picked = score + static_cast<std::int64_t>(vectors) * kLanes;  // [top_wide]
  float* const weight = picked + top_wide;                                 // [top_wide]
  const auto scale = static_cast<float>(a.rule.scaling_factor);
  const float dz = a.dz_sum == nullptr ? 0.0f : static_cast<float>(*a.dz_sum);
  for (int c = 0; c < top_vectors; ++c) store(picked + c * kLanes, set(-__builtin_inff()));
  for (std::int64_t token = first; token < last; ++token) {
    const float* const logits = a.logits + token * experts;
    float* const out = a.dlogits + token * experts;
    const float* const upstream =
        a.dprobability_sum == nullptr ? nullptr : a.dprobability_sum + token % a.sequences * experts;
    const std::int32_t* const chosen = a.chosen + token * topk;
    const float* const dweights = a.dweights == nullptr ? nullptr : a.dweights + token * topk;
    const F lse = set(a.lse[token]);
    float along = 2.0f * a.lse[token] * dz + (a.dlse == nullptr ? 0.0f : a.dlse[token]);
    F dot_lanes = set(0.0f), total_lanes = set(0.0f);
    for (int c = 0; c < vectors; ++c) {
      const std::int64_t from = static_cast<std::int64_t>(c) * kLanes;
      const int n = static_cast<int>(experts - from < kLanes ? experts - from : kLanes);
      const F x = n == kLanes ? load(logits + from) : load(logits + from, n, -__builtin_inff());
      const F s = a.rule.sigmoid ? sigmoid(x) : exp_of_negative(sub(x, lse));
      store(score + from, s);
      total_lanes = add(total_lanes, s);
      if (upstream != nullptr) dot_lanes = fma(s, load(upstream + from, n, 0.0f), dot_lanes);
    }
    const float share = a.rule.sigmoid ? 1.0f / (sum(total_lanes) + kTiny) : 1.0f;
    const float dot = upstream == nullptr ? 0.0f : sum(dot_lanes) * share;
    if (dweights != nullptr && !a.rule.sigmoid && a.rule.pre_softmax) {
      float whole = 0;
      for (std::int64_t j = 0; j < topk; ++j) whole += dweights[j] * score[chosen[j]];
      along -= whole * scale;
    }
    for (int c = 0; c < vectors; ++c) {
      const std::int64_t from = static_cast<std::int64_t>(c) * kLanes;
      const int n = static_cast<int>(experts - from < kLanes ? experts - from : kLanes);
      const F s = load(score + from);
      const F g = upstream == nullptr ? set(0.0f) : sub(load(upstream + from, n, 0.0f), set(dot));
      F d;
      if (a.rule.sigmoid) {
        const F x = n == kLanes ? load(logits + from) : load(logits + from, n, -__builtin_inff());
        d = mul(mul(s, sub(set(1.0f), s)), mul(g, set(share)));
        d = fma(exp_of_negative(sub(x, lse)), set(along), d);
      } else {
        d = mul(s, add(g, set(along)));
      }
      store(out + from, d, n);
    }
    if (dweights == nullptr) continue;
    if (a.rule.sigmoid) {
      float sum_chosen = kTiny, whole = 0;
      for (std::int64_t j = 0; j < topk; ++j) {
        sum_chosen += score[chosen[j]];
        whole += dweights[j] * score[chosen[j]];
      }
      for (std::int64_t j = 0; j < topk; ++j) {
        const float s = score[chosen[j]];
        const float d = topk > 1 ? (dweights[j] - whole / sum_chosen) / sum_chosen : dweights[j];
        out[chosen[j]] += scale * d * s * (1.0f - s);
      }
    } else if (a.rule.pre_softmax) {
      for (std::int64_t j = 0; j < topk; ++j) out[chosen[j]] += scale * dweights[j] * score[chosen[j]];
    } else {
      for (std::int64_t j = 0; j < topk; ++j) picked[j] = logits[chosen[j]];
      softmax_of_chosen(picked, topk, 1.0f, weight);
      float whole = 0;
      for (std::int64_t j = 0; j < topk; ++j) whole += dweights[j] * weight[j];
      for (std::int64_t j = 0; j < topk; ++j) out[chosen[j]] += scale * weight[j] * (dweights[j] - whole);
    }
  }
}

}  // namespace megaforge::moe::MF_ISA
