#include "fields.h"

#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "errors.h"
#include "field_reader.h"

namespace less_cache {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

/// Of what an engine holds; another layout of the fields is another number.
constexpr std::int32_t kFormat = 3;

/// The fields as plain numbers, before anything is checked.
struct Plain {
    std::int32_t start = 0, gain = 0, sinks = 0, recent = 0, window = 0, capacity = 0, rank = 0;
    float decay = 0, scale = 0, softcap = 0;
    std::string maps;
    std::string key_bits, value_bits, transform, model_dtype;
    /// Whether there are these four.
    bool coded = false;
    std::int32_t format = kFormat;
    std::int32_t query_heads = 0, kv_heads = 0, head_dim = 0, hidden = 0, dtype = 0;
    std::int32_t key_bytes = 0, value_bytes = 0;
    std::int32_t state_dtype = 0, least_batch = 0, most_batch = 0, multiprocessors = 0,
                 workspace = 0;
};

template <typename Visitor>
void visit_attributes(Plain& plain, Visitor& visit) {
    visit("start", plain.start);
    visit("gain", plain.gain);
    visit("sinks", plain.sinks);
    visit("recent", plain.recent);
    visit("decay", plain.decay);
    visit("window", plain.window);
    visit("capacity", plain.capacity);
    visit("rank", plain.rank);
    visit("maps", plain.maps);
    visit("scale", plain.scale);
    visit("softcap", plain.softcap);
}

/// What nodes of layers with codes have besides.
template <typename Visitor>
void visit_codes(Plain& plain, Visitor& visit) {
    visit("key_bits", plain.key_bits);
    visit("value_bits", plain.value_bits);
    visit("transform", plain.transform);
    visit("model_dtype", plain.model_dtype);
}

template <typename Visitor>
void visit_engine(Plain& plain, Visitor& visit) {
    visit("format", plain.format);
    visit("query_heads", plain.query_heads);
    visit("kv_heads", plain.kv_heads);
    visit("head_dim", plain.head_dim);
    visit("hidden", plain.hidden);
    visit("dtype", plain.dtype);
    visit("state_dtype", plain.state_dtype);
    visit("key_bytes", plain.key_bytes);
    visit("value_bytes", plain.value_bytes);
    visit("least_batch", plain.least_batch);
    visit("most_batch", plain.most_batch);
    visit("multiprocessors", plain.multiprocessors);
    visit("workspace", plain.workspace);
}

/// The member of an enum that is spelled so.
///
/// @throws Refusal naming the attribute.
template <typename Enum>
Enum spelled(const char* name, const std::string& value, std::initializer_list<Enum> members) {
    std::string known;
    for (const Enum member : members) {
        if (value == name_of(member)) {
            return member;
        }
        known += text(known.empty() ? "" : ", ", '"', name_of(member), '"');
    }
    throw Refusal(ErrorKind::kInvalidArgument, name, ": got \"", value, "\", expected one of ",
                  known);
}

Attributes attributes_of(const Plain& plain) {
    Attributes attributes;
    // `check` looks at their values.
    attributes.start = static_cast<Start>(plain.start);
    attributes.gain = static_cast<Gain>(plain.gain);
    attributes.sinks = plain.sinks;
    attributes.recent = plain.recent;
    attributes.decay = plain.decay;
    attributes.window = plain.window;
    attributes.capacity = plain.capacity;
    attributes.rank = plain.rank;
    attributes.scale = plain.scale;
    attributes.softcap = plain.softcap;
    attributes.maps = spelled("maps", plain.maps, {MapKind::kNone, MapKind::kPaper, MapKind::kExp});
    if (plain.coded) {
        attributes.key_bits = plain.key_bits;
        attributes.value_bits = plain.value_bits;
        attributes.transform =
            spelled("transform", plain.transform, {Transform::kHadamard, Transform::kCalibrated});
        attributes.model_dtype = spelled("model_dtype", plain.model_dtype,
                                         {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16});
    }
    check(attributes);
    return attributes;
}

Dtype dtype_of(const char* name, std::int32_t number) {
    if (number < 0 || number > static_cast<std::int32_t>(Dtype::kBFloat16)) {
        throw Refusal(ErrorKind::kInvalidArgument, name, ": got ", number, ", expected 0 to 2");
    }
    return static_cast<Dtype>(number);
}

Configured configured_of(const Plain& plain) {
    Configured configured;
    configured.sizes = {plain.query_heads,
                        plain.kv_heads,
                        plain.head_dim,
                        plain.hidden,
                        dtype_of("dtype", plain.dtype),
                        dtype_of("state_dtype", plain.state_dtype),
                        plain.key_bytes,
                        plain.value_bytes};
    configured.least_batch = plain.least_batch;
    configured.most_batch = plain.most_batch;
    configured.multiprocessors = plain.multiprocessors;
    configured.workspace = plain.workspace;
    if (plain.least_batch < 0 || plain.most_batch < plain.least_batch ||
        plain.multiprocessors < 1 || plain.workspace < 0) {
        throw Refusal(ErrorKind::kInvalidArgument, "engine: batches ", plain.least_batch, " to ",
                      plain.most_batch, ", ", plain.multiprocessors, " multiprocessors and ",
                      plain.workspace, " units of workspace cannot be; the engine is damaged");
    }
    return configured;
}

Plain plain_of(const PluginData& data) {
    Plain plain;
    const Attributes& attributes = data.attributes;
    plain.start = static_cast<std::int32_t>(attributes.start);
    plain.gain = static_cast<std::int32_t>(attributes.gain);
    plain.sinks = attributes.sinks;
    plain.recent = attributes.recent;
    plain.decay = attributes.decay;
    plain.window = attributes.window;
    plain.capacity = attributes.capacity;
    plain.rank = attributes.rank;
    plain.maps = name_of(attributes.maps);
    plain.scale = attributes.scale;
    plain.softcap = attributes.softcap;
    plain.coded = attributes.coded();
    plain.key_bits = attributes.key_bits;
    plain.value_bits = attributes.value_bits;
    plain.transform = name_of(attributes.transform);
    plain.model_dtype = name_of(attributes.model_dtype);
    if (data.configured) {
        const Sizes& sizes = data.configured->sizes;
        plain.query_heads = sizes.query_heads;
        plain.kv_heads = sizes.kv_heads;
        plain.head_dim = sizes.head_dim;
        plain.hidden = sizes.hidden;
        plain.dtype = static_cast<std::int32_t>(sizes.dtype);
        plain.state_dtype = static_cast<std::int32_t>(sizes.state_dtype);
        plain.key_bytes = sizes.key_bytes;
        plain.value_bytes = sizes.value_bytes;
        plain.least_batch = data.configured->least_batch;
        plain.most_batch = data.configured->most_batch;
        plain.multiprocessors = data.configured->multiprocessors;
        plain.workspace = data.configured->workspace;
    }
    return plain;
}

}  // namespace

std::int32_t workspace_units(std::size_t bytes) {
    const std::size_t unit = kWorkspaceUnit;
    const std::size_t units = (bytes + unit - 1) / unit;
    if (units > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
        throw Refusal(ErrorKind::kInvalidConfig, "workspace: ", bytes,
                      " bytes are more than any GPU has; use smaller batches");
    }
    return static_cast<std::int32_t>(units);
}

/// Collects the values first: the vectors must have grown before anything points into them.
struct Fields::Storage {
    Fields& fields;
    std::vector<std::pair<const char*, PluginFieldType>> order;

    void operator()(const char* name, std::int32_t value) {
        fields.integers_.push_back(value);
        order.emplace_back(name, PluginFieldType::kINT32);
    }
    void operator()(const char* name, float value) {
        fields.reals_.push_back(value);
        order.emplace_back(name, PluginFieldType::kFLOAT32);
    }
    void operator()(const char* name, const std::string& value) {
        fields.texts_.push_back(value);
        order.emplace_back(name, PluginFieldType::kCHAR);
    }

    void point() {
        std::size_t integer = 0;
        std::size_t real = 0;
        std::size_t text = 0;
        for (const auto& [name, type] : order) {
            if (type == PluginFieldType::kINT32) {
                fields.fields_.emplace_back(name, &fields.integers_[integer++], type, 1);
            } else if (type == PluginFieldType::kFLOAT32) {
                fields.fields_.emplace_back(name, &fields.reals_[real++], type, 1);
            } else {
                const std::string& own = fields.texts_[text++];
                fields.fields_.emplace_back(name, own.data(), type,
                                            static_cast<std::int32_t>(own.size()));
            }
        }
    }
};

Fields::Fields(const PluginData& data) {
    Plain plain = plain_of(data);
    Storage storage{*this, {}};
    visit_attributes(plain, storage);
    if (plain.coded) {
        visit_codes(plain, storage);
    }
    visit_engine(plain, storage);
    storage.point();
    collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
}

PluginData read_fields(const nvinfer1::PluginFieldCollection* collection,
                       nvinfer1::TensorRTPhase phase) {
    if (collection == nullptr || (collection->nbFields > 0 && collection->fields == nullptr)) {
        throw Refusal(ErrorKind::kInvalidArgument, "fields: none are given");
    }
    Plain plain;
    FieldReader reader(*collection);
    if (phase == nvinfer1::TensorRTPhase::kRUNTIME) {
        reader("format", plain.format);
        if (plain.format != kFormat) {
            throw Refusal(ErrorKind::kInvalidArgument, "format: the engine has ", plain.format,
                          ", this library reads ", kFormat, "; build the engine again");
        }
    }
    visit_attributes(plain, reader);
    const auto is_given = [&](const char* name, const auto&) { plain.coded |= reader.has(name); };
    visit_codes(plain, is_given);
    if (plain.coded) {
        visit_codes(plain, reader);
    }
    PluginData data;
    if (phase == nvinfer1::TensorRTPhase::kRUNTIME) {
        const auto rest = [&reader](const char* name, auto& value) {
            if (std::strcmp(name, "format") != 0) {
                reader(name, value);
            }
        };
        visit_engine(plain, rest);
    }
    reader.finish();
    data.attributes = attributes_of(plain);
    // A head size of 0 is what a plugin writes that was never configured.
    if (plain.head_dim != 0) {
        data.configured = configured_of(plain);
        check(Layer{data.attributes, data.configured->sizes});
    }
    return data;
}

const nvinfer1::PluginFieldCollection* attribute_fields() {
    static const std::vector<PluginField> fields = [] {
        std::vector<PluginField> found;
        const auto add = [&found](const char* name, auto& value) {
            found.emplace_back(name, nullptr, field_type<std::decay_t<decltype(value)>>(), 1);
        };
        Plain plain;
        visit_attributes(plain, add);
        visit_codes(plain, add);
        return found;
    }();
    static const nvinfer1::PluginFieldCollection collection{
        static_cast<std::int32_t>(fields.size()), fields.data()};
    return &collection;
}

}  // namespace less_cache
