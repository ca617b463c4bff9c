// Torch's, with a guard that knows the CPU.
#pragma once
#include_next <torch/csrc/stable/accelerator.h>
namespace torch::stable::accelerator {
struct EmulatedGuard {
  explicit EmulatedGuard(int) {}
};
} // namespace torch::stable::accelerator
#define DeviceGuard EmulatedGuard
