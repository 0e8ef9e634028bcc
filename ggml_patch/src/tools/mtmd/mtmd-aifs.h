#pragma once

// Text and pictures of a prompt in one pass: batches that mix token ids with the rows of pictures, filled up to n_batch, instead of a
// decode call for each run of text and each picture. Attention, positions and answers do not change.

#include "llama.h"
#include "mtmd.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// "auto" (the default without a call): if the model supports it; "on": refuse a model that does not; "off": never
// "reorder": as "on", and rows of pictures are computed first in each micro-batch
// applies to the whole process; logs one line about this model
// returns false for "on" or "reorder" if the model does not support it, and for an unknown mode
MTMD_API bool mtmd_aifs_init(const mtmd_context * ctx, const struct llama_context * lctx, const char * mode);

// why prompts of this model are decoded in pieces; NULL if text and pictures are processed in one pass
MTMD_API const char * mtmd_aifs_refusal(const mtmd_context * ctx, const struct llama_context * lctx);

// the position of one row of a picture that starts at pos_0, in the four sections of M-RoPE
// (for other models only the first is used), as mtmd_helper_decode_image_chunk() sets it
MTMD_API void mtmd_aifs_row_pos(const mtmd_context * ctx, const mtmd_input_chunk * chunk, llama_pos pos_0, int32_t row, llama_pos * pos);

// the value of llama_embd.picture for rows of pictures, according to mtmd_aifs_init(): 2 for "reorder", otherwise 1
MTMD_API int32_t mtmd_aifs_picture(void);

// add the rows [row_0, row_0 + n_rows) of a picture to a batch; embd is the tower's output for all of its rows, picture as in llama_embd
// returns false if the batch is full
MTMD_API bool mtmd_aifs_add_rows(const mtmd_context * ctx, const struct llama_context * lctx, struct llama_batch_ext * batch,
                                 const mtmd_input_chunk * chunk, const float * embd, llama_pos pos_0, llama_seq_id seq_id,
                                 int32_t row_0, int32_t n_rows, int32_t picture);

// mtmd_helper_eval_chunks() in ceil(n / n_batch) decode calls, for a model that mtmd_aifs_refusal() does not refuse
// the prompt's last row has logits if logits_last is set
MTMD_API int32_t mtmd_aifs_eval_chunks(mtmd_context * ctx, struct llama_context * lctx, const mtmd_input_chunks * chunks,
                                       llama_pos n_past, llama_seq_id seq_id, int32_t n_batch, bool logits_last, llama_pos * new_n_past);

#ifdef __cplusplus
}
#endif
