#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace less_cache {

/// What went wrong, in the terms that TensorRT's error recorder has.
enum class ErrorKind {
    kInvalidArgument,
    kInvalidConfig,
    kFailedInitialization,
    kFailedExecution,
    kInternal,
};

/// One string of all parts, as a stream prints them.
template <typename... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream stream;
    (stream << ... << parts);
    return stream.str();
}

/// Something that cannot be done, with a message that names what was given and what is allowed.
class Refusal : public std::runtime_error {
public:
    template <typename... Parts>
    explicit Refusal(ErrorKind kind, const Parts&... parts)
        : std::runtime_error(text(parts...)), kind_(kind) {}

    [[nodiscard]] ErrorKind kind() const { return kind_; }

private:
    ErrorKind kind_;
};

}  // namespace less_cache
