/* The C ABI of the native kernels: plain structs, raw pointers, int64 offsets. No torch, no Python, no C++ in this header, so that one
 * build serves every version of both, and so that the per-ISA files share nothing the linker could merge.
 *
 * Page layout (64 keys of one layer and one KV head, K then V, written once by zt_store and read by zt_attend and zt_decode):
 *   bf16   K [key/16][dim/2][key%16][dim%2]      V [key/2][dim][key%2]
 *   f32    K [key/16][dim][key%16]               V [key][dim]
 * One step of 16 keys (or 16 dims of V) is 64 contiguous bytes, the operand of one dot-product instruction. Unused keys of a partly filled
 * page are zero. A page is found at  pages + page_table[page] * slot_stride + kv_head * head_stride  (bytes).
 */
#ifndef ZEN_TURBO_KERNELS_H
#define ZEN_TURBO_KERNELS_H
#include <stdint.h>

#define ZT_PAGE 64
#define ZT_ABI_VERSION 11

enum zt_dtype { ZT_BF16 = 0, ZT_F32 = 1, ZT_INT8 = 2 /* pages only */ };
enum zt_status { ZT_OK = 0, ZT_BAD_ARGUMENT = 1, ZT_NO_MEMORY = 2 };

/* Where the pages of one layer are. With int8 pages (layout: quantise.inl) the page that is not full yet is kept in the call's dtype at
 * open + kv_head * open_head_stride; open_page is its number, or -1 when every page is full. */
typedef struct {
  char* pages;
  int64_t slot_stride; /* bytes */
  int64_t head_stride; /* bytes */
  const int32_t* page_table;
  int64_t num_pages; /* entries of page_table */
  char* open;
  int64_t open_head_stride; /* bytes */
  int64_t open_page;
  int32_t dtype; /* of the pages: the call's, or ZT_INT8 */
} zt_page_view;

/* Block-sparse flash attention of a run of consecutive positions.
 * Row i of the run has position first_position + i. Query block b is rows [64 b, 64 b + 64). Key pages that block b of list group g reads:
 * entries[offsets[g * num_blocks + b] .. offsets[g * num_blocks + b + 1]), each page * 4 + variant, ascending; variant picks q[0] (same
 * span), q[1] (previous span) or q[2] (older), the Dual Chunk Attention rotations. List group g serves query heads
 * [g * heads_per_list, (g + 1) * heads_per_list). Causality and the sliding window are applied inside; every page named must have been
 * stored. A row that sees no key gives zeros and lse -inf. */
typedef struct {
  const void* q[3];
  int64_t q_row_stride, q_head_stride; /* elements */
  void* out;
  int64_t out_row_stride, out_head_stride; /* elements */
  float* lse;                              /* [q_heads][num_rows], natural logarithm, or null */
  const float* logit_factor;               /* [num_rows] or null */
  zt_page_view kv;
  const int64_t* list_offsets;
  const int32_t* list_entries;
  int64_t heads_per_list;
  int64_t num_rows, first_position;
  int64_t window; /* 0: none; else a row sees keys in (position - window, position] */
  int32_t q_heads, kv_heads, head_dim, dtype;
  float scale;
  int32_t num_threads;
} zt_attend_args;

/* Rotate queries, rotate and pack keys, pack values: everything between the QKV projection and attention.
 * qkv row: q_heads * head_dim, then kv_heads * head_dim keys, then values. cos and sin of variant v: [num_rows or 1][head_dim / 2]
 * (row stride 0 means one row for all); variant 0 also rotates the keys. cos[0] null: no rotation. q_out[v] null: variant not wanted. */
typedef struct {
  const void* qkv;
  int64_t qkv_row_stride; /* elements */
  void* q_out[3];
  int64_t q_row_stride, q_head_stride;
  const float* cos[3];
  const float* sin[3];
  int64_t angle_row_stride[3];
  const float* q_norm; /* [head_dim] RMS norm weight or null */
  const float* k_norm;
  float norm_eps;
  zt_page_view kv;
  float* summaries;            /* [slots][kv_heads][3][head_dim]: mean, largest and smallest key of every page that this call fills, or null */
  int64_t summary_slot_stride; /* floats */
  int64_t num_rows, first_position;
  int32_t q_heads, kv_heads, head_dim, dtype;
  int32_t num_threads;
} zt_store_args;

/* Choose the pages that each query block reads, from the means of pages (select.inl has the rule). Queries, rows, variants and
 * logit_factor as in zt_attend_args, after the run's own keys were stored; span_pages is the length of a span in pages, 0 without spans.
 * Writes bits[q_heads][blocks][words], words = ceil((first_position / 64 + blocks) / 64), bit p = page p, and how many are set. With
 * per_kv_head lists are [kv_heads] and `mass` too: query heads of a group share one, by the sum of their energies. A single row may be at any
 * position. `bound_pages` pages are chosen by the bound that a page's largest and smallest keys give. Scoring reads means and
 * bounds as it reads keys, in tiles of 16 pages (select.inl), or with `codes`, for a bf16 row with per_kv_head, as 8-bit codes in tiles of 64 pages
 * (summary_codes.inl). `packed` is where a caller keeps these tiles from call to call: of means, and of bounds. */
typedef struct {
  const void* q[3];
  int64_t q_row_stride, q_head_stride; /* elements */
  const float* logit_factor;           /* [num_rows] or null */
  const float* summaries;              /* as in zt_store_args */
  int64_t summary_slot_stride;
  const int32_t* page_table;
  const float* mass; /* [q_heads] share of the energy to keep; 1: every page */
  uint64_t* bits;
  int32_t* counts;  /* [q_heads][blocks] */
  float* energies;  /* [q_heads][blocks][first_position / 64 + blocks], with bound_pages two of these: by means, by bounds; or null */
  int64_t num_rows, first_position;
  int64_t span_pages, sink_pages, local_pages, most_pages;
  int64_t bound_pages; /* of most_pages; 0: bounds are not looked at */
  int64_t sample_rows; /* 1 to 64 */
  void* packed[2];         /* [kv_heads][packed_tiles][bytes of a tile], bounds twice as wide; or null: packed anew */
  int64_t packed_tiles[2]; /* room for ceil(pages / 64) * 64 pages at least */
  int64_t* valid_pages;    /* [2] how many pages of each are as they should be, which the caller keeps true; null with neither */
  int32_t q_heads, kv_heads, head_dim, dtype;
  float scale;
  int32_t per_kv_head, codes;
  int32_t num_threads;
} zt_select_args;

/* Bits to the lists of zt_attend_args: entries[offsets[i] ..] = page * 4 + variant of every bit set in row i = list * blocks + block. */
typedef struct {
  const uint64_t* bits;
  const int64_t* offsets;
  int32_t* entries;
  int64_t num_lists, num_blocks, first_block, words, span_pages;
} zt_list_args;

/* residual += delta (if any); out = residual / rms(residual) * weight. residual f32 [rows][width], delta and out of `dtype`, contiguous. */
typedef struct {
  float* residual;
  const void* delta;
  const float* weight;
  void* out;
  int64_t rows, width;
  float eps;
  int32_t dtype, num_threads;
} zt_norm_args;

/* out[r][c] = silu(gate_up[r][c]) * gate_up[r][width + c]; contiguous. */
typedef struct {
  const void* gate_up;
  void* out;
  int64_t rows, width;
  int32_t dtype, num_threads;
} zt_silu_args;

/* out[r][o] = x[r] . W[o] + bias[o]. x [rows][inputs] and out [rows][outputs] of `dtype`, contiguous; bias f32, whole panels.
 * With weight_scales on 8-bit integers (linear_int8.inl): weights [panels of 64 outputs][padded inputs / 4][64][4], scales f32 [panels * 64];
 * inputs are padded to a multiple of 4 * groups; `fine` activations are of two codes, sixteen bits together; with `rotate` whole blocks of 64
 * inputs are rotated, as those of the weights are; out may be f32 where x is not.
 * Without, in f32 (linear_bf16.inl): weights bf16 [panels of 16 outputs][inputs][16]; groups, fine and rotate are not looked at. */
typedef struct {
  const void* x;
  const void* weights;
  const float* weight_scales; /* or null */
  const float* bias; /* or null */
  void* out;
  int64_t rows, inputs, outputs, groups;
  int32_t dtype, out_dtype, fine, rotate, num_threads;
} zt_linear_args;

/* What stays from token to token of one sequence in one layer: arguments that zt_tokens completes and passes on, and the list of pages that it
 * chose. select.q[0] null: nothing is chosen here. */
typedef struct {
  zt_store_args store;
  zt_select_args select;
  zt_attend_args attend;
  int32_t rotate;
  int64_t* offsets;     /* [select lists + 1] */
  int32_t* entries;     /* [most_entries] */
  int64_t most_entries;
  int64_t chosen_page;  /* of the token that chose the list; -1: there is none */
} zt_token_layer;

/* The next token of one sequence. */
typedef struct {
  zt_token_layer* layers;
  int64_t position;
  const float* cos[3]; /* [head_dim / 2] each; null: a variant that the token does not need */
  const float* sin[3];
  const float* logit_factor; /* of this token, or null */
  const int64_t* dense_offsets; /* one list for all heads, of every page: what is read where nothing is chosen */
  const int32_t* dense_entries;
  int64_t select_every;    /* 0: nothing is chosen for this token. A layer's choice serves so many tokens of a page, layers taking turns */
  int64_t sampled_layer;   /* where lse_kept and lse_full [q_heads] are filled, over the pages read and over all of them; -1: nowhere */
  float *lse_kept, *lse_full;
  void* full_out;          /* [q_heads][head_dim], scratch of a sampled layer */
} zt_token_row;

/* One layer over the rows of a batch, for zt_tokens: what each step reads is what the one before it writes. */
typedef struct {
  zt_norm_args input_norm;
  zt_linear_args qkv, out;
  zt_norm_args post_norm;
  zt_linear_args gate_up;
  zt_silu_args silu;
  zt_linear_args down;
} zt_layer_args;

/* The next token of several sequences through layers [first_layer, first_layer + num_layers), row i of qkv and attended being that of rows[i]. Without
 * `layers`: attention alone, of one layer. The same functions as by single calls, in the same order: the same bits. */
typedef struct {
  const zt_layer_args* layers; /* [num_layers] or null */
  int64_t first_layer, num_layers;
  zt_token_row* const* rows;
  int64_t num_rows;
  char *qkv, *attended;
  int64_t qkv_row_bytes, attended_row_bytes;
} zt_tokens_args;

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const char* name;
  int (*attend)(const zt_attend_args*);
  int (*decode)(const zt_attend_args*);
  int (*store)(const zt_store_args*);
  int (*norm)(const zt_norm_args*);
  int (*silu)(const zt_silu_args*);
  int (*select)(const zt_select_args*);
  int (*linear)(const zt_linear_args*);
} zt_kernels;

extern const zt_kernels zt_scalar_kernels;
#if defined(__x86_64__)
extern const zt_kernels zt_avx2_kernels, zt_avx512_kernels, zt_avx512_bf16_kernels, zt_amx_kernels;
#endif

/* The public functions, in dispatch.cpp. zt_select returns 0, or -1 for an unknown name, -2 where the CPU lacks it. */
int zt_abi_version(void);
int zt_select(const char* name);
const char* zt_selected(void);
int zt_supports(const char* name);
uint64_t zt_cpu_features(void); /* bit order: zt_feature_name */
const char* zt_feature_name(int bit);
int zt_attend(const zt_attend_args*);
int zt_decode(const zt_attend_args*); /* one row per query head at first_position; num_rows must be 1 */
int zt_store(const zt_store_args*);
int zt_norm(const zt_norm_args*);
int zt_silu(const zt_silu_args*);
int zt_select_pages(const zt_select_args*);
int zt_linear(const zt_linear_args*);
int zt_list_pages(const zt_list_args*);
int zt_tokens(const zt_tokens_args*);
#ifdef __cplusplus
}
#endif
#endif
