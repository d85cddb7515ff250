// A stand-in for libcuda.so.1 that records calls and can be told to fail. "Device" memory is the
// host's, and copies are made; kernels do nothing. Images are the text that `synthetic_image`
// writes, or ELF, whose parameters it does not know.

#include "fake_cuda.h"

#include <cuda.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <utility>

namespace {

using less_cache::testing::Call;

struct Module {
    std::string symbol;
    std::vector<std::pair<std::string, std::string>> parameters;
    bool known = false;
    bool loaded_eagerly = false;
    int shared = 48 * 1024;
};

class State final : public less_cache::testing::FakeCuda {
public:
    std::vector<Call> calls() override {
        const std::scoped_lock lock(mutex_);
        return calls_;
    }
    void clear() override {
        const std::scoped_lock lock(mutex_);
        calls_.clear();
        failures_.clear();
    }
    void fail(const std::string& function, int nth, int error) override {
        const std::scoped_lock lock(mutex_);
        failures_[function] = {nth, static_cast<CUresult>(error)};
    }
    int modules() override {
        const std::scoped_lock lock(mutex_);
        return static_cast<int>(modules_.size());
    }
    void set_device(int arch, int multiprocessors, int shared) override {
        const std::scoped_lock lock(mutex_);
        arch_ = arch;
        multiprocessors_ = multiprocessors;
        shared_ = shared;
    }
    void set_silent(bool silent) override { silent_ = silent; }
    [[nodiscard]] bool silent() const { return silent_; }
    void set_context(std::uintptr_t context) override { stack() = {context}; }

    /// The calling thread's contexts; the last is current.
    static std::vector<std::uintptr_t>& stack() {
        static thread_local std::vector<std::uintptr_t> contexts{0xC0};
        return contexts;
    }

    /// Records a call; says whether it is to fail.
    CUresult seen(Call call) {
        const std::scoped_lock lock(mutex_);
        call.context = stack().empty() ? 0 : stack().back();
        const std::string function = call.function;
        calls_.push_back(std::move(call));
        const auto failure = failures_.find(function);
        if (failure == failures_.end() || failure->second.first-- > 0) {
            return CUDA_SUCCESS;
        }
        const CUresult error = failure->second.second;
        failures_.erase(failure);
        return error;
    }

    int attribute(CUdevice_attribute wanted) {
        const std::scoped_lock lock(mutex_);
        switch (wanted) {
            case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
                return arch_ / 10;
            case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
                return arch_ % 10;
            case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
                return multiprocessors_;
            default:
                return shared_;
        }
    }

    Module* load(const void* image) {
        auto made = std::make_unique<Module>();
        const auto* text = static_cast<const char*>(image);
        if (std::memcmp(text, "\177ELF", 4) != 0) {
            std::istringstream words(text);
            words >> made->symbol;
            for (std::string word; words >> word;) {
                const auto colon = word.find(':');
                made->parameters.emplace_back(word.substr(0, colon), word.substr(colon + 1));
            }
            made->known = true;
        }
        const std::scoped_lock lock(mutex_);
        Module* module = made.release();
        modules_.insert(module);
        return module;
    }

    bool unload(Module* module) {
        const std::scoped_lock lock(mutex_);
        const std::unique_ptr<Module> owner(modules_.erase(module) == 0 ? nullptr : module);
        return owner != nullptr;
    }

private:
    std::mutex mutex_;
    std::atomic<bool> silent_{false};
    std::vector<Call> calls_;
    std::map<std::string, std::pair<int, CUresult>> failures_;
    std::set<Module*> modules_;
    int arch_ = 90, multiprocessors_ = 132, shared_ = 227 * 1024;
};

State& state() {
    static State instance;
    return instance;
}

Call called(const char* function) {
    Call call;
    call.function = function;
    return call;
}

}  // namespace

less_cache::testing::FakeCuda* fake_cuda_state() { return &state(); }

CUresult cuGetErrorName(CUresult error, const char** text) {
    *text = error == CUDA_ERROR_LAUNCH_FAILED   ? "CUDA_ERROR_LAUNCH_FAILED"
            : error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
            : error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
                                                : nullptr;
    return *text == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult /*error*/, const char** text) {
    *text = "as the test wanted";
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    const auto& contexts = State::stack();
    *context = reinterpret_cast<CUcontext>(contexts.empty() ? 0 : contexts.back());
    return state().seen(called("cuCtxGetCurrent"));
}

CUresult cuCtxPushCurrent(CUcontext context) {
    State::stack().push_back(reinterpret_cast<std::uintptr_t>(context));
    return state().seen(called("cuCtxPushCurrent"));
}

CUresult cuCtxPopCurrent(CUcontext* context) {
    *context = reinterpret_cast<CUcontext>(State::stack().back());
    State::stack().pop_back();
    return state().seen(called("cuCtxPopCurrent"));
}

CUresult cuCtxGetDevice(CUdevice* device) {
    *device = 0;
    return state().seen(called("cuCtxGetDevice"));
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute wanted, CUdevice /*device*/) {
    *value = state().attribute(wanted);
    return state().seen(called("cuDeviceGetAttribute"));
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned int options,
                            CUjit_option* kinds, void** values) {
    const CUresult result = state().seen(called("cuModuleLoadDataEx"));
    if (result != CUDA_SUCCESS) {
        for (unsigned i = 0; i < options; ++i) {
            if (kinds[i] == CU_JIT_ERROR_LOG_BUFFER) {
                std::strcpy(static_cast<char*>(values[i]), "the compiler's words");
            }
        }
        return result;
    }
    *module = reinterpret_cast<CUmodule>(state().load(image));
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
    const CUresult result = state().seen(called("cuModuleUnload"));
    return state().unload(reinterpret_cast<Module*>(module)) ? result : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    auto* loaded = reinterpret_cast<Module*>(module);
    if (loaded->known && loaded->symbol != name) {
        return CUDA_ERROR_NOT_FOUND;
    }
    loaded->symbol = name;
    *function = reinterpret_cast<CUfunction>(module);
    return state().seen(called("cuModuleGetFunction"));
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute /*wanted*/, CUfunction function) {
    *value = 32;
    reinterpret_cast<Module*>(function)->loaded_eagerly = true;
    return state().seen(called("cuFuncGetAttribute"));
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute wanted, int value) {
    if (wanted == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        reinterpret_cast<Module*>(function)->shared = value;
    }
    return state().seen(called("cuFuncSetAttribute"));
}

#ifdef FAKE_CUDA_12
CUresult cuFuncLoad(CUfunction function) {
    reinterpret_cast<Module*>(function)->loaded_eagerly = true;
    return state().seen(called("cuFuncLoad"));
}

CUresult cuCtxGetId(CUcontext context, unsigned long long* id) {
    *id = reinterpret_cast<std::uintptr_t>(context) + 1000;
    return state().seen(called("cuCtxGetId"));
}
#endif

CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                        unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                        unsigned int block_z, unsigned int shared, CUstream stream,
                        void** parameters, void** extra) {
    if (state().silent()) {
        return CUDA_SUCCESS;
    }
    auto* module = reinterpret_cast<Module*>(function);
    Call call = called("cuLaunchKernel");
    call.symbol = module->symbol;
    call.grid_x = grid_x;
    call.grid_y = grid_y;
    call.threads = block_x * block_y * block_z;
    call.shared = shared;
    call.stream = stream;
    std::size_t index = 0;
    const auto read = [&](const std::string& name, std::size_t bytes) {
        std::uint64_t bits = 0;
        std::memcpy(&bits, parameters[index++], bytes);
        call.arguments[name] = bits;
    };
    for (const auto& [name, type] : module->parameters) {
        read(name, type == "i32" || type == "f32" ? 4 : 8);
    }
    if (module->known) {
        read("_scratch0", 8);
        read("_scratch1", 8);
    }
    const bool right = module->loaded_eagerly && extra == nullptr && grid_z == 1 &&
                       static_cast<int>(shared) <= module->shared;
    const CUresult result = state().seen(std::move(call));
    return right ? result : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
    if (state().silent()) {
        return CUDA_SUCCESS;
    }
    Call call = called("cuMemcpyDtoDAsync");
    call.to = to;
    call.from = from;
    call.bytes = bytes;
    call.stream = stream;
    const CUresult result = state().seen(std::move(call));
    if (result == CUDA_SUCCESS) {
        std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    }
    return result;
}

// What gpu_cases calls beside the plugin. A graph runs while it is captured, since copies are made
// at once.

CUresult cuInit(unsigned int /*flags*/) { return CUDA_SUCCESS; }

CUresult cuDeviceGet(CUdevice* device, int /*ordinal*/) {
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice /*device*/) {
    *context = reinterpret_cast<CUcontext>(State::stack().back());
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext /*context*/) { return CUDA_SUCCESS; }

CUresult cuStreamCreate(CUstream* stream, unsigned int /*flags*/) {
    *stream = nullptr;
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream /*stream*/) { return CUDA_SUCCESS; }

CUresult cuMemAlloc(CUdeviceptr* memory, std::size_t bytes) {
    constexpr std::size_t kAlignment = 256;
    const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    *memory = reinterpret_cast<CUdeviceptr>(std::aligned_alloc(kAlignment, rounded));
    return *memory == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr memory) {
    std::free(reinterpret_cast<void*>(memory));
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, std::size_t bytes) {
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, std::size_t bytes) {
    std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
    return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture(CUstream /*stream*/, CUstreamCaptureMode /*mode*/) {
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream /*stream*/, CUgraph* graph) {
    *graph = nullptr;
    return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph /*graph*/,
                                     unsigned long long /*flags*/) {
    *executable = nullptr;
    return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec /*executable*/, CUstream /*stream*/) { return CUDA_SUCCESS; }

CUresult cuGraphExecDestroy(CUgraphExec /*executable*/) { return CUDA_SUCCESS; }

CUresult cuGraphDestroy(CUgraph /*graph*/) { return CUDA_SUCCESS; }
