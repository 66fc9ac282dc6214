"""Validate built kustomizations against the published schemas; unknown fields are errors.

Checked: run, by deploy/check.sh.

    python validate.py FOLDER_OF_CRDS FILE...

Kubernetes' own kinds: the schemas of the package kubernetes-validate. Others: the custom resource
definitions in FOLDER_OF_CRDS, as their projects publish them; a kind without one is an error.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

VERSION = "1.37.0"


def main() -> None:
    """Print each resource, and exit with 1 if one is invalid."""
    published = {
        definition["spec"]["names"]["kind"]: definition
        for path in sorted(Path(sys.argv[1]).glob("*.yaml"))
        for definition in yaml.safe_load_all(path.read_text("utf-8"))
        if definition and definition["kind"] == "CustomResourceDefinition"
    }
    failed = False
    for path in sys.argv[2:]:
        for resource in yaml.safe_load_all(Path(path).read_text("utf-8")):
            problems = list(problems_of(resource, published))
            failed = failed or bool(problems)
            print(f"{path}: {resource['kind']}/{resource['metadata']['name']}:", *problems or ["valid"])
    sys.exit(failed)


def problems_of(resource: dict[str, Any], published: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a resource."""
    group, _, version = resource["apiVersion"].rpartition("/")
    if resource["kind"] not in published and ("." not in group or group.endswith(".k8s.io")):
        try:
            kubernetes_validate.validate(resource, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield error.message
        return
    if resource["kind"] not in published:
        yield f"no definition of {resource['kind']} in {sys.argv[1]}"
        return
    versions = published[resource["kind"]]["spec"]["versions"]
    schema = next(one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == version)
    schema["properties"]["metadata"] = {}  # Kubernetes' own
    for error in jsonschema.Draft202012Validator(closed(schema)).iter_errors(resource):
        yield f"{error.json_path}: {error.message[:200]}"


def closed(schema: Any) -> Any:
    """Refuse fields that the schema does not name."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            closed(part)
    elif isinstance(schema, list):
        for part in schema:
            closed(part)
    return schema


if __name__ == "__main__":
    main()
