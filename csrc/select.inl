// Which key pages a query block reads, estimated from page means. Same vocabulary and the same micro-kernel as attend.inl.
//
// For a query block whose diagonal page is B, and each query head on its own, over the pages J < B that all of its rows see whole:
//
//   logit[r][J] = factor_r * q_r . mean_key[J]          r: `sample_rows` rows of the block, evenly spaced, the last one among them
//   energy[J]   = mean over r of softmax_J(logit[r])    every row counts the same, so a few loud rows cannot decide alone
//
// A mean hides a single key: what a prompt is searched for stands in a few tokens of a page. With `bound_pages` each row takes a second softmax, over
//
//   bound[r][J] = factor_r * sum over channels of max(q * largest_key[J], q * smallest_key[J])       (Quest, arXiv 2406.10774)
//
// which no key of the page exceeds, and so many pages are chosen by these energies. As max(q a, q b) = q+ a + q- b for a >= b, this is a product too: of
// (q+, q-) with (largest, smallest), twice as wide.
//
// Kept are the sinks, the local pages and the diagonal; then the `bound_pages` pages of largest energy by bounds, whatever they hold, because
// bounds say where a key may be and not how much it weighs; then those of largest energy by means, until what is kept holds `mass` of
// all energy by means; at most `most_pages` together. Energies are compared in steps of a sixteenth of an octave, and in the last step the latest pages go first: a
// head without preferences then keeps exactly as many as it needs. A query reads page J with the rotation that attention itself would use,
// so the estimate is of the mass that attention will find.
//
// Summaries are fp32; they are packed into the layout of a K page (keys are then pages), which makes scoring a matrix product: rows of
// all heads of a group against the same means. A caller may keep what was packed: the next chunk then packs the tiles that are new.
// Work item = (KV head, query block); one thread does one item. A token of an answer is another kind of work: select_token.inl.
#include "kernels.h"

namespace {

constexpr int NUM_STEPS = 1 << 12;  // exponent and four bits of mantissa of a positive float: order is kept
struct Step {
  float mass;
  int32_t pages;
};
static inline int step_of(float energy) {
  uint32_t bits;
  __builtin_memcpy(&bits, &energy, 4);
  return int(bits >> 19);
}

// The pages of an item that may be left out: [begin, end). What precedes them are sinks, what follows them local pages and the diagonal.
struct Free {
  int64_t begin, end;
};

static inline void set_page(uint64_t* bits, int64_t page) { bits[page / 64] |= uint64_t(1) << (page % 64); }

// In four sums, because one would wait for itself.
static double sum_of(const float* energy, int64_t count) {
  double sums[4] = {0, 0, 0, 0};
  int64_t page = 0;
  for (; page + 4 <= count; page += 4)
    for (int i = 0; i < 4; i++) sums[i] += energy[page + i];
  for (; page < count; page++) sums[0] += energy[page];
  return sums[0] + sums[1] + (sums[2] + sums[3]);
}

// Sets what every list has; gives how many pages that are.
static int keep_forced(int64_t count, Free free, uint64_t* bits, int64_t words) {
  __builtin_memset(bits, 0, size_t(words) * 8);
  for (int64_t page = 0; page < free.begin; page++) set_page(bits, page);
  for (int64_t page = free.end; page <= count; page++) set_page(bits, page);
  return int(count + 1 - (free.end - free.begin));
}

// Calls take(page) for the pages of [begin, end) whose energy is of `step` or more, in order or from the last one. Most are not: they are passed
// sixteen at a time.
template <bool DOWN, class Take>
static inline void for_pages_from(const float* energy, int64_t begin, int64_t end, int step, Take take) {
  const bool skip = step >= 16;  // less are denormal numbers, which may compare as zeros
  const uint32_t bits = skip ? (uint32_t(step) << 19) - 1 : 0;  // energies are positive: as numbers they are in the order of their bits
  float below;
  __builtin_memcpy(&below, &bits, 4);
  const vec bound = set1(below);
  const int64_t whole = (end - begin) / 16 * 16, rest = DOWN ? begin : begin + whole;
  auto one = [&](int64_t page) {
    if (step_of(energy[page]) >= step) take(page);
  };
  for (int64_t at = 0; at < whole; at += 16) {
    const int64_t first = DOWN ? end - 16 - at : begin + at;
    if (skip && !any_greater(load(energy + first), bound)) continue;
    for (int i = 0; i < 16; i++) one(DOWN ? first + 15 - i : first + i);
  }
  for (int64_t i = 0, n = end - begin - whole; i < n; i++) one(DOWN ? rest + n - 1 - i : rest + i);
}

// A step that at least `most` pages of [begin, end) reach: the pages are dealt out to `GROUPS` groups, and so many groups have a largest one in it or above.
static int step_of_groups(const float* energy, int64_t begin, int64_t end, int64_t most, Step* steps) {
  constexpr int VECS = 16, GROUPS = VECS * 16;
  if (most > GROUPS / 2 || end - begin < 4 * GROUPS) return 0;
  vec largest[VECS];
  for (int i = 0; i < VECS; i++) largest[i] = zero();
  int64_t page = begin;
  for (; page + GROUPS <= end; page += GROUPS)
    for (int i = 0; i < VECS; i++) largest[i] = max_(largest[i], load(energy + page + 16 * i));
  alignas(64) float of_group[GROUPS];
  for (int i = 0; i < VECS; i++) store(of_group + 16 * i, largest[i]);
  __builtin_memset(steps, 0, NUM_STEPS * sizeof(Step));
  for (int i = 0; i < GROUPS; i++) steps[step_of(of_group[i])].pages++;
  int step = NUM_STEPS - 1;
  for (int64_t found = steps[step].pages; step > 0 && found < most;) found += steps[--step].pages;
  return step;
}

// Adds the pages of largest energy until all that is set holds `mass` of the energy of pages [0, count), at most `most`; gives how many.
// AGAIN: some of the free pages are set already.
template <bool AGAIN>
static int keep_by_energy(const float* energy, int64_t count, Free free, float mass, int64_t most, Step* steps, uint64_t* bits) {
  auto open = [bits](int64_t page) { return !AGAIN || !(bits[page / 64] >> (page % 64) & 1); };
  double need = 1e30;  // all of the mass is all of the pages, whatever rounding says
  int floor = 0;       // a step below which no page can be needed
  if (mass < 1) {
    const double all = sum_of(energy, count);
    double have = sum_of(energy, free.begin) + sum_of(energy + free.end, count - free.end);  // of what is set
    for (int64_t word = free.begin / 64; AGAIN && word * 64 < free.end; word++)
      for (uint64_t rest = bits[word]; rest; rest &= rest - 1) {
        const int64_t page = word * 64 + __builtin_ctzll(rest);
        if (page >= free.begin && page < free.end) have += energy[page];
      }
    need = double(mass) * all - have;
    // Pages below this, all of them together, hold no more than may be missing. Half of it, because sums round.
    floor = step_of(float((1 - double(mass)) * all / double(count) / 2));
  } else if (!AGAIN) {
    floor = step_of_groups(energy, free.begin, free.end, most, steps);
  }
  int64_t room = most;
  if (need <= 0 || room <= 0 || free.begin >= free.end) return 0;
  __builtin_memset(steps, 0, NUM_STEPS * sizeof(Step));
  for_pages_from<false>(energy, free.begin, free.end, floor, [&](int64_t page) {
    if (!open(page)) return;
    Step& step = steps[step_of(energy[page])];
    step.mass += energy[page];
    step.pages++;
  });
  // The steps that are needed whole, and for which there is room; then one that is taken in part.
  int last_step = NUM_STEPS - 1, kept = 0;
  while (last_step > floor && need - steps[last_step].mass > 0 && room >= steps[last_step].pages) {
    need -= steps[last_step].mass;
    room -= steps[last_step--].pages;
  }
  for_pages_from<true>(energy, free.begin, free.end, last_step, [&](int64_t page) {
    if (!open(page)) return;
    if (step_of(energy[page]) == last_step) {
      if (need <= 0 || room <= 0) return;
      room--, need -= energy[page];
    }
    set_page(bits, page), kept++;
  });
  return kept;
}

// Which rotation of a query reads a page.
struct Spans {
  int64_t pages, own;  // of a span, 0 without spans; of the query's page
  int variant_of(int64_t page) const {
    if (!pages) return 0;
    const int64_t distance = own - page / pages;
    return distance > 2 ? 2 : int(distance);
  }
};

// Summaries as scoring reads them, by pass (0 means, 1 bounds): where the caller keeps them, or the call's own.
struct Packed {
  int passes;
  int64_t tile_pages, tiles, tile_bytes[2], first_tile[2], head_bytes[2];  // first_tile: the first that is not as it should be
  char* at[2];

  // channel_bytes: of a tile, for one channel.
  static Packed plan(const zt_select_args* a, int64_t pages, int64_t tile_pages, int64_t channel_bytes) {
    Packed p = {a->bound_pages ? 2 : 1, tile_pages, pages / tile_pages, {}, {}, {}, {}};
    for (int pass = 0; pass < p.passes; pass++) {
      p.tile_bytes[pass] = channel_bytes * a->head_dim * (pass + 1);
      p.first_tile[pass] = a->packed[pass] ? a->valid_pages[pass] / tile_pages : 0;
      p.head_bytes[pass] = (a->packed[pass] ? a->packed_tiles[pass] : p.tiles) * p.tile_bytes[pass];
      p.at[pass] = (char*)a->packed[pass];
    }
    return p;
  }
  int64_t own_bytes(int kv_heads) const {
    int64_t sum = 0;
    for (int pass = 0; pass < passes; pass++) sum += at[pass] ? 0 : head_bytes[pass] * kv_heads;
    return sum;
  }
  void place(char* own, int kv_heads) {
    for (int pass = 0; pass < passes; pass++)
      if (!at[pass]) at[pass] = own, own += head_bytes[pass] * kv_heads;
  }
  void prefetch(int pass, int64_t h, int64_t page, int64_t pages) const {
    const char* from = tile(pass, h, page);
    for (int64_t byte = 0; byte < pages / tile_pages * tile_bytes[pass]; byte += 64) __builtin_prefetch(from + byte, 0, 2);
  }
  char* tile(int pass, int64_t h, int64_t page) const { return at[pass] + h * head_bytes[pass] + page / tile_pages * tile_bytes[pass]; }

  // Calls pack(pass, KV head, first page, tile) for what is not packed yet; by all threads of a parallel region, which go on together.
  template <class Pack>
  void fill(int kv_heads, Pack pack) const {
    for (int pass = 0; pass < passes; pass++) {
      const int64_t missing = tiles - first_tile[pass];
#pragma omp for schedule(static)
      for (int64_t item = 0; item < missing * kv_heads; item++) {
        const int64_t h = item / missing, first = (first_tile[pass] + item % missing) * tile_pages;
        pack(pass, h, first, tile(pass, h, first));
      }
    }
  }
};

static inline const float* summary_of(const zt_select_args* a, int64_t page, int64_t h, int pass) {
  return a->summaries + int64_t(a->page_table[page]) * a->summary_slot_stride + (h * 3 + pass) * a->head_dim;
}

// Sixteen pages as sixteen keys of a K page. count: pages that are full; others are zeros.
template <class S, class Dot>
static void pack_tile(const zt_select_args* a, int pass, int64_t h, int64_t first, int64_t count, char* tile) {
  alignas(64) typename S::T rounded[512];
  const int width = a->head_dim * (pass + 1);
  if (first + 16 > count) __builtin_memset(tile, 0, size_t(width) * 16 * sizeof(typename S::T));
  for (int64_t page = first; page < first + 16 && page < count; page++) {
    const float* from = summary_of(a, page, h, pass);
    for (int d = 0; d < width; d += 16) S::put(rounded + d, load(from + d));
    typename S::T* k = (typename S::T*)tile + page % 16 * Dot::PAIR;
    for (int d = 0; d < width; d += Dot::PAIR)
      for (int e = 0; e < Dot::PAIR; e++) k[int64_t(d) * 16 + e] = rounded[d + e];
  }
}

// One row of one head as a pass multiplies it: for bounds its positive part and its negative part, side by side.
template <class S, class Dot>
static void load_query(int pass, const typename Dot::Stored* from, int head_dim, typename Dot::A* to) {
  if (!pass) return Dot::load_a(to, from, head_dim);
  alignas(64) typename Dot::Stored halves[512];
  for (int d = 0; d < head_dim; d++) {
    const bool positive = S::get1(from + d) > 0;
    halves[d] = positive ? from[d] : typename Dot::Stored(0);
    halves[head_dim + d] = positive ? typename Dot::Stored(0) : from[d];
  }
  Dot::load_a(to, halves, 2 * head_dim);
}

// Scores of rows for pages [begin, end), to scores[row * stride + page - begin]; begin: a multiple of 64. multiply(variant, first, vecs, to, stride) gives
// those of 16 * vecs pages, at most 64, in one rotation. edge: [ROWS][64], to work in.
template <class Multiply>
static void score_pages(Spans spans, int rows, int64_t begin, int64_t end, float* edge, float* scores, int64_t stride, Multiply multiply) {
  for (int64_t first = begin; first < end; first += 64) {
    const int64_t last = (first + 64 < end ? first + 64 : end) - 1;
    const int vecs = int((last - first) / 16 + 1);
    const bool whole = spans.variant_of(first) == spans.variant_of(last);
    for (int v = spans.variant_of(first); v >= spans.variant_of(last); v--) {
      multiply(v, first, vecs, whole ? scores + first - begin : edge, whole ? stride : 64);
      for (int64_t page = first; page <= last && !whole; page++)
        if (spans.variant_of(page) == v)
          for (int r = 0; r < rows; r++) scores[r * stride + page - begin] = edge[r * 64 + page - first];
    }
  }
}

template <class Dot>
static inline void multiply_tiles(const Packed& packed, int pass, int64_t h, int64_t first, int vecs, const typename Dot::A* q, int rows, int width,
                                  float* to, int64_t stride) {
  const char* tile = packed.tile(pass, h, first);
  product<Dot, false>(rows, q, width, width / Dot::PAIR, &tile, 1, packed.tile_bytes[pass], Dot::STEP_BYTES, vecs, to, stride);
}

// Scores of `count` pages, room for whole vecs of them, to 2^(score * factor - top), top being the largest exponent; gives their sum.
template <class Dot>
static inline float exponentials(float* s, int64_t count, float factor, float* top) {
  const int64_t end = (count + 15) / 16 * 16;
  for (int64_t page = count; page < end; page++) s[page] = NEGATIVE;
  vec high = load(s), total = zero();
  for (int64_t page = 16; page < end; page += 16) high = max_(high, load(s + page));
  *top = reduce_max(high) * factor;
  const vec scale = set1(factor), shift = set1(-*top);
  for (int64_t page = 0; page < end; page += 16) {
    const vec e = Dot::exp2(fma(load(s + page), scale, shift));
    total = add(total, e);
    store(s + page, e);
  }
  return reduce_add(total);
}

// Writes the list of what the energies of `count` pages say (by_bound: or null), as bits.
static int keep_pages(const zt_select_args* a, int64_t count, const float* by_mean, const float* by_bound, float mass, Step* steps,
                      uint64_t* bits, int64_t words) {
  const int64_t first_local = count > a->local_pages ? count - a->local_pages : 0;
  const Free free = {a->sink_pages < first_local ? a->sink_pages : first_local, first_local};
  const int kept = keep_forced(count, free, bits, words);
  if (!by_bound) return kept + keep_by_energy<false>(by_mean, count, free, mass, a->most_pages, steps, bits);
  const int64_t most = a->bound_pages < a->most_pages ? a->bound_pages : a->most_pages;
  const int added = keep_by_energy<false>(by_bound, count, free, 1.0f, most, steps, bits);
  return kept + added + keep_by_energy<true>(by_mean, count, free, mass, a->most_pages - added, steps, bits);
}

template <class S, class Dot>
static int select_blocks(const zt_select_args* a) {
  constexpr int ROWS = Dot::ROWS;
  const int head_dim = a->head_dim, group = a->q_heads / a->kv_heads;
  const int64_t blocks = (a->num_rows + ZT_PAGE - 1) / ZT_PAGE, first_block = a->first_position / ZT_PAGE;
  const int64_t num_pages = first_block + blocks, padded = (num_pages + 63) / 64 * 64, words = padded / 64;
  const int64_t full_pages = (a->first_position + a->num_rows) / ZT_PAGE;  // the others have no summary yet, and are nobody's past
  Packed packed = Packed::plan(a, padded, 16, 16 * Dot::STORED_BYTES);
  const int passes = packed.passes;
  const int rows = group * int(a->sample_rows), row_pad = (rows + ROWS - 1) / ROWS * ROWS;
  const int64_t q_bytes = Scratch<Dot>::pad(int64_t(row_pad) * head_dim * passes * sizeof(typename Dot::A));
  const int64_t scores_bytes = int64_t(ROWS) * padded * 4, edge_bytes = ROWS * 64 * 4;
  const int64_t energy_bytes = int64_t(group) * padded * 4 * passes, row_bytes = Scratch<Dot>::pad(row_pad * 4);
  const int64_t bytes = 3 * q_bytes + scores_bytes + edge_bytes + energy_bytes + row_bytes + NUM_STEPS * int64_t(sizeof(Step)) + 64;
  const int64_t own = packed.own_bytes(a->kv_heads);
  char* memory = (char*)__builtin_malloc(size_t(own) + size_t(bytes) * a->num_threads + 128);
  if (!memory) return ZT_NO_MEMORY;
  char* aligned = (char*)(((uintptr_t)memory + 63) / 64 * 64);
  packed.place(aligned, a->kv_heads);
#pragma omp parallel num_threads(a->num_threads)
  {
    packed.fill(a->kv_heads, [&](int pass, int64_t h, int64_t first, char* tile) { pack_tile<S, Dot>(a, pass, h, first, full_pages, tile); });
    char* at = aligned + own + bytes * omp_get_thread_num();
    at = (char*)(((uintptr_t)at + 63) / 64 * 64);
    typename Dot::A* q[3];
    for (int v = 0; v < 3; v++) q[v] = (typename Dot::A*)at, at += q_bytes;
    float* scores = (float*)at;
    float* edge = (float*)(at += scores_bytes);
    float* energy = (float*)(at += edge_bytes);
    float* factor = (float*)(at += energy_bytes);
    Step* steps = (Step*)(at += row_bytes);
    const typename Dot::Thread thread;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < blocks * a->kv_heads; item++) {
      const int64_t block = blocks - 1 - item / a->kv_heads, h = item % a->kv_heads;
      const int64_t count = first_block + block;  // pages that every row sees whole
      const int64_t in_block = a->num_rows - block * ZT_PAGE < ZT_PAGE ? a->num_rows - block * ZT_PAGE : ZT_PAGE;
      const int samples = int(in_block < a->sample_rows ? in_block : a->sample_rows), used = group * samples;
      const Spans spans = {a->span_pages, a->span_pages ? count / a->span_pages : 0};
      const int64_t end = (count + 15) / 16 * 16;
      for (int64_t i = 0; i < passes * group * padded; i++) energy[i] = 0;
      for (int pass = 0; pass < passes && count; pass++) {
        const int width = head_dim * (pass + 1);
        for (int r = 0; r < used; r++) {
          const int64_t head = h * group + r / samples, row = block * ZT_PAGE + in_block * (r % samples + 1) / samples - 1;
          factor[r] = a->scale * LOG2E * (a->logit_factor ? a->logit_factor[row] : 1.0f);
          for (int v = 0; v < 3; v++)
            if (a->q[v] && v <= spans.variant_of(0))
              load_query<S, Dot>(pass, (const typename Dot::Stored*)a->q[v] + row * a->q_row_stride + head * a->q_head_stride, head_dim,
                                 q[v] + int64_t(r) * width);
        }
        const int most_rows = strip_rows<Dot>(used);
        for (int row = 0; row < used; row += most_rows) {
          const int in_strip = used - row < most_rows ? used - row : most_rows;
          typename Dot::A* const strip[3] = {q[0] + int64_t(row) * width, q[1] + int64_t(row) * width, q[2] + int64_t(row) * width};
          score_pages(spans, in_strip, 0, count, edge, scores, padded, [&](int v, int64_t first, int vecs, float* to, int64_t stride) {
            multiply_tiles<Dot>(packed, pass, h, first, vecs, strip[v], in_strip, width, to, stride);
          });
          for (int r = 0; r < in_strip; r++) {
            float *s = scores + r * padded, top;
            const vec share = set1(1.0f / (exponentials<Dot>(s, count, factor[row + r], &top) * float(samples)));
            float* e = energy + (pass * group + (row + r) / samples) * padded;
            for (int64_t page = 0; page < end; page += 16) store(e + page, fma(load(s + page), share, load(e + page)));
          }
        }
      }
      const int lists = a->per_kv_head ? 1 : group;
      if (a->per_kv_head)
        for (int pass = 0; pass < passes; pass++)
          for (int i = 1; i < group; i++) {
            float* sum = energy + pass * group * padded;
            for (int64_t page = 0; page < end; page += 16) store(sum + page, add(load(sum + page), load(sum + i * padded + page)));
          }
      for (int i = 0; i < lists; i++) {
        const int64_t list = (h * lists + i) * blocks + block;
        const float *by_mean = energy + i * padded, *by_bound = passes > 1 ? by_mean + group * padded : nullptr;
        a->counts[list] = keep_pages(a, count, by_mean, by_bound, a->mass[h * lists + i], steps, a->bits + list * words, words);
        for (int pass = 0; pass < passes && a->energies; pass++) {
          const float* from = pass ? by_bound : by_mean;
          float* to = a->energies + (pass * int64_t(a->kv_heads) * lists * blocks + list) * num_pages;
          for (int64_t page = 0; page < num_pages; page++) to[page] = page < count ? from[page] : 0.0f;
        }
      }
    }
  }
  __builtin_free(memory);
  return ZT_OK;
}

}  // namespace
