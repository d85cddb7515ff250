#include "case_file.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "tab_line.h"

namespace less_cache::testing {
namespace {

std::size_t count_of(const Tensor& tensor, std::int32_t batch) {
    std::size_t count = 1;
    for (const std::int64_t size : tensor.dims) {
        count *= static_cast<std::size_t>(size < 0 ? batch : size);
    }
    return count;
}

std::vector<unsigned char> read_bytes(std::istream& file, std::size_t bytes) {
    std::vector<unsigned char> content(bytes);
    file.read(reinterpret_cast<char*>(content.data()), static_cast<std::streamsize>(bytes));
    if (!file) {
        throw std::runtime_error("a case's file ends too early");
    }
    return content;
}

template <typename Number>
std::vector<double> widened(const std::vector<unsigned char>& bytes) {
    std::vector<double> numbers(bytes.size() / sizeof(Number));
    for (std::size_t i = 0; i < numbers.size(); ++i) {
        Number number{};
        std::memcpy(&number, &bytes[i * sizeof number], sizeof number);
        numbers[i] = static_cast<double>(number);
    }
    return numbers;
}

double from_half(std::uint16_t bits) {
    const std::uint32_t wide = bits;
    const auto exponent = static_cast<int>((wide >> 10U) & 31U);
    const double fraction = wide & 1023U;
    const double sign = (wide & 0x8000U) != 0 ? -1.0 : 1.0;
    if (exponent == 31) {
        return sign * (fraction == 0.0 ? HUGE_VAL : std::nan(""));
    }
    return exponent == 0 ? sign * std::ldexp(fraction, -24)
                         : sign * std::ldexp(fraction + 1024.0, exponent - 25);
}

std::vector<double> from_sixteen_bits(const std::vector<unsigned char>& bytes, Dtype dtype) {
    std::vector<double> numbers(bytes.size() / 2);
    for (std::size_t i = 0; i < numbers.size(); ++i) {
        std::uint16_t bits = 0;
        std::memcpy(&bits, &bytes[i * 2], sizeof bits);
        if (dtype == Dtype::kFloat16) {
            numbers[i] = from_half(bits);
        } else {
            const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16U;
            float number = 0;
            std::memcpy(&number, &wide, sizeof number);
            numbers[i] = static_cast<double>(number);
        }
    }
    return numbers;
}

bool is_real(Dtype dtype) {
    return dtype == Dtype::kFloat32 || dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16;
}

CaseFile read_case(const std::string& line, const std::string& folder) {
    TabLine fields(line);
    CaseFile found;
    found.name = fields.text();
    found.layer = read_layer(fields);
    found.batch = fields.integer();
    found.output_tolerance = static_cast<double>(fields.real());
    found.state_tolerance = static_cast<double>(fields.real());
    std::ifstream file(folder + "/" + fields.text(), std::ios::binary);
    for (const Tensor& tensor : inputs_of(found.layer)) {
        const std::size_t count = count_of(tensor, found.batch);
        found.inputs.push_back(
            read_bytes(file, count * static_cast<std::size_t>(size_of(tensor.dtype))));
    }
    for (const Tensor& tensor : outputs_of(found.layer)) {
        const std::size_t count = count_of(tensor, found.batch);
        const bool real = is_real(tensor.dtype);
        const std::size_t size = real ? 8 : static_cast<std::size_t>(size_of(tensor.dtype));
        const auto bytes = read_bytes(file, count * size);
        found.outputs.push_back(real ? widened<double>(bytes) : numbers_of(bytes, tensor.dtype));
    }
    return found;
}

/// For each head, its slots by position.
std::vector<std::size_t> slot_order(const std::vector<double>& positions, std::size_t slots) {
    std::vector<std::size_t> order(positions.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    for (std::size_t head = 0; head < positions.size(); head += slots) {
        const auto begin = order.begin() + static_cast<std::ptrdiff_t>(head);
        std::stable_sort(begin, begin + static_cast<std::ptrdiff_t>(slots),
                         [&positions](std::size_t left, std::size_t right) {
                             return positions[left] < positions[right];
                         });
    }
    return order;
}

bool close(double left, double right, double tolerance) {
    return std::abs(left - right) <= tolerance * std::max(1.0, std::abs(right));
}

/// Whether rounding has no part in it: it is copied, or counted, or an integer.
bool is_exact(const Tensor& tensor) {
    return !is_real(tensor.dtype) || tensor.name == "key_scales" || tensor.name == "value_scales";
}

bool is_slotted(const std::string& name) { return name != "out" && name != "H" && name != "z"; }

}  // namespace

std::vector<CaseFile> read_cases(const std::string& folder) {
    std::ifstream index(folder + "/index.tsv");
    if (!index) {
        throw std::runtime_error(folder + "/index.tsv cannot be read");
    }
    std::vector<CaseFile> cases;
    for (std::string line; std::getline(index, line);) {
        cases.push_back(read_case(line, folder));
    }
    return cases;
}

std::vector<double> numbers_of(const std::vector<unsigned char>& bytes, Dtype dtype) {
    switch (dtype) {
        case Dtype::kFloat32:
            return widened<float>(bytes);
        case Dtype::kInt32:
            return widened<std::int32_t>(bytes);
        case Dtype::kInt64:
            return widened<std::int64_t>(bytes);
        case Dtype::kInt8:
            return widened<std::int8_t>(bytes);
        default:
            return from_sixteen_bits(bytes, dtype);
    }
}

std::string difference(const CaseFile& expected,
                       const std::vector<std::vector<unsigned char>>& outputs) {
    const auto tensors = outputs_of(expected.layer);
    const auto slots = static_cast<std::size_t>(expected.layer.attributes.capacity);
    constexpr std::size_t kPositions = 4;
    const auto positions = numbers_of(outputs[kPositions], Dtype::kInt32);
    const auto order = slot_order(positions, slots);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        const auto given = numbers_of(outputs[i], tensors[i].dtype);
        const auto& wanted = expected.outputs[i];
        const bool slotted = is_slotted(tensors[i].name);
        const std::size_t width = slotted ? wanted.size() / order.size() : 1;
        const double tolerance = i == 0                 ? expected.output_tolerance
                                 : is_exact(tensors[i]) ? 0.0
                                                        : expected.state_tolerance;
        for (std::size_t j = 0; j < wanted.size(); ++j) {
            const std::size_t slot = slotted ? order[j / width] : 0;
            if (slotted && positions[slot] < 0 && i != kPositions) {
                continue;
            }
            const double number = given[slotted ? slot * width + j % width : j];
            if (!close(number, wanted[j], tolerance)) {
                std::ostringstream line;
                line << tensors[i].name << "[" << j << "] is " << number << ", expected "
                     << wanted[j] << " within " << tolerance;
                return line.str();
            }
        }
    }
    return "";
}

}  // namespace less_cache::testing
