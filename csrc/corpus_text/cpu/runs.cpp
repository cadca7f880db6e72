#include "runs.h"

#include <algorithm>
#include <bit>
#include <vector>

namespace megaforge::corpus_text {

namespace {

// Counts keys of one row after the other; an entry of an earlier row counts as free, so nothing is cleared.
class Table {
 public:
  // Makes room for a row of `keys` keys.
  void begin(std::int64_t keys) {
    const std::size_t wanted = std::bit_ceil(static_cast<std::size_t>(2 * keys + 1));
    if (wanted > entries_.size()) {
      entries_.assign(wanted, Entry{});
      row_ = 0;
    }
    mask_ = wanted - 1;
    if (++row_ == 0) {  // 2^32 rows: numbers begin again
      std::fill(entries_.begin(), entries_.end(), Entry{});
      row_ = 1;
    }
  }

  // How often the key is there in this row, now that it is there once more.
  std::uint32_t add(std::uint64_t key) {
    for (std::size_t at = (key ^ (key >> 32)) & mask_;; at = (at + 1) & mask_) {
      Entry& entry = entries_[at];
      if (entry.row != row_) {
        entry = {key, row_, 1};
        return 1;
      }
      if (entry.key == key) return ++entry.count;
    }
  }

 private:
  struct Entry {
    std::uint64_t key = 0;
    std::uint32_t row = 0;
    std::uint32_t count = 0;
  };
  std::vector<Entry> entries_;
  std::size_t mask_ = 0;
  std::uint32_t row_ = 0;
};

// A run's hash before it is mixed: its words' hashes as the digits of a number.
std::uint64_t digits(const std::uint64_t* words, std::int64_t n) {
  std::uint64_t value = 0;
  for (std::int64_t word = 0; word < n; ++word) value = value * kFactor + words[word];
  return value;
}

std::uint64_t power(std::uint64_t base, std::int64_t exponent) {
  std::uint64_t value = 1;
  for (; exponent > 0; --exponent) value *= base;
  return value;
}

// Calls take(hash) for each run of n of the words, in order.
template <typename Take>
void each_run(const std::uint64_t* words, std::int64_t count, std::int64_t n, std::uint64_t leaving, Take take) {
  if (count < n) return;
  std::uint64_t value = digits(words, n);
  take(mix(value));
  for (std::int64_t at = n; at < count; ++at) {
    value = (value - words[at - n] * leaving) * kFactor + words[at];
    take(mix(value));
  }
}

constexpr std::uint64_t kNothing = ~std::uint64_t{0};
constexpr std::uint64_t kValue = kNothing >> kBinBits;

// Where an empty bin looks, one attempt after the other.
int candidate(int bin, int attempt) {
  return static_cast<int>(mix(static_cast<std::uint64_t>(bin + attempt * kBins)) % kBins);
}

void densify(std::uint64_t* bins) {
  bool filled[kBins];
  for (int bin = 0; bin < kBins; ++bin) filled[bin] = bins[bin] != kNothing;
  for (int bin = 0; bin < kBins; ++bin) {
    if (filled[bin]) continue;
    int attempt = 1, other = candidate(bin, 1);
    while (!filled[other]) other = candidate(bin, ++attempt);
    bins[bin] = bins[other];
  }
}

}  // namespace

void count_runs(const std::uint64_t* hash, const std::int64_t* first, std::int64_t rows, std::int64_t n,
                std::int64_t* again, std::int64_t* most) {
  Table table;
  const std::uint64_t leaving = power(kFactor, n - 1);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t words = first[row + 1] - first[row];
    std::int64_t repeats = 0;
    std::uint32_t largest = 0;
    table.begin(words);
    each_run(hash + first[row], words, n, leaving, [&](std::uint64_t run) {
      const std::uint32_t times = table.add(run);
      repeats += times > 1;
      largest = std::max(largest, times);
    });
    again[row] = repeats;
    most[row] = largest > 1 ? largest : 0;
  }
}

void repeated(const std::uint64_t* key, const std::int64_t* first, const std::int64_t* weight, std::int64_t rows,
              std::int64_t* sum) {
  Table table;
  for (std::int64_t row = 0; row < rows; ++row) {
    table.begin(first[row + 1] - first[row]);
    sum[row] = 0;
    for (std::int64_t at = first[row]; at < first[row + 1]; ++at) {
      if (table.add(key[at]) > 1) sum[row] += weight[at];
    }
  }
}

void signatures(const std::uint64_t* hash, const std::int64_t* first, std::int64_t rows, std::int64_t n,
                std::uint64_t* bins) {
  const std::uint64_t leaving = power(kFactor, n - 1);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t words = first[row + 1] - first[row];
    if (words == 0) continue;
    std::fill(bins, bins + kBins, kNothing);
    const auto put = [&](std::uint64_t run) {
      std::uint64_t& bin = bins[run >> (64 - kBinBits)];
      bin = std::min(bin, run & kValue);
    };
    each_run(hash + first[row], words, n, leaving, put);
    if (words < n) {
      std::uint64_t run = 0;
      for (std::int64_t word = first[row]; word < first[row + 1]; ++word) run = mix(run * 31 + hash[word]);
      put(run);
    }
    densify(bins);
    bins += kBins;
  }
}

}  // namespace megaforge::corpus_text
