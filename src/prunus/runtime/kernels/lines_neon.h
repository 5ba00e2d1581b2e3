// Lines with NEON, with or without dot products.
//
// Registers hold 16 columns, which are four lanes. Dot products are those of signed bytes: the
// values of up to seven bits are positive, and those of eight bits get their sign.
#pragma once

#include <arm_neon.h>

#include "lines.h"

#define PRUNUS_INLINE_NEON __attribute__((always_inline)) inline

namespace prunus::planes::lines128 {

// ---- Extraction. ----

// Whether the highest bits of a value are the highest of their line.
template <int width, int row>
constexpr bool is_highest() {
    return highest_piece<width, row>().shift + highest_piece<width, row>().bits == 8;
}

// The bits that values of a row are shifted to the left by `value_of`, which is never into the sign.
template <int width, int row>
constexpr int scale_of() {
    return is_highest<width, row>() ? 0 : place_of<width, row>();
}

// Puts the pieces before `number` below the others. They are the highest bits of their lines, and
// what a shift leaves below them is overwritten by the next piece.
template <int width, int row, int number>
PRUNUS_INLINE_NEON uint8x16_t insert_pieces(const uint8_t* lines, uint8x16_t higher) {
    if constexpr (number == 0) {
        return higher;
    } else {
        constexpr Piece piece = pieces_of(width, row).piece[number - 1];
        static_assert(piece.shift + piece.bits == 8);
        constexpr int above = 8 - (piece.to + piece.bits + place_of<width, row>());
        return insert_pieces<width, row, number - 1>(
            lines, vsriq_n_u8(higher, vld1q_u8(lines + piece.line * kLineBytes), above));
    }
}

// The values of a row in a quarter of a group, times a power of two.
template <int width, int row>
PRUNUS_INLINE_NEON uint8x16_t value_of(const uint8_t* lines) {
    constexpr int place = place_of<width, row>(), line = highest_piece<width, row>().line;
    const uint8x16_t highest = vld1q_u8(lines + line * kLineBytes),
                     bytes = insert_pieces<width, row, pieces_of(width, row).count - 1>(lines,
                                                                                       highest);
    if constexpr (width == 8) return bytes;
    else if constexpr (is_highest<width, row>()) return vshrq_n_u8(bytes, place);
    else return vandq_u8(bytes, vdupq_n_u8(uint8_t(mask_of(width) << place)));
}

template <int width>
void unpack(int64_t groups, const uint8_t* lines, uint8_t* to, int64_t stride) {
    const uint8x16_t base = vdupq_n_u8(uint8_t(byte_base(width)));
    for (int64_t i = 0; i < 4 * groups; ++i, to += 16) {
        const uint8_t* quarter = lines + i / 4 * width * kLineBytes + i % 4 * 16;
#define PRUNUS_UNPACK(row)                                                                  \
    {                                                                                       \
        constexpr int scale = scale_of<width, row>();                                       \
        const uint8x16_t values = value_of<width, row>(quarter);                            \
        if constexpr (scale > 0)                                                            \
            vst1q_u8(to + row * stride, vsraq_n_u8(base, values, scale));                   \
        else                                                                                \
            vst1q_u8(to + row * stride, vaddq_u8(base, values));                            \
    }
        PRUNUS_EIGHT_ROWS(PRUNUS_UNPACK)
#undef PRUNUS_UNPACK
    }
}

// ---- Products. ----

// Bytes that are value + 128 as signed values.
PRUNUS_INLINE_NEON int8x16_t signed_bytes(uint8x16_t bytes) {
    return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128)));
}

// Adds products of four neighbours to each lane. A sum of two products fits in 16 bits.
template <bool has_dot>
PRUNUS_INLINE_NEON int32x4_t add_products(int32x4_t sum, int8x16_t values, int8x16_t x) {
    if constexpr (has_dot) {
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(sum, values, x);
#else
        // Compilers have the intrinsic only in functions that are for such machines as a whole.
        asm(".arch_extension dotprod\n\tsdot %0.4s, %1.16b, %2.16b"
            : "+w"(sum)
            : "w"(values), "w"(x));
        return sum;
#endif
    } else {
        const int16x8_t low = vmull_s8(vget_low_s8(values), vget_low_s8(x)),
                        high = vmull_high_s8(values, x);
        return vpadalq_s16(sum, vpaddq_s16(low, high));
    }
}

template <int width, int row>
PRUNUS_INLINE_NEON int8x16_t factor_of(const uint8_t* lines) {
    if constexpr (width == 8) return signed_bytes(value_of<width, row>(lines));
    else return vreinterpretq_s8_u8(value_of<width, row>(lines));
}

// Sums / 2^scale as floats. It is exact, because sums end with `scale` zeros and have less than 24
// bits before them.
template <int scale>
PRUNUS_INLINE_NEON float32x4_t to_floats(int32x4_t sums) {
    if constexpr (scale > 0) return vcvtq_n_f32_s32(sums, scale);
    else return vcvtq_f32_s32(sums);
}

// Two registers of lanes at a time: sixteen sums hide the latency of a dot product.
template <int width, bool has_dot>
void multiply(const Planes& job, const Class& c, const uint8_t* lines, const TileSums& tile) {
    const int8_t* x = job.x + c.first_block * kBlock;
    const float* scales = job.x_scales + c.first_block * kLanes;
    const int32_t* excess = job.excess + c.first_block * kLanes;
    int32_t* lanes = tile.lanes + c.first_block * kTileRows * kLanes;
    if (!tile.adds)
        for (int row = 0; row < kTileRows; ++row)
            vst1q_f32(tile.sums + row * kLanes, vdupq_n_f32(0));
    for (int64_t left = c.groups; left > 0; left -= kBlockGroups) {
        const int64_t groups = left < kBlockGroups ? left : kBlockGroups;
        for (int64_t lane = 0; lane < kLanes; lane += 8) {
            const int64_t half = lane * kLaneBytes;
            int32_t* const at = lanes + lane;
#define PRUNUS_START(row)                                                                        \
    int32x4_t low##row = vshlq_n_s32(vld1q_s32(at + row * kLanes), (scale_of<width, row>())),    \
              high##row = vshlq_n_s32(vld1q_s32(at + row * kLanes + 4), (scale_of<width, row>()));
            PRUNUS_EIGHT_ROWS(PRUNUS_START)
#undef PRUNUS_START
            for (int64_t group = 0; group < groups; ++group) {
                const uint8_t* const from = lines + group * width * kLineBytes + half;
                const int8x16_t x_low = vld1q_s8(x + group * kSegment + half),
                                x_high = vld1q_s8(x + group * kSegment + half + 16);
#define PRUNUS_DOT(row)                                                                      \
    low##row = add_products<has_dot>(low##row, factor_of<width, row>(from), x_low);          \
    high##row = add_products<has_dot>(high##row, factor_of<width, row>(from + 16), x_high);
                PRUNUS_EIGHT_ROWS(PRUNUS_DOT)
#undef PRUNUS_DOT
            }
            const float32x4_t scale_low = vld1q_f32(scales + lane),
                              scale_high = vld1q_f32(scales + lane + 4);
            const int32x4_t unchanged_low = vld1q_s32(excess + lane),
                            unchanged_high = vld1q_s32(excess + lane + 4);
#define PRUNUS_ADD(row)                                                                        \
    {                                                                                          \
        constexpr int scale = scale_of<width, row>();                                          \
        vst1q_s32(at + row * kLanes, unchanged_low);                                           \
        vst1q_s32(at + row * kLanes + 4, unchanged_high);                                      \
        float32x4_t sum = vld1q_f32(tile.sums + row * kLanes);                                 \
        sum = vfmaq_f32(sum, to_floats<scale>(low##row), scale_low);                           \
        sum = vfmaq_f32(sum, to_floats<scale>(high##row), scale_high);                         \
        vst1q_f32(tile.sums + row * kLanes, sum);                                              \
    }
            PRUNUS_EIGHT_ROWS(PRUNUS_ADD)
#undef PRUNUS_ADD
        }
        lines += groups * width * kLineBytes;
        x += kBlock;
        scales += kLanes;
        excess += kLanes;
        lanes += kTileRows * kLanes;
    }
}

}  // namespace prunus::planes::lines128
