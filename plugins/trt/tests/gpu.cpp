#include "gpu.h"

#include <dlfcn.h>

#include <iostream>
#include <stdexcept>
#include <string>

// cuda.h maps a function's name to that of the version it declares.
#define GPU_SPELLING(name) #name
#define GPU_VERSIONED(name) GPU_SPELLING(name)
#define GPU_CALL(name, ...) \
    call<decltype(&name)>(GPU_VERSIONED(name))(__VA_ARGS__), GPU_VERSIONED(name)

namespace less_cache::testing {
namespace {

class DriverGpu final : public Gpu {
public:
    explicit DriverGpu(void* library) : library_(library) {}
    ~DriverGpu() override {
        try {
            release();
        } catch (const std::exception& error) {
            std::cerr << error.what() << "\n";
        }
    }
    DriverGpu(const DriverGpu&) = delete;
    DriverGpu& operator=(const DriverGpu&) = delete;
    DriverGpu(DriverGpu&&) = delete;
    DriverGpu& operator=(DriverGpu&&) = delete;

    void start() {
        CUdevice device = 0;
        CUcontext context = nullptr;
        check(GPU_CALL(cuInit, 0));
        check(GPU_CALL(cuDeviceGet, &device, 0));
        check(GPU_CALL(cuDevicePrimaryCtxRetain, &context, device));
        check(GPU_CALL(cuCtxSetCurrent, context));
        check(GPU_CALL(cuStreamCreate, &stream_, CU_STREAM_NON_BLOCKING));
    }

    [[nodiscard]] CUstream stream() const override { return stream_; }

    void* allocate(std::size_t bytes) override {
        CUdeviceptr memory = 0;
        check(GPU_CALL(cuMemAlloc, &memory, bytes == 0 ? 1 : bytes));
        memory_.push_back(memory);
        return reinterpret_cast<void*>(memory);
    }

    void upload(void* to, const std::vector<unsigned char>& bytes) override {
        check(
            GPU_CALL(cuMemcpyHtoD, reinterpret_cast<CUdeviceptr>(to), bytes.data(), bytes.size()));
    }

    std::vector<unsigned char> download(const void* from, std::size_t bytes) override {
        std::vector<unsigned char> content(bytes);
        check(GPU_CALL(cuMemcpyDtoH, content.data(), reinterpret_cast<CUdeviceptr>(from), bytes));
        return content;
    }

    void wait() override { check(GPU_CALL(cuStreamSynchronize, stream_)); }

    void run_captured(const std::function<void()>& body) override {
        CUgraph graph = nullptr;
        CUgraphExec executable = nullptr;
        // Global: a module load, an allocation or a wait anywhere would end it with an error.
        check(GPU_CALL(cuStreamBeginCapture, stream_, CU_STREAM_CAPTURE_MODE_GLOBAL));
        body();
        check(GPU_CALL(cuStreamEndCapture, stream_, &graph));
        check(GPU_CALL(cuGraphInstantiateWithFlags, &executable, graph, 0));
        check(GPU_CALL(cuGraphLaunch, executable, stream_));
        wait();
        check(GPU_CALL(cuGraphExecDestroy, executable));
        check(GPU_CALL(cuGraphDestroy, graph));
    }

    void release() override {
        for (const CUdeviceptr memory : memory_) {
            check(GPU_CALL(cuMemFree, memory));
        }
        memory_.clear();
    }

private:
    template <typename Function>
    Function call(const char* name) {
        auto* function = reinterpret_cast<Function>(dlsym(library_, name));
        if (function == nullptr) {
            throw std::runtime_error(std::string("libcuda.so.1 has no ") + name);
        }
        return function;
    }

    static void check(CUresult result, const char* call) {
        if (result != CUDA_SUCCESS) {
            throw std::runtime_error(std::string(call) + ": CUDA error " +
                                     std::to_string(static_cast<int>(result)));
        }
    }

    void* library_;
    CUstream stream_ = nullptr;
    std::vector<CUdeviceptr> memory_;
};

}  // namespace

std::unique_ptr<Gpu> Gpu::open() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        std::cout << "no CUDA driver: " << dlerror() << "\n";
        return nullptr;
    }
    try {
        auto gpu = std::make_unique<DriverGpu>(library);
        gpu->start();
        return gpu;
    } catch (const std::exception& error) {
        std::cout << "no CUDA device: " << error.what() << "\n";
        return nullptr;
    }
}

}  // namespace less_cache::testing
