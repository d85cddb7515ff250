// Registers the creator when the library is loaded: for programs that only open libraries.

#include <cstdio>
#include <string>

#include "creator.h"
#include "host.h"
#include "version.h"

namespace less_cache {
namespace {

// Linked with -z nodelete: the registry keeps pointing here, whatever the program closes.
[[gnu::constructor]] void register_at_load() {
    std::string why;
    auto* registry = host_registry(&why);
    if (registry == nullptr) {
        static_cast<void>(std::fprintf(stderr, "%s: %s is not registered: %s\n", kSpeaker,
                                       "LessAttention", why.c_str()));
        return;
    }
    static Creator creator;
    // The creator names the namespace itself; a second load of a copy is refused, which is fine.
    if (!registry->registerCreator(creator, creator.getPluginNamespace())) {
        static_cast<void>(
            std::fprintf(stderr, "%s: %s is registered already\n", kSpeaker, "LessAttention"));
    }
}

}  // namespace
}  // namespace less_cache
