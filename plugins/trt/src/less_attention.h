#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

#include "fields.h"
#include "kernel_choice.h"
#include "launcher.h"
#include "tensors.h"

namespace less_cache {

constexpr const char* kPluginName = "LessAttention";
constexpr const char* kPluginVersion = "1";
constexpr const char* kPluginNamespace = "";

/// The decode step of one layer: a new token of each sequence.
///
/// Inputs: q [B, Hq, 1, D], k and v [B, Hkv, 1, D], mask [B, 1] int32 (0: this row has no token),
/// length [B] int32 (tokens seen before), the state's arrays, the maps' parameters. Outputs:
/// out [B, Hq, 1, D], and the state's arrays, aliased with their inputs or not.
///
/// Of a layer with codes these are bytes, as int8, and q, k, v and out are float32 in the basis of
/// the codes; with means in the basis and a low-rank state, shift [B, Hq, 1] float32 comes last.
class LessAttention final : public nvinfer1::IPluginV3,
                            public nvinfer1::IPluginV3OneCore,
                            public nvinfer1::IPluginV3OneBuildV2,
                            public nvinfer1::IPluginV3OneRuntime {
public:
    /// @param recorder Where errors go; nullptr for the registry's.
    explicit LessAttention(const PluginData& data, nvinfer1::IErrorRecorder* recorder = nullptr);

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    const char* getPluginName() const noexcept override { return kPluginName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    // IPluginV3OneBuildV2
    std::int32_t getNbOutputs() const noexcept override;
    std::int32_t getAliasedInput(std::int32_t index) noexcept override;
    bool supportsFormatCombination(std::int32_t position,
                                   const nvinfer1::DynamicPluginTensorDesc* tensors,
                                   std::int32_t inputs, std::int32_t outputs) noexcept override;
    std::int32_t getOutputDataTypes(nvinfer1::DataType* types, std::int32_t outputs,
                                    const nvinfer1::DataType* given,
                                    std::int32_t inputs) const noexcept override;
    std::int32_t getOutputShapes(const nvinfer1::DimsExprs* given, std::int32_t inputs,
                                 const nvinfer1::DimsExprs* shape_values, std::int32_t shape_inputs,
                                 nvinfer1::DimsExprs* shapes, std::int32_t outputs,
                                 nvinfer1::IExprBuilder& builder) noexcept override;
    std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* given,
                                 std::int32_t inputs,
                                 const nvinfer1::DynamicPluginTensorDesc* results,
                                 std::int32_t outputs) noexcept override;
    std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* given,
                                 std::int32_t inputs,
                                 const nvinfer1::DynamicPluginTensorDesc* results,
                                 std::int32_t outputs) const noexcept override;
    const char* getMetadataString() noexcept override { return metadata_.c_str(); }

    // IPluginV3OneRuntime
    std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* given, std::int32_t inputs,
                               const nvinfer1::PluginTensorDesc* results,
                               std::int32_t outputs) noexcept override;
    std::int32_t enqueue(const nvinfer1::PluginTensorDesc* given,
                         const nvinfer1::PluginTensorDesc* results, const void* const* inputs,
                         void* const* outputs, void* workspace,
                         cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(
        nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    /// The current GPU, with the multiprocessors of the one that the engine was built on.
    [[nodiscard]] Device device(const Driver& driver) const;
    Layer configure(const std::vector<Given>& least, const std::vector<Given>& most);
    void preload();
    void plan(const std::vector<Given>& inputs);

    PluginData data_;
    nvinfer1::IErrorRecorder* recorder_;
    std::string metadata_;
    std::unique_ptr<Fields> fields_;
    /// What any batch of the engine may launch; held so that a new batch loads nothing.
    std::vector<std::shared_ptr<const Kernel>> kernels_;
    std::unique_ptr<Launcher> launcher_;
};

}  // namespace less_cache
