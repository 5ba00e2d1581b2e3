// The C interface of the kernels. It takes plain pointers and lengths; it knows no torch, throws no
// exceptions and keeps no global state except the parallel runtime. library.py is its only caller
// in Python.
//
// Common to all functions:
//
//   isa    0 portable; on x86-64 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16, 4 AVX-512 with BF16 and
//          AMX; on 64-bit Arm 1 NEON, 2 NEON with dot products; at most prunus_best_isa()
//   kinds  0 bfloat16, 1 float16, 2 float32, 3 int8
//
// Functions return 0 or one of the codes below. They read and write only inside the given arrays.
#pragma once

#include <cstdint>

extern "C" {

enum {
    PRUNUS_OK = 0,
    PRUNUS_BAD_ARGUMENT = 1,
    PRUNUS_NO_SUCH_ISA = 2,
    PRUNUS_OUT_OF_MEMORY = 3,
    // Damage that prunus_plane_offsets() finds: the data ends too early, goes on after its last
    // layer, has ones where a layer is padded, or holds an escaped value that is out of range.
    PRUNUS_TOO_SHORT = 4,
    PRUNUS_TOO_LONG = 5,
    PRUNUS_BAD_PADDING = 6,
    PRUNUS_BAD_VALUE = 7,
    // Damage that prunus_plane_widths() finds: an integer below -127.
    PRUNUS_BAD_LEVEL = 8
};

// A weight (rows, cols) as it is stored; docs/reference/packed-format.md describes each array.
struct PrunusWeight {
    int64_t rows, cols;
    // Number of stored values. With codes it includes the zeros that pad the last group.
    int64_t count;
    // (rows, ceil(cols / 8)), least significant bit first. Null: all entries are stored.
    const uint8_t* mask;
    // (rows + 1) as prunus_row_offsets() computes them from the mask. Null without a mask.
    const int64_t* offsets;
    // (count) of `kind`, row after row. With codes: low bytes, in whole groups of 64.
    const void* values;
    // (rows) for int8 values, else null.
    const float* scales;
    // 32 per group of 64 for coded bfloat16 values, else null.
    const uint8_t* codes;
    // (16): the high byte that each code stands for.
    const uint8_t* high_bytes;
    // (rare) ascending and below count: positions of values whose high byte has no code,
    const int64_t* rare_at;
    // (rare) and the high bytes of those values.
    const uint8_t* rare_values;
    int64_t rare;
    int kind;
};

// A weight (rows, cols) of integers in layered bit planes: scale of the row · step of the column ·
// integer. planes.h describes the order of the data.
struct PrunusPlanes {
    int64_t rows, cols, rows_per_chunk;
    // (bytes), with any alignment.
    const uint8_t* data;
    int64_t bytes;
    // (cols): the class of each column, below `class_count`.
    const uint8_t* classes;
    // (class_count, 10): raw bits, number of layers, bits of each layer.
    const uint8_t* codes;
    int64_t class_count;
    // (cols) and (rows), bfloat16. Only prunus_plane_offsets() does without them.
    const uint16_t *steps, *scales;
    // (chunks, class_count, 9) as prunus_plane_offsets() finds them: for making lines, else null.
    const int64_t* offsets;
    // As prunus_plane_lines() writes them: for products and expansions, which read neither the data
    // nor the offsets.
    const uint8_t* lines;
};

// The version of this interface. It grows with every incompatible change.
int prunus_abi(void);

// The best instruction set of this machine.
int prunus_best_isa(void);

// Sets the parallel runtime: the address of an OpenMP library's GOMP_parallel, or null. Without a
// runtime every call stays on the calling thread.
void prunus_set_runtime(void* gomp_parallel);

// Writes rows + 1 offsets. Returns the number of set bits, or -1 if a row has a bit set beyond
// `cols`.
int64_t prunus_row_offsets(int64_t rows, int64_t cols, const uint8_t* mask, int64_t* offsets);

// Computes out (tokens, rows) = x (tokens, cols) · Wᵀ + bias (rows, may be null); x, bias and out
// are of `act_kind`. Sums are in float32.
//
// For int8 values, x is rounded to 16-bit integers with one scale per 256 columns. For more than 16
// bfloat16 tokens on a machine with BF16, the weights (value · scale) are rounded to bfloat16
// instead.
int prunus_linear(int isa, int threads, const PrunusWeight* weight, int64_t tokens, int act_kind,
                  const void* x, const void* bias, void* out);

// Writes W as a dense (rows, cols) array of `out_kind`. That is the kind of the values or, for int8
// values, bfloat16 or float16 (value · scale, rounded to nearest even).
int prunus_expand(int isa, int threads, const PrunusWeight* weight, int out_kind, void* out);

// Writes row rows[i] of that array to row i of `out` (count, cols), on the calling thread.
int prunus_expand_rows(int isa, const PrunusWeight* weight, const int64_t* rows, int64_t count,
                       int out_kind, void* out);

// Finds where the layers of a weight begin and checks all lengths: writes (chunks, class_count, 9)
// positions in `data`, those of layer 0 to L - 1 and of the escaped bytes at index L, and -1 behind
// them. Of `weight`, steps, scales, offsets and lines are not read.
int prunus_plane_offsets(const PrunusPlanes* weight, int64_t* offsets);

// Chooses how many bits the values of every class take in lines: writes them to `widths` (4), and
// how many bytes the lines of the weight take. It also checks the levels.
int prunus_plane_widths(int isa, const PrunusPlanes* weight, uint8_t* widths, int64_t* bytes);

// Writes the lines of a weight, the form in memory that lines.h describes.
int prunus_plane_lines(int isa, const PrunusPlanes* weight, const uint8_t* widths,
                       uint8_t* lines);

// Computes out (tokens, rows) = x (tokens, cols) · Wᵀ + bias (rows, may be null); x, bias and out
// are of `act_kind`. x · step is rounded to int8 with one scale per 256 columns of a class; sums
// over these columns are exact, and sums of them are in float32.
int prunus_plane_linear(int isa, int threads, const PrunusPlanes* weight, int64_t tokens,
                        int act_kind, const void* x, const void* bias, void* out);

// Computes up to three such products of the same x at once: those of weights[i], with biases[i]
// (may be null), to outs[i]. Threads wait for each other once.
int prunus_plane_linears(int isa, int threads, int64_t count, const PrunusPlanes* const* weights,
                         int64_t tokens, int act_kind, const void* x, const void* const* biases,
                         void* const* outs);

// Writes W as a dense (rows, cols) array of `out_kind`, which is not int8. Each entry is the exact
// product, rounded to nearest even.
int prunus_plane_expand(int isa, int threads, const PrunusPlanes* weight, int out_kind, void* out);

// Writes row rows[i] of that array to row i of `out` (count, cols), on the calling thread.
int prunus_plane_expand_rows(int isa, const PrunusPlanes* weight, const int64_t* rows,
                             int64_t count, int out_kind, void* out);

// A weight in one of its forms, and a bias (rows, may be null) of the block's kind.
struct PrunusMatrix {
    const PrunusWeight* weight;
    const PrunusPlanes* planes;
    const void* bias;
};

// A block of a transformer: attention with rotary embeddings and heads that may share keys, then a
// gated feed-forward network. All arrays are of one kind, which is not int8.
struct PrunusBlock {
    int64_t hidden, heads, key_heads, dim, inner;
    PrunusMatrix query, key, value, output, gate, up, down;
    // The weights of RMS norms: (hidden) before the attention and before the network, and where the
    // family has them (else null) (dim) of queries and keys, (hidden) of what the attention and the
    // network give.
    const void *norm_attention, *norm_feed, *norm_query, *norm_key, *norm_attended, *norm_fed;
    float eps, scaling;
    // How a norm ends: 0 rounds x / sqrt(mean of x² + eps) to the kind and multiplies it by the
    // weight, 1 does not round it and adds 1 to the weight.
    int norm_form;
    // 0 SiLU, 1 GELU by its formula with tanh.
    int activation;
};

// The tokens of a call: each is the last one of a sequence of its own.
struct PrunusTokens {
    int64_t count;
    // Tokens of each sequence that the attention sees, the new one included.
    int64_t length;
    // (count, key_heads, length, dim), the heads `head_stride` elements apart. The call writes the
    // last position.
    void *keys, *values;
    int64_t head_stride;
    // (dim) of each token, `angle_stride` elements apart.
    const void *cos, *sin;
    int64_t angle_stride;
    // (count, length): 0 where a position is not seen. Null: all are.
    const uint8_t* mask;
};

// Computes the block for hidden states x (count, hidden). The result rounds to the kind where the
// modules of transformers do. Rotary embeddings are in the form that splits a head into halves.
int prunus_block(int isa, int threads, int kind, const PrunusBlock* block,
                 const PrunusTokens* tokens, const void* x, void* out);

// Adds xᵀx to `sums` (features, features), which is symmetric, for x (tokens, features) in
// bfloat16. Products are exact, and sums are in float32. It needs AVX-512 with BF16.
int prunus_add_gram(int isa, int threads, int64_t tokens, int64_t features, const void* x,
                    float* sums);

// Rounds `count` columns of `rows` weights, one after the other, and lets those after each correct
// its error. All arrays are (count, rows) unless said otherwise. A weight is divided by its
// column's entry of `steps` (count) and clamped to ±`most`, below 127. It is rounded up past the
// share of the way that `shares` (count, 256) has for the integer below it, from -128 on, and is 0
// where `keep` (or null: nowhere) is 0. `factor` (count, count) is upper triangular. `levels` and
// `errors` receive the integers, and what is left divided by the diagonal of `factor`.
int prunus_round_columns(int isa, int threads, int64_t count, int64_t rows, float most,
                         float* weight, const float* factor, const float* steps,
                         const float* shares, int8_t* levels, float* errors, const uint8_t* keep);

// Finds for `words` codewords of `columns` (4 or 8) columns in `rows` rows the row v of `grid`
// (count, columns) of the least Σ importance·v²/2 − Σ target·v, with `targets` (words, columns,
// rows) and `importances` (words, columns). `least` and `index` (words, rows) receive that number,
// and which row. At most 128 left and as many right halves of the rows of the grid may differ.
int prunus_find_codewords(int isa, int threads, int64_t words, int64_t columns, int64_t rows,
                          int64_t count, const float* targets, const float* importances,
                          const float* grid, float* least, int32_t* index);

// Sums `bytes` (rounded down to 64 KiB) at `data` as 64-bit words, as fast as memory allows.
uint64_t prunus_read(int threads, const void* data, int64_t bytes);
}
