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

// Whether a launch on a stream may have more than 4,096 bytes of arguments: if the driver knows of them, and no graph
// is being captured.
inline bool takes_large_arguments(cudaStream_t stream) {
  static const bool known = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
  }();
  cudaStreamCaptureStatus status;
  if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return known && status == cudaStreamCaptureStatusNone;
  cudaGetLastError();  // another stream is being captured, which forbids to ask; the launch will say so
  return false;
}

}  // namespace adamfused
