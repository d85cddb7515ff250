#include "synthetic_kernels.h"

#include <sstream>

namespace less_cache::testing {
namespace {

constexpr std::int32_t kRankBlock = 16;

std::string parameters_of(const std::string& kernel, std::int32_t kind, bool split, bool selects,
                          const SyntheticCodes& codes) {
    const std::string scales = codes.none() ? "" : "key_scales:ptr value_scales:ptr ";
    const std::string scale_strides =
        codes.none() ? "" : " key_scales_row_stride:i64 value_scales_row_stride:i64";
    const std::string strides = " q_row_stride:i64 q_head_stride:i32";
    if (kernel == "select_and_map") {
        std::string line = kind == 0 ? "" : "q:ptr keys:ptr ";
        line += kind == 0 || codes.none() ? "" : "key_scales:ptr ";
        line += selects ? "lengths:ptr scores:ptr positions:ptr " : "lengths:ptr ";
        line += kind == 0 ? "" : "phi_w1:ptr phi_w2:ptr psi_w1:ptr psi_w2:ptr ";
        line += kind == 1 ? "psi_w3:ptr psi_s1:ptr psi_s2:ptr " : kind == 2 ? "psi_b:ptr " : "";
        line += kind != 0 && codes.means() ? "psi_b1:ptr " : "";
        line += "slot_out:ptr ";
        line += kind == 0 ? "" : "phi_out:ptr psi_out:ptr ";
        line += selects ? "batch:i32 capacity:i32 sinks:i32 recent:i32" : "batch:i32 capacity:i32";
        line += kind == 0 ? "" : strides + " keys_row_stride:i64";
        line += kind == 0 || codes.none() ? "" : " key_scales_row_stride:i64";
        line += selects ? " scores_row_stride:i64 positions_row_stride:i64" : "";
        line += " QUERY_HEADS:i32 KV_HEADS:i32";
        return line + (kind == 0 ? "" : " HIDDEN:i32 RANK:i32");
    }
    if (split) {
        return "q:ptr mask:ptr lengths:ptr keys:ptr values:ptr positions:ptr slots:ptr logits:ptr "
               "out:ptr part_peak:ptr part_mass:ptr part_numerator:ptr capacity:i32 splits:i32" +
               strides +
               " keys_row_stride:i64 values_row_stride:i64 positions_row_stride:i64 "
               "logits_row_stride:i64 SCALE:f32 GROUP:i32 KV_HEADS:i32 " +
               scales + scale_strides;
    }
    std::string line =
        "q:ptr k:ptr v:ptr mask:ptr lengths:ptr keys:ptr values:ptr scores:ptr positions:ptr "
        "history:ptr ";
    line += kind == 0 ? "" : "H:ptr z:ptr ";
    line += "slots:ptr ";
    line += kind == 0 ? "" : "phi:ptr psi:ptr ";
    line += "logits:ptr out:ptr ";
    line += scales;
    line += kind != 0 && codes.means() ? "shift:ptr " : "";
    line += kernel == "attend" ? "" : "part_peak:ptr part_mass:ptr ";
    line += kernel == "attend" && codes.none() ? "" : "part_numerator:ptr ";
    line += kernel == "attend" ? "capacity:i64" : "capacity:i64 splits:i32";
    line += strides + scale_strides;
    line +=
        " k_row_stride:i64 k_head_stride:i32 v_row_stride:i64 v_head_stride:i32 "
        "keys_row_stride:i64 values_row_stride:i64 scores_row_stride:i64 "
        "positions_row_stride:i64 history_row_stride:i64 logits_row_stride:i64 ";
    line += kind == 0 ? "" : "H_row_stride:i64 z_row_stride:i64 ";
    line += "DECAY:f32 WINDOW:i32 SCALE:f32 GROUP:i32 KV_HEADS:i32";
    return line + (kind == 0 ? "" : " RANK:i32");
}

KernelRecord blank(const char* kernel) {
    KernelRecord record{};
    record.kernel = kernel;
    record.dtype = "";
    record.key_bits = "";
    record.value_bits = "";
    record.state_dtype = "";
    record.scores = 511;
    record.kind = -1;
    record.block_r = -1;
    record.selects = -1;
    record.softcap = -1.0F;
    record.split = -1;
    record.hidden_multiple = 1;
    record.rank_multiple = 1;
    record.transform = -1;
    record.warps = 4;
    record.parameters = "";
    record.symbol = "";
    return record;
}

}  // namespace

const char* SyntheticKernels::keep(const std::string& text) {
    return strings_.emplace_back(text).c_str();
}

void SyntheticKernels::add(const KernelRecord& record) {
    KernelRecord own = record;
    for (const char** text : {&own.kernel, &own.dtype, &own.state_dtype, &own.key_bits,
                              &own.value_bits, &own.symbol, &own.parameters}) {
        *text = keep(*text);
    }
    records_.push_back(own);
}

void SyntheticKernels::add_layout(const std::string& dtype, std::int32_t head_dim,
                                  std::int32_t kind, std::int32_t arch, bool ptx,
                                  const SyntheticCodes& codes) {
    std::int32_t padded = 16;
    while (padded < head_dim) {
        padded *= 2;
    }
    const auto add_one = [&](KernelRecord record, bool low_rank, const char* suffix) {
        const std::string kernel = record.kernel;
        record.arch = arch;
        record.ptx = ptx;
        const bool first = kernel == "select_and_map";
        const bool simple = first && record.kind == 0;
        record.key_bits = simple ? "" : codes.key_bits;
        record.value_bits = first ? "" : codes.value_bits;
        record.transform = simple ? -1 : codes.transform;
        record.key_bytes = simple ? 0 : codes.key_bytes;
        record.value_bytes = first ? 0 : codes.value_bytes;
        if (low_rank) {
            record.block_r = kind == 0 ? 0 : kRankBlock;
            record.rank_multiple = kind == 0 ? 1 : 4;
        }
        const std::string symbol = kernel + suffix;
        const std::string parameters = parameters_of(
            kernel, first ? record.kind : kind, record.split == 1, record.selects == 1, codes);
        record.symbol = symbol.c_str();
        record.parameters = parameters.c_str();
        add(record);
    };
    KernelRecord select = blank("select_and_map");
    select.kind = 0;
    select.block_b = 1;
    select.selects = 1;
    select.warps = 8;
    add_one(select, false, "");
    for (const std::int32_t tile : kind == 0 ? std::vector<std::int32_t>{} : std::vector{16, 32}) {
        for (const std::int32_t selects : {1, 0}) {
            KernelRecord map = select;
            map.kind = kind;
            map.block_b = tile;
            map.selects = selects;
            map.dtype = dtype.c_str();
            map.head_dim = head_dim;
            map.block_d = padded;
            map.hidden_multiple = 16;
            add_one(map, true, selects == 1 ? "" : "_mapping");
        }
    }
    for (const std::int32_t split : {0, 1}) {
        for (const std::int32_t group : {1, 0}) {
            KernelRecord attend = blank("attend");
            attend.dtype = dtype.c_str();
            attend.head_dim = head_dim;
            attend.block_d = padded;
            attend.group = group;
            attend.block_g = 16;
            attend.split = split;
            attend.softcap = 0.0F;
            attend.block_c = std::max(16, 8192 / (padded * (dtype == "float32" ? 4 : 2)));
            attend.shared_bytes = 64 * 1024;
            attend.state_dtype = split == 0 && kind != 0 ? "float32" : "";
            add_one(attend, split == 0, split == 0 ? "" : "_split");
        }
    }
    for (const std::int32_t group : {1, 0}) {
        KernelRecord conclude = blank("conclude_split");
        conclude.dtype = dtype.c_str();
        conclude.state_dtype = kind != 0 ? "float32" : "";
        conclude.head_dim = head_dim;
        conclude.block_d = padded;
        conclude.group = group;
        conclude.block_g = 16;
        conclude.softcap = 0.0F;
        add_one(conclude, true, "");
    }
}

SyntheticKernels embedded_for_tests() {
    SyntheticKernels kernels;
    for (const std::int32_t arch : {80, 90}) {
        kernels.add_layout("float16", 64, 2, arch);
        kernels.add_layout("float16", 64, 1, arch);
        kernels.add_layout("float32", 16, 0, arch);
    }
    kernels.add_layout("float16", 64, 2, 80, true);
    kernels.add_layout("float16", 64, 2, 90, false, {"3", "4", 1, 24, 32});
    std::uint64_t offset = 0;
    for (KernelRecord& record : kernels.records()) {
        record.size = synthetic_image(record).size();
        record.offset = offset;
        offset += (record.size + 63) / 64 * 64;
    }
    return kernels;
}

std::string synthetic_image(const KernelRecord& record) {
    std::ostringstream text;
    text << record.symbol << " " << record.parameters;
    return text.str() + std::string(1, '\0');
}

}  // namespace less_cache::testing
