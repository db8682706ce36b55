// What binding.cpp needs of CUDA, without its headers.
#pragma once

#include "sum.h"

namespace adamfused {

// Launches a job on a stream of the current device and returns null, or what is wrong. The step counts that lie on
// the device have then been advanced by one; those on the host are the caller's to advance.
const char* cuda_run(const Job& job, void* stream);

// Launches a sum over tensors of the current device; `job.sums` has room for sums_of(all chunks). Null, or what is
// wrong.
const char* cuda_sum(const SumJob& job, void* stream);

// Null if there is a device to run on, or why not.
const char* cuda_status();

// The CUDA release that the kernels were compiled with, as 1000 * major + 10 * minor.
int cuda_compiled_version();

// Moves 1,000 numbers on the current device and compares them with the host's bits: null, or what went wrong.
const char* cuda_self_test();

}  // namespace adamfused
