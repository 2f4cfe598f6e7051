// Linear layers on 8-bit integers: y = x W^T + b with both operands quantised and exact integer products.
//
//   weights      one scale per output, codes -127 to 127, stored plus 128 as bytes: [panel of 64 outputs][inputs / 4][64 outputs][4 inputs]
//   activations  one scale per row and group of inputs, codes -127 to 127, made here from x; groups are equal parts of the inputs
//
//   y[r][o] = weight_scale[o] * sum over groups g of x_scale[r][g] * (sum of (w + 128) * x  -  128 * sum of x) + bias[o]
//
// VNNI multiplies unsigned by signed bytes; it is the weights that are unsigned, because then a group of four activations can be broadcast from
// memory as the signed operand. A target that takes the 128 back has a QUAD_OFFSET of 0. A row's result depends on that row alone, to the bit:
// integers add up alike in any order. Groups keep a loud channel from costing the others their resolution. Work item = (panel, block of rows);
// the panel stays in cache.
//
// `fine` activations are two rows of codes: x, and what is left of x on a scale 254 times finer. Weights, which a few rows wait for, are read once for
// both.
//
// `rotate` multiplies every whole block of 64 inputs by the Hadamard matrix over 8, which is its own inverse, before it is quantised; so are the
// inputs of the weights, and the product is the same. A channel ten times as loud as its neighbours would take three of their eight bits; spread over
// a block it takes hardly any (QuaRot, arXiv 2404.00456).
#include "kernels.h"

namespace {

constexpr int PANEL = 64;          // outputs: four vecs
constexpr int ROTATED = 64;        // inputs that are rotated together
constexpr int64_t ROW_BLOCK = 192; // rows of a work item: many strips, and enough items for many threads

// total[R][64] += x_scale * (codes x weights), over one group of `steps` quadruples of inputs. A register tile is R rows by QUAD_COLS vecs.
template <int R>
static __attribute__((noinline)) void int8_strip(const int8_t* x, int64_t x_stride, const uint8_t* w, int64_t steps, const float* scale, const int32_t* sum,
                              int64_t per_row, float* total) {
  for (int column = 0; column < 4; column += QUAD_COLS) {
    ivec acc[R][QUAD_COLS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < QUAD_COLS; v++) acc[r][v] = izero();
    const uint8_t* from = w + column * 64;
    const int8_t* at = x;
    for (int64_t s = 0; s < steps; s++, from += 4 * PANEL, at += 4) {
      quads ws[QUAD_COLS];
#pragma GCC unroll 4
      for (int v = 0; v < QUAD_COLS; v++) ws[v] = load_quads(from + v * 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const inputs4 xs = broadcast_quad(at + r * x_stride);
#pragma GCC unroll 4
        for (int v = 0; v < QUAD_COLS; v++) acc[r][v] = dot4(acc[r][v], ws[v], xs);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vec by = set1(scale[r * per_row]);
      const ivec shift = iset1(QUAD_OFFSET * sum[r * per_row]);
#pragma GCC unroll 4
      for (int v = 0; v < QUAD_COLS; v++) {
        float* to = total + r * PANEL + (column + v) * 16;
        store(to, fma(to_float(isub(acc[r][v], shift)), by, load(to)));
      }
    }
  }
}

struct ButterflySigns {
  float of[16];
  constexpr ButterflySigns(int distance) : of{} {
    for (int lane = 0; lane < 16; lane++) of[lane] = lane & distance ? -1.0f : 1.0f;
  }
};

// Of two lanes that are DISTANCE apart the first gets the sum, the second the difference.
template <int DISTANCE>
static inline vec butterfly(vec v) {
  alignas(64) static constexpr ButterflySigns signs(DISTANCE);
  return fma(v, load(signs.of), swap_lanes<DISTANCE>(v));
}

// Whole blocks of x times the Hadamard matrix over 8; the rest as it is.
template <class S>
static void rotate_row(const typename S::T* x, int64_t inputs, float* out) {
  int64_t k = 0;
  for (; k + ROTATED <= inputs; k += ROTATED) {
    const vec a = S::get(x + k), b = S::get(x + k + 16), c = S::get(x + k + 32), d = S::get(x + k + 48);
    const vec sums[2] = {add(a, c), add(b, d)}, differences[2] = {sub(a, c), sub(b, d)};
    const vec parts[4] = {add(sums[0], sums[1]), sub(sums[0], sums[1]), add(differences[0], differences[1]), sub(differences[0], differences[1])};
    for (int part = 0; part < 4; part++)
      store(out + k + 16 * part, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(mul(parts[part], set1(0.125f)))))));
  }
  for (; k < inputs; k++) out[k] = S::get1(x + k);
}

// To codes, and with `fine` to two rows of them: `codes`, scale and sum are then those of the first row, the second's are after them.
template <class S>
static void quantise_row(const typename S::T* x, int64_t inputs, int64_t padded, int64_t groups, bool fine, int8_t* codes, float* scale,
                         int32_t* sum) {
  const int64_t size = padded / groups;
  alignas(64) float lanes[16];
  for (int64_t g = 0; g < groups; g++) {
    const int64_t begin = g * size, end = begin + size < inputs ? begin + size : inputs, whole = begin + (end - begin) / 16 * 16;
    float most = 0;
    vec high = zero();
    for (int64_t k = begin; k < whole; k += 16) {
      const vec value = S::get(x + k);
      high = max_(high, max_(value, sub(zero(), value)));
    }
    store(lanes, high);
    for (int i = 0; i < 16; i++) most = lanes[i] > most ? lanes[i] : most;
    for (int64_t k = whole; k < end; k++) {
      const float size1 = __builtin_fabsf(S::get1(x + k));
      most = size1 > most ? size1 : most;
    }
    const float inverse = most > 0 ? 127 / most : 0;
    for (int64_t k = begin; k < whole; k += 16) store_i8(codes + k, mul(S::get(x + k), set1(inverse)));
    for (int64_t k = whole; k < end; k++) codes[k] = int8_t(__builtin_rintf(S::get1(x + k) * inverse));
    for (int part = 0; part <= fine; part++) {
      int8_t* row = codes + part * padded;
      if (part) {  // half a step at most is left
        for (int64_t k = begin; k < whole; k += 16)
          store_i8(row + k, mul(sub(mul(S::get(x + k), set1(inverse)), load_i8(codes + k)), set1(254)));
        for (int64_t k = whole; k < end; k++) row[k] = int8_t(__builtin_rintf((S::get1(x + k) * inverse - codes[k]) * 254));
      }
      for (int64_t k = end; k < begin + size; k++) row[k] = 0;
      int32_t total = 0;
      for (int64_t k = begin; k < end; k++) total += row[k];
      scale[part * groups + g] = part ? most / (127 * 254.0f) : most / 127;
      sum[part * groups + g] = total;
    }
  }
}

template <class S, class Out>
static int linear_int8(const zt_linear_args* a) {
  const int64_t inputs = (a->inputs + 4 * a->groups - 1) / (4 * a->groups) * 4 * a->groups;
  const int parts = a->fine ? 2 : 1;
  const int64_t all = a->rows * parts;  // rows of codes
  const int64_t panels = (a->outputs + PANEL - 1) / PANEL, row_blocks = (all + ROW_BLOCK - 1) / ROW_BLOCK;
  const int64_t steps = inputs / a->groups / 4;
  decltype(&int8_strip<1>) const strips[] = {int8_strip<1>, int8_strip<2>, int8_strip<3>, int8_strip<4>, int8_strip<5>, int8_strip<6>};
  static_assert(QUAD_ROWS <= 6 && QUAD_ROWS > 1, "a strip has a function for every count of rows, and room for both parts of one");
  const int strip_rows = QUAD_ROWS / parts * parts;
  const int64_t rotated = a->rotate ? a->inputs : 0;  // floats of each thread
  int8_t* codes = (int8_t*)__builtin_malloc(size_t(all) * size_t(inputs + 8 * a->groups) + size_t(a->num_threads) * size_t(rotated) * 4);
  if (!codes) return ZT_NO_MEMORY;
  float* scale = (float*)(codes + all * inputs);
  int32_t* sum = (int32_t*)(scale + all * a->groups);
  float* rows = (float*)(sum + all * a->groups);
#pragma omp parallel num_threads(a->num_threads)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < a->rows; r++) {
      const typename S::T* x = (const typename S::T*)a->x + r * a->inputs;
      int8_t* to = codes + r * parts * inputs;
      float* by = scale + r * parts * a->groups;
      int32_t* shift = sum + r * parts * a->groups;
      if (rotated) {
        float* row = rows + omp_get_thread_num() * rotated;
        rotate_row<S>(x, a->inputs, row);
        quantise_row<F32Store>(row, a->inputs, inputs, a->groups, parts == 2, to, by, shift);
      } else {
        quantise_row<S>(x, a->inputs, inputs, a->groups, parts == 2, to, by, shift);
      }
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < panels * row_blocks; item++) {
      alignas(64) float total[QUAD_ROWS * PANEL];
      const int64_t panel = item / row_blocks, first = item % row_blocks * ROW_BLOCK;
      const int64_t last = first + ROW_BLOCK < all ? first + ROW_BLOCK : all;
      const uint8_t* weights = (const uint8_t*)a->weights + panel * PANEL * inputs;
      const int64_t width = a->outputs - panel * PANEL < PANEL ? a->outputs - panel * PANEL : PANEL;
      for (int64_t row = first; row < last; row += strip_rows) {
        const int count = int(last - row < strip_rows ? last - row : strip_rows);
        __builtin_memset(total, 0, sizeof total);
        for (int64_t g = 0; g < a->groups; g++) {
          const int8_t* x = codes + row * inputs + g * steps * 4;
          const uint8_t* w = weights + g * steps * 4 * PANEL;
          const float* by = scale + row * a->groups + g;
          const int32_t* shift = sum + row * a->groups + g;
          strips[count - 1](x, inputs, w, steps, by, shift, a->groups, total);
        }
        for (int r = 0; r < count; r += parts) {
          typename Out::T* to = (typename Out::T*)a->out + (row + r) / parts * a->outputs + panel * PANEL;
          const float *by = a->weight_scales + panel * PANEL, *bias = a->bias ? a->bias + panel * PANEL : nullptr;
          // Scales and biases are padded to whole panels; outputs are not.
          for (int64_t o = 0; o < width; o += 16) {
            const vec coarse = load(total + r * PANEL + o), sum = parts == 2 ? add(coarse, load(total + (r + 1) * PANEL + o)) : coarse;
            put_some<Out>(to + o, fma(sum, load(by + o), bias ? load(bias + o) : zero()), width - o);
          }
        }
      }
    }
  }
  __builtin_free(codes);
  return ZT_OK;
}

}  // namespace
