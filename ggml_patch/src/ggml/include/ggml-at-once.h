#pragma once

// A host's short work, copies and pictures above all, on several cores at once (C++, header only).

#include <cstddef>
#include <future>
#include <vector>

// f(0) to f(n - 1), all but the first in threads of their own; what one of them throws comes here. Where no thread is to be had (ulimit -u, a container's limit
// of processes) such a call is deferred to get(): the caller makes it. With std::launch::async alone, std::async throws there.
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
