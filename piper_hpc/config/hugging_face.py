"""A Hugging Face config.json as a ModelSpec: each supported family as `transformers` builds it.

Read: what decides shapes, parameters and the arithmetic of a token. Refused by name: a family that is not in
`FAMILIES`; a size that is missing or of another type; of the keys that are read, a value that ModelSpec cannot hold (an
activation, scores or rotary positions of a kind that is not modelled, layers with experts or windows at uneven
distances, `moe_layer_freq` other than 1, cross attention, Arctic without its residual); and dropout or noise where the
family trains here, which nothing of it does.

Not read: initialisation, tokens' ids, caches, and `quantization_config`, which says how released weights are stored.
"""

from __future__ import annotations

from piper_hpc.config.hugging_face_families import FAMILIES, PLANNED_ALONE
from piper_hpc.config.hugging_face_keys import Json, refusal, require_one_of
from piper_hpc.spec import ModelSpec

RANDOM = ("attention_dropout", "router_jitter_noise", "hidden_dropout", "resid_pdrop", "emb_pdrop", "embd_pdrop")
"""Keys of what is drawn at random in training, which the executor does not do: the next step would not be the same
under another layout."""


def from_hf(config: Json) -> ModelSpec:
    """The model that `transformers` builds from this configuration, named after its `model_type`.

    Multi-token-prediction modules (`num_nextn_predict_layers`) are not among what `transformers` builds and counts:
    `mtp_layers` of the answer is 0. An unknown family, a missing size, or a value of a key that is read which ModelSpec
    does not hold raises ConfigError that names it.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        rule = f"is no supported family ({', '.join(FAMILIES)})"
        raise refusal("model_type", family, rule, "model.path=<config.json of a supported family>")
    if family not in PLANNED_ALONE:
        for key in RANDOM:
            require_one_of(config, key, (0, None), 0)
    return ModelSpec(**{"name": str(family), **FAMILIES[family](config)})
