// The Python face of csrc/corpus_text; megaforge/data/corpus/words.py and runs.py call it, and do the same in NumPy
// where it was not built.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "runs.h"
#include "words.h"

namespace py = pybind11;
using namespace megaforge::corpus_text;

namespace {

using Bytes = py::array_t<std::uint8_t, py::array::c_style>;
using Integers = py::array_t<std::int64_t, py::array::c_style>;
using Hashes = py::array_t<std::uint64_t, py::array::c_style>;

// Ascending from 0 to `size`, so that everything between two neighbours lies inside.
std::int64_t rows_of(const Integers& bounds, std::int64_t size) {
  const std::int64_t rows = bounds.size() - 1;
  const std::int64_t* const bound = bounds.data();
  if (rows < 0 || bound[0] != 0 || bound[rows] != size) throw std::invalid_argument("bounds that are not of the data");
  for (std::int64_t row = 0; row < rows; ++row) {
    if (bound[row] > bound[row + 1]) throw std::invalid_argument("bounds that do not ascend");
  }
  return rows;
}

Texts texts_of(const Bytes& data, const Integers& offsets) {
  return {data.data(), data.size(), offsets.data(), rows_of(offsets, data.size())};
}

// The vector as an array that owns it, without a copy.
Integers array_of(std::vector<std::int64_t>&& values) {
  auto* const owner = new std::vector<std::int64_t>(std::move(values));
  const py::capsule free(owner, [](void* p) { delete static_cast<std::vector<std::int64_t>*>(p); });
  return Integers(static_cast<py::ssize_t>(owner->size()), owner->data(), free);
}

py::tuple tuple_of(Spans&& spans) {
  return py::make_tuple(array_of(std::move(spans.first)), array_of(std::move(spans.start)),
                        array_of(std::move(spans.end)));
}

Hashes hashes_of(const Bytes& data, const Integers& start, const Integers& end) {
  if (start.size() != end.size()) throw std::invalid_argument("starts and ends of different number");
  for (py::ssize_t i = 0; i < start.size(); ++i) {
    if (start.data()[i] < 0 || start.data()[i] > end.data()[i] || end.data()[i] > data.size()) {
      throw std::invalid_argument("a span that is not of the data");
    }
  }
  Hashes hashes(start.size());
  hash_spans(data.data(), data.size(), start.data(), end.data(), start.size(), hashes.mutable_data());
  return hashes;
}

py::tuple counts_of(const Hashes& hash, const Integers& first, std::int64_t n) {
  const std::int64_t rows = rows_of(first, hash.size());
  if (n < 1) throw std::invalid_argument("runs of less than one word");
  Integers again(rows), most(rows);
  count_runs(hash.data(), first.data(), rows, n, again.mutable_data(), most.mutable_data());
  return py::make_tuple(again, most);
}

Integers repeated_of(const Hashes& key, const Integers& first, const Integers& weight) {
  const std::int64_t rows = rows_of(first, key.size());
  if (weight.size() != key.size()) throw std::invalid_argument("keys and weights of different number");
  Integers sum(rows);
  repeated(key.data(), first.data(), weight.data(), rows, sum.mutable_data());
  return sum;
}

Hashes signatures_of(const Hashes& hash, const Integers& first, std::int64_t n) {
  const std::int64_t rows = rows_of(first, hash.size());
  if (n < 1) throw std::invalid_argument("runs of less than one word");
  py::ssize_t full = 0;
  for (std::int64_t row = 0; row < rows; ++row) full += first.data()[row + 1] > first.data()[row];
  Hashes bins({full, static_cast<py::ssize_t>(kBins)});
  signatures(hash.data(), first.data(), rows, n, bins.mutable_data());
  return bins;
}

}  // namespace

PYBIND11_MODULE(_corpus_text, module) {
  module.doc() = "Words, lines and runs of words of a batch of texts; see csrc/corpus_text.";
  module.def("words", [](const Bytes& data, const Integers& offsets) { return tuple_of(words(texts_of(data, offsets))); },
             py::arg("data"), py::arg("offsets"), "(first, start, end) of the words");
  module.def(
      "lines",
      [](const Bytes& data, const Integers& offsets, int feeds) {
        if (feeds != 1 && feeds != 2) throw std::invalid_argument("feeds: 1 or 2");
        return tuple_of(lines(texts_of(data, offsets), feeds));
      },
      py::arg("data"), py::arg("offsets"), py::arg("feeds"), "(first, start, end) of the lines or paragraphs");
  module.def("hash_spans", &hashes_of, py::arg("data"), py::arg("start"), py::arg("end"),
             "The hash of each span");
  module.def("count_runs", &counts_of, py::arg("hash"), py::arg("first"), py::arg("n"),
             "(repeats, times of the commonest) of the runs of n words of each row");
  module.def("repeated", &repeated_of, py::arg("key"), py::arg("first"), py::arg("weight"),
             "Of each row the weights of the keys that were there before");
  module.def("signatures", &signatures_of, py::arg("hash"), py::arg("first"), py::arg("n"),
             "MinHash signatures of the rows that have words");
}
