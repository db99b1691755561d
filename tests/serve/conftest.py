import pytest

pytest.importorskip("fastapi", reason="pip install 'vitcls[serve]'")

from tests.serve.running import expected, server


@pytest.fixture(scope="session")
def served(trained, tmp_path_factory):
    """A server of the tiny run, for tests that leave it as it is."""
    database = tmp_path_factory.mktemp("served") / "feedback.db"
    with server(f"--workdir={trained}", f"--database=sqlite:///{database}") as running:
        running.database = f"sqlite:///{database}"
        yield running


@pytest.fixture(scope="session")
def answers(trained, tmp_path_factory):
    """What `vitcls predict --json` says of forty pictures."""
    return expected(trained, tmp_path_factory.mktemp("pictures"), 40)
