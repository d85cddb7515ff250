#include "field_reader.h"

#include <cstring>

#include "errors.h"

namespace less_cache {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

const char* spelled(PluginFieldType type) {
    switch (type) {
        case PluginFieldType::kINT32:
            return "INT32";
        case PluginFieldType::kFLOAT32:
            return "FLOAT32";
        case PluginFieldType::kCHAR:
            return "CHAR";
        default:
            return "another type";
    }
}

}  // namespace

FieldReader::FieldReader(const nvinfer1::PluginFieldCollection& collection) {
    for (std::int32_t i = 0; i < collection.nbFields; ++i) {
        const PluginField& field = collection.fields[i];
        const std::string name = field.name == nullptr ? "" : field.name;
        if (!fields_.emplace(name, &field).second) {
            throw Refusal(ErrorKind::kInvalidArgument, name, ": the field is given twice");
        }
    }
}

const PluginField& FieldReader::take(const char* name, PluginFieldType type) {
    names_ += (names_.empty() ? "" : ", ") + std::string(name);
    const auto found = fields_.find(name);
    if (found == fields_.end()) {
        throw Refusal(ErrorKind::kInvalidArgument, name, ": the field is missing");
    }
    const PluginField& field = *found->second;
    fields_.erase(found);
    if (field.type != type) {
        throw Refusal(ErrorKind::kInvalidArgument, name, ": got ", spelled(field.type), " (",
                      static_cast<int>(field.type), "), expected ", spelled(type));
    }
    return field;
}

template <typename Number>
void FieldReader::read_number(const char* name, Number& value) {
    const PluginField& field = take(name, field_type<Number>());
    if (field.data == nullptr) {
        throw Refusal(ErrorKind::kInvalidArgument, name, ": the field has no value");
    }
    if (field.length != 1) {
        throw Refusal(ErrorKind::kInvalidArgument, name, ": got ", field.length,
                      " numbers, expected 1");
    }
    std::memcpy(&value, field.data, sizeof value);
}

void FieldReader::operator()(const char* name, std::int32_t& value) { read_number(name, value); }

void FieldReader::operator()(const char* name, float& value) { read_number(name, value); }

void FieldReader::operator()(const char* name, std::string& value) {
    const PluginField& field = take(name, PluginFieldType::kCHAR);
    if (field.length < 0 || (field.data == nullptr && field.length > 0)) {
        throw Refusal(ErrorKind::kInvalidArgument, name, ": the field has no value");
    }
    value.assign(static_cast<const char*>(field.data), static_cast<std::size_t>(field.length));
    // The end that some writers of strings add.
    if (!value.empty() && value.back() == '\0') {
        value.pop_back();
    }
}

void FieldReader::finish() const {
    if (!fields_.empty()) {
        throw Refusal(ErrorKind::kInvalidArgument, fields_.begin()->first,
                      ": unknown field; known are ", names_);
    }
}

}  // namespace less_cache
