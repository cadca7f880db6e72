// Products of padded matrices and the iterations made of them, for the instruction set that MF_ISA names.

namespace megaforge::newton_schulz::MF_ISA {

inline std::uint16_t to_bf16(float x) {
  const Word bits = std::bit_cast<Word>(x);
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
inline float from_bf16(std::uint16_t x) { return as_float(static_cast<Word>(x) << 16); }

// Half, which half.h or half_bf16.h names: the bits of a bf16, or the same number as a float.
template <class Half>
inline Half as_half(std::uint16_t x) {
  if constexpr (sizeof(Half) == 2) return x;
  else return from_bf16(x);
}
inline float of_half(std::uint16_t x) { return from_bf16(x); }
inline float of_half(float x) { return x; }

// How an element is kept: as it is, or rounded to bf16 in whatever type.
struct Exact {
  using Element = float;
  static float store(float x) { return x; }
  static float load(float x) { return x; }
};
struct Rounded {
  using Element = Half;
  static Half store(float x) { return as_half<Half>(to_bf16(x)); }
  static float load(Half x) { return of_half(x); }
};

template <class Element>
constexpr int kPerWord = static_cast<int>(sizeof(Word) / sizeof(Element));
template <class Element>
using TypeOf = std::conditional_t<sizeof(Element) == 2, Bf16, F32>;

constexpr int64_t kAlign = 2 * kPanel;   // rows and columns are padded to multiples: panels of 16, words of two
constexpr int64_t kDepth = 384;          // words that are summed in one go: the panels of a block stay in the caches
constexpr int64_t kRowBlock = 8 * kPanel, kColumnBlock = 12 * kPanel;

constexpr int64_t padded(int64_t x, int64_t unit = kAlign) { return (x + unit - 1) / unit * unit; }

// A row-major matrix whose padding is zero.
template <class Element>
struct Matrix {
  Element* data;
  int64_t rows, columns;  // without the padding
  int64_t stride;

  int64_t padded_rows() const { return padded(rows); }
  int64_t words() const { return padded(columns) / kPerWord<Element>; }
  const Word* row_words(int64_t r) const { return reinterpret_cast<const Word*>(data + r * stride); }
};

// Hands out pieces of the scratch memory; without any, it counts what would be needed.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* const piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += padded(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  template <class Element>
  Matrix<Element> matrix(int64_t rows, int64_t columns) {
    int64_t stride = padded(columns);
    if (stride * static_cast<int64_t>(sizeof(Element)) % 4096 == 0) stride += kAlign;  // rows in other sets of a cache
    Matrix<Element> made{take<Element>(padded(rows) * stride), rows, columns, stride};
    if (memory_ != nullptr) {
      for (int64_t r = 0; r < padded(rows); ++r) {
        const int64_t start = r < rows ? columns : 0;
        std::memset(static_cast<void*>(made.data + r * stride + start), 0,
                    static_cast<std::size_t>(stride - start) * sizeof(Element));
      }
    }
    return made;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// body(i) for i < count, on a team of threads; which thread does which does not matter.
template <class Body>
void share(int team, int64_t count, Body body) {
  if (team <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(team)
  for (int64_t i = 0; i < count; ++i) body(i);
}

struct Packed {
  const Word* data;
  int64_t panel_words;  // of one panel
};

// Rows of x as panels: the left factor x, or the right factor x^T.
template <class Element>
Packed pack_rows(const Matrix<Element>& x, Word* to, int team) {
  const int64_t words = x.words(), panel = words * kPanel;
  share(team, x.padded_rows() / kPanel, [=](int64_t p) {
    for (int64_t k = 0; k < words; k += kPanel) {
      transpose(x.row_words(p * kPanel) + k, x.stride / kPerWord<Element>, to + p * panel + k * kPanel);
    }
  });
  return {to, panel};
}

// Columns of x as panels: the right factor x.
template <class Element>
Packed pack_columns(const Matrix<Element>& x, Word* to, int team) {
  const int64_t words = x.padded_rows() / kPerWord<Element>, panel = words * kPanel;
  share(team, padded(x.columns) / kPanel, [=](int64_t p) {
    for (int64_t k = 0; k < words; ++k) {
      Word* const at = to + p * panel + k * kPanel;
      if constexpr (kPerWord<Element> == 1) {
        std::memcpy(at, x.data + k * x.stride + p * kPanel, kPanel * sizeof(Word));
      } else {
        const Element *even = x.data + 2 * k * x.stride + p * kPanel, *odd = even + x.stride;
        for (int j = 0; j < kPanel; ++j) at[j] = static_cast<Word>(even[j]) | static_cast<Word>(odd[j]) << 16;
      }
    }
  });
  return {to, panel};
}

// Copies the part of rows [r0, r1) and columns [c0, c1) below the diagonal to its mirror image.
template <class Element>
void mirror(const Matrix<Element>& x, int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
  constexpr int64_t kSide = 16;
  for (int64_t r = r0; r < r1; r += kSide) {
    for (int64_t c = c0; c < std::min(c1, r + kSide); c += kSide) {
      const int64_t rows = std::min(r + kSide, r1), columns = std::min(c + kSide, c1);
      if (rows - r == kSide && columns - c == kSide && c + kSide <= r) {
        for (int64_t j = 0; j < kSide; ++j) {
          for (int64_t i = 0; i < kSide; ++i) x.data[(c + j) * x.stride + r + i] = x.data[(r + i) * x.stride + c + j];
        }
        continue;
      }
      for (int64_t i = r; i < rows; ++i) {
        for (int64_t j = c; j < std::min(columns, i); ++j) x.data[j * x.stride + i] = x.data[i * x.stride + j];
      }
    }
  }
}

// The products of 8 (4) rows with the panels from `first_panel` to `last_panel`, at most three at a time.
template <class Type>
inline void multiply_row(const Word* a, const Packed& right, int64_t k, int64_t depth, int64_t first_panel,
                         int64_t last_panel, float* sums, bool first) {
  for (int64_t p = first_panel; p < last_panel;) {
    const int64_t left = last_panel - p;
    const Word* const b = right.data + p * right.panel_words + k * kPanel;
    float* const c = sums + (p - first_panel) * kPanel;
    if (left >= 3 && left != 4) {
      multiply<Type, 3>(a, b, right.panel_words, depth, c, kColumnBlock, first);
      p += 3;
    } else if (left >= 2) {
      multiply<Type, 2>(a, b, right.panel_words, depth, c, kColumnBlock, first);
      p += 2;
    } else {
      multiply<Type, 1>(a, b, right.panel_words, depth, c, kColumnBlock, first);
      p += 1;
    }
  }
}

// Calls finish(row, first column, end column, sums of that row from that column on) for every row of left * right,
// block by block, and done(r0, r1, c0, c1) after each block. `lower`: only for places on and below the diagonal.
// `lefts`: factors whose products with the same `right` are added up.
template <class Type, class Finish, class Done>
void product(std::span<const Packed> lefts, const Packed& right, int64_t rows, int64_t columns, int64_t words, bool lower,
             float* sums, int team, Finish finish, Done done) {
  const int64_t column_blocks = (columns + kColumnBlock - 1) / kColumnBlock;
  int64_t block_rows = kRowBlock;  // fewer where a team would have too few blocks to end together
  while (team > 1 && block_rows > kRows && (rows + block_rows - 1) / block_rows * column_blocks < 8 * team) block_rows /= 2;
  const int64_t row_blocks = (rows + block_rows - 1) / block_rows;
  share(team, row_blocks * column_blocks, [=](int64_t block) {
    // The last rows of a triangle are the longest: they come first, so that threads end together.
    const int64_t r0 = (row_blocks - 1 - block / column_blocks) * block_rows, r1 = std::min(r0 + block_rows, rows);
    const int64_t c0 = block % column_blocks * kColumnBlock, c1 = std::min(c0 + kColumnBlock, columns);
    if (lower && c0 >= r1) return;
    float* const own = sums + omp_get_thread_num() * kRowBlock * kColumnBlock * (team > 1 ? 1 : 0);
    bool first = true;
    for (const Packed& left : lefts) {
      for (int64_t k = 0; k < words; k += kDepth, first = false) {
        const int64_t depth = std::min(kDepth, words - k);
        for (int64_t r = r0; r < r1; r += kRows) {
          const Word* const a = left.data + r / kPanel * left.panel_words + k * kPanel + r % kPanel;
          const int64_t end = lower ? std::min(c1, r + kRows) : c1;
          if (end <= c0) continue;
          multiply_row<Type>(a, right, k, depth, c0 / kPanel, (end + kPanel - 1) / kPanel,
                             own + (r - r0) * kColumnBlock, first);
        }
      }
    }
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t end = lower ? std::min(c1, r + 1) : c1;
      if (end > c0) finish(r, c0, end, own + (r - r0) * kColumnBlock);
    }
    done(r0, r1, c0, c1);
  });
}

// What a matrix's iterations need beside their matrices.
struct Room {
  Word *left, *right, *more;
  float* sums;
  int team;
};

// out = scale (left right) + add_scale add + diagonal I for symmetric matrices that commute; `right` is given by rows.
template <class From, class To>
void symmetric(const Matrix<typename From::Element>& left, const Matrix<typename From::Element>& right, float scale,
               float add_scale, const Matrix<typename To::Element>* add, float diagonal,
               const Matrix<typename To::Element>& out, const Room& room) {
  using Element = typename From::Element;
  const Packed a = pack_rows(left, room.left, room.team);
  const Packed b = left.data == right.data ? a : pack_rows(right, room.right, room.team);
  const auto finish = [=](int64_t r, int64_t begin, int64_t end, const float* sums) {
    auto* const to = out.data + r * out.stride;
    if (add != nullptr) {
      const auto* const more = add->data + r * add->stride;
      for (int64_t c = begin; c < end; ++c) to[c] = To::store(scale * sums[c - begin] + add_scale * To::load(more[c]));
    } else {
      for (int64_t c = begin; c < end; ++c) to[c] = To::store(scale * sums[c - begin]);
    }
    if (r < end && r >= begin && diagonal != 0.0f) to[r] = To::store(To::load(to[r]) + diagonal);
  };
  product<TypeOf<Element>>(std::span(&a, 1), b, out.rows, out.columns, left.words(), true, room.sums, room.team, finish,
                           [=](int64_t r0, int64_t r1, int64_t c0, int64_t c1) { mirror(out, r0, r1, c0, c1); });
}

// to = x divided by its norm, or by eps where that is larger.
template <class Kept>
void normalize(const float* x, double eps, const Matrix<typename Kept::Element>& to, double* squares, int team) {
  const int64_t n = to.columns;
  share(team, to.rows, [=](int64_t r) {
    double sum[8] = {};  // in one order whatever the instruction set
    for (int64_t c = 0; c < n; ++c) sum[c % 8] += static_cast<double>(x[r * n + c]) * static_cast<double>(x[r * n + c]);
    squares[r] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  });
  double total = 0;
  for (int64_t r = 0; r < to.rows; ++r) total += squares[r];
  const double norm = std::sqrt(total);
  const double divisor = norm < eps ? eps : norm;  // NaN stays
  share(team, to.rows, [=](int64_t r) {
    for (int64_t c = 0; c < n; ++c) {
      to.data[r * to.stride + c] = Kept::store(static_cast<float>(static_cast<double>(x[r * n + c]) / divisor));
    }
  });
}

template <class Kept>
void standard(const Problem& problem, const float* x, float* out, Arena& arena, const Room& room) {
  using Element = typename Kept::Element;
  const int64_t m = problem.m, n = problem.n;
  Matrix<Element> from = arena.matrix<Element>(m, n), to = arena.matrix<Element>(m, n);
  const Matrix<Element> gram = arena.matrix<Element>(m, m), polynomial = arena.matrix<Element>(m, m);
  double* const squares = arena.take<double>(m);
  if (x == nullptr) return;
  normalize<Kept>(x, problem.eps, from, squares, room.team);
  for (std::size_t i = 0; i < problem.steps.size(); ++i) {
    const Step step = problem.steps[i];
    symmetric<Kept, Kept>(from, from, 1.0f, 0.0f, nullptr, 0.0f, gram, room);
    symmetric<Kept, Kept>(gram, gram, step.c, step.b, &gram, 0.0f, polynomial, room);
    const Packed a = pack_rows(polynomial, room.left, room.team), b = pack_columns(from, room.right, room.team);
    const bool last = i + 1 == problem.steps.size();
    product<TypeOf<Element>>(
        std::span(&a, 1), b, m, n, polynomial.words(), false, room.sums, room.team,
        [=](int64_t r, int64_t begin, int64_t end, const float* sums) {
          const Element* const old = from.data + r * from.stride;
          if (last) {
            for (int64_t c = begin; c < end; ++c) {
              out[r * n + c] = Kept::load(Kept::store(step.a * Kept::load(old[c]) + sums[c - begin]));
            }
          } else {
            Element* const next = to.data + r * to.stride;
            for (int64_t c = begin; c < end; ++c) next[c] = Kept::store(step.a * Kept::load(old[c]) + sums[c - begin]);
          }
        },
        [](int64_t, int64_t, int64_t, int64_t) {});
    std::swap(from, to);
  }
}

// Q in place of q, from R in place of r.
inline Matrix<float> polynomial_of(Matrix<float> r, std::span<const Step> steps, Arena& arena, const Room& room) {
  const int64_t m = r.rows;
  Matrix<float> q = arena.matrix<float>(m, m), z = arena.matrix<float>(m, m), spare = arena.matrix<float>(m, m);
  if (r.data == nullptr) return q;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const Matrix<float>& factor = i == 0 ? q : z;
    symmetric<Exact, Exact>(r, r, steps[i].c, steps[i].b, &r, steps[i].a, factor, room);
    if (i + 1 < steps.size()) {
      symmetric<Exact, Exact>(factor, r, 1.0f, 0.0f, nullptr, 0.0f, spare, room);
      symmetric<Exact, Exact>(spare, factor, 1.0f, 0.0f, nullptr, 0.0f, r, room);
    }
    if (i > 0) {
      symmetric<Exact, Exact>(z, q, 1.0f, 0.0f, nullptr, 0.0f, spare, room);
      std::swap(q, spare);
    }
  }
  return q;
}

template <class Kept>
void by_gram(const Problem& problem, const float* x, float* out, Arena& arena, const Room& room) {
  using Element = typename Kept::Element;
  constexpr bool kSplit = sizeof(Element) == 2;
  const int64_t m = problem.m, n = problem.n;
  const Matrix<Element> from = arena.matrix<Element>(m, n);
  const Matrix<float> gram = arena.matrix<float>(m, m);
  double* const squares = arena.take<double>(m);
  if (x != nullptr) {
    normalize<Kept>(x, problem.eps, from, squares, room.team);
    symmetric<Kept, Exact>(from, from, 1.0f, 0.0f, nullptr, 0.0f, gram, room);
  }
  const Matrix<float> q = polynomial_of(gram, problem.steps, arena, room);
  const Matrix<Element> high = arena.matrix<Element>(m, m), low = arena.matrix<Element>(kSplit ? m : 0, m);
  if (x == nullptr) return;
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < m; ++c) {
      const float value = q.data[r * q.stride + c];
      if constexpr (kSplit) {
        high.data[r * high.stride + c] = Kept::store(value);
        low.data[r * low.stride + c] = Kept::store(value - Kept::load(Kept::store(value)));
      } else {
        high.data[r * high.stride + c] = value;
      }
    }
  }
  Packed lefts[2] = {pack_rows(high, room.left, room.team), {}};
  if constexpr (kSplit) lefts[1] = pack_rows(low, room.more, room.team);
  const Packed b = pack_columns(from, room.right, room.team);
  product<TypeOf<Element>>(
      std::span(lefts, kSplit ? 2 : 1), b, m, n, high.words(), false, room.sums, room.team,
      [=](int64_t r, int64_t begin, int64_t end, const float* sums) {
        for (int64_t c = begin; c < end; ++c) out[r * n + c] = sums[c - begin];
      },
      [](int64_t, int64_t, int64_t, int64_t) {});
}

inline Room take_room(Arena& arena, int64_t m, int64_t n, int team) {
  const int64_t words = padded(m) * padded(n);
  return {arena.take<Word>(words), arena.take<Word>(words), arena.take<Word>(padded(m) * padded(m)),
          arena.take<float>(team * kRowBlock * kColumnBlock), team};
}

inline void visit(const Problem& problem, const float* x, float* out, Arena& arena, int team) {
  const Room room = take_room(arena, problem.m, problem.n, team);
  switch (problem.way) {
    case Way::standard_bf16: return standard<Rounded>(problem, x, out, arena, room);
    case Way::standard_f32: return standard<Exact>(problem, x, out, arena, room);
    case Way::gram_f32: return by_gram<Exact>(problem, x, out, arena, room);
    case Way::gram_split: return by_gram<Rounded>(problem, x, out, arena, room);
  }
}

inline int64_t scratch_bytes(int64_t m, int64_t n, Way way, int team) {
  Arena arena(nullptr);
  visit({1, m, n, {}, way, 0.0}, nullptr, nullptr, arena, team);
  return arena.used();
}

inline void orthogonalize(const Problem& problem, const float* x, float* out, void* scratch, int team) {
  Arena arena(scratch);
  visit(problem, x, out, arena, team);
}

inline void polynomial(int64_t m, std::span<const Step> steps, const float* gram, float* out, void* scratch, int team) {
  Arena arena(scratch);
  const Room room = take_room(arena, m, m, team);
  const Matrix<float> r = arena.matrix<float>(m, m);
  for (int64_t i = 0; i < m; ++i) std::memcpy(r.data + i * r.stride, gram + i * m, static_cast<std::size_t>(m) * 4);
  const Matrix<float> q = polynomial_of(r, steps, arena, room);
  for (int64_t i = 0; i < m; ++i) std::memcpy(out + i * m, q.data + i * q.stride, static_cast<std::size_t>(m) * 4);
}

}  // namespace megaforge::newton_schulz::MF_ISA
