// Scales and results, for the instruction set that MF_ISA names. Products and sums are rounded one after the other, as
// torch does: the barriers keep the compiler from contracting them.

namespace megaforge::bitgemm::MF_ISA {

inline void barrier(float (&x)[kPanel]) { asm volatile("" : "+m"(x)); }

inline void scale(const std::int32_t* sums, int twice, std::int32_t less, const float* scale, bool first,
                  float* total) {
  float scaled[kPanel];
  for (int i = 0; i < kPanel; ++i) scaled[i] = static_cast<float>(twice * sums[i] - less) * scale[i];
  if (first) {
    for (int i = 0; i < kPanel; ++i) total[i] = scaled[i];
    return;
  }
  barrier(scaled);
  for (int i = 0; i < kPanel; ++i) total[i] += scaled[i];
}

inline std::uint16_t as_bf16(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void finish(const float* total, float worth, const float* bias, int count, Type type, void* y) {
  float result[kPanel];
  for (int i = 0; i < kPanel; ++i) result[i] = total[i] * worth;
  if (bias != nullptr) {
    barrier(result);
    for (int i = 0; i < count; ++i) result[i] += bias[i];
  }
  if (type == Type::f32) {
    if (count == kPanel) {
      std::memcpy(y, result, sizeof(result));
    } else {
      std::memcpy(y, result, sizeof(float) * static_cast<std::size_t>(count));
    }
    return;
  }
  std::uint16_t narrow[kPanel];
  for (int i = 0; i < kPanel; ++i) narrow[i] = as_bf16(result[i]);
  std::memcpy(y, narrow, sizeof(std::uint16_t) * static_cast<std::size_t>(count));
}

// The factor of a token whose largest value is `largest`: not most / largest, which torch does not compute either.
inline float factor(float largest, float most) { return 1.0f / largest * most; }

constexpr float kLeast = 1e-5f;
constexpr std::uint32_t kInfinity = 0x7f800000u;

}  // namespace megaforge::bitgemm::MF_ISA
