// Registers of the instruction set that MF_ISA names; included once by each of its files.

namespace megaforge::gemv::MF_ISA {

using std::int64_t;

inline float as_float(Bf16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
inline float as_float(float x) { return x; }

inline void store(float x, float* to) { *to = x; }
inline void store(float x, Bf16* to) { *to = nearest_bf16(x); }

#if defined(MEGAFORGE_AVX512)

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

#elif defined(MEGAFORGE_AVX2)

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

#else

constexpr int kLanes = 1;
using Vec = float;

inline Vec zero() { return 0; }
inline Vec broadcast(float x) { return x; }
inline Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline float total(Vec x) { return x; }
inline void store_lanes(Vec x, float* to) { *to = x; }
template <class T>
inline Vec load(const T* from) {
  return as_float(*from);
}
template <class T>
inline Vec load_some(const T*, int64_t) {
  return 0;
}

#endif

// What a product takes at a time of a row and of a vector.
template <class T>
struct Part {
  using Values = Vec;
  static constexpr int kValues = kLanes;
  static Values load(const T* from) { return MF_ISA::load(from); }
  static Values load_some(const T* from, int64_t count) { return MF_ISA::load_some(from, count); }
  static Vec product(Values a, Values b, Vec sum) { return multiply_add(a, b, sum); }
};

#if defined(MEGAFORGE_AVX512_BF16)
template <>
struct Part<Bf16> {
  using Values = __m512i;
  static constexpr int kValues = 32;
  static Values load(const Bf16* from) { return _mm512_loadu_si512(from); }
  static Values load_some(const Bf16* from, int64_t count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1ull), from);
  }
  static Vec product(Values a, Values b, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

}  // namespace megaforge::gemv::MF_ISA
