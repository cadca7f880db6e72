// Registers of AVX-512; included once by each of its files, behind values.h.

namespace megaforge::gemv::MF_ISA {

constexpr int kLanes = 16;
using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline float total(Vec x) { return _mm512_reduce_add_ps(x); }
inline void store_lanes(Vec x, float* to) { _mm512_storeu_ps(to, x); }

inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec load(const Bf16* from) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}
// The first `count` < kLanes, then zeros; nothing beyond them is read.
inline Vec load_some(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), from);
}
inline Vec load_some(const Bf16* from, int64_t count) {
  const __m256i some = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16));
}

}  // namespace megaforge::gemv::MF_ISA
