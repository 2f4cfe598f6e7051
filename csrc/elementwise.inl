// The row-wise work between the linear layers and attention: RMS norm with residual, gated SiLU, rotation, page packing. Same vocabulary as
// attend.inl. All arithmetic in fp32; `Store` reads and writes the activation type.
#include "kernels.h"

namespace {

struct Bf16Store {
  typedef uint16_t T;
  static vec get(const T* p) { return load_bf16(p); }
  static void put(T* p, vec v) { store_bf16(p, v); }
  static float get1(const T* p) {
    const uint32_t bits = uint32_t(*p) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  }
  static void put1(T* p, float f) {
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    *p = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

struct F32Store {
  typedef float T;
  static vec get(const T* p) { return load(p); }
  static void put(T* p, vec v) { store(p, v); }
  static float get1(const T* p) { return *p; }
  static void put1(T* p, float f) { *p = f; }
};

// The first min(count, 16) lanes of v.
template <class S>
static inline void put_some(typename S::T* to, vec v, int64_t count) {
  if (count >= 16) return S::put(to, v);
  typename S::T lanes[16];
  S::put(lanes, v);
  for (int64_t i = 0; i < count; i++) to[i] = lanes[i];
}

template <class S>
static void norm_typed(const zt_norm_args* a) {
  const int64_t width = a->width, whole = width / 16 * 16;
#pragma omp parallel for schedule(static) num_threads(a->num_threads) if (a->rows > 8)
  for (int64_t r = 0; r < a->rows; r++) {
    float* x = a->residual + r * width;
    const typename S::T* delta = a->delta ? (const typename S::T*)a->delta + r * width : nullptr;
    typename S::T* out = (typename S::T*)a->out + r * width;
    vec squares = zero();
    float tail = 0;
    for (int64_t i = 0; i < whole; i += 16) {
      vec v = load(x + i);
      if (delta) store(x + i, v = add(v, S::get(delta + i)));
      squares = fma(v, v, squares);
    }
    for (int64_t i = whole; i < width; i++) {
      if (delta) x[i] += S::get1(delta + i);
      tail += x[i] * x[i];
    }
    const float inverse = 1.0f / __builtin_sqrtf((reduce_add(squares) + tail) / float(width) + a->eps);
    for (int64_t i = 0; i < whole; i += 16) S::put(out + i, mul(mul(load(x + i), set1(inverse)), load(a->weight + i)));
    for (int64_t i = whole; i < width; i++) S::put1(out + i, x[i] * inverse * a->weight[i]);
  }
}

template <class S>
static void silu_typed(const zt_silu_args* a) {
  const int64_t width = a->width, whole = width / 16 * 16;
#pragma omp parallel for schedule(static) num_threads(a->num_threads) if (a->rows > 8)
  for (int64_t r = 0; r < a->rows; r++) {
    const typename S::T* gate = (const typename S::T*)a->gate_up + r * 2 * width;
    const typename S::T* up = gate + width;
    typename S::T* out = (typename S::T*)a->out + r * width;
    for (int64_t i = 0; i < whole; i += 16) {
      const vec g = S::get(gate + i);
      const vec sigmoid_inverse = add(set1(1.0f), exp2_fine(mul(g, set1(-LOG2E))));
      S::put(out + i, mul(div(g, sigmoid_inverse), S::get(up + i)));
    }
    for (int64_t i = whole; i < width; i++) {
      const float g = S::get1(gate + i);
      S::put1(out + i, g / (1.0f + __builtin_expf(-g)) * S::get1(up + i));
    }
  }
}

// x[head_dim] (fp32, in place): RMS norm with weight.
static inline void norm_head(float* x, const float* weight, float eps, int head_dim) {
  vec squares = zero();
  for (int d = 0; d < head_dim; d += 16) squares = fma(load(x + d), load(x + d), squares);
  const vec inverse = set1(1.0f / __builtin_sqrtf(reduce_add(squares) / float(head_dim) + eps));
  for (int d = 0; d < head_dim; d += 16) store(x + d, mul(mul(load(x + d), inverse), load(weight + d)));
}

// Half-split rotation (the Hugging Face convention): pairs are (d, d + head_dim / 2). head_dim / 2 is 32, 40, 48, 64 or 128: steps of 8.
static inline void rotate_head(const float* x, const float* cos, const float* sin, float* y, int head_dim) {
  const int half = head_dim / 2;
  for (int d = 0; d < half; d++) {
    y[d] = x[d] * cos[d] - x[d + half] * sin[d];
    y[d + half] = x[d + half] * cos[d] + x[d] * sin[d];
  }
}

// Mean, largest and smallest key of a full page, channel by channel, fp32 [3][head_dim], from what is stored: a page filled in pieces has the
// summary of one filled at once.
template <class S, class Dot>
static void page_summary(const typename S::T* k_page, int head_dim, float* summary) {
  constexpr int pair = Dot::PAIR;
  alignas(64) float sums[16], highs[16], lows[16];
  for (int d = 0; d < head_dim; d += pair) {  // lanes are 16 keys, or 8 keys by two dims
    vec sum = zero(), high = set1(-3e38f), low = set1(-3e38f);
    for (int group = 0; group < ZT_PAGE / 16; group++)
      for (int i = 0; i < pair; i++) {
        const vec keys = S::get(k_page + int64_t(group) * 16 * head_dim + d * 16 + i * 16);
        sum = add(sum, keys);
        high = max_(high, keys);
        low = max_(low, sub(zero(), keys));
      }
    store(sums, sum), store(highs, high), store(lows, low);
    for (int e = 0; e < pair; e++) {
      float total = 0, most = highs[e], least = lows[e];
      for (int i = e; i < 16; i += pair) {
        total += sums[i];
        most = most > highs[i] ? most : highs[i];
        least = least > lows[i] ? least : lows[i];
      }
      summary[d + e] = total / ZT_PAGE;
      summary[head_dim + d + e] = most;
      summary[2 * head_dim + d + e] = -least;
    }
  }
}

template <class S, class Dot>
static int store_typed(const zt_store_args* a) {
  const int head_dim = a->head_dim;
  const int64_t first_page = a->first_position / ZT_PAGE, last = a->first_position + a->num_rows;
  const int64_t num_pages = (last + ZT_PAGE - 1) / ZT_PAGE - first_page;
  const int64_t k_offset = int64_t(a->q_heads) * head_dim, v_offset = k_offset + int64_t(a->kv_heads) * head_dim;
  constexpr int pair = Dot::PAIR;
  // int8: a page is collected in scratch (one page per thread) and quantised when it is full. What it had before this call is in the open
  // page, which is copied first: another thread may write the next open page there.
  const bool int8 = a->kv.dtype == ZT_INT8;
  const int64_t elements = int64_t(2) * ZT_PAGE * head_dim;
  typename S::T* collected = nullptr;
  if (int8) {
    collected = (typename S::T*)__builtin_malloc(size_t(elements) * sizeof(typename S::T) * (a->kv_heads + a->num_threads));
    if (!collected) return ZT_NO_MEMORY;
    if (a->first_position % ZT_PAGE)
      for (int h = 0; h < a->kv_heads; h++)
        __builtin_memcpy(collected + h * elements, a->kv.open + h * a->kv.open_head_stride, size_t(elements) * sizeof(typename S::T));
  }
#pragma omp parallel num_threads(a->num_threads) if (a->num_rows > 8)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < a->num_rows; i++) {
      alignas(64) float x[256], y[256];
      const typename S::T* row = (const typename S::T*)a->qkv + i * a->qkv_row_stride;
      for (int h = 0; h < a->q_heads; h++) {
        for (int d = 0; d < head_dim; d += 16) store(x + d, S::get(row + int64_t(h) * head_dim + d));
        if (a->q_norm) norm_head(x, a->q_norm, a->norm_eps, head_dim);
        for (int v = 0; v < 3; v++) {
          if (!a->q_out[v]) continue;
          const float* from = x;
          if (a->cos[v]) {
            rotate_head(x, a->cos[v] + i * a->angle_row_stride[v], a->sin[v] + i * a->angle_row_stride[v], y, head_dim);
            from = y;
          }
          typename S::T* to = (typename S::T*)a->q_out[v] + i * a->q_row_stride + h * a->q_head_stride;
          for (int d = 0; d < head_dim; d += 16) S::put(to + d, load(from + d));
        }
      }
    }
    // One item writes one page of one head: its rows [begin, end) of this call. The first row of a page clears the page.
#pragma omp for schedule(static)
    for (int64_t item = 0; item < num_pages * a->kv_heads; item++) {
      alignas(64) float x[256], y[256];
      alignas(64) typename S::T rounded[256];
      const int64_t page = first_page + item / a->kv_heads, h = item % a->kv_heads;
      char* slot = a->kv.pages + int64_t(a->kv.page_table[page]) * a->kv.slot_stride + h * a->kv.head_stride;
      typename S::T* k_page = int8 ? collected + (a->kv_heads + omp_get_thread_num()) * elements : (typename S::T*)slot;
      typename S::T* v_page = k_page + int64_t(ZT_PAGE) * head_dim;
      int64_t begin = page * ZT_PAGE, end = begin + ZT_PAGE;
      if (begin < a->first_position) begin = a->first_position;
      if (end > last) end = last;
      if (begin % ZT_PAGE == 0 && end - begin < ZT_PAGE) __builtin_memset(k_page, 0, size_t(elements) * sizeof(*k_page));
      if (int8 && begin % ZT_PAGE) __builtin_memcpy(k_page, collected + h * elements, size_t(elements) * sizeof(*k_page));
      for (int64_t position = begin; position < end; position++) {
        const int64_t i = position - a->first_position, key = position % ZT_PAGE;
        const typename S::T* row = (const typename S::T*)a->qkv + i * a->qkv_row_stride;
        for (int d = 0; d < head_dim; d += 16) store(x + d, S::get(row + k_offset + h * head_dim + d));
        if (a->k_norm) norm_head(x, a->k_norm, a->norm_eps, head_dim);
        const float* from = x;
        if (a->cos[0]) {
          rotate_head(x, a->cos[0] + i * a->angle_row_stride[0], a->sin[0] + i * a->angle_row_stride[0], y, head_dim);
          from = y;
        }
        for (int d = 0; d < head_dim; d += 16) S::put(rounded + d, load(from + d));
        typename S::T* k = k_page + key / 16 * 16 * head_dim + key % 16 * pair;
        for (int d = 0; d < head_dim; d += pair)
          for (int e = 0; e < pair; e++) k[int64_t(d) * 16 + e] = rounded[d + e];
        const typename S::T* value = row + v_offset + h * head_dim;
        typename S::T* v = v_page + key / pair * pair * head_dim + key % pair;
        for (int d = 0; d < head_dim; d++) v[d * pair] = value[d];
      }
      if (int8 && end % ZT_PAGE) __builtin_memcpy(a->kv.open + h * a->kv.open_head_stride, k_page, size_t(elements) * sizeof(*k_page));
      if (int8 && end % ZT_PAGE == 0) pack_page<S, Dot>(k_page, head_dim, slot);
      if (a->summaries && end % ZT_PAGE == 0)
        page_summary<S, Dot>(k_page, head_dim, a->summaries + int64_t(a->kv.page_table[page]) * a->summary_slot_stride + h * 3 * head_dim);
    }
  }
  __builtin_free(collected);
  return ZT_OK;
}

static int norm(const zt_norm_args* a) {
  a->dtype == ZT_BF16 ? norm_typed<Bf16Store>(a) : norm_typed<F32Store>(a);
  return ZT_OK;
}
static int silu(const zt_silu_args* a) {
  a->dtype == ZT_BF16 ? silu_typed<Bf16Store>(a) : silu_typed<F32Store>(a);
  return ZT_OK;
}
static int store_pages(const zt_store_args* a) {
  return a->dtype == ZT_BF16 ? store_typed<Bf16Store, Bf16Dot>(a) : store_typed<F32Store, F32Dot>(a);
}

}  // namespace
