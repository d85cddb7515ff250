#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <vector>

#include "layer.h"

namespace less_cache {

/// A tensor's shape and type as TensorRT tells them; sizes that are not known are -1.
struct Given {
    nvinfer1::Dims dims;
    nvinfer1::DataType type;
};

/// @throws Refusal for types that no tensor of the node has.
Dtype dtype_of(nvinfer1::DataType type);

/// As TensorRT numbers it.
nvinfer1::DataType tensorrt_type(Dtype dtype);

std::vector<Given> given_of(const nvinfer1::PluginTensorDesc* tensors, std::int32_t count);

/// @param bound `min`, `max` or `opt`.
std::vector<Given> given_of(const nvinfer1::DynamicPluginTensorDesc* tensors, std::int32_t count,
                            nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::* bound);

/// The layer that takes such inputs.
///
/// @throws Refusal that names the tensor whose number, shape or type is not the node's, what it
///     has and what is expected.
Layer read_layer(const Attributes& attributes, const std::vector<Given>& inputs);

/// @throws Refusal as `read_layer`; sizes that are not known are taken to be right.
void check_tensors(const std::vector<Tensor>& expected, const std::vector<Given>& given,
                   const char* role);

/// B; the same of all tensors, which `check_tensors` saw to.
std::int32_t batch_of(const std::vector<Given>& inputs);

}  // namespace less_cache
