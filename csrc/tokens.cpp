// The next token of several sequences, a whole model's layers in one call: kernels.h has the arguments. Nothing is computed here: a token takes some two
// hundred kernel calls of a few microseconds each, and preparing them one by one in Python took a fifth of its time.
#include "kernels.h"

namespace {

int64_t lists_of(const zt_select_args* a) { return a->per_kv_head ? a->kv_heads : a->q_heads; }

// Pages of the layer's list, chosen anew where it is the layer's turn.
int choose(const zt_token_row* row, zt_token_layer* layer, int64_t index) {
  const int64_t page = row->position / ZT_PAGE;
  if (layer->chosen_page == page && (row->position + index) % row->select_every) return ZT_OK;
  zt_select_args* a = &layer->select;
  for (int pass = 0; a->valid_pages && pass < 2; pass++)
    if (a->valid_pages[pass] > page) a->valid_pages[pass] = page;
  a->logit_factor = row->logit_factor;
  a->first_position = row->position;
  layer->chosen_page = -1;
  if (const int status = zt_select_pages(a)) return status;
  for (int pass = 0; a->valid_pages && pass < (a->bound_pages ? 2 : 1); pass++) a->valid_pages[pass] = page;
  const int64_t lists = lists_of(a), words = page / 64 + 1;
  layer->offsets[0] = 0;
  for (int64_t list = 0; list < lists; list++) layer->offsets[list + 1] = layer->offsets[list] + a->counts[list];
  if (layer->offsets[lists] > layer->most_entries) return ZT_BAD_ARGUMENT;
  const zt_list_args list = {a->bits, layer->offsets, layer->entries, lists, 1, page, words, a->span_pages};
  if (const int status = zt_list_pages(&list)) return status;
  layer->chosen_page = page;
  return ZT_OK;
}

int attend_token(const zt_token_row* row, int64_t index, const void* qkv, void* attended) {
  zt_token_layer* layer = row->layers + index;
  const int64_t position = row->position, page = position / ZT_PAGE;
  zt_store_args* store = &layer->store;
  zt_attend_args* attend = &layer->attend;
  store->qkv = qkv;
  store->first_position = attend->first_position = position;
  for (int v = 0; v < 3; v++) {
    store->q_out[v] = row->cos[v] ? (void*)attend->q[v] : nullptr;
    store->cos[v] = layer->rotate ? row->cos[v] : nullptr;
    store->sin[v] = layer->rotate ? row->sin[v] : nullptr;
  }
  const bool int8 = store->kv.dtype == ZT_INT8;
  store->kv.open_page = int8 && position % ZT_PAGE ? page : -1;
  if (const int status = zt_store(store)) return status;
  const bool chosen = row->select_every && layer->select.q[0];
  if (chosen)
    if (const int status = choose(row, layer, index)) return status;
  attend->kv.open_page = int8 && (position + 1) % ZT_PAGE ? page : -1;
  attend->out = attended;
  attend->logit_factor = row->logit_factor;
  const bool sampled = index == row->sampled_layer;
  attend->lse = sampled ? row->lse_kept : nullptr;
  attend->list_offsets = chosen ? layer->offsets : row->dense_offsets;
  attend->list_entries = chosen ? layer->entries : row->dense_entries;
  attend->heads_per_list = attend->q_heads / (chosen ? lists_of(&layer->select) : 1);
  if (const int status = zt_decode(attend)) return status;
  if (!sampled) return ZT_OK;
  zt_attend_args full = *attend;
  full.out = row->full_out;
  full.lse = row->lse_full;
  full.list_offsets = row->dense_offsets;
  full.list_entries = row->dense_entries;
  full.heads_per_list = full.q_heads;
  return zt_decode(&full);
}

}  // namespace

extern "C" int zt_tokens(const zt_tokens_args* a) {
  if (!a || !a->rows || !a->qkv || !a->attended || a->num_rows <= 0 || a->num_layers <= 0 || (!a->layers && a->num_layers > 1))
    return ZT_BAD_ARGUMENT;
  for (int64_t i = 0; i < a->num_layers; i++) {
    const zt_layer_args* layer = a->layers ? a->layers + i : nullptr;
    int status = ZT_OK;
    if (layer && ((status = zt_norm(&layer->input_norm)) || (status = zt_linear(&layer->qkv)))) return status;
    for (int64_t row = 0; row < a->num_rows; row++)
      if ((status = attend_token(a->rows[row], a->first_layer + i, a->qkv + row * a->qkv_row_bytes, a->attended + row * a->attended_row_bytes)))
        return status;
    if (layer && ((status = zt_linear(&layer->out)) || (status = zt_norm(&layer->post_norm)) || (status = zt_linear(&layer->gate_up)) ||
                  (status = zt_silu(&layer->silu)) || (status = zt_linear(&layer->down))))
      return status;
  }
  return ZT_OK;
}
