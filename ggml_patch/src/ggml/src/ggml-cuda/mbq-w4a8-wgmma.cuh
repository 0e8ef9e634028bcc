#pragma once

// What mbq_w4a8_gemm (mbq-w4a8-gemm.cuh) is made of: the shape of its tiles, its shared memory, and int8 wgmma.

#include "mbq-gemm.cuh"
#include "mbq-w4a8-codes.cuh"

// BM rows and BN columns a tile, CL CTAs a cluster, XS and WS stages of activations and weights. dense: see mbq_w4a8_pair. codes: results are int8 (mbq-w4a8-codes.cuh)
template <int bits_, int BM_, int BN_, int CL_, int XS_, int WS_, bool dense_, bool codes_ = false> struct mbq_w4a8_tile {
    static constexpr int  bits = bits_, BM = BM_, BN = BN_, CL = CL_, XS = XS_, WS = WS_;
    static constexpr bool dense = dense_, codes = codes_;
    static constexpr bool turns = BM == 64;  // the two groups of consumers take whole tiles in turn
    static constexpr int  WARPS = BM/16;     // consumers of a tile
    static constexpr int  X_BYTES   = BN*128;
    static constexpr int  ROW_BYTES = dense ? mbq_w4a8_layout<bits>::group_bytes : bits == 4 ? 176 : 304; // up to 15 bytes more; 4 or 12 banks from row to row
    static constexpr int  W_BYTES   = BM*ROW_BYTES;
    static constexpr int  BYTES     = 1024 + XS*X_BYTES + WS*W_BYTES;
    static constexpr int  BARRIERS  = 2*XS + 2*WS + 2;
};

struct mbq_w4a8_gemm_matrix {
    const char  * w;
    float       * dst;
    const float * bias;   // of each row, added to its products; nullptr: none
    const float * more;   // of each product, added behind that; nullptr: none
    int64_t dst_column, more_column; // elements
    int M;
    int tile;             // its first one of workers, in rows
    bool halves;          // results are F16, each column from where its floats would begin
};

struct mbq_w4a8_args {
    mbq_gemm_args gemm;   // x_tiles: int8; parts: integers; K in pairs of activations (2 bytes, as fp16 there), of rows padded to 256 activations. Without
                          // w, dst, dst_column and M, which are of each matrix
    mbq_w4a8_gemm_matrix of[MBQ_W4A8_MATRICES]; // one behind the other; tile = INT_MAX: no such one
    const float * scale;  // of each column
    int blocks;           // of a row
    mbq_w4a8_codes codes; // of a tile with codes: where they go

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

#define D8(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
static __device__ __forceinline__ void mbq_wgmma_s8(int (&d)[32], const uint32_t (&a)[4], const uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1;"
        : D8(0), D8(8), D8(16), D8(24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

static __device__ __forceinline__ void mbq_wgmma_s8(int (&d)[64], const uint32_t (&a)[4], const uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1;"
        : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

static __device__ __forceinline__ void mbq_wgmma_s8(int (&d)[128], const uint32_t (&a)[4], const uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "{%128, %129, %130, %131}, %132, 1;"
        : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56),
          D8(64), D8(72), D8(80), D8(88), D8(96), D8(104), D8(112), D8(120)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef D8

// The box at (x, y, 0) of a map
static __device__ __forceinline__ void mbq_box_copy_3d(const uint32_t dst, const CUtensorMap & map, const int x, const int y, const uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
        : : "r"(dst), "l"(&map), "r"(x), "r"(y), "r"(0), "r"(barrier) : "memory");
}

// The box at (x, 0, 0, y, z) of a map
static __device__ __forceinline__ void mbq_box_copy_5d(const uint32_t dst, const CUtensorMap & map, const int x, const int y, const int z, const uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %3, %4, %5}], [%6];"
        : : "r"(dst), "l"(&map), "r"(x), "r"(0), "r"(y), "r"(z), "r"(barrier) : "memory");
}

// Which rows of weights a thread multiplies, of a CTA's tile that begins at row `first` of a matrix, counted as tiles lie: the first one of two, the other is the next; and
// where the stage has them (their slots). The tile's rows are the next BM. With codes they are 16 from each 64 of 256 for each group, whose codes are then whole words of
// 16 bytes (mbq_w4a8_unit_k).
template <typename T> struct mbq_w4a8_tile_rows {
    static constexpr int groups = T::BM/64;

    static __device__ __forceinline__ int row(const int first, const int warp, const int g) {
        if constexpr (T::codes) {
            return first/256*256 + warp%4*64 + (first%256/64 + (groups == 2 ? warp/4 : 0))*16 + 2*g;
        } else {
            return first + warp % T::WARPS*16 + 2*g;
        }
    }

    static __device__ __forceinline__ int slot(const int warp, const int g, const int r) {
        if constexpr (T::codes) {
            return (warp%4*groups + (groups == 2 ? warp/4 : 0))*16 + 8*r + g;
        } else {
            return warp % T::WARPS*8 + g + r*(T::BM/2); // see mbq_w4a8_slot
        }
    }
};

#endif // MBQ_WGMMA
