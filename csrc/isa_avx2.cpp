// AVX2 with FMA: a vec is two 8-lane registers; bf16 pages are widened on the fly.
#include <immintrin.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>

#include "dot.h"
#include "exp2_polynomials.h"

namespace {

struct vec {
  __m256 lo, hi;
};
static inline vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, vec v) { _mm256_storeu_ps(p, v.lo), _mm256_storeu_ps(p + 8, v.hi); }
static inline vec add(vec a, vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
static inline vec sub(vec a, vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
static inline vec mul(vec a, vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
static inline vec div(vec a, vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
static inline vec fma(vec a, vec b, vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
static inline vec max_(vec a, vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
static inline float reduce_max(vec a) {
  __m256 m = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
static inline float reduce_add(vec a) {
  __m256 m = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
template <int DISTANCE>
static inline vec swap_lanes(vec v) {  // lane i gets what lane i ^ DISTANCE has
  if constexpr (DISTANCE == 1) return {_mm256_permute_ps(v.lo, 0xb1), _mm256_permute_ps(v.hi, 0xb1)};
  if constexpr (DISTANCE == 2) return {_mm256_permute_ps(v.lo, 0x4e), _mm256_permute_ps(v.hi, 0x4e)};
  if constexpr (DISTANCE == 4) return {_mm256_permute2f128_ps(v.lo, v.lo, 1), _mm256_permute2f128_ps(v.hi, v.hi, 1)};
  return {v.hi, v.lo};
}
static inline bool any_greater(vec a, vec b) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))) != 0;
}

// 2^x by exponent arithmetic; arguments below -126 give 2^-126, which stands for zero.
static inline __m256 scale_by_power(__m256 p, __m256 floor) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(floor), 23)));
}
static inline vec split(vec x, vec* fraction) {
  x = {_mm256_min_ps(_mm256_max_ps(x.lo, _mm256_set1_ps(-126.0f)), _mm256_set1_ps(127.0f)),
       _mm256_min_ps(_mm256_max_ps(x.hi, _mm256_set1_ps(-126.0f)), _mm256_set1_ps(127.0f))};
  const vec floor = {_mm256_floor_ps(x.lo), _mm256_floor_ps(x.hi)};
  *fraction = sub(x, floor);
  return floor;
}
static inline vec exp2_fast(vec x) {
  vec f;
  const vec floor = split(x, &f);
  vec p = fma(f, set1(EXP2_FAST_3), set1(EXP2_FAST_2));
  p = fma(p, f, set1(EXP2_FAST_1));
  p = fma(p, f, set1(EXP2_FAST_0));
  return {scale_by_power(p.lo, floor.lo), scale_by_power(p.hi, floor.hi)};
}
static inline vec exp2_fine(vec x) {
  vec f;
  const vec floor = split(x, &f);
  vec p = fma(f, set1(EXP2_FINE_6), set1(EXP2_FINE_5));
  p = fma(p, f, set1(EXP2_FINE_4));
  p = fma(p, f, set1(EXP2_FINE_3));
  p = fma(p, f, set1(EXP2_FINE_2));
  p = fma(p, f, set1(EXP2_FINE_1));
  p = fma(p, f, set1(1.0f));
  return {scale_by_power(p.lo, floor.lo), scale_by_power(p.hi, floor.hi)};
}

static inline __m256 widen(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline vec load_bf16(const uint16_t* p) { return {widen(p), widen(p + 8)}; }
static inline __m256i round_bf16(__m256 v) {  // nearest even, in the low half of each lane
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
static inline void store_bf16(uint16_t* p, vec v) {
  const __m256i packed = _mm256_packus_epi32(round_bf16(v.lo), round_bf16(v.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}

struct F32Dot : InRegisters {
  typedef float A;
  typedef float Stored;
  typedef vec B;
  typedef vec Broadcast;
  static constexpr int PAIR = 1, STORED_BYTES = 4, STEP_BYTES = 64;
  static constexpr int ROWS = 5, COLS = 1;  // 10 accumulators + operands of 16 registers
  static inline B load_b(const char* p) { return load((const float*)p); }
  static inline Broadcast broadcast(const A* p) { return set1(*p); }
  static inline vec mac(vec acc, Broadcast a, B b) { return fma(a, b, acc); }
  static inline void load_a(A* to, const Stored* from, int n) {
    for (int i = 0; i < n; i += 16) store(to + i, load(from + i));
  }
  static inline void store_p(A* to, vec a, vec b) { store(to, a), store(to + 16, b); }
  static inline void store_out(Stored* to, vec v) { store(to, v); }
  static inline vec exp2(vec x) { return exp2_fine(x); }
};

static inline vec load_i8(const int8_t* p) {
  const __m128i codes = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
}
static inline vec set_pair(const float* p) {  // p[0], p[1], p[0], ...
  double both;
  __builtin_memcpy(&both, p, 8);
  const __m256 half = _mm256_castpd_ps(_mm256_set1_pd(both));
  return {half, half};
}

struct Bf16Dot : InRegisters {
  typedef float A;
  typedef uint16_t Stored;
  struct B {
    vec even, odd;
  };
  struct Broadcast {
    __m256 even, odd;
  };
  static constexpr int PAIR = 2, STORED_BYTES = 2, STEP_BYTES = 64;
  static constexpr int ROWS = 5, COLS = 1;
  static inline B load_b(const char* p) {
    const __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)(p + 32));
    const __m256i high = _mm256_set1_epi32(int32_t(0xffff0000));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))}};
  }
  static inline Broadcast broadcast(const A* p) { return {_mm256_set1_ps(p[0]), _mm256_set1_ps(p[1])}; }
  static inline vec mac(vec acc, Broadcast a, B b) {
    return {_mm256_fmadd_ps(a.odd, b.odd.lo, _mm256_fmadd_ps(a.even, b.even.lo, acc.lo)),
            _mm256_fmadd_ps(a.odd, b.odd.hi, _mm256_fmadd_ps(a.even, b.even.hi, acc.hi))};
  }
  static inline void load_a(A* to, const Stored* from, int n) {
    for (int i = 0; i < n; i += 16) store(to + i, load_bf16(from + i));
  }
  static inline void store_p(A* to, vec a, vec b) { store(to, a), store(to + 16, b); }
  static inline void store_out(Stored* to, vec v) { store_bf16(to, v); }
  static inline vec exp2(vec x) { return exp2_fast(x); }
};

// Integer vocabulary of linear_int8.inl. VPMADDUBSW adds two products in 16 bits, which hold them only where both factors are at most 127 in
// size: so |w|, unsigned, times x with w's sign.
constexpr int QUAD_ROWS = 4, QUAD_COLS = 1, QUAD_OFFSET = 0;  // 8 accumulators, 4 weights, 1 broadcast, ones and two to work with

struct ivec {
  __m256i lo, hi;
};
struct quads {  // four bytes for each lane
  __m256i lo, hi, lo_size, hi_size;
};
typedef __m256i inputs4;
static inline ivec izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline ivec iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline ivec isub(ivec a, ivec b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
static inline quads load_quads(const uint8_t* p) {
  const __m256i centre = _mm256_set1_epi8(int8_t(0x80));
  const __m256i lo = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), centre);
  const __m256i hi = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(p + 32)), centre);
  return {lo, hi, _mm256_abs_epi8(lo), _mm256_abs_epi8(hi)};
}
static inline inputs4 broadcast_quad(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
static inline __m256i dot4_half(__m256i acc, __m256i w, __m256i size, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline ivec dot4(ivec acc, quads w, inputs4 x) {
  return {dot4_half(acc.lo, w.lo, w.lo_size, x), dot4_half(acc.hi, w.hi, w.hi_size, x)};
}
static inline vec to_float(ivec v) { return {_mm256_cvtepi32_ps(v.lo), _mm256_cvtepi32_ps(v.hi)}; }
static inline void store_i8(int8_t* p, vec v) {  // nearest, ties to even; |v| is at most 127
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

}  // namespace

#include "quantise.inl"
#include "decode.inl"
#include "elementwise.inl"
#include "select_token.inl"
#include "linear.inl"

extern "C" const zt_kernels zt_avx2_kernels = {"avx2", attend, decode, store_pages, norm, silu, select_pages, linear};
