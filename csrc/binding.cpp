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

// A number, a function of the step count, or None.
void take_ema_decay(const py::object& given, Group& group) {
  if (given.is_none()) return;
  group.averaged = true;
  if (PyFloat_Check(given.ptr()))
    group.ema_decay = given.cast<double>();
  else
    group.ema_decay_at = [given](double t) { return given(t).cast<double>(); };
}

// A row of `step`: a group.
struct Row {
  py::tuple keys, scales;
  py::list params, copies;
  py::object master, carried;  // their keys, or None
  int64_t master_size = 0;
  size_t states = 0;
  std::vector<int64_t> place_keys, firsts;

  Row(const py::tuple& row, Group& group) {
    TORCH_CHECK(row.size() == 12, "adamfused._C.step: a group has 12 entries, got ", row.size());
    group.rule = row[0].cast<int>(), group.lr = row[2].cast<double>();
    group.lr_tensor = row[3].cast<c10::optional<at::Tensor>>();
    keys = row[4].cast<py::tuple>(), params = row[5].cast<py::list>(), copies = row[7].cast<py::list>();
    if (row[8].is_none())
      master = py::none();
    else
      std::tie(master, master_size) = row[8].cast<std::tuple<py::object, int64_t>>();
    scales = row[9].cast<py::tuple>();
    take_ema_decay(row[6], group);
    if (!row[10].is_none())
      std::tie(group.at_random, place_keys, firsts) =
          row[10].cast<std::tuple<bool, std::vector<int64_t>, std::vector<int64_t>>>();
    carried = row[11];
    const auto hyper = row[1].cast<std::vector<double>>();
    TORCH_CHECK(group.rule >= 0 && group.rule < kRules && hyper.size() == group.facts().hyper_count &&
                    int(keys.size()) == group.facts().states && scales.size() == keys.size() &&
                    carried.is_none() != group.facts().carries &&
                    (copies.size() == 0 || copies.size() == params.size()) &&
                    (place_keys.empty() || (place_keys.size() == params.size() && firsts.size() == params.size())),
                "adamfused._C.step: a group does not fit its rule");
    std::copy(hyper.begin(), hyper.end(), group.hyper.begin());
    states = keys.size();
  }
  Chance chance(size_t place) const {
    if (place_keys.empty()) return {};
    return {true, uint32_t(place_keys[place]), uint32_t(uint64_t(firsts[place]))};
  }
};

// What `step` finds of a parameter that has a gradient: borrowed.
struct Found {
  size_t place;  // in its group
  Parts parts;
  c10::MaybeOwned<at::Tensor> grad;  // not the parameter's own reference, which may come to speak of another
  const at::Tensor *count, *carried;
  bool usual;  // its state has no master that was not asked for

  // On the way there: its state, or null, and where what that holds is to go.
  static constexpr size_t kValues = 3 + kMaxStates;  // count, carried, states, master
  PyObject *param, *state;
  size_t values;
  PyObject* value[kValues];
  const at::Tensor** to[kValues];

  void begin(size_t at, PyObject* object) {
    place = at, param = object, count = carried = nullptr, usual = true, state = nullptr, values = 0;
    for_each<0, kSlots>([this](auto k) { parts[k.value] = nullptr; });  // a loop is made a call that takes longer
  }
};

// Several, for a loop over them.
struct Some {
  Found *first, *last;
  Found* begin() const { return first; }
  Found* end() const { return last; }
};

// Finds the tensors of parameters from Python's objects. Hardly any of that is in a near cache when a step begins, and
// each thing is found by way of the one before. So some parameters are looked at side by side: each pass over them asks
// for the memory that the next one reads.
//
// While no Python code but the step's own can run, what is found need not be held, which would cost as much as to find
// it. Before any can, here or in another thread, `hold` must be called: before Python's objects are compared or made.
class Gatherer {
 public:
  static constexpr size_t kAtOnce = 16;

  Gatherer(const py::dict& state, const py::function& init) : state_(state), init_(init) {}
  ~Gatherer() {
    for (const auto& [param, before] : fresh_) {  // of a step that was refused
      const int failed =
          before ? PyDict_SetItem(state_.ptr(), param.ptr(), before.ptr()) : PyDict_DelItem(state_.ptr(), param.ptr());
      if (failed) PyErr_Clear();
    }
    for (size_t i = 0; i < held_; ++i) Py_DECREF(borrowed_[i]);
  }

  void hold() {
    for (; held_ < borrowed_.size(); ++held_) Py_INCREF(borrowed_[held_]);
    while (held_grads_.size() < grads_.size())
      held_grads_.push_back(at::Tensor(Held::reclaim_copy(grads_[held_grads_.size()])));
  }

  // The step is made: the states that `init` made stay.
  void keep() { fresh_.clear(); }

  // That so many parameters will be looked at.
  void expect(size_t params) { borrowed_.reserve(params * (kSlots + 2)), grads_.reserve(params); }

  // Looks at the j-th group's parameters, kAtOnce from `begin` on.
  Some gather(size_t j, const Row& row, size_t begin) {
    const size_t some = std::min(kAtOnce, row.params.size() - begin);
    PyObject* params[kAtOnce];
    for (size_t i = 0; i < some; ++i)
      __builtin_prefetch(params[i] = PyList_GET_ITEM(row.params.ptr(), Py_ssize_t(begin + i)));
    const at::Tensor* tensors[kAtOnce];
    for (size_t i = 0; i < some; ++i)
      if ((tensors[i] = tensor_of(params[i])) != nullptr) ask_for_impl(*tensors[i]);
    for (size_t i = 0; i < some; ++i)
      if (tensors[i] != nullptr) ask_for_64(tensors[i]->unsafeGetTensorImpl()->autograd_meta());
    size_t count = 0;
    for (size_t i = 0; i < some; ++i) {
      Found& here = found_[count];
      here.begin(begin + i, params[i]);
      if ((here.parts[kParam] = tensors[i]) != nullptr) {
        const at::Tensor& grad = tensors[i]->unsafeGetTensorImpl()->grad();
        if (!grad.defined()) continue;
        grads_.push_back(grad.unsafeGetTensorImpl());
        here.grad = c10::MaybeOwned<at::Tensor>::borrowed(grad), here.parts[kGrad] = &*here.grad;
        ask_for_impl(grad);
        here.state = look_up(borrow(params[i]));
        if (here.state != nullptr) __builtin_prefetch(borrow(here.state));
      }
      ++count;
    }
    const Some all{found_.data(), found_.data() + count};
    for (Found& here : all)
      if (here.parts[kGrad] != nullptr) find_state(j, here);
    for (Found& here : all)
      if (here.state != nullptr) find_values(row, here);
    if (row.copies.size() != 0)
      for (Found& here : all)
        here.parts[kCopy] = tensor_of(borrow(PyList_GET_ITEM(row.copies.ptr(), Py_ssize_t(here.place))));
    for (Found& here : all)
      for (size_t k = 0; k < here.values; ++k)
        if (const at::Tensor* t = *here.to[k] = tensor_of(here.value[k])) ask_for_impl(*t);
    for (Found& here : all) {
      if (here.state != nullptr) find_beside(row, here);
      for (size_t k = 0; k < kState + row.states; ++k) ask_for_storage(here.parts[k]);
      ask_for_storage(here.count);
    }
    return all;
  }

 private:
  // The first bytes of what need not begin with a line.
  static void ask_for_64(const void* object) {
    __builtin_prefetch(object), __builtin_prefetch(static_cast<const char*>(object) + 63);
  }
  static void ask_for_impl(const at::Tensor& t) {
    const char* impl = reinterpret_cast<const char*>(t.unsafeGetTensorImpl());
    for (size_t at = 0; at < sizeof(at::TensorImpl); at += 64) __builtin_prefetch(impl + at);
    __builtin_prefetch(impl + sizeof(at::TensorImpl) - 1);  // it need not begin with a line
  }
  static void ask_for_storage(const at::Tensor* t) {
    if (t == nullptr || !t->defined()) return;
    ask_for_64(t->unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
  }

  // A dict, made if there is none yet; or null.
  void find_state(size_t j, Found& here) {
    auto is_there = [&here] { return here.state != nullptr && PyDict_Check(here.state) && entries_of(here.state) > 0; };
    auto look_again = [&] {
      if ((here.state = look_up(here.param)) != nullptr) borrow(here.state);
    };
    if (!is_there()) look_again();  // the same parameter may have come before
    if (!is_there()) {
      fresh_.emplace_back(py::reinterpret_borrow<py::object>(here.param),
                          py::reinterpret_borrow<py::object>(here.state));
      hold();
      init_(j, here.place);
      look_again();
    }
    if (here.state != nullptr && !PyDict_Check(here.state)) here.state = nullptr;
    if (here.state != nullptr) __builtin_prefetch(reinterpret_cast<PyDictObject*>(here.state)->ma_keys);
  }

  // The entries as optimizers make them: step first, then the states in the rule's order.
  void find_values(const Row& row, Found& here) {
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t at = 0;
    auto next_is = [&](PyObject* wanted) { return PyDict_Next(here.state, &at, &key, &value) && key == wanted; };
    auto entry = [&](PyObject* wanted) {
      if (at >= 0 && next_is(wanted)) return value;
      at = -1;  // another order, or keys that are equal but not the same: the usual way
      hold();
      return checked(PyDict_GetItemWithError(here.state, wanted));
    };
    auto take = [&](PyObject* wanted, const at::Tensor** to) {
      PyObject* found = entry(wanted);
      if (found == nullptr) return;
      __builtin_prefetch(borrow(found));
      here.value[here.values] = found, here.to[here.values++] = to;
    };
    take(step_key_.ptr(), &here.count);
    if (!row.carried.is_none()) take(row.carried.ptr(), &here.carried);
    for (size_t k = 0; k < row.states; ++k)
      take(PyTuple_GET_ITEM(row.keys.ptr(), Py_ssize_t(k)), &here.parts[kState + k]);
    if (!row.master.is_none()) take(row.master.ptr(), &here.parts[kMaster]);
  }

  // If a state has more than that: the scales of codes; and whether there is a master that nobody asked for, which
  // would be passed over, and with it half of the weight.
  void find_beside(const Row& row, Found& here) {
    Py_ssize_t expected = Py_ssize_t(1 + row.states + !row.master.is_none() + !row.carried.is_none());
    if (entries_of(here.state) == expected) return;
    for (size_t k = 0; k < row.states; ++k) {
      const at::Tensor* state = here.parts[kState + k];
      if (state == nullptr || !is_code(state->scalar_type())) continue;
      hold();
      PyObject* scale = checked(PyDict_GetItemWithError(here.state, PyTuple_GET_ITEM(row.scales.ptr(), Py_ssize_t(k))));
      here.parts[kScale + k] = tensor_of(scale == nullptr ? nullptr : borrow(scale));
      ++expected;
    }
    if (entries_of(here.state) > expected && row.master.is_none()) {
      hold();
      here.usual = PyDict_GetItemString(here.state, "master") == nullptr;
    }
  }

  static Py_ssize_t entries_of(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_used; }
  static PyObject* checked(PyObject* value) {
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  PyObject* look_up(PyObject* param) {
    PyObject *key = nullptr, *value = nullptr;
    if (in_order_ && PyDict_Next(state_.ptr(), &next_, &key, &value) && key == param) return value;
    in_order_ = false;
    hold();
#if PY_VERSION_HEX < 0x030d0000
    // A tensor's hash is its address, told by a Python function: to know it saves a tenth of a microsecond a tensor.
    // Where a subclass has another hash, this finds nothing and the usual way is taken.
    PyObject* known = checked(_PyDict_GetItem_KnownHash(state_.ptr(), param, reinterpret_cast<Py_hash_t>(param)));
    if (known != nullptr) return known;
#endif
    return checked(PyDict_GetItemWithError(state_.ptr(), param));
  }
  PyObject* borrow(PyObject* object) {
    borrowed_.push_back(object);
    return object;
  }
  static const at::Tensor* tensor_of(PyObject* object) {
    return object != nullptr && THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
  }

  const py::dict& state_;
  const py::function& init_;
  std::array<Found, kAtOnce> found_;
  py::str step_key_ = py::reinterpret_steal<py::str>(PyUnicode_InternFromString("step"));
  bool in_order_ = true;  // so far, the parameters stand in `state_` as in the groups
  Py_ssize_t next_ = 0;
  std::vector<PyObject*> borrowed_;
  size_t held_ = 0;                                       // of them
  std::vector<std::pair<py::object, py::object>> fresh_;  // a parameter whose state `init` makes, its entry before
  using Held = c10::intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>;
  std::vector<at::TensorImpl*> grads_;  // borrowed
  std::vector<at::Tensor> held_grads_;  // the first of them: a parameter may lose its gradient while the kernels run
};

// groups: (rule, hyper, lr, lr tensor or None, state keys, params, decay of the average or None, copies, (key of the
// master weights, bytes of one) or None, keys of the scales, None or (16 bits are rounded at random, keys of the
// params, indices of their first elements), key of what the rule carries or None). For the i-th parameter of the j-th
// group, init(j, i) makes its state, and judge(j, i) is asked where these kernels cannot move it: it raises, or gives
// [param, grad, *states, copy, master, *scales, carried, step], with None for what is not there, to move instead; or
// None to leave it to the caller. factor and found_inf: as in Common. Returns what was left, [(j, i)].
py::list step(const py::dict& state, const py::list& groups, const py::function& init, const py::function& judge,
              const c10::optional<at::Tensor>& factor, const c10::optional<at::Tensor>& found_inf) {
  const OneThreadIfForked here;
  py::list left;
  std::vector<Group> all(groups.size());
  std::vector<Row> rows;  // all of them first, because Python's objects are made for it
  rows.reserve(groups.size());
  size_t params = 0;
  for (size_t j = 0; j < groups.size(); ++j)
    params += rows.emplace_back(groups[j].cast<py::tuple>(), all[j]).params.size();
  std::deque<std::vector<c10::optional<at::Tensor>>> judged;  // what judge gave
  Gatherer gatherer(state, init);
  Step work({factor, found_inf});
  work.expect(params), gatherer.expect(params);
  for (size_t j = 0; j < groups.size(); ++j) {
    const Group& group = all[j];
    const Row& row = rows[j];
    const size_t states = row.states;
    const bool copied = row.copies.size() != 0, mastered = !row.master.is_none();
    const bool plain = !copied && !mastered && row.carried.is_none();
    // Python code may run where a decay is asked for, and where torch reads a number from a tensor.
    const bool quiet = plain && !group.ema_decay_at && !group.lr_tensor && !factor && !found_inf;
    for (size_t begin = 0; begin < row.params.size(); begin += Gatherer::kAtOnce) {
      const Some all_found = gatherer.gather(j, row, begin);
      if (!quiet) gatherer.hold();
      for (Found& found : all_found) {
        const Chance chance = row.chance(found.place);
        bool moves = found.usual && found.count != nullptr && copied == (found.parts[kCopy] != nullptr) &&
                     mastered == (found.parts[kMaster] != nullptr) &&
                     (!mastered || int64_t(found.parts[kMaster]->itemsize()) == row.master_size);
        for (size_t k = 0; k < kState + states; ++k) moves &= found.parts[k] != nullptr;
        if (moves && plain && work.add_plain(group, found.parts, *found.count)) continue;
        gatherer.hold();
        if (moves && work.add(group, found.parts, *found.count, found.carried, chance)) continue;
        py::object verdict = judge(j, found.place);
        if (verdict.is_none()) {
          left.append(py::make_tuple(j, found.place));
          continue;
        }
        const auto& given = judged.emplace_back(verdict.cast<std::vector<c10::optional<at::Tensor>>>());
        TORCH_CHECK(given.size() == kState + 2 * states + 4,
                    "adamfused._C.step: judge gave the wrong number of tensors");
        auto tensor = [&given](size_t i) { return given[i] ? &*given[i] : nullptr; };
        for (size_t k = 0; k < kState + states; ++k) found.parts[k] = tensor(k);
        found.parts[kCopy] = tensor(kState + states), found.parts[kMaster] = tensor(kState + states + 1);
        for (size_t k = 0; k < states; ++k) found.parts[kScale + k] = tensor(kState + states + 2 + k);
        TORCH_CHECK(work.add(group, found.parts, *given.back(), tensor(given.size() - 2), chance),
                    "adamfused: parameter ", found.place, " of group ", j,
                    " cannot be moved by the native kernels, and the check of its tensors found no reason");
      }
    }
  }
  if (work.is_brief()) {
    work.run();
  } else {
    gatherer.hold();
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
  const OneThreadIfForked here;
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
             at::TensorList copies, at::TensorList masters, at::TensorList scales, at::TensorList carried,
             c10::string_view rule, at::ArrayRef<double> hyper, double lr, const c10::optional<at::Tensor>& lr_tensor,
             c10::optional<double> ema_decay, const c10::optional<at::Tensor>& factor, bool at_random,
             at::IntArrayRef place_keys, at::IntArrayRef firsts) {
  const OneThreadIfForked here;
  Group group;
  group.rule = rule_named(rule);
  group.averaged = ema_decay.has_value(), group.ema_decay = ema_decay.value_or(0.0), group.at_random = at_random;
  const RuleFacts& facts = group.facts();
  const size_t n = params.size(), count = size_t(facts.states);
  TORCH_CHECK(hyper.size() == facts.hyper_count, "adamfused::step_: rule '", rule, "' takes ", facts.hyper_count,
              " hyper-parameters, got ", hyper.size());
  TORCH_CHECK(grads.size() == n && steps.size() == n && states.size() == n * count, "adamfused::step_: ", n,
              " params need as many grads and steps and ", n * count, " states, got ", grads.size(), ", ", steps.size(),
              " and ", states.size());
  auto none_or = [](size_t size, size_t wanted, const char* what) {
    TORCH_CHECK(size == 0 || size == wanted, "adamfused::step_: expected no ", what, " or ", wanted, ", got ", size);
  };
  none_or(copies.size(), n, "copies"), none_or(masters.size(), n, "masters");
  none_or(scales.size(), n * count, "scales"), none_or(place_keys.size(), n, "place_keys");
  none_or(firsts.size(), place_keys.size(), "firsts");
  TORCH_CHECK(carried.size() == (facts.carries ? n : 0), "adamfused::step_: rule '", rule, "' carries ",
              facts.carries ? "a number for each of the params" : "nothing", ", got ", carried.size(), " tensors");
  group.lr = lr, group.lr_tensor = lr_tensor;
  std::copy(hyper.begin(), hyper.end(), group.hyper.begin());
  Step work({factor, c10::nullopt});
  for (size_t i = 0; i < n; ++i) {
    Parts parts{};
    Chance chance;
    parts[kParam] = &params[i], parts[kGrad] = &grads[i];
    for (size_t k = 0; k < count; ++k) {
      parts[kState + k] = &states[i * count + k];
      if (!scales.empty() && scales[i * count + k].numel() != 0) parts[kScale + k] = &scales[i * count + k];
    }
    if (!copies.empty()) parts[kCopy] = &copies[i];
    if (!masters.empty()) parts[kMaster] = &masters[i];
    if (!place_keys.empty()) chance = {true, uint32_t(place_keys[i]), uint32_t(uint64_t(firsts[i]))};
    TORCH_CHECK(work.add(group, parts, steps[i], carried.empty() ? nullptr : &carried[i], chance),
                "adamfused::step_: parameter ", i,
                " cannot be moved by the native kernels; an optimizer's step() outside of torch.compile says why");
  }
  work.run();
}

void step_fake(at::TensorList params, at::TensorList grads, at::TensorList states, at::TensorList,
               at::TensorList copies, at::TensorList masters, at::TensorList scales, at::TensorList, c10::string_view,
               at::ArrayRef<double>, double, const c10::optional<at::Tensor>&, c10::optional<double>,
               const c10::optional<at::Tensor>&, bool, at::IntArrayRef, at::IntArrayRef) {
  for (at::TensorList list : {params, grads, states, copies, masters, scales})
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
      "Tensor(e!)[] masters, Tensor(f!)[] scales, Tensor(g!)[] carried, str rule, float[] hyper, float lr, Tensor? "
      "lr_tensor=None, "
      "float? ema_decay=None, Tensor? factor=None, bool at_random=False, int[] place_keys=[], int[] firsts=[]) -> ()",
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
