#pragma once

#include <deque>
#include <string>
#include <vector>

#include "kernel_record.h"

namespace less_cache::testing {

/// The codes that kernels read; none as it is.
struct SyntheticCodes {
    const char* key_bits = "0";
    const char* value_bits = "0";
    /// Of `Transform`.
    std::int32_t transform = -1;
    std::int32_t key_bytes = 0;
    std::int32_t value_bytes = 0;

    [[nodiscard]] bool none() const { return transform == -1; }
    /// Calibrated: layers with a low-rank state have a shift.
    [[nodiscard]] bool means() const { return transform == 1; }
};

/// Records of kernels that were never compiled, and the strings that they point to.
class SyntheticKernels {
public:
    /// The usual kernels of one dtype, head size and kind of maps, for one architecture.
    ///
    /// @param kind 0: rank 0.
    void add_layout(const std::string& dtype, std::int32_t head_dim, std::int32_t kind,
                    std::int32_t arch, bool ptx = false, const SyntheticCodes& codes = {});
    /// A copy of a record, with its strings.
    void add(const KernelRecord& record);

    [[nodiscard]] KernelTable table() const { return {records_.data(), records_.size()}; }
    [[nodiscard]] std::vector<KernelRecord>& records() { return records_; }

private:
    const char* keep(const std::string& text);

    std::vector<KernelRecord> records_;
    std::deque<std::string> strings_;
};

/// What the tests' own library embeds: float16 with maps "exp" and "paper", the first of them over
/// codes, too, and float32 without, for sm_80 and sm_90, and PTX.
SyntheticKernels embedded_for_tests();

/// The image of a record that the tests' driver can read: its symbol and parameters.
std::string synthetic_image(const KernelRecord& record);

}  // namespace less_cache::testing
