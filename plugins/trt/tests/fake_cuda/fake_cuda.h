#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace less_cache::testing {

/// A call of a driver function that this library stands in for.
struct Call {
    std::string function;
    /// Of launches: the kernel's symbol; of copies: nothing.
    std::string symbol;
    std::uint32_t grid_x = 0, grid_y = 0, threads = 0, shared = 0;
    /// Of launches whose image tells its parameters: their bits by name, in "_scratch0" and
    /// "_scratch1" the two that follow.
    std::map<std::string, std::uint64_t> arguments;
    /// Of copies.
    std::uint64_t to = 0, from = 0;
    std::size_t bytes = 0;
    void* stream = nullptr;
    /// The context that was current.
    std::uintptr_t context = 0;
};

/// What the fake driver is and has seen. Reached through `fake_cuda_state`.
struct FakeCuda {
    FakeCuda() = default;
    FakeCuda(const FakeCuda&) = delete;
    FakeCuda& operator=(const FakeCuda&) = delete;
    FakeCuda(FakeCuda&&) = delete;
    FakeCuda& operator=(FakeCuda&&) = delete;
    virtual ~FakeCuda() = default;
    /// All calls since the last `clear`, from all threads.
    virtual std::vector<Call> calls() = 0;
    virtual void clear() = 0;
    /// The `nth` next call (from 0) of this function fails with `error`; copies and launches do
    /// nothing then.
    virtual void fail(const std::string& function, int nth, int error) = 0;
    /// Modules that are loaded now.
    virtual int modules() = 0;
    virtual void set_device(int arch, int multiprocessors, int shared) = 0;
    /// Launches and copies do nothing at all, and are not recorded.
    virtual void set_silent(bool silent) = 0;
    /// 0 for none.
    virtual void set_context(std::uintptr_t context) = 0;
};

}  // namespace less_cache::testing

/// The only thing that this library has and a driver has not.
extern "C" less_cache::testing::FakeCuda* fake_cuda_state();
