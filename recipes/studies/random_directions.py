"""Write random directions beside those that mean something: as many for each layer, as a control.

python random_directions.py DIRECTIONS.safetensors OUT.safetensors [ACTIVATIONS.npz [SEED]]

They lie in every direction alike, and so hold little of what a layer does. Of ACTIVATIONS, arrays named `en_L9`, they
get as much variance as DIRECTIONS hold, if there is as much, all of it at right angles to those: random ones among the
first principal directions of what is left, of so many that it comes out even. Shares of the variance are printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[np.float64]


def orthonormal(rows: Array) -> Array:
    """Return a basis of what rows span; of normal numbers every subspace is as probable as any other."""
    return np.asarray(np.linalg.qr(rows.T)[0].T)


def as_strong(basis: Array, samples: Array, normal: Array) -> tuple[Array, Array]:
    """Return random directions at right angles to a basis, and the shares of variance of the basis and of them."""
    centred = samples - samples.mean(0)
    products = centred.T @ centred
    beside = np.eye(len(products)) - basis.T @ basis
    sizes, axes = (it[..., ::-1] for it in np.linalg.eigh(beside @ products @ beside))
    wanted = np.sum(basis @ products * basis)

    def among(count: float) -> tuple[Array, float]:
        """Return directions among the first ones, the last of these in part, and the variance that they hold."""
        found = orthonormal(normal * np.clip(count - np.arange(len(sizes)), 0, 1))
        return found, float((found**2 @ sizes).sum())

    few, many = float(len(basis)), float(len(sizes) - len(basis))
    for _ in range(50 if among(few)[1] > wanted else 0):
        middle = (few + many) / 2
        few, many = (middle, many) if among(middle)[1] > wanted else (few, middle)
    found = among(few)[0] @ axes.T
    return found, np.array([wanted, np.sum(found @ products * found)]) / np.trace(products)


def main(directions: str, out: str, activations: str | None = None, seed: str = "0") -> None:
    """Write random directions for every basis of a file."""
    generator = np.random.default_rng(int(seed))
    arrays = np.load(activations) if activations else {}
    made = {}
    for layer, basis in sorted(load_file(directions).items()):
        normal = generator.standard_normal(basis.shape)
        made[layer] = orthonormal(normal)
        if activations:
            samples = np.concatenate([arrays[it] for it in arrays if it.endswith(f"_{layer}")]).astype(np.float64)
            made[layer], (theirs, ours) = as_strong(basis.astype(np.float64), samples, normal)
            print(f"{layer}: of all variance the directions hold {theirs:.3f}, the random ones {ours:.3f}")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(it, dtype=np.float32) for name, it in made.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
