// Integer vocabulary of linear_int8.inl in GCC's generic vectors, for targets without an instruction for it: right everywhere, fast nowhere.
#include <stdint.h>

namespace {

constexpr int QUAD_ROWS = 6, QUAD_COLS = 4, QUAD_OFFSET = 128;

typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));

static inline ivec izero() { return ivec{}; }
static inline ivec iset1(int32_t x) { return ivec{} + x; }
static inline ivec isub(ivec a, ivec b) { return a - b; }
// acc[o] += sum over i of w[4 * o + i] * x[i]: 16 outputs by 4 inputs, unsigned by signed.
struct quads {
  const void* at;
};
static inline quads load_quads(const uint8_t* p) { return {p}; }
typedef quads inputs4;
static inline inputs4 broadcast_quad(const int8_t* p) { return {p}; }
static inline ivec dot4(ivec acc, quads weights, inputs4 inputs) {
  const uint8_t* w = (const uint8_t*)weights.at;
  const int8_t* x = (const int8_t*)inputs.at;
  for (int o = 0; o < 16; o++) acc[o] += w[4 * o] * x[0] + w[4 * o + 1] * x[1] + w[4 * o + 2] * x[2] + w[4 * o + 3] * x[3];
  return acc;
}
static inline vec to_float(ivec v) {
  alignas(64) float lanes[16];
  for (int i = 0; i < 16; i++) lanes[i] = float(v[i]);
  return load(lanes);
}
static inline void store_i8(int8_t* p, vec v) {  // nearest, ties to even; |v| is at most 127
  alignas(64) float lanes[16];
  store(lanes, v);
  for (int i = 0; i < 16; i++) p[i] = int8_t(__builtin_rintf(lanes[i]));
}

}  // namespace
