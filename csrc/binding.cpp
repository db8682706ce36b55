// Between torch and the kernels, and the only file that includes torch: check, point, launch.
//
// Two doors lead to the same engine. `step` reads parameters, gradients and states straight from the Python objects,
// so that the host pays a fraction of a microsecond a tensor; `adamfused::step_` is the operator that torch.compile
// sees. Nothing is kept from one step to the next: whatever the user replaced since is what moves.
#define ADAMFUSED_TARGET host
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pthread.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "cpu/isa.h"
#include "cuda/step.h"

namespace adamfused {
namespace {

#ifdef ADAMFUSED_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
const char* cuda_run(const Job&, void*) { return "built without CUDA"; }
#endif

// ---- which kernels ------------------------------------------------------------------------------------------------

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

using namespace host;
#define ADAMFUSED_ROW(R, name)                                   \
  {name,                                                         \
   R<float>::states,                                             \
   sizeof(R<float>::Hyper) / sizeof(double),                     \
   {sizeof(R<float>), sizeof(R<double>)},                        \
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

// OpenMP's threads do not survive a fork, and its next parallel region would wait for them for ever.
std::atomic<bool> forked{false};

// ---- tensors to spans ---------------------------------------------------------------------------------------------

bool find_format(at::ScalarType type, FormatId& format) {
  switch (c10::toRealValueType(type)) {
#define ADAMFUSED_CASE(F, dtype) \
  case at::k##dtype: format = FormatId::F; return true;
    ADAMFUSED_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
    default: return false;
  }
}

// Memory that a kernel may be pointed at: a plain strided tensor whose storage holds all of it.
bool has_memory(const at::Tensor& t) {
  if (!t.defined() || t.layout() != at::kStrided || !t.has_storage() || t._is_zerotensor() ||
      t.unsafeGetTensorImpl()->key_set().has_any(c10::python_ks))
    return false;
  if (t.numel() == 0) return true;
  size_t needed = t.is_contiguous()
                      ? size_t(t.storage_offset() + t.numel()) * t.element_size()
                      : at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size(), t.storage_offset());
  return needed <= t.storage().nbytes();
}

bool same_order(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
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

bool read_count(const at::Tensor& step, double& count) {
  const void* data = step.const_data_ptr();
  switch (step.scalar_type()) {
    case at::kFloat: count = *static_cast<const float*>(data); break;
    case at::kDouble: count = *static_cast<const double*>(data); break;
    case at::kLong: count = double(*static_cast<const int64_t*>(data)); break;
    case at::kInt: count = *static_cast<const int32_t*>(data); break;
    default: return false;
  }
  return std::isfinite(count) && count >= 0;
}

void write_count(const at::Tensor& step, double count) {
  void* data = step.mutable_data_ptr();
  switch (step.scalar_type()) {
    case at::kFloat: *static_cast<float*>(data) = float(count); break;
    case at::kDouble: *static_cast<double*>(data) = count; break;
    case at::kLong: *static_cast<int64_t*>(data) = int64_t(count); break;
    default: *static_cast<int32_t*>(data) = int32_t(count);
  }
}

void bump_version(const at::Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// ---- one step of an optimizer -------------------------------------------------------------------------------------

struct Group {
  int rule;
  std::array<double, kMaxHyper> hyper{};
  double lr;
  c10::optional<at::Tensor> lr_tensor;  // where lr is known only on the device
};

using Parts = std::array<at::Tensor, kSlots>;

class Step {
 public:
  // Notes one tensor, or says that it is not for these kernels. Writes nothing.
  bool add(const Group& group, Parts parts, const at::Tensor& step) {
    const RuleFacts& facts = kRuleFacts[group.rule];
    const int count = kState + facts.states;
    const at::Tensor p = parts[kParam];
    Span span{};
    for (int k = 0; k < count; ++k) {
      const at::Tensor& t = parts[k];
      if (!has_memory(t) || t.device() != p.device() || t.is_complex() != p.is_complex() || t.sizes() != p.sizes() ||
          !find_format(t.scalar_type(), span.format[k]))
        return false;
    }
    if (!(p.is_cpu() || (p.is_cuda() && kWithCuda)) || !has_memory(step) || step.numel() != 1) return false;

    const bool on_device = !step.is_cpu();
    double t = 0;
    if (on_device ? step.device() != p.device() || step.scalar_type() != at::kFloat : !read_count(step, t))
      return false;
    t += 1;

    const bool dense = p.is_contiguous() || p.is_non_overlapping_and_dense();
    std::array<bool, kSlots> in_place{};
    for (int k = 0; k < count; ++k) {
      const at::Tensor& part = parts[k];
      in_place[k] = part.numel() <= 1 || (dense && !part.is_conj() && !part.is_neg() && same_order(part, p));
      if (!in_place[k] && k != kGrad && may_overlap(part)) return false;
    }
    span.aligned = true;
    for (int k = 0; k < count; ++k) {
      if (!in_place[k]) {
        at::Tensor copy = dense ? at::empty_strided(p.sizes(), p.strides(), parts[k].options())
                                : at::empty(p.sizes(), parts[k].options());
        copy.copy_(parts[k]);
        if (k != kGrad) copied_.emplace_back(parts[k], copy);
        parts[k] = copy;
      }
      span.data[k] = k == kGrad ? const_cast<void*>(parts[k].const_data_ptr()) : parts[k].mutable_data_ptr();
      span.aligned &= reinterpret_cast<uintptr_t>(span.data[k]) % 16 == 0;
      if (k != kGrad) bumped_.push_back(parts[k]);
    }
    span.numel = p.numel() * (p.is_complex() ? 2 : 1);
    span.step = on_device ? static_cast<float*>(step.mutable_data_ptr()) : nullptr;
    if (!on_device) counted_.emplace_back(step, t);

    Bucket& bucket = bucket_for(p.device(), group.rule, span.format[kParam] == FormatId::F64);
    span.recipe = on_device ? bucket.recipe(group, p.device(), kept_) : bucket.rule_for(group, t, facts);
    bucket.spans.push_back(span);
    bumped_.push_back(step);
    kept_.push_back(parts[kGrad]);
    return true;
  }

  // Moves everything. Touches no Python object, so the caller may have let go of the interpreter.
  void run() {
    at::NoGradGuard no_grad;
    for (Bucket& bucket : buckets_) bucket.device.is_cpu() ? run_on_cpu(bucket) : run_on_device(bucket);
    for (auto& [tensor, copy] : copied_) tensor.copy_(copy);
    for (auto& [step, count] : counted_) write_count(step, count);
    for (const at::Tensor& t : bumped_) bump_version(t);
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
    Job job() const {
      return {RuleId(rule),          in_double,      spans.data(), int64_t(spans.size()), rules.data(),
              recipes.data(), int64_t(recipes.size()), nullptr};
    }
  };

  Bucket& bucket_for(at::Device device, int rule, bool in_double) {
    for (Bucket& b : buckets_)
      if (b.device == device && b.rule == rule && b.in_double == in_double) return b;
    return buckets_.emplace_back(Bucket{device, rule, in_double, {}, {}, {}, nullptr, -1, 0, -1, {}});
  }

  static void run_on_cpu(Bucket& bucket) {
    std::vector<int64_t> first_tile(bucket.spans.size() + 1, 0);
    int64_t numbers = 0;
    for (size_t s = 0; s < bucket.spans.size(); ++s) {
      numbers += bucket.spans[s].numel;
      first_tile[s + 1] = first_tile[s] + (bucket.spans[s].numel + kTile - 1) / kTile;
    }
    Job job = bucket.job();
    job.first_tile = first_tile.data();
    const int64_t tiles = first_tile.back();
    const Run run = isa().table[bucket.rule][bucket.in_double];
    if (tiles == 0) return;
    // Below about 32,768 numbers a second thread costs more than it brings; opening a tile costs like 64 numbers.
    const int64_t grain = std::max<int64_t>(1, tiles * 32768 / (numbers + 64 * tiles));
    if (forked.load()) run(job, 0, tiles);
    else at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) { run(job, begin, end); });
  }

  static void run_on_device(Bucket& bucket) {
    c10::DeviceGuard guard(bucket.device);
    c10::impl::VirtualGuardImpl device_type(bucket.device.type());
    void* stream = reinterpret_cast<void*>(device_type.getStream(bucket.device).native_handle());
    const char* error = cuda_run(bucket.job(), stream);
    TORCH_CHECK(error == nullptr, "adamfused: the step on ", bucket.device, " failed: ", error);
  }

  std::vector<Bucket> buckets_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copied_;  // (where it belongs, the copy that moves)
  std::vector<std::pair<at::Tensor, double>> counted_;     // (step, its new value)
  std::vector<at::Tensor> bumped_, kept_;
};

// ---- the two doors ------------------------------------------------------------------------------------------------

const at::Tensor* tensor_in(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value != nullptr && THPVariable_Check(value) ? &THPVariable_Unpack(value) : nullptr;
}

// groups: (rule, hyper, lr, lr tensor or None, state keys, params). For the i-th parameter of the j-th group,
// init(j, i) makes its state, and judge(j, i) is asked where these kernels cannot move it: it raises, or gives
// (param, grad, *states, step) to move instead, or None to leave it to the caller. Returns what was left, [(j, i)].
py::list step(const py::dict& state, const py::list& groups, const py::function& init, const py::function& judge) {
  Step work;
  py::list left;
  std::vector<Group> all(groups.size());
  PyObject* step_key = PyUnicode_InternFromString("step");
  py::object owned = py::reinterpret_steal<py::object>(step_key);
  for (size_t j = 0; j < groups.size(); ++j) {
    auto [rule, hyper, lr, lr_tensor, keys, params] =
        groups[j].cast<std::tuple<int, std::vector<double>, double, c10::optional<at::Tensor>, py::tuple, py::list>>();
    TORCH_CHECK(rule >= 0 && rule < kRules && hyper.size() == kRuleFacts[rule].hyper_count &&
                    int(keys.size()) == kRuleFacts[rule].states,
                "adamfused._C.step: group ", j, " does not fit its rule");
    Group& group = all[j];
    group.rule = rule, group.lr = lr, group.lr_tensor = lr_tensor;
    std::copy(hyper.begin(), hyper.end(), group.hyper.begin());
    const int states = kRuleFacts[rule].states;

    for (size_t i = 0; i < params.size(); ++i) {  // asked anew each time: callbacks may run user code
      PyObject* object = PyList_GET_ITEM(params.ptr(), Py_ssize_t(i));
      bool moved = false;
      if (THPVariable_Check(object)) {
        Parts parts;
        parts[kParam] = THPVariable_Unpack(object);
        parts[kGrad] = parts[kParam].unsafeGetTensorImpl()->grad();
        if (!parts[kGrad].defined()) continue;
        PyObject* entry = PyDict_GetItemWithError(state.ptr(), object);
        if (entry == nullptr && PyErr_Occurred()) throw py::error_already_set();
        if (entry == nullptr || !PyDict_Check(entry) || PyDict_Size(entry) == 0) {
          init(j, i);
          entry = PyDict_GetItemWithError(state.ptr(), object);
        }
        if (entry != nullptr && PyDict_Check(entry)) {
          const at::Tensor* count = tensor_in(entry, step_key);
          bool found = count != nullptr;
          for (int k = 0; found && k < states; ++k) {
            const at::Tensor* t = tensor_in(entry, PyTuple_GET_ITEM(keys.ptr(), k));
            if ((found = t != nullptr)) parts[kState + k] = *t;
          }
          moved = found && work.add(group, std::move(parts), *count);
        }
      }
      if (moved) continue;
      py::object verdict = judge(j, i);
      if (verdict.is_none()) {
        left.append(py::make_tuple(j, i));
        continue;
      }
      auto given = verdict.cast<std::vector<at::Tensor>>();
      TORCH_CHECK(int(given.size()) == kState + states + 1, "adamfused._C.step: judge gave the wrong number of tensors");
      Parts parts;
      std::copy(given.begin(), given.end() - 1, parts.begin());
      TORCH_CHECK(work.add(group, std::move(parts), given.back()), "adamfused: parameter ", i, " of group ", j,
                  " cannot be moved by the native kernels, and the check of its tensors found no reason");
    }
  }
  {
    py::gil_scoped_release others_may_run;
    work.run();
  }
  return left;
}

void step_op(at::TensorList params, at::TensorList grads, at::TensorList states, at::TensorList steps,
             c10::string_view rule, at::ArrayRef<double> hyper, double lr, const c10::optional<at::Tensor>& lr_tensor) {
  Group group;
  group.rule = -1;
  for (int r = 0; r < kRules; ++r)
    if (rule == kRuleFacts[r].name) group.rule = r;
  TORCH_CHECK(group.rule >= 0, "adamfused::step_: no rule is called '", rule, "'");
  const RuleFacts& facts = kRuleFacts[group.rule];
  const size_t n = params.size(), count = size_t(facts.states);
  TORCH_CHECK(hyper.size() == facts.hyper_count, "adamfused::step_: rule '", rule, "' takes ", facts.hyper_count,
              " hyper-parameters, got ", hyper.size());
  TORCH_CHECK(grads.size() == n && steps.size() == n && states.size() == n * count, "adamfused::step_: ", n,
              " params need as many grads and steps and ", n * count, " states, got ", grads.size(), ", ", steps.size(),
              " and ", states.size());
  group.lr = lr, group.lr_tensor = lr_tensor;
  std::copy(hyper.begin(), hyper.end(), group.hyper.begin());
  Step work;
  for (size_t i = 0; i < n; ++i) {
    Parts parts;
    parts[kParam] = params[i], parts[kGrad] = grads[i];
    for (size_t k = 0; k < count; ++k) parts[kState + k] = states[i * count + k];
    TORCH_CHECK(work.add(group, std::move(parts), steps[i]), "adamfused::step_: parameter ", i,
                " cannot be moved by the native kernels; the eager optimizer's message says why");
  }
  work.run();
}

void step_fake(at::TensorList, at::TensorList, at::TensorList, at::TensorList, c10::string_view, at::ArrayRef<double>,
               double, const c10::optional<at::Tensor>&) {}

void set_isa(const std::string& name) {
  std::string here;
  for (const Isa& known : kIsaTable) {
    if (known.runs_here()) here += (here.empty() ? "" : ", ") + std::string(known.name);
    if (known.name != name) continue;
    if (!known.runs_here()) throw std::runtime_error("this processor has no " + name);
    isa_in_use.store(&known);
    return;
  }
  throw std::runtime_error("no instruction set is called '" + name + "'; this processor runs " + here);
}

py::list isas() {
  py::list all;
  for (const Isa& known : kIsaTable) all.append(py::make_tuple(known.name, known.runs_here()));
  return all;
}

py::list rules() {
  py::list names;
  for (const RuleFacts& facts : kRuleFacts) names.append(facts.name);
  return names;
}

}  // namespace
}  // namespace adamfused

TORCH_LIBRARY(adamfused, m) {
  m.def(
      "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] steps, str rule, float[] hyper, "
      "float lr, Tensor? lr_tensor=None) -> ()",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(adamfused, CPU, m) { m.impl("step_", adamfused::step_op); }
TORCH_LIBRARY_IMPL(adamfused, CUDA, m) { m.impl("step_", adamfused::step_op); }
TORCH_LIBRARY_IMPL(adamfused, Meta, m) { m.impl("step_", adamfused::step_fake); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  pthread_atfork(nullptr, nullptr, [] { adamfused::forked.store(true); });
  m.def("step", &adamfused::step);
  m.def("rules", &adamfused::rules);
  m.def("isas", &adamfused::isas);
  m.def("isa", [] { return std::string(adamfused::isa().name); });
  m.def("set_isa", &adamfused::set_isa);
  m.attr("with_cuda") = adamfused::kWithCuda;
#ifdef ADAMFUSED_WITH_CUDA
  auto text = [](const char* error) { return error == nullptr ? py::object(py::none()) : py::object(py::str(error)); };
  m.def("cuda_status", [text] { return text(adamfused::cuda_status()); });
  m.def("cuda_self_test", [text] { return text(adamfused::cuda_self_test()); });
  m.attr("cuda_version") = adamfused::cuda_compiled_version();
#endif
}
