"""As one process of two: saves steps 1 and 2; the arrays that process 1 wrote of step 2 are damaged, as if before their
files were hashed, and it alone reads them. Prints the step that is restored.

``python restore_damaged.py DIR --coordinator=... --num_processes=... --process_id=...``
"""

import pathlib
import sys

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from skysense_jax import checkpoint, manifest, sharding

SHAPE = (8, 2**14)

workdir = pathlib.Path(sys.argv[1])
address, num_processes, process_id = (flag.partition("=")[2] for flag in sys.argv[2:])
jax.distributed.initialize(address, int(num_processes), int(process_id), cluster_detection_method="deactivate")
mesh = sharding.make_mesh(1, 4, 1, 1)
placed = NamedSharding(mesh, PartitionSpec("fsdp"))


def opened():
    return checkpoint.Checkpoints(workdir, every_steps=1, keep_last=2, keep_every_steps=1000)


checkpoints = opened()
for step in (1, 2):
    values = np.random.default_rng(0).random(SHAPE, np.float32) + step  # what is small lies in the index
    state = {"weight": jax.make_array_from_callback(SHAPE, placed, lambda index, values=values: values[index])}
    checkpoints.save(step, state, data_state={"next_index": step}, meta={})
checkpoints.close()
multihost_utils.sync_global_devices("saved")  # the manifest too, by process 0

if jax.process_index() == 1:
    newest = workdir / "checkpoints" / "2"
    for path in (newest / "state" / "ocdbt.process_1" / "d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    manifest.write(epath.Path(newest))
multihost_utils.sync_global_devices("damaged")
checkpoints = opened()
restored = checkpoints.restore_latest({"weight": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=placed)})
print(f"RESTORED {restored.step} {restored.state['weight'].addressable_data(0).min():.0f}", flush=True)
checkpoints.close()
jax.distributed.shutdown()
