// Many tokens at once: rows are expanded into panels that stay in the second-level cache, and
// multiplied there.
//
// The alternative, writing the whole weight to memory and reading it back for torch's product,
// costs a prompt of a hundred tokens a quarter of its speed.
#pragma once

#include "panels.h"

namespace prunus::many {

using namespace panels;

using Fill = void (*)(const Job&, int64_t begin, int64_t end, uint8_t* to);

// Rows that share each load of activations.
constexpr int64_t kRowsAtOnce = 2 * kRows;

// Multiplies `B` blocks of tokens by eight rows of a panel, whose first row is at `weights`. Sums
// of (8 rows, B · 16 tokens) go to (B, 16 rows, 16).
template <int B>
PRUNUS_TARGET PRUNUS_INLINE void multiply(const uint8_t* weights, const uint8_t* x, int64_t tiles,
                                          float* sums) {
    constexpr int R = 8;
    __m512 sum[R][B];
    PRUNUS_UNROLL for (int r = 0; r < R; ++r) PRUNUS_UNROLL for (int b = 0; b < B; ++b) sum[r][b] =
        _mm512_setzero_ps();
    for (int64_t tile = 0; tile < tiles; ++tile, weights += kTileBytes, x += kTileBytes) {
        for (int pair = 0; pair < 16; ++pair) {
            __m512bh activations[B];
            PRUNUS_UNROLL for (int b = 0; b < B; ++b) activations[b] =
                (__m512bh)_mm512_load_si512(x + b * tiles * kTileBytes + pair * 64);
            PRUNUS_UNROLL for (int r = 0; r < R; ++r) {
                int32_t word;
                std::memcpy(&word, weights + r * 64 + pair * 4, 4);
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(word);
                PRUNUS_UNROLL for (int b = 0; b < B; ++b) sum[r][b] =
                    _mm512_dpbf16_ps(sum[r][b], weight, activations[b]);
            }
        }
    }
    PRUNUS_UNROLL for (int r = 0; r < R; ++r) PRUNUS_UNROLL for (int b = 0; b < B; ++b)
        _mm512_store_ps(sums + (b * kRows + r) * 16, sum[r][b]);
}

template <int B>
PRUNUS_TARGET void multiply_panel(const Job& job, int64_t row, int64_t end, int64_t block,
                                  const uint8_t* panel) {
    alignas(64) float sums[B * kRows * 16];
    const int64_t tiles = 2 * job.segments;
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + block * tiles * kTileBytes;
    for (int half = 0; half < 2; ++half)
        multiply<B>(panel + half * 8 * 64, x, tiles, sums + half * 8 * 16);
    for (int b = 0; b < B; ++b)
        finish_block(job, row, end, (block + b) * kRows, sums + b * kRows * 16);
}

template <Fill fill>
PRUNUS_TARGET void rows(const Job& job, int64_t begin, int64_t end) {
    const int64_t blocks = blocks_of(job),
                  panel_size = 2 * job.segments * kTileBytes;
    for (int64_t row = begin; row < end; row += kRowsAtOnce) {
        for (int64_t first = row, panel = 0; first < row + kRowsAtOnce && first < end;
             first += kRows, ++panel)
            fill(job, first, first + kRows < end ? first + kRows : end,
                 job.panels + panel * panel_size);
        for (int64_t block = 0; block < blocks; block += 3) {
            for (int64_t first = row, panel = 0; first < row + kRowsAtOnce && first < end;
                 first += kRows, ++panel) {
                const uint8_t* weights = job.panels + panel * panel_size;
                const int64_t left = blocks - block;
                if (left >= 3)
                    multiply_panel<3>(job, first, end, block, weights);
                else if (left == 2)
                    multiply_panel<2>(job, first, end, block, weights);
                else
                    multiply_panel<1>(job, first, end, block, weights);
            }
        }
    }
}

}  // namespace prunus::many
