// Torch's, with checks that do not call CUDA.
#pragma once
#include_next <torch/csrc/stable/macros.h>

#include <stdexcept>
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call)                                                                       \
  do {                                                                                             \
    if ((call) != 0)                                                                               \
      throw std::runtime_error("CUDA error: " #call);                                              \
  } while (false)
