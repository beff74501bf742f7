"""Package metadata. Tool settings (ruff, mypy, pytest) are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

LLAMA2 = ["sentencepiece>=0.2"]  # tokenizer.model of Llama 2; its GGUF and JSON need nothing

FAST = [
    "numba>=0.60",
    "platformdirs>=4",  # where compiled kernels are kept
]

EXPLAIN = ["matplotlib>=3.8"]  # plots

TRAIN = [
    "matplotlib>=3.8",  # the loss curve
    "tokenizers>=0.20",  # learns a vocabulary's pairs (--tokenizer bpe:N)
]

TEST = [
    "hypothesis>=6.100",
    "mypy>=1.11",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "ruff>=0.8",
    *EXPLAIN,
    *FAST,
    *LLAMA2,
    *TRAIN,
    "gguf>=0.17",  # an independent reader of GGUF files and their blocks
    "safetensors>=0.4",  # an independent reader and writer of its files
    "setuptools>=61",  # builds what a wheel has; no part of an environment since Python 3.12
]

# What tests of the CUDA path need where there is no GPU: CuPy, in a version whose C functions
# tests/softcuda knows, and of the toolkit its compiler and the headers that it compiles with.
TEST_CUDA = [
    "cupy-cuda13x==14.2.0",
    "cuda-toolkit[nvrtc,cudart]==13.*",
    "numpy>=2.1.2",  # before that, CuPy has no bfloat16
]

EXTRAS = {
    # [ctk]: the toolkit's parts, so that a driver is enough. Before NumPy 2.1.2 CuPy has no bf16.
    "cuda12": ["cupy-cuda12x[ctk]==14.*", "numpy>=2.1.2"],
    "cuda13": ["cupy-cuda13x[ctk]==14.*", "numpy>=2.1.2"],
    "fast": FAST,
    "gguf": ["gguf>=0.17"],
    "llama2": LLAMA2,
    "mpi": ["mpi4py>=4"],
    "serve": ["starlette>=0.40", "uvicorn>=0.30"],
    "explain": EXPLAIN,
    "train": TRAIN,
    "test": TEST,
    "test-cuda": TEST_CUDA,
}

setup(
    name="llama3np",
    version="0.1.0",
    description="Llama 3 in plain array operations: NumPy on the CPU, CuPy on CUDA",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["llama3np", "llama3np.*"]), "llama3np.weights"],
    package_dir={"llama3np.weights": "weights"},  # found by its path, and never imported
    package_data={
        "llama3np": ["py.typed", "data/*.json", "kernels/cuda/*.cu"],
        # The embedded model and where it comes from; not the records of its training.
        "llama3np.weights": [f"shakespeare/*.{end}" for end in ("json", "safetensors", "md")],
    },
    install_requires=[
        "ml_dtypes>=0.4",  # bfloat16 as an array dtype: widening is 1.5x faster than bit shifts
        "numpy>=2",
        "regex",  # Unicode classes where tiktoken cannot go; it comes with tiktoken
        "rich>=13",  # progress bars, tables and trees of the command
        "tiktoken>=0.13",  # 0.13 merges long pieces in linear time
        "threadpoolctl>=3.5",  # sets the threads of whichever BLAS NumPy has
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["llama3np = llama3np.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
