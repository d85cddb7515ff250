#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "step_plan.h"

namespace less_cache {

/// What the names of kernels' parameters stand for in one step.
class Names {
public:
    /// Knows the layer's inputs and, in place of the state's, its outputs.
    explicit Names(const Attributes& attributes);

    /// Lets a pointer's name stand for bytes of the workspace.
    void put_workspace(const std::string& name, std::size_t offset);
    void put(const std::string& name, std::int64_t number);
    void put(const std::string& name, float number);

    /// The arguments of a parameter list, in its order.
    ///
    /// @param parameters "name:type name:type ..." as `KernelRecord::parameters`.
    /// @throws Refusal for a name that is not known, a type that is not the name's, or a number
    ///     too large for it.
    [[nodiscard]] std::vector<Argument> arguments(const KernelRecord& record) const;

private:
    struct Meaning {
        enum class Kind : std::uint8_t { kPointer, kInteger, kReal };
        Kind kind = Kind::kPointer;
        Argument argument;
    };

    [[nodiscard]] Argument argument(const KernelRecord& record, const std::string& name,
                                    const std::string& type) const;

    std::map<std::string, Meaning> meanings_;
};

}  // namespace less_cache
