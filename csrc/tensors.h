// What the kernels need to know of a torch tensor, and whether they may be pointed at it. Included by binding.cpp only.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "job.h"

namespace adamfused {
namespace {

using namespace host;

// The format of numbers by themselves.
bool find_format(at::ScalarType type, FormatId& format) {
  switch (c10::toRealValueType(type)) {
#define ADAMFUSED_CASE(F, dtype) \
  case at::k##dtype:             \
    format = FormatId::F;        \
    return true;
    ADAMFUSED_NUMBER_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
    default:
      return false;
  }
}

FormatId at_random(FormatId format) {
  return format == FormatId::BF16 ? FormatId::BF16AtRandom : format == FormatId::F16 ? FormatId::F16AtRandom : format;
}

bool is_code(at::ScalarType type) { return type == at::kChar || type == at::kByte; }

// The format of a parameter that another tensor lies beside.
bool find_joined(at::ScalarType type, at::ScalarType beside, FormatId& format) {
  if (type == at::kBFloat16 && beside == at::kShort) return format = FormatId::Split16, true;
  if (type == at::kBFloat16 && beside == at::kChar) return format = FormatId::Split8, true;
  if (type == at::kBFloat16 && beside == at::kFloat) return format = FormatId::MasterBF16, true;
  if (type == at::kHalf && beside == at::kFloat) return format = FormatId::MasterF16, true;
  return false;
}

// A tensor with such a key stands for another, or for none, and has no memory of its own to point at.
constexpr c10::DispatchKeySet kStandsForAnother =
    c10::python_ks | c10::DispatchKeySet({c10::DispatchKey::ZeroTensor, c10::DispatchKey::Functionalize,
                                          c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});

// The memory from a tensor's first element to past its last.
struct Extent {
  const char *begin, *end;
  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};

// What the step asks of a tensor, read once.
struct Seen {
  at::TensorImpl* impl;
  at::Device device = at::kCPU;
  at::ScalarType type;
  FormatId format;
  bool has_format;
  bool contiguous;
  bool turned;     // lazily conjugated or negated
  bool inference;  // made in inference mode: may be written in it only
  int64_t numel;
  Extent extent;
};

// Finds where the elements of a tensor begin, if its storage holds so many bytes from there. `written` tells whether it
// will be written, which a storage that several tensors share until then (copy on write) must know.
inline bool find_memory(const at::TensorImpl* impl, bool written, size_t itemsize, size_t bytes, const char*& begin) {
  const c10::Storage& storage = impl->unsafe_storage();
  if (!storage) return false;
  const size_t first = size_t(impl->storage_offset()) * itemsize;
  if (first + bytes > storage.nbytes()) return false;
  const void* data = written ? storage.mutable_data() : storage.data();
  begin = static_cast<const char*>(data) + first;
  return true;
}

// Finds the memory of a tensor of which `seen` tells the numbers and whether they are contiguous.
inline bool reach(at::TensorImpl* impl, bool written, Seen& seen) {
  seen.impl = impl;
  seen.extent = {nullptr, nullptr};
  if (seen.numel == 0) return true;
  const size_t size = impl->itemsize();
  const size_t length = seen.contiguous ? size_t(seen.numel) * size
                                        : at::detail::computeStorageNbytes(impl->sizes(), impl->strides(), size);
  if (!find_memory(impl, written, size, length, seen.extent.begin)) return false;
  seen.extent.end = seen.extent.begin + length;
  return true;
}

// Whether a kernel may be pointed at a tensor: a plain strided one whose storage holds all of it.
inline bool look(const at::Tensor& t, bool written, Seen& seen) {
  at::TensorImpl* impl = t.unsafeGetTensorImpl();
  if (!t.defined() || impl->key_set().has_any(kStandsForAnother) || impl->layout() != at::kStrided) return false;
  seen.device = impl->device();
  seen.type = impl->dtype().toScalarType();
  seen.has_format = find_format(seen.type, seen.format);
  seen.contiguous = impl->is_contiguous();
  seen.turned = t.is_conj() || t.is_neg();
  seen.inference = impl->is_inference();
  seen.numel = impl->numel();
  return reach(impl, written, seen);
}

inline bool same_sizes(at::IntArrayRef x, at::IntArrayRef y) {
  bool same = x.size() == y.size();
  for (size_t d = 0; same && d < x.size(); ++d) same = x[d] == y[d];
  return same;
}

// The same of a gradient or state that is as they usually are, with few questions, because a model has thousands: its
// keys, in which torch keeps all that is special about a tensor, are those of the parameter, which was looked at.
inline bool look_alike(const at::Tensor& t, bool written, const Seen& param, Seen& seen) {
  at::TensorImpl* impl = t.unsafeGetTensorImpl();
  if (impl->key_set() != param.impl->key_set() || !impl->is_contiguous() ||
      !same_sizes(impl->sizes(), param.impl->sizes()))
    return false;
  if (!param.device.is_cpu() && impl->device() != param.device) return false;
  seen.type = impl->dtype().toScalarType();
  seen.format = param.format, seen.has_format = true;
  if (seen.type != param.type) {
    if (at::isComplexType(seen.type) != at::isComplexType(param.type)) return false;
    seen.has_format = find_format(seen.type, seen.format);
  }
  seen.contiguous = true, seen.turned = seen.inference = false, seen.numel = param.numel;
  return reach(impl, written, seen);
}

bool same_order(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// What a kernel can work on in place of a tensor whose elements lie in another order than the parameter's.
at::Tensor copy_of(const at::Tensor& t, const at::Tensor& p, bool dense) {
  at::NoGradGuard no_grad;
  at::Tensor copy = dense ? at::empty_strided(p.sizes(), p.strides(), t.options()) : at::empty(p.sizes(), t.options());
  copy.copy_(t);
  return copy;
}

// Whether two tensors whose extents meet share memory. Of two with holes, which may lie in each other's, only whether
// they begin at the same place.
bool same_memory(const Seen& a, const Seen& b) {
  auto dense = [](const Seen& t) { return t.contiguous || t.impl->is_non_overlapping_and_dense(); };
  return dense(a) || dense(b) || a.extent.begin == b.extent.begin;
}

// Whether two elements may share memory. Told from strides: each must step over all that the smaller ones reach.
bool may_overlap(const at::Tensor& t) {
  if (t.numel() <= 1 || t.is_contiguous()) return false;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (auto [stride, size] : dims) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

// Whether two parameters lie in the same memory, as when one was made from the other's data. They must then move one
// after the other, in order, as torch moves them; at once they would race.
bool share_memory(const std::vector<Span>& spans) {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  ranges.reserve(spans.size());
  bool sorted = true;
  for (const Span& span : spans) {
    if (span.numel == 0) continue;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(span.data[kParam]);
    sorted &= ranges.empty() || ranges.back().first <= begin;
    ranges.emplace_back(begin, begin + size_t(span.numel) * size_of(span.format[kParam]));
  }
  if (!sorted) std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i].first < ranges[i - 1].second) return true;
  return false;
}

// A step count on the host, or what is carried beside it. It is advanced when it is read, so that one that several
// parameters share counts each of them, as in torch; and put back if the step is refused.
struct Count {
  void* data;
  at::ScalarType type;
  double before, after;

  // Whether it is a number from 0 to `most`.
  bool read(double most) {
    switch (type) {
      case at::kFloat:
        before = *static_cast<const float*>(data);
        break;
      case at::kDouble:
        before = *static_cast<const double*>(data);
        break;
      case at::kLong:
        before = double(*static_cast<const int64_t*>(data));
        break;
      default:
        return false;
    }
    return before >= 0 && before <= most;  // not so for NaN
  }
  bool advance() {
    if (!read(0x1p53 - 1)) return false;
    become(before + 1);
    return true;
  }
  void become(double count) {
    after = type == at::kFloat ? float(count) : count;  // at 2^24 a float32 count stands still, as in torch
    write(after);
  }
  void write(double count) const {
    switch (type) {
      case at::kFloat:
        *static_cast<float*>(data) = float(count);
        break;
      case at::kDouble:
        *static_cast<double*>(data) = count;
        break;
      default:
        *static_cast<int64_t*>(data) = int64_t(count);
    }
  }
};

}  // namespace
}  // namespace adamfused
