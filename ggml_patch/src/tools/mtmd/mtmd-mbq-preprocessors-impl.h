#pragma once

// What mtmd-mbq-preprocessors.h declares. Included at the end of mtmd-image.cpp, whose img_tool it needs.

#include "mtmd-mbq-anyres-impl.h"
#include "mtmd-mbq-llama4-impl.h"
