// Registers of AVX2; included once by its file, behind values.h.

namespace megaforge::gemv::MF_ISA {

constexpr int kLanes = 8;
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline float total(Vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
inline void store_lanes(Vec x, float* to) { _mm256_storeu_ps(to, x); }

inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline Vec load(const Bf16* from) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16));
}
template <class T>
inline Vec load_some(const T* from, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, from, static_cast<std::size_t>(count) * sizeof(T));
  return load(padded);
}

}  // namespace megaforge::gemv::MF_ISA
