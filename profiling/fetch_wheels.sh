#!/usr/bin/env bash
# Wheels that profiling/gpu_check.sh needs on a GPU machine that has PyTorch and Triton but no network.
#
#   profiling/fetch_wheels.sh wheels                     # here
#   pip install --no-index --no-deps wheels/*.whl        # there
set -euo pipefail
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
    --dest "${1:?the folder that the wheels go to}" \
    pytest iniconfig pluggy packaging pygments rich markdown-it-py mdurl geomloss flash-sinkhorn hypothesis sortedcontainers \
    scikit-learn scipy joblib threadpoolctl setuptools wheel ninja \
    av pillow psutil safetensors tyro typeguard typing-extensions docstring-parser shtab tensorboard tensorboard-data-server \
    absl-py grpcio markdown protobuf werkzeug markupsafe matplotlib contourpy cycler fonttools kiwisolver pyparsing \
    python-dateutil six pycocotools transformers huggingface-hub tokenizers regex pyyaml tqdm
