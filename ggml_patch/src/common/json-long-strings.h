#pragma once

// Long strings of a JSON text bypass the parser, which reads single bytes: a picture in a request is a string of one megabyte.
//
// A string without escapes, control characters and non-ASCII characters is its own value. Such strings are cut out, the rest is parsed, and they
// are inserted again. Everything else, including errors, is left to the parser. Included by json.cpp.

#include <nlohmann/json.hpp>

#include <cstring>
#include <random>
#include <string>
#include <vector>

static const size_t JSON_LONG_STRING = 4096;

// replaces a cut string, followed by its number; no request can predict it
static const std::string & json_long_string_mark() {
    static const std::string mark = [] {
        std::random_device rd;
        std::string res = "cut-";
        for (int i = 0; i < 4; i++) {
            res += std::to_string(rd()) + "-";
        }
        return res;
    }();
    return mark;
}

// the end of the string whose opening quote is at begin; npos if it has none
static size_t json_string_end(const std::string & text, size_t begin, bool & escaped) {
    const size_t quote = text.find('"', begin + 1);
    escaped = quote != std::string::npos && memchr(text.data() + begin + 1, '\\', quote - begin - 1) != nullptr;
    if (!escaped) {
        return quote;
    }
    for (size_t i = begin + 1; i < text.size(); i++) {
        if (text[i] == '\\') {
            i++;
        } else if (text[i] == '"') {
            return i;
        }
    }
    return std::string::npos;
}

static bool json_is_plain(const char * data, size_t n) {
    unsigned char other = 0;
    for (size_t i = 0; i < n; i++) {
        const unsigned char c = data[i];
        other |= (c < 0x20) | (c >= 0x7f);
    }
    return !other;
}

static bool json_is_key(const std::string & text, size_t end) {
    const size_t next = text.find_first_not_of(" \t\r\n", end + 1);
    return next != std::string::npos && text[next] == ':';
}

static nlohmann::ordered_json json_parse_long_strings(const std::string & text) {
    using nlohmann::ordered_json;

    if (text.size() < JSON_LONG_STRING) {
        return ordered_json::parse(text);
    }

    std::vector<std::string> cut;
    std::string rest;
    size_t done = 0; // text up to here is in rest
    for (size_t begin = text.find('"'); begin != std::string::npos; ) {
        bool escaped = false;
        const size_t end = json_string_end(text, begin, escaped);
        if (end == std::string::npos) {
            break;
        }
        const size_t n = end - begin - 1;
        if (n >= JSON_LONG_STRING && !escaped && json_is_plain(text.data() + begin + 1, n) && !json_is_key(text, end)) {
            rest.append(text, done, begin + 1 - done);
            rest += json_long_string_mark() + std::to_string(cut.size());
            cut.emplace_back(text, begin + 1, n);
            done = end;
        }
        begin = text.find('"', end + 1);
    }
    if (cut.empty()) {
        return ordered_json::parse(text);
    }
    rest.append(text, done, std::string::npos);

    ordered_json root = ordered_json::parse(rest, nullptr, false);
    if (root.is_discarded()) {
        return ordered_json::parse(text); // for an error with the wording and positions of the whole text
    }

    const std::string & mark = json_long_string_mark();
    std::vector<ordered_json *> todo = { &root }; // no recursion, because the depth of a request is not limited
    while (!todo.empty()) {
        ordered_json & value = *todo.back();
        todo.pop_back();
        if (value.is_structured()) {
            for (auto & child : value) {
                todo.push_back(&child);
            }
        } else if (value.is_string()) {
            auto & string = value.get_ref<std::string &>();
            if (string.compare(0, mark.size(), mark) == 0) {
                string = std::move(cut.at(std::stoul(string.substr(mark.size()))));
            }
        }
    }
    return root;
}
