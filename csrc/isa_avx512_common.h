// Vocabulary shared by the AVX-512 targets: everything but the bf16 product step. Included once by each; all names are in an anonymous
// namespace so that the linker keeps the copies apart.
#include <immintrin.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>

#include "dot.h"
#include "exp2_polynomials.h"

namespace {

typedef __m512 vec;
static inline vec zero() { return _mm512_setzero_ps(); }
static inline vec set1(float x) { return _mm512_set1_ps(x); }
static inline vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
static inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
static inline vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
static inline vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
static inline vec div(vec a, vec b) { return _mm512_div_ps(a, b); }
static inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline vec max_(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline float reduce_max(vec a) { return _mm512_reduce_max_ps(a); }
static inline float reduce_add(vec a) { return _mm512_reduce_add_ps(a); }
static inline bool any_greater(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
template <int DISTANCE>
static inline vec swap_lanes(vec v) {  // lane i gets what lane i ^ DISTANCE has
  if constexpr (DISTANCE == 1) return _mm512_permute_ps(v, 0xb1);
  if constexpr (DISTANCE == 2) return _mm512_permute_ps(v, 0x4e);
  if constexpr (DISTANCE == 4) return _mm512_shuffle_f32x4(v, v, 0xb1);
  return _mm512_shuffle_f32x4(v, v, 0x4e);
}

// Of linear_int8.inl, what does not depend on how four products are added.
typedef __m512i ivec;
static inline ivec izero() { return _mm512_setzero_si512(); }
static inline ivec iset1(int32_t x) { return _mm512_set1_epi32(x); }
static inline ivec isub(ivec a, ivec b) { return _mm512_sub_epi32(a, b); }
static inline vec to_float(ivec v) { return _mm512_cvtepi32_ps(v); }
static inline void store_i8(int8_t* p, vec v) {  // nearest, ties to even; |v| is at most 127
  _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}

// 2^x. VREDUCEPS leaves the fraction above floor(x), VSCALEFPS multiplies by 2^floor(x) and underflows cleanly, so no clamp is needed.
// Polynomials are near-minimax on [0, 1): relative error 1.1e-4 (far below bf16's 3.9e-3 step) and 2e-7.
static inline vec exp2_fast(vec x) {
  const vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  vec p = fma(f, set1(EXP2_FAST_3), set1(EXP2_FAST_2));
  p = fma(p, f, set1(EXP2_FAST_1));
  p = fma(p, f, set1(EXP2_FAST_0));
  return _mm512_scalef_ps(p, x);
}
static inline vec exp2_fine(vec x) {
  const vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  vec p = fma(f, set1(EXP2_FINE_6), set1(EXP2_FINE_5));
  p = fma(p, f, set1(EXP2_FINE_4));
  p = fma(p, f, set1(EXP2_FINE_3));
  p = fma(p, f, set1(EXP2_FINE_2));
  p = fma(p, f, set1(EXP2_FINE_1));
  p = fma(p, f, set1(1.0f));
  return _mm512_scalef_ps(p, x);
}

static inline vec load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

static inline vec load_i8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
static inline vec set_pair(const float* p) {  // p[0], p[1], p[0], ...
  double both;
  __builtin_memcpy(&both, p, 8);
  return _mm512_castpd_ps(_mm512_set1_pd(both));
}

struct F32Dot : InRegisters {
  typedef float A;
  typedef float Stored;
  typedef vec B;
  typedef vec Broadcast;
  static constexpr int PAIR = 1, STORED_BYTES = 4, STEP_BYTES = 64;
  static constexpr int ROWS = 6, COLS = 4;  // 24 accumulators + 4 operands + 1 broadcast of 32 registers
  static inline B load_b(const char* p) { return _mm512_loadu_ps(p); }
  static inline Broadcast broadcast(const A* p) { return _mm512_set1_ps(*p); }
  static inline vec mac(vec acc, Broadcast a, B b) { return fma(a, b, acc); }
  static inline void load_a(A* to, const Stored* from, int n) {
    for (int i = 0; i < n; i += 16) store(to + i, load(from + i));
  }
  static inline void store_p(A* to, vec a, vec b) { store(to, a), store(to + 16, b); }
  static inline void store_out(Stored* to, vec v) { store(to, v); }
  static inline vec exp2(vec x) { return exp2_fine(x); }
};

}  // namespace
