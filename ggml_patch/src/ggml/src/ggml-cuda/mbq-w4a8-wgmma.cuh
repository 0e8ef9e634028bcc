#pragma once

// Building blocks of mbq_w4a8_gemm (mbq-w4a8-gemm.cuh): the shape of its tiles, its shared memory, and int8 wgmma.

#include "mbq-gemm.cuh"
#include "mbq-rope.cuh"
#include "mbq-w4a8-codes.cuh"

// The format of a product's results
enum mbq_w4a8_results {
    MBQ_W4A8_PLAIN, // floats, or F16
    MBQ_W4A8_CODES, // int8 (mbq-w4a8-codes.cuh)
    MBQ_W4A8_HEADS, // q, k and v for attention (mbq-w4a8-heads.cuh)
};

// BM rows and BN columns per tile, CL CTAs per cluster, XS and WS stages of activations and weights. dense: see mbq_w4a8_pair
template <int bits_, int BM_, int BN_, int CL_, int XS_, int WS_, bool dense_, mbq_w4a8_results results = MBQ_W4A8_PLAIN> struct mbq_w4a8_tile {
    static constexpr int  bits = bits_, BM = BM_, BN = BN_, CL = CL_, XS = XS_, WS = WS_;
    static constexpr bool dense = dense_, codes = results == MBQ_W4A8_CODES, heads = results == MBQ_W4A8_HEADS;
    static constexpr bool turns = BM == 64;  // the two groups of consumers alternate between whole tiles
    static constexpr int  WARPS = BM/16;     // consumers per tile
    static constexpr int  X_BYTES   = BN*128;
    static constexpr int  ROW_BYTES = dense ? mbq_w4a8_layout<bits>::group_bytes : bits == 4 ? 176 : 304; // up to 15 bytes more; rows are 4 or 12 banks apart
    static constexpr int  W_BYTES   = BM*ROW_BYTES;
    static constexpr int  BYTES     = 1024 + XS*X_BYTES + WS*W_BYTES;
    static constexpr int  BARRIERS  = 2*XS + 2*WS + 2;
    static_assert(turns || results == MBQ_W4A8_PLAIN, "ends of other results are not fitted, and left out");
};

struct mbq_w4a8_gemm_matrix {
    const char  * w;
    float       * dst;
    const float * bias;   // per row, added to its products; nullptr: none
    const float * more;   // per product, added after the bias; nullptr: none
    int64_t dst_column, more_column; // in elements
    int M;
    int tile;             // its first tile, in units of workers along the rows
    bool halves;          // results are F16, each column at the start of its floats
    int64_t dst_head;     // heads: stride between heads in F16 elements; dst_column then counts F16, too
    float   turn;         // heads: factor after the rotary embedding; 0: no rotary embedding
};

struct mbq_w4a8_args {
    mbq_gemm_args gemm;   // x_tiles: int8; parts: integers; K in pairs of activations (2 bytes, as fp16 there), of rows padded to 256. w, dst,
                          // dst_column and M are unused: each matrix has its own
    mbq_w4a8_gemm_matrix of[MBQ_W4A8_MATRICES]; // consecutive tiles; tile = INT_MAX: none
    const float * scale;  // per column
    int blocks;           // per row
    mbq_w4a8_codes codes; // of a tile with codes: their destination
    mbq_rope_angles angles; // of a tile of heads

    __device__ __forceinline__ int matrix(const int m_tile) const {
        return (m_tile >= of[1].tile) + (m_tile >= of[2].tile);
    }
};

#ifdef MBQ_WGMMA

template <typename T> struct mbq_w4a8_smem {
    uint32_t x, w, full_x, empty_x, full_w, empty_w, turn; // addresses in shared memory

    __device__ __forceinline__ mbq_w4a8_smem(const char * dynamic, const uint64_t * barriers) {
        asm volatile("add.u32 %0, %1, 1023;\nand.b32 %0, %0, 0xFFFFFC00;" : "=r"(x) : "r"((uint32_t) __cvta_generic_to_shared(dynamic)));
        w       = x + T::XS*T::X_BYTES;
        full_x  = __cvta_generic_to_shared(barriers);
        empty_x = full_x  + 8*T::XS;
        full_w  = empty_x + 8*T::XS;
        empty_w = full_w  + 8*T::WS;
        turn    = empty_w + 8*T::WS;
    }

    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < T::XS; ++i) {
            mbq_barrier_init(full_x  + 8*i, 1);
            mbq_barrier_init(empty_x + 8*i, T::WARPS*T::CL);
        }
        for (int i = 0; i < T::WS; ++i) {
            mbq_barrier_init(full_w  + 8*i, T::dense ? 1 : 96);
            mbq_barrier_init(empty_w + 8*i, T::WARPS*32);
        }
        for (int i = 0; i < 2; ++i) {
            mbq_barrier_init(turn + 8*i, 128);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
    }
};

// d += A*B. A: 64 rows times 32 of K in registers; B: 32 of K in shared memory, times twice as many columns as d has sums
#define D8(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define MBQ_WGMMA_S8(columns, sums, a0, a1, a2, a3, from, ...)                                                                             \
    static __device__ __forceinline__ void mbq_wgmma_s8(int (&d)[columns/2], const uint32_t (&a)[4], const uint64_t b) {                   \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.s8.s8 {" sums "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, "   \
            "%" #from ", 1;" : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                          \
    }
#define S32   "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define S64   S32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define S80   S64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define S88   S80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define S128  S88 ", %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
MBQ_WGMMA_S8( 64, S32,   32,  33,  34,  35,  36, D8(0), D8(8), D8(16), D8(24))
MBQ_WGMMA_S8(128, S64,   64,  65,  66,  67,  68, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56))
MBQ_WGMMA_S8(160, S80,   80,  81,  82,  83,  84, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72))
MBQ_WGMMA_S8(176, S88,   88,  89,  90,  91,  92, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72), D8(80))
MBQ_WGMMA_S8(256, S128, 128, 129, 130, 131, 132, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72), D8(80), D8(88), D8(96), D8(104), D8(112), D8(120))
#undef S32
#undef S64
#undef S80
#undef S88
#undef S128
#undef MBQ_WGMMA_S8
#undef D8

// Copies columns of activations to the same address in all CTAs of the cluster
template <int CL>
static __device__ __forceinline__ void mbq_w4a8_copy_columns(const uint32_t to, const char * from, const int bytes, const uint32_t full) {
    if constexpr (CL == 1) {
        mbq_bulk_copy(to, from, bytes, full);
    } else {
        mbq_multicast(to, from, bytes, full, (1 << CL) - 1);
    }
}

// Copies the box at (x, y, 0) of a tensor map
static __device__ __forceinline__ void mbq_box_copy_3d(const uint32_t dst, const CUtensorMap & map, const int x, const int y, const uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
        : : "r"(dst), "l"(&map), "r"(x), "r"(y), "r"(0), "r"(barrier) : "memory");
}

// Copies the box at (x, 0, 0, y, z) of a tensor map
static __device__ __forceinline__ void mbq_box_copy_5d(const uint32_t dst, const CUtensorMap & map, const int x, const int y, const int z, const uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %3, %4, %5}], [%6];"
        : : "r"(dst), "l"(&map), "r"(x), "r"(0), "r"(y), "r"(z), "r"(barrier) : "memory");
}

// The slot of row i of a stage: rows 2i and 2i + 1 become rows i and i + 8 of an A operand, because results are stored in pairs.
template <typename T>
static __device__ __forceinline__ int mbq_w4a8_slot(const int row) {
    return row%2*(T::BM/2) + row/2;
}

// Which rows of weights a thread multiplies, and their slots in the stage. The CTA's tile has BM rows, from row `first` of a matrix on, in the order of tiles.
// row() is the first of a thread's two rows; usually the other is the next one. With codes, the tile has 16 rows of each 64 of 256, whose codes are then whole
// 16-byte words (mbq_w4a8_unit_k). With heads, the two rows are rotated together, half a head apart: a warp has eight such pairs, all of one head.
template <typename T> struct mbq_w4a8_tile_rows {
    // pairs: per head
    static __device__ __forceinline__ int row(const int first, const int warp, const int g, const int pairs) {
        if constexpr (T::codes) {
            return first/256*256 + warp%4*64 + first%256/64*16 + 2*g;
        } else if constexpr (T::heads) {
            const int i = first/2 + warp % T::WARPS*8; // among all pairs
            return i + i/pairs*pairs + g;
        } else {
            return first + warp % T::WARPS*16 + 2*g;
        }
    }

    // Distance between the two rows
    static __device__ __forceinline__ int apart(const int pairs) {
        return T::heads ? pairs : 1;
    }

    static __device__ __forceinline__ int slot(const int warp, const int g, const int r) {
        if constexpr (T::heads) {
            return (warp % T::WARPS*2 + r)*8 + g;
        } else if constexpr (T::codes) {
            return warp%4*16 + 8*r + g;
        } else {
            return warp % T::WARPS*8 + g + r*(T::BM/2); // see mbq_w4a8_slot
        }
    }
};

#endif // MBQ_WGMMA
