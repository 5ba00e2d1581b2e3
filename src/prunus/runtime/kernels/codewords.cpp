// The best rows of a grid for codewords: the rows of least distance, of all that there are.
//
// In torch this is a product of matrices whose result has a column for each row of the grid, of
// which only the least is wanted: writing and reading it takes most of the time. Here a few rows of the
// weight stay in the cache while the grid passes by. Every instruction set has its own copy of the
// loops, which the compiler vectorises.

#include <algorithm>
#include <limits>

#include "kernels.h"
#include "threads.h"

namespace prunus::codewords {
namespace {

// The targets, sums and numbers of this many rows stay in the first-level cache.
constexpr int64_t kRowsAtOnce = 128;
// Floats in the longest vector register.
constexpr int64_t kVector = 16;

struct Search {
    int64_t words, rows, count;
    const float* targets;  // (words, columns, rows)
    const float* grid;     // (count, columns)
    const float* halves;   // (words, count)
    float* least;          // (words, rows)
    int32_t* index;        // (words, rows)
};

// The rows from `begin` on of one codeword, at most kRowsAtOnce.
template <int kColumns>
__attribute__((always_inline)) inline void search_rows(const Search& s, int64_t word,
                                                       int64_t begin) {
    const int64_t rows = std::min(s.rows - begin, kRowsAtOnce);
    // Whole vectors: what a sample of a weight leaves of kRowsAtOnce costs nothing.
    const int64_t filled = (rows + kVector - 1) / kVector * kVector;
    alignas(64) float target[kColumns][kRowsAtOnce] = {};
    alignas(64) float least[kRowsAtOnce];
    alignas(64) int32_t index[kRowsAtOnce];
    for (int c = 0; c < kColumns; ++c)
        std::copy_n(s.targets + (word * kColumns + c) * s.rows + begin, rows, target[c]);
    std::fill_n(least, filled, std::numeric_limits<float>::infinity());
    std::fill_n(index, filled, 0);
    for (int64_t k = 0; k < s.count; ++k) {
        const float* const row = s.grid + k * kColumns;
        const float half = s.halves[word * s.count + k];
        for (int64_t i = 0; i < filled; ++i) {
            float sum = half;
            for (int c = 0; c < kColumns; ++c) sum -= target[c][i] * row[c];
            index[i] = sum < least[i] ? int32_t(k) : index[i];
            least[i] = sum < least[i] ? sum : least[i];
        }
    }
    std::copy_n(least, rows, s.least + word * s.rows + begin);
    std::copy_n(index, rows, s.index + word * s.rows + begin);
}

__attribute__((always_inline)) inline void search_any(const Search& s, int64_t columns,
                                                      int64_t word, int64_t begin) {
    columns == 4 ? search_rows<4>(s, word, begin) : search_rows<8>(s, word, begin);
}

using Searcher = void (*)(const Search&, int64_t, int64_t, int64_t);

void search_portable(const Search& s, int64_t columns, int64_t word, int64_t begin) {
    search_any(s, columns, word, begin);
}
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) void search_avx2(const Search& s, int64_t columns,
                                                     int64_t word, int64_t begin) {
    search_any(s, columns, word, begin);
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) void
search_avx512(const Search& s, int64_t columns, int64_t word, int64_t begin) {
    search_any(s, columns, word, begin);
}
constexpr Searcher kSearchers[] = {search_portable, search_avx2, search_avx512};
#else
constexpr Searcher kSearchers[] = {search_portable};
#endif

}  // namespace
}  // namespace prunus::codewords

extern "C" int prunus_find_codewords(int isa, int threads, int64_t words, int64_t columns,
                                     int64_t rows, int64_t count, const float* targets,
                                     const float* grid, const float* halves, float* least,
                                     int32_t* index) {
    using namespace prunus;
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (words < 0 || rows < 0 || count < 1 || (columns != 4 && columns != 8) || !targets || !grid ||
        !halves || !least || !index)
        return PRUNUS_BAD_ARGUMENT;
    const codewords::Search search{words, rows, count, targets, grid, halves, least, index};
    constexpr int kCopies = int(sizeof codewords::kSearchers / sizeof *codewords::kSearchers);
    const codewords::Searcher searcher = codewords::kSearchers[std::min(isa, kCopies - 1)];
    const int64_t blocks = (rows + codewords::kRowsAtOnce - 1) / codewords::kRowsAtOnce;
    for_parts(threads, blocks * words, [&](int64_t part) {
        searcher(search, columns, part / blocks, part % blocks * codewords::kRowsAtOnce);
    });
    return PRUNUS_OK;
}
