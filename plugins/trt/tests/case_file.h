#pragma once

#include <string>
#include <vector>

#include "layer.h"

namespace less_cache::testing {

/// A decode step and what the float64 reference makes of it, as tests/plugins/dump_cases.py writes.
struct CaseFile {
    std::string name;
    Layer layer;
    std::int32_t batch = 0;
    /// How far off the output, and scores, H and z, may be: absolutely below 1, relatively above.
    double output_tolerance = 0;
    double state_tolerance = 0;
    /// The inputs' bytes.
    std::vector<std::vector<unsigned char>> inputs;
    /// The outputs; each head's slots sorted by position, empty ones first.
    std::vector<std::vector<double>> outputs;
};

/// Reads a folder's index and all files.
///
/// @throws std::runtime_error for what is not as dump_cases.py writes it.
std::vector<CaseFile> read_cases(const std::string& folder);

/// Numbers of an array as they lie in memory.
std::vector<double> numbers_of(const std::vector<unsigned char>& bytes, Dtype dtype);

/// What differs from what is expected; "" where nothing does beyond the tolerances.
///
/// @param outputs Bytes of the node's outputs.
std::string difference(const CaseFile& expected,
                       const std::vector<std::vector<unsigned char>>& outputs);

}  // namespace less_cache::testing
