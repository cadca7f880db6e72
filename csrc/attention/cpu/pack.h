// Rows of tensors as the words, panels and pairs that products take; part of vec.h's namespace.

namespace megaforge::attention::MF_ISA {

// Widths of a problem's heads, in channels and in words.
template <class T>
struct Widths {
  Int d;        // channels
  Int channels;  // padded
  Int words;     // of a row
  Int row;       // words from one row to the next, where rows are turned in squares of 16
  Int panels;    // of channels

  explicit Widths(Int d)
      : d(d), channels(round_up(d, kLine)), words(channels / T::kPer), row(round_up(words, kLine)),
        panels((channels + kPanel - 1) / kPanel) {}

  Int columns(Int panel) const { return least(kPanel, channels - panel * kPanel); }
};

// Shares of a thread's scratch, in the order in which they are taken.
class Shares {
 public:
  explicit Shares(void* base) : base_(reinterpret_cast<std::uintptr_t>(base)) {}
  template <class X>
  X* take(Int count) {
    const auto at = base_ + static_cast<std::uintptr_t>(bytes_);
    bytes_ += round_up(count * static_cast<Int>(sizeof(X)), 64);
    return reinterpret_cast<X*>(at);
  }
  Int bytes() const { return bytes_; }

 private:
  std::uintptr_t base_;
  Int bytes_ = 0;
};

inline void clear(void* to, Int bytes) { __builtin_memset(to, 0, static_cast<std::size_t>(bytes)); }

// One head's rows of a tensor.
struct Rows {
  const char* data;
  Type type;
  Int stride;  // bytes

  Rows(const View& view, Int batch, Int head, Int first) : data(nullptr), type(view.type), stride(0) {
    const Int size = type == Type::f32 ? 4 : 2;
    stride = view.stride_s * size;
    data = static_cast<const char*>(view.data) + (batch * view.stride_b + head * view.stride_h + first * view.stride_s) * size;
  }
  const char* at(Int i) const { return data + i * stride; }
};

// Row i as words; zeros beyond channel d, up to a whole `row` of them.
template <class T>
inline void read_row(const Rows& rows, Int i, const Widths<T>& width, Word* to) {
  const char* from = rows.at(i);
  if (rows.type == T::kType) {
    const Int bytes = width.d * (4 / T::kPer);
    __builtin_memcpy(to, from, static_cast<std::size_t>(bytes));
    clear(reinterpret_cast<char*>(to) + bytes, width.row * 4 - bytes);
    return;
  }
  // fp32 words of bf16 numbers
  const auto* halves = reinterpret_cast<const std::uint16_t*>(from);
  Int c = 0;
  for (; c + kWidth <= width.d; c += kWidth) *reinterpret_cast<LooseBits*>(to + c) = load_half(halves + c) << 16;
  for (; c < width.d; ++c) to[c] = static_cast<Word>(halves[c]) << 16;
  clear(to + width.d, (width.row - width.d) * 4);
}

// Rows [first, first + count) of `row` words each; rows from `end` on are zeros.
template <class T>
inline void read_rows(const Rows& rows, Int first, Int count, Int end, const Widths<T>& width, Word* to) {
  const Int there = between(end - first, 0, count);
  for (Int i = 0; i < there; ++i) read_row<T>(rows, first + i, width, to + i * width.row);
  clear(to + there * width.row, (count - there) * width.row * 4);
}

// Channel c of `x` and channel c + half, as a plane, turned by the angle of this cosine and sine; `back`: by its opposite.
template <class T>
inline void turn_channels(Word* x, const float* cos, const float* sin, Int half, bool back) {
  const float sign = back ? -1.0f : 1.0f;
  const Int whole = half - half % kWidth;
  if constexpr (T::kPer == 1) {
    float *first = reinterpret_cast<float*>(x), *second = first + half;
    for (Int c = 0; c < whole; c += kWidth) {
      const Vec a = load(first + c), b = load(second + c), along = load(cos + c), across = load(sin + c) * sign;
      store(first + c, a * along - b * across);
      store(second + c, b * along + a * across);
    }
    for (Int c = whole; c < half; ++c) {
      const float a = first[c], b = second[c];
      first[c] = a * cos[c] - b * sin[c] * sign;
      second[c] = b * cos[c] + a * sin[c] * sign;
    }
  } else {
    auto *first = reinterpret_cast<std::uint16_t*>(x), *second = first + half;
    for (Int c = 0; c < whole; c += kWidth) {
      const Vec a = (Vec)(load_half(first + c) << 16), b = (Vec)(load_half(second + c) << 16);
      const Vec along = load(cos + c), across = load(sin + c) * sign;
      store_half(first + c, narrow(a * along - b * across));
      store_half(second + c, narrow(b * along + a * across));
    }
    for (Int c = whole; c < half; ++c) {
      const float a = widen(first[c]), b = widen(second[c]);
      first[c] = narrow(a * cos[c] - b * sin[c] * sign);
      second[c] = narrow(b * cos[c] + a * sin[c] * sign);
    }
  }
}

// Rows [first, first + count) of a segment's queries or keys, whose first is at `place`, turned where they are before `end`.
template <class T>
inline void turn_rows(const Turns& turns, Int batch, Int place, Int first, Int count, Int end, Int row, Word* to, bool back) {
  if (turns.half == 0) return;
  for (Int i = 0; i < least(end - first, count); ++i) {
    const Int at = batch * turns.stride_b + (place + first + i) * turns.stride_s;
    turn_channels<T>(to + i * row, turns.cos + at, turns.sin + at, turns.half, back);
  }
}

// 16 rows as columns [column, column + 16) of a panel [words, kPanel].
template <class T>
inline void to_panel(const Word* rows, const Widths<T>& width, Word* panel, Int column) {
  for (Int w = 0; w < width.words; w += 16) {
    turn(rows + w, width.row, panel + w * kPanel + column, kPanel, least(16, width.words - w));
  }
}

// As many rows as a word holds numbers, as one place along the depth of panels of channels; these are `panel` words apart.
template <class T>
inline void to_pairs(const Word* rows, const Widths<T>& width, Word* to, Int panel) {
  for (Int p = 0; p < width.panels; ++p, to += panel) {
    const Int columns = width.columns(p);
    if constexpr (T::kPer == 1) {
      __builtin_memcpy(to, rows + p * kPanel, static_cast<std::size_t>(columns) * 4);
    } else {
      const auto* low = reinterpret_cast<const char*>(rows + p * kPanel / 2);
      const auto* high = reinterpret_cast<const char*>(rows + width.row + p * kPanel / 2);
      for (Int c = 0; c < columns; c += kWidth) {
        *reinterpret_cast<LooseBits*>(to + c) = load_half(low + 2 * c) | (load_half(high + 2 * c) << 16);
      }
    }
  }
}

// d numbers times `factor` to where they belong.
inline void write_row(const Result& result, Int batch, Int head, Int i, const float* from, Int d, float factor) {
  const Int at = batch * result.stride_b + head * result.stride_h + i * result.stride_s, whole = d - d % kWidth;
  if (result.type == Type::f32) {
    float* to = static_cast<float*>(result.data) + at;
    for (Int c = 0; c < whole; c += kWidth) store(to + c, load(from + c) * factor);
    for (Int c = whole; c < d; ++c) to[c] = from[c] * factor;
  } else {
    std::uint16_t* to = static_cast<std::uint16_t*>(result.data) + at;
    for (Int c = 0; c < whole; c += kWidth) store_half(to + c, narrow(load(from + c) * factor));
    for (Int c = whole; c < d; ++c) to[c] = narrow(from[c] * factor);
  }
}

// The generator's keys of a head's queries in a segment; null where nothing is dropped.
inline const std::int64_t* seeds_of(const Problem& in, const Segment& segment, Int head) {
  const std::int64_t* rows = in.dropped.rows;
  return rows == nullptr ? nullptr : rows + (segment.batch * in.heads + head) * in.length + segment.query;
}

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

}  // namespace megaforge::attention::MF_ISA
