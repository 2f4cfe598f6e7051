// AMX: a unit that multiplies tiles of 16 rows by 32 bf16 with tiles of 32 by 16 and adds up in fp32. Pages are in its layout already: 16 steps
// of 64 bytes are one tile of keys, or of values. All else is AVX-512. Sums are in another order than on the other targets: last bits differ.
//
// A thread configures its tiles before it multiplies and releases them after: the state is per thread, and libraries use it too.
#include "isa_avx512_vnni.h"

namespace {

constexpr int TILE_STEPS = 16;  // pairs of elements along a tile's row, and rows of a B tile

// Written out, because the compiler's intrinsics do not tell it that they read and write memory.
template <int TILE>
static inline __attribute__((always_inline)) void load_tile(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
static inline __attribute__((always_inline)) void store_tile(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
static inline __attribute__((always_inline)) void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
template <int C, int A, int B>
static inline __attribute__((always_inline)) void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// Tiles 0 to 3 add up four columns of 16; 4 is A and 5 is B; 6 and 7 are an A and a B of half the steps, for a head_dim that is no multiple of 32.
struct ConfiguredTiles : FlushDenormals {
  ConfiguredTiles() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    config.row_bytes[6] = 32, config.rows[7] = 8;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  ~ConfiguredTiles() { __asm__ volatile("tilerelease"); }
};

struct Bf16Dot : Bf16Elements {
  static constexpr bool TILES = true;
  static constexpr int ROWS = 16;
  typedef ConfiguredTiles Thread;

  // NV columns of 16 of C (+)= A B.
  template <int NV, bool ACCUMULATE>
  static inline void columns(const A* a, int64_t a_stride, int steps, const char* const* pages, int num_pages, int64_t b_vec, int64_t b_step,
                             float* c, int64_t c_stride) {
    const int64_t a_bytes = a_stride * 2, c_bytes = c_stride * 4;
    if (ACCUMULATE) {
      load_tile<0>(c, c_bytes);
      if constexpr (NV > 1) load_tile<1>(c + 16, c_bytes);
      if constexpr (NV > 2) load_tile<2>(c + 32, c_bytes);
      if constexpr (NV > 3) load_tile<3>(c + 48, c_bytes);
    } else {
      zero_tile<0>();
      if constexpr (NV > 1) zero_tile<1>();
      if constexpr (NV > 2) zero_tile<2>();
      if constexpr (NV > 3) zero_tile<3>();
    }
    for (int p = 0; p < num_pages; p++) {
      const A* ap = a + int64_t(p) * steps * PAIR;
      const char* b = pages[p];
      int step = 0;
      for (; step + TILE_STEPS <= steps; step += TILE_STEPS, ap += TILE_STEPS * PAIR, b += TILE_STEPS * b_step)
        tiles<NV, 4, 5>(ap, a_bytes, b, b_vec, b_step);
      if (step < steps) tiles<NV, 6, 7>(ap, a_bytes, b, b_vec, b_step);
    }
    store_tile<0>(c, c_bytes);
    if constexpr (NV > 1) store_tile<1>(c + 16, c_bytes);
    if constexpr (NV > 2) store_tile<2>(c + 32, c_bytes);
    if constexpr (NV > 3) store_tile<3>(c + 48, c_bytes);
  }

  template <int NV, int A_TILE, int B_TILE>
  static inline __attribute__((always_inline)) void tiles(const A* a, int64_t a_bytes, const char* b, int64_t b_vec, int64_t b_step) {
    load_tile<A_TILE>(a, a_bytes);
    load_tile<B_TILE>(b, b_step);
    multiply_tiles<0, A_TILE, B_TILE>();
    if constexpr (NV > 1) load_tile<B_TILE>(b + b_vec, b_step), multiply_tiles<1, A_TILE, B_TILE>();
    if constexpr (NV > 2) load_tile<B_TILE>(b + 2 * b_vec, b_step), multiply_tiles<2, A_TILE, B_TILE>();
    if constexpr (NV > 3) load_tile<B_TILE>(b + 3 * b_vec, b_step), multiply_tiles<3, A_TILE, B_TILE>();
  }

  // As `product` in attend.inl, for ROWS rows.
  template <bool ACCUMULATE>
  static void tile_product(const A* a, int64_t a_stride, int steps, const char* const* pages, int num_pages, int64_t b_vec, int64_t b_step,
                           int num_vecs, float* c, int64_t c_stride) {
    for (int done = 0; done < num_vecs; done += 4) {
      const char* at[8];
      for (int p = 0; p < num_pages; p++) at[p] = pages[p] + done * b_vec;
      float* to = c + done * 16;
      switch (num_vecs - done) {
        case 1: columns<1, ACCUMULATE>(a, a_stride, steps, at, num_pages, b_vec, b_step, to, c_stride); break;
        case 2: columns<2, ACCUMULATE>(a, a_stride, steps, at, num_pages, b_vec, b_step, to, c_stride); break;
        case 3: columns<3, ACCUMULATE>(a, a_stride, steps, at, num_pages, b_vec, b_step, to, c_stride); break;
        default: columns<4, ACCUMULATE>(a, a_stride, steps, at, num_pages, b_vec, b_step, to, c_stride);
      }
    }
  }
};

}  // namespace

#include "quantise.inl"
#include "decode.inl"
#include "elementwise.inl"
#include "select_token.inl"
#include "linear.inl"

extern "C" const zt_kernels zt_amx_kernels = {"amx", attend, decode, store_pages, norm, silu, select_pages, linear};
