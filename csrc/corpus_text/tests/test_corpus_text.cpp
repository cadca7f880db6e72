// Words, lines, their hashes and their repetition against the plainest code there is, on random texts whose buffers end
// where they end.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "common/testing.h"
#include "cpu/runs.h"
#include "cpu/words.h"

using namespace megaforge::corpus_text;
using megaforge::testing::expect;
using megaforge::testing::Random;

namespace {

struct Batch {
  std::vector<std::string> rows;
  std::vector<std::uint8_t> data;  // exactly as long as the texts, so that a read beyond them is found
  std::vector<std::int64_t> offsets{0};

  explicit Batch(std::vector<std::string> texts) : rows(std::move(texts)) {
    std::string all;
    for (const std::string& row : rows) {
      all += row;
      offsets.push_back(static_cast<std::int64_t>(all.size()));
    }
    data.assign(all.begin(), all.end());
    data.shrink_to_fit();
  }

  Texts texts() const {
    return {data.data(), static_cast<std::int64_t>(data.size()), offsets.data(), static_cast<std::int64_t>(rows.size())};
  }

  std::string at(std::int64_t start, std::int64_t end) const {
    return std::string(data.begin() + start, data.begin() + end);
  }

  std::vector<std::vector<std::string>> of(const Spans& spans) const {
    std::vector<std::vector<std::string>> found(rows.size());
    for (std::size_t row = 0; row < rows.size(); ++row) {
      for (auto i = spans.first[row]; i < spans.first[row + 1]; ++i) found[row].push_back(at(spans.start[i], spans.end[i]));
    }
    return found;
  }
};

std::vector<std::string> split(const std::string& text, const std::string& by) {
  std::vector<std::string> parts;
  std::size_t start = 0;
  for (std::size_t at; (at = text.find(by, start)) != std::string::npos; start = at + by.size()) {
    if (at > start) parts.push_back(text.substr(start, at - start));
  }
  if (start < text.size()) parts.push_back(text.substr(start));
  return parts;
}

std::vector<std::string> words_of(const std::string& text) {
  std::string spaced;
  for (const char c : text) spaced += (c & 0x80) || std::isalnum(static_cast<unsigned char>(c)) || c == '_' ? c : ' ';
  return split(spaced, " ");
}

std::vector<std::uint64_t> hashes(const Batch& batch, const Spans& spans) {
  std::vector<std::uint64_t> out(spans.start.size());
  hash_spans(batch.data.data(), static_cast<std::int64_t>(batch.data.size()), spans.start.data(), spans.end.data(),
             static_cast<std::int64_t>(out.size()), out.data());
  return out;
}

void check(const Batch& batch) {
  const auto rows = static_cast<std::int64_t>(batch.rows.size());
  const Spans found = words(batch.texts()), single = lines(batch.texts(), 1);
  const auto by_row = batch.of(found), by_line = batch.of(single);
  for (std::size_t row = 0; row < batch.rows.size(); ++row) {
    expect(by_row[row] == words_of(batch.rows[row]), "words of row " + std::to_string(row));
    expect(by_line[row] == split(batch.rows[row], "\n"), "lines of row " + std::to_string(row));
  }
  const auto hash = hashes(batch, found);
  std::map<std::uint64_t, std::string> known;
  for (std::size_t i = 0; i < hash.size(); ++i) {
    const std::string word = batch.at(found.start[i], found.end[i]);
    expect(known.emplace(hash[i], word).first->second == word, "two words of one hash");
  }
  for (const std::int64_t n : {1, 2, 5}) {
    std::vector<std::int64_t> again(batch.rows.size()), most(batch.rows.size());
    count_runs(hash.data(), found.first.data(), rows, n, again.data(), most.data());
    for (std::size_t row = 0; row < batch.rows.size(); ++row) {
      std::map<std::vector<std::string>, std::int64_t> times;
      std::int64_t repeats = 0, largest = 0;
      for (std::size_t i = 0; i + n <= by_row[row].size(); ++i) {
        const auto run = std::vector<std::string>(by_row[row].begin() + i, by_row[row].begin() + i + n);
        const std::int64_t now = ++times[run];
        repeats += now > 1;
        largest = std::max(largest, now);
      }
      expect(again[row] == repeats && most[row] == (largest > 1 ? largest : 0), "runs of row " + std::to_string(row));
    }
  }
  const auto key = hashes(batch, single);
  std::vector<std::int64_t> weight, sum(batch.rows.size());
  for (std::size_t i = 0; i < key.size(); ++i) weight.push_back(single.end[i] - single.start[i]);
  repeated(key.data(), single.first.data(), weight.data(), rows, sum.data());
  for (std::size_t row = 0; row < batch.rows.size(); ++row) {
    std::map<std::string, int> times;
    std::int64_t expected = 0;
    for (const std::string& line : by_line[row]) expected += times[line]++ > 0 ? static_cast<std::int64_t>(line.size()) : 0;
    expect(sum[row] == expected, "repeated lines of row " + std::to_string(row));
  }
  const auto full = std::count_if(by_row.begin(), by_row.end(), [](const auto& row) { return !row.empty(); });
  std::vector<std::uint64_t> bins(static_cast<std::size_t>(full) * kBins);
  signatures(hash.data(), found.first.data(), rows, 5, bins.data());
  for (const std::uint64_t bin : bins) expect(bin <= ~std::uint64_t{0} >> kBinBits, "an empty bin");
}

}  // namespace

int main() {
  Random random(3);
  check(Batch({}));
  check(Batch({""}));
  check(Batch({"word", "word", "", "\n", "a\n", "\nb", "\xff", std::string(1, '\0'), std::string(2000, 'x')}));
  const std::vector<std::string> parts{"a", "b", " ", " ", "\n", "the", "\xc3\xa9", ".", "x_9", std::string(300, 'y')};
  for (int batch = 0; batch < 60; ++batch) {
    std::vector<std::string> texts;
    for (long row = random.whole(0, 9); row > 0; --row) {
      std::string text;
      for (long part = random.whole(0, batch % 3 == 0 ? 400 : 12); part > 0; --part) {
        text += parts[static_cast<std::size_t>(random.whole(0, 9))];
      }
      texts.push_back(text);
    }
    check(Batch(std::move(texts)));
  }
  const Batch blank({"p q\n\n\nr\n\ns", "\n\nu\n", "\n"});
  expect(blank.of(lines(blank.texts(), 2)) == std::vector<std::vector<std::string>>{{"p q", "r", "s"}, {"u\n"}, {"\n"}},
         "paragraphs");
  return megaforge::testing::finish("corpus_text");
}
