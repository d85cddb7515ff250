#include "harness_layers.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

namespace less_cache::testing {

Library& library() {
    static Library instance = [] {
        const char* path = std::getenv("LESS_CACHE_TEST_LIBRARY");
        return Library(path == nullptr ? "LESS_CACHE_TEST_LIBRARY is not set" : path);
    }();
    return instance;
}

FakeCuda& fake() {
    static FakeCuda* found = [] {
        void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        void* symbol = driver == nullptr ? nullptr : dlsym(driver, "fake_cuda_state");
        if (symbol == nullptr) {
            throw std::runtime_error("libcuda.so.1 is not the fake driver: set LD_LIBRARY_PATH");
        }
        return reinterpret_cast<FakeCuda* (*)()>(symbol)();
    }();
    return *found;
}

Layer exp_layer() {
    Layer layer;
    layer.attributes.gain = Gain::kSum;
    layer.attributes.recent = 5;
    layer.attributes.capacity = 64;
    layer.attributes.rank = 8;
    layer.attributes.maps = MapKind::kExp;
    layer.attributes.scale = 0.125F;
    layer.sizes = {4, 2, 64, 32, Dtype::kFloat16, Dtype::kFloat32};
    return layer;
}

Layer history_layer() {
    Layer layer = exp_layer();
    layer.attributes.gain = Gain::kHistory;
    layer.attributes.window = 9;
    layer.attributes.maps = MapKind::kPaper;
    return layer;
}

Layer plain_layer() {
    Layer layer;
    layer.attributes.start = Start::kPosition;
    layer.attributes.sinks = 4;
    layer.attributes.capacity = 16;
    layer.attributes.scale = 0.25F;
    layer.sizes = {2, 2, 16, 0, Dtype::kFloat32, Dtype::kFloat32};
    return layer;
}

Layer coded_layer() {
    Layer layer = exp_layer();
    layer.attributes.key_bits = "3";
    layer.attributes.value_bits = "4";
    layer.attributes.transform = Transform::kCalibrated;
    layer.attributes.model_dtype = Dtype::kFloat16;
    layer.sizes.key_bytes = 24;
    layer.sizes.value_bytes = 32;
    return layer;
}

Plugin made(const Layer& layer) {
    const Node node(layer.attributes);
    const auto fields = node.fields();
    return Plugin(
        library().creator().createPlugin("test", &fields, nvinfer1::TensorRTPhase::kBUILD));
}

}  // namespace less_cache::testing
