#include "module_cache.h"

#include <array>
#include <cstdio>
#include <map>
#include <mutex>
#include <utility>

#include "embedded_kernels.h"
#include "errors.h"

namespace less_cache {
namespace {

/// Shared memory that needs no function attribute.
constexpr std::int32_t kUsualShared = 48 * 1024;

using Key = std::pair<unsigned long long, const KernelRecord*>;

struct Cache {
    std::mutex mutex;
    std::map<Key, std::weak_ptr<const Kernel>> kernels;
};

Cache& cache() {
    static Cache instance;
    return instance;
}

/// A number that a context does not share with one that came after it at the same address.
unsigned long long identity(const Driver& driver, CUcontext context) {
    unsigned long long id = 0;
    if (driver.ctx_get_id != nullptr && driver.ctx_get_id(context, &id) == CUDA_SUCCESS) {
        return id;
    }
    return reinterpret_cast<unsigned long long>(context);
}

}  // namespace

Kernel::Kernel(const Driver& driver, const KernelRecord& record, const void* image)
    : driver_(driver), context_(current_context(driver)) {
    std::array<char, 2048> log{};
    std::array<CUjit_option, 2> options{CU_JIT_ERROR_LOG_BUFFER,
                                        CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
    std::array<void*, 2> values{log.data(), reinterpret_cast<void*>(log.size() - 1)};
    const CUresult result = driver.module_load(
        &module_, image, static_cast<unsigned>(options.size()), options.data(), values.data());
    const std::string what = text("loading ", record.symbol, " for sm_", record.arch,
                                  record.ptx ? " from PTX " : " ", log.data());
    check(driver, result, "cuModuleLoadDataEx", what.c_str());
    try {
        prepare(record);
    } catch (...) {
        unload();
        throw;
    }
}

Kernel::~Kernel() { unload(); }

void Kernel::prepare(const KernelRecord& record) {
    const std::string what = text("preparing ", record.symbol);
    check(driver_, driver_.module_get_function(&function_, module_, record.symbol),
          "cuModuleGetFunction", what.c_str());
    if (driver_.func_load != nullptr) {
        check(driver_, driver_.func_load(function_), "cuFuncLoad", what.c_str());
    } else {
        // Before CUDA 12.4, asking for an attribute is what ends lazy loading.
        int registers = 0;
        check(driver_,
              driver_.func_get_attribute(&registers, CU_FUNC_ATTRIBUTE_NUM_REGS, function_),
              "cuFuncGetAttribute", what.c_str());
    }
    if (record.shared_bytes > kUsualShared) {
        check(driver_,
              driver_.func_set_attribute(function_, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                         record.shared_bytes),
              "cuFuncSetAttribute", what.c_str());
    }
}

void Kernel::unload() noexcept {
    // A context that is gone has taken its modules along.
    if (driver_.ctx_push(context_) != CUDA_SUCCESS) {
        return;
    }
    const CUresult result = driver_.module_unload(module_);
    CUcontext own = nullptr;
    const CUresult popped = driver_.ctx_pop(&own);
    const bool gone =
        result == CUDA_ERROR_DEINITIALIZED || result == CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if ((result != CUDA_SUCCESS && !gone) || popped != CUDA_SUCCESS) {
        // A destructor has nobody to report to but this.
        static_cast<void>(std::fprintf(stderr,
                                       "less_cache: unloading a kernel: CUDA errors %d and %d\n",
                                       static_cast<int>(result), static_cast<int>(popped)));
    }
}

std::shared_ptr<const Kernel> shared_kernel(const Driver& driver, const KernelRecord& record) {
    const Key key{identity(driver, current_context(driver)), &record};
    Cache& shared = cache();
    const std::scoped_lock lock(shared.mutex);
    auto& place = shared.kernels[key];
    if (auto kernel = place.lock()) {
        return kernel;
    }
    auto kernel = std::make_shared<const Kernel>(driver, record, embedded_image(record));
    place = kernel;
    return kernel;
}

}  // namespace less_cache
