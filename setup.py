"""Packages, and the optional compiled libraries of csrc/.

The libraries use the LibTorch stable ABI: one binary serves torch 2.11 and newer and any Python. An
installation goes on without a library that cannot be built, and ``mirror-opt info`` says why.
MIRROR_OPT_BUILD_EXT names those to build: 0 for none, or some of cpu,cuda; one that was named and
cannot be built is an error. Without it the CPU library is built, and the CUDA library where there
are nvcc and a CUDA device.
"""

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

_CSRC = Path("csrc")
_X86 = platform.machine().lower() in ("x86_64", "amd64")

# Each instruction set is compiled apart, and chosen at run time.
_FLAGS = {
    "cpu_portable.cpp": [],
    "cpu_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "cpu_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "register_cpu.cpp": [],
}
_STABLE_ABI = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
_GCC = [
    "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math",
]  # fmt: skip
_NVCC = [
    "-shared", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=2",
    "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]  # fmt: skip


def _wanted() -> list[str]:
    """The libraries that MIRROR_OPT_BUILD_EXT names, "0" for none; empty where it is not set."""
    names = [name.strip() for name in os.environ.get("MIRROR_OPT_BUILD_EXT", "").split(",")]
    names = [name for name in names if name]
    if unknown := set(names) - {"0", "cpu", "cuda"}:
        raise SystemExit(
            f"MIRROR_OPT_BUILD_EXT: no library {', '.join(sorted(unknown))}: name cpu, cuda or "
            "both, with a comma between, or 0 for none"
        )
    return names


class BuildLibraries(build_ext):
    """Builds what can be built, and writes down why the rest was not."""

    def run(self) -> None:
        self.reasons: dict[str, str] = {}
        _wanted()
        super().run()

    def build_extensions(self) -> None:
        folder = self._built(self.extensions[0]).parent
        folder.mkdir(parents=True, exist_ok=True)
        super().build_extensions()
        (folder / "build.json").write_text(json.dumps(self.reasons, indent=1) + "\n")

    def build_extension(self, extension: Extension) -> None:
        name, target = extension.name.rpartition("_")[2], self._built(extension)
        target.unlink(missing_ok=True)
        wanted = _wanted()
        if wanted and name not in wanted:
            self.reasons[name] = f"it was not built: MIRROR_OPT_BUILD_EXT={','.join(wanted)}"
            return
        if name == "cuda" and not wanted and not _has_device():
            self.reasons[name] = (
                "it was not built: there was no CUDA device (MIRROR_OPT_BUILD_EXT=cpu,cuda builds "
                "it all the same)"
            )
            return
        try:
            (self._build_cpu if name == "cpu" else self._build_cuda)(extension, target)
        except Exception as error:  # whatever a tool chain throws, the package works without
            self.reasons[name] = f"it could not be built: {' '.join(str(error).split())}"
            if wanted:
                raise SystemExit(
                    f"{extension.name} {self.reasons[name]} (MIRROR_OPT_BUILD_EXT names it; "
                    "without it the installation goes on)"
                ) from error
            self.warn(f"{extension.name}: {self.reasons[name]}")

    def _build_cpu(self, extension: Extension, target: Path) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths

        objects = []
        for source in extension.sources:
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=include_paths(),
                extra_postargs=[*_STABLE_ABI, *_GCC, *_FLAGS[Path(source).name]],
                depends=extension.depends,
            )
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=["torch_cpu"],
            library_dirs=[str(Path(torch.__file__).parent / "lib")],
            target_lang="c++",
        )

    def _build_cuda(self, extension: Extension, target: Path) -> None:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, include_paths

        nvcc = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))
        if not nvcc:
            raise FileNotFoundError("nvcc was not found: put it on PATH, or set CUDA_HOME")
        library = Path(torch.__file__).parent / "lib"
        names = [x for x in ("torch_cpu", "torch_cuda") if (library / f"lib{x}.so").exists()]
        command = [
            nvcc, *_STABLE_ABI, *_NVCC, *(f"-I{path}" for path in include_paths()),
            *extension.sources, f"-L{library}", *(f"-l{x}" for x in names), "-o", str(target),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        said = result.stdout + result.stderr
        print(said, end="")
        if result.returncode:
            errors = [line for line in said.splitlines() if "error" in line]
            raise RuntimeError(f"nvcc: {'; '.join(errors) or said}")

    def _built(self, extension: Extension) -> Path:
        return Path(self.build_lib, self.get_ext_filename(extension.name))

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no Python ABI in the name

    def copy_extensions_to_source(self) -> None:
        """For an editable installation."""
        package = self.get_finalized_command("build_py").get_package_dir("mirror_opt")
        place, new = Path(package, "lib"), Path(package, "lib.new")
        shutil.copytree(self._built(self.extensions[0]).parent, new, dirs_exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)  # a process that has loaded a library keeps it
        new.rename(place)


def _has_device() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


class AnyPython(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*find_packages(include=["mirror_opt", "mirror_opt.*"]), "mirror_opt.kernels"],
    package_dir={"mirror_opt.kernels": "kernels"},
    ext_modules=[
        Extension(
            "mirror_opt.lib.libmirror_opt_cpu",
            [str(_CSRC / name) for name in _FLAGS if _X86 or "avx" not in name],
            depends=[str(path) for path in sorted(_CSRC.glob("*.h"))],
            language="c++",
        ),
        Extension(
            "mirror_opt.lib.libmirror_opt_cuda",
            [str(_CSRC / "step_cuda.cu")],
            depends=[str(path) for path in sorted(_CSRC.glob("*.h"))],
        ),
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPython},
)
