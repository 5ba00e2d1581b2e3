"""The compiled CPU kernels: what rounding spends most of its time on, and its binding to Python.

library.py     opens the library and calls its functions; says why where there is none
kernels.h      the C interface
processor.cpp  which instruction sets this processor has
gram.cpp       sums XᵀX of inputs in bfloat16
codewords.cpp  the search of codewords in the grids of GGUF's IQ types
codeword_bytes.cpp  their bytes
codewords_rows.h  a row of codewords for each instruction set
threads.h      loops over torch's threads
"""
