#pragma once

#include <NvInferRuntime.h>

namespace less_cache {

/// Makes `LessAttention` plugins of a node's attributes, or of what an engine holds.
class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    /// @returns nullptr where a field is missing, unknown, mistyped or out of range, which is
    ///     reported.
    nvinfer1::IPluginV3* createPlugin(const char* name,
                                      const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
    const char* getPluginName() const noexcept override;
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override;
};

}  // namespace less_cache
