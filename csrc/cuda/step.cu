// The rules on a GPU. No torch here: this file compiles, links and fails cleanly where there is no GPU.
#define ADAMFUSED_TARGET cuda
#include "cuda/run.cuh"

namespace adamfused {
namespace cuda {

static cudaError_t run_plain(const Job& job, cudaStream_t stream) {
  switch (job.rule) {
#define ADAMFUSED_CASE(R, ...) \
  case RuleId::R:              \
    return run_in<R<float>, R<double>>(job, stream);
    ADAMFUSED_RULES(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda

const char* cuda_run(const Job& job, void* stream) {
  const auto run = job.averaged ? cuda::run_averaged : cuda::run_plain;
  const cudaError_t error = run(job, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The runtime's last error is forgotten: else the next launch would be blamed for it.
static const char* told(cudaError_t error) {
  cudaGetLastError();
  return cudaGetErrorString(error);
}

const char* cuda_status() {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return told(error);
  return devices > 0 ? nullptr : "no CUDA device";
}

int cuda_compiled_version() { return CUDART_VERSION; }

const char* cuda_self_test() {
  constexpr int n = 1000;
  static float host[4][n], back[4][n];
  for (int i = 0; i < n; ++i) {
    host[0][i] = float(i) * 0.01f - 5.0f;
    host[1][i] = float((i * 7919) % 1000) * 0.003f - 1.5f;
    host[2][i] = host[3][i] = 0.0f;
  }
  cuda::AdamHyper hyper{0.9, 0.999, 1e-8, 0.01, 1.0, 0.0, 1.0};
  cuda::Adam<float> rule = cuda::Adam<float>::prepare(hyper, {1e-3, 1.0, 1.0, 0.0});
  Span span;
  for (void*& data : span.data) data = nullptr;
  void* memory = nullptr;
  cudaError_t error = cudaMalloc(&memory, sizeof host);
  if (error == cudaSuccess) error = cudaMemcpy(memory, host, sizeof host, cudaMemcpyHostToDevice);
  if (error == cudaSuccess) {
    for (int k = 0; k < 4; ++k) span.data[k] = static_cast<float*>(memory) + k * n, span.format[k] = FormatId::F32;
    span.aligned = true, span.recipe = 0;
    span.numel = n, span.step = nullptr;
    Job job{RuleId::Adam, false, false, &span, 1, &rule, nullptr, nullptr, nullptr, nullptr};
    error = cuda::run_plain(job, nullptr);
  }
  if (error == cudaSuccess) error = cudaMemcpy(back, memory, sizeof back, cudaMemcpyDeviceToHost);
  cudaFree(memory);
  if (error != cudaSuccess) return told(error);
  for (int i = 0; i < n; ++i) {
    apply(rule, host[0][i], host[1][i], host[2][i], host[3][i]);
    for (int k = 0; k < 4; ++k)
      if (cuda::bits_of(host[k][i]) != cuda::bits_of(back[k][i])) return "the device's bits differ from the host's";
  }
  return nullptr;
}

}  // namespace adamfused
