// Words and lines of a batch of texts, and their hashes: what megaforge/data/corpus/words.py says in NumPy, value by
// value. The texts lie one after the other in `data`; text r is data[offsets[r]:offsets[r + 1]].
#pragma once

#include <cstdint>
#include <vector>

namespace megaforge::corpus_text {

// A span is hashed in steps of eight bytes; a longer one than this in such pieces.
inline constexpr std::int64_t kPiece = 256;

struct Texts {
  const std::uint8_t* data;
  std::int64_t size;
  const std::int64_t* offsets;  // [rows + 1], ascending, from 0 to size
  std::int64_t rows;
};

struct Spans {
  std::vector<std::int64_t> first;  // [rows + 1], the first span of each row, and the number of all
  std::vector<std::int64_t> start;
  std::vector<std::int64_t> end;
};

// A bijection of 64 bits: the finaliser of SplitMix64.
inline std::uint64_t mix(std::uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9u;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

inline constexpr std::uint64_t kFactor = 0x9E3779B97F4A7C15u;

// Runs of letters, digits, _ and bytes beyond ASCII; a row's end ends a word.
Spans words(const Texts& texts);

// What single line feeds (feeds 1) or pairs of them (feeds 2) separate; never empty.
Spans lines(const Texts& texts, int feeds);

// hash[i] = that of data[start[i]:end[i]], of its bytes alone.
void hash_spans(const std::uint8_t* data, std::int64_t size, const std::int64_t* start, const std::int64_t* end,
                std::int64_t spans, std::uint64_t* hash);

}  // namespace megaforge::corpus_text
