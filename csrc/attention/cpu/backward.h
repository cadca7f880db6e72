// The backward pass of one unit: scores and their gradients with keys as rows, so that they are left factors of dV and dK
// as they come; queries are columns. The gradient of the queries is summed with channels as rows and turned at the end.

namespace megaforge::attention::MF_ISA {

constexpr Int kKeyRows = 48;  // keys of a block

template <class T>
struct BackwardRoom {
  static constexpr Int kKeyWords = (kKeyRows / T::kPer + 15) / 16 * 16;  // of a row of turned keys
  static constexpr Int kDeep = kPanel / T::kPer;                         // words along a panel of queries
  Word *keys, *values, *turned, *queries, *query_pairs, *grads, *grad_pairs, *rows, *weights, *scores, *score_pairs;
  float *dkeys, *dvalues, *dqueries, *lse, *along, *raw, *raw_grad;
  std::uint64_t* seeds;  // of a head's queries
  std::int16_t* bits;    // of the probabilities of a block of keys and a panel of queries
  Int key_blocks, query_panels;
  Bytes bytes;

  BackwardRoom(const Problem& in, const Segment& segment, void* shared, void* own) {
    static_assert(kPanel == kQueryPanel);
    const Widths<T> width(in.d);
    const Int stride = width.panels * kPanel;
    Shares shares(shared), mine(own);
    key_blocks = (segment.keys + kKeyRows - 1) / kKeyRows;
    query_panels = attention::query_panels(segment);
    keys = shares.take<Word>(key_blocks * kKeyRows * width.row);
    values = shares.take<Word>(key_blocks * kKeyRows * width.row);
    turned = shares.take<Word>(key_blocks * width.channels * kKeyWords);
    dkeys = shares.take<float>(key_blocks * kKeyRows * stride);
    dvalues = shares.take<float>(key_blocks * kKeyRows * stride);
    queries = shares.take<Word>(query_panels * width.words * kPanel);
    grads = shares.take<Word>(query_panels * width.words * kPanel);
    query_pairs = shares.take<Word>(query_panels * width.panels * kDeep * kPanel);
    grad_pairs = shares.take<Word>(query_panels * width.panels * kDeep * kPanel);
    dqueries = shares.take<float>(query_panels * width.channels * kPanel);
    lse = shares.take<float>(query_panels * kPanel);
    along = shares.take<float>(query_panels * kPanel);
    seeds = shares.take<std::uint64_t>(in.dropped.rows == nullptr ? 0 : query_panels * kPanel);
    rows = mine.take<Word>(most(16 * width.row, most(kKeyWords, 16) * width.channels));
    raw = mine.take<float>(kRows * kPanel);
    raw_grad = mine.take<float>(kRows * kPanel);
    weights = mine.take<Word>(kRows * kDeep);
    scores = mine.take<Word>(kKeyRows * kPanel);
    score_pairs = mine.take<Word>(kKeyRows * kPanel);
    bits = mine.take<std::int16_t>(kKeyRows * kPanel);
    bytes = {shares.bytes(), mine.bytes()};
  }
};

// Keys and values of a block as rows, and its keys with channels as rows.
template <class T>
void pack_key_rows(const Problem& in, const Unit& unit, const BackwardRoom<T>& room, Int block) {
  const Widths<T> width(in.d);
  const Segment& segment = *unit.segment;
  const Rows k(in.k, segment.batch, unit.group, segment.key), v(in.v, segment.batch, unit.group, segment.key);
  constexpr Int kWords = BackwardRoom<T>::kKeyWords;
  const Int first = block * kKeyRows;
  read_rows<T>(k, first, kKeyRows, segment.keys, width, room.keys + first * width.row);
  read_rows<T>(v, first, kKeyRows, segment.keys, width, room.values + first * width.row);
  turn_rows<T>(in.turns, segment.batch, segment.key, first, kKeyRows, segment.keys, width.row, room.keys + first * width.row,
               false);
  const Word* rows = room.keys + first * width.row;
  for (Int i = 0; i < kKeyRows; i += T::kPer, rows += T::kPer * width.row) {
    // channels of all panels side by side
    to_pairs<T>(rows, width, room.rows + i / T::kPer * width.channels, kPanel);
  }
  const Int words = kKeyRows / T::kPer;
  clear(room.rows + words * width.channels, (kWords - words) * width.channels * 4);
  Word* to = room.turned + block * width.channels * kWords;
  for (Int w = 0; w < kWords; w += 16) {
    for (Int c = 0; c < width.channels; c += 16) {
      turn(room.rows + w * width.channels + c, width.channels, to + c * kWords + w, kWords, 16);
    }
  }
}

inline Vec vector_at(const Rows& rows, Int i, Int c) {
  const char* row = rows.at(i);
  return rows.type == Type::f32 ? load(row + 4 * c) : (Vec)(load_half(row + 2 * c) << 16);
}

inline float number_at(const Rows& rows, Int i, Int c) {
  const char* row = rows.at(i);
  return rows.type == Type::f32 ? reinterpret_cast<const float*>(row)[c] : widen(reinterpret_cast<const std::uint16_t*>(row)[c]);
}

// The product of a query's output and its gradient.
inline float along(const Rows& out, const Rows& dout, Int i, Int d) {
  Vec sums{};
  Int c = 0;
  for (; c + kWidth <= d; c += kWidth) sums += vector_at(out, i, c) * vector_at(dout, i, c);
  float total = sum(sums);
  for (; c < d; ++c) total += number_at(out, i, c) * number_at(dout, i, c);
  return total;
}

// A panel of a head's queries and gradients in both forms, their log-sum-exps in powers of 2; beyond the last query,
// weight 0.
template <class T>
void pack_queries(const Backward& args, const Unit& unit, const BackwardRoom<T>& room, Int head, Int panel) {
  const Problem& in = args.in;
  const Widths<T> width(in.d);
  const Segment& segment = *unit.segment;
  const Rows q(in.q, segment.batch, head, segment.query), g(args.dout, segment.batch, head, segment.query);
  const Rows o(args.out, segment.batch, head, segment.query);
  constexpr Int kDeep = BackwardRoom<T>::kDeep;
  const auto pack = [&](const Rows& from, Int first, Word* columns, Word* pairs, const Turns& turns) {
    const Int column = first % kPanel;
    read_rows<T>(from, first, 16, segment.queries, width, room.rows);
    turn_rows<T>(turns, segment.batch, segment.query, first, 16, segment.queries, width.row, room.rows, false);
    to_panel<T>(room.rows, width, columns + panel * width.words * kPanel, column);
    Word* to = pairs + (panel * width.panels * kDeep + column / T::kPer) * kPanel;
    for (Int i = 0; i < 16; i += T::kPer, to += kPanel) to_pairs<T>(room.rows + i * width.row, width, to, kDeep * kPanel);
  };
  for (Int first = panel * kPanel; first < (panel + 1) * kPanel; first += 16) {
    pack(q, first, room.queries, room.query_pairs, in.turns);
    pack(g, first, room.grads, room.grad_pairs, Turns{});
  }
  const float* lse = args.lse + (segment.batch * in.heads + head) * in.length + segment.query;
  const std::int64_t* seeds = seeds_of(in, segment, head);
  for (Int i = panel * kPanel; i < (panel + 1) * kPanel; ++i) {
    const bool there = i < segment.queries;
    room.lse[i] = there ? lse[i] * kLog2E : __builtin_inff();
    room.along[i] = there ? along(o, g, i, in.d) : 0.0f;
    if (seeds != nullptr) room.seeds[i] = there ? static_cast<std::uint64_t>(seeds[i]) : 0;
  }
  clear(room.dqueries + panel * width.channels * kPanel, width.channels * kPanel * 4);
}

// Weights and score gradients of some keys (rows, at most kRows; `row` is the first's place in the block) and the columns
// [from, to) of a panel of queries, of which key r meets those from hidden + r on.
template <class T, bool kDrops>
inline void weigh(const BackwardRoom<T>& room, Int panel, Int rows, Int row, Int from, Int to, Int hidden, float c,
                  const Dropped& dropped) {
  const auto least_kept = static_cast<std::int32_t>(dropped.threshold - 32768);
  const float scale = dropped.scale();
  const auto compute = [&](Int r, Int j, Vec& weights) {
    const Int query = panel * kPanel + j;
    weights = power_of_two<T>(load(room.raw + r * kPanel + j) * c - load(room.lse + query));
    if (j < hidden + r) weights = places(j) < static_cast<std::int32_t>(hidden + r) ? Vec{} : weights;
    Vec grads = load(room.raw_grad + r * kPanel + j);
    if constexpr (kDrops) {
      const std::int16_t* bits = room.bits + (row + r) * kPanel + j;
      const Vec all_weights = weights;
      weights = where_kept(bits, least_kept, weights);
      return all_weights * (where_kept(bits, least_kept, grads * scale) - load(room.along + query));
    }
    return weights * (grads - load(room.along + query));
  };
  Vec weights;
  for (Int j = from; j < to; j += kWidth) {
    if constexpr (T::kPer == 1) {
      for (Int r = 0; r < rows; ++r) {
        const Vec grads = compute(r, j, weights);
        store(room.weights + r * kPanel + j, weights);
        store(room.scores + (row + r) * kPanel + j, grads);
      }
    } else {
      for (Int r = 0; r < rows; r += 2) {
        const Half low = narrow(compute(r, j, weights));
        store_half(reinterpret_cast<std::uint16_t*>(room.weights) + r * kPanel + j, narrow(weights));
        Half high{};
        if (r + 1 < rows) {
          high = narrow(compute(r + 1, j, weights));
          store_half(reinterpret_cast<std::uint16_t*>(room.weights) + (r + 1) * kPanel + j, narrow(weights));
        }
        store_half(reinterpret_cast<std::uint16_t*>(room.scores) + r * kPanel + j, low);
        store_half(reinterpret_cast<std::uint16_t*>(room.scores) + (r + 1) * kPanel + j, high);
        *reinterpret_cast<LooseBits*>(room.score_pairs + (row + r) / 2 * kPanel + j) =
            __builtin_convertvector(low, Bits) | (__builtin_convertvector(high, Bits) << 16);
      }
    }
  }
}

// The bits of the probabilities of a panel of queries for `keys` keys from `place` on.
template <class T>
void bits_of_block(const BackwardRoom<T>& room, Int panel, Int place, Int keys) {
  for (Int w = place / 4; w <= (place + keys - 1) / 4; ++w) {
    const std::uint64_t step = static_cast<std::uint64_t>(w + 1) * kStep;
    for (Int j = 0; j < kPanel; j += kLanes) {
      const Words words = mixed(*reinterpret_cast<const LooseWords*>(room.seeds + panel * kPanel + j) + step);
      for (Int e = most(4 * w, place); e < least(4 * w + 4, place + keys); ++e) {
        *reinterpret_cast<LooseFewShorts*>(room.bits + (e - place) * kPanel + j) =
            __builtin_convertvector(words >> static_cast<std::uint64_t>(16 * (e % 4)), FewShorts);
      }
    }
  }
}

// A block of keys against a panel of queries.
template <class T>
void backward_tile(const Backward& args, const Unit& unit, const BackwardRoom<T>& room, const Member& member, Int block,
                   Int panel) {
  const Problem& in = args.in;
  const Widths<T> width(in.d);
  const Segment& segment = *unit.segment;
  constexpr Int kDeep = BackwardRoom<T>::kDeep, kPer = T::kPer;
  const Int first_key = block * kKeyRows, keys = least(kKeyRows, segment.keys - first_key);
  const Int columns = round_up(least(kPanel, segment.queries - panel * kPanel), kLine), stride = width.panels * kPanel;
  // Key r of the block is hidden from the columns before hidden + r.
  const Int hidden = first_key - segment.ahead - panel * kPanel;
  const auto begin = [&](Int r) { return between(hidden + r, 0, columns) / kLine * kLine; };
  const Word *q = room.queries + panel * width.words * kPanel, *g = room.grads + panel * width.words * kPanel;
  const Word *q_pairs = room.query_pairs + panel * width.panels * kDeep * kPanel;
  const Word *g_pairs = room.grad_pairs + panel * width.panels * kDeep * kPanel;
  Word* pairs = kPer == 1 ? room.scores : room.score_pairs;
  if (in.dropped.rows != nullptr) bits_of_block<T>(room, panel, segment.key + first_key, keys);
  for (Int r = 0; r < keys; r += kRows) {
    const Int rows = least(kRows, keys - r), from = begin(r), deep = (columns - from) / kPer;
    const Int skipped = from - begin(0);
    if (skipped > 0) {
      for (Int i = r / kPer; i < (r + rows + kPer - 1) / kPer; ++i) clear(pairs + i * kPanel + begin(0), skipped * 4);
    }
    if (from >= columns) continue;
    const Int at = (first_key + r) * width.row;
    product<T>(rows, room.keys + at, width.row, q + from, width.words, room.raw + from, kPanel, columns - from, false);
    product<T>(rows, room.values + at, width.row, g + from, width.words, room.raw_grad + from, kPanel, columns - from, false);
    const float c = in.scale * kLog2E;
    if (in.dropped.rows == nullptr) weigh<T, false>(room, panel, rows, r, from, columns, hidden + r, c, in.dropped);
    else weigh<T, true>(room, panel, rows, r, from, columns, hidden + r, c, in.dropped);
    const Word* scores = room.scores + (kPer == 1 ? r * kPanel : 0);
    for (Int p = 0; p < width.panels; ++p) {
      const Int deepest = (p * kDeep + from / kPer) * kPanel, to = (first_key + r) * stride + p * kPanel;
      product<T>(rows, room.weights + from / kPer, kDeep, g_pairs + deepest, deep, room.dvalues + to, stride,
                 width.columns(p), true);
      product<T>(rows, scores + from / kPer, kDeep, q_pairs + deepest, deep, room.dkeys + to, stride, width.columns(p), true);
    }
  }
  while (__atomic_load_n(member.done + panel, __ATOMIC_ACQUIRE) != block) member.pause();
  const Int from = begin(0);
  if (from >= columns) return;
  product<T>(width.channels, room.turned + block * width.channels * room.kKeyWords, room.kKeyWords, pairs + from,
             (keys + kPer - 1) / kPer, room.dqueries + panel * width.channels * kPanel + from, kPanel, columns - from, true);
}

// The gradient of a panel of a head's queries to where it belongs.
template <class T>
void write_queries(const Backward& args, const Unit& unit, const BackwardRoom<T>& room, Int head, Int panel) {
  const Problem& in = args.in;
  const Widths<T> width(in.d);
  const Segment& segment = *unit.segment;
  float* rows = reinterpret_cast<float*>(room.rows);
  for (Int i = panel * kPanel; i < least((panel + 1) * kPanel, segment.queries); i += 16) {
    const float* from = room.dqueries + panel * width.channels * kPanel + i % kPanel;
    for (Int c = 0; c < width.channels; c += 16) {
      turn(reinterpret_cast<const Word*>(from + c * kPanel), kPanel, room.rows + c, width.channels, 16);
    }
    turn_rows<F32>(in.turns, segment.batch, segment.query, i, 16, segment.queries, width.channels, room.rows, true);
    for (Int r = 0; r < least(16, segment.queries - i); ++r) {
      write_row(args.dq, segment.batch, head, segment.query + i + r, rows + r * width.channels, in.d, in.scale);
    }
  }
}

template <class T>
void backward_head(const Backward& args, const Unit& unit, const BackwardRoom<T>& room, const Member& member, Int head) {
  for (Int panel = member.rank; panel < room.query_panels; panel += member.size) {
    pack_queries<T>(args, unit, room, head, panel);
    member.done[panel] = 0;
  }
  if (member.rank == 0) *member.next = 0;
  member.meet(member.team);
  for (;;) {
    const Int block = __atomic_fetch_add(member.next, 1, __ATOMIC_RELAXED);
    if (block >= room.key_blocks) break;
    const Int first = most(block * kKeyRows - unit.segment->ahead, 0) / kPanel;
    for (Int panel = first; panel < room.query_panels; ++panel) {
      backward_tile<T>(args, unit, room, member, block, panel);
      __atomic_store_n(member.done + panel, block + 1, __ATOMIC_RELEASE);
    }
  }
  member.meet(member.team);
  for (Int panel = member.rank; panel < room.query_panels; panel += member.size) {
    write_queries<T>(args, unit, room, head, panel);
  }
}

template <class T>
Bytes backward_bytes(const Problem& in, const Unit& unit) {
  return BackwardRoom<T>(in, *unit.segment, nullptr, nullptr).bytes;
}

template <class T>
void backward_unit(const Backward& args, const Unit& unit, const Member& member, void* shared, void* own) {
  const Problem& in = args.in;
  const Segment& segment = *unit.segment;
  const BackwardRoom<T> room(in, segment, shared, own);
  const Int each = in.heads / in.groups, stride = Widths<T>(in.d).panels * kPanel;
  for (Int block = member.rank; block < room.key_blocks; block += member.size) {
    pack_key_rows<T>(in, unit, room, block);
    clear(room.dkeys + block * kKeyRows * stride, kKeyRows * stride * 4);
    clear(room.dvalues + block * kKeyRows * stride, kKeyRows * stride * 4);
  }
  for (Int i = 0; i < each; ++i) backward_head<T>(args, unit, room, member, unit.group * each + i);
  for (Int i = member.rank; i < segment.keys; i += member.size) {
    turn_rows<F32>(in.turns, segment.batch, segment.key, i, 1, segment.keys, stride,
                   reinterpret_cast<Word*>(room.dkeys + i * stride), true);
    write_row(args.dk, segment.batch, unit.group, segment.key + i, room.dkeys + i * stride, in.d, in.scale);
    write_row(args.dv, segment.batch, unit.group, segment.key + i, room.dvalues + i * stride, in.d, in.dropped.scale());
  }
}

}  // namespace megaforge::attention::MF_ISA
