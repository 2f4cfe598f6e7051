// What the targets with AVX512_BF16 and AVX512_VNNI share beside isa_avx512_common.h: conversions to bf16 and products of 8-bit integers.
#include "isa_avx512_common.h"

namespace {

static inline void store_bf16(uint16_t* p, vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

// Elements of the Bf16Dot of both: operands of a product are bf16 as they are stored.
struct Bf16Elements {
  typedef uint16_t A;
  typedef uint16_t Stored;
  static constexpr int PAIR = 2, STORED_BYTES = 2, STEP_BYTES = 64;
  static inline void load_a(A* to, const Stored* from, int n) { __builtin_memcpy(to, from, size_t(n) * 2); }
  static inline void store_p(A* to, vec a, vec b) { _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
  static inline void store_out(Stored* to, vec v) { store_bf16(to, v); }
  static inline vec exp2(vec x) { return exp2_fast(x); }
};

// Of decode.inl: two products of a 16-bit integer and a code per lane.
struct CodeDot : InRegisters {
  typedef int16_t A;
  typedef __m512i B;
  typedef __m512i Broadcast;
  static constexpr int PAIR = 2, STEP_BYTES = 32;
  static constexpr int ROWS = 8, COLS = 3;  // a group of seven or eight heads at once, so that codes are widened once
  static inline B load_b(const char* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
  static inline Broadcast broadcast(const A* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  static inline vec mac(vec acc, Broadcast a, B b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(b), "v"(a));  // not the intrinsic: as for dot4
    return acc;
  }
  static inline vec sums(const float* p) { return to_float(_mm512_castps_si512(load(p))); }
  static inline void store_a(A* to, vec v) {  // nearest, ties to even; |v| is at most 32767
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
  }
};
struct Bf16Dot;
template <>
struct CodesOf<Bf16Dot> {
  typedef CodeDot Type;
};

// Integer vocabulary of linear_int8.inl: VPDPBUSD adds four products of unsigned and signed bytes per lane.
constexpr int QUAD_ROWS = 6, QUAD_COLS = 4, QUAD_OFFSET = 128;  // 24 accumulators, 4 weights, 1 broadcast

typedef __m512i quads, inputs4;  // four bytes for each lane
static inline quads load_quads(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline inputs4 broadcast_quad(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return _mm512_set1_epi32(quad);
}
// Not the intrinsic: GCC 12 copies every accumulator before it, and then has too few registers for 24 of them.
static inline ivec dot4(ivec acc, quads w, inputs4 x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}

}  // namespace
