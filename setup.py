"""Packages: ``mirror_opt`` from its folder, ``mirror_opt.kernels`` from the top-level ``kernels``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mirror_opt", "mirror_opt.*"]), "mirror_opt.kernels"],
    package_dir={"mirror_opt.kernels": "kernels"},
)
