#include "host.h"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <optional>
#include <utility>

#include "errors.h"
#include "version.h"

namespace less_cache {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

constexpr const char* kRegistry = "getPluginRegistry";

/// The runtimes that have a registry, in the order of preference. Python's packages load them
/// privately, so that looking among the process's global symbols alone does not find them.
constexpr std::array<const char*, 3> kRuntimes{
    "libnvinfer.so." LESS_CACHE_QUOTED(NV_TENSORRT_MAJOR),
    "libnvinfer_lean.so." LESS_CACHE_QUOTED(NV_TENSORRT_MAJOR),
    "libnvinfer_dispatch.so." LESS_CACHE_QUOTED(NV_TENSORRT_MAJOR)};

/// The handle that has `symbol`: of the global symbols, or of a runtime that is loaded already.
std::optional<void*> handle_with(const char* symbol) {
    if (dlsym(RTLD_DEFAULT, symbol) != nullptr) {
        return RTLD_DEFAULT;
    }
    for (const char* runtime : kRuntimes) {
        // Only looked up: the count that dlopen adds keeps the runtime loaded as long as we are.
        void* library = dlopen(runtime, RTLD_LAZY | RTLD_NOLOAD);
        if (library != nullptr && dlsym(library, symbol) != nullptr) {
            return library;
        }
    }
    return std::nullopt;
}

template <typename Function>
Function* function_of(void* handle, const char* symbol) {
    return reinterpret_cast<Function*>(dlsym(handle, symbol));
}

}  // namespace

nvinfer1::IPluginRegistry* host_registry(std::string* why) {
    const auto refuse = [why](std::string reason) -> nvinfer1::IPluginRegistry* {
        if (why != nullptr) {
            *why = std::move(reason);
        }
        return nullptr;
    };
    const auto handle = handle_with(kRegistry);
    if (!handle) {
        return refuse(text("no TensorRT ", kTensorRtMajor, " is loaded in this process; load ",
                           kRuntimes.front(), " first"));
    }
    auto* major = function_of<std::int32_t()>(*handle, "getInferLibMajorVersion");
    if (major != nullptr && major() != kTensorRtMajor) {
        return refuse(text("the TensorRT in this process is version ", major(),
                           ", but this library was built for ", kTensorRtMajor));
    }
    return function_of<nvinfer1::IPluginRegistry*()>(*handle, kRegistry)();
}

void set_logger_finder(nvinfer1::ILoggerFinder* finder) { logger_finder = finder; }

nvinfer1::ILogger* host_logger() {
    if (auto* finder = logger_finder.load()) {
        if (auto* logger = finder->findLogger()) {
            return logger;
        }
    }
    // `getLogger` is too common a name to call it in a process without TensorRT.
    if (host_registry() == nullptr) {
        return nullptr;
    }
    const auto handle = handle_with(kRegistry);
    if (!handle) {
        return nullptr;
    }
    auto* own = function_of<nvinfer1::ILogger*()>(*handle, "getLogger");
    return own == nullptr ? nullptr : own();
}

}  // namespace less_cache
