// Which kernels a step launches, and with what.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "arguments.h"
#include "check.h"
#include "embedded_kernels.h"
#include "errors.h"
#include "step_plan.h"
#include "synthetic_kernels.h"

namespace {

using less_cache::Attributes;
using less_cache::Device;
using less_cache::Dtype;
using less_cache::Gain;
using less_cache::KernelRecord;
using less_cache::Layer;
using less_cache::MapKind;
using less_cache::Plan;
using less_cache::Refusal;
using less_cache::Source;
using less_cache::Start;
using less_cache::testing::SyntheticKernels;

constexpr Device kGpu{90, 132, 227 * 1024};

Layer layer_of(std::int32_t query_heads, std::int32_t kv_heads, std::int32_t capacity) {
    Layer layer;
    layer.attributes.gain = Gain::kSum;
    layer.attributes.recent = 3;
    layer.attributes.capacity = capacity;
    layer.attributes.rank = 8;
    layer.attributes.maps = MapKind::kExp;
    layer.attributes.scale = 0.125F;
    layer.sizes = {query_heads, kv_heads, 64, 512, Dtype::kFloat16, Dtype::kFloat32};
    return layer;
}

SyntheticKernels usual_kernels() {
    SyntheticKernels kernels;
    kernels.add_layout("float16", 64, 2, 90);
    return kernels;
}

/// 2 bits for keys, 4 for values.
Layer coded_layer_of(std::int32_t query_heads, std::int32_t kv_heads, std::int32_t capacity) {
    Layer layer = layer_of(query_heads, kv_heads, capacity);
    layer.attributes.key_bits = "2";
    layer.attributes.value_bits = "4";
    layer.attributes.transform = less_cache::Transform::kHadamard;
    layer.attributes.model_dtype = Dtype::kFloat16;
    layer.sizes.key_bytes = 16;
    layer.sizes.value_bytes = 32;
    return layer;
}

SyntheticKernels coded_kernels() {
    auto kernels = usual_kernels();
    kernels.add_layout("float16", 64, 2, 90, false, {"2", "4", 0, 16, 32});
    return kernels;
}

template <typename Body>
std::string refusal(const Body& body) {
    try {
        body();
    } catch (const Refusal& refused) {
        return refused.what();
    }
    return "nothing was refused";
}

const less_cache::Argument& argument(const less_cache::Launch& launch, const std::string& name) {
    for (const auto& one : launch.arguments) {
        if (one.name == name) {
            return one;
        }
    }
    throw less_cache::testing::Failed("no argument " + name);
}

std::int64_t number(const less_cache::Launch& launch, const std::string& name) {
    return static_cast<std::int64_t>(argument(launch, name).bits);
}

TEST(attributes_out_of_range_are_refused) {
    const auto refused = [](auto change) {
        Attributes attributes = layer_of(8, 8, 64).attributes;
        change(attributes);
        return refusal([&] { check(attributes); });
    };
    CHECK_EQUAL(refused([](Attributes&) {}), "nothing was refused");
    CHECK_CONTAINS(refused([](auto& a) { a.capacity = 0; }), "capacity: got 0, expected 1 or more");
    CHECK_CONTAINS(refused([](auto& a) { a.sinks = 61; }),
                   "capacity: got 64, expected at least sinks + recent + 1 = 65");
    CHECK_CONTAINS(refused([](auto& a) { a.sinks = std::numeric_limits<std::int32_t>::max(); }),
                   "capacity: got 64");
    CHECK_CONTAINS(refused([](auto& a) { a.sinks = -1; }), "sinks: got -1");
    CHECK_CONTAINS(refused([](auto& a) { a.recent = -1; }), "recent: got -1");
    CHECK_CONTAINS(refused([](auto& a) { a.decay = 1.5F; }), "decay: got 1.5");
    CHECK_CONTAINS(refused([](auto& a) { a.decay = NAN; }), "decay: got nan");
    CHECK_CONTAINS(refused([](auto& a) { a.window = 63; }), "window: got 63, expected 0 to 62");
    CHECK_CONTAINS(refused([](auto& a) { a.window = 5; }), "gain is 1");
    CHECK_CONTAINS(refused([](auto& a) { a.start = Start{3}; }), "start: got 3, expected 0 to 2");
    CHECK_CONTAINS(refused([](auto& a) { a.gain = Gain{-1}; }), "gain: got -1, expected 0 to 2");
    CHECK_CONTAINS(refused([](auto& a) { a.gain = Gain::kHistory; }), "window: got 0");
    CHECK_CONTAINS(refused([](auto& a) { a.rank = -1; }), "rank: got -1");
    CHECK_CONTAINS(refused([](auto& a) { a.rank = 0; }), "maps: got exp");
    CHECK_CONTAINS(refused([](auto& a) { a.maps = MapKind::kNone; }), "maps: got none");
    CHECK_CONTAINS(refused([](auto& a) { a.scale = 0.0F; }), "scale: got 0");
    CHECK_CONTAINS(refused([](auto& a) { a.softcap = INFINITY; }), "softcap: got inf");
    CHECK_CONTAINS(refused([](auto& a) { a.key_bits = "3"; }),
                   "key_bits: got 3, expected none without a transform");
    CHECK_CONTAINS(refused([](auto& a) { a.transform = less_cache::Transform::kHadamard; }),
                   "key_bits: got 0, expected numbers");
}

TEST(sizes_out_of_range_are_refused) {
    const auto refused = [](auto change) {
        Layer layer = layer_of(8, 8, 64);
        change(layer);
        return refusal([&] { check(layer); });
    };
    CHECK_EQUAL(refused([](Layer&) {}), "nothing was refused");
    CHECK_CONTAINS(refused([](auto& l) { l.sizes.query_heads = 9; }), "multiple of the 8 KV heads");
    CHECK_CONTAINS(refused([](auto& l) { l.sizes.kv_heads = 0; }), "kv heads: got 0");
    CHECK_CONTAINS(refused([](auto& l) { l.sizes.head_dim = 0; }), "head size: got 0");
    CHECK_CONTAINS(refused([](auto& l) { l.sizes.hidden = 0; }), "hidden size: got 0");
    CHECK_CONTAINS(refused([](auto& l) { l.sizes.dtype = Dtype::kInt32; }), "q's dtype: got int32");
    CHECK_CONTAINS(refused([](auto& l) { l.sizes.state_dtype = Dtype::kInt64; }), "H's dtype");
    CHECK_CONTAINS(refused([](auto& l) { l.attributes.capacity = 40'000'000; }),
                   "at most 33554431");
}

TEST(coded_slots_whose_positions_tell_the_score_keep_none) {
    const auto keeps = [](Layer layer, Start start, Gain gain) {
        layer.attributes.start = start;
        layer.attributes.gain = gain;
        const auto names = state_names(layer.attributes);
        return std::find(names.begin(), names.end(), "scores") != names.end();
    };
    const Layer plain = layer_of(8, 4, 64);
    const Layer coded = coded_layer_of(8, 4, 64);
    for (const Start start : {Start::kZero, Start::kPosition}) {
        CHECK(keeps(plain, start, Gain::kNone));
        CHECK(!keeps(coded, start, Gain::kNone));
        CHECK(keeps(coded, start, Gain::kSum));
    }
    CHECK(keeps(coded, Start::kKeyNorm, Gain::kNone));
}

TEST(tensors_are_the_nodes) {
    Layer layer = layer_of(8, 4, 64);
    std::string names;
    for (const auto& tensor : inputs_of(layer)) {
        names += tensor.name + " ";
    }
    CHECK_EQUAL(names,
                "q k v mask length keys values scores positions H z phi_w1 phi_w2 psi_w1 "
                "psi_w2 psi_b ");
    layer.attributes.maps = MapKind::kPaper;
    layer.attributes.gain = Gain::kHistory;
    layer.attributes.window = 9;
    names.clear();
    for (const auto& tensor : outputs_of(layer)) {
        names += tensor.name + " ";
    }
    CHECK_EQUAL(names, "out keys values scores positions history H z ");
    const auto inputs = inputs_of(layer);
    CHECK_EQUAL(inputs.size(), 19U);
    CHECK_EQUAL(inputs[9].name, "history");
    CHECK(inputs[9].dtype == Dtype::kInt64);
    CHECK((inputs[12].dims == std::vector<std::int64_t>{8, 64, 512}));
    CHECK((inputs[15].dims == std::vector<std::int64_t>{4, 512, 8}));
    CHECK((inputs[16].dims == std::vector<std::int64_t>{4, 8, 8}));
    CHECK_EQUAL(less_cache::aliased_input(0), -1);
    CHECK_EQUAL(less_cache::aliased_input(1), 5);
}

TEST(a_step_is_two_launches) {
    const auto kernels = usual_kernels();
    const Plan plan = plan_step(kernels.table(), layer_of(32, 32, 205), kGpu, 64);
    CHECK_EQUAL(plan.launches.size(), 2U);
    CHECK_EQUAL(plan.splits, 1);
    const auto& select = plan.launches[0];
    CHECK_EQUAL(std::string(select.record->kernel), "select_and_map");
    CHECK_EQUAL(select.record->block_b, 32);
    CHECK_EQUAL(select.grid_x, 64U);
    CHECK_EQUAL(select.grid_y, 2U);
    CHECK_EQUAL(number(select, "batch"), 64);
    CHECK_EQUAL(number(select, "HIDDEN"), 512);
    CHECK_EQUAL(number(select, "recent"), 3);
    CHECK_EQUAL(number(select, "scores_row_stride"), 32 * 205);
    const auto& attend = plan.launches[1];
    CHECK_EQUAL(attend.record->split, 0);
    CHECK_EQUAL(attend.record->group, 1);
    CHECK_EQUAL(attend.grid_x, 64U * 32U);
    CHECK_EQUAL(attend.grid_y, 1U);
    CHECK_EQUAL(number(attend, "capacity"), 205);
    CHECK_EQUAL(number(attend, "keys_row_stride"), 32 * 205 * 64);
    CHECK_EQUAL(number(attend, "H_row_stride"), 32 * 8 * 64);
    CHECK_EQUAL(number(attend, "z_row_stride"), 32 * 8);
    CHECK_EQUAL(number(attend, "logits_row_stride"), 32 * 205);
    CHECK_EQUAL(number(attend, "q_row_stride"), 32 * 64);
    CHECK_EQUAL(number(attend, "k_head_stride"), 64);
    std::uint32_t bits = 0;
    const float scale = 0.125F;
    std::memcpy(&bits, &scale, sizeof bits);
    CHECK_EQUAL(argument(attend, "SCALE").bits, std::uint64_t{bits});
}

TEST(many_slots_are_looked_through_in_a_launch_of_their_own) {
    const auto kernels = usual_kernels();
    const Plan one = plan_step(kernels.table(), layer_of(32, 8, 512), kGpu, 64);
    CHECK_EQUAL(one.launches.size(), 2U);
    const Plan two = plan_step(kernels.table(), layer_of(32, 8, 513), kGpu, 64);
    CHECK_EQUAL(two.launches.size(), 3U);
    const auto& select = two.launches[0];
    CHECK_EQUAL(select.record->kind, 0);
    CHECK_EQUAL(select.grid_x, 8U);
    CHECK_EQUAL(select.grid_y, 64U);
    CHECK_EQUAL(number(select, "recent"), 3);
    const auto& map = two.launches[1];
    CHECK_EQUAL(std::string(map.record->kernel), "select_and_map");
    CHECK_EQUAL(map.record->selects, 0);
    CHECK_EQUAL(map.grid_x, 40U);
    CHECK_EQUAL(map.grid_y, 2U);
    CHECK_EQUAL(argument(select, "slot_out").bits, argument(map, "slot_out").bits);
    // Without maps there is one thing to do.
    Layer layer = layer_of(32, 8, 513);
    layer.attributes.rank = 0;
    layer.attributes.maps = MapKind::kNone;
    SyntheticKernels sparse;
    sparse.add_layout("float16", 64, 0, 90);
    CHECK_EQUAL(plan_step(sparse.table(), layer, kGpu, 64).launches.size(), 2U);
}

TEST(kernels_get_the_outputs_for_the_state) {
    const auto kernels = usual_kernels();
    const Plan plan = plan_step(kernels.table(), layer_of(8, 8, 64), kGpu, 1);
    const auto& attend = plan.launches[1];
    CHECK(argument(attend, "q").source == Source::kInput);
    CHECK(argument(attend, "mask").source == Source::kInput);
    CHECK_EQUAL(argument(attend, "mask").index, 3);
    CHECK(argument(attend, "out").source == Source::kOutput);
    CHECK_EQUAL(argument(attend, "out").index, 0);
    const char* const state[] = {"keys", "values", "scores", "positions", "H", "z"};
    for (std::int32_t i = 0; i < 6; ++i) {
        CHECK(argument(attend, state[i]).source == Source::kOutput);
        CHECK_EQUAL(argument(attend, state[i]).index, i + 1);
    }
    // The layer has no history: nothing reads it.
    CHECK(argument(attend, "history").source == Source::kNull);
    const auto& select = plan.launches[0];
    CHECK(argument(select, "keys").source == Source::kOutput);
    CHECK(argument(select, "lengths").source == Source::kInput);
    CHECK_EQUAL(argument(attend, "lengths").index, 4);
    CHECK_EQUAL(argument(select, "psi_b").index, 15);
    // What one kernel writes the other reads.
    for (const auto& [write, read] : {std::pair{"slot_out", "slots"}, std::pair{"phi_out", "phi"},
                                      std::pair{"psi_out", "psi"}}) {
        CHECK(argument(select, write).source == Source::kWorkspace);
        CHECK_EQUAL(argument(select, write).bits, argument(attend, read).bits);
    }
}

TEST(codes_have_kernels_of_their_own) {
    const auto kernels = coded_kernels();
    const Plan plan = plan_step(kernels.table(), coded_layer_of(8, 8, 64), kGpu, 2);
    CHECK_EQUAL(plan.launches.size(), 2U);
    CHECK_EQUAL(std::string(plan.launches[0].record->key_bits), "2");
    CHECK_EQUAL(std::string(plan.launches[1].record->value_bits), "4");
    const auto& attend = plan.launches[1];
    CHECK_EQUAL(number(attend, "keys_row_stride"), 8 * 64 * 16);
    CHECK_EQUAL(number(attend, "values_row_stride"), 8 * 64 * 32);
    CHECK_EQUAL(number(attend, "value_scales_row_stride"), 8 * 64);
    CHECK(argument(attend, "key_scales").source == Source::kOutput);
    CHECK_EQUAL(argument(attend, "key_scales").index, 5);
    CHECK_EQUAL(argument(attend, "H").index, 7);
    // Slots are not shared, but sums are left in memory all the same.
    CHECK(argument(attend, "part_numerator").source == Source::kWorkspace);
    CHECK(static_cast<std::int64_t>(plan.workspace_bytes) >=
          number(attend, "part_numerator") + std::int64_t{16} * 16 * 64 * 4);
    // Neither serves the other.
    const auto float_slots = plan_step(kernels.table(), layer_of(8, 8, 64), kGpu, 2);
    CHECK_EQUAL(std::string(float_slots.launches[1].record->key_bits), "0");
    const auto plain = usual_kernels();
    CHECK_CONTAINS(refusal([&] { plan_step(plain.table(), coded_layer_of(8, 8, 64), kGpu, 2); }),
                   "codes of 2 and 4 bits, hadamard; there is: ");
    Layer other = coded_layer_of(8, 8, 64);
    other.attributes.value_bits = "6,4,4,3,3,2,2,0";
    CHECK_CONTAINS(refusal([&] { plan_step(kernels.table(), other, kGpu, 2); }), "not compiled");
    other = coded_layer_of(8, 8, 64);
    other.sizes.key_bytes = 17;
    CHECK_CONTAINS(refusal([&] { plan_step(kernels.table(), other, kGpu, 2); }), "not compiled");
    other = coded_layer_of(8, 8, 64);
    other.sizes.key_bytes = 0;
    CHECK_CONTAINS(refusal([&] { check(other); }), "bytes of a key's codes: got 0");
}

TEST(the_workspace_has_room_for_every_array) {
    const auto kernels = usual_kernels();
    const Layer layer = layer_of(32, 8, 4096);
    const Plan plan = plan_step(kernels.table(), layer, kGpu, 2);
    CHECK(plan.splits > 1);
    CHECK_EQUAL(plan.launches.size(), 4U);
    const auto& conclude = plan.launches[3];
    const std::int64_t heads = 16;
    const std::int64_t parts = heads * plan.splits * 16;
    const std::pair<const char*, std::int64_t> sizes[] = {{"slots", heads * 4},
                                                          {"phi", 2048},
                                                          {"psi", heads * 8 * 4},
                                                          {"logits", heads * 4 * 4096 * 4},
                                                          {"part_peak", parts * 4},
                                                          {"part_mass", parts * 4},
                                                          {"part_numerator", parts * 64 * 4}};
    std::int64_t end = 0;
    for (const auto& [name, bytes] : sizes) {
        const std::int64_t offset = number(conclude, name);
        CHECK_EQUAL(offset % 256, 0);
        CHECK(offset >= end);
        CHECK(offset < end + 256);
        end = offset + bytes;
    }
    CHECK(static_cast<std::int64_t>(plan.workspace_bytes) >= end);
    CHECK_EQUAL(number(conclude, "splits"), plan.splits);
    CHECK_EQUAL(plan.launches[2].grid_y, static_cast<std::uint32_t>(plan.splits));
    CHECK_EQUAL(number(plan.launches[2], "splits"), plan.splits);
}

TEST(one_workspace_suffices_for_every_smaller_batch) {
    const auto kernels = coded_kernels();
    for (const std::int32_t capacity : {64, 700, 4096, 9001}) {
        for (const auto& [kv_heads, coded] : {std::pair{1, false}, {8, false}, {1, true}}) {
            const Layer layer =
                coded ? coded_layer_of(8, kv_heads, capacity) : layer_of(8, kv_heads, capacity);
            for (const std::int32_t most : {0, 1, 7, 40, 300}) {
                const std::size_t bytes = workspace_for(kernels.table(), layer, kGpu, most);
                for (std::int32_t batch = 0; batch <= most; ++batch) {
                    CHECK(plan_step(kernels.table(), layer, kGpu, batch).workspace_bytes <= bytes);
                }
            }
        }
    }
}

TEST(the_distinct_plans_have_every_kernel_of_the_range) {
    auto kernels = usual_kernels();
    kernels.add_layout("float16", 64, 2, 80);
    for (const auto& [least, most] :
         {std::pair{0, 0}, {1, 1}, {1, 300}, {0, 40}, {5, 16}, {10, 200}, {60, 70}}) {
        const Layer layer = layer_of(8, 4, 4096);
        std::string known = " ";
        for (const auto& plan : distinct_plans(kernels.table(), layer, kGpu, least, most)) {
            for (const auto& launch : plan.launches) {
                known += std::to_string(launch.record - kernels.table().begin()) + " ";
            }
        }
        for (std::int32_t batch = least; batch <= most; ++batch) {
            for (const auto& launch : plan_step(kernels.table(), layer, kGpu, batch).launches) {
                const auto name = std::to_string(launch.record - kernels.table().begin());
                CHECK_CONTAINS(known, " " + name + " ");
            }
        }
    }
}

TEST(an_empty_batch_launches_nothing) {
    const auto kernels = usual_kernels();
    const Plan plan = plan_step(kernels.table(), layer_of(8, 8, 64), kGpu, 0);
    CHECK(plan.launches.empty());
    CHECK_CONTAINS(refusal([&] { plan_step(kernels.table(), layer_of(8, 8, 64), kGpu, -1); }),
                   "batch: got -1");
}

TEST(the_group_of_one_has_kernels_of_its_own) {
    auto kernels = usual_kernels();
    CHECK_EQUAL(plan_step(kernels.table(), layer_of(8, 8, 64), kGpu, 1).launches[1].record->group,
                1);
    CHECK_EQUAL(plan_step(kernels.table(), layer_of(16, 8, 64), kGpu, 1).launches[1].record->group,
                0);
    auto& records = kernels.records();
    for (auto& record : records) {
        if (record.group == 1) {
            record.kernel = "gone";
        }
    }
    // What serves any group serves one, where nothing else is there.
    CHECK_EQUAL(plan_step(kernels.table(), layer_of(8, 8, 64), kGpu, 1).launches[1].record->group,
                0);
    CHECK_CONTAINS(refusal([&] { plan_step(kernels.table(), layer_of(17, 1, 64), kGpu, 1); }),
                   "up to 16 query heads a KV head");
}

TEST(the_tightest_padding_is_taken) {
    auto kernels = usual_kernels();
    const auto more = usual_kernels();
    for (KernelRecord record : more.table()) {
        if (record.block_r == 16) {
            record.block_r = 64;
            kernels.add(record);
        }
    }
    Layer layer = layer_of(8, 8, 64);
    CHECK_EQUAL(plan_step(kernels.table(), layer, kGpu, 1).launches[1].record->block_r, 16);
    layer.attributes.rank = 32;
    CHECK_EQUAL(plan_step(kernels.table(), layer, kGpu, 1).launches[1].record->block_r, 64);
    layer.attributes.rank = 6;
    CHECK_CONTAINS(refusal([&] { plan_step(kernels.table(), layer, kGpu, 1); }),
                   "rank up to 64 by 4s");
}

TEST(a_small_tile_serves_large_batches_where_no_larger_is) {
    auto kernels = usual_kernels();
    for (auto& record : kernels.records()) {
        if (record.block_b == 32) {
            record.kernel = "gone";
        }
    }
    const Plan plan = plan_step(kernels.table(), layer_of(8, 8, 64), kGpu, 40);
    CHECK_EQUAL(plan.launches[0].record->block_b, 16);
    CHECK_EQUAL(plan.launches[0].grid_y, 3U);
}

TEST(images_are_chosen_by_architecture) {
    SyntheticKernels kernels;
    for (const std::int32_t arch : {80, 86, 90, 100}) {
        kernels.add_layout("float16", 64, 2, arch);
    }
    const auto chosen = [&kernels](std::int32_t arch) {
        const Device device{arch, 100, 227 * 1024};
        const auto& record =
            *plan_step(kernels.table(), layer_of(8, 8, 64), device, 1).launches[1].record;
        return record.arch * (record.ptx ? -1 : 1);
    };
    CHECK_EQUAL(chosen(80), 80);
    CHECK_EQUAL(chosen(86), 86);
    CHECK_EQUAL(chosen(89), 86);
    CHECK_EQUAL(chosen(90), 90);
    CHECK_CONTAINS(refusal([&] { chosen(75); }), "no image for this GPU, sm_75");
    CHECK_CONTAINS(refusal([&] { chosen(103); }), "no image for this GPU, sm_103");
    CHECK_CONTAINS(refusal([&] { chosen(120); }), "there are sm_100, sm_80, sm_86, sm_90");
    kernels.add_layout("float16", 64, 2, 80, true);
    CHECK_EQUAL(chosen(120), -80);
    CHECK_EQUAL(chosen(103), -80);
    CHECK_EQUAL(chosen(90), 90);
    CHECK_CONTAINS(refusal([&] { chosen(75); }), "sm_80 and later by PTX");
}

TEST(an_image_of_too_much_shared_memory_is_passed_over) {
    const auto kernels = usual_kernels();
    const Device small{90, 132, 48 * 1024};
    CHECK_CONTAINS(refusal([&] { plan_step(kernels.table(), layer_of(8, 8, 64), small, 1); }),
                   "sm_90 with 49152 bytes of shared memory a block; there are sm_90, of 65536");
}

TEST(shapes_that_are_not_there_are_refused_with_those_that_are) {
    const auto kernels = usual_kernels();
    const auto refused = [&kernels](auto change) {
        Layer layer = layer_of(8, 8, 64);
        change(layer);
        return refusal([&] { plan_step(kernels.table(), layer, kGpu, 1); });
    };
    CHECK_EQUAL(refused([](Layer&) {}), "nothing was refused");
    const auto by_head = refused([](auto& l) { l.sizes.head_dim = 80; });
    CHECK_CONTAINS(by_head, "not compiled for float16, head size 80, 8/8 heads");
    CHECK_CONTAINS(by_head, "there is: float16, head size 64");
    CHECK_CONTAINS(refused([](auto& l) { l.sizes.dtype = Dtype::kBFloat16; }), "bfloat16, head");
    CHECK_CONTAINS(refused([](auto& l) { l.sizes.state_dtype = Dtype::kFloat16; }),
                   "H and z float16");
    CHECK_CONTAINS(refused([](auto& l) { l.sizes.hidden = 24; }), "of hidden size by 16s");
    CHECK_CONTAINS(refused([](auto& l) { l.attributes.softcap = 30.0F; }), "softcap 30");
    CHECK_CONTAINS(refused([](auto& l) { l.attributes.maps = MapKind::kPaper; }), "maps \"paper\"");
    CHECK_CONTAINS(refused([](auto& l) {
                       l.attributes.rank = 0;
                       l.attributes.maps = MapKind::kNone;
                       l.sizes.hidden = 0;
                   }),
                   "rank 0");
    CHECK_CONTAINS(refusal([] { plan_step({}, layer_of(8, 8, 64), kGpu, 1); }), "there is: none");
}

TEST(a_score_is_served_by_its_bit) {
    auto kernels = usual_kernels();
    for (auto& record : kernels.records()) {
        record.scores = 1U << 3U;  // Gain 1, start 0.
    }
    Layer layer = layer_of(8, 8, 64);
    CHECK_EQUAL(plan_step(kernels.table(), layer, kGpu, 1).launches.size(), 2U);
    layer.attributes.gain = Gain::kHistory;
    layer.attributes.window = 5;
    CHECK_CONTAINS(refusal([&] { plan_step(kernels.table(), layer, kGpu, 1); }), "scores 0+1");
    for (auto& record : kernels.records()) {
        record.scores = 1U << 2U;
    }
    layer.attributes.start = Start::kKeyNorm;
    layer.attributes.gain = Gain::kNone;
    layer.attributes.window = 0;
    CHECK_EQUAL(plan_step(kernels.table(), layer, kGpu, 1).launches.size(), 2U);
}

TEST(parts_are_concluded_in_the_blocks_they_were_written_in) {
    auto kernels = usual_kernels();
    const auto more = usual_kernels();
    for (KernelRecord record : more.table()) {
        if (std::string(record.kernel) == "conclude_split") {
            record.block_g = 8;
            kernels.add(record);
        }
    }
    const Plan plan = plan_step(kernels.table(), layer_of(8, 8, 8192), kGpu, 1);
    CHECK_EQUAL(plan.launches.size(), 4U);
    CHECK_EQUAL(plan.launches[3].record->block_g, plan.launches[2].record->block_g);
}

TEST(grids_beyond_what_a_gpu_takes_are_refused) {
    SyntheticKernels kernels;
    kernels.add_layout("float32", 16, 0, 90);
    Layer layer = layer_of(1, 1, 64);
    layer.attributes.rank = 0;
    layer.attributes.maps = MapKind::kNone;
    layer.sizes = {1, 1, 16, 0, Dtype::kFloat32, Dtype::kFloat32};
    CHECK_EQUAL(plan_step(kernels.table(), layer, kGpu, 65535).launches[0].grid_y, 65535U);
    CHECK_CONTAINS(refusal([&] { plan_step(kernels.table(), layer, kGpu, 65536); }),
                   "needs a grid of 1 by 65536");
}

TEST(parameters_of_another_version_are_refused) {
    const auto refused = [](const char* parameters) {
        less_cache::Names names(layer_of(8, 8, 64).attributes);
        names.put("BIG", std::int64_t{1099511627776});
        names.put("SCALE", 1.0F);
        KernelRecord record{};
        record.symbol = "attend";
        record.parameters = parameters;
        return refusal([&] { static_cast<void>(names.arguments(record)); });
    };
    CHECK_EQUAL(refused("q:ptr BIG:i64 SCALE:f32"), "nothing was refused");
    CHECK_CONTAINS(refused("q:ptr novel:ptr"), "attend: it takes a parameter \"novel\"");
    CHECK_CONTAINS(refused("q:i32"), "parameter \"q\" is of type \"i32\"");
    CHECK_CONTAINS(refused("SCALE:i32"), "parameter \"SCALE\" is of type \"i32\"");
    CHECK_CONTAINS(refused("BIG:f32"), "type \"f32\"");
    CHECK_CONTAINS(refused("BIG:i32"), "BIG = 1099511627776 does not fit");
    CHECK_CONTAINS(refused("q"), "has no type");
}

TEST(embedded_images_are_where_the_records_say) {
    for (const auto& record : less_cache::embedded_kernels()) {
        const auto* image = static_cast<const char*>(less_cache::embedded_image(record));
        const bool cubin = std::memcmp(image, "\177ELF", 4) == 0;
        if (record.ptx) {
            CHECK_EQUAL(image[record.size - 1], '\0');
            CHECK_EQUAL(std::strlen(image), record.size - 1);
        }
        const auto place = std::string(image, record.size).find(record.symbol);
        CHECK_EQUAL(cubin || place != std::string::npos, true);
    }
    CHECK(less_cache::embedded_kernels().count > 0);
    KernelRecord beyond{};
    beyond.symbol = "beyond";
    beyond.offset = std::numeric_limits<std::uint64_t>::max();
    beyond.size = 16;
    CHECK_CONTAINS(refusal([&] { less_cache::embedded_image(beyond); }), "bytes are embedded");
}

}  // namespace

int main(int count, char** arguments) { return less_cache::testing::run(count, arguments); }
