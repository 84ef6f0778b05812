"""The cluster files against their readers' schemas, against our recipes and jobs, and against each other."""

import base64
import copy
import hashlib
import ipaddress
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
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
from tests.waiting import wait_for

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
        [container] = pod["containers"]
        [mount] = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        [volume] = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
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
    images = {container["image"] for _, pod in every_pod() for container in pod["containers"]}
    images = {image for image in images if not image.startswith("redis:")}
    images |= {config["docker"]["image"] for config in RAY_UP.values()}
    for file in ("README.md", "Dockerfile"):
        images |= set(re.findall(r"\S+/maskformer-ray:\S+", (CLUSTER / file).read_text()))
    [image] = images  # the same everywhere
    assert image.endswith(f"/maskformer-ray:{TAG}")


def test_no_image_floats() -> None:
    for file in CLUSTER.rglob("*"):
        assert file.is_dir() or ":latest" not in file.read_text(), file
    # Others' images stand by version and digest. Our own has no digest before it is pushed: see the README's commands.
    named = re.compile(r"[\w./-]+:\d[\w.-]*@sha256:[0-9a-f]{64}")
    stages = set()
    for image, stage in re.findall(r"^FROM (\S+)(?: AS (\w+))?", (CLUSTER / "Dockerfile").read_text(), re.M):
        assert image in stages or named.fullmatch(image), image
        stages.add(stage)
    for label, pod in every_pod():
        for container in pod["containers"]:
            image = container["image"]
            assert named.fullmatch(image) or image == f"registry.example.com/maskformer-ray:{TAG}", label


def test_redis_is_a_release_without_known_holes() -> None:
    [container] = containers(service("redis", "StatefulSet"))
    release = tuple(map(int, re.findall(r"^redis:(\d+)\.(\d+)\.(\d+)@", container["image"])[0]))
    assert release >= (8, 10, 2)  # the security release of September 2026


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_the_readmes_commands_write_our_images_digest_everywhere(tmp_path: Path) -> None:
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    [commands] = re.findall(r"^digest=.*\n((?:sed .*\n)+)", README, re.M)
    for letter in "ab":  # the second time it replaces the first digest
        digest = "sha256:" + 64 * letter
        subprocess.run(["bash", "-euc", f"digest={digest}\n{commands}"], cwd=tmp_path, check=True)
        ours = set()
        for folder in FOLDERS:
            place = tmp_path / "cluster" / "kubernetes" / folder
            shown = subprocess.run(["kubectl", "kustomize", place], capture_output=True, check=True, text=True).stdout
            ours |= set(re.findall(r"image: (\S+maskformer-ray\S*)", shown))
            assert {c["image"] for c in containers(render(place))} == set(re.findall(r"image: (\S+)", shown))
        for name in RAY_UP:
            ours |= set(re.findall(r"image: (\S+)", (tmp_path / "cluster" / "ray-up" / f"{name}.yaml").read_text()))
        assert ours == {f"registry.example.com/maskformer-ray:{TAG}@{digest}"}


def test_the_dockerfile_builds_this_project_as_tested_and_runs_as_nobody() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert sum(line.startswith("FROM") for line in lines) > 1
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    assert lines[-1].startswith("USER")
    assert any("-c constraints-all.txt ." in line for line in lines)
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
        if "valueFrom" in variable:
            assert variable["valueFrom"]["configMapKeyRef"]["key"] in environment("kubernetes")


@pytest.mark.parametrize("folder", RECIPES)
def test_the_head_outlives_its_pod(folder: str) -> None:
    options = cluster_spec(folder)["gcsFaultToleranceOptions"]
    name, port = options["redisAddress"].split(":")
    assert service(name, "Service")["spec"]["ports"][0]["port"] == int(port)
    [container] = containers(service(name, "StatefulSet"))
    secret = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    [mount] = [mount for mount in container["volumeMounts"] if mount["name"] == "password"]
    [pod] = pods(service(name, "StatefulSet"))
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == "password"]
    assert volume["secret"]["secretName"] == secret["name"]
    assert f"sha256sum < {mount['mountPath']}/{secret['key']}" in container["args"][0]


def test_every_secret_and_config_map_is_made_by_somebody() -> None:
    made = {("secret", name) for name in re.findall(r"kubectl create secret generic (?:-n \w+ )?([\w-]+)", README)}
    made |= {("configMap", item["metadata"]["name"]) for item in rendered("services") if item["kind"] == "ConfigMap"}
    text = json.dumps([rendered(folder) for folder in FOLDERS])
    wanted = set(re.findall(r'"(secret|configMap)(?:Ref|KeyRef)": {"name": "([\w-]+)"', text))
    wanted |= {("secret", name) for name in re.findall(r'"secretName": "([\w-]+)"', text)}
    wanted |= {("configMap", name) for name in re.findall(r'"configMap": {"name": "([\w-]+)"', text)}
    assert wanted == made


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_the_readmes_commands_make_the_secrets_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "maskformer-s3").mkdir()
    for name in ("training", "mlflow"):
        keys = f"AWS_ACCESS_KEY_ID=id-{name}\nAWS_SECRET_ACCESS_KEY=key-{name}\n"
        (tmp_path / "maskformer-s3" / name).write_text(keys)
    found = re.findall(r"^(password\(\) .*|kubectl create secret (?:.*\\\n)*.*)$", README, re.M)
    script = 'set -eu\nkubectl() { command kubectl "$@" --dry-run=client -o yaml; echo ---; }\n' + "\n".join(found)
    environment = {**os.environ, "HOME": str(tmp_path)}
    shown = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, check=True, text=True).stdout
    secrets = {item["metadata"]["name"]: item for item in yaml.safe_load_all(shown) if item}
    assert {item["metadata"]["namespace"] for item in secrets.values()} == {"maskformer"}
    assert {name: set(item["data"]) for name, item in secrets.items()} == {
        "maskformer-redis": {"password"},
        "maskformer-mlflow-admin": {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"},
        "maskformer-mlflow": {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"},
        "maskformer-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
        "maskformer-mlflow-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    }
    values = [value for item in secrets.values() for value in item["data"].values()]
    assert len(set(values)) == len(values)  # each purpose has its own
    password = base64.b64decode(secrets["maskformer-redis"]["data"]["password"]).decode()
    assert re.fullmatch(r"[0-9a-f]{48}", password)


def test_each_pod_gets_the_secrets_of_its_purpose_only() -> None:
    read: dict[str, set[str]] = {}
    for label, pod in every_pod():
        kind = label.split(": ")[1]
        read.setdefault(kind, set()).update(re.findall(r"'(?:secretRef': {'name|secretName)': '([\w-]+)'", str(pod)))
    ray_nodes = {"maskformer-s3", "maskformer-mlflow"}
    assert read == {
        "ray-head": ray_nodes,  # KubeRay adds Redis's password
        "ray-worker": ray_nodes,
        "submitter": set(),
        "mlflow": {"maskformer-mlflow-admin", "maskformer-mlflow-s3"},
        "redis": {"maskformer-redis"},
    }


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
            assert context["readOnlyRootFilesystem"] is True, label
            assert "privileged" not in context, label
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), label
            assert container["resources"]["requests"] == container["resources"]["limits"], label
        for volume in pod.get("volumes", []):
            if "emptyDir" in volume:
                assert size(volume["emptyDir"]["sizeLimit"]) <= 100 * 2**30, label
    for config in RAY_UP.values():
        assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(config["docker"]["run_options"])
        assert "--privileged" not in config["docker"]["run_options"]
    for machine in RAY_UP["aws"]["available_node_types"].values():
        metadata = machine["node_config"]["MetadataOptions"]
        assert metadata == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
    labels = next(item for item in rendered("services") if item["kind"] == "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_what_our_programs_write_is_on_a_volume() -> None:
    for label, pod in every_pod():
        for container in pod["containers"]:
            writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            if container["name"] == "redis":
                assert writable == {"/data"}, label
            else:
                assert {"/tmp", "/home/ray"} <= writable <= {"/tmp", "/home/ray", "/dev/shm", "/mlflow"}, label
    # The home of the user that the image runs as.
    assert "useradd --create-home --uid 1000 --shell /bin/bash ray" in (CLUSTER / "Dockerfile").read_text()


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


# ---- the network


NAMESPACE = {"kubernetes.io/metadata.name": "maskformer"}
PEERS = {
    **{app: ({"app": app}, NAMESPACE) for app in ("ray-head", "ray-worker", "submitter", "mlflow", "redis", "another")},
    "operator of Helm": (
        {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"},
        {"kubernetes.io/metadata.name": "kuberay-operator"},
    ),
    "operator of kustomize": (
        {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"},
        {"kubernetes.io/metadata.name": "kuberay-operator"},
    ),
    "impostor": (
        {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"},
        {"kubernetes.io/metadata.name": "default"},
    ),
    "prometheus": ({"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"}),
    "names": ({"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"}),
    "stranger": ({"app": "ray-worker"}, {"kubernetes.io/metadata.name": "default"}),
}
"""The labels of pods and of their namespaces. `another` is in our namespace and nobody's."""


@cache
def policies() -> list[dict[str, Any]]:
    return [item["spec"] for item in rendered("services") if item["kind"] == "NetworkPolicy"]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Decide as Kubernetes does whether a label selector selects these labels."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def admits(direction: str, pod: str, peer: str, port: int, protocol: str = "TCP") -> bool:
    """Decide as Kubernetes does whether a pod of ours may be reached by, or may reach, a peer or an address."""
    mine = [
        policy
        for policy in policies()
        if selects(policy["podSelector"], PEERS[pod][0]) and direction.capitalize() in policy["policyTypes"]
    ]
    if not mine:
        return True  # a pod that no policy selects is open
    for rule in (rule for policy in mine for rule in policy.get(direction, [])):
        ports = rule.get("ports")
        if ports and {"protocol": protocol, "port": port} not in ports:
            continue
        for place in rule["from" if direction == "ingress" else "to"]:
            if "ipBlock" in place:
                if peer in PEERS:
                    continue
                address, block = ipaddress.ip_address(peer), place["ipBlock"]
                inside = address in ipaddress.ip_network(block["cidr"])
                if inside and not any(address in ipaddress.ip_network(part) for part in block.get("except", [])):
                    return True
            elif peer in PEERS:
                labels, namespace = PEERS[peer]
                here = (
                    selects(place["namespaceSelector"], namespace)
                    if "namespaceSelector" in place
                    else (namespace == NAMESPACE)
                )
                if here and selects(place.get("podSelector", {}), labels):
                    return True
    return False


def test_kubernetes_knows_every_field_of_the_policies(definitions: dict[str, Any]) -> None:
    # KubeRay's definitions hold Kubernetes' own of a policy's rules.
    rules = definitions["RayCluster"]["properties"]["spec"]["properties"]["networkPolicy"]["properties"]["head"]
    peer = rules["properties"]["ingressRules"]["items"]["properties"]["from"]["items"]
    schema = {
        "type": "object",
        "properties": {
            "podSelector": peer["properties"]["podSelector"],
            "policyTypes": {"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
            "ingress": rules["properties"]["ingressRules"],
            "egress": rules["properties"]["egressRules"],
        },
        "required": ["podSelector", "policyTypes"],
        "additionalProperties": False,
    }
    validator = jsonschema.Draft202012Validator(schema)
    assert len(policies()) == 8
    # Pods of any label can do nothing that no other policy allows.
    assert policies().count({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}) == 1
    for policy in policies():
        assert not list(validator.iter_errors(policy))
    wrong = copy.deepcopy(policies()[1])
    wrong["ingress"][0]["form"] = wrong["ingress"][0].pop("from")
    wrong["podSelector"]["matchlabels"] = {}
    assert len(list(validator.iter_errors(wrong))) == 2
    for item in rendered("services"):
        if item["kind"] == "NetworkPolicy":
            assert item["apiVersion"] == "networking.k8s.io/v1"
            assert set(item) == {"apiVersion", "kind", "metadata", "spec"}


def test_the_policies_are_for_pods_that_exist() -> None:
    labels = {template["metadata"]["labels"]["app"] for folder in FOLDERS for template in templates(rendered(folder))}
    assert labels == {"ray-head", "ray-worker", "submitter", "mlflow", "redis"}
    for item in rendered("services"):
        if item["kind"] == "Service":  # each leads to pods that accept somebody, at this port
            [app], [port] = item["spec"]["selector"].values(), item["spec"]["ports"]
            assert app in labels
            assert any(admits("ingress", app, peer, port["port"]) for peer in PEERS)


def templates(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every template of a pod below `node`."""
    if isinstance(node, dict):
        if "containers" in node.get("spec", {}):
            yield node
        for value in node.values():
            yield from templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from templates(value)


PORTS = (5000, 6379, 8080, 8265, 10001, 41234)
OPEN = {
    ("submitter", "ray-head", 8265),
    ("operator of Helm", "ray-head", 8265),
    ("operator of kustomize", "ray-head", 8265),
    ("ray-head", "mlflow", 5000),
    ("ray-worker", "mlflow", 5000),
    ("ray-head", "redis", 6379),
    *(
        (one, other, port)
        for one in ("ray-head", "ray-worker")
        for other in ("ray-head", "ray-worker")
        for port in PORTS
    ),
}
"""Who may reach whom, and at which port. KubeRay has Ray's metrics at 8080."""


def test_pods_reach_whom_they_need_and_nobody_else() -> None:
    ours = ["ray-head", "ray-worker", "submitter", "mlflow", "redis", "another"]
    for source in PEERS:
        for target in ours:
            for port in PORTS:
                received = admits("ingress", target, source, port)
                assert received == ((source, target, port) in OPEN), (source, target, port)
                if source in ours:
                    assert admits("egress", source, target, port) == received, (source, target, port)


@pytest.mark.parametrize(
    ("app", "names", "bucket"),
    [
        ("ray-head", True, True),
        ("ray-worker", True, True),
        ("mlflow", True, True),
        ("submitter", True, False),
        ("redis", False, False),
        ("another", False, False),
    ],
)
def test_pods_reach_names_and_the_bucket_and_no_metadata(app: str, names: bool, bucket: bool) -> None:
    for protocol in ("UDP", "TCP"):
        assert admits("egress", app, "names", 53, protocol) == names
        assert not admits("egress", app, "8.8.8.8", 53, protocol)
    assert admits("egress", app, "52.218.0.1", 443) == bucket
    assert not admits("egress", app, "52.218.0.1", 80)
    for address in ("169.254.169.254", "169.254.170.2", "10.96.0.1", "172.20.0.1", "192.168.1.1", "100.64.0.1"):
        for port in (80, 443):
            assert not admits("egress", app, address, port), address


# ---- Redis


def redis_command(folder: Path, password: str, port: int) -> list[str]:
    """Return the StatefulSet's command, with its folders below `folder`."""
    [container] = containers(service("redis", "StatefulSet"))
    [config] = [
        item["data"]["redis.conf"]
        for item in rendered("services")
        if item["metadata"]["name"] == "redis" and item["kind"] == "ConfigMap"
    ]
    for name in ("config", "password", "data"):
        (folder / name).mkdir()
    (folder / "password" / "password").write_text(password)
    config = config.replace("port 6379", f"port {port}").replace("bind * -::*", "bind 127.0.0.1")
    (folder / "config" / "redis.conf").write_text(config.replace("dir /data", f"dir {folder}/data"))
    script = container["args"][0].replace("/config/", f"{folder}/config/").replace("/password/", f"{folder}/password/")
    return [*container["command"], script]


def test_redis_gets_no_password_on_its_command_line(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    server = tmp_path / "bin" / "redis-server"
    server.write_text('#!/bin/sh\necho "arguments: $*"\ncat\n')
    server.chmod(0o755)
    command = redis_command(tmp_path, "the password", 6379)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    shown = subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout.splitlines()
    assert shown[0] == "arguments: -"
    assert "the password" not in "".join(shown)
    assert shown[-1].startswith(f"user default on #{hashlib.sha256(b'the password').hexdigest()} ")
    [limit] = re.findall(r"^maxmemory (\d+)mb$", "\n".join(shown), re.M)
    [container] = containers(service("redis", "StatefulSet"))
    assert int(limit) * 2**20 < size(container["resources"]["limits"]["memory"]) / 2
    assert "protected-mode yes" in shown


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server")
def test_redis_serves_what_ray_asks_and_nothing_dangerous(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def ask(*words: str, password: str = "the password") -> str:
        command = ["redis-cli", "-p", str(port), *words]
        environment = {**os.environ, "REDISCLI_AUTH": password}
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()

    with subprocess.Popen(redis_command(tmp_path, "the password", port), stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: ask("PING") == "PONG", "answer of Redis", seconds=30)
            assert ask("HSET", "table", "key", "value") == "1"
            assert ask("HGET", "table", "key") == "value"
            assert ask("INCRBY", "counter", "2") == "2"
            assert "redis_version" in ask("INFO", "server")
            assert ask("DEL", "table") == "1"
            assert "NOAUTH" in ask("GET", "counter", password="")
            assert "NOAUTH" in ask("GET", "counter", password="wrong")
            for words in (
                ["CONFIG", "GET", "*"],
                ["FLUSHALL"],
                ["EVAL", "return 1", "0"],
                ["SCRIPT", "LOAD", "return 1"],
                ["KEYS", "*"],
                ["ACL", "LIST"],
                ["SHUTDOWN"],
                ["REPLICAOF", "10.0.0.1", "6379"],
                ["PUBLISH", "a", "b"],
                ["RESTORE", "a", "0", "b"],
            ):
                assert ask(*words).startswith("NOPERM"), words
            line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            assert b"redis-server" in line
            assert b"password" not in line
        finally:
            process.kill()


# ---- told truly


def test_the_readmes_own_mlflow_server_is_closed_too() -> None:
    [command] = re.findall(r"^docker run ((?:.*\\\n)*.*)$", README, re.M)
    words = command.replace("\\\n", " ").split()
    assert words[words.index("--publish") + 1] == "YOUR-PRIVATE-ADDRESS:5000:5000"
    assert {"--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--app-name=basic-auth"} <= set(words)
    assert not [word for word in words if re.search(r"PASSWORD|SECRET|ACCESS_KEY", word)]
    for own in re.findall(r"--publish (\S+)", README):
        assert own.count(":") == 2  # an address, and not all
    [container] = containers(service("mlflow", "Deployment"))
    shared = {word for word in container["command"] + container["args"] if word.startswith("--")} - {
        word for word in container["args"] if "allowed-hosts" in word or "artifacts-destination" in word
    }
    assert shared <= set(words)
    # The name differs. Both answer at the address that the script of section 4 asks from inside of the container.
    ours, theirs = (
        flag.removeprefix("--allowed-hosts=").split(",")[1:]
        for [flag] in (
            [word for word in shlex.split(command.replace("\\\n", " ")) if word.startswith("--allowed-hosts=")],
            [word for word in container["args"] if word.startswith("--allowed-hosts=")],
        )
    )
    assert ours == theirs
    [asked] = re.findall(r'get_app_client\("basic-auth", "http://([^"]+)"\)', README)
    assert any(fnmatch(asked, pattern) for pattern in ours)


def test_the_readme_says_that_metrics_are_closed() -> None:
    assert not any(admits("ingress", app, "prometheus", 8080) for app in ("ray-head", "ray-worker"))
    assert "Prometheus" in README.split("## Not set up")[1]


def test_the_readme_names_every_file_and_only_files_that_exist() -> None:
    assert not [name for name in re.findall(r"(?<!ray)cluster/[\w./-]*\w", README) if not (ROOT / name).exists()]
    tree = README.split("## The files")[1].split("```")[1]
    listed = {line.split()[0].rstrip("/") for line in tree.strip().splitlines()}
    # Of a kustomization's folder the folder, of the others each file.
    there = {path.parent if "kubernetes" in path.parts else path for path in CLUSTER.rglob("*") if path.is_file()}
    assert listed == {str(path.relative_to(CLUSTER)) for path in there} - {"README.md"}
