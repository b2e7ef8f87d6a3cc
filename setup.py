"""Packages, and the optional compiled libraries of csrc/.

The libraries use the LibTorch stable ABI: one binary serves torch 2.11 and newer and any Python. An
installation goes on without a library that cannot be built, and ``mirror-opt info`` says why.
MIRROR_OPT_BUILD_EXT=0 builds none.
"""

import json
import os
import platform
import shutil
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
_COMMON = [
    "-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast",
    "-fno-math-errno", "-fno-trapping-math", "-DTORCH_TARGET_VERSION=0x020b000000000000",
]  # fmt: skip


class BuildLibraries(build_ext):
    """Builds what can be built, and writes down why the rest was not."""

    def run(self) -> None:
        self.reasons: dict[str, str] = {}
        super().run()

    def build_extensions(self) -> None:
        folder = self._built(self.extensions[0]).parent
        folder.mkdir(parents=True, exist_ok=True)
        super().build_extensions()
        (folder / "build.json").write_text(json.dumps(self.reasons, indent=1) + "\n")

    def build_extension(self, extension: Extension) -> None:
        name, target = extension.name.rpartition("_")[2], self._built(extension)
        target.unlink(missing_ok=True)
        if os.environ.get("MIRROR_OPT_BUILD_EXT") == "0":
            self.reasons[name] = "it was not built: MIRROR_OPT_BUILD_EXT=0"
            return
        try:
            self._build_cpu(extension, target)
        except Exception as error:  # whatever a tool chain throws, the package works without
            self.reasons[name] = f"it could not be built: {' '.join(str(error).split())}"
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
                extra_postargs=[*_COMMON, *_FLAGS[Path(source).name]],
                depends=extension.depends,
            )
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=["torch_cpu"],
            library_dirs=[str(Path(torch.__file__).parent / "lib")],
            target_lang="c++",
        )

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
        )
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPython},
)
