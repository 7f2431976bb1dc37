"""SkySense V2 for Hugging Face: ``AutoModel.from_pretrained(DIR, trust_remote_code=True)``.

Needs transformers beside what modeling_skysensev2.py needs; the network, its arguments and its checks are there.
"""

import pathlib

from transformers import PretrainedConfig, PreTrainedModel

from .modeling_skysensev2 import CHECKSUMS, Features, SkySenseV2, read_config


class SkySenseV2Config(PretrainedConfig):
    """What ``config.json`` holds, and the options of ``SkySenseV2``."""

    model_type = "skysense_v2"

    def __init__(
        self,
        normalise: bool = True,
        check_inputs: bool = True,
        drop_path: float = 0.0,
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        **fields,
    ):
        super().__init__(**fields)
        self.normalise, self.check_inputs = normalise, check_inputs
        self.drop_path, self.out_indices = drop_path, list(out_indices)


class SkySenseV2Model(PreTrainedModel):
    """``SkySenseV2`` with Hugging Face's loading, saving and gradient checkpointing."""

    config_class = SkySenseV2Config
    base_model_prefix = "network"
    supports_gradient_checkpointing = True

    def __init__(self, config: SkySenseV2Config):
        super().__init__(config)
        options = {key: getattr(config, key) for key in ("normalise", "check_inputs", "drop_path", "out_indices")}
        self.network = SkySenseV2(config.to_dict(), **options)
        self.post_init()

    def _init_weights(self, module) -> None:
        """Nothing: the modules have initialised themselves."""

    def get_input_embeddings(self):
        """The tokenizers."""
        return self.network.patch_embed

    @classmethod
    def from_pretrained(cls, directory, *arguments, verify: bool = True, **options):
        """As Hugging Face's, but that a file which is not what was exported and a weight that is missing are errors.

        ``verify`` compares a local directory with its checksums, if it has some.
        """
        if verify and (pathlib.Path(directory) / CHECKSUMS).is_file():
            read_config(directory)
        options["output_loading_info"] = True
        model, found = super().from_pretrained(directory, *arguments, **options)
        wrong = sorted(map(str, (*found["missing_keys"], *found["unexpected_keys"])))
        if wrong:
            raise ValueError(f"{directory}: {len(wrong)} weights do not fit config.json: {'; '.join(wrong[:5])}")
        return model

    def save_pretrained(self, save_directory, *, state_dict=None, **options) -> None:
        """As Hugging Face's, under the names of ``SkySenseV2``, so that it loads the directory too (verify=False)."""
        state = self.state_dict() if state_dict is None else state_dict
        state = {name.removeprefix(f"{self.base_model_prefix}."): array for name, array in state.items()}
        super().save_pretrained(save_directory, state_dict=state, **options)

    def forward(self, images, **masks) -> Features:
        return self.network(images, **masks)
