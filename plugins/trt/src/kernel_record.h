#pragma once

#include <cstddef>
#include <cstdint>

namespace less_cache {

/// One kernel image and what it was compiled for, as `less_cache.backends.triton.aot` writes it.
///
/// The order of the fields is that of the initialisers in kernels.inc.
struct KernelRecord {
    /// "select_and_map", "attend" or "conclude_split".
    const char* kernel;
    /// The model's, `Sizes::dtype`; "" serves any.
    const char* dtype;
    /// Of H and z; "" serves any, and layers that have neither.
    const char* state_dtype;
    /// Compute capability, 10 * major + minor; of PTX the least that may compile it.
    std::int32_t arch;
    /// PTX text with a final NUL, instead of a cubin.
    bool ptx;
    /// Numbers a head (D); 0 serves any.
    std::int32_t head_dim;
    /// D padded to a power of two.
    std::int32_t block_d;
    /// Bit 3 g + s: serves what starts as `Start` s and gains as `Gain` g.
    std::uint32_t scores;
    /// The `MapKind`; -1 serves any.
    std::int32_t kind;
    /// 1: for one query head a KV head alone; 0: for up to `block_g` of them.
    std::int32_t group;
    /// Query heads a KV head, padded; 0 where the kernel has no such block.
    std::int32_t block_g;
    /// 0: for rank 0 alone; -1: for any rank; else for ranks from 1 to it.
    std::int32_t block_r;
    /// Sequences that one program takes (select_and_map), else 0.
    std::int32_t block_b;
    /// Of select_and_map: 1: it chooses the victims; 0: it finds them chosen; else -1.
    std::int32_t selects;
    /// The soft cap compiled in, 0 for none; -1 serves any.
    float softcap;
    /// 1: programs share a head's slots (attend); 0: one program a head; -1: neither.
    std::int32_t split;
    /// The maps' hidden size must be a multiple of it.
    std::int32_t hidden_multiple;
    /// The rank must be a multiple of it.
    std::int32_t rank_multiple;
    /// Slots that one program reads at a time (attend).
    std::int32_t block_c;
    /// Of codes, as the node spells them; "0": pairs are stored as they are; "" serves any.
    const char* key_bits;
    const char* value_bits;
    /// The codes' `Transform`; -1 serves any.
    std::int32_t transform;
    /// Of one pair's codes; 0 where they are not read.
    std::int32_t key_bytes;
    std::int32_t value_bytes;
    /// Of 32 threads each.
    std::int32_t warps;
    /// Dynamic shared memory of a block.
    std::int32_t shared_bytes;
    /// The function's name in the image.
    const char* symbol;
    /// "name:type name:type ...", types ptr, i32, i64 and f32; two null pointers follow the last.
    const char* parameters;
    /// Of the image in kernels.bin, in bytes.
    std::uint64_t offset;
    /// Of the image in bytes.
    std::uint64_t size;
};

/// A view of records that somebody else owns.
struct KernelTable {
    const KernelRecord* records = nullptr;
    std::size_t count = 0;

    [[nodiscard]] const KernelRecord* begin() const { return records; }
    [[nodiscard]] const KernelRecord* end() const { return records + count; }
};

}  // namespace less_cache
