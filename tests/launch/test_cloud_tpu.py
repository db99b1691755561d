"""launch/cloud_tpu/run.sh: what it would ask of gcloud, and what it refuses before it asks anything."""

import http.server
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import threading

import pytest

from tests import bucket

LAUNCHER = pathlib.Path(__file__).parents[2] / "launch" / "cloud_tpu" / "run.sh"
HERE = ["--name=c100", "--project=project-1", "--zone=us-east5-b"]
TRAIN = ["--", "vitcls", "train", "--config=configs/vit_cifar100.py", "--workdir=gs://bucket/c100"]
# The flags that `gcloud COMMAND --help` documents in version 528.0.0, as the reference on cloud.google.com does.
WIDE = {"--project", "--quiet", "--format", "--account", "--configuration", "--verbosity"}
CREATE = """
--accelerator-type --async --data-disk --description --guaranteed --internal-ips --labels --metadata
--metadata-from-file --network --node-count --node-id --node-prefix --range --reservation-host-folder
--reservation-host-organization --reservation-host-project --reserved --runtime-version --scopes --service-account
--shielded-secure-boot --spot --subnetwork --tags --topology --type --valid-after-duration --valid-after-time
--valid-until-duration --valid-until-time --zone
"""
SSH = """
--command --dry-run --force-key-file-overwrite --internal-ip --output-directory --plain --ssh-flag
--ssh-key-expiration --ssh-key-expire-after --ssh-key-file --strict-host-key-checking --worker --zone
"""
SCP = """
--compress --dry-run --force-key-file-overwrite --internal-ip --plain --recurse --scp-flag --ssh-key-expiration
--ssh-key-expire-after --ssh-key-file --strict-host-key-checking --worker --zone
"""
DOCUMENTED = {
    "queued-resources create": CREATE,
    "queued-resources describe": "--zone",
    "queued-resources delete": "--zone --async --force",
    "tpu-vm ssh": SSH,
    "tpu-vm scp": SCP,
    "storage ls": "--buckets",
}


def launch(*arguments):
    return subprocess.run([LAUNCHER, *arguments], capture_output=True, text=True)


def commands(*arguments, train=TRAIN):
    """The gcloud commands of a dry run: (command, flags by name, the rest)."""
    done = launch(*arguments, "--dry_run", *(train if arguments[0] == "run" else []))
    assert (done.returncode, done.stderr) == (0, "")
    found = []
    for line in done.stdout.splitlines():
        group, verb, *rest = shlex.split(line.removeprefix("gcloud ").removeprefix("compute tpus "))
        flags = dict(word.partition("=")[::2] for word in rest if word.startswith("--"))
        found.append((f"{group} {verb}", flags, [word for word in rest if not word.startswith("--")]))
    return found


@pytest.mark.parametrize("action", ["run", "logs", "delete"])
def test_only_documented_flags_are_used(action):
    for command, flags, _ in commands(action, *HERE, *(["--slice=v6e-8", "--spot"] if action == "run" else [])):
        assert flags.keys() <= WIDE | set(DOCUMENTED[command].split()), command
        zone = None if command == "storage ls" else "us-east5-b"
        assert (flags["--project"], flags.get("--zone")) == ("project-1", zone)


@pytest.mark.parametrize(
    ("slice_", "accelerator", "runtime"),
    [("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"), ("v6e-256", "v6e-256", "v2-alpha-tpuv6e")],
)
def test_a_run_is_asked_for_installed_trained_followed_and_deleted(slice_, accelerator, runtime):
    found = commands("run", *HERE, f"--slice={slice_}", "--spot")
    assert [command for command, _, _ in found] == [
        "queued-resources describe",
        "storage ls",
        "queued-resources create",
        "queued-resources describe",
        "tpu-vm ssh",
        "tpu-vm scp",
        *["tpu-vm ssh"] * 5,
        "queued-resources delete",
    ]
    create = found[2][1]
    assert (create["--accelerator-type"], create["--runtime-version"]) == (accelerator, runtime)
    assert create["--node-id"] == "c100" and "--spot" in create
    on_workers = [flags["--worker"] for command, flags, _ in found if command.startswith("tpu-vm")]
    assert on_workers == [*["all"] * 6, "0"]
    *archive_and_orders, home = found[5][2]
    assert [pathlib.Path(file).name for file in archive_and_orders] == [
        "vitcls.tar.gz",
        "worker.sh",
    ] and home == "c100:"
    assert "--force" in found[-1][1]
    assert "--spot" not in commands("run", *HERE, f"--slice={slice_}")[2][1]


def test_every_bucket_of_the_command_is_looked_for():
    data = ["--workdir", "gs://one/c100", "--config.dataset.data_dir=gs://two/sets", "--data_dir=gs://two/new"]
    found = commands("run", *HERE, "--slice=v6e-8", train=[*TRAIN[:-1], *data])
    assert [rest for command, _, rest in found if command == "storage ls"] == [["gs://one"], ["gs://two"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the first word is run, logs or delete"),
        (["start"], "not 'start'"),
        (["run", *HERE[1:], "--slice=v6e-8", *TRAIN], "--name is missing"),
        (["run", HERE[0], HERE[2], "--slice=v6e-8", *TRAIN], "--project is missing"),
        (["run", *HERE[:2], "--slice=v6e-8", *TRAIN], "--zone is missing"),
        (["delete", *HERE[:2]], "--zone is missing"),
        (["delete", *HERE[::2], "--project=my proj"], "--project=my proj is not the id of a project"),
        (["logs", *HERE[::2], "--project=My-Project"], "--project=My-Project is not the id of a project"),
        (["run", *HERE, "--slice", "v6e-8", *TRAIN], "--slice takes its value after '='; write --slice=VALUE"),
        (["run", *HERE[:2], "--zone=europe", "--slice=v6e-8", *TRAIN], "--zone=europe is not a zone"),
        (["run", "--name=A_B", *HERE[1:], "--slice=v6e-8", *TRAIN], "--name=A_B is impossible"),
        (["run", *HERE, *TRAIN], "--slice= is not offered; use one of v5e-1 "),
        (["run", *HERE, "--slice=v6e-12", *TRAIN], "--slice=v6e-12 is not offered"),
        (["run", *HERE, "--slice=v6e-8", "--restarts=many", *TRAIN], "--restarts=many"),
        (["run", *HERE, "--slice=v6e-8", "--spto", *TRAIN], "'--spto' is no flag"),
        (["run", *HERE, "--slice=v6e-8"], "after -- comes the command"),
        (
            ["run", *HERE, "--slice=v6e-8", *TRAIN[:-1], "--workdir", "runs/x"],
            "--workdir=runs/x is not gs://BUCKET/PATH",
        ),
        (["run", *HERE, "--slice=v6e-8", *TRAIN[:-1]], "has no --workdir=gs://BUCKET/PATH"),
        (["run", *HERE, "--slice=v6e-8", *TRAIN[:-1], "--workdir=runs/x"], "--workdir=runs/x is not gs://BUCKET/PATH"),
        (["run", *HERE, "--slice=v6e-8", *TRAIN[:-1], "--workdir=s3://b/x"], "--workdir=s3://b/x is not gs://"),
        (["run", *HERE, "--slice=v6e-8", *TRAIN[:-1], "--workdir=gs://bucket"], "is not gs://BUCKET/PATH"),
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2(arguments, words):
    done = launch(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line


class Refusing(http.server.BaseHTTPRequestHandler):
    """The API of Cloud TPU for somebody who has no slice and no permission, in the form of its published errors."""

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path, json.loads(body or "{}")))
        post = self.command == "POST"
        code, status, words = (403, "PERMISSION_DENIED", "not you") if post else (404, "NOT_FOUND", "c100 is not there")
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"error": {"code": code, "message": words, "status": status}}).encode())

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud_itself_answers_in_the_words_that_are_looked_for(tmp_path, monkeypatch):
    """It finds no slice and no bucket; with a bucket, a slice is asked for and refused, which ends the launcher."""
    (tmp_path / "token").write_text("token")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("CLOUDSDK_AUTH_ACCESS_TOKEN_FILE", str(tmp_path / "token"))
    buckets, url = bucket.start_server()
    monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE", f"{url}/storage/v1/")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU", f"http://127.0.0.1:{server.server_port}/")
        no_bucket = launch("run", *HERE, "--slice=v5e-16", *TRAIN)
        ((get, where, _),) = server.asked
        done = launch("run", *HERE, "--slice=v5e-16", "--spot", *TRAIN[:-1], "--workdir=gs://runs/c100")
        server.shutdown()
    buckets.communicate()
    assert no_bucket.returncode == 2 and no_bucket.stderr.startswith("error: there is no bucket gs://bucket; make it, ")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "not you" in line
    place = "/v2/projects/project-1/locations/us-east5-b/queuedResources"
    assert (get, where.partition("?")[0]) == ("GET", f"{place}/c100")
    ((post, where, body),) = (asked for asked in server.asked if asked[0] == "POST")
    assert (post, where.partition("?")[0]) == ("POST", place) and "queuedResourceId=c100" in where
    (spec,) = body["tpu"]["nodeSpec"]
    assert (spec["nodeId"], spec["node"]["acceleratorType"], body["spot"]) == ("c100", "v5litepod-16", {})


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud_itself_knows_these_flags():
    """Its help has every flag of the lists above; it needs no account."""
    for command, flags in DOCUMENTED.items():
        group = [] if command.startswith("storage") else ["compute", "tpus"]
        text = subprocess.check_output(["gcloud", *group, *command.split(), "--help"], text=True)
        plain = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", text)
        assert [flag for flag in flags.split() if flag not in plain] == []
