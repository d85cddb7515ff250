// A decode loop without Python: one sequence, greedy, from the folder of engines that
// `less-cache export tensorrt` wrote.
//
//     decode_loop ENGINES [--plugin LIBRARY] [--tokens N] [--eos ID] TOKEN...
//
// takes a prompt as token ids and prints the ids that follow it. The state stays on the GPU at
// fixed addresses: a step reads and writes it in place, and from the second one on it is one
// launch of a captured CUDA graph.

#include "engine.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <optional>

namespace {

using nvinfer1::DataType;
using Buffers = std::map<std::string, Buffer>;

struct Options {
    std::string folder;
    std::string plugin;
    int64_t newTokens{64};
    int64_t endOfText{-1};
    std::vector<int64_t> prompt;
};

bool startsWith(std::string const& text, char const* prefix) { return text.rfind(prefix, 0) == 0; }

std::string presentOf(std::string const& past) {
    return "present." + past.substr(std::strlen("past."));
}

// The state of a sequence that has seen nothing: zeros, and -1 for positions.
Buffers emptyState(Engine const& engine, Stream const& stream) {
    Buffers state;
    for (std::string const& name : engine.names()) {
        if (startsWith(name, "past.")) {
            Buffer const& buffer = state.emplace(name, Buffer(engine.bytes(name))).first->second;
            std::string const last = name.substr(name.rfind('.') + 1);
            buffer.fill(last == "positions" ? 0xFF : 0, stream);
        }
    }
    return state;
}

int64_t likeliest(Engine const& engine, Buffer const& logits, Stream const& stream) {
    DataType const type = engine.type("logits");
    std::size_t const width = sizeOf(type);
    std::vector<char> raw(engine.bytes("logits"));
    logits.download(raw.data(), raw.size(), stream);
    stream.wait();
    auto const value = [&](std::size_t i) {
        if (type == DataType::kHALF) {
            __half number;
            std::memcpy(&number, raw.data() + i * width, width);
            return __half2float(number);
        }
        if (type == DataType::kBF16) {
            __nv_bfloat16 number;
            std::memcpy(&number, raw.data() + i * width, width);
            return __bfloat162float(number);
        }
        float number;
        std::memcpy(&number, raw.data() + i * width, width);
        return number;
    };
    std::size_t best = 0;
    for (std::size_t i = 1; i < raw.size() / width; ++i) {
        best = value(i) > value(best) ? i : best;
    }
    return static_cast<int64_t>(best);
}

// A prompt reads all of the old state while it writes the new one, so that has a place of its own.
int64_t takePrompt(Engine& engine, Buffers& state, std::vector<int64_t> const& tokens,
                   Stream const& stream) {
    auto const count = static_cast<int64_t>(tokens.size());
    std::vector<int64_t> const mask(tokens.size(), 1);
    Buffer const ids(tokens.size() * sizeof(int64_t));
    Buffer const real(tokens.size() * sizeof(int64_t));
    Buffer const logits(engine.bytes("logits"));
    ids.upload(tokens.data(), ids.bytes(), stream);
    real.upload(mask.data(), real.bytes(), stream);
    engine.bind("input_ids", ids, count);
    engine.bind("attention_mask", real, count);
    engine.bind("logits", logits, count);
    Buffers present;
    for (auto const& [name, buffer] : state) {
        Buffer const& fresh = present.emplace(name, Buffer(buffer.bytes())).first->second;
        engine.bind(name, buffer, count);
        engine.bind(presentOf(name), fresh, count);
    }
    engine.run(stream);
    for (auto const& [name, buffer] : state) {
        buffer.copyFrom(present.at(name), stream);
    }
    return likeliest(engine, logits, stream);
}

// Steps: everything is bound once, and what varies is the contents of one buffer.
class Stepper {
public:
    Stepper(Engine& engine, Buffers& state, bool inPlace, Stream const& stream)
        : mEngine(engine),
          mState(state),
          mStream(stream),
          mIds(sizeof(int64_t)),
          mMask(sizeof(int64_t)),
          mLogits(engine.bytes("logits")) {
        int64_t const one = 1;
        mMask.upload(&one, sizeof(one), stream);
        engine.bind("input_ids", mIds, 1);
        engine.bind("attention_mask", mMask, 1);
        engine.bind("logits", mLogits, 1);
        for (auto const& [name, buffer] : state) {
            // Every layer reads the length, so its new value needs a place of its own; without the
            // plugin, which says that it works in place, so does all of the state.
            bool const shared = inPlace && name != "past.length";
            Buffer const& present =
                shared ? buffer : mApart.emplace(name, Buffer(buffer.bytes())).first->second;
            engine.bind(name, buffer, 1);
            engine.bind(presentOf(name), present, 1);
        }
        stream.wait();
    }

    int64_t take(int64_t token) {
        mIds.upload(&token, sizeof(token), mStream);
        // TensorRT sets up in the first step what may not happen while a graph is captured.
        if (mSteps == 1) {
            mGraph.emplace(mStream, [this] { work(); });
        }
        if (mGraph) {
            mGraph->launch(mStream);
        } else {
            work();
        }
        ++mSteps;
        return likeliest(mEngine, mLogits, mStream);
    }

private:
    void work() {
        mEngine.run(mStream);
        for (auto const& [name, buffer] : mApart) {
            mState.at(name).copyFrom(buffer, mStream);
        }
    }

    Engine& mEngine;
    Buffers& mState;
    Stream const& mStream;
    Buffer mIds;
    Buffer mMask;
    Buffer mLogits;
    Buffers mApart;
    int64_t mSteps{0};
    std::optional<Graph> mGraph;
};

Options parse(int argc, char** argv) {
    Options options;
    for (int i = 1; i < argc; ++i) {
        std::string const word = argv[i];
        bool const valued = word == "--plugin" || word == "--tokens" || word == "--eos";
        require(!valued || i + 1 < argc, word + ": a value is missing");
        if (word == "--plugin") {
            options.plugin = argv[++i];
        } else if (valued) {
            (word == "--tokens" ? options.newTokens : options.endOfText) = std::stoll(argv[++i]);
        } else if (options.folder.empty()) {
            options.folder = word;
        } else {
            options.prompt.push_back(std::stoll(word));
        }
    }
    require(!options.prompt.empty() && options.newTokens > 0,
            "usage: decode_loop ENGINES [--plugin LIBRARY] [--tokens N] [--eos ID] TOKEN...");
    return options;
}

void generate(Options const& options) {
    // First of all: without a GPU TensorRT gives a runtime that cannot even be destroyed.
    Stream const stream;
    Logger logger;
    if (!options.plugin.empty()) {
        require(getPluginRegistry()->loadLibrary(options.plugin.c_str()) != nullptr,
                options.plugin + ": TensorRT cannot load it");
    }
    std::unique_ptr<nvinfer1::IRuntime> const runtime{nvinfer1::createInferRuntime(logger)};
    require(runtime != nullptr, "TensorRT has no runtime");
    Engine step(*runtime, options.folder + "/step.engine");
    Buffers state = emptyState(step, stream);
    Stepper stepper(step, state, !options.plugin.empty(), stream);
    int64_t token = options.prompt.front();
    if (options.prompt.size() == 1) {
        token = stepper.take(token);
    } else {
        Engine prompt(*runtime, options.folder + "/prompt.engine");
        require(prompt.givesLastLogits(), "the model was exported with the logits of all tokens");
        token = takePrompt(prompt, state, options.prompt, stream);
    }
    for (int64_t left = options.newTokens; left > 0; --left) {
        std::cout << token << (left > 1 ? " " : "") << std::flush;
        if (token == options.endOfText || left == 1) {
            break;
        }
        token = stepper.take(token);
    }
    std::cout << '\n';
}

}  // namespace

int main(int argc, char** argv) {
    try {
        generate(parse(argc, argv));
    } catch (std::exception const& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
    return 0;
}
