// AVX-512 without bf16 arithmetic: pages are bf16, products are fp32 FMAs on the even and odd halves of each pair.
#include "isa_avx512_common.h"

namespace {

static inline __m256i round_bf16(vec v) {  // nearest even
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16));
}
static inline void store_bf16(uint16_t* p, vec v) { _mm256_storeu_si256((__m256i*)p, round_bf16(v)); }

struct Bf16Dot : InRegisters {
  typedef float A;
  typedef uint16_t Stored;
  struct B {
    vec even, odd;
  };
  struct Broadcast {
    vec even, odd;
  };
  static constexpr int PAIR = 2, STORED_BYTES = 2, STEP_BYTES = 64;
  static constexpr int ROWS = 6, COLS = 2;  // 12 accumulators; an operand is two registers, its halves, and so is a broadcast
  static inline B load_b(const char* p) {
    const __m512i pairs = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000))))};
  }
  static inline Broadcast broadcast(const A* p) { return {_mm512_set1_ps(p[0]), _mm512_set1_ps(p[1])}; }
  static inline vec mac(vec acc, Broadcast a, B b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }
  static inline void load_a(A* to, const Stored* from, int n) {
    for (int i = 0; i < n; i += 16) store(to + i, load_bf16(from + i));
  }
  static inline void store_p(A* to, vec a, vec b) { store(to, a), store(to + 16, b); }
  static inline void store_out(Stored* to, vec v) { store_bf16(to, v); }
  static inline vec exp2(vec x) { return exp2_fast(x); }
};

// Integer vocabulary of linear_int8.inl. VPMADDUBSW adds two products in 16 bits, which hold them only where both factors are at most 127 in
// size: so |x|, unsigned, times w with x's sign.
constexpr int QUAD_ROWS = 5, QUAD_COLS = 4, QUAD_OFFSET = 0;  // 20 accumulators, 4 weights, 1 broadcast, ones, and room to work

typedef __m512i quads;  // four bytes for each lane
struct inputs4 {
  __m512i size;
  __mmask64 negative;
};
static inline quads load_quads(const uint8_t* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(int8_t(0x80))); }
static inline inputs4 broadcast_quad(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  const __m512i x = _mm512_set1_epi32(four);
  return {_mm512_abs_epi8(x), _mm512_movepi8_mask(x)};
}
static inline ivec dot4(ivec acc, quads w, inputs4 x) {
  const __m512i pairs = _mm512_maddubs_epi16(x.size, _mm512_mask_sub_epi8(w, x.negative, _mm512_setzero_si512(), w));
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

}  // namespace

#include "quantise.inl"
#include "decode.inl"
#include "elementwise.inl"
#include "select_token.inl"
#include "linear.inl"

extern "C" const zt_kernels zt_avx512_kernels = {"avx512", attend, decode, store_pages, norm, silu, select_pages, linear};
