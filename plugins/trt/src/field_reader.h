#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <map>
#include <string>
#include <type_traits>

namespace less_cache {

/// The type of a field that holds such a value: one number, or characters.
template <typename Value>
constexpr nvinfer1::PluginFieldType field_type() {
    using nvinfer1::PluginFieldType;
    if constexpr (std::is_same_v<Value, std::int32_t>) {
        return PluginFieldType::kINT32;
    } else if constexpr (std::is_same_v<Value, float>) {
        return PluginFieldType::kFLOAT32;
    } else {
        return PluginFieldType::kCHAR;
    }
}

/// Takes a collection's fields by name, one after another.
class FieldReader {
public:
    /// @throws Refusal for a name that is there twice.
    explicit FieldReader(const nvinfer1::PluginFieldCollection& collection);

    /// Reads the field of that name.
    ///
    /// @throws Refusal where it is missing, of another type, or not one value.
    void operator()(const char* name, std::int32_t& value);
    void operator()(const char* name, float& value);
    void operator()(const char* name, std::string& value);

    /// Whether a field of that name is there and was not read yet.
    [[nodiscard]] bool has(const char* name) const { return fields_.count(name) != 0; }

    /// @throws Refusal if a field was not read.
    void finish() const;

private:
    const nvinfer1::PluginField& take(const char* name, nvinfer1::PluginFieldType type);
    template <typename Number>
    void read_number(const char* name, Number& value);

    std::map<std::string, const nvinfer1::PluginField*> fields_;
    std::string names_;
};

}  // namespace less_cache
