#pragma once

// Activations that are stored as int8 instead of floats. Their range is known in advance (ggml-row-scale.h: one range for all rows), so that the kernel which
// computes them writes codes, in the order in which mbq_w4a8_gemm reads them, without an intermediate pass over floats:
//
//   product, bias, GELU     the input of the next product, in the epilogue of a tile (mbq_w4a8_store_codes)
//   attention               the input of the output projection (mbq-attention-rows.cuh)
//
// The bits are those of floats quantised by mbq_w4a8_quantize.

#include "mbq-w4a8-gelu.cuh"
#include "mbq-w4a8-quantize.cuh"

// Codes of columns of K activations, a multiple of 256; q == nullptr: store floats
struct mbq_w4a8_codes {
    int4  * q;
    float * scale;         // per column
    int   * flags;         // to be cleared
    int     n_flags;
    const float * range;   // for all columns
    int K;
    mbq_w4a8_function of;  // the function applied before quantisation

    // The word of activations k to k + 3 of a column; k is a multiple of 4
    __device__ __forceinline__ uint32_t * word(const int k, const int column) const {
        const int unit = k/256*16 + k/32%2*8 + k/4%4*2 + k/16%2; // see mbq_w4a8_unit_k
        return (uint32_t *) (q + mbq_w4a8_unit_at<true>(unit, column, 0, K)) + k/64%4;
    }

    // To be called by the threads of all CTAs, each with its global index
    __device__ __forceinline__ void clear_flags(const int thread, const int threads) const {
        for (int i = thread; i < n_flags; i += threads) {
            flags[i] = 0;
        }
    }

};

// Where to store the result of the current node, which a RESHAPE follows, as codes (mbq-w4a8-place.cuh); q == nullptr: as floats
mbq_w4a8_codes ggml_cuda_w4a8_result(ggml_backend_cuda_context & ctx, const ggml_tensor * node);
