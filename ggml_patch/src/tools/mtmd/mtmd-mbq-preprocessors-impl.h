#pragma once

// Implements mtmd-mbq-preprocessors.h. Included at the end of mtmd-image.cpp, because it needs its img_tool.

#include "mtmd-mbq-anyres-impl.h"
#include "mtmd-mbq-llama4-impl.h"
