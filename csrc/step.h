// One step of an optimizer: check every tensor, point a span at it, then launch. Included by binding.cpp only.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <fenv.h>

#include <array>
#include <atomic>
#include <cstring>
#include <deque>
#include <string>
#include <unordered_map>

#include "cpu/isa.h"
#include "cuda/step.h"
#include "tensors.h"

namespace adamfused {

#ifndef ADAMFUSED_WITH_CUDA
const char* cuda_run(const Job&, void*) { return "built without CUDA"; }
#endif

namespace {

#ifdef ADAMFUSED_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

struct RuleFacts {
  const char* name;
  int states;
  size_t hyper_count;
  size_t size[2];                                                            // of Rule<float>, Rule<double>
  void (*prepare[2])(const double* hyper, double lr, double t, void* rule);  // likewise
};

template <class Rule>
void prepare(const double* numbers, double lr, double t, void* rule) {
  typename Rule::Hyper hyper;
  std::memcpy(&hyper, numbers, sizeof hyper);
  Rule made = Rule::prepare(hyper, lr, t);
  std::memcpy(rule, &made, sizeof made);
}

#define ADAMFUSED_ROW(R, name)               \
  {name,                                     \
   R<float>::states,                         \
   sizeof(R<float>::Hyper) / sizeof(double), \
   {sizeof(R<float>), sizeof(R<double>)},    \
   {prepare<R<float>>, prepare<R<double>>}},
const RuleFacts kRuleFacts[kRules] = {ADAMFUSED_RULES(ADAMFUSED_ROW)};
#undef ADAMFUSED_ROW

std::atomic<const Isa*> isa_in_use{nullptr};

const Isa& isa() {
  const Isa* now = isa_in_use.load();
  for (int i = kIsas - 1; now == nullptr; --i)
    if (kIsaTable[i].runs_here()) isa_in_use.store(now = &kIsaTable[i]);
  return *now;
}

// Whether subnormals are flushed and how is rounded are settings of each thread, and torch.set_flush_denormal or a
// library may have changed them for some. While this lives, they are IEEE 754's.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    fegetenv(&before_);
    fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { fesetenv(&before_); }

 private:
  fenv_t before_;
};

// OpenMP's threads do not survive a fork, and its next parallel region would wait for them for ever.
std::atomic<bool> forked{false};

struct Group {
  int rule;
  std::array<double, kMaxHyper> hyper{};
  double lr;
  c10::optional<at::Tensor> lr_tensor;  // where lr is known only on the device
};

// Borrowed: the caller keeps them alive until `run` is over. Owning them here would cost the host dear, because a
// tensor that only Python holds hands its Python object over with every reference taken in C++.
using Parts = std::array<const at::Tensor*, kSlots>;

class Step {
 public:
  // That so many parameters will be added.
  void expect(size_t params) {
    expected_ = params;
    counted_.reserve(counted_.size() + params);
    bumped_.reserve(bumped_.size() + params * kSlots);
  }

  // Notes one parameter, or says that it is not for these kernels. Writes nothing but the step count.
  __attribute__((flatten)) bool add(const Group& group, const Parts& parts, const at::Tensor& step) {
    const RuleFacts& facts = kRuleFacts[group.rule];
    const int count = kState + facts.states;
    Seen seen[kSlots], counter;
    const Seen& param = seen[kParam];
    const at::Tensor& p = *parts[kParam];
    if (!look(p, true, seen[kParam]) || !param.has_format) return false;
    if (!(param.device.is_cpu() || (param.device.is_cuda() && kWithCuda))) return false;
    const at::Device device = param.device;
    const bool is_complex = at::isComplexType(param.type);
    bool usual = param.contiguous && !param.turned && !param.inference, dense = true;
    for (int k = 1; k < count && usual; ++k) usual = look_alike(*parts[k], k != kGrad, param, seen[k]);
    bool in_place[kSlots] = {true, true, true, true, true};
    if (!usual) {
      dense = param.contiguous || p.is_non_overlapping_and_dense();
      for (int k = 0; k < count; ++k) {
        const at::Tensor& t = *parts[k];
        if (!look(t, k != kGrad, seen[k]) || !seen[k].has_format || seen[k].device != device ||
            at::isComplexType(seen[k].type) != is_complex || !same_sizes(seen[k].impl, param.impl))
          return false;
        if (k != kGrad && seen[k].inference && !c10::InferenceMode::is_enabled()) return false;
        in_place[k] = !seen[k].turned && (param.numel <= 1 || (dense && same_order(t, p)));
        if (!in_place[k] && k != kGrad && may_overlap(t)) return false;
      }
    }
    bool apart = true;
    for (int k = 1; k < count; ++k)
      for (int j = 0; j < k; ++j) apart &= !seen[j].extent.meets(seen[k].extent);
    for (int k = 1; k < count && !apart; ++k)
      for (int j = 0; j < k; ++j)
        if (seen[j].extent.meets(seen[k].extent) && same_memory(seen[j], seen[k])) {
          if (j != kGrad && k != kGrad) return false;
          in_place[kGrad] = false;  // it is read while the other is written
        }

    if (!look(step, true, counter) || counter.numel != 1) return false;
    const bool on_device = !counter.device.is_cpu();
    Count counted{const_cast<char*>(counter.extent.begin), counter.type, 0, 0};
    if (on_device ? counter.device != device || counted.type != at::kFloat : !counted.advance()) return false;
    if (!on_device) counted_.push_back(counted);
    bumped_.push_back(counter.impl);
    for (int k = 0; k < count; ++k)
      if (k != kGrad) bumped_.push_back(seen[k].impl);

    const size_t b = bucket_for(device, group.rule, param.format == FormatId::F64);
    Bucket& bucket = buckets_[b];
    Span& span = bucket.spans.emplace_back();
    for (int k = 0; k < count; ++k)
      span.data[k] = const_cast<char*>(seen[k].extent.begin), span.format[k] = seen[k].format;
    span.numel = param.numel * (is_complex ? 2 : 1);
    span.step = on_device ? static_cast<float*>(counted.data) : nullptr;
    span.recipe = on_device ? bucket.recipe(group, device, kept_) : bucket.rule_for(group, counted.after, facts);

    bool alone = !in_place[kParam];
    for (const Alone& other : alone_) alone |= param.extent.meets(other.extent);
    if (alone) {
      Alone& each = alone_.emplace_back(Alone{b, span, param.extent, {}, {}, dense});
      bucket.spans.pop_back();
      for (int k = 0; k < count; ++k) each.tensors[k] = *parts[k], each.in_place[k] = in_place[k];
      return true;
    }
    for (int k = 0; k < count; ++k) {
      if (in_place[k]) continue;
      const at::Tensor& t = *parts[k];
      span.data[k] =
          copied_.emplace_back(k == kGrad ? at::Tensor() : t, copy_of(t, p, dense)).second.mutable_data_ptr();
    }
    span.aligned = is_aligned(span, count);
    return true;
  }

  // Moves everything. Touches no Python object, so the caller may have let go of the interpreter.
  void run() {
    at::NoGradGuard no_grad;
    for (const Bucket& bucket : buckets_) run_spans(bucket, bucket.spans);
    for (auto& [tensor, copy] : copied_)
      if (tensor.defined()) tensor.copy_(copy);
    for (Alone& each : alone_) run_alone(each);
    for (at::TensorImpl* t : bumped_)
      if (!t->is_inference()) t->bump_version();
    counted_.clear();
  }

  ~Step() {
    for (auto count = counted_.rbegin(); count != counted_.rend(); ++count) count->write(count->before);
  }

 private:
  struct Bucket {
    at::Device device;
    int rule;
    bool in_double;
    std::vector<Span> spans;
    std::vector<char> rules;
    std::vector<Recipe> recipes;
    const Group* last_group = nullptr;  // the group that the three below speak of
    double last_t = -1;
    int32_t last_rule = 0, last_recipe = -1;
    std::unordered_map<double, int32_t> rule_of_t;

    void enter(const Group& group) {
      if (last_group == &group) return;
      last_group = &group, last_t = -1, last_recipe = -1;
      rule_of_t.clear();
    }
    int32_t rule_for(const Group& group, double t, const RuleFacts& facts) {
      enter(group);
      if (t == last_t) return last_rule;
      size_t size = facts.size[in_double];
      auto [found, is_new] = rule_of_t.try_emplace(t, int32_t(rules.size() / size));
      if (is_new) {
        rules.resize(rules.size() + size);
        double lr = group.lr_tensor ? group.lr_tensor->item<double>() : group.lr;
        DefaultArithmetic here;
        facts.prepare[in_double](group.hyper.data(), lr, t, rules.data() + rules.size() - size);
      }
      last_t = t;
      return last_rule = found->second;
    }
    int32_t recipe(const Group& group, at::Device on, std::vector<at::Tensor>& kept) {
      enter(group);
      if (last_recipe >= 0) return last_recipe;
      Recipe made{};
      std::copy(group.hyper.begin(), group.hyper.end(), made.hyper);
      made.lr = group.lr;
      if (group.lr_tensor) {
        bool is_double = group.lr_tensor->scalar_type() == at::kDouble;
        kept.push_back(group.lr_tensor->to(on, is_double ? at::kDouble : at::kFloat, /*non_blocking=*/true));
        made.lr_on_device = kept.back().const_data_ptr();
        made.lr_is_double = is_double;
      }
      recipes.push_back(made);
      return last_recipe = int32_t(recipes.size() - 1);
    }
    Job job(const std::vector<Span>& some) const {
      return {RuleId(rule), in_double, some.data(), int64_t(some.size()), rules.data(), recipes.data(), nullptr};
    }
  };

  size_t bucket_for(at::Device device, int rule, bool in_double) {
    for (size_t b = 0; b < buckets_.size(); ++b)
      if (buckets_[b].device == device && buckets_[b].rule == rule && buckets_[b].in_double == in_double) return b;
    buckets_.push_back(Bucket{device, rule, in_double, {}, {}, {}, nullptr, -1, 0, -1, {}});
    buckets_.back().spans.reserve(expected_);
    return buckets_.size() - 1;
  }

  // What a kernel can work on in place of a tensor whose elements lie in another order than the parameter's.
  static at::Tensor copy_of(const at::Tensor& t, const at::Tensor& p, bool dense) {
    at::NoGradGuard no_grad;
    at::Tensor copy =
        dense ? at::empty_strided(p.sizes(), p.strides(), t.options()) : at::empty(p.sizes(), t.options());
    copy.copy_(t);
    return copy;
  }

  static bool is_aligned(const Span& span, int count) {
    uintptr_t bits = 0;
    for (int k = 0; k < count; ++k) bits |= reinterpret_cast<uintptr_t>(span.data[k]);
    return bits % 16 == 0;
  }

  // A strided parameter, of which a copy moves, or one that may lie in the memory of such: after all others, one after
  // the other, as torch moves them.
  struct Alone {
    size_t bucket;
    Span span;
    Extent extent;  // of the parameter
    std::array<at::Tensor, kSlots> tensors;
    bool in_place[kSlots];
    bool dense;
  };

  void run_alone(Alone& each) {
    const int count = kState + kRuleFacts[buckets_[each.bucket].rule].states;
    std::array<at::Tensor, kSlots> use = each.tensors;
    for (int k = 0; k < count; ++k) {
      if (!each.in_place[k]) use[k] = copy_of(each.tensors[k], each.tensors[kParam], each.dense);
      each.span.data[k] = use[k].mutable_data_ptr();
    }
    each.span.aligned = is_aligned(each.span, count);
    run_spans(buckets_[each.bucket], {each.span});
    for (int k = 0; k < count; ++k)
      if (k != kGrad && !each.in_place[k]) each.tensors[k].copy_(use[k]);
  }

  static void run_spans(const Bucket& bucket, const std::vector<Span>& spans) {
    bucket.device.is_cpu() ? run_on_cpu(bucket, spans) : run_on_device(bucket, spans);
  }

  static void run_on_cpu(const Bucket& bucket, const std::vector<Span>& spans) {
    std::vector<int64_t> first_tile(spans.size() + 1, 0);
    int64_t numbers = 0;
    for (size_t s = 0; s < spans.size(); ++s) {
      numbers += spans[s].numel;
      first_tile[s + 1] = first_tile[s] + (spans[s].numel + kTile - 1) / kTile;
    }
    Job job = bucket.job(spans);
    job.first_tile = first_tile.data();
    const int64_t tiles = first_tile.back();
    const Run run = isa().table[bucket.rule][bucket.in_double];
    if (tiles == 0) return;
    // Below about 32,768 numbers a second thread costs more than it brings; opening a tile costs like 16 numbers.
    const int64_t grain = std::max<int64_t>(1, tiles * 32768 / (numbers + 16 * tiles));
    auto some = [&](int64_t begin, int64_t end) {
      DefaultArithmetic here;
      run(job, begin, end);
    };
    if (forked.load() || share_memory(spans))
      some(0, tiles);
    else
      at::parallel_for(0, tiles, grain, some);
  }

  static void run_on_device(const Bucket& bucket, const std::vector<Span>& spans) {
    c10::DeviceGuard guard(bucket.device);
    c10::impl::VirtualGuardImpl device_type(bucket.device.type());
    void* stream = reinterpret_cast<void*>(device_type.getStream(bucket.device).native_handle());
    Job job = bucket.job(spans);
    const int64_t all = job.count, at_once = share_memory(spans) ? 1 : all;
    for (int64_t done = 0; done < all; done += at_once, job.spans += at_once) {
      job.count = at_once;
      const char* error = cuda_run(job, stream);
      TORCH_CHECK(error == nullptr, "adamfused: the step on ", bucket.device, " failed: ", error);
    }
  }

  size_t expected_ = 0;
  std::vector<Bucket> buckets_;
  std::vector<Alone> alone_;
  std::deque<std::pair<at::Tensor, at::Tensor>> copied_;  // (where it belongs or undefined, the copy that moves)
  std::vector<Count> counted_;
  std::vector<at::TensorImpl*> bumped_;
  std::vector<at::Tensor> kept_;
};

}  // namespace
}  // namespace adamfused
