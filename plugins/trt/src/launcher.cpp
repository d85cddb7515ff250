#include "launcher.h"

#include <utility>

#include "errors.h"

namespace less_cache {
namespace {

/// What the kernels were compiled to expect of every array.
constexpr std::uintptr_t kAlignment = 16;

/// Triton's kernels take two pointers to scratch memory, which ours do not use.
constexpr std::size_t kScratchPointers = 2;

std::uintptr_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

std::size_t bytes_of(const Tensor& tensor, std::int32_t batch) {
    std::int64_t bytes = size_of(tensor.dtype);
    for (const std::int64_t size : tensor.dims) {
        bytes *= size < 0 ? batch : size;
    }
    return static_cast<std::size_t>(bytes);
}

std::uint64_t value_of(const Argument& argument, const Buffers& buffers) {
    switch (argument.source) {
        case Source::kInput:
            return address(buffers.inputs[argument.index]);
        case Source::kOutput:
            return address(buffers.outputs[argument.index]);
        case Source::kWorkspace:
            return address(buffers.workspace) + argument.bits;
        case Source::kNumber:
            return argument.bits;
        case Source::kNull:
            break;
    }
    return 0;
}

}  // namespace

// A number's low bytes are where the driver reads the narrower ones.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "CUDA's hosts are little-endian");

Launcher::Launcher(const Driver& driver, const Layer& layer, std::int32_t batch, Plan plan)
    : driver_(driver), context_(current_context(driver)), batch_(batch), plan_(std::move(plan)) {
    prepared_.reserve(plan_.launches.size());
    for (const Launch& launch : plan_.launches) {
        Prepared prepared;
        prepared.kernel = shared_kernel(driver, *launch.record);
        prepared.values.assign(launch.arguments.size() + kScratchPointers, 0);
        for (std::uint64_t& value : prepared.values) {
            prepared.pointers.push_back(&value);
        }
        prepared_.push_back(std::move(prepared));
    }
    for (const Tensor& tensor : outputs_of(layer)) {
        output_bytes_.push_back(bytes_of(tensor, batch));
    }
    inputs_ = input_names(layer.attributes).size();
}

void Launcher::run(const Buffers& buffers, CUstream stream) {
    if (batch_ == 0) {
        return;
    }
    check_alignment(buffers);
    copy_state(buffers, stream);
    for (std::size_t i = 0; i < prepared_.size(); ++i) {
        const Launch& launch = plan_.launches[i];
        Prepared& prepared = prepared_[i];
        for (std::size_t j = 0; j < launch.arguments.size(); ++j) {
            prepared.values[j] = value_of(launch.arguments[j], buffers);
        }
        const auto threads = static_cast<unsigned>(launch.record->warps) * 32U;
        const CUresult result =
            driver_.launch_kernel(prepared.kernel->function(), launch.grid_x, launch.grid_y, 1,
                                  threads, 1, 1, static_cast<unsigned>(launch.record->shared_bytes),
                                  stream, prepared.pointers.data(), nullptr);
        check(driver_, result, "cuLaunchKernel", launch.record->symbol);
    }
}

void Launcher::check_alignment(const Buffers& buffers) const {
    const auto check_one = [](const void* pointer, const char* what, std::size_t index) {
        if (pointer == nullptr || address(pointer) % kAlignment != 0) {
            throw Refusal(ErrorKind::kInvalidArgument, what, " ", index, ": its address ", pointer,
                          " is not a multiple of ", kAlignment);
        }
    };
    for (std::size_t i = 0; i < inputs_; ++i) {
        check_one(buffers.inputs[i], "input", i);
    }
    for (std::size_t i = 0; i < output_bytes_.size(); ++i) {
        check_one(buffers.outputs[i], "output", i);
    }
    check_one(buffers.workspace, "workspace", 0);
}

void Launcher::copy_state(const Buffers& buffers, CUstream stream) const {
    for (std::size_t i = 1; i < output_bytes_.size(); ++i) {
        const void* from = buffers.inputs[aliased_input(static_cast<std::int32_t>(i))];
        void* to = buffers.outputs[i];
        if (from != to) {
            check(driver_,
                  driver_.memcpy_async(address(to), address(from), output_bytes_[i], stream),
                  "cuMemcpyDtoDAsync", "copying the state to its output");
        }
    }
}

}  // namespace less_cache
