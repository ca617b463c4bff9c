// head_softmax on a CPU: softmax inside each head, at a temperature.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace bld_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Softmax of one head at one position; its classes lie `stride` elements apart.
template <typename scalar_t, typename acc_t>
void softmax(const scalar_t *logits, acc_t *bank, int64_t classes, int64_t stride,
             acc_t temperature) {
  acc_t largest = -std::numeric_limits<acc_t>::infinity();
  for (int64_t c = 0; c < classes; ++c)
    largest = std::max(largest, static_cast<acc_t>(logits[c * stride]));
  acc_t sum = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const acc_t z = static_cast<acc_t>(logits[c * stride]);
    sum += bank[c * stride] = std::exp((z - largest) / temperature);
  }
  for (int64_t c = 0; c < classes; ++c)
    bank[c * stride] /= sum;
}

template <typename scalar_t>
void launch(const Tensor &logits, Tensor &bank, const std::vector<int64_t> &head_sizes,
            double temperature) {
  using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  const scalar_t *logits_ptr = static_cast<const scalar_t *>(logits.const_data_ptr()); // [N, C, S]
  acc_t *bank_ptr = static_cast<acc_t *>(bank.mutable_data_ptr()); // [N, C_old, S]
  const int64_t classes = logits.size(1), old_classes = bank.size(1);
  const int64_t positions = bank.numel() / (bank.size(0) * old_classes);
  const int64_t grain = std::max<int64_t>(1, 4096 / (old_classes * positions));
  torch::stable::parallel_for(0, bank.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      int64_t first = 0; // class at which the head begins
      for (int64_t size : head_sizes) {
        for (int64_t s = 0; s < positions; ++s)
          softmax<scalar_t, acc_t>(logits_ptr + (n * classes + first) * positions + s,
                                   bank_ptr + (n * old_classes + first) * positions + s, size,
                                   positions, static_cast<acc_t>(temperature));
        first += size;
      }
    }
  });
}

// logits [N, C, *spatial], the heads' sizes with sum C_old <= C -> bank [N, C_old, *spatial]
Tensor head_softmax(const Tensor &logits, std::vector<int64_t> head_sizes, double temperature) {
  STD_TORCH_CHECK(logits.dim() >= 2, "logits: expected [N, C, *spatial], got ", logits.dim(),
                  " dimensions");
  int64_t old_classes = 0;
  for (int64_t size : head_sizes) {
    STD_TORCH_CHECK(size >= 1, "head_sizes: expected sizes of at least 1, got ", size);
    STD_TORCH_CHECK(size <= logits.size(1) - old_classes, "head_sizes: they sum to more than the ",
                    logits.size(1), " classes of logits");
    old_classes += size;
  }
  STD_TORCH_CHECK(temperature > 0, "temperature: expected a positive number, got ", temperature);

  const Tensor dense = torch::stable::contiguous(logits);
  const ScalarType dtype = logits.scalar_type();
  std::vector<int64_t> shape(dense.sizes().begin(), dense.sizes().end());
  shape[1] = old_classes;
  Tensor bank = torch::stable::new_empty(
      dense, shape, dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  if (bank.numel() == 0)
    return bank;
  THO_DISPATCH_V2(dtype, "head_softmax",
                  AT_WRAP([&] { launch<scalar_t>(dense, bank, head_sizes, temperature); }),
                  AT_EXPAND(AT_FLOATING_TYPES), ScalarType::Half, ScalarType::BFloat16);
  return bank;
}

STABLE_TORCH_LIBRARY_IMPL(bld_ext, CPU, m) { m.impl("head_softmax", TORCH_BOX(&head_softmax)); }

} // namespace
} // namespace bld_ext
