// The kernels against float64, on every instruction set of this machine. sanitize.sh builds it with
// sanitizers, and every array is exactly as large as the interface says. So a read or write past its
// end is found.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

#include "../../src/prunus/kernels/kernels.h"

namespace {

int g_failures = 0;
std::mt19937 g_random{20240611};

#define CHECK(condition, ...)                       \
    do {                                            \
        if (!(condition) && ++g_failures <= 10) {   \
            std::printf("FAILED %s: ", #condition); \
            std::printf(__VA_ARGS__);               \
            std::printf("\n");                      \
        }                                           \
    } while (0)

int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(g_random);
}
float normal() { return std::normal_distribution<float>()(g_random); }

std::vector<float> normals(int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = normal();
    return values;
}

// A stand-in for an OpenMP runtime.
void fork_and_join(void (*fn)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> team;
    for (unsigned i = 1; i < threads; ++i) team.emplace_back(fn, data);
    fn(data);
    for (auto& thread : team) thread.join();
}

// Two batches of inputs, added by one thread and by three.
void check_gram(int isa, int64_t features) {
    const size_t width = size_t(features);
    std::vector<float> sums(width * width), others(sums);
    std::vector<double> exact(width * width), size(exact);
    for (int batch = 0; batch < 2; ++batch) {
        const int64_t tokens = batch ? between(500, 1100) : between(1, 70);
        std::vector<float> x = normals(tokens * features);
        std::vector<uint16_t> rounded;
        for (float& value : x) {
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            bits &= 0xffff0000;  // a number of bfloat16
            std::memcpy(&value, &bits, 4);
            rounded.push_back(uint16_t(bits >> 16));
        }
        const int fault = prunus_add_gram(isa, 1, tokens, features, rounded.data(), sums.data());
        if (isa < prunus::kAvx512Bf16) {
            CHECK(fault == PRUNUS_NO_SUCH_ISA, "gram: fault %d", fault);
            return;
        }
        CHECK(fault == PRUNUS_OK, "gram: fault %d", fault);
        prunus_add_gram(isa, 3, tokens, features, rounded.data(), others.data());
        for (size_t token = 0; token < size_t(tokens); ++token)
            for (size_t i = 0; i < exact.size(); ++i) {
                const double product =
                    double(x[token * width + i / width]) * x[token * width + i % width];
                exact[i] += product;
                size[i] += std::abs(product);
            }
    }
    for (size_t i = 0; i < exact.size(); ++i)
        CHECK(sums[i] == others[i] && std::abs(sums[i] - exact[i]) <= 4e-6 * size[i],
              "gram of %d features, instruction set %d", int(features), isa);
}

void check_codewords(int isa, int64_t columns, int64_t rows, int64_t count) {
    const int64_t words = between(1, 4);
    const std::vector<float> target = normals(words * columns * rows);
    std::vector<float> importance = normals(words * columns), grid = normals(count * columns);
    for (float& value : importance) value *= value;
    // Halves of rows recur, as in the grids of llama.cpp.
    for (int64_t k = 0; k < count * columns; ++k)
        grid[size_t(k)] = grid[size_t(k % (5 * columns))];
    std::vector<float> least(size_t(words * rows)), other(least);
    std::vector<int32_t> index(least.size()), same(least.size());
    for (const auto& [threads, to, at] : {std::tuple{1, &least, &index}, {3, &other, &same}})
        CHECK(prunus_find_codewords(isa, threads, words, columns, rows, count, target.data(),
                                    importance.data(), grid.data(), to->data(),
                                    at->data()) == PRUNUS_OK,
              "codewords");
    CHECK(least == other && index == same, "codewords by three threads");
    for (int64_t place = 0; place < words * rows; ++place) {
        const int64_t word = place / rows, row = place % rows;
        std::vector<double> sums(static_cast<size_t>(count));
        double best = INFINITY;
        for (int64_t k = 0; k < count; ++k) {
            double& sum = sums[size_t(k)];
            for (int64_t c = 0; c < columns; ++c) {
                const double v = grid[size_t(k * columns + c)];
                sum += importance[size_t(word * columns + c)] * v * v / 2 -
                       target[size_t((word * columns + c) * rows + row)] * v;
            }
            best = std::min(best, sum);
        }
        const int32_t found = index[size_t(place)];
        CHECK(found >= 0 && found < count && sums[size_t(found)] - best < 1e-4 &&
                  std::abs(double(least[size_t(place)]) - best) < 1e-4,
              "codewords of %d columns, instruction set %d", int(columns), isa);
    }
}

// The layout of IQ2_XS: rows of 512, seven signs of eight, and two codes in each of eight runs.
constexpr int32_t kLayout[] = {0, 4, 9, 0, 64, 16, 1, 4, 7, 9, 64, 16, 2, 2, 4, 512, 8, 4};

// Random bytes become levels and codes, by one thread and by three, and the same bytes again.
void check_codeword_bytes(int isa, int64_t spans) {
    const int64_t count = 512, columns = 8, digits = 3, bytes = 72;
    std::vector<int64_t> grid, row_of_key;
    for (int64_t k = 0; k < count; row_of_key.push_back(k++))
        for (int64_t c = 0, rest = k; c < columns; ++c, rest /= digits)
            grid.push_back(rest % digits);
    std::vector<uint8_t> packed(static_cast<size_t>(spans * bytes)), again(packed.size());
    for (uint8_t& byte : packed) byte = uint8_t(between(0, 255));
    std::vector<uint8_t> levels(static_cast<size_t>(spans * 256)), others(levels);
    std::vector<uint8_t> codes(static_cast<size_t>(spans * 16)), same(codes);
    for (const auto& [threads, to, of] : {std::tuple{1, &levels, &codes}, {3, &others, &same}})
        CHECK(prunus_unpack_codewords(isa, threads, spans, bytes, columns, digits, 3, count,
                                      kLayout, grid.data(), packed.data(), to->data(),
                                      of->data()) == PRUNUS_OK,
              "bytes of codewords");
    CHECK(levels == others && codes == same, "bytes by three threads");
    CHECK(prunus_pack_codewords(isa, 3, spans, bytes, columns, digits, 3, count, kLayout,
                                row_of_key.data(), levels.data(), codes.data(),
                                again.data()) == PRUNUS_OK,
          "packed codewords");
    CHECK(again == packed, "bytes of %d spans", int(spans));
}

void check_refusals() {
    std::vector<float> many = normals(129 * 4), out(1);
    uint16_t x = 0;
    int32_t index;
    const auto search = [&](int isa, int64_t columns, int64_t count, const float* target) {
        return prunus_find_codewords(isa, 1, 1, columns, 1, count, target, many.data(), many.data(),
                                     out.data(), &index);
    };
    CHECK(search(9, 4, 2, many.data()) == PRUNUS_NO_SUCH_ISA, "instruction set 9");
    CHECK(search(0, 5, 2, many.data()) == PRUNUS_BAD_ARGUMENT, "five columns");
    CHECK(search(0, 4, 0, many.data()) == PRUNUS_BAD_ARGUMENT, "an empty grid");
    CHECK(search(0, 4, 2, nullptr) == PRUNUS_BAD_ARGUMENT, "no targets");
    CHECK(search(0, 4, 129, many.data()) == PRUNUS_BAD_ARGUMENT, "129 halves");
    CHECK(search(0, 4, 128, many.data()) == PRUNUS_OK, "128 halves");
    std::vector<uint8_t> bytes(272);
    const int64_t key = 0;
    const auto pack = [&](int64_t nbytes, int64_t columns, const int32_t* layout) {
        return prunus_pack_codewords(0, 1, 1, nbytes, columns, 3, 3, 1, layout, &key, bytes.data(),
                                     bytes.data(), bytes.data());
    };
    CHECK(pack(71, 8, kLayout) == PRUNUS_BAD_ARGUMENT, "bits behind the end of a span");
    CHECK(pack(72, 4, kLayout) == PRUNUS_BAD_ARGUMENT, "too few codewords");
    CHECK(pack(72, 8, nullptr) == PRUNUS_BAD_ARGUMENT, "no layout");
    CHECK(prunus_add_gram(9, 1, 1, 1, &x, out.data()) == PRUNUS_NO_SUCH_ISA, "instruction set 9");
    CHECK(prunus_add_gram(0, 1, 1, 0, &x, out.data()) == PRUNUS_BAD_ARGUMENT, "no features");
    CHECK(prunus_add_gram(0, 1, 1, 1, nullptr, out.data()) == PRUNUS_BAD_ARGUMENT, "no inputs");
}

}  // namespace

int main() {
    check_refusals();
    prunus_set_runtime(reinterpret_cast<void*>(fork_and_join));
    for (int isa = 0; isa <= prunus_best_isa(); ++isa) {
        for (const int64_t features : {1, 16, 31, 65, 130, 300}) check_gram(isa, features);
        for (const int64_t columns : {4, 8})
            for (const int64_t rows : {1, 15, 16, 63, 64, 200})
                check_codewords(isa, columns, rows, between(1, 40));
        for (const int64_t spans : {1, 63, 130}) check_codeword_bytes(isa, spans);
        std::printf("instruction set %d: done\n", isa);
    }
    if (g_failures == 0) std::printf("all kernels agree with float64\n");
    return g_failures != 0;
}
