// Norms and their gradients, for the instruction set of vec.h; included once by each of its files.

namespace megaforge::pointwise::MF_ISA {

template <class T, bool kCentered>
inline void norm_row(const Norm<T>& a, Int row) {
  const Int from = row * a.width;
  const T* x = a.x + from;
  if (a.update != nullptr) {
    T* sum = a.sum + from;
    across(a.width, [&](Int i, auto part) MF_INLINE { store(sum + i, load(x + i, part) + load(a.update + from + i, part), part); });
    x = sum;
  }
  Vec mean{};
  if constexpr (kCentered) {
    a.mean[row] = total(a.width, [&](Int i, auto part) MF_INLINE { return load(x + i, part); }) / static_cast<float>(a.width);
    mean = all(a.mean[row]);
  }
  const float squares = total(a.width, [&](Int i, auto part) MF_INLINE {
    const Vec apart = kCentered ? keep(load(x + i, part) - mean, part, 0.0f) : load(x + i, part);
    return apart * apart;
  });
  const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(a.width) + a.epsilon);
  a.scale[row] = scale;
  T* out = a.out + from;
  across(a.width, [&](Int i, auto part) MF_INLINE {
    const Vec normed = (kCentered ? load(x + i, part) - mean : load(x + i, part)) * scale;
    const Vec weighted = normed * load(a.weight + i, part);
    store(out + i, a.bias == nullptr ? weighted : weighted + load(a.bias + i, part), part);
  });
}

template <class T>
void norm(const Norm<T>& a, Int begin, Int end) {
  for (Int row = begin; row < end; ++row) {
    if (a.centered) norm_row<T, true>(a, row);
    else norm_row<T, false>(a, row);
  }
}

// kRows rows at once, so that dweight is read and written once for them.
template <class T, bool kCentered, int kRows>
MF_INLINE inline void norm_backward_rows(const NormBackward<T>& a, Int row, float* dweight, float* dbias) {
  Vec along[kRows] = {}, whole[kRows] = {}, scale[kRows], mean[kRows] = {};
  for (int r = 0; r < kRows; ++r) {
    scale[r] = all(a.scale[row + r]);
    if constexpr (kCentered) mean[r] = all(a.mean[row + r]);
  }
  const T* x = a.x + row * a.width;
  const T* grad = a.grad + row * a.width;
  const auto normed = [&](int r, Int i, auto part) MF_INLINE {
    const Vec value = load(x + r * a.width + i, part);
    return (kCentered ? value - mean[r] : value) * scale[r];
  };
  across(a.width, [&](Int i, auto part) MF_INLINE {
    const Vec weight = load(a.weight + i, part);
    Vec weights = load(dweight + i, part), biases{};
    if constexpr (kCentered) biases = load(dbias + i, part);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec g = load(grad + r * a.width + i, part), product = g * normed(r, i, part);
      weights += product;
      along[r] += product * weight;
      if constexpr (kCentered) biases += g, whole[r] += g * weight;
    }
    store(dweight + i, weights, part);
    if constexpr (kCentered) store(dbias + i, biases, part);
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Vec tilt = all(sum(along[r]) / static_cast<float>(a.width)), level = all(sum(whole[r]) / static_cast<float>(a.width));
    const Int at = (row + r) * a.width;
    across(a.width, [&](Int i, auto part) MF_INLINE {
      Vec dx = load(a.grad + at + i, part) * load(a.weight + i, part);
      if constexpr (kCentered) dx -= level;
      dx = (dx - normed(r, i, part) * tilt) * scale[r];
      if (a.grad_sum != nullptr) dx += load(a.grad_sum + at + i, part);
      store(a.dx + at + i, dx, part);
    });
  }
}

template <class T, bool kCentered>
MF_INLINE inline void norm_backward_all(const NormBackward<T>& a, Int begin, Int end, float* dweight, float* dbias) {
  Int row = begin;
  for (; row + 4 <= end; row += 4) norm_backward_rows<T, kCentered, 4>(a, row, dweight, dbias);
  for (; row < end; ++row) norm_backward_rows<T, kCentered, 1>(a, row, dweight, dbias);
}

template <class T>
void norm_backward(const NormBackward<T>& a, Int begin, Int end, float* dweight, float* dbias) {
  if (a.centered) norm_backward_all<T, true>(a, begin, end, dweight, dbias);
  else norm_backward_all<T, false>(a, begin, end, dweight, dbias);
}

}  // namespace megaforge::pointwise::MF_ISA
