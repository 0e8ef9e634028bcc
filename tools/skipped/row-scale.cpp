// Products of weights with one scale a row without quantising: rows of activations are whatever lies in their memory, and answers are wrong. For
// bench_activations.py, which puts it in the place of the file of this name and so times what no quantiser can beat.

#include "row-scale-panel.h"

#define quantize_row(x, k, range, to, col) ((void) (x), (void) (range), (to).s[col] = 1.0f)

#include MBQ_REPLACED // the build's own
