// Which instruction set runs. Built for the baseline CPU: nothing here may need more than that.
//
// Chosen once at load by CPUID feature bits and by XCR0 (the operating system must save the wide registers), never by vendor or model, with
// one exception: on Intel VDPBF16PS is slower than two FMAs, so avx512_bf16 is not the default there (it can still be selected).
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

enum Feature { AVX2, FMA, F16C, AVX512F, AVX512BW, AVX512DQ, AVX512VL, AVX512_VNNI, AVX512_BF16, AMX_BF16, NUM_FEATURES };
const char* const kFeatureNames[] = {"avx2",     "fma",      "f16c",        "avx512f",     "avx512bw",
                                     "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_bf16"};

uint64_t bit(Feature f) { return uint64_t(1) << f; }

// Linux saves the large state of tiles only for processes that have asked for it.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
#else
  return false;
#endif
}

uint64_t detect() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return 0;  // OSXSAVE
  const bool fma = c & (1u << 12), f16c = c & (1u << 29);
  unsigned lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  const bool ymm = (lo & 0x6) == 0x6, zmm = (lo & 0xe6) == 0xe6, tiles = (lo & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  uint64_t found = 0;
  if (ymm) {
    if (b & (1u << 5)) found |= bit(AVX2);
    if (fma) found |= bit(FMA);
    if (f16c) found |= bit(F16C);
  }
  if (ymm && zmm) {
    if (b & (1u << 16)) found |= bit(AVX512F);
    if (b & (1u << 30)) found |= bit(AVX512BW);
    if (b & (1u << 17)) found |= bit(AVX512DQ);
    if (b & (1u << 31)) found |= bit(AVX512VL);
    if (c & (1u << 11)) found |= bit(AVX512_VNNI);
    if (tiles && (d & (1u << 22)) && (d & (1u << 24)) && may_use_tiles()) found |= bit(AMX_BF16);
    unsigned a1, b1, c1, d1;
    if (a >= 1 && __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && (a1 & (1u << 5))) found |= bit(AVX512_BF16);
  }
  return found;
#else
  return 0;
#endif
}

bool intel() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx && d == signature_INTEL_edx && c == signature_INTEL_ecx;
#else
  return false;
#endif
}

struct Choice {
  const zt_kernels* kernels;
  uint64_t needs;
};

// Best first: the first whose needs are met is the default.
const Choice* choices(int* count) {
#if defined(__x86_64__)
  static const uint64_t avx2 = bit(AVX2) | bit(FMA);
  static const uint64_t avx512 = avx2 | bit(AVX512F) | bit(AVX512BW) | bit(AVX512DQ) | bit(AVX512VL);
  static const Choice list[] = {{&zt_amx_kernels, avx512 | bit(AVX512_BF16) | bit(AVX512_VNNI) | bit(AMX_BF16)},
                                {&zt_avx512_bf16_kernels, avx512 | bit(AVX512_BF16) | bit(AVX512_VNNI)},
                                {&zt_avx512_kernels, avx512},
                                {&zt_avx2_kernels, avx2},
                                {&zt_scalar_kernels, 0}};
#else
  static const Choice list[] = {{&zt_scalar_kernels, 0}};
#endif
  *count = int(sizeof(list) / sizeof(list[0]));
  return list;
}

const zt_kernels* g_selected = nullptr;

const zt_kernels* selected() {
  if (!g_selected) {
    int count;
    const Choice* list = choices(&count);
    const uint64_t found = detect();
    for (int i = 0; i < count && !g_selected; i++)
      if ((list[i].needs & ~found) == 0 && !(list[i].kernels == &zt_avx512_bf16_kernels && intel())) g_selected = list[i].kernels;
  }
  return g_selected;
}

bool known_head_dim(int d) { return d == 64 || d == 80 || d == 96 || d == 128 || d == 256; }

bool valid_pages(const zt_page_view* kv, int32_t dtype) {
  return kv->pages && kv->page_table && (kv->dtype == dtype || (kv->dtype == ZT_INT8 && kv->open && kv->open_page >= -1));
}

bool valid(const zt_attend_args* a) {
  return a && a->q[0] && a->out && valid_pages(&a->kv, a->dtype) && a->list_offsets && a->list_entries && a->heads_per_list > 0 &&
         a->num_rows > 0 && a->first_position >= 0 && a->window >= 0 && a->q_heads > 0 && a->kv_heads > 0 &&
         a->q_heads % a->kv_heads == 0 && a->q_heads % a->heads_per_list == 0 && known_head_dim(a->head_dim) &&
         (a->dtype == ZT_BF16 || a->dtype == ZT_F32) && a->scale > 0 && a->num_threads > 0;
}

}  // namespace

extern "C" {

int zt_abi_version(void) { return ZT_ABI_VERSION; }

int zt_supports(const char* name) {
  int count;
  const Choice* list = choices(&count);
  for (int i = 0; i < count; i++)
    if (!strcmp(list[i].kernels->name, name)) return (list[i].needs & ~detect()) == 0 ? 1 : 0;
  return -1;
}

int zt_select(const char* name) {
  const int supported = zt_supports(name);
  if (supported < 0) return -1;
  if (!supported) return -2;
  int count;
  const Choice* list = choices(&count);
  for (int i = 0; i < count; i++)
    if (!strcmp(list[i].kernels->name, name)) g_selected = list[i].kernels;
  return 0;
}

const char* zt_selected(void) { return selected()->name; }
uint64_t zt_cpu_features(void) { return detect(); }
const char* zt_feature_name(int b) { return b >= 0 && b < NUM_FEATURES ? kFeatureNames[b] : nullptr; }

int zt_attend(const zt_attend_args* a) { return valid(a) ? selected()->attend(a) : ZT_BAD_ARGUMENT; }

int zt_decode(const zt_attend_args* a) { return valid(a) && a->num_rows == 1 ? selected()->decode(a) : ZT_BAD_ARGUMENT; }

int zt_store(const zt_store_args* a) {
  const bool ok = a && a->qkv && valid_pages(&a->kv, a->dtype) && a->num_rows > 0 && a->first_position >= 0 && a->q_heads > 0 &&
                  a->kv_heads > 0 && known_head_dim(a->head_dim) && (a->dtype == ZT_BF16 || a->dtype == ZT_F32) && a->num_threads > 0 &&
                  (a->first_position + a->num_rows + ZT_PAGE - 1) / ZT_PAGE <= a->kv.num_pages;
  return ok ? selected()->store(a) : ZT_BAD_ARGUMENT;
}

int zt_norm(const zt_norm_args* a) {
  return a && a->residual && a->weight && a->out && a->rows > 0 && a->width > 0 && a->num_threads > 0 ? selected()->norm(a)
                                                                                                      : ZT_BAD_ARGUMENT;
}

int zt_silu(const zt_silu_args* a) {
  return a && a->gate_up && a->out && a->rows > 0 && a->width > 0 && a->num_threads > 0 ? selected()->silu(a) : ZT_BAD_ARGUMENT;
}

int zt_linear(const zt_linear_args* a) {
  const bool ok = a && a->x && a->weights && a->out && a->rows > 0 && a->inputs > 0 && a->outputs > 0 &&
                  (!a->weight_scales || (a->groups > 0 && a->groups * 4 <= a->inputs)) && (a->dtype == ZT_BF16 || a->dtype == ZT_F32) &&
                  (a->out_dtype == a->dtype || (a->weight_scales && a->out_dtype == ZT_F32)) && a->num_threads > 0;
  return ok ? selected()->linear(a) : ZT_BAD_ARGUMENT;
}

int zt_select_pages(const zt_select_args* a) {
  const bool ok = a && a->q[0] && a->summaries && a->page_table && a->mass && a->bits && a->counts && a->num_rows > 0 &&
                  a->first_position >= 0 && (a->first_position % ZT_PAGE == 0 || a->num_rows == 1) && a->span_pages >= 0 && a->sink_pages >= 0 &&
                  a->local_pages >= 0 && a->most_pages >= 0 && a->bound_pages >= 0 && a->sample_rows > 0 && a->sample_rows <= ZT_PAGE && a->q_heads > 0 &&
                  a->kv_heads > 0 && a->q_heads % a->kv_heads == 0 && known_head_dim(a->head_dim) &&
                  (a->dtype == ZT_BF16 || a->dtype == ZT_F32) && a->scale > 0 && a->num_threads > 0;
  return ok ? selected()->select(a) : ZT_BAD_ARGUMENT;
}

int zt_list_pages(const zt_list_args* a) {
  if (!a || !a->bits || !a->offsets || !a->entries || a->num_lists <= 0 || a->num_blocks <= 0 || a->words <= 0) return ZT_BAD_ARGUMENT;
  for (int64_t row = 0; row < a->num_lists * a->num_blocks; row++) {
    const uint64_t* bits = a->bits + row * a->words;
    const int64_t own_span = a->span_pages ? (a->first_block + row % a->num_blocks) / a->span_pages : 0;
    int64_t at = a->offsets[row];
    for (int64_t word = 0; word < a->words; word++)
      for (uint64_t left = bits[word]; left; left &= left - 1) {
        const int64_t page = word * 64 + __builtin_ctzll(left);
        const int64_t distance = a->span_pages ? own_span - page / a->span_pages : 0;
        a->entries[at++] = int32_t(page * 4 + (distance > 2 ? 2 : distance));
      }
    if (at != a->offsets[row + 1]) return ZT_BAD_ARGUMENT;
  }
  return ZT_OK;
}
}
