// Activations, for the instruction set of vec.h; included once by each of its files.

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

template <class T, Gate kGate, bool kGated>
MF_INLINE inline void activation_rows(const Activation<T>& a, Int begin, Int end) {
  for (Int row = begin; row < end; ++row) {
    const T* x = a.x + row * (kGated ? 2 : 1) * a.width;
    T* out = a.out + row * a.width;
    const float weight = a.weights == nullptr ? 1.0f : a.weights[row];
    across(a.width, [&](Int i, auto part) MF_INLINE {
      Vec value, slope;
      open<T, kGate>(load(x + i, part), value, slope);
      if constexpr (kGated) value *= load(x + a.width + i, part);
      store(out + i, value * weight, part);
    });
  }
}

template <class T, Gate kGate, bool kGated>
MF_INLINE inline void activation_backward_rows(const Activation<T>& a, Int begin, Int end) {
  for (Int row = begin; row < end; ++row) {
    const T* x = a.x + row * (kGated ? 2 : 1) * a.width;
    const T* grad = a.grad + row * a.width;
    T* out = a.out + row * (kGated ? 2 : 1) * a.width;
    const float weight = a.weights == nullptr ? 1.0f : a.weights[row];
    // What the weight's gradient sums up.
    const auto term = [&](Int i, auto part) MF_INLINE {
      Vec value, slope;
      const Vec g = load(grad + i, part), own = g * weight;
      open<T, kGate>(load(x + i, part), value, slope);
      if constexpr (!kGated) {
        store(out + i, own * slope, part);
        return g * value;
      } else {
        const Vec up = load(x + a.width + i, part);
        store(out + i, own * up * slope, part);
        store(out + a.width + i, own * value, part);
        return g * value * up;
      }
    };
    if (a.weights != nullptr) a.dweights[row] = total(a.width, term);
    else across(a.width, term);
  }
}

template <class T>
void activation(const Activation<T>& a, Int begin, Int end) {
  if (!a.gated) activation_rows<T, Gate::squared_relu, false>(a, begin, end);
  else if (a.gate == Gate::silu) activation_rows<T, Gate::silu, true>(a, begin, end);
  else activation_rows<T, Gate::squared_relu, true>(a, begin, end);
}

template <class T>
void activation_backward(const Activation<T>& a, Int begin, Int end) {
  if (!a.gated) activation_backward_rows<T, Gate::squared_relu, false>(a, begin, end);
  else if (a.gate == Gate::silu) activation_backward_rows<T, Gate::silu, true>(a, begin, end);
  else activation_backward_rows<T, Gate::squared_relu, true>(a, begin, end);
}

}  // namespace megaforge::pointwise::MF_ISA
