"""Adds the CUDA module to the metadata of pyproject.toml. csrc/cuda_build.py builds it."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import cuda_build  # noqa: E402


class BuildKernels(build_ext):
    def run(self):
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib)) / "relora_kernels"
        self.built = cuda_build.build_into(package, ROOT / "build" / "kernels")

    def get_outputs(self):
        return [str(self.built)]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []  # MANIFEST.in lists them


setup(
    ext_modules=[Extension("relora_kernels._C", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)
