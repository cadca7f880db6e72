// The best k of a token's scores: in descending order, ties to the lowest index.
#pragma once

#include "moe_routing.h"
#include "vec.h"

namespace megaforge::moe::MEGAFORGE_MOE_ISA {

// Any k <= n; a NaN counts as the largest. `values` is scratch for k scores.
template <typename T>
MEGAFORGE_INLINE void select_any(const T* scores, std::int64_t n, std::int64_t k, std::int32_t* chosen, T* values) {
  std::int64_t held = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const T x = scores[i];
    std::int64_t place = held;
    while (place > 0 && (x > values[place - 1] || (x != x && values[place - 1] == values[place - 1]))) --place;
    if (place == k) continue;
    held = held < k ? held + 1 : k;
    for (std::int64_t j = held - 1; j > place; --j) {
      values[j] = values[j - 1];
      chosen[j] = chosen[j - 1];
    }
    values[place] = x;
    chosen[place] = static_cast<std::int32_t>(i);
  }
}

// For each of sixteen scores, how many of the first n come before it.
MEGAFORGE_INLINE I ranks(const float* scores, int n) {
  const F x = load(scores);
  const I lane = iota();
  I rank = set(0);
  for (int j = 0; j < n; ++j) {
    const F other = set(scores[j]);
    rank = count(rank, either(less(x, other), both(not_above(x, other), less(set(j), lane))));
  }
  return rank;
}

// As select_any, for scores padded with -infinity to `vectors` vectors. The k-th largest of the maxima of sixteen
// columns is not above the k-th score, so few candidates are left; these are ranked against each other.
MEGAFORGE_INLINE void select(const float* scores, std::int64_t n, int vectors, std::int64_t k, std::int32_t* chosen,
                             float* values) {
  if (k > kLanes) return select_any(scores, n, k, chosen, values);
  alignas(64) float column[kLanes], candidate[kLanes];
  alignas(64) std::int32_t rank[kLanes], index[kLanes];
  F best = load(scores);
  for (int c = 1; c < vectors; ++c) best = max(best, load(scores + c * kLanes));
  store(column, best);
  const I column_rank = ranks(column, kLanes);
  const std::uint32_t kth = bits(both(negated(less(column_rank, set(static_cast<std::int32_t>(k - 1)))),
                                      less(column_rank, set(static_cast<std::int32_t>(k)))));
  if (kth == 0) return select_any(scores, n, k, chosen, values);  // NaNs
  const F threshold = set(column[__builtin_ctz(kth)]);
  int held = 0;
  store(candidate, set(-__builtin_inff()));
  for (int c = 0; c < vectors; ++c) {
    std::uint32_t above = bits(not_above(threshold, load(scores + c * kLanes)));
    for (; above != 0; above &= above - 1) {
      const int i = c * kLanes + __builtin_ctz(above);
      if (i >= n) break;
      if (held == kLanes) return select_any(scores, n, k, chosen, values);
      candidate[held] = scores[i];
      index[held++] = i;
    }
  }
  if (held < k) return select_any(scores, n, k, chosen, values);
  store(rank, ranks(candidate, held));
  for (int i = 0; i < held; ++i) {
    if (rank[i] < k) chosen[rank[i]] = index[i];
  }
}

// Sets the scores of groups that are not among the best to -infinity. `values`: scratch for topk + 2 * groups scores;
// `order` for topk + groups indices.
template <typename T>
MEGAFORGE_INLINE void keep_best_groups(T* scores, std::int64_t experts, const Rule& rule, T* values,
                                       std::int32_t* order) {
  const std::int64_t size = experts / rule.num_groups, each = rule.topk / rule.group_topk;
  T* worth = values + rule.topk;
  for (std::int64_t g = 0; g < rule.num_groups; ++g) {
    select_any(scores + g * size, size, each, order, values);
    worth[g] = 0;
    for (std::int64_t j = 0; j < each; ++j) worth[g] += values[j];
  }
  std::int32_t* groups = order + rule.topk;
  select_any(worth, rule.num_groups, rule.group_topk, groups, worth + rule.num_groups);
  for (std::int64_t g = 0; g < rule.num_groups; ++g) {
    bool kept = false;
    for (std::int64_t j = 0; j < rule.group_topk; ++j) kept |= groups[j] == g;
    if (kept) continue;
    for (std::int64_t e = g * size; e < (g + 1) * size; ++e) scores[e] = -static_cast<T>(__builtin_inf());
  }
}

}  // namespace megaforge::moe::MEGAFORGE_MOE_ISA
