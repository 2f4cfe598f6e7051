// Block-sparse flash attention, written once over the small vocabulary that each isa_*.cpp supplies:
//
//   vec                16 floats: zero set1 load store add sub mul fma max_ reduce_max reduce_add any_greater exp2_fast exp2_fine
//   Bf16Dot, F32Dot    how a product step is taken: A (type of a query or probability element in scratch), PAIR (elements per step),
//                      mac(acc, a, b) with b the 64 bytes of one step, load_a and store_p conversions; and ROWS, COLS, the register tile
//                      of the micro-kernel (rows x vecs, whose accumulators must fit the register file), or TILES: it has a unit that
//                      multiplies matrices, ROWS rows at a time, in tile_product; Thread is what a thread sets up for it
//
// Work item = (query head, query block of 64 rows); one thread computes one item in list order, so the result does not depend on scheduling or
// on the number of threads. decode.inl has the items of a single row. For a strip of Dot::ROWS rows and a batch of key pages:
//   S = Q K^T (micro-kernel)  ->  mask where the page crosses the diagonal or the window  ->  online softmax  ->  O += P V (micro-kernel)
// Scores stay in L1. The running maximum is lazy: accumulators are rescaled only when it grows by more than 8 (in powers of two), so P is at
// most 2^8 and the final division cancels the factor. The row sum adds P before it is rounded to bf16. Masked scores are a large finite
// negative: minus infinity would give NaN in a row whose first page is fully masked; the garbage such a row gathers is multiplied by zero
// as soon as it sees a real key, and a row that never does gives zeros.
#include "kernels.h"

namespace {

constexpr float NEGATIVE = -1e30f;
constexpr float LAZY = 8.0f;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr int BATCH = 2;        // key pages per softmax step: K and V of two pages fit L1 at head_dim 64
constexpr int KEYS = BATCH * ZT_PAGE;

// C[R][NV * 16] (+)= sum over pages and steps of A[R][page * steps + step] * B[page][step][NV * 16].
template <class Dot, int R, int NV, bool ACCUMULATE>
static inline __attribute__((always_inline)) void micro(const typename Dot::A* a, int64_t a_stride, int steps, const char* const* pages,
                                                        int num_pages, int64_t b_vec, int64_t b_step, float* c, int64_t c_stride) {
  vec acc[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[r][v] = ACCUMULATE ? load(c + r * c_stride + v * 16) : zero();
  for (int p = 0; p < num_pages; p++) {
    const char* b = pages[p];
    const typename Dot::A* ap = a + int64_t(p) * steps * Dot::PAIR;
#pragma GCC unroll 2
    for (int s = 0; s < steps; s++, b += b_step, ap += Dot::PAIR) {
      typename Dot::B bs[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) bs[v] = Dot::load_b(b + v * b_vec);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const typename Dot::Broadcast x = Dot::broadcast(ap + r * a_stride);
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) acc[r][v] = Dot::mac(acc[r][v], x, bs[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) store(c + r * c_stride + v * 16, acc[r][v]);
}

// The same for any number of vecs, in passes of at most Dot::COLS.
template <class Dot, int R, bool ACCUMULATE>
static void product_of_rows(const typename Dot::A* a, int64_t a_stride, int steps, const char* const* pages, int num_pages, int64_t b_vec,
                            int64_t b_step, int num_vecs, float* c, int64_t c_stride) {
  constexpr int COLS = Dot::COLS;
  int passes = (num_vecs + COLS - 1) / COLS, done = 0;
  for (int pass = 0; pass < passes; pass++) {
    const int width = (num_vecs - done + (passes - pass) - 1) / (passes - pass);  // even passes: 5 vecs as 3 + 2
    const char* at[BATCH];
    for (int p = 0; p < num_pages; p++) at[p] = pages[p] + done * b_vec;
    float* to = c + done * 16;
    switch (width) {
      case 1: micro<Dot, R, 1, ACCUMULATE>(a, a_stride, steps, at, num_pages, b_vec, b_step, to, c_stride); break;
      case 2: micro<Dot, R, (COLS >= 2 ? 2 : 1), ACCUMULATE>(a, a_stride, steps, at, num_pages, b_vec, b_step, to, c_stride); break;
      case 3: micro<Dot, R, (COLS >= 3 ? 3 : 1), ACCUMULATE>(a, a_stride, steps, at, num_pages, b_vec, b_step, to, c_stride); break;
      default: micro<Dot, R, (COLS >= 4 ? 4 : 1), ACCUMULATE>(a, a_stride, steps, at, num_pages, b_vec, b_step, to, c_stride);
    }
    done += width;
  }
}

// The same for any number of rows up to Dot::ROWS. Tiles always take Dot::ROWS: those beyond `rows` must be there, whatever they hold.
template <class Dot, bool ACCUMULATE, int R = Dot::ROWS>
static void product(int rows, const typename Dot::A* a, int64_t a_stride, int steps, const char* const* pages, int num_pages, int64_t b_vec,
                    int64_t b_step, int num_vecs, float* c, int64_t c_stride) {
  if constexpr (Dot::TILES)
    Dot::template tile_product<ACCUMULATE>(a, a_stride, steps, pages, num_pages, b_vec, b_step, num_vecs, c, c_stride);
  else if (R == 1 || rows == R)
    product_of_rows<Dot, R, ACCUMULATE>(a, a_stride, steps, pages, num_pages, b_vec, b_step, num_vecs, c, c_stride);
  else
    product<Dot, ACCUMULATE, (R > 1 ? R - 1 : 1)>(rows, a, a_stride, steps, pages, num_pages, b_vec, b_step, num_vecs, c, c_stride);
}

// Rows that a product should take at a time: seven as four and three, not six and one, because products of a single row wait for themselves. Tiles
// have their fixed size.
template <class Dot>
static inline int strip_rows(int rows) {
  const int strips = (rows + Dot::ROWS - 1) / Dot::ROWS;
  return Dot::TILES ? Dot::ROWS : (rows + strips - 1) / strips;
}

// Scratch of one thread; pointers into one allocation.
template <class Dot>
struct Scratch {
  typename Dot::A* q[3];  // [rows][head_dim]
  float* o;               // [rows][head_dim]
  float* sum;             // [rows][16]: per-lane sums of P
  float* top;             // [rows]: lazy running maximum of score * factor, in powers of two
  float* factor;          // [rows]: scale * log2(e) * logit_factor
  int64_t* position;      // [rows]
  float* s;               // [ROWS][KEYS]
  typename Dot::A* p;     // [ROWS][KEYS]
  typename Dot::Stored* unpacked;  // [BATCH] pages: of int8 pages only

  static constexpr int ROWS = Dot::ROWS;
  static int whole(int rows) { return Dot::TILES ? (rows + ROWS - 1) / ROWS * ROWS : rows; }

  static int64_t bytes(int rows, int head_dim, bool int8) {
    rows = whole(rows);
    const int64_t tile = int64_t(rows) * head_dim;
    return 3 * pad(tile * sizeof(typename Dot::A)) + pad(tile * 4) + pad(rows * 64) + 2 * pad(rows * 4) + pad(rows * 8) +
           pad(ROWS * KEYS * 4) + pad(ROWS * KEYS * sizeof(typename Dot::A)) +
           (int8 ? BATCH * 2 * int64_t(ZT_PAGE) * head_dim * Dot::STORED_BYTES : 0) + 64;
  }
  static int64_t pad(int64_t n) { return (n + 63) / 64 * 64; }
  void place(char* at, int rows, int head_dim) {
    rows = whole(rows);
    const int64_t tile = int64_t(rows) * head_dim;
    at = (char*)(((uintptr_t)at + 63) / 64 * 64);
    for (int v = 0; v < 3; v++) q[v] = (typename Dot::A*)at, at += pad(tile * sizeof(typename Dot::A));
    o = (float*)at, at += pad(tile * 4);
    sum = (float*)at, at += pad(rows * 64);
    top = (float*)at, at += pad(rows * 4);
    factor = (float*)at, at += pad(rows * 4);
    position = (int64_t*)at, at += pad(rows * 8);
    s = (float*)at, at += pad(ROWS * KEYS * 4);
    p = (typename Dot::A*)at, at += pad(ROWS * KEYS * sizeof(typename Dot::A));
    unpacked = (typename Dot::Stored*)at;
  }
};

// What one item works on. Row r: queries q[v] + r * q_stride (elements), position and factor in scratch.
template <class Dot>
struct Tile {
  const typename Dot::Stored* q[3];
  int64_t q_stride;
  int rows, head_dim;
  const char* pages;  // of this KV head
  const char* open;   // the page that is not full, where pages are int8
  int64_t open_page;
  bool int8;
  int64_t slot_stride;
  const int32_t* page_table;
  const int32_t* entries;
  int64_t num_entries;
  int64_t window;
};

template <class Dot>
static inline void mask_scores(float* s, int64_t page, int64_t position, int64_t window) {
  const int64_t first = page * ZT_PAGE;
  const int64_t end = position - first + 1;                    // keys [0, end) are not in the future
  const int64_t begin = window ? end - window : 0;             // and [begin, end) are inside the window
  for (int k = 0; k < ZT_PAGE; k++) s[k] = k < end && k >= begin ? s[k] : NEGATIVE;
}

// Online softmax of one row over num_keys scores: fills p as P has it, updates sum, top, o.
template <class Dot, class P = Dot>
static inline __attribute__((always_inline)) void softmax_row(const float* s, typename P::A* p, int num_keys, float factor, float* top,
                                                              float* sum, float* o, int head_dim) {
  vec high = load(s);
  for (int k = 16; k < num_keys; k += 16) high = max_(high, load(s + k));
  high = mul(high, set1(factor));
  if (any_greater(high, set1(*top + LAZY))) {
    const float now = reduce_max(high);
    const vec shrink = Dot::exp2(set1(*top - now));
    *top = now;
    store(sum, mul(load(sum), shrink));
    for (int d = 0; d < head_dim; d += 16) store(o + d, mul(load(o + d), shrink));
  }
  const vec scale = set1(factor), shift = set1(-*top);
  vec total = load(sum);
  for (int k = 0; k < num_keys; k += 32) {
    const vec a = Dot::exp2(fma(load(s + k), scale, shift));
    const vec b = Dot::exp2(fma(load(s + k + 16), scale, shift));
    total = add(total, add(a, b));
    P::store_p(p + k, a, b);
  }
  store(sum, total);
}

// Pages that are read next, fetched a few lines at a time: many at once would fill the buffers that memory is read through, and then the core waits
// for them.
struct Ahead {
  const char* const* pages;
  int count;
  int64_t page_bytes, lines;  // lines: at a time
  int page = 0;
  int64_t at = 0;

  // To be fetched in so many times.
  static Ahead plan(const char* const* pages, int count, int64_t page_bytes, int times) {
    return {pages, count, page_bytes, (count * page_bytes / 64 + times - 1) / times};
  }
  void fetch() {
    for (int64_t line = 0; line < lines && page < count; line++) {
      __builtin_prefetch(pages[page] + at, 0, 2);
      if ((at += 64) >= page_bytes) at = 0, page++;
    }
  }
};

// Calls ahead.fetch num_pages + rows times.
template <class Dot>
static void strip(const Tile<Dot>& t, Scratch<Dot>& w, int row, int rows, const char* const* k_pages, const int32_t* entry,
                  const bool* masked, int num_pages, Ahead& ahead) {
  const int head_dim = t.head_dim;
  for (int i = 0; i < num_pages; i++) {
    ahead.fetch();
    const typename Dot::A* q = w.q[entry[i] & 3] + int64_t(row) * head_dim;
    product<Dot, false>(rows, q, head_dim, head_dim / Dot::PAIR, k_pages + i, 1, int64_t(head_dim) * Dot::STORED_BYTES * 16, Dot::STEP_BYTES,
                           ZT_PAGE / 16, w.s + i * ZT_PAGE, KEYS);
    if (masked[i])
      for (int r = 0; r < rows; r++) mask_scores<Dot>(w.s + r * KEYS + i * ZT_PAGE, entry[i] >> 2, w.position[row + r], t.window);
  }
  for (int r = 0; r < rows; r++) {
    ahead.fetch();
    softmax_row<Dot>(w.s + r * KEYS, w.p + r * KEYS, num_pages * ZT_PAGE, w.factor[row + r], w.top + row + r, w.sum + (row + r) * 16,
                     w.o + int64_t(row + r) * head_dim, head_dim);
  }
  const char* v_pages[BATCH] = {};
  for (int i = 0; i < num_pages; i++) v_pages[i] = k_pages[i] + int64_t(ZT_PAGE) * head_dim * Dot::STORED_BYTES;
  product<Dot, true>(rows, w.p, KEYS, ZT_PAGE / Dot::PAIR, v_pages, num_pages, Dot::STEP_BYTES, int64_t(head_dim) * Dot::STEP_BYTES / 16,
                        head_dim / 16, w.o + int64_t(row) * head_dim, head_dim);
}

template <class Dot>
static void begin_tile(const Tile<Dot>& t, Scratch<Dot>& w) {
  for (int64_t i = 0; i < int64_t(t.rows) * t.head_dim; i += 16) store(w.o + i, zero());
  for (int r = 0; r < t.rows; r++) store(w.sum + r * 16, zero()), w.top[r] = NEGATIVE;
}

template <class Dot>
static inline bool is_masked(const Tile<Dot>& t, const Scratch<Dot>& w, int64_t page) {
  const int64_t first = page * ZT_PAGE;
  return first + ZT_PAGE - 1 > w.position[0] || (t.window && first <= w.position[t.rows - 1] - t.window);
}

// Runs a tile; leaves o (not yet divided), sum and top in scratch.
template <class Dot>
static void run_tile(const Tile<Dot>& t, Scratch<Dot>& w) {
  const int head_dim = t.head_dim;
  begin_tile<Dot>(t, w);
  bool loaded[3] = {false, false, false};
  const int64_t elements = 2 * int64_t(ZT_PAGE) * head_dim;
  const int64_t page_bytes = t.int8 ? int8_page_bytes(head_dim) : elements * Dot::STORED_BYTES;
  const int most_rows = strip_rows<Dot>(t.rows), strips = (t.rows + most_rows - 1) / most_rows;

  for (int64_t e = 0; e < t.num_entries; e += BATCH) {
    const int count = int(t.num_entries - e < BATCH ? t.num_entries - e : BATCH);
    const int num_next = int(t.num_entries - e - count < BATCH ? t.num_entries - e - count : BATCH);
    const char* k_pages[BATCH];
    const char* next[BATCH];
    bool masked[BATCH];
    for (int i = 0; i < count; i++) {
      const int32_t entry = t.entries[e + i];
      k_pages[i] = t.pages + int64_t(t.page_table[entry >> 2]) * t.slot_stride;
      if (t.int8 && (entry >> 2) == t.open_page) {
        k_pages[i] = t.open;
      } else if (t.int8) {
        typename Dot::Stored* to = w.unpacked + i * elements;
        unpack_page<Dot>(k_pages[i], head_dim, to);
        k_pages[i] = (const char*)to;
      }
      masked[i] = is_masked<Dot>(t, w, entry >> 2);
      const int variant = entry & 3;
      if (!loaded[variant]) {
        for (int r = 0; r < t.rows; r++) Dot::load_a(w.q[variant] + int64_t(r) * head_dim, t.q[variant] + r * t.q_stride, head_dim);
        loaded[variant] = true;
      }
    }
    for (int i = 0; i < num_next; i++) next[i] = t.pages + int64_t(t.page_table[t.entries[e + count + i] >> 2]) * t.slot_stride;
    Ahead ahead = Ahead::plan(next, num_next, page_bytes, strips * count + t.rows);
    for (int row = 0; row < t.rows; row += most_rows)
      strip<Dot>(t, w, row, t.rows - row < most_rows ? t.rows - row : most_rows, k_pages, t.entries + e, masked, count, ahead);
  }
}

template <class Dot>
static void finish_row(const float* o, const float* sum, float top, int head_dim, typename Dot::Stored* out, float* lse) {
  const float total = reduce_add(load(sum));
  const bool seen = top > 1e-10f * NEGATIVE && total > 0;  // a masked score times its factor is still far below
  const vec scale = set1(seen ? 1.0f / total : 0.0f);
  for (int d = 0; d < head_dim; d += 16) Dot::store_out(out + d, mul(load(o + d), scale));
  if (lse) *lse = seen ? (top + __builtin_log2f(total)) * LN2 : -__builtin_inff();
}

template <class Dot>
static Tile<Dot> tile_of(const zt_attend_args* a, int64_t kv_head) {
  Tile<Dot> t;
  t.head_dim = a->head_dim;
  t.pages = a->kv.pages + kv_head * a->kv.head_stride;
  t.slot_stride = a->kv.slot_stride;
  t.page_table = a->kv.page_table;
  t.int8 = a->kv.dtype == ZT_INT8;
  t.open = t.int8 ? a->kv.open + kv_head * a->kv.open_head_stride : nullptr;
  t.open_page = a->kv.open_page;
  t.window = a->window;
  return t;
}

template <class Dot>
static int attend_typed(const zt_attend_args* a) {
  const int64_t blocks = (a->num_rows + ZT_PAGE - 1) / ZT_PAGE, items = blocks * a->q_heads, group = a->q_heads / a->kv_heads;
  const int64_t bytes = Scratch<Dot>::bytes(ZT_PAGE, a->head_dim, a->kv.dtype == ZT_INT8);
  char* memory = (char*)__builtin_malloc(size_t(bytes) * a->num_threads);
  if (!memory) return ZT_NO_MEMORY;
#pragma omp parallel num_threads(a->num_threads)
  {
    Scratch<Dot> w;
    w.place(memory + bytes * omp_get_thread_num(), ZT_PAGE, a->head_dim);
    const typename Dot::Thread thread;
    // Most expensive first: with causal lists the last block. Heads innermost, so that neighbours in time share KV pages.
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; item++) {
      const int64_t block = blocks - 1 - item / a->q_heads, head = item % a->q_heads, row = block * ZT_PAGE;
      Tile<Dot> t = tile_of<Dot>(a, head / group);
      t.rows = int(a->num_rows - row < ZT_PAGE ? a->num_rows - row : ZT_PAGE);
      t.q_stride = a->q_row_stride;
      for (int v = 0; v < 3; v++)
        t.q[v] = a->q[v] ? (const typename Dot::Stored*)a->q[v] + row * a->q_row_stride + head * a->q_head_stride : nullptr;
      const int64_t* offset = a->list_offsets + head / a->heads_per_list * blocks + block;
      t.entries = a->list_entries + offset[0];
      t.num_entries = offset[1] - offset[0];
      for (int r = 0; r < t.rows; r++) {
        w.position[r] = a->first_position + row + r;
        w.factor[r] = a->scale * LOG2E * (a->logit_factor ? a->logit_factor[row + r] : 1.0f);
      }
      run_tile<Dot>(t, w);
      for (int r = 0; r < t.rows; r++)
        finish_row<Dot>(w.o + int64_t(r) * a->head_dim, w.sum + r * 16, w.top[r], a->head_dim,
                        (typename Dot::Stored*)a->out + (row + r) * a->out_row_stride + head * a->out_head_stride,
                        a->lse ? a->lse + head * a->num_rows + row + r : nullptr);
    }
  }
  __builtin_free(memory);
  return ZT_OK;
}

static int attend(const zt_attend_args* a) { return a->dtype == ZT_BF16 ? attend_typed<Bf16Dot>(a) : attend_typed<F32Dot>(a); }

}  // namespace
