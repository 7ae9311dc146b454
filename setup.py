"""What pyproject.toml can't say: the suite that lies in `verification` is for a checkout and the sdist, and in no wheel."""

from __future__ import annotations

from setuptools import setup
from setuptools.command.build_py import build_py


class WithoutTests(build_py):
    """Modules as they are, but for those that pytest collects."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """(package, module, file) of each."""
        found: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [module for module in found if not module[1].startswith("test_")]


setup(cmdclass={"build_py": WithoutTests})
