"""The compiled CPU kernels: C++ sources, one file per instruction set, and their Python binding."""
