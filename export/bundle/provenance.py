"""Provenance: which run made the model files, of what; an in-toto statement with a SLSA predicate."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.bundle import BundleError
from export.bundle.envelope import canonical, read_canonical, seal
from export.bundle.statement import Lineage, Member, Statement
from export.bundle.trust import Trust, open_sealed

IN_TOTO_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE, PREDICATE_TYPE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
BUILDER, BUILD_TYPE = "urn:stillhouse:compress", "urn:stillhouse:recipe:v1"
"""Who ran the recipe: no isolated service, whose promises would be SLSA level 2 and above."""


def provenance_of(
    models: Sequence[Member], lineage: Lineage, *, recipe: str, versions: Mapping[str, str]
) -> dict[str, Any]:
    """The in-toto statement.

    Args:
        models: Its subjects.
        lineage: What they were made of; data and teachers by the digest over names and contents of their folders.
        recipe: Name of the recipe.
        versions: Package -> version, of the machine that built them.
    """
    made_of: list[dict[str, Any]] = [
        {"name": "data", "digest": {"sha256": lineage.data_sha256}},
        {"name": "recipe.resolved.yaml", "digest": {"sha256": lineage.recipe_sha256}},
        *({"name": f"teacher/{name}", "digest": {"sha256": found}} for name, found in sorted(lineage.teachers.items())),
    ]
    if lineage.commit is not None and re.fullmatch(r"[0-9a-f]{40}", lineage.commit):
        made_of.append({"name": "source", "digest": {"gitCommit": lineage.commit}})
    by_products = {"mlflow_run": lineage.mlflow_run, "flow_run": lineage.flow_run}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": each.path, "digest": {"sha256": each.sha256}} for each in models],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": recipe, "recipe_sha256": lineage.recipe_sha256},
                "internalParameters": {name: value for name, value in by_products.items() if value is not None},
                "resolvedDependencies": made_of,
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": dict(versions)},
                "metadata": {"invocationId": lineage.flow_run or lineage.run},
            },
        },
    }


def seal_provenance(statement: Mapping[str, Any], keys: Sequence[Ed25519PrivateKey]) -> bytes:
    """``provenance.dsse.json``."""
    return seal(canonical(statement), IN_TOTO_TYPE, keys)


def open_provenance(data: bytes, trust: Trust, statement: Statement) -> dict[str, Any]:
    """The in-toto statement in a bundle, about exactly the bundle's models.

    Raises:
        BundleError: it is not signed as the trust asks, or about other files.
    """
    where = "Provenance"
    payload, _ = open_sealed(data, IN_TOTO_TYPE, trust, where)
    found = read_canonical(payload, where)
    expected = [{"name": each.path, "digest": {"sha256": each.sha256}} for each in statement.models()]
    if not isinstance(found, dict) or found.get("_type") != STATEMENT_TYPE or found.get("subject") != expected:
        subjects = json.dumps(found.get("subject") if isinstance(found, dict) else None)[:200]
        raise BundleError(f"{where} has the subjects {subjects}, expected the models. Build the bundle again.")
    return found
