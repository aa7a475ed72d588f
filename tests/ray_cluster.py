"""A Ray cluster of two nodes on 127.0.0.1 until standard input is closed.

One core each; with the argument "bare" the first has none, and the second is not there.
"""

import json
import sys

from ray.cluster_utils import Cluster

cluster = Cluster()
options = {
    "num_cpus": 1,
    "object_store_memory": 80 * 2**20,
    "include_dashboard": False,
}
if sys.argv[1:] == ["bare"]:
    last = cluster.add_node(**{**options, "num_cpus": 0})
else:
    cluster.add_node(**options)
    last = cluster.add_node(**options)
raylet = last.all_processes["raylet"][0].process.pid
print(json.dumps({"address": cluster.address, "second": raylet}), flush=True)
sys.stdin.read()
cluster.shutdown()
