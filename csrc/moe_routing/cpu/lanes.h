// Sixteen floats in pieces of MF_PIECE, which is what a register has: two of AVX2, four of SSE or NEON.
#pragma once

#define MEGAFORGE_INLINE inline __attribute__((always_inline))

namespace megaforge::moe::MF_ISA {

constexpr int kLanes = 16;

constexpr int kPiece = MF_PIECE;
constexpr int kPieces = kLanes / kPiece;
typedef float FPiece __attribute__((vector_size(4 * kPiece)));
typedef std::int32_t IPiece __attribute__((vector_size(4 * kPiece)));
typedef std::uint32_t UPiece __attribute__((vector_size(4 * kPiece)));
typedef std::uint16_t HPiece __attribute__((vector_size(2 * kPiece)));
struct F { FPiece at[kPieces]; };
struct I { IPiece at[kPieces]; };
using M = I;  // all bits of a lane, or none

#define MEGAFORGE_PIECES(Result, expression) \
  Result out;                                \
  for (int p = 0; p < kPieces; ++p) out.at[p] = (expression); \
  return out

MEGAFORGE_INLINE F set(float x) { MEGAFORGE_PIECES(F, FPiece{} + x); }
MEGAFORGE_INLINE I set(std::int32_t x) { MEGAFORGE_PIECES(I, IPiece{} + x); }
MEGAFORGE_INLINE I load(const std::int32_t* from) { I x; __builtin_memcpy(&x, from, sizeof x); return x; }
MEGAFORGE_INLINE I iota() {
  alignas(64) static constexpr std::int32_t lanes[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(lanes);
}
MEGAFORGE_INLINE F load(const float* from) { F x; __builtin_memcpy(&x, from, sizeof x); return x; }
MEGAFORGE_INLINE F load(const float* from, int n, float rest) {
  alignas(64) float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane < n ? from[lane] : rest;
  return load(lanes);
}
MEGAFORGE_INLINE void store(float* to, F x) { __builtin_memcpy(to, &x, sizeof x); }
MEGAFORGE_INLINE void store(float* to, F x, int n) {
  if (n == kLanes) return store(to, x);
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (int lane = 0; lane < n; ++lane) to[lane] = lanes[lane];
}
MEGAFORGE_INLINE void store(std::int32_t* to, I x) { __builtin_memcpy(to, &x, sizeof x); }
MEGAFORGE_INLINE F gather(const float* from, std::int64_t stride, int n) {
  alignas(64) float lanes[kLanes] = {};
  for (int lane = 0; lane < n; ++lane) lanes[lane] = from[lane * stride];
  return load(lanes);
}
MEGAFORGE_INLINE F add(F a, F b) { MEGAFORGE_PIECES(F, a.at[p] + b.at[p]); }
MEGAFORGE_INLINE F sub(F a, F b) { MEGAFORGE_PIECES(F, a.at[p] - b.at[p]); }
MEGAFORGE_INLINE F mul(F a, F b) { MEGAFORGE_PIECES(F, a.at[p] * b.at[p]); }
MEGAFORGE_INLINE F div(F a, F b) { MEGAFORGE_PIECES(F, a.at[p] / b.at[p]); }
MEGAFORGE_INLINE F fma(F a, F b, F c) { MEGAFORGE_PIECES(F, a.at[p] * b.at[p] + c.at[p]); }
MEGAFORGE_INLINE F max(F a, F b) { MEGAFORGE_PIECES(F, a.at[p] > b.at[p] ? a.at[p] : b.at[p]); }
MEGAFORGE_INLINE F negative_abs(F x) {
  MEGAFORGE_PIECES(F, reinterpret_cast<FPiece>(reinterpret_cast<IPiece>(x.at[p]) | INT32_MIN));
}
MEGAFORGE_INLINE M less(F a, F b) { MEGAFORGE_PIECES(M, a.at[p] < b.at[p]); }
MEGAFORGE_INLINE M not_above(F a, F b) { MEGAFORGE_PIECES(M, a.at[p] <= b.at[p]); }
MEGAFORGE_INLINE M less(I a, I b) { MEGAFORGE_PIECES(M, a.at[p] < b.at[p]); }
MEGAFORGE_INLINE M negated(M m) { MEGAFORGE_PIECES(M, ~m.at[p]); }
MEGAFORGE_INLINE M either(M a, M b) { MEGAFORGE_PIECES(M, a.at[p] | b.at[p]); }
MEGAFORGE_INLINE M both(M a, M b) { MEGAFORGE_PIECES(M, a.at[p] & b.at[p]); }
MEGAFORGE_INLINE I pick(M m, I yes, I no) { MEGAFORGE_PIECES(I, (m.at[p] & yes.at[p]) | (~m.at[p] & no.at[p])); }
MEGAFORGE_INLINE F pick(M m, F yes, F no) {
  MEGAFORGE_PIECES(F, reinterpret_cast<FPiece>((m.at[p] & reinterpret_cast<IPiece>(yes.at[p])) |
                                               (~m.at[p] & reinterpret_cast<IPiece>(no.at[p]))));
}
MEGAFORGE_INLINE I count(I x, M m) { MEGAFORGE_PIECES(I, x.at[p] - m.at[p]); }
MEGAFORGE_INLINE I offset(I x, std::int32_t by) { MEGAFORGE_PIECES(I, x.at[p] + by); }
MEGAFORGE_INLINE F round(F x) { MEGAFORGE_PIECES(F, (x.at[p] + 12582912.0f) - 12582912.0f); }  // |x| < 2^22
MEGAFORGE_INLINE F times_power_of_two(F x, F n) {
  const F factor = [&] {
    MEGAFORGE_PIECES(F, reinterpret_cast<FPiece>((__builtin_convertvector(n.at[p], IPiece) + 127) << 23));
  }();
  return pick(less(n, set(-126.0f)), set(0.0f), mul(x, factor));
}
MEGAFORGE_INLINE float sum(F x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}
MEGAFORGE_INLINE std::int32_t total(I x) {
  alignas(64) std::int32_t lanes[kLanes];
  store(lanes, x);
  std::int32_t out = 0;
  for (int lane = 0; lane < kLanes; ++lane) out += lanes[lane];
  return out;
}
MEGAFORGE_INLINE float largest(F x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  float out = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) out = lanes[lane] > out ? lanes[lane] : out;
  return out;
}
MEGAFORGE_INLINE float least(M m, F x) {
  return -largest(pick(m, sub(set(0.0f), x), set(-__builtin_inff())));
}
MEGAFORGE_INLINE F exponent(F x) {
  MEGAFORGE_PIECES(F, __builtin_convertvector(((reinterpret_cast<IPiece>(x.at[p]) >> 23) & 255) - 127, FPiece));
}
MEGAFORGE_INLINE F mantissa(F x) {
  MEGAFORGE_PIECES(F, reinterpret_cast<FPiece>((reinterpret_cast<IPiece>(x.at[p]) & 0x007fffff) | 0x3f800000));
}
MEGAFORGE_INLINE F load(const std::uint16_t* from) {
  HPiece narrow[kPieces];
  __builtin_memcpy(narrow, from, sizeof narrow);
  MEGAFORGE_PIECES(F, reinterpret_cast<FPiece>(__builtin_convertvector(narrow[p], UPiece) << 16));
}

// To the nearest bf16, ties to even; a NaN stays one.
MEGAFORGE_INLINE void store(std::uint16_t* to, F x) {
  HPiece narrow[kPieces];
  for (int p = 0; p < kPieces; ++p) {
    const auto b = reinterpret_cast<UPiece>(x.at[p]);
    const auto is_nan = reinterpret_cast<UPiece>(x.at[p] != x.at[p]);
    const UPiece rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    narrow[p] = __builtin_convertvector((is_nan & ((b >> 16) | 0x40u)) | (~is_nan & rounded), HPiece);
  }
  __builtin_memcpy(to, narrow, sizeof narrow);
}

}  // namespace megaforge::moe::MF_ISA
