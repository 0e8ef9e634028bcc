#pragma once

// Preprocessors that upstream lacks. Included at the end of mtmd-image.h.

#include "mtmd-mbq-anyres.h"
#include "mtmd-mbq-llama4.h"
