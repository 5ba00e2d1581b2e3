// Products with bitmap weights on a CPU: the C interface and the choice of instruction set.
// kernels.h describes the interface; the inner loops are in kernels_<instruction set>.h.

#include "kernels.h"

#include <new>

#include "kernels_activations.h"
#include "kernels_bitmap.h"
#include "kernels_job.h"
#include "kernels_portable.h"
#include "kernels_threads.h"
#if defined(__x86_64__) && defined(__GNUC__)
#define PRUNUS_X86 1
#include "kernels_avx2.h"
#include "kernels_avx512.h"
#endif

namespace prunus {
namespace {

// ---- the choice of kernel --------------------------------------------------------------------------------

#if PRUNUS_X86
using BlockFn = void (*)(const Job&, int64_t begin, int64_t end, int64_t token);

// fns[i] works on i + 1 tokens at once; `most` is how many of them pay.
template <const BlockFn* fns, int most = kTokenBlock>
void rows_in_blocks(const Job& job, int64_t begin, int64_t end) {
    for_token_blocks(job.tokens, most,
                     [&](int64_t token, int64_t count) { fns[count - 1](job, begin, end, token); });
}

#define PRUNUS_COMMA ,
#define PRUNUS_BLOCKS(name, ...)                                                                            \
    constexpr BlockFn name[kTokenBlock] = {__VA_ARGS__ 1>, __VA_ARGS__ 2>, __VA_ARGS__ 3>, __VA_ARGS__ 4>,  \
                                           __VA_ARGS__ 5>, __VA_ARGS__ 6>, __VA_ARGS__ 7>, __VA_ARGS__ 8>};
PRUNUS_BLOCKS(kAvx2Bf16, avx2::rows_float<kBf16,)
PRUNUS_BLOCKS(kAvx2F16, avx2::rows_float<kF16,)
PRUNUS_BLOCKS(kAvx2I8, avx2::rows_int8<)
PRUNUS_BLOCKS(kAvx512Float, avx512::rows<avx512::Float<kBf16>, avx512::Bitmap<uint16_t>,)
PRUNUS_BLOCKS(kAvx512F16, avx512::rows<avx512::Float<kF16>, avx512::Bitmap<uint16_t>,)
PRUNUS_BLOCKS(kAvx512I8, avx512::rows<avx512::Int, avx512::Bitmap<int8_t>,)
PRUNUS_BLOCKS(kAvx512Bitmap, avx512::rows<avx512::Bf16, avx512::Bitmap<uint16_t>,)
PRUNUS_BLOCKS(kAvx512Coded, avx512::rows<avx512::Bf16, avx512::Bitmap<uint16_t PRUNUS_COMMA avx512::Values::kDecoded>,)
PRUNUS_BLOCKS(kAvx512Dense, avx512::rows<avx512::Bf16, avx512::Dense<uint16_t>,)
PRUNUS_BLOCKS(kAvx512DenseCoded, avx512::rows<avx512::Bf16, avx512::Dense<uint16_t PRUNUS_COMMA avx512::Values::kDecoded>,)
PRUNUS_BLOCKS(kAvx512DenseI8, avx512::rows<avx512::Int, avx512::Dense<int8_t>,)
#undef PRUNUS_BLOCKS
#undef PRUNUS_COMMA
#endif

struct Choice {
    void (*rows_fn)(const Job&, int64_t, int64_t);
    XForm form;
};

Choice choose(int isa, const PrunusWeight& weight, Kind activations) {
    const Kind values = Kind(weight.kind);
#if PRUNUS_X86
    if (isa >= kAvx512Bf16 && values == kBf16 && activations == kBf16) {
        if (weight.codes) return {weight.mask ? rows_in_blocks<kAvx512Coded> : rows_in_blocks<kAvx512DenseCoded>, XForm::kBf16};
        return {weight.mask ? rows_in_blocks<kAvx512Bitmap> : rows_in_blocks<kAvx512Dense>, XForm::kBf16};
    }
    if (isa >= kAvx512 && values == kI8)
        return {weight.mask ? rows_in_blocks<kAvx512I8, 4> : rows_in_blocks<kAvx512DenseI8, 4>, XForm::kSplitInt16};
    if (isa >= kAvx512 && values == kBf16) return {rows_in_blocks<kAvx512Float>, XForm::kFloat};
    if (isa >= kAvx512) return {rows_in_blocks<kAvx512F16>, XForm::kFloat};
    if (isa >= kAvx2 && values == kI8) return {rows_in_blocks<kAvx2I8>, XForm::kInt16};
    if (isa >= kAvx2 && values == kBf16) return {rows_in_blocks<kAvx2Bf16>, XForm::kFloat};
    if (isa >= kAvx2) return {rows_in_blocks<kAvx2F16>, XForm::kFloat};
#endif
    if (values == kI8) return {portable::rows_int8, XForm::kInt16};
    if (values == kBf16) return {portable::rows_float<kBf16>, XForm::kFloat};
    return {portable::rows_float<kF16>, XForm::kFloat};
}

// How this instruction set changes the form of weights.
void choose_conversions(Job& job, int isa) {
    job.expand_row = portable::expand_row;
    job.decode = portable::decode;
    job.dequantise = portable::dequantise;
#if PRUNUS_X86
    if (isa >= kAvx2) {
        job.expand_row = isa >= kAvx512 ? avx512::expand_row : avx2::expand_row;
        job.decode = isa >= kAvx512 ? avx512::decode : avx2::decode;
        job.dequantise = isa >= kAvx512 ? avx512::dequantise : avx2::dequantise;
    }
#else
    (void)isa;
#endif
}

// What a row takes in memory, on average.
int64_t bytes_per_row(const PrunusWeight& weight) {
    const int64_t values = weight.count * size_of(Kind(weight.kind)) / (weight.codes ? 2 : 1);
    return (weight.mask ? (weight.cols + 7) / 8 : 0) + (values + (weight.codes ? weight.count / 2 : 0)) / weight.rows;
}

// ---- the interface ---------------------------------------------------------------------------------------

template <typename Fn>
int guarded(Fn fn) {
    try {
        return fn();
    } catch (const std::bad_alloc&) {
        return PRUNUS_OUT_OF_MEMORY;
    }
}

thread_local Scratch t_scratch;

int detect_isa() {
#if PRUNUS_X86
    __builtin_cpu_init();  // the checks below include that the operating system saves the registers
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
                        __builtin_cpu_supports("bmi2");
    if (avx2 && avx512) return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
    if (avx2) return kAvx2;
#endif
    return kPortable;
}

}  // namespace
}  // namespace prunus

using namespace prunus;

extern "C" {

int prunus_abi(void) { return 2; }

int prunus_best_isa(void) {
    static const int best = detect_isa();
    return best;
}

void prunus_set_runtime(void* gomp_parallel) { g_parallel = reinterpret_cast<GompParallel>(gomp_parallel); }

int64_t prunus_row_offsets(int64_t rows, int64_t cols, const uint8_t* mask, int64_t* offsets) {
    const int64_t stride = (cols + 7) / 8;
    const uint8_t outside = cols % 8 ? uint8_t(0xff << cols % 8) : 0;
    int64_t total = 0;
    for (int64_t row = 0; row < rows; ++row) {
        offsets[row] = total;
        const uint8_t* row_mask = mask + row * stride;
        if (row_mask[stride - 1] & outside) return -1;
        total += count_bits(row_mask, cols);
    }
    offsets[rows] = total;
    return total;
}

int prunus_linear(int isa, int threads, const PrunusWeight* weight, int64_t tokens, int act_kind, const void* x,
                  const void* bias, void* out) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (tokens < 1 || !x || !out || act_kind < kBf16 || act_kind > kF32) return PRUNUS_BAD_ARGUMENT;
    return guarded([&] {
        Job job;
        const int fault = describe(job, weight, t_scratch);
        if (fault) return fault;
        const Choice choice = choose(isa, *weight, Kind(act_kind));
        choose_conversions(job, isa);
        if (!job.coded) copy_tail(job, Kind(weight->kind), weight->count, t_scratch);
        job.tokens = tokens;
        job.sums = sized<float>(t_scratch.sums, tokens * job.rows);
        job.bias = bias;
        job.out = out;
        job.out_kind = Kind(act_kind);
        job.rows_fn = choice.rows_fn;
        if (choice.form == XForm::kBf16) lay_out_bf16(job, x, t_scratch);
        else if (choice.form == XForm::kFloat) lay_out_float(job, x, job.out_kind, t_scratch);
        else lay_out_int16(job, x, job.out_kind, choice.form, t_scratch);
        run(job, threads, bytes_per_row(*weight), t_scratch);
        return int(PRUNUS_OK);
    });
}

int prunus_expand(int isa, int threads, const PrunusWeight* weight, int out_kind, void* out) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (!weight || !out || !is_float16_kind(out_kind)) return PRUNUS_BAD_ARGUMENT;
    if (weight->kind != kI8 && weight->kind != out_kind) return PRUNUS_BAD_ARGUMENT;
    return guarded([&] {
        Job job;
        const int fault = describe(job, weight, t_scratch);
        if (fault) return fault;
        choose_conversions(job, isa);
        if (!job.coded) copy_tail(job, Kind(weight->kind), weight->count, t_scratch);
        job.out = out;
        job.rows_fn = weight->kind != kI8 ? expand_words
                      : out_kind == kBf16 ? expand_int8<kBf16>
                                          : expand_int8<kF16>;
        run(job, threads, job.cols * 2, t_scratch);
        return int(PRUNUS_OK);
    });
}

uint64_t prunus_read(int threads, const void* data, int64_t bytes) {
    constexpr int64_t kRow = 1 << 16;
    std::atomic<uint64_t> total{0};
    Job job{};
    job.rows = bytes / kRow;
    job.values = data;
    job.out = &total;
    job.rows_fn = [](const Job& job, int64_t begin, int64_t end) {
        const uint64_t* words = static_cast<const uint64_t*>(job.values);
        uint64_t sum = 0;
        for (int64_t i = begin * kRow / 8; i < end * kRow / 8; ++i) sum += words[i];
        *static_cast<std::atomic<uint64_t>*>(job.out) += sum;
    };
    if (job.rows > 0) run(job, threads, kRow, t_scratch);
    return total;
}
}
