// Layered bit planes with NEON. Planes are decoded by the portable code, once, when a weight is
// loaded; products and unpacking are here.
#pragma once

#include "lines_neon.h"
#include "planes_portable.h"

namespace prunus::planes {

// `has_dot`: whether the machine has dot products (FEAT_DotProd).
template <bool has_dot>
struct Neon : Portable {
    static void unpack(int width, int64_t groups, const uint8_t* lines, uint8_t* to,
                       int64_t stride) {
        using Fn = void (*)(int64_t, const uint8_t*, uint8_t*, int64_t);
        static constexpr Fn fns[] = {PRUNUS_WIDTHS(lines128::unpack)};
        fns[width - 1](groups, lines, to, stride);
    }

    template <int width>
    static constexpr auto product_of = lines128::multiply<width, has_dot>;

    static void multiply_tile(const Planes& job, const Class& c, int width, const uint8_t* lines,
                              const TileSums& tile) {
        using Fn = void (*)(const Planes&, const Class&, const uint8_t*, const TileSums&);
        static constexpr Fn fns[] = {PRUNUS_WIDTHS(product_of)};
        fns[width - 1](job, c, lines, tile);
    }

    static float reduce(const float* sums) { return vaddvq_f32(vld1q_f32(sums)); }

    // A lane holds the sum over its four bytes of each group. Values of eight bits are multiplied
    // as signed ones and have no excess.
    static void sum_excess(const int8_t* x, int64_t groups, int zero, int32_t* to) {
        for (int64_t lane = 0; lane < kLanes; lane += 4) {
            int32x4_t sum = vdupq_n_s32(0);
            for (int64_t group = 0; group < groups; ++group)
                sum = vpadalq_s16(
                    sum, vpaddlq_s8(vld1q_s8(x + group * kSegment + lane * kLaneBytes)));
            vst1q_s32(to + lane, vmulq_n_s32(sum, zero == 128 ? 0 : -zero));
        }
    }

    static void lay_out(Planes& job, const void* x, Kind kind, Scratch& scratch) {
        lay_out_tokens<Neon>(job, x, kind, scratch);
    }

    // Multiplies R rows by T tokens. The order of the sums is that of products with one token.
    template <int R, int T>
    static void multiply_rows(const Planes& job, int64_t row, int64_t token,
                              const uint8_t* bytes) {
        const int8_t* x = job.x + token * job.row_bytes;
        const float* scales = job.x_scales + token * job.blocks * kLanes;
        float32x4_t sum[R][T];
#pragma GCC unroll 4
        for (auto& sums : sum)
#pragma GCC unroll 4
            for (auto& s : sums) s = vdupq_n_f32(0);
        for (int k = 0; k < job.class_count; ++k) {
            for (int64_t left = job.classes[k].groups; left > 0; left -= kBlockGroups) {
                const int64_t groups = left < kBlockGroups ? left : kBlockGroups;
                for (int64_t lane = 0; lane < kLanes; lane += 4) {
                    int32x4_t dot[R][T];
#pragma GCC unroll 4
                    for (auto& dots : dot)
#pragma GCC unroll 4
                        for (auto& d : dots) d = vdupq_n_s32(0);
                    for (int64_t group = 0; group < groups; ++group) {
                        const int64_t at = group * kSegment + lane * kLaneBytes;
                        int8x16_t weight[R];
#pragma GCC unroll 4
                        for (int r = 0; r < R; ++r)
                            weight[r] =
                                lines128::signed_bytes(vld1q_u8(bytes + r * job.row_bytes + at));
#pragma GCC unroll 4
                        for (int t = 0; t < T; ++t) {
                            const int8x16_t activation = vld1q_s8(x + t * job.row_bytes + at);
#pragma GCC unroll 4
                            for (int r = 0; r < R; ++r)
                                dot[r][t] = lines128::add_products<has_dot>(dot[r][t], weight[r],
                                                                            activation);
                        }
                    }
#pragma GCC unroll 4
                    for (int t = 0; t < T; ++t) {
                        const float32x4_t scale =
                            vld1q_f32(scales + t * job.blocks * kLanes + lane);
#pragma GCC unroll 4
                        for (int r = 0; r < R; ++r)
                            sum[r][t] = vfmaq_f32(sum[r][t], vcvtq_f32_s32(dot[r][t]), scale);
                    }
                }
                x += kBlock;
                bytes += kBlock;
                scales += kLanes;
            }
        }
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t)
                finish(job, row + r, token + t, vaddvq_f32(sum[r][t]));
    }

    static void multiply(const Planes& job, int64_t row, int64_t rows, const uint8_t* bytes) {
        using Fn = void (*)(const Planes&, int64_t, int64_t, const uint8_t*);
        static constexpr Fn pairs[] = {multiply_rows<2, 1>, multiply_rows<2, 2>,
                                       multiply_rows<2, 3>, multiply_rows<2, 4>},
                            singles[] = {multiply_rows<1, 1>, multiply_rows<1, 2>,
                                         multiply_rows<1, 3>, multiply_rows<1, 4>};
        for_token_blocks(job.tokens, 4, [&](int64_t token, int64_t count) {
            int64_t i = 0;
            for (; i + 2 <= rows; i += 2)
                pairs[count - 1](job, row + i, token, bytes + i * job.row_bytes);
            if (i < rows) singles[count - 1](job, row + i, token, bytes + i * job.row_bytes);
        });
    }
};

}  // namespace prunus::planes
