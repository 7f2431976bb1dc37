"""Every field of a run, with its meaning, unit and source. The named sizes override what differs.

Sections are promises about results: ``run``, ``mesh``, ``efficiency`` and ``parts`` move the loss by rounding only;
``data``, ``model``, ``objective`` and ``optim`` may. A section is splatted into keyword arguments, so a key here is
the name of an argument there. [P] published, [D] decided here where the papers are silent.

base: Swin V2-B widths. Source: our choice.
Command: python -m skysense_jax.train --config=configs/base.py --workdir=RUN
Chips: meant for one H200 or more; not run, step time not known.
"""

from ml_collections import ConfigDict

from configs._hardware import on


def get_config(target: str = "") -> ConfigDict:
    """All sections, in the order of the functions below, on a target (_hardware.py) or none."""
    config = ConfigDict()
    config.name = "base"
    config.run = _run()
    config.mesh = dict(data=-1, fsdp=1, tensor=1, expert=1)  # devices per axis; -1: what is left
    config.efficiency = _efficiency()
    config.parts = _parts()
    config.data = _data()
    config.model = _model()
    config.objective = _objective()
    config.optim = _optim()
    config.eval = _eval()
    return on(config, target)


def _run() -> dict:
    return dict(
        log_every_steps=20,  # metrics are written this often
        checkpoint_every_steps=1000,  # saved this often, and at the end
        keep_last=3,  # newest checkpoints kept
        keep_every_steps=20_000,  # and every multiple of this for ever
        keep_every_hours=0.0,  # and for ever the first, and each that is so long after the one before; 0: none
        keep_best=False,  # and the one with the best probe (eval.probe_every_steps)
        pictures_every_steps=5000,  # 0: only at the end
        norms_every_steps=0,  # norms.jsonl: each term's gradient by layer; costs a step a term and one; 0: never
        max_nonfinite_in_row=20,  # skipped updates in a row that stop the run
        max_bad_record_share=0.01,  # unreadable records, as a share of those read, that stop the run (from 100 on)
        watch=dict(  # what is looked for in the numbers of every step [D]
            spike_deviations=8.0,  # of the loss above its median that are a jump (watch.LossSpikes); 0: none is
            spike_window=200,  # losses before that say what is usual
            spike_in_row=5,  # steps in a row that make a jump
            spike_rewinds=3,  # times since its start that a run goes back, past the data since; then it stops
            collapse_in_row=200,  # steps beyond a limit of watch.Collapses, after the warm-up; 0: not looked for
            collapse_stops=False,  # else it is told only
        ),
        input_threads=8,  # reading threads of each worker process (or of the main process without workers)
        input_workers=8,  # processes that decode and crop; 0: in the main process
        prefetch_batches=2,  # batches placed on the device ahead of the step
        tensorboard=True,  # event files under WORKDIR/tensorboard (tensorboardX)
        wandb_project="",  # non-empty: also log to Weights & Biases (extra "wandb")
    )


def _efficiency() -> dict:
    return dict(
        remat="blocks",  # recomputed in the backward pass: "none", "matmuls" (norms and GELUs), "blocks" (all)
        scan_unroll=1,  # blocks per iteration of the scan over global blocks
        # "xla": no kernel; "mosaic": ours for TPUs (not run on one); "cudnn": outside windows, bf16, NVIDIA GPUs;
        # "cudnn+triton": and ours in them (both ran as kernels, not in a step); "auto": "mosaic" or "cudnn" by what the
        # step is for.
        attention="auto",
    )


def _parts() -> dict:
    """Parts of a batch that go one after the other, for less memory; each must hold a sample for every device."""
    return dict(
        microbatches=1,  # through the networks: gradient accumulation; Sinkhorn and counts stay the whole batch's
        logits=1,  # of a microbatch (of the batch in the Sinkhorn), whose prototype logits stand in memory at a time
    )


def _data() -> dict:
    return dict(
        modalities=("hr", "s2", "s1"),  # rows of skysense_jax/modalities.py
        # Names of the label map's classes in the order of their ids, of records made with classes of their own, as
        # objective.text_table has them; (): those of skysense_jax/modalities.py.
        label_classes=(),
        new_modalities=(),  # further rows, each a dict of modalities.Modality's arguments; each needs a num_dates
        sources=(("scenes", 1.0),),  # (glob of .array_record files, also gs://, or "scenes"; share of the mix)
        batch_size=1024,  # samples a step, over all devices [P]
        seed=0,  # order of samples, crops, dates
        num_dates=dict(hr=1, s2=8, s1=4),  # drawn per sample [D]; the predecessor draws 1, 20, 10 [P]
        photometric_strength=1.0,  # of the changes in photometric.py; 0: none [D]
        day_jitter=5,  # days of the year by which a date may be moved, either way [D]
        views=dict(  # all in cells of 10 m [D]
            anchor_cells=24,  # all views of a sample lie in a square of this side
            tile_cells=8,  # grid on which the anchor's corner lies (256-px tiles of hr)
            num_global=2,  # views that the teacher sees [P]
            global_box_cells=(16, 24),  # smallest and largest side of the crop
            global_cells=16,  # side after the resize: 512 px of hr
            num_local=4,  # further views of the student
            local_box_cells=(6, 15),  # as for the global ones
            local_cells=8,
        ),
        # The procedural source: how many scenes, the first one's number, which world of scenes, side in cells.
        # The probe and the pictures take seed and extent from here whatever the sources are.
        scenes=dict(num_scenes=4096, first_index=0, seed=0, extent_cells=24),
    )


def _model() -> dict:
    return dict(
        compute_dtype="bfloat16",  # of matmuls and activations; parameters and reductions stay fp32
        backbone=dict(
            shared=True,  # by all modalities [P]; False: a backbone for each, to compare; export does not know it
            width=128,  # C of stage 1; doubles at each stage
            depths=(2, 2, 18, 2),  # blocks per stage [D: Swin-H]
            head_width=32,  # [P]
            window=8,  # tokens along a side [P]
            mlp_ratio=4,  # hidden width of an MLP, in widths [P]
            num_prompts=4,  # per modality in stages 3 and 4 [P]
            merging="averaged",  # grid-keeping transitions: "averaged" or "separate" [D]
            drop_path=0.2,  # at the last block, linear from 0 [D]
            layer_scale_init=1e-5,  # global blocks, as DINOv2
            num_moe_blocks=0,  # last blocks whose MLP is a mixture of experts; 6 in *_moe [P]
            moe_from="end",  # "start": the first blocks of stages 3 and 4, to compare; export does not know it
            num_experts=8,  # [P]
            experts_per_token=1,  # [P]
            capacity_factor=1.25,  # training only; evaluation never drops [D]
        ),
        fusion=dict(  # the encoder over dates and modalities of a cell
            width=512,  # of the fused feature
            depth=12,  # blocks
            head_width=64,  # [P, SkySense: 16 heads of 1024]
            mlp_ratio=4,  # [D]
            drop_path=0.2,  # as in the backbone [D]
        ),
        queries=dict(num_queries=64, mlp_ratio=4),  # one decoder layer at the fusion's width and head width [D]
        # [D]; which query it is takes log(num_queries) of the log(num_prototypes) nats that a target in L_QSACL tells
        heads=dict(hidden_dim=2048, bottleneck_dim=256, num_prototypes=8192),
        text_dim=384,  # width of the text table's embeddings
    )


def _objective() -> dict:
    return dict(
        weights=dict(  # 0 turns a term off
            mgcl=1.0,  # multi-granularity contrastive learning [D: weights are not published]
            qsacl=1.0,  # query-based semantic aggregation contrastive learning
            text_alignment=1.0,  # dense image-text alignment on OpenStreetMap classes
            balance=0.01,  # Switch load balancing
            router_z=0.001,  # ST-MoE router z-loss
            koleo=0.0,  # DINOv2's spread regulariser on image features; off
            distil=0.0,  # features of a trained run, objective.distil
        ),
        mgcl=dict(  # the three weights are relative: divided by their sum; mean over modalities and fused [D]
            pixel_weight=1.0,
            object_weight=1.0,
            image_weight=1.0,
            num_positions=64,  # student tokens per view at pixel granularity [D]
            num_clusters=16,  # per teacher view at object granularity [D]
            cluster_iterations=3,  # assignments to clusters, each after the first with new centroids [D]
        ),
        distil=dict(  # with weights.distil above 0: another run, frozen, of any size, is learned from [D]
            teacher="",  # its --workdir; its teacher's weights
            step=0,  # of its checkpoint; 0: the newest when this run starts
            distance="cosine",  # of projected features from the frozen ones: "cosine" or "smooth_l1"
            stage3_weight=1.0,  # of tokens behind stage 3, relative as above
            stage4_weight=1.0,  # of each modality's final features
            fused_weight=1.0,  # of the fused features
        ),
        student_temperature=0.1,  # of cosines with prototypes; DINOv2
        teacher_temperature=0.07,  # after the warm-up; DINOv2
        teacher_temperature_start=0.04,  # DINOv2
        teacher_temperature_warmup_steps=30_000,  # linear [D]
        sinkhorn_iterations=3,  # DINOv2
        prototype_freeze_steps=1250,  # DINOv2
        text_table="skysense_jax/data/text/osm_minilm_l6_v2.npz",  # embeddings of the class names
    )


def _optim() -> dict:
    return dict(
        num_steps=600_000,  # [P]
        seed=0,  # initialisation, drop path, photometric changes, positions
        learning_rate=2e-4,  # peak [P]
        final_learning_rate=1e-6,  # [P]
        warmup_steps=10_000,  # [D]
        weight_decay=0.04,  # not on norms, biases, prompts, queries, position terms [D]
        beta1=0.9,  # of AdamW's first moment [D]
        beta2=0.999,  # of its second [D]
        clip_norm=3.0,  # global gradient norm [D]
        ema_momentum=0.996,  # of the teacher, cosine to 1 over num_steps [D]
    )


def _eval() -> dict:
    """The probes (linear, k nearest neighbours) on the way and at the end; they never feed back into training."""
    return dict(
        probe_every_steps=5000,  # the teacher is probed at the first checkpoint after as many; 0: only at the end
        num_train_scenes=48,  # fitted on
        num_test_scenes=24,  # scored, the scenes after them; 0: no probe on scenes
        # Labelled data to probe on too: (name in metrics, --dataset, --task or "" for its card's) as in
        # python -m skysense_jax.eval; the best checkpoint is then theirs.
        datasets=(),
        probe_untrained=False,  # also a network that no step has changed: room for a second state
        first_index=1_000_000,  # held-out procedural scenes, far from those trained on
        batch_size=8,  # windows encoded at a time
    )
