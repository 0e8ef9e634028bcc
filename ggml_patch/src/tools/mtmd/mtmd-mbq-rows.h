#pragma once

// Writes the tower's output to reused memory (clip-mbq-rows.h) instead of a vector. Included by mtmd.cpp before mtmd_encode_chunk(), which calls these
// functions instead of upstream's of the same names, because its output has their type.

static int32_t mtmd_mbq_encode(mtmd_context * ctx, clip_ctx * tower, clip_image_f32_batch batch, size_t n_tokens, clip_mbq_rows & rows) {
    auto & memory = ctx->out_embd.memory;
    if (!memory) {
        memory = std::make_shared<clip_mbq_row_pool>(clip_mbq_host_buft(tower));
    }
    rows.resize(memory, n_tokens*ctx->n_embd_out());
    batch.rows = &rows;
    std::vector<float> elsewhere; // stays empty
    return clip_image_batch_encode(tower, ctx->n_threads, &batch, elsewhere) ? 0 : 1;
}

static int32_t mtmd_encode_impl(mtmd_context * ctx, const mtmd_image_tokens * tokens, clip_mbq_rows & rows) {
    if (!ctx->ctx_v || tokens->is_placeholder()) {
        std::vector<float> none;
        return mtmd_encode_impl(ctx, tokens, none); // upstream's version, which reports the reason
    }
    return mtmd_mbq_encode(ctx, ctx->ctx_v, tokens->batch_f32, tokens->n_tokens(), rows);
}

static int32_t mtmd_encode_chunk_impl(mtmd_context * ctx, const mtmd_input_chunk * chunk, clip_mbq_rows & rows) {
    const bool picture = chunk->type == MTMD_INPUT_CHUNK_TYPE_IMAGE && ctx->ctx_v && chunk->tokens_image;
    const bool sound   = chunk->type == MTMD_INPUT_CHUNK_TYPE_AUDIO && ctx->ctx_a && chunk->tokens_audio;
    if (picture) {
        return mtmd_encode_impl(ctx, chunk->tokens_image.get(), rows);
    }
    if (sound && !chunk->is_placeholder()) {
        return mtmd_mbq_encode(ctx, ctx->ctx_a, chunk->tokens_audio->batch_f32, chunk->tokens_audio->n_tokens, rows);
    }
    std::vector<float> none;
    return mtmd_encode_chunk_impl(ctx, chunk, none);
}
