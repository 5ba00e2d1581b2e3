// Layered bit planes with AVX2.
//
// It decodes 32 symbols at a time. Each plane becomes a mask of bytes, and a shuffle looks up the
// value of each symbol. Bytes of escaped values are put into place by shuffles of eight, as in
// avx2.h.
#pragma once

#include "avx2.h"
#include "lines_avx2.h"
#include "planes_portable.h"

namespace prunus::planes {

struct Avx2 : Portable {
    // Arithmetic takes longer than memory here. On one core of an AMD EPYC (Zen 3) the products of
    // Qwen2.5-Coder-1.5B at 3 bits take 102, 91, 85 and 83 ms with 8, 16, 32 and 64, and their
    // lines 651, 688, 721 and 756 MB, which more cores would wait for.
    static constexpr int64_t kExceptionPrice = 16;

    // Bytes that are 1 << plane where the bit of their column is set.
    PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 static __m256i spread(const uint8_t* from, int plane) {
        int32_t word;
        std::memcpy(&word, from, 4);
        const __m256i source = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                                  0x0303030303030303),
                      bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), source);
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
        return _mm256_and_si256(set, _mm256_set1_epi8(char(1 << plane)));
    }

    // The bytes of escaped values in the places of the bits of `mask`, with zeros between them.
    PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 static __m256i place(uint32_t mask,
                                                               const uint8_t*& escaped) {
        const int8_t* from = reinterpret_cast<const int8_t*>(escaped);
        __m128i part[4];
        for (int i = 0; i < 4; ++i) part[i] = avx2::expand(mask >> 8 * i & 255, from);
        escaped = reinterpret_cast<const uint8_t*>(from);
        return _mm256_set_m128i(_mm_unpacklo_epi64(part[2], part[3]),
                                _mm_unpacklo_epi64(part[0], part[1]));
    }

    template <int bits>
    PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 static void groups(int raw, const uint8_t* words,
                                                             int64_t count, __m256i table,
                                                             const uint8_t*& escaped, uint8_t* to) {
        for (int64_t i = 0; i < 2 * count; ++i, to += 32) {
            const uint8_t* at = words + i / 2 * (bits + raw) * 8 + i % 2 * 4;
            __m256i symbols = spread(at, 0);
            uint32_t mask = ~uint32_t(0);
#pragma GCC unroll 4
            for (int plane = 0; plane < bits; ++plane) {
                uint32_t word;
                std::memcpy(&word, at + plane * 8, 4);
                mask &= word;
                if (plane) symbols = _mm256_or_si256(symbols, spread(at + plane * 8, plane));
            }
            // The table has zero for the escape.
            __m256i values =
                _mm256_or_si256(_mm256_shuffle_epi8(table, symbols), place(mask, escaped));
            for (int plane = 0; plane < raw; ++plane)
                values = _mm256_add_epi8(values, spread(at + (bits + plane) * 8, plane));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), values);
        }
    }

    PRUNUS_TARGET_AVX2 static void decode(int bits, int raw, const uint8_t* words, int64_t count,
                                          const uint8_t* table, const uint8_t*& escaped,
                                          uint8_t* to) {
        const __m256i values = _mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
        if (bits == 1) return groups<1>(raw, words, count, values, escaped, to);
        if (bits == 2) return groups<2>(raw, words, count, values, escaped, to);
        if (bits == 3) return groups<3>(raw, words, count, values, escaped, to);
        return groups<4>(raw, words, count, values, escaped, to);
    }

    PRUNUS_TARGET_AVX2 static void escape_bytes(const uint8_t* from, int64_t count, int raw,
                                                int base, uint8_t* to) {
        for (int64_t i = 0; i < count; ++i) to[i] = uint8_t((from[i] << raw) + base);
    }

    static void layer(int bits, const uint8_t* words, int64_t groups, const uint8_t* table,
                      const uint8_t* escaped, uint8_t* to) {
        decode(bits, 0, words, groups, table, escaped, to);
    }

    static void top(const Class& c, const uint8_t* words, int64_t rows, const uint8_t* escaped,
                    uint8_t* to, int64_t stride) {
        if (!c.layers) return Portable::top(c, words, rows, escaped, to, stride);
        uint8_t table[16];
        make_table(c, 0, 128, table);
        for (int64_t row = 0; row < rows; ++row, to += stride) {
            decode(c.bits[0], c.raw, words, c.groups, table, escaped, to);
            words += c.groups * top_words(c) * 8;
        }
    }

    static void unpack(int width, int64_t groups, const uint8_t* lines, uint8_t* to,
                       int64_t stride) {
        using Fn = void (*)(int64_t, const uint8_t*, uint8_t*, int64_t);
        static constexpr Fn fns[] = {PRUNUS_WIDTHS(lines256::unpack)};
        fns[width - 1](groups, lines, to, stride);
    }

    static void multiply_tile(const Planes& job, const Class& c, int width, const uint8_t* lines,
                              const TileSums& tile) {
        using Fn = void (*)(const Planes&, const Class&, const uint8_t*, const TileSums&);
        static constexpr Fn fns[] = {PRUNUS_WIDTHS(lines256::multiply)};
        fns[width - 1](job, c, lines, tile);
    }

    PRUNUS_TARGET_AVX2 static float reduce(const float* sums) {
        return avx2::reduce(_mm256_loadu_ps(sums));
    }

    // A lane holds the sum over its four bytes of each group.
    PRUNUS_TARGET_AVX2 static void sum_excess(const int8_t* x, int64_t groups, int zero,
                                              int32_t* to) {
        const __m256i ones = _mm256_set1_epi8(1), pairs = _mm256_set1_epi16(1);
        for (int64_t lane = 0; lane < kLanes; lane += 8) {
            __m256i sum = _mm256_setzero_si256();
            for (int64_t group = 0; group < groups; ++group) {
                const __m256i bytes = lines256::load(x + group * kSegment + lane * kLaneBytes);
                sum = _mm256_add_epi32(
                    sum, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, bytes), pairs));
            }
            lines256::store(to + lane, _mm256_mullo_epi32(sum, _mm256_set1_epi32(-zero)));
        }
    }

    PRUNUS_TARGET_AVX2 static void lay_out(Planes& job, const void* x, Kind kind,
                                           Scratch& scratch) {
        lay_out_tokens<Avx2>(job, x, kind, scratch);
    }

    // |w| · (x with the sign of w): a sum of two products is at most 2 · 128 · 127 and fits.
    template <int T>
    PRUNUS_TARGET_AVX2 static void multiply_row(const Planes& job, int64_t row, int64_t token,
                                                const uint8_t* bytes) {
        const int8_t* x = job.x + token * job.row_bytes;
        const float* scales = job.x_scales + token * job.blocks * kLanes;
        const __m256i ones = _mm256_set1_epi16(1), bias = _mm256_set1_epi8(char(128));
        __m256 sum[T];
#pragma GCC unroll 4
        for (auto& s : sum) s = _mm256_setzero_ps();
        for (int k = 0; k < job.class_count; ++k) {
            for (int64_t left = job.classes[k].groups; left > 0; left -= kBlockGroups) {
                const int64_t groups = left < kBlockGroups ? left : kBlockGroups;
                __m256i dot[2][T];  // the lower and the upper half of the lanes
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) dot[0][t] = dot[1][t] = _mm256_setzero_si256();
                for (int64_t group = 0; group < groups; ++group) {
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half) {
                        const int64_t at = group * kSegment + half * 32;
                        const __m256i weight = _mm256_sub_epi8(
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + at)), bias);
                        const __m256i magnitude = _mm256_abs_epi8(weight);
#pragma GCC unroll 4
                        for (int t = 0; t < T; ++t) {
                            const __m256i activation = _mm256_loadu_si256(
                                reinterpret_cast<const __m256i*>(x + t * job.row_bytes + at));
                            const __m256i pairs = _mm256_maddubs_epi16(
                                magnitude, _mm256_sign_epi8(activation, weight));
                            dot[half][t] = _mm256_add_epi32(dot[half][t],
                                                            _mm256_madd_epi16(pairs, ones));
                        }
                    }
                }
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) {
                    const float* scale = scales + t * job.blocks * kLanes;
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half)
                        sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[half][t]),
                                                 _mm256_load_ps(scale + half * 8), sum[t]);
                }
                x += kBlock;
                bytes += kBlock;
                scales += kLanes;
            }
        }
        for (int t = 0; t < T; ++t) finish(job, row, token + t, avx2::reduce(sum[t]));
    }

    static void multiply(const Planes& job, int64_t row, int64_t rows, const uint8_t* bytes) {
        using Fn = void (*)(const Planes&, int64_t, int64_t, const uint8_t*);
        static constexpr Fn fns[] = {multiply_row<1>, multiply_row<2>, multiply_row<3>,
                                     multiply_row<4>};
        for_token_blocks(job.tokens, 4, [&](int64_t token, int64_t count) {
            for (int64_t i = 0; i < rows; ++i)
                fns[count - 1](job, row + i, token, bytes + i * job.row_bytes);
        });
    }
};

}  // namespace prunus::planes
