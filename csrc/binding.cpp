// Between Python and the kernels. With tensors.h, step.h and gradients.h, which nothing else includes, the only file
// that sees torch.
//
// Two doors lead to the same engine. `step` reads parameters, gradients and states straight from the Python objects,
// so that the host pays a fraction of a microsecond a tensor; `adamfused::step_` is the operator that torch.compile
// sees. Nothing is kept from one step to the next: whatever the user replaced since is what moves.
#define ADAMFUSED_TARGET host
#include <pthread.h>
#include <torch/extension.h>
#include <torch/library.h>

#include "gradients.h"

namespace adamfused {
namespace {

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
    for (const auto& [param, before] : fresh_) {  // of a step that was refused
      const int failed =
          before ? PyDict_SetItem(state_.ptr(), param.ptr(), before.ptr()) : PyDict_DelItem(state_.ptr(), param.ptr());
      if (failed) PyErr_Clear();
    }
    for (PyObject* object : held_) Py_DECREF(object);
  }

  // The step is made: the states that `init` made stay.
  void keep() { fresh_.clear(); }

  // copies: as many tensors as params, or nothing.
  std::vector<Found> gather(size_t j, const py::list& params, const py::tuple& keys, const py::list& copies) {
    std::vector<Found> all;
    all.reserve(params.size());
    held_.reserve(held_.size() + params.size() * (kSlots + 1));
    const size_t states = keys.size();
    const bool copied = copies.size() == params.size();
    for (size_t i = 0; i < params.size(); ++i) {  // the size is asked anew each time: init runs user code
      PyObject* object = PyList_GET_ITEM(params.ptr(), Py_ssize_t(i));
      Found found{i, {}, nullptr};
      if ((found.parts[kParam] = hold_tensor(object)) != nullptr) {
        const at::Tensor& grad = found.parts[kParam]->unsafeGetTensorImpl()->grad();
        if (!grad.defined()) continue;
        found.parts[kGrad] = &grads_.emplace_back(grad);
        PyObject* entry = entry_of(object);
        if (entry == nullptr || !PyDict_Check(entry) || PyDict_Size(entry) == 0) {
          fresh_.emplace_back(py::reinterpret_borrow<py::object>(object), py::reinterpret_borrow<py::object>(entry));
          init_(j, i);
          entry = entry_of(object);
        }
        if (entry != nullptr && PyDict_Check(entry)) {
          // The entries as optimizers make them: step first, then the states in the rule's order.
          PyObject *key = nullptr, *value = nullptr;
          Py_ssize_t at = 0;
          auto next_is = [&](PyObject* wanted) { return PyDict_Next(entry, &at, &key, &value) && key == wanted; };
          auto look_up = [&](PyObject* wanted) {
            if (at >= 0 && next_is(wanted)) return value;
            at = -1;  // another order, or keys that are equal but not the same: the usual way
            return checked(PyDict_GetItemWithError(entry, wanted));
          };
          found.count = hold_tensor(look_up(step_key_.ptr()));
          for (size_t k = 0; k < states; ++k)
            found.parts[kState + k] = hold_tensor(look_up(PyTuple_GET_ITEM(keys.ptr(), k)));
          if (copied) found.parts[kState + states] = hold_tensor(PyList_GET_ITEM(copies.ptr(), Py_ssize_t(i)));
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
    return &THPVariable_Unpack(object);
  }

  const py::dict& state_;
  const py::function& init_;
  py::str step_key_ = py::reinterpret_steal<py::str>(PyUnicode_InternFromString("step"));
  std::vector<PyObject*> held_;
  std::vector<std::pair<py::object, py::object>> fresh_;  // a parameter whose state `init` makes, its entry before
  std::deque<at::Tensor> grads_;                          // a parameter may lose its gradient while the kernels run
};

// A number, a function of the step count, or None.
void take_ema_decay(const py::object& given, Group& group) {
  if (given.is_none()) return;
  group.averaged = true;
  if (PyFloat_Check(given.ptr()))
    group.ema_decay = given.cast<double>();
  else
    group.ema_decay_at = [given](double t) { return given(t).cast<double>(); };
}

// groups: (rule, hyper, lr, lr tensor or None, state keys, params, decay of the average or None, copies). For the i-th
// parameter of the j-th group, init(j, i) makes its state, and judge(j, i) is asked where these kernels cannot move it:
// it raises, or gives (param, grad, *states, maybe copy, step) to move instead, or None to leave it to the caller.
// factor and found_inf: as in Common. Returns what was left, [(j, i)].
py::list step(const py::dict& state, const py::list& groups, const py::function& init, const py::function& judge,
              const c10::optional<at::Tensor>& factor, const c10::optional<at::Tensor>& found_inf) {
  py::list left;
  std::vector<Group> all(groups.size());
  std::deque<std::vector<at::Tensor>> judged;  // what judge gave
  Gatherer gatherer(state, init);
  Step work({factor, found_inf});
  for (size_t j = 0; j < groups.size(); ++j) {
    auto [rule, hyper, lr, lr_tensor, keys, params, ema_decay, copies] =
        groups[j]
            .cast<std::tuple<int, std::vector<double>, double, c10::optional<at::Tensor>, py::tuple, py::list,
                             py::object, py::list>>();
    Group& group = all[j];
    group.rule = rule, group.lr = lr, group.lr_tensor = lr_tensor;
    take_ema_decay(ema_decay, group);
    TORCH_CHECK(rule >= 0 && rule < kRules && hyper.size() == group.facts().hyper_count &&
                    int(keys.size()) == group.facts().states,
                "adamfused._C.step: group ", j, " does not fit its rule");
    std::copy(hyper.begin(), hyper.end(), group.hyper.begin());
    const bool copied = copies.size() != 0;
    const size_t parts = kState + keys.size() + copied;

    std::vector<Found> found_here = gatherer.gather(j, params, keys, copies);
    work.expect(found_here.size());
    for (Found& found : found_here) {
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
  gatherer.keep();
  return left;
}

// (sums, left): for each device, the sum over the gradients of params, or of `grads` in their place if those are given;
// and the places of the parameters whose gradients these kernels cannot read. Those without a gradient are passed over.
py::tuple gradient_sums(const py::list& params, const c10::optional<std::vector<at::Tensor>>& grads, bool largest) {
  TORCH_CHECK(!grads || grads->size() == params.size(), "adamfused._C.gradient_sums: as many grads as params");
  GradientSum work(largest);
  py::list left;
  std::deque<at::Tensor> held;  // a parameter may lose its gradient while the kernels run
  for (size_t i = 0; i < params.size(); ++i) {
    PyObject* object = PyList_GET_ITEM(params.ptr(), Py_ssize_t(i));
    bool added = false;
    if (THPVariable_Check(object)) {
      const at::Tensor& param = THPVariable_Unpack(object);
      const at::Tensor& grad = held.emplace_back(grads ? (*grads)[i] : param.unsafeGetTensorImpl()->grad());
      added = !grad.defined() || work.add(param, grad);
    }
    if (!added) left.append(i);
  }
  std::vector<at::Tensor> sums;
  {
    py::gil_scoped_release others_may_run;
    sums = work.sums();
  }
  return py::make_tuple(sums, left);
}

at::Tensor gradient_norm_op(at::TensorList params, at::TensorList grads, bool largest) {
  TORCH_CHECK(grads.size() == params.size(), "adamfused::gradient_norm: as many grads as params");
  GradientSum work(largest);
  for (size_t i = 0; i < params.size(); ++i)
    TORCH_CHECK(work.add(params[i], grads[i]), "adamfused::gradient_norm: the gradient of parameter ", i,
                " cannot be read by the native kernels");
  const std::vector<at::Tensor> sums = work.sums();
  TORCH_CHECK(sums.size() == 1, "adamfused::gradient_norm: expected tensors of one device, got ", sums.size());
  if (largest) return sums[0];
  if (!sums[0].is_cpu()) return sums[0].sqrt();
  return at::scalar_tensor(std::sqrt(*sums[0].const_data_ptr<double>()), sums[0].options());  // torch's is not exact
}

at::Tensor gradient_norm_fake(at::TensorList params, at::TensorList, bool) {
  return at::empty({}, params[0].options().dtype(at::kDouble));
}

int rule_named(c10::string_view name) {
  for (int r = 0; r < kRules; ++r)
    if (name == kRuleFacts[r][0].name) return r;
  TORCH_CHECK(false, "adamfused::step_: no rule is called '", name, "'");
}

void step_op(at::TensorList params, at::TensorList grads, at::TensorList states, at::TensorList steps,
             at::TensorList copies, c10::string_view rule, at::ArrayRef<double> hyper, double lr,
             const c10::optional<at::Tensor>& lr_tensor, c10::optional<double> ema_decay,
             const c10::optional<at::Tensor>& factor) {
  Group group;
  group.rule = rule_named(rule);
  group.averaged = ema_decay.has_value(), group.ema_decay = ema_decay.value_or(0.0);
  const RuleFacts& facts = group.facts();
  const size_t n = params.size(), count = size_t(facts.states);
  TORCH_CHECK(hyper.size() == facts.hyper_count, "adamfused::step_: rule '", rule, "' takes ", facts.hyper_count,
              " hyper-parameters, got ", hyper.size());
  TORCH_CHECK(grads.size() == n && steps.size() == n && states.size() == n * count, "adamfused::step_: ", n,
              " params need as many grads and steps and ", n * count, " states, got ", grads.size(), ", ", steps.size(),
              " and ", states.size());
  TORCH_CHECK(copies.empty() || copies.size() == n, "adamfused::step_: ", n,
              " params need as many copies or none, got ", copies.size());
  group.lr = lr, group.lr_tensor = lr_tensor;
  std::copy(hyper.begin(), hyper.end(), group.hyper.begin());
  Step work({factor, c10::nullopt});
  for (size_t i = 0; i < n; ++i) {
    Parts parts{};
    parts[kParam] = &params[i], parts[kGrad] = &grads[i];
    for (size_t k = 0; k < count; ++k) parts[kState + k] = &states[i * count + k];
    if (!copies.empty()) parts[kState + count] = &copies[i];
    TORCH_CHECK(work.add(group, parts, steps[i]), "adamfused::step_: parameter ", i,
                " cannot be moved by the native kernels; an optimizer's step() outside of torch.compile says why");
  }
  work.run();
}

void step_fake(at::TensorList params, at::TensorList grads, at::TensorList states, at::TensorList,
               at::TensorList copies, c10::string_view, at::ArrayRef<double>, double, const c10::optional<at::Tensor>&,
               c10::optional<double>, const c10::optional<at::Tensor>&) {
  for (at::TensorList list : {params, grads, states, copies})
    for (const at::Tensor& t : list)
      TORCH_CHECK(t.is_meta(),
                  "adamfused::step_: some tensors are on the meta device, which has no memory, and some are on ",
                  t.device());
}

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
  for (const auto& facts : kRuleFacts) names.append(facts[0].name);
  return names;
}

}  // namespace
}  // namespace adamfused

TORCH_LIBRARY(adamfused, m) {
  m.def(
      "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] steps, Tensor(d!)[] copies, "
      "str rule, float[] hyper, float lr, Tensor? lr_tensor=None, float? ema_decay=None, "
      "Tensor? factor=None) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def("gradient_norm(Tensor[] params, Tensor[] grads, bool largest) -> Tensor", {at::Tag::pt2_compliant_tag});
}
void register_for_devices(torch::Library& m) {
  m.impl("step_", adamfused::step_op);
  m.impl("gradient_norm", adamfused::gradient_norm_op);
}
TORCH_LIBRARY_IMPL(adamfused, CPU, m) { register_for_devices(m); }
TORCH_LIBRARY_IMPL(adamfused, CUDA, m) { register_for_devices(m); }
TORCH_LIBRARY_IMPL(adamfused, Meta, m) {
  m.impl("step_", adamfused::step_fake);
  m.impl("gradient_norm", adamfused::gradient_norm_fake);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  pthread_atfork(nullptr, nullptr, [] { adamfused::forked.store(true); });
  m.def("step", &adamfused::step);
  m.def("gradient_sums", &adamfused::gradient_sums);
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
