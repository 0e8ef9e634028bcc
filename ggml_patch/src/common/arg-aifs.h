#pragma once

// --aifs of the programs that accept pictures, see tools/mtmd/mtmd-aifs.h

#include "arg.h"

extern std::string common_aifs; // the requested mode, for the whole process as in libmtmd

inline common_arg common_arg_aifs(std::initializer_list<enum llama_example> examples) {
    return common_arg({"--aifs"}, "[on|off|auto|reorder]",
        "whether text and pictures of a prompt go through the model in one pass; 'auto': where the model allows it, "
        "'reorder': and pictures come first in each micro-batch (default: auto)",
        [](common_params & params, const std::string & value) {
            if (value != "on" && value != "off" && value != "auto" && value != "reorder") {
                throw std::invalid_argument("unknown value: '" + value + "'");
            }
            GGML_UNUSED(params);
            common_aifs = value;
        }
    ).set_examples(examples).set_env("LLAMA_ARG_AIFS");
}
