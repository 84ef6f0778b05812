"""The rights in cluster/aws/: enough for what the jobs and Ray really ask of AWS, and for nothing else."""

import copy
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from botocore.client import BaseClient
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository
from moto import mock_aws
from pyarrow.fs import copy_files
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config

from pipelines.storage import Location, locate
from pipelines.training.lock import locked

CLUSTER = Path(__file__).parents[2] / "cluster"
POLICIES = {file.stem: json.loads(file.read_text()) for file in sorted((CLUSTER / "aws").glob("*.json"))}
AWS = yaml.safe_load((CLUSTER / "ray-up" / "aws.yaml").read_text())
REGION = AWS["provider"]["region"]
MOTO_ONLY = ["s3:HeadBucket", "s3:DeleteObject"]
ACCOUNT, BUCKET = "123456789012", "my-bucket"


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def actions(policy: dict[str, Any]) -> set[str]:
    return {action for statement in policy["Statement"] for action in listed(statement["Action"])}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_name_what_they_allow(name: str) -> None:
    policy = POLICIES[name]
    assert set(policy) == {"Version", "Statement"}
    assert policy["Version"] == "2012-10-17"
    assert len({statement["Sid"] for statement in policy["Statement"]}) == len(policy["Statement"])
    for statement in policy["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
        assert statement["Effect"] == "Allow"
        assert not [action for action in listed(statement["Action"]) if "*" in action]
        if statement["Resource"] == "*":  # EC2 knows no resources of what only looks
            assert all(action.startswith("ec2:Describe") for action in listed(statement["Action"]))
            assert statement["Condition"] == {"StringEquals": {"aws:RequestedRegion": REGION}}
        for resource in listed(statement["Resource"]):
            assert resource == "*" or "YOUR-BUCKET" in resource or "YOUR-ACCOUNT" in resource or ":image/" in resource


# ---- the bucket, as an S3 that checks rights sees it


@pytest.fixture(scope="module")
def keys() -> Iterator[Callable[[str], dict[str, str]]]:
    """Run an S3 server that enforces the policies; yield a function that returns a policy's environment.

    It is a process of its own: it checks the rights of every request from now on.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while not _answers(url):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            access: dict[str, Any] = {
                "endpoint_url": url,
                "region_name": "us-east-1",
                "aws_access_key_id": "owner",
                "aws_secret_access_key": "owner",
            }
            s3, iam = boto3.client("s3", **access), boto3.client("iam", **access)
            s3.create_bucket(Bucket=BUCKET)
            table = pa.BufferOutputStream()
            pq.write_table(pa.table({"image": [b"a", b"b"]}), table)
            for key in ("packed/train2017/shard.parquet", "mlflow/1/model", "runs/other/config.json"):
                s3.put_object(Bucket=BUCKET, Key=key, Body=table.getvalue().to_pybytes())
            s3.put_object(Bucket=BUCKET, Key="weights/resnet50.pth", Body=b"weights")
            environments = {}
            for name in ("bucket-training", "bucket-mlflow"):
                iam.create_user(UserName=name)
                policy = copy.deepcopy(POLICIES[name])
                # This server checks two operations in its own way: AWS asks for s3:ListBucket of the bucket, and for
                # s3:DeleteObject of each of several objects.
                bucket = {"Effect": "Allow", "Action": MOTO_ONLY, "Resource": f"arn:aws:s3:::{BUCKET}"}
                policy["Statement"].append(bucket)
                document = json.dumps(policy).replace("YOUR-BUCKET", BUCKET)
                iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=document)
                key = iam.create_access_key(UserName=name)["AccessKey"]
                environments[name] = {
                    "AWS_ENDPOINT_URL": url,
                    "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
                    "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
                    "AWS_DEFAULT_REGION": "us-east-1",
                    "AWS_EC2_METADATA_DISABLED": "true",
                }
            enforce = urllib.request.Request(f"{url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
            urllib.request.urlopen(enforce).close()
            yield environments.__getitem__
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/moto-api/").close()
    except OSError:
        return False
    return True


@pytest.fixture
def act_as(keys: Callable[[str], dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Location]:
    """Return a function that takes on a policy's keys and returns the bucket."""

    def take_on(name: str) -> Location:
        for variable, value in keys(name).items():
            monkeypatch.setenv(variable, value)
        return locate(f"s3://{BUCKET}")

    return take_on


def test_training_reads_data_and_weights_and_writes_runs(act_as: Callable[[str], Location], tmp_path: Path) -> None:
    bucket = act_as("bucket-training")
    assert (bucket / "weights" / "resnet50.pth").read_bytes() == b"weights"
    pack = bucket / "packed" / "train2017"
    assert pack.names() == ["shard.parquet"]
    assert pq.read_table((pack / "shard.parquet").path, filesystem=pack.filesystem).num_rows == 2
    assert not (bucket / "packed" / "missing").exists()  # "not there", and not "not allowed"
    run = bucket / "runs" / "r50"
    assert not (run / "config.json").exists()
    run.filesystem.create_dir(run.path, recursive=True)  # as Ray Train does
    with locked(run, "run"):
        (run / "config.json").write_bytes(b"{}")
        (run / "checkpoint").write_with(lambda file: file.write(bytes(12_000_000)))  # in several parts
    assert (run / "checkpoint").size() == 12_000_000
    (tmp_path / "a").write_bytes(b"a")
    copy_to = run / "checkpoint_1"
    copy_files(str(tmp_path), copy_to.path, destination_filesystem=run.filesystem)
    run.filesystem.delete_dir(copy_to.path)
    (run / "config.json").delete()
    assert "config.json" not in run.names()


@pytest.mark.parametrize("place", ["packed/train2017/shard.parquet", "weights/resnet50.pth", "mlflow/1/model", "other"])
def test_training_writes_nothing_else(place: str, act_as: Callable[[str], Location]) -> None:
    bucket = act_as("bucket-training")
    for refused in ((bucket / place).delete, lambda: (bucket / place).write_bytes(b"poisoned")):
        with pytest.raises(Exception, match=r"(?i)access.?denied"):
            refused()
    if place in ("mlflow/1/model", "other"):
        with pytest.raises(Exception, match=r"(?i)access.?denied"):
            (bucket / place).read_bytes()


def test_mlflow_has_its_own_prefix_only(act_as: Callable[[str], Location], tmp_path: Path) -> None:
    bucket = act_as("bucket-mlflow")
    artifacts = S3ArtifactRepository(f"s3://{BUCKET}/mlflow/1")
    (tmp_path / "weights").write_bytes(bytes(9_000_000))  # in several parts
    artifacts.log_artifacts(str(tmp_path), "model")
    assert [file.path for file in artifacts.list_artifacts("model")] == ["model/weights"]
    downloaded = artifacts.download_artifacts("model/weights", str(tmp_path))
    assert Path(downloaded).stat().st_size == 9_000_000
    artifacts.delete_artifacts("model")
    assert artifacts.list_artifacts("model") == []
    for place in ("packed/train2017/shard.parquet", "weights/resnet50.pth", "runs/other/config.json"):
        for refused in ((bucket / place).read_bytes, lambda place=place: (bucket / place).write_bytes(b"poisoned")):
            with pytest.raises(Exception, match=r"(?i)access.?denied"):
                refused()


def test_rights_to_the_bucket_are_those_that_were_used() -> None:
    read_and_write = {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}
    for name in ("bucket-training", "bucket-mlflow"):
        assert actions(POLICIES[name]) == {"s3:ListBucket"} | read_and_write
    environment = (CLUSTER / "kubernetes" / "services" / "environment.yaml").read_text()
    for variable, folder in {
        "MASKFORMER_TRAIN_DATA": "packed/train2017",
        "MASKFORMER_VAL_DATA": "packed/val2017",
        "MASKFORMER_STORAGE": "runs",
        "MLFLOW_ARTIFACTS_DESTINATION": "mlflow",
    }.items():
        assert f"{variable}: s3://YOUR-BUCKET/{folder}\n" in environment


# ---- machines


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Return what `ray up` and the head ask of EC2, with their parameters, in a simulated AWS."""
    made: list[tuple[str, dict[str, Any]]] = []
    call = BaseClient._make_api_call  # pyright: ignore[reportAttributeAccessIssue]

    def recorded(self: Any, operation: str, parameters: dict[str, Any]) -> Any:
        made.append((f"{self.meta.service_model.service_name}:{operation}", copy.deepcopy(parameters)))
        return call(self, operation, parameters)

    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(variable, "testing")
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        iam, ec2 = boto3.client("iam"), boto3.client("ec2")
        for role in ("maskformer-head", "maskformer-worker"):
            iam.create_role(RoleName=role, AssumeRolePolicyDocument="{}")
            iam.create_instance_profile(InstanceProfileName=role)
            iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
        vpc = next(network["VpcId"] for network in ec2.describe_vpcs()["Vpcs"] if network["IsDefault"])
        group = ec2.create_security_group(GroupName="maskformer", Description="nodes", VpcId=vpc)["GroupId"]
        text = yaml.safe_dump(AWS).replace("sg-YOUR-GROUP", group)
        home = tmp_path_factory.mktemp("home")  # Ray writes an ssh key there
        (home / ".ssh").mkdir()
        patch.setenv("HOME", str(home))
        patch.setattr(BaseClient, "_make_api_call", recorded)
        config = prepare_config(yaml.safe_load(text))
        AWSNodeProvider.fillout_available_node_types_resources(copy.deepcopy(config))
        config = bootstrap_aws(config)
        _life_of(config, "head")
        found = {"ec2-ray-up": [*made]}
        made.clear()
        for kind in ("gpu", "data"):
            _life_of(config, kind)
        found["ec2-head"] = [*made]
    return {
        name: [(operation, json.loads(json.dumps(given).replace(group, "sg-YOUR-GROUP"))) for operation, given in made]
        for name, made in found.items()
    }


def _life_of(config: dict[str, Any], kind: str) -> None:
    """Start a machine, look at it, tag it and end it, as Ray does."""
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    provider.create_node(config["available_node_types"][kind]["node_config"], {"ray-node-type": kind}, 1)
    [node] = provider.non_terminated_nodes({"ray-node-type": kind})
    provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    provider._update_node_tags()  # otherwise a thread does it later
    provider.terminate_node(node)


def allowed(policy: dict[str, Any], action: str, resource: str, context: dict[str, str]) -> bool:
    """Decide as IAM does, for the kinds of conditions that the policies use."""
    compare: dict[str, Callable[[str, str], bool]] = {
        "StringEquals": str.__eq__,
        "NumericEquals": lambda given, wanted: float(given) == float(wanted),
        "ArnEquals": fnmatchcase,
        "Bool": lambda given, wanted: given.lower() == wanted,
    }
    text = json.dumps(policy).replace("YOUR-ACCOUNT", ACCOUNT)
    return any(
        action in listed(statement["Action"])
        and any(fnmatchcase(resource, pattern) for pattern in listed(statement["Resource"]))
        and all(
            key in context and any(compare[kind](context[key], wanted) for wanted in listed(values))
            for kind, condition in statement.get("Condition", {}).items()
            for key, values in condition.items()
        )
        for statement in json.loads(text)["Statement"]
    )


def questions(operation: str, given: dict[str, Any], owner: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield what AWS asks IAM before it does an operation: action, resource, what is known.

    Args:
        owner: the cluster that the machines of the call belong to.
    """
    action = operation
    here = f"arn:aws:ec2:{REGION}:{ACCOUNT}:"
    region = {"aws:RequestedRegion": REGION}
    if action.startswith("ec2:Describe"):
        yield action, "*", region
    elif action == "ec2:CreateKeyPair":
        yield action, f"{here}key-pair/{given['KeyName']}", region
    elif action in ("ec2:CreateTags", "ec2:TerminateInstances"):
        for machine in given.get("Resources") or given["InstanceIds"]:
            yield action, f"{here}instance/{machine}", {**region, "aws:ResourceTag/ray-cluster-name": owner}
    else:
        assert action == "ec2:RunInstances", action
        [tags] = given["TagSpecifications"]
        profile = given["IamInstanceProfile"]["Name"]
        machine = {
            **region,
            "ec2:InstanceType": given["InstanceType"],
            "ec2:InstanceProfile": f"arn:aws:iam::{ACCOUNT}:instance-profile/{profile}",
            "ec2:MetadataHttpTokens": given["MetadataOptions"]["HttpTokens"],
            "ec2:MetadataHttpPutResponseHopLimit": str(given["MetadataOptions"].get("HttpPutResponseHopLimit", 2)),
            **{f"aws:RequestTag/{tag['Key']}": tag["Value"] for tag in tags["Tags"]},
        }
        yield action, f"{here}instance/*", machine
        yield "ec2:CreateTags", f"{here}instance/*", {**region, "ec2:CreateAction": "RunInstances"}
        role = f"arn:aws:iam::{ACCOUNT}:role/{profile}"
        yield "iam:PassRole", role, {"iam:PassedToService": "ec2.amazonaws.com"}
        for disk in given["BlockDeviceMappings"]:
            yield action, f"{here}volume/*", {**region, "ec2:Encrypted": str(disk["Ebs"].get("Encrypted", False))}
        yield action, f"arn:aws:ec2:{REGION}::image/{given['ImageId']}", region
        for group in given["SecurityGroupIds"]:
            yield action, f"{here}security-group/{group}", region
        yield action, f"{here}subnet/{given['SubnetId']}", region
        yield action, f"{here}network-interface/*", region
        yield action, f"{here}key-pair/{given['KeyName']}", region
        if given.get("InstanceMarketOptions"):
            yield action, f"{here}spot-instances-request/*", region


def denied(name: str, operation: str, given: dict[str, Any], owner: str = "maskformer") -> list[str]:
    """Return the questions that a policy answers with no."""
    return [
        f"{action} {resource} {context}"
        for action, resource, context in questions(operation, given, owner)
        if not allowed(POLICIES[name], action, resource, context)
    ]


@pytest.mark.parametrize("name", ["ec2-ray-up", "ec2-head"])
def test_ray_may_do_what_it_does_and_no_action_more(
    name: str, calls: dict[str, list[tuple[str, dict[str, Any]]]]
) -> None:
    used = set()
    for operation, given in calls[name]:
        assert denied(name, operation, given) == []
        used |= {action for action, _, _ in questions(operation, given, "maskformer")}
    assert used == actions(POLICIES[name])


@pytest.mark.parametrize("name", ["ec2-ray-up", "ec2-head"])
@pytest.mark.parametrize(
    "changed",
    [
        {"InstanceType": "p5.48xlarge"},
        {"IamInstanceProfile": {"Name": "administrator"}},
        {"MetadataOptions": {"HttpTokens": "optional", "HttpPutResponseHopLimit": 1}},
        {"MetadataOptions": {"HttpTokens": "required"}},
        {"BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 200}}]},
        {"ImageId": "ami-of-a-stranger"},
        {"SecurityGroupIds": ["sg-open-to-all"]},
        {"TagSpecifications": [{"ResourceType": "instance", "Tags": [{"Key": "ray-cluster-name", "Value": "other"}]}]},
        {"TagSpecifications": [{"ResourceType": "instance", "Tags": []}]},
    ],
    ids=str,
)
def test_no_other_machine_can_be_started(
    name: str, changed: dict[str, Any], calls: dict[str, list[tuple[str, dict[str, Any]]]]
) -> None:
    started = [given for operation, given in calls[name] if operation == "ec2:RunInstances"]
    assert started
    for given in started:
        # Already the machine itself is refused, and not only its role.
        assert any(no.startswith("ec2:RunInstances") for no in denied(name, "ec2:RunInstances", {**given, **changed}))


def test_the_head_starts_no_head_and_nobody_ends_what_is_not_the_clusters(
    calls: dict[str, list[tuple[str, dict[str, Any]]]],
) -> None:
    started = [given for operation, given in calls["ec2-ray-up"] if operation == "ec2:RunInstances"]
    assert all(denied("ec2-head", "ec2:RunInstances", given) for given in started)
    for name, operation, given in [
        (name, operation, given)
        for name, made in calls.items()
        for operation, given in made
        if operation in ("ec2:TerminateInstances", "ec2:CreateTags")
    ]:
        assert denied(name, operation, given, owner="other")
        assert denied(name, operation, given, owner="")


def test_the_administrator_makes_the_role_of_spot_machines() -> None:
    # EC2 makes it for who uses its console. A call of RunInstances for a spot machine needs the role, or the right.
    right = "iam:CreateServiceLinkedRole"
    spot = [each for each in AWS["available_node_types"].values() if "InstanceMarketOptions" in each["node_config"]]
    assert spot
    assert not any(right in actions(POLICIES[name]) for name in ("ec2-ray-up", "ec2-head"))
    made = re.findall(
        r"^aws iam create-service-linked-role --aws-service-name (\S+)$", (CLUSTER / "README.md").read_text(), re.M
    )
    assert made == ["spot.amazonaws.com"]


def test_machines_are_as_the_policies_ask() -> None:
    for machine in AWS["available_node_types"].values():
        config = machine["node_config"]
        assert config["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        assert all(disk["Ebs"]["Encrypted"] is True for disk in config["BlockDeviceMappings"])
        assert config["ImageId"] == "ami-YOUR-IMAGE"
        assert config["SecurityGroupIds"] == ["sg-YOUR-GROUP"]
    assert AWS["cluster_name"] == "maskformer"
