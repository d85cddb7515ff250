#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "layer.h"

namespace less_cache::testing {

/// What TensorRT would be told: the last message to the recorder, and to the logger.
class Recorder final : public nvinfer1::IErrorRecorder {
public:
    std::int32_t getNbErrors() const noexcept override;
    nvinfer1::ErrorCode getErrorCode(std::int32_t index) const noexcept override;
    ErrorDesc getErrorDesc(std::int32_t index) const noexcept override;
    bool hasOverflowed() const noexcept override { return false; }
    void clear() noexcept override { errors_.clear(); }
    bool reportError(nvinfer1::ErrorCode code, ErrorDesc text) noexcept override;
    RefCount incRefCount() noexcept override { return 1; }
    RefCount decRefCount() noexcept override { return 1; }

private:
    std::vector<std::pair<nvinfer1::ErrorCode, std::string>> errors_;
};

class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override;
    /// The messages since the last call.
    std::string take();

private:
    std::string messages_;
};

class LoggerFinder final : public nvinfer1::ILoggerFinder {
public:
    explicit LoggerFinder(Logger& logger) : logger_(logger) {}
    nvinfer1::ILogger* findLogger() override { return &logger_; }

private:
    Logger& logger_;
};

class ResourceContext final : public nvinfer1::IPluginResourceContext {
public:
    explicit ResourceContext(nvinfer1::IErrorRecorder* recorder) : recorder_(recorder) {}
    nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return recorder_; }

private:
    nvinfer1::IErrorRecorder* recorder_;
};

/// A plugin's library, opened as TensorRT's registry opens it.
class Library {
public:
    /// @throws std::runtime_error if it cannot be opened, or lacks what the registry looks for.
    explicit Library(const std::string& path);

    [[nodiscard]] nvinfer1::IPluginCreatorV3One& creator() const { return *creator_; }
    [[nodiscard]] Logger& logger() { return logger_; }

private:
    Logger logger_;
    LoggerFinder finder_{logger_};
    nvinfer1::IPluginCreatorV3One* creator_ = nullptr;
};

/// A node's attributes as the ONNX parser passes them on; may be made wrong.
class Node {
public:
    explicit Node(const Attributes& attributes);

    void set(const std::string& name, std::int32_t value);
    void set(const std::string& name, float value);
    void set(const std::string& name, const std::string& value);
    void remove(const std::string& name);
    /// Adds a field as it is.
    void add(const nvinfer1::PluginField& field);
    /// Valid until the node is changed.
    [[nodiscard]] nvinfer1::PluginFieldCollection fields() const;

private:
    void replace(const std::string& name, const void* data, nvinfer1::PluginFieldType type,
                 std::int32_t length);

    std::map<std::string, std::unique_ptr<std::int32_t>> integers_;
    std::map<std::string, std::unique_ptr<float>> reals_;
    std::map<std::string, std::unique_ptr<std::string>> texts_;
    std::vector<nvinfer1::PluginField> fields_;
};

/// A plugin and its three sides.
struct Plugin {
    explicit Plugin(nvinfer1::IPluginV3* made);

    std::unique_ptr<nvinfer1::IPluginV3> plugin;
    nvinfer1::IPluginV3OneCore* core;
    nvinfer1::IPluginV3OneBuildV2* build;
    nvinfer1::IPluginV3OneRuntime* runtime;
};

/// TensorRT's descriptions of a layer's tensors.
struct Descriptions {
    Descriptions(const Layer& layer, std::int64_t least, std::int64_t batch, std::int64_t most);

    [[nodiscard]] std::int32_t inputs() const { return static_cast<std::int32_t>(in.size()); }
    [[nodiscard]] std::int32_t outputs() const { return static_cast<std::int32_t>(out.size()); }

    std::vector<nvinfer1::DynamicPluginTensorDesc> in, out;
    /// For the middle batch.
    std::vector<nvinfer1::PluginTensorDesc> in_fixed, out_fixed;
};

/// `getOutputShapes` with an unknown batch; returns its result and the shapes, -1 for the batch.
std::pair<std::int32_t, std::vector<std::vector<std::int64_t>>> output_shapes(
    nvinfer1::IPluginV3OneBuildV2& build, const Layer& layer);

/// Bytes of a tensor.
std::size_t bytes_of(const nvinfer1::PluginTensorDesc& tensor);

}  // namespace less_cache::testing
