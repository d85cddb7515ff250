#include "embedded_kernels.h"

#include <iterator>

#include "errors.h"

extern "C" {
// From kernel_images.S.
extern const unsigned char less_cache_images_begin[];
extern const unsigned char less_cache_images_end[];
}

namespace less_cache {
namespace {

// The closing record keeps the array legal where no kernel was compiled.
constexpr KernelRecord kRecords[] = {
#include "kernels.inc"
    {}};

}  // namespace

KernelTable embedded_kernels() { return {kRecords, std::size(kRecords) - 1}; }

const void* embedded_image(const KernelRecord& record) {
    const auto bytes = reinterpret_cast<std::uintptr_t>(less_cache_images_end) -
                       reinterpret_cast<std::uintptr_t>(less_cache_images_begin);
    if (record.offset > bytes || record.size > bytes - record.offset || record.size == 0) {
        throw Refusal(ErrorKind::kInternal, "kernel images: ", record.symbol, " lies at ",
                      record.offset, " with ", record.size, " bytes, but ", bytes,
                      " bytes are embedded; rebuild the library from one aot folder");
    }
    return less_cache_images_begin + record.offset;
}

}  // namespace less_cache
