// The product by wgmma.m64n128k32: each of two warp groups has 64 rows x 128 tokens of the tile, the weights from registers.
// Code for sm_90a alone has these instructions.
#pragma once

#include "product.cuh"

namespace megaforge::bitgemm {

// Of the codes at the depth of step `step`: 32 bytes further on each time, within the rows' 128 bytes.
template <int kTokens>
MF_DEVICE std::uint64_t codes_descriptor(const Stage<kTokens>& stage, int step) {
  return descriptor(shared_address(stage.codes) + kStep * step);
}

template <int kBitsOf>
struct WgmmaSums {
  static constexpr int kBits = kBitsOf, kTokens = 128, kHigh = 1, kCount = 64;
  static constexpr bool kGrouped = false;

  int at[kCount];

  static MF_DEVICE int first_row(int thread) { return thread / 32 * kPanelRows; }
  static MF_DEVICE int row(int thread, int i) { return first_row(thread) + thread % 32 / 4 + i / 2 % 2 * 8; }
  static MF_DEVICE int token(int thread, int i) { return i / 4 * 8 + 2 * (thread % 4) + i % 2; }

  MF_DEVICE void clear() {
    MF_UNROLL
    for (int i = 0; i < kCount; ++i) at[i] = 0;
  }

  MF_DEVICE std::uint32_t result(int i) const { return static_cast<std::uint32_t>(at[i]); }

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
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(at[i])::"memory");
  }

  MF_DEVICE void multiply(const Stage<kTokens>& stage, const Weights<kBits, kHigh>& weights, const Product&, int,
                          int index, int) {
    const StageWords<kBits> words = weights.words(0, index);
    unsigned a[kSteps][kRegisters];
    MF_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      MF_UNROLL
      for (int reg = 0; reg < kRegisters; ++reg) {
        a[step][reg] = decoded<kBits, false>(words, step, reg);
        asm volatile("" : "+r"(a[step][reg])::"memory");  // decoded before the fence, which orders registers too
      }
    }
    hold();
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    MF_UNROLL
    for (int step = 0; step < kSteps; ++step) add_product(a[step], codes_descriptor(stage, step));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }

 private:
  MF_DEVICE void add_product(const unsigned (&a)[kRegisters], std::uint64_t codes) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "{%64,%65,%66,%67}, %68, 1;"
        : "+r"(at[0]), "+r"(at[1]), "+r"(at[2]), "+r"(at[3]), "+r"(at[4]), "+r"(at[5]),
          "+r"(at[6]), "+r"(at[7]), "+r"(at[8]), "+r"(at[9]), "+r"(at[10]), "+r"(at[11]),
          "+r"(at[12]), "+r"(at[13]), "+r"(at[14]), "+r"(at[15]), "+r"(at[16]), "+r"(at[17]),
          "+r"(at[18]), "+r"(at[19]), "+r"(at[20]), "+r"(at[21]), "+r"(at[22]), "+r"(at[23]),
          "+r"(at[24]), "+r"(at[25]), "+r"(at[26]), "+r"(at[27]), "+r"(at[28]), "+r"(at[29]),
          "+r"(at[30]), "+r"(at[31]), "+r"(at[32]), "+r"(at[33]), "+r"(at[34]), "+r"(at[35]),
          "+r"(at[36]), "+r"(at[37]), "+r"(at[38]), "+r"(at[39]), "+r"(at[40]), "+r"(at[41]),
          "+r"(at[42]), "+r"(at[43]), "+r"(at[44]), "+r"(at[45]), "+r"(at[46]), "+r"(at[47]),
          "+r"(at[48]), "+r"(at[49]), "+r"(at[50]), "+r"(at[51]), "+r"(at[52]), "+r"(at[53]),
          "+r"(at[54]), "+r"(at[55]), "+r"(at[56]), "+r"(at[57]), "+r"(at[58]), "+r"(at[59]),
          "+r"(at[60]), "+r"(at[61]), "+r"(at[62]), "+r"(at[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(codes));
  }
#else
  static void copied() {}
  void finish() {}

  // The code of a token at depth `k` of what a descriptor is of.
  static int read(std::uint64_t of, int token, int k) { return static_cast<std::int8_t>(*described(of, token, k)); }

  // The left operand's registers are those of mma.m16n8k32, for each warp's 16 rows.
  void multiply(const Stage<kTokens>& stage, const Weights<kBits, kHigh>& weights, const Product& p, int tile_row,
                int index, int thread) {
    const int lane = thread % 32;
    StageWords<kBits> words[4];
    for (int t = 0; t < 4; ++t) {
      const int other = lane / 4 * 4 + t;
      words[t] = other == lane ? weights.words(0, index)
                               : words_of_lane<kBits>(p, (tile_row + first_row(thread)) / kPanelRows, other, index);
    }
    for (int step = 0; step < kSteps; ++step) {
      const std::uint64_t codes = codes_descriptor(stage, step);
      for (int i = 0; i < kCount; ++i) {
        for (int k = 0; k < kStep; ++k) {
          const std::uint32_t left = decoded<kBits, false>(words[k % 16 / 4], step, i / 2 % 2 + k / 16 * 2);
          at[i] += static_cast<int>(left >> 8 * (k % 4) & 0xffu) * read(codes, token(thread, i), k);
        }
      }
    }
  }
#endif
};

}  // namespace megaforge::bitgemm
