#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernel_choice.h"

namespace less_cache {

/// Where an argument's value comes from.
enum class Source : std::uint8_t {
    /// The node's input `index`.
    kInput,
    /// The node's output `index`.
    kOutput,
    /// The workspace, `bits` bytes from its start.
    kWorkspace,
    /// A pointer to nothing: an array that this layer has not.
    kNull,
    /// A number; its bits, the low ones where it is narrower than 64.
    kNumber,
};

/// One argument of a launch.
struct Argument {
    std::string name;
    Source source = Source::kNull;
    std::int32_t index = 0;
    std::uint64_t bits = 0;
};

/// One kernel launch. Threads a block are 32 times the record's warps, in x.
struct Launch {
    const KernelRecord* record = nullptr;
    std::uint32_t grid_x = 0;
    std::uint32_t grid_y = 1;
    std::vector<Argument> arguments;
};

/// A decode step of one layer for one batch.
struct Plan {
    /// In stream order; none for an empty batch.
    std::vector<Launch> launches;
    std::size_t workspace_bytes = 0;
    /// Programs that share one head's slots, and the slots of each but the last.
    std::int32_t splits = 1;
};

/// Plans a step.
///
/// @param table The kernels to choose from; must outlive the plan.
/// @param batch Sequences, 0 or more.
/// @throws Refusal where a kernel is missing, or the batch is beyond what a grid can be.
Plan plan_step(KernelTable table, const Layer& layer, const Device& device, std::int32_t batch);

/// Bytes that suffice for every batch up to `most`.
///
/// @throws Refusal as `plan_step`.
std::size_t workspace_for(KernelTable table, const Layer& layer, const Device& device,
                          std::int32_t most);

/// One plan for each set of kernels that batches from `least` to `most` may need.
///
/// @throws Refusal as `plan_step`.
std::vector<Plan> distinct_plans(KernelTable table, const Layer& layer, const Device& device,
                                 std::int32_t least, std::int32_t most);

}  // namespace less_cache
