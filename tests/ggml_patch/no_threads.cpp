// Work at once (ggml/include/ggml-at-once.h) where the third thread and all later ones are refused, as a limit of processes does it. Run by test_at_once.py; ends
// with 1 where something is wrong.

#include "expect.h"
#include "ggml-at-once.h"

#include <atomic>
#include <cerrno>
#include <dlfcn.h>
#include <pthread.h>
#include <stdexcept>
#include <thread>

static std::atomic<int> n_threads = 0;

// in the place of libc's, for the C++ library too
extern "C" int pthread_create(pthread_t * thread, const pthread_attr_t * attributes, void * (*start)(void *), void * argument) {
    if (n_threads++ >= 2) {
        return EAGAIN;
    }
    const auto create = (decltype(&pthread_create)) dlsym(RTLD_NEXT, "pthread_create");
    return create(thread, attributes, start, argument);
}

int main() {
    std::atomic<int> done[8] = {};
    std::atomic<int> mine = 0;
    const auto caller = std::this_thread::get_id();
    ggml_at_once(8, [&](size_t i) {
        done[i]++;
        mine += std::this_thread::get_id() == caller;
    });
    for (const auto & times : done) {
        expect(times == 1, "each call is made once");
    }
    expect(n_threads == 7, "each but the first is tried in a thread");
    expect(mine == 6, "the caller makes those that got none, and its own");

    ggml_at_once(0, [&](size_t) { expect(false, "none are none"); });
    try {
        ggml_at_once(3, [](size_t i) {
            if (i == 2) {
                throw std::runtime_error("2");
            }
        });
        expect(false, "what a call throws comes to the caller");
    } catch (const std::runtime_error &) {
    }
    return failures > 0;
}
