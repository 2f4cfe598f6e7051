// Linear layers: which kernel a weight is for.
#include "linear_bf16.inl"
#include "linear_int8.inl"

namespace {

static int linear(const zt_linear_args* a) {
  const bool bf16 = a->dtype == ZT_BF16;
  if (a->weight_scales && bf16 && a->out_dtype == ZT_F32) return linear_int8<Bf16Store, F32Store>(a);
  if (a->weight_scales) return bf16 ? linear_int8<Bf16Store, Bf16Store>(a) : linear_int8<F32Store, F32Store>(a);
  return bf16 ? linear_bf16<Bf16Store>(a) : linear_bf16<F32Store>(a);
}

}  // namespace
