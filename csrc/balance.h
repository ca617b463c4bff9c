// The arithmetic of Algorithm 2 on one layer, the same on every device, and where its operands lie.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define BLD_EXT_BOTH __host__ __device__
#else
#define BLD_EXT_BOTH
#endif

namespace bld_ext {

using std::isfinite; // of the host; nvcc finds CUDA's own
using std::isinf;

enum class Dtype : int32_t { f32, f64, bf16, f16 };

struct Operand {
  void *data;
  Dtype dtype;
};

// Tensor i of each list; what an op does not have is null.
struct Item {
  Operand old_grad, new_grad, param; // G_d, which is measured; G_t; θ
};

// λ‖G_w‖ / ‖G_d‖; 0 where finite norms have no finite ratio, as for ‖G_d‖ = 0. A ‖G_d‖ that is not
// finite makes nan, and so does a λ that is negative or not finite. acc_t is the dtype of the
// result.
template <typename acc_t>
BLD_EXT_BOTH acc_t balance_factor(acc_t norm, double reference_norm, double balance) {
  if (!(balance >= 0) || isinf(balance) || !isfinite(norm))
    return static_cast<acc_t>(NAN);
  const acc_t factor = static_cast<acc_t>(balance * reference_norm / static_cast<double>(norm));
  return isfinite(reference_norm) && !isfinite(factor) ? acc_t(0) : factor;
}

// A factor of doubles for tensors that are computed in float: 0, as above, where float has none.
BLD_EXT_BOTH inline float narrow_factor(double factor) {
  const float narrow = static_cast<float>(factor);
  return isfinite(factor) && !isfinite(narrow) ? 0.f : narrow;
}

} // namespace bld_ext
