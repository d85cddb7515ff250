#pragma once

#include <NvInferRuntime.h>

#include <optional>
#include <string>
#include <vector>

#include "layer.h"

namespace less_cache {

/// Bytes; an engine's fields are numbers of 32 bits.
constexpr std::int64_t kWorkspaceUnit = 256;

/// Bytes in units of `kWorkspaceUnit`, rounded up.
///
/// @throws Refusal if 32 bits do not hold it.
std::int32_t workspace_units(std::size_t bytes);

/// What the engine was built for: found by configurePlugin, kept in the engine.
struct Configured {
    Sizes sizes;
    std::int32_t least_batch = 0;
    std::int32_t most_batch = 0;
    /// Of the GPU that built the engine. Plans go by it, so that they need the workspace that was
    /// asked for then on any GPU.
    std::int32_t multiprocessors = 0;
    /// What TensorRT was asked for, for `most_batch`, in units of `kWorkspaceUnit`.
    std::int32_t workspace = 0;
};

/// All that a plugin is.
struct PluginData {
    Attributes attributes;
    std::optional<Configured> configured;
};

/// The fields of a plugin, as TensorRT keeps them in an engine; owns what they point to.
class Fields {
public:
    explicit Fields(const PluginData& data);
    // TensorRT is given pointers into it.
    Fields(const Fields&) = delete;
    Fields& operator=(const Fields&) = delete;
    Fields(Fields&&) = delete;
    Fields& operator=(Fields&&) = delete;
    ~Fields() = default;

    [[nodiscard]] const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

private:
    struct Storage;

    std::vector<std::int32_t> integers_;
    std::vector<float> reals_;
    std::vector<std::string> texts_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_;
};

/// Reads the node's attributes, or all that `Fields` wrote.
///
/// @param phase kBUILD: exactly the attributes; kRUNTIME: exactly what is in an engine.
/// @throws Refusal that names a field that is missing, unknown, twice there, mistyped or out of
///     range, with its value and what is allowed.
PluginData read_fields(const nvinfer1::PluginFieldCollection* collection,
                       nvinfer1::TensorRTPhase phase);

/// Names and types of the node's attributes, without values.
const nvinfer1::PluginFieldCollection* attribute_fields();

}  // namespace less_cache
