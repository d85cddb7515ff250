// Drives the plugin's runtime with the fake driver: what is loaded when, what a step copies and
// launches, what errors become, what is left at the end.

#include <cuda.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <set>
#include <thread>

#include "check.h"
#include "harness_layers.h"

namespace less_cache::testing {
namespace {

/// Allocations of this program and the libraries that it opened, while it counts.
thread_local bool counting = false;
thread_local int allocations = 0;

}  // namespace
}  // namespace less_cache::testing

// Inlined, they would look to GCC like a mismatch of malloc and delete.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
    if (less_cache::testing::counting) {
        ++less_cache::testing::allocations;
    }
    if (void* memory = std::malloc(bytes == 0 ? 1 : bytes)) {
        return memory;
    }
    throw std::bad_alloc();
}

[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t /*bytes*/) noexcept {
    std::free(memory);
}

namespace less_cache::testing {
namespace {

/// Buffers of a layer's tensors; outputs are the inputs' where they are aliased.
class Memory {
public:
    Memory(const Descriptions& tensors, const Plugin& plugin, bool aliased, std::size_t workspace) {
        for (const auto& tensor : tensors.in_fixed) {
            inputs_.push_back(make(bytes_of(tensor)));
        }
        for (std::size_t i = 0; i < tensors.out_fixed.size(); ++i) {
            const std::int32_t input = plugin.build->getAliasedInput(static_cast<std::int32_t>(i));
            outputs_.push_back(aliased && input >= 0 ? inputs_[static_cast<std::size_t>(input)]
                                                     : make(bytes_of(tensors.out_fixed[i])));
        }
        workspace_ = make(workspace);
    }

    [[nodiscard]] const void* const* inputs() const { return inputs_.data(); }
    [[nodiscard]] void* const* outputs() const { return outputs_.data(); }
    [[nodiscard]] void* workspace() const { return workspace_; }
    [[nodiscard]] std::uint64_t input(std::size_t index) const {
        return reinterpret_cast<std::uint64_t>(inputs_[index]);
    }
    [[nodiscard]] std::uint64_t output(std::size_t index) const {
        return reinterpret_cast<std::uint64_t>(outputs_[index]);
    }
    void shift_input(std::size_t index) { inputs_[index] = static_cast<char*>(inputs_[index]) + 4; }

private:
    void* make(std::size_t bytes) {
        constexpr std::size_t kAlignment = 256;
        owned_.push_back(std::make_unique<unsigned char[]>(bytes + 2 * kAlignment));
        const auto begin = reinterpret_cast<std::uintptr_t>(owned_.back().get());
        auto* aligned =
            reinterpret_cast<unsigned char*>((begin + kAlignment - 1) / kAlignment * kAlignment);
        for (std::size_t i = 0; i < bytes; ++i) {
            aligned[i] = static_cast<unsigned char>(i + owned_.size());
        }
        return aligned;
    }

    std::vector<std::unique_ptr<unsigned char[]>> owned_;
    std::vector<void*> inputs_;
    std::vector<void*> outputs_;
    void* workspace_ = nullptr;
};

/// An engine's plugin in an execution context.
struct Running {
    Running(const Layer& of, std::int64_t least, std::int64_t most) : layer(of) {
        const Plugin plugin = made(layer);
        const Descriptions tensors(layer, least, least, most);
        CHECK_EQUAL(plugin.build->configurePlugin(tensors.in.data(), tensors.inputs(),
                                                  tensors.out.data(), tensors.outputs()),
                    0);
        workspace = plugin.build->getWorkspaceSize(tensors.in.data(), tensors.inputs(),
                                                   tensors.out.data(), tensors.outputs());
        const Plugin engine(library().creator().createPlugin(
            "engine", plugin.runtime->getFieldsToSerialize(), nvinfer1::TensorRTPhase::kRUNTIME));
        attached = std::make_unique<Plugin>(engine.runtime->attachToContext(&context));
    }

    std::int32_t shapes(std::int64_t batch) const {
        const Descriptions tensors(layer, batch, batch, batch);
        return attached->runtime->onShapeChange(tensors.in_fixed.data(), tensors.inputs(),
                                                tensors.out_fixed.data(), tensors.outputs());
    }

    std::int32_t enqueue(std::int64_t batch, const Memory& memory) const {
        const Descriptions tensors(layer, batch, batch, batch);
        return attached->runtime->enqueue(tensors.in_fixed.data(), tensors.out_fixed.data(),
                                          memory.inputs(), memory.outputs(), memory.workspace(),
                                          kStream);
    }

    [[nodiscard]] Memory memory(std::int64_t batch, bool aliased) const {
        return {Descriptions(layer, batch, batch, batch), *attached, aliased, workspace};
    }

    static inline cudaStream_t const kStream = reinterpret_cast<cudaStream_t>(0x57);

    Layer layer;
    Recorder recorder;
    ResourceContext context{&recorder};
    std::unique_ptr<Plugin> attached;
    std::size_t workspace = 0;
};

std::vector<Call> calls_of(const std::string& function) {
    std::vector<Call> found;
    for (const Call& call : fake().calls()) {
        if (call.function == function) {
            found.push_back(call);
        }
    }
    return found;
}

std::size_t index_of(const Layer& layer, const std::string& name) {
    const auto names = input_names(layer.attributes);
    return static_cast<std::size_t>(std::find(names.begin(), names.end(), name) - names.begin());
}

void start() {
    fake().clear();
    fake().set_device(90, 132, 227 * 1024);
    fake().set_context(kContext);
    static_cast<void>(library().logger().take());
    CHECK_EQUAL(fake().modules(), 0);
}

TEST(attaching_loads_every_kernel_that_the_engine_may_launch) {
    start();
    {
        Layer layer = exp_layer();
        layer.attributes.capacity = 4096;
        const Running running(layer, 1, 300);
        // What chooses victims; maps for few and many sequences; kernel B shared and not; what
        // concludes.
        CHECK_EQUAL(fake().modules(), 6);
        const std::size_t before = calls_of("cuModuleLoadDataEx").size();
        for (const std::int64_t batch : {1, 16, 17, 300, 3}) {
            CHECK_EQUAL(running.shapes(batch), 0);
        }
        CHECK_EQUAL(calls_of("cuModuleLoadDataEx").size(), before);
        // Their code is loaded at once, and may take the shared memory that it wants.
        CHECK_EQUAL(calls_of("cuFuncLoad").size() + calls_of("cuFuncGetAttribute").size(), before);
        CHECK_EQUAL(calls_of("cuFuncSetAttribute").size(), 2U);
    }
    CHECK_EQUAL(fake().modules(), 0);
}

TEST(a_step_in_place_copies_nothing) {
    start();
    const Running running(exp_layer(), 1, 8);
    CHECK_EQUAL(running.shapes(3), 0);
    const Memory memory = running.memory(3, true);
    fake().clear();
    CHECK_EQUAL(running.enqueue(3, memory), 0);
    CHECK_EQUAL(calls_of("cuMemcpyDtoDAsync").size(), 0U);
    const auto calls = fake().calls();
    CHECK_EQUAL(calls.size(), 2U);
    for (const Call& call : calls) {
        CHECK_EQUAL(call.function, "cuLaunchKernel");
        CHECK(call.stream == Running::kStream);
        CHECK_EQUAL(call.arguments.at("_scratch0"), 0U);
        CHECK_EQUAL(call.arguments.at("_scratch1"), 0U);
    }
    CHECK_EQUAL(calls[0].symbol, "select_and_map");
    CHECK_EQUAL(calls[0].grid_x, 6U);
    CHECK_EQUAL(calls[0].grid_y, 1U);
    CHECK_EQUAL(calls[0].threads, 256U);
    CHECK_EQUAL(calls[0].arguments.at("batch"), 3U);
    CHECK_EQUAL(calls[0].arguments.at("recent"), 5U);
    CHECK_EQUAL(calls[0].arguments.at("HIDDEN"), 32U);
    CHECK_EQUAL(calls[0].arguments.at("lengths"), memory.input(4));
    CHECK_EQUAL(calls[0].arguments.at("psi_b"), memory.input(15));
    CHECK_EQUAL(calls[1].symbol, "attend");
    CHECK_EQUAL(calls[1].grid_x, 6U);
    CHECK_EQUAL(calls[1].threads, 128U);
    CHECK_EQUAL(calls[1].shared, 65536U);
    CHECK_EQUAL(calls[1].arguments.at("q"), memory.input(0));
    CHECK_EQUAL(calls[1].arguments.at("keys"), memory.input(5));
    CHECK_EQUAL(calls[1].arguments.at("out"), memory.output(0));
    CHECK_EQUAL(calls[1].arguments.at("history"), 0U);
    CHECK_EQUAL(calls[1].arguments.at("capacity"), 64U);
    CHECK_EQUAL(calls[1].arguments.at("SCALE"), 0x3E000000U);
    CHECK_EQUAL(calls[1].arguments.at("slots"), calls[0].arguments.at("slot_out"));
    const auto workspace = reinterpret_cast<std::uint64_t>(memory.workspace());
    for (const char* name : {"slots", "phi", "psi", "logits"}) {
        CHECK(calls[1].arguments.at(name) >= workspace);
        CHECK(calls[1].arguments.at(name) < workspace + running.workspace);
    }
}

TEST(a_step_over_codes_takes_bytes_scales_and_the_shift) {
    start();
    const Running running(coded_layer(), 1, 8);
    CHECK_EQUAL(running.shapes(3), 0);
    const Memory memory = running.memory(3, true);
    fake().clear();
    CHECK_EQUAL(running.enqueue(3, memory), 0);
    const auto calls = fake().calls();
    CHECK_EQUAL(calls.size(), 2U);
    const auto& select = calls[0].arguments;
    CHECK_EQUAL(select.at("keys"), memory.input(5));
    CHECK_EQUAL(select.at("key_scales"), memory.input(9));
    CHECK_EQUAL(select.at("psi_b1"), memory.input(18));
    CHECK_EQUAL(select.at("keys_row_stride"), 2U * 64U * 24U);
    const auto& attend = calls[1].arguments;
    CHECK_EQUAL(attend.at("value_scales"), memory.input(10));
    CHECK_EQUAL(attend.at("shift"), memory.input(19));
    CHECK_EQUAL(attend.at("keys_row_stride"), 2U * 64U * 24U);
    CHECK_EQUAL(attend.at("values_row_stride"), 2U * 64U * 32U);
    CHECK_EQUAL(attend.at("key_scales_row_stride"), 2U * 64U);
    // What is summed over codes, which another thread reads: 16 queries of 64 for each head.
    const auto workspace = reinterpret_cast<std::uint64_t>(memory.workspace());
    const std::uint64_t numerators = attend.at("part_numerator");
    CHECK(numerators >= workspace);
    CHECK(numerators + std::uint64_t{6} * 16 * 64 * 4 <= workspace + running.workspace);
}

TEST(a_step_between_buffers_copies_the_state_first) {
    start();
    for (const Layer& layer : {exp_layer(), history_layer(), plain_layer(), coded_layer()}) {
        const Running running(layer, 1, 8);
        CHECK_EQUAL(running.shapes(2), 0);
        const Memory memory = running.memory(2, false);
        fake().clear();
        CHECK_EQUAL(running.enqueue(2, memory), 0);
        const auto calls = fake().calls();
        const auto outputs = outputs_of(layer);
        const Descriptions tensors(layer, 2, 2, 2);
        for (std::size_t i = 1; i < outputs.size(); ++i) {
            const Call& copy = calls.at(i - 1);
            CHECK_EQUAL(copy.function, "cuMemcpyDtoDAsync");
            CHECK_EQUAL(copy.to, memory.output(i));
            CHECK_EQUAL(copy.from, memory.input(index_of(layer, outputs[i].name)));
            CHECK_EQUAL(copy.bytes, bytes_of(tensors.out_fixed[i]));
            CHECK(copy.stream == Running::kStream);
            CHECK(std::memcmp(memory.outputs()[i],
                              memory.inputs()[index_of(layer, outputs[i].name)], copy.bytes) == 0);
        }
        CHECK_EQUAL(calls.size(), outputs.size() - 1 + 2);
        for (std::size_t i = outputs.size() - 1; i < calls.size(); ++i) {
            CHECK_EQUAL(calls[i].function, "cuLaunchKernel");
            // Both kernels work on the copies: kernel A must see what B will change.
            CHECK_EQUAL(calls[i].arguments.at("positions"), memory.output(4));
        }
    }
}

TEST(a_step_allocates_nothing_and_asks_nothing) {
    start();
    Layer layer = exp_layer();
    layer.attributes.capacity = 4096;
    const Running running(layer, 1, 4);
    CHECK_EQUAL(running.shapes(1), 0);
    const Descriptions tensors(layer, 1, 1, 1);
    auto& attached = *running.attached->runtime;
    for (const bool aliased : {true, false}) {
        const Memory memory = running.memory(1, aliased);
        fake().clear();
        CHECK_EQUAL(running.enqueue(1, memory), 0);
        CHECK_EQUAL(calls_of("cuLaunchKernel").size(), 4U);
        for (const Call& call : fake().calls()) {
            CHECK(call.function == "cuLaunchKernel" || call.function == "cuMemcpyDtoDAsync");
        }
        fake().set_silent(true);
        allocations = 0;
        counting = true;
        const std::int32_t result =
            attached.enqueue(tensors.in_fixed.data(), tensors.out_fixed.data(), memory.inputs(),
                             memory.outputs(), memory.workspace(), nullptr);
        counting = false;
        fake().set_silent(false);
        CHECK_EQUAL(result, 0);
        CHECK_EQUAL(allocations, 0);
    }
    // The count does see what the library allocates.
    counting = true;
    const std::unique_ptr<nvinfer1::IPluginV3> clone(running.attached->plugin->clone());
    counting = false;
    CHECK(allocations > 0);
}

TEST(shapes_that_come_again_plan_nothing) {
    start();
    const Running running(exp_layer(), 1, 8);
    CHECK_EQUAL(running.shapes(2), 0);
    fake().clear();
    CHECK_EQUAL(running.shapes(2), 0);
    CHECK_EQUAL(calls_of("cuDeviceGetAttribute").size(), 0U);
    CHECK_EQUAL(running.shapes(5), 0);
    CHECK_EQUAL(calls_of("cuModuleLoadDataEx").size(), 0U);
    const Memory memory = running.memory(5, true);
    CHECK_EQUAL(running.enqueue(5, memory), 0);
    CHECK(running.enqueue(2, memory) != 0);
    CHECK_CONTAINS(library().logger().take(), "batch 2 was not announced by onShapeChange");
}

TEST(an_empty_batch_is_a_step_of_nothing) {
    start();
    const Running running(exp_layer(), 0, 8);
    CHECK_EQUAL(running.shapes(0), 0);
    const Memory memory = running.memory(0, false);
    fake().clear();
    CHECK_EQUAL(running.enqueue(0, memory), 0);
    CHECK_EQUAL(fake().calls().size(), 0U);
}

TEST(other_shapes_than_the_engines_are_refused) {
    start();
    Running running(exp_layer(), 1, 8);
    Layer other = exp_layer();
    other.sizes.query_heads = 8;
    running.layer = other;
    CHECK(running.shapes(2) != 0);
    CHECK_CONTAINS(library().logger().take(),
                   "but the engine was built for float16, head size 64, 4/2");
    CHECK(running.recorder.getErrorCode(0) == nvinfer1::ErrorCode::kINVALID_ARGUMENT);
}

TEST(plans_go_by_the_gpu_that_built_the_engine) {
    start();
    Layer layer = exp_layer();
    layer.attributes.capacity = 4096;
    const Running running(layer, 1, 64);
    CHECK_EQUAL(running.shapes(40), 0);
    const Memory memory = running.memory(40, true);
    fake().clear();
    CHECK_EQUAL(running.enqueue(40, memory), 0);
    const auto before = calls_of("cuLaunchKernel")[1].grid_y;
    CHECK_EQUAL(running.shapes(2), 0);
    fake().set_device(90, 1000, 227 * 1024);
    CHECK_EQUAL(running.shapes(40), 0);
    fake().clear();
    CHECK_EQUAL(running.enqueue(40, memory), 0);
    CHECK_EQUAL(calls_of("cuLaunchKernel")[1].grid_y, before);
    fake().set_device(90, 132, 227 * 1024);
}

TEST(errors_of_the_driver_reach_the_recorder) {
    start();
    Running running(exp_layer(), 1, 8);
    CHECK_EQUAL(running.shapes(2), 0);
    const Memory memory = running.memory(2, false);
    const std::size_t copies = outputs_of(exp_layer()).size() - 1;
    const auto failing = [&](const char* function, int nth, int error) {
        fake().clear();
        fake().fail(function, nth, error);
        Recorder& recorder = running.recorder;
        recorder.clear();
        CHECK(running.enqueue(2, memory) != 0);
        CHECK_EQUAL(recorder.getNbErrors(), 1);
        CHECK(recorder.getErrorCode(0) == nvinfer1::ErrorCode::kFAILED_EXECUTION);
        CHECK_CONTAINS(library().logger().take(), recorder.getErrorDesc(0));
        return std::string(recorder.getErrorDesc(0));
    };
    CHECK_CONTAINS(failing("cuLaunchKernel", 0, CUDA_ERROR_LAUNCH_FAILED),
                   "cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED (as the test wanted), select_and_map");
    CHECK_CONTAINS(failing("cuLaunchKernel", 1, CUDA_ERROR_LAUNCH_FAILED), ", attend");
    for (std::size_t i = 0; i < copies; ++i) {
        CHECK_CONTAINS(failing("cuMemcpyDtoDAsync", static_cast<int>(i), CUDA_ERROR_INVALID_VALUE),
                       "cuMemcpyDtoDAsync: CUDA_ERROR_INVALID_VALUE");
        CHECK_EQUAL(calls_of("cuLaunchKernel").size(), 0U);
    }
    CHECK_CONTAINS(failing("cuLaunchKernel", 0, CUDA_ERROR_UNKNOWN), "an unknown error");
    fake().clear();
    CHECK_EQUAL(running.enqueue(2, memory), 0);
}

TEST(errors_while_loading_leave_nothing_behind) {
    start();
    for (const char* function : {"cuModuleLoadDataEx", "cuModuleGetFunction", "cuFuncSetAttribute",
                                 "cuCtxGetCurrent", "cuCtxGetDevice", "cuDeviceGetAttribute"}) {
        for (const int nth : {0, 1}) {
            fake().clear();
            const Plugin plugin = made(exp_layer());
            const Descriptions tensors(exp_layer(), 1, 1, 8);
            CHECK_EQUAL(plugin.build->configurePlugin(tensors.in.data(), tensors.inputs(),
                                                      tensors.out.data(), tensors.outputs()),
                        0);
            Recorder recorder;
            ResourceContext context(&recorder);
            fake().fail(function, nth, CUDA_ERROR_OUT_OF_MEMORY);
            const std::unique_ptr<nvinfer1::IPluginV3> attached(
                plugin.runtime->attachToContext(&context));
            const bool once = nth == 1 && (std::string(function) == "cuFuncSetAttribute" ||
                                           std::string(function) == "cuCtxGetDevice");
            CHECK_EQUAL(attached == nullptr, !once);
            CHECK_EQUAL(recorder.getNbErrors(), once ? 0 : 1);
            if (!once) {
                CHECK_CONTAINS(std::string(recorder.getErrorDesc(0)),
                               std::string(function) + ": CUDA_ERROR_OUT_OF_MEMORY");
                CHECK_EQUAL(fake().modules(), 0);
                const std::string said = library().logger().take();
                if (std::string(function) == "cuModuleLoadDataEx") {
                    CHECK_CONTAINS(said, "the compiler's words");
                }
            }
        }
    }
    fake().clear();
    CHECK_EQUAL(fake().modules(), 0);
}

TEST(misplaced_buffers_are_refused) {
    start();
    const Running running(exp_layer(), 1, 8);
    CHECK_EQUAL(running.shapes(2), 0);
    Memory memory = running.memory(2, false);
    memory.shift_input(5);
    fake().clear();
    CHECK(running.enqueue(2, memory) != 0);
    CHECK_CONTAINS(library().logger().take(), "is not a multiple of 16");
    CHECK_EQUAL(fake().calls().size(), 0U);
}

TEST(layers_share_kernels_and_contexts_do_not) {
    start();
    {
        const Running one(exp_layer(), 1, 8);
        const int alone = fake().modules();
        {
            const Running two(exp_layer(), 1, 8);
            CHECK_EQUAL(fake().modules(), alone);
            fake().set_context(0xC1);
            const Running three(exp_layer(), 1, 8);
            CHECK_EQUAL(fake().modules(), 2 * alone);
            fake().set_context(kContext);
        }
        CHECK_EQUAL(fake().modules(), alone);
        // Modules are unloaded in the context that they were loaded in.
        std::multiset<std::uintptr_t> loaded;
        for (const Call& call : fake().calls()) {
            if (call.function == "cuModuleLoadDataEx") {
                loaded.insert(call.context);
            } else if (call.function == "cuModuleUnload") {
                const auto place = loaded.find(call.context);
                CHECK(place != loaded.end());
                loaded.erase(place);
            }
        }
        CHECK_EQUAL(static_cast<int>(loaded.size()), alone);
    }
    CHECK_EQUAL(fake().modules(), 0);
}

TEST(a_clone_of_a_running_plugin_owns_nothing) {
    start();
    std::unique_ptr<nvinfer1::IPluginV3> clone;
    {
        const Running running(exp_layer(), 1, 8);
        clone.reset(running.attached->plugin->clone());
    }
    CHECK_EQUAL(fake().modules(), 0);
}

TEST(contexts_run_at_the_same_time) {
    start();
    constexpr int kThreads = 4;
    constexpr int kRounds = 25;
    std::vector<std::thread> threads;
    threads.reserve(kThreads);
    std::vector<std::string> failures(kThreads);
    for (int i = 0; i < kThreads; ++i) {
        threads.emplace_back([i, &failures] {
            try {
                for (int round = 0; round < kRounds; ++round) {
                    const Running running(i % 2 == 0 ? exp_layer() : history_layer(), 1, 20);
                    const std::int64_t batch = 1 + (round + i) % 20;
                    CHECK_EQUAL(running.shapes(batch), 0);
                    const Memory memory = running.memory(batch, round % 2 == 0);
                    CHECK_EQUAL(running.enqueue(batch, memory), 0);
                }
            } catch (const std::exception& error) {
                failures[static_cast<std::size_t>(i)] = error.what();
            }
        });
    }
    for (auto& thread : threads) {
        thread.join();
    }
    for (const auto& failure : failures) {
        CHECK_EQUAL(failure, "");
    }
    CHECK_EQUAL(calls_of("cuLaunchKernel").size(), std::size_t{2} * kThreads * kRounds);
    CHECK_EQUAL(calls_of("cuModuleLoadDataEx").size(), calls_of("cuModuleUnload").size());
    CHECK_EQUAL(fake().modules(), 0);
}

}  // namespace
}  // namespace less_cache::testing

int main(int count, char** arguments) { return less_cache::testing::run(count, arguments); }
