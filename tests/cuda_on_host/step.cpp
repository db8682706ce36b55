// csrc/cuda/step.cu and averaged.cu as a library for tests/test_cuda_on_host.py. -DONLY=RULE leaves out the other rules, and of this one
// all but two of the kernels: averaged, of plain floats and of every format. That compiles sooner.
#define __CUDACC__  // as nvcc does before the first line of a .cu
#include "cuda_runtime.h"
#define ADAMFUSED_TARGET cuda
#include "job.h"
#ifdef ONLY
#undef ADAMFUSED_RULES
#define ADAMFUSED_RULES(RULE) RULE(ONLY, "")
#include "cuda/step.cuh"
namespace adamfused::cuda {
template <class Rule, class T, int E, bool stored, bool large>
void only_kernel(const Arguments<Rule, stored, large> job) {
  if constexpr (Rule::averages && same<T, float> && (E == 4 || stored))
    step_kernel<Rule, T, E, stored, large>(job);
  else
    cuda_on_host::machine.fail("this kernel was left out");
}
}  // namespace adamfused::cuda
#define step_kernel only_kernel
#endif
#include "cuda/averaged.cu"
#undef ADAMFUSED_TARGET
#include "cuda/step.cu"

using namespace adamfused;

template <class Rule>
void about(int64_t* facts, const double* numbers, const cuda::Now* now, void* rule) {
  int64_t* fact = facts;
  for (size_t x : {size_t(Rule::states), sizeof(typename Rule::Hyper) / sizeof(double), sizeof(Rule),
                   size_t(cuda::Arguments<Rule, false, cuda::kKnowsLarge>::entries),
                   size_t(cuda::Arguments<Rule, true, cuda::kKnowsLarge>::entries),
                   size_t(cuda::Arguments<Rule, true, false>::entries)})
    *fact++ = int64_t(x);
  if (rule == nullptr) return;
  const Rule made = Rule::prepare(cuda::hyper_of<typename Rule::Hyper>(numbers), *now);
  memcpy(rule, &made, sizeof made);
}

#pragma GCC visibility push(default)
extern "C" {

cuda_on_host::Settings* host_settings() { return &cuda_on_host::settings; }

const char* host_run(const Job* job) { return cuda_run(*job, nullptr); }

const char* host_self_test() { return cuda_self_test(); }

// Of a rule: its states, the numbers it is made from, its size, the tensors of a launch of plain numbers, of any, and with few arguments. Makes one where `rule` says.
void host_rule(RuleId which, bool averaged, bool in_double, int64_t* facts, const double* hyper, const cuda::Now* now,
               void* rule) {
  using namespace cuda;
  switch (which) {
#define CASE(R, ...)                                                                                                \
  case RuleId::R:                                                                                                   \
    return averaged ? (in_double ? about<Averaged<R, double>> : about<Averaged<R, float>>)(facts, hyper, now, rule) \
                    : (in_double ? about<R<double>> : about<R<float>>)(facts, hyper, now, rule);
    ADAMFUSED_RULES(CASE)
    default:
      abort();
  }
}

// How the structs of job.h lie, which the tests mirror, and the numbers that say where the seams are.
void host_facts(int64_t* fact) {
  auto put = [&fact](std::initializer_list<size_t> numbers) {
    for (size_t x : numbers) *fact++ = int64_t(x);
  };
  put({sizeof(Span), offsetof(Span, data), offsetof(Span, format), offsetof(Span, aligned)});
  put({offsetof(Span, key), offsetof(Span, t), offsetof(Span, first)});
  put({offsetof(Span, recipe), offsetof(Span, numel), offsetof(Span, step), offsetof(Span, carried)});
  put({sizeof(Recipe), offsetof(Recipe, hyper), offsetof(Recipe, lr), offsetof(Recipe, t)});
  put({offsetof(Recipe, ema_decay), offsetof(Recipe, carried), offsetof(Recipe, lr_on_device), offsetof(Recipe, lr_is_double)});
  put({sizeof(Job), offsetof(Job, rule), offsetof(Job, averaged), offsetof(Job, in_double), offsetof(Job, spans)});
  put({offsetof(Job, count), offsetof(Job, rules), offsetof(Job, recipes), offsetof(Job, factor)});
  put({offsetof(Job, found_inf), offsetof(Job, first_tile)});
  put({size_t(cuda::kThreads), size_t(cuda::kRounds), size_t(cuda::kTable<cuda::kKnowsLarge>)});
}
}
