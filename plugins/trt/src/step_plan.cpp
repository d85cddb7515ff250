#include "step_plan.h"

#include <algorithm>
#include <limits>
#include <set>

#include "arguments.h"
#include "errors.h"

namespace less_cache {
namespace {

constexpr std::int64_t kMostProgramsY = 65535;
constexpr std::int64_t kMostProgramsX = std::numeric_limits<std::int32_t>::max();

/// Blocks of slots below which sharing them out costs more than it gains.
constexpr std::int64_t kBlocksASplit = 4;

/// Programs of `attend` that a multiprocessor has room for, and that heads are shared out for.
constexpr std::int64_t kProgramsAProcessor = 4;

/// Programs a head: what they leave is merged one after another.
constexpr std::int64_t kMostSplits = 16;

/// Slots of a head up to which the programs that map its victims look for them, too.
constexpr std::int32_t kMostScanned = 512;

/// Of each array in the workspace: what TensorRT gives its own buffers.
constexpr std::size_t kAlignment = 256;

constexpr std::int64_t divided_up(std::int64_t number, std::int64_t by) {
    return (number + by - 1) / by;
}

/// How many programs share a head's slots: as many as have a block to read.
std::int64_t splits_of(const Layer& layer, const Device& device, std::int64_t batch,
                       std::int64_t block_c) {
    const std::int64_t blocks = divided_up(layer.attributes.capacity, block_c);
    const std::int64_t wanted =
        kProgramsAProcessor * device.multiprocessors / (batch * layer.sizes.kv_heads);
    const std::int64_t splits =
        std::max<std::int64_t>(1, std::min({wanted, blocks / kBlocksASplit, kMostSplits}));
    return divided_up(blocks, divided_up(blocks, std::min(splits, blocks)));
}

/// Kernel A: what chooses victims, and what applies the maps unless that does so, too.
struct Selection {
    const KernelRecord* select = nullptr;
    const KernelRecord* map = nullptr;
};

Selection choose_selection(KernelTable table, const Layer& layer, const Device& device,
                           std::int32_t batch) {
    const auto first = [&](std::int32_t block_b, std::int32_t selects, bool maps) {
        Want want{"select_and_map", -1, block_b};
        want.selects = selects;
        want.maps = maps;
        return &choose_kernel(table, layer, device, want);
    };
    if (layer.attributes.maps == MapKind::kNone) {
        return {first(1, 1, false), nullptr};
    }
    const std::int32_t tile = batch <= 16 ? 16 : 32;
    if (layer.attributes.capacity <= kMostScanned) {
        return {first(tile, 1, true), nullptr};
    }
    return {first(1, 1, false), first(tile, 0, true)};
}

/// Kernel B and what follows it.
struct Attention {
    const KernelRecord* attend = nullptr;
    const KernelRecord* conclude = nullptr;
    std::int64_t splits = 1;
};

Attention choose_attention(KernelTable table, const Layer& layer, const Device& device,
                           std::int64_t batch) {
    if (const auto* split = find_kernel(table, layer, device, {"attend", 1})) {
        const std::int64_t splits = splits_of(layer, device, batch, split->block_c);
        if (splits > 1) {
            const Want last{"conclude_split", -1, 0, split->block_g, split->block_d};
            return {split, &choose_kernel(table, layer, device, last), splits};
        }
    }
    return {&choose_kernel(table, layer, device, {"attend", 0}), nullptr, 1};
}

/// Lays arrays out one after another.
class Workspace {
public:
    explicit Workspace(Names& names) : names_(names) {}

    /// @param numbers Of 4 bytes each.
    void place(std::initializer_list<const char*> aliases, std::int64_t numbers) {
        for (const char* name : aliases) {
            names_.put_workspace(name, bytes_);
        }
        const std::size_t wanted = static_cast<std::size_t>(numbers) * 4;
        bytes_ += (wanted + kAlignment - 1) / kAlignment * kAlignment;
    }

    [[nodiscard]] std::size_t bytes() const { return bytes_; }

private:
    Names& names_;
    std::size_t bytes_ = 0;
};

std::size_t place_scratch(Names& names, const Layer& layer, const Attention& attention,
                          std::int64_t batch) {
    const std::int64_t heads = batch * layer.sizes.kv_heads;
    const std::int64_t rank = layer.attributes.rank;
    Workspace workspace(names);
    workspace.place({"slot_out", "slots"}, heads);
    if (rank > 0) {
        workspace.place({"phi_out", "phi"}, batch * layer.sizes.query_heads * rank);
        workspace.place({"psi_out", "psi"}, heads * rank);
    }
    if (layer.scored()) {
        workspace.place({"logits"}, heads * layer.group() * layer.attributes.capacity);
    }
    const std::int64_t parts = heads * attention.splits * attention.attend->block_g;
    if (attention.conclude != nullptr) {
        workspace.place({"part_peak"}, parts);
        workspace.place({"part_mass"}, parts);
    }
    // Sums over codes come in their order, and are read in that of channels.
    if (attention.conclude != nullptr || layer.attributes.coded()) {
        workspace.place({"part_numerator"}, parts * attention.attend->block_d);
    }
    return workspace.bytes();
}

/// Rows of dense arrays.
void put_row_strides(Names& names, const Layer& layer) {
    const Sizes& sizes = layer.sizes;
    const std::int64_t heads = sizes.kv_heads;
    const std::int64_t slots = heads * layer.attributes.capacity;
    const std::int64_t ranks = heads * layer.attributes.rank;
    names.put("q_row_stride", std::int64_t{sizes.query_heads} * sizes.head_dim);
    for (const char* name : {"k_row_stride", "v_row_stride"}) {
        names.put(name, heads * sizes.head_dim);
    }
    names.put("keys_row_stride", slots * layer.key_width());
    names.put("values_row_stride", slots * layer.value_width());
    for (const char* name : {"scores_row_stride", "positions_row_stride", "history_row_stride",
                             "key_scales_row_stride", "value_scales_row_stride"}) {
        names.put(name, slots);
    }
    names.put("H_row_stride", ranks * sizes.head_dim);
    names.put("z_row_stride", ranks);
    names.put("logits_row_stride", slots * layer.group());
}

void put_numbers(Names& names, const Layer& layer, std::int64_t splits, std::int64_t batch) {
    const Attributes& attributes = layer.attributes;
    const Sizes& sizes = layer.sizes;
    put_row_strides(names, layer);
    for (const char* name : {"q_head_stride", "k_head_stride", "v_head_stride"}) {
        names.put(name, std::int64_t{sizes.head_dim});
    }
    names.put("batch", batch);
    names.put("capacity", std::int64_t{attributes.capacity});
    names.put("sinks", std::int64_t{attributes.sinks});
    names.put("recent", std::int64_t{attributes.recent});
    names.put("splits", splits);
    names.put("QUERY_HEADS", std::int64_t{sizes.query_heads});
    names.put("KV_HEADS", std::int64_t{sizes.kv_heads});
    names.put("GROUP", std::int64_t{layer.group()});
    names.put("HIDDEN", std::int64_t{sizes.hidden});
    names.put("RANK", std::int64_t{attributes.rank});
    names.put("WINDOW", std::int64_t{attributes.window});
    names.put("SCALE", attributes.scale);
    names.put("DECAY", attributes.decay);
}

Launch launch(const Names& names, const KernelRecord& record, std::int64_t x, std::int64_t y) {
    if (x > kMostProgramsX || y > kMostProgramsY) {
        throw Refusal(ErrorKind::kInvalidConfig, record.kernel, ": this batch needs a grid of ", x,
                      " by ", y, ", but at most ", kMostProgramsX, " by ", kMostProgramsY,
                      " can be launched; use smaller batches");
    }
    return {&record, static_cast<std::uint32_t>(x), static_cast<std::uint32_t>(y),
            names.arguments(record)};
}

}  // namespace

Plan plan_step(KernelTable table, const Layer& layer, const Device& device, std::int32_t batch) {
    if (batch < 0) {
        throw Refusal(ErrorKind::kInvalidArgument, "batch: got ", batch, ", expected 0 or more");
    }
    Plan plan;
    if (batch == 0) {
        return plan;
    }
    const Selection selection = choose_selection(table, layer, device, batch);
    const Attention attention = choose_attention(table, layer, device, batch);
    plan.splits = static_cast<std::int32_t>(attention.splits);

    Names names(layer.attributes);
    put_numbers(names, layer, attention.splits, batch);
    plan.workspace_bytes = place_scratch(names, layer, attention, batch);

    const Sizes& sizes = layer.sizes;
    const std::int64_t heads = std::int64_t{batch} * sizes.kv_heads;
    for (const KernelRecord* first : {selection.select, selection.map}) {
        if (first == nullptr) {
            continue;
        }
        const std::int64_t mapped = first->kind == 0 ? 0 : sizes.query_heads;
        const std::int64_t tiles = divided_up(batch, first->block_b);
        plan.launches.push_back(launch(names, *first, sizes.kv_heads + mapped, tiles));
    }
    plan.launches.push_back(launch(names, *attention.attend, heads, attention.splits));
    if (attention.conclude != nullptr) {
        plan.launches.push_back(launch(names, *attention.conclude, heads, 1));
    }
    return plan;
}

std::size_t workspace_for(KernelTable table, const Layer& layer, const Device& device,
                          std::int32_t most) {
    // More sequences take more of everything but parts, of which a smaller batch may have more: no
    // more than kProgramsAProcessor * multiprocessors where slots are shared.
    Plan plan = plan_step(table, layer, device, most);
    const auto* split = find_kernel(table, layer, device, {"attend", 1});
    if (most == 0 || split == nullptr || splits_of(layer, device, 1, split->block_c) == 1) {
        return plan.workspace_bytes;
    }
    const std::int64_t programs = kProgramsAProcessor * device.multiprocessors;
    const std::int64_t numbers = programs * split->block_g * (std::int64_t{split->block_d} + 2);
    Names names(layer.attributes);
    const std::size_t rest = place_scratch(names, layer, {split, nullptr, 1}, most);
    const std::size_t parts = static_cast<std::size_t>(numbers) * 4 + 3 * kAlignment;
    return std::max(plan.workspace_bytes, rest + parts);
}

std::vector<Plan> distinct_plans(KernelTable table, const Layer& layer, const Device& device,
                                 std::int32_t least, std::int32_t most) {
    // As the batch grows, tiles grow once and slots cease to be shared once: the ends have it all,
    // but for an empty batch, which has nothing.
    const std::set<std::int32_t> batches{least == 0 ? std::min(1, most) : least, most};
    std::vector<Plan> plans;
    plans.reserve(batches.size());
    for (const std::int32_t batch : batches) {
        plans.push_back(plan_step(table, layer, device, batch));
    }
    return plans;
}

}  // namespace less_cache
