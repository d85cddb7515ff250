#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda_driver.h"
#include "layer.h"
#include "module_cache.h"
#include "step_plan.h"

namespace less_cache {

/// The buffers of one step, in the node's order.
struct Buffers {
    const void* const* inputs = nullptr;
    void* const* outputs = nullptr;
    void* workspace = nullptr;
};

/// A planned step whose kernels are loaded: `run` only copies and launches.
class Launcher {
public:
    /// Loads what is not loaded yet into the current context.
    ///
    /// @throws Refusal where CUDA reports an error.
    Launcher(const Driver& driver, const Layer& layer, std::int32_t batch, Plan plan);
    // The arguments point into themselves.
    Launcher(const Launcher&) = delete;
    Launcher& operator=(const Launcher&) = delete;
    Launcher(Launcher&&) = delete;
    Launcher& operator=(Launcher&&) = delete;
    ~Launcher() = default;

    /// Puts the step on a stream: a copy of each state array whose output is another buffer than
    /// its input, then the kernels, which work on the outputs in place.
    ///
    /// @throws Refusal where CUDA reports an error, or a buffer is not aligned to 16 bytes.
    void run(const Buffers& buffers, CUstream stream);

    [[nodiscard]] std::int32_t batch() const { return batch_; }
    /// Where the kernels are loaded.
    [[nodiscard]] CUcontext context() const { return context_; }

private:
    /// What cuLaunchKernel takes, filled in place.
    struct Prepared {
        std::shared_ptr<const Kernel> kernel;
        std::vector<std::uint64_t> values;
        std::vector<void*> pointers;
    };

    void check_alignment(const Buffers& buffers) const;
    void copy_state(const Buffers& buffers, CUstream stream) const;

    const Driver& driver_;
    CUcontext context_;
    std::int32_t batch_;
    Plan plan_;
    std::vector<Prepared> prepared_;
    /// Bytes of each output for this batch.
    std::vector<std::size_t> output_bytes_;
    std::size_t inputs_ = 0;
};

}  // namespace less_cache
