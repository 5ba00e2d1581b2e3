// The C interface of the kernels: plain pointers and lengths, no torch, no exceptions, no global state but
// the parallel runtime. src/prunus/sparse/kernels.py is its only caller in Python.
//
// Common to all functions:
//   isa      0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16, 4 that and AMX; must not exceed prunus_best_isa()
//   kinds    0 bfloat16, 1 float16, 2 float32, 3 int8
// Returns 0, or one of the codes below. Nothing is read or written outside the given arrays.
#pragma once

#include <cstdint>

extern "C" {

enum { PRUNUS_OK = 0, PRUNUS_BAD_ARGUMENT = 1, PRUNUS_NO_SUCH_ISA = 2, PRUNUS_OUT_OF_MEMORY = 3 };

// A weight (rows, cols) as it is stored; docs/bitmap-format.md describes each array.
struct PrunusWeight {
    int64_t rows, cols;
    int64_t count;               // values that are stored; with codes: and the zeros that fill up their last group
    const uint8_t* mask;         // (rows, ceil(cols / 8)), least significant bit first; null: all are stored
    const int64_t* offsets;      // (rows + 1) as prunus_row_offsets() computes them from the mask; null without a mask
    const void* values;          // (count) of `kind`, row after row; with codes: low bytes, in whole groups of 64
    const float* scales;         // (rows) for int8 values, else null
    const uint8_t* codes;        // 32 for each of these groups for coded bfloat16 values, else null
    const uint8_t* high_bytes;   // (16): the high byte that a code stands for
    const int64_t* rare_at;      // (rare) ascending and below count: values whose high byte no code stands for,
    const uint8_t* rare_values;  // (rare) and what it is
    int64_t rare;
    int kind;
};

// Changes with every incompatible change of this interface.
int prunus_abi(void);

// The best instruction set of this machine.
int prunus_best_isa(void);

// Gives the kernels the parallel runtime: the address of an OpenMP library's GOMP_parallel, or null.
// Without one, every call runs on the calling thread.
void prunus_set_runtime(void* gomp_parallel);

// Writes rows + 1 offsets and returns the number of set bits, or -1 if a bit past `cols` is set in a row.
int64_t prunus_row_offsets(int64_t rows, int64_t cols, const uint8_t* mask, int64_t* offsets);

// out (tokens, rows) = x (tokens, cols) · Wᵀ + bias (rows, may be null); x, bias and out are of `act_kind`.
// With int8 values, x is rounded to 16-bit integers with one scale per 256 columns; for more than 16 bfloat16 tokens, with
// BF16, the weights (value · scale) are rounded to bfloat16 instead. Sums are in float32.
int prunus_linear(int isa, int threads, const PrunusWeight* weight, int64_t tokens, int act_kind, const void* x,
                  const void* bias, void* out);

// Writes W as a dense (rows, cols) array of `out_kind`: the kind of the values, or, for int8 values,
// bfloat16 or float16 (value · scale, rounded to nearest even).
int prunus_expand(int isa, int threads, const PrunusWeight* weight, int out_kind, void* out);

// Writes row rows[i] of that array to row i of `out` (count, cols), on the calling thread.
int prunus_expand_rows(int isa, const PrunusWeight* weight, const int64_t* rows, int64_t count, int out_kind, void* out);

// out (rows, width) = x / sqrt(mean of x² + eps), per row, times the weight (width); all of `kind`, which is not int8. `form` says
// how: 0 the quotient is rounded to `kind` first, 1 it is not, 2 it is not and the weight counts from one.
int prunus_rms_norm(int isa, int kind, int form, int64_t rows, int64_t width, const void* x, const void* weight, float eps,
                    void* out);

// Rotary embedding of one token, halves split: out = x · cos + (-second half of x, first half of x) · sin, for each row of the
// query (heads, dim) and of the key (key_heads, dim); cos and sin are (dim), all of `kind`, which is not int8.
int prunus_rotate(int isa, int kind, int64_t heads, int64_t key_heads, int64_t dim, const void* query, const void* key,
                  const void* cos, const void* sin, void* out_query, void* out_key);

// Sums `bytes` (rounded down to 64 KiB) at `data` as 64-bit words: what memory bandwidth allows.
uint64_t prunus_read(int threads, const void* data, int64_t bytes);
}
