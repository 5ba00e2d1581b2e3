"""Builds the CPU kernels. Everything else about the package is in pyproject.toml.

The library is opened with ctypes, never imported, so it needs neither Python's nor torch's headers.
It holds code for several instruction sets and chooses at run time. `optional`: where there is no
C++17 compiler, or the machine is of another kind, the install continues without it, and prunus
computes in torch.
"""

from pathlib import Path

from setuptools import Extension, setup

KERNELS = Path("src/prunus/kernels")

setup(
    ext_modules=[
        Extension(
            "prunus.kernels._kernels",
            sources=sorted(map(str, KERNELS.glob("*.cpp"))),
            depends=sorted(map(str, KERNELS.glob("*.h"))),
            language="c++",
            extra_compile_args=["-O3", "-std=c++17", "-g0"],
            optional=True,
        )
    ],
)
