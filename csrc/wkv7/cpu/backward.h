// The backward pass of WKV-7 on vectors of W floats; see lanes.h.
//
// The lanes are key channels, and kRows value channels at a time have their rows of the state, later of its
// gradient, in registers over a run of kRun tokens. Value channels do not see each other, except in the gradients
// of r, w, k, a and b, which are sums over them and are added up in memory.

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
