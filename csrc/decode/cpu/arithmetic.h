// Functions of numbers and rows, for the instruction set that MF_ISA names; included once by each of its files. Plain
// loops: compilers make them vectors.

namespace megaforge::decode::MF_ISA {

using gemv::MF_ISA::as_float;
using gemv::MF_ISA::store;
using std::int64_t;

struct Range {
  int64_t begin, end;
};

// This thread's part of [0, count), whole granules.
inline Range share(int64_t count, int64_t granule, const Team& team) {
  const int64_t granules = (count + granule - 1) / granule;
  return {std::min(count, granules * team.thread / team.threads * granule),
          std::min(count, granules * (team.thread + 1) / team.threads * granule)};
}

inline void wait_for_all() {
#pragma omp barrier
}

// e^x to 2 units in the last place, within the range of normal numbers (Cephes' polynomial); NaN stays.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // its last bits are the nearest whole number
  const float n = shifted - 12582912.0f;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float scale = std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) + 127u) << 23);
  return (p * r * r + r + 1.0f) * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline float tangent(float x) {
  const float square = x * x;  // near zero the quotient would lose digits
  const float series =
      x * (1 + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835)))));
  const float whole = 1 - 2 / (1 + exponential(2 * x));
  return square < 0.09f ? series : whole;
}

template <Activation kind>
inline float activated(float x) {
  if constexpr (kind == Activation::gelu) {
    return 0.5f * x * (1 + tangent(0.7978845608f * (x + 0.044715f * x * x * x)));
  } else if constexpr (kind == Activation::gelu_exact) {
    return 0.5f * x * (1 + std::erf(x * 0.7071067812f));
  } else if constexpr (kind == Activation::swiglu) {
    return x * sigmoid(x);
  } else {
    const float above = x < 0 ? 0 : x;  // NaN stays
    return above * above;
  }
}

using gemv::MF_ISA::add;
using gemv::MF_ISA::broadcast;
using gemv::MF_ISA::kLanes;
using gemv::MF_ISA::load;
using gemv::MF_ISA::multiply_add;
using gemv::MF_ISA::total;
using gemv::MF_ISA::Vec;
using gemv::MF_ISA::zero;

template <class U, class V>
inline float dot(const U* a, const V* b, int64_t count) {
  Vec sums[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    sums[0] = multiply_add(load(a + i), load(b + i), sums[0]);
    sums[1] = multiply_add(load(a + i + kLanes), load(b + i + kLanes), sums[1]);
  }
  for (; i + kLanes <= count; i += kLanes) sums[0] = multiply_add(load(a + i), load(b + i), sums[0]);
  float sum = total(add(sums[0], sums[1]));
  for (; i < count; ++i) sum += as_float(a[i]) * as_float(b[i]);
  return sum;
}

// The sum of (x + shift)^2, or without `squared` of x + shift.
template <bool squared, class U>
inline float total_of(const U* x, int64_t count, float shift) {
  Vec sums[2] = {zero(), zero()};
  const Vec one = broadcast(1), by = broadcast(shift);
  int64_t i = 0;
  for (int each = 0; i + kLanes <= count; i += kLanes, each ^= 1) {
    const Vec value = add(load(x + i), by);
    sums[each] = multiply_add(value, squared ? value : one, sums[each]);
  }
  float sum = total(add(sums[0], sums[1]));
  for (; i < count; ++i) {
    const float value = as_float(x[i]) + shift;
    sum += squared ? value * value : value;
  }
  return sum;
}

// What a norm subtracts from a row and multiplies it by.
template <class U>
inline void moments(const U* x, int64_t count, bool centred, float epsilon, float& mean, float& scale) {
  const auto number = static_cast<float>(count);
  mean = centred ? total_of<false>(x, count, 0) / number : 0;
  scale = 1.0f / std::sqrt(total_of<true>(x, count, -mean) / number + epsilon);
}

// `factor` times the norm of a row.
template <class U, class V>
inline void normalize(const Norm& norm, const U* x, int64_t count, V* out, float factor = 1) {
  float mean, scale;
  moments(x, count, norm.bias != nullptr, norm.epsilon, mean, scale);
  if (norm.bias == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(as_float(x[i]) * scale * norm.weight[i] * factor, out + i);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    store(((as_float(x[i]) - mean) * scale * norm.weight[i] + norm.bias[i]) * factor, out + i);
  }
}

template <class T>
constexpr bitgemm::Type kTypeOf = sizeof(T) == 4 ? bitgemm::Type::f32 : bitgemm::Type::bf16;

template <class T, class Y>
inline void multiply(const Matrix<T>& matrix, const T* x, int64_t tokens, Y* y, Range range) {
  if (range.begin >= range.end || tokens < 1) return;
  if (matrix.packed != nullptr) {
    bitgemm::multiply_rows(*matrix.packed, {tokens, kTypeOf<T>, x, 8, nullptr, nullptr}, {kTypeOf<Y>, y, nullptr},
                           range.begin, range.end);
    return;
  }
  gemv::MF_ISA::part(gemv::Problem<T, Y>{tokens, matrix.n, matrix.k, x, matrix.data, matrix.stride, matrix.turned,
                                         matrix.bias, y},
                     range.begin, range.end);
}

// Outputs of a product that one thread takes: no two write to one cache line of a row that begins with one.
constexpr int64_t kGranule = 32;

// Of products of which each thread takes the same outputs.
template <class T, class... Others>
inline int64_t granule(const Matrix<T>& matrix, const Others&... others) {
  int64_t largest = matrix.packed == nullptr ? kGranule : std::max(kGranule, matrix.packed->shape.granule());
  if constexpr (sizeof...(others) > 0) largest = std::max(largest, granule(others...));
  return largest;
}

// The product, added to the residual stream: each thread its own outputs.
template <class T>
inline void add_product(const Matrix<T>& matrix, const T* x, int64_t tokens, float* out, float* residual, const Team& team) {
  const Range range = share(matrix.n, granule(matrix), team);
  multiply(matrix, x, tokens, out, range);
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t i = range.begin; i < range.end; ++i) residual[m * matrix.n + i] += out[m * matrix.n + i];
  }
}

// A thread's part of a shift state takes in the tokens, once no thread reads the old ones.
template <class T>
inline void remember(T* shift, const T* normed, int64_t count, const Team& team) {
  const Range range = share(count, 64, team);
  for (int64_t i = range.begin; i < range.end; ++i) shift[i] = normed[i];
}

}  // namespace megaforge::decode::MF_ISA
