// WKV-7 on vectors of W floats. A file for one instruction set includes this inside a namespace of its own and under that
// set's target pragma; nothing from the standard library is called, so no code for it can leak into another file's.
//
// Forward: the lanes are value channels, the rows of the state are key channels. Updating the state with one token,
// reading it with r and reading it with the next token's a is one pass over it: five multiply-adds an element, one load,
// one store, no sums across lanes.
//
// Backward: the lanes are key channels, and kRows value channels at a time have their rows of the state, later of its
// gradient, in registers over a run of kRun tokens. Value channels do not see each other, except in the gradients
// of r, w, k, a and b, which are sums over them and are added up in memory.

using Int = std::int64_t;

constexpr Int kHeads = 8;   // heads next to each other in memory that take turns
constexpr Int kTile = 16;   // tokens of a turn of the forward pass
constexpr Int kRun = 16;    // tokens whose states the backward pass holds at once
constexpr int kRows = 4;    // rows of the state that the backward pass works on at once

template <int W>
struct Lanes {
  typedef float Float __attribute__((vector_size(W * 4)));
  typedef float Unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef std::int32_t Word __attribute__((vector_size(W * 4)));
  typedef std::uint32_t Bits __attribute__((vector_size(W * 4)));
  typedef std::uint16_t Half __attribute__((vector_size(W * 2)));
  typedef std::uint16_t UnalignedHalf __attribute__((vector_size(W * 2), aligned(2), may_alias));
};
template <int W>
using Vec = typename Lanes<W>::Float;

template <int W>
MEGAFORGE_INLINE Vec<W> load(const float* from) {
  return *reinterpret_cast<const typename Lanes<W>::Unaligned*>(from);
}

template <int W>
MEGAFORGE_INLINE void store(float* to, Vec<W> x) {
  *reinterpret_cast<typename Lanes<W>::Unaligned*>(to) = x;
}

template <int W>
MEGAFORGE_INLINE Vec<W> all(float x) {
  return Vec<W>{} + x;
}

MEGAFORGE_INLINE void clear(float* x, Int count) { __builtin_memset(x, 0, static_cast<std::size_t>(count) * sizeof(float)); }
MEGAFORGE_INLINE void copy(float* to, const float* from, Int count) {
  __builtin_memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
}
MEGAFORGE_INLINE Int least(Int x, Int y) { return x < y ? x : y; }
MEGAFORGE_INLINE Int round_up(Int x, Int to) { return (x + to - 1) / to * to; }

// e^x to about one unit in the last place (polynomial of Cephes' expf); what would be denormal becomes 1e-38.
template <int W>
MEGAFORGE_INLINE Vec<W> exponential(Vec<W> x) {
  x = x < -87.3f ? all<W>(-87.3f) : x;
  x = x > 88.0f ? all<W>(88.0f) : x;
  const Vec<W> shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits hold the nearest integer
  const Vec<W> n = shifted - 12582912.0f;
  const Vec<W> rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<W> p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * (rest * rest) + rest + 1.0f;
  using Word = typename Lanes<W>::Word;
  return p * (Vec<W>)((__builtin_convertvector(n, Word) + 127) << 23);
}

template <int W>
struct Exponential {
  MEGAFORGE_INLINE Vec<W> operator()(Vec<W> x) const { return exponential<W>(x); }
};

template <int W>
struct Same {
  MEGAFORGE_INLINE Vec<W> operator()(Vec<W> x) const { return x; }
};

template <int W>
struct FromFloat {
  MEGAFORGE_INLINE Vec<W> operator()(const float* from) const { return load<W>(from); }
};

template <int W>
struct FromHalf {
  MEGAFORGE_INLINE Vec<W> operator()(const std::uint16_t* from) const {
    const typename Lanes<W>::Half half = *reinterpret_cast<const typename Lanes<W>::UnalignedHalf*>(from);
    return (Vec<W>)(__builtin_convertvector(half, typename Lanes<W>::Bits) << 16);
  }
};

// Tokens as floats; a stride in floats.
struct Floats {
  float* data;
  Int stride;

  MEGAFORGE_INLINE float* token(Int t) const { return data + t * stride; }
};

// One head's tokens of a tensor.
struct Tokens {
  const char* data;
  Type type;
  Int stride;  // bytes

  MEGAFORGE_INLINE Tokens(const View& view, Int batch, Int head) : data(nullptr), type(view.type), stride(0) {
    if (view.data == nullptr) return;
    const Int size = static_cast<Int>(size_of(type));
    stride = view.stride_s * size;
    data = static_cast<const char*>(view.data) + (batch * view.stride_b + head * view.stride_h) * size;
  }

  // f(vector of W channels) of `count` tokens from t on as floats, `width` apart; what is beyond channel n is f(0).
  template <int W, typename F>
  MEGAFORGE_INLINE void read(Int t, Int count, Int n, Int width, float* out, F f) const {
    if (data == nullptr || count == 0) {
      for (Int j = 0; j < count * width; j += W) store<W>(out + j, f(Vec<W>{}));
    } else if (type == Type::bf16) {
      read_as<W, std::uint16_t>(t, count, n, width, out, f, FromHalf<W>());
    } else {
      read_as<W, float>(t, count, n, width, out, f, FromFloat<W>());
    }
  }

  template <int W>
  MEGAFORGE_INLINE void read(Int t, Int count, Int n, Int width, float* out) const {
    read<W>(t, count, n, width, out, Same<W>());
  }

  // The same without f, where they are if they can be read there.
  template <int W>
  MEGAFORGE_INLINE Floats floats(Int t, Int count, Int n, Int width, float* room) const {
    if (type == Type::f32 && n == width && data != nullptr) {
      return {reinterpret_cast<float*>(const_cast<char*>(data + t * stride)), stride / 4};
    }
    read<W>(t, count, n, width, room);
    return {room, width};
  }

  // Asks for the line of memory that channel j of token t is in. The token may lie beyond the last one.
  MEGAFORGE_INLINE void prefetch(Int t, Int j) const {
    const auto place = reinterpret_cast<std::uintptr_t>(data) + t * stride + j * size_of(type);
    __builtin_prefetch(reinterpret_cast<const void*>(place));
  }

 private:
  template <int W, typename T, typename F, typename Convert>
  MEGAFORGE_INLINE void read_as(Int t, Int count, Int n, Int width, float* out, F f, Convert convert) const {
    for (Int i = 0; i < count; ++i, out += width) {
      const T* from = reinterpret_cast<const T*>(data + (t + i) * stride);
      Int j = 0;
      for (; j + W <= n; j += W) store<W>(out + j, f(convert(from + j)));
      for (; j < width; j += W) {
        T rest[W]{};
        for (Int m = 0; j + m < n; ++m) rest[m] = from[j + m];
        store<W>(out + j, f(convert(rest)));
      }
    }
  }
};

// One head's tokens of a contiguous result.
struct Result {
  char* data;
  Type type;
  Int stride;  // bytes

  MEGAFORGE_INLINE Result(void* data, Type type, Int rows, Int row, Int n)
      : data(data == nullptr ? nullptr : static_cast<char*>(data) + row * n * static_cast<Int>(size_of(type))),
        type(type),
        stride(rows * n * static_cast<Int>(size_of(type))) {}

  // Asks for the line of memory that channel j of token t will be written to.
  MEGAFORGE_INLINE void prefetch(Int t, Int j) const {
    const auto place = reinterpret_cast<std::uintptr_t>(data) + t * stride + j * size_of(type);
    __builtin_prefetch(reinterpret_cast<const void*>(place), 1);
  }

  // Where tokens from t on are written: their own place if that takes whole vectors of floats.
  MEGAFORGE_INLINE Floats floats(Int t, Int n, Int width, float* room) const {
    if (type == Type::f32 && n == width && data != nullptr) return {reinterpret_cast<float*>(data + t * stride), stride / 4};
    return {room, width};
  }

  template <int W>
  MEGAFORGE_INLINE void write(Int t, Int n, const float* from) const {
    const Int whole = n - n % W;
    if (type == Type::bf16) {
      auto* to = reinterpret_cast<std::uint16_t*>(data + t * stride);
      using Bits = typename Lanes<W>::Bits;
      for (Int j = 0; j < whole; j += W) {
        const Vec<W> x = load<W>(from + j);
        const Bits bits = (Bits)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const Bits chosen = x == x ? rounded : (bits >> 16) | 0x40u;
        *reinterpret_cast<typename Lanes<W>::UnalignedHalf*>(to + j) =
            __builtin_convertvector(chosen, typename Lanes<W>::Half);
      }
      for (Int j = whole; j < n; ++j) to[j] = to_bf16(from[j]);
    } else {
      auto* to = reinterpret_cast<float*>(data + t * stride);
      for (Int j = 0; j < whole; j += W) store<W>(to + j, load<W>(from + j));
      for (Int j = whole; j < n; ++j) to[j] = from[j];
    }
  }
};

// to[j][i] = from[i][j] for a W x W block: log2 W rounds of exchanges between rows `Half` apart.
template <int W, int Half, int... I>
MEGAFORGE_INLINE void exchange(Vec<W>* x, std::integer_sequence<int, I...>) {
  for (int i = 0; i < W; ++i) {
    if (i & Half) continue;
    const Vec<W> low = x[i], high = x[i + Half];
    x[i] = __builtin_shufflevector(low, high, (I & Half ? I - Half + W : I)...);
    x[i + Half] = __builtin_shufflevector(low, high, (I & Half ? I + W : I + Half)...);
  }
}

template <int W>
MEGAFORGE_INLINE void transpose_block(const float* from, Int from_stride, float* to, Int to_stride) {
  Vec<W> x[W];
  const auto lanes = std::make_integer_sequence<int, W>();
  for (int i = 0; i < W; ++i) x[i] = load<W>(from + i * from_stride);
  if constexpr (W >= 16) exchange<W, 8>(x, lanes);
  exchange<W, 4>(x, lanes);
  exchange<W, 2>(x, lanes);
  exchange<W, 1>(x, lanes);
  for (int i = 0; i < W; ++i) store<W>(to + i * to_stride, x[i]);
}

template <int W>
void transpose(const float* from, Int from_stride, float* to, Int to_stride, Int rows, Int columns) {
  if (rows % W == 0 && columns % W == 0) {
    for (Int i = 0; i < rows; i += W) {
      for (Int j = 0; j < columns; j += W) {
        transpose_block<W>(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
      }
    }
    return;
  }
  for (Int i = 0; i < rows; ++i) {
    for (Int j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

// ---- forward ----

struct ForwardScratch {
  Int width;                            // n rounded up to whole vectors
  float *r, *w, *k, *v, *a, *b;         // [kTile, width]
  float *y, *removed;                   // [kTile, width]
  float* last_a;                        // [width]: a after the last token
  float* carry;                         // [kHeads, width]: S a of the next token
  float* state;                         // [kHeads, width / group, n, group]: groups of value channels
  Int floats;

  template <int W>
  static MEGAFORGE_INLINE ForwardScratch lay_out(Int n, float* base) {
    ForwardScratch out{};
    const Int width = out.width = round_up(n, W);
    float* place = base;
    for (float** x : {&out.r, &out.w, &out.k, &out.v, &out.a, &out.b, &out.y, &out.removed}) {
      *x = place, place += kTile * width;
    }
    out.last_a = place, place += width;
    out.carry = place, place += kHeads * width;
    out.state = place, place += kHeads * n * width;
    out.floats = place - base;
    return out;
  }
};

template <int G>
struct Group {
  static constexpr int size = G;
};

// Calls f(first value channel, Group) for groups of G vectors, then of one.
template <int W, int G, typename F>
MEGAFORGE_INLINE void for_groups(Int width, F f) {
  Int column = 0;
  for (; column + G * W <= width; column += G * W) f(column, Group<G>());
  for (; column < width; column += W) f(column, Group<1>());
}

// Tokens of one head, and what is made of them.
struct Tile {
  Int first, count;
  const bool* starts;  // or null
  Int starts_stride;
  Floats r, w, k, v, a, b, y, removed;  // a from the second token on
};

// One head's forward pass. N is the head's channels where they are known beforehand, or 0.
template <int W, int G, int N>
struct ForwardHead {
  const Forward& args;
  ForwardScratch scratch;
  Int row, batch, n;
  Tokens r, w, k, v, a, b;
  Result y, removed;

  // `place` among the heads that share `memory`.
  MEGAFORGE_INLINE ForwardHead(const Forward& args, Int row, Int batch, Int head, Int place, const ForwardScratch& shared)
      : args(args),
        scratch(shared),
        row(row),
        batch(batch),
        n(N > 0 ? N : args.in.shape.n),
        r(args.in.r, batch, head),
        w(args.in.log_w, batch, head),
        k(args.in.k, batch, head),
        v(args.in.v, batch, head),
        a(args.in.a, batch, head),
        b(args.in.b, batch, head),
        y(args.y, args.y_type, rows(), row, n),
        removed(args.removed, Type::f32, rows(), row, n) {
    scratch.carry += place * width();
    scratch.state += place * n * width();
  }

  MEGAFORGE_INLINE Int rows() const { return args.in.shape.b * args.in.shape.h; }
  MEGAFORGE_INLINE Int width() const { return N > 0 ? round_up(N, W) : scratch.width; }

  // The state before the first token, and what that will read from it.
  MEGAFORGE_INLINE void begin() const {
    clear(scratch.state, n * width());
    clear(scratch.carry, width());
    clear(scratch.last_a, width());
    if (args.initial_state == nullptr) return;
    const float* from = static_cast<const float*>(args.initial_state) + row * n * n;
    a.read<W>(0, 1, n, width(), scratch.a);
    for_groups<W, G>(width(), [&](Int column, auto g) {
      constexpr int size = decltype(g)::size;
      float* state = scratch.state + column * n;
      transpose<W>(from + column * n, n, state, size * W, least(n - column, size * W), n);
      for (int i = 0; i < size; ++i) {
        Vec<W> sum{};
        for (Int j = 0; j < n; ++j) sum += load<W>(state + (j * size + i) * W) * scratch.a[j];
        store<W>(scratch.carry + column + i * W, sum);
      }
    });
  }

  // Writes the state as [value, key].
  MEGAFORGE_INLINE void save(void* states, Int number) const {
    float* to = static_cast<float*>(states) + (number * rows() + row) * n * n;
    for_groups<W, G>(width(), [&](Int column, auto g) {
      constexpr int lanes = decltype(g)::size * W;
      transpose<W>(scratch.state + column * n, lanes, to + column * n, n, n, least(n - column, lanes));
    });
  }

  MEGAFORGE_INLINE Tile prepare(Int t, Int count) const {
    const Int batches = args.in.shape.b, size = width();
    w.template read<W>(t, count, n, size, scratch.w, Exponential<W>());
    return {t,
            count,
            args.in.document_start == nullptr ? nullptr : args.in.document_start + t * batches + batch,
            batches,
            r.floats<W>(t, count, n, size, scratch.r),
            {scratch.w, size},
            k.floats<W>(t, count, n, size, scratch.k),
            v.floats<W>(t, count, n, size, scratch.v),
            a.floats<W>(t + 1, least(count, args.in.shape.s - t - 1), n, size, scratch.a),
            b.floats<W>(t, count, n, size, scratch.b),
            y.floats(t, n, size, scratch.y),
            removed.floats(t, n, size, scratch.removed)};
  }

  // Asks for a line of each input. Memory takes about as long to deliver what the next turn reads as the arithmetic of
  // this turn takes.
  MEGAFORGE_INLINE void prefetch(Int t, Int j) const {
    r.prefetch(t, j), w.prefetch(t, j), k.prefetch(t, j), v.prefetch(t, j), a.prefetch(t + 1, j), b.prefetch(t, j);
  }

  // A tile for Size vectors of value channels from `column` on.
  template <int Size>
  MEGAFORGE_INLINE void advance(const Tile& tile, Int column, const ForwardHead& next_head, Int next_first) const {
    constexpr Int kAtOnce = 16;  // rows between requests for memory
    float* const state = scratch.state + column * n;
    Vec<W> removed[Size];
    for (int g = 0; g < Size; ++g) removed[g] = load<W>(scratch.carry + column + g * W);
    for (Int t = 0; t < tile.count; ++t) {
      const float *r = tile.r.token(t), *w = tile.w.token(t), *k = tile.k.token(t), *b = tile.b.token(t);
      const float* next_a = tile.first + t + 1 < args.in.shape.s ? tile.a.token(t) : scratch.last_a;
      if (tile.starts != nullptr && tile.starts[t * tile.starts_stride]) {
        clear(state, n * Size * W);
        for (int g = 0; g < Size; ++g) removed[g] = Vec<W>{};
      }
      Vec<W> v[Size], y[Size], next[Size];
      for (int g = 0; g < Size; ++g) {
        v[g] = load<W>(tile.v.token(t) + column + g * W);
        y[g] = next[g] = Vec<W>{};
        store<W>(tile.removed.token(t) + column + g * W, removed[g]);
      }
      for (Int from = 0; from < n; from += kAtOnce) {
        if (column == 0) next_head.prefetch(next_first + t, from);
        float* x = state + from * Size * W;
        const Int to = least(n, from + kAtOnce);
#pragma GCC unroll 2
        for (Int j = from; j < to; ++j, x += Size * W) {
          const float r_j = r[j], w_j = w[j], k_j = k[j], b_j = b[j], a_j = next_a[j];
#pragma GCC unroll 4
          for (int g = 0; g < Size; ++g) {
            const Vec<W> s = load<W>(x + g * W) * w_j + removed[g] * b_j + v[g] * k_j;
            store<W>(x + g * W, s);
            y[g] += s * r_j;
            next[g] += s * a_j;
          }
        }
      }
      for (int g = 0; g < Size; ++g) {
        store<W>(tile.y.token(t) + column + g * W, y[g]);
        removed[g] = next[g];
      }
    }
    for (int g = 0; g < Size; ++g) store<W>(scratch.carry + column + g * W, removed[g]);
  }

  MEGAFORGE_INLINE void finish(const Tile& tile) const {
    for (Int t = 0; t < tile.count; ++t) {
      if (tile.y.data == scratch.y) y.template write<W>(tile.first + t, n, tile.y.token(t));
      if (tile.removed.data == scratch.removed && args.removed != nullptr) {
        removed.template write<W>(tile.first + t, n, tile.removed.token(t));
      }
    }
  }

  // One turn; the next one is that of `next_head` from token `next_first` on.
  MEGAFORGE_INLINE void turn(Int t, Int count, const ForwardHead& next_head, Int next_first) const {
    if (args.states != nullptr && t % args.in.interval == 0) save(args.states, t / args.in.interval);
    const Tile tile = prepare(t, count);
    for_groups<W, G>(width(), [&](Int column, auto g) {
      advance<decltype(g)::size>(tile, column, next_head, next_first);
    });
    finish(tile);
  }
};

// Heads next to each other take turns: what lies together in memory is read and written together.
template <int W, int G, int N>
void forward_heads(const Forward& args, Int first, Int count, const ForwardScratch& scratch) {
  const Int s = args.in.shape.s, heads = args.in.shape.h, interval = args.in.interval;
  const auto head = [&](Int place) {
    const Int row = first + place;
    return ForwardHead<W, G, N>(args, row, row / heads, row % heads, place, scratch);
  };
  for (Int m = 0; m < count; ++m) head(m).begin();
  for (Int t = 0, tokens = 0; t < s; t += tokens) {
    tokens = least(kTile, least(s, (t / interval + 1) * interval) - t);
    for (Int m = 0; m < count; ++m) {
      const bool last = m + 1 == count;
      head(m).turn(t, tokens, head(last ? 0 : m + 1), last ? t + tokens : t);
    }
  }
  for (Int m = 0; m < count; ++m) head(m).save(args.final_state, 0);
}

template <int W, int G>
void forward_rows(const Forward& args, Int first, Int last, void* memory) {
  const ForwardScratch scratch = ForwardScratch::lay_out<W>(args.in.shape.n, static_cast<float*>(memory));
  for (Int row = first; row < last; row += kHeads) {
    const Int count = least(kHeads, last - row);
    if (args.in.shape.n == 64) {
      forward_heads<W, G, 64>(args, row, count, scratch);
    } else {
      forward_heads<W, G, 0>(args, row, count, scratch);
    }
  }
}

template <int W>
Int forward_scratch(const Forward& args) {
  return ForwardScratch::lay_out<W>(args.in.shape.n, nullptr).floats * static_cast<Int>(sizeof(float));
}

// ---- backward ----

// Sums over the lanes of four vectors, as lanes 0 to 3 of each quarter (of W / 4) of the result.
template <int W, int... I>
MEGAFORGE_INLINE Vec<W> sums(const Vec<W>* x, std::integer_sequence<int, I...>) {
  constexpr auto lane = [](int i) { return i & 3; };
  constexpr auto quarter = [](int i) { return i & ~3; };
  // Lane pairs of x0 and x1, and of x2 and x3, side by side: then each quarter is added up.
  const Vec<W> a = __builtin_shufflevector(x[0], x[1], (quarter(I) + (lane(I) >> 1) + (I & 1 ? W : 0))...) +
                   __builtin_shufflevector(x[0], x[1], (quarter(I) + 2 + (lane(I) >> 1) + (I & 1 ? W : 0))...);
  const Vec<W> b = __builtin_shufflevector(x[2], x[3], (quarter(I) + (lane(I) >> 1) + (I & 1 ? W : 0))...) +
                   __builtin_shufflevector(x[2], x[3], (quarter(I) + 2 + (lane(I) >> 1) + (I & 1 ? W : 0))...);
  Vec<W> c = __builtin_shufflevector(a, b, (quarter(I) + (lane(I) & 1) + (lane(I) & 2 ? W : 0))...) +
             __builtin_shufflevector(a, b, (quarter(I) + 2 + (lane(I) & 1) + (lane(I) & 2 ? W : 0))...);
  if constexpr (W >= 16) c += __builtin_shufflevector(c, c, (I ^ 8)...);
  return c + __builtin_shufflevector(c, c, (I ^ 4)...);
}

// Lane `Lane` of each quarter, in all lanes of that quarter.
template <int W, int Lane, int... I>
MEGAFORGE_INLINE Vec<W> spread(Vec<W> x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, ((I & ~3) + Lane)...);
}

struct BackwardScratch {
  Int width, height;                       // n rounded up to whole vectors; to whole groups of kRows
  float *r, *w, *k, *v, *a, *b;            // [kRun, width]
  float *dy, *removed;                     // [kRun, width]
  float *dr, *dw, *dk, *dv, *da, *db;      // [kRun, width]
  float* history;                          // [kRun, kRows, width]: states after the tokens of a run
  float* zero;                             // [kRows, width]
  float* gradient;                         // [kHeads, height, width]: of the states
  float* states;                           // [runs, height, width]: before each run of an interval
  Int floats;

  template <int W>
  static MEGAFORGE_INLINE BackwardScratch lay_out(Int n, Int interval, Int width, float* base) {
    BackwardScratch out{};
    out.width = width;
    out.height = round_up(n, kRows);
    float* place = base;
    for (float** x : {&out.r, &out.w, &out.k, &out.v, &out.a, &out.b, &out.dy, &out.removed, &out.dr, &out.dw, &out.dk,
                      &out.dv, &out.da, &out.db}) {
      *x = place, place += kRun * width;
    }
    out.history = place, place += kRun * kRows * width;
    out.zero = place, place += kRows * width;
    out.gradient = place, place += kHeads * out.height * width;
    out.states = place, place += (interval + kRun - 1) / kRun * out.height * width;
    out.floats = place - base;
    return out;
  }
};

// The state's update with one token, for kRows rows in registers.
template <int W, int J>
struct Rows {
  Vec<W> x[kRows][J];

  MEGAFORGE_INLINE void read(const float* from) {
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < J; ++j) x[i][j] = load<W>(from + (i * J + j) * W);
  }
  MEGAFORGE_INLINE void write(float* to) const {
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < J; ++j) store<W>(to + (i * J + j) * W, x[i][j]);
  }
};

// Memory that will soon be read, by the next turn, and written, by the present run. Every step asks for a few lines of
// it, because memory takes about as long to deliver them as the arithmetic takes.
struct Traffic {
  const Tokens* inputs[8];
  const Result* results[6];
  Int next_first, first;  // tokens

  // Rows i on, token t of the run.
  MEGAFORGE_INLINE void ask(Int i, Int t) const {
    const Int step = i / kRows;
    const Tokens& input = *inputs[step % 8];
    const Result& result = *results[step % 6];
    input.prefetch(next_first + t, step / 8 * 32), input.prefetch(next_first + t, step / 8 * 32 + 16);
    result.prefetch(first + t, step / 6 * 32), result.prefetch(first + t, step / 6 * 32 + 16);
  }
};

// From the state before a run of `count` tokens to that after it, rows i to i + kRows.
template <int W, int J>
void pass_run(const BackwardScratch& run, Int i, Int count, const bool* starts, Int starts_stride, const float* before,
              float* after) {
  constexpr Int width = J * W;
  Rows<W, J> state;
  state.read(before);
  for (Int t = 0; t < count; ++t) {
    if (starts != nullptr && starts[t * starts_stride]) state.read(run.zero);
    const float *removed = run.removed + t * width + i, *v = run.v + t * width + i;
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Int at = t * width + j * W;
      const Vec<W> w = load<W>(run.w + at), b = load<W>(run.b + at), k = load<W>(run.k + at);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) state.x[m][j] = state.x[m][j] * w + b * removed[m] + k * v[m];
    }
  }
  state.write(after);
}

// Gradients of a run of `count` tokens that go through rows i to i + kRows of the state, which is `before` the run and
// whose gradient is `gradient`, after the run and then before it. Adds to dr, dw, dk, da, db; sets dv.
template <int W, int J>
void differentiate_run(const BackwardScratch& run, Int i, Int count, const bool* starts, Int starts_stride,
                       const float* before, float* gradient, const Traffic& traffic) {
  constexpr Int width = J * W, block = kRows * width;
  const auto lanes = std::make_integer_sequence<int, W>();
  {
    Rows<W, J> state;
    state.read(before);
    for (Int t = 0; t < count; ++t) {
      if (starts != nullptr && starts[t * starts_stride]) state.read(run.zero);
      const float *removed = run.removed + t * width + i, *v = run.v + t * width + i, *dy = run.dy + t * width + i;
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        const Int at = t * width + j * W;
        const Vec<W> w = load<W>(run.w + at), b = load<W>(run.b + at), k = load<W>(run.k + at);
        Vec<W> dr = load<W>(run.dr + at);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          const Vec<W> x = state.x[m][j] * w + b * removed[m] + k * v[m];
          state.x[m][j] = x;
          store<W>(run.history + t * block + (m * J + j) * W, x);
          dr += x * dy[m];
        }
        store<W>(run.dr + at, dr);
      }
    }
  }
  Rows<W, J> grad;
  grad.read(gradient);
  for (Int t = count - 1; t >= 0; --t) {
    traffic.ask(i, t);
    const bool start = starts != nullptr && starts[t * starts_stride];
    const float* previous = start ? run.zero : t > 0 ? run.history + (t - 1) * block : before;
    const float *removed = run.removed + t * width + i, *v = run.v + t * width + i, *dy = run.dy + t * width + i;
    Vec<W> by_b[kRows]{}, by_k[kRows]{};
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Int at = t * width + j * W;
      const Vec<W> r = load<W>(run.r + at), b = load<W>(run.b + at), k = load<W>(run.k + at);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        grad.x[m][j] += r * dy[m];
        by_b[m] += grad.x[m][j] * b;
        by_k[m] += grad.x[m][j] * k;
      }
    }
    const Vec<W> dremoved = sums<W>(by_b, lanes), dv = sums<W>(by_k, lanes);
    for (int m = 0; m < kRows; ++m) run.dv[t * width + i + m] = dv[m];
    const Vec<W> d[kRows] = {spread<W, 0>(dremoved, lanes), spread<W, 1>(dremoved, lanes),
                             spread<W, 2>(dremoved, lanes), spread<W, 3>(dremoved, lanes)};
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Int at = t * width + j * W;
      const Vec<W> w = load<W>(run.w + at), a = load<W>(run.a + at);
      Vec<W> dk = load<W>(run.dk + at), db = load<W>(run.db + at), dw = load<W>(run.dw + at), da = load<W>(run.da + at);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const Vec<W> g = grad.x[m][j], p = load<W>(previous + (m * J + j) * W);
        dk += g * v[m];
        db += g * removed[m];
        dw += g * p;
        da += p * d[m];
        grad.x[m][j] = g * w + d[m] * a;
      }
      store<W>(run.dk + at, dk), store<W>(run.db + at, db), store<W>(run.dw + at, dw), store<W>(run.da + at, da);
    }
    if (start) grad.read(run.zero);
  }
  grad.write(gradient);
}

// The tokens of one head that the backward pass reads.
struct BackwardTokens {
  Tokens r, w, k, v, a, b, dy, removed;

  MEGAFORGE_INLINE BackwardTokens(const Backward& args, Int row) : BackwardTokens(args, row / args.in.shape.h, row % args.in.shape.h) {}
  MEGAFORGE_INLINE BackwardTokens(const Backward& args, Int batch, Int head)
      : r(args.in.r, batch, head),
        w(args.in.log_w, batch, head),
        k(args.in.k, batch, head),
        v(args.in.v, batch, head),
        a(args.in.a, batch, head),
        b(args.in.b, batch, head),
        dy(args.dy, batch, head),
        removed(removed_of(args), batch, head) {}

  static MEGAFORGE_INLINE View removed_of(const Backward& args) {
    const Int n = args.in.shape.n, h = args.in.shape.h;
    return {args.removed, Type::f32, args.in.shape.b * h * n, h * n, n};
  }
};

// [n, n] into [height, width], zeros around it; of a null pointer zeros only.
MEGAFORGE_INLINE void pad(const void* from, Int row, Int n, Int height, Int width, float* to) {
  clear(to, height * width);
  if (from == nullptr) return;
  for (Int i = 0; i < n; ++i) copy(to + i * width, static_cast<const float*>(from) + (row * n + i) * n, n);
}

// The tokens of one head between two saved states; its channels fill at most J vectors. The gradient of the state after
// them becomes that of the state before them. The next turn is that of `next_row` from token `next_first` on.
template <int W, int J>
void backward_turn(const Backward& args, const BackwardScratch& run, Int row, Int first, float* gradient, Int next_row,
                   Int next_first) {
  const Inputs& in = args.in;
  const Int s = in.shape.s, batches = in.shape.b, heads = in.shape.h, n = in.shape.n, rows = batches * heads;
  constexpr Int width = J * W;
  const Int square = run.height * width, last = least(s, first + in.interval), runs = (last - first + kRun - 1) / kRun;
  const BackwardTokens now(args, row), next(args, next_row);
  const auto result = [&](const Gradient& x) { return Result(x.data, x.type, rows, row, n); };
  const Result dr = result(args.dr), dw = result(args.dlog_w), dk = result(args.dk), dv = result(args.dv),
               da = result(args.da), db = result(args.db);
  const auto starts = [&](Int t) {
    return in.document_start == nullptr ? nullptr : in.document_start + t * batches + row / heads;
  };
  const auto read_state_inputs = [&](Int t, Int count) {
    now.w.read<W>(t, count, n, width, run.w, Exponential<W>()), now.k.read<W>(t, count, n, width, run.k);
    now.v.read<W>(t, count, n, width, run.v), now.b.read<W>(t, count, n, width, run.b);
    now.removed.read<W>(t, count, n, width, run.removed);
  };
  pad(args.states, first / in.interval * rows + row, n, run.height, width, run.states);
  for (Int m = 0; m + 1 < runs; ++m) {
    read_state_inputs(first + m * kRun, kRun);
    for (Int i = 0; i < run.height; i += kRows) {
      float* from = run.states + m * square + i * width;
      pass_run<W, J>(run, i, kRun, starts(first + m * kRun), batches, from, from + square);
    }
  }
  for (Int m = runs - 1; m >= 0; --m) {
    const Int t = first + m * kRun, count = least(kRun, last - t);
    const Traffic traffic = {{&next.r, &next.w, &next.k, &next.v, &next.a, &next.b, &next.dy, &next.removed},
                             {&dr, &dw, &dk, &dv, &da, &db},
                             next_first + m * kRun,
                             t};
    read_state_inputs(t, count);
    now.r.read<W>(t, count, n, width, run.r), now.a.read<W>(t, count, n, width, run.a);
    now.dy.read<W>(t, count, n, width, run.dy);
    for (float* x : {run.dr, run.dw, run.dk, run.da, run.db}) clear(x, count * width);
    for (Int i = 0; i < run.height; i += kRows) {
      differentiate_run<W, J>(run, i, count, starts(t), batches, run.states + m * square + i * width,
                              gradient + i * width, traffic);
    }
    for (Int j = 0; j < count * width; j += W) store<W>(run.dw + j, load<W>(run.dw + j) * load<W>(run.w + j));
    for (Int i = 0; i < count; ++i) {
      dr.write<W>(t + i, n, run.dr + i * width), dw.write<W>(t + i, n, run.dw + i * width);
      dk.write<W>(t + i, n, run.dk + i * width), dv.write<W>(t + i, n, run.dv + i * width);
      da.write<W>(t + i, n, run.da + i * width), db.write<W>(t + i, n, run.db + i * width);
    }
  }
}

// Heads next to each other take turns, as in the forward pass.
template <int W, int J>
void backward_heads(const Backward& args, Int first_row, Int count, void* memory) {
  const Int s = args.in.shape.s, n = args.in.shape.n, interval = args.in.interval;
  constexpr Int width = J * W;
  const BackwardScratch run = BackwardScratch::lay_out<W>(n, least(interval, s), width, static_cast<float*>(memory));
  const Int square = run.height * width;
  clear(run.zero, kRows * width);
  for (Int m = 0; m < count; ++m) pad(args.dfinal_state, first_row + m, n, run.height, width, run.gradient + m * square);
  for (Int first = (s - 1) / interval * interval; first >= 0; first -= interval) {
    for (Int m = 0; m < count; ++m) {
      const bool last = m + 1 == count;
      backward_turn<W, J>(args, run, first_row + m, first, run.gradient + m * square,
                          last ? first_row : first_row + m + 1, last ? first - interval : first);
    }
  }
  float* dinitial = static_cast<float*>(args.dinitial_state) + first_row * n * n;
  for (Int m = 0; m < count; ++m) {
    for (Int i = 0; i < n; ++i) copy(dinitial + (m * n + i) * n, run.gradient + m * square + i * width, n);
  }
}

// Vectors of channels that the backward pass is compiled for: the least power of two that holds them.
template <int W>
MEGAFORGE_INLINE Int vectors(Int n) {
  Int count = 1;
  while (count * W < n) count *= 2;
  return count;
}

template <int W>
void backward_rows(const Backward& args, Int first, Int last, void* memory) {
  const Int size = vectors<W>(args.in.shape.n);
  for (Int row = first; row < last; row += kHeads) {
    const Int count = least(kHeads, last - row);
    if (size == 1) backward_heads<W, 1>(args, row, count, memory);
    if (size == 2) backward_heads<W, 2>(args, row, count, memory);
    if (size == 4) backward_heads<W, 4>(args, row, count, memory);
    if (size == 8) backward_heads<W, 8>(args, row, count, memory);
  }
}

template <int W>
Int backward_scratch(const Backward& args) {
  const Int n = args.in.shape.n, interval = least(args.in.interval, args.in.shape.s);
  return BackwardScratch::lay_out<W>(n, interval, vectors<W>(n) * W, nullptr).floats * static_cast<Int>(sizeof(float));
}
