// A thread block's program as phases between barriers. The same source is a CUDA block and, compiled by a host compiler,
// a program that runs the threads of a phase one after the other. A phase must not read what another of its threads
// writes; on the host this shows as results that depend on the order of the threads, which can be reversed.
#pragma once

#include <cstdint>
#include <cstring>
#include <math.h>

#include "bf16.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define MF_DEVICE __device__ __forceinline__
#define MF_UNROLL _Pragma("unroll")
#else
#include <vector>
#define MF_DEVICE inline
#define MF_UNROLL
#endif

namespace megaforge {

template <int kThreads>
class Block {
 public:
#ifdef __CUDACC__
  // Runs body(thread) on every thread; all of it is visible to all threads afterwards.
  template <class Body>
  MF_DEVICE void phase(Body body) const {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
#else
  explicit Block(bool reversed) : reversed_(reversed) {}

  template <class Body>
  void phase(Body body) const {
    for (int i = 0; i < kThreads; ++i) body(reversed_ ? kThreads - 1 - i : i);
  }

 private:
  bool reversed_;
#endif
};

// A variable of every thread that lives through several phases: registers on the device.
template <class T, int kThreads>
class PerThread {
 public:
#ifdef __CUDACC__
  MF_DEVICE T& operator()(int) { return value_; }

 private:
  T value_;
#else
  T& operator()(int thread) { return values_[static_cast<std::size_t>(thread)]; }

 private:
  std::vector<T> values_ = std::vector<T>(kThreads);
#endif
};

// A thread's copies of 16 bytes from global to shared memory, both aligned to 16 bytes. They are there after wait() (or,
// of those before a close(), after a wait_for_all_but()) and a barrier, not before: on the host they are held back until
// then, or made at once where `eager`, for a GPU may do either.
class AsyncCopies {
 public:
#ifndef __CUDACC__
  static inline bool eager = false;
#endif

  // Copies from `from` where `valid`, else zeros; `from` must be a valid address all the same.
  MF_DEVICE void copy16(void* to, const void* from, bool valid) {
#ifdef __CUDACC__
    const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
#else
    pending_.push_back({to, from, valid});
    if (eager) make(pending_.size());
#endif
  }

  MF_DEVICE void wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    make(pending_.size());
    closed_.clear();
#endif
  }

  // The copies since the last close(), maybe none, are a group.
  MF_DEVICE void close() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    closed_.push_back(pending_.size());
#endif
  }

  // Waits for all groups but the last kGroups.
  template <int kGroups>
  MF_DEVICE void wait_for_all_but() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#else
    while (closed_.size() > kGroups) make(closed_.front()), closed_.erase(closed_.begin());
#endif
  }

#ifndef __CUDACC__
 private:
  struct Copy {
    void* to;
    const void* from;
    bool valid;
  };

  // The first `count` that are pending.
  void make(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      const Copy& copy = pending_[i];
      if (copy.valid) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    }
    pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(count));
    for (std::size_t& end : closed_) end -= count < end ? count : end;
  }

  std::vector<Copy> pending_;
  std::vector<std::size_t> closed_;  // how many of pending_ end a group
#endif
};

MF_DEVICE float to_float(float x) { return x; }

MF_DEVICE float to_float(Bf16 x) {
#ifdef __CUDACC__
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
#else
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

MF_DEVICE Bf16 to_bf16(float x) {
#ifdef __CUDACC__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  return nearest_bf16(x);
#endif
}

// Two neighbours; `from` is aligned to both.
MF_DEVICE void load_pair(const Bf16* from, float& first, float& second) {
#ifdef __CUDACC__
  const unsigned both = *reinterpret_cast<const unsigned*>(from);
  first = __uint_as_float(both << 16), second = __uint_as_float(both & 0xffff0000u);
#else
  first = to_float(from[0]), second = to_float(from[1]);
#endif
}

// Stores two neighbours; `to` is aligned to both.
MF_DEVICE void store_pair(float* to, float first, float second) {
#ifdef __CUDACC__
  *reinterpret_cast<float2*>(to) = make_float2(first, second);
#else
  to[0] = first, to[1] = second;
#endif
}

MF_DEVICE void store_pair(Bf16* to, float first, float second) {
#ifdef __CUDACC__
  const unsigned low = to_bf16(first).bits, high = to_bf16(second).bits;
  *reinterpret_cast<unsigned*>(to) = low | (high << 16);
#else
  to[0] = to_bf16(first), to[1] = to_bf16(second);
#endif
}

}  // namespace megaforge
