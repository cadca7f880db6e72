// Loads and stores of the types that tokens and results have, and of 16 bytes of weights or codes.
#pragma once

#include "../../common/block.h"
#include "launch.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace megaforge::bitgemm {

struct alignas(16) Words {
  std::uint32_t at[4];
};

MF_DEVICE Words load_words(const void* from) {
  Words words;
#ifdef __CUDACC__
  const uint4 loaded = __ldg(static_cast<const uint4*>(from));
  words.at[0] = loaded.x, words.at[1] = loaded.y, words.at[2] = loaded.z, words.at[3] = loaded.w;
#else
  std::memcpy(&words, from, sizeof(words));
#endif
  return words;
}

using megaforge::to_float;

MF_DEVICE float to_float(Fp16 x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  _Float16 value;
  std::memcpy(&value, &x, 2);
  return static_cast<float>(value);
#endif
}

MF_DEVICE Fp16 to_fp16(float x) {
#ifdef __CUDACC__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const auto value = static_cast<_Float16>(x);
  Fp16 result;
  std::memcpy(&result, &value, 2);
  return result;
#endif
}

MF_DEVICE std::uint32_t bits_of(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

MF_DEVICE float from_bits(std::uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

// Single operations, each rounded, which no compiler fuses.
MF_DEVICE float times(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

MF_DEVICE float plus(float a, float b) {
#ifdef __CUDACC__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

MF_DEVICE float divided(float a, float b) {
#ifdef __CUDACC__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

MF_DEVICE int nearest_int(float x) {
#ifdef __CUDACC__
  return __float2int_rn(x);
#else
  return static_cast<int>(nearbyintf(x));
#endif
}

// Neighbours that one load brings, aligned to all of them.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

template <class T>
MF_DEVICE Four<T> load_four(const T* from) {
#ifdef __CUDACC__
  return *reinterpret_cast<const Four<T>*>(from);
#else
  Four<T> four;
  std::memcpy(&four, from, sizeof(four));
  return four;
#endif
}

// The last steps of every form: `scaled` is the sum times the weights' scale.
MF_DEVICE void finish(const Product& p, int token, int row, float scaled) {
  float value = times(scaled, p.worth[token]);
  if (p.bias != nullptr) value = plus(value, p.bias[row]);
  const std::int64_t at = static_cast<std::int64_t>(token) * p.rows + row;
  if (p.type == Type::kFloat) static_cast<float*>(p.out)[at] = value;
  else if (p.type == Type::kBf16) static_cast<Bf16*>(p.out)[at] = to_bf16(value);
  else static_cast<Fp16*>(p.out)[at] = to_fp16(value);
}

// From the sum of stored codes, where there are no groups.
template <int kBits>
MF_DEVICE void finish_stored(const Product& p, int token, int row, int stored) {
  const int sum = slope(kBits) * stored + offset(kBits) * p.sums[token];
  finish(p, token, row, times(static_cast<float>(sum), p.scale[p.scale_of_rows ? row : 0]));
}

}  // namespace megaforge::bitgemm
