#include "kernel_choice.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <string_view>
#include <tuple>
#include <vector>

#include "errors.h"

namespace less_cache {
namespace {

bool serves_dtypes(const KernelRecord& record, const Layer& layer) {
    const std::string_view dtype = record.dtype;
    if (!dtype.empty() && dtype != name_of(layer.sizes.dtype)) {
        return false;
    }
    const std::string_view state = record.state_dtype;
    return state.empty() ||
           (layer.attributes.rank > 0 && state == name_of(layer.sizes.state_dtype));
}

bool serves_score(const KernelRecord& record, Start start, Gain gain) {
    const auto bit = static_cast<std::uint32_t>(kStarts * static_cast<std::int32_t>(gain) +
                                                static_cast<std::int32_t>(start));
    return ((record.scores >> bit) & 1U) != 0U;
}

bool serves_heads(const KernelRecord& record, const Layer& layer, const Want& want) {
    if (record.head_dim != 0 && record.head_dim != layer.sizes.head_dim) {
        return false;
    }
    const std::int32_t group = layer.group();
    if (record.group == 1 && group != 1) {
        return false;
    }
    if (record.block_g != 0 && group > record.block_g) {
        return false;
    }
    return (want.block_g == 0 || record.block_g == want.block_g) &&
           (want.block_d == 0 || record.block_d == want.block_d);
}

bool serves_rank(const KernelRecord& record, const Attributes& attributes, std::int32_t hidden) {
    if (record.block_r == 0 && attributes.rank != 0) {
        return false;
    }
    if (record.block_r > 0 && (attributes.rank == 0 || attributes.rank > record.block_r)) {
        return false;
    }
    return attributes.rank % record.rank_multiple == 0 && hidden % record.hidden_multiple == 0;
}

bool serves_codes(const KernelRecord& record, const Layer& layer) {
    const auto same = [](std::string_view own, const std::string& wanted) {
        return own.empty() || own == wanted;
    };
    const Attributes& attributes = layer.attributes;
    // Where pairs lie in bytes is compiled in.
    const bool right_bytes =
        (record.key_bytes == 0 || record.key_bytes == layer.sizes.key_bytes) &&
        (record.value_bytes == 0 || record.value_bytes == layer.sizes.value_bytes);
    return same(record.key_bits, attributes.key_bits) &&
           same(record.value_bits, attributes.value_bits) &&
           (record.transform == -1 ||
            record.transform == static_cast<std::int32_t>(attributes.transform)) &&
           right_bytes;
}

/// Least is best.
auto preference(const KernelRecord& record, const Want& want) {
    const bool exact_tile = record.block_b == want.block_b;
    return std::make_tuple(record.ptx, -record.arch, !exact_tile, record.group != 1, record.block_g,
                           record.block_r, -record.rank_multiple, -record.hidden_multiple,
                           record.head_dim == 0);
}

std::string architectures(const std::vector<const KernelRecord*>& records) {
    std::set<std::string> names;
    for (const auto* record : records) {
        names.insert(text("sm_", record->arch, record->ptx ? " and later by PTX" : ""));
    }
    std::string line;
    for (const auto& name : names) {
        line += (line.empty() ? "" : ", ") + name;
    }
    return line;
}

/// Whether a kernel does what is wanted, for whatever layer.
bool does(const KernelRecord& record, const Want& want) {
    return std::strcmp(record.kernel, want.kernel) == 0 &&
           (want.selects == -1 || record.selects == want.selects) &&
           want.maps == (record.kind != 0);
}

/// The shapes that a kernel was compiled for, one item each; long lists are cut.
std::string shapes(KernelTable table, const Want& want) {
    constexpr std::size_t kMost = 24;
    std::set<std::string> lines;
    for (const auto& record : table) {
        if (!does(record, want)) {
            continue;
        }
        std::string line = *record.dtype == '\0' ? "any dtype" : record.dtype;
        line += record.head_dim == 0 ? ", any head size" : text(", head size ", record.head_dim);
        line += record.group == 1     ? ", 1 query head a KV head"
                : record.block_g == 0 ? ""
                                      : text(", up to ", record.block_g, " query heads a KV head");
        line += record.block_r < 0 ? ""
                : record.block_r == 0
                    ? ", rank 0"
                    : text(", rank up to ", record.block_r, " by ", record.rank_multiple, "s");
        line += record.kind == 0 ? ", without maps" : "";
        if (record.kind > 0) {
            line += text(", maps \"", name_of(static_cast<MapKind>(record.kind)),
                         "\" of hidden size by ", record.hidden_multiple, "s");
        }
        line += *record.state_dtype == '\0' ? "" : text(", H and z ", record.state_dtype);
        line += record.softcap > 0.0F ? text(", softcap ", record.softcap) : "";
        if (record.transform != -1) {
            line += text(", codes of ", record.key_bits, " bits");
            line += *record.value_bits == '\0' ? "" : text(" and ", record.value_bits);
            line += text(", ", name_of(static_cast<Transform>(record.transform)));
        }
        line += ", scores";
        for (std::int32_t gain = 0; gain < kGains; ++gain) {
            for (std::int32_t start = 0; start < kStarts; ++start) {
                const bool served =
                    serves_score(record, static_cast<Start>(start), static_cast<Gain>(gain));
                line += served ? text(" ", start, "+", gain) : "";
            }
        }
        lines.insert(std::move(line));
    }
    std::string all;
    std::size_t shown = 0;
    for (const auto& line : lines) {
        if (shown++ == kMost) {
            all += text("; and ", lines.size() - kMost, " more");
            break;
        }
        all += (all.empty() ? "" : "; ") + line;
    }
    return all.empty() ? "none" : all;
}

}  // namespace

std::int32_t padded(std::int32_t size) {
    std::int32_t block = 16;
    while (block < size) {
        block *= 2;
    }
    return block;
}

bool serves(const KernelRecord& record, const Layer& layer, const Want& want) {
    const Attributes& attributes = layer.attributes;
    const auto kind = static_cast<std::int32_t>(attributes.maps);
    return does(record, want) && serves_dtypes(record, layer) &&
           serves_codes(record, layer) && serves_heads(record, layer, want) &&
           serves_rank(record, attributes, layer.sizes.hidden) &&
           serves_score(record, attributes.start, attributes.gain) &&
           (record.kind <= 0 || record.kind == kind) && record.block_b <= want.block_b &&
           (record.softcap < 0.0F || record.softcap == attributes.softcap) &&
           (want.split == -1 || record.split == want.split);
}

bool runs_on(const KernelRecord& record, const Device& device) {
    // From 90 on Triton compiles for one architecture ("sm_90a") and no other.
    constexpr std::int32_t kSpecific = 90;
    const bool family = record.arch < kSpecific && record.arch / 10 == device.arch / 10;
    const bool runs =
        record.arch == device.arch || (record.arch < device.arch && (record.ptx || family));
    return runs && record.shared_bytes <= device.shared_limit;
}

const KernelRecord* find_kernel(KernelTable table, const Layer& layer, const Device& device,
                                const Want& want) {
    const KernelRecord* best = nullptr;
    for (const auto& record : table) {
        if (serves(record, layer, want) && runs_on(record, device) &&
            (best == nullptr || preference(record, want) < preference(*best, want))) {
            best = &record;
        }
    }
    return best;
}

const KernelRecord& choose_kernel(KernelTable table, const Layer& layer, const Device& device,
                                  const Want& want) {
    if (const auto* found = find_kernel(table, layer, device, want)) {
        return *found;
    }
    std::vector<const KernelRecord*> fitting;
    std::int32_t least_shared = 0;
    for (const auto& record : table) {
        if (serves(record, layer, want)) {
            least_shared =
                fitting.empty() ? record.shared_bytes : std::min(least_shared, record.shared_bytes);
            fitting.push_back(&record);
        }
    }
    if (!fitting.empty()) {
        throw Refusal(ErrorKind::kInvalidConfig, want.kernel, ": no image for this GPU, sm_",
                      device.arch, " with ", device.shared_limit,
                      " bytes of shared memory a block; there are ", architectures(fitting),
                      ", of ", least_shared, " bytes or more");
    }
    throw Refusal(ErrorKind::kInvalidConfig, want.kernel, ": not compiled for ", describe(layer),
                  "; there is: ", shapes(table, want));
}

}  // namespace less_cache
