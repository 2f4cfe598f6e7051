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
// all heads of a group against the same means. A caller may keep what was packed: a token of an answer then packs one tile and not all of them.
// Work item = (KV head, query block); one thread does one item.
//
// In decode the block is one row, and the heads of a group share one list (per_kv_head), because a page is then read once for all of them.
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

// Adds the pages of largest energy until all that is set holds `mass` of the energy of pages [0, count), at most `most`; gives how many.
// AGAIN: some of the free pages are set already.
template <bool AGAIN>
static int keep_by_energy(const float* energy, int64_t count, Free free, float mass, int64_t most, Step* steps, uint64_t* bits) {
  auto open = [bits](int64_t page) { return !AGAIN || !(bits[page / 64] >> (page % 64) & 1); };
  const double all = sum_of(energy, count);
  double have = sum_of(energy, free.begin) + sum_of(energy + free.end, count - free.end);  // of what is set
  if (AGAIN)
    for (int64_t page = free.begin; page < free.end; page++)
      if (!open(page)) have += energy[page];
  double need = mass < 1 ? double(mass) * all - have : 1e30;  // all of the mass is all of the pages, whatever rounding says
  int64_t room = most;
  if (need <= 0 || room <= 0 || free.begin >= free.end) return 0;
  __builtin_memset(steps, 0, NUM_STEPS * sizeof(Step));
  for (int64_t page = free.begin; page < free.end; page++) {
    if (!open(page)) continue;
    Step& step = steps[step_of(energy[page])];
    step.mass += energy[page];
    step.pages++;
  }
  // The steps that are needed whole, and for which there is room; then one that is taken in part.
  int last_step = NUM_STEPS - 1, kept = 0;
  while (last_step > 0 && need - steps[last_step].mass > 0 && room >= steps[last_step].pages) {
    need -= steps[last_step].mass;
    room -= steps[last_step--].pages;
  }
  for (int64_t page = free.end - 1; page >= free.begin; page--) {
    const int step = step_of(energy[page]);
    if (step < last_step || !open(page)) continue;
    if (step == last_step) {
      if (need <= 0 || room <= 0) continue;
      room--, need -= energy[page];
    }
    set_page(bits, page), kept++;
  }
  return kept;
}

template <class S, class Dot>
static int select_typed(const zt_select_args* a) {
  constexpr int ROWS = Dot::ROWS;
  const int head_dim = a->head_dim, group = a->q_heads / a->kv_heads;
  const int64_t blocks = (a->num_rows + ZT_PAGE - 1) / ZT_PAGE, first_block = a->first_position / ZT_PAGE;
  const int64_t num_pages = first_block + blocks, padded = (num_pages + 63) / 64 * 64, words = padded / 64;
  const int passes = a->bound_pages ? 2 : 1;  // means, bounds
  const int64_t tiles = padded / 16;
  int64_t vec_bytes[2], first_tile[2], packed_head[2], own = 0;
  for (int pass = 0; pass < passes; pass++) {
    vec_bytes[pass] = int64_t(head_dim) * (pass + 1) * Dot::STORED_BYTES * 16;  // 16 pages
    first_tile[pass] = a->packed[pass] ? a->valid_tiles[pass] : 0;
    packed_head[pass] = (a->packed[pass] ? a->packed_tiles[pass] : tiles) * vec_bytes[pass];
    if (!a->packed[pass]) own += packed_head[pass] * a->kv_heads;
  }
  const int rows = group * int(a->sample_rows), row_pad = (rows + ROWS - 1) / ROWS * ROWS;
  const int64_t q_bytes = Scratch<Dot>::pad(int64_t(row_pad) * head_dim * passes * sizeof(typename Dot::A));
  const int64_t scores_bytes = int64_t(ROWS) * padded * 4, edge_bytes = ROWS * 64 * 4;
  const int64_t energy_bytes = int64_t(group) * padded * 4 * passes, row_bytes = Scratch<Dot>::pad(row_pad * 4);
  const int64_t bytes = 3 * q_bytes + scores_bytes + edge_bytes + energy_bytes + row_bytes + NUM_STEPS * int64_t(sizeof(Step)) + 64;
  char* memory = (char*)__builtin_malloc(size_t(own) + size_t(bytes) * a->num_threads + 128);
  if (!memory) return ZT_NO_MEMORY;
  char* aligned = (char*)(((uintptr_t)memory + 63) / 64 * 64);
  char* packed[2];
  char* rest = aligned;
  for (int pass = 0; pass < passes; pass++) {
    packed[pass] = a->packed[pass] ? (char*)a->packed[pass] : rest;
    if (!a->packed[pass]) rest += packed_head[pass] * a->kv_heads;
  }
#pragma omp parallel num_threads(a->num_threads)
  {
    for (int pass = 0; pass < passes; pass++) {
      const int64_t missing = tiles - first_tile[pass];
      const int width = head_dim * (pass + 1);
#pragma omp for schedule(static)
      for (int64_t item = 0; item < missing * a->kv_heads; item++) {
        alignas(64) typename S::T rounded[512];
        const int64_t h = item / missing, first = (first_tile[pass] + item % missing) * 16;
        typename S::T* to = (typename S::T*)(packed[pass] + h * packed_head[pass] + first / 16 * vec_bytes[pass]);
        if (first + 16 > num_pages - blocks) __builtin_memset(to, 0, size_t(vec_bytes[pass]));
        for (int64_t page = first; page < first + 16 && page < num_pages; page++) {
          if ((page + 1) * ZT_PAGE > a->first_position + a->num_rows) break;  // not full: it has no mean yet, and is nobody's past
          const float* from = a->summaries + int64_t(a->page_table[page]) * a->summary_slot_stride + h * 3 * head_dim + pass * head_dim;
          for (int d = 0; d < width; d += 16) S::put(rounded + d, load(from + d));
          typename S::T* k = to + page % 16 * Dot::PAIR;
          for (int d = 0; d < width; d += Dot::PAIR)
            for (int e = 0; e < Dot::PAIR; e++) k[int64_t(d) * 16 + e] = rounded[d + e];
        }
      }
    }
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
      const int64_t own_span = a->span_pages ? count / a->span_pages : 0;
      auto variant_of = [&](int64_t page) -> int {
        if (!a->span_pages) return 0;
        const int64_t distance = own_span - page / a->span_pages;
        return distance > 2 ? 2 : int(distance);
      };
      const int64_t end = (count + 15) / 16 * 16;
      for (int64_t i = 0; i < passes * group * padded; i++) energy[i] = 0;
      for (int pass = 0; pass < passes && count; pass++) {
        const int width = head_dim * (pass + 1);
        for (int r = 0; r < used; r++) {
          const int64_t head = h * group + r / samples, row = block * ZT_PAGE + in_block * (r % samples + 1) / samples - 1;
          factor[r] = a->scale * LOG2E * (a->logit_factor ? a->logit_factor[row] : 1.0f);
          for (int v = 0; v < 3; v++) {
            if (!a->q[v] || variant_of(0) < v) continue;
            const typename Dot::Stored* from = (const typename Dot::Stored*)a->q[v] + row * a->q_row_stride + head * a->q_head_stride;
            alignas(64) typename Dot::Stored halves[512];
            if (pass)
              for (int d = 0; d < head_dim; d++) {
                const float x = S::get1(from + d);
                halves[d] = x > 0 ? from[d] : typename Dot::Stored(0);
                halves[head_dim + d] = x > 0 ? typename Dot::Stored(0) : from[d];
              }
            Dot::load_a(q[v] + int64_t(r) * width, pass ? halves : from, width);
          }
        }
        const int most_rows = strip_rows<Dot>(used);
        for (int row = 0; row < used; row += most_rows) {
          const int in_strip = used - row < most_rows ? used - row : most_rows;
          for (int64_t first = 0; first < count; first += 64) {
            const char* tile = packed[pass] + h * packed_head[pass] + first / 16 * vec_bytes[pass];
            const int64_t last = (first + 64 < count ? first + 64 : count) - 1;
            const int vecs = int((last - first) / 16 + 1);
            for (int v = variant_of(first); v >= variant_of(last); v--) {
              const bool whole = variant_of(first) == variant_of(last);
              float* to = whole ? scores + first : edge;
              product<Dot, false>(in_strip, q[v] + int64_t(row) * width, width, width / Dot::PAIR, &tile, 1, vec_bytes[pass], Dot::STEP_BYTES,
                                        vecs, to, whole ? padded : 64);
              if (!whole)
                for (int64_t page = first; page <= last; page++)
                  if (variant_of(page) == v)
                    for (int r = 0; r < in_strip; r++) scores[r * padded + page] = edge[r * 64 + page - first];
            }
          }
          for (int r = 0; r < in_strip; r++) {
            float* s = scores + r * padded;
            for (int64_t page = count; page < end; page++) s[page] = NEGATIVE;
            vec high = load(s);
            for (int64_t page = 16; page < end; page += 16) high = max_(high, load(s + page));
            const vec scale = set1(factor[row + r]), shift = set1(-reduce_max(high) * factor[row + r]);
            vec total = zero();
            for (int64_t page = 0; page < end; page += 16) {
              const vec p = Dot::exp2(fma(load(s + page), scale, shift));
              total = add(total, p);
              store(s + page, p);
            }
            const vec share = set1(1.0f / (reduce_add(total) * float(samples)));
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
      const int64_t first_local = count > a->local_pages ? count - a->local_pages : 0;
      const Free free = {a->sink_pages < first_local ? a->sink_pages : first_local, first_local};
      for (int i = 0; i < lists; i++) {
        const int64_t list = (h * lists + i) * blocks + block;
        const float mass = a->mass[h * lists + i];
        const float *by_mean = energy + i * padded, *by_bound = by_mean + group * padded;
        uint64_t* bits = a->bits + list * words;
        int kept = keep_forced(count, free, bits, words);
        if (a->bound_pages) {
          const int64_t most = a->bound_pages < a->most_pages ? a->bound_pages : a->most_pages;
          const int added = keep_by_energy<false>(by_bound, count, free, 1.0f, most, steps, bits);
          kept += added + keep_by_energy<true>(by_mean, count, free, mass, a->most_pages - added, steps, bits);
        } else {
          kept += keep_by_energy<false>(by_mean, count, free, mass, a->most_pages, steps, bits);
        }
        a->counts[list] = kept;
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

static int select_pages(const zt_select_args* a) {
  return a->dtype == ZT_BF16 ? select_typed<Bf16Store, Bf16Dot>(a) : select_typed<F32Store, F32Dot>(a);
}

}  // namespace
