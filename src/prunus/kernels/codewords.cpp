// The best rows of a grid for codewords: the rows of least distance, of all that there are.
//
// In torch this is a product of matrices whose result has a column for each row of the grid, of
// which only the least is wanted: writing and reading it takes most of the time. Here a few rows of
// the weight stay in the cache while the grid passes by. A grid has few magnitudes, so halves of
// its rows recur: 1,024 rows of eight columns have 81. What a half adds to the distance is computed
// once, and a row of the grid is then a single addition.

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace prunus::codewords {
namespace {

constexpr int kMostHalves = 128;

// The left or the right halves of the rows of a grid.
struct Halves {
    int count = 0;
    std::vector<float> values;     // (count, columns / 2), each half once
    std::vector<uint8_t> numbers;  // of each row of the grid, the number of its half
};

struct Search {
    int64_t rows;
    const float* targets;      // (words, columns, rows)
    const float* importances;  // (words, columns)
    float* least;              // (words, rows)
    int32_t* index;            // (words, rows)
    Halves halves[2];
};

// Searches for one codeword in some rows of the weight, from a row on.
struct Searcher {
    int64_t rows_at_once;
    void (*search)(const Search&, int64_t columns, int64_t word, int64_t begin);
};

// Finds the halves of all rows, which begin at `grid` and at every `columns` after it; false if
// there are too many.
bool find_halves(const float* grid, int64_t rows, int64_t columns, Halves& found) {
    const int64_t half = columns / 2;
    // A table with open addresses: the number of a half and 1, or 0.
    constexpr uint32_t kPlaces = 1024;
    int place_of[kPlaces] = {};
    for (int64_t k = 0; k < rows; ++k, grid += columns) {
        uint32_t place = 0, bits;
        for (int64_t c = 0; c < half; ++c) {
            std::memcpy(&bits, grid + c, 4);
            place = (place ^ bits) * 0x9E3779B1u;
        }
        for (place >>= 22; place_of[place]; place = (place + 1) % kPlaces)
            if (!std::memcmp(&found.values[(place_of[place] - 1) * half], grid, 4 * half)) break;
        if (!place_of[place]) {
            if (found.count == kMostHalves) return false;
            place_of[place] = ++found.count;
            found.values.insert(found.values.end(), grid, grid + half);
        }
        found.numbers.push_back(uint8_t(place_of[place] - 1));
    }
    return true;
}

namespace portable {
constexpr int kWidth = 4;
#define TARGET
#include "codewords_rows.h"
#undef TARGET
}  // namespace portable
#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 {
constexpr int kWidth = 8;
#define TARGET __attribute__((target("avx2,fma")))
#include "codewords_rows.h"
#undef TARGET
}  // namespace avx2
namespace avx512 {
constexpr int kWidth = 16;
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#include "codewords_rows.h"
#undef TARGET
}  // namespace avx512
constexpr Searcher kSearchers[] = {portable::kSearcher, avx2::kSearcher, avx512::kSearcher};
#else
constexpr Searcher kSearchers[] = {portable::kSearcher};
#endif

}  // namespace
}  // namespace prunus::codewords

extern "C" int prunus_find_codewords(int isa, int threads, int64_t words, int64_t columns,
                                     int64_t rows, int64_t count, const float* targets,
                                     const float* importances, const float* grid, float* least,
                                     int32_t* index) {
    using namespace prunus;
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (words < 0 || rows < 0 || count < 1 || (columns != 4 && columns != 8) || !targets ||
        !importances || !grid || !least || !index)
        return PRUNUS_BAD_ARGUMENT;
    codewords::Search search{rows, targets, importances, least, index, {}};
    for (int side = 0; side < 2; ++side)
        if (!codewords::find_halves(grid + side * columns / 2, count, columns, search.halves[side]))
            return PRUNUS_BAD_ARGUMENT;
    constexpr int kCopies = int(sizeof codewords::kSearchers / sizeof *codewords::kSearchers);
    const codewords::Searcher searcher = codewords::kSearchers[std::min(isa, kCopies - 1)];
    const int64_t blocks = (rows + searcher.rows_at_once - 1) / searcher.rows_at_once;
    for_parts(threads, blocks * words, [&](int64_t part) {
        searcher.search(search, columns, part / blocks, part % blocks * searcher.rows_at_once);
    });
    return PRUNUS_OK;
}
