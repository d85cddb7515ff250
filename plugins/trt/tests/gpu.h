#pragma once

#include <cuda.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

namespace less_cache::testing {

/// A CUDA device with a current context and a stream, by the driver's own library.
class Gpu {
public:
    /// @returns nullptr without a driver or a device, and the reason on stdout.
    static std::unique_ptr<Gpu> open();

    Gpu() = default;
    Gpu(const Gpu&) = delete;
    Gpu& operator=(const Gpu&) = delete;
    Gpu(Gpu&&) = delete;
    Gpu& operator=(Gpu&&) = delete;
    virtual ~Gpu() = default;
    [[nodiscard]] virtual CUstream stream() const = 0;
    /// Memory that lives as long as the device is open.
    virtual void* allocate(std::size_t bytes) = 0;
    virtual void upload(void* to, const std::vector<unsigned char>& bytes) = 0;
    virtual std::vector<unsigned char> download(const void* from, std::size_t bytes) = 0;
    /// Waits for the stream.
    virtual void wait() = 0;
    /// Captures what `body` puts on the stream into a graph, and launches that once.
    virtual void run_captured(const std::function<void()>& body) = 0;
    /// Frees all memory.
    virtual void release() = 0;
};

}  // namespace less_cache::testing
