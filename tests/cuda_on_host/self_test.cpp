// Kernels that test the stand-in itself.
#include "cuda/launch.cuh"

// The sum over a block, for every thread: shuffles within the warps, shared memory and barriers between them.
void sum_kernel(int* numbers) {
  __shared__ int of_warp[4];
  const unsigned t = threadIdx.x;
  int up = numbers[t], down = numbers[t];
  for (int by = 16; by > 0; by /= 2) up += __shfl_xor_sync(0xffffffffu, up, by);
  if (t < 32) __syncwarp();  // a warp may meet its own barriers alone
  for (unsigned by = 16; by > 0; by /= 2) down += __shfl_down_sync(0xffffffffu, down, by);
  down = __shfl_sync(0xffffffffu, down, 0);
  if (t % 32 == 0) of_warp[t / 32] = up + down;
  __syncthreads();
  numbers[t] = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) numbers[t] += of_warp[warp];
}
// Tells what it finds in shared memory, where the block before has written.
void stale_kernel(int* numbers) {
  __shared__ int left;
  if (threadIdx.x == 0) numbers[blockIdx.x] = left;
  left = 7;
}
void order_kernel(int* numbers) {
  static int last;
  numbers[blockIdx.x * blockDim.x + threadIdx.x] = ++last;
}
void half_barrier_kernel(int*) {
  if (threadIdx.x % 2 == 0) __syncthreads();
}
void load_kernel(int* numbers) { numbers[8] = int(reinterpret_cast<uint4*>(numbers + 2)->x); }
void store_kernel(int* numbers) { *reinterpret_cast<double2*>(numbers + 2) = make_double2(0, 0); }

#pragma GCC visibility push(default)
extern "C" {

cuda_on_host::Settings* host_settings() { return &cuda_on_host::settings; }

const char* host_kernel(const char* name, int* numbers, uint32_t blocks, uint32_t threads) {
  cudaError_t error = cudaErrorInvalidValue;
#define RUN(kernel) \
  if (!strcmp(name, #kernel)) error = adamfused::start(kernel##_kernel, blocks, threads, nullptr, numbers);
  RUN(sum) RUN(stale) RUN(order) RUN(half_barrier) RUN(load) RUN(store) return error == cudaSuccess
      ? nullptr
      : cudaGetErrorString(error);
}
}
