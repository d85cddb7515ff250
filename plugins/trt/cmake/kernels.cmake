# The compiled kernels: from LESS_CACHE_KERNELS, or made by the build.

set(repository ${CMAKE_CURRENT_SOURCE_DIR}/../..)
if(LESS_CACHE_KERNELS)
  get_filename_component(LESS_CACHE_KERNEL_FOLDER ${LESS_CACHE_KERNELS} ABSOLUTE
                         BASE_DIR ${CMAKE_BINARY_DIR})
  foreach(name kernels.bin kernels.inc)
    if(NOT EXISTS ${LESS_CACHE_KERNEL_FOLDER}/${name})
      message(FATAL_ERROR "LESS_CACHE_KERNELS: ${LESS_CACHE_KERNEL_FOLDER} has no ${name}; "
                          "make it by: python -m less_cache.backends.triton.aot --out FOLDER")
    endif()
  endforeach()
  add_custom_target(less_cache_compile_kernels)
else()
  set(LESS_CACHE_KERNEL_FOLDER ${CMAKE_BINARY_DIR}/kernels)
  find_program(LESS_CACHE_PYTHON NAMES python3 python
               HINTS ${repository}/.venv/bin NO_CMAKE_SYSTEM_PATH
               DOC "a Python that has less_cache[triton]")
  find_program(LESS_CACHE_PYTHON NAMES python3)
  separate_arguments(arguments UNIX_COMMAND "${LESS_CACHE_AOT_ARGUMENTS}")
  file(GLOB_RECURSE triton_sources CONFIGURE_DEPENDS
       ${repository}/less_cache/backends/triton/*.py)
  add_custom_command(
    OUTPUT ${LESS_CACHE_KERNEL_FOLDER}/kernels.bin ${LESS_CACHE_KERNEL_FOLDER}/kernels.inc
    COMMAND ${LESS_CACHE_PYTHON} -m less_cache.backends.triton.aot
            --out ${LESS_CACHE_KERNEL_FOLDER} ${arguments}
    WORKING_DIRECTORY ${repository}
    DEPENDS ${triton_sources}
    COMMENT "Compiling the Triton kernels (no GPU is needed; the first time takes long)"
    USES_TERMINAL VERBATIM)
  add_custom_target(less_cache_compile_kernels
    DEPENDS ${LESS_CACHE_KERNEL_FOLDER}/kernels.bin ${LESS_CACHE_KERNEL_FOLDER}/kernels.inc)
endif()

add_library(less_cache_kernels INTERFACE)
target_include_directories(less_cache_kernels INTERFACE ${LESS_CACHE_KERNEL_FOLDER})
