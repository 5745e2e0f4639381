"""What the project needs, and which packages it consists of.

Only an editable install (`pip install -e .`) is supported: the launch scripts and the configs live in the clone.
"""

from setuptools import setup

LINUX_X86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"

setup(
    name="dcgan-faces",
    version="0.1.0",
    description="Distributed DCGAN training on face photographs: DALI, DistributedDataParallel, mixed precision",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Named one by one: a search would also take the folders of runs and data that people make beside them.
    packages=[
        "pipeline",
        "pipeline.cli",
        "pipeline.decode",
        "pipeline.doctor",
        "pipeline.metrics",
        "kernels",
        "benchmarks",
    ],
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",  # 0.26 is the release for torch 2.11; the pair must come from one index
        "tensorboard>=2.18",
        "pyyaml>=6",
        "jsonargparse[signatures]>=4.53",  # reads the config dataclasses
        "docstring-parser>=0.16",  # turns the docstring under a field into its --help text
        "numpy>=2",
        "pillow>=11",
        "tqdm>=4.66",
        f"nvidia-dali-cuda130>=2.4; {LINUX_X86}",
    ],
    extras_require={
        # For a CUDA 12 driver: install this extra, then uninstall nvidia-dali-cuda130 (both own `nvidia.dali`).
        "cuda12": [f"nvidia-dali-cuda120>=2.4; {LINUX_X86}"],
        "parquet": ["pyarrow>=18"],
        "lmdb": ["lmdb>=1.6"],
        "wandb": ["wandb>=0.31"],
        "metrics": ["torch-fidelity>=0.4"],  # the Inception network as the original FID had it; its weights come apart
        "export": ["safetensors>=0.5", "onnx>=1.19", "onnxscript>=0.5", "onnxruntime>=1.22"],
        "dev": [
            "pytest>=8",
            "ruff>=0.12",
            "mypy>=1.16",
            "types-PyYAML",
            "types-tqdm",
            "matplotlib>=3.10",  # draws docs/performance.png
            "pyarrow>=20",
            "lmdb>=1.6",
            "torch-fidelity>=0.4",
            "safetensors>=0.5",
            "onnx>=1.19",
            "onnxscript>=0.5",
            "onnxruntime>=1.22",
            "kubeflow-trainer-api>=2.3",  # models of TrainJob and TrainingRuntime, for tests/test_k8s.py
            "kubernetes-validate>=1.37",  # schemas of Job, Pod, NetworkPolicy and PersistentVolumeClaim
        ],
    },
)
