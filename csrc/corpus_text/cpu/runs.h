// Runs of words: how often they repeat in a text, and a text's MinHash signature of them.
#pragma once

#include <cstdint>

#include "words.h"

namespace megaforge::corpus_text {

// Of each row r with the words hash[first[r]:first[r + 1]]: how many runs of n words were there before in the row, and
// how often the commonest run is there, 0 of one that is there once.
void count_runs(const std::uint64_t* hash, const std::int64_t* first, std::int64_t rows, std::int64_t n,
                std::int64_t* again, std::int64_t* most);

// Of each row the sum of the weights of the keys that were there before in the row.
void repeated(const std::uint64_t* key, const std::int64_t* first, const std::int64_t* weight, std::int64_t rows,
              std::int64_t* sum);

inline constexpr int kBins = 128;
inline constexpr int kBinBits = 7;

// The signature of each row that has words [rows of them, kBins]: the smallest hash of the runs of n words in each bin
// (one permutation), empty bins from others by hashing. A row of fewer words than n has one run, all of its words.
void signatures(const std::uint64_t* hash, const std::int64_t* first, std::int64_t rows, std::int64_t n,
                std::uint64_t* bins);

}  // namespace megaforge::corpus_text
