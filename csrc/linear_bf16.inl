// Linear layers on bf16 weights for CPUs that cannot multiply bf16: y = x W^T + b with products and sums in f32.
//
//   weights      bf16 [panel of 16 outputs][inputs][16], the last panel padded
//   work item    (block of rows, panel): the block's rows, in f32, stay in L2 while the panels pass; a piece of a panel is widened once for all
//                strips of the block
//
// Weights kept in f32 would take twice the memory, and a token's time is the time to read them. Few rows read the weights as they are. An output
// is one sum over the inputs in their order, so a row's result depends on that row alone, to the bit.
#include "kernels.h"

namespace {

constexpr int WIDE_ROWS = 6;            // of the register tile: with two registers per vec 12 accumulators, 2 weights, 1 broadcast
constexpr int64_t WIDE_ROW_BLOCK = 96;  // a multiple of WIDE_ROWS
constexpr int64_t WIDE_INPUTS = 256;    // of a piece: 16 KiB of panel and 6 KiB of a strip are in L1

// total[R][16] += x W^T over `inputs` inputs. x [inputs][R]; w [inputs][16] of W.
template <int R, class W>
static __attribute__((noinline)) void wide_strip(const float* x, const typename W::T* w, int64_t inputs, float* total) {
  vec acc[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) acc[r] = load(total + r * 16);
  for (int64_t k = 0; k < inputs; k++, w += 16, x += R) {
    const vec ws = W::get(w);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[r] = fma(set1(x[r]), ws, acc[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) store(total + r * 16, acc[r]);
}

template <class W>
static void wide_rows(int rows, const float* x, const typename W::T* w, int64_t inputs, float* total) {
  static constexpr decltype(&wide_strip<1, W>) strips[] = {wide_strip<1, W>, wide_strip<2, W>, wide_strip<3, W>,
                                                           wide_strip<4, W>, wide_strip<5, W>, wide_strip<6, W>};
  static_assert(sizeof strips / sizeof *strips == WIDE_ROWS, "a strip has a function for every count of rows");
  strips[rows - 1](x, w, inputs, total);
}

template <class S>
static int linear_bf16(const zt_linear_args* a) {
  const int64_t rows = a->rows, inputs = a->inputs, panels = (a->outputs + 15) / 16;
  const int64_t strips = (rows + WIDE_ROWS - 1) / WIDE_ROWS, blocks = (rows + WIDE_ROW_BLOCK - 1) / WIDE_ROW_BLOCK;
  float* wide = (float*)__builtin_malloc(size_t(rows) * size_t(inputs) * sizeof(float));  // [strip][inputs][rows of the strip]
  if (!wide) return ZT_NO_MEMORY;
#pragma omp parallel num_threads(a->num_threads)
  {
#pragma omp for schedule(static)
    for (int64_t strip = 0; strip < strips; strip++) {
      const int64_t first = strip * WIDE_ROWS, count = rows - first < WIDE_ROWS ? rows - first : WIDE_ROWS;
      const typename S::T* x = (const typename S::T*)a->x + first * inputs;
      float* to = wide + first * inputs;
      for (int64_t k = 0; k < inputs; k++)
        for (int64_t r = 0; r < count; r++) *to++ = S::get1(x + r * inputs + k);
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < blocks * panels; item++) {
      alignas(64) float piece[WIDE_INPUTS * 16], total[WIDE_ROW_BLOCK * 16];
      const int64_t first = item / panels * WIDE_ROW_BLOCK, panel = item % panels;
      const int64_t count = rows - first < WIDE_ROW_BLOCK ? rows - first : WIDE_ROW_BLOCK;
      const uint16_t* weights = (const uint16_t*)a->weights + panel * inputs * 16;
      __builtin_memset(total, 0, size_t(count) * 16 * sizeof(float));
      for (int64_t k = 0; k < inputs; k += WIDE_INPUTS) {
        const int64_t size = inputs - k < WIDE_INPUTS ? inputs - k : WIDE_INPUTS;
        const bool many = count > WIDE_ROWS;
        for (int64_t i = 0; many && i < size; i++) store(piece + i * 16, load_bf16(weights + (k + i) * 16));
        for (int64_t row = 0; row < count; row += WIDE_ROWS) {
          const int strip = int(count - row < WIDE_ROWS ? count - row : WIDE_ROWS);
          const float* x = wide + (first + row) * inputs + k * strip;
          if (many)
            wide_rows<F32Store>(strip, x, piece, size, total + row * 16);
          else
            wide_rows<Bf16Store>(strip, x, weights + k * 16, size, total + row * 16);
        }
      }
      const vec bias = a->bias ? load(a->bias + panel * 16) : zero();
      for (int64_t r = 0; r < count; r++)
        put_some<S>((typename S::T*)a->out + (first + r) * a->outputs + panel * 16, add(load(total + r * 16), bias), a->outputs - panel * 16);
    }
  }
  __builtin_free(wide);
  return ZT_OK;
}

}  // namespace
