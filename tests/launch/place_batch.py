"""As one process of several: lays a batch of numbered samples on a mesh and prints what came of it as JSON.

``python place_batch.py DATA,FSDP,TENSOR,EXPERT BATCH_SIZE --coordinator=... --num_processes=... --process_id=...``
"""

import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from skysense_jax import feed, sharding

address, num_processes, process_id = (flag.partition("=")[2] for flag in sys.argv[3:])
jax.distributed.initialize(address, int(num_processes), int(process_id), cluster_detection_method="deactivate")
mesh = sharding.make_mesh(*map(int, sys.argv[1].split(",")))
batch_size = int(sys.argv[2])
places = sharding.batch_places(mesh, batch_size)
feed.Batch.from_dict = lambda element: element  # one array is enough
(batch,) = feed.to_device([np.asarray(places)[:, None]], mesh)
whole = multihost_utils.process_allgather(jax.device_put(batch, NamedSharding(mesh, PartitionSpec())), tiled=True)
held = {
    str(device.id): np.asarray(shard.data)[:, 0].tolist()
    for shard in batch.addressable_shards
    for device in [shard.device]
}
print("RESULT " + json.dumps([list(places), whole[:, 0].tolist(), held]), flush=True)
jax.distributed.shutdown()
