#include "tensors.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <string>

#include "errors.h"

namespace less_cache {
namespace {

std::string spelled(const nvinfer1::Dims& dims) {
    std::string line = "[";
    for (std::int32_t i = 0; i < dims.nbDims; ++i) {
        line += text(i == 0 ? "" : ", ", dims.d[i]);
    }
    return line + "]";
}

std::string spelled(const Tensor& tensor) {
    std::string line = "[";
    for (std::size_t i = 0; i < tensor.dims.size(); ++i) {
        line += i == 0 ? "" : ", ";
        line += tensor.dims[i] < 0 ? "batch" : text(tensor.dims[i]);
    }
    return line + "]";
}

void check_count(std::size_t expected, std::size_t given, const char* role) {
    if (expected != given) {
        throw Refusal(ErrorKind::kInvalidArgument, role, "s: got ", given, ", expected ", expected,
                      " for these attributes");
    }
}

bool same_shape(const Tensor& expected, const nvinfer1::Dims& given, std::int64_t batch) {
    if (given.nbDims != static_cast<std::int32_t>(expected.dims.size())) {
        return false;
    }
    for (std::size_t i = 0; i < expected.dims.size(); ++i) {
        const std::int64_t wanted = expected.dims[i] < 0 ? batch : expected.dims[i];
        const std::int64_t size = given.d[i];
        if (size >= 0 && wanted >= 0 && size != wanted) {
            return false;
        }
    }
    return true;
}

/// One size of one input, as 32 bits hold it.
std::int32_t size_at(const std::vector<Given>& inputs, std::size_t index, const std::string& name,
                     std::int32_t rank, std::int32_t axis) {
    const nvinfer1::Dims& dims = inputs[index].dims;
    if (dims.nbDims != rank) {
        throw Refusal(ErrorKind::kInvalidArgument, "input ", name, ": got ", dims.nbDims,
                      " dimensions, ", spelled(dims), ", expected ", rank);
    }
    const std::int64_t size = dims.d[axis];
    if (size < 0 || size > std::numeric_limits<std::int32_t>::max()) {
        throw Refusal(ErrorKind::kInvalidArgument, "input ", name, ": its shape is ", spelled(dims),
                      ", but all sizes except the batch must be fixed");
    }
    return static_cast<std::int32_t>(size);
}

}  // namespace

Dtype dtype_of(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT:
            return Dtype::kFloat32;
        case nvinfer1::DataType::kHALF:
            return Dtype::kFloat16;
        case nvinfer1::DataType::kBF16:
            return Dtype::kBFloat16;
        case nvinfer1::DataType::kINT32:
            return Dtype::kInt32;
        case nvinfer1::DataType::kINT64:
            return Dtype::kInt64;
        case nvinfer1::DataType::kINT8:
            return Dtype::kInt8;
        case nvinfer1::DataType::kUINT8:
            throw Refusal(ErrorKind::kInvalidArgument,
                          "type: got uint8, which no plugin may have; codes come as int8");
        default:
            throw Refusal(ErrorKind::kInvalidArgument, "type: got TensorRT's number ",
                          static_cast<int>(type),
                          ", expected float32, float16, bfloat16, int8, int32 or int64");
    }
}

nvinfer1::DataType tensorrt_type(Dtype dtype) {
    switch (dtype) {
        case Dtype::kFloat16:
            return nvinfer1::DataType::kHALF;
        case Dtype::kBFloat16:
            return nvinfer1::DataType::kBF16;
        case Dtype::kInt32:
            return nvinfer1::DataType::kINT32;
        case Dtype::kInt64:
            return nvinfer1::DataType::kINT64;
        case Dtype::kInt8:
            return nvinfer1::DataType::kINT8;
        case Dtype::kFloat32:
            break;
    }
    return nvinfer1::DataType::kFLOAT;
}

std::vector<Given> given_of(const nvinfer1::PluginTensorDesc* tensors, std::int32_t count) {
    std::vector<Given> given;
    given.reserve(static_cast<std::size_t>(count));
    for (std::int32_t i = 0; i < count; ++i) {
        given.push_back({tensors[i].dims, tensors[i].type});
    }
    return given;
}

std::vector<Given> given_of(const nvinfer1::DynamicPluginTensorDesc* tensors, std::int32_t count,
                            nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::* bound) {
    std::vector<Given> given;
    given.reserve(static_cast<std::size_t>(count));
    for (std::int32_t i = 0; i < count; ++i) {
        given.push_back({tensors[i].*bound, tensors[i].desc.type});
    }
    return given;
}

Layer read_layer(const Attributes& attributes, const std::vector<Given>& inputs) {
    const auto names = input_names(attributes);
    check_count(names.size(), inputs.size(), "input");
    const auto index_of = [&names](const char* name) {
        return static_cast<std::size_t>(
            std::distance(names.begin(), std::find(names.begin(), names.end(), name)));
    };
    Layer layer;
    layer.attributes = attributes;
    Sizes& sizes = layer.sizes;
    sizes.query_heads = size_at(inputs, 0, "q", 4, 1);
    sizes.head_dim = size_at(inputs, 0, "q", 4, 3);
    sizes.kv_heads = size_at(inputs, 1, "k", 4, 1);
    sizes.dtype = attributes.coded() ? attributes.model_dtype : dtype_of(inputs[0].type);
    if (attributes.coded()) {
        sizes.key_bytes = size_at(inputs, index_of("keys"), "keys", 4, 3);
        sizes.value_bytes = size_at(inputs, index_of("values"), "values", 4, 3);
    }
    if (attributes.rank > 0) {
        sizes.hidden = size_at(inputs, index_of("phi_w1"), "phi_w1", 3, 2);
        sizes.state_dtype = dtype_of(inputs[index_of("H")].type);
    }
    check(layer);
    check_tensors(inputs_of(layer), inputs, "input");
    return layer;
}

void check_tensors(const std::vector<Tensor>& expected, const std::vector<Given>& given,
                   const char* role) {
    check_count(expected.size(), given.size(), role);
    const std::int64_t batch = given[0].dims.nbDims > 0 ? given[0].dims.d[0] : -1;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        if (dtype_of(given[i].type) != expected[i].dtype) {
            throw Refusal(ErrorKind::kInvalidArgument, role, " ", expected[i].name, ": got ",
                          name_of(dtype_of(given[i].type)), ", expected ",
                          name_of(expected[i].dtype));
        }
        if (!same_shape(expected[i], given[i].dims, batch)) {
            throw Refusal(ErrorKind::kInvalidArgument, role, " ", expected[i].name, ": got ",
                          spelled(given[i].dims), ", expected ", spelled(expected[i]),
                          " with batch ", batch);
        }
    }
}

std::int32_t batch_of(const std::vector<Given>& inputs) {
    const std::int64_t batch = inputs.at(0).dims.d[0];
    if (batch < 0 || batch > std::numeric_limits<std::int32_t>::max()) {
        throw Refusal(ErrorKind::kInvalidArgument, "batch: got ", batch, ", expected 0 to ",
                      std::numeric_limits<std::int32_t>::max());
    }
    return static_cast<std::int32_t>(batch);
}

}  // namespace less_cache
