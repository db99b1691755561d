"""The scripts of launch/: clean for shellcheck, and bad input is one line before anything is started."""

import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(
    path for path in (ROOT / "launch").rglob("*") if path.is_file() and path.read_bytes().startswith(b"#!")
)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck (a Debian package) is not installed")
@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_there_are_scripts_and_their_help_says_how_to_call_them():
    assert {script.name for script in SCRIPTS} == {"local.sh", "run.sh", "train.sbatch", "worker.sh"}
    orders = {"run.sh": ("run", "logs", "delete"), "worker.sh": ("state", "stop"), "local.sh": ("--processes=2",)}
    for script in SCRIPTS:
        done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
        assert f"{script.name} " in done.stdout and "Exit code" in done.stdout
        assert "set -" not in done.stdout and "SBATCH" not in done.stdout and not done.stdout.startswith("#")
        for order in orders.get(script.name, ()):
            assert subprocess.check_output([script, order, "--help"], text=True) == done.stdout


def test_a_job_script_that_was_not_submitted_says_how():
    script = ROOT / "launch" / "slurm" / "train.sbatch"
    done = subprocess.run([script, "vitcls", "train"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: submit a command: sbatch ")


def local(*arguments, **environment):
    return subprocess.run(
        [ROOT / "launch" / "local.sh", *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"} | environment,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "gpus", "words"),
    [
        (["--processes=0", "--", "true"], "", "--processes=0 is not a whole number of at least 1"),
        (["--devices=few", "--", "true"], "", "--devices=few"),
        (["--restarts=-1", "--", "true"], "", "--restarts=-1"),
        (["--procs=2", "--", "true"], "", "'--procs=2' is no flag"),
        (["--processes", "2", "--", "true"], "", "--processes takes its value after '='; write --processes=N"),
        ([], "", "there is no command"),
        (["--", "vitcsl", "train"], "", "the command 'vitcsl' is not installed"),
        (["--processes=2", "--", "true"], "0,1,2", "3 GPUs cannot be split among 2 processes"),
        (["--processes=4", "--", "true"], "0,1", "2 GPUs cannot be split among 4 processes"),
    ],
)
def test_bad_input_of_local_is_one_line_and_code_2(arguments, gpus, words):
    done = local(*arguments, CUDA_VISIBLE_DEVICES=gpus)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line


def test_gpus_are_split_evenly():
    say = "echo $CUDA_VISIBLE_DEVICES of $JAX_PROCESS_ID/$JAX_NUM_PROCESSES"
    done = local("--processes=2", "--", "bash", "-c", say, CUDA_VISIBLE_DEVICES="0,1,4,5")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["0: 0,1 of 0/2", "1: 4,5 of 1/2"]


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_are_hidden_are_none(hidden, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    say = "echo $JAX_NUM_CPU_DEVICES"
    done = local("--devices=3", "--", "bash", "-c", say, CUDA_VISIBLE_DEVICES=hidden, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert sorted(done.stdout.splitlines()) == ["0: 3", "1: 3"], done.stderr


@pytest.mark.parametrize(
    ("code", "restarts", "expected", "starts"),
    [
        ("exit 0", 2, 0, 1),
        ("exit $JAX_PROCESS_ID", 2, 1, 1),  # a failure of the run itself would come again
        ("exit 2", 2, 2, 1),
        ("[ $JAX_PROCESS_ID = 1 ] && exit 2; exec sleep 60", 2, 2, 1),  # the other is not waited for
        ("[ $JAX_PROCESS_ID = 1 ] && exit 2; kill -9 $$", 2, 2, 1),
        ("[ $JAX_PROCESS_ID = 1 ] && kill -9 $$; exit 1", 1, 137, 2),
        ("mkdir $0 2>/dev/null && exit 143; exit 0", 2, 0, 2),  # each process has a first and a second life
    ],
)
def test_what_is_started_again_and_how_it_ends(code, restarts, expected, starts, tmp_path):
    script = ["bash", "-c", code, f"{tmp_path}/life"]
    if "mkdir" in code:
        script[2] = code.replace("$0", '"$0$JAX_PROCESS_ID"')
    done = local(f"--restarts={restarts}", "--", *script, JAX_PLATFORMS="cpu")
    assert done.returncode == expected, done.stderr
    assert done.stderr.count("local.sh: process ids") == starts


@pytest.fixture
def ready():
    """A launcher whose two processes wait for SIGTERM, and then end with 143."""
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print('ready', flush=True)\n"
    command = [ROOT / "launch" / "local.sh", "--", sys.executable, "-c", code + "while True: time.sleep(0.1)"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert {run.stdout.readline(), run.stdout.readline()} == {"0: ready\n", "1: ready\n"}
    return run


def test_a_signal_is_passed_on_and_nothing_is_started_again(ready):
    ready.terminate()
    _, err = ready.communicate(timeout=30)
    assert ready.returncode == 143 and err.count("process ids") == 1 and "again" not in err


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_in_a_terminal_reaches_each_process_once_and_what_it_says_comes_through(processes):
    """The terminal sends it to all processes of its foreground group, and the second one stops a training unsaved."""
    code = (
        "import signal, sys, time; got = []; signal.signal(2, lambda *_: got.append(1)); print('ready', flush=True)\n"
    )
    code += "while not got: time.sleep(0.1)\ntime.sleep(1); print('saved after', len(got), flush=True); sys.exit(130)"
    terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    launch = [ROOT / "launch" / "local.sh", f"--processes={processes}", "--", sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", terminal, *launch], **pipes) as run:
        said = [run.stdout.readline() for _ in range(1 + processes)]  # the process ids come first
        assert sum("ready" in line for line in said) == processes, said
        out, _ = run.communicate("\x03", timeout=30)
    assert run.returncode == 130
    said = sorted(line.removeprefix("^C") for line in out.splitlines())
    assert said == [f"{i}: saved after 1" for i in range(processes)]


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv (of util-linux) is not installed")
def test_a_launcher_that_is_killed_leaves_nothing_running(ready):
    ready.kill()
    ready.communicate(timeout=30)  # the pipes end with the last process that holds them, or this raises
    assert ready.returncode == -signal.SIGKILL
