#pragma once

/* Whole blocks of SHA-256 by the processor's own instructions (SHA extensions of x86), where it has them: each picture of a request is
   hashed, and in portable C that takes longer than reading it. Included by sha256.c, which is compiled as C or C++. */

#include <stddef.h>
#include <stdint.h>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)

#include <cpuid.h>
#include <immintrin.h>

static int sha256_x86_supported(void) {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_SSE4_1) || !(ecx & bit_SSSE3)) {
        return 0;
    }
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & (1u << 29));
}

/* how many blocks of 64 bytes went into the state: all or none; k: the 64 constants of the rounds */
__attribute__((target("sha,sse4.1,ssse3")))
static size_t sha256_x86_blocks(uint32_t * state, const uint32_t * k, const unsigned char * data, size_t n_blocks) {
    if (n_blocks == 0 || !sha256_x86_supported()) {
        return 0;
    }

    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);

    /* the instructions take the state as a b e f and c d g h, the first of them highest */
    __m128i dcba = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *) state),       0xb1);
    __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *) (state + 4)), 0x1b);
    __m128i abef = _mm_alignr_epi8(dcba, hgfe, 8);
    __m128i cdgh = _mm_blend_epi16(hgfe, dcba, 0xf0);

    for (size_t block = 0; block < n_blocks; block++, data += 64) {
        const __m128i abef_0 = abef;
        const __m128i cdgh_0 = cdgh;
        __m128i w[4];
        for (int i = 0; i < 16; i++) { /* four rounds each */
            __m128i * cur = &w[i % 4];
            if (i < 4) {
                *cur = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *) (data + 16*i)), big_endian);
            } else {
                const __m128i last = w[(i + 3) % 4];
                const __m128i w_7  = _mm_alignr_epi8(last, w[(i + 2) % 4], 4);
                *cur = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(*cur, w[(i + 1) % 4]), w_7), last);
            }
            const __m128i sum = _mm_add_epi32(*cur, _mm_loadu_si128((const __m128i *) (k + 4*i)));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_0);
        cdgh = _mm_add_epi32(cdgh, cdgh_0);
    }

    const __m128i abef_up = _mm_shuffle_epi32(abef, 0x1b);
    const __m128i cdgh_up = _mm_shuffle_epi32(cdgh, 0xb1);
    _mm_storeu_si128((__m128i *) state,       _mm_blend_epi16(abef_up, cdgh_up, 0xf0));
    _mm_storeu_si128((__m128i *) (state + 4), _mm_alignr_epi8(cdgh_up, abef_up, 8));
    return n_blocks;
}

#else

static size_t sha256_x86_blocks(uint32_t * state, const uint32_t * k, const unsigned char * data, size_t n_blocks) {
    (void) state; (void) k; (void) data; (void) n_blocks;
    return 0;
}

#endif
