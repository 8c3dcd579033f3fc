"""The tiny models, written once."""

import pytest
from fixtures_runs import write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models") / "all")
