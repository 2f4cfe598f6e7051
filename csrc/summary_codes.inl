// Summaries of pages as a token of an answer reads them: 8-bit codes, which are half as many bytes as bf16, and reading them is most of what scoring a
// million tokens costs. A tile is 64 pages of one KV head in one pass:
//
//   codes [4][width / 2][16][2]   middle f32 [width]   step f32 [width]          width: head_dim, or twice that for bounds
//
// Channel d of page J is middle[d] + step[d] * code[J][d]; the middle is that of the tile's pages, because channels of keys lie far from zero, all
// on one side, and what tells pages apart is small beside that. A row's score is then q . middle, which pages share, and a product with codes.
#include "select.inl"

namespace {

constexpr int CODE_TILE_PAGES = 64;
constexpr int CODE_CHANNEL_BYTES = CODE_TILE_PAGES + 2 * 4;
constexpr int ROW_EXTRA = 16;  // floats after each row of a query: the first is the largest size in the row

// Packs 64 pages of which those before `count` are full; codes of others are zeros.
static void pack_codes(const zt_select_args* a, int pass, int64_t h, int64_t first, int64_t count, char* tile) {
  const int width = a->head_dim * (pass + 1);
  const int64_t end = first + CODE_TILE_PAGES < count ? first + CODE_TILE_PAGES : count;
  float *middle = (float*)(tile + CODE_TILE_PAGES * int64_t(width)), *step = middle + width;
  alignas(64) float inverse[512];
  alignas(64) int8_t codes[512];
  for (int d = 0; d < width; d += 16) {
    vec high = zero(), low = zero();  // low: of the sign turned, because there is only a maximum
    for (int64_t page = first; page < end; page++) {
      const vec x = load(summary_of(a, page, h, pass) + d), turned = sub(zero(), x);
      high = page > first ? max_(high, x) : x;
      low = page > first ? max_(low, turned) : turned;
    }
    store(middle + d, mul(sub(high, low), set1(0.5f)));
    store(step + d, mul(add(high, low), set1(1.0f / 254)));
  }
  for (int d = 0; d < width; d++) inverse[d] = step[d] > 0 ? 1 / step[d] : 0;
  if (end < first + CODE_TILE_PAGES) __builtin_memset(tile, 0, CODE_TILE_PAGES * size_t(width));
  for (int64_t page = first; page < end; page++) {
    const float* from = summary_of(a, page, h, pass);
    // The middle is rounded: where it is large and the range small, an end may lie beyond 127, and is cut.
    for (int d = 0; d < width; d += 16) {
      const vec x = mul(sub(load(from + d), load(middle + d)), load(inverse + d));
      store_i8(codes + d, sub(zero(), max_(sub(zero(), max_(x, set1(-127))), set1(-127))));
    }
    char* to = tile + (page - first) / 16 * 16 * width + page % 16 * 2;
    for (int d = 0; d < width; d += 2) __builtin_memcpy(to + int64_t(d) * 16, codes + d, 2);
  }
}

static inline const float* middle_of(const char* tile, int width) { return (const float*)(tile + CODE_TILE_PAGES * int64_t(width)); }

// What the pages of a tile have in common for a row.
static inline float common_of(const char* tile, const float* q, int width) {
  const float* middle = middle_of(tile, width);
  vec sum = zero();
  for (int d = 0; d < width; d += 16) sum = fma(load(q + d), load(middle + d), sum);
  return reduce_add(sum);
}

// Scores of rows q (f32) for 16 * vecs pages of a tile on targets that do not multiply codes: widened, sixteen pages at a time, as a K page has sixteen
// keys. scratch: [ROWS][width] of Dot's A, then [16][width] stored.
template <class S, class Dot>
static void multiply_widened(const char* tile, int vecs, const float* q, int rows, int width, char* scratch, float* to, int64_t stride) {
  const float* step = middle_of(tile, width) + width;
  typename Dot::A* a = (typename Dot::A*)scratch;
  typename S::T* keys = (typename S::T*)(a + Dot::ROWS * int64_t(width));
  float common[Dot::ROWS];
  for (int r = 0; r < rows; r++) {
    alignas(64) typename S::T rounded[512];  // q was of this type: exact
    for (int d = 0; d < width; d += 16) S::put(rounded + d, load(q + r * int64_t(width + ROW_EXTRA) + d));
    Dot::load_a(a + int64_t(r) * width, rounded, width);
    common[r] = common_of(tile, q + r * int64_t(width + ROW_EXTRA), width);
  }
  for (int v = 0; v < vecs; v++) {
    const int8_t* codes = (const int8_t*)tile + int64_t(16 * v) * width;
    for (int d = 0; d < width; d += 2)
      for (int half = 0; half < 32; half += 16) S::put(keys + d * 16 + half, mul(load_i8(codes + d * 16 + half), set_pair(step + d)));
    const char* at = (const char*)keys;
    product<Dot, false>(rows, a, width, width / Dot::PAIR, &at, 1, 0, Dot::STEP_BYTES, 1, to + 16 * v, stride);
    for (int r = 0; r < rows; r++) store(to + r * stride + 16 * v, add(load(to + r * stride + 16 * v), set1(common[r])));
  }
}

// The same by products of codes. scratch: [ROWS][width] integers.
template <class Codes>
static void multiply_codes(const char* tile, int vecs, const float* q, int rows, int width, char* scratch, float* to, int64_t stride) {
  const float* step = middle_of(tile, width) + width;
  int16_t* integers = (int16_t*)scratch;
  const float most_step = most_of(step, width);
  float unit[Codes::ROWS], common[Codes::ROWS];
  for (int r = 0; r < rows; r++) {
    const float* row = q + r * int64_t(width + ROW_EXTRA);
    unit[r] = to_integers<Codes>(row, step, width, row[width] * most_step, integers + int64_t(r) * width);
    common[r] = common_of(tile, row, width);
  }
  product<Codes, false>(rows, integers, width, width / Codes::PAIR, &tile, 1, int64_t(width) * 16, Codes::STEP_BYTES, vecs, to, stride);
  for (int r = 0; r < rows; r++)
    for (int64_t at = r * stride; at < r * stride + vecs * 16; at += 16) store(to + at, fma(Codes::sums(to + at), set1(unit[r]), set1(common[r])));
}

}  // namespace
