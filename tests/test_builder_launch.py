"""The printed jobs: checked by bash, by Kubernetes' own schemas, and by AWS' own service model."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from builder.cli import main
from builder.launch.kubernetes import yaml_of
from tests.test_builder_build import hashes

KUBERNETES = ["launch", "kubernetes", "--image", "registry.example/semiformula:1"]
BATCH = ["launch", "aws-batch", "--image", "registry.example/semiformula:1", "--queue", "spot"]
FARM = Path(__file__).parent.parent / "builder/FARM.md"


def printed(*words: str) -> str:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: str) -> str:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def bucket(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL that is no folder's; four shards are planned there."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/data/plan.json", (dataset / "plan.json").read_bytes())
    return "memory://bucket/data"


def kubernetes(*words: str) -> dict[str, Any]:
    text = printed(*KUBERNETES, *words)
    manifest: dict[str, Any] = yaml.safe_load(text)
    return manifest


def test_kubernetes_job_is_one_that_kubernetes_takes(bucket: str):
    words = ["--tasks", "3", "--secret", "s3", "--service-account", "builder", "--env", "A=b: {c"]
    manifest = kubernetes(bucket, *words, "--at-once", "2", "--claim", "data:/data/")
    for version in ("1.31", "1.34"):
        kubernetes_validate.validate(manifest, version, strict=True)
    spec = manifest["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 2)
    assert spec["backoffLimitPerIndex"] == 5
    assert spec["podFailurePolicy"]["rules"][0] == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["serviceAccountName"] == "builder"
    (container,) = pod["containers"]
    work = ["python", "-m", "builder", "work", bucket, "--task", "auto", "--jobs", "4"]
    assert container["command"] == work
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert (variables["JOB_COMPLETIONS"], variables["A"]) == ("3", "b: {c")
    assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"scratch": "/scratch", "data": "/data"}


def test_kubernetes_validator_refuses_a_misspelt_field(bucket: str):
    manifest = kubernetes(bucket, "--tasks", "3")
    manifest["spec"]["completionmode"] = manifest["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.34", strict=True)


def test_kubernetes_folder_needs_a_claim(dataset: Path):
    assert "no pod sees this folder; give --claim" in refused(*KUBERNETES, str(dataset))
    words = ["/volume/set", "--claim", "disk:/volume", "--tasks", "7"]
    assert kubernetes(*words)["spec"]["completions"] == 7


@pytest.mark.parametrize(
    "value",
    [
        {"a": {"b": [1, {"c": ["x: y", "'", '"', "#"], "d": {}}, []]}, "e": None, "f": True},
        [{"a": [{"b": "é\n"}]}, "yes", "1", "- x"],
        ["\U0001f4c8 \u4e2d", {"a": "\x7f\x85\u2028\\"}],
    ],
)
def test_yaml_reads_back(value: object):
    assert yaml.safe_load(yaml_of(value)) == value


def batch(*words: str) -> dict[str, dict[str, Any]]:
    """The requests in the printed script, by name."""
    blocks = re.findall(
        r"^(\w+)_input\(\) \{\ncat <<'END_OF_JSON'\n(.*?)\nEND_OF_JSON\n\}",
        printed(*BATCH, *words),
        re.MULTILINE | re.DOTALL,
    )
    return {name: json.loads(text) for name, text in blocks}


def faults_of(operation: str, request: dict[str, Any]) -> str:
    model = botocore.session.get_session().get_service_model("batch")
    shape = model.operation_model(operation).input_shape
    report = botocore.validate.ParamValidator().validate(request, shape)
    text: str = report.generate_report()
    return text


def test_batch_requests_are_ones_that_aws_takes(bucket: str):
    role = "arn:aws:iam::123456789012:role/builder"
    requests = batch(bucket, "--tasks", "3", "--job-role", role, "--env", "A=it's")
    assert list(requests) == ["definition", "work", "finish"]
    assert faults_of("RegisterJobDefinition", requests["definition"]) == ""
    assert faults_of("SubmitJob", requests["work"]) == ""
    assert faults_of("SubmitJob", requests["finish"]) == ""
    assert faults_of("SubmitJob", {**requests["work"], "arrayProperties": {"length": 3}}) != ""
    assert requests["work"]["arrayProperties"] == {"size": 3}
    container = requests["definition"]["containerProperties"]
    assert container["command"][3:] == ["work", bucket, "--jobs", "4", "--task", "auto"]
    assert container["environment"] == [{"name": "A", "value": "it's"}]
    assert requests["definition"]["retryStrategy"]["attempts"] == 5
    finish = ["python", "-m", "builder", "finish", bucket]
    assert requests["finish"]["containerOverrides"] == {"command": finish}


def test_batch_script_hands_the_requests_over(bucket: str):
    """`aws` is a function here that says what it was given, and answers with an id."""
    stand_in = 'aws() { printf \'%s\\0\' "$@" >&2; echo "id-$2"; }\n'
    script = stand_in + printed(*BATCH, bucket, "--tasks", "3", "--env", "A=it's $HOME")
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)
    words = done.stderr.split("\0")
    given = [json.loads(words[i + 1]) for i, word in enumerate(words) if word.endswith("-json")]
    assert given == list(batch(bucket, "--tasks", "3", "--env", "A=it's $HOME").values())
    assert words.count("id-register-job-definition") == 2
    assert words.count("jobId=id-submit-job") == 1
    assert done.stdout.startswith("submitted: work id-submit-job, finish id-submit-job\n")


def test_batch_of_one_task_is_no_array(bucket: str):
    requests = batch(bucket, "--tasks", "1")
    assert "arrayProperties" not in requests["work"]
    assert requests["definition"]["containerProperties"]["command"][-1] == "0/1"


def test_batch_folder_is_refused(dataset: Path):
    assert "no container sees this folder; give an s3:// URL" in refused(*BATCH, str(dataset))


@pytest.mark.parametrize("words", [KUBERNETES, BATCH])
def test_secret_in_a_manifest_is_refused(words: list[str], bucket: str):
    said = refused(*words, bucket, "--env", "AWS_SECRET_ACCESS_KEY=verysecret")
    assert "looks like a secret" in said
    assert "verysecret" not in said


SLURM = ["launch", "slurm", "--max-array-size", "3", "--python", "/opt/my python/bin/python"]


def arrays(script: str) -> list[str]:
    return re.findall(r"^submit_work (.*)$", script, re.MULTILINE)


def test_slurm_array_is_cut_at_the_largest_size(dataset: Path):
    script = printed(*SLURM, str(dataset), "--tasks", "4")
    assert arrays(script) == ["0 0-2", "3 0-0"]


def test_slurm_arrays_share_what_may_run_at_once(dataset: Path):
    words = [*SLURM, str(dataset), "--tasks", "4", "--at-once"]
    assert arrays(printed(*words, "3")) == ["0 0-2%2", "3 0-0%1"]
    said = refused(*words, "1")
    assert said.startswith("Error: --at-once 1: 2 arrays of at most 3 tasks run side by side; ")


def test_slurm_tasks_are_one_a_shard_at_most(dataset: Path):
    assert arrays(printed(*SLURM, str(dataset), "--tasks", "400")) == ["0 0-2", "3 0-0"]


def test_slurm_tasks_of_a_short_build_are_one(dataset: Path):
    assert arrays(printed(*SLURM, str(dataset))) == ["0 0-0"]


def task_command(script: str, environment: dict[str, str]) -> list[str]:
    """What the job's shell would run, word by word."""
    (command,) = re.findall(r"^exec (.* work .*)$", script, re.MULTILINE)
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return shown.stdout.splitlines()


def test_slurm_script_quotes_paths_and_adds_the_offset(dataset: Path, tmp_path: Path):
    out = tmp_path / "it's $HOME; `x`"
    out.mkdir()
    (out / "plan.json").write_bytes((dataset / "plan.json").read_bytes())
    words = ["--tasks", "4", "--setup", "module load python", "--mem", "8G"]
    script = printed(*SLURM, str(out), *words)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    array = {"SEMIFORMULA_FIRST_TASK": "3", "SLURM_ARRAY_TASK_ID": "0", "SLURM_CPUS_PER_TASK": "2"}
    program = ["/opt/my python/bin/python", "-m", "builder"]
    expected = [*program, "work", str(out), "--task", "3/4", "--jobs", "2"]
    assert task_command(script, array) == expected
    assert script.count("\nmodule load python\n") == 2
    assert script.count("#SBATCH --mem=8G\n") == 2
    assert "#SBATCH --requeue\n" in script


@pytest.mark.parametrize(
    "words", [["--time", "1:00\n#SBATCH -w x"], ["--mem", "8G; reboot"], ["--setup", "a\nb"]]
)
def test_slurm_option_of_more_than_a_word_is_refused(words: list[str], dataset: Path):
    assert "expected one " in refused(*SLURM, str(dataset), *words)


def test_slurm_script_is_written(dataset: Path, tmp_path: Path):
    path = tmp_path / "submit.sh"
    words = [str(dataset), "--tasks", "2"]
    said = printed(*SLURM, *words, "--out-script", str(path))
    assert said == f"2 tasks: bash {path}\n"
    assert path.read_text() == printed(*SLURM, *words)


@pytest.mark.parametrize("words", [SLURM, KUBERNETES, BATCH])
def test_launch_without_a_plan_says_to_plan(words: list[str], bucket: str):
    assert "plan first with `builder plan" in refused(*words, bucket.replace("data", "other"))


def test_launch_changes_nothing(dataset: Path):
    before = hashes(dataset)
    printed(*SLURM, str(dataset))
    assert hashes(dataset) == before


def farm_commands() -> list[list[str]]:
    """The builder's command lines in FARM.md, as words."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", FARM.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"builder ([^|#>]*)", line)
            if match:
                found.append(shlex.split(match[1]))
    return found


@pytest.mark.parametrize("words", farm_commands(), ids=" ".join)
def test_command_of_the_farm_page_parses(words: list[str]):
    command: Any = main
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    command.make_context(name, words)


def test_farm_page_shows_every_way_to_launch():
    ways = {words[1] for words in farm_commands() if words[0] == "launch"}
    assert ways == {"slurm", "kubernetes", "aws-batch"}
