// csrc/cuda/sum.cu as a library for tests/test_cuda_sums_on_host.py.
#define __CUDACC__  // as nvcc does before the first line of a .cu
#include "cuda/sum.cu"
#include "cuda_runtime.h"

using namespace adamfused;

#pragma GCC visibility push(default)
extern "C" {

cuda_on_host::Settings* host_settings() { return &cuda_on_host::settings; }

const char* host_run(const SumJob* job) { return cuda_sum(*job, nullptr); }

int64_t host_sums_of(int64_t chunks) { return sums_of(chunks); }

// How the structs of sum.h lie, which the tests mirror, and the numbers that say where the seams are.
void host_facts(int64_t* fact) {
  auto put = [&fact](std::initializer_list<size_t> numbers) {
    for (size_t x : numbers) *fact++ = int64_t(x);
  };
  put({sizeof(Addends), offsetof(Addends, data), offsetof(Addends, format), offsetof(Addends, numel)});
  put({sizeof(SumJob), offsetof(SumJob, what), offsetof(SumJob, tensors), offsetof(SumJob, count)});
  put({offsetof(SumJob, first_chunk), offsetof(SumJob, sums)});
  put({size_t(kChunk), size_t(kLanes), size_t(cuda::SumArguments::entries), size_t(cuda::kSumThreads)});
}
}
