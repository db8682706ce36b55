// The sum over all gradients that their norm is made from: check, point at, sum. Included by binding.cpp only.
#pragma once

#include "step.h"

namespace adamfused {
namespace {

// The sums of one device's gradients, whose order is that of the calls of `add`.
class GradientSum {
 public:
  explicit GradientSum(bool largest) : largest_(largest) {}

  // Notes one parameter's gradient, or says that it is not for these kernels. It is read in the order in which the
  // parameter lies in memory, or by its indices where that has holes.
  bool add(const at::Tensor& p, const at::Tensor& g) {
    Seen param, grad;
    if (!look(p, false, param) || !param.has_format) return false;
    if (largest_ && at::isComplexType(param.type)) return false;  // its magnitude is not that of a part
    if (!(param.device.is_cpu() || (param.device.is_cuda() && kWithCuda))) return false;
    if (!(param.contiguous && !param.turned && look_alike(g, false, param, grad) && grad.has_format)) {
      if (!look(g, false, grad) || !grad.has_format || grad.device != param.device ||
          at::isComplexType(grad.type) != at::isComplexType(param.type) ||
          !same_sizes(grad.impl->sizes(), param.impl->sizes()))
        return false;
      const bool dense = param.contiguous || p.is_non_overlapping_and_dense();
      const bool as_it_lies = !grad.turned && (dense ? same_order(g, p) : grad.contiguous);
      if (param.numel > 1 && !as_it_lies) {
        copied_.push_back(copy_of(g, p, dense));
        grad.extent.begin = static_cast<const char*>(copied_.back().const_data_ptr());
      }
    }
    Device& device = device_for(param.device);
    device.tensors.push_back({grad.extent.begin, grad.format, param.numel * (at::isComplexType(param.type) ? 2 : 1)});
    return true;
  }

  // One float64 number for each device. Touches no Python object.
  std::vector<at::Tensor> sums() {
    std::vector<at::Tensor> all;
    for (const Device& device : devices_) {
      std::vector<int64_t> first_chunk(device.tensors.size() + 1, 0);
      for (size_t t = 0; t < device.tensors.size(); ++t)
        first_chunk[t + 1] = first_chunk[t] + chunks_of(device.tensors[t].numel);
      SumJob job{largest_ ? SumOf::Largest : SumOf::Squares, device.tensors.data(), int64_t(device.tensors.size()),
                 first_chunk.data(), nullptr};
      all.push_back(device.device.is_cpu() ? on_cpu(job) : on_device(job, device.device));
    }
    return all;
  }

 private:
  struct Device {
    at::Device device;
    std::vector<Addends> tensors;
  };

  Device& device_for(at::Device wanted) {
    for (Device& known : devices_)
      if (known.device == wanted) return known;
    return devices_.emplace_back(Device{wanted, {}});
  }

  static at::Tensor on_cpu(SumJob job) {
    int64_t chunks = job.first_chunk[job.count];
    std::vector<double> sums(size_t(std::max<int64_t>(1, sums_of(chunks))), 0.0);
    job.sums = sums.data();
    const Sum sum = isa().sum;
    auto some = [&](int64_t begin, int64_t end) {
      DefaultArithmetic here;
      sum(job, begin, end);
    };
    if (forked.load())
      some(0, chunks);
    else
      at::parallel_for(0, chunks, 32, some);  // a second thread is worth its start from about 100,000 numbers on
    SumOf what = next(job.what);
    for (double* last = sums.data(); chunks > 1; what = next(what)) {
      const Addends all{last, FormatId::F64, chunks};
      last += chunks, chunks = chunks_of(chunks);
      const int64_t place[] = {0, chunks};
      job = {what, &all, 1, place, last};
      some(0, chunks);
    }
    at::Tensor result = at::empty({}, at::kDouble);
    *result.mutable_data_ptr<double>() = sums.back();
    return result;
  }

  static at::Tensor on_device(SumJob job, at::Device on) {
    c10::DeviceGuard guard(on);
    c10::impl::VirtualGuardImpl device_type(on.type());
    void* stream = reinterpret_cast<void*>(device_type.getStream(on).native_handle());
    const int64_t chunks = job.first_chunk[job.count];
    const auto options = at::TensorOptions().device(on).dtype(at::kDouble);
    if (chunks == 0) return at::zeros({}, options);
    at::Tensor sums = at::empty({sums_of(chunks)}, options);
    job.sums = sums.mutable_data_ptr<double>();
    const char* error = cuda_sum(job, stream);
    TORCH_CHECK(error == nullptr, "adamfused: the norm on ", on, " failed: ", error);
    return sums.select(0, -1).clone();  // the others may go
  }

  bool largest_;
  std::vector<Device> devices_;
  std::deque<at::Tensor> copied_;
};

}  // namespace
}  // namespace adamfused
