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
PRUNUS_BLOCKS(kAvx512Dense, avx512::rows<avx512::Bf16, avx512::Dense,)
#undef PRUNUS_BLOCKS
#endif

struct Choice {
    void (*rows_fn)(const Job&, int64_t, int64_t);
    XForm form;
};

Choice choose(int isa, Kind values, Kind activations) {
#if PRUNUS_X86
    if (isa >= kAvx512Bf16 && values == kBf16 && activations == kBf16)
        return {rows_in_blocks<kAvx512Bitmap>, XForm::kBf16};
    if (isa >= kAvx512 && values == kI8) return {rows_in_blocks<kAvx512I8, 4>, XForm::kSplitInt16};
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

void choose_expansion(Job& job, int isa) {
    job.expand_row = portable::expand_row;
    job.dequantise = portable::dequantise;
#if PRUNUS_X86
    if (isa >= kAvx2) {
        job.expand_row = isa >= kAvx512 ? avx512::expand_row : avx2::expand_row;
        job.dequantise = isa >= kAvx512 ? avx512::dequantise : avx2::dequantise;
    }
#else
    (void)isa;
#endif
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
                        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
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

int prunus_abi(void) { return 1; }

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

int prunus_bitmap_linear(int isa, int threads, int64_t rows, int64_t cols, int64_t tokens, const uint8_t* mask,
                         int value_kind, const void* values, int64_t count, const int64_t* offsets,
                         const float* scales, int act_kind, const void* x, const void* bias, void* out) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (tokens < 1 || !x || !out || act_kind < kBf16 || act_kind > kF32) return PRUNUS_BAD_ARGUMENT;
    Job job;
    const int fault = describe(job, rows, cols, mask, value_kind, values, count, offsets, scales);
    if (fault) return fault;
    return guarded([&] {
        const Choice choice = choose(isa, Kind(value_kind), Kind(act_kind));
        copy_tail(job, Kind(value_kind), count, t_scratch);
        job.tokens = tokens;
        job.sums = sized<float>(t_scratch.sums, tokens * rows);
        job.bias = bias;
        job.out = out;
        job.out_kind = Kind(act_kind);
        job.rows_fn = choice.rows_fn;
        if (choice.form == XForm::kBf16) lay_out_bf16(job, x, t_scratch);
        else if (choice.form == XForm::kFloat) lay_out_float(job, x, job.out_kind, t_scratch);
        else lay_out_int16(job, x, job.out_kind, choice.form, t_scratch);
        run(job, threads, job.mask_stride + count * size_of(Kind(value_kind)) / rows);
        return int(PRUNUS_OK);
    });
}

int prunus_dense_linear(int isa, int threads, int64_t rows, int64_t cols, int64_t tokens, const void* weight,
                        const void* x, const void* bias, void* out) {
#if PRUNUS_X86
    if (isa != kAvx512Bf16 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (rows < 1 || cols < 1 || tokens < 1 || !weight || !x || !out) return PRUNUS_BAD_ARGUMENT;
    return guarded([&] {
        Job job{};
        job.rows = rows;
        job.cols = cols;
        job.tokens = tokens;
        job.segments = (cols + kSegment - 1) / kSegment;
        job.values = weight;
        job.sums = sized<float>(t_scratch.sums, tokens * rows);
        job.bias = bias;
        job.out = out;
        job.out_kind = kBf16;
        job.rows_fn = rows_in_blocks<kAvx512Dense>;
        lay_out_bf16(job, x, t_scratch);
        run(job, threads, cols * 2);
        return int(PRUNUS_OK);
    });
#else
    (void)isa, (void)threads, (void)rows, (void)cols, (void)tokens, (void)weight, (void)x, (void)bias, (void)out;
    return PRUNUS_NO_SUCH_ISA;
#endif
}

int prunus_bitmap_expand(int isa, int threads, int64_t rows, int64_t cols, const uint8_t* mask, int value_kind,
                         const void* values, int64_t count, const int64_t* offsets, const float* scales,
                         int out_kind, void* out) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (!out || !is_float16_kind(out_kind)) return PRUNUS_BAD_ARGUMENT;
    if (value_kind != kI8 && value_kind != out_kind) return PRUNUS_BAD_ARGUMENT;
    Job job;
    const int fault = describe(job, rows, cols, mask, value_kind, values, count, offsets, scales);
    if (fault) return fault;
    return guarded([&] {
        copy_tail(job, Kind(value_kind), count, t_scratch);
        job.out = out;
        choose_expansion(job, isa);
        job.rows_fn = value_kind != kI8   ? expand_words
                      : out_kind == kBf16 ? expand_int8<kBf16>
                                          : expand_int8<kF16>;
        run(job, threads, cols * 2);
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
    if (job.rows > 0) run(job, threads, kRow);
    return total;
}
}
