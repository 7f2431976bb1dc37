"""As one process of several: probes a network of random weights on labelled records and prints its scores as JSON.

``python probe_labelled.py RECORDS [--coordinator=... --num_processes=... --process_id=...] [OTHER RECORDS]``
"""

import json
import pathlib
import sys

import jax

sys.path.append(str(pathlib.Path(__file__).parents[1]))

from nano import get_config

from skysense_jax import assembly, outputs, sharding, train_state

place = [flag.partition("=")[2] for flag in sys.argv if flag.startswith("--")]
if place:
    address, num_processes, process_id = place
    jax.distributed.initialize(address, int(num_processes), int(process_id), cluster_detection_method="deactivate")
folder = [word for word in sys.argv[1:] if not word.startswith("--")][-1]
config = get_config()
config.mesh.fsdp = 2
config.eval.update(datasets=(("land", folder, "segmentation"),), num_test_scenes=0, batch_size=8)
run, mesh = assembly.assemble(config), sharding.make_mesh(**config.mesh)
try:
    labelled = outputs.read_labelled(config, run)
except ValueError as error:
    sys.exit(f"error: {error}")
with jax.set_mesh(mesh):
    shapes = assembly.batch_shapes(config, run.modalities)
    state = train_state.create_state(run.network, run.optimizer, shapes, seed=0, mesh=mesh)
    shown = outputs.Outputs(config, run, assembly.make_pipeline(config), pathlib.Path(), labelled)
    scores = shown.probe(1, state.teacher)
print("RESULT " + json.dumps(scores), flush=True)
