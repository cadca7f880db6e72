// FFNs, routers and experts, for the instruction set that MF_ISA names; included once by each of its files.

namespace megaforge::decode::MF_ISA {

// The normed tokens, mixed with the ones before where the FFN asks for it; every thread makes all of them.
template <class T>
inline const T* enter(const Block<T>& block, const Entry<T>& entry, T* normed, T* mixed) {
  for (int64_t m = 0; m < block.tokens; ++m) {
    const int64_t row = m * block.hidden;
    normalize(entry.norm, block.x + row, block.hidden, normed + row);
    if (entry.mix == nullptr) continue;
#pragma omp simd
    for (int64_t i = 0; i < block.hidden; ++i) {
      const float now = as_float(normed[row + i]), before = as_float(entry.shift[row + i]);
      store(now + (before - now) * entry.mix[i], mixed + row + i);
    }
  }
  return entry.mix == nullptr ? normed : mixed;
}

// Activated values of one row, times `weight`; `other` are those that a gate multiplies.
template <Activation kind, class T>
inline void activate_row(const float* gate, const float* other, float weight, T* inner, Range range) {
  if constexpr (is_gated(kind)) {
#pragma omp simd
    for (int64_t i = range.begin; i < range.end; ++i) store(activated<kind>(gate[i]) * other[i] * weight, inner + i);
  } else {
#pragma omp simd
    for (int64_t i = range.begin; i < range.end; ++i) store(activated<kind>(gate[i]) * weight, inner + i);
  }
}

template <class T>
inline void activate(Activation kind, const float* gate, const float* other, float weight, T* inner, Range range) {
  switch (kind) {
    case Activation::squared_relu: return activate_row<Activation::squared_relu>(gate, other, weight, inner, range);
    case Activation::gated_squared_relu:
      return activate_row<Activation::gated_squared_relu>(gate, other, weight, inner, range);
    case Activation::swiglu: return activate_row<Activation::swiglu>(gate, other, weight, inner, range);
    case Activation::gelu: return activate_row<Activation::gelu>(gate, other, weight, inner, range);
    case Activation::gelu_exact: return activate_row<Activation::gelu_exact>(gate, other, weight, inner, range);
  }
}

// This thread's part of the activated first product, times a weight for each row.
template <class T>
inline void first_half(const Matrix<T>& matrix, const T* x, int64_t tokens, Activation kind, const float* weights, float* up,
                       T* inner, int64_t width, const Team& team) {
  const Range range = share(width, granule(matrix), team);
  multiply(matrix, x, tokens, up, range);
  if (is_gated(kind)) multiply(matrix, x, tokens, up, {width + range.begin, width + range.end});
  for (int64_t m = 0; m < tokens; ++m) {
    const float* gate = up + m * matrix.n;
    activate(kind, gate, gate + width, weights == nullptr ? 1 : weights[m], inner + m * width, range);
  }
}

template <class T>
void ffn(const Block<T>& block, const FFN<T>& layer, const FFNMemory<T>& memory, const Team& team) {
  const int64_t width = layer.down.k;
  const T* x = enter(block, layer.entry, memory.normed, memory.mixed);
  first_half(layer.up, x, block.tokens, layer.activation, nullptr, memory.up, memory.inner, width, team);
  wait_for_all();
  if (layer.entry.mix != nullptr) remember(layer.entry.shift, memory.normed, block.tokens * block.hidden, team);
  const T* inner = memory.inner;
  if (layer.sub_norm.weight != nullptr) {
    for (int64_t m = 0; m < block.tokens; ++m) {
      normalize(layer.sub_norm, inner + m * width, width, memory.own_inner + m * width);
    }
    inner = memory.own_inner;
  }
  add_product(layer.down, inner, block.tokens, memory.out, block.x, team);
}

template <class T>
void router(const Block<T>& block, const Router<T>& layer, const RouterMemory<T>& memory, const Team& team) {
  const int64_t count = block.tokens * block.hidden;
  const T* x = enter(block, layer.entry, memory.normed, memory.mixed);
  for (int64_t i = 0; i < count; ++i) memory.wide[i] = as_float(x[i]);
  multiply(layer.scores, memory.wide, block.tokens, layer.logits, share(layer.scores.n, 4, team));
  remember(layer.inside, x, count, team);
  if (layer.entry.mix == nullptr) return;
  wait_for_all();
  remember(layer.entry.shift, memory.normed, count, team);
}

// Every expert's rows are split over all threads, so that no two add to the same place.
template <class T>
void experts(const Experts<T>& problem, Team team) {
  Take shared(team.shared), own(team.own);
  for (int64_t e = 0; e < problem.count; ++e) {
    const Expert<T>& expert = problem.experts[e];
    const FFNMemory<T> memory(expert.count, problem.hidden, expert.up, expert.down, shared, own);
    for (int64_t m = 0; m < expert.count; ++m) {
      const T* from = problem.inside + expert.token[m] * problem.hidden;
      std::copy(from, from + problem.hidden, memory.normed + m * problem.hidden);
    }
    const float* weights = expert.sub_norm.weight == nullptr ? expert.weight : nullptr;
    first_half(expert.up, memory.normed, expert.count, problem.activation, weights, memory.up, memory.inner, expert.down.k,
               team);
  }
  wait_for_all();
  shared = Take(team.shared);
  own = Take(team.own);
  for (int64_t e = 0; e < problem.count; ++e) {
    const Expert<T>& expert = problem.experts[e];
    const FFNMemory<T> memory(expert.count, problem.hidden, expert.up, expert.down, shared, own);
    const T* inner = memory.inner;
    const int64_t width = expert.down.k;
    if (expert.sub_norm.weight != nullptr) {
      for (int64_t m = 0; m < expert.count; ++m) {
        normalize(expert.sub_norm, inner + m * width, width, memory.own_inner + m * width, expert.weight[m]);
      }
      inner = memory.own_inner;
    }
    const Range range = share(problem.hidden, kGranule, team);
    multiply(expert.down, inner, expert.count, memory.out, range);
    for (int64_t m = 0; m < expert.count; ++m) {
      float* to = problem.x + expert.token[m] * problem.hidden;
      for (int64_t i = range.begin; i < range.end; ++i) to[i] += memory.out[m * problem.hidden + i];
    }
  }
}

}  // namespace megaforge::decode::MF_ISA
