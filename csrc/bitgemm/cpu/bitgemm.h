// Products of tokens with packed weights on CPUs: integers of 8 bits times codes of 1, 2 or 4, exact.
#pragma once

#include <cstdint>

namespace megaforge::bitgemm {

using std::int64_t;

enum class Type { f32, bf16 };

constexpr int kPanel = 32;          // rows of a panel
constexpr int kMostTokens = 12;     // of a tile
constexpr int kWide = 64;           // rows of a panel of words
constexpr int kWordColumns = 15;    // weights of a word: three indices of five bits
constexpr int kBlockWords = 16;     // a block's 48 sums of five codes, at most 640 each, stay in 16 bits

// A matrix [rows, columns] whose columns are `groups` neighbourhoods with scales of their own.
//
// Codes are unsigned: binary (w + 1) / 2, ternary w + 1, int4 w + 8. There are two layouts.
//
// Panels: [rows / 32][groups][steps][32 rows][4 bytes]. With q = 4 steps, byte b of step s holds, in its bits from
// p * bits on, the code of the group's column p q + 4 s + b: a pass over the steps for each p, from the highest to the
// lowest, needs a mask and no shift but one of the sums in between.
//
// Words, for binary look-ups: [groups][blocks of 16 words][rows / 64][words of the block][64 rows] of 16 bits. Word w of
// a row holds its group's columns 15 w to 15 w + 14, the first in the lowest bit.
//
// Rows beyond the matrix have zero bits; columns beyond it meet tokens of zero.
struct Shape {
  int bits;
  int64_t rows, columns, groups;
  bool words;

  int64_t group_columns() const { return columns / groups; }
  int places() const { return 8 / bits; }
  int64_t steps() const { return (group_columns() + 4 * places() - 1) / (4 * places()); }
  int64_t group_words() const { return (group_columns() + kWordColumns - 1) / kWordColumns; }
  int64_t panels() const { return words ? (rows + kWide - 1) / kWide : (rows + kPanel - 1) / kPanel; }
  // Of a token's codes of one group, with zeros behind them.
  int64_t padded_columns() const { return words ? kWordColumns * group_words() + 1 : 4 * places() * steps(); }
  int64_t bytes() const {
    return panels() * groups * (words ? group_words() * kWide * 2 : steps() * kPanel * 4);
  }
  // Rows that are read together.
  int64_t granule() const { return words ? kWide : kPanel; }
  // What a code is more than its weight: times 2 for binary ones.
  int offset() const { return bits == 1 ? 1 : bits == 2 ? 1 : 8; }
};

// scale[row * row_stride + group]; a stride of 0 is one scale for all.
struct Matrix {
  Shape shape;
  const void* panels;
  const float* scale;
  int64_t row_stride;
};

// `count` tokens: either x, to be quantized to `bits`, or codes and what they are worth.
struct Tokens {
  int64_t count;
  Type type;
  const void* x;
  int bits;
  const std::int8_t* codes;
  const float* worth;
};

// y [count, rows]; bias may be null.
struct Result {
  Type type;
  void* y;
  const float* bias;
};

// Whether matrices of `bits` are kept as words on this CPU.
bool prefers_words(int bits);

// packed: rows of (columns * bits + 7) / 8 bytes, the lowest bits first; int4 in two's complement. panels: shape.bytes(),
// aligned to 64 bytes.
void prepare(const Shape& shape, const std::uint8_t* packed, void* panels, int threads);

// y = (sums * scale) * worth + bias on at most `threads` threads; no result depends on their number. A token with NaN
// or infinite values gives NaN. Throws std::runtime_error where the instruction set has no code for the layout.
void multiply(const Matrix& matrix, const Tokens& tokens, const Result& result, int threads);

// Rows [begin, end) of that by the calling thread: both are multiples of shape.granule(), or the end that of the matrix.
void multiply_rows(const Matrix& matrix, const Tokens& tokens, const Result& result, int64_t begin, int64_t end);

// What an instruction set implements.
struct Kernels {
  // One token's codes; returns what they are worth, NaN where values are not finite.
  float (*quantize)(const void* x, Type type, int64_t columns, int bits, std::int8_t* codes);
  // sums [count][32] of a panel's codes times a tile of `count` tokens (1, 2, 4, 8 or 12), which lie as
  // [places steps][count][4].
  void (*tile)(int bits, int count, const std::uint8_t* panel, const std::int8_t* tokens, int64_t steps,
               std::int32_t* sums);
  // total[i] (+)= (twice * sums[i] - less) * scale[i] for 32 rows.
  void (*scale)(const std::int32_t* sums, int twice, std::int32_t less, const float* scale, bool first, float* total);
  // `count` <= 32 results of one token: total * worth + bias.
  void (*finish)(const float* total, float worth, const float* bias, int count, Type type, void* y);
  // Null without look-ups: tables [words * 3][count][32] of `count` rows of codes, `stride` apart, and sums
  // [count][stride] += of the words of panels one after the other (count 1, 2, 4 or 8).
  void (*tables)(int count, const std::int8_t* codes, int64_t stride, int64_t words, std::int16_t* tables);
  void (*look_up)(int count, const std::uint16_t* panel, int64_t panels, const std::int16_t* tables, int64_t words,
                  std::int32_t* sums, int64_t stride);
};

extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels, avx512_kernels, avx512_vnni_kernels;

}  // namespace megaforge::bitgemm
