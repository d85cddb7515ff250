#include "arguments.h"

#include <cstring>
#include <limits>
#include <sstream>

#include "errors.h"

namespace less_cache {
namespace {

/// Every pointer that a kernel may name; one that a layer has not is null.
constexpr const char* kPointers[] = {"q",          "k",
                                     "v",          "mask",
                                     "keys",       "values",
                                     "key_scales", "value_scales",
                                     "scores",     "positions",
                                     "history",    "H",
                                     "z",          "phi_w1",
                                     "phi_w2",     "psi_w1",
                                     "psi_b1",     "psi_w2",
                                     "psi_w3",     "psi_s1",
                                     "psi_s2",     "psi_b",
                                     "slot_out",   "slots",
                                     "phi_out",    "phi",
                                     "psi_out",    "psi",
                                     "shift",      "logits",
                                     "out",        "part_peak",
                                     "part_mass",  "part_numerator"};

[[noreturn]] void unknown(const KernelRecord& record, const std::string& what) {
    throw Refusal(ErrorKind::kInternal, record.symbol, ": ", what,
                  ", which this library does not know; its kernels are of another version");
}

}  // namespace

Names::Names(const Attributes& attributes) {
    for (const char* name : kPointers) {
        meanings_[name].argument.name = name;
    }
    const auto put_tensors = [this](const std::vector<std::string>& names, Source source,
                                    std::int32_t first) {
        for (std::size_t i = 0; i < names.size(); ++i) {
            const auto index = static_cast<std::int32_t>(i) + first;
            meanings_[names[i]].argument = {names[i], source, index, 0};
        }
    };
    put_tensors(input_names(attributes), Source::kInput, 0);
    // The node's input goes by its ONNX name, the kernels' parameter by its own.
    meanings_["lengths"] = meanings_.at("length");
    meanings_["lengths"].argument.name = "lengths";
    put_tensors({"out"}, Source::kOutput, 0);
    put_tensors(state_names(attributes), Source::kOutput, 1);
}

void Names::put_workspace(const std::string& name, std::size_t offset) {
    meanings_[name] = {Meaning::Kind::kPointer, {name, Source::kWorkspace, 0, offset}};
}

void Names::put(const std::string& name, std::int64_t number) {
    meanings_[name] = {Meaning::Kind::kInteger,
                       {name, Source::kNumber, 0, static_cast<std::uint64_t>(number)}};
}

void Names::put(const std::string& name, float number) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &number, sizeof bits);
    meanings_[name] = {Meaning::Kind::kReal, {name, Source::kNumber, 0, bits}};
}

std::vector<Argument> Names::arguments(const KernelRecord& record) const {
    std::vector<Argument> arguments;
    std::istringstream list(record.parameters);
    for (std::string item; list >> item;) {
        const auto colon = item.find(':');
        if (colon == std::string::npos) {
            unknown(record, text("parameter \"", item, "\" has no type"));
        }
        arguments.push_back(argument(record, item.substr(0, colon), item.substr(colon + 1)));
    }
    return arguments;
}

Argument Names::argument(const KernelRecord& record, const std::string& name,
                         const std::string& type) const {
    const auto found = meanings_.find(name);
    if (found == meanings_.end()) {
        unknown(record, text("it takes a parameter \"", name, "\""));
    }
    const Meaning& meaning = found->second;
    const bool right = meaning.kind == Meaning::Kind::kPointer   ? type == "ptr"
                       : meaning.kind == Meaning::Kind::kInteger ? type == "i32" || type == "i64"
                                                                 : type == "f32";
    if (!right) {
        unknown(record, text("parameter \"", name, "\" is of type \"", type, "\""));
    }
    const auto number = static_cast<std::int64_t>(meaning.argument.bits);
    if (type == "i32" && number > std::numeric_limits<std::int32_t>::max()) {
        throw Refusal(ErrorKind::kInvalidConfig, record.symbol, ": ", name, " = ", number,
                      " does not fit the kernel's 32 bits");
    }
    return meaning.argument;
}

}  // namespace less_cache
