// What layer_norms, balance_layers_ and balanced_sgd_ share on every device: the checks of their
// lists of tensors, and the table that a kernel walks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "balance.h"
#include "check.h"
#include "chunks.h"

namespace bld_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One argument of an op: a list of tensors, indexed like all others.
struct [[gnu::visibility("hidden")]] TensorList {
  const char *name;
  std::vector<Tensor> tensors;
  bool written;
  std::vector<std::pair<Tensor, Tensor>> write_back{}; // {original, copy the kernel writes}
};

inline Dtype dtype_of(const char *name, const Tensor &tensor, int64_t i = 0) {
  switch (tensor.scalar_type()) {
  case ScalarType::Float:
    return Dtype::f32;
  case ScalarType::Double:
    return Dtype::f64;
  case ScalarType::BFloat16:
    return Dtype::bf16;
  case ScalarType::Half:
    return Dtype::f16;
  default:
    BLD_CHECK(false, name, "[", i, "]: expected a floating-point dtype");
  }
}

// float64 where the first measured tensor is: the dtype of norms and factors.
inline ScalarType norm_dtype(const TensorList &measured) {
  return measured.tensors[0].scalar_type() == ScalarType::Double ? ScalarType::Double
                                                                 : ScalarType::Float;
}

inline bool same(torch::headeronly::IntHeaderOnlyArrayRef a,
                 torch::headeronly::IntHeaderOnlyArrayRef b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// The dimensions that have a stride, the nearest neighbours first.
inline std::vector<int64_t> by_stride(const Tensor &tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<int64_t> order;
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (sizes[d] != 1)
      order.push_back(d);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  return order;
}

// Whether a step along a dimension ends among the elements of nearer ones, as in expanded tensors.
inline bool overlaps_itself(const Tensor &tensor) {
  int64_t reach = 1;
  for (int64_t d : by_stride(tensor)) {
    if (tensor.stride(d) < reach)
      return true;
    reach += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return false;
}

// Whether the elements fill a piece of memory, in whatever order, each once.
inline bool is_dense(const Tensor &tensor) {
  if (tensor.is_contiguous())
    return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (int64_t d : by_stride(tensor)) {
    if (strides[d] != expected)
      return false;
    expected *= sizes[d];
  }
  return true;
}

// Raises where the lists are not what the ops work on. Nothing has been touched then.
inline void check_lists(const std::vector<TensorList *> &lists, const std::vector<int64_t> &layers,
                        int64_t num_layers) {
  const TensorList &first = *lists[0];
  const int64_t count = static_cast<int64_t>(first.tensors.size());
  BLD_CHECK(count >= 1, first.name, ": expected at least one tensor, got none");
  BLD_CHECK(count < INT32_MAX, first.name, ": expected fewer than 2^31 tensors");
  BLD_CHECK(static_cast<int64_t>(layers.size()) == count, "layers: expected ", count,
            " indices, got ", layers.size());
  for (int64_t i = 0; i < count; ++i)
    BLD_CHECK(0 <= layers[i] && layers[i] < num_layers, "layers: expected indices from 0 to ",
              num_layers - 1, ", got ", layers[i], " at position ", i);
  const auto device = first.tensors[0].device();
  for (const TensorList *list : lists) {
    BLD_CHECK(static_cast<int64_t>(list->tensors.size()) == count, list->name, ": expected ", count,
              " tensors, got ", list->tensors.size());
    for (int64_t i = 0; i < count; ++i) {
      const Tensor &tensor = list->tensors[i];
      BLD_CHECK(tensor.layout() == torch::headeronly::Layout::Strided, list->name, "[", i,
                "]: expected a dense tensor; call to_dense()");
      BLD_CHECK(tensor.device() == device, list->name, "[", i, "]: expected the device of ",
                first.name, "[0]");
      dtype_of(list->name, tensor, i);
      if (list != &first)
        BLD_CHECK(same(tensor.sizes(), first.tensors[i].sizes()), list->name, "[", i,
                  "]: expected the shape of ", first.name, "[", i, "]");
    }
  }
}

// Where the elements of a tensor begin, in order.
inline std::vector<uintptr_t> addresses(const Tensor &tensor) {
  std::vector<uintptr_t> found{reinterpret_cast<uintptr_t>(tensor.const_data_ptr())};
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    std::vector<uintptr_t> moved;
    moved.reserve(found.size() * tensor.size(d));
    for (int64_t k = 0; k < tensor.size(d); ++k)
      for (uintptr_t at : found)
        moved.push_back(at + k * tensor.stride(d) * tensor.element_size());
    found = std::move(moved);
  }
  std::sort(found.begin(), found.end());
  return found;
}

// Of tensors whose memory reaches into each other's: whether they have a byte in common.
inline bool share_memory(const Tensor &a, const Tensor &b) {
  const std::vector<uintptr_t> in_a = addresses(a);
  for (uintptr_t at : addresses(b)) { // the first element of a that ends behind `at`
    const auto next = std::upper_bound(in_a.begin(), in_a.end(), at - a.element_size());
    if (next != in_a.end() && *next < at + b.element_size())
      return true;
  }
  return false;
}

struct Extent { // of a tensor in memory, gaps included
  uintptr_t begin, end;
  const TensorList *list;
  size_t i;

  Extent(const TensorList *list, size_t i) : list(list), i(i) {
    const Tensor &tensor = list->tensors[i];
    begin = end = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    if (tensor.numel() == 0)
      return;
    int64_t elements = 1;
    for (int64_t d = 0; d < tensor.dim(); ++d)
      elements += (tensor.size(d) - 1) * tensor.stride(d);
    end += elements * tensor.element_size();
  }
};

inline void require_apart(bool apart, const Extent &own, const Extent &other) {
  BLD_CHECK(apart, own.list->name, "[", own.i,
            "]: expected memory of its own, got some that is also in ", other.list->name, "[",
            other.i, "]; clone() one of them");
}

inline std::vector<Extent> extents_of(const std::vector<TensorList *> &lists) {
  std::vector<Extent> extents;
  for (const TensorList *list : lists)
    for (size_t i = 0; i < list->tensors.size(); ++i)
      extents.emplace_back(list, i);
  return extents;
}

// What is written by way of copies has to have memory that is nobody else's, nor its own twice.
// What is written in place is looked at in check_overlap, once for all calls with the same tensors.
inline void check_copied(const std::vector<TensorList *> &lists,
                         const std::vector<size_t> &copied) {
  const std::vector<Extent> extents = extents_of(lists);
  for (const TensorList *list : lists)
    for (size_t i : copied) {
      const Tensor &tensor = list->tensors[i];
      if (!list->written || tensor.is_contiguous())
        continue;
      BLD_CHECK(!overlaps_itself(tensor), list->name, "[", i,
                "]: expected a tensor whose elements do not share memory, got an "
                "expanded one or the like; clone() it");
      const Extent own(list, i);
      for (const Extent &other : extents)
        require_apart(own.end <= other.begin || other.end <= own.begin ||
                          (other.list == list && other.i == i) ||
                          !share_memory(tensor, other.list->tensors[other.i]),
                      own, other);
    }
}

// Makes tensors i of all lists walk memory in the same order, by copies where they do not.
inline void align(const std::vector<TensorList *> &lists) {
  const TensorList &first = *lists[0];
  std::vector<size_t> copied;
  for (size_t i = 0; i < first.tensors.size(); ++i) {
    bool as_they_are = is_dense(first.tensors[i]);
    for (const TensorList *list : lists)
      if (list != &first)
        as_they_are &= same(list->tensors[i].strides(), first.tensors[i].strides()) ||
                       (list->tensors[i].is_contiguous() && first.tensors[i].is_contiguous());
    if (!as_they_are)
      copied.push_back(i);
  }
  if (!copied.empty())
    check_copied(lists, copied);
  for (size_t i : copied) {
    for (TensorList *list : lists) {
      Tensor copy = torch::stable::contiguous(list->tensors[i]);
      if (list->written && !list->tensors[i].is_contiguous())
        list->write_back.emplace_back(list->tensors[i], copy);
      list->tensors[i] = std::move(copy);
    }
  }
}

// After the kernel, in its stream.
inline void write_back(TensorList &list) {
  for (auto &[original, copy] : list.write_back)
    torch::stable::copy_(original, copy);
}

// One call's tensors as a kernel walks them.
struct LayerTable : ChunkTable {
  std::vector<int64_t> key; // all that the table was made from
  std::vector<Item> items;
};

inline std::vector<int64_t> table_key(const std::vector<TensorList *> &lists,
                                      const std::vector<int64_t> &layers, int64_t num_layers) {
  const size_t count = layers.size();
  std::vector<int64_t> key;
  key.reserve(3 + count + lists.size() * (1 + 2 * count));
  key.insert(key.end(), {num_layers, chunk_size, static_cast<int64_t>(lists.size())});
  key.insert(key.end(), layers.begin(), layers.end());
  for (const TensorList *list : lists) {
    key.push_back(list->written); // what is only read may overlap
    for (size_t i = 0; i < count; ++i) {
      const Tensor &tensor = list->tensors[i];
      key.push_back(reinterpret_cast<int64_t>(tensor.const_data_ptr()));
      key.push_back(tensor.numel() * 4 + static_cast<int64_t>(dtype_of(list->name, tensor)));
    }
  }
  return key;
}

// A kernel that writes a tensor must not have its elements under another name too. All are dense.
inline void check_overlap(const std::vector<TensorList *> &lists) {
  std::vector<Extent> extents = extents_of(lists);
  std::sort(extents.begin(), extents.end(),
            [](const Extent &a, const Extent &b) { return a.begin < b.begin; });
  const Extent *reaching = nullptr, *written = nullptr; // furthest so far
  for (const Extent &extent : extents) {
    if (extent.begin == extent.end)
      continue;
    if (const Extent *other = extent.list->written ? reaching : written)
      require_apart(other->end <= extent.begin, extent, *other);
    if (!reaching || extent.end > reaching->end)
      reaching = &extent;
    if (extent.list->written && (!written || extent.end > written->end))
      written = &extent;
  }
}

inline void fill_table(LayerTable &table, std::vector<int64_t> key,
                       const std::vector<TensorList *> &lists, const TensorList &measured,
                       const std::vector<int64_t> &layers, int64_t num_layers) {
  check_overlap(lists);
  std::vector<int64_t> sizes;
  for (const Tensor &tensor : measured.tensors)
    sizes.push_back(tensor.numel());
  static_cast<ChunkTable &>(table) = make_chunks(sizes, layers, num_layers, chunk_size);
  table.items.clear();
  for (size_t i = 0; i < sizes.size(); ++i) {
    Item item{};
    for (const TensorList *list : lists) {
      const Operand operand{const_cast<void *>(list->tensors[i].const_data_ptr()),
                            dtype_of(list->name, list->tensors[i])};
      (list == &measured ? item.old_grad : list->written ? item.param : item.new_grad) = operand;
    }
    table.items.push_back(item);
  }
  table.key = std::move(key);
}

} // namespace bld_ext
