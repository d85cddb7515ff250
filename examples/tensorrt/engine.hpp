// An engine and the context that runs it, with tensors bound by name.
#pragma once

#include "raii.hpp"

#include <algorithm>
#include <cstdint>

inline std::size_t sizeOf(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT:
        case nvinfer1::DataType::kINT32:
            return 4;
        case nvinfer1::DataType::kHALF:
        case nvinfer1::DataType::kBF16:
            return 2;
        case nvinfer1::DataType::kINT64:
            return 8;
        default:
            throw std::runtime_error("the engine has a tensor of a type that is not expected");
    }
}

// One engine and the context that runs it.
class Engine {
public:
    Engine(nvinfer1::IRuntime& runtime, std::string const& path) : mPath(path) {
        std::vector<char> const plan = readFile(path);
        mEngine.reset(runtime.deserializeCudaEngine(plan.data(), plan.size()));
        require(mEngine != nullptr, path + ": not an engine of this TensorRT and this GPU");
        mContext.reset(mEngine->createExecutionContext());
        require(mContext != nullptr, path + ": no room to run it");
    }

    std::vector<std::string> names() const {
        std::vector<std::string> found;
        for (int32_t i = 0; i < mEngine->getNbIOTensors(); ++i) {
            found.emplace_back(mEngine->getIOTensorName(i));
        }
        return found;
    }

    nvinfer1::DataType type(std::string const& name) const {
        return mEngine->getTensorDataType(name.c_str());
    }

    // The tensor's bytes for one sequence of one token: axes that vary have size 1 then.
    std::size_t bytes(std::string const& name) const {
        nvinfer1::Dims const shape = mEngine->getTensorShape(name.c_str());
        std::size_t total = sizeOf(type(name));
        for (int32_t i = 0; i < shape.nbDims; ++i) {
            total *= static_cast<std::size_t>(std::max<int64_t>(shape.d[i], 1));
        }
        return total;
    }

    // Whether it gives one row of logits a call, not one for each token.
    bool givesLastLogits() const { return mEngine->getTensorShape("logits").d[1] == 1; }

    // Inputs need their shape: the batch is 1, and what else varies is the number of tokens.
    void bind(std::string const& name, Buffer const& buffer, int64_t tokens) {
        if (mEngine->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT) {
            nvinfer1::Dims shape = mEngine->getTensorShape(name.c_str());
            for (int32_t i = 0; i < shape.nbDims; ++i) {
                shape.d[i] = shape.d[i] >= 0 ? shape.d[i] : (i == 0 ? 1 : tokens);
            }
            require(mContext->setInputShape(name.c_str(), shape),
                    mPath + ": " + name + ": more tokens than the engine was built for");
        }
        require(mContext->setTensorAddress(name.c_str(), buffer.data()), mPath + ": " + name);
    }

    void run(Stream const& stream) {
        require(mContext->enqueueV3(stream.get()), mPath + ": TensorRT cannot run it");
    }

private:
    std::string mPath;
    std::unique_ptr<nvinfer1::ICudaEngine> mEngine;
    std::unique_ptr<nvinfer1::IExecutionContext> mContext;
};
