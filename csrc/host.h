// What each call finds on its thread and process: the instruction set in use, the settings of arithmetic, a fork.
// Included by step.h.
#pragma once

#include <fenv.h>
#include <omp.h>

#include <atomic>

#include "cpu/isa.h"

namespace adamfused {
namespace {

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

// In a forked child, also torch's operations use one thread while this lives: those that make states and copies.
class OneThreadIfForked {
 public:
  OneThreadIfForked() : before_(forked.load() ? omp_get_max_threads() : 0) {
    if (before_ > 1) omp_set_num_threads(1);
  }
  ~OneThreadIfForked() {
    if (before_ > 1) omp_set_num_threads(before_);
  }

 private:
  const int before_;
};

}  // namespace
}  // namespace adamfused
