// Compares the kernels for layered bit planes of every instruction set that this machine has with
// plain arithmetic, on arrays that end where their last element does: under AddressSanitizer a read
// or write past them is an error. Damaged data must be refused or decoded without such an error.
// Run by sanitize.sh, and by neon.sh in an emulator. With any argument, only exact products are
// compared.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../../src/prunus/runtime/kernels/job.h"
#include "../../../src/prunus/runtime/kernels/kernels.h"
#include "checks.h"

using namespace prunus;

namespace {

// A copy on the heap that ends with its last element.
template <typename T>
std::unique_ptr<T[]> exact(const std::vector<T>& from) {
    std::unique_ptr<T[]> copy(new T[from.size()]);
    std::copy(from.begin(), from.end(), copy.get());
    return copy;
}

struct Code {
    int raw;
    std::vector<int> layers;
};

void put_words(std::vector<uint8_t>& data, const std::vector<int>& symbols, size_t first,
               int bits) {
    for (int plane = 0; plane < bits; ++plane)
        for (size_t eight = 0; eight < 8; ++eight) {
            int byte = 0;
            for (size_t i = 0; i < 8; ++i) {
                const size_t at = first + eight * 8 + i;
                if (at < symbols.size()) byte |= (symbols[at] >> plane & 1) << i;
            }
            data.push_back(uint8_t(byte));
        }
}

void encode(std::vector<uint8_t>& data, const std::vector<int>& values, const Code& code) {
    const int offset = code.raw ? 1 << (code.raw - 1) : 0;
    std::vector<int> tops, low;
    for (int value : values) {
        tops.push_back((value + offset) >> code.raw);
        low.push_back((value + offset) & ((1 << code.raw) - 1));
    }
    int begin = 0;
    for (size_t layer = 0; layer < code.layers.size(); ++layer) {
        const int bits = code.layers[layer], escape = (1 << bits) - 1;
        std::vector<int> symbols, escaped;
        for (int top : tops) {
            const int symbol = (top > 0 ? 2 * top - 1 : -2 * top) - begin;
            if (symbol >= escape) escaped.push_back(top);
            symbols.push_back(symbol >= escape ? escape
                              : layer          ? symbol
                                               : (1 << (bits - 1)) - 1 - top);
        }
        for (size_t first = 0; first < symbols.size(); first += 64) {
            put_words(data, symbols, first, bits);
            if (layer == 0) put_words(data, low, first, code.raw);
        }
        tops = escaped;
        begin += escape;
    }
    for (int top : tops) data.push_back(uint8_t(top));
    while (data.size() % 8) data.push_back(0);
}

struct Weight {
    int64_t rows, cols, rows_per_chunk;
    std::vector<Code> codes;
    std::vector<int> levels;
    std::vector<uint8_t> data, classes, code_bytes;
    std::vector<uint16_t> steps, scales;
    std::vector<int64_t> offsets;
    std::unique_ptr<uint8_t[]> exact_data, exact_classes, exact_lines;
    std::unique_ptr<uint16_t[]> exact_steps, exact_scales;

    // One level in `rare` is one of the largest.
    Weight(int64_t r, int64_t c, int64_t chunk, std::vector<Code> all, double spread,
           int64_t rare = 100)
        : rows(r), cols(c), rows_per_chunk(chunk), codes(all), levels(size_t(r * c)) {
        for (const Code& code : codes) {
            std::vector<uint8_t> bytes{uint8_t(code.raw), uint8_t(code.layers.size())};
            for (int bits : code.layers) bytes.push_back(uint8_t(bits));
            bytes.resize(10);
            code_bytes.insert(code_bytes.end(), bytes.begin(), bytes.end());
        }
        for (int64_t i = 0; i < cols; ++i) {
            classes.push_back(uint8_t(between(0, int64_t(codes.size()) - 1)));
            steps.push_back(float_to_bf16(0.5f + std::fabs(normal())));
        }
        for (int64_t i = 0; i < rows; ++i) scales.push_back(float_to_bf16(normal()));
        for (size_t i = 0; i < levels.size(); ++i) {
            const int raw = codes[classes[i % size_t(cols)]].raw,
                      most = 127 - (raw ? 1 << (raw - 1) : 0);
            const double value = between(1, rare) > 1 ? normal() * spread : (between(0, 1) ? 127 : -127);
            levels[i] = std::clamp(int(std::lrint(value)), -127, most);
        }
        for (int64_t first = 0; first < rows; first += rows_per_chunk)
            for (size_t k = 0; k < codes.size(); ++k) {
                std::vector<int> values;
                for (int64_t row = first; row < std::min(rows, first + rows_per_chunk); ++row) {
                    for (int64_t col = 0; col < cols; ++col)
                        if (classes[size_t(col)] == k)
                            values.push_back(levels[size_t(row * cols + col)]);
                    while (values.size() % 64) values.push_back(0);
                }
                encode(data, values, codes[k]);
            }
        const int64_t chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
        offsets.resize(size_t(chunks) * codes.size() * 9);
        exact_classes = exact(classes);
        exact_steps = exact(steps);
        exact_scales = exact(scales);
    }

    // Finds the offsets and makes the lines with any instruction set; then only these are left.
    int prepare(PrunusPlanes& planes) {
        if (const int code = prunus_plane_offsets(&planes, offsets.data())) return code;
        planes.offsets = offsets.data();
        int64_t bytes = 0;
        uint8_t widths[4];
        const int isa = int(between(0, prunus_best_isa()));
        if (const int code = prunus_plane_widths(isa, &planes, widths, &bytes)) return code;
        exact_lines.reset(new uint8_t[size_t(bytes)]);
        CHECK(prunus_plane_lines(isa, &planes, widths, exact_lines.get()) == PRUNUS_OK, "lines");
        planes.lines = exact_lines.get();
        planes.data = nullptr;
        planes.bytes = 0;
        planes.offsets = nullptr;
        return PRUNUS_OK;
    }

    PrunusPlanes described() {
        exact_data = exact(data);
        PrunusPlanes w{};
        w.rows = rows;
        w.cols = cols;
        w.rows_per_chunk = rows_per_chunk;
        w.data = exact_data.get();
        w.bytes = int64_t(data.size());
        w.classes = exact_classes.get();
        w.codes = code_bytes.data();
        w.class_count = int64_t(codes.size());
        w.steps = exact_steps.get();
        w.scales = exact_scales.get();
        return w;
    }
};

void call_all(int isa, const PrunusPlanes& planes, int64_t tokens, Kind kind,
              std::vector<float>* product, std::vector<float>* dense) {
    const size_t size = kind == kF32 ? 4 : 2;
    const int64_t rows = planes.rows, cols = planes.cols;
    std::vector<uint8_t> x(size_t(tokens * cols) * size);
    for (int64_t i = 0; i < tokens * cols; ++i) store_as(x.data(), i, kind, float(i % 7) - 3);
    const auto exact_x = exact(x);
    std::unique_ptr<uint8_t[]> out(new uint8_t[size_t(tokens * rows) * size]),
        whole(new uint8_t[size_t(rows * cols) * size]), one(new uint8_t[size_t(cols) * size]);
    const int threads = int(between(1, 3));
    int code = prunus_plane_linear(isa, threads, &planes, tokens, kind, exact_x.get(), nullptr,
                                   out.get());
    CHECK(code == PRUNUS_OK, "linear: %d", code);
    std::vector<uint8_t> both[2];
    for (auto& each : both) each.resize(size_t(tokens * rows) * size);
    const PrunusPlanes* weights[2] = {&planes, &planes};
    const void* biases[2] = {};
    void* outs[2] = {both[0].data(), both[1].data()};
    code = prunus_plane_linears(isa, threads, 2, weights, tokens, kind, exact_x.get(), biases, outs);
    CHECK(code == PRUNUS_OK, "linears: %d", code);
    for (const auto& each : both)
        CHECK(std::memcmp(each.data(), out.get(), each.size()) == 0, "isa %d linears", isa);
    code = prunus_plane_expand(isa, threads, &planes, kind, whole.get());
    CHECK(code == PRUNUS_OK, "expand: %d", code);
    const int64_t row = between(0, rows - 1);
    code = prunus_plane_expand_rows(isa, &planes, &row, 1, kind, one.get());
    CHECK(code == PRUNUS_OK, "expand rows: %d", code);
    for (int64_t i = 0; i < cols; ++i)
        CHECK(load_as_float(one.get(), i, kind) == load_as_float(whole.get(), row * cols + i, kind),
              "isa %d row %ld", isa, long(row));
    if (!product) return;
    for (int64_t i = 0; i < tokens * rows; ++i)
        product->push_back(load_as_float(out.get(), i, kind));
    for (int64_t i = 0; i < rows * cols; ++i)
        dense->push_back(load_as_float(whole.get(), i, kind));
}

void check_weight(int isa, Weight& w, int64_t tokens, Kind kind) {
    PrunusPlanes planes = w.described();
    const int code = w.prepare(planes);
    CHECK(code == PRUNUS_OK, "prepare: %d", code);
    std::vector<float> product, dense;
    call_all(isa, planes, tokens, kind, &product, &dense);
    const double roundoff = kind == kF32 ? 0x1p-24 : kind == kF16 ? 0x1p-11 : 0x1p-8;
    for (int64_t row = 0; row < w.rows; ++row) {
        const double scale = bf16_to_float(w.scales[size_t(row)]);
        for (int64_t token = 0; token < tokens; ++token) {
            double sum = 0, bound = 1e-6, step_sum = 0;
            for (int64_t col = 0; col < w.cols; ++col) {
                const double level = w.levels[size_t(row * w.cols + col)],
                             step = bf16_to_float(w.steps[size_t(col)]);
                const size_t at = size_t(row * w.cols + col);
                if (token == 0) {
                    const double entry = level * step * scale,
                                 error = std::fabs(dense[at] - entry);
                    CHECK(error <= std::fabs(entry) * roundoff + 1e-7, "isa %d entry %ld %ld", isa,
                          long(row), long(col));
                }
                sum += level * step * scale * (double((token * w.cols + col) % 7) - 3);
                bound += std::fabs(level * scale);
                step_sum = std::max(step_sum, step);
            }
            bound *= 3 * step_sum / 127 * 0.51 + 1e-5;
            bound += roundoff * std::fabs(sum) * 2;
            const double error = std::fabs(product[size_t(token * w.rows + row)] - sum);
            CHECK(error <= bound, "isa %d %ldx%ld token %ld: error %g bound %g", isa, long(w.rows),
                  long(w.cols), long(token), error, bound);
        }
    }
}

Code random_code() {
    Code code{int(between(0, 3)), {}};
    for (int64_t layers = between(0, 4); layers > 0; --layers)
        code.layers.push_back(int(between(1, 4)));
    if (code.layers.empty()) code.raw = 0;
    return code;
}

Weight random_weight() {
    std::vector<Code> codes;
    for (int64_t classes = between(1, 4); classes > 0; --classes) codes.push_back(random_code());
    const double spreads[] = {0.0, 0.4, 1.5, 5.0, 50.0};
    return Weight(between(1, 25), between(1, 400), between(1, 30), codes, spreads[between(0, 4)]);
}

// Steps, scales and activations for which nothing is rounded: products are the integers. Returns
// the widths of the classes as bits.
int check_integers(int isa, Weight& w, int64_t tokens) {
    std::fill_n(w.exact_steps.get(), w.cols, float_to_bf16(1));
    std::fill_n(w.exact_scales.get(), w.rows, float_to_bf16(1));
    PrunusPlanes planes = w.described();
    CHECK(w.prepare(planes) == PRUNUS_OK, "prepare");
    std::vector<float> x(size_t(tokens * w.cols));
    int64_t columns[4] = {};
    for (int64_t col = 0; col < w.cols; ++col) {
        // The first activation of each lane of a block is the largest, so that its scale is 1.
        const int64_t at = columns[w.classes[size_t(col)]]++;
        for (int64_t token = 0; token < tokens; ++token)
            x[size_t(token * w.cols + col)] =
                at % 256 < 64 && at % 4 == 0 ? 127 : float(between(-127, 127));
    }
    std::vector<float> out(size_t(tokens * w.rows));
    const auto exact_x = exact(x);
    CHECK(prunus_plane_linear(isa, 1, &planes, tokens, kF32, exact_x.get(), nullptr, out.data()) ==
              PRUNUS_OK, "linear");
    for (int64_t token = 0; token < tokens; ++token)
        for (int64_t row = 0; row < w.rows; ++row) {
            int64_t sum = 0;
            for (int64_t col = 0; col < w.cols; ++col)
                sum += w.levels[size_t(row * w.cols + col)] *
                       int64_t(x[size_t(token * w.cols + col)]);
            const float found = out[size_t(token * w.rows + row)];
            CHECK(found == float(sum), "isa %d %ldx%ld token %ld of %ld: %.1f, not %ld", isa,
                  long(w.rows), long(w.cols), long(token), long(tokens), found, long(sum));
        }
    int widths = 0;
    for (size_t k = 0; k < w.codes.size(); ++k) widths |= columns[k] ? 1 << w.exact_lines[k] : 0;
    return widths;
}

void check_all_widths(int isa) {
    const double spreads[] = {0, 0.3, 0.5, 0.8, 1.1, 1.6, 2.2, 3, 6, 12, 22, 60};
    for (bool one : {true, false}) {
        int widths = 0;
        for (int64_t rare : {100, 10000})
            for (double spread : spreads) {
                Weight w(between(1, 25), between(1, 700), between(1, 30),
                         {random_code(), random_code()}, spread, rare);
                widths |= check_integers(isa, w, one ? 1 : between(2, 16));
            }
        CHECK(widths == 510, "widths %d: each from 1 to 8", widths);
    }
}

void check_damage() {
    int refused = 0;
    for (int round = 0; round < 600; ++round) {
        Weight w = random_weight();
        if (w.data.empty()) continue;
        for (int64_t flips = between(0, 3); flips > 0; --flips)
            w.data[size_t(between(0, int64_t(w.data.size()) - 1))] ^= uint8_t(1 << between(0, 7));
        if (between(0, 2) == 0) w.data.resize(size_t(between(0, int64_t(w.data.size()) + 9)));
        if (between(0, 5) == 0) w.code_bytes[size_t(between(0, 9))] = uint8_t(between(0, 11));
        if (between(0, 9) == 0) w.exact_classes[0] = uint8_t(between(0, 255));
        if (between(0, 9) == 0) w.rows_per_chunk = between(-1, int64_t(1) << 40);
        PrunusPlanes planes = w.described();
        const int64_t chunks =
            w.rows_per_chunk < 1 ? 1 : (w.rows - 1) / w.rows_per_chunk + 1;
        w.offsets.assign(size_t(chunks) * w.codes.size() * 9, 0);
        if (w.prepare(planes) != PRUNUS_OK) {
            ++refused;
            continue;
        }
        for (int isa = 0; isa <= prunus_best_isa(); ++isa)
            call_all(isa, planes, between(1, 5), kF32, nullptr, nullptr);
    }
    CHECK(refused > 100 && refused < 590, "%d of 600 refused", refused);
}

void check_refusals() {
    Weight w(3, 70, 2, {{0, {2, 1}}}, 1.0);
    PrunusPlanes planes = w.described();
    CHECK(prunus_plane_lines(0, &planes, nullptr, nullptr) == PRUNUS_BAD_ARGUMENT, "no offsets");
    CHECK(w.prepare(planes) == PRUNUS_OK, "whole");
    std::vector<float> x(70), out(210);
    const int64_t row = 3;
    auto linear = [&](int isa, const PrunusPlanes* weight, int64_t tokens, int kind) {
        return prunus_plane_linear(isa, 1, weight, tokens, kind, x.data(), nullptr, out.data());
    };
    CHECK(linear(9, &planes, 1, kF32) == PRUNUS_NO_SUCH_ISA, "instruction set 9");
    CHECK(linear(0, nullptr, 1, kF32) == PRUNUS_BAD_ARGUMENT, "no weight");
    CHECK(linear(0, &planes, 0, kF32) == PRUNUS_BAD_ARGUMENT, "no tokens");
    CHECK(linear(0, &planes, 1, kI8) == PRUNUS_BAD_ARGUMENT, "int8 activations");
    CHECK(prunus_plane_expand(0, 1, &planes, kF32, nullptr) == PRUNUS_BAD_ARGUMENT, "no memory");
    CHECK(prunus_plane_expand_rows(0, &planes, &row, 1, kF32, out.data()) == PRUNUS_BAD_ARGUMENT,
          "no such row");
    const PrunusPlanes* four[4] = {&planes, &planes, &planes, &planes};
    const void* biases[4] = {};
    void* outs[4] = {out.data(), out.data(), out.data(), out.data()};
    CHECK(prunus_plane_linears(0, 1, 4, four, 1, kF32, x.data(), biases, outs) ==
              PRUNUS_BAD_ARGUMENT,
          "four products");
    planes.lines = nullptr;
    CHECK(linear(0, &planes, 1, kF32) == PRUNUS_BAD_ARGUMENT, "no lines");
    CHECK(prunus_plane_offsets(&planes, nullptr) == PRUNUS_BAD_ARGUMENT, "nowhere to write");
}

void check_rounded(int isa) {
    const Kind kinds[] = {kBf16, kF16, kF32};
    for (int round = 0; round < 100; ++round) {
        Weight w = random_weight();
        check_weight(isa, w, round % 3 ? between(1, 9) : 1, kinds[round % 3]);
    }
    Weight large(900, 300, 40, {{0, {2, 1, 1}}, {1, {3, 2}}}, 2.0);  // for several threads
    check_weight(isa, large, 1, kF32);
    check_weight(isa, large, 40, kBf16);
    Weight wide(4, 9000, 3, {{0, {1, 1, 2}}, {0, {}}}, 1.0);
    check_weight(isa, wide, 2, kF32);
}

}  // namespace

int main(int count, char**) {
    prunus_set_runtime(reinterpret_cast<void*>(fork_and_join));
    const bool all = count == 1;
    check_refusals();
    for (int isa = 0; isa <= prunus_best_isa(); ++isa) {
        g_random.seed(20250812);
        check_all_widths(isa);
        if (all) check_rounded(isa);
        std::printf("instruction set %d: done\n", isa);
    }
    if (all) check_damage();
    if (g_failures == 0) std::printf("all kernels agree with plain arithmetic\n");
    return g_failures != 0;
}
