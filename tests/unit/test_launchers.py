"""The run launchers of docs/several-databases.md, as far as they can be looked at without a cluster or a Docker daemon.

Dagster itself loads the deployment's instance and workspace with each launcher in place, and the launchers' packages
check their configuration and make the job, or the container's settings, of a run of the database `eu`. They are no
packages of this project: without them only the instance and the workspace are loaded. With them:
`pip install dagster-k8s dagster-docker` into an environment of its own.
"""

import json
import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml  # type: ignore[import-untyped]
from dagster._core.instance.ref import InstanceRef
from dagster._core.workspace.load import location_origins_from_yaml_paths

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "several-databases.md").read_text()
BLOCKS = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)]
LAUNCHERS = {block["run_launcher"]["module"]: block for block in BLOCKS if "run_launcher" in block}
[CHART] = [block for block in BLOCKS if "runLauncher" in block]
[CONTEXT] = re.findall(r"^DAGSTER_CONTAINER_CONTEXT='(.*)'$", PAGE, re.MULTILINE)


def instance(folder: Path, launcher: dict[str, Any]) -> InstanceRef:
    """Dagster's instance as deployed, with this launcher, from a folder of the test."""
    (folder / "dagster.yaml").write_text((ROOT / "deploy" / "dagster.yaml").read_text() + yaml.safe_dump(launcher))
    return InstanceRef.from_dir(str(folder))


def test_the_page_has_both_launchers() -> None:
    assert LAUNCHERS.keys() == {"dagster_k8s", "dagster_docker"}


def test_the_workspace_is_understood() -> None:
    """Dagster reads a location for each database, and one over all of them, each on its own port."""
    origins = location_origins_from_yaml_paths([str(ROOT / "deploy" / "workspace-several.yaml")])
    assert [origin.location_name for origin in origins] == ["eu", "us", "global"]
    assert len({getattr(origin, "port", None) for origin in origins}) == len(origins)


@pytest.mark.parametrize("module", sorted(LAUNCHERS))
def test_dagster_loads_the_instance(module: str, tmp_path: Path) -> None:
    """The deployment's instance with the launcher of the page fits Dagster's own schema; a typing error does not."""
    ref = instance(tmp_path, LAUNCHERS[module])
    assert ref.run_launcher_data is not None and ref.run_launcher_data.module_name == module
    with pytest.raises(dg.DagsterInvalidConfigError):
        instance(tmp_path, LAUNCHERS[module] | {"run_lancher": {}})


def test_kubernetes(tmp_path: Path) -> None:
    """The launcher takes its configuration, and makes the job of a run with the database's Secret and variables."""
    k8s = pytest.importorskip("dagster_k8s", reason="dagster-k8s is not installed")
    from dagster_k8s.container_context import K8sContainerContext
    from dagster_k8s.job import construct_dagster_k8s_job

    kube = {"apiVersion": "v1", "kind": "Config", "current-context": "x", "users": [{"name": "x", "user": {}}]}
    kube |= {"contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}]}
    kube |= {"clusters": [{"name": "x", "cluster": {"server": "http://127.0.0.1:9"}}]}
    (tmp_path / "kube").write_text(yaml.safe_dump(kube))
    given = LAUNCHERS["dagster_k8s"]["run_launcher"]
    outside = {"load_incluster_config": False, "kubeconfig_file": str(tmp_path / "kube")}
    launcher = instance(tmp_path, {"run_launcher": given | {"config": given["config"] | outside}}).run_launcher
    assert isinstance(launcher, k8s.K8sRunLauncher)
    chart = CHART["runLauncher"]["config"]["k8sRunLauncher"]["runK8sConfig"]
    eu = CHART["dagster-user-deployments"]["deployments"][0]
    # What the chart gives to the code server of a deployment, so that its runs get the same.
    variables = [f"{name}={value}" for name, value in eu["env"].items()]
    context = K8sContainerContext.create_from_config(
        {"k8s": {"env_vars": variables, "env_secrets": [one["name"] for one in eu["envSecrets"]]}}
    )
    container = K8sContainerContext.create_from_config(
        {"k8s": {"run_k8s_config": {"container_config": chart["containerConfig"]}}}
    )
    merged = container.merge(context)
    config = merged.get_k8s_job_config("registry.example.com/marketplace-stats:1.0", launcher)
    job = construct_dagster_k8s_job(
        config, ["dagster", "api", "execute_run"], "dagster-run-1", user_defined_k8s_config=merged.run_k8s_config
    ).to_dict()
    [made] = job["spec"]["template"]["spec"]["containers"]
    assert {"name": "STATS_KEY_PREFIX", "value": "eu", "value_from": None} in made["env"]
    assert "stats-eu" in json.dumps(made["env_from"])
    assert made["resources"]["limits"] == {"memory": "1Gi"}


def test_docker(tmp_path: Path) -> None:
    """The launcher takes its configuration, and a run of eu gets what its code server's context says."""
    docker = pytest.importorskip("dagster_docker", reason="dagster-docker is not installed")
    from dagster_docker.container_context import DockerContainerContext

    launcher = instance(tmp_path, LAUNCHERS["dagster_docker"]).run_launcher
    assert isinstance(launcher, docker.DockerRunLauncher)
    assert launcher.networks == ["marketplace-stats"]
    context = DockerContainerContext.create_from_config(json.loads(CONTEXT))
    assert "STATS_KEY_PREFIX=eu" in context.env_vars
    with pytest.raises(dg.DagsterInvalidConfigError):
        DockerContainerContext.create_from_config({"docker": {"environment": []}})
