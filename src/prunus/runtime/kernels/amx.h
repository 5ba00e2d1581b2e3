// AMX: tile registers (Sapphire Rapids and later), on top of everything in avx512.h.
//
// On these processors, expanding values and multiplying them wait for the same execution port:
// `vpexpandw` takes it twice, and so does `vdpbf16ps`. A tile product takes it once per 512
// weights, so that only the expansion remains. The price is that weights pass through the first-
// level cache.
//
// Sixteen rows are expanded side by side, 512 columns at a time. While one block is expanded, the
// block before it is multiplied, and (with coded values) the next sixteen rows are decoded. So
// memory, ports and tiles are busy at the same time.
//
// Compilers do not allocate tile registers here: they are named by number, and a barrier keeps
// loads behind stores.
#pragma once

#include <algorithm>
#include <type_traits>

#include "panels.h"

#define PRUNUS_AMX_TARGET                                                                         \
    __attribute__((                                                                               \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16," \
               "popcnt,bmi,bmi2,amx-tile,amx-bf16,amx-int8")))

namespace prunus::amx {

using namespace panels;

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

// Copies sums (16 rows, 16 tokens) to the places of the rows' results.
PRUNUS_AMX_TARGET PRUNUS_INLINE void put_sums(const Job& job, int64_t row, int64_t end,
                                              const float* sums) {
    const __mmask16 inside = end - row >= kRows ? __mmask16(~0) : __mmask16((1 << (end - row)) - 1);
    __m512i r[16];
    PRUNUS_UNROLL for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(sums + i * 16);
    transpose(r);
    PRUNUS_UNROLL for (int i = 0; i < 16; ++i) if (i < job.tokens)
        _mm512_mask_storeu_ps(job.sums + i * job.rows + row, inside, _mm512_castsi512_ps(r[i]));
}

// ---- bfloat16, a few tokens. ----

constexpr int64_t kBlock =
    8;  // segments of a row that are expanded at a time: a tile of sixteen rows for every row

// A block that is expanded and waits to be multiplied.
struct Waiting {
    const uint8_t* weights;
    int64_t row_stride, tile_stride;  // bytes from row to row and from tile to tile
    const uint8_t* x;
    int64_t tiles, row, end;
    bool last;  // of its rows
};

// Sums are in tiles 0 and 1, which take turns.
struct Multiplier {
    const Job& job;

    PRUNUS_AMX_TARGET PRUNUS_INLINE void start() const {
        configure();
        _tile_zero(0);
        _tile_zero(1);
    }
    PRUNUS_AMX_TARGET PRUNUS_INLINE void step(const Waiting& waiting, int64_t tile) const {
        if (tile >= waiting.tiles) return;
        const uint8_t* weights = waiting.weights + tile * waiting.tile_stride;
        const uint8_t* x = waiting.x + tile * kTileBytes;
        barrier();
        if (tile & 1) {
            _tile_loadd(3, weights, waiting.row_stride);
            _tile_loadd(5, x, 64);
            _tile_dpbf16ps(1, 3, 5);
        } else {
            _tile_loadd(2, weights, waiting.row_stride);
            _tile_loadd(4, x, 64);
            _tile_dpbf16ps(0, 2, 4);
        }
        barrier();
    }
    PRUNUS_AMX_TARGET PRUNUS_INLINE void finish(const Waiting& waiting) const {
        if (!waiting.last) return;
        alignas(64) float sums[2][kRows * kRows];
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_zero(0);
        _tile_zero(1);
        barrier();
        for (int64_t i = 0; i < kRows * kRows; i += 16)
            _mm512_store_ps(sums[0] + i, _mm512_add_ps(_mm512_load_ps(sums[0] + i),
                                                       _mm512_load_ps(sums[1] + i)));
        put_sums(job, waiting.row, waiting.end, sums[0]);
    }
};

// Decodes the high bytes of sixteen rows, a few at every step.
struct Decoder {
    const Job& job;
    uint8_t* memory[2];
    int64_t which = 0, first = 0, last = 0, done = 0;

    PRUNUS_AMX_TARGET PRUNUS_INLINE void start(int64_t row, int64_t end) {
        const Groups groups(job, row, end);
        which ^= 1;
        first = done = groups.first;
        last = groups.last;
    }
    PRUNUS_AMX_TARGET PRUNUS_INLINE void step(int64_t groups) {
        const int64_t count = std::min(groups * kCodedGroup, last - done);
        const uint8_t* codes = job.coded->codes + done / 2;
        avx512::decode_high(codes, job.coded->high_bytes, count, memory[which] + (done - first));
        done += count;
    }
    PRUNUS_AMX_TARGET PRUNUS_INLINE void finish() {
        step((last - done) / kCodedGroup);
        for_rare(*job.coded, first, last,
                 [&](int64_t at, uint8_t high) { memory[which][at] = high; });
    }
    const uint8_t* at(int64_t row) const { return memory[which] + (row_begin(job, row) - first); }
};

constexpr int64_t kPanel = kBlock * 2 * kTileBytes;

// Writes the next segments of a row to their places in a panel.
template <bool inner, typename Source>
PRUNUS_AMX_TARGET PRUNUS_INLINE void expand_block(const Job& job, const uint8_t* mask,
                                                  Source& source, int64_t segment, int64_t count,
                                                  uint8_t* to) {
    PRUNUS_UNROLL for (int64_t i = 0; i < kBlock; ++i) {
        if (!inner && i >= count) return;
        uint64_t word;
        if (inner)
            std::memcpy(&word, mask + (segment + i) * 8, 8);
        else
            word = mask_word(mask, segment + i, job.cols);
        put_segment(source.next(word), to + i * 2 * kTileBytes);
    }
}

template <bool coded>
PRUNUS_AMX_TARGET void rows_bitmap(const Job& job, int64_t begin, int64_t end) {
    using Source = std::conditional_t<coded, CodedWords, Words>;
    const Multiplier multiplier{job};
    uint8_t* const panels[2] = {job.panels, job.panels + kPanel};
    Decoder decoder{job, {job.decoded, job.decoded + job.decoded_stride / 2}};
    const int64_t blocks = (job.segments + kBlock - 1) / kBlock;
    const auto* x = static_cast<const uint8_t*>(job.x);
    Waiting waiting{};
    multiplier.start();
    if (coded) {
        decoder.start(begin, begin + kRows < end ? begin + kRows : end);
        decoder.finish();
    }
    int parity = 0;
    for (int64_t row = begin; row < end; row += kRows) {
        const int64_t stop = row + kRows < end ? row + kRows : end;
        Source sources[kRows];
        const uint8_t* masks[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
            const int64_t which =
                row + r < stop ? row + r : stop - 1;  // rows past the last are computed in vain
            if constexpr (coded)
                sources[r] = {row_values<uint8_t>(job, which), decoder.at(which)};
            else
                sources[r] = {row_values<uint16_t>(job, which)};
            masks[r] = job.mask + which * job.mask_stride;
        }
        int64_t share = 0;
        if (coded && stop < end) {
            decoder.start(stop, stop + kRows < end ? stop + kRows : end);
            share = ((decoder.last - decoder.first) / kCodedGroup + kRows * blocks - 1) /
                    (kRows * blocks);
        }
        for (int64_t block = 0; block < blocks; ++block, parity ^= 1) {
            const int64_t segment = block * kBlock;
            const int64_t count = job.segments - segment < kBlock ? job.segments - segment : kBlock;
            uint8_t* panel = panels[parity];
            for (int64_t r = 0; r < kRows; ++r) {
                if (segment + kBlock < job.segments)
                    expand_block<true>(job, masks[r], sources[r], segment, kBlock, panel + r * 64);
                else
                    expand_block<false>(job, masks[r], sources[r], segment, count, panel + r * 64);
                multiplier.step(waiting, r);
                if (coded && share) decoder.step(share);
            }
            multiplier.finish(waiting);
            waiting = {panel,     64,  kTileBytes, x + segment * 2 * kTileBytes,
                       2 * count, row, stop,       block + 1 == blocks};
        }
        if (coded && share) decoder.finish();
    }
    for (int64_t tile = 0; tile < waiting.tiles; ++tile) multiplier.step(waiting, tile);
    multiplier.finish(waiting);
    _tile_release();
}

// All columns are stored and the width is a whole number of segments: tiles are loaded straight
// from rows of joined words.
PRUNUS_AMX_TARGET inline void rows_dense_coded(const Job& job, int64_t begin, int64_t end) {
    const Multiplier multiplier{job};
    const uint8_t* const low = static_cast<const uint8_t*>(job.coded->values);
    auto* const words = reinterpret_cast<uint16_t*>(job.decoded);
    multiplier.start();
    for (int64_t row = begin; row < end; row += kRows) {
        const int64_t stop = row + kRows < end ? row + kRows : end, first = row * job.cols,
                      last = stop * job.cols;
        for (int64_t at = first; at < last; at += kSegment) {
            avx512::prefetch(low + at, avx512::kCodedAhead);
            avx512::prefetch(job.coded->codes + at / 2, avx512::kCodedAhead / 2);
            const __m512i high = avx512::look_up(job.coded->codes + at / 2, job.coded->high_bytes);
            const Pair pair = avx512::join(_mm512_loadu_si512(low + at), high);
            _mm512_store_si512(words + (at - first), pair.low);
            _mm512_store_si512(words + (at - first) + 32, pair.high);
        }
        for_rare(*job.coded, first, last, [&](int64_t at, uint8_t high) {
            uint16_t& word = words[at / kSegment * kSegment + at % 2 * 32 + at % kSegment / 2];
            word = uint16_t(high << 8 | (word & 255));
        });
        const Waiting waiting{job.decoded,
                              2 * job.cols,
                              64,
                              static_cast<const uint8_t*>(job.x),
                              job.cols / kTileColumns,
                              row,
                              stop,
                              true};
        for (int64_t tile = 0; tile < waiting.tiles; ++tile) multiplier.step(waiting, tile);
        multiplier.finish(waiting);
    }
    _tile_release();
}

}  // namespace prunus::amx
