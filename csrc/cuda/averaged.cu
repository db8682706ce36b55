// The rules on a GPU, each with an average of the weights.
#define ADAMFUSED_TARGET cuda
#include "cuda/run.cuh"

namespace adamfused {
namespace cuda {

cudaError_t run_averaged(const Job& job, cudaStream_t stream) {
  switch (job.rule) {
#define ADAMFUSED_CASE(R, ...) \
  case RuleId::R:              \
    return run_in<Averaged<R, float>, Averaged<R, double>>(job, stream);
    ADAMFUSED_RULES(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace adamfused
