// Many tokens with AMX: as in many.h, with two panels times two blocks of tokens at a time in four
// tiles of sums.
#pragma once

#include <algorithm>

#include "amx.h"
#include "many.h"

namespace prunus::amx {

// Columns are processed in turns of 2048, so that 64 KiB of a panel and of a block meet in the
// second-level cache.
constexpr int64_t kTilesAtOnce = 64;
constexpr int64_t kMostPanels = 8;

// One turn of columns: tiles `first` to `last` - 1 of `total`.
struct Turn {
    int64_t first, last, total;
};

// Multiplies P panels by B blocks of tokens. The sums so far are at `sums`: one block (16 rows, 16
// tokens) after the other, and `panel_sums` apart from panel to panel.
template <int P, int B>
PRUNUS_AMX_TARGET void multiply_panels(const Job& job, const Turn& turn, const uint8_t* weights,
                                       int64_t row, int64_t end, int64_t block, float* sums,
                                       int64_t panel_sums) {
    constexpr int64_t kSums = kRows * kRows;
    const int64_t size = turn.total * kTileBytes;
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + block * size + turn.first * kTileBytes;
    weights += turn.first * kTileBytes;
    barrier();
    if (turn.first == 0) {
        _tile_zero(0);
        if (B > 1) _tile_zero(1);
        if (P > 1) _tile_zero(2);
        if (P > 1 && B > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        if (B > 1) _tile_loadd(1, sums + kSums, 64);
        if (P > 1) _tile_loadd(2, sums + panel_sums, 64);
        if (P > 1 && B > 1) _tile_loadd(3, sums + panel_sums + kSums, 64);
    }
    for (int64_t tile = turn.first; tile < turn.last;
         ++tile, weights += kTileBytes, x += kTileBytes) {
        _tile_loadd(4, weights, 64);
        _tile_loadd(6, x, 64);
        if (P > 1) _tile_loadd(5, weights + size, 64);
        if (B > 1) _tile_loadd(7, x + size, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (B > 1) _tile_dpbf16ps(1, 4, 7);
        if (P > 1) _tile_dpbf16ps(2, 5, 6);
        if (P > 1 && B > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    if (B > 1) _tile_stored(1, sums + kSums, 64);
    if (P > 1) _tile_stored(2, sums + panel_sums, 64);
    if (P > 1 && B > 1) _tile_stored(3, sums + panel_sums + kSums, 64);
    barrier();
    if (turn.last < turn.total) return;
    for (int p = 0; p < P; ++p)
        for (int b = 0; b < B; ++b)
            finish_block(job, row + p * kRows, end, (block + b) * kRows,
                         sums + p * panel_sums + b * kSums);
}

// The number of panels that are multiplied before the next ones are filled: each block of tokens is
// read once for all of them. It leaves every thread several rounds.
inline int64_t panels_at_once(const Job& job, int threads) {
    const int64_t blocks = blocks_of(job);  // with few, panels had better stay in the cache
    const int64_t panels =
        std::min({kMostPanels, blocks, job.rows / (kRows * 4 * std::max(threads, 1))});
    return std::max<int64_t>(panels & ~int64_t(1), 2);
}

// Bytes of one thread's panels and sums.
inline int64_t many_bytes(const Job& job, int64_t panels) {
    const int64_t blocks = blocks_of(job);
    return panels *
           (2 * job.segments * kTileBytes + blocks * kRows * kRows * int64_t(sizeof(float)));
}

// Calls fill(job, first row, past the last, panel) for every panel.
template <typename Fill>
PRUNUS_AMX_TARGET PRUNUS_INLINE void multiply_rows(const Job& job, int64_t begin, int64_t end,
                                                   const Fill& fill) {
    const int64_t blocks = blocks_of(job), tiles = 2 * job.segments,
                  size = tiles * kTileBytes;
    const int64_t panel_sums = blocks * kRows * kRows;
    float* const all_sums = reinterpret_cast<float*>(job.panels + job.rows_at_once / kRows * size);
    configure();
    for (int64_t row = begin; row < end; row += job.rows_at_once) {
        const int64_t stop = row + job.rows_at_once < end ? row + job.rows_at_once : end;
        uint8_t* panel = job.panels;
        for (int64_t first = row; first < stop; first += kRows, panel += size)
            fill(job, first, first + kRows < stop ? first + kRows : stop, panel);
        for (int64_t tile = 0; tile < tiles; tile += kTilesAtOnce) {
            const Turn turn{tile, tile + kTilesAtOnce < tiles ? tile + kTilesAtOnce : tiles, tiles};
            for (int64_t block = 0; block < blocks; block += 2) {
                const bool two = block + 1 < blocks;
                float* sums = all_sums + block * kRows * kRows;
                panel = job.panels;
                for (int64_t first = row; first < stop;
                     first += 2 * kRows, panel += 2 * size, sums += 2 * panel_sums) {
                    const auto multiply =
                        first + kRows < stop
                            ? (two ? multiply_panels<2, 2> : multiply_panels<2, 1>)
                            : (two ? multiply_panels<1, 2> : multiply_panels<1, 1>);
                    multiply(job, turn, panel, first, stop, block, sums, panel_sums);
                }
            }
        }
    }
    _tile_release();
}

template <many::Fill fill>
PRUNUS_AMX_TARGET void rows_many(const Job& job, int64_t begin, int64_t end) {
    multiply_rows(job, begin, end, fill);
}

}  // namespace prunus::amx
