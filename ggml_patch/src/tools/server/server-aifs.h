#pragma once

// Text and pictures of a prompt in one pass (tools/mtmd/mtmd-aifs.h), in the server: where the next token of a prompt is a picture, its
// rows join the batch of the text. Rows that do not fit any more follow in the next batch; slot.aifs_rows counts those that are decoded.
//
// Included by server-context.cpp behind encode_mtmd_chunk(), whose types it needs.

// whether the slot's prompt takes this path; the first time that a request with pictures does not, the log says why
static bool aifs_applies(server_slot & slot) {
    slot.aifs_encoded = 0;
    if (!slot.mctx || mtmd_aifs_refusal(slot.mctx, slot.ctx_tgt)) {
        return false; // the log said so when the model was loaded
    }

    const auto & task = *slot.task;
    const char * refusal =
        slot.spec                                 ? "speculative decoding"         :
        !task.need_sampling()                     ? "a task that is no completion" :
        task.n_tokens_shared > 0                  ? "a prefix that tasks share"    :
        !lora_get_enabled_ids(slot.lora).empty()  ? "an active adapter"            : nullptr;

    static const char * said = nullptr;
    if (refusal && refusal != said && task.tokens.find_next_media_chunk(0).first) {
        SLT_INF(slot, "aifs: text and pictures are decoded one after the other (%s)\n", refusal);
        said = refusal;
    }
    return !refusal;
}

// add the rows of the picture at the prompt's next token, as many as fit
// returns false if it cannot be encoded, or, with slot.aifs_encoded > 0, if it is to wait for the next batch
static bool aifs_add_rows(server_slot & slot, server_batch & batch, int32_t n_batch, server_queue & queue) {
    const size_t idx = slot.prompt.n_tokens();
    const auto & chunk = slot.task->tokens.find_chunk(idx);

    const float * embd = slot.mbatch ? mtmd_batch_get_output_embd(slot.mbatch.get(), chunk.get()) : nullptr;
    if (!embd && slot.aifs_encoded > 0 && !batch.tokens.front().is_prompt) {
        return false; // others wait for a token of theirs (they come first in a batch), not for all of a prompt's pictures
    }
    if (!embd) {
        // encode on the worker thread, so that metrics tasks are still handled
        int32_t res = 0;
        queue.yield_to_queue([&]() {
            res = encode_mtmd_chunk(slot, slot.mbatch, idx);
        });
        embd = res == 0 ? mtmd_batch_get_output_embd(slot.mbatch.get(), chunk.get()) : nullptr;
        slot.aifs_encoded = embd ? slot.aifs_encoded + 1 : 0;
    }
    if (!embd) {
        SLT_ERR(slot, "failed to encode mtmd chunk, idx = %zu\n", idx);
        return false;
    }

    const int32_t   n_rows = mtmd_input_chunk_get_n_tokens(chunk.get());
    const llama_pos pos_0  = slot.prompt.tokens.pos_next();
    for (; slot.aifs_rows < n_rows && batch.size() < n_batch; slot.aifs_rows++) {
        llama_pos pos[GGML_MROPE_SECTIONS];
        mtmd_aifs_row_pos(slot.mctx, chunk.get(), pos_0, slot.aifs_rows, pos);
        const bool ok = batch.add_embd(slot.id, embd + (size_t) slot.aifs_rows*batch.n_embd, pos, /* output */ false, /* is_prompt */ true);
        GGML_ASSERT(ok);
        batch.tokens.back().picture = mtmd_input_chunk_get_type(chunk.get()) == MTMD_INPUT_CHUNK_TYPE_IMAGE ? mtmd_aifs_picture() : 0;
    }
    if (slot.aifs_rows == n_rows) {
        slot.prompt.tokens.push_back_placeholder(chunk.get());
        slot.aifs_rows = 0;
    }
    return true;
}
