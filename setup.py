"""Builds the CPU kernels. Everything else about the package is in pyproject.toml.

The library is opened with ctypes, never imported, so it needs neither Python's nor torch's headers.
It holds code for several instruction sets and chooses at run time. `optional`: where there is no
C++17 compiler, or the machine is of another kind, the install continues without it, and prunus
computes in torch.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = "src/prunus/runtime/kernels"


class ParallelBuild(build_ext):
    """Compiles the sources at the same time, where setuptools compiles one after the other."""

    def build_extension(self, ext):
        one_after_the_other = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor() as pool:
                objects = pool.map(lambda source: one_after_the_other([source], **options), sources)
                return [each for [each] in objects]

        self.compiler.compile = compile_all
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": ParallelBuild},
    ext_modules=[
        Extension(
            "prunus.hardware._kernels",
            sources=[
                f"{KERNELS}/{name}.cpp"
                for name in ("kernels", "block", "planes", "gram", "sweep", "codewords")
            ],
            depends=sorted(str(header) for header in Path(KERNELS).glob("*.h")),
            language="c++",
            extra_compile_args=["-O3", "-std=c++17", "-g0"],
            optional=True,
        )
    ],
)
