#pragma once

// Runs short work of the host, mainly copies and pictures, on several cores (C++, header only).

#include <cstddef>
#include <future>
#include <vector>

// Calls f(0) to f(n - 1), all but the first in separate threads, and rethrows their exceptions. If no thread can be created (ulimit -u, a container's limit
// of processes), the call is deferred to get(), so the caller makes it. With std::launch::async alone, std::async would throw.
template <typename F>
static void ggml_at_once(size_t n, const F & f) {
    std::vector<std::future<void>> others;
    for (size_t i = 1; i < n; ++i) {
        others.push_back(std::async(std::launch::async | std::launch::deferred, [&f, i] { f(i); }));
    }
    if (n > 0) {
        f(0);
    }
    for (auto & other : others) {
        other.get();
    }
}
