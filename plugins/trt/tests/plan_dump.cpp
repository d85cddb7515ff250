// Plans steps of layers that come on stdin, for tests that compare with the Python launch code.
//
// Lines of fields with tabs between them. "record" and `KernelRecord`'s fields in order adds to the
// table; "layer" and what `read_layer` reads, the batch, the architecture, the multiprocessors and
// the shared memory plans a step with the table so far, and prints one line a launch (kernel,
// symbol, grid x and y, warps, arguments), then "end" and the workspace's bytes, or "refused" and
// the message.

#include <iostream>
#include <string>
#include <vector>

#include "errors.h"
#include "step_plan.h"
#include "synthetic_kernels.h"
#include "tab_line.h"

namespace {

using less_cache::testing::TabLine;

void read_record(TabLine& line, less_cache::testing::SyntheticKernels& kernels) {
    const std::string kernel = line.text();
    const std::string dtype = line.text();
    const std::string state_dtype = line.text();
    less_cache::KernelRecord record{};
    record.kernel = kernel.c_str();
    record.dtype = dtype.c_str();
    record.state_dtype = state_dtype.c_str();
    record.arch = line.integer();
    record.ptx = line.integer() != 0;
    record.head_dim = line.integer();
    record.block_d = line.integer();
    record.scores = static_cast<std::uint32_t>(line.integer());
    for (std::int32_t* field :
         {&record.kind, &record.group, &record.block_g, &record.block_r, &record.block_b,
          &record.selects}) {
        *field = line.integer();
    }
    record.softcap = line.real();
    for (std::int32_t* field :
         {&record.split, &record.hidden_multiple, &record.rank_multiple, &record.block_c}) {
        *field = line.integer();
    }
    const std::string key_bits = line.text();
    const std::string value_bits = line.text();
    record.key_bits = key_bits.c_str();
    record.value_bits = value_bits.c_str();
    for (std::int32_t* field : {&record.transform, &record.key_bytes, &record.value_bytes,
                                &record.warps, &record.shared_bytes}) {
        *field = line.integer();
    }
    const std::string symbol = line.text();
    const std::string parameters = line.text();
    record.symbol = symbol.c_str();
    record.parameters = parameters.c_str();
    kernels.add(record);
}

void print(const less_cache::Plan& plan) {
    for (const auto& launch : plan.launches) {
        std::cout << launch.record->kernel << '\t' << launch.record->symbol << '\t' << launch.grid_x
                  << '\t' << launch.grid_y << '\t' << launch.record->warps << '\t';
        for (const auto& argument : launch.arguments) {
            constexpr const char* kSources[] = {"input", "output", "workspace", "null", "number"};
            std::cout << argument.name << "=" << kSources[static_cast<int>(argument.source)] << ":"
                      << argument.index << ":" << argument.bits << " ";
        }
        std::cout << "\n";
    }
    std::cout << "end\t" << plan.workspace_bytes << "\n";
}

}  // namespace

int main() {
    less_cache::testing::SyntheticKernels kernels;
    for (std::string text; std::getline(std::cin, text);) {
        TabLine line(text);
        try {
            const std::string what = line.text();
            if (what == "record") {
                read_record(line, kernels);
                continue;
            }
            const auto layer = less_cache::testing::read_layer(line);
            const std::int32_t batch = line.integer();
            const less_cache::Device device{line.integer(), line.integer(), line.integer()};
            check(layer);
            print(plan_step(kernels.table(), layer, device, batch));
        } catch (const less_cache::Refusal& refusal) {
            std::cout << "refused\t" << refusal.what() << "\n";
        } catch (const std::exception& error) {
            std::cerr << "plan_dump: " << error.what() << " in \"" << text << "\"\n";
            return 2;
        }
    }
    return 0;
}
