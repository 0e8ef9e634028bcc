#pragma once

// Text and pictures of a prompt in one pass (tools/mtmd/mtmd-aifs.h), in the server: if the next token of a prompt is a picture, its rows
// join the batch of the text. Rows that do not fit follow in the next batch; slot.aifs_rows counts the decoded ones.
//
// Included by server-context.cpp after encode_mtmd_chunk(), because it needs its types.

// whether the slot's prompt uses this path; the first time that a request with pictures does not, logs the reason. On either path, slot.aifs_one says
// from now on whether anybody waits for a token
static bool aifs_applies(server_slot & slot, const server_batch & batch) {
    slot.aifs_one = batch.size() > 0 && !batch.tokens.front().is_prompt;
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

// While anybody waits for a token (slot.aifs_one), the server does no more work until then than when prompts take turns, and less if several prompts
// have pictures: a picture starts a prompt's part of a batch, the text after it follows, and only one prompt has a picture in the batch, the oldest
// request whose next token is one.
static bool aifs_waits(const server_slot & slot, const server_batch & batch, int32_t n_tokens_prev, const std::vector<server_slot> & slots) {
    if (!slot.aifs_one) {
        return false;
    }
    if (slot.aifs_rows == 0 && batch.size() > n_tokens_prev) {
        return true;
    }
    for (const auto & t : batch.tokens) {
        if (t.i_embd >= 0 && t.id_slot != slot.id) {
            return true;
        }
    }
    for (const auto & other : slots) {
        const bool older = other.id != slot.id && other.state == SLOT_STATE_PROCESSING_PROMPT && other.task->id < slot.task->id;
        if (older && lora_get_enabled_ids(other.lora).empty() && other.prompt.n_tokens() < other.task->n_tokens() &&
                other.task->tokens[other.prompt.n_tokens()] == LLAMA_TOKEN_NULL) {
            return true;
        }
    }
    return false;
}

// add the rows of the picture at the prompt's next token, as many as fit
// returns false if it cannot be encoded
static bool aifs_add_rows(server_slot & slot, server_batch & batch, int32_t n_batch, server_queue & queue) {
    const size_t idx = slot.prompt.n_tokens();
    const auto & chunk = slot.task->tokens.find_chunk(idx);

    const float * embd = slot.mbatch ? mtmd_batch_get_output_embd(slot.mbatch.get(), chunk.get()) : nullptr;
    if (!embd) {
        // encode on the worker thread, so that metrics tasks are still handled
        if (slot.mbatch) { aifs_kept.push_back(std::move(slot.mbatch)); } // the batch may contain its rows
        int32_t res = 0;
        queue.yield_to_queue([&]() {
            res = encode_mtmd_chunk(slot, slot.mbatch, idx);
        });
        embd = res == 0 ? mtmd_batch_get_output_embd(slot.mbatch.get(), chunk.get()) : nullptr;
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
        // not add_embd(): the row stays in the tower's output
        batch.tokens.push_back({ slot.id, LLAMA_TOKEN_NULL, { pos[0], pos[1], pos[2], pos[3] }, /* output */ false, /* is_prompt */ true });
        batch.tokens.back().i_embd  = 0;
        batch.tokens.back().row     = embd + (size_t) slot.aifs_rows*batch.n_embd;
        batch.tokens.back().picture = mtmd_input_chunk_get_type(chunk.get()) == MTMD_INPUT_CHUNK_TYPE_IMAGE ? mtmd_aifs_picture() : 0;
    }
    if (slot.aifs_rows == n_rows) {
        slot.prompt.tokens.push_back_placeholder(chunk.get());
        slot.aifs_rows = 0;
    }
    return true;
}
