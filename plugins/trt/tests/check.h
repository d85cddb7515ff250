#pragma once

#include <functional>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace less_cache::testing {

/// Ends a test that a later line would only crash.
struct Failed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Test {
    const char* name;
    std::function<void()> body;
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

struct Registration {
    Registration(const char* name, std::function<void()> body) {
        tests().push_back({name, std::move(body)});
    }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
    std::ostringstream message;
    message << file << ":" << line << ": " << what;
    throw Failed(message.str());
}

template <typename Left, typename Right>
void equal(const Left& left, const Right& right, const char* text, const char* file, int line) {
    if (!(left == right)) {
        std::ostringstream message;
        message << text << ": " << left << " is not " << right;
        fail(file, line, message.str());
    }
}

inline void contains(const std::string& whole, const std::string& part, const char* file,
                     int line) {
    if (whole.find(part) == std::string::npos) {
        fail(file, line, "\"" + whole + "\" does not contain \"" + part + "\"");
    }
}

/// Runs all tests, or those whose name contains the first argument; 0 where none failed.
inline int run(int count, char** arguments) {
    int failed = 0;
    int ran = 0;
    for (const Test& test : tests()) {
        if (count > 1 && std::string(test.name).find(arguments[1]) == std::string::npos) {
            continue;
        }
        ++ran;
        try {
            test.body();
            std::cout << "passed  " << test.name << "\n";
        } catch (const std::exception& error) {
            ++failed;
            std::cout << "FAILED  " << test.name << "\n        " << error.what() << "\n";
        }
    }
    std::cout << ran << " tests, " << failed << " failed\n";
    return failed == 0 && ran > 0 ? 0 : 1;
}

}  // namespace less_cache::testing

#define TEST(name)                                                                 \
    static void name();                                                            \
    static const less_cache::testing::Registration registered_##name(#name, name); \
    static void name()

#define CHECK(condition)                                               \
    do {                                                               \
        if (!(condition)) {                                            \
            less_cache::testing::fail(__FILE__, __LINE__, #condition); \
        }                                                              \
    } while (false)

#define CHECK_EQUAL(left, right) less_cache::testing::equal(left, right, #left, __FILE__, __LINE__)

#define CHECK_CONTAINS(whole, part) less_cache::testing::contains(whole, part, __FILE__, __LINE__)
