// Stands in for CUDA's header of this name, so that g++ compiles the kernels and a CPU runs them: the tests then
// compare their bits with the oracle's where there is no GPU. It is what csrc/cuda/ uses of CUDA, and more shuffles.
//
// What a GPU does at once is done here in some order: blocks one after another, and the threads of a block one after
// another from barrier to barrier, each on a stack of its own (a fiber). A kernel that is wrong in one order only is
// wrong, so the tests set the order (Settings). Strict where a GPU may be lenient: shared memory holds rubbish when a
// block begins, every thread must come to every barrier, and every access must be aligned.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __shared__ static thread_local  // thread_local only so that it can be found: see find_shared_memory

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// Variables are static, not inline: several libraries in one process would share those.
static struct {
  unsigned x;
} gridDim, blockDim, blockIdx, threadIdx;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
using cudaStream_t = struct CUstream_st*;

namespace cuda_on_host {

enum Order : int32_t { kUp, kDown, kMixed };

// For the tests to set, through ctypes.
static struct Settings {
  Order thread_order = kUp, block_order = kUp;
  uint32_t largest_grid = 0xffffffffu;  // a grid that is larger is cut, so that a block takes several tiles
  uint32_t first_block = 0;             // the blocks before it do not run: their memory may be missing
  int64_t launches = 0;                 // counted here
  int32_t large_arguments = true;       // as where no graph is captured
} settings;

// Which of n comes i-th. The factor is a prime, and larger than n, so that every one comes once.
inline uint32_t in_order(Order order, uint32_t i, uint32_t n) {
  return order == kUp ? i : order == kDown ? n - 1 - i : uint32_t(uint64_t(i) * 2654435761u % n);
}

constexpr uint32_t kMostThreads = 1024, kWarp = 32;

struct Fiber {
  ucontext_t entry;
  jmp_buf paused;
  bool begun = false, waits = false;
  uint32_t thread = 0;
  char stack[256 << 10];  // holds the kernel's arguments, 32 KB
};

static class Machine {
 public:
  std::string error;                 // what was wrong with the last launch
  uint64_t of_thread[kMostThreads];  // what a thread shows to the others of its warp

  // One launch, from beginning to end.
  cudaError_t launch(uint32_t blocks, uint32_t threads, std::function<void()> kernel) {
    if (blocks - 1 >= 0x7fffffffu || threads - 1 >= kMostThreads) return cudaErrorInvalidConfiguration;
    kernel_ = std::move(kernel), threads_ = threads, error.clear();
    ++settings.launches;
    gridDim.x = blocks < settings.largest_grid ? blocks : settings.largest_grid, blockDim.x = threads;
    find_shared_memory();
    for (uint32_t i = 0; i < gridDim.x && error.empty(); ++i) {
      blockIdx.x = in_order(settings.block_order, i, gridDim.x);
      if (blockIdx.x >= settings.first_block) run_block();
    }
    return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
  }

  // A thread comes to a barrier of `count` threads beginning with `first`, and goes on when all of them have come.
  void wait(uint32_t first, uint32_t count) {
    uint32_t& arrived = count == threads_ ? arrived_in_block_ : arrived_in_warp_[first / kWarp];
    running_->waits = true;
    if (++arrived == count) {
      arrived = 0;
      for (uint32_t t = first; t < first + count; ++t) fiber_of_[t]->waits = false;
    }
    pause();
  }

  // Ends the launch. The threads are left where they are, as a GPU leaves them.
  [[noreturn]] void fail(const std::string& what) {
    error = what;
    if (running_ != nullptr) _longjmp(scheduler_, 1);
    abort();  // not in a kernel
  }

 private:
  // Threads that meet no barrier all run on one fiber, one after another, and cost no switch.
  void run_block() {
    memset(shared_memory_, 0xff, shared_bytes_);  // as float or double: NaN
    memset(fiber_of_, 0, sizeof fiber_of_);
    memset(arrived_in_warp_, 0, sizeof arrived_in_warp_);
    arrived_in_block_ = 0;
    for (started_ = 0; started_ < threads_ && error.empty();) {
      if (idle_.empty()) idle_.push_back(fibers_.emplace_back(new Fiber).get());
      resume(idle_.back());
    }
    for (bool moved = true; moved && error.empty();) {
      moved = false;
      for (uint32_t i = 0; i < threads_ && error.empty(); ++i) {
        Fiber* fiber = fiber_of_[in_order(settings.thread_order, i, threads_)];
        if (fiber != nullptr && !fiber->waits) resume(fiber), moved = true;
      }
    }
    for (uint32_t t = 0; t < threads_ && error.empty(); ++t)
      if (fiber_of_[t] != nullptr) error = "a barrier that some threads wait at and others never come to";
    if (!error.empty()) idle_.clear(), fibers_.clear();
  }

  void resume(Fiber* fiber) {
    running_ = fiber;
    threadIdx.x = fiber->thread;
    if (_setjmp(scheduler_) == 0) {  // a context's own switch is a system call, so it is for the first time only
      if (fiber->begun) _longjmp(fiber->paused, 1);
      fiber->begun = true;
      getcontext(&fiber->entry);
      fiber->entry.uc_stack.ss_sp = fiber->stack;
      fiber->entry.uc_stack.ss_size = sizeof fiber->stack;
      makecontext(&fiber->entry, run_threads, 0);
      setcontext(&fiber->entry);
    }
    running_ = nullptr;
  }
  void pause() {
    if (_setjmp(running_->paused) == 0) _longjmp(scheduler_, 1);
  }

  static void run_threads();
  void run_threads_here() {
    for (Fiber* me = running_;; pause()) {
      idle_.pop_back();  // this one: whoever is resumed from there is the last
      while (started_ < threads_) {
        me->thread = threadIdx.x = in_order(settings.thread_order, started_++, threads_);
        fiber_of_[me->thread] = me;
        kernel_();
        fiber_of_[me->thread] = nullptr;
      }
      idle_.push_back(me);
    }
  }

  // The library's thread_local variables lie together, and all of them are __shared__ but one.
  void find_shared_memory() {
    static thread_local char one_of_them = 0;
    shared_memory_ = &one_of_them, shared_bytes_ = 1;
    auto look = [](dl_phdr_info* library, size_t, void* self) {
      char *&found = static_cast<Machine*>(self)->shared_memory_, *begin = static_cast<char*>(library->dlpi_tls_data);
      for (int i = 0; i < library->dlpi_phnum; ++i) {
        const size_t size = library->dlpi_phdr[i].p_memsz;
        if (library->dlpi_phdr[i].p_type == PT_TLS && begin != nullptr && begin <= found && found < begin + size)
          found = begin, static_cast<Machine*>(self)->shared_bytes_ = size;
      }
      return 0;
    };
    dl_iterate_phdr(look, this);
  }

  std::function<void()> kernel_;
  uint32_t threads_ = 0, started_ = 0, arrived_in_block_ = 0, arrived_in_warp_[kMostThreads / kWarp];
  std::vector<std::unique_ptr<Fiber>> fibers_;  // kept from launch to launch
  std::vector<Fiber*> idle_;
  Fiber* fiber_of_[kMostThreads];  // null: the thread has not begun, or is over
  Fiber* running_ = nullptr;
  jmp_buf scheduler_;
  char* shared_memory_ = nullptr;
  size_t shared_bytes_ = 0;
} machine;
inline void Machine::run_threads() { machine.run_threads_here(); }

// What a lane of the warp has, told to another.
template <class T>
T from_lane(uint32_t mask, T mine, uint32_t lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "");
  if (mask != 0xffffffffu) machine.fail("a shuffle of some lanes only is not made here");
  const uint32_t first = threadIdx.x / kWarp * kWarp, count = blockDim.x - first < kWarp ? blockDim.x - first : kWarp;
  memcpy(&machine.of_thread[threadIdx.x], &mine, sizeof mine);
  machine.wait(first, count);
  if (lane < count) memcpy(&mine, &machine.of_thread[first + lane], sizeof mine);
  machine.wait(first, count);
  return mine;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::machine.wait(0, blockDim.x); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { cuda_on_host::from_lane(mask, 0, 0); }
template <class T>
T __shfl_sync(uint32_t mask, T x, int lane) {
  return cuda_on_host::from_lane(mask, x, uint32_t(lane) % 32);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int other) {
  return cuda_on_host::from_lane(mask, x, threadIdx.x % 32 ^ uint32_t(other));
}
template <class T>
T __shfl_down_sync(uint32_t mask, T x, unsigned by) {
  return cuda_on_host::from_lane(mask, x, threadIdx.x % 32 + by);
}

// -fsanitize=alignment asks before every access, and calls this where the address is wrong.
extern "C" __attribute__((used)) void __ubsan_handle_type_mismatch_v1(void* site, uintptr_t) {
  const uint32_t line = *reinterpret_cast<uint32_t*>(static_cast<const char**>(site) + 1);
  const std::string file = *static_cast<const char**>(site);
  cuda_on_host::machine.fail("misaligned address in " + file + ":" + std::to_string(line));
}

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return cuda_on_host::machine.error.c_str();
  return error == cudaErrorInvalidConfiguration ? "invalid configuration" : "invalid value";
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // a launch gives its own error here
inline cudaError_t cudaMalloc(void** memory, size_t bytes) { return *memory = malloc(bytes), cudaSuccess; }
inline cudaError_t cudaFree(void* memory) { return free(memory), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return memcpy(to, from, bytes), cudaSuccess;
}
