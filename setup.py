"""Hand the metadata of settings.ini to setuptools; the version is the one that the package states
about itself.
"""

import configparser
import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
LICENSES = {"apache2": "Apache-2.0"}
EXTRAS = ("dev", "browser", "dicom", "cluster", "parquet", "review", "baselines", "onnx", "docs")


def read_settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    with open(ROOT / "settings.ini", encoding="utf-8") as file:
        parser.read_file(file)
    return parser["DEFAULT"]


def read_version(package: str) -> str:
    text = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r"""^__version__\s*=\s*["']([^"']+)["']""", text, re.MULTILINE)
    if found is None:
        raise ValueError(f'{package}/__init__.py: expected a line __version__ = "..."')
    return found.group(1)


def lines(value: str) -> list[str]:
    return [line.strip() for line in value.splitlines() if line.strip()]


settings = read_settings()
name = settings["lib_name"]

setup(
    name=name,
    version=read_version(name),
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=LICENSES[settings["license"]],
    keywords=settings["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=" + settings["min_python"],
    # weights/ holds no module, yet setuptools wants every folder that is shipped among the packages
    packages=find_namespace_packages(include=[name, f"{name}.*"], exclude=["*.__pycache__"]),
    package_data={name: ["py.typed"], f"{name}.weights": ["*.safetensors", "*.json", "*.md"]},
    install_requires=lines(settings["requirements"]),
    extras_require={extra: lines(settings[f"{extra}_requirements"]) for extra in EXTRAS},
    entry_points={
        "console_scripts": lines(settings["console_scripts"]),
        "nbdev": [f"{name} = {name}._modidx:d"],
    },
)
