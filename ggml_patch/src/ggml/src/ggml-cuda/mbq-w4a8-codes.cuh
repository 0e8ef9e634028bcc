#pragma once

// Where activations go as int8 instead of as floats: their range is known before (ggml-row-scale.h: one range for all rows), so whoever makes them writes codes, in
// the order in which mbq_w4a8_gemm reads them, with no pass over floats between:
//
//   product, bias, GELU     the next product's input, at the end of a tile (mbq_w4a8_store_codes)
//   attention               the input of its output's product (mbq-attention-rows.cuh)
//
// The bits of floats, and a pass of mbq_w4a8_quantize over them.

#include "mbq-w4a8-gelu.cuh"
#include "mbq-w4a8-quantize.cuh"

// Codes of columns of K activations, a multiple of 256; q == nullptr: floats are wanted
struct mbq_w4a8_codes {
    int4  * q;
    float * scale;         // of each column
    int   * flags;         // to be set to 0
    int     n_flags;
    const float * range;   // of all columns
    int K;
    mbq_w4a8_function of;  // what is made codes of

    // The word of activations k to k + 3, a multiple of 4, of a column
    __device__ __forceinline__ uint32_t * word(const int k, const int column) const {
        const int unit = k/256*16 + k/32%2*8 + k/4%4*2 + k/16%2; // see mbq_w4a8_unit_k
        return (uint32_t *) (q + mbq_w4a8_unit_at<true>(unit, column, 0, K)) + k/64%4;
    }

    // By the threads of all CTAs, of which each is told its own number
    __device__ __forceinline__ void clear_flags(const int thread, const int threads) const {
        for (int i = thread; i < n_flags; i += threads) {
            flags[i] = 0;
        }
    }

};

// Of the node that runs, behind which is a RESHAPE: where its result is to lie as codes (mbq-w4a8-place.cuh), q == nullptr: in floats
mbq_w4a8_codes ggml_cuda_w4a8_result(ggml_backend_cuda_context & ctx, const ggml_tensor * node);
