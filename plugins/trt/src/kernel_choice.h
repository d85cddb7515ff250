#pragma once

#include <cstdint>
#include <string>

#include "kernel_record.h"
#include "layer.h"

namespace less_cache {

/// What of a GPU decides which kernels run and how many programs share a head.
struct Device {
    /// Compute capability, 10 * major + minor.
    std::int32_t arch = 0;
    /// Streaming multiprocessors.
    std::int32_t multiprocessors = 1;
    /// Bytes of shared memory that one block may opt in to.
    std::int32_t shared_limit = 0;
};

/// The kernels of a step. What differs between two launches of one layer.
struct Want {
    const char* kernel = "";
    /// Of "attend": whether programs share a head's slots; -1 for the other kernels.
    std::int32_t split = -1;
    /// Of "select_and_map": sequences a program, at most.
    std::int32_t block_b = 0;
    /// Of "conclude_split": the padded group and head size that "attend" wrote its parts in.
    std::int32_t block_g = 0;
    std::int32_t block_d = 0;
    /// Of "select_and_map": whether it chooses the victims, 1 or 0; -1 for the other kernels.
    std::int32_t selects = -1;
    /// Of "select_and_map": whether it applies feature maps; true for the other kernels.
    bool maps = true;
};

/// The power of two, at least 16, that holds `size`: how kernels pad.
std::int32_t padded(std::int32_t size);

/// Whether a kernel's code serves a layer, whatever the GPU.
bool serves(const KernelRecord& record, const Layer& layer, const Want& want);

/// Whether a GPU runs an image: a cubin of its architecture, below 90 also of an earlier one with
/// the same major version, or PTX no later than it; and its shared memory suffices.
bool runs_on(const KernelRecord& record, const Device& device);

/// The best image for a layer on a GPU: cubins before PTX, the latest architecture, the tightest
/// padding.
///
/// @returns nullptr where there is none.
const KernelRecord* find_kernel(KernelTable table, const Layer& layer, const Device& device,
                                const Want& want);

/// As `find_kernel`, but a missing kernel is an error.
///
/// @throws Refusal that says what was wanted and what there is.
const KernelRecord& choose_kernel(KernelTable table, const Layer& layer, const Device& device,
                                  const Want& want);

}  // namespace less_cache
