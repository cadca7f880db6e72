// The inner product by wgmma.m64n128k16: each of two warp groups has 64 rows x 128 columns of the tile, both factors from
// shared memory. Code for sm_90a alone has these instructions.
#pragma once

#include "product.cuh"

namespace megaforge::newton_schulz {

constexpr int kWgmmaDepth = 16;
constexpr int kGroupRows = 64;

// The descriptors of a warp group's factors at the depth of instruction `step` of a stage: 32 bytes further on each time,
// within the rows' 128 bytes.
MF_DEVICE std::uint64_t left_descriptor(const Stage& stage, int thread, int step) {
  return descriptor(shared_address(stage.left + thread / 128 * kGroupRows * kDepth) + 2 * kWgmmaDepth * step);
}

MF_DEVICE std::uint64_t right_descriptor(const Stage& stage, int step) {
  return descriptor(shared_address(stage.right) + 2 * kWgmmaDepth * step);
}

struct WgmmaSums {
  float at[kSums];

  static MF_DEVICE int row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
  static MF_DEVICE int column(int thread, int i) { return i / 4 * 8 + 2 * (thread % 4) + i % 2; }

  MF_DEVICE void clear() {
    MF_UNROLL
    for (int i = 0; i < kSums; ++i) at[i] = 0.0f;
  }

#ifdef __CUDACC__
  // What this thread's copies wrote is seen by wgmma after the barrier.
  static MF_DEVICE void copied() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  // Waits for the products, which read the stage until then.
  MF_DEVICE void finish() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    hold();
  }

  // The sums are in registers before, and read or written by nothing else while products are on their way.
  MF_DEVICE void hold() {
    MF_UNROLL
    for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(at[i])::"memory");
  }

  MF_DEVICE void multiply(const Stage& stage, int thread) {
    hold();
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    MF_UNROLL
    for (int step = 0; step < kDepth / kWgmmaDepth; ++step)
      add_product(left_descriptor(stage, thread, step), right_descriptor(stage, step));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }

 private:
  MF_DEVICE void add_product(std::uint64_t left, std::uint64_t right) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "%64, %65, 1, 1, 1, 0, 0;"
        : "+f"(at[0]), "+f"(at[1]), "+f"(at[2]), "+f"(at[3]), "+f"(at[4]), "+f"(at[5]),
          "+f"(at[6]), "+f"(at[7]), "+f"(at[8]), "+f"(at[9]), "+f"(at[10]), "+f"(at[11]),
          "+f"(at[12]), "+f"(at[13]), "+f"(at[14]), "+f"(at[15]), "+f"(at[16]), "+f"(at[17]),
          "+f"(at[18]), "+f"(at[19]), "+f"(at[20]), "+f"(at[21]), "+f"(at[22]), "+f"(at[23]),
          "+f"(at[24]), "+f"(at[25]), "+f"(at[26]), "+f"(at[27]), "+f"(at[28]), "+f"(at[29]),
          "+f"(at[30]), "+f"(at[31]), "+f"(at[32]), "+f"(at[33]), "+f"(at[34]), "+f"(at[35]),
          "+f"(at[36]), "+f"(at[37]), "+f"(at[38]), "+f"(at[39]), "+f"(at[40]), "+f"(at[41]),
          "+f"(at[42]), "+f"(at[43]), "+f"(at[44]), "+f"(at[45]), "+f"(at[46]), "+f"(at[47]),
          "+f"(at[48]), "+f"(at[49]), "+f"(at[50]), "+f"(at[51]), "+f"(at[52]), "+f"(at[53]),
          "+f"(at[54]), "+f"(at[55]), "+f"(at[56]), "+f"(at[57]), "+f"(at[58]), "+f"(at[59]),
          "+f"(at[60]), "+f"(at[61]), "+f"(at[62]), "+f"(at[63])
        : "l"(left), "l"(right));
  }
#else
  static void copied() {}
  void finish() {}

  // The value in row `row` at depth `k` of what a descriptor is of.
  static float read(std::uint64_t of, int row, int k) {
    Bf16 value;
    std::memcpy(&value, described(of, row, 2 * k), sizeof(value));
    return to_float(value);
  }

  void multiply(const Stage& stage, int thread) {
    for (int step = 0; step < kDepth / kWgmmaDepth; ++step) {
      const std::uint64_t left = left_descriptor(stage, thread, step), right = right_descriptor(stage, step);
      for (int i = 0; i < kSums; ++i) {
        for (int k = 0; k < kWgmmaDepth; ++k)
          at[i] += read(left, row(thread, i) % kGroupRows, k) * read(right, column(thread, i), k);
      }
    }
  }
#endif
};

}  // namespace megaforge::newton_schulz
