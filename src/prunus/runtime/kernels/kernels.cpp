// Products with bitmap weights on a CPU: the C interface and the choice of the instruction set.
//
// kernels.h describes the interface. The inner loops are in one header per instruction set.

#include "kernels.h"

#include <new>

#include "activations.h"
#include "bitmap.h"
#include "job.h"
#include "portable.h"
#include "threads.h"
#if defined(__x86_64__) && defined(__GNUC__)
#define PRUNUS_X86 1
#include "avx2.h"
#include "avx512.h"
#include "amx.h"
#include "amx_int8.h"
#include "amx_many.h"
#include "many.h"
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif PRUNUS_ARM && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace prunus {
namespace {

thread_local Scratch t_scratch;

// ---- The choice of the kernel. ----

#if PRUNUS_X86
using BlockFn = void (*)(const Job&, int64_t begin, int64_t end, int64_t token);

// fns[i] works on i + 1 tokens at once; `most` is the number of tokens up to which it pays off.
template <const BlockFn* fns, int most = kTokenBlock>
void rows_in_blocks(const Job& job, int64_t begin, int64_t end) {
    for_token_blocks(job.tokens, most,
                     [&](int64_t token, int64_t count) { fns[count - 1](job, begin, end, token); });
}

#define PRUNUS_BLOCKS(name, ...)                                                              \
    constexpr BlockFn name[kTokenBlock] = {__VA_ARGS__ 1 >, __VA_ARGS__ 2 >, __VA_ARGS__ 3 >, \
                                           __VA_ARGS__ 4 >, __VA_ARGS__ 5 >, __VA_ARGS__ 6 >, \
                                           __VA_ARGS__ 7 >, __VA_ARGS__ 8 > };
PRUNUS_BLOCKS(kAvx2Bf16, avx2::rows_float < kBf16, )
PRUNUS_BLOCKS(kAvx2F16, avx2::rows_float < kF16, )
PRUNUS_BLOCKS(kAvx2I8, avx2::rows_int8 <)
PRUNUS_BLOCKS(kAvx512Float, avx512::rows < avx512::Float<kBf16>, avx512::Bitmap<uint16_t>, )
PRUNUS_BLOCKS(kAvx512F16, avx512::rows < avx512::Float<kF16>, avx512::Bitmap<uint16_t>, )
PRUNUS_BLOCKS(kAvx512I8, avx512::rows < avx512::Int, avx512::Bitmap<int8_t>, )
PRUNUS_BLOCKS(kAvx512Bitmap, avx512::rows < avx512::Bf16, avx512::Bitmap<uint16_t>, )
PRUNUS_BLOCKS(kAvx512Coded, avx512::rows < avx512::Bf16, avx512::CodedBitmap, )
PRUNUS_BLOCKS(kAvx512Dense, avx512::rows < avx512::Bf16, avx512::Dense<uint16_t>, )
PRUNUS_BLOCKS(kAvx512DenseCoded, avx512::rows < avx512::Bf16, avx512::CodedDense, )
PRUNUS_BLOCKS(kAvx512DenseI8, avx512::rows < avx512::Int, avx512::Dense<int8_t>, )
#undef PRUNUS_BLOCKS
#endif

struct Choice {
    void (*rows_fn)(const Job&, int64_t, int64_t);
    XForm form;
    enum { kWhole, kHighBytes, kNothing } decoded = kWhole;  // form of coded values for rows_fn
    int64_t rows_at_once = 0;  // rows per call, and the memory for them
    int64_t panel_bytes = 0;
    int64_t decoded_rows = 0, decoded_buffers = 0;
    bool writes = false;  // whether it writes results and not only sums
};

#if PRUNUS_X86
constexpr int64_t kFewestForTiles = 4;

// bfloat16 or int8 values times more than a few bfloat16 tokens.
Choice choose_many(int isa, int threads, const PrunusWeight& weight, const Job& job) {
    using namespace panels;
    const bool amx = isa >= kAmx;
    const int64_t count = amx ? amx::panels_at_once(job, threads) : many::kRowsAtOnce / kRows;
    const int64_t bytes = amx ? amx::many_bytes(job, count) : count * 2 * job.segments * kTileBytes;
    const XForm form = weight.codes ? XForm::kPartedBlocks : XForm::kBlocks;
    Choice choice{nullptr, form, Choice::kNothing, count * kRows, bytes};
    if (weight.kind == kI8)
        choice.rows_fn = amx ? amx::rows_many<fill_int8> : many::rows<fill_int8>;
    else if (weight.codes)
        choice.rows_fn = amx ? amx::rows_many<fill_coded> : many::rows<fill_coded>;
    else
        choice.rows_fn = amx ? amx::rows_many<fill_words> : many::rows<fill_words>;
    choice.writes = true;
    return choice;
}

// A few tokens with tile registers. With fewer tokens, memory or the expansion ports limit the
// speed, not the products: from memory, 11008×4096 on two threads, 1, 4 and 16 tokens took 2.3, 3.3
// and 10.1 ms without tiles and 3.5, 3.6 and 4.1 ms with them.
Choice choose_tiles(const PrunusWeight& weight, Kind activations) {
    if (weight.kind == kI8 && weight.mask)
        return {amx::rows_int8, XForm::kByteTiles, Choice::kNothing, panels::kRows,
                2 * amx::kBytePanel};
    if (weight.kind != kBf16 || activations != kBf16) return {};
    if (weight.mask && weight.codes)
        return {amx::rows_bitmap<true>,
                XForm::kPartedBlocks,
                Choice::kNothing,
                panels::kRows,
                2 * amx::kPanel,
                panels::kRows,
                2};
    if (weight.mask)
        return {amx::rows_bitmap<false>, XForm::kBlocks, Choice::kNothing, panels::kRows,
                2 * amx::kPanel};
    if (weight.codes && weight.cols % kSegment == 0)
        return {amx::rows_dense_coded,
                XForm::kPartedBlocks,
                Choice::kNothing,
                panels::kRows,
                0,
                panels::kRows,
                1};
    return {};
}
#endif

Choice choose([[maybe_unused]] int isa, [[maybe_unused]] int threads, const PrunusWeight& weight,
              [[maybe_unused]] Kind activations, [[maybe_unused]] const Job& job) {
    const Kind values = Kind(weight.kind);
#if PRUNUS_X86
    if (isa >= kAvx512Bf16 && job.tokens > kFewTokens && activations == kBf16 && values != kF16)
        return choose_many(isa, threads, weight, job);
    if (isa >= kAmx && job.tokens > kFewestForTiles && job.tokens <= kFewTokens) {
        const Choice tiles = choose_tiles(weight, activations);
        if (tiles.rows_fn) return tiles;
    }
    if (isa >= kAvx512Bf16 && values == kBf16 && activations == kBf16) {
        if (weight.codes)
            return {weight.mask ? rows_in_blocks<kAvx512Coded> : rows_in_blocks<kAvx512DenseCoded>,
                    XForm::kPartedBf16, Choice::kHighBytes};
        return {weight.mask ? rows_in_blocks<kAvx512Bitmap> : rows_in_blocks<kAvx512Dense>,
                XForm::kBf16};
    }
    if (isa >= kAvx512 && values == kI8)
        return {weight.mask ? rows_in_blocks<kAvx512I8, 4> : rows_in_blocks<kAvx512DenseI8, 4>,
                XForm::kSplitInt16};
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

void lay_out(Job& job, XForm form, const void* x) {
#if PRUNUS_X86
    if (form == XForm::kPartedBf16) return avx512::lay_out_parted(job, x, t_scratch);
    if (form == XForm::kBlocks) return panels::lay_out_blocks<false>(job, x, t_scratch);
    if (form == XForm::kPartedBlocks) return panels::lay_out_blocks<true>(job, x, t_scratch);
    if (form == XForm::kByteTiles) {
        lay_out_int16(job, x, job.out_kind, XForm::kSplitInt16, t_scratch);
        return amx::lay_out_byte_tiles(job, t_scratch);
    }
#endif
    if (form == XForm::kBf16)
        lay_out_bf16(job, x, t_scratch);
    else if (form == XForm::kFloat)
        lay_out_float(job, x, job.out_kind, t_scratch);
    else
        lay_out_int16(job, x, job.out_kind, form, t_scratch);
}

// How this instruction set changes the form of weights.
void choose_conversions(Job& job, int isa) {
    job.expand_row = portable::expand_row;
    job.decode = portable::decode;
    job.decode_high = portable::decode_high;
    job.dequantise = portable::dequantise;
#if PRUNUS_X86
    if (isa >= kAvx2) {
        job.expand_row = isa >= kAvx512 ? avx512::expand_row : avx2::expand_row;
        if (isa >= kAvx512) job.decode_high = avx512::decode_high;
        job.decode = isa >= kAvx512 ? avx512::decode : avx2::decode;
        job.dequantise = isa >= kAvx512 ? avx512::dequantise : avx2::dequantise;
    }
#else
    (void)isa;
#endif
}

// The average number of bytes of a row in memory.
int64_t bytes_per_row(const PrunusWeight& weight) {
    const int64_t values = weight.count * size_of(Kind(weight.kind)) / (weight.codes ? 2 : 1);
    return (weight.mask ? (weight.cols + 7) / 8 : 0) +
           (values + (weight.codes ? weight.count / 2 : 0)) / weight.rows;
}

// ---- The interface. ----

template <typename Fn>
int guarded(Fn fn) {
    try {
        return fn();
    } catch (const std::bad_alloc&) { return PRUNUS_OUT_OF_MEMORY; }
}

#if PRUNUS_X86
// Whether the machine has AMX tiles for bfloat16 and int8 and Linux lets this process use them. A
// process has to ask for that.
bool has_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kBits = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    if ((d & kBits) != kBits) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

int detect_isa() {
#if PRUNUS_X86
    __builtin_cpu_init();  // the checks below cover the operating system's support as well
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vbmi") &&
                        __builtin_cpu_supports("avx512vbmi2") &&
                        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2");
    if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16"))
        return has_tiles() ? kAmx : kAvx512Bf16;
    if (avx2 && avx512) return kAvx512;
    if (avx2) return kAvx2;
#elif PRUNUS_ARM
#if defined(__ARM_FEATURE_DOTPROD)  // all of Apple's
    return kNeonDot;
#elif defined(__linux__)
    constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP) & kDotProducts ? kNeonDot : kNeon;
#else
    return kNeon;
#endif
#endif
    return kPortable;
}

// A job that expands weights; the caller sets the destination.
int describe_expansion(Job& job, int isa, const PrunusWeight* weight, int out_kind) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (!weight || !is_float16_kind(out_kind)) return PRUNUS_BAD_ARGUMENT;
    if (weight->kind != kI8 && weight->kind != out_kind) return PRUNUS_BAD_ARGUMENT;
    const int fault = describe(job, weight, t_scratch);
    if (fault) return fault;
    choose_conversions(job, isa);
    copy_tail(job, job.coded ? kI8 : Kind(weight->kind), weight->count, t_scratch);
    job.rows_fn = weight->kind != kI8 ? expand_words
                  : out_kind == kBf16 ? expand_int8<kBf16>
                                      : expand_int8<kF16>;
    if (job.coded) decode_first<decoded_rows>(job);
    return PRUNUS_OK;
}

}  // namespace
}  // namespace prunus

using namespace prunus;

extern "C" {

int prunus_abi(void) { return 11; }

int prunus_best_isa(void) {
    static const int best = detect_isa();
    return best;
}

void prunus_set_runtime(void* gomp_parallel) {
    g_parallel = reinterpret_cast<GompParallel>(gomp_parallel);
}

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

int prunus_linear(int isa, int threads, const PrunusWeight* weight, int64_t tokens, int act_kind,
                  const void* x, const void* bias, void* out) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (tokens < 1 || !x || !out || act_kind < kBf16 || act_kind > kF32) return PRUNUS_BAD_ARGUMENT;
    return guarded([&] {
        Job described;
        const int fault = describe(described, weight, t_scratch);
        if (fault) return fault;
        copy_tail(described, described.coded ? kI8 : Kind(weight->kind), weight->count, t_scratch);
        choose_conversions(described, isa);
        described.bias = bias;
        described.out_kind = Kind(act_kind);
        const int64_t size = size_of(Kind(act_kind));
        for (int64_t token = 0; token < tokens; token += kTokensAtOnce) {
            Job job = described;
            job.tokens = tokens - token < kTokensAtOnce ? tokens - token : kTokensAtOnce;
            job.out = static_cast<uint8_t*>(out) + token * job.rows * size;
            const Choice choice = choose(isa, threads, *weight, Kind(act_kind), job);
            if (!choice.writes) job.sums = sized<float>(t_scratch.sums, job.tokens * job.rows);
            job.rows_fn = choice.rows_fn;
            job.rows_at_once = choice.rows_at_once;
            job.panels_stride = choice.panel_bytes;
            if (job.coded && choice.decoded == Choice::kWhole) decode_first<decoded_rows>(job);
            if (job.coded && choice.decoded == Choice::kHighBytes) decode_first<high_rows>(job);
            job.decoded_rows = choice.decoded_rows;
            job.decoded_buffers = choice.decoded_buffers;
            lay_out(job, choice.form, static_cast<const uint8_t*>(x) + token * job.cols * size);
            run(job, threads, bytes_per_row(*weight), t_scratch);
        }
        return int(PRUNUS_OK);
    });
}

int prunus_expand(int isa, int threads, const PrunusWeight* weight, int out_kind, void* out) {
    if (!out) return PRUNUS_BAD_ARGUMENT;
    return guarded([&] {
        Job job;
        const int fault = describe_expansion(job, isa, weight, out_kind);
        if (fault) return fault;
        job.out = out;
        run(job, threads, job.cols * 2, t_scratch);
        return int(PRUNUS_OK);
    });
}

int prunus_expand_rows(int isa, const PrunusWeight* weight, const int64_t* rows, int64_t count,
                       int out_kind, void* out) {
    if (!rows || count < 1 || !out) return PRUNUS_BAD_ARGUMENT;
    return guarded([&] {
        Job job;
        const int fault = describe_expansion(job, isa, weight, out_kind);
        if (fault) return fault;
        for (int64_t i = 0; i < count; ++i)
            if (rows[i] < 0 || rows[i] >= job.rows) return int(PRUNUS_BAD_ARGUMENT);
        if (job.coded) split_decoded_memory(job, 1, t_scratch);
        for (int64_t i = 0; i < count; ++i) {
            // Each row is written to its place in the whole weight.
            job.out = static_cast<uint16_t*>(out) + (i - rows[i]) * job.cols;
            job.rows_fn(job, rows[i], rows[i] + 1);
        }
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
