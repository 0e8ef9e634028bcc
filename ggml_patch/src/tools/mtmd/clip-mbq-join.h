#pragma once

// Decides which pictures of a prompt go through the tower together (clip-mbq-batch.h has the graphs). Included by mtmd.cpp.

#include "clip-impl.h"
#include "mtmd-mbq-ahead.h"

// single pictures of one size; the two frames of a video are one chunk with two entries
static bool clip_mbq_can_join(const clip_image_f32_batch & a, const clip_image_f32_batch & b) {
    return a.entries.size() == 1 && b.entries.size() == 1 && a.entries[0].nx() == b.entries[0].nx() && a.entries[0].ny() == b.entries[0].ny();
}
