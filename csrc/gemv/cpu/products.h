// The loops over rows, for the instruction set of vec.h; included once by each of its files.

namespace megaforge::gemv::MF_ISA {

// kRows outputs of kTokens tokens from row `n` on; each sum has kChains parts, so that products wait for no sum.
template <class T, int kRows, int kTokens, int kChains, class Y>
inline void rows(const Problem<T, Y>& p, int64_t n) {
  using P = Part<T>;
  constexpr int kStep = kChains * P::kValues;
  const T* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = p.weight + (n + r) * p.stride;
  Vec sums[kRows][kTokens][kChains];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) sums[r][t][c] = zero();
    }
  }
  const int64_t ahead = kRows * p.stride;  // where these rows end and the next begin
  int64_t k = 0;
  for (; k + kStep <= p.k; k += kStep) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      typename P::Values x[kTokens];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) x[t] = P::load(p.x + t * p.k + k + c * P::kValues);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const T* here = row[r] + k + c * P::kValues;
        __builtin_prefetch(here + ahead, 0, 2);  // into the second cache: measured 1.4 times as fast as the first
        const typename P::Values w = P::load(here);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) sums[r][t][c] = P::product(w, x[t], sums[r][t][c]);
      }
    }
  }
  for (; k < p.k; k += P::kValues) {
    const int64_t left = p.k - k;
    const bool whole = left >= P::kValues;
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const T* from = p.x + t * p.k + k;
      const typename P::Values x = whole ? P::load(from) : P::load_some(from, left);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const typename P::Values w = whole ? P::load(row[r] + k) : P::load_some(row[r] + k, left);
        sums[r][t][0] = P::product(w, x, sums[r][t][0]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const float bias = p.bias == nullptr ? 0.0f : as_float(p.bias[n + r]);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      Vec sum = sums[r][t][0];
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) sum = add(sum, sums[r][t][c]);
      store(total(sum) + bias, p.y + t * p.n + n + r);
    }
  }
}

template <class T, int kTokens, class Y>
void by_rows(const Problem<T, Y>& p, int64_t begin, int64_t end) {
  constexpr int kRows = kTokens == 1 ? 4 : kTokens == 2 ? 8 : kTokens <= 4 ? 6 : kTokens <= 6 ? 4 : 3;
  constexpr int kChains = kTokens == 1 ? 4 : 1;
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows) rows<T, kRows, kTokens, kChains>(p, n);
  for (; n < end; ++n) rows<T, 1, kTokens, kChains>(p, n);
}

// Outputs [n, n + kVecs kLanes), or fewer, of a turned matrix: each of its rows is added once for every token. Rows that
// are `far` longer than that are asked for ahead of time, since hardware does not guess so long steps.
template <class T, int kTokens, int kVecs, bool far, class Y>
inline void columns(const Problem<T, Y>& p, int64_t n, int64_t count) {
  Vec sums[kTokens][kVecs];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sums[t][v] = zero();
  }
  const bool whole = count == kVecs * kLanes;
  for (int64_t k = 0; k < p.k; ++k) {
    const T* row = p.weight + k * p.stride + n;
    if constexpr (far) {
#pragma GCC unroll 8
      for (int i = 0; i < kVecs * kLanes; i += 64 / sizeof(T)) __builtin_prefetch(row + 8 * p.stride + i, 0, 3);
    }
    Vec w[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const int64_t left = count - v * kLanes;
      w[v] = whole || left >= kLanes ? load(row + v * kLanes) : left > 0 ? load_some(row + v * kLanes, left) : zero();
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const Vec x = broadcast(as_float(p.x[t * p.k + k]));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sums[t][v] = multiply_add(x, w[v], sums[t][v]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    float out[kVecs * kLanes];
    for (int v = 0; v < kVecs; ++v) store_lanes(sums[t][v], out + v * kLanes);
    for (int64_t i = 0; i < count; ++i) {
      store(out[i] + (p.bias == nullptr ? 0.0f : as_float(p.bias[n + i])), p.y + t * p.n + n + i);
    }
  }
}

template <class T, int kTokens, class Y>
void by_columns(const Problem<T, Y>& p, int64_t begin, int64_t end) {
  constexpr int kVecs = kTokens == 1 ? 8 : kTokens <= 4 ? 4 : 2;
  const bool far = p.stride > 2 * kVecs * kLanes;
  for (int64_t n = begin; n < end; n += kVecs * kLanes) {
    const int64_t count = std::min<int64_t>(kVecs * kLanes, end - n);
    if (far) columns<T, kTokens, kVecs, true>(p, n, count);
    else columns<T, kTokens, kVecs, false>(p, n, count);
  }
}

template <class T, class Y = T, int kTokens = kMostTokens>
void part(const Problem<T, Y>& p, int64_t begin, int64_t end) {
  if constexpr (kTokens > 1) {
    if (p.tokens < kTokens) return part<T, Y, kTokens - 1>(p, begin, end);
  }
  if (p.turned) by_columns<T, kTokens>(p, begin, end);
  else by_rows<T, kTokens>(p, begin, end);
}

}  // namespace megaforge::gemv::MF_ISA
