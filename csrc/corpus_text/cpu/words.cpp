#include "words.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace megaforge::corpus_text {

namespace {

constexpr std::array<bool, 256> word_bytes() {
  std::array<bool, 256> table{};
  for (int c = 0; c < 256; ++c) {
    table[c] = c >= 128 || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
  }
  return table;
}

constexpr std::array<bool, 256> kWord = word_bytes();

// The first `count` (1 to 8) bytes at `p` as a little-endian number.
std::uint64_t eight(const std::uint8_t* p, std::int64_t count, const std::uint8_t* end) {
  std::uint64_t value = 0;
  if (end - p >= 8) {
    std::memcpy(&value, p, 8);
    return count >= 8 ? value : value & ((std::uint64_t{1} << (8 * count)) - 1);
  }
  std::memcpy(&value, p, static_cast<std::size_t>(std::min<std::int64_t>(count, 8)));
  return value;
}

std::uint64_t step(std::uint64_t hash, std::uint64_t eight) { return mix((hash * kFactor) ^ eight); }

std::uint64_t hash_piece(const std::uint8_t* p, std::int64_t length, const std::uint8_t* end) {
  std::uint64_t value = step(static_cast<std::uint64_t>(length), length > 0 ? eight(p, length, end) : 0);
  for (std::int64_t done = 8; done < length; done += 8) value = step(value, eight(p + done, length - done, end));
  return value;
}

}  // namespace

Spans words(const Texts& texts) {
  Spans found;
  found.first.reserve(static_cast<std::size_t>(texts.rows) + 1);
  found.start.reserve(static_cast<std::size_t>(texts.size / 5));
  found.end.reserve(static_cast<std::size_t>(texts.size / 5));
  for (std::int64_t row = 0; row < texts.rows; ++row) {
    found.first.push_back(static_cast<std::int64_t>(found.start.size()));
    const std::int64_t stop = texts.offsets[row + 1];
    for (std::int64_t at = texts.offsets[row]; at < stop;) {
      while (at < stop && !kWord[texts.data[at]]) ++at;
      if (at == stop) break;
      found.start.push_back(at);
      while (at < stop && kWord[texts.data[at]]) ++at;
      found.end.push_back(at);
    }
  }
  found.first.push_back(static_cast<std::int64_t>(found.start.size()));
  return found;
}

Spans lines(const Texts& texts, int feeds) {
  Spans found;
  found.first.reserve(static_cast<std::size_t>(texts.rows) + 1);
  for (std::int64_t row = 0; row < texts.rows; ++row) {
    found.first.push_back(static_cast<std::int64_t>(found.start.size()));
    const std::int64_t stop = texts.offsets[row + 1];
    std::int64_t start = texts.offsets[row];
    const auto add = [&](std::int64_t end) {
      if (end <= start) return;
      found.start.push_back(start);
      found.end.push_back(end);
    };
    for (std::int64_t at = start; at < stop; ++at) {
      const void* feed = std::memchr(texts.data + at, '\n', static_cast<std::size_t>(stop - at));
      if (feed == nullptr) break;
      at = static_cast<const std::uint8_t*>(feed) - texts.data;
      if (feeds == 2 && (at == texts.offsets[row] || texts.data[at - 1] != '\n')) continue;
      add(at + 1 - feeds);
      start = at + 1;
    }
    add(stop);
  }
  found.first.push_back(static_cast<std::int64_t>(found.start.size()));
  return found;
}

void hash_spans(const std::uint8_t* data, std::int64_t size, const std::int64_t* start, const std::int64_t* end,
                std::int64_t spans, std::uint64_t* hash) {
  const std::uint8_t* const stop = data + size;
  for (std::int64_t span = 0; span < spans; ++span) {
    const std::int64_t length = end[span] - start[span];
    const std::uint8_t* const p = data + start[span];
    if (length <= kPiece) {
      hash[span] = hash_piece(p, length, stop);
      continue;
    }
    auto value = static_cast<std::uint64_t>(length);
    for (std::int64_t done = 0; done < length; done += kPiece) {
      value = step(value, hash_piece(p + done, std::min(kPiece, length - done), stop));
    }
    hash[span] = value;
  }
}

}  // namespace megaforge::corpus_text
