// The sums that the norm of the gradients is made from; see csrc/sum.h. A warp takes a chunk, and a lane of it is a
// lane there. No torch here.
#define ADAMFUSED_TARGET cuda
#include "cuda/launch.cuh"
#include "cuda/step.h"

namespace adamfused {
namespace cuda {

constexpr int kSumThreads = 256, kWarp = 32;
static_assert(kLanes == kWarp, "");

struct SumArguments {
  // 4,096 bytes of arguments, as every CUDA release takes.
  static constexpr int entries = 140;
  Addends tensor[entries];
  uint32_t first_chunk[entries + 1];
  int32_t count;
  double* sums;
};
static_assert(sizeof(SumArguments) <= 4096, "kernel arguments are limited");

template <SumOf what, class Format>
__device__ __forceinline__ double sum_chunk(const void* data, int64_t start, int n, int lane) {
  using Sum = Summed<what>;
  const typename Format::Rest* from = static_cast<const typename Format::Rest*>(data) + start;
  double sum = 0.0;
  int i = lane;
  for (; i + 7 * kLanes < n; i += 8 * kLanes) {  // eight loads are under way before the first is waited for
    typename Format::Rest x[8];
    ADAMFUSED_UNROLL
    for (int j = 0; j < 8; ++j) x[j] = from[i + j * kLanes];
    ADAMFUSED_UNROLL
    for (int j = 0; j < 8; ++j) sum = Sum::join(sum, Sum::of(double(Format::get(x[j]))));
  }
  for (; i < n; i += kLanes) sum = Sum::join(sum, Sum::of(double(Format::get(from[i]))));
  ADAMFUSED_UNROLL
  for (unsigned half = kLanes / 2; half > 0; half /= 2) {
    const double other = __shfl_down_sync(0xffffffffu, sum, half);
    sum = Sum::join(sum, other);
  }
  return sum;
}

template <SumOf what>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ SumArguments job) {
  const int lane = int(threadIdx.x) % kWarp;
  const uint32_t warps = gridDim.x * (kSumThreads / kWarp);
  for (uint32_t chunk = blockIdx.x * (kSumThreads / kWarp) + threadIdx.x / kWarp; chunk < job.first_chunk[job.count];
       chunk += warps) {
    int t = 0, high = job.count;  // the last tensor whose first chunk is not past this one
    while (high - t > 1) {
      const int middle = (t + high) / 2;
      if (job.first_chunk[middle] <= chunk)
        t = middle;
      else
        high = middle;
    }
    const Addends& tensor = job.tensor[t];
    const int64_t start = int64_t(chunk - job.first_chunk[t]) * kChunk;
    const int n = int(tensor.numel - start < kChunk ? tensor.numel - start : kChunk);
    double sum = 0.0;
    switch (tensor.format) {
#define ADAMFUSED_CASE(F, ...)                             \
  case FormatId::F:                                        \
    sum = sum_chunk<what, F>(tensor.data, start, n, lane); \
    break;
      ADAMFUSED_NUMBER_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
      default:
        break;  // gradients have no other
    }
    if (lane == 0) job.sums[chunk] = sum;
  }
}

cudaError_t launch(SumOf what, const SumArguments& arguments, cudaStream_t stream) {
  const uint32_t chunks = arguments.first_chunk[arguments.count];
  if (chunks == 0) return cudaSuccess;
  constexpr uint32_t warps = kSumThreads / kWarp;
  const uint32_t needed = chunks / warps + (chunks % warps != 0), blocks = needed < 65536 ? needed : 65536;
  switch (what) {
    case SumOf::Squares:
      return start(sum_kernel<SumOf::Squares>, blocks, kSumThreads, stream, arguments);
    case SumOf::Largest:
      return start(sum_kernel<SumOf::Largest>, blocks, kSumThreads, stream, arguments);
    default:
      return start(sum_kernel<SumOf::Numbers>, blocks, kSumThreads, stream, arguments);
  }
}

// The sums of all chunks of a job, in as many launches as its tensors need.
cudaError_t sum(const SumJob& job, cudaStream_t stream) {
  SumArguments arguments;
  arguments.count = 0, arguments.first_chunk[0] = 0, arguments.sums = job.sums;
  cudaError_t error = cudaSuccess;
  for (int64_t t = 0; t < job.count && error == cudaSuccess; ++t) {
    const uint64_t chunks = uint64_t(chunks_of(job.tensors[t].numel));
    if (chunks == 0) continue;
    uint32_t* first = arguments.first_chunk + arguments.count;
    if (arguments.count == SumArguments::entries || *first + chunks > 0x7fffffffu) {
      error = launch(job.what, arguments, stream);
      arguments.sums += *first;
      arguments.count = 0, first = arguments.first_chunk;
    }
    arguments.tensor[arguments.count++] = job.tensors[t];
    first[1] = first[0] + uint32_t(chunks);
  }
  return error == cudaSuccess ? launch(job.what, arguments, stream) : error;
}

}  // namespace cuda

const char* cuda_sum(const SumJob& job, void* stream) {
  cudaError_t error = cuda::sum(job, static_cast<cudaStream_t>(stream));
  int64_t chunks = job.first_chunk[job.count];
  double* sums = job.sums;
  for (SumOf what = next(job.what); chunks > 1 && error == cudaSuccess; what = next(what)) {
    const Addends all{sums, FormatId::F64, chunks};
    sums += chunks;
    error = cuda::sum({what, &all, 1, nullptr, sums}, static_cast<cudaStream_t>(stream));
    chunks = chunks_of(chunks);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace adamfused
