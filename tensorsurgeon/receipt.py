"""The receipt beside the weights: what was done to what, and the SHA-256 of every file.

Nothing in it depends on when or where it was made, so that the same work leaves the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tensorsurgeon._version import __version__
from tensorsurgeon.plan import Plan, file_size


def seal(receipt: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a receipt without its own seal, which tells whether the receipt was changed."""
    content = {key: value for key, value in receipt.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_receipt(plan: Plan, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return what was done to what, and the SHA-256 of every file; nothing in it depends on when or where."""
    sizes = {shard.file: shard.size for shard in plan.shards}
    receipt = {
        "tensorsurgeon": __version__,
        "sources": [{"name": source.name, "fingerprint": source.fingerprint()} for source in plan.checkpoint.sources],
        "steps": [{step.name: dict(step.parameters)} for step in plan.checkpoint.steps],
        "warnings": list(plan.checkpoint.warnings),
        **({"report": plan.summary()["report"]} if plan.checkpoint.report else {}),
        "files": {
            name: {"bytes": sizes[name] if name in sizes else file_size(plan.files[name]), "sha256": digest}
            for name, digest in sorted(digests.items())
        },
    }
    return {**receipt, "seal": seal(receipt)}
