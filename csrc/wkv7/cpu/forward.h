// The forward pass of WKV-7 on vectors of W floats; see lanes.h.
//
// The lanes are value channels, the rows of the state are key channels. Updating the state with one token,
// reading it with r and reading it with the next token's a is one pass over it: five multiply-adds an element, one load,
// one store, no sums across lanes.

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
