// The search of codewords.cpp for one instruction set; included once for each, in its namespace,
// with TARGET, the attribute of its functions, and kWidth, the floats in one of its registers.
// (Templates that are inlined into functions with such an attribute would not do: the compiler cuts
// vectors to pieces before it inlines.)

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Integers __attribute__((vector_size(4 * kWidth)));
// Four registers at a time: a comparison then seldom waits for the one before it. The sums of all
// halves still lie in the first or the second cache.
constexpr int kVectors = 4;
constexpr int64_t kRowsAtOnce = kVectors * kWidth;

template <int kHalf>
TARGET void search_rows(const Search& s, int64_t word, int64_t begin) {
    const int64_t rows = std::min(s.rows - begin, kRowsAtOnce);
    // What each half of a row of the grid adds to the sum, in all rows of the weight.
    Floats added[2][kMostHalves][kVectors];
    for (int side = 0; side < 2; ++side) {
        const int64_t first = (2 * word + side) * kHalf;
        Floats target[kHalf][kVectors] = {};
        for (int c = 0; c < kHalf; ++c)
            std::memcpy(target[c], s.targets + (first + c) * s.rows + begin, 4 * rows);
        for (int64_t h = 0; h < s.halves[side].count; ++h) {
            const float* const values = s.halves[side].values.data() + h * kHalf;
            float square = 0;
            for (int c = 0; c < kHalf; ++c)
                square += s.importances[first + c] * values[c] * values[c];
            for (int v = 0; v < kVectors; ++v) {
                Floats sum = Floats{} + square / 2;
                for (int c = 0; c < kHalf; ++c) sum -= target[c][v] * values[c];
                added[side][h][v] = sum;
            }
        }
    }
    Floats least[kVectors];
    Integers index[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) least[v] = Floats{} + std::numeric_limits<float>::infinity();
    const uint8_t* const left = s.halves[0].numbers.data();
    const uint8_t* const right = s.halves[1].numbers.data();
    for (int32_t k = 0; k < int32_t(s.halves[0].numbers.size()); ++k) {
        for (int v = 0; v < kVectors; ++v) {
            const Floats sum = added[0][left[k]][v] + added[1][right[k]][v];
            const Integers is_less = sum < least[v];
            index[v] = is_less ? Integers{} + k : index[v];
            least[v] = is_less ? sum : least[v];
        }
    }
    std::memcpy(s.least + word * s.rows + begin, least, 4 * rows);
    std::memcpy(s.index + word * s.rows + begin, index, 4 * rows);
}

TARGET void search_any(const Search& s, int64_t columns, int64_t word, int64_t begin) {
    columns == 4 ? search_rows<2>(s, word, begin) : search_rows<4>(s, word, begin);
}

constexpr Searcher kSearcher{kRowsAtOnce, search_any};
