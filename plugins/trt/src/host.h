#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace less_cache {

/// TensorRT's plugin registry in this process, without linking to TensorRT.
///
/// @param why Receives the reason where there is none.
/// @returns nullptr where no TensorRT of our major version is loaded.
nvinfer1::IPluginRegistry* host_registry(std::string* why = nullptr);

/// What gives loggers to a library that was loaded by `IPluginRegistry::loadLibrary`.
void set_logger_finder(nvinfer1::ILoggerFinder* finder);

/// Where messages go: the finder's logger, else TensorRT's own; nullptr where there is neither.
nvinfer1::ILogger* host_logger();

}  // namespace less_cache
