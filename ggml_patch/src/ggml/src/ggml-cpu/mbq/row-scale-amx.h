#pragma once

// Products of row-scale.cpp with AMX: tiles of 16 rows of activations times slabs of 16 rows of weights, whose layout ([k/4][16][4],
// unsigned codes) is already that of a tile. Sums are integers, so the bits equal those of the other kernels.

#include <stddef.h>
#include <stdint.h>

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROW_SCALE_AMX

namespace row_scale_amx {

constexpr int    TILE = 16;        // rows of activations, and of weights, per tile of sums
constexpr int    STEP = 64;        // columns per tile of codes
constexpr size_t SIZE = TILE*STEP; // bytes per tile

// A process must request the tile registers from the kernel.
inline bool ready() {
    constexpr int request = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, request, tile_data) == 0;
    return granted;
}

// Configures all eight tiles at full size, and afterwards restores the thread's configuration, which upstream's kernels load once per thread.
class tiles {
    struct config {
        uint8_t  palette, start_row, reserved[14];
        uint16_t colsb[16];
        uint8_t  rows[16];
    };
    static_assert(sizeof(config) == 64, "the size that the instructions read and write");

    alignas(64) config before = {};

    // an empty statement that uses all of c: GCC 12 declares that these instructions access only 8 of its bytes
    static void load (const config & c) { __asm__ volatile("" : : "m"(c)); _tile_loadconfig(&c); }
    static void store(config & c)       { _tile_storeconfig(&c); __asm__ volatile("" : "+m"(c)); }

public:
    tiles() {
        store(before);
        alignas(64) config all = {};
        all.palette = 1;
        for (int i = 0; i < 8; ++i) {
            all.colsb[i] = STEP;
            all.rows[i]  = TILE;
        }
        load(all);
    }
    ~tiles() { load(before); }

    tiles(const tiles &) = delete;
    tiles & operator=(const tiles &) = delete;
};

// Sums of nq (1 or 2) tiles of activations at q times nw (1 or 2) slabs at w and w + stride: sums[i][j] is tile i times slab j, one row of
// activations per line. A step of q is nq tiles; steps are q_step bytes apart.
template <int nq, int nw>
void multiply(const uint8_t * w, size_t stride, const int8_t * q, size_t q_step, int64_t steps, int32_t sums[2][2][TILE][TILE]) {
    _tile_zero(0);
    if constexpr (nw == 2)            { _tile_zero(1); }
    if constexpr (nq == 2)            { _tile_zero(2); }
    if constexpr (nq == 2 && nw == 2) { _tile_zero(3); }

    for (int64_t s = 0; s < steps; ++s, w += SIZE, q += q_step) {
        _tile_loadd(4, q, STEP);
        _tile_loadd(6, w, STEP);
        _tile_dpbsud(0, 4, 6);
        if constexpr (nw == 2) {
            _tile_loadd(7, w + stride, STEP);
            _tile_dpbsud(1, 4, 7);
        }
        if constexpr (nq == 2) {
            _tile_loadd(5, q + SIZE, STEP);
            _tile_dpbsud(2, 5, 6);
        }
        if constexpr (nq == 2 && nw == 2) {
            _tile_dpbsud(3, 5, 7);
        }
    }

    _tile_stored(0, sums[0][0], sizeof(sums[0][0][0]));
    if constexpr (nw == 2)            { _tile_stored(1, sums[0][1], sizeof(sums[0][0][0])); }
    if constexpr (nq == 2)            { _tile_stored(2, sums[1][0], sizeof(sums[0][0][0])); }
    if constexpr (nq == 2 && nw == 2) { _tile_stored(3, sums[1][1], sizeof(sums[0][0][0])); }
}

} // namespace row_scale_amx

#endif
