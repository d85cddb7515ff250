#pragma once

#include <NvInferRuntime.h>

#include <exception>

#include "errors.h"

namespace less_cache {

/// Tells an error to TensorRT's error recorder and log; to stderr where there is neither.
///
/// @param recorder Of the execution context; nullptr for the registry's.
void report(nvinfer1::IErrorRecorder* recorder, ErrorKind kind, const char* message) noexcept;

/// Runs `body` and returns what it returns; reports what it throws, and returns `failed` then.
///
/// Nothing may leave TensorRT's callbacks but by their return value.
template <typename Body, typename Result>
Result guarded(nvinfer1::IErrorRecorder* recorder, Result failed, const Body& body) noexcept {
    try {
        return body();
    } catch (const Refusal& refusal) {
        report(recorder, refusal.kind(), refusal.what());
    } catch (const std::exception& error) {
        report(recorder, ErrorKind::kInternal, error.what());
    } catch (...) {
        report(recorder, ErrorKind::kInternal, "unknown exception");
    }
    return failed;
}

}  // namespace less_cache
