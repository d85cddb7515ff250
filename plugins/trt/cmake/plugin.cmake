# The two libraries: they differ in how TensorRT gets to know the creator.

file(STRINGS ${TENSORRT_INCLUDE_DIR}/NvInferVersion.h version_lines
     REGEX "define (TRT_(MAJOR|MINOR)_ENTERPRISE|NV_TENSORRT_(MAJOR|MINOR)) [0-9]+")
string(REGEX MATCH "MAJOR[A-Z_]* ([0-9]+)" _ "${version_lines}")
set(tensorrt_major ${CMAKE_MATCH_1})
string(REGEX MATCH "MINOR[A-Z_]* ([0-9]+)" _ "${version_lines}")
set(tensorrt_minor ${CMAKE_MATCH_1})
message(STATUS "TensorRT ${tensorrt_major}.${tensorrt_minor}: ${TENSORRT_INCLUDE_DIR}")
if("${tensorrt_major}.${tensorrt_minor}" VERSION_LESS 10.15)
  message(FATAL_ERROR "TENSORRT_ROOT: TensorRT ${tensorrt_major}.${tensorrt_minor}, "
                      "but the plugin needs 10.15 or later")
endif()

add_library(less_cache_plugin OBJECT
  src/creator.cpp src/field_reader.cpp src/fields.cpp src/host.cpp src/less_attention.cpp src/report.cpp
  src/tensors.cpp)
target_link_libraries(less_cache_plugin PRIVATE less_cache_options)
target_include_directories(less_cache_plugin PUBLIC src)
target_include_directories(less_cache_plugin SYSTEM PUBLIC
  ${CUDA_INCLUDE_DIR} ${TENSORRT_INCLUDE_DIR})
target_compile_definitions(less_cache_plugin PUBLIC LESS_CACHE_VERSION="${PROJECT_VERSION}")

# Adds a library of all parts and one way in.
function(add_plugin name entry map)
  add_library(${name} MODULE ${entry}
    $<TARGET_OBJECTS:less_cache_plan> $<TARGET_OBJECTS:less_cache_launch>
    $<TARGET_OBJECTS:less_cache_plugin>)
  target_link_libraries(${name} PRIVATE less_cache_options ${CMAKE_DL_LIBS})
  target_include_directories(${name} SYSTEM PRIVATE
    $<TARGET_PROPERTY:less_cache_plugin,INTERFACE_SYSTEM_INCLUDE_DIRECTORIES>)
  target_include_directories(${name} PRIVATE src)
  target_compile_definitions(${name} PRIVATE LESS_CACHE_VERSION="${PROJECT_VERSION}")
  target_link_options(${name} PRIVATE
    -Wl,--version-script=${CMAKE_CURRENT_SOURCE_DIR}/cmake/${map} -Wl,-z,relro,-z,now)
  if(NOT LESS_CACHE_SANITIZE)
    # The sanitizers' symbols are in the program.
    target_link_options(${name} PRIVATE -Wl,--no-undefined)
  endif()
  set_target_properties(${name} PROPERTIES LINK_DEPENDS
    ${CMAKE_CURRENT_SOURCE_DIR}/cmake/${map})
endfunction()

add_plugin(less_cache_trt src/entry_dynamic.cpp dynamic.map)
add_plugin(less_cache_trt_static src/entry_static.cpp static.map)
target_link_options(less_cache_trt_static PRIVATE -Wl,-z,nodelete)

install(TARGETS less_cache_trt less_cache_trt_static LIBRARY DESTINATION lib)
