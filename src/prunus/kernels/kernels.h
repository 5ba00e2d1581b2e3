// The C interface of the kernels. It takes plain pointers and lengths; it knows no torch, throws no
// exceptions and keeps no global state except the parallel runtime. library.py is its only caller
// in Python.
//
// Common to all functions:
//
//   isa      0 portable; on x86-64 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16, 4 AVX-512 with BF16 and
//            AMX; at most prunus_best_isa()
//   threads  how many threads share the work; the result does not depend on it
//
// Functions return 0 or one of the codes below. They read and write only inside the given arrays.
#pragma once

#include <cstdint>

namespace prunus {
enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
}

extern "C" {

enum {
    PRUNUS_OK = 0,
    PRUNUS_BAD_ARGUMENT = 1,
    PRUNUS_NO_SUCH_ISA = 2,
    PRUNUS_OUT_OF_MEMORY = 3,
};

// The version of this interface. It grows with every incompatible change.
int prunus_abi(void);

// The best instruction set of this machine.
int prunus_best_isa(void);

// Sets the parallel runtime: the address of an OpenMP library's GOMP_parallel, or null. Without a
// runtime every call stays on the calling thread.
void prunus_set_runtime(void* gomp_parallel);

// Adds xᵀx to `sums` (features, features), which is symmetric, for x (tokens, features) in
// bfloat16. Products are exact, and sums are in float32. It needs AVX-512 with BF16.
int prunus_add_gram(int isa, int threads, int64_t tokens, int64_t features, const void* x,
                    float* sums);

// Finds for `words` codewords of `columns` (4 or 8) columns in `rows` rows the row v of `grid`
// (count, columns) of the least Σ importance·v²/2 − Σ target·v, with `targets` (words, columns,
// rows) and `importances` (words, columns). `least` and `index` (words, rows) receive that number,
// and which row. At most 128 left and as many right halves of the rows of the grid may differ.
int prunus_find_codewords(int isa, int threads, int64_t words, int64_t columns, int64_t rows,
                          int64_t count, const float* targets, const float* importances,
                          const float* grid, float* least, int32_t* index);

// Packs `spans` spans of 256 columns into `bytes` bytes each, as the IQ types of GGUF store them.
//
// `levels` (spans, 256) are the values, numbered from the lowest on: `digits` negative ones, then
// as many positive ones. `row_of_key` (keys) has the row of the grid of each codeword of `columns`
// columns, with the digits of its magnitudes as a number whose lowest digit is that of the first
// column. `codes` (spans, groups) are as they are stored. `layout` (entries, 6) says for rows of
// the grid (part 0), signs of eight columns (1) and codes (2) where their bits lie: part, integers
// in each of eight runs, bits, start, run, distance. Bit b of integer i of run r is at start + r ·
// run + i · distance + b. A second entry of a part has its higher bits.
int prunus_pack_codewords(int isa, int threads, int64_t spans, int64_t bytes, int64_t columns,
                          int64_t digits, int64_t entries, int64_t keys, const int32_t* layout,
                          const int64_t* row_of_key, const uint8_t* levels, const uint8_t* codes,
                          uint8_t* packed);

// The inverse: `levels` and `codes` of bytes. `grid` (count, columns) has the digits of each row.
// Of seven stored signs, the eighth makes an even number of columns negative. A row that the grid
// does not have counts as its last one.
int prunus_unpack_codewords(int isa, int threads, int64_t spans, int64_t bytes, int64_t columns,
                            int64_t digits, int64_t entries, int64_t count, const int32_t* layout,
                            const int64_t* grid, const uint8_t* packed, uint8_t* levels,
                            uint8_t* codes);
}
