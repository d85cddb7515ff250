#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "layer.h"

namespace less_cache::testing {

/// Fields with tabs between them.
class TabLine {
public:
    explicit TabLine(const std::string& line) : stream_(line) {}

    /// @throws std::runtime_error where the line ends.
    std::string text() {
        std::string field;
        if (stream_.eof() || (!std::getline(stream_, field, '\t') && !stream_.eof())) {
            throw std::runtime_error("a line ends too early");
        }
        return field;
    }
    std::int32_t integer() { return std::stoi(text()); }
    float real() { return std::stof(text()); }
    Dtype dtype() {
        const std::string name = text();
        for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
            if (name == name_of(dtype)) {
                return dtype;
            }
        }
        throw std::runtime_error("unknown dtype " + name);
    }

private:
    std::istringstream stream_;
};

/// The sizes, in the order of `Sizes`, and the attributes, in the order of `Attributes`.
inline Layer read_layer(TabLine& line) {
    Layer layer;
    Sizes& sizes = layer.sizes;
    for (std::int32_t* field :
         {&sizes.query_heads, &sizes.kv_heads, &sizes.head_dim, &sizes.hidden}) {
        *field = line.integer();
    }
    sizes.dtype = line.dtype();
    sizes.state_dtype = line.dtype();
    sizes.key_bytes = line.integer();
    sizes.value_bytes = line.integer();
    Attributes& attributes = layer.attributes;
    attributes.start = static_cast<Start>(line.integer());
    attributes.gain = static_cast<Gain>(line.integer());
    attributes.sinks = line.integer();
    attributes.recent = line.integer();
    attributes.decay = line.real();
    attributes.window = line.integer();
    attributes.capacity = line.integer();
    attributes.rank = line.integer();
    attributes.maps = static_cast<MapKind>(line.integer());
    attributes.scale = line.real();
    attributes.softcap = line.real();
    attributes.key_bits = line.text();
    attributes.value_bits = line.text();
    attributes.transform = static_cast<Transform>(line.integer());
    attributes.model_dtype = sizes.dtype;
    return layer;
}

}  // namespace less_cache::testing
