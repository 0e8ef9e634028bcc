#pragma once

// Caches the differential autoparser's analysis of a chat template, which renders the template about thirty times and depends only on it; upstream
// repeats the analysis for each request. Included by chat.cpp.

#include "chat-auto-parser.h"

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

static autoparser::autoparser chat_analysed(const common_chat_template & tmpl) {
    static std::mutex mutex;
    static std::map<std::pair<const void *, std::vector<std::string>>, autoparser::autoparser> known; // a server has at most two templates

    // includes the template's address, because the result points to it
    const std::pair<const void *, std::vector<std::string>> key = { &tmpl, { tmpl.source(), tmpl.bos_token(), tmpl.eos_token() } };
    std::lock_guard<std::mutex> lock(mutex);
    auto it = known.find(key);
    if (it == known.end()) {
        autoparser::autoparser res;
        res.analyze_template(tmpl);
        if (known.size() >= 8) {
            known.clear();
        }
        it = known.emplace(key, std::move(res)).first;
    }
    return it->second;
}
