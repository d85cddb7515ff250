// What IPluginRegistry::loadLibrary looks for; the only symbols that this library exports.

#include "creator.h"
#include "host.h"

extern "C" {

[[gnu::visibility("default")]] void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
[[gnu::visibility("default")]] nvinfer1::IPluginCreatorInterface* const* getCreators(
    std::int32_t& count);

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { less_cache::set_logger_finder(finder); }

nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    static less_cache::Creator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}
}
