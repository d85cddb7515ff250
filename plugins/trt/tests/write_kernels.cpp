// Writes kernels.bin and kernels.inc of the synthetic kernels into a folder.

#include <fstream>
#include <iostream>
#include <string>

#include "synthetic_kernels.h"

namespace {

std::string quoted(const char* text) { return "\"" + std::string(text) + "\""; }

std::string real(float number) {
    std::string digits = std::to_string(number);
    return digits + "F";
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) {
        std::cerr << "usage: write_kernels FOLDER\n";
        return 2;
    }
    const std::string folder = arguments[1];
    std::ofstream index(folder + "/kernels.inc");
    std::ofstream images(folder + "/kernels.bin", std::ios::binary);
    const auto kernels = less_cache::testing::embedded_for_tests();
    for (const auto& record : kernels.table()) {
        const std::string gap(record.offset - static_cast<std::uint64_t>(images.tellp()), '\0');
        images << gap << less_cache::testing::synthetic_image(record);
        index << "{" << quoted(record.kernel) << ", " << quoted(record.dtype) << ", "
              << quoted(record.state_dtype) << ", " << record.arch << ", "
              << (record.ptx ? "true" : "false") << ", " << record.head_dim << ", "
              << record.block_d << ", " << record.scores << ", " << record.kind << ", "
              << record.group << ", " << record.block_g << ", " << record.block_r << ", "
              << record.block_b << ", " << record.selects << ", " << real(record.softcap) << ", "
              << record.split << ", "
              << record.hidden_multiple << ", " << record.rank_multiple << ", " << record.block_c
              << ", " << quoted(record.key_bits) << ", " << quoted(record.value_bits) << ", "
              << record.transform << ", " << record.key_bytes << ", " << record.value_bytes << ", "
              << record.warps << ", " << record.shared_bytes << ", " << quoted(record.symbol)
              << ", " << quoted(record.parameters) << ", " << record.offset << ", " << record.size
              << "},\n";
    }
    return index.good() && images.good() ? 0 : 1;
}
