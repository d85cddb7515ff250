// Owners of CUDA and TensorRT objects: what is made here is freed when it goes out of scope, and
// every call that fails throws.
#pragma once

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

inline void check(cudaError_t status, char const* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

inline void require(bool good, std::string const& what) {
    if (!good) {
        throw std::runtime_error(what);
    }
}

class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, char const* message) noexcept override {
        if (severity <= Severity::kWARNING) {
            std::cerr << "[TensorRT] " << message << '\n';
        }
    }
};

class Stream {
public:
    Stream() { check(cudaStreamCreateWithFlags(&mStream, cudaStreamNonBlocking), "stream"); }
    ~Stream() { cudaStreamDestroy(mStream); }
    Stream(Stream const&) = delete;
    Stream& operator=(Stream const&) = delete;

    cudaStream_t get() const { return mStream; }
    void wait() const { check(cudaStreamSynchronize(mStream), "waiting for the GPU"); }

private:
    cudaStream_t mStream{};
};

class Buffer {
public:
    explicit Buffer(std::size_t bytes) : mBytes(bytes) {
        check(cudaMalloc(&mData, bytes), "GPU memory");
    }
    ~Buffer() { cudaFree(mData); }
    Buffer(Buffer&& other) noexcept
        : mData(std::exchange(other.mData, nullptr)), mBytes(other.mBytes) {}
    Buffer(Buffer const&) = delete;
    Buffer& operator=(Buffer const&) = delete;
    Buffer& operator=(Buffer&&) = delete;

    void* data() const { return mData; }
    std::size_t bytes() const { return mBytes; }

    void fill(int byte, Stream const& stream) const {
        check(cudaMemsetAsync(mData, byte, mBytes, stream.get()), "filling a buffer");
    }
    void upload(void const* from, std::size_t bytes, Stream const& stream) const {
        check(cudaMemcpyAsync(mData, from, bytes, cudaMemcpyHostToDevice, stream.get()), "upload");
    }
    void download(void* to, std::size_t bytes, Stream const& stream) const {
        check(cudaMemcpyAsync(to, mData, bytes, cudaMemcpyDeviceToHost, stream.get()), "download");
    }
    void copyFrom(Buffer const& from, Stream const& stream) const {
        check(cudaMemcpyAsync(mData, from.mData, mBytes, cudaMemcpyDeviceToDevice, stream.get()),
              "copy on the GPU");
    }

private:
    void* mData{};
    std::size_t mBytes;
};

// A recorded piece of a stream's work, which one launch repeats.
class Graph {
public:
    template <typename Work>
    Graph(Stream const& stream, Work const& work) {
        check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "capture");
        cudaGraph_t graph{};
        try {
            work();
        } catch (...) {
            cudaStreamEndCapture(stream.get(), &graph);
            cudaGraphDestroy(graph);
            throw;
        }
        check(cudaStreamEndCapture(stream.get(), &graph), "capture");
        cudaError_t const status = cudaGraphInstantiate(&mGraph, graph, 0);
        cudaGraphDestroy(graph);
        check(status, "instantiating a graph");
    }
    ~Graph() { cudaGraphExecDestroy(mGraph); }
    Graph(Graph const&) = delete;
    Graph& operator=(Graph const&) = delete;

    void launch(Stream const& stream) const {
        check(cudaGraphLaunch(mGraph, stream.get()), "launch");
    }

private:
    cudaGraphExec_t mGraph{};
};

inline std::vector<char> readFile(std::string const& path) {
    std::ifstream file(path, std::ios::binary);
    require(file.good(), path + ": cannot be read");
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}
