#include "creator.h"

#include <memory>

#include "fields.h"
#include "less_attention.h"
#include "report.h"

namespace less_cache {

nvinfer1::IPluginV3* Creator::createPlugin(const char* name,
                                           const nvinfer1::PluginFieldCollection* fields,
                                           nvinfer1::TensorRTPhase phase) noexcept {
    return guarded(nullptr, static_cast<nvinfer1::IPluginV3*>(nullptr), [=] {
        try {
            // TensorRT deletes what it is given.
            return static_cast<nvinfer1::IPluginV3*>(
                std::make_unique<LessAttention>(read_fields(fields, phase)).release());
        } catch (const Refusal& refusal) {
            const char* layer = name == nullptr || *name == '\0' ? "a layer" : name;
            throw Refusal(refusal.kind(), refusal.what(), " (in ", layer, ")");
        }
    });
}

const nvinfer1::PluginFieldCollection* Creator::getFieldNames() noexcept {
    return guarded(nullptr, static_cast<const nvinfer1::PluginFieldCollection*>(nullptr),
                   [] { return attribute_fields(); });
}

const char* Creator::getPluginName() const noexcept { return kPluginName; }

const char* Creator::getPluginVersion() const noexcept { return kPluginVersion; }

const char* Creator::getPluginNamespace() const noexcept { return kPluginNamespace; }

}  // namespace less_cache
