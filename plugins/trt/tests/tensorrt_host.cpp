#include "tensorrt_host.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "tensors.h"

namespace less_cache::testing {
namespace {

class Size final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
public:
    explicit Size(std::int64_t value) : value_(value) { mImpl = this; }

    bool isConstant() const override { return value_ >= 0; }
    std::int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }

private:
    std::int64_t value_;
};

class Builder final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
public:
    Builder() { mImpl = this; }

    const nvinfer1::IDimensionExpr* constant(std::int64_t /*value*/) override { return nullptr; }
    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation /*operation*/,
                                              const nvinfer1::IDimensionExpr& /*first*/,
                                              const nvinfer1::IDimensionExpr& /*second*/) override {
        return nullptr;
    }
    const nvinfer1::IDimensionExpr* declareSizeTensor(
        std::int32_t /*output*/, const nvinfer1::IDimensionExpr& /*opt*/,
        const nvinfer1::IDimensionExpr& /*upper*/) override {
        return nullptr;
    }
};

nvinfer1::Dims dims_of(const Tensor& tensor, std::int64_t batch) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(tensor.dims.size());
    for (std::size_t i = 0; i < tensor.dims.size(); ++i) {
        dims.d[i] = tensor.dims[i] < 0 ? batch : tensor.dims[i];
    }
    return dims;
}

nvinfer1::PluginTensorDesc described(const Tensor& tensor, std::int64_t batch) {
    return {dims_of(tensor, batch), tensorrt_type(tensor.dtype), nvinfer1::TensorFormat::kLINEAR,
            1.0F};
}

}  // namespace

std::int32_t Recorder::getNbErrors() const noexcept {
    return static_cast<std::int32_t>(errors_.size());
}

nvinfer1::ErrorCode Recorder::getErrorCode(std::int32_t index) const noexcept {
    return errors_[static_cast<std::size_t>(index)].first;
}

Recorder::ErrorDesc Recorder::getErrorDesc(std::int32_t index) const noexcept {
    return errors_[static_cast<std::size_t>(index)].second.c_str();
}

bool Recorder::reportError(nvinfer1::ErrorCode code, ErrorDesc text) noexcept {
    errors_.emplace_back(code, text);
    return false;
}

void Logger::log(Severity /*severity*/, const char* message) noexcept {
    messages_ += message;
    messages_ += '\n';
}

std::string Logger::take() { return std::exchange(messages_, {}); }

Library::Library(const std::string& path) {
    // Left open: plugins of it may outlive any order of destruction.
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        throw std::runtime_error(dlerror());
    }
    using SetFinder = void(nvinfer1::ILoggerFinder*);
    using GetCreators = nvinfer1::IPluginCreatorInterface* const*(std::int32_t&);
    auto* set_finder = reinterpret_cast<SetFinder*>(dlsym(handle, "setLoggerFinder"));
    auto* get_creators = reinterpret_cast<GetCreators*>(dlsym(handle, "getCreators"));
    if (set_finder == nullptr || get_creators == nullptr) {
        throw std::runtime_error(path + " lacks setLoggerFinder or getCreators");
    }
    set_finder(&finder_);
    std::int32_t count = 0;
    auto* const* creators = get_creators(count);
    if (count != 1) {
        throw std::runtime_error(path + " has not one creator");
    }
    creator_ = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[0]);
}

Node::Node(const Attributes& attributes) {
    set("start", static_cast<std::int32_t>(attributes.start));
    set("gain", static_cast<std::int32_t>(attributes.gain));
    set("sinks", attributes.sinks);
    set("recent", attributes.recent);
    set("decay", attributes.decay);
    set("window", attributes.window);
    set("capacity", attributes.capacity);
    set("rank", attributes.rank);
    set("maps", std::string(name_of(attributes.maps)));
    set("scale", attributes.scale);
    set("softcap", attributes.softcap);
    if (attributes.coded()) {
        set("key_bits", attributes.key_bits);
        set("value_bits", attributes.value_bits);
        set("transform", std::string(name_of(attributes.transform)));
        set("model_dtype", std::string(name_of(attributes.model_dtype)));
    }
}

void Node::set(const std::string& name, std::int32_t value) {
    integers_[name] = std::make_unique<std::int32_t>(value);
    replace(name, integers_[name].get(), nvinfer1::PluginFieldType::kINT32, 1);
}

void Node::set(const std::string& name, float value) {
    reals_[name] = std::make_unique<float>(value);
    replace(name, reals_[name].get(), nvinfer1::PluginFieldType::kFLOAT32, 1);
}

void Node::set(const std::string& name, const std::string& value) {
    texts_[name] = std::make_unique<std::string>(value);
    replace(name, texts_[name]->c_str(), nvinfer1::PluginFieldType::kCHAR,
            static_cast<std::int32_t>(value.size()));
}

void Node::remove(const std::string& name) {
    fields_.erase(std::remove_if(fields_.begin(), fields_.end(),
                                 [&name](const auto& field) { return name == field.name; }),
                  fields_.end());
}

void Node::add(const nvinfer1::PluginField& field) { fields_.push_back(field); }

nvinfer1::PluginFieldCollection Node::fields() const {
    return {static_cast<std::int32_t>(fields_.size()), fields_.data()};
}

void Node::replace(const std::string& name, const void* data, nvinfer1::PluginFieldType type,
                   std::int32_t length) {
    remove(name);
    // The fields point to a name that outlives them.
    auto& kept = texts_["name of " + name];
    kept = std::make_unique<std::string>(name);
    fields_.emplace_back(kept->c_str(), data, type, length);
}

Plugin::Plugin(nvinfer1::IPluginV3* made) : plugin(made) {
    if (made == nullptr) {
        throw std::runtime_error("there is no plugin");
    }
    using Type = nvinfer1::PluginCapabilityType;
    core = static_cast<nvinfer1::IPluginV3OneCore*>(made->getCapabilityInterface(Type::kCORE));
    build = static_cast<nvinfer1::IPluginV3OneBuildV2*>(made->getCapabilityInterface(Type::kBUILD));
    runtime =
        static_cast<nvinfer1::IPluginV3OneRuntime*>(made->getCapabilityInterface(Type::kRUNTIME));
}

Descriptions::Descriptions(const Layer& layer, std::int64_t least, std::int64_t batch,
                           std::int64_t most) {
    const auto describe_all = [=](const std::vector<Tensor>& tensors, auto& dynamic, auto& fixed) {
        for (const Tensor& tensor : tensors) {
            dynamic.push_back({described(tensor, -1), dims_of(tensor, least), dims_of(tensor, most),
                               dims_of(tensor, batch)});
            fixed.push_back(described(tensor, batch));
        }
    };
    describe_all(inputs_of(layer), in, in_fixed);
    describe_all(outputs_of(layer), out, out_fixed);
}

std::pair<std::int32_t, std::vector<std::vector<std::int64_t>>> output_shapes(
    nvinfer1::IPluginV3OneBuildV2& build, const Layer& layer) {
    std::vector<std::unique_ptr<Size>> sizes;
    std::vector<nvinfer1::DimsExprs> inputs;
    for (const Tensor& tensor : inputs_of(layer)) {
        nvinfer1::DimsExprs shape{};
        shape.nbDims = static_cast<std::int32_t>(tensor.dims.size());
        for (std::size_t i = 0; i < tensor.dims.size(); ++i) {
            sizes.push_back(std::make_unique<Size>(tensor.dims[i]));
            shape.d[i] = sizes.back().get();
        }
        inputs.push_back(shape);
    }
    std::vector<nvinfer1::DimsExprs> outputs(static_cast<std::size_t>(build.getNbOutputs()));
    Builder builder;
    const std::int32_t result =
        build.getOutputShapes(inputs.data(), static_cast<std::int32_t>(inputs.size()), nullptr, 0,
                              outputs.data(), static_cast<std::int32_t>(outputs.size()), builder);
    std::vector<std::vector<std::int64_t>> shapes;
    for (const auto& output : outputs) {
        shapes.emplace_back();
        for (std::int32_t i = 0; result == 0 && i < output.nbDims; ++i) {
            shapes.back().push_back(output.d[i]->isConstant() ? output.d[i]->getConstantValue()
                                                              : -1);
        }
    }
    return {result, shapes};
}

std::size_t bytes_of(const nvinfer1::PluginTensorDesc& tensor) {
    std::int64_t bytes = size_of(dtype_of(tensor.type));
    for (std::int32_t i = 0; i < tensor.dims.nbDims; ++i) {
        bytes *= tensor.dims.d[i];
    }
    return static_cast<std::size_t>(bytes);
}

}  // namespace less_cache::testing
