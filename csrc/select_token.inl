// The pages that a token of an answer reads: select.inl's rule for one row, whose group of heads shares a list because a page is then read once for all of
// them. Energies of a group are added up.
//
// There is one row and up to a million tokens of summaries, so the work is cut by pages, not by rows: a part's scores become probabilities while they are
// in the nearest cache, by the part's own maximum, and are weighted when the maxima and sums of all parts are known. Parts are cut by the number of
// pages alone, never by that of threads: deterministic.
#include <type_traits>

#include "summary_codes.inl"

namespace {

constexpr int64_t PART_PAGES = 512;  // scores of seven rows: 14 KB

// Summaries in the dtype of queries, as a chunk's selection reads them.
template <class S, class Dot>
struct Tiles {
  typedef typename Dot::A Query;
  typedef Dot Product;  // whose rows go together
  static constexpr int64_t TILE_PAGES = 16, CHANNEL_BYTES = 16 * Dot::STORED_BYTES, EXTRA = 0;
  static int64_t scratch_bytes(int) { return 0; }
  static void pack(const zt_select_args* a, int pass, int64_t h, int64_t first, int64_t count, char* tile) {
    pack_tile<S, Dot>(a, pass, h, first, count, tile);
  }
  static void load(int pass, const typename Dot::Stored* from, int head_dim, Query* to) { load_query<S, Dot>(pass, from, head_dim, to); }
  static void multiply(const Packed& packed, int pass, int64_t h, int64_t first, int vecs, const Query* q, int rows, int width, char*, float* to,
                       int64_t stride) {
    multiply_tiles<Dot>(packed, pass, h, first, vecs, q, rows, width, to, stride);
  }
};

// Summaries as codes, multiplied as they are where the target can.
template <class S, class Dot>
struct Codes {
  typedef typename CodesOf<Dot>::Type CodeDot;
  static constexpr bool MULTIPLIED = !__is_same(CodeDot, void);
  typedef float Query;
  typedef std::conditional_t<MULTIPLIED, CodeDot, Dot> Product;
  static constexpr int64_t TILE_PAGES = CODE_TILE_PAGES, CHANNEL_BYTES = CODE_CHANNEL_BYTES, EXTRA = ROW_EXTRA;
  static int64_t scratch_bytes(int width) {
    return int64_t(width) * (Product::ROWS * sizeof(typename Product::A) + (MULTIPLIED ? 0 : 16 * Dot::STORED_BYTES));
  }
  static void pack(const zt_select_args* a, int pass, int64_t h, int64_t first, int64_t count, char* tile) {
    pack_codes(a, pass, h, first, count, tile);
  }
  static void load(int pass, const typename Dot::Stored* from, int head_dim, Query* to) {
    for (int d = 0; d < head_dim; d += 16) {
      const vec x = S::get(from + d), positive = max_(x, zero());
      store(to + d, pass ? positive : x);
      if (pass) store(to + head_dim + d, sub(x, positive));
    }
    const int width = head_dim * (pass + 1);
    to[width] = most_of(to, width);
  }
  static void multiply(const Packed& packed, int pass, int64_t h, int64_t first, int vecs, const Query* q, int rows, int width, char* scratch,
                       float* to, int64_t stride) {
    const char* tile = packed.tile(pass, h, first);
    if constexpr (MULTIPLIED)
      multiply_codes<CodeDot>(tile, vecs, q, rows, width, scratch, to, stride);
    else
      multiply_widened<S, Dot>(tile, vecs, q, rows, width, scratch, to, stride);
  }
};

template <class Summaries, class Dot>
static int select_token(const zt_select_args* a) {
  typedef typename Summaries::Query Query;
  typedef typename Summaries::Product Product;
  constexpr int ROWS = Product::ROWS;
  const int head_dim = a->head_dim, group = a->q_heads / a->kv_heads, kv_heads = a->kv_heads;
  const int row_pad = (group + ROWS - 1) / ROWS * ROWS, most_rows = strip_rows<Product>(group);
  const int64_t count = a->first_position / ZT_PAGE, num_pages = count + 1, padded = (num_pages + 63) / 64 * 64, words = padded / 64;
  const int64_t parts = (count + PART_PAGES - 1) / PART_PAGES, part_pad = (parts + 15) / 16 * 16;
  Packed packed = Packed::plan(a, padded, Summaries::TILE_PAGES, Summaries::CHANNEL_BYTES);
  // Most tokens fill no page.
  for (int pass = 0; pass < packed.passes; pass++)
    if (a->packed[pass] && a->valid_pages[pass] == count) packed.first_tile[pass] = packed.tiles;
  const int passes = packed.passes, sets = kv_heads * passes;  // a set: one KV head's rows in one pass
  const Spans spans = {a->span_pages, a->span_pages ? count / a->span_pages : 0};
  const float factor = a->scale * LOG2E * (a->logit_factor ? a->logit_factor[0] : 1.0f);
  // Of all threads: rows as they are multiplied, probabilities, and of each part the maximum, which becomes its weight, and the sum.
  const int64_t own = packed.own_bytes(kv_heads);
  const int64_t set_q = row_pad * (head_dim * 2 + Summaries::EXTRA), q_bytes = Scratch<Dot>::pad(sets * 3 * set_q * sizeof(Query));
  const int64_t set_p = row_pad * parts * PART_PAGES, p_bytes = sets * set_p * 4, part_bytes = sets * row_pad * part_pad * 4;
  const int64_t energy_bytes = sets * padded * 4;
  // Of each thread: an edge, the steps of keep_by_energy, and what summaries need.
  const int64_t edge_bytes = ROWS * 64 * 4, steps_bytes = NUM_STEPS * int64_t(sizeof(Step));
  const int64_t bytes = edge_bytes + steps_bytes + Scratch<Dot>::pad(Summaries::scratch_bytes(head_dim * passes));
  char* memory = (char*)__builtin_malloc(size_t(own + q_bytes + p_bytes + 2 * part_bytes + energy_bytes + bytes * a->num_threads + 64));
  if (!memory) return ZT_NO_MEMORY;
  char* at = (char*)(((uintptr_t)memory + 63) / 64 * 64);
  packed.place(at, kv_heads);
  Query* q = (Query*)(at += own);
  float* p = (float*)(at += q_bytes);
  float* tops = (float*)(at += p_bytes);
  float* sums = (float*)(at += part_bytes);
  float* energy = (float*)(at += part_bytes);
  at += energy_bytes;
  auto q_of = [&](int64_t set, int v) { return q + (set * 3 + v) * set_q; };
#pragma omp parallel num_threads(a->num_threads)
  {
    float* edge = (float*)(at + bytes * omp_get_thread_num());
    Step* steps = (Step*)((char*)edge + edge_bytes);
    char* scratch = (char*)steps + steps_bytes;
    const typename Dot::Thread thread;
#pragma omp for schedule(static) nowait
    for (int64_t item = 0; item < sets * group; item++) {
      const int64_t set = item / group, r = item % group, h = set / passes, pass = set % passes;
      for (int v = 0; v < 3; v++)
        if (a->q[v] && v <= spans.variant_of(0))
          Summaries::load(int(pass), (const typename Dot::Stored*)a->q[v] + (h * group + r) * a->q_head_stride, head_dim,
                          q_of(set, v) + r * (head_dim * (pass + 1) + Summaries::EXTRA));
    }
    packed.fill(kv_heads, [&](int pass, int64_t h, int64_t first, char* tile) { Summaries::pack(a, pass, h, first, count, tile); });
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < sets * parts; item++) {
      const int64_t set = item % sets, part = item / sets, first = part * PART_PAGES;
      const int64_t end = first + PART_PAGES < count ? first + PART_PAGES : count;
      const int pass = int(set % passes), width = head_dim * (pass + 1);
      float* scores = p + set * set_p + part * row_pad * PART_PAGES;
      for (int row = 0; row < group; row += most_rows) {
        const int rows = group - row < most_rows ? group - row : most_rows;
        score_pages(spans, rows, first, end, edge, scores + row * PART_PAGES, PART_PAGES,
                    [&](int v, int64_t page, int vecs, float* to, int64_t stride) {
                      if (row == 0 && page + 64 < end) packed.prefetch(pass, set / passes, page + 64, 64);
                      const Query* from = q_of(set, v) + row * (width + Summaries::EXTRA);
                      Summaries::multiply(packed, pass, set / passes, page, vecs, from, rows, width, scratch, to, stride);
                    });
      }
      for (int r = 0; r < group; r++) {
        const int64_t of_row = (set * row_pad + r) * part_pad + part;
        sums[of_row] = exponentials<Dot>(scores + r * PART_PAGES, end - first, factor, tops + of_row);
      }
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < sets * group; item++) {
      const int64_t of_row = (item / group * row_pad + item % group) * part_pad;
      float *top = tops + of_row, *sum = sums + of_row;
      for (int64_t part = parts; part < part_pad; part++) top[part] = NEGATIVE, sum[part] = 0;
      if (!parts) continue;
      vec high = load(top), total = zero();
      for (int64_t part = 16; part < part_pad; part += 16) high = max_(high, load(top + part));
      const vec shift = set1(-reduce_max(high));
      for (int64_t part = 0; part < part_pad; part += 16) {
        const vec weight = exp2_fine(add(load(top + part), shift));
        total = fma(weight, load(sum + part), total);
        store(top + part, weight);
      }
      const vec share = set1(1.0f / reduce_add(total));
      for (int64_t part = 0; part < part_pad; part += 16) store(top + part, mul(load(top + part), share));
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < sets * parts; item++) {
      const int64_t set = item / parts, part = item % parts, first = part * PART_PAGES;
      const int64_t end = first + PART_PAGES < count ? first + PART_PAGES : count;
      const float* from = p + set * set_p + part * row_pad * PART_PAGES;
      float* e = energy + set * padded + first;
      for (int64_t page = 0; page < end - first; page += 16) {
        vec sum = zero();
        for (int r = 0; r < group; r++) sum = fma(load(from + r * PART_PAGES + page), set1(tops[(set * row_pad + r) * part_pad + part]), sum);
        store(e + page, sum);
      }
    }
#pragma omp for schedule(static)
    for (int64_t h = 0; h < kv_heads; h++) {
      const float* by_mean = energy + h * passes * padded;
      a->counts[h] = keep_pages(a, count, by_mean, passes > 1 ? by_mean + padded : nullptr, a->mass[h], steps, a->bits + h * words, words);
      for (int pass = 0; pass < passes && a->energies; pass++) {
        float* to = a->energies + (pass * int64_t(kv_heads) + h) * num_pages;
        for (int64_t page = 0; page < num_pages; page++) to[page] = page < count ? by_mean[pass * padded + page] : 0.0f;
      }
    }
  }
  __builtin_free(memory);
  return ZT_OK;
}

template <class S, class Dot>
static int select_typed(const zt_select_args* a) {
  if (a->num_rows != 1 || !a->per_kv_head) return a->codes ? ZT_BAD_ARGUMENT : select_blocks<S, Dot>(a);
  if (!a->codes) return select_token<Tiles<S, Dot>, Dot>(a);
  if constexpr (Dot::PAIR == 2) return select_token<Codes<S, Dot>, Dot>(a);
  return ZT_BAD_ARGUMENT;
}

static int select_pages(const zt_select_args* a) {
  return a->dtype == ZT_BF16 ? select_typed<Bf16Store, Bf16Dot>(a) : select_typed<F32Store, F32Dot>(a);
}

}  // namespace
