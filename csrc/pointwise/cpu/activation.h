// Activations and the softmax of the loss, for the instruction set of vec.h; included once by each of its files.

namespace megaforge::pointwise::MF_ISA {

MF_INLINE inline Vec positive(Vec x) { return x < 0.0f ? Vec{} : x; }  // a NaN stays one

template <class T>
void squared_relu(Int count, const T* x, T* out) {
  across(count, [&](Int i, auto part) MF_INLINE {
    const Vec kept = positive(load(x + i, part));
    store(out + i, kept * kept, part);
  });
}

template <class T>
void squared_relu_backward(Int count, const T* grad, const T* x, T* out) {
  across(count, [&](Int i, auto part) MF_INLINE { store(out + i, load(grad + i, part) * (2.0f * positive(load(x + i, part))), part); });
}

// A gate's value and slope.
template <class T, Gate kGate>
MF_INLINE inline void open(Vec x, Vec& value, Vec& slope) {
  if constexpr (kGate == Gate::silu) {
    const Vec share = sigmoid<T>(x);
    value = x * share;
    slope = share + value * (1.0f - share);
  } else {
    const Vec kept = positive(x);
    value = kept * kept;
    slope = 2.0f * kept;
  }
}

template <class T, Gate kGate>
MF_INLINE inline void gated_rows(const Gated<T>& a, Int begin, Int end) {
  for (Int row = begin; row < end; ++row) {
    const T* x = a.x + row * 2 * a.width;
    T* out = a.out + row * a.width;
    across(a.width, [&](Int i, auto part) MF_INLINE {
      Vec value, slope;
      open<T, kGate>(load(x + i, part), value, slope);
      store(out + i, value * load(x + a.width + i, part), part);
    });
  }
}

template <class T>
void gated(const Gated<T>& a, Int begin, Int end) {
  if (a.gate == Gate::silu) gated_rows<T, Gate::silu>(a, begin, end);
  else gated_rows<T, Gate::squared_relu>(a, begin, end);
}

template <class T, Gate kGate>
MF_INLINE inline void gated_backward_rows(const Gated<T>& a, Int begin, Int end) {
  for (Int row = begin; row < end; ++row) {
    const T* x = a.x + row * 2 * a.width;
    const T* grad = a.grad + row * a.width;
    T* out = a.out + row * 2 * a.width;
    across(a.width, [&](Int i, auto part) MF_INLINE {
      Vec value, slope;
      const Vec g = load(grad + i, part), up = load(x + a.width + i, part);
      open<T, kGate>(load(x + i, part), value, slope);
      store(out + i, g * up * slope, part);
      store(out + a.width + i, g * value, part);
    });
  }
}

template <class T>
void gated_backward(const Gated<T>& a, Int begin, Int end) {
  if (a.gate == Gate::silu) gated_backward_rows<T, Gate::silu>(a, begin, end);
  else gated_backward_rows<T, Gate::squared_relu>(a, begin, end);
}

template <class T>
void softmax_sums(const Softmax<T>& a, const T* logits, Int begin, Int end, float* peak, float* sums, float* picked) {
  const float nothing = -__builtin_inff();
  for (Int row = begin; row < end; ++row) {
    const T* x = logits + row * a.width;
    Vec most[4] = {all(nothing), all(nothing), all(nothing), all(nothing)};
    across(a.valid, [&](Int i, auto part) MF_INLINE {
      Vec& chain = most[i / kWidth % 4];
      chain = greater(keep(load(x + i, part), part, nothing), chain);
    });
    const float top = largest(greater(greater(most[0], most[1]), greater(most[2], most[3])));
    peak[row] = top;
    sums[row] = total(a.valid, [&](Int i, auto part) MF_INLINE { return keep(exponential<float>(load(x + i, part) - top), part, 0.0f); });
    const Int label = a.labels[row];
    picked[row] = label >= 0 && label < a.valid ? as_float(x[label]) : 0.0f;
  }
}

template <class T>
void softmax_gradient(const Softmax<T>& a, T* logits, Int begin, Int end, const float* log_sums, const float* grad) {
  for (Int row = begin; row < end; ++row) {
    T* x = logits + row * a.width;
    const float log_sum = log_sums[row], factor = grad[row];
    const Int label = a.labels[row];
    const bool mine = label >= 0 && label < a.valid;
    const Vec chosen = mine ? (exponential<float>(all(as_float(x[label]) - log_sum)) - 1.0f) * factor : Vec{};
    across(a.valid, [&](Int i, auto part) MF_INLINE { store(x + i, exponential<T>(load(x + i, part) - log_sum) * factor, part); });
    across(a.width - a.valid, [&](Int i, auto part) MF_INLINE { store(x + a.valid + i, Vec{}, part); });
    if (mine) store(x + label, chosen, Some{1});
  }
}

}  // namespace megaforge::pointwise::MF_ISA
