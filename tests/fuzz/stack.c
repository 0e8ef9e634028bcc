// where a process was when a signal ended it: frames to stderr, then the signal's own end. loaded with ctypes, in Linux's glibc only

#include <execinfo.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

static char stack[1 << 16]; // a stack that has overflowed is no place for a handler

static void on_signal(int number) {
    void * frames[64];
    static const char title[] = "frames:\n";
    (void) !write(2, title, sizeof(title) - 1);
    backtrace_symbols_fd(frames, backtrace(frames, 64), 2);
    signal(number, SIG_DFL);
    raise(number);
}

void install(void) {
    stack_t other = { .ss_sp = stack, .ss_size = sizeof(stack) };
    sigaltstack(&other, 0);

    void * warm[1];
    backtrace(warm, 1); // its first call loads a library

    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_handler = on_signal;
    action.sa_flags   = SA_ONSTACK | SA_RESETHAND | SA_NODEFER;

    static const int numbers[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT };
    for (unsigned i = 0; i < sizeof(numbers)/sizeof(numbers[0]); i++) {
        sigaction(numbers[i], &action, 0);
    }
}
