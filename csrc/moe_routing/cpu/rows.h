// Rows of tokens to their experts' order and back.
#pragma once

#include "moe_routing.h"
#include "vec.h"

namespace megaforge::moe::MF_ISA {

MEGAFORGE_INLINE F load_part(const float* p, int n) { return load(p, n, 0.0f); }
MEGAFORGE_INLINE F load_part(const std::uint16_t* p, int n) {
  std::uint16_t whole[kLanes] = {};
  __builtin_memcpy(whole, p, 2 * n);
  return load(whole);
}
MEGAFORGE_INLINE void store_part(float* p, F x, int n) { store(p, x, n); }
MEGAFORGE_INLINE void store_part(std::uint16_t* p, F x, int n) {
  std::uint16_t whole[kLanes];
  store(whole, x);
  __builtin_memcpy(p, whole, 2 * n);
}

// Whether a row that starts at p can be written past the caches, in whole lines.
MEGAFORGE_INLINE bool lines(const void* p, std::int64_t bytes) {
  return ((reinterpret_cast<std::uintptr_t>(p) | static_cast<std::uintptr_t>(bytes)) & 63) == 0;
}

MEGAFORGE_INLINE void copy_row(char* to, const char* from, std::int64_t bytes, bool past_caches) {
  if (!past_caches) {
    __builtin_memcpy(to, from, bytes);
    return;
  }
  auto* out = reinterpret_cast<float*>(to);
  const auto* in = reinterpret_cast<const float*>(from);
  for (std::int64_t i = 0; i < bytes / 4; i += kLanes) stream(out + i, load(in + i));
}

inline void permute(const Rows& r, const void* x, void* rows, std::int64_t first, std::int64_t last) {
  const std::int64_t bytes = r.width * (r.type == Type::bf16 ? 2 : r.type == Type::f32 ? 4 : 8);
  const bool past_caches = r.stream && lines(rows, bytes);
  for (std::int64_t t = first; t < last; ++t) {
    for (std::int64_t j = 0; j < r.topk; ++j) {
      const std::int64_t row = r.position[t * r.topk + j];
      if (row < 0) continue;
      copy_row(static_cast<char*>(rows) + row * bytes, static_cast<const char*>(x) + t * bytes, bytes, past_caches);
    }
  }
  end_of_streams();
}

constexpr int kUnroll = 8;  // vectors of a row at a time: long enough for the hardware to see where it goes

template <typename T>
MEGAFORGE_INLINE void store_maybe_past(T* p, F x, bool) {
  store(p, x);
}
template <>
MEGAFORGE_INLINE void store_maybe_past<float>(float* p, F x, bool past_caches) {
  if (past_caches) {
    stream(p, x);
  } else {
    store(p, x);
  }
}

template <typename T>
MEGAFORGE_INLINE void unpermute_of(const Rows& r, const T* y, const float* weights, T* out, std::int64_t first,
                                   std::int64_t last) {
  const std::int64_t width = r.width, step = kUnroll * kLanes, whole = width - width % step;
  const bool past_caches = r.stream && lines(out, width * static_cast<std::int64_t>(sizeof(T)));
  for (std::int64_t t = first; t < last; ++t) {
    const std::int32_t* const position = r.position + t * r.topk;
    const float* const weight = weights == nullptr ? nullptr : weights + t * r.topk;
    T* const to = out + t * width;
    std::int64_t i = 0;
    for (; i < whole; i += step) {
      F sums[kUnroll];
      for (F& lanes : sums) lanes = set(0.0f);
      for (std::int64_t j = 0; j < r.topk; ++j) {
        if (position[j] < 0) continue;
        const T* const from = y + position[j] * width + i;
        const F w = set(weight == nullptr ? 1.0f : weight[j]);
        for (int c = 0; c < kUnroll; ++c) sums[c] = fma(load(from + c * kLanes), w, sums[c]);
      }
      for (int c = 0; c < kUnroll; ++c) store_maybe_past(to + i + c * kLanes, sums[c], past_caches);
    }
    for (; i < width; i += kLanes) {
      const int n = static_cast<int>(width - i < kLanes ? width - i : kLanes);
      F sums = set(0.0f);
      for (std::int64_t j = 0; j < r.topk; ++j) {
        if (position[j] < 0) continue;
        sums = fma(load_part(y + position[j] * width + i, n), set(weight == nullptr ? 1.0f : weight[j]), sums);
      }
      store_part(to + i, sums, n);
    }
  }
  end_of_streams();
}

template <typename T>
MEGAFORGE_INLINE void unpermute_backward_of(const Rows& r, const T* grad, const T* y, const float* weights, T* dy,
                                            float* dweights, std::int64_t first, std::int64_t last) {
  const std::int64_t width = r.width, step = kUnroll * kLanes, whole = width - width % step;
  const bool past_caches = r.stream && lines(dy, width * static_cast<std::int64_t>(sizeof(T)));
  const std::int64_t end = last * r.topk;
  for (std::int64_t t = first; t < last; ++t) {
    const T* const g = grad + t * width;
    for (std::int64_t a = t * r.topk; a < (t + 1) * r.topk; ++a) {
      dweights[a] = 0.0f;
      if (r.position[a] < 0) continue;
      const std::int64_t ahead_row = a + 1 < end && r.position[a + 1] >= 0 ? r.position[a + 1] : 0;
      const T* const from = y + r.position[a] * width;
      T* const to = dy + r.position[a] * width;
      const F w = set(weights[a]);
      F dots[kUnroll];
      for (F& lanes : dots) lanes = set(0.0f);
      std::int64_t i = 0;
      for (; i < whole; i += step) {
        const char* const ahead = reinterpret_cast<const char*>(y + ahead_row * width + i);
        for (std::size_t line = 0; line < step * sizeof(T); line += 64) __builtin_prefetch(ahead + line);
        for (int c = 0; c < kUnroll; ++c) {
          const F gradient = load(g + i + c * kLanes);
          dots[c] = fma(gradient, load(from + i + c * kLanes), dots[c]);
          store_maybe_past(to + i + c * kLanes, mul(gradient, w), past_caches);
        }
      }
      for (; i < width; i += kLanes) {
        const int n = static_cast<int>(width - i < kLanes ? width - i : kLanes);
        const F gradient = load_part(g + i, n);
        dots[0] = fma(gradient, load_part(from + i, n), dots[0]);
        store_part(to + i, mul(gradient, w), n);
      }
      for (int c = 1; c < kUnroll; ++c) dots[0] = add(dots[0], dots[c]);
      dweights[a] = sum(dots[0]);
    }
  }
  end_of_streams();
}

inline void unpermute(const Rows& r, const void* y, const void* weights, void* out, std::int64_t first,
                      std::int64_t last) {
  const auto* w = static_cast<const float*>(weights);
  if (r.type == Type::f32) {
    unpermute_of(r, static_cast<const float*>(y), w, static_cast<float*>(out), first, last);
  } else {
    unpermute_of(r, static_cast<const std::uint16_t*>(y), w, static_cast<std::uint16_t*>(out), first, last);
  }
}

inline void unpermute_backward(const Rows& r, const void* grad, const void* y, const void* weights, void* dy,
                               void* dweights, std::int64_t first, std::int64_t last) {
  const auto* w = static_cast<const float*>(weights);
  auto* dw = static_cast<float*>(dweights);
  if (r.type == Type::f32) {
    unpermute_backward_of(r, static_cast<const float*>(grad), static_cast<const float*>(y), w, static_cast<float*>(dy),
                          dw, first, last);
  } else {
    unpermute_backward_of(r, static_cast<const std::uint16_t*>(grad), static_cast<const std::uint16_t*>(y), w,
                          static_cast<std::uint16_t*>(dy), dw, first, last);
  }
}

}  // namespace megaforge::moe::MF_ISA
