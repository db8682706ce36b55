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
#include <deque>
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
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  if (!t.defined() || impl->key_set().has_any(c10::python_ks | c10::DispatchKeySet(c10::DispatchKey::ZeroTensor)) ||
      impl->layout() != at::kStrided)
    return false;
  const int64_t numel = impl->numel();
  const c10::Storage& storage = impl->unsafe_storage();
  if (numel == 0 || !storage) return numel == 0;
  const size_t size = impl->itemsize();
  const size_t needed = impl->is_contiguous()
                            ? size_t(impl->storage_offset() + numel) * size
                            : at::detail::computeStorageNbytes(t.sizes(), t.strides(), size, t.storage_offset());
  return needed <= storage.nbytes();
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

// A step count on the host: where it lies, and what it will be after this step.
struct Count {
  void* data;
  at::ScalarType type;
  double next;

  bool read() {
    switch (type) {
      case at::kFloat: next = *static_cast<const float*>(data); break;
      case at::kDouble: next = *static_cast<const double*>(data); break;
      case at::kLong: next = double(*static_cast<const int64_t*>(data)); break;
      case at::kInt: next = *static_cast<const int32_t*>(data); break;
      default: return false;
    }
    next += 1;
    return std::isfinite(next) && next >= 1;
  }
  void write() const {
    switch (type) {
      case at::kFloat: *static_cast<float*>(data) = float(next); break;
      case at::kDouble: *static_cast<double*>(data) = next; break;
      case at::kLong: *static_cast<int64_t*>(data) = int64_t(next); break;
      default: *static_cast<int32_t*>(data) = int32_t(next);
    }
  }
};

// ---- one step of an optimizer -------------------------------------------------------------------------------------

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
  // Notes one tensor, or says that it is not for these kernels. Writes nothing.
  bool add(const Group& group, Parts parts, const at::Tensor& step) {
    const RuleFacts& facts = kRuleFacts[group.rule];
    const int count = kState + facts.states;
    const at::Tensor& p = *parts[kParam];
    const at::Device device = p.device();
    Span span{};
    for (int k = 0; k < count; ++k) {
      const at::Tensor& t = *parts[k];
      if (!has_memory(t) || t.device() != device || t.is_complex() != p.is_complex() || t.sizes() != p.sizes() ||
          !find_format(t.scalar_type(), span.format[k]))
        return false;
    }
    if (!(device.is_cpu() || (device.is_cuda() && kWithCuda)) || !has_memory(step) || step.numel() != 1) return false;

    const bool on_device = !step.is_cpu();
    Count counted{step.mutable_data_ptr(), step.scalar_type(), 0};
    if (on_device ? step.device() != device || counted.type != at::kFloat : !counted.read()) return false;

    const int64_t numel = p.numel();
    const bool dense = p.is_contiguous() || p.is_non_overlapping_and_dense();
    std::array<bool, kSlots> in_place{};
    for (int k = 0; k < count; ++k) {
      const at::Tensor& t = *parts[k];
      in_place[k] = numel <= 1 || (dense && !t.is_conj() && !t.is_neg() && same_order(t, p));
      if (!in_place[k] && k != kGrad && may_overlap(t)) return false;
    }
    uintptr_t all_bits = 0;
    for (int k = 0; k < count; ++k) {
      const at::Tensor* t = parts[k];
      if (k != kGrad) bumped_.push_back(t->unsafeGetTensorImpl());
      if (!in_place[k]) t = &move_a_copy(p, dense, *t, /*put_back=*/k != kGrad);
      span.data[k] = k == kGrad ? const_cast<void*>(t->const_data_ptr()) : t->mutable_data_ptr();
      all_bits |= reinterpret_cast<uintptr_t>(span.data[k]);
    }
    span.aligned = all_bits % 16 == 0;
    span.numel = numel * (p.is_complex() ? 2 : 1);
    span.step = on_device ? static_cast<float*>(counted.data) : nullptr;
    if (!on_device) counted_.push_back(counted);
    bumped_.push_back(step.unsafeGetTensorImpl());

    Bucket& bucket = bucket_for(device, group.rule, span.format[kParam] == FormatId::F64);
    span.recipe = on_device ? bucket.recipe(group, device, kept_) : bucket.rule_for(group, counted.next, facts);
    bucket.spans.push_back(span);
    return true;
  }

  // Moves everything. Touches no Python object, so the caller may have let go of the interpreter.
  void run() {
    at::NoGradGuard no_grad;
    for (Bucket& bucket : buckets_) bucket.device.is_cpu() ? run_on_cpu(bucket) : run_on_device(bucket);
    for (auto& [tensor, copy] : copied_)
      if (tensor.defined()) tensor.copy_(copy);
    for (const Count& count : counted_) count.write();
    for (at::TensorImpl* t : bumped_)
      if (!t->is_inference()) t->bump_version();
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

  // What a kernel can work on in place of a tensor whose elements lie in another order than the parameter's.
  const at::Tensor& move_a_copy(const at::Tensor& p, bool dense, const at::Tensor& t, bool put_back) {
    at::NoGradGuard no_grad;
    at::Tensor copy = dense ? at::empty_strided(p.sizes(), p.strides(), t.options()) : at::empty(p.sizes(), t.options());
    copy.copy_(t);
    return copied_.emplace_back(put_back ? t : at::Tensor(), copy).second;
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
    if (forked.load() || share_memory(bucket.spans)) run(job, 0, tiles);
    else at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) { run(job, begin, end); });
  }

  static void run_on_device(Bucket& bucket) {
    c10::DeviceGuard guard(bucket.device);
    c10::impl::VirtualGuardImpl device_type(bucket.device.type());
    void* stream = reinterpret_cast<void*>(device_type.getStream(bucket.device).native_handle());
    Job job = bucket.job();
    const int64_t all = job.count, at_once = share_memory(bucket.spans) ? 1 : all;
    for (int64_t done = 0; done < all; done += at_once, job.spans += at_once) {
      job.count = at_once;
      const char* error = cuda_run(job, stream);
      TORCH_CHECK(error == nullptr, "adamfused: the step on ", bucket.device, " failed: ", error);
    }
  }

  std::vector<Bucket> buckets_;
  std::deque<std::pair<at::Tensor, at::Tensor>> copied_;  // (where it belongs or undefined, the copy that moves)
  std::vector<Count> counted_;
  std::vector<at::TensorImpl*> bumped_;
  std::vector<at::Tensor> kept_;
};

// ---- the two doors ------------------------------------------------------------------------------------------------

// What `step` found of a parameter that has a gradient: borrowed from Python objects that are held.
struct Found {
  size_t place;  // in its group
  Parts parts;
  const at::Tensor* count;
};

class Gatherer {
 public:
  Gatherer(const py::dict& state, const py::function& init) : state_(state), init_(init) {}
  ~Gatherer() {
    for (PyObject* object : held_) Py_DECREF(object);
  }

  std::vector<Found> gather(size_t j, const py::list& params, const py::tuple& keys) {
    std::vector<Found> all;
    all.reserve(params.size());
    const size_t states = keys.size();
    for (size_t i = 0; i < params.size(); ++i) {  // the size is asked anew each time: init runs user code
      PyObject* object = PyList_GET_ITEM(params.ptr(), Py_ssize_t(i));
      Found found{i, {}, nullptr};
      if ((found.parts[kParam] = hold_tensor(object)) != nullptr) {
        const at::Tensor& grad = found.parts[kParam]->unsafeGetTensorImpl()->grad();
        if (!grad.defined()) continue;
        found.parts[kGrad] = &grads_.emplace_back(grad);
        PyObject* entry = entry_of(object);
        if (entry == nullptr || !PyDict_Check(entry) || PyDict_Size(entry) == 0) {
          init_(j, i);
          entry = entry_of(object);
        }
        if (entry != nullptr && PyDict_Check(entry)) {
          found.count = hold_tensor(checked(PyDict_GetItemWithError(entry, step_key_.ptr())));
          for (size_t k = 0; k < states; ++k)
            found.parts[kState + k] =
                hold_tensor(checked(PyDict_GetItemWithError(entry, PyTuple_GET_ITEM(keys.ptr(), k))));
        }
      }
      all.push_back(found);
    }
    return all;
  }

 private:
  static PyObject* checked(PyObject* value) {
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  PyObject* entry_of(PyObject* param) {
#if PY_VERSION_HEX < 0x030d0000
    // A tensor's hash is its address, told by a Python function: to know it saves a tenth of a microsecond a tensor.
    // Where a subclass has another hash, this finds nothing and the usual way is taken.
    PyObject* known = checked(_PyDict_GetItem_KnownHash(state_.ptr(), param, reinterpret_cast<Py_hash_t>(param)));
    if (known != nullptr) return known;
#endif
    return checked(PyDict_GetItemWithError(state_.ptr(), param));
  }
  const at::Tensor* hold_tensor(PyObject* object) {
    if (object == nullptr || !THPVariable_Check(object)) return nullptr;
    Py_INCREF(object);
    held_.push_back(object);
    const at::Tensor& t = THPVariable_Unpack(object);
    // Whoever reads the tensor next would wait for the memory; many tensors' lines can be under way at once.
    const char* lines = reinterpret_cast<const char*>(t.unsafeGetTensorImpl());
    for (size_t at = 0; at < sizeof(at::TensorImpl); at += 64) __builtin_prefetch(lines + at);
    return &t;
  }

  const py::dict& state_;
  const py::function& init_;
  py::str step_key_ = py::reinterpret_steal<py::str>(PyUnicode_InternFromString("step"));
  std::vector<PyObject*> held_;
  std::deque<at::Tensor> grads_;  // a parameter may lose its gradient while the kernels run
};

// groups: (rule, hyper, lr, lr tensor or None, state keys, params). For the i-th parameter of the j-th group,
// init(j, i) makes its state, and judge(j, i) is asked where these kernels cannot move it: it raises, or gives
// (param, grad, *states, step) to move instead, or None to leave it to the caller. Returns what was left, [(j, i)].
py::list step(const py::dict& state, const py::list& groups, const py::function& init, const py::function& judge) {
  py::list left;
  std::vector<Group> all(groups.size());
  std::deque<std::vector<at::Tensor>> judged;  // what judge gave
  Gatherer gatherer(state, init);
  Step work;
  for (size_t j = 0; j < groups.size(); ++j) {
    auto [rule, hyper, lr, lr_tensor, keys, params] =
        groups[j].cast<std::tuple<int, std::vector<double>, double, c10::optional<at::Tensor>, py::tuple, py::list>>();
    TORCH_CHECK(rule >= 0 && rule < kRules && hyper.size() == kRuleFacts[rule].hyper_count &&
                    int(keys.size()) == kRuleFacts[rule].states,
                "adamfused._C.step: group ", j, " does not fit its rule");
    Group& group = all[j];
    group.rule = rule, group.lr = lr, group.lr_tensor = lr_tensor;
    std::copy(hyper.begin(), hyper.end(), group.hyper.begin());
    const size_t parts = kState + keys.size();

    for (Found& found : gatherer.gather(j, params, keys)) {
      bool moves = found.count != nullptr;
      for (size_t k = 0; k < parts; ++k) moves &= found.parts[k] != nullptr;
      if (moves && work.add(group, found.parts, *found.count)) continue;
      py::object verdict = judge(j, found.place);
      if (verdict.is_none()) {
        left.append(py::make_tuple(j, found.place));
        continue;
      }
      const auto& given = judged.emplace_back(verdict.cast<std::vector<at::Tensor>>());
      TORCH_CHECK(given.size() == parts + 1, "adamfused._C.step: judge gave the wrong number of tensors");
      for (size_t k = 0; k < parts; ++k) found.parts[k] = &given[k];
      TORCH_CHECK(work.add(group, found.parts, given.back()), "adamfused: parameter ", found.place, " of group ", j,
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
    Parts parts{};
    parts[kParam] = &params[i], parts[kGrad] = &grads[i];
    for (size_t k = 0; k < count; ++k) parts[kState + k] = &states[i * count + k];
    TORCH_CHECK(work.add(group, parts, steps[i]), "adamfused::step_: parameter ", i,
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
