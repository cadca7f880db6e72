// Causal attention on CPUs: what its implementations take and do. No torch here.
//
// o = softmax(scale q k^T) v over the keys that a query sees. Who sees whom is a list of segments: a segment's query i
// sees its keys 0 to i + ahead, as far as it has them. No tensor of queries x keys exists.
#pragma once

#include <cstdint>

namespace megaforge::attention {

enum class Type : std::uint8_t { f32, bf16 };

// [b, heads, s, d] with contiguous channels; strides in elements.
struct View {
  const void* data;
  Type type;
  std::int64_t stride_b, stride_h, stride_s;
};

struct Result {
  void* data;
  Type type;
  std::int64_t stride_b, stride_h, stride_s;
};

// A row of queries and the keys that they may see. A query or a key is in one segment at most.
struct Segment {
  std::int64_t batch, query, queries, key, keys, ahead;
};

// Angles by which the first 2 half channels of queries and keys turn (RoPE): channel c with c + half. [s, b, half] of each
// place of the sequences, for queries and keys alike; half 0: none turn.
struct Turns {
  const float *cos, *sin;
  std::int64_t stride_b, stride_s, half;
};

// Which probabilities stay: 16 bits of each are a function of its query's key of a generator and of the place of what it
// sees, as megaforge/parallel/dropout.py has them; those below `threshold` of 65,536 are dropped.
struct Dropped {
  const std::int64_t* rows;  // [b, heads, length]; null: all stay
  std::int64_t threshold;

  float scale() const { return rows == nullptr ? 1.0f : 65536.0f / static_cast<float>(65536 - threshold); }
};

struct Problem {
  std::int64_t heads, groups, length, d;  // length: queries of each sequence, for the log-sum-exp
  float scale;                            // above 0
  const Segment* segments;
  std::int64_t count;
  View q, k, v;  // of one type; each group of k and v serves heads / groups neighbouring heads
  Turns turns{};
  Dropped dropped{};
};

struct Forward {
  Problem in;
  Result out;
  float* lse;  // [b, heads, length]: log of the sum of exp(score); -inf, with an output of 0, where nothing is seen
};

struct Backward {
  Problem in;
  View out, dout;  // dout of the type of q
  const float* lse;
  Result dq, dk, dv;  // of queries and keys before they turn
};

// Work of one thread: a segment and a group of heads; of the forward pass the blocks [first, last) of its queries,
// counted head by head.
struct Unit {
  const Segment* segment;
  std::int64_t group, first, last;
};

constexpr std::int64_t kQueryBlock = 96;  // queries of a block of the forward pass

constexpr std::int64_t kQueryPanel = 64;  // queries of a panel of the backward pass

inline std::int64_t query_panels(const Segment& segment) { return (segment.queries + kQueryPanel - 1) / kQueryPanel; }

inline std::int64_t query_blocks(const Segment& segment) { return (segment.queries + kQueryBlock - 1) / kQueryBlock; }

// One of the threads that share a unit of the backward pass. Blocks of keys add to the gradient of a panel of queries in
// their order, whoever computes them, so that the sums are those of one thread.
struct Member {
  std::int64_t rank, size;
  std::int64_t* next;   // the next block of keys that nobody has taken
  std::int64_t* done;   // of each panel of queries: how many blocks have added to it
  void (*meet)(void*);  // returns when all members have called it
  void* team;
  void (*pause)();
};

struct Bytes {
  std::int64_t shared, own;
};

// One instruction set's code. Scratch is 64-byte aligned.
struct Kernels {
  std::int64_t (*forward_bytes)(const Problem&, const Unit&);
  void (*forward)(const Forward&, const Unit&, void* scratch);
  Bytes (*backward_bytes)(const Problem&, const Unit&);  // of a team, and of each member
  void (*backward)(const Backward&, const Unit&, const Member&, void* shared, void* own);
};

extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels, avx512_kernels;
extern const Kernels avx512_bf16_kernels;  // for bf16 alone

// What this CPU, or MEGAFORGE_CPU_ISA, has for inputs of `type`.
const Kernels& choose(Type type);

// On at most `threads` threads; no result depends on their number.
void forward(const Kernels& kernels, const Forward& args, int threads);
void backward(const Kernels& kernels, const Backward& args, int threads);

}  // namespace megaforge::attention
