// Takes the place of csrc/cuda/launch.cuh by coming before it in the order of include folders.
#pragma once

#include <cuda_runtime.h>

namespace adamfused {

template <class Argument>
cudaError_t start(void (*kernel)(Argument), uint32_t blocks, uint32_t threads, cudaStream_t, const Argument& argument) {
  static_assert(sizeof(Argument) <= (CUDART_VERSION >= 12010 ? 32764 : 4096), "kernel arguments are limited");
  if (sizeof(Argument) > 4096 && !cuda_on_host::settings.large_arguments) return cudaErrorInvalidValue;
  return cuda_on_host::machine.launch(blocks, threads, [&] { kernel(argument); });
}

inline bool takes_large_arguments(cudaStream_t) { return cuda_on_host::settings.large_arguments; }

}  // namespace adamfused
