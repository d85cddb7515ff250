// The comparison that judges the plugin on a GPU sees what is wrong, and only that.

#include <cmath>
#include <cstring>

#include "case_file.h"
#include "check.h"

namespace {

using less_cache::Dtype;
using less_cache::testing::CaseFile;

template <typename Number>
std::vector<unsigned char> bytes_of(const std::vector<Number>& numbers) {
    std::vector<unsigned char> bytes(numbers.size() * sizeof(Number));
    std::memcpy(bytes.data(), numbers.data(), bytes.size());
    return bytes;
}

/// One head of three slots and one number a slot, the first slot empty.
CaseFile small_case() {
    CaseFile one;
    one.layer.attributes.capacity = 3;
    one.layer.sizes = {1, 1, 1, 0, Dtype::kFloat32, Dtype::kFloat32};
    one.batch = 1;
    one.output_tolerance = 0.01;
    one.state_tolerance = 0.001;
    one.outputs = {{0.5}, {0, 10, 20}, {0, 30, 40}, {0, 1, 2}, {-1, 5, 6}};
    return one;
}

/// The same as the plugin may leave it: other slots, anything in the empty one.
std::vector<std::vector<unsigned char>> right_outputs() {
    return {bytes_of<float>({0.505F}), bytes_of<float>({20, 99, 10}), bytes_of<float>({40, 99, 30}),
            bytes_of<float>({2, NAN, 1}), bytes_of<std::int32_t>({6, -1, 5})};
}

TEST(slots_may_be_anywhere_and_empty_ones_hold_anything) {
    CHECK_EQUAL(difference(small_case(), right_outputs()), "");
}

TEST(wrong_numbers_are_seen) {
    const auto with = [](std::size_t output, const std::vector<unsigned char>& bytes) {
        auto outputs = right_outputs();
        outputs[output] = bytes;
        return difference(small_case(), outputs);
    };
    CHECK_CONTAINS(with(0, bytes_of<float>({0.52F})), "out[0] is 0.52, expected 0.5 within 0.01");
    CHECK_CONTAINS(with(0, bytes_of<float>({NAN})), "out[0] is nan");
    CHECK_CONTAINS(with(1, bytes_of<float>({20, 99, 10.5F})), "keys[1] is 10.5, expected 10");
    CHECK_CONTAINS(with(3, bytes_of<float>({2, 0, 1.01F})), "scores[1]");
    CHECK_CONTAINS(with(4, bytes_of<std::int32_t>({6, -1, 7})), "keys[1]");
    CHECK_CONTAINS(with(4, bytes_of<std::int32_t>({7, -1, 5})), "positions[2] is 7, expected 6");
}

TEST(integers_codes_and_scales_are_compared_exactly) {
    CaseFile one = small_case();
    one.state_tolerance = 0.5;
    // Positions alone would tell the scores, and there would be none.
    one.layer.attributes.gain = less_cache::Gain::kSum;
    one.layer.attributes.key_bits = one.layer.attributes.value_bits = "8";
    one.layer.attributes.transform = less_cache::Transform::kHadamard;
    one.layer.sizes.key_bytes = one.layer.sizes.value_bytes = 1;
    one.outputs = {{0.5}, {0, 100, -1}, {0, 3, 4}, {0, 1, 2}, {-1, 5, 6}, {0, 1, 2}, {0, 1, 2}};
    const auto with = [&one](std::size_t output, const std::vector<unsigned char>& bytes) {
        std::vector<std::vector<unsigned char>> outputs{
            bytes_of<float>({0.5F}), bytes_of<std::int8_t>({-1, 99, 100}),
            bytes_of<std::int8_t>({4, 9, 3}), bytes_of<float>({2.1F, NAN, 1}),
            bytes_of<std::int32_t>({6, -1, 5}),
            // 2, not a number, and 1, in 16 bits.
            bytes_of<std::uint16_t>({0x4000, 0x7E00, 0x3C00}),
            bytes_of<std::uint16_t>({0x4000, 0x7E00, 0x3C00})};
        outputs[output] = bytes;
        return difference(one, outputs);
    };
    CHECK_EQUAL(with(0, bytes_of<float>({0.5F})), "");
    CHECK_CONTAINS(with(1, bytes_of<std::int8_t>({-1, 99, 101})), "keys[1] is 101, expected 100");
    CHECK_CONTAINS(with(5, bytes_of<std::uint16_t>({0x4000, 0x7E00, 0x3C01})), "key_scales[1]");
}

TEST(sixteen_bit_numbers_are_read) {
    const auto half = less_cache::testing::numbers_of(
        bytes_of<std::uint16_t>({0x3C00, 0xC100, 0x0001, 0x7C00, 0x0000}), Dtype::kFloat16);
    CHECK((half == std::vector<double>{1.0, -2.5, std::ldexp(1.0, -24), HUGE_VAL, 0.0}));
    const auto brain = less_cache::testing::numbers_of(bytes_of<std::uint16_t>({0x3F80, 0xC020}),
                                                       Dtype::kBFloat16);
    CHECK((brain == std::vector<double>{1.0, -2.5}));
}

}  // namespace

int main(int count, char** arguments) { return less_cache::testing::run(count, arguments); }
