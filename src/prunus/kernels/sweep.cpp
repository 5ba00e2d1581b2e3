// A few columns of a rate-distortion sweep: each is rounded, and corrects those after it.
//
// In torch a column costs a dozen operations on one vector of rows. Here rows are divided into
// pieces, whose columns stay in the first-level cache. Every instruction set has its own copy of
// the loops, which the compiler vectorises.

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "threads.h"

namespace prunus::sweep {
namespace {

constexpr int64_t kRowsAtOnce = 512;

struct Columns {
    int64_t count, rows;
    float* weight;        // (count, rows)
    const float* factor;  // (count, count)
    const float* steps;   // (count)
    const float* shares;  // (count, 256)
    float most;
    const uint8_t* keep;  // (count, rows), or null
    int8_t* levels;       // (count, rows)
    float* errors;        // (count, rows)
};

__attribute__((always_inline)) inline void round_rows(const Columns& c, int64_t begin,
                                                      int64_t end) {
    for (int64_t j = 0; j < c.count; ++j) {
        const float step = c.steps[j], inverse = 1.0f / c.factor[j * c.count + j];
        const float* const shares = c.shares + j * 256 + 128;
        const float* const weight = c.weight + j * c.rows;
        const uint8_t* const keep = c.keep ? c.keep + j * c.rows : nullptr;
        int8_t* const levels = c.levels + j * c.rows;
        float* const errors = c.errors + j * c.rows;
        for (int64_t i = begin; i < end; ++i) {
            float value = weight[i] / step;
            value = value < c.most ? value : c.most;
            value = value > -c.most ? value : -c.most;
            float level = std::floor(value);
            level += value - level > shares[int32_t(level)] ? 1.0f : 0.0f;
            if (keep) level = keep[i] ? level : 0.0f;
            levels[i] = int8_t(int32_t(level));
            errors[i] = (weight[i] - level * step) * inverse;
        }
        for (int64_t k = j + 1; k < c.count; ++k) {
            const float share = c.factor[j * c.count + k];
            float* const later = c.weight + k * c.rows;
            for (int64_t i = begin; i < end; ++i) later[i] -= share * errors[i];
        }
    }
}

using Round = void (*)(const Columns&, int64_t, int64_t);

void round_portable(const Columns& c, int64_t begin, int64_t end) { round_rows(c, begin, end); }
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) void round_avx2(const Columns& c, int64_t begin, int64_t end) {
    round_rows(c, begin, end);
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) void
round_avx512(const Columns& c, int64_t begin, int64_t end) {
    round_rows(c, begin, end);
}
constexpr Round kRounds[] = {round_portable, round_avx2, round_avx512};
#else
constexpr Round kRounds[] = {round_portable};
#endif

}  // namespace
}  // namespace prunus::sweep

extern "C" int prunus_round_columns(int isa, int threads, int64_t count, int64_t rows, float most,
                                    float* weight, const float* factor, const float* steps,
                                    const float* shares, int8_t* levels, float* errors,
                                    const uint8_t* keep) {
    using namespace prunus;
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (count < 1 || rows < 1 || !(most > 0 && most < 127) || !weight || !factor || !steps ||
        !shares || !levels || !errors)
        return PRUNUS_BAD_ARGUMENT;
    const sweep::Columns columns{count, rows, weight, factor, steps,
                                 shares, most, keep,  levels, errors};
    constexpr int kCopies = int(sizeof sweep::kRounds / sizeof *sweep::kRounds);
    const sweep::Round round = sweep::kRounds[std::min(isa, kCopies - 1)];
    const int64_t pieces = (rows + sweep::kRowsAtOnce - 1) / sweep::kRowsAtOnce;
    for_parts(threads, pieces, [&](int64_t piece) {
        round(columns, piece * sweep::kRowsAtOnce,
              std::min(rows, (piece + 1) * sweep::kRowsAtOnce));
    });
    return PRUNUS_OK;
}
