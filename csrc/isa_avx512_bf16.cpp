// AVX-512 with VDPBF16PS: two products per lane and instruction. The instruction rounds to nearest even, flushes denormals and sums its two
// products in sequence, whatever MXCSR says: results differ from the fp32 targets in the last bits.
#include "isa_avx512_vnni.h"

namespace {

struct Bf16Dot : Bf16Elements, InRegisters {
  typedef __m512bh B;
  typedef __m512bh Broadcast;
  static constexpr int ROWS = 6, COLS = 4;
  static inline B load_b(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline Broadcast broadcast(const A* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static inline vec mac(vec acc, Broadcast a, B b) { return _mm512_dpbf16_ps(acc, a, b); }
};

}  // namespace

#include "quantise.inl"
#include "decode.inl"
#include "elementwise.inl"
#include "select_token.inl"
#include "linear.inl"

extern "C" const zt_kernels zt_avx512_bf16_kernels = {"avx512_bf16", attend, decode, store_pages, norm, silu, select_pages, linear};
