#include "layer.h"

#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "errors.h"

namespace less_cache {
namespace {

template <typename Value>
void require(bool right, const char* name, Value given, const std::string& allowed) {
    if (!right) {
        throw Refusal(ErrorKind::kInvalidArgument, name, ": got ", given, ", expected ", allowed);
    }
}

constexpr std::int64_t kBatch = -1;

constexpr const char* kReals = "float32, float16 or bfloat16";

bool is_real(Dtype dtype) {
    return dtype == Dtype::kFloat32 || dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16;
}

void check_codes(const Attributes& attributes) {
    for (const auto& [name, bits] : {std::pair{"key_bits", &attributes.key_bits},
                                     std::pair{"value_bits", &attributes.value_bits}}) {
        if (attributes.coded()) {
            const bool spelled = !bits->empty() && *bits != "0" &&
                                 bits->find_first_not_of("0123456789,") == std::string::npos;
            require(spelled, name, *bits, "numbers with commas between them");
        } else {
            require(*bits == "0", name, *bits, "none without a transform");
        }
    }
}

}  // namespace

const char* name_of(Dtype dtype) {
    constexpr std::array<const char*, 6> kNames{"float32", "float16", "bfloat16",
                                                "int32",   "int64",   "int8"};
    return kNames.at(static_cast<std::size_t>(dtype));
}

std::int64_t size_of(Dtype dtype) {
    constexpr std::array<std::int64_t, 6> kSizes{4, 2, 2, 4, 8, 1};
    return kSizes.at(static_cast<std::size_t>(dtype));
}

const char* name_of(MapKind kind) {
    constexpr std::array<const char*, 3> kNames{"none", "paper", "exp"};
    return kNames.at(static_cast<std::size_t>(kind));
}

const char* name_of(Transform transform) {
    constexpr std::array<const char*, 3> kNames{"", "hadamard", "calibrated"};
    return kNames.at(static_cast<std::size_t>(static_cast<std::int32_t>(transform) + 1));
}

void check(const Attributes& attributes) {
    const auto start = static_cast<std::int32_t>(attributes.start);
    require(start >= 0 && start < kStarts, "start", start, text("0 to ", kStarts - 1));
    const auto gain = static_cast<std::int32_t>(attributes.gain);
    require(gain >= 0 && gain < kGains, "gain", gain, text("0 to ", kGains - 1));
    require(attributes.capacity >= 1, "capacity", attributes.capacity, "1 or more");
    require(attributes.sinks >= 0, "sinks", attributes.sinks, "0 or more");
    require(attributes.recent >= 0, "recent", attributes.recent, "0 or more");
    const std::int64_t needed = std::int64_t{attributes.sinks} + attributes.recent + 1;
    require(attributes.capacity >= needed, "capacity", attributes.capacity,
            text("at least sinks + recent + 1 = ", needed));
    require(attributes.decay >= 0.0F && attributes.decay <= 1.0F, "decay", attributes.decay,
            "0 to 1");
    require(attributes.window >= 0 && attributes.window <= 62, "window", attributes.window,
            "0 to 62");
    require((attributes.window > 0) == (attributes.gain == Gain::kHistory), "window",
            attributes.window, text("a window with gain 2 and none with others; gain is ", gain));
    require(attributes.rank >= 0, "rank", attributes.rank, "0 or more");
    require((attributes.rank > 0) == (attributes.maps != MapKind::kNone), "maps",
            name_of(attributes.maps),
            text(R"("none" at rank 0, and "paper" or "exp" else; rank is )", attributes.rank));
    require(std::isfinite(attributes.scale) && attributes.scale > 0.0F, "scale", attributes.scale,
            "a finite number above 0");
    require(std::isfinite(attributes.softcap) && attributes.softcap >= 0.0F, "softcap",
            attributes.softcap, "a finite number, 0 for none");
    check_codes(attributes);
}

void check(const Layer& layer) {
    check(layer.attributes);
    const Sizes& sizes = layer.sizes;
    require(sizes.kv_heads >= 1, "kv heads", sizes.kv_heads, "1 or more");
    require(sizes.query_heads >= 1 && sizes.query_heads % sizes.kv_heads == 0, "query heads",
            sizes.query_heads, text("a multiple of the ", sizes.kv_heads, " KV heads"));
    require(sizes.head_dim >= 1, "head size", sizes.head_dim, "1 or more");
    require((sizes.hidden >= 1) == (layer.attributes.rank > 0), "the maps' hidden size",
            sizes.hidden, "1 or more with maps, 0 without");
    require(is_real(sizes.dtype), "q's dtype", name_of(sizes.dtype), kReals);
    require(is_real(sizes.state_dtype), "H's dtype", name_of(sizes.state_dtype), kReals);
    if (layer.attributes.coded()) {
        require(sizes.key_bytes >= 1, "bytes of a key's codes", sizes.key_bytes, "1 or more");
        require(sizes.value_bytes >= 1, "bytes of a value's codes", sizes.value_bytes, "1 or more");
    }
    // Within one head the kernels count in 32 bits.
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
    const std::int64_t capacity = layer.attributes.capacity;
    require(capacity * sizes.head_dim <= kMost, "capacity", capacity,
            text("at most ", kMost / sizes.head_dim, " slots of ", sizes.head_dim, " numbers"));
    require(capacity * layer.group() <= kMost, "capacity", capacity,
            text("at most ", kMost / layer.group(), " slots for ", layer.group(), " query heads"));
}

std::vector<std::string> state_names(const Attributes& attributes) {
    std::vector<std::string> names{"keys", "values"};
    if (attributes.keeps_scores()) {
        names.emplace_back("scores");
    }
    names.emplace_back("positions");
    if (attributes.window > 0) {
        names.emplace_back("history");
    }
    if (attributes.coded()) {
        names.emplace_back("key_scales");
        names.emplace_back("value_scales");
    }
    if (attributes.rank > 0) {
        names.emplace_back("H");
        names.emplace_back("z");
    }
    return names;
}

std::vector<std::string> input_names(const Attributes& attributes) {
    std::vector<std::string> names{"q", "k", "v", "mask", "length"};
    for (auto& name : state_names(attributes)) {
        names.push_back(std::move(name));
    }
    if (attributes.maps == MapKind::kPaper) {
        for (const char* name :
             {"phi_w1", "phi_w2", "psi_w1", "psi_w2", "psi_w3", "psi_s1", "psi_s2"}) {
            names.emplace_back(name);
        }
    } else if (attributes.maps == MapKind::kExp) {
        for (const char* name : {"phi_w1", "phi_w2", "psi_w1", "psi_w2", "psi_b"}) {
            names.emplace_back(name);
        }
    }
    if (attributes.shifted()) {
        names.emplace_back("psi_b1");
        names.emplace_back("shift");
    }
    return names;
}

namespace {

Tensor tensor_named(const std::string& name, const Layer& layer) {
    const Sizes& sizes = layer.sizes;
    const std::int64_t heads = sizes.kv_heads;
    const std::int64_t slots = layer.attributes.capacity;
    const std::int64_t rank = layer.attributes.rank;
    const std::int64_t width = sizes.head_dim;
    if (name == "q" || name == "out") {
        return {name, layer.token_dtype(), {kBatch, sizes.query_heads, 1, width}};
    }
    if (name == "k" || name == "v") {
        return {name, layer.token_dtype(), {kBatch, heads, 1, width}};
    }
    if (name == "mask") {
        return {name, Dtype::kInt32, {kBatch, 1}};
    }
    if (name == "length") {
        return {name, Dtype::kInt32, {kBatch}};
    }
    if (name == "keys" || name == "values") {
        const Dtype stored = layer.attributes.coded() ? Dtype::kInt8 : sizes.dtype;
        const std::int64_t size = name == "keys" ? layer.key_width() : layer.value_width();
        return {name, stored, {kBatch, heads, slots, size}};
    }
    if (name == "key_scales" || name == "value_scales") {
        return {name, Dtype::kFloat16, {kBatch, heads, slots}};
    }
    if (name == "shift") {
        return {name, Dtype::kFloat32, {kBatch, sizes.query_heads, 1}};
    }
    if (name == "psi_b1") {
        return {name, sizes.dtype, {heads, sizes.hidden}};
    }
    if (name == "scores") {
        return {name, Dtype::kFloat32, {kBatch, heads, slots}};
    }
    if (name == "positions") {
        return {name, Dtype::kInt32, {kBatch, heads, slots}};
    }
    if (name == "history") {
        return {name, Dtype::kInt64, {kBatch, heads, slots}};
    }
    if (name == "H") {
        return {name, sizes.state_dtype, {kBatch, heads, rank, width}};
    }
    if (name == "z") {
        return {name, sizes.state_dtype, {kBatch, heads, rank}};
    }
    if (name == "phi_w1" || name == "psi_w1") {
        return {
            name, sizes.dtype, {name[1] == 'h' ? sizes.query_heads : heads, width, sizes.hidden}};
    }
    if (name == "phi_w2" || name == "psi_w2") {
        return {
            name, sizes.dtype, {name[1] == 'h' ? sizes.query_heads : heads, sizes.hidden, rank}};
    }
    if (name == "psi_w3") {
        return {name, Dtype::kFloat32, {heads, rank, rank}};
    }
    return {name, Dtype::kFloat32, {heads, rank}};
}

}  // namespace

std::vector<Tensor> inputs_of(const Layer& layer) {
    std::vector<Tensor> tensors;
    for (const auto& name : input_names(layer.attributes)) {
        tensors.push_back(tensor_named(name, layer));
    }
    return tensors;
}

std::vector<Tensor> outputs_of(const Layer& layer) {
    std::vector<Tensor> tensors{tensor_named("out", layer)};
    for (const auto& name : state_names(layer.attributes)) {
        tensors.push_back(tensor_named(name, layer));
    }
    return tensors;
}

std::int32_t aliased_input(std::int32_t index) {
    return index == 0 ? -1 : kTokenInputs + index - 1;
}

std::string describe(const Layer& layer) {
    const Attributes& attributes = layer.attributes;
    const Sizes& sizes = layer.sizes;
    std::string line =
        text(name_of(sizes.dtype), ", head size ", sizes.head_dim, ", ", sizes.query_heads, "/",
             sizes.kv_heads, " heads, start ", static_cast<int>(attributes.start), ", gain ",
             static_cast<int>(attributes.gain), ", capacity ", attributes.capacity, ", rank ",
             attributes.rank);
    if (attributes.rank > 0) {
        line += text(", maps \"", name_of(attributes.maps), "\" of ", sizes.hidden, ", H and z ",
                     name_of(sizes.state_dtype));
    }
    if (attributes.softcap > 0.0F) {
        line += text(", softcap ", attributes.softcap);
    }
    if (attributes.coded()) {
        line += text(", codes of ", attributes.key_bits, " and ", attributes.value_bits, " bits, ",
                     name_of(attributes.transform));
    }
    return line;
}

}  // namespace less_cache
