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

constexpr int kTile = 8;   // tokens converted at a time in the forward pass
constexpr int kRun = 16;   // tokens whose states the backward pass holds at once
constexpr int kRows = 4;   // rows of the state that the backward pass works on at once

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

  // Channels of `count` tokens from t on as floats, `width` apart; those from n to width are zero.
  template <int W>
  MEGAFORGE_INLINE void read(Int t, Int count, Int n, Int width, float* out) const {
    for (Int i = 0; i < count; ++i, out += width) {
      const char* token = data + (t + i) * stride;
      Int j = 0;
      if (data == nullptr) {
        n = 0;
      } else if (type == Type::bf16) {
        const auto* from = reinterpret_cast<const std::uint16_t*>(token);
        for (; j + W <= n; j += W) {
          const typename Lanes<W>::Half half = *reinterpret_cast<const typename Lanes<W>::UnalignedHalf*>(from + j);
          store<W>(out + j, (Vec<W>)(__builtin_convertvector(half, typename Lanes<W>::Bits) << 16));
        }
        for (; j < n; ++j) out[j] = from_bf16(from[j]);
      } else {
        const auto* from = reinterpret_cast<const float*>(token);
        for (; j + W <= n; j += W) store<W>(out + j, load<W>(from + j));
        for (; j < n; ++j) out[j] = from[j];
      }
      for (; j < width; ++j) out[j] = 0;
    }
  }
};

template <int W>
MEGAFORGE_INLINE void write(void* data, Type type, Int offset, Int n, const float* from) {
  Int j = 0;
  if (type == Type::bf16) {
    auto* to = static_cast<std::uint16_t*>(data) + offset;
    using Bits = typename Lanes<W>::Bits;
    for (; j + W <= n; j += W) {
      const Vec<W> x = load<W>(from + j);
      const Bits bits = (Bits)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      const Bits chosen = x == x ? rounded : (bits >> 16) | 0x40u;
      *reinterpret_cast<typename Lanes<W>::UnalignedHalf*>(to + j) =
          __builtin_convertvector(chosen, typename Lanes<W>::Half);
    }
    for (; j < n; ++j) to[j] = to_bf16(from[j]);
  } else {
    auto* to = static_cast<float*>(data) + offset;
    for (; j + W <= n; j += W) store<W>(to + j, load<W>(from + j));
    for (; j < n; ++j) to[j] = from[j];
  }
}

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
  Int width;                         // n rounded up to whole vectors
  float *r, *w, *k, *v, *a, *b, *y;  // [kTile (a: + 1), width]
  float* removed;                    // [kTile + 1, width]: S a; its last row is the next tile's first
  float* state;                      // for each group of value channels [n, group]
  Int floats;

  template <int W>
  static MEGAFORGE_INLINE ForwardScratch lay_out(Int n, float* base) {
    ForwardScratch out{};
    const Int width = out.width = round_up(n, W);
    float* place = base;
    for (float** x : {&out.r, &out.w, &out.k, &out.v, &out.b, &out.y}) *x = place, place += kTile * width;
    out.a = place, place += (kTile + 1) * width;
    out.removed = place, place += (kTile + 1) * width;
    out.state = place, place += n * width;
    out.floats = place - base;
    return out;
  }
};

// `count` tokens for G vectors of value channels from `column` on. `state` [n, G * W] is read and replaced.
template <int W, int G>
void forward_tokens(const ForwardScratch& tile, Int column, Int n, Int count, const bool* starts, Int starts_stride,
                    float* state) {
  const Int width = tile.width;
  Vec<W> removed[G];
  for (int g = 0; g < G; ++g) removed[g] = load<W>(tile.removed + column + g * W);
  for (Int t = 0; t < count; ++t) {
    const float *r = tile.r + t * width, *w = tile.w + t * width, *k = tile.k + t * width, *b = tile.b + t * width,
                *next_a = tile.a + (t + 1) * width;
    if (starts != nullptr && starts[t * starts_stride]) {
      clear(state, n * G * W);
      for (int g = 0; g < G; ++g) removed[g] = Vec<W>{};
    }
    Vec<W> v[G], y[G], next[G];
    for (int g = 0; g < G; ++g) {
      v[g] = load<W>(tile.v + t * width + column + g * W);
      y[g] = next[g] = Vec<W>{};
      store<W>(tile.removed + t * width + column + g * W, removed[g]);
    }
    float* row = state;
#pragma GCC unroll 2
    for (Int j = 0; j < n; ++j, row += G * W) {
      const float r_j = r[j], w_j = w[j], k_j = k[j], b_j = b[j], a_j = next_a[j];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const Vec<W> x = load<W>(row + g * W) * w_j + removed[g] * b_j + v[g] * k_j;
        store<W>(row + g * W, x);
        y[g] += x * r_j;
        next[g] += x * a_j;
      }
    }
    for (int g = 0; g < G; ++g) {
      store<W>(tile.y + t * width + column + g * W, y[g]);
      removed[g] = next[g];
    }
  }
  for (int g = 0; g < G; ++g) store<W>(tile.removed + count * width + column + g * W, removed[g]);
}

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

template <int W, int G>
void forward_row(const Forward& args, Int row, void* memory) {
  const Inputs& in = args.in;
  const Int s = in.shape.s, batches = in.shape.b, heads = in.shape.h, n = in.shape.n;
  const Int rows = batches * heads, batch = row / heads, head = row % heads;
  const ForwardScratch tile = ForwardScratch::lay_out<W>(n, static_cast<float*>(memory));
  const Int width = tile.width;
  const Tokens r(in.r, batch, head), w(in.log_w, batch, head), k(in.k, batch, head), v(in.v, batch, head),
      a(in.a, batch, head), b(in.b, batch, head);
  const auto channels = [&](Int column, Int lanes) { return least(n - column, lanes); };
  clear(tile.state, n * width);
  clear(tile.removed, width);
  if (args.initial_state != nullptr) {
    const float* from = static_cast<const float*>(args.initial_state) + row * n * n;
    for_groups<W, G>(width, [&](Int column, auto g) {
      constexpr int lanes = decltype(g)::size * W;
      transpose<W>(from + column * n, n, tile.state + column * n, lanes, channels(column, lanes), n);
    });
    a.read<W>(0, 1, n, width, tile.a);
    for_groups<W, G>(width, [&](Int column, auto g) {
      constexpr int size = decltype(g)::size;
      const float* state = tile.state + column * n;
      for (int i = 0; i < size; ++i) {
        Vec<W> sum{};
        for (Int j = 0; j < n; ++j) sum += load<W>(state + (j * size + i) * W) * tile.a[j];
        store<W>(tile.removed + column + i * W, sum);
      }
    });
  }
  const auto save = [&](float* to) {
    for_groups<W, G>(width, [&](Int column, auto g) {
      constexpr int lanes = decltype(g)::size * W;
      transpose<W>(tile.state + column * n, lanes, to + column * n, n, n, channels(column, lanes));
    });
  };
  for (Int t = 0, count = 0; t < s; t += count) {
    if (args.states != nullptr && t % in.interval == 0) {
      save(static_cast<float*>(args.states) + (t / in.interval * rows + row) * n * n);
    }
    count = least(kTile, least(s, (t / in.interval + 1) * in.interval) - t);
    r.read<W>(t, count, n, width, tile.r), w.read<W>(t, count, n, width, tile.w), k.read<W>(t, count, n, width, tile.k);
    v.read<W>(t, count, n, width, tile.v), b.read<W>(t, count, n, width, tile.b);
    a.read<W>(t + 1, least(count, s - t - 1), n, width, tile.a + width);
    if (t + count == s) clear(tile.a + count * width, width);
    for (Int j = 0; j < count * width; j += W) store<W>(tile.w + j, exponential<W>(load<W>(tile.w + j)));
    const bool* starts = in.document_start == nullptr ? nullptr : in.document_start + t * batches + batch;
    const Int offset = (t * rows + row) * n;
    for_groups<W, G>(width, [&](Int column, auto g) {
      forward_tokens<W, decltype(g)::size>(tile, column, n, count, starts, batches, tile.state + column * n);
    });
    for (Int i = 0; i < count; ++i) {
      write<W>(args.y, args.y_type, offset + i * rows * n, n, tile.y + i * width);
      if (args.removed != nullptr) write<W>(args.removed, Type::f32, offset + i * rows * n, n, tile.removed + i * width);
    }
    copy(tile.removed, tile.removed + count * width, width);
  }
  save(static_cast<float*>(args.final_state) + row * n * n);
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
  float* gradient;                         // [height, width]: of the state
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
    out.gradient = place, place += out.height * width;
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
                       const float* before, float* gradient) {
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

// One head whose channels fill at most J vectors.
template <int W, int J>
void backward_vectors(const Backward& args, Int row, void* memory) {
  const Inputs& in = args.in;
  const Int s = in.shape.s, batches = in.shape.b, heads = in.shape.h, n = in.shape.n;
  const Int rows = batches * heads, batch = row / heads, head = row % heads;
  constexpr Int width = J * W;
  const Int interval = least(in.interval, s);
  const BackwardScratch run = BackwardScratch::lay_out<W>(n, interval, width, static_cast<float*>(memory));
  const Int square = run.height * width;
  const Tokens r(in.r, batch, head), w(in.log_w, batch, head), k(in.k, batch, head), v(in.v, batch, head),
      a(in.a, batch, head), b(in.b, batch, head), dy(args.dy, batch, head),
      removed(View{args.removed, Type::f32, rows * n, heads * n, n}, batch, head);
  const auto pad = [&](const float* from, float* to) {
    clear(to, square);
    for (Int i = 0; i < n; ++i) copy(to + i * width, from + i * n, n);
  };
  const auto read_state_inputs = [&](Int t, Int count) {
    w.read<W>(t, count, n, width, run.w), k.read<W>(t, count, n, width, run.k), v.read<W>(t, count, n, width, run.v);
    b.read<W>(t, count, n, width, run.b), removed.read<W>(t, count, n, width, run.removed);
    for (Int j = 0; j < count * width; j += W) store<W>(run.w + j, exponential<W>(load<W>(run.w + j)));
  };
  const auto starts = [&](Int t) { return in.document_start == nullptr ? nullptr : in.document_start + t * batches + batch; };
  clear(run.zero, kRows * width);
  if (args.dfinal_state != nullptr) {
    pad(static_cast<const float*>(args.dfinal_state) + row * n * n, run.gradient);
  } else {
    clear(run.gradient, square);
  }
  for (Int first = (s - 1) / in.interval * in.interval; first >= 0; first -= in.interval) {
    const Int last = least(s, first + in.interval), runs = (last - first + kRun - 1) / kRun;
    pad(static_cast<const float*>(args.states) + (first / in.interval * rows + row) * n * n, run.states);
    for (Int m = 0; m + 1 < runs; ++m) {
      read_state_inputs(first + m * kRun, kRun);
      for (Int i = 0; i < run.height; i += kRows) {
        float* from = run.states + m * square + i * width;
        pass_run<W, J>(run, i, kRun, starts(first + m * kRun), batches, from, from + square);
      }
    }
    for (Int m = runs - 1; m >= 0; --m) {
      const Int t = first + m * kRun, count = least(kRun, last - t);
      read_state_inputs(t, count);
      r.read<W>(t, count, n, width, run.r), a.read<W>(t, count, n, width, run.a), dy.read<W>(t, count, n, width, run.dy);
      for (float* x : {run.dr, run.dw, run.dk, run.da, run.db}) clear(x, count * width);
      for (Int i = 0; i < run.height; i += kRows) {
        differentiate_run<W, J>(run, i, count, starts(t), batches, run.states + m * square + i * width,
                                run.gradient + i * width);
      }
      for (Int j = 0; j < count * width; j += W) store<W>(run.dw + j, load<W>(run.dw + j) * load<W>(run.w + j));
      for (Int i = 0; i < count; ++i) {
        const Int offset = ((t + i) * rows + row) * n;
        write<W>(args.dr.data, args.dr.type, offset, n, run.dr + i * width);
        write<W>(args.dlog_w.data, args.dlog_w.type, offset, n, run.dw + i * width);
        write<W>(args.dk.data, args.dk.type, offset, n, run.dk + i * width);
        write<W>(args.dv.data, args.dv.type, offset, n, run.dv + i * width);
        write<W>(args.da.data, args.da.type, offset, n, run.da + i * width);
        write<W>(args.db.data, args.db.type, offset, n, run.db + i * width);
      }
    }
  }
  float* dinitial = static_cast<float*>(args.dinitial_state) + row * n * n;
  for (Int i = 0; i < n; ++i) copy(dinitial + i * n, run.gradient + i * width, n);
}

// Vectors of channels that the backward pass is compiled for: the least power of two that holds them.
template <int W>
MEGAFORGE_INLINE Int vectors(Int n) {
  Int count = 1;
  while (count * W < n) count *= 2;
  return count;
}

template <int W>
void backward_row(const Backward& args, Int row, void* memory) {
  const Int count = vectors<W>(args.in.shape.n);
  if (count == 1) return backward_vectors<W, 1>(args, row, memory);
  if (count == 2) return backward_vectors<W, 2>(args, row, memory);
  if (count == 4) return backward_vectors<W, 4>(args, row, memory);
  return backward_vectors<W, 8>(args, row, memory);
}

template <int W>
Int backward_scratch(const Backward& args) {
  const Int n = args.in.shape.n, interval = least(args.in.interval, args.in.shape.s);
  return BackwardScratch::lay_out<W>(n, interval, vectors<W>(n) * W, nullptr).floats * static_cast<Int>(sizeof(float));
}
