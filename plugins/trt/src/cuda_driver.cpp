#include "cuda_driver.h"

#include <dlfcn.h>

#include "errors.h"

// cuda.h maps a function's name to that of the version it declares, such as cuCtxPopCurrent_v2.
#define LESS_CACHE_SPELLING(name) #name
#define LESS_CACHE_VERSIONED(name) LESS_CACHE_SPELLING(name)

namespace less_cache {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

template <typename Function>
void find_optional(void* library, const char* name, Function& function) {
    // POSIX promises that a function's address survives the way through void*.
    function = reinterpret_cast<Function>(dlsym(library, name));
}

template <typename Function>
void find(void* library, const char* name, Function& function) {
    find_optional(library, name, function);
    if (function == nullptr) {
        throw Refusal(ErrorKind::kFailedInitialization, "CUDA driver: ", kLibrary, " has no ", name,
                      "; install a newer driver");
    }
}

Driver load() {
    // Never closed: the driver stays for the process, as CUDA itself has it.
    void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* why = dlerror();
        throw Refusal(ErrorKind::kFailedInitialization, "CUDA driver: cannot load ", kLibrary, ": ",
                      why == nullptr ? "no reason given" : why);
    }
    Driver driver;
    find(library, LESS_CACHE_VERSIONED(cuGetErrorName), driver.get_error_name);
    find(library, LESS_CACHE_VERSIONED(cuGetErrorString), driver.get_error_string);
    find(library, LESS_CACHE_VERSIONED(cuCtxGetCurrent), driver.ctx_get_current);
    find(library, LESS_CACHE_VERSIONED(cuCtxPushCurrent), driver.ctx_push);
    find(library, LESS_CACHE_VERSIONED(cuCtxPopCurrent), driver.ctx_pop);
    find(library, LESS_CACHE_VERSIONED(cuCtxGetDevice), driver.ctx_get_device);
    find(library, LESS_CACHE_VERSIONED(cuDeviceGetAttribute), driver.device_get_attribute);
    find(library, LESS_CACHE_VERSIONED(cuModuleLoadDataEx), driver.module_load);
    find(library, LESS_CACHE_VERSIONED(cuModuleUnload), driver.module_unload);
    find(library, LESS_CACHE_VERSIONED(cuModuleGetFunction), driver.module_get_function);
    find(library, LESS_CACHE_VERSIONED(cuFuncGetAttribute), driver.func_get_attribute);
    find(library, LESS_CACHE_VERSIONED(cuFuncSetAttribute), driver.func_set_attribute);
    find(library, LESS_CACHE_VERSIONED(cuLaunchKernel), driver.launch_kernel);
    find(library, LESS_CACHE_VERSIONED(cuMemcpyDtoDAsync), driver.memcpy_async);
    find_optional(library, "cuFuncLoad", driver.func_load);
    find_optional(library, "cuCtxGetId", driver.ctx_get_id);
    return driver;
}

std::int32_t attribute(const Driver& driver, CUdevice device, CUdevice_attribute wanted) {
    int value = 0;
    check(driver, driver.device_get_attribute(&value, wanted, device), "cuDeviceGetAttribute",
          "asking for the GPU's properties");
    return value;
}

}  // namespace

const Driver& Driver::get() {
    // A failure is thrown again at the next call, which tries again.
    static const Driver driver = load();
    return driver;
}

void check(const Driver& driver, CUresult result, const char* call, const char* what) {
    if (result == CUDA_SUCCESS) {
        return;
    }
    const char* name = nullptr;
    const char* meaning = nullptr;
    if (driver.get_error_name(result, &name) != CUDA_SUCCESS || name == nullptr) {
        name = "an unknown error";
    }
    if (driver.get_error_string(result, &meaning) != CUDA_SUCCESS || meaning == nullptr) {
        meaning = "no description";
    }
    throw Refusal(ErrorKind::kFailedExecution, call, ": ", name, " (", meaning, "), ", what);
}

CUcontext current_context(const Driver& driver) {
    CUcontext context = nullptr;
    check(driver, driver.ctx_get_current(&context), "cuCtxGetCurrent", "finding the CUDA context");
    if (context == nullptr) {
        throw Refusal(ErrorKind::kFailedInitialization,
                      "CUDA context: none is current to this thread; call cudaSetDevice first");
    }
    return context;
}

Device current_device(const Driver& driver) {
    static_cast<void>(current_context(driver));
    CUdevice device = 0;
    check(driver, driver.ctx_get_device(&device), "cuCtxGetDevice", "finding the GPU");
    Device found;
    found.arch = 10 * attribute(driver, device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                 attribute(driver, device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    found.multiprocessors = attribute(driver, device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    found.shared_limit =
        attribute(driver, device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    return found;
}

}  // namespace less_cache
