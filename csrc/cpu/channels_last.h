// A new tensor whose channels are neighbours in memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace bld_ext {

// It is no view of another tensor: autograd lets nobody change views in place.
inline torch::stable::Tensor new_channels_last(const torch::stable::Tensor &like,
                                               const std::vector<int64_t> &sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t stride = sizes[1];
  for (size_t d = sizes.size() - 1; d > 1; stride *= sizes[d--])
    strides[d] = stride;
  strides[0] = stride;
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device, 0, &made));
  return torch::stable::Tensor(made);
}

} // namespace bld_ext
