#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernel_choice.h"

namespace less_cache {

/// The functions of the CUDA driver that the plugin calls, looked up once.
///
/// Nothing is linked: the library loads where there is no driver, and says so when it needs one.
struct Driver {
    decltype(&cuGetErrorName) get_error_name = nullptr;
    decltype(&cuGetErrorString) get_error_string = nullptr;
    decltype(&cuCtxGetCurrent) ctx_get_current = nullptr;
    decltype(&cuCtxPushCurrent) ctx_push = nullptr;
    decltype(&cuCtxPopCurrent) ctx_pop = nullptr;
    decltype(&cuCtxGetDevice) ctx_get_device = nullptr;
    decltype(&cuDeviceGetAttribute) device_get_attribute = nullptr;
    decltype(&cuModuleLoadDataEx) module_load = nullptr;
    decltype(&cuModuleUnload) module_unload = nullptr;
    decltype(&cuModuleGetFunction) module_get_function = nullptr;
    decltype(&cuFuncGetAttribute) func_get_attribute = nullptr;
    decltype(&cuFuncSetAttribute) func_set_attribute = nullptr;
    decltype(&cuLaunchKernel) launch_kernel = nullptr;
    decltype(&cuMemcpyDtoDAsync) memcpy_async = nullptr;
    /// CUDA 12.4 and later, else null.
    CUresult(CUDAAPI* func_load)(CUfunction) = nullptr;
    /// CUDA 12.0 and later, else null.
    CUresult(CUDAAPI* ctx_get_id)(CUcontext, unsigned long long*) = nullptr;

    /// @throws Refusal if there is no driver, or it lacks one of the functions.
    static const Driver& get();
};

/// @throws Refusal that names the call, CUDA's error, and `what` was to be done.
void check(const Driver& driver, CUresult result, const char* call, const char* what);

/// The context that is current to this thread.
///
/// @throws Refusal if there is none.
CUcontext current_context(const Driver& driver);

/// The current context's GPU.
///
/// @throws Refusal if there is none, or CUDA reports an error.
Device current_device(const Driver& driver);

}  // namespace less_cache
