// Copies one window of a token stream out of a memory-mapped token file. A window over many short documents is many
// short copies, and a Python loop or a vectorised index costs several times the bytes moved; see
// megaforge/data/sample_order.py, which falls back to NumPy where this module was not built.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

namespace py = pybind11;

namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
using BoolArray = py::array_t<bool, py::array::c_style>;

struct Order {
  const std::int64_t* bounds;  // [documents + 1], running token count
  const std::int64_t* starts;  // [documents], first token of each in the file
  std::int64_t documents;
};

template <typename Token>
std::int64_t copy_window(const Token* tokens, std::int64_t count, const Order& order, std::int64_t offset,
                         std::int64_t* out, bool* marks, std::int64_t filled, std::int64_t length) {
  const std::int64_t* after = std::upper_bound(order.bounds, order.bounds + order.documents + 1, offset);
  for (std::int64_t document = after - order.bounds - 1; filled < length && document < order.documents; ++document) {
    const std::int64_t begin = order.bounds[document];
    const std::int64_t take = std::min(order.bounds[document + 1] - offset, length - filled);
    const std::int64_t source = order.starts[document] + offset - begin;
    if (source < 0 || take < 0 || source + take > count) {
      throw std::out_of_range("a document lies outside the token file");
    }
    if (offset == begin) marks[filled] = true;
    for (std::int64_t i = 0; i < take; ++i) out[filled + i] = static_cast<std::int64_t>(tokens[source + i]);
    filled += take;
    offset += take;
  }
  return filled;
}

// out[filled:] = the stream's tokens from `offset` on, until either ends; returns the new `filled`.
std::int64_t copy(const py::array& tokens, const Int64Array& bounds, const Int64Array& starts, std::int64_t offset,
                  Int64Array& out, BoolArray& marks, std::int64_t filled) {
  const std::int64_t length = out.size();
  const std::int64_t documents = bounds.size() - 1;
  if (documents < 0 || starts.size() < documents || marks.size() != length || filled < 0 || filled > length ||
      tokens.ndim() != 1 || !(tokens.flags() & py::array::c_style)) {
    throw std::invalid_argument("copy: sizes that do not belong together");
  }
  const Order order{bounds.data(), starts.data(), documents};
  std::int64_t* const target = out.mutable_data();
  bool* const flags = marks.mutable_data();
  const auto with = [&](auto zero) {
    using Token = decltype(zero);
    return copy_window(static_cast<const Token*>(tokens.data()), tokens.size(), order, offset, target, flags, filled,
                       length);
  };
  const py::dtype type = tokens.dtype();
  switch (type.kind() * 16 + type.itemsize()) {
    case 'u' * 16 + 1: return with(std::uint8_t{});
    case 'i' * 16 + 1: return with(std::int8_t{});
    case 'u' * 16 + 2: return with(std::uint16_t{});
    case 'i' * 16 + 2: return with(std::int16_t{});
    case 'i' * 16 + 4: return with(std::int32_t{});
    case 'i' * 16 + 8: return with(std::int64_t{});
    default: throw std::invalid_argument("copy: not a token type of the .idx format");
  }
}

}  // namespace

PYBIND11_MODULE(_data_helpers, module) {
  module.doc() = "Copies windows of token streams; see csrc/data_helpers.";
  module.def("copy", &copy, py::arg("tokens"), py::arg("bounds"), py::arg("starts"), py::arg("offset"),
             py::arg("out"), py::arg("marks"), py::arg("filled"),
             "out[filled:] = the stream's tokens from offset on; marks document starts; returns the new filled.");
}
