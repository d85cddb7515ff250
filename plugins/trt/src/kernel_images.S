/* The kernels' images, as the assembler's include path finds them: GCC and Clang, any ELF target. */
    .section .rodata.less_cache_images, "a"
    .balign 64
    .globl less_cache_images_begin
    .hidden less_cache_images_begin
    .type less_cache_images_begin, %object
less_cache_images_begin:
    .incbin "kernels.bin"
    .globl less_cache_images_end
    .hidden less_cache_images_end
    .type less_cache_images_end, %object
less_cache_images_end:
    .byte 0
    .size less_cache_images_begin, less_cache_images_end - less_cache_images_begin
    .size less_cache_images_end, 1
    .section .note.GNU-stack, "", %progbits
