// Drives the plugin's library through TensorRT's interfaces, without TensorRT: up to configuration.
// The library has the synthetic kernels, the driver is the fake one.

#include <cstdlib>

#include "check.h"
#include "harness_layers.h"

namespace less_cache::testing {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

/// What creating from the node's fields logs; "" where it succeeds.
std::string creation_error(const Node& node, TensorRTPhase phase = TensorRTPhase::kBUILD) {
    const auto fields = node.fields();
    static_cast<void>(library().logger().take());
    const std::unique_ptr<nvinfer1::IPluginV3> made(
        library().creator().createPlugin("layer 7", &fields, phase));
    const std::string message = library().logger().take();
    CHECK_EQUAL(made == nullptr, !message.empty());
    return message;
}

TEST(the_creator_is_the_nodes) {
    CHECK_EQUAL(std::string(library().creator().getPluginName()), "LessAttention");
    CHECK_EQUAL(std::string(library().creator().getPluginVersion()), "1");
    CHECK_EQUAL(std::string(library().creator().getPluginNamespace()), "");
    std::string names;
    const auto* fields = library().creator().getFieldNames();
    for (std::int32_t i = 0; i < fields->nbFields; ++i) {
        names += std::string(fields->fields[i].name) + " ";
    }
    CHECK_EQUAL(names,
                "start gain sinks recent decay window capacity rank maps scale softcap "
                "key_bits value_bits transform model_dtype ");
}

TEST(attributes_make_a_plugin_and_wrong_ones_do_not) {
    const Attributes attributes = exp_layer().attributes;
    CHECK_EQUAL(creation_error(Node(attributes)), "");
    for (const char* name : {"start", "gain", "sinks", "recent", "decay", "window", "capacity",
                             "rank", "maps", "scale", "softcap"}) {
        Node node(attributes);
        node.remove(name);
        CHECK_CONTAINS(creation_error(node), std::string(name) + ": the field is missing");
        Node twice(attributes);
        const float one = 1.0F;
        twice.add({name, &one, PluginFieldType::kFLOAT32, 1});
        CHECK_CONTAINS(creation_error(twice), "given twice");
        Node half(attributes);
        half.remove(name);
        half.add({name, &one, PluginFieldType::kFLOAT16, 1});
        CHECK_CONTAINS(creation_error(half),
                       std::string(name) + ": got another type (0), expected");
    }
    const auto refused = [&attributes](const char* name, const auto& value) {
        Node node(attributes);
        node.set(name, value);
        return creation_error(node);
    };
    CHECK_CONTAINS(refused("extra", 1), "extra: unknown field; known are start, gain, sinks");
    CHECK_CONTAINS(refused("start", 3), "start: got 3, expected 0 to 2");
    CHECK_CONTAINS(refused("gain", -1), "gain: got -1, expected 0 to 2");
    CHECK_CONTAINS(refused("gain", 1.0F), "gain: got FLOAT32 (1), expected INT32");
    CHECK_CONTAINS(refused("scale", 1), "scale: got INT32 (5), expected FLOAT32");
    CHECK_CONTAINS(refused("capacity", 0), "capacity: got 0");
    CHECK_CONTAINS(refused("maps", std::string("linear")), "maps: got \"linear\"");
    CHECK_CONTAINS(refused("capacity", -3), "(in layer 7)");
    CHECK_CONTAINS(refused("capacity", -3), "less_cache");
    Node pair(attributes);
    pair.remove("rank");
    const std::int32_t two[] = {8, 8};
    pair.add({"rank", two, PluginFieldType::kINT32, 2});
    CHECK_CONTAINS(creation_error(pair), "rank: got 2 numbers, expected 1");
    Node empty(attributes);
    empty.remove("rank");
    empty.add({"rank", nullptr, PluginFieldType::kINT32, 1});
    CHECK_CONTAINS(creation_error(empty), "rank: the field has no value");
    CHECK(library().creator().createPlugin("none", nullptr, TensorRTPhase::kBUILD) == nullptr);
    CHECK_CONTAINS(library().logger().take(), "fields: none are given");
}

TEST(a_text_may_end_with_a_nul) {
    Node node(exp_layer().attributes);
    node.set("maps", std::string("exp\0", 4));
    CHECK_EQUAL(creation_error(node), "");
}

TEST(shapes_and_types_of_outputs_are_those_of_inputs) {
    for (const Layer& layer : {exp_layer(), history_layer(), plain_layer(), coded_layer()}) {
        const Plugin plugin = made(layer);
        CHECK_EQUAL(std::string(plugin.core->getPluginName()), "LessAttention");
        const auto expected = outputs_of(layer);
        CHECK_EQUAL(plugin.build->getNbOutputs(), static_cast<std::int32_t>(expected.size()));
        const auto [result, shapes] = output_shapes(*plugin.build, layer);
        CHECK_EQUAL(result, 0);
        for (std::size_t i = 0; i < expected.size(); ++i) {
            CHECK(shapes[i] == expected[i].dims);
        }
        const Descriptions tensors(layer, 1, 2, 4);
        std::vector<nvinfer1::DataType> given;
        given.reserve(tensors.in_fixed.size());
        for (const auto& tensor : tensors.in_fixed) {
            given.push_back(tensor.type);
        }
        std::vector<nvinfer1::DataType> types(expected.size());
        CHECK_EQUAL(plugin.build->getOutputDataTypes(types.data(), tensors.outputs(), given.data(),
                                                     tensors.inputs()),
                    0);
        for (std::size_t i = 0; i < expected.size(); ++i) {
            CHECK(types[i] == tensors.out_fixed[i].type);
        }
    }
}

TEST(wrong_numbers_of_tensors_are_refused) {
    const Plugin plugin = made(exp_layer());
    Layer other = exp_layer();
    other.attributes.capacity = 99;
    CHECK(output_shapes(*plugin.build, other).first != 0);
    CHECK_CONTAINS(library().logger().take(), "input keys: has 99 slots, but capacity is 64");
    CHECK(output_shapes(*plugin.build, plain_layer()).first != 0);
    CHECK_CONTAINS(library().logger().take(), "inputs: got 9, expected 16 for these attributes");
}

TEST(codes_are_told_by_four_attributes_or_none) {
    const Attributes attributes = coded_layer().attributes;
    CHECK_EQUAL(creation_error(Node(attributes)), "");
    for (const char* name : {"key_bits", "value_bits", "transform", "model_dtype"}) {
        Node node(attributes);
        node.remove(name);
        CHECK_CONTAINS(creation_error(node), std::string(name) + ": the field is missing");
    }
    const auto refused = [&attributes](const char* name, const auto& value) {
        Node node(attributes);
        node.set(name, value);
        return creation_error(node);
    };
    CHECK_CONTAINS(refused("key_bits", std::string("three")),
                   "key_bits: got three, expected numbers with commas between them");
    CHECK_CONTAINS(refused("value_bits", std::string("0")), "value_bits: got 0, expected numbers");
    CHECK_CONTAINS(refused("value_bits", 4), "value_bits: got INT32 (5), expected CHAR");
    CHECK_CONTAINS(refused("transform", std::string("fourier")),
                   R"(transform: got "fourier", expected one of "hadamard", "calibrated")");
    CHECK_CONTAINS(refused("model_dtype", std::string("int8")), R"(model_dtype: got "int8")");
}

TEST(codes_come_as_int8_and_with_scales) {
    const Layer layer = coded_layer();
    const auto inputs = inputs_of(layer);
    std::string names;
    for (const auto& tensor : inputs) {
        names += tensor.name + " ";
    }
    CHECK_EQUAL(names,
                "q k v mask length keys values scores positions key_scales value_scales H z "
                "phi_w1 phi_w2 psi_w1 psi_w2 psi_b psi_b1 shift ");
    CHECK(inputs[0].dtype == Dtype::kFloat32);
    CHECK(inputs[5].dtype == Dtype::kInt8);
    CHECK((inputs[5].dims == std::vector<std::int64_t>{-1, 2, 64, 24}));
    CHECK((inputs[6].dims == std::vector<std::int64_t>{-1, 2, 64, 32}));
    CHECK(inputs[9].dtype == Dtype::kFloat16);
    CHECK(inputs[13].dtype == Dtype::kFloat16);
    CHECK((inputs[18].dims == std::vector<std::int64_t>{2, 32}));
    CHECK((inputs[19].dims == std::vector<std::int64_t>{-1, 4, 1}));
    Layer plain = layer;
    plain.attributes.rank = 0;
    CHECK(!plain.attributes.shifted());

    const Plugin plugin = made(layer);
    const Descriptions tensors(layer, 1, 2, 4);
    CHECK(tensors.in[5].desc.type == nvinfer1::DataType::kINT8);
    std::vector<nvinfer1::DataType> given;
    for (const auto& tensor : tensors.in_fixed) {
        given.push_back(tensor.type);
    }
    given[5] = nvinfer1::DataType::kUINT8;
    std::vector<nvinfer1::DataType> types(tensors.out.size());
    CHECK(plugin.build->getOutputDataTypes(types.data(), tensors.outputs(), given.data(),
                                           tensors.inputs()) != 0);
    CHECK_CONTAINS(library().logger().take(), "got uint8, which no plugin may have");
}

TEST(each_state_output_is_aliased_with_its_input) {
    const Plugin plugin = made(history_layer());
    const auto inputs = inputs_of(history_layer());
    const auto outputs = outputs_of(history_layer());
    CHECK_EQUAL(plugin.build->getAliasedInput(0), -1);
    for (std::size_t i = 1; i < outputs.size(); ++i) {
        const auto input = plugin.build->getAliasedInput(static_cast<std::int32_t>(i));
        CHECK_EQUAL(inputs[static_cast<std::size_t>(input)].name, outputs[i].name);
    }
    CHECK_EQUAL(plugin.build->getAliasedInput(-1), -1);
    CHECK_EQUAL(plugin.build->getAliasedInput(static_cast<std::int32_t>(outputs.size())), -1);
}

TEST(formats_are_linear_and_of_the_nodes_types) {
    for (const Layer& layer : {exp_layer(), history_layer(), plain_layer(), coded_layer()}) {
        const Plugin plugin = made(layer);
        Descriptions tensors(layer, 1, 2, 4);
        std::vector<nvinfer1::DynamicPluginTensorDesc> all = tensors.in;
        all.insert(all.end(), tensors.out.begin(), tensors.out.end());
        const auto supported = [&](std::size_t position) {
            return plugin.build->supportsFormatCombination(static_cast<std::int32_t>(position),
                                                           all.data(), tensors.inputs(),
                                                           tensors.outputs());
        };
        const auto names = input_names(layer.attributes);
        for (std::size_t i = 0; i < all.size(); ++i) {
            CHECK(supported(i));
            auto kept = all[i].desc;
            all[i].desc.format = nvinfer1::TensorFormat::kCHW32;
            CHECK(!supported(i));
            all[i].desc = kept;
            // What comes later says nothing yet.
            auto rest = std::vector(all.begin() + static_cast<std::ptrdiff_t>(i) + 1, all.end());
            for (std::size_t j = i + 1; j < all.size(); ++j) {
                all[j].desc.type = static_cast<nvinfer1::DataType>(77);
            }
            CHECK(supported(i));
            std::copy(rest.begin(), rest.end(), all.begin() + static_cast<std::ptrdiff_t>(i) + 1);
            all[i].desc.type = nvinfer1::DataType::kBF16;
            const bool chosen = i == 0 && !layer.attributes.coded();
            const bool free = chosen || (i < names.size() && names[i] == "H");
            CHECK_EQUAL(supported(i), free || kept.type == nvinfer1::DataType::kBF16);
            all[i].desc.type = nvinfer1::DataType::kINT8;
            CHECK_EQUAL(supported(i), kept.type == nvinfer1::DataType::kINT8);
            all[i].desc.type = nvinfer1::DataType::kUINT8;
            CHECK(!supported(i));
            all[i].desc = kept;
        }
    }
}

TEST(configuring_refuses_what_no_kernel_serves) {
    const Plugin plugin = made(exp_layer());
    const auto configured = [&plugin](const Layer& layer, std::int64_t least, std::int64_t most) {
        const Descriptions tensors(layer, least, least, most);
        const std::int32_t result = plugin.build->configurePlugin(
            tensors.in.data(), tensors.inputs(), tensors.out.data(), tensors.outputs());
        const std::string message = library().logger().take();
        CHECK_EQUAL(result == 0, message.empty());
        return message;
    };
    fake().set_device(90, 132, 227 * 1024);
    CHECK_EQUAL(configured(exp_layer(), 1, 8), "");
    CHECK_EQUAL(configured(exp_layer(), 0, 70), "");
    Layer wide = exp_layer();
    wide.sizes.head_dim = 96;
    CHECK_CONTAINS(configured(wide, 1, 8), "head size 96");
    CHECK_CONTAINS(configured(wide, 1, 8),
                   "there is: float16, head size 64, rank up to 16 by 4s, maps \"exp\" of hidden "
                   "size by 16s, codes of 3 bits, calibrated, scores 0+0 1+0 2+0 0+1 1+1 2+1 0+2 "
                   "1+2 2+2; float16, head size 64, rank up to 16 by 4s, ");
    Layer bfloat = exp_layer();
    bfloat.sizes.dtype = Dtype::kBFloat16;
    CHECK_CONTAINS(configured(bfloat, 1, 8), "not compiled for bfloat16");
    Layer slots = exp_layer();
    slots.attributes.capacity = 65;
    CHECK_CONTAINS(configured(slots, 1, 8), "input keys: got [8, 2, 65, 64]");
    // Another layout of codes than the kernels', and another number of bits.
    const Plugin coded = made(coded_layer());
    const auto refused = [&](const Layer& layer) {
        const Descriptions tensors(layer, 1, 1, 8);
        CHECK(coded.build->configurePlugin(tensors.in.data(), tensors.inputs(), tensors.out.data(),
                                           tensors.outputs()) != 0);
        return library().logger().take();
    };
    Layer bytes = coded_layer();
    bytes.sizes.value_bytes = 33;
    CHECK_CONTAINS(refused(bytes), "codes of 3 and 4 bits, calibrated; there is: ");
    const Descriptions served(coded_layer(), 1, 1, 8);
    CHECK_EQUAL(coded.build->configurePlugin(served.in.data(), served.inputs(), served.out.data(),
                                             served.outputs()),
                0);
    fake().set_device(75, 40, 64 * 1024);
    CHECK_CONTAINS(configured(exp_layer(), 1, 8),
                   "no image for this GPU, sm_75 with 65536 bytes of shared memory a block; "
                   "there are sm_80, sm_80 and later by PTX, sm_90");
    fake().set_device(120, 40, 100 * 1024);
    CHECK_EQUAL(configured(exp_layer(), 1, 8), "");
    fake().set_device(90, 132, 227 * 1024);
    fake().set_context(0);
    CHECK_CONTAINS(configured(exp_layer(), 1, 8), "CUDA context: none is current");
    fake().set_context(kContext);
}

TEST(the_workspace_is_that_of_the_largest_batch) {
    const Plugin plugin = made(exp_layer());
    const auto size = [&plugin](std::int64_t most) {
        const Descriptions tensors(exp_layer(), 1, 1, most);
        return plugin.build->getWorkspaceSize(tensors.in.data(), tensors.inputs(),
                                              tensors.out.data(), tensors.outputs());
    };
    CHECK(size(1) > 0);
    CHECK(size(64) > size(2));
}

/// The fields' names and values, for comparison.
std::string spelled(const nvinfer1::PluginFieldCollection& fields) {
    std::string line;
    for (std::int32_t i = 0; i < fields.nbFields; ++i) {
        const PluginField& field = fields.fields[i];
        const auto bytes =
            field.type == PluginFieldType::kCHAR ? static_cast<std::size_t>(field.length) : 4U;
        line += std::string(field.name) + "=" +
                std::string(static_cast<const char*>(field.data), bytes) + ";";
    }
    return line;
}

TEST(what_is_serialised_makes_the_same_plugin_again) {
    const std::pair<Layer, bool> cases[] = {{history_layer(), false},
                                            {history_layer(), true},
                                            {coded_layer(), false},
                                            {coded_layer(), true}};
    for (const auto& [layer, configure] : cases) {
        const Plugin plugin = made(layer);
        if (configure) {
            const Descriptions tensors(layer, 1, 2, 4);
            CHECK_EQUAL(plugin.build->configurePlugin(tensors.in.data(), tensors.inputs(),
                                                      tensors.out.data(), tensors.outputs()),
                        0);
        }
        const auto* fields = plugin.runtime->getFieldsToSerialize();
        const std::string before = spelled(*fields);
        const Plugin again(
            library().creator().createPlugin("again", fields, TensorRTPhase::kRUNTIME));
        CHECK_EQUAL(spelled(*again.runtime->getFieldsToSerialize()), before);
        CHECK_EQUAL(std::string(again.build->getMetadataString()),
                    std::string(plugin.build->getMetadataString()));
        const Plugin copy(plugin.plugin->clone());
        CHECK_EQUAL(spelled(*copy.runtime->getFieldsToSerialize()), before);
        // An engine's fields are no node's attributes.
        CHECK(library().creator().createPlugin("x", fields, TensorRTPhase::kBUILD) == nullptr);
        CHECK_CONTAINS(library().logger().take(), "unknown field");
    }
}

TEST(a_damaged_engine_is_refused) {
    const Plugin plugin = made(exp_layer());
    const Descriptions tensors(exp_layer(), 1, 2, 4);
    CHECK_EQUAL(plugin.build->configurePlugin(tensors.in.data(), tensors.inputs(),
                                              tensors.out.data(), tensors.outputs()),
                0);
    const auto* fields = plugin.runtime->getFieldsToSerialize();
    const std::pair<const char*, const char*> wrong[] = {
        {"format", "format: the engine has"},
        {"kv_heads", "kv heads: got -7"},
        {"dtype", "dtype: got"},
        {"multiprocessors", "the engine is damaged"},
        {"most_batch", "the engine is damaged"}};
    for (const auto& [name, message] : wrong) {
        std::vector<PluginField> copied(fields->fields, fields->fields + fields->nbFields);
        const std::int32_t bad = -7;
        for (auto& field : copied) {
            if (std::string(field.name) == name) {
                field.data = &bad;
            }
        }
        const nvinfer1::PluginFieldCollection collection{fields->nbFields, copied.data()};
        CHECK(library().creator().createPlugin("x", &collection, TensorRTPhase::kRUNTIME) ==
              nullptr);
        CHECK_CONTAINS(library().logger().take(), message);
    }
    CHECK_CONTAINS(creation_error(Node(exp_layer().attributes), TensorRTPhase::kRUNTIME),
                   "format: the field is missing");
}

TEST(configuring_again_widens_the_range) {
    const Plugin plugin = made(exp_layer());
    for (const auto& [least, most] : {std::pair{4, 8}, {1, 2}, {2, 30}}) {
        const Descriptions tensors(exp_layer(), least, least, most);
        CHECK_EQUAL(plugin.build->configurePlugin(tensors.in.data(), tensors.inputs(),
                                                  tensors.out.data(), tensors.outputs()),
                    0);
    }
    const auto* fields = plugin.runtime->getFieldsToSerialize();
    const auto value = [fields](const std::string& name) {
        for (std::int32_t i = 0; i < fields->nbFields; ++i) {
            if (fields->fields[i].name == name) {
                return *static_cast<const std::int32_t*>(fields->fields[i].data);
            }
        }
        return -1;
    };
    CHECK_EQUAL(value("least_batch"), 1);
    CHECK_EQUAL(value("most_batch"), 30);
    CHECK_EQUAL(value("multiprocessors"), 132);
}

TEST(configuring_loads_nothing) {
    fake().clear();
    const Plugin plugin = made(exp_layer());
    const Descriptions tensors(exp_layer(), 1, 2, 4);
    CHECK_EQUAL(plugin.build->configurePlugin(tensors.in.data(), tensors.inputs(),
                                              tensors.out.data(), tensors.outputs()),
                0);
    CHECK_EQUAL(fake().modules(), 0);
}

}  // namespace
}  // namespace less_cache::testing

int main(int count, char** arguments) { return less_cache::testing::run(count, arguments); }
