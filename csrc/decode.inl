// One token: attention of one row per query head. Rows of a tile are here the query heads that share a KV head and a list, and a work item is a part
// of a list. Same micro-kernels as attend.inl.
//
// int8 pages are multiplied as the bytes they are, for a token reads a page once, and widening it for seven rows costs as much as reading it from
// memory. The scales of keys, one per channel, go into the query, and those of values, one per token, into the probabilities; either is then rounded to
// 16-bit integers, with one scale for each row and page that a bound on its products gives, and products are added in 32-bit integers: at most
// 256 * 32767 * 127, they fit. Rounding is finer than that of bf16, which the other way would round to.
#include "attend.inl"

namespace {

constexpr int SPLIT_PAGES = 32;  // least pages per part
constexpr int MOST_PARTS = 64;   // of one list

// Scratch of one thread that multiplies codes.
struct CodeScratch {
  float* q[3];      // [rows][head_dim]
  float* most[3];   // [rows]: the largest size in a row of q
  float* s;         // [rows][ZT_PAGE]
  float* p;         // [rows][ZT_PAGE]
  float* products;  // [rows][head_dim]: integers in the bits
  float* scale;     // [rows]
  int16_t* a;       // [rows][head_dim, or ZT_PAGE if that is more]: what is multiplied

  static int64_t wide(int head_dim) { return head_dim > ZT_PAGE ? head_dim : ZT_PAGE; }
  static int64_t bytes(int rows, int head_dim) {
    return rows * (4 * int64_t(head_dim) * 4 + 2 * ZT_PAGE * 4 + wide(head_dim) * 2) + 4 * Scratch<F32Dot>::pad(rows * 4) + 64;
  }
  void place(char* at, int rows, int head_dim) {
    const int64_t tile = rows * int64_t(head_dim) * 4;  // whole cache lines
    at = (char*)(((uintptr_t)at + 63) / 64 * 64);
    for (int v = 0; v < 3; v++) q[v] = (float*)at, at += tile;
    for (int v = 0; v < 3; v++) most[v] = (float*)at, at += Scratch<F32Dot>::pad(rows * 4);
    s = (float*)at, at += int64_t(rows) * ZT_PAGE * 4;
    products = (float*)at, at += tile;
    p = (float*)at, at += int64_t(rows) * ZT_PAGE * 4;
    scale = (float*)at, at += Scratch<F32Dot>::pad(rows * 4);
    a = (int16_t*)at;
  }
};

static inline float most_of(const float* x, int count) {
  vec most = zero();
  for (int i = 0; i < count; i += 16) most = max_(most, max_(load(x + i), sub(zero(), load(x + i))));
  return reduce_max(most);
}

// x[i] * scales[i] to 16-bit integers, no product being larger than `most`; gives what one of them stands for.
template <class Codes>
static inline float to_integers(const float* x, const float* scales, int count, float most, int16_t* out) {
  const vec inverse = set1(most > 0 ? 32767.0f / most : 0.0f);
  for (int i = 0; i < count; i += 16) Codes::store_a(out + i, mul(mul(load(x + i), load(scales + i)), inverse));
  return most * (1.0f / 32767.0f);
}

// One int8 page and all rows of a tile. `next`: the page after it, or null.
template <class Dot>
static void code_page(const Tile<Dot>& t, Scratch<Dot>& w, CodeScratch& c, const char* page, int32_t entry, bool masked, const char* next) {
  typedef typename CodesOf<Dot>::Type Codes;
  const int head_dim = t.head_dim, most_rows = strip_rows<Codes>(t.rows);
  const char* values = page + int64_t(ZT_PAGE) * head_dim;
  const float* k_scales = (const float*)(values + int64_t(ZT_PAGE) * head_dim);
  const float* v_scales = k_scales + head_dim;
  Ahead ahead = Ahead::plan(&next, next != nullptr, int8_page_bytes(head_dim), 3 * t.rows);
  // By bounds, which cost less than the largest product of each row: a few bits of fifteen.
  const float most_k = most_of(k_scales, head_dim), most_v = most_of(v_scales, ZT_PAGE);
  for (int row = 0; row < t.rows; row += most_rows) {
    const int rows = t.rows - row < most_rows ? t.rows - row : most_rows;
    for (int r = 0; r < rows; r++) {
      ahead.fetch();
      c.scale[r] = to_integers<Codes>(c.q[entry & 3] + int64_t(row + r) * head_dim, k_scales, head_dim, c.most[entry & 3][row + r] * most_k,
                                      c.a + int64_t(r) * head_dim);
    }
    product<Codes, false>(rows, c.a, head_dim, head_dim / Codes::PAIR, &page, 1, int64_t(head_dim) * 16, Codes::STEP_BYTES, ZT_PAGE / 16, c.s,
                          ZT_PAGE);
    for (int r = 0; r < rows; r++) {
      ahead.fetch();
      float* s = c.s + r * ZT_PAGE;
      float* p = c.p + int64_t(row + r) * ZT_PAGE;
      for (int k = 0; k < ZT_PAGE; k += 16) store(s + k, mul(Codes::sums(s + k), set1(c.scale[r])));
      if (masked) mask_scores<Dot>(s, entry >> 2, w.position[row + r], t.window);
      softmax_row<Dot, F32Dot>(s, p, ZT_PAGE, w.factor[row + r], w.top + row + r, w.sum + (row + r) * 16, w.o + int64_t(row + r) * head_dim,
                               head_dim);
    }
  }
  for (int row = 0; row < t.rows; row += most_rows) {
    const int rows = t.rows - row < most_rows ? t.rows - row : most_rows;
    for (int r = 0; r < rows; r++) {
      ahead.fetch();
      const float* p = c.p + int64_t(row + r) * ZT_PAGE;
      c.scale[r] = to_integers<Codes>(p, v_scales, ZT_PAGE, most_of(p, ZT_PAGE) * most_v, c.a + int64_t(r) * ZT_PAGE);
    }
    product<Codes, false>(rows, c.a, ZT_PAGE, ZT_PAGE / Codes::PAIR, &values, 1, Codes::STEP_BYTES, int64_t(head_dim) * Codes::PAIR,
                          head_dim / 16, c.products, head_dim);
    for (int r = 0; r < rows; r++) {
      float* o = w.o + int64_t(row + r) * head_dim;
      const vec scale = set1(c.scale[r]);
      for (int d = 0; d < head_dim; d += 16) store(o + d, fma(Codes::sums(c.products + int64_t(r) * head_dim + d), scale, load(o + d)));
    }
  }
}

// As run_tile, over int8 pages. The open page is of the call's dtype and goes the other way.
template <class Dot>
static void run_code_tile(const Tile<Dot>& t, Scratch<Dot>& w, CodeScratch& c) {
  const int head_dim = t.head_dim;
  begin_tile<Dot>(t, w);
  auto page_of = [&](int64_t e) { return t.pages + int64_t(t.page_table[t.entries[e] >> 2]) * t.slot_stride; };
  bool loaded[3] = {false, false, false};
  for (int64_t e = 0; e < t.num_entries; e++) {
    const int32_t entry = t.entries[e], variant = entry & 3;
    const bool masked = is_masked<Dot>(t, w, entry >> 2);
    if ((entry >> 2) == t.open_page) {
      for (int r = 0; r < t.rows; r++) Dot::load_a(w.q[variant] + int64_t(r) * head_dim, t.q[variant] + r * t.q_stride, head_dim);
      const int most_rows = strip_rows<Dot>(t.rows);
      Ahead none = {};
      for (int row = 0; row < t.rows; row += most_rows)
        strip<Dot>(t, w, row, t.rows - row < most_rows ? t.rows - row : most_rows, &t.open, &entry, &masked, 1, none);
      continue;
    }
    for (int r = 0; r < t.rows && !loaded[variant]; r++) {
      float* q = c.q[variant] + int64_t(r) * head_dim;
      for (int d = 0; d < head_dim; d += 16) store(q + d, load_bf16(t.q[variant] + r * t.q_stride + d));
      c.most[variant][r] = most_of(q, head_dim);
    }
    loaded[variant] = true;
    code_page<Dot>(t, w, c, page_of(e), entry, masked, e + 1 < t.num_entries ? page_of(e + 1) : nullptr);
  }
}

// A long list is cut into parts by its length alone (never by the number of threads), and parts are merged in order: deterministic.
template <class Dot>
static int decode_typed(const zt_attend_args* a) {
  const int64_t per_kv = a->q_heads / a->kv_heads;
  const int64_t group = a->heads_per_list < per_kv ? a->heads_per_list : per_kv;
  if (per_kv % group || a->heads_per_list % group) return ZT_BAD_ARGUMENT;
  const int64_t groups = a->q_heads / group;
  const int head_dim = a->head_dim;
  // Lists differ in length, and so does the number of their parts: of a short one, parts would cost more than they share.
  auto parts_of = [&](int64_t g) {
    const int64_t* offset = a->list_offsets + g * group / a->heads_per_list;
    const int64_t n = (offset[1] - offset[0] + SPLIT_PAGES - 1) / SPLIT_PAGES;
    return n < 1 ? int64_t(1) : n > MOST_PARTS ? int64_t(MOST_PARTS) : n;
  };
  auto parts_before = [&](int64_t g) {
    int64_t sum = 0;
    for (int64_t i = 0; i < g; i++) sum += parts_of(i);
    return sum;
  };
  const int64_t all_parts = parts_before(groups);
  // int8 pages are read as they are where the target multiplies codes, and widened like those of a prefill elsewhere.
  constexpr bool CODES = !__is_same(typename CodesOf<Dot>::Type, void);
  const bool codes = CODES && a->kv.dtype == ZT_INT8;
  const int64_t tile_bytes = Scratch<Dot>::bytes(int(group), head_dim, a->kv.dtype == ZT_INT8);
  const int64_t bytes = tile_bytes + (codes ? CodeScratch::bytes(int(group), head_dim) : 0);
  const int64_t state = group * (head_dim + 16 + 16);  // o, sum, top (padded) of one part
  char* memory = (char*)__builtin_malloc(size_t(bytes) * a->num_threads + size_t(all_parts * state) * 4 + 64);
  if (!memory) return ZT_NO_MEMORY;
  float* states = (float*)(((uintptr_t)(memory + bytes * a->num_threads) + 63) / 64 * 64);
#pragma omp parallel num_threads(a->num_threads)
  {
    Scratch<Dot> w;
    char* own = memory + bytes * omp_get_thread_num();
    w.place(own, int(group), head_dim);
    CodeScratch code_scratch;
    if (codes) code_scratch.place(own + tile_bytes, int(group), head_dim);
    const typename Dot::Thread thread;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < all_parts; item++) {
      int64_t g = 0, part = item;
      while (part >= parts_of(g)) part -= parts_of(g++);
      const int64_t parts = parts_of(g), head = g * group;
      const int64_t* offset = a->list_offsets + head / a->heads_per_list;
      const int64_t n = offset[1] - offset[0], begin = n * part / parts, end = n * (part + 1) / parts;
      Tile<Dot> t = tile_of<Dot>(a, head / per_kv);
      t.rows = int(group);
      t.q_stride = a->q_head_stride;
      for (int v = 0; v < 3; v++) t.q[v] = a->q[v] ? (const typename Dot::Stored*)a->q[v] + head * a->q_head_stride : nullptr;
      t.entries = a->list_entries + offset[0] + begin;
      t.num_entries = end - begin;
      for (int r = 0; r < t.rows; r++) {
        w.position[r] = a->first_position;
        w.factor[r] = a->scale * LOG2E * (a->logit_factor ? a->logit_factor[0] : 1.0f);
      }
      if constexpr (CODES)
        if (codes) run_code_tile<Dot>(t, w, code_scratch);
      if (!codes) run_tile<Dot>(t, w);
      float* to = states + item * state;
      for (int64_t r = 0; r < group; r++, to += head_dim + 32) {
        for (int d = 0; d < head_dim; d += 16) store(to + d, load(w.o + r * head_dim + d));
        store(to + head_dim, load(w.sum + r * 16));
        to[head_dim + 16] = w.top[r];
      }
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < a->q_heads; head++) {
      const int64_t g = head / group, parts = parts_of(g);
      float* first = states + parts_before(g) * state + head % group * (head_dim + 32);
      for (int64_t part = 1; part < parts; part++) {
        const float* from = first + part * state;
        const float top0 = first[head_dim + 16], top1 = from[head_dim + 16], top = top0 > top1 ? top0 : top1;
        const vec keep = exp2_fine(set1(top0 - top)), gain = exp2_fine(set1(top1 - top));
        for (int d = 0; d < head_dim + 16; d += 16) store(first + d, fma(load(from + d), gain, mul(load(first + d), keep)));
        first[head_dim + 16] = top;
      }
      finish_row<Dot>(first, first + head_dim, first[head_dim + 16], head_dim,
                      (typename Dot::Stored*)a->out + head * a->out_head_stride, a->lse ? a->lse + head : nullptr);
    }
  }
  __builtin_free(memory);
  return ZT_OK;
}

static int decode(const zt_attend_args* a) { return a->dtype == ZT_BF16 ? decode_typed<Bf16Dot>(a) : decode_typed<F32Dot>(a); }

}  // namespace
