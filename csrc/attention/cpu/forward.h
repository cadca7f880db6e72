// The forward pass of one unit: blocks of queries against blocks of keys with a running softmax (Dao, arXiv 2307.08691).
// A query's result depends on its own segment alone, and not on which queries are computed beside it.

namespace megaforge::attention::MF_ISA {

constexpr Int kKeyBlock = 256;

template <class T>
struct ForwardRoom {
  Word *keys, *values, *queries, *rows, *narrow;
  float *scores, *out, *peak, *total;
  std::uint64_t* bits;  // of a row's probabilities against a block of keys
  Int key_panels, value_panel;  // how many panels of keys; words from one panel of channels to the next
  Int bytes;

  ForwardRoom(const Problem& in, const Segment& segment, void* scratch) {
    const Widths<T> width(in.d);
    Shares shares(scratch);
    key_panels = (segment.keys + kPanel - 1) / kPanel;
    value_panel = key_panels * (kPanel / T::kPer) * kPanel;
    keys = shares.take<Word>(key_panels * width.words * kPanel);
    values = shares.take<Word>(width.panels * value_panel);
    queries = shares.take<Word>(kQueryBlock * width.row);
    rows = shares.take<Word>(16 * width.row);
    scores = shares.take<float>(kRows * kKeyBlock);
    narrow = shares.take<Word>(kRows * kKeyBlock / 2);
    out = shares.take<float>(kQueryBlock * width.panels * kPanel);
    peak = shares.take<float>(kQueryBlock);
    total = shares.take<float>(kQueryBlock);
    bits = shares.take<std::uint64_t>(kKeyBlock / 4 + 2 * kLanes);
    bytes = shares.bytes();
  }
};

// Keys and values of `count` keys, and zeros up to whole panels.
template <class T>
void pack_keys(const Problem& in, const Unit& unit, const ForwardRoom<T>& room, Int count) {
  const Widths<T> width(in.d);
  const Segment& segment = *unit.segment;
  const Rows k(in.k, segment.batch, unit.group, segment.key), v(in.v, segment.batch, unit.group, segment.key);
  for (Int first = 0; first < round_up(count, kPanel); first += 16) {
    read_rows<T>(k, first, 16, count, width, room.rows);
    turn_rows<T>(in.turns, segment.batch, segment.key, first, 16, count, width.row, room.rows, false);
    to_panel<T>(room.rows, width, room.keys + first / kPanel * width.words * kPanel, first % kPanel);
    read_rows<T>(v, first, 16, count, width, room.rows);
    for (Int i = 0; i < 16; i += T::kPer) {
      to_pairs<T>(room.rows + i * width.row, width, room.values + (first + i) / T::kPer * kPanel, room.value_panel);
    }
  }
}

// Scores of a row to weights relative to its running maximum; gives what the row's sums so far must be multiplied by.
// `seen` of `columns` scores count; what is beyond gets weight 0. c: of a score, to make it an exponent of 2.
// With kDrops those stay whose `bits` are at least `least_kept`.
template <class T, bool kDrops>
inline float to_weights(float* scores, void* narrowed, Int seen, Int columns, float c, float& peak, float& total,
                        const std::int16_t* bits, std::int32_t least_kept) {
  Vec found = all(-__builtin_inff());
  Int j = 0;
  for (; j + kWidth <= seen; j += kWidth) found = greater(load(scores + j), found);
  for (; j < columns; j += kWidth) {
    const Vec kept = places(j) < static_cast<std::int32_t>(seen) ? load(scores + j) : all(-__builtin_inff());
    store(scores + j, kept);
    found = greater(kept, found);
  }
  const float before = peak, highest = largest(found) * c;
  peak = highest > before ? highest : before;
  const float base = peak == -__builtin_inff() ? 0.0f : peak;
  Vec sums{};
  for (j = 0; j < columns; j += kWidth) {
    Vec weights = power_of_two<T>(load(scores + j) * c - base);
    sums += weights;
    if constexpr (kDrops) weights = where_kept(bits + j, least_kept, weights);
    if constexpr (T::kPer == 1) store(scores + j, weights);
    else store_half(static_cast<std::uint16_t*>(narrowed) + j, MF_ISA::narrow(weights));
  }
  const float factor = before == peak ? 1.0f : power_of_two<F32>(all(before - base))[0];
  total = total * factor + sum(sums);
  return factor;
}

// The bits of the probabilities of a row for the keys from `place` on, `columns` of them.
inline const std::int16_t* bits_of_row(std::int64_t seed, Int place, Int columns, std::uint64_t* to) {
  Words number{};
  for (int i = 0; i < kLanes; ++i) number[i] = static_cast<std::uint64_t>(i);
  const auto first = static_cast<std::uint64_t>(place / 4 + 1);
  for (Int w = 0; w < (place % 4 + columns + 3) / 4; w += kLanes) {
    const Words count = number + (first + static_cast<std::uint64_t>(w));
    *reinterpret_cast<LooseWords*>(to + w) = mixed(count * kStep + static_cast<std::uint64_t>(seed));
  }
  return reinterpret_cast<const std::int16_t*>(to) + place % 4;
}

// One block of one head's queries [first, first + count), counted from the segment's first.
template <class T>
void forward_block(const Forward& args, const Unit& unit, const ForwardRoom<T>& room, Int head, Int first, Int count) {
  const Problem& in = args.in;
  const Widths<T> width(in.d);
  const Segment& segment = *unit.segment;
  const Rows q(in.q, segment.batch, head, segment.query);
  const float c = in.scale * kLog2E;
  const std::int64_t* seeds = seeds_of(in, segment, head);
  const auto least_kept = static_cast<std::int32_t>(in.dropped.threshold - 32768);
  const Int stride = width.panels * kPanel;
  read_rows<T>(q, first, count, segment.queries, width, room.queries);
  turn_rows<T>(in.turns, segment.batch, segment.query, first, count, segment.queries, width.row, room.queries, false);
  clear(room.out, count * stride * 4);
  for (Int i = 0; i < count; ++i) room.peak[i] = -__builtin_inff(), room.total[i] = 0.0f;
  const auto seen_by = [&](Int i) { return between(first + i + segment.ahead + 1, 0, segment.keys); };
  for (Int key = 0; key < seen_by(count - 1); key += kKeyBlock) {
    for (Int i = 0; i < count; i += kRows) {
      const Int rows = least(kRows, count - i), most_seen = least(seen_by(i + rows - 1) - key, kKeyBlock);
      if (most_seen <= 0) continue;
      const Int columns = round_up(most_seen, kLine);
      for (Int j = 0; j < columns; j += kPanel) {
        product<T>(rows, room.queries + i * width.row, width.row, room.keys + (key + j) * width.words, width.words,
                   room.scores + j, kKeyBlock, least(kPanel, columns - j), false);
      }
      for (Int r = 0; r < rows; ++r) {
        const Int seen = between(seen_by(i + r) - key, 0, kKeyBlock);
        float *scores = room.scores + r * kKeyBlock, &peak = room.peak[i + r], &total = room.total[i + r];
        Word* narrowed = room.narrow + r * (kKeyBlock / 2);
        float factor;
        if (seeds == nullptr) {
          factor = to_weights<T, false>(scores, narrowed, seen, columns, c, peak, total, nullptr, 0);
        } else {
          const std::int16_t* bits = bits_of_row(seeds[first + i + r], segment.key + key, columns, room.bits);
          factor = to_weights<T, true>(scores, narrowed, seen, columns, c, peak, total, bits, least_kept);
        }
        if (factor == 1.0f || key == 0) continue;
        float* out = room.out + (i + r) * stride;
        for (Int j = 0; j < width.channels; j += kWidth) store(out + j, load(out + j) * factor);
      }
      const Word* weights = T::kPer == 1 ? reinterpret_cast<const Word*>(room.scores) : room.narrow;
      for (Int p = 0; p < width.panels; ++p) {
        product<T>(rows, weights, kKeyBlock / T::kPer, room.values + p * room.value_panel + key / T::kPer * kPanel,
                   columns / T::kPer, room.out + i * stride + p * kPanel, stride, width.columns(p), key > 0);
      }
    }
  }
  float* lse = args.lse + (segment.batch * in.heads + head) * in.length + segment.query + first;
  const float kept_share = 1.0f / in.dropped.scale();
  for (Int i = 0; i < count; ++i) {
    const float total = room.total[i];
    lse[i] = (room.peak[i] + __builtin_log2f(total)) * kLn2;
    float* out = room.out + i * stride;
    if (total != 0.0f) {
      for (Int j = 0; j < width.channels; j += kWidth) store(out + j, load(out + j) / (total * kept_share));
    }
    write_row(args.out, segment.batch, head, segment.query + first + i, out, in.d, 1.0f);
  }
}

template <class T>
Int forward_bytes(const Problem& in, const Unit& unit) {
  return ForwardRoom<T>(in, *unit.segment, nullptr).bytes;
}

template <class T>
void forward_unit(const Forward& args, const Unit& unit, void* scratch) {
  const Problem& in = args.in;
  const Segment& segment = *unit.segment;
  const ForwardRoom<T> room(in, segment, scratch);
  const Int blocks = query_blocks(segment), each = in.heads / in.groups;
  // Of one head alone, the keys up to the last query's; else all.
  const bool one = unit.first / blocks == (unit.last - 1) / blocks;
  const Int last = one ? least(((unit.last - 1) % blocks + 1) * kQueryBlock, segment.queries) : segment.queries;
  pack_keys<T>(in, unit, room, between(last + segment.ahead, 0, segment.keys));
  for (Int i = unit.first; i < unit.last; ++i) {
    const Int first = i % blocks * kQueryBlock;
    forward_block<T>(args, unit, room, unit.group * each + i / blocks, first, least(kQueryBlock, segment.queries - first));
  }
}

}  // namespace megaforge::attention::MF_ISA
