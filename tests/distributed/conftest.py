import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool()
