import shutil

import pytest

from vitcls import calibrate, cli


@pytest.fixture(scope="module")
def calibrated(trained, tmp_path_factory):
    path = shutil.copytree(trained, tmp_path_factory.mktemp("calibrated") / "run")
    assert cli.run(calibrate.main, [f"--workdir={path}", "--method=vector"]) == 0
    return path
