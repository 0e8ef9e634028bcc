#pragma once

// implements mtmd-aifs.h; compiled as a part of mtmd-helper.cpp

#include "mtmd-aifs.h"
#include "mtmd-helper.h"
#include "mtmd-helper-common.h"

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstring>
#include <vector>

// architectures (general.architecture) of the families for which tests/families/test_one_pass.py compares one pass with separate decoding
static const char * const AIFS_ARCHS[] = { "qwen2vl", "qwen3vl", "qwen3vlmoe", "llama", "qwen2", "qwen3", "mistral3", "glm4", "glm4moe", "paddleocr" };

static std::atomic<bool> aifs_off     = false;
static std::atomic<bool> aifs_reorder = false;

const char * mtmd_aifs_refusal(const mtmd_context * ctx, const llama_context * lctx) {
    const llama_model * model = llama_get_model(lctx);

    if (aifs_off) {
        return "it is off";
    }
    if (llama_model_is_recurrent(model) || llama_model_is_hybrid(model)) {
        return "the model has a recurrent state";
    }
    if (llama_model_n_swa(model) > 0) {
        return "the model's attention has a sliding window";
    }
    if (!llama_get_causal_attn(lctx) || mtmd_decode_use_non_causal(ctx, nullptr)) {
        return "attention among a picture's rows is not causal";
    }
    if (mtmd_support_audio(ctx)) {
        return "the model hears";
    }

    char arch[64] = "";
    llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch));
    for (const char * name : AIFS_ARCHS) {
        if (strcmp(name, arch) == 0) {
            return nullptr;
        }
    }
    return "its architecture is not among those that were tested";
}

bool mtmd_aifs_init(const mtmd_context * ctx, const llama_context * lctx, const char * mode) {
    const bool reorder = strcmp(mode, "reorder") == 0;
    const bool on      = strcmp(mode, "on") == 0 || reorder;
    if (!on && strcmp(mode, "off") != 0 && strcmp(mode, "auto") != 0) {
        LOG_ERR("--aifs %s is unknown: give on, off, auto or reorder\n", mode);
        return false;
    }
    aifs_off     = strcmp(mode, "off") == 0;
    aifs_reorder = reorder;

    const char * refusal = mtmd_aifs_refusal(ctx, lctx);
    if (!refusal) {
        LOG_INF("aifs: text and pictures go through the model in one pass%s\n", reorder ? ", pictures first in each micro-batch" : "");
        return true;
    }
    if (on) {
        LOG_ERR("--aifs %s: text and pictures cannot go through this model in one pass (%s): use --aifs auto\n", mode, refusal);
        return false;
    }
    // the user did not choose this, so it is visible without higher verbosity
    g_logger.log(aifs_off ? GGML_LOG_LEVEL_INFO : GGML_LOG_LEVEL_WARN, "aifs: text and pictures are decoded one after the other (%s)\n", refusal);
    return true;
}

void mtmd_aifs_row_pos(const mtmd_context * ctx, const mtmd_input_chunk * chunk, llama_pos pos_0, int32_t row, llama_pos * pos) {
    if (mtmd_decode_use_mrope(ctx)) {
        const mtmd_decoder_pos p = mtmd_image_tokens_get_decoder_pos(mtmd_input_chunk_get_tokens_image(chunk), pos_0, row);
        pos[0] = p.t;
        pos[1] = p.y;
        pos[2] = p.x;
        pos[3] = p.z;
    } else {
        std::fill(pos, pos + GGML_MROPE_SECTIONS, pos_0 + row);
    }
}

int32_t mtmd_aifs_picture(void) {
    return aifs_reorder ? 2 : 1;
}

bool mtmd_aifs_add_rows(const mtmd_context * ctx, const llama_context * lctx, llama_batch_ext * batch, const mtmd_input_chunk * chunk,
                        const float * embd, llama_pos pos_0, llama_seq_id seq_id, int32_t row_0, int32_t n_rows, int32_t picture) {
    const size_t n_embd = llama_model_n_embd_inp(llama_get_model(lctx));
    if (mtmd_input_chunk_get_type(chunk) != MTMD_INPUT_CHUNK_TYPE_IMAGE) {
        picture = 0;
    }

    for (int32_t row = row_0; row < row_0 + n_rows; ++row) {
        llama_pos pos[GGML_MROPE_SECTIONS];
        mtmd_aifs_row_pos(ctx, chunk, pos_0, row, pos);
        const int32_t idx = llama_batch_ext_add_embd(batch, seq_id, { embd + (size_t) row*n_embd, 1, n_embd, picture });
        if (idx < 0) {
            return false;
        }
        llama_batch_ext_set_pos(batch, idx, pos);
    }
    return true;
}

// the tower's output for chunk i, which is encoded together with as many of the next pictures as fit; earlier outputs stay in `encoded`, because
// a batch that has not been decoded yet refers to their rows
static const float * aifs_encode(mtmd_context * ctx, std::vector<mtmd::batch_ptr> & encoded, const mtmd_input_chunks * chunks, size_t i) {
    const mtmd_input_chunk * chunk = mtmd_input_chunks_get(chunks, i);

    const float * embd = encoded.empty() ? nullptr : mtmd_batch_get_output_embd(encoded.back().get(), chunk);
    if (embd) {
        return embd;
    }

    const int64_t t_start = ggml_time_ms();
    encoded.emplace_back(mtmd_batch_init(ctx));
    mtmd_batch * mbatch = encoded.back().get();
    int n_added = 0;
    for (size_t j = i; j < mtmd_input_chunks_size(chunks); ++j) {
        const mtmd_input_chunk * next = mtmd_input_chunks_get(chunks, j);
        if (mtmd_input_chunk_get_type(next) == MTMD_INPUT_CHUNK_TYPE_TEXT) {
            continue;
        }
        if (mtmd_batch_add_chunk(mbatch, next) != 0) {
            break;
        }
        n_added++;
    }
    if (n_added == 0 || mtmd_batch_encode(mbatch) != 0) {
        LOG_ERR("aifs: failed to encode a picture\n");
        return nullptr;
    }
    LOG_INF("aifs: %d picture(s) encoded in %" PRId64 " ms\n", n_added, ggml_time_ms() - t_start);
    return mtmd_batch_get_output_embd(mbatch, chunk);
}

// a batch under construction: entries are added until it is full, then it is decoded
struct aifs_pass {
    llama_context * lctx;
    const int32_t n_batch;

    llama_batch_ext_ptr batch;
    int32_t n_tokens = 0; // in the batch: rows of pictures and token ids
    int32_t n_rows   = 0; // rows of pictures among them

    aifs_pass(llama_context * lctx, int32_t n_batch) :
        lctx(lctx), n_batch(std::min(n_batch, (int32_t) llama_n_batch(lctx))), batch(llama_batch_ext_init(lctx)) {}

    int32_t room() const {
        return n_batch - n_tokens;
    }

    int32_t flush() {
        const int64_t t_start = ggml_time_ms();
        const int32_t ret = llama_process(lctx, LLAMA_PROCESS_TYPE_DECODE, batch.get());
        if (ret != 0) {
            LOG_ERR("aifs: failed to decode %d tokens, %d of pictures (%d)\n", n_tokens, n_rows, ret);
            return ret;
        }
        LOG_INF("aifs: %d tokens decoded, %d of pictures, in %" PRId64 " ms\n", n_tokens, n_rows, ggml_time_ms() - t_start);
        llama_batch_ext_clear(batch.get());
        n_tokens = n_rows = 0;
        return 0;
    }
};

int32_t mtmd_aifs_eval_chunks(mtmd_context * ctx, llama_context * lctx, const mtmd_input_chunks * chunks,
                              llama_pos n_past, llama_seq_id seq_id, int32_t n_batch, bool logits_last, llama_pos * new_n_past) {
    aifs_pass pass(lctx, n_batch);
    std::vector<mtmd::batch_ptr> encoded;

    for (size_t i = 0; i < mtmd_input_chunks_size(chunks); ++i) {
        const mtmd_input_chunk * chunk = mtmd_input_chunks_get(chunks, i);
        const int32_t n = mtmd_input_chunk_get_n_tokens(chunk);
        const bool is_text = mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_TEXT;

        size_t n_text = 0;
        const llama_token * tokens = is_text ? mtmd_input_chunk_get_tokens_text(chunk, &n_text) : nullptr;
        const float * embd = is_text ? nullptr : aifs_encode(ctx, encoded, chunks, i);
        if (!is_text && !embd) {
            return -1;
        }

        for (int32_t row = 0; row < n; ) {
            if (pass.room() == 0) {
                const int32_t ret = pass.flush();
                if (ret != 0) {
                    return ret;
                }
            }
            const int32_t n_add = std::min(n - row, pass.room());
            if (is_text) {
                for (int32_t j = row; j < row + n_add; ++j) {
                    const llama_pos pos = n_past + j;
                    const int32_t idx = llama_batch_ext_add_token(pass.batch.get(), seq_id, tokens[j]);
                    GGML_ASSERT(idx >= 0);
                    llama_batch_ext_set_pos(pass.batch.get(), idx, &pos);
                }
            } else {
                const bool ok = mtmd_aifs_add_rows(ctx, lctx, pass.batch.get(), chunk, embd, n_past, seq_id, row, n_add, mtmd_aifs_picture());
                GGML_ASSERT(ok);
                pass.n_rows += n_add;
            }
            pass.n_tokens += n_add;
            row += n_add;
        }
        n_past += mtmd_input_chunk_get_n_pos(chunk);
    }

    if (pass.n_tokens > 0) {
        llama_batch_ext_set_output_logits(pass.batch.get(), pass.n_tokens - 1, logits_last);
        const int32_t ret = pass.flush();
        if (ret != 0) {
            return ret;
        }
    }
    *new_n_past = n_past;
    return 0;
}
