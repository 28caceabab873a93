"""Write a random subspace as orthonormal directions, one basis for all layers: a control for those that mean something.

python random_directions.py WIDTH RANK OUT.safetensors [SEED]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def main(width: str, rank: str, out: str, seed: str = "0") -> None:
    """Take the columns of Q of a QR decomposition of normal numbers, which lie in every direction alike."""
    columns = np.linalg.qr(np.random.default_rng(int(seed)).standard_normal((int(width), int(rank))))[0]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_file({"random": np.ascontiguousarray(columns.T, dtype=np.float32)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
