"""Everything random comes from here, so that nothing depends on the order in which things happen."""

import hashlib

import numpy as np


def generator(seed: int, *labels: str | int) -> np.random.Generator:
    """A generator of its own for each (seed, labels), for example (seed, domain, round, purpose).

    The labels are hashed, not added up, so that no two purposes share a stream.
    """
    digest = hashlib.sha256(repr((seed, *labels)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
