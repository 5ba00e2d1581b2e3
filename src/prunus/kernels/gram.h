// XᵀX of inputs in bfloat16, with tile registers or with AVX-512 BF16. gram.cpp divides the work.
//
// Inputs are packed into panels of 32 features. A panel is a row of tiles: 16 features of 32 tokens
// in 1 KiB, two tiles for the same tokens side by side. As right factor a tile holds (pair of
// tokens, feature, 2), which is also what `vdpbf16ps` reads. As left factor tile registers want
// (feature, pair of tokens, 2), its transpose. Zeros fill a panel past the last token and feature.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// All code here has one of these two targets.
#define PRUNUS_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define PRUNUS_AMX_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#define PRUNUS_INLINE __attribute__((always_inline)) inline
// An array of vectors stays in registers only if every loop over it is fully unrolled.
#define PRUNUS_UNROLL _Pragma("GCC unroll 64")

namespace prunus::gram {

constexpr int64_t kTileBytes = 1024;            // a tile register: sixteen rows of 64 bytes
constexpr int64_t kPanel = 32;                  // features of a panel
constexpr int64_t kTokens = 32;                 // tokens of a tile
constexpr int64_t kStepBytes = 2 * kTileBytes;  // a panel's bytes for the tokens of a tile

// Transposes sixteen rows of sixteen 32-bit words.
PRUNUS_TARGET PRUNUS_INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    PRUNUS_UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    PRUNUS_UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    PRUNUS_UNROLL for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    PRUNUS_UNROLL for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Packs up to 32 tokens of all features: panel i begins at i · stride. `left` may be null.
PRUNUS_TARGET inline void pack(const uint16_t* x, int64_t tokens, int64_t features, int64_t stride,
                               uint8_t* left, uint8_t* right) {
    alignas(64) static constexpr auto kOrder = [] {
        struct {
            uint16_t at[2][32];
        } order{};
        for (int i = 0; i < 32; ++i)
            for (int half = 0; half < 2; ++half)
                order.at[half][i] = uint16_t(half * 16 + i / 2 + i % 2 * 32);
        return order;
    }();
    for (int64_t first = 0; first < features; first += kPanel, right += stride) {
        const int64_t count = features - first;
        const __mmask32 inside = count >= kPanel ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
        __m512i halves[2][16];
        PRUNUS_UNROLL for (int64_t pair = 0; pair < 16; ++pair) {
            const uint16_t* from = x + 2 * pair * features + first;
            const __mmask32 one = 2 * pair < tokens ? inside : 0;
            const __mmask32 other = 2 * pair + 1 < tokens ? inside : 0;
            const __m512i a = _mm512_maskz_loadu_epi16(one, from);
            const __m512i b = _mm512_maskz_loadu_epi16(other, from + features);
            PRUNUS_UNROLL for (int half = 0; half < 2; ++half) halves[half][pair] =
                _mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder.at[half]), b);
        }
        PRUNUS_UNROLL for (int half = 0; half < 2; ++half) {
            uint8_t* to = right + half * kTileBytes;
            PRUNUS_UNROLL for (int i = 0; i < 16; ++i)
                _mm512_store_si512(to + i * 64, halves[half][i]);
            if (!left) continue;
            transpose(halves[half]);
            to = left + half * kTileBytes;
            PRUNUS_UNROLL for (int i = 0; i < 16; ++i)
                _mm512_store_si512(to + i * 64, halves[half][i]);
        }
        if (left) left += stride;
    }
}

// ---- Tile registers (Sapphire Rapids and later). ----
//
// Compilers do not allocate them here: they are named by number, and a barrier keeps loads behind
// stores.

struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
};

PRUNUS_INLINE void barrier() { asm volatile("" ::: "memory"); }

// All tiles are whole: sixteen rows of 64 bytes.
PRUNUS_AMX_TARGET PRUNUS_INLINE void configure() {
    Config config;
    for (int tile = 0; tile < 8; ++tile) config.rows[tile] = 16, config.bytes_per_row[tile] = 64;
    _tile_loadconfig(&config);
}

// Computes the products of two panels over `tiles` tiles of tokens: sums (32, 32).
PRUNUS_AMX_TARGET inline void multiply_tiles(const uint8_t* left, const uint8_t* right,
                                             int64_t tiles, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    barrier();
    for (int64_t i = 0; i < tiles; ++i, left += kStepBytes, right += kStepBytes) {
        _tile_loadd(6, right, 64);
        _tile_loadd(4, left, 64);
        _tile_loadd(7, right + kTileBytes, 64);
        _tile_loadd(5, left + kTileBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 4 * kPanel);
    _tile_stored(1, sums + 16, 4 * kPanel);
    _tile_stored(2, sums + 16 * kPanel, 4 * kPanel);
    _tile_stored(3, sums + 16 * kPanel + 16, 4 * kPanel);
    barrier();
}

// ---- Vectors of AVX-512. ----

// The same with vectors. Here the left factor has the form of the right one.
PRUNUS_TARGET inline void multiply_vectors(const uint8_t* left, const uint8_t* right, int64_t tiles,
                                           float* sums) {
    constexpr int64_t kRows = 8;
    for (int64_t row = 0; row < kPanel; row += kRows) {
        __m512 sum[kRows][2];
        PRUNUS_UNROLL for (int64_t i = 0; i < kRows; ++i)
            sum[i][0] = sum[i][1] = _mm512_setzero_ps();
        const uint8_t* a = left + row / 16 * kTileBytes + row % 16 * 4;
        const uint8_t* b = right;
        for (int64_t tile = 0; tile < tiles; ++tile, a += kStepBytes, b += kStepBytes) {
            for (int64_t pair = 0; pair < 16; ++pair) {
                const auto low = (__m512bh)_mm512_load_si512(b + pair * 64);
                const auto high = (__m512bh)_mm512_load_si512(b + kTileBytes + pair * 64);
                PRUNUS_UNROLL for (int64_t i = 0; i < kRows; ++i) {
                    int32_t both;
                    std::memcpy(&both, a + pair * 64 + i * 4, 4);
                    const auto value = (__m512bh)_mm512_set1_epi32(both);
                    sum[i][0] = _mm512_dpbf16_ps(sum[i][0], value, low);
                    sum[i][1] = _mm512_dpbf16_ps(sum[i][1], value, high);
                }
            }
        }
        PRUNUS_UNROLL for (int64_t i = 0; i < kRows; ++i) {
            _mm512_store_ps(sums + (row + i) * kPanel, sum[i][0]);
            _mm512_store_ps(sums + (row + i) * kPanel + 16, sum[i][1]);
        }
    }
}

// Adds sums (32, 32) to the block at `to` of a matrix, of which only `rows` and `columns` exist.
PRUNUS_TARGET inline void add_block(const float* sums, float* to, int64_t stride, int64_t rows,
                                    int64_t columns) {
    const __mmask16 low = columns >= 16 ? 0xffff : __mmask16((1 << columns) - 1);
    const __mmask16 high = columns >= kPanel ? 0xffff
                           : columns > 16    ? __mmask16((1 << (columns - 16)) - 1)
                                             : 0;
    for (int64_t row = 0; row < rows; ++row, to += stride, sums += kPanel) {
        _mm512_mask_storeu_ps(
            to, low, _mm512_add_ps(_mm512_maskz_loadu_ps(low, to), _mm512_load_ps(sums)));
        _mm512_mask_storeu_ps(
            to + 16, high,
            _mm512_add_ps(_mm512_maskz_loadu_ps(high, to + 16), _mm512_load_ps(sums + 16)));
    }
}

// Copies 16 rows of 16 columns at `from` to its transpose at `to`, of which only `rows` and
// `columns` exist.
PRUNUS_TARGET PRUNUS_INLINE void copy_transposed(const float* from, float* to, int64_t stride,
                                                 int64_t rows, int64_t columns) {
    if (rows <= 0) return;
    const __mmask16 low = rows >= 16 ? 0xffff : __mmask16((1 << rows) - 1);
    const __mmask16 inside = columns >= 16 ? 0xffff : __mmask16((1 << columns) - 1);
    __m512i r[16];
    PRUNUS_UNROLL for (int i = 0; i < 16; ++i)
        r[i] = _mm512_maskz_loadu_epi32(low >> i & 1 ? inside : 0, from + i * stride);
    transpose(r);
    PRUNUS_UNROLL for (int i = 0; i < 16; ++i) if (inside >> i & 1)
        _mm512_mask_storeu_epi32(to + i * stride, low, r[i]);
}

}  // namespace prunus::gram
