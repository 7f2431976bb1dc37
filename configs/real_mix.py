"""real_mix: `tiny` on a mix of small real samples. Source: our choice.

Command: pip install --editable ".[ingest]"
         python -m skysense_jax.ingest.samples --source=SAMPLES --out=runs/real_mix
         python -m skysense_jax.train --config=configs/real_mix.py --workdir=RUN
Records elsewhere: --config=configs/real_mix.py:DIRECTORY
Chips: 2 CPU cores; what was run: benchmarks/results.md.
Places are 3 to 64 cells wide; larger views are padded.
"""

from ml_collections import ConfigDict

from configs import tiny

# Rows that the table lacks: imagery whose pixels do not fit `hr` within 2x, or that has other bands.
NAIP = dict(
    name="naip",
    bands=("R", "G", "B", "NIR"),
    dtype="uint8",
    unit="8-bit digital number",
    value_range=(0, 255),
    typical_range=(0.1, 254),  # near infrared of open water is close to 0
    wrong_unit_hint="values 0-1 (multiply by 255)",
    pixels_per_cell=8,  # 1.25 m; the imagery has 1 m
    patch=4,
    mean=(146.448, 161.287, 153.498, 133.202),
    std=(61.765, 52.193, 50.854, 97.087),
    statistics_source="ingest.samples on 3 chips of 250 m (beach, farmland, open water): a few samples, not a corpus",
)
PAN = dict(
    name="pan",
    bands=("PAN",),
    dtype="uint16",
    unit="16-bit digital number of the panchromatic band",
    value_range=(1, 65535),
    typical_range=(20, 20000),
    wrong_unit_hint="8-bit numbers or reflectance 0-1",
    pixels_per_cell=16,  # 0.625 m; the imagery has 0.5 m
    patch=4,
    mean=(455.72,),
    std=(257.932,),
    statistics_source="ingest.samples on 1 image of 440 m (suburb and forest): one sample, not a corpus",
)

# kind of ingest.samples: share of the mix. By kind, or the crops of three tiles would be most of it.
SHARES = dict(triple=2.0, sentinel_series=2.0, sentinel_single=2.0, hr=1.0, naip=1.0, pan_osm=1.0)


def get_config(directory: str = "runs/real_mix") -> ConfigDict:
    config = tiny.get_config()
    config.name = "real_mix"
    config.data.update(
        modalities=("hr", "s2", "s1", "naip", "pan"),
        new_modalities=(NAIP, PAN),
        sources=tuple((f"{directory}/{kind}-*.array_record", share) for kind, share in SHARES.items()),
        num_dates=dict(hr=1, s2=2, s1=1, naip=1, pan=1),
    )
    return config
