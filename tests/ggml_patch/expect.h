#pragma once

// What programs of tests expect: said where it is not so, and counted.

#include <cstdio>

static int failures = 0;

static void expect(bool what, const char * words) {
    if (!what) {
        printf("not so: %s\n", words);
        failures++;
    }
}
