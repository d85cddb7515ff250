#pragma once

#include "fake_cuda/fake_cuda.h"
#include "tensorrt_host.h"

namespace less_cache::testing {

/// The context that is current to a thread of the fake driver at first.
constexpr std::uintptr_t kContext = 0xC0;

/// The library that LESS_CACHE_TEST_LIBRARY names.
Library& library();

/// The driver that the plugin finds.
///
/// @throws std::runtime_error if it is not the fake one.
FakeCuda& fake();

/// H2O with maps "exp", grouped queries, float16; 64 slots.
Layer exp_layer();
/// Scissorhands with maps "paper", float16.
Layer history_layer();
/// A sliding window at rank 0, float32.
Layer plain_layer();

/// The first over codes of 3 and 4 bits with means.
Layer coded_layer();

/// A plugin of the layer, in the build phase.
Plugin made(const Layer& layer);

}  // namespace less_cache::testing
