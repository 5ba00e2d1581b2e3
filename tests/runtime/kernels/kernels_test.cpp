// Compares every kernel of every instruction set that this machine has with float64 arithmetic, on
// arrays that end where their last element does: under AddressSanitizer a read or write past them
// is an error. Run by tests/sanitize.sh.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../../src/prunus/runtime/kernels/kernels.h"
#include "../../../src/prunus/runtime/kernels/job.h"
#include "checks.h"

using namespace prunus;

namespace {

// An array of exactly `count` elements on the heap.
template <typename T>
struct Exact {
    std::unique_ptr<T[]> data;
    int64_t count;
    explicit Exact(int64_t n) : data(new T[size_t(n)]), count(n) {}
    T& operator[](int64_t i) { return data[size_t(i)]; }
    T* get() { return data.get(); }
};

// Activations, biases and outputs in one of the three floating-point kinds.
struct Floats {
    Kind kind;
    Exact<uint8_t> bytes;
    Floats(Kind k, int64_t n) : kind(k), bytes(n * (k == kF32 ? 4 : 2)) {}
    void set(int64_t i, float value) { store_as(bytes.get(), i, kind, value); }
    double at(int64_t i) { return load_as_float(bytes.get(), i, kind); }
};

double unit_roundoff(Kind kind) { return kind == kF32 ? 0x1p-24 : kind == kF16 ? 0x1p-11 : 0x1p-8; }

struct Matrix {
    int64_t rows, cols, count;
    Kind kind;
    bool whole;  // all weights are stored: density 1 and no mask
    std::vector<double> dense;
    Exact<uint8_t> mask, values;
    Exact<int64_t> offsets;
    Exact<float> scales;
    bool coded = false;
    Exact<uint8_t> low_bytes{0}, codes{0}, high_bytes{16};
    std::vector<int64_t> rare_at;
    std::vector<uint8_t> rare;

    Matrix(int64_t r, int64_t c, double density, Kind k, bool all = false)
        : rows(r),
          cols(c),
          count(0),
          kind(k),
          whole(all),
          dense(size_t(r * c)),
          mask(r * ((c + 7) / 8)),
          values(0),
          offsets(r + 1),
          scales(r) {
        const int64_t stride = (c + 7) / 8;
        std::vector<bool> kept(size_t(r * c));
        for (int64_t i = 0; i < mask.count; ++i) mask[i] = 0;
        for (int64_t row = 0; row < r; ++row) {
            const int64_t kind_of_row = between(0, 9);  // some rows empty, some full
            for (int64_t col = 0; col < c; ++col) {
                const bool keep = whole              ? true
                                  : kind_of_row == 0 ? false
                                  : kind_of_row == 1
                                      ? true
                                      : std::bernoulli_distribution(density)(g_random);
                kept[size_t(row * c + col)] = keep;
                count += keep;
                if (keep) mask[row * stride + col / 8] |= uint8_t(1 << col % 8);
            }
        }
        CHECK(prunus_row_offsets(r, c, mask.get(), offsets.get()) == count, "rows %ld cols %ld",
              long(r), long(c));
        values = Exact<uint8_t>(count * (k == kI8 ? 1 : 2));
        int64_t next = 0;
        for (int64_t i = 0; i < r * c; ++i) {
            if (i % c == 0) scales[i / c] = 0.001f + std::fabs(normal());
            if (!kept[size_t(i)]) continue;
            if (k == kI8) {
                const int8_t value = int8_t(between(-128, 127));
                values[next++] = uint8_t(value);
                dense[size_t(i)] = double(value) * scales[i / c];
            } else {
                store_as(values.get(), next, k, normal());
                dense[size_t(i)] = load_as_float(values.get(), next++, k);
            }
        }
    }
    // Splits bfloat16 values into low bytes and codes, an entry at a time. With few high bytes,
    // some values are rare.
    void encode(int known) {
        coded = true;
        const int64_t groups = (count + kCodedGroup - 1) / kCodedGroup;
        low_bytes = Exact<uint8_t>(groups * kCodedGroup);
        codes = Exact<uint8_t>(groups * kCodedGroup / 2);
        for (int code = 0; code < 16; ++code)
            high_bytes[code] = uint8_t((code % 2 ? 0xbf : 0x3f) - code / 2);
        for (int64_t i = 0; i < low_bytes.count; ++i) low_bytes[i] = 0;
        for (int64_t i = 0; i < codes.count; ++i) codes[i] = 0;
        for (int64_t i = 0; i < count; ++i) {
            int code = 0;
            while (code < known && high_bytes[code] != values[2 * i + 1]) ++code;
            if (code == known) rare_at.push_back(i), rare.push_back(values[2 * i + 1]), code = 0;
            const int64_t at = i % kCodedGroup;
            low_bytes[i] = values[2 * i];
            codes[i / kCodedGroup * kCodedGroup / 2 + at % 32] |=
                uint8_t(code << (at < 32 ? 0 : 4));
        }
    }
    PrunusWeight weight() {
        PrunusWeight w{};
        w.rows = rows;
        w.cols = cols;
        w.count = coded ? low_bytes.count : count;
        w.mask = whole ? nullptr : mask.get();
        w.offsets = whole ? nullptr : offsets.get();
        w.values = coded ? low_bytes.get() : values.get();
        w.scales = kind == kI8 ? scales.get() : nullptr;
        w.codes = coded ? codes.get() : nullptr;
        w.high_bytes = coded ? high_bytes.get() : nullptr;
        w.rare_at = rare_at.data();
        w.rare_values = rare.data();
        w.rare = int64_t(rare.size());
        w.kind = kind;
        return w;
    }
};

void check_product(int isa, int threads, Matrix& w, int64_t tokens, Kind act, bool with_bias) {
    Floats x(act, tokens * w.cols), bias(act, w.rows), out(act, tokens * w.rows);
    for (int64_t i = 0; i < tokens * w.cols; ++i) x.set(i, normal());
    for (int64_t i = 0; i < w.rows; ++i) bias.set(i, normal());
    const void* bias_data = with_bias ? bias.bytes.get() : nullptr;
    const PrunusWeight weight = w.weight();
    const int code = prunus_linear(isa, threads, &weight, tokens, act, x.bytes.get(), bias_data,
                                   out.bytes.get());
    CHECK(code == PRUNUS_OK, "code %d", code);
    // Then int8 values are rounded to bfloat16, times their scale, instead of the activations to
    // integers.
    const bool as_matrix = isa >= kAvx512Bf16 && tokens > kFewTokens && act == kBf16;
    for (int64_t token = 0; token < tokens; ++token) {
        double largest = 0;
        for (int64_t col = 0; col < w.cols; ++col)
            largest = std::fmax(largest, std::fabs(x.at(token * w.cols + col)));
        for (int64_t row = 0; row < w.rows; ++row) {
            double sum = 0, magnitude = 0, weight_sum = 0;
            for (int64_t col = 0; col < w.cols; ++col) {
                const double weight = w.dense[size_t(row * w.cols + col)],
                             product = weight * x.at(token * w.cols + col);
                sum += product;
                magnitude += std::fabs(product);
                weight_sum += std::fabs(weight);
            }
            if (with_bias) sum += bias.at(row), magnitude += std::fabs(bias.at(row));
            // Float32 summation, the rounding of the result, and for int8 that of the activations
            // or the weights.
            const double bound = 1e-6 * magnitude + unit_roundoff(act) * std::fabs(sum) * 1.01 +
                                 1e-7 +
                                 (w.kind != kI8 ? 0
                                  : as_matrix   ? magnitude * 0x1p-8
                                                : weight_sum * largest / 65000);
            const double error = std::fabs(out.at(token * w.rows + row) - sum);
            CHECK(
                error <= bound,
                "isa %d threads %d %ldx%ld tokens %ld values %d activations %d: error %g bound %g",
                isa, threads, long(w.rows), long(w.cols), long(tokens), int(w.kind), int(act),
                error, bound);
        }
    }
}

void check_expand(int isa, int threads, Matrix& w, Kind out_kind) {
    Exact<uint16_t> out(w.rows * w.cols);
    const PrunusWeight weight = w.weight();
    const int code = prunus_expand(isa, threads, &weight, out_kind, out.get());
    CHECK(code == PRUNUS_OK, "code %d", code);
    for (int64_t i = 0; i < w.rows * w.cols; ++i) {
        const float expected = float(w.dense[size_t(i)]);
        const uint16_t bits = out_kind == kBf16 ? float_to_bf16(expected) : float_to_f16(expected);
        CHECK(out[i] == bits, "isa %d expand %ldx%ld at %ld", isa, long(w.rows), long(w.cols),
              long(i));
    }
    Exact<int64_t> rows(3);
    for (int64_t i = 0; i < rows.count; ++i) rows[i] = between(0, w.rows - 1);
    Exact<uint16_t> some(rows.count * w.cols);
    const int also = prunus_expand_rows(isa, &weight, rows.get(), rows.count, out_kind, some.get());
    CHECK(also == PRUNUS_OK, "code %d", also);
    for (int64_t i = 0; i < rows.count * w.cols; ++i)
        CHECK(some[i] == out[rows[i / w.cols] * w.cols + i % w.cols],
              "isa %d rows of %ldx%ld at %ld", isa, long(w.rows), long(w.cols), long(i));
    rows[1] = w.rows;
    CHECK(prunus_expand_rows(isa, &weight, rows.get(), rows.count, out_kind, some.get()) ==
              PRUNUS_BAD_ARGUMENT,
          "no such row");
}

// A random block, and what it computes in float64 without any rounding in between.
struct RandomBlock {
    int64_t hidden, inner, key_heads, heads, dim;
    Kind kind;
    bool has_four, of_heads;
    int form, activation;
    std::vector<Matrix> linears;
    std::vector<PrunusWeight> weights;
    std::vector<Floats> biases, norms;
    PrunusBlock block{};

    RandomBlock(Kind k, bool four, bool norms_of_heads, int norm_form)
        : hidden(between(1, 80)),
          inner(between(1, 90)),
          key_heads(between(1, 3)),
          heads(key_heads * between(1, 4)),
          dim(2 * between(1, 20)),
          kind(k),
          has_four(four),
          of_heads(norms_of_heads),
          form(norm_form),
          activation(norm_form) {
        const int64_t query = heads * dim, key = key_heads * dim;
        const int64_t shapes[7][2] = {{query, hidden}, {key, hidden},   {key, hidden},
                                      {hidden, query}, {inner, hidden}, {inner, hidden},
                                      {hidden, inner}};
        for (const auto& shape : shapes) {
            linears.emplace_back(shape[0], shape[1], 0.5, kBf16);
            biases.push_back(random(shape[0], 1));
        }
        for (Matrix& linear : linears) weights.push_back(linear.weight());
        PrunusMatrix* to = &block.query;
        for (size_t i = 0; i < 7; ++i) to[i] = {&weights[i], nullptr, biases[i].bytes.get()};
        for (int64_t width : {hidden, hidden, dim, dim, hidden, hidden})
            norms.push_back(random(width, 1));
        block.hidden = hidden;
        block.heads = heads;
        block.key_heads = key_heads;
        block.dim = dim;
        block.inner = inner;
        const void** norm = &block.norm_attention;
        for (size_t i = 0; i < 6; ++i)
            if (i < 2 || (i < 4 ? of_heads : has_four)) norm[i] = norms[i].bytes.get();
        block.eps = 1e-3f;
        block.scaling = 0.3f;
        block.norm_form = form;
        block.activation = activation;
    }

    Floats random(int64_t count, float size) {
        Floats made(kind, count);
        for (int64_t i = 0; i < count; ++i) made.set(i, size * normal());
        return made;
    }

    using Numbers = std::vector<double>;

    Numbers multiply(size_t which, const Numbers& x) {
        const Matrix& w = linears[which];
        Numbers out(size_t(w.rows));
        for (int64_t row = 0; row < w.rows; ++row) {
            out[size_t(row)] = biases[which].at(row);
            for (int64_t col = 0; col < w.cols; ++col)
                out[size_t(row)] += w.dense[size_t(row * w.cols + col)] * x[size_t(col)];
        }
        return out;
    }

    Numbers norm(size_t which, const Numbers& x) {
        const size_t width = which == 2 || which == 3 ? size_t(dim) : x.size();
        Numbers out = x;
        for (size_t first = 0; first < x.size(); first += width) {
            double squares = 0;
            for (size_t i = first; i < first + width; ++i) squares += x[i] * x[i];
            for (size_t i = first; i < first + width; ++i)
                out[i] = x[i] / std::sqrt(squares / double(width) + block.eps) *
                         (norms[which].at(int64_t(i - first)) + (form == 1));
        }
        return out;
    }

    Numbers rotate(const Numbers& x, Floats& cos, Floats& sin) {
        Numbers out = x;
        const size_t width = size_t(dim), half = width / 2;
        for (size_t i = 0; i < x.size(); ++i) {
            const size_t at = i % width;
            const double other = at < half ? -x[i + half] : x[i - half];
            out[i] = x[i] * cos.at(int64_t(at)) + other * sin.at(int64_t(at));
        }
        return out;
    }
};

void check_block(int isa, int threads, Kind kind, int round) {
    RandomBlock r(kind, round % 2, round / 2 % 2, round / 4 % 2);
    const int64_t length = between(1, round % 3 ? 9 : 90), count = between(1, 3),
                  stride = (length + between(0, 3)) * r.dim, cached = count * r.key_heads * stride;
    Floats x = r.random(count * r.hidden, 1), out(kind, count * r.hidden),
           keys = r.random(cached, 1), values = r.random(cached, 1), cos = r.random(r.dim, 1),
           sin = r.random(r.dim, 1);
    Exact<uint8_t> mask(count * length);
    for (int64_t i = 0; i < mask.count; ++i)
        mask[i] = i % length == length - 1 || between(0, 3) > 0;
    PrunusTokens tokens{count,           length,          keys.bytes.get(), values.bytes.get(),
                        stride,          cos.bytes.get(), sin.bytes.get(),  0,
                        round % 5 ? nullptr : mask.get()};
    const int code =
        prunus_block(isa, threads, kind, &r.block, &tokens, x.bytes.get(), out.bytes.get());
    CHECK(code == PRUNUS_OK, "code %d", code);
    using Numbers = RandomBlock::Numbers;
    for (int64_t token = 0; token < count; ++token) {
        Numbers hidden(size_t(r.hidden));
        for (int64_t i = 0; i < r.hidden; ++i) hidden[size_t(i)] = x.at(token * r.hidden + i);
        const Numbers normed = r.norm(0, hidden);
        Numbers query = r.multiply(0, normed), key = r.multiply(1, normed);
        if (r.of_heads) {
            query = r.norm(2, query);
            key = r.norm(3, key);
        }
        query = r.rotate(query, cos, sin);
        key = r.rotate(key, cos, sin);
        const Numbers value = r.multiply(2, normed);
        Numbers attended(query.size());
        for (int64_t head = 0; head < r.heads; ++head) {
            const int64_t shared = head / (r.heads / r.key_heads),
                          first = (token * r.key_heads + shared) * stride;
            Numbers weights;
            double total = 0, most = -1e300;
            for (int64_t at = 0; at < length; ++at) {
                double dot = 0;
                for (int64_t i = 0; i < r.dim; ++i)
                    dot += query[size_t(head * r.dim + i)] *
                           (at + 1 < length ? keys.at(first + at * r.dim + i)
                                            : key[size_t(shared * r.dim + i)]);
                const bool seen = !tokens.mask || mask[token * length + at];
                weights.push_back(seen ? dot * double(r.block.scaling) : -1e300);
                most = weights.back() > most ? weights.back() : most;
            }
            for (double& weight : weights) total += weight = std::exp(weight - most);
            for (int64_t at = 0; at < length; ++at)
                for (int64_t i = 0; i < r.dim; ++i)
                    attended[size_t(head * r.dim + i)] +=
                        weights[size_t(at)] / total *
                        (at + 1 < length ? values.at(first + at * r.dim + i)
                                         : value[size_t(shared * r.dim + i)]);
        }
        Numbers result = r.multiply(3, attended);
        if (r.has_four) result = r.norm(4, result);
        for (size_t i = 0; i < hidden.size(); ++i) hidden[i] += result[i];
        const Numbers fed = r.norm(1, hidden);
        Numbers gate = r.multiply(4, fed);
        const Numbers up = r.multiply(5, fed);
        for (size_t i = 0; i < gate.size(); ++i) {
            const double g = gate[i];
            gate[i] = up[i] * (r.activation == 0
                                   ? g / (1 + std::exp(-g))
                                   : g / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) *
                                                            (g + 0.044715 * g * g * g))));
        }
        result = r.multiply(6, gate);
        if (r.has_four) result = r.norm(5, result);
        double error = 0, size = 0;
        for (size_t i = 0; i < hidden.size(); ++i) {
            const double exact = hidden[i] + result[i],
                         found = out.at(token * r.hidden + int64_t(i));
            error += (found - exact) * (found - exact);
            size += exact * exact;
        }
        const double bound = kind == kF32 ? 1e-4 : kind == kF16 ? 0.02 : 0.1;
        CHECK(error <= bound * bound * size, "isa %d block %d of kind %d: %g of %g", isa, round,
              int(kind), std::sqrt(error), std::sqrt(size));
    }
}

void check_block_refusals() {
    RandomBlock r(kF32, false, false, 0);
    Floats x = r.random(r.hidden, 1), out(kF32, r.hidden), cache = r.random(r.key_heads * r.dim, 1);
    PrunusTokens tokens{1,     1, cache.bytes.get(), cache.bytes.get(),
                        r.dim, x.bytes.get(), x.bytes.get(), 0, nullptr};
    auto call = [&](int isa, int kind) {
        return prunus_block(isa, 1, kind, &r.block, &tokens, x.bytes.get(), out.bytes.get());
    };
    CHECK(call(9, kF32) == PRUNUS_NO_SUCH_ISA, "block: instruction set 9");
    CHECK(call(0, kI8) == PRUNUS_BAD_ARGUMENT, "block: int8");
    // Each change is taken back.
    auto refused = [&](auto& field, auto value, const char* what) {
        const auto before = field;
        field = value;
        CHECK(call(0, kF32) == PRUNUS_BAD_ARGUMENT, "block: %s", what);
        field = before;
    };
    refused(r.block.dim, r.dim + 1, "an odd width of heads");
    refused(r.block.heads, r.heads * r.key_heads + 1, "heads that queries do not have");
    refused(r.block.norm_form, 2, "no such norm");
    refused(r.block.activation, 2, "no such activation");
    refused(r.block.norm_feed, nullptr, "no norm");
    refused(r.block.norm_key, x.bytes.get(), "a norm of keys alone");
    refused(r.block.up.weight, nullptr, "no weight");
    refused(r.block.up.weight, &r.weights[3], "a weight of another shape");
    refused(tokens.count, 0, "no tokens");
    refused(tokens.length, 0, "no positions");
    refused(tokens.length, 2, "positions past the head");
    refused(tokens.keys, nullptr, "no keys");
}

// Two batches of inputs, added by one thread and by three.
void check_gram(int isa, int64_t features) {
    Exact<float> sums(features * features), others(features * features);
    std::vector<double> exact(size_t(features * features)), size = exact;
    for (int64_t i = 0; i < sums.count; ++i) sums[i] = others[i] = 0;
    int fault = PRUNUS_OK;
    for (int batch = 0; batch < 2; ++batch) {
        const int64_t tokens = between(1, 3) == 1 ? between(500, 1100) : between(1, 70);
        Floats x(kBf16, tokens * features);
        for (int64_t i = 0; i < tokens * features; ++i) x.set(i, normal());
        fault = prunus_add_gram(isa, 1, tokens, features, x.bytes.get(), sums.get());
        if (fault != prunus_add_gram(isa, 3, tokens, features, x.bytes.get(), others.get())) break;
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t i = 0; i < sums.count; ++i) {
                const double product = x.at(token * features + i / features) *
                                       x.at(token * features + i % features);
                exact[size_t(i)] += product;
                size[size_t(i)] += std::abs(product);
            }
    }
    if (fault == PRUNUS_NO_SUCH_ISA) return;
    CHECK(fault == PRUNUS_OK, "gram: fault %d", fault);
    for (int64_t i = 0; i < sums.count; ++i)
        CHECK(sums[i] == others[i] &&
                  std::abs(sums[i] - exact[size_t(i)]) <= 4e-6 * size[size_t(i)],
              "gram of %d features, instruction set %d", int(features), isa);
}

void check_conversions() {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const float half = f16_to_float(uint16_t(bits)), brain = bf16_to_float(uint16_t(bits));
        if (half == half)
            CHECK(float_to_f16(half) == bits, "f16 %x", bits);
        else
            CHECK(std::isnan(f16_to_float(float_to_f16(half))), "f16 NaN %x", bits);
        if (brain == brain)
            CHECK(float_to_bf16(brain) == bits, "bf16 %x", bits);
        else
            CHECK(std::isnan(bf16_to_float(float_to_bf16(brain))), "bf16 NaN %x", bits);
    }
    CHECK(float_to_f16(65519.9f) == 0x7bff && float_to_f16(65520.0f) == 0x7c00, "f16 overflow");
    CHECK(float_to_bf16(1.00390625f) == 0x3f80 && float_to_bf16(1.01171875f) == 0x3f82,
          "ties go to even");
}

void check_refusals() {
    Matrix w(3, 70, 0.5, kBf16);
    Floats x(kBf16, 70), out(kBf16, 3);
    auto call = [&](int isa, int64_t rows, int64_t count, int act, const void* data) {
        PrunusWeight weight = w.weight();
        weight.rows = rows;
        weight.count = count;
        return prunus_linear(isa, 1, &weight, 1, act, data, nullptr, out.bytes.get());
    };
    PrunusWeight weight = w.weight();
    weight.codes = weight.mask;  // codes without the bytes that they stand for
    CHECK(prunus_expand(0, 1, &weight, kBf16, out.bytes.get()) == PRUNUS_BAD_ARGUMENT,
          "no high bytes");
    weight = w.weight();
    weight.mask = nullptr;
    CHECK(prunus_expand(0, 1, &weight, kBf16, out.bytes.get()) == PRUNUS_BAD_ARGUMENT,
          "offsets without a mask");
    CHECK(prunus_expand(0, 1, nullptr, kBf16, out.bytes.get()) == PRUNUS_BAD_ARGUMENT, "no weight");
    CHECK(call(0, 3, w.count, kI8, x.bytes.get()) == PRUNUS_BAD_ARGUMENT, "int8 activations");
    CHECK(call(0, 3, w.count - 1, kBf16, x.bytes.get()) == PRUNUS_BAD_ARGUMENT, "a value too few");
    CHECK(call(0, 0, w.count, kBf16, x.bytes.get()) == PRUNUS_BAD_ARGUMENT, "no rows");
    CHECK(call(0, 3, w.count, kBf16, nullptr) == PRUNUS_BAD_ARGUMENT, "no activations");
    CHECK(call(9, 3, w.count, kBf16, x.bytes.get()) == PRUNUS_NO_SUCH_ISA, "instruction set 9");
    w.mask[8] |= 0x80;  // column 71 of a row of 70
    CHECK(prunus_row_offsets(3, 70, w.mask.get(), w.offsets.get()) == -1,
          "a bit past the last column");
}

}  // namespace

int main() {
    g_random.seed(20240611);
    check_conversions();
    check_refusals();
    check_block_refusals();
    prunus_set_runtime(reinterpret_cast<void*>(fork_and_join));
    const double densities[] = {0.0, 0.05, 0.5, 0.95, 1.0};
    const Kind activations[] = {kBf16, kF16, kF32};
    for (int isa = 0; isa <= prunus_best_isa(); ++isa) {
        for (int round = 0; round < 150; ++round) {
            const int64_t rows = between(1, 60),
                          cols = round % 3 ? between(1, 700) : between(1, 10) * 64;
            const Kind kind = round % 3 == 0 ? kBf16 : round % 3 == 1 ? kF16 : kI8;
            Matrix w(rows, cols, densities[between(0, 4)], kind, round % 4 == 3);
            const int threads = round % 5 == 0 ? 3 : 1;
            const int64_t tokens = round % 4 ? between(1, 19) : between(17, 70);
            const Kind act = activations[between(0, 2)];
            check_product(isa, threads, w, tokens, act, round % 2);
            check_expand(isa, threads, w, kind == kI8 ? (round % 2 ? kBf16 : kF16) : kind);
            if (kind != kBf16) continue;
            w.encode(int(between(1, 16)));
            check_product(isa, threads, w, tokens, act, round % 2);
            check_expand(isa, threads, w, kind);
        }
        Matrix wide(5, 9001, 0.5, kI8);  // more than one block of the int8 expansion
        check_expand(isa, 1, wide, kBf16);
        Matrix large(700, 1100, 0.5, kBf16);  // enough rows for several threads
        check_product(isa, 3, large, 2, kBf16, true);
        large.encode(12);
        check_product(isa, 3, large, 2, kBf16, true);
        for (int round = 0; round < 60; ++round)
            check_block(isa, round % 4 ? 1 : 3, activations[between(0, 2)], round);
        for (const int64_t features : {1, 16, 31, 65, 130, 300}) check_gram(isa, features);
        std::printf("instruction set %d: done\n", isa);
    }
    Exact<uint8_t> bytes(3 << 16);
    for (int64_t i = 0; i < bytes.count; ++i) bytes[i] = uint8_t(i % 8 == 0);
    CHECK(prunus_read(2, bytes.get(), bytes.count) == uint64_t(bytes.count / 8), "read");
    if (g_failures == 0) std::printf("all kernels agree with float64\n");
    return g_failures != 0;
}
