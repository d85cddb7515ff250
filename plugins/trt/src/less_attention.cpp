#include "less_attention.h"

#include <algorithm>
#include <utility>

#include "embedded_kernels.h"
#include "report.h"
#include "step_plan.h"

namespace less_cache {
namespace {

constexpr std::int32_t kSuccess = 0;
constexpr std::int32_t kFailure = 1;

using nvinfer1::DynamicPluginTensorDesc;

void check_outputs(const Layer& layer, const std::vector<Given>& outputs) {
    check_tensors(outputs_of(layer), outputs, "output");
}

void require_count(const char* what, std::size_t expected, std::int32_t given) {
    if (given != static_cast<std::int32_t>(expected)) {
        throw Refusal(ErrorKind::kInvalidArgument, what, ": got ", given, ", expected ", expected,
                      " for these attributes");
    }
}

bool same(const Sizes& one, const Sizes& other) {
    return one.query_heads == other.query_heads && one.kv_heads == other.kv_heads &&
           one.head_dim == other.head_dim && one.hidden == other.hidden &&
           one.dtype == other.dtype && one.state_dtype == other.state_dtype &&
           one.key_bytes == other.key_bytes && one.value_bytes == other.value_bytes;
}

/// The type that the tensor at `position` must have, going by those before it alone.
Dtype expected_type(const Attributes& attributes, std::int32_t position,
                    const DynamicPluginTensorDesc* tensors) {
    const auto names = input_names(attributes);
    const auto inputs = static_cast<std::int32_t>(names.size());
    const std::int32_t index =
        position < inputs ? position : std::max(aliased_input(position - inputs), 0);
    Layer layer;
    layer.attributes = attributes;
    layer.sizes.dtype =
        attributes.coded() ? attributes.model_dtype : dtype_of(tensors[0].desc.type);
    const auto state = std::find(names.begin(), names.end(), "H");
    if (state != names.end() && state - names.begin() <= position) {
        layer.sizes.state_dtype = dtype_of(tensors[state - names.begin()].desc.type);
    }
    return inputs_of(layer)[static_cast<std::size_t>(index)].dtype;
}

}  // namespace

LessAttention::LessAttention(const PluginData& data, nvinfer1::IErrorRecorder* recorder)
    : data_(data), recorder_(recorder) {
    Layer layer;
    layer.attributes = data.attributes;
    if (data.configured) {
        layer.sizes = data.configured->sizes;
    }
    metadata_ = describe(layer);
}

nvinfer1::IPluginCapability* LessAttention::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* LessAttention::clone() noexcept {
    return guarded(recorder_, static_cast<nvinfer1::IPluginV3*>(nullptr), [this] {
        // TensorRT deletes what it is given.
        return static_cast<nvinfer1::IPluginV3*>(
            std::make_unique<LessAttention>(data_, recorder_).release());
    });
}

std::int32_t LessAttention::getNbOutputs() const noexcept {
    return guarded(recorder_, -1, [this] {
        return static_cast<std::int32_t>(state_names(data_.attributes).size()) + 1;
    });
}

std::int32_t LessAttention::getAliasedInput(std::int32_t index) noexcept {
    return index < 0 || index >= getNbOutputs() ? -1 : aliased_input(index);
}

bool LessAttention::supportsFormatCombination(std::int32_t position,
                                              const DynamicPluginTensorDesc* tensors,
                                              std::int32_t inputs, std::int32_t outputs) noexcept {
    return guarded(recorder_, false, [&] {
        require_count("inputs", input_names(data_.attributes).size(), inputs);
        require_count("outputs", state_names(data_.attributes).size() + 1, outputs);
        const nvinfer1::PluginTensorDesc& asked = tensors[position].desc;
        if (asked.format != nvinfer1::TensorFormat::kLINEAR) {
            return false;
        }
        const auto is_real = [](nvinfer1::DataType type) {
            return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF ||
                   type == nvinfer1::DataType::kBF16;
        };
        // q's type, and H's, are the caller's choice; the others follow from them. Over codes q has
        // no choice either.
        const auto names = input_names(data_.attributes);
        const bool free = (position == 0 && !data_.attributes.coded()) ||
                          (position < inputs && names[static_cast<std::size_t>(position)] == "H");
        if (free) {
            return is_real(asked.type);
        }
        return asked.type == tensorrt_type(expected_type(data_.attributes, position, tensors));
    });
}

std::int32_t LessAttention::getOutputDataTypes(nvinfer1::DataType* types, std::int32_t outputs,
                                               const nvinfer1::DataType* given,
                                               std::int32_t inputs) const noexcept {
    return guarded(recorder_, kFailure, [&] {
        std::for_each(given, given + inputs,
                      [](nvinfer1::DataType type) { static_cast<void>(dtype_of(type)); });
        require_count("inputs", input_names(data_.attributes).size(), inputs);
        require_count("outputs", state_names(data_.attributes).size() + 1, outputs);
        for (std::int32_t i = 0; i < outputs; ++i) {
            types[i] = given[std::max(aliased_input(i), 0)];
        }
        return kSuccess;
    });
}

std::int32_t LessAttention::getOutputShapes(const nvinfer1::DimsExprs* given, std::int32_t inputs,
                                            const nvinfer1::DimsExprs* /*shape_values*/,
                                            std::int32_t /*shape_inputs*/,
                                            nvinfer1::DimsExprs* shapes, std::int32_t outputs,
                                            nvinfer1::IExprBuilder& /*builder*/) noexcept {
    return guarded(recorder_, kFailure, [&] {
        const auto names = input_names(data_.attributes);
        require_count("inputs", names.size(), inputs);
        require_count("outputs", state_names(data_.attributes).size() + 1, outputs);
        // Sizes may be unknown yet; configurePlugin has them all. The numbers of dimensions hold.
        const auto expected = inputs_of({data_.attributes, {}});
        for (std::int32_t i = 0; i < inputs; ++i) {
            const auto& tensor = expected[static_cast<std::size_t>(i)];
            require_count(text("dimensions of input ", tensor.name).c_str(), tensor.dims.size(),
                          given[i].nbDims);
        }
        for (std::int32_t i = 0; i < outputs; ++i) {
            shapes[i] = given[std::max(aliased_input(i), 0)];
        }
        const auto* capacity = given[kTokenInputs].d[2];
        if (capacity->isConstant() && capacity->getConstantValue() != data_.attributes.capacity) {
            throw Refusal(ErrorKind::kInvalidArgument, "input keys: has ",
                          capacity->getConstantValue(), " slots, but capacity is ",
                          data_.attributes.capacity);
        }
        return kSuccess;
    });
}

Device LessAttention::device(const Driver& driver) const {
    Device found = current_device(driver);
    if (data_.configured) {
        found.multiprocessors = data_.configured->multiprocessors;
    }
    return found;
}

Layer LessAttention::configure(const std::vector<Given>& least, const std::vector<Given>& most) {
    const Layer layer = read_layer(data_.attributes, most);
    check_tensors(inputs_of(layer), least, "input");
    const Device gpu = current_device(Driver::get());
    Configured found;
    found.sizes = layer.sizes;
    found.least_batch = batch_of(least);
    found.most_batch = batch_of(most);
    found.multiprocessors = gpu.multiprocessors;
    if (data_.configured && same(data_.configured->sizes, found.sizes)) {
        // Another profile of the same engine.
        found.least_batch = std::min(found.least_batch, data_.configured->least_batch);
        found.most_batch = std::max(found.most_batch, data_.configured->most_batch);
    }
    static_cast<void>(
        distinct_plans(embedded_kernels(), layer, gpu, found.least_batch, found.most_batch));
    found.workspace =
        workspace_units(workspace_for(embedded_kernels(), layer, gpu, found.most_batch));
    data_.configured = found;
    metadata_ = describe(layer);
    launcher_.reset();
    return layer;
}

std::int32_t LessAttention::configurePlugin(const DynamicPluginTensorDesc* given,
                                            std::int32_t inputs,
                                            const DynamicPluginTensorDesc* results,
                                            std::int32_t outputs) noexcept {
    return guarded(recorder_, kFailure, [&] {
        const auto most = given_of(given, inputs, &DynamicPluginTensorDesc::max);
        const Layer layer = configure(given_of(given, inputs, &DynamicPluginTensorDesc::min), most);
        check_outputs(layer, given_of(results, outputs, &DynamicPluginTensorDesc::max));
        return kSuccess;
    });
}

std::size_t LessAttention::getWorkspaceSize(const DynamicPluginTensorDesc* given,
                                            std::int32_t inputs,
                                            const DynamicPluginTensorDesc* /*results*/,
                                            std::int32_t /*outputs*/) const noexcept {
    return guarded(recorder_, std::size_t{0}, [&] {
        const auto most = given_of(given, inputs, &DynamicPluginTensorDesc::max);
        const Layer layer = read_layer(data_.attributes, most);
        return workspace_for(embedded_kernels(), layer, device(Driver::get()), batch_of(most));
    });
}

void LessAttention::preload() {
    if (!data_.configured) {
        return;
    }
    const Configured& engine = *data_.configured;
    const Layer layer{data_.attributes, engine.sizes};
    const Driver& driver = Driver::get();
    for (const Plan& plan : distinct_plans(embedded_kernels(), layer, device(driver),
                                           engine.least_batch, engine.most_batch)) {
        for (const Launch& launch : plan.launches) {
            kernels_.push_back(shared_kernel(driver, *launch.record));
        }
    }
}

void LessAttention::plan(const std::vector<Given>& inputs) {
    const Layer layer = read_layer(data_.attributes, inputs);
    const std::int32_t batch = batch_of(inputs);
    const Driver& driver = Driver::get();
    if (data_.configured && !same(data_.configured->sizes, layer.sizes)) {
        throw Refusal(ErrorKind::kInvalidArgument, "shapes: got ", describe(layer),
                      ", but the engine was built for ",
                      describe({data_.attributes, data_.configured->sizes}));
    }
    if (launcher_ != nullptr && launcher_->batch() == batch &&
        launcher_->context() == current_context(driver)) {
        return;
    }
    Plan plan = plan_step(embedded_kernels(), layer, device(driver), batch);
    if (data_.configured && batch <= data_.configured->most_batch &&
        workspace_units(plan.workspace_bytes) > data_.configured->workspace) {
        throw Refusal(ErrorKind::kInvalidConfig, "workspace: this library's kernels need ",
                      plan.workspace_bytes, " bytes for batch ", batch, ", the engine gives ",
                      data_.configured->workspace * kWorkspaceUnit,
                      "; build the engine with this library");
    }
    launcher_ = std::make_unique<Launcher>(driver, layer, batch, std::move(plan));
}

std::int32_t LessAttention::onShapeChange(const nvinfer1::PluginTensorDesc* given,
                                          std::int32_t inputs,
                                          const nvinfer1::PluginTensorDesc* results,
                                          std::int32_t outputs) noexcept {
    return guarded(recorder_, kFailure, [&] {
        const auto tensors = given_of(given, inputs);
        const Layer layer = read_layer(data_.attributes, tensors);
        check_outputs(layer, given_of(results, outputs));
        plan(tensors);
        return kSuccess;
    });
}

std::int32_t LessAttention::enqueue(const nvinfer1::PluginTensorDesc* given,
                                    const nvinfer1::PluginTensorDesc* /*results*/,
                                    const void* const* inputs, void* const* outputs,
                                    void* workspace, cudaStream_t stream) noexcept {
    return guarded(recorder_, kFailure, [&] {
        if (launcher_ == nullptr || given[0].dims.d[0] != launcher_->batch()) {
            throw Refusal(ErrorKind::kInternal, "enqueue: batch ", given[0].dims.d[0],
                          " was not announced by onShapeChange");
        }
        launcher_->run({inputs, outputs, workspace}, stream);
        return kSuccess;
    });
}

nvinfer1::IPluginV3* LessAttention::attachToContext(
    nvinfer1::IPluginResourceContext* context) noexcept {
    auto* recorder = context == nullptr ? nullptr : context->getErrorRecorder();
    return guarded(recorder, static_cast<nvinfer1::IPluginV3*>(nullptr), [this, recorder] {
        auto attached = std::make_unique<LessAttention>(data_, recorder);
        attached->preload();
        return static_cast<nvinfer1::IPluginV3*>(attached.release());
    });
}

const nvinfer1::PluginFieldCollection* LessAttention::getFieldsToSerialize() noexcept {
    return guarded(recorder_, static_cast<const nvinfer1::PluginFieldCollection*>(nullptr), [this] {
        fields_ = std::make_unique<Fields>(data_);
        return fields_->collection();
    });
}

}  // namespace less_cache
