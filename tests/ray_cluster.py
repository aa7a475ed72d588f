"""A Ray cluster of two nodes on 127.0.0.1, one core each, until standard input is closed."""

import json
import sys

from ray.cluster_utils import Cluster

cluster = Cluster()
options = {
    "num_cpus": 1,
    "object_store_memory": 80 * 2**20,
    "include_dashboard": False,
}
cluster.add_node(**options)
second = cluster.add_node(**options)
raylet = second.all_processes["raylet"][0].process.pid
print(json.dumps({"address": cluster.address, "second": raylet}), flush=True)
sys.stdin.read()
cluster.shutdown()
