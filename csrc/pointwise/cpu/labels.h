// What a cross-entropy takes from rows of logits, for the instruction set of vec.h; included once by each of its files.

namespace megaforge::pointwise::MF_ISA {

template <class T>
void label_scores(const Labels& a, const T* logits, Int begin, Int end, float* peak, float* sums, float* picked) {
  const float nothing = -__builtin_inff();
  for (Int row = begin; row < end; ++row) {
    const T* x = logits + row * a.width;
    Vec most[4] = {all(nothing), all(nothing), all(nothing), all(nothing)};
    Int i = 0;
    for (; i + 4 * kWidth <= a.columns; i += 4 * kWidth) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) most[c] = greater(load(x + i + c * kWidth, All{}), most[c]);
    }
    for (; i + kWidth <= a.columns; i += kWidth) most[0] = greater(load(x + i, All{}), most[0]);
    if (i < a.columns) {
      const Some part{a.columns - i};
      most[1] = greater(keep(load(x + i, part), part, nothing), most[1]);
    }
    const float top = largest(greater(greater(most[0], most[1]), greater(most[2], most[3])));
    peak[row] = top;
    sums[row] = total(a.columns, [&](Int at, auto part) MF_INLINE {
      return keep(exponential<float>(load(x + at, part) - top), part, 0.0f);
    });
    const Int target = a.target[row];
    picked[row] = target >= 0 && target < a.columns ? as_float(x[target]) : 0.0f;
  }
}

template <class T>
void label_gradients(const Labels& a, T* logits, Int begin, Int end, const float* base, const float* share,
                     const float* weight) {
  for (Int row = begin; row < end; ++row) {
    T* x = logits + row * a.width;
    const float from = base[row], factor = share[row];
    const Int target = a.target[row];
    const bool here = target >= 0 && target < a.columns;
    // Before it is rounded: the two may all but cancel.
    const Vec own = here ? exponential<float>(all(as_float(x[target]) - from)) * factor - weight[row] : Vec{};
    across(a.columns, [&](Int i, auto part) MF_INLINE {
      store(x + i, exponential<T>(load(x + i, part) - from) * factor, part);
    });
    across(a.width - a.columns, [&](Int i, auto part) MF_INLINE { store(x + a.columns + i, Vec{}, part); });
    if (here) store(x + target, own, Some{1});
  }
}

}  // namespace megaforge::pointwise::MF_ISA
