// One block quantizes one token, as megaforge/kernels/bitgemm/reference.py defines it.
#pragma once

#include "values.cuh"

namespace megaforge::bitgemm {

constexpr int kQuantizeThreads = 256;
constexpr int kParts = 16;  // of the threads, each of which is summed up by one of them
constexpr float kLeast = 1e-5f;

struct QuantizeShared {
  std::uint32_t each[kQuantizeThreads], part[kParts];
};

// Four neighbours of a token as fp32, zeros beyond its end; `whole`: rows begin at multiples of four values.
template <class T>
MF_DEVICE void load_values(const T* row, int k, int columns, bool whole, float (&values)[4]) {
  if (whole && k + 4 <= columns) {
    const Four<T> four = load_four(row + k);
    MF_UNROLL
    for (int i = 0; i < 4; ++i) values[i] = to_float(four.at[i]);
  } else {
    MF_UNROLL
    for (int i = 0; i < 4; ++i) values[i] = k + i < columns ? to_float(row[k + i]) : 0.0f;
  }
}

MF_DEVICE int code_of(float x, float factor, float most) {
  const float code = static_cast<float>(nearest_int(times(x, factor)));
  return static_cast<int>(fminf(fmaxf(code, -most - 1.0f), most));
}

// The four codes of depths k to k + 3.
MF_DEVICE void store_codes(const Quantization& q, std::int8_t* row, int k, std::uint32_t word) {
  const int in_order = k % 64 / 4, at = k / 64 * 64 + 4 * (q.gemv_order ? gemv_word(in_order) : in_order);
#ifdef __CUDACC__
  *reinterpret_cast<std::uint32_t*>(row + at) = word;
#else
  std::memcpy(row + at, &word, 4);
#endif
}

// Adds up what the threads left in shared memory.
MF_DEVICE void sum_up(const Block<kQuantizeThreads>& block, QuantizeShared& shared, const Quantization& q, int token) {
  block.phase([&](int thread) {
    if (thread >= kParts) return;
    std::uint32_t sum = 0;
    for (int i = thread; i < kQuantizeThreads; i += kParts) sum += shared.each[i];
    shared.part[thread] = sum;
  });
  block.phase([&](int thread) {
    if (thread > 0) return;
    std::uint32_t sum = 0;
    for (int i = 0; i < kParts; ++i) sum += shared.part[i];
    q.sums[token] = static_cast<std::int32_t>(sum);
  });
}

template <class T>
MF_DEVICE void quantize_block(const Block<kQuantizeThreads>& block, QuantizeShared& shared, const Quantization& q,
                              int token) {
  const T* row = static_cast<const T*>(q.x) + static_cast<std::int64_t>(token) * q.columns;
  std::int8_t* to = q.codes + static_cast<std::int64_t>(token) * q.depth;
  const bool whole = q.columns % 4 == 0 && reinterpret_cast<std::uintptr_t>(q.x) % sizeof(Four<T>) == 0;
  // As integers, sizes order as they do as numbers, with infinity and then NaN at the end.
  block.phase([&](int thread) {
    std::uint32_t largest = 0;
    for (int k = 4 * thread; k < q.columns; k += 4 * kQuantizeThreads) {
      float values[4];
      load_values(row, k, q.columns, whole, values);
      MF_UNROLL
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t size = bits_of(values[i]) & 0x7fffffffu;
        largest = size > largest ? size : largest;
      }
    }
    shared.each[thread] = largest;
  });
  block.phase([&](int thread) {
    if (thread >= kParts) return;
    std::uint32_t largest = 0;
    for (int i = thread; i < kQuantizeThreads; i += kParts)
      largest = shared.each[i] > largest ? shared.each[i] : largest;
    shared.part[thread] = largest;
  });
  block.phase([&](int thread) {
    std::uint32_t bits = 0;
    MF_UNROLL
    for (int i = 0; i < kParts; ++i) bits = shared.part[i] > bits ? shared.part[i] : bits;
    const bool finite = bits < 0x7f800000u;
    const float largest = fmaxf(from_bits(bits), kLeast), factor = times(divided(1.0f, largest), q.most);
    int sum = 0;
    for (int k = 4 * thread; k < q.depth; k += 4 * kQuantizeThreads) {
      float values[4];
      load_values(row, k, q.columns, whole, values);
      std::uint32_t word = 0;
      MF_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int code = finite ? code_of(values[i], factor, q.most) : 0;
        sum += code;
        word |= (static_cast<std::uint32_t>(code) & 0xffu) << 8 * i;
      }
      store_codes(q, to, k, word);
    }
    shared.each[thread] = static_cast<std::uint32_t>(sum);
    if (thread == 0) q.worth[token] = finite ? divided(largest, q.most) : from_bits(0x7fc00000u);
  });
  sum_up(block, shared, q, token);
}

// The same of a token that is codes already.
MF_DEVICE void arrange_block(const Block<kQuantizeThreads>& block, QuantizeShared& shared, const Quantization& q,
                             int token) {
  const std::int8_t* row = static_cast<const std::int8_t*>(q.x) + static_cast<std::int64_t>(token) * q.columns;
  std::int8_t* to = q.codes + static_cast<std::int64_t>(token) * q.depth;
  block.phase([&](int thread) {
    int sum = 0;
    for (int k = 4 * thread; k < q.depth; k += 4 * kQuantizeThreads) {
      std::uint32_t word = 0;
      MF_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int code = k + i < q.columns ? row[k + i] : 0;
        sum += code;
        word |= (static_cast<std::uint32_t>(code) & 0xffu) << 8 * i;
      }
      store_codes(q, to, k, word);
    }
    shared.each[thread] = static_cast<std::uint32_t>(sum);
  });
  sum_up(block, shared, q, token);
}

}  // namespace megaforge::bitgemm
