// The best k of a token's scores: in descending order, ties to the lowest index.
#pragma once

#include "moe_routing.h"
#include "vec.h"

namespace megaforge::moe::MF_ISA {

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

// For each of sixteen scores, how many are larger.
MEGAFORGE_INLINE I larger_ones(const float* scores) {
  const F x = load(scores);
  I rank = set(0);
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) rank = count(rank, less(x, set(scores[j])));
  return rank;
}

// For each of sixteen scores, how many come before it.
MEGAFORGE_INLINE I ranks_of_equals(const float* scores) {
  const F x = load(scores);
  const I lane = iota();
  I rank = set(0);
  for (int j = 0; j < kLanes; ++j) {
    const F other = set(scores[j]);
    rank = count(rank, either(less(x, other), both(not_above(x, other), less(set(j), lane))));
  }
  return rank;
}

// As select_any, for scores padded with -infinity to `vectors` vectors; `chosen` and `values` have room for a whole
// number of vectors. The k-th largest of the maxima of sixteen columns is not above the k-th score, so few candidates
// are left; these are ranked against each other.
MEGAFORGE_INLINE void select(const float* scores, std::int64_t n, int vectors, std::int64_t k, std::int32_t* chosen,
                             float* values) {
  if (k > kLanes) return select_any(scores, n, k, chosen, values);
  alignas(64) float column[kLanes], candidate[2 * kLanes];
  alignas(64) std::int32_t rank[kLanes], index[2 * kLanes];
  F best = load(scores);
  for (int c = 1; c < vectors; ++c) best = max(best, load(scores + c * kLanes));
  store(column, best);
  const M among = less(larger_ones(column), set(static_cast<std::int32_t>(k)));
  const F threshold = set(least(among, best));
  const F nothing = set(__builtin_nanf(""));
  store(candidate, nothing);
  int held = 0;
  for (int c = 0; c < vectors && held <= kLanes; ++c) {
    const F x = load(scores + c * kLanes);
    const I i = offset(iota(), c * kLanes);
    held += compress(candidate + held, index + held, x, i, not_above(threshold, x));
  }
  // Too many equal ones, NaNs, or padding.
  if (held > kLanes || held < k || index[held - 1] >= n) return select_any(scores, n, k, chosen, values);
  store(candidate + held, nothing);
  I before = larger_ones(candidate);
  if (total(before) != held * (held - 1) / 2) before = ranks_of_equals(candidate);  // two share a rank
  store(rank, before);
  for (int i = kLanes - 1; i >= 0; --i) {  // what is not held has rank 0 and is overwritten
    chosen[rank[i]] = index[i];
    values[rank[i]] = candidate[i];
  }
}

// Sets the scores of groups that are not among the best to -infinity; groups are ranked by `ranked`, which may be
// `scores`. `values`: scratch for topk + 2 * groups scores; `order` for topk + groups indices.
template <typename T>
MEGAFORGE_INLINE void keep_best_groups(T* scores, const T* ranked, std::int64_t experts, const Rule& rule, T* values,
                                       std::int32_t* order) {
  const std::int64_t size = experts / rule.num_groups, each = rule.topk / rule.group_topk;
  T* worth = values + rule.topk;
  for (std::int64_t g = 0; g < rule.num_groups; ++g) {
    const T* const group = ranked + g * size;
    if (each <= 2) {
      T first = -static_cast<T>(__builtin_inf()), second = first;
      for (std::int64_t e = 0; e < size; ++e) {
        const T smaller = group[e] < first ? group[e] : first;
        first = group[e] < first ? first : group[e];
        second = smaller < second ? second : smaller;
      }
      worth[g] = each == 1 ? first : first + second;
      continue;
    }
    select_any(group, size, each, order, values);
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

}  // namespace megaforge::moe::MF_ISA
