#pragma once

#include <memory>

#include "cuda_driver.h"
#include "kernel_record.h"

namespace less_cache {

/// A kernel that is loaded into one CUDA context, ready to launch; unloaded with the last owner.
class Kernel {
public:
    /// Loads the record's image into the current context, and all of its code at once.
    ///
    /// @throws Refusal that names CUDA's error, and for PTX what its compiler said.
    Kernel(const Driver& driver, const KernelRecord& record, const void* image);
    ~Kernel();
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;
    Kernel(Kernel&&) = delete;
    Kernel& operator=(Kernel&&) = delete;

    [[nodiscard]] CUfunction function() const { return function_; }

private:
    void prepare(const KernelRecord& record);
    void unload() noexcept;

    const Driver& driver_;
    CUcontext context_ = nullptr;
    CUmodule module_ = nullptr;
    CUfunction function_ = nullptr;
};

/// The record's kernel in the current context: the one that other layers use, or a new one.
///
/// Any thread may call it. The record must be one of `embedded_kernels`.
///
/// @throws Refusal as `Kernel` does.
std::shared_ptr<const Kernel> shared_kernel(const Driver& driver, const KernelRecord& record);

}  // namespace less_cache
