"""What deploy/ holds fits together. Docker and Kubernetes do not run here: their part is checked as far as it reads."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from flows.deployments import POOL
from tasks.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
POOLS = ("process", "docker", "kubernetes")
PLACEHOLDER = re.compile(r"\{\{\s*([\w.-]+)\s*\}\}")
BEYOND_PREFECTS_OWN = {"docker": {"container_create_kwargs"}}
"""Fields of a worker's configuration that Prefect's own template leaves out."""


def pool(kind: str) -> dict[str, Any]:
    return json.loads((DEPLOY / "pools" / f"{kind}.json").read_text())


def prefects_own(kind: str) -> dict[str, Any]:
    """The template that Prefect's server knows for workers of this kind."""
    content = (files("prefect") / "server/api/collections_data/views/aggregate-worker-metadata.json").read_text()
    (found,) = [workers[kind] for workers in json.loads(content).values() if kind in workers]
    return found["default_base_job_configuration"]


def strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def placeholders(value: Any) -> set[str]:
    return {name for text in strings_in(value) for name in PLACEHOLDER.findall(text)}


@pytest.mark.parametrize("kind", POOLS)
def test_every_variable_of_a_pool_is_used_and_every_used_one_is_there(kind: str) -> None:
    template = pool(kind)
    assert placeholders(template["job_configuration"]) == set(template["variables"]["properties"])


@pytest.mark.parametrize("kind", POOLS)
def test_a_pools_variables_are_a_schema_and_its_defaults_fit(kind: str) -> None:
    schema = pool(kind)["variables"]
    jsonschema.Draft202012Validator.check_schema(schema)
    defaults = {name: field["default"] for name, field in schema["properties"].items() if "default" in field}
    jsonschema.validate(defaults, schema)
    assert all(field["title"] and field["description"] for field in schema["properties"].values())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"env": {"STILLHOUSE_THREADS": 2}}, schema)


@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_says_nothing_that_its_worker_does_not_know(kind: str) -> None:
    ours, own = pool(kind)["job_configuration"], prefects_own(kind)["job_configuration"]
    assert set(ours) - set(own) <= BEYOND_PREFECTS_OWN.get(kind, set())


def test_settings_in_the_environment_are_settings_that_exist() -> None:
    known = {f"STILLHOUSE_{name.upper()}" for name in Settings.model_fields} | {"STILLHOUSE_MLFLOW_UI"}
    places = [DEPLOY / "Dockerfile", DEPLOY / "compose.yaml", *(DEPLOY / "pools").iterdir()]
    named = {name for place in places for name in re.findall(r"STILLHOUSE_[A-Z_]+", place.read_text())}
    assert named
    assert named <= known


def test_a_run_in_a_job_asks_for_as_many_cores_as_it_may_use() -> None:
    fields = pool("kubernetes")["variables"]["properties"]
    assert fields["cpu_request"]["default"] == fields["cpu_limit"]["default"], "latency is measured in the job"


def test_no_secret_is_written_down() -> None:
    for place in [*DEPLOY.rglob("*.json"), *DEPLOY.rglob("*.yaml"), DEPLOY / "example.env"]:
        for line in place.read_text().splitlines():
            if re.search(r"PASSWORD\"?\s*[:=]|AUTH(_STRING)?\"?\s*[:=]", line) and "--from-literal" not in line:
                assert re.search(r"\$\{|prefect\.blocks\.secret|=$", line), f"{place.name}: {line}"


# ---------------------------------------------------------------- compose


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_services_name_only_what_is_there(compose: dict[str, Any]) -> None:
    services, volumes = compose["services"], set(compose["volumes"])
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed], needed
        for mount in service.get("volumes", ()):
            source = mount.partition(":")[0]
            assert source in volumes or (DEPLOY / source).exists(), mount
    used = {mount.partition(":")[0] for service in services.values() for mount in service.get("volumes", ())}
    assert volumes <= used


def test_addresses_name_services_and_databases_that_are_made(compose: dict[str, Any]) -> None:
    databases = set(re.findall(r"create database (\w+)", (DEPLOY / "databases.sql").read_text()))
    used = set()
    for text in strings_in(compose):
        for host in re.findall(r"(?:://|@)([a-z]\w*)[:/]", text.replace("stillhouse:$", "")):
            assert host in compose["services"] or host == "stillhouse", text
        used |= set(re.findall(r"@postgres/(\w+)", text))
    assert used == databases


def test_pages_are_bound_to_this_machine_and_ask_for_a_password(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
    assert "PREFECT_SERVER_API_AUTH_STRING" in compose["services"]["prefect"]["environment"]
    required = {match for text in strings_in(compose) for match in re.findall(r"\$\{(\w+):\?", text)}
    listed = {line.partition("=")[0] for line in (DEPLOY / "example.env").read_text().splitlines() if "=" in line}
    assert required <= listed
    assert {name for text in strings_in(compose) for name in re.findall(r"\$\{(\w+)", text)} <= listed


def test_docker_pool_and_compose_agree(compose: dict[str, Any]) -> None:
    fields = pool("docker")["variables"]["properties"]
    (mount,) = fields["volumes"]["default"]
    project, _, volume = mount.partition(":")[0].partition("_")
    assert project == compose["name"]
    assert volume in compose["volumes"]
    assert fields["networks"]["default"] == [f"{compose['name']}_default"]
    assert fields["image"]["default"].partition(":")[0] == compose["services"]["worker"]["image"]


def commands(compose: dict[str, Any]) -> list[list[str]]:
    found = [service["command"] for service in compose["services"].values() if "command" in service]
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "worker.yaml").read_text())
    for document in documents:
        if document["kind"] == "Deployment":
            found += [each["command"] for each in document["spec"]["template"]["spec"]["containers"]]
    last = re.findall(r"^CMD (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)[-1]
    return [*found, json.loads(last)]


@pytest.mark.slow
def test_every_command_and_option_exists(compose: dict[str, Any]) -> None:
    modules = {"prefect": "prefect", "mlflow": "mlflow", "stillhouse": "flows.cli"}
    helps: dict[tuple[str, ...], str] = {}
    for program, *arguments in commands(compose):
        words = tuple(each for each in arguments if re.fullmatch(r"[a-z]+", each))
        words = words[: 2 if program == "prefect" and words[0] in ("server", "worker") else 1]
        key = (program, *words)
        if key not in helps:
            done = subprocess.run(
                [sys.executable, "-m", modules[program], *words, "--help"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, (key, done.stderr[-500:])
            helps[key] = done.stdout
        for option in (each for each in arguments if each.startswith("--") and each != "--no-prompt"):
            assert option in helps[key], (key, option)


# ---------------------------------------------------------------- the image, and Kubernetes


def test_the_image_copies_what_the_package_and_its_deployments_need() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {
        source for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for source in line.split()
    }
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "constraints.txt", "prefect.yaml", "recipes", "README.md", "LICENSE"} <= copied
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    assert "--constraint constraints.txt" in text
    last = text.split("\nFROM ")[-1]
    assert "USER stillhouse" in last
    assert "pip install" not in last


def test_the_manifests_belong_together() -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "worker.yaml").read_text()))
    names = {document["kind"]: document["metadata"]["name"] for document in documents}
    fields = pool("kubernetes")["variables"]["properties"]
    assert names["Namespace"] == fields["namespace"]["default"]
    assert names["PersistentVolumeClaim"] == fields["store_claim"]["default"]
    assert {each["metadata"].get("namespace", names["Namespace"]) for each in documents} == {names["Namespace"]}
    (deployment,) = [document for document in documents if document["kind"] == "Deployment"]
    spec = deployment["spec"]["template"]["spec"]
    assert spec["serviceAccountName"] == names["ServiceAccount"]
    assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    (container,) = spec["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": fields["secret_name"]["default"]}}]
    assert container["command"][container["command"].index("--pool") + 1] == POOL
    (user,) = re.findall(r"useradd --uid (\d+)", (DEPLOY / "Dockerfile").read_text())
    assert spec["securityContext"]["runAsUser"] == int(user)
    assert pool("docker")["job_configuration"]["container_create_kwargs"]["user"] == user
