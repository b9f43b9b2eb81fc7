"""Measurements and checks. A kernel that cannot be built is an error here, not served by another backend."""

import os

os.environ.setdefault("SLOTKERNELS_STRICT", "1")
