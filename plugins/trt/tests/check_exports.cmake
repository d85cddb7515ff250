# The libraries export what the loaders look for and nothing else, and need neither CUDA nor TensorRT.

function(symbols_of library options found)
  execute_process(COMMAND ${NM} -D ${options} ${library} OUTPUT_VARIABLE text
                  COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^ \n]+\n" lines "${text}")
  string(REPLACE "\n" "" names "${lines}")
  list(SORT names)
  set(${found} "${names}" PARENT_SCOPE)
endfunction()

function(expect library actual expected)
  if(NOT "${actual}" STREQUAL "${expected}")
    message(FATAL_ERROR "${library} exports \"${actual}\", expected \"${expected}\"")
  endif()
endfunction()

symbols_of(${DYNAMIC} --defined-only exported)
expect(${DYNAMIC} "${exported}" "getCreators;setLoggerFinder")
symbols_of(${STATIC} --defined-only exported)
expect(${STATIC} "${exported}" "")

foreach(library ${DYNAMIC} ${STATIC})
  symbols_of(${library} --undefined-only wanted)
  foreach(name ${wanted})
    if(name MATCHES "^cu[A-Z]|^cuda|nvinfer|^getPluginRegistry|^getLogger")
      message(FATAL_ERROR "${library} needs ${name} of CUDA or TensorRT")
    endif()
  endforeach()
endforeach()
