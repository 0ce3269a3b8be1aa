"""Compile dist_egnn/ops/native/message_mlp.cpp, one shared library per instruction set. setup.py runs it; standard library only.

python tools/build_native.py [FOLDER]
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "dist_egnn" / "ops" / "native" / "message_mlp.cpp"
REASON = "not_compiled.txt"  # in the folder of the libraries; library.py shows it
FLAGS = "-std=c++17 -O3 -fPIC -shared -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-maybe-uninitialized"
AVX512 = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -DVECTOR_BYTES=64 -DPANEL=4"
# in ascending order; the library picks the last one that the processor supports (processor_level in message_mlp.cpp)
X86 = {
    "base": "-DVECTOR_BYTES=16 -DPANEL=2",
    "avx2": "-mavx2 -mfma -DVECTOR_BYTES=32 -DPANEL=2",
    "avx512": AVX512,
    "avx512bf16": f"{AVX512} -mavx512bf16",
}
OTHER = {"base": "-DVECTOR_BYTES=16 -DPANEL=4"}  # aarch64 has 32 vector registers


def levels() -> dict[str, str]:
    """Instruction sets for this machine's architecture, in ascending order, with the compiler's flags."""
    return X86 if platform.machine().lower() in ("x86_64", "amd64") else OTHER


def compiler() -> list[str]:
    """The C++ compiler's command: the variable CXX, or c++, g++ or clang++ on the PATH. Raises RuntimeError without one."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("no C++ compiler found (install g++, or name one by the variable CXX)")


def build(folder: Path) -> list[Path]:
    """Compile every library into ``folder``; returns their paths.

    Where that fails, removes old libraries, writes the reason to REASON and raises RuntimeError with it, one line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REASON).unlink(missing_ok=True)
    try:
        return _compile(compiler(), folder)
    except RuntimeError as failure:
        for old in folder.glob("message_mlp.*.so"):
            old.unlink()
        (folder / REASON).write_text(str(failure))
        raise


def _compile(command: list[str], folder: Path) -> list[Path]:
    source_sum = f"-DSOURCE_SUM={zlib.crc32(SOURCE.read_bytes())}"

    def compile_one(level: str) -> Path:
        target = folder / f"message_mlp.{level}.so"
        partial = target.with_suffix(f".{os.getpid()}.partial")
        words = [*command, *FLAGS.split(), *levels()[level].split(), source_sum, str(SOURCE), "-o", str(partial)]
        try:
            done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
        except OSError as error:
            raise RuntimeError(f"{command[0]}: {error.strerror}") from error
        if done.returncode or not partial.is_file():
            partial.unlink(missing_ok=True)
            reason = next(
                (line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}"
            )
            raise RuntimeError(f"{shlex.join(command)} failed: {reason.strip()}")
        partial.replace(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, levels()))


if __name__ == "__main__":
    try:
        print(*build(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE.parent), sep="\n")
    except RuntimeError as failure:
        sys.exit(f"native kernels not built: {failure}; the torch engine is used instead")
