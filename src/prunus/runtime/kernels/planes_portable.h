// Layered bit planes in plain C++ for every machine. Tests compare the other instruction sets with
// it.
#pragma once

#include <array>

#include "lines.h"

namespace prunus::planes {

// entry[bits] has byte i set to 1 where bit i is set.
struct Spread {
    std::array<uint64_t, 256> entry;
};

constexpr Spread make_spread() {
    Spread spread{};
    for (int bits = 0; bits < 256; ++bits)
        for (int i = 0; i < 8; ++i) spread.entry[bits] |= uint64_t(bits >> i & 1) << 8 * i;
    return spread;
}

inline constexpr Spread kSpread = make_spread();

struct Portable {
    // What an exception costs in a product, in bytes that are read meanwhile: its own two, and
    // about four processor cycles. Products of Qwen2.5-Coder-1.5B at 2.8 bits take as long with 16
    // as with 8 (AVX-512), and 15 to 20 % longer with 3.
    static constexpr int64_t kExceptionPrice = 8;

    // What is added to a top's multiple to give the byte of an escaped value.
    static int base(const Class&) { return 128; }

    static void escape_bytes(const uint8_t* from, int64_t count, int raw, int base, uint8_t* to) {
        for (int64_t i = 0; i < count; ++i) to[i] = uint8_t((from[i] << raw) + base);
    }

    // Decodes a group of 64 symbols. Bytes of escaped values come from `escaped`.
    static void group(int bits, int raw, const uint8_t* words, const uint8_t* table,
                      const uint8_t*& escaped, uint8_t* to) {
        for (int eight = 0; eight < 8; ++eight, ++words, to += 8) {
            uint64_t symbols = 0, low = 0;
            for (int plane = 0; plane < bits; ++plane)
                symbols |= kSpread.entry[words[plane * 8]] << plane;
            for (int plane = 0; plane < raw; ++plane)
                low |= kSpread.entry[words[(bits + plane) * 8]] << plane;
            const unsigned escape = (1u << bits) - 1;
            for (int i = 0; i < 8; ++i) {
                const unsigned symbol = unsigned(symbols >> 8 * i & 255);
                const uint8_t top = symbol == escape ? *escaped++ : table[symbol];
                to[i] = uint8_t(top + (low >> 8 * i & 255));
            }
        }
    }

    static void layer(int bits, const uint8_t* words, int64_t groups, const uint8_t* table,
                      const uint8_t* escaped, uint8_t* to) {
        for (int64_t i = 0; i < groups; ++i, words += bits * 8, to += kSegment)
            group(bits, 0, words, table, escaped, to);
    }

    static void top(const Class& c, const uint8_t* words, int64_t rows, const uint8_t* escaped,
                    uint8_t* to, int64_t stride) {
        uint8_t table[16] = {};
        if (c.layers) make_table(c, 0, 128, table);
        for (int64_t row = 0; row < rows; ++row, to += stride) {
            for (int64_t i = 0; i < c.groups; ++i, words += top_words(c) * 8) {
                if (c.layers)
                    group(c.bits[0], c.raw, words, table, escaped, to + i * kSegment);
                else
                    escape_bytes(words, kSegment, 0, 128, to + i * kSegment);
            }
        }
    }

    static void order(const Planes& job, const void* x, int64_t first, Kind kind,
                      float* const* to) {
        order_columns(job, x, first, kind, to);
    }
    static void sum_excess(const int8_t*, int64_t, int, int32_t*) {}
    static void lay_out(Planes& job, const void* x, Kind kind, Scratch& scratch) {
        lay_out_tokens<Portable>(job, x, kind, scratch);
    }

    static void unpack(int width, int64_t groups, const uint8_t* lines, uint8_t* to,
                       int64_t stride) {
        for (; groups > 0; --groups, lines += width * kLineBytes, to += kSegment)
            for (int row = 0; row < kTileRows; ++row)
                get_group(lines, width, row, to + row * stride);
    }

    // Multiplies unpacked rows by all tokens.
    static void multiply(const Planes& job, int64_t row, int64_t rows, const uint8_t* bytes) {
        for (int64_t end = row + rows; row < end; ++row, bytes += job.row_bytes) {
            for (int64_t token = 0; token < job.tokens; ++token) {
                const int8_t* x = job.x + token * job.row_bytes;
                const float* scales = job.x_scales + token * job.blocks * kLanes;
                const uint8_t* weight = bytes;
                float sum = 0;
                for (int k = 0; k < job.class_count; ++k) {
                    const Class& c = job.classes[k];
                    for (int64_t left = c.groups; left > 0; left -= kBlockGroups) {
                        const int64_t groups = left < kBlockGroups ? left : kBlockGroups;
                        int32_t dot[kLanes] = {};
                        for (int64_t i = 0; i < groups * kSegment; ++i)
                            dot[i % kSegment / kLaneBytes] +=
                                (int32_t(weight[i]) - 128) * x[i];
                        for (int64_t lane = 0; lane < kLanes; ++lane)
                            sum += float(dot[lane]) * scales[lane];
                        scales += kLanes;
                        weight += kBlock;
                        x += kBlock;
                    }
                }
                finish(job, row, token, sum);
            }
        }
    }

    // Writes row `row` of the weight to row `at` of `out`.
    static void expand_row(const Planes& job, const uint8_t* bytes, int64_t row, int64_t at) {
        constexpr int64_t kPiece = 256;
        const uint8_t* next[256];
        for (int k = 0; k < job.class_count; ++k)
            next[k] = bytes + job.classes[k].first_block * kBlock;
        const float scale = bf16_to_float(job.scales[row]);
        int8_t levels[kPiece];
        for (int64_t first = 0; first < job.cols; first += kPiece) {
            const int64_t count = job.cols - first < kPiece ? job.cols - first : kPiece;
            for (int64_t i = 0; i < count; ++i) {
                const int k = job.class_of[first + i];
                levels[i] = int8_t(*next[k]++ - 128);
            }
            convert_row(job, levels, first, count, scale, job.out, at * job.cols + first);
        }
    }
};

}  // namespace prunus::planes
