// The baseline target: GCC's generic vectors, which the compiler lowers to whatever the baseline CPU has. Any architecture.
#include <omp.h>
#include <stddef.h>
#include <stdint.h>

#include "dot.h"
#include "exp2_polynomials.h"

namespace {

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4)));
typedef uint16_t hvec __attribute__((vector_size(32), aligned(2)));

static inline vec set1(float x) { return vec{} + x; }
static inline vec zero() { return vec{}; }
static inline vec load(const float* p) { return *(const vec*)p; }
static inline void store(float* p, vec v) { *(vec*)p = v; }
static inline vec add(vec a, vec b) { return a + b; }
static inline vec sub(vec a, vec b) { return a - b; }
static inline vec mul(vec a, vec b) { return a * b; }
static inline vec div(vec a, vec b) { return a / b; }
static inline vec fma(vec a, vec b, vec c) { return a * b + c; }
static inline vec max_(vec a, vec b) { return a > b ? a : b; }
static inline float reduce_max(vec a) {
  float m = a[0];
  for (int i = 1; i < 16; i++) m = m > a[i] ? m : a[i];
  return m;
}
static inline float reduce_add(vec a) {
  float s = 0;
  for (int i = 0; i < 16; i++) s += a[i];
  return s;
}
template <int DISTANCE>
static inline vec swap_lanes(vec v) {  // lane i gets what lane i ^ DISTANCE has
  vec swapped;
  for (int i = 0; i < 16; i++) swapped[i] = v[i ^ DISTANCE];
  return swapped;
}
static inline bool any_greater(vec a, vec b) {
  const ivec greater = a > b;
  int32_t any = 0;
  for (int i = 0; i < 16; i++) any |= greater[i];
  return any != 0;
}

// 2^x by exponent arithmetic; arguments below -126 give 2^-126, which stands for zero.
static inline ivec split(vec x, vec* fraction) {
  x = max_(x, set1(-126.0f));
  x = x < set1(127.0f) ? x : set1(127.0f);
  ivec whole = __builtin_convertvector(x, ivec);                    // towards zero
  whole += __builtin_convertvector(whole, vec) > x;                 // comparison gives -1: floor
  *fraction = x - __builtin_convertvector(whole, vec);
  return whole;
}
static inline vec exp2_fast(vec x) {
  vec f;
  const ivec whole = split(x, &f);
  const vec p = ((f * EXP2_FAST_3 + EXP2_FAST_2) * f + EXP2_FAST_1) * f + EXP2_FAST_0;
  return (vec)((ivec)p + (whole << 23));
}
static inline vec exp2_fine(vec x) {
  vec f;
  const ivec whole = split(x, &f);
  vec p = (f * EXP2_FINE_6 + EXP2_FINE_5) * f + EXP2_FINE_4;
  p = ((p * f + EXP2_FINE_3) * f + EXP2_FINE_2) * f + EXP2_FINE_1;
  p = p * f + 1.0f;
  return (vec)((ivec)p + (whole << 23));
}

static inline vec load_bf16(const uint16_t* p) { return (vec)(__builtin_convertvector(*(const hvec*)p, uvec) << 16); }
static inline void store_bf16(uint16_t* p, vec v) {  // nearest even
  const uvec bits = (uvec)v;
  *(hvec*)p = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, hvec);
}

typedef int8_t bvec __attribute__((vector_size(16), aligned(1)));
static inline vec load_i8(const int8_t* p) { return __builtin_convertvector(*(const bvec*)p, vec); }
static inline vec set_pair(const float* p) {  // p[0], p[1], p[0], ...
  vec v;
  for (int i = 0; i < 16; i++) v[i] = p[i & 1];
  return v;
}

struct F32Dot : InRegisters {
  typedef float A;
  typedef float Stored;
  typedef vec B;
  typedef float Broadcast;
  static constexpr int PAIR = 1, STORED_BYTES = 4, STEP_BYTES = 64;
  static constexpr int ROWS = 2, COLS = 1;  // 2 x 16 floats are 8 of 16 four-lane registers
  static inline B load_b(const char* p) { return load((const float*)p); }
  static inline Broadcast broadcast(const A* p) { return *p; }
  static inline vec mac(vec acc, Broadcast a, B b) { return acc + b * a; }
  static inline void load_a(A* to, const Stored* from, int n) { __builtin_memcpy(to, from, size_t(n) * 4); }
  static inline void store_p(A* to, vec a, vec b) { store(to, a), store(to + 16, b); }
  static inline void store_out(Stored* to, vec v) { store(to, v); }
  static inline vec exp2(vec x) { return exp2_fine(x); }
};

struct Bf16Dot : InRegisters {
  typedef float A;
  typedef uint16_t Stored;
  struct B {
    vec even, odd;
  };
  struct Broadcast {
    float even, odd;
  };
  static constexpr int PAIR = 2, STORED_BYTES = 2, STEP_BYTES = 64;
  static constexpr int ROWS = 2, COLS = 1;
  static inline B load_b(const char* p) {
    const uvec pairs = *(const uvec*)p;
    return {(vec)(pairs << 16), (vec)(pairs & 0xffff0000u)};
  }
  static inline Broadcast broadcast(const A* p) { return {p[0], p[1]}; }
  static inline vec mac(vec acc, Broadcast a, B b) { return acc + b.even * a.even + b.odd * a.odd; }
  static inline void load_a(A* to, const Stored* from, int n) {
    for (int i = 0; i < n; i += 16) store(to + i, load_bf16(from + i));
  }
  static inline void store_p(A* to, vec a, vec b) { store(to, a), store(to + 16, b); }
  static inline void store_out(Stored* to, vec v) { store_bf16(to, v); }
  static inline vec exp2(vec x) { return exp2_fast(x); }
};

}  // namespace

#include "int8_generic.h"
#include "quantise.inl"
#include "decode.inl"
#include "elementwise.inl"
#include "select_token.inl"
#include "linear.inl"

extern "C" const zt_kernels zt_scalar_kernels = {"scalar", attend, decode, store_pages, norm, silu, select_pages, linear};
