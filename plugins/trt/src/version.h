#pragma once

#include <NvInferVersion.h>

#define LESS_CACHE_QUOTE(text) #text
#define LESS_CACHE_QUOTED(macro) LESS_CACHE_QUOTE(macro)

namespace less_cache {

/// The TensorRT that this library was compiled for; another major version's interfaces differ.
constexpr int kTensorRtMajor = NV_TENSORRT_MAJOR;

/// Who speaks, at the head of every message.
constexpr const char* kSpeaker =
    "less_cache " LESS_CACHE_VERSION " for TensorRT " LESS_CACHE_QUOTED(NV_TENSORRT_MAJOR);

}  // namespace less_cache
