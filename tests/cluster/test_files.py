"""The cluster files against their readers' schemas, against our recipes and jobs, and against each other."""

import copy
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import ray
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.config.recipes import R50_MMDET, SWIN_L_MMDET
from pipelines.config.train import TrainConfig
from tests.cluster.kustomize import containers, documents, pods, render

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
README = (CLUSTER / "README.md").read_text()
YAML_FILES = sorted(CLUSTER.rglob("*.yaml"))
RECIPES = {"cluster-16": R50_MMDET, "cluster-64": SWIN_L_MMDET, "job-r50": R50_MMDET, "job-swin-l": SWIN_L_MMDET}
"""Which recipe each Ray folder is for."""
FOLDERS = [*RECIPES, "services"]
RAY_UP = {name: documents(CLUSTER / "ray-up" / f"{name}.yaml")[0] for name in ("aws", "machines")}
CONSTRAINTS = dict(re.findall(r"^([\w-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.M))
[VERSION] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
TAG = f"{VERSION}-ray{CONSTRAINTS['ray']}"
UNITS = {"Mi": 2**20, "Gi": 2**30, "g": 2**30}


def rendered(folder: str) -> list[dict[str, Any]]:
    return render(CLUSTER / "kubernetes" / folder)


def ray_object(folder: str) -> dict[str, Any]:
    """Return the RayCluster or RayJob of a folder, which holds nothing else."""
    [found] = rendered(folder)
    return found


def cluster_spec(folder: str) -> dict[str, Any]:
    spec = ray_object(folder)["spec"]
    return spec.get("rayClusterSpec", spec)


def service(name: str, kind: str) -> dict[str, Any]:
    [found] = [item for item in rendered("services") if item["kind"] == kind and item["metadata"]["name"] == name]
    return found


def size(text: str) -> int:
    """Return a quantity of bytes such as 16Gi or 40g."""
    [(number, unit)] = re.findall(r"^(\d+)(\w+)$", text)
    return int(number) * UNITS[unit]


def every_pod() -> Iterator[tuple[str, dict[str, Any]]]:
    for folder in FOLDERS:
        for pod in pods(rendered(folder)):
            yield f"{folder}: {pod['containers'][0]['name']}", pod


# ---- the readers' own schemas


def test_every_yaml_file_parses() -> None:
    assert len(YAML_FILES) > 10
    for file in YAML_FILES:
        assert all(isinstance(document, dict) for document in documents(file)), file


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("folder", FOLDERS)
def test_our_rendering_is_that_of_kubectl(folder: str) -> None:
    command = ["kubectl", "kustomize", str(CLUSTER / "kubernetes" / folder)]
    shown = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout

    def by_name(objects: list[Any]) -> dict[tuple[str, str], Any]:
        return {(found["kind"], found["metadata"]["name"]): found for found in objects}

    assert by_name(rendered(folder)) == by_name(list(yaml.safe_load_all(shown)))


@pytest.fixture(scope="module")
def definitions() -> dict[str, Any]:
    """Return the strict schemas of KubeRay's kinds, read from the folder $KUBERAY_CRDS."""
    if not os.environ.get("KUBERAY_CRDS"):
        pytest.skip("needs KubeRay's definitions; set KUBERAY_CRDS to a folder with ray.io_rayclusters.yaml")
    schemas = {}
    for kind in ("RayCluster", "RayJob"):
        file = Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{kind.lower()}s.yaml"
        definition = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        [version] = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
        schemas[kind] = strict(version["schema"]["openAPIV3Schema"])
    return schemas


def strict(schema: Any) -> Any:
    """Refuse fields that a definition does not list; Kubernetes would drop them without a word."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(part) for key, part in schema.items()}
    open_to_all = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & schema.keys()
    if schema.get("type") == "object" and "properties" in schema and not open_to_all:
        closed["additionalProperties"] = False
    return closed


def faults(definitions: dict[str, Any], found: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(definitions[found["kind"]])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(found)]


@pytest.mark.parametrize("folder", RECIPES)
def test_kuberay_knows_every_field(folder: str, definitions: dict[str, Any]) -> None:
    found = ray_object(folder)
    assert found["apiVersion"] == "ray.io/v1"
    assert faults(definitions, found) == []
    wrong = copy.deepcopy(found)
    group = wrong["spec"].get("rayClusterSpec", wrong["spec"])["workerGroupSpecs"][0]
    group["minReplica"] = group.pop("minReplicas")
    group["template"]["spec"]["containers"][0]["imagePullpolicy"] = "Always"
    assert len(faults(definitions, wrong)) == 3  # two unknown, one missing


def test_kubernetes_knows_every_field_of_the_services_pods(definitions: dict[str, Any]) -> None:
    head = definitions["RayCluster"]["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]
    found = [item["spec"]["template"] for item in rendered("services") if "template" in item.get("spec", {})]
    assert len(found) == 2
    for template in found:
        # KubeRay's definitions hold Kubernetes' own of a pod, but for the labels.
        assert template.pop("metadata")["labels"]
        assert not list(jsonschema.Draft202012Validator(head["template"]).iter_errors(template))


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_knows_every_field(name: str) -> None:
    file = Path(str(ray.__file__)).parent / "autoscaler" / "ray-schema.json"
    validator = jsonschema.Draft202012Validator(strict(json.loads(file.read_text())))
    assert not list(validator.iter_errors(RAY_UP[name]))
    validate_config(prepare_config(copy.deepcopy(RAY_UP[name])))


def test_ec2_knows_every_field_of_a_machine() -> None:
    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.shape_for("RunInstancesRequest")
    for name, kind in RAY_UP["aws"]["available_node_types"].items():
        parameters = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        assert ParamValidator().validate(parameters, shape).generate_report() == "", name


# ---- large enough for the recipes


def require_room(recipe: TrainConfig, gpus: float, cpus: float, cpus_per_gpu_node: float) -> None:
    scaling = recipe.scaling
    assert gpus == scaling.max_workers
    assert cpus_per_gpu_node >= 8 * scaling.cpus_per_worker  # else eight workers do not fit on eight GPUs
    assert cpus >= scaling.max_workers * scaling.cpus_per_worker + scaling.data_cpus


@pytest.mark.parametrize("folder", RECIPES)
def test_kuberay_clusters_hold_their_recipe(folder: str) -> None:
    gpus = cpus = 0
    for group in cluster_spec(folder)["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        [container] = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        gpus += group["replicas"] * int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        cpus += group["replicas"] * int(container["resources"]["limits"]["cpu"])
    gpu_group, data_group = cluster_spec(folder)["workerGroupSpecs"]
    gpu_limits = gpu_group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert gpu_limits["nvidia.com/gpu"] == "8"
    assert "nvidia.com/gpu" not in data_group["template"]["spec"]["containers"][0]["resources"]["limits"]
    require_room(RECIPES[folder], gpus, cpus, int(gpu_limits["cpu"]))


@pytest.mark.parametrize(("nodes", "recipe"), [(8, SWIN_L_MMDET), (2, R50_MMDET)])
def test_aws_holds_both_recipes(nodes: int, recipe: TrainConfig) -> None:
    text = (CLUSTER / "ray-up" / "aws.yaml").read_text()
    assert text.count("&size 8") == 1  # the one place that the file says to change
    config = yaml.safe_load(text.replace("&size 8", f"&size {nodes}"))
    kinds = [config["available_node_types"][name] for name in ("gpu", "data")]
    assert all(kind["min_workers"] == kind["max_workers"] == nodes for kind in kinds)
    assert config["max_workers"] >= sum(kind["max_workers"] for kind in kinds)
    gpus, cpus = (
        sum(kind["min_workers"] * kind["resources"].get(what, 0) for kind in kinds) for what in ("GPU", "CPU")
    )
    require_room(recipe, gpus, cpus, kinds[0]["resources"]["CPU"])


def test_own_machines_are_eight_of_eight_gpus() -> None:
    text = (CLUSTER / "ray-up" / "machines.yaml").read_text()
    with_gpus, without = re.findall(r"(?:^    - 192\.0\.2\.\d+\n)+", text, re.M)
    assert 8 * len(with_gpus.splitlines()) == SWIN_L_MMDET.scaling.max_workers
    scaling = SWIN_L_MMDET.scaling
    assert f"fewer than {scaling.cpus_per_worker + scaling.data_cpus / scaling.max_workers:g} CPUs for each GPU" in text
    assert len(without.splitlines()) > 0


@pytest.mark.parametrize("folder", RECIPES)
def test_the_head_does_no_work(folder: str) -> None:
    head = cluster_spec(folder)["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in str(head)


def test_the_head_of_ray_up_does_no_work() -> None:
    assert RAY_UP["aws"]["available_node_types"]["head"]["resources"] == {"CPU": 0}
    [start] = [line for line in RAY_UP["machines"]["head_start_ray_commands"] if "ray start" in line]
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(start.split())


@pytest.mark.parametrize("folder", RECIPES)
def test_shared_memory_holds_the_object_store(folder: str) -> None:
    spec = cluster_spec(folder)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [container], [volume] = pod["containers"], pod["volumes"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert volume["emptyDir"]["medium"] == "Memory"
        shared = size(volume["emptyDir"]["sizeLimit"])
        assert int(group["rayStartParams"]["object-store-memory"]) < shared
        assert shared < size(container["resources"]["limits"]["memory"]) / 2  # it counts as the pod's memory


@pytest.mark.parametrize("name", RAY_UP)
def test_shared_memory_of_ray_up_holds_the_object_store(name: str) -> None:
    [shared] = re.findall(r"--shm-size=(\S+)", " ".join(RAY_UP[name]["docker"]["run_options"]))
    commands = RAY_UP[name]["head_start_ray_commands"] + RAY_UP[name]["worker_start_ray_commands"]
    stores = re.findall(r"--object-store-memory=(\d+)", " ".join(commands))
    assert len(stores) == 2
    assert all(int(store) < size(shared) for store in stores)


# ---- one version of everything


def test_versions_agree() -> None:
    assert ray.__version__ == CONSTRAINTS["ray"]
    for folder in RECIPES:
        assert cluster_spec(folder)["rayVersion"] == CONSTRAINTS["ray"]
    images = {container["image"] for _, pod in every_pod() for container in pod["containers"]} - {"redis:7.4.0"}
    images |= {config["docker"]["image"] for config in RAY_UP.values()}
    for file in ("README.md", "Dockerfile"):
        images |= set(re.findall(r"\S+/maskformer-ray:\S+", (CLUSTER / file).read_text()))
    [image] = images  # the same everywhere
    assert image.endswith(f"/maskformer-ray:{TAG}")


def test_no_image_floats() -> None:
    for file in CLUSTER.rglob("*"):
        assert file.is_dir() or ":latest" not in file.read_text(), file
    for image in re.findall(r"^FROM (\S+)", (CLUSTER / "Dockerfile").read_text(), re.M):
        assert re.search(r":\d+\.\d+", image), image


def test_the_dockerfile_builds_this_project_as_tested_and_runs_as_nobody() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert sum(line.startswith("FROM") for line in lines) > 1
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    assert lines[-1].startswith("USER")
    assert any("-c constraints.txt ." in line for line in lines)
    assert "index" not in " ".join(lines).replace("--no-index", "")
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    admitted = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = {word for line in lines if re.match(r"COPY (?!--from)", line) for word in line.split()[1:-1]}
    assert copied == admitted
    assert all((ROOT / name).exists() for name in copied)


# ---- jobs that exist


def entry_points() -> dict[str, str]:
    return {folder: ray_object(folder)["spec"]["entrypoint"] for folder in ("job-r50", "job-swin-l")}


def commands() -> list[tuple[str, list[str]]]:
    """Return every command line of a job in the files and in the README: its file and its flags."""
    text = "\n".join([*entry_points().values(), README.replace("\\\n", " ")])
    found = re.findall(r"python (?:/app/)?(jobs/\w+\.py)(.*)", text)
    return [(job, re.findall(r"--[a-z][\w.-]*", rest)) for job, rest in found]


@pytest.mark.parametrize("job", sorted({job for job, _ in commands()}))
def test_every_job_takes_the_flags_it_is_given(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [job, "--help-all"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / job), run_name="__main__")
    known = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    assert {flag for name, flags in commands() if name == job for flag in flags} <= known


def test_entry_points_train_the_recipe_of_their_cluster() -> None:
    for folder, command in entry_points().items():
        job = re.findall(r"jobs/(train_\w+)\.py", command)[0]
        first_recipe = re.findall(r"train\(__doc__, (\w+)", (ROOT / "jobs" / f"{job}.py").read_text())[0]
        assert first_recipe.lower() == RECIPES[folder].recipe
        # Without a fixed name each retry would be a new run.
        assert f"--run.name {ray_object(folder)['metadata']['name']}" in command
    assert "COPY jobs /app/jobs" in (CLUSTER / "Dockerfile").read_text()


# ---- wired together


def environment(name: str) -> dict[str, str]:
    if name == "kubernetes":
        return service("maskformer", "ConfigMap")["data"]
    text = (CLUSTER / "ray-up" / "environment.example").read_text()
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.M))


@pytest.mark.parametrize("name", ["kubernetes", "ray up"])
def test_the_environment_holds_what_the_jobs_and_ray_read(name: str) -> None:
    variables = environment(name)
    assert {
        "MASKFORMER_TRAIN_DATA",
        "MASKFORMER_VAL_DATA",
        "MASKFORMER_STORAGE",
        "MLFLOW_TRACKING_URI",
    } <= variables.keys()
    folder = Path(str(ray.__file__)).parent
    variable = "RAY_JOB_STOP_WAIT_TIME_S"
    assert float(variables[variable]) > 60
    assert f'"{variable}"' in (folder / "dashboard/modules/job/job_supervisor.py").read_text()


def test_mlflow_is_where_the_jobs_look_and_answers_to_that_name() -> None:
    host, port = re.findall(r"^http://(\w+):(\d+)$", environment("kubernetes")["MLFLOW_TRACKING_URI"])[0]
    assert service(host, "Service")["spec"]["ports"][0]["port"] == int(port)
    [container] = containers(service(host, "Deployment"))
    line = " ".join(container["command"] + container["args"])
    assert f"--port {port}" in line
    assert f"--allowed-hosts={host}:{port}," in line
    for variable in container["env"]:
        assert variable["valueFrom"]["configMapKeyRef"]["key"] in environment("kubernetes")


@pytest.mark.parametrize("folder", RECIPES)
def test_the_head_outlives_its_pod(folder: str) -> None:
    options = cluster_spec(folder)["gcsFaultToleranceOptions"]
    name, port = options["redisAddress"].split(":")
    assert service(name, "Service")["spec"]["ports"][0]["port"] == int(port)
    [container] = containers(service(name, "StatefulSet"))
    assert container["env"][0]["valueFrom"] == options["redisPassword"]["valueFrom"]
    assert "--requirepass" in container["args"]


def test_every_secret_and_config_map_is_made_by_somebody() -> None:
    made = set(re.findall(r"kubectl create secret generic (?:-n \w+ )?([\w-]+)", README)) | {"maskformer"}
    text = json.dumps([rendered(folder) for folder in FOLDERS])
    wanted = set(re.findall(r'"(?:secretRef|configMapRef|secretKeyRef|configMapKeyRef)": {"name": "([\w-]+)"', text))
    assert wanted == made


def test_every_pool_of_nodes_is_explained_and_heads_are_not_spot() -> None:
    wanted = {label: {pod["nodeSelector"]["maskformer-ray/pool"]} for label, pod in every_pod()}
    for label, pools in wanted.items():
        assert pools <= set(re.findall(r"maskformer-ray/pool=(\w+)", README)), label
        if not label.endswith("ray-worker"):
            assert pools == {"steady"}, label
    machines = {name: kind["node_config"] for name, kind in RAY_UP["aws"]["available_node_types"].items()}
    spot = {
        name for name, machine in machines.items() if machine.get("InstanceMarketOptions") == {"MarketType": "spot"}
    }
    assert spot == {"gpu", "data"}
    assert RAY_UP["aws"]["head_node_type"] == "head"


# ---- closed


def test_pods_have_no_rights_that_they_do_not_need() -> None:
    found = list(every_pod())
    assert len(found) == 4 * 3 + 2 + 2  # four clusters, two submitters, Redis and MLflow
    for label, pod in found:
        assert pod["automountServiceAccountToken"] is False, label
        assert pod["enableServiceLinks"] is False, label
        assert pod["securityContext"]["runAsUser"] > 0, label
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostPath"} & set(re.findall(r"\w+", str(pod))), label
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["runAsNonRoot"] is True, label
            assert context["allowPrivilegeEscalation"] is False, label
            assert context["capabilities"] == {"drop": ["ALL"]}, label
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}, label
            assert "privileged" not in context, label
    for config in RAY_UP.values():
        assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(config["docker"]["run_options"])
        assert "--privileged" not in config["docker"]["run_options"]
    for machine in RAY_UP["aws"]["available_node_types"].values():
        assert machine["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


@pytest.mark.parametrize("folder", RECIPES)
def test_tokens_are_on_and_the_dashboard_stays_inside(folder: str) -> None:
    spec = cluster_spec(folder)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in spec["headGroupSpec"]


def test_services_stay_inside() -> None:
    kinds = {item["kind"] for item in rendered("services")}
    assert "Ingress" not in kinds
    assert {item["spec"]["type"] for item in rendered("services") if item["kind"] == "Service"} == {"ClusterIP"}


@pytest.mark.parametrize("name", RAY_UP)
def test_tokens_are_on_and_the_dashboard_stays_inside_with_ray_up(name: str) -> None:
    config = RAY_UP[name]
    [(folder, _)] = config["file_mounts"].items()
    assert environment("ray up")["RAY_AUTH_MODE"] == "token"
    assert environment("ray up")["RAY_AUTH_TOKEN_PATH"] == f"{folder}/auth_token"
    for line in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        if "ray start" in line:
            assert line.startswith(f"set -a && . {folder}/environment && ray start")
        if "--head" in line:
            assert "--dashboard-host=127.0.0.1" in line


def test_there_is_no_secret_in_any_file() -> None:
    assert not [item for folder in FOLDERS for item in rendered(folder) if item["kind"] == "Secret"]
    for file in CLUSTER.rglob("*"):
        if file.is_file():
            assert not re.search(r"AKIA[0-9A-Z]{16}|PRIVATE KEY|gh[pos]_\w{20}", file.read_text()), file
    secret = r"PASSWORD|SECRET|ACCESS_KEY|(?<!AUTH_)TOKEN$|AUTH_TOKEN$"
    for label, pod in every_pod():
        for variable in (item for container in pod["containers"] for item in container.get("env", [])):
            assert "value" not in variable or not re.search(secret, variable["name"]), label
    for name in ("kubernetes", "ray up"):
        assert not [variable for variable in environment(name) if re.search(secret, variable)]


# ---- told truly


def test_the_readme_names_every_file_and_only_files_that_exist() -> None:
    assert not [name for name in re.findall(r"(?<!ray)cluster/[\w./-]*\w", README) if not (ROOT / name).exists()]
    tree = README.split("## The files")[1].split("```")[1]
    listed = {line.split()[0].rstrip("/") for line in tree.strip().splitlines()}
    # Of a kustomization's folder the folder, of the others each file.
    there = {path.parent if "kubernetes" in path.parts else path for path in CLUSTER.rglob("*") if path.is_file()}
    assert listed == {str(path.relative_to(CLUSTER)) for path in there} - {"README.md"}
