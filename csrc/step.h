// One step of an optimizer: check every tensor, point a span at it, then launch. Included by binding.cpp only.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <string>

#include "cuda/step.h"
#include "host.h"
#include "rule_facts.h"
#include "tensors.h"

namespace adamfused {

#ifndef ADAMFUSED_WITH_CUDA
const char* cuda_run(const Job&, void*) { return "built without CUDA"; }
const char* cuda_sum(const SumJob&, void*) { return "built without CUDA"; }
#endif

namespace {

#ifdef ADAMFUSED_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

struct Group {
  int rule;
  bool averaged = false;  // the weights, in a last state
  std::array<double, kMaxHyper> hyper{};
  double lr;
  c10::optional<at::Tensor> lr_tensor;  // where lr is known only on the device
  double ema_decay = 0;
  std::function<double(double)> ema_decay_at;  // if set, tells it of a step count
  bool at_random = false;                      // 16-bit parameters and states are rounded so

  const RuleFacts& facts() const { return kRuleFacts[rule][averaged]; }
};

// Numbers that all parameters have in common.
struct Common {
  c10::optional<at::Tensor> factor;     // what unscaling and clipping multiply gradients by; none: 1
  c10::optional<at::Tensor> found_inf;  // not 0 if the step is not to be made; for parameters on devices only
};

// What a parameter's random numbers depend on, besides its step.
struct Chance {
  bool given = false;
  uint32_t key = 0, first = 0;  // as in Span
};

// Null where there is none. Borrowed: the caller keeps them alive until `run`
// is over. Owning them here would cost the host dear, because a tensor that only Python holds hands its Python object
// over with every reference taken in C++.
using Parts = std::array<const at::Tensor*, kSlots>;

class Step {
 public:
  explicit Step(Common common) : common_(std::move(common)) {}

  // That so many parameters will be added.
  void expect(size_t params) {
    expected_ = params;
    counted_.reserve(params);
    bumped_.reserve(params * kSlots);
  }

  // Notes a parameter that has nothing beside its states if it is as most are; else `add` must be asked.
  bool add_plain(const Group& group, const Parts& parts, const at::Tensor& step) {
    if (group.at_random || !alone_.empty()) return false;
    switch (group.facts().states) {
      case 0:
        return add_usual<0>(group, parts, step);
      case 1:
        return add_usual<1>(group, parts, step);
      case 2:
        return add_usual<2>(group, parts, step);
      case 3:
        return add_usual<3>(group, parts, step);
      case 4:
        return add_usual<4>(group, parts, step);
      default:
        return false;
    }
  }

  // Notes one parameter, or says that it is not for these kernels. Writes nothing but the step count.
  __attribute__((flatten)) bool add(const Group& group, const Parts& parts, const at::Tensor& step,
                                    const at::Tensor* carried, const Chance& chance) {
    work_ += kBrief + 1;
    Seen seen[kSlots], counter, beside;
    const Seen& param = seen[kParam];
    const at::Tensor& p = *parts[kParam];
    if (!look(p, true, seen[kParam]) || !param.has_format) return false;
    if (!(param.device.is_cpu() || (param.device.is_cuda() && kWithCuda))) return false;
    const at::Device device = param.device;
    const bool is_complex = at::isComplexType(param.type);
    int slots[kSlots], count = 0;  // those of what is there
    for (int k = 0; k < kScale; ++k)
      if (parts[k] != nullptr) slots[count++] = k;
    const int shaped = count;  // as the parameter is
    for (int k = kScale; k < kSlots; ++k)
      if (parts[k] != nullptr) slots[count++] = k;

    bool usual = param.contiguous && !param.turned && !param.inference, dense = true;
    for (int i = 1; i < shaped && usual; ++i)
      usual = look_alike(*parts[slots[i]], slots[i] != kGrad, param, seen[slots[i]]);
    bool in_place[kSlots];
    for (bool& each : in_place) each = true;
    if (!usual) {
      for (int i = 0; i < shaped; ++i) {
        const int k = slots[i];
        if (!look(*parts[k], k != kGrad, seen[k]) || seen[k].device != device ||
            at::isComplexType(seen[k].type) != is_complex || !same_sizes(seen[k].impl->sizes(), param.impl->sizes()))
          return false;
        if (k != kGrad && seen[k].inference && !c10::InferenceMode::is_enabled()) return false;
      }
    }
    if (!find_formats(group, parts, chance, seen)) return false;
    for (int i = shaped; i < count; ++i)
      if (!is_scale(*parts[slots[i]], param, seen[slots[i]])) return false;
    if (!usual) {
      // Random numbers and blocks count elements by their indices.
      bool by_index = false;
      for (int i = 0; i < shaped; ++i) by_index |= depends_on_index(seen[slots[i]].format);
      dense = param.contiguous || (!by_index && p.is_non_overlapping_and_dense());
      for (int i = 0; i < shaped; ++i) {
        const int k = slots[i];
        const at::Tensor& t = *parts[k];
        in_place[k] = !seen[k].turned && (param.numel <= 1 || (dense && same_order(t, p)));
        if (!in_place[k] && k != kGrad && may_overlap(t)) return false;
      }
    }
    bool apart = true;
    for (int i = 1; i < count; ++i)
      for (int j = 0; j < i; ++j) apart &= !seen[slots[j]].extent.meets(seen[slots[i]].extent);
    for (int i = 1; i < count && !apart; ++i)
      for (int j = 0; j < i; ++j) {
        const Seen &a = seen[slots[j]], &b = seen[slots[i]];
        if (a.extent.meets(b.extent) && same_memory(a, b)) {
          if (slots[j] != kGrad && slots[i] != kGrad) return false;
          in_place[kGrad] = false;  // it is read while the other is written
        }
      }

    if (!look(step, true, counter) || counter.numel != 1) return false;
    const bool on_device = !counter.device.is_cpu();
    Count counted{const_cast<char*>(counter.extent.begin), counter.type, 0, 0}, carries{nullptr, at::kFloat, 0, 0};
    const bool has_carried = group.facts().carries;
    if (has_carried) {
      if (carried == nullptr || !look(*carried, true, beside) || beside.numel != 1 || beside.device != counter.device)
        return false;
      carries.data = const_cast<char*>(beside.extent.begin), carries.type = beside.type;
      if (on_device ? carries.type != at::kFloat : carries.type == at::kLong || !carries.read(1.0)) return false;
    }
    if (on_device ? counter.device != device || counted.type != at::kFloat : !counted.advance()) return false;
    if (!on_device) counted_.push_back(counted);
    will_bump(counter.impl);
    if (has_carried) {
      if (!on_device) {
        DefaultArithmetic here;
        carries.become(group.facts().carry(group.hyper.data(), counted.after, carries.before));
        counted_.push_back(carries);
      }
      will_bump(beside.impl);
    }
    for (int i = 0; i < count; ++i)
      if (slots[i] != kGrad) will_bump(seen[slots[i]].impl);

    const size_t b = bucket_for(device, group, param.type == at::kDouble || param.type == at::kComplexDouble);
    Bucket& bucket = buckets_[b];
    Span& span = bucket.spans.emplace_back();
    for (int k = 0; k < kSlots; ++k)
      span.data[k] = parts[k] != nullptr ? const_cast<char*>(seen[k].extent.begin) : nullptr;
    for (int i = 0; i < shaped && slots[i] < kParts; ++i) span.format[slots[i]] = seen[slots[i]].format;
    span.numel = param.numel * (is_complex ? 2 : 1);
    span.step = on_device ? static_cast<float*>(counted.data) : nullptr;
    span.carried = static_cast<float*>(carries.data);
    span.recipe = bucket.recipe_for(group, on_device ? Bucket::kCountOnDevice : counted.after, carries.after, kept_);
    span.key = chance.key, span.first = chance.first, span.t = uint32_t(uint64_t(counted.after));

    bool alone = !in_place[kParam];
    for (const Alone& other : alone_) alone |= param.extent.meets(other.extent);
    if (alone) {
      Alone& each = alone_.emplace_back(Alone{b, span, param.extent, {}, {}, dense});
      bucket.spans.pop_back();
      for (int i = 0; i < count; ++i)
        each.tensors[slots[i]] = *parts[slots[i]], each.in_place[slots[i]] = in_place[slots[i]];
      return true;
    }
    for (int i = 0; i < shaped; ++i) {
      const int k = slots[i];
      if (in_place[k]) continue;
      const at::Tensor& t = *parts[k];
      span.data[k] =
          copied_.emplace_back(k == kGrad ? at::Tensor() : t, copy_of(t, p, dense)).second.mutable_data_ptr();
    }
    span.aligned = is_aligned(span);
    return true;
  }

  // Whether to move everything takes less than to let go of the interpreter may, which another thread may then keep for
  // milliseconds. If so, this thread does it alone and runs no Python code.
  bool is_brief() const { return work_ <= kBrief; }

  // Moves everything. Touches no Python object, so the caller may have let go of the interpreter.
  void run() {
    at::NoGradGuard no_grad;
    for (const Bucket& bucket : buckets_) run_spans(bucket, bucket.spans);
    for (auto& [tensor, copy] : copied_)
      if (tensor.defined()) tensor.copy_(copy);
    for (Alone& each : alone_) run_alone(each);
    for (at::TensorImpl* t : bumped_) t->bump_version();
    counted_.clear();
  }

  ~Step() {
    for (auto count = counted_.rbegin(); count != counted_.rend(); ++count) count->write(count->before);
  }

 private:
  // That the version of a tensor counts this step, if it has one.
  void will_bump(at::TensorImpl* t) {
    if (!t->is_inference()) bumped_.push_back(t);
  }

  // What is known of a parameter. The next one is mostly of the same kind, and then few questions are left, because
  // torch keeps all that is special about a tensor in its keys.
  struct Usual {
    const Group* group = nullptr;
    c10::DispatchKeySet keys, count_keys;
    at::Device device = at::kCPU;
    caffe2::TypeMeta type;
    FormatId format;
    size_t itemsize, bucket;
  };

  bool find_usual(const Group& group, const at::Tensor& p, const at::Tensor& step) {
    Seen seen, counter;
    if (!look(p, true, seen) || !seen.has_format || seen.turned || seen.inference || at::isComplexType(seen.type) ||
        !(seen.device.is_cpu() || (seen.device.is_cuda() && kWithCuda)) || !look(step, true, counter) ||
        !counter.device.is_cpu())
      return false;
    usual_ = {&group,
              seen.impl->key_set(),
              counter.impl->key_set(),
              seen.device,
              seen.impl->dtype(),
              seen.format,
              seen.impl->itemsize(),
              bucket_for(seen.device, group, seen.type == at::kDouble)};
    return true;
  }

  // As most are: with its gradient and its states contiguous, of plain numbers and each by itself, and its count on the
  // host. For a number of states that is known, because a model has thousands of parameters.
  template <int states>
  __attribute__((flatten)) bool add_usual(const Group& group, const Parts& parts, const at::Tensor& step) {
    constexpr int count = kState + states;
    const at::TensorImpl* const p = parts[kParam]->unsafeGetTensorImpl();
    at::TensorImpl* const counter = step.unsafeGetTensorImpl();
    auto on_its_device = [this](const at::TensorImpl* t) {
      return usual_.device.is_cpu() || t->device() == usual_.device;  // of a CPU, the keys tell
    };
    const bool known = usual_.group == &group && p->key_set() == usual_.keys && p->dtype() == usual_.type &&
                       on_its_device(p) && counter->key_set() == usual_.count_keys;
    if (!known && !find_usual(group, *parts[kParam], step)) return false;
    const at::IntArrayRef sizes = p->sizes();
    const int64_t numel = p->numel();
    if (numel == 0 || counter->numel() != 1) return false;

    Extent extent[count];
    FormatId format[count];
    bool fits = true;
    for_each<0, count>([&](auto slot) {
      constexpr int k = slot.value;
      const at::TensorImpl* const t = parts[k]->unsafeGetTensorImpl();
      if constexpr (k != kParam)
        fits = fits && t->key_set() == usual_.keys && on_its_device(t) && same_sizes(t->sizes(), sizes);
      if (!fits) return;
      size_t itemsize = usual_.itemsize;
      format[k] = usual_.format;
      if (t->dtype() != usual_.type) {
        const at::ScalarType type = t->dtype().toScalarType();
        fits = find_format(type, format[k]) && !at::isComplexType(type);
        itemsize = t->itemsize();
      }
      const size_t bytes = size_t(numel) * itemsize;
      fits = fits && t->is_contiguous() && find_memory(t, k != kGrad, itemsize, bytes, extent[k].begin);
      if (fits) extent[k].end = extent[k].begin + bytes;
    });
    if (!fits) return false;
    bool apart = true;
    for_each<1, count>([&](auto slot) {
      for (int k = 0; k < slot.value; ++k) apart &= !extent[k].meets(extent[slot.value]);
    });
    const char* counts = nullptr;
    if (!apart || !find_memory(counter, true, counter->itemsize(), counter->itemsize(), counts)) return false;
    Count counted{const_cast<char*>(counts), counter->dtype().toScalarType(), 0, 0};
    if (!counted.advance()) return false;
    counted_.push_back(counted);
    work_ += usual_.device.is_cpu() ? numel + kPerTile * tiles_of(numel) : kBrief + 1;
    will_bump(counter);
    for_each<0, count>([&](auto slot) {
      if constexpr (slot.value != kGrad) bumped_.push_back(parts[slot.value]->unsafeGetTensorImpl());
    });

    Bucket& bucket = buckets_[usual_.bucket];
    Span& span = bucket.spans.emplace_back();
    uintptr_t bits = 0;
    for_each<0, kSlots>([&](auto slot) {
      constexpr int k = slot.value;
      span.data[k] = nullptr;
      if constexpr (k < count) {
        span.data[k] = const_cast<char*>(extent[k].begin), span.format[k] = format[k];
        bits |= reinterpret_cast<uintptr_t>(span.data[k]);
      }
    });
    span.aligned = bits % 16 == 0;
    span.numel = numel;
    span.step = span.carried = nullptr;
    span.recipe = bucket.recipe_for(group, counted.after, 0, kept_);
    span.key = span.first = 0, span.t = uint32_t(uint64_t(counted.after));
    return true;
  }

  struct Bucket {
    static constexpr double kCountOnDevice = -1;

    at::Device device;
    int rule;
    bool averaged, in_double;
    at::Tensor factor, found_inf;  // on the device, or undefined
    double factor_on_host = 1.0;
    std::vector<Span> spans;
    std::vector<char> rules;
    std::vector<Recipe> recipes;
    const Group* last_group = nullptr;  // the group that the three below speak of
    double last_t = -2, last_carried = 0;
    int32_t last_recipe = 0;
    std::map<std::pair<double, double>, int32_t> recipe_of;

    // The place in `rules` or `recipes` of what moves a parameter of the group whose step count is t, with what is
    // carried beside it.
    int32_t recipe_for(const Group& group, double t, double carried, std::vector<at::Tensor>& kept) {
      if (last_group != &group) last_group = &group, last_t = -2, recipe_of.clear();
      if (t == last_t && carried == last_carried) return last_recipe;
      const bool there = t == kCountOnDevice || factor.defined();
      const size_t size = group.facts().size[in_double], next = there ? recipes.size() : rules.size() / size;
      auto [found, is_new] = recipe_of.try_emplace({t, carried}, int32_t(next));
      if (is_new) {
        const double ema_decay = group.ema_decay_at ? group.ema_decay_at(t) : group.ema_decay;
        there ? add_recipe(group, t, ema_decay, carried, kept) : add_rule(group, t, ema_decay, carried);
      }
      last_t = t, last_carried = carried;
      return last_recipe = found->second;
    }
    void add_rule(const Group& group, double t, double ema_decay, double carried) {
      const double lr = group.lr_tensor ? group.lr_tensor->item<double>() : group.lr;
      const size_t size = group.facts().size[in_double];
      rules.resize(rules.size() + size);
      DefaultArithmetic here;
      group.facts().prepare[in_double](group.hyper.data(), {lr, t, factor_on_host, ema_decay, carried},
                                       rules.data() + rules.size() - size);
    }
    void add_recipe(const Group& group, double t, double ema_decay, double carried, std::vector<at::Tensor>& kept) {
      Recipe made{};
      std::copy(group.hyper.begin(), group.hyper.end(), made.hyper);
      made.lr = group.lr, made.t = t, made.ema_decay = ema_decay, made.carried = carried;
      if (group.lr_tensor) {
        bool is_double = group.lr_tensor->scalar_type() == at::kDouble;
        kept.push_back(group.lr_tensor->to(device, is_double ? at::kDouble : at::kFloat, /*non_blocking=*/true));
        made.lr_on_device = kept.back().const_data_ptr();
        made.lr_is_double = is_double;
      }
      recipes.push_back(made);
    }
    Job job(const std::vector<Span>& some) const {
      Job made{RuleId(rule), averaged,       in_double, some.data(), int64_t(some.size()),
               rules.data(), recipes.data(), nullptr,   nullptr,     nullptr};
      if (factor.defined()) made.factor = factor.const_data_ptr<double>();
      if (found_inf.defined()) made.found_inf = found_inf.const_data_ptr<float>();
      return made;
    }
  };

  size_t bucket_for(at::Device device, const Group& group, bool in_double) {
    for (size_t b = 0; b < buckets_.size(); ++b) {
      const Bucket& known = buckets_[b];
      if (known.device == device && known.rule == group.rule && known.averaged == group.averaged &&
          known.in_double == in_double)
        return b;
    }
    Bucket made{device, group.rule, group.averaged, in_double, {}, {}, 1.0, {}, {}, {}, nullptr, -2, 0, 0, {}};
    if (device.is_cpu()) {
      TORCH_CHECK(!common_.found_inf, "adamfused: found_inf is read by the caller for parameters on a CPU");
      if (common_.factor) made.factor_on_host = common_.factor->item<double>();
    } else {
      if (common_.factor) made.factor = common_.factor->to(device, at::kDouble, /*non_blocking=*/true);
      if (common_.found_inf) made.found_inf = common_.found_inf->to(device, at::kFloat, /*non_blocking=*/true);
    }
    buckets_.push_back(std::move(made));
    buckets_.back().spans.reserve(expected_);
    return buckets_.size() - 1;
  }

  // Completes the formats of what was looked at, or says that there is none.
  static bool find_formats(const Group& group, const Parts& parts, const Chance& chance, Seen* seen) {
    for (int k = 0; k < kParts; ++k) {
      if (parts[k] == nullptr) continue;
      const bool is_state = k >= kState && k < kCopy;
      if (is_state && is_code(seen[k].type)) {
        const RuleFacts& facts = group.facts();
        const bool is_average = group.averaged && k == kState + facts.states - 1;
        const bool is_unsigned = (facts.never_negative >> (k - kState) & 1) != 0;
        if (parts[kScale + k - kState] == nullptr || !chance.given || at::isComplexType(seen[kParam].type) ||
            !seen[k].contiguous || is_average || (seen[k].type == at::kByte) != is_unsigned)
          return false;
        seen[k].format = is_unsigned ? FormatId::UnsignedCode : FormatId::SignedCode;
      } else {
        if (!seen[k].has_format) return false;
        if (group.at_random && (is_state || k == kParam)) seen[k].format = at_random(seen[k].format);
      }
    }
    return parts[kMaster] == nullptr || find_joined(seen[kParam].type, seen[kMaster].type, seen[kParam].format);
  }

  static bool depends_on_index(FormatId format) {
    return format == FormatId::SignedCode || format == FormatId::UnsignedCode || format == FormatId::BF16AtRandom ||
           format == FormatId::F16AtRandom;
  }

  // Whether a tensor has a scale for each block of the parameter's numbers: by rows where a row is whole blocks.
  static bool is_scale(const at::Tensor& t, const Seen& param, Seen& seen) {
    if (!look(t, true, seen) || seen.type != at::kFloat || !seen.contiguous || seen.turned ||
        seen.device != param.device || (seen.inference && !c10::InferenceMode::is_enabled()))
      return false;
    const at::IntArrayRef shape = param.impl->sizes();
    const int64_t row = shape.size() > 1 && shape[0] > 0 ? param.numel / shape[0] : 0;
    if (row > 0 && row % kBlock == 0) return t.dim() == 2 && t.size(0) == shape[0] && t.size(1) == row / kBlock;
    return t.dim() == 1 && seen.numel == (param.numel + kBlock - 1) / kBlock;
  }

  static bool is_aligned(const Span& span) {
    uintptr_t bits = 0;
    for (int k = 0; k < kScale; ++k) bits |= reinterpret_cast<uintptr_t>(span.data[k]);
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
    std::array<at::Tensor, kSlots> use = each.tensors;
    for (int k = 0; k < kSlots; ++k) {
      if (!use[k].defined()) continue;
      if (!each.in_place[k]) use[k] = copy_of(each.tensors[k], each.tensors[kParam], each.dense);
      each.span.data[k] = use[k].mutable_data_ptr();
    }
    each.span.aligned = is_aligned(each.span);
    run_spans(buckets_[each.bucket], {each.span});
    for (int k = 0; k < kSlots; ++k)
      if (use[k].defined() && k != kGrad && !each.in_place[k]) each.tensors[k].copy_(use[k]);
  }

  static void run_spans(const Bucket& bucket, const std::vector<Span>& spans) {
    bucket.device.is_cpu() ? run_on_cpu(bucket, spans) : run_on_device(bucket, spans);
  }

  static int64_t tiles_of(int64_t numel) { return (numel + kTile - 1) / kTile; }

  static void run_on_cpu(const Bucket& bucket, const std::vector<Span>& spans) {
    std::vector<int64_t> first_tile(spans.size() + 1, 0);
    int64_t numbers = 0;
    for (size_t s = 0; s < spans.size(); ++s) {
      numbers += spans[s].numel;
      first_tile[s + 1] = first_tile[s] + tiles_of(spans[s].numel);
    }
    Job job = bucket.job(spans);
    job.first_tile = first_tile.data();
    const int64_t tiles = first_tile.back();
    const Run run = isa().table[bucket.rule][bucket.averaged][bucket.in_double];
    if (tiles == 0) return;
    const int64_t grain = std::max<int64_t>(1, tiles * kBrief / (numbers + kPerTile * tiles));
    auto some = [&](int64_t begin, int64_t end) {
      DefaultArithmetic here;
      run(job, begin, end);
    };
    if (forked.load() || tiles <= grain || at::get_num_threads() == 1 || share_memory(spans))
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

  // Below so many numbers, a second thread costs more than it brings. To open a tile costs like some.
  static constexpr int64_t kBrief = 32768, kPerTile = 16;

  const Common common_;
  int64_t work_ = 0;  // numbers
  size_t expected_ = 0;
  std::vector<Bucket> buckets_;
  Usual usual_;
  std::vector<Alone> alone_;
  std::deque<std::pair<at::Tensor, at::Tensor>> copied_;  // (where it belongs or undefined, the copy that moves)
  std::vector<Count> counted_;
  std::vector<at::TensorImpl*> bumped_;
  std::vector<at::Tensor> kept_;
};

}  // namespace
}  // namespace adamfused
