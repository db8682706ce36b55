// How a kernel is started, in a file of its own so that the tests can start the same kernels on a CPU.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace adamfused {

template <class Argument>
cudaError_t start(void (*kernel)(Argument), uint32_t blocks, uint32_t threads, cudaStream_t stream,
                  const Argument& argument) {
  kernel<<<blocks, threads, 0, stream>>>(argument);
  return cudaGetLastError();
}

}  // namespace adamfused
