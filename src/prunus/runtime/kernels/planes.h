// Weights of integers in layered bit planes: their description and the parts that all instruction
// sets share.
//
// The columns of a weight are sorted into up to four classes. Every class has its own code. A value
// is split into raw low bits and a top; layer 0 holds a symbol of b bits for each top, one bit per
// plane. A symbol whose bits are all 1 is an escape: its value continues in the next layer, which
// holds symbols for escaped values only. What escapes from the last layer is one byte. Rows come in
// chunks, and a chunk holds all layers of its rows, class after class.
//
// A reader decodes the deeper layers of a chunk first, deepest first, into a buffer of bytes in the
// first-level cache. Then it decodes layer 0 row by row and takes the bytes of escaped values out
// of that buffer in order. All bytes are biased: value + bias of the class, from 1 to 255.
//
// This is done once, when a weight is loaded. lines.h describes what products read.
#pragma once

#include <cstdint>
#include <cstring>

#include "activations.h"
#include "job.h"
#include "kernels.h"
#include "portable.h"

namespace prunus::planes {

constexpr int kMaxClasses = 4, kMaxLayers = 8, kMaxBits = 4, kMaxRaw = 3;
constexpr int64_t kOffsets = kMaxLayers + 1;     // per class and chunk
constexpr int64_t kCodeBytes = kMaxLayers + 2;   // raw bits, number of layers, bits of each layer
// Activations are rounded in blocks of four groups of 64 columns. A product adds up a block in 16
// lanes, lane l the columns 4l to 4l + 3 of every group. Each lane has a scale of its own, which
// costs a product no more than one scale for all of them.
constexpr int64_t kBlockGroups = 4, kLanes = 16, kLaneBytes = kSegment / kLanes;
constexpr int64_t kBlock = kBlockGroups * kSegment;

struct Class {
    int raw, layers;
    int bits[kMaxLayers];
    int begin[kMaxLayers];  // the first zigzag number of each layer
    int bias;               // what is added to a value, so that its byte is not negative
    int zero;               // what products add instead
    int64_t columns, groups, first_block, blocks;
};

// One product out = x · Wᵀ + bias, or the expansion of W.
struct Planes {
    int64_t rows, cols, rows_per_chunk, chunks;
    const uint8_t* data;
    int64_t bytes;
    const uint8_t* class_of;  // (cols)
    const uint16_t* steps;    // (cols), bfloat16
    const uint16_t* scales;   // (rows), bfloat16
    const int64_t* offsets;   // (chunks, class_count, kOffsets), or null
    const uint8_t* lines;     // as lines.h describes them, or null
    int class_count;
    Class classes[kMaxClasses];
    int64_t blocks;           // of all classes

    // --- activations, in the order of the classes ---
    int64_t tokens;
    const int8_t* x;        // (tokens, blocks, 256), zero past the last column of a class
    const int8_t* x_lanes;  // (blocks, 256): of one token, in the order of lanes
    const float* x_scales;  // (tokens, blocks, kLanes)
    const int32_t* excess;  // (tokens, blocks, kLanes): minus zero · sum of x, for unsigned weights

    // --- the result ---
    const void* bias;  // (rows) of `out_kind`, or null
    void* out;         // (tokens, rows), or (rows, cols) for an expansion
    Kind out_kind;
    const float* steps_float;  // (cols), for expansions only
    const Job* matrix;         // the same product as one of matrices, where tiles compute it

    // --- memory of a thread ---
    int64_t buffer_bytes, row_bytes, tiles_at_once;
};

inline uint64_t load_word(const uint8_t* from) {
    uint64_t word;
    std::memcpy(&word, from, 8);
    return word;
}

inline int64_t top_words(const Class& c) { return c.layers ? c.bits[0] + c.raw : 8; }

// The top that a zigzag number stands for: 0, +1, -1, +2, -2, …
inline int unzigzag(int number) { return number % 2 ? (number + 1) / 2 : -(number / 2); }

// The byte of each symbol of a layer, without raw bits; 0 for the escape.
inline void make_table(const Class& c, int layer, int base, uint8_t* table) {
    const int symbols = (1 << c.bits[layer]) - 1;
    for (int symbol = 0; symbol < 16; ++symbol) {
        const int top = layer ? unzigzag(c.begin[layer] + symbol)
                              : (1 << (c.bits[0] - 1)) - 1 - symbol;
        table[symbol] = symbol < symbols ? uint8_t(top * (1 << c.raw) + base) : uint8_t(0);
    }
}

// Counts the symbols of `bits` planes that are all ones, in groups that lie `stride` words apart.
inline int64_t count_escapes(const uint8_t* words, int64_t groups, int bits, int64_t stride) {
    int64_t count = 0;
    for (int64_t group = 0; group < groups; ++group, words += stride * 8) {
        uint64_t escaped = load_word(words);
        for (int plane = 1; plane < bits; ++plane) escaped &= load_word(words + plane * 8);
        count += portable::popcount(escaped);
    }
    return count;
}

// Counts the columns of one class, in lanes that the compiler can keep in a vector.
inline int64_t count_columns(const uint8_t* class_of, int64_t cols, int which) {
    constexpr int64_t kLanes = 16, kMost = 255 * kLanes;
    int64_t count = 0;
    for (int64_t first = 0; first < cols; first += kMost) {
        const int64_t columns = cols - first < kMost ? cols - first : kMost;
        const uint8_t* at = class_of + first;
        uint8_t lanes[kLanes] = {};
        for (int64_t i = 0; i < columns / kLanes; ++i)
            for (int64_t lane = 0; lane < kLanes; ++lane)
                lanes[lane] = uint8_t(lanes[lane] + (at[i * kLanes + lane] == which));
        for (uint8_t lane : lanes) count += lane;
        for (int64_t i = columns / kLanes * kLanes; i < columns; ++i) count += at[i] == which;
    }
    return count;
}

// Reads the description and checks everything that does not need `data` or `offsets`.
inline int describe(Planes& job, const PrunusPlanes* weight) {
    if (!weight) return PRUNUS_BAD_ARGUMENT;
    const PrunusPlanes& w = *weight;
    constexpr int64_t kMost = int64_t(1) << 31;
    if (w.rows < 1 || w.cols < 1 || w.rows > kMost || w.cols > kMost || w.rows_per_chunk < 1 ||
        w.bytes < 0 || w.class_count < 1 || w.class_count > kMaxClasses || !w.classes || !w.codes ||
        (w.bytes && !w.data))
        return PRUNUS_BAD_ARGUMENT;
    job = Planes{};
    job.rows = w.rows;
    job.cols = w.cols;
    job.rows_per_chunk = w.rows_per_chunk < w.rows ? w.rows_per_chunk : w.rows;
    job.chunks = (w.rows + job.rows_per_chunk - 1) / job.rows_per_chunk;
    job.data = w.data;
    job.bytes = w.bytes;
    job.class_of = w.classes;
    job.steps = w.steps;
    job.scales = w.scales;
    job.offsets = w.offsets;
    job.lines = w.lines;
    job.class_count = int(w.class_count);
    int64_t columns = 0;
    for (int k = 0; k < job.class_count; ++k) {
        const uint8_t* code = w.codes + k * kCodeBytes;
        Class& c = job.classes[k];
        c.raw = code[0];
        c.layers = code[1];
        if (c.raw > kMaxRaw || c.layers > kMaxLayers || (c.raw && !c.layers))
            return PRUNUS_BAD_ARGUMENT;
        int begin = 0;
        for (int layer = 0; layer < c.layers; ++layer) {
            c.bits[layer] = code[2 + layer];
            if (c.bits[layer] < 1 || c.bits[layer] > kMaxBits) return PRUNUS_BAD_ARGUMENT;
            c.begin[layer] = begin;
            begin += (1 << c.bits[layer]) - 1;
        }
        c.bias = 128 + (c.raw ? 1 << (c.raw - 1) : 0);
        c.columns = count_columns(w.classes, w.cols, k);
        columns += c.columns;
        c.groups = (c.columns + kSegment - 1) / kSegment;
        c.blocks = (c.groups + kBlockGroups - 1) / kBlockGroups;
        c.first_block = job.blocks;
        job.blocks += c.blocks;
        const int64_t bytes = job.rows_per_chunk * c.groups * kSegment;
        if (bytes > job.buffer_bytes) job.buffer_bytes = bytes;
    }
    if (columns != w.cols) return PRUNUS_BAD_ARGUMENT;  // there is a class without a code
    // A full-width load may read 64 bytes more than a buffer holds.
    job.buffer_bytes += 2 * kSegment;
    job.row_bytes = job.blocks * kBlock;
    return PRUNUS_OK;
}

inline int64_t rows_of_chunk(const Planes& job, int64_t chunk) {
    const int64_t left = job.rows - chunk * job.rows_per_chunk;
    return left < job.rows_per_chunk ? left : job.rows_per_chunk;
}

// Finds where every layer begins and checks every length. No byte outside `data` is read, whatever
// `data` holds.
inline int find_offsets(const Planes& job, int64_t* offsets) {
    int64_t at = 0;
    for (int64_t chunk = 0; chunk < job.chunks; ++chunk) {
        for (int k = 0; k < job.class_count; ++k, offsets += kOffsets) {
            const Class& c = job.classes[k];
            for (int64_t layer = 0; layer < kOffsets; ++layer) offsets[layer] = -1;
            const int64_t values = rows_of_chunk(job, chunk) * c.groups * kSegment;
            int64_t escaped = values;
            for (int layer = 0; layer < c.layers; ++layer) {
                const int64_t groups = (escaped + kSegment - 1) / kSegment,
                              stride = layer ? c.bits[layer] : top_words(c);
                if (groups > (job.bytes - at) / (8 * stride)) return PRUNUS_TOO_SHORT;
                offsets[layer] = at;
                const uint8_t* words = job.data + at;
                at += groups * stride * 8;
                if (escaped % kSegment)
                    for (int plane = 0; plane < c.bits[layer]; ++plane)
                        if (load_word(job.data + at - (c.bits[layer] - plane) * 8) >>
                            escaped % kSegment)
                            return PRUNUS_BAD_PADDING;
                escaped = count_escapes(words, groups, c.bits[layer], stride);
            }
            const int64_t padded = (escaped + 7) / 8 * 8;
            if (padded > job.bytes - at) return PRUNUS_TOO_SHORT;
            offsets[c.layers] = at;
            for (int64_t i = escaped; i < padded; ++i)
                if (job.data[at + i]) return PRUNUS_BAD_PADDING;
            for (int64_t i = 0; c.raw && i < escaped; ++i) {
                const int top = int8_t(job.data[at + i]);
                if (top < -(128 >> c.raw) || top > 127 >> c.raw) return PRUNUS_BAD_VALUE;
            }
            at += padded;
        }
    }
    return at == job.bytes ? PRUNUS_OK : PRUNUS_TOO_LONG;
}

// Where a class of a chunk lies.
struct Part {
    const Class& c;
    const int64_t* offsets;
    int64_t end, rows;

    Part(const Planes& job, int64_t chunk, int k)
        : c(job.classes[k]), rows(rows_of_chunk(job, chunk)) {
        const int64_t at = chunk * job.class_count + k;
        offsets = job.offsets + at * kOffsets;
        end = at + 1 < job.chunks * job.class_count ? offsets[kOffsets] : job.bytes;
    }
};

// Decodes all layers of a class except layer 0 and returns the bytes of the values that escaped
// layer 0. `buffers` has room for two layers.
template <typename Isa>
inline const uint8_t* decode_deeper(const Planes& job, const Part& part, uint8_t* buffers) {
    const Class& c = part.c;
    uint8_t *from = buffers, *to = buffers + job.buffer_bytes;
    if (!c.layers) return from;
    const int base = Isa::base(c);
    const int64_t escapes = part.offsets[c.layers];
    Isa::escape_bytes(job.data + escapes, part.end - escapes, c.raw, base, from);
    for (int layer = c.layers - 1; layer > 0; --layer) {
        uint8_t table[16];
        make_table(c, layer, base, table);
        const int64_t bytes = part.offsets[layer + 1] - part.offsets[layer];
        Isa::layer(c.bits[layer], job.data + part.offsets[layer], bytes / (8 * c.bits[layer]),
                   table, from, to);
        uint8_t* const swapped = from;
        from = to;
        to = swapped;
    }
    return from;
}

// Decodes a chunk to biased bytes (rows, blocks, 256), in the order of the classes.
template <typename Isa>
inline void decode_chunk(const Planes& job, int64_t chunk, uint8_t* buffers, uint8_t* to) {
    for (int k = 0; k < job.class_count; ++k) {
        const Part part(job, chunk, k);
        const Class& c = part.c;
        if (!c.groups) continue;
        const uint8_t* escaped = decode_deeper<Isa>(job, part, buffers);
        Isa::top(c, job.data + part.offsets[0], part.rows, escaped, to + c.first_block * kBlock,
                 job.row_bytes);
    }
}

// ---- Activations. ----

// Puts x · step of one token into the order of the classes: to[k] has room for the columns of class
// k in whole groups and 16 more.
inline void order_columns(const Planes& job, const void* x, int64_t first, Kind kind,
                          float* const* to) {
    float* next[256];
    for (int k = 0; k < job.class_count; ++k) next[k] = to[k];
    for (int64_t column = 0; column < job.cols; ++column)
        *next[job.class_of[column]]++ =
            load_as_float(x, first + column, kind) * bf16_to_float(job.steps[column]);
}

// Rounds a block to int8, and gives every lane its scale: the largest magnitude / 127. A block that
// holds an infinity or a NaN gets NaN for all scales, so that the result is NaN and not a plausible
// number.
__attribute__((always_inline)) inline void round_block(const float* from, int64_t groups,
                                                       int8_t* to, float* scales) {
    int32_t largest[kSegment] = {};  // magnitudes of floats are ordered like their bits
    for (int64_t group = 0; group < groups; ++group) {
        for (int64_t i = 0; i < kSegment; ++i) {
            const int32_t bits = int32_t(float_to_bits(from[group * kSegment + i]) & 0x7fffffff);
            largest[i] = bits > largest[i] ? bits : largest[i];
        }
    }
    float inverse[kSegment];
    bool finite = true;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
        int32_t most = 0;
        for (int64_t i = lane * kLaneBytes; i < (lane + 1) * kLaneBytes; ++i)
            most = largest[i] > most ? largest[i] : most;
        finite = finite && most < 0x7f800000;
        scales[lane] = bits_to_float(uint32_t(most)) / 127.0f;
        // The inverse of a subnormal number may be infinite; then the lane becomes zero.
        const float one = scales[lane] > 0 ? 1.0f / scales[lane] : 0.0f;
        for (int64_t i = lane * kLaneBytes; i < (lane + 1) * kLaneBytes; ++i)
            inverse[i] = std::isfinite(one) ? one : 0.0f;
    }
    if (!finite) {
        std::memset(to, 0, size_t(groups * kSegment));
        for (int64_t lane = 0; lane < kLanes; ++lane) scales[lane] = NAN;
        return;
    }
    float scaled[kBlockGroups * kSegment];
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t i = 0; i < kSegment; ++i)
            scaled[group * kSegment + i] = from[group * kSegment + i] * inverse[i];
#if defined(__GNUC__)
    // A fused multiply-add would round numbers that lie between two integers differently. So the
    // products are in memory before they are rounded, and all machines agree.
    asm volatile("" : "+m"(scaled));
#endif
    // Adding and subtracting 1.5 · 2^23 rounds to nearest even without a library call.
    for (int64_t i = 0; i < groups * kSegment; ++i)
        to[i] = int8_t(int32_t((scaled[i] + 12582912.0f) - 12582912.0f));
}

// Lays out all tokens. `Isa` orders the columns and sums the excess.
template <typename Isa>
__attribute__((always_inline)) inline void lay_out_tokens(Planes& job, const void* x, Kind kind,
                                                          Scratch& scratch) {
    int8_t* to = aligned<int8_t>(scratch.x, job.tokens * job.row_bytes);
    float* scales = aligned<float>(scratch.x_scales, job.tokens * job.blocks * kLanes);
    int32_t* excess = aligned<int32_t>(scratch.x_excess, job.tokens * job.blocks * kLanes);
    float* ordered = sized<float>(scratch.x_float, job.row_bytes + kMaxClasses * 16);
    job.x = to;
    job.x_scales = scales;
    job.excess = excess;
    float* places[kMaxClasses];
    for (int k = 0; k < job.class_count; ++k)
        places[k] = ordered + job.classes[k].first_block * kBlock + k * 16;
    for (int64_t token = 0; token < job.tokens; ++token) {
        Isa::order(job, x, token * job.cols, kind, places);
        for (int k = 0; k < job.class_count; ++k) {
            const Class& c = job.classes[k];
            for (int64_t i = c.columns; i < c.groups * kSegment; ++i) places[k][i] = 0.0f;
            for (int64_t block = 0; block < c.blocks; ++block) {
                const int64_t left = c.groups - block * kBlockGroups,
                              groups = left < kBlockGroups ? left : kBlockGroups;
                round_block(places[k] + block * kBlock, groups, to, scales);
                Isa::sum_excess(to, groups, c.zero, excess);
                scales += kLanes;
                excess += kLanes;
                to += kBlock;
            }
        }
    }
}

// Copies the activations of one token in the order of lanes: (blocks, kLanes, groups, 4).
inline void lay_out_lanes(Planes& job, Scratch& scratch) {
    int8_t* to = sized<int8_t>(scratch.x_tiles, job.row_bytes);
    job.x_lanes = to;
    for (const int8_t *x = job.x, *const end = x + job.row_bytes; x < end; x += kBlock)
        for (int64_t lane = 0; lane < kLanes; ++lane)
            for (int64_t group = 0; group < kBlockGroups; ++group, to += kLaneBytes)
                std::memcpy(to, x + group * kSegment + lane * kLaneBytes, kLaneBytes);
}

// Turns a finished sum into a result.
inline void finish(const Planes& job, int64_t row, int64_t token, float sum) {
    sum *= bf16_to_float(job.scales[row]);
    if (job.bias) sum += load_as_float(job.bias, row, job.out_kind);
    store_as(job.out, token * job.rows + row, job.out_kind, sum);
}

// ---- Expansion. ----

// Converts one row of integers to the dtype of the result: integer · step · scale. The product is
// exact in float32 and is rounded once.
__attribute__((always_inline)) inline void convert_row(const Planes& job, const int8_t* levels,
                                                       int64_t first, int64_t count, float scale,
                                                       void* to, int64_t at) {
    const float* steps = job.steps_float + first;
    if (job.out_kind == kBf16) {
        uint16_t* words = static_cast<uint16_t*>(to) + at;
        for (int64_t i = 0; i < count; ++i) words[i] = float_to_bf16(levels[i] * steps[i] * scale);
    } else if (job.out_kind == kF16) {
        uint16_t* words = static_cast<uint16_t*>(to) + at;
        for (int64_t i = 0; i < count; ++i) words[i] = float_to_f16(levels[i] * steps[i] * scale);
    } else {
        float* floats = static_cast<float*>(to) + at;
        for (int64_t i = 0; i < count; ++i) floats[i] = levels[i] * steps[i] * scale;
    }
}

}  // namespace prunus::planes
