#include "report.h"

#include <cstdio>
#include <string>

#include "host.h"
#include "version.h"

namespace less_cache {
namespace {

nvinfer1::ErrorCode code_of(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::kInvalidArgument:
            return nvinfer1::ErrorCode::kINVALID_ARGUMENT;
        case ErrorKind::kInvalidConfig:
            return nvinfer1::ErrorCode::kINVALID_CONFIG;
        case ErrorKind::kFailedInitialization:
            return nvinfer1::ErrorCode::kFAILED_INITIALIZATION;
        case ErrorKind::kFailedExecution:
            return nvinfer1::ErrorCode::kFAILED_EXECUTION;
        case ErrorKind::kInternal:
            break;
    }
    return nvinfer1::ErrorCode::kINTERNAL_ERROR;
}

void tell(nvinfer1::IErrorRecorder* recorder, ErrorKind kind, const char* message) {
    if (recorder == nullptr) {
        auto* registry = host_registry();
        recorder = registry == nullptr ? nullptr : registry->getErrorRecorder();
    }
    if (recorder != nullptr) {
        // Recorders keep this much; the log gets the whole message.
        const std::string brief(message, 0, nvinfer1::IErrorRecorder::kMAX_DESC_LENGTH);
        recorder->reportError(code_of(kind), brief.c_str());
    }
    const std::string line = text(kSpeaker, ": LessAttention: ", message);
    if (auto* logger = host_logger()) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    } else if (recorder == nullptr) {
        static_cast<void>(std::fprintf(stderr, "%s\n", line.c_str()));
    }
}

}  // namespace

void report(nvinfer1::IErrorRecorder* recorder, ErrorKind kind, const char* message) noexcept {
    try {
        tell(recorder, kind, message);
    } catch (...) {
        // Without memory for a line, the message itself is all that can be said.
        static_cast<void>(std::fputs(message, stderr));
    }
}

}  // namespace less_cache
