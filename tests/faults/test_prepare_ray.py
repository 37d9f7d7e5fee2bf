"""The same run on a Ray cluster of this machine, with a node killed in the middle; needs Ray."""

import os
import subprocess
from collections import Counter

import pytest

from tests.faults.hostile_server import HostileServer
from tests.faults.prepared import QUICK, QUICK_OPTIONS, bytes_of, command, run
from tests.faults.test_prepare_kill import deliveries, documents, wait_until
from tests.samples import write_jsonl

RECORDS = ("--records_per_shard", "15")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # stay on loopback, as on those systems
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # The head does no work, so it may stay while nodes die.
    head = {"num_cpus": 0, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


def test_a_cluster_that_loses_a_node_makes_the_same_shards(cluster, tmp_path):
    nodes = [cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1") for _ in range(2)]
    with HostileServer() as server:
        source = write_jsonl(tmp_path / "a.jsonl", documents(server, 300))
        driver = subprocess.Popen(
            command(source, tmp_path / "ray", *RECORDS, *QUICK_OPTIONS, "--ray_address", cluster.address),
            env=os.environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: deliveries(server).total() >= 60, lambda: driver.poll() is None)
        cluster.remove_node(nodes[0], allow_graceful=False)
        _, said = driver.communicate()
        assert driver.returncode == 0, said
        counts = deliveries(server)

        run(source, tmp_path / "here", records_per_shard=15)
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "here")
    # Only what was on the wire of the lost node's task may have come a second time.
    assert sum(count - 1 for count in counts.values()) <= QUICK["max_per_host"]
    assert set(Counter(counts.values())) <= {1, 2}
