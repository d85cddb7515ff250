// Runs the plugin on a GPU on cases that tests/plugins/dump_cases.py wrote: in place, between
// buffers, and in a captured CUDA graph.
//
//     gpu_cases LIBRARY CASES
//
// Exit status 77, which CTest calls skipped, without a GPU, cases, or kernels for any of them.

#include <fstream>
#include <iostream>
#include <string>

#include "case_file.h"
#include "gpu.h"
#include "tensorrt_host.h"

namespace {

using less_cache::testing::bytes_of;
using less_cache::testing::CaseFile;
using less_cache::testing::Descriptions;
using less_cache::testing::Gpu;
using less_cache::testing::Library;
using less_cache::testing::Plugin;

constexpr int kSkipped = 77;

enum class Way { kInPlace, kBetweenBuffers, kCaptured };

/// A plugin of an engine for batches up to the case's, in an execution context.
///
/// @returns nullptr where the library has no kernels for the case.
std::unique_ptr<Plugin> attached(Library& library, const CaseFile& one,
                                 nvinfer1::IPluginResourceContext& context,
                                 std::size_t& workspace) {
    const less_cache::testing::Node node(one.layer.attributes);
    const auto fields = node.fields();
    const Plugin plugin(
        library.creator().createPlugin(one.name.c_str(), &fields, nvinfer1::TensorRTPhase::kBUILD));
    const Descriptions tensors(one.layer, 1, one.batch, one.batch);
    if (plugin.build->configurePlugin(tensors.in.data(), tensors.inputs(), tensors.out.data(),
                                      tensors.outputs()) != 0) {
        return nullptr;
    }
    workspace = plugin.build->getWorkspaceSize(tensors.in.data(), tensors.inputs(),
                                               tensors.out.data(), tensors.outputs());
    return std::make_unique<Plugin>(plugin.runtime->attachToContext(&context));
}

/// What differs from the reference; "" where nothing does.
std::string run(Gpu& gpu, const CaseFile& one, const Plugin& plugin, std::size_t workspace_bytes,
                Way way) {
    const Descriptions tensors(one.layer, one.batch, one.batch, one.batch);
    std::vector<const void*> inputs;
    std::vector<void*> places;
    for (const auto& bytes : one.inputs) {
        places.push_back(gpu.allocate(bytes.size()));
        gpu.upload(places.back(), bytes);
        inputs.push_back(places.back());
    }
    std::vector<void*> outputs;
    for (std::size_t i = 0; i < tensors.out_fixed.size(); ++i) {
        const std::int32_t input = plugin.build->getAliasedInput(static_cast<std::int32_t>(i));
        const bool own = input < 0 || way == Way::kBetweenBuffers;
        outputs.push_back(own ? gpu.allocate(bytes_of(tensors.out_fixed[i]))
                              : places[static_cast<std::size_t>(input)]);
    }
    void* workspace = gpu.allocate(workspace_bytes);
    if (plugin.runtime->onShapeChange(tensors.in_fixed.data(), tensors.inputs(),
                                      tensors.out_fixed.data(), tensors.outputs()) != 0) {
        return "onShapeChange failed";
    }
    std::int32_t result = 0;
    const auto step = [&] {
        result = plugin.runtime->enqueue(tensors.in_fixed.data(), tensors.out_fixed.data(),
                                         inputs.data(), outputs.data(), workspace,
                                         reinterpret_cast<cudaStream_t>(gpu.stream()));
    };
    if (way == Way::kCaptured) {
        gpu.run_captured(step);
    } else {
        step();
        gpu.wait();
    }
    if (result != 0) {
        return "enqueue failed";
    }
    std::vector<std::vector<unsigned char>> found;
    found.reserve(outputs.size());
    for (std::size_t i = 0; i < outputs.size(); ++i) {
        found.push_back(gpu.download(outputs[i], bytes_of(tensors.out_fixed[i])));
    }
    for (std::size_t i = 0; way == Way::kBetweenBuffers && i < inputs.size(); ++i) {
        if (gpu.download(inputs[i], one.inputs[i].size()) != one.inputs[i]) {
            return "input " + std::to_string(i) + " was written to";
        }
    }
    return difference(one, found);
}

int run_all(Gpu& gpu, Library& library, const std::vector<CaseFile>& cases) {
    less_cache::testing::Recorder recorder;
    less_cache::testing::ResourceContext context(&recorder);
    int ran = 0;
    int failed = 0;
    for (const CaseFile& one : cases) {
        std::size_t workspace = 0;
        const auto plugin = attached(library, one, context, workspace);
        const std::string said = library.logger().take();
        if (plugin == nullptr) {
            std::cout << "no kernels  " << one.name << "\n" << said;
            continue;
        }
        for (const Way way : {Way::kInPlace, Way::kBetweenBuffers, Way::kCaptured}) {
            const std::string wrong = run(gpu, one, *plugin, workspace, way);
            gpu.release();
            ++ran;
            failed += wrong.empty() ? 0 : 1;
            constexpr const char* kWays[] = {"in place", "between buffers", "captured"};
            std::cout << (wrong.empty() ? "passed  " : "FAILED  ") << one.name << ", "
                      << kWays[static_cast<int>(way)] << " " << wrong << library.logger().take()
                      << "\n";
        }
    }
    std::cout << ran << " runs, " << failed << " failed\n";
    return ran == 0 ? kSkipped : failed == 0 ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) {
        std::cerr << "usage: gpu_cases LIBRARY CASES\n";
        return 2;
    }
    const std::string folder = arguments[2];
    if (!std::ifstream(folder + "/index.tsv")) {
        std::cout << "skipped: no cases in " << folder
                  << "; python -m tests.plugins.dump_cases --out writes them\n";
        return kSkipped;
    }
    const auto gpu = Gpu::open();
    if (gpu == nullptr) {
        std::cout << "skipped: needs a CUDA GPU\n";
        return kSkipped;
    }
    try {
        Library library(arguments[1]);
        return run_all(*gpu, library, less_cache::testing::read_cases(folder));
    } catch (const std::exception& error) {
        std::cout << "FAILED  " << error.what() << "\n";
        return 1;
    }
}
