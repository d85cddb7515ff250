#pragma once

#include "kernel_record.h"

namespace less_cache {

/// The records of the images in this library.
KernelTable embedded_kernels();

/// The bytes of one embedded image.
///
/// @throws Refusal if the record reaches beyond what is embedded.
const void* embedded_image(const KernelRecord& record);

}  // namespace less_cache
