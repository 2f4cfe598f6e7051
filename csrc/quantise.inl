// int8 pages: the layout of an ordinary page with one byte per element, then its scales.
//
//   K codes [64 * head_dim]   V codes [64 * head_dim]   K scales f32 [head_dim]   V scales f32 [64]
//
// Keys have one scale per channel and page, because a few channels of rotated keys are many times larger than the others and share a sign
// and size along a page; values have one scale per token. Codes are symmetric, -127 to 127, nearest. A page is quantised when it is full, from
// the bf16 (or f32) page in which it was collected, so a page filled in pieces has the codes of one filled at once.
//
// Attention unpacks a page into scratch that stays in cache and runs the same micro-kernels on it: about a tenth of the work of a tile of 64
// rows. Widened pages are never written to memory. A single token multiplies the codes instead, where the target can (decode.inl).
#include "kernels.h"

namespace {

static inline int64_t int8_page_bytes(int head_dim) { return int64_t(132) * head_dim + 4 * ZT_PAGE; }

// 32 codes times a scale. One instruction rounds two vectors to bf16 where there is one: unpacking is a sixth of a million-token prefill.
template <class Dot>
static inline void widen32(const int8_t* codes, vec scale, typename Dot::Stored* out) {
  const vec a = mul(load_i8(codes), scale), b = mul(load_i8(codes + 16), scale);
  if constexpr (__is_same(typename Dot::A, typename Dot::Stored)) {
    Dot::store_p(out, a, b);
  } else {
    Dot::store_out(out, a);
    Dot::store_out(out + 16, b);
  }
}

template <class Dot>
static void unpack_page(const char* page, int head_dim, typename Dot::Stored* out) {
  constexpr int pair = Dot::PAIR;
  const int8_t* codes = (const int8_t*)page;
  const float* k_scales = (const float*)(page + int64_t(2) * ZT_PAGE * head_dim);
  const float* v_scales = k_scales + head_dim;
  for (int group = 0; group < ZT_PAGE / 16; group++)
    for (int d = 0; d < head_dim; d += pair) {
      const int64_t at = int64_t(group) * 16 * head_dim + d * 16;
      if constexpr (pair == 2)
        widen32<Dot>(codes + at, set_pair(k_scales + d), out + at);
      else
        Dot::store_out(out + at, mul(load_i8(codes + at), set1(k_scales[d])));
    }
  for (int key = 0; key < ZT_PAGE; key += pair) {
    const int64_t at = int64_t(ZT_PAGE + key) * head_dim;
    if constexpr (pair == 2) {
      const vec scale = set_pair(v_scales + key);
      for (int j = 0; j < 2 * head_dim; j += 32) widen32<Dot>(codes + at + j, scale, out + at + j);
    } else {
      for (int j = 0; j < head_dim; j += 16) Dot::store_out(out + at + j, mul(load_i8(codes + at + j), set1(v_scales[key])));
    }
  }
}

// x of a page in its ordinary layout -> the int8 page.
template <class S, class Dot>
static void pack_page(const typename S::T* x, int head_dim, char* page) {
  constexpr int pair = Dot::PAIR;
  int8_t* codes = (int8_t*)page;
  float* k_scales = (float*)(page + int64_t(2) * ZT_PAGE * head_dim);
  float* v_scales = k_scales + head_dim;
  auto quantise = [&](float* scale, auto&& index, int count) {
    float most = 0;
    for (int i = 0; i < count; i++) {
      const float size = __builtin_fabsf(S::get1(x + index(i)));
      most = size > most ? size : most;
    }
    *scale = most / 127;
    const float inverse = most > 0 ? 127 / most : 0;
    for (int i = 0; i < count; i++) codes[index(i)] = int8_t(__builtin_rintf(S::get1(x + index(i)) * inverse));
  };
  for (int d = 0; d < head_dim; d++)
    quantise(k_scales + d, [=](int key) { return int64_t(key / 16) * 16 * head_dim + d / pair * pair * 16 + key % 16 * pair + d % pair; }, ZT_PAGE);
  for (int key = 0; key < ZT_PAGE; key++)
    quantise(v_scales + key, [=](int d) { return int64_t(ZT_PAGE + key / pair * pair) * head_dim + d * pair + key % pair; }, head_dim);
}

}  // namespace
