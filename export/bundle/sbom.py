"""Bill of materials of a bundle: the packages that made the models, and the models, as CycloneDX 1.6 JSON."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from export.bundle.envelope import canonical
from export.bundle.statement import Member

NAMESPACE = uuid.UUID("6b0a7c1e-3f5d-5c39-9d43-3f0f6c1f9b21")
"""Of the serial numbers: equal bundles have equal ones."""


def sbom_of(name: str, version: str, models: Sequence[Member], env: Mapping[str, Any], created: str) -> dict[str, Any]:
    """The bill of materials.

    Args:
        name: Of the model.
        version: Its registered version.
        models: Its files.
        env: ``env.json`` of the run.
        created: When the bundle was made.
    """
    packages = {
        str(package): str(found)
        for package, found in sorted((env.get("packages") or {}).items())
        if found and found != "not installed"
    }
    python = str(env.get("python") or "unknown")
    components: list[dict[str, Any]] = [
        {"type": "platform", "bom-ref": f"python@{python}", "name": "python", "version": python}
    ]
    for package, found in packages.items():
        purl = f"pkg:pypi/{quote(package.lower())}@{quote(found)}"
        components.append({"type": "library", "bom-ref": purl, "name": package, "version": found, "purl": purl})
    files = [f"file:{each.path}" for each in models]
    for each, ref in zip(models, files, strict=True):
        hashes = [{"alg": "SHA-256", "content": each.sha256}]
        row = {"type": "machine-learning-model", "bom-ref": ref, "name": each.path, "version": version}
        components.append({**row, "hashes": hashes})
    model = f"model:{name}@{version}"
    made_with = [each["bom-ref"] for each in components if each["type"] != "machine-learning-model"]
    facts = canonical([name, version, created, packages, [each.sha256 for each in models]]).decode()
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, facts)}",
        "version": 1,
        "metadata": {
            "timestamp": created,
            "component": {"type": "machine-learning-model", "bom-ref": model, "name": name, "version": version},
        },
        "components": components,
        "dependencies": [
            {"ref": model, "dependsOn": files},
            *({"ref": ref, "dependsOn": made_with} for ref in files),
        ],
    }
