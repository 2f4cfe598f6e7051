// AVX-512 with VDPBF16PS: two products per lane and instruction. The instruction rounds to nearest even, flushes denormals and sums its two
// products in sequence, whatever MXCSR says: results differ from the fp32 targets in the last bits.
#include "exp2_polynomials.h"
#include "isa_avx512_common.h"

namespace {

static inline void store_bf16(uint16_t* p, vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

struct Bf16Dot {
  typedef uint16_t A;
  typedef uint16_t Stored;
  typedef __m512bh B;
  typedef __m512bh Broadcast;
  static constexpr int PAIR = 2, STORED_BYTES = 2, STEP_BYTES = 64;
  static inline B load_b(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline Broadcast broadcast(const A* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static inline vec mac(vec acc, Broadcast a, B b) { return _mm512_dpbf16_ps(acc, a, b); }
  static inline void load_a(A* to, const Stored* from, int n) { __builtin_memcpy(to, from, size_t(n) * 2); }
  static inline void store_p(A* to, vec a, vec b) { _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
  static inline void store_out(Stored* to, vec v) { store_bf16(to, v); }
  static inline vec exp2(vec x) { return exp2_fast(x); }
};

}  // namespace

#include "quantise.inl"
#include "attend.inl"
#include "elementwise.inl"
#include "select.inl"

extern "C" const zt_kernels zt_avx512_bf16_kernels = {"avx512_bf16", attend, decode, store_pages, norm, silu, select_pages};
